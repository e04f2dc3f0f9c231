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
    existing,
    existing_columns,
    local_weight,
    number_of_classes,
    weight_of,
)
from jaxloss._tokens.reduction import TokenWeights
from jaxloss._types import TokenArrays, TopKLabels
from jaxloss._xla.indexing import gather_classes, of_rank
from jaxloss._xla.selection import select


class Targets(NamedTuple):
    """What the tokens ask for: ``label_weight * (1 - smoothing)`` at ``label``, and soft targets.

    The soft targets are ``extra`` at each ``column``, and elsewhere a sum, times the class weights:
    ``(1 - smoothing) * probabilities``, and ``uniform`` of a class that exists. See
    :meth:`soft_targets`.
    """

    classes: Classes
    valid: Array  # bool [...], the tokens that count
    label: Array | None = None  # int32 column; classes.size: none here; None: there is no one label
    label_weight: Array | None = None  # w_y
    probabilities: Array | None = None  # [..., columns]
    uniform: Array | None = None  # [1], or one a token [..., 1]: smoothing's part of each class
    column: Array | None = None  # [..., k] int32 columns, as label
    extra: Array | None = None  # [..., k]: smoothing and weights are in it
    others: Array | None = None  # [...], the probability of all classes but those at column
    class_mask: Array | None = None  # those that the caller says exist
    weight: Array | None = None  # [C], of classes
    sample_weight: Array | None = None  # of tokens
    label_smoothing: Any = 0.0

    @property
    def sparse(self) -> tuple[Array, Array] | None:
        return None if self.column is None or self.extra is None else (self.column, self.extra)

    @property
    def soft(self) -> bool:
        return any(x is not None for x in (self.probabilities, self.uniform, self.extra))

    @property
    def weights(self) -> TokenWeights:
        return TokenWeights(self.valid, self.sample_weight, self.label_weight)

    @property
    def plain(self) -> bool:
        """Whether the loss is the negative log-likelihood of a label among all columns here."""
        classes, asked = self.classes, (self.class_mask, self.weight)
        whole = classes.total == classes.size and not classes.axes
        return whole and self.label is not None and not self.soft and asked == (None, None)

    @property
    def changed(self) -> bool:
        """Whether smoothing or class weights make another target of a label."""
        return self.weight is not None or not is_zero(self.label_smoothing)

    @property
    def asks_for_label(self) -> bool:
        return self.label is not None and not is_zero(1 - self.label_smoothing)

    def existing(self, rank: int) -> Array | None:
        """The classes that exist among the columns here, of that rank; None: all."""
        return existing(self.class_mask, self.classes, rank)

    def soft_targets(self, dtype: Any) -> Any:
        """``w_c ((1 - eps) q_c + eps / C)``, broadcastable to the logits, or None."""
        return soft_targets(
            self.probabilities,
            self.uniform,
            self.existing(self.valid.ndim + 1),
            local_weight(self.weight, self.classes),
            self.label_smoothing,
            self.classes.size,
            dtype,
        )


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
    arrays: TokenArrays, batch: tuple[int, ...], classes: Classes
) -> TokenArrays:
    """The arrays, whose mask of classes has all of them in the rows that it left none. The tokens
    of these rows do not count.

    So what is selected away is finite: NaN would return from behind the select in derivatives.
    """
    mask = arrays.class_mask
    if mask is None or not classes.total:
        return arrays
    return arrays._replace(
        class_mask=mask | ~rows_with_classes(mask, classes)[..., None],
        token_mask=tokens_with_classes(mask, arrays.token_mask, batch, classes),
    )


def soft_targets(
    probabilities: Any,
    uniform: Any,
    class_mask: Any,
    weight: Any,
    label_smoothing: Any,
    num_classes: int,
    dtype: jnp.dtype,
) -> Any:
    """``w_c ((1 - eps) q_c + eps / C)`` of some classes, broadcastable to their logits, or None."""
    soft = None
    if uniform is not None:
        soft = uniform  # as it is, one number a row, where it may: not an array of the logits' size
        if class_mask is not None:
            mask = jnp.broadcast_to(class_mask, (*class_mask.shape[:-1], num_classes))
            soft = select(mask, of_rank(uniform, mask.ndim), 0)
    if probabilities is not None:
        scaled = probabilities
        if not is_zero(label_smoothing):
            scaled = probabilities.astype(dtype) * (1 - label_smoothing)
        soft = scaled if soft is None else scaled + of_rank(soft, scaled.ndim)
    if soft is not None and weight is not None:
        soft = soft.astype(dtype) * of_rank(weight.astype(dtype), soft.ndim)
    return soft


