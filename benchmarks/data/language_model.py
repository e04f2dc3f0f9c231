"""A small decoder-only transformer in Flax NNX, its output layer tied to its embedding."""

import jax
import jax.numpy as jnp
from flax import nnx

# A table this small starts a tied model at the loss of a uniform guess, log(V).
SMALL = nnx.initializers.normal(0.02)


class Block(nnx.Module):
    def __init__(self, dim: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.attention_norm = nnx.RMSNorm(dim, rngs=rngs)
        self.query_key_value = nnx.Linear(dim, 3 * dim, use_bias=False, rngs=rngs)
        self.attention_out = nnx.Linear(dim, dim, use_bias=False, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(dim, rngs=rngs)
        self.mlp_in = nnx.Linear(dim, 4 * dim, use_bias=False, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * dim, dim, use_bias=False, rngs=rngs)

    def __call__(self, x):
        by_head = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        qkv = jnp.split(self.query_key_value(self.attention_norm(x)), 3, axis=-1)
        q, k, v = (part.reshape(by_head) for part in qkv)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.reshape(x.shape))
        return x + self.mlp_out(nnx.gelu(self.mlp_in(self.mlp_norm(x))))


class LanguageModel(nnx.Module):
    """Token ids ``[..., T]`` to hidden states ``[..., T, D]``: the logits are the caller's."""

    def __init__(self, vocab: int, dim: int, layers: int, heads: int, length: int, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(vocab, dim, embedding_init=SMALL, rngs=rngs)
        self.positions = nnx.Embed(length, dim, embedding_init=SMALL, rngs=rngs)
        self.blocks = nnx.List([Block(dim, heads, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(dim, rngs=rngs)

    def __call__(self, ids):
        x = self.tokens(ids) + self.positions(jnp.arange(ids.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
