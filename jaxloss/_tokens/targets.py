"""The label contract: which tokens count, what each asks for, and how losses become one number.

====================================================  ===========  ==========================
label                                                 loss         gradient
====================================================  ===========  ==========================
``0 <= y < C``                                        the loss     the gradient
``y == ignore_index``, or masked, or weighed by 0     exactly 0    exactly 0
anything else                                         NaN          NaN in that row, no other
====================================================  ===========  ==========================

A multiplication by 0 does not mask (0 * inf is NaN), so every mask here is a select.
"""

import math
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jax import Array, lax

from jaxloss._numerics.rows import RowLosses
from jaxloss._types import TopKLabels
from jaxloss._xla import mesh
from jaxloss._xla.indexing import entries, looked_up, of_rank, within


class Classes(NamedTuple):
    """The C classes, and which of them the columns here are."""

    total: int  # C
    size: int  # columns here; those of classes past C are padding
    start: Any  # the class of the first
    axes: mesh.Axes  # the mesh axes that the columns are split over
    block: int = 0  # so many columns may be read at a time; 0: all of them


def classes_here(
    total: int, size: int | None = None, vocab_axes: mesh.Axes = (), block: int = 0
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


class Targets(NamedTuple):
    """What the tokens ask for: ``label_weight * (1 - smoothing)`` at ``kept``, and soft targets.

    The soft targets are ``extra`` at each ``column``, and elsewhere a sum, times the class weights:
    ``(1 - smoothing) * probabilities``, and ``share`` of a class that exists. See soft_targets.
    """

    kept: Array | None  # int32 column; as many as there are: none here; None for probabilities
    label_weight: Array | None  # w_y
    counts: Array  # bool
    probabilities: Array | None = None  # [..., columns]
    share: Array | None = None  # [1], or one a token [..., 1]
    column: Array | None = None  # [..., k] int32 columns, as kept
    extra: Array | None = None  # [..., k]: smoothing and weights are in it
    rest: Array | None = None  # [...], the probability of all classes but those at column

    @property
    def top(self) -> tuple[Array, Array] | None:
        return None if self.column is None or self.extra is None else (self.column, self.extra)

    @property
    def soft(self) -> bool:
        return any(x is not None for x in (self.probabilities, self.share, self.extra))


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
    index = jnp.where(inside, labels, num_classes).astype(jnp.int32)
    return jnp.where(ignored, 0, index), ~ignored


def _existing_columns(class_mask: Array, classes: Classes) -> Array:
    mask = jnp.broadcast_to(class_mask, (*class_mask.shape[:-1], classes.size))
    return cast(Array, existing(mask, classes, mask.ndim))


def number_of_classes(classes: Classes, class_mask: Array | None, dtype) -> Array:
    """How many exist, a row: ``[1]`` or ``[..., 1]``.

    ``class_mask``: those that the caller says exist; padding is known.
    """
    if class_mask is None:
        return jnp.full((1,), classes.total, dtype)
    mask = _existing_columns(class_mask, classes)

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


def rows_with_classes(class_mask: Array, classes: Classes) -> Array:
    """Which rows of ``class_mask[..., columns]`` leave a class, ``[...]``."""
    return _anywhere(jnp.any(_existing_columns(class_mask, classes), axis=-1), classes.axes)


def tokens_with_classes(
    class_mask: Array | None, token_mask: Array | None, batch: tuple[int, ...], classes: Classes
) -> Array | None:
    """``token_mask`` without the tokens that ``class_mask`` leaves no class: they do not count."""
    if class_mask is None or not classes.total:
        return token_mask
    some = jnp.broadcast_to(rows_with_classes(class_mask, classes), batch)
    return some if token_mask is None else some & token_mask


def without_empty_rows(
    class_mask: Array | None, token_mask: Array | None, batch: tuple[int, ...], classes: Classes
) -> tuple[Array | None, Array | None]:
    """``class_mask`` with all classes in the rows that it leaves none; ``tokens_with_classes``.

    So what is selected away is finite: NaN would return from behind the select in derivatives.
    """
    if class_mask is None or not classes.total:
        return class_mask, token_mask
    token_mask = tokens_with_classes(class_mask, token_mask, batch, classes)
    return class_mask | ~rows_with_classes(class_mask, classes)[..., None], token_mask


def soft_targets(
    probabilities: Any,
    share: Any,
    class_mask: Any,
    weight: Any,
    label_smoothing: Any,
    num_classes: int,
    dtype: jnp.dtype,
) -> Any:
    """``w_c ((1 - eps) q_c + eps / C)`` of some classes, broadcastable to their logits, or None."""
    soft = None
    if share is not None:
        soft = share  # as it is, one number a row, where it may: not an array of the logits' size
        if class_mask is not None:
            mask = jnp.broadcast_to(class_mask, (*class_mask.shape[:-1], num_classes))
            soft = jnp.where(mask, of_rank(share, mask.ndim), 0)
    if probabilities is not None:
        scaled = probabilities
        if not is_zero(label_smoothing):
            scaled = probabilities.astype(dtype) * (1 - label_smoothing)
        soft = scaled if soft is None else scaled + of_rank(soft, scaled.ndim)
    if soft is not None and weight is not None:
        soft = soft.astype(dtype) * of_rank(weight.astype(dtype), soft.ndim)
    return soft


def counted(sample_weight: Array | None, token_mask: Array | None) -> Array | None:
    """The tokens that have a weight and are not masked; None: all of them."""
    if sample_weight is None:
        return token_mask
    given = sample_weight.astype(bool)
    return given if token_mask is None else given & token_mask


def make_targets(
    labels: Any,
    classes: Classes,
    dtype: jnp.dtype,
    *,
    weight: Array | None,
    sample_weight: Array | None = None,
    class_mask: Array | None = None,
    token_mask: Array | None = None,
    ignore_index: int | None,
    label_smoothing: Any = 0.0,
) -> Targets:
    """Columns last: ``labels`` are indices [...], probabilities [..., columns] or TopKLabels.

    ``weight[C]`` and indices speak of all classes, ``class_mask`` of the columns here.
    """
    share, some = None, counted(sample_weight, token_mask)
    if not is_zero(label_smoothing) and classes.total:
        share = label_smoothing / jnp.maximum(number_of_classes(classes, class_mask, dtype), 1)
    if isinstance(labels, TopKLabels):
        targets = _of_top(
            labels,
            classes,
            dtype,
            weight,
            some,
            class_mask,
            ignore_index,
            label_smoothing,
            share,
        )
    elif jnp.issubdtype(labels.dtype, jnp.integer):
        index, counts = class_indices(labels, classes.total, ignore_index)
        label_weight = None
        if weight is not None and classes.total:
            label_weight = _weight_of(index, weight, classes, dtype)
        targets = Targets(_column(index, classes), label_weight, counts, share=share)
    else:
        counts = jnp.ones(labels.shape[:-1], bool)
        targets = Targets(None, None, counts, probabilities=labels, share=share)
    if some is None:
        return targets
    probabilities = targets.probabilities
    if weight is not None and probabilities is not None and not classes.block:
        # Before the class weights multiply them: their gradient would be 0 * NaN. Of columns that
        # are read in blocks, each block's alone: this is an array of their size.
        probabilities = jnp.where(some[..., None], probabilities, 0)
    return targets._replace(counts=targets.counts & some, probabilities=probabilities)


def _weight_of(index: Array, weight: Array, classes: Classes, dtype) -> Array:
    """``w`` of each class index, 1 where there is no such class: its NaN must reach the loss."""
    inside = index < classes.total
    found = looked_up(weight.astype(dtype), jnp.where(inside, index, 0))
    return jnp.where(inside, found, 1)


def _column(index: Array, classes: Classes) -> Array:
    if not classes.axes and classes.total == classes.size:
        return index
    column = within(index, classes.start, classes.size)
    return jnp.where(index < classes.total, column, classes.size)


def _of_top(
    labels: TopKLabels,
    classes: Classes,
    dtype,
    weight: Array | None,
    counted: Array | None,
    class_mask: Array | None,
    ignore_index: int | None,
    label_smoothing: Any,
    share: Array | None,
) -> Targets:
    index, taken = class_indices(cast(Array, labels.indices), classes.total, ignore_index)
    q = jnp.where(taken, cast(Array, labels.probabilities).astype(dtype), 0)
    # A class that does not exist makes its row NaN, from class 0. An empty slot is at none.
    wrong = index >= classes.total
    if index.shape[-1] > 1:  # one that is named twice: which of the two would the gradient hold?
        ordered = jnp.sort(jnp.where(taken, index, classes.total), axis=-1)
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] < classes.total)
        wrong |= jnp.any(twice, axis=-1, keepdims=True)
    q = jnp.where(wrong, jnp.nan, q)
    if counted is not None and weight is not None:
        q = jnp.where(counted[..., None], q, 0)  # as make_targets does to all probabilities
    index = jnp.where(index < classes.total, index, 0)
    index = jnp.where(taken, index, classes.total)
    column = _column(index, classes)
    rest, real, left_over = None, taken, 1 - jnp.sum(q, axis=-1)
    if class_mask is not None and classes.total:
        mask = _existing_columns(class_mask, classes)
        mask = jnp.broadcast_to(mask, (*column.shape[:-1], classes.size))
        exists, here = entries(mask, column), column < classes.size
        left_out = here & ~exists
        if share is not None or labels.rest != "drop":
            real &= _anywhere(here & exists, classes.axes)
            left_out = ~real  # by what all devices know: a bucket's loss is the same on all
        # What is asked of a class that does not exist is left out. A label that is wrong stays NaN.
        q = jnp.where(left_out & ~wrong, 0, q)
    extra = q
    if share is not None:
        extra = q * (1 - label_smoothing) + jnp.where(real, of_rank(share, q.ndim), 0)
    if labels.rest != "drop" and classes.total:
        others = number_of_classes(classes, class_mask, dtype)
        others = of_rank(others, real.ndim) - jnp.sum(real, axis=-1, keepdims=True, dtype=dtype)
        # Where there is no other class, what is left over is rounding.
        rest = jnp.maximum(left_over, 0)
        rest = jnp.where(others[..., 0] > 0, rest, 0)
        if labels.rest == "uniform":
            each = (1 - label_smoothing) * rest[..., None] / jnp.maximum(others, 1)
            share = each if share is None else each + of_rank(share, each.ndim)
            rest = None
    if weight is not None and classes.total:
        extra = extra * _weight_of(index, weight, classes, dtype)
    return Targets(
        None, None, jnp.any(taken, axis=-1), share=share, column=column, extra=extra, rest=rest
    )


