"""tunix: ``_default_loss_fn`` of ``tunix/sft/peft_trainer.py``, with Gemma 2's capped logits.

The loss is a sum, and its denominator apart: the trainer divides, over all steps of an accumulated
gradient. With LoRA the embedding table, which is the head too, is frozen.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxloss

AXES = {"fsdp": 4, "tp": 2}
SPECS = {"hidden": P("fsdp"), "table": P("tp", "fsdp"), "tokens": P("fsdp"), "mask": P("fsdp")}
TRAINED = ("hidden",)
CAP = 30.0


def operands(b, length, d, v):
    key = jax.random.split(jax.random.key(0), 3)
    prompt, end = length // 3, length - length // 4
    at = jnp.arange(length)
    return {
        "hidden": jax.random.normal(key[0], (b, length, d)),
        "table": jax.random.normal(key[1], (v, d)) / d**0.5,
        "tokens": jax.random.randint(key[2], (b, length), 0, v),
        # The answer: neither the prompt nor the padding, whose lengths differ by row.
        "mask": (at >= prompt) & (at < end + jnp.arange(b)[:, None] % 2),
    }


def before(hidden, table, tokens, mask):
    logits = (hidden @ table.T).astype(jnp.float32)
    logits = jnp.tanh(logits / CAP) * CAP
    logits = lax.with_sharding_constraint(logits[:, :-1], P("fsdp", None, "tp"))
    one_hot = jax.nn.one_hot(tokens[:, 1:], table.shape[0])
    one_hot = one_hot * mask[:, 1:, None]
    loss = -jnp.sum(jax.nn.log_softmax(logits) * one_hot)
    denominator = jnp.sum(mask[:, 1:])
    return loss, denominator


def after(hidden, table, tokens, mask, implementation=None):
    labels = jaxloss.next_token_labels(tokens, where=mask)
    loss = jaxloss.linear_cross_entropy(
        hidden,
        table,
        labels,
        vocab_axis=0,
        logit_softcap=CAP,
        reduction="sum",
        token_axis_name="fsdp",
        kernel_spec=P("tp", "fsdp"),
        implementation=implementation,
    )
    denominator = jaxloss.total_weight(labels)
    return loss, denominator
