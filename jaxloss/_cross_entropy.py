"""The three functions of logits: log_softmax, nll_loss, cross_entropy."""

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxloss import _check, _passes, _rows, _targets
from jaxloss._casts import accumulator_dtype

Reduction = Literal["none", "mean", "sum"]
AxisName = str | tuple[str, ...]


class TokenStats(NamedTuple):
    """What one token's logits say, from the pass that computed the loss; each shaped as the losses.

    A token that does not count (its label is ignored, masked or weighed by 0) has 0 in each of the
    floats and -1 in the integers; a label out of range has NaN in the first three.

    Attributes:
      log_prob: ``log p_y``, the label's log-probability (for probabilities ``q`` as labels, its
        expectation ``sum_j q_j log p_j``), without weights, smoothing or z-loss. float32.
      logsumexp: ``log sum_j exp(x_j)``. float32.
      entropy: ``-sum_j p_j log p_j``, in nats. float32.
      prediction: the first class at the maximum; -1 where the logits hold NaN or +inf. int32.
      confidence: the prediction's probability. float32, without a derivative.
      rank: the label's place in the order of predictions, by falling logit and then by index: 0
        where it is the prediction, so that ``rank < k`` says whether it is among the first k. -1
        where there is no prediction, or no one label. int32.
    """

    log_prob: Array
    logsumexp: Array
    entropy: Array
    prediction: Array
    confidence: Array
    rank: Array


def classes_last(x: Array, axes: tuple[int, ...]) -> Array:
    batch = [i for i in range(x.ndim) if i not in axes]
    if [*batch, *axes] != list(range(x.ndim)):
        x = x.transpose([*batch, *axes])
    # Not -1: the size of an empty batch says nothing of the classes.
    return (
        x if len(axes) == 1 else x.reshape(*x.shape[: len(batch)], math.prod(x.shape[len(batch) :]))
    )


def mask_classes_last(mask: Array | None, like: Array, axes: tuple[int, ...]) -> Array | None:
    if mask is not None and len(axes) > 1:  # a flattened axis has no dimension left to broadcast
        shape = [
            n if i in axes else m
            for i, (m, n) in enumerate(zip(mask.shape, like.shape, strict=True))
        ]
        mask = jnp.broadcast_to(mask, shape)
    return None if mask is None else classes_last(mask, axes)


def log_softmax(logits: ArrayLike, axis: int | tuple[int, ...] = -1, *, where=None) -> Array:
    r"""Logarithm of the softmax, exact at every confidence.

    .. math:: \mathrm{out}_j = x_j - \log \sum_i e^{x_i}

    computed as ``(x_j - m) - log1p(s)`` with ``s`` the sum over all entries but one at the maximum
    ``m``, so that the most likely class of a confident row has -1e-12 and not 0. So
    ``nll_loss(log_softmax(x), y)`` equals ``cross_entropy(x, y)``, gradients included.

    Args:
      logits: any shape ``[..., C, ...]``, a floating dtype. float16 and bfloat16 are computed in
        float32.
      axis: the class axis, or a tuple of axes over which the probabilities sum to 1.
      where: boolean, broadcastable to ``logits``: the classes that exist. The others have -inf,
        and their gradient is 0.

    Returns:
      An array of the shape and dtype of ``logits``. A row that holds NaN or +inf, or nothing but
      -inf, is NaN.

    Raises:
      TypeError: ``logits`` are not floating, or ``axis`` or ``where`` has the wrong type.
      ValueError: ``axis`` is out of range, or ``where`` does not broadcast to ``logits``.

    Differentiable in ``logits``, in forward and reverse mode to any order. The backward pass keeps
    the logits and a few numbers a row.

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
    logits = _check.floating(call, "logits", logits)
    axes = _check.class_axes(call, logits, "logits", axis)
    mask = _check.class_mask(call, "logits", where, logits)
    if logits.size == 0:
        return logits
    return _log_softmax(logits, mask, axes=axes)


@partial(jax.jit, static_argnames=("axes",))
def _log_softmax(logits, class_mask, *, axes):
    class_mask = mask_classes_last(class_mask, logits, axes)
    batch = [i for i in range(logits.ndim) if i not in axes]
    order = [*batch, *axes]
    out = _rows.row_log_softmax(classes_last(logits, axes), class_mask)
    out = out.reshape([logits.shape[i] for i in order])
    return out.transpose([order.index(i) for i in range(logits.ndim)])


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
) -> Array:
    r"""Negative log-likelihood of labels under log-probabilities, taken as they are.

    .. math:: l_n = -w_{y_n} \mathrm{logp}_{n, y_n}
              \qquad\text{or}\qquad l_n = -\sum_c w_c\, y_{n,c}\, \mathrm{logp}_{n,c}

    Args:
      log_probs: ``[..., C]``, C at ``axis``; a floating dtype. What ``log_softmax`` returns:
        nothing is normalised here.
      labels, axis, weight, ignore_index, sample_weight, where, reduction: as in
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
    log_probs = _check.floating(call, name, log_probs)
    labels = _check.array(call, "labels", labels)
    checked = _check.token_arguments(
        call, name, log_probs, labels, axis, weight, ignore_index, sample_weight, where, reduction
    )
    return _nll_loss(log_probs, *checked.arrays, **checked.static)


