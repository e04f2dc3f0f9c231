"""Metrics from the statistics of a loss: what they are, and that their sums add."""

import functools
import operator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle.budget import EPS, assert_within, relative_budget
from oracle.truth import reference

import jaxloss
from jaxloss import _metrics

R, T, C = 8, 25, 12
NAMES = ["weight", "nll", "perplexity", "entropy", "accuracy", "top_3_accuracy"]
NAMES += ["calibration_error"]


def problem():
    """Confident rows beside flat ones, about half of them right; tied maxima; ignored tokens."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(R, T, C)) * rng.choice([0.2, 1, 5], (R, T, 1))
    x[:, 3] = np.round(x[:, 3])
    x[0, 1] = [0, 200, *[0] * (C - 2)]  # confidence 1
    y = np.where(rng.random((R, T)) < 0.4, np.argmax(x, -1), rng.integers(0, C, (R, T)))
    y[rng.random((R, T)) < 0.2] = -100
    y[5] = -100  # nothing on one device
    s = rng.random((R, T)) * rng.choice([0, 1e-2, 1, 30], (R, T))
    return x.astype(np.float32), y, s.astype(np.float32)


def truth(x, y, s=None, bins=15):
    """By the definitions, a token at a time; s: a weight, or a mask."""
    flat = x.reshape(-1, x.shape[-1])
    y = y.reshape(-1)
    s = np.ones(len(y)) if s is None else np.asarray(s, np.float64).reshape(-1)
    stats = reference(flat, y, reduction="none")
    edges = np.float32(np.arange(bins + 1) / bins)
    total = nll = entropy = first = third = 0
    by_bin = np.zeros((bins, 3))
    for n in np.flatnonzero((y != -100) & (s != 0)):
        row = np.asarray(flat[n], np.longdouble)
        order = sorted(range(len(row)), key=lambda c: (-row[c], c))
        place = order.index(y[n])
        confidence = float(1 / np.sum(np.exp(row - row.max())))
        total += s[n]
        nll -= s[n] * float(stats.log_prob[n])
        entropy += s[n] * float(stats.entropy[n])
        first += s[n] * (place < 1)
        third += s[n] * (place < 3)
        (b,) = np.flatnonzero((edges[:-1] < confidence) & (confidence <= edges[1:]))
        by_bin[b] += s[n] * np.array([1, confidence, place == 0])
    weight, confidence, hits = by_bin.T
    some = weight > 0
    gap = np.abs(hits[some] / weight[some] - confidence[some] / weight[some])
    error = np.sum(weight[some] / total * gap)
    means = (nll / total, np.exp(nll / total), entropy / total, first / total, third / total)
    return dict(zip(NAMES, (total, *means, error), strict=True))


def check(got, expected):
    """Sums of positive terms, each as good as a loss is. The error's parts are of size 1."""
    assert set(got) == set(NAMES)
    for name, value in got.items():
        scale = max(1.0, np.log(expected["perplexity"])) if name == "perplexity" else 1
        floor = 1 if name == "calibration_error" else 0
        assert_within(value, expected[name], relative_budget(16) * scale, floor=floor)


def sums_of(x, y, **options):
    _, stats = jaxloss.cross_entropy(x, y, return_stats=True)
    return jaxloss.metric_sums(stats, top_k=(1, 3), **options)


def test_metrics_by_their_definitions(form):
    x, y, s = problem()
    _, stats = jax.jit(partial(form, return_stats=True))(x, y)
    mask = s > 0.5
    for given in (None, mask, s):
        weight = None if given is None else jnp.asarray(given)
        for bins in (15, 4):
            sums = jaxloss.metric_sums(stats, top_k=(1, 3), bins=bins, sample_weight=weight)
            check(jaxloss.metrics(sums), truth(x, y, given, bins))


def test_what_the_sums_hold():
    x, y, s = problem()
    sums = sums_of(x, y, sample_weight=jnp.asarray(s), bins=6)
    shapes = {k: v.shape for k, v in vars(sums).items() if k != "top_k"}
    pairs = dict.fromkeys(("weight", "nll", "entropy"), (2,))
    bins = dict.fromkeys(("bin_weight", "bin_confidence", "bin_hits"), (2, 6))
    assert shapes == {**pairs, "hits": (2, 2), **bins}
    assert sums.top_k == (1, 3)
    for of_bins, whole in ((sums.bin_weight, sums.weight), (sums.bin_hits, sums.hits[:, 0])):
        np.testing.assert_allclose(of_bins.sum(), whole.sum(), rtol=16 * EPS)


