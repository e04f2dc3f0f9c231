"""Forward mode for a ``jax.custom_vjp`` function, which by itself refuses ``jvp``.

The shell is a ``jax.custom_jvp`` function. Its tangent map is linear in the tangents, and is bound
as one primitive: evaluated (forward mode) it runs the tangent function; transposed (reverse mode)
it runs the custom_vjp function's own backward pass; differentiated again, it is ordinary JAX code.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import compress, zip_longest
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, tree
from jax.core import Tracer
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero


@cache
def _internals() -> Any:
    """What forward mode is made of; None: this JAX has moved it. Then there is reverse mode alone,
    and ``custom_vjp``'s own error for ``jvp``.

    Imported by the first loss: ``jax.extend`` brings Pallas, a third of the whole import.
    """
    try:
        import jax.extend.core as core
        from jax.interpreters import ad, batching, mlir
    except ImportError:
        return None
    return SimpleNamespace(core=core, ad=ad, batching=batching, mlir=mlir)


def moving_of(tangents: Any) -> list[bool]:
    """Which are not None, nor zeros that JAX knows for ones."""
    return [not isinstance(t, SymbolicZero | None) for t in tangents]


def jvp_of_moving(function, primals, tangents, has_aux=False):
    """``jax.jvp(function, primals, tangents)``, where a tangent that does not move is no array.

    Of an array of zeros each product would be computed, and by XLA:CPU wrong: where it fuses the
    product with a sum of it, it takes a number that is broadcast for the whole array.
    """
    primals, structure = tree.flatten(primals, is_leaf=lambda x: x is None)
    tangents = tree.leaves(tangents, is_leaf=lambda x: x is None)
    moving = moving_of(tangents)

    def of_moving(*some):
        some = iter(some)
        full = [next(some) if m else p for m, p in zip(moving, primals, strict=True)]
        return function(*tree.unflatten(structure, full))

    some, along = (list(compress(xs, moving)) for xs in (primals, tangents))
    return jax.jvp(of_moving, some, along, has_aux=has_aux)


def differentiable(
    value: Callable,
    forward: Callable,
    backward: Callable,
    tangent: Callable,
    *,
    asks: bool = False,
    whole: bool = True,
) -> Callable:
    """``value(*trees)`` with a derivative of its own, in both modes.

    ``forward(*trees)`` returns the value and what is saved; ``backward(saved, ct)`` a tree for each
    argument, in which None stands for whatever part has no gradient; ``tangent(saved, tangents)``
    and ``whole`` are those of :func:`_with_forward_mode`, the tangents being trees with None for
    what is constant.

    ``asks``: ``forward(active, *trees)`` and ``backward(active, saved, ct)`` are told which leaves
    are differentiated, in trees of booleans.
    """

    def call(*trees):
        leaves, structure = tree.flatten(trees, is_leaf=_is_none)
        of_leaves = structure.unflatten

        def flat(gradients):
            out = []

            def put(gradient, x):
                missing = len(tree.leaves(x, is_leaf=_is_none))
                out.extend([None] * missing if gradient is None else [gradient])

            tree.map(put, tuple(gradients), trees_of_flags, is_leaf=_is_none)
            return tuple(out)

        # The rule outlives this trace, and must not refer to its arrays.
        trees_of_flags = of_leaves([False] * len(leaves))

        def forward_of_leaves(*leaves):
            if not asks:
                return forward(*of_leaves(leaves))
            # A flag must be static to choose the products: () and None have no leaves.
            flags = tuple(() if x is not None and x.perturbed else None for x in leaves)
            values = [None if x is None else x.value for x in leaves]
            out, saved = forward(_active(of_leaves, flags), *of_leaves(values))
            return out, (saved, flags)

        def backward_of_leaves(residuals, ct):
            if not asks:
                return flat(backward(residuals, ct))
            saved, flags = residuals
            return flat(backward(_active(of_leaves, flags), saved, ct))

        def tangent_of_leaves(residuals, tangents):
            saved = residuals[0] if asks else residuals
            return tangent(saved, of_leaves(tangents))

        rule = jax.custom_vjp(lambda *leaves: value(*of_leaves(leaves)))
        rule.defvjp(forward_of_leaves, backward_of_leaves, symbolic_zeros=asks)
        return _with_forward_mode(rule, tangent_of_leaves, whole)(*leaves)

    return call


def _is_none(x: Any) -> bool:
    return x is None


def _active(of_leaves: Callable, flags: tuple) -> Any:
    return of_leaves([flag is not None for flag in flags])


def _with_forward_mode(rule, tangent, whole=True):
    """``rule``, a custom_vjp function of arrays (and None), that also has a forward mode.

    ``tangent(residuals, tangents)`` takes what the rule's forward pass saved and one tangent an
    argument (None: it is constant), and returns the outputs' tangents (the first few, where the
    others do not move). It must be linear in the tangents, and the rule's backward pass its
    transpose; that one gets None for cotangents that are zero.

    The outputs have this derivative when they are differentiated again too: the code of the forward
    pass, which selects 0 where 0 is asked for, would have lost it there. ``whole=False``: what was
    saved does not tell it; that code must. A rule with symbolic zeros saves its flags last.
    """
    if _tangent_map() is None:
        return rule

    def jvp(primals, tangents):
        moving = moving_of(tangents)

        def forward(*primals):
            if not rule.symbolic_zeros:
                return rule.fwd(*primals)
            marked = zip(primals, moving, strict=True)
            return rule.fwd(*(None if p is None else CustomVJPPrimal(p, a) for p, a in marked))

        out, residuals = _as_one_operation(forward, primals)
        moved = tangents_of(out, residuals, tangents)
        return (again(out, residuals, *primals) if whole else _batched_alike(out, primals)), moved

    def jvp_again(primals, tangents):
        out, residuals, *_ = primals
        tangents = tangents[2:]
        if rule.symbolic_zeros:
            flags = tuple(() if a else None for a in moving_of(tangents))
            residuals = (*residuals[:-1], flags)
        return again(*primals), tangents_of(out, residuals, tangents)

    def tangents_of(out, residuals, tangents):
        active = moving_of(tangents)
        out_leaves, out_tree = tree.flatten(out)
        residual_leaves, residual_tree = tree.flatten(residuals)
        n = len(residual_leaves)
        # The program outlives this trace, and with it all that transposed refers to: no arrays.
        inexact = [jnp.issubdtype(o.dtype, jnp.inexact) for o in out_leaves]
        moving = list(compress(tangents, active))
        avals, ad = [jax.typeof(o).to_tangent_aval() for o in out_leaves], _internals().ad

        def forward(*args):
            some = iter(args[n:])
            full = [next(some) if a else None for a in active]
            result = tree.leaves(tangent(tree.unflatten(residual_tree, args[:n]), full))
            return [
                ad.instantiate_zeros(ad.Zero(aval)) if r is None else r
                for aval, r, real in zip_longest(avals, result, inexact)
                if real  # integers have no tangent
            ]

        def transposed(present, *args):
            some, flags = iter(args[n:]), iter(present)
            ct = [next(some) if real and next(flags) else None for real in inexact]
            residuals = tree.unflatten(residual_tree, args[:n])
            return list(compress(rule.bwd(residuals, tree.unflatten(out_tree, ct)), active))

        linear = _Linear(forward, transposed, tuple(compress(avals, inexact)), n)
        moved = iter(_tangent_map().bind(*residual_leaves, *moving, linear=linear))
        out_tangents = [
            next(moved) if real else SymbolicZero(aval)
            for aval, real in zip(avals, inexact, strict=True)
        ]
        return tree.unflatten(out_tree, out_tangents)

    shell = jax.custom_jvp(lambda *primals: _batched_alike(rule.fun(*primals), primals))
    again = jax.custom_jvp(_batched_alike)
    shell.defjvp(jvp, symbolic_zeros=True)
    again.defjvp(jvp_again, symbolic_zeros=True)
    return shell


def _as_one_operation(function: Callable, args: tuple) -> Any:
    """``function(*args)``, as one operation of JAX's partial evaluation.

    JAX 0.10 to 0.12 handle each operation of a derivative rule twice, except those within a
    custom_jvp function. That took a fifth of the time to trace a loss.
    """
    structure, places = None, None

    def others(*args):
        # What is one of the arguments stays that argument: a scan keeps once what it does not
        # change, but a result for each step.
        nonlocal structure, places
        leaves, structure = tree.flatten(function(*args))
        if places is None:  # the derivatives follow, of the same results
            given = {id(x): i for i, x in enumerate(tree.leaves(args)) if isinstance(x, Tracer)}
            places = [given.get(id(x)) for x in leaves]
        return [x for x, place in zip(leaves, places, strict=True) if place is None]

    given, made = tree.leaves(args), iter(with_derivative_of(others, others)(*args))
    places = places or []
    return tree.unflatten(structure, [next(made) if i is None else given[i] for i in places])


def _batched_alike(out, *given):
    """``out``. Under ``vmap`` all of its arrays have a batch axis if any array here has one.

    ``_batch`` gives all tangents a batch axis. Without this an output that does not depend on what
    is batched would have none, and JAX refuses a tangent of another shape than its output's.
    """
    leaves, structure = tree.flatten(out)
    alike = _alike().bind(*leaves, *tree.leaves(given), n=len(leaves))
    return tree.unflatten(structure, alike)


class _Linear(NamedTuple):
    """A map that is linear in the tangents, as a parameter of the primitive. Not a program: reverse
    mode alone, the most frequent use, would trace it for nothing."""

    forward: Callable  # (*residuals, *tangents) -> the outputs' tangents
    transposed: Callable  # (present, *residuals, *cotangents) -> the tangents' cotangents
    avals: tuple  # of the outputs' tangents
    n: int  # how many residuals there are


def _evaluate(*args, linear):
    return linear.forward(*args)


def _abstract(*_, linear):
    return linear.avals


def _jvp(primals, tangents, *, linear):
    ad, n = _internals().ad, linear.n
    out = _tangent_map().bind(*primals, linear=linear)
    moving = [not isinstance(t, ad.Zero) for t in tangents]
    if not any(moving[:n]) and all(moving[n:]):
        return out, _tangent_map().bind(*primals[:n], *tangents[n:], linear=linear)

    tangents = [t if m else None for m, t in zip(moving, tangents, strict=True)]
    return out, jvp_of_moving(linear.forward, primals, tangents)[1]


def _transpose(cts, *args, linear):
    ad, n = _internals().ad, linear.n
    present = tuple(not isinstance(ct, ad.Zero) for ct in cts)
    results = linear.transposed(present, *args[:n], *compress(cts, present))
    undefined = [ad.is_undefined_primal(a) for a in args[n:]]
    return [None] * n + [
        ct if is_linear else None for ct, is_linear in zip(results, undefined, strict=True)
    ]


def _batch(args, axes, *, linear):
    n = linear.n
    size = next(a.shape[i] for a, i in zip(args, axes, strict=True) if i is not None)
    args, axes = list(args), list(axes)
    for i in range(n, len(args)):
        if axes[i] is None:  # its cotangent has one entry a batch member
            args[i], axes[i] = jnp.broadcast_to(args[i], (size, *args[i].shape)), 0

    def backward(present, *operands):
        return jax.vmap(
            partial(linear.transposed, present),
            in_axes=(*axes[:n], *(0 for p in present if p)),
            out_axes=axes[n:],
        )(*operands)

    forward = jax.vmap(linear.forward, in_axes=axes)
    # Traced: the program has the outputs' sharding and varying axes.
    avals = tuple(jax.make_jaxpr(forward)(*args).out_avals)
    out = _tangent_map().bind(*args, linear=_Linear(forward, backward, avals, n))
    return out, [0] * len(out)


def _alike_evaluated(*args, n):
    return args[:n]


def _alike_jvp(primals, tangents, *, n):
    ad = _internals().ad
    out = _alike().bind(*primals, n=n)
    moving = [not isinstance(t, ad.Zero) for t in tangents[:n]]
    along = list(compress(tangents[:n], moving))
    some = iter(_alike().bind(*along, *primals, n=len(along)) if along else ())
    moved = zip(moving, tangents[:n], strict=True)
    return out, [next(some) if moves else zero for moves, zero in moved]


def _alike_transpose(cts, *args, n):
    return [*cts, *(None for _ in args[n:])]


def _alike_batch(args, axes, *, n):
    # By vmap, which knows over what an explicit mesh splits the batch.
    out = jax.vmap(lambda *args: list(args[:n]), in_axes=tuple(axes), out_axes=0)(*args)
    return out, [0] * n


@cache
def _alike() -> Any:
    """The primitive: bind(*out, *given, n) -> out, n of them, as :func:`_batched_alike` says."""
    rules = _alike_evaluated, _alike_jvp, _alike_transpose, _alike_batch
    return _primitive("batched_alike", _alike_evaluated, *rules)


@cache
def _tangent_map() -> Any:
    """The primitive: bind(*residuals, *tangents) -> the outputs' tangents."""
    if _internals() is None:
        return None
    return _primitive("jaxloss_tangent_map", _evaluate, _abstract, _jvp, _transpose, _batch)


