"""Rows of logits on a TPU, read once: the parts of their losses, and a gradient.

XLA reads them twice and writes once, and computes the exponentials twice or more, which on a TPU
takes longer than reading does. Here a block of whole rows stays on the core from its maxima to its
gradient, with one exponential an entry.

Letters: R rows, C classes; n rows of a block.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxloss._pallas.linear_tpu import LANES, MEMORY, exp, in_32_bits, params
from jaxloss._pallas.per_row import per_row
from jaxloss._xla import mesh
from jaxloss._xla.elementary import finite

_ROWS = 16  # of a group: two registers high in float32, one in bfloat16
_WIDTH = 1024  # classes of a group that a step of its loops takes: as many registers as rows
_BLOCK = 2**20  # entries: a few microseconds to fetch, where starting a step takes a third of one


def takes(rows: int, classes: int) -> bool:
    """Whether groups of [R, C] fit into a core, and make up for starting the kernel."""
    held = (2 * 2 * 2 + 4) * _ROWS * classes  # fetched and written ahead; the exponentials
    return classes % LANES == 0 and rows * classes >= _BLOCK and held <= MEMORY


def _over(classes: int, step: Callable, carry: Any) -> Any:
    """``step(the first class, how many, carry)`` for all of them, in widths."""
    whole, rest = divmod(classes, _WIDTH)

    def at(i, carry):
        return step(pl.multiple_of(i * _WIDTH, LANES), _WIDTH, carry)

    if whole:
        carry = lax.fori_loop(jnp.int32(0), jnp.int32(whole), at, carry)
    return step(whole * _WIDTH, rest, carry) if rest else carry


def _group(rows: Any, x: Any, numbers: Any, dx: Any, parts: Any, e: Any) -> None:
    """Each of a register's lanes has a part of its own, of every 128th class: across lanes a core
    takes longer than it does to compute."""
    shape, classes = (_ROWS, LANES), x.shape[1]

    def across(v: Array) -> Array:
        return jnp.broadcast_to(v, shape)

    def lanes(first: Any, width: int) -> list[Array]:
        v = x[rows, pl.ds(first, width)].astype(jnp.float32)
        return [v[:, at : at + LANES] for at in range(0, width, LANES)]

    omitted, x_omitted, weight = (numbers[rows, i : i + 1] for i in range(3))
    # How far from a lane's first class the label lies: at a class of this lane, or not.
    place = across(omitted.astype(jnp.int32)) - lax.broadcasted_iota(jnp.int32, shape, 1)

    def maximum(first, width, m):
        return reduce(jnp.maximum, lanes(first, width), m)

    m = _over(classes, maximum, jnp.full(shape, -jnp.inf, jnp.float32))
    m = jnp.max(m, axis=1, keepdims=True)
    high = across(finite(m))

    def others(first, width, s):
        for i, v in enumerate(lanes(first, width)):
            at = first + i * LANES
            e_here = exp(v - high)
            e[:, pl.ds(at, LANES)] = e_here
            s = jnp.where(place == at, s, s + e_here)
        return s

    s = jnp.sum(_over(classes, others, jnp.zeros(shape, jnp.float32)), axis=1, keepdims=True)
    # 1 + t of _rows is the sum of all.
    scale = weight / (s + exp(x_omitted - finite(m)))
    at_omitted, scale, nothing = across(-s * scale), across(scale), across(weight) == 0

    def slopes(first, width, _):
        some = []
        for i in range(0, width, LANES):
            slope = e[:, pl.ds(first + i, LANES)] * scale
            slope = jnp.where(place == first + i, at_omitted, slope)
            # A row that asks for nothing gets 0, whatever it holds.
            some.append(jnp.where(nothing, 0, slope).astype(dx.dtype))
        dx[rows, pl.ds(first, width)] = jnp.concatenate(some, axis=1)

    _over(classes, slopes, None)
    parts[rows, :] = jnp.concatenate([m, s], axis=1)


def _block(x, numbers, dx, parts, e):
    def group(i, _):
        _group(pl.ds(pl.multiple_of(i * _ROWS, _ROWS), _ROWS), x, numbers, dx, parts, e)

    lax.fori_loop(jnp.int32(0), jnp.int32(x.shape[0] // _ROWS), group, None)


@per_row
def sums_and_gradient(x: Array, omitted: Array, x_omitted: Array, weight: Array):
    """``(x[..., C], omitted, x_omitted, weight)``, the rest ``[...]``: the row's maximum,
    ``sum_{j != k} exp(x_j - max)``, and the gradient of ``sum(weight * nll)`` in bfloat16, as ``x``
    is."""
    rows, classes = x.shape
    n = min(max(_BLOCK // classes // _ROWS, 1), pl.cdiv(rows, _ROWS)) * _ROWS
    # In one array: each would be padded to a register's lanes. A class is exact in float32.
    numbers = jnp.stack([omitted.astype(jnp.float32), x_omitted, weight], axis=1)
    x, numbers = mesh.varying_alike(x, numbers)
    kind = jax.typeof(x).manual_axis_type
    of_rows, of_numbers, of_parts = (
        pl.BlockSpec((n, width), lambda i: (i, 0)) for width in (classes, 3, 2)
    )
    call = pl.pallas_call(
        _block,
        grid=(pl.cdiv(rows, n),),
        in_specs=[of_rows, of_numbers],
        out_specs=[of_rows, of_parts],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=kind),
            jax.ShapeDtypeStruct((rows, 2), jnp.float32, manual_axis_type=kind),
        ],
        scratch_shapes=[pltpu.VMEM((_ROWS, classes), jnp.float32)],
        compiler_params=params("parallel"),
        cost_estimate=pl.CostEstimate(
            flops=8 * x.size, bytes_accessed=2 * x.nbytes, transcendentals=x.size
        ),
        name="jaxloss_one_pass",
    )
    dx, parts = in_32_bits(call)(x, numbers)
    return parts[:, 0], parts[:, 1], dx
