"""The training examples of benchmarks/examples: they run, and what they train learns."""

import importlib
import math

import jax
import numpy as np
import pytest


@pytest.mark.parametrize("library", ["nnx", "linen", "haiku", "equinox"])
def test_example(library):
    example = importlib.import_module(f"benchmarks.examples.with_{library}")
    # Its reader has JAX's defaults.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.enable_x64(False),
    ):
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
def test_a_loss_put_in_the_place_of_another_on_a_mesh(trainer):
    """The same curve, in less memory."""
    sharded = importlib.import_module("benchmarks.examples.sharded")
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.enable_x64(False),
    ):
        train, *losses = sharded.TRAINERS[trainer]
        batches = sharded.data.byte_pairs(12, sharded.V)
        (expected, before), (losses, after) = (train(loss, batches) for loss in losses)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert abs(losses[0] - math.log(sharded.V)) < 0.3
    assert losses[-1] < losses[0] - 0.5
    assert after < 0.8 * before
