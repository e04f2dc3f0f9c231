"""Arguments that are split over an explicit mesh in different ways, or some of them alone."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle.programs import jit_quickly

import jaxloss
from parallel.test_mesh import assert_close

pytestmark = pytest.mark.jax_leaks("jit(grad(shard_map))")
N, D, V, T = 16, 8, 32, 8


@cache
def arrays():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, V, N)
    exists = rng.random((N, V)) < 0.8
    exists[np.arange(N), labels] = True
    q = np.where(exists, rng.random((N, V)), 0)
    labels[[3, 9, 10]] = -100
    floats = {
        "x": 3 * rng.normal(size=(N, V)),
        "teacher": 3 * rng.normal(size=(N, V)),
        "q": q / q.sum(-1, keepdims=True),
        "top_q": rng.random((N, 2)) / 2,
        "w": rng.random(V) + 0.1,
        "s": np.where(np.arange(N) == 5, 0, rng.random(N)),
        "s_each": rng.random((N, V)),
        "s_seq": rng.random((N, T)),
        "h": rng.normal(size=(N, D)),
        "k": rng.normal(size=(D, V)),
        "b": rng.normal(size=V),
    }
    others = {
        "y": labels,
        "yes": rng.integers(0, 2, (N, V)),
        "top": np.stack([rng.permutation(V)[:2] for _ in range(N)]),
        "tokens": rng.integers(0, V, (N, T)),
        "segments": np.sort(rng.integers(0, 3, (N, T)), axis=-1),
    }
    masks = {"exists": exists, "counts": rng.random(N) < 0.8}
    return (
        {name: jnp.asarray(a, jnp.float32) for name, a in floats.items()}
        | {name: jnp.asarray(a, jnp.int32) for name, a in others.items()}
        | {name: jnp.asarray(a) for name, a in masks.items()}
    )


def top(top, top_q, rest="uniform"):
    return jaxloss.TopKLabels(top, top_q, rest)


def flat(loss):
    """Of classes that are two axes."""

    def of(x, *args, **options):
        x, *args = (a.reshape(N, 4, 8) if a.ndim == 2 else a for a in (x, *args))
        return loss(x, *args, axis=(1, 2), **options)

    return of


def linear(h, k, y, b, s, **options):
    options = {"bias": b, "sample_weight": s, "chunk_size": 4} | options
    return jaxloss.linear_cross_entropy(h, k, y, **options)


def beside_stored(x, y, reference, **options):
    """Without the log-probability, which nobody stored."""
    stats, found = jaxloss.token_stats(x, y, reference=reference, **options)
    return stats, found[1:]


# Functions of arrays, and these by name: first what decides how all are split.
LOSSES = {
    "mean": (
        lambda x, y, w, s, m: jaxloss.cross_entropy(
            x, y, weight=w, sample_weight=s, where=m, label_smoothing=0.1, z_loss=0.1
        ),
        "x y w s exists",
    ),
    "none": (partial(jaxloss.cross_entropy, reduction="none", return_stats=True), "x y"),
    "probabilities": (
        lambda x, q, w, s, m: jaxloss.cross_entropy(x, q, weight=w, sample_weight=s, where=m),
        "x q w s exists",
    ),
    "top k": (
        lambda x, *y: jaxloss.cross_entropy(x, top(*y), reduction="none"),
        "x top top_q",
    ),
    "bucket": (lambda x, *y: jaxloss.token_stats(x, top(*y, "bucket")), "x top top_q"),
    "log_softmax": (
        lambda x, m: jnp.maximum(jaxloss.log_softmax(x, where=m), -50),
        "x exists",
    ),
    "nll_loss": (
        lambda x, y, w, s: jaxloss.nll_loss(x, y, weight=w, sample_weight=s),
        "x y w s",
    ),
    "focal_loss": (lambda x, y, w, m: jaxloss.focal_loss(x, y, weight=w, where=m), "x y w exists"),
    "temperatures": (
        lambda x, y, s, m: (
            jnp.maximum(jaxloss.log_softmax(x, temperature=1 + s * s, where=m), -50),
            jaxloss.focal_loss(x, y, temperature=1 + s * s, where=m, label_smoothing=0.1),
        ),
        "x y s exists",
    ),
    "reference": (
        lambda x, t, y, s: jaxloss.token_stats(x, y, reference=t, kl_temperature=1 + s * s),
        "x teacher y s",
    ),
    "stored reference": (
        lambda x, y, s, *q: beside_stored(x, y, top(*q, "bucket"), kl_temperature=1 + s * s),
        "x y s top top_q",
    ),
    "kl_divergence": (
        lambda x, t, s, m: jaxloss.kl_divergence(x, t, sample_weight=s, where=m),
        "x teacher s counts",
    ),
    "jensen_shannon": (
        lambda x, t, m: jaxloss.kl_divergence(x, t, where=m, divergence="jensen_shannon"),
        "x teacher exists",
    ),
    "sigmoid": (
        lambda x, y, w, s: jaxloss.sigmoid_cross_entropy(x, y, pos_weight=w, sample_weight=s),
        "x yes w s_each",
    ),
    "metric_sums": (
        lambda x, y, s: jaxloss.metric_sums(jaxloss.token_stats(x, y), sample_weight=s),
        "x y s",
    ),
    "total_weight": (
        lambda y, w, s, m: jaxloss.total_weight(y, weight=w, sample_weight=s, where=m),
        "y w s counts",
    ),
    "next_token_labels": (
        lambda y, ids: jaxloss.next_token_labels(y, segment_ids=ids),
        "tokens segments",
    ),
    "sequence_weight": (
        lambda y, ids, s: jaxloss.sequence_weight(y, segment_ids=ids, sample_weight=s),
        "tokens segments s_seq",
    ),
    "two class axes": (
        lambda x, y, w: flat(jaxloss.cross_entropy)(x, y, weight=w, label_smoothing=0.1),
        "x y w",
    ),
    "token_chunks": (partial(linear, implementation="token_chunks"), "h k y b s"),
    "vocab_blocks": (partial(linear, implementation="vocab_blocks"), "h k y b s"),
    "stored": (
        lambda *args: linear(
            *args[:-1],
            weight=args[-1],
            label_smoothing=0.1,
            implementation="stored_exponentials",
        ),
        "h k y b s w",
    ),
}
PER_CLASS = ("w", "b")


def layout(name, first, how):
    """How an argument is split."""
    if how == "the first alone":
        return {"x": P("t", "v"), "h": P("t")}.get(name, P("t")) if name == first else P()
    if how == "the others alone":
        if name == first:
            return P()
        return P("v") if name in PER_CLASS else P(None, "v") if name == "k" else P("t")
    # Each in its own way.
    if name in PER_CLASS:
        return P("t")
    if name == "k":
        return P("t", "v")
    if name in ("x", "tokens"):
        return P(None, "v") if name == "x" else P("v")
    return P(("t", "v")) if name in ("q", "teacher", "exists") else P("t")


def step(name):
    function, names = LOSSES[name]
    names = names.split()

    def run(*args):
        moving = [i for i, a in enumerate(args) if a.dtype == jnp.float32]

        def total(*some):
            full = list(args)
            for i, a in zip(moving, some, strict=True):
                full[i] = a
            out = function(*full)
            values = [v for v in jax.tree.leaves(out) if v.dtype == jnp.float32]
            return sum((jnp.sum(jnp.sin(v)) for v in values), start=jnp.float32(0)), out

        grad = jax.grad(total, argnums=range(len(moving)), has_aux=True)
        return grad(*(args[i] for i in moving)) if moving else ((), function(*args))

    return run, names


@cache
def expected(name):
    run, names = step(name)
    return jit_quickly(run)(*(arrays()[n] for n in names))


HOWS = ("the others alone", "each in its own way", "the first alone")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (name, how)
        for i, name in enumerate(LOSSES)
        for j, how in enumerate(HOWS)
        if j < 2 or i % 8 == 0
    ],
)
def test_arguments_that_are_not_split_alike(name, how):
    """The same numbers as on one device; each gradient is split as what it is of."""
    run, names = step(name)
    on_one_device = expected(name)  # before the mesh: what is made under it belongs to it
    mesh = jax.make_mesh((2, 4), ("t", "v"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        args = [
            jax.device_put(arrays()[n], NamedSharding(mesh, layout(n, names[0], how)))
            for n in names
        ]
        got = jit_quickly(run)(*args)
    moving = [a for a in args if a.dtype == jnp.float32]
    for g, a in zip(got[0], moving, strict=bool(moving)):
        assert g.sharding.is_equivalent_to(a.sharding, g.ndim)
    assert_close(got, on_one_device)


@pytest.mark.parametrize(
    ("of_hidden", "of_kernel"),
    [
        (P("t"), P(None, "one")),
        (P("t"), P("one", "t")),
        (P("t"), P(None, ("t", "one"))),
        (P("t", "one"), P("t", "one")),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_loss"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_an_axis_of_one_device_splits_nothing(kind, name, of_hidden, of_kernel):
    """Trainers name all axes that they know, and most of them have one device."""

    def of_rows(z, y):
        return jaxloss.cross_entropy(z, y, reduction="none")

    def loss(h, k, y, **names):
        if name == "linear_cross_entropy":
            return jaxloss.linear_cross_entropy(h, k, y, chunk_size=4, **names)
        return jaxloss.linear_loss(of_rows, h, k, y, chunk_size=4, sample_weight=y >= 0, **names)

    h, k, y = (arrays()[n] for n in ("h", "k", "y"))
    on_one_device = jit_quickly(jax.value_and_grad(loss, (0, 1)))(h, k, y)
    mesh = jax.make_mesh((8, 1), ("t", "one"), axis_types=(kind,) * 2)
    names = {"token_axis_name": "t", "kernel_spec": of_kernel}
    names = names if kind == AxisType.Auto else {}
    with jax.set_mesh(mesh):
        specs = of_hidden, of_kernel, P("t")
        given = [
            jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((h, k, y), specs, strict=True)
        ]
        step = jax.value_and_grad(partial(loss, **names), (0, 1))
        got = jit_quickly(step)(*given)
    for g, x in zip(got[1], given, strict=False):
        assert g.sharding.is_equivalent_to(x.sharding, g.ndim)
    assert_close(got, on_one_device)
