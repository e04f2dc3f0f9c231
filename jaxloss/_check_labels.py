"""check_labels: an error for a label out of range, where the losses answer with NaN."""

import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental import checkify

from jaxloss import _check, _targets


def check_labels(labels, num_classes: int, ignore_index: int | None = -100) -> None:
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

    Example:

      >>> import jax.numpy as jnp
      >>> import jaxloss
      >>> jaxloss.check_labels(jnp.array([0, 2, -100]), 3)
      >>> jaxloss.check_labels(jnp.array([0, 3, -100]), 3)
      Traceback (most recent call last):
        ...
      ValueError: check_labels: labels must be in [0, 3) or equal ignore_index, -100; got 3 at (1,).
    """
    labels = _check.array("check_labels", "labels", labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        rule = "labels must be class indices (an integer dtype)"
        _check.fail("check_labels", rule, _check.describe(labels), kind=TypeError)
    num_classes = _check.index("check_labels", "num_classes", num_classes)
    ignore_index = _check.ignored("check_labels", ignore_index)
    kept, not_ignored = _targets.class_indices(labels, num_classes, ignore_index)
    wrong = (kept == num_classes) & not_ignored
    rule = f"labels must be in [0, {num_classes}) or equal ignore_index, {ignore_index}"
    first = jnp.argmax(wrong.ravel()) if labels.size else 0
    if isinstance(wrong, Tracer):
        if labels.size:
            checkify.check(
                ~jnp.any(wrong),
                _check.message("check_labels", rule, "{label} at flat index {index}"),
                label=labels.ravel()[first],
                index=first,
            )
    elif labels.size and bool(jnp.any(wrong)):
        index = tuple(int(i) for i in jnp.unravel_index(first, labels.shape))
        _check.fail("check_labels", rule, f"{labels.ravel()[first]} at {index}")
