"""The focal loss of a softmax, and its factor ``(1 - p)^gamma``."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxloss._checks import arguments as _arguments
from jaxloss._checks import explicit_mesh, messages
from jaxloss._numerics import rows as _rows
from jaxloss._numerics.focal import modulated
from jaxloss._tokens import targets as _targets
from jaxloss._tokens.classes import classes_here, is_probabilities
from jaxloss._tokens.losses import TokenOptions, rows_of_logits, token_losses, token_terms
from jaxloss._tokens.reduction import reduce_losses
from jaxloss._tokens.shapes import classes_last, mask_classes_last
from jaxloss._types import Reduction, Scalars, TopKLabels
from jaxloss._xla.device import jit
from jaxloss._xla.dtypes import accumulator_dtype, widened
from jaxloss._xla.indexing import of_rank


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
    dtype, classes = accumulator_dtype(logits.dtype), classes_here(num_classes)
    dense = is_probabilities(labels)
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
    losses = token_losses(rows, targets, scalars.label_smoothing, 0.0)
    return reduce_losses(losses, targets, sample_weight, reduction, empty_mean=empty_mean)
