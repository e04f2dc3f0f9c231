"""Every transformation of every differentiable argument, against plain jnp that JAX differentiates.

In float64, where both are good to 1e-12: what differs is a rule, and not its rounding.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import plain
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxloss
from jaxloss import _forward_mode

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


def two_steps(x, y, **options):
    return jaxloss.nll_loss(jaxloss.log_softmax(x), y, **options)


def linear(x, y, **options):
    return jaxloss.linear_cross_entropy(x, jnp.eye(C, dtype=x.dtype), y, chunk_size=3, **options)


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


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES)
def test_transforms(case, transform):
    loss, call, args = CASES[case]
    args = tuple(map(jnp.asarray, args))
    ours = TRANSFORMS[transform](lambda *a: call(*a, loss=loss), args)
    expected = TRANSFORMS[transform](lambda *a: call(*a, loss=plain), args)
    check(ours, expected)


@pytest.mark.parametrize("name", ["log_prob", "logsumexp", "entropy"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian"])
def test_statistics(name, transform):
    def ours(x):
        stats = jaxloss.cross_entropy(x, Y, reduction="none", return_stats=True)[1]
        return getattr(stats, name)

    def expected(x):
        log_p = jax.nn.log_softmax(x)
        label = jnp.take_along_axis(log_p, jnp.maximum(Y, 0)[:, None], axis=-1)[:, 0]
        values = {
            "log_prob": label,
            "logsumexp": jax.nn.logsumexp(x, axis=-1),
            "entropy": -jnp.sum(jnp.exp(log_p) * log_p, axis=-1),
        }
        return jnp.where(Y >= 0, values[name], 0)

    args = (jnp.asarray(X),)
    check(TRANSFORMS[transform](ours, args), TRANSFORMS[transform](expected, args))


@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian"])
def test_masked_classes(transform):
    mask = jnp.arange(C)[None] != 1

    def expected(x):
        return jax.nn.log_softmax(jnp.where(mask, x, -1e9))[0]

    def ours(x):
        return jaxloss.log_softmax(x, where=mask)[0]

    def of_existing(f):
        return TRANSFORMS[transform](lambda x: jnp.where(mask[0], f(x), 0), (jnp.asarray(X),))

    check(of_existing(ours), of_existing(expected))


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


@pytest.mark.parametrize("in_axes", AXES)
@pytest.mark.parametrize("kind", ["value", "grad", "jvp", "hessian"])
def test_vmap(in_axes, kind):
    rng = np.random.default_rng(1)
    b = 3
    x = jnp.asarray(rng.normal(size=(b, N, C)))
    y = jnp.asarray(rng.integers(-1, C, (b, N)), jnp.int32)
    functions = {
        "value": lambda f: f,
        "grad": jax.grad,
        "jvp": lambda f: lambda x, y: jax.jvp(lambda x: f(x, y), (x,), (jnp.sin(x),)),
        "hessian": jax.hessian,
    }
    f = functions[kind](lambda x, y: jaxloss.cross_entropy(x, y, ignore_index=-1, z_loss=0.1))
    expected = [
        f(x[0 if in_axes[0] is None else i], y[0 if in_axes[1] is None else i]) for i in range(b)
    ]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *expected)
    args = [
        v[0] if axis is None else jnp.moveaxis(v, 0, axis)
        for v, axis in zip((x, y), in_axes, strict=True)
    ]
    check(jax.vmap(f, in_axes)(*args), stacked)
    check(jax.jit(jax.vmap(f, in_axes))(*args), stacked)


def test_transformations_of_vmap():
    x = jnp.asarray(X)

    def rows(x):
        return jax.vmap(lambda x, y: jaxloss.cross_entropy(x, y, z_loss=0.1))(x, jnp.asarray(Y % C))

    def expected(x):
        return plain(x, jnp.asarray(Y % C), z_loss=0.1, reduction="none")

    for name in ("grad", "jvp", "grad of jvp", "hessian", "jacfwd", "linear_transpose"):
        check(TRANSFORMS[name](rows, (x,)), TRANSFORMS[name](expected, (x,)))
    nested = jax.vmap(jax.vmap(jax.grad(jaxloss.cross_entropy)))(x[None], jnp.asarray(Y[None] % C))
    check(nested[0], jax.vmap(jax.grad(plain))(x, jnp.asarray(Y % C)))


def test_scan():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, N, C)))

    def ours(x, loss=jaxloss.cross_entropy):
        return jax.lax.scan(lambda total, x: (total + loss(x * (1 + total), Y), None), 0.0, x)[0]

    def expected(x):
        return ours(x, plain)

    for name in ("grad", "jvp", "jvp of grad", "checkpoint"):
        check(TRANSFORMS[name](ours, (x,)), TRANSFORMS[name](expected, (x,)))


def test_other_control_flow():
    x = jnp.asarray(X)

    def ours(x, loss=jaxloss.cross_entropy):
        looped = jax.lax.fori_loop(0, 3, lambda _, x: x - jax.grad(loss)(x, Y), x)
        return jax.lax.cond(x[0, 0] > -9, lambda x: loss(x, Y), lambda x: 0.0 * x[0, 0], looped)

    def expected(x):
        return ours(x, plain)

    for name in ("grad", "jvp"):
        check(TRANSFORMS[name](ours, (x,)), TRANSFORMS[name](expected, (x,)))


# Meshes


def batch(n=16):
    rng = np.random.default_rng(3)
    y = rng.integers(0, C, n)
    y[::5] = -100
    return jnp.asarray(rng.normal(size=(n, C))), jnp.asarray(y, jnp.int32)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "jvp of grad", "grad of jvp", "linearize"])
def test_shard_map(transform, jitted):
    x, y = batch()
    mesh = jax.make_mesh((8,), ("t",), axis_types=(AxisType.Auto,))
    losses = jax.shard_map(
        lambda x, y: jaxloss.cross_entropy(x, y, reduction="none", z_loss=0.1),
        mesh=mesh,
        in_specs=(P("t"), P("t")),
        out_specs=P("t"),
    )

    def run(f):
        return TRANSFORMS[transform](lambda x: f(x, y), (x,))

    ours = jax.jit(lambda: run(losses))() if jitted else run(losses)
    check(ours, run(lambda x, y: plain(x, y, reduction="none", z_loss=0.1)))


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
    got = jax.shard_map(local, mesh=mesh, in_specs=P("t"), out_specs=specs)(x, y, q)
    expected = jax.value_and_grad(lambda x: plain(x, y, reduction="sum"))(x)
    check(got, (*expected, jax.jvp(jax.nn.log_softmax, (x,), (q,))[1]))


SPECS = [P("t"), P(None, "t"), P("t", "u"), P(("t", "u"))]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", ["explicit", "auto"])
@pytest.mark.parametrize("loss", ["labels", "probabilities", "log_softmax", "two steps"])
def test_sharded_logits(spec, kind, loss):
    n, c = 16, 8
    rng = np.random.default_rng(4)
    x = rng.normal(size=(n, c)) * 3
    y, q = rng.integers(0, c, n), rng.dirichlet(np.ones(c), n)
    y[::5] = -100
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("t", "u"), axis_types=(axis_type,) * 2)
    rows = P(*spec[:1])

    def put(v, spec):
        return jax.device_put(v, NamedSharding(mesh, spec))

    def f(x, y, q):
        if loss == "log_softmax":
            return jnp.sum(jaxloss.log_softmax(x) * q)
        if loss == "two steps":
            return jaxloss.nll_loss(jaxloss.log_softmax(x), y)
        return jaxloss.cross_entropy(x, q if loss == "probabilities" else y)

    def expected(x):
        if loss == "log_softmax":
            return jnp.sum(jax.nn.log_softmax(x) * q)
        return plain(x, jnp.asarray(q) if loss == "probabilities" else jnp.asarray(y))

    want = jax.value_and_grad(expected)(jnp.asarray(x))
    want_tangent = jax.jvp(expected, (jnp.asarray(x),), (jnp.asarray(np.sin(x)),))[1]
    with jax.set_mesh(mesh):
        args = put(x, spec), put(y, rows), put(q, spec)
        got = jax.jit(jax.value_and_grad(f))(*args)
        tangent = jax.jit(lambda x, dx, y, q: jax.jvp(lambda x: f(x, y, q), (x,), (dx,))[1])(
            args[0], put(np.sin(x), spec), *args[1:]
        )
    assert got[1].sharding.is_equivalent_to(args[0].sharding, 2)
    check(jax.device_get(got), jax.device_get(want))
    check(jax.device_get(tangent), jax.device_get(want_tangent))


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
    jax.clear_caches()
    monkeypatch.setattr(_forward_mode, "Primitive", None)
    yield
    jax.clear_caches()


@pytest.mark.parametrize("case", ["mean", "weights", "probabilities", "two steps", "log_softmax"])
def test_reverse_mode_does_without(no_forward_mode, case):
    loss, call, args = CASES[case]
    args = tuple(map(jnp.asarray, args))
    for name in ("grad", "jit grad", "jacrev", "checkpoint"):
        ours = TRANSFORMS[name](lambda *a: call(*a, loss=loss), args)
        check(ours, TRANSFORMS[name](lambda *a: call(*a, loss=plain), args))
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(lambda *a: call(*a, loss=loss), args, args)
