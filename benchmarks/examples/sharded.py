"""A language model on eight devices, as three kinds of trainers shard it.

Flax Linen with logical rules under ``with mesh:``; Flax NNX on automatic axes, each matrix split
over the devices that share the tokens (FSDP); and plain functions on an explicit mesh. Each trains
twice: with optax's loss of materialised logits, and with jaxloss in its place.
"""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxloss
from benchmarks.examples import data

V, D, WIDE = 4096, 64, 256  # classes, features, features of the inner layer
SHAPE, AXES = (4, 2), ("data", "tensor")
SMALL, LECUN = nn.initializers.normal(0.02), nn.initializers.lecun_normal()
ADAM = optax.adam(3e-3)


def materialised(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    counts = labels >= 0
    each = optax.softmax_cross_entropy_with_integer_labels(
        hidden @ kernel, jnp.where(counts, labels, 0)
    )
    return jnp.sum(jnp.where(counts, each, 0)) / jnp.sum(counts)


def by_names(**names: Any) -> Callable:
    """What takes its place on automatic axes."""

    def loss(hidden, kernel, labels):
        return jaxloss.linear_cross_entropy(hidden, kernel, labels, chunk_size=64, **names)

    return loss


def mesh_of(kind: AxisType) -> Any:
    return jax.make_mesh(SHAPE, AXES, axis_types=(kind,) * 2)


def history(
    step: Callable, state: Any, batches: list[np.ndarray], place: Callable
) -> tuple[list[float], float]:
    """(the losses, MiB that a device holds for a step beside its arguments)."""
    program, losses = jax.jit(step), []
    plan = program.lower(state, place(batches[0])).compile().memory_analysis()
    for batch in batches:
        state, loss = program(state, place(batch))
        losses.append(float(loss))
    return losses, plan.temp_size_in_bytes / 2**20


# Flax Linen: names of axes in the model, and rules from these to the mesh.

RULES = (("batch", "data"), ("embed", "data"), ("mlp", "tensor"), ("vocab", "tensor"))


def logical(initializer: Callable, *names: str | None) -> Callable:
    return nn.with_logical_partitioning(initializer, names)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(V, D, embedding_init=logical(SMALL, None, "embed"))(tokens)
        x = jnp.concatenate([x, jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]], axis=-1)
        x = nn.gelu(nn.Dense(WIDE, kernel_init=logical(LECUN, "embed", "mlp"))(x))
        x = nn.Dense(D, kernel_init=logical(LECUN, "mlp", "embed"))(x)
        x = nn.with_logical_constraint(x, ("batch", None, None))
        return x, self.param("kernel", logical(SMALL, "embed", "vocab"), (D, V))


def with_linen(loss_fn: Callable, batches: list[np.ndarray]) -> tuple[list[float], float]:
    mesh, model = mesh_of(AxisType.Auto), Linen()
    with mesh, nn.logical_axis_rules(RULES):
        of_types = jax.eval_shape(model.init, jax.random.key(0), batches[0])
        specs = nn.logical_to_mesh_sharding(nn.get_partition_spec(of_types), mesh, RULES)
        params = jax.jit(model.init, out_shardings=specs)(jax.random.key(0), batches[0])

        def step(state, tokens):
            params, opt_state = state

            def loss(params):
                hidden, kernel = model.apply(params, tokens)
                return loss_fn(hidden, kernel, jaxloss.next_token_labels(tokens))

            value, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = ADAM.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), value

        place = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))  # noqa: E731
        return history(step, (params, jax.jit(ADAM.init)(params)), batches, place)


# Flax NNX: a model as it is, whose arrays are then split.


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(V, D, embedding_init=SMALL, rngs=rngs)
        self.inner, self.outer = (
            nnx.Linear(*sizes, rngs=rngs) for sizes in ((2 * D, WIDE), (WIDE, D))
        )
        self.head = nnx.Linear(D, V, use_bias=False, kernel_init=SMALL, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = jnp.concatenate([x, jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]], axis=-1)
        return self.outer(nnx.gelu(self.inner(x)))  # hidden: the head is the loss's


def with_nnx(loss_fn: Callable, batches: list[np.ndarray]) -> tuple[list[float], float]:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    graph, params = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param)

    def of_devices(x):
        return jax.device_put(x, NamedSharding(mesh, P("data" if x.ndim == 2 else None)))

    params = jax.tree.map(of_devices, params)

    def step(state, tokens):
        params, opt_state = state

        def loss(params):
            model = nnx.merge(graph, params)
            labels = jaxloss.next_token_labels(tokens)
            return loss_fn(model(tokens), model.head.kernel[...], labels)

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = ADAM.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), value

    with jax.set_mesh(mesh):
        place = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))  # noqa: E731
        return history(step, (params, jax.jit(ADAM.init)(params)), batches, place)


# Plain functions on an explicit mesh: the types say how everything is split.


def of_functions(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    x = params["embed"].at[tokens].get(out_sharding=P("data", None, None))
    x = jnp.concatenate([x, jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]], axis=-1)
    whole = {name: jax.reshard(params[name], P()) for name in ("inner", "outer")}
    return jax.nn.gelu(x @ whole["inner"]) @ whole["outer"]


def with_functions(loss_fn: Callable, batches: list[np.ndarray]) -> tuple[list[float], float]:
    mesh = mesh_of(AxisType.Explicit)
    sizes = {"embed": (V, D), "inner": (2 * D, WIDE), "outer": (WIDE, D), "kernel": (D, V)}
    specs = {"embed": P(), "inner": P("data"), "outer": P("data"), "kernel": P("data", "tensor")}
    keys = dict(zip(sizes, jax.random.split(jax.random.key(0), len(sizes)), strict=True))
    params = {
        name: (SMALL if name in ("embed", "kernel") else LECUN)(keys[name], size)
        for name, size in sizes.items()
    }

    def step(state, tokens):
        params, opt_state = state

        def loss(params):
            labels = jaxloss.next_token_labels(tokens)
            return loss_fn(of_functions(params, tokens), params["kernel"], labels)

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = ADAM.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), value

    with jax.set_mesh(mesh):
        params = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in params.items()}
        place = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))  # noqa: E731
        return history(step, (params, jax.jit(ADAM.init)(params)), batches, place)


def gathered(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """optax does not take logits whose classes an explicit mesh splits."""
    return materialised(hidden, jax.reshard(kernel, P()), labels)


# A trainer, its loss of materialised logits, and what takes its place.
TRAINERS = {
    "linen": (
        with_linen,
        materialised,
        by_names(token_axis_name="data", kernel_spec=P("data", "tensor")),
    ),
    "nnx": (with_nnx, materialised, by_names(token_axis_name="data", kernel_spec=P("data"))),
    "functions": (with_functions, gathered, by_names()),  # types say it
}


def main(steps: int = 40) -> dict[str, dict[str, tuple[list[float], float]]]:
    batches = data.byte_pairs(steps, V)
    return {
        name: {"optax": train(before, batches), "jaxloss": train(fused, batches)}
        for name, (train, before, fused) in TRAINERS.items()
    }


def lines(results: dict[str, dict[str, tuple[list[float], float]]]) -> Iterator[str]:
    for name, of_losses in results.items():
        for loss, (losses, mib) in of_losses.items():
            curve = f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
            yield f"{name}, {loss}: {curve}, {mib:.1f} MiB a device"


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    print(*lines(main()), sep="\n")
