"""implementation="stored_exponentials": equal to the other schedules, exact, and three products."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chips import kernels_of
from oracle.budget import relative_errors
from oracle.programs import equations, jit_quickly, products

import jaxloss
from jaxloss._numerics import label_offset

A = (0, 1)
N, D, V, CHUNK = 45, 16, 61, 9  # an odd chunk has no quarters


def loss(h, k, y, implementation="stored_exponentials", **options):
    options = {"implementation": implementation, "chunk_size": CHUNK, **options}
    return jaxloss.linear_cross_entropy(h, k, y, **options)


def arrays(dtype=jnp.float32, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    h = jnp.asarray(scale * rng.normal(size=(N, D)), dtype)
    labels = np.where(rng.random(N) < 0.3, -100, rng.integers(0, V, N))
    return h, jnp.asarray(rng.normal(size=(D, V)) / 2, dtype), jnp.asarray(labels, jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize("scale", [1.0, 40.0, 400.0])
def test_rows_whose_sum_is_too_large_are_exact_too(dtype, scale):
    """Losses of a nat, of tens and of hundreds, side by side."""
    with jax.enable_x64(dtype == jnp.float64):
        h, k, y = arrays(dtype)
        h = h * jnp.where(jnp.arange(N) % 3 == 0, scale, 1).astype(dtype)[:, None]
        found = jax.value_and_grad(loss, A)(h, k, y)
        with jax.enable_x64(True):
            wide = [x.astype(jnp.float64) for x in (h, k)]
            truth = jax.value_and_grad(lambda h, k: jaxloss.cross_entropy(h @ k, y), A)(*wide)
        rounding = {2: 2.0**-8, 4: 2.0**-19, 8: 1e-13}[jnp.dtype(dtype).itemsize]
        for x, z in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
            size = np.max(np.abs(np.asarray(z)))
            each = rounding if x.ndim else min(rounding, 2.0**-19)
            np.testing.assert_allclose(
                np.asarray(x, np.float64), np.asarray(z), rtol=0, atol=each * size
            )


@pytest.mark.parametrize("margin", [1.0, 17.0, 40.0, 80.0, -40.0, -60.0, -90.0])
def test_the_loss_has_its_digits_at_every_margin(margin):
    """Logits are products with 1: the label's is the margin, the others' 0."""
    y = jnp.arange(N, dtype=jnp.int32) % V
    x = np.zeros((N, V), np.float32)
    x[np.arange(N), np.asarray(y)] = margin
    found, (dx, _) = jax.value_and_grad(partial(loss, reduction="sum"), A)(
        jnp.asarray(x), jnp.eye(V, dtype=jnp.float32), y
    )
    others = np.longdouble(V - 1) * np.exp(-np.longdouble(margin))
    truth = np.log1p(others)
    roundings = (abs(margin) + 16) * 2.0**-24
    np.testing.assert_allclose(found, float(N * truth), rtol=roundings)
    own = np.asarray(dx)[np.arange(N), np.asarray(y)]
    np.testing.assert_allclose(own, float(-others / (1 + others)), rtol=roundings)


def confident(margin, d=64, v=2000, n=256):
    """bfloat16 operands whose label lies ``margin`` above the next class; None: as they come."""
    rng = np.random.default_rng(0)
    k = np.asarray(jnp.asarray(rng.normal(size=(d, v)) / np.sqrt(d), jnp.bfloat16), np.float64)
    y, h = rng.integers(0, v, n), rng.normal(size=(n, d))
    for i in range(n if margin is not None else 0):
        own, z = k[:, y[i]], h[i] @ k
        above = margin + np.max(np.delete(z, y[i])) - z[y[i]]
        h[i] += own * above / (own @ own)
    return jnp.asarray(h, jnp.bfloat16), jnp.asarray(k, jnp.bfloat16), jnp.asarray(y, jnp.int32)


@pytest.mark.parametrize("margin", [None, 5.0])
def test_gradients_err_as_what_is_rounded_once(margin):
    """Those of the logits' gradient, rounded to bfloat16, err half as much again on these rows."""
    h, k, y = confident(margin)
    found, chunks = (
        jax.grad(partial(loss, implementation=name, chunk_size=64), A)(h, k, y)
        for name in ("stored_exponentials", "token_chunks")
    )
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in (h, k)]
        truth = jax.grad(lambda h, k: jaxloss.cross_entropy(h @ k, y), A)(*wide)
        rounded = [x.astype(jnp.bfloat16) for x in truth]
    truth = [np.asarray(x) for x in truth]
    least, ours, theirs = (relative_errors(x, truth) for x in (rounded, found, chunks))
    for error, best in zip(ours, least, strict=True):
        assert error <= 1.05 * best
    if margin:
        assert min(np.divide(theirs, least)) > 1.4


