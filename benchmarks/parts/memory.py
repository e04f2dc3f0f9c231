"""Temporary memory of the loss of ``hidden @ kernel`` against the number of tokens.

Value and both gradients in float32, as the compiled program plans them; nothing is run.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import measure, report
from benchmarks.methods import libraries

D, V = 512, 32000
TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384)
METHODS = ("optax", "jaxloss", "blocks")
SHOWN = {
    "optax": "optax: all logits",
    "jaxloss": "jaxloss: chunks of tokens",
    "blocks": 'jaxloss: "vocab_blocks"',
}


def about_seconds(args: argparse.Namespace) -> float:
    return 40.0


def planned_mib(loss: Callable, tokens: int) -> float:
    shapes = ((tokens, D), jnp.float32), ((D, V), jnp.float32), ((tokens,), jnp.int32)
    arrays = (jax.ShapeDtypeStruct(*each) for each in shapes)
    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays).compile()
    return program.memory_analysis().temp_size_in_bytes / measure.MIB


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    losses = {name: libraries.linear_loss(libraries.LOADERS[name]()) for name in METHODS}
    rows = []
    for tokens, each in report.shares(tick, TOKENS):
        each(0, f"{tokens} tokens")
        held = {name: planned_mib(loss, tokens) for name, loss in losses.items()}
        rows.append({"tokens": tokens, "temp_mib": held})
    return {"features": D, "classes": V, "rows": rows}


def tables(data: dict[str, Any]) -> list[report.Table]:
    rows = [
        [f"{row['tokens']}", *(f"{row['temp_mib'][name]:.0f}" for name in METHODS)]
        for row in data["rows"]
    ]
    title = f"float32: temporary MiB, {data['features']} features, {data['classes']} classes"
    last = data["rows"][-1]
    ours, blocks = (f"{last['temp_mib'][m] / last['temp_mib']['optax']:.0%}" for m in METHODS[1:])
    found = (
        f"hidden @ kernel of {last['tokens']} tokens: jaxloss holds {ours} of optax's temporary "
    )
    found += f"memory, and {blocks} with vocab_blocks."
    return [report.Table(title, ["tokens", *METHODS], rows, found=found)]


def plot(data: dict[str, Any], path: Path) -> None:
    (ax,) = report.axes()
    tokens = [row["tokens"] for row in data["rows"]]
    colors = {**report.COLORS, "blocks": report.COLORS["two-step"]}
    for name in METHODS:
        held = [row["temp_mib"][name] for row in data["rows"]]
        ax.plot(tokens, held, "o-", color=colors[name], label=SHOWN[name])
        end = {"textcoords": "offset points", "va": "center", "fontsize": 9}
        ax.annotate(f"{held[-1]:,.0f}", (tokens[-1], held[-1]), (7, 0), **end)
    ax.set(
        xscale="log",
        yscale="log",
        xlim=(tokens[0] / 1.2, tokens[-1] * 1.6),
        xlabel="tokens",
        ylabel="temporary memory, MiB",
    )
    ax.set_xticks(tokens, [f"{n:,}" for n in tokens], fontsize=8)
    ax.minorticks_off()
    ax.set_title(
        f"Loss and both gradients of hidden @ kernel\n{data['features']} features, "
        f"{data['classes']:,} classes, float32",
        fontsize=10,
    )
    ax.legend(frameon=False)
    report.save_figure(ax, path)
