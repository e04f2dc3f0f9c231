"""Barriers between passes over the same rows, whose operands XLA:CPU would write out for both."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxloss._xla import mesh


def behind_barrier(m: Array, *numbers: ArrayLike) -> tuple[Array, ...]:
    """``m[...]``, whose derivative stops here, and constants.

    XLA:CPU writes out the broadcast of what several passes share, of a constant too, but not of
    what a barrier gives; barriers of the same operands are one.
    """
    m = lax.stop_gradient(m)
    return lax.optimization_barrier((m, *(jnp.asarray(x, m.dtype) for x in numbers)))


@jax.custom_jvp
def apart(x: Array, with_it: Any) -> tuple[Array, Any]:
    """Both, for one more pass over ``x``: XLA:CPU would merge its conversion with another pass's,
    and write a float32 copy out for the two. Barriers of the same operands would be merged too."""
    return lax.optimization_barrier((x, with_it))


@apart.defjvp
def _(primals, tangents):
    # JAX 0.11 and 0.12 cannot transpose a barrier of which one operand alone has a tangent; 0.10
    # takes all of its results as differing over whatever axes of a mesh any operand differs over.
    out = apart(*primals)
    return out, jax.tree.map(lambda t, x: mesh.varying(t, mesh.varies_over(x)), tangents, out)
