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
NAMES = (*heads.CASES, *contrastive.LOSSES)


def prepare(args: argparse.Namespace) -> None:
    quiet()
    warnings.simplefilter("ignore")


def _device(chip: str) -> Any:
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


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    rows, absent = [], {}
    with TemporaryDirectory() as folder:
        hlo.dump_to(Path(folder))
        for chip, each in report.shares(tick, CHIPS):
            try:
                device = _device(chip)
            except Exception as error:
                absent[chip] = refusal(error)
                continue
            for name, of_name in report.shares(each, NAMES):
                of_name(0, f"{chip}, {name}")
                programs = compiled(device, name, Path(folder))
                rows.append({"chip": chip, "head": name, "programs": programs})
    return {"shape": [*SHAPE], "pairs": [*PAIRS], "rows": rows, "absent": absent}


def _of_products(programs: dict[str, Any], method: str, key: str) -> str:
    program, bare = programs[method], programs["products"]
    if "refused" in program:
        return "refused"
    share = f"{program[key] / bare[key]:.2f}"
    if program["kernels"]:
        share += f" + {program['kernel_cycles'] / bare[key]:.2f}"
    return share


def tables(data: dict[str, Any]) -> list[report.Table]:
    found = {(row["chip"], row["head"]): row["programs"] for row in data["rows"]}
    there = [chip for chip in CHIPS if chip not in data["absent"]]
    names = [name for name in NAMES if (there[0], name) in found]
    words = {"jaxloss": "jaxloss", "whole logits": "whole logits"}
    pairs = ((chip, method) for chip in there for method in words)
    columns = [f"{chip}\n{words[method]}" for chip, method in pairs]
    time, memory = [], []
    for name in names:
        shares, peaks, least = [], [], ""
        for chip in there:
            programs = found[chip, name]
            ours = programs["jaxloss"]
            for method in words:
                key = "product_flops" if chip == "H200" else "cycles"
                shares.append(_of_products(programs, method, key))
                refused = "refused" in programs[method]
                peaks.append("refused" if refused else f"{programs[method]['peak_mib']:.0f}")
            least = least or f"{ours['arguments_mib'] + ours['results_mib']:.0f}"
        time.append([name, *shares])
        memory.append([name, least, *peaks])
    env = data["environment"]
    by = ", ".join(f"{name} {env[name]}" for name in PACKAGES if env[name])
    shape, pairs = report.by(data["shape"]), report.by(data["pairs"])
    out = [
        report.Table(
            "Value and gradients of a mean: cycles over those of the bare products by the model of "
            "a TPU's compiler, + those of kernels, at most; of an H200, for which there is no such "
            "model, the operations of the products over those of the bare ones "
            f"({shape}, pairs {pairs}; {by})",
            ["head", *columns],
            time,
        ),
        report.Table(
            "Peak MiB of one chip, the arguments and the gradients among them",
            ["head", "inputs and\ngradients", *columns],
            memory,
        ),
    ]
    refused = [
        [row["chip"], row["head"], method, program["refused"]]
        for row in data["rows"]
        for method, program in row["programs"].items()
        if "refused" in program
    ]
    if refused:
        header = ["chip", "head", "method", "exception"]
        out.append(report.Table("Refused", header, refused, words=True))
    if data["absent"]:
        header = ["chip", "why there is no compiler for it"]
        rows = [[*pair] for pair in data["absent"].items()]
        out.append(report.Table("Not compiled", header, rows, words=True))
    return out