def _anywhere(here: Array, axes: mesh.Axes) -> Array:
    if not axes:
        return here
    return lax.psum(mesh.varying(here.astype(jnp.int32), axes), axes) > 0


def weight_here(weight: Array | None, classes: Classes) -> Array | None:
    columns = classes.size * mesh.size(classes.axes)
    if weight is None or columns == classes.size == classes.total:
        return weight
    weight = jnp.pad(weight, (0, columns - classes.total))
    return lax.dynamic_slice_in_dim(weight, classes.start, classes.size)


def is_zero(x: Any) -> bool:
    """Whether a number is known to be 0. Of a traced one it is not."""
    return not isinstance(x, Array) and x == 0


def _asks_for_label(targets: Targets, label_smoothing: Any) -> bool:
    return targets.kept is not None and not is_zero(1 - label_smoothing)


def wanted(targets: Targets, label_smoothing: Any, z_loss: Any, stats: bool):
    """Which of ``RowLosses`` (beside ``soft``) the loss and the statistics are made of."""
    label = targets.kept is not None and (stats or _asks_for_label(targets, label_smoothing))
    want = ("nll",) if label else ()
    want += ("logsumexp",) if stats or not is_zero(z_loss) else ()
    return want + (("entropy", "confidence") if stats else ())


def token_losses(rows: RowLosses, targets: Targets, label_smoothing: Any, z_loss: Any) -> Array:
    """Each token's loss, class weights included."""
    losses = None
    if _asks_for_label(targets, label_smoothing):
        losses = rows.nll
        if isinstance(label_smoothing, Array):  # of 1 it asks for nothing of an infinite loss
            losses = jnp.where(label_smoothing == 1, 0, losses)
        if not is_zero(label_smoothing):
            losses *= 1 - label_smoothing
    if not is_zero(z_loss):
        penalty = z_loss * rows.logsumexp**2
        losses = penalty if losses is None else losses + penalty
    if targets.label_weight is not None and losses is not None:
        losses = targets.label_weight * losses
    if targets.soft:
        losses = rows.soft if losses is None else losses + rows.soft
    return cast(Array, losses)


