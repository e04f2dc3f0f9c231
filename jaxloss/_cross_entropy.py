"""The three functions of logits: log_softmax, nll_loss, cross_entropy."""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack, cast, overload

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxloss._checks import arguments, axis_names, explicit_mesh, messages
from jaxloss._numerics import one_pass, rows
from jaxloss._numerics.logits import Logits, scaling_of
from jaxloss._pallas import dispatch
from jaxloss._tokens.classes import local_classes
from jaxloss._tokens.losses import (
    combined,
    over_temperature_of,
    rows_of_logits,
    temperature_of,
    token_losses,
)
from jaxloss._tokens.reduction import normalised_weights, reduce_losses
from jaxloss._tokens.shapes import (
    all_classes_last,
    classes_back,
    classes_last,
    mask_classes_last,
)
from jaxloss._tokens.targets import make_targets, without_empty_rows
from jaxloss._types import AxisName, Reduction, Scalars, TokenStats, TopKLabels
from jaxloss._xla.derivatives import differentiable
from jaxloss._xla.device import jit
from jaxloss._xla.dtypes import accumulator_dtype, downcast


def log_softmax(
    logits: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    *,
    temperature: ArrayLike | None = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Logarithm of the softmax, exact at every confidence.

    .. math:: \mathrm{out}_j = z_j - \log \sum_i e^{z_i}, \qquad z = x / T

    computed as ``(z_j - m) - log1p(s)`` with ``s`` the sum over all entries but one at the maximum
    ``m``, so that the most likely class of a confident row has -1e-12 and not 0. So
    ``nll_loss(log_softmax(x), y)`` equals ``cross_entropy(x, y)``, gradients included.

    Args:
      logits: any shape ``[..., C, ...]``, a floating dtype. float16 and bfloat16 are computed in
        float32.
      axis: the class axis, or a tuple of axes over which the probabilities sum to 1.
      temperature: ``T > 0``, what the logits are divided by: a Python number, a scalar array, or
        one entry a row (the shape of ``logits`` without ``axis``). Arrays may be traced and are
        differentiable (out of range they make NaN of the rows that they apply to); None is 1. The
        logits' differences are divided, so that an offset that they share costs no digits.
      where: boolean, broadcastable to ``logits``: the classes that exist. The others have -inf,
        and their gradient is 0.

    Returns:
      An array of the shape and dtype of ``logits``. A row that holds NaN or +inf, or nothing but
      -inf, is NaN.

    Raises:
      TypeError: ``logits`` are not floating, or another argument has the wrong type.
      ValueError: ``axis`` is out of range, ``temperature`` is not positive or has another shape, or
        ``where`` does not broadcast to ``logits``.

    Differentiable in ``logits`` and ``temperature``, in forward and reverse mode to any order. The
    backward pass keeps the logits and a few numbers a row; with a temperature other than 1 it keeps
    the divided logits too, in the accumulator's dtype.

    Example:

      >>> import jax.numpy as jnp
      >>> import jaxloss
      >>> print(jaxloss.log_softmax(jnp.array([30.0, 0.0, 0.0])))
      [-1.8715246e-13 -3.0000000e+01 -3.0000000e+01]

    Source: the definition; the sum without its largest term after P. Blanchard, D. J. Higham and
    N. J. Higham, "Accurately computing the log-sum-exp and softmax functions", IMA J. Numer. Anal.
    41 (2021).
    """
    call = "log_softmax"
    logits = messages.floating(call, "logits", logits)
    axes = messages.class_axes(call, logits, "logits", axis)
    wide, batch = accumulator_dtype(logits.dtype), messages.batch_shape(logits, axes)
    own = arguments.token_temperature(call, temperature, batch, wide)
    scalars = Scalars(temperature=arguments.temperature(call, temperature, wide))
    mask = arguments.class_mask(call, "logits", where, logits)
    if logits.size == 0:
        return logits
    return _log_softmax(logits, mask, own, scalars, axes=axes)


@jit
def _log_softmax(logits, class_mask, own, scalars, *, axes):
    every, given = tuple(range(logits.ndim)), logits
    of_rows = tuple(i for i in every if i not in axes)
    logits, class_mask, own = explicit_mesh.aligned(
        (logits, every), (class_mask, every), (own, of_rows), flat=axes
    )
    class_mask = mask_classes_last(class_mask, logits, axes)
    read = Logits(classes_last(logits, axes), class_mask)
    out = rows.row_log_softmax(over_temperature_of(read, scalars, own))
    out = downcast(classes_back(out, logits.shape, axes), logits.dtype)
    return explicit_mesh.as_split(out, given)


def nll_loss(
    log_probs: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int | tuple[int, ...] = -1,
    weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
    empty_mean: float | None = None,
) -> Array:
    r"""Negative log-likelihood of labels under log-probabilities, taken as they are.

    .. math:: l_n = -w_{y_n} \mathrm{logp}_{n, y_n}
              \qquad\text{or}\qquad l_n = -\sum_c w_c\, y_{n,c}\, \mathrm{logp}_{n,c}

    Args:
      log_probs: ``[..., C]``, C at ``axis``; a floating dtype. What ``log_softmax`` returns:
        nothing is normalised here.
      labels: class indices or class probabilities, as in :func:`cross_entropy`.
      axis, weight, ignore_index, sample_weight, where, reduction, empty_mean: as in
        :func:`cross_entropy`.

    Returns:
      float32 (float64 for float64 input): the losses, shaped as ``log_probs`` without ``axis``, or
      their sum or mean.

    Raises:
      TypeError, ValueError: as :func:`cross_entropy`.

    Differentiable in every mode, in ``log_probs``, in probabilities as ``labels`` and in the
    weights.

    Example:

      >>> import jax.numpy as jnp
      >>> import jaxloss
      >>> print(jaxloss.nll_loss(jnp.array([[0.1, 0.1, 0.1, 0.2, 0.5]] * 2), jnp.array([4, 1])))
      -0.3

    Source: ``torch.nn.functional.nll_loss``.
    """
    call, name = "nll_loss", "log_probs"
    log_probs = messages.floating(call, name, log_probs)
    if isinstance(labels, TopKLabels):
        rule = "labels must be class indices or class probabilities"
        messages.fail(call, rule, "TopKLabels", "cross_entropy takes them.", TypeError)
    arrays, options = arguments.token_loss(
        call,
        name,
        log_probs,
        labels,
        axis=axis,
        ignore_index=ignore_index,
        where=where,
        reduction=reduction,
        weight=weight,
        sample_weight=sample_weight,
        empty_mean=empty_mean,
    )
    return _nll_loss(log_probs, arrays, options=options)


@jit
def _nll_loss(log_probs, arrays, *, options):
    log_probs, arrays = explicit_mesh.aligned_tokens(log_probs, options.axes, arrays)
    x, arrays = all_classes_last(log_probs, arrays, options.axes)
    classes = local_classes(options.num_classes)
    arrays = without_empty_rows(arrays, x.shape[:-1], classes)
    class_mask = arrays.class_mask
    read = Logits(x, class_mask)
    whole = arrays._replace(class_mask=None)  # nothing is asked of how many classes exist
    dtype = accumulator_dtype(x.dtype)
    targets = make_targets(whole, classes, dtype, options.ignore_index)
    # What does not count is selected away before it is multiplied: 0 * NaN would return in the
    # gradients.
    nll, soft, valid = None, None, targets.valid
    if targets.label is not None:
        # 0 - x, since -0 is no loss.
        outside = targets.label >= options.num_classes
        log_prob = _nan_where(outside, read.at_class(targets.label).wide())
        nll = jnp.where(valid, 0 - log_prob, 0)
    else:
        x = read.wide()
        asked = valid[..., None] if class_mask is None else valid[..., None] & class_mask
        q = jnp.where(asked, cast(Array, targets.probabilities), 0)
        q = targets._replace(probabilities=q).soft_targets(x.dtype)
        nothing = ~valid[..., None] | ((x == -jnp.inf) & (q == 0))
        soft = jnp.sum(q.astype(x.dtype) * jnp.where(nothing, 0, -x), axis=-1)
    losses = combined(rows.RowLosses(nll, soft), targets)
    return reduce_losses(losses, targets.weights, options)


def _nan_where(wrong: Array, x: Array) -> Array:
    """``x``, but NaN where the label is out of range, value and gradient. The gradient of a row
    whose cotangent is 0 is 0 all the same."""

    def forward(x, wrong):
        return jnp.where(wrong, jnp.nan, x), wrong

    def backward(wrong, ct):
        return jnp.where(wrong & (ct != 0), jnp.nan, ct), None

    def tangent(wrong, tangents):
        return jnp.where(wrong, jnp.nan, tangents[0])

    value = lambda x, wrong: forward(x, wrong)[0]  # noqa: E731
    return differentiable(value, forward, backward, tangent)(x, wrong)


class CrossEntropyOptions(TypedDict, total=False):
    """Of :func:`cross_entropy`, but for ``return_stats``, which says what it returns."""

    axis: int | tuple[int, ...]
    num_classes: int | None
    weight: ArrayLike | None
    ignore_index: int | None
    label_smoothing: ArrayLike | None
    z_loss: ArrayLike | None
    temperature: ArrayLike | None
    logit_softcap: float | None
    sample_weight: ArrayLike | None
    where: ArrayLike | None
    reduction: Reduction
    empty_mean: float | None
    vocab_axis_name: AxisName | None
    token_axis_name: AxisName | None


@overload
def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike | TopKLabels,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[CrossEntropyOptions],
) -> Array: ...
@overload
def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike | TopKLabels,
    *,
    return_stats: Literal[True],
    **options: Unpack[CrossEntropyOptions],
) -> tuple[Array, TokenStats]: ...
@overload
def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike | TopKLabels,
    *,
    return_stats: bool,
    **options: Unpack[CrossEntropyOptions],
) -> Array | tuple[Array, TokenStats]: ...
def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike | TopKLabels,
    *,
    axis: int | tuple[int, ...] = -1,
    num_classes: int | None = None,
    weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: ArrayLike | None = 0.0,
    z_loss: ArrayLike | None = 0.0,
    temperature: ArrayLike | None = 1.0,
    logit_softcap: float | None = None,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
    empty_mean: float | None = None,
    vocab_axis_name: AxisName | None = None,
    token_axis_name: AxisName | None = None,
    return_stats: bool = False,
) -> Array | tuple[Array, TokenStats]:
    r"""Softmax cross-entropy of logits and labels, exact at every confidence.

    For a token with logits ``x`` (capped first, if asked for) and a class index ``y``,

    .. math:: l = w_y\left((1-\epsilon)(\mathrm{lse}(x) - x_y) + z\,\mathrm{lse}(x)^2\right)
              + \frac{\epsilon}{C} \sum_c w_c (\mathrm{lse}(x) - x_c),
              \qquad \mathrm{lse}(x) = \log \sum_j e^{x_j}

    and for class probabilities ``q``, with ``q'_c = (1 - eps) q_c + eps / C``,

    .. math:: l = \sum_c w_c\, q'_c\, (\mathrm{lse}(x) - x_c) + z\,\mathrm{lse}(x)^2

    Args:
      logits: ``[..., C]``, C at ``axis``; a floating dtype of 16 bits or more. ``[C]`` with a
        scalar label is a valid, unbatched call. float16 and bfloat16 are read as they are and
        computed in float32.
      labels: class indices (an integer dtype, the shape of ``logits`` without ``axis``), class
        probabilities (floating, the shape of ``logits``), or :class:`TopKLabels`.
      axis: the class axis; a tuple of axes takes a label as the flat index over them.
      num_classes: C, by default all columns of the logits. Those at and past it are padding and
        never enter the sum.
      weight: ``[C]``, one weight a class. Differentiable.
      ignore_index: the label of tokens that do not count; None: there is none. For class indices:
        another value than the default and None beside class probabilities is an error.
      label_smoothing: ``eps`` in [0, 1], mixes in the uniform distribution over the C classes (over
        those that exist, with ``where``). A Python number, or a scalar array, which may be traced
        and is differentiable (out of range it makes the losses NaN); None is 0.
      z_loss: ``z >= 0``, the weight of the squared log-sum-exp; a number as ``label_smoothing``.
      temperature: ``T > 0``, what the logits are divided by: a Python number, a scalar array, or an
        array shaped as the losses, a temperature a token. Arrays may be traced and are
        differentiable (out of range they make NaN of the rows that they apply to); None is 1. The
        logits' differences are divided, so that an offset that they share costs no digits. An
        array costs a float32 copy of the logits. Loss, smoothing, z-loss and statistics are of the
        divided logits.
      logit_softcap: ``cap > 0``: ``cap * tanh(logits / cap)`` before everything else (the
        temperature too); None: no cap.
      sample_weight: shaped as the losses, ``s``: a weight a token, or a boolean mask.
        Differentiable.
      where: boolean. Broadcastable to ``logits``: the classes that exist, the others being as -inf.
        A token that is left no class does not count, so ``mask[..., None]`` is a mask of tokens; a
        probability that is asked of a class left out is left out of the sum, and a class index of
        one has an infinite loss. Shaped as the losses: the tokens that count. A mask that fits both
        ways (``[C]`` of C tokens) is an error: tokens may be given as ``sample_weight`` too.
      reduction: ``"none"``: ``s_n l_n``, one a token. ``"sum"``. ``"mean"``: PyTorch's,
        ``sum(s_n l_n) / sum(s_n w_{y_n})`` over the tokens that count for class indices,
        ``sum(s_n l_n) / sum(s_n)`` for probabilities.
      empty_mean: what a mean over nothing is, a Python number (0.0 where a batch may be all
        prompt); None: NaN. The gradient of a mean over nothing is 0.
      vocab_axis_name: inside ``shard_map`` (with its ``check_vma=True``), the mesh axis, or axes,
        that the classes are split over, in order. ``logits``, probabilities and ``where`` are then
        this device's columns; class indices, ``weight`` and ``num_classes`` speak of the whole
        vocabulary.
      token_axis_name: likewise, the mesh axis, or axes, that the tokens are split over: ``"sum"``
        and ``"mean"`` are over all of them. Outside of ``shard_map`` both names may be given and
        change nothing: there the sums are over all tokens and classes anyway.
      return_stats: also return :class:`TokenStats`, differentiable with ``reduction="none"``.

    Returns:
      The loss, or ``(loss, TokenStats)``. float32 (float64 for float64 logits); gradients have
      their inputs' dtypes. A token that does not count has loss 0 and gradient 0, whatever its
      logits hold; a label out of range has NaN, in its own row alone (:func:`check_labels` is the
      assertion); so has a row that holds NaN or (where no cap makes it finite) +inf, or nothing
      but -inf.

    Raises:
      TypeError: an argument has the wrong dtype, or an option is no Python number.
      ValueError: a shape, an axis, or an option's value is wrong, or an axis name is none of the
        surrounding ``shard_map``, or nothing varies over it. Nothing is ever broadcast.

    Differentiable in ``logits``, in probabilities as ``labels`` and in the weights, in forward and
    reverse mode to any order. The backward pass keeps the logits, the labels and a few numbers a
    row, and computes ``-s / (1 + t)`` at the label, which is ``softmax - 1`` without its
    cancellation. Second derivatives want finite numbers where a token does not count.

    On an explicit mesh all arguments are split as ``logits`` are or, where those are the same on
    all devices, as ``labels``: what is split otherwise is resharded, its gradient back to how it
    was. ``weight`` is made whole, and of several class axes all but the first.

    Example:

      >>> import jax.numpy as jnp
      >>> import jaxloss
      >>> logits = jnp.array([[30.0, 0.0, 0.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
      >>> print(jaxloss.cross_entropy(logits, jnp.array([0, 2, -100]), reduction="none"))
      [1.8715246e-13 4.0760595e-01 0.0000000e+00]

    Source: ``torch.nn.functional.cross_entropy`` for the semantics of the options; z-loss from
    A. Chowdhery et al., "PaLM" (2022), section 5; soft-capping from Gemma 2 (2024), section 2.
    """
    call = "cross_entropy"
    logits = messages.floating(call, "logits", logits, order="logits, labels")
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
        num_classes=num_classes,
        vocab_axes=axis_names.mesh_axes(call, "vocab_axis_name", vocab_axis_name),
        token_axes=axis_names.mesh_axes(call, "token_axis_name", token_axis_name),
        return_stats=return_stats,
        temperature=temperature,
    )
    scalars = arguments.scalars(
        call,
        accumulator_dtype(logits.dtype),
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_softcap=logit_softcap,
        temperature=temperature,
    )
    axis_names.check_split(
        call,
        "logits",
        logits,
        arguments.of_tokens(arrays),
        vocab_axes=options.vocab_axes,
        token_axes=options.token_axes,
    )
    arguments.check_bucket(call, arrays, scalars)
    return _cross_entropy(logits, arrays, scalars, options=options)


@jit
def _cross_entropy(logits, arrays, scalars, *, options):
    in_one_piece = options.axes == (logits.ndim - 1,)
    logits, arrays = explicit_mesh.aligned_tokens(logits, options.axes, arrays)
    x, arrays = all_classes_last(logits, arrays, options.axes)
    classes = local_classes(options.num_classes, x.shape[-1], options.vocab_axes)
    arrays = without_empty_rows(arrays, x.shape[:-1], classes)
    dtype = accumulator_dtype(x.dtype)
    targets = make_targets(arrays, classes, dtype, options.ignore_index, scalars.label_smoothing)
    plain = targets.plain and scalars.plain and not options.with_stats
    plain = plain and arrays.temperature is None
    if plain and options.reduction != "none" and in_one_piece and dispatch.one_pass_takes(x):
        weights = normalised_weights(targets.weights, options, dtype)
        return one_pass.reduced(x, cast(Array, targets.label), *weights, options.token_axes)
    scaling = scaling_of(scalars.softcap, scalars.temperature)
    read = Logits(x, scaling=scaling, pallas_bytes=2 if in_one_piece else 0)
    rows_of = rows_of_logits(read, temperature_of(arrays, scalars))
    losses, stats = token_losses(rows_of, targets, arrays, options, scalars, dtype)
    loss = reduce_losses(losses, targets.weights, options)
    if stats is None:
        return loss
    return loss, stats if options.reduction == "none" else lax.stop_gradient(stats)
