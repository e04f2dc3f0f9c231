"""The row state's own functions, where the public losses reach few of their cases."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.budget import EPS, assert_within
from oracle.programs import jit_quickly
from oracle.truth import exact_gradient

import jaxloss
from jaxloss._numerics import parts
from jaxloss._numerics import rows as _rows
from jaxloss._numerics.logits import Logits
from jaxloss._numerics.parts import Rows

INF = np.inf


def state_of(x, kept=None, want=("nll",)):
    return _rows.finalize(parts.row_part(Rows(Logits(x), kept), want), want)[1]


def minus_log_p(x):
    x = np.asarray(x, np.longdouble)
    with np.errstate(divide="ignore"):
        return -np.log(np.exp(x) / np.sum(np.exp(x), axis=-1, keepdims=True)).astype(np.float64)


X = jnp.array([[0.3, -INF, 1.2, -0.7], [2.0, 0.1, -INF, -INF]], jnp.float32)


@pytest.mark.nan_is_meant
def test_soft_gradient_is_minus_log_p_and_0_where_nothing_impossible_is_asked():
    q = jnp.array([[0.5, 0.0, 0.0, 0.5], [0.5, 0.25, 0.25, 0.0]], jnp.float32)
    got = _rows.soft_gradient(Rows(Logits(X), soft=q), state_of(X))
    expected = minus_log_p(X)
    expected[0, 1] = expected[1, 3] = 0
    np.testing.assert_allclose(got, expected, rtol=8 * EPS)


@pytest.mark.nan_is_meant
def test_top_gradient_is_the_same_at_its_indices():
    index = jnp.array([[1, 2, 4], [2, 0, 3]], jnp.int32)  # 4: none
    extra = jnp.array([[0.0, 0.0, 0.7], [0.4, 1.0, 0.0]], jnp.float32)
    got = _rows.sparse_gradient(Rows(Logits(X), sparse=(index, extra)), state_of(X))
    p = minus_log_p(X)
    np.testing.assert_allclose(got, [[0, p[0, 2], 0], [INF, p[1, 0], 0]], rtol=8 * EPS)


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("top", [False, True])
def test_a_cotangent_of_0_asks_for_nothing_of_an_infinite_loss(top):
    q = jnp.array([[0.5, 0.25, 0.0, 0.25], [0.5, 0.5, 0.0, 0.0]], jnp.float32)

    def losses(x, q):
        labels = q
        if top:
            index = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), q.shape)
            labels = jaxloss.TopKLabels(index, q)
        return jaxloss.cross_entropy(x, labels, reduction="none")

    value, pull = jax.vjp(losses, X, q)
    assert value[0] == INF
    dx, dq = pull(jnp.array([0.0, 1.0], jnp.float32))
    np.testing.assert_array_equal(dx[0], 0)
    np.testing.assert_array_equal(dq[0], 0)
    expected = minus_log_p(X)[1]
    np.testing.assert_allclose(dq[1], np.where(np.isinf(expected), 0, expected), rtol=8 * EPS)


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("labels", ["index", "probabilities"])
def test_a_cotangent_of_0_is_selected_only_where_a_row_has_no_distribution(labels):
    """Two classes that tie have t = 1, a row of nothing t = -1."""
    x = jnp.array([[0, 0, -1e4], [-INF] * 3, [0, np.nan, 0], [0, INF, 0], [0, 0, 0]], jnp.float32)
    y, q = jnp.array([0, 1, 2, 0, 3]), jnp.eye(3, dtype=jnp.float32)[jnp.array([0, 1, 2, 0, 0])]
    q = q.at[4, 1].set(jnp.nan)

    def losses(x):
        y_or_q = y if labels == "index" else q
        loss, stats = jaxloss.cross_entropy(x, y_or_q, reduction="none", return_stats=True)
        return jnp.stack([loss, stats.logsumexp, stats.entropy])

    pull = jax.jit(lambda ct: jax.vjp(losses, x)[1](ct)[0])
    none = jnp.zeros((3, 5), jnp.float32)
    np.testing.assert_array_equal(pull(none), 0)
    moved = jax.jacfwd(pull)(none)  # [row, class, loss, row]
    assert np.all(moved[1:4, :, :, 1:4] == 0)
    of_loss, of_lse, of_entropy = np.asarray(moved)[0, :, :, 0].T
    np.testing.assert_allclose(of_loss, [-0.5, 0.5, 0], atol=EPS)
    np.testing.assert_allclose(of_lse, [0.5, 0.5, 0], atol=EPS)
    np.testing.assert_allclose(of_entropy, 0, atol=EPS)


@pytest.mark.parametrize("top", [False, True])
def test_soft_losses_are_linear_in_the_targets(top):
    """Those of -1 too."""
    x = X.at[:, 1:].set(jnp.array([0.5, -1.0, 0.25], X.dtype))
    q = jnp.array([[-1.0, 0.0, 1.0, 0.5], [1.0, -1.0, 2.0, 0.0]], jnp.float32)
    index = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), q.shape)
    given = {"sparse": (index, q)} if top else {"soft": q}
    part = parts.row_part(Rows(Logits(x), **given), ())
    soft = _rows.finalize(part, ())[0].soft
    np.testing.assert_allclose(soft, np.sum(np.asarray(q) * minus_log_p(x), -1), rtol=16 * EPS)


def test_a_constant_cotangent_of_log_softmax_is_no_constant_of_the_program():
    """XLA multiplies instead of adding it up. Any other reduction it computes while it compiles:
    20 s for 512 x 32000."""
    blank = jnp.zeros((4, 9), jnp.float32)
    pullback = jax.vjp(jaxloss.log_softmax, blank)[1]
    text = jax.jit(lambda: pullback(jnp.ones_like(blank))).lower().as_text()
    assert "stablehlo.add" in text
    for reduction in ("or", "and", "maximum", "minimum"):
        assert f"applies stablehlo.{reduction} across" not in text


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def rows_of_every_confidence(classes):
    """The first class leads by up to 60; two are equal; an offset; most are impossible."""
    x = np.random.default_rng(0).normal(size=(14, classes)).astype(np.float32)
    for row, margin in zip(x, (0, 0.5, 1, 2, 5, 8, 12, 20, 40, 60), strict=False):
        row[row.argmax()] += margin
    x[10] += 1e4
    x[11, [7, 90]] = 50
    x[12, 3:] = -INF
    return x


def exact_log_softmax(x):
    """(log p, log p's pullback), whose 1 - p of the largest class is the sum of the others."""
    x = x.astype(np.longdouble)
    rows, k = np.arange(len(x)), x.argmax(axis=-1)
    below = x - x[rows, k][:, None]
    e = np.exp(below)
    e[rows, k] = 0
    s = e.sum(axis=-1)

    def pullback(g):
        others = g.astype(np.longdouble)
        own = others[rows, k]
        others[rows, k] = 0
        total = others.sum(axis=-1)
        dx = others - e / (1 + s)[:, None] * (total + own)[:, None]
        dx[rows, k] = (own * s - total) / (1 + s)
        return dx

    return below - np.log1p(s)[:, None], pullback


# Of no row, of some and of all of them the largest class has more than half.
@pytest.mark.parametrize("rows", [slice(0, 3), slice(0, 14), slice(5, 10)], ids=str)
@pytest.mark.parametrize("classes", [300, 1001])
def test_log_softmax_on_one_device(one_device, rows, classes):
    x = rows_of_every_confidence(classes)[rows]
    g = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    g[-1] *= 1e-9  # nearly all of it at the largest class
    g[-1, x[-1].argmax()] = 1
    out, pullback = jax.vjp(jaxloss.log_softmax, jnp.asarray(x))
    expected, exact_pullback = exact_log_softmax(x)
    assert_within(out, expected, 16 * EPS)
    got, exact = pullback(jnp.asarray(g))[0], exact_pullback(g)
    largest = np.arange(len(x)), x.argmax(axis=-1)
    assert_within(np.asarray(got)[largest], exact[largest], 64 * EPS)
    # g_j - p_j sum(g) cancels, and the exponent's rounding is relative to |log p|.
    assert_within(got, exact, 64 * EPS, floor=np.max(np.abs(g)))


def test_probabilities_on_one_device(one_device):
    x = rows_of_every_confidence(303)[:12]
    q = np.asarray(jax.nn.softmax(jnp.asarray(x[::-1] / 4)))
    for dtype in (jnp.float32, jnp.bfloat16):
        logits, targets = jnp.asarray(x, dtype), jnp.asarray(q)
        loss, grad = jax.value_and_grad(jaxloss.cross_entropy)(logits, targets)
        log_p, pullback = exact_log_softmax(np.asarray(logits.astype(jnp.float32)))
        assert_within(loss, np.mean(np.sum(-q * log_p, axis=-1)), 16 * EPS)
        eps = EPS if dtype == jnp.float32 else 2.0**-8
        expected = pullback(-q) / len(x)
        assert_within(
            np.asarray(grad.astype(jnp.float32)), expected, 64 * eps, floor=np.max(np.abs(expected))
        )


@pytest.mark.nan_is_meant
def test_rows_without_a_softmax_on_one_device(one_device):
    x = rows_of_every_confidence(305)
    x[0, 3], x[1, 4], x[2] = np.nan, INF, -INF
    g = np.ones_like(x)
    g[0] = 0
    out, pullback = jax.vjp(jaxloss.log_softmax, jnp.asarray(x))
    dx = pullback(jnp.asarray(g))[0]
    assert np.all(np.isnan(out[:3]))
    assert not np.any(np.isnan(out[3:]))
    np.testing.assert_array_equal(dx[0], 0)
    assert np.all(np.isnan(dx[1:3]))
    assert not np.any(np.isnan(dx[3:]))


def test_derivatives_of_log_softmax_on_one_device(one_device):
    x = rows_of_every_confidence(307)[:12]
    x[10] -= 1e4
    direction = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)

    def derivatives(log_softmax, x, d):
        def f(x):
            return jnp.sum(log_softmax(x)[:, :9] ** 2)

        forward = jax.jvp(log_softmax, (x,), (d,))[1]
        over_reverse = jax.jvp(jax.grad(f), (x,), (d,))[1]
        twice = jax.grad(lambda x: jnp.sum(jax.grad(f)(x) * d))(x)
        return forward, over_reverse, twice

    got = derivatives(jaxloss.log_softmax, jnp.asarray(x), jnp.asarray(direction))
    with jax.enable_x64(True):
        wide = (jnp.asarray(v, jnp.float64) for v in (x, direction))
        expected = derivatives(jax.nn.log_softmax, *wide)
    for a, b in zip(got, expected, strict=True):
        assert_within(a, b, 64 * EPS, floor=np.max(np.abs(b)))


