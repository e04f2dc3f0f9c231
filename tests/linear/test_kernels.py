"""The kernels that a product takes: of another dtype than ``hidden``, low-rank, quantised."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracle.budget import relative_errors
from oracle.programs import equations, jit_quickly, temporary_mib

import jaxloss

N, D, V, R, K = 22, 16, 50, 3, 4
EPS, NARROW = 2.0**-23, 2.0**-8  # of float32; of bfloat16, to nearest
KINDS = ("low rank", "int8", "int4", "float8_e4m3fn", "float8_e5m2", "groups", "qlora")


def arrays():
    rng = np.random.default_rng(0)
    f32 = partial(jnp.asarray, dtype=jnp.float32)
    shapes = {"h": (N, D), "k": (D, V), "a": (D, R), "b": (R, V), "g": (N, 7), "t": (7, V)}
    given = {name: f32(rng.normal(size=shape)) for name, shape in shapes.items()}
    given["w"] = f32(rng.random(N))
    labels = rng.integers(0, V, N)
    labels[[3, 8, 9]] = -100
    named = np.stack([rng.permutation(V)[:K] for _ in range(N)])
    return given, jnp.asarray(labels, jnp.int32), jnp.asarray(named, jnp.int32)


GIVEN, LABELS, NAMED = arrays()
COUNT = LABELS >= 0


def plain_nll(x):
    """Of each token, of materialised logits; 0 where it is ignored."""
    of_label = jnp.take_along_axis(jax.nn.log_softmax(x), jnp.maximum(LABELS, 0)[:, None], 1)
    return jnp.where(COUNT, -of_label[:, 0], 0)


def plain_entropy(x):
    log_p = jax.nn.log_softmax(x)
    return jnp.where(COUNT, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1), 0)


def plain_kl(x, g, t):
    q, p = jax.nn.log_softmax(x), jax.nn.log_softmax(g @ t)
    return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))


def stats_loss(h, k, **options):
    loss = lambda s: 0.1 * s.entropy - s.log_prob  # noqa: E731
    return jaxloss.linear_stats_loss(loss, h, k, LABELS, **options)


def own_loss(h, k, **options):
    loss = partial(jaxloss.cross_entropy, reduction="none")
    return jaxloss.linear_loss(loss, h, k, LABELS, sample_weight=COUNT, **options)


def of_statistics(h, k, **options):
    stats = jaxloss.linear_token_stats(h, k, LABELS, **options)
    return jnp.sum(GIVEN["w"] * (stats.entropy - stats.log_prob))


def none(h, k, **options):
    each = jaxloss.linear_cross_entropy(h, k, LABELS, reduction="none", **options)
    return jnp.sum(GIVEN["w"] * each)


def blocks(h, k, **options):
    options |= {"implementation": "vocab_blocks", "chunk_size": 7}
    return jaxloss.linear_cross_entropy(h, k, LABELS, **options)


def divergence(h, k, vocab_axis=-1, **options):
    own = {"vocab_axis": vocab_axis, "teacher_vocab_axis": -1}
    return jaxloss.linear_kl_divergence(h, k, GIVEN["g"], GIVEN["t"], **own, **options)


def named(h, k, **options):
    return jnp.mean(jaxloss.linear_log_probs_at(h, k, NAMED, **options))


# Each call, and its formula of the logits in float64.
CALLS = {
    "mean": (
        lambda h, k, **o: jaxloss.linear_cross_entropy(h, k, LABELS, **o),
        lambda x: jnp.sum(plain_nll(x)) / COUNT.sum().astype(x.dtype),
    ),
    "none": (none, lambda x: jnp.sum(wide(GIVEN["w"]) * plain_nll(x))),
    "blocks": (blocks, lambda x: jnp.sum(plain_nll(x)) / COUNT.sum().astype(x.dtype)),
    "statistics": (
        of_statistics,
        lambda x: jnp.sum(wide(GIVEN["w"]) * (plain_entropy(x) + plain_nll(x))),
    ),
    "loss": (own_loss, lambda x: jnp.sum(plain_nll(x)) / COUNT.sum().astype(x.dtype)),
    "stats loss": (
        stats_loss,
        lambda x: jnp.sum(0.1 * plain_entropy(x) + plain_nll(x)) / COUNT.sum().astype(x.dtype),
    ),
    "divergence": (divergence, None),  # its teacher's operands are narrowed too
    "named": (
        named,
        lambda x: jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x), NAMED, axis=1)),
    ),
}


def plain_of(name, dtype=jnp.float32):
    if name != "divergence":
        return CALLS[name][1]
    return partial(plain_kl, **{n: wide(GIVEN[n].astype(dtype)) for n in "gt"})


def wide(x):
    return x.astype(jnp.float32).astype(jnp.float64)


def quantized(kind, vocab_axis):
    """The kernel, and of nothing what it stands for in float64."""
    groups = 4 if kind in ("groups", "qlora") else 1
    dtype = "int8" if groups > 1 else kind
    rng = np.random.default_rng(1)
    scale = jnp.asarray(0.1 + rng.random((groups, V)), jnp.float32)
    q = (GIVEN["k"] * (2 if "int" in dtype else 1)).astype(dtype)

    def merged():
        return wide(q) * jnp.repeat(wide(scale), D // groups, axis=0)

    own = scale[0] if kind == "int8" else scale  # [V], and [1, V]
    return jaxloss.QuantizedKernel(q.T if vocab_axis == 0 else q, own), merged


def head_of(kind, vocab_axis):
    """``(head, merged)``: of ``(a, b)``, the kernel, and what it stands for."""
    if kind == "low rank":
        frozen, k = GIVEN["k"].T if vocab_axis == 0 else GIVEN["k"], lambda: wide(GIVEN["k"])
    else:
        frozen, k = quantized(kind, vocab_axis)
    if kind not in ("low rank", "qlora"):
        return lambda a, b: frozen, lambda a, b: k()
    return (
        lambda a, b: jaxloss.LowRankKernel(frozen, a, b, scale=0.5),
        lambda a, b: k() + 0.5 * a @ b,
    )


@pytest.mark.parametrize(("kind", "vocab_axis"), [*zip(KINDS, (0, 1, 0, 1, 0, 0, 1), strict=True)])
@pytest.mark.parametrize("name", CALLS)
def test_value_and_gradients_are_those_of_the_merged_kernel(name, kind, vocab_axis):
    function, head = CALLS[name][0], head_of(kind, vocab_axis)
    given = GIVEN["h"], GIVEN["a"], GIVEN["b"]
    options = {"vocab_axis": vocab_axis, "chunk_size": 5}

    def of_head(h, a, b):
        return function(h, head[0](a, b), **options)

    found = jit_quickly(jax.value_and_grad(of_head, (0, 1, 2)))(*given)
    with jax.enable_x64():

        def of_merged(h, a, b):
            return plain_of(name)(h @ head[1](a, b))

        true = jax.value_and_grad(of_merged, (0, 1, 2))(*map(wide, given))
        # float32 products of D terms; of groups, the kernel's own rounding.
        assert max(relative_errors(found, true)) <= 32 * EPS


@pytest.mark.parametrize("name", CALLS)
def test_float32_operands_of_narrow_products(name):
    """As of operands rounded to bfloat16, except for the logits' gradient, which is rounded too."""
    function, given = CALLS[name][0], (GIVEN["h"], GIVEN["k"])

    def narrow(h, k):
        return function(h, k, chunk_size=5, dtype=jnp.bfloat16)

    found = jit_quickly(jax.value_and_grad(narrow, (0, 1)))(*given)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    with jax.enable_x64():
        rounded = (wide(x.astype(jnp.bfloat16)) for x in given)
        plain = plain_of(name, jnp.bfloat16)
        true = jax.value_and_grad(lambda h, k: plain(h @ k), (0, 1))(*rounded)
        value, *gradients = relative_errors(found, true)
    assert value <= 32 * EPS
    assert max(gradients) <= NARROW
    read = (x.aval.dtype for dot in dots(jax.grad(narrow, (0, 1)), *given) for x in dot.invars)
    assert {*read} == {jnp.dtype(jnp.bfloat16)}


