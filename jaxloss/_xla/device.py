"""What there is to compute on, where code goes by it; and ``jax.jit`` as the package has it."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxloss._xla import mesh


def on_one_device() -> bool:
    # Sharded classes must not be reshaped or indexed (they would be gathered), and whether they
    # are sharded is not known while tracing: one device leaves no doubt. The mesh of a program that
    # is compiled for other devices than this process has may be larger.
    return _devices() == 1


def _devices() -> int:
    return max(jax.device_count(), jax.sharding.get_abstract_mesh().size)


def devices_of_a_partitioner(x: Any = None) -> int:
    """Over how many devices a partitioner may split an array that is computed here: inside of
    ``shard_map`` those along the axes that it leaves out.

    ``x``: an array whose type may name its mesh, which may have fewer devices than the process.
    """
    if not mesh.manual_axes():
        over = None if x is None else mesh.of_arrays(x)
        return _devices() if over is None else over.size
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[name] for name in mesh.other_axes())


def is_whole() -> bool:
    """Whether arrays are what one device holds. No kernel is for what a partitioner may split.

    Inside of ``shard_map`` over some of the mesh's axes a partitioner may split them over the
    others. JAX refuses kernels for TPUs there even where the others have one device.
    """
    return not mesh.other_axes() if mesh.manual_axes() else on_one_device()


def is_hopper() -> bool:
    """Whether the default device is a GPU that the kernels are for: an H100, an H200."""
    if jax.default_backend() != "gpu":
        return False
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"


def is_recent_tpu() -> bool:
    """Whether the default device is a TPU that the kernels are for: tiles do not fit into a v4."""
    if jax.default_backend() != "tpu":
        return False
    return not jax.devices()[0].device_kind.startswith(("TPU v2", "TPU v3", "TPU v4"))


def jit(function: Callable[..., Any]) -> Any:
    """``jax.jit``, to which keyword-only arguments are static.

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
    """Whether JAX records operations now, for a program. An eager ``grad`` or ``vmap`` hands over
    tracers too, but runs each operation."""
    # For accelerators the jit stays: without it XLA:TPU (JAX 0.10) does not see that the kernel's
    # call of a forward pass and that of its backward pass are the same, and runs both.
    if jax.default_backend() != "cpu":
        return False
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves(args)):
        return False
    return isinstance(jnp.zeros(()), Tracer)