def test_a_vmap_of_log_softmax_on_one_device(one_device):
    x = jnp.asarray(rows_of_every_confidence(309))
    got = jax.vmap(jaxloss.log_softmax)(x)
    assert_within(got, exact_log_softmax(np.asarray(x))[0], 16 * EPS)


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("classes", [1, 3])
def test_no_class_that_is_possible(classes):
    x = jnp.full((2, classes), -INF)
    part = parts.row_part(Rows(Logits(x)), ())
    losses = _rows.finalize(part, ("logsumexp", "lse_above_max"))[0]
    np.testing.assert_array_equal(losses.logsumexp, -INF)
    np.testing.assert_array_equal(losses.lse_above_max, -INF)


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_second_derivatives_of_the_entropy_where_a_class_is_impossible(outer):
    def entropy(x):
        return jnp.sum(jaxloss.token_stats(x, jnp.array([0, 1])).entropy)

    x = X.at[1, 2:].set(0.5)  # one class of the first row is at -inf
    got = jit_quickly(outer(jax.grad(entropy)))(x)
    with jax.enable_x64(True):

        def exact(x):
            return -jnp.sum(jax.nn.softmax(x) * jax.nn.log_softmax(x))

        wide = jnp.asarray(x, jnp.float64)
        few = jit_quickly(jax.hessian(exact))(wide[0, jnp.array([0, 2, 3])])
        many = jit_quickly(jax.hessian(exact))(wide[1])
    expected = np.zeros((2, 4, 2, 4))
    expected[0, :, 0][np.ix_([0, 2, 3], [0, 2, 3])] = few
    expected[1, :, 1] = many
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_forward_mode_in_the_probabilities():
    x = X.at[:, 1:].set(jnp.array([0.5, -1.0, 0.25], jnp.float32))
    q = jnp.array([[0.5, 0.0, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]], jnp.float32)
    direction = jnp.array([[0.5, -2.0, 1.0, 3.0], [-1.0, 0.5, 4.0, 0.25]], jnp.float32)
    loss = partial(jaxloss.cross_entropy, x, reduction="none")
    got = jax.jvp(loss, (q,), (direction,))[1]
    expected = np.sum(minus_log_p(x) * np.asarray(direction), axis=-1)
    np.testing.assert_allclose(got, expected, rtol=8 * EPS)


