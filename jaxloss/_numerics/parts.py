"""What some of a row's classes add to it: parts of disjoint classes merge.

A whole row, a block of the vocabulary and the columns on one device of a mesh are parts alike.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxloss._numerics.logits import (
    Scaling,
    above,
    cap_of,
    capped_max,
    exponentials,
    for_passes,
    read,
    scaled,
    widen,
)
from jaxloss._numerics.passes import (
    max_and_place,
    max_and_sum,
    row_max,
    row_sum,
    sum_of_others,
    writes_out,
)
from jaxloss._types import Axes
from jaxloss._xla import mesh
from jaxloss._xla.fusion import apart, behind_barrier, lies_below
from jaxloss._xla.indexing import elsewhere, entries, entry
from jaxloss._xla.math import exp, finite


class Rows(NamedTuple):
    """Some classes of some rows, and what is asked of them."""

    logits: Any  # [..., C]
    kept: Any = None  # [...] int32, the entry to keep out, C for none; None: one at the maximum
    soft: Any = None  # the soft targets q, broadcastable to the logits
    mask: Any = None  # the classes that exist, likewise
    top: Any = None  # index[..., k] and the soft targets there, in place of those of ``soft``


class RowPart(NamedTuple):
    """``m`` and ``x_kept`` are in units of the scaling, as logits are widened; the rest is in nats.

    See ``rows`` for the letters.
    """

    m: Array  # -inf for classes that are all at -inf
    s: Array
    x_kept: Array  # NaN: the entry that is kept out is not among them
    kept: Array
    below: Any = None  # sum_j q_j (m - x_j)
    mass: Any = None  # sum_j q_j
    other_mass: Any = None  # sum_{j != k} q_j
    spread: Any = None  # sum_j exp(x_j - m) (m - x_j)
    low: Any = None  # sum of exp(x_j - m) over the x_j < m, for an entropy beside a label


def row_part(
    rows: Rows,
    scaling: Scaling | None,
    want: tuple[str, ...],
    *,
    backward_follows: bool = False,
    kernel_bytes: int = 2,
) -> RowPart:
    """``backward_follows``: in the same program. ``kernel_bytes``: see ``dispatch.row_sums``."""
    labelled, written = rows.kept is not None, backward_follows and writes_out(rows.logits)
    logits, mask = rows.logits, rows.mask
    if labelled:
        highest, s = max_and_sum(logits, rows.kept, mask, scaling, written, kernel_bytes)
        m = finite(highest)
    else:
        # A cap moves no maximum: it is looked for in the logits themselves.
        largest, place = max_and_place(logits, mask)
        highest = capped_max(largest, mask, scaling)
        m, rows = finite(highest), rows._replace(kept=place)
        # Or XLA:CPU writes out what the search and the sum share, a float32 copy of narrow logits.
        given, (high, place) = (logits, (m, place)) if written else apart(logits, (m, place))
        s = row_sum(given, high, place, mask, scaling, written)
    x = widen(logits, mask, scaling)
    part = RowPart(highest, s, _kept_logit(rows, x, highest, scaling), rows.kept)
    if rows.soft is None and rows.top is None and "entropy" not in want:
        return part
    given, left = for_passes(logits, mask, scaling)
    # x and m again, for the reductions below.
    y, high = apart(given, m)
    again = read(y, high, left), high, left
    sums = None if rows.soft is None else _soft_sums(rows, x, again, backward_follows)
    if rows.top is not None:
        some = _top_sums(rows, m, scaling)
        sums = some if sums is None else tuple(map(lax.add, sums, some))
    if sums is not None:
        below, mass, other_mass = sums
        part = part._replace(below=below, mass=mass, other_mass=other_mass)
    if "entropy" in want:
        spread = _spread(*again, scaling)
        low = _low(given, m, spread, left) if labelled else None
        part = part._replace(spread=spread, low=low)
    return part


def _kept_logit(rows: Rows, x: Array, highest: Array, scaling: Scaling | None) -> Array:
    """``x_kept``, from the logits themselves: ``x``, which they are widened to, is never held."""
    logits, kept, _, mask, _ = rows
    # XLA:CPU gathers bfloat16 by widening the operand: without the barrier that conversion is
    # merged with the sum's and held as a float32 copy of the logits.
    raw = entry(lax.optimization_barrier(logits) if x.dtype != logits.dtype else logits, kept)
    exists = None if mask is None else entry(jnp.broadcast_to(mask, x.shape), kept)
    x_kept = widen(raw, exists, scaling)
    if cap_of(scaling) is not None:
        # Capped by other instructions than the maximum, it may lie above it, or below its equal.
        first = widen(raw, exists, None) == row_max(logits, mask, None)
        if exists is not None:  # a cap lifts -inf, but not of a class that is masked
            first &= exists
        shift = jnp.where(first, highest, jnp.minimum(x_kept, highest)) - x_kept
        # A rounding, and exact: the entry keeps its derivative.
        x_kept += lax.stop_gradient(jnp.where(jnp.isfinite(shift), shift, 0))
    return jnp.where(kept < x.shape[-1], x_kept, jnp.nan)


def _soft_sums(rows: Rows, x: Array, again: tuple, backward_follows: bool) -> tuple:
    """``(below, mass, other_mass)`` of the soft targets, but for those at ``top``."""
    _, kept, soft, mask, top = rows
    q, here = soft.astype(x.dtype), kept < x.shape[-1]
    if q.shape[-1] == 1 < x.shape[-1]:  # for all classes: nothing of their size is selected
        q, size, below = q[..., 0], x.shape[-1], -above(*again)
        if top is not None:
            # Selected, and not taken away again: at a class at -inf that would be inf - inf.
            below = jnp.where(elsewhere(x, top[0]), below, 0)
            here &= ~jnp.any(top[0] == kept[..., None], axis=-1)
            size -= jnp.sum(top[0] < size, axis=-1, dtype=x.dtype)
        at_kept = jnp.where(here, q, 0)
        other_mass = q * (size - here.astype(x.dtype))
        below = jnp.where(q == 0, 0, q * jnp.sum(below, axis=-1))
    else:
        # What is asked of a class that does not exist is left out.
        for counts in (mask, None if top is None else elsewhere(x, top[0])):
            if counts is not None:
                soft = jnp.where(counts, soft, jnp.zeros((), soft.dtype))
        narrow = soft.dtype != x.dtype
        # The barrier as for x_kept. Wide targets may be computed here, and would be written out.
        at_kept = lax.optimization_barrier(soft) if narrow else soft
        at_kept = entry(jnp.broadcast_to(at_kept, x.shape), kept).astype(x.dtype)
        at_kept = jnp.where(here, at_kept, 0)
        other_mass = sum_of_others(soft, kept, at_kept)
        # Or the conversion, or the broadcast, is written out for both passes.
        again_soft = apart(soft, again[1])[0] if narrow or soft.shape != x.shape else soft
        below = _sum_below(again_soft.astype(x.dtype), *again)
        if not backward_follows:  # only the gradient asks for the others': a shorter pass
            mass = jnp.sum(soft, axis=-1, dtype=x.dtype)
            return below, jnp.broadcast_to(mass, below.shape), other_mass
    return below, other_mass + at_kept, other_mass


def _sum_below(q: Array, y: Array, m: Array, left: Scaling | None) -> Array:
    """sum_j q_j (m - x_j), where q_j = 0 asks for nothing, of a class at -inf either.

    0 times inf is NaN, so that a distance is no more than q_j times infinity, or than the largest
    float. XLA:CPU would write out a summand that selects, and make one factor of two constants.
    """
    info = jnp.finfo(y.dtype)
    _, steep, largest = behind_barrier(m, 2.0 ** (info.maxexp - 1), info.max)
    most = lax.stop_gradient(jnp.abs(q)) * steep * steep + largest
    return jnp.sum(q * jnp.minimum(-above(y, m, left), most), axis=-1)


def _top_sums(rows: Rows, m: Array, scaling: Scaling | None) -> tuple:
    """``(below, mass, other_mass)`` of the soft targets at ``top``."""
    index, extra = rows.top
    extra = jnp.where(index < rows.logits.shape[-1], extra.astype(m.dtype), 0)
    few = at_top(rows)
    x = widen(few.logits, few.mask, scaling)
    extra = jnp.where((x == -jnp.inf) & (extra == 0), 0, extra)  # as q above
    below = scaled(distance(x, m, extra == 0), scaling)
    below = jnp.where(extra == 0, 0, extra * below)
    others = jnp.where(index == rows.kept[..., None], 0, extra)
    return tuple(jnp.sum(v, axis=-1) for v in (below, extra, others))


def _spread(y, m, left, scaling) -> Array:
    # Bounded, so that a class at -inf adds 0: XLA:CPU would write out a summand that selects.
    below = jnp.minimum(-above(y, m, left), jnp.finfo(y.dtype).max)
    if cap_of(scaling) is not None:
        # A cap rounds either way. The derivative of abs would change its sign with that.
        below += lax.stop_gradient(jnp.abs(below) - below)
    return jnp.sum(exponentials(y, m, left) * below, axis=-1)


def _low(given, m, spread, left) -> Array:
    y, (m, _) = apart(given, (m, spread))
    y = read(y, m, left)
    # Twice, and halved after: s has a factor of 1 too, whose broadcast XLA:CPU would write out.
    return jnp.sum(lies_below(y, m, 2.0) * exponentials(y, m, left), axis=-1) / 2


def at_top(rows: Rows) -> Rows:
    """The k classes at ``top`` alone."""
    (index, extra), mask = rows.top, rows.mask
    if mask is not None:
        mask = entries(jnp.broadcast_to(mask, rows.logits.shape), index)
    # The barrier as for x_kept.
    return Rows(entries(lax.optimization_barrier(rows.logits), index), soft=extra, mask=mask)


def distance(x: Array, m: Array, unless: Array) -> Array:
    """m - x, finite where nothing is asked for."""
    return m[..., None] - jnp.where(unless, m[..., None], x)


def _seen_from(part: RowPart, m: Array, keeps: Array, scaling: Scaling | None) -> RowPart:
    """The part with its sums scaled to ``m``, the maximum of more classes than its own.

    ``keeps``: its kept entry stays out of the sums; otherwise it joins the others.
    """

    def lifted(x, weight):  # sum of weights * (part.m - x_j), seen from m
        # Two parts of classes at -inf: their maxima are no distance apart. Selected before the
        # product: the distance from a part that weighs nothing may be infinite.
        nothing = (weight == 0) | (m == part.m)
        return x + jnp.where(nothing, 0, scaled(m - part.m, scaling)) * weight

    kept = exp(scaled(part.x_kept - finite(part.m), scaling))
    whole = part.s + jnp.where(jnp.isnan(part.x_kept), 0, kept)
    scale = exp(scaled(part.m - finite(m), scaling))
    below, other_mass, spread, low = part.below, part.other_mass, part.spread, part.low
    if part.mass is not None:
        below, other_mass = lifted(below, part.mass), jnp.where(keeps, other_mass, part.mass)
    if spread is not None:
        # Scaled first: of classes that are masked by the smallest float, a distance times their
        # number is inf, and their scale is 0.
        spread = lifted(scale * spread, scale * whole)
    if low is not None:
        low = scale * jnp.where(part.m == m, low, whole)
    s = scale * jnp.where(keeps, part.s, whole)
    return part._replace(m=m, s=s, below=below, other_mass=other_mass, spread=spread, low=low)


def added(x: Any, y: Any) -> Any:
    return y if x is None else x + y


def merge(a: RowPart, b: RowPart, labelled: bool, scaling: Scaling | None = None) -> RowPart:
    """The part of the classes of both: keep the larger ``m``, scale the other's sums.

    ``labelled``: one entry, a label's, is kept out of at most one of them. Otherwise each keeps
    out one at its own maximum, and the smaller one's joins the others.
    """
    m = jnp.maximum(a.m, b.m)
    keep_b = jnp.isnan(a.x_kept) if labelled else b.m > a.m
    a, b = _seen_from(a, m, ~keep_b, scaling), _seen_from(b, m, keep_b, scaling)
    return RowPart(
        m,
        a.s + b.s,
        jnp.where(keep_b, b.x_kept, a.x_kept),
        jnp.where(keep_b, b.kept, a.kept),
        *map(added, a[4:], b[4:]),
    )


def merge_shards(
    part: RowPart, axes: Axes, labelled: bool, size: int, scaling: Scaling | None = None
) -> RowPart:
    """The part of the classes of all devices along the mesh axes, each holding ``size`` of them.

    One maximum and one sum, of a few numbers a row. ``kept`` stays the place on this device.
    """
    if not axes:
        return part
    m = mesh.largest(part.m, axes)
    keeps = ~jnp.isnan(part.x_kept) if labelled else part.m == m
    here = _seen_from(part, m, keeps, scaling)
    x_kept = jnp.where(keeps, part.x_kept, 0)
    sums = {"part": (here.s, *here[4:]), "x_kept": x_kept, "keepers": keeps.astype(m.dtype)}
    if not labelled:
        e_kept = exp(scaled(part.x_kept - finite(m), scaling))
        sums["e_kept"] = jnp.where(keeps, e_kept, 0)
    sums = mesh.sums(sums, axes)
    (s, *rest), x_kept, keepers = sums["part"], sums["x_kept"], sums["keepers"]
    if labelled:
        return RowPart(m, s, jnp.where(keepers > 0, x_kept, jnp.nan), part.kept, *rest)
    # Several devices hold the maximum: no entry above 1/2, so none needs to be kept out. The 1 that
    # finish adds is taken from the sum of them all.
    one = keepers == 1
    s = jnp.where(one, s, jnp.maximum(s + sums["e_kept"] - 1, 0))
    x_kept = jnp.where(one | (m == -jnp.inf), x_kept, m)
    return RowPart(m, s, x_kept, jnp.where(keeps & one, part.kept, size), *rest)
