"""The passes over rows: which form of one is taken, and its limits. What they compute is tested
where it is used."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle.budget import EPS

import jaxloss
from jaxloss._numerics import passes, ranking
from jaxloss._numerics.logits import Logits, Scaling, scaling_of
from jaxloss._xla import device, indexing
from jaxloss._xla.fusion import index_is_exact


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def program(f, size):
    x, m = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, size), (3,)))
    kept = jax.ShapeDtypeStruct((3,), jnp.int32)
    # A function of its own: JAX keeps a trace, of other circumstances.
    return str(jax.make_jaxpr(lambda x, *args: f(Logits(x), *args))(x, m, kept))


def test_one_device(one_device, monkeypatch):
    assert device.on_one_device()
    for count in (0, 2, 8):
        monkeypatch.setattr(jax, "device_count", lambda count=count: count)
        assert not device.on_one_device()


@pytest.mark.parametrize(
    ("size", "block"),
    [
        (1, 1),
        (16384, 16384),  # short rows are whole
        (16385, 565),  # 5 x 29 x 113
        (16411, 16411),  # a prime
        (32768, 1024),
        (1049 * 1051, 1049),  # none up to 1024
        (256 * 4099, 256),
        (255 * 4099, 255 * 4099),
        (17 * 241 * 4099, 17 * 241 * 4099),  # 4097 is too long
    ],
)
def test_block_sizes(size, block):
    assert passes._block_size(size) == block


@pytest.mark.parametrize(("size", "exact"), [(2**24, True), (2**24 + 1, False), (1, True)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_exact_integers(size, exact, dtype):
    assert index_is_exact(jax.ShapeDtypeStruct((2**25, size), dtype)) == exact


@pytest.mark.parametrize("classes", [7, 200])
@pytest.mark.parametrize("exact", [True, False])
def test_classes_ahead(exact, classes, monkeypatch):
    """Of classes past what float32 counts, in integers."""
    monkeypatch.setattr(ranking, "index_is_exact", lambda _: exact)
    rng = np.random.default_rng(0)
    x = rng.integers(-2, 3, (60, classes)).astype(np.float32)  # many are equal
    x[x == -2] = -np.inf
    label = rng.integers(0, classes, 60).astype(np.int32)
    of_label, j = x[np.arange(60), label], np.arange(classes)
    # The label's own logit, rounded otherwise than here, is not ahead of itself.
    for own in (of_label, of_label - np.float32(0.25)):
        bound, own_class = own[:, None], label[:, None]
        expected = ((x > bound) | ((x == bound) & (j < own_class))) & (j != own_class)
        np.testing.assert_array_equal(ranking.count_ahead(x, own, label), expected.sum(axis=-1))


def test_arrays_are_whole_on_one_device_and_inside_of_shard_map(monkeypatch):
    seen = []

    def note(x):
        seen.append(device.is_whole())
        return x

    mesh = jax.make_mesh((1,), ("data",))
    for count in (1, 8):
        monkeypatch.setattr(jax, "device_count", lambda count=count: count)
        note(0)
        jax.eval_shape(jax.shard_map(note, mesh=mesh, out_specs=P()), jnp.float32(0))
    assert seen == [True, True, False, True]


def test_the_other_exponentials_are_overwritten_on_long_rows_of_one_device(one_device):
    assert "scatter" not in program(passes.other_exponentials, 255)
    assert "scatter" in program(passes.other_exponentials, 256)


def test_the_sum_goes_in_blocks_on_long_rows_of_one_device(one_device):
    assert "platform_index" not in program(passes.sum_exponentials, 16384)
    assert "platform_index" in program(passes.sum_exponentials, 32768)
    assert "platform_index" not in program(passes.sum_exponentials, 16411)


@pytest.mark.parametrize(
    ("size", "count"),
    [(255, None), (256, 16), (1000, 20), (32000, 16), (50257, 29), (30522, 6), (32749, None)],
)
def test_into_how_many_rows_a_row_is_folded(size, count):
    assert passes._columns(size) == count


def place(logits, *_):
    return passes.max_and_place(logits)


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_maximum_and_its_place_from_columns(one_device, dtype, masked):
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 9, (9, 300)).astype(np.float32)  # many are equal
    x[0, 299] = x[1, 0] = 20
    x[2], x[3, 5:] = -np.inf, -np.inf
    x[4, 7], x[5, 8] = np.inf, np.nan
    mask = rng.random((9, 300)) < 0.5 if masked else np.ones((9, 300), bool)
    mask[8] = not masked
    given = jnp.asarray(mask) if masked else None
    assert "platform_index" in program(place, 300)
    m, found = passes.max_and_place(Logits(jnp.asarray(x, dtype), given))
    existing = np.where(mask, x, -np.inf)
    np.testing.assert_array_equal(m, existing.max(axis=-1))
    assert m.dtype == jnp.float32
    assert found.dtype == jnp.int32
    some = ~np.isnan(existing).any(axis=-1)
    at = existing[np.arange(9), found]
    np.testing.assert_array_equal(at[some], existing.max(axis=-1)[some])


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("size", [600, 599, 631])  # the last two are primes
@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_largest_of_groups(one_device, k, size):
    rng = np.random.default_rng(0)
    x = rng.integers(-40, 40, (60, size)).astype(np.float32)  # many are equal
    x[0], x[1, 5:], x[2, 7], x[6, :-9] = -np.inf, -np.inf, np.inf, -np.inf
    x[3] = np.where(rng.random(size) < 0.5, 0.0, -0.0)
    x[4, -1] = x[4, 0] = 50
    x[5], x[7] = rng.normal(size=size), np.sort(rng.normal(size=size))
    given = jnp.asarray(x)
    best, found = jax.jit(partial(passes.top_k, k=k))(given)
    assert "max" in str(jax.make_jaxpr(partial(passes.top_k, k=k))(given))
    expected = jax.lax.top_k(jnp.where(given == 0, 0, given), k)  # it puts 0 before -0
    np.testing.assert_array_equal(found, expected[1])
    np.testing.assert_array_equal(best, expected[0])
    few = given[:, :9]
    got, expected = (f(few, k) for f in (passes.top_k, jax.lax.top_k))
    np.testing.assert_array_equal(got[0], expected[0])


def test_the_largest_of_what_a_device_holds_are_found_by_groups():
    """Inside of ``shard_map`` over all axes no partitioner splits the classes."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    spec = jax.P("x")
    largest = jax.shard_map(partial(passes.top_k, k=3), mesh=mesh, in_specs=spec, out_specs=spec)
    x = jax.device_put(
        np.random.default_rng(0).normal(size=(8, 599)).astype(np.float32),
        jax.NamedSharding(mesh, spec),
    )
    assert "max" in str(jax.make_jaxpr(largest)(x))
    got, expected = largest(x), jax.lax.top_k(np.asarray(x), 3)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])


