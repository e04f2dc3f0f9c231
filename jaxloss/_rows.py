"""The numerics: what one row of logits gives, and its exact gradient.

For a row ``x`` with maximum ``m``, one entry ``x_k`` is kept out of the sum: the label's where
there is a class index, one at the maximum where there is none. Then::

    s = sum_{j != k} exp(x_j - m)           the others
    d = m - x_k                             how far the kept entry lies below the maximum
    t = s + expm1(-d)                       so that sum_j exp(x_j - m) = 1 + t
    r = log1p(t)                            the log-sum-exp above the maximum

``d + r`` is the loss of class ``k``. Where ``k`` is at the maximum, ``t`` is ``s``: nothing was
ever added to 1, so a loss of 1e-12 is 1e-12. ``logsumexp - x_k`` gives 0 there.

The softmax is ``p_j = exp(x_j - m) / (1 + t)``, and what the gradient needs at the kept entry is
``p_k - 1 = -s / (1 + t)``: the same number as ``expm1(-loss)``, without the loss's own rounding.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._forward_mode import with_forward_mode


class RowLosses(NamedTuple):
    """One number a row (an Array); None where it was not asked for."""

    nll: Any  # logsumexp(x) - x_k
    soft: Any  # sum_j q_j (logsumexp(x) - x_j), for soft targets q
    logsumexp: Any
    entropy: Any


class RowState(NamedTuple):
    """What the backward pass needs beside the logits: scalars of a row.

    ``(m, s, x_k)`` of two disjoint parts of a row merge: keep the larger ``m``, scale the other
    part's ``s`` by the exponential of the difference.
    """

    m: Array
    s: Array
    d: Array
    t: Array
    kept: Array  # index of the entry that is kept out; the number of classes: there is none
    mass: Any  # sum_j q_j
    other_mass: Any  # sum_{j != k} q_j
    spread: Any  # entropy - r


def accumulator_dtype(dtype) -> jnp.dtype:
    """float32, or float64 for float64: no sum is ever held in fewer bits."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


@jax.custom_jvp
def _widen_bfloat16(x: Array) -> Array:
    """float32 of bfloat16, by a shift on CPU: XLA's conversion takes longer there than the exp."""

    def shifted(x):
        bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
        return lax.bitcast_convert_type(bits << 16, jnp.float32)

    return lax.platform_dependent(x, cpu=shifted, default=lambda x: x.astype(jnp.float32))


@_widen_bfloat16.defjvp
def _widen_bfloat16_jvp(primals, tangents):
    # A bitcast has no derivative.
    return _widen_bfloat16(*primals), _widen_bfloat16(*tangents)


@jax.custom_jvp
def _narrow_bfloat16(x: Array) -> Array:
    """bfloat16 of float32, to nearest, ties to even: in integers on CPU, as the above."""

    def rounded(x):
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # The carry of a NaN's low bits would run into its sign.
        near = jnp.where(jnp.isnan(x), 0x7FC0, near)
        return lax.bitcast_convert_type(near.astype(jnp.uint16), jnp.bfloat16)

    return lax.platform_dependent(x, cpu=rounded, default=lambda x: x.astype(jnp.bfloat16))


@_narrow_bfloat16.defjvp
def _narrow_bfloat16_jvp(primals, tangents):
    return _narrow_bfloat16(*primals), _narrow_bfloat16(*tangents)


def _wide(x: Array) -> Array:
    return _widen_bfloat16(x) if x.dtype == jnp.bfloat16 else x.astype(accumulator_dtype(x.dtype))


def _narrow(x: Array, dtype) -> Array:
    both = x.dtype == jnp.float32 and dtype == jnp.bfloat16
    return _narrow_bfloat16(x) if both else x.astype(dtype)


def widen(x: Array, class_mask: Array | None, softcap: float | None) -> Array:
    """The logits as they are reasoned about: in the accumulator's dtype, capped, then masked.

    The cap comes first: a class that is masked has -inf, and cap * tanh(-inf / cap) is -cap.
    """
    x = _wide(x)
    if softcap is not None:
        x = softcap * jnp.tanh(x / softcap)
    return x if class_mask is None else jnp.where(class_mask, x, -jnp.inf)


def _softcap_slope(x: Array, softcap: float) -> Array:
    # sech^2, not 1 - tanh^2: the latter is 0 past |x| = 9 cap where the slope is still 6e-8.
    e = jnp.exp(-2 * jnp.abs(_wide(x) / softcap))
    return 4 * e / (1 + e) ** 2


