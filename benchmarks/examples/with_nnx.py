"""Flax NNX: a classifier of handwritten digits, and a language model of Python's sources."""

from functools import partial

import jax.numpy as jnp
import optax
from flax import nnx

import jaxloss
from benchmarks.examples import data

SMALL = nnx.initializers.normal(0.02)


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images):
        return self.out(nnx.relu(self.hidden(images)))


class LanguageModel(nnx.Module):
    def __init__(self, rngs):
        self.bytes = nnx.Embed(256, 64, embedding_init=SMALL, rngs=rngs)
        self.positions = nnx.Embed(data.LENGTH, 64, embedding_init=SMALL, rngs=rngs)
        self.norm_in, self.norm_out = nnx.RMSNorm(64, rngs=rngs), nnx.RMSNorm(64, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.bytes(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        x += self.attention(self.norm_in(x), mask=nnx.make_causal_mask(tokens))
        return self.norm_out(x)


def digit_loss(model, images, labels):
    logits = model(images)
    loss, stats = jaxloss.cross_entropy(logits, labels, label_smoothing=0.1, return_stats=True)
    return loss, jnp.mean(stats.prediction == labels)


def next_byte_loss(model, tokens):
    labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-100)  # no byte follows
    table = model.bytes.embedding[...]  # [V, D]
    loss, stats = jaxloss.linear_cross_entropy(
        model(tokens), table, labels, vocab_axis=0, return_stats=True
    )
    return loss, jnp.mean(stats.prediction == labels, where=labels != -100)


@partial(nnx.jit, static_argnums=0)
def step(loss_fn, model, optimizer, *batch):
    metrics, grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, *batch)
    optimizer.update(model, grads)
    return metrics


def train(loss_fn, model, batches):
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    return [step(loss_fn, model, optimizer, *batch) for batch in batches]


def main(steps=200):
    rngs = nnx.Rngs(0)
    return {
        "digits": train(digit_loss, Classifier(rngs), data.digits(steps)),
        "Python": train(next_byte_loss, LanguageModel(rngs), data.python_sources(steps)),
    }


if __name__ == "__main__":
    data.show(main())
