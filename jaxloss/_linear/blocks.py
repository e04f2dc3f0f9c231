"""The loop over blocks of a product's columns."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def over_blocks(classes: int, block: int, step, combine, begin=lambda first: first) -> Any:
    """``combine(state, step(start, size))`` over all blocks but the first, which is short, and of
    which the state is made."""
    first = classes % block or block
    state = begin(step(0, first))
    if first == classes:
        return state

    def body(state, i):
        compute = jax.checkpoint(partial(step, size=block), prevent_cse=False)
        return combine(state, compute(first + i * block)), None

    return lax.scan(body, state, jnp.arange((classes - first) // block, dtype=jnp.int32))[0]