# Which token lies in which bin


def stats_of(confidence, rank=0, log_prob=-1.0):
    confidence = jnp.asarray(confidence, jnp.float32)
    rank = jnp.broadcast_to(jnp.asarray(rank, jnp.int32), confidence.shape)
    log_prob = jnp.full_like(confidence, log_prob)
    return jaxloss.TokenStats(
        log_prob, log_prob, -log_prob, rank, confidence, rank, *[confidence] * 2
    )


@pytest.mark.parametrize("bins", [1, 3, 10, 15])
def test_bins_are_closed_on_the_right(bins):
    edges = np.float32(np.arange(1, bins + 1) / bins)
    above = np.nextafter(edges[:-1], np.float32(2))
    below = np.nextafter(edges, np.float32(0))
    for confidence, expected in (
        (edges, np.ones(bins)),  # 1 in the last
        (above, [0, *[1] * (bins - 1)]),
        (below, np.ones(bins)),
        (np.nextafter(np.float32([1]), np.float32(2)), [*[0] * (bins - 1), 1]),  # a rounding
    ):
        sums = jaxloss.metric_sums(stats_of(confidence), bins=bins)
        np.testing.assert_array_equal(sums.bin_weight.sum(axis=0), expected)


def test_calibration_error_by_hand():
    confidence = [0.5, 0.5, 0.5, 0.51, 1.0]  # two bins: at 0.5, above it
    sums = jaxloss.metric_sums(stats_of(confidence, [0, 1, 1, 3, 0]), bins=2)
    got = jaxloss.metrics(sums)
    expected = 3 / 5 * abs(1 / 3 - 0.5) + 2 / 5 * abs(0.5 - (0.51 + 1) / 2)
    np.testing.assert_allclose(got["calibration_error"], expected, rtol=8 * EPS)
    np.testing.assert_allclose(got["accuracy"], 2 / 5, rtol=EPS)
    np.testing.assert_allclose(got["top_5_accuracy"], 1)
    right = jaxloss.metric_sums(stats_of([1.0] * 7))
    assert jaxloss.metrics(right)["calibration_error"] == 0


# Which tokens count


@pytest.mark.nan_is_meant
def test_what_is_wrong_is_nan_and_does_not_vanish():
    x, y, _ = problem()
    x, y = x[0], y[0].copy()
    y[:6] = 3
    wrong = {
        "NaN": (x[0] * np.nan, 3),
        "+inf": (np.where(np.arange(C) == 2, np.inf, x[0]), 3),
        "all -inf": (np.full(C, -np.inf, np.float32), 0),
        "a label out of range": (x[0], C),
    }
    run = jax.jit(lambda x, y: jaxloss.metrics(sums_of(x, y)))
    clean = run(x, y)
    assert np.isfinite(list(clean.values())).all()
    for row, label in wrong.values():
        xs, ys = x.copy(), y.copy()
        xs[2], ys[2] = row, label
        got = run(xs, ys)
        assert got.pop("weight") == clean["weight"]
        assert np.isnan(list(got.values())).all()
        ys[2] = -100  # what does not count says nothing
        y_without = np.where(np.arange(T) == 2, -100, y)
        check(run(xs, ys), truth(x, y_without))


@pytest.mark.nan_is_meant
def test_wrong_rows_of_every_implementation(form):
    x = np.zeros((4, C), np.float32)
    x[1], x[2] = np.nan, -np.inf
    y = jnp.array([0, -100, 0, -100])
    for rows, bad in (([0, 1], False), ([0, 2], True), ([1, 3], None)):
        _, stats = form(x[rows], y[jnp.array(rows)], return_stats=True)
        got = jaxloss.metrics(jaxloss.metric_sums(stats))
        assert got["weight"] == (0 if bad is None else 1 + bad)
        got.pop("weight")
        assert np.isnan(list(got.values())).all() == (bad is not False)


def test_an_impossible_label_has_infinite_perplexity():
    x = np.zeros((2, C), np.float32)
    x[1, 3] = -np.inf
    got = jaxloss.metrics(sums_of(x, jnp.array([0, 3])))
    assert got["nll"] == got["perplexity"] == np.inf
    assert got["accuracy"] == 0.5
    assert np.isfinite(got["calibration_error"])


