"""Sequences in a batch: labels of next-token prediction, weights that let each count the same."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxloss._checks import arguments, explicit_mesh, messages
from jaxloss._tokens.classes import class_indices, local_classes
from jaxloss._tokens.reduction import weights_and_divisors
from jaxloss._tokens.targets import make_targets
from jaxloss._types import TokenArrays
from jaxloss._xla.device import jit
from jaxloss._xla.dtypes import accumulator_dtype


def _integers(call: str, name: str, x: Any, kind: str, of_classes: bool = True) -> Array:
    x = messages.array(call, name, x, of_classes=of_classes)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        rule = f"{name} must be {kind} (an integer dtype)"
        messages.fail(call, rule, messages.describe(x), kind=TypeError)
    if x.ndim == 0:
        messages.fail(call, f"{name} must be [..., T]", f"a scalar, {messages.describe(x)}")
    return x


def _segments(call: str, segment_ids: Any, name: str, like: Array) -> Array | None:
    if segment_ids is None:
        return None
    segment_ids = _integers(call, "segment_ids", segment_ids, "sequence numbers", False)
    messages.shape(call, "segment_ids", segment_ids, like.shape, f"the shape of {name}")
    return segment_ids


def next_token_labels(
    tokens: ArrayLike,
    *,
    segment_ids: ArrayLike | None = None,
    where: ArrayLike | None = None,
    ignore_index: int = -100,
) -> Array:
    r"""The labels of next-token prediction: each position's label is the token that follows.

    .. math:: y_t = \mathrm{token}_{t+1}, \qquad y_{T-1} = \text{ignore\_index}

    So ``hidden`` stays whole. Its slice ``hidden[:, :-1]`` would be a copy of it, and its gradient
    another; these labels give the same loss and gradients, because a token that is ignored adds
    exactly 0 to both.

    Args:
      tokens: ``[..., T]``, an integer dtype that can hold ``ignore_index``. Unsigned tokens are
        taken as int32.
      segment_ids: ``[..., T]``, an integer dtype: the sequence that each token belongs to, where
        rows are packed with several. A position whose next token is of another one is ignored.
        No number is special: where padding has one of its own (0 in batches packed by Grain, seqio
        or MaxText), mask it with ``where=segment_ids != 0``.
      where: boolean ``[..., T]``: the tokens that may be labels, say those of the answer and not
        those of the prompt or the padding. Position t is ignored where ``where[t + 1]`` is False.
      ignore_index: the label of a position that has none, as in :func:`cross_entropy`.

    Returns:
      An array of the shape and dtype of ``tokens``; int32 where those are unsigned (a token past
      int32 is its largest number, which is no class).

    Raises:
      TypeError: ``tokens`` or ``segment_ids`` are no integers, ``tokens`` cannot hold
        ``ignore_index``, or ``where`` is not boolean.
      ValueError: ``tokens`` is a scalar, a shape is another, or ``segment_ids`` of NumPy's 64 bits
        do not fit into the 32 that JAX has by default.

    Rows must be whole: inside ``shard_map`` and on an explicit mesh, T is not split.

    Example: two sequences packed in a row of six, the last token being padding; then an answer
    after a prompt of two tokens.

      >>> import jax.numpy as jnp
      >>> import jaxloss
      >>> tokens = jnp.array([11, 12, 13, 21, 22, 0])
      >>> segment_ids = jnp.array([1, 1, 1, 2, 2, 0])
      >>> print(jaxloss.next_token_labels(
      ...     tokens, segment_ids=segment_ids, where=segment_ids != 0))
      [  12   13 -100   22 -100 -100]
      >>> answer = jnp.array([False, False, True, True, True, False])
      >>> print(jaxloss.next_token_labels(tokens, where=answer))
      [-100   13   21   22 -100 -100]

    Source: ``targets`` and ``targets_segmentation`` of packed batches as in T5X and MaxText.
    """
    call = "next_token_labels"
    tokens = _integers(call, "tokens", tokens, "token numbers")
    ignore_index = messages.index(call, "ignore_index", ignore_index)
    if jnp.issubdtype(tokens.dtype, jnp.unsignedinteger):
        most = min(jnp.iinfo(tokens.dtype).max, jnp.iinfo(jnp.int32).max)
        tokens = jnp.minimum(tokens, jnp.array(most, tokens.dtype)).astype(jnp.int32)
    info = jnp.iinfo(tokens.dtype)
    if not info.min <= ignore_index <= info.max:
        rule = f"tokens must have a dtype that holds ignore_index, {ignore_index}"
        way_out = ""
        if -(2**31) <= ignore_index < 2**31:
            way_out = "Convert them: tokens.astype(jnp.int32)."
        messages.fail(call, rule, messages.describe(tokens), way_out, TypeError)
    segment_ids = _segments(call, segment_ids, "tokens", tokens)
    mask = None if where is None else arguments.boolean(call, where)
    if mask is not None:
        messages.shape(call, "where", mask, tokens.shape, "the shape of tokens")
    return _next_token_labels(tokens, segment_ids, mask, ignore_index=ignore_index)


def _whole_rows(*arrays: Any) -> list:
    """``[..., T]`` each, on an explicit mesh with their rows split alike and T not."""
    rank = next(x.ndim for x in arrays if x is not None)
    return explicit_mesh.aligned(*((x, (*range(rank - 1), None)) for x in arrays))


@jit
def _next_token_labels(tokens, segment_ids, mask, *, ignore_index):
    tokens, segment_ids, mask = _whole_rows(tokens, segment_ids, mask)

    def following(x):  # of the last position the first, which is not read; T may be 0
        return jnp.roll(x, -1, axis=-1)

    at = lax.broadcasted_iota(jnp.int32, tokens.shape, tokens.ndim - 1)
    labelled = at < tokens.shape[-1] - 1
    if segment_ids is not None:
        labelled &= following(segment_ids) == segment_ids
    if mask is not None:
        labelled &= following(mask)
    return jnp.where(labelled, following(tokens), ignore_index)


def sequence_weight(
    labels: ArrayLike,
    *,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
    ignore_index: int | None = -100,
    sample_weight: ArrayLike | None = None,
) -> Array:
    r"""The ``sample_weight`` with which ``reduction="mean"`` is a mean over sequences.

    .. math:: w_n = \frac{s_n}{\sum_{m \in \mathrm{seq}(n)} s_m}, \qquad
              \frac{\sum_n w_n l_n}{\sum_n w_n} = \frac{1}{S} \sum_{\mathrm{seq}}
              \frac{\sum_{n \in \mathrm{seq}} s_n l_n}{\sum_{n \in \mathrm{seq}} s_n}

    over the tokens that count, with S the number of sequences that have any. A plain mean over the
    tokens gives a sequence as much say as it has tokens; this one gives each the same.

    Args:
      labels: class indices ``[..., T]``, as given to the loss.
      segment_ids: ``[..., T]``, an integer dtype: the sequence of its row that each token belongs
        to, in any order; the same number in another row is another sequence. None: each row is one
        sequence.
      num_segments: ids are in ``[0, num_segments)``. By default T + 1, so that T sequences in a row
        may be counted from 0 or from 1.
      ignore_index: the label of tokens that do not count; None: there is none.
      sample_weight: ``[..., T]``, ``s``: a weight a token within its sequence, or a boolean mask of
        the tokens that count. Differentiable.

    Returns:
      ``[..., T]``, float32 (float64 for a float64 ``sample_weight``). Exactly 0 where a token does
      not count, whatever its id. A token that counts but whose id is out of range has NaN, as the
      loss of a label out of range; no other token has. Where the ``s`` of a sequence cancel to 0
      its weights are infinite. The loss must have no class ``weight``, which enters the denominator
      of its mean.

    Raises:
      TypeError: ``labels`` or ``segment_ids`` are no integers, or ``sample_weight`` is complex.
      ValueError: ``labels`` is a scalar, a shape is another, ``segment_ids`` do not fit as in
        :func:`next_token_labels`, or ``num_segments`` is less than 1 or given without
        ``segment_ids``.

    Differentiable in ``sample_weight``, in every mode. Rows must be whole: inside ``shard_map`` and
    on an explicit mesh, T is not split. Over devices, microbatches or steps the weights add up to
    S: give ``token_axis_name`` to the loss, or divide ``reduction="sum"`` by the sum of all
    weights.

    Example: an answer of four tokens beside one of two.

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> labels = jnp.array([[3, 1, 4, 1], [-100, -100, 2, 7]])
      >>> weight = jaxloss.sequence_weight(labels)
      >>> print(weight)
      [[0.25 0.25 0.25 0.25]
       [0.   0.   0.5  0.5 ]]
      >>> logits = jax.random.normal(jax.random.key(0), (2, 4, 9))
      >>> each = [jaxloss.cross_entropy(x, y) for x, y in zip(logits, labels)]
      >>> loss = jaxloss.cross_entropy(logits, labels, sample_weight=weight)
      >>> bool(jnp.allclose(loss, sum(each) / 2))
      True

    Source: the definition; ``loss_agg_mode="seq-mean-token-mean"`` in verl.
    """
    call = "sequence_weight"
    labels = _integers(call, "labels", labels, "class indices")
    segment_ids = _segments(call, segment_ids, "labels", labels)
    if segment_ids is None and num_segments is not None:
        messages.fail(call, "num_segments counts segment_ids", f"{num_segments!r} without them")
    default = labels.shape[-1] + 1
    most = jnp.iinfo(jnp.int32).max
    num_segments = messages.integer(call, "num_segments", num_segments, 1, most, default=default)
    return _sequence_weight(
        labels,
        segment_ids,
        arguments.check_sample_weight(call, sample_weight, labels.shape),
        num_segments=num_segments,
        ignore_index=arguments.ignored(call, ignore_index),
    )


@jit
def _sequence_weight(labels, segment_ids, sample_weight, *, num_segments, ignore_index):
    labels, segment_ids, sample_weight = _whole_rows(labels, segment_ids, sample_weight)
    dtype = accumulator_dtype(jnp.float32 if sample_weight is None else sample_weight.dtype)
    any_class = jnp.iinfo(jnp.int32).max
    arrays = TokenArrays(labels, sample_weight=sample_weight)
    targets = make_targets(arrays, local_classes(any_class), dtype, ignore_index)
    weight, _ = weights_and_divisors(targets.weights, dtype)
    if segment_ids is None:
        return _shares(weight, jnp.sum(weight, axis=-1, keepdims=True), targets.valid)
    segment, _ = class_indices(segment_ids, num_segments, None)
    exists = segment < num_segments
    total = _totals(
        jnp.where(exists, weight, 0), jnp.where(exists, segment, 0), num_segments=num_segments
    )
    share = _shares(weight, total, targets.valid & exists)
    return jnp.where(targets.valid & ~exists, jnp.nan, share)


def _shares(weight: Array, total: Array, valid: Array) -> Array:
    # The constant in place of a 0 keeps 0 / 0 out of the gradients.
    return jnp.where(valid, weight / jnp.where(valid, total, 1), 0)


def _totals(weight: Array, segment: Array, num_segments: int) -> Array:
    """The total weight of the segment that each token belongs to."""

    def of_row(weight, segment):
        totals = jax.ops.segment_sum(weight, segment, num_segments)
        return totals.at[segment].get(mode="promise_in_bounds")

    for _ in range(weight.ndim - 1):
        of_row = jax.vmap(of_row)
    return of_row(weight, segment)
