"""What some of a row's classes add to it: parts of disjoint classes merge.

A whole row, a block of the vocabulary and the columns on one device of a mesh are parts alike.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._numerics.logits import Logits, Scaling, in_nats
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
from jaxloss._xla.indexing import elsewhere, entry
from jaxloss._xla.math import exp, finite


class Rows(NamedTuple):
    """Some classes of some rows, and what is asked of them."""

    logits: Logits  # [..., C]
    kept: Any = None  # [...] int32, the entry to keep out, C for none; None: one at the maximum
    soft: Any = None  # the soft targets q, broadcastable to the logits
    sparse: Any = None  # index[..., k] and the soft targets there, in place of those of ``soft``

    def at_sparse(self) -> "Rows":
        """The k classes of ``sparse`` alone."""
        index, extra = self.sparse
        return Rows(self.logits.at(index), soft=extra)


SUMS = ("below", "mass", "other_mass", "spread", "low")  # of a part, where they are asked for


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("m", "s", "x_kept", "kept", *SUMS, "scaling"),
    meta_fields=("labelled",),
)
@dataclass(frozen=True)
class RowPart:
    """``m`` and ``x_kept`` are in units of the scaling, as logits are read; the rest is in nats.

    See ``rows`` for the letters.
    """

    m: Any  # -inf for classes that are all at -inf
    s: Any
    x_kept: Any  # NaN: the entry that is kept out is not among them
    kept: Any
    below: Any = None  # sum_j q_j (m - x_j)
    mass: Any = None  # sum_j q_j
    other_mass: Any = None  # sum_{j != k} q_j
    spread: Any = None  # sum_j exp(x_j - m) (m - x_j)
    low: Any = None  # sum of exp(x_j - m) over the x_j < m, for an entropy beside a label
    scaling: Scaling | None = None
    labelled: bool = True  # the entry kept out is a label's; otherwise it is one at the maximum

    def nats(self, x: Array) -> Array:
        return in_nats(x, self.scaling)


def row_part(rows: Rows, outputs: tuple[str, ...], *, backward_follows: bool = False) -> RowPart:
    """``backward_follows``: in the same program."""
    logits, labelled = rows.logits, rows.kept is not None
    written = backward_follows and writes_out(logits.values)
    if labelled:
        highest, s = max_and_sum(logits, rows.kept, written)
        m = finite(highest)
    else:
        largest, place = max_and_place(logits.uncapped())
        highest = logits.capped_max(largest)
        m, rows = finite(highest), rows._replace(kept=place)
        # Or XLA:CPU writes out what the search and the sum share, a float32 copy of narrow logits.
        x = logits.values
        x, (high, place) = (x, (m, place)) if written else apart(x, (m, place))
        s = row_sum(replace(logits, values=x), high, place, written)
    x_kept = _kept_logit(rows, highest)
    part = RowPart(highest, s, x_kept, rows.kept, scaling=logits.scaling, labelled=labelled)
    if rows.soft is None and rows.sparse is None and "entropy" not in outputs:
        return part
    given = logits.for_passes()
    # m again, and the logits, for the reductions below.
    x, high = apart(given.values, m)
    again = replace(given, values=x)
    again = again, again.read(high), high
    sums = None if rows.soft is None else _soft_sums(rows, again, backward_follows)
    if rows.sparse is not None:
        some = _sparse_sums(rows, m)
        sums = some if sums is None else tuple(map(lax.add, sums, some))
    if sums is not None:
        below, mass, other_mass = sums
        part = replace(part, below=below, mass=mass, other_mass=other_mass)
    if "entropy" in outputs:
        spread = _spread(*again, logits.cap is not None)
        low = _low(given, m, spread) if labelled else None
        part = replace(part, spread=spread, low=low)
    return part


def _kept_logit(rows: Rows, highest: Array) -> Array:
    """``x_kept``, from the logits themselves: what they are widened to is never held."""
    logits, kept = rows.logits, rows.kept
    own = logits.at_class(kept)
    x_kept = own.wide()
    if logits.cap is not None:
        # tanh is computed twice, for the maximum and for the label, and may round differently: the
        # label could come out above the maximum, or below it where the two are one entry.
        first = own.uncapped().wide() == row_max(logits.uncapped())
        if own.exist is not None:  # a cap lifts -inf, but not of a class that is masked
            first &= own.exist
        shift = jnp.where(first, highest, jnp.minimum(x_kept, highest)) - x_kept
        # A rounding, and exact: the entry keeps its derivative.
        x_kept += lax.stop_gradient(jnp.where(jnp.isfinite(shift), shift, 0))
    return jnp.where(kept < logits.size, x_kept, jnp.nan)


def _soft_sums(rows: Rows, again: tuple, backward_follows: bool) -> tuple:
    """``(below, mass, other_mass)`` of the soft targets, but for those of ``sparse``."""
    (logits, kept, soft, sparse), (given, x, m) = rows, again
    shape, q, here = x.shape, soft.astype(x.dtype), kept < logits.size
    if q.shape[-1] == 1 < logits.size:  # for all classes: nothing of their size is selected
        q, size, below = q[..., 0], logits.size, -given.above(x, m)
        if sparse is not None:
            # Selected, and not taken away again: at a class at -inf that would be inf - inf.
            below = jnp.where(elsewhere(x, sparse[0]), below, 0)
            here &= ~jnp.any(sparse[0] == kept[..., None], axis=-1)
            size -= jnp.sum(sparse[0] < size, axis=-1, dtype=x.dtype)
        at_kept = jnp.where(here, q, 0)
        other_mass = q * (size - here.astype(x.dtype))
        below = jnp.where(q == 0, 0, q * jnp.sum(below, axis=-1))
    else:
        # What is asked of a class that does not exist is left out.
        for asked in (logits.exist, None if sparse is None else elsewhere(x, sparse[0])):
            if asked is not None:
                soft = jnp.where(asked, soft, jnp.zeros((), soft.dtype))
        narrow = soft.dtype != x.dtype
        # The barrier as for x_kept. Wide targets may be computed here, and would be written out.
        at_kept = lax.optimization_barrier(soft) if narrow else soft
        at_kept = entry(jnp.broadcast_to(at_kept, shape), kept).astype(x.dtype)
        at_kept = jnp.where(here, at_kept, 0)
        other_mass = sum_of_others(soft, kept, at_kept)
        # Or the conversion, or the broadcast, is written out for both passes.
        again_soft = apart(soft, m)[0] if narrow or soft.shape != shape else soft
        below = _sum_below(again_soft.astype(x.dtype), *again)
        if not backward_follows:  # only the gradient asks for the others': a shorter pass
            mass = jnp.sum(soft, axis=-1, dtype=x.dtype)
            return below, jnp.broadcast_to(mass, below.shape), other_mass
    return below, other_mass + at_kept, other_mass


def _sum_below(q: Array, given: Logits, x: Array, m: Array) -> Array:
    """sum_j q_j (m - x_j), where q_j = 0 asks for nothing, of a class at -inf either.

    0 times inf is NaN, so that a distance is no more than q_j times infinity, or than the largest
    float. XLA:CPU would write out a summand that selects, and make one factor of two constants.
    """
    info = jnp.finfo(x.dtype)
    _, steep, largest = behind_barrier(m, 2.0 ** (info.maxexp - 1), info.max)
    most = lax.stop_gradient(jnp.abs(q)) * steep * steep + largest
    return jnp.sum(q * jnp.minimum(-given.above(x, m), most), axis=-1)


def _sparse_sums(rows: Rows, m: Array) -> tuple:
    """``(below, mass, other_mass)`` of the soft targets of ``sparse``."""
    index, extra = rows.sparse
    extra = jnp.where(index < rows.logits.size, extra.astype(m.dtype), 0)
    few = rows.at_sparse().logits
    x = few.wide()
    extra = jnp.where((x == -jnp.inf) & (extra == 0), 0, extra)  # as q above
    below = few.nats(distance(x, m, extra == 0))
    below = jnp.where(extra == 0, 0, extra * below)
    others = jnp.where(index == rows.kept[..., None], 0, extra)
    return tuple(jnp.sum(v, axis=-1) for v in (below, extra, others))


def _spread(given: Logits, x: Array, m: Array, capped: bool) -> Array:
    # Bounded, so that a class at -inf adds 0: XLA:CPU would write out a summand that selects.
    below = jnp.minimum(-given.above(x, m), jnp.finfo(x.dtype).max)
    if capped:
        # A cap rounds either way. The derivative of abs would change its sign with that.
        below += lax.stop_gradient(jnp.abs(below) - below)
    return jnp.sum(given.exp(x, m) * below, axis=-1)


def _low(given: Logits, m: Array, spread: Array) -> Array:
    x, (m, _) = apart(given.values, (m, spread))
    x = replace(given, values=x).read(m)
    # The step is 0 or 2, halved after the sum: a step of 1 would be one constant with the 1 in
    # ``passes.sum_of_others``, whose broadcast XLA:CPU then writes out.
    return jnp.sum(lies_below(x, m, 2.0) * given.exp(x, m), axis=-1) / 2


def distance(x: Array, m: Array, unless: Array) -> Array:
    """m - x, finite where nothing is asked for."""
    return m[..., None] - jnp.where(unless, m[..., None], x)


def _seen_from(part: RowPart, m: Array, keeps: Array) -> RowPart:
    """The part with its sums scaled to ``m``, the maximum of more classes than its own.

    ``keeps``: its kept entry stays out of the sums; otherwise it joins the others.
    """

    def lifted(x, weight):  # sum of weights * (part.m - x_j), seen from m
        # Two parts of classes at -inf: their maxima are no distance apart. Selected before the
        # product: the distance from a part that weighs nothing may be infinite.
        nothing = (weight == 0) | (m == part.m)
        return x + jnp.where(nothing, 0, part.nats(m - part.m)) * weight

    kept = exp(part.nats(part.x_kept - finite(part.m)))
    whole = part.s + jnp.where(jnp.isnan(part.x_kept), 0, kept)
    scale = exp(part.nats(part.m - finite(m)))
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
    sums = {"below": below, "other_mass": other_mass, "spread": spread, "low": low}
    return replace(part, m=m, s=s, **sums)


def added(x: Any, y: Any) -> Any:
    return y if x is None else x + y


def merge(a: RowPart, b: RowPart) -> RowPart:
    """The part of the classes of both: keep the larger ``m``, scale the other's sums.

    A label is kept out of at most one of them. Without one each keeps out an entry at its own
    maximum, and the smaller one's joins the others.
    """
    m = jnp.maximum(a.m, b.m)
    keep_b = jnp.isnan(a.x_kept) if a.labelled else b.m > a.m
    a, b = _seen_from(a, m, ~keep_b), _seen_from(b, m, keep_b)
    return replace(
        a,
        m=m,
        s=a.s + b.s,
        x_kept=jnp.where(keep_b, b.x_kept, a.x_kept),
        kept=jnp.where(keep_b, b.kept, a.kept),
        **{name: added(getattr(a, name), getattr(b, name)) for name in SUMS},
    )


def merge_shards(part: RowPart, axes: Axes, size: int) -> RowPart:
    """The part of the classes of all devices along the mesh axes, each holding ``size`` of them.

    One maximum and one sum, of a few numbers a row. ``kept`` stays the place on this device.
    """
    if not axes:
        return part
    m = mesh.largest(part.m, axes)
    keeps = ~jnp.isnan(part.x_kept) if part.labelled else part.m == m
    here = _seen_from(part, m, keeps)
    x_kept = jnp.where(keeps, part.x_kept, 0)
    names = "s", *SUMS
    sums: dict[str, Any] = {"part": [getattr(here, name) for name in names]}
    sums |= {"x_kept": x_kept, "keepers": keeps.astype(m.dtype)}
    if not part.labelled:
        e_kept = exp(part.nats(part.x_kept - finite(m)))
        sums["e_kept"] = jnp.where(keeps, e_kept, 0)
    sums = mesh.sums(sums, axes)
    x_kept, keepers = sums["x_kept"], sums["keepers"]
    whole = replace(part, m=m, **dict(zip(names, sums["part"], strict=True)))
    if part.labelled:
        return replace(whole, x_kept=jnp.where(keepers > 0, x_kept, jnp.nan))
    # Several devices hold the maximum: no entry above 1/2, so none needs to be kept out. The 1 that
    # finish adds is taken from the sum of them all.
    one = keepers == 1
    s = jnp.where(one, whole.s, jnp.maximum(whole.s + sums["e_kept"] - 1, 0))
    x_kept = jnp.where(one | (m == -jnp.inf), x_kept, m)
    return replace(whole, s=s, x_kept=x_kept, kept=jnp.where(keeps & one, part.kept, size))