def dots(f, *args):
    return [e for e in equations(f, *args) if e.primitive.name == "dot_general"]


@pytest.mark.parametrize("implementation", ["token_chunks", "vocab_blocks"])
def test_a_gradient_is_nearer_than_that_of_a_cast_by_hand(implementation):
    """It is never rounded to bfloat16, which the transpose of a cast does."""
    options = {"implementation": implementation, "chunk_size": 5}
    given = GIVEN["h"], GIVEN["k"]

    def ours(h, k):
        return jaxloss.linear_cross_entropy(h, k, LABELS, dtype=jnp.bfloat16, **options)

    def by_hand(h, k):
        h, k = h.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
        return jaxloss.linear_cross_entropy(h, k, LABELS, **options)

    found, other = (jit_quickly(jax.grad(f, (0, 1)))(*given) for f in (ours, by_hand))
    with jax.enable_x64():
        rounded = (wide(x.astype(jnp.bfloat16)) for x in given)
        true = jax.grad(lambda h, k: CALLS["mean"][1](h @ k), (0, 1))(*rounded)
        for x, y, z in zip(*map(partial(map, np.asarray), (found, other, true)), strict=True):
            assert np.linalg.norm(x - z) < 0.9 * np.linalg.norm(y - z)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_gradients_come_back_in_their_operands_dtypes(dtype):
    h, k = GIVEN["h"].astype(jnp.bfloat16), GIVEN["k"]
    bias = jnp.zeros(V, jnp.float16)

    def loss(h, k, bias):
        return jaxloss.linear_cross_entropy(h, k, LABELS, bias=bias, chunk_size=5, dtype=dtype)

    found = jax.grad(loss, (0, 1, 2))(h, k, bias)
    assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32, jnp.float16]
    with jax.enable_x64():
        plain = lambda h, k: CALLS["mean"][1](h @ k)  # noqa: E731
        true = jax.grad(plain, (0, 1))(wide(h.astype(dtype)), wide(k.astype(dtype)))
        assert max(relative_errors(found[:2], true)) <= 2 * NARROW


