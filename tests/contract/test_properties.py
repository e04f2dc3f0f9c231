"""Laws that hold for all logits, on values drawn to hurt.

Budgets are in roundings of float32. A loss is conditioned by its margin, and a common offset rounds
the logits themselves: where that may happen the offsets are integers and the logits multiples of
1/8, so that every shifted logit is exact and only the loss's own arithmetic is judged.
"""

from functools import cache, partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms import FORMS, SCHEDULES, WHOLE
from hypothesis import given
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracle.budget import EPS, assert_within, margins, relative_budget
from oracle.programs import jit_quickly
from oracle.truth import exact_gradient

import jaxloss

SHAPES = [(1, 1), (1, 5), (4, 5), (3, 17)]
OFFSETS = [0.0, 1.0, -1000.0, 4096.0]
ONE_LOSS = partial(jaxloss.cross_entropy, reduction="none")
VALUE = jax.jit(ONE_LOSS)
GRADIENT = jax.jit(jax.grad(lambda x, y: ONE_LOSS(x, y).sum()))
TWO_STEPS = jax.jit(lambda x, y: jaxloss.nll_loss(jaxloss.log_softmax(x), y, reduction="none"))
OF_ROWS = jax.jit(jax.vmap(ONE_LOSS)), jax.jit(jax.vmap(jax.grad(ONE_LOSS)))


@st.composite
def rows(draw):
    """Logits, class indices, and a permutation's seed."""
    n, c = draw(st.sampled_from(SHAPES))
    entry = st.integers(-8 * 60, 8 * 60) | st.sampled_from([0, 1, -800, 800])
    x = [draw(st.lists(entry, min_size=c, max_size=c)) for _ in range(n)]
    y = draw(st.lists(st.integers(0, c - 1), min_size=n, max_size=n))
    return np.array(x, np.float32) / 8, np.array(y, np.int32)


def budget(x):
    return relative_budget(margins(x))


@given(rows(), st.sampled_from(OFFSETS))
def test_a_common_offset_changes_nothing(case, offset):
    x, y = case
    np.testing.assert_array_equal(VALUE(x + offset, y), VALUE(x, y))
    np.testing.assert_array_equal(GRADIENT(x + offset, y), GRADIENT(x, y))


@given(rows(), st.integers(0, 2**32 - 1))
def test_permuted_classes(case, seed):
    x, y = case
    order = np.random.default_rng(seed).permutation(x.shape[1])
    place = np.argsort(order)
    permuted, y_permuted = x[:, order], place[y].astype(np.int32)
    # Only the order of the sum differs: one rounding a term.
    close = x.shape[1] * EPS
    assert_within(VALUE(permuted, y_permuted), VALUE(x, y), close)
    assert_within(GRADIENT(permuted, y_permuted), np.asarray(GRADIENT(x, y))[:, order], close)


@given(rows(), st.integers(0, 2**32 - 1))
def test_permuted_tokens(case, seed):
    x, y = case
    order = np.random.default_rng(seed).permutation(x.shape[0])
    np.testing.assert_array_equal(VALUE(x[order], y[order]), np.asarray(VALUE(x, y))[order])


@given(rows())
def test_gradients_sum_to_nothing(case):
    x, y = case
    g = np.asarray(GRADIENT(x, y), np.float64)
    # Each entry within its budget, of entries that are half positive and half negative.
    allowed = budget(x) * 2 * np.abs(g).sum(-1) + np.finfo(np.float32).tiny
    assert np.all(np.abs(g.sum(-1)) <= allowed)


@given(rows())
def test_losses_are_not_negative_and_gradients_are_bounded(case):
    x, y = case
    assert np.all(np.asarray(VALUE(x, y)) >= 0)
    g = np.asarray(GRADIENT(x, y))
    label = np.take_along_axis(g, y[:, None], axis=1)
    assert np.all((label >= -1) & (label <= 0))
    assert np.all(np.delete(g.ravel(), np.arange(len(y)) * x.shape[1] + y) >= 0)


@given(rows())
def test_two_steps(case):
    x, y = case
    assert_within(TWO_STEPS(x, y), VALUE(x, y), 2 * budget(x))


@given(rows())
def test_one_hot_labels(case):
    x, y = case
    q = np.eye(x.shape[1], dtype=np.float32)[y]
    assert_within(VALUE(x, q), VALUE(x, y), 2 * budget(x))
    assert_within(GRADIENT(x, q), GRADIENT(x, y), 4 * budget(x)[:, None])


@given(rows())
def test_vmap_is_the_batch(case):
    x, y = case
    # The same sums in other loops: vector lanes may add in another order.
    close = x.shape[1] * EPS
    value, gradient = OF_ROWS
    assert_within(value(x, y), VALUE(x, y), close)
    assert_within(gradient(x, y), GRADIENT(x, y), close)


@pytest.mark.nan_is_meant
@given(rows(), st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=4, max_size=4))
def test_reductions(case, weights):
    x, y = case
    s = np.array(weights[: len(y)], np.float32)
    losses = np.asarray(VALUE(x, y), np.float64) * s
    few = len(y) * EPS
    total = jaxloss.cross_entropy(x, y, sample_weight=s, reduction="sum")
    assert_within(total, losses.sum(), 2 * few)
    mean = jaxloss.cross_entropy(x, y, sample_weight=s)
    with np.errstate(invalid="ignore"):
        assert_within(mean, losses.sum() / np.sum(s, dtype=np.float64), 4 * few)


