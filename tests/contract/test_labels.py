"""The label contract, value and gradient alike, eager and jitted."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle.programs import jit_quickly

import jaxloss

LOSSES = {
    "cross_entropy": jaxloss.cross_entropy,
    "two steps": lambda x, y, **options: jaxloss.nll_loss(jaxloss.log_softmax(x), y, **options),
    "linear": lambda x, y, **options: jaxloss.linear_cross_entropy(
        x, jnp.eye(x.shape[-1], dtype=x.dtype), y, chunk_size=2, **options
    ),
}
X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def both_ways(f):
    return [f, jax.jit(f)]


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


REDUCTIONS = ("none", "sum", "mean")
# Each way of not counting, and the reduction that is computed eagerly too.
NOT_COUNTING = {"ignore_index": "mean", "sample_weight": "none", "boolean": "sum", "where": "mean"}


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("how", NOT_COUNTING)
def test_what_does_not_count_is_exactly_zero(loss, how):
    y = jnp.array([0, 1, 2, 3, 0])
    options = {}
    counts = np.array([True, False, True, True, False])
    if how == "ignore_index":
        y = jnp.where(counts, y, -100)
    elif how == "where":
        options["where"] = jnp.asarray(counts)
    else:
        options["sample_weight"] = jnp.asarray(counts if how == "boolean" else counts * 1.0)

    def steps(reductions, x):
        def step(reduction):
            def total(x):
                losses = loss(x, y, reduction=reduction, **options)
                return jnp.sum(losses), losses

            (_, losses), gradient = jax.value_and_grad(total, has_aux=True)(x)
            return losses, gradient

        return {reduction: step(reduction) for reduction in reductions}

    few = jit_quickly(lambda x: [loss(x, y[counts], reduction=r) for r in REDUCTIONS])(X[counts])
    few = dict(zip(REDUCTIONS, few, strict=True))
    eagerly = partial(steps, [NOT_COUNTING[how]])
    for run in (jit_quickly(partial(steps, REDUCTIONS)), eagerly):
        for held in (0.0, np.inf, -np.inf, np.nan):
            x = X.copy()
            x[[1, 4]] = held
            for reduction, (losses, gradient) in run(jnp.asarray(x)).items():
                assert np.all(np.asarray(gradient)[~counts] == 0)
                assert np.isfinite(gradient).all()
                if reduction == "none":
                    assert np.all(np.asarray(losses)[~counts] == 0)
                    losses = losses[counts]
                np.testing.assert_allclose(losses, few[reduction], rtol=1e-6)


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("weighted", [False, True])
def test_a_label_out_of_range_is_nan_in_its_row(loss, weighted):
    options = {"weight": jnp.array([1.0, 0.0, 2.0, 3.0])} if weighted else {}
    wrong = [jnp.array([0, label, 2, -100, 3]) for label in (4, -1, -99, 2**31 - 1, -(2**31))]
    for f in both_ways(lambda x, y: loss(x, y, reduction="none", **options)):
        for y in wrong:
            assert np.isnan(f(X, y)).tolist() == [False, True, False, False, False]
    for reduction in ("sum", "mean"):
        for f in both_ways(jax.grad(lambda x, y, r=reduction: loss(x, y, reduction=r, **options))):
            for y in wrong:
                gradient = np.asarray(f(X, y))
                assert np.isfinite(np.delete(gradient, 1, axis=0)).all()
                assert np.isnan(gradient[1]).all()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_any_integer_dtype(dtype):
    x = jnp.zeros((3, 300)).at[:, 7].set(1.0)
    y = np.array([7, 100, 127], dtype)
    expected = jaxloss.cross_entropy(x, y.astype(np.int32), reduction="none")
    np.testing.assert_array_equal(jaxloss.cross_entropy(x, y, reduction="none"), expected)


@pytest.mark.nan_is_meant
def test_labels_do_not_wrap():
    with jax.enable_x64(True):
        y = jnp.array([3, 2**32 + 3], jnp.int64)
        assert np.isnan(jaxloss.cross_entropy(jnp.zeros((2, 5)), y, reduction="none"))[1]
    y = jnp.array([3, 2**32 - 100], jnp.uint32)  # not the -100 that is ignored
    assert np.isnan(jaxloss.cross_entropy(jnp.zeros((2, 5)), y, reduction="none"))[1]
    for wide in (2**32 + 3, 2**32 - 100, -(2**32) + 3):  # of NumPy, which JAX makes 32 bits of
        y = np.array([3, wide])
        each = jaxloss.cross_entropy(jnp.zeros((2, 5)), y, reduction="none")
        np.testing.assert_array_equal(np.isnan(each), [False, True])
        assert jaxloss.next_token_labels(y)[0] not in (3, -100)
        with pytest.raises(ValueError, match=r"got .* at \(1,\)"):
            jaxloss.check_labels(y, 5)
    if jax.config.jax_enable_x64:
        return
    with pytest.raises(TypeError, match=r"labels must be an array; got list \(.*4294967299"):
        jaxloss.cross_entropy(jnp.zeros((2, 5)), [3, 2**32 + 3])


@pytest.mark.nan_is_meant
@pytest.mark.parametrize(
    ("index", "zero"), [(-100, [3]), (None, []), (2, [1]), (-1, [2]), (10**12, [])]
)
def test_ignore_index(loss, index, zero):
    y = jnp.array([0, 2, -1, -100, 3])
    losses = np.asarray(loss(X, y, ignore_index=index, reduction="none"))
    assert np.flatnonzero(losses == 0).tolist() == zero
    outside = {2: -1, 3: -100}
    expected = [i for i, label in outside.items() if label != index]
    assert np.flatnonzero(np.isnan(losses)).tolist() == expected


@pytest.mark.nan_is_meant
def test_nothing_counts(loss):
    y = jnp.full(5, -100)
    assert np.isnan(loss(X, y))
    assert loss(X, y, reduction="sum") == 0
    for f in both_ways(jax.grad(lambda x: loss(x, y))):
        assert np.all(np.asarray(f(X)) == 0)
    weight = jax.grad(lambda s: loss(X, y, sample_weight=s))(jnp.ones(5))
    assert np.all(np.asarray(weight) == 0)


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_one_class_and_no_token_that_counts(loss, outer):
    """NaN from behind a select returns in second derivatives."""
    x, y = jnp.zeros((2, 1)), jnp.full(2, -100)
    hessian = outer(jax.grad(lambda x: loss(x, y, reduction="sum")))(x)
    np.testing.assert_array_equal(hessian, jnp.zeros((2, 1, 2, 1)))


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_no_token_that_counts_beside_padding(outer):
    x, y = jnp.zeros((2, 3)), jnp.full(2, -100)
    loss = partial(jaxloss.cross_entropy, labels=y, num_classes=2, reduction="sum")
    np.testing.assert_array_equal(outer(jax.grad(loss))(x), jnp.zeros((2, 3, 2, 3)))


def test_check_labels_eagerly():
    jaxloss.check_labels(jnp.array([[0, 4], [-100, 2]]), 5)
    jaxloss.check_labels(jnp.zeros(0, jnp.int32), 5)
    with pytest.raises(
        ValueError, match=r"\[0, 5\) or equal ignore_index, -100; got 5 at \(1, 0\)"
    ):
        jaxloss.check_labels(jnp.array([[0, 4], [5, 2]]), 5)
    with pytest.raises(ValueError, match="got -100 at"):
        jaxloss.check_labels(jnp.array([-100]), 5, ignore_index=None)
    with pytest.raises(TypeError, match=r"an integer dtype.*got float32\(1,\)"):
        jaxloss.check_labels(jnp.array([1.0], jnp.float32), 5)
    jaxloss.check_labels(jnp.array([-100]), 0)
    for bad in (-1, 2**31):
        with pytest.raises(ValueError, match=rf"num_classes must be in .*; got {bad}"):
            jaxloss.check_labels(jnp.array([1]), bad)


def test_check_labels_under_jit():
    def step(y):
        jaxloss.check_labels(y, 5)
        return y + 1

    checked = checkify.checkify(jax.jit(step))
    error, _ = checked(jnp.array([0, 4]))
    error.throw()
    error, _ = checked(jnp.array([0, 7]))
    with pytest.raises(checkify.JaxRuntimeError, match="got 7 at flat index 1"):
        error.throw()
    with pytest.raises(Exception, match="got 7 at flat index 1"):
        chex.chexify(jax.jit(step), async_check=False)(jnp.array([0, 7]))


def test_check_labels_that_a_program_holds():
    """They are known while it is traced."""
    labels = jnp.array([0, 7])

    def step(x):
        jaxloss.check_labels(labels, 5)
        return x

    with pytest.raises(ValueError, match=r"got 7 at \(1,\)"):
        jax.jit(step)(0.0)


def test_check_labels_of_an_explicit_mesh():
    mesh = jax.make_mesh((2,), ("t",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        y = jax.device_put(jnp.array([[0, 4], [1, 7]]), NamedSharding(mesh, P("t")))
        with pytest.raises(ValueError, match=r"got 7 at \(1, 1\)"):
            jaxloss.check_labels(y, 5)
        error, _ = checkify.checkify(jax.jit(partial(jaxloss.check_labels, num_classes=5)))(y)
        assert "got 7 at flat index 3" in error.get()


def test_top_k_labels_are_none_of_nll_loss():
    labels = jaxloss.TopKLabels(jnp.zeros((5, 2), jnp.int32), jnp.full((5, 2), 0.5))
    with pytest.raises(TypeError, match=r"nll_loss: .*; got TopKLabels\. cross_entropy takes them"):
        jaxloss.nll_loss(jnp.asarray(X), labels)


@pytest.mark.nan_is_meant
def test_a_label_out_of_range_that_is_asked_for_nothing():
    """Of nll_loss too, whose rule is its own; and in forward mode."""
    log_probs, y = jnp.asarray(X), jnp.array([0, 4, 2, -100, 3])
    f = partial(jaxloss.nll_loss, labels=y, reduction="none")
    (gradient,) = jax.vjp(f, log_probs)[1](jnp.array([1.0, 0.0, 2.0, 1.0, 0.0], X.dtype))
    expected = np.zeros(X.shape)
    expected[0, 0], expected[2, 2] = -1, -2
    np.testing.assert_array_equal(gradient, expected)
    moved = jax.jvp(f, (log_probs,), (jnp.ones_like(log_probs),))[1]
    np.testing.assert_array_equal(moved, [-1, np.nan, -1, 0, -1])


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"logit_softcap": 3.0}])
def test_a_token_of_nan_that_is_asked_for_nothing(options):
    x, y = jnp.array([[jnp.nan, 1.0], [0.5, 2.0]]), jnp.array([0, 1])
    pullback = jax.vjp(lambda x: jaxloss.token_stats(x, y, **options).log_prob, x)[1]
    (dx,) = pullback(jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(dx[0], 0)
    assert np.all(np.isfinite(dx))
    assert np.all(dx[1] != 0)


@pytest.mark.parametrize(
    ("dtype", "ignored"),
    [("uint8", 255), ("int8", 127), ("int8", -128), ("int32", 2**31 - 1), ("int32", -(2**31))],
)
def test_the_ends_of_a_dtype_may_be_ignored(dtype, ignored):
    x, labels = jnp.array([[0.5, 2.0], [1.0, 0.0]]), jnp.asarray([ignored, 1], dtype)
    got = jaxloss.cross_entropy(x, labels, ignore_index=ignored)
    np.testing.assert_allclose(got, jaxloss.cross_entropy(x[1:], jnp.array([1])), rtol=1e-6)
