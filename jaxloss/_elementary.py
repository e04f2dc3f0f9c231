"""The exponential and its relatives, of as many digits as the dtype has.

A TPU's own are by default shorter programs of fewer digits, enough for a network's activations. A
loss near 0 is all in those digits. CPUs and GPUs have one version of each: there this changes
nothing.
"""

from functools import partial

from jax import lax

_HIGHEST = lax.AccuracyMode.HIGHEST

exp = partial(lax.exp, accuracy=_HIGHEST)
expm1 = partial(lax.expm1, accuracy=_HIGHEST)
log = partial(lax.log, accuracy=_HIGHEST)
log1p = partial(lax.log1p, accuracy=_HIGHEST)
tanh = partial(lax.tanh, accuracy=_HIGHEST)
