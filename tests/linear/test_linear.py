"""linear_cross_entropy and linear_loss: equal to the materialised loss, and what they promise."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chips import kernels_of
from forms import SCHEDULES
from oracle.programs import equations, jit_quickly, products, temporary_mib

import jaxloss
from jaxloss._linear import budget
from jaxloss._linear import packing as _packing

A = (0, 1)


def problem(n=7, d=4, v=11, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(n, d)), dtype)
    kernel = jnp.asarray(rng.normal(size=(d, v)), dtype)
    labels = rng.integers(0, v, n)
    labels[rng.random(n) < 0.3] = -100
    return hidden, kernel, jnp.asarray(labels, jnp.int32)


def random_case(seed):
    rng = np.random.default_rng(seed)
    lead = [(), (1,), (7,), (3, 5), (33,)][rng.integers(5)]
    d, v = int(rng.integers(1, 9)), int(rng.choice([1, 2, 13, 31, 64]))
    c = int(rng.integers(1, v + 1)) if rng.random() < 0.4 else v
    draw = rng.random
    given = {
        "hidden": rng.normal(size=(*lead, d)),
        "kernel": rng.normal(size=(d, v)),
    }
    if draw() < 0.5:
        given["bias"] = rng.normal(size=v)
    constants = {"reduction": str(rng.choice(["none", "sum", "mean"]))}
    exists = None
    if draw() < 0.3:
        shape = (*lead, c) if draw() < 0.5 else (1,) * len(lead) + (c,)
        exists = draw(shape) < 0.8
        exists[..., 0] = True
        constants["where"] = jnp.asarray(exists)
    if draw() < 0.4:
        q = rng.dirichlet(np.ones(c), lead) * (True if exists is None else exists)
        given["labels"] = q
    else:
        y = rng.integers(0, c if exists is None else 1, lead)
        constants["labels"] = jnp.asarray(np.where(draw(lead) < 0.3, -100, y), jnp.int32)
    if draw() < 0.4:
        given["weight"] = draw(c) + 0.1
    if draw() < 0.4:
        given["sample_weight"] = draw(lead) * (draw(lead) < 0.8)
    if draw() < 0.4:
        constants["label_smoothing"] = float(rng.choice([0.1, 1.0]))
    if draw() < 0.4:
        constants["z_loss"] = 0.01
    if draw() < 0.4:
        constants["logit_softcap"] = 3.0
    constants["return_stats"] = bool(draw() < 0.4)
    call = {
        "vocab_axis": int(rng.choice([0, 1, -1])),
        "num_classes": None if c == v else c,
        "chunk_size": [None, 1, 4, 100][rng.integers(4)],
        "implementation": [None, *SCHEDULES][rng.integers(3)],
    }
    given = {k: jnp.asarray(x, jnp.float32) for k, x in given.items()}
    return given, constants, call


def together(*functions, argnums=A):
    """Values and gradients of several functions of the same arguments, in one program."""
    return jit_quickly(lambda *args: [jax.value_and_grad(f, argnums)(*args) for f in functions])


OVER_NOTHING = pytest.param(47, marks=pytest.mark.nan_is_meant)  # a mean, that is


@pytest.mark.parametrize("seed", [*range(40), OVER_NOTHING])
def test_every_option_equals_the_materialised_loss(seed):
    given, constants, call = random_case(seed)

    def fused(given):
        given = dict(given)
        kernel = given.pop("kernel")
        kernel = kernel.T if call["vocab_axis"] == 0 else kernel
        return jaxloss.linear_cross_entropy(kernel=kernel, **given, **constants, **call)

    def materialised(given):
        given = dict(given)
        bias = given.pop("bias", None)
        x = given.pop("hidden")
        x = jnp.einsum("...d,dv->...v", x, given.pop("kernel"), precision="highest")
        x = x if bias is None else x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)
        return jaxloss.cross_entropy(x[..., : call["num_classes"]], **given, **constants)

    def total(f):
        def of(given):
            out = f(given)
            loss, stats = out if constants["return_stats"] else (out, None)
            number = jnp.arange(1, 1 + loss.size, dtype=loss.dtype).reshape(loss.shape)
            value = jnp.sum(jnp.sin(loss * number))
            if stats is not None and constants["reduction"] == "none":
                value += jnp.sum(jnp.cos(stats.log_prob) + stats.entropy * stats.logsumexp)
            return value, out

        return jax.value_and_grad(of, has_aux=True)

    program = jit_quickly(
        lambda given: (total(fused)(given), fused(given), total(materialised)(given))
    )
    ours, undifferentiated, theirs = program(given)
    pairs = zip(
        jax.tree.leaves((ours, undifferentiated)),
        jax.tree.leaves((theirs, theirs[0][1])),
        strict=True,
    )
    for got, expected in pairs:
        scale = np.max(np.abs(np.nan_to_num(expected)), initial=1)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize(("n", "v", "chunk"), [(1, 1, 1), (1, 7, 4), (13, 17, 4), (13, 17, 100)])
def test_shapes_that_divide_nothing(n, v, chunk, schedule):
    hidden, kernel, _ = problem(n, 3, v)
    labels = jnp.arange(n) % v

    def fused(h, k):
        return jaxloss.linear_cross_entropy(h, k, labels, chunk_size=chunk, implementation=schedule)

    ours, theirs = together(fused, lambda h, k: jaxloss.cross_entropy(h @ k, labels))(
        hidden, kernel
    )
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("chunk", "bodies"), [(7, 1), (3, 2)])
def test_counts_of_products(chunk, bodies):
    """The first chunk and the loop over the others have a body each, of which a token runs one."""
    hidden, kernel, labels = problem()

    def loss(reduction):
        def f(h, k):
            out = jaxloss.linear_cross_entropy(h, k, labels, chunk_size=chunk, reduction=reduction)
            return jnp.sum(out)

        return f

    assert products(loss("mean"), hidden, kernel) == bodies
    assert products(jax.value_and_grad(loss("mean"), A), hidden, kernel) == 3 * bodies
    assert products(jax.grad(loss("mean"), 0), hidden, kernel) == 2 * bodies
    assert products(jax.grad(loss("mean"), 1), hidden, kernel) == 2 * bodies
    assert products(jax.value_and_grad(loss("none"), A), hidden, kernel) == 4 * bodies
    assert products(jax.grad(loss("none"), 0), hidden, kernel) == 3 * bodies


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_counts_of_products_of_vocabulary_blocks(reduction):
    hidden, kernel, labels = problem()

    def loss(h, k):
        out = jaxloss.linear_cross_entropy(
            h, k, labels, reduction=reduction, implementation="vocab_blocks"
        )
        return jnp.sum(out)

    assert products(loss, hidden, kernel) == 1
    assert products(jax.value_and_grad(loss, A), hidden, kernel) == 4
    assert products(jax.grad(loss, 0), hidden, kernel) == 3
    assert products(jax.grad(loss, 1), hidden, kernel) == 3


def largest_product(hidden, kernel, **options):
    labels = jnp.zeros(hidden.shape[0], jnp.int32)
    program = equations(
        lambda h, k: jaxloss.linear_cross_entropy(h, k, labels, **options), hidden, kernel
    )
    return max(e.outvars[0].aval.shape for e in program if e.primitive.name == "dot_general")


def test_the_schedule_that_ran():
    """By the largest product's shape: some tokens by all classes, or all tokens by some."""

    def operands(n, v):
        return jax.ShapeDtypeStruct((n, 2), jnp.float32), jax.ShapeDtypeStruct((2, v), jnp.float32)

    assert largest_product(*operands(8, 12)) == (8, 12)
    assert largest_product(*operands(8, 12), chunk_size=4) == (4, 12)
    assert largest_product(*operands(8, 12), chunk_size=4, implementation="vocab_blocks") == (8, 4)
    # A budget of 256 MiB has room for 8 rows of this vocabulary.
    assert largest_product(*operands(64, 2**23))[0] == 64
    assert largest_product(*operands(8, 2**23)) == (8, 2**23)
    with pytest.raises(ValueError, match="implementation must be one of 'token_chunks', 'vocab"):
        largest_product(*operands(8, 12), implementation="chunks")


