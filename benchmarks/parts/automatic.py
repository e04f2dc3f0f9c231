"""The linear loss on meshes of automatic axes: without names, with names, and in ``shard_map``.

Value and both gradients on eight devices of one host. Times are the processors' time of all
devices together: a device that computes the tokens of others shows there, on a busy machine too.
"""

import argparse
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxloss
from benchmarks.harness import measure, report

B, L, D, V, CHUNK = 16, 128, 128, 8192, 256
DEVICES = 8
# mesh, spec of hidden, spec of the kernel, what to write
LAYOUTS: dict[str, tuple[dict[str, int], P, P, dict[str, Any]]] = {
    "tokens": ({"data": 8}, P("data"), P(), {"token_axis_name": "data"}),
    "tokens, and D of the kernel": (
        {"data": 8},
        P("data"),
        P("data"),
        {"token_axis_name": "data", "kernel_spec": P("data")},
    ),
    "tokens, and V of the kernel": (
        {"data": 8},
        P("data"),
        P(None, "data"),
        {"token_axis_name": "data", "kernel_spec": P(None, "data")},
    ),
    "columns": ({"tensor": 8}, P(), P(None, "tensor"), {"vocab_axis_name": "tensor"}),
    "tokens and columns": (
        {"data": 4, "tensor": 2},
        P("data"),
        P(None, "tensor"),
        {"token_axis_name": "data", "vocab_axis_name": "tensor"},
    ),
    "tokens, D and columns": (
        {"data": 4, "tensor": 2},
        P("data"),
        P("data", "tensor"),
        {"token_axis_name": "data", "kernel_spec": P("data", "tensor")},
    ),
    "sequence": (
        {"context": 8},
        P(None, "context"),
        P(),
        {"token_axis_name": P(None, "context")},
    ),
    "tokens and sequence": (
        {"data": 4, "context": 2},
        P("data", "context"),
        P(),
        {"token_axis_name": P("data", "context")},
    ),
}
WAYS = ("shard_map", "alone", "named")


def prepare(args: argparse.Namespace) -> None:
    measure.on_cpu_devices(DEVICES)
    measure.keep_pages()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=8.0, help="time for each layout")


def sent(text: str) -> dict[str, float]:
    """MiB of the results of each kind of collective, those within loops once."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found: Counter[str] = Counter()
    for result, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        for dims in re.findall(r"f32\[([\d,]*)\]", result):
            found[kind] += 4 * jnp.prod(jnp.array([int(n) for n in dims.split(",") if n])).item()
    return {kind: size / measure.MIB for kind, size in found.items()}


def by_hand(mesh: Any, of_hidden: P, of_kernel: P, asked: dict[str, Any]) -> Callable:
    """The call inside of ``shard_map`` over the whole mesh, with what splits the kernel and the
    tokens gathered by hand."""
    names = [n for e in of_hidden for n in (e if isinstance(e, tuple) else (e,)) if n is not None]
    vocab = asked.get("vocab_axis_name") or ("tensor" if "tensor" in mesh.axis_names else None)

    def local(hidden, kernel, labels):
        for axis, name in enumerate((*of_kernel, None, None)[:2]):
            if name in names:
                kernel = jax.lax.all_gather(kernel, name, axis=axis, tiled=True)
        return jaxloss.linear_cross_entropy(
            hidden,
            kernel,
            labels,
            chunk_size=CHUNK // max(1, DEVICES // (mesh.shape[vocab] if vocab else 1)),
            token_axis_name=tuple(names) or None,
            vocab_axis_name=vocab,
        )

    specs = (of_hidden, of_kernel, of_hidden)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    key = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(key[0], (B, L, D)) / 4
    kernel = jax.random.normal(key[1], (D, V))
    labels = jax.random.randint(key[2], (B, L), 0, V)
    rows = []
    for (name, (sizes, of_hidden, of_kernel, asked)), each in report.shares(tick, LAYOUTS.items()):
        each(0, name)
        shape = tuple(sizes.values()), tuple(sizes)
        mesh = jax.make_mesh(*shape, axis_types=(AxisType.Auto,) * len(sizes))
        specs = of_hidden, of_kernel, of_hidden
        given = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip((hidden, kernel, labels), specs, strict=True)
        ]
        own = CHUNK // max(1, mesh.size // sizes.get("tensor", 1))
        calls = {
            "shard_map": by_hand(mesh, of_hidden, of_kernel, asked),
            "alone": partial(jaxloss.linear_cross_entropy, chunk_size=CHUNK),
            "named": partial(jaxloss.linear_cross_entropy, chunk_size=own, mesh=mesh, **asked),
        }
        with jax.set_mesh(mesh):  # as a trainer says what its mesh is
            programs = {
                way: jax.jit(jax.value_and_grad(call, (0, 1))).lower(*given).compile()
                for way, call in calls.items()
            }
        results = {way: program(*given) for way, program in programs.items()}
        measure.check_agree(jax.device_get(results), 2e-6, name)
        times = measure.interleaved(programs, given, args.seconds, each, time.process_time)
        row: dict[str, Any] = {"layout": name, "mesh": sizes}
        row["written"] = {k: f"{v}" if isinstance(v, P) else f'"{v}"' for k, v in asked.items()}
        for way, program in programs.items():
            row[way] = {
                "seconds": statistics.median(times[way]),
                "ratio": measure.median_ratio(times, way, "shard_map"),
                "temporaries": program.memory_analysis().temp_size_in_bytes / measure.MIB,
                "sent": sent(program.as_text()),
                "d_hidden": str(program.output_shardings[1][0].spec),
            }
        rows.append(row)
    return {"rows": rows}


def tables(data: dict[str, Any]) -> list[report.Table]:
    rows = []
    for row in data["rows"]:
        words = ", ".join(f"{name}={value}" for name, value in row["written"].items())
        kinds = row["named"]["sent"]
        moved = ", ".join(f"{k} {v:.1f}" for k, v in sorted(kinds.items()) if v >= 0.05)
        each = (f"{row[way]['ratio']:.2f}" for way in ("alone", "named"))
        held = (f"{row[way]['temporaries']:.1f}" for way in WAYS)
        rows.append([row["layout"], f"`{words}`", *each, *held, moved])
    header = [
        "what is split", "what to write", "time\nalone", "time\nnamed",
        "MiB by\nhand", "MiB\nalone", "MiB\nnamed", "MiB sent",
    ]  # fmt: skip
    title = (
        "Value and gradients without names (alone) and with them (named): the processors' time "
        "over that of the same call by hand, inside of `shard_map`; a device's temporary memory; "
        f"and the results of its collectives with names ({B} x {L} tokens, D {D}, V {V}, float32, "
        f"{DEVICES} CPU devices)"
    )
    return [report.Table(title, header, rows)]
