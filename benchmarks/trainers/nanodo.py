"""nanodo: ``get_default_loss_fn`` of ``nanodo/loss.py``.

The token that pads is 0, no target, and the embedding table is the head.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import jaxloss

AXES = {"data": 8}
SPECS = {"hidden": P("data"), "table": P(None, "data"), "tokens": P("data")}
TRAINED = ("hidden", "table")


def operands(b, length, d, v):
    key = jax.random.split(jax.random.key(0), 3)
    real = jnp.arange(length) < length - (jnp.arange(b)[:, None] % 4) * length // 8
    return {
        "hidden": jax.random.normal(key[0], (b, length, d)),
        "table": jax.random.normal(key[1], (v, d)) / d**0.5,
        "tokens": jnp.where(real, jax.random.randint(key[2], (b, length), 1, v), 0),
    }


def before(hidden, table, tokens):
    logits = hidden.astype(jnp.float32) @ table.T
    y = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    weights = (y != 0).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    loss = jnp.sum(losses * weights) / weights.sum()
    return loss, weights.sum()


def after(hidden, table, tokens, implementation=None):
    labels = jaxloss.next_token_labels(tokens, where=tokens != 0)
    loss = jaxloss.linear_cross_entropy(
        hidden.astype(jnp.float32),
        table,
        labels,
        vocab_axis=0,
        token_axis_name="data",
        kernel_spec=P(None, "data"),
        implementation=implementation,
    )
    return loss, jaxloss.total_weight(labels)
