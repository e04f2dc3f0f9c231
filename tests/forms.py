"""The forms of one loss: of whole rows of logits, and of a product by each of its schedules.

A test that takes the fixture ``form`` says once what holds for each of them; ``schedule`` is what a
test of a product takes. A new schedule is one more name in ``SCHEDULES``.
"""

from dataclasses import dataclass

import jax.numpy as jnp

import jaxloss

SCHEDULES = ("token_chunks", "vocab_blocks")


@dataclass(frozen=True)
class Form:
    """``schedule``: None for whole rows. Their logits are an array, and no chunk is taken of it."""

    schedule: str | None = None

    def of_product(self, hidden, kernel, labels, *, chunk_size=2, **options):
        """cross_entropy of ``hidden @ kernel``."""
        if self.schedule is None:
            logits = jnp.dot(hidden, kernel, precision="highest")
            return jaxloss.cross_entropy(logits, labels, **options)
        return jaxloss.linear_cross_entropy(
            hidden, kernel, labels, implementation=self.schedule, chunk_size=chunk_size, **options
        )

    def __call__(self, logits, labels, *, chunk_size=2, **options):
        """cross_entropy. As a product the logits are exact: each is one product with 1, and sums
        with 0."""
        if self.schedule is None:
            return jaxloss.cross_entropy(logits, labels, **options)
        eye = jnp.eye(logits.shape[-1], dtype=logits.dtype)
        return self.of_product(logits, eye, labels, chunk_size=chunk_size, **options)

    def token_stats(self, logits, labels, *, chunk_size=2, **options):
        if self.schedule is None:
            return jaxloss.token_stats(logits, labels, **options)
        eye = jnp.eye(logits.shape[-1], dtype=logits.dtype)
        return jaxloss.linear_token_stats(
            logits, eye, labels, implementation=self.schedule, chunk_size=chunk_size, **options
        )


WHOLE = Form()
FORMS = {"logits": WHOLE, **{name: Form(name) for name in SCHEDULES}}


def two_steps(x, y, **options):
    return jaxloss.nll_loss(jaxloss.log_softmax(x), y, **options)
