"""The loss of ``hidden @ kernel`` by each library: checked to agree, its memory and its time."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import measure
from benchmarks.methods import calls, libraries
from benchmarks.methods.libraries import Peer

PRODUCTS = "products"  # beside the methods: bare matrix products, one or three, no loss of them
SHAPES = ((1024, 512, 32000), (2048, 1024, 8192), (512, 512, 128256))  # N, D, V, for a CPU
PASSES = ("forward", "both")  # "both": forward, and both gradients


def operands(
    shape: tuple[int, int, int], dtype: Any = jnp.bfloat16, seed: int = 0
) -> tuple[jax.Array, ...]:
    """Hidden states, a kernel that keeps the logits' size near 1, and labels."""
    n, d, v = shape
    keys = jax.random.split(jax.random.key(seed), 3)
    hidden = jax.random.normal(keys[0], (n, d), dtype)
    kernel = jax.random.normal(keys[1], (d, v), dtype) * jnp.asarray(d**-0.5, dtype)
    return hidden, kernel, jax.random.randint(keys[2], (n,), 0, v)


def bare_products(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> Any:
    """The logits and both gradients of a loss of ``hidden @ kernel`` need these, whatever it is."""
    logits = hidden @ kernel
    return jnp.zeros(()), (logits @ kernel.T, hidden.T @ logits)


def products_call(arrays: Sequence[jax.Array], what: str = "both") -> calls.Jax:
    return calls.Jax(bare_products if what == "both" else lambda h, k, _: h @ k, arrays)


def loss_call(
    peer: Peer, arrays: Sequence[jax.Array], what: str = "both", logits_dtype: Any = None
) -> calls.Call:
    """The peer's loss of hidden, kernel, labels, which are laid out as the peer takes them."""
    hidden, kernel, labels = arrays
    loss, gradients = libraries.linear_loss(peer, logits_dtype), what == "both"
    given = (hidden, kernel.T if peer.vocab_first else kernel, labels)
    if peer.torch:
        return calls.Torch(loss, given, gradients)
    return calls.Jax(jax.value_and_grad(loss, (0, 1)) if gradients else loss, given)


def in_float64(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> tuple:
    """The mean and both gradients by the definition, a few rows at a time."""
    h, k, y = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64), np.asarray(labels)
    loss, d_hidden, d_kernel = 0.0, np.empty_like(h), np.zeros_like(k)
    for i in range(0, len(h), 64):
        rows = slice(i, i + 64)
        x = h[rows] @ k
        at = np.arange(len(x)), y[rows]
        loss += np.sum(np.max(x, axis=1) - x[at])
        x = np.exp(x - np.max(x, axis=1, keepdims=True))
        total = np.sum(x, axis=1, keepdims=True)
        loss += np.sum(np.log(total))
        x /= total
        x[at] -= 1
        d_hidden[rows] = x @ k.T
        d_kernel += h[rows].T @ x
    return np.array(loss / len(h)), (d_hidden / len(h), d_kernel / len(h))


class Compared(NamedTuple):
    """The methods that run and agree, and why the others are left out."""

    calls: dict[str, dict[str, calls.Call]]  # by method, then by pass
    first_s: dict[str, float]  # seconds of the first call with gradients
    risen_mib: dict[str, float | None]  # by which the device's allocations rose during that call
    refused: dict[str, str]


def compared(
    peers: Mapping[str, Peer],
    arrays: Sequence[jax.Array],
    passes: Sequence[str] = ("both",),
    logits_dtype: Any = None,
    truth: Any = None,
) -> Compared:
    """Runs every method once; each must agree with ``truth``, or else with the first method."""
    found, results, first_s, risen_mib, refused = {}, {}, {}, {}, {}
    for name, peer in peers.items():
        try:
            found[name] = {what: loss_call(peer, arrays, what, logits_dtype) for what in passes}
        except Exception as error:
            refused[name] = measure.refusal(error)
    # From the least memory to the most: a peak shows where it is higher than all before.
    for name in sorted(found, key=lambda name: found[name]["both"].planned_mib or 0.0):
        try:
            begin = time.perf_counter()
            out, risen_mib[name] = calls.risen(found[name]["both"])
            first_s[name] = time.perf_counter() - begin
            loss, (d_hidden, d_kernel) = calls.as_arrays(out)
            d_kernel = d_kernel.T if peers[name].vocab_first else d_kernel
            results[name] = loss, (d_hidden, d_kernel)
        except Exception as error:
            refused[name] = measure.refusal(error)
    results = {name: results[name] for name in peers if name in results}
    if truth is not None:
        results = {"float64": truth, **results}
    (n, d), v, dtype = arrays[0].shape, arrays[1].shape[1], arrays[0].dtype
    # Sums of D products in float32; narrower operands round by more than their sums do.
    eps = float(jnp.finfo(dtype).eps) * (d if dtype == jnp.float32 else 1)
    refused |= measure.agreeing(results, eps, f"{dtype} {(n, d, v)}")
    agreed = {name: found[name] for name in results if name in found}
    return Compared(agreed, first_s, risen_mib, refused)


def forward_and_both(
    shape: tuple[int, int, int], names: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Time and memory in bfloat16 on the device that is here; held logits are float32."""
    n, d, v = shape
    arrays = operands(shape)
    peers, absent = libraries.load(name for name in names if name != PRODUCTS)
    found = compared(peers, arrays, PASSES, jnp.float32)
    memory = {}
    for name, each in found.calls.items():
        planned = each["both"].planned_mib
        extra = each["both"].extra_mib() if planned is None else found.risen_mib[name]
        memory[name] = {"planned_mib": planned, "device_mib": extra}
    timed = dict(found.calls)
    if PRODUCTS in names:
        timed[PRODUCTS] = {what: products_call(arrays, what) for what in PASSES}
    ms = {
        what: calls.median_ms({name: each[what] for name, each in timed.items()}, seconds)
        for what in PASSES
    }
    return {
        "shape": list(shape),
        "product_tflop": 2 * n * d * v / 1e12,  # of one; three are needed
        "forward_ms": ms["forward"],
        "both_ms": ms["both"],
        "memory": memory,
        "refused": absent | found.refused,
    }


def chunk_sizes(shape: tuple[int, int, int], chunks: Sequence[int], seconds: float) -> list:
    arrays, ours = operands(shape), libraries.LOADERS["jaxloss"]()
    programs = {
        size: loss_call(Peer(linear=partial(ours.linear, chunk_size=size)), arrays)  # pyright: ignore
        for size in chunks
    }
    ms = calls.median_ms({str(size): program for size, program in programs.items()}, seconds)
    return [
        {"chunk_size": size, "both_ms": ms[str(size)], "planned_mib": program.planned_mib}
        for size, program in programs.items()
    ]
