"""What the TPU compilers make of the losses, on a machine without one: memory and collectives."""

import importlib.util
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chips import kernels_of
from forms import SCHEDULES
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from parallel.test_mesh import collectives, elements

import jaxloss
from benchmarks.parts.tpu import TOPOLOGIES, quiet

pytestmark = [
    pytest.mark.every_case,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: pip install -e '.[tpu-compile]'",
    ),
]

# The compiler searches less, for a fifth of the time: memory is a MiB or two more than by default.
QUICKLY = {"exec_time_optimization_effort": -1.0}
N, D, V = 8192, 2048, 128256
MIB = 2**20
# The others too by `pytest -m soak tests/kernels/test_tpu.py`: a program takes 5 to 25 s.
CHIPS = ["v5e", "v6e", *(pytest.param(name, marks=pytest.mark.soak) for name in ("v5p", "tpu7x"))]
# A tpu7x' compiler lays the kernel out in other tiles first.
COPIED = {"tpu7x": 2 * D * V}


@cache
def topology(name):
    quiet()
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[name])


def compiled(name, f, *shapes, options=QUICKLY):
    chip = topology(name).devices[0]
    one = SingleDeviceSharding(chip)
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=one) for shape, dtype in shapes]
    return lowered(f, *args, options=options, chips=[chip], devices=1).compile()


def lowered(f, *args, options=QUICKLY, **there):
    with kernels_of("tpu", **there):
        return jax.jit(f, compiler_options=options).lower(*args)


OPERANDS = (((N, D), jnp.bfloat16), ((D, V), jnp.bfloat16), ((N,), jnp.int32))


def linear(schedule, gradients=True, **options):
    loss = partial(jaxloss.linear_cross_entropy, implementation=schedule, **options)
    return jax.value_and_grad(loss, (0, 1)) if gradients else loss


def buffers(text):
    """The shapes of all arrays of an optimised program, as sorted tuples."""
    found = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    return {tuple(sorted(map(int, dims.split(",")))) for dims in found}


KERNEL = "tpu_custom_call"
KERNELS = {"jaxloss_linear_row_part", "jaxloss_linear_slope"}
ALL_KERNELS = KERNELS | {"jaxloss_linear_exponentials"}


def test_value_and_gradients_fit_as_users_compile_them():
    memory = compiled("v5e", linear(None), *OPERANDS, options={}).memory_analysis()
    assert memory.peak_memory_in_bytes <= 1250 * MIB


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize(
    ("schedule", "options", "peak"),
    [
        ("token_chunks", {}, 2390),
        ("vocab_blocks", {}, 1250),
        (None, {}, 1250),  # the kernel, of packed tokens
        (None, {"ignore_index": None}, 1250),  # every token counts
        ("stored_exponentials", {}, 2090),
    ],
    ids=str,
)
def test_value_and_gradients_fit(name, schedule, options, peak):
    """The arguments and the gradients alone are 1066 MiB."""
    program = compiled(name, linear(schedule, **options), *OPERANDS)
    assert (N, V) not in buffers(program.as_text())
    found = {kernel for kernel in ALL_KERNELS if kernel in program.as_text()}
    kernels = {None: KERNELS, "stored_exponentials": ALL_KERNELS - {"jaxloss_linear_slope"}}
    assert found == kernels.get(schedule, set())
    memory = program.memory_analysis()
    least = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert least < memory.peak_memory_in_bytes <= peak * MIB + COPIED.get(name, 0)


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        *((name, (8192, 2048, 128256), {}) for name in TOPOLOGIES),
        ("v6e", (4000, 4096, 131072), {"vocab_axis": 0, "num_classes": 131071}),  # over the edges
        ("tpu7x", (2048, 16384, 32768), {}),  # the largest tiles, the least memory
    ],
    ids=str,
)
def test_the_kernel_alone_holds_no_block(name, shape, options):
    """Its results, of one column, are padded to 128 on chips that do not keep them on the core.
    Hidden is held twice: with 0 where a token does not count, and packed."""
    n, d, v = shape
    kernel = (v, d) if options.get("vocab_axis") == 0 else (d, v)
    shapes = ((n, d), jnp.bfloat16), (kernel, jnp.bfloat16), ((n,), jnp.int32)
    program = compiled(name, linear("mosaic_tpu", gradients=False, **options), *shapes)
    assert KERNEL in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes <= 4 * 4 * 128 * n + MIB + 2 * 2 * n * d


