"""``shard_map`` inside of ``shard_map``, over the axes that the outer one leaves out.

JAX 0.10 to 0.12 compile it, collectives over the outer axes included, but not its derivative: what
its forward pass saves for the backward pass leaves it split over the outer axes a second time
("operates on axis which is already bound"). So nothing is saved here but the arguments. Each
derivative is a ``shard_map`` of its own that computes the forward pass again, and has derivatives
by the same rule.
"""

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxloss._types import Axes
from jaxloss._xla.derivatives import differentiable, moving_of


def shard_map(function: Callable, axes: Axes, in_specs: Sequence, out_specs: Any) -> Callable:
    """``jax.shard_map`` over ``axes`` that the surrounding one leaves out, differentiable in every
    mode. ``in_specs`` is a prefix of the arguments' tree."""

    def call(*args):
        leaves, tree = jax.tree.flatten(args)
        specs = jax.tree.leaves(jax.tree.broadcast(tuple(in_specs), args))
        nested = lambda *leaves: function(*tree.unflatten(leaves))  # noqa: E731
        shapes = jax.eval_shape(_mapped(nested, axes, specs, out_specs), *leaves)
        outs, out_tree = jax.tree.flatten(shapes)
        out_leaf_specs = jax.tree.leaves(jax.tree.broadcast(out_specs, shapes))
        moves = [jnp.issubdtype(x.dtype, jnp.inexact) for x in outs]
        # What has a derivative comes first.
        order = sorted(range(len(outs)), key=lambda i: not moves[i])

        def ordered(*leaves):
            out = jax.tree.leaves(nested(*leaves))
            return tuple(out[i] for i in order)

        of_outs = tuple(out_leaf_specs[i] for i in order)
        results = _differentiable(ordered, axes, specs, of_outs, sum(moves))(*leaves)
        return out_tree.unflatten([x for _, x in sorted(zip(order, results, strict=True))])

    return call


def _mapped(function: Callable, axes: Axes, in_specs: Sequence, out_specs: Any) -> Callable:
    specs = {"in_specs": tuple(in_specs), "out_specs": out_specs}
    return jax.shard_map(function, axis_names={*axes}, **specs)


def _differentiable(
    function: Callable, axes: Axes, specs: list, of_outs: tuple, count: int
) -> Callable:
    """Of arrays, one an argument; the first ``count`` of the outputs have derivatives."""

    def of_some(active, present, values):
        """The outputs that are present, as a function of the active arguments."""

        def of_active(*some):
            some = iter(some)
            full = [next(some) if a else x for a, x in zip(active, values, strict=True)]
            return tuple(compress(function(*full), present))

        return of_active, list(compress(values, active))

    def forward(_, *values):
        # By the rule itself: this pass may be differentiated in turn.
        return rule(*values), values

    def backward(active, values, cts):
        present = [not isinstance(ct, SymbolicZero | None) for ct in cts[:count]]

        def local(*args):
            some, cts = of_some(active, present, args[: len(values)]), args[len(values) :]
            return jax.vjp(some[0], *some[1])[1](cts)

        ins = [*specs, *compress(of_outs, present)]
        outs = tuple(compress(specs, active))
        given = *values, *compress(cts, present)
        pulled = iter(_differentiable(local, axes, ins, outs, len(outs))(*given))
        return tuple(next(pulled) if a else None for a in active)

    def tangent(values, tangents):
        moving = moving_of(tangents)

        def local(*args):
            function, some = of_some(moving, [True] * count, args[: len(values)])
            return jax.jvp(function, some, list(args[len(values) :]))[1]

        ins = [*specs, *compress(specs, moving)]
        given = *values, *compress(tangents, moving)
        return _differentiable(local, axes, ins, of_outs[:count], count)(*given)

    rule = differentiable(
        _mapped(function, axes, specs, of_outs), forward, backward, tangent, asks=True
    )
    return rule
