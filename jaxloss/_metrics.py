"""Metrics of a whole evaluation, from sums that add over steps and devices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export, lax
from jax.typing import ArrayLike

from jaxloss._checks import arguments, axis_names, explicit_mesh, messages
from jaxloss._tokens.reduction import mean_of
from jaxloss._types import AxisName, TokenStats
from jaxloss._xla.device import jit
from jaxloss._xla.dtypes import accumulator_dtype
from jaxloss._xla.elementary import exp


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "nll", "entropy", "hits", "bin_weight", "bin_confidence", "bin_hits"),
    meta_fields=("top_k",),
)
@dataclass(frozen=True)
class MetricSums:
    """Sums over tokens, from :func:`metric_sums`: a pytree of arrays that add.

    ``a + b`` are those of the tokens of both, and so is ``sum([a, b])``; over devices
    ``jax.lax.psum``.

    Each sum is two numbers, on the first axis of its array: its leading 8 bits, and the rest. The
    sum of both is the sum. One float32 stops counting single tokens at 2^24; these two, added
    separately, count them past 10^10.

    Attributes:
      weight: ``[2]``, the number of tokens that count, or their total weight.
      nll: ``[2]``, of ``-log_prob``.
      entropy: ``[2]``, of ``entropy``.
      hits: ``[2, K]``: the tokens whose label is among the first k, for each k of ``top_k``.
      bin_weight: ``[2, bins]``: the tokens whose confidence lies in each bin.
      bin_confidence: ``[2, bins]``: of their ``confidence``.
      bin_hits: ``[2, bins]``: those of them whose label is the prediction.
      top_k: the k's, 1 first. Static: sums of different k's do not add.
    """

    weight: Array
    nll: Array
    entropy: Array
    hits: Array
    bin_weight: Array
    bin_confidence: Array
    bin_hits: Array
    top_k: tuple[int, ...] = (1,)

    def __add__(self, other: MetricSums) -> MetricSums:
        if not isinstance(other, MetricSums):
            return NotImplemented
        call = "MetricSums"
        if self.top_k != other.top_k:
            got = f"{self.top_k} and {other.top_k}"
            messages.fail(call, "sums that are added must have the same top_k", got)
        total, own = {}, _arrays(self)
        for name, x in _arrays(other).items():
            if jnp.shape(own[name]) != jnp.shape(x):
                got = f"{jnp.shape(own[name])} and {jnp.shape(x)}"
                messages.fail(call, f"sums that are added must have the same shape of {name}", got)
            total[name] = jnp.add(own[name], x)
        return MetricSums(**total, top_k=self.top_k)

    def __radd__(self, other: int) -> MetricSums:
        # sum(parts) starts from 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented


def _arrays(sums: MetricSums) -> dict[str, Any]:
    return {field.name: getattr(sums, field.name) for field in fields(sums)[:-1]}  # but top_k


# A program that returns them can be stored, and run where jaxloss is imported.
export.register_pytree_node_serialization(
    MetricSums,
    serialized_name="jaxloss.MetricSums",
    serialize_auxdata=lambda meta_fields: json.dumps(meta_fields).encode(),
    deserialize_auxdata=lambda data: tuple(map(tuple, json.loads(data))),
)


MOST_BINS = 2**24  # float32 has no more numbers in (1/2, 1]


def _positive(call: str, name: str, x: Any, most: int) -> int:
    x = messages.bounded(call, name, messages.index(call, name, x), 1)
    if x > most:
        messages.fail(call, f"{name} must be at most {most}", repr(x))
    return x


def _top_k(call: str, top_k: Any) -> tuple[int, ...]:
    if not isinstance(top_k, Sequence) or isinstance(top_k, str):
        messages.fail(call, "top_k must be a sequence of ints", repr(top_k), kind=TypeError)
    most = jnp.iinfo(jnp.int32).max  # of ranks
    ks = tuple(_positive(call, "each of top_k", k, most) for k in top_k)
    if len(set(ks)) != len(ks):
        messages.fail(call, "top_k must name each k once", repr(top_k))
    return (1, *(k for k in ks if k != 1))


def _stats(call: str, stats: Any) -> TokenStats:
    if not isinstance(stats, TokenStats):
        way_out = ""
        if isinstance(stats, tuple) and any(isinstance(x, TokenStats) for x in stats):
            way_out = "return_stats=True returns (loss, stats)."
        rule = "stats must be jaxloss.TokenStats"
        messages.fail(call, rule, type(stats).__name__, way_out, TypeError)
    names = ("log_prob", "entropy", "confidence")
    found = {name: messages.floating(call, f"stats.{name}", getattr(stats, name)) for name in names}
    found["rank"] = messages.array(call, "stats.rank", stats.rank)
    if not jnp.issubdtype(found["rank"].dtype, jnp.integer):
        rule = "stats.rank must have an integer dtype"
        messages.fail(call, rule, messages.describe(found["rank"]), kind=TypeError)
    shape = found["log_prob"].shape
    for name, x in found.items():
        messages.shape(call, f"stats.{name}", x, shape, "the shape of stats.log_prob")
    return stats._replace(**found, logsumexp=None, prediction=None)  # which nothing here reads


def metric_sums(
    stats: TokenStats,
    *,
    top_k: Sequence[int] = (1, 5),
    bins: int = 15,
    sample_weight: ArrayLike | None = None,
    token_axis_name: AxisName | None = None,
) -> MetricSums:
    r"""What :func:`metrics` needs of some tokens, as sums: those of more tokens are their sum.

    .. math:: \sum_n s_n, \quad \sum_n s_n (-\log p_{y_n}), \quad \sum_n s_n H_n, \quad
              \sum_n s_n [\mathrm{rank}_n < k]

    and, for each bin ``b`` of ``bins`` equal ones, ``((b - 1) / bins, b / bins]``, the sums of
    ``s_n``, of ``s_n confidence_n`` and of ``s_n [rank_n = 0]`` over the tokens whose confidence
    lies in it. Over steps add them with ``+`` or ``sum``, over devices with ``jax.lax.psum``.
    Ratios and the exponential come after that, in :func:`metrics`: a mean of perplexities or of
    calibration errors is none.

    Args:
      stats: from :func:`token_stats` or :func:`linear_token_stats`, or what ``return_stats=True``
        returns beside a loss.
      top_k: for which k the tokens are counted whose label is among the first k. 1 is always one
        of them.
      bins: of the calibration error.
      sample_weight: ``s``, shaped as the statistics: a weight a token, or a boolean mask of the
        tokens that count, for metrics of one kind of tokens.
      token_axis_name: inside ``shard_map``, the mesh axis, or axes, that the tokens are split over:
        the sums are over all of them.

    Returns:
      :class:`MetricSums`, float32 (float64 for float64 statistics).

      The tokens that count are those that counted there (their confidence is above 0, and
      that of the others exactly 0) and whose ``sample_weight`` is not 0. A row without a prediction
      (of NaN or +inf, or of nothing but -inf) and a label out of range count and are NaN: they make
      the metrics NaN and do not vanish. So do hits where there is no one label, with probabilities
      as labels.

    Raises:
      TypeError: ``stats`` are no :class:`TokenStats`, or an argument has the wrong type.
      ValueError: shapes differ, a k is not in [1, 2^31) or ``bins`` not in [1, 2^24], or an axis
        name is none of the surrounding ``shard_map``.

    After the addition of n steps a sum is off by less than ``n 2^-34`` of itself beside the
    rounding of each step's own (6e-7 for 10^4 steps; a float32 by up to ``n 2^-25``, 3e-4), as long
    as no step has less than ``2^-16`` of it. Differentiable where the statistics are.

    Example: an evaluation loop.

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> @jax.jit
      ... def step(logits, labels):
      ...     return jaxloss.metric_sums(jaxloss.token_stats(logits, labels), top_k=(1, 3))
      >>> logits = 3 * jax.random.normal(jax.random.key(0), (4, 2, 6, 10))  # four batches
      >>> labels = jnp.argmax(logits, axis=-1).at[:, :, 4].set(7).at[:, :, 5].set(-100)
      >>> sums = sum(map(step, logits, labels))
      >>> for name, value in jaxloss.metrics(sums).items():
      ...     print(f"{name:18} {value:.2f}")
      weight             40.00
      nll                1.51
      perplexity         4.53
      entropy            1.03
      accuracy           0.82
      top_3_accuracy     0.90
      calibration_error  0.24

    Source: the bins as in C. Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017).
    """
    call = "metric_sums"
    stats = _stats(call, stats)
    sample_weight = arguments.check_sample_weight(call, sample_weight, stats.log_prob.shape)
    token_axes = axis_names.mesh_axes(call, "token_axis_name", token_axis_name)
    of_tokens = {"sample_weight": sample_weight}
    axis_names.check_split(call, "stats", stats.confidence, of_tokens, token_axes=token_axes)
    return _metric_sums(
        stats,
        sample_weight,
        top_k=_top_k(call, top_k),
        bins=_positive(call, "bins", bins, MOST_BINS),
        token_axes=token_axes,
    )


@jit
def _metric_sums(stats, sample_weight, *, top_k, bins, token_axes):
    rows = tuple(range(stats.log_prob.ndim))
    log_prob, entropy, confidence, rank, sample_weight = explicit_mesh.aligned(
        *((x, rows) for x in (stats.log_prob, stats.entropy, stats.confidence, stats.rank)),
        (sample_weight, rows),
    )
    stats = stats._replace(log_prob=log_prob, entropy=entropy, confidence=confidence, rank=rank)
    dtype = accumulator_dtype(stats.log_prob.dtype)
    confidence = stats.confidence.astype(dtype)
    valid = confidence != 0  # that of a prediction is at least 1 / C, or NaN
    weight = jnp.ones_like(confidence)
    if sample_weight is not None:
        valid &= sample_weight.astype(bool)
        if sample_weight.dtype != jnp.bool_:
            weight = sample_weight.astype(dtype)
    # A row of nothing but -inf has a rank, for its entries are all at the maximum.
    ranked = (stats.rank >= 0) & ~jnp.isnan(confidence)

    def weighted(x):
        # Selected twice: the NaN of a token that does not count would reach the weights' gradient.
        return jnp.where(valid, weight * jnp.where(valid, x.astype(dtype), 0), 0)

    def hits(k):
        return weighted(jnp.where(ranked, (stats.rank < k).astype(dtype), jnp.nan))

    of_tokens = [jnp.where(valid, weight, 0), weighted(-stats.log_prob), weighted(stats.entropy)]
    of_tokens = jnp.stack([*of_tokens, *map(hits, top_k)])
    tokens = tuple(range(1, of_tokens.ndim))
    sums = _in_two(jnp.sum(of_tokens, axis=tokens))

    of_bins = jnp.stack([of_tokens[0], weighted(confidence), of_tokens[3]])
    edges = (np.arange(bins + 1) / bins).astype(dtype)
    # NaN must reach some bin, and so must what a rounding lifts above 1.
    binned = jnp.where(jnp.isnan(confidence), 1, jnp.minimum(confidence, 1))

    def in_bin(edge):
        low, high = edge
        return jnp.sum(jnp.where((binned > low) & (binned <= high), of_bins, 0), axis=tokens)

    # One bin at a time: XLA:CPU writes [tokens, bins] out where they are one reduction.
    bin_sums = _in_two(jnp.moveaxis(lax.map(in_bin, (edges[:-1], edges[1:])), 0, 1))
    if token_axes:
        sums, bin_sums = lax.psum((sums, bin_sums), token_axes)
    return MetricSums(
        weight=sums[:, 0],
        nll=sums[:, 1],
        entropy=sums[:, 2],
        hits=sums[:, 3:],
        bin_weight=bin_sums[:, 0],
        bin_confidence=bin_sums[:, 1],
        bin_hits=bin_sums[:, 2],
        top_k=top_k,
    )


def _in_two(x: Array) -> Array:
    """``x`` as its leading 8 bits and the rest, ``[2, ...]``.

    Numbers of 8 bits and of about one size add exactly in float32, 2^16 of them. The rest is 2^-9
    of ``x`` or less, and so is what its additions lose. The plain ``jax.tree.map`` and ``psum`` do
    it; Kahan's summation would need an addition of its own.
    """
    exponent = jnp.finfo(x.dtype).nexp
    # Not astype(bfloat16): XLA may drop a conversion and its reverse.
    leading = lax.reduce_precision(x, exponent, mantissa_bits=7)
    leading = jnp.where(jnp.isfinite(leading), leading, 0)  # inf - inf
    return jnp.stack([leading, x - leading])


def metrics(sums: MetricSums) -> dict[str, Array]:
    r"""The metrics of all tokens that went into the sums.

    .. math:: \mathrm{nll} = \frac{1}{N} \sum_n s_n (-\log p_{y_n}), \qquad
              \mathrm{perplexity} = e^{\mathrm{nll}}, \qquad
              \mathrm{ECE} = \sum_b \frac{N_b}{N} |\mathrm{acc}_b - \mathrm{conf}_b|

    with ``N`` the total weight of the tokens that count, and ``N_b``, ``acc_b``, ``conf_b`` weight,
    accuracy and mean confidence of those in bin ``b``.

    Args:
      sums: from :func:`metric_sums`, one or the sum of several.

    Returns:
      A dict of scalars, float32 (float64 for float64 sums): ``"weight"`` (N), ``"nll"`` (nats),
      ``"perplexity"``, ``"entropy"``, ``"accuracy"``, ``"top_{k}_accuracy"`` for each other k, and
      ``"calibration_error"``. Without any token that counts, all but the weight are NaN.

    Raises:
      TypeError: ``sums`` are no :class:`MetricSums`, or hold something else than arrays.
      ValueError: they are several, stacked, or their arrays have other shapes than
        :func:`metric_sums` makes.

    Example: inside of a ``scan``, whose stacked sums are added afterwards.

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> def step(kernel, batch):
      ...     hidden, labels = batch
      ...     stats = jaxloss.linear_token_stats(hidden, kernel, labels)
      ...     return kernel, jaxloss.metric_sums(stats)
      >>> kernel = jax.random.normal(jax.random.key(0), (8, 50))
      >>> hidden = jax.random.normal(jax.random.key(1), (3, 16, 8))
      >>> labels = jax.random.randint(jax.random.key(2), (3, 16), 0, 50)
      >>> _, stacked = jax.lax.scan(step, kernel, (hidden, labels))
      >>> found = jaxloss.metrics(jax.tree.map(lambda x: x.sum(axis=0), stacked))
      >>> loss = jaxloss.linear_cross_entropy(hidden, kernel, labels)
      >>> bool(jnp.allclose(found["nll"], loss))
      True

    Source: C. Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), equation 3, for
    the expected calibration error.
    """
    call = "metrics"
    if not isinstance(sums, MetricSums):
        rule = "sums must be jaxloss.MetricSums"
        way_out = "Make them: metric_sums(stats)." if isinstance(sums, TokenStats) else ""
        messages.fail(call, rule, type(sums).__name__, way_out, TypeError)
    sums = _checked_sums(call, sums)
    total, nll, perplexity, entropy, hits, calibration_error = _means(sums)
    return {
        "weight": total,
        "nll": nll,
        "perplexity": perplexity,
        "entropy": entropy,
        **{
            "accuracy" if k == 1 else f"top_{k}_accuracy": share
            for k, share in zip(sums.top_k, hits, strict=True)
        },
        "calibration_error": calibration_error,
    }


def _checked_sums(call: str, sums: MetricSums) -> MetricSums:
    found = {name: messages.floating(call, f"sums.{name}", x) for name, x in _arrays(sums).items()}
    weight, bins = found["weight"], found["bin_weight"].shape[-1:]
    way_out = "Add them: jax.tree.map(lambda x: x.sum(axis=0), sums)." if weight.ndim > 1 else ""
    messages.shape(call, "sums.weight", weight, (2,), "two numbers", way_out)
    shapes = {"hits": (2, len(_top_k(call, sums.top_k)))}
    shapes |= dict.fromkeys(("bin_weight", "bin_confidence", "bin_hits"), (2, *bins))
    for name, x in found.items():
        messages.shape(call, f"sums.{name}", x, shapes.get(name, (2,)), "metric_sums' shape")
    return replace(sums, **found)


@jax.jit
def _means(sums):
    total = sums.weight[0] + sums.weight[1]

    def mean(x):
        return mean_of(x, total)

    nll, entropy = mean(sums.nll[0] + sums.nll[1]), mean(sums.entropy[0] + sums.entropy[1])
    hits = sums.hits[0] + sums.hits[1]
    gap = sums.bin_hits - sums.bin_confidence  # part by part: the two are nearly equal
    calibration_error = mean(jnp.sum(jnp.abs(gap[0] + gap[1])))
    return total, nll, exp(nll), entropy, [mean(x) for x in hits], calibration_error
