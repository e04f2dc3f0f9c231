"""Losses of logits that are binary decisions, each entry its own: yes or no, many labels at once.

With ``y`` the probability that is asked for and ``z = 1 - y``, an entry's loss is
``a softplus(-x) + b softplus(x)``, ``a`` and ``b`` being ``y`` and ``z`` times weights. Nothing
here is subtracted from 1 but ``y``: a sigmoid near 1 has lost what it lacks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxloss._checks import arguments, explicit_mesh, messages
from jaxloss._numerics.binary import focal_half, softplus
from jaxloss._tokens import targets
from jaxloss._tokens.classes import class_indices
from jaxloss._tokens.reduction import mean_of
from jaxloss._tokens.targets import valid_tokens
from jaxloss._types import Reduction, Scalars
from jaxloss._xla.device import jit
from jaxloss._xla.dtypes import accumulator_dtype, upcast
from jaxloss._xla.indexing import of_rank


def _asked(weight: Array, penalty: Array) -> Array:
    # What weighs 0 asks for nothing, at an infinite logit either (0 * inf is NaN).
    return weight * jnp.where((weight == 0) & jnp.isinf(penalty), 0, penalty)


def _targets_of(labels: Array, ignore_index: int | None, dtype) -> tuple[Array, Array]:
    """Returns (the positive class's probability, NaN where a label is none; counts)."""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        return labels.astype(dtype), jnp.ones_like(labels, bool)
    index, valid = class_indices(labels, 2, ignore_index)
    return jnp.where(index < 2, index.astype(dtype), jnp.nan), valid


@jit
def _losses(
    logits,
    labels,
    weight,
    pos_weight,
    sample_weight,
    where,
    scalars,
    *,
    ignore_index,
    alpha,
    reduction,
    empty_mean,
):
    dtype, rank = accumulator_dtype(logits.dtype), logits.ndim
    label_smoothing, gamma = scalars.label_smoothing, scalars.gamma
    arrays = logits, labels, weight, pos_weight, sample_weight, where
    every = tuple(range(rank))
    logits, labels, weight, pos_weight, sample_weight, where = explicit_mesh.aligned(
        *((x, () if x is None else every[rank - x.ndim :]) for x in arrays)
    )

    # The backward pass computes it again from the arguments, instead of keeping what would be half
    # a dozen arrays of the logits' size, in float32 whatever their dtype.
    @jax.checkpoint
    def terms(logits, labels, weight, pos_weight, sample_weight, where):
        y, valid = _targets_of(labels, ignore_index, dtype)
        some = valid_tokens(sample_weight, where)
        if some is not None:
            valid &= some
        # Selected away before anything multiplies them, and once more behind it.
        x, y = jnp.where(valid, upcast(logits), 0), jnp.where(valid, y, 0)
        z = 1 - y
        if not targets.is_zero(label_smoothing):
            # As z (1 - eps) + eps / 2, XLA adds a small eps / 2 to the 1 of 1 - y, and loses it.
            y, z = (v + label_smoothing * (0.5 - v) for v in (y, z))
        if not targets.is_zero(gamma):
            a, b = jnp.ones_like(y), jnp.ones_like(z)
            down, up = focal_half(x, y, z, gamma), focal_half(-x, z, y, gamma)
        else:
            a, b = y, z
            down, up = softplus(x)
        if pos_weight is not None:
            a = a * of_rank(pos_weight.astype(dtype), rank)
        if alpha is not None:
            balance = alpha * y + (1 - alpha) * z
            a, b = a * balance, b * balance
        if weight is not None:
            w = of_rank(weight.astype(dtype), rank)
            a, b = a * w, b * w
        losses = _asked(a, down) + _asked(b, up)
        losses = jnp.where(valid, losses, 0)
        divisor = jnp.ones_like(losses)
        if sample_weight is not None and sample_weight.dtype != jnp.bool_:
            divisor = sample_weight.astype(dtype)
            losses = jnp.where(valid, divisor * losses, 0)
        if reduction == "none":
            return losses, None
        return jnp.sum(losses), jnp.sum(jnp.where(valid, divisor, 0))

    losses, divisor = terms(logits, labels, weight, pos_weight, sample_weight, where)
    return losses if reduction != "mean" else mean_of(losses, divisor, empty_mean)


def _labels(function: str, labels: Any, logits: Array) -> Array:
    labels = messages.array(function, "labels", labels, of_classes=True, narrow=False)
    kinds = (jnp.integer, jnp.floating, jnp.bool_)
    if not any(jnp.issubdtype(labels.dtype, kind) for kind in kinds):
        rule = "labels must be 0 and 1 (integer or boolean) or probabilities (floating)"
        messages.fail(function, rule, messages.describe(labels), kind=TypeError)
    given, shape = labels.shape, logits.shape
    way_out = ""
    if shape == (*given, 1):
        way_out = "Drop the size-1 axis: logits.squeeze(-1)."
    elif given == (*shape, 1):
        way_out = "Drop the size-1 axis: labels.squeeze(-1)."
    elif given == shape[:-1] and jnp.issubdtype(labels.dtype, jnp.integer):
        way_out = "One class of C: cross_entropy, or jax.nn.one_hot(labels, C) for C decisions."
    messages.shape(function, "labels", labels, shape, "the shape of logits", way_out)
    return labels


def _entry_weight(function: str, name: str, given: Any, logits: Array) -> Any:
    if given is None:
        return None
    weight = messages.floating(function, name, given)
    if not arguments.fits(weight, logits.shape):
        rule = f"{name} must broadcast to the shape of logits, {logits.shape}"
        way_out = arguments.broadcast(name, given, weight, logits.shape)
        messages.fail(function, rule, messages.describe(weight), way_out)
    return weight


def _pos_weight(function: str, weight: Any, logits: Array) -> Any:
    if isinstance(weight, int | float):
        weight = messages.number(function, "pos_weight", weight, 0)
        weight = jnp.asarray(weight, accumulator_dtype(logits.dtype))
    return _entry_weight(function, "pos_weight", weight, logits)


def _alpha(function: str, alpha: Any) -> float | None:
    if alpha is None:
        return None
    if isinstance(alpha, int | float) and alpha < 0:
        rule = "alpha must be in [0, 1], or None"
        messages.fail(function, rule, repr(alpha), "torchvision's alpha=-1 is alpha=None.")
    return messages.number(function, "alpha", alpha, 0, 1)


def _loss_of(
    function: str,
    logits: Any,
    labels: Any,
    weight: Any,
    pos_weight: Any,
    ignore_index: Any,
    label_smoothing: Any,
    sample_weight: Any,
    where: Any,
    reduction: Any,
    empty_mean: Any,
    alpha: Any = None,
    gamma: Any = 0,
) -> Array:
    logits = messages.floating(function, "logits", logits)
    labels = _labels(function, labels, logits)
    weight = _entry_weight(function, "weight", weight, logits)
    pos_weight = _pos_weight(function, pos_weight, logits)
    sample_weight = arguments.check_sample_weight(function, sample_weight, logits.shape)
    if where is not None:
        mask = arguments.boolean(function, where)
        way_out = arguments.broadcast("where", where, mask, logits.shape)
        messages.shape(function, "where", mask, logits.shape, "the shape of logits", way_out)
        where = mask
    arguments.check_reduction(function, reduction)
    dtype = accumulator_dtype(logits.dtype)
    return _losses(
        logits,
        labels,
        weight,
        pos_weight,
        sample_weight,
        where,
        Scalars(
            arguments.smoothing(function, label_smoothing, dtype),
            gamma=arguments.check_gamma(function, gamma, dtype),
        ),
        ignore_index=arguments.ignored(function, ignore_index, labels),
        alpha=_alpha(function, alpha),
        reduction=reduction,
        empty_mean=arguments.check_empty_mean(function, empty_mean),
    )


def sigmoid_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: ArrayLike | None = 0.0,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
    empty_mean: float | None = None,
) -> Array:
    r"""Binary cross-entropy of logits: each entry is a yes or no of its own.

    .. math:: l = w\left(p\,y'\,\mathrm{softplus}(-x) + (1 - y')\,\mathrm{softplus}(x)\right),
              \qquad y' = (1-\epsilon)\,y + \frac{\epsilon}{2},
              \qquad \mathrm{softplus}(x) = \log(1 + e^x) = -\log \mathrm{sigmoid}(-x)

    Args:
      logits: any shape ``[..., C]``, or a scalar; a floating dtype. float16 and bfloat16 are read
        as they are and computed in float32.
      labels: the shape of ``logits``. Integer: 0 or 1. Boolean. Floating: the probability of a yes,
        differentiable.
      weight: ``w``, broadcastable to ``logits``: ``[C]`` is one weight a class, ``[C, 1, 1]`` that
        of images ``[..., C, H, W]``. It scales losses, and is not in the mean's denominator.
        Differentiable.
      pos_weight: ``p``, what a yes weighs, broadcastable to ``logits``. Differentiable.
      ignore_index: the label of entries that do not count; None: there is none. For integers:
        another value than the default and None beside other labels is an error.
      label_smoothing: ``eps`` in [0, 1], mixes in a probability of 1/2. A Python number, or a
        scalar array, which may be traced and is differentiable; None is 0.
      sample_weight: the shape of ``logits``, ``s``: a weight an entry, or a boolean mask.
        Differentiable.
      where: boolean, the shape of ``logits``: the entries that count.
      reduction: ``"none"``: ``s_n l_n``, one an entry. ``"sum"``. ``"mean"``:
        ``sum(s_n l_n) / sum(s_n)`` over the entries that count, so PyTorch's where all do and s is
        1.
      empty_mean: what a mean over nothing is, a Python number; None: NaN. Its gradient is 0.

    Returns:
      float32 (float64 for float64 logits); gradients have their inputs' dtypes. An entry that does
      not count has loss 0 and gradient 0, whatever its logit holds; an integer that is no label has
      NaN, in its own entry alone; so has a logit of NaN. A logit of +inf or -inf has loss 0 where
      it is right, and inf where it is wrong.

    Raises:
      TypeError: an argument has the wrong dtype, or an option is no Python number.
      ValueError: a shape or an option's value is wrong: nothing but these two is ever broadcast.

    Differentiable in ``logits``, probabilities and the weights, in forward and reverse mode to any
    order. The backward pass keeps the arguments and nothing else. The gradient,
    ``w ((1 - y') sigmoid(x) - p y' sigmoid(-x))``, is exact for labels of 0 and 1; between them it
    is a difference, to a few roundings of its larger term: near y' = sigmoid(x) that is all that
    rounded logits say. ``sigmoid(x) - y`` has an error of a rounding of 1.

    Example:

      >>> import jax.numpy as jnp
      >>> import jaxloss
      >>> logits = jnp.array([[30.0, -2.0], [0.0, jnp.nan]])
      >>> labels = jnp.array([[1, 1], [0, -100]])
      >>> print(jaxloss.sigmoid_cross_entropy(logits, labels, reduction="none"))
      [[9.357623e-14 2.126928e+00]
       [6.931472e-01 0.000000e+00]]

    Source: ``torch.nn.functional.binary_cross_entropy_with_logits`` for ``weight``, ``pos_weight``
    and the mean; ``optax.sigmoid_binary_cross_entropy``; smoothing as in TensorFlow's
    ``BinaryCrossentropy``.
    """
    return _loss_of(
        "sigmoid_cross_entropy",
        logits,
        labels,
        weight,
        pos_weight,
        ignore_index,
        label_smoothing,
        sample_weight,
        where,
        reduction,
        empty_mean,
    )


