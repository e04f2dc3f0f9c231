"""How exact: losses, gradients and tangents at every confidence, dtype and row length."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chips import kernels_of
from forms import two_steps
from oracle.budget import EPS, assert_within, margins, relative_budget
from oracle.draw import hurting_logits
from oracle.truth import exact_gradient, exact_losses, reference

import jaxloss
from jaxloss._numerics import passes
from jaxloss._numerics.logits import Logits
from jaxloss._xla import elementary, indexing

MARGINS = np.arange(-70, 71)
OFFSETS = [0.0, 1e3, -1e3]


def one_hot(x, y, **options):
    return jaxloss.cross_entropy(x, jax.nn.one_hot(y, x.shape[-1], dtype=x.dtype), **options)


FORMS = {
    "labels": jaxloss.cross_entropy,
    "log_softmax": two_steps,
    "one_hot": one_hot,
}


def at_margins(offset, c=5, position=0):
    """A row a margin: the label lies that far above the largest of the others, which is mixed."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-4, -0.5, (len(MARGINS), c))
    x[:, (position + 1) % c] = 0
    x[:, position] = MARGINS
    x = (x + offset).astype(np.float32)
    y = np.full(len(MARGINS), position, np.int32)
    x64 = x.astype(np.longdouble)
    # |x_y - m|, on the inputs as they were rounded
    others = np.max(np.where(np.arange(c) == position, -np.inf, x64), axis=-1)
    return x, y, np.abs(x64[:, position] - others)


@cache
def losses_and_gradient(form, compiled):
    loss = lambda x, y: FORMS[form](x, y, reduction="none")  # noqa: E731
    grad = jax.grad(lambda x, y: loss(x, y).sum())
    return (jax.jit(loss), jax.jit(grad)) if compiled else (loss, grad)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("position", [0, 3])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("form", FORMS)
def test_every_margin(form, offset, position, compiled):
    x, y, margin = at_margins(offset, position=position)
    loss, grad = losses_and_gradient(form, compiled)
    assert_within(loss(x, y), exact_losses(x, y), relative_budget(margin))
    assert_within(grad(x, y), exact_gradient(x, y), 2 * relative_budget(margin)[:, None])


@pytest.mark.parametrize("form", FORMS)
def test_value_and_gradient_together(form):
    x, y, margin = at_margins(0.0)
    ct = (10.0 ** (np.arange(len(y)) % 9 - 4)).astype(np.float32)

    def weighed(x):
        losses = FORMS[form](x, y, reduction="none")
        return jnp.sum(losses * ct), losses

    (_, losses), grad = jax.jit(jax.value_and_grad(weighed, has_aux=True))(x)
    assert_within(losses, exact_losses(x, y), relative_budget(margin))
    expected = exact_gradient(x, y) * ct[:, None]
    assert_within(grad, expected, 2 * relative_budget(margin)[:, None])


@pytest.mark.parametrize("form", FORMS)
def test_forward_mode_at_every_margin(form):
    x, y, margin = at_margins(0.0)
    gradient = exact_gradient(x, y)
    for direction in (np.eye(5)[0], np.eye(5)[1], np.array([0.5, 1.0, 0.25, 2.0, 1.0])):
        dx = np.broadcast_to(direction, x.shape).astype(np.float32)
        f = lambda x: FORMS[form](x, y, reduction="none")  # noqa: E731
        out, tangent = jax.jvp(f, (x,), (dx,))
        assert_within(out, exact_losses(x, y), relative_budget(margin))
        # The terms may cancel; none of them is larger than the label's.
        scale = np.sum(np.abs(gradient * dx), axis=-1)
        assert_within(tangent, np.sum(gradient * dx, axis=-1), 2 * relative_budget(margin), scale)


# The exponential of a TPU


