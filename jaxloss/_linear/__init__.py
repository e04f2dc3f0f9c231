"""``hidden @ kernel``, whose logits are never held: token chunks, or blocks of the vocabulary."""
