"""The numerics: what one row of logits gives, and its exact gradient.

For a row ``x`` with maximum ``m``, one entry ``x_k`` is left out of the sum: the label's where
there is a class index, one at the maximum where there is none. Then::

    s = sum_{j != k} exp(x_j - m)           the others
    d = m - x_k                             how far the omitted entry lies below the maximum
    t = s + expm1(-d)                       so that sum_j exp(x_j - m) = 1 + t
    r = log1p(t)                            the log-sum-exp above the maximum

``d + r`` is the loss of class ``k``. Where ``k`` is at the maximum, ``t`` is ``s``: nothing was
ever added to 1, so a loss of 1e-12 is 1e-12. ``logsumexp - x_k`` gives 0 there.

The softmax is ``p_j = exp(x_j - m) / (1 + t)``, and what the gradient needs at the omitted entry is
``p_k - 1 = -s / (1 + t)``: the same number as ``expm1(-loss)``, without the loss's own rounding.
"""

from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxloss._numerics.logits import Logits
from jaxloss._numerics.parts import RowPart, Rows, distance, merge_shards, row_part
from jaxloss._numerics.passes import (
    gradient_pass,
    keeps_exponentials,
    other_exponentials,
    sum_of_others,
)
from jaxloss._types import Axes
from jaxloss._xla import device, mesh
from jaxloss._xla.derivatives import differentiable, scale_rows, unbroadcast
from jaxloss._xla.dtypes import accumulator_dtype, downcast, upcast
from jaxloss._xla.elementary import exp, exp_of_nonpositive, expm1, finite, log1p
from jaxloss._xla.fusion import reread
from jaxloss._xla.indexing import gather_class, is_at, is_elsewhere, of_rank, scatter_classes
from jaxloss._xla.selection import select


class RowLosses(NamedTuple):
    """One number a row (an Array); None where it was not asked for.

    Those with a derivative come first: a rule gives tangents to the first few.
    """

    nll: Any = None  # logsumexp(x) - x_k
    soft: Any = None  # sum_j q_j (logsumexp(x) - x_j), for soft targets q
    logsumexp: Any = None
    entropy: Any = None
    sum_sq_probs: Any = None  # sum_j p_j^2
    confidence: Any = None  # max_j p_j; without a derivative
    lse_above_max: Any = None  # logsumexp(x) - max_j x_j; without a derivative
    prediction: Any = None  # see ``ranking``; of rows that are read whole, ``ranking`` computes it
    rank: Any = None


CONSTANTS = ("confidence", "lse_above_max", "prediction", "rank")  # without a derivative


class RowState(NamedTuple):
    """What the backward pass needs beside the logits: scalars of a row."""

    m: Array  # in units of the scaling, as logits are widened; the rest is in nats
    s: Array
    d: Array
    t: Array
    omitted: Array  # index of the entry that is left out; the number of classes: there is none
    mass: Any  # sum_j q_j
    other_mass: Any  # sum_{j != k} q_j
    entropy_rest: Any  # entropy - r
    gap: Any  # sum_j p_j (1 - exp(x_j - m))


def finalize(part: RowPart, outputs: tuple[str, ...]) -> tuple[RowLosses, RowState]:
    """What the part of all classes gives."""
    m = finite(part.m)
    d = part.nats(m - part.x_omitted)
    t = part.s + expm1(-d)
    r = of_all = log1p(t)
    if part.sum_below_max is not None:
        # A label below the maximum leaves the maximum's 1 in s, and t no more than its rounding.
        # If t < 1/2 exactly one entry is at the maximum, so the sum of those below it is t without
        # t's rounding. The derivative is that of t, because that sum has none of the entry at the
        # maximum.
        sum_below_max = lax.stop_gradient(part.sum_below_max) + (t - lax.stop_gradient(t))
        of_all = log1p(select(jnp.abs(t) < 0.5, sum_below_max, t))
    entropy_rest = None if part.entropy_sum is None else part.entropy_sum / (1 + t)
    losses = RowLosses(
        nll=d + r if "nll" in outputs else None,
        soft=None if part.mass is None else part.below + part.mass * r,
        logsumexp=part.nats(m) + r if "logsumexp" in outputs else None,
        entropy=None if entropy_rest is None else entropy_rest + of_all,
        confidence=_confidence(t) if "confidence" in outputs else None,
        lse_above_max=r if "lse_above_max" in outputs else None,
        sum_sq_probs=None if part.square_sum is None else part.square_sum / (1 + t) ** 2,
    )
    gap = None if part.gap_sum is None else part.gap_sum / (1 + t)
    own = m, part.s, d, t, part.omitted, part.mass, part.other_mass, entropy_rest, gap
    return losses, RowState(*own)


