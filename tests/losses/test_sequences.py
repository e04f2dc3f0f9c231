"""Labels of next-token prediction and the weights of a mean over sequences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle.budget import EPS, assert_within
from oracle.truth import reference

import jaxloss

# next_token_labels


def labels_of(tokens, segment_ids=None, where=None, ignore_index=-100):
    """By its definition, position by position."""
    tokens = np.asarray(tokens)
    out = np.full(tokens.shape, ignore_index, tokens.dtype)
    for i in np.ndindex(tokens.shape):
        after = (*i[:-1], i[-1] + 1)
        if after[-1] == tokens.shape[-1]:
            continue
        same = segment_ids is None or segment_ids[after] == segment_ids[i]
        if same and (where is None or where[after]):
            out[i] = tokens[after]
    return out


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((0,), "int32"), ((1,), "int8"), ((9,), "int16"), ((2, 0), "int8"), ((2, 3, 7), "int32")],
)
def test_each_label_is_the_next_token(shape, dtype):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 100, shape).astype(dtype)
    segments = np.sort(rng.integers(-1, 3, shape), axis=-1).astype(np.int16)
    mask = rng.random(shape) < 0.7
    for options in (
        {},
        {"segment_ids": segments},
        {"where": mask, "ignore_index": 7},
        {"segment_ids": segments, "where": mask},
    ):
        got = jaxloss.next_token_labels(tokens, **options)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, labels_of(tokens, **options))


def test_a_segment_that_returns_is_cut_where_it_is_left():
    got = jaxloss.next_token_labels(
        jnp.arange(6), segment_ids=jnp.array([0, 0, 1, 0, 0, 0]), ignore_index=-1
    )
    assert got.tolist() == [1, -1, -1, 4, 5, -1]


def test_wide_and_unsigned_integers():
    ids = np.array([250, 250, 7], np.uint8)
    assert jaxloss.next_token_labels(jnp.arange(3), segment_ids=ids).tolist() == [1, -100, -100]
    with jax.enable_x64(True):
        tokens = jnp.array([1, 2**40, 3], jnp.int64)
        got = jaxloss.next_token_labels(tokens, ignore_index=-(2**35))
        assert got.tolist() == [2**40, 3, -(2**35)]
        assert got.dtype == jnp.int64


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint16, jnp.uint32])
def test_unsigned_tokens(dtype):
    """They were refused, because they cannot hold an ignore_index of -100."""
    got = jaxloss.next_token_labels(jnp.array([250, 251, 7], dtype))
    assert got.tolist() == [251, 7, -100]
    assert got.dtype == jnp.int32
    largest = jaxloss.next_token_labels(jnp.array([1, 2**32 - 1, 3], jnp.uint32))
    assert largest.tolist() == [2**31 - 1, 3, -100]


@pytest.mark.parametrize("name", ["segment_ids", "sample_weight"])
def test_numbers_past_32_bits_are_refused(name):
    """Cut to 32 bits, two documents with large numbers were one."""
    call = {"segment_ids": jaxloss.next_token_labels, "sample_weight": jaxloss.total_weight}[name]
    wide = np.array([5, 5, 7, 7]) * 10**9 + 1
    with jax.enable_x64(False), pytest.raises(ValueError, match=f"{name} must fit into int32; got"):
        call(np.array([10, 11, 20, 21]), **{name: wide})


def sliced(hidden, kernel, tokens, mask):
    labels = jnp.where(mask, tokens, -100)[:, 1:]
    return jaxloss.linear_cross_entropy(hidden[:, :-1], kernel, labels, chunk_size=32)


def whole(hidden, kernel, tokens, mask):
    labels = jaxloss.next_token_labels(tokens, where=mask)
    return jaxloss.linear_cross_entropy(hidden, kernel, labels, chunk_size=32)


def copies(f, *args, size):
    """The equations that copy some or all of an array that is not much smaller than ``size``."""
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            moves = eqn.primitive.name in ("slice", "dynamic_slice", "concatenate", "pad", "gather")
            if moves and any(v.aval.size >= size / 2 for v in eqn.outvars):
                found.append(eqn.primitive.name)
            for value in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(f)(*args).jaxpr)
    return found


def test_hidden_stays_whole():
    """The loss and gradients of the slice, without a slice of hidden or of its gradient."""
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(4, 64, 16)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(16, 30)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 30, (4, 64)), jnp.int32)
    mask = jnp.asarray(rng.random((4, 64)) < 0.6)
    grads = [jax.value_and_grad(f, argnums=(0, 1)) for f in (whole, sliced)]
    got, expected = (jax.jit(f)(hidden, kernel, tokens, mask) for f in grads)
    np.testing.assert_allclose(got[0], expected[0], rtol=8 * EPS)
    for g, e in zip(got[1], expected[1], strict=True):
        scale = float(jnp.max(jnp.abs(e)))
        np.testing.assert_allclose(g, e, rtol=0, atol=32 * EPS * scale)
    assert np.all(got[1][0][:, -1] == 0)
    of_whole, of_slice = (copies(f, hidden, kernel, tokens, mask, size=hidden.size) for f in grads)
    assert of_whole == []
    assert "slice" in of_slice


# sequence_weight

R, T, C = 4, 9, 6


def packed(seed=0):
    """Labels, segments out of order and apart, weights; a segment and a row without labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C, (R, T))
    labels[rng.random((R, T)) < 0.3] = -100
    segments = rng.choice([0, 2, 3, T], (R, T))
    labels[0][segments[0] == 2] = -100
    labels[3] = -100
    weight = rng.random((R, T)) * rng.choice([0, 1e-3, 1, 50], (R, T))
    return labels, segments, weight


