"""Losses inside of ``shard_map`` over some of a mesh's axes, the others automatic or explicit."""

import inspect
from functools import cache, partial, wraps

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chips import kernels_of
from forms import SCHEDULES
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle.programs import jit_quickly

import jaxloss
from parallel.test_mesh import assert_close, total

pytestmark = pytest.mark.jax_leaks("jit(grad(shard_map))")
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


@pytest.fixture
def backend(request):
    with kernels_of(request.param):
        yield request.param


N, C = 2**14, 2**12
OF_LOGITS = (N, C), (N,)
LARGE = {
    "mean": (partial(jaxloss.cross_entropy, token_axis_name="d"), OF_LOGITS),
    "none": (partial(jaxloss.cross_entropy, reduction="none"), OF_LOGITS),
    "linear": (
        lambda h, y, k: jaxloss.linear_cross_entropy(h, k, y, token_axis_name="d"),
        ((N, 2**9), (N,), (2**9, C)),
    ),
}


@pytest.mark.parametrize(
    ("backend", "name"),
    [("gpu", "mean"), ("gpu", "none"), ("gpu", "linear"), ("tpu", "mean"), ("tpu", "linear")],
    indirect=["backend"],
)
@pytest.mark.parametrize("kind", list(KINDS))
def test_no_kernel_where_a_partitioner_may_still_split(backend, name, kind):
    """Along the axes that ``shard_map`` leaves out, of one device too: JAX refuses it there."""
    loss, shapes = LARGE[name]
    dtypes, specs = (jnp.bfloat16, jnp.int32, jnp.bfloat16), (P("d"), P("d"), P())

    def kernels(sizes, names):
        mesh = jax.sharding.AbstractMesh(sizes, ("d", "v"), axis_types=(KINDS[kind],) * 2)
        args = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
            for shape, dtype, spec in zip(shapes, dtypes, specs, strict=False)
        ]

        def local(*args):
            return loss(*args), jax.grad(lambda *a: jnp.sum(loss(*a)))(*args)

        out = (P("d") if name == "none" else P()), P("d")
        given = {"mesh": mesh, "axis_names": names, "in_specs": specs[: len(args)]}
        mapped = jax.shard_map(local, out_specs=out, **given)
        with jax.sharding.use_abstract_mesh(mesh):
            return "jaxloss_" in str(jax.make_jaxpr(mapped)(*args))

    assert kernels((2, 4), {"d", "v"})
    assert not kernels((2, 4), {"d"})
    assert not kernels((8, 1), {"d"})


# Right values and gradients on 8 devices. "stage" is manual; "data" is what shard_map leaves out.

ROWS, FEATURES, CLASSES = 16, 4, 24


@cache
def arrays():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, ROWS)
    labels[[2, 8, 9, 10, 11]] = -100  # the devices hold different numbers of tokens that count
    floats = {
        "x": 3 * rng.normal(size=(ROWS, CLASSES)),
        "t": 3 * rng.normal(size=(ROWS, CLASSES)),
        "h": rng.normal(size=(ROWS, FEATURES)),
        "k": rng.normal(size=(FEATURES, CLASSES)),
        "b": rng.normal(size=CLASSES),
        "w": rng.random(CLASSES) + 0.1,
        "s": rng.random(ROWS),
    }
    labels = {"y": jnp.asarray(labels, jnp.int32)}
    return labels | {name: jnp.asarray(a, jnp.float32) for name, a in floats.items()}


def mesh_of(kind):
    types = (AxisType.Explicit if kind == "explicit" else AxisType.Auto,) * 2
    return jax.make_mesh((2, 4), ("stage", "data"), axis_types=types)


def only_manual(spec):
    """The part of a spec that shard_map over "stage" is told."""
    return P(*("stage" if "stage" in (e if isinstance(e, tuple) else (e,)) else None for e in spec))


def split(function, kind, specs, out, derivative):
    """What ``derivative(f)(arrays)`` gives of ``function`` inside of shard_map over "stage"."""
    mesh = mesh_of(kind)
    mapped = jax.shard_map(
        lambda some: function(**some),
        mesh=mesh,
        axis_names={"stage"},
        in_specs=({name: only_manual(spec) for name, spec in specs.items()},),
        out_specs=out,
    )
    with jax.set_mesh(mesh):
        given = {n: jax.device_put(arrays()[n], NamedSharding(mesh, p)) for n, p in specs.items()}
        return jit_quickly(derivative(mapped))(given)


def gradients(f):
    """(outputs, gradients by name) of a scalar of all outputs."""

    def of(given):
        floats = {n: a for n, a in given.items() if a.dtype == jnp.float32}
        return jax.grad(total(lambda some: f(given | some)), has_aux=True)(floats)

    return of


def check(function, whole, kind, specs, out, derivative=gradients):
    given = {name: arrays()[name] for name in specs}
    expected = jit_quickly(derivative(lambda some: whole(**some)))(given)
    assert_close(split(function, kind, specs, out, derivative), expected)


BOTH = ("stage", "data")
TOKENS = {"h": P(BOTH), "k": P("data"), "b": P(), "y": P(BOTH), "w": P(), "s": P(BOTH)}
VOCAB = {"h": P("data"), "k": P(None, "stage"), "b": P("stage"), "y": P("data"), "s": P("data")}
# (specs, names, options, specs of what comes out)
LINEAR = {
    "mean over both": (TOKENS, {"token_axis_name": "stage"}, {}, P()),
    "none over both": (TOKENS, {}, {"reduction": "none", "return_stats": True}, P("stage")),
    "manual vocabulary": (VOCAB, {"vocab_axis_name": "stage"}, {}, P()),
    "statistics": (
        VOCAB | {"k": P(None, BOTH), "h": P(), "y": P(), "s": P()},
        {"vocab_axis_name": "stage"},
        {"reduction": "none", "return_stats": True},
        P(),
    ),
}


