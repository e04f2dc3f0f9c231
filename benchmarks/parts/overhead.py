"""What a call costs before any arithmetic, against optax.

Tracing, compilation, the dispatch of an eager call and of a compiled one, and the import.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxloss
from benchmarks.harness import report
from benchmarks.harness.measure import interleaved, median_ratio, medians_ms

N, D, C = 4, 8, 10  # small: the arithmetic takes no time worth measuring
MORE = 512  # tokens, which a linear loss takes in chunks
IN_CHUNKS = f"linear_cross_entropy of {MORE} x {C}"


def _operands() -> dict[str, tuple]:
    keys = jax.random.split(jax.random.key(0), 7)
    logits, teacher = (jax.random.normal(key, (N, C)) for key in keys[:2])
    hidden = jax.random.normal(keys[2], (N, D))
    kernel = jax.random.normal(keys[3], (D, C))
    labels = jax.random.randint(keys[4], (N,), 0, C)
    more = jax.random.normal(keys[5], (MORE, D)), jax.random.randint(keys[6], (MORE,), 0, C)
    probabilities = jax.nn.softmax(teacher)
    return {
        "log_softmax": (logits,),
        "cross_entropy": (logits, labels),
        "cross_entropy of probabilities": (logits, probabilities),
        "kl_divergence": (logits, teacher),
        "sigmoid_cross_entropy": (logits, probabilities),
        "sigmoid_focal_loss": (logits, probabilities),
        "linear_cross_entropy": (hidden, kernel, labels),
        IN_CHUNKS: (more[0], kernel, more[1]),
    }


def _of_product(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels).mean()


OURS = {
    "log_softmax": jaxloss.log_softmax,
    "cross_entropy": jaxloss.cross_entropy,
    "cross_entropy of probabilities": jaxloss.cross_entropy,
    "kl_divergence": jaxloss.kl_divergence,
    "sigmoid_cross_entropy": jaxloss.sigmoid_cross_entropy,
    "sigmoid_focal_loss": jaxloss.sigmoid_focal_loss,
    "linear_cross_entropy": jaxloss.linear_cross_entropy,
    IN_CHUNKS: jaxloss.linear_cross_entropy,
}
# The same numbers from optax, or from JAX where optax has no such function.
THEIRS = {
    "log_softmax": jax.nn.log_softmax,
    "cross_entropy": lambda x, y: optax.softmax_cross_entropy_with_integer_labels(x, y).mean(),
    "cross_entropy of probabilities": lambda x, q: optax.softmax_cross_entropy(x, q).mean(),
    "kl_divergence": lambda x, y: optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(x), jax.nn.log_softmax(y)
    ).mean(),
    "sigmoid_cross_entropy": lambda x, q: optax.sigmoid_binary_cross_entropy(x, q).mean(),
    "sigmoid_focal_loss": lambda x, q: optax.sigmoid_focal_loss(x, q).mean(),
    "linear_cross_entropy": _of_product,
    IN_CHUNKS: _of_product,
}


def _scalar(f: Callable) -> Callable:
    return lambda *args: jnp.sum(f(*args))


def _stages(f: Callable, args: tuple) -> dict[str, float]:
    """Seconds to trace and lower, and to compile, with nothing remembered."""
    jax.clear_caches()
    begin = time.perf_counter()
    lowered = jax.jit(jax.value_and_grad(_scalar(f))).lower(*args)
    middle = time.perf_counter()
    lowered.compile()
    return {"trace": middle - begin, "compile": time.perf_counter() - middle}


def _calls(name: str, rounds: int) -> dict[str, Any]:
    args = _operands()[name]
    pair = {"jaxloss": OURS[name], "optax": THEIRS[name]}
    stages: dict[str, dict[str, list[float]]] = {"trace": {}, "compile": {}}
    for _ in range(rounds):
        for who, f in pair.items():
            for stage, seconds in _stages(f, args).items():
                stages[stage].setdefault(who, []).append(seconds)
    eager = interleaved(pair, args, rounds * 0.05)
    gradients = {who: jax.jit(jax.value_and_grad(_scalar(f))) for who, f in pair.items()}
    compiled = interleaved(gradients, args, rounds * 0.05)
    times = {**stages, "eager": eager, "compiled": compiled}
    return {
        "function": name,
        "median_ms": {what: medians_ms(each) for what, each in times.items()},
        "ratio": {what: median_ratio(each, "jaxloss", "optax") for what, each in times.items()},
    }


def _imports(rounds: int) -> dict[str, float]:
    """Seconds that each import takes beside that of jax, as bytecode."""
    times: dict[str, list[float]] = {"jaxloss": [], "optax": []}
    program = "import jax, time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    with tempfile.TemporaryDirectory() as folder:
        # Where Python is told to write no bytecode beside the sources, each import compiles them.
        cached = {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        for _ in range(rounds + 1):
            for name, each in times.items():
                command = [sys.executable, "-c", program.format(name)]
                found = subprocess.check_output(command, env={**os.environ, **cached})
                each.append(float(found))
    return {name: statistics.median(each[1:]) for name, each in times.items()}  # the first writes


def options(parser: argparse.ArgumentParser) -> None:
    what = "rounds of each measurement (default: %(default)s)"
    parser.add_argument("--rounds", type=int, default=15, help=what)


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    rows = []
    for name, each in report.shares(tick, list(OURS)):
        each(0, name)
        rows.append(_calls(name, args.rounds))
    return {"rows": rows, "import_s": _imports(args.rounds)}


def tables(data: dict[str, Any]) -> list[report.Table]:
    header = ["", "trace\nms", "compile\nms", "eager\nus", "compiled\nus"]
    rows = []
    for row in data["rows"]:
        cells = [row["function"]]
        for what, scale in (("trace", 1), ("compile", 1), ("eager", 1e3), ("compiled", 1e3)):
            ms, ratio = row["median_ms"][what]["jaxloss"], row["ratio"][what]
            cells.append(f"{ms * scale:.0f} ({ratio:.2f})")
        rows.append(cells)
    ms = {name: f"{seconds * 1e3:.0f}" for name, seconds in data["import_s"].items()}
    return [
        report.Table(f"{N} x {C}: time, and its ratio to optax's", header, rows),
        report.Table("import, after jax: ms", list(ms), [list(ms.values())]),
    ]