def test_short_exp():
    x = -np.concatenate([np.linspace(-1e-6, 87.3, 100_001), np.logspace(-8, 1, 10_001)])
    x = x.astype(np.float32)
    truth = np.exp(x.astype(np.float64))
    found, slope = jax.jit(partial(jax.jvp, elementary.short_exp))((x,), (2 * np.ones_like(x),))
    error = np.abs(np.asarray(found, np.float64) - truth)
    assert np.max(error / np.spacing(truth.astype(np.float32))) < 2.3
    np.testing.assert_array_equal(slope, 2 * found)
    without_rule = jax.jvp(elementary.short_exp.fun, (x,), (np.ones_like(x),))[1]
    # Near ln(2) / 2 the error of the polynomial of degree 5 rises by some 5^2 / 0.35 of it.
    np.testing.assert_allclose(without_rule, found, rtol=25 / 0.35 * 1.1e-7 * 1.5)
    few = elementary.short_exp(jnp.array([0.0, -0.0, -jnp.inf, -1e30, -88.0, -87.2], jnp.float32))
    np.testing.assert_array_equal(few[:5], [1, 1, 0, 0, 0])
    assert few[5] > 0


@pytest.mark.nan_is_meant
def test_short_exp_of_nan():
    assert jnp.isnan(elementary.short_exp(jnp.float32(jnp.nan)))


@pytest.fixture
def tpu():
    with kernels_of("tpu"):
        yield


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "check", [test_value_and_gradient_together, test_forward_mode_at_every_margin]
)
def test_every_margin_on_a_tpu(tpu, check, form):
    x = jnp.zeros((2, 300))
    loss = lambda x, y: FORMS[form](x, y)  # noqa: E731
    assert "shift_left" in str(jax.make_jaxpr(jax.grad(loss))(x, jnp.zeros(2, jnp.int32)))
    check(form)


@pytest.mark.parametrize(("kind", "short"), [("TPU v6 lite", True), ("TPU7x", False)])
def test_which_chips_have_no_instruction_for_it(kind, short):
    with kernels_of("tpu", kind=kind):
        program = str(jax.make_jaxpr(elementary.exp_of_nonpositive)(jnp.zeros(3)))
    assert ("shift_left" in program) == short
    assert ("accuracy" in program) != short


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_other_dtypes_keep_their_exponential(tpu, dtype):
    found = elementary.exp_of_nonpositive(jnp.full(3, -1, dtype))
    assert found.dtype == dtype
    assert_within(found, np.exp(-1) * np.ones(3), 2 * jnp.finfo(dtype).eps)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("c", [3, 257, 4099])
def test_rows_of_many_classes(form, c):
    """Flat rows, where the label is one of many small probabilities, beside peaked ones."""
    rng = np.random.default_rng(c)
    n = 7
    x = rng.normal(size=(n, c)) * np.array([0, 1e-3, 0.1, 1, 3, 8, 20])[:, None]
    x = x.astype(np.float32)
    y = rng.integers(0, c, n)
    y[-2:] = np.argmax(x, axis=-1)[-2:]
    loss = lambda x: FORMS[form](x, y, reduction="none")  # noqa: E731
    margin = margins(x)
    assert_within(loss(x), exact_losses(x, y), relative_budget(margin))
    grad = jax.jit(jax.grad(lambda x: loss(x).sum()))(x)
    assert_within(grad, exact_gradient(x, y), 2 * relative_budget(margin)[:, None])


def test_large_logits():
    x = jnp.array([1e8, 1e8])
    assert_within(jaxloss.cross_entropy(x, jnp.array(0)), np.log(2), EPS)
    big = jnp.array([3e38, -3e38, 3e38], jnp.float32)
    assert_within(jaxloss.cross_entropy(big, jnp.array(2)), np.log(2), EPS)
    assert_within(jaxloss.log_softmax(big)[::2], [-np.log(2)] * 2, EPS)


def test_confident_row():
    x = jnp.array([30.0, 0.0, 0.0])
    expected = np.log1p(2 * np.exp(np.longdouble(-30)))
    assert_within(expected, 1.8715245937680314e-13, 1e-9)
    for f in FORMS.values():
        value, grad = jax.value_and_grad(lambda x, f=f: f(x, jnp.array(0)))(x)
        assert_within(value, expected, 16 * EPS)
        assert_within(grad, np.array([-1, 0.5, 0.5]) * expected, 16 * EPS)
        assert abs(grad.sum()) <= 2 * EPS * abs(grad[0])


