"""Programs that outlive their process: exported, compiled ahead of time, cached; traced once."""

import os
import re
import subprocess
import sys
from collections import Counter
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from oracle.budget import EPS

import jaxloss
from jaxloss._numerics import rows
from jaxloss._xla import device

PLATFORMS = ("cpu", "cuda", "tpu")
N, D, C = 12, 8, 20
RATE = 0.125


def arrays(n=N, dtype=jnp.float32, seed=0, size=C):
    """Logits, hidden, kernel, labels, probabilities."""
    rng = np.random.default_rng(seed)
    x, h, k = (rng.normal(size=shape) for shape in ((n, size), (n, D), (D, size)))
    y = rng.integers(0, size, n)
    y[n // 3] = -100
    q = rng.dirichlet(np.ones(size), n)
    floats = (jnp.asarray(v, dtype) for v in (x, h, k))
    return *floats, jnp.asarray(y, jnp.int32), jnp.asarray(q, dtype)


def step_of(loss):
    """A training step: the loss at ``params``, and what plain SGD makes of them."""

    def step(params, *data):
        value, grads = jax.value_and_grad(lambda p: loss(*p, *data))(params)
        return value, jax.tree.map(lambda p, g: p - jnp.asarray(RATE, p.dtype) * g, params, grads)

    return step


def linear(schedule, reduction="mean", chunk_size=6, **options):
    def loss(hidden, kernel, labels):
        out = jaxloss.linear_cross_entropy(
            hidden, kernel, labels, implementation=schedule, reduction=reduction,
            chunk_size=chunk_size, **options,
        )  # fmt: skip
        return jnp.sum(out)

    return loss


CASES = {
    "indices": jaxloss.cross_entropy,
    "probabilities": jaxloss.cross_entropy,
    "token_chunks-mean": linear("token_chunks", chunk_size=4),  # takes what is left in quarters
    "token_chunks-none": linear("token_chunks", "none"),
    "vocab_blocks-mean": linear("vocab_blocks"),
    "vocab_blocks-none": linear("vocab_blocks", "none"),
    "stored_exponentials-mean": linear("stored_exponentials"),
}


def operands(case, dtype, n=N):
    x, h, k, y, q = arrays(n, dtype)
    if case == "indices":
        return (x,), y
    return ((x,), q) if case == "probabilities" else ((h, k), y)


def reloaded(f, *args, **options):
    """``f`` after a trip through bytes, for every platform."""
    stored = export.export(jax.jit(f), platforms=PLATFORMS)(*args).serialize(**options)
    program = export.deserialize(stored)
    assert program.platforms == PLATFORMS
    assert not program.disabled_safety_checks
    # A kernel of one platform would be a custom call that the others lack.
    calls = set(re.findall(r"custom_call @(\w+)", program.mlir_module()))
    assert calls <= {"shape_assertion"}, calls  # JAX's own, of symbolic dimensions
    return program


def assert_same(got, expected):
    """The same operations, which another compilation may fuse otherwise."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        eps = float(jnp.finfo(a.dtype).eps) if jnp.issubdtype(a.dtype, jnp.inexact) else 0
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=8 * eps, atol=8 * EPS)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, jnp.float32) for case in CASES]
    + [(case, jnp.bfloat16) for case in ("indices", "token_chunks-mean")],
)
def test_training_step(case, dtype):
    step, args = step_of(CASES[case]), operands(case, dtype)
    program = reloaded(step, *args)
    assert_same(program.call(*args), jax.jit(step)(*args))


def test_each_platform_widens_bfloat16_in_its_way():
    """By a shift on CPUs, by a conversion elsewhere: a program for both branches."""
    args = operands("indices", jnp.bfloat16)
    step = jax.jit(step_of(jaxloss.cross_entropy))
    for platforms in (("cpu",), ("cuda",), ("tpu",), ("cuda", "cpu")):
        text = export.export(step, platforms=platforms)(*args).mlir_module()
        assert ("bitcast_convert" in text) == ("cpu" in platforms)


def test_on_one_device(monkeypatch):
    """Where the machine has one, long rows have a form for CPUs too."""
    monkeypatch.setattr(device, "on_one_device", lambda: True)
    size = 2 * 8192 + 4096  # long enough for blocks
    x, _, _, y, _ = arrays(3, size=size)
    for f in (jaxloss.cross_entropy, jax.value_and_grad(jaxloss.cross_entropy)):
        program = reloaded(f, x, y)
        assert "stablehlo.case" in program.mlir_module()
        assert_same(program.call(x, y), jax.jit(f)(x, y))


READ = """
import sys
import jax
import numpy as np
from jax import export

folder = sys.argv[1]
with open(f"{folder}/program", "rb") as file:
    program = export.deserialize(file.read())
given = np.load(f"{folder}/operands.npz")
out = jax.jit(program.call)((given["hidden"], given["kernel"]), given["labels"])
np.savez(f"{folder}/results.npz", *jax.tree.leaves(out))
assert "jaxloss" not in sys.modules
"""


def test_another_process_needs_jax_alone(tmp_path):
    (h, k), y = operands("token_chunks-mean", jnp.float32)
    step = step_of(CASES["token_chunks-mean"])
    stored = export.export(jax.jit(step), platforms=PLATFORMS)((h, k), y).serialize()
    (tmp_path / "program").write_bytes(stored)
    np.savez(tmp_path / "operands.npz", hidden=h, kernel=k, labels=y)
    program = [sys.executable, "-W", "ignore", "-c", READ, str(tmp_path)]
    subprocess.run(program, check=True, env={**os.environ, "XLA_FLAGS": ""})
    results = np.load(tmp_path / "results.npz")
    expected = jax.tree.leaves(jax.jit(step)((h, k), y))
    assert_same([jnp.asarray(results[name]) for name in results.files], expected)


def of_first(loss, rest):
    return lambda x: loss(x, *rest)


def tangent(loss):
    return lambda x, t: jax.jvp(loss, (x,), (t,))


def tangents(loss):
    return lambda x, t: jax.vmap(tangent(loss), (None, 0))(x, jnp.stack([t, -2 * t]))


def second_derivative(loss):
    return lambda x, t: jax.jvp(jax.grad(loss), (x,), (t,))


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        ("indices", second_derivative),
        ("indices", tangents),
        ("token_chunks-mean", tangent),
        ("vocab_blocks-mean", second_derivative),
    ],
)
def test_forward_mode(case, mode):
    """The tangent map's primitive is of this library: nothing of it is left in the program."""
    (x, *params), data = operands(case, jnp.float32)
    f = mode(of_first(CASES[case], (*params, data)))
    t = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), x.dtype)
    program = reloaded(f, x, t)
    assert "jaxloss_tangent_map" not in program.mlir_module()
    assert_same(program.call(x, t), jax.jit(f)(x, t))


