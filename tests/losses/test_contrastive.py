"""contrastive_loss and sigmoid_contrastive_loss: CLIP's formula and SigLIP's without the matrix."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.budget import EPS
from oracle.pairs import clip_by_pair, one_way_by_row, siglip_by_row
from oracle.programs import equations, jit_quickly, temporary_mib

import jaxloss
from benchmarks.harness.products import jax_products

N, D, MORE = 7, 3, 4
WAYS = ("clip", "one way", "siglip", "siglip with more")


def operands(dtype=np.float64, n=N, d=D):
    """x, y with further rows, the scale and the bias."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(rows, d)).astype(dtype) for rows in (n, n + MORE))
    wide = np.promote_types(dtype, np.float32) if dtype != jnp.bfloat16 else np.float32
    return x, y, np.asarray(1.3, wide), np.asarray(-0.7, wide)


def calls(way, **options):
    """(the loss of x, y, scale and bias; the formula of each pair)."""
    symmetric = way in ("clip", "siglip")

    def some(y, x):
        return y[: x.shape[0]] if symmetric else y

    def loss(x, y, scale, bias, **more):
        given = {"logit_scale": scale, "symmetric": symmetric, **options, **more}
        if "siglip" in way:
            given["logit_bias"] = bias
            return jaxloss.sigmoid_contrastive_loss(x, some(y, x), **given)
        return jaxloss.contrastive_loss(x, some(y, x), **given)

    def formula(x, y, scale, bias, where=None):
        if "siglip" in way:
            return siglip_by_row(x, some(y, x), scale, bias, where)
        by_pair = clip_by_pair if symmetric else one_way_by_row
        return by_pair(x, some(y, x), scale, where)

    return loss, formula


def active(way):
    """Which operands the loss depends on."""
    return (0, 1, 2, 3) if "siglip" in way else (0, 1, 2)


def close(got, expected, rtol=1e-11):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.max(np.abs(b), initial=1e-3))


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 7])
@pytest.mark.parametrize("way", WAYS)
def test_each_reduction_is_the_formula(way, chunk_size):
    s = np.linspace(0.5, 2, N)
    with jax.enable_x64(True):
        given = operands()
        loss, formula = calls(way, chunk_size=chunk_size)
        each = formula(*given)
        for weight, w in ((None, np.ones(N)), (s, s)):
            call = partial(loss, *given, sample_weight=weight)
            close(call(reduction="none"), w * each)
            close(call(reduction="sum"), np.sum(w * each))
            close(call(), np.sum(w * each) / np.sum(w))
            assert call().dtype == jnp.float64


