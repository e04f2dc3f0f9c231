"""What the GPU compiler makes of the linear loss for an H200, on a machine without one."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import partial
from math import prod
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxloss
from benchmarks.harness import chips, hlo
from jaxloss._xla import device

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)),
    reason="JAX's CUDA plug-in is not installed: pip install -e '.[gpu-compile]'",
)

N, D, V = 8192, 2048, 128256
MIB = 2**20
CHUNKS, BLOCKS = {"chunk_size": 1024}, {"implementation": "vocab_blocks"}
BOTH = {"gradients": True}
# Of four GPUs, and what splits hidden and the kernel there on automatic axes.
L_OF_FOUR, D_OF_FOUR, V_OF_FOUR, CHUNK_OF_FOUR = 512, 512, 16384, 1024
AUTOMATIC = {
    "tokens": ({"data": 4}, ("data",), ()),
    "tokens, and features of the kernel": ({"data": 4}, ("data",), ("data",)),
    "tokens and columns": ({"data": 2, "tensor": 2}, ("data",), (None, "tensor")),
    "tokens and sequence": ({"data": 2, "context": 2}, ("data", "context"), ()),
}


def _h200():
    return SingleDeviceSharding(chips.h200()[0])


def _lowered(function, *args, kernels=True):
    """As on an H200: what chunks go by, and whether there are kernels."""
    with (
        mock.patch.object(jax, "default_backend", return_value="gpu"),
        mock.patch.object(device, "is_hopper", return_value=kernels),
    ):
        return jax.jit(function).lower(*args)


def _kernels(text):
    return sorted(set(re.findall(r"jaxloss_[a-z_]+(?=_mosaic_gpu)", text)))


def _compile(gradients=False, materialised=False, kernels=True, n=N, d=D, **options):
    """Prints what the tests below ask, as JSON."""
    one = _h200()
    kernel = (V, d) if options.get("vocab_axis") == 0 else (d, V)
    shapes = ((n, d), jnp.bfloat16), (kernel, jnp.bfloat16), ((n,), jnp.int32)
    loss = partial(jaxloss.linear_cross_entropy, **options)
    if materialised:
        loss = lambda h, k, y: jaxloss.cross_entropy(h @ k, y)  # noqa: E731
    function = jax.value_and_grad(loss, (0, 1)) if gradients else loss
    args = [jax.ShapeDtypeStruct(*shape, sharding=one) for shape in shapes]
    program = _lowered(function, *args, kernels=kernels).compile()
    text, memory = program.as_text(), program.memory_analysis()
    types = dict(re.findall(r"%?([\w.\-]+) = ([a-z]+\d+)\[", text))
    arrays = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    entry = text[text.index("\nENTRY ") :]
    copied = re.findall(r"= [a-z]+\d+\[([\d,]*)\]\S* copy\(", text)
    found = {
        "peak": memory.peak_memory_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "least": memory.argument_size_in_bytes + memory.output_size_in_bytes,
        "products": [[types[x], types[y]] for x, y in re.findall(r" dot\(%(\S+), %(\S+)\)", text)],
        "logits": any(sorted(map(int, dims.split(","))) == sorted((n, V)) for dims in arrays),
        "kernels": _kernels(text),
        "on_kernel": re.findall(rf"= \w+\[{kernel[0]},{kernel[1]}\]\S* ([a-z\-]+)\(", entry),
        "copied": max((prod(int(n) for n in dims.split(",") if n) for dims in copied), default=0),
    }
    print(json.dumps(found))


def _compile_passes(shape):
    """Prints what each pass over cross_entropy's logits makes of them, as JSON."""
    one = _h200()
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one)
    y = jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=one)
    loss = jax.value_and_grad(jaxloss.cross_entropy)
    text = _lowered(loss, x, y, kernels=False).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    logits = f"bf16[{','.join(map(str, shape))}]"
    names = set(re.findall(rf"%([\w.\-]+) = {re.escape(logits)}", entry))
    passes = []
    for result, operands, kind in re.findall(r"= (.*?) fusion\((.*?)\), kind=(\w+)", entry):
        if names & set(re.findall(r"%([\w.\-]+)", operands)):
            passes.append("gradient" if logits in result else kind)
    print(json.dumps(sorted(passes)))


