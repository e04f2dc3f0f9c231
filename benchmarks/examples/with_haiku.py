"""Haiku: a classifier of handwritten digits, and a language model of Python's sources."""

from functools import partial

import haiku as hk
import jax
import jax.numpy as jnp
import optax

import jaxloss
from benchmarks.examples import data

OPTIMIZER = optax.adam(1e-2)


def classifier(images):
    return hk.nets.MLP([128, 10])(images)


def language_model(tokens):
    embed = hk.Embed(256, 64, w_init=hk.initializers.RandomNormal(0.02))
    core = hk.GRU(64)
    start = core.initial_state(tokens.shape[0])
    x = embed(tokens)
    mixed, _ = hk.dynamic_unroll(core, x, start, time_major=False)
    return x + mixed, embed.embeddings


@hk.transform
def digit_loss(images, labels):
    logits = classifier(images)
    loss, stats = jaxloss.cross_entropy(logits, labels, label_smoothing=0.1, return_stats=True)
    return loss, jnp.mean(stats.prediction == labels)


@hk.transform
def next_byte_loss(tokens):
    labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-100)  # no byte follows
    hidden, table = language_model(tokens)  # [batch, length, D], [V, D]
    loss, stats = jaxloss.linear_cross_entropy(
        hidden, table, labels, vocab_axis=0, return_stats=True
    )
    return loss, jnp.mean(stats.prediction == labels, where=labels != -100)


@partial(jax.jit, static_argnums=0)
def step(loss_fn, params, state, *batch):
    metrics, grads = jax.value_and_grad(loss_fn.apply, has_aux=True)(params, None, *batch)
    updates, state = OPTIMIZER.update(grads, state)
    return optax.apply_updates(params, updates), state, metrics


def train(loss_fn, batches):
    params = loss_fn.init(jax.random.key(0), *batches[0])
    state, history = OPTIMIZER.init(params), []
    for batch in batches:
        params, state, metrics = step(loss_fn, params, state, *batch)
        history.append(metrics)
    return history


def main(steps=200):
    return {
        "digits": train(digit_loss, data.digits(steps)),
        "Python": train(next_byte_loss, data.python_sources(steps)),
    }


if __name__ == "__main__":
    data.show(main())
