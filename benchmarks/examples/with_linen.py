"""Flax Linen: a classifier of handwritten digits, and a language model of Python's sources."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import jaxloss
from benchmarks.examples import data

SMALL = nn.initializers.normal(0.02)


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(10)(nn.relu(nn.Dense(128)(images)))


class LanguageModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(256, 64, embedding_init=SMALL)
        positions = nn.Embed(data.LENGTH, 64, embedding_init=SMALL)
        x = embed(tokens) + positions(jnp.arange(tokens.shape[-1]))
        attention = nn.MultiHeadDotProductAttention(4)
        x += attention(nn.RMSNorm()(x), mask=nn.make_causal_mask(tokens))
        return nn.RMSNorm()(x), embed.embedding


def digit_loss(params, apply, images, labels):
    logits = apply(params, images)
    loss, stats = jaxloss.cross_entropy(logits, labels, label_smoothing=0.1, return_stats=True)
    return loss, jnp.mean(stats.prediction == labels)


def next_byte_loss(params, apply, tokens):
    labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-100)  # no byte follows
    hidden, table = apply(params, tokens)  # [batch, length, D], [V, D]
    loss, stats = jaxloss.linear_cross_entropy(
        hidden, table, labels, vocab_axis=0, return_stats=True
    )
    return loss, jnp.mean(stats.prediction == labels, where=labels != -100)


@partial(jax.jit, static_argnums=0)
def step(loss_fn, state, *batch):
    of_params = jax.value_and_grad(loss_fn, has_aux=True)
    metrics, grads = of_params(state.params, state.apply_fn, *batch)
    return state.apply_gradients(grads=grads), metrics


def train(loss_fn, model, batches):
    params = model.init(jax.random.key(0), batches[0][0])
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(3e-3))
    history = []
    for batch in batches:
        state, metrics = step(loss_fn, state, *batch)
        history.append(metrics)
    return history


def main(steps=200):
    return {
        "digits": train(digit_loss, Classifier(), data.digits(steps)),
        "Python": train(next_byte_loss, LanguageModel(), data.python_sources(steps)),
    }


if __name__ == "__main__":
    data.show(main())
