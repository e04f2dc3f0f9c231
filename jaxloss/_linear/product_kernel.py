"""The row parts of ``hidden @ kernel`` by the hand-written kernel for the chip at hand.

Letters: N tokens, D features, V columns of the kernel, C classes.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxloss._kernels import dispatch
from jaxloss._linear import packing
from jaxloss._linear import product as _product
from jaxloss._numerics import parts
from jaxloss._numerics import rows as _rows
from jaxloss._xla.derivatives import with_derivative_of
from jaxloss._xla.math import finite


def _computed(geometry: _product.Geometry, hidden, kernel, bias, kept, count=None) -> parts.RowPart:
    of_classes = geometry.vocab_axis, geometry.num_classes
    m, s, x_kept = dispatch.product_parts()(hidden, kernel, bias, kept, *of_classes, count)
    return parts.RowPart(m, s, x_kept, kept)


def row_part(
    geometry: _product.Geometry, hidden, kernel, bias, kept: Array, counts: Any
) -> tuple[Array, Array, Array]:
    """``(m, s, x_kept)`` of ``parts.RowPart``, [N] each, of labels.

    ``counts[N]``: which tokens are computed, ``hidden`` being 0 in the others; None: all.
    """
    if counts is None:
        part = _computed(geometry, hidden, kernel, bias, kept)
        return part.m, part.s, part.x_kept
    order, places = packing.counted_first(counts), packing.places(counts)
    number = jnp.sum(counts, dtype=jnp.int32)
    hidden, of_order = (packing.in_order(x, order) for x in (hidden, kept))
    part = _computed(geometry, hidden, kernel, bias, of_order, number)
    # The others' logits are the bias, and a state that fits them has finite probabilities: they are
    # multiplied by 0, in derivatives of any order.
    high = jnp.zeros((), part.m.dtype)
    if bias is not None:
        high = finite(jnp.max(bias[: geometry.num_classes]).astype(high.dtype))
    own = jnp.where(kept < geometry.num_classes, high, jnp.nan)
    m, s, x_kept = (
        jnp.where(counts, packing.taken(x, places), other)
        for x, other in ((part.m, high), (part.s, 1), (part.x_kept, own))
    )
    return m, s, x_kept


def _slope_by_xla(geometry: _product.Geometry, hidden, kernel, bias, rows: tuple) -> Array:
    logits = _product.product(hidden, kernel, bias, geometry)
    return _rows.plain_gradient(logits, *rows).astype(hidden.dtype)


def slope(geometry: _product.Geometry, hidden, kernel, bias, rows: tuple) -> Array:
    """[N, C] in the dtype of ``hidden``: the logits' gradient, ``rows`` being its coefficients."""
    by_kernel = partial(dispatch.product_gradient(), vocab_axis=geometry.vocab_axis)
    compute = with_derivative_of(partial(_slope_by_xla, geometry), by_kernel)
    return compute(hidden, kernel, bias, rows)


def row_losses(
    geometry: _product.Geometry, operands: Any, kept: Array, count: Array, outputs: tuple[str, ...]
) -> _rows.RowLosses:
    """[N] each, of labels, without a derivative; those past ``count`` are anything."""
    kernel = _product.gathered(operands.kernel, geometry)
    part = _computed(geometry, operands.hidden, kernel, operands.bias, kept, count)
    part = parts.merge_shards(part, geometry.vocab_axes, geometry.num_classes)
    return _rows.finalize(part, outputs)[0]