def _is_kept(x: Array, kept: Array) -> Array:
    return lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) == kept[..., None]


def _classes_are_split(x: Array) -> bool:
    """Over the devices of an explicit mesh, where JAX refuses to gather from them."""
    spec = jax.typeof(x).sharding.spec
    return len(spec) == x.ndim and spec[-1] is not None


def _class_index(x: Array) -> Array:
    index = jnp.arange(x.shape[-1], dtype=accumulator_dtype(x.dtype))
    return index.reshape((1,) * (x.ndim - 1) + index.shape)


def _index_is_exact(x: Array) -> bool:
    return x.shape[-1] <= 2 ** (jnp.finfo(accumulator_dtype(x.dtype)).nmant + 1)


def _selected_exponentials(x: Array, m: Array, kept: Array) -> Array:
    """exp(x_j - m), and 0 at the kept entry."""
    return jnp.where(_is_kept(x, kept), 0, jnp.exp(x - m[..., None]))


def _other_exponentials(x: Array, m: Array, kept: Array) -> Array:
    """The same, in the form that an array of them is best written in."""

    def overwritten(x, m, kept):
        e, at = jnp.exp(x - m[..., None]), kept[..., None]
        return jnp.put_along_axis(e, at, 0, axis=-1, inplace=False, mode="drop")

    # The select costs XLA:CPU up to a quarter of the loss's time, the scatter 10 ns a row.
    if x.shape[-1] < 256 or not _on_one_device():
        return _selected_exponentials(x, m, kept)
    return lax.platform_dependent(x, m, kept, cpu=overwritten, default=_selected_exponentials)


def _on_one_device() -> bool:
    # Sharded classes must not be reshaped or indexed (they would be gathered), and whether they
    # are sharded is not known while tracing: one device leaves no doubt.
    return jax.device_count() == 1


def _sum_of_others(x: Array, m: Array, kept: Array) -> Array:
    """sum_{j != k} exp(x_j - m), in one pass that holds no array of the logits' size.

    min(|j - k|, 1) is 0 at the kept entry and 1 elsewhere. XLA:CPU fuses it into the vectorised
    sum; with a select (or an iota, or an integer comparison) it writes the summand out first,
    three times slower.
    """
    wide = accumulator_dtype(x.dtype)
    if not _index_is_exact(x):
        return jnp.sum(_selected_exponentials(x.astype(wide), m, kept), axis=-1)
    other = jnp.minimum(jnp.abs(_class_index(x) - kept.astype(wide)[..., None]), 1)
    return jnp.sum(other * jnp.exp(x.astype(wide) - m[..., None]), axis=-1)


def _sum_of_others_in_blocks(x: Array, m: Array, kept: Array) -> Array:
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
    x, m = lax.optimization_barrier((x.reshape(-1, block), m))
    return jnp.sum(_sum_of_others(x, m, kept).reshape(spread), axis=-1)


def _block_size(size: int) -> int:
    """The largest divisor of ``size`` in [256, 4096], else ``size``; short rows stay whole."""
    if size <= 16384:
        return size
    return next((b for b in range(4096, 255, -1) if size % b == 0), size)


def _sum_exponentials(x: Array, m: Array, kept: Array) -> Array:
    if _block_size(x.shape[-1]) == x.shape[-1] or not _on_one_device():
        return _sum_of_others(x, m, kept)
    return lax.platform_dependent(x, m, kept, cpu=_sum_of_others_in_blocks, default=_sum_of_others)


def row_max(logits: Array, class_mask: Array | None, softcap: float | None) -> Array:
    if class_mask is None and softcap is None:
        # In the logits' own dtype (a maximum does not round): no wide copy for two readers.
        m = jnp.max(logits, axis=-1).astype(accumulator_dtype(logits.dtype))
    else:
        m = jnp.max(widen(logits, class_mask, softcap), axis=-1)
    # exp(-inf - -inf) is NaN: an empty row's exponentials are 0, whatever stands in for m.
    return lax.stop_gradient(jnp.where(m == -jnp.inf, 0, m))


def prediction(logits: Array, class_mask: Array | None = None) -> Array:
    """The first class at the row's maximum; -1 in a row that holds NaN or +inf. int32."""
    x = widen(lax.stop_gradient(logits), class_mask, None)  # a soft cap does not move the maximum
    found = jnp.argmax(x, axis=-1).astype(jnp.int32)
    highest = _entry(x, found)
    return jnp.where(jnp.isnan(highest) | (highest == jnp.inf), -1, found)