def test_three_products_and_one_where_nothing_is_differentiated():
    """And one in the loop that runs where a row's sum is too large."""
    args = arrays()
    chunks = partial(loss, implementation="token_chunks")
    for derivative, own, again in (
        (lambda f: f, 1, 1),
        (jax.grad, 2, 1),
        (partial(jax.value_and_grad, argnums=A), 3, 1),
    ):
        steps = products(derivative(chunks), *args) // own
        assert products(derivative(chunks), *args) == own * steps
        assert products(derivative(loss), *args) == (own + again) * steps


def test_exponentials_are_stored_in_the_products_dtype():
    """And no float32 gradient of the logits is."""
    h, k, y = arrays(jnp.bfloat16)
    of_operands = [
        {v.aval.dtype for v in e.invars}
        for e in equations(jax.value_and_grad(loss, A), h, k, y)
        if e.primitive.name == "dot_general"
    ]
    assert of_operands
    assert all(dtypes == {jnp.dtype(jnp.bfloat16)} for dtypes in of_operands)


def test_a_neighbour_whose_sum_is_too_large_changes_no_bit():
    h, k, y = arrays()
    y = jnp.abs(y) % V
    far = h.at[4].mul(1000)
    grads = jax.jit(jax.grad(lambda h: loss(h, k, y, reduction="sum")))
    others = np.arange(N) != 4
    found, alone = np.asarray(grads(far)), np.asarray(grads(h))
    assert np.any(found[4] != alone[4])
    np.testing.assert_array_equal(found[others], alone[others])


@pytest.mark.parametrize("weight", [1e-30, 1e30])
def test_small_weights_lose_no_gradient(weight):
    """A weight over a large sum would be 0, and multiply the row's hidden."""
    h, k, y = arrays(scale=6.0)

    def step(weight, h, k):
        weights = jnp.full(N, weight, jnp.float32)
        return loss(h, k, y, sample_weight=weights, reduction="sum")

    found, plain = (jax.grad(step, (1, 2))(w, h, k) for w in (weight, 1.0))
    for x, z in zip(found, plain, strict=True):
        size = np.max(np.abs(np.asarray(z)))
        np.testing.assert_allclose(np.asarray(x, np.float64) / weight, z, rtol=0, atol=2e-6 * size)


COMPOSED = {
    "vmap": lambda f: lambda h, k: jax.vmap(f, (0, None))(jnp.stack([h, 50 * h]), k).sum(),
    "scan": lambda f: (
        lambda h, k: jax.lax.scan(
            lambda c, x: (c + f(x, k), None), jnp.float32(0), jnp.stack([h, 2 * h])
        )[0]
    ),
    "checkpoint": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable),
    "gradient": lambda f: lambda h, k: sum(jnp.sum(g**2) for g in jax.grad(f, A)(h, k)),
    "tangent": lambda f: lambda h, k: jax.jvp(f, (h, k), (jnp.sin(h), jnp.cos(k)))[1],
}


@pytest.mark.parametrize("name", COMPOSED)
def test_every_transform_equals_that_of_chunks(name):
    h, k, y = arrays()
    values = [
        jax.value_and_grad(COMPOSED[name](partial(loss_of_operands, y=y, implementation=how)), A)
        for how in ("stored_exponentials", "token_chunks")
    ]
    found, expected = jit_quickly(lambda *args: [f(*args) for f in values])(h, k)
    for x, z in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        size = np.max(np.abs(np.asarray(z)))
        np.testing.assert_allclose(x, z, rtol=0, atol=4e-6 * size)


def loss_of_operands(h, k, y, implementation):
    return loss(h, k, y, implementation, z_loss=1e-3)


def test_under_vmap_rows_are_computed_again_in_a_loop():
    """Both sides of a condition would be computed, for every batch."""
    h, k, y = arrays()
    batch = jax.vmap(jax.value_and_grad(loss, A), (0, None, None))
    names = {e.primitive.name for e in equations(batch, jnp.stack([h, h]), k, y)}
    assert "while" in names
    assert products(batch, jnp.stack([h, h]), k, y) == products(
        jax.value_and_grad(loss, A), h, k, y
    )