@pytest.mark.parametrize("case", ["indices", "token_chunks-none"])
def test_gradient_of_a_reloaded_loss(case):
    (x, *params), data = operands(case, jnp.float32)
    loss = of_first(CASES[case], (*params, data))
    program = reloaded(loss, x, vjp_order=1)
    assert_same(jax.grad(program.call)(x), jax.jit(jax.grad(loss))(x))


@pytest.mark.nan_is_meant  # of labels that are no one class, no rank
def test_results_and_labels_of_several_arrays():
    x, _, _, _, q = arrays()
    probabilities, indices = jax.lax.top_k(q, 3)
    labels = jaxloss.TopKLabels(indices, probabilities, rest="uniform")
    f = partial(jaxloss.cross_entropy, return_stats=True)
    program = reloaded(f, x, labels)
    loss, stats = program.call(x, labels)
    assert isinstance(stats, jaxloss.TokenStats)
    assert_same((loss, stats), jax.jit(f)(x, labels))
    other = jaxloss.TopKLabels(indices, probabilities, rest="bucket")
    with pytest.raises(ValueError, match="pytree"):
        program.call(x, other)
    sums_of = partial(jaxloss.metric_sums, top_k=(2, 5))
    sums = reloaded(sums_of, stats).call(stats)
    assert sums.top_k == (1, 2, 5)
    assert_same(sums, jax.jit(sums_of)(stats))


def own_loss(hidden, kernel, labels):
    each = partial(jaxloss.cross_entropy, reduction="none")
    counts = labels != -100
    return jaxloss.linear_loss(each, hidden, kernel, labels, sample_weight=counts)


def materialised(hidden, kernel, labels):
    return jaxloss.cross_entropy(hidden @ kernel, labels)


