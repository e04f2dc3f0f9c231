"""``python -m benchmarks.overhead``: what a call costs before any arithmetic, against optax.

Tracing, compilation, the dispatch of an eager call and of a compiled one, and the import.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import track

import jaxloss
from benchmarks.harness import report
from benchmarks.harness.environment import describe, environment
from benchmarks.harness.measure import interleaved, median_ratio

N, D, C = 4, 8, 10  # small: the arithmetic takes no time worth measuring
KEYS = jax.random.split(jax.random.key(0), 5)


def _operands() -> dict[str, tuple]:
    logits, teacher = (jax.random.normal(key, (N, C)) for key in KEYS[:2])
    hidden = jax.random.normal(KEYS[2], (N, D))
    kernel = jax.random.normal(KEYS[3], (D, C))
    labels = jax.random.randint(KEYS[4], (N,), 0, C)
    probabilities = jax.nn.softmax(teacher)
    return {
        "log_softmax": (logits,),
        "cross_entropy": (logits, labels),
        "cross_entropy of probabilities": (logits, probabilities),
        "kl_divergence": (logits, teacher),
        "sigmoid_cross_entropy": (logits, probabilities),
        "sigmoid_focal_loss": (logits, probabilities),
        "linear_cross_entropy": (hidden, kernel, labels),
    }


def _product(hidden, kernel, labels):
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels)


OURS = {
    "log_softmax": jaxloss.log_softmax,
    "cross_entropy": jaxloss.cross_entropy,
    "cross_entropy of probabilities": jaxloss.cross_entropy,
    "kl_divergence": jaxloss.kl_divergence,
    "sigmoid_cross_entropy": jaxloss.sigmoid_cross_entropy,
    "sigmoid_focal_loss": jaxloss.sigmoid_focal_loss,
    "linear_cross_entropy": jaxloss.linear_cross_entropy,
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
    "linear_cross_entropy": lambda *args: _product(*args).mean(),
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
        "median_ms": {
            what: {who: statistics.median(t) * 1e3 for who, t in each.items()}
            for what, each in times.items()
        },
        "ratio": {what: median_ratio(each, "jaxloss", "optax") for what, each in times.items()},
    }


def _imports(rounds: int) -> dict[str, float]:
    """Seconds that each import takes beside that of jax."""
    times: dict[str, list[float]] = {"jaxloss": [], "optax": []}
    program = "import jax, time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    for _ in range(rounds):
        for name, each in times.items():
            command = [sys.executable, "-c", program.format(name)]
            each.append(float(subprocess.check_output(command)))
    return {name: statistics.median(each) for name, each in times.items()}


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="of each measurement")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the results")
    args = parser.parse_args()
    console = Console()
    env = environment()
    console.print(describe(env), soft_wrap=True, highlight=False)
    rows = [_calls(name, args.rounds) for name in track(OURS, "measuring", transient=True)]
    data = {"environment": env, "rows": rows, "import_s": _imports(args.rounds)}
    args.out.mkdir(parents=True, exist_ok=True)
    report.save(args.out, "overhead", data)
    for table in tables(data):
        console.print("", report.to_rich(table), sep="\n")


if __name__ == "__main__":
    main()