@pytest.mark.parametrize(
    ("backend", "columns", "chunk", "alone"),
    [
        ("cpu", 1000, 1024, 1024),
        ("cpu", 128256, 512, 512),
        ("cpu", 256000, 256, 256),
        ("tpu", 1000, 1024, 1024),
        ("tpu", 128256, 1024, 512),
        ("tpu", 2**20, 256, 64),
        ("gpu", 1000, 4096, 4096),
        ("gpu", 128256, 2048, 512),
        ("gpu", 2**30, 1, 1),
    ],
)
def test_chunks_by_default(backend, columns, chunk, alone, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert budget.default_chunk(10**6, columns) == chunk
    assert budget.value_chunk(chunk, columns) == alone
    assert budget.default_chunk(5, columns) == min(chunk, 5)
    # With so many features all tokens at once take no more than the float32 d_kernel of chunks.
    at_once = chunk + 2 * 600 // 3 if backend == "gpu" else chunk
    assert budget.default_chunk(chunk + 400, columns, 600) == at_once
    assert budget.default_chunk(chunk + 401, columns, 600) == chunk


@pytest.mark.parametrize(
    ("backend", "tokens", "block"),
    [
        ("cpu", 1024, 2048),
        ("cpu", 10**6, 128),
        ("tpu", 2048, 4096),
        ("tpu", 32768, 1024),
        ("gpu", 8192, 2048),
        ("gpu", 10**6, 128),
    ],
)
def test_blocks_by_default(backend, tokens, block, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert budget.default_block(tokens, 128256) == block
    assert budget.default_block(tokens, 100) == 100
    assert budget.default_block(tokens, 0) == 1


def test_an_odd_chunk_is_taken_as_it_is():
    assert budget.value_chunk(999, 2**20) == 999
    assert budget.value_chunk(6 * 64, 2**20) == 48


def test_the_value_alone_goes_by_parts_of_a_chunk(monkeypatch):
    monkeypatch.setattr(budget, "_fit", lambda *_: 3)  # tokens
    hidden, kernel, labels = problem(17)
    options = {"chunk_size": 12, "implementation": "token_chunks"}
    assert largest_product(hidden, kernel, **options) == (3, 11)
    x, y = hidden @ kernel, jnp.where(labels < 0, 0, labels)
    fused = jaxloss.linear_cross_entropy(hidden, kernel, labels, **options)
    np.testing.assert_allclose(fused, jaxloss.cross_entropy(x, labels), rtol=1e-6)

    def squared(logits, y):
        return jnp.square(jaxloss.cross_entropy(logits, y, reduction="none"))

    own = partial(jaxloss.linear_loss, squared, chunk_size=12)
    expected = jnp.mean(squared(x, y))
    np.testing.assert_allclose(own(hidden, kernel, y), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.value_and_grad(own)(hidden, kernel, y)[0], expected, rtol=1e-6)


def test_a_kernel_that_is_not_differentiated_has_no_accumulator_to_do_without(monkeypatch):
    monkeypatch.setattr(budget, "_fit", lambda mebibytes, _: 6 if mebibytes == 1024 else 3)
    hidden, kernel, labels = problem(12)

    def largest(argnums):
        options = {"chunk_size": 12, "implementation": "token_chunks"}
        step = jax.grad(partial(jaxloss.linear_cross_entropy, **options), argnums)
        program = equations(step, hidden, kernel, labels)
        shapes = (e.outvars[0].aval.shape for e in program if e.primitive.name == "dot_general")
        return max(rows for rows, columns in shapes if columns == 11)

    assert largest(A) == 12
    assert largest(0) == 6
    loss = partial(jaxloss.cross_entropy, reduction="none")
    own = jax.grad(partial(jaxloss.linear_loss, loss, chunk_size=12))
    expected = jax.grad(lambda h, k, y: jnp.mean(loss(h @ k, y)))
    labels = jnp.where(labels < 0, 0, labels)
    np.testing.assert_allclose(
        own(hidden, kernel, labels), expected(hidden, kernel, labels), rtol=1e-5, atol=1e-7
    )


def test_backward_pass_has_no_product():
    hidden, kernel, labels = problem()
    _, pullback = jax.vjp(
        lambda h, k: jaxloss.linear_cross_entropy(h, k, labels, chunk_size=3), hidden, kernel
    )
    assert products(pullback, jnp.float32(1)) == 0


@pytest.mark.nan_is_meant
def test_ignored_tokens_run_no_chunk():
    """The trip count follows the tokens that count: a kernel of NaN is not even read."""
    hidden, kernel, _ = problem()
    none = jnp.full(7, -100)
    for reduction in ("none", "sum"):
        out = jaxloss.linear_cross_entropy(
            hidden, kernel * jnp.nan, none, reduction=reduction, chunk_size=2
        )
        assert np.all(np.asarray(out) == 0)
    counts = jnp.array([False, True, False, True, True])
    packing = _packing.pack(counts, 2)
    assert packing.order.tolist() == [1, 3, 4, 5, 5, 5]
    assert int(packing.size) == 3
    assert _packing.valid_first(counts).tolist() == [1, 3, 4, 0, 2]
    assert _packing.positions(counts).tolist() == [5, 0, 5, 1, 2]


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_few_tokens_take_one_step(reduction, monkeypatch):
    """Whatever counts: a loop over what is left would take as long again to trace and compile."""
    hidden, kernel, labels = problem(24)

    def of(labels):
        def loss(h, k):
            out = jaxloss.linear_cross_entropy(h, k, labels, reduction=reduction, empty_mean=0)
            return jnp.sum(out)

        return jax.value_and_grad(loss, A)

    some, none = labels.at[3:17].set(-100), jnp.full(24, -100)
    in_quarters = of(some)(hidden, kernel)
    monkeypatch.setattr(_packing, "FEWEST", 32)
    names = {e.primitive.name for e in equations(of(some), hidden, kernel)}
    assert "while" not in names
    for got, expected in zip(
        jax.tree.leaves(of(some)(hidden, kernel)), jax.tree.leaves(in_quarters), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
    for wrong in (1, jnp.nan):
        value, gradients = of(none)(hidden, kernel * wrong)
        assert value == 0
        assert all(np.all(np.asarray(g) == 0) for g in gradients)


MODES = {
    "grad": lambda f: jax.grad(f, A),
    "jacfwd": lambda f: jax.jacfwd(f, A),
    "jvp of grad": lambda f: lambda h, k: jax.jvp(jax.grad(f, A), (h, k), (h, k))[1],
    "grad of grad": lambda f: jax.jacrev(jax.grad(f, A), A),
    "grad of jvp": lambda f: jax.jacrev(jax.jacfwd(f, A), A),
    "jvp of jvp": lambda f: jax.jacfwd(jax.jacfwd(f, A), A),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f), A),
    "linearize": lambda f: lambda h, k: jax.linearize(f, h, k)[1](h, k),
}


def test_rows_a_loss_reads_at_a_time(monkeypatch):
    blocks = partial(budget.block_of_rows, in_step=False)
    assert blocks(32000) is None  # a partitioner may split a chunk's tokens over 8 devices
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert [blocks(n) for n in (100, 32000, 131072, 2**20)] == [2048, 8, 2, 1]
    assert budget.block_of_rows(32000, in_step=True) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert blocks(32000) is None


# Eagerly, each mode meets one of the reductions: under jit it meets both.
@pytest.mark.parametrize(
    ("schedule", "reduction", "eager"),
    [
        ("token_chunks", "mean", ("grad", "jvp of grad", "grad of jvp", "checkpoint")),
        ("token_chunks", "none", ("jacfwd", "grad of grad", "jvp of jvp", "linearize")),
        ("vocab_blocks", "mean", ()),
        ("vocab_blocks", "none", ()),
    ],
)
def test_every_mode(schedule, reduction, eager):
    hidden, kernel, labels = problem()

    def total(losses):
        return jnp.sum(jnp.sin(losses))

    def fused(h, k):
        return total(
            jaxloss.linear_cross_entropy(
                h, k, labels, chunk_size=3, reduction=reduction, implementation=schedule
            )
        )

    def plain(h, k):
        logp = jax.nn.log_softmax(h @ k)
        counts = labels != -100
        picked = jnp.take_along_axis(logp, jnp.where(counts, labels, 0)[:, None], 1)[:, 0]
        losses = jnp.where(counts, -picked, 0)
        return total(
            losses if reduction == "none" else losses.sum() / counts.sum(dtype=jnp.float32)
        )

    @jit_quickly
    def every_mode(h, k):
        return [{name: mode(f)(h, k) for name, mode in MODES.items()} for f in (fused, plain)]

    jitted, expected = every_mode(hidden, kernel)
    of_eager = {name: MODES[name](fused)(hidden, kernel) for name in eager}
    for results in (jitted, of_eager):
        for name, got in results.items():
            for g, e in zip(*map(jax.tree.leaves, (got, expected[name])), strict=True):
                np.testing.assert_allclose(g, e, rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("axes", [(0, None, 0), (None, 0, None), (0, 0, 0)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_and_scan(axes, reduction, schedule):
    hidden, kernel, labels = problem()
    stacked = (
        jnp.stack([hidden, 2 * hidden]),
        jnp.stack([kernel, -kernel]),
        jnp.stack([labels, jnp.full(7, 3)]),
    )
    args = [s if a == 0 else s[0] for s, a in zip(stacked, axes, strict=True)]

    def step(h, k, y):
        def f(h, k):
            out = jaxloss.linear_cross_entropy(
                h, k, y, chunk_size=3, reduction=reduction, implementation=schedule
            )
            return jnp.sum(out)

        return jax.value_and_grad(f, A)(h, k)

    @jit_quickly
    def both(*args):
        def one(_, i):
            return _, step(*(a[i] if ax == 0 else a for a, ax in zip(args, axes, strict=True)))

        return jax.vmap(step, in_axes=axes)(*args), jax.lax.scan(one, None, jnp.arange(2))[1]

    batched, scanned = both(*args)
    for got, expected in zip(jax.tree.leaves(batched), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def dtypes_of(f, name, *args):
    """(input dtypes, output dtype) of every ``name`` in the program."""
    return {
        (*(str(v.aval.dtype) for v in eqn.invars), str(eqn.outvars[0].aval.dtype))
        for eqn in equations(f, *args)
        if eqn.primitive.name == name
    }


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_products_take_bfloat16_and_accumulate_in_float32(reduction, schedule):
    hidden, kernel, labels = problem(dtype=jnp.bfloat16)

    def loss(h, k):
        out = jaxloss.linear_cross_entropy(
            h, k, labels, reduction=reduction, implementation=schedule
        )
        return jnp.sum(out)

    step = jax.value_and_grad(loss, A)
    assert dtypes_of(step, "dot_general", hidden, kernel) == {("bfloat16", "bfloat16", "float32")}
    value, grads = step(hidden, kernel)
    assert value.dtype == jnp.float32
    assert {g.dtype for g in grads} == {jnp.dtype(jnp.bfloat16)}


def test_on_a_gpu_a_chunk_of_all_tokens_forms_d_kernel_narrow():
    """Its product narrows what it has added in float32. What is added to stays wide."""
    hidden, kernel, labels = problem(8, 5, 13, jnp.bfloat16)

    def out_dtypes(chunk):
        step = jax.grad(partial(jaxloss.linear_cross_entropy, chunk_size=chunk), A)
        program = equations(step, hidden, kernel, labels)
        found = [e.outvars[0].aval for e in program if e.primitive.name == "dot_general"]
        return sorted(str(aval.dtype) for aval in found if aval.shape == kernel.shape)

    with kernels_of("gpu", capability="8.0"):
        # All at once; quarters, where some are left.
        assert out_dtypes(8) == ["bfloat16", "float32"]
        assert set(out_dtypes(4)) == {"float32"}


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_but_operands_is_narrow(reduction, schedule):
    """softmax - onehot, every sum and every accumulator is float32: XLA:CPU would hide a slip."""
    hidden, kernel, labels = problem(dtype=jnp.bfloat16)
    bias = jnp.zeros(kernel.shape[1], jnp.bfloat16)

    def loss(h, k, b):
        out = jaxloss.linear_cross_entropy(
            h, k, labels, bias=b, reduction=reduction, implementation=schedule, chunk_size=3
        )
        return jnp.sum(out)

    step = jax.value_and_grad(loss, (0, 1, 2))
    for name in ("add", "sub", "mul", "exp", "log1p", "reduce_sum", "add_any"):
        narrow = [d for d in dtypes_of(step, name, hidden, kernel, bias) if "bfloat16" in d]
        assert not narrow, (name, narrow)


def test_bfloat16_gradients_are_no_worse_than_materialised_float32_ones(schedule):
    n, d, v = 2048, 256, 4096
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(n, d)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(d, v)) * 0.1, jnp.bfloat16)
    labels = jnp.asarray(rng.integers(0, v, n), jnp.int32)
    h, k = (np.asarray(a.astype(jnp.float32), np.float64) for a in (hidden, kernel))
    x = h @ k
    g = np.exp(x - x.max(-1, keepdims=True))
    g /= g.sum(-1, keepdims=True)
    g[np.arange(n), labels] -= 1
    g /= n

    def narrow(a):
        return np.asarray(jnp.asarray(a, jnp.bfloat16).astype(jnp.float32), np.float64)

    exact = (g @ k.T, h.T @ g)
    rounded_operand = (narrow(g) @ k.T, h.T @ narrow(g))
    loss = partial(jaxloss.linear_cross_entropy, implementation=schedule)
    got = jax.jit(jax.grad(loss, A))(hidden, kernel, labels)
    for ours, truth, once in zip(got, exact, rounded_operand, strict=True):
        ours = np.asarray(ours.astype(jnp.float32), np.float64)
        rounding = np.linalg.norm(narrow(truth) - truth) + np.linalg.norm(once - truth)
        assert np.linalg.norm(ours - truth) <= 1.1 * rounding


@pytest.mark.parametrize(
    ("n", "d", "v", "most"),
    [(4096, 512, 32000, 80), (2048, 64, 128256, 300)],  # materialised logits: 500 and 1002 MiB
)
def test_temporary_memory(n, d, v, most):
    args = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((n, d), jnp.float32), ((d, v), jnp.float32), ((n,), jnp.int32))
    ]

    temporary = partial(temporary_mib, args=args)
    accumulator = d * v * 4 / 2**20
    assert temporary(jax.value_and_grad(jaxloss.linear_cross_entropy, A)) <= accumulator + most
    assert temporary(jaxloss.linear_cross_entropy) <= most
    blocks = partial(jaxloss.linear_cross_entropy, implementation="vocab_blocks")
    assert temporary(blocks) <= 64
    assert temporary(jax.value_and_grad(blocks, A)) <= 64 + n * d * 4 / 2**20


@pytest.mark.nan_is_meant
def test_a_token_that_does_not_count_may_hold_anything():
    hidden, kernel, _ = problem()
    labels = jnp.array([1, -100, 2, -100, 3, 4, 5])
    hidden = hidden.at[1].set(jnp.nan).at[3].set(jnp.inf)
    rows = jnp.array([0, 2, 4, 5, 6])
    for schedule, chunk in (*((s, 3) for s in SCHEDULES), ("token_chunks", 7)):
        f = partial(jaxloss.linear_cross_entropy, implementation=schedule, chunk_size=chunk)
        step = jit_quickly(jax.value_and_grad(f, A))
        loss, (d_hidden, d_kernel) = step(hidden, kernel, labels)
        expected, grads = step(hidden[rows], kernel, labels[rows])
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        np.testing.assert_allclose(d_hidden[rows], grads[0], rtol=1e-5, atol=1e-7)
        assert np.all(np.asarray(d_hidden[jnp.array([1, 3])]) == 0)
        np.testing.assert_allclose(d_kernel, grads[1], rtol=1e-5, atol=1e-7)


def test_no_transposed_copy_of_an_embedding_table():
    hidden, kernel, labels = problem()
    step = jax.value_and_grad(
        lambda h, k: jaxloss.linear_cross_entropy(h, k, labels, vocab_axis=0), A
    )
    assert dtypes_of(step, "transpose", hidden, kernel.T) == set()


# linear_loss


def focal(logits, labels):
    loss = jaxloss.cross_entropy(logits, labels, reduction="none")
    return (1 - jnp.exp(-loss)) ** 2 * loss


def jensen_shannon(logits, teacher_logits):
    p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(teacher_logits)
    m = jnp.logaddexp(p, q) - jnp.log(2.0)
    return 0.5 * jnp.sum(jnp.exp(p) * (p - m) + jnp.exp(q) * (q - m), axis=-1)


@pytest.mark.parametrize("chunk", [2, 4, None])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_focal_loss(reduction, chunk):
    hidden, kernel, _ = problem()
    labels, weight = jnp.arange(7), jnp.array([1, 0, 2, 0.5, 1, 0, 3], jnp.float32)
    reduce = {
        "none": lambda x: x,
        "sum": jnp.sum,
        "mean": lambda x: jnp.sum(x) / jnp.sum(weight),
    }[reduction]

    def fused(h, k, s):
        return jnp.sum(
            jaxloss.linear_loss(
                focal, h, k, labels, sample_weight=s, reduction=reduction, chunk_size=chunk
            )
        )

    def plain(h, k, s):
        s = jnp.where(weight == 0, 0, s)
        losses = s * focal(h @ k, labels)
        return jnp.sum(losses) / jnp.sum(s) if reduction == "mean" else jnp.sum(reduce(losses))

    ours, theirs = together(fused, plain, argnums=(0, 1, 2))(hidden, kernel, weight)
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [2, 4, None])  # 4 goes in quarters too
@pytest.mark.parametrize("loss", [jensen_shannon, "soft targets"])
def test_a_teacher_in_chunks(loss, chunk):
    """The teacher's logits are chunked too, and gradients reach what the function closes over."""
    hidden, kernel, _ = problem()
    teacher, teacher_kernel, _ = problem(d=3, seed=1)
    if loss == "soft targets":

        def loss(logits, teacher_logits):
            q = jax.nn.softmax(teacher_logits)
            return jaxloss.cross_entropy(logits, q, reduction="none")

    def fused(h, k, t, tk):
        return jaxloss.linear_loss(
            lambda x, some: loss(x, some @ tk), h, k, t, chunk_size=chunk, reduction="mean"
        )

    def plain(h, k, t, tk):
        return jnp.mean(loss(h @ k, t @ tk))

    args = (hidden, kernel, teacher, teacher_kernel)
    ours, theirs = together(fused, plain, argnums=tuple(range(4)))(*args)
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_at_zero():
    """What fills the last chunk up is a token of zeros, whose gradient here is not finite."""
    hidden, kernel, _ = problem()

    def loss(logits):
        return jnp.log(jnp.sum(logits**2, axis=-1))

    def fused(h, k):
        return jaxloss.linear_loss(loss, h, k, chunk_size=5)

    got = jax.jit(jax.grad(fused, A))(hidden, kernel)
    expected = jax.grad(lambda h, k: jnp.mean(loss(h @ k)), A)(hidden, kernel)
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [5, None])
def test_what_a_loss_closes_over_has_the_gradient_of_the_tokens_that_count(chunk):
    """A Python number here. Of a token of zeros it would have none: log(0)."""
    hidden, kernel, _ = problem()
    each, counts = jnp.arange(7, dtype=jnp.float32), jnp.arange(7) > 0

    def mean(scale):
        def loss(logits, x):
            return scale * jnp.log(x) + 0 * logits[:, 0]

        return jaxloss.linear_loss(
            loss, hidden, kernel, each, sample_weight=counts, chunk_size=chunk
        )

    expected = np.mean(np.log(np.arange(1, 7)))
    np.testing.assert_allclose(jax.value_and_grad(mean)(3.0), (3 * expected, expected), rtol=1e-6)


