"""EasyDeL: ``ForCausalLMLoss`` of ``easydel/infra/loss_utils.py``, with the default ``LossConfig``.

Logits and labels are shifted in the loss. It divides by the sum of the attention mask, which counts
a prompt whose labels are -100 too. The logits are held, and read by blocks of their vocabulary;
``lmhead_chunksize`` takes the head in parts of a sequence instead.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxloss

AXES = {"dp": 2, "fsdp": 2, "tp": 2}
BATCH = P(("dp", "fsdp"))
SPECS = {"hidden": BATCH, "kernel": P("fsdp", "tp"), "labels": BATCH, "attention_mask": BATCH}
TRAINED = ("hidden", "kernel")
Z, BLOCKS, CHUNKS = 1e-4, 4, 4  # z_loss; blocks of the vocabulary; chunks of the sequence


def operands(b, length, d, v):
    key = jax.random.split(jax.random.key(0), 3)
    real = jnp.arange(length) < length - (jnp.arange(b)[:, None] % 4) * length // 16
    labels = jax.random.randint(key[2], (b, length), 0, v)
    return {
        "hidden": jax.random.normal(key[0], (b, length, d)),
        "kernel": jax.random.normal(key[1], (d, v)) / d**0.5,
        "labels": jnp.where(jnp.arange(length) < length // 8, -100, labels),  # a prompt
        "attention_mask": jnp.broadcast_to(real, (b, length)).astype(jnp.int32),
    }


def _sums(logits, labels, weights):
    """The summed loss, the weight, and the tokens whose label is the likeliest class."""
    logits = logits.reshape(-1, logits.shape[-1]).astype(jnp.float32)
    labels, weights = labels.reshape(-1), weights.reshape(-1).astype(jnp.float32)
    weights = weights * (labels != -100)
    labels = jnp.where(labels != -100, labels, 0)
    size = logits.shape[-1] // BLOCKS

    @jax.checkpoint
    def block(start, carry):
        log_z, of_label, best, prediction = carry
        x = lax.dynamic_slice_in_dim(logits, start, size, axis=1)
        largest = jnp.max(x, axis=1)
        own = (labels >= start) & (labels < start + size)
        at = jnp.where(own, labels - start, 0)
        of_label = of_label + jnp.where(own, jnp.take_along_axis(x, at[:, None], 1)[:, 0], 0)
        prediction = jnp.where(largest > best, start + jnp.argmax(x, axis=1), prediction)
        log_z = jnp.logaddexp(log_z, jax.nn.logsumexp(x, axis=1))
        return log_z, of_label, jnp.maximum(best, largest), prediction

    lowest = jnp.full(labels.shape, -jnp.inf)
    carry = lowest, jnp.zeros(labels.shape), lowest, jnp.zeros(labels.shape, jnp.int32)
    step = lambda i, carry: block(i * size, carry)  # noqa: E731
    log_z, of_label, _, prediction = lax.fori_loop(0, BLOCKS, step, carry)
    losses = log_z - of_label + Z * log_z**2
    right = (prediction == labels) * weights
    return jnp.sum(losses * weights), jnp.sum(weights), jnp.sum(right)


def before(hidden, kernel, labels, attention_mask):
    logits = lax.with_sharding_constraint(hidden @ kernel, P(("dp", "fsdp"), None, "tp"))
    total, weight, right = _sums(logits[:, :-1], labels[:, 1:], attention_mask[:, 1:])
    loss = total / jnp.sum(attention_mask[:, 1:])
    accuracy = right / jnp.maximum(weight, 1e-8)
    return loss, accuracy


def in_parts(hidden, kernel, labels, attention_mask):
    """As ``lmhead_chunksize`` does: the last token is padding of the last part."""
    labels = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    weights = jnp.pad(attention_mask[:, 1:], ((0, 0), (0, 1)))
    length = hidden.shape[1] // CHUNKS

    @jax.checkpoint
    def part(start):
        cut = (lax.dynamic_slice_in_dim(x, start, length, 1) for x in (hidden, labels, weights))
        h, y, w = cut
        return _sums(h @ kernel, y, w)

    def step(i, sums):
        return tuple(a + b for a, b in zip(sums, part(i * length), strict=True))

    zeros = (jnp.float32(0),) * 3
    total, weight, right = lax.fori_loop(0, CHUNKS, step, zeros)
    return total / jnp.sum(weights), right / jnp.maximum(weight, 1e-8)


def after(hidden, kernel, labels, attention_mask, implementation=None):
    labels = jaxloss.next_token_labels(labels, where=attention_mask != 0)
    total, stats = jaxloss.linear_cross_entropy(
        hidden,
        kernel,
        labels,
        z_loss=Z,
        reduction="sum",
        return_stats=True,
        token_axis_name=("dp", "fsdp"),
        kernel_spec=P("fsdp", "tp"),
        implementation=implementation,
    )
    loss = total / jnp.sum(attention_mask[:, 1:])
    accuracy = jnp.mean(stats.prediction == labels, where=labels != -100)
    return loss, accuracy
