"""How far from the truth a result may be.

A loss in float32 is conditioned by its margin: its exponents ``|x_y - m|`` are known to one
rounding each, and 16 roundings cover the arithmetic. ``assert_within`` allows a share of the truth;
``assert_allowed`` takes what is allowed entry by entry, as ``truth.truth_of`` derives it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LD = np.longdouble
INF = np.inf
EPS = float(np.finfo(np.float32).eps)


def relative_budget(margin):
    """Of the loss of a row whose label lies ``margin`` from the row's maximum (or runner-up)."""
    return (np.abs(margin) + 16) * EPS * 2


def margins(x):
    """The largest distance between two finite logits of a row, at least 1."""
    x = np.asarray(x, np.float64)
    high = np.max(np.where(np.isfinite(x), x, -np.inf), axis=-1)
    low = np.min(np.where(np.isfinite(x), x, np.inf), axis=-1)
    return np.maximum(high - low, 1)


def assert_within(got, expected, relative, floor=0.0):
    """|got - expected| <= relative * (|expected| + floor), elementwise, nonfinite values equal.

    What float32 holds only as a subnormal number may be 0: processors flush them.
    """
    got, expected = np.asarray(got, np.longdouble), np.asarray(expected, np.longdouble)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[~finite], expected[~finite])
    error = np.where(finite, np.abs(got - np.where(finite, expected, 0)), 0)
    allowed = relative * (np.where(finite, np.abs(expected), 0) + floor)
    allowed = np.broadcast_to(allowed + np.finfo(np.float32).tiny, got.shape)
    worst = np.unravel_index(np.argmax(error - allowed), got.shape) if got.size else ()
    assert np.all(error <= allowed), (
        f"at {tuple(map(int, worst))}: got {got[worst]}, expected {expected[worst]}, "
        f"error {error[worst]:.3g}, allowed {allowed[worst]:.3g}"
    )


class Precision(NamedTuple):
    eps: float  # of the accumulator
    tiny: float  # its smallest normal number: less may be 0
    reach: float  # exponents below -reach are 0
    half: float  # half a unit in the last place of a result in the inputs' dtype, 0 if wide
    least: float  # the smallest number of that dtype


def precision(dtype) -> Precision:
    own = jnp.finfo(dtype)
    wide = jnp.finfo(jnp.float64 if dtype == "float64" else jnp.float32)
    narrow = own.bits < 32
    least = float(own.smallest_subnormal) if dtype == "float16" else float(wide.tiny)
    reach = 20 - float(np.log(float(wide.tiny)))
    half = float(own.eps) / 2 if narrow else 0.0
    return Precision(float(wide.eps), float(wide.tiny), reach, half, least)


def rounded(allowed, truth, at: Precision):
    """``allowed``, and to the nearest number of the inputs' dtype."""
    return allowed + at.half * (np.abs(truth) + allowed) + (at.least if at.half else 0)


def assert_allowed(got, expected, allowed, at: Precision, what=""):
    got, expected = np.asarray(got, LD), np.asarray(expected, LD)
    assert got.shape == expected.shape, (what, got.shape, expected.shape)
    allowed = np.broadcast_to(np.asarray(allowed, LD) + 2 * at.tiny, got.shape)
    largest = jnp.finfo(jnp.float64 if at.eps < 1e-10 else jnp.float32).max
    expected = np.where(np.abs(expected) > LD(largest), np.copysign(INF, expected), expected)
    both = np.isfinite(expected)
    assert not np.isnan(allowed[both]).any(), f"{what}: no budget"
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected), what)
    np.testing.assert_array_equal(got[~both], expected[~both], what)
    over = np.where(both, np.abs(got - np.where(both, expected, 0)), 0) - np.where(both, allowed, 0)
    if over.size and np.max(over) > 0:
        i = np.unravel_index(np.argmax(over), over.shape)
        error = abs(got[i] - expected[i])
        raise AssertionError(
            f"{what} at {tuple(map(int, i))}: got {got[i]}, expected {expected[i]}, "
            f"error {error:.3g}, allowed {allowed[i]:.3g}"
        )


def relative_errors(found, true):
    """Of each leaf, the largest error over the largest true entry."""
    found, true = (jax.tree.map(lambda x: np.asarray(x, float), v) for v in (found, true))
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(true), strict=True)
    return [np.abs(x - y).max() / (np.abs(y).max() + 1e-30) for x, y in pairs]
