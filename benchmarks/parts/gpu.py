"""``python -m benchmarks.gpu``: the losses on one GPU, against its ceilings and their peers.

Copy bandwidth and matrix rate first; then the loss of ``hidden @ kernel`` in bfloat16, forward and
with both gradients, in time and memory; ``cross_entropy`` of bfloat16 logits as a share of the copy
bandwidth; chunk sizes. A method that does not agree with the first, cannot be imported, or refuses,
is listed with its reason. ``--small`` runs the same code on tiny shapes, on any device.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import measure, report
from benchmarks.harness.environment import describe, environment, installed
from benchmarks.methods import calls
from benchmarks.methods import linear_case as on_device

PACKAGES = ("jax-cuda13-plugin", "jax-cuda12-plugin", "tokamax", "torch", "liger-kernel")
PACKAGES = (*PACKAGES, "cut-cross-entropy")
LINEAR = (on_device.PRODUCTS, "jaxloss", "blocks", "mosaic_gpu", "optax", "tokamax chunked_xla")
LINEAR = (*LINEAR, "torch chunks", "Liger", "cut-cross-entropy")
SHOWN = {on_device.PRODUCTS: "bare products", "blocks": "jaxloss vocab_blocks"}
SHOWN = {**SHOWN, "mosaic_gpu": "jaxloss mosaic_gpu"}
LOGITS = ("jaxloss", "optax", "torch")
# For the first linear shape, on an H200; of extra memory, beside a float32 d_kernel.
MAX_BOTH_MS, MAX_FORWARD_MS, MAX_EXTRA_BYTES, MIN_OF_COPY = 20.0, 6.5, 1.2e9, 0.85


@dataclass(frozen=True)
class Cases:
    linear: tuple[tuple[int, int, int], ...]  # N, D, V
    chunks: tuple[int, ...]  # tokens, for the first of them
    rows: int
    columns: tuple[int, ...]
    side: int  # of the ceilings' square matrices


FULL = Cases(
    ((4096, 4096, 128256), (8192, 2304, 256000), (16384, 2048, 248320), (8192, 4096, 131072)),
    (256, 512, 1024, 2048, 4096),
    32768,
    (1024, 2048, 4096, 16384, 65536, 262144),
    16384,
)
SMALL = Cases(((64, 32, 512),), (16,), 32, (128,), 128)


def ceilings(side: int, seconds: float) -> dict[str, float]:
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    copy, product = measure.Program(jnp.copy, x), measure.Program(lambda x: x @ x, x)
    rate = 2 * side**3 / 1e9
    return {
        "copy_gb_s": 2 * x.nbytes / calls.median_ms({"": copy}, (x,), seconds)[""] / 1e6,
        "matrix_tflops": rate / calls.median_ms({"": product}, (x,), seconds)[""],
        "burst_matrix_tflops": rate / calls.burst_ms(product, (x,)),
    }


def logits_row(rows: int, columns: int, copy_gb_s: float, seconds: float) -> dict[str, Any]:
    """One method after the other: of the widest logits there is no room for all gradients."""
    keys = jax.random.split(jax.random.key(2))
    some = min(rows, 1024)
    logits = jax.random.normal(keys[0], (some, columns), jnp.bfloat16)
    logits = jnp.tile(logits, (rows // some, 1))
    args = (logits, jax.random.randint(keys[1], (rows,), 0, columns))
    results, ms, memory, refused = {}, {}, {}, {}
    for name in LOGITS:
        try:
            peer = calls.LOADERS[name]()
            if peer.torch:
                call = calls.Torch(peer.logits, args, True)
                loss, (gradient,) = call()
                call.wait()
                loss, gradient = calls.as_arrays((loss, gradient[:8].clone()))
            else:
                call = measure.Program(jax.value_and_grad(peer.logits), *args)
                loss, gradient = call(*args)
                memory[name] = call.temp_mib
            results[name] = (jnp.array(loss), jnp.array(gradient[:8]))
            del gradient
            ms[name] = calls.median_ms({name: call}, args, seconds / len(LOGITS))[name]
            del call
        except Exception as error:
            refused[name] = on_device.refusal(error)
    wrong = measure.agreeing(results, float(jnp.finfo(jnp.bfloat16).eps), f"{rows} x {columns}")
    refused |= wrong
    for name in wrong:
        del ms[name]
    # One read forward, one read and one write backward.
    least_ms = 3 * logits.nbytes / copy_gb_s / 1e6
    return {
        "shape": [rows, columns],
        "ms": ms,
        "of_copy": {name: least_ms / t for name, t in ms.items()},
        "planned_mib": memory,
        "refused": refused,
    }


def bursts(shape: tuple[int, int, int], seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of ten calls after a pause, as the targets' rate of products was measured; it
    takes what it takes."""
    args = on_device.operands(shape)
    found = {}
    for name in (on_device.PRODUCTS, "jaxloss"):
        programs = on_device.linear_calls(name, args)
        found[name] = {what: calls.burst_ms(call, args) for what, call in programs.items()}
    return found


