"""Single passes over rows, each in the form that XLA runs best without an array of their size."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxloss import _mesh
from jaxloss._casts import accumulator_dtype, widened
from jaxloss._elementary import exp_of_nonpositive, tanh


class Scaling(NamedTuple):
    """What logits become first: ``softcap * tanh(x / softcap) / temperature``."""

    softcap: float | None
    temperature: float

    @property
    def unit(self) -> float:
        return (self.softcap or 1) / self.temperature


def scaling_of(softcap: float | None, temperature: float = 1.0) -> Scaling | None:
    return None if softcap is None and temperature == 1 else Scaling(softcap, temperature)


def widen(x: Array, class_mask: Array | None, scaling: Scaling | None) -> Array:
    """The logits as they are compared: in the accumulator's dtype, in units of ``scaling.unit``,
    then masked.

    The cap comes first: a class that is masked has -inf, and tanh(-inf) is -1.
    """
    x = widened(x)
    if cap_of(scaling) is not None and class_mask is not None:
        x = jnp.where(class_mask, x, 0)  # 0 times the slope of a NaN is NaN, in second derivatives
    x = capped(x, scaling)
    return x if class_mask is None else jnp.where(class_mask, x, -jnp.inf)


def cap_of(scaling: Scaling | None) -> float | None:
    return None if scaling is None else scaling.softcap


def capped(x: Array, scaling: Scaling | None) -> Array:
    cap = cap_of(scaling)
    return x if cap is None else tanh(x * (1 / cap))  # by the same number as read does, to the bit


def for_passes(
    logits: Array, class_mask: Array | None, scaling: Scaling | None
) -> tuple[Array, Scaling | None]:
    """(what several passes read; what is left to do with it, by ``read``).

    The logits themselves where nothing is masked: XLA:CPU would write out what passes share.
    """
    if class_mask is None:
        return logits, scaling
    left = None if scaling is None else Scaling(None, 1 / scaling.unit)
    return widen(logits, class_mask, scaling), left


def read(x: Array, m: Array, scaling: Scaling | None) -> Array:
    """In the accumulator's dtype and capped; ``m`` is the row's maximum."""
    x, cap = x.astype(accumulator_dtype(x.dtype)), cap_of(scaling)
    if cap is None:
        return x
    _, steep = hidden(m, 1 / cap)
    return tanh(x * steep)


def hidden(m: Array, *numbers: ArrayLike) -> tuple[Array, ...]:
    """A number a row, which has no derivative, and those of all rows, behind a barrier.

    XLA:CPU writes out the broadcast of what several passes share, of a number too, but not of what
    a barrier gives; barriers of the same operands are one.
    """
    m = lax.stop_gradient(m)
    return lax.optimization_barrier((m, *(jnp.asarray(x, m.dtype) for x in numbers)))


def scaled(x: Array, scaling: Scaling | None) -> Array:
    """Logits that ``widen`` gave, or their differences, in nats.

    The difference first: exact, whatever offset the logits share. Of scaled logits it would be of
    two roundings, of which compilers leave one out where the product is part of the same pass: the
    maximum is then not the largest, and exponentials overflow.
    """
    return x if scaling is None else x * scaling.unit


def is_kept(x: Array, kept: Array) -> Array:
    split = jax.typeof(x).sharding if _classes_are_split(x) else None
    iota = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1, out_sharding=split)
    return iota == kept[..., None]


def _classes_are_split(x: Array) -> bool:
    """Over the devices of an explicit mesh, where JAX refuses to gather from them."""
    spec = jax.typeof(x).sharding.spec
    return len(spec) == x.ndim and spec[-1] is not None


def _is_split(x: Array) -> bool:
    """Over the devices of an explicit mesh in any axis, where JAX refuses to scatter."""
    return any(entry is not None for entry in jax.typeof(x).sharding.spec)


def _class_index(x: Array) -> Array:
    index = jnp.arange(x.shape[-1], dtype=accumulator_dtype(x.dtype))
    return index.reshape((1,) * (x.ndim - 1) + index.shape)


def _index_is_exact(x: Array) -> bool:
    return x.shape[-1] <= 2 ** (jnp.finfo(accumulator_dtype(x.dtype)).nmant + 1)


def above(x: Array, m: Array, scaling: Scaling | None) -> Array:
    """x_j - m in nats."""
    if scaling is None:
        return x - m[..., None]
    m, unit = hidden(m, scaling.unit)
    return (x - m[..., None]) * unit


def exponentials(x: Array, m: Array, scaling: Scaling | None) -> Array:
    """exp(x_j - m) in nats."""
    return exp_of_nonpositive(above(x, m, scaling))


def _selected_exponentials(
    x: Array, m: Array, kept: Array, scaling: Scaling | None = None
) -> Array:
    """exp(x_j - m), and 0 at the kept entry."""
    return jnp.where(is_kept(x, kept), 0, exponentials(x, m, scaling))


def other_exponentials(x: Array, m: Array, kept: Array, scaling: Scaling | None = None) -> Array:
    """The same, in the form that an array of them is best written in."""

    def overwritten(x, m, kept):
        e, at = exponentials(x, m, scaling), kept[..., None]
        return jnp.put_along_axis(e, at, 0, axis=-1, inplace=False, mode="drop")

    selected = partial(_selected_exponentials, scaling=scaling)
    # The select costs XLA:CPU up to a quarter of the loss's time, the scatter 10 ns a row.
    if x.shape[-1] < 256 or not _on_one_device():
        return selected(x, m, kept)
    return lax.platform_dependent(x, m, kept, cpu=overwritten, default=selected)


def _on_one_device() -> bool:
    # Sharded classes must not be reshaped or indexed (they would be gathered), and whether they
    # are sharded is not known while tracing: one device leaves no doubt.
    return jax.device_count() == 1


def _sum_of_others(x: Array, m: Array, kept: Array, scaling: Scaling | None = None) -> Array:
    """sum_{j != k} exp(x_j - m), in one pass that holds no array of the logits' size.

    min(|j - k|, 1) is 0 at the kept entry and 1 elsewhere. XLA:CPU fuses it into the vectorised
    sum; with a select (or an iota, or an integer comparison) it writes the summand out first,
    three times slower.
    """
    x = read(x, m, scaling)
    if not _index_is_exact(x):
        return jnp.sum(_selected_exponentials(x, m, kept, scaling), axis=-1)
    one = 1 if cap_of(scaling) is None else hidden(m, 1)[1]  # the cap's derivative has a 1 too
    other = jnp.minimum(jnp.abs(_class_index(x) - kept.astype(x.dtype)[..., None]), one)
    return jnp.sum(other * exponentials(x, m, scaling), axis=-1)


def _sum_of_others_in_blocks(
    x: Array, m: Array, kept: Array, scaling: Scaling | None = None
) -> Array:
    """The same, a row of C classes taken as C / block rows, each in cache.

    On long rows XLA:CPU's sum materialises its summand after all, 8 to 16 times slower. The
    barriers keep the reshapes, which are free, from hiding the operands from its fusion.
    """
    block = _block_size(x.shape[-1])
    count = x.shape[-1] // block
    spread = (*m.shape, count)
    m = jnp.broadcast_to(m[..., None], spread).reshape(-1)
    start = block * lax.broadcasted_iota(kept.dtype, spread, kept.ndim)
    kept = (kept[..., None] - start).reshape(-1)
    x, m = apart(x.reshape(-1, block), m)
    return jnp.sum(_sum_of_others(x, m, kept, scaling).reshape(spread), axis=-1)


def _block_size(size: int) -> int:
    """The largest divisor of ``size`` in [256, 4096], else ``size``; short rows stay whole."""
    if size <= 16384:
        return size
    return next((b for b in range(4096, 255, -1) if size % b == 0), size)


def sum_exponentials(x: Array, m: Array, kept: Array, scaling: Scaling | None = None) -> Array:
    whole = partial(_sum_of_others, scaling=scaling)
    if _block_size(x.shape[-1]) == x.shape[-1] or not _on_one_device():
        return whole(x, m, kept)
    in_blocks = partial(_sum_of_others_in_blocks, scaling=scaling)
    return lax.platform_dependent(x, m, kept, cpu=in_blocks, default=whole)


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
        apart = scaled(-lax.abs(m - n), scaling)
        scale = lax.select(lax.eq(m, n), lax.full_like(m, 1), exp_of_nonpositive(apart))
        return lax.max(m, n), lax.select(lax.ge(m, n), s + t * scale, t + s * scale)

    x = widened(x)
    # 1, but NaN for +inf as exp(x_j - m) is there, with the derivative of exp(x_j - m): JAX loses
    # the rule below where it differentiates twice through jax.checkpoint within shard_map.
    one = 1 + scaled(x - lax.stop_gradient(x), scaling)
    others = jnp.where(is_kept(x, kept) | (x == -jnp.inf), 0, one)
    nothing = jnp.array(-jnp.inf, x.dtype), jnp.zeros((), x.dtype)
    nothing = tuple(_mesh.spread(v, _mesh.varies_over(x)) for v in nothing)
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
    logits: Array, kept: Array, class_mask: Array | None, scaling: Scaling | None, written: bool
) -> tuple[Array, Array]:
    """(the row's maximum, -inf where all are; the sum of the others' exponentials).

    In one pass where reading the logits is what takes the time. CPUs vectorise two, not that one.
    """

    def in_two(logits, kept, class_mask):
        m = row_max(logits, class_mask, scaling)
        return m, row_sum(logits, finite(m), kept, class_mask, scaling, written)

    def in_one(logits, kept, class_mask):
        compute = partial(_merged, scaling=scaling)
        return max_and_sum_in_one(widen(logits, class_mask, scaling), kept, compute, scaling)

    forms = {"cpu": in_two, "default": in_one}
    if class_mask is None and scaling is None and _fit_kernels(logits):
        from jaxloss._kernels import rows_gpu  # Pallas: a third of the whole import

        kernel = rows_gpu.max_and_sum(_merged)
        forms["cuda"] = lambda logits, kept, _: max_and_sum_in_one(logits, kept, kernel)
    return lax.platform_dependent(logits, kept, class_mask, **forms)


def with_derivative_of(plain: Callable, kernel: Callable) -> Callable:
    """``kernel``, which has no derivative of its own: ``plain``, XLA's, is the same function."""
    rule = jax.custom_jvp(kernel)
    rule.defjvp(lambda args, tangents: (rule(*args), jax.jvp(plain, args, tangents)[1]))
    return rule