def test_the_kernel_takes_a_batch():
    shapes = ((4, 512, 256), jnp.bfloat16), ((256, 4096), jnp.bfloat16), ((4, 512), jnp.int32)
    loss = jax.vmap(linear("mosaic_tpu", gradients=False), (0, None, 0))
    assert KERNEL in compiled("v5e", loss, *shapes).as_text()


@pytest.mark.parametrize("name", ["v5e", *CHIPS[2:]])
@pytest.mark.parametrize("options", [{}, {"reduction": "none", "return_stats": True}], ids=str)
def test_the_value_alone_fits(name, schedule, options):
    program = compiled(name, linear(schedule, gradients=False, **options), *OPERANDS)
    assert (N, V) not in buffers(program.as_text())
    assert program.memory_analysis().temp_size_in_bytes <= 320 * MIB + COPIED.get(name, 0)


@pytest.mark.parametrize("name", list(TOPOLOGIES))
def test_cross_entropy_fits(name):
    shapes = ((8192, 16032), jnp.bfloat16), ((8192,), jnp.int32)
    program = compiled(name, jax.value_and_grad(jaxloss.cross_entropy), *shapes)
    assert program.memory_analysis().temp_size_in_bytes <= 8 * MIB


def multiple(factor):
    return jax.value_and_grad(lambda x, y: factor * jaxloss.cross_entropy(x, y))


@pytest.mark.parametrize(
    ("name", "rows", "classes", "factor"),
    [
        *((name, 8192, 16384, 1) for name in TOPOLOGIES),
        ("v5e", 8176, 1152, 1),  # over the edges of blocks and widths
        ("v6e", 48, 128256, 1),
        ("tpu7x", 64, 245760, 1),  # the longest rows, the least memory
        ("v6e", 1024, 1024, 3),
    ],
)
def test_cross_entropy_takes_one_pass(name, rows, classes, factor):
    """What the backward pass asks for is what the forward pass asked for, and computed once; of a
    multiple of the loss it is another gradient. Numbers of a row are padded to 128."""
    shapes = ((rows, classes), jnp.bfloat16), ((rows,), jnp.int32)
    program = compiled(name, multiple(factor), *shapes)
    assert program.as_text().count(f'"{KERNEL}"') == (1 if factor == 1 else 2)
    gradients = 2 * rows * classes if factor != 1 else 0  # the first of the two is thrown away
    held = 2 * 4 * 128 * (rows + 128) + gradients + MIB
    assert program.memory_analysis().temp_size_in_bytes <= held


def test_kernels_with_64_bits_elsewhere(traced_anew):
    shapes = ((512, 256), jnp.bfloat16), ((256, 4096), jnp.bfloat16), ((512,), jnp.int32)
    with jax.enable_x64(True):
        assert KERNEL in compiled("v5e", linear(None), *shapes).as_text()
        shapes = ((1024, 1024), jnp.bfloat16), ((1024,), jnp.int32)
        assert KERNEL in compiled("v5e", multiple(1), *shapes).as_text()


