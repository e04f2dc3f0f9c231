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
    keeps_exponentials,
    max_and_place,
    max_and_sum,
    row_max,
    row_sum,
    sum_of_others,
)
from jaxloss._types import Axes
from jaxloss._xla import mesh
from jaxloss._xla.elementary import exp, exp_of_nonpositive, expm1, finite
from jaxloss._xla.fusion import lies_below, opaque, reread
from jaxloss._xla.indexing import gather_class, is_elsewhere
from jaxloss._xla.selection import select


class Rows(NamedTuple):
    """Some classes of some rows, and what is asked of them."""

    logits: Logits  # [..., C]
    omitted: Any = None  # [...] int32, the entry to leave out, C for none; None: one at the maximum
    soft: Any = None  # the soft targets q, broadcastable to the logits
    sparse: Any = None  # index[..., k] and the soft targets there, in place of those of ``soft``

    def at_sparse(self) -> "Rows":
        """The k classes of ``sparse`` alone."""
        index, extra = self.sparse
        return Rows(self.logits.at(index), soft=extra)


# Fields of a part that are there where they are asked for.
SUMS = ("below", "mass", "other_mass", "entropy_sum", "sum_below_max", "square_sum", "gap_sum")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("m", "s", "x_omitted", "omitted", *SUMS, "scaling"),
    meta_fields=("labelled",),
)
@dataclass(frozen=True)
class RowPart:
    """``m`` and ``x_omitted`` are in units of the scaling, as logits are read; the rest is in nats.

    See ``rows`` for the letters.
    """

    m: Any  # -inf for classes that are all at -inf
    s: Any
    x_omitted: Any  # NaN: the entry that is left out is not among them
    omitted: Any
    below: Any = None  # sum_j q_j (m - x_j)
    mass: Any = None  # sum_j q_j
    other_mass: Any = None  # sum_{j != k} q_j
    entropy_sum: Any = None  # sum_j exp(x_j - m) (m - x_j)
    sum_below_max: Any = None  # sum of exp(x_j - m) over the x_j < m, for an entropy beside a label
    square_sum: Any = None  # sum_j e_j^2 with e_j = exp(x_j - m)
    gap_sum: Any = None  # sum_j (e_j - e_j^2)
    scaling: Scaling | None = None
    labelled: bool = True  # the entry left out is a label's; otherwise it is one at the maximum

    def nats(self, x: Array) -> Array:
        return in_nats(x, self.scaling)


def row_part(rows: Rows, outputs: tuple[str, ...], *, backward_follows: bool = False) -> RowPart:
    """The part that ``rows`` make, with the sums that ``outputs`` are made of.

    ``backward_follows``: whether the backward pass is in the same program.
    """
    logits, labelled = rows.logits, rows.omitted is not None
    written = backward_follows and keeps_exponentials(logits.values)
    if labelled:
        highest, s = max_and_sum(logits, rows.omitted, written)
        m = finite(highest)
    else:
        largest, place = max_and_place(logits.uncapped())
        highest = logits.capped_max(largest)
        m, rows = finite(highest), rows._replace(omitted=place)
        # Or XLA:CPU writes out what the search and the sum share, a float32 copy of narrow logits.
        x = logits.values
        x, (high, place) = (x, (m, place)) if written else reread(x, (m, place))
        s = row_sum(replace(logits, values=x), high, place, written)
    x_omitted = _omitted_logit(rows, highest)
    part = RowPart(highest, s, x_omitted, rows.omitted, scaling=logits.scaling, labelled=labelled)
    more = "entropy" in outputs or "sum_sq_probs" in outputs
    if rows.soft is None and rows.sparse is None and not more:
        return part
    given = logits.for_passes()
    # m again, and the logits, for the reductions below.
    x, high = reread(given.values, m)
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
        entropy_sum = _entropy_sum(*again, logits.cap is not None)
        sum_below_max = _sum_below_max(given, m, entropy_sum) if labelled else None
        part = replace(part, entropy_sum=entropy_sum, sum_below_max=sum_below_max)
    if "sum_sq_probs" in outputs:
        square_sum, gap_sum = _square_sums(given, m)
        part = replace(part, square_sum=square_sum, gap_sum=gap_sum)
    return part


def _omitted_logit(rows: Rows, highest: Array) -> Array:
    """``x_omitted``, from the logits themselves: what they are widened to is never held."""
    logits, omitted = rows.logits, rows.omitted
    own = logits.at_class(omitted)
    x_omitted = own.wide()
    if logits.cap is not None:
        # tanh is computed twice, for the maximum and for the label, and may round differently: the
        # label could come out above the maximum, or below it where the two are one entry.
        first = own.uncapped().wide() == row_max(logits.uncapped())
        if own.exist is not None:  # a cap lifts -inf, but not of a class that is masked
            first &= own.exist
        shift = select(first, highest, jnp.minimum(x_omitted, highest)) - x_omitted
        # A rounding, and exact: the entry keeps its derivative.
        x_omitted += lax.stop_gradient(select(jnp.isfinite(shift), shift, 0))
    return select(omitted < logits.size, x_omitted, jnp.nan)


