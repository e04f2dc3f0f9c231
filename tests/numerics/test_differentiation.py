"""Every transformation of every differentiable argument, against plain jnp that JAX differentiates.

In float64, where both are good to 1e-12: what differs is a rule, and not its rounding. Compiling
is nearly all of the time, and by far the cheapest in few large programs: one holds every transform.
"""

import itertools
import sys
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms import SCHEDULES, two_steps
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle.plain import cross_entropy as plain
from oracle.programs import jit_quickly

import jaxloss
from jaxloss._xla import derivatives, device

N, C = 4, 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, C)) * np.array([[0.1], [1], [4], [1]])
Y = np.array([0, 3, 2, -100], np.int32)
Q = RNG.dirichlet(np.ones(C), N)
W = np.array([0.02, 1.0, 0.5, 3.0, 1.0])
S = np.array([1.0, 0.01, 5.0, 1.0])


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def linear(x, labels, **options):
    kernel = jnp.eye(C, dtype=x.dtype)
    return jaxloss.linear_cross_entropy(x, kernel, labels, chunk_size=3, **options)


def weights(x, w, s, loss, **options):
    return loss(x, Y, weight=w, sample_weight=s, label_smoothing=0.1, z_loss=0.01, **options)


CASES = {
    "mean": (jaxloss.cross_entropy, lambda x, loss: loss(x, Y), (X,)),
    "softcap": (jaxloss.cross_entropy, lambda x, loss: loss(x, Y, logit_softcap=2.0), (X,)),
    "weights": (jaxloss.cross_entropy, weights, (X, W, S)),
    "weights none": (
        jaxloss.cross_entropy,
        lambda x, w, s, loss: weights(x, w, s, loss, reduction="none"),
        (X, W, S),
    ),
    "probabilities": (
        jaxloss.cross_entropy,
        lambda x, q, w, loss: loss(x, q, weight=w, label_smoothing=0.2, z_loss=0.1),
        (X, Q, W),
    ),
    "probabilities none": (
        jaxloss.cross_entropy,
        lambda x, q, loss: loss(x, q, reduction="none"),
        (X, Q),
    ),
    "two steps": (two_steps, lambda x, w, loss: loss(x, Y, weight=w), (X, W)),
    "two steps probabilities": (two_steps, lambda x, q, loss: loss(x, q), (X, Q)),
    "linear": (linear, lambda x, loss: loss(x, Y, label_smoothing=0.1), (X,)),
    "log_softmax": (
        lambda x, _: jaxloss.log_softmax(x),
        lambda x, loss: jax.nn.log_softmax(x) if loss is plain else loss(x, None),
        (X,),
    ),
}


def directions(args, seed):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=np.shape(a))) for a in args)


def scalar(f):
    """The outputs as one number, each with its own share."""

    def g(*args):
        out = f(*args)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    return g


def everywhere(f, args):
    return jax.grad(scalar(f), argnums=tuple(range(len(args))))


def grad_of_jvp(f, args):
    v = directions(args, 1)
    return everywhere(lambda *a: jax.jvp(f, a, v)[1], args)(*args)


def grad_of_grad(f, args):
    v = directions(args, 2)

    def slope(*a):
        return sum(jnp.vdot(g, t) for g, t in zip(everywhere(f, args)(*a), v, strict=True))

    return everywhere(slope, args)(*args)


TRANSFORMS = {
    "grad": lambda f, a: everywhere(f, a)(*a),
    "jit grad": lambda f, a: jax.jit(everywhere(f, a))(*a),
    "jvp": lambda f, a: jax.jvp(f, a, directions(a, 3)),
    "jvp in one": lambda f, a: jax.jvp(lambda x: f(x, *a[1:]), a[:1], directions(a[:1], 3)),
    "linearize": lambda f, a: jax.linearize(f, *a)[1](*directions(a, 4)),
    "linear_transpose": lambda f, a: jax.linear_transpose(jax.linearize(f, *a)[1], *a)(f(*a)),
    "jvp of grad": lambda f, a: jax.jvp(everywhere(f, a), a, directions(a, 5)),
    "jvp of jvp": lambda f, a: jax.jvp(
        lambda *b: jax.jvp(f, b, directions(a, 6)), a, directions(a, 7)
    ),
    "jvp of tangents": lambda f, a: jax.jvp(
        lambda *v: jax.jvp(f, a, v), directions(a, 9), directions(a, 10)
    ),
    "grad of grad": grad_of_grad,
    "grad of jvp": grad_of_jvp,
    "hessian": lambda f, a: jax.hessian(scalar(f), argnums=tuple(range(len(a))))(*a),
    "jacfwd": lambda f, a: jax.jacfwd(f, argnums=tuple(range(len(a))))(*a),
    "jacrev": lambda f, a: jax.jit(jax.jacrev(f, argnums=tuple(range(len(a)))))(*a),
    "checkpoint": lambda f, a: everywhere(jax.checkpoint(f), a)(*a),
    "checkpoint jvp": lambda f, a: jax.jvp(jax.checkpoint(f), a, directions(a, 3)),
    "third order": lambda f, a: everywhere(
        lambda *b: jax.jvp(everywhere(f, a), b, directions(a, 8))[1][0], a
    )(*a),
}