def _confidence(t: Array) -> Array:
    """1 / (1 + t), and no more than 1 where 1 + t is rounded below it; NaN for no class at all."""
    return select(t > -1, 1 / (1 + jnp.maximum(t, 0)), jnp.nan)


def row_gradient(rows: Rows, state: RowState, ct: RowLosses, dtype: Any = None) -> Array:
    """d(sum of ct * losses) / d(logits), in the accumulator's dtype or narrowed to ``dtype``."""
    dtype = dtype or accumulator_dtype(rows.logits.values.dtype)
    dx = _dense_gradient(rows, state, ct, dtype)
    if rows.sparse is None:
        return dx
    # At the k classes again, with what is asked of them, and put in place.
    index, _ = rows.sparse
    k = index.shape[-1]
    few = rows.at_sparse()
    few = few._replace(logits=replace(few.logits, pallas_bytes=0))
    place = lax.broadcasted_iota(jnp.int32, index.shape, index.ndim - 1)
    place = jnp.min(select(index == state.omitted[..., None], place, k), axis=-1, initial=k)
    state = state._replace(omitted=place)
    return scatter_classes(dx, index, _dense_gradient(few, state, ct, dtype))


def gradient_coefficients(
    state: RowState, ct: RowLosses
) -> tuple[Array, Array, Array, Array, Array]:
    """``(m, omitted, scale, at_omitted, active)`` of ``passes.gradient_pass``.

    With ``p`` the softmax, ``q`` the soft targets of mass ``Q``, ``H`` the entropy:
    ``d nll = p - [j = k]``, ``d soft = Q p - q``, ``d logsumexp = p``,
    ``d entropy = -p (log p + H) = p ((m - x_j) - (H - r))``, and with ``e_j = exp(x_j - m)``
    ``d sum p^2 = 2 p_j (p_j - sum p^2) = 2 k p_j (gap - (1 - e_j))``, exact at a p of nearly 1.
    """
    m, s, d, t, omitted, mass, other_mass, entropy_rest, gap = state
    k = 1 / (1 + t)
    p_omitted_minus_1 = -s * k
    p_omitted = exp(-d) * k
    zero = jnp.zeros_like(m)
    of_p, at_omitted, asked = zero, zero, zero != 0
    if ct.nll is not None:
        of_p, at_omitted, asked = ct.nll, ct.nll * p_omitted_minus_1, ct.nll != 0
    if ct.logsumexp is not None:
        of_p, at_omitted = of_p + ct.logsumexp, at_omitted + ct.logsumexp * p_omitted
        asked |= ct.logsumexp != 0
    if ct.soft is not None:
        # Q p_k - q_k; where p_k is near 1, Q is taken out of both: exact for a confident one-hot.
        of_p = of_p + ct.soft * mass
        soft_at_omitted = mass * p_omitted_minus_1 + other_mass
        soft_at_omitted = select(
            p_omitted < 0.5, mass * p_omitted - (mass - other_mass), soft_at_omitted
        )
        at_omitted = at_omitted + ct.soft * soft_at_omitted
        asked |= ct.soft != 0
    if ct.entropy is not None:
        # A label at -inf: p (log p + H) is 0 there, and not 0 * inf.
        at_omitted += ct.entropy * p_omitted * select(p_omitted > 0, d - entropy_rest, 0)
        asked |= ct.entropy != 0
    if ct.sum_sq_probs is not None:
        at_omitted += 2 * k * ct.sum_sq_probs * p_omitted * (gap + expm1(-d))
        asked |= ct.sum_sq_probs != 0

    # A row that is asked for nothing gets 0, whatever its logits hold: 0 * NaN would be NaN. Where
    # nothing is NaN it is 0 times its slope: selected, that 0 would not have this derivative.
    active = asked | _sound(state, ct.entropy is not None)
    at_omitted = select(active, at_omitted, 0)
    return m, omitted, k * of_p, at_omitted, active


