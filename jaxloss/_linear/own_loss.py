"""A loss that the caller wrote, of what a chunk of tokens gives, in one sweep over the chunks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, dtypes, lax
from jax.core import eval_jaxpr
from jax.sharding import AxisType

from jaxloss._checks import messages
from jaxloss._linear import budget, token_chunks, token_rules
from jaxloss._linear.packing import groups_of
from jaxloss._linear.product import Sweep
from jaxloss._tokens.reduction import TokenWeights, normalised_weights
from jaxloss._types import LossOptions
from jaxloss._xla.mesh import other_axes, varies_over, varying
from jaxloss._xla.programs import run

_WAY_OUT = (
    "Call it inside of jax.shard_map, that array among the arguments; or hand over one number a "
    "token among per_token."
)


class OwnLoss(NamedTuple):
    """``loss_fn(*args)`` is a number for each of n tokens, or (these, what goes along)."""

    loss_fn: Callable
    has_aux: bool
    types_of: Callable  # n -> the types of its arguments, a tuple of trees

    def examples(self, n: int, axes: frozenset = frozenset()) -> Any:
        types = self.types_of(n)
        if not axes:
            return types
        zeros = lambda: varying(jax.tree.map(_zeros, types), axes)  # noqa: E731
        # JAX 0.12 traces from no type of a value that varies over some axes of a mesh alone.
        return zeros() if other_axes() else jax.eval_shape(zeros)


def _zeros(kind: jax.ShapeDtypeStruct) -> Array:
    return jnp.zeros(kind.shape, kind.dtype)


def closed_over(call: str, own: OwnLoss, n: int) -> tuple:
    """The arrays that ``loss_fn`` closes over; what it returns is checked."""
    examples = own.examples(n)
    try:
        program, out = jax.make_jaxpr(own.loss_fn, return_shape=True)(*examples)
    except Exception as error:
        if type(error).__name__ != "ShardingTypeError":  # JAX has no public name for it
            raise
        rule = "loss_fn must not close over arrays that an explicit mesh splits"
        messages.fail(call, rule, f"{error}", _WAY_OUT)
    first = messages.describe(jax.tree.leaves(examples)[0])
    if own.has_aux:
        if not isinstance(out, tuple) or len(out) != 2:
            rule = "with has_aux=True loss_fn must return (loss, aux)"
            messages.fail(call, rule, type(out).__name__, kind=TypeError)
        out, aux = out
        for x in jax.tree.leaves(aux):
            if x.shape[:1] != (n,):
                rule = f"aux must be arrays of an entry a token, [n, ...], n = {n}"
                messages.fail(call, rule, messages.describe(x))
    one = isinstance(out, jax.ShapeDtypeStruct)
    if not one or out.shape != (n,) or not jnp.issubdtype(out.dtype, jnp.floating):
        rule = f"loss_fn must return one floating number a token, shape ({n},)"
        got = messages.describe(out) if one else type(out).__name__
        way_out = "Say has_aux=True." if isinstance(out, tuple) else ""
        messages.fail(call, rule, f"{got} for {first}", way_out)
    return tuple(program.consts)


def refuse_types_of_a_mesh(call: str, outer: tuple) -> None:
    """JAX 0.12 lets no function inside of ``shard_map`` close over an array of an explicit mesh."""
    for x in outer:
        if AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types:
            rule = "loss_fn must not close over arrays of an explicit mesh"
            messages.fail(call, rule, f"{jax.typeof(x)}", _WAY_OUT)


def _converted(own: OwnLoss, sizes: list[int], axes: frozenset) -> tuple[Callable, tuple, Any]:
    """``(pure, closed_over, tree of what it returns)``: ``pure(args, closed_over)`` is ``loss_fn``,
    flat.

    The arrays that ``loss_fn`` closes over become arguments, of whatever dtype they are: a
    derivative rule outlives the trace that it is made in, and must not refer to that trace's
    arrays. A program holds for one shape: each size of the sweep's steps has its own.
    """
    trace = jax.make_jaxpr(own.loss_fn, return_shape=True)
    traced = {n: trace(*own.examples(n, axes)) for n in sizes}
    programs = {n: program for n, (program, _) in traced.items()}
    tree = jax.tree.structure(next(iter(traced.values()))[1])
    found = {id(x): x for program in programs.values() for x in program.consts}
    # The rule may refer to names and to programs without arrays.
    names = {n: [id(x) for x in program.consts] for n, program in programs.items()}
    programs = {n: program.jaxpr for n, program in programs.items()}
    order = list(found)

    def pure(args, closed_over):
        flat = jax.tree.leaves(args)
        n = flat[0].shape[0]
        given = dict(zip(order, closed_over, strict=True))
        consts = [given[name] for name in names[n]]
        if not axes:
            return eval_jaxpr(programs[n], consts, *flat)
        # On a mesh what is closed over comes varying: its gradient is summed after the sweep.
        return run(programs[n], consts, axes, *varying(flat, axes))

    return pure, tuple(found.values()), tree


def reduced(
    own: OwnLoss,
    args_of: Callable,
    sweep: Sweep,
    operands: token_chunks.Operands,
    weights: TokenWeights,
    options: LossOptions,
    wide: Any,
    outer: tuple,
    values: tuple,
) -> Any:
    """The loss, or ``(loss, aux)``, of the tokens of one device.

    ``args_of(logits, per_token, shared)`` are the arguments of ``loss_fn`` for a chunk; ``outer``
    is what :func:`closed_over` found, ``values`` what stands for it here.
    """
    lead, scalar = weights.valid.shape, options.reduction != "none"
    # JAX has no zeros and no sums of random keys, by which groups are filled.
    in_groups = not any(
        jnp.issubdtype(x.dtype, dtypes.prng_key) for x in jax.tree.leaves(operands.per_token)
    )
    groups = groups_of(operands.student.hidden, sweep.chunk) if in_groups else 1
    sizes = budget.all_sizes(sweep.chunk, sweep.block, token_chunks.columns_of(operands), groups)
    # What a loss reads of a token is the same on all devices that share its columns.
    varies = varies_over((operands, weights)) - {*sweep.vocab_axes}
    pure, consts, tree = _converted(own, sizes, varies)
    given = {id(x): y for x, y in zip(outer, values, strict=True)}
    consts = tuple(jnp.asarray(given.get(id(x), x)) for x in consts)
    count = len(operands.shared)

    def of_chunk(x, per_token, shared):
        out = pure(args_of(x, per_token, shared[:count]), shared[count:])
        loss, *aux = out
        return (loss.astype(wide),), tuple(map(lax.stop_gradient, aux))

    # One program, which goes with this call. Of loops that run one by one outside of jit JAX keeps
    # thousands, and their compiled programs.
    @jax.jit
    def of_operands(operands, weights):
        each = normalised_weights(weights, options, wide)
        given = sweep, operands, weights.valid, each, scalar
        return token_rules.reduced(of_chunk, *given, in_groups=in_groups)

    operands = operands._replace(shared=(*operands.shared, *consts))
    loss, aux = of_operands(operands, weights)
    if not own.has_aux:
        return loss
    aux = [x.reshape(*lead, *x.shape[1:]) for x in aux]
    return loss, jax.tree.unflatten(tree, [loss, *aux])[1]
