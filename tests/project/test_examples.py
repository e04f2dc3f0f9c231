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
