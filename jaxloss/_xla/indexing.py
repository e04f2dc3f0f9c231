"""Entries of rows by their index, where the rows may be split over devices."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from jaxloss._xla import mesh


def of_rank(x: Any, rank: int) -> Any:
    """Leading axes of size 1: nothing is promoted in rank silently."""
    return None if x is None else x.reshape((1,) * (rank - x.ndim) + x.shape)


def local_index(index: Array, start: Any, size: int) -> Array:
    """The class's place among the ``size`` from ``start`` on; ``size``: it is not among them."""
    return jnp.where((index >= start) & (index < start + size), index - start, size)


def is_at(x: Array, index: Array) -> Array:
    """Which entries of ``x[..., C]`` are at ``index[...]``."""
    split = jax.typeof(x).sharding if classes_are_split(x) else None
    iota = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1, out_sharding=split)
    return iota == index[..., None]


def classes_are_split(x: Array) -> bool:
    """Over the devices of an explicit mesh, where JAX refuses to gather from them."""
    spec = jax.typeof(x).sharding.spec
    return len(spec) == x.ndim and spec[-1] is not None


def is_split(x: Array) -> bool:
    """Over the devices of an explicit mesh in any axis, where JAX refuses to scatter."""
    return any(entry is not None for entry in jax.typeof(x).sharding.spec)


def has_open_size(x: Array) -> bool:
    """Whether jax.export leaves a size open: JAX puts nothing along an axis there."""
    return not all(isinstance(n, int) for n in x.shape)


def _only(here: Array, x: Array, axis: int) -> Array:
    """The one entry of ``x`` that is here along the axis; 0: none is."""
    x = jnp.where(here, x, jnp.zeros((), x.dtype))
    return jnp.any(x, axis=axis) if x.dtype == bool else jnp.sum(x, axis=axis)


def gather_class(x: Array, index: Array) -> Array:
    """x[..., index], or the last entry where the index is past the end."""
    index = jnp.minimum(index, x.shape[-1] - 1)
    if classes_are_split(x):
        return _only(is_at(x, index), x, -1)
    index = index[..., None]
    return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds")[..., 0]


def gather_classes(x: Array, index: Array) -> Array:
    """x[..., index[..., k]], the last entry where an index is past the end."""
    index = jnp.minimum(index, x.shape[-1] - 1)
    if classes_are_split(x):
        return jax.vmap(gather_class, in_axes=(None, -1), out_axes=-1)(x, index)
    return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds")


def looked_up(table: Array, index: Array) -> Array:
    """table[index[...]], split as the index is."""
    split = jax.typeof(index).sharding
    told = any(split.spec)  # JAX wants to be
    if not told or not mesh.manual_axes():
        return table.at[index].get(out_sharding=split if told else None)
    # A gather that is told has no gradient inside of shard_map over other axes.
    table, index = mesh.varying_alike(table, index)  # or all rows of its gradient would be sent
    split = jax.NamedSharding(split.mesh, P(*split.spec, None))
    shape = (*index.shape, table.shape[0])
    x = lax.broadcast_in_dim(table, shape, (index.ndim,), out_sharding=split)
    return _only(is_at(x, index), x, -1)


def scatter_classes(x: Array, index: Array, values: Array) -> Array:
    """``x`` with ``values[..., k]`` at the distinct ``index[..., k]``; past the end: nowhere."""
    if is_split(x) or has_open_size(x):
        hit = is_at(x[..., None, :], index)
        return jnp.where(jnp.any(hit, axis=-2), _only(hit, values[..., None], -2), x)
    return _scatter_bits(x, index, values) if x.dtype.itemsize == 2 else _scatter(x, index, values)


def _scatter(x: Array, index: Array, values: Array) -> Array:
    return jnp.put_along_axis(x, index, values, axis=-1, inplace=False, mode="drop")


@jax.custom_jvp
def _scatter_bits(x: Array, index: Array, values: Array) -> Array:
    """Of floats of 16 bits, which XLA:CPU scatters by way of a float32 copy."""
    bits, of_values = (lax.bitcast_convert_type(v, jnp.uint16) for v in (x, values))
    return lax.bitcast_convert_type(_scatter(bits, index, of_values), x.dtype)


@_scatter_bits.defjvp
def _scatter_bits_jvp(primals, tangents):
    # Bits have no derivative. Not _put of the tangents, which JAX cannot transpose.
    (x, index, values), (dx, _, d_values) = primals, tangents
    along = (x, values), (dx, d_values)
    return _scatter_bits(*primals), jax.jvp(lambda x, values: _scatter(x, index, values), *along)[1]


def is_elsewhere(x: Array, index: Array) -> Array:
    """Which entries of ``x[..., C]`` are at none of ``index[..., k]``."""
    return scatter_classes(jnp.ones_like(x, bool), index, jnp.zeros_like(index, bool))
