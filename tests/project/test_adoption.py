"""What replaces the losses of other trainers: the same numbers, split the same way, less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from oracle.budget import EPS, relative_errors

import jaxloss
from benchmarks import trainers
from benchmarks.parts import adoption

SMALL = b, length, d, v = 8, 16, 32, 96


@pytest.fixture(autouse=True)
def _defaults():
    """The trainers have JAX's own rules of promotion."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def following(tokens, counts):
    """The next token of each, and whether that counts; the last has none."""
    counts = np.concatenate([counts[:, 1:], np.zeros_like(counts[:, :1])], axis=1)
    return np.roll(tokens, -1, axis=1), counts


def of_maxtext(hidden, kernel, targets, segmentation):
    weights = segmentation != 0
    return {"y": targets, "w": weights / weights.sum(), "z": 1e-4}


def of_tunix(hidden, table, tokens, mask):
    y, w = following(tokens, mask)
    return {"y": y, "w": w, "cap": 30.0}


def of_levanter(hidden, head, tokens, mask):
    y, _ = following(tokens, mask)
    w = (mask != 0) & (np.arange(length) < length - 1)
    return {"y": y, "w": w / w.sum(), "z": 1e-4}


def of_easydel(hidden, kernel, labels, attention_mask):
    y, w = following(labels, attention_mask)
    return {"y": y, "w": w * (y != -100) / attention_mask[:, 1:].sum(), "z": 1e-4}


def of_big_vision(hidden, table, text, mask_loss):
    y, w = following(text, mask_loss)
    return {"y": y, "w": w / np.maximum(w.sum(axis=1, keepdims=True), 1) / b}


def of_nanodo(hidden, table, tokens):
    y, w = following(tokens, tokens != 0)
    return {"y": y, "w": w / w.sum()}


def truth(name, arrays):
    """The loss and its gradients by their formulas, in float64: of hidden and of the kernel."""
    hidden, kernel = (np.asarray(x, np.float64) for x in list(arrays.values())[:2])
    as_stored = kernel.shape == (v, d)
    kernel = kernel.T if as_stored else kernel
    asked = globals()[f"of_{name}"](**{k: np.asarray(x) for k, x in arrays.items()})
    y, w, cap, z = asked["y"], asked["w"], asked.get("cap", np.inf), asked.get("z", 0)
    x = hidden @ kernel
    slope = 1.0
    if np.isfinite(cap):
        x = np.tanh(x / cap) * cap
        slope = 1 - (x / cap) ** 2
    log_z = np.log(np.sum(np.exp(x), axis=-1))
    one_hot = y[..., None] == np.arange(v)
    loss = np.sum(w * (log_z - np.sum(x * one_hot, axis=-1) + z * log_z**2))
    p = np.exp(x - log_z[..., None])
    d_x = w[..., None] * slope * (p * (1 + 2 * z * log_z)[..., None] - one_hot)
    d_hidden, d_kernel = d_x @ kernel.T, np.einsum("btd,btv->dv", hidden, d_x)
    return loss, (d_hidden, d_kernel.T if as_stored else d_kernel)


def ways(trainer):
    named = {"before": trainer.before, "after": trainer.after}
    if hasattr(trainer, "in_parts"):
        named["in parts"] = trainer.in_parts
    return named | {"blocks": adoption.by_blocks(trainer)}


WAYS = [(name, way, 1) for name in trainers.NAMES for way in ways(trainers.load(name))]
WAYS += [(name, "after", 8) for name in trainers.NAMES]


@pytest.mark.parametrize(("name", "way", "devices"), WAYS)
def test_value_and_gradients(name, way, devices):
    trainer = trainers.load(name)
    arrays = trainer.operands(*SMALL)
    loss, gradients = truth(name, arrays)
    mesh = adoption.mesh_of(trainer, devices)
    with jax.set_mesh(mesh):
        given = adoption.placed(trainer, mesh, arrays)
        step = adoption.step(ways(trainer)[way], trainer)
        (got, beside), grads = jax.jit(step)(*given)
        expected = loss, gradients[: len(trainer.TRAINED)]
        assert max(relative_errors((got, grads), expected)) < 16 * EPS
        reported = jax.jit(trainer.before)(*given)[1]
        assert max(relative_errors(beside, reported), default=0) < 16 * EPS
        for gradient, array in zip(grads, given, strict=False):
            assert gradient.sharding.is_equivalent_to(array.sharding, gradient.ndim)