def near_max(logits: Array, m: Array, class_mask: Array | None, softcap: float | None) -> Array:
    """The first class within a few roundings of the row's maximum: the entry to keep out. int32.

    A minimum over ``j + 2^30 [x_j < m]``, with the bracket as a clipped multiple of the difference:
    that fuses into one vectorised pass on XLA:CPU, five times faster than its argmax. Not exactly
    at the maximum: where the logits are a product that XLA computes again for this pass, the
    subtraction sees it unrounded.
    """
    x = widen(lax.stop_gradient(logits), class_mask, softcap)
    if not _index_is_exact(x):
        return jnp.argmax(x, axis=-1).astype(jnp.int32)
    info = jnp.finfo(x.dtype)
    # The barrier keeps XLA from materialising the broadcast of m that other readers share.
    low = lax.optimization_barrier(m - 4 * info.eps * jnp.abs(m) - info.tiny)
    # The inner minimum keeps XLA from folding the two factors to inf: 0 * inf is NaN.
    below = jnp.minimum(jnp.minimum((low[..., None] - x) / info.tiny, 1) / info.tiny, 1)
    found = jnp.min(_class_index(x) + jnp.maximum(below, 0) * 2.0**30, axis=-1)
    # A row of -inf lies below the finite stand-in for its maximum, and NaN is no index.
    return jnp.where(found < x.shape[-1], found, 0).astype(jnp.int32)


def of_rank(x: Any, rank: int) -> Any:
    """Leading axes of size 1: nothing is promoted in rank silently."""
    return None if x is None else x.reshape((1,) * (rank - x.ndim) + x.shape)


def _entry(x: Array, index: Array) -> Array:
    """x[..., index], or the last entry where the index is past the end."""
    index = jnp.minimum(index, x.shape[-1] - 1)
    if _classes_are_split(x):
        return jnp.sum(jnp.where(_is_kept(x, index), x, 0), axis=-1)
    index = index[..., None]
    return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds")[..., 0]


def entry_or_nan(x: Array, index: Array) -> Array:
    """x[..., index], NaN where the index is past the end."""
    if x.shape[-1] == 0:
        return jnp.full(x.shape[:-1], jnp.nan, x.dtype)
    return jnp.where(index < x.shape[-1], _entry(x, index), jnp.nan)


def _forward(logits, kept, soft_targets, class_mask, softcap, want, share):
    """Returns RowLosses and RowState. ``share``: the backward pass follows in the same program."""
    m = row_max(logits, class_mask, softcap)
    if kept is None:
        kept = near_max(logits, m, class_mask, softcap)
    x = widen(logits, class_mask, softcap)
    # XLA:CPU gathers bfloat16 by widening the operand: without the barrier that conversion is
    # merged with the sum's and held as a float32 copy of the logits.
    x_kept = widen(
        _entry(lax.optimization_barrier(logits) if x.dtype != logits.dtype else logits, kept),
        None if class_mask is None else _entry(jnp.broadcast_to(class_mask, x.shape), kept),
        softcap,
    )
    x_kept = jnp.where(kept < x.shape[-1], x_kept, jnp.nan)
    if share and x.dtype == logits.dtype:
        # Written out once, to where the gradient will stand, and scaled there by the backward
        # pass: one exponential an entry instead of two.
        s = jnp.sum(_other_exponentials(x, m, kept), axis=-1)
    else:
        as_read = class_mask is None and softcap is None
        s = _sum_exponentials(logits if as_read else x, m, kept)
    d = m - x_kept
    t = s + jnp.expm1(-d)
    r = jnp.log1p(t)

    soft = mass = other_mass = None
    if soft_targets is not None:
        q = soft_targets.astype(x.dtype)
        at_kept = _entry(jnp.broadcast_to(q, x.shape), kept)
        other_mass = jnp.sum(jnp.where(_is_kept(x, kept), 0, jnp.broadcast_to(q, x.shape)), axis=-1)
        mass = other_mass + at_kept
        # q_j = 0 asks for nothing, of a class at -inf either (0 * inf is NaN).
        below = jnp.where(q == 0, 0, q * (m[..., None] - jnp.where(q == 0, 0, x)))
        soft = jnp.sum(below, axis=-1) + mass * r
    entropy = spread = None
    if "entropy" in want:
        e = jnp.exp(x - m[..., None])
        spread = jnp.sum(jnp.where(e > 0, e * (m[..., None] - jnp.where(e > 0, x, 0)), 0), axis=-1)
        spread = spread / (1 + t)
        entropy = spread + r
    losses = RowLosses(
        nll=d + r if "nll" in want else None,
        soft=soft,
        logsumexp=m + r if "logsumexp" in want else None,
        entropy=entropy,
    )
    return losses, RowState(m, s, d, t, kept, mass, other_mass, spread)