def _compile_kernels(shape, factor=1, how=None):
    """Prints which kernels a batch of cross_entropy runs; JAX prints their resources."""
    one = _h200()
    y = jax.ShapeDtypeStruct(shape[:-1], jnp.int32, sharding=one)
    axis = -1 if how != "transposed" else -2
    shape = shape if axis == -1 else (*shape[:-2], shape[-1], shape[-2])
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one)

    def loss(x, y):
        x = x.astype(jnp.float32) if how == "widened" else x
        return factor * jaxloss.cross_entropy(x, y, axis=axis)

    program = _lowered(jax.vmap(jax.value_and_grad(loss)), x, y).compile()
    text = program.as_text()
    found = {
        "kernels": _kernels(text),
        "calls": text.count('custom_call_target="mosaic_gpu'),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
    }
    print(json.dumps(found))


def _compile_low_rank(n, d, r):
    """Prints how many columns the arrays have that are as large as the kernel, as JSON."""
    one = _h200()

    def loss(h, a, b, k, y):
        return jaxloss.linear_cross_entropy(h, jaxloss.LowRankKernel(k, a, b), y)

    shapes = (n, d), (d, r), (r, V), (d, V)
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one) for shape in shapes]
    args.append(jax.ShapeDtypeStruct((n,), jnp.int32, sharding=one))
    program = _lowered(jax.value_and_grad(loss, (0, 1, 2)), *args).compile()
    arrays = re.findall(r"\b[a-z]+\d+\[(\d+),(\d+)\]", program.as_text())
    print(json.dumps({"columns": sorted({n for x in arrays for n in map(int, x) if n >= V})}))


def _compile_pairs(loss, n, d):
    """Prints what four GPUs hold and send, as JSON."""
    found = chips.h200("1x1x4")
    mesh = Mesh(np.array(found), ("data",), axis_types=(AxisType.Auto,))

    def step(x, y, scale):
        names = {"token_axis_name": "data", "mesh": mesh}
        return getattr(jaxloss, loss)(x, y, logit_scale=scale, **names)

    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in (
            ((n, d), jnp.bfloat16, P("data")),
            ((n, d), jnp.bfloat16, P("data")),
            ((), jnp.float32, P()),
        )
    ]
    with mock.patch.object(jax, "device_count", return_value=len(found)):
        program = _lowered(jax.value_and_grad(step, (0, 1, 2)), *args).compile()
    memory = program.memory_analysis()
    print(
        json.dumps(
            {
                "sent": hlo.sent(program.as_text()),
                "temporaries": memory.temp_size_in_bytes,
                "split": [str(s.spec) for s in program.output_shardings[1]],
            }
        )
    )


