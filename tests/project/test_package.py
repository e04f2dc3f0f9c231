"""The package from outside: what it imports, exports and says of itself."""

import ast
import doctest
import graphlib
import importlib
import inspect
import json
import pydoc
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import jax
import pytest

import jaxloss

ROOT = Path(__file__).parents[2]
PACKAGE = Path(jaxloss.__file__).parent
FILES = {
    ".".join(("jaxloss", *path.relative_to(PACKAGE).with_suffix("").parts)): path
    for path in sorted(PACKAGE.glob("**/*.py"))
    if path.stem != "__init__"
}
MODULES = [name for name in FILES if "._pallas." not in name]


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
        results = jaxloss.TokenStats, jaxloss.ReferenceStats, jaxloss.MetricSums  # nobody makes one
        if thing not in results:
            assert all(part in text for part in ("Raises", "Example")), name


@pytest.mark.nan_is_meant  # one shows what does not count
@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    with jax.enable_x64(False):  # they print what float32 gives
        result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0


USER = """
from typing import assert_type

import jax
import numpy as np

import jaxloss
from jaxloss import LowRankKernel, MetricSums, QuantizedKernel
from jaxloss import Reference, ReferenceStats, TokenStats, TopKLabels


def pick(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return logits[:, 0] + labels


def of_both(stats: TokenStats, reference: ReferenceStats) -> tuple[jax.Array, jax.Array]:
    return stats.log_prob + reference.forward_kl, stats.entropy


def losses(x: jax.Array, y: jax.Array, q: jax.Array, n: np.ndarray, stats: bool) -> None:
    top = TopKLabels(y, q, rest="bucket")
    assert_type(jaxloss.log_softmax(x, (0, 1), where=n, temperature=x), jax.Array)
    assert_type(jaxloss.nll_loss(x, y, weight=n, reduction="none"), jax.Array)
    for labels in (y, q, top, n, 3):
        assert_type(jaxloss.cross_entropy(x, labels), jax.Array)
        assert_type(jaxloss.cross_entropy(x, labels, z_loss=0.1, where=n), jax.Array)
        assert_type(jaxloss.linear_cross_entropy(x, x, labels, chunk_size=4), jax.Array)
        assert_type(jaxloss.token_stats(x, labels), TokenStats)
        assert_type(jaxloss.linear_token_stats(x, x, labels), TokenStats)
        assert_type(jaxloss.total_weight(labels), jax.Array)
    few = QuantizedKernel(n, x)
    for head in (few, LowRankKernel(few, x, n), LowRankKernel(x, x, x, scale=2.0)):
        assert_type(jaxloss.linear_cross_entropy(x, head, y, dtype="bfloat16"), jax.Array)
        assert_type(jaxloss.linear_kl_divergence(x, head, x, head, dtype=np.float32), jax.Array)
    loss, found = jaxloss.cross_entropy(x, top, return_stats=True, reduction="none")
    assert_type(loss, jax.Array)
    assert_type(found, TokenStats)
    assert_type(found.log_prob, jax.Array)
    loss, found = jaxloss.linear_cross_entropy(x, x, y, return_stats=True, bias=n, precision="high")
    assert_type(found, TokenStats)
    assert_type(jaxloss.cross_entropy(x, y, return_stats=False, axis=1), jax.Array)
    either = jaxloss.cross_entropy(x, y, return_stats=stats)
    assert_type(either, jax.Array | tuple[jax.Array, TokenStats])
    either = jaxloss.linear_cross_entropy(x, x, y, return_stats=stats)
    assert_type(either, jax.Array | tuple[jax.Array, TokenStats])
    assert_type(jaxloss.linear_loss(pick, x, x, y, precision=jax.lax.Precision.HIGH), jax.Array)
    own = Reference(x, n, vocab_axis=0)
    pair = jaxloss.linear_token_stats(x, x, y, reference=own, beta=0.1)
    assert_type(pair, tuple[TokenStats, ReferenceStats])
    loss, _ = jaxloss.linear_stats_loss(of_both, x, x, y, reference=own, has_aux=True)
    assert_type(loss, jax.Array)
    assert_type(jaxloss.linear_stats_loss(pick, x, x, top, y, temperature=x), jax.Array)
    assert_type(jaxloss.log_probs_at(x, y, temperature=x), jax.Array)
    found, rest = jaxloss.linear_log_probs_at(x, x, n, return_rest=True, mesh=None)
    assert_type(rest, jax.Array)
    assert_type(jaxloss.linear_top_k(x, x, 4), tuple[jax.Array, jax.Array])
    assert_type(jaxloss.linear_sample(x, x, x, num_samples=2), tuple[jax.Array, jax.Array])
    pair = jaxloss.token_stats(x, top, reference=n, beta=x)
    assert_type(pair, tuple[TokenStats, ReferenceStats])
    assert_type(jaxloss.token_stats(x, y, reference=top), tuple[TokenStats, ReferenceStats])
    assert_type(jaxloss.token_stats(x, y, reference=None), TokenStats)
    found = jaxloss.token_stats(x, y)
    assert_type(jaxloss.kl_divergence(x, x, divergence="jensen_shannon"), jax.Array)
    assert_type(jaxloss.linear_kl_divergence(x, x, x, x, teacher_bias=n), jax.Array)
    assert_type(jaxloss.contrastive_loss(x, n, logit_scale=x, symmetric=False), jax.Array)
    assert_type(jaxloss.sigmoid_contrastive_loss(x, x, logit_bias=-10, where=n), jax.Array)
    assert_type(jaxloss.focal_loss(x, y, gamma=1), jax.Array)
    assert_type(jaxloss.focal_loss(x, y, gamma=x, temperature=n), jax.Array)
    assert_type(jaxloss.sigmoid_cross_entropy(x, y, pos_weight=2.0), jax.Array)
    assert_type(jaxloss.sigmoid_focal_loss(x, y, alpha=0.25), jax.Array)
    assert_type(jaxloss.next_token_labels(y, segment_ids=n), jax.Array)
    assert_type(jaxloss.sequence_weight(y, num_segments=3), jax.Array)
    assert_type(jaxloss.check_labels(y, 5, ignore_index=None), None)
    sums = jaxloss.metric_sums(found, top_k=(1, 5), token_axis_name=("a", "b"))
    assert_type(sums, MetricSums)
    assert_type(sums + sums, MetricSums)
    assert_type(sum([sums], sums), MetricSums)
    assert_type(sums.weight, jax.Array)
    assert_type(jaxloss.metrics(sums)["nll"], jax.Array)
    assert_type(jaxloss.__version__, str)
"""
WRONG = """
import jax

import jaxloss


def losses(x: jax.Array) -> None:
    jaxloss.cross_entropy(x, x, reduction="avg")
    jaxloss.cross_entropy(x, x, zloss=0.1)
    jaxloss.linear_cross_entropy(x, x, "labels")
    a, b = jaxloss.cross_entropy(x, x, return_stats=False).shape, jaxloss.metrics(x)
"""


