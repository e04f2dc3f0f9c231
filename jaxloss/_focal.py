"""The focal loss of class indices, and the factor that every focal loss has: ``(1 - p)^gamma``."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxloss import _arguments, _check, _targets
from jaxloss._arguments import Reduction
from jaxloss._canonical import mask_classes_last
from jaxloss._casts import accumulator_dtype
from jaxloss._cross_entropy import cross_entropy
from jaxloss._elementary import exp, expm1, log
from jaxloss._jit import jit
from jaxloss._labels import TopKLabels


def modulated(losses: Array, u: Array, gamma: float, at_zero: tuple[Any, Any]) -> Array:
    """``u^gamma * losses``, for losses that vanish as ``u`` does.

    ``at_zero``: what ``log u`` and ``losses / u`` are where ``u`` is no normal number.
    """
    if not gamma:
        return losses
    # A negative u (of a "probability" past 1) has no logarithm, and stays NaN.
    underflows = (u < jnp.finfo(u.dtype).tiny) & (u >= 0)
    log_u = log(jnp.where(underflows, 1, u))
    # Where the loss is inf, u is 1 and does not move. Not losses / u: its derivative squares u.
    ratio = jnp.where(jnp.isinf(losses), 0, losses) * exp(-log_u)
    log_u, ratio = (
        jnp.where(underflows, zero, x) for zero, x in zip(at_zero, (log_u, ratio), strict=True)
    )
    return _times_power(losses, u, log_u, ratio, gamma)


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def _times_power(losses, u, log_u, ratio, gamma):
    return exp(gamma * log_u) * losses


@_times_power.defjvp
def _times_power_jvp(gamma, primals, tangents):
    # d(u^g l) = u^g (dl + g (l / u) du). As g u^(g - 1) l it is inf * 0 once u underflows, and 0
    # long before for g < 1. The last two arguments are functions of the first two: they have a say
    # in the derivative of this rule, not in the rule.
    losses, _, log_u, ratio = primals
    d_losses, du, *_ = tangents
    power = exp(gamma * log_u)
    return power * losses, power * d_losses + gamma * (power * ratio) * du


def check_gamma(function: str, gamma: Any) -> float:
    return _check.number(function, "gamma", gamma, 0)


def focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int | tuple[int, ...] = -1,
    gamma: float = 2.0,
    weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
    empty_mean: float | None = None,
) -> Array:
    r"""Focal loss of class indices: cross-entropy that counts less where the model is right.

    .. math:: l = w_y\,(1 - p_y)^\gamma\,(-\log p_y), \qquad p = \mathrm{softmax}(x)

    with ``1 - p_y = -expm1(-nll)``, which does not cancel: the loss of a confident token and its
    gradient keep their digits for any ``gamma``, below 1 too.

    Args:
      logits: ``[..., C]``, C at ``axis``; a floating dtype.
      labels: class indices, an integer dtype, the shape of ``logits`` without ``axis``.
      gamma: a Python number, at least 0. 0 is :func:`cross_entropy`.
      weight: ``[C]``, one weight a class, often called alpha. Differentiable.
      axis, ignore_index, sample_weight, where, reduction, empty_mean: as in
        :func:`cross_entropy`. ``"mean"`` is ``sum(s_n l_n) / sum(s_n w_{y_n})`` over the tokens
        that count.

    Returns:
      float32 (float64 for float64 logits): the losses, shaped as ``labels``, or their sum or mean.
      Labels that are ignored or out of range are as in :func:`cross_entropy`.

    Raises:
      TypeError, ValueError: as :func:`cross_entropy`; ``labels`` are no class indices, or ``gamma``
        is negative.

    Differentiable in ``logits`` and the weights, in every mode. Inside of :func:`linear_loss` a
    chunk of the logits is held at a time.

    Example:

      >>> import jax, jax.numpy as jnp
      >>> from functools import partial
      >>> import jaxloss
      >>> logits = jnp.array([[30.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
      >>> print(jaxloss.focal_loss(logits, jnp.array([0, 2]), gamma=0.5, reduction="none"))
      [8.0964277e-20 2.3583412e-01]
      >>> hidden = jax.random.normal(jax.random.key(0), (6, 4))
      >>> kernel = jax.random.normal(jax.random.key(1), (4, 10))
      >>> each = partial(jaxloss.focal_loss, reduction="none")
      >>> loss = jaxloss.linear_loss(each, hidden, kernel, jnp.arange(6), chunk_size=2)
      >>> bool(jnp.allclose(loss, jaxloss.focal_loss(hidden @ kernel, jnp.arange(6))))
      True

    Source: T.-Y. Lin et al., "Focal Loss for Dense Object Detection" (2017), for C classes.
    """
    call = "focal_loss"
    logits = _check.floating(call, "logits", logits)
    gamma = check_gamma(call, gamma)
    checked = _arguments.token_arguments(
        call, "logits", logits, labels, axis, weight, ignore_index, sample_weight, where, reduction,
        of_nothing=empty_mean,
    )  # fmt: skip
    labels = checked.arrays.labels
    if not _targets.is_indices(labels):
        got = "TopKLabels" if isinstance(labels, TopKLabels) else _check.describe(labels)
        _check.fail(call, "labels must be class indices (an integer dtype)", got, kind=TypeError)
    return _focal_loss(logits, *checked.arrays, gamma=gamma, **checked.static)


@jit
def _focal_loss(
    logits,
    labels,
    weight,
    sample_weight,
    class_mask,
    token_mask,
    *,
    axes,
    num_classes,
    ignore_index,
    reduction,
    empty_mean,
    gamma,
):
    dtype, classes = accumulator_dtype(logits.dtype), _targets.classes_here(num_classes)
    # cross_entropy itself makes nothing of a row without classes: here it is not to count.
    mask = mask_classes_last(class_mask, logits, axes)
    token_mask = _targets.tokens_with_classes(mask, token_mask, labels.shape, classes)
    targets = _targets.make_targets(
        labels,
        classes,
        dtype,
        weight=weight,
        sample_weight=sample_weight,
        token_mask=token_mask,
        ignore_index=ignore_index,
    )
    nll = cross_entropy(
        logits,
        labels,
        axis=axes,
        ignore_index=ignore_index,
        sample_weight=targets.counts,
        where=class_mask,
        reduction="none",
    )
    losses = modulated(nll, -expm1(-nll), gamma, (-jnp.inf, 1))
    if targets.label_weight is not None:
        losses = targets.label_weight * losses
    return _targets.reduce_losses(losses, targets, sample_weight, reduction, empty_mean=empty_mean)
