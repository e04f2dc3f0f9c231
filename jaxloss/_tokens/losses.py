"""From rows to tokens: each token's loss and statistics, however its row was read."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxloss._numerics import logits, passes, ranking
from jaxloss._numerics import rows as _rows
from jaxloss._tokens import targets as _targets
from jaxloss._types import Scalars, TokenStats
from jaxloss._xla import indexing, mesh
from jaxloss._xla.dtypes import accumulator_dtype
from jaxloss._xla.math import finite


class TokenOptions(NamedTuple):
    """What is static about each token's loss."""

    ignore_index: int | None
    with_stats: bool


def rows_of_logits(
    x: Array, scaling: logits.Scaling | None, temperature: Any = 1.0, *, kernel_bytes: int
):
    """How :func:`token_terms` gets its rows where the logits ``x[..., columns]`` are there.

    ``temperature``: 1, or an array. ``kernel_bytes``: see ``passes.max_and_sum``.
    """

    def rows_of(targets, classes, class_mask, weight, label_smoothing, want, predict):
        mask, axes = _targets.existing(class_mask, classes, x.ndim), classes.axes
        if isinstance(temperature, Array):
            y, m = _divided(x, mask, scaling, temperature, axes)
            given = targets, classes, class_mask, weight, label_smoothing, want, False
            rows, *_ = rows_of_logits(y, None, kernel_bytes=0)(*given)
            if rows.logsumexp is not None:
                rows = rows._replace(logsumexp=rows.logsumexp + m)
            return rows, *_predicted(targets, classes, mask, predict)
        soft = _targets.soft_targets(
            targets.probabilities,
            targets.share,
            _targets.existing(class_mask, classes, targets.counts.ndim + 1),
            _targets.weight_here(weight, classes),
            label_smoothing,
            classes.size,
            accumulator_dtype(x.dtype),
        )
        losses = partial(
            _rows.row_losses, x, scaling=scaling, vocab_axes=axes, kernel_bytes=kernel_bytes
        )
        if targets.rest is not None:
            rows = _bucket_rows(x, targets, classes, mask, scaling, want)
        else:
            rows = losses(targets.kept, soft, mask, top=targets.top, want=want)
        return rows, *_predicted(targets, classes, mask, predict)

    def _predicted(targets, classes, mask, predict):
        if not predict:
            return None, None
        prediction = ranking.prediction(x, mask, classes.start, classes.axes)
        rank = None
        if targets.kept is not None:
            rank = ranking.rank(x, mask, targets.kept, classes.start, classes.axes)
        return prediction, rank

    return rows_of


def _divided(x, mask, scaling, temperature, axes) -> tuple[Array, Array]:
    """``((x - m) / temperature, m / temperature)`` of the capped logits and their maximum m.

    The difference comes first: it is exact whatever offset the logits share.
    """
    y = logits.widen(x, mask, scaling)
    m = mesh.largest(jnp.max(y, axis=-1), axes)
    m = jnp.where(jnp.isfinite(m), m, 0)
    unit = 1.0 if scaling is None else scaling.unit
    return (y - m[..., None]) * unit / temperature, m * unit / temperature


