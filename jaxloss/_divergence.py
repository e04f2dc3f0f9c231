"""kl_divergence and linear_kl_divergence: a student compared with its teacher, for distillation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jaxloss._checks import arguments, axis_names, explicit_mesh, messages
from jaxloss._linear import budget, layout, token_chunks, token_rules
from jaxloss._linear.kernels import base_of
from jaxloss._linear.operands import product_of
from jaxloss._linear.product import Product, Sweep
from jaxloss._numerics.divergence import accumulator_of, row_divergences
from jaxloss._tokens.classes import existing, local_classes
from jaxloss._tokens.reduction import TokenWeights, normalised_weights, reduce_losses
from jaxloss._tokens.shapes import classes_last, mask_classes_last, rows_of_mask
from jaxloss._tokens.targets import tokens_with_classes, valid_tokens, without_empty_rows
from jaxloss._types import (
    DIVERGENCES,
    AxisName,
    Divergence,
    KernelLike,
    LossOptions,
    Reduction,
    Scalars,
    TokenArrays,
)
from jaxloss._xla.device import jit
from jaxloss._xla.mesh import size as axis_size


def _kind(call: str, divergence: Any, beta: Any, temperature: Any, dtype) -> tuple:
    """Those of ``row_divergences`` that are static, hashable, and the numbers."""
    messages.word(call, "divergence", divergence, DIVERGENCES)
    temperature = arguments.temperature(call, temperature, dtype)
    beta = arguments.check_beta(call, beta, dtype)
    return (("divergence", divergence),), Scalars(temperature=temperature, beta=beta)


def kl_divergence(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    axis: int | tuple[int, ...] = -1,
    divergence: Divergence = "forward",
    beta: ArrayLike | None = 0.5,
    temperature: ArrayLike | None = 1.0,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
    empty_mean: float | None = None,
) -> Array:
    r"""Divergence of a student's softmax from its teacher's, exact however close they are.

    With ``q = softmax(logits / T)`` the student, ``p = softmax(teacher_logits / T)`` the teacher,
    and ``m = beta p + (1 - beta) q``,

    .. math:: \mathrm{KL}(p \| q) = \sum_c p_c \log \frac{p_c}{q_c}, \qquad
              \mathrm{KL}(q \| p), \qquad
              \beta\,\mathrm{KL}(p \| m) + (1 - \beta)\,\mathrm{KL}(q \| m)

    are ``"forward"``, ``"reverse"`` and ``"jensen_shannon"``.

    Args:
      logits: the student's, ``[..., C]``, C at ``axis``; a floating dtype. float16 and bfloat16 are
        read as they are and computed in float32.
      teacher_logits: the shape of ``logits``; its dtype may be another.
      axis: the class axis, or a tuple of axes over which the probabilities sum to 1.
      divergence: ``"forward"``, which covers all the teacher's modes; ``"reverse"``, which keeps
        to some; ``"jensen_shannon"``, bounded, between the two.
      beta: of ``"jensen_shannon"`` alone, in (0, 1): a Python number, or a scalar array, which may
        be traced and is differentiable (out of range it makes NaN of the losses); None is
        0.5.
      temperature: ``T > 0``, divides both logits: a Python number, a scalar array, or one entry a
        token; arrays may be traced and are differentiable (an entry out of range makes NaN of its
        rows); None is 1. Nothing is multiplied by ``T**2``: Hinton et al. do, to keep the
        gradient's size; ``T**2 * loss`` is yours to write.
      sample_weight: shaped as the losses, ``s``: a weight a token, or a boolean mask.
        Differentiable.
      where: boolean. Broadcastable to ``logits``: the classes that exist, on both sides (a token
        that is left none does not count). Shaped as the losses: the tokens that count.
      reduction: ``"none"``: ``s_n l_n``, one a token. ``"sum"``. ``"mean"``:
        ``sum(s_n l_n) / sum(s_n)``.
      empty_mean: what a mean over nothing is, a Python number; None: NaN. Its gradient is 0.

    Returns:
      The loss, float32 (float64 where an argument is); gradients have their inputs' dtypes. Never
      negative, 0 for equal logits. A token that does not count has loss 0 and gradient 0, whatever
      its logits hold. A class at -inf on both sides is none. At -inf on one side, it makes KL
      inf (and the gradient of the other side not finite) where that other side is the first;
      ``"jensen_shannon"`` is always finite. A row that holds NaN or +inf, or nothing but -inf on
      one side, is NaN, it alone.

    Raises:
      TypeError: an argument has the wrong dtype, or an option is no Python number.
      ValueError: a shape, an axis, or an option's value is wrong. Nothing is ever broadcast.

    Differentiable in both logits, ``sample_weight`` and the numbers, in forward and reverse mode to
    any order: a teacher that shares parameters with the student wants ``jax.lax.stop_gradient``.
    The backward pass keeps both logits and a few numbers a row. Its ``q - p`` has no cancellation:
    a student at a distance of 1e-6 has a gradient of six digits.

    Example:

      >>> import jax.numpy as jnp
      >>> import jaxloss
      >>> teacher = jnp.array([[1.0, 2.0, 3.0], [30.0, 0.0, 0.0]])
      >>> student = teacher + jnp.array([[2.0**-10, 0.0, 0.0], [-1.0, 0.0, 0.0]])
      >>> print(jaxloss.kl_divergence(student, teacher, reduction="none"))
      [3.9075346e-08 1.3442822e-13]

    Source: G. Hinton et al., "Distilling the Knowledge in a Neural Network" (2015); the generalised
    Jensen-Shannon divergence as in R. Agarwal et al., "On-Policy Distillation of Language Models"
    (ICLR 2024). All terms positive, as ``scipy.special.kl_div`` has them.
    """
    call, name = "kl_divergence", "logits"
    logits = messages.floating(call, name, logits)
    teacher_logits = messages.floating(call, "teacher_logits", teacher_logits)
    axes = messages.class_axes(call, logits, name, axis)
    rule = "the shape of logits"
    messages.shape(call, "teacher_logits", teacher_logits, logits.shape, rule)
    wide = accumulator_of(logits, teacher_logits)
    kind, scalars = _kind(call, divergence, beta, temperature, wide)
    arguments.check_reduction(call, reduction)
    batch = messages.batch_shape(logits, axes)
    sample_weight = arguments.check_sample_weight(call, sample_weight, batch)
    class_mask, token_mask = arguments.masks(call, name, where, logits, axes)
    own = arguments.token_temperature(call, temperature, batch, wide)
    arrays = TokenArrays(None, None, sample_weight, class_mask, token_mask, own)
    classes = messages.num_classes(logits, axes)
    empty_mean = arguments.check_empty_mean(call, empty_mean)
    options = LossOptions(axes, classes, None, reduction, empty_mean, False, (), ())
    return _kl_divergence(logits, teacher_logits, arrays, scalars, options=options, kind=kind)


@jit
def _kl_divergence(logits, teacher_logits, arrays, scalars, *, options, kind):
    axes, every = options.axes, tuple(range(logits.ndim))
    rows = tuple(i for i in every if i not in axes)
    logits, teacher_logits, sample_weight, class_mask, token_mask, own = explicit_mesh.aligned(
        (logits, every),
        (teacher_logits, every),
        (arrays.sample_weight, rows),
        (arrays.class_mask, every),
        (arrays.token_mask, rows),
        (arrays.temperature, rows),
        flat=axes,
    )
    mask = mask_classes_last(class_mask, logits, axes)
    x, t = classes_last(logits, axes), classes_last(teacher_logits, axes)
    arrays = TokenArrays(None, None, sample_weight, mask, token_mask)
    arrays = without_empty_rows(arrays, x.shape[:-1], local_classes(options.num_classes))
    valid = valid_tokens(sample_weight, arrays.token_mask)
    numbers = {"temperature": scalars.temperature if own is None else own, "beta": scalars.beta}
    losses = row_divergences(x, t, arrays.class_mask, valid, **numbers, **dict(kind))
    valid = jnp.ones_like(losses, bool) if valid is None else valid
    return reduce_losses(losses, TokenWeights(valid, sample_weight), options)


def linear_kl_divergence(
    hidden: ArrayLike,
    kernel: KernelLike,
    teacher_hidden: ArrayLike,
    teacher_kernel: KernelLike,
    *,
    bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    vocab_axis: int = -1,
    teacher_vocab_axis: int | None = None,
    num_classes: int | None = None,
    divergence: Divergence = "forward",
    beta: ArrayLike | None = 0.5,
    temperature: ArrayLike | None = 1.0,
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
) -> Array:
    r""":func:`kl_divergence` of ``hidden @ kernel`` and a teacher's, a chunk of both at a time.

    .. math:: l_n = \mathrm{KL}(\mathrm{softmax}((g_n L + c) / T) \,\|\,
              \mathrm{softmax}((h_n K + b) / T))

    for a teacher ``g, L, c``, or another divergence, with the numerics of :func:`kl_divergence`.

    Args:
      hidden: ``[..., D]``, a floating dtype; N tokens in all.
      kernel: ``[D, V]``, or ``[V, D]`` with ``vocab_axis=0``, as in :func:`linear_cross_entropy`.
      teacher_hidden: ``[..., D2]``, with the leading shape of ``hidden``; its dtype may be another.
      teacher_kernel: ``[D2, V2]``, or ``[V2, D2]`` with ``teacher_vocab_axis=0``; likewise.
      bias, teacher_bias: ``[V]``, ``[V2]``.
      vocab_axis, teacher_vocab_axis: the axes of the kernels that hold the columns; None: the
        teacher's is the student's.
      num_classes: C. Columns of either kernel at and past it are padding and never enter the sums;
        they want finite numbers, as in :func:`linear_cross_entropy`. By default all columns,
        V = V2.
      divergence, beta, temperature, sample_weight, where, reduction, empty_mean: as in
        :func:`kl_divergence`.
      vocab_axis_name, token_axis_name, kernel_spec, mesh: as in :func:`linear_cross_entropy`.
        Devices that share the columns have the same columns of both kernels; ``kernel_spec`` is of
        both, each with its own ``vocab_axis``.
      chunk_size: tokens whose logits are held at a time, of both sides. On one CPU device what is
        made of them takes a few MiB; on several, up to four times the logits
        (``"jensen_shannon"``: nine). None takes so many fewer than :func:`linear_cross_entropy`
        that a chunk holds as many bytes, but no fewer than 512 on a TPU, 256 on a GPU.
      precision, dtype: of the products, the teacher's too, as in :func:`linear_cross_entropy`.

    Returns:
      The loss, as :func:`kl_divergence`. Gradients have their inputs' dtypes.

    Raises:
      TypeError: as :func:`kl_divergence`; or a side's operands differ in dtype and ``dtype`` is
        None.
      ValueError: as :func:`kl_divergence`; or the operands do not fit together, ``chunk_size`` is
        less than 1, an axis name is none of the mesh, or operands are split over it in a way that
        :func:`linear_cross_entropy` does not describe.

    A scalar loss takes its gradients along in the forward pass: three products for the student's
    side (logits and two gradients) and one for the teacher's; two more where the teacher is
    differentiated (``jax.lax.stop_gradient`` says that it is not), two in all where nothing is.
    Products take the operands' dtype and accumulate in float32. ``reduction="none"`` computes each
    chunk's logits again in the backward pass. Tokens that do not count are not computed. All
    logits of tokens that fit into one chunk are held at once: ``chunk_size`` makes it smaller.
    Under a ``scan`` that is differentiated from outside, a scalar loss keeps a float32 gradient of
    each kernel a step, ``reduction="none"`` and ``jax.checkpoint`` of the step none, as in
    :func:`linear_cross_entropy`.
    Differentiable in all floating arguments, in every mode.

    Example:

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
      >>> hidden, kernel, teacher, its_kernel = (
      ...     normal(0, 6, 4), normal(1, 4, 10), normal(2, 6, 8), normal(3, 8, 10))
      >>> fused = jaxloss.linear_kl_divergence(hidden, kernel, teacher, its_kernel, chunk_size=2)
      >>> bool(jnp.allclose(fused, jaxloss.kl_divergence(hidden @ kernel, teacher @ its_kernel)))
      True

    Source: the engine of :func:`linear_cross_entropy`; ``LigerFusedLinearJSD`` (P.-L. Hsu et al.,
    "Liger Kernel", 2024) for the teacher's own product.
    """
    call = "linear_kl_divergence"
    shared = {"dtype": dtype, "precision": precision}
    student = product_of(call, hidden, kernel, bias, vocab_axis, **shared)
    own_axis = teacher_vocab_axis
    of_teacher = teacher_hidden, teacher_kernel, teacher_bias
    own_axis = student.vocab_axis - 2 if own_axis is None else own_axis
    teacher = product_of(call, *of_teacher, own_axis, **shared, of="teacher_")
    lead, columns, its_columns = student.lead, student.columns, teacher.columns
    if teacher.lead != lead:
        its_own = messages.describe(teacher.hidden)
        got = f"hidden {messages.describe(student.hidden)}, teacher_hidden {its_own}"
        messages.fail(call, f"teacher_hidden must have hidden's leading shape, {lead}", got)
    if num_classes is None and columns != its_columns:
        got = _kernels(student, teacher)
        way_out = "If one of them is padded, say how many are classes: num_classes=..."
        messages.fail(call, "both kernels must have as many columns", got, way_out)
    names = axis_names.checked(
        call,
        student.hidden.ndim,
        token_axis_name=token_axis_name,
        vocab_axis_name=vocab_axis_name,
        kernel_spec=kernel_spec,
        over=mesh,
    )
    vocab_axes, token_axes = names.vocab_axes, names.token_axes
    # On all devices: which columns are padding is not static where they are split.
    shards = axis_size(vocab_axes)
    few = min(columns, its_columns) * shards
    classes = messages.integer(call, "num_classes", num_classes, 0, few, default=columns * shards)
    local = min(columns, its_columns) if vocab_axes else classes
    wide = _wider(student, teacher)
    kind, scalars = _kind(call, divergence, beta, temperature, wide)
    arguments.check_reduction(call, reduction)
    sample_weight = arguments.check_sample_weight(call, sample_weight, lead)
    logits = jax.ShapeDtypeStruct((*lead, local), student.narrow)
    axes = (len(lead),)
    class_mask, token_mask = arguments.masks(call, "hidden @ kernel", where, logits, axes)
    own = arguments.token_temperature(call, temperature, lead, wide)
    of_tokens = {
        "hidden": student.hidden,
        "teacher_hidden": teacher.hidden,
        "sample_weight": sample_weight,
        "where": token_mask,
        "temperature": own,
    }
    split = {"vocab_axes": vocab_axes, "token_axes": token_axes}
    axis_names.check_split(call, "kernel", student.kernel, of_tokens, **split)
    axis_names.check_split(call, "teacher_kernel", teacher.kernel, of_tokens, **split)
    arrays = TokenArrays(None, None, sample_weight, class_mask, token_mask, own)
    products = tuple(replace(p, num_classes=local) for p in (student, teacher))
    found = layout.of_call(call, names, products, arrays)
    tokens, most_columns = student.tokens, max(columns, its_columns)
    if found is not None:
        tokens //= found.devices(found.token_axes)
        token_axes = (*token_axes, *found.token_axes)
        vocab_axes = (*vocab_axes, *found.vocab_axes)
        most_columns = max(found.columns(p) for p in products)
        if found.vocab_axes:
            local = most_columns
            products = tuple(replace(p, num_classes=local) for p in products)
    if vocab_axes and columns != its_columns:
        rule = "both kernels must have as many columns where devices share them"
        got = _kernels(student, teacher)
        messages.fail(call, rule, got, "Pad one of them, and say num_classes=...")
    most = budget.size_to_plan_for(tokens)
    block = budget.block_of_rows(most_columns, bool(vocab_axes))
    rows = budget.rows_held(
        student.narrow,
        in_blocks=block is not None,
        none=reduction == "none",
        divergence=divergence,
        mask=class_mask is not None,
    )
    default = budget.default_chunk(most, most_columns, rows=rows)
    summed = token_axes if reduction != "none" else ()
    chunk = arguments.chunk_size(call, chunk_size, default, most)
    sweep = Sweep(chunk, vocab_axes, summed, block=block)
    empty_mean = arguments.check_empty_mean(call, empty_mean)
    options = LossOptions(axes, classes, None, reduction, empty_mean, False, vocab_axes, summed)
    static = {"sweep": sweep, "kind": kind}
    layout.warn_if_shared(call, products[0], sweep.chunk, found)
    if found is None:
        return _linear_kl_divergence(*products, arrays, scalars, options=options, **static)
    return layout.over_mesh(
        products,
        arrays,
        scalars,
        schedule=_linear_kl_divergence,
        layout=found,
        options=options,
        static=tuple(static.items()),
    )


def _kernels(student: Product, teacher: Product) -> str:
    own, its_own = (messages.describe(base_of(p.kernel)) for p in (student, teacher))
    return f"kernel {own}, teacher_kernel {its_own}"


def _wider(student: Product, teacher: Product) -> Any:
    return jnp.promote_types(student.wide, teacher.wide)


@jit
def _linear_kl_divergence(student, teacher, arrays, scalars, *, sweep, options, kind):
    lead = student.lead
    sample_weight, class_mask, token_mask, own = arrays[2:]
    own = None if own is None else own.reshape(math.prod(lead))
    classes = local_classes(options.num_classes, student.num_classes, options.vocab_axes)
    token_mask = tokens_with_classes(class_mask, token_mask, lead, classes)
    mask_rows, mask_index = rows_of_mask(class_mask, lead)
    numbers, of_scalars = jax.tree.flatten(scalars)

    def loss_fn(x, per_token, shared):
        (t, index, own), (mask, *numbers) = per_token, shared
        mask = mask if index is None else mask[index]
        # Counted anew: traced values must not leak into the loop that this runs in.
        here = local_classes(options.num_classes, x.shape[-1], options.vocab_axes)
        scalars = of_scalars.unflatten(numbers)
        numbers = {"temperature": scalars.temperature if own is None else own, "beta": scalars.beta}
        of_all = {"axes": here.axes, **numbers, **dict(kind)}
        losses = row_divergences(x, t, existing(mask, here, 2), **of_all)
        return (losses,), ()

    valid = valid_tokens(sample_weight, token_mask)
    valid = jnp.ones(lead, bool) if valid is None else valid
    dtype = _wider(student, teacher)
    weights = normalised_weights(TokenWeights(valid, sample_weight), options, dtype)
    operands = token_chunks.Operands(
        student.flat(), (mask_index, own), (mask_rows, *numbers), teacher.flat()
    )
    scalar = options.reduction != "none"
    return token_rules.reduced(loss_fn, sweep, operands, valid, weights, scalar)[0]
