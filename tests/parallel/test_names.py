"""The names of a mesh's axes, given outside of ``shard_map``."""

import contextlib
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import divergence as divergences
from oracle.programs import jit_quickly

import jaxloss
from parallel.test_mesh import assert_close, collectives

pytestmark = pytest.mark.jax_leaks("jit(grad(shard_map))")
B, L, D, D2, V, CHUNK = 16, 8, 16, 24, 96, 4
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


@cache
def mesh_of(kind):
    return jax.make_mesh((4, 2), ("d", "t"), axis_types=(KINDS[kind],) * 2)


@cache
def operands():
    """Of a student, a teacher near to it, and the tokens: two devices have none that counts."""
    rng = np.random.default_rng(0)
    narrow = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    labels = rng.integers(0, V - 5, (B, L))
    labels[:4] = labels[9, 2:6] = -100
    given = {"h": narrow(B, L, D), "k": narrow(D, V), "b": narrow(V), "c": narrow(V)}
    given |= {"g": narrow(B, L, D2), "m": narrow(D2, V)}
    return given, jnp.asarray(labels, jnp.int32)


def cross_entropy(h, k, b, y, **names):
    options = {"bias": b, "num_classes": V - 5, "label_smoothing": 0.1, "chunk_size": CHUNK}
    return jaxloss.linear_cross_entropy(h, k, y, **options, **names)


def blocks(h, k, b, y, **names):
    return cross_entropy(h, k, b, y, implementation="vocab_blocks", **names)


def stored(h, k, b, y, **names):
    options = {"num_classes": V - 5, "z_loss": 1e-3, "chunk_size": CHUNK}
    options |= {"implementation": "stored_exponentials", "label_smoothing": 0.1}
    options["weight"] = 1 + jnp.sin(jnp.arange(V - 5.0)) / 2
    return jaxloss.linear_cross_entropy(h, k, y, bias=b, **options, **names)


def tied(h, k, y, kernel_spec=None, **names):
    if kernel_spec is not None:
        names["kernel_spec"] = P(*(*kernel_spec, None)[:2][::-1])
    options = {"vocab_axis": 0, "chunk_size": CHUNK, "reduction": "none"}
    return jaxloss.linear_cross_entropy(h, k.T, y, **options, **names)


def probabilities(h, k, b, y, **names):
    q = jax.nn.one_hot(jnp.maximum(y, 0), V) * 0.7 + 0.3 / V
    weight = (y >= 0).astype(jnp.float32)
    return jaxloss.linear_cross_entropy(h, k, q, bias=b, sample_weight=weight, **names)


def statistics(h, k, y, **names):
    stats = jaxloss.linear_token_stats(h, k, y, chunk_size=CHUNK, **names)
    return stats.log_prob, stats.entropy, stats.rank.astype(jnp.float32)


def own_loss(h, k, c, y, **names):
    def squared(x, y):  # it closes over an array that has a gradient
        return (jaxloss.cross_entropy(x * c[None], y, reduction="none") / 20) ** 2

    weight = (y >= 0).astype(jnp.float32)
    options = {"sample_weight": weight, "chunk_size": CHUNK}
    return jaxloss.linear_loss(squared, h, k, y, **options, **names)


def divergence(h, k, g, m, y, kind="forward", **names):
    options = {"sample_weight": y >= 0, "chunk_size": CHUNK, "num_classes": V - 5}
    return jaxloss.linear_kl_divergence(h, k, g, m, divergence=kind, **options, **names)


LOSSES = {
    "cross_entropy": cross_entropy,
    "blocks": blocks,
    "stored": stored,
    "tied": tied,
    "probabilities": probabilities,
    "statistics": statistics,
    "own_loss": own_loss,
    "divergence": divergence,
    "reverse": partial(divergence, kind="reverse"),
    "jensen_shannon": partial(divergence, kind="jensen_shannon"),
}
NAMES = {
    "data": {"token_axis_name": "d"},
    "both": {"token_axis_name": ("d", "t")},
    "data and tensor": {"token_axis_name": "d", "vocab_axis_name": "t"},
    "tensor": {"vocab_axis_name": ("t", "d")},
    "context": {"token_axis_name": P("t", "d")},
    "features are gathered": {"token_axis_name": P(None, "d", "t")},
    "features and tensor": {"token_axis_name": P("d", None, "t"), "vocab_axis_name": "t"},
    "fsdp, features": {"token_axis_name": "d", "kernel_spec": P("d")},
    "fsdp, vocabulary": {"token_axis_name": ("d", "t"), "kernel_spec": P(None, ("t", "d"))},
    "fsdp and tensor": {"token_axis_name": "d", "kernel_spec": P("d", "t")},
    "all of them": {"token_axis_name": "d", "kernel_spec": P(None, ("t", "d"))},
}
PAIRS = [
    (loss, names)
    for loss in LOSSES
    for names in NAMES
    if loss != "own_loss" or ("tensor" not in names and names != "all of them")
]