def by_sequence(losses, labels, segments, weight):
    """The mean over sequences of the weighted mean of each, in longdouble."""
    losses, weight = (np.asarray(x, np.longdouble) for x in (losses, weight))
    counts = (np.asarray(labels) != -100) & (weight != 0)
    means = []
    for row in range(R):
        for segment in np.unique(segments[row]):
            here = counts[row] & (segments[row] == segment)
            if here.any():
                s = weight[row][here]
                means.append(np.sum(s * losses[row][here]) / np.sum(s))
    return np.mean(means), len(means)


LOSSES = {
    "cross_entropy": jaxloss.cross_entropy,
    "linear": lambda x, y, **options: jaxloss.linear_cross_entropy(
        x, jnp.eye(C, dtype=x.dtype), y, chunk_size=7, **options
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighted", [None, "boolean", "float32"])
@pytest.mark.parametrize("in_segments", [False, True])
def test_the_mean_is_over_sequences(in_segments, weighted, loss):
    labels, segments, s = packed()
    x = np.random.default_rng(5).normal(size=(R, T, C)).astype(np.float32) * 3
    options, s = {}, s.astype(np.float32)
    if weighted:
        options["sample_weight"] = jnp.asarray(s > 0.5 if weighted == "boolean" else s)
    if in_segments:
        options["segment_ids"] = jnp.asarray(segments)
    s = np.asarray(options.get("sample_weight", np.ones((R, T))))
    w = jaxloss.sequence_weight(labels, **options)
    assert w.dtype == jnp.float32
    counts = (labels != -100) & (s != 0)
    assert np.all(np.asarray(w)[~counts] == 0)
    assert np.all(np.asarray(w)[counts] > 0)
    truth = reference(x, np.where(counts, labels, -100), reduction="none").loss
    expected, sequences = by_sequence(truth, labels, segments if in_segments else 0 * segments, s)
    assert_within(jnp.sum(w), sequences, 4 * EPS)
    got = LOSSES[loss](x, jnp.asarray(labels), sample_weight=w)
    # Every term is positive: each is off by its own few roundings and those of the sums.
    assert_within(got, expected, 64 * EPS)
    plain = LOSSES[loss](x, jnp.asarray(labels), sample_weight=jnp.asarray(s))
    assert abs(float(plain) - expected) > 1e-3 * expected  # it is another mean


@pytest.mark.nan_is_meant
def test_ids_out_of_range_are_nan_where_they_count():
    labels = jnp.array([[1, 2, 3, -100, 4, 5], [1, 1, 1, 1, 1, 1]])
    ids = np.array([[0, 3, 0, 3, -1, 2], [0, 0, 1, 1, 2, 2]])
    for dtype in ("int8", "int32"):
        w = jaxloss.sequence_weight(labels, segment_ids=ids.astype(dtype), num_segments=3)
        expected = [[0.5, np.nan, 0.5, 0, np.nan, 1], [0.5] * 6]
        np.testing.assert_array_equal(w, np.array(expected, np.float32))
    losses = jaxloss.cross_entropy(jnp.zeros((2, 6, 7)), labels, sample_weight=w, reduction="none")
    np.testing.assert_array_equal(np.isnan(losses), np.isnan(w))
    with jax.enable_x64(True):  # compared before they are narrowed: 2^32 is not 0
        wide = jaxloss.sequence_weight(labels[0], segment_ids=jnp.asarray(ids[0]) + 2**32)
        assert np.isnan(np.delete(wide, 3)).all()
    slope = jax.grad(
        lambda s: jnp.sum(
            jaxloss.sequence_weight(labels, segment_ids=ids, num_segments=3, sample_weight=s)[1]
        )
    )(jnp.full((2, 6), 2.0))
    assert np.isfinite(slope).all()


def test_a_full_row_of_sequences_is_counted_from_0_or_1():
    labels = jnp.arange(4)
    for first in (0, 1):
        w = jaxloss.sequence_weight(labels, segment_ids=jnp.arange(4) + first)
        assert w.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0), (0, 3), (2, 2, 3)], ids=str)
