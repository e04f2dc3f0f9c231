"""Kernels of low rank and of few bits in the programs of others: JAX's transforms, and models."""

from functools import partial

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from oracle.budget import relative_errors
from oracle.programs import jit_quickly

import jaxloss

M, N, D, V, R = 4, 10, 8, 30, 2  # microbatches of N tokens
EPS = 2.0**-23
f32 = partial(jnp.asarray, dtype=jnp.float32)


def arrays():
    rng = np.random.default_rng(0)
    shapes = {"h": (M, N, D), "k": (D, V), "a": (D, R), "b": (R, V)}
    given = {name: f32(rng.normal(size=shape)) for name, shape in shapes.items()}
    given["few"] = jnp.asarray(rng.integers(-7, 8, (D, V)), jnp.int4)
    given["column"], given["group"] = f32(rng.random((1, V)) + 0.1), f32(rng.random((2, V)) + 0.1)
    labels = rng.integers(0, V, (M, N))
    labels[:, 3] = labels[3] = -100  # the last microbatch is all prompt
    return given, jnp.asarray(labels, jnp.int32)


GIVEN, LABELS = arrays()
COUNT = int((LABELS >= 0).sum())
LORA = GIVEN["a"], GIVEN["b"]
HEADS = {
    "low rank": jaxloss.LowRankKernel(GIVEN["k"], *LORA, 0.5),
    "traced scale": jaxloss.LowRankKernel(GIVEN["k"], *LORA, f32(0.5)),
    "columns": jaxloss.QuantizedKernel(GIVEN["few"], GIVEN["column"]),
    "groups": jaxloss.QuantizedKernel(GIVEN["few"], GIVEN["group"]),
    "both": jaxloss.LowRankKernel(
        jaxloss.QuantizedKernel(GIVEN["few"], GIVEN["group"]), *LORA, f32(0.5)
    ),
}
SUM = partial(jaxloss.linear_cross_entropy, reduction="sum", chunk_size=4)


def merged(head):
    """What a head stands for, in float64."""
    if isinstance(head, jaxloss.LowRankKernel):
        a, b, scale = (np.asarray(x, float) for x in (head.a, head.b, head.scale))
        return merged(head.kernel) + scale * a @ b
    if isinstance(head, jaxloss.QuantizedKernel):
        scale = np.asarray(head.scale, float)
        return np.asarray(head.values, float) * np.repeat(scale, D // len(scale), axis=0)
    return np.asarray(head, float)


def truth(head, hidden, labels):
    """(the sum of the losses, its gradients of hidden and of the merged kernel)."""
    kernel, hidden = merged(head), np.asarray(hidden, float).reshape(-1, D)
    y, x = np.asarray(labels).reshape(-1), hidden @ kernel
    log_p = x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))
    counts, hot = y >= 0, np.eye(V)[np.maximum(y, 0)]
    slopes = (np.exp(log_p) - hot) * counts[:, None]
    return -np.sum(hot * log_p * counts[:, None]), slopes @ kernel.T, hidden.T @ slopes


def check(found, expected):
    shaped = [np.reshape(x, np.shape(y)) for x, y in zip(found, expected, strict=True)]
    assert max(relative_errors(shaped, list(expected))) <= 64 * EPS


def microbatches(head, hidden, around=lambda f: f):
    @around
    def step(total, microbatch):
        return total + SUM(microbatch[0], head, microbatch[1]) / COUNT, None

    return jax.lax.scan(step, f32(0), (hidden, LABELS))[0]


PROGRAMS = {
    "scan": microbatches,
    "checkpoint of scan": jax.checkpoint(microbatches),
    "scan of checkpoint": partial(microbatches, around=jax.checkpoint),
    "vmap": lambda head, hidden: jnp.sum(jax.vmap(SUM, (0, None, 0))(hidden, head, LABELS)) / COUNT,
    "pmap": lambda head, hidden: (
        jnp.sum(jax.pmap(SUM, in_axes=(0, None, 0))(hidden, head, LABELS)) / COUNT
    ),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_microbatches(name, head):
    of = jax.value_and_grad(PROGRAMS[name], 1)
    found = (of if name == "pmap" else jit_quickly(of))(HEADS[head], GIVEN["h"])
    check(found, [x / COUNT for x in truth(HEADS[head], GIVEN["h"], LABELS)[:2]])


def fields():
    return [(head, i) for head, tree in HEADS.items() for i in range(len(jax.tree.leaves(tree)))]


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize(("head", "field"), fields())
def test_one_field_is_batched(head, field, reduction):
    leaves, structure = jax.tree.flatten(HEADS[head])
    other = jnp.flip(leaves[field], 0) if leaves[field].ndim else 3 * leaves[field]
    each = [[x if i == field else y for i, y in enumerate(leaves)] for x in (leaves[field], other)]
    each = [jax.tree.unflatten(structure, x) for x in each]
    stacked = [jnp.stack([x, other]) if i == field else x for i, x in enumerate(leaves)]
    axes = jax.tree.unflatten(structure, [0 if i == field else None for i in range(len(leaves))])

    def loss(head, hidden):
        return jnp.sum(SUM(hidden, head, LABELS[0], reduction=reduction))

    batched = jax.vmap(jax.value_and_grad(loss, 1), (axes, None))
    found = jit_quickly(batched)(jax.tree.unflatten(structure, stacked), GIVEN["h"][0])
    for i in range(2):
        check([x[i] for x in found], truth(each[i], GIVEN["h"][0], LABELS[0])[:2])


@pytest.mark.parametrize("head", HEADS)
def test_a_number_in_place_of_a_scale_is_a_leaf_as_the_scale_was(head):
    """Of sizes, axes and rates, which are made of a head by ``jax.tree.map``."""
    structure = jax.tree.structure(HEADS[head])
    for made in (jax.tree.map(jnp.size, HEADS[head]), jax.tree.map(lambda _: 0.5, HEADS[head])):
        assert jax.tree.structure(made) == structure
        assert jax.tree.structure(jax.tree.map(lambda *x: x, HEADS[head], made)).num_leaves == (
            2 * structure.num_leaves
        )


@pytest.mark.parametrize("head", HEADS)
def test_an_open_batch_is_exported(head):
    shaped = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), HEADS[head])
    (n,) = export.symbolic_shape("n")
    hidden, labels = (jax.ShapeDtypeStruct((n, *x), t) for x, t in (((D,), "f4"), ((), "i4")))
    stored = export.export(jax.jit(jax.value_and_grad(SUM)))(hidden, shaped, labels).serialize()
    found = export.deserialize(stored).call(GIVEN["h"][0], HEADS[head], LABELS[0])
    check(found, truth(HEADS[head], GIVEN["h"][0], LABELS[0])[:2])


