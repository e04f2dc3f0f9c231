"""Numbers to hurt, their softmax in 80 bits, and how far from it a result may be."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

LD = np.longdouble
INF = np.inf


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


# Values

KINDS = [
    "plain", "flat", "peaked", "saturated", "tied", "offset", "huge", "subnormal", "zero",
    "impossible", "nothing", "inf", "nan",
]  # fmt: skip
FINITE = KINDS[:9]


def row_of(rng, kind, c, dtype):
    x, info = rng.normal(size=c), jnp.finfo(dtype)
    if kind == "flat":
        x *= 1e-4
    elif kind in ("peaked", "impossible"):
        x *= 8
    elif kind == "saturated":
        x[rng.integers(c)] += rng.choice([10, 17, 30, 60, 100])
    elif kind == "tied":
        x = rng.integers(0, 2, c).astype(float)
    elif kind == "offset":
        x += rng.choice([-1e4, 300, 1e4])
    elif kind == "huge":
        # So that sums over tokens are floats.
        x = np.clip(x, -3, 3) * (float(info.max) / (16 if dtype == "float16" else 1024))
    elif kind == "subnormal":
        x *= float(info.tiny) / 16
    elif kind == "zero":
        x = np.copysign(0.0, x)
    if kind == "impossible":
        x[rng.random(c) < rng.choice([0.3, 0.9])] = -INF
        x[rng.integers(c)] = 1.0
    elif kind == "nothing":
        x[:] = -INF
    elif kind in ("inf", "nan"):
        x[rng.integers(c)] = INF if kind == "inf" else np.nan
    return x


def rows_of(rng, kinds, n, c, dtype):
    x = np.array([row_of(rng, kind, c, dtype) for kind in rng.choice(kinds, n)]).reshape(n, c)
    return x.astype(jnp.dtype(dtype))


def widened(x):
    return np.asarray(np.asarray(x, np.float64), LD)


def weights_of(rng, n, zeros=0.2):
    s = 10.0 ** rng.uniform(-3, 1, n)
    return np.where(rng.random(n) < zeros, 0, s).astype(np.float32)


# The softmax of rows, in 80 bits


class Rows(NamedTuple):
    bad: Any  # [N]: no distribution
    nll: Any  # [N, C] -log p; inf: impossible
    p: Any
    rest: Any  # 1 - p
    slope: Any  # of what the softmax is taken of, by the logits
    slope_error: Any  # relative
    lse: Any  # [N]
    entropy: Any
    condition: Any  # [N] relative error of a probability
    lse_error: Any  # [N] absolute
    # [N] Capped logits are rounded, otherwise in each pass, so that the maximum is known to this:
    # absolute, in all that does not compare the label with it first.
    scaled: Any


def softmax_rows(x, mask, at: Precision, cap=None, temperature=1.0, blocks=1) -> Rows:
    """``x[N, C]`` in longdouble; ``mask``: the classes that exist."""
    c = x.shape[1]
    with np.errstate(all="ignore"):
        y, slope = x, np.ones_like(x)
        if cap is not None:
            y, slope = LD(cap) * np.tanh(x / LD(cap)), 1 / np.cosh(x / LD(cap)) ** 2
        y, slope = y / LD(temperature), slope / LD(temperature)
        # sech^2 = 4 e / (1 + e)^2 is known as its e = exp(-2 |x / cap|).
        steep = 0 if cap is None else np.minimum(2 * np.abs(x) / cap, at.reach)
        # What is masked may hold anything.
        slope, steep = np.where(mask, slope, 0), np.where(mask, steep, 0)
        bad = np.any(mask & (np.isnan(y) | (y == INF)), axis=-1) | ~np.any(mask & (y > -INF), -1)
        possible = mask & (y > -INF) & ~bad[:, None]
        y = np.where(possible, y, 0)
        apart = y[:, None, :] - y[:, :, None]  # [n, c, j]: y_j - y_c
        others = possible[:, None, :] & ~np.eye(c, dtype=bool)
        above = np.maximum(np.max(np.where(others, apart, -INF), axis=-1, initial=-INF), 0)
        s = np.sum(np.exp(apart - above[..., None]), axis=-1, where=others)
        nll = np.where(above > 0, above + np.log(np.exp(-above) + s), np.log1p(s))
        nll = np.where(possible, nll, INF)
        p, rest = np.exp(-nll), -np.expm1(-nll)
    best = np.argmax(np.where(possible, y, -INF), axis=-1)[:, None]
    m = np.take_along_axis(y, best, -1)[:, 0]
    r = np.where(bad, 0, np.take_along_axis(nll, best, -1)[:, 0])
    high, low = np.max(np.where(possible, y, -INF), -1), np.min(np.where(possible, y, INF), -1)
    spread = np.where(bad, 0, high - np.where(bad, 0, low))
    size = np.maximum(np.abs(np.where(bad, 0, high)), np.abs(np.where(bad, 0, low)))
    # tanh rounds what is then subtracted, 6 half roundings a side; a temperature divides after.
    scaled = 3 * size if cap is not None else 0
    terms = c / 4 + blocks
    condition = (np.minimum(spread, at.reach) + scaled + 16 + terms) * 2 * at.eps
    lse_error = (4 * np.abs(m) + 6 * scaled) * at.eps + r * condition + 4 * at.eps * r
    entropy = np.sum(np.where(p > 0, p * np.where(possible, nll, 0), 0), axis=-1)
    return Rows(
        bad, nll, p, rest, slope, (steep + 16) * at.eps, m + r, entropy, condition, lse_error,
        np.broadcast_to(4 * at.eps * scaled, m.shape),
    )  # fmt: skip
