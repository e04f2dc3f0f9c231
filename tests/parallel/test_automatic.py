"""Meshes of automatic axes, on which XLA's partitioner decides what each device computes."""

import contextlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxloss
from parallel.test_mesh import assert_close, collectives, elements
from parallel.test_names import older_context

B, L, D, V, CHUNK = 16, 8, 16, 96, 32
LAYOUTS = {
    "data": ((8,), ("d",), P("d"), P()),
    "fsdp, features": ((8,), ("d",), P("d"), P("d", None)),
    "fsdp, vocabulary": ((8,), ("d",), P("d"), P(None, "d")),
    "tensor": ((8,), ("t",), P(), P(None, "t")),
    "data and tensor": ((4, 2), ("d", "t"), P("d"), P(None, "t")),
    "context": ((8,), ("c",), P(None, "c"), P()),
}


def operands(ignored=True):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, L, D)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    labels = rng.integers(0, V, (B, L))
    if ignored:
        labels[:2] = -100  # one device of eight has none that counts
        labels[5:9, 3:] = -100
    return hidden, kernel, jnp.asarray(labels, jnp.int32)


def split(layout, hidden, kernel, *per_token):
    shape, names, of_tokens, of_kernel = LAYOUTS[layout]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    return (
        place(hidden, of_tokens),
        place(kernel, of_kernel),
        *(place(x, of_tokens) for x in per_token),
    )


def mean(hidden, kernel, labels, **options):
    return jaxloss.linear_cross_entropy(hidden, kernel, labels, chunk_size=CHUNK, **options)


def with_statistics(hidden, kernel, labels):
    loss, stats = mean(hidden, kernel, labels, reduction="none", return_stats=True)
    return jnp.sum(jnp.sin(loss) + jnp.cos(stats.entropy) + stats.rank.astype(loss.dtype))


def of_top_k(hidden, kernel, labels):
    counts = (labels >= 0)[..., None]
    indices = (labels[..., None] + jnp.arange(3, dtype=jnp.int32)[None, None]) % V
    indices, probabilities = jnp.where(counts, indices, -100), jnp.full(indices.shape, 0.25)
    return mean(hidden, kernel, jaxloss.TopKLabels(indices, probabilities, "uniform"))


def own_loss(hidden, kernel, labels):
    loss = lambda x, y: jaxloss.cross_entropy(x, y, reduction="none") ** 2  # noqa: E731
    weight = (labels >= 0).astype(jnp.float32)
    return jaxloss.linear_loss(loss, hidden, kernel, labels, chunk_size=CHUNK, sample_weight=weight)


def divergence(hidden, kernel, labels):
    given = hidden, kernel, jnp.sin(hidden), kernel + 0.1
    return jaxloss.linear_kl_divergence(*given, chunk_size=CHUNK, sample_weight=labels >= 0)


def stored(hidden, kernel, labels):
    return mean(hidden, kernel, labels, implementation="stored_exponentials")


LOSSES = [mean, with_statistics, of_top_k, own_loss, divergence, stored]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_those_of_one_device(loss, layout):
    given = operands()
    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(*given)
    got = jax.jit(jax.value_and_grad(loss, (0, 1)))(*split(layout, *given))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        # Sums in another order: their terms are as large as the largest entries.
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6 * np.abs(y).max())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layout", ["data", "data and tensor"])
def test_each_device_computes_its_own_tokens_and_sends_none(loss, layout):
    given = split(layout, *operands())
    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*given).compile().as_text()
    devices = LAYOUTS[layout][0][0]
    rows = [int(n) for n in re.findall(rf"= f32\[(\d+),{V // (8 // devices)}\]\S* dot\(", text)]
    products = [n for n in rows if n != D]  # the others are d_kernel
    assert products
    assert max(products) <= CHUNK // devices
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", text)
    assert all(np.prod([int(n) for n in shape.split(",")]) < CHUNK * D for shape in gathered)
    hidden = jax.jit(jax.grad(loss))(*given)
    assert hidden.sharding.is_equivalent_to(given[0].sharding, hidden.ndim)


def blocks(hidden, kernel, labels, **names):
    options = {"implementation": "vocab_blocks", "chunk_size": 24}
    return jaxloss.linear_cross_entropy(hidden, kernel, labels, **options, **names)


def nowhere(_):
    """The types of what a program is given say alone what its mesh is."""
    return contextlib.nullcontext()