@partial(jax.jit, static_argnames=("axes", "num_classes", "ignore_index", "reduction"))
def _nll_loss(
    log_probs,
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
):
    class_mask = mask_classes_last(class_mask, log_probs, axes)
    x = _passes.widen(classes_last(log_probs, axes), class_mask, None)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        labels = classes_last(labels, axes)
    targets = _targets.make_targets(
        labels,
        _targets.Classes(num_classes, num_classes),
        x.dtype,
        weight=weight,
        sample_weight=sample_weight,
        token_mask=token_mask,
        ignore_index=ignore_index,
    )
    nll = soft = None
    if targets.kept is not None:
        nll = -_passes.entry_or_nan(x, targets.kept)
    else:
        q = _targets.soft_targets(
            targets.probabilities, None, None, weight, 0.0, num_classes, x.dtype
        )
        impossible = (x == -jnp.inf) & (q == 0)
        soft = jnp.sum(q.astype(x.dtype) * jnp.where(impossible, 0, -x), axis=-1)
    losses = _targets.token_losses(_rows.RowLosses(nll, soft, None, None), targets, 0.0, 0.0)
    return _targets.reduce_losses(losses, targets, sample_weight, reduction)


def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int | tuple[int, ...] = -1,
    num_classes: int | None = None,
    weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
    vocab_axis_name: AxisName | None = None,
    token_axis_name: AxisName | None = None,
    return_stats: bool = False,
) -> Any:
    r"""Softmax cross-entropy of logits and labels, exact at every confidence.

    For a token with logits ``x`` (capped first, if asked for) and a class index ``y``,

    .. math:: l = w_y\left((1-\epsilon)(\mathrm{lse}(x) - x_y) + z\,\mathrm{lse}(x)^2\right)
              + \frac{\epsilon}{C} \sum_c w_c (\mathrm{lse}(x) - x_c),
              \qquad \mathrm{lse}(x) = \log \sum_j e^{x_j}

    and for class probabilities ``q``, with ``q'_c = (1 - eps) q_c + eps / C``,

    .. math:: l = \sum_c w_c\, q'_c\, (\mathrm{lse}(x) - x_c) + z\,\mathrm{lse}(x)^2

    Args:
      logits: ``[..., C]``, C at ``axis``; a floating dtype. ``[C]`` with a scalar label is a valid,
        unbatched call. float16 and bfloat16 are read as they are and computed in float32.
      labels: class indices (an integer dtype, the shape of ``logits`` without ``axis``), class
        probabilities (floating, the shape of ``logits``), or :class:`TopKLabels`.
      axis: the class axis; a tuple of axes takes a label as the flat index over them.
      num_classes: C, by default all columns of the logits. Those at and past it are padding and
        never enter the sum.
      weight: ``[C]``, one weight a class. Differentiable.
      ignore_index: the label of tokens that do not count; None: there is none. Class indices only.
      label_smoothing: ``eps`` in [0, 1], mixes in the uniform distribution over the C classes (over
        those that exist, with ``where``).
      z_loss: ``z``, the weight of the squared log-sum-exp.
      logit_softcap: ``cap > 0``: ``cap * tanh(logits / cap)`` before everything else; None: no cap.
      sample_weight: shaped as the losses, ``s``: a weight a token, or a boolean mask.
        Differentiable.
      where: boolean. Broadcastable to ``logits``: the classes that exist, the others being as -inf.
        Shaped as the losses: the tokens that count.
      reduction: ``"none"``: ``s_n l_n``, one a token. ``"sum"``. ``"mean"``: PyTorch's,
        ``sum(s_n l_n) / sum(s_n w_{y_n})`` over the tokens that count for class indices,
        ``sum(s_n l_n) / sum(s_n)`` for probabilities. A mean over nothing is NaN, with gradient 0.
      vocab_axis_name: inside ``shard_map``, the mesh axis, or axes, that the classes are split
        over, in order. ``logits``, probabilities and ``where`` are then this device's columns;
        class indices, ``weight`` and ``num_classes`` speak of the whole vocabulary.
      token_axis_name: inside ``shard_map``, the mesh axis, or axes, that the tokens are split over:
        ``"sum"`` and ``"mean"`` are over all of them.
      return_stats: also return :class:`TokenStats`, differentiable with ``reduction="none"``.

    Returns:
      The loss, or ``(loss, TokenStats)``. float32 (float64 for float64 logits); gradients have
      their inputs' dtypes. A token that does not count has loss 0 and gradient 0, whatever its
      logits hold; a label out of range has NaN, in its own row alone (:func:`check_labels` is the
      assertion); so has a row that holds NaN or +inf, or nothing but -inf.

    Raises:
      TypeError: an argument has the wrong dtype, or an option is no Python number.
      ValueError: a shape, an axis, or an option's value is wrong, or an axis name is none of the
        surrounding ``shard_map``, or nothing varies over it. Nothing is ever broadcast.

    Differentiable in ``logits``, in probabilities as ``labels`` and in the weights, in forward and
    reverse mode to any order. The backward pass keeps the logits, the labels and a few numbers a
    row, and computes ``-s / (1 + t)`` at the label, which is ``softmax - 1`` without its
    cancellation.

    Example:

      >>> import jax.numpy as jnp
      >>> import jaxloss
      >>> logits = jnp.array([[30.0, 0.0, 0.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
      >>> print(jaxloss.cross_entropy(logits, jnp.array([0, 2, -100]), reduction="none"))
      [1.8715246e-13 4.0760595e-01 0.0000000e+00]

    Source: ``torch.nn.functional.cross_entropy`` for the semantics of the options; z-loss from
    A. Chowdhery et al., "PaLM" (2022), section 5; soft-capping from Gemma 2 (2024), section 2.
    """
    return losses_of_logits(
        "cross_entropy",
        logits,
        labels,
        axis=axis,
        num_classes=num_classes,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_softcap=logit_softcap,
        sample_weight=sample_weight,
        where=where,
        reduction=reduction,
        vocab_axis_name=vocab_axis_name,
        token_axis_name=token_axis_name,
        return_stats=return_stats,
    )


