"""Tokens in chunks: how large, which ones, and the loop over them.

Tokens that count are packed into the first chunks (an index, no copy of ``hidden``), and the loop
runs over those chunks alone. Where one chunk is all tokens, they stay in their places.

Letters: N tokens, n of them in a chunk, D features, V columns of the kernel.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._xla import mesh
from jaxloss._xla.derivatives import jvp_of_moving


class Packing(NamedTuple):
    """Which token stands at which place of the sweep."""

    order: Array  # [chunks * n] int32, those that count first; N: no token
    size: Array  # how many count; on a mesh whose devices go in step, on the one of most
    counts: Array  # [N] bool, which


def size_to_plan_for(num_tokens: Any) -> int:
    """The tokens' number, or where jax.export leaves it open, the largest."""
    return num_tokens if isinstance(num_tokens, int) else 2**31 - 1


def _fit(mebibytes: int, num_columns: int) -> int:
    """The power of two of tokens whose float32 logits take as much."""
    return 2 ** int(math.log2(max(1, mebibytes * 2**20 // (4 * max(1, num_columns)))))


# Float32 rows of logits that a token of the plain loss holds: its logits, and their gradient. A
# chunk of the same size may hold a fifth more.
PLAIN_ROWS, MOST_ROWS = 2.0, 2.4
OF_DIVERGENCE = {"forward": 5.0, "reverse": 5.0, "jensen_shannon": 10.0}


def rows_held(
    dtype: Any,
    *,
    none: bool = False,
    probabilities: bool = False,
    top: bool = False,
    weight: bool = False,
    smoothing: bool = False,
    mask: bool = False,
    statistics: bool = False,
    scaling: bool = False,
    divergence: str | None = None,
    own: float | None = None,
) -> float:
    """Float32 rows of logits that a token of a chunk holds with these options, value and gradients.

    Counted in what XLA:CPU compiles, which writes out more than XLA's other compilers.

    ``none``: the reduction. ``mask``: of classes. ``own``: a loss of the caller's own, whose arrays
    of a token take as many rows.
    """
    rows = PLAIN_ROWS
    if divergence is not None:
        rows = OF_DIVERGENCE[divergence] + 0.25 * mask
    elif own is not None:
        rows = 4 + 2 * own  # of each array the chunk's part and its gradient
    else:
        soft = probabilities or (weight and smoothing)
        rows += 3 * probabilities + 1.5 * top + 2 * (weight and (smoothing or probabilities))
        rows += 0.25 * mask
        others = soft or top or statistics
        rows += mask * (soft or top or smoothing) + mask * statistics + scaling * others
        rows += mask * probabilities * statistics
    narrow = dtype.itemsize < 4 and jax.default_backend() == "cpu"
    if narrow and (none or rows > PLAIN_ROWS):
        rows += 0.75  # the gradient in the products' dtype, and as a CPU multiplies it
    return rows


def default_chunk(
    num_tokens: int, num_columns: int, num_features: int = 0, rows: float = PLAIN_ROWS
) -> int:
    """Tokens a chunk: a power of two, or all.

    ``num_features``: of a kernel whose gradient a single chunk forms without an accumulator.
    ``rows``: see :func:`rows_held`.
    """
    if jax.default_backend() == "cpu":
        # Measured: past 512 tokens the products gain little, past 1024 nothing.
        chunk = min(_fit(256, num_columns), 1024, max(512, _fit(64, num_columns)))
        chunk = _shrunk(chunk, rows)
    else:
        # Each chunk adds to the float32 d_kernel, 8 bytes of traffic beside 6 n operations: by the
        # chips' peak rates as long as the products of 220 tokens on an H200, 320 on a TPU v5e, 750
        # on a v6e. Up to here the logits stand where the gradients will be written.
        on_tpu = jax.default_backend() == "tpu"
        chunk = min(_fit(1024, num_columns), 1024 if on_tpu else 4096)
        chunk = max(_shrunk(chunk, rows), min(chunk, 512 if on_tpu else 256))
        # All at once hold 6 bytes a logit, in float32 and in bfloat16; chunks of n as many, and 4
        # for each entry of d_kernel: V (6 n + 4 D) in all. Of more rows a token, as much more.
        if not on_tpu and num_tokens <= chunk + int(2 * PLAIN_ROWS * num_features / (3 * rows)):
            chunk = num_tokens
    return max(1, min(chunk, num_tokens))


def _shrunk(chunk: int, rows: float) -> int:
    """The power of two of tokens that hold no more than a plain chunk."""
    if rows <= MOST_ROWS:
        return chunk
    return 2 ** int(math.log2(max(1, chunk * MOST_ROWS / rows)))


# Of float32 logits, nearly all that a sweep holds: one without gradients, one without the kernel's.
VALUE_MIB, FROZEN_KERNEL_MIB = 256, 1024


def value_chunk(chunk: int, num_columns: int, mebibytes: int = VALUE_MIB) -> int:
    """Tokens of a sweep without an accumulator: halves of a chunk, until their logits fit."""
    while chunk % 2 == 0 and chunk > _fit(mebibytes, num_columns):
        chunk //= 2
    return chunk


def step_sizes(chunk: int) -> tuple[int, ...]:
    """Tokens a step of a sweep takes: a chunk, or a quarter of one."""
    return (chunk, chunk // 4) if chunk % 4 == 0 else (chunk,)


def all_step_sizes(chunk: int, num_columns: int) -> list[int]:
    """Of every sweep: of all gradients, of those without the kernel's, of the value alone."""
    limits = VALUE_MIB, FROZEN_KERNEL_MIB
    chunks = chunk, *(value_chunk(chunk, num_columns, limit) for limit in limits)
    return sorted({n for c in chunks for n in step_sizes(c)})


def counted_first(counts: Array) -> Array:
    """The tokens [N], those that count before the others."""
    order = jnp.argsort(~counts, stable=True).astype(jnp.int32)
    return mesh.varying(order, mesh.varies_over(counts))  # as JAX does not say


def in_order(x: Array, order: Array) -> Array:
    return x.at[order].get(mode="promise_in_bounds")


def places(counts: Array) -> Array:
    """Where :func:`counted_first` puts each token [N]; N: one that does not count."""
    return jnp.where(counts, jnp.cumsum(counts, dtype=jnp.int32) - 1, counts.size)


def pack(counts: Array, chunk: int, in_step: bool = False) -> Packing:
    """``in_step``: the devices of a mesh take as many steps, the longest's."""
    tokens = counts.shape[0]
    own = size = jnp.sum(counts, dtype=jnp.int32)
    if in_step and mesh.varies_over(size):
        size = lax.pmax(size, tuple(sorted(mesh.varies_over(size))))
    order = counted_first(counts)
    # One that does not count is not named: its hidden may hold NaN, and NaN * 0 is NaN.
    order = jnp.where(jnp.arange(tokens, dtype=jnp.int32) < own, order, tokens)
    room = (-(-tokens // chunk) or 1) * chunk - tokens
    return Packing(jnp.pad(order, (0, room), constant_values=tokens), size, counts)


def _each(mask: Array, rows: Array) -> Array:
    return mask.reshape(-1, *(1,) * (rows.ndim - 1))


def taken(x: Any, at: Array) -> Any:
    """The tokens ``at``: an index[n], past the end for none; or which of all, as they stand. In
    place of none there is 0."""
    if x is None:
        return None
    if at.dtype == bool:
        return jnp.where(_each(at, x), x, jnp.zeros((), x.dtype))
    if x.shape[0] == 0:
        return jnp.zeros((*at.shape, *x.shape[1:]), x.dtype)
    return (_long_rows_at if moves_bits(x) else _rows_at)(x, at)


def _rows_at(x: Array, at: Array) -> Array:
    return jnp.take(x, at, axis=0, mode="fill", fill_value=0)


def moves_bits(x: Any) -> bool:
    """Whether long rows of this shape and dtype move as bits: XLA:CPU gathers and scatters narrow
    floats by way of a float32 copy of all of them."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    long = x.ndim > 1 and math.prod(x.shape[1:]) >= 4096
    return narrow and long and jax.default_backend() == "cpu"


def _bits_at(x: Array, at: Array) -> Array:
    """:func:`_rows_at`, a row at a time: the bits of all rows would be an array of their own."""
    whole, at = mesh.together(x, at)

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


def filled(x: Any, at: Array, packing: Packing) -> Any:
    """The same, but the first token that counts wherever there is none.

    A function of zeros may have no derivative, and 0 * NaN would join the gradient of what no token
    owns.
    """
    if x is None:
        return None
    first = packing.order[:1]  # past the end where no token counts
    if at.dtype == bool:
        return jnp.where(_each(at, x), x, taken(x, first))
    return taken(x, jnp.where(at < x.shape[0], at, first))


def _as_held(rows: Array, x: Array) -> Array:
    if x.dtype == jnp.uint16 and rows.dtype != jnp.uint16:  # the bits of narrow floats
        return lax.bitcast_convert_type(rows, jnp.uint16)
    return rows.astype(x.dtype)


def put_back(at: Array, x: Array, rows: Array) -> Array:
    if x.shape[0] == 0:
        return x
    if at.dtype == bool:
        return jnp.where(_each(at, x), _as_held(rows, x), x)
    return x.at[at].set(_as_held(rows, x), mode="drop")


def sweep(packing: Packing, chunk: int, part, update, blank, finish, dynamic: bool):
    """``update(state, at, part(at))`` for each chunk's tokens ``at``, from ``blank()`` on; the last
    state finished.

    ``dynamic``: a loop over the chunks that hold a token that counts. Otherwise over all of them,
    which JAX can differentiate in reverse, each part computed again in its backward pass.
    """

    def step(state, at):
        compute = part if dynamic else jax.checkpoint(part)
        return update(state, at, compute(at))

    def from_place(state, start, size):
        return step(state, lax.dynamic_slice_in_dim(packing.order, start, size))

    chunks = packing.order.shape[0] // chunk
    if not dynamic:
        starts = jnp.arange(chunks, dtype=jnp.int32) * chunk
        each = lambda state, start: (from_place(state, start, chunk), None)  # noqa: E731
        return finish(lax.scan(each, blank(), starts)[0])

    # What is left of the last chunk goes in quarters: a batch of one chunk gains by them too.
    quarter = step_sizes(chunk)[-1]
    whole = (packing.size + quarter - 1) // chunk

    def rest(state):
        if quarter == chunk:
            return state
        trips, start = (packing.size - whole * chunk + quarter - 1) // quarter, whole * chunk
        some = lambda i, state: from_place(state, start + i * quarter, quarter)  # noqa: E731
        return lax.fori_loop(0, trips, some, state)

    if chunk == packing.counts.shape[0]:
        # Inside of the branch XLA sees that nothing was there before and nothing comes after: sums
        # are written where they would be added to, and narrow. No token is moved.
        at_once = lambda: finish(step(blank(), packing.counts))  # noqa: E731
        return lax.cond(whole > 0, at_once, lambda: finish(rest(blank())))
    # The first chunk has a branch of its own: its sums are written, and not added to zeros.
    state = lax.cond(whole > 0, lambda: from_place(blank(), 0, chunk), blank)
    if chunks != 1:  # not '>': of an open number JAX knows no order
        more = lambda i, state: from_place(state, i * chunk, chunk)  # noqa: E731
        state = lax.fori_loop(1, whole, more, state)
    return finish(rest(state))
