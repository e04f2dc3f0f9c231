"""The label contract: which tokens count, and what each asks for.

====================================================  ===========  ==========================
label                                                 loss         gradient
====================================================  ===========  ==========================
``0 <= y < C``                                        the loss     the gradient
``y == ignore_index``, or masked, or weighed by 0     exactly 0    exactly 0
anything else                                         NaN          NaN in that row, no other
====================================================  ===========  ==========================

A multiplication by 0 does not mask (0 * inf is NaN), so every mask here is a select.
"""

from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jax import Array

from jaxloss._tokens.classes import (
    Classes,
    anywhere,
    class_indices,
    column_of,
    existing_columns,
    number_of_classes,
    weight_of,
)
from jaxloss._types import TopKLabels
from jaxloss._xla.indexing import entries, of_rank


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


def rows_with_classes(class_mask: Array, classes: Classes) -> Array:
    """Which rows of ``class_mask[..., columns]`` leave a class, ``[...]``."""
    return anywhere(jnp.any(existing_columns(class_mask, classes), axis=-1), classes.axes)


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
            label_weight = weight_of(index, weight, classes, dtype)
        targets = Targets(column_of(index, classes), label_weight, counts, share=share)
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
    column = column_of(index, classes)
    rest, real, left_over = None, taken, 1 - jnp.sum(q, axis=-1)
    if class_mask is not None and classes.total:
        mask = existing_columns(class_mask, classes)
        mask = jnp.broadcast_to(mask, (*column.shape[:-1], classes.size))
        exists, here = entries(mask, column), column < classes.size
        left_out = here & ~exists
        if share is not None or labels.rest != "drop":
            real &= anywhere(here & exists, classes.axes)
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
        extra = extra * weight_of(index, weight, classes, dtype)
    return Targets(
        None, None, jnp.any(taken, axis=-1), share=share, column=column, extra=extra, rest=rest
    )


def is_zero(x: Any) -> bool:
    """Whether a number is known to be 0. Of a traced one it is not."""
    return not isinstance(x, Array) and x == 0


def counted(sample_weight: Array | None, token_mask: Array | None) -> Array | None:
    """The tokens that have a weight and are not masked; None: all of them."""
    if sample_weight is None:
        return token_mask
    given = sample_weight.astype(bool)
    return given if token_mask is None else given & token_mask