def make_targets(
    arrays: TokenArrays,
    classes: Classes,
    dtype: jnp.dtype,
    ignore_index: int | None,
    label_smoothing: Any = 0.0,
) -> Targets:
    """Columns last: labels are indices [...], probabilities [..., columns] or TopKLabels.

    ``weight[C]`` and indices speak of all classes, ``class_mask`` of the columns here.
    """
    labels, weight, sample_weight, class_mask, token_mask, _ = arrays
    uniform, some = None, valid_tokens(sample_weight, token_mask)
    if not is_zero(label_smoothing) and classes.total:
        uniform = label_smoothing / jnp.maximum(number_of_classes(classes, class_mask, dtype), 1)
    if isinstance(labels, TopKLabels):
        targets = _of_top_k(arrays, classes, dtype, some, ignore_index, label_smoothing, uniform)
    elif jnp.issubdtype(labels.dtype, jnp.integer):
        index, valid = class_indices(labels, classes.total, ignore_index)
        label_weight = None
        if weight is not None and classes.total:
            label_weight = weight_of(index, weight, classes, dtype)
        targets = Targets(classes, valid, column_of(index, classes), label_weight, uniform=uniform)
    else:
        valid = jnp.ones(labels.shape[:-1], bool)
        targets = Targets(classes, valid, probabilities=labels, uniform=uniform)
    targets = targets._replace(
        class_mask=class_mask,
        weight=weight,
        sample_weight=sample_weight,
        label_smoothing=label_smoothing,
    )
    if some is None:
        return targets
    probabilities = targets.probabilities
    if weight is not None and probabilities is not None and not classes.block:
        # Before the class weights multiply them: their gradient would be 0 * NaN. Of columns that
        # are read in blocks, each block's alone: this is an array of their size.
        probabilities = select(some[..., None], probabilities, 0)
    return targets._replace(valid=targets.valid & some, probabilities=probabilities)


def _of_top_k(
    arrays: TokenArrays,
    classes: Classes,
    dtype: Any,
    some: Array | None,
    ignore_index: int | None,
    label_smoothing: Any,
    uniform: Array | None,
) -> Targets:
    """``some``: the tokens that have a weight and are not masked; None: all."""
    labels, weight, class_mask = arrays.labels, arrays.weight, arrays.class_mask
    index, taken = class_indices(cast(Array, labels.indices), classes.total, ignore_index)
    q = select(taken, cast(Array, labels.probabilities).astype(dtype), 0)
    # A class that does not exist makes its row NaN, from class 0. An empty slot is at none.
    wrong = index >= classes.total
    # A negative entry is a log-probability that the caller gave for a probability.
    wrong |= jnp.any(q < 0, axis=-1, keepdims=True)
    if index.shape[-1] > 1:  # one that is named twice: which of the two would the gradient hold?
        ordered = jnp.sort(select(taken, index, classes.total), axis=-1)
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] < classes.total)
        wrong |= jnp.any(twice, axis=-1, keepdims=True)
    q = select(wrong, jnp.nan, q)
    if some is not None and weight is not None:
        q = select(some[..., None], q, 0)  # as make_targets does to all probabilities
    index = select(index < classes.total, index, 0)
    index = select(taken, index, classes.total)
    column = column_of(index, classes)
    others, real, left_over = None, taken, 1 - jnp.sum(q, axis=-1)
    if class_mask is not None and classes.total:
        mask = existing_columns(class_mask, classes)
        mask = jnp.broadcast_to(mask, (*column.shape[:-1], classes.size))
        exists, here = gather_classes(mask, column), column < classes.size
        left_out = here & ~exists
        if uniform is not None or labels.rest != "drop":
            real &= anywhere(here & exists, classes.axes)
            left_out = ~real  # by what all devices know: a bucket's loss is the same on all
        # What is asked of a class that does not exist is left out. A label that is wrong stays NaN.
        q = select(left_out & ~wrong, 0, q)
    extra = q
    if uniform is not None:
        extra = q * (1 - label_smoothing) + select(real, of_rank(uniform, q.ndim), 0)
    if labels.rest != "drop" and classes.total:
        number = number_of_classes(classes, class_mask, dtype)
        number = of_rank(number, real.ndim) - jnp.sum(real, axis=-1, keepdims=True, dtype=dtype)
        # Where there is no other class, what is left over is rounding.
        others = jnp.maximum(left_over, 0)
        others = select(number[..., 0] > 0, others, 0)
        if labels.rest == "uniform":
            each = (1 - label_smoothing) * others[..., None] / jnp.maximum(number, 1)
            uniform = each if uniform is None else each + of_rank(uniform, each.ndim)
            others = None
    if weight is not None and classes.total:
        extra = extra * weight_of(index, weight, classes, dtype)
    valid = jnp.any(taken, axis=-1)
    return Targets(classes, valid, uniform=uniform, column=column, extra=extra, others=others)


def is_zero(x: Any) -> bool:
    """Whether a number is known to be 0. Of a traced one it is not."""
    return not isinstance(x, Array) and x == 0


def valid_tokens(sample_weight: Array | None, token_mask: Array | None) -> Array | None:
    """The tokens that have a weight and are not masked; None: all of them."""
    if sample_weight is None:
        return token_mask
    given = sample_weight.astype(bool)
    return given if token_mask is None else given & token_mask
