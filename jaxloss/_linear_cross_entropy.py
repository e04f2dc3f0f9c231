"""linear_cross_entropy: the loss of ``hidden @ kernel``, a part of the logits at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jaxloss._checks import arguments, axis_names, messages
from jaxloss._linear import layout, plan, stats_loss
from jaxloss._linear.cross_entropy import by_token_chunks, by_vocab_blocks
from jaxloss._linear.operands import product_of
from jaxloss._linear.product import Product, Sweep
from jaxloss._types import (
    AxisName,
    Implementation,
    KernelLike,
    Reduction,
    Reference,
    ReferenceStats,
    TokenStats,
    TopKLabels,
)
from jaxloss._xla import device, mesh


class LinearOptions(TypedDict, total=False):
    """Of :func:`linear_cross_entropy`, but for ``return_stats``, which says what it returns."""

    bias: ArrayLike | None
    vocab_axis: int
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
    token_axis_name: AxisName | PartitionSpec | None
    kernel_spec: PartitionSpec | None
    mesh: Mesh | AbstractMesh | None
    chunk_size: int | None
    precision: lax.PrecisionLike
    dtype: DTypeLike | None
    implementation: Implementation | None


@overload
def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: KernelLike,
    labels: ArrayLike | TopKLabels,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> Array: ...
@overload
def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: KernelLike,
    labels: ArrayLike | TopKLabels,
    *,
    return_stats: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Array, TokenStats]: ...
@overload
def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: KernelLike,
    labels: ArrayLike | TopKLabels,
    *,
    return_stats: bool,
    **options: Unpack[LinearOptions],
) -> Array | tuple[Array, TokenStats]: ...
def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: KernelLike,
    labels: ArrayLike | TopKLabels,
    *,
    bias: ArrayLike | None = None,
    vocab_axis: int = -1,
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
    token_axis_name: AxisName | PartitionSpec | None = None,
    kernel_spec: PartitionSpec | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    return_stats: bool = False,
    chunk_size: int | None = None,
    precision: lax.PrecisionLike = None,
    dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Array | tuple[Array, TokenStats]:
    r"""``cross_entropy(hidden @ kernel + bias, labels, ...)``, a chunk of the logits at a time.

    .. math:: l_n = \log \sum_c e^{h_n \cdot k_c + b_c} - (h_n \cdot k_{y_n} + b_{y_n})

    with the options of :func:`cross_entropy`, and its numerics.

    Args:
      hidden: ``[..., D]``, a floating dtype of 16 bits or more; N tokens in all.
      kernel: ``[D, V]``, or with ``vocab_axis=0`` ``[V, D]``: a tied embedding table as it is. The
        dtype of ``hidden``, unless ``dtype`` is given: the products take it, and accumulate in
        float32. Or a :class:`LowRankKernel`, or a :class:`QuantizedKernel`. ``[K, D, V]`` are K
        heads (``vocab_axis`` -1 or -2) of ``hidden[..., K, D]``, or of ``hidden[..., 1, D]`` that
        all of them read: the losses and all that has an entry a token are ``[..., K]``, ``bias`` is
        ``[K, V]``, and ``kernel_spec`` speaks of one head's kernel. Heads run one after another, in
        the memory of one head's chunk; by ``"token_chunks"`` or ``"stored_exponentials"``.
      labels: class indices ``[...]``, class probabilities ``[..., C]``, or :class:`TopKLabels`.
      bias: ``[V]``.
      vocab_axis: the axis of ``kernel`` that holds the V columns.
      num_classes: C, by default V. Columns at and past it are padding and never enter the sum;
        ``weight``, ``where`` and probabilities have C classes. The gradient of ``hidden`` is a
        product with 0 there, so padding wants finite numbers.
      weight, ignore_index, label_smoothing, z_loss, temperature, logit_softcap, sample_weight,
        where, reduction, empty_mean, return_stats: as in :func:`cross_entropy`; a temperature that
        is an array needs ``"token_chunks"``.
      vocab_axis_name, token_axis_name: the mesh axis, or axes, that split the columns of ``kernel``
        and ``bias``, and the tokens. Inside of ``shard_map`` as in :func:`cross_entropy`, outside
        of it as below. There ``token_axis_name`` splits the first axis of ``hidden``, or is a
        ``PartitionSpec`` of ``hidden``: ``P("data", "context")`` for ``[B, L, D]``.
      kernel_spec: outside of ``shard_map``, the ``PartitionSpec`` of ``kernel`` and its gradient:
        ``P("data", "tensor")`` where the axis that splits the tokens splits D too.
      mesh: where those axes are; None: the mesh of ``jax.set_mesh``, or of ``with mesh:``.
      chunk_size: tokens whose logits are held at a time; with ``"vocab_blocks"`` and the kernels
        classes. None takes what a budget of bytes allows, by the backend and by what the options
        hold: ``benchmarks/guides/language-models.md`` has the sizes.
      precision: of the products, as in :func:`jax.lax.dot_general`.
      dtype: what the products compute in, as Flax has it: operands of any floating dtypes are cast
        to it, the logits and all sums are float32, and so is what a gradient is made of before it
        gets its operand's dtype. None: that of the operands, which then must have one. Token chunks
        hold a cast copy of the kernel, vocabulary blocks one of a block.
      implementation: ``"token_chunks"``; ``"vocab_blocks"``, which holds least and takes a product
        more; ``"stored_exponentials"``, which makes fewer passes over a chunk; or vocabulary blocks
        by a kernel, ``"mosaic_tpu"`` on a TPU after v4 and ``"mosaic_gpu"`` on a Hopper GPU. None
        takes token chunks, and a kernel where ``chunk_size`` is None too and the kernel has a form
        of the call: ``benchmarks/guides/accelerators.md``.

    Returns:
      The loss, or ``(loss, TokenStats)``, as :func:`cross_entropy`. Gradients have their inputs'
      dtypes.

    Raises:
      TypeError: as :func:`cross_entropy`; or the operands differ in dtype and ``dtype`` is None.
      ValueError: as :func:`cross_entropy`; or ``hidden``, ``kernel``, ``bias``, ``num_classes`` do
        not fit together, or ``chunk_size`` is less than 1, or ``implementation`` cannot take the
        call, or operands of an explicit mesh are sharded in a way that is not described below.

    A scalar loss takes its gradients along in the forward pass: three matrix products in all (one
    where nothing is differentiated, two where only ``hidden`` or only ``kernel`` is), and holds one
    chunk of logits beside a float32 accumulator of the kernel's gradient. Tokens that fit into one
    chunk need no accumulator, and have all their logits held: N C float32 numbers.
    ``reduction="none"`` computes each chunk's logits again in the backward pass. Tokens that do not
    count are not computed: with 75 % of the labels ignored, a quarter of the chunks run.

    ``"vocab_blocks"`` takes four products whatever the reduction, and computes every token, but
    holds one block of logits beside a float32 gradient of ``hidden``, however few tokens there are.

    ``"stored_exponentials"`` keeps ``exp(z - z_y)`` of a chunk of tokens, in the dtype of the
    products, in place of its logits and of their gradient. The logit of the label is computed
    before the others, so that no pass looks for a maximum, and the label's part of a gradient is
    not rounded to that dtype (it is on a TPU, on a GPU where one chunk is all tokens, and of a
    kernel that is no array). It takes as many products as token chunks, and one more for a chunk in
    which a label lies some 44 nats below the others together. It takes class indices, but no
    float16 operands, no temperature that is an array, no ``return_stats`` with
    ``reduction="none"``, and no ``label_smoothing`` with ``where`` over classes or a soft cap.

    A scalar loss keeps its gradients for the backward pass. Where a ``scan`` over the loss is
    differentiated from outside, that is a float32 gradient of the kernel for each step. Take the
    gradient inside of the step and add it up, or let the step keep none: by ``jax.checkpoint`` of
    the step, by ``reduction="none"``, whose mean is taken by hand, or by ``"vocab_blocks"``.

    Differentiable in ``hidden``, ``kernel``, ``bias``, probabilities and weights, in every mode.

    Under ``vmap`` each member of the batch has chunks, and a gradient of the kernel, of its own:
    ``hidden[..., D]`` with more leading axes does the same in the memory of one.

    On an explicit mesh (``jax.sharding.AxisType.Explicit``) call it directly on sharded operands:
    the mesh axes are read from their types. Those that split the leading axes of ``hidden`` split
    the tokens, and each device loops over its own; others that split the columns of ``kernel``
    split the vocabulary, which is never gathered; a kernel that the tokens' axes split too (FSDP,
    either dimension) is gathered once, and its gradient reduce-scattered once.

    On a mesh of automatic axes no type says what is split. Name the axes: then the call does what
    it does on an explicit mesh, and axes that are not named stay with XLA's partitioner. Without
    names each device computes its own tokens where the mesh splits the first axis of ``hidden``, or
    an axis of a usual name splits the sequence; otherwise devices compute the tokens of others too,
    and a warning says so where the call can know it. ``benchmarks/guides/meshes.md`` has each case.

    Example:

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> hidden = jax.random.normal(jax.random.key(0), (6, 4))
      >>> kernel = jax.random.normal(jax.random.key(1), (4, 10))
      >>> labels = jnp.array([1, 2, -100, 4, 5, -100])
      >>> fused = jaxloss.linear_cross_entropy(hidden, kernel, labels, chunk_size=2)
      >>> bool(jnp.allclose(fused, jaxloss.cross_entropy(hidden @ kernel, labels)))
      True

    Source: the gradient in the forward pass as in Liger Kernel (P.-L. Hsu et al., 2024); packing
    the tokens that count as in E. Wijmans et al., "Cut Your Losses in Large-Vocabulary Language
    Models" (ICLR 2025).
    """
    call = "linear_cross_entropy"
    return _losses(
        call,
        product_of(call, hidden, kernel, bias, vocab_axis, dtype=dtype, precision=precision),
        labels,
        vocab_axis_name=vocab_axis_name,
        token_axis_name=token_axis_name,
        kernel_spec=kernel_spec,
        over=mesh,
        chunk_size=chunk_size,
        implementation=implementation,
        numbers={
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "logit_softcap": logit_softcap,
            "temperature": temperature,
        },
        num_classes=num_classes,
        weight=weight,
        ignore_index=ignore_index,
        sample_weight=sample_weight,
        where=where,
        reduction=reduction,
        empty_mean=empty_mean,
        return_stats=return_stats,
    )


class LinearTokenStatsOptions(TypedDict, total=False):
    """Of :func:`linear_token_stats`, but for ``reference``, which says what it returns."""

    bias: ArrayLike | None
    vocab_axis: int
    num_classes: int | None
    ignore_index: int | None
    temperature: ArrayLike | None
    logit_softcap: float | None
    where: ArrayLike | None
    kl_temperature: ArrayLike | None
    beta: ArrayLike | None
    vocab_axis_name: AxisName | None
    token_axis_name: AxisName | PartitionSpec | None
    kernel_spec: PartitionSpec | None
    mesh: Mesh | AbstractMesh | None
    chunk_size: int | None
    precision: lax.PrecisionLike
    dtype: DTypeLike | None
    implementation: Implementation | None


@overload
def linear_token_stats(
    hidden: ArrayLike,
    kernel: KernelLike,
    labels: ArrayLike | TopKLabels,
    *,
    reference: None = None,
    **options: Unpack[LinearTokenStatsOptions],
) -> TokenStats: ...
@overload
def linear_token_stats(
    hidden: ArrayLike,
    kernel: KernelLike,
    labels: ArrayLike | TopKLabels,
    *,
    reference: tuple[ArrayLike, ...] | Reference | TopKLabels,
    **options: Unpack[LinearTokenStatsOptions],
) -> tuple[TokenStats, ReferenceStats]: ...
def linear_token_stats(
    hidden: ArrayLike,
    kernel: KernelLike,
    labels: ArrayLike | TopKLabels,
    *,
    bias: ArrayLike | None = None,
    vocab_axis: int = -1,
    num_classes: int | None = None,
    ignore_index: int | None = -100,
    temperature: ArrayLike | None = 1.0,
    logit_softcap: float | None = None,
    where: ArrayLike | None = None,
    reference: tuple[ArrayLike, ...] | Reference | TopKLabels | None = None,
    kl_temperature: ArrayLike | None = None,
    beta: ArrayLike | None = 0.5,
    vocab_axis_name: AxisName | None = None,
    token_axis_name: AxisName | PartitionSpec | None = None,
    kernel_spec: PartitionSpec | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    chunk_size: int | None = None,
    precision: lax.PrecisionLike = None,
    dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> TokenStats | tuple[TokenStats, ReferenceStats]:
    r"""``token_stats(hidden @ kernel + bias, labels, ...)``, a chunk of the logits at a time.

    .. math:: \log p_y = z_y - \mathrm{lse}(z), \qquad z = (h K + b) / T

    Args:
      hidden: ``[..., D]``, a floating dtype.
      kernel: ``[D, V]``, or ``[V, D]`` with ``vocab_axis=0``; the dtype of ``hidden``.
      labels, bias, vocab_axis, num_classes, ignore_index, logit_softcap, where, vocab_axis_name,
        token_axis_name, kernel_spec, mesh, chunk_size, precision, dtype, implementation: as in
        :func:`linear_cross_entropy`.
      temperature: as in :func:`cross_entropy`; an array needs ``"token_chunks"``.
      reference, kl_temperature, beta: a model to compare with, as in :func:`linear_stats_loss`.

    Returns:
      :class:`TokenStats`, or with a reference ``(TokenStats, ReferenceStats)``, each shaped as
      ``hidden`` without its last axis.

    Raises:
      TypeError, ValueError: as :func:`linear_cross_entropy`; or ``temperature`` is not positive.

    One matrix product, and four where ``hidden`` and ``kernel`` are differentiated too: the
    backward pass computes each chunk's logits again, as with ``reduction="none"``. Tokens that fit
    into one chunk have all their logits held; with ``implementation="vocab_blocks"`` a block of
    them is. There ``rank`` takes a product more; under ``jit`` it is not computed where it is
    not used. Tokens whose label is ignored (the prompt) are not computed. Differentiable as
    :func:`linear_cross_entropy`; sharded operands too are as there.

    Example: log-probabilities of an answer, the prompt being ignored.

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> hidden = jax.random.normal(jax.random.key(0), (2, 6, 4))
      >>> kernel = jax.random.normal(jax.random.key(1), (4, 10))
      >>> answer = jnp.array([[-100, -100, 1, 2, 3, 4], [-100, 5, 6, -100, -100, -100]])
      >>> stats = jaxloss.linear_token_stats(hidden, kernel, answer)
      >>> of_sequence = stats.log_prob.sum(axis=-1)  # ignored tokens are 0
      >>> whole = jaxloss.cross_entropy(hidden @ kernel, answer, reduction="sum")
      >>> bool(jnp.allclose(-of_sequence.sum(), whole))
      True

    Source: as :func:`token_stats` and :func:`linear_cross_entropy`.
    """
    call = "linear_token_stats"
    if reference is not None:
        messages.word(call, "implementation", implementation or "token_chunks", ("token_chunks",))
        given = stats_loss.prepared(
            call,
            product_of(call, hidden, kernel, bias, vocab_axis, dtype=dtype, precision=precision),
            labels,
            (),
            reference,
            dtype=dtype,
            kl_temperature=kl_temperature,
            beta=beta,
            num_classes=num_classes,
            ignore_index=ignore_index,
            temperature=temperature,
            logit_softcap=logit_softcap,
            where=where,
            reduction="none",
            vocab_axis_name=vocab_axis_name,
            token_axis_name=token_axis_name,
            kernel_spec=kernel_spec,
            over=mesh,
            chunk_size=chunk_size,
        )
        return stats_loss.token_stats(call, given)
    if kl_temperature is not None:
        messages.fail(call, "kl_temperature is for a reference", "none", "Leave it out.")
    return _losses(
        call,
        product_of(call, hidden, kernel, bias, vocab_axis, dtype=dtype, precision=precision),
        labels,
        vocab_axis_name=vocab_axis_name,
        token_axis_name=token_axis_name,
        kernel_spec=kernel_spec,
        over=mesh,
        chunk_size=chunk_size,
        implementation=implementation,
        numbers={"logit_softcap": logit_softcap, "temperature": temperature},
        num_classes=num_classes,
        ignore_index=ignore_index,
        where=where,
        reduction="none",
        return_stats=True,
    )[1]


def _losses(
    call: str,
    product: Product,
    labels: Any,
    *,
    vocab_axis_name: Any,
    token_axis_name: Any,
    kernel_spec: Any,
    over: Any,
    chunk_size: Any,
    implementation: Any,
    numbers: dict[str, Any],
    num_classes: Any,
    **of_tokens: Any,
) -> Any:
    """The losses of the public function ``call``, from its arguments as they were given.

    ``numbers`` and ``of_tokens`` are what ``scalars`` and
    ``token_loss`` of the checks take.
    """
    hidden, columns = product.hidden, product.columns
    names = axis_names.checked(
        call,
        hidden.ndim,
        token_axis_name=token_axis_name,
        vocab_axis_name=vocab_axis_name,
        kernel_spec=kernel_spec,
        over=over,
    )
    vocab_axes, token_axes = names.vocab_axes, names.token_axes
    if vocab_axes:
        local = columns  # padding is masked: which device holds it is not static
    else:
        local = messages.integer(call, "num_classes", num_classes, 0, columns, default=columns)
    arrays, options = arguments.token_loss(
        call,
        "hidden @ kernel",
        jax.ShapeDtypeStruct((*product.lead, local), product.narrow),
        labels,
        axis=-1,
        num_classes=num_classes,
        vocab_axes=vocab_axes,
        token_axes=token_axes,
        temperature=numbers["temperature"],
        **of_tokens,
    )
    scalars = arguments.scalars(call, product.wide, **numbers)
    arguments.check_bucket(call, arrays, scalars)
    tokens = {"hidden": hidden, **arguments.of_tokens(arrays)}
    axis_names.check_split(
        call, "kernel", product.kernel, tokens, vocab_axes=vocab_axes, token_axes=token_axes
    )
    product = replace(product, num_classes=local)
    found = layout.of_call(call, names, [product], arrays)
    tokens, shards = product.tokens, mesh.size(vocab_axes)
    if found is not None:
        tokens //= found.devices(found.token_axes)
        shards *= found.devices(found.vocab_axes)
        columns = local = found.columns(product)
        product = replace(product, num_classes=local)
        # Inside of shard_map over other axes: what those split, the layout's axes split further.
        summed = (*token_axes, *found.token_axes) if options.reduction != "none" else ()
        options = options._replace(vocab_axes=(*vocab_axes, *found.vocab_axes), token_axes=summed)
    size = plan.ProblemSize(
        tokens, hidden.shape[-1], columns, local, options.num_classes != local * shards
    )
    whole = device.is_whole() if found is None else found.whole
    chosen = plan.choose(
        call,
        implementation,
        chunk_size,
        size,
        product,
        arrays,
        options,
        scalars,
        whole=whole,
    )
    compute = by_token_chunks if chosen.by_tokens else by_vocab_blocks
    sweep = Sweep(chosen.chunk, options.vocab_axes, options.token_axes)
    static: dict[str, Any] = {"sweep": sweep, "fused": chosen.fused}
    if chosen.stored:
        static["stored"] = True
    warn = layout.warn_if_shared if chosen.by_tokens else layout.warn_of_blocks
    warn(call, product, chosen.chunk, found)
    if found is None:
        return compute(product, arrays, scalars, options=options, **static)
    given = (product,), arrays, scalars
    own = {"schedule": compute, "layout": found, "options": options}
    return layout.over_mesh(*given, **own, static=tuple(static.items()))
