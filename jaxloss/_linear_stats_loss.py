"""linear_stats_loss: any loss of each token's statistics, and of a reference's beside them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jaxloss._checks import arguments, messages
from jaxloss._linear import budget, layout, stats_loss
from jaxloss._linear.own_loss import OwnLoss, closed_over, reduced
from jaxloss._linear.product import Product, Sweep
from jaxloss._types import AxisName, PyTree, Reduction, Reference, Scalars, TokenArrays, TopKLabels
from jaxloss._xla.dtypes import accumulator_dtype
from jaxloss._xla.mesh import size as axis_size


class StatsLossOptions(TypedDict, total=False):
    """Of :func:`linear_stats_loss`, but for ``has_aux``, which says what it returns."""

    reference: tuple[ArrayLike, ...] | Reference | None
    kl_temperature: ArrayLike | None
    beta: float
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


@overload
def linear_stats_loss(
    loss_fn: Callable[..., PyTree],
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | TopKLabels,
    *per_token: ArrayLike,
    has_aux: Literal[False] = False,
    **options: Unpack[StatsLossOptions],
) -> Array: ...
@overload
def linear_stats_loss(
    loss_fn: Callable[..., PyTree],
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | TopKLabels,
    *per_token: ArrayLike,
    has_aux: Literal[True],
    **options: Unpack[StatsLossOptions],
) -> tuple[Array, PyTree]: ...
@overload
def linear_stats_loss(
    loss_fn: Callable[..., PyTree],
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | TopKLabels,
    *per_token: ArrayLike,
    has_aux: bool,
    **options: Unpack[StatsLossOptions],
) -> Array | tuple[Array, PyTree]: ...
def linear_stats_loss(
    loss_fn: Callable[..., PyTree],
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | TopKLabels,
    *per_token: ArrayLike,
    reference: tuple[ArrayLike, ...] | Reference | None = None,
    kl_temperature: ArrayLike | None = None,
    beta: float = 0.5,
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
) -> Array | tuple[Array, PyTree]:
    r"""Any loss of each token's statistics, a chunk of the logits at a time.

    .. math:: l_n = \mathrm{loss\_fn}(\mathrm{stats}_n, t_n), \qquad
              \mathrm{mean} = \sum_n s_n l_n \Big/ \sum_n s_n

    with the statistics that :func:`linear_token_stats` gives of ``hidden @ kernel + bias``: losses
    of reinforcement learning and of distillation, in the products of one cross-entropy.

    Args:
      loss_fn: ``loss_fn(stats, *per_token[n, ...]) -> [n]``, of any n tokens at a time, each alone;
        ``stats`` is their :class:`TokenStats`. With a reference ``loss_fn(stats, reference_stats,
        *per_token)``, with its :class:`ReferenceStats`. It may close over arrays.
      hidden, kernel, labels: as in :func:`linear_token_stats`.
      per_token: arrays ``[..., *rest]`` with hidden's leading shape: advantages, the sampler's
        log-probabilities.
      reference: a model to compare with, without a gradient: ``(hidden, kernel)`` or ``(hidden,
        kernel, bias)`` with the ``vocab_axis`` and ``logit_softcap`` given here, or a
        :class:`Reference` with its own. Columns past ``num_classes`` are padding on both sides.
      kl_temperature: divides the logits of the divergences and of the reference's entropy, on both
        sides: a number or a scalar array; None: ``temperature``, which then must not be one a
        token. Nothing is multiplied by its square.
      beta: of ``jensen_shannon``, in (0, 1).
      has_aux: ``loss_fn`` returns ``(loss, aux)``, and so does the call, as in :func:`linear_loss`.
      bias, vocab_axis, num_classes, ignore_index, temperature, logit_softcap, where: as in
        :func:`linear_token_stats`.
      sample_weight, reduction, empty_mean, chunk_size, precision: as in :func:`linear_loss`.
      vocab_axis_name, token_axis_name, kernel_spec, mesh: as in :func:`linear_cross_entropy`.

    Returns:
      A scalar, or ``[...]`` for ``"none"``, in the dtype of the logits; with ``has_aux`` a pair.
      A token that does not count (its label is ignored, it is masked, or weighed by 0) has loss 0
      and gradient 0, whatever ``per_token`` holds there: ``loss_fn`` never sees it.

    Raises:
      TypeError, ValueError: as :func:`linear_token_stats` and :func:`linear_loss`; or ``reference``
        does not fit the model.

    Differentiable in ``hidden``, ``kernel``, ``bias``, floating ``per_token``, ``sample_weight``,
    the temperatures and what ``loss_fn`` closes over, in every mode that ``loss_fn`` is. Through
    ``log_prob``, ``logsumexp``, ``entropy`` and the divergences gradients reach the model;
    ``prediction``, ``confidence``, ``rank`` and all of the reference have none.

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
    hidden, kernel, bias, vocab_axis = arguments.product_operands(
        call, hidden, kernel, bias, vocab_axis
    )
    lead, wide = hidden.shape[:-1], accumulator_dtype(hidden.dtype)
    names = arguments.axis_names(
        call,
        hidden.ndim,
        token_axis_name=token_axis_name,
        vocab_axis_name=vocab_axis_name,
        kernel_spec=kernel_spec,
        over=mesh,
    )
    vocab_axes, token_axes = names.vocab_axes, names.token_axes
    precision = arguments.precision(call, precision)
    product = Product(hidden, kernel, bias, vocab_axis, kernel.shape[vocab_axis], precision)
    other, its_cap = _reference(call, reference, product, logit_softcap)
    products = [product] if other is None else [product, other]
    few, most_columns = (f(p.columns for p in products) for f in (min, max))
    if num_classes is None and few != most_columns:
        rule = "the kernel and the reference's must have as many columns"
        got = " and ".join(str(p.columns) for p in products)
        way_out = "If one of them is padded, say how many are classes: num_classes=..."
        messages.fail(call, rule, got, way_out)
    # On all devices: which columns are padding is not static where they are split.
    every = few * axis_size(vocab_axes)
    classes = messages.integer(call, "num_classes", num_classes, 0, every, default=every)
    local = few if vocab_axes else classes
    arrays, options = arguments.token_loss(
        call,
        "hidden @ kernel",
        jax.ShapeDtypeStruct((*lead, local), hidden.dtype),
        labels,
        axis=-1,
        num_classes=classes,
        ignore_index=ignore_index,
        where=where,
        reduction=reduction,
        sample_weight=sample_weight,
        empty_mean=empty_mean,
        vocab_axes=vocab_axes,
        token_axes=token_axes,
        return_stats=True,
        temperature=temperature,
    )
    scalars = arguments.scalars(call, wide, logit_softcap=logit_softcap, temperature=temperature)
    arguments.check_bucket(call, arrays, scalars)
    of_reference = _of_reference(call, kl_temperature, its_cap, arrays, scalars, wide, other)
    if not 0 < messages.number(call, "beta", beta) < 1:
        messages.fail(call, "beta must be in (0, 1)", repr(beta))
    own_arrays = arguments.per_token(call, per_token, lead)
    of_tokens = {"hidden": hidden, **arguments.of_tokens(arrays)}
    of_tokens |= {f"per_token[{i}]": x for i, x in enumerate(own_arrays)}
    split = {"vocab_axes": vocab_axes, "token_axes": token_axes}
    arguments.check_split(call, "kernel", kernel, of_tokens, **split)
    if other is not None:
        arguments.check_split(call, "the reference's kernel", other.kernel, of_tokens, **split)
    found = layout.of_call(call, names, products, (arrays, own_arrays))
    tokens = math.prod(lead)
    if found is not None:
        tokens //= found.devices(found.token_axes)
        vocab_axes = (*vocab_axes, *found.vocab_axes)
        token_axes = (*token_axes, *found.token_axes)
        local = found.columns(products[0]) if found.vocab_axes else local
        most_columns = max(found.columns(p) for p in products)
    if vocab_axes and len({p.columns for p in products}) > 1:
        rule = "the kernel and the reference's must have as many columns where devices share them"
        messages.fail(call, rule, f"{few}", "Pad one of them, and say num_classes=...")
    token_axes = token_axes if reduction != "none" else ()
    options = options._replace(vocab_axes=vocab_axes, token_axes=token_axes)
    products = [replace(p, num_classes=local) for p in products]
    rests = [(x.shape[len(lead) :], x.dtype) for x in own_arrays]
    rows = budget.rows_held(
        hidden.dtype,
        none=reduction == "none",
        statistics=True,
        mask=arrays.class_mask is not None,
        scaling=scalars.rescaled or arrays.temperature is not None,
    )
    if other is not None:
        rows += budget.OF_DIVERGENCE["forward"]
    default = budget.default_chunk(budget.size_to_plan_for(tokens), most_columns, rows=rows)
    chunk = arguments.chunk_size(call, chunk_size, default, budget.size_to_plan_for(tokens))
    sweep = Sweep(chunk, vocab_axes, token_axes)

    def types_of(n):
        own = (jax.ShapeDtypeStruct((n, *rest), dtype) for rest, dtype in rests)
        return *stats_loss.types_of(n, wide, other is not None), *own

    own = OwnLoss(loss_fn, messages.flag(call, "has_aux", has_aux), types_of)
    outer = closed_over(call, own, chunk)

    def of_device(products, arrays, own_arrays, numbers, values):
        product, *reference = products
        lead = product.hidden.shape[:-1]
        flat = tuple(x.reshape(math.prod(lead), *x.shape[len(lead) :]) for x in own_arrays)
        reference = reference[0] if reference else None
        operands, args_of, weights = stats_loss.operands_of(
            product, reference, arrays, flat, numbers, options, beta
        )
        return reduced(own, args_of, sweep, operands, weights, options, wide, outer, values)

    given = products, arrays, own_arrays, (scalars, of_reference), outer
    if found is None:
        layout.warn_if_shared(call, tokens, chunk)
        return of_device(*given)
    arrays, of_arrays = layout.of_arrays(arrays, found, products)
    each, of_operands = layout.of_products(products, found)
    of_rows = P(*found.tokens)
    specs = list(of_operands), of_arrays, of_rows, P(), P()
    out = of_rows if reduction == "none" else P()
    out = (out, of_rows) if own.has_aux else out

    @jax.jit
    def over_mesh(*given):
        return layout.run(of_device, found, given, specs, out)

    return over_mesh(list(each), arrays, own_arrays, (scalars, of_reference), outer)


