"""How losses become one number: what tokens weigh, their sum and mean."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._types import LossOptions
from jaxloss._xla.selection import select


class TokenWeights(NamedTuple):
    """Which tokens count, and for how much; each shaped as the losses."""

    valid: Array  # bool
    sample_weight: Array | None = None  # numbers, or a boolean mask that ``valid`` is part of
    label_weight: Array | None = None  # w_y


def weights_and_divisors(weights: TokenWeights, dtype: jnp.dtype) -> tuple[Array, Array]:
    """``(weight, divisor)``: the mean is ``sum(weight * losses) / sum(divisor)``.

    Both are 0 where a token does not count.
    """
    valid, sample_weight, label_weight = weights
    weight = jnp.ones_like(valid, dtype=dtype)
    if sample_weight is not None and sample_weight.dtype != jnp.bool_:
        weight = sample_weight.astype(dtype)
    weight = select(valid, weight, 0)
    if label_weight is None:
        return weight, weight
    return weight, select(valid, weight * label_weight, 0)


def normalised_weights(
    weights: TokenWeights, options: LossOptions, dtype: jnp.dtype
) -> tuple[Array, Array]:
    """``(weight, offset)``: the result is ``sum(weight * losses) + offset``.

    The offset is 0, except for a mean over nothing: there it is that mean, and the weights are 0.
    With ``"none"`` there is no sum. ``weight`` is 0 where a token does not count. The sum is over
    the devices along ``options.token_axes`` too.
    """
    weight, divisor = weights_and_divisors(weights, dtype)
    if options.reduction != "mean":
        return weight, jnp.zeros((), dtype)
    divisor = jnp.sum(divisor)
    if options.token_axes:
        divisor = lax.psum(divisor, options.token_axes)
    # In place of a 0 it makes all weights 0, and with them all gradients.
    weight = select(weights.valid, weight / select(divisor == 0, jnp.inf, divisor), 0)
    offset = _of_nothing(options.empty_mean)
    return weight, select(divisor == 0, offset, jnp.zeros((), dtype))


def reduce_losses(losses: Array, weights: TokenWeights, options: LossOptions) -> Array:
    """``losses[...]``, weighed, or their sum or mean."""
    reduction, token_axes = options.reduction, options.token_axes
    weight, divisor = weights_and_divisors(weights, losses.dtype)
    losses = select(weights.valid, weight * losses, 0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        total = jnp.sum(losses)
        return lax.psum(total, token_axes) if token_axes else total
    # One reduction for both sums: a second one took XLA:CPU a tenth of the time of a small loss,
    # and a mesh another all-reduce.
    if jax.typeof(divisor) != jax.typeof(losses):
        divisor += jnp.zeros_like(losses)  # its sharding and varying axes, which have to be equal
    # Not raveled: that would gather sharded tokens. Not stack: under vmap over an axis that an
    # explicit mesh splits it refuses what is the same in the whole batch.
    both = jnp.concatenate([losses[None], divisor[None]])
    both = jnp.sum(both, axis=tuple(range(1, both.ndim)))
    both = lax.psum(both, token_axes) if token_axes else both
    total, divisor = (lax.index_in_dim(both, i, keepdims=False) for i in range(2))
    return mean_of(total, divisor, options.empty_mean)


def mean_of(total: Array, divisor: Array, empty_mean: float | None = None) -> Array:
    """``total / divisor``; where ``divisor`` is 0, ``empty_mean`` (None: NaN) with gradient 0."""
    # The constant in place of a 0 keeps 0 / 0 out of the gradients.
    nothing = divisor == 0
    mean = total / select(nothing, 1, divisor)
    return select(nothing, _of_nothing(empty_mean), mean)


def _of_nothing(empty_mean: float | None) -> float:
    return math.nan if empty_mean is None else empty_mean
