"""Which class is largest, and how many come before the label's."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxloss._numerics.logits import Logits
from jaxloss._types import Axes
from jaxloss._xla import device, mesh
from jaxloss._xla.dtypes import accumulator_dtype, upcast
from jaxloss._xla.fusion import class_index, index_is_exact, opaque, reread
from jaxloss._xla.indexing import gather_class


def argmax(logits: Logits, start: Any) -> tuple[Array, Array]:
    """(the row's maximum, +inf for NaN; its first class, that of the first column being start)."""
    # A soft cap does not move the maximum. Without the barrier a product could be computed twice,
    # and its maximum be no entry of it.
    x = lax.optimization_barrier(lax.stop_gradient(logits.values))
    x = Logits(x, logits.exist).wide()
    if device.is_whole():
        found = jnp.argmax(x, axis=-1).astype(jnp.int32)
        top = gather_class(x, found)
    else:  # of classes split over devices, argmax gathers a pair from each
        top = jnp.max(x, axis=-1)
        index = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
        found = jnp.min(jnp.where(x == top[..., None], index, x.shape[-1]), axis=-1)
    return jnp.where(jnp.isnan(top), jnp.inf, top), found + start


def class_of(top: Array, found: Array, vocab_axes: Axes) -> Array:
    """The prediction from what ``argmax`` gives on each device; -1: see ``prediction``."""
    if vocab_axes:
        here, top = top, mesh.largest(top, vocab_axes)
        found = jnp.where(here == top, found, jnp.iinfo(jnp.int32).max)
        found = lax.pmin(found, vocab_axes)
    return jnp.where(jnp.isinf(top), -1, found)


def prediction(logits: Logits, start: Any, vocab_axes: Axes) -> Array:
    """The first class at the row's maximum; -1 in a row that holds NaN or +inf, or nothing but
    -inf: the first of its classes may be masked. int32."""
    return class_of(*argmax(logits, start), vocab_axes)


def count_ahead(x: Array, of_label: Array, label: Array) -> Array:
    """How many of the classes are predicted before the label's: those of larger logits, and of
    equal ones those of lower index. int32.

    In saturating arithmetic, as in ``near_max``: XLA:CPU writes out a summand that compares,
    selects, clamps (so no minimum stands right upon a maximum) or is an integer.
    """
    wide = accumulator_dtype(x.dtype)
    # Classes at -inf tie, and subtract.
    least = jnp.finfo(wide).min
    x, of_label = jnp.maximum(x.astype(wide), least), jnp.maximum(of_label, least)[..., None]
    if not index_is_exact(x):
        at = lax.broadcasted_iota(label.dtype, x.shape, x.ndim - 1) - label[..., None]
        larger = (x > of_label) | ((x == of_label) & (at < 0))
        return jnp.sum(larger & (at != 0), axis=-1, dtype=jnp.int32)
    tiny, (of_label, one) = jnp.finfo(wide).tiny, opaque(of_label, 1)
    below = label.astype(wide)[..., None] - class_index(x)
    # 2^30 for a larger logit, 0 for an equal one, below -2^30 for a smaller one.
    larger = jnp.minimum(jnp.maximum((x - of_label) / tiny, -1) / tiny, 2.0**30)
    first = jnp.maximum(larger + jnp.minimum(below, one), 0) * 2
    # The label's own logit may have been rounded otherwise than the one it is compared with.
    return jnp.sum(jnp.minimum(first, jnp.minimum(jnp.abs(below), one)), axis=-1).astype(jnp.int32)


def rank(logits: Logits, label: Array, start: Any, vocab_axes: Axes) -> Array:
    """The label's place in the order of predictions, 0 for the first; -1: it has none. int32.

    ``label``: its column, from the class ``start`` on; past the end: it is not here.
    """
    x = lax.stop_gradient(logits.values)
    if logits.exist is not None:
        x = Logits(lax.optimization_barrier(x), logits.exist).wide()
    of_label = upcast(gather_class(lax.optimization_barrier(x), label))
    of_label = jnp.where(label < x.shape[-1], of_label, 0)
    label, of_label, found = label_over_mesh(label, of_label, x.shape[-1], start, vocab_axes)
    before = count_ahead(*reread(x, of_label), label - start)
    return jnp.where(found, lax.psum(before, vocab_axes) if vocab_axes else before, -1)


def label_over_mesh(column: Array, of_label: Array, size: int, start: Any, vocab_axes: Axes):
    """(the label's class, its logit, whether it is one of the classes) from what each device has.

    ``column`` is that of the ``size`` here, from the class ``start`` on; ``of_label`` its
    logit, 0 where it is not here.
    """
    here = column < size
    label = jnp.where(here, column + start, 0)
    if vocab_axes:
        label, of_label, here = lax.psum((label, of_label, here.astype(jnp.int32)), vocab_axes)
        here = here > 0
    return label, of_label, here