def _reference(
    call: str, given: Any, product: Product, cap: float | None
) -> tuple[Product | None, float | None]:
    """The reference's product, without a gradient, and its soft cap."""
    if given is None:
        return None, None
    if isinstance(given, tuple) and len(given) in (2, 3):
        given = Reference(*given, vocab_axis=product.vocab_axis, logit_softcap=cap)
    elif not isinstance(given, Reference):
        rule = "reference must be (hidden, kernel), (hidden, kernel, bias) or a jaxloss.Reference"
        messages.fail(call, rule, type(given).__name__, kind=TypeError)
    hidden, kernel, bias, vocab_axis = arguments.product_operands(
        call, given.hidden, given.kernel, given.bias, given.vocab_axis, of="reference."
    )
    lead = product.hidden.shape[:-1]
    if hidden.shape[:-1] != lead:
        rule = f"reference.hidden must have hidden's leading shape, {lead}"
        messages.fail(call, rule, messages.describe(hidden))
    cap, _ = arguments.scaling(call, given.logit_softcap, 1.0, hidden.dtype)
    operands = lax.stop_gradient((hidden, kernel, bias))
    return Product(*operands, vocab_axis, kernel.shape[vocab_axis], product.precision), cap


def _of_reference(
    call: str,
    kl_temperature: Any,
    cap: float | None,
    arrays: TokenArrays,
    scalars: Scalars,
    wide: Any,
    other: Product | None,
) -> Scalars:
    """The numbers of the divergences and of the reference's entropy."""
    if kl_temperature is not None and other is None:
        messages.fail(call, "kl_temperature is for a reference", "none", "Leave it out.")
    if kl_temperature is None and other is not None and arrays.temperature is not None:
        rule = "kl_temperature must be given beside a temperature a token"
        messages.fail(call, rule, "None", "Divergences take one number, or a scalar array.")
    if kl_temperature is None:
        return Scalars(softcap=cap, temperature=scalars.temperature)
    name = "kl_temperature"
    kl_temperature = messages.scalar(call, name, kl_temperature, *arguments.DIVISORS, 1.0, wide)
    return Scalars(softcap=cap, temperature=kl_temperature)
