"""The hand-written kernels, interpreted on a CPU: against float64, and against XLA's schedule."""

from dataclasses import replace
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from chips import kernels_of
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracle.budget import EPS
from oracle.draw import product_of_bfloat16
from oracle.truth import wide

import jaxloss
from jaxloss._linear import pallas_rows, vocab_blocks
from jaxloss._linear.product import Product
from jaxloss._numerics import label_offset, parts
from jaxloss._numerics.logits import Logits
from jaxloss._pallas import linear_tpu

NAME, SLOPE = "jaxloss_linear_row_part", "jaxloss_linear_slope"
ALL_COUNT = {"ignore_index": None}


@pytest.fixture
def tpu():
    with kernels_of("tpu", devices=1, runs=True):
        yield


def program(*args, **options):
    """What linear_cross_entropy would run, as text."""
    return str(jax.make_jaxpr(lambda *a: jaxloss.linear_cross_entropy(*a, **options))(*args))


problem = partial(product_of_bfloat16, scale=1.0)


def assert_to_bfloat16(results, expected):
    """Rounded to bfloat16, where values that differ by a float32's rounding part by a unit."""
    for got, truth in zip(results, expected, strict=True):
        size = np.max(np.abs(wide(truth)))
        np.testing.assert_allclose(wide(got), wide(truth), rtol=2**-7, atol=2**-9 * size)


@pytest.mark.parametrize(
    ("tokens", "features", "expected"),
    [
        (8192, 2048, (1024, 512)),
        (8192, 8192, (512, 512)),
        (8192, 12288, (256, 512)),
        (8192, 16384, (256, 256)),
        (8192, 24576, (128, 256)),
        (8192, 65536, None),
        (100, 2048, (112, 512)),  # whole groups of 16 rows
        (1, 8, (16, 512)),
    ],
)
def test_tiles(tokens, features, expected):
    assert linear_tpu.tiles(tokens, features) == expected


PRODUCTS = [
    (7, 16, 512, 512, False),  # one tile
    (40, 24, 1100, 1100, True),  # three, the last over the edge
    (33, 16, 700, 600, True),  # padded columns
    (1040, 16, 513, 513, False),  # two tiles of tokens
    (3, 16, 1, 1, False),
]


