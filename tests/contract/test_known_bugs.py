"""What other implementations got wrong, a short test each, on data where it shows.

Where it is cheap the wrong formula is there too, and is asserted to be wrong.
"""

import gc
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms import FORMS, SCHEDULES, WHOLE, two_steps
from oracle.budget import EPS, assert_within, relative_budget
from oracle.programs import equations, jit_quickly, temporary_mib
from oracle.truth import exact_gradient, exact_losses

import jaxloss

pytestmark = pytest.mark.nan_is_meant


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


# The textbook, in float32.


def logsumexp(x):
    x = np.asarray(x, np.float32)
    with np.errstate(all="ignore"):
        m = np.max(x, axis=-1)
        return m + np.log(np.sum(np.exp(x - m[..., None]), axis=-1))


def log_softmax(x):
    with np.errstate(all="ignore"):
        return np.asarray(x, np.float32) - logsumexp(x)[..., None]


def losses_and_gradient_of(loss, x, y, **options):
    def total(x):
        losses = loss(x, y, reduction="none", **options)
        return jnp.sum(losses), losses

    (_, losses), gradient = jax.value_and_grad(total, has_aux=True)(x)
    return losses, gradient


def losses_and_gradient(loss, x, y, **options):
    return jit_quickly(lambda x: losses_and_gradient_of(loss, x, y, **options))(x)


# Classes


def test_padded_columns_join_the_sum(form):
    """Kernels that fill their last block up with zeros: exp(0) joins where logits are small, and
    the loss is log 16 instead of log 11."""
    c, y = 11, jnp.array([3, 0, 10])
    x = normal(3, 16, scale=0.01).at[:, c:].set(0)
    expected, gradient = exact_losses(x[:, :c], y), exact_gradient(x[:, :c], y)
    wrong = logsumexp(x) - np.asarray(x)[np.arange(3), y]
    assert np.all(wrong - expected > 0.3)
    got, padded = losses_and_gradient(form, x, y, num_classes=c)
    assert_within(got, expected, relative_budget(1))
    assert_within(padded[:, :c], gradient, 2 * relative_budget(1))
    assert np.all(padded[:, c:] == 0)


@pytest.mark.parametrize("by", ["where", "num_classes"])
def test_softcap_after_the_mask(form, by):
    """cap * tanh(-inf / cap) is -cap: the masked class is back, with e^-cap."""
    x, y, cap = jnp.array([[1.0, 2.0, 300.0]]), jnp.array([0]), 2.0
    exists = jnp.array([[True, True, False]])
    wrong = -log_softmax(cap * np.tanh(np.where(exists, x, -np.inf) / cap))[0, 0]
    (expected,) = exact_losses(cap * np.tanh(np.array([[1, 2]], np.longdouble) / cap), [0])
    assert wrong - expected > 0.01
    options = {"where": exists} if by == "where" else {"num_classes": 2}
    got, gradient = losses_and_gradient(form, x, y, logit_softcap=cap, **options)
    assert_within(got, [expected], relative_budget(2))
    assert gradient[0, 2] == 0


def test_label_minus_100_trains_class_v_minus_100(form):
    """An index that wraps: of 128 classes -100 is class 28, whose logit an ignored token raises."""
    x, y = normal(2, 128), jnp.array([-100, 5])
    wrong = np.exp(log_softmax(x))[0]
    wrong[y[0]] -= 1
    assert wrong[28] < -0.9
    losses, gradient = losses_and_gradient(form, x, y)
    assert losses[0] == 0
    assert np.all(gradient[0] == 0)
    without = losses_and_gradient(form, x, y, ignore_index=None)
    for got in without:
        assert np.isnan(got[0]).all()
        assert np.isfinite(got[1]).all()


def test_an_impossible_class_times_0(form):
    """sum(one_hot * log_probs) is 0 * -inf, NaN, wherever a class is at -inf."""
    x, y = jnp.array([[1.0, -jnp.inf, 2.0]]), jnp.array([0])
    with np.errstate(invalid="ignore"):
        assert np.isnan(np.sum(np.eye(3)[:1] * log_softmax(x)))
    if form.schedule:  # a product gives -inf only by its bias
        bias = jnp.array([1.0, -jnp.inf, 2.0])
        got = form.of_product(jnp.zeros((1, 2)), jnp.zeros((2, 3)), y, bias=bias)
    else:
        got = form(x, y)
    assert_within(got, np.log1p(np.exp(1.0)), relative_budget(1))


# Tokens


def test_a_mask_of_0_times_inf(form):
    """losses * mask is 0 * inf: one token of padding makes the loss and its gradient NaN."""
    x, y, mask = normal(3, 4), np.array([1, 2, 3]), np.array([1, 0, 1], np.float32)
    held = x.at[1].set(jnp.inf)
    wrong = np.sum(-log_softmax(held)[np.arange(3), y] * np.asarray(mask))
    assert np.isnan(wrong)
    losses, gradient = losses_and_gradient(form, held, y, sample_weight=mask)
    expected, slopes = exact_losses(x, y) * mask, exact_gradient(x, y) * mask[:, None]
    assert_within(losses, expected, relative_budget(4))
    assert_within(gradient, slopes, 2 * relative_budget(4))
    assert losses[1] == 0
    assert np.all(gradient[1] == 0)


