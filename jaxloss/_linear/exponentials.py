"""The exponentials of a chunk's logits above an offset that is known before the logits are.

The offset is the label's logit, from D multiplications a token and the label's column of the
kernel. XLA:TPU copies the whole kernel to gather columns of it; there the offset is the largest of
a few columns' logits, and the label's comes from the product (``label_offset.rebased``).

Letters: n tokens of a chunk, D features, V columns of the kernel, C classes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxloss._linear import pallas_rows
from jaxloss._linear.product import Product
from jaxloss._numerics import label_offset
from jaxloss._numerics.logits import Logits, Scaling
from jaxloss._numerics.parts import RowPart
from jaxloss._numerics.passes import row_max
from jaxloss._types import Axes
from jaxloss._xla import mesh
from jaxloss._xla.dtypes import downcast, upcast
from jaxloss._xla.elementary import finite

_FEW = 512  # columns; their product takes 1/250 of the time of one with V = 128256


class OfLabel(NamedTuple):
    """What is known of each token before its logits are. Where the offset is not the label's logit,
    only the column is."""

    column: Array  # int32, C: none here
    logit: Any = None  # wide, NaN: there is no such class
    weights: Any = None  # [n, D], the label's column of the kernel; 0: none here


class Exponentials(NamedTuple):
    values: Any  # [n, C or V], narrow, times the slope of a soft cap; None: the sums are enough
    scale: Any  # [n], which makes of them those above ``part.m``; None: they are that
    part: RowPart


def of_labels(product: Product, column: Array, axes: Axes) -> OfLabel:
    weights = product.columns_at(column)
    logit = jnp.sum(product.wide_hidden * upcast(weights), axis=-1)
    here = column < product.num_classes
    if product.bias is not None:
        bias = product.bias.astype(logit.dtype)
        logit += bias[jnp.minimum(column, product.num_classes - 1)]
    return OfLabel(column, _found(logit, here, axes), weights)


def _found(logit: Array, here: Array, axes: Axes) -> Array:
    """The label's logit, from the device that has it; NaN: none has."""
    logit, found = jnp.where(here, logit, 0), here.astype(logit.dtype)
    if axes:
        logit, found = mesh.sums((logit, found), axes)
    return jnp.where(found > 0, logit, jnp.nan)


class _State(NamedTuple):
    of_offset: tuple  # (the sums, ...) above the offset
    offset: Array
    fits: Array  # bool[n]


def _until_all_fit(
    read: Callable, above: Callable, offset: Array, highest: Callable, weight: Any
) -> _State:
    """``above(read(), offset)``; for rows whose sum is too large again, from ``highest(read())``.

    This is a loop because vmap would compute both sides of a condition for every batch.
    """
    offset = mesh.varying(offset, mesh.varies_over(weight))
    of_offset = above(read(), offset)
    state = _State(of_offset, offset, label_offset.fits(offset, of_offset[0], weight))

    def again(state):
        x = read()
        offset = jnp.where(state.fits, state.offset, finite(highest(x)))
        return _State(above(x, offset), offset, state.fits | True)

    return lax.while_loop(lambda state: ~jnp.all(state.fits), again, state)


def above_label(
    product: Product,
    of_label: OfLabel,
    exist: Array | None,
    label_exists: Array | None,
    scaling: Scaling | None,
    axes: Axes,
    weight: Array | None,
    fused: bool,
) -> Exponentials:
    """One product, and one more where a row's sum is too large.

    ``exist``: which classes do. ``weight``: of the rows' gradients; None: none is asked for, and
    the sums are enough. ``fused``: by the kernel for this backend, which knows of no mask and no
    scaling.
    """
    column = of_label.column
    own = Logits(of_label.logit, label_exists, scaling).wide()

    def read():
        return None if fused else Logits(product.logits(), exist, scaling)

    def above(x, offset):
        if fused:
            values, s = pallas_rows.exponentials(product, column, offset)
        else:
            e = label_offset.exponentials(x, offset, column)
            s = jnp.sum(e, axis=-1)
            values = downcast(e if scaling is None else e * x.slope(), product.narrow)
        return lax.psum(s, axes) if axes else s, None if weight is None else values

    def highest(x):
        m = pallas_rows.largest(product, column) if fused else row_max(x)
        return mesh.largest(m, axes)

    state = _until_all_fit(read, above, own, highest, weight)
    s, values = state.of_offset
    return Exponentials(values, None, RowPart(state.offset, s, own, column, scaling=scaling))


def above_few(product: Product, column: Array, axes: Axes, weight: Array | None) -> Exponentials:
    """By the kernel: one product, two more where a row's sum is too large."""
    here = column < product.num_classes

    def above(_, offset):
        values, s, own = pallas_rows.exponentials(product, column, offset)
        return lax.psum(s, axes) if axes else s, values, _found(own, here, axes)

    def highest(_):
        return mesh.largest(pallas_rows.largest(product, column), axes)

    few = product.block(0, min(_FEW, product.num_classes)).logits()
    offset = finite(mesh.largest(jnp.max(few, axis=-1), axes))
    state = _until_all_fit(lambda: None, above, offset, highest, weight)
    s, values, own = state.of_offset
    m, scale = label_offset.rebased(state.offset, own)
    return Exponentials(values, scale, RowPart(m, s * scale, own, column))