def targets(data: dict[str, Any]) -> list[dict[str, Any]]:
    first, tight = data["linear"][0], min(data["logits"], key=lambda r: r["of_copy"]["jaxloss"])
    _, d, v = first["shape"]
    shape = "{} x {} x {}".format(*first["shape"])
    extra = first["memory"]["jaxloss"]["planned_mib"]
    most = (4 * d * v + MAX_EXTRA_BYTES) / measure.MIB
    worst = tight["of_copy"]["jaxloss"]
    burst = data["burst"]["jaxloss"]
    rows = [
        (f"{shape}, forward and backward", "ms", first["both_ms"]["jaxloss"], MAX_BOTH_MS, -1),
        (f"{shape}, the same in a burst", "ms", burst["both"], MAX_BOTH_MS, -1),
        (f"{shape}, forward", "ms", first["forward_ms"]["jaxloss"], MAX_FORWARD_MS, -1),
        (f"{shape}, the same in a burst", "ms", burst["forward"], MAX_FORWARD_MS, -1),
        (f"{shape}, extra memory", "MiB", extra, most, -1),
        ("cross_entropy, its worst shape", "of copy bandwidth", worst, MIN_OF_COPY, 1),
    ]
    return [
        {
            "what": what,
            "unit": unit,
            "got": got,
            "target": want,
            "reached": sign * got >= sign * want,
        }
        for what, unit, got, want, sign in rows
    ]


def run(
    cases: Cases, seconds: float, tick: Callable[[str], None], save: Callable[[dict], None]
) -> dict[str, Any]:
    """``save`` is told of each part as it comes: a GPU may be taken away."""
    data = {"environment": {**environment(), **{name: installed(name) for name in PACKAGES}}}

    def add(key: str, what: str, compute: Callable, *args: Any, many: bool = False) -> None:
        tick(what)
        found = compute(*args, seconds)
        data[key] = [*data.get(key, []), found] if many else found
        save(data)

    def add_linear(shape: tuple[int, int, int]) -> None:
        what = "linear_cross_entropy {} x {} x {}".format(*shape)
        add("linear", what, on_device.linear_row, shape, LINEAR, many=True)

    add("ceilings", "ceilings", ceilings, cases.side)
    first, *others = cases.linear
    add_linear(first)
    add("burst", "bursts", bursts, first)
    add("chunk_size", "chunk_size", on_device.chunk_sizes, first, cases.chunks)
    for columns in cases.columns:
        given = cases.rows, columns, data["ceilings"]["copy_gb_s"]
        add("logits", f"cross_entropy {cases.rows} x {columns}", logits_row, *given, many=True)
    for shape in others:
        add_linear(shape)
    return data


def _cell(values: dict[str, Any], name: str, form: str) -> str:
    return f"{values[name]:{form}}" if values.get(name) is not None else "-"


