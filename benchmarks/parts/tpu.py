"""``python -m benchmarks.compiled``: the linear loss and its peers as TPU compilers see them.

Value and both gradients, compiled for chips that are not there, and never run. The memory plan is
what a chip would hold. The cycles are summed over the program with each loop's body as often as it
runs when every label counts; of an operation they are the compiler's own estimate, or the number of
bundles of instructions it scheduled where that is more: a model of the chip, no measurement.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from benchmarks.harness import hlo, report, schedule

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1", "tpu7x": "tpu7x:2x2x1"}
SHAPES = ((8192, 2048, 128256), (4096, 4096, 128256), (8192, 2304, 256000))  # N, D, V
LARGE = (32768, 4096, 128256)
CASES = (
    *((chip, shape) for chip in ("v5e", "v6e") for shape in SHAPES),
    *((chip, SHAPES[0]) for chip in ("v5p", "tpu7x")),
    ("v6e", LARGE),
)
SWEEPS = (  # of tokens, then of classes
    *((chip, "chunks", SHAPES[0], (256, 512, 1024, 2048, 4096)) for chip in ("v5e", "v6e")),
    ("v6e", "kernel", LARGE, (256, 512, 1024)),
)
NAMES = {
    "optax": "optax",
    "jaxloss": "jaxloss",
    "all": "jaxloss ignore_index=None",
    "chunks": "jaxloss token_chunks",
    "blocks": "jaxloss vocab_blocks",
    "tokamax mosaic_tpu": "tokamax mosaic_tpu",
    "tokamax chunked_xla": "tokamax chunked_xla",
    "tokamax xla": "tokamax xla",
}
SCHEDULES = {"chunks": "token_chunks", "blocks": "vocab_blocks", "kernel": "mosaic_tpu"}
MIB = 2**20


def quiet() -> None:
    """Read when libtpu starts: no machine to ask about itself, no logs, several processes."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_LOG_DIR="disabled",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )


def _chunk_loops(tokens: int, chunk: int) -> list[int]:
    """Steps of the loops over chunks and over quarters of one, where every label counts."""
    chunks, left = divmod(tokens, chunk)
    quarter = chunk // 4 if chunk % 4 == 0 else chunk
    whole = chunks + (left + quarter - 1) // chunk
    left = max(0, -(-(tokens - whole * chunk) // quarter))
    return [whole - 1] * (-(-tokens // chunk) != 1) + [left] * (quarter < chunk)


def _method(name: str, shape: tuple[int, int, int], chunk: int | None) -> tuple[Callable, list]:
    """(its value and gradients, the steps of its open loops); imported only where it is used."""
    import jax
    import jax.numpy as jnp

    import jaxloss

    tokens, _, columns = shape
    steps = []
    if name == "products":

        def function(h, k, y):
            logits = h @ k
            return logits @ k.T, h.T @ logits

        return function, steps
    if name == "jaxloss":
        loss = jaxloss.linear_cross_entropy
    elif name == "all":
        loss = partial(jaxloss.linear_cross_entropy, ignore_index=None)
    elif name in SCHEDULES:
        options = {"implementation": SCHEDULES[name], "chunk_size": chunk}
        loss = partial(jaxloss.linear_cross_entropy, **options)
        if name == "chunks":
            from jaxloss._linear import budget

            steps = _chunk_loops(tokens, chunk or budget.default_chunk(tokens, columns))
    elif name == "optax":
        import optax

        def loss(h, k, y):
            logits = jnp.matmul(h, k, preferred_element_type=jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    else:
        import tokamax

        options = {"reduction": "mean", "implementation": name.removeprefix("tokamax ")}

        def loss(h, k, y):
            return tokamax.linear_softmax_cross_entropy_loss(h, y, k, **options)

    return jax.value_and_grad(loss, (0, 1)), steps


def compiled(
    chip: str, name: str, shape: tuple[int, int, int], chunk: int | None, dumps: Path
) -> dict[str, Any]:
    """What the program holds and costs, or ``{"refused": the exception's text}``."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    device = topology.devices[0]
    n, d, v = shape
    arrays = ((n, d), jnp.bfloat16), ((d, v), jnp.bfloat16), ((n,), jnp.int32)
    args = [jax.ShapeDtypeStruct(*array, sharding=SingleDeviceSharding(device)) for array in arrays]
    jax.clear_caches()  # what is traced goes by the chip
    try:
        # All of them, so that everyone chooses what they would on the chip.
        with (
            mock.patch.object(jax, "default_backend", return_value="tpu"),
            mock.patch.object(jax, "devices", return_value=[device]),
            jax.default_device(device),
        ):
            function, steps = _method(name, shape, chunk)
            program = jax.jit(function).lower(*args).compile()
    except Exception as error:
        schedule.take(dumps)  # of what was compiled before it was refused
        return {"refused": report.refusal(error)}
    memory, analysis = program.memory_analysis(), program.cost_analysis()
    cost = hlo.cost(program.as_text(), steps, schedule.take(dumps))
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


def run(tick: Callable[[str], None], dumps: Path) -> dict[str, Any]:
    from benchmarks.harness.environment import environment, installed

    rows = []
    for chip, shape in CASES:
        programs = {}
        for name in ("products", *NAMES):
            tick(f"{chip} {shape} {name}")
            programs[name] = compiled(chip, name, shape, None, dumps)
        rows.append({"chip": chip, "shape": list(shape), "programs": programs})
    sweeps = []
    for chip, name, shape, sizes in SWEEPS:
        programs = {}
        for size in sizes:
            tick(f"{chip} {shape} {name} chunk_size={size}")
            programs[str(size)] = compiled(chip, name, shape, size, dumps)
        sweeps.append({"chip": chip, "method": name, "shape": list(shape), "programs": programs})
    peers = {name: installed(name) for name in ("libtpu", "tokamax")}
    return {"environment": {**environment(), **peers}, "rows": rows, "chunk_size": sweeps}


def _cell(program: dict[str, Any], key: str, unit: float, form: str) -> str:
    return "refused" if "refused" in program else f"{program[key] / unit:{form}}"


def _of_products(name: str, program: dict[str, Any], products: dict[str, Any]) -> str:
    cell = _cell(program, "cycles", products["cycles"], ".2f")
    if not program.get("kernels"):
        return cell
    if name.startswith("tokamax"):  # branches that not each step takes are most of its kernels
        return f"{cell} + kernels"
    return f"{cell} + {program['kernel_cycles'] / products['cycles']:.2f}"


def tables(data: dict[str, Any]) -> list[report.Table]:
    peers = ", ".join(f"{name} {data['environment'][name]}" for name in ("tokamax", "libtpu"))
    names = [name for name in NAMES if any("peak_mib" in r["programs"][name] for r in data["rows"])]
    case = ["chip", "tokens x features\nx classes"]
    columns = [NAMES[name].replace(" ", "\n") for name in names]
    memory, cycles, refused = [], [], {}
    for row in data["rows"]:
        programs = row["programs"]
        here = [row["chip"], "{} x {} x {}".format(*row["shape"])]
        least = programs["jaxloss"]["arguments_mib"] + programs["jaxloss"]["results_mib"]
        peaks = [_cell(programs[name], "peak_mib", 1, ".0f") for name in names]
        memory.append([*here, f"{least:.0f}", *peaks])
        bare = programs["products"]
        times = [_of_products(name, programs[name], bare) for name in names]
        cycles.append([*here, f"{bare['cycles'] / 1e6:.0f}", *times])
        for name, program in programs.items():
            if "refused" in program:
                where = refused.setdefault((NAMES[name], program["refused"]), [])
                where.append(here)
    out = [
        report.Table(
            f"bfloat16, value and both gradients: peak MiB of one chip ({peers})",
            [*case, "inputs and\ngradients", *columns],
            memory,
        ),
        report.Table(
            "Cycles / those of three bare products; + those of kernels, at most",
            [*case, "products,\nMcycles", *columns],
            cycles,
        ),
    ]
    bare = {(r["chip"], *r["shape"]): r["programs"]["products"] for r in data["rows"]}
    alike = groupby(data["chunk_size"], key=lambda sweep: (sweep["method"], sweep["shape"]))
    for (method, shape), sweeps in alike:
        rows, sizes = [], []
        for sweep in sweeps:
            chip, programs, sizes = sweep["chip"], sweep["programs"].values(), sweep["programs"]
            products = bare[(chip, *shape)]
            rows.append([chip, "peak MiB", *(_cell(p, "peak_mib", 1, ".0f") for p in programs)])
            times = (_of_products(method, p, products) for p in programs)
            rows.append([chip, "cycles / products", *times])
        title = "{} by `chunk_size`, {} x {} x {}".format(SCHEDULES[method], *shape)
        out.append(report.Table(title, ["chip", "", *sizes], rows))
    if refused:
        rows = []
        for (name, text), where in refused.items():
            everywhere = len(where) == len(data["rows"])
            cases = "everywhere" if everywhere else "; ".join(" ".join(w) for w in where)
            rows.append([name, cases, text])
        out.append(report.Table("Refused", ["method", "where", "exception"], rows))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    out = parser.parse_args().out
    sys.argv = sys.argv[:1]  # tokamax reads the command line too, and refuses what it does not know
    quiet()
    import rich

    warnings.simplefilter("ignore")
    with TemporaryDirectory() as folder:
        schedule.dump_to(Path(folder))
        data = run(lambda text: print(text, flush=True), Path(folder))
    report.save(out, "compiled", data)
    for table in tables(data):
        rich.print(report.to_rich(table))


if __name__ == "__main__":
    main()
