"""A reference's statistics beside a model's, where the logits of both are there."""

from __future__ import annotations

from typing import Any, cast

import jax.numpy as jnp
from jax import Array, lax

from jaxloss._numerics.divergence import row_divergences
from jaxloss._numerics.logits import Logits, scaling_of
from jaxloss._tokens.classes import Classes, existing
from jaxloss._tokens.losses import rows_of_logits, temperature_of, token_losses
from jaxloss._tokens.targets import make_targets
from jaxloss._types import (
    DIVERGENCES,
    LossOptions,
    ReferenceStats,
    Scalars,
    TokenArrays,
    TokenStats,
)


def stats_of_logits(
    x: Array,
    arrays: TokenArrays,
    scalars: Scalars,
    classes: Classes,
    options: LossOptions,
    dtype: Any,
    *,
    pallas_bytes: int = 4,
) -> TokenStats:
    """Of rows of logits ``[..., columns]``."""
    targets = make_targets(arrays, classes, dtype, options.ignore_index)
    scaling = scaling_of(scalars.softcap, scalars.temperature)
    logits = Logits(x, scaling=scaling, pallas_bytes=pallas_bytes)
    rows_of = rows_of_logits(logits, temperature_of(arrays, scalars))
    return cast(TokenStats, token_losses(rows_of, targets, arrays, options, scalars, dtype)[1])


def beside(
    x: Array,
    t: Array,
    arrays: TokenArrays,
    kl_temperature: Array | None,
    numbers: tuple[Scalars, Scalars],
    classes: Classes,
    options: LossOptions,
    dtype: Any,
    valid: Array | None = None,
) -> ReferenceStats:
    """Of the rows ``t``, without a gradient to them, beside the model's ``x``.

    ``numbers`` are those of the model; and the reference's soft cap with the beta of the
    divergences and the temperature of its entropy and of the divergences, unless each token has its
    own, ``kl_temperature``. ``valid``: the tokens that count; None: all.
    """
    scalars, of_reference = numbers
    t = lax.stop_gradient(t)
    of_t = classes, options, dtype
    its_own = scalars._replace(softcap=of_reference.softcap)
    log_prob = stats_of_logits(t, arrays, its_own, *of_t).log_prob
    of_kl = arrays._replace(temperature=kl_temperature)
    entropy = stats_of_logits(t, of_kl, of_reference, *of_t).entropy
    pair = _capped(x, scalars.softcap), _capped(t, of_reference.softcap)
    own = of_reference.temperature if kl_temperature is None else kl_temperature
    exist = existing(arrays.class_mask, classes, x.ndim)
    compared = (
        row_divergences(
            *pair,
            exist,
            valid,
            divergence=divergence,
            beta=of_reference.beta,
            temperature=own,
            axes=classes.axes,
        )
        for divergence in DIVERGENCES
    )
    return ReferenceStats(*lax.stop_gradient((log_prob, entropy)), *compared)


def _capped(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * jnp.tanh(x / cap)
