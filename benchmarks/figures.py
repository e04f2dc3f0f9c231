"""The few figures that the README shows, from the committed results of several parts."""

from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

from benchmarks.harness import measure, report

SOURCES = ("gpu", "train_lm_ignore", "precision")
MARGIN = 20  # of the label's logit over the others, for the error of a confident row
GIVEN = ("products", "optax", "Liger", "cut-cross-entropy", "torch")  # in this order, where there
SHOWN = {"products": "bare products"}


def _beside(values: dict[str, float], form: str) -> str:
    found = [name for name in GIVEN if name in values]
    return ", ".join(f"{SHOWN.get(name, name)} {values[name]:{form}}" for name in found)


def _time(gpu: dict[str, Any]) -> Iterable[list[str]]:
    """Of the first shape, and of the one that is furthest from its products."""
    first, *others = gpu["linear"]
    last = max(others, key=lambda row: row["both_ms"]["jaxloss"] / row["both_ms"]["products"])
    for row in (first, last):
        ms = row["both_ms"]
        what = f"Loss and both gradients of `hidden @ kernel`, {report.by(row['shape'])}, ms"
        yield [what, f"**{ms['jaxloss']:.1f}**", _beside(ms, ".1f")]


def _memory(gpu: dict[str, Any]) -> list[str]:
    """What the first shape holds beside its operands. Only torch's figures count the gradients."""
    row = gpu["linear"][0]
    tokens, features, classes = row["shape"]
    gradients = 2 * (tokens * features + features * classes) / measure.MIB  # bfloat16
    held = {}
    for name, memory in row["memory"].items():
        of_torch = memory["planned_mib"] is None
        held[name] = memory["device_mib"] if of_torch else memory["planned_mib"] + gradients
    what = f"Memory of the first beside its operands, its gradients ({gradients:.0f}) included, MiB"
    ours = f"**{held['jaxloss']:.0f}**, **{held['blocks']:.0f}** with `vocab_blocks`"
    return [what, ours, _beside(held, ".0f")]


def _ignored(train: dict[str, Any]) -> list[str]:
    ms = {name: run["median_ms"] for name, run in train["runs"].items()}
    what = f"A fine-tuning step with {train['ignored']:.0%} of the labels ignored, on a CPU, ms"
    return [what, f"**{ms['jaxloss']:.0f}**", _beside(ms, ".0f")]


def _error(precision: dict[str, Any]) -> list[str]:
    (row,) = (
        row for row in precision["rows"] if row["dtype"] == "float32" and row["margin"] == MARGIN
    )
    error = row["loss_error"]
    what = f"Relative error of a float32 loss where the label leads by {MARGIN}"
    zero = " (its loss is 0)" if error["optax"] == 1 else ""
    return [what, f"**{error['jaxloss']:.1g}**", _beside(error, ".1g") + zero]


def _bandwidth(gpu: dict[str, Any]) -> list[str]:
    def shares(name: str) -> str:
        found = [row["of_copy"][name] for row in gpu["logits"] if name in row["of_copy"]]
        return f"{min(found):.0%} to {max(found):.0%}"

    columns = [prod(row["shape"][1:]) for row in gpu["logits"]]
    what = f"Share of the memory's bandwidth: loss and gradient of logits, {min(columns)} to "
    what += f"{max(columns)} classes"
    beside = ", ".join(f"{name} {shares(name)}" for name in ("optax", "torch"))
    return [what, f"**{shares('jaxloss')}**", beside]


def tables(folder: Path) -> list[report.Table]:
    gpu, train, precision = (report.load(folder, name) for name in SOURCES)
    rows = [*_time(gpu), _memory(gpu), _ignored(train), _error(precision), _bandwidth(gpu)]
    title = f"{gpu['environment']['device']}, bfloat16, except where a row says otherwise; "
    title += "the sizes of a product are tokens x features x classes"
    return [report.Table(title, ["measured", "jaxloss", "others"], rows, words=True)]
