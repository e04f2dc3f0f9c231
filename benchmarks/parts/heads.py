"""Heads as they are: narrow products, low-rank and quantised kernels, several heads.

Value and gradients of what is trained, each beside the same loss of logits that are held whole and
beside the bare products: those of the logits and of the gradients that the head has, in the dtype
that it computes in. A frozen kernel has two.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxloss
from benchmarks.harness import measure, report

N, D, V, RANK, GROUPS, HEADS = 1024, 512, 32000, 16, 4, 4
NARROW = jnp.bfloat16


def prepare(args: argparse.Namespace) -> None:
    measure.keep_pages()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each head")


def arrays() -> dict[str, Any]:
    key = jax.random.split(jax.random.key(0), 7)
    kernel = jax.random.normal(key[1], (D, V)) / D**0.5
    scale = jnp.abs(kernel).max(axis=0) / 127
    grouped = jnp.abs(kernel.reshape(GROUPS, D // GROUPS, V)).max(axis=1) / 7
    by_group = jnp.repeat(grouped, D // GROUPS, axis=0)
    return {
        "h": jax.random.normal(key[0], (N, D)),
        "k": kernel,
        "y": jax.random.randint(key[2], (N,), 0, V),
        "a": jax.random.normal(key[3], (D, RANK)) / D**0.5,
        "b": jax.random.normal(key[4], (RANK, V)) / 8,
        "int8": jaxloss.QuantizedKernel(jnp.round(kernel / scale[None]).astype(jnp.int8), scale),
        "int4": jaxloss.QuantizedKernel(jnp.round(kernel / by_group).astype(jnp.int4), grouped),
    }


def _mean(logits, labels):
    logits = logits.astype(jnp.float32)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _dequantised(kernel: Any) -> Any:
    scale = jnp.atleast_2d(kernel.scale)
    return kernel.values.astype(jnp.float32) * jnp.repeat(scale, D // scale.shape[0], axis=0)


def _products(h, k, gradients=2):
    """Bare: the logits, d_hidden, and with two gradients d_kernel."""
    x = jax.lax.dot(h, k, preferred_element_type=jnp.float32)
    of_hidden = jax.lax.dot(x.astype(h.dtype), k.T, preferred_element_type=jnp.float32)
    if gradients == 1:
        return of_hidden
    return of_hidden, jax.lax.dot(h.T, x.astype(h.dtype), preferred_element_type=jnp.float32)


def _case(name: str, x: dict[str, Any]) -> tuple[Callable, Callable, Callable, tuple, tuple]:
    """(ours, of whole logits, the bare products; their arguments, which are differentiated)."""
    h, k, y, update = x["h"], x["k"], x["y"], (x["a"], x["b"])
    loss = jaxloss.linear_cross_entropy
    if name == "float32":
        whole, bare = lambda h, k, y: _mean(h @ k, y), lambda h, k, y: _products(h, k)
        return loss, whole, bare, (h, k, y), (0, 1)
    if name == "float32 operands, dtype=bfloat16":
        return (
            partial(loss, dtype=NARROW),
            lambda h, k, y: _mean(h.astype(NARROW) @ k.astype(NARROW), y),
            lambda h, k, y: _products(h.astype(NARROW), k.astype(NARROW)),
            (h, k, y),
            (0, 1),
        )
    if name == "LowRankKernel":
        return (
            lambda h, a, b, k, y: loss(h, jaxloss.LowRankKernel(k, a, b), y),
            lambda h, a, b, k, y: _mean(h @ k + (h @ a) @ b, y),
            lambda h, a, b, k, y: _products(h, k, gradients=1),
            (h, *update, k, y),
            (0, 1, 2),
        )
    if name in ("QuantizedKernel, int8", "QuantizedKernel, int4 in groups"):
        head = x["int8" if "int8" in name else "int4"]
        return (
            lambda h, head, k, y: loss(h, head, y),
            lambda h, head, k, y: _mean(h @ _dequantised(head), y),
            lambda h, head, k, y: _products(h, k, gradients=1),
            (h, head, k, y),
            (0,),
        )
    if name == "LowRankKernel of int4 in groups":
        return (
            lambda h, a, b, head, k, y: loss(h, jaxloss.LowRankKernel(head, a, b), y),
            lambda h, a, b, head, k, y: _mean(h @ _dequantised(head) + (h @ a) @ b, y),
            lambda h, a, b, head, k, y: _products(h, k, gradients=1),
            (h, *update, x["int4"], k, y),
            (0, 1, 2),
        )
    # As many logits, in heads.
    h, k = h.reshape(N, HEADS, -1), k.reshape(D, HEADS, -1).swapaxes(0, 1)[:, : D // HEADS]
    y = jnp.tile(y[:, None], (1, HEADS)) % (V // HEADS)
    return (
        loss,
        lambda h, k, y: _mean(jnp.einsum("nkd,kdv->nkv", h, k), y),
        lambda h, k, y: jax.vmap(_products)(h.swapaxes(0, 1), k),
        (h, k, y),
        (0, 1),
    )


CASES = (
    "float32",
    "float32 operands, dtype=bfloat16",
    "LowRankKernel",
    "QuantizedKernel, int8",
    "QuantizedKernel, int4 in groups",
    "LowRankKernel of int4 in groups",
    f"{HEADS} heads of V / {HEADS}",
)


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    given, rows = arrays(), []
    for name, each in report.shares(tick, CASES):
        each(0, name)
        ours, whole, bare, operands, which = _case(name, given)
        functions = {
            "jaxloss": jax.value_and_grad(ours, which),
            "whole logits": jax.value_and_grad(whole, which),
            "products": bare,
        }
        programs = {n: measure.Program(f, *operands) for n, f in functions.items()}
        found = {n: jax.device_get(programs[n](*operands)) for n in ("jaxloss", "whole logits")}
        measure.check_agree(found, 2e-3 if "bfloat16" in name else 2e-6, name)
        times = measure.interleaved(programs, operands, args.seconds, each)
        row: dict[str, Any] = {"head": name, "milliseconds": measure.medians_ms(times)}
        for method in ("jaxloss", "whole logits"):
            row[method] = {
                "ratio": measure.median_ratio(times, method, "products"),
                "temporaries": programs[method].temp_mib,
            }
        rows.append(row)
    return {"shape": [N, D, V], "rows": rows}


def tables(data: dict[str, Any]) -> list[report.Table]:
    rows = [
        [
            row["head"],
            f"{row['jaxloss']['ratio']:.2f}",
            f"{row['whole logits']['ratio']:.2f}",
            f"{row['jaxloss']['temporaries']:.0f}",
            f"{row['whole logits']['temporaries']:.0f}",
        ]
        for row in data["rows"]
    ]
    header = ["head", "time\njaxloss", "time\nwhole logits", "MiB\njaxloss", "MiB\nwhole logits"]
    title = (
        "Value and gradients of a mean: time over that of the head's bare products, and temporary "
        f"memory; beside the same loss of logits that are held whole ({report.by(data['shape'])})"
    )
    return [report.Table(title, header, rows)]
