"""Equinox: a classifier of handwritten digits, and a language model of Python's sources."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import jaxloss
from benchmarks.examples import data


class LanguageModel(eqx.Module):
    bytes: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.RMSNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.bytes = eqx.nn.Embedding(256, 64, key=keys[0])
        self.positions = eqx.nn.Embedding(data.LENGTH, 64, key=keys[1])
        self.attention = eqx.nn.MultiheadAttention(4, 64, key=keys[2])
        self.norm = eqx.nn.RMSNorm(64)
        self.head = eqx.nn.Linear(64, 256, key=keys[3])

    def __call__(self, tokens):  # one sequence: Equinox leaves the batch to vmap
        length = tokens.shape[0]
        x = jax.vmap(self.bytes)(tokens) + jax.vmap(self.positions)(jnp.arange(length))
        x += self.attention(x, x, x, mask=jnp.tri(length, dtype=bool))
        return jax.vmap(self.norm)(x)


def digit_loss(model, images, labels):
    logits = jax.vmap(model)(images)
    loss, stats = jaxloss.cross_entropy(logits, labels, label_smoothing=0.1, return_stats=True)
    return loss, jnp.mean(stats.prediction == labels)


def next_byte_loss(model, tokens):
    labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-100)  # no byte follows
    hidden = jax.vmap(model)(tokens)
    # An eqx.nn.Linear holds its weight as [V, D], the layout of an embedding table.
    loss, stats = jaxloss.linear_cross_entropy(
        hidden, model.head.weight, labels, bias=model.head.bias, vocab_axis=0, return_stats=True
    )
    return loss, jnp.mean(stats.prediction == labels, where=labels != -100)


def train(loss_fn, model, batches):
    optimizer = optax.adam(3e-3)
    state, history = optimizer.init(eqx.filter(model, eqx.is_inexact_array)), []

    @eqx.filter_jit
    def step(model, state, *batch):
        metrics, grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, *batch)
        updates, state = optimizer.update(grads, state)
        return eqx.apply_updates(model, updates), state, metrics

    for batch in batches:
        model, state, metrics = step(model, state, *batch)
        history.append(metrics)
    return history


def main(steps=200):
    key = jax.random.key(0)
    classifier = eqx.nn.MLP(64, 10, 128, depth=1, key=key)
    return {
        "digits": train(digit_loss, classifier, data.digits(steps)),
        "Python": train(next_byte_loss, LanguageModel(key), data.python_sources(steps)),
    }


if __name__ == "__main__":
    data.show(main())
