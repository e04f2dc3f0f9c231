"""Losses whose tokens, classes or kernels are split over the devices of a mesh."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms import SCHEDULES
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle.programs import jit_quickly
from oracle.truth import reference

import jaxloss
from jaxloss._xla import device

pytestmark = pytest.mark.jax_leaks("jit(grad(shard_map))")

# (mesh shape, axis names, the tokens' axes, the vocabulary's)
MESHES = {
    "8 tokens": ((8,), ("t",), ("t",), ()),
    "8 classes": ((8,), ("v",), (), ("v",)),
    "2x4": ((2, 4), ("t", "v"), ("t",), ("v",)),
    "4x2": ((4, 2), ("v", "t"), ("t",), ("v",)),
    "2x2x2 two of classes": ((2, 2, 2), ("t", "v", "w"), ("t",), ("w", "v")),
    "2x2x2 two of tokens": ((2, 2, 2), ("t", "u", "v"), ("t", "u"), ("v",)),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
N, D, C, V = 16, 6, 27, 32  # 27 classes, 32 columns: the last devices hold padding alone

OPTIONS = {
    "mean": {},
    "every option": {"label_smoothing": 0.1, "z_loss": 0.01, "logit_softcap": 4.0},
    "stats": {"label_smoothing": 0.1, "reduction": "none", "return_stats": True},
}


def alternating(cases, pair):
    """Each case in both dtypes, with a value of the pair each, in turn.

    Of (case, dtype, value) every pair of two occurs. Options follow cases by threes and values by
    twos, so that six cases hold each triple of (options, dtype, value) too.
    """
    return [
        (*case, dtype, pair[(i + j) % 2])
        for i, case in enumerate(cases)
        for j, dtype in enumerate(DTYPES)
    ]


def build(name, kind=AxisType.Auto):
    shape, names, tokens, vocab = MESHES[name]
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(names))
    return mesh, tokens, vocab


def problem(dtype, labels="indices"):
    rng = np.random.default_rng(7)
    x = rng.normal(size=(N, V)) * 3
    x[0, 3] = x[0, 9] = x[0, 20] = 12.0  # the maximum is on three devices
    x[1, :C] -= 80
    x[1, 5] = 0.0  # confident: a loss of about 1e-34
    h, k, b = rng.normal(size=(N, D)), rng.normal(size=(D, V)), rng.normal(size=V)
    y = rng.integers(0, C, N)
    y[:3], y[8:13] = (9, 5, -100), -100  # the devices hold different numbers of tokens that count
    if labels == "probabilities":
        y = np.zeros((N, V))
        y[:, :C] = rng.dirichlet(np.ones(C), N)
    w, s = rng.random(C) + 0.1, rng.random(N)
    s[4] = 0
    f32 = partial(jnp.asarray, dtype=jnp.float32)
    narrow = partial(jnp.asarray, dtype=dtype)
    y = f32(y) if labels == "probabilities" else jnp.asarray(y, jnp.int32)
    return {"x": narrow(x), "h": narrow(h), "k": narrow(k), "b": f32(b)}, y, f32(w), f32(s)


def total(f):
    """A scalar of every output, with f's outputs."""

    def of(*args):
        out = f(*args)
        values = [v for v in jax.tree.leaves(out) if v.dtype != jnp.int32]
        return sum(jnp.sum(jnp.sin(v)) for v in values), out

    return of


def assert_close(got, expected):
    """To rounding: sums over devices are taken in another order, and rounded once."""
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    for g, e in zip(got, expected, strict=True):
        relative = 2.0**-7 if g.dtype == jnp.bfloat16 else 2e-5
        g, e = np.asarray(g, np.float64), np.asarray(e, np.float64)
        allowed = relative * (np.max(np.abs(e), initial=0) + 1e-6)
        np.testing.assert_allclose(g, e, rtol=0, atol=allowed)


def collectives(text):
    """(kind, shape, inside of a loop) of each collective of an optimised program."""
    bodies = set(re.findall(r"\bbody=%?([\w.\-]+)", text)) | set(
        re.findall(r"\bcondition=%?([\w.\-]+)", text)
    )
    calls, found, here = {}, [], None
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            here = start[1]
            calls[here] = set()
        elif here:
            for many, one in re.findall(
                r"(?:branch_computations=\{([^}]*)\})|(?:(?:calls|to_apply|body|condition|"
                r"true_computation|false_computation)=%?([\w.\-]+))",
                line,
            ):
                calls[here] |= {c.strip(" %") for c in many.split(",")} if many else {one}
            if op := re.search(
                r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
                r"(?:-start)?\(",
                line,
            ):
                # Several that XLA combined are one instruction with a tuple of results.
                found += [(op[2], a, here) for a in re.findall(r"\w+\[[\d,]*\]", op[1])]
    inside, stack = set(), list(bodies)
    while stack:
        if (name := stack.pop()) not in inside:
            inside.add(name)
            stack += calls.get(name, ())
    return sorted((kind, shape, where in inside) for kind, shape, where in found)


def elements(shape):
    dims = re.match(r"\w+\[([\d,]*)\]", shape)[1]
    return int(np.prod([int(d) for d in dims.split(",") if d], initial=1))


# cross_entropy inside of shard_map


def manual_cross_entropy(mesh, tokens, vocab, labels, options):
    def f(x, y, w, s, **names):
        return jaxloss.cross_entropy(x, y, num_classes=C, weight=w, sample_weight=s, **options)

    def local(x, y, w, s):
        return jaxloss.cross_entropy(
            x, y, num_classes=C, weight=w, sample_weight=s, **options,
            vocab_axis_name=vocab or None, token_axis_name=tokens or None,
        )  # fmt: skip

    rows = P(tokens or None)
    of_labels = P(tokens or None, vocab or None) if labels == "probabilities" else rows
    each = rows if options.get("reduction") == "none" else P()
    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(tokens or None, vocab or None), of_labels, P(), rows),
        out_specs=(each, rows) if options.get("return_stats") else each,
    )
    return f, sharded