def closing_over(scale, allowed, order, key):
    """A loss that closes over a float, booleans, integers and a key."""

    def loss(x, y):
        x = jnp.where(allowed[None], scale * x, -1e9)[:, order][:, order]
        x += jnp.where(jax.random.bernoulli(key, 0.5, (1, x.shape[1])), 0.1, 0.0)
        return jaxloss.cross_entropy(x, y, reduction="none")

    return loss


ALLOWED, ORDER = jnp.arange(11) != 7, jnp.arange(11)[::-1]
CAPTURED = {
    "jit": lambda f: jax.jit(f),
    "scan": lambda f: (
        lambda *args: jax.lax.scan(lambda total, _: (total + f(*args), None), 0.0, None, length=2)[
            0
        ]
    ),
    "scan over them": lambda f: (
        lambda h, k, s, a, o, key: jax.lax.scan(
            lambda total, a: (total + f(h, k, s, a, o, key), None), 0.0, jnp.stack([a, a])
        )[0]
    ),
    "map": lambda f: (
        lambda h, k, s, a, o, key: jnp.sum(
            jax.lax.map(lambda o: f(h, k, s, a, o, key), jnp.stack([o, o]))
        )
    ),
    "cond": lambda f: (
        lambda h, k, s, a, o, key: jax.lax.cond(a[0], lambda: f(h, k, s, a, o, key), lambda: 0.0)
    ),
    "checkpoint": lambda f: jax.checkpoint(f),
    "vmap": lambda f: (
        lambda h, k, s, a, o, key: jnp.sum(
            jax.vmap(lambda a, key: f(h, k, s, a, o, key))(jnp.stack([a, a]), jnp.stack([key, key]))
        )
    ),
}


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("captured", CAPTURED)
def test_gradients_from_outside_of_the_trace_that_a_loss_closes_over(captured, reduction):
    """An integer, a boolean or a key of that trace stayed in a rule, which outlives the trace."""
    hidden, kernel, labels = problem()
    args = jnp.float32(1.5), ALLOWED, ORDER, jax.random.key(3)
    labels = jnp.where(labels == 7, 0, labels)

    def fused(h, k, *captured):
        out = jaxloss.linear_loss(
            closing_over(*captured), h, k, labels, chunk_size=4, reduction=reduction
        )
        return jnp.sum(jnp.sin(out))

    def plain(h, k, *captured):
        out = closing_over(*captured)(h @ k, labels)
        return jnp.sum(jnp.sin(out if reduction == "none" else jnp.mean(out)))

    ours, theirs = (
        jax.value_and_grad(CAPTURED[captured](f), (0, 1, 2))(hidden, kernel, *args)
        for f in (fused, plain)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, theirs)