def directions(f, given, by, along):
    """Every mode of differentiation, of first and second order."""
    gradient = jax.grad(f, by)
    some = tuple(given[i] for i in by)

    def of_some(*some):
        full = list(given)
        for i, v in zip(by, some, strict=True):
            full[i] = v
        return f(*full)

    def slope(*some):
        return jax.jvp(of_some, some, along)[1]

    def squared(*some):
        grads = jax.grad(of_some, tuple(range(len(by))))(*some)
        return sum(jnp.vdot(g, t) for g, t in zip(grads, along, strict=True))

    argnums = tuple(range(len(by)))
    return {
        "grad": gradient(*given),
        "jvp": slope(*some),
        "forward over reverse": jax.jvp(jax.grad(of_some, argnums), some, along)[1],
        "reverse over reverse": jax.grad(squared, argnums)(*some),
        "reverse over forward": jax.grad(slope, argnums)(*some),
        "forward over forward": jax.jvp(slope, some, along)[1],
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_mode_of_differentiation_is_that_of_the_formula(way, reduction):
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        given = operands()
        ct = rng.normal(size=N) if reduction == "none" else np.full(N, 1 / N)
        loss, formula = calls(way, chunk_size=3, reduction=reduction)
        by = active(way)
        along = [rng.normal(size=given[i].shape) for i in by]

        def mine(*args):
            found = loss(*args)
            return jnp.sum(ct * found) if reduction == "none" else found

        def truth(*args):
            return jnp.sum(ct * formula(*args))

        args = tuple(map(jnp.asarray, given))
        along = tuple(map(jnp.asarray, along))
        found, expected = (
            jit_quickly(lambda f=f: directions(f, args, by, along))() for f in (mine, truth)
        )
    for mode in expected:
        close(found[mode], expected[mode], 1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_the_formula_under_vmap_scan_and_checkpoint(way):
    with jax.enable_x64(True):
        x, y, scale, bias = map(jnp.asarray, operands())
        loss, _ = calls(way, chunk_size=3)
        by = active(way)
        step = jax.value_and_grad(loss, by)
        many = jnp.stack([x, x + 1, 2 * x]), jnp.stack([y, y * y, y])
        one_by_one = [step(u, v, scale, bias) for u, v in zip(*many, strict=True)]
        expected = jax.tree.map(lambda *v: jnp.stack(v), *one_by_one)
        close(jax.vmap(step, (0, 0, None, None))(*many, scale, bias), expected)
        of_scales = jax.vmap(step, (None, None, 0, None))(x, y, jnp.stack([scale, scale]), bias)
        close(jax.tree.map(lambda v: v[1], of_scales), one_by_one[0])

        def total(*numbers):
            def body(total, given):
                return total + jax.checkpoint(loss)(*given, *numbers), None

            return jax.lax.scan(body, jnp.zeros(()), many)[0]

        sums = [jnp.sum(v) for v in (expected[0], *expected[1][2:])]
        found = jax.value_and_grad(total, tuple(range(len(by) - 2)))(scale, bias)
        close((found[0], *found[1]), sums)


def confident(margin, n=6):
    """Pairs whose similarity is ``margin`` above all others: the products are exact in float32."""
    x = np.eye(n, dtype=np.float32)
    return x, x * np.float32(margin / 128), np.float32(128)


@pytest.mark.parametrize("margin", [0.5, 8, 17, 30, 60, 80, 86])
def test_a_confident_pair_keeps_its_digits(margin):
    """Beside the formula in float64, which has none left past a margin of 36: the truth is
    ``log1p((n - 1) exp(-margin))``, whose derivative by the scale is ``-margin / scale`` times its
    sigmoid."""
    n = 6
    x, y, scale = confident(margin, n)
    apart = np.longdouble(np.float32(margin / 128)) * 128
    tail = (n - 1) * np.exp(-apart)
    loss, by_scale = jax.value_and_grad(
        lambda scale: jaxloss.contrastive_loss(x, y, logit_scale=scale, chunk_size=4)
    )(scale)
    allowed = (margin + 16) * 2 * EPS
    np.testing.assert_allclose(float(loss), float(np.log1p(tail)), rtol=allowed)
    p = tail / (1 + tail)
    np.testing.assert_allclose(float(by_scale), float(-p * apart / 128), rtol=allowed)
    d_x = jax.grad(lambda x: jaxloss.contrastive_loss(x, y, logit_scale=scale))(x)
    # Of its own row of y each row of x misses p, of every other one its share.
    share = p / (n - 1)
    wanted = -np.eye(n) * p + (1 - np.eye(n)) * share
    np.testing.assert_allclose(d_x, (apart / n * wanted).astype(float), rtol=allowed)


@pytest.mark.parametrize("margin", [30, 60, 80])
def test_a_confident_decision_keeps_its_digits(margin):
    x, y, scale = confident(2 * margin)

    def loss(x, bias):
        return jaxloss.sigmoid_contrastive_loss(x, y, logit_scale=scale, logit_bias=bias)

    value, (d_x, d_bias) = jax.value_and_grad(loss, (0, 1))(x, np.float32(-margin))
    one = np.exp(-np.longdouble(margin))  # each of the 6 decisions of a row is as sure
    allowed = (2 * margin + 16) * 2 * EPS
    np.testing.assert_allclose(float(value), float(6 * one), rtol=allowed)
    np.testing.assert_allclose(float(d_bias), float(4 * one), rtol=allowed)
    slopes = np.where(np.eye(6, dtype=bool), -one, one) * (2 * margin / 6)
    np.testing.assert_allclose(d_x, slopes.astype(float), rtol=allowed)


def test_hard_pairs_at_a_large_common_scale():
    """Similarities from -100 to 100, in float32 beside float64."""
    rng = np.random.default_rng(2)
    x, y = (rng.normal(size=(12, 5)).astype(np.float32) for _ in range(2))
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    x[3], y[3] = y[4], x[4]
    for way in ("clip", "siglip"):
        loss, formula = calls(way, chunk_size=5)
        got, grads = jax.value_and_grad(loss, (0, 1))(x, y, np.float32(100), np.float32(-10))
        with jax.enable_x64(True):
            wide = *(v.astype(np.float64) for v in (x, y)), 100.0, -10.0

            def truth(*args, formula=formula):
                return jnp.mean(formula(*args))

            expected, expected_grads = jax.value_and_grad(truth, (0, 1))(*wide)
        np.testing.assert_allclose(got, expected, rtol=120 * EPS)
        for g, want in zip(grads, expected_grads, strict=True):
            np.testing.assert_allclose(g, want, rtol=0, atol=2e3 * EPS * np.abs(want).max())


# Masks and weights


@pytest.mark.parametrize("way", WAYS)
def test_pairs_that_do_not_exist_are_nowhere(way):
    """NaN in their rows reaches nothing, and the rest is as if they had been left out."""
    where = np.array([True, False, True, True, False, True, True])
    kept = np.r_[np.flatnonzero(where), np.arange(N, N + MORE)]
    x, y, scale, bias = operands(np.float32)
    holes_x, holes_y = x.copy(), y.copy()
    holes_x[~where], holes_y[:N][~where] = np.nan, np.nan
    loss, _ = calls(way, chunk_size=3, reduction="none")
    by = active(way)
    ct = np.linspace(1, 2, N).astype(np.float32)
    masked = partial(loss, where=where)

    def total(f, ct, *args):
        found = f(*args)
        return jnp.sum(ct * found), found

    step = jax.value_and_grad(partial(total, masked, ct), by, has_aux=True)
    (_, got), grads = step(holes_x, holes_y, scale, bias)
    fewer = (x[where], y[kept], scale, bias)
    step = jax.value_and_grad(partial(total, loss, ct[where]), by, has_aux=True)
    (_, expected), few = step(*fewer)
    close(got[where], expected, 1e-5)
    assert not np.any(got[~where])
    close(grads[0][where], few[0], 1e-4)
    close(grads[1][kept], few[1], 1e-4)
    close(grads[2:], few[2:], 1e-4)
    assert not np.any(grads[0][~where])
    assert not np.any(grads[1][:N][~where])


@pytest.mark.parametrize("way", WAYS)
def test_entries_that_do_not_exist(way):
    """False negatives off the diagonal; on it, pairs that have no loss."""
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        given = operands()
        columns = N if way in ("clip", "siglip") else N + MORE
        where = rng.random((N, columns)) < 0.6
        diagonal = np.arange(N)
        where[diagonal, diagonal] = True
        where[2, 2] = False
        loss, formula = calls(way, chunk_size=3, reduction="none")
        counts = diagonal != 2
        each = loss(*given, where=where)
        assert each[2] == 0
        close(each[counts], formula(*given, where=where)[counts])
        # Of the truth no entry may be infinite; a pair's own is in the sums of that pair alone.
        safe = where | np.eye(N, columns, dtype=bool)
        by = active(way)
        args = tuple(map(jnp.asarray, given))
        grads = jax.grad(lambda *args: jnp.sum(loss(*args, where=where)), by)(*args)
        truth = jax.grad(
            lambda *args: jnp.sum(jnp.where(counts, formula(*args, where=safe), 0)), by
        )(*args)
        close(grads, truth, 1e-9)


def test_a_row_of_which_no_entry_exists_may_hold_anything():
    x, y, *_ = operands(np.float32)
    where = np.ones((N, N), bool)
    where[1], where[:, 1] = False, False
    holes = x.copy(), y[:N].copy()
    for v in holes:
        v[1] = np.inf
    for loss in (jaxloss.contrastive_loss, jaxloss.sigmoid_contrastive_loss):
        by_pair = np.arange(N) != 1
        expected = jax.value_and_grad(partial(loss, where=by_pair), (0, 1))(x, y[:N])
        close(jax.value_and_grad(partial(loss, where=where), (0, 1))(*holes), expected, 1e-5)


def test_a_pair_of_weight_0_remains_a_negative():
    with jax.enable_x64(True):
        given = operands()
        weight = np.array([1.0, 0, 2, 1, 1, 0, 1])
        for way in WAYS:
            loss, formula = calls(way, chunk_size=3)
            each = np.asarray(formula(*given))
            close(loss(*given, sample_weight=weight), np.sum(weight * each) / np.sum(weight))
            close(loss(*given, sample_weight=weight > 0), np.mean(each[weight > 0]))
            by_weight = jax.grad(
                lambda w, loss=loss: loss(*given, sample_weight=w, reduction="sum")
            )
            close(by_weight(jnp.asarray(weight)), np.where(weight > 0, each, 0))


def test_where_one_way_a_row_of_weight_0_is_not_read():
    x, y, scale, bias = operands(np.float32)
    weight = (np.arange(N) != 4).astype(np.float32)
    holes = x.copy()
    holes[4] = np.nan
    for way in ("one way", "siglip", "siglip with more"):
        loss, _ = calls(way, sample_weight=weight)
        by = (0, 1)
        close(
            jax.value_and_grad(loss, by)(holes, y, scale, bias),
            jax.value_and_grad(loss, by)(x, y, scale, bias),
            1e-6,
        )


@pytest.mark.nan_is_meant
def test_a_mean_over_nothing():
    x, y, *_ = operands(np.float32)
    for loss in (jaxloss.contrastive_loss, jaxloss.sigmoid_contrastive_loss):
        for x_y in ((x[:0], y[:0]), (x, y[:N])):
            none = partial(loss, where=np.zeros(len(x_y[0]), bool))
            assert np.isnan(none(*x_y))
            assert none(*x_y, empty_mean=0.0) == 0
            assert none(*x_y, reduction="sum") == 0
            assert none(*x_y, reduction="none").shape == (len(x_y[0]),)
            for grad in jax.grad(none, (0, 1))(*x_y):
                assert not np.any(grad)


def test_one_pair_has_nothing_to_be_told_from():
    x, y, *_ = operands(np.float32)
    value, grads = jax.value_and_grad(jaxloss.contrastive_loss, (0, 1))(x[:1], y[:1])
    assert value == 0
    assert not any(np.any(g) for g in grads)


# Dtypes, products and memory


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("way", ["clip", "siglip"])
def test_narrow_operands(way, dtype):
    """Products of the operands as they are; everything else in float32."""
    given = operands(dtype, 9, 8)
    loss, formula = calls(way, chunk_size=4)
    by = active(way)
    step = jax.value_and_grad(loss, by)
    value, grads = step(*given)
    assert value.dtype == jnp.float32
    assert [g.dtype for g in grads] == [given[i].dtype for i in by]
    with jax.enable_x64(True):
        wide = tuple(jnp.asarray(v, jnp.float64) for v in given)
        truth = jax.value_and_grad(lambda *args: jnp.mean(formula(*args)), by)
        expected, slopes = truth(*wide)
    np.testing.assert_allclose(value, expected, rtol=32 * EPS)
    narrow = float(jnp.finfo(dtype).eps)
    for g, want in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(
            np.asarray(g, np.float64), want, rtol=0, atol=2 * narrow * np.max(np.abs(want))
        )

    def dtypes_of(eqn):
        return *(str(v.aval.dtype) for v in eqn.invars), str(eqn.outvars[0].aval.dtype)

    program = list(equations(step, *given))
    name = str(jnp.dtype(dtype))
    of_products = {dtypes_of(e) for e in program if e.primitive.name == "dot_general"}
    assert of_products == {(name, name, "float32")}
    sums = [e for e in program if e.primitive.name in ("add", "exp", "log", "reduce_sum")]
    assert name not in {str(v.aval.dtype) for e in sums for v in e.outvars}


def test_slopes_of_many_float16_pairs_do_not_vanish():
    """A share of 1e-3 of a mean over 4096 pairs is less than float16 has numbers for."""
    rng = np.random.default_rng(4)
    x, y = (rng.normal(size=(512, 4)).astype(np.float16) for _ in range(2))
    scale = np.float32(2**12)

    def lifted(loss, *args):
        return loss(*args) * scale

    for loss in (jaxloss.contrastive_loss, jaxloss.sigmoid_contrastive_loss):
        got = jax.grad(partial(lifted, loss))(x, y)
        want = jax.grad(partial(lifted, loss))(*(v.astype(np.float32) for v in (x, y)))
        off = np.max(np.abs(np.asarray(got, np.float32) - want))
        assert off <= 4 * float(jnp.finfo(jnp.float16).eps) * np.max(np.abs(want))


@pytest.mark.parametrize("way", WAYS)
def test_counts_of_products(way):
    """Of N x M x D: loops are run as often as they run."""
    n, d = 12, 8
    given = operands(np.float32, n, d)
    columns = n if way in ("clip", "siglip") else n + MORE
    for reduction in ("mean", "none"):
        loss, _ = calls(way, chunk_size=5, reduction=reduction)
        total = lambda *args, loss=loss: jnp.sum(loss(*args))  # noqa: E731

        def count(f, given=given, columns=columns):
            return jax_products(f, given, (n, d, columns))

        assert count(total) == 1
        assert count(jax.grad(total, (0, 1, 2))) == 4
        assert count(jax.grad(total, 0)) == 3  # the other side is frozen
        assert count(jax.grad(total, 2)) == 2


@pytest.mark.parametrize("loss", [jaxloss.contrastive_loss, jaxloss.sigmoid_contrastive_loss])
def test_no_array_of_all_similarities_is_held(loss):
    n, d = 2**17, 64
    x = jax.ShapeDtypeStruct((n, d), jnp.float32)
    scale = jax.ShapeDtypeStruct((), jnp.float32)

    def step(x, y, scale):
        return loss(x, y, logit_scale=scale)

    args = x, x, scale
    assert temporary_mib(jax.value_and_grad(step, (0, 1, 2)), args) < 400
    assert temporary_mib(step, args) < 200


def test_nothing_but_the_operands_and_a_few_numbers_a_row_is_saved():
    x, y, scale, _ = operands(np.float32, 64, 8)
    policy = jax.checkpoint_policies.dots_saveable
    for wrap in (lambda f: f, partial(jax.checkpoint, policy=policy)):

        @wrap
        def loss(x, y, scale):
            return jaxloss.contrastive_loss(x, y[:64], logit_scale=scale, chunk_size=16)

        _, pullback = jax.vjp(loss, x, y, scale)
        assert max(v.size for v in jax.tree.leaves(pullback)) <= y.size


# What a wrong call is told


X = np.zeros((4, 3), np.float32)


@pytest.mark.parametrize("name", ["contrastive_loss", "sigmoid_contrastive_loss"])
@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        ({"x": X[0]}, ValueError, r"x must be \[N, D\]; got float32\(3,\)"),
        ({"y": X[None]}, ValueError, r"y must be \[M, D\]; got float32\(1, 4, 3\)"),
        ({"y": X[:, :2]}, ValueError, "x and y must have one number of features, D; got x float32"),
        ({"y": X.astype(np.float16)}, TypeError, "x and y must have one dtype; .*Cast one of them"),
        (
            {"x": X[:3]},
            ValueError,
            r"x and y must have a row a pair each; got x float32\(3, 3\), y float32\(4, 3\)\. "
            "With symmetric=False further rows of y are negatives",
        ),
        ({"y": X[:3]}, ValueError, r"a row a pair each; got .*y float32\(3, 3\)\.(\n|$)"),
        ({"y": X[:3], "symmetric": False}, ValueError, "y must have a row for each row of x; got"),
        ({"symmetric": 1}, TypeError, "symmetric must be True or False; got 1"),
        (
            {"where": np.ones((1, 4), bool)},
            ValueError,
            r"where must be \[N\] \(pairs that exist\), \(4,\), or \[N, M\] \(entries that "
            r"exist\), \(4, 4\); got bool\(1, 4\)",
        ),
        ({"where": np.ones(4)}, TypeError, "where must be boolean; got float"),
        ({"sample_weight": X}, ValueError, r"sample_weight must have the shape .*\(4,\); got"),
        ({"logit_scale": X[0, :1]}, ValueError, r"logit_scale must be a number.*float32\(1,\)"),
        ({"logit_scale": "1"}, TypeError, "logit_scale must be a number, or .*; got str"),
        ({"logit_scale": np.nan}, ValueError, "logit_scale must be in .*; got nan"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of .*; got 'avg'"),
        ({"empty_mean": "0"}, TypeError, "empty_mean must be a Python number; got str"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1; got 0"),
        ({"precision": "low"}, ValueError, "precision must be one of .*; got 'low'"),
        ({"token_axis_name": "data"}, ValueError, "token_axis_name must name axes .*; got 'data'"),
        ({"mesh": 3}, TypeError, "mesh must be a jax.sharding.Mesh; got 3"),
    ],
)
def test_a_wrong_call(name, wrong, kind, text):
    arguments = {"x": X, "y": X, **wrong}
    for way in (lambda f: f(), jax.eval_shape):
        with pytest.raises(kind, match=f"^{name}: .*{text}"):
            way(lambda: getattr(jaxloss, name)(**arguments))


def test_numbers_may_be_left_out_or_traced():
    x, y, *_ = operands(np.float32)
    loss = jaxloss.sigmoid_contrastive_loss(x, y[:N])
    for numbers in (
        {"logit_scale": None, "logit_bias": None},
        {"logit_scale": 1, "logit_bias": 0},
        {"logit_scale": jnp.bfloat16(1), "logit_bias": jnp.int32(0)},
    ):
        close(jaxloss.sigmoid_contrastive_loss(x, y[:N], **numbers), loss, 1e-6)
    slope = jax.grad(lambda t: jaxloss.contrastive_loss(x, y[:N], logit_scale=t))(jnp.bfloat16(1))
    assert slope.dtype == jnp.bfloat16
