"""One small language model, trained with two losses in turns.

optax's cross-entropy of the logits, against jaxloss.linear_cross_entropy, which never holds them:
the same seed, the same batches, one loss curve, and what a step takes of time and memory.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxloss
from benchmarks.data import text
from benchmarks.data.language_model import LanguageModel
from benchmarks.harness import measure, report

STEPS, VOCAB, DIM, BATCH = 40, 32000, 128, 8
LAYERS, HEAD, LENGTH = 2, 32, 128
SEED, MEGABYTES, LEARNING_RATE, WARMUP = 0, 4.0, 2e-3, 10
PACKAGES = ("tokenizers",)
APART = 1e-3  # relative: how far the two loss curves may be apart
LAST = 10  # perplexity and accuracy are of so many last batches


def _optax(hidden, table, labels, chunk):
    """(loss, the sum of the labels' log-probabilities, the predictions)."""
    del chunk  # all of the logits are there
    logits = hidden @ table.T
    counts = labels != text.IGNORED
    # optax wants a class that exists, also where the label does not count.
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counts, labels, 0))
    loss = losses.mean(where=counts)
    return loss, (-losses.sum(where=counts), jnp.argmax(logits, axis=-1))


def _jaxloss(hidden, table, labels, chunk):
    loss, stats = jaxloss.linear_cross_entropy(
        hidden, table, labels, vocab_axis=0, chunk_size=chunk, return_stats=True
    )
    return loss, (stats.log_prob.sum(), stats.prediction)


LOSSES = {"optax": _optax, "jaxloss": _jaxloss}


def _positive(kind: str) -> int:
    number = int(kind)
    if number < 1:
        raise argparse.ArgumentTypeError(f"it must be positive; got {number}")
    return number


def _share(kind: str) -> float:
    number = float(kind)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"it must be in [0, 1); got {number:g}")
    return number


def _features(kind: str) -> int:
    number = _positive(kind)
    if number % HEAD:
        raise argparse.ArgumentTypeError(f"it must be a multiple of {HEAD}; got {number}")
    return number


def _entries(kind: str) -> int:
    number, smallest = int(kind), 1 + len(text.ALPHABET)
    if number < smallest:
        raise argparse.ArgumentTypeError(f"it must be at least {smallest}, the bytes; got {number}")
    return number


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    for name, kind, default, what in (
        ("--steps", _positive, STEPS, "training steps"),
        ("--vocab", _entries, VOCAB, "entries of the byte-pair vocabulary"),
        ("--dim", _features, DIM, f"features, a multiple of {HEAD}"),
        ("--batch", _positive, BATCH, f"sequences a step, of {LENGTH} tokens each"),
    ):
        add(name, type=kind, default=default, help=f"{what} (default: {default})")
    chunk = "chunk_size of jaxloss (default: what it picks by itself)"
    add("--chunk", type=_positive, help=chunk)
    share = "fine-tuning: ignore this share of the labels, a prompt at the head of each sequence"
    add("--ignore", type=_share, default=0.0, metavar="SHARE", help=share)


def prepare(args: argparse.Namespace) -> None:
    measure.keep_pages()


