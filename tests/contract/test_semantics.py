"""What each option means, worked by hand where it is PyTorch's, then all of them together."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms import FORMS, SCHEDULES
from oracle.budget import EPS, assert_within, margins
from oracle.draw import hurting_logits
from oracle.programs import jit_quickly
from oracle.truth import differences, reference

import jaxloss

LN2 = np.log(2.0)
# softmax of its rows: (1/4, 1/2, 1/4) and (1/2, 1/4, 1/4); -log p in units of ln 2: 2 1 2, 1 2 2.
X = jnp.log(jnp.array([[1.0, 2.0, 1.0], [4.0, 2.0, 2.0]]))
W = jnp.array([1.0, 2.0, 5.0])
Q = jnp.array([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])
LABELS = jnp.array([1, 2])

ARTICLE_X = jnp.array(
    [
        [2.001724005, -0.480613202, -0.162628576, -0.422899574, -1.314381957],
        [-0.374118149, 0.077360593, -0.785144210, -0.229126230, -1.095805287],
    ],
    jnp.float32,
)

# Each expected value is in units of ln 2.
WORKED = {
    # l_n = -log p_y: 1, 2.
    "none": ({"reduction": "none"}, LABELS, [1, 2]),
    "sum": ({"reduction": "sum"}, LABELS, 3),
    "mean": ({}, LABELS, 1.5),
    # w_y l_n: 2 * 1, 5 * 2; the mean divides by the weights of the labels, 2 + 5.
    "weight none": ({"weight": W, "reduction": "none"}, LABELS, [2, 10]),
    "weight sum": ({"weight": W, "reduction": "sum"}, LABELS, 12),
    "weight mean": ({"weight": W}, LABELS, 12 / 7),
    # The first token is out of the numerator and out of the denominator.
    "ignored": ({}, jnp.array([-100, 2]), 2),
    "ignored weight": ({"weight": W}, jnp.array([-100, 2]), 2),
    "ignored none": ({"reduction": "none"}, jnp.array([-100, 2]), [0, 2]),
    "ignore_index 1": ({"ignore_index": 1}, LABELS, 2),
    # (1 - e) l_n + e / C sum_c l_nc = 0.7 * (1, 2) + 0.1 * (5, 5).
    "smoothing": ({"label_smoothing": 0.3, "reduction": "none"}, LABELS, [1.2, 1.9]),
    # 0.7 w_y l_n + 0.1 sum_c w_c l_nc: 0.7 * 2 + 0.1 * (2 + 2 + 10), 0.7 * 10 + 0.1 * (1 + 4 + 10);
    # the mean still divides by 2 + 5.
    "smoothing weight none": (
        {"label_smoothing": 0.3, "weight": W, "reduction": "none"},
        LABELS,
        [2.8, 8.5],
    ),
    "smoothing weight mean": ({"label_smoothing": 0.3, "weight": W}, LABELS, 11.3 / 7),
    "smoothing weight ignored": (
        {"label_smoothing": 0.3, "weight": W},
        jnp.array([1, -100]),
        1.4,
    ),
    "smoothing 1": ({"label_smoothing": 1.0, "reduction": "none"}, LABELS, [5 / 3, 5 / 3]),
    # sum_c q_c l_nc: 0.5 * 2 + 0.5 * 1, 0.25 * 1 + 0.25 * 2 + 0.5 * 2.
    "probabilities": ({"reduction": "none"}, Q, [1.5, 1.75]),
    # sum_c w_c q_c l_nc: 1 + 1, 0.25 + 1 + 5; the mean divides by the number of tokens, 2.
    "probabilities weight": ({"weight": W, "reduction": "none"}, Q, [2, 6.25]),
    "probabilities weight mean": ({"weight": W}, Q, 8.25 / 2),
    # 0.7 of that and 0.1 sum_c w_c l_nc = 0.1 * (14, 15).
    "probabilities weight smoothing": (
        {"weight": W, "label_smoothing": 0.3, "reduction": "none"},
        Q,
        [1.4 + 1.4, 4.375 + 1.5],
    ),
    "probabilities weight smoothing mean": (
        {"weight": W, "label_smoothing": 0.3},
        Q,
        (2.8 + 5.875) / 2,
    ),
    # s_n l_n; the mean divides by sum s_n (w_y): 4 * 1 + 0.5 * 2 over 4.5; 4 * 2 + 0.5 * 10 over
    # 4 * 2 + 0.5 * 5; for probabilities over 4.5.
    "sample_weight none": (
        {"sample_weight": jnp.array([4.0, 0.5]), "reduction": "none"},
        LABELS,
        [4, 1],
    ),
    "sample_weight mean": ({"sample_weight": jnp.array([4.0, 0.5])}, LABELS, 5 / 4.5),
    "sample_weight weight": (
        {"sample_weight": jnp.array([4.0, 0.5]), "weight": W},
        LABELS,
        13 / 10.5,
    ),
    "sample_weight probabilities": (
        {"sample_weight": jnp.array([4.0, 0.5]), "weight": W},
        Q,
        (8 + 3.125) / 4.5,
    ),
    "sample_weight int": ({"sample_weight": jnp.array([4, 1])}, LABELS, 6 / 5),
    "sample_weight bool": ({"sample_weight": jnp.array([False, True])}, LABELS, 2),
    "where tokens": ({"where": jnp.array([False, True])}, LABELS, 2),
    # Without class 0 the rows are (2/3, 1/3), (1/2, 1/2).
    "where classes": (
        {"where": jnp.array([[False, True, True]]), "reduction": "none"},
        LABELS,
        [np.log2(1.5), 1],
    ),
    # Smoothing is uniform over the two that exist.
    "where classes smoothing": (
        {
            "where": jnp.array([[False, True, True]]),
            "label_smoothing": 0.5,
            "reduction": "none",
        },
        LABELS,
        [0.5 * np.log2(1.5) + 0.25 * (np.log2(1.5) + np.log2(3)), 1],
    ),
    # lse = ln 4 = 2 ln 2, ln 8 = 3 ln 2; in units of ln 2 the penalty is z lse^2 / ln 2.
    "z_loss": (
        {"z_loss": 0.1, "reduction": "none"},
        LABELS,
        [1 + 0.4 * LN2, 2 + 0.9 * LN2],
    ),
    "z_loss weight": (
        {"z_loss": 0.1, "weight": W, "reduction": "none"},
        LABELS,
        [2 * (1 + 0.4 * LN2), 5 * (2 + 0.9 * LN2)],
    ),
    "z_loss probabilities weight": (
        {"z_loss": 0.1, "weight": W, "reduction": "none"},
        Q,
        [2 + 0.4 * LN2, 6.25 + 0.9 * LN2],
    ),
}


@pytest.mark.parametrize("name", WORKED)
def test_worked_by_hand(name):
    options, labels, expected = WORKED[name]
    expected = np.asarray(expected) * LN2
    assert_within(jaxloss.cross_entropy(X, labels, **options), expected, 8 * EPS)
    if not options.keys() & {"label_smoothing", "z_loss"}:
        where = options.get("where")
        log_probs = jaxloss.log_softmax(
            X, where=where if where is not None and where.ndim > 1 else None
        )
        assert_within(jaxloss.nll_loss(log_probs, labels, **options), expected, 8 * EPS)


def test_softcap_by_hand():
    # 2 tanh(x / 2) of (0, 2 atanh(1/2)) is (0, 1).
    x = jnp.array([0.0, 2 * np.arctanh(0.5)], jnp.float32)
    loss = jaxloss.cross_entropy(x, jnp.array(1), logit_softcap=2.0)
    assert_within(loss, np.log1p(np.exp(-1.0)), 8 * EPS)


def test_article():
    labels = jnp.array([2, 1])
    loss = jaxloss.cross_entropy(ARTICLE_X, labels)
    nll = jaxloss.nll_loss(jaxloss.log_softmax(ARTICLE_X), labels)
    np.testing.assert_allclose([loss, nll], 1.788572907, rtol=1e-7)
    for axis, expected in {
        0: [-0.088867798, -1.010556340, -0.429567605, -0.794720054, -0.808395624],
        1: [-0.280035913, -2.762373209, -2.444388628, -2.704659462, -3.596141815],
    }.items():
        out = jaxloss.log_softmax(ARTICLE_X, axis)
        np.testing.assert_allclose(out[0], expected, rtol=0, atol=2 * EPS)


def test_nll_loss_takes_its_input_as_it_is():
    log_probs = jnp.array([[0.1, 0.1, 0.1, 0.2, 0.5]] * 2, jnp.float32)
    assert jaxloss.nll_loss(log_probs, jnp.array([4, 1])) == np.float32(-0.3)


AXES = [
    ((5,), 0),
    ((5,), -1),
    ((4, 5), 0),
    ((4, 5), 1),
    ((2, 3, 5), 1),
    ((2, 3, 5), -3),
    ((2, 1, 3, 5), 2),
    ((2, 3, 5), (1, 2)),
    ((2, 3, 5), (2, 0)),
    ((2, 3, 5), (0, -2)),
    ((2, 3), (0, 1)),
    ((3, 2, 1, 5), (-1, 1)),
]


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize(("shape", "axis"), AXES)
def test_axis(shape, axis, probabilities):
    rng = np.random.default_rng(1)
    axes = [a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))]
    x = rng.normal(scale=3, size=shape).astype(np.float32)
    batch = tuple(n for i, n in enumerate(shape) if i not in axes)
    c = int(np.prod([shape[a] for a in axes]))
    labels = rng.integers(0, c, batch)
    if probabilities:
        labels = rng.dirichlet(np.ones(x.size)).reshape(shape).astype(np.float32)
    weight = (0.01 + np.arange(c, dtype=np.float32)) / c
    options = {"axis": axis, "weight": weight}

    @jax.jit
    def ours(x):
        out = jaxloss.log_softmax(x, axis)
        losses = {
            reduction: (
                jaxloss.cross_entropy(x, labels, reduction=reduction, **options),
                jaxloss.nll_loss(out, labels, reduction=reduction, **options),
            )
            for reduction in ("none", "mean")
        }
        return losses, out, jax.grad(lambda x: jaxloss.cross_entropy(x, labels, **options))(x)

    losses, out, grad = ours(x)
    for reduction, got in losses.items():
        expected = reference(x, labels, reduction=reduction, **options).loss
        for loss in got:
            assert_within(loss, expected, 64 * EPS)
    assert out.shape == shape
    assert grad.shape == shape
    expected = differences(lambda x: reference(x, labels, **options).loss, x)
    assert_within(grad, expected, 64 * EPS, floor=np.max(np.abs(expected)))


@pytest.mark.parametrize("axis", [-1, 0, (0, 2), (2, 1)])
def test_where_classes_on_any_axis(axis):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(3, 4, 5)).astype(np.float32)
    axes = tuple(a % 3 for a in (axis if isinstance(axis, tuple) else (axis,)))
    mask = rng.random(tuple(n if i in axes else 1 for i, n in enumerate(x.shape))) < 0.6
    mask.flat[0] = True
    batch = tuple(n for i, n in enumerate(x.shape) if i not in axes)
    labels = np.zeros(batch, np.int32)  # flat class 0 exists
    options = {"axis": axis, "reduction": "none"}
    got = jaxloss.cross_entropy(x, labels, where=mask, label_smoothing=0.2, **options)
    expected = reference(x, labels, classes=mask, label_smoothing=0.2, **options).loss
    assert_within(got, expected, 64 * EPS)
    masked = jnp.where(mask, x, -jnp.inf)
    out = jaxloss.log_softmax(x, axis, where=mask)
    assert_within(out, jaxloss.log_softmax(masked, axis), 4 * EPS)
    assert np.all(np.isneginf(out) == np.broadcast_to(~mask, x.shape))
    cotangent = jnp.where(jnp.broadcast_to(mask, x.shape), jnp.ones_like(x), 0)
    dx = jax.vjp(lambda x: jaxloss.log_softmax(x, axis, where=mask), x)[1](cotangent)[0]
    assert np.all(np.asarray(dx)[np.broadcast_to(~mask, x.shape)] == 0)
    assert np.all(np.isfinite(dx))


def test_where_of_one_token_mask_per_shape():
    x = jnp.array(np.random.default_rng(3).normal(size=(2, 3, 4)), jnp.float32)
    labels = jnp.array([[0, 1, 2], [3, 0, 1]])
    tokens = jnp.array([[True, False, True], [False, False, True]])
    losses = jaxloss.cross_entropy(x, labels, reduction="none")
    got = jaxloss.cross_entropy(x, labels, where=tokens, reduction="none")
    np.testing.assert_array_equal(got, np.where(tokens, losses, 0))
    mean = jaxloss.cross_entropy(x, labels, where=tokens)
    assert_within(mean, np.sum(np.where(tokens, losses, 0)) / 3, 8 * EPS)
    scalar_class = jaxloss.cross_entropy(x, labels, where=jnp.ones((), bool))
    assert scalar_class == jaxloss.cross_entropy(x, labels)


# Statistics


def stats_case(dtype=jnp.float32):
    rng = np.random.default_rng(4)
    x = jnp.asarray(hurting_logits(rng, (7, 11)), dtype)
    labels = jnp.array([3, -100, 10, 0, 5, 5, 1])
    sample_weight = jnp.array([1.0, 1.0, 0.0, 2.0, 1e-3, 1.0, 1.0])
    return x, labels, sample_weight


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_stats_values(reduction, dtype):
    x, labels, sample_weight = stats_case(dtype)
    options = {"sample_weight": sample_weight, "reduction": reduction, "label_smoothing": 0.1}
    loss, stats = jaxloss.cross_entropy(x, labels, return_stats=True, **options)
    expected = reference(np.asarray(x, np.longdouble), labels, **options)
    relative = (margins(np.asarray(x, np.float64)).max() + 16) * 2 * EPS
    assert_within(loss, expected.loss, relative)
    assert_within(stats.log_prob, expected.log_prob, relative)
    assert_within(stats.logsumexp, expected.logsumexp, relative)
    assert_within(stats.entropy, expected.entropy, relative)
    np.testing.assert_array_equal(stats.prediction, expected.prediction)
    integers = {name for name, v in stats._asdict().items() if v.dtype == jnp.int32}
    assert integers == {"prediction", "rank"}
    assert all(v.dtype in (jnp.int32, jnp.float32) for v in stats)
    assert list(np.flatnonzero(np.asarray(stats.prediction) == -1)) == [1, 2]


@pytest.mark.parametrize(
    "options",
    [{}, {"weight": jnp.linspace(0.1, 2, 11)}, {"label_smoothing": 0.2}, {"logit_softcap": 6.0}],
)
def test_stats_of_probabilities(options):
    x, _, sample_weight = stats_case()
    q = jnp.asarray(np.random.default_rng(5).dirichlet(np.ones(11), 7), jnp.float32)
    options = {"sample_weight": sample_weight, "reduction": "none", **options}
    _, stats = jaxloss.cross_entropy(x, q, return_stats=True, **options)
    expected = reference(x, q, **options)
    for got, want in zip(stats[:3], expected[1:4], strict=True):
        assert_within(got, want, (margins(x).max() + 16) * 2 * EPS)
    np.testing.assert_array_equal(stats.prediction, expected.prediction)


def test_stats_with_masked_classes_and_softcap():
    x, labels, _ = stats_case()
    where = jnp.arange(11)[None] % 4 != 2
    labels = jnp.where(labels == 10, 9, labels)
    options = {"logit_softcap": 4.0, "reduction": "none"}
    _, stats = jaxloss.cross_entropy(x, labels, where=where, return_stats=True, **options)
    expected = reference(x, labels, classes=where, **options)
    for got, want in zip(stats[:3], expected[1:4], strict=True):
        assert_within(got, want, 64 * EPS, floor=1e-2)
    np.testing.assert_array_equal(stats.prediction, expected.prediction)


@pytest.mark.parametrize("name", ["log_prob", "logsumexp", "entropy"])
def test_stats_are_differentiable_for_each_token(name):
    x, labels, _ = stats_case()
    ct = np.linspace(-1, 2, 7).astype(np.float32)

    def total(x):
        stats = jaxloss.cross_entropy(x, labels, reduction="none", return_stats=True)[1]
        return jnp.sum(getattr(stats, name) * ct)

    def expected(x):
        stats = reference(x, labels, reduction="none")
        return np.sum(getattr(stats, name) * ct)

    want = differences(expected, x)
    row = np.max(np.abs(want), axis=-1, keepdims=True)
    # p (H - log p): each of the two may exceed their difference.
    assert_within(jax.grad(total)(x), want, (margins(x)[:, None] + 16) * 8 * EPS, floor=row + 1e-12)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_stats_of_a_scalar_reduction_carry_no_gradient(reduction):
    x, labels, _ = stats_case()

    def total(x, share):
        out = jaxloss.cross_entropy(x, labels, reduction=reduction, return_stats=True)
        loss, stats = out
        return loss + share * (stats.log_prob + stats.logsumexp + stats.entropy).sum()

    np.testing.assert_array_equal(jax.grad(total)(x, 3.0), jax.grad(total)(x, 0.0))


@pytest.mark.nan_is_meant
def test_stats_of_labels_out_of_range():
    x, labels, _ = stats_case()
    labels = labels.at[3].set(11)
    _, stats = jaxloss.cross_entropy(x, labels, reduction="none", return_stats=True)
    for value in stats[:3]:
        assert list(np.flatnonzero(np.isnan(value))) == [3]
    assert stats.prediction[3] != -1 or stats.prediction.dtype == jnp.int32


# Every combination


def random_case(seed):
    """Returns (arguments that differentiate, constants of the call, of the reference)."""
    rng = np.random.default_rng(seed)

    def draw(p=0.5):
        return rng.random() < p

    n, c = rng.choice([1, 3, 6]), rng.choice([2, 5, 9])
    x = hurting_logits(rng, (n, c))
    call, both = {}, {"reduction": str(rng.choice(["none", "sum", "mean"]))}
    moving = {"logits": x}
    exists = np.ones((n, c), bool)
    if draw(0.3):
        exists = rng.random((n, c)) < 0.7
        exists[:, 0] = True
        if n == 1:
            exists = np.ones((1, c), bool)
            exists[0, -1] = False
        call["where"] = exists
    probabilities = draw(0.4)
    if probabilities:
        q = rng.dirichlet(np.full(c, 0.5), n) * exists
        q[rng.random((n, c)) < 0.2] = 0
        moving["labels"] = q.astype(np.float32)
        both["labels"] = None
    else:
        y = np.array([rng.choice(np.flatnonzero(row)) for row in exists])
        both["ignore_index"] = rng.choice([-100, 0, 255]).item()
        y[rng.random(n) < 0.25] = both["ignore_index"]
        both["labels"] = y.astype(np.int32)
    if draw():
        weight = (10.0 ** rng.uniform(-4, 1, c)).astype(np.float32)
        weight[-1] = 0 if draw(0.2) else weight[-1]
        moving["weight"] = weight
    if draw():
        sample_weight = (10.0 ** rng.uniform(-3, 1, n)).astype(np.float32)
        sample_weight[rng.random(n) < 0.2] = 0
        if draw(0.3):
            both["sample_weight"] = sample_weight > 0.1
        else:
            moving["sample_weight"] = sample_weight
    if draw():
        both["label_smoothing"] = float(rng.choice([0.1, 0.9, 1.0]))
    if draw(0.3):
        both["z_loss"] = 10.0 ** rng.integers(-4, 1)
    if draw(0.3):
        both["logit_softcap"] = float(rng.choice([2.0, 30.0]))
    return moving, both, call


OVER_NOTHING = pytest.param(36, marks=pytest.mark.nan_is_meant)  # a mean, that is


@pytest.mark.parametrize("seed", [*range(36), OVER_NOTHING, *range(37, 48)])
def test_options_together(seed):
    moving, both, call = random_case(seed)
    n = len(moving["logits"])
    constants = {k: v for k, v in both.items() if v is not None}
    truth = {"classes": call["where"]} if call else {}
    row_ct = np.random.default_rng(seed).uniform(0.5, 2, n).astype(np.float32)

    def ours(moving):
        loss = jaxloss.cross_entropy(**moving, **constants, **call)
        return jnp.sum(loss * row_ct) if loss.ndim else loss

    def expected(moving):
        loss = reference(**moving, **constants, **truth).loss
        return np.sum(loss * row_ct) if np.ndim(loss) else loss

    def total(moving):
        return reference(**moving, **{**constants, "reduction": "sum"}, **truth).loss

    x = moving["logits"]
    # All terms of a loss are positive; logsumexp, not its square's root, is known to eps |x|.
    floor = both.get("z_loss", 0) * float(np.max(np.abs(x)) ** 2) * 10
    relative = (float(margins(x).max()) + 16) * 2 * EPS
    value, grads = jax.jit(jax.value_and_grad(ours))(moving)
    assert_within(value, expected(moving), relative, floor)
    if np.isnan(value):  # a mean over nothing
        return
    # d mean / d weight is a difference of numbers of this size.
    share = float(expected(moving) / np.maximum(np.abs(total(moving)), 1e-30))
    exists = call.get("where", True)
    for name, got in grads.items():
        by_class = name in ("logits", "labels")
        movable = exists if by_class else moving[name] != 0  # a weight of 0 has tests of its own

        def moved(v, name=name, movable=movable):
            return expected({**moving, name: np.where(movable, v, 0)})

        want = differences(moved, moving[name], relative=not by_class)
        if by_class:
            scale = np.max(np.abs(want), axis=-1, keepdims=True)
        else:
            scale = np.max(np.abs(want)) + np.abs(float(value) * share)
        if name == "weight":
            got, want = got[movable], want[movable]
        assert_within(got, want, 4 * relative, floor=scale + 1e-9 + floor)


def test_smoothing_over_a_mask_of_size_one():
    """A mask that broadcasts over the classes says that all of them exist."""
    x, y = jnp.asarray([[1.0, 2.0, 4.0], [0.0, 3.0, 1.0]]), jnp.array([2, 0])
    masked = jaxloss.cross_entropy(x, y, where=jnp.ones((2, 1), bool), label_smoothing=0.2)
    np.testing.assert_allclose(masked, jaxloss.cross_entropy(x, y, label_smoothing=0.2), rtol=1e-6)


# Numbers that may be traced, and what may be None.


def small_product():
    rng = np.random.default_rng(0)
    h, k = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 3), (3, 5)))
    q = jnp.asarray(rng.dirichlet(np.ones(5), 6), jnp.float32)
    index = jnp.asarray(np.argsort(rng.normal(size=(6, 5)), -1)[:, :2], jnp.int32)
    top = jaxloss.TopKLabels(index, jnp.take_along_axis(q, index, -1), rest="uniform")
    return h, k, {"indices": jnp.array([0, 1, -100, 3, 4, 0]), "probabilities": q, "top k": top}


@pytest.mark.parametrize("labels", ["indices", "probabilities", "top k"])
def test_traced_smoothing_and_z_loss(form, labels):
    """A schedule's numbers under jit, with derivatives; 0 and 1 need no program of their own."""
    h, k, every = small_product()
    y, weight = every[labels], jnp.arange(1.0, 6.0)

    def loss(h, k, weight, smoothing, z):
        options = {"label_smoothing": smoothing, "z_loss": z, "weight": weight}
        return form.of_product(h, k, y, **options)

    @jit_quickly
    def run(h, k, weight, numbers):
        traced = jax.vmap(lambda e, z: jax.value_and_grad(loss, range(5))(h, k, weight, e, z))(
            *numbers
        )
        static = [
            jax.value_and_grad(loss, range(3))(h, k, weight, e, z)
            for e, z in ((0.1, 0.2), (0.0, 0.0), (1.0, 0.1))
        ]
        return traced, static

    numbers = jnp.array([0.1, 0.0, 1.0]), jnp.array([0.2, 0.0, 0.1])
    (values, grads), static = run(h, k, weight, numbers)
    for i, (value, some) in enumerate(static):
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        for g, e in zip(grads[:3], some, strict=True):
            np.testing.assert_allclose(g[i], e, rtol=1e-4, atol=1e-6)
    # The loss is linear in both numbers.
    smooth, z = (
        form.of_product(h, k, y, weight=weight, **options)
        for options in ({"label_smoothing": 1.0}, {"z_loss": 1.0})
    )
    plain = form.of_product(h, k, y, weight=weight)
    np.testing.assert_allclose(grads[4][1], z - plain, rtol=1e-4)
    np.testing.assert_allclose(grads[3][1], smooth - plain, rtol=1e-4)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("linear", [False, True])
