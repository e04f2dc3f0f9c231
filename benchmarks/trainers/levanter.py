"""Levanter: ``compute_next_token_loss`` of ``src/levanter/models/lm_model.py``.

Its named arrays are plain ones here. The head is the embedding table ``[Vocab, Embed]``, the mask a
number a token, and ``cross_entropy_block_size`` takes the vocabulary in blocks.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxloss

AXES = {"data": 8}
SPECS = {"hidden": P("data"), "head": P(None, "data"), "tokens": P("data"), "mask": P("data")}
TRAINED = ("hidden", "head")
Z, BLOCKS = 1e-4, 8  # z_loss_weight; so many of cross_entropy_block_size


def operands(b, length, d, v):
    key = jax.random.split(jax.random.key(0), 3)
    return {
        "hidden": jax.random.normal(key[0], (b, length, d)),
        "head": jax.random.normal(key[1], (v, d)) / d**0.5,
        "tokens": jax.random.randint(key[2], (b, length), 0, v),
        "mask": (jnp.arange(length) < length - 1 - jnp.arange(b)[:, None] % 3).astype(jnp.int32),
    }


def before(hidden, head, tokens, mask):
    logits = jnp.einsum("bte,ve->btv", hidden, head.astype(hidden.dtype)).astype(jnp.float32)
    target = jax.nn.one_hot(jnp.roll(tokens, -1, axis=1), head.shape[0])
    log_z = jax.nn.logsumexp(logits, axis=-1)
    losses = -jnp.sum((logits - log_z[..., None]) * target, axis=-1)
    losses = losses + Z * log_z**2
    counts = mask.at[:, -1].set(0) != 0
    loss = jnp.mean(losses, where=counts)
    return loss, {}


@functools.partial(jax.custom_vjp)
def _of_blocks(hidden, head, labels):
    return _of_blocks_forward(hidden, head, labels)[0]


def _block(hidden, head, labels, i):
    """The logits of a block, and its part of the one-hot labels."""
    size = head.shape[0] // BLOCKS
    part = lax.dynamic_slice_in_dim(head, i * size, size).astype(hidden.dtype)
    logits = jnp.einsum("bte,ve->btv", hidden, part).astype(jnp.float32)
    return part, logits, jax.nn.one_hot(labels - i * size, size)


def _of_blocks_forward(hidden, head, labels):
    def step(i, carry):
        of_label, log_z = carry
        _, logits, one_hot = _block(hidden, head, labels, i)
        of_label = of_label + jnp.sum(logits * one_hot, axis=-1)
        return of_label, jnp.logaddexp(log_z, jax.nn.logsumexp(logits, axis=-1))

    start = jnp.zeros(labels.shape), jnp.full(labels.shape, -jnp.inf)
    of_label, log_z = lax.fori_loop(0, BLOCKS, step, start)
    return (log_z - of_label, log_z), (hidden, head, labels, log_z)


def _of_blocks_backward(saved, cotangents):
    hidden, head, labels, log_z = saved
    of_loss, of_log_z = (c[..., None] for c in cotangents)

    def step(i, carry):
        d_hidden, d_head = carry
        part, logits, one_hot = _block(hidden, head, labels, i)
        p = jnp.exp(logits - log_z[..., None])
        slope = (of_loss * (p - one_hot) + of_log_z * p).astype(hidden.dtype)
        d_part = jnp.einsum("btv,bte->ve", slope, hidden).astype(head.dtype)
        d_head = lax.dynamic_update_slice_in_dim(d_head, d_part, i * part.shape[0], 0)
        return d_hidden + jnp.einsum("btv,ve->bte", slope, part), d_head

    return *lax.fori_loop(0, BLOCKS, step, (jnp.zeros_like(hidden), jnp.zeros_like(head))), None


_of_blocks.defvjp(_of_blocks_forward, _of_blocks_backward)


def in_parts(hidden, head, tokens, mask):
    """As ``cross_entropy_block_size`` does."""
    losses, log_z = _of_blocks(hidden, head, jnp.roll(tokens, -1, axis=1))
    counts = mask.at[:, -1].set(0) != 0
    return jnp.mean(losses + Z * log_z**2, where=counts), {}


def after(hidden, head, tokens, mask, implementation=None):
    counts = mask.at[:, -1].set(0) != 0
    loss = jaxloss.linear_cross_entropy(
        hidden,
        head,
        jnp.roll(tokens, -1, axis=1),
        vocab_axis=0,
        sample_weight=counts,
        z_loss=Z,
        dtype=hidden.dtype,
        token_axis_name="data",
        kernel_spec=P(None, "data"),
        implementation=implementation,
    )
    return loss, {}