def check(got, expected):
    chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-10)


def every_transform(f, args, names):
    return {name: TRANSFORMS[name](f, args) for name in names}


def check_together(ours, expected, args, names=tuple(TRANSFORMS)):
    def both(*args):
        return every_transform(ours, args, names), every_transform(expected, args, names)

    check(*jit_quickly(both)(*map(jnp.asarray, args)))


@pytest.mark.parametrize("case", CASES)
def test_transforms(case):
    loss, call, args = CASES[case]
    check_together(partial(call, loss=loss), partial(call, loss=plain), args)


# Each transform once and each case at least once: under jit they have met one another above.
@pytest.mark.parametrize(
    ("case", "transform"),
    [(list(CASES)[i % len(CASES)], transform) for i, transform in enumerate(TRANSFORMS)],
)
def test_transforms_eagerly(case, transform):
    loss, call, args = CASES[case]
    args = tuple(map(jnp.asarray, args))
    ours = TRANSFORMS[transform](partial(call, loss=loss), args)
    check(ours, jit_quickly(partial(TRANSFORMS[transform], partial(call, loss=plain)))(args))


STATISTICS = {
    "logits": lambda x: jaxloss.cross_entropy(x, Y, reduction="none", return_stats=True)[1],
    "checkpoint": jax.checkpoint(lambda x: jaxloss.token_stats(x, Y)),
    "product": lambda x: jaxloss.linear_token_stats(x, jnp.eye(C, dtype=x.dtype), Y),
}


@pytest.mark.parametrize("name", ["log_prob", "logsumexp", "entropy"])
@pytest.mark.parametrize("stats", STATISTICS)
def test_statistics(stats, name):
    # Squared: a second derivative then takes that of the number itself too, beside its slope's.
    def ours(x):
        return getattr(STATISTICS[stats](x), name) ** 2

    def expected(x):
        log_p = jax.nn.log_softmax(x)
        label = jnp.take_along_axis(log_p, jnp.maximum(Y, 0)[:, None], axis=-1)[:, 0]
        values = {
            "log_prob": label,
            "logsumexp": jax.nn.logsumexp(x, axis=-1),
            "entropy": -jnp.sum(jnp.exp(log_p) * log_p, axis=-1),
        }
        return jnp.where(Y >= 0, values[name], 0) ** 2

    check_together(ours, expected, (X,), ("grad", "jvp", "hessian", "grad of grad"))


@pytest.mark.parametrize("f", [jaxloss.cross_entropy, linear])
def test_second_derivatives_of_narrow_logits(f):
    """The conversions have rules of their own."""
    x, v = (jnp.asarray(RNG.normal(size=(N, C)), jnp.bfloat16) for _ in range(2))

    def product(x, v):
        return jax.jvp(jax.grad(lambda x: f(x, Y)), (x,), (v,))[1]

    narrow, wide = jax.jit(lambda *a: (product(*a), product(*(b.astype(float) for b in a))))(x, v)
    assert narrow.dtype == jnp.bfloat16
    chex.assert_trees_all_close(narrow.astype(float), wide, rtol=2**-7, atol=2**-9)


