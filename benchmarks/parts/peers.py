"""jaxloss beside other libraries' cross-entropies.

What each answers where answers differ, beside the truth; its error as the model grows confident;
what value and both gradients of ``hidden @ kernel`` cost. A library that is not here, or does not
run here, is listed with the reason that it gave.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import measure, report
from benchmarks.harness.environment import installed
from benchmarks.methods import answers, libraries, linear_case
from benchmarks.methods.libraries import Peer
from benchmarks.methods.linear_case import PRODUCTS

LIBRARIES = ("jaxloss", "jax", "optax", "torch", "tokamax", "jax-cce")
PEERS = ("jaxloss", "blocks", "optax", "two-step", "torch", "torch chunks", libraries.ALIKE)
PEERS = (*PEERS, "tokamax xla", "tokamax chunked_xla", "tokamax mosaic_tpu", "jax-cce")
SWEEP = tuple((512, 256, v) for v in (2048, 8192, 32768, 131072))
SHAPES = tuple(sorted((*SWEEP, *linear_case.SHAPES), key=math.prod))
DTYPES = ("float32", "bfloat16")
LIMIT = 4.0  # seconds a call; what takes longer is left out
WRONG = " ✗"
COLORS = {
    **report.COLORS,
    PRODUCTS: report.COLORS["floor"],
    "blocks": "#56b4e9",
    "torch": "#cc79a7",
    "torch chunks": "#882255",
    libraries.ALIKE: "#aa4499",
    "tokamax xla": "#e69f00",
    "jax-cce": "#000000",
}
# Some lie on each other: wide lines below, narrow and dashed ones above.
WIDTHS = {PRODUCTS: 6, "optax": 5, "torch": 4, "jaxloss": 3.5, "two-step": 2.5, "jax-cce": 2.5}
DASHED = ("two-step", "tokamax xla", "blocks", "torch chunks", libraries.ALIKE, "jax-cce")


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    each = "time for each shape and dtype (default: %(default)s)"
    add("--seconds", type=float, default=10.0, help=each)
    add("--classes", type=int, default=2**31, help="time no shape of more classes than this")


def prepare(args: argparse.Namespace) -> None:
    measure.keep_pages()


def versions() -> dict[str, str | None]:
    return {name: installed(name) for name in LIBRARIES}


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    few, labels = np.zeros((2, 3)), np.array([0, 2])
    peers, absent = libraries.load(PEERS, lambda p: answers.answer(p, few, labels, {}, "float32"))
    answering = {name: peer for name, peer in peers.items() if name != libraries.ALIKE}
    shapes = [shape for shape in SHAPES if shape[2] <= args.classes]
    stages = {
        "semantics": lambda tick: answers.run(answering, tick),
        "errors": lambda tick: answers.errors(answering, tick),
        "cost": lambda tick: cost(peers, args.seconds, tick, shapes),
    }
    data: dict[str, Any] = {"versions": versions(), "absent": absent}
    for name, each in report.shares(tick, list(stages)):
        each(0, name)
        data[name] = stages[name](each)
    return data


def _cost(
    peers: Mapping[str, Peer], shape: tuple[int, int, int], dtype: str, seconds: float,
    slow: dict[str, str], count: bool, tick: Callable[..., None],
) -> dict[str, Any]:  # fmt: skip
    arrays = linear_case.operands(shape, dtype)
    tried = {name: peer for name, peer in peers.items() if name not in slow}
    found = linear_case.compared(tried, arrays, truth=linear_case.in_float64(*arrays))
    for name in found.calls:
        if (took := found.first_s[name]) > LIMIT:
            slow[name] = f"{took:.0f} s a call at {report.by(shape)}, {dtype}"
    functions = {name: each["both"] for name, each in found.calls.items() if name not in slow}
    memory = {name: call.extra_mib() for name, call in functions.items()}
    products = {name: call.products(shape) for name, call in functions.items() if count}
    functions[PRODUCTS] = linear_case.products_call(arrays)
    times = measure.interleaved(functions, (), seconds, tick)
    return {
        "dtype": dtype,
        "shape": list(shape),
        "rounds": len(times[PRODUCTS]),
        "median_ms": measure.medians_ms(times),
        "of_products": {name: measure.median_ratio(times, name, PRODUCTS) for name in memory},
        "temp_mib": memory,
        "products": products,
        "left_out": slow | found.refused,
    }


def cost(
    peers: Mapping[str, Peer], seconds: float, tick: Callable[..., None],
    shapes: Sequence[tuple[int, int, int]] = SHAPES, dtypes: Sequence[str] = DTYPES,
) -> dict[str, Any]:  # fmt: skip
    cases = [(dtype, shape) for dtype in dtypes for shape in shapes]
    # By dtype: a method that was too slow is not tried on the shapes after it, which are larger.
    slow: dict[str, dict[str, str]] = {dtype: {} for dtype in dtypes}
    rows = [
        # The programs of both dtypes are the same: their products are counted once.
        _cost(peers, shape, dtype, seconds, slow[dtype], dtype == dtypes[0], each)
        for (dtype, shape), each in report.shares(tick, cases)
    ]
    return {"seconds_a_case": seconds, "limit": LIMIT, "rows": rows}


def tables(data: dict[str, Any]) -> list[report.Table]:
    found = [[name, version or "-"] for name, version in data["versions"].items()]
    absent = [[name, why] for name, why in data["absent"].items()]
    return [
        report.Table("Versions", ["package", "version"], found),
        report.Table("Not compared", ["peer", "why"], absent),
        *answers_tables(data["semantics"]),
        *cost_tables(data["cost"]),
    ]


def answers_tables(rows: list[dict]) -> list[report.Table]:
    titles = {"logits": "Losses of logits", "linear": "Losses of hidden @ kernel"}
    rule = (
        f"{WRONG.strip()}: off by more than {answers.TOLERANCE:g} of the truth, or the dtype's eps"
    )
    rule += "; -: no such option, or no one truth; a name of an exception: refused"
    out = []
    for kind, title in titles.items():
        names = [name for name in libraries.LOADERS if name in rows[0][kind]]
        lines, last = [], ""
        for row in rows:
            cells = [row[kind][name] for name in names]
            first = row["question"] if row["question"] != last else ""
            last = row["question"]
            shown = [cell["text"] + WRONG * cell["wrong"] for cell in cells]
            lines.append([first, row["of"], row["truth"], *shown])
        header = ["question", "of", "truth", *(name.replace(" ", "\n") for name in names)]
        out.append(report.Table(f"{title} ({rule})", header, lines))
    return out


def cost_tables(data: dict[str, Any]) -> list[report.Table]:
    """Methods down, shapes across: there are more methods, with longer names."""
    kinds = {
        "of_products": ("time / three bare products", ".2f"),
        "temp_mib": ("temporary MiB", ".0f"),
        "products": ("matrix products of tokens x features x classes, as written", ".2g"),
    }
    out: list[report.Table] = []
    dtypes = list(dict.fromkeys(row["dtype"] for row in data["rows"]))
    for dtype in dtypes:
        rows = [row for row in data["rows"] if row["dtype"] == dtype]
        names = list(dict.fromkeys(n for row in rows for n in [*row["temp_mib"], *row["left_out"]]))
        header = ["", *(report.by(row["shape"]).replace("x ", "x\n") for row in rows)]
        for kind, (title, form) in kinds.items():
            if kind == "products" and dtype != dtypes[0]:
                continue  # not counted
            lines = [
                [n, *("-" if (x := row[kind].get(n)) is None else format(x, form) for row in rows)]
                for n in names
            ]
            if kind == "of_products":
                lines.append(
                    ["products, ms", *(f"{row['median_ms'][PRODUCTS]:.0f}" for row in rows)]
                )
            totals = int(kind == "of_products")
            out.append(report.Table(f"{dtype}: {title}", header, lines, totals))
    reasons = {
        (dtype, name, why): None
        for dtype in dtypes
        for row in data["rows"]
        for name, why in row["left_out"].items()
        if row["dtype"] == dtype
    }
    if reasons:
        title = f"Left out of the times (slower than {data['limit']:g} s a call, or wrong)"
        out.append(report.Table(title, ["dtype", "method", "why"], [list(r) for r in reasons]))
    return out


def _look() -> dict[str, dict[str, Any]]:
    out = {}
    for name, color in COLORS.items():
        if name == PRODUCTS or name in PEERS:
            lw = WIDTHS.get(name, 1.6)
            line = "--" if name in DASHED else "-"
            out[name] = {"color": color, "lw": lw, "ls": line, "marker": "o", "ms": 4}
            out[name]["zorder"] = 2 + 1 / lw
    return out


def plot(data: dict[str, Any], path: Path) -> None:
    _plot_cost(data["cost"], path.with_stem(f"{path.stem}_cost"))
    _plot_errors(data["errors"], path.with_stem(f"{path.stem}_error"))


def _plot_cost(data: dict[str, Any], path: Path) -> None:
    times, memory = report.axes(2)
    sweep = [list(shape) for shape in SWEEP]
    rows = [r for r in data["rows"] if r["dtype"] == "float32" and r["shape"] in sweep]
    classes = [row["shape"][2] for row in rows]
    for ax, kind in ((times, "of_products"), (memory, "temp_mib")):
        for name, style in _look().items():
            found = [(row["shape"][2], row[kind].get(name)) for row in rows]
            found = [(v, y) for v, y in found if y is not None and y > 0]
            if found:
                label = report.EXPLAINED.get(name, name)
                ax.plot(*zip(*found, strict=True), label=label, **style)
        ax.set(xscale="log", yscale="log", xlabel="classes")
        ax.set_xticks(classes, [f"{v:,}" for v in classes])
        ax.minorticks_off()
    ticks = [1, 1.5, 2, 3, 4, 6, 8]
    times.set_yticks(ticks, [f"{x:g}" for x in ticks])
    times.axhline(1, color=COLORS[PRODUCTS], lw=1, label="bare products")
    n, d, _ = SWEEP[0]
    times.set(ylabel="time / three bare products")
    times.set_title(f"Value and both gradients, {n} tokens x {d}, float32", fontsize=10)
    memory.set(ylabel="MiB", title="Temporary memory")
    report.legend_below(times, 4)
    report.save_figure(times, path)


def _plot_errors(rows: list[dict], path: Path) -> None:
    columns, look = report.axes(2), _look()
    kinds = {"loss": "loss", "gradient": "gradient at the label"}
    margins = [row["margin"] for row in rows]
    for ax, (kind, title) in zip(columns, kinds.items(), strict=True):
        for name in rows[0][kind]:
            # On a log axis an error of exactly 0 would leave the picture.
            errors = [max(row[kind][name], 1e-9) for row in rows]
            ax.plot(margins, errors, label=report.EXPLAINED.get(name, name), **look[name])
        ax.set(yscale="log", xlabel="margin of the label's logit over the others", title=title)
        ax.set_ylabel("largest relative error")
        report.mark_zero(ax)
    report.legend_below(columns[0], 4)
    report.save_figure(columns[0], path)