def losses_of_logits(
    call: str,
    logits,
    labels,
    *,
    axis,
    num_classes,
    ignore_index,
    logit_softcap,
    where,
    reduction,
    vocab_axis_name,
    return_stats,
    weight=None,
    label_smoothing=0.0,
    z_loss=0.0,
    sample_weight=None,
    token_axis_name=None,
    temperature=1.0,
) -> Any:
    """:func:`cross_entropy` of the public function ``call``."""
    name = "logits"
    logits = _check.floating(call, name, logits)
    vocab_axes = _check.mesh_axes(call, "vocab_axis_name", vocab_axis_name)
    token_axes = _check.mesh_axes(call, "token_axis_name", token_axis_name)
    checked = _check.token_arguments(
        call, name, logits, labels, axis, weight, ignore_index, sample_weight, where, reduction,
        num_classes, vocab_axes,
    )  # fmt: skip
    _check.split(call, name, logits, checked.of_tokens, vocab_axes, token_axes)
    smoothing = _check.number(call, "label_smoothing", label_smoothing, 0, 1)
    _check.bucket(call, checked.arrays[0], weight, smoothing)
    return _cross_entropy(
        logits,
        *checked.arrays,
        **checked.static,
        vocab_axes=vocab_axes,
        token_axes=token_axes,
        label_smoothing=smoothing,
        z_loss=_check.number(call, "z_loss", z_loss, 0, sys.float_info.max),
        scaling=_passes.scaling_of(
            _check.softcap(call, logit_softcap), _check.temperature(call, temperature)
        ),
        return_stats=_check.flag(call, "return_stats", return_stats),
    )


@partial(
    jax.jit,
    static_argnames=(
        "axes",
        "num_classes",
        "ignore_index",
        "reduction",
        "vocab_axes",
        "token_axes",
        "label_smoothing",
        "z_loss",
        "scaling",
        "return_stats",
    ),
)
def _cross_entropy(
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
    vocab_axes,
    token_axes,
    label_smoothing,
    z_loss,
    scaling,
    return_stats,
):
    if _targets.is_probabilities(labels):
        labels = classes_last(labels, axes)
    x, class_mask = classes_last(logits, axes), mask_classes_last(class_mask, logits, axes)
    losses, stats, targets = token_terms(
        rows_of_logits(x, scaling),
        _targets.classes_here(num_classes, x.shape[-1], vocab_axes),
        labels,
        weight,
        class_mask,
        sample_weight,
        token_mask,
        dtype=accumulator_dtype(x.dtype),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        with_stats=return_stats,
    )
    loss = _targets.reduce_losses(losses, targets, sample_weight, reduction, token_axes)
    if not return_stats:
        return loss
    return loss, stats if reduction == "none" else lax.stop_gradient(stats)