def slope_pass(plain: Callable, logits: Array, *rest: Array) -> Array:
    """``plain(logits, m, kept, scale, at_kept, active)``: scale exp(x_j - m), at_kept where j is
    kept, and 0 in a row that is not active, in the logits' dtype; by a kernel where there is one.
    """
    # In 32 bits XLA reads and writes as fast as the memory allows.
    if logits.dtype.itemsize != 2 or not _fit_kernels(logits):
        return plain(logits, *rest)
    from jaxloss._kernels import rows_gpu

    kernel = with_derivative_of(plain, rows_gpu.slope(plain))
    return lax.platform_dependent(logits, *rest, cuda=kernel, default=plain)


def _fit_kernels(logits: Array) -> bool:
    """Whether the kernels for a Hopper GPU have tiles of these classes."""
    return (
        is_hopper()
        and is_whole()
        and all(isinstance(n, int) for n in logits.shape)
        and logits.shape[-1] % 128 == 0
        and logits.dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
    )


def is_whole() -> bool:
    """Whether arrays are what one device holds. No kernel is for what a partitioner may split."""
    return _on_one_device() or _mesh.is_manual()


def is_hopper() -> bool:
    """Whether the default device is a GPU that the kernels are for: an H100, an H200."""
    if jax.default_backend() != "gpu":
        return False
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"