def test_second_derivatives_by_one_operand_alone(schedule, monkeypatch):
    """On one device XLA:CPU fuses sums of products, and takes a constant for the whole operand."""
    monkeypatch.setattr(device, "on_one_device", lambda: True)
    h = jnp.sin(jnp.arange(256.0)).reshape(16, 16)
    k = jnp.cos(jnp.arange(16 * 512.0)).reshape(16, 512)

    def moved(loss):
        def each(h, k):
            return loss(h, k, jnp.arange(16), reduction="none")

        def slope(h):
            return jax.grad(lambda h: jnp.sum(jnp.sin(each(h, k))))(h)

        def along(t):
            return jax.jvp(each, (h, k), (t, jnp.sin(k)))[1]

        return [jax.jvp(f, (h,), (jnp.cos(h),))[1] for f in (slope, along)]

    def of_logits(h, k, y, reduction):
        return jaxloss.cross_entropy(h @ k, y, reduction=reduction)

    got = moved(partial(jaxloss.linear_cross_entropy, implementation=schedule))
    for a, b in zip(got, moved(of_logits), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.max(np.abs(b)))


def test_masked_classes():
    mask = jnp.arange(C)[None] != 1

    def expected(x):
        return jax.nn.log_softmax(jnp.where(mask, x, -1e9))[0]

    def ours(x):
        return jaxloss.log_softmax(x, where=mask)[0]

    def of_existing(f):
        return lambda x: jnp.where(mask[0], f(x), 0)

    names = ("grad", "jvp", "hessian")
    check_together(of_existing(ours), of_existing(expected), (X,), names)


@pytest.mark.parametrize("how", ["where", "top k", "num_classes", "blocks of 1 and 2"])
def test_second_derivatives_are_symmetric_where_a_class_does_not_exist(how):
    """Its probability is 0, and moves neither the loss nor the logits' gradient."""
    x, q = jnp.array([0.3, -1, 2], jnp.float64), jnp.array([0.6, 0.4, 0], jnp.float64)
    mask = jnp.array([True, True, False])

    def loss(x, q):
        if how == "num_classes":
            return jaxloss.cross_entropy(x, q, num_classes=2)
        if how == "top k":
            return jaxloss.cross_entropy(x, jaxloss.TopKLabels(jnp.arange(3), q), where=mask)
        if how == "where":
            return jaxloss.cross_entropy(x, q, where=mask)
        ones, x, q = jnp.ones((2, 1), x.dtype), x[::-1], jnp.stack([q[::-1]] * 2)
        return jaxloss.linear_cross_entropy(
            ones, x[None], q, where=mask[::-1], implementation="vocab_blocks", chunk_size=2
        )

    one_way = jax.jacrev(jax.grad(loss, 0), 1)(x, q)
    p = jax.nn.softmax(x[:2])
    np.testing.assert_allclose(one_way[:2, :2], p[:, None] - jnp.eye(2), rtol=1e-12)
    np.testing.assert_array_equal(one_way[:, 2], 0)
    np.testing.assert_allclose(jax.jacrev(jax.grad(loss, 1), 0)(x, q).T, one_way, rtol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weight_of_zero_has_its_gradient(reduction, smoothing):
    """A class weight of 0 is a weight like any other, and not a token that does not count."""
    w = jnp.asarray(W).at[3].set(0.0)

    def total(w, loss):
        x = jnp.asarray(X)
        return jnp.sum(loss(x, Y, weight=w, label_smoothing=smoothing, reduction=reduction))

    check(jax.grad(total)(w, jaxloss.cross_entropy), jax.grad(total)(w, plain))


# Batching

AXES = [(0, None), (0, 0), (None, 0), (1, 0), (2, 1), (-1, None)]


KINDS = {
    "value": lambda f: f,
    "grad": jax.grad,
    "jvp": lambda f: lambda x, y: jax.jvp(lambda x: f(x, y), (x,), (jnp.sin(x),)),
    "hessian": jax.hessian,
}


def test_reverse_over_reverse_of_statistics_beside_smoothed_labels():
    """Soft targets whose loss has no cotangent: it is the log-probability's alone."""

    def entropy(x):
        options = {"label_smoothing": 1.0, "reduction": "none", "return_stats": True}
        return jnp.sum(jaxloss.cross_entropy(x, jnp.asarray(Y), **options)[1].entropy)

    def expected(x):
        p = jax.nn.softmax(x)
        return -jnp.sum(jnp.where(Y[:, None] == -100, 0, p * jax.nn.log_softmax(x)))

    check_together(entropy, expected, (X,), ("grad", "grad of grad", "jvp of grad"))


LOSSES_OF_TOKENS = {
    "cross_entropy": jaxloss.cross_entropy,
    "probabilities": lambda x, labels, **options: jaxloss.cross_entropy(
        x, jax.nn.one_hot(labels, C, dtype=x.dtype), **options
    ),
    "top k": lambda x, labels, **options: jaxloss.cross_entropy(
        x, jaxloss.TopKLabels(labels[:, None], jnp.ones((N, 1), x.dtype), "bucket"), **options
    ),
    "two steps": lambda x, labels, **options: two_steps(x, labels, **options),
    "focal_loss": partial(jaxloss.focal_loss, gamma=0),
    "token_stats": lambda x, labels, **_: -jaxloss.token_stats(x, labels).log_prob,
    "kl_divergence": lambda x, labels, **options: jaxloss.kl_divergence(
        x, jnp.where(jax.nn.one_hot(labels, C, dtype=bool), 0.0, -jnp.inf), **options
    ),
    **{how: partial(linear, implementation=how) for how in SCHEDULES},
}


@pytest.mark.parametrize("name", LOSSES_OF_TOKENS)
def test_losses_weighed_by_0_have_mixed_derivatives(name):
    """What learns to weigh examples starts at weights of 0, and looks at how the gradient moves."""
    x, y, weight = jnp.asarray(X), jnp.asarray(Y % C), jnp.array([0.0, 1, 0, 2])

    def losses(x):
        return LOSSES_OF_TOKENS[name](x, labels=y, reduction="none")

    def expected(x):
        return -jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], axis=-1)[:, 0]

    def both_ways(losses):
        def slope(weight):
            return jax.grad(lambda x: jnp.vdot(weight, losses(x)))(x)

        return jax.jacfwd(slope)(weight), jax.jacrev(slope)(weight)

    got, want = jax.jit(lambda: (both_ways(losses), both_ways(expected)))()
    check(got, want)


