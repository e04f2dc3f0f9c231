"""What is the same bit for bit: a token's numbers, whatever stands beside it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxloss

N, D, V, CHUNK = 256, 48, 640, 32
FLOATS = ("log_prob", "logsumexp", "entropy", "confidence")


def arrays(dtype, seed=0):
    rng = np.random.default_rng(seed)
    h = jnp.asarray(rng.normal(size=(N, D)), dtype)
    return h, jnp.asarray(rng.normal(size=(D, V)) / 4, dtype), rng.integers(0, V, N)


@pytest.fixture
def stats(schedule):
    """The statistics of each token, stacked, as unsigned integers."""
    options = {"implementation": schedule, "chunk_size": CHUNK}
    compiled = jax.jit(partial(jaxloss.linear_token_stats, **options))

    def of(h, k, y, compute=compiled):
        found = compute(h, k, jnp.asarray(y, jnp.int32))
        found = [np.asarray(getattr(found, name)).view(np.uint32) for name in FLOATS]
        return np.stack([*found, np.asarray(found[0] * 0) + np.asarray(compute(h, k, y).rank)])

    of.options = options
    return of


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_other_tokens_change_nothing(stats, dtype):
    h, k, y = arrays(dtype)
    alone = stats(h, k, y)
    order = np.random.default_rng(1).permutation(N)
    np.testing.assert_array_equal(stats(h[order], k, y[order]), alone[:, order])
    other, _, labels = arrays(dtype, seed=2)
    odd = np.arange(N) % 2 == 1
    mixed = stats(jnp.where(odd[:, None], h, other), k, np.where(odd, y, labels))
    np.testing.assert_array_equal(mixed[:, odd], alone[:, odd])
    # Tokens that are ignored are left out: the others move into other chunks, of a quarter too.
    few = np.arange(N) % 4 == 0
    np.testing.assert_array_equal(stats(h, k, np.where(few, y, -100))[:, few], alone[:, few])
    # Padding.
    more = jnp.concatenate([h, jnp.full_like(h, jnp.nan)])
    padded = stats(more, k, np.concatenate([y, np.full(N, -100)]))
    np.testing.assert_array_equal(padded[:, :N], alone)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("schedule", ["token_chunks"])
def test_devices_change_nothing(stats, dtype):
    """By token chunks: a block's product is of all tokens of a device."""
    h, k, y = arrays(dtype)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    over = partial(jaxloss.linear_token_stats, **stats.options)
    over = jax.jit(jax.shard_map(over, mesh=mesh, in_specs=(P("d"), P(), P("d")), out_specs=P("d")))
    np.testing.assert_array_equal(stats(h, k, y, over), stats(h, k, y))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_value_beside_its_gradients_and_two_runs(stats, dtype):
    """By token chunks XLA:CPU rounds one token in some hundreds otherwise beside gradients."""
    h, k, y = arrays(dtype)

    def loss(h, k):
        found = jaxloss.linear_token_stats(h, k, jnp.asarray(y, jnp.int32), **stats.options)
        return jnp.sum(found.log_prob + found.entropy), found

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    first, again = step(h, k), step(h, k)
    for x, z in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(z))
    beside = first[0][1]
    beside, alone = stats(h, k, y, lambda *_: beside), stats(h, k, y)
    if stats.options["implementation"] == "vocab_blocks":
        np.testing.assert_array_equal(beside, alone)
    else:
        floats = (x[: len(FLOATS)].view(np.float32) for x in (beside, alone))
        np.testing.assert_allclose(*floats, rtol=2.0**-20)
