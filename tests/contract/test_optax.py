"""Against optax: the same numbers, and never further from the truth than optax is.

The truth is ``reference``, in longdouble on the inputs as rounded. Ours may err as much as optax
does on the same inputs in the same dtype, plus that of ``oracle.budget``.
"""

import unittest
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from forms import WHOLE
from oracle.budget import margins, relative_budget
from oracle.draw import hurting_logits
from oracle.programs import jit_quickly
from oracle.truth import classes_last, reference

import jaxloss

with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    from optax.losses import _classification, _classification_test

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


# optax's own tests of the losses that both libraries have, with jaxloss answering.


def one_a_row(logits, labels, axis=-1, where=None):
    return jaxloss.cross_entropy(logits, labels, axis=axis, where=where, reduction="none")


ANSWERS = {
    "softmax_cross_entropy": one_a_row,
    "safe_softmax_cross_entropy": one_a_row,
    "softmax_cross_entropy_with_integer_labels": one_a_row,
    "sigmoid_binary_cross_entropy": lambda x, y: jaxloss.sigmoid_cross_entropy(
        x, y, reduction="none"
    ),
    "sigmoid_focal_loss": lambda x, y, alpha=None, gamma=2.0: jaxloss.sigmoid_focal_loss(
        x, y, alpha=alpha, gamma=gamma, reduction="none"
    ),
}
CASES = (
    "SoftmaxCrossEntropyTest",
    "SafeSoftmaxCrossEntropyTest",
    "SoftmaxCrossEntropyWithIntegerLabelsTest",
    "SigmoidCrossEntropyTest",
    "SigmoidFocalLossTest",
)


class WithoutJit:
    """jax, whose ``jit`` does nothing."""

    jit = staticmethod(lambda function: function)

    def __getattr__(self, name):
        return getattr(jax, name)


OPTAX_TESTS = [
    (case, name)
    for case in CASES
    for name in unittest.defaultTestLoader.getTestCaseNames(getattr(_classification_test, case))
]


@pytest.mark.nan_is_meant
@pytest.mark.parametrize(("case", "name"), OPTAX_TESTS)
def test_of_optax(case, name, monkeypatch):
    for function, answer in ANSWERS.items():
        monkeypatch.setattr(_classification, function, answer)
    if case == "SigmoidFocalLossTest":  # it traces gamma and alpha, which are static here
        monkeypatch.setattr(_classification_test, "jax", WithoutJit())
    np.random.seed(0)  # the tests draw without a seed of their own
    result = unittest.TestResult()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        getattr(_classification_test, case)(name).run(result)
    assert result.testsRun == 1
    assert not result.skipped
    assert result.wasSuccessful(), "\n".join(text for _, text in result.failures + result.errors)


EMPTY = np.array([1, 4])  # the rows that where leaves no class
SOFT_LABELS = {
    "indices": lambda y, q, index: y,
    "probabilities": lambda y, q, index: q,
    **{
        rest: lambda y, q, index, rest=rest: jaxloss.TopKLabels(
            index, jnp.take_along_axis(q, index, -1), rest=rest
        )
        for rest in ("drop", "uniform", "bucket")
    },
}


@pytest.mark.parametrize("labels", SOFT_LABELS)
def test_a_row_without_classes_does_not_count(form, labels):
    """Its loss was NaN, and a probability asked of a class that where leaves out made the loss inf.

    The same rows without the empty ones, and without what is asked of such classes, are the truth.
    """
    if (form.schedule, labels) == ("vocab_blocks", "bucket"):
        pytest.skip("chunks alone take it")
    rng = np.random.default_rng(0)
    h, k = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 3), (3, 5)))
    q = jnp.asarray(rng.dirichlet(np.ones(5), 6), jnp.float32)
    y = jnp.arange(6) % 5
    index = jnp.asarray(np.argsort(rng.normal(size=(6, 5)), -1)[:, :2], jnp.int32)
    mask = rng.random((6, 5)) < 0.6
    mask[np.arange(6), np.asarray(y)] = True
    mask[EMPTY] = False
    # A bucket's k classes that exist, and its other classes: what is left out changes their rest.
    asked = np.take_along_axis(mask, np.asarray(index), -1)
    live = np.setdiff1d(np.arange(6), EMPTY)
    options = {} if labels == "bucket" else {"label_smoothing": 0.1, "z_loss": 0.1}

    def of(form, rows, h, k, q, reduction):
        own = SOFT_LABELS[labels](y[rows], q[rows], index[rows])
        call = partial(form.of_product, h[rows], k, own, where=jnp.asarray(mask)[rows])
        out, stats = call(reduction=reduction, return_stats=True, **options)
        return jnp.sum(jnp.sin(out)), (out, stats)

    def run(form, rows, h, k, q):
        both = []
        for reduction in ("none", "mean"):
            loss = partial(of, form, rows, reduction=reduction)
            both.append(jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(h, k, q))
        return both

    every = np.arange(6)
    got, expected = jit_quickly(lambda *a: (run(form, every, *a), run(WHOLE, live, *a)))(h, k, q)
    for ((_, (out, stats)), grads), ((_, (out_e, stats_e)), grads_e) in zip(
        got, expected, strict=True
    ):
        if out.ndim:
            np.testing.assert_array_equal(out[EMPTY], 0)
            out = out[live]
        np.testing.assert_allclose(out, out_e, rtol=1e-5)
        for v, e in zip(stats, stats_e, strict=True):
            np.testing.assert_allclose(v[live], e, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(v[EMPTY], 0 if v.dtype == jnp.float32 else -1)
        for g, e in zip(grads, grads_e, strict=True):
            np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-6)
        unasked = ~mask if labels == "probabilities" else np.zeros_like(mask)
        np.testing.assert_array_equal(np.asarray(grads[2])[unasked], 0)
    if labels == "drop":  # the same as dense probabilities whose other classes are 0
        dense = np.zeros((6, 5), np.float32)
        np.put_along_axis(
            dense, np.asarray(index), np.take_along_axis(np.asarray(q), index, -1), -1
        )
        call = partial(form.of_product, h, k, where=jnp.asarray(mask), reduction="none")
        top = SOFT_LABELS[labels](y, q, index)
        np.testing.assert_allclose(call(top), call(jnp.asarray(dense)), rtol=1e-5)
        assert not np.all(asked)


