"""Kernels of several heads, ``[K, D, V]``, beside the formulas of each head's logits in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracle.budget import relative_errors
from oracle.programs import jit_quickly, temporary_mib

import jaxloss

N, K, D, V = 16, 3, 8, 40
EPS = 2.0**-23


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    f32 = partial(jnp.asarray, dtype=jnp.float32)
    labels = rng.integers(0, V, (N, K))
    labels[2] = labels[4:13, 1] = -100  # a token, and most of a head
    given = {
        "h": f32(rng.normal(size=(N, K, D))),
        "k": f32(rng.normal(size=(K, D, V))),
        "b": f32(rng.normal(size=(K, V))),
        "w": f32(rng.random((N, K))),
        "t": f32(rng.normal(size=(K, 5, V))),
        "g": f32(rng.normal(size=(N, K, 5))),
    }
    return given, jnp.asarray(labels, jnp.int32)


GIVEN, LABELS = arrays()
COUNT = LABELS >= 0


def logits(h, k, b):
    return jnp.einsum("nkd,kdv->nkv", jnp.broadcast_to(h, (N, K, D)), k) + b[None]


def nll(x):
    of_label = jnp.take_along_axis(jax.nn.log_softmax(x), jnp.maximum(LABELS, 0)[..., None], -1)
    return jnp.where(COUNT, -of_label[..., 0], 0)


def entropy(x):
    log_p = jax.nn.log_softmax(x)
    return jnp.where(COUNT, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1), 0)


def mean(x, weight):
    weight = jnp.where(COUNT, weight, 0).astype(x.dtype)
    return jnp.sum(weight * x) / jnp.sum(weight)


def of_statistics(h, k, b, **options):
    stats = jaxloss.linear_token_stats(h, k, LABELS, bias=b, **options)
    return jnp.sum(GIVEN["w"] * (stats.entropy - stats.log_prob))


def divergence(h, k, b, **options):
    teacher = GIVEN["g"], GIVEN["t"]
    weight = {"sample_weight": GIVEN["w"]}
    return jaxloss.linear_kl_divergence(h, k, *teacher, bias=b, **weight, **options)


def plain_divergence(x):
    teacher = jnp.einsum("nkd,kdv->nkv", *(GIVEN[n].astype(x.dtype) for n in "gt"))
    p, q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(x)
    each = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    weight = GIVEN["w"].astype(x.dtype)
    return jnp.sum(weight * each) / jnp.sum(weight)


def own_loss(h, k, b, **options):
    loss = partial(jaxloss.cross_entropy, reduction="none")
    weight = {"sample_weight": jnp.where(COUNT, GIVEN["w"], 0)}
    return jaxloss.linear_loss(loss, h, k, LABELS, bias=b, **weight, **options)


def stats_loss(h, k, b, **options):
    loss = lambda s, w: w * s.entropy - s.log_prob  # noqa: E731
    return jaxloss.linear_stats_loss(loss, h, k, LABELS, GIVEN["w"], bias=b, **options)


# Each call, and its formula of the logits [N, K, V].
CALLS = {
    "mean": (
        lambda h, k, b, **o: jaxloss.linear_cross_entropy(
            h, k, LABELS, bias=b, sample_weight=GIVEN["w"], **o
        ),
        lambda x: mean(nll(x), GIVEN["w"]),
    ),
    "none": (
        lambda h, k, b, **o: jnp.sum(
            GIVEN["w"] * jaxloss.linear_cross_entropy(h, k, LABELS, bias=b, reduction="none", **o)
        ),
        lambda x: jnp.sum(GIVEN["w"].astype(x.dtype) * nll(x)),
    ),
    "statistics": (
        of_statistics,
        lambda x: jnp.sum(GIVEN["w"].astype(x.dtype) * (entropy(x) + nll(x))),
    ),
    "loss": (own_loss, lambda x: mean(nll(x), GIVEN["w"])),
    "stats loss": (
        stats_loss,
        lambda x: mean(GIVEN["w"].astype(x.dtype) * entropy(x) + nll(x), jnp.ones((N, K))),
    ),
    "divergence": (divergence, plain_divergence),
}


def wide(xs):
    return jax.tree.map(lambda x: x.astype(jnp.float64), xs)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_value_and_gradients(name, shared):
    function, plain = CALLS[name]
    h = GIVEN["h"][:, :1] if shared else GIVEN["h"]
    given = h, GIVEN["k"], GIVEN["b"]
    of = jax.value_and_grad(partial(function, chunk_size=5), (0, 1, 2))
    found = jit_quickly(of)(*given)
    with jax.enable_x64():
        true = jax.value_and_grad(lambda *x: plain(logits(*x)), (0, 1, 2))(*wide(given))
        assert max(relative_errors(found, true)) <= 32 * EPS


@pytest.mark.parametrize("kind", ["tied", "low rank", "quantised", "both", "bfloat16"])
def test_kernels_of_every_kind(kind):
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((K, D, 2), (K, 2, V)))
    scale = jnp.asarray(0.1 + rng.random((K, 2, V) if kind == "both" else (K, V)), jnp.float32)
    q = (3 * GIVEN["k"]).astype(jnp.int8)
    options = {"dtype": jnp.bfloat16} if kind == "bfloat16" else {}
    options |= {"vocab_axis": -2} if kind == "tied" else {}

    def head(k, a, b):
        k = jaxloss.QuantizedKernel(q, scale) if kind in ("quantised", "both") else k
        k = k.swapaxes(1, 2) if kind == "tied" else k
        return jaxloss.LowRankKernel(k, a, b, 0.5) if kind in ("low rank", "both") else k

    def merged(k, a, b):
        if kind in ("quantised", "both"):
            groups = wide(scale) if kind == "both" else wide(scale)[:, None]
            k = wide(q) * jnp.repeat(groups, D // groups.shape[1], axis=1)
        return k + 0.5 * a @ b if kind in ("low rank", "both") else k

    def loss(h, *of_kernel):
        weight = {"sample_weight": GIVEN["w"], "bias": GIVEN["b"]}
        return jaxloss.linear_cross_entropy(
            h, head(*of_kernel), LABELS, chunk_size=5, **weight, **options
        )

    which = (0, 2, 3) if kind in ("low rank", "both") else (0,) if kind == "quantised" else (0, 1)
    given = GIVEN["h"], GIVEN["k"], a, b
    found = jit_quickly(jax.value_and_grad(loss, which))(*given)
    narrow = jnp.bfloat16 if kind == "bfloat16" else jnp.float32
    with jax.enable_x64():

        def plain(h, *of_kernel):
            return CALLS["mean"][1](logits(h, merged(*of_kernel), wide(GIVEN["b"])))

        rounded = wide(jax.tree.map(lambda x: x.astype(narrow), given))
        true = jax.value_and_grad(plain, which)(*rounded)
        assert max(relative_errors(found, true)) <= (2.0**-8 if kind == "bfloat16" else 32 * EPS)


def test_a_kernel_that_the_heads_share():
    """Of a teacher with one kernel, and of multi-token prediction, whose heads are tokens."""
    one = GIVEN["t"][0]
    found = jaxloss.linear_kl_divergence(GIVEN["h"], GIVEN["k"], GIVEN["g"], one, chunk_size=5)
    copies = jnp.broadcast_to(one, (K, *one.shape))
    each = jaxloss.linear_kl_divergence(GIVEN["h"], GIVEN["k"], GIVEN["g"], copies, chunk_size=5)
    np.testing.assert_allclose(found, each, rtol=4 * EPS)
    back = jaxloss.linear_kl_divergence(GIVEN["g"], one, GIVEN["h"], GIVEN["k"], chunk_size=5)
    other = jaxloss.linear_kl_divergence(GIVEN["g"], copies, GIVEN["h"], GIVEN["k"], chunk_size=5)
    np.testing.assert_allclose(back, other, rtol=4 * EPS)
    kernel = GIVEN["k"][0]
    found = jaxloss.linear_cross_entropy(GIVEN["h"], kernel, LABELS, chunk_size=5)
    each = [jaxloss.linear_token_stats(GIVEN["h"][:, i], kernel, LABELS[:, i]) for i in range(K)]
    total = -sum(s.log_prob.sum() for s in each) / COUNT.sum().astype(jnp.float32)
    np.testing.assert_allclose(found, total, rtol=8 * EPS)


def test_the_likeliest_the_named_and_the_samples():
    given = GIVEN["h"], GIVEN["k"]
    index, found = jaxloss.linear_top_k(*given, 4, chunk_size=5)
    assert index.shape == found.shape == (N, K, 4)
    again = jaxloss.linear_log_probs_at(*given, index, chunk_size=5)
    np.testing.assert_allclose(again, found, rtol=8 * EPS)
    sample, of_sample = jaxloss.linear_sample(jax.random.key(0), *given, chunk_size=5)
    same, _ = jaxloss.linear_sample(jax.random.key(0), *given)
    np.testing.assert_array_equal(sample, same)
    with jax.enable_x64():
        log_p = jax.nn.log_softmax(jnp.einsum("nkd,kdv->nkv", *wide(given)))
        expected, where = jax.lax.top_k(log_p, 4)
        np.testing.assert_array_equal(index, where)
        np.testing.assert_allclose(found, expected, rtol=32 * EPS)
        of_it = jnp.take_along_axis(log_p, sample[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(of_sample, of_it, rtol=64 * EPS)


@pytest.mark.parametrize("name", ["mean", "stats loss"])
def test_second_derivatives(name):
    function, plain = CALLS[name]
    given = GIVEN["h"], GIVEN["k"], GIVEN["b"]

    def along(f, *given):
        return jax.jvp(jax.grad(f, (0, 1, 2)), given, given)[1]

    found = jit_quickly(partial(along, partial(function, chunk_size=5)))(*given)
    with jax.enable_x64():
        true = along(lambda *x: plain(logits(*x)), *wide(given))
        assert max(relative_errors(found, true)) <= 256 * EPS


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["mean", "divergence"])
def test_on_a_mesh(name, axis_type):
    mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(axis_type,) * 2)
    given = GIVEN["h"], GIVEN["k"], GIVEN["b"]
    of = jax.value_and_grad(partial(CALLS[name][0], chunk_size=2), (0, 1, 2))
    names = {"token_axis_name": "d", "vocab_axis_name": "t", "kernel_spec": P(None, "t")}
    with jax.set_mesh(mesh):
        with_names = partial(CALLS[name][0], chunk_size=2, **names)
        found = jit_quickly(jax.value_and_grad(with_names, (0, 1, 2)))(*given)
    found = jax.tree.map(np.asarray, found)
    assert max(relative_errors(found, jit_quickly(of)(*given))) <= 32 * EPS


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_heads_are_not_split(axis_type):
    """By a type or a name of hidden it is an error; labels are resharded."""
    mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(axis_type,) * 2)
    h, k, labels = GIVEN["h"][:, :2], GIVEN["k"][:2], LABELS[:, :2]
    loss = partial(jaxloss.linear_cross_entropy, chunk_size=2)
    split = jax.NamedSharding(mesh, P("d", "t"))
    with jax.set_mesh(mesh):
        if axis_type == AxisType.Explicit:
            found = jax.jit(loss)(h, k, jax.device_put(labels, split))
            np.testing.assert_allclose(found, loss(h, k, labels), rtol=8 * EPS)
            h = jax.device_put(h, split)
        else:
            loss = partial(loss, token_axis_name=P("d", "t"))
        with pytest.raises(ValueError, match="the heads' axis of hidden must not be split"):
            jax.jit(loss)(h, k, labels)


def test_an_array_of_split_sequences_and_heads():
    mesh = jax.make_mesh((4, 2), ("c", "t"), axis_types=(AxisType.Auto,) * 2)
    h, k = GIVEN["h"][None, :, :2], GIVEN["k"][:2]
    own = jax.device_put(h, jax.NamedSharding(mesh, P(None, "c", "t")))
    found = jaxloss.linear_cross_entropy(own, k, LABELS[None, :, :2], chunk_size=8)
    expected = jaxloss.linear_cross_entropy(h, k, LABELS[None, :, :2])
    np.testing.assert_allclose(found, expected, rtol=8 * EPS)


def test_memory_is_one_heads():
    n, heads, d, v = 512, 16, 64, 8192

    def loss(h, k, y):
        return jaxloss.linear_cross_entropy(h, k, y, chunk_size=64)

    typed = jax.ShapeDtypeStruct
    given = typed((n, heads, d), jnp.float32), typed((heads, d, v), jnp.float32)
    labels = typed((n, heads), jnp.int32)
    chunk, gradients = 64 * v * 4, n * heads * d * 4 + heads * d * v * 4
    held = temporary_mib(jax.value_and_grad(loss, (0, 1)), (*given, labels))
    assert held * 2**20 <= 6 * chunk + 1.5 * gradients  # the logits of all heads: 256 MiB


CASES = {
    "hidden": ((N, 2, D), -1, r"hidden must be \[..., K, D\] or \[..., 1, D\] for K = 3 heads"),
    "no heads": ((D,), -1, r"hidden must be \[..., K, D\] or \[..., 1, D\] for K = 3 heads"),
    "vocab_axis": ((N, K, D), 0, "vocab_axis of several heads must be -1 or -2"),
    "features": ((N, K, 7), -1, "hidden's last dimension, D = 7, at axis -2"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_named(case):
    shape, vocab_axis, rule = CASES[case]
    with pytest.raises(ValueError, match=rule):
        jaxloss.linear_cross_entropy(jnp.zeros(shape), GIVEN["k"], LABELS, vocab_axis=vocab_axis)


def test_blocks_are_refused():
    with pytest.raises(ValueError, match="several heads needs implementation='token_chunks'"):
        jaxloss.linear_cross_entropy(GIVEN["h"], GIVEN["k"], LABELS, implementation="vocab_blocks")