def test_one_pass_on_four_chips(traced_anew):
    chips = topology("v6e").devices
    mesh = Mesh(np.array(chips), ("data",), axis_types=(AxisType.Explicit,))
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("data")))
        for shape, dtype in (((8192, 16384), jnp.bfloat16), ((8192,), jnp.int32))
    ]
    loss = jax.value_and_grad(partial(jaxloss.cross_entropy, token_axis_name="data"))
    specs = {"in_specs": (P("data"), P("data")), "out_specs": (P(), P("data"))}
    split = jax.shard_map(loss, mesh=mesh.abstract_mesh, **specs)
    text = lowered(split, *args, chips=chips).compile().as_text()
    assert text.count(f'"{KERNEL}"') == 1
    assert {kind for kind, *_ in collectives(text)} == {"all-reduce"}
    assert all(elements(shape) <= 2 for _, shape, _ in collectives(text))


@pytest.mark.parametrize("linear", [False, True])
def test_shard_map_over_some_axes_of_four_chips(linear, traced_anew):
    """XLA may split along the others, and a kernel it cannot split."""
    chips = topology("v5e").devices
    mesh = Mesh(np.array(chips).reshape(2, 2), ("d", "v"), axis_types=(AxisType.Auto,) * 2)
    shapes = [((2048, 4096), jnp.bfloat16), ((2048,), jnp.int32)]
    loss, specs = partial(jaxloss.cross_entropy, token_axis_name="d"), (P("d"), P("d"))
    if linear:
        shapes = [((2048, 256), jnp.bfloat16), *shapes[1:], ((256, 4096), jnp.bfloat16)]
        specs = *specs, P()

        def loss(h, y, k):
            return jaxloss.linear_cross_entropy(h, k, y, token_axis_name="d")

    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, p))
        for (shape, dtype), p in zip(shapes, specs, strict=True)
    ]
    given = {"mesh": mesh.abstract_mesh, "axis_names": {"d"}, "in_specs": specs}
    split = jax.shard_map(jax.value_and_grad(loss), out_specs=(P(), P("d")), **given)
    assert KERNEL not in lowered(split, *args, chips=chips).compile().as_text()