def _primitive(name: str, evaluate, abstract, jvp, transpose, batch) -> Any:
    """A primitive of several results, and its rules. ``evaluate`` is JAX code, compiled as such."""
    using = _internals()
    primitive = using.core.Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(abstract)
    using.ad.primitive_jvps[primitive] = jvp
    using.ad.primitive_transposes[primitive] = transpose
    using.batching.primitive_batchers[primitive] = batch
    using.mlir.register_lowering(primitive, using.mlir.lower_fun(evaluate, multiple_results=True))
    return primitive


def with_derivative_of(plain: Callable, kernel: Callable) -> Callable:
    """``kernel``, which has no derivative of its own: ``plain``, XLA's, is the same function."""
    rule = jax.custom_jvp(kernel)

    def jvp(args, tangents):
        return rule(*args), jvp_of_moving(plain, args, tangents)[1]

    rule.defjvp(jvp, symbolic_zeros=True)
    return rule


def with_slopes(formula: Callable, *slopes: Callable) -> Callable:
    """``formula(*args)`` of arrays that broadcast, with its derivative by each argument, a function
    of them all. The slope by an argument that does not move is not computed: it may be infinite."""
    function = jax.custom_jvp(formula)

    def jvp(primals, tangents):
        out, moving = function(*primals), moving_of(tangents)
        each = zip(compress(slopes, moving), compress(tangents, moving), strict=True)
        moved = [slope(*primals) * t for slope, t in each]
        return out, sum(moved[1:], start=moved[0]) if moved else jnp.zeros_like(out)

    function.defjvp(jvp, symbolic_zeros=True)
    return function


def unbroadcast(x: Array, like: Array) -> Array:
    """The cotangent of ``like``, which was broadcast, from what it was broadcast to."""
    spread = tuple(i for i, n in enumerate(like.shape) if n != x.shape[i])
    x = jnp.sum(x, axis=spread, keepdims=True).astype(like.dtype)
    # An explicit mesh wants a cotangent split as its primal is. The meshes themselves may differ: a
    # constant beside arrays of an automatic mesh has none.
    home = jax.typeof(like).sharding
    return x if jax.typeof(x).sharding.spec == home.spec else jax.sharding.reshard(x, home)


def scale_rows(ct: Array, slope: Array) -> Array:
    """``ct[..., None] * slope``. A row that is asked for nothing gets 0 of a slope that is NaN or
    inf too."""
    ct = ct[..., None]
    return ct * jnp.where((ct == 0) & ~jnp.isfinite(slope), 0, slope)
