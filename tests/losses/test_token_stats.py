"""token_stats and linear_token_stats, and the objectives that are built on them."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms import FORMS
from oracle.budget import EPS, assert_within, margins
from oracle.draw import hurting_logits
from oracle.programs import equations, jit_quickly, products
from oracle.truth import exact_gradient, reference

import jaxloss
from jaxloss import TokenStats

FLOATS = TokenStats._fields[:3]  # that have a derivative


def expected_rank(x, labels):
    """By falling logit and then by index, one token after another."""
    order = [np.lexsort((np.arange(row.size), -row)) for row in np.asarray(x, np.float64)]
    return [
        int(np.flatnonzero(o == y)[0]) if y >= 0 else -1 for o, y in zip(order, labels, strict=True)
    ]


def case(dtype=jnp.float32, n=9, c=13):
    rng = np.random.default_rng(2)
    x = hurting_logits(rng, (n, c))
    x[3] = 1.0  # all tie
    x[4, 5:8] = x[4].max() + 1  # the label is the second of three at the maximum
    labels = rng.integers(0, c, n)
    labels[1], labels[4] = -100, 6
    return jnp.asarray(x, dtype), jnp.asarray(labels, jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
def test_values(temperature, dtype):
    x, labels = case(dtype)
    got = jaxloss.token_stats(x, labels, temperature=temperature)
    scaled = np.asarray(x, np.longdouble) / temperature
    truth = reference(scaled, labels, reduction="none")
    relative = (margins(scaled).max() + 16) * 4 * EPS
    for name in FLOATS:
        assert_within(getattr(got, name), getattr(truth, name), relative, 1)
    counts = np.asarray(labels) != -100
    best = np.take_along_axis(scaled, np.maximum(truth.prediction, 0)[:, None], -1)[:, 0]
    confidence = np.where(counts, np.exp(best - truth.logsumexp), 0)
    assert_within(got.confidence, confidence, relative)
    np.testing.assert_array_equal(got.prediction, truth.prediction)
    np.testing.assert_array_equal(got.rank, expected_rank(x, np.asarray(labels)))
    assert got.rank[4] == 1


def test_ranks_of_impossible_classes():
    """They tie behind all others."""
    x = jnp.array([[-jnp.inf, 2.0, -jnp.inf, -jnp.inf, -3e38]])
    got = [int(jaxloss.token_stats(x, jnp.array([y])).rank[0]) for y in range(5)]
    assert got == [2, 0, 3, 4, 1]


@pytest.mark.nan_is_meant
def test_a_row_of_no_class_has_no_confidence():
    stats = jaxloss.token_stats(jnp.full((1, 4), -jnp.inf), jnp.array([1]))
    assert jnp.isnan(stats.confidence[0])
    assert stats.rank[0] == stats.prediction[0] == -1


def test_no_confidence_is_more_than_1():
    """The sum of exponentials is rounded below its largest: a cap rounds that in each pass."""
    x = jax.random.normal(jax.random.key(0), (2000, 10)).at[:, 0].set(60.0)
    options = {"temperature": 0.11, "logit_softcap": 7.0}
    assert jaxloss.token_stats(x, jnp.ones(2000, jnp.int32), **options).confidence.max() <= 1


def test_ranks_among_the_classes_that_exist():
    x, labels = case()
    exists = x < jnp.max(x, axis=-1, keepdims=True)
    exists |= jax.nn.one_hot(labels, 13, dtype=bool)
    got = jaxloss.token_stats(x, labels, where=exists).rank
    expected = expected_rank(jnp.where(exists, x, -jnp.inf), np.asarray(labels))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.nan_is_meant
def test_a_label_that_no_device_holds_has_no_rank():
    mesh = jax.make_mesh((2,), ("vocab",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.PartitionSpec(None, "vocab")
    x, labels = jnp.zeros((3, 8)), jnp.array([8, 5, -1])
    rank = jax.jit(
        jax.shard_map(
            lambda x: jaxloss.token_stats(x, labels, vocab_axis_name="vocab").rank,
            mesh=mesh,
            in_specs=split,
            out_specs=jax.sharding.PartitionSpec(),
        )
    )(x)
    np.testing.assert_array_equal(rank, [-1, 5, -1])


def split_over_two(x, labels, **options):
    mesh = jax.make_mesh((2,), ("vocab",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = jax.sharding.PartitionSpec(None, "vocab"), jax.sharding.PartitionSpec()
    f = partial(jaxloss.token_stats, vocab_axis_name="vocab", **options)
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=specs[1])(x, labels)


HOW = {name: form.token_stats for name, form in FORMS.items()} | {"split": split_over_two}


@pytest.mark.parametrize("temperature", [0.3, 1e-3])
@pytest.mark.parametrize("how", HOW)
def test_a_temperature_divides_what_is_left_of_an_offset(how, temperature):
    """The difference of two scaled logits has the rounding of each: of 10000 / T, however close
    they are."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(1e4 + np.round(rng.normal(size=(9, 12)) * 64) / 1024, jnp.float32)
    labels = jnp.asarray(rng.integers(0, 12, 9), jnp.int32)
    scaled = np.asarray(x, np.longdouble) / temperature
    truth = reference(scaled, np.asarray(labels), reduction="none")

    def f(x):
        return HOW[how](x, labels, temperature=temperature)

    got = jax.jit(f)(x)
    relative = (np.ptp(scaled, axis=-1).max() + 16) * 2 * EPS
    assert_within(got.log_prob, truth.log_prob, relative)
    assert_within(got.entropy, truth.entropy, relative, 1e-30)
    assert_within(got.logsumexp, truth.logsumexp, 2 * EPS)
    assert_within(got.confidence, np.exp(scaled.max(-1) - truth.logsumexp), relative)
    slope = jax.jit(jax.grad(lambda x: -jnp.sum(f(x).log_prob)))(x)
    slope = np.asarray(slope, np.longdouble) * temperature
    assert_within(slope, exact_gradient(scaled, np.asarray(labels)), 2 * relative)


