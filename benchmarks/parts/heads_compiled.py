"""Heads as they are, and losses of pairs, as compilers for TPUs and for an H200 see them.

Value and gradients of what is trained, each beside the same loss of logits that are held whole and
beside the head's bare products; compiled for chips that are not there, and never run. The cycles of
a TPU are those of :mod:`benchmarks.parts.tpu`: a model of the chip, no measurement. The compiler
for an H200 has no such model: of it there are memory and the operations of the products.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks.harness import chips, hlo, report
from benchmarks.harness.environment import environment
from benchmarks.harness.measure import refusal
from benchmarks.parts import contrastive, heads
from benchmarks.parts.tpu import TOPOLOGIES, chunk_loops, quiet
from jaxloss._linear import budget

PACKAGES = ("libtpu", "jax-cuda13-plugin")
SHAPE = (8192, 2048, 128256)  # N, D, V
PAIRS = (16384, 768)  # pairs, features; in float32
DTYPE = jnp.bfloat16  # of a model's hidden states and kernel
CHIPS = ("v5e", "v6e", "H200")
METHODS = ("products", "whole logits", "jaxloss")
SHOWN = ("jaxloss", "whole logits")
NAMES = (*heads.CASES, *contrastive.LOSSES)


def prepare(args: argparse.Namespace) -> None:
    quiet()
    warnings.simplefilter("ignore")


def device_of(chip: str) -> Any:
    if chip == "H200":
        return chips.h200()[0]
    found = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    return found.devices[0]


def _of_head(name: str, method: str, shape: tuple[int, int, int]) -> tuple[Callable, tuple, list]:
    case = heads.CASES[name]
    args = jax.eval_shape(lambda: case.operands(heads.arrays(shape, DTYPE)))
    steps = _steps(case, shape) if method == "jaxloss" else []
    return case.functions[method], args, steps


def _steps(case: heads.Case, shape: tuple[int, int, int]) -> list[int]:
    """Of the loops over chunks of tokens; the kernels of a TPU take blocks, as many in any call."""
    tokens, features, columns = shape
    if case is heads.CASES[heads.MIXED] and jax.default_backend() == "tpu":
        return []
    if case is heads.CASES[heads.SEVERAL]:
        features, columns = features // heads.HEADS, columns // heads.HEADS
    chunk = budget.default_chunk(tokens, columns, features)
    if case.frozen:
        chunk = budget.value_chunk(chunk, columns, budget.FROZEN_KERNEL_MIB)
    return chunk_loops(tokens, chunk)


def _of_pairs(name: str, method: str, pairs: tuple[int, int]) -> tuple[Callable, tuple, list]:
    rows = jax.ShapeDtypeStruct(pairs, jnp.float32)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    if method == "products":
        function = contrastive.products
    else:
        loss = contrastive.LOSSES[name]["formula" if method == "whole logits" else method]
        function = jax.value_and_grad(loss, (0, 1, 2, 3))
    return function, (rows, rows, number, number), []


def compiled(
    device: Any,
    name: str,
    dumps: Path,
    shape: tuple[int, int, int] = SHAPE,
    pairs: tuple[int, int] = PAIRS,
) -> dict[str, Any]:
    """Each method of a head, or of a loss of pairs."""
    given = {"pairs": pairs} if name in contrastive.LOSSES else {"shape": shape}
    of = partial(_of_pairs if name in contrastive.LOSSES else _of_head, name, **given)
    return {m: chips.compiled(device, partial(of, method=m), dumps) for m in METHODS}


def options(parser: argparse.ArgumentParser) -> None:
    what = "this chip alone, added to the results that are there"
    parser.add_argument("--add", choices=CHIPS, help=what)


def _others(chip: str) -> list[dict[str, Any]]:
    """The rows of the results that are there: of the same compilers."""
    data, now = report.load(report.RESULTS, "heads_compiled"), environment(*PACKAGES)
    names = *PACKAGES, "jax", "jaxlib"
    if other := [name for name in names if now[name] != data["environment"][name]]:
        raise SystemExit(f"--add: other versions of {', '.join(other)} made {report.RESULTS}.")
    return [row for row in data["rows"] if row["chip"] != chip]


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    rows, absent = _others(args.add) if args.add else [], {}
    with TemporaryDirectory() as folder:
        hlo.dump_to(Path(folder))
        for chip, each in report.shares(tick, [args.add] if args.add else CHIPS):
            try:
                device = device_of(chip)
            except Exception as error:
                absent[chip] = refusal(error)
                continue
            for name, of_name in report.shares(each, NAMES):
                of_name(0, f"{chip}, {name}")
                programs = compiled(device, name, Path(folder))
                rows.append({"chip": chip, "head": name, "programs": programs})
    return {"shape": [*SHAPE], "pairs": [*PAIRS], "rows": rows, "absent": absent}


def _of_products(chip: str, programs: dict[str, Any], method: str) -> str:
    program, bare = programs[method], programs["products"]
    if "refused" in program:
        return "refused"
    key = "product_flops" if chip == "H200" else "cycles"
    share = f"{program[key] / bare[key]:.2f}"
    if not program["kernels"]:
        return share
    return f"{share} + {program['kernel_cycles'] / bare['cycles']:.2f}"


def _peak(program: dict[str, Any]) -> str:
    return "refused" if "refused" in program else f"{program['peak_mib']:.0f}"


def tables(data: dict[str, Any]) -> list[report.Table]:
    found = {(row["chip"], row["head"]): row["programs"] for row in data["rows"]}
    there = [chip for chip in CHIPS if (chip, NAMES[0]) in found]
    columns = [(chip, method) for chip in there for method in SHOWN]
    time, memory = [], []
    for name in NAMES if there else ():
        ours = found[there[0], name]["jaxloss"]
        least = f"{ours['arguments_mib'] + ours['results_mib']:.0f}"
        time.append([name, *(_of_products(chip, found[chip, name], m) for chip, m in columns)])
        memory.append([name, least, *(_peak(found[chip, name][m]) for chip, m in columns)])
    compilers = ", ".join(f"{name} {data['environment'].get(name)}" for name in PACKAGES)
    header = [f"{chip}\n{method}" for chip, method in columns]
    title = (
        "Value and gradients of a mean: cycles over those of the bare products, + kernels', "
        "at most, by the model of a TPU's compiler; of an H200 the products' operations over the "
        f"bare ones' ({report.by(data['shape'])}; pairs: {report.by(data['pairs'])})"
    )
    peaks = f"Peak MiB of one chip, the arguments and the gradients among them ({compilers})"
    refused = [
        [row["chip"], row["head"], method, program["refused"]]
        for row in data["rows"]
        for method, program in row["programs"].items()
        if "refused" in program
    ]
    absent = [[*pair] for pair in data["absent"].items()]
    all_tables = [
        report.Table(title, ["head", *header], time),
        report.Table(peaks, ["head", "inputs and\ngradients", *header], memory),
        report.Table("Refused", ["chip", "head", "method", "exception"], refused, words=True),
        report.Table("Not compiled", ["chip", "why"], absent, words=True),
    ]
    return [table for table in all_tables if table.rows]
