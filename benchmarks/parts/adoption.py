"""The training losses of six trainers, and jaxloss in their place: lines, time and memory.

Value and gradients on each trainer's own mesh of eight CPU devices; the stand-ins for their losses
are in ``benchmarks/trainers``. Times are the processors' time of all devices together.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding

from benchmarks import trainers
from benchmarks.harness import measure, report

SHAPE = (16, 512, 128, 16384)  # rows, length, features, classes
DEVICES = 8
METHODS = {
    "before": "its own",
    "in_parts": "in parts",
    "after": "jaxloss",
    "blocks": "blocks",
}


def prepare(args: argparse.Namespace) -> None:
    measure.on_cpu_devices(DEVICES)
    measure.keep_pages()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=30.0, help="time for each trainer")


def about_seconds(args: argparse.Namespace) -> float:
    return len(trainers.NAMES) * (args.seconds + 20)


def mesh_of(trainer: Any, devices: int) -> Any:
    """Its mesh of automatic axes; of one device all axes are there, and split nothing."""
    sizes = trainer.AXES if devices > 1 else dict.fromkeys(trainer.AXES, 1)
    kinds = (AxisType.Auto,) * len(sizes)
    few = jax.devices()[:devices]
    return jax.make_mesh((*sizes.values(),), (*sizes,), axis_types=kinds, devices=few)


def placed(trainer: Any, mesh: Any, arrays: dict[str, Any]) -> list[Any]:
    return [jax.device_put(x, NamedSharding(mesh, trainer.SPECS[k])) for k, x in arrays.items()]


def by_blocks(trainer: Any) -> Callable:
    return partial(trainer.after, implementation="vocab_blocks")


def step(loss: Callable, trainer: Any) -> Callable:
    """The loss, what is reported beside it, and the gradients of what is trained."""
    return jax.value_and_grad(loss, (*range(len(trainer.TRAINED)),), has_aux=True)


def compiled(function: Callable, given: list[Any]) -> Any:
    return jax.jit(function).lower(*given).compile()


def functions(trainer: Any) -> dict[str, Callable]:
    """The step by each method that the trainer has."""
    found = {"before": trainer.before, "after": trainer.after, "blocks": by_blocks(trainer)}
    if hasattr(trainer, "in_parts"):
        found["in_parts"] = trainer.in_parts
    return {name: step(found[name], trainer) for name in METHODS if name in found}


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    rows = []
    for name, each in report.shares(tick, [*trainers.NAMES]):
        each(0, name)
        trainer = trainers.load(name)
        mesh = mesh_of(trainer, DEVICES)
        with jax.set_mesh(mesh):
            given = placed(trainer, mesh, trainer.operands(*SHAPE))
            programs = {n: compiled(f, given) for n, f in functions(trainer).items()}
            results = {n: jax.device_get(p(*given)) for n, p in programs.items()}
            measure.check_agree(results, 2e-6, name)
            del results
            times = measure.interleaved(programs, given, args.seconds, each, time.process_time)
        lines = trainers.difference(name)
        held = {n: p.memory_analysis().temp_size_in_bytes for n, p in programs.items()}
        rows.append(
            {
                "trainer": name,
                "lines": [sum(line[:1] == sign for line in lines) for sign in "-+"],
                "milliseconds": measure.medians_ms(times),
                "ratio": {n: measure.median_ratio(times, n, "before") for n in programs},
                "temporaries": {n: size / measure.MIB for n, size in held.items()},
            }
        )
    return {"shape": [*SHAPE], "devices": DEVICES, "rows": rows}


def tables(data: dict[str, Any]) -> list[report.Table]:
    def cells(row: dict[str, Any], what: str, form: str) -> list[str]:
        return [f"{row[what][n]:{form}}" if n in row[what] else "-" for n in METHODS]

    header = ["trainer", "lines\nthat go", "lines\nthat come"]
    header += [f"time\n{shown}" for shown in list(METHODS.values())[1:]]
    header += [f"MiB\n{shown}" for shown in METHODS.values()]
    rows = []
    for row in data["rows"]:
        name, lines = trainers.NAMES[row["trainer"]], (f"{n}" for n in row["lines"])
        rows.append(
            [name, *lines, *cells(row, "ratio", ".2f")[1:], *cells(row, "temporaries", ".0f")]
        )
    batch, length, d, v = data["shape"]
    title = (
        "Value and gradients: lines of the step that go and come; the processors' time over that "
        "of the trainer's own loss; and what a device holds beside its operands and results "
        f"({batch} x {length} tokens, {d} features, {v} classes, float32, {data['devices']} CPU "
        "devices)"
    )
    return [report.Table(title, header, rows)]
