"""Heads as they are: narrow products, low-rank and quantised kernels, several heads.

Value and gradients of what is trained, each beside the same loss of logits that are held whole and
beside the bare products: those of the logits and of the gradients that the head has, in the dtype
that it computes in. A frozen kernel has two.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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


def arrays(shape: tuple[int, int, int] = (N, D, V), dtype: Any = jnp.float32) -> dict[str, Any]:
    """``dtype``: of the hidden states and the kernel of a model beside which something else is
    float32: an update, scales."""
    n, d, v = shape
    key = jax.random.split(jax.random.key(0), 5)
    kernel = jax.random.normal(key[1], (d, v)) / d**0.5
    hidden = jax.random.normal(key[0], (n, d))
    scale = jnp.abs(kernel).max(axis=0) / 127
    grouped = jnp.abs(kernel.reshape(GROUPS, d // GROUPS, v)).max(axis=1) / 7
    by_group = jnp.repeat(grouped, d // GROUPS, axis=0)
    return {
        "float32": (hidden, kernel),
        "model's": (hidden.astype(dtype), kernel.astype(dtype)),
        "labels": jax.random.randint(key[2], (n,), 0, v),
        "update": (
            jax.random.normal(key[3], (d, RANK)) / d**0.5,
            jax.random.normal(key[4], (RANK, v)) / 8,
        ),
        "int8": jaxloss.QuantizedKernel(jnp.round(kernel / scale[None]).astype(jnp.int8), scale),
        "int4": jaxloss.QuantizedKernel(jnp.round(kernel / by_group).astype(jnp.int4), grouped),
    }


def _mean(logits, labels):
    logits = logits.astype(jnp.float32)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _dequantised(kernel: Any, dtype: Any) -> Any:
    scale = jnp.atleast_2d(kernel.scale)
    each = kernel.values.shape[0] // scale.shape[0]
    return (kernel.values.astype(jnp.float32) * jnp.repeat(scale, each, axis=0)).astype(dtype)


def _updated(h, k, a, b):
    return h @ k + (h @ a.astype(h.dtype)) @ b.astype(h.dtype)


def _products(h, k, gradients=2):
    """Bare: the logits, d_hidden, and with two gradients d_kernel."""
    x = jax.lax.dot(h, k, preferred_element_type=jnp.float32)
    of_hidden = jax.lax.dot(x.astype(h.dtype), k.T, preferred_element_type=jnp.float32)
    if gradients == 1:
        return of_hidden
    return of_hidden, jax.lax.dot(h.T, x.astype(h.dtype), preferred_element_type=jnp.float32)


def _of_model(h, *given, **options):
    """In the dtype of the hidden states, whatever an update has."""
    return jaxloss.linear_cross_entropy(h, *given, dtype=h.dtype, **options)


class Case(NamedTuple):
    """A head's functions of the same arguments."""

    ours: Callable
    whole: Callable  # of whole logits
    products: Callable  # bare
    operands: Callable  # (arrays) -> the arguments
    which: tuple[int, ...]  # of them are differentiated
    frozen: bool = True  # the kernel, or what an update is added to

    @property
    def functions(self) -> dict[str, Callable]:
        return {
            "jaxloss": jax.value_and_grad(self.ours, self.which),
            "whole logits": jax.value_and_grad(self.whole, self.which),
            "products": self.products,
        }


def _several(x):
    """As many logits, in heads."""
    (h, k), y = x["model's"], x["labels"]
    n, (d, v) = len(h), k.shape
    k = k.reshape(d, HEADS, -1).swapaxes(0, 1)[:, : d // HEADS]
    return h.reshape(n, HEADS, -1), k, jnp.tile(y[:, None], (1, HEADS)) % (v // HEADS)


MIXED, SEVERAL = "float32 operands, dtype=bfloat16", f"{HEADS} heads of V / {HEADS}"


def _quantised(kind: str) -> Case:
    return Case(
        lambda h, head, k, y: _of_model(h, head, y),
        lambda h, head, k, y: _mean(h @ _dequantised(head, h.dtype), y),
        lambda h, head, k, y: _products(h, k, gradients=1),
        lambda x: (x["model's"][0], x[kind], x["model's"][1], x["labels"]),
        (0,),
    )


CASES = {
    "float32": Case(
        jaxloss.linear_cross_entropy,
        lambda h, k, y: _mean(h @ k, y),
        lambda h, k, y: _products(h, k),
        lambda x: (*x["float32"], x["labels"]),
        (0, 1),
        frozen=False,
    ),
    MIXED: Case(
        partial(jaxloss.linear_cross_entropy, dtype=NARROW),
        lambda h, k, y: _mean(h.astype(NARROW) @ k.astype(NARROW), y),
        lambda h, k, y: _products(h.astype(NARROW), k.astype(NARROW)),
        lambda x: (*x["float32"], x["labels"]),
        (0, 1),
        frozen=False,
    ),
    "LowRankKernel": Case(
        lambda h, a, b, k, y: _of_model(h, jaxloss.LowRankKernel(k, a, b), y),
        lambda h, a, b, k, y: _mean(_updated(h, k, a, b), y),
        lambda h, a, b, k, y: _products(h, k, gradients=1),
        lambda x: (x["model's"][0], *x["update"], x["model's"][1], x["labels"]),
        (0, 1, 2),
    ),
    "QuantizedKernel, int8": _quantised("int8"),
    "QuantizedKernel, int4 in groups": _quantised("int4"),
    "LowRankKernel of int4 in groups": Case(
        lambda h, a, b, head, k, y: _of_model(h, jaxloss.LowRankKernel(head, a, b), y),
        lambda h, a, b, head, k, y: _mean(_updated(h, _dequantised(head, h.dtype), a, b), y),
        lambda h, a, b, head, k, y: _products(h, k, gradients=1),
        lambda x: (x["model's"][0], *x["update"], x["int4"], x["model's"][1], x["labels"]),
        (0, 1, 2),
    ),
    SEVERAL: Case(
        jaxloss.linear_cross_entropy,
        lambda h, k, y: _mean(jnp.einsum("nkd,kdv->nkv", h, k), y),
        lambda h, k, y: jax.vmap(_products)(h.swapaxes(0, 1), k),
        _several,
        (0, 1),
        frozen=False,
    ),
}


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    given, rows = arrays(), []
    for name, each in report.shares(tick, [*CASES]):
        each(0, name)
        case = CASES[name]
        operands = case.operands(given)
        programs = {n: measure.Program(f, *operands) for n, f in case.functions.items()}
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