MANUAL = [(name, list(OPTIONS)[i % 3]) for i, name in enumerate(MESHES)]


@cache
def step_of_cross_entropy(options, labels, dtype, mesh=None):
    plain, sharded = manual_cross_entropy(*build(mesh or "2x4"), labels, OPTIONS[options])
    given, y, w, s = problem(DTYPES[dtype], labels)

    def step(x, w, s):
        return (sharded if mesh else plain)(x, y, w, s)

    return jit_quickly(jax.value_and_grad(total(step), argnums=(0, 1, 2), has_aux=True))(
        given["x"], w, s
    )


@pytest.mark.parametrize(
    ("mesh", "options", "dtype", "labels"),
    alternating([*MANUAL, ("2x4", "mean"), ("2x4", "every option")], ("indices", "probabilities")),
)
def test_cross_entropy_in_shard_map(mesh, options, labels, dtype):
    got = step_of_cross_entropy(options, labels, dtype, mesh)
    assert_close(got, step_of_cross_entropy(options, labels, dtype))


@pytest.mark.parametrize("labels", ["indices", "probabilities"])
def test_every_mode_in_shard_map(labels):
    plain, sharded = manual_cross_entropy(*build("2x4"), labels, OPTIONS["every option"])
    given, y, w, s = problem(jnp.float32, labels)
    x = given["x"] / 4

    def run(f):
        def loss(x):
            return 10 * f(x, y, w, s)

        grad = jax.grad(loss)
        direction = jnp.cos(x)
        return (
            jax.jvp(loss, (x,), (direction,)),
            jax.jvp(grad, (x,), (direction,)),
            jax.grad(lambda x: jnp.sum(jnp.sin(grad(x))))(x),
            jax.linearize(loss, x)[1](direction),
            jax.vmap(loss)(jnp.stack([x, 2 * x])),
        )

    assert_close(*jit_quickly(lambda: (run(sharded), run(plain)))())


def test_second_derivatives_of_logits_that_are_read_twice(monkeypatch):
    """Narrow ones of many classes; on a mesh of one device, where XLA has forms of its own."""
    monkeypatch.setattr(device, "on_one_device", lambda: True)
    mesh = jax.make_mesh((1,), ("v",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    x = jnp.sin(jnp.arange(4 * 256.0)).reshape(4, 256).astype(jnp.bfloat16)
    y = jnp.arange(4, dtype=jnp.int32)

    def step(x, along, **names):
        def loss(x):
            return jnp.sum(jnp.sin(jaxloss.cross_entropy(x, y, reduction="none", **names)))

        return jax.jvp(jax.grad(loss), (x,), (along,))

    columns = P(None, "v")
    on_mesh = jax.shard_map(
        partial(step, vocab_axis_name="v"),
        mesh=mesh,
        in_specs=(columns, columns),
        out_specs=(columns, columns),
    )
    assert_close(on_mesh(x, jnp.cos(x)), step(x, jnp.cos(x)))


def test_a_confident_row_keeps_its_loss():
    """The label stays out of the sum on whichever device holds it."""
    mesh, tokens, vocab = build("2x4")
    _, sharded = manual_cross_entropy(mesh, tokens, vocab, "indices", {"reduction": "none"})
    given, y, w, s = problem(jnp.float32)
    truth = reference(given["x"][:, :C], y, weight=w, sample_weight=s, reduction="none").loss
    got = jax.jit(sharded)(given["x"], y, w, s)
    assert 0 < truth[1] < 1e-30
    np.testing.assert_allclose(np.asarray(got, np.float64), truth.astype(float), rtol=2e-5)


@pytest.mark.nan_is_meant
def test_the_label_contract_in_shard_map():
    mesh, tokens, vocab = build("2x4")
    _, sharded = manual_cross_entropy(mesh, tokens, vocab, "indices", OPTIONS["stats"])
    given, y, w, s = problem(jnp.float32)
    x = given["x"].at[2].set(jnp.nan).at[5, 30].set(jnp.nan)  # ignored; padding
    y = y.at[6].set(C).at[7].set(-1)
    s = s.at[5:8].set(1.0)
    loss, stats = jax.jit(sharded)(x, y, w, s)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(sharded(x, y, w, s)[0])))(x)
    assert loss[2] == 0
    assert np.all(grad[2] == 0)
    assert stats.prediction[2] == -1
    assert np.all(np.isnan(loss[6:8]))
    assert np.all(np.isnan(grad[6:8, :C]))
    assert np.all(np.isfinite(np.delete(grad, (6, 7), 0)))
    assert np.all(np.isfinite(np.delete(loss, (6, 7))))
    assert stats.prediction[0] == 3


def test_one_maximum_and_one_sum():
    """Forward: a maximum of [N] and a packed sum; the mean's two sums are one; backward: none."""
    mesh, tokens, vocab = build("2x4")
    given, y, w, s = problem(jnp.float32)
    n = N // 2
    for options, rows in [({}, 3), (OPTIONS["every option"], 6)]:
        _, sharded = manual_cross_entropy(mesh, tokens, vocab, "indices", options)
        f = jax.jit(jax.value_and_grad(lambda x, f=sharded: f(x, y, w, s)))
        found = collectives(f.lower(given["x"]).compile().as_text())
        assert {kind for kind, *_ in found} == {"all-reduce"}
        assert sorted(elements(shape) for _, shape, _ in found) == sorted([n, rows * n, 2])


# Sharded logits under plain jit


SPECS = [P("t"), P(None, "v"), P("t", "v"), P(("t", "v"))]