@pytest.mark.parametrize("name", ["contrastive_loss", "sigmoid_contrastive_loss"])
def test_pairs_on_one_chip_and_on_four(name):
    """All similarities would take 1024 MiB, and a gather of y 16 MiB on each chip."""
    n, d, loss = 16384, 512, getattr(jaxloss, name)

    def step(**options):
        def scaled(x, y, scale):
            return loss(x, y, logit_scale=scale, **options)

        return jax.value_and_grad(scaled, (0, 1, 2))

    x, scale = ((n, d), jnp.bfloat16), ((), jnp.float32)
    program = compiled("v5e", step(), x, x, scale)
    assert program.memory_analysis().peak_memory_in_bytes < 256 * MIB
    chips = topology("v5e").devices
    mesh = Mesh(np.array(chips), ("data",), axis_types=(AxisType.Auto,))
    args = [
        jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, P("data") if shape else P())
        )
        for shape, dtype in (x, x, scale)
    ]
    split = lowered(step(token_axis_name="data", mesh=mesh), *args, chips=chips, devices=4)
    program = split.compile()
    assert program.memory_analysis().peak_memory_in_bytes < 80 * MIB
    found = collectives(program.as_text())
    assert {kind for kind, *_ in found} == {"all-reduce", "collective-permute"}
    assert all(elements(shape) <= n // 4 * d for _, shape, _ in found)


def test_the_walk_finds_materialised_logits():
    """The assertions above must be able to fail."""

    def materialised(h, k, y):
        return jaxloss.cross_entropy(h @ k, y)

    program = compiled("v5e", jax.value_and_grad(materialised, (0, 1)), *OPERANDS)
    assert (N, V) in buffers(program.as_text())
    assert program.memory_analysis().peak_memory_in_bytes > 2390 * MIB


def test_products_are_of_bfloat16_into_float32(schedule):
    text = jax.jit(linear(schedule)).lower(*(jax.ShapeDtypeStruct(*s) for s in OPERANDS)).as_text()
    products = re.findall(r"stablehlo\.dot_general.*: \((.*)\) -> (.*)", text)
    assert len(products) >= 3
    for operands, result in products:
        assert re.findall(r"x([a-z]\w*)>", operands) == ["bf16", "bf16"]
        assert re.findall(r"x([a-z]\w*)>", result) == ["f32"]


ELEMENTARY = re.compile(r" (exponential|exponential-minus-one|log|log-plus-one|tanh|logistic)\(")
LARGE = re.compile(r" = f32\[16,256\]\S* exponential\(")
ROWS, ROW_LABELS = ((16, 256), jnp.float32), ((16,), jnp.int32)
ACCURATE = {
    "cross_entropy": (partial(jaxloss.cross_entropy, logit_softcap=30.0), (ROWS, ROW_LABELS)),
    "token_stats": (lambda x, y: jaxloss.token_stats(x, y).entropy.sum(), (ROWS, ROW_LABELS)),
    "log_softmax": (lambda x: jaxloss.log_softmax(x)[:, 0].sum(), (ROWS,)),
    "kl_divergence": (partial(jaxloss.kl_divergence, divergence="jensen_shannon"), (ROWS, ROWS)),
    "focal_loss": (jaxloss.focal_loss, (ROWS, ROW_LABELS)),
    "sigmoid_cross_entropy": (jaxloss.sigmoid_cross_entropy, (ROWS, ROWS)),
    "linear_cross_entropy": (
        jaxloss.linear_cross_entropy,
        (((16, 128), jnp.bfloat16), ((128, 256), jnp.bfloat16), ROW_LABELS),
    ),
}


@pytest.mark.parametrize("name", list(ACCURATE))
def test_elementary_functions_are_the_accurate_ones(name):
    """By default a TPU's exp and its relatives are shorter programs of fewer digits."""
    loss, shapes = ACCURATE[name]
    lines = compiled("v5e", jax.value_and_grad(loss), *shapes).as_text().splitlines()
    found = {line for line in lines if ELEMENTARY.search(line)}
    assert found
    assert not [line for line in found if "result_accuracy={mode=highest}" not in line]
    # Of the logits' size they are a shorter program than the compiler's own.
    assert not [line for line in found if LARGE.search(line)]


@pytest.fixture
def traced_anew():
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_the_accurate_exponential_of_a_tpu7x_is_an_instruction(traced_anew):
    loss, shapes = ACCURATE["cross_entropy"]
    text = compiled("tpu7x", jax.value_and_grad(loss), *shapes).as_text()
    found = [line for line in text.splitlines() if LARGE.search(line)]
    assert found
    assert all("result_accuracy={mode=highest}" in line for line in found)


# Each pair of (chip, schedule), (chip, spec) and (schedule, spec): a program takes 10 to 25 s.
@pytest.mark.parametrize(
    ("name", "schedule", "spec"),
    [
        ("v5e", "token_chunks", P(None, "vocab")),
        ("v5e", "vocab_blocks", P("data", "vocab")),
        ("v6e", "token_chunks", P("data", "vocab")),
        ("v6e", "vocab_blocks", P(None, "vocab")),
        ("v6e", "mosaic_tpu", P("data", "vocab")),
        ("v5e", "stored_exponentials", P("data", "vocab")),
        ("v6e", "stored_exponentials", P(None, "vocab")),
        *(
            pytest.param(name, schedule, P("data", "vocab"), marks=pytest.mark.soak)
            for name in ("v5p", "tpu7x")
            for schedule in SCHEDULES
        ),
    ],
    ids=str,
)
def test_on_four_chips(name, schedule, spec):
    """Temporaries: this chip's float32 d_kernel, its columns of the kernel where they had to be
    gathered, and of a chunk and of a quarter of one the float32 logits and their narrow gradient;
    or a block's; or a chunk's stored exponentials."""
    devices = np.array(topology(name).devices).reshape(2, -1)  # a chip of a tpu7x is two devices
    columns = V // devices.shape[1]
    mesh = Mesh(devices, ("data", "vocab"), axis_types=(AxisType.Explicit,) * 2)
    specs = P("data"), spec, P("data")
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, p))
        for (shape, dtype), p in zip(OPERANDS, specs, strict=True)
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = lowered(linear(schedule), *args).compile()
    shard = D * columns
    gathered = 2 * shard if "data" in spec else 0
    logits = (1024 + 256) * columns * (4 + 2) if schedule == "token_chunks" else 256 * MIB
    if schedule == "stored_exponentials" and gathered:
        logits += 2 * shard  # the float32 sum of d_kernel, once it is scattered
    allowed = 4 * shard + gathered + logits + 72 * MIB + COPIED.get(name, 0) // devices.shape[1]
    assert program.memory_analysis().temp_size_in_bytes <= allowed
    text = program.as_text()
    assert not {(N, V), (N // 2, columns)} & buffers(text)
    found = collectives(text)
    large = sorted((kind, elements(shape)) for kind, shape, _ in found if elements(shape) > N * 8)
    d_hidden = ("all-reduce", N // 2 * D)
    if spec == P(None, "vocab"):  # each pair of chips holds the same columns: nothing is gathered
        assert large == sorted([d_hidden, ("all-reduce", shard)]), found
    else:
        scattered = ("reduce-scatter", shard // 2)
        assert large == sorted([d_hidden, ("all-gather", shard), scattered]), found
    assert not [c for c in found if c[2] and elements(c[1]) > N]


# The names of a mesh's axes outside of shard_map, and inside of one over another axis.

SMALL = {"h": (8, 256, 256), "k": (256, 4096), "y": (8, 256)}  # tokens in sequences
CHUNKS = {"chunk_size": 128}


def of_logits(x, y):
    return jaxloss.cross_entropy(x, y, reduction="none") ** 2


def of_stats(stats, reference):
    return reference.reverse_kl - stats.log_prob


CALLS = {
    "token_chunks": lambda h, k, y, **names: jaxloss.linear_cross_entropy(
        h, k, y, implementation="token_chunks", **CHUNKS, **names
    ),
    "vocab_blocks": lambda h, k, y, **names: jaxloss.linear_cross_entropy(
        h, k, y, implementation="vocab_blocks", chunk_size=1024, **names
    ),
    "statistics": lambda h, k, y, **names: jaxloss.linear_token_stats(
        h, k, y, **CHUNKS, **names
    ).entropy.sum(),
    "linear_stats_loss": lambda h, k, y, **names: jaxloss.linear_stats_loss(
        of_stats, h, k, y, reference=(h + 1, k), **CHUNKS, **names
    ),
    "divergence": lambda h, k, y, **names: jaxloss.linear_kl_divergence(
        h, k, h + 1, k, sample_weight=y >= 0, **CHUNKS, **names
    ),
    "linear_loss": lambda h, k, y, **names: jaxloss.linear_loss(
        of_logits, h, k, y, **CHUNKS, **names
    ),
}


def small_mesh():
    chips = topology("v5e").devices
    mesh = Mesh(np.array(chips).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    return chips, mesh


def small_operands(mesh, of_kernel):
    specs = {"h": P("data"), "k": of_kernel, "y": P("data")}
    dtypes = {"h": jnp.bfloat16, "k": jnp.bfloat16, "y": jnp.int32}
    return [
        jax.ShapeDtypeStruct(shape, dtypes[n], sharding=NamedSharding(mesh, specs[n]))
        for n, shape in SMALL.items()
    ]


def assert_little_is_sent(text, kernel_is_gathered):
    """In loops numbers of a token and a chunk's d_hidden alone; the kernel once, if at all."""
    found = collectives(text)
    assert found
    tokens, features = SMALL["y"], SMALL["h"][-1]
    assert all(elements(shape) <= 128 * features for _, shape, loop in found if loop)
    large = [kind for kind, shape, _ in found if elements(shape) > np.prod(tokens) // 2 * features]
    assert large.count("all-gather") == (1 if kernel_is_gathered else 0)


@pytest.mark.parametrize("name", CALLS)
def test_named_calls_on_four_chips(name):
    chips, mesh = small_mesh()
    whole_rows = name == "linear_loss"
    spec = P("data") if whole_rows else P(None, "tensor")
    names = {"token_axis_name": "data", "kernel_spec": spec, "mesh": mesh}
    step = jax.value_and_grad(partial(CALLS[name], **names), (0, 1))
    split = lowered(step, *small_operands(mesh, spec), chips=chips, devices=4)
    program = split.compile()
    assert_little_is_sent(program.as_text(), kernel_is_gathered=whole_rows)
    d_hidden, d_kernel = program.output_shardings[1]
    assert d_hidden.is_equivalent_to(NamedSharding(mesh, P("data")), 3)
    assert d_kernel.is_equivalent_to(NamedSharding(mesh, spec), 2)


@pytest.mark.parametrize("name", ["token_chunks", "linear_stats_loss", "divergence"])
@pytest.mark.parametrize("named", [False, True])
def test_inside_of_shard_map_over_another_axis_on_four_chips(name, named):
    """The tokens over the manual axis; the classes over one that the call names, or does not."""
    chips, mesh = small_mesh()
    names = {"token_axis_name": "data"} | ({"vocab_axis_name": "tensor"} if named else {})
    of_rows = P("data")

    def local(h, k, y):
        return CALLS[name](h, k, y, **names)

    given = {"axis_names": {"data"}, "in_specs": (of_rows, P(), of_rows), "out_specs": P()}
    step = jax.value_and_grad(jax.shard_map(local, mesh=mesh.abstract_mesh, **given), (0, 1))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        split = lowered(step, *small_operands(mesh, P(None, "tensor")), chips=chips, devices=4)
    assert_little_is_sent(split.compile().as_text(), kernel_is_gathered=False)


# What splits hidden and the kernel on automatic axes, of which the call names none. The types of
# its arguments alone say what the mesh is.
AUTOMATIC = {
    "tokens": (("data", "fsdp"), P(("data", "fsdp")), P()),
    "tokens, and features of the kernel": (("data", "fsdp"), P(("data", "fsdp")), P("fsdp")),
    "tokens and columns": (("data", "tensor"), P("data"), P(None, "tensor")),
    "tokens and sequence": (("data", "context"), P("data", "context"), P()),
}


@pytest.mark.parametrize("split", AUTOMATIC)
@pytest.mark.parametrize("name", ["token_chunks", "divergence"])
def test_calls_without_names_on_four_chips(name, split):
    """Nothing but numbers of a token and a chunk's d_hidden in a loop; d_kernel is summed after it,
    and the kernel gathered before."""
    axes, of_hidden, of_kernel = AUTOMATIC[split]
    chips = topology("v5e").devices
    mesh = Mesh(np.array(chips).reshape(2, 2), axes, axis_types=(AxisType.Auto,) * 2)
    specs, dtypes = (of_hidden, of_kernel, of_hidden), (jnp.bfloat16, jnp.bfloat16, jnp.int32)
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in zip(SMALL.values(), dtypes, specs, strict=True)
    ]
    step = jax.value_and_grad(CALLS[name], (0, 1))
    # With the options of users: compiled quickly, the sum of d_kernel would stay in the loop.
    program = lowered(step, *args, options=None, chips=chips, devices=4).compile()
    assert_little_is_sent(program.as_text(), kernel_is_gathered="features" in split)
    d_hidden = program.output_shardings[1][0]
    assert d_hidden.is_equivalent_to(NamedSharding(mesh, of_hidden), 3)
