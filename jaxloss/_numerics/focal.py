"""The factor (1 - p)^gamma of a focal loss, and its derivatives."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxloss._xla.elementary import exp, expm1, log


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def modulated(nll: Array, gamma: float) -> Array:
    """``(1 - p)^gamma nll``, for ``p = e^-nll`` and a gamma above 0.

    A function of ``nll`` alone, with ``u = 1 - p``, ``E = e^nll - 1 = u / p`` and ``h = nll / E``::

        d = u^gamma (1 + gamma h)
        d^2 = gamma u^gamma ((2 + (gamma - 1) h) / E - h)

    No loss is divided by a ``u`` that is as small, and no tangent: such a quotient's derivative has
    u^-2, which is inf long before the loss is 0.
    """
    return _power(nll, gamma) * nll


def _power(nll: Array, gamma: float) -> Array:
    return exp(gamma * log(-expm1(-nll)))


@modulated.defjvp
def _modulated_jvp(gamma, primals, tangents):
    return modulated(*primals, gamma), _modulated_slope(*primals, gamma) * tangents[0]


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _modulated_slope(nll: Array, gamma: float) -> Array:
    _, h = _ratios(nll)
    return _power(nll, gamma) * (1 + gamma * h)


@_modulated_slope.defjvp
def _modulated_slope_jvp(gamma, primals, tangents):
    nll = primals[0]
    e, h = _ratios(nll)
    # For gamma < 1 it grows as nll^(gamma - 1); what it multiplies, a slope, is as small as nll.
    moving = nll >= jnp.finfo(nll.dtype).tiny
    over_e = jnp.where(moving, (2 + (gamma - 1) * h) / jnp.where(moving, e, 1), 0)
    curvature = gamma * _power(jnp.where(moving, nll, 1), gamma) * (over_e - h)
    curvature = jnp.where(moving | jnp.isnan(nll), curvature, 0)
    return _modulated_slope(nll, gamma), curvature * tangents[0]


def _ratios(nll: Array) -> tuple[Array, Array]:
    """``E`` and ``h``, which is 1 at 0, and 0 where E is inf."""
    e = expm1(nll)
    some = (e > 0) & (e < jnp.inf)
    return e, jnp.where(some, nll / jnp.where(some, e, 1), jnp.where(e > 0, 0, 1))
