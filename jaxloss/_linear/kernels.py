"""The kernels that a product takes: an array, an array of few bits, either with an update.

The only file that knows one kind from another. ``dot(x, y, axis_x, axis_y)`` is a product that
contracts these axes and accumulates in float32 or wider.

Letters: n tokens, D features, V columns of the kernel, B columns of a block, r the update's rank.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from jaxloss._linear import blocks, budget, packing
from jaxloss._numerics import parts
from jaxloss._types import Axes, QuantizedKernel, is_low_rank, is_quantized
from jaxloss._xla import mesh
from jaxloss._xla.dtypes import accumulator_dtype, upcast

Dot = Callable[[Array, Array, int, int], Array]


def base_of(kernel: Any) -> Array:
    """The array ``[D, V]``, or ``[V, D]``, whose shape the kernel has."""
    if is_low_rank(kernel):
        return base_of(kernel.kernel)
    return kernel.values if is_quantized(kernel) else kernel


def is_array(kernel: Any) -> bool:
    return not is_low_rank(kernel) and not is_quantized(kernel)


def nothing(kernel: Any) -> Any:
    """None in place of every array of the kernel."""
    return jax.tree.map(lambda _: None, kernel)


def block(kernel: Any, start: Any, size: int, vocab_axis: int) -> Any:
    """The columns from ``start`` on."""

    def cut(x, axis):
        return lax.dynamic_slice_in_dim(x, start, size, axis)

    if is_low_rank(kernel):
        base = block(kernel.kernel, start, size, vocab_axis)
        return replace(kernel, kernel=base, b=cut(kernel.b, 1))
    if is_quantized(kernel):
        return QuantizedKernel(cut(kernel.values, vocab_axis), cut(kernel.scale, -1))
    return cut(kernel, vocab_axis)


def columns_at(kernel: Any, index: Array, vocab_axis: int, dtype: Any, dot: Dot) -> Array:
    """The columns at ``index[n]`` as rows, [n, D], as products of the dtype have them; 0 past the
    last."""

    def taken(x):
        return jnp.take(x, index, axis=-1, mode="fill", fill_value=0)

    def rows_of(x):
        return packing.gather_rows(x, index) if vocab_axis == 0 else taken(x).T

    if is_low_rank(kernel):
        base = columns_at(kernel.kernel, index, vocab_axis, dtype, dot)
        return upcast(base) + dot(taken(kernel.b).T.astype(dtype), kernel.a.astype(dtype), 1, 1)
    if not is_quantized(kernel):
        return rows_of(kernel)
    some = QuantizedKernel(rows_of(kernel.values), taken(kernel.scale))
    values, factor = _widened(some, 0, dtype)
    if factor is None:
        return values
    values = upcast(values)
    return values * factor.astype(values.dtype)[:, None]


def weighted_columns(kernel: Any, weight: Array, vocab_axis: int, dtype: Any) -> Array:
    """``sum_c weight[c] K[:, c]``, [D] and wide, of the kernel as products of the dtype have it: a
    pass over the kernel, and no copy of it."""

    def total(x, weight, axis):
        of_columns = weight[:, None] if axis == 0 else weight[None]
        return jnp.sum(upcast(x.astype(dtype)) * of_columns, axis=axis)

    if is_low_rank(kernel):
        update = upcast(kernel.a.astype(dtype)) * total(kernel.b, weight, 1)[None]
        base = weighted_columns(kernel.kernel, weight, vocab_axis, dtype)
        return base + jnp.sum(update, axis=1)
    if not is_quantized(kernel):
        return total(kernel, weight, vocab_axis)
    values, factor = _widened(kernel, vocab_axis, dtype)
    weight = weight if factor is None else weight * factor.astype(weight.dtype)
    return total(values, weight, vocab_axis)


def gathered(kernel: Any, over: tuple[tuple[int, Axes], ...], vocab_axis: int) -> Any:
    """The kernel without the split over the devices that have other tokens. ``over``: the axes of
    the kernel, each with the axes of the mesh that split it."""
    if is_low_rank(kernel):  # each device has all of a and b
        return replace(kernel, kernel=gathered(kernel.kernel, over, vocab_axis))

    def whole(x, pairs):
        for axis, names in pairs:
            x = lax.all_gather(x, names, axis=axis, tiled=True)
        return x

    if is_quantized(kernel):
        of_columns = [(kernel.scale.ndim - 1, names) for axis, names in over if axis == vocab_axis]
        return QuantizedKernel(whole(kernel.values, over), whole(kernel.scale, of_columns))
    return whole(kernel, over)


def specs(kernel: Any, entries: tuple, vocab_axis: int, vocab_axes: Axes) -> Any:
    """The ``PartitionSpec`` of each array of a kernel whose axes are split as ``entries`` say, its
    columns over ``vocab_axes`` for good."""
    *heads, _, _ = entries
    if is_low_rank(kernel):
        base = specs(kernel.kernel, entries, vocab_axis, vocab_axes)
        return replace(kernel, kernel=base, a=P(), b=P(*heads, None, vocab_axes or None))
    if is_quantized(kernel):
        of_scale = (*(None for _ in kernel.scale.shape[1:]), entries[-2:][vocab_axis])
        return replace(kernel, values=P(*entries), scale=P(*of_scale))
    return P(*entries)


def times(x: Array, kernel: Any, vocab_axis: int, dot: Dot) -> Array:
    """``x[n, D] @ kernel``: ``[n, V]``, wide. The products are of the dtype of ``x``."""
    if is_low_rank(kernel):
        update = dot(_inner(x, kernel, dot), kernel.b.astype(x.dtype), 1, 0)
        return times(x, kernel.kernel, vocab_axis, dot) + update
    if not is_quantized(kernel):
        return dot(x, kernel.astype(x.dtype), 1, 1 - vocab_axis)

    def of_block(start, size):
        values, factor = _widened(block(kernel, start, size, vocab_axis), vocab_axis, x.dtype)
        y = dot(x, values, 1, 1 - vocab_axis)
        return start, y if factor is None else y * factor.astype(y.dtype)[None]

    def put(out, new):
        start, y = new
        return lax.dynamic_update_slice_in_dim(out, y, start, 1)

    def begin(new):
        _, y = new
        return put(
            mesh.varying(jnp.zeros((x.shape[0], columns), y.dtype), mesh.varies_over(y)), new
        )

    columns = kernel.values.shape[vocab_axis]
    return blocks.over_blocks(columns, _block_size(kernel, vocab_axis), of_block, put, begin)


def times_transposed(dx: Array, kernel: Any, vocab_axis: int, dtype: Any, dot: Dot) -> Array:
    """``dx[n, V]`` times the kernel's transpose: ``[n, D]``, wide, by products of the dtype."""
    if is_low_rank(kernel):
        inner = dot(dx.astype(dtype), kernel.b.astype(dtype), 1, 1)
        update = dot(inner.astype(dtype), kernel.a.astype(dtype), 1, 1)
        return times_transposed(dx, kernel.kernel, vocab_axis, dtype, dot) + update
    if not is_quantized(kernel):
        return dot(dx.astype(dtype), kernel.astype(dtype), 1, vocab_axis)

    def of_block(start, size):
        values, factor = _widened(block(kernel, start, size, vocab_axis), vocab_axis, dtype)
        own = lax.dynamic_slice_in_dim(dx, start, size, 1)
        if factor is None:
            return dot(own.astype(dtype), values, 1, vocab_axis)
        factor = factor.astype(own.dtype)
        unit = _unit_of(factor, dtype)
        own = own * (factor if unit is None else factor / unit)[None]
        product = dot(own.astype(dtype), values, 1, vocab_axis)
        return product if unit is None else product * unit

    columns = kernel.values.shape[vocab_axis]
    return blocks.over_blocks(columns, _block_size(kernel, vocab_axis), of_block, jnp.add)


