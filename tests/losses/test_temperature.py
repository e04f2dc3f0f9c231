"""``temperature`` of ``log_softmax`` and ``focal_loss``, and beside classes that are left out."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.budget import EPS

import jaxloss

RNG = np.random.default_rng(11)
N, C = 5, 6
X = RNG.normal(size=(N, C)) * 2
LABELS = jnp.array([0, 5, -100, 2, 4])
COUNTS = np.asarray(LABELS) >= 0
EXISTS = np.ones((N, C), bool)
EXISTS[:, 3] = EXISTS[1, 0] = False
CT = RNG.normal(size=(N, C))
SHAPES = {"a number": 0.7, "a scalar": np.array(0.7), "one a token": RNG.uniform(0.5, 2, N)}


def log_p(x, temperature):
    z = jnp.where(EXISTS, x / jnp.reshape(temperature, (-1, 1)), -jnp.inf)
    return jnp.where(EXISTS, jax.nn.log_softmax(z), 0)


def plain_log_softmax(x, temperature):
    return jnp.sum(jnp.sin(CT * log_p(x, temperature)))


def ours_log_softmax(x, temperature):
    out = jaxloss.log_softmax(x, temperature=temperature, where=EXISTS)
    return jnp.sum(jnp.sin(jnp.asarray(CT, x.dtype) * jnp.where(EXISTS, out, 0)))


def plain_focal(eps):
    def formula(x, temperature):
        nll = -log_p(x, temperature)
        q = np.where(COUNTS[:, None], np.eye(C)[np.where(COUNTS, LABELS, 0)], 0)
        q = (1 - eps) * q + eps * EXISTS / EXISTS.sum(-1, keepdims=True)
        losses = jnp.sum(q * (1 - jnp.exp(-nll)) ** 1.5 * nll, axis=-1)
        return jnp.sum(jnp.where(COUNTS, losses, 0)) / COUNTS.sum()

    return formula


def ours_focal(x, temperature, **options):
    given = {"gamma": 1.5, "temperature": temperature, "where": EXISTS, **options}
    return jaxloss.focal_loss(x, LABELS, **given)


CASES = {
    "log_softmax": (ours_log_softmax, plain_log_softmax),
    "focal_loss": (ours_focal, plain_focal(0.0)),
    "focal_loss, smoothed": (partial(ours_focal, label_smoothing=0.1), plain_focal(0.1)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_against_formulas_in_float64(name, shape):
    """Beside classes that do not exist."""
    ours, formula = CASES[name]
    number = SHAPES[shape]
    static = isinstance(number, float)
    with jax.enable_x64(True):
        x, v = jnp.asarray(X), jnp.asarray(RNG.normal(size=X.shape))
        at = x if static else (x, jnp.asarray(number))
        along = v if static else (v, jnp.full(np.shape(number), 0.3))

        def run(f):
            of = (lambda x: f(x, number)) if static else (lambda both: f(*both))
            slope = jax.grad(of)
            return of(at), slope(at), jax.jvp(of, (at,), (along,)), jax.jvp(slope, (at,), (along,))

        got = jax.jit(lambda: run(ours))()
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            expected = jax.jit(lambda: run(formula))()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12 * np.max(np.abs(b)))


@pytest.mark.parametrize("temperature", [0.7, jnp.float32(0.7)])
def test_an_offset_costs_no_digits(temperature):
    x = jnp.asarray(1e4 + np.round(X * 64) / 1024, jnp.float32)
    wide = np.asarray(x, np.longdouble) / np.longdouble(np.float32(0.7))
    if isinstance(temperature, float):
        wide = np.asarray(x, np.longdouble) / np.longdouble(0.7)
    expected = wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)
    got = np.asarray(jaxloss.log_softmax(x, temperature=temperature), np.longdouble)
    assert np.all(np.abs(got - expected) <= 16 * EPS * np.abs(expected))


def test_layouts_and_dtypes():
    x, t = jnp.asarray(X, jnp.float32), jnp.asarray(SHAPES["one a token"], jnp.float32)
    expected = jaxloss.log_softmax(x, temperature=t)
    np.testing.assert_array_equal(jaxloss.log_softmax(x.T, 0, temperature=t), expected.T)
    folded = jaxloss.log_softmax(x.reshape(N, 2, 3), (1, 2), temperature=t)
    np.testing.assert_array_equal(folded, expected.reshape(N, 2, 3))
    narrow = jaxloss.log_softmax(x.astype(jnp.bfloat16), temperature=t)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), expected, rtol=0.05, atol=0.05)
    for one in (1.0, None):
        same = jaxloss.log_softmax(x, temperature=one)
        np.testing.assert_array_equal(same, jaxloss.log_softmax(x))


@pytest.mark.nan_is_meant
def test_a_temperature_out_of_range_is_nan_in_its_rows():
    t = jnp.array([1.0, 0.0, -1.0, jnp.nan, 2.0])
    x = jnp.asarray(X, jnp.float32)
    out = jaxloss.log_softmax(x, temperature=t)
    np.testing.assert_array_equal(np.isnan(out).all(-1), [False, True, True, True, False])
    for eps in (0.0, 0.1):
        loss = partial(jaxloss.focal_loss, label_smoothing=eps, temperature=t, reduction="none")
        np.testing.assert_array_equal(np.isnan(loss(x, LABELS)), [0, 1, 0, 1, 0])
        slopes = jax.grad(lambda x: jnp.sum(loss(x, LABELS)))(x)  # noqa: B023
        np.testing.assert_array_equal(np.isnan(slopes).any(-1), [0, 1, 0, 1, 0])


# The derivative by a temperature beside classes at -inf


MASKED = np.array([[True] * 3 + [False] + [True] * 2])
INDICES = jnp.array([[0, 1], [5, 0], [2, 1], [2, 4], [4, 0]])
BESIDE = {
    "cross_entropy": lambda x, t, **o: jaxloss.cross_entropy(x, LABELS, temperature=t, **o),
    "entropy": lambda x, t, **o: jnp.sum(jaxloss.token_stats(x, LABELS, temperature=t, **o)[2]),
    "log_probs_at": lambda x, t, **o: jnp.sum(jaxloss.log_probs_at(x, INDICES, temperature=t, **o)),
}


def without_class_3(name, x, t):
    # Labels move down by the class that is gone.
    shifted = {"LABELS": LABELS, "INDICES": INDICES}
    moved = {k: jnp.where(v > 3, v - 1, v) for k, v in shifted.items()}
    log_p = jax.nn.log_softmax(x / t)
    if name == "cross_entropy":
        at = jnp.maximum(moved["LABELS"], 0)[:, None]
        found = jnp.take_along_axis(log_p, at, -1)[:, 0]
        return -jnp.sum(jnp.where(COUNTS, found, 0)) / float(COUNTS.sum())
    if name == "entropy":
        return jnp.sum(jnp.where(COUNTS, -jnp.sum(jnp.exp(log_p) * log_p, -1), 0))
    return jnp.sum(jnp.take_along_axis(log_p, moved["INDICES"], -1))


@pytest.mark.parametrize("name", BESIDE)
def test_classes_that_are_left_out_have_no_part_in_its_derivative(name):
    kept = np.flatnonzero(MASKED[0])
    with jax.enable_x64(True):
        x, t = jnp.asarray(X), jnp.float64(0.8)
        impossible = jnp.where(MASKED, x, -jnp.inf)

        def formula(t):
            return without_class_3(name, x[:, kept], t)

        expected = jax.grad(formula)(t), jax.grad(jax.grad(formula))(t)
        calls = {
            "masked": lambda t: BESIDE[name](x, t, where=MASKED),
            "at -inf": lambda t: BESIDE[name](impossible, t),
        }
        for what, f in calls.items():
            got = jax.grad(f)(t), jax.grad(jax.grad(f))(t)
            np.testing.assert_allclose(got, expected, rtol=1e-11, err_msg=what)


# Who has it


WITHOUT = {
    "linear_loss": "its function divides the chunk's logits itself",
    "sigmoid_cross_entropy": "logits / T loses no digits, because a sigmoid knows no offset",
    "sigmoid_focal_loss": "likewise",
}


def test_every_function_of_logits_has_it():
    for name in jaxloss.__all__:
        f = getattr(jaxloss, name)
        if isinstance(f, type):
            continue
        parameters = inspect.signature(f).parameters
        if {"logits", "hidden"} & set(parameters):
            assert ("temperature" in parameters) != (name in WITHOUT), name
