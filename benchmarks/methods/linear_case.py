"""The loss of ``hidden @ kernel`` in bfloat16 on the device that is here: time and memory."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jaxloss
from benchmarks.harness import measure
from benchmarks.harness.report import refusal
from benchmarks.methods import calls

PRODUCTS = "products"  # by name, beside the methods: bare ones, one or three, nothing computed


def operands(shape: tuple[int, int, int], seed: int = 0) -> tuple[jax.Array, ...]:
    n, d, v = shape
    keys = jax.random.split(jax.random.key(seed), 3)
    hidden = jax.random.normal(keys[0], (n, d), jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (d, v), jnp.bfloat16) * jnp.bfloat16(d**-0.5)
    return hidden, kernel, jax.random.randint(keys[2], (n,), 0, v)


def _materialised(peer, hidden, kernel, labels):
    return peer.logits(jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32), labels)


def loss_of(name: str) -> Callable:
    """``loss(hidden, kernel, labels)``; optax's logits are held, in float32."""
    peer = calls.LOADERS[name]()
    return peer.linear or partial(_materialised, peer)


def linear_calls(name: str, args: tuple) -> dict[str, Callable]:
    if name == PRODUCTS:
        return {
            "forward": measure.Program(lambda h, k, _: h @ k, *args),
            "both": measure.Program(measure.bare_products, *args),
        }
    peer, loss = calls.LOADERS[name](), loss_of(name)
    if peer.torch:
        hidden, kernel, labels = args
        arrays = (hidden, jnp.array(kernel.T) if peer.vocab_first else kernel, labels)
        return {
            "forward": calls.Torch(loss, arrays, False),
            "both": calls.Torch(loss, arrays, True),
        }
    return {
        "forward": measure.Program(loss, *args),
        "both": measure.Program(jax.value_and_grad(loss, (0, 1)), *args),
    }


def _plan(call: Callable) -> float:
    return call.temp_mib if isinstance(call, measure.Program) else 0.0


def _same_layout(result: Any, kernel: jax.Array) -> Any:
    loss, (d_hidden, d_kernel) = calls.as_arrays(result)
    d_kernel = d_kernel if d_kernel.shape == kernel.shape else d_kernel.T
    return loss, (d_hidden, d_kernel)


def linear_row(shape: tuple[int, int, int], names: Sequence[str], seconds: float) -> dict[str, Any]:
    """Forward, and forward with both gradients, of the methods ``names``."""
    n, d, v = shape
    args = operands(shape)
    found, refused = {}, {}
    for name in names:
        try:
            found[name] = linear_calls(name, args)
        except Exception as error:
            refused[name] = refusal(error)
    results, memory = {}, {}
    # From the least memory to the most: a peak shows where it is higher than all before.
    for name in sorted(found, key=lambda name: _plan(found[name]["both"])):
        both = found[name]["both"]
        if name == PRODUCTS:
            continue
        try:
            out, device_mib = calls.risen(both, args)
            if isinstance(both, calls.Torch):
                both.wait()
                memory[name] = {"planned_mib": None, "device_mib": both.extra_mib()}
            else:
                memory[name] = {"planned_mib": both.temp_mib, "device_mib": device_mib}
            results[name] = _same_layout(out, args[1])
        except Exception as error:
            refused[name] = refusal(error)
    results = {name: results[name] for name in names if name in results}
    refused |= measure.agreeing(results, float(jnp.finfo(jnp.bfloat16).eps), str(shape))
    order = list(results)
    results.clear()
    order += [PRODUCTS] if PRODUCTS in found else []
    ms = {
        what: calls.median_ms({m: found[m][what] for m in order}, args, seconds)
        for what in ("forward", "both")
    }
    return {
        "shape": list(shape),
        "product_tflop": 2 * n * d * v / 1e12,  # of one; three are needed
        "forward_ms": ms["forward"],
        "both_ms": ms["both"],
        "memory": memory,
        "refused": refused,
    }


def chunk_sizes(shape: tuple[int, int, int], chunks: tuple[int, ...], seconds: float) -> list:
    args = operands(shape)
    programs = {}
    for chunk in chunks:
        loss = partial(jaxloss.linear_cross_entropy, chunk_size=chunk)
        programs[str(chunk)] = measure.Program(jax.value_and_grad(loss, (0, 1)), *args)
    ms = calls.median_ms(programs, args, seconds)
    return [
        {"chunk_size": c, "both_ms": ms[str(c)], "planned_mib": programs[str(c)].temp_mib}
        for c in chunks
    ]