def gradient(
    x: Array, dx: Array, kernel: Any, active: Any, vocab_axis: int, dot: Callable, out: Any = None
) -> Any:
    """Of each active array of the kernel, None for the others. ``dx[n, V]`` has the dtype of
    ``x[n, D]``; ``out``: the dtype of an array's gradient, None: a wide one."""
    if is_low_rank(kernel):
        d_a = d_b = None
        if active.a:
            d_a = dot(x, dot(dx, kernel.b.astype(x.dtype), 1, 1).astype(x.dtype), 0, 0)
        if active.b:
            d_b = dot(_inner(x, kernel, dot), dx, 0, 0)
        return replace(kernel, kernel=nothing(kernel.kernel), a=d_a, b=d_b)
    if is_quantized(kernel) or not active:
        return nothing(kernel)
    first, second = (x, dx) if vocab_axis == 1 else (dx, x)
    return dot(first, second, 0, 0, out)


def for_blocks(of_block: Any) -> Any:
    """A block's gradient without what is a sum over the blocks; see :func:`with_block`."""
    return replace(of_block, a=None) if is_low_rank(of_block) else of_block


def with_block(total: Any, of_block: Any, start: Any, vocab_axis: int) -> Any:
    """The kernel's gradient and that of the block of columns from ``start`` on."""

    def put(x, g, axis):
        if x is None:
            return None
        return lax.dynamic_update_slice_in_dim(x, g.astype(x.dtype), start, axis)

    if is_low_rank(total):
        return replace(total, a=parts.add(total.a, of_block.a), b=put(total.b, of_block.b, 1))
    return total if is_quantized(total) else put(total, of_block, vocab_axis)


def _inner(x: Array, kernel: Any, dot: Dot) -> Array:
    if jax.default_backend() == "gpu":
        # XLA:GPU (JAX 0.10, 0.12) makes one product of two that share an operand, where one is
        # small: it would copy the kernel for each chunk, to have ``a`` beside it.
        x = lax.optimization_barrier(x)
    return dot(x, kernel.a.astype(x.dtype), 1, 0).astype(x.dtype)


def _widened(part: Any, vocab_axis: int, dtype: Any) -> tuple[Array, Array | None]:
    """``(values, factor)`` of a block in the product's dtype; ``factor[B]`` multiplies what the
    columns give, None: ``values`` contain the scale."""
    if part.scale.ndim == 1:
        return part.values.astype(dtype), part.scale
    wide = accumulator_dtype(dtype)
    values, scale = part.values, part.scale.astype(wide)
    groups, columns = scale.shape
    if vocab_axis == 1:
        each, scale = values.reshape(groups, -1, columns), scale[:, None, :]
    else:
        each, scale = values.reshape(columns, groups, -1), scale.T[:, :, None]
    return (each.astype(wide) * scale).astype(dtype).reshape(values.shape), None


def _unit_of(factor: Array, dtype: Any) -> Array | None:
    """What a block's factors are divided by until its product is made; None: nothing.

    float16 ends at 6e-8. A scale of 1e-4 beside a probability of 1e-6 would be lost there, where
    the probability beside a kernel of float16 is not.
    """
    if dtype != jnp.float16:
        return None
    largest = jnp.max(jnp.abs(factor))
    return jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)


def _block_size(kernel: Any, vocab_axis: int) -> int:
    features, columns = kernel.values.shape[1 - vocab_axis], kernel.values.shape[vocab_axis]
    return budget.widened_columns(features, columns)