def test_sharded_rows_are_neither_indexed_nor_reshaped():
    for f in (passes.other_exponentials, passes.sum_exponentials, place):
        text = program(f, 32768)
        assert "scatter" not in text
        assert "gather" not in text
        assert not re.search(r"\[\d+,\d+,\d+\]|\[\d{3,},\d+\]", text)


def test_predictions_are_found_by_argmax_where_rows_are_whole(monkeypatch):
    """Of classes split over devices it would gather a pair from each."""

    def largest(logits, *_):
        return ranking.prediction(logits, 0, ())

    for whole in (True, False):
        monkeypatch.setattr(device, "is_whole", lambda whole=whole: whole)
        assert ("argmax" in program(largest, 100)) == whole


@pytest.mark.parametrize("spec", [P(), P("t"), P("t", None), P(None, "v"), P("t", "v")], ids=str)
def test_which_classes_are_split(spec):
    mesh = jax.make_mesh((2, 4), ("t", "v"), axis_types=(AxisType.Explicit,) * 2)
    x = jax.device_put(jnp.zeros((4, 8)), NamedSharding(mesh, spec))
    assert indexing.classes_are_split(x) == ("v" in tuple(spec))
    assert not indexing.classes_are_split(jnp.zeros((4, 8)))


def near_max(logits, m, _):
    return passes.near_max(logits, m)


def count_ahead(logits, *of_label):
    return ranking.count_ahead(logits.values, *of_label)


@pytest.mark.parametrize(
    ("f", "compared"),
    [(passes._sum_of_others, " eq "), (near_max, "argmax"), (count_ahead, " gt ")],
    ids=["sum", "near_max", "ahead"],
)
def test_rows_are_compared_only_past_the_exact_integers(f, compared):
    """XLA:CPU writes the comparison out."""
    assert compared not in program(f, 2**24)
    assert compared in program(f, 2**24 + 1)