def test_traced_temperature_of_statistics(linear, cap):
    """With an offset of 1000 that the logits share, which costs no digits where there is no cap."""
    h, k, every = small_product()
    x, y = h @ k + (1000 if cap is None else 0), every["indices"]

    def stats(x, temperature):
        options = {"temperature": temperature, "logit_softcap": cap}
        if linear:
            return jaxloss.linear_token_stats(x, jnp.eye(5), y, chunk_size=2, **options)
        return jaxloss.token_stats(x, y, **options)

    def total(x, temperature):
        some = stats(x, temperature)
        return jnp.sum(jnp.sin(some.log_prob) + jnp.cos(some.entropy) + some.logsumexp / 1000)

    @jit_quickly
    def run(x, temperature):
        return stats(x, temperature), jax.grad(total, (0, 1))(x, temperature)

    got, (dx, dt) = run(x, jnp.float32(0.7))
    expected, de = jit_quickly(lambda x: (stats(x, 0.7), jax.grad(total)(x, 0.7)))(x)
    for v, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(v, e, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(dx, de, rtol=2e-4, atol=2e-6)
    up, down = (jit_quickly(lambda x, t=t: total(x, t))(x) for t in (0.75, 0.65))
    np.testing.assert_allclose(dt, (up - down) / 0.1, rtol=2e-2)


@pytest.mark.nan_is_meant
def test_a_traced_number_out_of_range_is_nan():
    x, y = jnp.zeros((2, 3)), jnp.array([0, 1])
    for options in ({"label_smoothing": jnp.float32(1.5)}, {"z_loss": jnp.float32(-1)}):
        assert np.isnan(jaxloss.cross_entropy(x, y, **options))
    assert np.all(np.isnan(jaxloss.token_stats(x, y, temperature=jnp.float32(0)).log_prob))
    labels = jnp.ones((2, 3))
    assert np.isnan(jaxloss.sigmoid_cross_entropy(x, labels, label_smoothing=jnp.float32(-1)))


def test_traced_smoothing_of_decisions():
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), jnp.asarray(rng.random((4, 3)) < 0.5)
    for loss in (jaxloss.sigmoid_cross_entropy, jaxloss.sigmoid_focal_loss):
        f = jax.jit(lambda x, e, loss=loss: loss(x, y, label_smoothing=e))
        for e in (0.0, 0.1):
            np.testing.assert_allclose(f(x, e), loss(x, y, label_smoothing=e), rtol=1e-6)