def test_forward_mode_of_log_softmax_leaves_masked_classes_alone():
    x = jnp.array([[0.5, 2.0, -1.0], [1.0, 0.0, 3.0]], jnp.float32)
    exists = jnp.array([[True, False, True], [True, True, True]])
    direction = jnp.array([[1.0, INF, -2.0], [0.5, 3.0, 1.0]], jnp.float32)
    log_softmax = partial(jaxloss.log_softmax, where=exists)
    got = jax.jvp(log_softmax, (x,), (direction,))[1]
    p = np.exp(-minus_log_p(jnp.where(exists, x, -INF)))
    d = np.where(exists, direction, 0)
    expected = np.where(exists, d - np.sum(p * d, axis=-1, keepdims=True), 0)
    np.testing.assert_allclose(got, expected, rtol=8 * EPS, atol=4 * EPS)


@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize("lead", [(2,), (7,), (5, 2)])
@pytest.mark.parametrize("rest", ["drop", "uniform"])
def test_top_k_labels_of_any_batch_have_the_gradient_of_their_dense_form(lead, rest, at):
    rng = np.random.default_rng(3)
    x = jnp.asarray(4 * rng.normal(size=(*lead, 9)), jnp.float32)
    order = np.argsort(rng.random((*lead, 9)), axis=-1)
    index = jnp.asarray(order[..., :3], jnp.int32)
    # The last of them is at the maximum, which is what is kept out of the sum; or none of them.
    x = jnp.put_along_axis(x, order[..., at : at + 1], 9.0, axis=-1, inplace=False)
    q = jnp.asarray(rng.dirichlet(np.ones(4), lead)[..., :3], jnp.float32)
    left = (1 - jnp.sum(q, axis=-1, keepdims=True)) / 6 if rest == "uniform" else 0.0
    dense = jnp.put_along_axis(jnp.zeros_like(x) + left, index, q, axis=-1, inplace=False)
    for smoothing in (0.0, 0.1):
        options = {"reduction": "sum", "label_smoothing": smoothing}
        gradient = jax.grad(partial(jaxloss.cross_entropy, **options))
        got = gradient(x, jaxloss.TopKLabels(index, q, rest))
        np.testing.assert_allclose(got, gradient(x, dense), rtol=1e-5, atol=4 * EPS)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_gradients_of_many_classes(dtype):
    """Past 255 classes no exponential is held."""
    rng = np.random.default_rng(5)
    x = jnp.asarray(3 * rng.normal(size=(4, 300)), dtype)
    y = jnp.asarray(rng.integers(0, 300, 4), jnp.int32)
    got = jax.grad(partial(jaxloss.cross_entropy, reduction="sum"))(x, y)
    assert got.dtype == dtype
    expected = exact_gradient(np.asarray(x, np.float64), np.asarray(y)).astype(np.float64)
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    np.testing.assert_allclose(
        np.asarray(got, np.float64), expected, rtol=float(jnp.finfo(dtype).eps), atol=tiny
    )


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_row_gradient_is_of_the_dtype_that_is_scale_rows(dtype):
    x, kept = X.at[:, 1:].set(0.5).astype(jnp.bfloat16), jnp.array([1, 2], jnp.int32)
    ct = _rows.RowLosses(jnp.ones(2, jnp.float32), None, None, None)
    dx = _rows.row_gradient(Rows(Logits(x)), state_of(x, kept), ct, dtype)
    assert dx.dtype == (dtype or jnp.float32)


