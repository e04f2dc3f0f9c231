"""What labels say: an error for one out of range, and what a mean over them divides by."""

from __future__ import annotations

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.experimental import checkify
from jax.typing import ArrayLike

from jaxloss._checks import arguments, axis_names, explicit_mesh, messages
from jaxloss._tokens.classes import class_indices, is_indices, is_probabilities, local_classes
from jaxloss._tokens.reduction import weights_and_divisors
from jaxloss._tokens.targets import make_targets
from jaxloss._types import AxisName, TokenArrays, TopKLabels
from jaxloss._xla.device import jit
from jaxloss._xla.dtypes import accumulator_dtype


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
    labels = messages.array("check_labels", "labels", labels, of_classes=True)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        rule = "labels must be class indices (an integer dtype)"
        messages.fail("check_labels", rule, messages.describe(labels), kind=TypeError)
    num_classes = messages.index("check_labels", "num_classes", num_classes)
    messages.bounded("check_labels", "num_classes", num_classes, 0, jnp.iinfo(jnp.int32).max)
    ignore_index = arguments.ignored("check_labels", ignore_index)
    rule = f"labels must be in [0, {num_classes}) or equal ignore_index, {ignore_index}"
    if labels.size == 0:
        return
    with jax.ensure_compile_time_eval():  # of labels that a trace holds as constants
        found = _first_wrong(labels, num_classes, ignore_index)
    if isinstance(labels, Tracer):
        wrong, label, index = found
        text = messages.message("check_labels", rule, "{label} at flat index {index}")
        checkify.check(~wrong, text, label=label, index=index)
        return
    wrong, label, index = jax.device_get(found)
    if wrong:
        at = tuple(int(i) for i in np.unravel_index(index, labels.shape))
        messages.fail("check_labels", rule, f"{label} at {at}")


@partial(jax.jit, static_argnums=(1, 2))
def _first_wrong(labels, num_classes, ignore_index):
    """(whether a label is wrong, the first such, its flat index)"""
    index, not_ignored = class_indices(labels, num_classes, ignore_index)
    wrong = (index == num_classes) & not_ignored
    # Not by argmax and an index, which JAX refuses where an explicit mesh splits the labels.
    flat = jnp.arange(labels.size, dtype=jnp.int32).reshape(labels.shape)
    first = jnp.min(jnp.where(wrong, flat, labels.size))
    label = jnp.sum(jnp.where(flat == first, labels, 0), dtype=labels.dtype)
    return jnp.any(wrong), label, first


def total_weight(
    labels: ArrayLike | TopKLabels,
    *,
    axis: int | tuple[int, ...] = -1,
    weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    token_axis_name: AxisName | None = None,
) -> Array:
    r"""What ``reduction="mean"`` divides by: the total weight of the tokens that count.

    .. math:: W = \sum_n s_n w_{y_n} \quad\text{for class indices,}\qquad
              W = \sum_n s_n \quad\text{for class probabilities and top-k labels}

    A mean over microbatches, steps or devices that hold different numbers of tokens is the sum of
    their ``reduction="sum"`` losses over the sum of their total weights. The mean of their means
    is another number.

    Args:
      labels: class indices ``[...]``, class probabilities with C at ``axis``, or
        :class:`TopKLabels`.
      axis: the class axis of probabilities, or a tuple of axes; class indices have none.
      weight, ignore_index, sample_weight, token_axis_name: as in :func:`cross_entropy`.
      where: boolean, shaped as the losses: the tokens that count.

    Returns:
      A float32 scalar (float64 where a weight is float64).

    Raises:
      TypeError, ValueError: as :func:`cross_entropy`.

    Differentiable in the weights.

    Example: gradient accumulation over two microbatches, of 3 tokens and of 1.

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
      >>> labels = jnp.array([[1, 2, 3], [4, -100, -100]])
      >>> total = jaxloss.total_weight(labels)
      >>> parts = [jaxloss.cross_entropy(x, y, reduction="sum") / total
      ...          for x, y in zip(logits, labels)]
      >>> bool(jnp.allclose(sum(parts), jaxloss.cross_entropy(logits, labels)))
      True

    Source: the denominator of ``torch.nn.functional.cross_entropy``'s mean.
    """
    call = "total_weight"
    classes = None  # as many as one likes
    if isinstance(labels, TopKLabels):
        indices = messages.array(call, "labels.indices", labels.indices, of_classes=True)
        batch = indices.shape[:-1]
        labels = arguments.top_k_labels(call, "labels.probabilities", batch, labels)
    else:
        labels = arguments.indices_or_probabilities(call, labels)
        batch = labels.shape
        if is_probabilities(labels):
            axes = messages.class_axes(call, labels, "labels", axis)
            batch, classes = messages.batch_shape(labels, axes), messages.num_classes(labels, axes)
    sample_weight = arguments.check_sample_weight(call, sample_weight, batch)
    mask = None if where is None else arguments.boolean(call, where)
    if mask is not None:
        messages.shape(call, "where", mask, batch, "the shape of the losses")
    token_axes = axis_names.mesh_axes(call, "token_axis_name", token_axis_name)
    of_tokens = cast(Array, labels.indices) if isinstance(labels, TopKLabels) else labels
    others = {"sample_weight": sample_weight}
    axis_names.check_split(call, "labels", of_tokens, others, token_axes=token_axes)
    if weight is not None and classes is None:
        weight = messages.floating(call, "weight", weight)
        classes = (*weight.shape, 1)[0]
    if classes is None:
        classes = jnp.iinfo(jnp.int32).max
    weight = arguments.class_weight(call, weight, classes)
    dense = is_probabilities(labels)
    ignore_index = arguments.ignored(call, ignore_index, labels)
    return _total_weight(
        None if dense else labels,  # of probabilities nothing but the number of tokens matters
        weight if is_indices(labels) else None,
        sample_weight,
        mask,
        batch=batch,
        num_classes=classes,
        ignore_index=None if dense else ignore_index,
        token_axes=token_axes,
    )


@jit
def _total_weight(
    labels, weight, sample_weight, token_mask, *, batch, num_classes, ignore_index, token_axes
):
    rows = tuple(range(len(batch)))
    of_labels = (*rows, None) if isinstance(labels, TopKLabels) else rows
    labels, weight, sample_weight, token_mask = explicit_mesh.aligned(
        (labels, of_labels), (weight, (None,)), (sample_weight, rows), (token_mask, rows)
    )
    dtypes = [x.dtype for x in (weight, sample_weight) if x is not None]
    dtype = accumulator_dtype(jnp.float64 if jnp.dtype("float64") in dtypes else jnp.float32)
    labels = jnp.zeros(batch, jnp.int32) if labels is None else labels
    arrays = TokenArrays(labels, weight, sample_weight, token_mask=token_mask)
    targets = make_targets(arrays, local_classes(num_classes), dtype, ignore_index)
    _, divisor = weights_and_divisors(targets.weights, dtype)
    total = jnp.sum(divisor)
    return lax.psum(total, token_axes) if token_axes else total