@pytest.mark.parametrize(
    ("loss", "dtype"),
    [
        (jaxloss.cross_entropy, jnp.float32),
        (jaxloss.cross_entropy, jnp.bfloat16),
        (linear("token_chunks"), jnp.float32),
        (linear("vocab_blocks", chunk_size=None), jnp.float32),
        (linear("stored_exponentials"), jnp.float32),
        (own_loss, jnp.float32),
    ],
    ids=["cross_entropy", "bfloat16", "token_chunks", "vocab_blocks", "stored", "linear_loss"],
)
def test_open_batch(loss, dtype):
    """One program for any number of tokens: the symbolic dimensions of jax.export."""
    (n,) = export.symbolic_shape("n")
    of_logits = loss is jaxloss.cross_entropy

    def given(tokens):
        x, h, k, y, _ = arrays(tokens, dtype)
        return ((x,) if of_logits else (h, k)), y

    def opened(v):
        return jax.ShapeDtypeStruct((n, *v.shape[1:]) if v.shape[0] == N else v.shape, v.dtype)

    program = reloaded(step_of(loss), *jax.tree.map(opened, given(N)))
    expected = jax.jit(step_of(loss if of_logits else materialised))
    for tokens in (3, N):
        assert_same(program.call(*given(tokens)), expected(*given(tokens)))


@pytest.mark.parametrize("name", ["log_softmax", "indices", "probabilities", "linear"])
def test_gradients_of_an_open_batch_on_one_device(name, monkeypatch):
    """Its forms overwrite single entries of rows: "'_DimExpr' object cannot be interpreted"."""
    monkeypatch.setattr(device, "on_one_device", lambda: True)
    (n,) = export.symbolic_shape("n")
    losses = {
        "log_softmax": lambda x, h, k, y, q: jnp.sum(jnp.sin(jaxloss.log_softmax(x))),
        "indices": lambda x, h, k, y, q: jaxloss.cross_entropy(x, y),
        "probabilities": lambda x, h, k, y, q: jaxloss.cross_entropy(x, q),
        "linear": lambda x, h, k, y, q: jaxloss.linear_cross_entropy(h, k, y, chunk_size=4),
    }
    step = jax.value_and_grad(losses[name], (0, 1))
    given = arrays(7, size=300)
    opened = [
        jax.ShapeDtypeStruct((n, *v.shape[1:]) if v.shape[0] == 7 else v.shape, v.dtype)
        for v in given
    ]
    assert_same(reloaded(step, *opened).call(*given), jax.jit(step)(*given))


def test_open_batch_beside_a_teacher():
    (n,) = export.symbolic_shape("n")
    step = step_of(lambda h, k, t: jaxloss.linear_kl_divergence(h, k, t, k, chunk_size=2))

    def given(tokens):
        _, h, k, *_ = arrays(tokens, jnp.float32)
        return (h, k), jnp.cos(h)

    (h, k), _ = given(N)
    opened = jax.ShapeDtypeStruct((n, *h.shape[1:]), h.dtype)
    program = reloaded(step, (opened, k), opened)
    for tokens in (3, N):
        assert_same(program.call(*given(tokens)), jax.jit(step)(*given(tokens)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss", [jaxloss.contrastive_loss, jaxloss.sigmoid_contrastive_loss])
def test_open_pairs(loss, masked):
    (n,) = export.symbolic_shape("n")

    def step(x, y, where):
        some = {"where": where} if masked else {}
        both = lambda x, y: loss(x, y, logit_scale=2.0, chunk_size=4, **some)  # noqa: E731
        return jax.value_and_grad(both, (0, 1))(x, y)

    def given(pairs):
        x = jnp.cos(jnp.arange(pairs * 3.0).reshape(pairs, 3))
        there = jnp.arange(pairs) % 3 != 1
        return x, jnp.sin(x), there[:, None] & there[None] | jnp.eye(pairs, dtype=bool)

    x = jax.ShapeDtypeStruct((n, 3), jnp.float32)
    program = reloaded(step, x, x, jax.ShapeDtypeStruct((n, n), jnp.bool_))
    for pairs in (1, 3, 8, 11):
        assert_same(program.call(*given(pairs)), jax.jit(step)(*given(pairs)))


def test_ahead_of_time():
    args = operands("indices", jnp.float32)
    step = step_of(jaxloss.cross_entropy)
    like = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), args)
    compiled = jax.jit(step).lower(*like).compile()
    for seed in range(2):
        x, _, _, y, _ = arrays(seed=seed)
        assert_same(compiled((x,), y), jax.jit(step)((x,), y))
    x, _, _, y, _ = arrays(N + 1)
    with pytest.raises(TypeError, match="types"):
        compiled((x,), y)