def pyright(folder, program):
    folder.mkdir()
    (folder / "program.py").write_text(program)
    config = {"include": ["."], "extraPaths": [str(PACKAGE.parent)], "typeCheckingMode": "strict"}
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "--outputjson", "-p", str(folder)]
    done = subprocess.run([*command, "--pythonpath", sys.executable], capture_output=True)
    return [
        (found["range"]["start"]["line"], found["rule"], found["message"])
        for found in json.loads(done.stdout)["generalDiagnostics"]
    ]


def test_a_program_of_every_function_passes_pyright_strict(tmp_path):
    for name in jaxloss.__all__:
        assert name in USER
    assert pyright(tmp_path / "right", USER) == []
    lines = {line for line, *_ in pyright(tmp_path / "wrong", WRONG)}
    assert lines >= {7, 8, 9, 10}


def test_signatures_are_short_and_say_what_comes_back():
    for name in jaxloss.__all__:
        thing = getattr(jaxloss, name)
        signature = inspect.signature(thing)
        text = str(signature)
        assert "numpy" not in text, name
        assert "Union" not in text, name
        if not isinstance(thing, type):
            assert "ArrayLike" in text or name.startswith("metric"), name
            assert "Any" not in text, name
            assert signature.return_annotation is not inspect.Signature.empty, name
        assert "Union[" not in pydoc.plain(pydoc.render_doc(thing)), name


OVERLOADED = {"cross_entropy": "return_stats", "linear_cross_entropy": "return_stats"}
OVERLOADED |= dict.fromkeys(("linear_loss", "linear_stats_loss"), "has_aux")
OVERLOADED |= dict.fromkeys(("log_probs_at", "linear_log_probs_at"), "return_rest")


@pytest.mark.parametrize(("name", "flag"), OVERLOADED.items())
def test_overloads_have_the_options_of_the_function(name, flag):
    function = getattr(jaxloss, name)
    for overload in typing.get_overloads(function):
        parameters = dict(inspect.signature(overload).parameters)
        of_function = dict(inspect.signature(function).parameters)
        options = typing.get_args(typing.get_type_hints(overload)["options"])[0]
        parameters.pop("options")
        assert parameters.pop(flag).annotation in (
            "Literal[False]", "Literal[True]", "bool",
        )  # fmt: skip
        assert of_function.pop(flag).annotation == "bool"
        annotations = {k: v.__forward_arg__ for k, v in options.__annotations__.items()}
        annotations |= {k: v.annotation for k, v in parameters.items()}
        assert annotations == {k: v.annotation for k, v in of_function.items()}


# A room, and the rooms below it that its files may import from, beside its own. The other files of
# the package are functions: they may import from all rooms, and not from each other.
MAY_IMPORT = {
    "_types": "",
    "_xla": "_types",
    "_pallas": "_types _xla",
    "_checks": "_types _xla",
    "_numerics": "_types _pallas _xla",
    "_tokens": "_types _numerics _xla",
    "_linear": "_types _checks _tokens _numerics _pallas _xla",
}


def imports_of(path):
    """The dotted names that a file imports from the package: modules, and names in modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jaxloss":
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_run_one_way():
    for name, path in FILES.items():
        room, *rest = name.split(".")[1:] or ["__init__"]
        if room == "__init__":
            continue
        found = {module.split(".")[1] for module in imports_of(path) if "." in module}
        allowed = {*MAY_IMPORT.get(room, " ".join(MAY_IMPORT)).split()}
        assert found <= allowed | ({room} if rest else set()), (name, found - allowed)


def test_no_files_import_each_other():
    imports = {name: {*imports_of(path)} & {*FILES} - {name} for name, path in FILES.items()}
    graphlib.TopologicalSorter(imports).prepare()  # an error for a circle
