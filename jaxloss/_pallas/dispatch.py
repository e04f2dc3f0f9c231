"""When a kernel runs: every rule, and the only file that asks for one.

A rule is told shapes and dtypes, and what a call asks for by name; it answers with the kernel's
functions, or None where XLA's form is to run. Each kernel's file says which shapes have tiles
(``takes``). Pallas, a third of the whole import, is imported by the first call that takes a kernel.

=======================  =====================================  ==================================
operation                on a Hopper GPU                        on a TPU v5 or later
=======================  =====================================  ==================================
:func:`row_sums`         whole tiles of 128 classes; float32    -
                         only of logits that are an array
:func:`row_gradient`     the same, of 16 bits                   -
:func:`one_pass`         of 16 bits, few classes                bfloat16, rows by the sixteen
:func:`product_parts`    class indices of bfloat16 operands     the same
``product_gradient``     -                                      with the block's parts
=======================  =====================================  ==================================

No kernel runs where a partitioner may still split its operands (``device.is_whole``).
"""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxloss._types import Implementation
from jaxloss._xla import device
from jaxloss._xla.indexing import has_open_size

KERNELS = ("mosaic_tpu", "mosaic_gpu")


def _have_tiles_on_a_gpu(logits: Array) -> bool:
    return (
        device.is_hopper()
        and device.is_whole()
        and not has_open_size(logits)
        and logits.shape[-1] % 128 == 0
        and logits.dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
    )


def _have_tiles_on_a_tpu(logits: Array) -> bool:
    """The axis before the classes ends where a register does: otherwise XLA makes one axis of rows
    by copies, and takes minutes to compile those of many classes."""
    return (
        device.is_recent_tpu()
        and device.is_whole()
        and not has_open_size(logits)
        and logits.ndim > 1
        and logits.shape[-2] % 16 == 0
        and logits.dtype == jnp.bfloat16
    )


def row_sums(logits: Array, plain: bool, pallas_bytes: int) -> Any:
    """``rows_gpu.max_and_sum``, or None. ``plain``: nothing is masked, capped or scaled.

    ``pallas_bytes``: the widest logits that a kernel may read. 4: they are an array whatever reads
    them, as a product is. 2: in float32 they may be narrow ones that were widened. 0: their rows do
    not lie in one piece. What XLA reads as it is, a kernel would have copied first.
    """
    if not plain or logits.dtype.itemsize > pallas_bytes or not _have_tiles_on_a_gpu(logits):
        return None
    from jaxloss._pallas import rows_gpu

    return rows_gpu.max_and_sum


def row_gradient(logits: Array) -> Any:
    """``rows_gpu.slope``, or None. In 32 bits XLA reads and writes as fast as the memory allows."""
    if logits.dtype.itemsize != 2 or not _have_tiles_on_a_gpu(logits):
        return None
    from jaxloss._pallas import rows_gpu

    return rows_gpu.slope


def one_pass_takes(logits: Array) -> bool:
    """Whether there is a kernel for a sum of losses of logits[..., C] with its gradient. Of 16 bits
    alone, as :func:`row_gradient`."""
    if logits.dtype.itemsize != 2:
        return False
    if not (_have_tiles_on_a_gpu(logits) or _have_tiles_on_a_tpu(logits)):
        return False
    kernels, _ = one_pass()
    return kernels.takes(prod(logits.shape[:-1]), logits.shape[-1])


def one_pass() -> tuple[Any, str]:
    """The file of the kernels for this backend, and its platform."""
    if jax.default_backend() == "tpu":
        from jaxloss._pallas import one_pass_tpu

        return one_pass_tpu, "tpu"
    from jaxloss._pallas import one_pass_gpu

    return one_pass_gpu, "cuda"


def product_kernel() -> Implementation | None:
    """The name of the kernel of ``hidden @ kernel`` for this backend."""
    if jax.default_backend() == "tpu":
        return "mosaic_tpu"
    return "mosaic_gpu" if device.is_hopper() else None


def product_refusals(name: str, dtype: Any, beyond: dict[str, bool]) -> list[str]:
    """Why the kernel ``name`` cannot take a call, in its user's words. ``beyond``: what it has no
    form of, and whether the call asks for that."""
    backend, chip = jax.default_backend(), jax.devices()[0].device_kind
    old = not (device.is_recent_tpu() if name == "mosaic_tpu" else device.is_hopper())
    other = backend != name.removeprefix("mosaic_")
    cases = {
        f"the backend {backend}": other,
        f"a {chip}": old and not other,
        f"operands of {dtype}": dtype != jnp.bfloat16,
        **beyond,
    }
    return [what for what, here in cases.items() if here]


def fits_product(name: str, tokens: Any, features: int, vocab: int, columns: int) -> bool:
    """Whether the kernel ``name`` has tiles of a product of this size."""
    if not isinstance(tokens, int) or min(tokens, columns) == 0:
        return False  # a batch that jax.export leaves open has no tiles
    if name == "mosaic_gpu":
        from jaxloss._pallas import linear_gpu

        return linear_gpu.takes(tokens, features, vocab)
    from jaxloss._pallas import linear_tpu

    return linear_tpu.tiles(tokens, features) is not None


def product_parts() -> Any:
    """``row_part`` of ``hidden @ kernel``, of this backend."""
    if jax.default_backend() == "tpu":
        from jaxloss._pallas import linear_tpu

        return linear_tpu.row_part
    from jaxloss._pallas import linear_gpu

    return linear_gpu.row_part


def product_exponentials() -> Any:
    """``label_offset.exponentials`` of ``hidden @ kernel``, with their sums, of this backend."""
    if jax.default_backend() == "tpu":
        from jaxloss._pallas import linear_tpu

        return linear_tpu.exponentials
    from jaxloss._pallas import linear_gpu

    return linear_gpu.exponentials


def product_gradient() -> Any:
    """``slope`` of a block of ``hidden @ kernel``, or None: on a GPU XLA's form is as fast."""
    if jax.default_backend() != "tpu":
        return None
    from jaxloss._pallas import linear_tpu

    return linear_tpu.slope
