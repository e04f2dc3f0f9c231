"""Functions of logits on every kind of mesh: the numbers of one device, and no logits are sent."""

import inspect
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle.programs import jit_quickly

import jaxloss
from parallel.test_mesh import assert_close, collectives, elements, total

pytestmark = pytest.mark.jax_leaks("jit(grad(shard_map))")
N, C, K = 32, 256, 3


@cache
def arrays():
    """Logits x, a teacher's t, labels y, weights of classes w and of tokens s, stored classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, C, N)
    labels[[2, 8, 9, 10, 11]] = -100
    floats = {
        "x": 3 * rng.normal(size=(N, C)),
        "t": 3 * rng.normal(size=(N, C)),
        "w": rng.random(C) + 0.1,
        "s": rng.random(N),
        "p": rng.dirichlet(np.ones(K), N) * 0.8,
    }
    places = np.stack([rng.permutation(C)[:K] for _ in range(N)])
    integers = {"y": labels, "i": places, "b": rng.integers(0, 2, (N, C))}
    given = {name: jnp.asarray(a, jnp.float32) for name, a in floats.items()}
    return given | {name: jnp.asarray(a, jnp.int32) for name, a in integers.items()}


def top_k(rest, x, i, p):
    return jaxloss.cross_entropy(x, jaxloss.TopKLabels(i, p, rest), reduction="none")


def divergence(kind, x, t, s):
    return s * jaxloss.kl_divergence(x, t, divergence=kind, temperature=2.0, reduction="none")


FUNCTIONS = {
    "cross_entropy": lambda x, y, w, s: (
        s * jaxloss.cross_entropy(x, y, weight=w, reduction="none", logit_softcap=9.0)
    ),
    "smoothed": lambda x, y, w: jaxloss.cross_entropy(
        x, y, weight=w, reduction="none", label_smoothing=0.1, z_loss=0.1
    ),
    "probabilities": lambda x, t: jaxloss.cross_entropy(x, jax.nn.softmax(t), reduction="none"),
    "nll_loss": lambda x, y, w: jaxloss.nll_loss(
        jaxloss.log_softmax(x), y, weight=w, reduction="none"
    ),
    "token_stats": lambda x, y: jaxloss.token_stats(x, y),
    "token_stats of a bucket": lambda x, i, p: jaxloss.token_stats(
        x, jaxloss.TopKLabels(i, p, "bucket")
    ),
    "forward": partial(divergence, "forward"),
    "reverse": partial(divergence, "reverse"),
    "jensen_shannon": partial(divergence, "jensen_shannon"),
    "focal_loss": lambda x, y, w: jaxloss.focal_loss(x, y, weight=w, reduction="none"),
    "sigmoid_cross_entropy": lambda x, b, w: jaxloss.sigmoid_cross_entropy(
        x, b, pos_weight=w, reduction="none"
    ),
    "sigmoid_focal_loss": lambda x, b: jaxloss.sigmoid_focal_loss(x, b, reduction="none"),
    "sigmoid of labels": lambda x, y: jaxloss.sigmoid_cross_entropy(
        x, jax.nn.one_hot(y, C), reduction="none"
    ),
    "metric_sums": lambda x, y, s: jaxloss.metric_sums(
        jaxloss.token_stats(x, y), top_k=(2,), sample_weight=s
    ),
    "log_probs_at": lambda x, i: jaxloss.log_probs_at(x, i, return_rest=True),
    "top k, drop": partial(top_k, "drop"),
    "top k, uniform": partial(top_k, "uniform"),
    "top k, bucket": partial(top_k, "bucket"),
}
OF_CLASSES = ("x", "t", "b")  # [N, C]
# What is split over what: (tokens, classes).
SPLITS = {
    "tokens": (("s", "d"), None),
    "classes": (None, "d"),
    "tokens and classes": ("s", "d"),
}


def letters_of(function):
    """The names of its arrays: what has a default is bound."""
    return [n for n in inspect.signature(function).parameters if n in arrays()]


def spec_of(name, tokens, classes):
    if name in OF_CLASSES:
        return P(tokens, classes)
    return P(classes) if name == "w" else P(tokens)


def gradients(function):
    def of(given):
        floats = {n: a for n, a in given.items() if a.dtype == jnp.float32}
        return jax.grad(total(lambda some: function(**(given | some))), has_aux=True)(floats)

    return of


@cache
def expected(name):
    function = FUNCTIONS[name]
    return jit_quickly(gradients(function))({n: arrays()[n] for n in letters_of(function)})


def over_manual_tokens(function, mesh, specs):
    """``function`` inside of shard_map over "s" alone, which splits tokens or nothing."""

    def manual(spec):
        return P(*("s" if "s" in (e if isinstance(e, tuple) else (e,)) else None for e in spec))

    def called(**given):
        of_rows = manual(specs["x"])
        ins = {n: manual(spec) for n, spec in specs.items()}
        local = lambda given: function(**given)  # noqa: E731
        shapes = jax.eval_shape(function, **given)
        # Numbers of the whole call are those of all tokens: of the functions here there are none.
        out = jax.tree.map(lambda v: P(*of_rows[:1]), shapes)
        return jax.shard_map(local, mesh=mesh, axis_names={"s"}, in_specs=(ins,), out_specs=out)(
            given
        )

    return called


@cache
def jax_gathers():
    """Whether JAX's shard_map gathers what explicit axes split that it leaves out: that of 0.10."""
    mesh = jax.make_mesh((2, 4), ("s", "d"), axis_types=(AxisType.Explicit,) * 2)
    specs = {"x": P("s", "d")}
    with jax.set_mesh(mesh):
        x = jax.device_put(arrays()["x"], NamedSharding(mesh, specs["x"]))
        mapped = over_manual_tokens(lambda x: jnp.sum(x, axis=-1), mesh, specs)
        text = jax.jit(mapped).lower(x=x).compile().as_text()
    return any(kind == "all-gather" for kind, *_ in collectives(text))


