"""Objectives of reinforcement learning and distillation beside TRL's and Liger's, on a CPU.

The errors of values and gradients against the formulas in float64, and what a value with both
gradients of ``hidden @ kernel`` costs beside its bare products. A library that is not here, or does
not run here, is listed with the reason that it gave. All of it runs on one core: where other
programs take turns with them, torch's threads wait for each other at every small operation.
"""

import argparse
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

from benchmarks.harness import measure, report
from benchmarks.methods import calls, objectives, torch_objectives
from benchmarks.methods.linear_case import PRODUCTS
from benchmarks.methods.objectives import OBJECTIVES, Batch

PACKAGES = ("torch", "trl", "liger-kernel", "transformers")
OURS, PLAIN = "jaxloss", "formula"
METHODS = (OURS, PLAIN, *torch_objectives.LOADERS)
COLORS = {
    OURS: report.COLORS["jaxloss"],
    PLAIN: report.COLORS["floor"],
    "TRL": "#d55e00",
    "TRL of logits": "#e69f00",
    "Liger": "#009e73",
}
SMALL = 8, 16, 64, 2000  # answers, tokens of each, D, V
SHAPES = ((8, 64, 256, 8192), (8, 128, 512, 32000))


def options(parser: argparse.ArgumentParser) -> None:
    each = "time for each objective and shape (default: %(default)s)"
    parser.add_argument("--seconds", type=float, default=8.0, help=each)


def prepare(args: argparse.Namespace) -> None:
    if hasattr(os, "sched_setaffinity"):  # before JAX and torch count the cores
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    measure.keep_pages()


def peers(batch: Batch) -> tuple[dict[str, torch_objectives.Losses], dict[str, str]]:
    """The losses of the libraries that are here, and why the others are not."""
    found, absent = {}, {}
    for name, load in torch_objectives.LOADERS.items():
        try:
            found[name] = load(batch)
        except Exception as error:
            absent[name] = measure.refusal(error)
    return found, absent


def calls_of(
    name: str, batch: Batch, losses: Mapping[str, torch_objectives.Losses]
) -> dict[str, calls.Call]:
    """Value and both gradients of an objective by each method that has it."""
    objective = OBJECTIVES[name]
    out: dict[str, calls.Call] = {
        method: calls.Jax(objectives.with_gradients(function), batch)
        for method, function in ((OURS, objective.ours), (PLAIN, objective.plain))
    }
    for method, of_library in losses.items():
        if name in of_library:
            given = batch.hidden, jnp.array(batch.kernel.T), batch.labels
            out[method] = calls.Torch(of_library[name], given)
    return out


def result_of(call: calls.Call) -> Any:
    """(value, (d_hidden, d_kernel[D, V])) in float64."""
    value, (d_hidden, d_kernel) = jax.tree.map(np.array, calls.as_arrays(call()))
    d_kernel = d_kernel.T if isinstance(call, calls.Torch) else d_kernel
    return jax.tree.map(lambda x: np.asarray(x, np.float64), (value, (d_hidden, d_kernel)))


def error_of(found: Any, truth: Any) -> dict[str, float]:
    """Relative errors: of the value, of the worst token's gradient, of the largest in kernel's."""
    (value, (d_hidden, d_kernel)), (want, (want_hidden, want_kernel)) = found, truth
    size = np.linalg.norm(want_hidden, axis=-1)
    counts = size > 0  # a clipped token's gradient is 0
    off = np.linalg.norm(d_hidden - want_hidden, axis=-1)
    return {
        "value": float(abs(value - want) / abs(want)),
        "token": float(np.max(off[counts] / size[counts])),
        "kernel": float(np.max(abs(d_kernel - want_kernel)) / np.max(abs(want_kernel))),
    }


