"""Mesh axes inside of ``shard_map``: what varies over them, and the collectives. No formulas."""

import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.interpreters import pxla
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxloss._types import Axes


def manual_axes() -> Axes:
    """The axes of the surrounding ``shard_map``; none outside of one."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def other_axes() -> Axes:
    """The axes of the mesh that the surrounding ``shard_map``, if any, leaves out."""
    manual = manual_axes()
    return tuple(n for n in jax.sharding.get_abstract_mesh().axis_names if n not in manual)


def of_context() -> Any:
    """The mesh of ``jax.set_mesh``, or of the older ``with mesh:``; None: there is none."""
    here = jax.sharding.get_abstract_mesh()
    if here.axis_names:
        return here
    # JAX has no other name for the older context's mesh, and warns of this one since 0.8.2.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        resources = getattr(pxla, "thread_resources", None)
    older = resources and resources.env.physical_mesh
    return older if older and older.axis_names else None


def of_arrays(xs: Any) -> Any:
    """The mesh that the type of any array of a tree names, which is that of a program's arguments
    or of a constraint; otherwise the context's; None: nothing says."""
    for x in jax.tree.leaves(xs):
        if (mesh := jax.typeof(x).sharding.mesh).axis_names:
            return mesh
    return of_context()


def unsplit(x: Array, axis: int) -> Array:
    """``x``, not split along the axis where a partitioner decides, and its type or ``jax.set_mesh``
    says over what: XLA:TPU gathers what a loop's products read in each step, where it is not told
    before.

    Not of the older ``with mesh:``, in which arrays may be on other devices.
    """
    mesh = jax.typeof(x).sharding.mesh
    mesh = mesh if mesh.axis_names else jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    spec = (None if i == axis else P.UNCONSTRAINED for i in range(x.ndim))
    return lax.with_sharding_constraint(x, jax.NamedSharding(mesh, P(*spec)))


def varies_over(xs: Any) -> frozenset:
    """The axes of the surrounding ``shard_map`` over which any array of a tree differs between
    devices."""

    def axes(x):
        kind = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
        return kind.manual_axis_type.varying if kind.manual_axis_type else ()

    return frozenset().union(*map(axes, jax.tree.leaves(xs)))


def is_typed(axis: str) -> bool:
    """Whether types say what differs over a manual axis: with ``check_vma=False`` they do not, not
    even of the device's own place."""
    return axis in varies_over(lax.axis_index(axis))


def is_bound(axis: str) -> bool:
    """Whether it is an axis of some ``vmap``, ``pmap`` or ``shard_map`` around."""
    try:
        lax.axis_size(axis)
    except NameError:
        return False
    return True


def varying(xs: Any, axes: Iterable) -> Any:
    """The arrays of a tree, taken as differing over these axes too: gradients are summed over them.

    So must be what the branches of a ``cond`` read, over what its condition differs over: JAX
    batches one by selecting what is read by the condition, and its branches are traced before.
    """
    axes = frozenset(axes)

    def one(x):
        missing = tuple(sorted(axes - varies_over(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, xs)


def varying_alike(*xs: Any) -> tuple:
    """Each ``x`` taken as differing over whatever axes any of them differs over."""
    return varying(xs, varies_over(xs))


def largest(x: Array, axes: Axes) -> Array:
    x = lax.stop_gradient(x)
    return lax.pmax(x, axes) if axes else x  # over none, JAX 0.10 refuses


def sums(xs: Any, axes: Axes) -> Any:
    """The sums over the axes of the leaves of ``xs``, equal in shape: one all-reduce."""
    leaves, tree = jax.tree.flatten(xs)
    packed = jnp.stack(jnp.broadcast_arrays(*varying_alike(*leaves)))
    return jax.tree.unflatten(tree, list(lax.psum(packed, axes)))


def gathered(x: Array, axes: Axes) -> Array:
    """``x[...]`` of each device ``[..., devices]``, in their order and the same on all of them: of
    what JAX's all_gather returns the types say that it differs."""
    own = jnp.arange(size(axes), dtype=jnp.int32) == lax.axis_index(axes)
    return lax.psum(jnp.where(own, x[..., None], jnp.zeros((), x.dtype)), axes)


def size(axes: Axes) -> int:
    return lax.axis_size(axes) if axes else 1


def first(size: int, axes: Axes) -> Any:
    """The place of this device's first, of what is split in parts of ``size``."""
    return size * lax.axis_index(axes) if axes else 0


def sum_except(x: Any, keep: Iterable) -> Any:
    """The sum of ``x`` over the axes that it varies over, but for those to ``keep``."""
    axes = () if x is None else tuple(sorted(varies_over(x) - frozenset(keep)))
    return lax.psum(x, axes) if axes else x


def blank(like: jax.ShapeDtypeStruct, shape: tuple[int, ...] | None = None, dtype: Any = None):
    """Zeros of a traced value's type: a loop's state must vary as what the loop makes of it."""
    zeros = jnp.zeros(like.shape if shape is None else shape, dtype or like.dtype)
    return varying(zeros, varies_over(like))
