"""``beta`` and ``gamma`` as scalar arrays: traced, differentiable, NaN out of their range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics.fuzz.derivatives import every_derivative
from oracle.budget import EPS
from oracle.draw import rows_of

import jaxloss
from jaxloss import TopKLabels

RNG = np.random.default_rng(31)
N, D, C = 6, 3, 7
FINITE = ["plain", "flat", "peaked", "tied", "offset"]
LABELS = jnp.array([1, 3, -100, 0, 6, 2])
COUNTS = np.asarray(LABELS) >= 0
ARRAYS = {
    "x": RNG.normal(size=(N, C)) * 2,
    "t": RNG.normal(size=(N, C)) * 2,
    "hidden": RNG.normal(size=(N, D)),
    "kernel": RNG.normal(size=(D, C)),
    "teacher": RNG.normal(size=(N, D)),
    "its_kernel": RNG.normal(size=(D, C)),
}
NAMED = jnp.asarray(np.argsort(RNG.random((N, C)), axis=-1)[:, :3], jnp.int32)
STORED = RNG.dirichlet(np.ones(4), N)[:, :3]
YES = jnp.asarray(RNG.integers(0, 2, (N, C)))


# The formulas


def smoothed(eps):
    one_hot = np.where(COUNTS[:, None], np.eye(C)[np.where(COUNTS, LABELS, 0)], 0)
    return (1 - eps) * one_hot + eps / C


def focal(eps):
    def formula(number, x):
        nll = -jax.nn.log_softmax(x)
        losses = jnp.sum(smoothed(eps) * (1 - jnp.exp(-nll)) ** number * nll, axis=-1)
        return jnp.sum(jnp.where(COUNTS, losses, 0)) / COUNTS.sum()

    return formula


def binary(number, x):
    y = (1 - 0.1) * YES + 0.05
    p = jax.nn.sigmoid(x)
    losses = -(y * jnp.log(p) + (1 - y) * jnp.log(1 - p))
    return jnp.mean(((1 - y) * p + y * (1 - p)) ** number * losses)


def apart(log_p, log_q, beta):
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    m = jnp.log(beta * p + (1 - beta) * q)
    return jnp.sum(beta * p * (log_p - m) + (1 - beta) * q * (log_q - m), axis=-1)


def of_logits(number, x):
    return jnp.mean(apart(jax.nn.log_softmax(ARRAYS["t"]), jax.nn.log_softmax(x), number))


def of_products(number, hidden):
    sides = ARRAYS["teacher"] @ ARRAYS["its_kernel"], hidden @ ARRAYS["kernel"]
    losses = apart(*map(jax.nn.log_softmax, sides), number)
    return jnp.sum(jnp.where(COUNTS, losses, 0)) / COUNTS.sum()


def of_named(number, hidden):
    log_q = jax.nn.log_softmax(hidden @ ARRAYS["kernel"])
    named = jnp.any(NAMED[..., None] == jnp.arange(C), axis=1)
    rest = jax.nn.logsumexp(log_q, axis=-1, where=~named)
    log_q = jnp.concatenate([jnp.take_along_axis(log_q, NAMED, -1), rest[:, None]], axis=-1)
    log_p = jnp.log(jnp.concatenate([STORED, 1 - STORED.sum(-1, keepdims=True)], axis=-1))
    return jnp.sum(jnp.where(COUNTS, apart(log_p, log_q, number), 0)) / COUNTS.sum()


# The functions: of the number, and of an array whose derivatives mix with the number's


def js(_, reference):
    return reference.jensen_shannon


def arrays(x):
    return {k: jnp.asarray(v, x.dtype) for k, v in ARRAYS.items()}


def ours_focal(number, x, **options):
    return jaxloss.focal_loss(x, LABELS, gamma=number, **options)


def ours_smoothed(number, x):
    return ours_focal(number, x, label_smoothing=0.1)


def ours_binary(number, x):
    return jaxloss.sigmoid_focal_loss(x, YES, gamma=number, label_smoothing=0.1)


def ours_divergence(number, x):
    options = {"divergence": "jensen_shannon", "beta": number}
    return jaxloss.kl_divergence(x, arrays(x)["t"], **options)


def ours_product(number, hidden):
    a = arrays(hidden)
    sides = hidden, a["kernel"], a["teacher"], a["its_kernel"]
    options = {"divergence": "jensen_shannon", "beta": number, "where": jnp.asarray(COUNTS)}
    return jaxloss.linear_kl_divergence(*sides, chunk_size=2, **options)


def ours_stats_loss(number, hidden):
    a = arrays(hidden)
    given = {"reference": (a["teacher"], a["its_kernel"]), "beta": number, "chunk_size": 2}
    return jaxloss.linear_stats_loss(js, hidden, a["kernel"], LABELS, **given)


def ours_statistics(number, hidden):
    a = arrays(hidden)
    given = {"reference": (a["teacher"], a["its_kernel"]), "beta": number, "chunk_size": 2}
    _, found = jaxloss.linear_token_stats(hidden, a["kernel"], LABELS, **given)
    return jnp.sum(found.jensen_shannon) / COUNTS.sum().astype(hidden.dtype)


def ours_named(number, hidden):
    stored = TopKLabels(NAMED, jnp.asarray(STORED, hidden.dtype), rest="bucket")
    given = {"reference": stored, "beta": number, "chunk_size": 2}
    return jaxloss.linear_stats_loss(js, hidden, arrays(hidden)["kernel"], LABELS, **given)


CASES = {
    "focal_loss": (ours_focal, focal(0.0), "x", 1.7),
    "focal_loss, smoothed": (ours_smoothed, focal(0.1), "x", 0.6),
    "sigmoid_focal_loss": (ours_binary, binary, "x", 1.7),
    "kl_divergence": (ours_divergence, of_logits, "x", 0.3),
    "linear_kl_divergence": (ours_product, of_products, "hidden", 0.3),
    "linear_stats_loss": (ours_stats_loss, of_products, "hidden", 0.8),
    "linear_token_stats": (ours_statistics, of_products, "hidden", 0.5),
    "stored classes": (ours_named, of_named, "hidden", 0.3),
}
each_case = pytest.mark.parametrize("name", CASES)


@each_case
def test_every_derivative(name):
    ours, formula, of, number = CASES[name]
    with jax.enable_x64(True):
        x = jnp.asarray(ARRAYS[of])
        v = jnp.float64(0.7), jnp.asarray(np.random.default_rng(0).normal(size=x.shape))

        def run(f):
            return jax.jit(lambda *at: every_derivative(lambda z: f(*z), at, v))(
                jnp.float64(number), x
            )

        got = run(ours)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            expected = run(formula)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        error = np.max(np.abs(a - b)) / np.max(np.abs(b))
        assert error < 1e-11, (jax.tree_util.keystr(path), error)


@each_case
def test_a_traced_number_is_the_number(name):
    """In float32: the same loss, and a slope that float64 has, one by one and in a batch."""
    ours, formula, of, number = CASES[name]
    x = jnp.asarray(ARRAYS[of], jnp.float32)
    traced = jax.jit(ours)(jnp.float32(number), x)
    np.testing.assert_allclose(traced, ours(number, x), rtol=8 * EPS)
    several = jnp.array([number, 0.4], jnp.float32)
    losses, slopes = jax.vmap(jax.value_and_grad(ours), (0, None))(several, x)
    np.testing.assert_allclose(losses[0], traced, rtol=8 * EPS)
    slope = jax.grad(ours)(jnp.float32(number), x)
    np.testing.assert_allclose(slopes[0], slope, rtol=16 * EPS, atol=EPS * abs(float(traced)))
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        expected = [jax.grad(formula)(float(n), np.asarray(x, np.float64)) for n in several]
    np.testing.assert_allclose(slopes, expected, rtol=64 * EPS, atol=8 * EPS * abs(float(traced)))


@pytest.mark.nan_is_meant
@each_case
def test_out_of_range(name):
    """A static number is refused, and a traced one makes NaN of what it applies to."""
    ours, _, of, _ = CASES[name]
    x = jnp.asarray(ARRAYS[of], jnp.float32)
    symbol = "gamma" if "focal" in name else "beta"
    for wrong in (-0.1, np.inf, np.nan) if symbol == "gamma" else (0.0, 1.0, -1.0, np.nan):
        with pytest.raises(ValueError, match=rf"{symbol} must be in .*; got "):
            ours(wrong, x)
        assert np.isnan(jax.jit(ours)(jnp.float32(wrong), x))


@pytest.mark.nan_is_meant
def test_tokens_that_do_not_count_read_no_number():
    x, wrong = jnp.asarray(ARRAYS["x"], jnp.float32), jnp.float32(-1)
    options = {"reduction": "none", "sample_weight": jnp.asarray(COUNTS)}
    t = jnp.asarray(ARRAYS["t"], jnp.float32)

    def losses(x):
        of_divergence = {"divergence": "jensen_shannon", "beta": wrong}
        return {
            "focal": jaxloss.focal_loss(x, jnp.abs(LABELS) % C, gamma=wrong, **options),
            "divergence": jaxloss.kl_divergence(x, t, **of_divergence, **options),
        }

    for name, loss in losses(x).items():
        np.testing.assert_array_equal(np.isnan(loss), COUNTS, err_msg=name)
        np.testing.assert_array_equal(np.asarray(loss)[~COUNTS], 0, err_msg=name)
        slopes = jax.grad(lambda x: jnp.sum(losses(x)[name]))(x)  # noqa: B023
        np.testing.assert_array_equal(np.asarray(slopes)[~COUNTS], 0, err_msg=name)


def test_other_divergences_do_not_read_beta():
    x, t = (jnp.asarray(ARRAYS[k], jnp.float32) for k in "xt")
    for divergence in ("forward", "reverse"):

        def loss(beta):
            return jaxloss.kl_divergence(x, t, divergence=divergence, beta=beta)  # noqa: B023

        assert loss(jnp.float32(7)) == loss(0.5)
        assert jax.grad(loss)(0.5) == 0


@pytest.mark.parametrize("right_by", [0.0, 1e-3, 1.0, 20.0, 60.0, 200.0])
def test_slopes_of_gamma_at_every_confidence(right_by):
    """``log(1 - p)`` in full, from a loss of 0 to one of 200; a gamma of 0 among them."""
    for sign in (1, -1):
        x = jnp.array([sign * right_by, 0.0], jnp.float32)
        d = np.longdouble(sign * right_by)
        nll = np.logaddexp(np.longdouble(0), -d)
        log_u = -np.logaddexp(np.longdouble(0), d)
        for gamma in (0.0, 0.5, 2.0):
            calls = {
                "softmax": lambda g, x=x: jaxloss.focal_loss(x, jnp.array(0), gamma=g),
                "binary": lambda g, x=x: jaxloss.sigmoid_focal_loss(x[0], jnp.array(1), gamma=g),
            }
            for name, f in calls.items():
                value, slope = jax.value_and_grad(f)(jnp.float32(gamma))
                second = jax.grad(jax.grad(f))(jnp.float32(gamma))
                wanted = np.exp(gamma * log_u) * nll
                budget = ((1 + gamma) * right_by + 32) * EPS
                for k, got in enumerate((value, slope, second)):
                    expected = wanted * log_u**k
                    error = abs(np.longdouble(float(got)) - expected)
                    # What is less than the smallest float is 0, and so is its multiple.
                    flushed = np.finfo(np.float32).tiny * max(1, abs(log_u)) ** k
                    allowed = budget * abs(expected) + flushed
                    assert error <= allowed, (name, sign, gamma, k, float(got), float(expected))


def test_gammas_and_infinite_losses():
    x = jnp.array([-jnp.inf, 0.0])
    for call in (
        lambda g: jaxloss.focal_loss(x, jnp.array(0), gamma=g),
        lambda g: jaxloss.sigmoid_focal_loss(x[0], jnp.array(1), gamma=g),
    ):
        for gamma in (0.0, 2.0):
            value, slope = jax.value_and_grad(call)(jnp.float32(gamma))
            assert (value, slope) == (np.inf, 0)
    for call in (
        lambda g: jaxloss.focal_loss(-x, jnp.array(1), gamma=g),
        lambda g: jaxloss.sigmoid_focal_loss(-x[0], jnp.array(1), gamma=g),
    ):
        for gamma in (0.0, 2.0):
            assert jax.grad(call)(jnp.float32(gamma)) == 0 or np.isnan(call(jnp.float32(gamma)))


@pytest.mark.parametrize("beta", [1e-4, 0.3, 0.5, 0.999])
def test_slopes_of_beta_of_rows_drawn_to_hurt(beta):
    """``KL(p || m) - KL(q || m)``, to the roundings of its two terms."""
    rng = np.random.default_rng(7)
    x, t = (rows_of(rng, FINITE, 12, 5, "float32") for _ in range(2))
    t[:4] = x[:4] + rng.normal(size=(4, 5)).astype(np.float32) * 1e-3

    def loss(beta):
        options = {"divergence": "jensen_shannon", "beta": beta, "reduction": "none"}
        return jaxloss.kl_divergence(jnp.asarray(x), jnp.asarray(t), **options)

    got = np.asarray(jax.jvp(loss, (jnp.float32(beta),), (jnp.float32(1),))[1], np.longdouble)
    wide = (v.astype(np.longdouble) for v in (t, x))
    log_p, log_q = (v - np.logaddexp.reduce(v, axis=-1, keepdims=True) for v in wide)
    exact = np.longdouble(np.float32(beta))
    m = np.logaddexp(np.log(exact) + log_p, np.log1p(-exact) + log_q)
    p, q = np.exp(log_p), np.exp(log_q)
    of_p, of_q = np.sum(p * (log_p - m), axis=-1), np.sum(q * (log_q - m), axis=-1)
    spread = np.maximum(np.ptp(x, axis=-1), np.ptp(t, axis=-1))
    allowed = (spread + 64) * EPS * (of_p + of_q) + 1e-15
    assert np.all(np.abs(got - (of_p - of_q)) <= allowed)
