"""Trainers that report loss, z-loss and weight apart and divide by a normaliser of their own: T5X's
and MaxText's formulas, written here in NumPy's float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.budget import EPS

import jaxloss

B, T, V, D, Z = 4, 12, 20, 6, 1e-3


def batch():
    """Packed rows; token 0 is padding, and so is segment 0. Row 3 is all prompt."""
    rng = np.random.default_rng(0)
    targets = rng.integers(1, V, (B, T))
    lengths = [[5, 4], [12], [3, 3, 3], [7]]
    segments, positions = np.zeros((2, B, T), int)
    for row, each in enumerate(lengths):
        start = 0
        for i, n in enumerate(each):
            segments[row, start : start + n] = i + 1
            positions[row, start : start + n] = np.arange(n)
            start += n
    targets[segments == 0] = 0
    weights = np.where(segments != 0, rng.choice([0.0, 0.5, 1.0, 2.0], (B, T)), 0)
    weights[0, :5] = weights[3] = 0  # a segment that is all prompt too
    hidden, kernel = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    arrays = hidden.astype(np.float32), kernel.astype(np.float32)
    return arrays, targets.astype(np.int32), segments, positions, weights.astype(np.float32)


(HIDDEN, KERNEL), TARGETS, SEGMENTS, POSITIONS, WEIGHTS = batch()


def t5x_losses(logits, targets, label_smoothing):
    """(each token's loss with its z-loss, the z-loss), as ``compute_weighted_cross_entropy`` of
    ``t5x.losses`` has them before its weights."""
    on, off = 1 - label_smoothing, label_smoothing / (V - 1)
    constant = -(on * np.log(on) + (V - 1) * off * np.log(off + 1e-20))
    soft = np.where(np.arange(V) == targets[..., None], on, off)
    lse = np.log(np.sum(np.exp(logits), axis=-1))
    z_loss = Z * lse**2
    return -np.sum(soft * (logits - lse[..., None]), axis=-1) + z_loss - constant, z_loss


def t5x_normalizer(kind, targets, segments, weights):
    """(factor, weights): ``t5x.losses.get_loss_normalizing_factor_and_weights``."""
    weights = (targets > 0).astype(float) if weights is None else weights.astype(float)
    if kind == "NUM_REAL_TARGET_TOKENS":
        return weights.sum(), weights
    if kind == "NUM_TOTAL_TARGET_TOKENS":
        return targets.size, weights
    total = np.zeros(weights.shape)
    for row, ids in enumerate(segments):
        for i in np.unique(ids[ids != 0]):
            total[row, ids == i] = weights[row, ids == i].sum()
    with np.errstate(all="ignore"):
        weights = np.nan_to_num(weights / total, nan=0, posinf=0, neginf=0)
    return weights.sum(), weights


def as_t5x(hidden, kind, targets, segments, weights, label_smoothing, linear):
    """(loss, z-loss, weight), and what the guide says to write for each factor."""
    counts = {"ignore_index": 0, "sample_weight": weights}
    options = {"z_loss": Z, "label_smoothing": label_smoothing * V / (V - 1), "return_stats": True}
    reduction = {"reduction": "sum" if kind == "NUM_TOTAL_TARGET_TOKENS" else "mean"}
    if kind == "AVERAGE_PER_SEQUENCE":
        weights = jaxloss.sequence_weight(targets, segment_ids=segments, **counts)
        counts["sample_weight"] = weights
    if linear:
        call = partial(jaxloss.linear_cross_entropy, hidden, KERNEL, targets, chunk_size=5)
    else:
        call = partial(jaxloss.cross_entropy, jnp.einsum("btd,dv->btv", hidden, KERNEL), targets)
    e, summed = label_smoothing, reduction["reduction"] == "sum"
    constant = -((1 - e) * np.log(1 - e) + e * np.log(e / (V - 1))) if e else 0.0
    loss, stats = call(**counts, **options, **reduction, empty_mean=constant)
    weight = jaxloss.total_weight(targets, **counts)
    each = 1.0 if weights is None else weights
    z_loss = jnp.sum(each * stats.z_loss)
    loss -= constant * weight if summed else constant
    if summed:
        return loss / targets.size, z_loss / targets.size, weight
    return loss, z_loss / jnp.where(weight > 0, weight, 1), weight


KINDS = ["NUM_REAL_TARGET_TOKENS", "NUM_TOTAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE"]


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_t5x(kind, label_smoothing, weighted, linear):
    weights = WEIGHTS if weighted else None
    given = TARGETS, SEGMENTS, weights
    x = HIDDEN.astype(float) @ KERNEL.astype(float)
    factor, each = t5x_normalizer(kind, *given)
    losses, z_losses = t5x_losses(x, TARGETS, label_smoothing)
    expected = np.sum(each * losses) / factor, np.sum(each * z_losses) / factor, np.sum(each)
    found = as_t5x(HIDDEN, kind, *given, label_smoothing, linear)
    np.testing.assert_allclose(found, expected, rtol=16 * EPS)
    # The gradient, by that of the sum of these weights.
    soft = np.where(
        np.arange(V) == TARGETS[..., None], 1 - label_smoothing, label_smoothing / (V - 1)
    )
    lse = np.log(np.sum(np.exp(x), axis=-1, keepdims=True))
    slopes = (1 + 2 * Z * lse) * np.exp(x - lse) - soft
    of = jax.grad(lambda h: as_t5x(h, kind, *given, label_smoothing, linear)[0])
    want = (each[..., None] * slopes / factor) @ KERNEL.T.astype(float)
    np.testing.assert_allclose(of(HIDDEN), want, rtol=0, atol=32 * EPS * np.max(np.abs(want)))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_t5x_of_a_microbatch_that_is_all_prompt(kind, linear):
    """0 throughout; T5X divides by a sum of weights that is 0, where it has one."""
    given = TARGETS[3:], SEGMENTS[3:], WEIGHTS[3:]

    def loss(h):
        loss, *others = as_t5x(h, kind, *given, 0.1, linear)
        return loss, others

    (loss, others), slope = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(HIDDEN[3:]))
    assert [loss, *others] == [0, 0, 0]
    assert not np.any(slope)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("rows", [slice(0, 4), slice(3, 4)])
def test_maxtext(rows, linear):
    """``sum(x * (segmentation != 0)) / (sum(segmentation != 0) + EPS)``; row 3 has no target."""
    own, targets = HIDDEN[rows], TARGETS[rows]
    segmentation = np.where(np.arange(4)[rows, None] == 3, 0, SEGMENTS[rows])
    x, counts = own.astype(float) @ KERNEL.astype(float), segmentation != 0
    losses, z_losses = t5x_losses(x, targets, 0.0)
    expected = [np.sum(each * counts) / (np.sum(counts) + 1e-8) for each in (losses, z_losses)]

    def call(hidden):
        options = {"sample_weight": counts, "z_loss": Z, "empty_mean": 0.0, "return_stats": True}
        if linear:
            loss = partial(jaxloss.linear_cross_entropy, hidden, KERNEL, chunk_size=5)
        else:
            loss = partial(jaxloss.cross_entropy, jnp.einsum("btd,dv->btv", hidden, KERNEL))
        loss, stats = loss(targets, **options)
        return loss, jnp.sum(stats.z_loss) / max(float(np.sum(counts)), 1.0)

    (loss, z_loss), slope = jax.value_and_grad(call, has_aux=True)(jnp.asarray(own))
    np.testing.assert_allclose([loss, z_loss], expected, rtol=16 * EPS)
    assert np.all(np.isfinite(slope))
    assert np.any(slope) == np.any(counts)


@pytest.mark.parametrize("linear", [False, True])
def test_maxtext_of_accumulated_microbatches(linear):
    """The sums and weights of microbatches, one of which is all prompt, divided at the end."""
    counts = np.where(np.arange(4)[:, None] == 3, 0, SEGMENTS) != 0

    def total(kernel, hidden, targets, counts):
        options = {"sample_weight": counts, "z_loss": Z, "reduction": "sum", "return_stats": True}
        if linear:
            loss, stats = jaxloss.linear_cross_entropy(hidden, kernel, targets, **options)
        else:
            loss, stats = jaxloss.cross_entropy(hidden @ kernel, targets, **options)
        weight = jaxloss.total_weight(targets, sample_weight=counts)
        return loss, (jnp.sum(stats.z_loss), weight)

    def step(sums, microbatch):
        found = jax.value_and_grad(total, has_aux=True)(KERNEL, *microbatch)
        return jax.tree.map(jnp.add, sums, found), None

    like = jax.eval_shape(
        jax.value_and_grad(total, has_aux=True), KERNEL, HIDDEN[0], TARGETS[0], counts[0]
    )
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    ((loss, (z_loss, weight)), slope), _ = jax.lax.scan(step, zero, (HIDDEN, TARGETS, counts))
    x = HIDDEN.astype(float) @ KERNEL.astype(float)
    losses, z_losses = t5x_losses(x, TARGETS, 0.0)
    expected = np.sum(losses * counts), np.sum(z_losses * counts), np.sum(counts)
    np.testing.assert_allclose((loss, z_loss, weight), expected, rtol=16 * EPS)
    lse = np.log(np.sum(np.exp(x), axis=-1, keepdims=True))
    slopes = (1 + 2 * Z * lse) * np.exp(x - lse) - np.eye(V)[TARGETS]
    want = np.einsum("btd,btv->dv", HIDDEN.astype(float), slopes * counts[..., None])
    np.testing.assert_allclose(slope, want, rtol=0, atol=32 * EPS * np.max(np.abs(want)))