def every_kind(x, y):
    def f(x, y):
        return jaxloss.cross_entropy(x, y, ignore_index=-1, z_loss=0.1)

    return {name: kind(f)(x, y) for name, kind in KINDS.items()}


@cache
def one_of_the_batch():
    return jit_quickly(every_kind)


@pytest.mark.parametrize(
    ("in_axes", "jitted"), [*((axes, True) for axes in AXES), ((2, 1), False), ((None, 0), False)]
)
def test_vmap(in_axes, jitted):
    rng = np.random.default_rng(1)
    b = 3
    x = jnp.asarray(rng.normal(size=(b, N, C)))
    y = jnp.asarray(rng.integers(-1, C, (b, N)), jnp.int32)
    expected = [
        one_of_the_batch()(x[0 if in_axes[0] is None else i], y[0 if in_axes[1] is None else i])
        for i in range(b)
    ]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *expected)
    args = [
        v[0] if axis is None else jnp.moveaxis(v, 0, axis)
        for v, axis in zip((x, y), in_axes, strict=True)
    ]
    batched = jax.vmap(every_kind, in_axes)
    check((jit_quickly(batched) if jitted else batched)(*args), stacked)


def test_transformations_of_vmap():
    x = jnp.asarray(X)

    def rows(x):
        return jax.vmap(lambda x, y: jaxloss.cross_entropy(x, y, z_loss=0.1))(x, jnp.asarray(Y % C))

    def expected(x):
        return plain(x, jnp.asarray(Y % C), z_loss=0.1, reduction="none")

    names = ("grad", "jvp", "grad of jvp", "hessian", "jacfwd", "linear_transpose")
    check_together(rows, expected, (x,), names)
    nested = jax.vmap(jax.vmap(jax.grad(jaxloss.cross_entropy)))(x[None], jnp.asarray(Y[None] % C))
    check(nested[0], jax.vmap(jax.grad(plain))(x, jnp.asarray(Y % C)))


def test_scan():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, N, C)))

    def ours(x, loss=jaxloss.cross_entropy):
        return jax.lax.scan(lambda total, x: (total + loss(x * (1 + total), Y), None), 0.0, x)[0]

    def expected(x):
        return ours(x, plain)

    check_together(ours, expected, (x,), ("grad", "jvp", "jvp of grad", "checkpoint"))


def test_other_control_flow():
    x = jnp.asarray(X)

    def ours(x, loss=jaxloss.cross_entropy):
        looped = jax.lax.fori_loop(0, 3, lambda _, x: x - jax.grad(loss)(x, Y), x)
        return jax.lax.cond(x[0, 0] > -9, lambda x: loss(x, Y), lambda x: 0.0 * x[0, 0], looped)

    def expected(x):
        return ours(x, plain)

    check_together(ours, expected, (x,), ("grad", "jvp"))