@pytest.mark.nan_is_meant  # the interpreter's memory is NaN until it is written
@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize(("n", "d", "v", "columns", "with_bias"), PRODUCTS)
def test_row_part(tpu, vocab_axis, n, d, v, columns, with_bias):
    hidden, kernel, kept, bias = problem(n, d, v, vocab_axis)
    kept = jnp.where(jnp.arange(n) % 5 == 1, columns, kept % columns)  # columns: no such label
    bias = bias if with_bias else None
    m, s, x_kept = linear_tpu.row_part(hidden, kernel, bias, kept, vocab_axis, columns)
    x = wide(hidden) @ (wide(kernel) if vocab_axis == 1 else wide(kernel).T)
    x = (x if bias is None else x + wide(bias))[:, :columns]
    # A logit is a sum of d products, and known to so many roundings of their magnitudes.
    size = np.abs(wide(hidden)) @ np.abs(wide(kernel) if vocab_axis == 1 else wide(kernel).T)
    known = (d + 2) / 2 * EPS * np.max(size, axis=-1) + EPS * np.max(np.abs(x), axis=-1)
    high, here, rows = x.max(axis=-1), np.asarray(kept) < columns, np.arange(n)
    assert np.all(np.abs(wide(m) - high) <= known)
    e = np.exp(x - wide(m)[:, None])
    e[rows[here], np.asarray(kept)[here]] = 0
    truth = e.sum(axis=-1)
    tiles = -(-columns // 512)
    allowed = truth * (known + EPS * (np.max(high[:, None] - x) / 2 + 8 + 2 * tiles))
    assert np.all(np.abs(wide(s) - truth) <= allowed)
    np.testing.assert_array_equal(np.isnan(x_kept), ~here)
    own = x[rows[here], np.asarray(kept)[here]]
    assert np.all(np.abs(wide(x_kept)[here] - own) <= known[here])


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize(("n", "d", "v", "columns", "with_bias"), PRODUCTS)
def test_exponentials(tpu, vocab_axis, n, d, v, columns, with_bias):
    hidden, kernel, label, bias = problem(n, d, v, vocab_axis)
    label = jnp.where(jnp.arange(n) % 5 == 1, columns, label % columns)  # columns: no such label
    bias = bias if with_bias else None
    right = wide(kernel) if vocab_axis == 1 else wide(kernel).T
    x = wide(hidden) @ right
    x = (x if bias is None else x + wide(bias))[:, :columns]
    at, own = np.arange(n), np.asarray(label)
    here = own < columns
    # Near the row's largest; of a few rows so little that their sums are past the most.
    offset = np.where(at % 7 == 3, -100.0, x.max(axis=-1) - 3).astype(np.float32)
    given = hidden, kernel, bias, label, jnp.asarray(offset), label_offset.HIGHEST
    e, s, x_label = linear_tpu.exponentials(*given, vocab_axis, columns)
    assert e.shape == (n, v)
    assert e.dtype == jnp.bfloat16
    assert not np.any(wide(e)[:, columns:])
    truth = np.exp(np.minimum(x - offset[:, None], label_offset.HIGHEST))
    truth[at[here], own[here]] = 0
    size = np.abs(wide(hidden)) @ np.abs(right)
    known = (d + 2) / 2 * EPS * np.max(size, axis=-1) + EPS * np.max(np.abs(x), axis=-1)
    allowed = known + EPS * (np.max(np.abs(x - offset[:, None]), axis=-1) / 2 + 16)
    assert np.all(np.abs(wide(s) - truth.sum(axis=-1)) <= allowed * truth.sum(axis=-1))
    assert np.all(np.abs(wide(e)[:, :columns] - truth) <= (allowed[:, None] + 2.0**-8) * truth)
    assert np.all(np.abs(wide(x_label)[here] - x[at[here], own[here]]) <= known[here])


@pytest.mark.nan_is_meant
def test_float32_operands_of_narrow_products(tpu):
    """They take the kernels too, and their gradients are not rounded to bfloat16."""
    *operands, labels, _ = problem(40, 24, 1100, 1)
    given = [x.astype(jnp.float32) for x in operands]
    assert NAME in program(*given, labels, dtype=jnp.bfloat16, **ALL_COUNT)
    loss = partial(jaxloss.linear_cross_entropy, **ALL_COUNT)
    found = jax.grad(partial(loss, dtype=jnp.bfloat16), (0, 1))(*given, labels)
    rounded = jax.grad(loss, (0, 1))(*operands, labels)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.float32)}
    for x, y in zip(found, rounded, strict=True):
        assert jnp.any(x != y.astype(jnp.float32))
        np.testing.assert_array_equal(x.astype(jnp.bfloat16), y)


SHAPES = [(7, 16, 512, False), (40, 24, 1100, True), (1040, 16, 513, False), (3, 16, 1, True)]


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize(("n", "d", "v", "with_bias"), SHAPES)
def test_slope(tpu, vocab_axis, n, d, v, with_bias):
    """Of one tile, over the edges of several, and with rows that ask for nothing and hold NaN."""
    hidden, kernel, kept, bias = problem(n, d, v, vocab_axis)
    bias = bias if with_bias else None
    x = wide(hidden) @ (wide(kernel) if vocab_axis == 1 else wide(kernel).T)
    x = x if bias is None else x + wide(bias)
    active, here = np.arange(n) % 3 != 1, np.arange(n) % 5 != 2
    rng = np.random.default_rng(1)
    m = x.max(axis=-1).astype(np.float32)
    scale, at_kept = rng.normal(size=(2, n)).astype(np.float32)
    given = m, jnp.where(here, kept, v), scale, at_kept, active
    rows = jnp.where(active[:, None], hidden, jnp.nan)
    given_rows = tuple(map(jnp.asarray, given))
    got = linear_tpu.slope(rows, kernel, bias, given_rows, vocab_axis)
    truth = np.where(active, scale, 0)[:, None] * np.exp(x - m[:, None])
    truth[here, np.asarray(kept)[here]] = at_kept[here]
    assert got.dtype == jnp.bfloat16
    # What the logits are not known to, and one rounding.
    size = np.abs(wide(hidden)) @ np.abs(wide(kernel) if vocab_axis == 1 else wide(kernel).T)
    known = (d + 2) / 2 * EPS * np.max(size) + 2 * EPS * np.max(np.abs(x)) + 4 * EPS
    allowed = np.abs(truth) * (2**-8 + known + EPS * np.max(m[:, None] - x))
    assert np.all(np.abs(wide(got) - truth) <= allowed + 2**-126)