class Training:
    """A model, its optimizer and the compiled step that replaces both in place."""

    def __init__(self, loss_function: Callable, shape: dict[str, int], chunk, inputs, labels):
        model = LanguageModel(**shape, rngs=nnx.Rngs(SEED))
        rate = optax.linear_schedule(0, LEARNING_RATE, WARMUP)
        optimizer = nnx.Optimizer(model, optax.adamw(rate), wrt=nnx.Param)
        graph, self._state = nnx.split((model, optimizer))

        def loss_of(model, inputs, labels):
            return loss_function(model(inputs), model.tokens.embedding[...], labels, chunk)

        @partial(jax.jit, donate_argnums=0)
        def step(state, inputs, labels):
            model, optimizer = nnx.merge(graph, state)
            gradient = nnx.value_and_grad(loss_of, has_aux=True)
            (loss, (log_prob, prediction)), grads = gradient(model, inputs, labels)
            optimizer.update(model, grads)
            # An ignored label is negative and no prediction equals it.
            right = jnp.sum((labels >= 0) & (prediction == labels))
            return nnx.state((model, optimizer)), (loss, log_prob, right)

        self._step = step.lower(self._state, inputs, labels).compile()
        self.parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
        self.seconds: list[float] = []
        self._history: list[tuple[float, float, int]] = []

    def step(self, inputs, labels) -> float:
        begin = time.perf_counter()
        self._state, out = jax.block_until_ready(self._step(self._state, inputs, labels))
        self.seconds.append(time.perf_counter() - begin)
        loss, log_prob, right = jax.device_get(out)
        self._history.append((float(loss), float(log_prob), int(right)))
        return float(loss)

    def results(self, counted: list[int]) -> dict[str, Any]:
        """``counted``: how many labels count, batch by batch."""
        losses, log_probs, right = (list(x) for x in zip(*self._history, strict=True))
        last = sum(counted[-LAST:])
        sizes = self._step.memory_analysis()
        results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        held = sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes
        return {
            "median_ms": statistics.median(self.seconds) * 1e3,
            "peak_mib": sizes.peak_memory_in_bytes / measure.MIB,
            "temp_mib": sizes.temp_size_in_bytes / measure.MIB,
            "held_mib": held / measure.MIB,
            "perplexity": math.exp(-sum(log_probs[-LAST:]) / last),
            "accuracy": sum(right[-LAST:]) / last,
            "right": sum(right),
            "losses": losses,
        }


