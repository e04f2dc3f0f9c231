"""Rows of logits on a Hopper GPU, read once: the parts of their losses, and a gradient.

A row of few classes stays in registers from its maximum to its gradient. So a weighted sum of the
losses and its gradient take one read and one write of the logits; by ``rows_gpu`` they take two
reads and a write.

Letters: R rows, C classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxloss._pallas.per_row import per_row
from jaxloss._pallas.rows_gpu import call, exp, load, put
from jaxloss._xla.elementary import finite

_ROWS = 4  # of a tile: a warp each
_WIDTH = 256  # classes that a warp reads at once: of 16 bits, 16 bytes a lane
_SPAN = 32  # rows of a block: of as many numbers 128 bytes, what is copied at once
_CLASSES = 2048  # 64 in the registers of a lane: twice as many overflow
_STEPS = 2  # tiles that are fetched ahead: more leave fewer blocks on a core
# Of a tile [rows, C / width, width]: a row a warp, a lane 16 bytes of each width.
_TILING = plgpu.Tiling(((_ROWS, 1, _WIDTH), (_WIDTH // 32,)))
_TILE = plgpu.Layout.TILED(_TILING, (-4,), (-2,), -1)
_COLUMN = _TILE.reduce((1, 2))


def takes(rows: int, classes: int) -> bool:
    """Whether [R, C] is made of whole tiles, and makes up for starting the kernel."""
    whole = classes % _WIDTH == 0 and rows % _ROWS == 0
    return whole and classes <= _CLASSES and rows >= _SPAN and rows * classes >= 2**24


def _of_tile(x: Array, omitted: Array, x_omitted: Array, weight: Array):
    """``(m, s, gradient)`` of a tile [rows, C / width, width], the rest [rows]."""
    shape = x.shape

    def across(v: Array) -> Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(v, shape, [0]), _TILE)

    def over_row(function: Callable, v: Array) -> Array:  # within each lane first
        return function(function(v, axis=1), axis=1)

    def iota(axis: int) -> Array:
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_TILE)

    m = over_row(jnp.max, x).astype(jnp.float32)
    high = finite(m)
    e = exp(x.astype(jnp.float32) - across(high))
    at_label = iota(1) * shape[2] + iota(2) == across(omitted)
    s = over_row(jnp.sum, jnp.where(at_label, 0.0, e))
    # 1 + t of _rows is the sum of all.
    scale = weight / (s + exp(x_omitted - high))
    dx = jnp.where(at_label, across(-s * scale), e * across(scale))
    # A row that asks for nothing gets 0, whatever it holds.
    return m, s, jnp.where(across(weight) == 0.0, 0.0, dx)


@per_row
def sums_and_gradient(x: Array, omitted: Array, x_omitted: Array, weight: Array):
    """``(x[..., C], omitted, x_omitted, weight)``, the rest ``[...]``: the row's maximum,
    ``sum_{j != k} exp(x_j - max)``, and the gradient of ``sum(weight * nll)`` in the 16 bits of
    ``x``."""
    rows, classes = x.shape
    shape = _ROWS, classes // _WIDTH, _WIDTH

    def jaxloss_one_pass(x, omitted, x_omitted, weight, dx, m, s, *cores):
        *of_rows, m_core, s_core, dx_core, barrier = cores
        # The last block begins where it has all of its rows: some are computed twice.
        start = jnp.minimum(lax.axis_index("block") * _SPAN, rows - _SPAN)
        here = pl.ds(start, _SPAN)
        for v, core in zip((omitted, x_omitted, weight), of_rows, strict=True):
            plgpu.copy_gmem_to_smem(v.at[here], core, barrier)

        def step(index, tile):
            (t,) = index

            @pl.when(t == 0)
            def _():
                plgpu.barrier_wait(barrier)

            these = pl.ds(t * _ROWS, _ROWS)
            numbers = (load(core.at[these], _COLUMN, optimized=False) for core in of_rows)
            m_core[these], s_core[these], gradient = _of_tile(load(tile, _TILE), *numbers)
            put(dx_core, t, gradient, dx.at[pl.ds(start + t * _ROWS, _ROWS)])

        spec = plgpu.BlockSpec(shape, lambda t: (lax.div(start, jnp.int32(_ROWS)) + t, 0, 0))
        with jax.enable_x64(False):
            plgpu.emit_pipeline(
                step, grid=(_SPAN // _ROWS,), in_specs=[spec], max_concurrent_steps=_STEPS
            )(x)
        plgpu.copy_smem_to_gmem(m_core, m.at[here])
        plgpu.copy_smem_to_gmem(s_core, s.at[here])
        plgpu.wait_smem_to_gmem(0)

    x = x.reshape(rows, *shape[1:])
    number = plgpu.SMEM((_SPAN,), jnp.float32)
    dx, m, s = call(
        jaxloss_one_pass,
        (x, omitted, x_omitted, weight),
        [(x.shape, x.dtype), *[((rows,), jnp.float32)] * 2],
        grid=(pl.cdiv(rows, _SPAN),),
        grid_names=("block",),
        scratch_types=[
            plgpu.SMEM((_SPAN,), jnp.int32),
            *[number] * 4,
            plgpu.SMEM((2, *shape), x.dtype),
            plgpu.Barrier(num_arrivals=3),
        ],
    )
    return m, s, dx.reshape(rows, classes)
