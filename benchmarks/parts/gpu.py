"""The losses on one GPU, against its ceilings and their peers.

Copy bandwidth and matrix rate first; then the loss of ``hidden @ kernel`` in bfloat16, forward and
with both gradients, in time and memory; ``cross_entropy`` of bfloat16 logits as a share of the copy
bandwidth, and every other function of logits; losses of a product's statistics; chunk sizes. Each
step is saved at once, and ``--resume`` goes on from there. A method that does not agree with the
first, cannot be imported, or refuses, is listed with its reason. ``--small`` runs the same code on
tiny shapes, on any device.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import measure, report
from benchmarks.harness.environment import environment
from benchmarks.methods import calls, device_functions, libraries, linear_case
from benchmarks.methods.linear_case import PASSES, PRODUCTS

PACKAGES = ("jax-cuda13-plugin", "jax-cuda12-plugin", "tokamax", "torch", "liger-kernel")
PACKAGES = (*PACKAGES, "cut-cross-entropy")
LINEAR = (PRODUCTS, "jaxloss", "stored", "blocks", "mosaic_gpu", "optax", "tokamax chunked_xla")
LINEAR = (*LINEAR, "torch chunks", "Liger", "cut-cross-entropy")
SHOWN = {PRODUCTS: "bare products", "blocks": "jaxloss vocab_blocks"}
SHOWN = {**SHOWN, "mosaic_gpu": "jaxloss mosaic_gpu", "stored": "jaxloss stored_exponentials"}
LOGITS = ("jaxloss", "optax", "torch")
OF_COPY = ("ms", ".3f"), ("of_copy", ".0%")
OF_PRODUCTS = ("ms", ".2f"), ("of_products", ".2f")
# For the first linear shape, on an H200; of extra memory, beside a float32 d_kernel.
MAX_BOTH_MS, MAX_FORWARD_MS, MAX_EXTRA_BYTES, MIN_OF_COPY = 20.0, 6.5, 1.2e9, 0.85
MAX_STORED, MAX_STORED_MIB = 1.08, 1100  # of bare products; for the first shape
MAX_STATISTICS_MS = {"linear_token_stats": 50.0, "linear_stats_loss": 38.0}
MAX_DIVERGENCE, MIN_STATS_OF_COPY = 1.10, 0.90


@dataclass(frozen=True)
class Cases:
    linear: tuple[tuple[int, int, int], ...]  # N, D, V
    chunks: tuple[int, ...]  # tokens, for the first of them
    rows: int
    columns: tuple[int, ...]
    side: int  # of the ceilings' square matrices
    logits: tuple[int, int]  # of every function of them
    statistics: tuple[int, int, int]  # of losses of a product's statistics


FULL = Cases(
    ((4096, 4096, 128256), (8192, 2304, 256000), (16384, 2048, 248320), (8192, 4096, 131072)),
    (256, 512, 1024, 2048, 4096),
    32768,
    (1024, 2048, 4096, 16384, 65536, 262144),
    16384,
    (8192, 151936),
    (8192, 4096, 131072),
)
SMALL = Cases(((64, 32, 512),), (16,), 32, (128,), 128, (32, 128), (64, 32, 512))


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--small", action="store_true", help="tiny shapes, on whatever is there")
    add("--resume", action="store_true", help="measure what the results do not have yet")
    add("--seconds", type=float, default=2.0, help="time for each case (default: %(default)s)")


def prepare(args: argparse.Namespace) -> None:
    # Torch allocates on the same device. JAX reads this when it first touches the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = jax.devices()[0]
    if device.platform != "gpu" and not args.small:
        sys.exit(
            f"python -m benchmarks gpu: wants a GPU; got {device.device_kind}. "
            "With --small the same code runs on tiny shapes here."
        )


def ceilings(side: int, seconds: float) -> dict[str, float]:
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    copy, product = calls.Jax(jnp.copy, (x,)), calls.Jax(lambda x: x @ x, (x,))
    rate = 2 * side**3 / 1e9
    return {
        "copy_gb_s": 2 * x.nbytes / calls.median_ms({"": copy}, seconds)[""] / 1e6,
        "matrix_tflops": rate / calls.median_ms({"": product}, seconds)[""],
        "burst_matrix_tflops": rate / calls.burst_ms(product),
    }


def logits_row(rows: int, columns: int, copy_gb_s: float, seconds: float) -> dict[str, Any]:
    """One method after the other: of the widest logits there is no room for all gradients."""
    keys = jax.random.split(jax.random.key(2))
    some = min(rows, 1024)
    logits = jax.random.normal(keys[0], (some, columns), jnp.bfloat16)
    logits = jnp.tile(logits, (rows // some, 1))
    args = (logits, jax.random.randint(keys[1], (rows,), 0, columns))
    results, ms, memory = {}, {}, {}
    peers, refused = libraries.load(LOGITS)
    for name, peer in peers.items():
        try:
            if peer.torch:
                call = calls.Torch(peer.logits, args)  # pyright: ignore
                loss, (gradient,) = call()
                call.wait()
                loss, gradient = calls.as_arrays((loss, gradient[:8].clone()))
            else:
                call = calls.Jax(jax.value_and_grad(peer.logits), args)  # pyright: ignore
                loss, gradient = call()
                memory[name] = call.planned_mib
            results[name] = (jnp.array(loss), jnp.array(gradient[:8]))
            del gradient
            ms[name] = calls.median_ms({name: call}, seconds / len(LOGITS))[name]
            del call
        except Exception as error:
            refused[name] = measure.refusal(error)
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


def bursts(shape: tuple[int, int, int]) -> dict[str, dict[str, float]]:
    """Milliseconds of ten calls after a pause, as the targets' rate of products was measured."""
    arrays, ours = linear_case.operands(shape), libraries.LOADERS["jaxloss"]()
    makers = {
        PRODUCTS: partial(linear_case.products_call, arrays),
        "jaxloss": partial(linear_case.loss_call, ours, arrays),
    }
    return {
        name: {what: calls.burst_ms(make(what)) for what in PASSES} for name, make in makers.items()
    }


