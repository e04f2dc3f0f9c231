"""linear_loss: any loss of the logits ``hidden @ kernel``, a chunk of tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from jaxloss._checks import arguments, axis_names, messages
from jaxloss._linear import budget, layout, token_chunks
from jaxloss._linear.operands import product_of
from jaxloss._linear.own_loss import OwnLoss, closed_over, reduced, refuse_types_of_a_mesh
from jaxloss._linear.product import Sweep
from jaxloss._tokens.reduction import TokenWeights
from jaxloss._types import AxisName, KernelLike, LossOptions, PyTree, Reduction


class LinearLossOptions(TypedDict, total=False):
    """Of :func:`linear_loss`, but for ``has_aux``, which says what it returns."""

    bias: ArrayLike | None
    vocab_axis: int
    sample_weight: ArrayLike | None
    reduction: Reduction
    empty_mean: float | None
    token_axis_name: AxisName | PartitionSpec | None
    kernel_spec: PartitionSpec | None
    mesh: Mesh | AbstractMesh | None
    chunk_size: int | None
    precision: lax.PrecisionLike
    dtype: DTypeLike | None


@overload
def linear_loss(
    loss_fn: Callable[..., PyTree],
    hidden: ArrayLike,
    kernel: KernelLike,
    *per_token: ArrayLike,
    has_aux: Literal[False] = False,
    **options: Unpack[LinearLossOptions],
) -> Array: ...
@overload
def linear_loss(
    loss_fn: Callable[..., PyTree],
    hidden: ArrayLike,
    kernel: KernelLike,
    *per_token: ArrayLike,
    has_aux: Literal[True],
    **options: Unpack[LinearLossOptions],
) -> tuple[Array, PyTree]: ...
@overload
def linear_loss(
    loss_fn: Callable[..., PyTree],
    hidden: ArrayLike,
    kernel: KernelLike,
    *per_token: ArrayLike,
    has_aux: bool,
    **options: Unpack[LinearLossOptions],
) -> Array | tuple[Array, PyTree]: ...
def linear_loss(
    loss_fn: Callable[..., PyTree],
    hidden: ArrayLike,
    kernel: KernelLike,
    *per_token: ArrayLike,
    bias: ArrayLike | None = None,
    vocab_axis: int = -1,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
    empty_mean: float | None = None,
    has_aux: bool = False,
    token_axis_name: AxisName | PartitionSpec | None = None,
    kernel_spec: PartitionSpec | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    chunk_size: int | None = None,
    precision: lax.PrecisionLike = None,
    dtype: DTypeLike | None = None,
) -> Array | tuple[Array, PyTree]:
    r"""Any per-token loss of the logits ``hidden @ kernel + bias``, a chunk of them at a time.

    .. math:: l_n = \text{loss\_fn}(h_n K + b,\ t_n), \qquad
              \mathrm{mean} = \sum_n s_n l_n \Big/ \sum_n s_n

    Args:
      loss_fn: ``loss_fn(logits[n, V], *per_token[n, ...]) -> [n]``, of any n tokens at a time, each
        alone: float32 logits (float64 for float64 operands). It may close over arrays. Where an
        explicit mesh splits the operands, arrays with that mesh in their type are refused: call it
        inside of ``jax.shard_map`` then, and close over the arrays that this gives.
      hidden: ``[..., D]``, a floating dtype; N tokens in all.
      kernel: ``[D, V]``, or ``[V, D]`` with ``vocab_axis=0``, as in :func:`linear_cross_entropy`.
      per_token: arrays ``[..., *rest]`` with hidden's leading shape: labels, a teacher's hidden.
      bias: ``[V]``.
      vocab_axis, precision, dtype: as in :func:`linear_cross_entropy`.
      chunk_size: likewise; None takes half as many tokens, as ``loss_fn`` is taken to hold twice
        what a cross-entropy holds, and fewer beside ``per_token`` arrays that are as wide as the
        logits; never all at once for want of an accumulator.
      sample_weight: ``[...]``, a weight a token, or a boolean mask. Tokens of weight 0 are not
        computed; their loss and gradient are exactly 0.
      reduction: ``"none"``, ``"sum"`` or ``"mean"``.
      empty_mean: what a mean over nothing is, a Python number; None: NaN. Its gradient is 0.
      has_aux: ``loss_fn`` returns ``(loss, aux)``, and so does the call: ``aux`` is any tree of
        arrays ``[n, ...]``, which come back as ``[..., ...]`` in the tokens' order, without a
        derivative, and 0 where a token does not count.
      token_axis_name, kernel_spec, mesh: as in :func:`linear_cross_entropy`. ``loss_fn`` sees whole
        rows: the columns of ``kernel`` may be split over axes that split the tokens alone, and are
        gathered.

    Returns:
      A scalar, or ``[...]`` for ``"none"``, in the dtype of the logits; with ``has_aux`` a pair.

    Raises:
      TypeError, ValueError: as :func:`linear_cross_entropy`; or an array of ``per_token`` has
        another leading shape, or ``loss_fn`` does not return ``[n]``, floating. Inside of
        ``shard_map`` a sum or mean without ``token_axis_name`` is the device's own.

    Differentiable in ``hidden``, ``kernel``, ``bias``, floating ``per_token``, ``sample_weight``
    and what ``loss_fn`` closes over, in every mode that ``loss_fn`` is; memory and products as
    :func:`linear_cross_entropy`: all logits of tokens that fit into one chunk are held, and a
    scalar loss in a ``scan`` that is differentiated from outside keeps a float32 gradient of the
    kernel a step (``reduction="none"`` and ``jax.checkpoint`` of the step keep none).

    Call it under ``jit``: outside of it, every call traces ``loss_fn`` and compiles its loops anew.

    Example: the focal loss.

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> def focal(logits, labels):
      ...     loss = jaxloss.cross_entropy(logits, labels, reduction="none")
      ...     return jnp.expm1(-loss) ** 2 * loss
      >>> hidden = jax.random.normal(jax.random.key(0), (6, 4))
      >>> kernel = jax.random.normal(jax.random.key(1), (4, 10))
      >>> labels = jnp.arange(6)
      >>> loss = jaxloss.linear_loss(focal, hidden, kernel, labels, chunk_size=2)
      >>> bool(jnp.allclose(loss, focal(hidden @ kernel, labels).mean()))
      True

    Source: the engine of :func:`linear_cross_entropy`.
    """
    call = "linear_loss"
    if not callable(loss_fn):
        messages.fail(call, "loss_fn must be a function", type(loss_fn).__name__, kind=TypeError)
    product = product_of(call, hidden, kernel, bias, vocab_axis, dtype=dtype, precision=precision)
    own_hidden, columns = product.hidden, product.columns
    lead = product.lead
    arrays = arguments.per_token(call, per_token, lead)
    sample_weight = arguments.check_sample_weight(call, sample_weight, lead)
    names = axis_names.checked(
        call, own_hidden.ndim, token_axis_name=token_axis_name, kernel_spec=kernel_spec, over=mesh
    )
    of_tokens = {"hidden": own_hidden, "sample_weight": sample_weight}
    of_tokens |= {f"per_token[{i}]": x for i, x in enumerate(arrays)}
    axis_names.check_split(call, "kernel", product.kernel, of_tokens, token_axes=names.token_axes)
    arguments.check_reduction(call, reduction)
    empty_mean = arguments.check_empty_mean(call, empty_mean)
    found = layout.of_call(call, names, [product], (arrays, sample_weight), whole_rows=True)
    tokens, token_axes = product.tokens, names.token_axes
    if found is not None:
        tokens //= found.devices(found.token_axes)
        token_axes = (*token_axes, *found.token_axes)
    token_axes = token_axes if reduction != "none" else ()
    most = budget.size_to_plan_for(tokens)
    rests = [(x.shape[len(lead) :], x.dtype) for x in arrays]
    beside = sum(math.prod(rest) * dtype.itemsize for rest, dtype in rests) / (4 * max(1, columns))
    rows = budget.rows_held(product.narrow, none=reduction == "none", own=beside)
    default = budget.default_chunk(most, columns, rows=rows)
    chunk = arguments.chunk_size(call, chunk_size, default, most)
    wide = product.wide

    def types_of(n):
        own = (jax.ShapeDtypeStruct((n, *rest), dtype) for rest, dtype in rests)
        return jax.ShapeDtypeStruct((n, columns), wide), *own

    own = OwnLoss(loss_fn, messages.flag(call, "has_aux", has_aux), types_of)
    outer = closed_over(call, own, chunk)
    options = LossOptions((len(lead),), columns, None, reduction, empty_mean, False, (), token_axes)
    sweep = Sweep(chunk, token_axes=token_axes)

    def local(product, arrays, sample_weight, values):
        """Of the tokens of one device."""
        lead = product.lead
        tokens = math.prod(lead)
        valid = jnp.ones(lead, bool) if sample_weight is None else sample_weight.astype(bool)
        flat = tuple(x.reshape(tokens, *x.shape[len(lead) :]) for x in arrays)
        return reduced(
            own,
            lambda x, per_token, _: (x, *per_token),
            sweep,
            token_chunks.Operands(product.flat(), flat, ()),
            TokenWeights(valid, sample_weight),
            options,
            wide,
            outer,
            values,
        )

    layout.warn_if_shared(call, product, chunk, found)
    if found is None:
        return local(product, arrays, sample_weight, outer)
    refuse_types_of_a_mesh(call, outer)
    (product,), of_operands = layout.of_products([product], found)
    of_rows = P(*found.tokens)
    specs = (*of_operands, of_rows, of_rows, P())
    out = of_rows if reduction == "none" else P()
    out = (out, of_rows) if own.has_aux else out

    @jax.jit
    def over_mesh(*given):
        return layout.run(local, found, given, specs, out)

    return over_mesh(product, arrays, sample_weight, outer)