def test_entropy_of_confident_rows():
    margin = np.arange(0.0, 71.0, 5)
    x = np.stack([margin, np.zeros_like(margin), np.zeros_like(margin)], -1).astype(np.float32)
    y = np.zeros(len(x), np.int32)
    _, stats = jaxloss.cross_entropy(x, y, reduction="none", return_stats=True)
    expected = reference(x, y, reduction="none")
    assert_within(stats.entropy, expected.entropy, relative_budget(margin))
    assert_within(stats.log_prob, expected.log_prob, relative_budget(margin))
    assert_within(stats.logsumexp, expected.logsumexp, 2 * EPS)


# Dtypes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes(dtype):
    rng = np.random.default_rng(1)
    x = jnp.asarray(hurting_logits(rng, (9, 37)), dtype)
    y = rng.integers(0, 37, 9)
    q = jnp.asarray(rng.dirichlet(np.ones(37), 9), dtype)
    value, grad = jax.value_and_grad(jaxloss.cross_entropy)(x, y)
    assert (value.dtype, grad.dtype) == (jnp.float32, dtype)
    value, grads = jax.value_and_grad(jaxloss.cross_entropy, argnums=(0, 1))(x, q)
    assert (value.dtype, *(g.dtype for g in grads)) == (jnp.float32, dtype, dtype)
    out, tangent = jax.jvp(jaxloss.log_softmax, (x,), (x,))
    assert out.dtype == tangent.dtype == dtype
    assert jaxloss.nll_loss(out, y).dtype == jnp.float32
    weight = jnp.ones(37, dtype)
    grad = jax.grad(lambda w: jaxloss.cross_entropy(x, y, weight=w, label_smoothing=0.1))(weight)
    assert grad.dtype == dtype


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_narrow_logits_are_computed_in_float32(dtype, compiled):
    rng = np.random.default_rng(2)
    x = jnp.asarray(hurting_logits(rng, (33, 1021)), dtype)
    y = rng.integers(0, 1021, 33)
    exact = np.asarray(x, np.longdouble)
    for reduction in ("none", "mean"):
        f = lambda x: jaxloss.cross_entropy(x, y, reduction=reduction)  # noqa: B023, E731
        loss = (jax.jit(f) if compiled else f)(x)
        assert loss.dtype == jnp.float32
        losses = exact_losses(exact, y)
        assert_within(loss, losses if reduction == "none" else losses.mean(), 2e-5)
    grad = jax.grad(lambda x: jaxloss.cross_entropy(x, y, reduction="sum"))
    grad = (jax.jit(grad) if compiled else grad)(x)
    # Rounded once, to the logits' dtype; float16 has no smaller number than 6e-8.
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    want = exact_gradient(exact, y)
    assert_within(grad, want, half_ulp * 1.02, floor=tiny / half_ulp)


def test_float64():
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        x = jnp.asarray(hurting_logits(rng, (5, 7), np.float64))
        y = rng.integers(0, 7, 5)
        value, grad = jax.value_and_grad(lambda x: jaxloss.cross_entropy(x, y, reduction="sum"))(x)
        assert value.dtype == grad.dtype == jaxloss.log_softmax(x).dtype == jnp.float64
        eps = np.finfo(np.float64).eps
        assert_within(value, exact_losses(x, y).sum(), 200 * eps)
        assert_within(grad, exact_gradient(x, y), 200 * eps)
        narrow = jnp.asarray(x, jnp.float32)
        assert jaxloss.cross_entropy(narrow, y).dtype == jnp.float32


# Rows that hold no distribution


