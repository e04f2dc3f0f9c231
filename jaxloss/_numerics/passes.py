"""Single passes over rows, each in the form that XLA runs best without an array of their size."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._kernels import dispatch
from jaxloss._numerics.logits import (
    Scaling,
    capped_max,
    exponentials,
    for_passes,
    read,
    scaled,
    widen,
)
from jaxloss._xla import device, mesh
from jaxloss._xla.derivatives import with_derivative_of
from jaxloss._xla.dtypes import accumulator_dtype, widened
from jaxloss._xla.fusion import apart, behind_barrier, class_index, index_is_exact, lies_below
from jaxloss._xla.indexing import entries, has_open_size, is_kept
from jaxloss._xla.math import exp_of_nonpositive, finite


def _selected_exponentials(
    x: Array, m: Array, kept: Array, scaling: Scaling | None = None
) -> Array:
    """exp(x_j - m), and 0 at the kept entry."""
    return jnp.where(is_kept(x, kept), 0, exponentials(x, m, scaling))


def other_exponentials(x: Array, m: Array, kept: Array, scaling: Scaling | None = None) -> Array:
    """exp(x_j - m), and 0 at the kept entry, in the form that is best where it is written out."""

    def overwritten(x, m, kept):
        e, at = exponentials(x, m, scaling), kept[..., None]
        return jnp.put_along_axis(e, at, 0, axis=-1, inplace=False, mode="drop")

    selected = partial(_selected_exponentials, scaling=scaling)
    # The select costs XLA:CPU up to a quarter of the loss's time, the scatter 10 ns a row.
    if x.shape[-1] < 256 or has_open_size(x) or not device.on_one_device():
        return selected(x, m, kept)
    return lax.platform_dependent(x, m, kept, cpu=overwritten, default=selected)


def _sum_of_others(x: Array, m: Array, kept: Array, scaling: Scaling | None = None) -> Array:
    """sum_{j != k} exp(x_j - m), in one pass that holds no array of the logits' size.

    min(|j - k|, 1) is 0 at the kept entry and 1 elsewhere. XLA:CPU fuses it into the vectorised
    sum; with a select (or an iota, or an integer comparison) it writes the summand out first,
    three times slower.
    """
    x = read(x, m, scaling)
    if not index_is_exact(x):
        return jnp.sum(_selected_exponentials(x, m, kept, scaling), axis=-1)
    return jnp.sum(_is_other(x, kept, m) * exponentials(x, m, scaling), axis=-1)


def _is_other(x: Array, kept: Array, m: Array) -> Array:
    """min(|j - k|, 1): 0 at the kept entry, 1 elsewhere, for a factor. ``m``: a number a row."""
    _, one = behind_barrier(m, 1)  # or XLA:CPU writes out its broadcast, which two passes share
    return jnp.minimum(jnp.abs(class_index(x) - kept.astype(x.dtype)[..., None]), one)


def sum_of_others(x: Array, kept: Array, own: Array) -> Array:
    """sum_{j != k} x_j of each row, of finite entries; ``x`` broadcasts to the rows.

    ``own``: x_k, in the dtype of the sum.
    """
    wide = x.astype(own.dtype)
    if not index_is_exact(x):
        wide = jnp.broadcast_to(wide, (*kept.shape, x.shape[-1]))
        return jnp.sum(jnp.where(is_kept(wide, kept), 0, wide), axis=-1)
    return jnp.sum(_is_other(wide, kept, own) * wide, axis=-1)


def _sum_of_others_in_blocks(
    x: Array, m: Array, kept: Array, scaling: Scaling | None = None
) -> Array:
    """``_sum_of_others`` of long rows: C classes are taken as C / block rows, each in cache.

    On long rows XLA:CPU's sum materialises its summand after all, 8 to 16 times slower. The
    barriers keep the reshapes, which are free, from hiding the operands from its fusion.

    Only the block of the kept entry looks for that entry, and is summed once more for it, because
    the search takes a quarter of the sum's time.
    """
    block = _block_size(x.shape[-1])
    count = x.shape[-1] // block
    spread = (*m.shape, count)
    every, m_of_block = apart(
        x.reshape(-1, block), jnp.broadcast_to(m[..., None], spread).reshape(-1)
    )
    sums = jnp.sum(exponentials(read(every, m_of_block, scaling), m_of_block, scaling), axis=-1)
    sums, own = sums.reshape(spread), jnp.minimum(kept // block, count - 1)
    few = lax.optimization_barrier(x).reshape(*spread, block)
    few = jnp.take_along_axis(few, own[..., None, None], axis=-2, mode="promise_in_bounds")
    of_own = _sum_of_others(few[..., 0, :], m, kept - block * own, scaling)
    return jnp.sum(jnp.where(is_kept(sums, own), 0, sums), axis=-1) + of_own


def _block_size(size: int) -> int:
    """A divisor of ``size`` in [256, 4096], the largest up to 1024 if there is one, else ``size``;
    short rows stay whole."""
    if size <= 16384:
        return size
    sizes = (*range(1024, 255, -1), *range(1025, 4097))
    return next((b for b in sizes if size % b == 0), size)


def sum_exponentials(x: Array, m: Array, kept: Array, scaling: Scaling | None = None) -> Array:
    whole = partial(_sum_of_others, scaling=scaling)
    if _block_size(x.shape[-1]) == x.shape[-1] or not device.on_one_device():
        return whole(x, m, kept)
    in_blocks = partial(_sum_of_others_in_blocks, scaling=scaling)
    return lax.platform_dependent(x, m, kept, cpu=in_blocks, default=whole)


def writes_out(logits: Array) -> bool:
    """Whether to hold the exponentials: a wide copy of narrow logits only where it is small."""
    wide = accumulator_dtype(logits.dtype)
    if logits.dtype == wide:
        return True
    known = isinstance(logits.size, int)  # a batch that jax.export leaves open has no size
    return known and logits.shape[-1] < 256 and logits.size * wide.itemsize <= 2**20


def row_sum(
    logits: Array,
    m: Array,
    kept: Array,
    class_mask: Array | None,
    scaling: Scaling | None,
    written: bool,
) -> Array:
    """sum_{j != k} exp(x_j - m). ``written``: the backward pass finds the summand held."""
    if written:
        # Written out once, to where the gradient will stand, and scaled there by the backward
        # pass: one exponential an entry instead of two.
        x = widen(logits, class_mask, scaling)
        return jnp.sum(other_exponentials(x, m, kept, scaling), axis=-1)
    x, left = for_passes(logits, class_mask, scaling)
    return sum_exponentials(x, m, kept, left)


def _merged(x: Array, kept: Array, scaling: Scaling | None = None) -> Any:
    """A class is a part of its row, and parts merge: the larger maximum stays, the other's sum is
    scaled to it."""

    def merged(a, b):
        (m, s), (n, t) = a, b
        m, n = lax.stop_gradient((m, n))
        # Equal first: -inf less -inf is NaN. In lax, which is traced in a third of jnp's time.
        lower = scaled(-lax.abs(m - n), scaling)
        scale = lax.select(lax.eq(m, n), lax.full_like(m, 1), exp_of_nonpositive(lower))
        return lax.max(m, n), lax.select(lax.ge(m, n), s + t * scale, t + s * scale)

    x = widened(x)
    # 1, but NaN for +inf as exp(x_j - m) is there, with the derivative of exp(x_j - m): JAX loses
    # the rule below where it differentiates twice through jax.checkpoint within shard_map.
    one = 1 + scaled(x - lax.stop_gradient(x), scaling)
    others = jnp.where(is_kept(x, kept) | (x == -jnp.inf), 0, one)
    nothing = jnp.array(-jnp.inf, x.dtype), jnp.zeros((), x.dtype)
    nothing = tuple(mesh.varying(v, mesh.varies_over(x)) for v in nothing)
    return lax.reduce((x, others), nothing, merged, (x.ndim - 1,))


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def max_and_sum_in_one(
    x: Array, kept: Array, compute: Callable = _merged, scaling: Scaling | None = None
) -> Any:
    """(max_j x_j, sum_{j != k} exp(x_j - max)) in one reduction, which reads ``x`` once."""
    return compute(x, kept)


@max_and_sum_in_one.defjvp
def _(compute, scaling, primals, tangents):
    # The maximum is a number to subtract, as good as any other near it: it has no derivative.
    x, kept = primals
    m, s = max_and_sum_in_one(x, kept, compute, scaling)
    x, dx = widened(x), scaled(tangents[0].astype(m.dtype), scaling)
    moved = jnp.sum(_selected_exponentials(x, finite(m), kept, scaling) * dx, axis=-1)
    return (m, s), (jnp.zeros_like(m), moved)


def max_and_sum(
    logits: Array,
    kept: Array,
    class_mask: Array | None,
    scaling: Scaling | None,
    written: bool,
    kernel_bytes: int,
) -> tuple[Array, Array]:
    """(the row's maximum, -inf where all are; the sum of the others' exponentials).

    In one pass where reading the logits is what takes the time. CPUs vectorise two, not that one.

    ``kernel_bytes``: see ``dispatch.row_sums``.
    """

    def in_two(logits, kept, class_mask):
        m = row_max(logits, class_mask, scaling)
        return m, row_sum(logits, finite(m), kept, class_mask, scaling, written)

    def in_one(logits, kept, class_mask):
        compute = partial(_merged, scaling=scaling)
        return max_and_sum_in_one(widen(logits, class_mask, scaling), kept, compute, scaling)

    forms = {"cpu": in_two, "default": in_one}
    by_kernel = dispatch.row_sums(logits, class_mask is scaling is None, kernel_bytes)
    if by_kernel is not None:
        kernel = by_kernel(_merged)
        forms["cuda"] = lambda logits, kept, _: max_and_sum_in_one(logits, kept, kernel)
    return lax.platform_dependent(logits, kept, class_mask, **forms)


def slope_pass(plain: Callable, logits: Array, *rest: Array) -> Array:
    """``plain(logits, m, kept, scale, at_kept, active)``: scale exp(x_j - m), at_kept where j is
    kept, and 0 in a row that is not active, in the logits' dtype; by a kernel where there is one.
    """
    by_kernel = dispatch.row_gradient(logits)
    if by_kernel is None:
        return plain(logits, *rest)
    kernel = with_derivative_of(plain, by_kernel(plain))
    return lax.platform_dependent(logits, *rest, cuda=kernel, default=plain)


def row_max(logits: Array, class_mask: Array | None, scaling: Scaling | None) -> Array:
    if class_mask is None:
        # In the logits' own dtype (a maximum does not round): no wide copy for two readers.
        m = jnp.max(logits, axis=-1).astype(accumulator_dtype(logits.dtype))
    else:
        m = jnp.max(widen(logits, class_mask, None), axis=-1)
    return capped_max(lax.stop_gradient(m), class_mask, scaling)


def max_and_place(logits: Array, class_mask: Array | None) -> tuple[Array, Array]:
    """(the row's maximum, -inf where all are; the place of an entry at the maximum)."""

    def of_row(logits, class_mask):
        m = row_max(logits, class_mask, None)
        return m, near_max(logits, finite(m), class_mask)

    count = _columns(logits.shape[-1])
    if count is None or not device.on_one_device():
        return of_row(logits, class_mask)
    of_columns = partial(_max_and_place_of_columns, count=count)
    return lax.platform_dependent(logits, class_mask, cpu=of_columns, default=of_row)


def _columns(size: int) -> int | None:
    """How many rows a row of C classes is folded into, so that its columns are long enough for
    vector instructions and few enough to be searched; None: it is not."""
    divisors = [n for n in range(5, 41) if size % n == 0]
    return min(divisors, key=lambda n: abs(n - 16)) if size >= 256 and divisors else None


def _max_and_place_of_columns(
    logits: Array, class_mask: Array | None, count: int
) -> tuple[Array, Array]:
    """``max_and_place`` from the maxima of columns, the row being folded into ``count`` rows.

    XLA:CPU takes the columns' maxima as fast as the row's. Then it searches a ``count``-th of the
    entries, and the ``count`` entries of one column: a tenth to a third of the time that
    ``near_max`` takes for all of them.
    """
    x = lax.stop_gradient(logits)
    x = x if class_mask is None else widen(x, class_mask, None)
    folded = x.reshape(*x.shape[:-1], count, x.shape[-1] // count)
    highest = lax.optimization_barrier(jnp.max(folded, axis=-2))
    m = jnp.max(highest, axis=-1)
    size = highest.shape[-1]
    # The barrier keeps the two passes over the maxima apart.
    highest, top = lax.optimization_barrier((highest, m))
    index = lax.broadcasted_iota(jnp.int32, highest.shape, highest.ndim - 1)
    column = jnp.min(jnp.where(highest == top[..., None], index, size), axis=-1)
    column = jnp.where(column < size, column, 0)  # of a row that holds NaN
    row = lax.broadcasted_iota(jnp.int32, (*column.shape, count), column.ndim)
    at = column[..., None] + size * row
    few = entries(lax.optimization_barrier(logits), at)
    if class_mask is not None:
        few = widen(few, entries(jnp.broadcast_to(class_mask, logits.shape), at), None)
    place = jnp.argmax(lax.optimization_barrier(few), axis=-1).astype(jnp.int32)
    return m.astype(accumulator_dtype(m.dtype)), place * size + column


def near_max(logits: Array, m: Array, class_mask: Array | None) -> Array:
    """The first class within a few roundings of the row's maximum: the entry to keep out. int32.

    A minimum over ``j + 2^30 [x_j < m]``, with the bracket as a clipped multiple of the difference:
    that fuses into one vectorised pass on XLA:CPU, five times faster than its argmax. Not exactly
    at the maximum: where the logits are a product that XLA computes again for this pass, the
    subtraction sees it unrounded.
    """
    x = lax.stop_gradient(logits)
    x = x.astype(m.dtype) if class_mask is None else widen(x, class_mask, None)
    if not index_is_exact(x):
        return jnp.argmax(x, axis=-1).astype(jnp.int32)
    found = jnp.min(class_index(x) + lies_below(x, m, 2.0**30), axis=-1)
    # A row of -inf lies below the finite stand-in for its maximum, and NaN is no index.
    return jnp.where(found < x.shape[-1], found, 0).astype(jnp.int32)