def _dense_gradient(rows: Rows, state: RowState, ct: RowLosses, dtype: Any) -> Array:
    """:func:`row_gradient` as if there were no ``sparse``, in one pass."""
    logits = rows.logits
    given = gradient_coefficients(state, ct)
    soft = None if ct.soft is None or rows.soft is None else (ct.soft, rows.soft)
    entropy = None if ct.entropy is None else (ct.entropy / (1 + state.t), state.entropy_rest)
    own = logits.values.dtype
    square = None
    if ct.sum_sq_probs is not None:
        square = 2 * ct.sum_sq_probs / (1 + state.t) ** 2, state.gap
    same = dtype == own and own.itemsize <= logits.pallas_bytes
    if soft is None and entropy is None and square is None and logits.plain and same:
        return gradient_pass(plain_gradient, logits.values, *given)
    return logits_gradient(logits, *given, soft, entropy, square, dtype)


def _sound(state: RowState, with_entropy: bool = True) -> Array:
    """The rows that have a distribution, and targets that are numbers."""
    # Not the entropy where nothing is asked of it: that would be a pass.
    entropy = state.entropy_rest if with_entropy else None
    numbers = (state.m, 1 / (1 + state.t), state.mass, entropy)
    return reduce(jnp.logical_and, (jnp.isfinite(x) for x in numbers if x is not None))


def plain_gradient(x: Array, *coefficients: Array) -> Array:
    """:func:`logits_gradient` of logits that are read as they are, in their dtype."""
    return logits_gradient(Logits(x), *coefficients)


def logits_gradient(
    logits: Logits,
    m: Array,
    omitted: Array,
    scale: Array,
    at_omitted: Array,
    active: Array,
    soft: Any = None,
    entropy: Any = None,
    square: Any = None,
    dtype: Any = None,
) -> Array:
    """``scale exp(x_j - m)``, at the omitted entry ``at_omitted``, in a row that is not active 0.

    ``soft`` is ``(ct, q)`` and takes ``ct q_j`` away; ``entropy`` is ``(ct, H - r)`` and adds
    ``ct exp(x_j - m) ((m - x_j) - (H - r))``; ``square`` is ``(ct, gap)`` and adds
    ``ct e_j (gap - (1 - e_j))`` with ``e_j = exp(x_j - m)``. Then the chain rule of the scaling,
    and the mask.
    """
    wide = logits.as_read()
    x = wide.values
    # Where the forward pass wrote its summand out, this is it.
    held = keeps_exponentials(logits.values)
    e = other_exponentials(wide, m, omitted) if held else wide.exp(x, m)
    dx = e * scale[..., None]
    if entropy is not None:
        ct, entropy_rest = entropy
        below = logits.nats(m[..., None] - select(e > 0, x, 0))
        dx += select(e > 0, e * ct[..., None] * (below - entropy_rest[..., None]), 0)
    if square is not None:
        ct, gap = square
        dx += e * ct[..., None] * (gap[..., None] - (1 - e))
    if soft is not None:
        ct, soft_targets = soft
        dx -= ct[..., None] * soft_targets.astype(x.dtype)
    dx = select(is_at(x, omitted) | ~active[..., None], at_omitted[..., None], dx)
    if logits.scaling is not None:
        dx = select(active[..., None], dx * logits.slope(), 0)
    dx = dx if logits.exist is None else select(logits.exist, dx, 0)
    return downcast(dx, dtype or logits.values.dtype)


