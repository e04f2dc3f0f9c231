"""Single passes over rows, each in the form that XLA runs best without an array of their size."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._numerics.logits import Logits, Scaling, in_nats
from jaxloss._pallas import dispatch
from jaxloss._types import Axes
from jaxloss._xla import device, mesh
from jaxloss._xla.derivatives import with_derivative_of
from jaxloss._xla.dtypes import accumulator_dtype, upcast
from jaxloss._xla.elementary import exp_of_nonpositive, finite
from jaxloss._xla.fusion import class_index, index_is_exact, lies_below, opaque, reread
from jaxloss._xla.indexing import gather_class, gather_classes, has_open_size, is_at
from jaxloss._xla.selection import select


def _selected_exponentials(logits: Logits, m: Array, omitted: Array) -> Array:
    """exp(x_j - m), and 0 at the omitted entry, of what was read."""
    x = logits.values
    return select(is_at(x, omitted), 0, logits.exp(x, m))


def other_exponentials(logits: Logits, m: Array, omitted: Array) -> Array:
    """exp(x_j - m), and 0 at the omitted entry, in the form that is best to be written out."""

    def overwritten(logits, m, omitted):
        e, at = logits.exp(logits.values, m), omitted[..., None]
        return jnp.put_along_axis(e, at, 0, axis=-1, inplace=False, mode="drop")

    x = logits.values
    # The select costs XLA:CPU up to a quarter of the loss's time, the scatter 10 ns a row.
    if logits.size < 256 or has_open_size(x) or not device.on_one_device():
        return _selected_exponentials(logits, m, omitted)
    forms = {"cpu": overwritten, "default": _selected_exponentials}
    return lax.platform_dependent(logits, m, omitted, **forms)


def _sum_of_others(logits: Logits, m: Array, omitted: Array) -> Array:
    """sum_{j != k} exp(x_j - m), in one pass that holds no array of the logits' size.

    min(|j - k|, 1) is 0 at the omitted entry and 1 elsewhere. XLA:CPU fuses it into the vectorised
    sum; with a select (or an iota, or an integer comparison) it writes the summand out first,
    three times slower.
    """
    x = logits.read(m)
    if not index_is_exact(x):
        return jnp.sum(_selected_exponentials(replace(logits, values=x), m, omitted), axis=-1)
    return jnp.sum(_is_other(x, omitted, m) * logits.exp(x, m), axis=-1)


def _is_other(x: Array, omitted: Array, m: Array) -> Array:
    """min(|j - k|, 1): 0 at the omitted entry, 1 elsewhere, for a factor. ``m``: a number a row."""
    _, one = opaque(m, 1)  # or XLA:CPU writes out its broadcast, which two passes share
    return jnp.minimum(jnp.abs(class_index(x) - omitted.astype(x.dtype)[..., None]), one)


def sum_of_others(x: Array, omitted: Array, own: Array) -> Array:
    """sum_{j != k} x_j of each row, of finite entries; ``x`` broadcasts to the rows.

    ``own``: x_k, in the dtype of the sum.
    """
    wide = x.astype(own.dtype)
    if not index_is_exact(x):
        wide = jnp.broadcast_to(wide, (*omitted.shape, x.shape[-1]))
        return jnp.sum(select(is_at(wide, omitted), 0, wide), axis=-1)
    return jnp.sum(_is_other(wide, omitted, own) * wide, axis=-1)


def _sum_of_others_in_blocks(logits: Logits, m: Array, omitted: Array) -> Array:
    """``_sum_of_others`` of long rows: C classes are taken as C / block rows, each in cache.

    On long rows XLA:CPU's sum materialises its summand after all, 8 to 16 times slower. The
    barriers keep the reshapes, which are free, from hiding the operands from its fusion.

    Only the block of the omitted entry looks for that entry, and is summed once more for it,
    because the search takes a quarter of the sum's time.
    """
    x, block = logits.values, _block_size(logits.size)
    count = logits.size // block
    spread = (*m.shape, count)
    every, m_of_block = reread(
        x.reshape(-1, block), jnp.broadcast_to(m[..., None], spread).reshape(-1)
    )
    read = replace(logits, values=every).read(m_of_block)
    sums = jnp.sum(logits.exp(read, m_of_block), axis=-1)
    sums, own = sums.reshape(spread), jnp.minimum(omitted // block, count - 1)
    few = lax.optimization_barrier(x).reshape(*spread, block)
    few = jnp.take_along_axis(few, own[..., None, None], axis=-2, mode="promise_in_bounds")
    few = replace(logits, values=few[..., 0, :])
    of_own = _sum_of_others(few, m, omitted - block * own)
    return jnp.sum(select(is_at(sums, own), 0, sums), axis=-1) + of_own


def _block_size(size: int) -> int:
    """A divisor of ``size`` in [256, 4096], the largest up to 1024 if there is one, else ``size``;
    short rows stay whole."""
    if size <= 16384:
        return size
    sizes = (*range(1024, 255, -1), *range(1025, 4097))
    return next((b for b in sizes if size % b == 0), size)


def sum_exponentials(logits: Logits, m: Array, omitted: Array) -> Array:
    """sum_{j != k} exp(x_j - m) of ``Logits.for_passes``."""
    if _block_size(logits.size) == logits.size or not device.on_one_device():
        return _sum_of_others(logits, m, omitted)
    forms = {"cpu": _sum_of_others_in_blocks, "default": _sum_of_others}
    return lax.platform_dependent(logits, m, omitted, **forms)


def keeps_exponentials(logits: Array) -> bool:
    """Whether to hold the exponentials: a wide copy of narrow logits only where it is small."""
    wide = accumulator_dtype(logits.dtype)
    if logits.dtype == wide:
        return True
    known = isinstance(logits.size, int)  # a batch that jax.export leaves open has no size
    return known and logits.shape[-1] < 256 and logits.size * wide.itemsize <= 2**20


def row_sum(logits: Logits, m: Array, omitted: Array, written: bool) -> Array:
    """sum_{j != k} exp(x_j - m). ``written``: the backward pass finds the summand held."""
    if written:
        # Written out once, to where the gradient will stand, and scaled there by the backward
        # pass: one exponential an entry instead of two.
        return jnp.sum(other_exponentials(logits.as_read(), m, omitted), axis=-1)
    return sum_exponentials(logits.for_passes(), m, omitted)


def _merged(x: Array, omitted: Array, scaling: Scaling | None = None) -> Any:
    """A class is a part of its row, and parts merge: the larger maximum stays, the other's sum is
    scaled to it."""

    def merged(a, b):
        (m, s), (n, t) = a, b
        m, n = lax.stop_gradient((m, n))
        # Equal first: -inf less -inf is NaN. In lax, which is traced in a third of jnp's time.
        lower = in_nats(lax.neg(lax.abs(lax.sub(m, n))), scaling)
        scale = lax.select(lax.eq(m, n), lax.full_like(m, 1), exp_of_nonpositive(lower))
        first, second = lax.add(s, lax.mul(t, scale)), lax.add(t, lax.mul(s, scale))
        return lax.max(m, n), lax.select(lax.ge(m, n), first, second)

    x = upcast(x)
    # 1, but NaN for +inf as exp(x_j - m) is there, with the derivative of exp(x_j - m): JAX loses
    # the rule below where it differentiates twice through jax.checkpoint within shard_map.
    one = 1 + in_nats(x - lax.stop_gradient(x), scaling)
    others = select(is_at(x, omitted) | (x == -jnp.inf), 0, one)
    nothing = jnp.array(-jnp.inf, x.dtype), jnp.zeros((), x.dtype)
    nothing = tuple(mesh.varying(v, mesh.varies_over(x)) for v in nothing)
    return lax.reduce((x, others), nothing, merged, (x.ndim - 1,))


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def max_and_sum_in_one(
    x: Array, omitted: Array, compute: Callable = _merged, scaling: Scaling | None = None
) -> Any:
    """(max_j x_j, sum_{j != k} exp(x_j - max)) in one reduction, which reads ``x`` once."""
    return compute(x, omitted)


@max_and_sum_in_one.defjvp
def _(compute, scaling, primals, tangents):
    # The maximum is a number to subtract, as good as any other near it: it has no derivative.
    x, omitted = primals
    m, s = max_and_sum_in_one(x, omitted, compute, scaling)
    logits = Logits(upcast(x), scaling=scaling)
    dx = logits.nats(tangents[0].astype(m.dtype))
    moved = jnp.sum(_selected_exponentials(logits, finite(m), omitted) * dx, axis=-1)
    return (m, s), (jnp.zeros_like(m), moved)


def max_and_sum(logits: Logits, omitted: Array, written: bool) -> tuple[Array, Array]:
    """(the row's maximum, -inf where all are; the sum of the others' exponentials).

    In one pass where reading the logits is what takes the time. CPUs vectorise two, not that one.
    """

    def in_two(logits, omitted):
        m = row_max(logits)
        return m, row_sum(logits, finite(m), omitted, written)

    def in_one(logits, omitted):
        wide = logits.as_read()
        compute = partial(_merged, scaling=wide.scaling)
        return max_and_sum_in_one(wide.values, omitted, compute, wide.scaling)

    forms = {"cpu": in_two, "default": in_one}
    by_kernel = dispatch.row_sums(logits.values, logits.plain, logits.pallas_bytes)
    if by_kernel is not None:
        kernel = by_kernel(_merged)
        forms["cuda"] = lambda logits, omitted: max_and_sum_in_one(logits.values, omitted, kernel)
    return lax.platform_dependent(logits, omitted, **forms)


def gradient_pass(plain: Callable, logits: Array, *rest: Array) -> Array:
    """``plain(logits, m, omitted, scale, at_omitted, active)``, which is ``rows.logits_gradient``
    in the logits' dtype; by a kernel where there is one."""
    by_kernel = dispatch.row_gradient(logits)
    if by_kernel is None:
        return plain(logits, *rest)
    kernel = with_derivative_of(plain, by_kernel(plain))
    return lax.platform_dependent(logits, *rest, cuda=kernel, default=plain)


