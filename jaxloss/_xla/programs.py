"""A traced function, run where its values may differ between devices that it was traced without.

The type of a value inside of ``shard_map`` says over which mesh axes the value varies. A program
that was traced with one array the same on all devices brings it together with those that vary by a
``pvary``, whose transpose is a sum over the devices. Where the array varies by now, nothing is to
be done there: its gradient is summed elsewhere, once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax

from jaxloss._xla import mesh


def run(jaxpr: Any, consts: list, axes: frozenset, *args: Any) -> list:
    """The outputs of ``jaxpr``. Its arrays may vary over more of the mesh ``axes`` than its types
    say."""
    from jax.extend.core import Literal  # it brings Pallas, a third of the whole import

    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(x):
        return x.val if isinstance(x, Literal) else values[x]

    for eqn in jaxpr.eqns:
        with eqn.ctx.manager:
            out = _apply(eqn, axes, [read(x) for x in eqn.invars])
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _apply(eqn: Any, axes: frozenset, args: list) -> Any:
    name, params = eqn.primitive.name, eqn.params
    if name == "pvary":
        return mesh.varying(args, params["axes"])
    if name in ("jit", "pjit"):
        return _function(params["jaxpr"], axes)(*args)
    if name in ("scan", "while", "cond", "remat2", "checkpoint"):
        # All vary alike: a loop's state must have one type from step to step.
        return _CONTROL[name](params, axes, mesh.varying(args, axes))
    given = eqn.primitive.get_bind_params(params)
    out = eqn.primitive.bind(*mesh.varying_alike(*args), **given)
    return out if eqn.primitive.multiple_results else [out]


def _function(closed: Any, axes: frozenset, alike: bool = False) -> Callable[..., list]:
    """A closed program as a function. ``alike``: all that it returns varies over all axes."""

    def call(*args):
        out = run(closed.jaxpr, closed.consts, axes, *args)
        return mesh.varying(out, axes) if alike else out

    return call


def _scan(params: dict, axes: frozenset, args: list) -> list:
    if "ft_in" in params:  # JAX 0.12
        consts, init, xs = (list(part) for part in params["ft_in"].update(args).unpack())
    else:
        first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
        consts, init, xs = args[:first], args[first:last], args[last:]
    state = len(init)
    step = _function(params["jaxpr"], axes, alike=True)

    def body(carry, x):
        out = step(*consts, *carry, *x)
        return out[:state], out[state:]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(body, init, xs, **options)
    return [*carry, *ys]


def _while(params: dict, axes: frozenset, args: list) -> list:
    first, second = params["cond_nconsts"], params["body_nconsts"]
    of_test, of_body = args[:first], args[first : first + second]
    test = _function(params["cond_jaxpr"], axes)
    step = _function(params["body_jaxpr"], axes, alike=True)
    return lax.while_loop(
        lambda state: test(*of_test, *state)[0],
        lambda state: step(*of_body, *state),
        args[first + second :],
    )


def _cond(params: dict, axes: frozenset, args: list) -> list:
    index, *operands = args
    branches = [_function(branch, axes, alike=True) for branch in params["branches"]]
    return lax.switch(index, branches, *operands)


def _checkpoint(params: dict, axes: frozenset, args: list) -> list:
    options = {name: params[name] for name in ("policy", "prevent_cse")}
    return jax.checkpoint(partial(run, params["jaxpr"], [], axes), **options)(*args)


_CONTROL = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "remat2": _checkpoint,
    "checkpoint": _checkpoint,
}