def _bucket_rows(x, targets, classes, mask, scaling, want) -> _rows.RowLosses:
    """The loss over k + 1 classes: those named, and one of all others, whose logit is their lse.

    Each logit has its gradient from one of them, so that nothing narrow is added up.
    """
    column, axes = targets.column, classes.axes
    here = column < x.shape[-1]
    others = indexing.elsewhere(x, column)
    others = others if mask is None else others & mask
    losses = partial(_rows.row_losses, x, None, scaling=scaling, vocab_axes=axes)
    rest = losses(None, others, want=("logsumexp", "above"))
    # A soft cap's slope at NaN is NaN, and 0 times that is NaN again.
    named, exists = jnp.where(targets.counts[..., None], indexing.entries(x, column), 0), None
    if mask is not None:
        exists = indexing.entries(jnp.broadcast_to(mask, x.shape), column)
        named = jnp.where(exists, named, 0)
    named = logits.widen(named, exists, scaling)
    if axes:
        held = lax.psum(here.astype(jnp.int32), axes) > 0
        named = jnp.where(held, lax.psum(jnp.where(here, named, 0), axes), -jnp.inf)
    else:
        named = jnp.where(here, named, -jnp.inf)
    # Relative to the maximum: a log-sum-exp is rounded where the logits lie, and not where they
    # differ. Adding 0 gives it its derivative.
    of_others = mesh.largest(passes.row_max(x, others, scaling), axes)
    of_named = jnp.max(lax.stop_gradient(named), axis=-1, initial=-jnp.inf)
    m = finite(jnp.maximum(of_others, of_named))
    rounded = lax.stop_gradient(rest.logsumexp)
    lse = logits.scaled(of_others - m, scaling) + lax.stop_gradient(rest.above)
    lse += rest.logsumexp - rounded
    # Of no other class there is no derivative; of no class at all it is NaN.
    of_none = jnp.where(of_named == -jnp.inf, rest.logsumexp, -jnp.inf)
    lse = jnp.where(rounded == -jnp.inf, of_none, lse)
    named = logits.scaled(named - m[..., None], scaling)
    few = jnp.concatenate([named, lse[..., None]], axis=-1)
    asked = jnp.concatenate([targets.extra, targets.rest[..., None]], axis=-1)
    # What is impossible and has a probability of 0 is no class, for derivatives too.
    some = (few != -jnp.inf) | (asked != 0)
    some |= jnp.all(few == -jnp.inf, axis=-1, keepdims=True)  # of nothing the gradient is NaN
    rows = _rows.row_losses(few, None, asked, some, want=tuple({"logsumexp"} & {*want}))
    if rows.logsumexp is not None:
        rows = rows._replace(logsumexp=rows.logsumexp + logits.scaled(m, scaling))
    if "entropy" in want:
        stats = losses(None, mask, want=("entropy", "confidence"))
        rows = rows._replace(entropy=stats.entropy, confidence=stats.confidence)
    return rows


def token_terms(
    rows_of: Callable,
    classes: _targets.Classes,
    labels: Any,
    weight: Array | None,
    class_mask: Array | None,
    sample_weight: Array | None = None,
    token_mask: Array | None = None,
    *,
    dtype: jnp.dtype,
    options: TokenOptions,
    scalars: Scalars,
) -> tuple[Array, TokenStats | None, _targets.Targets]:
    """Each token's loss (not yet masked), its statistics (masked), and what it asked for."""
    ignore_index, with_stats = options
    label_smoothing, z_loss, _ = scalars
    targets_of = partial(
        _targets.make_targets,
        labels,
        classes,
        dtype,
        sample_weight=sample_weight,
        class_mask=class_mask,
        token_mask=token_mask,
        ignore_index=ignore_index,
    )
    targets = targets_of(weight=weight, label_smoothing=label_smoothing)
    want = _targets.wanted(targets, label_smoothing, z_loss, with_stats)
    rank = None
    if classes.total == 0:
        nan = jnp.full(targets.counts.shape, jnp.nan, dtype)
        rows, prediction = _rows.RowLosses(*[nan] * 5), jnp.full_like(nan, -1, jnp.int32)
    else:
        given = (classes, class_mask, weight, label_smoothing)
        rows, prediction, rank = rows_of(targets, *given, want, with_stats)
    # Before anything multiplies them: lse^2 of a masked row's inf has a gradient of 0 * inf.
    rows = _rows.RowLosses(*(v if v is None else jnp.where(targets.counts, v, 0) for v in rows))
    losses = _targets.token_losses(rows, targets, label_smoothing, z_loss)
    if not with_stats:
        return losses, None, targets

    if targets.kept is not None:
        log_prob = -rows.nll
    elif (_targets.is_zero(label_smoothing) and weight is None) or classes.total == 0:
        log_prob = -rows.soft
    else:  # weighed or smoothed: the labels themselves take a pass of their own
        own, *_ = rows_of(targets_of(weight=None), classes, class_mask, None, 0.0, (), False)
        log_prob = jnp.where(targets.counts, -own.soft, 0)
    predicted = targets.counts & (prediction >= 0)
    if rank is None:
        rank = jnp.full_like(prediction, -1)
    stats = TokenStats(
        log_prob,
        rows.logsumexp,
        rows.entropy,
        prediction=jnp.where(predicted, prediction, -1),
        confidence=lax.stop_gradient(rows.confidence),
        rank=jnp.where(predicted, rank, -1),
    )
    return losses, stats, targets