def row_max(logits: Logits) -> Array:
    x = logits.values
    if logits.exist is None:
        # In the logits' own dtype (a maximum does not round): no wide copy for two readers.
        m = jnp.max(x, axis=-1).astype(accumulator_dtype(x.dtype))
    else:
        m = jnp.max(logits.uncapped().wide(), axis=-1)
    return logits.capped_max(lax.stop_gradient(m))


def max_and_place(logits: Logits) -> tuple[Array, Array]:
    """(the row's maximum, -inf where all are; the place of an entry at the maximum).

    Of uncapped logits.
    """

    def of_row(logits):
        m = row_max(logits)
        return m, near_max(logits, finite(m))

    count = _columns(logits.size)
    if count is None or not device.on_one_device():
        return of_row(logits)
    of_columns = partial(_max_and_place_of_columns, count=count)
    return lax.platform_dependent(logits, cpu=of_columns, default=of_row)


def _columns(size: int) -> int | None:
    """How many rows a row of C classes is folded into, so that its columns are long enough for
    vector instructions and few enough to be searched; None: it is not."""
    divisors = [n for n in range(5, 41) if size % n == 0]
    return min(divisors, key=lambda n: abs(n - 16)) if size >= 256 and divisors else None


def _max_and_place_of_columns(logits: Logits, count: int) -> tuple[Array, Array]:
    """``max_and_place`` from the maxima of columns, the row being folded into ``count`` rows.

    XLA:CPU takes the columns' maxima as fast as the row's. Then it searches a ``count``-th of the
    entries, and the ``count`` entries of one column: a tenth to a third of the time that
    ``near_max`` takes for all of them.
    """
    x = lax.stop_gradient(logits.values)
    x = x if logits.exist is None else replace(logits, values=x).wide()
    folded = x.reshape(*x.shape[:-1], count, x.shape[-1] // count)
    highest = lax.optimization_barrier(jnp.max(folded, axis=-2))
    m = jnp.max(highest, axis=-1)
    size = highest.shape[-1]
    # The barrier keeps the two passes over the maxima apart.
    highest, top = lax.optimization_barrier((highest, m))
    index = lax.broadcasted_iota(jnp.int32, highest.shape, highest.ndim - 1)
    column = jnp.min(select(highest == top[..., None], index, size), axis=-1)
    column = select(column < size, column, 0)  # of a row that holds NaN
    row = lax.broadcasted_iota(jnp.int32, (*column.shape, count), column.ndim)
    at = column[..., None] + size * row
    few = gather_classes(lax.optimization_barrier(logits.values), at)
    if logits.exist is not None:
        exist = jnp.broadcast_to(logits.exist, logits.values.shape)
        few = Logits(few, gather_classes(exist, at)).wide()
    place = jnp.argmax(lax.optimization_barrier(few), axis=-1).astype(jnp.int32)
    return m.astype(accumulator_dtype(m.dtype)), place * size + column


def top_k(x: Array, k: int) -> tuple[Array, Array]:
    """``lax.top_k`` of ``x[..., C]`` without its derivative: of equal entries the first."""
    x = lax.stop_gradient(x)
    size = x.shape[-1]
    group = round(math.sqrt(size / max(1, k)))
    of_all = partial(_top_k_of_all, k=k)
    # A reshape of classes that a partitioner splits would gather them.
    if 2 * (size / group + k * group) > size or not device.is_whole():
        return of_all(x)
    of_groups = partial(_top_k_of_groups, k=k, group=group)
    return lax.platform_dependent(x, cpu=of_groups, default=of_all)


def _top_k_of_all(x: Array, k: int) -> tuple[Array, Array]:
    best, place = lax.top_k(x, k)
    return best, place


def _top_k_of_groups(x: Array, k: int, group: int) -> tuple[Array, Array]:
    """The k largest lie within the k groups of neighbours with the largest maxima, of equal maxima
    the first groups, and within the fewer than ``group`` classes that are left at the end.

    XLA:CPU sorts some 2 C / group entries of a row and not all C, in a third of the time.
    """
    lead, left = x.shape[:-1], x.shape[-1] % group
    end = x.shape[-1] - left
    folded = x[..., :end].reshape(*lead, -1, group)
    _, found = lax.top_k(_with_one_zero(jnp.max(folded, axis=-1)), k)
    found = jnp.sort(found, axis=-1)  # so that of equal entries the first stays so
    few = jnp.take_along_axis(folded, found[..., None], axis=-2, mode="promise_in_bounds")
    few = jnp.concatenate([few.reshape(*lead, k * group), x[..., end:]], axis=-1)
    few = _with_one_zero(few)
    # The barrier, or XLA:CPU sees a slice of a slice, knows no top k in it, and sorts all.
    best, place = lax.optimization_barrier(_top_k_of_all(few, k))
    of_group = jnp.minimum(place // group, k - 1)
    of_group = jnp.take_along_axis(found, of_group, axis=-1, mode="promise_in_bounds")
    last = place - k * group
    return best, select(last < 0, of_group * group + place % group, end + last)


def _with_one_zero(x: Array) -> Array:
    """``lax.top_k`` puts 0 before -0, and a maximum may be either of the two."""
    return select(x == 0, 0, x)


def near_max(logits: Logits, m: Array) -> Array:
    """The first class within a few roundings of the row's maximum: the entry to keep out. int32.

    A minimum over ``j + 2^30 [x_j < m]``, with the bracket as a clipped multiple of the difference:
    that fuses into one vectorised pass on XLA:CPU, five times faster than its argmax. Not exactly
    at the maximum: where the logits are a product that XLA computes again for this pass, the
    subtraction sees it unrounded.
    """
    x = lax.stop_gradient(logits.values)
    x = x.astype(m.dtype) if logits.exist is None else replace(logits, values=x).wide()
    if not index_is_exact(x):
        return jnp.argmax(x, axis=-1).astype(jnp.int32)
    found = jnp.min(class_index(x) + lies_below(x, m, 2.0**30), axis=-1)
    # A row of -inf lies below the finite stand-in for its maximum, and NaN is no index.
    return select(found < x.shape[-1], found, 0).astype(jnp.int32)


def one_near_max(x: Array, x_max: Array, axes: Axes) -> Array:
    """The class of one entry near the row's maximum; past the end where another device has it."""
    index = near_max(Logits(x), x_max)
    if not axes:
        return index
    here = gather_class(lax.stop_gradient(x), index)
    own, best = lax.axis_index(axes), mesh.largest(here, axes)
    first = -mesh.largest(select(here == best, -own, -mesh.size(axes)), axes)
    return select(own == first, index, x.shape[-1])