@pytest.mark.parametrize("implementation", ["token_chunks", "vocab_blocks"])
def test_scales_are_not_lost_in_float16(implementation):
    """Beside a confident label each other class has 64 p = 2e-4; a scale of 1e-4 makes 2e-8 of it,
    less than the least float16. Columns that have a mean in common show what is lost."""
    columns, rng = 2048, np.random.default_rng(0)
    scale = jnp.full(columns, 1e-4, jnp.float32).at[7].set(0)
    values = rng.integers(60, 80, (D, columns)) * np.where(rng.random(D) < 0.5, 1, -1)[:, None]
    values = jnp.asarray(values, jnp.int8)
    h, y = GIVEN["h"].astype(jnp.float16), jnp.zeros(N, jnp.int32)
    bias = jnp.zeros(columns, jnp.float32).at[0].set(np.log(columns) + 5)

    def step(h):
        kernel = jaxloss.QuantizedKernel(values, scale)
        given = h, kernel, y
        options = {"bias": bias, "reduction": "sum", "implementation": implementation}
        return 2.0**10 * jaxloss.linear_cross_entropy(*given, **options)

    found = 2.0**-10 * np.asarray(jax.grad(step)(h), np.float64)
    kernel = np.asarray(values, np.float64) * np.asarray(scale, np.float64)
    x = np.asarray(h, np.float64) @ kernel + np.asarray(bias, np.float64)
    others = np.exp(x[:, 1:] - x[:, :1])
    p = others / (1 + others.sum(axis=1, keepdims=True))
    truth = p @ (kernel[:, 1:] - kernel[:, :1]).T
    np.testing.assert_allclose(found, truth, rtol=0, atol=2.0**-6 * np.max(np.abs(truth)))