def test_any_shape(shape):
    labels = jnp.zeros(shape, jnp.int32)
    for options in ({}, {"segment_ids": labels}):
        w = jaxloss.sequence_weight(labels, **options)
        np.testing.assert_array_equal(w, np.full(shape, 1 / max(shape[-1], 1), np.float32))


def test_ignore_index():
    labels = jnp.array([-100, 2, 0, 1])
    assert jaxloss.sequence_weight(labels, ignore_index=None).tolist() == [0.25] * 4
    w = jaxloss.sequence_weight(labels, ignore_index=0)
    np.testing.assert_array_equal(w, np.float32([1 / 3, 1 / 3, 0, 1 / 3]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32"])
def test_narrow_weights_are_summed_in_float32(dtype):
    s = jnp.full((3000,), 40).astype(dtype)  # their sum is past float16's largest number
    w = jaxloss.sequence_weight(jnp.zeros(3000, jnp.int32), sample_weight=s)
    assert w.dtype == jnp.float32
    np.testing.assert_allclose(w, 1 / 3000, rtol=2 * EPS)


def dense(labels, segments, s):
    """Every pair of tokens of a row, for JAX to differentiate."""
    counts = (labels != -100) & (s != 0)
    same = (segments[:, :, None] == segments[:, None, :]) & counts[:, None, :]
    total = jnp.sum(jnp.where(same, s[:, None, :], 0), axis=-1)
    return jnp.where(counts, s / jnp.where(counts, total, 1), 0)


@pytest.mark.parametrize("in_segments", [False, True])
def test_derivatives_in_sample_weight(in_segments):
    labels, segments = map(jnp.asarray, packed(3)[:2])
    options = {"segment_ids": segments} if in_segments else {}
    segments = segments if in_segments else 0 * segments
    rng = np.random.default_rng(9)

    @partial(jax.jit, static_argnums=0)
    def modes(f, s, cotangent, direction):
        def total(s):
            return jnp.sum(cotangent * f(s))

        grad = jax.grad(total)
        return (
            jax.jvp(f, (s,), (direction,)),
            grad(s),
            jax.jvp(grad, (s,), (direction,))[1],
            jax.grad(lambda s: jnp.sum(jnp.sin(grad(s))))(s),
        )

    with jax.enable_x64(True):
        s = jnp.asarray(packed(3)[2])
        given = s, *(jnp.asarray(rng.normal(size=(R, T))) for _ in range(2))
        got = modes(lambda s: jaxloss.sequence_weight(labels, sample_weight=s, **options), *given)
        expected = modes(lambda s: dense(labels, segments, s), *given)
        for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert g.dtype == jnp.float64
            np.testing.assert_allclose(g, e, rtol=1e-11, atol=1e-11 * float(jnp.max(jnp.abs(e))))
            assert np.all(np.asarray(g)[(labels == -100) | (s == 0)] == 0)


def test_no_nan_behind_a_select():
    """jax_debug_nans would report it."""
    labels, *_ = packed()

    def total(s):
        return jnp.sum(jaxloss.sequence_weight(labels, sample_weight=s))

    with jax.disable_jit(), jax.debug_nans(True):
        jax.grad(total)(jnp.ones((R, T)))


def test_weights_that_cancel():
    got = jaxloss.sequence_weight(jnp.zeros(3, jnp.int32), sample_weight=jnp.array([1.0, -1.0, 0]))
    assert got.tolist() == [np.inf, -np.inf, 0]


def test_no_array_of_tokens_and_segments():
    labels = jnp.zeros((4, 512), jnp.int32)
    grad = jax.grad(
        lambda s: jnp.sum(
            jnp.sin(jaxloss.sequence_weight(labels, segment_ids=labels, sample_weight=s))
        )
    )
    memory = jax.jit(grad).lower(jnp.ones((4, 512))).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * labels.size  # 513 segments: 2052 bytes a token


def test_every_way_to_run_them():
    labels, segments, s = packed()
    segments = np.sort(segments, axis=-1)
    arrays = (jnp.asarray(labels), jnp.asarray(segments), jnp.asarray(s, jnp.float32))

    def both(tokens, segments, s):
        y = jaxloss.next_token_labels(tokens, segment_ids=segments, where=s != 0)
        return y, jaxloss.sequence_weight(y, segment_ids=segments, sample_weight=s)

    expected = both(*arrays)
    assert np.any(np.asarray(expected[1]) > 0)
    scanned = jax.lax.scan(lambda _, row: (None, both(*row)), None, arrays)[1]
    for got in (jax.jit(both)(*arrays), jax.vmap(both)(*arrays), scanned):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2 * EPS), got, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_rows_split_over_a_mesh(kind):
    mesh = jax.make_mesh((4,), ("t",), axis_types=(kind,))
    labels, segments, s = packed()
    arrays = (jnp.asarray(labels), jnp.asarray(segments), jnp.asarray(s, jnp.float32))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(R, T, C)), jnp.float32)

    def loss(x, labels, segments, s, **names):
        y = jaxloss.next_token_labels(labels, segment_ids=segments)
        w = jaxloss.sequence_weight(y, segment_ids=segments, sample_weight=s)
        return jaxloss.cross_entropy(x, y, sample_weight=w, **names)

    expected = loss(x, *arrays)
    with jax.set_mesh(mesh):
        put = [jax.device_put(a, NamedSharding(mesh, P("t"))) for a in (x, *arrays)]
        got = [jax.jit(loss)(*put)]
        if kind == AxisType.Auto:
            local = jax.shard_map(
                partial(loss, token_axis_name="t"), mesh=mesh, in_specs=P("t"), out_specs=P()
            )
            got.append(jax.jit(local)(*put))
    np.testing.assert_allclose(np.asarray(got), expected, rtol=16 * EPS)