def test_numbers_of_numpy_and_options_that_are_off():
    x, y = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32), jnp.arange(4) % 3
    got = jaxloss.cross_entropy(x, y, label_smoothing=np.float32(0.25), z_loss=np.array(0.5))
    assert got == jaxloss.cross_entropy(x, y, label_smoothing=0.25, z_loss=0.5)
    off = {"label_smoothing": None, "z_loss": None, "logit_softcap": None}
    assert jaxloss.cross_entropy(x, y, **off) == jaxloss.cross_entropy(x, y)
    jax.tree.map(
        np.testing.assert_array_equal,
        jaxloss.token_stats(x, y, temperature=None),
        jaxloss.token_stats(x, y),
    )
    eye = jnp.eye(3)
    assert jaxloss.linear_cross_entropy(x, eye, y, **off) == jaxloss.linear_cross_entropy(x, eye, y)
    labels = jnp.ones((4, 3))
    np.testing.assert_array_equal(
        jaxloss.sigmoid_cross_entropy(x, labels, label_smoothing=None),
        jaxloss.sigmoid_cross_entropy(x, labels),
    )


def means_of_nothing():
    y, ignored = jnp.arange(4) % 3, jnp.full(4, -100)
    eye, nobody = jnp.eye(3), jnp.zeros(4)
    labels, none = jnp.ones((4, 3)), jnp.zeros((4, 3))

    def first(x, y):
        return x[:, 0]

    return {
        "cross_entropy": lambda x, **o: jaxloss.cross_entropy(x, ignored, **o),
        "weights": lambda x, **o: jaxloss.cross_entropy(x, y, weight=jnp.zeros(3), **o),
        "probabilities": lambda x, **o: jaxloss.cross_entropy(
            x, labels / 3, sample_weight=nobody, **o
        ),
        "nll_loss": lambda x, **o: jaxloss.nll_loss(x, ignored, **o),
        "focal_loss": lambda x, **o: jaxloss.focal_loss(x, ignored, **o),
        "kl_divergence": lambda x, **o: jaxloss.kl_divergence(x, x, sample_weight=nobody, **o),
        "linear_kl_divergence": lambda x, **o: jaxloss.linear_kl_divergence(
            x, eye, x, eye, sample_weight=nobody, **o
        ),
        "linear_loss": lambda x, **o: jaxloss.linear_loss(
            first, x, eye, y, sample_weight=nobody, **o
        ),
        **{name: partial(FORMS[name], labels=ignored) for name in SCHEDULES},
        "sigmoid": lambda x, **o: jaxloss.sigmoid_cross_entropy(x, labels, where=none > 0, **o),
        "sigmoid focal": lambda x, **o: jaxloss.sigmoid_focal_loss(
            x, labels, sample_weight=none, **o
        ),
    }


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("name", means_of_nothing())
def test_the_mean_over_nothing(name):
    """NaN by default; what empty_mean says otherwise. A microbatch that is all prompt is common."""
    loss = means_of_nothing()[name]

    @jit_quickly
    def run(x):
        return [jax.value_and_grad(partial(loss, empty_mean=e))(x) for e in (None, 0.0, 2.5)]

    for (value, grad), expected in zip(run(jnp.ones((4, 3))), (np.nan, 0.0, 2.5), strict=True):
        np.testing.assert_array_equal(value, np.float32(expected))
        np.testing.assert_array_equal(grad, 0)
    assert loss(jnp.ones((4, 3)), empty_mean=np.float32(1.0), reduction="sum") == 0


def test_empty_mean_changes_no_other_mean(form):
    h, k, every = small_product()
    y = every["indices"]
    given = form.of_product(h, k, y, empty_mean=7.0)
    np.testing.assert_array_equal(given, form.of_product(h, k, y))
