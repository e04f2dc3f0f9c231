"""The losses of binary decisions and the focal losses.

The truth is their definition in numpy's longdouble on the inputs as rounded: PyTorch's formula for
BCEWithLogitsLoss, torchvision's and optax's for the focal loss, with ``1 - p`` and logarithms that
do not cancel in 80 bits; gradients are its central differences.
"""

from functools import partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numerics.test_differentiation import TRANSFORMS, check
from oracle.budget import EPS, assert_within
from oracle.draw import hurting_logits
from oracle.programs import jit_quickly
from oracle.truth import classes_last, differences, reference, wide

import jaxloss

RNG = np.random.default_rng(0)
# Losses from 1e-37 to 87, a tie of the two classes, and a subnormal logit.
X = np.array(
    [0.0, 1e-40, 0.3, -0.3, 2.5, -2.5, 17.3, -17.3, 41.2, -41.2, 69.1, -69.1, 85.0, -85.0],
    np.float32,
)
SOFT = np.array([0.5, 1e-6, 1 - 2**-24, 0.1, 0.9, 1.0, 0.0, 1e-30], np.float32)
X, SOFT = np.repeat(X[:, None], len(SOFT), axis=1), np.repeat(SOFT[None], len(X), axis=0)
Y = RNG.integers(0, 2, X.shape).astype(np.int32)
W = RNG.uniform(0.02, 3, X.shape[-1]).astype(np.float32)
PW = RNG.uniform(0.02, 9, X.shape[-1]).astype(np.float32)
S = RNG.uniform(0.02, 3, X.shape).astype(np.float32)


def sigmoid(x):
    return np.exp(x) / (1 + np.exp(x))


def parts(x, y, *, w=1, p=1, smoothing=0.0, alpha=None, gamma=0.0):
    """(loss, the sum of the magnitudes of its slope's terms)."""
    x, y, w, p, gamma = (np.asarray(v, np.longdouble) for v in (x, y, w, p, gamma))
    y, z = (v * (1 - smoothing) + smoothing / 2 for v in (y, 1 - y))
    up, down = sigmoid(x), sigmoid(-x)
    u = z * up + y * down
    factor = w * u**gamma * (1 if alpha is None else alpha * y + (1 - alpha) * z)
    # -log sigmoid(x) and -log(1 - sigmoid(x)): 80 bits neither overflow nor cancel.
    loss = factor * (p * y * np.log1p(np.exp(-x)) + z * np.log1p(np.exp(x)))
    return loss, factor * (p * y * down + z * up) + gamma * loss / u * (y + z) * up * down


def truth(x, y, **options):
    return parts(x, y, **options)[0]


def slopes(f, x):
    """d f / d x, entry by entry, for f that mixes none: 9 digits or more."""
    x, h = np.asarray(x, np.longdouble), np.longdouble(2.0**-17)
    return (f(x + h) - f(x - h)) / (2 * h)


def gradient(loss, x, y, **options):
    return jax.grad(partial(loss, labels=y, reduction="sum", **options))(jnp.asarray(x))


# The weights' dtype is the oracle's, so the same numbers go to both.
OPTIONS = {
    "plain": ({}, {}),
    "weights": ({"weight": W, "pos_weight": PW}, {"w": W, "p": PW}),
    "each": ({"weight": S, "pos_weight": S}, {"w": S, "p": S}),
    "number": ({"pos_weight": 3.5}, {"p": 3.5}),
    "smoothing": ({"label_smoothing": 0.125}, {"smoothing": 0.125}),
    "all": (
        {"weight": W, "pos_weight": PW, "label_smoothing": 1e-9},
        {"w": W, "p": PW, "smoothing": 1e-9},
    ),
}
FOCAL = {
    "half": {"gamma": 0.5},
    "two": {"gamma": 2.0, "alpha": 0.25},
    "odd": {"gamma": 3.7, "alpha": 1.0},
    "none": {"gamma": 0.0, "alpha": 0.75},
}


def check_against_truth(loss, y, ours, theirs):
    # A rounding of a logit moves a loss that falls as exp(-(1 + gamma) x) by (1 + gamma) |x| eps,
    # and the exponentials' own arguments as much; 16 covers the arithmetic.
    budget = ((1 + theirs.get("gamma", 0)) * np.abs(X) + 16) * EPS
    expected, size = parts(X, y, **theirs)
    assert_within(loss(X, y, reduction="none", **ours), expected, budget)
    # The terms of a label of 0 or 1 have one sign, and their size is the slope's own.
    got = gradient(loss, X, y, **ours)
    expected = slopes(partial(truth, y=y, **theirs), X)
    hard = (y == 0) | (y == 1)
    if not theirs.get("smoothing"):
        np.testing.assert_allclose(size[hard], np.abs(expected[hard]), rtol=1e-8)
    error = np.abs(np.asarray(got, np.longdouble) - expected)
    assert np.all(error <= budget * size + np.finfo(np.float32).tiny)


