"""Losses of pairs as open_clip and big_vision write them, in jnp: the truth in float64."""

import jax
import jax.numpy as jnp


def clip_by_pair(x, y, logit_scale, where=None):
    """``ClipLoss`` of open_clip, one a pair, both directions; ``where[N, M]``: entries."""
    logits_per_image = logit_scale * x @ y.T
    if where is not None:
        logits_per_image = jnp.where(where, logits_per_image, -jnp.inf)
    logits_per_text = logits_per_image.T
    pairs = x.shape[0]

    def cross_entropy(logits):
        log_p = jax.nn.log_softmax(logits, axis=-1)
        return -jnp.diagonal(log_p)

    return (cross_entropy(logits_per_image) + cross_entropy(logits_per_text)[:pairs]) / 2


def one_way_by_row(x, y, logit_scale, where=None):
    """The images' half of ``clip_by_pair``; y may have further rows."""
    logits = logit_scale * x @ y.T
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
    return -jnp.diagonal(jax.nn.log_softmax(logits, axis=-1))


def siglip_by_row(x, y, logit_scale, logit_bias, where=None):
    """big_vision's ``-sum(log_sigmoid(m1_diag1 * logits), -1)``; open_clip's ``SigLipLoss`` is the
    mean of these."""
    logits = logit_scale * x @ y.T + logit_bias
    m1_diag1 = -jnp.ones_like(logits) + 2 * jnp.eye(*logits.shape, dtype=logits.dtype)
    each = jax.nn.log_sigmoid(m1_diag1 * logits)
    each = each if where is None else jnp.where(where, each, 0)
    return -jnp.sum(each, axis=-1)