def rows_of_logits(x: Array, scaling: _passes.Scaling | None):
    """How :func:`token_terms` gets its rows where the logits ``x[..., columns]`` are there."""

    def rows_of(targets, classes, class_mask, weight, label_smoothing, want, predict):
        mask, axes = _targets.existing(class_mask, classes, x.ndim), classes.axes
        soft = _targets.soft_targets(
            targets.probabilities,
            targets.share,
            _targets.existing(class_mask, classes, targets.counts.ndim + 1),
            _targets.weight_here(weight, classes),
            label_smoothing,
            classes.size,
            accumulator_dtype(x.dtype),
        )
        losses = partial(_rows.row_losses, x, scaling=scaling, vocab_axes=axes)
        if targets.rest is not None:
            rows = losses(None, None, mask, want=want) if want else None
            rows = _with_bucket(rows, x, targets, classes, mask, scaling)
        else:
            rows = losses(targets.kept, soft, mask, top=targets.top, want=want)
        if not predict:
            return rows, None, None
        prediction = _passes.prediction(x, mask, classes.start, axes)
        rank = None
        if targets.kept is not None:
            rank = _passes.rank(x, mask, targets.kept, classes.start, axes)
        return rows, prediction, rank

    return rows_of


def _with_bucket(rows, x, targets, classes, mask, scaling) -> _rows.RowLosses:
    """The loss over k + 1 classes: those named, and one of all others, whose logit is their lse."""
    column, axes = targets.column, classes.axes
    here = column < x.shape[-1]
    named_here = _passes.added_at(jnp.zeros_like(x, jnp.int8), column, here.astype(jnp.int8))
    others = named_here == 0 if mask is None else (named_here == 0) & mask
    rest = _rows.row_losses(
        x, None, None, others, scaling=scaling, want=("logsumexp",), vocab_axes=axes
    )
    named = _passes.widen(
        _passes.entries(x, column),
        None if mask is None else _passes.entries(jnp.broadcast_to(mask, x.shape), column),
        scaling,
    )
    if axes:
        held = lax.psum(here.astype(jnp.int32), axes) > 0
        named = jnp.where(held, lax.psum(jnp.where(here, named, 0), axes), -jnp.inf)
    else:
        named = jnp.where(here, named, -jnp.inf)
    few = jnp.concatenate([named, rest.logsumexp[..., None]], axis=-1)
    asked = jnp.concatenate([targets.extra, targets.rest[..., None]], axis=-1)
    soft = _rows.row_losses(few, None, asked, want=()).soft
    return _rows.RowLosses(None, soft, None, None) if rows is None else rows._replace(soft=soft)


def token_terms(
    rows_of: Callable,
    classes: _targets.Classes,
    labels: Any,
    weight: Array | None,
    class_mask: Array | None,
    sample_weight: Array | None = None,
    token_mask: Array | None = None,
    *,
    dtype: jnp.dtype,
    ignore_index: int | None,
    label_smoothing: float,
    z_loss: float,
    with_stats: bool,
) -> tuple[Array, TokenStats | None, _targets.Targets]:
    """Each token's loss (not yet masked), its statistics (masked), and what it asked for."""
    targets = _targets.make_targets(
        labels,
        classes,
        dtype,
        weight=weight,
        sample_weight=sample_weight,
        class_mask=class_mask,
        token_mask=token_mask,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    want = _targets.wanted(targets, label_smoothing, z_loss, with_stats)
    rank = None
    if classes.total == 0:
        nan = jnp.full(targets.counts.shape, jnp.nan, dtype)
        rows, prediction = _rows.RowLosses(*[nan] * 5), jnp.full_like(nan, -1, jnp.int32)
    else:
        given = (classes, class_mask, weight, label_smoothing)
        rows, prediction, rank = rows_of(targets, *given, want, with_stats)
    # Before anything multiplies them: lse^2 of a masked row's inf has a gradient of 0 * inf.
    rows = _rows.RowLosses(*(v if v is None else jnp.where(targets.counts, v, 0) for v in rows))
    losses = _targets.token_losses(rows, targets, label_smoothing, z_loss)
    if not with_stats:
        return losses, None, targets

    if targets.kept is not None:
        log_prob = -rows.nll
    elif (not label_smoothing and weight is None) or classes.total == 0:
        log_prob = -rows.soft
    else:  # weighed or smoothed: the labels themselves take a pass of their own
        plain = _targets.make_targets(
            labels, classes, dtype, weight=None, class_mask=class_mask, ignore_index=ignore_index
        )
        own, *_ = rows_of(plain, classes, class_mask, None, 0.0, (), False)
        log_prob = jnp.where(targets.counts, -own.soft, 0)
    predicted = targets.counts & (prediction >= 0)
    stats = TokenStats(
        log_prob,
        rows.logsumexp,
        rows.entropy,
        prediction=jnp.where(predicted, prediction, -1),
        confidence=lax.stop_gradient(rows.confidence),
        rank=jnp.where(predicted, -1 if rank is None else rank, -1),
    )
    return losses, stats, targets
