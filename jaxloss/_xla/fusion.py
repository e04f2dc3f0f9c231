"""What XLA:CPU fuses into one pass: barriers between passes over the same rows, whose operands it
would write out for both, and comparisons in arithmetic."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxloss._xla import mesh
from jaxloss._xla.dtypes import accumulator_dtype


def opaque(m: Array, *numbers: ArrayLike) -> tuple[Array, ...]:
    """``m[...]``, whose derivative stops here, and constants.

    XLA:CPU writes out the broadcast of what several passes share, of a constant too, but not of
    what a barrier gives; barriers of the same operands are one.
    """
    m = lax.stop_gradient(m)
    return lax.optimization_barrier((m, *(jnp.asarray(x, m.dtype) for x in numbers)))


@jax.custom_jvp
def reread(x: Array, with_it: Any) -> tuple[Array, Any]:
    """Both, for one more pass over ``x``: XLA:CPU would merge its conversion with another pass's,
    and write a float32 copy out for the two. Barriers of the same operands would be merged too."""
    return lax.optimization_barrier((x, with_it))


@reread.defjvp
def _(primals, tangents):
    # JAX 0.11 and 0.12 cannot transpose a barrier of which one operand alone has a tangent; 0.10
    # takes all of its results as differing over whatever axes of a mesh any operand differs over.
    out = reread(*primals)
    return out, jax.tree.map(lambda t, x: mesh.varying(t, mesh.varies_over(x)), tangents, out)


def lies_below(x: Array, m: Array, value: float) -> Array:
    """``value`` where ``x[..., C]`` is more than a few roundings below ``m``, 0 elsewhere: for a
    summand."""
    info = jnp.finfo(x.dtype)
    # No less than the smallest float: -inf lies below that too, and -inf less -inf is NaN.
    bound = jnp.maximum(m - 4 * info.eps * jnp.abs(m) - info.tiny, info.min)
    bound, steep, zero, most = opaque(bound, 1 / info.tiny, 0, value)
    # The maximum stands between the factors, or XLA folds them to inf (0 * inf is NaN); right under
    # the minimum it would make a clamp of both, which XLA:CPU writes out.
    difference = lax.stop_gradient(bound[..., None] - x)  # a step has no slope
    return jnp.minimum(jnp.maximum(difference * steep, zero) * steep, most)


def class_index(x: Array) -> Array:
    index = jnp.arange(x.shape[-1], dtype=accumulator_dtype(x.dtype))
    return index.reshape((1,) * (x.ndim - 1) + index.shape)


def index_is_exact(x: Array) -> bool:
    return x.shape[-1] <= 2 ** (jnp.finfo(accumulator_dtype(x.dtype)).nmant + 1)