def test_who_computes_the_slopes(tpu):
    """The kernel narrows them, and a gradient of the bias is a sum of them in float32."""
    hidden, kernel, labels, bias = problem(24, 16, 1100)

    def loss(hidden, kernel, bias):
        return jaxloss.linear_cross_entropy(hidden, kernel, labels, bias=bias)

    for which, taken in (((0, 1), True), (0, True), (2, False), ((0, 1, 2), False)):
        text = str(jax.make_jaxpr(jax.grad(loss, which))(hidden, kernel, bias))
        assert (NAME in text, SLOPE in text) == (True, taken)


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_tiles_past_the_tokens_that_count_are_left_out(tpu, vocab_axis):
    hidden, kernel, kept, _ = problem(1040, 16, 1100, vocab_axis)
    given = hidden, kernel, None, kept, vocab_axis, 1100
    whole = linear_tpu.row_part(*given)
    few = linear_tpu.row_part(*given, jnp.int32(5))
    for x, of_few, blank in zip(whole, few, (-jnp.inf, 0, -jnp.inf), strict=True):
        np.testing.assert_array_equal(of_few[:1024], x[:1024])
        np.testing.assert_array_equal(of_few[1024:], blank)
    for x in linear_tpu.row_part(*given, jnp.int32(0)):
        assert not np.any(np.isfinite(x) & (x != 0))


@pytest.mark.jax_leaks("the interpreter of kernels for TPUs")
def test_tiles_do_not_race():
    """Two cores, each with rows of its own, in an order drawn at random."""
    hidden, kernel, kept, _ = problem(1040, 16, 1100)
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    with pltpu.force_tpu_interpret_mode(params):
        m, s, x_kept = linear_tpu.row_part(hidden, kernel, None, kept, 1, 1100)
    assert not interpreter.races.races_found
    assert np.all(np.isfinite([m, s, x_kept]))


def test_a_batch_of_calls(tpu):
    hidden, kernel, kept, _ = problem(48, 16, 700)
    batch = jax.vmap(linear_tpu.row_part, (0, None, None, 0, None, None))
    got = batch(hidden.reshape(2, 24, 16), kernel, None, kept.reshape(2, 24), 1, 700)
    for x, y in zip(got, linear_tpu.row_part(hidden, kernel, None, kept, 1, 700), strict=True):
        np.testing.assert_array_equal(x.reshape(48), y)


@pytest.mark.nan_is_meant
def test_rows_of_nothing_and_of_nan(tpu):
    """Each row answers for itself; classes at -inf are none."""
    hidden, kernel, kept, _ = problem(16, 8, 600)
    bias = jnp.full(600, -jnp.inf, jnp.bfloat16)
    m, s, x_kept = linear_tpu.row_part(hidden, kernel, bias, kept, 1, 600)
    np.testing.assert_array_equal(m, -jnp.inf)
    np.testing.assert_array_equal(s, 0)
    np.testing.assert_array_equal(x_kept, -jnp.inf)
    _, s, _ = linear_tpu.row_part(hidden.at[3].set(jnp.nan), kernel, None, kept, 1, 600)
    np.testing.assert_array_equal(np.isnan(s), np.arange(16) == 3)
    _, s, _ = linear_tpu.row_part(hidden, kernel, bias.at[:7].set(0), kept % 7, 1, 600)
    assert np.all(wide(s) < 6)


CALLS = {
    "plain": {},
    "weighed": {"weighed": True, "num_classes": 1000, "vocab_axis": 0},
    "each": {"reduction": "none", "with_bias": True, "z_loss": 1e-3},
}


