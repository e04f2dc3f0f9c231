"""metric_sums, labels and weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.budget import assert_allowed, precision
from oracle.draw import asked_of, weights_of

import jaxloss
from numerics.fuzz.logits import SOFTMAX


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
    stats = jaxloss.TokenStats(log_prob, entropy, entropy, rank, confidence, rank, *[entropy] * 2)
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
    asked = asked_of(config, rng, np.ones((n, c), bool))
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
