"""check_labels: an error for a label out of range, where the losses answer with NaN."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify
from jax.typing import ArrayLike

from jaxloss import _arguments, _check, _targets


def check_labels(labels: ArrayLike, num_classes: int, ignore_index: int | None = -100) -> None:
    """Raises if a class index is neither in ``[0, num_classes)`` nor ``ignore_index``.

    The losses answer such a label with NaN in its own row. This is the assertion for those who
    want an error instead, the same labels being wrong.

    Args:
      labels: class indices, any shape, an integer dtype.
      num_classes: C.
      ignore_index: the one label outside of ``[0, C)`` that is allowed; None allows none.

    Raises:
      ValueError: eagerly, naming the first such label. Under ``jit`` the check is a
        ``checkify.check``: transform the function with ``jax.experimental.checkify.checkify`` or
        ``chex.chexify``, which report it.
      TypeError: ``labels`` are no integers.

    Under ``vmap`` labels of a batch member are checked; integers have no derivative.

    Example:

      >>> import jax.numpy as jnp
      >>> import jaxloss
      >>> jaxloss.check_labels(jnp.array([0, 2, -100]), 3)
      >>> jaxloss.check_labels(jnp.array([0, 3, -100]), 3)
      Traceback (most recent call last):
        ...
      ValueError: check_labels: labels must be in [0, 3) or equal ignore_index, -100; got 3 at (1,).
    """
    labels = _check.array("check_labels", "labels", labels, of_classes=True)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        rule = "labels must be class indices (an integer dtype)"
        _check.fail("check_labels", rule, _check.describe(labels), kind=TypeError)
    num_classes = _check.index("check_labels", "num_classes", num_classes)
    _check.bounded("check_labels", "num_classes", num_classes, 0, jnp.iinfo(jnp.int32).max)
    ignore_index = _arguments.ignored("check_labels", ignore_index)
    rule = f"labels must be in [0, {num_classes}) or equal ignore_index, {ignore_index}"
    if labels.size == 0:
        return
    with jax.ensure_compile_time_eval():  # of labels that a trace holds as constants
        found = _first_wrong(labels, num_classes, ignore_index)
    if isinstance(labels, Tracer):
        wrong, label, index = found
        text = _check.message("check_labels", rule, "{label} at flat index {index}")
        checkify.check(~wrong, text, label=label, index=index)
        return
    wrong, label, index = jax.device_get(found)
    if wrong:
        at = tuple(int(i) for i in np.unravel_index(index, labels.shape))
        _check.fail("check_labels", rule, f"{label} at {at}")


@partial(jax.jit, static_argnums=(1, 2))
def _first_wrong(labels, num_classes, ignore_index):
    """(whether a label is wrong, the first such, its flat index)"""
    kept, not_ignored = _targets.class_indices(labels, num_classes, ignore_index)
    wrong = (kept == num_classes) & not_ignored
    # Not by argmax and an index, which JAX refuses where an explicit mesh splits the labels.
    flat = jnp.arange(labels.size, dtype=jnp.int32).reshape(labels.shape)
    first = jnp.min(jnp.where(wrong, flat, labels.size))
    label = jnp.sum(jnp.where(flat == first, labels, 0), dtype=labels.dtype)
    return jnp.any(wrong), label, first
