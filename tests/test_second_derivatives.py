"""Second derivatives in float32 at confident rows and along large tangents, in every mode.

A probability of e^-50 has a square of 0, and a reciprocal whose square is inf: a rule that divides
by it is right in float64, and NaN here.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from curvature import (
    assert_curvature,
    decimals,
    divergence,
    focal,
    second_derivatives,
    sigmoid_focal,
    slopes_and_hessian,
)
from helpers import jit_quickly

import jaxloss

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


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
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


@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
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


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
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


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
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


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("label", [0, 1, 0.0, 1.0, 0.3])
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