@pytest.mark.nan_is_meant
@pytest.mark.parametrize(
    "bad", [[-np.inf] * 4, [0, np.inf, 1, 2], [np.nan, 0, 1, 2], [0, 1, 2, np.nan]]
)
@pytest.mark.parametrize("form", FORMS)
def test_a_bad_row_stays_in_its_row(form, bad):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(3, 4)).astype(np.float32)
    y = np.array([2, 0, 1])
    good_value = FORMS[form](x, y, reduction="none")
    good_grad = jax.grad(lambda x: FORMS[form](x, y, reduction="sum"))(x)
    x[1] = bad
    value = np.asarray(FORMS[form](x, y, reduction="none"))
    grad = np.asarray(jax.grad(lambda x: FORMS[form](x, y, reduction="sum"))(x))
    assert np.isnan(value[1])
    assert np.isnan(grad[1]).any()
    for row in (0, 2):
        assert_within(value[row], good_value[row], 2 * EPS)
        assert_within(grad[row], good_grad[row], 4 * EPS)
    assert np.all(np.isnan(jaxloss.log_softmax(x)[1]))


@pytest.mark.parametrize("form", FORMS)
def test_impossible_classes(form):
    x = jnp.array([[1.0, -jnp.inf, 2.0], [-jnp.inf, 5.0, -jnp.inf]])
    y = jnp.array([0, 1])
    value, grad = jax.value_and_grad(lambda x: FORMS[form](x, y, reduction="sum"))(x)
    assert_within(value, np.log1p(np.exp(1.0)), 8 * EPS)
    p = 1 / (1 + np.exp(-1.0))
    assert_within(grad, [[-p, 0, p], [0, 0, 0]], 16 * EPS)
    impossible = FORMS[form](x, jnp.array([1, 0]), reduction="none")
    np.testing.assert_array_equal(impossible, [np.inf, np.inf])


# Long rows


@pytest.fixture
def one_device(monkeypatch):
    """The blocked sum serves one device; a program compiled for eight must not be reused."""
    jax.clear_caches()
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    yield
    jax.clear_caches()


@pytest.mark.parametrize("c", [20000, 32768, 16411])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_long_rows(one_device, c, dtype):
    rng = np.random.default_rng(c)
    x = jnp.asarray(rng.normal(size=(4, c)) * np.array([[0.1], [1], [4], [9]]), dtype)
    y = jnp.array([0, c - 1, 5000, 77])
    x = x.at[2, 5000].set(60)
    exact = np.asarray(x, np.longdouble)
    f = jax.jit(lambda x: jaxloss.cross_entropy(x, y, reduction="none", return_stats=True))
    losses, stats = f(x)
    relative = relative_budget(margins(exact))
    assert_within(losses, exact_losses(exact, y), relative)
    np.testing.assert_array_equal(stats.prediction, np.argmax(exact, axis=-1))
    grad = jax.grad(lambda x: jaxloss.cross_entropy(x, y, reduction="sum"))(x)
    rounding = 0 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
    assert_within(grad, exact_gradient(exact, y), (2 * relative + rounding)[:, None])


@pytest.mark.parametrize("shape", [(20000,), (3, 20000), (2, 2, 32768), (2, 16411)])
def test_blocks_sum_the_same(shape):
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=shape) * 5, jnp.float32)
    kept = jnp.asarray(rng.integers(0, shape[-1] + 1, shape[:-1]), jnp.int32)
    m = jnp.max(x, axis=-1)
    whole = jax.jit(passes._sum_of_others)(Logits(x), m, kept)
    blocks = jax.jit(passes._sum_of_others_in_blocks)(Logits(x), m, kept)
    e = np.exp(np.asarray(x, np.longdouble) - np.asarray(m)[..., None])
    e = np.where(np.arange(shape[-1]) == np.asarray(kept)[..., None], 0, e)
    assert_within(whole, e.sum(-1), 64 * EPS)
    assert_within(blocks, e.sum(-1), 64 * EPS)


def test_indices_past_the_exact_integers_of_float32():
    c = 2**24 + 5
    x = jnp.zeros((1, c), jnp.float32).at[0, c - 2].set(3.0)
    f = jax.jit(lambda x, y: jaxloss.cross_entropy(x, y, reduction="none", return_stats=True))
    losses, stats = f(x, jnp.array([c - 2]))
    assert stats.prediction[0] == c - 2
    assert_within(-jax.jit(jaxloss.log_softmax)(x)[0, c - 2], losses[0], 64 * EPS)
    # One logit is larger than the label's, three of the ties come first.
    assert f(x, jnp.array([3]))[1].rank[0] == 4
    assert_within(losses, [np.log1p((c - 1) * np.exp(-3.0))], 64 * EPS)


