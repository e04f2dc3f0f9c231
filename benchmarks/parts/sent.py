"""What the devices of a mesh send for the linear loss, as the TPU compiler makes it.

Value and both gradients, compiled for eight chips that are not there, and never run: with the names
of the mesh's axes, and without them, where the context says what the mesh is. The bytes are those
of rings on paper; in loops a collective counts as often as its loop runs where every label counts.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxloss
from benchmarks.harness import hlo, report
from benchmarks.harness.measure import MIB
from benchmarks.parts.automatic import LAYOUTS
from benchmarks.parts.tpu import chunk_loops, quiet

PACKAGES = ("libtpu",)
B, L, D, V, CHUNK = 8, 4096, 4096, 131072, 4096
TOPOLOGY = "v5e:2x4"


def prepare(args: argparse.Namespace) -> None:
    quiet()
    warnings.simplefilter("ignore")


def compiled(name: str, named: bool) -> dict[str, Any]:
    sizes, of_hidden, of_kernel, asked = LAYOUTS[name]
    chips = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    grid = np.array(chips).reshape(tuple(sizes.values()))
    mesh = Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    shapes = ((B, L, D), jnp.bfloat16), ((D, V), jnp.bfloat16), ((B, L), jnp.int32)
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (shape, dtype), spec in zip(shapes, (of_hidden, of_kernel, of_hidden), strict=True)
    ]
    tokens, chunk = B * L, CHUNK
    if named:
        own = [n for e in of_hidden for n in (e if isinstance(e, tuple) else (e,)) if n]
        devices = int(np.prod([sizes[n] for n in own], initial=1))
        tokens, chunk = tokens // devices, CHUNK // devices
    # Where a partitioner decides, there is one loop.
    steps = chunk_loops(tokens, chunk) if named else [tokens // chunk]
    asked_chunk = chunk if named else CHUNK
    options: dict[str, Any] = {"implementation": "token_chunks", "chunk_size": asked_chunk}
    options |= {"mesh": mesh, **asked} if named else {}
    loss = jax.value_and_grad(partial(jaxloss.linear_cross_entropy, **options), (0, 1))
    jax.clear_caches()  # what is traced goes by the chip
    with (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),  # as jax.set_mesh, of chips not here
        mock.patch.object(jax, "default_backend", return_value="tpu"),
        mock.patch.object(jax, "devices", return_value=list(chips)),
        mock.patch.object(jax, "device_count", return_value=len(chips)),
    ):
        program = jax.jit(loss).lower(*args).compile()
    return {
        "sent": hlo.sent(program.as_text(), steps),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        "d_hidden": str(program.output_shardings[1][0].spec),
        "d_kernel": str(program.output_shardings[1][1].spec),
    }


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    rows = []
    for name, each in report.shares(tick, LAYOUTS):
        asked = LAYOUTS[name][-1]
        row: dict[str, Any] = {"layout": name, "mesh": LAYOUTS[name][0]}
        row["written"] = {k: f"{v}" if isinstance(v, P) else f'"{v}"' for k, v in asked.items()}
        for i, way in enumerate(("named", "alone")):
            each(i / 2, f"{name}, {way}")
            row[way] = compiled(name, way == "named")
        rows.append(row)
    return {"rows": rows}


def _moved(sizes: dict[str, float]) -> str:
    found = {kind: size / MIB for kind, size in sorted(sizes.items()) if size >= MIB}
    return ", ".join(f"{kind} {size:.0f}" for kind, size in found.items()) or "-"


def tables(data: dict[str, Any]) -> list[report.Table]:
    rows = []
    for row in data["rows"]:
        words = ", ".join(f"{name}={value}" for name, value in row["written"].items())
        named, alone = row["named"], row["alone"]
        rows.append(
            [
                row["layout"],
                f"`{words}`",
                *(_moved(named["sent"][part]) for part in ("once", "in loops")),
                *(_moved(alone["sent"][part]) for part in ("once", "in loops")),
                *(f"{way['temporaries'] / MIB:.0f}" for way in (named, alone)),
            ]
        )
    header = [
        "what is split", "what to write", "sent,\nnamed", "in loops,\nnamed", "sent,\nalone",
        "in loops,\nalone", "MiB held,\nnamed", "MiB held,\nalone",
    ]  # fmt: skip
    title = (
        "MiB that a device sends for value and gradients, by kind of collective, once and in all "
        "steps of the loops, and MiB of its temporary memory, with names and without "
        f"({B} x {L} tokens, D {D}, V {V}, bfloat16, `token_chunks` of {CHUNK} tokens of all "
        "devices, eight v5e chips, by compilation; kinds below 1 MiB are left out)"
    )
    return [report.Table(title, header, rows)]
