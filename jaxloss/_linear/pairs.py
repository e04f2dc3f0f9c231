"""Sums over the similarities ``scale * x @ y.T + bias``, a chunk of their rows at a time.

A chunk's similarities ``[n, M]`` live for one step of the loop, and give a part of the sums of its
rows and of all columns. Where the pairs are split over devices, each device keeps its rows of x,
and the rows of y go round a ring, with what has been summed of their columns: after as many steps
as there are devices they are home again, and no device has held more than two parts of y.

The backward pass computes the similarities again and takes two products more: four in all.

Letters: N pairs of this device, n of them in a chunk, M rows of y, D features.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._linear.product import Product, Sweep
from jaxloss._numerics.pairs import Sums, along
from jaxloss._types import Axes
from jaxloss._xla import mesh
from jaxloss._xla.derivatives import differentiable, jvp_of_moving
from jaxloss._xla.dtypes import upcast


class Operands(NamedTuple):
    """What is differentiated, None where there is none; or something for each of them."""

    x: Any  # [N, D]
    y: Any  # [M, D], M >= N: its first N rows are the pairs'
    scale: Any  # []
    bias: Any = None  # []


class Masks(NamedTuple):
    """What exists; None: all of it."""

    rows: Any = None  # [N]
    columns: Any = None  # [M]
    entries: Any = None  # [N, M of all devices], in the devices' order


class Way(NamedTuple):
    """What is static."""

    sums: Sums
    sweep: Sweep
    both: bool  # of the columns too
    precision: Any


class Tile(NamedTuple):
    """A chunk of rows, and the rows of y of one device."""

    operands: Operands  # x[n, D], y[M, D]
    left_out: Array  # [n, M]: the pairs, and what does not exist
    rows: tuple  # what else has a row a row of x
    columns: tuple  # likewise of y


def sums_of_others(way: Way, operands: Operands, masks: Masks) -> tuple[Array, ...]:
    """Of each row (and ``both``: of each column) the sum over the entries that are no pair's."""

    def value(operands, masks):
        return _results(way, operands, masks)

    def forward(_, operands, masks):
        # By the rule itself: what the backward pass reads of it may be differentiated in turn.
        out = rule(operands, masks)
        return out, (operands, masks, out)

    def backward(active, saved, ct):
        operands, masks, results = saved
        return _gradients(way, active[0], operands, masks, results, ct), None

    def tangent(saved, tangents):
        operands, masks, results = saved
        return _tangents(way, operands, masks, results, tangents[0])

    rule = differentiable(value, forward, backward, tangent, asks=True, whole=False)
    return rule(operands, masks)


def of_pairs(operands: Operands) -> Array:
    """``[N]``: the similarities of the pairs themselves."""
    x, y, scale, bias = operands
    z = scale * jnp.sum(upcast(x) * upcast(y[: x.shape[0]]), axis=1)
    return z if bias is None else z + bias


def _product(way: Way, operands: Operands) -> Product:
    columns = operands.y.shape[0]
    return Product(operands.x, operands.y, None, 0, columns, way.precision)


def _others(way: Way, operands: Operands, left_out: Array) -> tuple[Array, Array]:
    """``(z, the bare products)``; z is -inf where an entry is left out."""
    products = _product(way, operands).logits()
    z = operands.scale * products
    z = z if operands.bias is None else z + operands.bias
    return jnp.where(left_out, -jnp.inf, z), products


def _left_out(masks: Masks, shape: tuple[int, int], start: Any, place: Any, is_own: Any) -> Array:
    """``masks`` of a chunk's rows from ``start`` on; the columns are those of the device at
    ``place`` in the ring."""
    rows, columns, entries = masks
    pair = start + lax.broadcasted_iota(jnp.int32, shape, 0)
    out = (pair == lax.broadcasted_iota(jnp.int32, shape, 1)) & is_own
    if rows is not None:
        out |= ~rows[:, None]
    if columns is not None:
        out |= ~columns[None]
    if entries is not None:
        out |= ~lax.dynamic_slice_in_dim(entries, place * shape[1], shape[1], axis=1)
    return out


