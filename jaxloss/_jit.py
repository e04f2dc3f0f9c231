"""``jax.jit`` as every function under a public one has it: arrays by position, options by name."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def jit(function: Callable[..., Any]) -> Any:
    """Keyword-only arguments are static.

    A call that is part of a larger program is not jitted by itself: its value would be traced
    first, and once more for its derivative.
    """
    compiled = jax.jit(function, static_argnames=inspect.getfullargspec(function).kwonlyargs)
    named = jax.named_scope(function.__name__)(function)

    @functools.wraps(function)
    def call(*args, **options):
        return (named if _is_part_of_a_program(args) else compiled)(*args, **options)

    return call


def _is_part_of_a_program(args: Any) -> bool:
    """Whether operations are recorded now, not run. Of an eager ``grad`` or ``vmap`` they are run,
    though its arrays are tracers too."""
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args)):
        return False
    return isinstance(jnp.zeros(()), jax.core.Tracer)