def split(x, shards):
    return x.reshape(x.shape[0], shards, -1).swapaxes(0, 1)


def test_shards_without_a_label_keep_one_maximum_out():
    """Rows as confident as float32 has them; with two maxima on different shards; of -inf."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(5, 12))
    x[1] -= 30
    x[1, 7] = 0.0
    x[2, [1, 10]] = 4.0
    x[3] = -INF
    x[4, :9] = -INF
    x = jnp.asarray(x, jnp.float32)

    def shard(x):
        part = parts.row_part(Rows(Logits(x)), ())
        part = parts.merge_shards(part, ("v",), x.shape[-1])
        losses, state = _rows.finalize(part, ("lse_above_max", "logsumexp"))
        return losses.lse_above_max, losses.logsumexp, state.omitted

    r, lse, kept = jax.vmap(shard, axis_name="v")(split(x, 4))
    wide = np.asarray(x, np.longdouble)
    high = wide.max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        others = np.exp(wide - high)
    others[np.arange(5), wide.argmax(axis=-1)] = 0
    truth = np.log1p(others.sum(axis=-1))
    rows = [0, 1, 2, 4]
    assert truth[1] < 1e-11
    for shard in range(4):
        np.testing.assert_allclose(r[shard][np.array(rows)], truth[rows], rtol=16 * EPS)
        assert lse[shard][3] == -INF
    # On the shard that holds the one maximum its place, on all others none.
    np.testing.assert_array_equal(np.sum(kept < 3, axis=0)[np.array([0, 1, 2])], [1, 1, 0])


@pytest.mark.nan_is_meant  # a shard that has no label says so by NaN
@pytest.mark.parametrize("label", [0, 5, 11])
def test_shards_with_a_label_keep_it_out(label):
    x = jnp.asarray(np.random.default_rng(6).normal(size=(3, 12)) * 9, jnp.float32)

    def losses(x, start):
        own = jnp.where((label >= start) & (label < start + 3), label - start, 3)
        part = parts.row_part(Rows(Logits(x), jnp.full(3, own)), ("nll",))
        return _rows.finalize(parts.merge_shards(part, ("v",), 3), ("nll",))[0].nll

    got = jax.vmap(losses, axis_name="v")(split(x, 4), jnp.arange(0, 12, 3, dtype=jnp.int32))
    np.testing.assert_allclose(got, np.tile(minus_log_p(x)[:, label], (4, 1)), rtol=64 * EPS)


@pytest.mark.nan_is_meant
def test_a_part_without_axes_is_whole():
    part = parts.row_part(Rows(Logits(X)), ())
    assert parts.merge_shards(part, (), 4) is part


def test_a_masked_class_above_the_others_costs_a_confident_row_no_digits():
    """The entry that is kept out is one of the classes that exist."""
    x, q = jnp.array([[1e3, 40.0, 0.0, 0.0]]), jnp.array([[0.0, 1.0, 0.0, 0.0]])
    loss = jaxloss.cross_entropy(x, q, where=jnp.array([False, True, True, True]))
    np.testing.assert_allclose(loss, 2 * np.exp(-40.0), rtol=1e-6)


@pytest.mark.parametrize("best", [0, 100, 127])
def test_the_maximum_is_kept_out_wherever_it_is(best):
    x = jnp.zeros((1, 128)).at[0, best].set(40)
    loss = jaxloss.cross_entropy(x, jax.nn.one_hot(jnp.array([best]), 128))
    np.testing.assert_allclose(loss, 127 * np.exp(-40.0), rtol=1e-6)


@pytest.mark.nan_is_meant
def test_rows_of_no_class_have_no_entry():
    losses = jaxloss.nll_loss(jnp.zeros((3, 0)), jnp.array([0, 2, -100]), reduction="none")
    np.testing.assert_array_equal(losses, [jnp.nan, jnp.nan, 0])
