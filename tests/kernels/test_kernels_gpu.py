"""The kernels for a Hopper GPU: on one where there is one, else interpreted on a CPU.

``JAX_PLATFORMS=cuda python -m pytest tests/kernels/test_kernels_gpu.py`` is the former.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chips import fresh_programs, kernels_of
from jax.experimental.pallas import mosaic_gpu as plgpu
from oracle.budget import EPS
from oracle.draw import product_of_bfloat16
from oracle.truth import wide

import jaxloss
from jaxloss._numerics import label_offset, passes
from jaxloss._pallas import linear_gpu, rows_gpu
from jaxloss._xla import device
from jaxloss._xla.dtypes import accumulator_dtype

pytestmark = pytest.mark.jax_leaks("plgpu.kernel")
ON_GPU = jax.default_backend() == "gpu"
interpreted = pytest.mark.skipif(
    not ON_GPU and not hasattr(plgpu, "InterpretGPUParams"),
    reason="JAX interprets kernels for GPUs from 0.11 on",
)


@pytest.fixture
def hopper(monkeypatch):
    """The kernels are taken, for rows however few."""
    monkeypatch.setattr(rows_gpu, "takes", lambda x: x.shape[0] % 8 == 0)
    monkeypatch.setattr(rows_gpu, "_BLOCKS", 6)  # several parts a row
    monkeypatch.setattr(linear_gpu, "_CORES", 2)  # several tiles each
    monkeypatch.setattr(linear_gpu, "LEAST", 0)
    with fresh_programs() if ON_GPU else kernels_of("gpu", devices=1, runs=True):
        yield


def never(*_):
    raise AssertionError("XLA's form was taken")


def rows(r, c, dtype, seed=0, scale=5.0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(scale * rng.normal(size=(r, c)), dtype)
    return x, jnp.asarray(rng.integers(0, c, r), jnp.int32)


def program(function, *args):
    return str(jax.make_jaxpr(function)(*args))


# Rows of logits

SHAPES = [
    (64, 128, jnp.bfloat16),  # one tile
    (200, 1280, jnp.bfloat16),  # rows over the edge; parts of unequal length
    (72, 2560, jnp.float16),
    (128, 640, jnp.float32),
]


@interpreted
@pytest.mark.parametrize(("r", "c", "dtype"), SHAPES, ids=str)
def test_max_and_sum(hopper, r, c, dtype):
    x, kept = rows(r, c, dtype)
    kept = jnp.where(jnp.arange(r) % 7 == 2, c, kept)  # c: no such class
    x = x.at[3, ::2].set(-jnp.inf).at[4].set(-jnp.inf)
    m, s = jax.jit(rows_gpu.max_and_sum(never))(x, kept)
    assert m.dtype == s.dtype == jnp.float32
    np.testing.assert_array_equal(m, wide(x).max(axis=-1))
    high = np.where(wide(m) == -np.inf, 0, wide(m))[:, None]
    e = np.exp(wide(x) - high)
    here = np.asarray(kept) < c
    e[np.arange(r)[here], np.asarray(kept)[here]] = 0
    truth = e.sum(axis=-1)
    # Of a summand the rounding of its argument and of the exponential, of the sum one each way.
    distance = np.where(e > 0, high - wide(x), 0)
    allowed = (e * (distance / 2 + 3)).sum(axis=-1) + 12 * truth
    assert np.all(np.abs(wide(s) - truth) <= EPS * allowed)


@pytest.mark.nan_is_meant
@interpreted
def test_rows_of_nan_and_inf_answer_for_themselves(hopper):
    x, kept = rows(64, 256, jnp.bfloat16)
    x = x.at[1, 5].set(jnp.nan).at[2, 7].set(jnp.inf)
    _, s = rows_gpu.max_and_sum(never)(x, kept)
    np.testing.assert_array_equal(np.isnan(s), np.isin(np.arange(64), [1, 2]))


@interpreted
@pytest.mark.parametrize(("r", "c", "dtype"), SHAPES[:3], ids=str)
def test_slope(hopper, r, c, dtype):
    x, kept = rows(r, c, dtype, scale=2.0)
    rng = np.random.default_rng(1)
    m = jnp.max(x, axis=-1).astype(jnp.float32)
    scale, at_kept = (jnp.asarray(rng.normal(size=r), jnp.float32) for _ in range(2))
    active = jnp.arange(r) % 5 != 1
    at_kept = jnp.where(active, at_kept, 0)
    x = x.at[0, ::3].set(-jnp.inf)
    dx = jax.jit(rows_gpu.slope(never))(x, m, kept, scale, at_kept, active)
    assert dx.dtype == dtype
    truth = np.exp(wide(x) - wide(m)[:, None]) * wide(scale)[:, None]
    truth[np.arange(r), np.asarray(kept)] = wide(at_kept)
    truth[~np.asarray(active)] = 0
    half = wide(jnp.finfo(dtype).eps) / 2
    least = wide(jnp.finfo(dtype).tiny)  # float16's subnormal numbers are coarser
    assert np.all(np.abs(wide(dx) - truth) <= 1.01 * half * np.maximum(np.abs(truth), least))


@interpreted
@pytest.mark.nan_is_meant
def test_a_row_that_asks_for_nothing_has_no_slope(hopper):
    x, kept = rows(64, 128, jnp.bfloat16)
    x = x.at[:32].set(jnp.nan).at[32:, 0].set(jnp.inf)
    zero, none = jnp.zeros(64, jnp.float32), jnp.zeros(64, bool)
    np.testing.assert_array_equal(rows_gpu.slope(never)(x, zero, kept, zero, zero, none), 0)


@interpreted
def test_a_batch_is_more_rows(hopper):
    x, kept = rows(96, 256, jnp.bfloat16)
    one = rows_gpu.max_and_sum(never)
    expected = one(x, kept)
    batch = jax.vmap(one)(x.reshape(4, 24, 256), kept.reshape(4, 24))
    # Three rows make no tile, nor does one: their batch does.
    some = rows_gpu.max_and_sum(lambda x, kept: (x[:, 0].astype(jnp.float32),) * 2)
    each = jax.vmap(jax.vmap(some))(x.reshape(32, 3, 256), kept.reshape(32, 3))
    same = jax.vmap(one, (None, 0))(x[:8], jnp.stack([kept[:8]] * 2))
    for got in (batch, each):
        for v, w in zip(got, expected, strict=True):
            np.testing.assert_array_equal(v.reshape(96), w)
    np.testing.assert_array_equal(same[1][1], expected[1][:8])


def test_what_makes_up_for_a_kernel():
    def takes(*shape):
        return rows_gpu.takes(jax.ShapeDtypeStruct(shape, jnp.bfloat16))

    assert all(takes(*shape) for shape in ((16384, 1024), (64, 262144)))
    assert not any(takes(*shape) for shape in ((4096, 1024), (4, 2**24), (16387, 2048)))


# The losses


def losses(x, y, z_loss=0.0, weight=None):
    options = {"z_loss": z_loss, "weight": weight}
    return jaxloss.cross_entropy(x, y, **options)


OPTIONS = {
    "plain": {},
    "both": {"z_loss": 1e-2, "weight": jnp.linspace(0.5, 1.5, 256)},
}


@interpreted
@pytest.mark.parametrize("name", OPTIONS)
def test_every_mode_equals_that_without_kernels(hopper, name):
    x, y = rows(48, 256, jnp.bfloat16, scale=2.0)
    x, y = x.reshape(6, 8, 256), y.reshape(6, 8).at[0, 3].set(-100)
    loss = partial(losses, **OPTIONS[name])
    along = jnp.cos(x)

    def squared(x):
        return jnp.sum(jnp.square(jax.grad(loss)(x, y).astype(accumulator_dtype(x.dtype))))

    def every(x):
        grad = lambda x: jax.grad(loss)(x, y)  # noqa: E731
        each = jax.vmap(jax.value_and_grad(loss))(x, y)
        forward = jax.jvp(lambda x: loss(x, y), (x,), (along,))
        over = jax.jvp(grad, (x,), (along,))
        return jax.value_and_grad(loss)(x, y), each, forward, over, jax.grad(squared)(x)

    assert "jaxloss_max_and_sum" in program(every, x)
    assert "jaxloss_slope" in program(every, x)
    got = jax.jit(every)(x)
    with kernels_of("gpu", capability="8.0", devices=1):
        assert "jaxloss_slope" not in program(every, x)
        expected = jax.jit(every)(x)
    assert jax.tree.map(jnp.result_type, got) == jax.tree.map(jnp.result_type, expected)
    *got, of_squares = jax.tree.leaves(got)
    *expected, _ = jax.tree.leaves(expected)
    for v, w in zip(got, expected, strict=True):
        # Rounded to bfloat16, where values that differ by a float32's rounding part by a unit.
        rtol = 2**-7 if v.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(wide(v), wide(w), rtol=rtol, atol=1e-9)
    # The gradient g of the squares is p_j (g_j - sum_i p_i g_i) but for factors that a row shares.
    # Each term is rounded to bfloat16 six times at most: as g, as a cotangent, in a sum.
    with jax.enable_x64(True):
        truth, g = (
            wide(jax.grad(f)(x.astype(jnp.float64))) for f in (squared, lambda x: loss(x, y))
        )
    p = np.exp(wide(x) - wide(x).max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    factor = np.abs(p * (g - np.sum(p * g, axis=-1, keepdims=True)))
    terms = p * (np.abs(g) + np.sum(p * np.abs(g), axis=-1, keepdims=True))
    shared = np.max(np.abs(truth), axis=-1, keepdims=True)
    shared /= np.max(factor, axis=-1, keepdims=True, initial=EPS**4)  # no label, no gradient
    assert np.all(np.abs(wide(of_squares) - truth) <= 6 * 2**-9 * terms * shared)


@pytest.mark.parametrize(
    ("dtype", "classes", "options", "taken"),
    [
        (jnp.bfloat16, 256, {}, ("max_and_sum", "slope")),
        (jnp.float32, 256, {}, ()),  # they may be of 16 bits, widened
        (jnp.bfloat16, 200, {}, ()),  # no whole tiles
        (jnp.bfloat16, 256, {"where": jnp.arange(256) != 3}, ()),
        (jnp.bfloat16, 256, {"logit_softcap": 9.0}, ()),
        (jnp.bfloat16, 256, {"label_smoothing": 0.1}, ("max_and_sum",)),
    ],
    ids=str,
)
def test_which_rows_it_takes(hopper, dtype, classes, options, taken):
    x, y = rows(8, classes, dtype)
    text = program(jax.grad(partial(jaxloss.cross_entropy, **options)), x, y)
    for name in ("max_and_sum", "slope"):
        assert (f"jaxloss_{name}" in text) == (name in taken)


def test_a_batch_takes_it_once(hopper):
    x, y = rows(8, 256, jnp.bfloat16)
    one = jax.vmap(lambda x, y: jaxloss.cross_entropy(x, y))
    assert program(one, x, y).count("jaxloss_max_and_sum") == 1


def test_a_kernel_has_the_derivative_of_xlas_form(hopper, monkeypatch):
    monkeypatch.setattr(rows_gpu, "slope", lambda plain: plain)
    x, _ = rows(8, 128, jnp.bfloat16)
    got = jax.jvp(partial(passes.gradient_pass, lambda x, m: jnp.sin(x)), (x, x), (x, x))
    for v, w in zip(got, jax.jvp(jnp.sin, (x,), (x,)), strict=True):
        np.testing.assert_array_equal(v, w)


def test_around_the_kernels_no_tracer_leaks(hopper, monkeypatch, old_objects_are_left_alone):
    monkeypatch.setattr(rows_gpu, "slope", lambda plain: plain)
    monkeypatch.setattr(rows_gpu, "max_and_sum", lambda plain: plain)
    x, y = rows(8, 256, jnp.bfloat16)

    def every(x):
        loss = lambda x: jaxloss.cross_entropy(x, y)  # noqa: E731
        return jax.grad(loss)(x), jax.jvp(loss, (x,), (x,))

    with jax.checking_leaks():
        jax.make_jaxpr(jax.vmap(every))(x[None])


def test_a_partitioner_is_left_xlas_form(hopper):
    x, y = rows(8, 256, jnp.bfloat16)
    with kernels_of("gpu", devices=8):
        assert "jaxloss_" not in program(jax.grad(jaxloss.cross_entropy), x, y)


def test_other_devices_have_no_kernels():
    with kernels_of("gpu", capability="8.0"):
        assert not device.is_hopper()
    chips = [SimpleNamespace(compute_capability="9.0"), object()]  # the first is the default
    with kernels_of("gpu", chips=chips):
        assert device.is_hopper()
    with kernels_of("rocm", chips=chips):
        assert not device.is_hopper()


@pytest.mark.parametrize("devices", [1, 2])
@interpreted
def test_inside_of_shard_map(hopper, devices):
    if devices > len(jax.local_devices()):
        pytest.skip("wants several devices")
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    p = jax.sharding.PartitionSpec("data")
    x, y = rows(32, 256, jnp.bfloat16)
    each = partial(jaxloss.cross_entropy, reduction="none")
    split = jax.shard_map(each, mesh=mesh, in_specs=(p, p), out_specs=p)
    assert "jaxloss_max_and_sum" in program(split, x, y)
    # The interpreter takes the barriers of a device that is not done yet for leaked ones.
    if ON_GPU or devices == 1:
        np.testing.assert_array_equal(jax.jit(split)(x, y), jax.jit(each)(x, y))


def of_logits(x, _, y):
    return jaxloss.cross_entropy(x, y)


def of_tokens(x, kernel, y, name=None):
    return jaxloss.linear_cross_entropy(x, kernel, y, implementation=name, token_axis_name="data")


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("function", "kernel"),
    [
        (of_logits, "jaxloss_max_and_sum"),
        (jax.grad(of_logits), "jaxloss_slope"),
        (of_tokens, "jaxloss_linear_row_part"),
        (jax.grad(of_tokens, (0, 1)), "jaxloss_max_and_sum"),
        (jax.grad(partial(of_tokens, name="mosaic_gpu"), (0, 1)), "jaxloss_linear_row_part"),
    ],
)
def test_kernels_have_the_types_of_other_platforms_forms(monkeypatch, function, kernel, batched):
    """Inside of shard_map JAX compares what each platform would run. Traced alone: the interpreter
    keeps types that a kernel does not."""
    monkeypatch.setattr(rows_gpu, "takes", lambda x: True)
    monkeypatch.setattr(linear_gpu, "LEAST", 0)

    def local(x, k, y):
        if batched:
            x, y = x.reshape(2, 32, 256), y.reshape(2, 32)
        out = (jax.vmap(function, (0, None, 0)) if batched else function)(x, k, y)
        return jax.tree.map(lambda v: v.reshape(1, -1), out)

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    call = jax.shard_map(local, mesh=mesh, in_specs=(split, whole, split), out_specs=split)
    x, y = rows(64, 256, jnp.bfloat16)
    with kernels_of("gpu"):
        text = program(call, x, jnp.zeros((256, 512), jnp.bfloat16), y)
    assert kernel in text or batched  # the linear one has no name then


# hidden @ kernel


def problem(n, d, v, vocab_axis=1):
    return product_of_bfloat16(n, d, v, vocab_axis, scale=d**-0.5)


PRODUCTS = [
    (128, 192, 256, 256, False),  # one tile
    (300, 256, 1088, 1088, True),  # over both edges
    (77, 192, 640, 600, False),  # padded columns, and tokens that are no whole group of rows
]


@pytest.mark.nan_is_meant
@interpreted
@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize(("n", "d", "v", "columns", "with_bias"), PRODUCTS)
def test_row_part(hopper, vocab_axis, n, d, v, columns, with_bias):
    hidden, kernel, kept, bias = problem(n, d, v, vocab_axis)
    kept = jnp.where(jnp.arange(n) % 5 == 1, columns, kept % columns)  # columns: no such label
    bias = bias if with_bias else None
    past = jnp.arange(v) >= columns  # padding may hold anything
    past = past[None] if vocab_axis == 1 else past[:, None]
    garbage = jnp.where(past, jnp.nan, kernel)
    kernel, finite = garbage.astype(kernel.dtype), kernel
    part = jax.jit(partial(linear_gpu.row_part, vocab_axis=vocab_axis, columns=columns))
    m, s, x_kept = part(hidden, kernel, bias, kept)
    right = wide(finite) if vocab_axis == 1 else wide(finite).T
    x = wide(hidden) @ right
    x = (x if bias is None else x + wide(bias))[:, :columns]
    # A logit is a sum of d products, and known to so many roundings of their magnitudes.
    size = np.abs(wide(hidden)) @ np.abs(right)
    known = (d + 2) / 2 * EPS * np.max(size, axis=-1) + EPS * np.max(np.abs(x), axis=-1)
    high, here, at = x.max(axis=-1), np.asarray(kept) < columns, np.arange(n)
    assert np.all(np.abs(wide(m) - high) <= known)
    e = np.exp(x - wide(m)[:, None])
    e[at[here], np.asarray(kept)[here]] = 0
    truth = e.sum(axis=-1)
    allowed = truth * (known + EPS * (np.max(high[:, None] - x) / 2 + 16))
    assert np.all(np.abs(wide(s) - truth) <= allowed)
    np.testing.assert_array_equal(np.isnan(x_kept), ~here)
    own = x[at[here], np.asarray(kept)[here]]
    assert np.all(np.abs(wide(x_kept)[here] - own) <= known[here])
    # Tokens past a count are left out.
    few = part(hidden, kernel, bias, kept, count=jnp.int32(40))
    for v_, w in zip(few, (m, s, x_kept), strict=True):
        np.testing.assert_array_equal(v_[:40], w[:40])


@pytest.mark.nan_is_meant
@interpreted
@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize(("n", "d", "v", "columns", "with_bias"), PRODUCTS)
def test_exponentials(hopper, vocab_axis, n, d, v, columns, with_bias):
    hidden, kernel, label, bias = problem(n, d, v, vocab_axis)
    label = jnp.where(jnp.arange(n) % 5 == 1, columns, label % columns)  # columns: no such label
    bias = bias if with_bias else None
    past = jnp.arange(v) >= columns  # padding may hold anything
    past = past[None] if vocab_axis == 1 else past[:, None]
    garbage = jnp.where(past, jnp.nan, kernel).astype(kernel.dtype)
    right = wide(kernel) if vocab_axis == 1 else wide(kernel).T
    x = wide(hidden) @ right
    x = (x if bias is None else x + wide(bias))[:, :columns]
    at, some = np.arange(n), np.minimum(np.asarray(label), columns - 1)
    # Of most rows the label's logit; of a few so little that their sums are past the most.
    offset = np.where(at % 7 == 3, -100.0, x[at, some]).astype(np.float32)
    static = {"highest": label_offset.HIGHEST, "vocab_axis": vocab_axis, "columns": columns}
    made = jax.jit(partial(linear_gpu.exponentials, **static))
    e, s = made(hidden, garbage, bias, label, jnp.asarray(offset))
    assert e.shape == (n, v)
    assert e.dtype == jnp.bfloat16
    assert not np.any(wide(e)[:, columns:])
    truth = np.exp(np.minimum(x - offset[:, None], label_offset.HIGHEST))
    truth[at[some == label], some[some == label]] = 0
    size = np.abs(wide(hidden)) @ np.abs(right)
    known = (d + 2) / 2 * EPS * np.max(size, axis=-1) + EPS * np.max(np.abs(x), axis=-1)
    allowed = known + EPS * (np.max(np.abs(x - offset[:, None]), axis=-1) / 2 + 16)
    assert np.all(np.abs(wide(s) - truth.sum(axis=-1)) <= allowed * truth.sum(axis=-1))
    rounding = allowed[:, None] + 2.0**-8
    assert np.all(np.abs(wide(e)[:, :columns] - truth) <= rounding * truth)


def loss_of(implementation, **options):
    return partial(jaxloss.linear_cross_entropy, implementation=implementation, **options)


@interpreted
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none", "z_loss": 1e-2}, {"num_classes": 600, "vocab_axis": 0}],
    ids=str,
)
def test_the_value_alone_equals_that_of_chunks(hopper, options):
    hidden, kernel, labels, bias = problem(40, 192, 640, options.get("vocab_axis", 1))
    labels = (labels % 600).at[5:9].set(-100)
    weight = jnp.linspace(0.5, 1.5, options.get("num_classes", 640))
    given = {
        "bias": bias,
        "weight": weight,
        "sample_weight": (jnp.arange(40) % 3).reshape(5, 8),
    } | options
    args = hidden.reshape(5, 8, 192), kernel, labels.reshape(5, 8)
    assert "jaxloss_linear_row_part" in program(loss_of(None, **given), *args)
    chunks = loss_of("token_chunks", **given)
    assert "jaxloss_linear_row_part" not in program(chunks, *args)
    got, expected = jax.jit(loss_of(None, **given))(*args), jax.jit(chunks)(*args)
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


@interpreted
def test_the_value_alone_has_a_second_derivative(hopper):
    """Of losses a token, whose forward pass is the value alone."""
    hidden, kernel, labels, _ = problem(16, 192, 640)
    labels %= 640
    results = []
    for name in (None, "token_chunks"):
        loss = loss_of(name, reduction="none")

        def moved(h, loss=loss):
            slope = jax.grad(lambda h: jnp.sum(jnp.sin(loss(h, kernel, labels))))
            return jax.jvp(slope, (h,), (jnp.cos(h),))[1]

        results.append(wide(jax.jit(moved)(hidden)))
    got, expected = results
    assert np.max(np.abs(expected)) > 0
    np.testing.assert_allclose(got, expected, rtol=2**-7, atol=2**-9 * np.max(np.abs(expected)))


@interpreted
def test_padding_that_a_mesh_splits_is_left_to_chunks(hopper):
    """Which columns are no classes depends on the device: the kernel has no form of it."""
    hidden, kernel, labels, _ = problem(16, 192, 640)
    labels %= 600
    given = hidden, kernel, labels
    mesh = jax.make_mesh((1,), ("vocab",), axis_types=(jax.sharding.AxisType.Auto,))
    p = jax.sharding.PartitionSpec
    specs = {"in_specs": (p(), p(None, "vocab"), p()), "out_specs": p()}
    got = []
    for classes, taken in ((640, True), (600, False)):
        loss = loss_of(None, num_classes=classes, vocab_axis_name="vocab")
        split = jax.shard_map(loss, mesh=mesh, **specs)
        assert ("jaxloss_linear_row_part" in program(split, *given)) == taken
        got.append(jax.jit(split)(*given))
    expected = [jax.jit(loss_of("token_chunks", num_classes=c))(*given) for c in (640, 600)]
    np.testing.assert_allclose(got, expected, rtol=2e-6)


@interpreted
def test_gradients_by_default_are_those_of_chunks(hopper):
    """The value beside them too: it is that of the logits that they are of."""
    hidden, kernel, labels, _ = problem(16, 192, 640)
    results = []
    for name in (None, "token_chunks"):
        both = jax.value_and_grad(loss_of(name), (0, 1))
        assert "jaxloss_linear_row_part" not in program(both, hidden, kernel, labels)
        results.append(jax.jit(both)(hidden, kernel, labels))
    for v, w in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(v, w)


@pytest.mark.nan_is_meant  # a mean over nothing
@interpreted
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk_size", [None, 16])
@pytest.mark.parametrize("number", [40, 39, 17, 9, 1, 0])
def test_stored_exponentials_of_as_many_tokens_as_count(
    hopper, number, chunk_size, label_smoothing
):
    """Without chunks in one step: of all tokens, of a half, of a quarter."""
    n, d, v = 40, 192, 256
    hidden, kernel, labels, _ = problem(n, d, v)
    counts = np.random.default_rng(0).permutation(n) < number
    hidden = hidden.at[:: n // 4].mul(100)  # their sums are too large
    hidden = jnp.where(counts[:, None], hidden, jnp.nan)
    labels = jnp.where(counts, labels, -100)
    found, expected = (
        jax.value_and_grad(
            partial(
                jaxloss.linear_cross_entropy,
                implementation=name,
                chunk_size=size,
                label_smoothing=label_smoothing,
            ),
            (0, 1),
        )
        for name, size in (("stored_exponentials", chunk_size), ("token_chunks", 16))
    )
    assert "jaxloss_linear_exponentials" in program(found, hidden, kernel, labels)
    got, want = found(hidden, kernel, labels), expected(hidden, kernel, labels)
    for x, z in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        size = np.max(np.abs(np.nan_to_num(wide(z))))
        rounding = 2.0**-7 if x.ndim else 2.0**-19
        np.testing.assert_allclose(wide(x), wide(z), rtol=0, atol=rounding * size)


@interpreted
def test_mosaic_gpu_equals_vocab_blocks(hopper):
    hidden, kernel, labels, bias = problem(24, 192, 1088)
    results = []
    for name in ("mosaic_gpu", "vocab_blocks"):
        loss = loss_of(name, bias=bias, chunk_size=600)

        def every(h, k, loss=loss):
            f = lambda h, k: loss(h, k, labels)  # noqa: E731
            moved = jax.jvp(f, (h, k), (jnp.cos(h), jnp.cos(k)))[1]
            return jax.value_and_grad(f, (0, 1))(h, k), moved

        taken = "jaxloss_linear_row_part" in program(every, hidden, kernel)
        assert taken == (name == "mosaic_gpu")
        results.append(jax.jit(every)(hidden, kernel))
    for v, w in zip(*map(jax.tree.leaves, results), strict=True):
        size = np.max(np.abs(wide(w)))
        np.testing.assert_allclose(wide(v), wide(w), rtol=2**-7, atol=2**-9 * size)


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, True),
        ({"sample_weight": jnp.ones(24)}, True),
        ({"bias": jnp.zeros(640, jnp.bfloat16), "vocab_axis": 0}, True),
        ({"num_classes": 600}, True),
        ({"chunk_size": 8}, False),
        ({"implementation": "token_chunks"}, False),
        ({"implementation": "vocab_blocks"}, False),
        ({"label_smoothing": 0.1}, False),
        ({"logit_softcap": 9.0}, False),
        ({"return_stats": True}, False),
        ({"where": jnp.arange(640) != 3}, False),
    ],
    ids=str,
)
def test_what_the_value_takes(hopper, options, taken):
    hidden, kernel, labels, _ = problem(24, 192, 640, options.get("vocab_axis", 1))
    text = program(partial(jaxloss.linear_cross_entropy, **options), hidden, kernel, labels)
    assert ("jaxloss_linear_row_part" in text) == taken


@pytest.mark.parametrize(
    ("n", "d", "v", "taken"),
    [
        (4096, 4096, 128256, True),
        (4095, 4096, 128256, True),
        (4096, 4096, 50257, False),  # copied by 64 columns
        (4096, 4000, 128256, False),  # and by 64 features
        (4096, 128, 128256, False),  # fewer than are fetched ahead
        (64, 64, 640, False),
        (128, 1024, 32000, False),  # done before it has started
    ],
)
def test_shapes(n, d, v, taken):
    assert linear_gpu.takes(n, d, v) == taken


def test_shapes_that_it_cannot_take_go_to_xla(hopper):
    hidden, kernel, labels, _ = problem(24, 192, 600)
    for name in (None, "mosaic_gpu"):
        text = program(loss_of(name), hidden, kernel, labels)
        assert "jaxloss_linear_row_part" not in text


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"logit_softcap": 9.0}, "a soft cap or a temperature"),
        ({"return_stats": True}, "statistics"),
        ({"where": jnp.arange(640) != 3}, "where over classes"),
    ],
    ids=str,
)
def test_what_it_has_no_form_of_is_an_error(hopper, options, got):
    hidden, kernel, labels, _ = problem(24, 192, 640)
    with pytest.raises(ValueError, match=f"'mosaic_gpu' takes class indices.*; got {got}"):
        program(loss_of("mosaic_gpu", **options), hidden, kernel, labels)


@pytest.mark.skipif(ON_GPU, reason="wants another backend")
def test_backends_that_it_is_not_for():
    hidden, kernel, labels, _ = problem(24, 192, 640)
    with pytest.raises(ValueError, match="on a Hopper GPU; got the backend cpu"):
        program(loss_of("mosaic_gpu"), hidden, kernel, labels)