def call(implementation, with_bias=False, weighed=False, **options):
    """(A function of hidden and kernel, both.)"""
    hidden, kernel, labels, bias = problem(24, 16, 1100, options.get("vocab_axis", 1))
    labels = (labels % options.get("num_classes", 1100)).at[3].set(-100)
    if weighed:
        rng = np.random.default_rng(1)
        options["weight"] = jnp.asarray(rng.random(1000) + 0.1, jnp.float32)
        options["sample_weight"] = jnp.arange(24) % 3 != 0
    if with_bias:
        options["bias"] = bias
    loss = partial(
        jaxloss.linear_cross_entropy, implementation=implementation, chunk_size=600, **options
    )
    return (lambda h, k: jnp.sum(loss(h, k, labels))), (hidden, kernel)


def first_order(f, args):
    return jax.value_and_grad(f, (0, 1))(*args), jax.jvp(f, args, tuple(map(jnp.cos, args)))[1]


def second_order(f, args):
    grad = jax.grad(f, (0, 1))

    def squared(*args):
        return sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in grad(*args))

    tangents = jax.jvp(grad, args, tuple(map(jnp.cos, args)))[1]
    return tangents, jax.grad(squared, (0, 1))(*args)


@pytest.mark.parametrize(
    ("name", "derivatives"),
    [*((name, first_order) for name in CALLS), ("plain", second_order)],
)
def test_every_mode_equals_that_of_vocab_blocks(tpu, name, derivatives):
    results = []
    for implementation in ("mosaic_tpu", "vocab_blocks"):
        f, args = call(implementation, **CALLS[name])
        compute = jax.jit(partial(derivatives, f))
        assert (NAME in str(jax.make_jaxpr(compute)(args))) == (implementation == "mosaic_tpu")
        results.append(jax.tree.leaves(compute(args)))
    assert_to_bfloat16(*results)


HOW = {
    "ignore_index": lambda counts, labels: (jnp.where(counts, labels, -100), {}),
    "sample_weight": lambda counts, labels: (labels, {"sample_weight": jnp.where(counts, 0.5, 0)}),
    "where": lambda counts, labels: (labels, {"where": counts}),
}


@pytest.mark.nan_is_meant
@pytest.mark.parametrize(
    ("number", "how", "reduction"),
    [
        (0, "where", "mean"),
        (5, "ignore_index", "mean"),
        (6, "where", "none"),
        (9, "sample_weight", "mean"),
        (23, "ignore_index", "none"),
    ],
)
def test_tokens_that_do_not_count(tpu, number, how, reduction):
    """Whatever they hold; a quarter of the tokens, a half or all are computed."""
    hidden, kernel, labels, bias = problem(24, 16, 1100)
    counts = jnp.asarray(np.random.default_rng(2).permutation(24) < number)
    labels, options = HOW[how](counts, labels)
    hidden = jnp.where(counts[:, None], hidden, jnp.nan)

    def loss(name, *operands):
        each = jaxloss.linear_cross_entropy(
            *operands[:2], labels, bias=operands[2], implementation=name, reduction=reduction,
            **options,
        )  # fmt: skip
        return jnp.sum(each * jnp.cos(jnp.arange(each.size, dtype=each.dtype).reshape(each.shape)))

    given = hidden, kernel, bias
    results = {}
    for name in (None, "token_chunks"):
        compute = jax.jit(jax.value_and_grad(partial(loss, name), (0, 1, 2)))
        assert (NAME in str(jax.make_jaxpr(compute)(*given))) == (name is None)
        results[name] = compute(*given)
    (value, grads), (expected, expected_grads) = results.values()
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_array_equal(grads[0][~counts], 0)
    assert_to_bfloat16(grads, expected_grads)