@pytest.mark.parametrize("how", HOW)
def test_hardly_any_temperature(how):
    """The greedy choice, and no probability more than 1."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(9, 12)), jnp.float32)
    labels = jnp.argmax(x, axis=-1)
    got = jax.jit(partial(HOW[how], temperature=1e-8))(x, labels)
    np.testing.assert_array_equal(got.confidence, 1)
    np.testing.assert_array_equal((got.log_prob, got.entropy), 0)
    np.testing.assert_array_equal(got.prediction, labels)


@pytest.mark.parametrize("label", [None, 0, 3])
def test_second_derivatives_of_a_capped_entropy(label):
    """The maximum's own distance from it is 0, whose derivative is 1 all the same."""
    x = np.random.default_rng(4).normal(size=(512, 5)) * 3  # some of which round either way
    labels = jax.nn.softmax(x) if label is None else np.full(512, label)

    def entropy(x):
        return jnp.sum(jaxloss.token_stats(x, labels, logit_softcap=5.0).entropy)

    def plain(x):
        log_p = jax.nn.log_softmax(5 * jnp.tanh(x / 5))
        return -jnp.sum(jnp.exp(log_p) * log_p)

    def along(gradient, x):
        return jax.jvp(gradient, (x,), (jnp.cos(x),))[1]

    def across(gradient, x):
        return jax.vjp(gradient, x)[1](jnp.cos(x))[0]

    with jax.enable_x64(True):
        x, labels = jnp.asarray(x), jnp.asarray(labels)
        for outer in (along, across):
            got, expected = (jax.jit(partial(outer, jax.grad(f)))(x) for f in (entropy, plain))
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_of_a_temperature_and_a_cap():
    """The cap comes first."""
    x, labels = case()
    got = jaxloss.token_stats(x, labels, temperature=2.0, logit_softcap=3.0)
    expected = jaxloss.token_stats(3 * jnp.tanh(x / 3) / 2, labels)
    for name in FLOATS:
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_of_a_product(schedule, dtype):
    """Equal to those of the materialised logits; padding and masked classes are not counted."""
    rng = np.random.default_rng(0)
    h, k, b = (jnp.asarray(rng.normal(size=s), dtype) for s in ((9, 4), (4, 16), (16,)))
    labels = jnp.asarray(rng.integers(0, 13, 9).astype(np.int32)).at[2].set(-100)
    where = (
        jnp.asarray(rng.random((9, 13)) < 0.8).at[jnp.arange(9), jnp.maximum(labels, 0)].set(True)
    )
    options = {"temperature": 0.5, "where": jnp.asarray(where), "num_classes": 13}
    got = jaxloss.linear_token_stats(
        h, k, labels, bias=b, chunk_size=4, implementation=schedule, **options
    )
    x = jnp.dot(h, k, preferred_element_type=jnp.float32) + b.astype(jnp.float32)[None]
    options.pop("num_classes")
    expected = jaxloss.token_stats(x[:, :13], labels, **options)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6)


