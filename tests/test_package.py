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
heavy = {"chex", "optax", "flax", "haiku", "equinox", "sklearn", "matplotlib", "torch"}
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


# From what everything stands on to what is public.
LAYERS = (
    "_casts _check _elementary _forward_mode _jit _labels _mesh",
    "_barriers",
    "_arguments _canonical _chunks _device _entries _layout _logits _products",
    "_passes _prediction _sweeps",
    "_linear _parts",
    "_rows",
    "_divergence_rows _one_pass _row_kernel _targets",
    "_blocks _check_labels _divergence _linear_loss _sequences _terms _total_weight",
    "_cross_entropy _implementation _metrics _schedules",
    "_focal _linear_cross_entropy",
    "_sigmoid _token_stats",
)


def test_imports_run_one_way():
    """A module imports from the layers before its own: no public function from another's rules."""
    before = {"_kernels"}
    assert sorted(" ".join(LAYERS).split()) == MODULES
    for layer in LAYERS:
        for module in layer.split():
            for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxloss"):
                    _, *inner = node.module.split(".")
                    found = set(inner[:1]) or {alias.name for alias in node.names}
                    assert found <= before, (module, found - before)
        before |= {*layer.split()}
