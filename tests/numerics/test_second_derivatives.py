"""Second derivatives in float32 at confident rows and along large tangents, in every mode.

A probability of e^-50 has a square of 0, and a reciprocal whose square is inf: a rule that divides
by it is right in float64, and NaN here.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.curvature import (
    assert_curvature,
    decimals,
    divergence,
    focal,
    second_derivatives,
    second_modes,
    sigmoid_focal,
    slopes_and_hessian,
    softmax_loss,
    statistics,
)
from oracle.programs import jit_quickly

import jaxloss
from jaxloss._xla import device

pytestmark = pytest.mark.nan_is_meant

TINY = float(np.finfo(np.float32).tiny)

# Student, teacher, and a tangent of each.
PAIRS = [
    ([50, 0, 0], [0, 1, 2], [1, 2, 3], [3, -1, 2]),
    ([70, 1, 0], [69, 3, 0], [1e4, 0, 0], [0, 1e4, 0]),
    ([120, 0, 0], [0, 1, 2], [1e4, 0, 0], [0, 1e4, 0]),
    ([50, 0, 0], [0, 50.1, 0], [1, 2, 0], [0, 1, -1]),
    ([0, 90, 0], [0, 45, -200], [1, 2, 0], [1, -2, 3]),
    ([0, 1, 2], [90, 0, 0], [1, 2, 0], [1, -2, 3]),
    ([1, 0, 0], [1.001, 0, 0], [1, 2, 0], [0, 1, -1]),
]


@pytest.mark.parametrize(
    ("kind", "beta", "temperature"),
    [
        ("forward", 0.5, 1.0),
        ("reverse", 0.5, 2.0),
        ("jensen_shannon", 0.5, 1.0),
        ("jensen_shannon", 0.01, 0.5),
    ],
)
def test_divergences_of_confident_distributions(kind, beta, temperature):
    given = {"divergence": kind, "beta": beta, "temperature": temperature, "reduction": "none"}
    x, t, dx, dt = (jnp.asarray(v, jnp.float32) for v in zip(*PAIRS, strict=True))
    got = second_derivatives(partial(jaxloss.kl_divergence, **given), (x, t), (dx, dt))
    x, t, dx, dt = map(np.asarray, (x, t, dx, dt))
    for n in range(len(PAIRS)):
        both = np.concatenate([x[n], t[n]])

        def loss(z):
            return divergence(z[:3], z[3:], kind, beta, temperature)

        _, hessian = slopes_and_hessian(loss, decimals(both))
        one = jax.tree.map(lambda a, n=n: a[n], got)
        v, margin = np.concatenate([dx[n], dt[n]]), np.max(both) - np.min(both)
        floor = 4 * TINY * np.max(np.abs(v)) * (1 + margin / temperature) / temperature**2
        assert_curvature(one, hessian, v, margin / temperature, floor, (3, 3))


def test_divergences_where_a_class_is_impossible_to_the_student():
    x, t = jnp.array([50.0, 0.0, -jnp.inf]), jnp.array([0.0, 1.0, 2.0])
    loss = partial(jaxloss.kl_divergence, divergence="jensen_shannon")
    got = second_derivatives(loss, (x, t), (jnp.array([1.0, 2, 3]), t))
    # -inf is less than any logit: at -1000 nothing is left of the class either.
    _, hessian = slopes_and_hessian(
        lambda z: divergence([*z[:2], z[2] - 1000], z[3:], "jensen_shannon", 0.5, 1.0),
        decimals([50.0, 0.0, 0.0, *t]),
    )
    assert_curvature(got, hessian, np.array([1.0, 2, 3, *t]), 52, TINY, (3, 3))


FOCAL = [
    ([87, 0, 0], 0, [100, 0, 0]),
    ([50, 0, 0], 0, [1e4, 1, 2]),
    ([80, 1, -5], 0, [1, 2, 3]),
    ([80, 1, -5], 1, [1, 2, 3]),
    ([0, 1, 2], 1, [1, 2, 3]),
    ([90, 0, 0], 0, [1e4, 0, 0]),
    ([-90, 0, 0], 0, [1e4, 0, 0]),
    ([0, 17, 0], 1, [1, -2e3, 3]),
]


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_losses_of_confident_labels(gamma):
    x, y, v = (jnp.asarray(a) for a in zip(*FOCAL, strict=True))
    x, v = x.astype(jnp.float32), v.astype(jnp.float32)

    def loss(x):
        return jaxloss.focal_loss(x, y, gamma=gamma, reduction="none")

    got = second_derivatives(loss, (x,), (v,))
    x, v = np.asarray(x), np.asarray(v)
    for n, (_, label, _) in enumerate(FOCAL):
        slopes, hessian = slopes_and_hessian(lambda z, y=label: focal(z, y, gamma), decimals(x[n]))
        margin = float(np.max(x[n]) - np.min(x[n]))
        floor = 4 * TINY * float(np.max(np.abs(v[n]))) * (1 + margin) * (1 + gamma) ** 2
        one = jax.tree.map(lambda a, n=n: a[n], got)
        # Right, or wrong: of a label that is likely, all is as small as the loss.
        slopes = None if label == np.argmax(x[n]) else slopes
        assert_curvature(one, hessian, v[n], (1 + gamma) * margin, floor, (3,), slopes)


@pytest.mark.parametrize(("gamma", "alpha"), [(0.5, None), (1.0, 0.25), (2.0, None), (5.0, 0.25)])
def test_sigmoid_focal_losses_of_confident_entries(gamma, alpha):
    logits = [0, -0.5, 3, -20, 40, 87, -87, 88, 95, -95, 200]
    x, y, v = (
        jnp.asarray(a.ravel(), jnp.float32)
        for a in np.meshgrid(logits, [0.0, 1.0, 0.3, 1e-6], [1.0, 10.0, 1e4])
    )

    def loss(x):
        return jaxloss.sigmoid_focal_loss(x, y, gamma=gamma, alpha=alpha, reduction="none")

    got = second_derivatives(loss, (x,), (v,))
    x, y, v = map(np.asarray, (x, y, v))
    # The Hessian once for each logit and label.
    of = {}
    for n in range(x.size):
        at, label = float(x[n]), float(y[n])
        if (at, label) not in of:
            (probability,) = decimals(label)
            of[at, label] = slopes_and_hessian(
                lambda z, p=probability: sigmoid_focal(z[0], p, gamma, alpha), decimals(at)
            )[1]
        margin, one = abs(at), jax.tree.map(lambda a, n=n: a[n], got)
        floor = 4 * TINY * float(v[n]) * (1 + margin) * (1 + gamma) ** 2
        assert_curvature(one, of[at, label], v[n], (1 + gamma) * margin, floor, (1,))


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_sigmoid_focal_losses_by_their_probabilities(gamma):
    """Where both move: a class that is nearly impossible, and labels that are nearly 0 or 1."""
    cases = np.array(
        [(x, y, a, b) for x in (3, -20, 40, 80, -80) for y in (0.6, 1e-6)
         for a, b in ((1, 1e-3), (0, 1), (10, 0))]
    )  # fmt: skip
    x, y, dx, dy = jnp.asarray(cases.T, jnp.float32)
    loss = partial(jaxloss.sigmoid_focal_loss, gamma=gamma, alpha=0.25, reduction="none")
    got = second_derivatives(loss, (x, y), (dx, dy))
    x, y, dx, dy = map(np.asarray, (x, y, dx, dy))
    for n in range(len(cases)):
        both = np.array([x[n], y[n]])
        _, hessian = slopes_and_hessian(
            lambda z: sigmoid_focal(z[0], z[1], gamma, 0.25), decimals(both)
        )
        one = jax.tree.map(lambda a, n=n: a[n], got)
        v, margin = np.array([dx[n], dy[n]]), abs(float(x[n]))
        assert_curvature(one, hessian, v, (1 + gamma) * margin, 1e3 * TINY, (1, 1))


def value_and_gradient(loss, x):
    return jit_quickly(lambda x: (loss(x), jax.grad(lambda x: jnp.sum(loss(x)))(x)))(x)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_losses_of_labels_that_are_impossible(gamma):
    least = np.finfo(np.float32).min
    x = jnp.array([[1.0, 0, least], [-3e38, 0, 1], [0, -jnp.inf, 1], [3e38, 0, 0]])
    y = jnp.array([2, 0, 1, 1])

    def loss(x):
        return jaxloss.focal_loss(x, y, gamma=gamma, reduction="none")

    value, slope = value_and_gradient(loss, x)
    np.testing.assert_array_equal(value, np.float32([-least, 3e38, np.inf, 3e38]))
    p = 1 / (1 + np.exp(-1))
    expected = [[p, 1 - p, -1], [-1, 1 - p, p], [1 - p, -1, p], [1, -1, 0]]
    np.testing.assert_allclose(slope, np.float32(expected), rtol=1e-6)
    for second in second_derivatives(loss, (x,), (jnp.ones_like(x) * 10,)):
        assert np.all(np.isfinite(second))


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("label", [0, 1.0, 0.3])
def test_sigmoid_losses_of_infinite_and_largest_logits(label, gamma):
    most = np.finfo(np.float32).max
    x = jnp.array([np.inf, most, 1e30, 1e3, -1e3, -1e30, -most, -np.inf])

    def loss(x):
        y = jnp.full(x.shape, label)
        return jaxloss.sigmoid_focal_loss(x, y, gamma=gamma, reduction="none")

    slope = np.asarray(value_and_gradient(loss, x)[1], np.float64)
    # u is 1 - y on the one side and y on the other, and no longer moves.
    np.testing.assert_allclose(slope[:4], (1 - label) ** (gamma + 1), rtol=1e-5)
    np.testing.assert_allclose(slope[4:], -(label ** (gamma + 1)), rtol=1e-5)
    for second in second_derivatives(loss, (x,), (jnp.full(x.shape, 10.0),)):
        np.testing.assert_array_equal(np.abs(jax.tree.leaves(second)[0]), 0)


# Random rows of C = 4, right and wrong, flat and confident to a margin of 90, each along a tangent
# of up to 1e4. ``Case``: the library's losses of a batch, and the definition of one row.

N, C = 6, 4
STATISTICS = (0.7, -1.3, 0.9)


class Batch(NamedTuple):
    x: np.ndarray  # float32
    v: np.ndarray
    y: np.ndarray
    q: np.ndarray  # probabilities of all classes
    top: tuple  # two classes, and their probabilities
    exists: np.ndarray


def batch_of(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, C)) * rng.choice([1e-3, 1, 3], (N, 1))
    y, rows = rng.integers(0, C, N), np.arange(N)
    peaks = np.where(rng.random(N) < 0.7, y, rng.integers(0, C, N))
    x[rows, peaks] += rng.choice([0, 17, 45, 70, 90], N)
    v = rng.normal(size=(N, C)) * 10 ** rng.uniform(0, 4, (N, 1))
    named = np.argsort(rng.random((N, C)), axis=-1)[:, :2]
    left = rng.dirichlet(np.ones(3), N).astype(np.float32)[:, :2]
    exists = rng.random((N, C)) < 0.7
    exists[rows, y] = exists[rows, peaks] = True
    q = rng.dirichlet(np.ones(C), N).astype(np.float32)
    return Batch(np.float32(x), np.float32(v), y.astype(np.int32), q, (named, left), exists)


def one_hot(batch, n):
    return np.eye(C)[batch.y[n]]


def named(batch, n):
    index, q = batch.top
    return q[n] @ np.eye(C)[index[n]]


def others(batch, n):
    return [c for c in range(C) if c not in batch.top[0][n]]


def uniform(batch, n):
    target, rest = named(batch, n).astype(float), others(batch, n)
    target[rest] += (1 - target.sum()) / len(rest)
    return target


def top_k(batch, rest):
    return jaxloss.TopKLabels(jnp.asarray(batch.top[0]), jnp.asarray(batch.top[1]), rest)


def cross_entropy(x, y, **options):
    return jaxloss.cross_entropy(x, y, reduction="none", **options)


def by_product(x, y, **options):
    """Each logit is one product with 1, and sums with 0."""
    eye = jnp.eye(C, dtype=x.dtype)
    given = {"chunk_size": 3, "reduction": "none", **options}
    return jaxloss.linear_cross_entropy(x, eye, y, **given)


def of_statistics(stats):
    return sum(w * s for w, s in zip(STATISTICS, stats[:3], strict=True))


CASES = {
    "indices": (lambda x, b: cross_entropy(x, b.y), lambda z, b, n: softmax_loss(z, one_hot(b, n))),
    "two steps": (
        lambda x, b: jaxloss.nll_loss(jaxloss.log_softmax(x), b.y, reduction="none"),
        lambda z, b, n: softmax_loss(z, one_hot(b, n)),
    ),
    "log_softmax": (
        lambda x, b: -jnp.sum(b.q * jaxloss.log_softmax(x), axis=-1),
        lambda z, b, n: softmax_loss(z, b.q[n]),
    ),
    "smoothing": (
        lambda x, b: cross_entropy(x, b.y, label_smoothing=0.1),
        lambda z, b, n: softmax_loss(z, one_hot(b, n), smoothing=0.1),
    ),
    "z_loss": (
        lambda x, b: cross_entropy(x, b.y, z_loss=0.01),
        lambda z, b, n: softmax_loss(z, one_hot(b, n), z_loss=0.01),
    ),
    "softcap": (
        lambda x, b: cross_entropy(x, b.y, logit_softcap=30.0),
        lambda z, b, n: softmax_loss(z, one_hot(b, n), cap=30.0),
    ),
    "where": (
        lambda x, b: cross_entropy(x, b.y, where=b.exists),
        lambda z, b, n: softmax_loss(z, one_hot(b, n), exists=np.flatnonzero(b.exists[n])),
    ),
    "probabilities": (
        lambda x, b: cross_entropy(x, b.q),
        lambda z, b, n: softmax_loss(z, b.q[n]),
    ),
    "drop": (
        lambda x, b: cross_entropy(x, top_k(b, "drop")),
        lambda z, b, n: softmax_loss(z, named(b, n)),
    ),
    "uniform": (
        lambda x, b: cross_entropy(x, top_k(b, "uniform")),
        lambda z, b, n: softmax_loss(z, uniform(b, n)),
    ),
    "bucket": (
        lambda x, b: cross_entropy(x, top_k(b, "bucket")),
        lambda z, b, n: softmax_loss(z, named(b, n), bucket=others(b, n)),
    ),
    "statistics": (
        lambda x, b: of_statistics(jaxloss.token_stats(x, b.y, temperature=2.0)),
        lambda z, b, n: statistics(z, one_hot(b, n), STATISTICS, 2.0),
    ),
    "statistics of probabilities": (
        lambda x, b: of_statistics(jaxloss.token_stats(x, b.q)),
        lambda z, b, n: statistics(z, b.q[n], STATISTICS),
    ),
    "token chunks": (
        lambda x, b: by_product(x, b.y, implementation="token_chunks", label_smoothing=0.1),
        lambda z, b, n: softmax_loss(z, one_hot(b, n), smoothing=0.1),
    ),
    "vocabulary blocks": (
        lambda x, b: by_product(x, b.y, implementation="vocab_blocks"),
        lambda z, b, n: softmax_loss(z, one_hot(b, n)),
    ),
    "focal": (
        lambda x, b: jaxloss.focal_loss(x, b.y, gamma=1.5, reduction="none"),
        lambda z, b, n: focal(z, b.y[n], 1.5),
    ),
}


def divergence_case(kind):
    given = {"divergence": kind, "beta": 0.3, "temperature": 1.0}

    def of_batch(x, b):
        teacher = 9 * jnp.log(b.q)
        return jaxloss.kl_divergence(x, teacher, reduction="none", **given)

    def of_row(z, b, n):
        return divergence(z, decimals(np.float32(9 * np.log(b.q[n]))), *given.values())

    return of_batch, of_row


# By its fixed rows above in the ordinary suite.
DIVERGENCES = {kind: divergence_case(kind) for kind in ("forward", "reverse", "jensen_shannon")}
EVERY = CASES | DIVERGENCES


@lru_cache
def program_of(name):
    """One for all batches."""
    loss = EVERY[name][0]

    def modes(batch):
        return second_modes(lambda x: loss(x, batch), (batch.x,), (batch.v,))

    return jit_quickly(modes)


def check_batch(name, seed):
    batch = batch_of(seed)
    got = jax.tree.map(np.asarray, program_of(name)(batch))
    for n in range(N):
        x, v = batch.x[n], batch.v[n]
        slopes, hessian = slopes_and_hessian(
            lambda z, n=n: EVERY[name][1](z, batch, n), decimals(x)
        )
        margin = float(np.max(x) - np.min(x))
        floor = 8 * TINY * float(np.max(np.abs(v))) * (1 + margin) ** 2
        one = jax.tree.map(lambda a, n=n: a[n], got)
        try:
            assert_curvature(one, hessian, v, 2 * margin, floor, (C,), slopes)
        except AssertionError as error:
            error.add_note(f"check_batch({name!r}, {seed}), row {n}: {x}, {batch.y[n]}, along {v}")
            raise


@pytest.mark.parametrize("name", CASES)
def test_random_rows(name):
    for seed in range(2):
        check_batch(name, seed)


@pytest.mark.soak
@pytest.mark.parametrize("name", EVERY)
def test_many_random_rows(name):
    for seed in range(2, 100):
        check_batch(name, seed)


OF_NARROW = {
    "log_softmax": lambda x: jnp.sum(jnp.sin(jaxloss.log_softmax(x).astype(jnp.float32))),
    "two steps": lambda x: jnp.sin(jaxloss.nll_loss(jaxloss.log_softmax(x), jnp.arange(3))),
    "class indices": lambda x: jaxloss.cross_entropy(x, jnp.arange(3), z_loss=0.1),
    "top k": lambda x: jaxloss.cross_entropy(
        x, jaxloss.TopKLabels(jnp.arange(6).reshape(3, 2), jnp.full((3, 2), 0.4)), z_loss=0.1
    ),
    "probabilities": lambda x: jaxloss.cross_entropy(x, jnp.full((3, 7), 1 / 7)),
}


@pytest.mark.parametrize("one_device", [False, True])
@pytest.mark.parametrize("name", OF_NARROW)
def test_bfloat16_logits_have_those_of_float32(name, one_device, monkeypatch):
    """Entries are put into narrow rows as bits, which by themselves have no derivative."""
    monkeypatch.setattr(device, "on_one_device", lambda: one_device)
    f, rng = OF_NARROW[name], np.random.default_rng(0)
    x, along = (jnp.asarray(rng.normal(size=(3, 7)), jnp.bfloat16) for _ in range(2))

    @jit_quickly
    def both(x, along):
        grad = jax.grad(f)
        forward = jax.jvp(grad, (x,), (along,))[1]
        reverse = jax.grad(lambda x: jnp.sum((grad(x) * along).astype(jnp.float32)))(x)
        return forward.astype(jnp.float32), reverse.astype(jnp.float32)

    for got, truth in zip(
        both(x, along), both(x.astype(jnp.float32), along.astype(jnp.float32)), strict=True
    ):
        assert jnp.linalg.norm(got - truth) <= 0.02 * jnp.linalg.norm(truth)
