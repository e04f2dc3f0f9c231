"""From rows to tokens: each token's loss and statistics, however its row was read."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import jax.numpy as jnp
from jax import Array, lax

from jaxloss._numerics import ranking
from jaxloss._numerics.logits import Logits, over_temperature
from jaxloss._numerics.parts import Rows
from jaxloss._numerics.rows import RowLosses, row_losses
from jaxloss._tokens.bucket import bucket_rows
from jaxloss._tokens.targets import Targets, is_zero, make_targets
from jaxloss._types import Axes, LossOptions, Scalars, TokenArrays, TokenStats
from jaxloss._xla import mesh
from jaxloss._xla.dtypes import accumulator_dtype
from jaxloss._xla.selection import select

# What every schedule is to the tokens: rows_of(targets, outputs) reads the rows, whole or in parts,
# and returns the named ones of RowLosses, and ``soft`` where there are soft targets.
RowsOf = Callable[[Targets, tuple[str, ...]], RowLosses]
RANKS = ("prediction", "rank")  # the integers among the outputs
# Of TokenStats, those with a derivative and the others.
MOVING = ("log_prob", "logsumexp", "entropy", "sum_sq_probs", "z_loss")
CONSTANT = ("prediction", "confidence", "rank")


def rows_of_logits(logits: Logits, temperature: Any = 1.0) -> RowsOf:
    """Of logits that are there; ``targets`` say which of them exist.

    ``temperature``: an array divides the logits, a scalar or one entry a row; a number is in their
    scaling.
    """

    def rows_of(targets: Targets, outputs: tuple[str, ...]) -> RowLosses:
        classes = targets.classes
        own = replace(logits, exist=targets.existing(logits.values.ndim))
        of_row = tuple(name for name in outputs if name not in RANKS)
        if isinstance(temperature, Array):
            # 0 / NaN is NaN: a token that does not count must not read its own.
            of_rows = select(targets.valid, temperature, 1) if temperature.ndim else temperature
            divided, m = divided_rows(own, of_rows, classes.axes)
            rows = rows_of_logits(divided)(targets, of_row)
            if rows.logsumexp is not None:
                rows = rows._replace(logsumexp=rows.logsumexp + m)
        elif targets.others is not None:
            rows = bucket_rows(own, targets, of_row)
        else:
            soft = targets.soft_targets(accumulator_dtype(own.values.dtype))
            rows = Rows(own, targets.label, soft, targets.sparse)
            rows = row_losses(rows, of_row, classes.axes)
        if "prediction" in outputs:
            found = ranking.prediction(own, classes.start, classes.axes)
            rows = rows._replace(prediction=found)
        if "rank" in outputs:
            label = cast(Array, targets.label)
            found = ranking.rank(own, label, classes.start, classes.axes)
            rows = rows._replace(rank=found)
        return rows

    return rows_of


def in_two(stats: TokenStats) -> tuple[tuple, tuple]:
    """``(those with a derivative, the others)``."""
    moving, constant = (tuple(getattr(stats, f) for f in names) for names in (MOVING, CONSTANT))
    return moving, constant


def of_two(moving: tuple, constant: tuple) -> TokenStats:
    """The inverse of :func:`in_two`."""
    return TokenStats(**dict(zip((*MOVING, *CONSTANT), (*moving, *constant), strict=True)))


def temperature_of(arrays: TokenArrays, scalars: Scalars) -> Any:
    return scalars.temperature if arrays.temperature is None else arrays.temperature


def divided_rows(logits: Logits, temperature: Array, axes: Axes) -> tuple[Logits, Array]:
    """``((x - m) / temperature, m / temperature)`` of the capped logits and their maximum m.

    The difference comes first: it is exact whatever offset the logits share.
    """
    x = logits.wide()
    m = mesh.largest(jnp.max(x, axis=-1), axes)
    m = select(jnp.isfinite(m), m, 0)
    below = over_temperature(logits.nats(x - m[..., None]), temperature)
    return Logits(below, pallas_bytes=0), logits.nats(m) / temperature


def over_temperature_of(logits: Logits, scalars: Scalars, of_rows: Array | None) -> Logits:
    """Logits without a scaling over the temperature, of which ``of_rows`` has one a row; each row
    less a number of its own."""
    temperature = scalars.temperature if of_rows is None else of_rows
    if not isinstance(temperature, Array):
        if temperature == 1:
            return logits
        temperature = jnp.asarray(temperature, accumulator_dtype(logits.values.dtype))
    divided, _ = divided_rows(logits, temperature, ())
    return Logits(divided.values, logits.exist)


def token_losses(
    rows_of: RowsOf,
    targets: Targets,
    arrays: TokenArrays,
    options: LossOptions,
    scalars: Scalars,
    dtype: jnp.dtype,
) -> tuple[Array, TokenStats | None]:
    """Each token's loss (not yet masked) and its statistics (masked), if they are asked for.

    ``targets``: those that ``arrays`` give.
    """
    with_stats, valid = options.with_stats, targets.valid
    outputs = _outputs(targets, scalars, with_stats)
    if targets.classes.total == 0:
        nan = jnp.full(valid.shape, jnp.nan, dtype)
        none = jnp.full_like(nan, -1, jnp.int32)
        rows = RowLosses(*[nan] * 6, prediction=none)
    else:
        rows = rows_of(targets, outputs)
    # Before anything multiplies them: lse^2 of a masked row's inf has a gradient of 0 * inf.
    floats = {name: x for name, x in rows._asdict().items() if x is not None and name not in RANKS}
    rows = rows._replace(**{name: select(valid, x, 0) for name, x in floats.items()})
    losses = combined(rows, targets, scalars.z_loss)
    if not with_stats:
        return losses, None

    if targets.label is not None:
        log_prob = -rows.nll
    elif targets.classes.total == 0 or (
        targets.weight is None and is_zero(targets.label_smoothing)
    ):
        log_prob = -rows.soft
    else:  # weighed or smoothed: the labels themselves take a pass of their own
        plain = arrays._replace(weight=None)
        plain = make_targets(plain, targets.classes, dtype, options.ignore_index)
        log_prob = select(valid, -rows_of(plain, ()).soft, 0)
    predicted = valid & (rows.prediction >= 0)
    rank = jnp.full_like(rows.prediction, -1) if rows.rank is None else rows.rank
    return losses, TokenStats(
        log_prob,
        rows.logsumexp,
        rows.entropy,
        prediction=select(predicted, rows.prediction, -1),
        confidence=lax.stop_gradient(rows.confidence),
        rank=select(predicted, rank, -1),
        sum_sq_probs=rows.sum_sq_probs,
        z_loss=_penalty(rows, valid, scalars.z_loss),
    )


def _penalty(rows: RowLosses, valid: Array, z_loss: Any) -> Array:
    lse = cast(Array, rows.logsumexp)
    if is_zero(z_loss):  # its square may be inf
        return mesh.varying(jnp.zeros_like(lse), mesh.varies_over(lse))
    return select(valid, z_loss * lse**2, 0)


def _outputs(targets: Targets, scalars: Scalars, with_stats: bool) -> tuple[str, ...]:
    """Which of ``RowLosses`` (beside ``soft``) the loss and the statistics are made of."""
    labelled = targets.label is not None
    names = ("nll",) if targets.asks_for_label or (labelled and with_stats) else ()
    names += ("logsumexp",) if with_stats or not is_zero(scalars.z_loss) else ()
    if not with_stats:
        return names
    return (*names, "entropy", "sum_sq_probs", "confidence", *RANKS[: 1 + labelled])


def combined(rows: RowLosses, targets: Targets, z_loss: Any = 0.0) -> Array:
    """Each token's loss, class weights included."""
    losses, smoothing = None, targets.label_smoothing
    if targets.asks_for_label:
        losses = rows.nll
        if isinstance(smoothing, Array):  # of 1 it asks for nothing of an infinite loss
            losses = select(smoothing == 1, 0, losses)
        if not is_zero(smoothing):
            losses *= 1 - smoothing
    if not is_zero(z_loss):
        penalty = z_loss * rows.logsumexp**2
        losses = penalty if losses is None else losses + penalty
    if targets.label_weight is not None and losses is not None:
        losses = targets.label_weight * losses
    if targets.soft:
        losses = rows.soft if losses is None else losses + rows.soft
    return cast(Array, losses)