def _over_tiles(
    way: Way,
    operands: Operands,
    masks: Masks,
    beside: tuple[tuple, tuple],
    nothing: tuple[Any, Any],
    part: Callable[[Tile], tuple],
    add: Callable | None = None,
    divides: bool = False,
) -> tuple[Any, Any]:
    """The sums over all tiles of ``part(tile)``, which is something of the tile's rows, and of its
    columns.

    ``beside``: a tile's ``rows`` and ``columns``. ``nothing``: the sums of no tile. ``add``: of two
    sums; None: they are sums of numbers. ``divides``: it is known that a chunk divides the rows.
    """
    axes = way.sweep.token_axes
    x, y, *numbers = operands
    if not isinstance(x.shape[0], int) and not divides:
        return _over_open_tiles(way, operands, masks, beside, nothing, part, add)
    rows, columns = (x, masks.rows, masks.entries, beside[0]), (y, masks.columns, beside[1])
    given = mesh.varying((rows, columns, numbers, nothing), axes)
    rows, columns, numbers, state = mesh.varying_alike(*given)
    size, chunk, add = x.shape[0], way.sweep.chunk, add or partial(jax.tree.map, jnp.add)
    if isinstance(size, int) and size == 0:
        return state
    first = (size % chunk or chunk) if isinstance(size, int) else 0

    @partial(jax.checkpoint, static_argnums=0)
    def part_of_chunk(size, start, rows, columns, numbers, place, is_own):
        x, exist, entries, of_rows = _cut(rows, start, size)
        y, exist_columns, of_columns = columns
        of_tile = Masks(exist, exist_columns, entries)
        out = _left_out(of_tile, (size, y.shape[0]), start, place, is_own)
        return part(Tile(Operands(x, y, *numbers), out, of_rows, of_columns))

    def with_chunk(state, start, size, columns, *which):
        of_rows, of_columns = state
        here, there = part_of_chunk(size, start, rows, columns, numbers, *which)
        here = add(_cut(of_rows, start, size), here)
        put = partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return jax.tree.map(put, of_rows, here), add(of_columns, there)

    def with_block(state, columns, *which):
        if first:
            state = with_chunk(state, 0, first, columns, *which)
        if isinstance(size, int) and first == size:
            return state

        def step(state, i):
            return with_chunk(state, first + i * chunk, chunk, columns, *which), None

        return lax.scan(step, state, jnp.arange((size - first) // chunk, dtype=jnp.int32))[0]

    return _around(axes, with_block, state, columns)


def _over_open_tiles(way, operands, masks, beside, nothing, part, add):
    """:func:`_over_tiles` of a number of rows that ``jax.export`` leaves open: with so many more,
    which do not exist, that a chunk divides them."""
    size, chunk = operands.x.shape[0], way.sweep.chunk
    more = chunk * ((size + chunk - 1) // chunk) - size  # JAX sees: at least one chunk

    def padded(v):
        return lax.pad(v, jnp.zeros((), v.dtype), [(0, more, 0)] + [(0, 0, 0)] * (v.ndim - 1))

    exist = jnp.ones(size, bool) if masks.rows is None else masks.rows
    x, exist, entries, of_rows, blank = jax.tree.map(
        padded, (operands.x, exist, masks.entries, beside[0], nothing[0])
    )
    own = operands._replace(x=x), Masks(exist, masks.columns, entries)
    found, of_columns = _over_tiles(
        way, *own, (of_rows, beside[1]), (blank, nothing[1]), part, add, divides=True
    )
    return jax.tree.map(lambda v: v[:size], found), of_columns


def _around(axes: Axes, with_block: Callable, state: tuple[Any, Any], columns: Any) -> tuple:
    """``state`` after ``with_block(state, columns, place, is_own)`` with the columns of each device
    of the ring, which go round with what the state has of them."""
    if not axes:
        return with_block(state, columns, 0, True)
    devices, own = mesh.size(axes), lax.axis_index(axes)
    to_the_last = [(i, (i - 1) % devices) for i in range(devices)]

    def hop(carry, i):
        state, columns = carry
        of_rows, of_columns = with_block(state, columns, (own + i) % devices, i == 0)
        send = partial(lax.ppermute, axis_name=axes, perm=to_the_last)
        of_columns, columns = jax.tree.map(send, (of_columns, columns))
        return ((of_rows, of_columns), columns), None

    (state, _), _ = lax.scan(hop, (state, columns), jnp.arange(devices, dtype=jnp.int32))
    return state


def _cut(xs: Any, start: Any, size: int) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), xs)


def _results(way: Way, operands: Operands, masks: Masks) -> tuple[Array, ...]:
    """One product."""
    sums = way.sums

    def part(tile):
        z, _ = _others(way, tile.operands, tile.left_out)
        return sums.of_entries(z, 1), sums.of_entries(z, 0) if way.both else None

    def nothing(of):
        return sums.nothing(jnp.zeros(of.shape[:1], operands.scale.dtype))

    def add(a, b):
        return None if a is None else sums.add(a, b)

    blank = nothing(operands.x), nothing(operands.y) if way.both else None
    found = _over_tiles(way, operands, masks, ((), ()), blank, part, add)
    return tuple(sums.result(x) for x in found[: 1 + way.both])


def _gradients(
    way: Way,
    active: Operands,
    operands: Operands,
    masks: Masks,
    results: tuple[Array, ...],
    ct: tuple,
) -> Operands:
    """Of the ``active`` operands. Three products."""
    ct = tuple(jnp.zeros_like(r) if c is None else c for c, r in zip(ct, results, strict=True))
    lift = _lift(ct)
    of_rows, *of_columns = ((r, c / lift) for r, c in zip(results, ct, strict=True))

    def part(tile):
        z, products = _others(way, tile.operands, tile.left_out)

        def slope(result, ct, axis):
            return along(ct, axis) * way.sums.slope(z, result, axis)

        dz = slope(*tile.rows, axis=1)
        if way.both:
            dz += slope(*tile.columns, axis=0)
        which = Product(active.x, active.y, False, 0, 0)
        new = _product(way, tile.operands).gradients(dz, which, held=True)
        d_scale = jnp.sum(dz * products, axis=1) if active.scale else None
        d_bias = jnp.sum(dz, axis=1) if active.bias else None
        return (new.hidden, d_scale, d_bias), new.kernel

    def zeros(asked, shape):
        return jnp.zeros(shape, operands.scale.dtype) if asked else None

    rows = operands.x.shape[:1]
    blank = zeros(active.x, operands.x.shape), zeros(active.scale, rows), zeros(active.bias, rows)
    blank = blank, zeros(active.y, operands.y.shape)
    beside = of_rows, of_columns[0] if way.both else ()
    found = _over_tiles(way, operands, masks, beside, blank, part)
    (d_x, d_scale, d_bias), d_y = found
    d_x, d_y = (None if g is None else operands.scale * g for g in (d_x, d_y))
    d_scale, d_bias = (None if g is None else jnp.sum(g) for g in (d_scale, d_bias))

    def settled(g, x):
        if g is None:
            return None
        return (lift * mesh.sum_except(g, mesh.varies_over(x))).astype(x.dtype)

    grads = Operands(d_x, d_y, d_scale, d_bias)
    return Operands(*map(settled, grads, operands))


def _lift(ct: tuple[Array, ...]) -> Array:
    """What the cotangents are divided by in the products, which may narrow them to float16. It is
    one number for all devices."""
    of_each = [jnp.max(jnp.abs(c), initial=0) for c in ct]
    largest = jnp.maximum(of_each[0], of_each[-1])
    largest = mesh.largest(largest, tuple(sorted(mesh.varies_over(largest))))
    # To at most 64: neither are shares of 1e-9 lost in float16, nor those of 1e-38 in float32.
    least = jnp.finfo(largest.dtype).tiny
    return jnp.where(jnp.isfinite(largest), jnp.maximum(largest / 64, least), 1)


def _tangents(
    way: Way, operands: Operands, masks: Masks, results: tuple[Array, ...], tangents: Operands
) -> tuple[Array, ...]:
    """Those of the results: a product for the similarities, one for each tangent of x and y."""

    def part(tile):
        (result, d_x), (of_column, d_y) = tile.rows, tile.columns
        moved = Operands(d_x, d_y, tangents.scale, tangents.bias)

        def similarities(*operands):
            return _others(way, Operands(*operands), tile.left_out)[0]

        z, dz = jvp_of_moving(similarities, tile.operands, moved)

        def along_entries(result, axis):
            return jnp.sum(way.sums.slope(z, result, axis) * dz, axis=axis)

        return along_entries(result, 1), along_entries(of_column, 0) if way.both else None

    of_columns = results[1] if way.both else None
    beside = (results[0], tangents.x), (of_columns, tangents.y)
    found = _over_tiles(
        way, operands, masks, beside, jax.tree.map(jnp.zeros_like, (results[0], of_columns)), part
    )
    return found[: len(results)]
