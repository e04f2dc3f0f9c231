"""The focal loss of a softmax, and its factor ``(1 - p)^gamma``."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxloss._checks import arguments, explicit_mesh, messages
from jaxloss._numerics.focal import modulated
from jaxloss._numerics.logits import Logits, scaling_of
from jaxloss._numerics.rows import RowLosses, row_log_softmax
from jaxloss._tokens.classes import local_classes
from jaxloss._tokens.losses import (
    combined,
    over_temperature_of,
    rows_of_logits,
    temperature_of,
    token_losses,
)
from jaxloss._tokens.reduction import reduce_losses
from jaxloss._tokens.shapes import all_classes_last
from jaxloss._tokens.targets import is_zero, make_targets, without_empty_rows
from jaxloss._types import Reduction, Scalars, TokenArrays, TopKLabels
from jaxloss._xla.device import jit
from jaxloss._xla.dtypes import accumulator_dtype, upcast
from jaxloss._xla.indexing import of_rank


def focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int | tuple[int, ...] = -1,
    gamma: ArrayLike | None = 2.0,
    weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: ArrayLike | None = 0.0,
    temperature: ArrayLike | None = 1.0,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
    empty_mean: float | None = None,
) -> Array:
    r"""Focal loss of a softmax: cross-entropy that counts less where the model is right.

    .. math:: l = w_y\,(1 - p_y)^\gamma\,(-\log p_y), \qquad p = \mathrm{softmax}(x / T)

    and for class probabilities or with smoothing, ``q'`` being the smoothed labels as in
    :func:`cross_entropy`,

    .. math:: l = \sum_c w_c\, q'_c\, (1 - p_c)^\gamma\,(-\log p_c)

    with ``1 - p_y = -expm1(-nll)``, which does not cancel: the loss of a confident token and its
    gradient keep their digits for any ``gamma``, below 1 too.

    Args:
      logits: ``[..., C]``, C at ``axis``; a floating dtype.
      labels: class indices (an integer dtype, the shape of ``logits`` without ``axis``), or class
        probabilities (floating, the shape of ``logits``; differentiable).
      gamma: at least 0: a Python number, or a scalar array, which may be traced and is
        differentiable (out of range it makes NaN of the losses); None is 2. 0 is
        :func:`cross_entropy`.
      weight: ``[C]``, one weight a class, often called alpha. Differentiable.
      axis, ignore_index, label_smoothing, temperature, sample_weight, where, reduction, empty_mean:
        as in :func:`cross_entropy`, the ``"mean"`` too.

    Returns:
      float32 (float64 for float64 logits): the losses, shaped as ``logits`` without ``axis``, or
        their sum or mean.
      Labels that are ignored or out of range are as in :func:`cross_entropy`.

    Raises:
      TypeError, ValueError: as :func:`cross_entropy`; ``labels`` are :class:`TopKLabels`, or
        ``gamma`` is negative.

    Differentiable in ``logits``, probabilities, the weights, ``gamma`` and ``temperature``, in
    every mode. Probabilities and smoothing hold a few float32 arrays of the logits' size. Inside
    of :func:`linear_loss` a chunk of the logits is held at a time.

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
    arrays, options = arguments.token_loss(
        call,
        "logits",
        logits,
        labels,
        axis=axis,
        ignore_index=ignore_index,
        where=where,
        reduction=reduction,
        weight=weight,
        sample_weight=sample_weight,
        empty_mean=empty_mean,
        temperature=temperature,
    )
    if isinstance(arrays.labels, TopKLabels):
        rule = "labels must be class indices or class probabilities"
        messages.fail(call, rule, "TopKLabels", "cross_entropy takes them.", TypeError)
    dtype = accumulator_dtype(logits.dtype)
    numbers = {"label_smoothing": label_smoothing, "temperature": temperature}
    scalars = arguments.scalars(call, dtype, **numbers)
    scalars = scalars._replace(gamma=arguments.check_gamma(call, gamma, dtype))
    return _focal_loss(logits, arrays, scalars, options=options)


@jit
def _focal_loss(logits, arrays, scalars, *, options):
    pallas_bytes = 2 if options.axes == (logits.ndim - 1,) else 0
    logits, arrays = explicit_mesh.aligned_tokens(logits, options.axes, arrays)
    dtype, classes = accumulator_dtype(logits.dtype), local_classes(options.num_classes)
    x, arrays = all_classes_last(logits, arrays, options.axes)
    arrays = without_empty_rows(arrays, x.shape[:-1], classes)
    mask = arrays.class_mask
    targets = make_targets(arrays, classes, dtype, options.ignore_index, scalars.label_smoothing)
    valid = targets.valid

    def factor(nll):
        return nll if is_zero(scalars.gamma) else modulated(nll, scalars.gamma)

    nll = soft = None
    if targets.label is not None:
        own = TokenArrays(arrays.labels, sample_weight=valid, class_mask=mask)
        of_label = make_targets(own, classes, dtype, options.ignore_index)
        scaling = scaling_of(None, scalars.temperature)
        read = Logits(x, scaling=scaling, pallas_bytes=pallas_bytes)
        rows_of = rows_of_logits(read, temperature_of(arrays, scalars))
        losses, _ = token_losses(rows_of, of_label, own, options, Scalars(), dtype)
        nll = factor(jnp.where(valid, losses, 0))
    if targets.soft:
        q = of_rank(targets.soft_targets(dtype).astype(dtype), x.ndim)
        own = None if arrays.temperature is None else jnp.where(valid, arrays.temperature, 1)
        log_p = row_log_softmax(over_temperature_of(Logits(upcast(x), mask), scalars, own))
        # Selected before anything multiplies them: 0 * inf, and NaN of rows that do not count.
        asked = valid[..., None] & (q != 0)
        asked = asked if mask is None else asked & mask
        each = factor(jnp.where(asked, 0 - log_p, 0))
        soft = jnp.sum(jnp.where(asked, q * each, 0), axis=-1)
    losses = combined(RowLosses(nll, soft), targets)
    return reduce_losses(losses, targets.weights, options)
