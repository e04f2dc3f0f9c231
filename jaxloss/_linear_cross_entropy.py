"""linear_cross_entropy: the loss of ``hidden @ kernel``, a part of the logits at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jaxloss._checks import arguments, messages
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
      chunk_size: tokens whose logits are held at a time. None takes what 1 GiB of float32 logits
        allow, up to 1024 tokens on a TPU and 4096 on a GPU, and on a GPU all tokens, where they are
        at most 2 D / 3 more than that: their logits take no more than the accumulator that one
        chunk does without. On a CPU what 256 MiB allow, up to 512 tokens, or 1024 where their
        logits take 64 MiB. Without a gradient of ``kernel``, halves of it that fit 1 GiB, without
        any 256 MiB. Options of which a token holds more than its logits and their gradient (class
        probabilities, ``weight`` with smoothing, :class:`TopKLabels`, statistics beside ``where``)
        take as many fewer tokens; no fewer than 512 on a TPU, 256 on a GPU. With the other
        implementations classes; None takes 8 MiB on a CPU, 32 MiB on a TPU, 64 MiB on a GPU, and at
        least 128 classes, 1024 on a TPU.
      precision: of the products, as in :func:`jax.lax.dot_general`.
      dtype: what the products compute in, as Flax has it: operands of any floating dtypes are cast
        to it, the logits and all sums are float32, and so is what a gradient is made of before it
        gets its operand's dtype. None: that of the operands, which then must have one. Token chunks
        hold a cast copy of the kernel, vocabulary blocks one of a block.
      implementation: ``"token_chunks"``, or for least memory ``"vocab_blocks"``, or
        ``"stored_exponentials"`` (see below), or vocabulary
        blocks whose log-sum-exp a kernel computes: ``"mosaic_tpu"`` on a TPU after v4, where a
        second one computes the logits' gradient (unless ``bias`` has one), ``"mosaic_gpu"`` on a
        Hopper GPU (an H100, an H200). A kernel takes bfloat16 operands and class indices, no
        smoothing, soft cap, statistics or ``where`` over classes. What it has no tiles for goes as
        with ``"vocab_blocks"``: padded columns that a mesh splits, on a TPU rows of some 30000
        features and more, on a GPU features or columns that are no multiple of 64, fewer than 192
        features, and little to do (N D V < 2^33). None takes token chunks, but vocabulary blocks
        where fewer than 16 tokens would fit into the budget (not for ``rest="bucket"`` of
        :class:`TopKLabels`, which chunks alone can take); and a kernel that has a form of the call,
        where ``chunk_size`` is None and no partitioner may split the arrays (on several devices,
        outside of ``shard_map``, unless types or names say how all axes of the mesh split them): on
        a TPU ``"mosaic_tpu"``, on a GPU the kernel in place of the chunks where nothing is
        differentiated.

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
    chunk of logits beside a float32 accumulator of the kernel's gradient, or of all tokens none.
    Those of float16 operands wait in float32 for the cotangent, which may be a loss scale.
    ``reduction="none"`` computes each chunk's logits again in the backward pass. Tokens that do not
    count are not computed: with 75 % of the labels ignored, a quarter of the chunks run. Vocabulary
    blocks take four products whatever the reduction, but hold one block of logits beside a float32
    gradient of ``hidden`` and no accumulator for the kernel's. They compute every token; with a
    kernel its product takes those that count, the others a quarter of all tokens, a half or all.

    ``"stored_exponentials"`` keeps ``exp(z - z_y)`` of a chunk of tokens, in the dtype of the
    products, in place of its logits and of their gradient. The logit of the label is computed
    before the others, so that no pass looks for a maximum, and the label's part of a gradient is
    not rounded to that dtype (it is on a TPU, and on a GPU where one chunk is all tokens). It takes
    three products, and one more for a chunk in which a label lies some 44 nats below the others
    together. It takes class indices, a sum or mean, an array for a kernel, and none of
    ``label_smoothing``, ``return_stats``, float16 operands and a temperature that is an array. On a
    TPU after v4 and on a Hopper GPU a kernel stores the exponentials, of bfloat16 operands without
    ``where`` over classes, soft cap and temperature. Then ``chunk_size=None`` takes, of 2 bytes a
    logit, up to 2048 tokens and 512 MiB on a TPU; on a GPU up to 8192 tokens and 1 GiB, and all
    tokens, where they are at most 2 D more than that.

    So tokens that fit into one chunk have all their logits held by default, as
    :func:`cross_entropy` of the product has them: N C float32 numbers. ``"vocab_blocks"`` as
    ``implementation`` holds a block however few tokens there are.

    A scalar loss keeps its gradients for the backward pass. Where a ``scan`` over the loss is
    differentiated from outside, that is a float32 gradient of the kernel for each step: 8 MiB a
    step for 256 features and 8192 classes. Take the gradient inside of the step and add it up, or
    let the step keep none: by ``jax.checkpoint`` of the step, by ``reduction="none"``, whose mean
    is taken by hand, or by ``"vocab_blocks"``.

    Differentiable in ``hidden``, ``kernel``, ``bias``, probabilities and weights, in every mode.

    Under ``vmap`` each member of the batch has chunks, and a gradient of the kernel, of its own:
    ``hidden[..., D]`` with more leading axes does the same in the memory of one.

    On an explicit mesh (``jax.sharding.AxisType.Explicit``) call it directly on sharded operands:
    the mesh axes are read from their types. Those that split the leading axes of ``hidden`` split
    the tokens, and each device loops over its own; others that split the columns of ``kernel``
    split the vocabulary, which is never gathered; a kernel that the tokens' axes split too (FSDP,
    either dimension) is gathered once, and its gradient reduce-scattered once. Sums over
    devices are taken once, of float32 (of the kernel's own dtype with ``"vocab_blocks"``, and where
    XLA narrows before it sums, as its TPU compiler does). Other arguments are resharded to fit; a
    ``hidden`` that is the same on all devices is split as ``labels`` are, or else as
    ``sample_weight`` is, or over what splits the kernel's features.

    On a mesh of automatic axes XLA's partitioner splits the work, and no type says how. Name the
    axes: then the call does what it does on an explicit mesh, whatever the operands are split over
    before (they are resharded to fit), and axes that are not named stay with the partitioner.
    Without names, and where the mesh splits the first axis of ``hidden``, each device computes its
    own tokens, if the number of tokens and ``chunk_size`` are multiples of the number of devices.
    Where it splits the second axis (the sequence), the same holds if that is known: of an array
    that is not traced, or of a mesh with an axis of the name ``context``, ``cp``, ``seq``,
    ``sequence`` or ``sp``, which the types of a program's arguments name, or the context
    (``jax.set_mesh``); ``chunk_size`` still counts the tokens of all devices. Otherwise devices
    compute the tokens of others too, and with ``"vocab_blocks"`` the columns of others, where
    columns are split.

    Inside of ``shard_map`` over some of the axes of an explicit mesh both hold: the names say what
    those axes split, the types what the others do. The backward pass then computes the forward
    pass again, a product more.

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
    names = arguments.axis_names(
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
    arguments.check_split(
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
