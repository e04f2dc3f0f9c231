"""The product ``hidden @ kernel`` of some tokens, and its gradients.

Letters: n tokens, D features, V columns of the kernel, C classes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._types import Axes
from jaxloss._xla.dtypes import accumulator_dtype, held_dtype


class Geometry(NamedTuple):
    """What is static about ``hidden @ kernel``."""

    vocab_axis: int  # of the kernel, 0 or 1
    num_classes: int  # C <= V
    chunk: int  # n
    precision: Any
    teacher_axis: int = 1  # the vocabulary's, of a teacher's kernel
    # On a mesh, inside of shard_map, whose types say what the gradients are sums over:
    vocab_axes: Axes = ()  # the columns are split over; the loops' steps then communicate
    token_axes: Axes = ()  # the tokens are split over, and a sum is over all of them
    gathered: tuple[tuple[int, Axes], ...] = ()  # axes of the kernel that are split over tokens'


def _dot(x: Array, y: Array, axis_x: int, axis_y: int, geometry: Geometry, out: Any = None):
    contract = (((axis_x,), (axis_y,)), ((), ()))
    out = out or accumulator_dtype(x.dtype)
    return lax.dot_general(x, y, contract, geometry.precision, preferred_element_type=out)


def product(hidden: Array, kernel: Array, bias: Array | None, geometry: Geometry) -> Array:
    x = _dot(hidden, kernel, 1, 1 - geometry.vocab_axis, geometry)
    if bias is not None:
        x = x + bias.astype(x.dtype)[None]
    return x[:, : geometry.num_classes]


def of_teacher(geometry: Geometry) -> Geometry:
    """The geometry of its product."""
    return geometry._replace(vocab_axis=geometry.teacher_axis)


def gathered(kernel: Array, geometry: Geometry) -> Array:
    for axis, names in geometry.gathered:
        kernel = lax.all_gather(kernel, names, axis=axis, tiled=True)
    return kernel


def scattered(g: Any, geometry: Geometry) -> Any:
    """The transpose of :func:`gathered`."""
    for axis, names in geometry.gathered[::-1]:
        g = None if g is None else lax.psum_scatter(g, names, scatter_dimension=axis, tiled=True)
    return g


def d_hidden(dx: Array, kernel: Array, geometry: Geometry) -> Array:
    return _dot(dx, kernel, 1, geometry.vocab_axis, geometry)


def d_kernel(dx: Array, hidden: Array, geometry: Geometry, out: Any = None) -> Array:
    first, second = (hidden, dx) if geometry.vocab_axis == 1 else (dx, hidden)
    return _dot(first, second, 0, 0, geometry, out)


def product_gradients(
    dx: Array, real: Array, hidden: Array, kernel: Array, active, geometry, alone: bool = False
):
    """Those of the ``active`` of (hidden, kernel, bias), from the logits'; ``real[n]``: a token.

    ``alone``: the kernel's has no others to be added to.
    """
    # No token, no gradient: a loss that is not finite at hidden = 0 must not leak.
    dx = jnp.where(real[:, None], dx, 0)
    dx = jnp.pad(dx, ((0, 0), (0, kernel.shape[geometry.vocab_axis] - dx.shape[1])))
    of_hidden, of_kernel, of_bias = active
    d_bias = jnp.sum(dx, axis=0) if of_bias else None
    # Formed in float32, narrowed once: the products take the operands' dtype.
    dx = dx.astype(hidden.dtype)
    if of_hidden and of_kernel and jax.default_backend() == "tpu":
        # Or XLA:TPU computes them twice, as parts of the two products, not to hold them.
        dx = lax.optimization_barrier(dx)
    # On a GPU alone the product is asked for narrow sums (it adds in float32 all the same): there
    # XLA would narrow them in a pass of its own, elsewhere it needs no asking.
    out = held_dtype(kernel.dtype) if alone and jax.default_backend() == "gpu" else None
    return (
        d_hidden(dx, kernel, geometry) if of_hidden else None,
        d_kernel(dx, hidden, geometry, out) if of_kernel else None,
        d_bias,
    )