def test_it_is_what_the_loss_returns_beside():
    x, labels = case()
    _, beside = jaxloss.cross_entropy(x, labels, return_stats=True)
    for got, expected in zip(jaxloss.token_stats(x, labels), beside, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_products_and_memory_are_those_of_the_losses(schedule):
    n, d, v = 64, 4, 96
    h, k, labels = jnp.ones((n, d)), jnp.ones((d, v)), jnp.zeros(n, jnp.int32)

    def stats(h, k):
        s = jaxloss.linear_token_stats(h, k, labels, implementation=schedule, chunk_size=32)
        return jnp.sum(s.log_prob + s.entropy)

    def losses(h, k):
        return jnp.sum(
            jaxloss.linear_cross_entropy(
                h, k, labels, implementation=schedule, chunk_size=32, reduction="none"
            )
        )

    # The rank's sweep over blocks is there until the compiler sees that nobody reads it.
    of_rank = 2 if schedule == "vocab_blocks" else 0
    for f, g in ((stats, losses), (jax.grad(stats, (0, 1)), jax.grad(losses, (0, 1)))):
        assert products(f, h, k) == products(g, h, k) + of_rank
        text = [jit_quickly(s).lower(h, k).compile().as_text() for s in (f, g)]
        assert text[0].count(" dot(") == text[1].count(" dot(") > 0
    chunk = 32 * (v if schedule == "token_chunks" else n)
    sizes = [o.aval.size for e in equations(jax.grad(stats), h, k) for o in e.outvars]
    assert max(sizes) <= chunk

    def held(f):
        residuals = jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], h, k)
        return sorted(r.shape for r in jax.tree.leaves(residuals) if r.size > n)

    assert held(stats) == held(losses)
    assert (n, v) not in held(stats)


def test_no_statistic_takes_an_array_of_the_logits_size():
    """Each pass fuses. On one device: what splits over several is written for that."""
    program = """
import jax, jax.numpy as jnp, jaxloss
for dtype in (jnp.float32, jnp.bfloat16):
    args = jax.ShapeDtypeStruct((1024, 8000), dtype), jax.ShapeDtypeStruct((1024,), jnp.int32)
    for name in jaxloss.TokenStats._fields:
        f = jax.jit(lambda x, y: getattr(jaxloss.token_stats(x, y), name))
        held = f.lower(*args).compile().memory_analysis().temp_size_in_bytes
        assert held <= 2**20, (dtype, name, held)  # float32 logits would be 31 MiB
"""
    environment = {**os.environ, "XLA_FLAGS": ""}
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, env=environment)


# Policy gradients: GRPO's objective (Shao et al., "DeepSeekMath", 2024, equation 3), clipped as in
# PPO, with its estimate of the KL divergence from a reference policy and a bonus for entropy.


def clipped_objective(stats, old, of_reference, advantages, counts):
    ratio = jnp.exp(stats.log_prob - old)
    clipped = jnp.clip(ratio, 0.8, 1.2)
    gain = jnp.minimum(ratio * advantages, clipped * advantages)
    apart = of_reference - stats.log_prob
    gain -= 0.04 * (jnp.exp(apart) - apart - 1) - 0.01 * stats.entropy
    # The mean over each answer, then over the group.
    return -jnp.mean(
        jnp.sum(jnp.where(counts, gain, 0), axis=-1) / jnp.sum(counts, axis=-1, dtype=gain.dtype)
    )