@pytest.mark.parametrize("labels", ["index", "probabilities"])
@pytest.mark.parametrize("loss", [jaxloss.nll_loss, *FORMS.values()], ids=["nll_loss", *FORMS])
def test_the_gradient_of_a_class_weight_beside_a_mask_of_0_times_nan(loss, labels):
    """Selected after the class weight has multiplied it, a token of padding makes d_weight NaN."""
    x, q = normal(3, 4).at[1].set(jnp.nan), jax.nn.softmax(normal(3, 4, seed=1))
    y = np.array([1, 2, 3]) if labels == "index" else q.at[1].set(jnp.nan)
    mask = np.array([1, 0, 1], np.float32)

    def total(x, w, y, mask):
        return loss(x, y, weight=w, sample_weight=mask, reduction="sum")

    gradients = jax.grad(total, (0, 1))
    dx, dw = jit_quickly(gradients)(x, jnp.ones(4), y, mask)
    some = np.array([0, 2])
    expected = jit_quickly(gradients)(x[some], jnp.ones(4), y[some], mask[some])
    np.testing.assert_array_equal(dx[1], 0)
    assert_within(dx[some], expected[0], 32 * EPS, 1)
    assert_within(dw, expected[1], 32 * EPS, 4)


def test_the_kernel_beside_a_token_of_nan_whose_statistics_take_a_pass_of_their_own(schedule):
    """They do beside a class weight: that pass too must leave out what does not count."""
    hidden, kernel, q = normal(3, 4), normal(4, 5), jax.nn.softmax(normal(3, 5, seed=1))
    mask = np.array([True, False, True])

    def total(hidden, kernel, q, mask):
        losses, stats = jaxloss.linear_cross_entropy(
            hidden, kernel, q, weight=jnp.ones(5), sample_weight=mask, reduction="none",
            return_stats=True, implementation=schedule, chunk_size=2,
        )  # fmt: skip
        return jnp.sum(losses + stats.log_prob)

    got = jax.grad(total, (0, 1))(hidden.at[1].set(jnp.nan), kernel, q, mask)
    some = np.array([0, 2])
    expected = jax.grad(total, (0, 1))(hidden[some], kernel, q[some], mask[some])
    np.testing.assert_array_equal(got[0][1], 0)
    assert_within(got[0][some], expected[0], 32 * EPS, 4)
    assert_within(got[1], expected[1], 32 * EPS, 4)


def test_a_mean_of_means(form):
    """Of chunks, microbatches or devices with 1 and 2 tokens that count."""
    x, y = normal(4, 5, scale=3), jnp.array([0, -100, 1, 2])

    @jit_quickly
    def run(x, y):
        parts = [form(x[i], y[i], reduction="sum") for i in (slice(2), slice(2, 4))]
        return form(x, y, reduction="none"), form(x, y), sum(parts) / jaxloss.total_weight(y)

    losses, *means = run(x, y)
    wrong, expected = (losses[0] + jnp.mean(losses[2:])) / 2, jnp.sum(losses) / 3
    assert abs(wrong / expected - 1) > 0.01
    for mean in means:
        assert_within(mean, expected, 4 * EPS)


NOTHING = {
    "class weights of 0": {"weight": jnp.array([0.0, 1.0, 1.0])},
    "sample weights that cancel": {"sample_weight": jnp.array([1.0, -1.0])},
    "sample weights of 0": {"sample_weight": jnp.zeros(2)},
}


@pytest.mark.parametrize("name", NOTHING)
def test_the_gradient_of_a_mean_over_nothing(form, name):
    """0 / 0 again in the gradient: NaN parameters after the first batch without a label."""
    x, y = normal(2, 3), jnp.array([0, 0])
    value, gradient = jit_quickly(jax.value_and_grad(lambda x: form(x, y, **NOTHING[name])))(x)
    assert np.isnan(value)
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


@pytest.mark.parametrize("loss", [*FORMS.values(), two_steps], ids=[*FORMS, "two steps"])
def test_an_empty_batch(loss):
    """Reshapes to -1 and 0 / 0: an error, or NaN for the gradient of what others share."""
    x, y = jnp.zeros((0, 4)), jnp.zeros(0, jnp.int32)

    @jit_quickly
    def run(x):
        losses, total = (loss(x, y, reduction=reduction) for reduction in ("none", "sum"))
        return losses, total, *jax.value_and_grad(loss)(x, y)

    losses, total, mean, gradient = run(x)
    assert losses.shape == (0,)
    assert total == 0
    assert np.isnan(mean)
    assert gradient.shape == (0, 4)


def test_the_kernel_of_an_empty_batch(schedule):
    def loss(kernel):
        hidden, y = jnp.zeros((0, 3), jnp.float32), jnp.zeros(0, jnp.int32)
        return jaxloss.linear_cross_entropy(hidden, kernel, y, implementation=schedule)

    np.testing.assert_array_equal(jit_quickly(jax.grad(loss))(normal(3, 4)), np.zeros((3, 4)))


