"""The training examples of benchmarks/examples: they run, and what they train learns."""

import importlib
import math

import jax
import numpy as np
import pytest


@pytest.fixture
def defaults():
    """An example's reader has those of JAX."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.enable_x64(False),
    ):
        yield


@pytest.mark.parametrize("library", ["nnx", "linen", "haiku", "equinox"])
def test_example(library, defaults):
    example = importlib.import_module(f"benchmarks.examples.with_{library}")
    results = example.main(steps=80)
    losses, accuracies = np.asarray(jax.device_get(results["digits"])).T
    assert abs(losses[0] - math.log(10)) < 0.3
    assert accuracies[0] < 0.3
    # With a smoothing of 0.1 no model has less than 0.5.
    assert 0.5 < losses[-1] < 1.0
    assert accuracies[-1] > 0.9

    # At first a guess over 256 bytes. The frequencies of single bytes say 3.1, and a model that
    # reads the bytes before goes below that; one far below, so early, has seen its labels.
    losses, accuracies = np.asarray(jax.device_get(results["Python"])).T
    assert abs(losses[0] - math.log(256)) < 0.3
    assert 2.0 < np.mean(losses[-5:]) < 3.1
    assert np.mean(accuracies[-5:]) > 0.2


@pytest.mark.filterwarnings("ignore:`with mesh:DeprecationWarning")
@pytest.mark.parametrize("trainer", ["linen", "nnx", "functions"])
def test_a_loss_put_in_the_place_of_another_on_a_mesh(trainer, defaults):
    """The same curve, in less memory."""
    sharded = importlib.import_module("benchmarks.examples.sharded")
    train, *losses = sharded.TRAINERS[trainer]
    batches = sharded.data.byte_pairs(12, sharded.V)
    (expected, before), (losses, after) = (train(loss, batches) for loss in losses)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert abs(losses[0] - math.log(sharded.V)) < 0.3
    assert losses[-1] < losses[0] - 0.5
    assert after < 0.8 * before


def test_grpo_raises_the_reward(defaults):
    grpo = importlib.import_module("benchmarks.examples.grpo")
    found = grpo.main(steps=40, prompts=32)
    first, last = (np.mean(found["reward"][few]) for few in (slice(5), slice(-5, None)))
    assert first < 0.3
    assert last > first + 0.2
    # The policy leaves the reference, and grows sure of its answers.
    assert found["kl"][0] < 0.1 < found["kl"][-1]
    assert found["entropy"][-1] < 0.7 * found["entropy"][0]


def test_grpo_keeps_the_log_probability_of_each_label_where_the_label_is(defaults):
    grpo = importlib.import_module("benchmarks.examples.grpo")
    model = grpo.policy(grpo.nnx.Rngs(0))
    key = jax.random.key(0)
    tokens, before = grpo.rollout(model, key, grpo.prompts_of(key, 16))
    labels = grpo.labels_of(tokens)
    stats = grpo.jaxloss.linear_token_stats(
        model(tokens), grpo.head_of(model), labels, vocab_axis=0
    )
    np.testing.assert_allclose(before, stats.log_prob, rtol=1e-5, atol=1e-6)
    assert np.array_equal(np.sum(labels >= 0, axis=1), [grpo.DIGITS] * 16)
    right = np.concatenate([tokens[:, :5], np.sort(tokens[:, :4], axis=1)], axis=1)
    assert np.array_equal(grpo.reward_of(right), np.ones(16))
    right[:, -1] = grpo.ASK
    assert np.array_equal(grpo.reward_of(right), np.zeros(16))


def test_a_student_learns_from_a_teachers_file(defaults, tmp_path, capsys):
    example = importlib.import_module("benchmarks.examples.distill_top_k")
    file = str(tmp_path / "labels.npz")
    example.main("teacher", file, "60")
    with np.load(file) as stored:
        assert stored["indices"].shape == stored["log_probs"].shape == (60, 16, 64, example.K)
    example.main("student", file)
    line = capsys.readouterr().out.splitlines()[-1]
    before, after = (float(word) for word in line.split() if word[0].isdigit())
    assert after < 0.5 * before