@pytest.mark.nan_is_meant
def test_probabilities_as_labels_have_no_accuracy():
    x, y, _ = problem()
    q = jax.nn.one_hot(np.where(y < 0, 0, y), C)
    loss, stats = jaxloss.cross_entropy(x, q, return_stats=True)
    got = jaxloss.metrics(jaxloss.metric_sums(stats))
    np.testing.assert_allclose(got["nll"], loss, rtol=16 * EPS)
    hits = ("accuracy", "top_5_accuracy", "calibration_error")
    assert {name for name, v in got.items() if np.isnan(v)} == set(hits)


@pytest.mark.nan_is_meant
def test_nothing_counts():
    x, y, _ = problem()
    for sums in (
        sums_of(x, np.full_like(y, -100)),
        sums_of(x, y, sample_weight=np.zeros((R, T), bool)),
        sums_of(x[:0], y[:0]),
    ):
        got = jaxloss.metrics(sums)
        assert got.pop("weight") == 0
        assert np.isnan(list(got.values())).all()
        assert not np.any(jax.tree.leaves(jax.tree.map(jnp.any, sums)))


# Sums add


@pytest.mark.nan_is_meant
def test_any_split_equals_the_whole():
    x, y, s = map(jnp.asarray, problem())

    def local(x, y, s):
        return sums_of(x, y, sample_weight=s)

    expected = truth(*problem())
    add = partial(jax.tree.map, jnp.add)
    halves = add(local(x[:4], y[:4], s[:4]), local(x[4:], y[4:], s[4:]))
    stacked = jax.lax.scan(lambda _, row: (None, local(*row)), None, (x, y, s))[1]
    vmapped = jax.vmap(local)(x, y, s)
    rows = [jax.tree.map(lambda v: v.sum(axis=0), sums) for sums in (stacked, vmapped)]
    for sums in (halves, jax.jit(local)(x, y, s), *rows):
        check(jax.jit(jaxloss.metrics)(sums), expected)


@pytest.mark.nan_is_meant
def test_sums_have_a_plus():
    x, y, s = map(jnp.asarray, problem())
    parts = [sums_of(*row[:2], sample_weight=row[2]) for row in zip(x, y, s, strict=True)]
    reduced = functools.reduce(partial(jax.tree.map, jnp.add), parts)
    zeros = jax.tree.map(jnp.zeros_like, parts[0])
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *parts)

    def carried(total, part):
        return total + part, None

    for total in (
        functools.reduce(operator.add, parts),
        sum(parts),
        sum(parts[1:], parts[0]),
        jax.jit(sum)(parts),
        jax.jit(lambda parts: sum(parts, zeros))(parts),
        jax.lax.scan(carried, zeros, stacked)[0],
        sum(jax.device_get(parts)),
    ):
        assert isinstance(total, jaxloss.MetricSums)
        assert total.top_k == parts[0].top_k
        jax.tree.map(np.testing.assert_array_equal, total, reduced)
    doubled = jax.vmap(operator.add)(stacked, stacked)
    np.testing.assert_array_equal(doubled.nll, 2 * stacked.nll)
    moved = jax.jvp(operator.add, (parts[0], parts[1]), (parts[2], parts[3]))[1]
    jax.tree.map(np.testing.assert_array_equal, moved, parts[2] + parts[3])


def test_sums_of_other_kinds_do_not_add():
    x, y, _ = problem()
    stats = jaxloss.token_stats(jnp.asarray(x), y)
    sums = jaxloss.metric_sums(stats, top_k=(1, 5), bins=15)
    for other, text in (
        (jaxloss.metric_sums(stats, top_k=(1, 3)), r"top_k; got \(1, 5\) and \(1, 3\)"),
        (jaxloss.metric_sums(stats, bins=10), r"shape of bin_weight; got \(2, 15\) and \(2, 10\)"),
        (jax.tree.map(lambda v: v[None], sums), r"shape of weight; got \(2,\) and \(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=f"^MetricSums: .* have the same {text}"):
            sums + other
    for other in (1, 0.0, None, (1, 2), jnp.ones(2)):
        with pytest.raises(TypeError, match="unsupported operand"):
            sums + other
    with pytest.raises(TypeError, match="unsupported operand"):
        1 + sums


@pytest.mark.parametrize("vocab", [False, True], ids=["tokens", "tokens and classes"])
def test_over_the_devices_of_shard_map(vocab):
    shape, names = ((4, 2), ("t", "v")) if vocab else ((8,), ("t",))
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))

    def local(x, y, s):
        _, stats = jaxloss.cross_entropy(
            x, y, vocab_axis_name="v" if vocab else None, token_axis_name="t", return_stats=True
        )
        sums = jaxloss.metric_sums(stats, top_k=(1, 3), sample_weight=s, token_axis_name="t")
        own = jaxloss.metric_sums(stats, top_k=(1, 3), sample_weight=s)
        return sums, jax.lax.psum(own, "t")

    specs = P("t", None, "v" if vocab else None), P("t"), P("t")
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P()))
    for sums in sharded(*problem()):
        check(jaxloss.metrics(sums), truth(*problem()))