def _compile_automatic(sizes, of_hidden, of_kernel):
    """Prints what four GPUs send of a call that names no axes, as JSON."""
    found = chips.h200("1x1x4")
    grid = np.array(found).reshape([*sizes.values()])
    mesh = Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    of_hidden, of_kernel = P(*of_hidden), P(*of_kernel)
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in (
            ((8, L_OF_FOUR, D_OF_FOUR), jnp.bfloat16, of_hidden),
            ((D_OF_FOUR, V_OF_FOUR), jnp.bfloat16, of_kernel),
            ((8, L_OF_FOUR), jnp.int32, of_hidden),
        )
    ]
    options = {"implementation": "token_chunks", "chunk_size": CHUNK_OF_FOUR}
    loss = partial(jaxloss.linear_cross_entropy, **options)
    with mock.patch.object(jax, "device_count", return_value=len(found)):
        program = _lowered(jax.value_and_grad(loss, (0, 1)), *args).compile()
    text, tokens = program.as_text(), 8 * L_OF_FOUR
    print(
        json.dumps(
            {
                "sent": hlo.sent(text, [tokens // CHUNK_OF_FOUR]),
                "d_hidden": str(program.output_shardings[1][0].spec),
            }
        )
    )


def run(**options):
    """(What the program printed as JSON, all that it said.)"""
    # In a process of its own: a program that the compiler cannot do may end it.
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(options)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "JAX_ENABLE_COMPILATION_CACHE": "0",  # or nothing would be compiled, and said
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = next(line for line in done.stdout.splitlines()[::-1] if line.startswith(("{", "[")))
    return json.loads(found), done.stdout + done.stderr


def compiled(**options):
    return run(**options)[0]


@pytest.mark.parametrize(
    ("options", "peak"), [(BOTH | CHUNKS, 2390), (BOTH | BLOCKS, 1420)], ids=str
)
def test_value_and_gradients_fit(options, peak):
    """The arguments and the gradients alone are 1066 MiB."""
    found = compiled(**options)
    assert not found["logits"]
    assert found["least"] < found["peak"] <= peak * MIB
    assert found["copied"] <= N
    assert len(found["products"]) >= 3
    assert {name for pair in found["products"] for name in pair} == {"bf16"}


def test_the_chunks_by_default_take_a_gibibyte():
    found = compiled(**BOTH)
    assert not found["logits"]
    assert found["temporaries"] <= 4 * D * V + 1.2e9  # a float32 d_kernel, and 2048 tokens' logits
    assert found["copied"] <= N


def test_all_tokens_at_once_form_the_gradient_as_it_is_returned():
    """Of no more tokens than features: no accumulator, nothing narrowed or scaled afterwards."""
    found = compiled(**BOTH, n=4096, d=4096)
    assert set(found["on_kernel"]) == {"parameter", "get-tuple-element"}
    assert 6 * 4096 * V <= found["temporaries"] <= 6 * 4096 * V + 64 * MIB
    chunks = compiled(**BOTH, n=4096, d=4096, chunk_size=2048)
    assert "fusion" in chunks["on_kernel"]


@pytest.mark.parametrize("options", [{}, BLOCKS], ids=str)
def test_the_value_alone_fits(options):
    found = compiled(**options)
    assert not found["logits"]
    assert found["temporaries"] <= 320 * MIB
    assert found["copied"] <= N


def resources(said):
    """(registers, bytes spilled) of each kernel."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", said)]
    return registers, spilled


@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_stored_exponentials_of_all_tokens_are_all_that_is_held(vocab_axis):
    """No logits, no accumulator, no pass over d_kernel. Where a row's sum is too large, the kernel
    of the rows' parts finds its maximum."""
    n = d = 4096
    options = {"implementation": "stored_exponentials", "n": n, "d": d, "vocab_axis": vocab_axis}
    found, said = run(**BOTH, **options)
    assert found["kernels"] == ["jaxloss_linear_exponentials", "jaxloss_linear_row_part"]
    assert found["temporaries"] <= 2 * n * V + 2 * n * d + 40 * MIB
    assert set(found["on_kernel"]) == {"parameter", "get-tuple-element"}
    registers, spilled = resources(said)
    assert max(registers) <= 168  # of three groups of 128 threads, on a core of 65536
    assert sum(spilled) == 0


def test_chunks_of_stored_exponentials():
    """Beside a float32 d_kernel; the first chunk's stand where d_kernel is written narrow."""
    found = compiled(**BOTH, implementation="stored_exponentials", n=4 * N)
    assert not found["logits"]
    assert found["temporaries"] <= 4 * D * V + 2 * 4096 * V + 3 * 2 * 4 * N * D + 40 * MIB


@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_the_value_alone_takes_the_kernel(vocab_axis):
    """Its logits stay in the registers: what it holds is three numbers a row and tile."""
    found, said = run(vocab_axis=vocab_axis)
    assert found["kernels"] == ["jaxloss_linear_row_part"]
    assert not found["logits"]
    assert found["temporaries"] <= 4 * 3 * N * V // 256 + 2 * N * D + 20 * MIB
    registers, spilled = resources(said)
    assert registers
    assert max(registers) <= 168  # of three groups of 128 threads, on a core of 65536
    assert max(spilled) <= 8  # one or two registers, of a whole tile's


def test_the_rows_take_kernels():
    """A batch of examples is one call of all their rows."""
    found, said = run(kernels_of=[32, 1024, 16384])
    assert found["kernels"] == ["jaxloss_max_and_sum", "jaxloss_slope"]
    assert found["temporaries"] <= 8 * MIB
    registers, spilled = resources(said)
    assert len(registers) == 2
    assert max(registers) <= 168  # three tiles' groups a core
    assert sum(spilled) == 0


@pytest.mark.parametrize(("classes", "most"), [(1024, 128), (2048, 255)])
def test_rows_of_few_classes_take_one_pass(classes, most):
    """What the backward pass asks for is what the forward pass asked for, and computed once."""
    found, said = run(kernels_of=[2, 2**24 // classes, classes])
    assert found["kernels"] == ["jaxloss_one_pass"]
    assert found["calls"] == 1
    assert found["temporaries"] <= 8 * MIB
    registers, spilled = resources(said)
    assert max(registers) <= most  # four blocks of 128 threads a core, or two
    assert sum(spilled) == 0


def test_of_a_multiple_of_the_loss_the_gradient_is_computed_again():
    """Scaled as it is it would be rounded twice."""
    assert compiled(kernels_of=[1, 2**14, 1024], factor=3)["calls"] == 2


@pytest.mark.parametrize("how", ["widened", "transposed"])
def test_logits_that_a_kernel_would_have_copied(how):
    """XLA reads them as they are: logits in 16 bits as float32, and classes on another axis."""
    found = compiled(kernels_of=[1, 2**14, 2048], how=how)
    assert found["kernels"] == []
    assert found["temporaries"] <= 8 * MIB


def test_chunks_take_the_kernel_of_their_rows():
    assert compiled(**BOTH)["kernels"] == ["jaxloss_max_and_sum"]
    assert compiled(**BOTH, kernels=False)["kernels"] == []


def test_without_kernels_cross_entropy_reads_its_logits_once_forward_and_once_backward():
    """A reduction, the labels' entries (kLoop: of no more than the rows' number), the gradient."""
    assert compiled(passes=[32768, 16384]) == ["gradient", "kInput", "kLoop"]


def test_no_kernel_is_copied_to_be_multiplied_with_an_update():
    """XLA:GPU would make one product of ``h @ k`` and ``h @ a``, of a kernel with a beside it."""
    found = compiled(low_rank={"n": N, "d": D, "r": 16})
    assert V in found["columns"]
    assert V + 16 not in found["columns"]


@pytest.mark.parametrize("loss", ["contrastive_loss", "sigmoid_contrastive_loss"])
def test_pairs_over_four_gpus(loss):
    """A device's similarities alone would take 256 MiB; y goes round and is gathered nowhere."""
    n, d = 16384, 512
    found = compiled(pairs={"loss": loss, "n": n, "d": d})
    rows = n // 4 * d
    assert found["temporaries"] <= 192 * MIB
    assert found["split"][:2] == ["P('data',)"] * 2
    assert {*found["sent"]["in loops"]} == {"collective-permute"}
    # Of each hop y for the value, y and its float32 gradient for the gradients, sums of y's rows.
    assert found["sent"]["in loops"]["collective-permute"] <= 4 * ((2 + 2 + 4) * rows + 64 * n)
    assert sum(found["sent"]["once"].values()) < n  # numbers, and no array


@pytest.mark.parametrize("split", AUTOMATIC)
def test_calls_without_names_over_four_gpus(split):
    """No hidden is gathered; the kernel before the loop; d_kernel is summed after it."""
    found = compiled(automatic=AUTOMATIC[split])
    sizes, of_hidden, of_kernel = AUTOMATIC[split]
    once, looped = found["sent"]["once"], found["sent"]["in loops"]
    tokens, columns = 8 * L_OF_FOUR, V_OF_FOUR // sizes.get("tensor", 1)
    own = tokens // 4 * sizes.get("tensor", 1)  # tokens of a device
    assert found["d_hidden"] == f"{P(*of_hidden)}"
    kernel = 2 * D_OF_FOUR * columns if "data" in of_kernel else 0
    assert once.get("all-gather", 0) <= kernel + 4 * D_OF_FOUR * 2
    assert once["all-reduce"] <= 2 * 4 * D_OF_FOUR * columns + 64 * tokens
    # Numbers of a token; and where columns are split the devices' parts of d_hidden.
    d_hidden = 2 * 4 * D_OF_FOUR * own if "tensor" in sizes else 0
    assert sum(looped.values()) <= d_hidden + 64 * tokens


def test_the_walk_finds_materialised_logits():
    """The assertions above must be able to fail."""
    found = compiled(**BOTH, materialised=True)
    assert found["logits"]
    assert found["peak"] > 2390 * MIB


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if "automatic" in given:
        _compile_automatic(*given["automatic"])
    elif "pairs" in given:
        _compile_pairs(**given["pairs"])
    elif "low_rank" in given:
        _compile_low_rank(**given["low_rank"])
    elif "passes" in given:
        _compile_passes(given["passes"])
    elif "kernels_of" in given:
        _compile_kernels(given.pop("kernels_of"), **given)
    else:
        _compile(**given)
