"""total_weight: what a mean divides by."""

from __future__ import annotations

from typing import cast

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxloss import _arguments, _check, _layout, _targets
from jaxloss._casts import accumulator_dtype
from jaxloss._jit import jit
from jaxloss._labels import TopKLabels
from jaxloss._mesh import AxisName


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
        indices = _check.array(call, "labels.indices", labels.indices, of_classes=True)
        batch = indices.shape[:-1]
        labels = _arguments.top_k_labels(call, "labels.probabilities", batch, labels)
    else:
        labels = _arguments.indices_or_probabilities(call, labels)
        batch = labels.shape
        if _targets.is_probabilities(labels):
            axes = _check.class_axes(call, labels, "labels", axis)
            batch, classes = _check.batch_shape(labels, axes), _check.num_classes(labels, axes)
    sample_weight = _arguments.check_sample_weight(call, sample_weight, batch)
    mask = None if where is None else _arguments.boolean(call, where)
    if mask is not None:
        _check.shape(call, "where", mask, batch, "the shape of the losses")
    token_axes = _arguments.mesh_axes(call, "token_axis_name", token_axis_name)
    of_tokens = cast(Array, labels.indices) if isinstance(labels, TopKLabels) else labels
    _arguments.check_split(
        call, "labels", of_tokens, {"sample_weight": sample_weight}, (), token_axes
    )
    if weight is not None and classes is None:
        weight = _check.floating(call, "weight", weight)
        classes = (*weight.shape, 1)[0]
    if classes is None:
        classes = jnp.iinfo(jnp.int32).max
    weight = _arguments.class_weight(call, weight, classes)
    dense = _targets.is_probabilities(labels)
    ignore_index = _arguments.ignored(call, ignore_index, labels)
    return _total_weight(
        None if dense else labels,  # of probabilities nothing but the number of tokens matters
        weight if _targets.is_indices(labels) else None,
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
    labels, weight, sample_weight, token_mask = _layout.aligned(
        (labels, of_labels), (weight, (None,)), (sample_weight, rows), (token_mask, rows)
    )
    dtypes = [x.dtype for x in (weight, sample_weight) if x is not None]
    dtype = accumulator_dtype(jnp.float64 if jnp.dtype("float64") in dtypes else jnp.float32)
    targets = _targets.make_targets(
        jnp.zeros(batch, jnp.int32) if labels is None else labels,
        _targets.classes_here(num_classes),
        dtype,
        weight=weight,
        sample_weight=sample_weight,
        token_mask=token_mask,
        ignore_index=ignore_index,
    )
    total = jnp.sum(_targets.terms(targets, sample_weight, dtype)[1])
    return lax.psum(total, token_axes) if token_axes else total