def test_on_an_explicit_mesh():
    mesh = jax.make_mesh((4, 2), ("t", "u"), axis_types=(AxisType.Explicit,) * 2)
    x, y, s = problem()
    with jax.set_mesh(mesh):
        spec = NamedSharding(mesh, P("t"))
        x, y, s = (jax.device_put(v, spec) for v in (x, y, s))
        got = jax.jit(lambda x, y, s: jaxloss.metrics(sums_of(x, y, sample_weight=s)))(x, y, s)
    check(got, truth(*problem()))


@pytest.mark.nan_is_meant
def test_a_sum_is_kept_whole_in_two():
    rng = np.random.default_rng(3)
    x = np.float32(rng.normal(size=1000) * 10.0 ** rng.integers(-30, 30, 1000))
    x[:4] = 0, 2**24 - 1, -np.float32(0.1), np.finfo(np.float32).max
    leading, rest = np.asarray(jax.jit(_metrics._in_two)(x), np.float64)
    np.testing.assert_array_equal(leading + rest, x)
    mantissa, _ = np.frexp(leading)
    np.testing.assert_array_equal(mantissa * 2**8 % 1, 0)
    few = np.abs(rest) <= np.abs(x.astype(np.float64)) * 2**-8.0
    assert few[np.arange(1000) != 3].all()
    for odd in (np.inf, -np.inf, np.nan):
        np.testing.assert_array_equal(_metrics._in_two(jnp.float32(odd)).sum(), odd)


def added(steps, n):
    """Steps of sums added one after the other in float32, in one program."""
    return jax.jit(
        lambda steps: jax.lax.fori_loop(
            0,
            n,
            lambda i, total: jax.tree.map(lambda t, v: t + v[i % len(v)], total, steps),
            jax.tree.map(lambda v: jnp.zeros_like(v[0]), steps),
        )
    )(steps)


@pytest.mark.parametrize("sizes", ["equal", "from 1 to 8"])
def test_ten_thousand_steps_of_a_million_tokens(sizes):
    n = 10_000
    rng = np.random.default_rng(4)
    tokens = rng.integers(2**17, 2**20, 500) if sizes == "from 1 to 8" else np.array([999_999])
    nll = np.float32(tokens * (2.3 + 0.1 * rng.random(len(tokens))))
    whole = [np.float32(tokens), nll]
    got = added([jax.vmap(_metrics._in_two)(jnp.asarray(v)) for v in whole], n)
    plain = added([jnp.asarray(v) for v in whole], n)
    worst = 0.0
    for pair, single, v in zip(got, plain, whole, strict=True):
        expected = np.sum(v.astype(np.float64)[np.arange(n) % len(v)])
        assert_within(np.asarray(pair, np.float64).sum(), expected, n * 2.0**-34)
        worst = max(worst, abs(float(single) / expected - 1))
    count = np.asarray(got[0], np.float64).sum()
    assert count == np.sum(tokens[np.arange(n) % len(tokens)])  # to the token
    assert worst > n * 2.0**-34  # one float32 would not do


def test_a_million_tokens_are_counted():
    n = 2**20 + 1
    sums = jaxloss.metric_sums(stats_of(jnp.full(n, 0.3), log_prob=-0.1))
    assert np.asarray(sums.weight, np.float64).sum() == n
    assert np.asarray(sums.bin_hits, np.float64).sum() == n
    np.testing.assert_allclose(jaxloss.metrics(sums)["nll"], np.float32(0.1), rtol=16 * EPS)


# Dtypes and derivatives


def test_dtypes():
    x, y, _ = problem()
    narrow = jnp.asarray(x, jnp.bfloat16)
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(sums_of(narrow, y)))
    with jax.enable_x64(True):
        wide = sums_of(jnp.asarray(x, jnp.float64), y)
        assert all(v.dtype == jnp.float64 for v in jax.tree.leaves(wide))
        got, expected = jaxloss.metrics(wide), truth(x, y)
        for name in NAMES:
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-13)


