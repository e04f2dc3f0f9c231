"""From rows to tokens: each token's loss and statistics, however its row was read."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jax import Array, lax

from jaxloss._numerics import logits, ranking
from jaxloss._numerics import rows as _rows
from jaxloss._numerics.rows import RowLosses
from jaxloss._tokens import targets as _targets
from jaxloss._tokens.bucket import bucket_rows
from jaxloss._tokens.classes import (
    Classes,
    existing,
    weight_here,
)
from jaxloss._tokens.targets import Targets, is_zero
from jaxloss._types import Scalars, TokenStats
from jaxloss._xla import mesh
from jaxloss._xla.dtypes import accumulator_dtype


class TokenOptions(NamedTuple):
    """What is static about each token's loss."""

    ignore_index: int | None
    with_stats: bool


def rows_of_logits(
    x: Array, scaling: logits.Scaling | None, temperature: Any = 1.0, *, kernel_bytes: int
):
    """How :func:`token_terms` gets its rows where the logits ``x[..., columns]`` are there.

    ``temperature``: 1, or an array. ``kernel_bytes``: see ``dispatch.row_sums``.
    """

    def rows_of(targets, classes, class_mask, weight, label_smoothing, want, predict):
        mask, axes = existing(class_mask, classes, x.ndim), classes.axes
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
            existing(class_mask, classes, targets.counts.ndim + 1),
            weight_here(weight, classes),
            label_smoothing,
            classes.size,
            accumulator_dtype(x.dtype),
        )
        losses = partial(
            _rows.row_losses, x, scaling=scaling, vocab_axes=axes, kernel_bytes=kernel_bytes
        )
        if targets.rest is not None:
            rows = bucket_rows(x, targets, classes, mask, scaling, want)
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


def token_terms(
    rows_of: Callable,
    classes: Classes,
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
    want = wanted(targets, label_smoothing, z_loss, with_stats)
    rank = None
    if classes.total == 0:
        nan = jnp.full(targets.counts.shape, jnp.nan, dtype)
        rows, prediction = _rows.RowLosses(*[nan] * 5), jnp.full_like(nan, -1, jnp.int32)
    else:
        given = (classes, class_mask, weight, label_smoothing)
        rows, prediction, rank = rows_of(targets, *given, want, with_stats)
    # Before anything multiplies them: lse^2 of a masked row's inf has a gradient of 0 * inf.
    rows = _rows.RowLosses(*(v if v is None else jnp.where(targets.counts, v, 0) for v in rows))
    losses = token_losses(rows, targets, label_smoothing, z_loss)
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


def _asks_for_label(targets: Targets, label_smoothing: Any) -> bool:
    return targets.kept is not None and not is_zero(1 - label_smoothing)
