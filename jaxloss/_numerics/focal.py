"""The factor (1 - p)^gamma of a focal loss, and its derivatives."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxloss._xla.derivatives import with_slopes
from jaxloss._xla.elementary import exp, expm1, log, log1p


def _modulated(nll: Array, gamma: Any) -> Array:
    """``(1 - p)^gamma nll``, for ``p = e^-nll`` and a gamma of at least 0, one for all entries.

    With ``u = 1 - p``, ``E = e^nll - 1 = u / p``, ``h = nll / E`` and ``L = log u``, by ``nll`` and
    by ``gamma``::

        d = u^gamma (1 + gamma h)                                 u^gamma L nll
        d^2 = gamma u^gamma ((2 + (gamma - 1) h) / E - h)         u^gamma L^2 nll
        mixed: u^gamma (L (1 + gamma h) + h)

    No loss is divided by a ``u`` that is as small, and no tangent: such a quotient's derivative has
    u^-2, which is inf long before the loss is 0.
    """
    return _power(nll, gamma) * nll


def _power(nll: Array, gamma: Any) -> Array:
    # Of a loss of 0 the logarithm is -inf, and 0 times that is NaN: a gamma may be 0.
    least = float(jnp.finfo(nll.dtype).min)
    return exp(gamma * jnp.maximum(log(-expm1(-nll)), least))


def _log_u(nll: Array) -> Array:
    """``log(1 - e^-nll)``, exact where ``1 - e^-nll`` is rounded to 1 too."""
    far = nll > 0.5
    near = jnp.where(far, 1, nll)
    return jnp.where(far, log1p(-exp(-jnp.where(far, nll, 1))), log(-expm1(-near)))


def _by_nll(nll, gamma):
    _, h = _ratios(nll)
    return _power(nll, gamma) * (1 + gamma * h)


def _by_gamma(nll, gamma):
    moving, nll = _moving(nll)
    log_u = _log_u(nll)
    # At a loss of inf, u is 1: the product's limit is 0.
    slope = jnp.where(log_u == 0, 0, log_u * nll)
    return jnp.where(moving, _power(nll, gamma) * slope, 0)


def _by_nll_twice(nll, gamma):
    # For gamma < 1 it grows as nll^(gamma - 1); what it multiplies, a slope, is as small as nll.
    moving, nll = _moving(nll)
    e, h = _ratios(nll)
    curvature = gamma * _power(nll, gamma) * ((2 + (gamma - 1) * h) / e - h)
    return jnp.where(moving, curvature, 0)


def _by_both(nll, gamma):
    moving, nll = _moving(nll)
    _, h = _ratios(nll)
    return jnp.where(moving, _power(nll, gamma) * (_log_u(nll) * (1 + gamma * h) + h), 0)


def _by_gamma_twice(nll, gamma):
    log_u = _log_u(_moving(nll)[1])
    return jnp.where(log_u == 0, 0, log_u) * _by_gamma(nll, gamma)


def _moving(nll: Array) -> tuple[Array, Array]:
    """Whether a loss has a slope (one of 0 has none), and it, with 1 in place of a 0."""
    moving = (nll >= jnp.finfo(nll.dtype).tiny) | jnp.isnan(nll)
    return moving, jnp.where(moving, nll, 1)


def _ratios(nll: Array) -> tuple[Array, Array]:
    """``E`` and ``h``, which is 1 at 0, and 0 where E is inf."""
    e = expm1(nll)
    some = (e > 0) & (e < jnp.inf)
    return e, jnp.where(some, nll / jnp.where(some, e, 1), jnp.where(e > 0, 0, 1))


modulated = with_slopes(
    _modulated,
    with_slopes(_by_nll, _by_nll_twice, _by_both),
    with_slopes(_by_gamma, _by_both, _by_gamma_twice),
)