def test_no_classes(form):
    """A maximum over nothing is an error of the array library, or -inf - -inf. No label exists, so
    each is out of range; a token that does not count is 0 as ever."""
    x, y = jnp.zeros((2, 0)), jnp.array([0, -100])
    losses, gradient = losses_and_gradient(form, x, y)
    np.testing.assert_array_equal(losses, [np.nan, 0])
    assert gradient.shape == (2, 0)
    assert np.isnan(form(x, y))
    assert np.isnan(jaxloss.cross_entropy(x, x))
    assert jaxloss.log_softmax(x).shape == (2, 0)
    for shape in ((2,), (3, 2)):
        some, of_some = jnp.zeros((*shape, 0)), jnp.broadcast_to(y, shape)
        each = jaxloss.nll_loss(some, of_some, reduction="none")
        np.testing.assert_array_equal(each, jnp.broadcast_to(jnp.array([jnp.nan, 0]), shape))


# Rows that hold no distribution

BAD = {
    "all -inf": [-np.inf] * 4,
    "+inf": [0, np.inf, 1, 2],
    "NaN": [np.nan, 0, 1, 2],
    "NaN last": [0, 1, 2, np.nan],
}


def test_a_bad_row_spoils_the_others(form):
    """Products with a one-hot or a permutation matrix, and sums over chunks: NaN * 0 is NaN in rows
    that have nothing to do with it."""
    n, bad = 7, np.array([1, 2, 4, 5])
    x, y = normal(n, 4), jnp.array([2, 0, 1, 3, -100, 2, 0])
    held = x.at[bad].set(jnp.array(list(BAD.values()), jnp.float32))
    with np.errstate(invalid="ignore"):
        assert np.isnan(np.eye(n)[:1] @ np.asarray(held)).any()  # the wrong way to take row 0
    run = jit_quickly(partial(losses_and_gradient_of, form))
    expected, slopes = run(x, y)
    losses, gradient = run(held, y)
    spoilt = np.isin(np.arange(n), bad) & (np.asarray(y) >= 0)
    np.testing.assert_array_equal(np.isnan(losses), spoilt)
    np.testing.assert_array_equal(np.isnan(gradient).any(axis=-1), spoilt)
    np.testing.assert_array_equal(losses[~spoilt], expected[~spoilt])
    np.testing.assert_array_equal(gradient[~spoilt], slopes[~spoilt])


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_bad_row_in_a_product(schedule, reduction):
    """d_kernel sums over tokens and is NaN with one of them; d_hidden has rows of its own."""
    hidden, kernel, y = normal(5, 3), normal(3, 7, seed=1), jnp.array([0, 6, 2, 3, 5])

    @jit_quickly
    @partial(jax.grad, argnums=(0, 1))
    def step(hidden, kernel):
        losses = jaxloss.linear_cross_entropy(
            hidden, kernel, y, implementation=schedule, reduction=reduction, chunk_size=2
        )
        return jnp.sum(losses)

    expected, _ = step(hidden, kernel)
    of_hidden, of_kernel = step(hidden.at[1].set(jnp.nan), kernel)
    assert np.isnan(of_hidden[1]).all()
    np.testing.assert_array_equal(np.delete(of_hidden, 1, 0), np.delete(expected, 1, 0))
    assert np.isnan(of_kernel).all()


# Digits


def test_a_confident_loss_is_0(form):
    """logsumexp(x) - x_y: 0 for 1.9e-13, and 0.0001 off where all logits are 1000 higher. Its
    gradient, softmax - 1, is 0 as well."""
    x = jnp.array([[30.0, 0.0, 0.0], [1030.0, 1000.0, 1000.0], [1003.0, 1001.0, 1000.5]])
    y = jnp.array([0, 0, 1])
    wrong, expected = logsumexp(x) - np.asarray(x)[np.arange(3), y], exact_losses(x, y)
    assert np.all(np.abs(wrong / expected - 1) > np.array([0.9, 0.9, 1e-6]))
    losses, gradient = losses_and_gradient(form, x, y)
    assert_within(losses, expected, relative_budget(30))
    assert_within(gradient, exact_gradient(x, y), 2 * relative_budget(30))


@pytest.mark.parametrize("way", ["soft-capped", "at a temperature"])
def test_a_confident_loss_of_scaled_logits(way):
    """A compiler that computes scale(x) once for the maximum and once for the label, by other
    instructions: their difference is a rounding of either sign, and 1e-26 becomes 0 or 1e-12, a
    probability more than 1, an entropy negative."""
    x = normal(256, 5, scale=50.0)
    y = jnp.argmax(x, axis=-1)
    options = {"logit_softcap": 30.0} if way == "soft-capped" else {"temperature": 0.7}
    stats = jax.jit(lambda x: jaxloss.token_stats(x, y, **options))(x)
    exact = np.asarray(x, np.longdouble)
    scaled = 30 * np.tanh(exact / 30) if way == "soft-capped" else exact / np.longdouble(0.7)
    assert np.all(np.asarray(stats.log_prob) <= 0)
    assert np.all(np.asarray(stats.entropy) >= 0)
    assert np.all(np.asarray(stats.confidence) <= 1)
    # The cap itself has three roundings of the largest logit, each way.
    size = np.max(np.abs(scaled), axis=-1) if way == "soft-capped" else 0
    budget = (np.ptp(scaled, axis=-1) + 3 * size + 16) * 2 * EPS
    assert_within(-stats.log_prob, exact_losses(scaled, y), budget)


