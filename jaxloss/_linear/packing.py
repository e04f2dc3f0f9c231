"""Tokens in chunks: which ones, and the loop over them.

Tokens that count are packed into the first chunks (an index, no copy of ``hidden``), and the loop
runs over those chunks alone. Where one chunk is all tokens, they stay in their places.

Where a partitioner may split the tokens over devices, they are packed in G groups of neighbours,
and a chunk takes n / G tokens of each group. A mesh that splits the first axis of ``hidden``
evenly has each group on one device: so each device works on its own tokens, and no token is sent. A
chunk of any tokens would be gathered from all devices, and computed by each of them.

Letters: N tokens, n of them in a chunk, D features, V columns of the kernel, G groups.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._xla import device, mesh
from jaxloss._xla.derivatives import jvp_of_moving


class Packing(NamedTuple):
    """Which token stands at which place of the sweep."""

    # [chunks * n] int32, those that count first; N: no token. In groups [G, chunks * n / G], places
    # in the group; N / G: no token.
    order: Array
    size: Array  # how many count; of groups, or devices that go in step, as if all were the fullest
    valid: Array  # [N] bool, which

    @property
    def groups(self) -> int:
        return self.order.shape[0] if self.order.ndim == 2 else 1

    def some(self, start: Any, size: int) -> Array:
        """The ``size`` tokens from a place on."""
        groups = self.groups
        if groups == 1:
            return lax.dynamic_slice_in_dim(self.order, start, size)
        return lax.dynamic_slice_in_dim(self.order, start // groups, size // groups, axis=1)

    def step_of_each_sweep(self, chunk: int, dynamic: bool, quarters: bool = True) -> Array:
        """The tokens ``at`` of a step that :func:`over_chunks` has, whose trace serves for the
        types of its results too."""
        if not dynamic:
            return self.some(0, chunk)
        step = step_sizes(chunk, self.groups)[-1] if quarters else chunk
        return self.valid if step == self.valid.shape[0] else self.some(0, step)

    def holds(self, at: Array) -> Array:
        """Which of the rows of tokens ``at`` are a token's."""
        if at.dtype == bool:
            return at
        return (at < self.valid.size // self.groups).reshape(-1)


# A product of fewer tokens takes about as long as its kernel takes to be read: a quarter of them
# would save nothing, and take as long again to compile.
FEWEST = 32


def step_sizes(chunk: int, groups: int = 1) -> tuple[int, ...]:
    """Tokens a step of a sweep takes: a chunk, or a quarter of one."""
    in_quarters = groups == 1 and chunk % 4 == 0 and chunk >= FEWEST
    return (chunk, chunk // 4) if in_quarters else (chunk,)


def groups_of(hidden: Array, chunk: int) -> int:
    """G: 1 where nothing splits the tokens, or where one chunk is all of them. Devices that share a
    group, where there are fewer groups than devices, wait for each other."""
    tokens = hidden.shape[0]
    if not isinstance(tokens, int) or chunk >= tokens:
        return 1
    return math.gcd(tokens, chunk, device.devices_of_a_partitioner(hidden))


def valid_first(valid: Array) -> Array:
    """The tokens [N], those that count before the others."""
    order = jnp.argsort(~valid, stable=True).astype(jnp.int32)
    return mesh.varying(order, mesh.varies_over(valid))  # as JAX does not say


def in_order(x: Array, order: Array) -> Array:
    return x.at[order].get(mode="promise_in_bounds")


def positions(valid: Array) -> Array:
    """Where :func:`valid_first` puts each token [N]; N: one that does not count."""
    return jnp.where(valid, jnp.cumsum(valid, dtype=jnp.int32) - 1, valid.size)


def pack(valid: Array, chunk: int, groups: int = 1, in_step: bool = False) -> Packing:
    """``in_step``: the devices of a mesh take as many steps, the longest's."""
    tokens = valid.shape[0]
    if groups > 1:
        return _packed_in_groups(valid, chunk, groups, in_step)
    own = jnp.sum(valid, dtype=jnp.int32)
    size = _of_the_fullest(own) if in_step else own
    order = valid_first(valid)
    # One that does not count is not named: its hidden may hold NaN, and NaN * 0 is NaN.
    order = jnp.where(jnp.arange(tokens, dtype=jnp.int32) < own, order, tokens)
    room = (-(-tokens // chunk) or 1) * chunk - tokens
    return Packing(jnp.pad(order, (0, room), constant_values=tokens), size, valid)


def _of_the_fullest(size: Array) -> Array:
    return mesh.largest(size, tuple(sorted(mesh.varies_over(size))))


def _packed_in_groups(valid: Array, chunk: int, groups: int, in_step: bool) -> Packing:
    tokens, each = valid.size // groups, chunk // groups
    of_groups = valid.reshape(groups, tokens)
    own = jnp.sum(of_groups, axis=1, dtype=jnp.int32)
    order = jnp.argsort(~of_groups, axis=1, stable=True).astype(jnp.int32)
    order = jnp.where(jnp.arange(tokens, dtype=jnp.int32)[None] < own[:, None], order, tokens)
    room = -(-tokens // each) * each - tokens
    order = jnp.pad(order, ((0, 0), (0, room)), constant_values=tokens)
    size = jnp.max(own) * groups
    return Packing(order, _of_the_fullest(size) if in_step else size, valid)


def first_row(x: Any, packing: Packing) -> Any:
    """What :func:`gather_rows_or_first` takes as ``first``: of tokens in groups the first valid
    token's row, otherwise None.

    The groups are split over devices. Gathered here, before the loop, the row is sent once; in the
    loop it would be sent in each step. Each group's own is gathered first, because for one row of
    all tokens XLA:GPU (JAX 0.10) gathers ``x`` whole on every device.
    """
    if x is None or packing.groups == 1:
        return None
    of_groups = packing.order[:, :1]
    which = jnp.argmax(of_groups[:, 0] < packing.valid.size // packing.groups)
    return gather_rows(_rows_of_groups(x, of_groups), which.astype(jnp.int32)[None])


def of_fewest(number: Array, tokens: int, of: Callable, *given: Any) -> Any:
    """``of(size, *given)``, with ``size`` a quarter, a half or all of the tokens, the fewest that
    hold ``number``. An array's size is static, so that each size is a program of its own."""
    sizes = sorted({-(-tokens // 4), -(-tokens // 2), tokens})
    given = mesh.varying(given, mesh.varies_over(number))
    which = sum((number > size).astype(jnp.int32) for size in sizes[:-1])
    return lax.switch(which, [lambda size=size: of(size, *given) for size in sizes])


def _each(mask: Array, rows: Array) -> Array:
    return mask.reshape(-1, *(1,) * (rows.ndim - 1))


def gather_rows(x: Any, at: Array) -> Any:
    """Rows of ``x`` at the tokens ``at``: an index[n], past the end where there is no token, whose
    row is 0; or bool[N], which leaves all rows in their places and sets the others to 0."""
    if x is None:
        return None
    if at.dtype == bool:
        return jnp.where(_each(at, x), x, jnp.zeros((), x.dtype))
    if at.ndim == 2:
        return _rows_of_groups(x, at)
    if x.shape[0] == 0:
        return jnp.zeros((*at.shape, *x.shape[1:]), x.dtype)
    return (_long_rows_at if moves_bits(x) else _rows_at)(x, at)


def _rows_of_groups(x: Array, at: Array) -> Array:
    """Along each group's own axis, so that a partitioner has nothing to send."""
    groups, rest = at.shape[0], x.shape[1:]
    tokens = x.shape[0] // groups
    x = x.reshape(groups, tokens, *rest)
    index = jnp.minimum(at, tokens - 1).reshape(*at.shape, *(1 for _ in rest))
    rows = jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")
    rows = jnp.where((at < tokens).reshape(index.shape), rows, jnp.zeros((), x.dtype))
    return rows.reshape(at.size, *rest)


def _rows_at(x: Array, at: Array) -> Array:
    # jnp.take(mode="fill"), which took a quarter of the time to trace a linear loss.
    kept = tuple(range(1, x.ndim))
    numbers = lax.GatherDimensionNumbers(kept, collapsed_slice_dims=(0,), start_index_map=(0,))
    sizes = (1, *x.shape[1:])
    return lax.gather(x, at[:, None], numbers, sizes, mode="fill", fill_value=0)


def moves_bits(x: Any) -> bool:
    """Whether long rows of this shape and dtype move as bits: XLA:CPU gathers and scatters narrow
    floats by way of a float32 copy of all of them."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    long = x.ndim > 1 and math.prod(x.shape[1:]) >= 4096
    return narrow and long and jax.default_backend() == "cpu"


def _bits_at(x: Array, at: Array) -> Array:
    """:func:`_rows_at`, a row at a time: the bits of all rows would be an array of their own."""
    whole, at = mesh.varying_alike(x, at)

    def row(i):
        # Or XLA:CPU widens all of x before the loop, as it widens the row in it.
        x, i = lax.optimization_barrier((whole, i))
        here = lax.dynamic_index_in_dim(x, jnp.minimum(i, x.shape[0] - 1), keepdims=False)
        here = lax.bitcast_convert_type(here, jnp.uint16)
        return jnp.where(i < x.shape[0], here, jnp.zeros((), jnp.uint16))

    return lax.bitcast_convert_type(lax.map(row, at), x.dtype)


@jax.custom_jvp
def _long_rows_at(x: Array, at: Array) -> Array:
    return _bits_at(x, at)


def _long_rows_at_jvp(args, tangents):
    return _long_rows_at(*args), jvp_of_moving(_rows_at, args, tangents)[1]


_long_rows_at.defjvp(_long_rows_at_jvp, symbolic_zeros=True)


def gather_rows_or_first(x: Any, at: Array, packing: Packing, first: Any = None) -> Any:
    """Rows of ``x`` at the tokens ``at``; where ``at`` names no token, the first valid token's row.

    :func:`gather_rows` has zeros there. A function of zeros may have no derivative, and 0 * NaN
    would join the gradient of what no token owns. ``first`` is from :func:`first_row`.
    """
    if x is None:
        return None
    if at.ndim == 2:
        return jnp.where(_each(packing.holds(at), x), gather_rows(x, at), first)
    first = packing.order[:1]  # past the end where no token counts
    if at.dtype == bool:
        return jnp.where(_each(at, x), x, gather_rows(x, first))
    return gather_rows(x, jnp.where(at < x.shape[0], at, first))


def _as_held(rows: Array, x: Array) -> Array:
    if x.dtype == jnp.uint16 and rows.dtype != jnp.uint16:  # the bits of narrow floats
        return lax.bitcast_convert_type(rows, jnp.uint16)
    return rows.astype(x.dtype)


def scatter_rows(at: Array, x: Array, rows: Array) -> Array:
    if x.shape[0] == 0:
        return x
    if at.dtype == bool:
        return jnp.where(_each(at, x), _as_held(rows, x), x)
    rows = _as_held(rows, x)
    if at.ndim == 2:
        of_groups = (at.shape[0], x.shape[0] // at.shape[0]), at.shape
        x, rows = (v.reshape(*n, *v.shape[1:]) for v, n in zip((x, rows), of_groups, strict=True))
        put = jax.vmap(lambda x, at, rows: x.at[at].set(rows, mode="drop"))(x, at, rows)
        return put.reshape(-1, *x.shape[2:])
    return x.at[at].set(rows, mode="drop")


def over_chunks(
    packing: Packing, chunk: int, part, update, blank, finish, dynamic: bool, quarters: bool = True
):
    """``update(state, at, part(at))`` for each chunk's tokens ``at``, from ``blank()`` on; the last
    state finished.

    ``dynamic``: a loop over the chunks that hold a token that counts. Otherwise over all of them,
    which JAX can differentiate in reverse, each part computed again in its backward pass.
    """

    def step(state, at):
        compute = part if dynamic else jax.checkpoint(part)
        return update(state, at, compute(at))

    def from_place(state, start, size):
        return step(state, packing.some(start, size))

    chunks = packing.order.size // chunk
    if not dynamic:
        starts = jnp.arange(chunks, dtype=jnp.int32) * chunk
        each = lambda state, start: (from_place(state, start, chunk), None)  # noqa: E731
        return finish(lax.scan(each, blank(), starts)[0])

    if packing.groups > 1:
        # One loop takes all chunks, because XLA's partitioner sums a gradient of the kernel over
        # the devices for each loop and each branch that adds to it, and holds each (libtpu 0.0.42).
        steps = (packing.size + chunk - 1) // chunk
        each = lambda i, state: from_place(state, i * chunk, chunk)  # noqa: E731
        return finish(lax.fori_loop(0, steps, each, blank()))

    # What is left of the last chunk goes in quarters: a batch of one chunk gains by them too.
    quarter = step_sizes(chunk)[-1] if quarters else chunk
    whole = (packing.size + quarter - 1) // chunk

    def rest(state):
        if quarter == chunk:
            return state
        trips, start = (packing.size - whole * chunk + quarter - 1) // quarter, whole * chunk
        some = lambda i, state: from_place(state, start + i * quarter, quarter)  # noqa: E731
        return lax.fori_loop(0, trips, some, state)

    if chunk == packing.valid.shape[0]:
        # Inside of the branch XLA sees that nothing was there before and nothing comes after: sums
        # are written where they would be added to, and narrow. No token is moved.
        at_once = lambda: finish(step(blank(), packing.valid))  # noqa: E731
        if chunk < FEWEST:
            # The branch for no valid token takes longer to compile than so few tokens take.
            return at_once()
        return lax.cond(whole > 0, at_once, lambda: finish(rest(blank())))
    # The first chunk has a branch of its own: its sums are written, and not added to zeros.
    state = lax.cond(whole > 0, lambda: from_place(blank(), 0, chunk), blank)
    if chunks != 1:  # not '>': of an open number JAX knows no order
        more = lambda i, state: from_place(state, i * chunk, chunk)  # noqa: E731
        state = lax.fori_loop(1, whole, more, state)
    return finish(rest(state))