def _check_agree(runs: dict[str, Any], counted: int) -> float:
    """The largest relative difference of the loss curves, which must be a small one."""
    curve, base = (np.array(runs[name]["losses"]) for name in ("jaxloss", "optax"))
    apart = float(np.max(np.abs(curve - base) / np.abs(base)))
    right = runs["jaxloss"]["right"], runs["optax"]["right"]
    # Written so that a NaN on either side fails.
    if not apart <= APART:
        raise AssertionError(
            f"The loss curves must agree to {APART:g}; they are {apart:.3g} apart, relatively."
        )
    # A prediction may differ where two logits are equal but for their rounding: seldom.
    if abs(right[0] - right[1]) > max(1, APART * counted):
        raise AssertionError(
            f"Both must predict the same classes; of {counted} labels jaxloss has {right[0]} "
            f"right, optax {right[1]}."
        )
    return apart


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    tick(0, "text")
    texts = text.sources(MEGABYTES)
    tokenizer = text.train_tokenizer(texts, args.vocab)
    tokens = text.encode(tokenizer, texts)
    inputs, labels = text.batches(tokens, args.steps, args.batch, LENGTH, args.ignore, SEED)
    counted = [int(n) for n in np.sum(labels != text.IGNORED, axis=(1, 2))]
    inputs, labels = jnp.asarray(inputs), jnp.asarray(labels)

    vocab = tokenizer.get_vocab_size()
    shape = {"dim": args.dim, "layers": LAYERS, "heads": args.dim // HEAD, "length": LENGTH}
    trainings = {}
    tick(0.1, "compile")
    for name, function in LOSSES.items():
        trainings[name] = Training(
            function, {"vocab": vocab, **shape}, args.chunk, inputs[0], labels[0]
        )

    # In turns: a slow moment of the machine falls on both. The tick is outside of what is timed.
    for i in range(args.steps):
        batch = inputs[i], labels[i]
        jax.block_until_ready(batch)
        losses = {name: training.step(*batch) for name, training in trainings.items()}
        each = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        tick(0.2 + 0.8 * (i + 1) / args.steps, f"loss: {each}")

    runs = {name: training.results(counted) for name, training in trainings.items()}
    times = {name: training.seconds for name, training in trainings.items()}
    return {
        "steps": args.steps,
        "tokens_a_step": args.batch * LENGTH,
        "ignored": 1 - sum(counted) / labels.size,
        "chunk_size": args.chunk,
        "vocab": vocab,
        **shape,
        "parameters": trainings["jaxloss"].parameters,
        "corpus_tokens": len(tokens),
        "curves_apart": _check_agree(runs, sum(counted)),
        "time_ratio": measure.median_ratio(times, "jaxloss", "optax"),
        "runs": runs,
    }


def _ratios(data: dict[str, Any]) -> dict[str, float]:
    """jaxloss / optax."""
    ours, theirs = data["runs"]["jaxloss"], data["runs"]["optax"]
    sizes = ("held_mib", "temp_mib", "peak_mib")
    return {"time": data["time_ratio"]} | {name: ours[name] / theirs[name] for name in sizes}


def _case(data: dict[str, Any]) -> str:
    case = f"{data['parameters'] / 1e6:.1f} M parameters, {data['vocab']} classes, "
    case += f"{data['tokens_a_step']} tokens a step"
    return case + (f", {data['ignored']:.0%} of the labels ignored" if data["ignored"] else "")


def tables(data: dict[str, Any]) -> list[report.Table]:
    rows = []
    for name, result in data["runs"].items():
        speed = data["tokens_a_step"] / (result["median_ms"] / 1e3)
        sizes = [f"{result[size]:.1f}" for size in ("held_mib", "temp_mib", "peak_mib")]
        learnt = [f"{result['perplexity']:.1f}", f"{result['accuracy']:.2%}"]
        rows.append([name, f"{result['median_ms']:.0f}", f"{speed:.0f}", *sizes, *learnt])
    ratio = _ratios(data)
    sizes = [f"{ratio[size]:.2f}" for size in ("held_mib", "temp_mib", "peak_mib")]
    speed = data["runs"]["optax"]["median_ms"] / data["runs"]["jaxloss"]["median_ms"]
    rows.append(["jaxloss / optax", f"{ratio['time']:.2f}", f"{speed:.2f}", *sizes, "", ""])
    title = f"{_case(data)}; {data['steps']} steps, loss curves {data['curves_apart']:.1e} apart"
    # XLA's own peak has the temporaries in it on some backends and not on others.
    if any(result["peak_mib"] < result["temp_mib"] for result in data["runs"].values()):
        title += "; XLA's peak leaves the temporaries out here"
    header = ["loss", "ms\na step", "tokens\na second", "held\nMiB", "temp.\nMiB"]
    header += ["XLA's\npeak", "perplex-\nity", "accu-\nracy"]
    return [report.Table(title, header, rows, totals=1)]


def plot(data: dict[str, Any], path: Path) -> None:
    curves, bars = report.axes(2)
    # The curves lie on each other: a wide one below, a dashed one above.
    styles = {"jaxloss": {"lw": 4, "alpha": 0.45}, "optax": {"lw": 1.2, "ls": "--"}}
    for name in ("jaxloss", "optax"):
        steps = range(1, data["steps"] + 1)
        losses = data["runs"][name]["losses"]
        curves.plot(steps, losses, color=report.COLORS[name], label=name, **styles[name])
    curves.set(xlabel="step", ylabel="training loss (mean of the batch)")
    curves.set_title(f"Two losses, one curve: {data['curves_apart']:.0e} apart at most")
    curves.legend(frameon=False)

    ratio = _ratios(data)
    shown = {"time": "time\na step", "temp_mib": "temporary\nmemory", "held_mib": "memory\nheld"}
    drawn = bars.barh(
        list(shown.values()), [ratio[name] for name in shown], 0.6, color=report.COLORS["jaxloss"]
    )
    bars.bar_label(drawn, fmt="%.2f", padding=3, bbox={"fc": "white", "ec": "none", "pad": 1})
    bars.axvline(1, color=report.COLORS["optax"], label="optax")
    bars.set(xlim=(0, max(1.2, 1.15 * max(ratio[name] for name in shown))))
    bars.set(xlabel="jaxloss / optax", title="The training step")
    bars.invert_yaxis()
    bars.legend(framealpha=1)
    figure = curves.get_figure()
    figure.suptitle(f"Flax NNX transformer: {_case(data)}", fontsize=10)  # pyright: ignore
    report.save_figure(curves, path)