SHARD_LOSSES = {
    "a number": lambda scale, w, allowed, local: lambda x, y: jnp.sum(scale * x, axis=-1),
    "weights and a mask": lambda scale, w, allowed, local: (
        lambda x, y: jaxloss.cross_entropy(
            jnp.where(allowed, scale * x, -1e9), y, weight=w, reduction="none"
        )
    ),
    "a shard's mask": lambda scale, w, allowed, local: (
        lambda x, y: jaxloss.cross_entropy(jnp.where(local, scale * x, -1e9), y, reduction="none")
    ),
    "scan": lambda scale, w, allowed, local: (
        lambda x, y: jax.lax.scan(
            lambda total, i: (total + i * jnp.sum(jnp.where(allowed, scale * x, 0), -1), None),
            jnp.zeros_like(x[:, 0]),
            jnp.arange(3.0),
        )[0]
    ),
    "while": lambda scale, w, allowed, local: (
        lambda x, y: jax.lax.fori_loop(
            0, 3, lambda i, total: total + jnp.sum(x * w[None], -1), jnp.zeros_like(x[:, 0])
        )
    ),
    "cond": lambda scale, w, allowed, local: (
        lambda x, y: jax.lax.cond(scale > 0, lambda: jnp.sum(x * w[None], -1), lambda: x[:, 0])
    ),
    "checkpoint": lambda scale, w, allowed, local: (
        lambda x, y: jax.checkpoint(lambda x: jnp.sum(scale * x * w[None], -1))(x)
    ),
}


