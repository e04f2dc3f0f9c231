"""The losses of pairs: from checked arguments to the loss."""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from jaxloss._linear import layout
from jaxloss._linear.pairs import Masks, Operands, Way, of_pairs, sums_of_others
from jaxloss._linear.product import Sweep
from jaxloss._numerics.binary import softplus
from jaxloss._numerics.pairs import LOG_SUM_EXP, SUM_OF_SOFTPLUS
from jaxloss._tokens.reduction import TokenWeights, reduce_losses
from jaxloss._types import Axes, LossOptions, with_static_numbers
from jaxloss._xla import mesh
from jaxloss._xla.device import jit
from jaxloss._xla.dtypes import accumulator_dtype


class PairArrays(NamedTuple):
    """Or something for each of them. N pairs, M rows of y on all devices of the ring."""

    x: Any  # [N, D]
    y: Any  # ([N, D], and further rows)
    where: Any = None  # [N] or [N, M]
    sample_weight: Any = None  # [N]


@with_static_numbers
class PairScalars(NamedTuple):
    """Numbers that may be traced."""

    scale: Any
    bias: Any = None  # None: the loss is CLIP's; a number: SigLIP's


@jit
def of_device(
    arrays: PairArrays,
    scalars: PairScalars,
    *,
    symmetric: bool,
    sweep: Sweep,
    precision: Any,
    options: LossOptions,
) -> Array:
    """Of the pairs of one device."""
    dtype = accumulator_dtype(arrays.x.dtype)
    of_softmax = scalars.bias is None
    both = of_softmax and symmetric
    x, y, masks, counts = _existing(arrays, both, sweep.token_axes)
    bias = None if of_softmax else jnp.asarray(scalars.bias, dtype)
    operands = Operands(x, y, jnp.asarray(scalars.scale, dtype), bias)
    way = Way(LOG_SUM_EXP if of_softmax else SUM_OF_SOFTPLUS, sweep, both, precision)
    sums = sums_of_others(way, operands, masks)
    own = of_pairs(operands)
    if of_softmax:
        each = [softplus(jnp.where(counts, of_others - own, 0))[1] for of_others in sums]
        losses = each[0] if not both else (each[0] + each[1]) / 2
    else:
        losses = sums[0] + softplus(jnp.where(counts, own, 0))[0]
    weights = TokenWeights(counts, arrays.sample_weight)
    return reduce_losses(losses, weights, options)


def _existing(arrays: PairArrays, both: bool, axes: Axes) -> tuple[Array, Array, Masks, Array]:
    """``(x, y, masks, which pairs count)``. Rows that no entry is of are 0, whatever they held."""
    x, (y, *more), where, sample_weight = arrays
    y = jnp.concatenate([y, *more]) if more else y
    pairs, columns = x.shape[0], y.shape[0]
    masks, counts = Masks(), jnp.ones(pairs, bool)
    read: tuple[Any, Any] = None, None  # the rows of x, and of y, that are
    if where is not None and where.ndim == 1:
        there = jnp.pad(where, (0, columns - pairs), constant_values=True)
        masks, read, counts = Masks(where, there), (where, there), where
    elif where is not None:
        first = mesh.first(columns, axes)
        of_all = jnp.any(where, axis=0)
        if axes:
            of_all = lax.psum(of_all.astype(jnp.int32), axes) > 0
        there = lax.dynamic_slice_in_dim(of_all, first, columns)
        masks, read = Masks(entries=where), (jnp.any(where, axis=1), there)
        at = first + jnp.arange(pairs, dtype=jnp.int32)
        counts = jnp.take_along_axis(where, at[:, None], axis=1, mode="promise_in_bounds")[:, 0]
    if sample_weight is not None:
        counts &= sample_weight.astype(bool)
        if not both:  # a row that weighs nothing is in no other's sum
            read = (counts, read[1] if read else None)
    if read is not None:
        x, y = (
            v if r is None else jnp.where(r[:, None], v, 0)
            for v, r in zip((x, y), read, strict=True)
        )
    return x, y, masks, counts


@jit
def over_mesh(
    arrays: PairArrays, scalars: PairScalars, *, found: layout.Layout, static: tuple
) -> Array:
    """:func:`of_device` inside of ``shard_map``; ``static``: pairs of its other arguments."""
    rows = P(*found.tokens)
    where = arrays.where
    of_where = P(*found.tokens, None) if where is not None and where.ndim == 2 else rows
    of_arrays = PairArrays(P(*found.tokens, None), P(*found.tokens, None), of_where, rows)
    options = dict(static)["options"]
    out = rows if options.reduction == "none" else P()
    function = partial(of_device, **dict(static))
    return layout.run(function, found, (arrays, scalars), (of_arrays, P()), out)
