"""What is promised of memory and of the compiled program."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers import moved_sizes
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxloss

DTYPES = [jnp.float32, jnp.bfloat16]
SHAPES = [(4096, 4096), (1024, 32000)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_residuals_are_the_logits_and_numbers_of_a_row(dtype, reduction):
    x, y = jnp.zeros((8, 100), dtype), jnp.zeros(8, jnp.int32)
    _, pullback = jax.vjp(lambda x: jaxloss.cross_entropy(x, y, reduction=reduction), x)
    large = [r for r in jax.tree.leaves(pullback) if r.size > 8]
    assert [(r.shape, r.dtype) for r in large] == [(x.shape, dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_residuals_of_log_softmax(dtype):
    x = jnp.zeros((8, 100), dtype)
    _, pullback = jax.vjp(jaxloss.log_softmax, x)
    large = [r for r in jax.tree.leaves(pullback) if r.size > 8]
    assert [(r.shape, r.dtype) for r in large] == [(x.shape, dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_residuals_of_probabilities(dtype):
    x = jnp.zeros((8, 100), dtype)
    _, pullback = jax.vjp(jaxloss.cross_entropy, x, x)
    large = [r for r in jax.tree.leaves(pullback) if r.size > 8]
    assert [(r.shape, r.dtype) for r in large] == [(x.shape, dtype)] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_temporary_memory(shape, dtype):
    args = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    for f in (jaxloss.cross_entropy, jax.value_and_grad(jaxloss.cross_entropy)):
        memory = jax.jit(f).lower(*args).compile().memory_analysis()
        assert memory.temp_size_in_bytes <= 32 * shape[0] + 2 * 2**20


def test_temporary_memory_on_one_device():
    """Where conversions are merged that several devices keep apart, and the broadcasts of numbers
    that several passes share are written out."""
    program = """
import jax, jax.numpy as jnp, jaxloss
from functools import partial
losses = [partial(jaxloss.cross_entropy, **options) for options in (
    {}, {"label_smoothing": 0.1}, {"logit_softcap": 30.0, "label_smoothing": 0.1, "z_loss": 0.1},
)]
losses.append(lambda x, y: -jaxloss.token_stats(x, y, temperature=0.7).log_prob.mean())
stats = [partial(jaxloss.token_stats, **options) for options in (
    {}, {"temperature": 0.7}, {"logit_softcap": 30.0},
)]
for dtype in (jnp.float32, jnp.bfloat16):
    args = jax.ShapeDtypeStruct((1024, 8000), dtype), jax.ShapeDtypeStruct((1024,), jnp.int32)
    for f in (*losses, *map(jax.value_and_grad, losses), *stats):
        held = jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes
        assert held <= 2**17, (dtype, f, held)  # float32 logits would be 31 MiB
"""
    environment = {**os.environ, "XLA_FLAGS": ""}
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, env=environment)


SPECS = [P("a"), P(None, "b"), P("a", "b"), P(None, ("a", "b"))]


# The dtypes take turns: each meets every kind of axes and every spec.
@pytest.mark.parametrize(
    ("spec", "dtype", "kind"),
    [
        (spec, DTYPES[(i + j) % 2], kind)
        for i, spec in enumerate(SPECS)
        for j, kind in enumerate([AxisType.Auto, AxisType.Explicit])
    ],
)
def test_sharded_logits_are_not_gathered(spec, dtype, kind):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)
    x = jax.ShapeDtypeStruct((64, 4096), dtype, sharding=NamedSharding(mesh, spec))
    y = jax.ShapeDtypeStruct((64,), jnp.int32, sharding=NamedSharding(mesh, P(*spec[:1])))
    step = jax.jit(jax.value_and_grad(jaxloss.cross_entropy))
    text = step.lower(x, y).compile().as_text()
    assert all(size <= 64 * 8 for size in moved_sizes(text))