@jax.custom_jvp
def apart(x: Array, with_it: Any) -> tuple[Array, Any]:
    """Both, for one more pass over ``x``: XLA:CPU would merge its conversion with another pass's,
    and write a float32 copy out for the two. Barriers of the same operands would be merged too."""
    return lax.optimization_barrier((x, with_it))


@apart.defjvp
def _(primals, tangents):
    # JAX 0.11 and 0.12 cannot transpose a barrier of which one operand alone has a tangent.
    return apart(*primals), tangents


def row_max(logits: Array, class_mask: Array | None, scaling: Scaling | None) -> Array:
    if class_mask is None:
        # In the logits' own dtype (a maximum does not round): no wide copy for two readers.
        m = jnp.max(logits, axis=-1).astype(accumulator_dtype(logits.dtype))
    else:
        m = jnp.max(widen(logits, class_mask, None), axis=-1)
    return capped_max(lax.stop_gradient(m), class_mask, scaling)


def capped_max(m: Array, class_mask: Array | None, scaling: Scaling | None) -> Array:
    """The maximum of capped logits from that of the logits."""
    if cap_of(scaling) is None:
        return m
    m = capped(m, scaling)  # which moves no maximum
    # A cap lifts -inf, but not of classes that are all masked.
    return m if class_mask is None else jnp.where(jnp.any(class_mask, axis=-1), m, -jnp.inf)


def finite(m: Array) -> Array:
    # exp(-inf - -inf) is NaN: an empty row's exponentials are 0, whatever stands in for m.
    return jnp.where(m == -jnp.inf, 0, m)


