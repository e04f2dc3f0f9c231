"""Programs for chips that are not there, by their compilers: what they hold and cost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.harness import hlo
from benchmarks.harness.measure import MIB, refusal


def h200(topology: str = "1x1x1") -> Any:
    """H200s as the CUDA plug-in describes them, without one: ``"1x1x4"`` are four of one host."""
    config = Path(__file__).with_name("h200.txtpb").read_text()
    return topologies.get_topology_desc(
        platform="cuda", target_config=config, topology=topology
    ).devices


def compiled(device: Any, make: Callable, dumps: Path) -> dict[str, Any]:
    """What the program holds and costs, or ``{"refused": the exception's text}``.

    ``make()``, called as on a machine with this device: (function, its arguments' shapes and dtypes
    as a tuple, the steps of those of its loops whose number is computed when they run).
    ``dumps``: the folder of :func:`hlo.dump_to`.
    """
    there = SingleDeviceSharding(device)
    jax.clear_caches()  # what is traced goes by the chip
    try:
        # All of them, so that everyone chooses what they would on the chip.
        with (
            mock.patch.object(jax, "default_backend", return_value=device.platform),
            mock.patch.object(jax, "devices", return_value=[device]),
            mock.patch.object(jax, "device_count", return_value=1),
            jax.default_device(device),
        ):
            function, args, steps = make()
            here = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)  # noqa: E731
            program = jax.jit(function).lower(*jax.tree.map(here, args)).compile()
    except Exception as error:
        hlo.take(dumps)  # of what was compiled before it was refused
        return {"refused": refusal(error)}
    memory, analysis = program.memory_analysis(), program.cost_analysis() or {}  # of TPUs alone
    cost = hlo.cost(program.as_text(), steps, hlo.take(dumps))
    return {
        "peak_mib": memory.peak_memory_in_bytes / MIB,
        "temp_mib": memory.temp_size_in_bytes / MIB,
        "arguments_mib": memory.argument_size_in_bytes / MIB,
        "results_mib": memory.output_size_in_bytes / MIB,
        # Of what is no kernel.
        "product_flops": cost.flops,
        "cycles": cost.cycles,
        "kernels": cost.kernels,
        "kernel_cycles": cost.kernel_cycles,
        "loops": cost.loops,
        # As the compiler gives it, a loop's body counted once.
        "cost_analysis": {
            key: analysis.get(key) for key in ("flops", "bytes accessed", "optimal_seconds")
        },
    }