def test_several_heads():
    rng = np.random.default_rng(1)
    h = jnp.asarray(rng.normal(size=(N, 3, D)), jnp.float32)
    k = jnp.asarray(rng.normal(size=(3, D, V)), jnp.float32)
    y = jnp.asarray(rng.integers(0, V, (N, 3)), jnp.int32)
    found, chunks = (
        jax.value_and_grad(partial(loss, implementation=name), A)(h, k, y)
        for name in ("stored_exponentials", "token_chunks")
    )
    for x, z in zip(jax.tree.leaves(found), jax.tree.leaves(chunks), strict=True):
        np.testing.assert_allclose(x, z, rtol=0, atol=2e-6 * np.max(np.abs(z)))


@pytest.mark.parametrize(
    ("of_label", "temperature"), [(1e10, 1.0), (-1e10, 1.0), (-1e38, 1.0), (20.0, 1e-9)]
)
def test_a_label_below_others_beside_which_tens_of_nats_are_rounded_away(of_label, temperature):
    """A class masked by a bias of -1e10 is one. A bound of so many nats above its logit is that
    logit: the others' would seem to be equal to it, and the loss the log of their number."""
    x = np.full((3, V), 0.25 * of_label if of_label > 0 else 0, np.float32)
    x[:, 1], x[:, 2] = of_label, 1.25 * of_label if of_label > 0 else 2.0
    h, y = jnp.asarray(x), jnp.array([1, 2, 1], jnp.int32)
    step = partial(loss, temperature=temperature, reduction="sum")
    found, (dx, _) = jax.value_and_grad(step, A)(h, jnp.eye(V, dtype=jnp.float32), y)
    with jax.enable_x64(True):
        z = np.asarray(x, np.float64) / temperature
        truth, truth_dx = jax.value_and_grad(jaxloss.cross_entropy)(z, y, reduction="sum")
        truth_dx = np.asarray(truth_dx) / temperature
    np.testing.assert_allclose(found, float(truth), rtol=2.0**-20)
    size = np.max(np.abs(truth_dx))
    np.testing.assert_allclose(np.asarray(dx, np.float64), truth_dx, rtol=0, atol=2.0**-20 * size)


OPTIONS = {
    "none": {"reduction": "none"},
    "statistics": {"return_stats": True, "reduction": "sum"},
    "smoothing": {"label_smoothing": 0.1, "temperature": 0.7},
    "smoothing, padded classes": {"label_smoothing": 0.2, "num_classes": V - 9, "z_loss": 1e-2},
    "smoothing, statistics": {"label_smoothing": 0.1, "return_stats": True},
    "smoothing, none": {"label_smoothing": 0.3, "reduction": "none"},
}
KERNELS = ("array", "low rank", "columns scaled", "groups scaled", "both")


def kernel_of(kind, trained, k, vocab_axis):
    """The kernel, and the matrix that it stands for."""
    a, b, array = trained
    if kind == "array":
        return array.T if vocab_axis == 0 else array, array
    groups = 1 if kind == "columns scaled" else 4
    scale = (1 + jnp.sin(jnp.arange(groups * V))).reshape(groups, V) / 40
    values = jnp.round(8 * k).astype(jnp.int8)
    wide = jnp.repeat(scale, D // groups, axis=0).astype(a.dtype) * values.astype(a.dtype)
    base = jaxloss.QuantizedKernel(values.T if vocab_axis == 0 else values, scale)
    if kind == "low rank":
        base, wide = k.T if vocab_axis == 0 else k, k
    if kind in ("low rank", "both"):
        return jaxloss.LowRankKernel(base, a, b, 2.0), wide + 2 * a @ b
    return base, wide


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_and_kernels(name, kind, vocab_axis):
    """Value, statistics and gradients, of class weights and of the smoothing too."""
    h, k, y = arrays()
    options = dict(OPTIONS[name])
    classes = options.get("num_classes", V)
    y = jnp.where(y >= classes, 3, y)
    rng = np.random.default_rng(2)
    a, b, bias = (rng.normal(size=size).astype("f") for size in ((D, 2), (2, V), (V,)))
    smoothing = options.pop("label_smoothing", None)
    weight = rng.uniform(0.5, 2, classes).astype("f")
    moving = h, (a, b, k), bias, weight, None if smoothing is None else np.float32(smoothing)

    def of(logits_of, h, trained, bias, weight, smoothing):
        given = dict(options, weight=weight)
        given |= {} if smoothing is None else {"label_smoothing": smoothing}
        out = logits_of(h, trained, bias, given)
        losses, stats = out if "return_stats" in options else (out, None)
        return jnp.sum(losses * (2 + jnp.cos(jnp.arange(losses.size))).reshape(losses.shape)), stats

    def ours(h, trained, bias, given):
        kernel, _ = kernel_of(kind, trained, k, vocab_axis)
        own = {"implementation": "stored_exponentials", "chunk_size": CHUNK, "bias": bias}
        return jaxloss.linear_cross_entropy(h, kernel, y, vocab_axis=vocab_axis, **own, **given)

    def whole(h, trained, bias, given):
        _, matrix = kernel_of(kind, trained, k.astype(h.dtype), vocab_axis)
        given = {name: x for name, x in given.items() if name != "num_classes"}
        return jaxloss.cross_entropy((h @ matrix + bias[None])[:, :classes], y, **given)

    found = jit_quickly(jax.value_and_grad(partial(of, ours), range(5), has_aux=True))(*moving)
    with jax.enable_x64(True):
        moving = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), moving)
        truth = jax.value_and_grad(partial(of, whole), range(5), has_aux=True)(*moving)
    value = float(truth[0][0])
    for x, z in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
        size = max(np.max(np.abs(z)), abs(value) if x.ndim == 0 else 0)
        np.testing.assert_allclose(np.asarray(x, np.float64), z, rtol=0, atol=3e-6 * size)