def _soft_sums(rows: Rows, again: tuple, backward_follows: bool) -> tuple:
    """``(below, mass, other_mass)`` of the soft targets, but for those of ``sparse``."""
    (logits, omitted, soft, sparse), (given, x, m) = rows, again
    shape, q, here = x.shape, soft.astype(x.dtype), omitted < logits.size
    if q.shape[-1] == 1 < logits.size:  # for all classes: nothing of their size is selected
        q, size, below = q[..., 0], logits.size, -given.difference(x, m)
        if sparse is not None:
            # Selected, and not taken away again: at a class at -inf that would be inf - inf.
            below = select(is_elsewhere(x, sparse[0]), below, 0)
            here &= ~jnp.any(sparse[0] == omitted[..., None], axis=-1)
            size -= jnp.sum(sparse[0] < size, axis=-1, dtype=x.dtype)
        at_omitted = select(here, q, 0)
        other_mass = q * (size - here.astype(x.dtype))
        below = select(q == 0, 0, q * jnp.sum(below, axis=-1))
    else:
        # What is asked of a class that does not exist is left out.
        for asked in (logits.exist, None if sparse is None else is_elsewhere(x, sparse[0])):
            if asked is not None:
                soft = select(asked, soft, jnp.zeros((), soft.dtype))
        narrow = soft.dtype != x.dtype
        # The barrier as for x_omitted. Wide targets may be computed here, and would be written out.
        at_omitted = lax.optimization_barrier(soft) if narrow else soft
        at_omitted = gather_class(jnp.broadcast_to(at_omitted, shape), omitted).astype(x.dtype)
        at_omitted = select(here, at_omitted, 0)
        other_mass = sum_of_others(soft, omitted, at_omitted)
        # Or the conversion, or the broadcast, is written out for both passes.
        again_soft = reread(soft, m)[0] if narrow or soft.shape != shape else soft
        below = _sum_below(again_soft.astype(x.dtype), *again)
        if not backward_follows:  # only the gradient asks for the others': a shorter pass
            mass = jnp.sum(soft, axis=-1, dtype=x.dtype)
            return below, jnp.broadcast_to(mass, below.shape), other_mass
    return below, other_mass + at_omitted, other_mass


def _sum_below(q: Array, given: Logits, x: Array, m: Array) -> Array:
    """sum_j q_j (m - x_j), where q_j = 0 asks for nothing, of a class at -inf either.

    0 times inf is NaN, so that a distance is no more than q_j times infinity, or than the largest
    float. XLA:CPU would write out a summand that selects, and make one factor of two constants.
    """
    info = jnp.finfo(x.dtype)
    _, steep, largest = opaque(m, 2.0 ** (info.maxexp - 1), info.max)
    most = lax.stop_gradient(jnp.abs(q)) * steep * steep + largest
    return jnp.sum(q * jnp.minimum(-given.difference(x, m), most), axis=-1)


def _sparse_sums(rows: Rows, m: Array) -> tuple:
    """``(below, mass, other_mass)`` of the soft targets of ``sparse``."""
    index, extra = rows.sparse
    extra = select(index < rows.logits.size, extra.astype(m.dtype), 0)
    few = rows.at_sparse().logits
    x = few.wide()
    extra = select((x == -jnp.inf) & (extra == 0), 0, extra)  # as q above
    below = few.nats(distance(x, m, extra == 0))
    below = select(extra == 0, 0, extra * below)
    others = select(index == rows.omitted[..., None], 0, extra)
    return tuple(jnp.sum(v, axis=-1) for v in (below, extra, others))


def _entropy_sum(given: Logits, x: Array, m: Array, capped: bool) -> Array:
    # Bounded, so that a class at -inf adds 0: XLA:CPU would write out a summand that selects.
    below = jnp.minimum(-given.difference(x, m), jnp.finfo(x.dtype).max)
    if capped:
        # A cap rounds either way. The derivative of abs would change its sign with that.
        below += lax.stop_gradient(jnp.abs(below) - below)
    return jnp.sum(given.exp(x, m) * below, axis=-1)


def _sum_below_max(given: Logits, m: Array, entropy_sum: Array) -> Array:
    x, (m, _) = reread(given.values, (m, entropy_sum))
    x = replace(given, values=x).read(m)
    # The step is 0 or 2, halved after the sum: a step of 1 would be one constant with the 1 in
    # ``passes.sum_of_others``, whose broadcast XLA:CPU then writes out.
    return jnp.sum(lies_below(x, m, 2.0) * given.exp(x, m), axis=-1) / 2


def _square_sums(given: Logits, m: Array) -> tuple[Array, Array]:
    """``(sum_j e_j^2, sum_j (e_j - e_j^2))``, each in a pass of its own: the one is read by the
    value, the other by the gradient."""

    def distances(before):
        x, (high, _) = reread(given.values, (m, before))
        again = replace(given, values=x)
        return again.difference(again.read(high), high)

    # Of an exponential that is read twice XLA:CPU writes out both.
    d = distances(m)
    square_sum = jnp.sum(exp_of_nonpositive(d + d), axis=-1)
    d = distances(square_sum)
    return square_sum, jnp.sum(exp_of_nonpositive(d) - exp_of_nonpositive(d + d), axis=-1)