@pytest.mark.parametrize("of_context", [jax.set_mesh, nowhere], ids=["set_mesh", "types"])
@pytest.mark.parametrize("loss", [*LOSSES, blocks])
def test_a_kernel_whose_features_are_split_is_whole_before_the_loop(loss, of_context):
    given = operands()
    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(*given)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with of_context(mesh):
        hidden, kernel, labels = (jax.device_put(x, NamedSharding(mesh, P("data"))) for x in given)
        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, kernel, labels).compile()
        got = program(hidden, kernel, labels)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)
    assert got[1][0].sharding.is_equivalent_to(hidden.sharding, hidden.ndim)
    found = collectives(program.as_text())
    gathered = [c[2] for c in found if c[0] == "all-gather" and f"{V}]" in str(c[1])]
    assert gathered
    assert not any(gathered)


def test_tokens_that_are_none_of_a_device_leave_no_trace():
    """Rows of NaN where no token counts, on a device that has no other."""
    hidden, kernel, labels = operands()
    expected = jax.grad(own_loss)(hidden, kernel, labels)
    hidden = hidden.at[:2].set(jnp.nan)
    got = jax.jit(jax.grad(own_loss))(*split("data", hidden, kernel, labels))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


def statistics(hidden, kernel, labels):
    return jaxloss.linear_token_stats(hidden, kernel, labels, chunk_size=CHUNK).entropy


def rows_of_products(function, *given):
    """Rows that a device's products have, of the function's value and gradients."""
    program = jax.jit(jax.value_and_grad(function, (0, 1))).lower(*given).compile().as_text()
    for kind, shape, in_loop in collectives(program):
        # A few numbers a token of a chunk, neither their hidden nor their logits.
        assert kind != "all-gather" or not in_loop or elements(shape) < CHUNK // 2 * D
    rows = (int(n) for n in re.findall(r"= f32\[(\d+),\d+\]\S* dot\(", program))
    return {n for n in rows if n != D}


CONTEXTS = pytest.mark.parametrize(
    "of_context", [jax.set_mesh, older_context, nowhere], ids=["set_mesh", "with", "types"]
)


