"""The programs for accelerators run on a CPU too, on small shapes, and say what they should."""

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import jax
import pytest

from benchmarks.harness import hlo, report
from benchmarks.methods.device_functions import OF_LOGITS, OF_PRODUCTS
from benchmarks.methods.linear_case import PRODUCTS
from benchmarks.parts import gpu, heads, heads_compiled, tpu

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "benchmarks" / "tpu_benchmark.ipynb"


def run(*command):
    """In a process of its own, as its users have it: one device, JAX's own promotion rules."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_NUMPY_", "XLA_FLAGS"))}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**env, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_gpu_program_on_small_shapes(tmp_path):
    options = ("--small", "--seconds", "0.05", "--out", str(tmp_path))
    done = run("-m", "benchmarks", "gpu", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    data = report.load(tmp_path, "gpu")
    assert data["environment"]["device"] == "cpu"
    assert data["ceilings"].keys() == {"copy_gb_s", "matrix_tflops", "burst_matrix_tflops"}
    assert [tuple(row["shape"]) for row in data["linear"]] == list(gpu.SMALL.linear)
    for row in data["linear"]:
        for part in ("forward_ms", "both_ms", "memory"):
            assert {"jaxloss", "blocks", "optax"} <= row[part].keys()
            # Each method is measured, or its refusal is there; bare products hold nothing.
            assert {*row[part], *row["refused"], PRODUCTS} == {*gpu.LINEAR}
            assert (PRODUCTS in row[part]) == (part != "memory")
    for ms in data["burst"].values():
        assert ms.keys() == {"forward", "both"}
    assert [row["shape"][1] for row in data["logits"]] == list(gpu.SMALL.columns)
    for row in data["logits"]:
        assert {*row["ms"], *row["refused"]} == {*gpu.LOGITS}
        assert row["of_copy"].keys() == row["ms"].keys()
    assert [row["chunk_size"] for row in data["chunk_size"]] == list(gpu.SMALL.chunks)
    for step, functions in (("functions", OF_LOGITS), ("statistics", OF_PRODUCTS)):
        assert {*data[step]["functions"]} == {*functions}
        for row in data[step]["functions"].values():
            assert {*row["ms"]} == {"forward", "both"}, row["refused"]
    assert all(isinstance(target["reached"], bool) for target in gpu.targets(data))
    for table in gpu.tables(data):
        assert all(len(row) == len(table.header) for row in table.rows)
    assert "Targets" in done.stdout


def test_the_gpu_program_wants_a_gpu(tmp_path):
    done = run("-m", "benchmarks", "gpu", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "wants a GPU; got cpu. With --small" in done.stderr
    assert not list(tmp_path.iterdir())


PROGRAM = """\
HloModule two_loops

