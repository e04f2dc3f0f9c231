"""The parts: a file each, with ``run(args, tick)``, ``tables(data)`` and what it needs of these:

``options(parser)``, ``prepare(args)`` before JAX looks for devices, ``PACKAGES`` whose versions the
results name beside the usual ones, ``about_seconds(args)`` that it takes on an idle machine,
``plot(data, path)``, and ``missed(data)``, which says why the results are a failure.
"""

from importlib import import_module
from typing import Any

# For each part the names of its results, and the options that give them instead of the defaults.
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "digits": {"digits": {}},
    "precision": {"precision": {}},
    "speed": {"speed": {}},
    "linear": {"linear": {}},
    "memory": {"memory": {}},
    "train": {"train_lm": {}, "train_lm_ignore": {"ignore": 0.75}},
    "formulas": {"formulas": {}},
    "overhead": {"overhead": {}},
    "meshes": {"scaling": {}},
    "automatic": {"automatic": {}},
    "sent": {"sent": {}},
    "heads": {"heads": {}},
    "heads_compiled": {"heads_compiled": {}},
    "contrastive": {"contrastive": {}},
    "adoption": {"adoption": {}},
    "large": {"large": {}},
    "gpu": {"gpu": {}},
    "tpu": {"compiled": {}},
    "peers": {"peers": {}},
    "rl": {"rl": {}},
}


def load(part: str) -> Any:
    """The module of a part; no other part is imported, whose packages may not be installed."""
    return import_module(f"benchmarks.parts.{part}")
