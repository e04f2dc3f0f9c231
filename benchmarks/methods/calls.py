"""One call of a loss on given arrays, by JAX or by torch: its results, its memory and its time."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import measure
from benchmarks.harness.products import jax_products

BATCH = 0.02  # seconds of calls between two waits: a launch takes as long as a small loss


class Jax:
    """``call()``: the results of a compiled function, valid until the next call."""

    wait = staticmethod(jax.block_until_ready)

    def __init__(self, function: Callable, arrays: Sequence[jax.Array]):
        self.arrays, self._function = tuple(arrays), function
        self._program = measure.Program(function, *arrays)
        self.planned_mib = self._program.temp_mib

    def __call__(self, *arrays: jax.Array) -> Any:
        """Other ``arrays`` than the given ones must have the same shapes."""
        return self._program(*(arrays or self.arrays))

    def extra_mib(self) -> float:
        return self.planned_mib

    def products(self, shape: tuple[int, int, int]) -> float:
        return jax_products(self._function, self.arrays, shape)


# For each of torch's products, the two operands among the shapes that the profiler records. Torch's
# own counter knows nothing of addmm_.
_OPERANDS: dict[str, Callable] = {
    "aten::mm": lambda a, b, *_: (a, b),
    "aten::addmm": lambda c, a, b, *_: (a, b),
    "aten::addmm_": lambda c, a, b, *_: (a, b),
}


class Torch:
    """``call()``: a torch loss of the arrays' own memory, and its gradients if they are wanted."""

    planned_mib = None  # torch plans nothing

    def __init__(self, loss: Callable, arrays: Sequence[jax.Array], gradients: bool = True):
        self._torch = import_module("torch")
        self._cuda = self._torch.cuda.is_available()
        if arrays[0].device.platform != "cpu" and not self._cuda:
            raise RuntimeError("this torch has no CUDA")
        *inputs, labels = (self._torch.from_dlpack(x) for x in arrays)
        self._inputs = [x.requires_grad_(gradients) for x in inputs]
        self._loss, self._labels, self._gradients = loss, labels.long(), gradients

    def __call__(self) -> Any:
        with self._torch.set_grad_enabled(self._gradients):
            loss = self._loss(*self._inputs, self._labels)
        if not self._gradients:
            return loss
        return loss.detach(), self._torch.autograd.grad(loss, self._inputs)

    def wait(self, _: Any = None) -> None:
        if self._cuda:
            self._torch.cuda.synchronize()

    def extra_mib(self) -> float:
        """The most that one call holds: on a GPU with its results, on a CPU beside them."""
        if self._cuda:
            before = self._torch.cuda.memory_allocated()
            self._torch.cuda.reset_peak_memory_stats()
            self()
            return (self._torch.cuda.max_memory_allocated() - before) / measure.MIB
        memory = [(e.start_ns(), i, e.nbytes()) for i, e in enumerate(self._events())
                  if e.name() == "[memory]"]  # fmt: skip
        held = np.cumsum([size for _, _, size in sorted(memory)])
        own = sum(x.nbytes for x in jax.tree.leaves(self._results))
        return (float(held.max()) - own) / measure.MIB

    def products(self, shape: tuple[int, int, int]) -> float | None:
        """None where they are within operations that the profiler does not look into."""
        events = self._events()
        operands = [_OPERANDS[e.name()](*e.shapes()) for e in events if e.name() in _OPERANDS]
        flops = sum(2 * m * k * n for (m, k), (_, n) in operands)
        return flops / (2 * math.prod(shape)) or None

    def _events(self) -> list[Any]:
        profiler = self._torch.profiler
        with profiler.profile(
            activities=[profiler.ProfilerActivity.CPU], profile_memory=True, record_shapes=True
        ) as profile:
            self._results = self()  # held, or its end would be among the events
        return profile.profiler.kineto_results.events()


Call = Jax | Torch


def as_arrays(result: Any) -> Any:
    """The results of a call as arrays of JAX."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.from_dlpack(x), result)


def risen(call: Call) -> tuple[Any, float | None]:
    """(the results, MiB by which the device's allocations rose during the call).

    The rise is None where nothing counts it, or where an earlier call rose higher: JAX never resets
    a peak.
    """
    device = jax.devices()[0]
    before = device.memory_stats()
    out = call()
    call.wait(out)
    after = device.memory_stats()
    if not before or not after or after["peak_bytes_in_use"] <= before["peak_bytes_in_use"]:
        return out, None
    return out, (after["peak_bytes_in_use"] - before["bytes_in_use"]) / measure.MIB


def _in_a_row(call: Call, count: int) -> Callable[[], None]:
    def many():
        out = None
        for _ in range(count):
            del out  # the gradients of the call before make room first
            out = call()
        call.wait(out)

    return many


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def burst_ms(call: Call, count: int = 10) -> float:
    """Of one call, of ``count`` in a row after a pause and three to warm up.

    A GPU that has been busy for longer lowers its clock.
    """
    time.sleep(1)
    _in_a_row(call, 3)()
    return _seconds(_in_a_row(call, count)) / count * 1e3


def median_ms(calls: Mapping[str, Call], seconds: float) -> dict[str, float]:
    """Of one call of each; the calls take turns.

    Each turn has so many calls in a row that launching them takes no time of its own.
    """
    counts, many = {}, {}
    for name, call in calls.items():
        once = _in_a_row(call, 1)
        once()  # warm
        counts[name] = max(1, min(200, math.ceil(BATCH / _seconds(once))))
        many[name] = _in_a_row(call, counts[name])
    times = measure.interleaved(many, (), seconds)
    return {name: statistics.median(t) / counts[name] * 1e3 for name, t in times.items()}