@pytest.mark.parametrize("name", SHARD_LOSSES)
def test_a_loss_that_closes_over_arrays_inside_of_shard_map(name):
    """The arrays are the same on all devices or not; their gradients are summed after the sweep."""
    rng = np.random.default_rng(0)
    h, k = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((16, 4), (4, 6)))
    y, w = jnp.arange(16) % 5, jnp.asarray(rng.random(6) + 0.1, jnp.float32)
    allowed = jnp.arange(6)[None] != 5
    local = jnp.tile(allowed, (4, 1))
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec

    def shard(h, k, scale, w, y, allowed, local):
        loss = SHARD_LOSSES[name](scale, w, allowed, local)
        total = jaxloss.linear_loss(loss, h, k, y, chunk_size=2, reduction="sum")
        return jax.lax.psum(total, "d")

    specs = (P("d"), P(), P(), P(), P("d"), P(), P("d"))
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=P())

    def plain(h, k, scale, w, y, allowed, local):
        return jnp.sum(SHARD_LOSSES[name](scale, w, allowed, local[:1])(h @ k, y))

    def run(f):
        def some(*args):
            value = f(*args)
            grads = jax.grad(f, (0, 1, 2, 3))(*args)
            first, rest = args[:4], args[4:]
            hvp = jax.jvp(lambda *a: jax.grad(f, (0, 1, 2, 3))(*a, *rest), first, first)[1]
            return value, grads, hvp

        return jit_quickly(some)(h, k, jnp.float32(1.3), w, y, allowed, local)

    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-4), run(sharded), run(plain)
    )