@pytest.mark.parametrize("number", [5, 23])
def test_a_bias_whose_exponential_overflows(tpu, number):
    """The logits of a token that does not count are the bias, and 0 * inf is NaN."""
    hidden, kernel, labels, bias = problem(24, 16, 1100)
    labels = jnp.where(jnp.arange(24) < number, labels, -100)
    bias = bias.at[7].set(300)
    loss = partial(jaxloss.linear_cross_entropy, reduction="sum")
    for derivatives in (first_order, second_order):
        results = []
        for name in (None, "vocab_blocks"):

            def f(hidden, kernel, name=name):
                return loss(hidden, kernel, labels, bias=bias, implementation=name)

            results.append(jax.tree.leaves(jax.jit(partial(derivatives, f))((hidden, kernel))))
        assert_to_bfloat16(*results)


@pytest.mark.parametrize(
    ("number", "computed"), [(0, 3), (3, 3), (4, 5), (5, 5), (6, 10), (10, 10)]
)
def test_the_gradients_of_few_tokens_are_those_of_a_smaller_program(number, computed):
    valid = jnp.asarray(np.random.default_rng(0).permutation(10) < number)
    hidden = jnp.arange(1.0, 11.0)[:, None]

    def sweep(operands, constants, factor, nothing):
        del nothing
        own = operands.product
        total = (own.hidden + constants.label[:, None]) * factor[:, None]
        size = jnp.full(2, own.hidden.shape[0])
        return operands._replace(product=replace(own, hidden=total, kernel=size))

    operands = vocab_blocks.Operands(Product(hidden, jnp.zeros(2), None, 1, 2))
    constants = vocab_blocks.Constants(jnp.arange(10.0), valid=valid)
    factor = jnp.where(valid, jnp.arange(10.0), 0)
    total = jax.jit(partial(vocab_blocks._of_valid, sweep))(operands, constants, factor, None)
    np.testing.assert_array_equal(total.product.kernel, computed)
    truth = (hidden[:, 0] + jnp.arange(10.0)) * factor
    np.testing.assert_array_equal(total.product.hidden[:, 0], truth)


@pytest.mark.parametrize(("options", "may_be_few"), [({}, True), (ALL_COUNT, False)], ids=str)
def test_programs_of_fewer_tokens(tpu, options, may_be_few):
    """Only where some may not count."""
    hidden, kernel, labels, _ = problem(24, 16, 1100)
    loss = jax.grad(partial(jaxloss.linear_cross_entropy, **options))
    text = str(jax.make_jaxpr(loss)(hidden, kernel, labels))
    assert ("bf16[6,16]" in text) == ("bf16[12,16]" in text) == may_be_few
    assert "bf16[24,16]" in text


def test_a_batch_of_losses(tpu):
    """Each with a number of tokens of its own."""
    hidden, kernel, labels, _ = problem(48, 16, 700)
    labels = labels.reshape(2, 24).at[0, 3:].set(-100)
    loss = jax.value_and_grad(partial(jaxloss.linear_cross_entropy, implementation="mosaic_tpu"))
    given = hidden.reshape(2, 24, 16), kernel, labels
    assert NAME in str(jax.make_jaxpr(jax.vmap(loss, (0, None, 0)))(*given))
    batch = jax.jit(jax.vmap(loss, (0, None, 0)))(*given)
    for i in range(2):
        one = jax.jit(loss)(given[0][i], kernel, labels[i])
        for got, expected in zip(batch, one, strict=True):
            np.testing.assert_allclose(wide(got[i]), wide(expected), rtol=2**-7, atol=1e-6)


def test_a_batch_inside_of_shard_map(tpu):
    """Of counts that differ: a loop over the batch. Traced, as it does not run there."""
    hidden, kernel, labels, _ = problem(64, 16, 600)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    loss = jax.value_and_grad(partial(jaxloss.linear_cross_entropy, implementation="mosaic_tpu"))

    def local(hidden, kernel, labels):
        rows = hidden.reshape(2, 32, 16), kernel, labels.reshape(2, 32)
        out = jax.vmap(loss, (0, None, 0))(*rows)
        return jax.tree.map(lambda x: x.reshape(1, -1), out)

    specs = P("data"), P(), P("data")
    call = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"))
    text = str(jax.make_jaxpr(call)(hidden, kernel, labels))
    assert NAME in text
    assert SLOPE in text


