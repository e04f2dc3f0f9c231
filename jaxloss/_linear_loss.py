"""linear_loss: any loss of the logits ``hidden @ kernel``, a chunk of tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, dtypes, lax
from jax.core import eval_jaxpr
from jax.typing import ArrayLike

from jaxloss._checks import arguments, explicit_mesh, messages
from jaxloss._linear import budget, token_chunks, token_rules
from jaxloss._linear.packing import groups_of
from jaxloss._linear.product import Product, Sweep
from jaxloss._tokens.reduction import TokenWeights, normalised_weights
from jaxloss._types import LossOptions, Reduction
from jaxloss._xla import mesh
from jaxloss._xla.dtypes import accumulator_dtype
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

    Returns:
      A scalar, or ``[...]`` for ``"none"``, in the dtype of the logits.

    Raises:
      TypeError, ValueError: as :func:`linear_cross_entropy`; or an array of ``per_token`` has
        another leading shape, or ``loss_fn`` does not return ``[n]``, floating, or operands of an
        explicit mesh are sharded. Inside of ``shard_map`` a sum or mean is the device's own.

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
    lead, tokens = hidden.shape[:-1], math.prod(hidden.shape[:-1])
    most = budget.size_to_plan_for(tokens)
    arrays = []
    for i, x in enumerate(per_token):
        x = messages.array(call, f"per_token[{i}]", x, of_keys=True)
        if x.shape[: len(lead)] != lead:
            rule = f"per_token[{i}] must have hidden's leading shape, {lead}"
            messages.fail(call, rule, f"{messages.describe(x)}, hidden {messages.describe(hidden)}")
        arrays.append(x.reshape(tokens, *x.shape[len(lead) :]))
    sample_weight = arguments.check_sample_weight(call, sample_weight, lead)
    named = {f"per_token[{i}]": x for i, x in enumerate(arrays)}
    explicit_mesh.refuse(
        call, hidden=hidden, kernel=kernel, bias=bias, sample_weight=sample_weight, **named
    )
    arguments.check_reduction(call, reduction)
    own = sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in arrays) / (4 * max(1, columns))
    rows = budget.rows_held(hidden.dtype, none=reduction == "none", own=own)
    default = budget.default_chunk(most, columns, rows=rows)
    chunk = arguments.chunk_size(call, chunk_size, default, most)

    wide = accumulator_dtype(hidden.dtype)

    def examples(n, axes=frozenset()):
        shapes = ((n, columns), wide), *(((n, *x.shape[1:]), x.dtype) for x in arrays)
        if not axes:
            return [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        zeros = lambda: [jnp.zeros(*shape) for shape in shapes]  # noqa: E731
        return jax.eval_shape(lambda: mesh.varying(zeros(), axes))

    out = jax.eval_shape(loss_fn, *examples(chunk))
    one = isinstance(out, jax.ShapeDtypeStruct)
    if not one or out.shape != (chunk,) or not jnp.issubdtype(out.dtype, jnp.floating):
        rule = f"loss_fn must return one floating number a token, shape ({chunk},)"
        got = messages.describe(out) if one else type(out).__name__
        messages.fail(call, rule, f"{got} for logits {messages.describe(examples(chunk)[0])}")
    varies = mesh.varies_over((hidden, kernel, bias, sample_weight, arrays))
    # JAX has no zeros and no sums of random keys, by which groups are filled.
    in_groups = not any(jnp.issubdtype(x.dtype, dtypes.prng_key) for x in arrays)
    groups = groups_of(tokens, chunk) if in_groups else 1
    sizes = budget.all_step_sizes(chunk, columns, groups)
    pure, closed_over = _converted(loss_fn, examples, sizes, varies)

    def chunk_losses(x, per_token, shared):
        return (pure(x, per_token, shared).astype(wide),), ()

    valid = jnp.ones(lead, bool) if sample_weight is None else sample_weight.astype(bool)
    empty_mean = arguments.check_empty_mean(call, empty_mean)
    options = LossOptions((len(lead),), columns, None, reduction, empty_mean, False, (), ())
    weights = normalised_weights(TokenWeights(valid, sample_weight), options, wide)
    precision = arguments.precision(call, precision)
    rows = hidden.reshape(tokens, hidden.shape[-1])
    product = Product(rows, kernel, bias, vocab_axis, columns, precision)
    operands = token_chunks.Operands(product, tuple(arrays), closed_over)
    sweep = Sweep(chunk)
    scalar = reduction != "none"

    # One program, which goes with this call. Of loops that run one by one outside of jit JAX keeps
    # thousands, and their compiled programs.
    @jax.jit
    def reduced(operands, valid, weights):
        given = sweep, operands, valid, weights, scalar
        return token_rules.reduced(chunk_losses, *given, in_groups=in_groups)[0]

    return reduced(operands, valid, weights)


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
        args = mesh.varying((x, *per_token), axes)
        return run(programs[n], consts, axes, *args)[0]

    return pure, tuple(jnp.asarray(x) for x in closed_over.values())