def test_a_clipped_policy_objective(schedule):
    group, length, d, v, temperature = 4, 6, 5, 17, 0.7
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    hidden, kernel = draw(group, length, d), draw(d, v)
    old_kernel, reference_kernel = (kernel + 0.1 * draw(d, v) for _ in range(2))
    answers = jnp.asarray(rng.integers(0, v, (group, length)), jnp.int32)
    answers = answers.at[:, :2].set(-100).at[1, 4:].set(-100)  # the prompt, and padding
    counts = answers != -100
    reward = draw(group)
    advantages = ((reward - jnp.mean(reward)) / jnp.std(reward))[:, None]
    advantages = jnp.broadcast_to(advantages, answers.shape)

    def fused(hidden, kernel):
        stats = partial(
            jaxloss.linear_token_stats, temperature=temperature, implementation=schedule,
            chunk_size=8,
        )  # fmt: skip
        fixed = jax.lax.stop_gradient(hidden)
        old, of_reference = (
            stats(fixed, w, answers).log_prob for w in (old_kernel, reference_kernel)
        )
        return clipped_objective(
            stats(hidden, kernel, answers), old, of_reference, advantages, counts
        )

    def plain(hidden, kernel):
        def stats(hidden, kernel):
            log_p = jax.nn.log_softmax(hidden @ kernel / temperature)
            at = jnp.maximum(answers, 0)[..., None]
            log_prob = jnp.take_along_axis(log_p, at, axis=-1)[..., 0]
            entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
            return TokenStats(log_prob, *[None] * 1, entropy, *[None] * 5)

        fixed = jax.lax.stop_gradient(hidden)
        old, of_reference = (stats(fixed, w).log_prob for w in (old_kernel, reference_kernel))
        return clipped_objective(stats(hidden, kernel), old, of_reference, advantages, counts)

    got = jax.jit(jax.value_and_grad(fused, (0, 1)))(hidden, kernel)
    expected = jax.jit(jax.value_and_grad(plain, (0, 1)))(hidden, kernel)
    ratio = jnp.exp(
        jaxloss.linear_token_stats(hidden, kernel, answers, temperature=temperature).log_prob
        - jaxloss.linear_token_stats(hidden, old_kernel, answers, temperature=temperature).log_prob
    )
    outside = counts & ((ratio < 0.8) | (ratio > 1.2))
    assert 0 < int(jnp.sum(outside)) < int(jnp.sum(counts))  # both branches of the clip
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=2e-5, atol=1e-6)


def test_the_gradient_with_every_option_at_once():
    """Probabilities, the entropy, a mask and a scale: no pass is left out for another."""
    x, q = jnp.array([[1.0, 2.0, 9.0, -1.0]]), jnp.array([[0.25, 0.5, 0.0, 0.25]])
    exists = jnp.array([True, True, False, True])

    def ours(x):
        stats = jaxloss.token_stats(x, q, where=exists[None], logit_softcap=3.0, temperature=0.5)
        return jnp.sum(stats.log_prob + 2 * stats.entropy)

    def plain(x):
        log_p = jax.nn.log_softmax(3 * jnp.tanh(x[:, np.asarray(exists)] / 3) / 0.5)
        return jnp.sum((q[:, np.asarray(exists)] - 2 * jnp.exp(log_p)) * log_p)

    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(plain)(x), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("label", [0, 1, 2])
def test_the_entropy_of_two_that_tie(label):
    x = np.array([5.0, 5.0, 1.0])
    p = np.exp(x) / np.sum(np.exp(x))
    got = jaxloss.token_stats(jnp.asarray(x, jnp.float32), jnp.array(label)).entropy
    np.testing.assert_allclose(got, -np.sum(p * np.log(p)), rtol=1e-6)


def test_errors():
    x, labels = case()
    rule = r"temperature must be in \[1\.17549e-38, 8\.50706e\+37\]"
    for bad, kind, text in (
        (0.0, ValueError, rf"token_stats: {rule}; got 0\.0"),
        (np.inf, ValueError, f"{rule}; got inf"),
        (1e39, ValueError, rf"{rule}; got 1e\+39"),
        (1e-38, ValueError, f"{rule}; got 1e-38"),
        (np.nan, ValueError, f"{rule}; got nan"),
        ("1", TypeError, "temperature must be a number, or a real scalar array"),
    ):
        with pytest.raises(kind, match=text):
            jaxloss.token_stats(x, labels, temperature=bad)
        with pytest.raises(kind, match="linear_token_stats: temperature"):
            jaxloss.linear_token_stats(x, jnp.eye(13, dtype=x.dtype), labels, temperature=bad)
    rule = r"logit_softcap / temperature must be in \[0, 3\.40282e\+38\]; got 1e\+40"
    with pytest.raises(ValueError, match=f"token_stats: {rule}"):
        jaxloss.token_stats(x, labels, temperature=1e-10, logit_softcap=1e30)
    with pytest.raises(ValueError, match="token_stats: labels must have the shape of logits"):
        jaxloss.token_stats(x, labels[:4])