def soft_gradient(rows: Rows, state: RowState) -> Array:
    """d(soft) / d(soft targets): -log p, and 0 for a class at -inf that has no mass, or of
    ``sparse``."""
    logits = rows.logits
    x = logits.wide()
    impossible = (x == -jnp.inf) & (rows.soft == 0)
    if logits.exist is not None:
        impossible |= ~logits.exist
    if rows.sparse is not None:
        impossible |= ~is_elsewhere(x, rows.sparse[0])
    r = log1p(state.t)[..., None]
    below = logits.nats(state.m[..., None] - select(impossible, 0, x))
    return select(impossible, 0, below + r)


def sparse_gradient(rows: Rows, state: RowState) -> Array:
    """d(soft) / d(the soft targets of ``sparse``): -log p at each index, and 0 past the end."""
    index, extra = rows.sparse
    few = rows.at_sparse().logits
    x, nowhere = few.wide(), index >= rows.logits.size
    unless = nowhere | ((x == -jnp.inf) & (extra == 0))
    below = few.nats(distance(x, state.m, unless))
    return select(unless, 0, below + log1p(state.t)[..., None])


def row_tangents(
    rows: Rows,
    state: RowState,
    outputs: tuple[str, ...],
    d_logits: Any,
    d_soft: Any = None,
    d_extra: Any = None,
) -> RowLosses:
    """Rows do not mix: the derivative of one number is the gradient at its unit cotangent.

    The tangents are of the logits, the soft targets and those of ``sparse``; None: there is none.
    """
    out: dict[str, Any] = {}

    def along(slope, d):
        return jnp.sum(slope * d.astype(slope.dtype), axis=-1)

    moving = [name for name in outputs if name not in CONSTANTS]
    if rows.soft is not None or rows.sparse is not None:
        moving.append("soft")
    for name in moving:
        out[name] = jnp.zeros_like(state.m)
        if d_logits is not None:
            ct = RowLosses(**{name: jnp.ones_like(state.m)})
            out[name] += along(row_gradient(rows, state, ct), d_logits)
    if d_soft is not None:
        out["soft"] += along(soft_gradient(rows, state), d_soft)
    if d_extra is not None:
        out["soft"] += along(sparse_gradient(rows, state), d_extra)
    return RowLosses(**out)


def row_losses(rows: Rows, outputs: tuple[str, ...] = ("nll",), vocab_axes: Axes = ()) -> RowLosses:
    """The losses of ``rows`` over the last axis of their logits, one number a row.

    A row whose ``omitted`` is C has no label, and its results are NaN; where ``omitted`` is None,
    the first entry at the maximum is left out instead. Differentiable in the logits and in both
    kinds of soft targets, in every mode.

    ``vocab_axes``: the mesh axes over which the rows are split. C is then what stands here, as are
    the soft targets and the mask; a label has index C where another device holds it.
    """

    def part_of(rows, backward_follows=False):
        part = row_part(rows, outputs, backward_follows=backward_follows)
        return merge_shards(part, vocab_axes, rows.logits.size)

    def value(rows):
        return finalize(part_of(rows), outputs)[0]

    def forward(rows):
        out, state = finalize(part_of(rows, backward_follows=True), outputs)
        return out, (rows._replace(omitted=None), state)  # it is in the state

    def backward(residuals, ct):
        rows, state = residuals
        logits = rows.logits
        if not keeps_exponentials(logits.values):
            # Without the barrier XLA:CPU shares the widened logits (and the broadcast of m) with
            # the forward pass, and holds them: a float32 copy of the logits.
            x, scalars = reread(logits.values, state._replace(omitted=None))
            rows = rows._replace(logits=replace(logits, values=x))
            state = scalars._replace(omitted=state.omitted)
        dx = row_gradient(rows, state, ct, logits.values.dtype)
        d_soft = d_sparse = None
        if rows.soft is not None and ct.soft is not None:
            d_soft = unbroadcast(scale_rows(ct.soft, soft_gradient(rows, state)), rows.soft)
        if rows.sparse is not None and ct.soft is not None:
            slope = scale_rows(ct.soft, sparse_gradient(rows, state))
            d_sparse = None, slope.astype(rows.sparse[1].dtype)
        logits = replace(logits, values=dx, exist=None)
        return (rows._replace(logits=logits, omitted=None, soft=d_soft, sparse=d_sparse),)

    def tangent(residuals, tangents):
        rows, state = residuals
        (d_rows,) = tangents
        d_extra = None if rows.sparse is None else d_rows.sparse[1]
        given = d_rows.logits.values, d_rows.soft, d_extra
        moved = row_tangents(rows, state, outputs, *given)
        return mesh.sums(moved, vocab_axes) if vocab_axes else moved

    logits = rows.logits
    rank = logits.values.ndim
    logits = replace(logits, exist=of_rank(logits.exist, rank))
    rows = rows._replace(logits=logits, soft=of_rank(rows.soft, rank))
    rule = differentiable(value, forward, backward, tangent)
    return rule(*mesh.varying_alike(rows))