def errors(tick: Callable[..., None]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    rows, absent = [], {}
    for setting, each in report.shares(tick, objectives.SETTINGS):
        batch = objectives.batch_of(SMALL, setting, full=False)
        losses, why = peers(batch)
        absent |= why
        for name, objective in OBJECTIVES.items():
            if setting not in objective.settings:
                continue
            each(0, f"errors: {name}, {setting}")
            truth = objectives.truth(name, batch)
            row: dict[str, Any] = {"objective": name, "setting": setting}
            row["errors"] = {}
            for method, call in calls_of(name, batch, losses).items():
                row["errors"][method] = error_of(result_of(call), truth)
            rows.append(row)
    return rows, absent


def bare_products(count: int, batch: Batch) -> calls.Jax:
    """The logits and both gradients; with 4 the reference's logits too."""

    def three(hidden, kernel, ref_hidden, ref_kernel):
        logits = hidden @ kernel
        if count == 4:  # a sum of both, so that neither product is left out
            logits += ref_hidden @ ref_kernel
        return logits @ kernel.T, hidden.T @ logits

    flat = (x.reshape(-1, x.shape[-1]) if x.ndim == 3 else x for x in batch[:4])
    return calls.Jax(three, tuple(flat))


def cost(name: str, shape: tuple, seconds: float, tick: Callable[..., None]) -> dict[str, Any]:
    batch = objectives.batch_of(shape)
    found = calls_of(name, batch, peers(batch)[0])
    # The formula first, which the others must agree with. Sums of D products in float32.
    order = sorted(found, key=lambda method: method != PLAIN)
    results = {method: jax.tree.map(jnp.asarray, result_of(found[method])) for method in order}
    eps = float(jnp.finfo(jnp.float32).eps) * shape[2]
    left_out = measure.agreeing(results, eps, f"{name} {shape}")
    found = {method: call for method, call in found.items() if method not in left_out}
    memory = {method: call.extra_mib() for method, call in found.items()}
    functions: dict[str, Any] = dict(found)
    functions[PRODUCTS] = bare_products(OBJECTIVES[name].products, batch)
    times = measure.interleaved(functions, (), seconds, tick)
    return {
        "objective": name,
        "shape": [shape[0] * shape[1], *shape[2:]],
        "products": OBJECTIVES[name].products,
        "rounds": len(times[PRODUCTS]),
        "median_ms": measure.medians_ms(times),
        "of_products": {m: measure.median_ratio(times, m, PRODUCTS) for m in memory},
        "temp_mib": memory,
        "left_out": left_out,
    }


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    rows, absent = errors(lambda share, *note: tick(share / 5, *note))
    cases = [(name, shape) for shape in SHAPES for name in OBJECTIVES]
    costs = []
    for (name, shape), each in report.shares(lambda s, *n: tick(0.2 + 0.8 * s, *n), cases):
        each(0, f"time: {name}, {report.by(shape)}")
        costs.append(cost(name, shape, args.seconds, each))
        jax.clear_caches()
    return {
        "shape_of_errors": list(SMALL),
        "seconds_a_case": args.seconds,
        "errors": rows,
        "cost": costs,
        "absent": absent,
    }


def tables(data: dict[str, Any]) -> list[report.Table]:
    versions = [[name, data["environment"].get(name) or "-"] for name in PACKAGES]
    out = [report.Table("Versions", ["package", "version"], versions), *cost_tables(data)]
    out += error_tables(data)
    if data["absent"]:
        absent = [[name, why] for name, why in data["absent"].items()]
        out.append(report.Table("Not compared", ["library", "why"], absent))
    left = [
        [row["objective"], report.by(row["shape"]), method, why]
        for row in data["cost"]
        for method, why in row["left_out"].items()
    ]
    if left:
        header = ["objective", "shape", "method", "why"]
        out.append(report.Table("Left out of the times", header, left))
    return out


def cell(values: Mapping[str, float], method: str, form: str) -> str:
    return format(values[method], form) if method in values else "-"


def cost_tables(data: dict[str, Any]) -> list[report.Table]:
    times, sizes = [], []
    for row in data["cost"]:
        first = [row["objective"], report.by(row["shape"])]
        products = [str(row["products"]), f"{row['median_ms'][PRODUCTS]:.0f}"]
        ratios = (cell(row["of_products"], method, ".2f") for method in METHODS)
        times.append([*first, *products, *ratios])
        sizes.append([*first, *(cell(row["temp_mib"], method, ".0f") for method in METHODS)])
    header = ["objective", "tokens x D x V"]
    title = "float32: time of a value with both gradients / that of the bare products it needs"
    return [
        report.Table(title, [*header, "bare\nproducts", "these,\nms", *METHODS], times),
        report.Table("float32: temporary MiB", [*header, *METHODS], sizes),
    ]


def error_tables(data: dict[str, Any]) -> list[report.Table]:
    b, t, d, v = data["shape_of_errors"]
    case = f"{b} answers of {t // 4} to {t} tokens, D {d}, V {v}"
    kinds = {
        "value": f"float32: relative error of the value ({case})",
        "token": "float32: relative error of the gradient in hidden, of the worst token",
        "kernel": "float32: largest error of the gradient in kernel / its largest entry",
    }
    out = []
    for kind, title in kinds.items():
        lines = []
        for row in data["errors"]:
            values = {method: each[kind] for method, each in row["errors"].items()}
            cells = (cell(values, method, ".0e") for method in METHODS)
            lines.append([row["objective"], row["setting"], *cells])
        lines.sort(key=lambda line: list(OBJECTIVES).index(line[0]))
        out.append(report.Table(title, ["objective", "logits", *METHODS], lines))
    return out


def plot(data: dict[str, Any], path: Path) -> None:
    """The largest shape's times and memory, and the confident rows' errors."""
    shape = max((row["shape"] for row in data["cost"]), key=math.prod)
    costs = [row for row in data["cost"] if row["shape"] == shape]
    setting = objectives.SETTINGS[1]
    errors = [row for row in data["errors"] if row["setting"] == setting]
    times, memory, off = report.axes(3)
    of_tokens = [
        {"objective": row["objective"], "token": {m: e["token"] for m, e in row["errors"].items()}}
        for row in errors
    ]
    for ax, rows, kind in (
        (times, costs, "of_products"),
        (memory, costs, "temp_mib"),
        (off, of_tokens, "token"),
    ):
        _bars(ax, rows, kind)
    times.axhline(1, color="black", lw=1)
    times.set(ylabel="time / that of the bare products", title=f"{report.by(shape)}, float32")
    memory.set(yscale="log", ylabel="MiB", title="Temporary memory")
    memory.set_ylim(10)
    off.set(yscale="log", ylabel="relative error", title=f"Worst token's gradient, {setting}")
    off.set_ylim(1e-7)
    report.legend_below(times, len(COLORS))
    report.save_figure(times, path)


def _bars(ax: Axes, rows: list[dict[str, Any]], kind: str) -> None:
    """A group of bars for each objective, a bar for each method that has it."""
    width = 0.8 / len(COLORS)
    for i, (method, color) in enumerate(COLORS.items()):
        found = [(at, row[kind][method]) for at, row in enumerate(rows) if method in row[kind]]
        left = [at + (i - (len(COLORS) - 1) / 2) * width for at, _ in found]
        ax.bar(left, [y for _, y in found], width, color=color, label=method)
    ax.set_xticks(range(len(rows)), [row["objective"] for row in rows])


def missed(data: dict[str, Any]) -> str | None:
    """Ours must be numbers; what a peer gives is its own."""
    for row in data["errors"]:
        if not all(math.isfinite(x) for x in row["errors"][OURS].values()):
            return f"{row['objective']}, {row['setting']}: {row['errors'][OURS]}"
    return None