def _gradient(logits, state, soft_targets, class_mask, softcap, ct):
    """d(sum of ct * losses) / d(logits), in the accumulator's dtype, one pass.

    With ``p`` the softmax, ``q`` the soft targets of mass ``Q``, ``H`` the entropy:
    ``d nll = p - [j = k]``, ``d soft = Q p - q``, ``d logsumexp = p``,
    ``d entropy = -p (log p + H) = p ((m - x_j) - (H - r))``.
    """
    m, s, d, t, kept, mass, other_mass, spread = state
    x = widen(logits, class_mask, softcap)
    k = 1 / (1 + t)
    kept_minus_1 = -s * k
    p_kept = jnp.exp(-d) * k
    zero = jnp.zeros_like(m)
    of_p, at_kept, active = zero, zero, zero != 0
    if ct.nll is not None:
        of_p, at_kept, active = ct.nll, ct.nll * kept_minus_1, ct.nll != 0
    if ct.logsumexp is not None:
        of_p, at_kept = of_p + ct.logsumexp, at_kept + ct.logsumexp * p_kept
        active |= ct.logsumexp != 0
    if ct.soft is not None:
        # Q p_k - q_k; where p_k is near 1, Q is taken out of both: exact for a confident one-hot.
        of_p = of_p + ct.soft * mass
        soft_at_kept = mass * kept_minus_1 + other_mass
        soft_at_kept = jnp.where(p_kept < 0.5, mass * p_kept - (mass - other_mass), soft_at_kept)
        at_kept = at_kept + ct.soft * soft_at_kept
        active |= ct.soft != 0
    if ct.entropy is not None:
        at_kept = at_kept + ct.entropy * p_kept * (d - spread)
        active |= ct.entropy != 0

    # A row that asks for nothing gets 0, whatever its logits hold: 0 * NaN would be NaN.
    row = jnp.where(active, at_kept, 0)
    # In the logits' own dtype this is the summand that the forward pass wrote out.
    share = x.dtype == logits.dtype
    e = _other_exponentials(x, m, kept) if share else jnp.exp(x - m[..., None])
    dx = e * (k * of_p)[..., None]
    if ct.entropy is not None:
        below = m[..., None] - jnp.where(e > 0, x, 0)
        dx += jnp.where(e > 0, e * (k * ct.entropy)[..., None] * (below - spread[..., None]), 0)
    if ct.soft is not None:
        dx -= ct.soft[..., None] * soft_targets.astype(x.dtype)
    dx = jnp.where(_is_kept(x, kept) | ~active[..., None], row[..., None], dx)
    if softcap is not None:
        dx = jnp.where(active[..., None], dx * _softcap_slope(logits, softcap), 0)
    return dx if class_mask is None else jnp.where(class_mask, dx, 0)


def _soft_gradient(logits, state, soft_targets, class_mask, softcap):
    """d(soft) / d(soft_targets): -log p, and 0 for a class at -inf that has no mass."""
    x = widen(logits, class_mask, softcap)
    impossible = (x == -jnp.inf) & (soft_targets == 0)
    r = jnp.log1p(state.t)[..., None]
    return jnp.where(impossible, 0, (state.m[..., None] - jnp.where(impossible, 0, x)) + r)


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    spread = tuple(i for i, n in enumerate(shape) if n != x.shape[i])
    return jnp.sum(x, axis=spread, keepdims=True)