# Meshes


def batch(n=16):
    rng = np.random.default_rng(3)
    y = rng.integers(0, C, n)
    y[::5] = -100
    return jnp.asarray(rng.normal(size=(n, C))), jnp.asarray(y, jnp.int32)


SHARDED = ("grad", "jvp", "jvp of grad", "grad of jvp", "linearize")


@cache
def in_shard_map():
    """(function of x, what every transform of it is in plain jnp)"""
    x, y = batch()
    mesh = jax.make_mesh((8,), ("t",), axis_types=(AxisType.Auto,))
    losses = jax.shard_map(
        lambda x, y: jaxloss.cross_entropy(x, y, reduction="none", z_loss=0.1),
        mesh=mesh,
        in_specs=(P("t"), P("t")),
        out_specs=P("t"),
    )
    expected = partial(every_transform, lambda x: plain(x, y, reduction="none", z_loss=0.1))
    return lambda x: losses(x, y), jit_quickly(partial(expected, names=SHARDED))((x,))


@pytest.mark.parametrize("transform", SHARDED)
def test_shard_map_eagerly(transform):
    losses, expected = in_shard_map()
    check(TRANSFORMS[transform](losses, (batch()[0],)), expected[transform])


def test_shard_map_under_jit():
    losses, expected = in_shard_map()
    program = jit_quickly(partial(every_transform, losses, names=SHARDED))
    check(program((batch()[0],)), expected)


def test_gradients_inside_shard_map():
    x, y = batch()
    mesh = jax.make_mesh((8,), ("t",), axis_types=(AxisType.Auto,))

    def local(x, y, q):
        total = jaxloss.cross_entropy(x, y, reduction="sum")
        value = jax.lax.psum(total, "t")
        grad = jax.grad(lambda x: jaxloss.cross_entropy(x, y, reduction="sum"))(x)
        tangent = jax.jvp(lambda x: jaxloss.log_softmax(x), (x,), (q,))[1]
        return value, grad, tangent

    q = jnp.sin(x)
    specs = (P(), P("t"), P("t"))
    got = jit_quickly(jax.shard_map(local, mesh=mesh, in_specs=P("t"), out_specs=specs))(x, y, q)
    expected = jax.value_and_grad(lambda x: plain(x, y, reduction="sum"))(x)
    check(got, (*expected, jax.jvp(jax.nn.log_softmax, (x,), (q,))[1]))


SPECS = [P("t"), P(None, "t"), P("t", "u"), P(("t", "u"))]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_sharded_logits(spec, kind):
    n, c = 16, 8
    rng = np.random.default_rng(4)
    x = rng.normal(size=(n, c)) * 3
    y, q = rng.integers(0, c, n).astype(np.int32), rng.dirichlet(np.ones(c), n)
    y[::5] = -100
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("t", "u"), axis_types=(axis_type,) * 2)
    rows = P(*spec[:1])

    def put(v, spec):
        return jax.device_put(v, NamedSharding(mesh, spec))

    losses = {
        "labels": lambda x, y, q: jaxloss.cross_entropy(x, y),
        "probabilities": lambda x, y, q: jaxloss.cross_entropy(x, q),
        "log_softmax": lambda x, y, q: jnp.sum(jaxloss.log_softmax(x) * q),
        "two steps": lambda x, y, q: jaxloss.nll_loss(jaxloss.log_softmax(x), y),
    }
    expected = {
        "labels": lambda x, y, q: plain(x, y),
        "probabilities": lambda x, y, q: plain(x, q),
        "log_softmax": lambda x, y, q: jnp.sum(jax.nn.log_softmax(x) * q),
    }
    expected["two steps"] = expected["labels"]

    def every_loss(functions):
        def both(f, x, dx, y, q):
            return jax.value_and_grad(f)(x, y, q), jax.jvp(partial(f, y=y, q=q), (x,), (dx,))[1]

        return jit_quickly(lambda *args: {name: both(f, *args) for name, f in functions.items()})

    want = every_loss(expected)(x, np.sin(x), y, q)
    with jax.set_mesh(mesh):
        args = put(x, spec), put(np.sin(x), spec), put(y, rows), put(q, spec)
        got = every_loss(losses)(*args)
    for name in losses:
        assert got[name][0][1].sharding.is_equivalent_to(args[0].sharding, 2)
    check(jax.device_get(got), jax.device_get(want))


# Tracing


