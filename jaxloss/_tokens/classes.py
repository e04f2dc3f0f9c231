"""The C classes, and which of them the columns here are."""

from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jax import Array, lax

from jaxloss._types import Axes, TopKLabels
from jaxloss._xla import mesh
from jaxloss._xla.indexing import local_index, looked_up, of_rank
from jaxloss._xla.selection import select


class Classes(NamedTuple):
    """The C classes, and which of them the columns here are."""

    total: int  # C
    size: int  # columns here; those of classes past C are padding
    start: Any  # the class of the first
    axes: Axes  # the mesh axes that the columns are split over
    block: int = 0  # so many columns may be read at a time; 0: all of them


def local_classes(
    total: int, size: int | None = None, vocab_axes: Axes = (), block: int = 0
) -> Classes:
    """``size``: by default all are here."""
    size = total if size is None else size
    return Classes(total, size, mesh.first(size, vocab_axes), vocab_axes, block)


def existing(class_mask: Array | None, classes: Classes, rank: int) -> Array | None:
    """``class_mask``, and no padding."""
    if classes.total == classes.size * mesh.size(classes.axes):
        return class_mask
    column = jnp.arange(classes.size, dtype=jnp.int32) + classes.start
    real = of_rank(column < classes.total, rank)
    return real if class_mask is None else class_mask & real


def is_probabilities(labels: Any) -> bool:
    return not isinstance(labels, TopKLabels) and jnp.issubdtype(labels.dtype, jnp.floating)


def is_indices(labels: Any) -> bool:
    return not isinstance(labels, TopKLabels) and not is_probabilities(labels)


def class_indices(labels: Array, num_classes: int, ignore_index: int | None):
    """Returns (index: int32; not ignored: bool). A label out of range has index ``num_classes``.

    An ignored token has class 0: finite numbers that are then selected away. NaN would return from
    behind the select in second derivatives.
    """
    if labels.dtype.itemsize < 4:  # int8 cannot hold num_classes
        labels = labels.astype(jnp.int32)
    info = jnp.iinfo(labels.dtype)
    if ignore_index is None or not info.min <= ignore_index <= info.max:
        ignored = jnp.zeros_like(labels, bool)
    else:
        ignored = labels == ignore_index
    # Compared before it is narrowed: 2^32 + 3 is not class 3.
    inside = (labels >= 0) & (labels < num_classes)
    index = select(inside, labels, num_classes).astype(jnp.int32)
    return select(ignored, 0, index), ~ignored


def existing_columns(class_mask: Array, classes: Classes) -> Array:
    mask = jnp.broadcast_to(class_mask, (*class_mask.shape[:-1], classes.size))
    return cast(Array, existing(mask, classes, mask.ndim))


def number_of_classes(classes: Classes, class_mask: Array | None, dtype) -> Array:
    """How many exist, a row: ``[1]`` or ``[..., 1]``.

    ``class_mask``: those that the caller says exist; padding is known.
    """
    if class_mask is None:
        return jnp.full((1,), classes.total, dtype)
    mask = existing_columns(class_mask, classes)

    def of(columns):  # XLA:CPU writes them out as numbers: float32 of the logits' size
        return jnp.sum(columns, axis=-1, keepdims=True, dtype=dtype)

    def more(i, total):
        start = first + i * classes.block
        return total + of(lax.dynamic_slice_in_dim(mask, start, classes.block, -1))

    first = classes.size % classes.block if classes.block else classes.size
    exist = of(mask[..., :first])
    if first < classes.size:
        exist = lax.fori_loop(0, classes.size // classes.block, more, exist)
    return lax.psum(exist, classes.axes) if classes.axes else exist


def weight_of(index: Array, weight: Array, classes: Classes, dtype) -> Array:
    """``w`` of each class index, 1 where there is no such class: its NaN must reach the loss."""
    inside = index < classes.total
    found = looked_up(weight.astype(dtype), select(inside, index, 0))
    return select(inside, found, 1)


def column_of(index: Array, classes: Classes) -> Array:
    if not classes.axes and classes.total == classes.size:
        return index
    column = local_index(index, classes.start, classes.size)
    return select(index < classes.total, column, classes.size)


def anywhere(here: Array, axes: Axes) -> Array:
    if not axes:
        return here
    return lax.psum(mesh.varying(here.astype(jnp.int32), axes), axes) > 0


def local_weight(weight: Array | None, classes: Classes) -> Array | None:
    columns = classes.size * mesh.size(classes.axes)
    if weight is None or columns == classes.size == classes.total:
        return weight
    weight = jnp.pad(weight, (0, columns - classes.total))
    return lax.dynamic_slice_in_dim(weight, classes.start, classes.size)
