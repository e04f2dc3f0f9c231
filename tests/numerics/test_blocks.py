"""Rows a block at a time: nothing but the time and the memory may depend on the blocks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.programs import jit_quickly

import jaxloss
from jaxloss._linear import budget
from jaxloss._numerics import divergence
from jaxloss._numerics.divergence import row_divergences
from jaxloss._xla import blocks

B, L, C = 3, 5, 7  # 15 rows in blocks of 4: the last two share a row
MASKS = {
    "no mask": None,
    "one mask": (1, 1),
    "a mask a row": (B, L),
    "a mask a sequence": (B, 1),
}


@pytest.fixture(autouse=True)
def wide():
    """Nothing but the order of a row's sums differs, which XLA chooses for each shape."""
    with jax.enable_x64():
        yield


def operands(mask, temperature):
    rng = np.random.default_rng(0)
    x, t = (jnp.asarray(rng.normal(size=(B, L, C)) * 3, jnp.float64) for _ in range(2))
    lead, mask = MASKS[mask], None
    if lead is not None:
        mask = jnp.asarray(rng.uniform(size=(*lead, C)) < 0.7).at[..., 0].set(True)
    valid = jnp.asarray(rng.uniform(size=(B, L)) < 0.8)
    own = {"all": jnp.float64(1.5), "own": jnp.asarray(1 + rng.uniform(size=(B, L)), jnp.float64)}
    return x, t, mask, valid, own.get(temperature, 2.0)


def modes(function, *given):
    """Values, gradients, tangents, and both of gradients."""

    def total(*xs):
        return jnp.sum(jnp.sin(function(*xs)))

    every = tuple(range(len(given)))
    gradients = jax.grad(total, every)
    along = jax.tree.map(jnp.cos, given)
    return {
        "value": function(*given),
        "reverse": gradients(*given),
        "forward": jax.jvp(total, given, along)[1],
        "forward of reverse": jax.jvp(gradients, given, along)[1],
        "reverse of reverse": jax.grad(
            lambda *xs: sum(jnp.sum(g**2) for g in gradients(*xs)), every
        )(*given),
    }


@pytest.mark.skipif(not blocks.DIFFERENTIABLE, reason="JAX before 0.12 takes all rows at once")
@pytest.mark.parametrize(
    ("mask", "temperature"),
    list(zip(MASKS, ["number", "all", "own", "number"], strict=True)),
    ids=str,
)
@pytest.mark.parametrize("kind", ["reverse", "jensen_shannon"])
def test_divergences_of_rows_in_blocks(monkeypatch, kind, mask, temperature):
    x, t, mask, valid, temperature = operands(mask, temperature)
    traced = isinstance(temperature, jax.Array)

    def function(x, t, beta, *own):
        numbers = {"beta": beta, "temperature": own[0] if own else temperature}
        return row_divergences(x, t, mask, valid, divergence=kind, **numbers)

    given = x, t, jnp.float64(0.3), *((temperature,) if traced else ())
    # Two functions: jit remembers what it compiled for one.
    expected = jit_quickly(lambda *xs: modes(function, *xs))(*given)
    monkeypatch.setattr(divergence, "rows_of_a_block", lambda columns: 4)
    assert "scan" in str(jax.make_jaxpr(function)(*given))
    found = jit_quickly(lambda *xs: modes(function, *xs))(*given)
    for name in expected:
        pairs = zip(jax.tree.leaves(found[name]), jax.tree.leaves(expected[name]), strict=True)
        for got, want in pairs:
            np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12, err_msg=name)


def test_rows_in_blocks_under_vmap(monkeypatch):
    x, t, *_ = operands("no mask", "number")
    function = partial(row_divergences, divergence="forward", beta=0.5, temperature=1.0)
    expected = function(x, t)
    monkeypatch.setattr(divergence, "rows_of_a_block", lambda columns: 2)
    np.testing.assert_allclose(jax.vmap(function)(x, t), expected, rtol=1e-13)
    np.testing.assert_allclose(jax.vmap(function, (1, 1), 1)(x, t), expected, rtol=1e-13)


def test_a_block_is_a_mebibyte_of_one_cpu_device(monkeypatch):
    assert blocks.rows_of_a_block(1000) is None  # of eight devices a partitioner may split rows
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert [blocks.rows_of_a_block(n) for n in (1, 1000, 32000, 2**20)] == [2**18, 256, 8, 1]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert blocks.rows_of_a_block(1000) is None


def test_a_token_of_a_chunk_has_the_same_bits_in_every_block(monkeypatch):
    """The last of 13 tokens stands in a block that ends with them."""
    monkeypatch.setattr(budget, "block_of_rows", lambda *_: 4)
    rng = np.random.default_rng(0)
    n, d, v = 13, 16, 50257
    h, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((n, d), (d, v)))
    y, order = jnp.asarray(rng.integers(0, v, n), jnp.int32), rng.permutation(n)

    @jax.jit
    def stats(h, y):
        found = jaxloss.linear_token_stats(h, w, y, reference=(h + 0.1, w), chunk_size=n)
        return jax.tree.leaves(found)

    for here, moved in zip(stats(h, y), stats(h[order], y[order]), strict=True):
        np.testing.assert_array_equal(np.asarray(here)[order], moved)