def asked_for(ct: Array, slope: Array) -> Array:
    """``ct[..., None] * slope``. A row that is asked for nothing gets 0 of a slope that is NaN or
    inf too."""
    ct = ct[..., None]
    return ct * jnp.where((ct == 0) & ~jnp.isfinite(slope), 0, slope)


def highest(logits: Array, class_mask: Array | None, start: Any) -> tuple[Array, Array]:
    """(the row's maximum, +inf for NaN; its first class, that of the first column being start)."""
    # A soft cap does not move the maximum. Without the barrier a product could be computed twice,
    # and its maximum be no entry of it.
    x = widen(lax.optimization_barrier(lax.stop_gradient(logits)), class_mask, None)
    if is_whole():
        found = jnp.argmax(x, axis=-1).astype(jnp.int32)
        top = entry(x, found)
    else:  # of classes split over devices, argmax gathers a pair from each
        top = jnp.max(x, axis=-1)
        index = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
        found = jnp.min(jnp.where(x == top[..., None], index, x.shape[-1]), axis=-1)
    return jnp.where(jnp.isnan(top), jnp.inf, top), found + start


def class_of(top: Array, found: Array, vocab_axes: _mesh.Axes) -> Array:
    """The prediction from what ``highest`` gives on each device; -1: see ``prediction``."""
    if vocab_axes:
        here, top = top, _mesh.largest(top, vocab_axes)
        found = jnp.where(here == top, found, jnp.iinfo(jnp.int32).max)
        found = lax.pmin(found, vocab_axes)
    return jnp.where(jnp.isinf(top), -1, found)


def prediction(
    logits: Array, class_mask: Array | None, start: Any, vocab_axes: _mesh.Axes
) -> Array:
    """The first class at the row's maximum; -1 in a row that holds NaN or +inf, or nothing but
    -inf: the first of its classes may be masked. int32."""
    return class_of(*highest(logits, class_mask, start), vocab_axes)


def ahead(x: Array, of_label: Array, label: Array) -> Array:
    """How many of the classes are predicted before the label's: those of larger logits, and of
    equal ones those of lower index. int32.

    In saturating arithmetic, as in ``near_max``: XLA:CPU writes out a summand that compares,
    selects, clamps (so no minimum stands right upon a maximum) or is an integer.
    """
    wide = accumulator_dtype(x.dtype)
    # Classes at -inf tie, and subtract.
    least = jnp.finfo(wide).min
    x, of_label = jnp.maximum(x.astype(wide), least), jnp.maximum(of_label, least)[..., None]
    if not _index_is_exact(x):
        at = lax.broadcasted_iota(label.dtype, x.shape, x.ndim - 1) - label[..., None]
        larger = (x > of_label) | ((x == of_label) & (at < 0))
        return jnp.sum(larger & (at != 0), axis=-1, dtype=jnp.int32)
    tiny, (of_label, one) = jnp.finfo(wide).tiny, hidden(of_label, 1)
    below = label.astype(wide)[..., None] - _class_index(x)
    # 2^30 for a larger logit, 0 for an equal one, below -2^30 for a smaller one.
    larger = jnp.minimum(jnp.maximum((x - of_label) / tiny, -1) / tiny, 2.0**30)
    first = jnp.maximum(larger + jnp.minimum(below, one), 0) * 2
    # The label's own logit may have been rounded otherwise than the one it is compared with.
    return jnp.sum(jnp.minimum(first, jnp.minimum(jnp.abs(below), one)), axis=-1).astype(jnp.int32)


def rank(
    logits: Array, class_mask: Array | None, kept: Array, start: Any, vocab_axes: _mesh.Axes
) -> Array:
    """The label's place in the order of predictions, 0 for the first; -1: it has none. int32."""
    x = lax.stop_gradient(logits)
    if class_mask is not None:
        x = widen(lax.optimization_barrier(x), class_mask, None)
    of_label = widened(entry(lax.optimization_barrier(x), kept))
    of_label = jnp.where(kept < x.shape[-1], of_label, 0)
    label, of_label, found = found_label(kept, of_label, x.shape[-1], start, vocab_axes)
    before = ahead(*apart(x, of_label), label - start)
    return jnp.where(found, lax.psum(before, vocab_axes) if vocab_axes else before, -1)


