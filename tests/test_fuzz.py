"""Every public function against its definition in 80 bits, on values drawn to hurt.

A case is a configuration (static: shapes, dtypes, options), kinds of rows and a seed. The ordinary
suite draws many values for few configurations, since each is a compilation; ``pytest -m soak``
draws from all of the options, ``JAXLOSS_SOAK_EXAMPLES`` configurations a function and number of
devices.

What is allowed is derived, per entry. Roundings are of the accumulator's dtype, ``eps`` apart:

- a probability's exponent is known to a rounding of its size, the rest of a loss to 16, a sum of n
  positive terms to n / 2: ``condition``;
- each slope is ``p_j (T - t_j) - t_j (1 - p_j)`` for targets ``t`` of sum ``T``, two terms that the
  library forms to that precision each: what is allowed is of their magnitudes, not their
  difference;
- logits that are a product are known to ``(D + 2) / 2 eps |h| |k|``, and move loss and slopes by
  their own derivatives; half of the products are of small integers, and exact.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import jit_quickly
from hypothesis import given
from test_divergence import exact as exact_divergence
from test_divergence import known

import jaxloss

pytestmark = pytest.mark.nan_is_meant
LD = np.longdouble
INF = np.inf

# What is known to be worse than its budget, each with a failing test in test_known_bugs.py: take a
# name out with the fix, and the budget is what it should be.
KNOWN = {
    "zero total",
    "bucket",
    "scaled maximum",
    "entropy",
    "impossible label",
    "uniform",
    "empty blocks",
    "total_weight",
}


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
    scaled: Any  # [N] of scaled logits, absolute


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
    # tanh, a product and a quotient round what is then subtracted: 6 half roundings a side.
    scaled = 3 * size if cap is not None or temperature != 1 else 0
    terms = c / 4 + blocks
    condition = (np.minimum(spread, at.reach) + scaled + 16 + terms) * 2 * at.eps
    lse_error = (4 * np.abs(m) + 6 * scaled) * at.eps + r * condition + 4 * at.eps * r
    entropy = np.sum(np.where(p > 0, p * np.where(possible, nll, 0), 0), axis=-1)
    return Rows(
        bad, nll, p, rest, slope, (steep + 16) * at.eps, m + r, entropy, condition, lse_error,
        np.broadcast_to(4 * at.eps * scaled, m.shape),
    )  # fmt: skip


# What tokens ask for


class Asked(NamedTuple):
    labels: tuple  # arrays, as they are given
    t: Any  # [N, C] what each class's -log p is multiplied by
    t_error: Any  # absolute
    z: Any  # [N] and lse^2
    rest: Any  # [N], of the one class of all those that are not named; None
    named: Any  # [N, C]
    counts: Any
    wrong: Any  # [N] NaN
    vague: Any  # [N] 0 * inf: no one's answer
    share: Any  # [N], of the mean's denominator
    s: Any  # [N]
    arrays: dict  # options that are arrays


def asked_of(config, rng, mask, at: Precision) -> Asked:
    n, c = mask.shape
    kind, eps = config["labels"], LD(config["label_smoothing"])
    ignore = config["ignore_index"]
    arrays, w, s, counts = {}, np.ones(c, LD), np.ones(n, LD), np.ones(n, bool)
    if config["weight"]:
        arrays["weight"] = weights_of(rng, c, 0.1)
        w = widened(arrays["weight"])
    if config["sample_weight"]:
        weight = weights_of(rng, n)
        if config["sample_weight"] == "bool":
            weight = weight > 0
        elif config["sample_weight"] == "none count":
            weight = np.zeros_like(weight)
        arrays["sample_weight"], s = weight, weight.astype(LD)
        counts &= weight != 0
    if config["where"] == "tokens":
        arrays["where"] = rng.random(n) < 0.7
        counts &= arrays["where"]
    wrong, rest, named = np.zeros(n, bool), None, None
    exist = np.maximum(mask.sum(-1, keepdims=True), 1)
    uniform = mask * (eps / exist)
    t, t_error = np.zeros((n, c), LD), np.zeros((n, c), LD)
    rows, label_weight = np.arange(n), np.ones(n, LD)
    if kind == "index":
        some = [rng.choice(np.flatnonzero(row)) if row.any() else 0 for row in mask]
        y = np.where(rng.random(n) < 0.9, some, rng.integers(0, c, n)).astype(np.int64)
        info = np.iinfo(config["label_dtype"])
        odd = rng.choice([-100, -1, c, info.max, info.min], n)
        y = np.where(rng.random(n) < 0.2, odd, y)
        y = np.clip(y, info.min, info.max)
        if ignore is not None and info.min <= ignore <= info.max:
            y = np.where(rng.random(n) < 0.2, ignore, y)
            counts &= y != ignore
        labels = (y.astype(config["label_dtype"]),)
        wrong = (y < 0) | (y >= c)
        at_label = np.where(wrong, 0, y)
        t[rows, at_label] = 1 - eps
        label_weight = np.where(
            wrong, 1, w[at_label]
        )  # the loss is NaN; so is not the other rows' scale
    elif kind == "probabilities":
        q = rng.dirichlet(np.full(c, 0.3), n) * mask
        q[rng.random((n, c)) < 0.2] = 0
        hot = rng.random(n) < 0.3
        q[hot] = np.eye(c)[rng.integers(0, c, n)][hot] * mask[hot]
        q = (q * rng.choice([1, 1, 3], (n, 1))).astype(np.float32)
        if config["dtype"] == "float64":
            q = q.astype(np.float64)
        labels, t = (q,), (1 - eps) * widened(q)
    else:
        k = min(3, c)
        index = np.argsort(rng.random((n, c)), axis=-1)[:, :k]
        # Sixty-fourths: what is left of 1 is exact, which would else be known to a rounding of 1.
        q = rng.integers(0, 64 // k + 1, (n, k)) / 64
        q[rng.random(n) < 0.2, 0] = 1
        index[rng.random((n, k)) < 0.2] = -100 if ignore is None else ignore
        index[rng.random((n, k)) < 0.03] = rng.choice([c, -1])
        if k > 1:
            twice = rng.random(n) < 0.05
            index[twice, 1] = index[twice, 0]
        labels = (index.astype(np.int32), q.astype(np.float32))
        named, taken = np.zeros((n, c), bool), np.zeros(n, bool)
        for i in range(n):
            for j, v in zip(index[i], q[i], strict=True):
                if ignore is not None and j == ignore:
                    continue
                taken[i] = True
                if not 0 <= j < c or named[i, j]:
                    wrong[i] = True
                else:
                    t[i, j], named[i, j] = v, True
        counts &= taken
        others = mask & ~named
        left = np.maximum(1 - t.sum(-1), 0)
        left = np.where(others.any(-1), left, 0)
        if kind == "uniform":
            each = (left / np.maximum(others.sum(-1), 1))[:, None]
            # At a named class it is taken away and added again.
            t_error = named * mask * 2 * (t + each) * at.eps
            t = t + others * each
        elif kind == "bucket":
            rest = left
        t, t_error = (1 - eps) * t, (1 - eps) * t_error
    asks = t + uniform
    z = config["z_loss"] * label_weight
    share = s * label_weight
    return Asked(
        labels, asks * w, t_error * w, z, rest, named, counts, wrong & counts,
        np.any((asks > 0) & (w == 0), axis=-1) if kind == "index" else np.zeros(n, bool),
        share, s, arrays,
    )  # fmt: skip


class Truth(NamedTuple):
    losses: Any  # [N], 0 where a token does not count
    allowed: Any
    slopes: Any  # [N, C] of each token's loss, by its logits
    slopes_allowed: Any
    of_labels: Any  # [N, C], by the probabilities
    skip: Any  # [N]
    bad: Any  # [N]: NaN
    lse: Any = 0.0


def truth_of(x, mask, asked: Asked, config, at: Precision, off=0.0, blocks=1) -> Truth:
    """``off[N, C]``: how well the logits are known."""
    rows = softmax_rows(x, mask, at, config["logit_softcap"], blocks=blocks)
    t, p, rest, z = asked.t, rows.p, rows.rest, asked.z
    cond, eps = rows.condition, at.eps
    with np.errstate(all="ignore"):
        nll = np.where(t == 0, 0, rows.nll)
        losses, of_error = np.sum(t * nll, axis=-1), asked.t_error
        allowed = cond * np.abs(losses) + np.sum(of_error * nll, axis=-1, where=of_error > 0)
        mass = t.sum(-1, keepdims=True)
        down, up = p * (mass - t), t * rest
        slopes, size = down - up, down + up
        extra = p * asked.t_error.sum(-1, keepdims=True) + asked.t_error
        if "scaled maximum" in KNOWN:
            of_label = config["labels"] == "index" and not config["label_smoothing"]
            once = rows.scaled + 4 * at.eps if of_label else 1
            allowed = allowed + t.sum(-1) * rows.scaled * once
        if asked.rest is not None:
            # One more class, whose logit is the log-sum-exp of those that are not named.
            others = mask & ~asked.named & (rows.nll < INF)
            p_others = np.sum(p, axis=-1, where=others)
            none = p_others == 0
            p_named = np.sum(p, axis=-1, where=asked.named & mask)
            nll_rest = np.where(p_others > 0.5, -np.log1p(-np.minimum(p_named, 0.6)),
                                -np.log(p_others))  # fmt: skip
            left = asked.rest
            losses = losses + np.where(left == 0, 0, left * nll_rest)
            allowed = cond * np.abs(losses)
            if "bucket" in KNOWN:  # that logit has a rounding of its own size
                off = off + 4 * eps * np.abs(rows.lse)[:, None]
            among = np.where(others & ~none[:, None], p / np.where(none, 1, p_others)[:, None], 0)
            down = down + p * left[:, None] * asked.named
            down = np.where(others, among * (p_others * t.sum(-1))[:, None], down)
            up = np.where(others, among * (left * p_named)[:, None], up)
            slopes, size = down - up, down + up
        lse, of_lse = rows.lse[:, None], rows.lse_error[:, None]
        losses = losses + z * rows.lse**2
        allowed = allowed + z * (
            rows.lse_error * (2 * np.abs(rows.lse) + rows.lse_error) + 4 * eps * rows.lse**2
        )
        of_z = 2 * z[:, None] * p
        if asked.rest is not None and "bucket" in KNOWN:  # three gradients, each narrowed
            extra = extra + 4 * at.half * (size + of_z * np.abs(lse))
        slopes = slopes + of_z * lse
        slopes_allowed = 4 * cond[:, None] * (size + of_z * np.abs(lse)) + extra + of_z * of_lse
        # A product's logits.
        allowed = allowed + 1.5 * np.sum(np.abs(slopes) * rows.slope * off, axis=-1)
        if asked.rest is not None:
            allowed = allowed + 1.5 * np.max(off + 0 * p, axis=-1) * np.sum(size, axis=-1)
        most = np.max(off * rows.slope, axis=-1, keepdims=True, initial=0)
        slopes_allowed = slopes_allowed + 2 * most * (size + of_z * (np.abs(lse) + 1))
        steep = 0 if config["logit_softcap"] is None else 2 * off / config["logit_softcap"]
        slopes_allowed = rows.slope * (slopes_allowed + np.abs(slopes) * (rows.slope_error + steep))
        slopes = np.where(mask, slopes * rows.slope, 0)
        slopes_allowed = np.where(mask, slopes_allowed, 0)
        of_labels = np.where(np.isinf(rows.nll), 0, rows.nll)
    bad = (rows.bad | asked.wrong) & asked.counts
    counts = asked.counts[:, None]
    skip = asked.vague & asked.counts & np.any(np.isinf(rows.nll), -1)
    losses = np.where(bad, np.nan, np.where(asked.counts, losses, 0))
    slopes = np.where(bad[:, None], np.nan, np.where(counts, slopes, 0))
    return Truth(
        losses, np.where(asked.counts, allowed, 0), slopes, np.where(counts, slopes_allowed, 0),
        np.where(counts, of_labels, 0), skip, bad, np.where(rows.bad, 0, rows.lse),
    )  # fmt: skip


def reduced(truth: Truth, asked: Asked, reduction, ct, at: Precision):
    """(loss, allowed, each token's factor, whether the mean is over nothing)."""
    n = len(ct)
    losses, allowed, s = asked.s * truth.losses, asked.s * truth.allowed, asked.s
    losses = np.where(asked.counts, losses, 0)
    more = 2 * at.eps * np.abs(losses)
    if reduction == "none":
        return losses, allowed + more, ct.astype(LD) * s, False
    few = (n / 2 + 4) * at.eps
    total = np.sum(losses)
    allowed = np.sum(allowed) + few * np.sum(np.abs(losses))
    if reduction == "sum":
        return total, allowed, s, False
    share = np.sum(np.where(asked.counts, asked.share, 0))
    if share == 0:
        return LD(np.nan), LD(0), 0 * s, True
    return total / share, allowed / share + few * abs(total / share), s / share, False


# Programs: one a configuration

FLAT = ("label_smoothing", "z_loss", "logit_softcap", "ignore_index", "reduction")


def jitted(config):
    return jit_quickly if config["way"] == "quick" else jax.jit


def options_of(config):
    return {name: config[name] for name in FLAT}


def labels_of(config, arrays):
    if config["labels"] in ("index", "probabilities"):
        return arrays[0]
    return jaxloss.TopKLabels(*arrays, config["labels"])


def placed(config, x, per_class):
    """A row-major ``x[N, C]`` in the layout's shape."""
    name = config["layout"]
    if name == "last":
        return x
    if name == "first":
        return x.T if per_class else x
    if name == "one":
        return x[0]
    if name == "middle":
        x = x.reshape(2, -1, *x.shape[1:])
        return x.transpose(0, 2, 1) if per_class else x
    x = x.reshape(x.shape[0], 2, -1) if per_class else x  # two class axes, the second one first
    return x.transpose(2, 0, 1) if per_class else x


AXES = {"last": -1, "first": 0, "one": 0, "middle": 1, "two": (2, 0)}


def unplaced(config, x, c):
    name = config["layout"]
    if name == "first":
        return x.T
    if name == "one":
        return x[None]
    if name == "middle":
        return x.transpose(0, 2, 1).reshape(-1, c)
    return x.transpose(1, 2, 0).reshape(-1, c) if name == "two" else x


def check_dtype(config):
    return jax.enable_x64(config["dtype"] == "float64")


@lru_cache(maxsize=64)
def program_of_logits(frozen):
    config = dict(frozen)

    def step(x, labels, arrays, ct):
        def total(x, *probabilities):
            y = labels_of(config, probabilities or labels)
            loss = jaxloss.cross_entropy(
                x, y, axis=AXES[config["layout"]], **options_of(config), **arrays
            )
            return jnp.sum(loss * ct) if config["reduction"] == "none" else loss, loss

        args = labels if config["labels"] == "probabilities" else ()
        by = tuple(range(1 + len(args)))
        (_, loss), grads = jax.value_and_grad(total, by, has_aux=True)(x, *args)
        return loss, grads

    return jitted(config)(step)


def random_ct(rng, n, config):
    return rng.uniform(0.5, 2, n).astype("float64" if config["dtype"] == "float64" else "float32")


def exists_of(config, rng, n, c):
    mask = np.ones((n, c), bool)
    if config["where"] == "classes":
        mask = rng.random((n, c)) < 0.7
        mask[:, rng.integers(c)] = True
    return mask


def rounded(allowed, truth, at: Precision):
    """``allowed``, and to the nearest number of the inputs' dtype."""
    return allowed + at.half * (np.abs(truth) + allowed) + (at.least if at.half else 0)


def fuzz_cross_entropy(config, rng, kinds):
    n, c = (1 if config["layout"] == "one" else 6), config["c"]
    at = precision(config["dtype"])
    if "uniform" in KNOWN and config["labels"] == "uniform":
        kinds = [k if k != "impossible" else "peaked" for k in kinds]
    if config["z_loss"]:
        kinds = [k if k != "huge" else "peaked" for k in kinds]  # its square is no float
    if config["labels"] == "bucket":
        kinds = [k if k != "huge" else "peaked" for k in kinds]  # the truth's own sum is 0 there
    if config["logit_softcap"]:
        kinds = [k if k != "inf" else "impossible" for k in kinds]  # caps at the cap
    x, mask = rows_of(rng, kinds, n, c, config["dtype"]), exists_of(config, rng, n, c)
    asked = asked_of(config, rng, mask, at)
    arrays = dict(asked.arrays)
    if config["where"] == "classes":
        arrays["where"] = mask
    truth = truth_of(widened(x), mask, asked, config, at)
    ct = random_ct(rng, n, config)
    given_arrays = {
        k: placed(config, v, per_class=v.ndim > 1) if k != "weight" else v
        for k, v in arrays.items()
    }
    labels = tuple(
        placed(config, y, per_class=config["labels"] == "probabilities") for y in asked.labels
    )
    if config["layout"] == "middle" and config["labels"] not in ("index", "probabilities"):
        labels = tuple(y.reshape(2, -1, y.shape[-1]) for y in asked.labels)
    with check_dtype(config):
        loss, grads = program_of_logits(frozen_of(config))(
            placed(config, x, True), labels, given_arrays, placed(config, ct, False)
        )
    check_softmax_loss(config, asked, truth, ct, at, loss, grads, c)


def check_softmax_loss(config, asked, truth, ct, at, loss, grads, c, nan_rows=True):
    expected, allowed, factor, nothing = reduced(truth, asked, config["reduction"], ct, at)
    scalar = config["reduction"] != "none"
    if scalar and truth.skip.any():
        return
    if scalar:
        assert_allowed(loss, expected, allowed, at, "loss")
    else:
        keep = ~truth.skip
        got = np.asarray(loss).reshape(-1)
        assert_allowed(got[keep], expected[keep], allowed[keep], at, "losses")
    g = unplaced(config, np.asarray(np.asarray(grads[0], np.float64)), c)
    factor = factor[:, None]
    want = np.where(asked.counts[:, None], truth.slopes, 0)
    # NaN somewhere in a bad row, and in no other.
    bad = truth.bad & (not nothing)
    has_nan = np.isnan(g).any(-1)
    keep = ~truth.skip
    if nan_rows:
        np.testing.assert_array_equal(has_nan[keep], bad[keep], "rows of NaN")
    keep &= ~truth.bad
    want, room = factor * want, np.abs(factor) * truth.slopes_allowed
    most = 1 + np.max(asked.z * np.abs(truth.lse) if config["z_loss"] else 0)
    room = room + 4 * at.eps * np.abs(want) + 2 * at.tiny * most * np.abs(factor)
    room = rounded(room, want, at)
    want, room = (np.where(nothing, 0, v)[keep] for v in (want, room))
    assert_allowed(g[keep], want, room, at, "d_logits")
    if len(grads) > 1:
        w = widened(asked.arrays["weight"]) if "weight" in asked.arrays else np.ones(c, LD)
        of_q = (1 - LD(config["label_smoothing"])) * w * truth.of_labels
        dq = unplaced(config, np.asarray(grads[1], LD), c)
        want = np.where(nothing, 0, factor * of_q)
        # Each -log p is to its own few roundings: the rows' condition, that of the loss.
        room = (at.reach + 24 + c) * 8 * at.eps * np.abs(want)
        seen = keep[:, None] & (truth.of_labels != 0)
        assert_allowed(dq[seen], want[seen], room[seen], at, "d_labels")


def frozen_of(config):
    return tuple(sorted(config.items()))


SOFTMAX = {
    "c": [1, 2, 5, 12, 33, 260],
    "dtype": ["float32", "bfloat16", "float16", "float64"],
    "labels": ["index", "probabilities", "drop", "uniform", "bucket"],
    "layout": ["last", "first", "middle", "two", "one"],
    "reduction": ["none", "sum", "mean"],
    "weight": [False, True],
    "sample_weight": [None, "bool", "float", "none count"],
    "where": [None, "tokens", "classes"],
    "label_smoothing": [0.0, 0.1, 1.0],
    "z_loss": [0.0, 0.0, 1e-3],
    "logit_softcap": [None, None, 5.0, 50.0],
    "ignore_index": [-100, None, 0],
    "label_dtype": ["int32", "int8", "uint8"],
    "way": ["jit", "quick"],
}
PLAIN = {
    "c": 5, "dtype": "float32", "labels": "index", "layout": "last", "reduction": "none",
    "weight": False, "sample_weight": None, "where": None, "label_smoothing": 0.0, "z_loss": 0.0,
    "logit_softcap": None, "ignore_index": -100, "label_dtype": "int32", "way": "quick",
}  # fmt: skip


def sanitized(config):
    """No combination that is refused."""
    config = dict(config)
    if config.get("labels") == "bucket":
        config |= {"weight": False, "label_smoothing": 0.0}
        if "implementation" in config:
            config["implementation"] = "token_chunks"
    by_blocks = config.get("implementation") == "vocab_blocks" and config["labels"] != "index"
    if "empty blocks" in KNOWN and by_blocks and config["where"] == "classes":
        config["where"] = None
    if config.get("layout") == "two" and config["c"] % 2:
        config["layout"] = "last"
    if config.get("layout") in ("first", "middle", "two") and config.get("where") == "tokens":
        config["where"] = None  # a mask that fits both ways is refused
    if config.get("labels") in ("drop", "uniform", "bucket") and config.get("ignore_index") == 0:
        config["ignore_index"] = -100
    return config


# hidden @ kernel


@lru_cache(maxsize=64)
def program_of_product(frozen):
    config = dict(frozen)
    name = config["of"]

    def step(operands, labels, arrays, ct):
        def total(*args):
            hidden, kernel, *rest = args
            bias = rest.pop(0) if config["bias"] else None
            y = labels_of(config, rest or labels)
            both = {"bias": bias, "vocab_axis": config["vocab_axis"]}
            both["chunk_size"] = config["chunk_size"]
            if name == "linear_loss":
                some = [arrays[k] for k in ("where",) if k in arrays]
                weight = {k: v for k, v in arrays.items() if k == "weight"}

                def rows(x, y, *where):
                    options = {**options_of(config), "reduction": "none"}
                    given = {"where": where[0]} if where else {}
                    x = x[:, : config["c"]]
                    return jaxloss.cross_entropy(x, y, **options, **given, **weight)

                loss = jaxloss.linear_loss(
                    rows, hidden, kernel, y, *some, **both, reduction=config["reduction"],
                    sample_weight=arrays.get("sample_weight"),
                )  # fmt: skip
            else:
                loss = jaxloss.linear_cross_entropy(
                    hidden, kernel, y, num_classes=config["c"], **both, **options_of(config),
                    implementation=config["implementation"], **arrays,
                )  # fmt: skip
            return jnp.sum(loss * ct) if config["reduction"] == "none" else loss, loss

        args = [v for v in operands if v is not None]
        args += labels if config["labels"] == "probabilities" and name != "linear_loss" else []
        by = tuple(range(len(args)))
        (_, loss), grads = jax.value_and_grad(total, by, has_aux=True)(*args)
        return loss, grads, total(*args)[1]

    return jitted(config)(step)


def product_of(config, rng, kinds, n, columns, d):
    """(hidden, kernel, bias or None: [N, D], [D, V], [V] in the dtype, logits, how well known)."""
    dtype, at = jnp.dtype(config["dtype"]), precision(config["dtype"])
    if config["exact"]:
        hidden = rng.integers(-3, 4, (n, d)).astype(float)
        kernel = rng.integers(-24, 25, (d, columns)) / 8
        kernel *= rng.choice([0, 1, 16])
        bias = rng.integers(-24, 25, columns) / 8
    else:
        hidden = rows_of(rng, [k for k in kinds if k in HIDDEN] or HIDDEN[:1], n, d, "float32")
        hidden = np.clip(hidden.astype(float), -64, 64)
        kernel, bias = rng.normal(size=(d, columns)), rng.normal(size=columns)
    hidden, kernel, bias = (v.astype(dtype) for v in (hidden, kernel, bias))
    h, k, b = map(widened, (hidden, kernel, bias))
    b = b if config["bias"] else 0 * b
    off = (d + 2) / 2 * at.eps * (np.abs(h) @ np.abs(k) + np.abs(b))
    if config["exact"]:
        off = 0 * off
    return hidden, kernel, bias if config["bias"] else None, h @ k + b, off


HIDDEN = ["plain", "flat", "peaked", "saturated", "tied", "subnormal", "zero"]


def fuzz_product(of, config, rng, kinds):
    config = {**config, "of": of}
    n, c, d = 6, config["c"], config["d"]
    at, columns = precision(config["dtype"]), c + config["padding"]
    hidden, kernel, bias, x, off = product_of(config, rng, kinds, n, columns, d)
    if config["poison"]:
        hidden[rng.integers(n)] = np.nan if config["logit_softcap"] else rng.choice([INF, np.nan])
    x, off, mask = x[:, :c], off[:, :c], exists_of(config, rng, n, c)
    with np.errstate(invalid="ignore"):
        x = np.where(np.isfinite(widened(hidden)).all(-1)[:, None], x, np.nan)
    off = np.where(np.isnan(x), 0, off)
    asked = asked_of(config, rng, mask, at)
    arrays = dict(asked.arrays)
    if config["where"] == "classes":
        arrays["where"] = mask
    blocks = -(-c // (config["chunk_size"] or c))
    truth = truth_of(x, mask, asked, config, at, off, 2 * blocks)
    ct = random_ct(rng, n, config)
    operands = (hidden, kernel.T.copy() if config["vocab_axis"] == 0 else kernel, bias)
    labels = list(asked.labels)
    with check_dtype(config):
        loss, grads, alone = program_of_product(frozen_of(config))(operands, labels, arrays, ct)
    expected, allowed, factor, nothing = reduced(truth, asked, config["reduction"], ct, at)
    if truth.skip.any():
        return
    for got in (loss, alone):
        assert_allowed(got, expected, allowed, at, "loss")
    if "zero total" in KNOWN and nothing and asked.counts.any():
        return
    # Each logit's slope is rounded to the operands' dtype, and then a term of a sum.
    g = np.where(nothing, 0, factor[:, None] * np.nan_to_num(truth.slopes))
    room = np.abs(factor)[:, None] * truth.slopes_allowed + 4 * at.eps * np.abs(g)
    most = 1 + np.max(asked.z * np.abs(truth.lse) if config["z_loss"] else 0)
    room = rounded(room + 2 * at.tiny * most * (1 + np.abs(factor[:, None])), g, at)
    room = np.where(asked.counts[:, None] & ~truth.bad[:, None] & (not nothing), room, 0)
    if config["dtype"] == "float16" and np.max(np.abs(g)) * 50 > 65504:
        return  # gradients that float16 does not hold
    padded = np.zeros((n, columns - c))
    g, room = (np.concatenate([v, padded], axis=1) for v in (g, room))
    h, k = widened(hidden), widened(kernel)
    bad, some_bad = truth.bad & (not nothing), truth.bad.any() and not nothing
    dh = widened(grads[0])
    want = g @ k.T
    allowed = room @ np.abs(k).T + columns * at.eps * np.abs(g) @ np.abs(k).T
    allowed = rounded(allowed, want, at)
    assert_allowed(dh[~bad], want[~bad], allowed[~bad], at, "d_hidden")
    assert np.isnan(dh[bad]).any(-1).all(), "a bad row's d_hidden"
    if some_bad:  # a sum over tokens that has NaN in it is NaN
        return
    h = np.where(asked.counts[:, None], np.nan_to_num(h), 0)
    want, size = h.T @ g, np.abs(h).T @ np.abs(g)
    allowed = rounded(np.abs(h).T @ room + 2 * n * at.eps * size, want, at)
    dk = widened(grads[1])
    dk = dk.T if config["vocab_axis"] == 0 else dk
    assert_allowed(dk, want, allowed, at, "d_kernel")
    if config["bias"]:
        want = g.sum(0)
        allowed = room.sum(0) + 2 * n * at.eps * np.abs(g).sum(0)
        assert_allowed(widened(grads[2]), want, rounded(allowed, want, at), at, "d_bias")


def fuzz_linear_cross_entropy(config, rng, kinds):
    fuzz_product("linear_cross_entropy", config, rng, kinds)


def fuzz_linear_loss(config, rng, kinds):
    # Which tokens count is linear_loss's sample_weight; the loss of a row is what is left.
    config = {**config, "labels": "index", "ignore_index": None, "weight": False}
    config["where"] = "classes" if config["where"] == "classes" else None
    fuzz_product("linear_loss", config, rng, kinds)


LINEAR = {
    **{k: v for k, v in SOFTMAX.items() if k != "layout"},
    "c": [1, 2, 5, 13, 33],
    "d": [1, 4, 9],
    "padding": [0, 0, 3],
    "bias": [False, True],
    "vocab_axis": [0, 1],
    "exact": [False, True],
    "poison": [False, False, False, True],
    "chunk_size": [1, 2, 4, 5, None],
    "implementation": ["token_chunks", "vocab_blocks"],
}
PLAIN_LINEAR = {
    **{k: v for k, v in PLAIN.items() if k != "layout"},
    "d": 4, "padding": 3, "bias": True, "vocab_axis": 1, "exact": False, "poison": False,
    "chunk_size": 4, "implementation": "token_chunks",
}  # fmt: skip


# Rows without labels, and with statistics


def fuzz_log_softmax(config, rng, kinds):
    n, c = (1 if config["layout"] == "one" else 6), config["c"]
    at = precision(config["dtype"])
    x, mask = rows_of(rng, kinds, n, c, config["dtype"]), exists_of(config, rng, n, c)
    ct = rng.normal(size=(n, c)) * rng.choice([0, 1e-3, 1, 30], (n, 1))
    ct = ct.astype(x.dtype)
    given_mask = placed(config, mask, True) if config["where"] == "classes" else None
    with check_dtype(config):
        out, dx = program_of_log_softmax(frozen_of(config))(
            placed(config, x, True), given_mask, placed(config, ct, True)
        )
    rows = softmax_rows(widened(x), mask, at)
    bad, cond = rows.bad[:, None], rows.condition[:, None]
    with np.errstate(all="ignore"):
        expected = np.where(bad, np.nan, -rows.nll)
        room = np.where(np.isfinite(rows.nll), rounded(cond * rows.nll, rows.nll, at), 0)
    # Narrow numbers end before wide ones.
    expected = np.where(np.abs(expected) > LD(float(jnp.finfo(x.dtype).max)), -INF, expected)
    got = unplaced(config, np.asarray(np.asarray(out, np.float64)), c)
    assert_allowed(got, expected, room, at, "log_softmax")
    g = widened(ct)
    total = np.sum(g, axis=-1, keepdims=True)
    size = np.sum(np.abs(g), axis=-1, keepdims=True)
    asked = np.any(g != 0, axis=-1)
    want = np.where(mask, g * rows.rest - rows.p * (total - g), 0)
    room = 4 * cond * np.where(mask, np.abs(g) * rows.rest + rows.p * (size - np.abs(g)), 0)
    dx = unplaced(config, np.asarray(np.asarray(dx, np.float64)), c)
    np.testing.assert_array_equal(np.isnan(dx).any(-1), rows.bad & asked)
    keep = ~rows.bad
    room = rounded(room + at.tiny * size, want, at)
    assert_allowed(dx[keep], want[keep], room[keep], at, "d_logits")


@lru_cache(maxsize=64)
def program_of_log_softmax(frozen):
    config = dict(frozen)

    def step(x, mask, ct):
        out, pullback = jax.vjp(
            lambda x: jaxloss.log_softmax(x, AXES[config["layout"]], where=mask), x
        )
        return out, pullback(ct)[0]

    return jitted(config)(step)


@lru_cache(maxsize=64)
def program_of_nll_loss(frozen):
    config = dict(frozen)

    def step(x, labels, arrays, ct):
        def total(x, *probabilities):
            loss = jaxloss.nll_loss(
                x, *(probabilities or labels), axis=AXES[config["layout"]],
                ignore_index=config["ignore_index"], reduction=config["reduction"], **arrays,
            )  # fmt: skip
            return jnp.sum(loss * ct) if config["reduction"] == "none" else loss, loss

        args = labels if config["labels"] == "probabilities" else ()
        (_, loss), grads = jax.value_and_grad(total, tuple(range(1 + len(args))), has_aux=True)(
            x, *args
        )
        return loss, grads

    return jitted(config)(step)


def fuzz_nll_loss(config, rng, kinds):
    """Of log-probabilities that may be any numbers but, where they are asked for, infinite."""
    n, c = (1 if config["layout"] == "one" else 6), config["c"]
    at = precision(config["dtype"])
    kinds = [k if k in FINITE and k != "huge" else "peaked" for k in kinds]
    config = sanitized({**config, "where": config["where"] and "tokens", "label_smoothing": 0.0})
    config |= {"z_loss": 0.0, "logit_softcap": None}
    x, mask = rows_of(rng, kinds, n, c, config["dtype"]), np.ones((n, c), bool)
    asked = asked_of(config, rng, mask, at)
    ct = random_ct(rng, n, config)
    terms = asked.t * -widened(x)
    bad, zero = asked.wrong, np.zeros((n, c))
    losses = np.where(bad, np.nan, np.where(asked.counts, terms.sum(-1), 0))
    allowed = np.where(asked.counts, (c + 4) * at.eps * np.abs(terms).sum(-1), 0)
    slopes = np.where(asked.counts[:, None], -asked.t, 0)
    few = 4 * at.eps * np.abs(slopes)
    of_labels = np.where(asked.counts[:, None], -widened(x), 0)
    truth = Truth(losses, allowed, slopes, few, of_labels, zero.any(-1), bad)
    arrays = {k: placed(config, v, False) if k != "weight" else v for k, v in asked.arrays.items()}
    labels = tuple(placed(config, y, config["labels"] != "index") for y in asked.labels)
    with check_dtype(config):
        loss, grads = program_of_nll_loss(frozen_of(config))(
            placed(config, x, True), labels, arrays, placed(config, ct, False)
        )
    # The entry that is asked for is NaN, and no other depends on it: d_log_probs stays finite.
    g = np.asarray(np.asarray(grads[0], np.float64))
    grads = (np.where(np.isnan(g), 0, g), *grads[1:])
    check_softmax_loss(config, asked, truth, ct, at, loss, grads, c, nan_rows=False)


@lru_cache(maxsize=64)
def program_of_stats(frozen):
    config = dict(frozen)
    options = {k: config[k] for k in ("ignore_index", "temperature", "logit_softcap")}

    def step(operands, labels, arrays, cts):
        def stats(*args):
            if config["linear"]:
                hidden, kernel = args
                return jaxloss.linear_token_stats(
                    hidden, kernel, labels_of(config, labels), num_classes=config["c"],
                    chunk_size=config["chunk_size"], implementation=config["implementation"],
                    **options, **arrays,
                )  # fmt: skip
            return jaxloss.token_stats(
                *args, labels_of(config, labels), axis=AXES[config["layout"]], **options, **arrays
            )

        def total(args, by):
            out = stats(*args)
            return sum(jnp.sum(v * c) for v, c in zip(out[:3], by, strict=True)), out

        one = (True, False, False), (False, True, False), (False, False, True)
        grads = []
        for some in one:
            by = [c if s else jnp.zeros_like(c) for s, c in zip(some, cts, strict=True)]
            (_, out), g = jax.value_and_grad(total, has_aux=True)(operands, by)
            grads.append(g)
        return out, grads

    return jitted(config)(step)


def expected_rank(x, y):
    order = np.lexsort((np.arange(x.size), -x))
    return int(np.flatnonzero(order == y)[0])


def stats_truth(x, mask, asked, config, at, blocks=1):
    rows = softmax_rows(x, mask, at, config["logit_softcap"], config["temperature"], blocks)
    with np.errstate(all="ignore"):
        nll = np.where(asked.t == 0, 0, rows.nll)
        log_prob = -np.sum(asked.t * nll, axis=-1)
        mass = asked.t.sum(-1, keepdims=True)
        down, up = rows.p * (mass - asked.t), asked.t * rows.rest
        of_p = np.where(rows.p > 0, rows.p * np.where(rows.p > 0, rows.nll, 0), 0)
        entropy = rows.entropy[:, None]
    lse_slope, cond = rows.p, rows.condition
    slopes = [up - down, lse_slope, of_p - rows.p * entropy]
    sizes = [up + down, lse_slope, of_p + rows.p * entropy]
    cond_error = [asked.t_error + rows.p * asked.t_error.sum(-1, keepdims=True), 0, 0]
    values = [log_prob, rows.lse, rows.entropy]
    nll = np.where(asked.t_error > 0, nll, 0)
    rooms = [
        cond * np.abs(log_prob) + np.sum(asked.t_error * nll, axis=-1),
        rows.lse_error,
        cond * rows.entropy + at.tiny * at.reach,
    ]
    if "entropy" in KNOWN and config["labels"] == "index":
        rooms[2] = rooms[2] + 2 * at.eps  # where the label is not at the maximum
    if "scaled maximum" in KNOWN:
        once = rows.scaled + 4 * at.eps if config["labels"] == "index" else 1
        rooms[0] = rooms[0] + asked.t.sum(-1) * rows.scaled * once
        rooms[2] = rooms[2] + rows.scaled
        cond_error[2] = rows.p * rows.scaled[:, None]
    slopes = [np.where(mask, s * rows.slope, 0) for s in slopes]
    slope_rooms = [
        np.where(mask, rows.slope * ((4 * cond[:, None] + rows.slope_error) * s + e), 0)
        for s, e in zip(sizes, cond_error, strict=True)
    ]
    return rows, values, rooms, slopes, slope_rooms


def fuzz_stats(linear, config, rng, kinds):
    config = {**config, "linear": linear, "weight": False, "sample_weight": None}
    config |= {"label_smoothing": 0.0, "z_loss": 0.0, "reduction": "none"}
    n, c = (1 if config.get("layout") == "one" else 6), config["c"]
    at = precision(config["dtype"])
    if config["logit_softcap"]:  # caps at the cap, where all classes may tie
        kinds = [k if k not in ("inf", "nothing") else "impossible" for k in kinds]
    if "uniform" in KNOWN and config["labels"] == "uniform":
        kinds = [k if k != "impossible" else "peaked" for k in kinds]
    if "scaled maximum" in KNOWN and config["temperature"] != 1:
        kinds = [k if k != "huge" else "peaked" for k in kinds]  # a rounding of 1e29
    if config["dtype"] != "float16":  # processors flush them, and then they tie
        kinds = [k if k != "subnormal" else "flat" for k in kinds]
    blocks = 1
    if linear:
        config |= {"exact": True, "bias": False, "padding": 1, "layout": "last"}
        hidden, kernel, _, x, _ = product_of(config, rng, kinds, n, c + 1, config["d"])
        x, blocks = x[:, :c], 2 * -(-c // (config["chunk_size"] or c))
        operands = (hidden, kernel)
    else:
        xs = rows_of(rng, kinds, n, c, config["dtype"])
        x, operands = widened(xs), (placed(config, xs, True),)
    mask = exists_of(config, rng, n, c)
    asked = asked_of(config, rng, mask, at)
    arrays = dict(asked.arrays)
    if config["where"] == "classes":
        arrays["where"] = mask
    arrays = {k: placed(config, v, v.ndim > 1) for k, v in arrays.items()}
    cts = [random_ct(rng, n, config) for _ in range(3)]
    labels = tuple(placed(config, y, config["labels"] == "probabilities") for y in asked.labels)
    if config["layout"] == "middle" and config["labels"] not in ("index", "probabilities"):
        labels = tuple(y.reshape(2, -1, y.shape[-1]) for y in asked.labels)
    with check_dtype(config):
        out, grads = program_of_stats(frozen_of(config))(
            operands, labels, arrays, [placed(config, c, False) for c in cts]
        )
    rows, values, rooms, slopes, slope_rooms = stats_truth(x, mask, asked, config, at, blocks)
    counts, bad = asked.counts, rows.bad & asked.counts
    got = {name: np.asarray(v).reshape(-1) for name, v in out._asdict().items()}
    empty = np.all(np.where(mask, x, -INF) == -INF, axis=-1)
    for i, name in enumerate(("log_prob", "logsumexp", "entropy")):
        nan = bad | (asked.wrong if i == 0 or config["labels"] == "index" else False)
        expected = np.where(nan, np.nan, np.where(counts, values[i], 0))
        if i == 1:  # of nothing it is -inf
            expected = np.where(nan & np.isneginf(got[name]) & empty, -INF, expected)
        if i and config["labels"] not in ("index", "probabilities"):
            got[name] = np.where(asked.wrong, expected, got[name])
        assert_allowed(got[name], expected, np.where(counts, rooms[i], 0), at, name)
    seen = np.where(mask, x, -INF)
    best = np.argmax(np.where(np.isnan(seen), 0, seen), axis=-1)
    hidden_nan = np.any(mask & (np.isnan(x) | (x == INF)), axis=-1)
    predicted = counts & ~hidden_nan
    np.testing.assert_array_equal(got["prediction"], np.where(predicted, best, -1), "prediction")
    top = np.take_along_axis(rows.p, best[:, None], -1)[:, 0]
    sure = counts & ~bad & ~asked.wrong
    room = rows.condition * top + 4 * at.eps * top
    assert_allowed(got["confidence"][sure], top[sure], room[sure], at, "confidence")
    np.testing.assert_array_equal(got["confidence"][~counts], 0)
    if config["labels"] == "index":
        rank = [
            expected_rank(row, y) if ok else -1
            for row, y, ok in zip(
                seen, np.ravel(asked.labels[0]), predicted & ~asked.wrong, strict=True
            )
        ]
        np.testing.assert_array_equal(got["rank"], rank, "rank")
    for i, g in enumerate(grads):
        factor = np.where(counts, cts[i].astype(LD), 0)[:, None]
        keep = ~(bad | asked.wrong)
        if "impossible label" in KNOWN:
            keep &= ~np.isinf(values[0])
        want, room = factor * slopes[i], factor * slope_rooms[i] + 4 * at.eps * np.abs(slopes[i])
        want, room = (np.where(counts[:, None], v, 0) for v in (want, room))
        # A probability that is 0 for lack of floats may have weighed as much as its logarithm.
        floor = at.tiny * (at.reach if i == 2 else 1) / config["temperature"]
        room = rounded(room + floor * (1 + np.abs(factor)), want, at)
        if not linear:
            g = unplaced(config, np.asarray(np.asarray(g[0], np.float64)), c)
            assert_allowed(g[keep], want[keep], room[keep], at, f"slope {i}")
            continue
        want, room = (np.pad(np.nan_to_num(v), ((0, 0), (0, 1))) for v in (want, room))
        k = np.abs(widened(operands[1])).T
        room = rounded(room @ k + (c + 1) * at.eps * np.abs(want) @ k, 0, at)
        want = want @ widened(operands[1]).T
        room = rounded(room, want, at)
        assert_allowed(widened(g[0])[keep], want[keep], room[keep], at, f"d_hidden {i}")


def fuzz_token_stats(config, rng, kinds):
    fuzz_stats(False, config, rng, kinds)


def fuzz_linear_token_stats(config, rng, kinds):
    fuzz_stats(True, config, rng, kinds)


# Focal losses and binary decisions


@lru_cache(maxsize=64)
def program_of_focal(frozen):
    config = dict(frozen)

    def step(x, labels, arrays, ct):
        def total(x):
            loss = jaxloss.focal_loss(
                x, labels[0], axis=AXES[config["layout"]], gamma=config["gamma"],
                ignore_index=config["ignore_index"], reduction=config["reduction"], **arrays,
            )  # fmt: skip
            return jnp.sum(loss * ct) if config["reduction"] == "none" else loss, loss

        (_, loss), g = jax.value_and_grad(total, has_aux=True)(x)
        return loss, (g,)

    return jitted(config)(step)


def fuzz_focal_loss(config, rng, kinds):
    config = {**config, "labels": "index", "label_smoothing": 0.0, "z_loss": 0.0}
    config |= {"logit_softcap": None}
    n, c = (1 if config["layout"] == "one" else 6), config["c"]
    at, gamma = precision(config["dtype"]), LD(config["gamma"])
    x, mask = rows_of(rng, kinds, n, c, config["dtype"]), exists_of(config, rng, n, c)
    asked = asked_of(config, rng, mask, at)
    arrays = {k: placed(config, v, False) if k != "weight" else v for k, v in asked.arrays.items()}
    if config["where"] == "classes":
        arrays["where"] = placed(config, mask, True)
    y = np.where(asked.wrong | ~asked.counts, 0, asked.labels[0].astype(np.int64))
    weight = widened(asked.arrays["weight"]) if config["weight"] else np.ones(c, LD)
    plain = asked._replace(t=np.eye(c, dtype=LD)[y], vague=asked.vague)
    one = truth_of(widened(x), mask, plain, config, at)
    w, nll = weight[y], one.losses
    with np.errstate(all="ignore"):
        u, p = -np.expm1(-nll), np.exp(-nll)
        power = np.where(u > 0, u**gamma, LD(config["gamma"] == 0))
        ratio = np.where(u > 0, np.where(np.isinf(nll), 0, nll) / u, 1)
        scale = w * (power + gamma * power * p * ratio)
        cond = softmax_rows(widened(x), mask, at).condition
        losses = w * power * nll
        allowed = ((1 + gamma) * cond + 8 * at.eps) * np.abs(losses)
        slopes = scale[:, None] * one.slopes
        more = 2 * (gamma + 1) * cond[:, None] + 8 * at.eps
        room = np.abs(scale[:, None]) * one.slopes_allowed + more * np.abs(slopes)
    counts = asked.counts
    losses, allowed = (np.where(counts, v, 0) for v in (losses, allowed))
    slopes, room = (np.where(counts[:, None], v, 0) for v in (slopes, room))
    truth = one._replace(losses=losses, allowed=allowed, slopes=slopes, slopes_allowed=room)
    ct = random_ct(rng, n, config)
    with check_dtype(config):
        loss, grads = program_of_focal(frozen_of(config))(
            placed(config, x, True), (placed(config, asked.labels[0], False),), arrays,
            placed(config, ct, False),
        )  # fmt: skip
    check_softmax_loss(config, asked, truth, ct, at, loss, grads, c)


@lru_cache(maxsize=64)
def program_of_sigmoid(frozen):
    config = dict(frozen)
    options = {"ignore_index": config["ignore_index"], "label_smoothing": config["smoothing"]}
    loss_fn = jaxloss.sigmoid_cross_entropy
    if config["focal"]:
        loss_fn = jaxloss.sigmoid_focal_loss
        options |= {"gamma": config["gamma"], "alpha": config["alpha"]}

    def step(x, y, arrays, ct):
        def total(x):
            loss = loss_fn(x, y, reduction=config["reduction"], **options, **arrays)
            return jnp.sum(loss * ct) if config["reduction"] == "none" else loss, loss

        (_, loss), g = jax.value_and_grad(total, has_aux=True)(x)
        return loss, g

    return jitted(config)(step)


def fuzz_sigmoid(focal, config, rng, kinds):
    config = {**config, "focal": focal}
    gamma, alpha = (config["gamma"], config["alpha"]) if focal else (0.0, None)
    n, c, dtype = 5, config["c"], config["dtype"]
    at, smooth = precision(dtype), LD(config["smoothing"])
    x = rows_of(rng, kinds, n, c, dtype)
    exact, counts, wrong = widened(x), np.ones((n, c), bool), np.zeros((n, c), bool)
    if config["labels"] == "index":
        y = rng.integers(0, 2, (n, c))
        y = np.where(rng.random((n, c)) < 0.1, rng.choice([2, -1, 100], (n, c)), y)
        if config["ignore_index"] is not None:
            y = np.where(rng.random((n, c)) < 0.2, config["ignore_index"], y)
            counts &= y != config["ignore_index"]
        y = y.astype(np.int8)
        wrong, q = (y != 0) & (y != 1), np.where(y == 1, 1, 0).astype(LD)
    elif config["labels"] == "bool":
        y = rng.random((n, c)) < 0.5
        q = y.astype(LD)
    else:
        y = rng.random((n, c)) * (rng.random((n, c)) < 0.8)
        y = np.where(rng.random((n, c)) < 0.2, 1, y).astype(np.float32)
        q = widened(y)
    arrays, w, pos, s = {}, LD(1), LD(1), np.ones((n, c), LD)
    if config["weight"]:
        arrays["weight"] = weights_of(rng, c, 0.1)
        w = widened(arrays["weight"])
    if config["pos_weight"]:
        shape = c if config["pos_weight"] == "class" else (n, c)
        arrays["pos_weight"] = weights_of(rng, int(np.prod(shape)), 0.1).reshape(shape)
        pos = widened(arrays["pos_weight"])
    if config["sample_weight"]:
        v = weights_of(rng, n * c).reshape(n, c)
        v = v > 0 if config["sample_weight"] == "bool" else v
        arrays["sample_weight"], s = v, v.astype(LD)
        counts &= v != 0
    if config["where"]:
        arrays["where"] = rng.random((n, c)) < 0.7
        counts &= arrays["where"]
    ct = rng.uniform(0.5, 2, (n, c)).astype("float64" if dtype == "float64" else "float32")
    with check_dtype(config):
        loss, dx = program_of_sigmoid(frozen_of(config))(x, y, arrays, ct)
    bad = (wrong | np.isnan(exact)) & counts
    with np.errstate(all="ignore"):
        a = np.abs(exact)
        large = 1 / (1 + np.exp(-a))
        small = np.exp(-a) * large
        yes, no = np.where(exact > 0, large, small), np.where(exact > 0, small, large)
        above = np.log1p(np.exp(-a))
        down, up = np.maximum(-exact, 0) + above, np.maximum(exact, 0) + above
        q1, q0 = (v * (1 - smooth) + smooth / 2 for v in (q, 1 - q))
        u = q0 * yes + q1 * no
        power = np.where(u > 0, u ** LD(gamma), LD(gamma == 0))
        balance = w if alpha is None else w * (alpha * q1 + (1 - LD(alpha)) * q0)

        def times(weight, v):
            return np.where(weight == 0, 0, weight * v)

        bce = times(pos * q1, down) + times(q0, up)
        losses = times(balance, power * bce)
        # A loss that falls as exp(-(1 + gamma) |x|) down to 0; past that, it grows as |x|.
        cond = (np.minimum((1 + gamma) * a, at.reach) + 16) * at.eps
        over = np.where(np.isinf(bce), 0, np.where(u > 0, bce / np.where(u > 0, u, 1), 0))
        slope = balance * power * (q0 * yes - pos * q1 * no)
        moved = balance * gamma * power * over * (q0 - q1) * yes * no
        size = balance * power * (q0 * yes + pos * q1 * no)
        size = size + balance * gamma * power * over * (q0 + q1) * yes * no
        slope = slope + moved
        losses = np.where(counts, s * losses, 0)
        # Where the loss is 0 for lack of floats, weights still multiply the rest of it.
        scale = np.maximum(np.max(balance), 1) * np.maximum(np.max(pos), 1) * (1 + gamma)
    cond = np.where(np.isnan(cond), 0, cond)
    floor = at.tiny * scale * np.maximum(np.abs(s), 1)
    counted = np.where(counts, s, 0)
    losses = np.where(bad, np.nan, losses)
    allowed = np.where(
        counts & ~bad, np.where(np.isinf(losses), 0, cond * np.abs(losses)) + floor, 0
    )
    nothing = False
    if config["reduction"] == "none":
        expected, factor = losses, ct.astype(LD) * counted
    else:
        few = (n * c / 2 + 4) * at.eps
        with np.errstate(invalid="ignore"):
            expected = losses.sum()
            allowed = np.sum(allowed) + few * np.sum(np.abs(losses))
        factor = counted
        if config["reduction"] == "mean":
            share = counted.sum()
            nothing = share == 0
            share = LD(np.nan) if nothing else share
            expected, allowed, factor = expected / share, allowed / share, counted / share
            allowed = allowed + few * np.abs(expected)
    assert_allowed(loss, expected, allowed, at, "loss")
    keep = ~bad
    # Infinite logits: 0 where they are right; where they are wrong and more, inf - inf.
    vague = np.isinf(exact) & (u > 0) & (u < 1)
    keep &= ~vague
    seen = counts & keep & (not nothing)
    slope, size = np.where(seen, slope, 0), np.where(seen, size, 0)
    want = np.where(seen, factor * slope, 0)
    room = np.abs(factor) * (cond * size + 4 * at.eps * size + floor)
    room = rounded(np.where(seen, room, 0), want, at)
    got = np.asarray(np.asarray(dx, np.float64))
    assert_allowed(got[keep], want[keep], room[keep], at, "d_logits")
    assert np.all(np.isnan(got[bad])) or nothing


def fuzz_sigmoid_cross_entropy(config, rng, kinds):
    fuzz_sigmoid(False, config, rng, kinds)


def fuzz_sigmoid_focal_loss(config, rng, kinds):
    fuzz_sigmoid(True, config, rng, kinds)


# Divergences


@lru_cache(maxsize=64)
def program_of_divergence(frozen):
    config = dict(frozen)
    options = {k: config[k] for k in ("divergence", "beta", "temperature", "reduction")}

    def step(operands, arrays, ct):
        def total(*args):
            if len(args) == 2:
                loss = jaxloss.kl_divergence(*args, **options, **arrays)
            else:
                loss = jaxloss.linear_kl_divergence(
                    *args, num_classes=config["c"], chunk_size=config["chunk_size"], **options,
                    **arrays,
                )  # fmt: skip
            return jnp.sum(loss * ct) if config["reduction"] == "none" else loss, loss

        by = tuple(range(len(operands)))
        (_, loss), grads = jax.value_and_grad(total, by, has_aux=True)(*operands)
        return loss, grads

    return jitted(config)(step)


def fuzz_divergence(linear, config, rng, kinds):
    n, c, dtype = 4, config["c"], config["dtype"]
    at, mask = precision(dtype), exists_of(config, rng, n, c)
    if linear:
        config = {**config, "exact": True, "bias": False}
        sides = [product_of(config, rng, kinds, n, c + pad, config["d"]) for pad in (1, 0)]
        operands = (*sides[0][:2], *sides[1][:2])
        x, t = (side[3][:, :c] for side in sides)
    else:
        x, t = (rows_of(rng, kinds, n, c, dtype) for _ in range(2))
        near = rng.random(n) < 0.4
        away = widened(t) + rng.normal(size=(n, c)) * 10.0 ** rng.integers(-6, 1, (n, 1))
        x = np.where(near[:, None], away.astype(x.dtype), x)
        x = np.where((rng.random(n) < 0.1)[:, None], t, x)
        operands = (x, t)
        x, t = widened(x), widened(t)
    arrays, s, counts = {}, np.ones(n, LD), np.ones(n, bool)
    if config["where"] == "classes":
        arrays["where"] = mask
    elif config["where"] == "tokens":
        arrays["where"] = rng.random(n) < 0.7
        counts &= arrays["where"]
    if config["sample_weight"]:
        v = weights_of(rng, n)
        v = v > 0 if config["sample_weight"] == "bool" else v
        arrays["sample_weight"], s = v, v.astype(LD)
        counts &= v != 0
    ct = random_ct(rng, n, config)
    with check_dtype(config):
        loss, grads = program_of_divergence(frozen_of(config))(operands, arrays, ct)
    x, t = (np.where(mask, v, -INF) for v in (x, t))
    bad = np.zeros(n, bool)
    for v in (x, t):
        bad |= np.any(np.isnan(v) | (v == INF), axis=-1) | np.all(v == -INF, axis=-1)
    options = {k: config[k] for k in ("divergence", "beta", "temperature")}
    safe = ~bad & counts
    found = exact_divergence(
        *(np.where(safe[:, None], v, 0).astype(np.float64) for v in (x, t)), **options
    )
    temperature = config["temperature"]
    with np.errstate(invalid="ignore"):
        spread = np.max([np.ptp(np.where(v > -INF, v, np.max(np.where(v < INF, v, -INF), -1,
                         keepdims=True)), axis=-1) for v in (x, t)], axis=0)  # fmt: skip
    spread = np.where(safe, spread, 0) / temperature
    # XLA:CPU's log1p of float64 is off by 118 eps between -0.41 and -0.35, in jax 0.10.
    of_log1p = 128 if at.eps < 1e-10 else 0
    relative = at.eps * (np.minimum(spread, at.reach) + 16 + c / 2 + of_log1p)
    losses = np.where(bad & counts, np.nan, np.where(counts, s * found.loss, 0))
    allowed = np.where(safe, s * (relative * abs(found.loss) + 2 * c * at.tiny + 1e-110), 0)
    nothing = False
    with np.errstate(invalid="ignore"):
        if config["reduction"] == "none":
            expected, factor = losses, ct.astype(LD) * s
        else:
            few = (n / 2 + 4) * at.eps
            expected, factor = losses.sum(), s
            allowed = np.nansum(allowed) + few * np.abs(expected)
            if config["reduction"] == "mean":
                share = np.sum(np.where(counts, s, 0))
                nothing = share == 0
                share = np.nan if nothing else share
                expected, allowed, factor = expected / share, allowed / share, s / share
                allowed = allowed + few * np.abs(expected)
        allowed = np.where(np.isfinite(allowed), allowed, 0)
    assert_allowed(loss, expected, allowed, at, "loss")
    finite = np.isfinite(np.where(counts, found.loss, 0)) & ~bad
    shares = (None, None)
    if config["divergence"] == "jensen_shannon":
        shares = config["beta"], 1 - config["beta"]
    sides = ((grads[0], 0, operands[1]), (grads[2 if linear else 1], 1, operands[-1]))
    for g, i, kernel in sides:
        want = np.where(finite[:, None], found.slopes[i], 0)
        of_a = (4 + of_log1p) * at.eps * known(found.apart, shares[i])[:, None]
        of_a = of_a * found.room[i]
        room = relative[:, None] * np.abs(want) + of_a / temperature
        room = room + 2 * c * at.tiny * (1 + np.where(np.isfinite(found.apart), found.apart, 0))[
            :, None
        ] / temperature  # fmt: skip
        scale = np.where(counts & (not nothing), factor, 0)[:, None]
        want, room = scale * want, np.abs(scale) * room + 4 * at.eps * np.abs(scale * want)
        room = rounded(room + 1e-110, want, at)  # 120 digits are the truth's
        if linear:
            more = ((0, 0), (0, kernel.shape[1] - c))
            want, room = (np.pad(np.where(finite[:, None], v, 0), more) for v in (want, room))
            k = widened(kernel).T
            room = room @ np.abs(k) + c * at.eps * np.abs(want) @ np.abs(k)
            want = want @ k
            room = rounded(room, want, at)
        got = np.asarray(np.asarray(g, np.float64))
        assert_allowed(got[finite], want[finite], room[finite], at, f"slope {i}")


def fuzz_kl_divergence(config, rng, kinds):
    fuzz_divergence(False, config, rng, kinds)


def fuzz_linear_kl_divergence(config, rng, kinds):
    fuzz_divergence(True, config, rng, kinds)


# Sums, labels and weights


def fuzz_metric_sums(config, rng, kinds):
    """And metrics, of two steps' sums added."""
    n, bins, ks = 24, config["bins"], config["top_k"]
    counts = rng.random(n) < 0.8
    confidence = np.where(counts, rng.choice([1, rng.random(), 1e-3], n), 0).astype(np.float32)
    counts = confidence > 0
    confidence[counts & (rng.random(n) < 0.2)] = np.float32(rng.integers(1, bins + 1) / bins)
    floats = [(-(10.0 ** rng.uniform(-8, 1, n))), rng.random(n) * 5]
    log_prob, entropy = (np.where(counts, v, 0).astype(np.float32) for v in floats)
    rank = np.where(counts, rng.integers(0, 7, n), -1).astype(np.int32)
    stats = jaxloss.TokenStats(log_prob, entropy, entropy, rank, confidence, rank)
    weight, s = None, np.ones(n)
    if config["sample_weight"]:
        weight = weights_of(rng, n)
        weight = weight > 0 if config["sample_weight"] == "bool" else weight
        s = weight.astype(np.float64)
    s = np.where(counts, s, 0)
    parts = [slice(0, n // 2), slice(n // 2, n)]
    sums = [
        jaxloss.metric_sums(
            stats._replace(**{k: v[part] for k, v in stats._asdict().items()}), top_k=ks,
            bins=bins, sample_weight=None if weight is None else weight[part],
        )
        for part in parts
    ]  # fmt: skip
    total = jax.tree.map(jnp.add, *sums)
    p = log_prob.astype(np.float64), entropy.astype(np.float64), confidence.astype(np.float64)
    edges = np.float32(np.arange(bins + 1) / bins)
    inside = (confidence[:, None] > edges[:-1]) & (confidence[:, None] <= edges[1:])
    each = total.top_k
    assert set(each) == {1, *ks}
    hits = [np.sum(s * ((rank >= 0) & (rank < k))) for k in each]
    expected = {
        "weight": s.sum(),
        "nll": np.sum(s * -p[0]),
        "entropy": np.sum(s * p[1]),
        "hits": np.array(hits),
        "bin_weight": s @ inside,
        "bin_confidence": (s * p[2]) @ inside,
        "bin_hits": (s * (rank == 0)) @ inside,
    }
    at = precision("float32")
    few = (n / 2 + 4) * at.eps
    for name, want in expected.items():
        got = np.asarray(getattr(total, name), np.float64).sum(0)
        assert_allowed(got, want, few * np.abs(want), at, name)
    got, w = jaxloss.metrics(total), expected["weight"]
    assert (got["weight"] == 0) == (w == 0)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        nll = expected["nll"] / w
        gap = np.sum(np.abs(expected["bin_hits"] - expected["bin_confidence"])) / w
        means = {"nll": nll, "perplexity": np.exp(nll), "entropy": expected["entropy"] / w}
        for k, v in zip(each, expected["hits"], strict=True):
            means["accuracy" if k == 1 else f"top_{k}_accuracy"] = v / w
        assert set(got) == {"weight", "calibration_error", *means}
        for name, want in means.items():
            scale = 3 * (1 + nll) if name == "perplexity" else 3
            assert_allowed(got[name], want, scale * few * want if w else 0, at, name)
        size = np.sum(expected["bin_hits"] + expected["bin_confidence"]) / w
        assert_allowed(got["calibration_error"], gap, 3 * few * size if w else 0, at, "error")


def fuzz_next_token_labels(config, rng, kinds):
    t, lead = config["t"], config["lead"]
    tokens = rng.integers(0, 100, (*lead, t)).astype(config["label_dtype"])
    options = {}
    if config["segments"]:
        options["segment_ids"] = rng.integers(-1, 2, tokens.shape).astype(np.int16)
    if config["where"]:
        options["where"] = rng.random(tokens.shape) < 0.7
    ignore = config["ignore"]
    got = jaxloss.next_token_labels(tokens, ignore_index=ignore, **options)
    expected = np.full(tokens.shape, ignore, tokens.dtype)
    for i in np.ndindex(*lead, max(t - 1, 0)):
        after = (*i[:-1], i[-1] + 1)
        segments, where = options.get("segment_ids"), options.get("where")
        if (segments is None or segments[i] == segments[after]) and (where is None or where[after]):
            expected[i] = tokens[after]
    assert got.dtype == tokens.dtype
    np.testing.assert_array_equal(got, expected)


def fuzz_sequence_weight(config, rng, kinds):
    t, lead, ignore = config["t"], config["lead"], config["ignore"]
    labels = rng.integers(0, 5, (*lead, t)).astype(config["label_dtype"])
    labels[rng.random(labels.shape) < 0.3] = ignore
    s, options = np.ones(labels.shape), {}
    if config["sample_weight"]:
        v = weights_of(rng, labels.size).reshape(labels.shape)
        v = v > 0 if config["sample_weight"] == "bool" else v
        options["sample_weight"], s = v, v.astype(np.float64)
    ids = np.zeros(labels.shape, int)
    if config["segments"]:
        ids = rng.integers(-1, 5, labels.shape)
        options |= {"segment_ids": ids.astype(np.int8), "num_segments": 4}
    counts = (labels != ignore) & (s != 0)
    expected = np.zeros(labels.shape)
    for i in np.argwhere(counts):
        row, at = tuple(i[:-1]), tuple(i)
        same = counts[row] & (ids[row] == ids[at])
        expected[at] = s[at] / np.sum(s[row][same])
    if config["segments"]:
        expected[counts & ((ids < 0) | (ids >= 4))] = np.nan
    got = jaxloss.sequence_weight(labels, ignore_index=ignore, **options)
    at = precision("float32")
    room = (t / 2 + 2) * at.eps * np.abs(np.nan_to_num(expected))
    assert_allowed(got, expected, room, at, "weight")
    if config["sample_weight"] == "float":
        ct = rng.normal(size=labels.shape).astype(np.float32)

        def total(v):
            given = {**options, "sample_weight": v}
            w = jaxloss.sequence_weight(labels, ignore_index=ignore, **given)
            return jnp.sum(jnp.where(jnp.isnan(w), 0, w * ct))

        slope = jax.grad(total)(options["sample_weight"])
        want, room = np.zeros(labels.shape), np.zeros(labels.shape)
        for i in np.argwhere(counts & ~np.isnan(expected)):
            row, j = tuple(i[:-1]), tuple(i)
            same = counts[row] & (ids[row] == ids[j])
            sums = np.sum(s[row][same])
            terms = ct[row][same] * s[row][same] / sums
            want[j] = (ct[j] - np.sum(terms)) / sums
            room[j] = (t + 6) * at.eps * (np.abs(ct[j]) + np.sum(np.abs(terms))) / sums
        assert_allowed(slope, want, room, at, "d_sample_weight")


def fuzz_total_weight(config, rng, kinds):
    n, c = 6, config["c"]
    at = precision(config["dtype"])
    config = {
        **config,
        "labels": "index" if config["labels"] != "probabilities" else "probabilities",
    }
    if "total_weight" in KNOWN and config["labels"] == "probabilities":
        config["ignore_index"] = -100
    asked = asked_of(config, rng, np.ones((n, c), bool), at)
    counts = asked.counts
    got = jaxloss.total_weight(asked.labels[0], ignore_index=config["ignore_index"], **asked.arrays)
    if config["labels"] != "index":
        share = asked.s
    elif config["weight"]:
        share = asked.share
    else:
        share = asked.s
    expected = np.sum(np.where(counts, share, 0))
    assert_allowed(got, expected, (n / 2 + 2) * 2**-23 * expected, at, "total")


def fuzz_check_labels(config, rng, kinds):
    c, ignore, info = config["c"], config["ignore_index"], np.iinfo(config["label_dtype"])
    y = rng.integers(0, min(c, info.max), (2, 3))
    odd = np.clip(rng.choice([-100, -1, c, info.max, info.min], (2, 3)), info.min, info.max)
    y = np.where(rng.random((2, 3)) < 0.1, odd, y).astype(config["label_dtype"])
    wrong = [(tuple(map(int, i)), int(v)) for i, v in np.ndenumerate(y)
             if not 0 <= v < c and v != ignore]  # fmt: skip
    if not wrong:
        jaxloss.check_labels(y, c, ignore)
        return
    with pytest.raises(ValueError, match=r"check_labels: labels must be in") as info:
        jaxloss.check_labels(y, c, ignore)
    assert f"got {wrong[0][1]} at {wrong[0][0]}." in str(info.value)


SMALL = {k: v for k, v in SOFTMAX.items() if k not in ("labels", "logit_softcap")}
SMALL["labels"] = ["index", "probabilities"]
STATS = {"labels": SOFTMAX["labels"][:4], "logit_softcap": [None, 5.0],
         "temperature": [1.0, 0.3, 4.0]}  # fmt: skip
FOCAL = {"gamma": [0.0, 0.5, 2.0, 3.7], "alpha": [None, 0.25, 1.0]}
SIGMOID = {
    "c": [1, 3, 7],
    "dtype": SOFTMAX["dtype"],
    "labels": ["index", "bool", "probabilities"],
    "reduction": SOFTMAX["reduction"],
    "weight": [False, True],
    "pos_weight": [None, "class", "entry"],
    "sample_weight": [None, "bool", "float"],
    "where": [False, True],
    "smoothing": [0.0, 0.1, 1e-9],
    "ignore_index": [-100, None],
    "way": ["jit", "quick"],
}
DIVERGENCE = {
    "c": [1, 2, 5, 12],
    "dtype": ["float32", "bfloat16", "float16", "float64"],
    "divergence": ["forward", "reverse", "jensen_shannon"],
    "beta": [0.5, 1e-4, 0.9],
    "temperature": [1.0, 0.3, 1.7],
    "sample_weight": [None, "bool", "float"],
    "where": [None, "tokens", "classes"],
    "reduction": SOFTMAX["reduction"],
    "way": ["jit", "quick"],
}
SEQUENCES = {
    "t": [0, 1, 2, 9],
    "lead": [(), (3,), (2, 2)],
    "label_dtype": ["int8", "int32"],
    "segments": [False, True],
    "where": [False, True],
    "ignore": [-100, -1, 3],
    "sample_weight": [None, "bool", "float"],
}


class Fuzz(NamedTuple):
    check: Callable
    space: dict  # of options
    few: tuple  # what the ordinary suite takes: changes of each option's first choice


FUZZ = {
    "cross_entropy": Fuzz(
        fuzz_cross_entropy,
        SOFTMAX,
        (
            {"c": 12, "reduction": "none"},
            {
                "c": 5,
                "dtype": "bfloat16",
                "labels": "probabilities",
                "weight": True,
                "sample_weight": "float",
                "label_smoothing": 0.1,
                "reduction": "mean",
            },
            {"c": 12, "dtype": "float16", "labels": "uniform", "where": "classes", "z_loss": 1e-3},
        ),
    ),
    "linear_cross_entropy": Fuzz(
        fuzz_linear_cross_entropy,
        LINEAR,
        (
            {"c": 13, "d": 4, "padding": 3, "exact": True, "chunk_size": 4, "poison": True},
            {
                "c": 13,
                "d": 4,
                "dtype": "bfloat16",
                "bias": True,
                "weight": True,
                "chunk_size": 5,
                "reduction": "mean",
                "sample_weight": "float",
                "implementation": "vocab_blocks",
            },
        ),
    ),
    "linear_loss": Fuzz(
        fuzz_linear_loss,
        {**LINEAR, "labels": ["index"], "ignore_index": [None]},
        (
            {
                "c": 5,
                "d": 4,
                "padding": 3,
                "chunk_size": 4,
                "sample_weight": "float",
                "reduction": "mean",
            },
        ),
    ),
    "log_softmax": Fuzz(
        fuzz_log_softmax,
        {k: SOFTMAX[k] for k in ("c", "dtype", "layout", "where", "way")},
        ({"c": 12, "where": "classes"}, {"c": 5, "dtype": "bfloat16", "layout": "middle"}),
    ),
    "nll_loss": Fuzz(fuzz_nll_loss, SMALL, ({"c": 5, "weight": True, "layout": "first"},)),
    "token_stats": Fuzz(fuzz_token_stats, {**SMALL, **STATS}, ({"c": 12, "temperature": 0.3},)),
    "linear_token_stats": Fuzz(
        fuzz_linear_token_stats,
        {**LINEAR, **STATS},
        ({"c": 13, "d": 4, "chunk_size": 4, "implementation": "vocab_blocks"},),
    ),
    "focal_loss": Fuzz(
        fuzz_focal_loss, {**SMALL, **FOCAL, "labels": ["index"]}, ({"c": 5, "gamma": 0.5},)
    ),
    "sigmoid_cross_entropy": Fuzz(
        fuzz_sigmoid_cross_entropy, SIGMOID, ({"c": 7, "pos_weight": "class", "weight": True},)
    ),
    "sigmoid_focal_loss": Fuzz(
        fuzz_sigmoid_focal_loss,
        {**SIGMOID, **FOCAL},
        ({"c": 7, "labels": "probabilities", "gamma": 0.5, "alpha": 0.25},),
    ),
    "kl_divergence": Fuzz(
        fuzz_kl_divergence,
        DIVERGENCE,
        (
            {"c": 5, "divergence": "forward", "temperature": 1.7},
            {"c": 5, "divergence": "jensen_shannon"},
        ),
    ),
    "linear_kl_divergence": Fuzz(
        fuzz_linear_kl_divergence,
        {**DIVERGENCE, "d": [1, 4], "chunk_size": [1, 2, None]},
        ({"c": 5, "d": 4, "chunk_size": 2, "divergence": "reverse"},),
    ),
    "metric_sums": Fuzz(
        fuzz_metric_sums,
        {"bins": [1, 4, 15], "top_k": [(1, 5), (3,), ()], "sample_weight": [None, "bool", "float"]},
        ({"bins": 15, "sample_weight": "float"},),
    ),
    "next_token_labels": Fuzz(
        fuzz_next_token_labels, SEQUENCES, ({"t": 9, "lead": (3,), "segments": True},)
    ),
    "sequence_weight": Fuzz(
        fuzz_sequence_weight,
        SEQUENCES,
        ({"t": 9, "lead": (3,), "segments": True, "sample_weight": "float"},),
    ),
    "total_weight": Fuzz(
        fuzz_total_weight,
        {**SMALL, "where": [None, "tokens"]},
        ({"c": 5, "weight": True, "sample_weight": "float"},),
    ),
    "check_labels": Fuzz(
        fuzz_check_labels,
        {"c": [1, 5, 200], "ignore_index": [-100, None, 0], "label_dtype": SOFTMAX["label_dtype"]},
        ({"c": 5},),
    ),
}


# The two modes

PROGRAMS = (
    program_of_logits,
    program_of_product,
    program_of_log_softmax,
    program_of_nll_loss,
    program_of_stats,
    program_of_focal,
    program_of_sigmoid,
    program_of_divergence,
)
CLASSES = {"TopKLabels": "labels", "TokenStats": "token_stats", "MetricSums": "metric_sums"}
VALUES = st.tuples(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=3), st.integers(0, 2**32 - 1)
)


def run(name, config, kinds, seed):
    config = sanitized(config)
    try:
        FUZZ[name].check(config, np.random.default_rng(seed), kinds)
    except Exception as error:
        error.add_note(f"check: FUZZ[{name!r}].check; config: {config}; {kinds}; seed {seed}")
        raise


def test_every_function_is_here():
    functions = {n for n in jaxloss.__all__ if not isinstance(getattr(jaxloss, n), type)}
    # metrics are those of metric_sums; the classes are arguments or results.
    assert functions - {"metrics"} == set(FUZZ)
    assert set(jaxloss.__all__) - functions == set(CLASSES)


@pytest.mark.parametrize("name", FUZZ)
def test_a_few_programs_on_many_values(name):
    space = FUZZ[name].space
    first = {k: v[0] for k, v in space.items()}
    if "way" in space:
        first["way"] = "quick"

    @given(st.sampled_from(FUZZ[name].few), VALUES)
    def check(changes, values):
        run(name, {**first, **changes}, *values)

    check()


@pytest.fixture
def fresh_programs():
    """A program compiled for one device must not be used for eight."""

    def clear():
        jax.clear_caches()
        for program in PROGRAMS:
            program.cache_clear()

    clear()
    yield
    clear()


@pytest.mark.soak
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", FUZZ)
def test_soak(name, devices, monkeypatch, fresh_programs, record_property):
    monkeypatch.setattr(jax, "device_count", lambda *_: devices)
    count = 0
    options = st.fixed_dictionaries({k: st.sampled_from(v) for k, v in FUZZ[name].space.items()})

    @given(options, st.lists(VALUES, min_size=12, max_size=20))
    def check(config, many):
        nonlocal count
        for values in many:
            count += 1
            run(name, config, *values)

    try:
        check()
    finally:
        record_property("cases", count)
