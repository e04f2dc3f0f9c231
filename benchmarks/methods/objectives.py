"""Objectives of reinforcement learning and distillation: by jaxloss, and by their formulas.

The formulas take the logits of all tokens at once. In float64 they are the truth, in float32 what
users of JAX alone write.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxloss

LOW, HIGH, HIGH_DAPO, BETA, BETA_DPO, BETA_JSD = 0.2, 0.2, 0.28, 0.04, 0.1, 0.5
SETTINGS = ("flat", "confident", "close")


class Batch(NamedTuple):
    """B answers of T tokens; of preferences the first half of them was chosen."""

    hidden: Any  # [B, T, D]
    kernel: Any  # [D, V]
    ref_hidden: Any
    ref_kernel: Any
    labels: Any  # [B, T], -100 where no token counts
    before: Any  # [B, T]: the sampler's log-probabilities
    advantage: Any  # [B]


def batch_of(
    shape: tuple[int, int, int, int], setting: str = "flat", full: bool = True, seed: int = 0
) -> Batch:
    """``full``: all tokens count; else answers have lengths from T / 4 to T.

    ``"confident"``: the label's logit leads by 8 to 30. ``"close"``: the reference is 1e-3 from
    the model.
    """
    b, t, d, v = shape
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(d, v)) / math.sqrt(d)
    hidden = rng.normal(size=(b, t, d))
    labels = rng.integers(0, v, (b, t))
    if setting == "confident":
        column = kernel[:, labels]  # [D, B, T]
        lead = np.linspace(8, 30, b * t).reshape(b, t)
        toward = np.moveaxis(column / np.sum(column**2, axis=0) * lead, 0, -1)
        hidden = 0.1 * hidden + toward
    apart = 1e-3 if setting == "close" else 0.1
    ref_hidden = hidden + apart * rng.normal(size=hidden.shape)
    ref_kernel = kernel if setting == "close" else kernel + 0.01 * rng.normal(size=kernel.shape)
    ratio = 0.2 * rng.normal(size=(b, t))
    lengths = t if full else np.linspace(t // 4, t, b).astype(int)[:, None]
    labels = np.where(np.arange(t) < lengths, labels, -100)
    f32 = partial(np.asarray, dtype=np.float32)
    arrays = (f32(x) for x in (hidden, kernel, ref_hidden, ref_kernel))
    batch = Batch(*arrays, labels.astype(np.int32), f32(ratio), f32(rng.normal(size=b)))
    own = jaxloss.linear_token_stats(batch.hidden, batch.kernel, batch.labels).log_prob
    batch = batch._replace(before=f32(np.where(labels >= 0, np.asarray(own) + ratio, 0)))
    return Batch(*(jnp.asarray(x) for x in batch))


# By jaxloss.


def _clipped(log_prob, before, advantage, high):
    ratio = jnp.exp(log_prob - before)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - LOW, 1 + high) * advantage)


def _k3(apart):
    return jnp.expm1(apart) - apart


def _tokens(x: Batch):
    return x.before, jnp.broadcast_to(x.advantage[:, None], x.labels.shape)


def grpo(x: Batch):
    def objective(stats, reference, before, advantage):
        distance = _k3(reference.log_prob - stats.log_prob)
        return _clipped(stats.log_prob, before, advantage, HIGH) + BETA * distance

    reference, weight = (x.ref_hidden, x.ref_kernel), jaxloss.sequence_weight(x.labels)
    return jaxloss.linear_stats_loss(
        objective, x.hidden, x.kernel, x.labels, *_tokens(x), reference=reference,
        sample_weight=weight,
    )  # fmt: skip


def dapo(x: Batch):
    def objective(stats, before, advantage):
        return _clipped(stats.log_prob, before, advantage, HIGH_DAPO)

    return jaxloss.linear_stats_loss(objective, x.hidden, x.kernel, x.labels, *_tokens(x))


def entropy(x: Batch):
    return jaxloss.linear_stats_loss(lambda stats: stats.entropy, x.hidden, x.kernel, x.labels)


def jsd(x: Batch):
    return jaxloss.linear_kl_divergence(
        x.hidden, x.kernel, x.ref_hidden, x.ref_kernel, divergence="jensen_shannon",
        beta=BETA_JSD, where=x.labels >= 0,
    )  # fmt: skip


def _dpo(now, reference):
    gain = (now - reference).sum(axis=-1).reshape(2, -1)
    return -jax.nn.log_sigmoid(BETA_DPO * (gain[0] - gain[1])).mean()


def dpo(x: Batch):
    now = jaxloss.linear_token_stats(x.hidden, x.kernel, x.labels).log_prob
    reference = jaxloss.linear_token_stats(x.ref_hidden, x.ref_kernel, x.labels).log_prob
    return _dpo(now, reference)


# By the formulas.


def _log_probs(hidden, kernel):
    return jax.nn.log_softmax(hidden @ kernel, axis=-1)


def _at(log_probs, labels):
    index = jnp.maximum(labels, 0)[..., None]
    return jnp.where(labels >= 0, jnp.take_along_axis(log_probs, index, axis=-1)[..., 0], 0)


def _mean(losses, labels):
    return jnp.sum(jnp.where(labels >= 0, losses, 0)) / jnp.sum(labels >= 0)


def plain_grpo(x: Batch):
    now = _at(_log_probs(x.hidden, x.kernel), x.labels)
    reference = _at(_log_probs(x.ref_hidden, x.ref_kernel), x.labels)
    losses = _clipped(now, *_tokens(x), HIGH) + BETA * _k3(reference - now)
    counts = x.labels >= 0
    return jnp.mean(jnp.sum(jnp.where(counts, losses, 0), axis=1) / jnp.sum(counts, axis=1))


def plain_dapo(x: Batch):
    now = _at(_log_probs(x.hidden, x.kernel), x.labels)
    return _mean(_clipped(now, *_tokens(x), HIGH_DAPO), x.labels)


def plain_entropy(x: Batch):
    log_p = _log_probs(x.hidden, x.kernel)
    return _mean(-jnp.sum(jnp.exp(log_p) * log_p, axis=-1), x.labels)


def plain_jsd(x: Batch):
    q, p = _log_probs(x.hidden, x.kernel), _log_probs(x.ref_hidden, x.ref_kernel)
    m = jnp.logaddexp(p + math.log(BETA_JSD), q + math.log(1 - BETA_JSD))
    kl = lambda u: jnp.sum(jnp.exp(u) * (u - m), axis=-1)  # noqa: E731
    return _mean(BETA_JSD * kl(p) + (1 - BETA_JSD) * kl(q), x.labels)


def plain_dpo(x: Batch):
    now = _at(_log_probs(x.hidden, x.kernel), x.labels)
    return _dpo(now, _at(_log_probs(x.ref_hidden, x.ref_kernel), x.labels))


class Objective(NamedTuple):
    ours: Callable[[Batch], Any]
    plain: Callable[[Batch], Any]
    products: int  # that a value with both gradients needs
    settings: tuple[str, ...] = SETTINGS


OBJECTIVES = {
    "GRPO": Objective(grpo, plain_grpo, 4),
    "DAPO": Objective(dapo, plain_dapo, 3, SETTINGS[:2]),
    "entropy": Objective(entropy, plain_entropy, 3, SETTINGS[:2]),
    "JSD": Objective(jsd, plain_jsd, 4),
    "DPO": Objective(dpo, plain_dpo, 4),
}


def with_gradients(loss: Callable[[Batch], Any]) -> Callable:
    """Of the arrays of a batch: the value, and its gradients in hidden and kernel."""
    return jax.value_and_grad(lambda *arrays: loss(Batch(*arrays)), (0, 1))


def truth(name: str, batch: Batch) -> Any:
    """By the formula in float64, of the float32 arrays."""
    with jax.enable_x64(True):
        wide = (np.asarray(x) for x in batch)
        wide = (x.astype(np.float64) if x.dtype == np.float32 else x for x in wide)
        return jax.tree.map(np.asarray, jax.jit(with_gradients(OBJECTIVES[name].plain))(*wide))