def test_the_entropy_of_a_confident_row_whatever_the_label():
    """1 + 1e-13 - 1: what is left of the others once the label, and not the maximum, is out of
    their sum."""
    x = jnp.array([[30.0, 0.0, 0.0]] * 2 + [[12.0, 0.0, 1.0]] * 2)
    entropy = jaxloss.token_stats(x, jnp.array([0, 1, 0, 1])).entropy
    assert_within(entropy[1::2], entropy[::2], relative_budget(30))


def test_bucket_labels_at_an_offset():
    """The log-sum-exp of the classes that are not named, rounded at 10000 and not at 0."""
    x = jnp.array([[1.0, 2.0, 3.0, 0.5]])
    labels = jaxloss.TopKLabels(jnp.array([[1, 2]]), jnp.array([[0.25, 0.5]]), "bucket")
    f = jit_quickly(jax.value_and_grad(lambda x: jaxloss.cross_entropy(x, labels)))
    for got, expected in zip(f(x + 10000), f(x), strict=True):
        assert_within(got, expected, 2 * relative_budget(3))


def test_uniform_labels_of_an_impossible_class():
    """What is taken away at a named class, so that the share of every class may be added to all: at
    -inf it is inf - inf, where 0 is asked for in all."""
    x = jnp.array([[1.0, -jnp.inf, 2.0, 0.0]])
    index, q = jnp.array([[1, 2]]), jnp.array([[0.0, 0.5]])
    dense = jnp.array([[0.25, 0.0, 0.5, 0.25]])
    expected = jaxloss.cross_entropy(x, dense)
    assert np.isfinite(expected)
    got = jaxloss.cross_entropy(x, jaxloss.TopKLabels(index, q, "uniform"))
    assert_within(got, expected, 2 * relative_budget(2))


def test_narrow_gradients_are_rounded_once():
    """Formed in float32 and narrowed where they are complete: several, narrowed each and then
    added, lose what cancels between them."""
    x = normal(64, 5).astype(jnp.bfloat16)
    index, q = jnp.tile(jnp.array([[0, 1]]), (64, 1)), jnp.full((64, 2), 0.25)

    @jit_quickly
    def run(x):
        def slopes(x, rest):
            labels = jaxloss.TopKLabels(index, q, rest)
            f = partial(jaxloss.cross_entropy, labels=labels, z_loss=0.05, reduction="sum")
            return jax.grad(f)(x)

        return [(slopes(x, r), slopes(x.astype(jnp.float32), r)) for r in ("uniform", "bucket")]

    for narrow, wide in run(x):
        assert_within(narrow, wide, 2**-8 * 1.01)


@pytest.mark.parametrize("kind", ["TopKLabels", "probabilities"])
def test_a_class_that_is_masked_and_scale_rows(kind, form):
    """It is left out of the sum. Blocks of nothing but masked classes merge as -inf - -inf."""
    x = jnp.arange(6.0)[None]
    where = x > 3.5
    y = jnp.array([[0.5, 0, 0, 0, 0, 0.5]])
    if kind == "TopKLabels":
        y = jaxloss.TopKLabels(jnp.array([[0, 5]]), jnp.array([[0.5, 0.5]]))
    got = jit_quickly(lambda x: form(x, y, where=where))(x)
    np.testing.assert_allclose(got, 0.5 * np.log1p(np.exp(-1)), rtol=4 * EPS)
    index = jnp.zeros(1, jnp.int32)  # of a class index nothing would be left
    assert jit_quickly(lambda x: form(x, index, where=where))(x) == np.inf


def test_bucket_labels_of_a_token_that_does_not_count():
    """The same where the whole row is masked, and holds NaN."""
    x = jnp.array([[1.0, jnp.nan, 2.0], [1.0, 0.0, 2.0]])
    labels = jaxloss.TopKLabels(jnp.array([[0, 1]] * 2), jnp.array([[0.5, 0.25]] * 2), "bucket")
    weight = jnp.array([0.0, 1.0])
    f = partial(jaxloss.cross_entropy, labels=labels, sample_weight=weight, logit_softcap=5.0)
    value, gradient = jit_quickly(jax.value_and_grad(f))(x)
    assert np.isfinite(value)
    assert np.all(gradient[0] == 0)
    assert np.all(np.isfinite(gradient[1]))


@pytest.mark.nan_is_meant
def test_bucket_labels_of_a_row_of_minus_infinity():
    """NaN, and so is its gradient, though no class that is named exists."""
    x = jnp.array([[-jnp.inf] * 3, [1.0, 0.0, 2.0]])
    labels = jaxloss.TopKLabels(jnp.array([[0]] * 2), jnp.array([[0.0]] * 2), "bucket")
    where = jnp.array([[False, True, True]])
    f = partial(jaxloss.cross_entropy, labels=labels, where=where, reduction="none")
    losses, pullback = jax.vjp(f, x)
    (gradient,) = pullback(jnp.ones(2))
    np.testing.assert_array_equal(np.isnan(losses), [True, False])
    np.testing.assert_array_equal(np.isnan(gradient).any(-1), [True, False])


