"""linear_stats_loss: objectives of reinforcement learning and distillation, by their formulas."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracle.programs import jit_quickly, products

import jaxloss

B, L, D, D2, V, C = 6, 7, 8, 5, 19, 16
EPS = 2.0**-23


def operands():
    rng = np.random.default_rng(0)
    f32 = partial(jnp.asarray, dtype=jnp.float32)
    labels = rng.integers(0, C, (B, L))
    labels[0] = labels[3, 2:5] = labels[5, 0] = -100
    given = {
        "h": f32(rng.normal(size=(B, L, D))),
        "k": f32(rng.normal(size=(D, V)) / 2),
        "b": f32(rng.normal(size=V)),
        "advantage": f32(rng.normal(size=(B, L))),
        "before": f32(-2 + 0.3 * rng.normal(size=(B, L))),
        "weight": f32(rng.random(B)[:, None] * np.ones((B, L))),
    }
    its_own = {"h": f32(rng.normal(size=(B, L, D2))), "k": f32(rng.normal(size=(D2, V)) / 2)}
    return given, its_own, jnp.asarray(labels, jnp.int32)


def statistics(x, t, labels, temperature=1.0, kl_temperature=1.0, beta=0.5, cap=None):
    """The definitions, of materialised logits."""
    cap_of = (lambda v: v) if cap is None else lambda v: cap * jnp.tanh(v / cap)
    x, t = cap_of(x), cap_of(t)
    index = jnp.maximum(labels, 0)[..., None]
    of_model, of_reference = (jax.nn.log_softmax(v / temperature, axis=-1) for v in (x, t))
    stats = {
        "log_prob": jnp.take_along_axis(of_model, index, axis=-1)[..., 0],
        "logsumexp": jax.nn.logsumexp(x / temperature, axis=-1),
        "entropy": -jnp.sum(jnp.exp(of_model) * of_model, axis=-1),
        "ref_log_prob": jnp.take_along_axis(of_reference, index, axis=-1)[..., 0],
    }
    q, p = (jax.nn.log_softmax(v / kl_temperature, axis=-1) for v in (x, t))
    m = jnp.logaddexp(p + np.log(beta), q + np.log1p(-beta))
    kl = lambda u, v: jnp.sum(jnp.exp(u) * (u - v), axis=-1)  # noqa: E731
    stats |= {
        "ref_entropy": -jnp.sum(jnp.exp(p) * p, axis=-1),
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jensen_shannon": beta * kl(p, m) + (1 - beta) * kl(q, m),
    }
    return stats


def of(stats, reference=None):
    """The same names from what the library hands over."""
    found = {name: getattr(stats, name) for name in ("log_prob", "logsumexp", "entropy")}
    if reference is not None:
        found |= {f"ref_{name}": getattr(reference, name) for name in ("log_prob", "entropy")}
        names = ("forward_kl", "reverse_kl", "jensen_shannon")
        found |= {name: getattr(reference, name) for name in names}
    return found


def surrogate(s, advantage, before, low=0.2, high=0.2):
    ratio = jnp.exp(s["log_prob"] - before)
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    return -jnp.minimum(ratio * advantage, clipped * advantage)


def cispo(s, advantage, before):
    ratio = jax.lax.stop_gradient(jnp.minimum(jnp.exp(s["log_prob"] - before), 1.2))
    return -ratio * advantage * s["log_prob"]


def k3(s):
    apart = s["ref_log_prob"] - s["log_prob"]
    return jnp.expm1(apart) - apart


# Losses of the statistics by name and of the tokens' arrays; their options.
OBJECTIVES = {
    "ppo": (lambda s, a, b, w: surrogate(s, a, b), {}, False),
    "entropy bonus": (lambda s, a, b, w: surrogate(s, a, b) - 0.01 * s["entropy"], {}, False),
    "dapo": (lambda s, a, b, w: surrogate(s, a, b, high=0.28), {"reduction": "sum"}, False),
    "cispo": (lambda s, a, b, w: cispo(s, a, b), {}, False),
    "dft": (
        lambda s, a, b, w: -jax.lax.stop_gradient(jnp.exp(s["log_prob"])) * s["log_prob"],
        {},
        False,
    ),
    "z-loss": (lambda s, a, b, w: w * s["logsumexp"] ** 2 - s["log_prob"], {}, False),
    "grpo, k3": (lambda s, a, b, w: surrogate(s, a, b) + 0.04 * k3(s), {}, True),
    "grpo, exact": (lambda s, a, b, w: surrogate(s, a, b) + 0.04 * s["reverse_kl"], {}, True),
    "distillation": (
        lambda s, a, b, w: w * 4 * s["forward_kl"] - s["log_prob"],
        {"kl_temperature": 2.0},
        True,
    ),
    "generalised": (
        lambda s, a, b, w: s["jensen_shannon"] + s["ref_entropy"],
        {"beta": 0.3, "temperature": 0.7, "reduction": "none"},
        True,
    ),
    "capped": (
        lambda s, a, b, w: s["forward_kl"] - s["log_prob"],
        {"logit_softcap": 3.0, "kl_temperature": 1.5},
        True,
    ),
}


def call(objective, with_reference, h, k, b, advantage, before, weight, ref, labels, **options):
    def loss(stats, *rest):
        reference, *own = rest if with_reference else (None, *rest)
        return objective(of(stats, reference), *own)

    reference = (ref["h"], ref["k"]) if with_reference else None
    options = {"chunk_size": 5, "num_classes": C, "bias": b, "reference": reference} | options
    own = advantage, before, weight
    return jaxloss.linear_stats_loss(loss, h, k, labels, *own, **options)


def formula(objective, h, k, b, advantage, before, weight, ref, labels, **options):
    reduction = options.pop("reduction", "mean")
    cap = options.pop("logit_softcap", None)
    options.setdefault("kl_temperature", options.get("temperature", 1.0))
    x, t = (h @ k + b)[..., :C], (ref["h"] @ ref["k"])[..., :C]
    valid = labels != -100
    stats = statistics(x, t, labels, cap=cap, **options)
    losses = jnp.where(valid, objective(stats, advantage, before, weight), 0)
    if reduction == "none":
        return losses
    total = jnp.sum(losses)
    return total / jnp.sum(valid) if reduction == "mean" else total


def in_float64(function, *args):
    wide = lambda x: np.asarray(x, np.float64) if x.dtype == jnp.float32 else x  # noqa: E731
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        return jax.tree.map(np.asarray, jit_quickly(function)(*jax.tree.map(wide, args)))


NAMES = ("h", "k", "b", "advantage", "before", "weight")


def derivatives(function):
    """(loss, gradients of a scalar of it) by every operand."""

    def of_some(given, ref, labels):
        def scalar(given):
            loss = function(*(given[name] for name in NAMES), ref, labels)
            along = jnp.arange(1, loss.size + 1, dtype=loss.dtype).reshape(loss.shape)
            return jnp.sum(loss * along), loss

        return jax.grad(scalar, has_aux=True)(given)

    return of_some


def assert_close(got, expected, relative=2e-5):
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        allowed = relative * (np.max(np.abs(e)) + 1e-6)
        np.testing.assert_allclose(g, e, rtol=0, atol=allowed)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_by_their_formulas(name, block):
    objective, options, with_reference = OBJECTIVES[name]
    given, ref, labels = operands()
    got = jit_quickly(derivatives(partial(call, objective, with_reference, **options)))(
        given, ref, labels
    )
    expected = in_float64(derivatives(partial(formula, objective, **options)), given, ref, labels)
    assert_close(got, expected)


@pytest.mark.parametrize("name", ["grpo, exact", "capped"])
@pytest.mark.parametrize(
    "names",
    [
        {"token_axis_name": "d"},
        {"token_axis_name": "d", "vocab_axis_name": "t"},
        {"token_axis_name": "d", "kernel_spec": P(None, "t")},
        {"token_axis_name": P("d")},
    ],
)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.jax_leaks("jit(grad(shard_map))")
def test_objectives_on_meshes(kind, names, name):
    objective, options, with_reference = OBJECTIVES[name]
    given, ref, labels = operands()
    wider = lambda x: jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, 1),))  # noqa: E731
    given, ref = given | {n: wider(given[n]) for n in "kb"}, ref | {"k": wider(ref["k"])}
    function = partial(call, objective, with_reference, **options)
    expected = jit_quickly(derivatives(function))(given, ref, labels)
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        got = jit_quickly(derivatives(partial(function, **names)))(given, ref, labels)
    assert_close(got, expected)


@pytest.mark.parametrize(("reference", "value", "gradients"), [(False, 1, 3), (True, 2, 4)])
def test_products(reference, value, gradients, block):
    given, ref, labels = operands()
    objective = OBJECTIVES["grpo, exact" if reference else "ppo"][0]
    # All tokens at once: a chunk's program stands in the program of a sweep several times.
    function = partial(call, objective, reference, chunk_size=B * L)
    args = *(given[name] for name in NAMES), ref, labels

    assert products(function, *args) == value
    assert products(jax.grad(function, (0, 1)), *args) == gradients


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk", [5, B * L])
def test_what_goes_along(chunk, reduction, block):
    given, ref, labels = operands()

    def loss(stats, reference, before):
        ratio = jnp.exp(stats.log_prob - before)
        return -ratio, {"kl": reference.reverse_kl, "clipped": ratio > 1, "rank": stats.rank}

    def function(h):
        return jaxloss.linear_stats_loss(
            loss, h, given["k"], labels, given["before"], reference=(ref["h"], ref["k"]),
            has_aux=True, chunk_size=chunk, reduction=reduction,
        )  # fmt: skip

    value, aux = jit_quickly(function)(given["h"])
    stats = jaxloss.linear_token_stats(given["h"], given["k"], labels)
    valid = labels >= 0
    ratio = jnp.exp(stats.log_prob - given["before"])
    np.testing.assert_allclose(aux["rank"], jnp.where(valid, stats.rank, 0))
    np.testing.assert_array_equal(aux["clipped"], (ratio > 1) & valid)
    kl = jaxloss.linear_kl_divergence(
        given["h"], given["k"], ref["h"], ref["k"], divergence="reverse", reduction="none",
        sample_weight=valid,
    )  # fmt: skip
    np.testing.assert_allclose(aux["kl"], kl, rtol=2e-5, atol=1e-6)
    expected = jnp.where(valid, -ratio, 0)
    expected = expected if reduction == "none" else jnp.mean(expected[valid])
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    # It has no derivative, and what does is the same beside it.
    alone = lambda h: jnp.sum(function(h)[0])  # noqa: E731
    of_both = lambda h: jnp.sum(function(h)[0]) + jnp.sum(function(h)[1]["kl"])  # noqa: E731
    slope, with_it = (jax.grad(f)(given["h"]) for f in (alone, of_both))
    np.testing.assert_array_equal(slope, with_it)


@pytest.mark.nan_is_meant
def test_tokens_that_do_not_count_are_never_seen(block):
    given, ref, labels = operands()
    ignored = (labels < 0)[..., None]
    objective, _, with_reference = OBJECTIVES["grpo, exact"]
    for chunk in (5, B * L):
        function = derivatives(partial(call, objective, with_reference, chunk_size=chunk))
        expected = jit_quickly(function)(given, ref, labels)
        worse = {n: jnp.where(ignored[..., 0], jnp.nan, given[n]) for n in NAMES[3:]}
        worse |= {"h": jnp.where(ignored, jnp.inf, given["h"]), "k": given["k"], "b": given["b"]}
        worse_ref = ref | {"h": jnp.where(ignored, jnp.nan, ref["h"])}
        got = jit_quickly(function)(worse, worse_ref, labels)
        for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(g, e)


def test_a_reference_of_its_own_axis_and_cap():
    given, ref, labels = operands()
    k, cap = ref["k"], 2.0
    own = jaxloss.Reference(ref["h"], k.T, vocab_axis=0, logit_softcap=cap)
    kl = lambda stats, reference: reference.forward_kl  # noqa: E731
    options = {"reduction": "none", "chunk_size": 5}
    got = jaxloss.linear_stats_loss(
        kl, given["h"], given["k"], labels, reference=own, kl_temperature=0.5, **options
    )
    t = cap * jnp.tanh((ref["h"] @ k) / cap)
    expected = jaxloss.kl_divergence(
        given["h"] @ given["k"], t, temperature=0.5, reduction="none", sample_weight=labels >= 0
    )
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


def test_a_student_near_its_reference():
    """To float32 rounding, where the difference of two log-probabilities is noise."""
    given, _, labels = operands()
    h, k = given["h"], given["k"]
    near = h + 2.0**-12 * jnp.cos(h)
    kl = lambda stats, reference: reference.reverse_kl  # noqa: E731
    got = jaxloss.linear_stats_loss(kl, near, k, labels, reference=(h, k), reduction="none")
    x, t = (np.float64(np.asarray(v) @ np.asarray(k)) for v in (near, h))

    def log_softmax(v):
        return (
            v
            - np.log(np.sum(np.exp(v - v.max(-1, keepdims=True)), -1, keepdims=True))
            - v.max(-1, keepdims=True)
        )

    q, a = np.exp(log_softmax(x)), log_softmax(x) - log_softmax(t)
    expected = np.where(labels >= 0, np.sum(q * a - q + np.exp(log_softmax(t)), axis=-1), 0)
    # The logits' own rounding moves the difference by 2^-24 of a logit in 2^-12.
    np.testing.assert_allclose(got, expected, rtol=5e-3)


def test_sequence_ratios():
    """GSPO: a ratio a sequence, from a value pass, whose gradient is that of each token's."""
    given, _, labels = operands()
    valid = labels >= 0
    count = jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True), 1).astype(jnp.float32)

    def objective(h, fused):
        def log_prob(h):
            if fused:
                return jaxloss.linear_token_stats(h, given["k"], labels).log_prob
            all_of_them = jax.nn.log_softmax(h @ given["k"], axis=-1)
            index = jnp.maximum(labels, 0)[..., None]
            return jnp.where(valid, jnp.take_along_axis(all_of_them, index, axis=-1)[..., 0], 0)

        def of_sequence(lp):
            apart = jnp.sum(jnp.where(valid, lp - given["before"], 0), axis=-1, keepdims=True)
            return apart / count

        if not fused:
            ratio = jnp.exp(of_sequence(log_prob(h)))
            each = -ratio * given["advantage"][:, :1] * jnp.ones((B, L))
            return jnp.sum(jnp.where(valid, each / count, 0))
        whole = jnp.broadcast_to(jax.lax.stop_gradient(of_sequence(log_prob(h))), (B, L))
        weight = jnp.broadcast_to(1 / count, (B, L))
        advantage = jnp.broadcast_to(given["advantage"][:, :1], (B, L))

        def loss(stats, whole, advantage):
            lp = stats.log_prob
            return -jnp.exp(whole + lp - jax.lax.stop_gradient(lp)) * advantage

        own = whole, advantage
        return jaxloss.linear_stats_loss(
            loss, h, given["k"], labels, *own, sample_weight=weight, reduction="sum", chunk_size=5
        )

    for got, expected in zip(
        jax.tree.leaves(jax.value_and_grad(partial(objective, fused=True))(given["h"])),
        jax.tree.leaves(jax.value_and_grad(partial(objective, fused=False))(given["h"])),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_preferences_from_statistics():
    """DPO: a loss of whole sequences, of chosen and rejected answers beside each other."""
    given, ref, labels = operands()

    def objective(h, log_prob_of):
        model, reference = log_prob_of(h, given["k"]), log_prob_of(ref["h"], ref["k"])
        gain = jnp.sum(model - reference, axis=-1).reshape(2, B // 2)
        return -jnp.mean(jax.nn.log_sigmoid(0.1 * (gain[0] - gain[1])))

    def fused(h, k):
        return jaxloss.linear_token_stats(h, k, labels, chunk_size=5).log_prob

    def plain(h, k):
        index = jnp.maximum(labels, 0)[..., None]
        found = jnp.take_along_axis(jax.nn.log_softmax(h @ k, axis=-1), index, axis=-1)[..., 0]
        return jnp.where(labels >= 0, found, 0)

    got, expected = (jax.value_and_grad(objective)(given["h"], f) for f in (fused, plain))
    assert_close(got, expected)


def of_statistics(h, k, advantage, ref, labels, **options):
    """A scalar of all that linear_token_stats gives beside a reference."""
    options = {"chunk_size": 5, "num_classes": C, "kl_temperature": 1.5, "beta": 0.3} | options
    pair = jaxloss.linear_token_stats(h, k, labels, reference=(ref["h"], ref["k"]), **options)
    found = of(*pair)
    weights = (jnp.where(labels >= 0, advantage * (1 + i), 0) for i in range(len(found)))
    return sum(jnp.sum(w * v) for w, v in zip(weights, found.values(), strict=True)), pair


def test_statistics_beside_a_reference():
    given, ref, labels = operands()
    args = given["h"], given["k"], given["advantage"]

    def plain(h, k, advantage):
        x, t = (h @ k)[..., :C], (ref["h"] @ ref["k"])[..., :C]
        found = statistics(x, t, labels, kl_temperature=1.5, beta=0.3)
        names = [
            "log_prob",
            "logsumexp",
            "entropy",
            "ref_log_prob",
            "ref_entropy",
            "forward_kl",
            "reverse_kl",
        ]
        each = [found[name] for name in (*names, "jensen_shannon")]
        weights = (jnp.where(labels >= 0, advantage * (1 + i), 0) for i in range(len(each)))
        return sum(jnp.sum(w * v) for w, v in zip(weights, each, strict=True))

    function = lambda *a: of_statistics(*a, ref, labels)  # noqa: E731
    got, (stats, reference) = jit_quickly(jax.grad(function, (0, 1, 2), has_aux=True))(*args)
    ref = jax.tree.map(np.float64, ref)
    assert_close(got, in_float64(jax.grad(plain, (0, 1, 2)), *args))
    alone = jaxloss.linear_token_stats(*args[:2], labels, num_classes=C)
    np.testing.assert_array_equal(stats.rank, alone.rank)
    np.testing.assert_array_equal(reference.log_prob == 0, labels < 0)


@pytest.mark.parametrize("names", [{"token_axis_name": "d"}, {"vocab_axis_name": "t"}])
@pytest.mark.jax_leaks("jit(grad(shard_map))")
def test_statistics_beside_a_reference_on_a_mesh(names):
    given, ref, labels = operands()
    k, ref = given["k"][:, :C], ref | {"k": ref["k"][:, :C]}
    args = given["h"], k, given["advantage"]
    function = jax.grad(lambda *a, **o: of_statistics(*a, ref, labels, **o), (0, 1), has_aux=True)
    expected = jit_quickly(function)(*args)
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(AxisType.Auto,) * 2)
    got = jit_quickly(partial(function, mesh=mesh, **names))(*args)
    assert_close(got, expected)


@pytest.mark.parametrize("kind", ["token", "traced"])
def test_temperatures(kind):
    given, ref, labels = operands()
    of_tokens = jnp.exp(0.3 * given["advantage"])
    temperature = of_tokens if kind == "token" else jnp.float32(0.8)

    def loss(stats, reference):
        return stats.entropy - stats.log_prob + reference.forward_kl

    def function(h, temperature, kl_temperature):
        reference = ref["h"], ref["k"]
        options = {"reference": reference, "kl_temperature": kl_temperature, "chunk_size": 5}
        return jaxloss.linear_stats_loss(
            loss, h, given["k"], labels, temperature=temperature, reduction="sum", **options
        )

    def plain(h, temperature, kl_temperature):
        x, t = h @ given["k"], ref["h"] @ ref["k"]
        each = temperature[..., None] if temperature.ndim else temperature
        found = statistics(x / each, t, labels)
        divergence = statistics(x, t, labels, kl_temperature=kl_temperature)["forward_kl"]
        each = found["entropy"] - found["log_prob"] + divergence
        return jnp.sum(jnp.where(labels >= 0, each, 0))

    args = given["h"], temperature, jnp.float32(1.7)
    got = jit_quickly(jax.value_and_grad(function, (0, 1, 2)))(*args)
    assert_close(got, in_float64(jax.value_and_grad(plain, (0, 1, 2)), *args))


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_second_derivatives(outer, block):
    given, ref, labels = operands()
    objective, _, with_reference = OBJECTIVES["grpo, exact"]
    rest = [given[name] for name in NAMES[1:]]

    def moved(function, h, c):
        gradient = jax.grad(lambda c: function(h * c, *rest, ref, labels))
        return outer(gradient)(c)

    c = jnp.float32(1.1)
    got = jit_quickly(partial(moved, partial(call, objective, with_reference)))(given["h"], c)
    rest, ref, wide = jax.tree.map(np.float64, (rest, ref, given["h"]))
    expected = in_float64(partial(moved, partial(formula, objective)), wide, np.float64(c))
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def test_what_a_loss_closes_over_is_differentiable(block):
    given, _, labels = operands()

    def function(c):
        loss = lambda stats: c * stats.entropy - stats.log_prob  # noqa: E731
        return jaxloss.linear_stats_loss(loss, given["h"], given["k"], labels, chunk_size=5)

    entropy = jaxloss.linear_token_stats(given["h"], given["k"], labels).entropy
    expected = jnp.mean(entropy[labels >= 0])
    np.testing.assert_allclose(jax.grad(function)(jnp.float32(0.5)), expected, rtol=1e-5)


def test_a_loss_without_a_derivative_where_all_classes_are_alike(block):
    given, _, labels = operands()

    def function(c):
        loss = lambda stats: jnp.log(c * (np.log(V) - stats.entropy))  # noqa: E731
        return jaxloss.linear_stats_loss(loss, given["h"], given["k"], labels, chunk_size=5)

    np.testing.assert_allclose(jax.grad(function)(jnp.float32(0.5)), 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"loss_fn": 3}, TypeError, "loss_fn must be a function; got int"),
        ({"loss_fn": lambda s: s}, ValueError, "one floating number a token.*TokenStats"),
        ({"loss_fn": lambda s: (s.log_prob, 1)}, ValueError, "Say has_aux=True"),
        ({"has_aux": True}, TypeError, r"must return \(loss, aux\)"),
        ({"has_aux": 3}, TypeError, "has_aux must be"),
        ({"kl_temperature": 2.0}, ValueError, "kl_temperature is for a reference; got none"),
        ({"reference": 3}, TypeError, "reference must be"),
        ({"reference": (jnp.ones((2, D2)), jnp.ones((D2, V)))}, ValueError, "leading shape"),
        ({"reference": (jnp.ones((3, D2)), jnp.ones((D2, 4)))}, ValueError, "as many columns"),
        ({"beta": 1.0}, ValueError, r"beta must be in \(0, 1\)"),
        (
            {"loss_fn": lambda s: (s.log_prob, s.log_prob[0]), "has_aux": True},
            ValueError,
            r"aux must be arrays of an entry a token, \[n, ...\], n = 3; got float32",
        ),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"token_axis_name": "x"}, ValueError, "token_axis_name must name axes"),
    ],
)
def test_errors(given, kind, text):
    right = {"loss_fn": lambda s, *r: -s.log_prob} | given
    loss_fn = right.pop("loss_fn")
    h, k, labels = jnp.ones((3, D)), jnp.ones((D, V)), jnp.array([1, 2, -100])
    with pytest.raises(kind, match=f"linear_stats_loss: .*{text}"):
        jaxloss.linear_stats_loss(loss_fn, h, k, labels, **right)


