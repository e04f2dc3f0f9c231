"""The loss of ``hidden @ kernel``: time and temporary memory against its three bare products."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks.harness import measure, report
from benchmarks.methods import libraries, linear_case

IGNORED = 0.75  # of the labels, in the case of fine-tuning
METHODS = ("optax", "jaxloss", "blocks")


def options(parser: argparse.ArgumentParser) -> None:
    each = "time for each shape (default: %(default)s)"
    parser.add_argument("--seconds", type=float, default=10.0, help=each)


def about_seconds(args: argparse.Namespace) -> float:
    return len(linear_case.SHAPES) * (args.seconds + 15)


def prepare(args: argparse.Namespace) -> None:
    measure.keep_pages()


def _measure(shape: tuple[int, int, int], seconds: float, tick) -> dict[str, Any]:
    hidden, kernel, labels = arrays = linear_case.operands(shape, "float32")
    found = linear_case.compared({name: libraries.LOADERS[name]() for name in METHODS}, arrays)
    if found.refused:
        raise AssertionError(found.refused)
    functions: dict[str, Any] = {name: found.calls[name]["both"] for name in METHODS}
    memory = {name: call.planned_mib for name, call in functions.items()}
    functions["floor"] = linear_case.products_call(arrays)
    # The same program on the labels of fine-tuning.
    order = jax.random.permutation(jax.random.key(1), len(labels))
    few = labels.at[order[: int(IGNORED * len(labels))]].set(-100)
    functions["ignored"] = partial(functions["jaxloss"], hidden, kernel, few)
    times = measure.interleaved(functions, (), seconds, tick)
    return {
        "shape": list(shape),
        "rounds": len(times["optax"]),
        "median_ms": measure.medians_ms(times),
        "of_floor": {name: measure.median_ratio(times, name, "floor") for name in METHODS},
        "of_optax": measure.median_ratio(times, "jaxloss", "optax"),
        "ignored_of_all": measure.median_ratio(times, "ignored", "jaxloss"),
        "temp_mib": memory,
        "kernel_mib": kernel.nbytes / measure.MIB,
    }


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    cases = report.shares(tick, linear_case.SHAPES)
    rows = []
    for shape, each in cases:
        each(0, f"hidden @ kernel, {report.by(shape)}")
        rows.append(_measure(shape, args.seconds, each))
    return {"seconds_a_case": args.seconds, "ignored": IGNORED, "rows": rows}


def tables(data: dict[str, Any]) -> list[report.Table]:
    header = ["tokens x features\nx classes", "products\nms", "optax", "jaxloss", "blocks"]
    header += ["jaxloss\n/ optax", f"{data['ignored']:.0%}\nignored"]
    times, sizes = [], []
    for row in data["rows"]:
        name = report.by(row["shape"])
        cells = [f"{row['of_floor'][method]:.2f}" for method in METHODS]
        cells += [f"{row['of_optax']:.2f}", f"{row['ignored_of_all']:.2f}"]
        times.append([name, f"{row['median_ms']['floor']:.0f}", *cells])
        memory = [f"{row['temp_mib'][method]:.0f}" for method in METHODS]
        sizes.append([name, f"{row['kernel_mib']:.0f}", *memory])
    time, memory = _found(data)
    return [
        report.Table(
            "float32: value and both gradients, time / three bare products",
            header,
            times,
            found=time,
        ),
        report.Table(
            "float32: temporary MiB",
            ["tokens x features\nx classes", "kernel\nMiB", *METHODS],
            sizes,
            found=memory,
        ),
    ]


def _found(data: dict[str, Any]) -> tuple[str, str]:
    """Of the times, and of the memory."""

    def span(of_row: Callable[[dict[str, Any]], float], form: str) -> str:
        return report.span(map(of_row, data["rows"]), form)

    time = f"hidden @ kernel: jaxloss takes {span(lambda row: row['of_optax'], '.2f')} of optax's "
    time += f"time, and {span(lambda row: row['ignored_of_all'], '.2f')} of its own with "
    time += f"{data['ignored']:.0%} of the labels ignored."
    ours, blocks = (
        span(lambda row, m=m: row["temp_mib"][m] / row["temp_mib"]["optax"], ".0%")
        for m in ("jaxloss", "blocks")
    )
    memory = f"hidden @ kernel: jaxloss holds {ours} of optax's temporary memory, and {blocks} "
    return time, memory + "with vocab_blocks."


def plot(data: dict[str, Any], path: Path) -> None:
    times, memory = report.axes(2)
    colors = {**report.COLORS, "blocks": report.COLORS["two-step"]}
    names = {"optax": "optax", "jaxloss": "jaxloss", "blocks": "jaxloss, vocab_blocks"}
    at = range(len(data["rows"]))
    for shift, name in zip((-0.27, 0, 0.27), METHODS, strict=True):
        where = [i + shift for i in at]
        style = {"color": colors[name], "label": names[name]}
        times.barh(where, [row["of_floor"][name] for row in data["rows"]], 0.25, **style)
        memory.barh(where, [row["temp_mib"][name] for row in data["rows"]], 0.25, **style)
    times.axvline(1, color=report.COLORS["floor"], label="three products alone")
    times.set(xlabel="time / three bare products", title="Time of value and both gradients")
    memory.set(xlabel="MiB", title="Temporary memory")
    labels = ["{} x {}\nx {}".format(*row["shape"]) for row in data["rows"]]
    for ax in (times, memory):
        ax.set_yticks(list(at), labels, fontsize=8)
        ax.invert_yaxis()
    report.legend_below(times, 4)  # the bars leave no room between them
    report.save_figure(times, path)
