"""token_stats and linear_token_stats: what a model says of tokens, without a loss."""

from __future__ import annotations

from jax import lax
from jax.typing import ArrayLike

from jaxloss._cross_entropy import losses_of_logits
from jaxloss._implementation import Implementation
from jaxloss._labels import TopKLabels
from jaxloss._linear_cross_entropy import losses_of_product
from jaxloss._mesh import AxisName
from jaxloss._terms import TokenStats


def token_stats(
    logits: ArrayLike,
    labels: ArrayLike | TopKLabels,
    *,
    axis: int | tuple[int, ...] = -1,
    num_classes: int | None = None,
    ignore_index: int | None = -100,
    temperature: ArrayLike | None = 1.0,
    logit_softcap: float | None = None,
    where: ArrayLike | None = None,
    vocab_axis_name: AxisName | None = None,
) -> TokenStats:
    r"""Each token's log-probability, log-sum-exp, entropy, prediction, confidence and rank.

    With ``z = x / T`` the logits (capped first, if asked for) over the temperature,

    .. math:: \log p_y = z_y - \mathrm{lse}(z), \qquad p = e^{z - \mathrm{lse}(z)}, \qquad
              H = -\sum_j p_j \log p_j

    What policy gradients are made of: the log-probabilities of the tokens that were sampled, at the
    temperature they were sampled at, and the entropy for a bonus. :func:`cross_entropy` with
    ``return_stats=True`` returns the same beside a loss.

    Args:
      logits: ``[..., C]``, C at ``axis``; a floating dtype.
      labels: the tokens in question: class indices (an integer dtype, the shape of ``logits``
        without ``axis``), class probabilities (floating, the shape of ``logits``), or
        :class:`TopKLabels`.
      axis, num_classes, ignore_index, where, vocab_axis_name: as in :func:`cross_entropy`.
      temperature: ``T > 0``, what the logits are divided by: a Python number, or a scalar array,
        which may be traced and is differentiable (out of range it makes the statistics NaN); None
        is 1. The logits' differences are divided, so that an offset that they share costs no
        digits. An array costs a float32 copy of the logits.
      logit_softcap: ``cap > 0``: ``cap * tanh(logits / cap)`` before the temperature.

    Returns:
      :class:`TokenStats`, each shaped as the losses: float32 (float64 for float64 logits) and
      int32. A token that does not count has 0 in the floats and -1 in the integers.

    Raises:
      TypeError, ValueError: as :func:`cross_entropy`; or ``temperature`` is not positive.

    ``log_prob``, ``logsumexp`` and ``entropy`` are differentiable in ``logits`` (and in
    probabilities as labels), in forward and reverse mode to any order. The backward pass keeps the
    logits, the labels and a few numbers a row.

    Example: the clipped objective of PPO.

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> logits = jax.random.normal(jax.random.key(0), (3, 5))
      >>> actions, advantages = jnp.array([1, 4, 0]), jnp.array([1.0, -0.5, 2.0])
      >>> old = jaxloss.token_stats(logits + 0.1, actions, temperature=0.7).log_prob
      >>> def objective(logits):
      ...     stats = jaxloss.token_stats(logits, actions, temperature=0.7)
      ...     ratio = jnp.exp(stats.log_prob - old)
      ...     clipped = jnp.clip(ratio, 0.8, 1.2)
      ...     return jnp.mean(jnp.minimum(ratio * advantages, clipped * advantages))
      >>> print(round(float(objective(logits)), 4))
      0.8333

    Source: the definitions; J. Schulman et al., "Proximal Policy Optimization Algorithms" (2017)
    for their use.
    """
    return losses_of_logits(
        "token_stats",
        logits,
        labels,
        axis=axis,
        num_classes=num_classes,
        ignore_index=ignore_index,
        temperature=temperature,
        logit_softcap=logit_softcap,
        where=where,
        reduction="none",
        vocab_axis_name=vocab_axis_name,
        return_stats=True,
    )[1]


def linear_token_stats(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | TopKLabels,
    *,
    bias: ArrayLike | None = None,
    vocab_axis: int = -1,
    num_classes: int | None = None,
    ignore_index: int | None = -100,
    temperature: ArrayLike | None = 1.0,
    logit_softcap: float | None = None,
    where: ArrayLike | None = None,
    vocab_axis_name: AxisName | None = None,
    chunk_size: int | None = None,
    precision: lax.PrecisionLike = None,
    implementation: Implementation | None = None,
) -> TokenStats:
    r"""``token_stats(hidden @ kernel + bias, labels, ...)``, a chunk of the logits at a time.

    .. math:: \log p_y = z_y - \mathrm{lse}(z), \qquad z = (h K + b) / T

    Args:
      hidden: ``[..., D]``, a floating dtype.
      kernel: ``[D, V]``, or ``[V, D]`` with ``vocab_axis=0``; the dtype of ``hidden``.
      labels, bias, vocab_axis, num_classes, ignore_index, logit_softcap, where, vocab_axis_name,
        chunk_size, precision, implementation: as in :func:`linear_cross_entropy`.
      temperature: as in :func:`token_stats`; an array needs ``"token_chunks"``.

    Returns:
      :class:`TokenStats`, each shaped as ``hidden`` without its last axis.

    Raises:
      TypeError, ValueError: as :func:`linear_cross_entropy`; or ``temperature`` is not positive.

    One matrix product, and four where ``hidden`` and ``kernel`` are differentiated too: the
    backward pass computes each chunk's logits again, as with ``reduction="none"``. Tokens that fit
    into one chunk have all their logits held; with ``implementation="vocab_blocks"`` a block of
    them is. There ``rank`` takes a product more; under ``jit`` it is not computed where it is
    not used. Tokens whose label is ignored (the prompt) are not computed. Differentiable as
    :func:`linear_cross_entropy`; sharded operands too are as there.

    Example: log-probabilities of an answer, the prompt being ignored.

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> hidden = jax.random.normal(jax.random.key(0), (2, 6, 4))
      >>> kernel = jax.random.normal(jax.random.key(1), (4, 10))
      >>> answer = jnp.array([[-100, -100, 1, 2, 3, 4], [-100, 5, 6, -100, -100, -100]])
      >>> stats = jaxloss.linear_token_stats(hidden, kernel, answer)
      >>> of_sequence = stats.log_prob.sum(axis=-1)  # ignored tokens are 0
      >>> whole = jaxloss.cross_entropy(hidden @ kernel, answer, reduction="sum")
      >>> bool(jnp.allclose(-of_sequence.sum(), whole))
      True

    Source: as :func:`token_stats` and :func:`linear_cross_entropy`.
    """
    return losses_of_product(
        "linear_token_stats",
        hidden,
        kernel,
        labels,
        bias=bias,
        vocab_axis=vocab_axis,
        num_classes=num_classes,
        ignore_index=ignore_index,
        temperature=temperature,
        logit_softcap=logit_softcap,
        where=where,
        reduction="none",
        vocab_axis_name=vocab_axis_name,
        return_stats=True,
        chunk_size=chunk_size,
        precision=precision,
        implementation=implementation,
    )[1]
