"""A mean and its gradient from one read of the logits, by the kernels of two backends.

``JAX_PLATFORMS=cuda python -m pytest tests/kernels/test_one_pass.py`` runs them on a GPU; elsewhere
they are interpreted on a CPU.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chips import fresh_programs, kernels_of
from oracle.budget import EPS
from oracle.truth import wide

import jaxloss
from jaxloss._numerics import one_pass
from jaxloss._pallas import one_pass_gpu, one_pass_tpu
from kernels.test_kernels_gpu import ON_GPU, interpreted, program
from kernels.test_kernels_gpu import rows as rows_of

pytestmark = pytest.mark.jax_leaks("plgpu.kernel")
no_tpu = pytest.mark.skipif(ON_GPU, reason="the other kernels are for a GPU")
BACKENDS = [pytest.param("gpu", marks=interpreted), pytest.param("tpu", marks=no_tpu)]
TAKES = {kernels: kernels.takes for kernels in (one_pass_gpu, one_pass_tpu)}
DTYPES = {"gpu": (jnp.bfloat16, jnp.float16), "tpu": (jnp.bfloat16,)}


def of_few_rows(monkeypatch):
    """Rows are taken however few. A block of the GPU has 32."""
    monkeypatch.setattr(one_pass_gpu, "takes", lambda rows, classes: rows % 4 == 0 and rows >= 32)
    monkeypatch.setattr(one_pass_tpu, "takes", lambda rows, classes: classes % 128 == 0)
    monkeypatch.setattr(one_pass_tpu, "_BLOCK", 2**14)  # several blocks


def there(backend, **options):
    """On a GPU the device is the one that there is."""
    return fresh_programs() if ON_GPU else kernels_of(backend, devices=1, **options)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """The kernels run, as a device of that name would choose them."""
    of_few_rows(monkeypatch)
    with there(request.param, runs=True):
        yield request.param


@pytest.fixture(params=["gpu", "tpu"])
def traced(request, monkeypatch):
    of_few_rows(monkeypatch)
    with there(request.param):
        yield request.param


rows = partial(rows_of, dtype=jnp.bfloat16)


def truth_of(x, kept, weight):
    """In float64: (s, the gradient of the weighted sum)."""
    x, at, labels = wide(x), np.arange(x.shape[0]), np.asarray(kept)
    here = labels < x.shape[1]
    x[np.asarray(weight) == 0] = 0
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    total = e.sum(axis=-1)
    dx = e / total[:, None]
    e[at[here], labels[here]] = 0
    dx[at[here], labels[here]] = -(e.sum(axis=-1) / total)[here]
    dx[~here] = np.nan
    asked = wide(weight)[:, None]
    return e.sum(axis=-1), np.where(asked == 0, 0, dx * asked)


@pytest.mark.nan_is_meant
@pytest.mark.parametrize(("r", "c"), [(32, 256), (100, 768), (44, 1280), (32, 2048)])
def test_sums_and_gradient(backend, r, c):
    """Rows over the edge; on a GPU those are computed twice."""
    for dtype in DTYPES[backend]:
        x, kept = rows(r, c, dtype=dtype)
        kept = jnp.where(jnp.arange(r) % 7 == 2, c, kept)  # c: no such class
        weight = jnp.asarray(np.random.default_rng(1).normal(size=r), jnp.float32)
        weight = jnp.where(jnp.arange(r) % 5 == 1, 0, weight)
        x = x.at[3, ::2].set(-jnp.inf).at[1].set(jnp.nan)  # row 1 is asked for nothing
        m, s, _, dx = jax.jit(one_pass._by_kernel)(x, kept, weight)
        assert m.dtype == s.dtype == jnp.float32
        assert dx.dtype == dtype
        truth, gradient = truth_of(x, kept, weight)
        asked, size = np.asarray(weight) != 0, np.abs(gradient)
        np.testing.assert_array_equal(wide(m)[asked], wide(x).max(axis=-1)[asked])
        # A summand's argument is at most 40, rounded; the exponential and the sum 16 more.
        assert np.all(np.abs(wide(s) - truth)[asked] <= 36 * EPS * truth[asked])
        half, least = wide(jnp.finfo(dtype).eps) / 2, wide(jnp.finfo(dtype).tiny)
        allowed = half * np.maximum(size, least) + 60 * EPS * size
        wrong = np.isnan(gradient)
        np.testing.assert_array_equal(np.isnan(dx), wrong)
        assert np.all((np.abs(wide(dx) - gradient) <= allowed) | wrong)


@pytest.mark.nan_is_meant
def test_rows_answer_for_themselves(backend):
    x, y = rows(32, 256)
    x = x.at[1, 5].set(jnp.nan).at[2, 7].set(jnp.inf).at[3].set(-jnp.inf).at[4, y[4]].set(jnp.inf)
    x, y = x.at[5].set(jnp.nan), y.at[5].set(-100).at[6].set(256)
    loss, dx = jax.value_and_grad(jaxloss.cross_entropy)(x, y)
    wrong = np.isin(np.arange(32), [1, 2, 3, 4, 6])
    assert np.isnan(loss)
    np.testing.assert_array_equal(np.isnan(dx), np.broadcast_to(wrong[:, None], dx.shape))
    np.testing.assert_array_equal(dx[5], 0)
    # Nothing is asked of any of them, or something that is no number.
    loss, dx = jax.value_and_grad(jaxloss.cross_entropy)(x, jnp.full_like(y, -100))
    assert np.isnan(loss)
    np.testing.assert_array_equal(dx, 0)
    _, back = jax.vjp(lambda x: jaxloss.cross_entropy(x, y), x)
    np.testing.assert_array_equal(back(jnp.float32(jnp.nan))[0][5], 0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_mode_equals_that_without_kernels(backend, reduction):
    x, y = rows(64, 256, scale=2.0)
    x, y = x.reshape(2, 32, 256), y.reshape(2, 32).at[0, 3].set(-100)
    weight = jnp.resize(jnp.array([0.5, -1.0, 2.0]), 32)

    def loss(x, y, weight):
        weight = jnp.broadcast_to(weight, y.shape)
        return jaxloss.cross_entropy(x, y, sample_weight=weight, reduction=reduction)

    def every(x, weight):
        of_x = lambda x: loss(x, y, weight)  # noqa: E731
        one = jax.value_and_grad(loss, (0, 2))
        each = jax.vmap(one, (0, 0, None))(x, y, weight)
        along, by = jnp.cos(x), jnp.cos(weight)
        forward = jax.jvp(lambda x, w: loss(x, y, w), (x, weight), (along, by))
        over = jax.jvp(jax.grad(of_x), (x,), (along,))
        multiple = jax.grad(lambda x: 3 * of_x(x))(x)
        # Of the weights' derivative by the logits, and of the other way round.
        mixed = jax.jvp(lambda w: jax.grad(loss)(x, y, w), (weight,), (by,))
        squared = jax.grad(lambda w: jnp.sum(jax.grad(loss, 2)(x, y, w) ** 2))(weight)
        return one(x, y, weight), each, forward, over, multiple, mixed, squared

    assert program(every, x, weight).count("jaxloss_one_pass") > 0
    got = jax.jit(every)(x, weight)
    older = {"gpu": {"capability": "8.0"}, "tpu": {"kind": "TPU v4"}}[backend]
    with kernels_of(backend, devices=1, **older):
        assert "jaxloss_one_pass" not in program(every, x, weight)
        expected = jax.jit(every)(x, weight)
    assert jax.tree.map(jnp.result_type, got) == jax.tree.map(jnp.result_type, expected)
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    largest = max(np.max(np.abs(w)) for w in expected if w.dtype == jnp.float32)
    for v, w in zip(got, expected, strict=True):
        # Rounded to bfloat16, where values that differ by a float32's rounding part by a unit.
        narrow = v.dtype == jnp.bfloat16
        # A weight's derivative is the difference of its loss and the mean.
        atol = 1e-9 if narrow else 4 * EPS * largest
        np.testing.assert_allclose(wide(v), wide(w), rtol=2**-7 if narrow else 1e-6, atol=atol)


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, True),
        ({"reduction": "sum", "ignore_index": None}, True),
        ({"where": jnp.arange(32) != 3, "sample_weight": jnp.arange(32.0)}, True),
        ({"reduction": "none"}, False),
        ({"weight": jnp.ones(256)}, False),
        ({"where": jnp.arange(256) != 3}, False),
        ({"num_classes": 250}, False),
        ({"logit_softcap": 9.0}, False),
        ({"label_smoothing": 0.1}, False),
        ({"z_loss": 0.1}, False),
        ({"return_stats": True}, False),
    ],
    ids=str,
)
def test_what_it_takes(traced, options, taken):
    def loss(x, y):
        return jnp.sum(jax.tree.leaves(jaxloss.cross_entropy(x, y, **options))[0])

    x, y = rows(32, 256)
    assert ("jaxloss_one_pass" in program(jax.grad(loss), x, y)) == taken
    # The value alone has no use for a gradient.
    assert "jaxloss_one_pass" not in program(loss, x, y)


def test_logits_and_devices_that_it_is_not_for(traced):
    x, y = rows(40, 256)
    grad = jax.grad(jaxloss.cross_entropy)
    taken = "jaxloss_one_pass" in program(grad, x, y)
    # A TPU's rows come by 16, or one axis of rows would be a copy.
    assert taken == (traced == "gpu" or ON_GPU)
    x, y = x[:32], y[:32]
    assert "jaxloss_one_pass" in program(grad, x, y)
    # They may be 16 bits that were widened; no whole tiles; classes that do not lie together.
    assert "jaxloss_" not in program(grad, x.astype(jnp.float32), y)
    assert "jaxloss_" not in program(grad, x[:, :100], y)
    assert "jaxloss_" not in program(jax.grad(partial(jaxloss.cross_entropy, axis=0)), x.T, y)
    with kernels_of(traced, devices=8):  # a partitioner may split them
        assert "jaxloss_one_pass" not in program(grad, x, y)
    with kernels_of("tpu", kind="TPU v4", devices=1):
        assert "jaxloss_one_pass" not in program(grad, x, y)


@pytest.mark.nan_is_meant
def test_no_classes_are_not_for_it(traced, monkeypatch):
    """Of none there are whole tiles."""
    for kernels, takes in TAKES.items():
        monkeypatch.setattr(kernels, "takes", takes)
    x, y = jnp.zeros((32, 0), jnp.bfloat16), jnp.zeros(32, jnp.int32)
    assert "jaxloss_" not in program(jax.grad(jaxloss.cross_entropy), x, y)


def test_which_sizes_make_up_for_it():
    gpu, tpu = one_pass_gpu.takes, one_pass_tpu.takes
    assert all(gpu(*shape) for shape in ((16384, 1024), (8192, 2048), (2**16, 256)))
    # A warp reads 256 classes; 4096 overflow; too little to do; no whole tiles.
    others = (2**15, 640), (4096, 4096), (4096, 1024), (2**15 + 2, 1024)
    assert not any(gpu(*shape) for shape in others)
    assert all(tpu(*shape) for shape in ((8192, 128), (8, 2**17), (1001, 128256)))
    # No whole registers; too little to do; rows that do not fit.
    assert not any(tpu(*shape) for shape in ((8192, 1000), (512, 1024), (64, 2**19)))


@pytest.mark.parametrize("batched", [False, True])
def test_it_has_the_types_of_other_platforms_forms(traced, batched):
    """Inside of shard_map JAX compares what each platform would run."""

    def local(x, y):
        if batched:
            x, y = x.reshape(2, 32, 256), y.reshape(2, 32)
        grad = jax.value_and_grad(lambda x, y: 2 * jaxloss.cross_entropy(x, y))
        out = (jax.vmap(grad) if batched else grad)(x, y)
        return jax.tree.map(lambda v: v.reshape(1, -1), out)

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.PartitionSpec("data")
    call = jax.shard_map(local, mesh=mesh, in_specs=(split, split), out_specs=split)
    assert "jaxloss_one_pass" in program(call, *rows(64, 256))


def test_around_it_no_tracer_leaks(traced, monkeypatch, old_objects_are_left_alone):
    for kernels in (one_pass_gpu, one_pass_tpu):
        parts = lambda x, kept, x_kept, weight: (x_kept, weight, x)  # noqa: E731
        monkeypatch.setattr(kernels, "sums_and_gradient", parts)
    x, y = rows(32, 256)

    def every(x):
        loss = lambda x: jaxloss.cross_entropy(x, y)  # noqa: E731
        return jax.grad(loss)(x), jax.jvp(loss, (x,), (x,))

    with jax.checking_leaks():
        jax.make_jaxpr(jax.vmap(every))(x[None])