def row_log_softmax(logits: Logits) -> Array:
    """log_softmax over the last axis of logits without a scaling, in their dtype."""
    dtype = logits.values.dtype

    def forward(logits):
        _, state = finalize(row_part(Rows(logits), ()), ())
        # Apart, or XLA:CPU holds the difference from the sum's pass on: another array.
        given, (m, r) = reread(logits.values, (state.m, log1p(state.t)))
        out = (replace(logits, values=given).wide() - m[..., None]) - r[..., None]
        if logits.exist is not None:  # of no class at all it would be inf - inf
            out = select(logits.exist, out, -jnp.inf)
        out = downcast(out, dtype)
        # Narrow results have too few digits to be read again, in place of the logits.
        wide = dtype == accumulator_dtype(dtype)
        held = (out, None, None) if wide else (logits.values, state.m, r)
        return out, (held, state, logits.exist)

    def probabilities(held, exist):
        x, m, r = held
        x = Logits(x, exist).wide()
        return exp_of_nonpositive(x if m is None else (x - m[..., None]) - r[..., None])

    def backward(saved, g):
        # g_j - p_j G, and at the omitted entry (1 - p_k) g_k - p_k (G - g_k): no 1 - p_k forms.
        held, state, exist = saved
        if exist is not None:
            g = select(exist, g, 0)
        wide, omitted = upcast(g), state.omitted
        own = upcast(gather_class(lax.optimization_barrier(g), omitted))
        # Not total - g_k, which has nothing left where the cotangent is nearly all at k.
        others = sum_of_others(g, omitted, own)
        total = others + select(omitted < g.shape[-1], own, 0)
        at_omitted = (own * state.s - others * exp(-state.d)) / (1 + state.t)
        # A row that is asked for nothing gets 0, whatever its logits hold.
        asked = (total != 0) | _sound(state)
        at_omitted = select(asked | (own != 0), at_omitted, 0)
        dx = wide - probabilities(held, exist) * total[..., None]
        dx = select(asked[..., None] | (wide != 0), dx, 0)
        if exist is not None:
            dx = select(exist, dx, 0)
        if device.on_one_device():
            at_omitted = downcast(at_omitted, dtype)[..., None]
            dx = scatter_classes(downcast(dx, dtype), omitted[..., None], at_omitted)
        else:  # a scatter would gather classes that are split
            dx = downcast(select(is_at(dx, omitted), at_omitted[..., None], dx), dtype)
        return (Logits(dx),)

    def tangent(saved, tangents):
        # (dx_j - dx_k) - sum_i p_i (dx_i - dx_k): the omitted entry's 1 - p_k never forms.
        held, state, exist = saved
        dx = tangents[0].values.astype(state.m.dtype)
        if exist is not None:
            dx = select(exist, dx, 0)
        dx -= select(state.omitted < dx.shape[-1], gather_class(dx, state.omitted), 0)[..., None]
        p = select(is_at(dx, state.omitted), 0, probabilities(held, exist))
        dy = dx - jnp.sum(p * dx, axis=-1, keepdims=True)
        if exist is not None:
            dy = select(exist, dy, 0)
        return dy.astype(dtype)

    rule = differentiable(lambda logits: forward(logits)[0], forward, backward, tangent)
    return rule(logits)
