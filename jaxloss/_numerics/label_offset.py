"""Exponentials above the label's own logit, which is known before the other logits are.

With ``o`` the label's logit ``x_k`` the sum ``s = sum_{j != k} exp(x_j - o)`` needs no maximum: the
loss is ``log1p(s)``, and the part of the row (``parts``) is that of a row whose maximum is the
label. No logit but the label's has to be read twice. Where ``s`` would be past what its products
have room for, the row's maximum is ``o`` after all.
"""

import math

import jax.numpy as jnp
from jax import Array

from jaxloss._numerics.logits import Logits
from jaxloss._numerics.passes import other_exponentials
from jaxloss._xla.elementary import exp

# The largest sum, of a row whose loss is 44 nats; and its largest multiple of the row's weight. The
# weight over the sum multiplies the row's hidden: that is then far from float32's least.
MOST, MOST_OF_WEIGHT = 2.0**64, 2.0**84
HIGHEST = math.log(MOST) + 1  # of a logit above the offset, in nats


def exponentials(logits: Logits, offset: Array, label: Array) -> Array:
    """exp(x_j - offset) of logits ``[n, C]``: 0 at the label, and little more than ``MOST``."""
    read = logits.as_read()
    above = read.difference(read.values, offset)
    # All are finite, because a row that counts for nothing is multiplied by 0, and 0 * inf is NaN.
    # The difference is bounded and not the logit: beside an offset of -1e10, or in the units of a
    # temperature of 1e-9, 45 nats are rounded away, and the row would seem to fit.
    above = Logits(jnp.minimum(above, HIGHEST))
    return other_exponentials(above, jnp.zeros_like(offset), label)


def rebased(offset: Array, x_label: Array) -> tuple[Array, Array]:
    """``(m, exp(offset - m))``: with ``m`` no less than the label's logit, nothing is taken away
    from a sum of both."""
    m = jnp.maximum(offset, x_label)
    return m, exp(offset - m)


def fits(offset: Array, s: Array, weight: Array | None) -> Array:
    """Whether the offset serves the row. ``weight``: what its gradient is multiplied by; None: no
    gradient is asked for."""
    most = MOST
    if weight is not None:
        most = jnp.where(weight == 0, MOST, jnp.minimum(MOST, jnp.abs(weight) * MOST_OF_WEIGHT))
    return jnp.isfinite(offset) & (s <= most)
