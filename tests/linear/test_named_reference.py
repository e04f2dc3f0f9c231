"""A reference of stored classes: divergences of k + 1 classes, by their formulas in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracle.programs import jit_quickly, products

import jaxloss

N, D, V, K = 24, 8, 40, 5
EPS = 2.0**-23
NAMES = ("forward_kl", "reverse_kl", "jensen_shannon", "entropy")


def arrays():
    rng = np.random.default_rng(0)
    f32 = partial(jnp.asarray, dtype=jnp.float32)
    h, k = f32(rng.normal(size=(N, D))), f32(rng.normal(size=(D, V)))
    labels = rng.integers(0, V, N)
    labels[[3, 9]] = -100
    indices = np.stack([rng.permutation(V)[:K] for _ in range(N)])
    indices[5, 2:] = -100  # a token of fewer classes
    q = rng.random((N, K))
    q *= rng.uniform(0.3, 0.95, (N, 1)) / q.sum(-1, keepdims=True)
    indices = jnp.asarray(indices, jnp.int32)
    return h, k, jnp.asarray(labels, jnp.int32), indices, f32(np.where(indices >= 0, q, 0))


H, KERNEL, LABELS, INDICES, Q = arrays()
STORED = jaxloss.TopKLabels(INDICES, Q, rest="bucket")


def parts(x, temperature=1.0):
    """``(log p, log q, exists)`` of k + 1 classes, from materialised logits."""
    log_p = jax.nn.log_softmax(x / temperature)
    taken = INDICES >= 0
    named = jnp.take_along_axis(log_p, jnp.maximum(INDICES, 0), axis=1)
    index = jnp.where(taken, INDICES, V)  # past the end: at none
    others = jnp.ones((N, V + 1), bool).at[jnp.arange(N)[:, None], index].set(False)[:, :V]
    rest = jax.nn.logsumexp(jnp.where(others, log_p, -jnp.inf), axis=-1)
    q = Q.astype(x.dtype)
    q = jnp.concatenate([q, 1 - q.sum(-1, keepdims=True)], axis=-1)
    exists = jnp.concatenate([taken, jnp.ones((N, 1), bool)], axis=-1)
    log_p = jnp.where(exists, jnp.concatenate([named, rest[:, None]], axis=-1), 0)
    return log_p, jnp.where(exists, jnp.log(jnp.where(exists, q, 1)), 0), exists


def formulas(x, beta=0.5, temperature=1.0):
    p, q, exists = parts(x, temperature)
    m = jnp.logaddexp(q + np.log(beta), p + np.log1p(-beta))
    kl = lambda u, v: jnp.sum(jnp.where(exists, jnp.exp(u) * (u - v), 0), axis=-1)  # noqa: E731
    found = {"forward_kl": kl(q, p), "reverse_kl": kl(p, q)}
    found["jensen_shannon"] = beta * kl(q, m) + (1 - beta) * kl(p, m)
    found["entropy"] = -jnp.sum(jnp.where(exists, jnp.exp(q) * q, 0), axis=-1)
    return {name: jnp.where(LABELS >= 0, v, 0) for name, v in found.items()}


def wide(*xs):
    return tuple(x.astype(jnp.float64) for x in xs)


def assert_close(found, true, factor=64):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(true), strict=True):
        x, y = np.asarray(x, float), np.asarray(y, float)
        np.testing.assert_allclose(x, y, rtol=factor * EPS, atol=factor * EPS * np.abs(y).max())


@pytest.mark.parametrize("chunk", [5, N])
def test_the_statistics(chunk):
    options = {"kl_temperature": 1.7, "beta": 0.3, "chunk_size": chunk}
    stats, found = jaxloss.linear_token_stats(H, KERNEL, LABELS, reference=STORED, **options)
    alone = jaxloss.linear_token_stats(H, KERNEL, LABELS, chunk_size=chunk)
    assert_close(stats, alone, 4)
    assert np.all(np.isnan(found.log_prob[LABELS >= 0]))
    with jax.enable_x64():
        h, k = wide(H, KERNEL)
        true = formulas(h @ k, beta=0.3, temperature=1.7)
        assert_close([getattr(found, name) for name in NAMES], [true[name] for name in NAMES])


def test_a_named_class_that_is_left_out():
    """Entropy and divergences are of one distribution: of what is left of the stored one."""
    exist = jnp.ones((N, V), bool).at[jnp.arange(N), INDICES[:, 1]].set(False)
    options = {"kl_temperature": 1.7, "where": exist}
    _, found = jaxloss.linear_token_stats(H, KERNEL, LABELS, reference=STORED, **options)
    q = np.concatenate([Q, 1 - Q.sum(-1, keepdims=True)], axis=-1).astype(float)
    q[:, 1] = 0
    q = q / q.sum(-1, keepdims=True)
    x = np.where(exist, np.float64(H) @ np.float64(KERNEL) / 1.7, -np.inf)
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    p = np.where(INDICES >= 0, np.take_along_axis(p, np.maximum(INDICES, 0), axis=1), 0)
    p = np.concatenate([p, 1 - p.sum(-1, keepdims=True)], axis=-1)
    some = lambda x: np.where(LABELS >= 0, np.where(q > 0, x, 0).sum(-1), 0)  # noqa: E731
    with np.errstate(divide="ignore", invalid="ignore"):
        np.testing.assert_allclose(found.entropy, some(-q * np.log(q)), rtol=1e-5)
        np.testing.assert_allclose(found.forward_kl, some(q * np.log(q / p)), rtol=1e-4)


@pytest.mark.parametrize("name", NAMES[:3])
def test_the_loss_and_every_mode(name):
    def loss(h, k):
        own = lambda stats, reference: getattr(reference, name) - 0.1 * stats.log_prob  # noqa: E731
        options = {"reference": STORED, "kl_temperature": 2.0, "chunk_size": 5}
        return jaxloss.linear_stats_loss(own, h, k, LABELS, **options)

    def plain(h, k):
        x = h @ k
        own = jnp.take_along_axis(jax.nn.log_softmax(x), jnp.maximum(LABELS, 0)[:, None], 1)[:, 0]
        own = jnp.where(LABELS >= 0, own, 0)
        total = jnp.sum(formulas(x, temperature=2.0)[name] - 0.1 * own)
        return total / jnp.sum(LABELS >= 0).astype(x.dtype)

    def along(f, *given):
        gradient = jax.grad(f, (0, 1))
        return f(*given), gradient(*given), jax.jvp(gradient, given, given)[1]

    found = jit_quickly(partial(along, loss))(H, KERNEL)
    with jax.enable_x64():
        assert_close(found, along(plain, *wide(H, KERNEL)), 256)


def test_it_has_no_product():
    odd = N - 1  # a chunk that has quarters is a program of several

    def loss(h, k):
        stored = jaxloss.TopKLabels(INDICES[:odd], Q[:odd], rest="bucket")
        own = lambda stats, reference: reference.reverse_kl - stats.log_prob  # noqa: E731
        options = {"reference": stored, "chunk_size": odd}
        return jaxloss.linear_stats_loss(own, h, k, LABELS[:odd], **options)

    assert products(loss, H[:odd], KERNEL) == 1
    assert products(jax.grad(loss, (0, 1)), H[:odd], KERNEL) == 3


def test_a_student_near_its_teacher():
    """To float32's rounding: as ``sum of q log(q / p)`` rounds, nothing would be left."""
    h = H * (1 + 2.0**-12)
    index, log_p = jaxloss.linear_top_k(H, KERNEL, K)
    stored = jaxloss.TopKLabels(index, jnp.exp(log_p), rest="bucket")
    _, found = jaxloss.linear_token_stats(h, KERNEL, LABELS, reference=stored)
    with jax.enable_x64():
        h, k = wide(h, KERNEL)
        q, p = (jax.nn.log_softmax(x @ k) for x in (H.astype(float), h))
        q, p = (jnp.take_along_axis(v, index, axis=1) for v in (q, p))
        # The stored numbers are rounded: their own error is what the divergence may be off by.
        q = jnp.log(jnp.exp(q).astype(jnp.float32).astype(float))
        q, p = (
            jnp.concatenate([v, jnp.log1p(-jnp.exp(v).sum(-1, keepdims=True))], -1) for v in (q, p)
        )
        true = jnp.where(LABELS >= 0, jnp.sum(jnp.exp(q) * (q - p), axis=-1), 0)
        np.testing.assert_allclose(found.forward_kl, true, rtol=0.02, atol=1e-10)
        assert np.max(true) < 1e-5