CACHED = """
import sys
from collections import Counter

import jax
import jax.numpy as jnp

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
seen = Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event]))

import jaxloss

x, h, k, y = jnp.ones((6, 5)), jnp.ones((6, 4)), jnp.ones((4, 5)), jnp.zeros(6, jnp.int32)
jax.jit(jax.grad(jaxloss.cross_entropy))(x, y)
jaxloss.cross_entropy(x.astype(jnp.bfloat16), y, return_stats=True)
jax.jit(jax.value_and_grad(jaxloss.linear_cross_entropy, (0, 1)))(h, k, y)
hits, misses = (seen[f"/jax/compilation_cache/cache_{what}"] for what in ("hits", "misses"))
print(hits, misses)
"""


def test_a_second_process_compiles_nothing(tmp_path):
    def run():
        program = [sys.executable, "-W", "ignore", "-c", CACHED, str(tmp_path)]
        out = subprocess.run(program, check=True, capture_output=True, text=True)
        entries = {path.name for path in tmp_path.iterdir() if path.name.endswith("-cache")}
        return entries, *map(int, out.stdout.split())

    stored, hits, misses = run()
    assert hits == 0
    assert misses == len(stored) >= 3
    assert run() == (stored, misses, 0)


@pytest.mark.parametrize("case", ["indices", "token_chunks-mean"])
def test_one_trace_for_equal_shapes(case):
    chex.clear_trace_counter()  # it counts by name
    step = jax.jit(chex.assert_max_traces(step_of(CASES[case]), n=1))
    params, data = operands(case, jnp.float32)
    for _ in range(3):
        loss, params = step(params, data)
    assert jnp.isfinite(loss)
    # The count must be able to fail.
    with pytest.raises(AssertionError, match="traced"):
        step(*operands(case, jnp.float32, n=N + 1))


def test_a_call_within_a_program_is_traced_once(monkeypatch):
    """The value of a jitted call would be traced first, the derivative of its program then."""
    traced = Counter()
    parts, tangents = rows.row_part, rows.row_tangents

    def count(name, function):
        def counted(*args, **kwargs):
            traced[name] += 1
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(rows, "row_part", count("value", parts))
    monkeypatch.setattr(rows, "row_tangents", count("tangent", tangents))
    x, _, _, y, *_ = arrays()
    along = lambda x, y: jax.jvp(lambda x: jaxloss.cross_entropy(x, y), (x,), (x,))  # noqa: E731
    for of, expected in (
        (lambda x, y: jaxloss.cross_entropy(x, y), {"value": 1}),
        (jax.grad(jaxloss.cross_entropy), {"value": 1}),  # no tangent but where a mode asks for it
        (along, {"value": 1, "tangent": 1}),
    ):
        traced.clear()
        jax.jit(of).lower(x, y)
        assert traced == expected


EAGER = {
    "log_softmax": lambda x, h, k, y: jaxloss.log_softmax(x),
    "nll_loss": lambda x, h, k, y: jaxloss.nll_loss(x, y),
    "cross_entropy": lambda x, h, k, y: jaxloss.cross_entropy(x, y, return_stats=True),
    "total_weight": lambda x, h, k, y: jaxloss.total_weight(y),
    "token_chunks": lambda x, h, k, y: jaxloss.linear_cross_entropy(h, k, y),
    "vocab_blocks": lambda x, h, k, y: linear("vocab_blocks", "none")(h, k, y),
    "gradient": lambda x, h, k, y: jax.grad(jaxloss.cross_entropy)(x, y),
    "linear gradient": lambda x, h, k, y: jax.grad(linear(None), (0, 1))(h, k, y),
}


@pytest.mark.parametrize("name", EAGER)
def test_eager_calls_are_compiled_once(name):
    batches = [arrays(seed=seed)[:4] for seed in range(3)]
    seen = Counter()

    def count(event, *_, **__):
        seen[event] += 1

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        EAGER[name](*batches[0])
        assert seen["/jax/core/compile/backend_compile_duration"] > 0
        seen.clear()
        for batch in batches[1:]:
            EAGER[name](*batch)
        assert not [event for event in seen if event.startswith("/jax/core/compile")]
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
