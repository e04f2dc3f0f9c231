"""token_stats: what each token's logits say, and a reference's beside them."""

from __future__ import annotations

from typing import Any, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxloss._checks import arguments, axis_names, explicit_mesh, messages
from jaxloss._checks import reference as of_divergences
from jaxloss._linear.named_reference import reference_stats
from jaxloss._tokens.classes import Classes, local_classes
from jaxloss._tokens.reference import beside, stats_of_logits
from jaxloss._tokens.shapes import all_classes_last, classes_last
from jaxloss._tokens.targets import make_targets, without_empty_rows
from jaxloss._types import (
    AxisName,
    LossOptions,
    Reference,
    ReferenceStats,
    Scalars,
    TokenArrays,
    TokenStats,
    TopKLabels,
)
from jaxloss._xla.device import jit
from jaxloss._xla.dtypes import accumulator_dtype


class TokenStatsOptions(TypedDict, total=False):
    """Of :func:`token_stats`, but for ``reference``, which says what it returns."""

    axis: int | tuple[int, ...]
    num_classes: int | None
    ignore_index: int | None
    temperature: ArrayLike | None
    logit_softcap: float | None
    where: ArrayLike | None
    kl_temperature: ArrayLike | None
    beta: ArrayLike | None
    vocab_axis_name: AxisName | None


@overload
def token_stats(
    logits: ArrayLike,
    labels: ArrayLike | TopKLabels,
    *,
    reference: None = None,
    **options: Unpack[TokenStatsOptions],
) -> TokenStats: ...
@overload
def token_stats(
    logits: ArrayLike,
    labels: ArrayLike | TopKLabels,
    *,
    reference: ArrayLike | TopKLabels,
    **options: Unpack[TokenStatsOptions],
) -> tuple[TokenStats, ReferenceStats]: ...
def token_stats(
    logits: ArrayLike,
    labels: ArrayLike | TopKLabels,
    *,
    axis: int | tuple[int, ...] = -1,
    num_classes: int | None = None,
    ignore_index: int | None = -100,
    temperature: ArrayLike | None = 1.0,
    logit_softcap: float | None = None,
    where: ArrayLike | None = None,
    reference: ArrayLike | TopKLabels | None = None,
    kl_temperature: ArrayLike | None = None,
    beta: ArrayLike | None = 0.5,
    vocab_axis_name: AxisName | None = None,
) -> TokenStats | tuple[TokenStats, ReferenceStats]:
    r"""What each token's logits say: log-probability, log-sum-exp, entropy, prediction and more.

    With ``z = x / T`` the logits (capped first, if asked for) over the temperature,

    .. math:: \log p_y = z_y - \mathrm{lse}(z), \qquad p = e^{z - \mathrm{lse}(z)}, \qquad
              H = -\sum_j p_j \log p_j, \qquad \sum_j p_j^2

    What policy gradients are made of: the log-probabilities of the tokens that were sampled, at the
    temperature they were sampled at, and the entropy for a bonus. :func:`cross_entropy` with
    ``return_stats=True`` returns the same beside a loss.

    Args:
      logits: ``[..., C]``, C at ``axis``; a floating dtype.
      labels: the tokens in question: class indices (an integer dtype, the shape of ``logits``
        without ``axis``), class probabilities (floating, the shape of ``logits``), or
        :class:`TopKLabels`.
      axis, num_classes, ignore_index, where, vocab_axis_name: as in :func:`cross_entropy`.
      temperature, logit_softcap: as in :func:`cross_entropy`: of ``z`` are all statistics.
      reference: a model to compare with, without a gradient: its logits, of the shape of
        ``logits``, capped and masked as they are; the dtype may be another. Or :class:`TopKLabels`
        with ``rest="bucket"``, stored probabilities, as in :func:`linear_stats_loss`.
      kl_temperature, beta: as in :func:`linear_stats_loss`.

    Returns:
      :class:`TokenStats`, or with a reference ``(TokenStats, ReferenceStats)``, each shaped as the
      losses: float32 (float64 for float64 logits) and int32. A token that does not count has 0 in
      the floats and -1 in the integers.

    Raises:
      TypeError, ValueError: as :func:`cross_entropy`; or ``temperature`` is not positive, or
        ``reference`` does not fit the logits.

    ``log_prob``, ``logsumexp``, ``entropy``, ``sum_sq_probs`` and the divergences are
    differentiable in ``logits`` (and in probabilities as labels), in forward and reverse mode to
    any order. The backward pass keeps the logits, the labels and a few numbers a row. Under ``jit``
    what a program does not read is not computed.

    Example: the clipped objective of PPO.

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> logits = jax.random.normal(jax.random.key(0), (3, 5))
      >>> actions, advantages = jnp.array([1, 4, 0]), jnp.array([1.0, -0.5, 2.0])
      >>> old = jaxloss.token_stats(logits + 0.1, actions, temperature=0.7).log_prob
      >>> def objective(logits):
      ...     stats = jaxloss.token_stats(logits, actions, temperature=0.7)
      ...     ratio = jnp.exp(stats.log_prob - old)
      ...     clipped = jnp.clip(ratio, 0.8, 1.2)
      ...     return jnp.mean(jnp.minimum(ratio * advantages, clipped * advantages))
      >>> print(round(float(objective(logits)), 4))
      0.8333
      >>> _, beside = jaxloss.token_stats(logits, actions, reference=2 * logits)
      >>> same = jaxloss.kl_divergence(logits, 2 * logits, reduction="none")
      >>> bool(jnp.allclose(beside.forward_kl, same))
      True

    Source: the definitions; J. Schulman et al., "Proximal Policy Optimization Algorithms" (2017)
    for their use.
    """
    call = "token_stats"
    logits = messages.floating(call, "logits", logits, order="logits, labels")
    vocab_axes = axis_names.mesh_axes(call, "vocab_axis_name", vocab_axis_name)
    arrays, options = arguments.token_loss(
        call,
        "logits",
        logits,
        labels,
        axis=axis,
        ignore_index=ignore_index,
        where=where,
        reduction="none",
        num_classes=num_classes,
        vocab_axes=vocab_axes,
        return_stats=True,
        temperature=temperature,
    )
    dtype = accumulator_dtype(logits.dtype)
    scalars = arguments.scalars(call, dtype, logit_softcap=logit_softcap, temperature=temperature)
    arguments.check_bucket(call, arrays, scalars)
    batch = messages.batch_shape(logits, options.axes)
    kl, of_reference = of_divergences.numbers(
        call,
        scalars,
        scalars.softcap,
        arrays.temperature,
        kl_temperature,
        beta,
        batch,
        dtype,
        compares=reference is not None,
    )
    other, stored = _reference(call, logits, batch, reference)
    of_tokens = arguments.of_tokens(arrays)
    split = {"vocab_axes": options.vocab_axes, "token_axes": options.token_axes}
    axis_names.check_split(call, "logits", logits, of_tokens, **split)
    if other is not None:
        axis_names.check_split(call, "reference", other, {}, **split)
    if reference is None:
        return _token_stats(logits, arrays, scalars, options=options)
    numbers = scalars, of_reference
    return _beside_reference(logits, arrays, other, stored, kl, numbers, options=options)