def test_a_class_that_neither_has_and_one_that_is_sure():
    stored = jaxloss.TopKLabels(
        INDICES[:, :2], jnp.tile(jnp.array([[1.0, 0.0]]), (N, 1)), rest="bucket"
    )
    loss = lambda s, r: r.forward_kl  # noqa: E731
    value, gradients = jax.value_and_grad(
        lambda h, k: jaxloss.linear_stats_loss(loss, h, k, LABELS, reference=stored), (0, 1)
    )(H, KERNEL)
    own = jnp.where(LABELS >= 0, INDICES[:, 0], -100)
    true = jax.value_and_grad(lambda h, k: jaxloss.linear_cross_entropy(h, k, own), (0, 1))(
        H, KERNEL
    )
    assert_close((value, gradients), true, 16)


def test_a_teacher_that_is_sure_leaves_room_for_the_others():
    """As the guide has it: in float32 its k classes sum to 1."""
    index, log_p = jaxloss.linear_top_k(9 * H, KERNEL, K)
    q = jnp.exp(log_p)
    sure = (LABELS >= 0) & (1 - q.sum(-1) <= 0)
    assert np.any(sure)

    def reverse(h, q):
        stored = jaxloss.TopKLabels(index, q, rest="bucket")
        return jaxloss.linear_token_stats(h, KERNEL, LABELS, reference=stored)[1].reverse_kl

    assert np.all(np.isinf(reverse(H, q)[sure]))
    room = q * (1 - 2.0**-20)
    assert np.all(np.isfinite(reverse(H, room)))
    assert np.all(np.isfinite(jax.grad(lambda h: jnp.sum(reverse(h, room)))(H)))


