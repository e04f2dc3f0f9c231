"""Losses of pairs over 8 devices are those of one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle.programs import moved_sizes

import jaxloss

N, D, MORE, CHUNK = 32, 5, 16, 3  # of four pairs a device, in chunks of three and one
NAMES = ("a", "b")


def mesh_of(kind):
    return jax.make_mesh((4, 2), NAMES, axis_types=(kind,) * 2)


def operands(symmetric):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(n, D)) for n in (N, N if symmetric else N + MORE))
    return x, y, np.float64(1.3), np.float64(-0.7), rng.uniform(0, 2, N) * (rng.random(N) < 0.8)


def both(x, y, scale, bias, weight, *, symmetric, reduction, **options):
    """The two losses, told apart by a factor."""
    given = {"logit_scale": scale, "symmetric": symmetric, "sample_weight": weight}
    given |= {"reduction": reduction, "chunk_size": CHUNK, **options}
    clip = jaxloss.contrastive_loss(x, y, **given)
    return clip + 2 * jaxloss.sigmoid_contrastive_loss(x, y, logit_bias=bias, **given)


def masks(case, columns):
    rng = np.random.default_rng(1)
    if case == "pairs":
        return rng.random(N) < 0.7
    if case == "entries":
        return rng.random((N, columns)) < 0.7
    return None


CASES = [
    (True, "none", "mean"),
    (False, "none", "mean"),
    (True, "pairs", "none"),
    (True, "entries", "mean"),
    (False, "pairs", "sum"),
]


def measured(f, args, second=True):
    """The value, the gradients, and a product with the Hessian."""
    by, ct = tuple(range(5)), np.cos(np.arange(N))

    def total(*args):
        found = f(*args)
        return jnp.vdot(jnp.asarray(found), ct) if found.ndim else found

    def step(*args):
        value, grads = jax.value_and_grad(total, by)(*args)
        if not second:
            return value, grads
        along = tuple(jnp.ones_like(v) / 3 for v in args)
        return value, grads, jax.jvp(jax.grad(total, by), args, along)[1]

    return jax.device_get(jax.jit(step)(*args))


def close(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("symmetric", "mask", "reduction"), CASES)
def test_inside_of_shard_map(symmetric, mask, reduction):
    with jax.enable_x64(True):
        args = tuple(map(jnp.asarray, operands(symmetric)))
        columns = args[1].shape[0]
        where = masks(mask, columns)
        # A device's further rows stand behind those of its pairs.
        each = (np.arange(N).reshape(8, -1), np.arange(N, columns).reshape(8, -1))
        order = np.concatenate(each, axis=1).ravel()
        options = {"symmetric": symmetric, "reduction": reduction}
        expected = measured(partial(both, where=where, **options), args)
        rows, out = P(NAMES), P(NAMES) if reduction == "none" else P()

        @partial(
            jax.shard_map,
            mesh=mesh_of(AxisType.Auto),
            in_specs=(rows, rows, P(), P(), rows, rows),
            out_specs=out,
        )
        def local(*args):
            *args, where = args
            return both(*args, where=where, token_axis_name=NAMES, **options)

        def call(x, y, *rest):
            return local(x, y[order], *rest, where)

        close(measured(call, args), expected)


@pytest.mark.parametrize(("symmetric", "mask", "reduction"), CASES)
@pytest.mark.parametrize("kind", ["named", "named by mesh=", "explicit"])
def test_outside_of_shard_map(symmetric, mask, reduction, kind):
    with jax.enable_x64(True):
        args = tuple(map(jnp.asarray, operands(symmetric)))
        where = masks(mask, args[1].shape[0])
        options = {"symmetric": symmetric, "reduction": reduction, "where": where}
        expected = measured(partial(both, **options), args, second=False)
        mesh = mesh_of(AxisType.Explicit if kind == "explicit" else AxisType.Auto)
        if kind != "explicit":
            options["token_axis_name"] = NAMES if reduction == "mean" else P(NAMES)

        def gathered(*args):
            found = both(*args, **options)
            return jax.reshard(found, P(None)) if kind == "explicit" and found.ndim else found

        def on_mesh():
            split = P(NAMES)
            given = [jax.device_put(v, NamedSharding(mesh, split if v.ndim else P())) for v in args]
            return measured(gathered, given, second=False)

        if kind == "named by mesh=":
            options["mesh"] = mesh
            close(on_mesh(), expected)
        else:
            with jax.set_mesh(mesh):
                close(on_mesh(), expected)


def test_a_device_never_holds_all_rows():
    """What goes round the ring is a device's rows and what has been summed of them."""
    n, d = 8 * 256, 16
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    args = [jax.ShapeDtypeStruct((n, d), jnp.float32, sharding=NamedSharding(mesh, P("data")))] * 2

    def step(x, y):
        given = {"token_axis_name": "data", "mesh": mesh, "chunk_size": 64}
        clip = jaxloss.contrastive_loss(x, y, **given)
        return clip + jaxloss.sigmoid_contrastive_loss(x, y, **given)

    compiled = jax.jit(jax.value_and_grad(step, (0, 1))).lower(*args).compile()
    moved = moved_sizes(compiled.as_text())
    assert moved
    assert max(moved) <= n // 8 * d
    held = compiled.memory_analysis().temp_size_in_bytes
    assert held < 4 * (6 * 64 * n // 8 + 16 * n // 8 * d)


def test_pairs_of_one_device_each():
    with jax.enable_x64(True):
        x, y, scale, bias, weight = operands(True)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        args = x[:8], y[:8], scale, bias, weight[:8]
        options = {"symmetric": True, "reduction": "mean"}
        expected = both(*args, **options)
        got = both(*args, token_axis_name="data", mesh=mesh, **options)
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_what_does_not_fit_a_mesh():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jnp.ones((16, 4))
    loss = partial(jaxloss.contrastive_loss, token_axis_name="data")
    with pytest.raises(ValueError, match=r"axis 0 of x must divide among the 8 devices"):
        loss(x[:12], x[:12], mesh=mesh)
    with pytest.raises(ValueError, match=r"where must be \[N\] beside further rows of y"):
        loss(x[:8], x, symmetric=False, where=np.ones((8, 16), bool), mesh=mesh)

    def inside(x, y, specs):
        return jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P())(x, y)

    for specs, name in (((P("data"), P()), "y"), ((P(), P("data")), "x")):
        with pytest.raises(
            ValueError, match=f"{name} must be split over token_axis_name; got {name}"
        ):
            inside(x, x, specs)


def test_automatic_axes_without_names_are_warned_of():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jnp.ones((16, 4))
    with jax.set_mesh(mesh):
        with pytest.warns(UserWarning, match="contrastive_loss: of pairs .* Name the axes"):
            jaxloss.contrastive_loss(x, x, chunk_size=4)
        jaxloss.contrastive_loss(x, x)  # a single chunk is left to the partitioner
