"""Rows a block at a time, for passes that read each row several times."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._xla import device, mesh

MIB = 1.0  # of float32 in a block
# JAX 0.10 and 0.11 lose a tangent of a loop like that of :func:`by_blocks` in a backward pass.
DIFFERENTIABLE = jax.__version_info__ >= (0, 12)


def rows_of_a_block(columns: int) -> int | None:
    """A power of two; None: all rows at once.

    XLA:CPU writes out the arrays that several passes over a row share, and reads them from memory
    again; the arrays of a block stay in the cache. On accelerators passes share what they read.
    Where a partitioner may split the rows, a block would be gathered from all devices.
    """
    if jax.default_backend() != "cpu" or device.devices_of_a_partitioner() > 1:
        return None
    return 2 ** int(math.log2(max(1, MIB * 2**18 // max(1, columns))))


def by_blocks(
    function: Callable, rows: Any, shared: Any, *, size: int | None, lead: tuple[int, ...]
) -> Any:
    """``function(rows, shared)``, a tree of arrays ``[*lead, ...]``, in blocks of ``size`` rows.

    ``rows``: a tree of arrays whose first axes broadcast to ``lead``. What ``function`` makes of a
    row is of that row alone.
    """
    n, axes = math.prod(lead), len(lead)
    if not DIFFERENTIABLE or size is None or not isinstance(n, int) or n <= size:
        return function(rows, shared)

    def flat(x):
        if math.prod(x.shape[:axes]) != 1:  # one row for all stays one
            x = jnp.broadcast_to(x, (*lead, *x.shape[axes:]))
        return x.reshape(-1, *x.shape[axes:])

    def some(start):
        def of_block(x):
            return x if x.shape[0] == 1 else lax.dynamic_slice_in_dim(x, start, size)

        return function(jax.tree.map(of_block, given), shared)

    def step(i, state):
        # The last block ends with the rows: some of them are in two blocks, and made twice.
        start = jnp.minimum(i * size, n - size)
        put = lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start, 0)  # noqa: E731
        return jax.tree.map(put, state, some(start))

    given = jax.tree.map(flat, rows)
    state = blank_rows(n, jax.eval_shape(some, 0))
    made = lax.fori_loop(0, -(-n // size), step, state)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), made)


def in_blocks(of_block: Callable, block: int | None, over: tuple, rows: Any) -> tuple:
    """``of_block(over, rows, counts) -> (over, what it gives a row, sums)`` of arrays ``[n, ...]``,
    a block of rows at a time. The arrays that take the place of ``over`` have its types, and are
    written over it.

    ``counts``: which rows of a block are new, [block]; no other may have a part in the sums. None:
    all.
    """
    n = jax.tree.leaves((over, rows))[0].shape[0]
    if block is None or block >= n:
        return of_block(over, rows, None)

    def some(start, xs):
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, block), xs)

    def step(i, state):
        over, given, sums = state
        start, counts = i * block, None
        if n % block:
            # The last block ends with the rows, so that every row is in a block of one size, and
            # has the same bits wherever it stands. Its first rows hold results of the block before,
            # which must not be read as operands: the last row takes their place, because a function
            # of zeros may have no derivative, and 0 * NaN would join the sums.
            start = jnp.minimum(start, n - block)
            counts = jnp.arange(block, dtype=start.dtype) + start >= i * block
        own = some(start, over)
        read = jax.tree.map(lambda x: _where_new(counts, x, x[-1:]), own)
        new, more, parts = of_some(read, some(start, rows), counts)
        new, more = (
            jax.tree.map(partial(_where_new, counts), xs, ys)
            for xs, ys in ((new, own), (more, some(start, given)))
        )
        put = lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start, 0)  # noqa: E731
        return (
            jax.tree.map(put, over, new),
            jax.tree.map(put, given, more),
            jax.tree.map(jnp.add, sums, parts),
        )

    # Inlined: traced once for the types of its results and for the loop.
    of_some = jax.jit(of_block, inline=True)
    counts = jnp.ones(block, bool) if n % block else None
    _, given, sums = jax.eval_shape(of_some, some(0, over), some(0, rows), counts)
    state = over, blank_rows(n, given), jax.tree.map(mesh.blank, sums)
    return lax.fori_loop(0, -(-n // block), step, state)


def _where_new(counts: Array | None, x: Array, y: Array) -> Array:
    return x if counts is None else jnp.where(counts.reshape(-1, *(1,) * (x.ndim - 1)), x, y)


def blank_rows(n: int, like: Any) -> Any:
    """Zeros ``[n, ...]`` of the types of arrays ``[rows, ...]``."""
    return jax.tree.map(lambda x: mesh.blank(x, (n, *x.shape[1:])), like)