# Errors

TOKENS, MASK = np.zeros((2, 4), np.int32), np.ones((2, 4), bool)
NEXT, WEIGHT = jaxloss.next_token_labels, jaxloss.sequence_weight


@pytest.mark.parametrize(
    ("call", "wrong", "error", "text"),
    [
        (NEXT, {"tokens": None}, TypeError, "tokens must be an array; got None"),
        (
            NEXT,
            {"tokens": TOKENS * 1.0},
            TypeError,
            r"tokens must be token numbers \(an integer dtype\); got float",
        ),
        (NEXT, {"tokens": MASK}, TypeError, r"an integer dtype\); got bool\(2, 4\)"),
        (NEXT, {"tokens": TOKENS[0, 0]}, ValueError, r"must be \[\.\.\., T\]; got a scalar"),
        (
            NEXT,
            {"tokens": TOKENS.astype(np.int8), "ignore_index": -129},
            TypeError,
            r"ignore_index, -129; got int8\(2, 4\)\. Conv",
        ),
        (NEXT, {"ignore_index": 2**31}, TypeError, r"holds .*; got int32\(2, 4\)\.$"),
        (NEXT, {"ignore_index": None}, TypeError, "ignore_index must be an int; got None"),
        (NEXT, {"ignore_index": -1.0}, TypeError, r"ignore_index must be an int; got -1\.0"),
        (
            NEXT,
            {"segment_ids": TOKENS[0]},
            ValueError,
            r"segment_ids must have the shape of tokens, \(2, 4\); got int32\(4,\)",
        ),
        (NEXT, {"segment_ids": MASK}, TypeError, "segment_ids must be sequence numbers"),
        (NEXT, {"where": TOKENS}, TypeError, r"where must be boolean; got int32\(2, 4\)"),
        (
            NEXT,
            {"where": MASK[:1]},
            ValueError,
            r"where must have the shape of tokens, \(2, 4\); got bool\(1, 4\)",
        ),
        (WEIGHT, {"labels": None}, TypeError, "labels must be an array; got None"),
        (
            WEIGHT,
            {"labels": np.ones((2, 4, 3), np.float32)},
            TypeError,
            r"labels must be class indices \(an integer dtype\); got float32\(2, 4, 3\)",
        ),
        (WEIGHT, {"labels": TOKENS[0, 0]}, ValueError, r"must be \[\.\.\., T\]; got a scalar"),
        (
            WEIGHT,
            {"segment_ids": TOKENS[:, :1]},
            ValueError,
            r"segment_ids must have the shape of labels, \(2, 4\); got int32\(2, 1\)",
        ),
        (WEIGHT, {"segment_ids": TOKENS * 1.0}, TypeError, "must be sequence numbers"),
        (WEIGHT, {"num_segments": 3}, ValueError, "counts segment_ids; got 3 without them"),
        (
            WEIGHT,
            {"segment_ids": TOKENS, "num_segments": 0},
            ValueError,
            r"num_segments must be in \[1, 2147483647\]; got 0",
        ),
        (
            WEIGHT,
            {"segment_ids": TOKENS, "num_segments": 2.0},
            TypeError,
            "num_segments must be an int or None; got float",
        ),
        (
            WEIGHT,
            {"sample_weight": np.ones(4, np.float32)},
            ValueError,
            r"sample_weight must have the shape of the losses, \(2, 4\); got float32\(4,\)",
        ),
        (WEIGHT, {"sample_weight": MASK * 1j}, TypeError, "sample_weight must be real or boolean"),
        (WEIGHT, {"ignore_index": 0.5}, TypeError, "ignore_index must be an int or None; got 0.5"),
    ],
)
def test_errors(call, wrong, error, text):
    first = "tokens" if call is NEXT else "labels"
    given = {first: TOKENS, **wrong}
    with pytest.raises(error, match=text) as info:
        call(given.pop(first), **given)
    assert f"{call.__name__}: " in str(info.value)