@pytest.mark.parametrize("kind", ["dtype", "low rank", "int8", "qlora"])
@pytest.mark.parametrize("name", ["mean", "none", "blocks", "stats loss"])
def test_every_mode(name, kind):
    """Forward over reverse, and reverse over reverse, beside the merged kernel's in float64."""
    function, (head, merged) = CALLS[name][0], head_of("low rank" if kind == "dtype" else kind, 1)
    given = GIVEN["h"], GIVEN["a"], GIVEN["b"]
    options = {"chunk_size": 5, "dtype": jnp.bfloat16 if kind == "dtype" else None}

    def along(f, *given):
        gradient = jax.grad(f, (0, 1, 2))
        twice = jax.grad(
            lambda *x: sum(jnp.vdot(g, y) for g, y in zip(gradient(*x), x, strict=True)), (0, 1, 2)
        )
        return jax.jvp(f, given, given)[1], jax.jvp(gradient, given, given)[1], twice(*given)

    of_head = lambda h, a, b: function(h, head(a, b), **options)  # noqa: E731
    found = jit_quickly(partial(along, of_head))(*given)
    with jax.enable_x64():
        narrow = jnp.bfloat16 if kind == "dtype" else jnp.float32
        of_merged = lambda h, a, b: CALLS[name][1](h @ merged(a, b))  # noqa: E731
        true = along(of_merged, *(wide(x.astype(narrow)) for x in given))
        assert max(relative_errors(found, true)) <= (32 * NARROW if kind == "dtype" else 256 * EPS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_and_the_samples(kind):
    head, merged = head_of(kind, 1)
    head = head(GIVEN["a"], GIVEN["b"])
    index, found = jaxloss.linear_top_k(GIVEN["h"], head, 4, chunk_size=5)
    key = jax.random.key(0)
    sample, of_sample = jaxloss.linear_sample(key, GIVEN["h"], head, chunk_size=5)
    with jax.enable_x64():
        x = wide(GIVEN["h"]) @ merged(wide(GIVEN["a"]), wide(GIVEN["b"]))
        expected, where = jax.lax.top_k(jax.nn.log_softmax(x), 4)
        np.testing.assert_array_equal(index, where)
        np.testing.assert_allclose(found, expected, rtol=32 * EPS)
        of_it = jnp.take_along_axis(jax.nn.log_softmax(x), sample[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(of_sample, of_it, rtol=64 * EPS)


@pytest.mark.parametrize("kind", ["int8", "groups", "qlora"])
def test_products_in_float64_have_its_digits(kind):
    """Nothing that a kernel is made of is rounded to float32 on its way."""
    with jax.enable_x64():
        frozen, _ = quantized(kind, -1)
        scale = wide(frozen.scale) + 2.0**-40  # float32 does not hold it
        frozen = jaxloss.QuantizedKernel(frozen.values, scale)
        groups = scale.size // V
        merged = wide(frozen.values) * jnp.repeat(scale.reshape(groups, V), D // groups, axis=0)
        a, b, factor = wide(GIVEN["a"]), wide(GIVEN["b"]), 0.1

        def of_head(h, narrow):
            head = frozen
            if kind == "qlora":
                head = jaxloss.LowRankKernel(frozen, a.astype(narrow), b.astype(narrow), factor)
            return jaxloss.linear_cross_entropy(h.astype(narrow), head, LABELS, dtype=jnp.float64)

        def of_merged(h):
            update = factor * a @ b if kind == "qlora" else 0
            return CALLS["mean"][1](h @ (merged + update))

        h = wide(GIVEN["h"])
        true = jax.value_and_grad(of_merged)(h)
        for narrow in (jnp.float32, jnp.float64):
            value, gradient = jax.value_and_grad(of_head)(h, narrow)
            assert relative_errors([value], [true[0]])[0] <= 2.0**-45
            room = 2.0**-45 if narrow == jnp.float64 else EPS  # the cast rounds its own cotangent
            assert relative_errors([gradient], [true[1]])[0] <= room


def test_what_is_frozen_has_no_gradient():
    quantised, _ = quantized("int8", 1)
    frozen = GIVEN["k"], quantised.scale

    def loss(k, scale):
        head = jaxloss.LowRankKernel(k, GIVEN["a"], GIVEN["b"])
        other = jaxloss.QuantizedKernel(quantised.values, scale)
        losses = (jaxloss.linear_cross_entropy(GIVEN["h"], x, LABELS) for x in (head, other))
        return sum(losses)

    assert not any(jnp.any(g) for g in jax.grad(loss, (0, 1))(*frozen))


def test_products_of_a_low_rank_kernel():
    """Two of the frozen kernel's size; what the update takes is of its rank."""
    large = GIVEN["h"], GIVEN["a"], GIVEN["b"]

    def loss(h, a, b):
        head = jaxloss.LowRankKernel(GIVEN["k"], a, b)
        return jaxloss.linear_cross_entropy(h, head, LABELS, chunk_size=N)

    counted = dots(jax.grad(loss, (0, 1, 2)), *large)
    assert len([d for d in counted if d.invars[1].aval.shape == (D, V)]) == 2


@pytest.mark.parametrize("implementation", ["token_chunks", "vocab_blocks"])
@pytest.mark.parametrize("kind", ["low rank", "int8", "groups", "qlora"])
def test_no_array_of_the_kernels_size_is_made(kind, implementation):
    n, d, v = 64, 512, 32768  # 64 MiB in float32
    blocks = implementation == "vocab_blocks"

    def loss(h, k, scale, a, b, y):
        if kind != "low rank":
            k = jaxloss.QuantizedKernel(k, scale)
        k = jaxloss.LowRankKernel(k, a, b) if kind in ("low rank", "qlora") else k
        options = {"implementation": implementation, "chunk_size": 1024 if blocks else 16}
        return jaxloss.linear_cross_entropy(h, k, y, **options)

    typed = jax.ShapeDtypeStruct
    values = typed((d, v), jnp.float32 if kind == "low rank" else jnp.int8)
    scale = typed((4 if kind in ("groups", "qlora") else 1, v), jnp.float32)
    update = typed((d, 8), jnp.float32), typed((8, v), jnp.float32)
    given = typed((n, d), jnp.float32), values, scale, *update, typed((n,), jnp.int32)
    assert temporary_mib(jax.value_and_grad(loss, (0, 3, 4)), given) <= 30


def test_narrow_products_hold_one_cast_kernel_or_a_block():
    n, d, v = 64, 512, 32768  # 32 MiB in bfloat16, and XLA:CPU multiplies what it has widened
    typed = jax.ShapeDtypeStruct
    given = typed((n, d), jnp.float32), typed((d, v), jnp.float32), typed((n,), jnp.int32)

    def loss(h, k, y, **options):
        return jaxloss.linear_cross_entropy(h, k, y, dtype=jnp.bfloat16, **options)

    in_blocks = partial(loss, implementation="vocab_blocks", chunk_size=1024)
    assert temporary_mib(jax.value_and_grad(in_blocks, (0, 1)), given) <= 24
    found = equations(jax.value_and_grad(partial(loss, chunk_size=16), (0, 1)), *given)
    whole = [e for e in found if e.outvars[0].aval == jax.core.ShapedArray((d, v), jnp.bfloat16)]
    assert [e.primitive.name for e in whole] == ["convert_element_type"]


@pytest.mark.parametrize("kind", ["dtype", "low rank", "int8", "qlora"])
@pytest.mark.parametrize("implementation", ["token_chunks", "vocab_blocks"])
@pytest.mark.parametrize(
    ("axis_type", "split"),
    [(AxisType.Auto, ("d", "t")), (AxisType.Auto, (None, ("t", "d"))), (AxisType.Explicit, ("d",))],
)
def test_on_a_mesh(axis_type, split, implementation, kind):
    """``split``: of the kernel."""
    mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(axis_type,) * 2)
    rng = np.random.default_rng(2)
    h, k = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4 * 8, D), (D, 56)))
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((D, R), (R, 56)))
    y = jnp.asarray(rng.integers(0, 56, 32), jnp.int32).at[:9].set(-100)
    scale = jnp.asarray(0.1 + rng.random((2, 56) if kind == "qlora" else 56), jnp.float32)
    chunk = 4 if implementation == "token_chunks" else 7
    options = {"chunk_size": chunk, "implementation": implementation}
    options |= {"dtype": jnp.bfloat16} if kind == "dtype" else {}
    frozen = (2 * k).astype(jnp.int8) if kind in ("int8", "qlora") else k

    def loss(h, trained, frozen, **names):
        head = frozen if kind != "dtype" else trained[0]
        head = jaxloss.QuantizedKernel(head, scale) if kind in ("int8", "qlora") else head
        if kind in ("low rank", "qlora"):
            head = jaxloss.LowRankKernel(head, *trained, scale=2.0)
        return jaxloss.linear_cross_entropy(h, head, y, **options, **names)

    trained = {"dtype": (k,), "int8": ()}.get(kind, (a, b))
    of = jax.value_and_grad(loss, (0, 1))
    alone = jit_quickly(of)(h, trained, frozen)
    names = {"token_axis_name": "d", "kernel_spec": P(*split)}
    names |= {"vocab_axis_name": "t"} if len(split) > 1 else {}
    with jax.set_mesh(mesh):
        found = jit_quickly(partial(of, **names))(h, trained, frozen)
    found = jax.tree.map(np.asarray, found)
    if kind != "dtype":
        assert max(relative_errors(found, alone)) <= 32 * EPS
        return
    for x, y in zip(*map(jax.tree.leaves, (found, alone)), strict=True):
        # A rounded gradient would be 2^-10 apart; a few logits' gradients round the other way.
        assert np.linalg.norm(x - y) <= 2.0**-13 * np.linalg.norm(y)


