"""``hidden @ kernel``, whose logits are never held: the schedules and their memory."""
