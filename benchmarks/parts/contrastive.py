"""The losses of pairs: time and temporary memory beside the formula and the bare products."""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxloss
from benchmarks.harness import measure, report

FEATURES = 256
PAIRS = (2048, 4096, 8192)
SCALE, BIAS = 10.0, -10.0  # SigLIP's at first
METHODS = ("products", "formula", "jaxloss")


def options(parser: argparse.ArgumentParser) -> None:
    each = "time for each loss and size (default: %(default)s)"
    parser.add_argument("--seconds", type=float, default=20.0, help=each)


def prepare(args: argparse.Namespace) -> None:
    measure.keep_pages()


def clip(x: jax.Array, y: jax.Array, scale: jax.Array, _: jax.Array) -> jax.Array:
    """As open_clip's ``ClipLoss`` has it."""
    logits = scale * x @ y.T
    both = (jnp.diagonal(jax.nn.log_softmax(z)) for z in (logits, logits.T))
    return -sum(jnp.mean(log_p) for log_p in both) / 2


def siglip(x: jax.Array, y: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """As big_vision has it."""
    logits = scale * x @ y.T + bias
    sign = 2 * jnp.eye(len(x)) - 1
    return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(sign * logits), axis=-1))


def own_clip(x: jax.Array, y: jax.Array, scale: jax.Array, _: jax.Array) -> jax.Array:
    return jaxloss.contrastive_loss(x, y, logit_scale=scale)


def own_siglip(x: jax.Array, y: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return jaxloss.sigmoid_contrastive_loss(x, y, logit_scale=scale, logit_bias=bias)


LOSSES: dict[str, dict[str, Callable]] = {
    "contrastive_loss": {"formula": clip, "jaxloss": own_clip},
    "sigmoid_contrastive_loss": {"formula": siglip, "jaxloss": own_siglip},
}


def products(x: jax.Array, y: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
    """The similarities and both gradients of any loss of them need these three."""
    z = x @ y.T
    return scale, (z @ y, z.T @ x, scale, bias)


def operands(pairs: int) -> tuple[jax.Array, ...]:
    x, noise = (jax.random.normal(jax.random.key(i), (pairs, FEATURES)) for i in range(2))
    x, y = (v / jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (x, x + noise))
    return x, y, jnp.float32(SCALE), jnp.float32(BIAS)


def _measure(name: str, pairs: int, seconds: float, tick: Callable) -> dict[str, Any]:
    given = operands(pairs)
    steps = {"products": products}
    steps |= {k: jax.value_and_grad(f, (0, 1, 2, 3)) for k, f in LOSSES[name].items()}
    programs = {k: measure.Program(f, *given) for k, f in steps.items()}
    results = {k: jax.device_get(programs[k](*given)) for k in ("formula", "jaxloss")}
    measure.check_agree(results, 2e-5, f"{name} of {pairs} pairs")
    times = measure.interleaved(programs, given, seconds, tick)
    return {
        "loss": name,
        "pairs": pairs,
        "rounds": len(times["jaxloss"]),
        "median_ms": {k: 1e3 * statistics.median(v) for k, v in times.items()},
        "of_products": measure.median_ratio(times, "jaxloss", "products"),
        "of_formula": measure.median_ratio(times, "jaxloss", "formula"),
        "temp_mib": {k: programs[k].temp_mib for k in METHODS},
    }


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    rows = []
    cases = [(name, pairs) for name in LOSSES for pairs in PAIRS]
    for (name, pairs), each in report.shares(tick, cases):
        each(0, f"{name}, {pairs}")
        rows.append(_measure(name, pairs, args.seconds, each))
    return {"seconds_a_case": args.seconds, "features": FEATURES, "rows": rows}


def tables(data: dict[str, Any]) -> list[report.Table]:
    header = ["loss", "pairs", "jaxloss\nms", "/ formula", "/ three\nproducts"]
    header += ["MiB\nformula", "MiB\njaxloss"]
    rows = []
    for row in data["rows"]:
        ratios = (f"{row[name]:.2f}" for name in ("of_formula", "of_products"))
        held = (f"{row['temp_mib'][name]:.1f}" for name in ("formula", "jaxloss"))
        ms = f"{row['median_ms']['jaxloss']:.0f}"
        rows.append([f"`{row['loss']}`", str(row["pairs"]), ms, *ratios, *held])
    title = (
        f"Value and all gradients in float32, {data['features']} features: time, over that of the "
        "formula that holds all similarities and over that of its three bare products, as medians "
        "of pairs of neighbouring calls; temporary memory beside the results"
    )
    return [report.Table(title, header, rows)]
