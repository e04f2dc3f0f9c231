"""Divergences of two softmaxes, row by row, and their exact gradients.

A teacher's ``p = softmax(t / T)``, a student's ``q = softmax(x / T)``, ``a_j = log p_j - log q_j``.
Two distributions that are close differ in ``a`` by little and in the divergence by its square: the
textbook's ``sum p a`` cancels to noise of either sign. Since ``sum p = sum q = 1``,

    KL(p || q) = sum_j (p_j a_j - p_j + q_j)

whose terms are all >= 0: nothing cancels between classes, and an error ``e`` that all ``a_j`` share
enters as ``e^2 / 2``. Within a class, ``s`` is the smaller probability, ``b`` the larger and
``d = |a_j| = log(b / s)``. With ``G(d) = (e^d - 1 - d) / d^2 = sum_k d^k / (k + 2)!``::

    b - s                             = s d (1 + d G)
    s log(s / b) - s + b              = s d^2 G                   the class's part of KL(s || b)
    b log(b / s) - b + s              = s d^2 (1 + (d - 1) G)     and of KL(b || s)

The right sides have no cancellation for small ``d``, the left ones none for large.

Where the classes are split over mesh ``axes``, each device has its own columns of all that is of
each class, and the numbers of a row are maxima and sums over the devices.

``a`` itself is ``((t_j - x_j) - (t_max - x_max)) / T - shift``: differences of logits first, exact
whatever their offsets, and ``shift``, the log-sum-exps' difference, from the sum of differences.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jaxloss._numerics.passes import one_near_max
from jaxloss._types import Axes
from jaxloss._xla import mesh
from jaxloss._xla.blocks import by_blocks, rows_of_a_block
from jaxloss._xla.derivatives import differentiable, scale_rows
from jaxloss._xla.dtypes import accumulator_dtype, downcast, upcast
from jaxloss._xla.elementary import exp_of_nonpositive, finite, log, log1p
from jaxloss._xla.fusion import reread
from jaxloss._xla.indexing import is_at

NEAR = 2.0  # the distance below which the series serves


def accumulator_of(*logits: Array) -> jnp.dtype:
    """float64 where one of them is, else float32."""
    wide = {accumulator_dtype(x.dtype) for x in logits}
    return max(wide, key=lambda dtype: dtype.itemsize)


class Pair(NamedTuple):
    """Of each class [..., C]."""

    p: Array
    q: Array
    a: Array  # log(p / q)


class Row(NamedTuple):
    """What the backward pass needs beside the logits: scalars of a row."""

    x_max: Array
    t_max: Array
    x_sum: Array  # sum_j exp((x_j - x_max) / T)
    t_sum: Array
    shift: Array  # log(t_sum / x_sum)
    of_teacher: Any  # KL(p || q), or KL(p || m) with m = beta p + (1 - beta) q
    of_student: Any  # KL(q || p), or KL(q || m)


def _series(d: Array) -> Array:
    """G(d) for 0 <= d <= NEAR, where G >= 1/2: the terms that are left out are below eps / 16."""
    eps = float(jnp.finfo(d.dtype).eps)
    last = next(k for k in range(99) if NEAR**k / math.factorial(k + 2) < eps / 64)
    total = jnp.full_like(d, 1 / math.factorial(last + 2))
    for k in reversed(range(last)):
        total = total * d + 1 / math.factorial(k + 2)
    return total


def _near(d: Array) -> tuple[Array, Array, Array]:
    near = d < NEAR
    inside = jnp.where(near, d, 0)
    return near, inside, _series(inside)


def _finite(d: Array) -> Array:
    return jnp.where(d == jnp.inf, 0, d)


def _over(x: Array, y: Array) -> Array:
    """x / y, 0 where y is 0 or subnormal: its reciprocal may be inf."""
    normal = y >= jnp.finfo(y.dtype).tiny
    return jnp.where(normal, x / jnp.where(normal, y, 1), 0)


# Of the smaller probability s, the larger b and d = log(b / s). Their derivatives are those of the
# left sides above, by s, b and d: no series' own derivative, and no division by s, whose derivative
# would square a probability of e^-50, or take one of e^-90 for 0.


@jax.custom_jvp
def _gap(s: Array, b: Array, d: Array) -> Array:
    """b - s."""
    near, e, g = _near(d)
    return jnp.where(near, s * e * (1 + e * g), b - s)


@_gap.defjvp
def _gap_jvp(primals, tangents):
    ds, db, _ = tangents
    return _gap(*primals), db - ds


@jax.custom_jvp
def _down(s: Array, b: Array, d: Array) -> Array:
    """s log(s / b) - s + b; b for s = 0."""
    near, e, g = _near(d)
    return jnp.where(near, s * e * e * g, b - s * (1 + _finite(d)))


@_down.defjvp
def _down_jvp(primals, tangents):
    (s, _, d), (ds, db, dd) = primals, tangents
    return _down(*primals), (db - ds) - _finite(d) * ds - s * dd


@jax.custom_jvp
def _up(s: Array, b: Array, d: Array) -> Array:
    """b log(b / s) - b + s; inf for s = 0, and where b is less than the smallest float too."""
    near, e, g = _near(d)
    far = jnp.where(d == jnp.inf, jnp.inf, b * (_finite(d) - 1) + s)
    return jnp.where(near, s * e * e * (1 + (e - 1) * g), far)


@_up.defjvp
def _up_jvp(primals, tangents):
    (_, b, d), (ds, db, dd) = primals, tangents
    return _up(*primals), (ds - db) + _finite(d) * db + b * dd


def _sides(pair: Pair) -> tuple[Array, Array, Array, Array]:
    """(whether the teacher's is the larger probability, the smaller, the larger, distance)."""
    p, q, a = pair
    more = a >= 0
    return more, jnp.where(more, q, p), jnp.where(more, p, q), jnp.where(more, a, -a)


def _p_minus_q(pair: Pair) -> Array:
    more, *sides = _sides(pair)
    gap = _gap(*sides)
    return jnp.where(more, gap, -gap)


def _difference(x: Array, y: Array) -> tuple[Array, Array]:
    """(s, e) with s + e = x - y exactly, s being its rounding (Knuth's TwoSum)."""
    s = x - y
    minus_y = s - x
    e = (x - (s - minus_y)) - (minus_y + y)
    return s, lax.stop_gradient(jnp.where(jnp.abs(s) < jnp.inf, e, 0))


def _prepared(x: Array, mask: Array | None, valid: Array | None, dtype) -> Array:
    x = upcast(x).astype(dtype)
    if mask is not None:
        x = jnp.where(mask, x, -jnp.inf)
    # A row that does not count may hold NaN, which would return from behind any later select.
    return x if valid is None else jnp.where(valid[..., None], x, 0)


def _distances(x: Array, t: Array, x_max: Array, t_max: Array, temperature: Any) -> Array:
    """((t_j - x_j) - (t_max - x_max)) / T, one rounding of it whatever the logits' offsets."""
    nowhere = (x == -jnp.inf) & (t == -jnp.inf)
    s, e = _difference(jnp.where(nowhere, 0, t), jnp.where(nowhere, 0, x))
    of_row, e_of_row = _difference(t_max, x_max)
    # The quotient last: x / T - t / T would be a product and a sum, which compilers fuse, and then
    # equal logits differ by a rounding.
    return ((s - of_row[..., None]) + (e - e_of_row[..., None])) / _of_classes(temperature)


def _exponentials(x: Array, x_max: Array, temperature: Any) -> Array:
    return exp_of_nonpositive((x - x_max[..., None]) / _of_classes(temperature))


def _of_classes(of_rows: Any) -> Any:
    """A number of all rows, or one a row for each of its classes."""
    return of_rows[..., None] if isinstance(of_rows, Array) and of_rows.ndim else of_rows


def _total(x: Array, axes: Axes) -> Array:
    """The sum over the classes."""
    total = jnp.sum(x, axis=-1)
    return lax.psum(total, axes) if axes else total


def _row(x: Array, t: Array, temperature: Any, axes: Axes) -> Row:
    """The derivatives are those of :func:`_pair`, which is made of it."""
    x, t = lax.stop_gradient((x, t))
    x_max, t_max = (finite(mesh.largest(jnp.max(v, axis=-1), axes)) for v in (x, t))
    e_x, e_t = _exponentials(x, x_max, temperature), _exponentials(t, t_max, temperature)
    x_sum, t_sum = _total(e_x, axes), _total(e_t, axes)
    distances = _distances(x, t, x_max, t_max, temperature)
    reread = _total(_p_minus_q(Pair(e_t, e_x, distances)), axes) / x_sum
    # The sums' rounding is all there is to log(t_sum / x_sum) where they are nearly equal.
    shift = jnp.where(jnp.abs(reread) < 0.5, log1p(reread), log(t_sum / x_sum))
    return Row(x_max, t_max, x_sum, t_sum, shift, None, None)


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def _pair(x: Array, t: Array, row: Row, temperature: Any, axes: Axes) -> Pair:
    return Pair(
        _exponentials(t, row.t_max, temperature) / row.t_sum[..., None],
        _exponentials(x, row.x_max, temperature) / row.x_sum[..., None],
        _distances(x, t, row.x_max, row.t_max, temperature) - row.shift[..., None],
    )


def _pair_jvp(axes, primals, tangents):
    # By the logits and T: the row's numbers are functions of them, which have lost digits.
    (x, t, row, temperature), (dx, dt, _, d_temperature) = primals, tangents
    pair = _pair(x, t, row, temperature, axes)
    dx, dt = (
        _moved(v, v_max, dv, temperature, d_temperature)
        for v, v_max, dv in ((x, row.x_max, dx), (t, row.t_max, dt))
    )
    d_log_q = _log_tangent(pair.q, x, row.x_max, dx, axes) / _of_classes(temperature)
    d_log_p = _log_tangent(pair.p, t, row.t_max, dt, axes) / _of_classes(temperature)
    return pair, Pair(pair.p * d_log_p, pair.q * d_log_q, d_log_p - d_log_q)


_pair.defjvp(_pair_jvp, symbolic_zeros=True)


def _moved(x: Array, x_max: Array, dx: Any, temperature: Any, d_temperature: Any) -> Array:
    """T times the tangent of ``(x_j - x_max) / T``."""
    dx = jnp.zeros_like(x) if isinstance(dx, SymbolicZero) else dx
    if isinstance(d_temperature, SymbolicZero):
        return dx
    return dx - _below_max(x, x_max) * _of_classes(d_temperature / temperature)


def _below_max(x: Array, x_max: Array) -> Array:
    """``x_j - x_max``, 0 for a class at -inf, whose probability stays 0."""
    return jnp.where(x == -jnp.inf, 0, x - x_max[..., None])


def _log_tangent(p: Array, x: Array, x_max: Array, dx: Array, axes: Axes) -> Array:
    """``dx_j - sum_i p_i dx_i``, of differences with the entry at the maximum: as a difference of
    two numbers of the tangent's size, that entry's, which is all that the others lack, is lost."""
    at_max = is_at(x, one_near_max(x, x_max, axes))
    dx = dx - _total(jnp.where(at_max, dx, 0), axes)[..., None]
    return dx - _total(p * dx, axes)[..., None]


class Mixture(NamedTuple):
    """``m = beta p + (1 - beta) q`` of each class, which lies between the two."""

    m: Array
    above: Array  # log(b / m)
    below: Array  # log(m / s)


def _mixture(pair: Pair, beta: Any) -> Mixture:
    more, s, b, d = _sides(pair)
    # Both selected: 1 - 0.99 is 0.01 to six digits.
    of_b, of_s = jnp.where(more, beta, 1 - beta), jnp.where(more, 1 - beta, beta)
    # Of two numbers: XLA:CPU would take a logarithm of each class, in a pass of its own.
    logs = (log(jnp.asarray(share, s.dtype)) for share in (beta, 1 - beta))
    log_of_b = lax.stop_gradient(jnp.where(more, *logs))
    # Written out: XLA:CPU would compute the gap's series twice in the logarithm's pass.
    gap, (s, b, d) = reread(_gap(s, b, d), (s, b, d))
    above, below = reread(*_logs_by_mixture(s, b, d, gap, of_s, of_b, log_of_b))
    return Mixture(of_b * b + of_s * s, above, below)


@jax.custom_jvp
def _logs_by_mixture(
    s: Array, b: Array, d: Array, gap: Array, of_s: Array, of_b: Array, log_of_b: Array
) -> tuple[Array, Array]:
    """``log(b / m)`` and ``log(m / s)`` for ``m = of_b b + of_s s``; ``gap`` is ``b - s``.

    They sum to ``d``. One logarithm, of the one that may be much smaller than ``d``, and the rest::

        of_s <= 1/2:       log(b / m) = -log(1 - of_s (b - s) / b)              at most d / 2
        of_b (b - s) <= s: log(m / s) = log(1 + of_b (b - s) / s)               at most log(2)
        else:              log(b / m) = -log(of_b) - log(1 + (of_s / of_b) s / b)
    """
    # Where s is 0, of_b (b - s) may be 0 too, for lack of smaller floats; log(b / s) is inf there.
    by_b, near = of_s <= 0.5, (of_b * gap <= s) & (s > 0)
    share = jnp.where(by_b, -of_s, jnp.where(near, of_b, of_s / of_b))
    top, bottom = jnp.where(by_b | near, gap, s), jnp.where(~by_b & near, s, b)
    found = log1p(share * _over(top, bottom))
    found = jnp.where(by_b, -found, jnp.where(near, found, -log_of_b - found))
    rest = d - found
    below_is_found = ~by_b & near
    return jnp.where(below_is_found, rest, found), jnp.where(below_is_found, found, rest)


def _logs_by_mixture_jvp(primals, tangents):
    # Functions of d and of_b, with of_s = 1 - of_b: -log(of_b + of_s e^-d), and d less that.
    s, b, d, gap, of_s, of_b, _ = primals
    share_of_s, share_of_b = _shares(s, b, d, of_s, of_b)
    dd, d_of_b = tangents[2], tangents[5]
    dd = jnp.zeros_like(d) if isinstance(dd, SymbolicZero) else dd
    above, below = share_of_s * dd, share_of_b * dd
    if not isinstance(d_of_b, SymbolicZero):
        moved = _over(gap, of_b * b + of_s * s) * d_of_b
        above, below = above - moved, below + moved
    return _logs_by_mixture(*primals), (above, below)


_logs_by_mixture.defjvp(_logs_by_mixture_jvp, symbolic_zeros=True)


@jax.custom_jvp
def _shares(s: Array, b: Array, d: Array, of_s: Array, of_b: Array) -> tuple[Array, Array]:
    """``of_s s / m`` and ``of_b b / m``, which sum to 1; 0 for an m that is 0."""
    m = of_b * b + of_s * s
    return _over(of_s * s, m), _over(of_b * b, m)


def _shares_jvp(primals, tangents):
    s, b, _, of_s, of_b = primals
    share_of_s, share_of_b = _shares(*primals)
    dd, d_of_b = tangents[2], tangents[4]
    moved = jnp.zeros_like(s)
    if not isinstance(dd, SymbolicZero):
        moved = share_of_s * share_of_b * dd
    if not isinstance(d_of_b, SymbolicZero):
        m = of_b * b + of_s * s
        moved += _over(s, m) * _over(b, m) * d_of_b
    return (share_of_s, share_of_b), (-moved, moved)


_shares.defjvp(_shares_jvp, symbolic_zeros=True)


def _divergences(pair: Pair, divergence: str, beta: Any, axes: Axes) -> tuple[Any, Any]:
    """(the teacher's, the student's) from the other, or from the mixture."""
    more, s, b, d = _sides(pair)
    total = partial(_total, axes=axes)

    if divergence == "forward":
        return total(jnp.where(more, _up(s, b, d), _down(s, b, d))), None
    if divergence == "reverse":
        return None, total(jnp.where(more, _down(s, b, d), _up(s, b, d)))
    m, above, below = _mixture(pair, beta)
    of_b, of_s = _up(m, b, above), _down(s, m, below)
    return total(jnp.where(more, of_b, of_s)), total(jnp.where(more, of_s, of_b))


def _loss(row: Row, divergence: str, beta: Any) -> Array:
    if divergence == "forward":
        return row.of_teacher
    if divergence == "reverse":
        return row.of_student
    return beta * row.of_teacher + (1 - beta) * row.of_student


def _weighed(p: Array, x: Array, axes: Axes) -> Array:
    """p x, 0 for p = 0 of an infinite x too."""
    none = p == 0
    return _balanced(p, jnp.where(none, 0, p * jnp.where(none, 0, x)), axes)


def _balanced(p: Array, slopes: Array, axes: Axes) -> Array:
    """``slopes``, which sum to 0, made exact at a class of more than 1/2.

    There ``a - KL`` is the difference of nearly equal numbers, and less the sum of the others.
    """
    others = jnp.where(p > 0.5, 0, slopes)
    return jnp.where(p > 0.5, -_total(others, axes)[..., None], others)


def _slopes(pair: Pair, row: Row, divergence: str, beta: Any, axes: Axes) -> tuple:
    """The derivatives of a row's loss with respect to ``x_j / T`` and ``t_j / T``.

    Of ``f(q)`` by ``x_j / T``: ``q_j (df/dq_j - sum_i q_i df/dq_i)``, and so for ``p`` and ``t``.

    - ``KL(p || q)``: ``df/dq = -p / q`` gives ``q - p``, ``df/dp = a + 1`` gives ``p (a - KL)``;
    - ``KL(q || p)``: the same with ``p`` and ``q`` exchanged and ``-a``;
    - mixed: ``df/dp = beta log(p / m)`` gives ``beta p (log(p / m) - KL(p || m))``, because the
      mixture's own share, ``-beta (beta p + (1 - beta) q) / m``, is constant; so for ``q``, and
      by ``beta`` it is ``KL(p || m) - KL(q || m)``.
    """
    if divergence == "forward":
        return -_p_minus_q(pair), _weighed(pair.p, pair.a - row.of_teacher[..., None], axes)
    if divergence == "reverse":
        return _weighed(pair.q, -pair.a - row.of_student[..., None], axes), _p_minus_q(pair)
    more = pair.a >= 0
    _, above, below = _mixture(pair, beta)
    of_p = jnp.where(more, above, -below) - row.of_teacher[..., None]
    of_q = jnp.where(more, -below, above) - row.of_student[..., None]
    return (1 - beta) * _weighed(pair.q, of_q, axes), beta * _weighed(pair.p, of_p, axes)


def row_divergences(
    logits: Array,
    teacher_logits: Array,
    class_mask: Array | None = None,
    valid: Array | None = None,
    *,
    divergence: str,
    beta: Any,
    temperature: Any,
    axes: Axes = (),
) -> Array:
    """The divergences of rows ``[..., C]``, one number a row; 0 for one that does not count.

    ``class_mask`` broadcasts to the logits, ``valid`` has one entry a row. Differentiable in both
    logits, in a temperature that is an array, a scalar or one a row, and in a beta that is a scalar
    array, in every mode. ``axes``: of the mesh, that the classes are split over.
    """
    wide = accumulator_of(logits, teacher_logits)
    if logits.shape[-1] == 0:
        nan = jnp.full(logits.shape[:-1], jnp.nan, wide)
        return nan if valid is None else jnp.where(valid, nan, 0)

    def both(logits, teacher_logits, mask, valid):
        x, t = (_prepared(v, mask, valid, wide) for v in (logits, teacher_logits))
        return x, t

    if divergence != "jensen_shannon":  # a traced beta is read by none of the others
        beta = 0.5
    if isinstance(temperature, Array) and temperature.ndim and valid is not None:
        # 0 / NaN is NaN: a row that does not count must not read its own.
        temperature = jnp.where(valid, temperature, 1)
    # A rule refers to no array: traced numbers are arguments.
    numbers = temperature, beta
    static = tuple(None if isinstance(n, Array) else n for n in numbers)
    traced = tuple(n if isinstance(n, Array) else None for n in numbers)
    # Devices that share the classes of a row would communicate for each block.
    size = None if axes else rows_of_a_block(logits.shape[-1])
    in_blocks = partial(by_blocks, size=size, lead=logits.shape[:-1])

    def parted(traced):
        """(the temperature of each row, the numbers of all)."""
        temperature, beta = traced
        if temperature is not None and temperature.ndim:
            return temperature, (None, beta)
        return None, traced

    def numbers_of(own, of_all):
        temperature, beta = (s if n is None else n for s, n in zip(static, of_all, strict=True))
        return (temperature if own is None else own), beta

    def forward(logits, teacher_logits, mask, valid, traced):
        def of_rows(rows, of_all):
            *given, own = rows
            x, t = both(*given)
            temperature, beta = numbers_of(own, of_all)
            row = _row(x, t, temperature, axes)
            pair = _pair(x, t, row, temperature, axes)
            of_teacher, of_student = _divergences(pair, divergence, beta, axes)
            row = row._replace(of_teacher=of_teacher, of_student=of_student)
            return _loss(row, divergence, beta), row

        own, of_all = parted(traced)
        loss, row = in_blocks(of_rows, (logits, teacher_logits, mask, valid, own), of_all)
        return loss, (logits, teacher_logits, mask, valid, traced, row)

    def slopes(given, own, row, of_all) -> tuple[tuple, Any]:
        temperature, beta = numbers_of(own, of_all)
        pair = _pair(*both(*given), row, temperature, axes)
        return _slopes(pair, row, divergence, beta, axes), temperature

    def by_temperature(given, row, slopes, temperature):
        """The derivative with respect to T: each logit over T moves by -(x_j / T) / T, and what
        all logits of a row share moves nothing."""
        x, t = both(*given)
        below = _below_max(x, row.x_max), _below_max(t, row.t_max)
        moved = sum(_total(s * b, axes) for s, b in zip(slopes, below, strict=True))
        return -moved / temperature**2

    def by_numbers(given, row, slopes, temperature, moving):
        """The derivatives with respect to T and beta, one number a row; None of one that does not
        move."""
        of_temperature, of_beta = moving
        return (
            by_temperature(given, row, slopes, temperature) if of_temperature else None,
            row.of_teacher - row.of_student if of_beta else None,
        )

    def backward(residuals, ct):
        *given, traced, row = residuals
        moving = tuple(n is not None for n in traced)

        def of_rows(rows, of_all):
            *given, own, row, ct = rows
            each, temperature = slopes(given, own, row, of_all)
            moved = (scale_rows(ct / temperature, slope) for slope in each)
            narrow = tuple(downcast(g, x.dtype) for g, x in zip(moved, given, strict=False))
            return narrow, by_numbers(given, row, each, temperature, moving)

        def summed(slope, number):
            if number is None:
                return None
            slope = scale_rows(ct, slope[..., None])[..., 0]
            return slope if number.ndim else jnp.sum(slope)

        own, of_all = parted(traced)
        narrow, of_numbers = in_blocks(of_rows, (*given, own, row, ct), of_all)
        return *narrow, None, None, tuple(map(summed, of_numbers, traced))

    def tangent(residuals, tangents):
        # Rows do not mix: the derivative of one number is the gradient at its unit cotangent.
        *given, traced, row = residuals
        of_logits, d_numbers = tangents[:2], tangents[4]
        moving = tuple(n is not None for n in d_numbers)

        def of_rows(rows, of_all):
            *given, own, row, of_logits = rows
            each, temperature = slopes(given, own, row, of_all)
            pairs = zip(each, of_logits, strict=True)
            moved = [
                _total(s * d.astype(wide), axes) / temperature for s, d in pairs if d is not None
            ]
            return sum(moved) if moved else None, by_numbers(given, row, each, temperature, moving)

        own, of_all = parted(traced)
        moved, of_numbers = in_blocks(of_rows, (*given, own, row, of_logits), of_all)
        pairs = zip(of_numbers, d_numbers, strict=True)
        moved = [moved, *(slope * d for slope, d in pairs if slope is not None)]
        moved = [x for x in moved if x is not None]
        return sum(moved[1:], start=moved[0])

    rule = differentiable(lambda *args: forward(*args)[0], forward, backward, tangent)
    # What is of a row is the same on all devices that share its classes.
    of_rows = mesh.varies_over((logits, teacher_logits, class_mask, valid, traced)) - {*axes}
    of_classes = mesh.varying((logits, teacher_logits, class_mask), {*of_rows, *axes})
    return rule(*of_classes, *mesh.varying((valid, traced), of_rows))
