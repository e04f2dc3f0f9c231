"""The linear loss on ever larger meshes, by compilation.

Value and both gradients, compiled for one host of as many devices, and never run: one device's
memory plan, and what it sends. In float32, because XLA:CPU widens bfloat16 and would say the same.
The bytes sent are on paper, of ring algorithms; the compiled program's collectives must be those
that they are counted from.
"""

import argparse
import os
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxloss
from benchmarks.harness import report
from benchmarks.harness.measure import MIB

N, D, V = 4096, 4096, 131072  # N tokens a data shard
VOCAB = 8  # devices that the vocabulary is split over
COMPILED = (8, 16, 64, 256, 1024, 2048)
ON_PAPER = (4096,)  # XLA makes at most 2048 devices of one host


def on_paper(devices: int) -> dict[str, Any]:
    """Elements of each large collective's result, and the bytes that a device sends."""
    data, columns = devices // VOCAB, V // VOCAB
    results = {
        "all-gather": D * columns,  # the kernel's columns; of a group of one device where data is 1
        "all-reduce": N * D,  # d_hidden, over the vocabulary
        "reduce-scatter": D * columns // data,  # d_kernel
    }
    around = (data - 1) / data * 4 * D * columns  # the kernel in, its gradient out
    reduced = 2 * (VOCAB - 1) / VOCAB * 4
    return {
        "results": results,
        "arguments": 4 * (N * D + D * columns // data + N),
        "kernel": around,
        "d_kernel": around,
        "d_hidden": reduced * N * D,
        "rows": reduced * 4 * N,  # a maximum and three sums a token
    }


def compiled(devices: int) -> dict[str, Any]:
    grid = np.array(jax.devices()[:devices]).reshape(-1, VOCAB)
    mesh = Mesh(grid, ("data", "vocab"), axis_types=(AxisType.Explicit,) * 2)

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    tokens = N * len(grid)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(jax.value_and_grad(jaxloss.linear_cross_entropy, (0, 1))).lower(
            array((tokens, D), jnp.float32, "data"),
            array((D, V), jnp.float32, "data", "vocab"),
            array((tokens,), jnp.int32, "data"),
        )
    program = lowered.compile()
    found = re.findall(
        r"= \(?f32\[([\d,]+)\]\S* (all-reduce|all-gather|reduce-scatter)\(", program.as_text()
    )
    sizes = [(kind, int(np.prod([int(n) for n in dims.split(",")]))) for dims, kind in found]
    memory = program.memory_analysis()
    return {
        "results": dict(sorted((kind, size) for kind, size in sizes if size > 16 * N)),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "large": sum(Counter(kind for kind, size in sizes if size > 16 * N).values()),
    }


def prepare(args: argparse.Namespace) -> None:
    jax.config.update("jax_platforms", "cpu")
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={max(COMPILED)}"


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    rows = []
    for devices, each in report.shares(tick, (*COMPILED, *ON_PAPER)):
        each(0, f"{devices} devices")
        paper = on_paper(devices)
        row = {"devices": devices, **paper, "temporaries": None}
        if devices in COMPILED:
            program = compiled(devices)
            large = program.pop("large")
            expected = {k: paper[k] for k in ("results", "arguments")}
            if large != len(paper["results"]) or any(program[k] != expected[k] for k in expected):
                raise ValueError(f"{devices} devices: compiled {program}, on paper {expected}.")
            row["temporaries"] = program["temporaries"]
        rows.append(row)
    return {"rows": rows}


def tables(data: dict[str, Any]) -> list[report.Table]:
    def mib(x):
        return "-" if x is None else f"{x / MIB:.0f}" if x > MIB else f"{x / MIB:.2f}"

    names = ("arguments", "temporaries", "kernel", "d_kernel", "d_hidden", "rows")
    rows = [
        [
            str(row["devices"]),
            f"{row['devices'] // VOCAB} x {VOCAB}",
            *(mib(row[name]) if row[name] != 0 else "0" for name in names),
        ]
        for row in data["rows"]
    ]
    header = [
        "de-\nvices", "data x\nvocab", "argu-\nments", "tempo-\nraries", "kernel\ngathered",
        "d_kernel\nscattered", "d_hidden\nsummed", "row\nstates",
    ]  # fmt: skip
    title = (
        "MiB that a device holds and sends for value and gradients of the linear loss"
        f" (float32, D {D}, V {V}, {N} tokens a data shard; '-': not compiled)"
    )
    return [report.Table(title, header, rows)]
