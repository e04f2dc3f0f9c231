"""``jax.jit`` as every function under a public one has it: arrays by position, options by name."""

import inspect
from collections.abc import Callable
from typing import Any

import jax


def jit(function: Callable[..., Any]) -> Any:
    """Keyword-only arguments are static."""
    return jax.jit(function, static_argnames=inspect.getfullargspec(function).kwonlyargs)