def test_what_is_read_is_gathered_and_what_is_narrow_is_written_as_bits():
    index = jnp.zeros((3, 2), jnp.int32)
    x = jnp.zeros((3, 5), jnp.bfloat16)
    for f in (
        lambda x: indexing.gather_class(x, index[:, 0]),
        lambda x: indexing.gather_classes(x, index),
    ):
        assert "gather" in str(jax.make_jaxpr(f)(x))

    def put(x):
        return indexing.scatter_classes(x, index, jnp.ones((3, 2), x.dtype))

    assert "u16[3,5] = scatter" in str(jax.make_jaxpr(put)(x))
    assert "f32[3,5] = scatter" in str(jax.make_jaxpr(put)(x.astype(jnp.float32)))


def test_no_index_is_out_of_bounds():
    """As JAX's own checks see it: the gathers promise that none is."""
    x = jnp.arange(10.0).reshape(2, 5)
    index = jnp.array([[0, 4, 5], [1, 5, 7]], jnp.int32)
    checked = checkify.checkify(indexing.gather_classes, errors=checkify.index_checks)
    error, found = checked(x, index)
    assert error.get() is None
    np.testing.assert_array_equal(found, [[0, 4, 4], [6, 9, 9]])
    error, found = checkify.checkify(indexing.gather_class, errors=checkify.index_checks)(
        x, index[:, 2]
    )
    assert error.get() is None
    np.testing.assert_array_equal(found, [4, 9])


def test_scaling():
    assert scaling_of(None) is None
    assert scaling_of(None, 1) is None
    assert scaling_of(None, 2) == Scaling(None, 0.5)
    assert scaling_of(3.0) == Scaling(3.0, 3.0)
    x = jnp.array([[1.0, -4.0]])
    mask = jnp.array([[True, False]])
    for scaling, expected in (
        (scaling_of(None, 2), [[0.5, -jnp.inf]]),
        (scaling_of(4.0, 1), [[4 * np.tanh(0.25), -jnp.inf]]),
        (scaling_of(4.0, 2), [[2 * np.tanh(0.25), -jnp.inf]]),
    ):
        logits = Logits(x, mask, scaling)
        got = logits.nats(logits.wide())
        np.testing.assert_allclose(got, expected, rtol=2 * EPS)


def test_the_first_of_the_largest():
    """Not one that a rounding of a huge logit brings near, and at 0 as anywhere."""
    rows = [[0.0, 1.0, 1.0], [-1.0, 0.0, -1.0], [-3e38, -3e38, 1e-38], [7.0, 7.0, 8.0]]
    x = jnp.pad(jnp.array(rows), ((0, 0), (97, 0)), constant_values=-jnp.inf)
    found = passes.near_max(Logits(x), jnp.max(x, axis=-1))
    np.testing.assert_array_equal(found, jnp.argmax(x, axis=-1))
    mask = jnp.arange(100) < 99
    logits = Logits(x, mask[None])
    found = passes.near_max(logits, passes.row_max(logits))
    np.testing.assert_array_equal(found, jnp.argmax(jnp.where(mask, x, -jnp.inf), axis=-1))


@pytest.mark.nan_is_meant
def test_no_prediction():
    x = jnp.array([[1.0, jnp.nan], [1.0, jnp.inf], [0.0, 1.0]])
    np.testing.assert_array_equal(ranking.prediction(Logits(x), 0, ()), [-1, -1, 1])
    np.testing.assert_array_equal(ranking.prediction(Logits(x), 5, ()), [-1, -1, 6])


def rows_that_hurt():
    """Logits, and labels of which some are past the end."""
    rng = np.random.default_rng(8)
    x = 9 * rng.normal(size=(9, 37))
    kept = rng.integers(0, 37, 9)
    kept[:3] = 37
    x[1, 5] = x[1].max()  # two maxima
    x[2, 10:] = -np.inf
    x[3] = -np.inf
    x[4, [3, 20]] = np.inf
    x[5, 7] = np.nan
    x[6, kept[6]] = 80.0  # the kept entry is the maximum
    x[7, kept[7]] = -np.inf
    x[8] = 1e4 + x[8]
    return jnp.asarray(x, jnp.float32), jnp.asarray(kept, jnp.int32)