def test_log_probabilities_and_wrong_classes_are_nan():
    for labels in (
        jaxloss.TopKLabels(INDICES, jnp.log(jnp.maximum(Q, 1e-6)), rest="bucket"),
        jaxloss.TopKLabels(INDICES.at[:, 0].set(V), Q, rest="bucket"),
        jaxloss.TopKLabels(INDICES.at[:, 0].set(INDICES[:, 1]), Q, rest="bucket"),
    ):
        _, found = jaxloss.linear_token_stats(H, KERNEL, LABELS, reference=labels)
        named = (LABELS >= 0) & (INDICES[:, 1] >= 0)
        assert np.all(np.isnan(found.forward_kl[named]))
        assert np.all(np.asarray(found.forward_kl)[np.asarray(LABELS) < 0] == 0)


def test_log_probabilities_as_labels_are_nan():
    labels = jaxloss.TopKLabels(INDICES, jnp.log(jnp.maximum(Q, 1e-6)))
    assert np.all(np.isnan(jaxloss.cross_entropy(H @ KERNEL, labels, reduction="none")))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(axis_type):
    mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(axis_type,) * 2)

    def loss(h, k, indices, q, **names):
        stored = jaxloss.TopKLabels(indices, q, rest="bucket")
        own = lambda stats, reference: reference.jensen_shannon + stats.entropy  # noqa: E731
        options = {"reference": stored, "chunk_size": 2, **names}
        return jaxloss.linear_stats_loss(own, h, k, LABELS, **options)

    given = H, KERNEL, INDICES, Q
    alone = jit_quickly(jax.value_and_grad(loss, (0, 1)))(*given)
    names = {"token_axis_name": "d", "vocab_axis_name": "t", "kernel_spec": P(None, "t")}
    with jax.set_mesh(mesh):
        found = jit_quickly(jax.value_and_grad(partial(loss, **names), (0, 1)))(*given)
    assert_close(found, alone, 32)


@pytest.mark.parametrize("rest", ["drop", "uniform"])
def test_other_rests_are_refused(rest):
    labels = jaxloss.TopKLabels(INDICES, Q, rest=rest)
    with pytest.raises(ValueError, match="a reference of TopKLabels must have rest='bucket'"):
        jaxloss.linear_token_stats(H, KERNEL, LABELS, reference=labels)


def test_shapes_are_named():
    labels = jaxloss.TopKLabels(INDICES[1:], Q[1:], rest="bucket")
    with pytest.raises(ValueError, match=r"reference\.indices must be \[\.\.\., k\]"):
        jaxloss.linear_token_stats(H, KERNEL, LABELS, reference=labels)
