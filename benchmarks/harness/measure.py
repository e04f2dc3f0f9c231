"""How everything here is measured: compiled once, checked to agree, timed turn by turn."""

import ctypes
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

MIB = 2**20
MIN_ROUNDS, MAX_ROUNDS = 5, 500


def on_cpu_devices(count: int) -> None:
    """So many on this machine, for JAX that has not looked for devices yet."""
    jax.config.update("jax_platforms", "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}"


def keep_pages() -> None:
    """Makes glibc keep freed memory, so that no method is timed with the system's page faults.

    By default every large temporary is mapped and unmapped again in each call. On CPU that took
    longer than the loss itself, and turned a slower method with small temporaries into one twice
    as fast. To be called before JAX has started its threads, which then share the one arena that
    can keep large blocks. Elsewhere than on glibc this does nothing: ``page_faults`` tells.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # from malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in (
        (arena_max, 1),
        (mmap_max, 0),
        (trim_threshold, 2**31 - 1),
        (top_pad, 2**28),
    ):
        mallopt(option, value)


def page_faults(function: Callable, args: Sequence[Any]) -> int | None:
    """Fresh pages that one call asks the system for; None where that is not counted."""
    try:
        import resource
    except ImportError:
        return None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(function(*args))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


class Program:
    """A compiled function that writes its results over those of its last call.

    Results are then no fresh memory, on any backend: see ``keep_pages`` for the temporaries.
    """

    def __init__(self, function: Callable, *args: Any):
        def over(old, *args):
            return function(*args)

        shapes = jax.eval_shape(function, *args)
        self._results = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        jitted = jax.jit(over, donate_argnums=0, keep_unused=True)
        self._executable = jitted.lower(self._results, *args).compile()

    def __call__(self, *args: Any) -> Any:
        """The results are valid until the next call."""
        self._results = self._executable(self._results, *args)
        return self._results

    @property
    def temp_mib(self) -> float:
        """What it allocates beside its inputs and its results."""
        return self._executable.memory_analysis().temp_size_in_bytes / MIB


def refusal(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def check_agree(results: dict[str, Any], eps: float, what: str) -> None:
    """Every result is a pytree of arrays. A method that is wrong is not worth timing.

    Each array may be off by 16 ``eps`` of the largest entry of the first method's.
    """
    (base, expected), *others = results.items()
    for name, result in others:
        for got, want in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
            got, want = got.astype(jnp.float32), want.astype(jnp.float32)
            off, largest = jnp.max(jnp.abs(got - want)), jnp.max(jnp.abs(want))
            # Written so that a NaN on either side fails.
            if not off <= 16 * eps * largest:
                raise AssertionError(
                    f"{what}: {name} and {base} must agree; they differ by {off:.3g} where the "
                    f"largest entry is {largest:.3g}."
                )


def agreeing(results: dict[str, Any], eps: float, what: str) -> dict[str, str]:
    """Takes the results that differ from the first one's out of ``results``; says why of each."""
    (base, expected), *others = results.items()
    why = {}
    for name, result in others:
        try:
            check_agree({base: expected, name: result}, eps, what)
        except AssertionError as error:
            why[name] = refusal(error)
            del results[name]
    return why


def interleaved(
    functions: dict[str, Callable],
    args: Sequence[Any],
    seconds: float,
    tick: Callable[[float], None] = lambda share: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call, round by round: A B C, C A B, ... until the time is used up.

    Taking turns puts a machine's slow moments on every method alike, and an order that changes what
    the one before leaves behind: a chip that it heated, caches. ``tick`` is told the share of the
    budget that is used, between rounds and never while something is timed.
    """
    for function in functions.values():
        jax.block_until_ready(function(*args))
    times: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    start = time.perf_counter()
    for rounds in range(1, MAX_ROUNDS + 1):
        shuffle(order)
        for name in order:
            begin = clock()
            jax.block_until_ready(functions[name](*args))
            times[name].append(clock() - begin)
        used = (time.perf_counter() - start) / seconds
        tick(min(used, 1.0))
        if used >= 1 and rounds >= MIN_ROUNDS:
            break
    return times


def medians_ms(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(each) * 1e3 for name, each in times.items()}


def median_ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """The median of the ratios of neighbours, which drift of the machine does not touch."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))