@given(rows(), st.integers(1, 5))
def test_masked_classes_are_absent(case, removed):
    x, y = case
    more = np.concatenate([np.full((len(y), removed), 1e4, np.float32), x], axis=1)
    exists = np.arange(more.shape[1]) >= removed
    y_more = y + np.int32(removed)
    close = more.shape[1] * EPS
    losses = VALUE(more, y_more, where=exists[None])
    assert_within(losses, VALUE(x, y), close)
    more[:, :removed] = -np.inf
    assert_within(VALUE(more, y_more), VALUE(x, y), close)
    grad = np.asarray(GRADIENT(more, y_more))
    assert np.all(grad[:, :removed] == 0)
    assert_within(grad[:, removed:], GRADIENT(x, y), close)


@cache
def of_kernel(chunk, schedule):
    """The losses, undifferentiated, and the gradient of their sum."""

    def loss(kernel, labels):
        return jaxloss.linear_cross_entropy(
            jnp.eye(len(labels), dtype=kernel.dtype), kernel, labels, chunk_size=chunk,
            implementation=schedule, reduction="none", precision="highest",
        )  # fmt: skip

    return jit_quickly(lambda k, y: (loss(k, y), jax.grad(lambda k: loss(k, y).sum())(k)))


@given(
    rows(),
    st.sampled_from([1, 2, 3, 4, None]),
    st.sampled_from(SCHEDULES),
)
def test_linear_cross_entropy(case, chunk, schedule):
    """The identity as hidden states: the products are exact, the chunks must not show."""
    x, y = case
    losses, grad = of_kernel(chunk, schedule)(x, y)
    assert_within(losses, VALUE(x, y), 2 * budget(x))
    assert_within(grad, GRADIENT(x, y), 4 * budget(x)[:, None])


# What may not change a loss and its gradients: the schedule, chunks, devices, the order of tokens
# and of classes. Logits are exact (small integers times eighths), so that all there is to see is
# the rounding of sums in another order.

N, D, C = 8, 3, 12


@st.composite
def operands(draw):
    """hidden, kernel, labels (a few of them ignored), and an order of tokens and one of classes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    hidden = rng.integers(-3, 4, (N, D)).astype(np.float32)
    kernel = (rng.integers(-24, 25, (D, C)) / 8 * draw(st.sampled_from([0, 1, 8]))).astype(
        np.float32
    )
    y = rng.integers(0, C, N).astype(np.int32)
    y[rng.random(N) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -100
    return hidden, kernel, y, rng.permutation(N), rng.permutation(C)


def loss_of(form, chunk=None, **mesh):
    """``(hidden, kernel, labels) -> loss``."""
    return partial(form.of_product, chunk_size=chunk, reduction="sum", **mesh)


def on_a_mesh(form):
    """The tokens over two devices, the classes over three."""
    mesh = jax.make_mesh((2, 3), ("t", "v"), axis_types=(AxisType.Auto,) * 2)
    local = loss_of(form, 2, token_axis_name="t", vocab_axis_name="v")
    specs = P("t"), P(None, "v"), P("t")
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())


@cache
def step_of(form, chunk):
    loss = on_a_mesh(form) if chunk == "mesh" else loss_of(form, chunk)
    return jit_quickly(jax.value_and_grad(loss, (0, 1)))


# Hypothesis refuses the fixture `form`, which pytest makes once for all of its examples.
@pytest.mark.jax_leaks("jit(grad(shard_map))")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@given(operands())
def test_what_changes_nothing(form, case):
    h, k, y, tokens, classes = case
    value, (dh, dk) = step_of(form, None)(h, k, y)

    # Each slope is to its budget, and then one of the terms of a sum.
    counts, x = y >= 0, (h @ k).astype(np.float64)
    slopes = np.abs(np.where(counts[:, None], exact_gradient(x, np.maximum(y, 0)), 0))
    budget = 4 * relative_budget(margins(x).max()) + (N + C) * EPS
    of_h, of_k = slopes @ np.abs(k).T, np.abs(h).T @ slopes

    def same(other, token_order=slice(None), class_order=slice(None)):
        got, (of_hidden, of_kernel) = other
        assert_within(got, value, budget)
        for g, e, size in (
            (of_hidden, np.asarray(dh)[token_order], of_h[token_order]),
            (of_kernel, np.asarray(dk)[:, class_order], of_k[:, class_order]),
        ):
            error = np.abs(np.asarray(g, np.float64) - np.asarray(e, np.float64))
            assert np.all(error <= 2 * budget * size + N * np.finfo(np.float32).tiny)

    place = np.where(counts, np.argsort(classes)[np.maximum(y, 0)], -100).astype(np.int32)
    same(step_of(form, None)(h[tokens], k, y[tokens]), token_order=tokens)
    same(step_of(form, None)(h, k[:, classes], place), class_order=classes)
    for split in ["mesh"] if form is WHOLE else [1, 5, "mesh"]:
        same(step_of(form, split)(h, k, y))
    if form.schedule:
        same(step_of(WHOLE, None)(h, k, y))


def test_gradients_are_the_same_to_the_bit(form):
    """Run again, and compiled again: what an optimiser is given does not depend on the weather."""
    rng = np.random.default_rng(0)
    h, k = (rng.normal(size=s).astype(np.float32) for s in ((64, 8), (8, 300)))
    y = rng.integers(0, 300, 64).astype(np.int32)
    first, second = (jax.jit(jax.value_and_grad(loss_of(form, 32), (0, 1))) for _ in range(2))
    expected = jax.tree.leaves(first(h, k, y))
    same_program = first(h, k, y)
    jax.clear_caches()
    for again in (same_program, second(h, k, y)):
        for got, e in zip(jax.tree.leaves(again), expected, strict=True):
            np.testing.assert_array_equal(got, e)
