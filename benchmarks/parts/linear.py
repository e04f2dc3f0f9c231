"""The loss of ``hidden @ kernel``: time and temporary memory against its three bare products."""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxloss
from benchmarks.harness import measure, report

SHAPES = ((1024, 512, 32000), (2048, 1024, 8192), (512, 512, 128256))
IGNORED = 0.75  # of the labels, in the case of fine-tuning


def _optax(hidden, kernel, labels):
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels).mean()


def _with_gradients(loss: Callable) -> Callable:
    return jax.value_and_grad(loss, argnums=(0, 1))


METHODS = {
    "optax": _with_gradients(_optax),
    "jaxloss": _with_gradients(jaxloss.linear_cross_entropy),
    "blocks": _with_gradients(partial(jaxloss.linear_cross_entropy, implementation="vocab_blocks")),
}


def _measure(shape: tuple[int, int, int], seconds: float, tick) -> dict[str, Any]:
    n, d, v = shape
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (n, d))
    kernel = jax.random.normal(keys[1], (d, v)) * d**-0.5
    labels = jax.random.randint(keys[2], (n,), 0, v)
    args = (hidden, kernel, labels)
    functions = {name: measure.Program(f, *args) for name, f in METHODS.items()}
    results = {name: f(*args) for name, f in functions.items()}
    measure.check_agree(results, float(jnp.finfo(jnp.float32).eps) * d, f"linear {shape}")
    memory = {name: f.temp_mib for name, f in functions.items()}
    functions["floor"] = measure.Program(measure.bare_products, *args)
    # The same program on the labels of fine-tuning.
    few = labels.at[jax.random.permutation(keys[3], n)[: int(IGNORED * n)]].set(-100)
    ours = functions["jaxloss"]
    functions["ignored"] = lambda hidden, kernel, _: ours(hidden, kernel, few)
    times = measure.interleaved(functions, args, seconds, tick)
    return {
        "shape": list(shape),
        "rounds": len(times["optax"]),
        "median_ms": {name: statistics.median(t) * 1e3 for name, t in times.items()},
        "of_floor": {name: measure.median_ratio(times, name, "floor") for name in METHODS},
        "of_optax": measure.median_ratio(times, "jaxloss", "optax"),
        "ignored_of_all": measure.median_ratio(times, "ignored", "jaxloss"),
        "temp_mib": memory,
        "kernel_mib": kernel.nbytes / measure.MIB,
    }


def run(seconds: float, tick: Callable[[float], None]) -> dict[str, Any]:
    rows = []
    for i, shape in enumerate(SHAPES):
        each = lambda share, i=i: tick((i + share) / len(SHAPES))  # noqa: E731
        rows.append(_measure(shape, seconds, each))
    return {"seconds_a_case": seconds, "ignored": IGNORED, "rows": rows}


def tables(data: dict[str, Any]) -> list[report.Table]:
    header = ["tokens x features\nx classes", "products\nms", "optax", "jaxloss", "blocks"]
    header += ["jaxloss\n/ optax", f"{data['ignored']:.0%}\nignored"]
    times, sizes = [], []
    for row in data["rows"]:
        name = "{} x {} x {}".format(*row["shape"])
        cells = [f"{row['of_floor'][method]:.2f}" for method in METHODS]
        cells += [f"{row['of_optax']:.2f}", f"{row['ignored_of_all']:.2f}"]
        times.append([name, f"{row['median_ms']['floor']:.0f}", *cells])
        memory = [f"{row['temp_mib'][method]:.0f}" for method in METHODS]
        sizes.append([name, f"{row['kernel_mib']:.0f}", *memory])
    return [
        report.Table(
            "float32: value and both gradients, time / three bare products", header, times
        ),
        report.Table(
            "float32: temporary MiB",
            ["tokens x features\nx classes", "kernel\nMiB", *METHODS],
            sizes,
        ),
    ]


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
    # Below the bars, which leave no room between them.
    times.get_figure().legend(  # pyright: ignore
        *times.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4
    )
    report.save_figure(times, path)
