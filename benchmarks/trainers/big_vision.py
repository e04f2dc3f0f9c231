"""big_vision: ``loss_fn`` of ``big_vision/trainers/proj/paligemma/train.py``.

Each caption counts the same, however long it is, and a caption without a token that counts adds 0
to the mean over the batch. The other losses of its trainers are pairs of functions below.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import jaxloss

AXES = {"data": 8}
SPECS = {"hidden": P("data"), "table": P("data"), "text": P("data"), "mask_loss": P("data")}
TRAINED = ("hidden", "table")


def operands(b, length, d, v):
    key = jax.random.split(jax.random.key(0), 3)
    at, row = jnp.arange(length), jnp.arange(b)[:, None]
    end = length - (row % 4) * length // 8
    # The suffix, behind a prefix of half the length; the last caption has none.
    counts = (at >= length // 2) & (at < end) & (row < b - 1)
    return {
        "hidden": jax.random.normal(key[0], (b, length, d)),
        "table": jax.random.normal(key[1], (v, d)) / d**0.5,
        "text": jax.random.randint(key[2], (b, length), 0, v),
        "mask_loss": counts.astype(jnp.float32),
    }


def before(hidden, table, text, mask_loss):
    logits = (hidden[:, :-1] @ table.T).astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    targets = jax.nn.one_hot(text[:, 1:], table.shape[0])
    of_tokens = jnp.sum(log_p * targets, axis=-1) * mask_loss[:, 1:]
    counts = jnp.sum(mask_loss[:, 1:], axis=-1)
    of_captions = -jnp.sum(of_tokens, axis=-1) / jnp.clip(counts, 1)
    loss = jnp.mean(of_captions)
    return loss, jnp.mean(counts)


def after(hidden, table, text, mask_loss, implementation=None):
    labels = jaxloss.next_token_labels(text, where=mask_loss != 0)
    total = jaxloss.linear_cross_entropy(
        hidden,
        table,
        labels,
        vocab_axis=0,
        sample_weight=jaxloss.sequence_weight(labels),
        reduction="sum",
        token_axis_name="data",
        kernel_spec=P("data"),
        implementation=implementation,
    )
    counts = jnp.sum(labels != -100, axis=-1)
    loss = total / len(text)
    return loss, jnp.mean(counts)