def test_errors_of_arrays_of_tokens_and_of_a_temperature_a_token():
    h, k, labels = jnp.ones((3, D)), jnp.ones((D, V)), jnp.array([1, 2, -100])
    loss = lambda stats, *rest: -stats.log_prob  # noqa: E731
    with pytest.raises(
        ValueError, match=r"per_token\[0\] must have hidden's leading shape, \(3,\)"
    ):
        jaxloss.linear_stats_loss(loss, h, k, labels, jnp.ones(4))
    with pytest.raises(ValueError, match="linear_token_stats: kl_temperature is for a reference"):
        jaxloss.linear_token_stats(h, k, labels, kl_temperature=2.0)
    mesh = jax.make_mesh((2,), ("t",), axis_types=(AxisType.Auto,))
    options = {"vocab_axis_name": "t", "mesh": mesh, "num_classes": V - 1}
    even, wide = jnp.ones((D, V - 1)), jnp.ones((D, V + 1))
    with pytest.raises(ValueError, match="as many columns where devices share them; got 18 and 20"):
        jaxloss.linear_token_stats(h, even, labels, reference=(h, wide), **options)
    options = {"reference": (h, k), "kl_temperature": jnp.ones((3, 1))}
    with pytest.raises(ValueError, match="kl_temperature must have no axes, or the shape of"):
        jaxloss.linear_stats_loss(loss, h, k, labels, **options)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("given", ["temperature", "kl_temperature"])