# In turn: of a function and a split two kinds of meshes.
KINDS = ("automatic", "manual and explicit"), ("explicit", "partly manual")
CASES = [
    (name, split, kind)
    for i, name in enumerate(FUNCTIONS)
    for j, split in enumerate(SPLITS)
    for kind in KINDS[(i + j) % 2]
    if name != "metric_sums" or "manual" not in kind  # sums of all tokens
]


@pytest.mark.parametrize(("name", "split", "kind"), CASES)
def test_numbers_of_one_device_and_no_logits_sent(name, split, kind):
    before = expected(name)
    function = FUNCTIONS[name]
    typed = AxisType.Explicit if "explicit" in kind else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("s", "d"), axis_types=(typed,) * 2)
    specs = {n: spec_of(n, *SPLITS[split]) for n in letters_of(function)}
    with jax.set_mesh(mesh):
        given = {n: jax.device_put(arrays()[n], NamedSharding(mesh, p)) for n, p in specs.items()}
        called = over_manual_tokens(function, mesh, specs) if "manual" in kind else function
        compiled = jit_quickly(gradients(called)).lower(given).compile()
        got = compiled(given)
    assert_close(got, before)
    if "manual and" in kind and jax_gathers():
        return
    # A few numbers of each token, and of each class its weight: a device holds N * C / 8 logits.
    found = collectives(compiled.as_text())
    allowed = max(2 * N * K, 2 * C if "w" in specs else 0)
    assert all(elements(shape) <= allowed for _, shape, _ in found), found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_constants_beside_logits_of_an_automatic_mesh(name):
    """Without a context types say that the logits are of a mesh, and constants of none: JAX refused
    to reshard the gradient of what was broadcast."""
    before = expected(name)
    function = FUNCTIONS[name]
    letters = letters_of(function)
    mesh = jax.make_mesh((2, 4), ("s", "d"), axis_types=(AxisType.Auto,) * 2)
    logits = jax.device_put(arrays()[letters[0]], NamedSharding(mesh, P("s", "d")))
    others = {n: np.asarray(arrays()[n]) for n in letters[1:]}
    got = jit_quickly(gradients(function))({letters[0]: logits} | others)
    assert_close(got, before)