def test_inside_of_shard_map():
    mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(2)
    h, q = rng.normal(size=(32, D)), rng.integers(-9, 9, (D, 56))
    h, q = jnp.asarray(h, jnp.float32), jnp.asarray(q, jnp.int8)
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((D, R), (R, 56)))
    scale = jnp.asarray(0.1 + rng.random(56), jnp.float32)
    y = jnp.asarray(rng.integers(0, 56, 32), jnp.int32)

    def loss(h, q, scale, a, b, y, **names):
        head = jaxloss.LowRankKernel(jaxloss.QuantizedKernel(q, scale), a, b)
        return jaxloss.linear_cross_entropy(h, head, y, chunk_size=4, **names)

    of = partial(jax.value_and_grad, argnums=(0, 3, 4))
    names = {"token_axis_name": "d", "vocab_axis_name": "t"}
    specs = (P("d"), P(None, "t"), P("t"), P(), P(None, "t"), P("d"))
    over = jax.shard_map(
        of(partial(loss, **names)),
        mesh=mesh,
        in_specs=specs,
        out_specs=(P(), specs[:1] + specs[3:5]),
    )
    given = h, q, scale, a, b, y
    assert max(relative_errors(jax.jit(over)(*given), jax.jit(of(loss))(*given))) <= 32 * EPS


