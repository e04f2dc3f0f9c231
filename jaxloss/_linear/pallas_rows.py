"""The row parts of ``hidden @ kernel`` by the hand-written kernel for the chip at hand.

Letters: N tokens, D features, V columns of the kernel, C classes.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxloss._linear import packing
from jaxloss._linear.product import Product
from jaxloss._numerics import label_offset, parts
from jaxloss._numerics.rows import RowLosses, finalize, plain_gradient
from jaxloss._pallas import dispatch
from jaxloss._types import Axes
from jaxloss._xla.derivatives import with_derivative_of
from jaxloss._xla.elementary import finite


def _computed(product: Product, label: Array, count: Any = None) -> parts.RowPart:
    operands = product.hidden.astype(product.narrow), product.kernel, product.bias
    of_classes = product.vocab_axis, product.num_classes
    m, s, x_omitted = dispatch.product_parts()(*operands, label, *of_classes, count)
    return parts.RowPart(m, s, x_omitted, label)


def row_part(product: Product, label: Array, valid: Any) -> tuple[Array, Array, Array]:
    """``(m, s, x_omitted)`` of ``parts.RowPart``, [N] each, of labels.

    ``valid[N]``: which tokens are computed, ``hidden`` being 0 in the others; None: all.
    """
    if valid is None:
        part = _computed(product, label)
        return part.m, part.s, part.x_omitted
    order, positions = packing.valid_first(valid), packing.positions(valid)
    number = jnp.sum(valid, dtype=jnp.int32)
    hidden, of_order = (packing.in_order(x, order) for x in (product.hidden, label))
    part = _computed(replace(product, hidden=hidden), of_order, number)
    # The others' logits are the bias, and a state that fits them has finite probabilities: they are
    # multiplied by 0, in derivatives of any order.
    high = jnp.zeros((), part.m.dtype)
    if product.bias is not None:
        high = finite(jnp.max(product.bias[: product.num_classes]).astype(high.dtype))
    own = jnp.where(label < product.num_classes, high, jnp.nan)
    m, s, x_omitted = (
        jnp.where(valid, packing.gather_rows(x, positions), other)
        for x, other in ((part.m, high), (part.s, 1), (part.x_omitted, own))
    )
    return m, s, x_omitted


def largest(product: Product, label: Array) -> Array:
    """The rows' maxima, without a derivative."""
    return _computed(product, label).m


def exponentials(product: Product, label: Array, offset: Array) -> tuple[Array, ...]:
    """``label_offset.exponentials`` [N, V] in the dtype of the products, and their sums; on a TPU
    the labels' logits too. Without a derivative."""
    operands = product.hidden.astype(product.narrow), product.kernel, product.bias
    of_classes = product.vocab_axis, product.num_classes
    of_rows = label, offset, label_offset.HIGHEST
    return dispatch.product_exponentials()(*operands, *of_rows, *of_classes)


def _slope_by_xla(product: Product, rows: tuple) -> Array:
    return plain_gradient(product.logits(), *rows).astype(product.narrow)


def slope(product: Product, rows: tuple) -> Array:
    """The logits' gradient, [N, C] in the dtype of the products; ``rows`` are its coefficients."""

    def by_kernel(product, rows):
        operands = product.hidden.astype(product.narrow), product.kernel, product.bias
        return dispatch.product_gradient()(*operands, rows, vocab_axis=product.vocab_axis)

    return with_derivative_of(_slope_by_xla, by_kernel)(product, rows)


def row_losses(
    product: Product, label: Array, count: Array, outputs: tuple[str, ...], vocab_axes: Axes
) -> RowLosses:
    """[N] each, of labels, without a derivative; those past ``count`` are anything."""
    part = _computed(product.whole(), label, count)
    part = parts.merge_shards(part, vocab_axes, product.num_classes)
    return finalize(part, outputs)[0]