def row_losses(
    logits: Array,
    kept: Array | None,
    soft_targets: Array | None = None,
    class_mask: Array | None = None,
    *,
    softcap: float | None = None,
    want: tuple[str, ...] = ("nll",),
) -> RowLosses:
    """The losses of ``logits[..., C]`` over the last axis, one number a row.

    ``kept[...]`` (int32) is the label, or C for a row without one, whose results are NaN; None
    keeps the first entry at the maximum out instead. ``soft_targets`` and ``class_mask`` broadcast
    to ``logits``. Differentiable in ``logits`` and ``soft_targets``, in every mode.
    """

    def losses(logits, soft_targets, kept, class_mask):
        return _forward(logits, kept, soft_targets, class_mask, softcap, want, share=False)[0]

    def forward(logits, soft_targets, kept, class_mask):
        out, state = _forward(logits, kept, soft_targets, class_mask, softcap, want, share=True)
        return out, (logits, state, soft_targets, class_mask)

    def backward(residuals, ct):
        logits, state, soft_targets, class_mask = residuals
        if accumulator_dtype(logits.dtype) != logits.dtype:
            # Without the barrier XLA:CPU shares the widened logits (and the broadcast of m) with
            # the forward pass, and holds them: a float32 copy of the logits.
            scalars = state._replace(kept=None)
            logits, scalars = lax.optimization_barrier((logits, scalars))
            state = scalars._replace(kept=state.kept)
        dx = _gradient(logits, state, soft_targets, class_mask, softcap, ct)
        dq = None
        if soft_targets is not None:
            each = ct.soft[..., None] * _soft_gradient(
                logits, state, soft_targets, class_mask, softcap
            )
            each = jnp.where(ct.soft[..., None] == 0, 0, each)
            dq = _sum_to(each, soft_targets.shape).astype(soft_targets.dtype)
        return _narrow(dx, logits.dtype), dq, None, None

    def tangent(residuals, tangents):
        # Rows do not mix: the derivative of one number is the gradient at its unit cotangent.
        logits, state, soft_targets, class_mask = residuals
        d_logits, d_soft_targets = tangents[:2]
        wide = accumulator_dtype(logits.dtype)
        none = RowLosses(None, None, None, None)
        present = [*want, *(["soft"] if soft_targets is not None else [])]
        out: dict[str, Any] = {}
        for name in present:
            out[name] = jnp.zeros_like(state.m)
            if d_logits is not None:
                ct = none._replace(**{name: jnp.ones_like(state.m)})
                slope = _gradient(logits, state, soft_targets, class_mask, softcap, ct)
                out[name] += jnp.sum(slope * d_logits.astype(wide), axis=-1)
        if d_soft_targets is not None:
            slope = _soft_gradient(logits, state, soft_targets, class_mask, softcap)
            out["soft"] += jnp.sum(slope * d_soft_targets.astype(wide), axis=-1)
        return none._replace(**out)

    given = (of_rank(soft_targets, logits.ndim), kept, of_rank(class_mask, logits.ndim))
    rule = jax.custom_vjp(losses)
    rule.defvjp(forward, backward)
    return with_forward_mode(rule, tangent)(logits, *given)


def row_log_softmax(logits: Array, class_mask: Array | None = None) -> Array:
    """log_softmax of ``logits[..., C]`` over the last axis, in the logits' dtype."""

    def forward(logits, class_mask):
        _, state = _forward(logits, None, None, class_mask, None, (), share=False)
        x = widen(logits, class_mask, None)
        out = (x - state.m[..., None]) - jnp.log1p(state.t)[..., None]
        return _narrow(out, logits.dtype), (logits, state, class_mask)

    def backward(residuals, g):
        # sum_j g_j out_j is the soft loss at q = -g: out_j = x_j - logsumexp(x).
        logits, state, class_mask = residuals
        wide = g.astype(accumulator_dtype(logits.dtype))
        others = jnp.sum(jnp.where(_is_kept(wide, state.kept), 0, wide), axis=-1)
        state = state._replace(mass=-others - _entry(wide, state.kept), other_mass=-others)
        asked = jnp.any(wide != 0, axis=-1).astype(wide.dtype)
        ct = RowLosses(None, asked, None, None)
        dx = _gradient(logits, state, -wide, class_mask, None, ct)
        return _narrow(dx, logits.dtype), None

    def tangent(residuals, tangents):
        # (dx_j - dx_k) - sum_i p_i (dx_i - dx_k): the kept entry's 1 - p_k never forms.
        logits, state, class_mask = residuals
        dx = tangents[0].astype(accumulator_dtype(logits.dtype))
        if class_mask is not None:
            dx = jnp.where(class_mask, dx, 0)
        dx -= _entry(dx, state.kept)[..., None]
        x = widen(logits, class_mask, None)
        p = _other_exponentials(x, state.m, state.kept) / (1 + state.t)[..., None]
        dy = dx - jnp.sum(p * dx, axis=-1, keepdims=True)
        if class_mask is not None:
            dy = jnp.where(class_mask, dy, 0)
        return dy.astype(logits.dtype)

    rule = jax.custom_vjp(lambda *args: forward(*args)[0])
    rule.defvjp(forward, backward)
    return with_forward_mode(rule, tangent)(logits, class_mask)
