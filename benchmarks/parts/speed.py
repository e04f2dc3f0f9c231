"""Time and temporary memory of value and gradient under one jit, against optax."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxloss
from benchmarks.harness import measure, report

SHAPES = ((8192, 10), (16384, 1000), (4096, 4096), (1024, 32000), (256, 128256))
DTYPES = ("float32", "bfloat16")


def _optax(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


METHODS = {
    "optax": jax.value_and_grad(_optax),
    "jaxloss": jax.value_and_grad(lambda x, y: jaxloss.cross_entropy(x, y)),
}


def _floor(logits, labels):
    """One pass that reads and writes what any gradient must, with the one exp a logit it needs."""
    return jnp.exp(logits)


def _measure(shape: tuple[int, int], dtype: str, seconds: float, tick) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0))
    logits = jax.random.normal(keys[0], shape, jnp.dtype(dtype))
    args = (logits, jax.random.randint(keys[1], shape[:1], 0, shape[1]))
    functions = {name: measure.Program(f, *args) for name, f in METHODS.items()}
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
        "median_ms": {name: statistics.median(t) * 1e3 for name, t in times.items()},
        "ratio": measure.median_ratio(times, "jaxloss", "optax"),
        "floor_ratio": measure.median_ratio(times, "floor", "optax"),
        "logits_mib": logits.nbytes / measure.MIB,
        "temp_mib": memory,
        "page_faults": faults,
    }


def run(
    shapes: Sequence[tuple[int, int]],
    dtypes: Sequence[str],
    seconds: float,
    tick: Callable[[float], None],
) -> dict[str, Any]:
    cases = [(shape, dtype) for dtype in dtypes for shape in shapes]
    rows = []
    for i, (shape, dtype) in enumerate(cases):
        each = lambda share, i=i: tick((i + share) / len(cases))  # noqa: E731
        rows.append(_measure(shape, dtype, seconds, each))
    means = {
        dtype: {
            name: statistics.geometric_mean(row[name] for row in rows if row["dtype"] == dtype)
            for name in ("ratio", "floor_ratio")
        }
        for dtype in dtypes
    }
    return {"seconds_a_case": seconds, "rows": rows, "geometric_mean": means}


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
                lines.append(["{} x {}".format(*row["shape"]), *times, *ratios, *sizes])
        ratios = [f"{mean['ratio']:.2f}", f"{mean['floor_ratio']:.2f}"]
        lines.append(["geometric mean", "", "", *ratios, "", "", ""])
        title = f"{dtype}: value and gradient, temporary MiB (floor: exp alone)"
        out.append(report.Table(title, header, lines, totals=1))
    return out


def plot(data: dict[str, Any], path: Path) -> None:
    columns = report.axes(2)
    labels = [f"{row['dtype']}\n{row['shape'][0]} x {row['shape'][1]}" for row in data["rows"]]
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
        memory.barh([i + shift for i in at], share, 0.4, color=color, label=name)
    memory.set(xlabel="temporary memory / the logits' own", title="Temporary memory")
    for ax in columns:
        ax.set_yticks(list(at), labels, fontsize=8)
        ax.invert_yaxis()
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, fontsize=8)
    columns[0].get_figure().set_size_inches(14, 1 + 0.55 * len(labels))  # pyright: ignore
    report.save_figure(columns[0], path)
