"""One call each of JAX's and torch's methods on the same arrays, and what a GPU says of them."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import measure
from benchmarks.methods.libraries import LOADERS, Peer, jaxloss_schedule

BATCH = 0.02  # seconds of calls between two waits: a launch takes as long as a small loss


def _load_liger() -> Peer:
    functional = import_module("liger_kernel.transformers.functional")
    return Peer(linear=functional.liger_fused_linear_cross_entropy, vocab_first=True, torch=True)


def _load_cut() -> Peer:
    loss = import_module("cut_cross_entropy").linear_cross_entropy
    return Peer(linear=loss, vocab_first=True, torch=True)


LOADERS = {
    **LOADERS,
    "jaxloss": jaxloss_schedule(None),
    "kernel": jaxloss_schedule("mosaic_tpu"),
    "mosaic_gpu": jaxloss_schedule("mosaic_gpu"),
    "Liger": _load_liger,
    "cut-cross-entropy": _load_cut,
}


class Torch:
    """A torch loss of the arrays' own memory: ``loss(*arrays, labels)``."""

    def __init__(self, loss: Callable, arrays: Sequence[jax.Array], gradients: bool):
        self._torch = import_module("torch")
        *inputs, labels = (self._torch.from_dlpack(x) for x in arrays)
        if arrays[0].device.platform != "cpu" and not self._torch.cuda.is_available():
            raise RuntimeError("this torch has no CUDA")
        self._inputs = [x.requires_grad_(gradients) for x in inputs]
        self._loss, self._labels, self._gradients = loss, labels.long(), gradients

    def __call__(self, *_: Any) -> Any:
        if not self._gradients:
            with self._torch.no_grad():
                return self._loss(*self._inputs, self._labels)
        for x in self._inputs:
            x.grad = None
        loss = self._loss(*self._inputs, self._labels)
        loss.backward()
        return loss.detach(), tuple(x.grad for x in self._inputs)

    def wait(self) -> None:
        if self._torch.cuda.is_available():
            self._torch.cuda.synchronize()

    def extra_mib(self) -> float | None:
        """The most that one call allocates; its gradients included."""
        if not self._torch.cuda.is_available():
            return None
        for x in self._inputs:
            x.grad = None
        before = self._torch.cuda.memory_allocated()
        self._torch.cuda.reset_peak_memory_stats()
        self()
        return (self._torch.cuda.max_memory_allocated() - before) / measure.MIB


def as_arrays(result: Any) -> Any:
    """A method's results as arrays of JAX."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.from_dlpack(x), result)


def risen(function: Callable, args: Sequence[Any]) -> tuple[Any, float | None]:
    """(its results, MiB by which the device's allocations rose meanwhile).

    None where nothing counts them, or where an earlier call rose higher: peaks are never reset.
    """
    device = jax.devices()[0]
    before = device.memory_stats()
    out = jax.block_until_ready(function(*args))
    after = device.memory_stats()
    if not before or not after or after["peak_bytes_in_use"] <= before["peak_bytes_in_use"]:
        return out, None
    return out, (after["peak_bytes_in_use"] - before["bytes_in_use"]) / measure.MIB


def burst_ms(function: Callable, args: Sequence[Any], count: int = 10) -> float:
    """Of one call, of ``count`` in a row after a pause and three to warm up: a GPU that has been
    busy for longer lowers its clock."""

    def run(repeat):
        start = time.perf_counter()
        jax.block_until_ready(_in_a_row(function, repeat)(*args))
        return time.perf_counter() - start

    time.sleep(1)
    run(3)
    return run(count) / count * 1e3


def _in_a_row(function: Callable, repeat: int) -> Callable:
    def many(*args):
        out = None
        for _ in range(repeat):
            out = function(*args)
        if isinstance(function, Torch):
            function.wait()
            return None
        return out

    return many


def median_ms(functions: dict[str, Callable], args: Sequence[Any], seconds: float) -> dict:
    """Of one call of each; taking turns, so many in a row that launching them is no part of it."""
    rows = {}
    for name, function in functions.items():
        once = _in_a_row(function, 1)
        jax.block_until_ready(once(*args))  # warm
        start = time.perf_counter()
        jax.block_until_ready(once(*args))
        rows[name] = max(1, min(200, math.ceil(BATCH / (time.perf_counter() - start))))
    many = {name: _in_a_row(f, rows[name]) for name, f in functions.items()}
    times = measure.interleaved(many, args, seconds)
    return {name: statistics.median(t) / rows[name] * 1e3 for name, t in times.items()}