@pytest.mark.nan_is_meant
def test_one_reduction_gives_the_maximum_and_the_sum():
    x, kept = rows_that_hurt()
    m, s = passes.max_and_sum_in_one(x, kept)
    wide = np.asarray(x, np.float64)
    high = wide.max(axis=-1)
    np.testing.assert_array_equal(m, high)
    with np.errstate(invalid="ignore"):
        e = np.exp(wide - np.where(high == -np.inf, 0, high)[:, None])
    e[np.arange(9)[kept < 37], kept[kept < 37]] = 0
    np.testing.assert_array_equal(np.isnan(s), [False] * 4 + [True] * 2 + [False] * 3)
    # Each of 37 terms is rounded when it is scaled, at most once for each merge above it.
    np.testing.assert_allclose(s, e.sum(axis=-1), rtol=40 * np.finfo(np.float32).eps, atol=1e-38)


@pytest.mark.nan_is_meant
def test_the_reduction_has_the_derivative_of_the_sum_with_and_without_its_rule():
    x, kept = rows_that_hurt()
    rows = np.array([0, 1, 2, 6, 7, 8])
    x, kept = x[rows], kept[rows]
    direction = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)

    def in_two(x, kept):
        m = passes.row_max(Logits(x))
        return m, passes.sum_exponentials(Logits(x), m, kept)

    rule = passes.max_and_sum_in_one
    for form in (rule, rule.fun):
        (m, s), (dm, ds) = jax.jvp(lambda x, f=form: f(x, kept), (x,), (direction,))
        expected = jax.jvp(lambda x: in_two(x, kept), (x,), (direction,))[1][1]
        np.testing.assert_array_equal(dm, 0)
        np.testing.assert_allclose(ds, expected, rtol=1e-5, atol=1e-6 * float(jnp.max(s)))
        assert m.shape == s.shape == (6,)


@pytest.mark.parametrize(("platform", "results"), [("cpu", [1, 1]), ("cuda", [2]), ("tpu", [2])])
def test_accelerators_reduce_the_logits_once(platform, results):
    """``results``: of each reduction over all of the logits."""
    shapes = jax.ShapeDtypeStruct((64, 1000), jnp.bfloat16), jax.ShapeDtypeStruct((64,), jnp.int32)
    text = jax.jit(jaxloss.cross_entropy).trace(*shapes).lower(lowering_platforms=(platform,))
    reductions = [line for line in text.as_text().splitlines() if "stablehlo.reduce(" in line]
    over_logits = [line for line in reductions if "tensor<64x1000x" in line]
    assert [line.count("init:") for line in over_logits] == results


@pytest.mark.parametrize(
    ("shape", "dtype", "held"),
    [
        ((3, 100000), jnp.float32, True),  # no copy: it stands where the gradient will
        ((3, 255), jnp.bfloat16, True),
        ((3, 256), jnp.bfloat16, False),
        ((300, 3, 255), jnp.float16, True),
        ((2048, 128), jnp.bfloat16, True),  # 1 MiB of float32
        ((2049, 128), jnp.bfloat16, False),
        ((257, 1), jnp.bfloat16, True),
    ],
)
def test_which_exponentials_are_held(shape, dtype, held):
    assert passes.keeps_exponentials(jax.ShapeDtypeStruct(shape, dtype)) == held


@pytest.mark.parametrize(
    ("f", "times"),
    [
        (jaxloss.cross_entropy, 0),
        (jax.value_and_grad(jaxloss.cross_entropy), 2),
    ],
    ids=["value", "gradient"],
)
def test_exponentials_are_held_where_their_gradient_follows(one_device, f, times):
    """Written out with the kept entry overwritten, as the gradient needs them too. Else summed."""
    shapes = jax.ShapeDtypeStruct((3, 300), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int32)
    text = str(jax.make_jaxpr(lambda *args: f(*args))(*shapes))
    assert len(re.findall(r"\bscatter\b", text)) == times


@pytest.mark.parametrize(
    "scaling",
    [scaling_of(3.0, 0.25), scaling_of(3.0, 1.0), scaling_of(None, 0.25)],
)
def test_slopes_of_the_scaling(scaling):
    x = jnp.linspace(-9, 9, 37)

    def f(x):
        logits = Logits(x, scaling=scaling)
        return logits.nats(logits.wide())

    slopes = jax.vmap(jax.grad(f))(x)
    got = Logits(x, scaling=scaling).slope()
    np.testing.assert_allclose(got, slopes, rtol=1e-5, atol=1e-7)
