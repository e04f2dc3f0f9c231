"""The focal loss of a softmax, and its factor ``(1 - p)^gamma``."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxloss._checks import arguments as _arguments
from jaxloss._checks import explicit_mesh, messages
from jaxloss._numerics import rows as _rows
from jaxloss._tokens import targets as _targets
from jaxloss._tokens.losses import TokenOptions, rows_of_logits, token_terms
from jaxloss._tokens.shapes import classes_last, mask_classes_last
from jaxloss._types import Reduction, Scalars, TopKLabels
from jaxloss._xla.device import jit
from jaxloss._xla.dtypes import accumulator_dtype, widened
from jaxloss._xla.indexing import of_rank
from jaxloss._xla.math import exp, expm1, log


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


def focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int | tuple[int, ...] = -1,
    gamma: float = 2.0,
    weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: ArrayLike | None = 0.0,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
    empty_mean: float | None = None,
) -> Array:
    r"""Focal loss of a softmax: cross-entropy that counts less where the model is right.

    .. math:: l = w_y\,(1 - p_y)^\gamma\,(-\log p_y), \qquad p = \mathrm{softmax}(x)

    and for class probabilities or with smoothing, ``q'`` being the smoothed labels as in
    :func:`cross_entropy`,

    .. math:: l = \sum_c w_c\, q'_c\, (1 - p_c)^\gamma\,(-\log p_c)

    with ``1 - p_y = -expm1(-nll)``, which does not cancel: the loss of a confident token and its
    gradient keep their digits for any ``gamma``, below 1 too.

    Args:
      logits: ``[..., C]``, C at ``axis``; a floating dtype.
      labels: class indices (an integer dtype, the shape of ``logits`` without ``axis``), or class
        probabilities (floating, the shape of ``logits``; differentiable).
      gamma: a Python number, at least 0. 0 is :func:`cross_entropy`.
      weight: ``[C]``, one weight a class, often called alpha. Differentiable.
      axis, ignore_index, label_smoothing, sample_weight, where, reduction, empty_mean: as in
        :func:`cross_entropy`, the ``"mean"`` too.

    Returns:
      float32 (float64 for float64 logits): the losses, shaped as ``logits`` without ``axis``, or
        their sum or mean.
      Labels that are ignored or out of range are as in :func:`cross_entropy`.

    Raises:
      TypeError, ValueError: as :func:`cross_entropy`; ``labels`` are :class:`TopKLabels`, or
        ``gamma`` is negative.

    Differentiable in ``logits``, probabilities and the weights, in every mode. Probabilities and
    smoothing hold a few float32 arrays of the logits' size. Inside of :func:`linear_loss` a
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
    logits = messages.floating(call, "logits", logits)
    gamma = _arguments.gamma(call, gamma)
    checked = _arguments.token_arguments(
        call, "logits", logits, labels, axis, weight, ignore_index, sample_weight, where, reduction,
        of_nothing=empty_mean,
    )  # fmt: skip
    if isinstance(checked.arrays.labels, TopKLabels):
        rule = "labels must be class indices or class probabilities"
        messages.fail(call, rule, "TopKLabels", "cross_entropy takes them.", TypeError)
    smoothing = _arguments.smoothing(call, label_smoothing, accumulator_dtype(logits.dtype))
    return _focal_loss(logits, *checked.arrays, Scalars(smoothing), gamma=gamma, **checked.static)


@jit
def _focal_loss(
    logits,
    labels,
    weight,
    sample_weight,
    class_mask,
    token_mask,
    scalars,
    *,
    axes,
    num_classes,
    ignore_index,
    reduction,
    empty_mean,
    gamma,
):
    arrays = labels, weight, sample_weight, class_mask, token_mask
    logits, arrays = explicit_mesh.aligned_tokens(logits, axes, arrays)
    labels, weight, sample_weight, class_mask, token_mask = arrays
    dtype, classes = accumulator_dtype(logits.dtype), _targets.classes_here(num_classes)
    dense = _targets.is_probabilities(labels)
    x, mask = classes_last(logits, axes), mask_classes_last(class_mask, logits, axes)
    mask, token_mask = _targets.without_empty_rows(mask, token_mask, x.shape[:-1], classes)
    targets = _targets.make_targets(
        classes_last(labels, axes) if dense else labels,
        classes,
        dtype,
        weight=weight,
        sample_weight=sample_weight,
        class_mask=mask,
        token_mask=token_mask,
        ignore_index=ignore_index,
        label_smoothing=scalars.label_smoothing,
    )

    def factor(nll):
        return modulated(nll, gamma) if gamma else nll

    nll = soft = None
    if not dense:
        losses, *_ = token_terms(
            rows_of_logits(x, None, kernel_bytes=2 if axes == (logits.ndim - 1,) else 0),
            classes,
            labels,
            None,
            mask,
            targets.counts,
            dtype=dtype,
            options=TokenOptions(ignore_index, with_stats=False),
            scalars=Scalars(),
        )
        nll = factor(jnp.where(targets.counts, losses, 0))
    if targets.soft:
        q = _targets.soft_targets(
            targets.probabilities, targets.share, mask, weight, scalars.label_smoothing,
            num_classes, dtype,
        ).astype(dtype)  # fmt: skip
        q = of_rank(q, x.ndim)
        log_p = _rows.row_log_softmax(widened(x), mask)
        # Selected before anything multiplies them: 0 * inf, and NaN of rows that do not count.
        asked = targets.counts[..., None] & (q != 0)
        asked = asked if mask is None else asked & mask
        each = factor(jnp.where(asked, 0 - log_p, 0))
        soft = jnp.sum(jnp.where(asked, q * each, 0), axis=-1)
    rows = _rows.RowLosses(nll, soft)
    losses = _targets.token_losses(rows, targets, scalars.label_smoothing, 0.0)
    return _targets.reduce_losses(losses, targets, sample_weight, reduction, empty_mean=empty_mean)
