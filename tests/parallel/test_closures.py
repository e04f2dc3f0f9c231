"""Losses of the caller's own that close over arrays, on meshes whose axes are named or typed."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracle.programs import jit_quickly

import jaxloss
from parallel.test_mesh import assert_close
from parallel.test_names import mesh_of

pytestmark = pytest.mark.jax_leaks("jit(grad(shard_map))")
N, D, V, CHUNK = 32, 8, 24, 2


@cache
def operands():
    """hidden, kernel, labels, and a factor and a place for each class."""
    rng = np.random.default_rng(0)
    narrow = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    labels = rng.integers(0, V, N)
    labels[[2, *range(8, 16)]] = -100
    order = jnp.asarray(rng.permutation(V), jnp.int32)
    return narrow(N, D), narrow(D, V), jnp.asarray(labels, jnp.int32), narrow(V), order


def of_logits(h, k, y, factor, order, key, **options):
    def loss(x, y):
        noise = jax.random.uniform(key, (1, V))
        x = jnp.take(x * factor[None] + noise, order, axis=1)
        return jaxloss.cross_entropy(x, y, reduction="none") ** 2

    options = {"sample_weight": y >= 0, "chunk_size": CHUNK} | options
    return jaxloss.linear_loss(loss, h, k, y, **options)


def of_stats(h, k, y, factor, order, key, **options):
    def loss(stats, y):
        noise = jax.random.uniform(key, ())
        weight = jnp.take(factor, jnp.take(order, jnp.maximum(y, 0)))
        return noise * stats.entropy - weight * stats.log_prob

    return jaxloss.linear_stats_loss(loss, h, k, y, y, chunk_size=CHUNK, **options)


def jitted(function, *args):
    return jit_quickly(jax.value_and_grad(function, (0, 1, 3)))(*args)


def scanned(function, *args):
    """What is closed over is the state of a loop, and what the loop makes of it."""
    h, k, y, factor, order = args

    def summed(h, k, factor):
        def step(state, _):
            value = function(h, k, y, state, order)
            return state + value / 64, value

        last, values = jax.lax.scan(step, factor, length=2)
        return jnp.sum(values) + jnp.sum(last)

    return jit_quickly(jax.value_and_grad(summed, (0, 1, 2)))(h, k, factor)


def mapped(function, *args):
    """A batch of what is closed over alone."""
    h, k, y, factor, order = args
    batch = lambda factor: jnp.stack([factor, 2 * factor])  # noqa: E731

    def each(h, k, factor):
        values = jax.vmap(lambda f: function(h, k, y, f, order))(batch(factor))
        return jnp.sum(values * jnp.array([1.0, 0.5]))

    return jit_quickly(jax.value_and_grad(each, (0, 1, 2)))(h, k, factor)


def twice(function, *args):
    """The gradient of what is closed over, differentiated by the operands."""
    h, k, y, factor, order = args

    def inner(h, k):
        slope = jax.grad(lambda f: function(h, k, y, f, order))(factor)
        return jnp.sum(jnp.sin(slope))

    return jit_quickly(jax.grad(inner, (0, 1)))(h, k)


def eager(function, *args):
    return jax.grad(function, 3)(*args)


LOSSES = {"of_logits": of_logits, "of_stats": of_stats}
WAYS = {"jit": jitted, "scan": scanned, "vmap": mapped, "grad of grad": twice, "eager": eager}


def with_key(loss, **options):
    return lambda *args: loss(*args, jax.random.key(3), **options)


@cache
def expected(loss, way):
    return WAYS[way](with_key(LOSSES[loss]), *operands())


def placed(kind, spec, split_tokens=True):
    mesh = mesh_of(kind)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    h, k, y, *closed = operands()
    rows = P("d" if split_tokens else None)
    return place(h, rows), place(k, P()), place(y, rows), *(place(x, spec) for x in closed)


def in_every_way(test):
    return pytest.mark.parametrize("loss", LOSSES)(pytest.mark.parametrize("way", WAYS)(test))


@in_every_way
@pytest.mark.parametrize("spec", [P(), P("t"), P("d")], ids=str)
def test_arrays_of_an_automatic_mesh(spec, loss, way):
    """Held by all devices alike, or split over axes that are named or are not."""
    before = expected(loss, way)
    with jax.set_mesh(mesh_of("automatic")):
        function = with_key(LOSSES[loss], token_axis_name="d")
        got = WAYS[way](function, *placed("automatic", spec))
    assert_close(got, before)


@in_every_way
@pytest.mark.parametrize("spec", [P(), P("t")], ids=str)
def test_arrays_of_an_explicit_mesh_are_refused_where_it_splits_the_tokens(spec, loss, way):
    with jax.set_mesh(mesh_of("explicit")):
        text = r"loss: loss_fn must not close over arrays .*explicit mesh.*; got .*inside of jax.sh"
        with pytest.raises(ValueError, match=text):
            WAYS[way](with_key(LOSSES[loss]), *placed("explicit", spec))


@in_every_way
def test_arrays_of_an_explicit_mesh_that_splits_nothing(loss, way):
    before = expected(loss, way)
    with jax.set_mesh(mesh_of("explicit")):
        got = WAYS[way](with_key(LOSSES[loss]), *placed("explicit", P(), split_tokens=False))
    assert_close(got, before)


@in_every_way
@pytest.mark.parametrize("spec", [P(), P("t")], ids=str)
def test_the_way_out_of_that_refusal(spec, loss, way):
    def function(h, k, y, factor, order):
        local = lambda *args: LOSSES[loss](*args, token_axis_name="d")  # noqa: E731
        specs = P("d"), P(), P("d"), P(), P(), P()
        closed = jax.reshard((factor, order), P())
        mapped = jax.shard_map(local, in_specs=specs, out_specs=P())
        return mapped(h, k, y, *closed, jax.random.key(3))

    before = expected(loss, way)
    with jax.set_mesh(mesh_of("explicit")):
        got = WAYS[way](function, *placed("explicit", spec))
    assert_close(got, before)