def found_label(kept: Array, of_label: Array, size: int, start: Any, vocab_axes: _mesh.Axes):
    """(the label's class, its logit, whether it is one of the classes) from what each device has.

    ``kept`` is its column of the ``size`` here, from the class ``start`` on; ``of_label`` its
    logit, 0 where it is not here.
    """
    here = kept < size
    label = jnp.where(here, kept + start, 0)
    if vocab_axes:
        label, of_label, here = lax.psum((label, of_label, here.astype(jnp.int32)), vocab_axes)
        here = here > 0
    return label, of_label, here


def within(index: Array, start: Any, size: int) -> Array:
    """The class's place among the ``size`` from ``start`` on; ``size``: it is not among them."""
    return jnp.where((index >= start) & (index < start + size), index - start, size)


def near_max(logits: Array, m: Array, class_mask: Array | None) -> Array:
    """The first class within a few roundings of the row's maximum: the entry to keep out. int32.

    A minimum over ``j + 2^30 [x_j < m]``, with the bracket as a clipped multiple of the difference:
    that fuses into one vectorised pass on XLA:CPU, five times faster than its argmax. Not exactly
    at the maximum: where the logits are a product that XLA computes again for this pass, the
    subtraction sees it unrounded.
    """
    x = lax.stop_gradient(logits)
    x = x.astype(m.dtype) if class_mask is None else widen(x, class_mask, None)
    if not _index_is_exact(x):
        return jnp.argmax(x, axis=-1).astype(jnp.int32)
    found = jnp.min(_class_index(x) + lies_below(x, m, 2.0**30), axis=-1)
    # A row of -inf lies below the finite stand-in for its maximum, and NaN is no index.
    return jnp.where(found < x.shape[-1], found, 0).astype(jnp.int32)


def lies_below(x: Array, m: Array, value: float) -> Array:
    """``value`` where ``x[..., C]`` is more than a few roundings below ``m``, 0 elsewhere: for a
    summand."""
    info = jnp.finfo(x.dtype)
    bound = m - 4 * info.eps * jnp.abs(m) - info.tiny
    bound, steep, zero, most = hidden(bound, 1 / info.tiny, 0, value)
    # The maximum stands between the factors, or XLA folds them to inf (0 * inf is NaN); right under
    # the minimum it would make a clamp of both, which XLA:CPU writes out.
    difference = lax.stop_gradient(bound[..., None] - x)  # a step has no slope
    return jnp.minimum(jnp.maximum(difference * steep, zero) * steep, most)


def of_rank(x: Any, rank: int) -> Any:
    """Leading axes of size 1: nothing is promoted in rank silently."""
    return None if x is None else x.reshape((1,) * (rank - x.ndim) + x.shape)


def _only(here: Array, x: Array, axis: int) -> Array:
    """The one entry of ``x`` that is here along the axis; 0: none is."""
    x = jnp.where(here, x, jnp.zeros((), x.dtype))
    return jnp.any(x, axis=axis) if x.dtype == bool else jnp.sum(x, axis=axis)


def entry(x: Array, index: Array) -> Array:
    """x[..., index], or the last entry where the index is past the end."""
    index = jnp.minimum(index, x.shape[-1] - 1)
    if _classes_are_split(x):
        return _only(is_kept(x, index), x, -1)
    index = index[..., None]
    return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds")[..., 0]


def entries(x: Array, index: Array) -> Array:
    """x[..., index[..., k]], the last entry where an index is past the end."""
    index = jnp.minimum(index, x.shape[-1] - 1)
    if _classes_are_split(x):
        return jax.vmap(entry, in_axes=(None, -1), out_axes=-1)(x, index)
    return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds")


def put_at(x: Array, index: Array, values: Array) -> Array:
    """``x`` with ``values[..., k]`` at the distinct ``index[..., k]``; past the end: nowhere."""
    if _is_split(x):
        hit = is_kept(x[..., None, :], index)
        return jnp.where(jnp.any(hit, axis=-2), _only(hit, values[..., None], -2), x)
    if x.dtype.itemsize == 2:  # XLA:CPU scatters narrow floats by way of a float32 copy
        bits, of_values = (lax.bitcast_convert_type(v, jnp.uint16) for v in (x, values))
        bits = jnp.put_along_axis(bits, index, of_values, axis=-1, inplace=False, mode="drop")
        return lax.bitcast_convert_type(bits, x.dtype)
    return jnp.put_along_axis(x, index, values, axis=-1, inplace=False, mode="drop")


def elsewhere(x: Array, index: Array) -> Array:
    """Which entries of ``x[..., C]`` are at none of ``index[..., k]``."""
    return put_at(jnp.ones_like(x, bool), index, jnp.zeros_like(index, bool))