def test_second_derivatives_of_a_loss_that_closes_over_a_mask():
    hidden, kernel, labels = problem()
    labels = jnp.where(labels == 7, 0, labels)
    args = ALLOWED, ORDER, jax.random.key(3)

    def product(h, k, s, loss):
        def grad(h, k, s):
            return jax.grad(jax.jit(lambda *a: loss(*a, *args)), (0, 1, 2))(h, k, s)

        return jax.jvp(grad, (h, k, s), (h, k, s))

    def fused(h, k, *captured):
        return jaxloss.linear_loss(closing_over(*captured), h, k, labels, chunk_size=4)

    def plain(h, k, *captured):
        return jnp.mean(closing_over(*captured)(h @ k, labels))

    ours, theirs = (product(hidden, kernel, jnp.float32(1.5), f) for f in (fused, plain))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, theirs)


H, K, Y = np.zeros((6, 4), np.float32), np.zeros((4, 10), np.float32), np.zeros(6, np.int32)


@pytest.mark.parametrize(
    ("args", "options", "kind", "text"),
    [
        ((H, K[:3], Y), {}, ValueError, "kernel must have hidden's last dimension, D = 4"),
        ((H, K.T, Y), {}, ValueError, "set vocab_axis=0"),
        ((H, K[0], Y), {}, ValueError, r"kernel must be \[D, V\]"),
        ((H, K, Y[:, None]), {}, ValueError, r"labels must have the shape .* \(6,\)"),
        ((H, K, Y), {"num_classes": 11}, ValueError, r"num_classes must be in \[0, 10\]; got 11"),
        ((H, K, Y), {"chunk_size": 0}, ValueError, "chunk_size must be at least 1; got 0"),
        ((H, K, Y), {"chunk_size": 2.0}, TypeError, "chunk_size must be an int"),
        ((H, K, Y), {"bias": K[0, :4]}, ValueError, r"bias must have one entry a column.*\(10,\)"),
        ((H, K.astype(np.float16), Y), {}, TypeError, "one dtype; got float32 and float16"),
        ((H, K, Y), {"vocab_axis": 2}, ValueError, r"vocab_axis must be in \[-2, 1\]"),
        ((H, K, Y), {"weight": K[0, :9]}, ValueError, r"weight .* \(10,\)"),
        ((H.astype(np.int32), K, Y), {}, TypeError, "hidden must have a real floating dtype"),
    ],
)
def test_errors(args, options, kind, text):
    with pytest.raises(kind, match=text):
        jaxloss.linear_cross_entropy(*args, **options)
    with pytest.raises(kind, match="linear_cross_entropy"):
        jax.jit(lambda *args: jaxloss.linear_cross_entropy(*args, **options))(*args)


def test_errors_of_linear_loss():
    with pytest.raises(ValueError, match=r"loss_fn must return one floating number a token"):
        jaxloss.linear_loss(lambda x: x, H, K)
    with pytest.raises(ValueError, match=r"loss_fn must return .*got float32\(\)"):
        jaxloss.linear_loss(lambda x: jnp.sum(x), H, K)
    with pytest.raises(
        ValueError, match=r"per_token\[0\] must have hidden's leading shape, \(6,\)"
    ):
        jaxloss.linear_loss(focal, H, K, Y[:5])
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        jaxloss.linear_loss(None, H, K, Y)