# Models, whose parameters are a and b; the frozen kernel is of few bits.


class LinenHead(nn.Module):
    @nn.compact
    def __call__(self, hidden, labels):
        frozen = self.variable("frozen", "kernel", lambda: HEADS["groups"])
        a, b = (self.param(name, lambda _, x=x: x) for name, x in zip("ab", LORA, strict=True))
        return SUM(hidden, jaxloss.LowRankKernel(frozen.value, a, b, 0.5), labels)


def linen(hidden, labels):
    """(loss, d_a, d_b)."""
    model = LinenHead()
    given = model.init(jax.random.key(0), hidden, labels)
    assert jax.tree.structure(given["frozen"]["kernel"]) == jax.tree.structure(HEADS["groups"])

    def loss(params):
        return model.apply({"params": params, "frozen": given["frozen"]}, hidden, labels)

    value, slopes = jax.jit(jax.value_and_grad(loss))(given["params"])
    return value, slopes["a"], slopes["b"]


def linen_of_remat_and_scan(hidden, labels):
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, hidden, labels):
            head = nn.remat(LinenHead)()
            both = {"variable_broadcast": ("params", "frozen"), "split_rngs": {"params": False}}
            over = nn.scan(lambda head, c, xs: (c, head(*xs)), **both)
            return jnp.sum(over(head, 0.0, (hidden.reshape(2, -1, D), labels.reshape(2, -1)))[1])

    model = Twice()
    given = model.init(jax.random.key(0), hidden, labels)
    loss = lambda p: model.apply({**given, "params": p}, hidden, labels)  # noqa: E731
    value, slopes = jax.jit(jax.value_and_grad(loss))(given["params"])
    return value, *jax.tree.leaves(slopes)


def haiku(hidden, labels):
    @hk.transform_with_state
    def model(hidden, labels):
        frozen = hk.get_state("kernel", (), init=lambda *_: HEADS["groups"])
        a, b = (
            hk.get_parameter(name, x.shape, init=lambda *_, x=x: x)
            for name, x in zip("ab", LORA, strict=True)
        )
        loss = lambda h: SUM(h, jaxloss.LowRankKernel(frozen, a, b, 0.5), labels)  # noqa: E731
        return hk.remat(loss)(hidden)

    params, state = model.init(jax.random.key(0), hidden, labels)
    loss = lambda p: model.apply(p, state, None, hidden, labels)[0]  # noqa: E731
    value, slopes = jax.jit(jax.value_and_grad(loss))(params)
    return value, *jax.tree.leaves(slopes)


def equinox(hidden, labels):
    class Model(eqx.Module):
        head: jaxloss.LowRankKernel

        def __call__(self, hidden, labels):
            return SUM(hidden, self.head, labels)

    model = Model(HEADS["both"])
    trained = jax.tree.map(lambda _: False, model)
    trained = eqx.tree_at(lambda m: (m.head.a, m.head.b), trained, (True, True))
    trained, frozen = eqx.partition(model, trained)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(trained, frozen):
        return eqx.combine(trained, frozen)(hidden, labels)

    value, slopes = loss(trained, frozen)
    assert slopes.head.kernel.values is None
    return value, slopes.head.a, slopes.head.b


def of_nnx(hidden, labels):
    class Model(nnx.Module):
        def __init__(self):
            self.frozen = nnx.data(HEADS["groups"])
            self.a, self.b = map(nnx.LoRAParam, LORA)

        def __call__(self, hidden, labels):
            return SUM(hidden, jaxloss.LowRankKernel(self.frozen, self.a, self.b, 0.5), labels)

    of = nnx.value_and_grad(Model.__call__, argnums=nnx.DiffState(0, nnx.LoRAParam))
    value, slopes = nnx.jit(of)(Model(), hidden, labels)
    return value, slopes.a[...], slopes.b[...]


MODELS = {f.__name__: f for f in (linen, linen_of_remat_and_scan, haiku, equinox, of_nnx)}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_train_an_update_of_a_kernel_of_few_bits(name):
    given = GIVEN["h"][0], LABELS[0]
    loss, _, of_kernel = truth(HEADS["both"], *given)
    a, b = (0.5 * np.asarray(x, float) for x in LORA)
    check(MODELS[name](*given), (loss, of_kernel @ b.T, a.T @ of_kernel))