def terms(targets: Targets, sample_weight: Array | None, dtype: jnp.dtype) -> tuple[Array, Array]:
    """``(weight, divisor)``: the mean is ``sum(weight * losses) / sum(divisor)``.

    Both are 0 where a token does not count.
    """
    weight = jnp.ones_like(targets.counts, dtype=dtype)
    if sample_weight is not None and sample_weight.dtype != jnp.bool_:
        weight = sample_weight.astype(dtype)
    weight = jnp.where(targets.counts, weight, 0)
    if targets.label_weight is None:
        return weight, weight
    return weight, jnp.where(targets.counts, weight * targets.label_weight, 0)


def token_weights(
    targets: Targets,
    sample_weight: Array | None,
    reduction: str,
    dtype: jnp.dtype,
    token_axes: mesh.Axes = (),
    empty_mean: float | None = None,
) -> tuple[Array, Array]:
    """``(weight, offset)``: the result is ``sum(weight * losses) + offset``.

    The offset is 0, except for a mean over nothing: there it is that mean, and the weights are 0.
    With ``"none"`` there is no sum. ``weight`` is 0 where a token does not count. The sum is over
    the devices along ``token_axes`` too.
    """
    weight, divisor = terms(targets, sample_weight, dtype)
    if reduction != "mean":
        return weight, jnp.zeros((), dtype)
    divisor = jnp.sum(divisor)
    if token_axes:
        divisor = lax.psum(divisor, token_axes)
    # In place of a 0 it makes all weights 0, and with them all gradients.
    weight = jnp.where(targets.counts, weight / jnp.where(divisor == 0, jnp.inf, divisor), 0)
    return weight, jnp.where(divisor == 0, _of_nothing(empty_mean), jnp.zeros((), dtype))


