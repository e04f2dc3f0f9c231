"""Against optax: the same numbers, and never further from the truth than optax is.

The truth is ``reference``, in longdouble on the inputs as rounded. Ours may err as much as optax
does on the same inputs in the same dtype, plus the budget of ``helpers``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import classes_last, hurting_logits, margins, reference, relative_budget

import jaxloss

SHAPES = [((5,), -1), ((6, 5), -1), ((6, 5), 0), ((2, 7, 3), 1), ((3, 4, 5), (1, 2)), ((4, 1), -1)]
DTYPES = [jnp.float32, jnp.bfloat16]


def case(shape, axis, dtype, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(hurting_logits(rng, shape), dtype)
    rows = classes_last(np.asarray(x, np.float64), axis)
    q = rng.dirichlet(np.ones(rows.shape[-1]), rows.shape[:-1])
    y = rng.integers(0, rows.shape[-1], rows.shape[:-1])
    return x, jnp.asarray(y, jnp.int32), q, margins(rows)


def to_axes(q, shape, axis):
    """``q[..., C]`` in the layout of logits of ``shape``."""
    axes = [a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))]
    order = [i for i in range(len(shape)) if i not in axes] + axes
    return np.transpose(q.reshape([shape[i] for i in order]), np.argsort(order))


def no_worse(ours, theirs, truth, budget):
    ours, theirs = (np.asarray(v, np.float64) for v in (ours, theirs))
    truth = np.asarray(truth, np.float64)
    assert ours.shape == truth.shape
    allowed = np.max(np.abs(theirs - truth), initial=0) + budget * np.abs(truth)
    assert np.all(np.abs(ours - truth) <= allowed + np.finfo(np.float32).tiny)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_integer_labels(shape, axis, dtype):
    x, y, _, margin = case(shape, axis, dtype)
    ours = jaxloss.cross_entropy(x, y, axis=axis, reduction="none")
    theirs = optax.softmax_cross_entropy_with_integer_labels(x, y, axis=axis)
    truth = reference(x, y, axis=axis, reduction="none").loss
    no_worse(ours, theirs, truth, relative_budget(margin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_probabilities(shape, axis, dtype):
    x, _, q, margin = case(shape, axis, dtype)
    q = jnp.asarray(to_axes(q, shape, axis), dtype)
    ours = jaxloss.cross_entropy(x, q, axis=axis, reduction="none")
    theirs = optax.softmax_cross_entropy(x, q, axis=axis)
    truth = reference(x, np.asarray(q, np.float64), axis=axis, reduction="none").loss
    no_worse(ours, theirs, truth, relative_budget(margin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_log_softmax(shape, axis, dtype):
    x, _, _, _ = case(shape, axis, dtype)
    ours, theirs = jaxloss.log_softmax(x, axis), jax.nn.log_softmax(x, axis)
    assert ours.dtype == theirs.dtype == dtype
    exact = np.asarray(x, np.longdouble)
    highest = np.max(exact, axis=axis, keepdims=True)
    lse = highest + np.log(np.sum(np.exp(exact - highest), axis=axis, keepdims=True))
    # Rounded once more, to the logits' dtype.
    no_worse(ours, theirs, exact - lse, float(jnp.finfo(dtype).eps) * 32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient(dtype):
    x, y, q, _ = case((6, 5), -1, dtype)
    pairs = [
        (
            lambda x: jaxloss.cross_entropy(x, y),
            lambda x: optax.softmax_cross_entropy_with_integer_labels(x, y).mean(),
            np.eye(5)[np.asarray(y)],
        ),
        (
            lambda x: jaxloss.cross_entropy(x, jnp.asarray(q, dtype)),
            lambda x: optax.softmax_cross_entropy(x, jnp.asarray(q, dtype)).mean(),
            np.asarray(jnp.asarray(q, dtype), np.float64),
        ),
    ]
    exact = np.asarray(x, np.float64)
    p = np.exp(exact - exact.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    for ours, theirs, target in pairs:
        truth = (p * target.sum(-1, keepdims=True) - target) / 6
        got, expected = jax.grad(ours)(x), jax.grad(theirs)(x)
        assert got.dtype == expected.dtype == dtype
        no_worse(got, expected, truth, float(jnp.finfo(dtype).eps) * 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothing(smoothing):
    x, y, _, margin = case((6, 5), -1, jnp.float32)
    ours = jaxloss.cross_entropy(x, y, label_smoothing=smoothing, reduction="none")
    smooth = optax.smooth_labels(jax.nn.one_hot(y, 5, dtype=x.dtype), smoothing)
    truth = reference(x, y, label_smoothing=smoothing, reduction="none").loss
    no_worse(ours, optax.softmax_cross_entropy(x, smooth), truth, relative_budget(margin))


@pytest.mark.nan_is_meant  # optax's own, behind its where
def test_where_of_classes():
    x, y, q, margin = case((6, 5), -1, jnp.float32)
    exists = np.random.default_rng(1).random((6, 5)) < 0.6
    exists[np.arange(6), y] = True
    mask = jnp.asarray(exists)
    ours = jaxloss.cross_entropy(x, y, where=mask, reduction="none")
    theirs = optax.softmax_cross_entropy_with_integer_labels(x, y, where=mask)
    truth = reference(x, y, classes=exists, reduction="none").loss
    no_worse(ours, theirs, truth, relative_budget(margin))

    q = jnp.asarray(q * exists / np.sum(q * exists, axis=-1, keepdims=True), jnp.float32)
    ours = jaxloss.cross_entropy(x, q, where=mask, reduction="none")
    theirs = optax.softmax_cross_entropy(x, q, where=mask)
    truth = reference(x, q, classes=exists, reduction="none").loss
    no_worse(ours, theirs, truth, relative_budget(margin))


def test_where_of_tokens():
    """optax leaves it to the mean; ours takes it in the call."""
    x, y, _, margin = case((6, 5), -1, jnp.float32)
    counts = jnp.array([True, False, True, True, False, True])
    theirs = optax.softmax_cross_entropy_with_integer_labels(x, y).mean(where=counts)
    truth = reference(x, y, tokens=counts).loss
    no_worse(
        jaxloss.cross_entropy(x, y, where=counts), theirs, truth, relative_budget(margin.max())
    )


def test_float64():
    with jax.enable_x64(True):
        x, y, _, _ = case((6, 5), -1, jnp.float64)
        ours = jaxloss.cross_entropy(x, y, reduction="none")
        theirs = optax.softmax_cross_entropy_with_integer_labels(x, y)
        assert ours.dtype == jnp.float64
        no_worse(ours, theirs, reference(x, y, reduction="none").loss, 1e-14)