def arguments_of(loss):
    given, y = operands()
    wanted = {"own_loss": "hkc", "divergence": "hkgm", "statistics": "hk", "tied": "hk"}
    wanted |= dict.fromkeys(("reverse", "jensen_shannon"), wanted["divergence"])
    return [given[name] for name in wanted.get(loss, "hkb")], y


def scalar_of(function):
    """Of all outputs, and of no terms of both signs, whose sum would have less digits."""

    def of(*args):
        outs = jax.tree.leaves(function(*args))
        each = (jnp.mean(x * (1 + 0.25 * jnp.cos(x))) for x in outs)
        return sum(x * jnp.float32(2**i) for i, x in enumerate(each))

    return of


def value_and_gradients(function, count):
    return jax.value_and_grad(scalar_of(function), tuple(range(count)))


@cache
def expected_of(loss):
    given, y = arguments_of(loss)
    return jit_quickly(value_and_gradients(LOSSES[loss], len(given)))(*given, y)


@pytest.mark.parametrize(("loss", "names"), PAIRS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_names_change_no_number(kind, loss, names):
    given, y = arguments_of(loss)
    function = partial(LOSSES[loss], **NAMES[names])
    with jax.set_mesh(mesh_of(kind)):
        got = jit_quickly(value_and_gradients(function, len(given)))(*given, y)
    assert_close(got, expected_of(loss))


@contextlib.contextmanager
def older_context(mesh):
    with pytest.warns(DeprecationWarning, match="with mesh"), mesh:
        yield


CONTEXTS = {
    "set_mesh": (jax.set_mesh, {}),
    "with mesh": (older_context, {}),
    "argument": (lambda mesh: contextlib.nullcontext(), {"mesh": mesh_of("automatic")}),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("loss", ["cross_entropy", "statistics", "own_loss", "divergence"])
@pytest.mark.parametrize("jit", [jit_quickly, lambda f: f], ids=["jit", "eager"])
def test_where_the_mesh_comes_from(jit, loss, context):
    given, y = arguments_of(loss)
    enter, options = CONTEXTS[context]
    function = partial(LOSSES[loss], token_axis_name="d", **options)
    with enter(mesh_of("automatic")):
        got = jit(value_and_gradients(function, len(given)))(*given, y)
    assert_close(got, expected_of(loss))


@pytest.mark.parametrize("names", ["data", "data and tensor", "fsdp and tensor", "context"])
def test_gradients_come_back_as_they_are_named(names):
    (h, k, b), y = arguments_of("cross_entropy")
    asked = NAMES[names]
    mesh = mesh_of("automatic")
    function = partial(cross_entropy, mesh=mesh, **asked)
    got = jax.jit(jax.grad(lambda h, k: function(h, k, b, y), (0, 1)))(h, k)
    tokens = asked["token_axis_name"]
    tokens = tokens if isinstance(tokens, P) else P(tokens)
    kernel = asked.get("kernel_spec", P(None, asked.get("vocab_axis_name")))
    for gradient, spec in zip(got, (tokens, kernel), strict=True):
        assert gradient.sharding.is_equivalent_to(NamedSharding(mesh, spec), gradient.ndim)


@pytest.mark.parametrize("loss", ["cross_entropy", "own_loss", "divergence"])
@pytest.mark.parametrize("names", ["data", "both", "context", "fsdp, features"])
def test_nothing_is_sent_within_a_loop(loss, names):
    given, y = arguments_of(loss)
    function = partial(LOSSES[loss], mesh=mesh_of("automatic"), **NAMES[names])
    gradients = value_and_gradients(function, len(given))
    text = jax.jit(gradients).lower(*given, y).compile().as_text()
    assert not [found for found in collectives(text) if found[2]]
    # A device computes the logits of its own tokens alone: of its part of a chunk.
    rows = [int(n) for n in re.findall(rf"= f32\[(\d+),{V}\]\S* dot\(", text) if int(n) != D]
    assert set(rows) <= {CHUNK, CHUNK // 4, D2}


def test_columns_that_are_split_are_not_gathered():
    given, y = arguments_of("divergence")
    function = partial(divergence, mesh=mesh_of("automatic"), **NAMES["data and tensor"])
    gradients = value_and_gradients(function, len(given))
    text = jax.jit(gradients).lower(*given, y).compile().as_text()
    found = collectives(text)
    assert not [kind for kind, *_ in found if kind == "all-gather"]
    # In a loop numbers of a token, and what the devices of a chunk's columns add to its d_hidden.
    inside = [re.findall(r"\d+", shape.split("[")[1]) for _, shape, loop in found if loop]
    assert inside
    assert all(np.prod([int(n) for n in shape]) <= CHUNK * D2 for shape in inside)


@pytest.mark.parametrize("loss", ["cross_entropy", "divergence", "own_loss"])
def test_every_mode(loss):
    (*given, y), names = (*arguments_of(loss)[0], arguments_of(loss)[1]), NAMES["data"]
    along = [jnp.cos(x) for x in given]

    def modes(function):
        scalar = lambda *a: scalar_of(function)(*a, y)  # noqa: E731
        every = tuple(range(len(given)))
        gradient = jax.grad(scalar, every)
        forward = jax.jvp(gradient, given, along)[1]
        reverse = jax.grad(lambda *a: sum(map(jnp.sum, map(jnp.sin, gradient(*a)))), every)(*given)
        return jax.jvp(scalar, given, along)[1], forward, reverse

    with jax.set_mesh(mesh_of("automatic")):
        got = jit_quickly(lambda: modes(partial(LOSSES[loss], **names)))()
    assert_close(got, jit_quickly(lambda: modes(LOSSES[loss]))())


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen_shannon"])
def test_divergences_of_classes_that_are_split_are_exact(kind):
    """Of a student near to its teacher, over parts of the classes: all digits, in every mode."""
    rng = np.random.default_rng(1)
    t = rng.normal(size=(8, 16)) * 4
    t[0] = 30 * (np.arange(16) == 5)  # confident
    t[1] = t[2] = 0.0  # of many maxima; far from its teacher
    x = t + 1e-4 * rng.normal(size=t.shape)
    x[2] += 9 * rng.normal(size=16)
    x, t = np.float32(x), np.float32(t)
    truth = divergences.exact(x, t, divergence=kind)
    eye, names = jnp.eye(16), {"token_axis_name": "d", "vocab_axis_name": "t"}

    def loss(x, t):
        options = {"reduction": "none", "chunk_size": 1, "divergence": kind}
        return jaxloss.linear_kl_divergence(x, eye, t, eye, **options, **names)

    along = np.cos(np.arange(128.0)).reshape(8, 16)
    with jax.set_mesh(mesh_of("automatic")):
        got = loss(x, t)
        slopes = jax.jit(jax.grad(lambda *a: jnp.sum(loss(*a)), (0, 1)))(x, t)
        moved = jax.jit(lambda: jax.jvp(loss, (x, t), (jnp.float32(along), jnp.zeros_like(t)))[1])()
    np.testing.assert_allclose(got, truth.loss, rtol=2e-5)
    for slope, exact in zip(slopes, truth.slopes, strict=True):
        largest = np.max(np.abs(exact), axis=-1, keepdims=True)
        assert np.all(np.abs(slope - exact) <= 1e-5 * largest)
    exact, terms = (np.sum(f(truth.slopes[0] * along), axis=-1) for f in (lambda v: v, np.abs))
    assert np.all(np.abs(moved - exact) <= 1e-5 * terms)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_mesh_of_more_axes_than_are_named(kind):
    """What nobody names of an automatic mesh stays with the partitioner."""
    mesh = mesh_of(kind)
    (h, k, b), y = arguments_of("cross_entropy")
    with jax.set_mesh(mesh):
        h, y = (jax.device_put(x, NamedSharding(mesh, P("d"))) for x in (h, y))
        k = jax.device_put(k, NamedSharding(mesh, P(None, "t")))
        function = partial(cross_entropy, token_axis_name="d")
        compiled = jax.jit(value_and_gradients(function, 3)).lower(h, k, b, y).compile()
        got = compiled(h, k, b, y)
    assert_close(got, expected_of("cross_entropy"))
    assert not [kind for kind, *_ in collectives(compiled.as_text()) if kind == "all-gather"]


def test_names_inside_of_a_shard_map_over_other_axes():
    """Manual axes by their names, and automatic ones by theirs."""
    given, y = arguments_of("cross_entropy")
    mesh = mesh_of("automatic")

    def local(h, k, b, y):
        return cross_entropy(h, k, b, y, token_axis_name=("t", "d"))

    rows = P("t")
    mapped = jax.shard_map(
        local, mesh=mesh, axis_names={"t"}, in_specs=(rows, P(), P(), rows), out_specs=P()
    )
    with jax.set_mesh(mesh):
        got = jit_quickly(value_and_gradients(mapped, 3))(*given, y)
    assert_close(got, expected_of("cross_entropy"))


def test_functions_of_logits_take_the_names_and_constrain_nothing():
    given, y = operands()
    x = given["h"] @ given["k"]
    calls = {
        "cross_entropy": lambda **o: jaxloss.cross_entropy(x, y, **o),
        "token_stats": lambda **o: jaxloss.token_stats(x, y, **o).entropy,
        "total_weight": lambda **o: jaxloss.total_weight(y, **o),
        "metric_sums": lambda **o: jaxloss.metric_sums(jaxloss.token_stats(x, y), **o).nll,
    }
    for name, call in calls.items():
        which = "vocab_axis_name" if name == "token_stats" else "token_axis_name"
        with jax.set_mesh(mesh_of("automatic")):
            np.testing.assert_array_equal(call(**{which: "d"}), call())


def test_export_and_vmap_of_a_step_with_names():
    (h, k, b), y = arguments_of("cross_entropy")
    mesh = mesh_of("automatic")
    step = jax.jit(jax.grad(partial(cross_entropy, mesh=mesh, **NAMES["data and tensor"]), (0, 1)))
    program = export.deserialize(export.export(step)(h, k, b, y).serialize())
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P()))  # noqa: E731
    assert_close(jax.jit(program.call)(*map(place, (h, k, b, y))), step(h, k, b, y))
    stacked = jnp.stack([h, 2 * h])
    got = jax.vmap(lambda h: step(h, k, b, y))(stacked)
    assert_close(jax.tree.map(lambda x: x[0], got), step(h, k, b, y))


@pytest.mark.parametrize(
    ("names", "kind", "text"),
    [
        ({"token_axis_name": "x"}, ValueError, "or of the mesh; got 'x', outside .* on a mesh of"),
        ({"token_axis_name": 3}, TypeError, "token_axis_name must be the name of a mesh axis"),
        ({"token_axis_name": P(None, None, None, "d")}, ValueError, "at most 3 entries"),
        (
            {"token_axis_name": "d", "vocab_axis_name": "d"},
            ValueError, "vocab_axis_name and token_axis_name must differ",
        ),
        ({"kernel_spec": ("d", "t")}, TypeError, "kernel_spec must be a jax.sharding.Partition"),
        ({"kernel_spec": P("d")}, ValueError, "the kernel's features may be sharded over axes"),
        (
            {"token_axis_name": "d", "kernel_spec": P(None, ("d", "t"))},
            ValueError, "its columns over others and then over those; got kernel .*split as",
        ),
        (
            {"vocab_axis_name": "t", "kernel_spec": P(None, "d")},
            ValueError, "kernel_spec must split the columns over vocab_axis_name",
        ),
        ({"mesh": 3, "token_axis_name": "d"}, TypeError, "mesh must be a jax.sharding.Mesh"),
    ],
)  # fmt: skip
def test_errors(names, kind, text):
    (h, k, b), y = arguments_of("cross_entropy")
    with jax.set_mesh(mesh_of("automatic")), pytest.raises(kind, match=text):
        cross_entropy(h, k, b, y, **names)


def test_errors_of_sizes_and_of_a_mesh_without_names():
    (h, k, b), y = arguments_of("cross_entropy")
    mesh = mesh_of("automatic")
    with pytest.raises(ValueError, match=r"axis 0 of hidden must divide among the 4 devices along"):
        cross_entropy(h[:6], k, b, y[:6], token_axis_name="d", mesh=mesh)
    with pytest.raises(ValueError, match=r"axis 1 of kernel must divide among the 4 devices along"):
        jaxloss.linear_cross_entropy(h, k[:, :95], y, vocab_axis_name="d", mesh=mesh)
    with pytest.raises(ValueError, match="mesh is where axes are named; got none"):
        cross_entropy(h, k, b, y, mesh=mesh)
    (*given, m), y = arguments_of("divergence")
    wider = jnp.pad(m, ((0, 0), (0, 2)))
    with pytest.raises(ValueError, match="linear_kl_divergence: both kernels must have as many"):
        divergence(*given, wider, y, vocab_axis_name="t", mesh=mesh)


@pytest.mark.parametrize("loss", ["cross_entropy", "own_loss", "divergence"])
def test_a_warning_where_devices_would_share_tokens(loss):
    given, y = arguments_of(loss)
    with jax.set_mesh(mesh_of("automatic")):
        with pytest.warns(UserWarning, match="128 tokens in chunks of 4 do not divide among"):
            LOSSES[loss](*given, y)
        LOSSES[loss](*given, y, token_axis_name="d")
    LOSSES[loss](*given, y)  # on no mesh there is nothing to say


def test_errors_of_kernels_that_are_split_in_two_ways():
    (h, k, g, m), y = arguments_of("divergence")
    mesh = mesh_of("explicit")
    with jax.set_mesh(mesh):
        k, m = (
            jax.device_put(x, NamedSharding(mesh, P(None, name)))
            for x, name in ((k, "t"), (m, "d"))
        )
        with pytest.raises(ValueError, match="the columns of both kernels must be split alike"):
            divergence(h, k, g, m, y)


def test_errors_of_one_token_and_of_what_a_shard_map_splits():
    (h, k, b), y = arguments_of("cross_entropy")
    mesh = mesh_of("automatic")
    with pytest.raises(ValueError, match="token_axis_name needs a hidden of more than one token"):
        cross_entropy(h[0, 0], k, b, y[0, 0], token_axis_name="d", mesh=mesh)

    def local(h, k, b, y):
        return cross_entropy(h, k, b, y, kernel_spec=P("d"))

    specs = P("d"), P(), P(), P("d")
    with pytest.raises(ValueError, match="kernel_spec is for axes that the surrounding shard_map"):
        jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(h, k, b, y)


def test_a_teacher_alone_says_what_splits_the_tokens():
    given, y = arguments_of("divergence")
    mesh = mesh_of("explicit")
    with jax.set_mesh(mesh):
        g = jax.device_put(given[2], NamedSharding(mesh, P("d")))
        got = divergence(given[0], given[1], g, given[3], y)
    np.testing.assert_allclose(got, divergence(*given, y), rtol=1e-5)


@pytest.mark.parametrize("loss", ["own_loss", "divergence", "reverse"])
def test_types_of_an_explicit_mesh(loss):
    """Without names: of hidden on the tokens' axis, of kernels on it and on the other."""
    given, y = arguments_of(loss)
    mesh = mesh_of("explicit")
    of_kernel = P("d") if loss == "own_loss" else P("d", "t")
    specs = {3: P("d"), 2: of_kernel, 1: P()}
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, specs[x.ndim])) for x in given]
        labels = jax.device_put(y, NamedSharding(mesh, P("d")))
        function = value_and_gradients(LOSSES[loss], len(given))
        if loss == "own_loss":  # it closes over one of them
            text = (
                r"linear_loss: loss_fn must not close over arrays of an explicit mesh; got float32"
            )
            with pytest.raises(ValueError, match=text):
                jit_quickly(function)(*placed, labels)
            placed[2] = given[2]
        got = jit_quickly(function)(*placed, labels)
    assert_close(got, expected_of(loss))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_goes_along_with_a_loss(kind, reduction):
    """In the tokens' order, and split as they are."""
    (h, k, g, m), y = arguments_of("divergence")

    def of_logits(x, y):
        return jaxloss.cross_entropy(x, y, reduction="none"), {"largest": jnp.max(x, axis=-1)}

    def of_stats(stats, reference):
        return reference.reverse_kl - stats.log_prob, (stats.rank < 3, stats.entropy)

    def both(**names):
        options = {"reduction": reduction, "chunk_size": CHUNK, "has_aux": True, **names}
        own = jaxloss.linear_loss(of_logits, h, k, y, sample_weight=y >= 0, **options)
        return own, jaxloss.linear_stats_loss(of_stats, h, k, y, reference=(g, m), **options)

    expected = jit_quickly(both)()
    with jax.set_mesh(mesh_of(kind)):
        got = jit_quickly(partial(both, token_axis_name="d"))()
        assert got[0][1]["largest"].sharding.is_equivalent_to(
            NamedSharding(mesh_of(kind), P("d")), 2
        )
    assert_close(got, expected)