@pytest.mark.nan_is_meant
def test_devices_with_numbers_of_their_own(tpu, monkeypatch):
    """Tokens and classes split over a mesh, whose first row computes a quarter of its tokens.

    The interpreter does not run inside of shard_map: what the kernel computes is XLA's here.
    """

    def computed(product, kept, count):
        part = parts.row_part(parts.Rows(Logits(product.logits()), kept), ())
        past = jnp.arange(kept.size, dtype=jnp.int32) >= count
        some = (jnp.where(past, jnp.nan, x) for x in (part.m, part.s, part.x_omitted))
        return parts.RowPart(*some, kept)

    monkeypatch.setattr(pallas_rows, "_computed", computed)
    monkeypatch.setattr(pallas_rows, "slope", pallas_rows._slope_by_xla)
    mesh = jax.make_mesh((2, 2), ("data", "vocab"), axis_types=(AxisType.Auto,) * 2)
    hidden, kernel, labels, bias = problem(48, 16, 1100)
    labels, bias = labels.at[3:24].set(-100), bias.at[7].set(100)

    def loss(implementation, hidden, kernel, labels, bias, **axes):
        return jaxloss.linear_cross_entropy(
            hidden, kernel, labels, bias=bias, implementation=implementation, **axes
        )

    of_axes = partial(loss, "mosaic_tpu", vocab_axis_name="vocab", token_axis_name="data")
    specs = P("data"), P(None, "vocab"), P("data"), P("vocab")
    split = jax.shard_map(of_axes, mesh=mesh, in_specs=specs, out_specs=P())
    given = hidden, kernel, labels, bias
    value, grads = jax.jit(jax.value_and_grad(split, (0, 1)))(*given)
    whole = jax.value_and_grad(partial(loss, "vocab_blocks"), (0, 1))
    expected, expected_grads = jax.jit(whole)(*given)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert_to_bfloat16(grads, expected_grads)


@pytest.mark.nan_is_meant
def test_a_label_that_is_none_is_nan(tpu):
    hidden, kernel, labels, _ = problem(16, 8, 600)
    options = {"reduction": "none", "num_classes": 550, "implementation": "mosaic_tpu"}
    labels = (labels % 550).at[:4].set(jnp.array([550, 599, -1, -100], jnp.int32))
    losses, pull = jax.vjp(
        lambda h, k: jaxloss.linear_cross_entropy(h, k, labels, **options), hidden, kernel
    )
    np.testing.assert_array_equal(np.isnan(losses), np.arange(16) < 3)
    assert losses[3] == 0
    d_hidden, _ = pull(jnp.ones_like(losses))
    np.testing.assert_array_equal(np.isnan(wide(d_hidden)).all(axis=-1), np.arange(16) < 3)
    np.testing.assert_array_equal(d_hidden[3], 0)


@pytest.mark.nan_is_meant
def test_parts_of_disjoint_columns_merge(tpu):
    """As those of a mesh's devices do; that the kernel compiles for one is in test_tpu."""
    hidden, kernel, kept, _ = problem(24, 16, 1100)

    def part(start, stop):
        own = jnp.where((kept >= start) & (kept < stop), kept - start, stop - start)
        some = linear_tpu.row_part(hidden, kernel[:, start:stop], None, own, 1, stop - start)
        return parts.RowPart(*some, own)

    merged = parts.merge(part(0, 700), part(700, 1100))
    for name in ("m", "s", "x_omitted"):
        got, whole = getattr(merged, name), getattr(part(0, 1100), name)
        np.testing.assert_allclose(got, whole, rtol=1e-6)


# Which implementation runs

MASK = jnp.arange(24) % 2 == 0


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        (ALL_COUNT, True),
        (ALL_COUNT | {"reduction": "none", "z_loss": 0.1, "precision": "highest"}, True),
        ({}, True),
        (ALL_COUNT | {"sample_weight": MASK}, True),
        (ALL_COUNT | {"where": MASK}, True),
        (ALL_COUNT | {"chunk_size": 8}, False),  # of tokens
        (ALL_COUNT | {"label_smoothing": 0.1}, False),
        (ALL_COUNT | {"logit_softcap": 9.0}, False),
        (ALL_COUNT | {"return_stats": True}, False),
        (ALL_COUNT | {"where": jnp.arange(1100) != 3}, False),
    ],
    ids=str,
)
def test_what_none_takes(tpu, options, taken):
    hidden, kernel, labels, _ = problem(24, 16, 1100)
    assert (NAME in program(hidden, kernel, labels, **options)) == taken


