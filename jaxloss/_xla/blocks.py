"""Rows a block at a time, for passes that read each row several times."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxloss._xla import device, mesh

MIB = 1.0  # of float32 in a block


def rows_of_a_block(columns: int) -> int | None:
    """A power of two; None: all rows at once.

    XLA:CPU writes out what several passes over a row share, and reads it from memory again: of
    blocks it stays in the cache. On accelerators passes share what they read. Where a partitioner
    may split the rows, a block would be gathered from all devices.
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
    if size is None or not isinstance(n, int) or n <= size:
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
    """``of_block(over, rows) -> (over, what it gives a row, sums)`` of arrays ``[n, ...]``, a block
    of rows at a time. The arrays that take the place of ``over`` have its types, and are written
    over it.
    """
    n = jax.tree.leaves((over, rows))[0].shape[0]
    if block is None or block >= n:
        return of_block(over, rows)

    def some(start, size, xs):
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), xs)

    def put(start, xs, ys):
        return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start, 0), xs, ys)

    def step(state, start, size):
        over, given, sums = state
        # Inlined below: traced once for all blocks of a size.
        new, more, parts = of_some(some(start, size, over), some(start, size, rows))
        return put(start, over, new), put(start, given, more), jax.tree.map(jnp.add, sums, parts)

    of_some = jax.jit(of_block, inline=True)
    _, given, sums = jax.eval_shape(of_some, some(0, block, over), some(0, block, rows))
    state = over, blank_rows(n, given), jax.tree.map(mesh.blank, sums)
    state = lax.fori_loop(0, n // block, lambda i, s: step(s, i * block, block), state)
    return step(state, n - n % block, n % block) if n % block else state


def blank_rows(n: int, like: Any) -> Any:
    """Zeros ``[n, ...]`` of the types of arrays ``[rows, ...]``."""
    return jax.tree.map(lambda x: mesh.blank(x, (n, *x.shape[1:])), like)
