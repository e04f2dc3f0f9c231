"""MaxText: ``loss_fn`` of ``src/maxtext/trainers/pre_train/train.py``.

The targets are shifted already, packed sequences are named by ``targets_segmentation`` with 0 for
padding, and ``num_vocab_tiling`` takes the tokens in parts.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxloss
from benchmarks.trainers.formulas import one_hot_cross_entropy

AXES = {"data": 1, "fsdp": 4, "tensor": 2}
TOKENS = P(("data", "fsdp"))
SPECS = {
    "hidden": TOKENS,
    "kernel": P("fsdp", "tensor"),
    "targets": TOKENS,
    "segmentation": TOKENS,
}
TRAINED = ("hidden", "kernel")
Z, EPS, TILES = 1e-4, 1e-8, 4  # z_loss_multiplier; of the mean; num_vocab_tiling


def operands(b, length, d, v):
    key = jax.random.split(jax.random.key(0), 3)
    ends = jnp.array([length, length - length // 8])[jnp.arange(b) % 2]  # some rows are padded
    at = jnp.arange(length)
    return {
        "hidden": jax.random.normal(key[0], (b, length, d)),
        "kernel": jax.random.normal(key[1], (d, v)) / d**0.5,  # float32, as its parameters are
        "targets": jax.random.randint(key[2], (b, length), 0, v),
        "segmentation": jnp.where(at < ends[:, None], 1 + (at >= length // 2), 0),
    }


def before(hidden, kernel, targets, segmentation):
    counts = segmentation != 0
    logits = (hidden @ kernel.astype(hidden.dtype)).astype(jnp.float32)
    logits = lax.with_sharding_constraint(logits, P(("data", "fsdp"), None, "tensor"))
    one_hot = jax.nn.one_hot(targets, kernel.shape[1])
    losses, z_losses = one_hot_cross_entropy(logits, one_hot, Z)
    loss = jnp.sum(losses * counts) / (jnp.sum(counts) + EPS)
    z_loss = jnp.sum(z_losses * counts) / (jnp.sum(counts) + EPS)
    return loss, z_loss


def in_parts(hidden, kernel, targets, segmentation):
    """As ``num_vocab_tiling`` does: the logits of a tile once more in the backward pass."""

    @jax.checkpoint
    def tile(sums, xs):
        hidden, targets, counts = xs
        logits = (hidden @ kernel.astype(hidden.dtype)).astype(jnp.float32)
        one_hot = jax.nn.one_hot(targets, kernel.shape[1])
        losses = one_hot_cross_entropy(logits, one_hot, Z)
        return tuple(s + jnp.sum(each * counts) for s, each in zip(sums, losses, strict=True)), None

    counts = segmentation != 0
    tiles = [x.reshape(TILES, -1, *x.shape[2:]) for x in (hidden, targets, counts)]
    sums, _ = lax.scan(tile, (jnp.float32(0), jnp.float32(0)), tuple(tiles))
    loss, z_loss = (s / (jnp.sum(counts) + EPS) for s in sums)
    return loss, z_loss


def after(hidden, kernel, targets, segmentation, implementation=None):
    counts = segmentation != 0
    loss, stats = jaxloss.linear_cross_entropy(
        hidden,
        kernel,
        targets,
        sample_weight=counts,
        z_loss=Z,
        empty_mean=0.0,
        dtype=hidden.dtype,
        return_stats=True,
        token_axis_name=("data", "fsdp"),
        kernel_spec=P("fsdp", "tensor"),
        implementation=implementation,
    )
    z_loss = Z * jnp.sum(stats.logsumexp**2, where=counts) / (jnp.sum(counts) + EPS)
    return loss, z_loss