def test_kernels_are_pytrees():
    quantised, _ = quantized("groups", 1)
    head = jaxloss.LowRankKernel(quantised, GIVEN["a"], GIVEN["b"], scale=2)
    assert [x.shape for x in jax.tree.leaves(head)] == [(D, V), (4, V), (D, R), (R, V)]
    traced = jaxloss.LowRankKernel(quantised, GIVEN["a"], GIVEN["b"], scale=jnp.float32(2))
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(traced)]
    assert paths == [".kernel.values", ".kernel.scale", ".a", ".b", ".scale"]
    loss = jax.jit(lambda head: jaxloss.linear_cross_entropy(GIVEN["h"], head, LABELS))
    assert loss(head) == loss(traced)
    stored = export.export(loss)(head).serialize()
    assert export.deserialize(stored).call(head) == loss(head)


ARGUMENTS = {
    "a": (lambda a, b: jaxloss.LowRankKernel(GIVEN["k"], a.T, b), ValueError, r"\[D, r\]"),
    "b": (lambda a, b: jaxloss.LowRankKernel(GIVEN["k"], a, b[:2]), ValueError, r"\[r, V\]"),
    "dtypes": (
        lambda a, b: jaxloss.LowRankKernel(GIVEN["k"], a.astype(jnp.bfloat16), b),
        TypeError,
        r"dtype=jnp\.bfloat16",
    ),
    "nested": (
        lambda a, b: jaxloss.LowRankKernel(jaxloss.LowRankKernel(GIVEN["k"], a, b), a, b),
        TypeError,
        r"kernel\.kernel must be an array or a jaxloss\.QuantizedKernel",
    ),
    "scale": (
        lambda a, b: jaxloss.QuantizedKernel(GIVEN["k"].astype(jnp.int8), jnp.ones((3, V))),
        ValueError,
        r"G a divisor of D = 16",
    ),
    "transposed": (
        lambda a, b: jaxloss.QuantizedKernel(GIVEN["k"].astype(jnp.int8), jnp.ones((V, 4))),
        ValueError,
        r"scale\.T",
    ),
    "values": (
        lambda a, b: jaxloss.QuantizedKernel(GIVEN["k"].astype(jnp.int16), jnp.ones(V)),
        TypeError,
        "int4, int8, float8_e4m3fn, float8_e5m2",
    ),
    "rank": (
        lambda a, b: jaxloss.LowRankKernel(GIVEN["k"][0], a, b),
        ValueError,
        r"kernel must be \[D, V\]",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_what_does_not_fit_is_named(case):
    head, kind, rule = ARGUMENTS[case]
    with pytest.raises(kind, match=rule):
        jaxloss.linear_cross_entropy(GIVEN["h"], head(GIVEN["a"], GIVEN["b"]), LABELS)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", jnp.int32, "no dtype", jnp.float64])
def test_a_dtype_that_products_cannot_have(dtype):
    with pytest.raises((TypeError, ValueError), match="linear_cross_entropy: dtype must be a"):
        jaxloss.linear_cross_entropy(GIVEN["h"], GIVEN["k"], LABELS, dtype=dtype)


def test_unequal_dtypes_are_an_error_that_shows_the_way():
    rule = r"hidden and kernel must have one dtype.*dtype=jnp\.bfloat16"
    with pytest.raises(TypeError, match=rule):
        jaxloss.linear_cross_entropy(GIVEN["h"].astype(jnp.bfloat16), GIVEN["k"], LABELS)