def targets(data: dict[str, Any]) -> list[dict[str, Any]]:
    first, tight = data["linear"][0], min(data["logits"], key=lambda r: r["of_copy"]["jaxloss"])
    _, d, v = first["shape"]
    shape = report.by(first["shape"])
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
        *_targets_of_stored(data),
        *_targets_of_functions(data),
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


def _targets_of_stored(data: dict[str, Any]) -> list[tuple]:
    """Of stored exponentials, where they were measured."""
    rows = []
    for row in (r for r in data["linear"] if "stored" in r["both_ms"]):
        ratio = row["both_ms"]["stored"] / row["both_ms"][PRODUCTS]
        what = f"stored_exponentials {report.by(row['shape'])}"
        rows.append((what, "of bare products", ratio, MAX_STORED, -1))
    if rows:
        held = data["linear"][0]["memory"]["stored"]["planned_mib"]
        what = f"stored_exponentials {report.by(data['linear'][0]['shape'])}, extra memory"
        rows.append((what, "MiB", held, MAX_STORED_MIB, -1))
    return rows


def _targets_of_functions(data: dict[str, Any]) -> list[tuple]:
    rows = []
    if "statistics" in data:
        found = data["statistics"]["functions"]
        for name, most in MAX_STATISTICS_MS.items():
            rows.append((name, "ms", found[name]["ms"]["both"], most, -1))
        ratio = found["linear_kl_divergence"]["of_products"]["both"]
        rows.append(("linear_kl_divergence", "of bare products", ratio, MAX_DIVERGENCE, -1))
    if "functions" in data:
        share = data["functions"]["functions"]["token_stats"]["of_copy"]["forward"]
        rows.append(("token_stats, forward", "of copy bandwidth", share, MIN_STATS_OF_COPY, 1))
    return rows


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    """Saves the results after each step too, because a GPU may be taken away."""
    cases, seconds = SMALL if args.small else FULL, args.seconds
    env, data = environment(*PACKAGES), {}
    if args.resume and (args.out / f"{args.name}.json").exists():
        data = report.load(args.out, args.name)
        if data.pop("environment") != env:
            sys.exit("gpu --resume: another machine or other versions made the results there.")
    done = data.setdefault("done", [])
    first, *others = cases.linear

    def linear(shape: tuple[int, int, int]) -> tuple[str, str, Callable]:
        what = f"linear_cross_entropy {report.by(shape)}"
        return "linear", what, lambda: linear_case.forward_and_both(shape, LINEAR, seconds)

    def logits(columns: int) -> tuple[str, str, Callable]:
        what = f"cross_entropy {report.by((cases.rows, columns))}"
        shape = cases.rows, columns
        return "logits", what, lambda: logits_row(*shape, data["ceilings"]["copy_gb_s"], seconds)

    steps = [
        ("ceilings", "ceilings", lambda: ceilings(cases.side, seconds)),
        linear(first),
        (
            "statistics",
            "statistics",
            lambda: device_functions.of_products(cases.statistics, seconds),
        ),
        (
            "functions",
            "functions of logits",
            lambda: device_functions.of_logits(
                cases.logits, data["ceilings"]["copy_gb_s"], seconds / 4
            ),
        ),
        ("burst", "bursts", lambda: bursts(first)),
        ("chunk_size", "chunk_size", lambda: linear_case.chunk_sizes(first, cases.chunks, seconds)),
        *map(logits, cases.columns),
        *map(linear, others),
    ]
    for (key, what, compute), each in report.shares(tick, steps):
        each(0, what)
        if what in done:
            continue
        found = compute()
        data[key] = [*data.get(key, []), found] if key in ("linear", "logits") else found
        done.append(what)
        report.save(args.out, args.name, {"environment": env, **data})
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
    shapes = [report.by(row["shape"]) for row in rows]
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
        lines.append([report.by(row["shape"]), *times, *shares])
    head = ["shape", *(f"{n}\nms" for n in names), *(f"{n}\nof copy" for n in names)]
    title = "bfloat16 logits: value and gradient (of copy: two reads and a write at its bandwidth)"
    out.append(report.Table(title, head, lines))
    out += _of_functions(data)
    refused = {}
    for row in (*rows, *data["logits"]):
        for name, why in row["refused"].items():
            shape = report.by(row["shape"])
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


def _of_functions(data: dict[str, Any]) -> list[report.Table]:
    """None in results of before they were measured."""
    out = []
    if "functions" in data:
        found, head = data["functions"], ["function", "forward ms", "of copy", "both ms", "of copy"]
        lines = [
            [name, *(_cell(f[key], p, form) for p in PASSES for key, form in OF_COPY)]
            for name, f in found["functions"].items()
        ]
        title = "(of copy: what must be read and written, at its bandwidth)"
        title = f"Functions of bfloat16 logits, {report.by(found['shape'])} {title}"
        out.append(report.Table(title, head, lines))
    if "statistics" in data:
        found = data["statistics"]
        head = ["loss", "forward ms", "of products", "both ms", "of products"]
        lines = [
            [name, *(_cell(f[key], p, form) for p in PASSES for key, form in OF_PRODUCTS)]
            for name, f in found["functions"].items()
        ]
        title = f"Losses of a product's statistics, {report.by(found['shape'])}"
        title += " (of products: of the bare products that each needs)"
        out.append(report.Table(title, head, lines))
    return out


def _verdict(target: dict[str, Any]) -> str:
    return "reached" if target["reached"] else "MISSED"