def test_an_index_past_the_end():
    """Reads the last entry, and writes nowhere."""
    x, index = jnp.arange(12.0).reshape(2, 2, 3), jnp.array([[0, 3], [3, 1]], jnp.int32)
    np.testing.assert_array_equal(indexing.gather_class(x, index), [[0, 5], [8, 10]])
    few = jnp.stack([index, jnp.full_like(index, 2)], axis=-1)
    np.testing.assert_array_equal(indexing.gather_classes(x, few)[..., 0], [[0, 5], [8, 10]])
    put = indexing.scatter_classes(x, index[..., None], jnp.full((2, 2, 1), -1.0))
    np.testing.assert_array_equal(put, jnp.where(indexing.is_at(x, index), -1, x))


# The first class at the maximum: the prediction, and the entry that log_softmax keeps out

AT_MAX = {
    "plain": [[0, 3, 2], [5, 1, 1], [0, 1, 9]],
    "ties": [[1, 1, 1], [0, 2, 2], [2, 0, 2]],
    "negative": [[-5, -3, -4], [-1e30, -1e30, -1e30], [-1e-30, -2e-30, -1e-30]],
    "zeros": [[0.0, -0.0, 0.0], [-0.0, 0.0, -1], [-1, -0.0, 0.0]],
    "empty": [[-np.inf] * 3, [-np.inf, -2, -np.inf], [-np.inf, -np.inf, -1]],
    "close": [[1, 1 + EPS, 1], [1e8, 1e8 + 8, 1e8], [1e-30, 1e-37, 1.1e-30]],
    "far": [[3e38, -3e38, 3e38], [-3e38, 3e38, 0], [1e-38, 1, 3e38]],
}
WAYS = {"eager": lambda f: f, "jit": jax.jit}


def predictions(x, **options):
    y = jnp.zeros(x.shape[0], jnp.int32)
    return jaxloss.cross_entropy(x, y, return_stats=True, **options)[1].prediction


def kept_out(x, mask=None):
    logits = Logits(x, mask)
    return passes.near_max(logits, passes.row_max(logits))


@pytest.mark.nan_is_meant  # the loss of a row of -inf
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", AT_MAX)
def test_prediction_is_the_first_at_the_maximum(name, way):
    x = np.array(AT_MAX[name], np.float32)
    got = WAYS[way](predictions)(jnp.asarray(x))
    nothing = np.all(x == -np.inf, axis=-1)
    np.testing.assert_array_equal(got, np.where(nothing, -1, np.argmax(x, axis=-1)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("softcap", [None, 2.0, 30.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_entry_at_the_maximum(dtype, masked, softcap, way):
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.normal(size=(64, 97)) * 3, dtype)
    mask = jnp.asarray(rng.random((64, 97)) < 0.5) if masked else None
    wide = np.asarray(x, np.float64)
    wide = np.where(mask, wide, -np.inf) if masked else wide
    f = WAYS[way](lambda x: predictions(x, where=mask, logit_softcap=softcap))
    np.testing.assert_array_equal(f(x), np.argmax(wide, axis=-1))

    kept = np.asarray(WAYS[way](lambda x: kept_out(x, mask))(x))
    chosen = np.take_along_axis(wide, kept[:, None], -1)[:, 0]
    cap = np.float64(softcap or 1e9)
    assert_within(cap * np.tanh(chosen / cap), cap * np.tanh(wide.max(-1) / cap), 16 * EPS)


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_predicts_nothing(bad):
    x = jnp.array([[1.0, bad, 2.0], [1.0, 0.0, 2.0]])
    for f in (predictions, jax.jit(predictions)):
        np.testing.assert_array_equal(f(x), [-1, 2])
