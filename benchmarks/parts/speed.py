"""Time and temporary memory of value and gradient of logits under one jit, against optax."""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import measure, report
from benchmarks.methods.libraries import LOADERS

SHAPES = ((8192, 10), (16384, 1000), (4096, 4096), (1024, 32000), (256, 128256))
DTYPES = ("float32", "bfloat16")
METHODS = ("optax", "jaxloss")


def _shape(text: str) -> tuple[int, int]:
    try:
        rows, classes = (int(n) for n in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"N,C is expected, as in 4096,32000; got {text}") from None
    if rows < 1 or classes < 1:
        raise argparse.ArgumentTypeError(f"N and C must be positive; got {text}")
    return rows, classes


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    shapes = "time N rows of C classes instead of the usual shapes; may be repeated"
    add("--shape", type=_shape, action="append", metavar="N,C", help=shapes)
    dtypes = "time this dtype instead of float32 and bfloat16; may be repeated"
    add("--dtype", choices=("float32", "bfloat16", "float16"), action="append", help=dtypes)
    each = "time for each shape and dtype (default: %(default)s)"
    add("--seconds", type=float, default=5.0, help=each)


def about_seconds(args: argparse.Namespace) -> float:
    cases = len(args.shape or SHAPES) * len(args.dtype or DTYPES)
    return cases * (args.seconds + 2)


def prepare(args: argparse.Namespace) -> None:
    measure.keep_pages()


def _floor(logits, labels):
    """One pass that reads and writes what any gradient must, with the one exp a logit it needs."""
    return jnp.exp(logits)


def _measure(shape: tuple[int, int], dtype: str, seconds: float, tick) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0))
    logits = jax.random.normal(keys[0], shape, jnp.dtype(dtype))
    args = (logits, jax.random.randint(keys[1], shape[:1], 0, shape[1]))
    losses = {name: LOADERS[name]().logits for name in METHODS}
    functions: dict[str, Any] = {
        name: measure.Program(jax.value_and_grad(loss), *args)  # pyright: ignore
        for name, loss in losses.items()
    }
    eps = float(jnp.finfo(dtype).eps)
    results = {name: f(*args) for name, f in functions.items()}
    measure.check_agree(results, eps, f"{dtype} {shape}")
    memory = {name: f.temp_mib for name, f in functions.items()}
    functions["floor"] = measure.Program(_floor, *args)
    times = measure.interleaved(functions, args, seconds, tick)
    faults = {name: measure.page_faults(f, args) for name, f in functions.items()}
    return {
        "dtype": dtype,
        "shape": list(shape),
        "rounds": len(times["optax"]),
        "median_ms": measure.medians_ms(times),
        "ratio": measure.median_ratio(times, "jaxloss", "optax"),
        "floor_ratio": measure.median_ratio(times, "floor", "optax"),
        "logits_mib": logits.nbytes / measure.MIB,
        "temp_mib": memory,
        "page_faults": faults,
    }


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    dtypes = args.dtype or DTYPES
    cases = [(shape, dtype) for dtype in dtypes for shape in args.shape or SHAPES]
    rows = []
    for (shape, dtype), each in report.shares(tick, cases):
        each(0, f"{dtype} {report.by(shape)}")
        rows.append(_measure(shape, dtype, args.seconds, each))
    means = {
        dtype: {
            name: statistics.geometric_mean(row[name] for row in rows if row["dtype"] == dtype)
            for name in ("ratio", "floor_ratio")
        }
        for dtype in dtypes
    }
    return {"seconds_a_case": args.seconds, "rows": rows, "geometric_mean": means}


def tables(data: dict[str, Any]) -> list[report.Table]:
    header = ["shape", "optax\nms", "jaxloss\nms", "jaxloss\n/ optax", "floor\n/ optax"]
    header += ["logits\nMiB", "jaxloss\ntemp.", "optax\ntemp."]
    out = []
    for dtype, mean in data["geometric_mean"].items():
        lines = []
        for row in data["rows"]:
            if row["dtype"] == dtype:
                ms, mib = row["median_ms"], row["temp_mib"]
                times = [f"{ms['optax']:.2f}", f"{ms['jaxloss']:.2f}"]
                ratios = [f"{row['ratio']:.2f}", f"{row['floor_ratio']:.2f}"]
                sizes = [f"{n:.1f}" for n in (row["logits_mib"], mib["jaxloss"], mib["optax"])]
                lines.append([report.by(row["shape"]), *times, *ratios, *sizes])
        ratios = [f"{mean['ratio']:.2f}", f"{mean['floor_ratio']:.2f}"]
        lines.append(["geometric mean", "", "", *ratios, "", "", ""])
        title = f"{dtype}: value and gradient, temporary MiB (floor: exp alone)"
        out.append(report.Table(title, header, lines, totals=1, found=_found(data, dtype)))
    return out


def _found(data: dict[str, Any], dtype: str) -> str:
    rows = [row for row in data["rows"] if row["dtype"] == dtype]
    found = f"{dtype}: jaxloss takes {data['geometric_mean'][dtype]['ratio']:.2f} of optax's time "
    found += f"({report.span((row['ratio'] for row in rows), '.2f')}), and holds at most "
    mib = {method: max(row["temp_mib"][method] for row in rows) for method in METHODS}
    return found + f"{mib['jaxloss']:.1f} MiB beside the logits, optax {mib['optax']:.1f} MiB."


def plot(data: dict[str, Any], path: Path) -> None:
    columns = report.axes(2)
    labels = [f"{row['dtype']}\n{report.by(row['shape'])}" for row in data["rows"]]
    at = range(len(labels))
    times, memory = columns
    times.barh(
        [i + 0.2 for i in at],
        [row["floor_ratio"] for row in data["rows"]],
        0.4,
        color=report.COLORS["floor"],
        label="exp over the same array",
    )
    times.barh(
        [i - 0.2 for i in at],
        [row["ratio"] for row in data["rows"]],
        0.4,
        color=report.COLORS["jaxloss"],
        label="jaxloss",
    )
    times.axvline(1, color=report.COLORS["optax"], label="optax")
    times.set(xlabel="time / optax's", title="Time of value and gradient")
    for shift, name in ((-0.2, "jaxloss"), (0.2, "optax")):
        share = [row["temp_mib"][name] / row["logits_mib"] for row in data["rows"]]
        color = report.COLORS[name]
        drawn = memory.barh([i + shift for i in at], share, 0.4, color=color, label=name)
        # A bar that is too short to be seen has its number.
        short = [("0" if x < 0.005 else f"{x:.2f}") if x < 0.05 else "" for x in share]
        memory.bar_label(drawn, labels=short, padding=2, fontsize=7, color=color)
    memory.set(xlabel="temporary memory / the logits' own", title="Temporary memory")
    for ax in columns:
        ax.set_yticks(list(at), labels, fontsize=8)
        ax.invert_yaxis()
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, fontsize=8)
    columns[0].get_figure().set_size_inches(14, 1 + 0.55 * len(labels))  # pyright: ignore
    report.save_figure(columns[0], path)