def tables(data: dict[str, Any]) -> list[report.Table]:
    top = data["ceilings"]
    out = [
        report.Table(
            "Ceilings",
            ["copy, GB/s", "bfloat16 products, Tflop/s", "the same in a burst"],
            [[f"{top[k]:.0f}" for k in ("copy_gb_s", "matrix_tflops", "burst_matrix_tflops")]],
        )
    ]
    rows, env = data["linear"], data["environment"]
    peers = ", ".join(f"{name} {env[name]}" for name in PACKAGES if env[name])
    names = [name for name in LINEAR if any(name in row["both_ms"] for row in rows)]
    columns = [SHOWN.get(name, name).replace(" ", "\n") for name in names]
    shapes = ["{} x {} x {}".format(*row["shape"]) for row in rows]
    for title, key in (
        (f"Forward, ms ({peers})", "forward_ms"),
        ("Forward and both gradients, ms", "both_ms"),
    ):
        times = [[_cell(row[key], name, ".2f") for name in names] for row in rows]
        lines = [[s, *t] for s, t in zip(shapes, times, strict=True)]
        head = ["tokens x features\nx classes", *columns]
        out.append(report.Table(f"bfloat16, hidden @ kernel. {title}", head, lines))
    names, columns = names[1:], columns[1:]
    lines = []
    for shape, row in zip(shapes, rows, strict=True):
        for what, key in (("planned", "planned_mib"), ("on the device", "device_mib")):
            found = {name: memory[key] for name, memory in row["memory"].items()}
            lines.append([shape, what, *(_cell(found, name, ".0f") for name in names)])
    head = ["tokens x features\nx classes", "", *columns]
    title = "Extra MiB: beside inputs and gradients by XLA's plan and its allocator ('-': an"
    title += " earlier peak hides it), beside inputs by torch's allocator"
    out.append(report.Table(title, head, lines))
    lines = [
        [what, *(f"{data['burst'][name][what]:.2f}" for name in data["burst"])]
        for what in ("forward", "both")
    ]
    title = f"Ten calls after a pause, ms, {shapes[0]}"
    out.append(report.Table(title, ["", *(SHOWN.get(n, n) for n in data["burst"])], lines))
    lines = [
        [str(row["chunk_size"]), f"{row['both_ms']:.2f}", f"{row['planned_mib']:.0f}"]
        for row in data["chunk_size"]
    ]
    out.append(
        report.Table(f"jaxloss by chunk_size, {shapes[0]}", ["tokens", "ms", "extra MiB"], lines)
    )
    names = [name for name in LOGITS if any(name in row["ms"] for row in data["logits"])]
    lines = []
    for row in data["logits"]:
        times = [_cell(row["ms"], name, ".3f") for name in names]
        shares = [_cell(row["of_copy"], name, ".0%") for name in names]
        lines.append(["{} x {}".format(*row["shape"]), *times, *shares])
    head = ["shape", *(f"{n}\nms" for n in names), *(f"{n}\nof copy" for n in names)]
    title = "bfloat16 logits: value and gradient (of copy: two reads and a write at its bandwidth)"
    out.append(report.Table(title, head, lines))
    refused = {}
    for row in (*rows, *data["logits"]):
        for name, why in row["refused"].items():
            shape = " x ".join(map(str, row["shape"]))
            refused.setdefault((name, why.split(". ")[0]), []).append(shape)
    if refused:
        lines = [[name, "; ".join(where), why] for (name, why), where in refused.items()]
        out.append(report.Table("Not compared", ["method", "shapes", "why"], lines))
    lines = [
        [t["what"], f"{t['got']:.4g}", f"{t['target']:.4g}", t["unit"], _verdict(t)]
        for t in targets(data)
    ]
    out.append(report.Table("Targets, for an H200", ["what", "got", "target", "", ""], lines))
    return out


def _verdict(target: dict[str, Any]) -> str:
    return "reached" if target["reached"] else "MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny shapes, on whatever is there")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case (default: 2)")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    args = parser.parse_args()
    sys.argv = sys.argv[:1]  # tokamax reads the command line too, and refuses what it does not know
    # Torch allocates on the same device. Read when JAX first touches it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = jax.devices()[0]
    if device.platform != "gpu" and not args.small:
        sys.exit(
            f"python -m benchmarks.gpu: wants a GPU; got {device.device_kind}. "
            "With --small the same code runs on tiny shapes here."
        )
    import rich

    args.out.mkdir(parents=True, exist_ok=True)
    save = partial(report.save, args.out, "gpu")
    cases = SMALL if args.small else FULL
    data = run(cases, args.seconds, lambda text: print(text, flush=True), save)
    save(data)
    print(describe(data["environment"]))
    for table in tables(data):
        rich.print("", report.to_rich(table), sep="\n")


if __name__ == "__main__":
    main()
