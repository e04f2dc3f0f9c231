"""Arguments in the form that everything below takes them in: classes last, tokens flat."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxloss._tokens.classes import is_probabilities
from jaxloss._types import TokenArrays


def classes_last(x: Array, axes: tuple[int, ...]) -> Array:
    batch = [i for i in range(x.ndim) if i not in axes]
    if [*batch, *axes] != list(range(x.ndim)):
        x = x.transpose([*batch, *axes])
    # Not -1: the size of an empty batch says nothing of the classes.
    lead, last = x.shape[: len(batch)], x.shape[len(batch) :]
    return x if len(axes) == 1 else x.reshape(*lead, math.prod(last))


def all_classes_last(
    logits: Array, arrays: TokenArrays, axes: tuple[int, ...]
) -> tuple[Array, TokenArrays]:
    """``(x[..., C], arrays)``, probabilities and the mask of classes likewise."""
    labels = arrays.labels
    if is_probabilities(labels):
        labels = classes_last(labels, axes)
    mask = mask_classes_last(arrays.class_mask, logits, axes)
    return classes_last(logits, axes), arrays._replace(labels=labels, class_mask=mask)


def classes_back(x: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """The inverse of :func:`classes_last` of an array of this shape."""
    order = [*(i for i in range(len(shape)) if i not in axes), *axes]
    x = x.reshape([shape[i] for i in order])
    return x.transpose([order.index(i) for i in range(len(shape))])


def mask_classes_last(mask: Array | None, like: Array, axes: tuple[int, ...]) -> Array | None:
    if mask is not None and len(axes) > 1:  # a flattened axis has no dimension left to broadcast
        shape = [
            n if i in axes else m
            for i, (m, n) in enumerate(zip(mask.shape, like.shape, strict=True))
        ]
        mask = jnp.broadcast_to(mask, shape)
    return None if mask is None else classes_last(mask, axes)


def rows_of_mask(mask: Array | None, lead: tuple[int, ...]) -> tuple[Array | None, Array | None]:
    """A mask broadcastable to [*lead, C] as its own rows [R, C], and each token's row [N]."""
    if mask is None:
        return None, None
    rows = mask.reshape(math.prod(mask.shape[:-1]), mask.shape[-1])
    if rows.shape[0] == 1:
        return rows, None
    index = jnp.arange(rows.shape[0], dtype=jnp.int32).reshape(mask.shape[:-1])
    return rows, jnp.broadcast_to(index, lead).reshape(-1)


def flat_labels(labels: Any, lead: tuple[int, ...]) -> tuple[list, Any]:
    """(the arrays of the labels, one row a token; their tree)."""
    arrays, tree = jax.tree.flatten(labels)
    return [x.reshape(math.prod(lead), *x.shape[len(lead) :]) for x in arrays], tree
