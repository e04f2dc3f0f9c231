"""log_probs_at, linear_log_probs_at, linear_top_k and linear_sample."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, TypedDict, Unpack, cast, overload

import jax
import jax.numpy as jnp
from jax import Array, dtypes, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from jaxloss._checks import arguments, axis_names, explicit_mesh, messages
from jaxloss._linear import budget, layout, log_probs
from jaxloss._linear.operands import product_of
from jaxloss._linear.product import Product, Sweep
from jaxloss._tokens.classes import local_classes
from jaxloss._tokens.shapes import classes_last, mask_classes_last
from jaxloss._types import AxisName, KernelLike, LossOptions, TokenArrays
from jaxloss._xla.device import jit
from jaxloss._xla.dtypes import accumulator_dtype
from jaxloss._xla.mesh import size as axis_size


class LogProbsOptions(TypedDict, total=False):
    """Of :func:`log_probs_at`, but for ``return_rest``, which says what it returns."""

    axis: int
    num_classes: int | None
    ignore_index: int | None
    temperature: ArrayLike | None
    logit_softcap: float | None
    where: ArrayLike | None
    vocab_axis_name: AxisName | None


@overload
def log_probs_at(
    logits: ArrayLike,
    indices: ArrayLike,
    *,
    return_rest: Literal[False] = False,
    **options: Unpack[LogProbsOptions],
) -> Array: ...
@overload
def log_probs_at(
    logits: ArrayLike,
    indices: ArrayLike,
    *,
    return_rest: Literal[True],
    **options: Unpack[LogProbsOptions],
) -> tuple[Array, Array]: ...
@overload
def log_probs_at(
    logits: ArrayLike,
    indices: ArrayLike,
    *,
    return_rest: bool,
    **options: Unpack[LogProbsOptions],
) -> Array | tuple[Array, Array]: ...
def log_probs_at(
    logits: ArrayLike,
    indices: ArrayLike,
    *,
    axis: int = -1,
    return_rest: bool = False,
    num_classes: int | None = None,
    ignore_index: int | None = -100,
    temperature: ArrayLike | None = 1.0,
    logit_softcap: float | None = None,
    where: ArrayLike | None = None,
    vocab_axis_name: AxisName | None = None,
) -> Array | tuple[Array, Array]:
    r"""Log-probabilities of k classes a token, exact at every confidence.

    .. math:: \log p_{i_a} = z_{i_a} - \mathrm{lse}(z), \qquad z = x / T

    A sampler that keeps some classes (top-k, top-p) renormalises over them: with the sampled class
    first, ``lp[..., 0] - logsumexp(lp, -1)`` is the log-probability under it.

    Args:
      logits: ``[..., C]``, C at ``axis``; a floating dtype.
      indices: class indices ``[..., k]``, the batch shape of ``logits`` and k classes last. A class
        may be named twice.
      axis: the class axis.
      return_rest: also return the log-probability of all other classes together, summed from them.
      num_classes, ignore_index, temperature, logit_softcap, vocab_axis_name: as in
        :func:`cross_entropy`.
      where: broadcastable to ``logits``: the classes that exist.

    Returns:
      ``[..., k]``, float32 (float64 for float64 logits), or ``(that, rest[...])``. -inf at
      ``ignore_index``, NaN at an index out of range (and in ``rest`` beside it) and where the
      logits of a row hold NaN or +inf. A row that names no class, or that is left none, is 0
      throughout, whatever its logits hold.

    Raises:
      TypeError, ValueError: as :func:`cross_entropy`; or ``indices`` are no integers, or do not
        have the batch shape of ``logits``.

    Differentiable in ``logits`` and an array as ``temperature``, in every mode. Cotangents of
    ignored indices are never read.

    Example:

      >>> import jax.numpy as jnp
      >>> import jaxloss
      >>> logits = jnp.array([[30.0, 0.0, 0.0, 1.0]])
      >>> found, rest = jaxloss.log_probs_at(logits, jnp.array([[0, 3, -100]]), return_rest=True)
      >>> print(found, rest)
      [[-4.4151903e-13 -2.9000000e+01           -inf]] [-29.306852]

    Source: the definition.
    """
    call = "log_probs_at"
    logits = messages.floating(call, "logits", logits, order="logits, indices")
    axes = messages.class_axes(call, logits, "logits", axis)
    if len(axes) != 1:
        messages.fail(call, "axis must be one axis", repr(axis))
    vocab_axes = axis_names.mesh_axes(call, "vocab_axis_name", vocab_axis_name)
    columns = logits.shape[axes[0]] * axis_size(vocab_axes)
    classes = messages.integer(call, "num_classes", num_classes, 0, columns, default=columns)
    batch = messages.batch_shape(logits, axes)
    indices = _indices(call, indices, batch, "logits")
    mask = arguments.class_mask(call, "logits", where, logits)
    arrays = TokenArrays(
        indices,
        class_mask=mask,
        temperature=arguments.token_temperature(
            call, temperature, batch, accumulator_dtype(logits.dtype)
        ),
    )
    wide = accumulator_dtype(logits.dtype)
    scalars = arguments.scalars(call, wide, logit_softcap=logit_softcap, temperature=temperature)
    of_tokens = {"indices": indices, "temperature": arrays.temperature}
    axis_names.check_split(call, "logits", logits, of_tokens, vocab_axes=vocab_axes)
    kind = arguments.ignored(call, ignore_index), messages.flag(call, "return_rest", return_rest)
    options = LossOptions(axes, classes, kind[0], "none", None, False, vocab_axes, ())
    found = _log_probs_at(logits, arrays, scalars, options=options, return_rest=kind[1])
    return found if return_rest else found[0]


@jit
def _log_probs_at(logits, arrays, scalars, *, options, return_rest):
    axes, every = options.axes, tuple(range(logits.ndim))
    rows = tuple(i for i in every if i not in axes)
    logits, indices, class_mask, temperature = explicit_mesh.aligned(
        (logits, every),
        (arrays.labels, (*rows, None)),
        (arrays.class_mask, every),
        (arrays.temperature, rows),
    )
    mask = mask_classes_last(class_mask, logits, axes)
    x = classes_last(logits, axes)
    classes = local_classes(options.num_classes, x.shape[-1], options.vocab_axes)
    valid = jnp.any(log_probs.class_indices(indices, classes.total, options.ignore_index)[1], -1)
    if mask is not None:
        some = log_probs.anywhere(jnp.any(mask, axis=-1), classes.axes)
        valid &= jnp.broadcast_to(some, valid.shape)
        mask |= ~some[..., None]
    # A row that does not count may hold NaN, which would return from behind a later select.
    x = jnp.where(valid[..., None], x, jnp.zeros((), x.dtype))
    if temperature is not None:
        temperature = jnp.where(valid, temperature, 1)
    here = TokenArrays(None, class_mask=mask, temperature=temperature)
    found = log_probs.rows_of(x, here, scalars, classes)
    found = log_probs.named(found, indices, classes, options.ignore_index, return_rest)
    return tuple(jnp.where(valid[..., None] if v.ndim > valid.ndim else valid, v, 0) for v in found)


class LinearLogProbsOptions(TypedDict, total=False):
    """Of :func:`linear_log_probs_at`, but for ``return_rest``, which says what it returns."""

    bias: ArrayLike | None
    vocab_axis: int
    num_classes: int | None
    ignore_index: int | None
    temperature: ArrayLike | None
    logit_softcap: float | None
    where: ArrayLike | None
    vocab_axis_name: AxisName | None
    token_axis_name: AxisName | PartitionSpec | None
    kernel_spec: PartitionSpec | None
    mesh: Mesh | AbstractMesh | None
    chunk_size: int | None
    precision: lax.PrecisionLike
    dtype: DTypeLike | None


@overload
def linear_log_probs_at(
    hidden: ArrayLike,
    kernel: KernelLike,
    indices: ArrayLike,
    *,
    return_rest: Literal[False] = False,
    **options: Unpack[LinearLogProbsOptions],
) -> Array: ...
@overload
def linear_log_probs_at(
    hidden: ArrayLike,
    kernel: KernelLike,
    indices: ArrayLike,
    *,
    return_rest: Literal[True],
    **options: Unpack[LinearLogProbsOptions],
) -> tuple[Array, Array]: ...
@overload
def linear_log_probs_at(
    hidden: ArrayLike,
    kernel: KernelLike,
    indices: ArrayLike,
    *,
    return_rest: bool,
    **options: Unpack[LinearLogProbsOptions],
) -> Array | tuple[Array, Array]: ...
def linear_log_probs_at(
    hidden: ArrayLike,
    kernel: KernelLike,
    indices: ArrayLike,
    *,
    return_rest: bool = False,
    bias: ArrayLike | None = None,
    vocab_axis: int = -1,
    num_classes: int | None = None,
    ignore_index: int | None = -100,
    temperature: ArrayLike | None = 1.0,
    logit_softcap: float | None = None,
    where: ArrayLike | None = None,
    vocab_axis_name: AxisName | None = None,
    token_axis_name: AxisName | PartitionSpec | None = None,
    kernel_spec: PartitionSpec | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    chunk_size: int | None = None,
    precision: lax.PrecisionLike = None,
    dtype: DTypeLike | None = None,
) -> Array | tuple[Array, Array]:
    r"""``log_probs_at(hidden @ kernel + bias, indices, ...)``, a chunk of the logits at a time.

    .. math:: \log p_{i_a} = z_{i_a} - \mathrm{lse}(z), \qquad z = (h K + b) / T

    Args:
      hidden: ``[..., D]``, a floating dtype.
      kernel: ``[D, V]``, or ``[V, D]`` with ``vocab_axis=0``, as in :func:`linear_cross_entropy`.
      indices: class indices ``[..., k]`` with hidden's leading shape.
      return_rest, ignore_index, temperature, logit_softcap, where: as in :func:`log_probs_at`.
      bias, vocab_axis, num_classes, precision, dtype, vocab_axis_name, token_axis_name,
        kernel_spec, mesh: as in :func:`linear_cross_entropy`.
      chunk_size: tokens whose logits are held at a time; None: as :func:`linear_token_stats`.

    Returns:
      As :func:`log_probs_at`. Tokens that name no class are not computed.

    Raises:
      TypeError, ValueError: as :func:`log_probs_at` and :func:`linear_cross_entropy`.

    One matrix product, and four where ``hidden`` and ``kernel`` are differentiated too. The k
    numbers come from the chunk's logits, so that k may be thousands.

    Example:

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> hidden = jax.random.normal(jax.random.key(0), (6, 4))
      >>> kernel = jax.random.normal(jax.random.key(1), (4, 10))
      >>> kept, _ = jaxloss.linear_top_k(hidden, kernel, 3)
      >>> found = jaxloss.linear_log_probs_at(hidden, kernel, kept, chunk_size=2)
      >>> bool(jnp.allclose(found, jaxloss.log_probs_at(hidden @ kernel, kept), atol=1e-6))
      True

    Source: as :func:`log_probs_at` and :func:`linear_cross_entropy`.
    """
    call = "linear_log_probs_at"
    product = product_of(call, hidden, kernel, bias, vocab_axis, dtype=dtype, precision=precision)
    indices = _indices(call, indices, product.lead, "hidden")
    kind = arguments.ignored(call, ignore_index), messages.flag(call, "return_rest", return_rest)
    found = _by_chunks(
        call,
        product,
        ((indices,), ()),
        ("named", *kind),
        num_classes=num_classes,
        temperature=temperature,
        logit_softcap=logit_softcap,
        where=where,
        vocab_axis_name=vocab_axis_name,
        token_axis_name=token_axis_name,
        kernel_spec=kernel_spec,
        over=mesh,
        chunk_size=chunk_size,
    )
    return found if return_rest else found[0]


def linear_top_k(
    hidden: ArrayLike,
    kernel: KernelLike,
    k: int,
    *,
    bias: ArrayLike | None = None,
    vocab_axis: int = -1,
    num_classes: int | None = None,
    temperature: ArrayLike | None = 1.0,
    logit_softcap: float | None = None,
    where: ArrayLike | None = None,
    vocab_axis_name: AxisName | None = None,
    token_axis_name: AxisName | PartitionSpec | None = None,
    kernel_spec: PartitionSpec | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    chunk_size: int | None = None,
    precision: lax.PrecisionLike = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, Array]:
    r"""The k most likely classes of each token and their log-probabilities, without its logits.

    .. math:: (i_a, \log p_{i_a})_{a=1}^k, \qquad p = \mathrm{softmax}((h K + b) / T)

    What :class:`TopKLabels` are made of: ``TopKLabels(indices, jnp.exp(log_probs))``.

    Args:
      hidden: ``[..., D]``, a floating dtype.
      kernel: ``[D, V]``, or ``[V, D]`` with ``vocab_axis=0``, as in :func:`linear_cross_entropy`.
      k: how many, at most the number of classes.
      bias, vocab_axis, num_classes, precision, dtype, vocab_axis_name, token_axis_name,
        kernel_spec, mesh: as in :func:`linear_cross_entropy`. Inside of ``shard_map``, where
        devices share the columns, each has k or more. On automatic axes that nobody names the
        logits of each chunk are gathered.
      temperature, logit_softcap, where: as in :func:`log_probs_at`.
      chunk_size: tokens whose logits are held at a time; None: as :func:`linear_token_stats`.

    Returns:
      ``(indices, log_probs)``, each ``[..., k]``: int32 and float32 (float64 for float64 operands),
      the most likely first, and of equally likely ones the lower class, as :func:`jax.lax.top_k`.
      Where fewer than k classes exist, the index is -100 and the log-probability -inf; where the
      logits of a row hold NaN or +inf, its log-probabilities are NaN. Without a derivative:
      :func:`linear_log_probs_at` of the indices has one.

    Raises:
      TypeError, ValueError: as :func:`linear_cross_entropy`; or ``k`` is out of range.

    Example:

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> hidden = jax.random.normal(jax.random.key(0), (6, 4))
      >>> kernel = jax.random.normal(jax.random.key(1), (4, 10))
      >>> indices, log_probs = jaxloss.linear_top_k(hidden, kernel, 3, chunk_size=2)
      >>> expected = jax.lax.top_k(jaxloss.log_softmax(hidden @ kernel), 3)
      >>> bool(jnp.allclose(log_probs, expected[0], atol=1e-6) and (indices == expected[1]).all())
      True

    Source: the definition.
    """
    call = "linear_top_k"
    product = product_of(call, hidden, kernel, bias, vocab_axis, dtype=dtype, precision=precision)
    k = messages.bounded(call, "k", messages.index(call, "k", k), 1, product.columns)
    return _by_chunks(
        call,
        product,
        ((), ()),
        ("likeliest", k),
        num_classes=num_classes,
        temperature=temperature,
        logit_softcap=logit_softcap,
        where=where,
        vocab_axis_name=vocab_axis_name,
        token_axis_name=token_axis_name,
        kernel_spec=kernel_spec,
        over=mesh,
        chunk_size=chunk_size,
    )


def linear_sample(
    key: ArrayLike,
    hidden: ArrayLike,
    kernel: KernelLike,
    *,
    num_samples: int | None = None,
    bias: ArrayLike | None = None,
    vocab_axis: int = -1,
    num_classes: int | None = None,
    temperature: ArrayLike | None = 1.0,
    logit_softcap: float | None = None,
    where: ArrayLike | None = None,
    vocab_axis_name: AxisName | None = None,
    token_axis_name: AxisName | PartitionSpec | None = None,
    kernel_spec: PartitionSpec | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    chunk_size: int | None = None,
    precision: lax.PrecisionLike = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, Array]:
    r"""Samples of each token's next class and their log-probabilities, without its logits.

    .. math:: i = \arg\max_c (z_c + g_c), \qquad z = (h K + b) / T, \quad g_c
              \text{ independent Gumbel}

    Each token and class has its own noise from the key: chunks and meshes change no sample, except
    where a product that is rounded in another way moves two sums past each other.

    Args:
      key: a key of :func:`jax.random.key`, of threefry (JAX's default).
      hidden: ``[..., D]``, a floating dtype.
      kernel: ``[D, V]``, or ``[V, D]`` with ``vocab_axis=0``, as in :func:`linear_cross_entropy`.
      num_samples: None: one a token, shaped as the losses; a number: ``[..., num_samples]``.
      bias, vocab_axis, num_classes, precision, dtype, vocab_axis_name, token_axis_name,
        kernel_spec, mesh: as in :func:`linear_cross_entropy`. Inside of ``shard_map`` a device
        numbers its own tokens alone: give each device along the tokens' axes a key of its own
        there. Devices that share the columns draw the noise of all of them.
      temperature, logit_softcap, where: as in :func:`log_probs_at`.
      chunk_size: tokens whose logits are held at a time; None: as :func:`linear_token_stats`.

    Returns:
      ``(indices, log_probs)``: int32 and float32 (float64 for float64 operands). A token that is
      left no class has index -100. Without a derivative: :func:`linear_log_probs_at` has one.

    Raises:
      TypeError, ValueError: as :func:`linear_cross_entropy`; or ``key`` is no key of threefry.

    Example:

      >>> import jax
      >>> import jaxloss
      >>> hidden = jax.random.normal(jax.random.key(0), (6, 4))
      >>> kernel = jax.random.normal(jax.random.key(1), (4, 10))
      >>> indices, log_probs = jaxloss.linear_sample(jax.random.key(2), hidden, kernel)
      >>> indices.shape, log_probs.shape
      ((6,), (6,))

    Source: E. J. Gumbel, "Statistical Theory of Extreme Values and Some Practical Applications"
    (1954); as :func:`jax.random.categorical`.
    """
    call = "linear_sample"
    if type(temperature) in (int, float) and temperature == 0:  # a bool is told to be a number
        way_out = "Of a temperature near 0 the sample is the likeliest class: linear_top_k, k=1."
        messages.fail(call, "temperature must be above 0", repr(temperature), way_out)
    product = product_of(call, hidden, kernel, bias, vocab_axis, dtype=dtype, precision=precision)
    data, impl = _key(call, key)
    count = messages.integer(call, "num_samples", num_samples, 1, None, default=1)
    lead = product.lead
    number = jnp.arange(math.prod(lead), dtype=jnp.int32).reshape(lead)
    found = _by_chunks(
        call,
        product,
        ((number,), (data,)),
        ("sampled", count),
        impl,
        num_classes=num_classes,
        temperature=temperature,
        logit_softcap=logit_softcap,
        where=where,
        vocab_axis_name=vocab_axis_name,
        token_axis_name=token_axis_name,
        kernel_spec=kernel_spec,
        over=mesh,
        chunk_size=chunk_size,
    )
    index, of_it = found
    return (index[..., 0], of_it[..., 0]) if num_samples is None else (index, of_it)


def _indices(call: str, given: Any, batch: tuple[int, ...], of: str) -> Array:
    indices = messages.array(call, "indices", given, of_classes=True)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        rule = "indices must be class indices (an integer dtype)"
        messages.fail(call, rule, messages.describe(indices), kind=TypeError)
    if indices.ndim != len(batch) + 1 or indices.shape[:-1] != batch:
        rule = f"indices must be [..., k] with the batch shape of {of}, {batch}"
        way_out = "Give one class a token as indices[..., None]." if indices.shape == batch else ""
        messages.fail(call, rule, messages.describe(indices), way_out)
    return indices


def _key(call: str, given: Any) -> tuple[Array, str]:
    """The key's data, and the name of what makes numbers of it."""
    key = messages.array(call, "key", given, of_keys=True)
    if not jnp.issubdtype(key.dtype, dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.shape != (2,):
            rule = "key must be one key, as jax.random.key makes it"
            messages.fail(call, rule, messages.describe(key), kind=TypeError)
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
    if key.ndim:
        messages.fail(call, "key must be one key", messages.describe(key), "Split keys are many.")
    impl = str(jax.random.key_impl(key))
    if "threefry" not in impl and "fry" not in impl:
        rule = "key must be of threefry, whose numbers are the same however they are made"
        messages.fail(call, rule, impl, "jax.random.key(seed, impl='threefry2x32')", TypeError)
    return jax.random.key_data(key), "threefry2x32"


def _by_chunks(
    call: str,
    product: Product,
    own: tuple[tuple, tuple],
    kind: tuple,
    impl: str | None = None,
    *,
    num_classes: Any,
    temperature: Any,
    logit_softcap: Any,
    where: Any,
    vocab_axis_name: Any,
    token_axis_name: Any,
    kernel_spec: Any,
    over: Any,
    chunk_size: Any,
) -> Any:
    """The results of ``log_probs.by_token_chunks`` for a public function's arguments."""
    hidden, wide, lead = product.hidden, product.wide, product.lead
    names = axis_names.checked(
        call,
        hidden.ndim,
        token_axis_name=token_axis_name,
        vocab_axis_name=vocab_axis_name,
        kernel_spec=kernel_spec,
        over=over,
    )
    vocab_axes, columns = names.vocab_axes, product.columns
    every = columns * axis_size(vocab_axes)
    classes = messages.integer(call, "num_classes", num_classes, 0, every, default=every)
    if kind[0] == "likeliest" and kind[1] > classes:
        messages.fail(call, f"k must be at most num_classes, {classes}", str(kind[1]))
    local = columns if vocab_axes else classes
    logits = jax.ShapeDtypeStruct((*lead, local), product.narrow)
    # It is asked for its shape.
    mask = arguments.class_mask(call, "hidden @ kernel", where, cast(Array, logits))
    arrays = TokenArrays(
        None,
        class_mask=mask,
        temperature=arguments.token_temperature(call, temperature, lead, wide),
    )
    scalars = arguments.scalars(call, wide, logit_softcap=logit_softcap, temperature=temperature)
    of_tokens = {"hidden": hidden, "temperature": arrays.temperature}
    if kind[0] == "named":
        of_tokens["indices"] = own[0][0]
    split = {"vocab_axes": vocab_axes, "token_axes": names.token_axes}
    axis_names.check_split(call, "kernel", product.kernel, of_tokens, **split)
    product = replace(product, num_classes=local)
    found = layout.of_call(call, names, [product], (own[0], arrays))
    tokens = product.tokens
    if found is not None:
        tokens //= found.devices(found.token_axes)
        vocab_axes = (*vocab_axes, *found.vocab_axes)
        columns = found.columns(product)
        if found.vocab_axes:
            product = replace(product, num_classes=columns)
    rows = budget.rows_held(product.narrow, none=True, statistics=True, mask=mask is not None)
    rows += 2.0 * axis_size(names.vocab_axes) if kind[0] == "sampled" else 0
    most = budget.size_to_plan_for(tokens)
    chunk = arguments.chunk_size(
        call, chunk_size, budget.default_chunk(most, columns, rows=rows), most
    )
    sweep = Sweep(chunk, vocab_axes)
    options = LossOptions((len(lead),), classes, None, "none", None, False, vocab_axes, ())
    static = {"sweep": sweep, "kind": kind, "impl": impl}
    layout.warn_if_shared(call, product, chunk, found)
    if kind[0] == "likeliest":
        layout.warn_of_top_k(call, product, chunk, found)
    if found is None:
        return log_probs.by_token_chunks(product, arrays, scalars, own, options=options, **static)
    return _over_mesh(
        product, arrays, scalars, own, layout_=found, options=options, static=tuple(static.items())
    )


@jit
def _over_mesh(product, arrays, scalars, own, *, layout_, options, static):
    arrays, of_arrays = layout.of_arrays(arrays, layout_, [product])
    (product,), of_operands = layout.of_products([product], layout_)
    rows = P(*layout_.tokens)
    specs = (*of_operands, of_arrays, P(), (rows, P()))
    out = (rows, rows)
    if dict(static)["kind"][0] == "named":
        out = (rows,) * (1 + dict(static)["kind"][2])

    def of_device(*given):
        return log_probs.by_token_chunks(*given, options=options, **dict(static))

    return layout.run(of_device, layout_, (product, arrays, scalars, own), specs, out)
