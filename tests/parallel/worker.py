"""One of several processes that train on a mesh across all of them: run by test_processes.py.

``python worker.py RANK COUNT PORT STEPS``: prints the losses of each step and the sums of the
trained parameters.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxloss

N, D, V = 32, 16, 64
DATA, VOCAB = 4, 2


def mesh_of_all():
    """Neighbours along either axis are devices of different processes."""
    devices = jax.devices()
    owned = [[d for d in devices if d.process_index == p] for p in range(jax.process_count())]
    grid = [[owned[(i + j) % len(owned)].pop(0) for j in range(VOCAB)] for i in range(DATA)]
    return Mesh(np.array(grid), ("data", "vocab"), axis_types=(AxisType.Explicit,) * 2)


def main(rank, count, port, steps):
    if count > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            count,
            rank,
            heartbeat_timeout_seconds=10,
            initialization_timeout=60,
        )
    mesh = mesh_of_all()
    rng = np.random.default_rng(0)

    def put(x, *spec):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P(*spec)), lambda i: x[i])

    params = {
        "dense": put(rng.normal(size=(D, D)).astype(np.float32) / 4),
        "kernel": put(rng.normal(size=(D, V)).astype(np.float32) / 4, "data", "vocab"),
    }
    x = put(rng.normal(size=(N, D)).astype(np.float32), "data")
    labels = rng.integers(0, V, N)
    labels[1:9] = -100  # the processes hold different numbers of tokens that count
    labels = put(labels.astype(np.int32), "data")

    @jax.jit
    def step(params, x, labels):
        def loss(params):
            hidden = jnp.tanh(x @ params["dense"])
            return jaxloss.linear_cross_entropy(hidden, params["kernel"], labels, chunk_size=4)

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - g, params, grads)

    losses = []
    with jax.set_mesh(mesh):
        for _ in range(steps):
            loss, params = step(params, x, labels)
            losses.append(float(loss))
        sums = jax.jit(lambda p: jax.tree.map(lambda x: jnp.sum(jnp.sin(x)), p))(params)
    if rank == 0:
        print(json.dumps({"losses": losses, "sums": jax.tree.map(float, sums)}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