def test_other_dtypes_and_backends_take_chunks(tpu):
    hidden, kernel, labels, _ = problem(24, 16, 1100)
    narrow = (hidden.astype(jnp.float16), kernel.astype(jnp.float16), labels)
    assert NAME not in program(*narrow, **ALL_COUNT)
    with kernels_of("gpu", capability="8.0", devices=1):
        assert NAME not in program(hidden, kernel, labels, **ALL_COUNT)


def test_what_may_be_split_is_left_to_xla_unless_the_kernel_is_named():
    """JAX refuses to split a kernel over the devices of a mesh."""
    hidden, kernel, labels, _ = problem(24, 16, 1100)
    with kernels_of("tpu", devices=8, runs=True):
        assert NAME not in program(hidden, kernel, labels, **ALL_COUNT)
        assert NAME in program(hidden, kernel, labels, implementation="mosaic_tpu")


def test_chips_of_little_memory():
    hidden, kernel, labels, _ = problem(24, 16, 1100)
    for kind, taken in (("TPU v4", False), ("TPU v5 lite", True), ("TPU7x", True)):
        with kernels_of("tpu", kind=kind, devices=1, runs=True):
            assert (NAME in program(hidden, kernel, labels, **ALL_COUNT)) == taken
    with (
        kernels_of("tpu", kind="TPU v4", devices=1),
        pytest.raises(ValueError, match="got a TPU v4"),
    ):
        program(hidden, kernel, labels, implementation="mosaic_tpu")


@pytest.mark.parametrize("shape", [(16, 65536, 300), (0, 8, 300)], ids=str)
@pytest.mark.parametrize("implementation", ["mosaic_tpu", None])
def test_shapes_that_it_cannot_take_go_to_xla(tpu, shape, implementation):
    n, d, v = shape
    shapes = ((n, d), jnp.bfloat16), ((d, v), jnp.bfloat16), ((n,), jnp.int32)
    args = [jax.ShapeDtypeStruct(*s) for s in shapes]
    assert NAME not in program(*args, implementation=implementation, **ALL_COUNT)


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"logit_softcap": 9.0}, "a soft cap or a temperature"),
        ({"return_stats": True}, "statistics"),
        ({"where": jnp.arange(1100) != 3}, "where over classes"),
    ],
    ids=str,
)
def test_what_it_has_no_form_of_is_an_error(tpu, options, got):
    hidden, kernel, labels, _ = problem(24, 16, 1100)
    with pytest.raises(ValueError, match=f"'mosaic_tpu' takes class indices.*; got {got}"):
        program(hidden, kernel, labels, implementation="mosaic_tpu", **options)


def test_operands_labels_and_backends_that_it_does_not_take():
    hidden, kernel, _, _ = problem(24, 16, 1100)
    uniform = jnp.full((24, 1100), 1 / 1100)
    operands = hidden.astype(jnp.float32), kernel.astype(jnp.float32)
    got = "the backend cpu, operands of float32, labels that are no class indices"
    with pytest.raises(ValueError, match=f"got {got}. Leave implementation out"):
        program(*operands, uniform, implementation="mosaic_tpu")


@pytest.mark.parametrize("implementation", ["mosaic_tpu", "vocab_blocks"])
def test_export_from_a_tpu(implementation):
    """A layout is the one thing in it that JAX wants to be allowed."""
    hidden, kernel, labels, _ = problem(24, 16, 1100)
    loss = partial(jaxloss.linear_cross_entropy, implementation=implementation)
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    allowed = [jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")]
    with kernels_of("tpu"):
        make = jax.export.export(step, platforms=("tpu",), disabled_checks=allowed)
        assert make(hidden, kernel, labels).serialize()
