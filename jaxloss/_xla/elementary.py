"""The exponential and its relatives, of as many digits as the dtype has.

A TPU's own are by default shorter programs of fewer digits, enough for a network's activations. A
loss near 0 is all in those digits. CPUs and GPUs have one version of each: there this changes
nothing.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._xla import mesh
from jaxloss._xla.selection import select


def _accurate(function: Callable, x: Array) -> Array:
    # Where its partitioner has work, the XLA of JAX 0.10 hands the mode on to conversions that have
    # none, and fails. A CPU does without: see above.
    split = mesh.manual_axes() and mesh.other_axes() and jax.default_backend() == "cpu"
    return function(x, accuracy=None if split else lax.AccuracyMode.HIGHEST)


exp = partial(_accurate, lax.exp)
expm1 = partial(_accurate, lax.expm1)
log = partial(_accurate, lax.log)
log1p = partial(_accurate, lax.log1p)
tanh = partial(_accurate, lax.tanh)

_ROUND, _ROUND_BITS = 1.5 * 2**23, 0x4B400000  # a sum with it is an integer, its lowest bits
_ONE_BITS = 0x3F800000  # of 1.0; n in the exponent's bits above it makes 2^n


@jax.custom_jvp
def short_exp(x: Array) -> Array:
    """float32's exp(x) of x <= 0 (a rounding above is fine), 2.3 units in the last place or less.

    Half as many instructions as XLA's accurate one for a TPU, which take longer than reading x
    does: they also answer for what overflows and for subnormal results, which are 0 here.

    2^k exp(r), |r| <= ln(2) / 2, with ln(2) in two parts, so that k times the first is exact, as in
    Cephes' expf (S. L. Moshier, 1992). exp(r) = 1 + r + r^2 q(r), q of degree 3 by Remez' exchange
    for the least relative error of exp(r), 1.1e-7.
    """
    # By way of the bits: the XLA of JAX 0.10 takes (a + c) - c for a, of floats too.
    t = x * 1.44269504088896341 + _ROUND
    n = lax.bitcast_convert_type(t, jnp.int32) - _ROUND_BITS
    k = n.astype(jnp.float32)
    r = (x - k * 0.693359375) + k * 2.12194440e-4
    q = jnp.full_like(r, 8.3125202352e-3)
    for c in (4.18901568388e-2, 1.6667114649e-1, 4.99992314952e-1):
        q = q * r + c
    p = q * (r * r) + r + 1
    # A factor, not a sum of p's bits: so this has the right derivative where JAX loses the rule
    # below, as it does where it differentiates twice through jax.checkpoint within shard_map.
    power = lax.bitcast_convert_type((n << 23) + _ONE_BITS, jnp.float32)
    least = -87.3  # 2^-126; below it there are only subnormal numbers, which a TPU flushes to 0
    return jnp.where(x < least, 0, p * power)


@short_exp.defjvp
def _(primals, tangents):
    e = short_exp(*primals)
    return e, e * tangents[0]


def exp_is_long() -> bool:
    """Whether XLA's accurate exponential is a long program, as it is for TPUs before the TPU7x."""
    if jax.default_backend() != "tpu":
        return False
    return not jax.devices()[0].device_kind.startswith("TPU7")


def exp_of_nonpositive(x: Array) -> Array:
    return short_exp(x) if x.dtype == jnp.float32 and exp_is_long() else exp(x)


def finite(m: Array) -> Array:
    # exp(-inf - -inf) is NaN: an empty row's exponentials are 0, whatever stands in for m.
    return select(m == -jnp.inf, 0, m)