# The kinds of axes take turns: each meets every spec and every set of options.
@pytest.mark.parametrize(
    ("options", "spec", "kind"),
    [
        (options, spec, [AxisType.Auto, AxisType.Explicit][(i + j) % 2])
        for i, options in enumerate(OPTIONS)
        for j, spec in enumerate(SPECS)
    ],
    ids=str,
)
def test_no_collective_but_sums_of_rows(options, spec, kind):
    mesh, *_ = build("2x4", kind)
    given, y, w, s = problem(jnp.bfloat16)
    rows = P(*spec[:1])
    w = jnp.pad(w, (0, V - C))
    where = (jnp.arange(V) < C)[None]

    def loss(x, y, w, s):
        return jaxloss.cross_entropy(
            x, y, weight=w, sample_weight=s, where=where, **OPTIONS[options]
        )

    def run(x, y, w, s):
        grad = jax.value_and_grad(total(lambda x: loss(x, y, w, s)), has_aux=True)(x)
        out = jaxloss.log_softmax(x)
        nll = jax.value_and_grad(lambda x: jaxloss.nll_loss(jaxloss.log_softmax(x), y))(x)
        return grad, out, nll

    expected = jit_quickly(run)(given["x"], y, w, s)
    with jax.set_mesh(mesh):
        put = [
            jax.device_put(a, NamedSharding(mesh, p))
            for a, p in zip((given["x"], y, w, s), (spec, rows, P(), rows), strict=True)
        ]
        compiled = jax.jit(run).lower(*put).compile()
        got = compiled(*put)
    assert_close(got, expected)
    found = collectives(compiled.as_text())
    assert {kind for kind, *_ in found} <= {"all-reduce"}, found
    assert all(elements(shape) <= 8 * N for _, shape, _ in found), found