def _reference(
    call: str, logits: Array, batch: tuple[int, ...], given: Any
) -> tuple[Array | None, TopKLabels | None]:
    """The reference's logits, or what is stored of them."""
    if given is None:
        return None, None
    if isinstance(given, TopKLabels):
        return None, of_divergences.stored(call, "logits", batch, given)
    if isinstance(given, Reference | tuple):
        rule = "reference must be logits, an array, or TopKLabels"
        way_out = "linear_token_stats takes the operands of a product."
        messages.fail(call, rule, type(given).__name__, way_out, TypeError)
    given = messages.floating(call, "reference", given)
    messages.shape(call, "reference", given, logits.shape, "the shape of logits")
    return given, None


@jit
def _token_stats(logits, arrays, scalars, *, options):
    logits, arrays = explicit_mesh.aligned_tokens(logits, options.axes, arrays)
    return _of_rows(logits, arrays, scalars, options)[0]


def _of_rows(
    logits: Array, arrays: TokenArrays, scalars: Scalars, options: LossOptions
) -> tuple[TokenStats, tuple[Array, TokenArrays, Classes]]:
    """The statistics, and the rows that they are of."""
    pallas_bytes = 2 if options.axes == (logits.ndim - 1,) else 0
    x, arrays = all_classes_last(logits, arrays, options.axes)
    classes = local_classes(options.num_classes, x.shape[-1], options.vocab_axes)
    arrays = without_empty_rows(arrays, x.shape[:-1], classes)
    given = x, arrays, scalars, classes, options, accumulator_dtype(x.dtype)
    return stats_of_logits(*given, pallas_bytes=pallas_bytes), (x, arrays, classes)


def _aligned(logits: Array, axes: tuple[int, ...], other: Any, stored: Any, kl: Any) -> list:
    every = tuple(range(logits.ndim))
    rows = tuple(i for i in every if i not in axes)
    of_reference = (other, every), (stored, (*rows, None)), (kl, rows)
    return explicit_mesh.aligned((logits, every), *of_reference, flat=axes)


@jit
def _beside_reference(logits, arrays, other, stored, kl, numbers, *, options):
    scalars, of_reference = numbers
    # The reference too may be what alone is split, and what is to be split as the labels are.
    logits, *given = _aligned(logits, options.axes, other, stored, kl)
    logits, arrays = explicit_mesh.aligned_tokens(logits, options.axes, arrays)
    logits, other, stored, kl = _aligned(logits, options.axes, *given)
    stats, (x, arrays, classes) = _of_rows(logits, arrays, scalars, options)
    dtype = accumulator_dtype(x.dtype)
    valid = make_targets(arrays, classes, dtype, options.ignore_index).valid
    # Selected before a cap, or a quotient, whose derivatives there would be 0 * NaN.
    x = jnp.where(valid[..., None], x, 0)
    kl = None if kl is None else jnp.where(valid, kl, 1)
    if stored is not None:
        of_both = of_reference._replace(softcap=scalars.softcap)
        own = lax.stop_gradient(stored), arrays.class_mask, kl
        found = reference_stats(x, *own, of_both, classes, options.ignore_index)
    else:
        t = jnp.where(valid[..., None], classes_last(other, options.axes), 0)
        own = None if arrays.temperature is None else jnp.where(valid, arrays.temperature, 1)
        some = arrays._replace(temperature=own)
        found = beside(x, t, some, kl, numbers, classes, options, dtype, valid)
    return stats, jax.tree.map(lambda v: jnp.where(valid, v, 0), found)
