"""The package from outside: what it imports, exports and says of itself."""

import ast
import doctest
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

import jaxloss

ROOT = Path(__file__).parent.parent
PACKAGE = Path(jaxloss.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("_*.py") if path.stem != "__init__")


def test_import_is_light():
    program = """
import sys, jaxloss
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
heavy = {"optax", "flax", "haiku", "equinox", "sklearn", "matplotlib", "torch"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_exports():
    public = {name for name in vars(jaxloss) if not name.startswith("_")}
    assert set(jaxloss.__all__) == public
    with open(ROOT / "pyproject.toml", "rb") as file:
        assert jaxloss.__version__ == tomllib.load(file)["project"]["version"]


def test_every_public_docstring_is_whole():
    for name in jaxloss.__all__:
        thing = getattr(jaxloss, name)
        text = thing.__doc__
        takes = "Attributes:" if isinstance(thing, type) else "Args:"
        assert takes in text, name
        if thing not in (jaxloss.TokenStats, jaxloss.MetricSums):  # results: nobody makes one
            assert all(part in text for part in ("Raises", "Example")), name


@pytest.mark.nan_is_meant  # one shows what does not count
@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    with jax.enable_x64(False):  # they print what float32 gives
        result = doctest.testmod(importlib.import_module(f"jaxloss.{module}"))
    assert result.failed == 0


def test_imports_run_one_way():
    """Public functions import the numerics, the targets and the checks, never the reverse."""
    imports = {}
    for module in MODULES:
        tree = ast.parse((PACKAGE / f"{module}.py").read_text())
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxloss"):
                inner = node.module.removeprefix("jaxloss").strip(".")
                found |= {inner} if inner else {alias.name for alias in node.names}
        imports[module] = found
    assert imports == {
        "_casts": set(),
        "_elementary": set(),
        "_labels": set(),
        "_mesh": set(),
        "_forward_mode": set(),
        "_check": set(),
        "_arguments": {"_check", "_labels", "_mesh"},
        "_passes": {"_casts", "_elementary", "_kernels", "_mesh"},
        "_rows": {"_casts", "_elementary", "_forward_mode", "_mesh", "_passes"},
        "_targets": {"_labels", "_mesh", "_passes", "_rows"},
        "_check_labels": {"_arguments", "_check", "_targets"},
        "_total_weight": {"_arguments", "_casts", "_check", "_labels", "_targets"},
        "_terms": {"_casts", "_mesh", "_passes", "_rows", "_targets"},
        "_cross_entropy": {
            "_arguments",
            "_casts",
            "_check",
            "_forward_mode",
            "_labels",
            "_passes",
            "_rows",
            "_targets",
            "_terms",
        },
        "_focal": {
            "_arguments",
            "_casts",
            "_check",
            "_cross_entropy",
            "_elementary",
            "_labels",
            "_targets",
        },
        "_sigmoid": {
            "_arguments",
            "_casts",
            "_check",
            "_cross_entropy",
            "_elementary",
            "_focal",
            "_passes",
            "_targets",
        },
        "_sequences": {"_arguments", "_casts", "_check", "_targets"},
        "_metrics": {
            "_arguments",
            "_casts",
            "_check",
            "_cross_entropy",
            "_elementary",
            "_targets",
            "_terms",
        },
        "_products": {"_casts", "_mesh"},
        "_chunks": {"_mesh"},
        "_linear": {"_casts", "_chunks", "_forward_mode", "_mesh", "_products"},
        "_layout": {"_check", "_labels", "_mesh"},
        "_linear_loss": {
            "_arguments",
            "_casts",
            "_check",
            "_chunks",
            "_cross_entropy",
            "_layout",
            "_linear",
            "_products",
            "_targets",
        },
        "_row_kernel": {
            "_chunks",
            "_kernels.linear_gpu",
            "_kernels.linear_tpu",
            "_passes",
            "_products",
            "_rows",
        },
        "_blocks": {
            "_chunks",
            "_forward_mode",
            "_mesh",
            "_passes",
            "_products",
            "_row_kernel",
            "_rows",
            "_targets",
        },
        "_implementation": {
            "_arguments",
            "_blocks",
            "_check",
            "_chunks",
            "_kernels",
            "_passes",
            "_targets",
        },
        "_linear_cross_entropy": {
            "_arguments",
            "_blocks",
            "_casts",
            "_check",
            "_chunks",
            "_cross_entropy",
            "_implementation",
            "_labels",
            "_layout",
            "_linear",
            "_mesh",
            "_passes",
            "_products",
            "_row_kernel",
            "_targets",
            "_terms",
        },
        "_token_stats": {"_cross_entropy", "_implementation", "_linear_cross_entropy", "_terms"},
        "_divergence_rows": {"_casts", "_elementary", "_forward_mode", "_mesh", "_passes"},
        "_divergence": {
            "_arguments",
            "_check",
            "_chunks",
            "_cross_entropy",
            "_divergence_rows",
            "_layout",
            "_linear",
            "_linear_cross_entropy",
            "_products",
            "_targets",
        },
    }