def distance(x: Array, m: Array, unless: Array) -> Array:
    """m - x, finite where nothing is asked for."""
    return m[..., None] - select(unless, m[..., None], x)


def _rescaled(part: RowPart, m: Array, keeps: Array) -> RowPart:
    """The part with its sums scaled to ``m``, the maximum of more classes than its own.

    ``keeps``: its omitted entry stays out of the sums; otherwise it joins the others.
    """

    def lifted(x, weight):  # sum of weights * (part.m - x_j), seen from m
        # Two parts of classes at -inf: their maxima are no distance apart. Selected before the
        # product: the distance from a part that weighs nothing may be infinite.
        nothing = (weight == 0) | (m == part.m)
        return x + select(nothing, 0, part.nats(m - part.m)) * weight

    omitted = exp(part.nats(part.x_omitted - finite(part.m)))
    whole = part.s + select(jnp.isnan(part.x_omitted), 0, omitted)
    scale = exp(part.nats(part.m - finite(m)))
    below, other_mass, entropy_sum, sum_below_max = (
        part.below,
        part.other_mass,
        part.entropy_sum,
        part.sum_below_max,
    )
    if part.mass is not None:
        below, other_mass = lifted(below, part.mass), select(keeps, other_mass, part.mass)
    if entropy_sum is not None:
        # Scaled first: of classes that are masked by the smallest float, a distance times their
        # number is inf, and their scale is 0.
        entropy_sum = lifted(scale * entropy_sum, scale * whole)
    if sum_below_max is not None:
        sum_below_max = scale * select(part.m == m, sum_below_max, whole)
    square_sum, gap_sum = part.square_sum, part.gap_sum
    if square_sum is not None:
        # Of c e_j: its square, and c e - (c e)^2 = c (e - e^2) + c (1 - c) e^2.
        apart = scale * -expm1(part.nats(part.m - finite(m)))
        square_sum, gap_sum = scale**2 * square_sum, scale * gap_sum + apart * square_sum
    s = scale * select(keeps, part.s, whole)
    sums = {
        "below": below,
        "other_mass": other_mass,
        "entropy_sum": entropy_sum,
        "sum_below_max": sum_below_max,
        "square_sum": square_sum,
        "gap_sum": gap_sum,
    }
    return replace(part, m=m, s=s, **sums)


def add(x: Any, y: Any) -> Any:
    return y if x is None else x + y


def merge(a: RowPart, b: RowPart) -> RowPart:
    """The part of the classes of both: keep the larger ``m``, scale the other's sums.

    A label is left out of at most one of them. Without one each leaves out an entry at its own
    maximum, and the smaller one's joins the others.
    """
    m = jnp.maximum(a.m, b.m)
    keep_b = jnp.isnan(a.x_omitted) if a.labelled else b.m > a.m
    a, b = _rescaled(a, m, ~keep_b), _rescaled(b, m, keep_b)
    return replace(
        a,
        m=m,
        s=a.s + b.s,
        x_omitted=select(keep_b, b.x_omitted, a.x_omitted),
        omitted=select(keep_b, b.omitted, a.omitted),
        **{name: add(getattr(a, name), getattr(b, name)) for name in SUMS},
    )


def merge_shards(part: RowPart, axes: Axes, size: int) -> RowPart:
    """The part of the classes of all devices along the mesh axes, each holding ``size`` of them.

    One maximum and one sum, of a few numbers a row. ``omitted`` stays the place on this device.
    """
    if not axes:
        return part
    m = mesh.largest(part.m, axes)
    keeps = ~jnp.isnan(part.x_omitted) if part.labelled else part.m == m
    here = _rescaled(part, m, keeps)
    x_omitted = select(keeps, part.x_omitted, 0)
    names = "s", *SUMS
    sums: dict[str, Any] = {"part": [getattr(here, name) for name in names]}
    sums |= {"x_omitted": x_omitted, "keepers": keeps.astype(m.dtype)}
    if not part.labelled:
        e_omitted = exp(part.nats(part.x_omitted - finite(m)))
        sums["e_omitted"] = select(keeps, e_omitted, 0)
    sums = mesh.sums(sums, axes)
    x_omitted, keepers = sums["x_omitted"], sums["keepers"]
    whole = replace(part, m=m, **dict(zip(names, sums["part"], strict=True)))
    if part.labelled:
        return replace(whole, x_omitted=select(keepers > 0, x_omitted, jnp.nan))
    # Several devices hold the maximum: no entry above 1/2, so none needs to be left out. The 1 that
    # finish adds is taken from the sum of them all.
    one = keepers == 1
    s = select(one, whole.s, jnp.maximum(whole.s + sums["e_omitted"] - 1, 0))
    x_omitted = select(one | (m == -jnp.inf), x_omitted, m)
    return replace(whole, s=s, x_omitted=x_omitted, omitted=select(keeps & one, part.omitted, size))