@pytest.mark.parametrize("name", ["maxtext", "levanter"])
def test_in_bfloat16_with_parameters_in_float32(name):
    """No less exact than the trainer's own, of operands as they are rounded."""
    trainer = trainers.load(name)
    arrays = trainer.operands(*SMALL)
    first, second = trainer.TRAINED
    arrays[first] = arrays[first].astype(jnp.bfloat16)
    rounded = arrays[second].astype(jnp.bfloat16)
    loss, gradients = truth(name, {**arrays, second: rounded.astype(jnp.float32)})
    mesh = adoption.mesh_of(trainer, 1)
    with jax.set_mesh(mesh):
        given = adoption.placed(trainer, mesh, arrays)
        errors = []
        for way in (trainer.before, trainer.after):
            (got, _), grads = jax.jit(adoption.step(way, trainer))(*given)
            assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]
            errors.append(relative_errors((got, grads), (loss, gradients)))
    assert np.all(np.array(errors[1]) <= 1.1 * np.array(errors[0]) + EPS)


@pytest.mark.parametrize("name", trainers.NAMES)
def test_less_memory(name):
    trainer = trainers.load(name)
    mesh = adoption.mesh_of(trainer, 8)
    shapes = jax.eval_shape(lambda: trainer.operands(*adoption.SHAPE))
    given = [
        jax.ShapeDtypeStruct(shapes[k].shape, shapes[k].dtype, sharding=NamedSharding(mesh, spec))
        for k, spec in trainer.SPECS.items()
    ]
    with jax.set_mesh(mesh):
        held = {
            way: adoption.compiled(f, given).memory_analysis().temp_size_in_bytes
            for way, f in adoption.functions(trainer).items()
        }
    assert held["after"] < 0.7 * held["before"]
    assert held["blocks"] < 0.2 * held["before"]
    assert held["blocks"] < held.get("in_parts", held["before"])


def test_a_difference_is_the_two_functions():
    for name in trainers.NAMES:
        trainer, lines = trainers.load(name), trainers.difference(name)
        for sign, function in (("-", trainer.before), ("+", trainer.after)):
            assert [x[1:] for x in lines if x[:1] in (" ", sign)] == trainers.body(function)
        assert not any("jaxloss" in line for line in lines if line[:1] == "-")


# The other losses of big_vision's trainers, by their formulas.


def numbers(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def same(theirs, ours, *args):
    which = (*range(len(args)),)
    found = [jax.jit(jax.value_and_grad(loss, which))(*args) for loss in (theirs, ours)]
    assert max(relative_errors(found[1], found[0])) < 64 * EPS


def test_sigmoid_xent_of_big_vision():
    labels = (numbers(1, b, v) > 1.5).astype(jnp.float32)

    def theirs(x):
        log_p, log_not_p = jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x)
        return jnp.mean(-jnp.sum(labels * log_p + (1 - labels) * log_not_p, axis=-1))

    def ours(x):
        return jaxloss.sigmoid_cross_entropy(x, labels, reduction="sum") / len(x)

    same(theirs, ours, numbers(0, b, v))


def test_softmax_xent_of_mixed_labels_of_big_vision():
    mixed = 0.3 * jax.nn.one_hot(jnp.arange(b), v) + 0.7 * jax.nn.one_hot(jnp.arange(b) + 1, v)

    def theirs(x):
        return jnp.mean(-jnp.sum(mixed * jax.nn.log_softmax(x), axis=-1))

    same(theirs, lambda x: jaxloss.cross_entropy(x, mixed), numbers(0, b, v))


def test_siglip_of_big_vision():
    def theirs(x, y, t, bias):
        logits = jnp.dot(x, y.T) * t + bias
        sign = 2 * jnp.eye(len(x)) - 1
        return jnp.mean(-jnp.sum(jax.nn.log_sigmoid(sign * logits), axis=-1))

    def ours(x, y, t, bias):
        return jaxloss.sigmoid_contrastive_loss(x, y, logit_scale=t, logit_bias=bias)

    x, y = (
        z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (numbers(0, b, d), numbers(1, b, d))
    )
    same(theirs, ours, x, y, jnp.float32(10), jnp.float32(-10))


def test_distance_kl_of_big_vision():
    teacher, t = numbers(1, b, v), 2.0

    def theirs(x):
        q = jax.nn.softmax(teacher / t)
        nll = -jnp.sum(q * jax.nn.log_softmax(x / t), axis=-1)
        return jnp.mean(t**2 * (nll + jnp.sum(q * jnp.log(jnp.clip(q, 1e-8)), axis=-1)))

    def ours(x):
        return t**2 * jaxloss.kl_divergence(x, teacher, temperature=t)

    same(theirs, ours, numbers(0, b, v))
