"""A weighted sum of losses of logits, with its gradient from the pass that reads them.

By ``rows`` a gradient waits for its cotangent, and the backward pass reads the logits again. Here
the forward pass asks for the gradient of the sum too, and the backward pass for that of its
cotangent times the sum. Where the cotangent is 1, as that of a loss is which is what a program
differentiates, the two ask for the same: XLA computes it once. By any other it is computed again,
and so rounded once.

Letters: C classes.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxloss._numerics import parts
from jaxloss._numerics.logits import Logits
from jaxloss._numerics.rows import RowLosses, finalize, row_gradient, row_losses, row_tangents
from jaxloss._pallas import dispatch
from jaxloss._types import Axes
from jaxloss._xla import mesh
from jaxloss._xla.derivatives import differentiable, with_derivative_of
from jaxloss._xla.dtypes import upcast
from jaxloss._xla.indexing import gather_class


def _by_xla(logits: Array, omitted: Array, weight: Array) -> tuple[Array, Array, Array, Array]:
    rows = parts.Rows(Logits(logits), omitted)
    part = parts.row_part(rows, ("nll",))
    _, state = finalize(part, ())
    dx = row_gradient(rows, state, RowLosses(nll=weight), logits.dtype)
    return part.m, part.s, part.x_omitted, dx


def _omitted_logit(logits: Array, omitted: Array, weight: Array) -> Array:
    """The logit at ``omitted``. Rows of weight 0 read class 0, which makes the gather depend on the
    weights: otherwise XLA:GPU fuses the gather into the weights' sum, which one block computes."""
    omitted = jnp.where(weight == 0, 0, omitted)
    return jnp.where(omitted < logits.shape[-1], upcast(gather_class(logits, omitted)), jnp.nan)


def _by_kernel(logits: Array, omitted: Array, weight: Array) -> tuple[Array, Array, Array, Array]:
    kernels, _ = dispatch.one_pass()
    x_omitted = _omitted_logit(logits, omitted, weight)
    m, s, dx = kernels.sums_and_gradient(logits, omitted, x_omitted, weight)
    return m, s, x_omitted, dx


def _with_gradient(
    logits: Array, omitted: Array, weight: Array
) -> tuple[Array, Array, Array, Array]:
    """``(m, s, x_omitted)`` of ``parts.RowPart``, and the gradient of ``sum(weight * nll)``."""
    _, platform = dispatch.one_pass()
    forms: dict[str, Any] = {platform: with_derivative_of(_by_xla, _by_kernel)}
    return lax.platform_dependent(logits, omitted, weight, **forms, default=_by_xla)


def weighted_sum(logits: Array, omitted: Array, weight: Array) -> Array:
    """``sum(weight * nll)`` of ``logits[..., C]``; ``omitted`` and ``weight[...]`` as in ``rows``.

    A row of weight 0 adds nothing, whatever it holds. Differentiable in the logits and the weights,
    in every mode.
    """

    def asked(weight, x):
        return jnp.where(weight == 0, 0, x)

    def value(logits, omitted, weight):
        return jnp.sum(weight * asked(weight, row_losses(parts.Rows(Logits(logits), omitted)).nll))

    def forward(logits, omitted, weight):
        # The same operations as the backward pass's, or XLA would not see that they are the same.
        weights = asked(weight, weight * jnp.ones_like(weight))
        m, s, x_omitted, _ = _with_gradient(logits, omitted, weights)
        losses, state = finalize(parts.RowPart(m, s, x_omitted, omitted), ("nll",))
        nll = asked(weight, losses.nll)
        return jnp.sum(weight * nll), (logits, weight, nll, state)

    def backward(residuals, ct):
        logits, weight, nll, state = residuals
        *_, dx = _with_gradient(logits, state.omitted, asked(weight, weight * ct))
        return dx, None, ct * nll

    def tangent(residuals, tangents):
        logits, weight, nll, state = residuals
        d_logits, _, d_weight = tangents
        out = jnp.zeros((), weight.dtype)
        if d_logits is not None:
            rows = parts.Rows(Logits(logits))
            moved = row_tangents(rows, state, ("nll",), d_logits)
            out += jnp.sum(weight * asked(weight, moved.nll))
        if d_weight is not None:
            out += jnp.sum(d_weight * nll)
        return out

    rule = differentiable(value, forward, backward, tangent)
    return rule(*mesh.varying_alike(logits, omitted, weight))


def reduced(logits: Array, omitted: Array, weight: Array, offset: Array, token_axes: Axes) -> Array:
    """Their sum, over the devices along ``token_axes`` too; the weights and the offset are from
    ``_targets.token_weights``."""
    total = weighted_sum(logits, omitted, weight)
    total = lax.psum(total, token_axes) if token_axes else total
    # Added, not selected: a select's cotangent is no constant 1, and the kernel would run twice.
    return total + offset