def test_traced_once():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def f(x, y):
        return jax.value_and_grad(jaxloss.cross_entropy)(x, y)

    y = jnp.asarray(Y)
    for scale in (1.0, 2.0, 3.0):
        f(jnp.asarray(X) * scale, y)


def test_options_are_static_under_jit():
    f = jax.jit(jaxloss.cross_entropy, static_argnames=("label_smoothing", "reduction"))
    got = f(jnp.asarray(X), jnp.asarray(Y), label_smoothing=0.1, reduction="sum")
    check(got, plain(jnp.asarray(X), Y, label_smoothing=0.1, reduction="sum"))


# A JAX without the internals that forward mode is made of


@pytest.fixture
def no_forward_mode(monkeypatch):
    def forget():
        jax.clear_caches()
        derivatives._internals.cache_clear()
        derivatives._tangent_map.cache_clear()

    forget()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "jax.extend.core", None)
        yield
    forget()


@pytest.mark.parametrize("case", ["mean", "weights", "probabilities", "two steps", "log_softmax"])
def test_reverse_mode_does_without(no_forward_mode, case):
    loss, call, args = CASES[case]
    args = tuple(map(jnp.asarray, args))
    names = ("grad", "jit grad", "jacrev", "checkpoint")
    check_together(partial(call, loss=loss), partial(call, loss=plain), args, names)
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(lambda *a: call(*a, loss=loss), args, args)


def some_batched():
    """Losses of which one argument is batched and the others, the logits among them, are shared."""
    rng = np.random.default_rng(0)
    h, k = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 2), (2, 4)))
    q = jnp.asarray(rng.dirichlet(np.ones(4), (2, 3)), jnp.float32)
    index = jnp.asarray(np.argsort(rng.normal(size=(3, 4)), -1)[:, :2], jnp.int32)
    y, w = jnp.array([0, 1, 3]), jnp.asarray(rng.random((2, 4)) + 0.5, jnp.float32)
    mask = jnp.asarray(rng.random((2, 3, 4)) < 0.7).at[:, jnp.arange(3), y].set(True)

    def dense(form):
        return lambda h, k, q: form(h, k, q, z_loss=0.1)

    def stats(form):
        return lambda h, k, q: form(h, k, q, return_stats=True, reduction="none")

    def weights(form):
        return lambda h, k, w: form(h, k, y, weight=w, label_smoothing=0.1, z_loss=0.1)

    def top(form):
        return lambda h, k, p: form(
            h, k, jaxloss.TopKLabels(index, p), z_loss=0.1, return_stats=True, reduction="none"
        )

    def masks(form):
        return lambda h, k, m: form(h, k, y, where=m, return_stats=True, reduction="none")

    kinds = {
        "probabilities": (dense, q),
        "statistics of probabilities": (stats, q),
        "class weights": (weights, w),
        "top k": (top, q[..., :2]),
        "where": (masks, mask),
    }
    forms = {
        "logits": lambda h, k, y, **options: jaxloss.cross_entropy(h @ k, y, **options),
        "token_chunks": partial(
            jaxloss.linear_cross_entropy, implementation="token_chunks", chunk_size=2
        ),
        "vocab_blocks": partial(
            jaxloss.linear_cross_entropy, implementation="vocab_blocks", chunk_size=3
        ),
    }
    for (kind, (make, batch)), (name, form) in itertools.product(kinds.items(), forms.items()):
        yield pytest.param(make(form), h, k, batch, id=f"{name}, {kind}")


@pytest.mark.parametrize(("loss", "h", "k", "batch"), list(some_batched()))
def test_vmap_over_labels_or_weights_of_shared_logits(loss, h, k, batch):
    """An output that does not depend on what is batched had no batch axis, and its tangent had."""

    def one(h, k, some):
        leaves = jax.tree.leaves(loss(h, k, some))
        return sum(jnp.sum(jnp.sin(v)) for v in leaves if jnp.issubdtype(v.dtype, jnp.floating))

    def batched(h, k):
        return jnp.sum(jax.vmap(one, (None, None, 0))(h, k, batch))

    def looped(h, k):
        return one(h, k, batch[0]) + one(h, k, batch[1])

    @jit_quickly
    def run(h, k):
        def both(f):
            grad = jax.grad(f, (0, 1))
            return grad(h, k), jax.jvp(grad, (h, k), (h, k))[1]

        return both(batched), both(looped)

    got, expected = run(h, k)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)