%body.1 (p.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %x.1 = f32[4,8]{1,0} get-tuple-element(%p.1), index=1
  %k.1 = f32[8,8]{1,0} constant({...})
  %d.1 = f32[4,8]{1,0} dot(%x.1, %k.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %e.1 = f32[4,8] exponential(%d.1), c={"estimated_cycles":"10","iteration_bounds":["2","3"]}
  %k.2 = f32[4,8]{1,0} custom-call(%e.1), custom_call_target="tpu_custom_call"
}

%fixed.1 (p.2: (s32[], f32[4,8])) -> pred[] {
  %n.1 = s32[] constant(3), metadata={op_name="n"}
  %i.1 = s32[] get-tuple-element(%p.2), index=0
  ROOT %c.1 = pred[] compare(%i.1, %n.1), direction=LT
}

%open.1 (p.3: (s32[], f32[4,8])) -> pred[] {
  %i.2 = s32[] get-tuple-element(%p.3), index=0
  %n.2 = s32[] get-tuple-element(%p.3), index=1
  ROOT %c.2 = pred[] compare(%i.2, %n.2), direction=LT
}

ENTRY %main.1 (a: f32[4,8]) -> f32[4,8] {
  %w.1 = (s32[], f32[4,8]{1,0}) while(%t.1), condition=%fixed.1, body=%body.1
  ROOT %w.2 = (s32[], f32[4,8]{1,0}) while(%w.1), condition=%open.1, body=%body.1
}
"""


def test_a_product_in_parts_costs_what_the_whole_does():
    """XLA:GPU sums over parts of the contracted axis, which are a batch's."""
    program = """\
ENTRY %main.1 (a: f32[4,2,8], b: f32[16,2,8]) -> f32[2,4,16] {
  %a.1 = f32[4,2,8]{2,1,0} parameter(0)
  %b.1 = f32[16,2,8]{2,1,0} parameter(1)
  ROOT %d.1 = f32[2,4,16] dot(%a.1, %b.1), lhs_batch_dims={1}, lhs_contracting_dims={2}
}
"""
    assert hlo.cost(program).flops == 2 * 4 * 16 * 16


def test_the_cost_of_a_loop_is_that_of_all_its_steps():
    cost = hlo.cost(PROGRAM, steps=(5,))
    assert cost.flops == (3 + 5) * 2 * 4 * 8 * 8
    assert cost.cycles == (3 + 5) * 10
    assert cost.kernels == 3 + 5
    assert cost.kernel_cycles == 0
    assert [loop["steps"] for loop in cost.loops] == [3, 5]
    with pytest.raises(StopIteration):
        hlo.cost(PROGRAM)
    with pytest.raises(ValueError, match="no more loops"):
        hlo.cost(PROGRAM, steps=(5, 0))


@pytest.mark.parametrize(("bundles", "cycles"), [(1, 10), (4, 2 * 3 * 4)])
def test_the_cost_of_what_was_scheduled(bundles, cycles):
    """Where it is more than the estimate; of a kernel there is none."""
    scheduled = hlo.Scheduled({"e.1": bundles, "k.2": 7}, {"k.2": 11})
    cost = hlo.cost(PROGRAM, (5,), scheduled)
    assert cost.cycles == (3 + 5) * cycles
    assert cost.kernel_cycles == (3 + 5) * 7 * 11


SENDING = """\
HloModule sends

%body.1 (p.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %x.1 = f32[4,8]{1,0} get-tuple-element(%p.1), index=1
  %r.1 = f32[4,8]{1,0} all-reduce(%x.1), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%open.1 (p.3: (s32[], f32[4,8])) -> pred[] {
  %i.2 = s32[] get-tuple-element(%p.3), index=0
  %n.2 = s32[] get-tuple-element(%p.3), index=1
  ROOT %c.2 = pred[] compare(%i.2, %n.2), direction=LT
}

ENTRY %main.1 (a: f32[4,8]) -> f32[4,8] {
  %g.1 = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%a.1), replica_groups=[4,2]<=[8]
  %s.1 = (f32[2,8]{1,0}, s32[2]{0}) reduce-scatter(%a.1, %b.1), replica_groups={{0,1},{2,3}}
  %p.1 = pred[16]{0} collective-permute(%c.1), source_target_pairs={{0,1},{1,0}}
  ROOT %w.2 = (s32[], f32[4,8]{1,0}) while(%t.1), condition=%open.1, body=%body.1
}
"""


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[4,2]<=[8]", 2),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", 4),
        ("mesh['axis_0'=4,'axis_1'=2]", 8),
    ],
)
def test_of_how_many_devices_a_sum_is(groups, devices):
    program = f"""\
ENTRY %main.1 (a: f32[100]) -> f32[100] {{
  ROOT %r.1 = f32[100]{{0}} all-reduce(%a), replica_groups={groups}, use_global_device_ids=true
}}
"""
    found = hlo.sent(program)["once"]
    assert found == {"all-reduce": pytest.approx(400 * 2 * (devices - 1) / devices)}


def test_what_is_sent_in_a_loop_is_sent_in_all_its_steps():
    """Of rings: n - 1 of n parts of what is gathered, and twice that of what is summed."""
    assert hlo.sent(SENDING, steps=(5,)) == {
        "once": {
            "all-gather": 2 * 8 * 8 / 2,
            "reduce-scatter": 4 * 2 * 8 + 4 * 2,
            "collective-permute": 16,
        },
        "in loops": {"all-reduce": 5 * 2 * 3 / 4 * 4 * 4 * 8},
    }
    with pytest.raises(ValueError, match="no more loops"):
        hlo.sent(SENDING, steps=(5, 0))


LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install -e '.[tpu-compile]'",
)
SCHEDULE = """
import json, pathlib, sys
from benchmarks.harness import hlo
from benchmarks.parts import tpu
folder = pathlib.Path(sys.argv[1])
tpu.quiet()
hlo.dump_to(folder)
print(json.dumps(tpu.compiled("v6e", "kernel", (2048, 512, 2048), 1024, folder)))
"""