@CONTEXTS
@pytest.mark.parametrize(
    "axes", [{"context": 8}, {"dp": 4, "sp": 2}, {"fsdp": 2, "cp": 4}], ids=str
)
@pytest.mark.parametrize("loss", [*LOSSES, blocks, statistics], ids=lambda f: f.__name__)
def test_a_sequence_that_the_mesh_splits_is_found_by_its_name(loss, axes, of_context):
    """Of traced arrays the axis's name is all that is known of an automatic axis."""
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    split = P(next((name for name in axes if name in ("dp", "fsdp")), None), [*axes][-1])
    given = operands()
    expected = loss(*given)
    hidden, kernel, labels = given
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    placed = place(hidden, split), place(kernel, P()), place(labels, split)
    with of_context(mesh):
        np.testing.assert_allclose(jax.jit(loss)(*placed), expected, rtol=2e-5)
        rows = rows_of_products(lambda *x: loss(*x).sum(), *placed)
    # A chunk's tokens of all devices, divided among them; without chunks, all tokens.
    assert rows <= ({B * L // 8} if loss is blocks else {CHUNK // 8})


@CONTEXTS
def test_a_batch_that_vmap_splits_beside_a_sequence(of_context):
    """Its axis was refused by a ``shard_map`` that nobody had asked for."""
    mesh = jax.make_mesh((4, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    hidden, kernel, labels = operands(ignored=False)
    hidden, labels = (x.reshape(4, B // 4, *x.shape[1:]) for x in (hidden, labels))

    def step(split_over, *given):
        def loss(hidden, kernel, labels):
            each = lambda h, y: mean(h, kernel, y)  # noqa: E731
            return jnp.mean(jax.vmap(each, spmd_axis_name=split_over)(hidden, labels))

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(*given)

    expected = step(None, hidden, kernel, labels)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    split = P("data", None, "context")
    with of_context(mesh):
        got = step("data", place(hidden, split), place(kernel, P()), place(labels, split))
    assert_close(got, expected)
    assert got[1][0].sharding.is_equivalent_to(NamedSharding(mesh, split), 4)


@pytest.mark.parametrize("loss", [mean, blocks])
def test_arrays_of_one_device_where_the_older_context_has_a_sequence(loss):
    """JAX takes them there: no more than a constraint or a ``shard_map`` makes them a mesh's."""
    mesh = jax.make_mesh((4, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    given = [jax.device_put(x, jax.devices()[0]) for x in operands()]
    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(*given)
    with older_context(mesh):
        assert_close(jax.jit(jax.value_and_grad(loss, (0, 1)))(*given), expected)


def puts_parts_first(loss, *given):
    """Whether the program has hidden in an order of parts of sequences."""
    return bool(re.search(rf"f32\[\d+,{B},\d+,{D}\]", str(jax.make_jaxpr(loss)(*given))))


def test_nothing_is_moved_where_no_sequence_is_known_to_be_split():
    hidden, kernel, labels = operands()

    def made(mesh, loss, *given):
        with jax.set_mesh(jax.make_mesh(*mesh, axis_types=(AxisType.Auto,) * 2)):
            return puts_parts_first(loss, *given)

    mesh, alone = ((4, 2), ("data", "context")), ((8, 1), ("data", "context"))
    flat = hidden.reshape(-1, D), kernel, labels.reshape(-1)
    for loss in (mean, blocks):
        assert made(mesh, loss, hidden, kernel, labels)
        assert not made(alone, loss, hidden, kernel, labels)
        assert not made(((4, 2), ("data", "fsdp")), loss, hidden, kernel, labels)
        assert not made(mesh, loss, *flat)


def test_a_warning_where_a_sequence_does_not_divide():
    """The tokens of all sequences do, so that nothing else would say it."""
    hidden, kernel, labels = operands()
    with jax.set_mesh(jax.make_mesh((4, 2), ("d", "context"), axis_types=(AxisType.Auto,) * 2)):
        with pytest.warns(UserWarning, match="sequences of 7 tokens do not divide among the 2"):
            made = puts_parts_first(mean, hidden[:, :-1], kernel, labels[:, 1:])
        assert not made
        jax.make_jaxpr(mean)(hidden, kernel, labels)
        of_one = hidden.reshape(-1, 1, D), kernel, labels.reshape(-1, 1)  # nothing to split
        jax.make_jaxpr(mean)(*of_one)


@pytest.mark.parametrize("names", [{}, {"token_axis_name": "d"}], ids=["alone", "named"])
def test_a_warning_where_the_logits_of_a_top_k_are_gathered(names):
    """As they are without names: XLA's partitioner splits no top k."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    hidden, kernel, _ = operands()
    hidden = jax.device_put(hidden, NamedSharding(mesh, P("d")))
    function = partial(jaxloss.linear_top_k, k=3, chunk_size=CHUNK, **names)
    said = contextlib.nullcontext() if names else pytest.warns(UserWarning, match="are gathered")
    with jax.set_mesh(mesh), said:
        program = jax.jit(function).lower(hidden, kernel).compile().as_text()
    logits = re.findall(rf"= f32\[\d+,{V}\]\S* all-gather\(", program)
    assert bool(logits) == (not names)


def test_an_array_says_itself_what_splits_it():
    given = operands()
    function = partial(jaxloss.linear_cross_entropy, chunk_size=CHUNK)
    for split_over, of_sequences in (("context", True), ("data", False)):
        placed = split(split_over, *given)
        assert puts_parts_first(partial(function, *placed)) == of_sequences
        np.testing.assert_allclose(function(*placed), function(*given), rtol=2e-5)


@pytest.mark.parametrize("loss", [mean, blocks])
@pytest.mark.parametrize("names", [P(None, "context"), P("d", "context")], ids=str)
def test_with_the_name_each_device_computes_its_own_sequences(loss, names):
    shape = {"d": 4 if "d" in names else 1, "context": 2 if "d" in names else 8}
    mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * 2)
    hidden, kernel, labels = operands()
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    given = place(hidden, names), place(kernel, P()), place(labels, names)
    named = partial(loss, token_axis_name=names, mesh=mesh)
    text = jax.jit(jax.value_and_grad(named, (0, 1))).lower(*given).compile().as_text()
    rows = [int(n) for n in re.findall(r"= f32\[(\d+),\d+\]\S* dot\(", text)]
    assert {n for n in rows if n != D} <= ({4, 8, 16} if loss is mean else {B * L // 8})
    assert "all-gather" not in text
    np.testing.assert_allclose(jax.jit(named)(*given), loss(hidden, kernel, labels), rtol=1e-5)


def test_columns_that_the_tokens_devices_split_stay_where_they_are():
    """FSDP on the vocabulary, which no type tells the call: a chunk's hidden goes to the columns,
    and what they give comes back. So is no array of the kernel's size sent, in no step or before.
    """
    given = split("fsdp, vocabulary", *operands())
    program = jax.jit(jax.value_and_grad(mean, (0, 1))).lower(*given).compile()
    found = collectives(program.as_text())
    assert max(elements(shape) for _, shape, _ in found) <= CHUNK * D < D * V
    d_kernel = program.output_shardings[1][1]
    assert d_kernel.is_equivalent_to(given[1].sharding, 2)


@pytest.mark.parametrize("names", [{}, {"vocab_axis_name": "t"}], ids=["alone", "named"])
def test_a_warning_where_each_device_computes_blocks_of_all_columns(names):
    """XLA's partitioner cuts no block out of columns that are split."""
    hidden, kernel, labels = operands()
    mesh = jax.make_mesh((8,), ("t",), axis_types=(AxisType.Auto,))
    kernel = jax.device_put(kernel, NamedSharding(mesh, P(None, "t")))
    function = partial(blocks, mesh=mesh, **names) if names else blocks
    said = contextlib.nullcontext()
    if not names:
        said = pytest.warns(UserWarning, match=r"columns, as \('t',\) may, each device computes")
    with said:
        program = jax.jit(function).lower(hidden, kernel, labels).compile().as_text()
    gathered = [shape for kind, shape, _ in collectives(program) if kind == "all-gather"]
    assert bool(gathered) == (not names)


def test_no_such_warning_where_all_axes_split_tokens():
    hidden, kernel, labels = operands()
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)):
        jax.make_jaxpr(blocks)(hidden, kernel, labels)
    with jax.set_mesh(jax.make_mesh((8, 1), ("data", "t"), axis_types=(AxisType.Auto,) * 2)):
        jax.make_jaxpr(blocks)(hidden, kernel, labels)


@CONTEXTS
@pytest.mark.parametrize("devices", [3, 6])
def test_a_mesh_of_some_of_the_devices(devices, of_context):
    """A chunk's tokens divide among those of the mesh, which are no divisor of all."""
    hidden, kernel, labels = operands()
    hidden, labels = hidden[:12], labels[:12]
    function = partial(jaxloss.linear_cross_entropy, chunk_size=24)
    expected = jax.jit(jax.value_and_grad(function, (0, 1)))(hidden, kernel, labels)
    some = jax.devices()[:devices]
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=some)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    placed = place(hidden, P("data")), place(kernel, P()), place(labels, P("data"))
    with of_context(mesh):
        assert_close(jax.jit(jax.value_and_grad(function, (0, 1)))(*placed), expected)
        assert rows_of_products(function, *placed) == {24 // devices}


@pytest.mark.parametrize("of_context", [jax.set_mesh, nowhere], ids=["set_mesh", "types"])
@pytest.mark.parametrize("split", [P("data", "context"), P("data")], ids=str)
def test_a_step_is_exported(split, of_context):
    mesh = jax.make_mesh((4, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    given = operands()
    step = jax.jit(jax.value_and_grad(mean, (0, 1)))
    expected = step(*given)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    placed = [place(x, spec) for x, spec in zip(given, (split, P("data"), split), strict=True)]
    with of_context(mesh):
        program = export.deserialize(export.export(step)(*placed).serialize())
        assert program.nr_devices == 8
        assert_close(jax.jit(program.call)(*placed), expected)


def test_microbatches_are_accumulated():
    """By a scan over them, each of which is split over data and sequences."""
    mesh = jax.make_mesh((4, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    hidden, kernel, labels = operands()
    expected = jax.jit(jax.value_and_grad(mean, 1))(hidden, kernel, labels)
    split = P(None, "data", "context")
    some, given = ((4, B // 4), NamedSharding(mesh, split))
    batches = [jax.device_put(x.reshape(*some, *x.shape[1:]), given) for x in (hidden, labels)]

    def accumulated(kernel, *batches):
        weight = jaxloss.total_weight(batches[1])

        def add(total, batch):
            h, y = batch
            part = jax.value_and_grad(lambda k: mean(h, k, y, reduction="sum") / weight)(kernel)
            return jax.tree.map(jnp.add, total, part), None

        return jax.lax.scan(add, (jnp.float32(0), jnp.zeros_like(kernel)), tuple(batches))[0]

    kernel = jax.device_put(kernel, NamedSharding(mesh, P("data")))
    assert_close(jax.jit(accumulated)(kernel, *batches), expected)