def test_the_mean_loss_has_its_gradient():
    x, y, s = map(jnp.asarray, problem())

    def by_metrics(x):
        _, stats = jaxloss.cross_entropy(x, y, reduction="none", return_stats=True)
        return jaxloss.metrics(jaxloss.metric_sums(stats, sample_weight=s))["nll"]

    def loss(x):
        return jaxloss.cross_entropy(x, y, sample_weight=s)

    @jax.jit
    def run(x):
        return [jax.jvp(jax.grad(f), (x,), (jnp.cos(x),)) for f in (by_metrics, loss)]

    for got, expected in zip(*run(x), strict=True):
        scale = float(jnp.max(jnp.abs(expected)))
        np.testing.assert_allclose(got, expected, rtol=0, atol=64 * EPS * scale)


def test_a_token_that_does_not_count_has_no_gradient():
    """Its rank is -1: whether it was a hit is not known."""
    x, y, s = problem()
    stats = jaxloss.token_stats(x, y)

    def nll(s):
        return jaxloss.metrics(jaxloss.metric_sums(stats, sample_weight=s))["nll"]

    counts = (y != -100) & (s != 0)
    mean = np.sum(np.where(counts, -s * stats.log_prob, 0)) / np.sum(s, where=counts)
    expected = np.where(counts, (-stats.log_prob - mean) / np.sum(s, where=counts), 0)
    np.testing.assert_allclose(jax.jit(jax.grad(nll))(s), expected, rtol=1e-4, atol=1e-7)


# Errors

STATS = stats_of(np.ones((2, 4)))
SUMS, METRICS = jaxloss.metric_sums, jaxloss.metrics


@pytest.mark.parametrize(
    ("call", "arguments", "error", "text"),
    [
        (SUMS, ((1.0, STATS),), TypeError, r"must be jaxloss.TokenStats; got tuple\. return_st"),
        (SUMS, (np.ones(3),), TypeError, r"be jaxloss.TokenStats; got (ndarray|ArrayImpl)\.$"),
        (
            SUMS,
            (STATS._replace(confidence=np.ones(4, np.float32)),),
            ValueError,
            r"stats.confidence must have the shape of stats.log_prob, \(2, 4\); got float32\(4,\)",
        ),
        (
            SUMS,
            (STATS._replace(entropy=np.ones((2, 4), int)),),
            TypeError,
            "stats.entropy must have a real floating dtype",
        ),
        (METRICS, (STATS,), TypeError, r"jaxloss.MetricSums; got TokenStats\. Make them"),
        (METRICS, ({},), TypeError, r"sums must be jaxloss.MetricSums; got dict\.$"),
    ],
)
def test_wrong_arguments(call, arguments, error, text):
    with pytest.raises(error, match=text) as info:
        call(*arguments)
    assert f"{call.__name__}: " in str(info.value)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"top_k": 5}, TypeError, "top_k must be a sequence of ints; got 5"),
        ({"top_k": (1, 2.0)}, TypeError, r"each of top_k must be an int; got 2\.0"),
        ({"top_k": (1, None)}, TypeError, "each of top_k must be an int; got None"),
        ({"top_k": (0,)}, ValueError, "each of top_k must be at least 1; got 0"),
        ({"top_k": (5, 5)}, ValueError, r"top_k must name each k once; got \(5, 5\)"),
        ({"bins": 0}, ValueError, "bins must be at least 1; got 0"),
        ({"bins": None}, TypeError, "bins must be an int; got None"),
        (
            {"sample_weight": np.ones(4, bool)},
            ValueError,
            r"sample_weight must have the shape of the losses, \(2, 4\); got bool\(4,\)",
        ),
        ({"token_axis_name": "t"}, ValueError, "must name axes of the surrounding shard_map"),
    ],
)
def test_wrong_options(options, error, text):
    with pytest.raises(error, match=text):
        jaxloss.metric_sums(STATS, **options)


def test_stacked_sums_are_no_whole():
    stacked = jax.vmap(SUMS)(STATS)
    with pytest.raises(ValueError, match=r"must have two numbers, \(2,\); got float32\(2, 2\)\. A"):
        jaxloss.metrics(stacked)


def test_sums_of_different_k_do_not_add():
    a, b = (jaxloss.metric_sums(STATS, top_k=k) for k in ((1, 5), (1, 3)))
    with pytest.raises(ValueError, match=r"top_k|metadata|node type|pytree"):
        jax.tree.map(jnp.add, a, b)
