"""Sums of squared probabilities, and a traced beta, over the devices of a mesh."""

from functools import cache

import jax
import jax.numpy as jnp
import pytest
from oracle.programs import jit_quickly

import jaxloss
from parallel.test_mesh import assert_close
from parallel.test_names import mesh_of, operands

pytestmark = pytest.mark.jax_leaks("jit(grad(shard_map))")
NAMES = {
    "tokens": {"token_axis_name": "d"},
    "columns": {"vocab_axis_name": "t"},
    "both": {"token_axis_name": "d", "vocab_axis_name": "t"},
}


def squares(schedule, **names):
    given, y = operands()

    def total(h, k):
        options = {"implementation": schedule, "chunk_size": 4 if "token" in schedule else 16}
        stats = jaxloss.linear_token_stats(h, k, y, **options, **names)
        weights = jnp.arange(1.0, 1 + y.size, dtype=jnp.float32).reshape(y.shape)
        return jnp.sum(weights * stats.sum_sq_probs), stats

    return jit_quickly(jax.value_and_grad(total, (0, 1), has_aux=True))(given["h"], given["k"])


@cache
def on_one_device(schedule):
    return squares(schedule)


@pytest.mark.parametrize("schedule", ["token_chunks", "vocab_blocks"])
@pytest.mark.parametrize("split", NAMES)
def test_squares(split, schedule):
    expected = on_one_device(schedule)
    with jax.set_mesh(mesh_of("automatic")):
        got = squares(schedule, **NAMES[split])
    assert_close(got, expected)


def own_loss(beta, **names):
    given, y = operands()

    def total(h, beta):
        loss = lambda stats, reference: reference.jensen_shannon + stats.sum_sq_probs  # noqa: E731
        options = {"reference": (given["g"], given["m"]), "beta": beta, "chunk_size": 4}
        return jaxloss.linear_stats_loss(loss, h, given["k"], y, **options, **names)

    return jit_quickly(jax.value_and_grad(total, (0, 1)))(given["h"], beta)


@pytest.mark.parametrize("kind", ["automatic", "explicit"])
def test_a_traced_beta(kind):
    expected = own_loss(jnp.float32(0.3))
    with jax.set_mesh(mesh_of(kind)):
        got = own_loss(jnp.float32(0.3), token_axis_name="d", vocab_axis_name="t")
    assert_close(got, expected)