def test_bucket_labels_whose_other_classes_are_impossible():
    """Their probability is asked for in vain: the loss is inf, and no logit's gradient is NaN."""
    x = jnp.array([[1.0, -jnp.inf, -jnp.inf], [1.0, 0.0, 2.0]])
    labels = jaxloss.TopKLabels(jnp.array([[0]] * 2), jnp.array([[0.5]] * 2), "bucket")
    losses, gradient = losses_and_gradient(jaxloss.cross_entropy, x, labels)
    assert losses[0] == np.inf
    assert np.all(np.isfinite(gradient))
    assert np.all(np.isfinite(losses[1]))


def test_a_row_of_minus_infinity_has_no_prediction():
    """The first of all classes is at the maximum, whether it exists or not."""
    x = jnp.full((1, 3), -jnp.inf)
    where = jnp.array([[False, True, True]])
    options = {"where": where, "logit_softcap": 5.0}  # by which the row's loss is log(2)
    stats = jit_quickly(partial(jaxloss.token_stats, **options))(x, jnp.array([1]))
    assert (stats.prediction[0], stats.rank[0]) == (-1, -1)
    np.testing.assert_allclose(stats.log_prob, [-np.log(2)], rtol=1e-6)


def test_bucket_labels_of_a_masked_class_that_holds_nan():
    """0 times the slope of tanh(NaN), which a select of the value has not kept out."""
    x, where = jnp.array([[1.0, jnp.nan, 2.0]]), jnp.array([[True, False, True]])
    labels = jaxloss.TopKLabels(jnp.array([[0, 1]]), jnp.array([[0.5, 0.0]]), "bucket")
    f = partial(jaxloss.cross_entropy, labels=labels, where=where, logit_softcap=5.0)
    value, gradient = jit_quickly(jax.value_and_grad(f))(x)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_bucket_labels_past_the_softcap():
    """1 - tanh^2 is 0 past nine times the cap, where the slope is 4 e^-2|x|."""
    x, cap = jnp.array([[20.0, 24.0, 1.0, 0.5]]), 2.0
    every = jnp.array([[0, 1, 2, 3]])
    q = jnp.array([[0.5, 0.25, 0.125, 0.125]])

    def slopes(x, rest):
        labels = jaxloss.TopKLabels(every, q, rest)
        return jax.grad(lambda x: jaxloss.cross_entropy(x, labels, logit_softcap=cap))(x)

    bucket, drop = jit_quickly(lambda x: (slopes(x, "bucket"), slopes(x, "drop")))(x)
    assert_within(bucket, drop, 4 * relative_budget(24))


def test_gradients_accumulated_in_bfloat16(schedule):
    """512 equal parts added in bfloat16 stop at 256 of them."""
    n, total = 512, jnp.bfloat16(0)
    for _ in range(n):
        total += jnp.bfloat16(1) / n
    assert total == 0.5
    ones = partial(jnp.ones, dtype=jnp.bfloat16)
    options = {"implementation": schedule, "reduction": "mean"}
    by = jax.grad(partial(jaxloss.linear_cross_entropy, **options), (0, 1))
    # Over chunks of tokens: d_kernel is the sum of 512 times (1/2, -1/2) / 512.
    chunk = 2 if schedule == "token_chunks" else 1
    y = jnp.zeros(n, jnp.int32)
    by_tokens = jit_quickly(partial(by, chunk_size=chunk))(ones((n, 1)), ones((1, 2)), y)
    np.testing.assert_array_equal(by_tokens[1], np.array([[-0.5, 0.5]]))
    # Over blocks of classes: d_hidden is the sum of 512 times 1 / 513.
    kernel = ones((1, n + 1)).at[0, 0].set(0)
    of_hidden, _ = jit_quickly(partial(by, chunk_size=1))(
        jnp.zeros((1, 1), jnp.bfloat16), kernel, jnp.array([0])
    )
    np.testing.assert_allclose(np.float32(of_hidden), n / (n + 1), rtol=2**-8)