def test_smoothing_asks_nothing_of_a_class_that_weighs_nothing():
    """Though its bias is -inf."""
    h, k, y = arrays()
    y = jnp.where(y == 5, 6, y)
    bias, weight = jnp.zeros(V).at[5].set(-jnp.inf), jnp.ones(V).at[5].set(0)
    options = {"bias": bias, "weight": weight, "label_smoothing": 0.1}
    found, expected = (
        jax.value_and_grad(partial(loss, implementation=name, **options), A)(h, k, y)
        for name in ("stored_exponentials", "token_chunks")
    )
    for x, z in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, z, rtol=0, atol=2e-6 * np.max(np.abs(z)))


def test_smoothing_holds_nothing_of_the_logits_size_more():
    h, k, y = (jnp.zeros((256, 64)), jnp.zeros((64, 8192)), jnp.zeros(256, jnp.int32))

    def bytes_of(**options):
        step = jax.value_and_grad(partial(loss, chunk_size=64, **options), A)
        return jax.jit(step).lower(h, k, y).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(label_smoothing=0.1) < bytes_of() + 4 * 8192 * 4


ROWS = "takes class indices"


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"return_stats": True, "reduction": "none"}, "statistics of each token's loss"),
        ({"label_smoothing": 0.1, "logit_softcap": 9.0}, "label_smoothing with a soft cap"),
        ({"label_smoothing": 0.1, "where": jnp.arange(V) < 9}, "label_smoothing with where"),
        ({"temperature": jnp.float32(2)}, "a temperature that is an array"),
    ],
    ids=str,
)
def test_what_it_has_no_form_of_is_an_error(options, got):
    with pytest.raises(ValueError, match=f"(?s){ROWS}.*{got}.*Leave implementation out"):
        loss(*arrays(), **options)


def test_operands_that_it_does_not_take():
    h, k, y = arrays()
    with pytest.raises(ValueError, match=f"(?s){ROWS}.*operands of float16"):
        loss(h.astype(jnp.float16), k.astype(jnp.float16), y)
    with pytest.raises(ValueError, match=f"(?s){ROWS}.*labels that are no class indices"):
        loss(h, k, jax.nn.one_hot(y, V))


def test_the_largest_sum_is_far_from_overflow():
    """Of as many classes as there may be, each as far above the offset as it is let."""
    most = 2.0**31 * np.exp(label_offset.HIGHEST)
    assert most * 2.0**20 < np.finfo(np.float32).max


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("derivative", [False, True])
def test_on_a_tpu_the_offset_is_that_of_a_few_columns(derivative, options):
    """So that no column is gathered; a label far above them, and far below, is exact."""
    h, k, y = arrays(jnp.bfloat16, scale=1.0)
    h = h * jnp.where(jnp.arange(N) % 3 == 0, 40, 1).astype(h.dtype)[:, None]
    step = partial(loss, **options)
    step = jax.value_and_grad(step, A) if derivative else step
    expected = step(h, k, y)
    with kernels_of("tpu", devices=1, runs=True):
        found = step(h, k, y)
        names = str(jax.make_jaxpr(step)(h, k, y))
    # Without smoothing or a gradient another kernel computes the value, and stores nothing.
    assert ("jaxloss_linear_exponentials" in names) == (derivative or bool(options))
    for x, z in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, z = np.asarray(x, np.float64), np.asarray(z, np.float64)
        rounding = 2.0**-7 if x.ndim else 2.0**-20
        np.testing.assert_allclose(x, z, rtol=0, atol=rounding * np.max(np.abs(z)))
