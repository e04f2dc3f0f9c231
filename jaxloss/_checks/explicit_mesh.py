"""Arrays on an explicit mesh: their types say what is split over what.

JAX refuses an operation of arrays that are split in different ways, and a rule for gradients whose
cotangent is split otherwise than its primal. So the arguments of a call are first split alike.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

from jaxloss._types import Axes, TokenArrays, TopKLabels


def devices_along(mesh: Any, axes: Iterable[str]) -> int:
    return math.prod(mesh.shape[name] for name in axes)


def names_of(entry: Any) -> Axes:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def spec_of(x: Array) -> tuple:
    spec = tuple(jax.typeof(x).sharding.spec)
    return (*spec, *(None,) * (x.ndim - len(spec)))


def is_split(xs: Any) -> bool:
    """Whether any array of a tree is split over the devices of an explicit mesh."""
    return any(entry is not None for x in jax.tree.leaves(xs) for entry in spec_of(x))


def resharded(x: Any, mesh: Any, entries: Iterable) -> Any:
    """The arrays of a tree, split as the entries say. A gradient is split as its array was."""

    def one(x):
        # An axis of one entry is broadcast: there is nothing to split.
        spec = tuple(e if n != 1 else None for e, n in zip(entries, x.shape, strict=True))
        return x if spec == spec_of(x) else jax.reshard(x, jax.NamedSharding(mesh, P(*spec)))

    entries = tuple(entries)
    return jax.tree.map(one, x)


def aligned(*arrays: tuple[Any, tuple], flat: tuple[int, ...] = ()) -> list:
    """The arrays of a call, split alike over an explicit mesh; as they are where none is split.

    Each comes with the common axis that each of its axes is, None for one that is not to be split.
    The first array that is split along common axes says how all of them are. Of the axes ``flat``,
    which will be made one, the first takes what splits any: the others' parts would not be in one
    piece. Where it does not divide among so many devices, none of them stays split.
    """
    if not is_split([x for x, _ in arrays]):
        return [x for x, _ in arrays]
    entries, sizes, mesh = {}, {}, None
    for xs, axes in arrays:
        for x in jax.tree.leaves(xs):
            found = dict(zip(axes, spec_of(x), strict=True))
            found = {axis: e for axis, e in found.items() if None not in (axis, e)}
            entries = entries or found
            sizes |= {a: n for a, n in zip(axes, x.shape, strict=True) if sizes.get(a, 1) == 1}
            if mesh is None and is_split(x):
                mesh = jax.typeof(x).sharding.mesh
    if len(flat) > 1:
        names = tuple(name for axis in flat for name in names_of(entries.pop(axis, None)))
        first, *_ = flat
        if names and sizes[first] % devices_along(mesh, names) == 0:
            entries[first] = names
    return [resharded(x, mesh, (entries.get(a) for a in axes)) for x, axes in arrays]


def as_split(x: Array, like: Array) -> Array:
    """``x``, split as ``like``, of its shape."""
    return resharded(x, jax.typeof(x).sharding.mesh, spec_of(like)) if is_split((x, like)) else x


def aligned_tokens(
    logits: Array, axes: tuple[int, ...], arrays: TokenArrays
) -> tuple[Array, TokenArrays]:
    """``(logits, arrays)``, split alike."""
    labels, weight, sample_weight, class_mask, token_mask, temperature = arrays
    every = tuple(range(logits.ndim))
    rows = tuple(i for i in every if i not in axes)
    of_labels = rows
    if isinstance(labels, TopKLabels):
        of_labels = (*rows, None)
    elif labels.ndim == logits.ndim:
        of_labels = every
    logits, *some = aligned(
        (logits, every),
        (labels, of_labels),
        (weight, (None,)),
        (sample_weight, rows),
        (class_mask, every),
        (token_mask, rows),
        (temperature, rows),
        flat=axes,
    )
    return logits, TokenArrays(*some)
