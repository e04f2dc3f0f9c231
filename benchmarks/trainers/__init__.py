"""Stand-ins for the training losses of six trainers: a file each.

``before`` computes what the trainer's own step computes, with its shapes, masks, shardings and
z-loss. ``in_parts``, where there is one, computes it by the trainer's own way of saving memory,
and ``after`` calls jaxloss instead. Each takes the arrays of ``operands`` and returns the loss, and
what the step reports beside it. ``AXES`` is a mesh of eight devices, ``SPECS`` says how it splits
the arrays, and ``TRAINED`` names those that have a gradient.
"""

import difflib
import inspect
from importlib import import_module
from typing import Any

NAMES = {
    "maxtext": "MaxText",
    "tunix": "tunix",
    "levanter": "Levanter",
    "easydel": "EasyDeL",
    "big_vision": "big_vision",
    "nanodo": "nanodo",
}


def load(name: str) -> Any:
    return import_module(f"benchmarks.trainers.{name}")


def body(function: Any) -> list[str]:
    """The lines of a function's body, from the left margin on."""
    lines = inspect.getsource(function).splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith(":")) + 1
    return [line.removeprefix("    ") for line in lines[start:] if line.strip()]


def difference(name: str) -> list[str]:
    """The lines of the step that stay, go ("-") and come ("+")."""
    trainer = load(name)
    before, after = body(trainer.before), body(trainer.after)
    lines = list(difflib.unified_diff(before, after, n=len(before), lineterm=""))
    return lines[3:]  # without the names of the files and the place