def test_forward_and_backward_from_different_logits(schedule):
    """A backward pass that computes the logits again and rounds them to bfloat16: at 200 that is a
    rounding of 1/2, and the gradient is no derivative of the loss."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(np.stack([np.full(4, 200), rng.normal(size=4)], 1), jnp.bfloat16)
    kernel = jnp.asarray(np.stack([np.ones(9), rng.normal(size=9)]), jnp.bfloat16)
    y = jnp.array([0, 3, 5, 8])
    h, k = (np.asarray(a, np.float64).astype(np.longdouble) for a in (hidden, kernel))
    x = h @ k
    # The first column of d_hidden is 0: one row's slopes cancel.
    expected = (exact_gradient(x, y) @ k.T)[:, 1]
    narrow = np.asarray(jnp.asarray(x.astype(np.float32), jnp.bfloat16), np.longdouble)
    wrong = (exact_gradient(narrow, y) @ k.T)[:, 1]
    assert np.max(np.abs(wrong / expected - 1)) > 0.05

    def total(hidden, kernel):
        return jnp.sum(
            jaxloss.linear_cross_entropy(
                hidden, kernel, y, reduction="none", implementation=schedule, chunk_size=4
            )
        )

    got = jit_quickly(jax.grad(total))(hidden, kernel)[:, 1]
    # The slopes are rounded once, and once more their sum.
    size = (np.abs(exact_gradient(x, y)) @ np.abs(k).T)[:, 1]
    assert np.all(np.abs(np.asarray(got, np.float64) - expected) <= 2**-8 * (size + abs(expected)))


def test_float16_sums_past_its_range():
    """131072 classes or 70000 tokens: a float16 sum ends at 65504."""
    c = 2**17
    assert jnp.sum(jnp.ones(c, jnp.float16), dtype=jnp.float16) == jnp.inf
    x, y = jnp.zeros((2, c), jnp.float16), jnp.array([0, 9])
    losses, vjp = jax.vjp(lambda x: jaxloss.cross_entropy(x, y, reduction="none"), x)
    assert_within(losses, [17 * np.log(2)] * 2, 8 * EPS)
    grad = vjp(jnp.ones(2, jnp.float32))[0]
    assert np.all(np.isfinite(grad))
    np.testing.assert_array_equal(grad[0, 0], -1)
    assert_within(jaxloss.log_softmax(x)[0, :3], [-17 * np.log(2)] * 3, 2**-11)
    n = 70000
    many = jnp.full((n, 2), 3, jnp.float16)
    y = jnp.zeros(n, jnp.int32)
    assert_within(jaxloss.cross_entropy(many, y, reduction="sum"), n * np.log(2), 1e-5)
    hidden, kernel = jnp.zeros((n, 1), jnp.float16), jnp.zeros((1, 2), jnp.float16)
    for schedule in SCHEDULES:
        product = partial(jaxloss.linear_cross_entropy, implementation=schedule)
        total = jit_quickly(partial(product, reduction="sum", chunk_size=8192))(hidden, kernel, y)
        assert_within(total, n * np.log(2), 1e-5)
        row, wide = hidden[:1], jnp.zeros((1, c), jnp.float16)
        losses = jit_quickly(partial(product, chunk_size=c))(row, wide, y[:1])
        assert_within(losses, 17 * np.log(2), 8 * EPS)


def linear_loss(hidden, kernel, y, **options):
    each = partial(jaxloss.cross_entropy, reduction="none")
    return jaxloss.linear_loss(each, hidden, kernel, y, **options)


def linear_kl(hidden, kernel, y, **options):
    """Of a teacher that is sure of ``y``: the same gradient."""
    teacher = 30 * jax.nn.one_hot(y, kernel.shape[1], dtype=hidden.dtype)
    eye = jnp.eye(kernel.shape[1], dtype=hidden.dtype)
    return jaxloss.linear_kl_divergence(hidden, kernel, teacher, eye, **options)


PRODUCTS = {
    **{s: partial(jaxloss.linear_cross_entropy, implementation=s) for s in SCHEDULES},
    "linear_loss": linear_loss,
    "linear_kl": linear_kl,
}


@pytest.mark.parametrize(
    ("name", "chunk_size"), [*((name, 300) for name in PRODUCTS), ("token_chunks", 4096)]
)
def test_float16_gradients_below_and_past_its_range(name, chunk_size):
    """Taken along in the forward pass, the gradients know of no loss scale yet, and of no 1 / N."""
    n, loss = 4096, partial(PRODUCTS[name], chunk_size=chunk_size)
    y = jnp.zeros(n, jnp.int32)
    hidden, kernel = jnp.ones((n, 1), jnp.float16), jnp.array([[8.0, 0.0]], jnp.float16)
    p = 1 / (1 + np.exp(8.0))
    assert jnp.float16(p / n) in (0, jnp.finfo(jnp.float16).smallest_subnormal)
    flat = jnp.full((n, 1), 64, jnp.float16), jnp.zeros((1, 2), jnp.float16)

    def scaled(h, k):
        return 2.0**15 * loss(h, k, y)

    @jit_quickly
    def run(h, k, of_64, of_0):
        moved = jax.jvp(partial(scaled, h), (k,), (k,))[1]
        mean = jax.grad(lambda k: loss(of_64, k, y, reduction="sum") / n)(of_0)
        weighted = jax.grad(lambda k: loss(of_64, k, y, sample_weight=jnp.full(n, 1e-9)))(of_0)
        return jax.grad(scaled, (0, 1))(h, k), moved, mean, weighted

    (of_hidden, of_kernel), moved, mean, weighted = run(hidden, kernel, *flat)
    assert of_hidden.dtype == of_kernel.dtype == jnp.float16
    assert_within(of_kernel, [[-(2**15) * p, 2**15 * p]], 2**-9)
    assert_within(of_hidden, np.full((n, 1), -8 * 8 * p), 2**-9)
    assert_within(moved, -8 * 2**15 * p, 2**-9)
    assert_within(mean, [[-32, 32]], 2**-9)
    assert_within(weighted, [[-32, 32]], 2**-9)


INDEXED = ("gather", "scatter", "dynamic_slice", "dynamic_update_slice", "argmax", "iota")


@pytest.mark.parametrize("devices", [1, 8])
def test_more_than_2_31_logits(form, devices, monkeypatch):
    """A flat int32 index, row * C + y, is negative past 2^31: a wrong row, or memory of others.
    No program here counts along an axis of so many."""
    n, c = 2**17, 2**15
    with np.errstate(over="ignore"):
        assert np.int32(n - 1) * np.int32(c) < 0
    jax.clear_caches()
    monkeypatch.setattr(jax, "device_count", lambda *_: devices)
    x, y = jax.ShapeDtypeStruct((n, c), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.int32)
    step, args = jax.value_and_grad(jaxloss.cross_entropy), (x, y)
    if form.schedule:
        h, k = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, 8), (8, c)))
        loss = partial(form.of_product, chunk_size=None)
        step, args = jax.value_and_grad(loss, (0, 1)), (h, k, y)
    found = list(equations(step, *args))
    jax.clear_caches()
    arrays = [v.aval.shape for e in found for v in (*e.invars, *e.outvars) if hasattr(v, "aval")]
    assert max(dim for shape in arrays for dim in shape) <= max(n, c) * max(c // 256, 1)
    sizes = [int(np.prod(shape)) for shape in arrays]
    assert (max(sizes) >= 2**31) == (form is WHOLE)
    names = [e.primitive.name for e in found]
    assert any(name.startswith(INDEXED) for name in names)
    for e in found:
        if e.primitive.name.startswith(INDEXED):
            assert all(max(v.aval.shape, default=0) < 2**31 for v in (*e.invars, *e.outvars))


def one_hot(x, y, **options):
    q = jax.nn.one_hot(jnp.maximum(y, 0), x.shape[-1])
    return jaxloss.cross_entropy(x, q, sample_weight=y >= 0, **options)


def binary(x, y, **options):
    y = jnp.where(y[:, None] < 0, -100, jnp.eye(x.shape[-1], dtype=jnp.int32)[y])
    x = jnp.where(y == 1, jnp.float32(200), jnp.float32(-200))
    return jaxloss.sigmoid_cross_entropy(x, y, **options)


MORE_FORMS = {
    **FORMS,
    "two steps": two_steps,
    "one-hot": one_hot,
    "focal": jaxloss.focal_loss,
    "sigmoid": binary,
    "divergence": lambda x, y, **options: jaxloss.kl_divergence(x, x, **options),
}


ZERO = ([[3.0]], [0]), ([[200.0, 0.0], [1.0, 2.0]], [0, -100])  # one class; saturated, ignored


@pytest.mark.parametrize("loss", MORE_FORMS)
def test_a_loss_of_negative_zero(loss):
    """-log_prob of a log-probability of 0, and 0 * -1: it prints as -0, and 1 / loss is -inf."""
    assert np.signbit(-log_softmax([3.0])[0])

    @jit_quickly
    def run(x, y):
        return [MORE_FORMS[loss](x, y, reduction=r) for r in ("none", "sum", "mean")]

    for x, y in ZERO:
        for got in run(jnp.array(x, jnp.float32), jnp.array(y)):
            np.testing.assert_array_equal(got, np.zeros(got.shape))
            assert not np.any(np.signbit(got))


@pytest.mark.parametrize("way", ["grad", "jit", "vmap", "remat"])
def test_statistics_alone_of_a_scalar_loss_have_gradients_of_0(schedule, way):
    """The pullback is called for what has no derivative, without a cotangent of the loss."""
    h, k, y = jnp.ones((4, 3)), jnp.eye(3), jnp.array([0, 1, 2, 0])

    def entropy(h, k):
        options = {"implementation": schedule, "chunk_size": 2, "return_stats": True}
        return jnp.sum(jaxloss.linear_cross_entropy(h, k, y, **options)[1].entropy)

    grad = jax.grad(jax.checkpoint(entropy) if way == "remat" else entropy, (0, 1))
    if way == "vmap":
        grad, h = jax.vmap(grad, (0, None)), jnp.stack([h, 2 * h])
    for d in (jax.jit(grad) if way == "jit" else grad)(h, k):
        np.testing.assert_array_equal(d, 0)


def test_the_entropy_of_a_row_whose_label_is_impossible():
    """Its slope at the label is p (log p + H) of p = 0, and 0 * inf is NaN."""
    x, y = jnp.array([[1.0, -jnp.inf, 2.0]]), jnp.array([1])

    def entropy(x, y):
        return jnp.sum(jaxloss.token_stats(x, y).entropy)

    expected = jax.grad(entropy)(x, jnp.array([0]))
    np.testing.assert_allclose(jax.grad(entropy)(x, y), expected, rtol=8 * EPS)


def test_total_weight_of_probabilities_ignores_no_class():
    """ignore_index is of class indices: probabilities have none, and all of their tokens count."""
    q = jnp.full((2, 3), 1 / 3)
    assert jaxloss.total_weight(q, ignore_index=None) == jaxloss.total_weight(q) == 2
    with pytest.raises(ValueError, match="ignore_index is for labels of an integer dtype"):
        jaxloss.total_weight(q, ignore_index=0)


LEAST = np.finfo(np.float32).min
MASKED_BY_NUMBERS = np.float32(
    [
        [0.5, 1, LEAST, LEAST],
        [LEAST, LEAST, 0.5, 1],
        [0.5, LEAST, 1, LEAST],
        [0.5, 1, -1e36, -1e37],
        [2, float(jnp.finfo(jnp.bfloat16).min), LEAST, -np.inf],
        [3e38, LEAST, LEAST, -np.inf],
        [LEAST, LEAST, LEAST, LEAST],
        [LEAST, -np.inf, -np.inf, -np.inf],
        [-np.inf, -np.inf, LEAST, -np.inf],
        [-np.inf, LEAST, LEAST, -np.inf],
    ]
)


def entropies_of_blocks(x, y, **options):
    def of_row(bias, y):  # the logits are the bias, and exact
        given = jnp.ones((1, 1)), jnp.zeros((1, x.shape[-1])), y[None]
        schedule = {"implementation": "vocab_blocks", "chunk_size": 2}
        return jaxloss.linear_token_stats(*given, bias=bias, **schedule, **options).entropy[0]

    return jax.vmap(of_row)(x, y)


def entropies_of_shards(x, y, **options):
    def of_shard(x, y):
        return jaxloss.token_stats(x, y, vocab_axis_name="classes", **options).entropy

    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("classes",), axis_types=kinds, devices=jax.devices()[:4])
    spec = jax.sharding.PartitionSpec
    return jax.shard_map(
        of_shard, mesh=mesh, in_specs=(spec(None, "classes"), spec()), out_specs=spec()
    )(x, y)


def entropies_of_rows(x, y, **options):
    return jaxloss.token_stats(x, y, **options).entropy


def entropies_of_rows_of_probabilities(x, y, **options):
    q = jax.nn.one_hot(y, x.shape[-1])
    return jaxloss.token_stats(x, q, **options).entropy


@pytest.mark.parametrize(
    "entropies",
    [
        entropies_of_blocks,
        entropies_of_shards,
        entropies_of_rows,
        entropies_of_rows_of_probabilities,
    ],
)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.1}])
def test_the_entropy_beside_classes_that_are_masked_by_the_smallest_float(entropies, options):
    x, y = jnp.asarray(MASKED_BY_NUMBERS), jnp.arange(len(MASKED_BY_NUMBERS)) % 4
    v = np.float32([1, 2, 3, 1e4])

    def all_of(x):
        slope = jax.grad(lambda x: jnp.sum(entropies(x, y, **options)))
        along = jnp.tile(v, (len(x), 1))
        return entropies(x, y, **options), slope(x), jax.jvp(slope, (x,), (along,))[1]

    t = np.longdouble(options.get("temperature", 1))
    exact = MASKED_BY_NUMBERS.astype(np.longdouble)
    below = (exact - np.max(exact, axis=-1, keepdims=True)) / t
    p = np.exp(below) / np.sum(np.exp(below), axis=-1, keepdims=True)
    log_p = np.where(p > 0, np.log(np.where(p > 0, p, 1)), 0)
    entropy = -np.sum(p * log_p, axis=-1, keepdims=True)
    slope = -p * (log_p + entropy) / t
    moved = p * (v - np.sum(p * v, axis=-1, keepdims=True)) / t  # dp
    of_entropy = np.sum(slope * v, axis=-1, keepdims=True)
    curvature = -(moved * (log_p + entropy + 1) + p * of_entropy) / t

    got = jit_quickly(all_of)(x)
    np.testing.assert_allclose(got[0], entropy[:, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[1], np.float64(slope), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[2], np.float64(curvature), rtol=1e-4, atol=1e4 / t**2 * 1e-5)


def test_a_loss_of_ones_own_outside_of_jit_leaves_no_program_behind():
    """JAX keeps thousands of loops that ran one by one, each with its compiled program: 5.6 MiB a
    call."""
    hidden, kernel, labels = jnp.ones((6, 4)), jnp.ones((4, 10)), jnp.arange(6)

    def call():
        def loss(x, y):
            return -jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], axis=1)[:, 0]

        def total(hidden):
            return jaxloss.linear_loss(loss, hidden, kernel, labels, chunk_size=4)

        return total(hidden), jax.grad(total)(hidden)

    def programs():
        gc.collect()
        return len(jax.devices()[0].client.live_executables())

    call()
    before = programs()
    for _ in range(2):
        call()
    assert programs() <= before


def test_one_entry_a_row_takes_no_wide_copy_of_the_rows():
    """A gradient of the widened log-probabilities was scattered in float32, and rounded after."""
    log_probs = jax.ShapeDtypeStruct((4096, 1000), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((4096,), jnp.int32)

    def plain(log_probs, labels):
        own = jnp.take_along_axis(log_probs, labels[:, None], axis=1)
        return -jnp.mean(own.astype(jnp.float32))

    ours, theirs = (
        temporary_mib(jax.value_and_grad(f), (log_probs, labels)) for f in (jaxloss.nll_loss, plain)
    )
    assert ours <= theirs + 1