@pytest.mark.parametrize("labels", ["indices", "probabilities"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_masks_and_weights_of_an_explicit_mesh(spec, labels):
    """Each token's own classes, and the gradients of all that is differentiable."""
    mesh, *_ = build("2x4", AxisType.Explicit)
    given, y, w, s = problem(jnp.float32, labels)
    where = jax.random.bernoulli(jax.random.key(0), 0.8, (N, V))
    w, rows = jnp.pad(w, (0, V - C), constant_values=1.0), P(*spec[:1])
    if labels == "probabilities":
        y = jnp.where(where, y, 0)
    else:
        where = where.at[jnp.arange(N), jnp.clip(y, 0)].set(True)

    def run(x, y, where, w, s):
        def loss(x, w, s, y):
            return jaxloss.cross_entropy(
                x, y, weight=w, where=where, sample_weight=s, label_smoothing=0.1
            )

        active = (0, 1, 2, 3) if y.ndim == 2 else (0, 1, 2)
        return jax.value_and_grad(loss, active)(x, w, s, y)

    args, split = (given["x"], y, where, w, s), spec if y.ndim == 2 else rows
    with jax.set_mesh(mesh):
        got = jit_quickly(run)(
            *(
                jax.device_put(a, NamedSharding(mesh, p))
                for a, p in zip(args, (spec, split, spec, P(), rows), strict=True)
            )
        )
    assert_close(got, jit_quickly(run)(*args))


# linear_cross_entropy


def manual_linear(mesh, tokens, vocab, options, schedule):
    rows = P(tokens or None)
    each = rows if options.get("reduction") == "none" else P()

    def local(h, k, b, y, w, s, **names):
        return jaxloss.linear_cross_entropy(
            h, k, y, bias=b, num_classes=C, weight=w, sample_weight=s, chunk_size=3,
            implementation=schedule, **options, **names,
        )  # fmt: skip

    sharded = jax.shard_map(
        partial(local, vocab_axis_name=vocab or None, token_axis_name=tokens or None),
        mesh=mesh,
        in_specs=(rows, P(None, vocab or None), P(vocab or None), rows, P(), rows),
        out_specs=(each, rows) if options.get("return_stats") else each,
    )
    return local, sharded


@cache
def step_of_linear(options, dtype, schedule, mesh=None):
    plain, sharded = manual_linear(*build(mesh or "2x4"), OPTIONS[options], schedule)
    given, y, w, s = problem(DTYPES[dtype])

    def step(h, k, b, w, s):
        return (sharded if mesh else plain)(h, k, b, y, w, s)

    return jit_quickly(jax.value_and_grad(total(step), argnums=range(5), has_aux=True))(
        given["h"], given["k"], given["b"].astype(DTYPES[dtype]), w, s
    )


@pytest.mark.parametrize(("mesh", "options", "dtype", "schedule"), alternating(MANUAL, SCHEDULES))
def test_linear_in_shard_map(mesh, options, dtype, schedule):
    got = step_of_linear(options, dtype, schedule, mesh)
    assert_close(got, step_of_linear(options, dtype, schedule))


def test_a_batch_of_linear_losses_in_shard_map(schedule):
    """Of different numbers of tokens that count: what a loss branches on is batched too."""
    mesh, *_ = build("8 tokens")
    given, y, *_ = problem(jnp.float32)
    hidden = jnp.stack([given["h"], jnp.cos(given["h"])], axis=1)
    labels = jnp.stack([y, jnp.where(jnp.arange(N) < 7, -100, y)], axis=1)

    def losses(hidden, kernel, labels, **names):
        loss = partial(jaxloss.linear_cross_entropy, num_classes=C, chunk_size=3, **names)
        loss = partial(loss, implementation=schedule)
        return jax.vmap(loss, (1, None, 1))(hidden, kernel, labels)

    def run(f):
        def step(h, k):
            return jnp.sum(jnp.sin(f(h, k, labels)))

        return jax.value_and_grad(step, (0, 1))(hidden, given["k"])

    on_mesh = jax.shard_map(
        partial(losses, token_axis_name="t"),
        mesh=mesh,
        in_specs=(P("t"), P(), P("t")),
        out_specs=P(),
    )
    assert_close(*jit_quickly(lambda: (run(on_mesh), run(losses)))())


def test_labels_that_are_the_same_on_all_devices(schedule):
    """As those of contrastive losses, a constant of the program."""
    mesh, *_ = build("8 tokens")
    given, *_ = problem(jnp.float32)

    def losses(hidden, kernel):
        labels = jnp.arange(2, dtype=jnp.int32)
        loss = partial(jaxloss.linear_cross_entropy, implementation=schedule, chunk_size=8)
        return loss(hidden, kernel, labels, reduction="none")

    def each(hidden, kernel):
        return jnp.concatenate([losses(h, kernel) for h in hidden.reshape(8, 2, D)])

    def run(f):
        step = lambda h, k: jnp.sum(jnp.sin(f(h, k)))  # noqa: E731
        return jax.value_and_grad(step, (0, 1))(given["h"], given["k"])

    on_mesh = jax.shard_map(losses, mesh=mesh, in_specs=(P("t"), P()), out_specs=P("t"))
    assert_close(*jit_quickly(lambda: (run(on_mesh), run(each)))())


def test_linear_sums_that_the_caller_takes(schedule):
    """Without token_axis_name each device returns its own sum, whose cotangents may differ."""
    mesh, *_ = build("2x4")
    given, y, *_ = problem(jnp.float32)
    scale = jnp.array([1.0, 3.0], jnp.float32)

    def loss(h, k, y):
        return jaxloss.linear_cross_entropy(
            h, k, y, num_classes=C, reduction="sum", chunk_size=3, implementation=schedule
        )

    def sharded(h, k):
        def local(h, k, y, scale):
            here = jaxloss.linear_cross_entropy(
                h, k, y, num_classes=C, reduction="sum", chunk_size=3, implementation=schedule,
                vocab_axis_name="v",
            )  # fmt: skip
            return jax.lax.psum(scale[0] * here, "t")

        specs = (P("t"), P(None, "v"), P("t"), P("t"))
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(h, k, y, scale)

    def plain(h, k):
        half = N // 2
        return loss(h[:half], k, y[:half]) + 3 * loss(h[half:], k, y[half:])

    def run(f):
        args = given["h"], given["k"]
        directions = tuple(map(jnp.cos, args))
        return (
            jax.value_and_grad(f, (0, 1))(*args),
            jax.jvp(f, args, directions),
            jax.jvp(jax.grad(f, (0, 1)), args, directions)[1],
        )

    assert_close(*jit_quickly(lambda: (run(sharded), run(plain)))())


def test_linear_loss_in_shard_map():
    mesh, *_ = build("8 tokens")
    given, y, *_ = problem(jnp.float32)
    args = given["h"], given["k"], jnp.arange(1, 1 + V, dtype=jnp.float32)

    def loss(h, k, scale, y):
        def each(x, y):
            return jaxloss.cross_entropy(x * scale[None], y, reduction="none")

        return jaxloss.linear_loss(each, h, k, y, reduction="sum")

    sharded = jax.shard_map(
        lambda *a: jax.lax.psum(loss(*a), "t"),
        mesh=mesh,
        in_specs=(P("t"), P(), P(), P("t")),
        out_specs=P(),
    )
    got, expected = (
        jit_quickly(jax.value_and_grad(f, (0, 1, 2)))(*args, y) for f in (sharded, loss)
    )
    assert_close(got, expected)


@pytest.mark.parametrize("weighed", [False, True])
def test_linear_loss_of_constants_in_shard_map(weighed):
    """Which are the same on all devices, as the logits are not; second derivatives too."""
    mesh, *_ = build("8 tokens")
    given, _, _, s = problem(jnp.float32)
    # Small: a sine of slopes in the hundreds has lost the digits that are compared.
    given = {name: x / 4 for name, x in given.items()}
    scale = jnp.linspace(1.0, 2.0, 2, dtype=jnp.float32)

    def losses(h, k, s):
        loss = lambda x: jnp.sum(jnp.sin(x), axis=-1) * scale  # noqa: E731
        weight = s if weighed else None
        return jaxloss.linear_loss(loss, h, k, sample_weight=weight, reduction="none", chunk_size=2)

    def each(h, k, s):
        parts = zip(h.reshape(8, 2, D), s.reshape(8, 2), strict=True)
        return jnp.concatenate([losses(h, k, s) for h, s in parts])

    def run(f):
        def slope(h, k):
            return jax.grad(lambda h, k: jnp.sum(jnp.sin(f(h, k, s))), (0, 1))(h, k)

        second = lambda h, k: sum(jnp.sum(jnp.sin(g)) for g in slope(h, k))  # noqa: E731
        return slope(given["h"], given["k"]), jax.grad(second, (0, 1))(given["h"], given["k"])

    specs = P("t"), P(), P("t")
    on_mesh = jax.shard_map(losses, mesh=mesh, in_specs=specs, out_specs=P("t"))
    assert_close(*jit_quickly(lambda: (run(on_mesh), run(each)))())


EXPLICIT = [
    ("8 tokens", P()),
    ("8 tokens", P("t")),
    ("8 classes", P(None, "v")),
    ("2x4", P(None, "v")),
    ("2x4", P("t", "v")),
    ("2x4", P(None, ("v", "t"))),
    ("4x2", P("t", None)),
    ("4x2", P(None, "t")),
    ("2x2x2 two of classes", P("t", ("v", "w"))),
    ("2x2x2 two of tokens", P(("t", "u"), "v")),
]


def explicit(mesh, spec, dtype, schedule, options, vocab_axis=1):
    """(function of arrays, those arrays on the mesh, on one device)"""
    mesh, tokens, vocab = build(mesh, AxisType.Explicit)
    given, y, w, s = problem(dtype)
    if vocab_axis == 0:
        given["k"] = given["k"].T
        spec = P(*(tuple(spec) + (None,) * (2 - len(spec)))[::-1])
    rows = P(tokens or None)
    d = 8 if "t" in str(spec) else D  # the features divide among the devices
    widths = [(0, d - D), (0, 0)] if vocab_axis == 1 else [(0, 0), (0, d - D)]
    arrays = (
        jnp.pad(given["h"], ((0, 0), (0, d - D)), constant_values=1),
        jnp.pad(given["k"], widths, constant_values=0.5),
        given["b"].astype(dtype), y, w, s,
    )  # fmt: skip

    def f(h, k, b, y, w, s):
        def loss(h, k, b, w, s):
            return jaxloss.linear_cross_entropy(
                h, k, y, bias=b, num_classes=C, weight=w, sample_weight=s, chunk_size=3,
                vocab_axis=vocab_axis, implementation=schedule, **options,
            )  # fmt: skip

        return jax.value_and_grad(total(loss), argnums=range(5), has_aux=True)(h, k, b, w, s)

    specs = (rows, spec, P(vocab or None), rows, P(), rows)
    put = [jax.device_put(a, NamedSharding(mesh, p)) for a, p in zip(arrays, specs, strict=True)]
    return mesh, f, put, arrays


@pytest.mark.parametrize(
    ("mesh", "spec", "options", "dtype", "schedule"),
    alternating(
        [(mesh, spec, list(OPTIONS)[i % 3]) for i, (mesh, spec) in enumerate(EXPLICIT)], SCHEDULES
    ),
    ids=str,
)
def test_linear_on_an_explicit_mesh(mesh, spec, options, dtype, schedule):
    dtype = DTYPES[dtype]
    mesh, f, put, arrays = explicit(mesh, spec, dtype, schedule, OPTIONS[options])
    with jax.set_mesh(mesh):
        got = jit_quickly(f)(*put)
    for g, x in zip(got[1], (*put[:3], *put[4:]), strict=True):
        assert g.sharding.is_equivalent_to(x.sharding, g.ndim)
    assert_close(got, jit_quickly(f)(*arrays))


def test_float16_gradients_of_devices_that_weigh_unlike():
    """What they are scaled by in the products is undone after they are summed over devices."""
    mesh, f, put, arrays = explicit("2x4", P("t", "v"), jnp.float16, "token_chunks", {})
    *arrays, s = arrays
    s = jnp.where(jnp.arange(N) < N // 2, s, 1e3 * s)
    with jax.set_mesh(mesh):
        _, (_, d_kernel, *_) = jit_quickly(f)(*put[:-1], jax.device_put(s, put[-1].sharding))
    wide = [a.astype(jnp.float32) if a.dtype == jnp.float16 else a for a in arrays]
    expected = jit_quickly(f)(*wide, s)[1][1]
    assert d_kernel.dtype == jnp.float16
    np.testing.assert_allclose(d_kernel, expected, rtol=0, atol=2**-9 * np.max(np.abs(expected)))


def test_probabilities_and_masks_on_an_explicit_mesh(schedule):
    """Of 27 classes in 32 columns: the last device's are padding but for three."""
    mesh, *_ = build("2x4", AxisType.Explicit)
    given, y, w, s = problem(jnp.float32, "probabilities")
    where = jax.random.bernoulli(jax.random.key(0), 0.8, (N, C))
    y = jnp.where(where, y[:, :C], 0)

    def run(h, k, y, where, s):
        def loss(h, k, y):
            return jaxloss.linear_cross_entropy(
                h, k, y, num_classes=C, weight=w, where=where, sample_weight=s, chunk_size=3,
                label_smoothing=0.1, implementation=schedule,
            )  # fmt: skip

        return jax.value_and_grad(loss, (0, 1, 2))(h, k, y)

    args = (given["h"], given["k"], y, where, s)
    specs = (P("t"), P(None, "v"), P("t"), P("t"), P("t"))
    with jax.set_mesh(mesh):
        got = jit_quickly(run)(
            *(jax.device_put(a, NamedSharding(mesh, p)) for a, p in zip(args, specs, strict=True))
        )
    assert_close(got, jit_quickly(run)(*args))


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("labels", ["indices", "top k"])
def test_tokens_that_do_not_count_on_an_explicit_mesh(schedule, labels):
    """They may hold anything, on a device with none that count beside others that go on too."""
    mesh, *_ = build("2x4", AxisType.Explicit)
    given, y, w, _ = problem(jnp.float32)
    h, k, rows = given["h"], given["k"], jnp.arange(N)
    s = ((rows >= N // 2) | ((rows == 0) & (labels == "indices"))).astype(jnp.float32)
    y = jnp.where(y < 0, 0, y)
    if labels == "top k":
        y = jaxloss.TopKLabels(jnp.stack([y, (y + 1) % C], axis=-1), jnp.full((N, 2), 0.4))

    def run(h, k, w, y, s):
        def loss(h, k, w):
            return jaxloss.linear_cross_entropy(
                h, k, y, num_classes=C, weight=w, sample_weight=s, chunk_size=3,
                implementation=schedule,
            )  # fmt: skip

        return jax.value_and_grad(loss, (0, 1, 2))(h, k, w)

    specs = P("t"), P(None, "v"), P(), P("t"), P("t")
    with jax.set_mesh(mesh):
        args = jnp.where(s[:, None] == 0, jnp.nan, h), k, w, y, s
        got = jit_quickly(run)(
            *(
                jax.tree.map(lambda a, p=p: jax.device_put(a, NamedSharding(mesh, p)), a)
                for a, p in zip(args, specs, strict=True)
            )
        )
    assert_close(got, jit_quickly(run)(h, k, w, y, s))


@pytest.mark.parametrize("rest", ["drop", "uniform", "bucket"])
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "shard_map"])
def test_top_k_labels_of_tokens_that_are_split(kind, rest):
    """JAX scatters into no array of an explicit mesh; JAX 0.10 takes no maximum over no axes."""
    mesh, *_ = build("8 tokens", kind)
    given, y, _, _ = problem(jnp.float32)
    x, y = given["x"], jnp.maximum(y, 0)
    index, q = jnp.stack([y, (y + 1) % V], axis=-1), jnp.full((N, 2), 0.4)

    def losses(x, index, q):
        return jaxloss.cross_entropy(x, jaxloss.TopKLabels(index, q, rest), reduction="none")

    def run(x, index, q):
        return jax.value_and_grad(lambda x, q: jnp.sum(spread(x, index, q)), (0, 1))(x, q)

    spread = losses
    expected = jit_quickly(run)(x, index, q)
    if kind == AxisType.Auto:
        spread = jax.shard_map(losses, mesh=mesh, in_specs=(P("t"),) * 3, out_specs=P("t"))
    with jax.set_mesh(mesh):
        split = (jax.device_put(a, NamedSharding(mesh, P("t"))) for a in (x, index, q))
        got = jit_quickly(run)(*split)
    assert_close(got, expected)


def test_linear_with_a_tied_table_on_an_explicit_mesh():
    mesh, f, put, arrays = explicit("2x4", P("t", "v"), jnp.float32, "token_chunks", {}, 0)
    with jax.set_mesh(mesh):
        got = jit_quickly(f)(*put)
    assert_close(got, jit_quickly(f)(*arrays))


D_HIDDEN = ("all-reduce", 8 * 128)  # its sum over the vocabulary


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (P(None, "v"), [D_HIDDEN, ("all-reduce", 128 * 16)]),
        (P("t", "v"), [("all-gather", 128 * 16), D_HIDDEN, ("reduce-scatter", 64 * 16)]),
        (P(None, ("v", "t")), [("all-gather", 128 * 16), D_HIDDEN, ("reduce-scatter", 64 * 16)]),
        (P("t", None), [("all-gather", 128 * 64), ("reduce-scatter", 64 * 64)]),
    ],
    ids=str,
)
def test_each_large_array_is_communicated_once(spec, wanted, schedule):
    """Outside of the loops, which run over each device's own tokens: 8 of 16, 2 at a time."""
    mesh, *_ = build("2x4", AxisType.Explicit)
    rng = np.random.default_rng(0)
    h, k = rng.normal(size=(16, 128)), rng.normal(size=(128, 64))
    y = rng.integers(0, 64, 16)

    def f(h, k, y):
        def loss(h, k):
            return jaxloss.linear_cross_entropy(h, k, y, chunk_size=2, implementation=schedule)

        return jax.value_and_grad(loss, (0, 1))(h, k)

    with jax.set_mesh(mesh):
        specs = (P("t"), spec, P("t"))
        args = [
            jax.device_put(jnp.asarray(a, t), NamedSharding(mesh, p))
            for a, t, p in zip((h, k, y), (jnp.float32, jnp.float32, jnp.int32), specs, strict=True)
        ]
        found = collectives(jax.jit(f).lower(*args).compile().as_text())
    big = [(kind, elements(shape)) for kind, shape, _ in found if elements(shape) >= 512]
    assert sorted(big) == sorted(wanted), found
    # A step of the loop sums a few numbers of each of its 2 tokens.
    assert not [c for c in found if c[2] and elements(c[1]) > 6 * 2], found
    if schedule == "vocab_blocks":
        assert not [c for c in found if c[2]], found


def test_tokens_do_not_wait_for_one_another():
    """Devices that share no loss loop over their own tokens: no collective in a loop."""
    mesh, f, put, _ = explicit("8 tokens", P(), jnp.float32, "token_chunks", {})
    with jax.set_mesh(mesh):
        found = collectives(jax.jit(f).lower(*put).compile().as_text())
    assert found
    assert not [c for c in found if c[2]]


def test_the_walk_over_the_program_finds_loops():
    """The assertions above must be able to fail."""
    mesh, *_ = build("8 tokens")

    def local(x):
        def body(i, x):
            return x + jax.lax.pcast(jax.lax.psum(x, "t"), "t", to="varying")

        return jax.lax.fori_loop(0, x.shape[0], body, x)

    f = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("t"), out_specs=P("t")))
    found = collectives(f.lower(jnp.zeros((64, 3))).compile().as_text())
    assert [(kind, elements(shape), loop) for kind, shape, loop in found] == [
        ("all-reduce", 24, True)
    ]