def test_a_temperature_a_token_beside_a_reference(given, stored):
    """As a call for each of two temperatures; of tokens that do not count it may be NaN."""
    operands_, its_own, labels = operands()
    h, k = operands_["h"], operands_["k"]
    reference = its_own["h"], its_own["k"]
    if stored:
        index, log_p = jaxloss.linear_top_k(*reference, 4)
        reference = jaxloss.TopKLabels(index, jnp.exp(log_p), rest="bucket")
    warm = jnp.arange(B * L).reshape(B, L) % 2 == 0
    each = jnp.where(labels < 0, jnp.nan, jnp.where(warm, 1.7, 0.6))

    def total(h, k, temperature, taken):
        options = {given: temperature, "reference": reference, "num_classes": C, "chunk_size": 4}
        if given == "temperature" and not isinstance(temperature, float):
            options["kl_temperature"] = None
        stats, found = jaxloss.linear_token_stats(h, k, labels, **options)
        divergences = found.forward_kl + found.reverse_kl + found.jensen_shannon + found.entropy
        return jnp.sum(jnp.where(taken, divergences - stats.log_prob, 0))

    of = jax.value_and_grad(total, (0, 1))
    found = jit_quickly(of)(h, k, each, True)
    parts = [jit_quickly(partial(of, temperature=t))(h, k, taken=m)
             for t, m in ((1.7, warm), (0.6, ~warm))]  # fmt: skip
    expected = jax.tree.map(jnp.add, *parts)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
