"""Labels whose rest is a class: the loss over k + 1 classes."""

from dataclasses import replace
from functools import partial
from typing import cast

import jax.numpy as jnp
from jax import Array, lax

from jaxloss._numerics import passes
from jaxloss._numerics.logits import Logits
from jaxloss._numerics.parts import Rows
from jaxloss._numerics.rows import RowLosses, row_losses
from jaxloss._tokens.targets import Targets
from jaxloss._xla import indexing, mesh
from jaxloss._xla.elementary import finite
from jaxloss._xla.selection import select

OF_ALL = ("entropy", "confidence", "sum_sq_probs")  # statistics that are not of k + 1 classes


def bucket_rows(logits: Logits, targets: Targets, outputs: tuple[str, ...]) -> RowLosses:
    """The loss over k + 1 classes: those named, and one of all others, whose logit is their lse.

    Each logit has its gradient from one of them, so that nothing narrow is added up.
    """
    column, extra = cast(tuple[Array, Array], targets.sparse)
    x, exist, axes = logits.values, logits.exist, targets.classes.axes
    logits = replace(logits, pallas_bytes=2)
    here = column < logits.size
    others = indexing.is_elsewhere(x, column)
    others = replace(logits, exist=others if exist is None else others & exist)
    losses = partial(row_losses, vocab_axes=axes)
    rest = losses(Rows(others), ("logsumexp", "lse_above_max"))
    # A soft cap's slope at NaN is NaN, and 0 times that is NaN again.
    named, exists = select(targets.valid[..., None], indexing.gather_classes(x, column), 0), None
    if exist is not None:
        exists = indexing.gather_classes(jnp.broadcast_to(exist, x.shape), column)
        named = select(exists, named, 0)
    named = replace(logits, values=named, exist=exists).wide()
    if axes:
        held = lax.psum(here.astype(jnp.int32), axes) > 0
        named = select(held, lax.psum(select(here, named, 0), axes), -jnp.inf)
    else:
        named = select(here, named, -jnp.inf)
    # Relative to the maximum: a log-sum-exp is rounded where the logits lie, and not where they
    # differ. Adding 0 gives it its derivative.
    of_others = mesh.largest(passes.row_max(others), axes)
    of_named = jnp.max(lax.stop_gradient(named), axis=-1, initial=-jnp.inf)
    m = finite(jnp.maximum(of_others, of_named))
    rounded = lax.stop_gradient(rest.logsumexp)
    lse = logits.nats(of_others - m) + lax.stop_gradient(rest.lse_above_max)
    lse += rest.logsumexp - rounded
    # Of no other class there is no derivative; of no class at all it is NaN.
    of_none = select(of_named == -jnp.inf, rest.logsumexp, -jnp.inf)
    lse = select(rounded == -jnp.inf, of_none, lse)
    named = logits.nats(named - m[..., None])
    few = jnp.concatenate([named, lse[..., None]], axis=-1)
    asked = jnp.concatenate([extra, cast(Array, targets.others)[..., None]], axis=-1)
    # What is impossible and has a probability of 0 is no class, for derivatives too.
    some = (few != -jnp.inf) | (asked != 0)
    some |= jnp.all(few == -jnp.inf, axis=-1, keepdims=True)  # of nothing the gradient is NaN
    rows = row_losses(Rows(Logits(few, some), soft=asked), tuple({"logsumexp"} & {*outputs}))
    if rows.logsumexp is not None:
        rows = rows._replace(logsumexp=rows.logsumexp + logits.nats(m))
    asked = tuple(name for name in outputs if name in OF_ALL)
    if asked:
        stats = losses(Rows(logits), asked)
        rows = rows._replace(**{name: getattr(stats, name) for name in asked})
    return rows