def linear(h, k, b, y, s, w=None, **options):
    options = {"bias": b, "weight": w, "sample_weight": s, "chunk_size": 2} | options
    return jaxloss.linear_cross_entropy(h, k, y, **options)


@pytest.mark.parametrize(
    ("name", "schedule", "kind"),
    [(name, schedule, "explicit") for name in LINEAR for schedule in SCHEDULES]
    + [
        ("mean over both", "token_chunks", "automatic"),
        ("manual vocabulary", "vocab_blocks", "automatic"),
        ("mean over both", "stored_exponentials", "explicit"),
        ("manual vocabulary", "stored_exponentials", "explicit"),
        ("manual vocabulary", "stored_exponentials", "automatic"),
    ],
)
def test_linear_loss_over_manual_axes_and_others(name, schedule, kind):
    """The names of the manual axes hold beside what the types say of the others."""
    specs, names, options, out = LINEAR[name]
    if kind == "automatic":
        options = options | {"chunk_size": 4}  # it is a chunk of four devices
    whole = partial(linear, implementation=schedule, **options)
    check(partial(whole, **names), whole, kind, specs, out)


def test_every_mode_over_manual_axes_and_others():
    """JAX's own shard_map inside of another one has no reverse mode."""
    specs, names, _, out = LINEAR["mean over both"]
    specs = {name: specs[name] for name in ("h", "k", "y", "s")}

    def whole(h, k, y, s, **names):
        return 10 * jaxloss.linear_cross_entropy(h, k, y, sample_weight=s, chunk_size=2, **names)

    def modes(f):
        def of(given):
            def loss(h, k):
                return f(given | {"h": h, "k": k})

            args = given["h"], given["k"]
            along = tuple(map(jnp.cos, args))
            grad = jax.grad(loss, (0, 1))
            second = jax.grad(lambda *a: sum(jnp.sum(jnp.sin(g)) for g in grad(*a)), (0, 1))
            return jax.jvp(loss, args, along), jax.jvp(grad, args, along), second(*args)

        return of

    check(partial(whole, **names), whole, "explicit", specs, out, modes)


@pytest.mark.parametrize("kind", list(KINDS))
def test_classes_over_manual_axes_and_tokens_over_others(kind):
    def function(x, y, w, s, **names):
        loss = partial(jaxloss.cross_entropy, weight=w, sample_weight=s, **names)
        return loss(x, y), jaxloss.token_stats(x, y, **names)

    specs = {"x": P("data", "stage"), "y": P("data"), "w": P(), "s": P("data")}
    check(partial(function, vocab_axis_name="stage"), function, kind, specs, P())


def of_row_sums(function):
    """A loss of rows by itself, whose sum is over the axes of all kinds."""

    @wraps(function)  # its signature names the arrays
    def summed(axis_name=None, **given):
        out = jnp.sum(function(**given)) / (ROWS * CLASSES)
        return out if axis_name is None else jax.lax.psum(out, axis_name)

    return summed


def top_k(x, y, s, axis_name=None):
    index = jnp.stack([jnp.maximum(y, 0), (y + 3) % CLASSES], axis=-1)
    labels = jaxloss.TopKLabels(index, jnp.full_like(index, 0.4, jnp.float32), rest="uniform")
    return jaxloss.cross_entropy(x, labels, sample_weight=s, token_axis_name=axis_name)


# Functions of logits whose tokens both kinds of axes split.
OF_TOKENS = {
    "nll_loss(log_softmax)": of_row_sums(
        lambda x, y, w: jaxloss.nll_loss(jaxloss.log_softmax(x), y, weight=w, reduction="sum")
    ),
    "focal_loss": of_row_sums(lambda x, y, w: jaxloss.focal_loss(x, y, weight=w, reduction="none")),
    "sigmoid_cross_entropy": of_row_sums(
        lambda x, t, w: jaxloss.sigmoid_cross_entropy(
            x, jax.nn.sigmoid(t), pos_weight=w, reduction="none"
        )
    ),
    "sigmoid_focal_loss": of_row_sums(
        lambda x, t: jaxloss.sigmoid_focal_loss(x, jax.nn.sigmoid(t), reduction="none")
    ),
    "kl_divergence": of_row_sums(
        lambda x, t, s: s * jaxloss.kl_divergence(x, t, temperature=2.0, reduction="none")
    ),
    "probabilities": lambda x, t, s, axis_name=None: jaxloss.cross_entropy(
        x, jax.nn.softmax(t), sample_weight=s, token_axis_name=axis_name
    ),
    "TopKLabels": top_k,
    "metric_sums": lambda x, y, s, axis_name=None: jaxloss.metrics(
        jaxloss.metric_sums(
            jaxloss.token_stats(x, y), top_k=(2,), sample_weight=s, token_axis_name=axis_name
        )
    ),
    "total_weight": lambda y, s, axis_name=None: jaxloss.total_weight(
        y, sample_weight=s, token_axis_name=axis_name
    ),
}
SPLIT = {"x": P(BOTH), "t": P(BOTH), "y": P(BOTH), "w": P(), "s": P(BOTH)}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", OF_TOKENS)
def test_tokens_over_manual_axes_and_others(name, kind):
    function = OF_TOKENS[name]
    names = inspect.signature(function).parameters
    specs = {letter: spec for letter, spec in SPLIT.items() if letter in names}
    derivative = (lambda f: f) if name in ("metric_sums", "total_weight") else gradients
    check(partial(function, axis_name="stage"), function, kind, specs, P(), derivative)