def test_a_target_at_a_class_that_where_leaves_out():
    """As optax has it: left out of the sum. A class index there keeps its infinite loss."""
    x, y, q, _ = case((6, 5), -1, jnp.float32)
    mask = jnp.asarray(np.random.default_rng(1).random((6, 5)) < 0.6).at[0].set(False)
    q = jnp.asarray(q, jnp.float32)
    theirs = optax.softmax_cross_entropy(x, q, where=mask)
    live = np.asarray(mask).any(-1)
    for ours in (
        jaxloss.cross_entropy(x, q, where=mask, reduction="none"),
        jaxloss.nll_loss(jaxloss.log_softmax(x, where=mask), q, where=mask, reduction="none"),
    ):
        np.testing.assert_allclose(ours[live], theirs[live], rtol=1e-5)
        np.testing.assert_array_equal(ours[~live], 0)
    out = jnp.asarray([[True, False], [True, True]])
    nll = jaxloss.cross_entropy(jnp.zeros((2, 2)), jnp.array([1, 1]), where=out, reduction="none")
    assert nll[0] == np.inf
    # A mask of tokens, with an axis of size 1 in the classes' place.
    tokens = mask[:, :1]
    np.testing.assert_array_equal(
        jaxloss.cross_entropy(x, y, where=tokens), jaxloss.cross_entropy(x, y, where=tokens[:, 0])
    )


def test_log_softmax_of_a_row_without_classes():
    """-inf in all of them, and no gradient, as jax.nn has it."""
    x = jnp.asarray([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    mask = jnp.array([[True, True, False], [False, False, False]])

    def total(x, log_softmax):
        return jnp.sum(jnp.where(mask, log_softmax(x, where=mask), 0) ** 2)

    np.testing.assert_array_equal(jaxloss.log_softmax(x, where=mask)[1], -jnp.inf)
    ours, theirs = (jax.grad(total)(x, f) for f in (jaxloss.log_softmax, jax.nn.log_softmax))
    np.testing.assert_array_equal(ours[1], 0)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_a_divergence_of_a_row_without_classes(divergence):
    rng = np.random.default_rng(0)
    x, t = (jnp.asarray(rng.normal(size=(4, 5)), jnp.float32) for _ in range(2))
    mask = jnp.asarray(rng.random((4, 5)) < 0.7).at[2].set(False)
    live = np.array([0, 1, 3])
    kl = partial(jaxloss.kl_divergence, divergence=divergence)
    value, grad = jax.value_and_grad(lambda x: kl(x, t, where=mask))(x)
    np.testing.assert_allclose(value, kl(x[live], t[live], where=mask[live]), rtol=1e-5)
    np.testing.assert_array_equal(grad[2], 0)
    eye = jnp.eye(5)
    fused = partial(jaxloss.linear_kl_divergence, divergence=divergence, chunk_size=2)
    np.testing.assert_allclose(fused(x, eye, t, eye, where=mask), value, rtol=1e-5)


def test_a_focal_loss_of_a_row_without_classes():
    x, y = jnp.asarray([[1.0, 2.0], [3.0, 1.0]]), jnp.array([0, 1])
    mask = jnp.array([[True, True], [False, False]])
    got = jax.value_and_grad(lambda x: jaxloss.focal_loss(x, y, where=mask))(x)
    expected = jaxloss.focal_loss(x[:1], y[:1])
    np.testing.assert_allclose(got[0], expected, rtol=1e-6)
    np.testing.assert_array_equal(got[1][1], 0)
