"""Losses of pairs."""

from __future__ import annotations

import sys
from typing import Any

from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import ArrayLike

from jaxloss._checks import arguments, messages
from jaxloss._linear import budget, contrastive, layout
from jaxloss._linear.contrastive import PairArrays, PairScalars
from jaxloss._linear.product import Sweep
from jaxloss._types import AxisName, LossOptions, Reduction
from jaxloss._xla import mesh as meshes
from jaxloss._xla.dtypes import accumulator_dtype


def _operands(call: str, x: Any, y: Any, symmetric: bool) -> tuple[Array, Array]:
    x, y = messages.floating(call, "x", x), messages.floating(call, "y", y)
    for name, v, rows in (("x", x, "N"), ("y", y, "M")):
        if v.ndim != 2:
            messages.fail(call, f"{name} must be [{rows}, D]", messages.describe(v))
    got = f"x {messages.describe(x)}, y {messages.describe(y)}"
    if x.shape[1] != y.shape[1]:
        messages.fail(call, "x and y must have one number of features, D", got)
    if x.dtype != y.dtype:
        way_out = "Cast one of them: a silent cast would copy it."
        messages.fail(call, "x and y must have one dtype", got, way_out, TypeError)
    if symmetric and x.shape[0] != y.shape[0]:
        more = x.shape[0] < y.shape[0]
        way_out = "With symmetric=False further rows of y are negatives." if more else ""
        messages.fail(call, "x and y must have a row a pair each", got, way_out)
    if x.shape[0] > y.shape[0]:
        messages.fail(call, "y must have a row for each row of x", got)
    return x, y


def _where(call: str, where: Any, pairs: int, columns: int) -> Array | None:
    if where is None:
        return None
    mask = arguments.boolean(call, where)
    if mask.shape not in ((pairs,), (pairs, columns)):
        rule = f"where must be [N] (pairs that exist), {(pairs,)}, or [N, M] (entries that exist), "
        messages.fail(call, f"{rule}{(pairs, columns)}", messages.describe(mask))
    return mask


def _number(call: str, name: str, x: Any, off: float, dtype: Any) -> Any:
    most = sys.float_info.max
    return messages.scalar(call, name, x, -most, most, off, dtype)


def _loss(
    call: str,
    x: Any,
    y: Any,
    scalars: tuple,
    *,
    symmetric: Any,
    where: Any,
    sample_weight: Any,
    reduction: Any,
    empty_mean: Any,
    token_axis_name: Any,
    over: Any,
    chunk_size: Any,
    precision: Any,
) -> Array:
    symmetric = messages.flag(call, "symmetric", symmetric)
    x, y = _operands(call, x, y, symmetric)
    pairs, columns = x.shape[0], y.shape[0]
    names = arguments.axis_names(call, 2, token_axis_name=token_axis_name, over=over)
    arguments.check_pairs_split(call, x, y, names.token_axes)
    where = _where(call, where, pairs, columns * meshes.size(names.token_axes))
    sample_weight = arguments.check_sample_weight(call, sample_weight, (pairs,))
    arguments.check_reduction(call, reduction)
    dtype = accumulator_dtype(x.dtype)
    scale, *bias = scalars
    numbers = [_number(call, "logit_scale", scale, 1.0, dtype)]
    numbers += [_number(call, "logit_bias", b, 0.0, dtype) for b in bias]
    parts = (y,) if columns == pairs else (y[:pairs], y[pairs:])
    found = layout.of_pairs(call, names, x, parts, (where, sample_weight))
    axes, devices = names.token_axes, 1
    if found is not None:
        axes, devices = (*axes, *found.token_axes), found.devices(found.token_axes)
        if len(parts) > 1 and where is not None and where.ndim == 2:
            rule = "where must be [N] beside further rows of y that are split over a mesh"
            messages.fail(call, rule, messages.describe(where), "Inside of shard_map it may be.")
    most = budget.size_to_plan_for(pairs // devices)
    default = budget.default_chunk_of_pairs(most, columns // devices)
    chunk = arguments.chunk_size(call, chunk_size, default, most)
    empty_mean = arguments.check_empty_mean(call, empty_mean)
    options = {
        "symmetric": symmetric,
        "sweep": Sweep(chunk, token_axes=axes),
        "precision": arguments.precision(call, precision),
        "options": LossOptions((), 0, None, reduction, empty_mean, False, (), axes),
    }
    given = PairArrays(x, parts, where, sample_weight), PairScalars(*numbers)
    if found is None:
        layout.warn_of_pairs(call, pairs, chunk)
        return contrastive.of_device(*given, **options)
    return contrastive.over_mesh(*given, found=found, static=tuple(options.items()))


def contrastive_loss(
    x: ArrayLike,
    y: ArrayLike,
    *,
    logit_scale: ArrayLike | None = 1.0,
    symmetric: bool = True,
    where: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
    empty_mean: float | None = None,
    token_axis_name: AxisName | PartitionSpec | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    chunk_size: int | None = None,
    precision: lax.PrecisionLike = None,
) -> Array:
    """TODO"""
    return _loss(
        "contrastive_loss",
        x,
        y,
        (logit_scale,),
        symmetric=symmetric,
        where=where,
        sample_weight=sample_weight,
        reduction=reduction,
        empty_mean=empty_mean,
        token_axis_name=token_axis_name,
        over=mesh,
        chunk_size=chunk_size,
        precision=precision,
    )


def sigmoid_contrastive_loss(
    x: ArrayLike,
    y: ArrayLike,
    *,
    logit_scale: ArrayLike | None = 1.0,
    logit_bias: ArrayLike | None = 0.0,
    symmetric: bool = True,
    where: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
    empty_mean: float | None = None,
    token_axis_name: AxisName | PartitionSpec | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    chunk_size: int | None = None,
    precision: lax.PrecisionLike = None,
) -> Array:
    """TODO"""
    return _loss(
        "sigmoid_contrastive_loss",
        x,
        y,
        (logit_scale, logit_bias),
        symmetric=symmetric,
        where=where,
        sample_weight=sample_weight,
        reduction=reduction,
        empty_mean=empty_mean,
        token_axis_name=token_axis_name,
        over=mesh,
        chunk_size=chunk_size,
        precision=precision,
    )