def sigmoid_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: float | None = None,
    gamma: ArrayLike | None = 2.0,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: ArrayLike | None = 0.0,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
    empty_mean: float | None = None,
) -> Array:
    r"""Focal loss of binary decisions: what is right already counts less.

    .. math:: l = \alpha_t\,(1 - p_t)^\gamma\,\mathrm{bce}(x, y'), \qquad
              1 - p_t = (1 - y')\,\mathrm{sigmoid}(x) + y'\,\mathrm{sigmoid}(-x), \qquad
              \alpha_t = \alpha y' + (1 - \alpha)(1 - y')

    with ``bce`` and ``y'`` from :func:`sigmoid_cross_entropy`, weights included. ``1 - p_t`` is
    that sum of positive terms, never a difference, and its power is taken of its logarithm: the
    gradient is exact for any ``gamma``, below 1 too, and where ``1 - p_t`` underflows.

    Args:
      logits: any shape ``[..., C]``, or a scalar; a floating dtype.
      labels: the shape of ``logits``: 0 and 1, booleans, or probabilities (floating).
      alpha: a Python number in [0, 1]: positives weigh ``alpha``, negatives ``1 - alpha``; None:
        both weigh 1.
      gamma: at least 0: a Python number, or a scalar array, which may be traced and is
        differentiable (out of range it makes NaN of the losses); None is 2. With 0 and no ``alpha``
        it is :func:`sigmoid_cross_entropy`.
      weight, pos_weight, ignore_index, label_smoothing, sample_weight, where, reduction,
        empty_mean: as in :func:`sigmoid_cross_entropy`. Detectors often divide the ``"sum"`` by the
        number of positives instead of taking the ``"mean"``.

    Returns:
      As :func:`sigmoid_cross_entropy`.

    Raises:
      TypeError, ValueError: as :func:`sigmoid_cross_entropy`; or ``alpha`` or ``gamma`` is out of
        range.

    Differentiable in ``logits``, probabilities, the weights and ``gamma``, in every mode. The
    backward pass keeps the arguments and nothing else.

    Example:

      >>> import jax.numpy as jnp
      >>> import jaxloss
      >>> logits, labels = jnp.array([20.0, -2.0, 0.0]), jnp.array([1, 1, 0])
      >>> print(jaxloss.sigmoid_focal_loss(logits, labels, alpha=0.25, reduction="none"))
      [2.1891277e-27 4.1251951e-01 1.2996510e-01]

    Source: T.-Y. Lin et al., "Focal Loss for Dense Object Detection" (2017);
    ``torchvision.ops.sigmoid_focal_loss``; for probabilities ``optax.sigmoid_focal_loss``.
    """
    return _loss_of(
        "sigmoid_focal_loss",
        logits,
        labels,
        weight,
        pos_weight,
        ignore_index,
        label_smoothing,
        sample_weight,
        where,
        reduction,
        empty_mean,
        alpha,
        gamma,
    )
