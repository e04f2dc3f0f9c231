"""linear_loss: any loss of the logits ``hidden @ kernel``, a chunk of tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array, dtypes, lax
from jax.core import eval_jaxpr
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jaxloss._checks import arguments, messages
from jaxloss._linear import budget, layout, token_chunks, token_rules
from jaxloss._linear.packing import groups_of
from jaxloss._linear.product import Product, Sweep
from jaxloss._tokens.reduction import TokenWeights, normalised_weights
from jaxloss._types import AxisName, LossOptions, Reduction
from jaxloss._xla.dtypes import accumulator_dtype
from jaxloss._xla.mesh import other_axes, varies_over, varying
from jaxloss._xla.programs import run


def linear_loss(
    loss_fn: Callable[..., Array],
    hidden: ArrayLike,
    kernel: ArrayLike,
    *per_token: ArrayLike,
    bias: ArrayLike | None = None,
    vocab_axis: int = -1,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
    empty_mean: float | None = None,
    token_axis_name: AxisName | PartitionSpec | None = None,
    kernel_spec: PartitionSpec | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    chunk_size: int | None = None,
    precision: lax.PrecisionLike = None,
) -> Array:
    r"""Any per-token loss of the logits ``hidden @ kernel + bias``, a chunk of them at a time.

    .. math:: l_n = \mathrm{loss\_fn}(h_n K + b,\ t_n), \qquad
              \mathrm{mean} = \sum_n s_n l_n \Big/ \sum_n s_n

    Args:
      loss_fn: ``loss_fn(logits[n, V], *per_token[n, ...]) -> [n]``, of any n tokens at a time, each
        alone: float32 logits (float64 for float64 operands). It may close over arrays.
      hidden: ``[..., D]``, a floating dtype; N tokens in all.
      kernel: ``[D, V]``, or ``[V, D]`` with ``vocab_axis=0``; the dtype of ``hidden``.
      per_token: arrays ``[..., *rest]`` with hidden's leading shape: labels, a teacher's hidden.
      bias: ``[V]``.
      vocab_axis, precision: as in :func:`linear_cross_entropy`.
      chunk_size: likewise; None takes half as many tokens, as ``loss_fn`` is taken to hold twice
        what a cross-entropy holds, and fewer beside ``per_token`` arrays that are as wide as the
        logits; never all at once for want of an accumulator.
      sample_weight: ``[...]``, a weight a token, or a boolean mask. Tokens of weight 0 are not
        computed; their loss and gradient are exactly 0.
      reduction: ``"none"``, ``"sum"`` or ``"mean"``.
      empty_mean: what a mean over nothing is, a Python number; None: NaN. Its gradient is 0.
      token_axis_name, kernel_spec, mesh: as in :func:`linear_cross_entropy`. ``loss_fn`` sees whole
        rows: the columns of ``kernel`` may be split over axes that split the tokens alone, and are
        gathered.

    Returns:
      A scalar, or ``[...]`` for ``"none"``, in the dtype of the logits.

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
    hidden, kernel, bias, vocab_axis = arguments.product_operands(
        call, hidden, kernel, bias, vocab_axis
    )
    columns = kernel.shape[vocab_axis]
    lead = hidden.shape[:-1]
    arrays = []
    for i, x in enumerate(per_token):
        x = messages.array(call, f"per_token[{i}]", x, of_keys=True)
        if x.shape[: len(lead)] != lead:
            rule = f"per_token[{i}] must have hidden's leading shape, {lead}"
            messages.fail(call, rule, f"{messages.describe(x)}, hidden {messages.describe(hidden)}")
        arrays.append(x)
    sample_weight = arguments.check_sample_weight(call, sample_weight, lead)
    names = arguments.axis_names(
        call, hidden.ndim, token_axis_name=token_axis_name, kernel_spec=kernel_spec, over=mesh
    )
    of_tokens = {"hidden": hidden, "sample_weight": sample_weight}
    of_tokens |= {f"per_token[{i}]": x for i, x in enumerate(arrays)}
    arguments.check_split(call, "kernel", kernel, of_tokens, token_axes=names.token_axes)
    arguments.check_reduction(call, reduction)
    empty_mean = arguments.check_empty_mean(call, empty_mean)
    precision = arguments.precision(call, precision)
    product = Product(hidden, kernel, bias, vocab_axis, columns, precision)
    found = layout.of_call(call, names, [product], (arrays, sample_weight), whole_rows=True)
    tokens, token_axes = math.prod(lead), names.token_axes
    if found is not None:
        tokens //= found.devices(found.token_axes)
        token_axes = (*token_axes, *found.token_axes)
    token_axes = token_axes if reduction != "none" else ()
    most = budget.size_to_plan_for(tokens)
    rests = [(x.shape[len(lead) :], x.dtype) for x in arrays]
    own = sum(math.prod(rest) * dtype.itemsize for rest, dtype in rests) / (4 * max(1, columns))
    rows = budget.rows_held(hidden.dtype, none=reduction == "none", own=own)
    default = budget.default_chunk(most, columns, rows=rows)
    chunk = arguments.chunk_size(call, chunk_size, default, most)
    wide = accumulator_dtype(hidden.dtype)

    def examples(n, axes=frozenset()):
        shapes = ((n, columns), wide), *(((n, *rest), dtype) for rest, dtype in rests)
        if not axes:
            return [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        zeros = lambda: varying([jnp.zeros(*shape) for shape in shapes], axes)  # noqa: E731
        # JAX 0.12 traces from no type of a value that varies over some axes of a mesh alone.
        return zeros() if other_axes() else jax.eval_shape(zeros)

    outer = _checked(call, loss_fn, examples(chunk))
    # JAX has no zeros and no sums of random keys, by which groups are filled.
    in_groups = not any(jnp.issubdtype(dtype, dtypes.prng_key) for _, dtype in rests)
    options = LossOptions((len(lead),), columns, None, reduction, empty_mean, False, (), token_axes)
    sweep = Sweep(chunk, token_axes=token_axes)
    scalar = reduction != "none"

    def local(product, arrays, sample_weight, closed_over):
        """The loss of the tokens of one device."""
        lead = product.hidden.shape[:-1]
        tokens = math.prod(lead)
        valid = jnp.ones(lead, bool) if sample_weight is None else sample_weight.astype(bool)
        groups = groups_of(tokens, chunk) if in_groups else 1
        sizes = budget.all_step_sizes(chunk, columns, groups)
        varies = varies_over((product, arrays, sample_weight))
        pure, consts = _converted(loss_fn, examples, sizes, varies)
        # Inside of shard_map what loss_fn closes over comes as an argument.
        given = {id(x): y for x, y in zip(outer, closed_over, strict=True)}
        consts = tuple(jnp.asarray(given.get(id(x), x)) for x in consts)

        def chunk_losses(x, per_token, shared):
            return (pure(x, per_token, shared).astype(wide),), ()

        weights = normalised_weights(TokenWeights(valid, sample_weight), options, wide)
        rows = replace(product, hidden=product.hidden.reshape(tokens, hidden.shape[-1]))
        flat = [x.reshape(tokens, *x.shape[len(lead) :]) for x in arrays]
        operands = token_chunks.Operands(rows, tuple(flat), consts)

        # One program, which goes with this call. Of loops that run one by one outside of jit JAX
        # keeps thousands, and their compiled programs.
        @jax.jit
        def reduced(operands, valid, weights):
            given = sweep, operands, valid, weights, scalar
            return token_rules.reduced(chunk_losses, *given, in_groups=in_groups)[0]

        return reduced(operands, valid, weights)

    if found is None:
        layout.warn_if_shared(call, tokens, chunk)
        return local(product, arrays, sample_weight, outer)
    (product,), of_operands = layout.of_products([product], found)
    of_rows = P(*found.tokens)
    specs = (*of_operands, of_rows, of_rows, P())
    given = product, arrays, sample_weight, outer

    @jax.jit
    def over_mesh(*given):
        return layout.run(local, found, given, specs, P() if scalar else of_rows)

    return over_mesh(*given)


def _checked(call: str, loss_fn: Callable, examples: list) -> tuple:
    """The arrays that ``loss_fn`` closes over."""
    program, out = jax.make_jaxpr(loss_fn, return_shape=True)(*examples)
    one = isinstance(out, jax.ShapeDtypeStruct)
    shape = examples[0].shape[:1]
    if not one or out.shape != shape or not jnp.issubdtype(out.dtype, jnp.floating):
        rule = f"loss_fn must return one floating number a token, shape {shape}"
        got = messages.describe(out) if one else type(out).__name__
        messages.fail(call, rule, f"{got} for logits {messages.describe(examples[0])}")
    return tuple(program.consts)


def _converted(
    loss_fn: Callable, examples: Callable, sizes: list[int], axes: frozenset
) -> tuple[Callable, tuple]:
    """``(pure, closed_over)``: ``pure(logits, per_token, closed_over)`` is ``loss_fn``.

    The arrays that ``loss_fn`` closes over become arguments, of whatever dtype they are: a
    derivative rule outlives the trace that it is made in, and must not refer to that trace's
    arrays. A program holds for one shape: each size of the sweep's steps has its own.
    """
    programs = {n: jax.make_jaxpr(loss_fn)(*examples(n, axes)) for n in sizes}
    closed_over = {id(x): x for program in programs.values() for x in program.consts}
    # The rule may refer to names and to programs without arrays.
    names = {n: [id(x) for x in program.consts] for n, program in programs.items()}
    programs = {n: program.jaxpr for n, program in programs.items()}
    order = list(closed_over)

    def pure(x, per_token, closed_over):
        n = x.shape[0]
        given = dict(zip(order, closed_over, strict=True))
        consts = [given[name] for name in names[n]]
        if not axes:
            return eval_jaxpr(programs[n], consts, x, *per_token)[0]
        # On a mesh what is closed over comes varying: its gradient is summed after the sweep.
        args = varying((x, *per_token), axes)
        return run(programs[n], consts, axes, *args)[0]

    return pure, tuple(closed_over.values())
