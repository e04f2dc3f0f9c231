"""linear_stats_loss: any loss of each token's statistics, and of a reference's beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypedDict, Unpack, overload

import jax
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from jaxloss._checks import messages
from jaxloss._linear import layout, stats_loss
from jaxloss._linear.operands import product_of
from jaxloss._linear.own_loss import OwnLoss, closed_over, reduced, refuse_types_of_a_mesh
from jaxloss._types import AxisName, KernelLike, PyTree, Reduction, Reference, TopKLabels


class StatsLossOptions(TypedDict, total=False):
    """Of :func:`linear_stats_loss`, but for ``has_aux``, which says what it returns."""

    reference: tuple[ArrayLike, ...] | Reference | TopKLabels | None
    kl_temperature: ArrayLike | None
    beta: ArrayLike | None
    bias: ArrayLike | None
    vocab_axis: int
    num_classes: int | None
    ignore_index: int | None
    temperature: ArrayLike | None
    logit_softcap: float | None
    sample_weight: ArrayLike | None
    where: ArrayLike | None
    reduction: Reduction
    empty_mean: float | None
    vocab_axis_name: AxisName | None
    token_axis_name: AxisName | PartitionSpec | None
    kernel_spec: PartitionSpec | None
    mesh: Mesh | AbstractMesh | None
    chunk_size: int | None
    precision: lax.PrecisionLike
    dtype: DTypeLike | None


@overload
def linear_stats_loss(
    loss_fn: Callable[..., PyTree],
    hidden: ArrayLike,
    kernel: KernelLike,
    labels: ArrayLike | TopKLabels,
    *per_token: ArrayLike,
    has_aux: Literal[False] = False,
    **options: Unpack[StatsLossOptions],
) -> Array: ...
@overload
def linear_stats_loss(
    loss_fn: Callable[..., PyTree],
    hidden: ArrayLike,
    kernel: KernelLike,
    labels: ArrayLike | TopKLabels,
    *per_token: ArrayLike,
    has_aux: Literal[True],
    **options: Unpack[StatsLossOptions],
) -> tuple[Array, PyTree]: ...
@overload
def linear_stats_loss(
    loss_fn: Callable[..., PyTree],
    hidden: ArrayLike,
    kernel: KernelLike,
    labels: ArrayLike | TopKLabels,
    *per_token: ArrayLike,
    has_aux: bool,
    **options: Unpack[StatsLossOptions],
) -> Array | tuple[Array, PyTree]: ...
def linear_stats_loss(
    loss_fn: Callable[..., PyTree],
    hidden: ArrayLike,
    kernel: KernelLike,
    labels: ArrayLike | TopKLabels,
    *per_token: ArrayLike,
    reference: tuple[ArrayLike, ...] | Reference | TopKLabels | None = None,
    kl_temperature: ArrayLike | None = None,
    beta: ArrayLike | None = 0.5,
    has_aux: bool = False,
    bias: ArrayLike | None = None,
    vocab_axis: int = -1,
    num_classes: int | None = None,
    ignore_index: int | None = -100,
    temperature: ArrayLike | None = 1.0,
    logit_softcap: float | None = None,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
    empty_mean: float | None = None,
    vocab_axis_name: AxisName | None = None,
    token_axis_name: AxisName | PartitionSpec | None = None,
    kernel_spec: PartitionSpec | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    chunk_size: int | None = None,
    precision: lax.PrecisionLike = None,
    dtype: DTypeLike | None = None,
) -> Array | tuple[Array, PyTree]:
    r"""Any loss of each token's statistics, a chunk of the logits at a time.

    .. math:: l_n = \text{loss\_fn}(\mathrm{stats}_n, t_n), \qquad
              \mathrm{mean} = \sum_n s_n l_n \Big/ \sum_n s_n

    with the statistics that :func:`linear_token_stats` gives of ``hidden @ kernel + bias``: losses
    of reinforcement learning and of distillation, in the products of one cross-entropy.

    Args:
      loss_fn: ``loss_fn(stats, *per_token[n, ...]) -> [n]``, of any n tokens at a time, each alone;
        ``stats`` is their :class:`TokenStats`. With a reference ``loss_fn(stats, reference_stats,
        *per_token)``, with its :class:`ReferenceStats`. It may close over arrays as in
        :func:`linear_loss`.
      hidden, kernel, labels: as in :func:`linear_token_stats`.
      per_token: arrays ``[..., *rest]`` with hidden's leading shape: advantages, the sampler's
        log-probabilities.
      reference: a model to compare with, without a gradient: ``(hidden, kernel)`` or ``(hidden,
        kernel, bias)`` with the ``vocab_axis`` and ``logit_softcap`` given here, or a
        :class:`Reference` with its own. Columns past ``num_classes`` are padding on both sides. Or
        :class:`TopKLabels` with ``rest="bucket"``, stored probabilities at ``kl_temperature``: its
        entropy and the divergences are of k + 1 classes, all others being one, and it has no
        product; its ``log_prob`` is NaN. Where they sum to 1, as float32 has it of a teacher that
        is sure, nothing is left for the others: ``reverse_kl`` is inf, unless they are scaled by
        ``1 - 2**-20``, say.
      kl_temperature: divides the logits of the divergences and of the reference's entropy, on both
        sides: a number, a scalar array or one entry a token; None: ``temperature``. Nothing is
        multiplied by its square.
      beta: of ``jensen_shannon``, in (0, 1): a number or a scalar array, as in
        :func:`kl_divergence`.
      has_aux: ``loss_fn`` returns ``(loss, aux)``, and so does the call, as in :func:`linear_loss`.
      bias, vocab_axis, num_classes, ignore_index, temperature, logit_softcap, where: as in
        :func:`linear_token_stats`.
      sample_weight, reduction, empty_mean, chunk_size, precision: as in :func:`linear_loss`.
      vocab_axis_name, token_axis_name, kernel_spec, mesh, dtype: as in
        :func:`linear_cross_entropy`; the reference's products compute in ``dtype`` too.

    Returns:
      A scalar, or ``[...]`` for ``"none"``, in the dtype of the logits; with ``has_aux`` a pair.
      A token that does not count (its label is ignored, it is masked, or weighed by 0) has loss 0
      and gradient 0, whatever ``per_token`` holds there: ``loss_fn`` never sees it.

    Raises:
      TypeError, ValueError: as :func:`linear_token_stats` and :func:`linear_loss`; or ``reference``
        does not fit the model.

    Differentiable in ``hidden``, ``kernel``, ``bias``, floating ``per_token``, ``sample_weight``,
    the temperatures, ``beta`` and what ``loss_fn`` closes over, in every mode that ``loss_fn`` is.
    ``log_prob`` and ``entropy`` of the reference are constants, in the temperatures too.
    Through ``log_prob``, ``logsumexp``, ``entropy``, ``sum_sq_probs`` and the divergences gradients
    reach the model; ``prediction``, ``confidence``, ``rank`` and all of the reference have none.

    A scalar loss takes its gradients along in the forward pass: three products in all, and one more
    with a reference; one, or two, where nothing is differentiated. ``reduction="none"`` computes
    each chunk's logits again in the backward pass. A loss of whole sequences (DPO) is one of
    :func:`linear_token_stats`.

    Call it under ``jit``: outside of it, every call traces ``loss_fn`` and compiles its loops anew.

    Example: GRPO's clipped objective with a penalty for the distance to a reference.

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
      >>> hidden, kernel, answer = normal(0, 2, 6, 4), normal(1, 4, 10), jnp.full((2, 6), 3)
      >>> before = jaxloss.linear_token_stats(hidden + 0.1, kernel, answer).log_prob
      >>> advantage = jnp.array([[1.0], [-1.0]]) * jnp.ones((2, 6))
      >>> def grpo(stats, reference, before, advantage):
      ...     ratio = jnp.exp(stats.log_prob - before)
      ...     clipped = jnp.clip(ratio, 0.8, 1.2)
      ...     gain = jnp.minimum(ratio * advantage, clipped * advantage)
      ...     return 0.04 * reference.reverse_kl - gain, ratio != clipped
      >>> loss, is_clipped = jaxloss.linear_stats_loss(
      ...     grpo, hidden, kernel, answer, before, advantage,
      ...     reference=(hidden + 0.2, kernel), has_aux=True)
      >>> loss.shape, is_clipped.shape, is_clipped.dtype
      ((), (2, 6), dtype('bool'))

    Source: the engine of :func:`linear_cross_entropy`; the objective of the example from Z. Shao et
    al., "DeepSeekMath" (2024), with the exact divergence in place of its estimate.
    """
    call = "linear_stats_loss"
    if not callable(loss_fn):
        messages.fail(call, "loss_fn must be a function", type(loss_fn).__name__, kind=TypeError)
    given = stats_loss.prepared(
        call,
        product_of(call, hidden, kernel, bias, vocab_axis, dtype=dtype, precision=precision),
        labels,
        per_token,
        reference,
        dtype=dtype,
        kl_temperature=kl_temperature,
        beta=beta,
        num_classes=num_classes,
        ignore_index=ignore_index,
        temperature=temperature,
        logit_softcap=logit_softcap,
        sample_weight=sample_weight,
        where=where,
        reduction=reduction,
        empty_mean=empty_mean,
        vocab_axis_name=vocab_axis_name,
        token_axis_name=token_axis_name,
        kernel_spec=kernel_spec,
        over=mesh,
        chunk_size=chunk_size,
    )
    lead, wide = given.lead, given.wide
    rests = [(x.shape[len(lead) :], x.dtype) for x in given.own]

    def types_of(n):
        own = (jax.ShapeDtypeStruct((n, *rest), dtype) for rest, dtype in rests)
        return *stats_loss.types_of(n, wide, given.compares), *own

    own = OwnLoss(loss_fn, messages.flag(call, "has_aux", has_aux), types_of)
    outer = closed_over(call, own, given.sweep.chunk)

    def of_device(products, arrays, own_arrays, numbers, values):
        operands, args_of, weights = stats_loss.operands_of(
            products, arrays, own_arrays, numbers, given.options
        )
        options = given.options, wide, outer, values
        return reduced(own, args_of, given.sweep, operands, weights, *options)

    found = given.layout
    layout.warn_if_shared(call, given.products[0], given.sweep.chunk, found)
    if found is None:
        return of_device(*given.of_device, outer)
    refuse_types_of_a_mesh(call, outer)
    arrays_of_mesh, specs = stats_loss.of_mesh(given)
    of_rows = P(*found.tokens)
    out = of_rows if reduction == "none" else P()
    out = (out, of_rows) if own.has_aux else out

    @jax.jit
    def over_mesh(*given):
        return layout.run(of_device, found, given, (*specs, P()), out)

    return over_mesh(*arrays_of_mesh, outer)