# Gradient accumulation


@pytest.mark.parametrize("labels", ["indices", "probabilities"])
def test_accumulated_microbatches_are_the_mean(labels):
    given, y, w, s = problem(jnp.float32, labels)
    x, y = given["x"][:, :C], y if labels == "indices" else y[:, :C]

    def whole(x):
        return jaxloss.cross_entropy(x, y, weight=w, sample_weight=s)

    def accumulated(x):
        weight = jaxloss.total_weight(y, weight=w, sample_weight=s)

        def step(sum_so_far, some):
            x, y, s = some
            return sum_so_far + jaxloss.cross_entropy(
                x, y, weight=w, sample_weight=s, reduction="sum"
            ), None

        parts = [a.reshape(4, N // 4, *a.shape[1:]) for a in (x, y, s)]
        return jax.lax.scan(step, jnp.float32(0), tuple(parts))[0] / weight

    got, expected = (jit_quickly(jax.value_and_grad(f))(x) for f in (accumulated, whole))
    assert_close(got, expected)
    if labels == "probabilities":
        return
    y = jnp.where(y == -100, 0, y).at[1:4].set(-100)  # 1, 4, 4 and 4 tokens that count
    of_means = np.mean(
        [
            jaxloss.cross_entropy(*a, weight=w)
            for a in zip(jnp.split(x, 4), jnp.split(y, 4), strict=True)
        ]
    )
    assert abs(of_means - jaxloss.cross_entropy(x, y, weight=w)) > 1e-2


def test_total_weight():
    y = jnp.array([1, -100, 2, 5])
    w = jnp.array([1.0, 10.0, 100.0])
    assert jaxloss.total_weight(y) == 3
    assert jaxloss.total_weight(y, ignore_index=2) == 3
    assert jaxloss.total_weight(y[:3], weight=w) == 110
    assert jaxloss.total_weight(y, sample_weight=jnp.array([0.5, 7, 2, 0])) == 2.5
    assert jaxloss.total_weight(y, where=jnp.array([True, True, False, False])) == 1
    assert jaxloss.total_weight(jnp.full((3, 4), 0.25), sample_weight=jnp.array([1, 0, 3])) == 4
    assert jaxloss.total_weight(jnp.zeros((4, 2)), axis=0) == 2
    assert jaxloss.total_weight(jnp.zeros((4, 2, 3)), axis=(0, -1)) == 2
    mesh, *_ = build("8 tokens")
    f = jax.shard_map(
        lambda y: jaxloss.total_weight(y, token_axis_name="t"),
        mesh=mesh,
        in_specs=P("t"),
        out_specs=P(),
    )
    assert f(jnp.array([-100] * 7 + [3] * 9)) == 9


# Errors


def in_shard_map(f, *specs, check=True):
    mesh, *_ = build("2x4")
    given, y, *_ = problem(jnp.float32)
    args = {"x": given["x"], "h": given["h"], "k": given["k"], "y": y}
    arrays = [args[name] for name, _ in specs]
    return jax.shard_map(
        lambda *a: jnp.sum(f(*a))[None],
        mesh=mesh,
        in_specs=tuple(p for _, p in specs),
        out_specs=P(("t", "v")),
        check_vma=check,
    )(*arrays)


XY = (("x", P("t", "v")), ("y", P("t")))


@pytest.mark.parametrize(
    ("names", "specs", "check", "kind", "text"),
    [
        ({"vocab_axis_name": 3}, XY, True, TypeError, "vocab_axis_name must be the name"),
        ({"vocab_axis_name": "z"}, XY, True, ValueError, "of the mesh; got 'z', inside of"),
        ({"vocab_axis_name": ("v", "v")}, XY, True, ValueError, "must name each axis once"),
        (
            {"vocab_axis_name": "v", "token_axis_name": "v"},
            XY, True, ValueError, "must differ; got 'v' in both",
        ),
        (
            {"vocab_axis_name": "v"},
            (("x", P("t")), ("y", P("t"))), True, ValueError,
            "logits must be split over vocab_axis_name",
        ),
        (
            {"vocab_axis_name": "v"}, XY, False, ValueError, "keep shard_map's check_vma=True",
        ),
        (
            {"vocab_axis_name": "v"},
            (("x", P(None, "v")), ("y", P("v"))), True, ValueError,
            "labels must have the shape",
        ),
        (
            {"token_axis_name": "t"},
            (("x", P()), ("y", P())), True, ValueError,
            "tokens must be split over token_axis_name",
        ),
    ],
)  # fmt: skip
def test_errors_of_axis_names(names, specs, check, kind, text):
    with pytest.raises(kind, match=text):
        in_shard_map(lambda x, y: jaxloss.cross_entropy(x, y, **names), *specs, check=check)


def pmapped(f, *args):
    return jax.pmap(f, axis_name="t")(*args)


def mapped_without_types(f, *args):
    mesh = jax.make_mesh((8,), ("t",), axis_types=(AxisType.Auto,))

    def of_one(*args):
        return jax.tree.map(lambda x: x[None], f(*(x[0] for x in args)))

    return jax.jit(
        jax.shard_map(of_one, mesh=mesh, in_specs=P("t"), out_specs=P("t"), check_vma=False)
    )(*args)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("of_tokens", [pmapped, mapped_without_types])
def test_where_no_type_says_what_is_split(of_tokens):
    """pmap, and check_vma=False: the tokens are split there, and nothing says so."""
    x, h = np.zeros((8, 4, 3), np.float32), np.zeros((8, 4, 2), np.float32)
    y, k = np.zeros((8, 4), np.int32), np.zeros((2, 3), np.float32)
    calls = {
        "cross_entropy": lambda x, h, y, **o: jaxloss.cross_entropy(x, y, **o),
        "linear_cross_entropy": lambda x, h, y, **o: jaxloss.linear_cross_entropy(h, k, y, **o),
        "linear_kl_divergence": lambda x, h, y, **o: jaxloss.linear_kl_divergence(h, k, h, k, **o),
        "total_weight": lambda x, h, y, **o: jaxloss.total_weight(y, **o),
        "metric_sums": lambda x, h, y, **o: jaxloss.metric_sums(jaxloss.token_stats(x, y), **o),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name}: token_axis_name needs types that") as told:
            of_tokens(partial(call, token_axis_name="t"), x, h, y)
        text = str(told.value)
        assert "keep shard_map's check_vma=True, or leave token_axis_name out" in text
        assert "pmap" in text
        assert "must be split" not in text
        assert f"psum({name}" in text or "reduction='sum'" in text
    for name, call in {
        "cross_entropy": lambda x, h, y: jaxloss.cross_entropy(x, y, vocab_axis_name="t"),
        "token_stats": lambda x, h, y: jaxloss.token_stats(x, y, vocab_axis_name="t"),
        "linear_token_stats": lambda x, h, y: jaxloss.linear_token_stats(
            h, k, y, vocab_axis_name="t"
        ),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: vocab_axis_name needs types that.*True"):
            of_tokens(call, x, h, y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("of_tokens", [pmapped, mapped_without_types])
def test_what_is_offered_where_no_type_says_what_is_split(of_tokens, linear):
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.normal(size=(8, 4, 2)), jnp.float32)
    k = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 3, (8, 4)), jnp.int32).at[2].set(-100).at[5, 1:].set(-100)

    def loss(k, h, y, **options):
        if linear:
            return jaxloss.linear_cross_entropy(h, k, y, **options)
        return jaxloss.cross_entropy(h @ k, y, **options)

    def local(h, y):
        total = jax.lax.psum(jaxloss.total_weight(y), "t")
        found = jax.value_and_grad(lambda k: loss(k, h, y, reduction="sum") / total)(k)
        return jax.lax.psum(found, "t")

    value, gradient = jax.value_and_grad(loss)(k, h, y)
    values, gradients = of_tokens(local, h, y)
    for d in range(8):
        np.testing.assert_allclose(values[d], value, rtol=1e-6)
        np.testing.assert_allclose(gradients[d], gradient, rtol=1e-5, atol=1e-7)


def test_an_axis_of_vmap_is_told_to_be_left_out():
    x, y = np.zeros((2, 4, 3), np.float32), np.zeros((2, 4), np.int32)

    def call(x, y):
        return jaxloss.cross_entropy(x, y, token_axis_name="t")

    with pytest.raises(
        ValueError,
        match=r"'t', outside of shard_map, without a mesh\. Of vmap or pmap: leave token",
    ):
        jax.vmap(call, axis_name="t")(x, y)


def test_errors_of_labels_that_differ_within_a_row():
    def local(x, y):
        y += jax.lax.axis_index("v")
        return jaxloss.cross_entropy(x, y, vocab_axis_name="v")

    with pytest.raises(ValueError, match="labels must be the same on all devices along vocab_axis"):
        in_shard_map(local, *XY)


def test_errors_outside_of_shard_map():
    given, y, *_ = problem(jnp.float32)
    with pytest.raises(ValueError, match=r"'t', outside of shard_map, .* Set the mesh"):
        jaxloss.cross_entropy(given["x"], y, token_axis_name="t")


def test_errors_of_total_weight_and_num_classes():
    given, y, w, _ = problem(jnp.float32)
    with pytest.raises(ValueError, match=r"total_weight: where must have the shape of the losses"):
        jaxloss.total_weight(y, where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"total_weight: sample_weight must have .*\(16,\)"):
        jaxloss.total_weight(y, sample_weight=jnp.ones((16, 1)))
    with pytest.raises(TypeError, match=r"total_weight: labels must be class indices .* or class"):
        jaxloss.total_weight(jnp.zeros(3, bool))
    with pytest.raises(ValueError, match=r"total_weight: weight must have one entry a class, \(3,"):
        jaxloss.total_weight(jnp.zeros((4, 3)), weight=jnp.ones(7))
    with pytest.raises(ValueError, match=r"total_weight: weight must have one entry a class, \(2,"):
        jaxloss.total_weight(jnp.zeros(4, jnp.int32), weight=jnp.ones((2, 2)))
    with pytest.raises(ValueError, match=r"num_classes must be in \[0, 32\]; got 33"):
        jaxloss.cross_entropy(given["x"], y, num_classes=33)
    with pytest.raises(ValueError, match=r"weight must have one entry a class, \(30,\)"):
        jaxloss.cross_entropy(given["x"], y, num_classes=30, weight=w)


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("labels", ["indices", "probabilities"])
@pytest.mark.parametrize("axis", [1, 0])
def test_padding_never_enters_the_sum(labels, axis):
    given, y, w, s = problem(jnp.float32, labels)
    x = given["x"].at[:, C:].set(jnp.nan)
    options = {"weight": w, "sample_weight": s, "label_smoothing": 0.1, "axis": axis}

    def turned(a):
        return a if axis == 1 or a.ndim == 1 else a.T

    def run(x, y, **more):
        f = lambda x: jaxloss.cross_entropy(turned(x), turned(y), **options, **more)  # noqa: E731
        return jit_quickly(jax.value_and_grad(f))(x)

    loss, grad = run(x, y, num_classes=C)
    expected, slope = run(x[:, :C], y[:, :C] if y.ndim == 2 else y)
    assert_close((loss, grad[:, :C]), (expected, slope))
    assert np.all(grad[:, C:] == 0)
    assert np.isnan(jaxloss.cross_entropy(given["x"][0], jnp.int32(C), num_classes=C))


def test_errors_of_explicit_shardings():
    mesh, *_ = build("2x4", AxisType.Explicit)
    given, y, *_ = problem(jnp.float32)

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    h = jnp.pad(given["h"], ((0, 0), (0, 2)))
    k = jnp.pad(given["k"], ((0, 2), (0, 0)))
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match="hidden must not be sharded in its last axis"):
            jaxloss.linear_cross_entropy(put(h, None, "v"), put(k), put(y))
        with pytest.raises(ValueError, match="the kernel's features may be sharded over axes that"):
            jaxloss.linear_cross_entropy(put(h, "t"), put(k, "v"), put(y, "t"))
        each = partial(jaxloss.cross_entropy, reduction="none")
        with pytest.raises(ValueError, match="linear_loss: the kernel's columns must not be split"):
            jaxloss.linear_loss(each, put(h, "t"), put(k, None, "v"), put(y, "t"))


@pytest.mark.parametrize(
    "loss",
    [
        jaxloss.cross_entropy,
        lambda x, y: jaxloss.cross_entropy(x, jax.nn.softmax(2 * x)),
        lambda x, y: jaxloss.kl_divergence(x, 2 * x),
    ],
    ids=["labels", "probabilities", "divergence"],
)
def test_vmap_over_an_axis_that_an_explicit_mesh_splits(loss):
    """What is the same in the whole batch, as a divisor may be, is not split there."""
    x = jax.random.normal(jax.random.key(0), (8, 4, 5))
    y = jax.random.randint(jax.random.key(1), (8, 4), 0, 5)
    grad = jax.grad(loss)

    def both(x, y):
        return loss(x, y), jax.jvp(lambda x: grad(x, y), (x,), (x,))

    expected = jax.vmap(both)(x, y)
    mesh = jax.make_mesh((8,), ("t",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        got = jax.vmap(both)(*jax.device_put((x, y), NamedSharding(mesh, P("t"))))
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(jax.device_get(g), e, rtol=1e-5, atol=1e-6)
