"""A reference of which k classes of each token are stored, beside the model's logits.

Both sides are k + 1 classes: those named, and all others together, whose log-probability is summed
from the model's others and is never 1 - sum.
"""

from typing import cast

import jax.numpy as jnp
from jax import Array, lax

from jaxloss._linear.log_probs import rows_of
from jaxloss._numerics import log_probs
from jaxloss._numerics.divergence import row_divergences
from jaxloss._tokens.classes import Classes, class_indices
from jaxloss._tokens.targets import make_targets
from jaxloss._types import DIVERGENCES, ReferenceStats, Scalars, TokenArrays, TopKLabels


def reference_stats(
    x: Array,
    labels: TopKLabels,
    class_mask: Array | None,
    temperature: Array | None,
    scalars: Scalars,
    classes: Classes,
    ignore_index: int | None,
) -> ReferenceStats:
    """Of rows of the model's logits; ``scalars``: its soft cap, beta, and the divergences'
    temperature unless each row has its own, ``temperature``."""
    of_rows = TokenArrays(None, class_mask=class_mask, temperature=temperature)
    wide = rows_of(x, of_rows, scalars, classes)
    of_labels = TokenArrays(labels, class_mask=class_mask)
    targets = make_targets(of_labels, classes, wide.d.dtype, ignore_index)
    column = cast(Array, targets.column)
    found = log_probs.log_probs_at(wide, column, classes.axes)
    rest = log_probs.log_prob_of_others(wide, column, classes.axes)
    model = jnp.concatenate([found, rest[..., None]], axis=-1)
    q = [cast(Array, targets.extra), cast(Array, targets.others)[..., None]]
    q = lax.stop_gradient(jnp.concatenate(q, axis=-1))
    _, taken = class_indices(cast(Array, labels.indices), classes.total, ignore_index)
    # What is impossible on both sides is no class, and neither is an empty slot.
    some = (rest > -jnp.inf) | (q[..., -1] > 0)
    exist = jnp.concatenate([taken, some[..., None]], axis=-1)
    log_q = jnp.where(q > 0, jnp.log(jnp.where(q > 0, q, 1)), jnp.where(q == 0, -jnp.inf, jnp.nan))

    def compared(divergence: str) -> Array:
        given = model, log_q, exist, targets.valid
        numbers = {"beta": scalars.beta, "temperature": 1.0}
        return row_divergences(*given, divergence=divergence, **numbers)

    entropy = -jnp.sum(jnp.where(exist & (q != 0), q * log_q, 0), axis=-1)
    if class_mask is not None:  # the divergences are of what is left, which sums to less than 1
        left = jnp.sum(jnp.where(exist, q, 0), axis=-1)
        entropy = entropy / left + jnp.log(left)
    entropy = jnp.where(targets.valid, entropy, 0)
    return ReferenceStats(jnp.full_like(entropy, jnp.nan), entropy, *map(compared, DIVERGENCES))