@pytest.mark.parametrize("y", [Y, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("options", OPTIONS)
def test_sigmoid_cross_entropy(options, y):
    check_against_truth(jaxloss.sigmoid_cross_entropy, y, *OPTIONS[options])


@pytest.mark.parametrize("y", [Y, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("focal", FOCAL)
def test_sigmoid_focal_loss(focal, y):
    ours, theirs = OPTIONS["all" if focal == "two" else "plain"]
    loss = partial(jaxloss.sigmoid_focal_loss, **FOCAL[focal])
    check_against_truth(loss, y, ours, {**theirs, **FOCAL[focal]})


@pytest.mark.parametrize("kind", [np.bool_, np.int8, np.uint8, np.float32, np.float16])
def test_kinds_of_hard_labels(kind):
    for loss in (jaxloss.sigmoid_cross_entropy, jaxloss.sigmoid_focal_loss):
        got = loss(X, Y.astype(kind), reduction="none")
        np.testing.assert_array_equal(got, loss(X, Y, reduction="none"))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradient_in_probabilities(gamma):
    """Of 0 and 1 too, where ``u^(gamma - 1)`` is infinite once ``u`` underflows."""
    x = np.array([0.7, -3, 20, -20, 60, -60, 95, -95, 120, -120], np.float32)
    y = np.array([0.25, 0.5, 1, 0, 1, 0, 1, 0, 1, 0], np.float32)
    loss = partial(jaxloss.sigmoid_focal_loss, gamma=gamma, reduction="sum")
    got = jax.grad(loss, argnums=1)(x, y)
    x, y = np.asarray(x, np.longdouble), np.asarray(y, np.longdouble)
    u, du = (1 - y) * sigmoid(x) + y * sigmoid(-x), sigmoid(-x) - sigmoid(x)
    bce = truth(x, y)
    # softplus(-x) - softplus(x) = -x
    expected = u**gamma * (gamma * bce / u * du - x)
    assert_within(got, expected, ((1 + gamma) * np.abs(x) + 16) * EPS)


def test_extreme_logits_of_optax():
    """optax's test of finite gradients and Hessians, gamma below 1, with the numbers themselves."""
    x = np.array([100.0, -100.0, 75.0, -75.0, 50.0, -50.0], np.float32)
    y = np.array([0.9, 0.1, 0.8, 0.2, 1.0, 0.0], np.float32)

    def exact(x, y):
        p = 1 / (1 + mpmath.exp(-x))
        u = (1 - y) * p + y * (1 - p)
        return -(u ** mpmath.mpf(0.5)) * (y * mpmath.log(p) + (1 - y) * mpmath.log(1 - p))

    f = partial(jaxloss.sigmoid_focal_loss, gamma=0.5, reduction="sum")
    hessian = np.asarray(jax.hessian(f)(x, y))
    assert np.all(hessian[~np.eye(6, dtype=bool)] == 0)
    for order, got in enumerate((jax.vmap(f)(x, y), jax.grad(f)(x, y), np.diag(hessian))):
        with mpmath.workdps(150):
            expected = [
                float(mpmath.diff(lambda x, q=q: exact(x, mpmath.mpf(float(q))), float(v), order))
                for v, q in zip(x, y, strict=True)
            ]
        assert_within(got, expected, (1.5 * np.abs(x) + 16) * EPS)


def test_cases_of_optax():
    """The cases of optax's own tests, SigmoidFocalLossTest."""
    ys = jnp.array([[2.0, 0.1, -2.0], [0.3, -0.1, 1.2]])
    ts = jnp.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    focal = partial(jaxloss.sigmoid_focal_loss, reduction="none")
    ce = jaxloss.sigmoid_cross_entropy(ys, ts, reduction="none")
    np.testing.assert_array_equal(focal(ys, ts, gamma=0.0), ce)
    p = jax.nn.sigmoid(ys)
    p_t = p * ts + (1 - p) * (1 - ts)
    np.testing.assert_allclose(focal(ys, ts) / ce, (1 - p_t) ** 2, rtol=32 * EPS)
    np.testing.assert_array_equal(focal(ys, ts, gamma=0.0, alpha=1), ce * ts)
    assert np.all(np.asarray(focal(ys, ts, alpha=0))[np.asarray(ts) == 1] == 0)
    assert np.all(np.asarray(focal(ys, ts, alpha=1))[np.asarray(ts) == 0] == 0)
    for q in ([0.9, 0.98, 0.3, 0.99], [0.1, 0.02, 0.09, 0.15]):
        x = jnp.log(jnp.array(q)) - jnp.log1p(-jnp.array(q))
        ratio = jaxloss.sigmoid_cross_entropy(x, jnp.ones(4), reduction="none")
        ratio /= focal(x, jnp.ones(4), alpha=0.5)
        expected = 2.0 / jax.nn.sigmoid(-x) ** 2
        np.testing.assert_allclose(ratio, expected, rtol=32 * EPS)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("y", [Y, SOFT], ids=["hard", "soft"])
def test_never_further_from_the_truth_than_optax(y, dtype):
    x, q = jnp.asarray(X, dtype), jnp.asarray(y, dtype)
    exact_x, exact_q = (np.asarray(v, np.longdouble) for v in (x, q))

    def no_further(ours, theirs, expected, budget):
        ours, theirs = (np.asarray(v, np.longdouble) for v in (ours, theirs))
        error, their_error = np.abs(ours - expected), np.abs(theirs - expected)
        their_error = np.where(np.isnan(their_error), np.inf, their_error)
        assert np.all(error <= their_error + budget * EPS + np.finfo(np.float32).tiny)

    for ours, theirs, options in (
        (jaxloss.sigmoid_cross_entropy, optax.sigmoid_binary_cross_entropy, {}),
        (jaxloss.sigmoid_focal_loss, optax.sigmoid_focal_loss, {"gamma": 2.0, "alpha": 0.25}),
    ):
        got = ours(x, q, reduction="none", **options)
        assert got.dtype == jnp.float32
        exact = partial(truth, y=exact_q, **options)
        conditioning = 3 * np.abs(X) + 16
        no_further(got, theirs(x, q, **options), exact(exact_x), conditioning * exact(exact_x))

        got = jax.grad(partial(ours, reduction="sum", **options))(x, q)
        sums = jax.grad(lambda x, f=theirs, o=options: jnp.sum(f(x, q, **o)))(x)
        assert got.dtype == dtype
        expected, size = slopes(exact, exact_x), parts(exact_x, exact_q, **options)[1]
        rounding = float(jnp.finfo(dtype).eps) / EPS
        no_further(got, sums, expected, (conditioning + rounding) * size)


# PyTorch's semantics: torch.nn.functional.binary_cross_entropy_with_logits


@pytest.mark.parametrize("weight", [None, W, S], ids=["none", "class", "entry"])
@pytest.mark.parametrize("pos_weight", [None, PW, S], ids=["none", "class", "entry"])
def test_reductions_are_those_of_pytorch(weight, pos_weight):
    """``weight`` and ``pos_weight`` scale the losses, and the mean is over all entries."""
    x = RNG.normal(size=X.shape).astype(np.float32)
    w, p = (1 if v is None else v for v in (weight, pos_weight))
    losses = truth(x, SOFT, w=w, p=p)
    ours = partial(jaxloss.sigmoid_cross_entropy, x, SOFT, weight=weight, pos_weight=pos_weight)
    assert_within(ours(reduction="none"), losses, 32 * EPS)
    assert_within(ours(reduction="sum"), np.sum(losses), 32 * EPS)
    assert_within(ours(), np.mean(losses), 32 * EPS)


@pytest.mark.parametrize(
    "shape", [(), (1,), (5,), (4, 1, 1), (3, 1, 1, 1), (4, 6, 1), (1, 4, 1, 5)]
)
@pytest.mark.parametrize("option", ["weight", "pos_weight"])
def test_weights_broadcast_as_in_pytorch(option, shape):
    """``pos_weight[C, 1, 1]`` is that of images; the gradient is the sum over what is broadcast."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 4, 6, 5)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 2, x.shape), jnp.int32)
    w = jnp.asarray(rng.uniform(0.5, 2, shape), jnp.float32)
    for loss in (jaxloss.sigmoid_cross_entropy, jaxloss.sigmoid_focal_loss):

        def total(w, loss=loss):
            return loss(x, y, reduction="sum", **{option: w})

        whole = jnp.broadcast_to(w, x.shape)
        step = jit_quickly(jax.value_and_grad(total))
        (got, slope), (expected, each) = step(w), step(whole)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        slopes = np.sum(wide(each), axis=tuple(range(x.ndim - w.ndim)))
        slopes = np.sum(slopes, keepdims=True, axis=tuple(np.flatnonzero(np.array(shape) == 1)))
        np.testing.assert_allclose(slope, slopes.reshape(shape), rtol=1e-5)


def test_one_weight_a_row_of_as_many_classes_is_told_no_way():
    """Both ways would fit: [N] of N classes."""
    x = np.zeros((3, 3), np.float32)
    with pytest.raises(ValueError, match=r"losses, \(3, 3\); got float32\(3,\)\.$"):
        jaxloss.sigmoid_cross_entropy(x, x, sample_weight=x[0])


def test_the_mean_is_over_entries_that_count():
    y = np.where(RNG.random(X.shape) < 0.3, -100, Y).astype(np.int32)
    where = RNG.random(X.shape) < 0.7
    s = np.where(RNG.random(X.shape) < 0.2, 0, S).astype(np.float32)
    losses = truth(X, np.maximum(y, 0), w=W)
    counts = (y >= 0) & where
    options = {"weight": W, "where": where}
    for sample_weight, share in ((None, counts), (s, s * counts), (s > 0, (s > 0) & counts)):
        got = jaxloss.sigmoid_cross_entropy(X, y, sample_weight=sample_weight, **options)
        share = np.asarray(share, np.longdouble)
        assert_within(got, np.sum(losses * share) / np.sum(share), 128 * EPS)
        total = jaxloss.total_weight(y, sample_weight=sample_weight, where=where)
        assert_within(total, np.sum(share), 16 * EPS)


# The label contract

LOSSES = [
    partial(jaxloss.sigmoid_cross_entropy, pos_weight=2.0),
    partial(jaxloss.sigmoid_focal_loss, gamma=0.5, alpha=0.25),
    partial(jaxloss.sigmoid_focal_loss, label_smoothing=0.1),
]


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("loss", LOSSES)
def test_what_does_not_count_is_exactly_0(loss):
    """Whatever logit, probability, weight and sample weight hold there, in every derivative."""
    garbage = [np.nan, np.inf, -np.inf]
    x, q, w = (
        np.array([*garbage, *v], np.float32)
        for v in ([2.0, -3.0, 0.5], [1.0, 0.25, 0.0], [2.0, 3.0, 0.5])
    )
    skip = np.arange(6) < 3

    def total(x, q, w, where):
        return loss(x, q, weight=w, sample_weight=w, where=where)

    every = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    value, grads = every(x, q, w, ~skip)
    expected, expected_grads = every(*(np.where(skip, 0.5, v) for v in (x, q, w)), ~skip)
    assert value == expected
    for got, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_array_equal(got[:3], 0)
        np.testing.assert_array_equal(got, wanted)

    y = np.array([-100, -100, -100, 1, 0, 1], np.int32)
    s = np.where(skip, 0, 1).astype(np.float32)
    for labels, options in (
        (y, {}),
        (np.maximum(y, 0), {"sample_weight": s}),
        (np.maximum(y, 0), {"sample_weight": ~skip}),
    ):
        f = partial(loss, labels=labels, **options)
        np.testing.assert_array_equal(f(x, reduction="none")[:3], 0)
        slope = jax.jit(jax.grad(f))
        first, second = jax.jit(lambda x, g=slope: jax.jvp(g, (x,), (jnp.ones_like(x),)))(x)
        for got in (first, second):
            assert np.all(got[:3] == 0)
            assert np.all((got[3:] != 0) & np.isfinite(got[3:]))


@pytest.mark.nan_is_meant
@pytest.mark.parametrize(
    ("y", "ignore_index", "wrong"),
    [
        (np.array([0, 2, 1, -1, -100], np.int32), -100, [1, 3]),
        (np.array([0, 255, 1, 2, 1], np.uint8), -100, [1, 3]),
        (np.array([0, 255, 1, 2, 1], np.uint8), 255, [3]),
        (np.array([0, -100, 1, -128, 1], np.int8), None, [1, 3]),
        (np.array([0, 1, 1, 7, 1], np.int32), 0, [3]),
    ],
)
def test_a_label_that_is_none_is_nan_in_its_entry_alone(y, ignore_index, wrong):
    loss = LOSSES[1]
    x = np.array([0.5, -1.0, 2.0, 3.0, np.nan if y[4] == -100 else 4.0], np.float32)
    losses = loss(x, y, ignore_index=ignore_index, reduction="none")
    per_entry = jax.vmap(jax.grad(partial(loss, ignore_index=ignore_index, reduction="sum")))
    for got in (losses, per_entry(x, y)):
        np.testing.assert_array_equal(np.flatnonzero(np.isnan(got)), wrong)
    ignored = y == ignore_index if ignore_index is not None else np.zeros(5, bool)
    np.testing.assert_array_equal(np.asarray(losses)[ignored], 0)
    assert np.all(np.asarray(losses)[~ignored & ~np.isin(np.arange(5), wrong)] > 0)


@pytest.mark.nan_is_meant
def test_infinite_logits():
    inf = np.inf
    x = np.array([inf, -inf, inf, -inf, inf, -inf, np.nan], np.float32)
    y = np.array([1, 0, 0, 1, 0.5, 0.5, 1], np.float32)
    losses = [0, 0, inf, inf, inf, inf, np.nan]
    for loss in (jaxloss.sigmoid_cross_entropy, partial(jaxloss.sigmoid_focal_loss, gamma=0.5)):
        np.testing.assert_array_equal(loss(x, y, reduction="none"), losses)
        got = gradient(loss, x, y)
        np.testing.assert_array_equal(got[:4], [0, 0, 1, -1])
        assert np.isnan(got[6])
        # Of the same entries: the weights, and what is asked for nothing is not 0 * inf.
        ones = jnp.ones(4)
        for name in ("weight", "sample_weight"):
            slope = jax.grad(lambda w: loss(x[:4], y[:4], reduction="sum", **{name: w}))(ones)  # noqa: B023
            np.testing.assert_array_equal(slope, losses[:4])
    hard = jaxloss.sigmoid_cross_entropy(x[:4], y[:4].astype(np.int32), reduction="none")
    np.testing.assert_array_equal(hard, losses[:4])
    # A "probability" past 1 where 1 - p_t is negative: it has no power.
    assert np.isnan(jaxloss.sigmoid_focal_loss(np.float32(5), np.float32(1.5), gamma=0.5))
    zero = jaxloss.sigmoid_cross_entropy(x[2:4], y[2:4], weight=np.zeros(2, np.float32))
    assert zero == 0


@pytest.mark.nan_is_meant
def test_mean_over_nothing():
    loss = LOSSES[1]
    for x, y in ((np.ones(3), -np.full(3, 100)), (np.ones((0, 3)), np.ones((0, 3)))):
        x, y = x.astype(np.float32), y.astype(np.int32)
        value, slope = jax.value_and_grad(loss)(x, y)
        assert np.isnan(value)
        np.testing.assert_array_equal(slope, np.zeros_like(x))
        assert loss(x, y, reduction="sum") == 0
        assert loss(x, y, reduction="none").shape == x.shape
    assert loss(np.ones((4, 0), np.float32), np.ones((4, 0), bool), reduction="none").size == 0
    assert loss(np.float32(1), 1) > 0  # a scalar


# The focal loss of class indices

LOGITS = hurting_logits(np.random.default_rng(3), (3, 7, 5))
INDEX = np.random.default_rng(4).integers(0, 5, (3, 7)).astype(np.int32)
INDEX[0, :2] = -100


def softmax_focal(x, y, gamma, weight=None, sample_weight=None, **options):
    """(losses, what the mean divides by)."""
    nll = reference(x, y, reduction="none", **options).loss
    axis = options.get("axis", -1)
    w = np.ones(classes_last(np.asarray(x), axis).shape[-1]) if weight is None else weight
    share = np.where(y >= 0, w[np.maximum(y, 0)], 0).astype(np.longdouble)
    share = share if sample_weight is None else share * sample_weight
    return share * (-np.expm1(-nll)) ** np.longdouble(gamma) * nll, np.sum(share)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss(gamma):
    weight = np.array([0.02, 1.0, 0.5, 3.0, 1.0], np.float32)
    s = RNG.uniform(0.1, 2, INDEX.shape).astype(np.float32)
    s[1, 1] = 0
    exists = np.array([True, True, True, True, False])
    y = np.where(INDEX == 4, 3, INDEX)
    for options, theirs in (
        ({}, {}),
        ({"weight": weight, "sample_weight": s}, {"weight": weight, "sample_weight": s}),
        ({"where": exists[None, None]}, {"classes": exists}),
    ):
        losses, share = softmax_focal(LOGITS, y, gamma, **theirs)
        distance = np.max(LOGITS, axis=-1) - np.min(LOGITS, axis=-1)
        budget = ((1 + gamma) * distance + 16) * EPS * 2
        focal = partial(jaxloss.focal_loss, gamma=gamma, **options)
        assert_within(focal(LOGITS, y, reduction="none"), losses, budget)
        assert_within(focal(LOGITS, y, reduction="sum"), np.sum(losses), budget.max())
        assert_within(focal(LOGITS, y), np.sum(losses) / share, budget.max())

    x = np.moveaxis(LOGITS, -1, 1)
    along = jaxloss.focal_loss(x, y, axis=1, gamma=gamma, reduction="none")
    assert_within(along, jaxloss.focal_loss(LOGITS, y, gamma=gamma, reduction="none"), 16 * EPS)
    if not gamma:
        same = jaxloss.cross_entropy(LOGITS, y, weight=weight, sample_weight=s)
        assert jaxloss.focal_loss(LOGITS, y, gamma=0, weight=weight, sample_weight=s) == same


@pytest.mark.parametrize("gamma", [0.3, 2.0])
def test_gradient_of_focal_loss(gamma):
    """Of rows that are right by up to 100, where the loss is 0 and u^(gamma - 1) infinite."""
    x = np.array([[0, 0.5, 0.2], [1, -2, 3], [-9, 9, 0], [20, 1, 0], [0, 0, 40], [100, 0, 0]])
    x, y = x.astype(np.float32), np.array([0, 0, 1, 0, 2, 0], np.int32)
    got = gradient(partial(jaxloss.focal_loss, gamma=gamma), x, y)
    expected = differences(lambda x: np.sum(softmax_focal(x, y, gamma)[0]), x)
    # Differences of the sum hold what is large beside the first rows; row by row they hold all.
    for i in range(len(x)):
        one = slice(i, i + 1)
        expected[one] = differences(lambda x: softmax_focal(x, y[one], gamma)[0][0], x[one])  # noqa: B023
    assert_within(got, expected, ((1 + gamma) * np.ptp(x, axis=-1, keepdims=True) + 16) * EPS * 2)
    second = jax.hessian(lambda x: jaxloss.focal_loss(x, y, gamma=gamma))(x)
    assert np.all(np.isfinite(second))


@pytest.mark.nan_is_meant
def test_focal_loss_masks():
    x = LOGITS.copy()
    x[0, :2] = np.nan
    x[1, 0] = np.inf
    y = INDEX.copy()
    y[2, 0] = 5
    s = np.ones(y.shape, np.float32)
    s[1, 0] = 0
    skip = (y < 0) | (s == 0)
    losses = jaxloss.focal_loss(x, y, gamma=0.5, sample_weight=s, reduction="none")
    each = jax.grad(partial(jaxloss.focal_loss, gamma=0.5, reduction="sum"))
    slope = jax.vmap(jax.vmap(lambda x, y, s: each(x, y, sample_weight=s)))(x, y, s)
    assert np.all(np.asarray(losses)[skip] == 0)
    assert np.all(np.asarray(slope)[skip] == 0)
    np.testing.assert_array_equal(np.argwhere(np.isnan(losses)), [[2, 0]])
    assert np.all(np.isnan(slope[2, 0]))
    assert np.isnan(slope).sum() == 5


def test_focal_loss_in_linear_loss():
    rng = np.random.default_rng(5)
    h, k = rng.normal(size=(5, 4)) * 3, rng.normal(size=(4, 6)) * 3
    y = np.array([0, 5, 2, -100, 1], np.int32)
    each = partial(jaxloss.focal_loss, gamma=0.5, reduction="none")

    def fused(h, k):
        return jaxloss.linear_loss(each, h, k, y, sample_weight=y >= 0, chunk_size=2)

    with jax.enable_x64(True):
        got, expected = (
            jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(h, k)
            for f in (fused, lambda h, k: jaxloss.focal_loss(h @ k, y, gamma=0.5))
        )
        check(got, expected)


# Transformations: against plain jnp in float64, as in test_differentiation


def plain_sigmoid(x, y, w, p, s, gamma):
    down, up = jax.nn.softplus(-x), jax.nn.softplus(x)
    u = (1 - y) * jax.nn.sigmoid(x) + y * jax.nn.sigmoid(-x)
    losses = w[None] * u**gamma * (p[None] * y * down + (1 - y) * up)
    return jnp.sum(s * losses) / jnp.sum(s)


def ours_sigmoid(x, y, w, p, s, gamma):
    options = {"weight": w, "pos_weight": p, "sample_weight": s}
    return jaxloss.sigmoid_focal_loss(x, y, gamma=gamma, **options)


def plain_focal(x, w, gamma):
    nll = -jnp.take_along_axis(jax.nn.log_softmax(x), jnp.array([[1], [0]]), axis=-1)[:, 0]
    w = w[jnp.array([1, 0])]
    return jnp.sum(w * (1 - jnp.exp(-nll)) ** gamma * nll) / jnp.sum(w)


def ours_focal(x, w, gamma):
    return jaxloss.focal_loss(x, jnp.array([1, 0]), weight=w, gamma=gamma)


POINT = np.array([[0.0, 0.3, -2.0], [1.0, 0.0, 4.0]])  # 0: where |x| has no derivative
ENTRIES = (
    POINT,
    np.array([[0.5, 1.0, 0.2], [0.0, 0.9, 0.3]]),
    np.array([1.0, 0.1, 2.0]),
    np.array([3.0, 1.0, 0.5]),
    np.array([[1.0, 0.2, 2.0], [1.0, 0.5, 3.0]]),
)
MODES = ["jvp", "grad of grad", "jvp of grad", "linear_transpose", "checkpoint", "third order"]
CASES = {
    "bce": (ours_sigmoid, plain_sigmoid, ENTRIES, 0.0),
    "sigmoid focal": (ours_sigmoid, plain_sigmoid, ENTRIES, 2.5),
    "focal": (ours_focal, plain_focal, (POINT, ENTRIES[2]), 1.5),
}
RUNS = [("sigmoid focal", mode) for mode in MODES]
RUNS += [("bce", "hessian"), ("bce", "grad of jvp"), ("focal", "jvp"), ("focal", "hessian")]


@pytest.mark.parametrize(("case", "transform"), RUNS)
def test_transforms(case, transform):
    ours, plain, args, gamma = CASES[case]
    with jax.enable_x64(True):
        args = tuple(map(jnp.asarray, args))
        got, expected = (
            jax.jit(lambda *a, f=f: TRANSFORMS[transform](partial(f, gamma=gamma), a))(*args)
            for f in (ours, plain)
        )
        check(got, expected)


def test_float64():
    with jax.enable_x64(True):
        x = np.array([0.0, 3.0, -300.0, 700.0])
        y = np.array([1, 1, 0, 1])
        got = jaxloss.sigmoid_cross_entropy(x, y, reduction="none")
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, np.asarray(truth(x, y), np.float64), rtol=1e-15)
        got = jaxloss.sigmoid_focal_loss(x[:3], y[:3], gamma=1.5, reduction="none")
        expected = np.asarray(truth(x[:3], y[:3], gamma=1.5), np.float64)
        np.testing.assert_allclose(got, expected, rtol=1e-13)


def test_vmap_and_scan():
    loss = LOSSES[1]
    x, y = jnp.asarray(X[:, :4]), jnp.asarray(Y[:, :4])
    f = jax.value_and_grad(loss)
    value, slope = jax.jit(jax.vmap(f))(x, y)
    scanned = jax.lax.scan(lambda _, row: (None, f(*row)), None, (x, y))[1]
    for i in range(3):
        expected = f(x[i], y[i])
        for got in (value[i], slope[i]), (scanned[0][i], scanned[1][i]):
            np.testing.assert_allclose(got[0], expected[0], rtol=8 * EPS)
            np.testing.assert_allclose(got[1], expected[1], rtol=8 * EPS)
    columns = jax.vmap(loss, in_axes=(1, None))(x, y[:, 0])
    assert columns.shape == (4,)


# Memory and meshes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("reduction", "gamma"), [("none", 2.0), ("sum", 0.0), ("mean", 2.0)])
def test_residuals_are_the_arguments(dtype, reduction, gamma):
    x, y, w = (jnp.ones((8, 100), t) for t in (dtype, jnp.int8, jnp.float32))
    loss = partial(jaxloss.sigmoid_focal_loss, gamma=gamma, reduction=reduction)

    def large(f, *args):
        pullback = jax.vjp(f, *args)[1]
        return sorted(str(r.dtype) for r in jax.tree.leaves(pullback) if r.size > 8)

    name = jnp.dtype(dtype).name
    assert large(lambda x: loss(x, y, label_smoothing=0.1), x) == sorted([name, "int8"])
    assert large(loss, x, x) == [name, name]
    every = large(lambda x, w, s: loss(x, y, weight=w, sample_weight=s, where=w > 0), x, w, w)
    assert every == sorted([name, "int8", "float32", "float32", "bool"])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_entries_are_not_gathered(kind):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)
    split = NamedSharding(mesh, P("a", "b"))
    x, y = jax.device_put(jnp.asarray(X), split), jax.device_put(jnp.asarray(Y), split)
    w = jax.device_put(jnp.asarray(W), NamedSharding(mesh, P("b")))

    def step(x, y, w):
        return jaxloss.sigmoid_focal_loss(x, y, weight=w, alpha=0.25)

    step = jax.jit(jax.value_and_grad(step)).lower(x, y, w).compile()
    text = step.as_text()
    assert not any(op in text for op in ("all-gather", "all-to-all", "collective-permute"))
    value, slope = step(x, y, w)
    assert slope.sharding.is_equivalent_to(split, 2)
    expected = np.mean(truth(X, Y, w=W, alpha=0.25, gamma=2.0))
    assert_within(jax.device_get(value), expected, 64 * EPS)


# What is refused

SIGMOID = {"logits": X[:4, :3], "labels": Y[:4, :3]}
SHAPES = r"must broadcast to the shape of logits, \(4, 3\)"
BOTH = [
    (
        {"logits": Y[:4, :3]},
        TypeError,
        r"logits must have a real floating dtype; got int32\(4, 3\)",
    ),
    ({"labels": None}, TypeError, "labels must be an array; got None"),
    (
        {"labels": Y[:4, :3].astype(np.complex64)},
        TypeError,
        r"labels must be 0 and 1 \(integer or boolean\) or probabilities \(floating\); got c",
    ),
    (
        {"labels": Y[:4, 0]},
        ValueError,
        r"labels must have the shape of logits, \(4, 3\); got int32\(4,\)\. One class of C: ",
    ),
    ({"labels": SOFT[:4, 0]}, ValueError, r"labels must have .*; got float32\(4,\)\.\]?$"),
    ({"labels": Y[:4, :1]}, ValueError, r"labels must have .*; got int32\(4, 1\)\.\]?$"),
    ({"labels": Y[:4, :3, None]}, ValueError, r"labels must .*\. Drop .*labels\.squeeze\(-1\)"),
    (
        {"logits": X[:4, :1], "labels": Y[:4, 0]},
        ValueError,
        r"labels must have the shape of logits, \(4, 1\); got int32\(4,\)\. Drop .*logits\.squeeze",
    ),
    ({"weight": S[:3, 0][:, None]}, ValueError, rf"weight {SHAPES}; got float32\(3, 1\)\.\]?$"),
    (
        {"weight": S[:4, 0]},
        ValueError,
        rf"weight {SHAPES}; got float32\(4,\)\. Broadcast it: jnp\.broadcast_to\(weight\[:, None\]",
    ),
    ({"weight": Y[0, :3]}, TypeError, r"weight must have a real floating dtype; got int32\(3,\)"),
    ({"pos_weight": S[:4, :2]}, ValueError, rf"pos_weight {SHAPES}; got float32\(4, 2\)\.\]?$"),
    ({"pos_weight": S[None, :4, :3]}, ValueError, rf"pos_weight {SHAPES}; got float32\(1, 4, 3\)"),
    ({"pos_weight": True}, TypeError, "pos_weight must be a Python number; got bool"),
    ({"pos_weight": -1.0}, ValueError, r"pos_weight must be in \[0, .*; got -1\.0"),
    (
        {"sample_weight": W[:3]},
        ValueError,
        r"sample_weight must have the shape of the losses, \(4, 3\); got float32\(3,\)\. "
        r"Broadcast it: jnp\.broadcast_to\(sample_weight, \(4, 3\)\)",
    ),
    (
        {"sample_weight": S[:4, 0]},
        ValueError,
        r"sample_weight must .*; got float32\(4,\)\. "
        r"Broadcast it: jnp\.broadcast_to\(sample_weight\[:, None\], \(4, 3\)\)",
    ),
    (
        {"sample_weight": [1.0] * 4},
        ValueError,
        r"sample_weight .* jnp\.broadcast_to\(jnp\.asarray\(sample_weight\)\[:, None\], \(4, 3\)\)",
    ),
    ({"sample_weight": S[:4, :2]}, ValueError, r"sample_weight .*; got float32\(4, 2\)\.\]?$"),
    ({"where": S[:4, :3]}, TypeError, "where must be boolean; .*sample_weight"),
    (
        {"where": np.ones(3, bool)},
        ValueError,
        r"where must have the shape of logits, \(4, 3\); got bool\(3,\)\. "
        r"Broadcast it: jnp\.broadcast_to\(where, \(4, 3\)\)",
    ),
    ({"reduction": "avg"}, ValueError, "reduction must be one of 'none', 'mean', 'sum'; got 'avg'"),
    ({"ignore_index": 0.5}, TypeError, r"ignore_index must be an int or None; got 0\.5"),
    ({"label_smoothing": 2.0}, ValueError, r"label_smoothing must be in \[0, 1\]; got 2\.0"),
]
GAMMA = [
    ({"gamma": -1.0}, ValueError, r"gamma must be in \[0, .*; got -1\.0"),
    ({"gamma": "2"}, TypeError, "gamma must be a number, or a real scalar array; got str"),
    ({"gamma": np.nan}, ValueError, r"gamma must be in \[0, .*; got nan"),
]
ALPHA = [
    (
        {"alpha": -1},
        ValueError,
        r"alpha must be in \[0, 1\], or None; got -1\. torchvision's alpha",
    ),
    ({"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\]; got 1\.5"),
    ({"alpha": W[:3]}, TypeError, "alpha must be a Python number; got"),
]
SOFTMAX = {"logits": LOGITS[0], "labels": INDEX[0]}
INDICES = "labels must be class indices or class probabilities; got TopKLabels"
CLASSES = [
    ({"labels": jaxloss.TopKLabels(INDEX[0][:, None], LOGITS[0][:, :1])}, TypeError, INDICES),
    ({"labels": INDEX}, ValueError, r"labels must have the shape of logits without axis 1"),
    ({"weight": 1.0}, ValueError, r"weight must have one entry a class, \(5,\); got float\d+\(\)"),
]
REFUSED = [
    *(("sigmoid_cross_entropy", SIGMOID, *row) for row in BOTH),
    *(("sigmoid_focal_loss", SIGMOID, *row) for row in [*BOTH[:1], *BOTH[-4:], *GAMMA, *ALPHA]),
    *(("focal_loss", SOFTMAX, *row) for row in [*CLASSES, *GAMMA]),
]


@pytest.mark.parametrize(("name", "right", "wrong", "kind", "text"), REFUSED)
def test_a_wrong_call_is_told_what_is_wrong(name, right, wrong, kind, text):
    loss = getattr(jaxloss, name)
    assert np.isfinite(loss(**right))
    arguments = {**right, **wrong}
    with pytest.raises(kind, match=f"{name}: {text}") as eager:
        loss(**arguments)
    with pytest.raises(kind) as traced:
        jax.jit(lambda logits: loss(**{**arguments, "logits": logits}))(arguments["logits"])
    assert str(traced.value) == str(eager.value)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_of_probabilities_and_with_smoothing(gamma):
    """``sum_c w_c q'_c (1 - p_c)^gamma (-log p_c)``, of a confident row too."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 4)).astype(np.float32)
    x[1, 2] += 40
    y, w = np.array([0, 2, -100, 3, 1]), np.array([0.5, 1.0, 2.0, 1.5])
    q = rng.dirichlet(np.ones(4), 5).astype(np.float32)
    exists = rng.random((5, 4)) < 0.8
    exists[np.arange(5), y % 4] = True
    counts = y != -100

    def plain(x, q, w, label, smoothing, mask=None):
        mask = np.ones((5, 4), bool) if mask is None else mask
        log_p = jax.nn.log_softmax(jnp.where(mask, x, -jnp.inf), axis=-1)
        uniform = mask.astype(np.float64) / mask.sum(-1, keepdims=True)
        target = (1 - smoothing) * (jax.nn.one_hot(y, 4, dtype=x.dtype) if label else q)
        target = jnp.where(mask, target + smoothing * uniform, 0) * w[None]
        safe = jnp.where(mask, log_p, 0)
        # 1 - p from the others' sum: a difference loses a confident row in float64 too.
        others = jnp.exp(jnp.where(mask, log_p, -jnp.inf))[:, None, :] * (1 - jnp.eye(4))[None]
        each = jnp.sum(others, -1) ** gamma if gamma else 1
        losses = jnp.sum(target * each * -safe, -1)
        return jnp.where(counts, losses, 0) if label else losses

    cases = [
        ({}, q, False, 0.0),
        ({"label_smoothing": 0.1}, q, False, 0.1),
        ({"label_smoothing": 0.1}, y, True, 0.1),
        ({"label_smoothing": 0.1, "where": exists}, y, True, 0.1),
        ({"where": exists}, q, False, 0.0),
    ]

    def run(x, q, w):
        def of(f, *args):
            def total(*args):
                out = f(*args)
                return jnp.sum(jnp.arange(1.0, 6.0, dtype=out.dtype) * out), out

            return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*args)

        ours = [
            of(
                lambda x, q, w, o=o, label=label: jaxloss.focal_loss(
                    x, y if label else q, gamma=gamma, weight=w, reduction="none", **o
                ),
                x, q, w,
            )
            for o, _, label, _ in cases
        ]  # fmt: skip
        return ours

    ours = jit_quickly(run)(jnp.asarray(x), jnp.asarray(q), jnp.asarray(w, jnp.float32))
    with jax.enable_x64(True):
        args = [jnp.asarray(v, jnp.float64) for v in (x, q, w)]
        for ((_, out), grads), (options, _, label, smoothing) in zip(ours, cases, strict=True):
            f = partial(plain, label=label, smoothing=smoothing, mask=options.get("where"))
            expected = f(*args)
            np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-30)
            slope = jax.grad(lambda *a, f=f: jnp.sum(jnp.arange(1.0, 6.0) * f(*a)), (0, 1, 2))
            for g, e in zip(grads, slope(*args), strict=True):
                np.testing.assert_allclose(g, e, rtol=1e-3, atol=1e-6)


def test_mean_of_focal_losses_with_smoothing():
    """As cross_entropy's: over the labels' weights, and over the tokens of probabilities."""
    x, y = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32), jnp.arange(4) % 3
    w, q = jnp.array([0.5, 1.0, 2.0]), jnp.full((4, 3), 1 / 3)
    for labels, by in ((y, jnp.sum(w[y])), (q, 4)):
        options = {"weight": w, "label_smoothing": 0.1}
        total = jaxloss.focal_loss(x, labels, reduction="sum", **options)
        np.testing.assert_allclose(jaxloss.focal_loss(x, labels, **options), total / by, rtol=1e-6)
        np.testing.assert_allclose(
            jaxloss.focal_loss(x, labels, gamma=0, **options),
            jaxloss.cross_entropy(x, labels, **options),
            rtol=1e-5,
        )
