"""Losses inside of ``shard_map`` over some of a mesh's axes, the others automatic or explicit."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxloss
from jaxloss import _device

pytestmark = pytest.mark.jax_leaks("jit(grad(shard_map))")
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


@pytest.fixture
def backend(request, monkeypatch):
    """Traced as on a device that has kernels."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    monkeypatch.setattr(_device, "is_hopper", lambda: request.param == "gpu")
    chip = SimpleNamespace(device_kind={"gpu": "NVIDIA H200", "tpu": "TPU v5 lite"}[request.param])
    monkeypatch.setattr(jax, "devices", lambda: [chip])
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


N, C = 2**14, 2**12
OF_LOGITS = (N, C), (N,)
LARGE = {
    "mean": (partial(jaxloss.cross_entropy, token_axis_name="d"), OF_LOGITS),
    "none": (partial(jaxloss.cross_entropy, reduction="none"), OF_LOGITS),
    "linear": (
        lambda h, y, k: jaxloss.linear_cross_entropy(h, k, y, token_axis_name="d"),
        ((N, 2**9), (N,), (2**9, C)),
    ),
}


@pytest.mark.parametrize(
    ("backend", "name"),
    [("gpu", "mean"), ("gpu", "none"), ("gpu", "linear"), ("tpu", "mean"), ("tpu", "linear")],
    indirect=["backend"],
)
@pytest.mark.parametrize("kind", list(KINDS))
def test_no_kernel_where_a_partitioner_may_still_split(backend, name, kind):
    """Along the axes that ``shard_map`` leaves out, of one device too: JAX refuses it there."""
    loss, shapes = LARGE[name]
    dtypes, specs = (jnp.bfloat16, jnp.int32, jnp.bfloat16), (P("d"), P("d"), P())

    def kernels(sizes, names):
        mesh = jax.sharding.AbstractMesh(sizes, ("d", "v"), axis_types=(KINDS[kind],) * 2)
        args = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
            for shape, dtype, spec in zip(shapes, dtypes, specs, strict=False)
        ]

        def local(*args):
            return loss(*args), jax.grad(lambda *a: jnp.sum(loss(*a)))(*args)

        out = (P("d") if name == "none" else P()), P("d")
        given = {"mesh": mesh, "axis_names": names, "in_specs": specs[: len(args)]}
        mapped = jax.shard_map(local, out_specs=out, **given)
        with jax.sharding.use_abstract_mesh(mesh):
            return "jaxloss_" in str(jax.make_jaxpr(mapped)(*args))

    assert kernels((2, 4), {"d", "v"})
    assert not kernels((2, 4), {"d"})
    assert not kernels((8, 1), {"d"})