def _of_nothing(empty_mean: float | None) -> float:
    return math.nan if empty_mean is None else empty_mean


def reduce_losses(
    losses: Array,
    targets: Targets,
    sample_weight: Array | None,
    reduction: str,
    token_axes: mesh.Axes = (),
    empty_mean: float | None = None,
) -> Array:
    weight, divisor = terms(targets, sample_weight, losses.dtype)
    losses = jnp.where(targets.counts, weight * losses, 0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        total = jnp.sum(losses)
        return lax.psum(total, token_axes) if token_axes else total
    # One reduction for both sums: a second one took XLA:CPU a tenth of the time of a small loss,
    # and a mesh another all-reduce.
    divisor += jnp.zeros_like(losses)  # its sharding and varying axes, which have to be equal
    # Not raveled: that would gather sharded tokens. Not stack: under vmap over an axis that an
    # explicit mesh splits it refuses what is the same in the whole batch.
    both = jnp.concatenate([losses[None], divisor[None]])
    both = jnp.sum(both, axis=tuple(range(1, both.ndim)))
    total, divisor = lax.psum(both, token_axes) if token_axes else both
    return mean_of(total, divisor, empty_mean)


def mean_of(total: Array, divisor: Array, empty_mean: float | None = None) -> Array:
    """``total / divisor``; where ``divisor`` is 0, ``empty_mean`` (None: NaN) with gradient 0."""
    # The constant in place of a 0 keeps 0 / 0 out of the gradients.
    mean = total / jnp.where(divisor == 0, 1, divisor)
    return jnp.where(divisor == 0, _of_nothing(empty_mean), mean)
