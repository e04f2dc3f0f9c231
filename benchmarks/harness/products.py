"""How many products of N x D x V a program is written with (XLA may make one of two equal ones).

XLA says nothing of loops, so a program of JAX is evaluated here one operation at a time, each loop
as often as its condition says.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal


def _inner(params: dict[str, Any]) -> Any:
    """The program that a call (of jit, custom_vjp, remat) consists of, if it is one."""
    for name in ("jaxpr", "call_jaxpr", "fwd_jaxpr", "call"):
        if name in params:
            return params[name]
    return None


def _dot_flops(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    across = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    return 2 * across * math.prod(eqn.outvars[0].aval.shape)


def _evaluate(program: Any, args: Sequence[Any]) -> tuple[list[Any], int]:
    """(results, flops of its matrix products)"""
    # Open or closed, which are one class in newer JAX.
    jaxpr, consts, flops = getattr(program, "jaxpr", program), getattr(program, "consts", ()), 0
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        params, name = eqn.params, eqn.primitive.name
        if name == "while":
            n = params["cond_nconsts"]
            cond, body = values[:n], values[n : n + params["body_nconsts"]]
            out = values[n + len(body) :]
            while bool(_evaluate(params["cond_jaxpr"], [*cond, *out])[0][0]):
                out, more = _evaluate(params["body_jaxpr"], [*body, *out])
                flops += more
        elif name == "scan":
            body = params["jaxpr"]
            inner = getattr(body, "jaxpr", body)
            # What is stacked has an axis more outside. (How JAX says which changed in 0.11.)
            ranks = zip(eqn.outvars, inner.outvars, strict=True)
            carried = sum(o.aval.ndim == i.aval.ndim for o, i in ranks)
            ranks = zip(eqn.invars, inner.invars, strict=True)
            k = sum(o.aval.ndim == i.aval.ndim for o, i in ranks)
            n, carry, stacked = k - carried, values[k - carried : k], []
            steps = range(params["length"])
            for i in reversed(steps) if params["reverse"] else steps:
                step = [*values[:n], *carry, *(x[i] for x in values[k:])]
                results, more = _evaluate(body, step)
                carry, flops = results[:carried], flops + more
                stacked.append(results[carried:])
            stacked = stacked[::-1] if params["reverse"] else stacked
            out = [*carry, *(jnp.stack(x) for x in zip(*stacked, strict=True))]
        elif name == "cond":
            out, more = _evaluate(params["branches"][int(values[0])], values[1:])
            flops += more
        elif (inner := _inner(params)) is not None:
            out, more = _evaluate(inner, values)
            flops += more
        else:
            flops += _dot_flops(eqn) if name == "dot_general" else 0
            out = eqn.primitive.bind(*values, **params)
            out = out if eqn.primitive.multiple_results else [out]
        env.update(zip(eqn.outvars, out, strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars], flops


def jax_products(function: Callable, args: Sequence[Any], shape: tuple[int, int, int]) -> float:
    program = jax.make_jaxpr(function)(*args)
    return _evaluate(program, jax.tree.leaves(args))[1] / (2 * math.prod(shape))
