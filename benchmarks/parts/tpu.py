"""The linear loss and its peers as TPU compilers see them.

Value and both gradients, compiled for chips that are not there, and never run. The memory plan is
what a chip would hold. The cycles are summed over the program with each loop's body as often as it
runs when every label counts; of an operation they are the compiler's own estimate, or the number of
bundles of instructions it scheduled where that is more: a model of the chip, no measurement.
"""

import argparse
import os
import warnings
from collections.abc import Callable
from functools import partial
from itertools import count, groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks.harness import chips, hlo, report
from benchmarks.harness.environment import environment
from benchmarks.methods.libraries import LOADERS, linear_loss
from jaxloss._linear import budget

PACKAGES = ("libtpu", "tokamax")
COMPILERS = ("libtpu", "jax", "jaxlib")
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
    "stored": "jaxloss stored_exponentials",
    "tokamax mosaic_tpu": "tokamax mosaic_tpu",
    "tokamax chunked_xla": "tokamax chunked_xla",
    "tokamax xla": "tokamax xla",
}
SCHEDULES = {
    "chunks": "token_chunks",
    "blocks": "vocab_blocks",
    "kernel": "mosaic_tpu",
    "stored": "stored_exponentials",
}


def quiet() -> None:
    """For libtpu, when it starts: no machine to ask about itself, no logs, several processes."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_LOG_DIR="disabled",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )


def options(parser: argparse.ArgumentParser) -> None:
    what = "this method alone, added to the results that are there"
    parser.add_argument("--add", choices=NAMES, help=what)


def prepare(args: argparse.Namespace) -> None:
    quiet()
    warnings.simplefilter("ignore")


def chunk_loops(tokens: int, chunk: int) -> list[int]:
    """Steps of the loops over chunks and over quarters of one, where every label counts."""
    chunks, left = divmod(tokens, chunk)
    quarter = chunk // 4 if chunk % 4 == 0 else chunk
    whole = chunks + (left + quarter - 1) // chunk
    left = max(0, -(-(tokens - whole * chunk) // quarter))
    return [whole - 1] * (-(-tokens // chunk) != 1) + [left] * (quarter < chunk)


def _products(h, k, y):
    logits = h @ k
    return logits @ k.T, h.T @ logits


def _method(name: str, shape: tuple[int, int, int], chunk: int | None) -> tuple[Callable, list]:
    """(its value and gradients, the steps of its open loops)"""
    if name == "products":
        return _products, []
    peer = LOADERS["jaxloss" if name == "all" else name]()
    loss, steps = linear_loss(peer, jnp.float32), []
    if name == "all":
        loss = partial(loss, ignore_index=None)
    if name in SCHEDULES:
        loss = partial(loss, chunk_size=chunk)
    if name == "chunks":
        tokens, _, columns = shape
        steps = chunk_loops(tokens, chunk or budget.default_chunk(tokens, columns))
    if name == "stored":
        tokens, features, columns = shape
        chunk = chunk or budget.default_stored_chunk(tokens, columns, features)
        # In each step stands a loop over rows whose sum is too large, which none is.
        steps = [0, *(n for steps in chunk_loops(tokens, chunk) for n in (steps, 0))]
    return jax.value_and_grad(loss, (0, 1)), steps


def compiled(
    chip: str, name: str, shape: tuple[int, int, int], chunk: int | None, dumps: Path
) -> dict[str, Any]:
    """What the program holds and costs, or ``{"refused": the exception's text}``."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    n, d, v = shape
    arrays = ((n, d), jnp.bfloat16), ((d, v), jnp.bfloat16), ((n,), jnp.int32)

    def make():
        function, steps = _method(name, shape, chunk)
        return function, tuple(jax.ShapeDtypeStruct(*array) for array in arrays), steps

    return chips.compiled(topology.devices[0], make, dumps)


def _added(name: str, tick: Callable[..., None]) -> dict[str, Any]:
    """The results that are there, with this method: of the same compilers."""
    data, now = report.load(report.RESULTS, "compiled"), environment(*PACKAGES)
    other = [key for key in COMPILERS if now[key] != data["environment"][key]]
    if other:
        raise SystemExit(f"tpu --add: other versions of {', '.join(other)} made {report.RESULTS}.")
    with TemporaryDirectory() as folder:
        hlo.dump_to(Path(folder))
        for row, each in report.shares(tick, data["rows"]):
            each(0, f"{row['chip']} {tuple(row['shape'])}")
            found = compiled(row["chip"], name, tuple(row["shape"]), None, Path(folder))
            row["programs"][name] = {"jaxloss": now["jaxloss"], **found}
    return data


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    if args.add:
        return _added(args.add, tick)
    names, done = ("products", *NAMES), count()
    total = len(CASES) * len(names) + sum(len(sizes) for *_, sizes in SWEEPS)

    def program(chip, name, shape, size=None):
        what = f"{chip} {shape} {name}" + (f" chunk_size={size}" if size else "")
        tick(next(done) / total, what)
        return compiled(chip, name, shape, size, dumps)

    with TemporaryDirectory() as folder:
        dumps = Path(folder)
        hlo.dump_to(dumps)
        rows = [
            {
                "chip": chip,
                "shape": list(shape),
                "programs": {name: program(chip, name, shape) for name in names},
            }
            for chip, shape in CASES
        ]
        sweeps = [
            {
                "chip": chip,
                "method": name,
                "shape": list(shape),
                "programs": {str(size): program(chip, name, shape, size) for size in sizes},
            }
            for chip, name, shape, sizes in SWEEPS
        ]
    return {"rows": rows, "chunk_size": sweeps}


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
    names = [
        name
        for name in NAMES
        if any("peak_mib" in r["programs"].get(name, {}) for r in data["rows"])
    ]
    case = ["chip", "tokens x features\nx classes"]
    columns = [NAMES[name].replace(" ", "\n") for name in names]
    memory, cycles, refused = [], [], {}
    for row in data["rows"]:
        programs = row["programs"]
        here = [row["chip"], report.by(row["shape"])]
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
        title = f"{SCHEDULES[method]} by `chunk_size`, {report.by(shape)}"
        out.append(report.Table(title, ["chip", "", *sizes], rows))
    if refused:
        rows = []
        for (name, text), where in refused.items():
            everywhere = len(where) == len(data["rows"])
            cases = "everywhere" if everywhere else "; ".join(" ".join(w) for w in where)
            rows.append([name, cases, text])
        out.append(report.Table("Refused", ["method", "where", "exception"], rows))
    return out