@LIBTPU
def test_what_a_tpu_is_to_issue(tmp_path):
    done = run("-c", SCHEDULE, str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    program = json.loads(done.stdout.splitlines()[-1])
    # A core multiplies 2^18 pairs a cycle; row_part is one product of them all, slope two halves.
    one = 2048 * 512 * 2048 / 2**18
    assert program["kernels"] == 3
    assert 2 * one < program["kernel_cycles"] < 20 * one
    assert not list(tmp_path.iterdir())


@LIBTPU
@pytest.mark.parametrize(
    ("name", "chunk", "products"), [("chunks", 32, 3), ("blocks", 256, 4)], ids=str
)
def test_the_products_that_a_tpu_is_given(tmp_path, name, chunk, products):
    tpu.quiet()
    shape = n, d, v = 128, 128, 1024  # four chunks, four blocks
    with jax.enable_x64(False):  # a TPU compares 64 bits in halves, and a loop's end is not read
        program = tpu.compiled("v5e", name, shape, chunk, tmp_path)
    one = 2 * n * d * v
    assert program["peak_mib"] > program["arguments_mib"] > 0
    # The first of the blocks may be multiplied once for both of their sweeps.
    assert (products - 0.3) * one < program["product_flops"] <= products * one
    assert program["cycles"] > 0


@LIBTPU
@pytest.mark.parametrize(
    ("name", "products"),
    [(heads.MIXED, 3), ("LowRankKernel of int4 in groups", 2), (heads.SEVERAL, 3)],
)
def test_the_products_of_heads_on_a_tpu(tmp_path, name, products):
    tpu.quiet()
    shape = n, d, v = 2048, 128, 1024  # two chunks
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        device = heads_compiled.device_of("v6e")
        programs = heads_compiled.compiled(device, name, tmp_path, shape)
    assert programs.keys() == {*heads_compiled.METHODS}
    several = heads.HEADS if name == heads.SEVERAL else 1
    one = 2 * n * d * v / several
    ours = programs["jaxloss"]
    if name == heads.MIXED:  # its kernels' products are not among those that are counted
        assert ours["kernels"] > 0
    else:
        update = 0 if several > 1 else 6 * 2 * n * heads.RANK * (d + v)
        assert products * one <= ours["product_flops"] <= products * one + update
    assert ours["cycles"] > 0


def test_a_compiler_that_is_not_here_is_named(monkeypatch):
    def device_of(chip):
        raise RuntimeError(f"no {chip}")

    monkeypatch.setattr(heads_compiled, "device_of", device_of)
    found = heads_compiled.run(Namespace(add=None), lambda share, *note: None)
    assert found["absent"] == {chip: f"RuntimeError: no {chip}" for chip in heads_compiled.CHIPS}
    (table,) = heads_compiled.tables({**found, "environment": {}})
    assert [row[0] for row in table.rows] == [*heads_compiled.CHIPS]


def _cells(kind):
    return [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == kind]


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """Its cells as one program: what a notebook's kernel adds is not used."""
    program = tmp_path / "cells.py"
    program.write_text("\n\n".join("".join(cell["source"]) for cell in _cells("code")))
    done = run(str(program))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "forward and both gradients, ms" in done.stdout


@pytest.mark.skipif(
    importlib.util.find_spec("nbconvert") is None,
    reason="Jupyter is not installed: pip install -e '.[notebook]'",
)
def test_the_notebook_runs_in_jupyter(tmp_path):
    command = ("nbconvert", "--to", "notebook", "--execute", "--output-dir", str(tmp_path))
    done = run("-m", *command, "--ExecutePreprocessor.timeout=-1", str(NOTEBOOK))
    assert done.returncode == 0, done.stderr[-2000:]
    cells = json.loads((tmp_path / NOTEBOOK.name).read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    text = ["".join(o["text"]) for o in outputs if o.get("name") == "stdout"]
    assert sum("cpu" in part for part in text) == len(text) > 4
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3


def test_the_notebook_comes_without_outputs():
    """They would be those of another device than the reader's."""
    assert not [output for cell in _cells("code") for output in cell["outputs"]]
