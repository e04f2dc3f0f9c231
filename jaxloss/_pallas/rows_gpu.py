"""Rows of logits on a Hopper GPU, at the speed of its memory.

XLA reduces and writes 16-bit logits at half to three quarters of that: its reduction merges entry
by entry, and its loads are half as wide as the memory wants them. Here a tile of 64 rows is copied
to the core ahead of its use, and reduced as one.

Letters: R rows, C classes.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxloss._pallas.per_row import per_row
from jaxloss._xla import mesh
from jaxloss._xla.elementary import finite

ROWS = 64  # of a tile: those of the registers' layout, in which four threads share a row
TILE = plgpu.Layout.WGMMA
COLUMN = TILE.reduce(1)
COLUMNS, STEPS = 128, 4  # of a tile, and how many are fetched ahead: the fastest on an H200
_SHAPE = ROWS, COLUMNS
_BLOCKS = 132 * 16  # of 32 bits, one on a core at a time; of 16 bits three, and four times as many


def params() -> Any:
    """``exp2`` is one instruction then; lanes are what every JAX that has these kernels knows."""
    lanes = plgpu.LoweringSemantics.Lane
    return plgpu.CompilerParams(approx_math=True, lowering_semantics=lanes)


def exp(x: Array) -> Array:
    """exp(x) of x <= 0, about as exact as the instruction for exp2.

    y = x log2(e) is rounded, by |y| 2^-24, and the rest x - y ln(2) made up for: half of the
    instructions of libdevice's, and the sum is short of those. The difference is exact where it is
    contracted into a multiply-add, as the compiler does. What a float32 ln(2) lacks, 1.9e-9 y, is
    less than the instruction's own error, 2^-22.
    """
    x = jnp.maximum(x, -200.0)  # less is 0 too, and the rest of -inf would be NaN
    y = x * 1.44269504088896341
    e = jnp.exp2(y)
    return e + e * (x - y * 0.693147182464599609375)


def load(ref: Any, layout: Any, **options: Any) -> Array:
    read: Any = plgpu.load
    index = inspect.signature(read).parameters.get("idx")  # an argument until JAX 0.11
    some = ((),) if index and index.default is inspect.Parameter.empty else ()
    return read(ref, *some, layout=layout, **options)


def across(x: Array, shape: tuple[int, int] = _SHAPE) -> Array:
    return lax.broadcast_in_dim(x, shape, [0])


def transforms(dtype: Any) -> tuple:
    """How tiles lie in the core's memory, for registers to be read without conflicts."""
    made: Any = plgpu
    return made.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), made.SwizzleTransform(128)


def call(body: Callable, args: tuple[Array, ...], out: list[tuple], **options: Any) -> Any:
    """``plgpu.kernel`` of the arrays: ``out`` has shape and dtype of each result.

    Its results vary over a mesh's axes as the arrays do, which JAX forgets where it is not
    interpreted.
    """
    kind = jax.typeof(args[0]).manual_axis_type
    out_type = [jax.ShapeDtypeStruct(*o, manual_axis_type=kind) for o in out]
    results = plgpu.kernel(body, out_type=out_type, compiler_params=params(), **options)(*args)
    return mesh.varying(results, mesh.varies_over(args[0]))


def takes(x: Array) -> bool:
    """Whether x[R, C] can be copied by tiles of whole rows, and makes up for starting a kernel."""
    return x.shape[0] >= ROWS and x.shape[0] % 8 == 0 and x.size >= 2**24


def put(cores: Any, step: Any, tile: Array, there: Any) -> None:
    """The tile of a step goes to the GPU's memory, by way of one of two places in the core's."""
    slot = lax.rem(step, jnp.int32(2))
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the slot's tile before the last
    cores[slot] = tile.astype(cores.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(cores.at[slot], there)


def _by_takes(compute: Callable, otherwise: Callable) -> Callable:
    return lambda x, *rest: (compute if takes(x) else otherwise)(x, *rest)


def _split(x: Array) -> tuple[int, int, int]:
    """(tiles of rows, parts that each one's tiles of classes are split into, tiles of a part)."""
    row_tiles, tiles = pl.cdiv(x.shape[0], ROWS), x.shape[1] // COLUMNS
    blocks = _BLOCKS * (4 if x.dtype.itemsize == 2 else 1)
    # Four tiles at least: each part fills its pipeline first.
    tiles_of_part = max(pl.cdiv(tiles * row_tiles, blocks), min(tiles, 4))
    parts = pl.cdiv(tiles, tiles_of_part)
    return row_tiles, parts, pl.cdiv(tiles, parts)


def _over_tiles(x: Any, i: Any, part: Any, length: int, step: Callable, carry: Any = None):
    """``step((tile of the row,), its entries, carry)`` for the tiles of a part, copied ahead."""
    tiles = x.shape[1] // COLUMNS
    first = part * length
    spec = plgpu.BlockSpec(_SHAPE, lambda t: (i, first + t), transforms=transforms(x.dtype))
    with jax.enable_x64(False):  # until JAX 0.11 a number of steps that is traced fails with it
        return plgpu.emit_pipeline(
            step,
            grid=(jnp.minimum(length, tiles - first) if tiles % length else length,),
            in_specs=[spec],
            max_concurrent_steps=STEPS,
            init_carry=carry,
        )(x)


def merged(m: Array, s: Array) -> tuple[Array, Array]:
    """The rows' maxima and sums from those of their parts ``[parts, R]``."""
    top = jnp.max(m, axis=0)
    return top, jnp.sum(s * jnp.exp(m - finite(top)[None]), axis=0)


def _padded(x: Array, rows: int, value: Any) -> Array:
    return jnp.pad(x, (0, rows - x.shape[0]), constant_values=value)


def max_and_sum(otherwise: Callable) -> Callable:
    """``(x[..., C], omitted[...]) -> (max_j x_j, sum_{j != k} exp(x_j - max))``."""

    def compute(x: Array, omitted: Array):
        rows, classes = x.shape
        row_tiles, parts, length = _split(x)

        def jaxloss_max_and_sum(x, omitted, m_out, s_out, m_core, s_core):
            # Backwards: the pass that follows begins with the rows that are in the cache then.
            i, part = row_tiles - 1 - lax.axis_index("rows"), lax.axis_index("part")
            here = pl.ds(i * ROWS, ROWS)
            label = load(omitted.at[here], COLUMN, optimized=False)

            def step(index, tile, carry):
                m, s = carry
                x = load(tile, TILE)
                # In the dtype of x: of 16 bits three are compared in one instruction.
                new = jnp.maximum(m, jnp.max(x, axis=1).astype(jnp.float32))
                high = finite(new)
                e = exp(x.astype(jnp.float32) - across(high))
                column = plgpu.broadcasted_iota(jnp.int32, _SHAPE, 1, layout=TILE)
                at_label = column == across(label - (part * length + index[0]) * COLUMNS)
                others = jnp.where(at_label, 0.0, e)
                return new, s * exp(m - high) + jnp.sum(others, axis=1)

            def full(value):
                return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), COLUMN)

            start = full(-jnp.inf), full(0.0)
            m_core[...], s_core[...] = _over_tiles(x, i, part, length, step, start)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(m_core, m_out.at[part, here])
            plgpu.copy_smem_to_gmem(s_core, s_out.at[part, here])
            plgpu.wait_smem_to_gmem(0)

        m, s = call(
            jaxloss_max_and_sum,
            (x, _padded(omitted, row_tiles * ROWS, classes)),
            [((parts, row_tiles * ROWS), jnp.float32)] * 2,
            grid=(row_tiles, parts),
            grid_names=("rows", "part"),
            scratch_types=[plgpu.SMEM((ROWS,), jnp.float32)] * 2,
        )
        return merged(m[:, :rows], s[:, :rows])

    return per_row(_by_takes(compute, otherwise))


def slope(otherwise: Callable) -> Callable:
    """``(x[..., C], m, omitted, scale, at_omitted, active)``, the rest ``[...]``:
    ``rows.logits_gradient`` in the dtype of ``x``."""

    def compute(x: Array, m: Array, omitted: Array, scale: Array, at_omitted: Array, active: Array):
        row_tiles, parts, length = _split(x)

        def jaxloss_slope(x, *rest):
            *of_rows, out, out_core = rest
            i, part = lax.axis_index("rows"), lax.axis_index("part")
            here = pl.ds(i * ROWS, ROWS)
            m, label, scale, at_omitted, active = (
                load(v.at[here], COLUMN, optimized=False) for v in of_rows
            )

            def step(index, tile):
                t = part * length + index[0]
                x = load(tile, TILE).astype(jnp.float32)
                column = plgpu.broadcasted_iota(jnp.int32, _SHAPE, 1, layout=TILE)
                at_label = column == across(label - t * COLUMNS)
                x = jnp.where(across(active) == 0, -jnp.inf, x)
                dx = exp(x - across(m)) * across(scale)
                dx = jnp.where(at_label, across(at_omitted), dx)
                there = out.at[here, pl.ds(t * COLUMNS, COLUMNS)]
                put(out_core, index[0], dx, there)

            _over_tiles(x, i, part, length, step)
            plgpu.wait_smem_to_gmem(0)

        # A row that asks for nothing gets 0, whatever it holds.
        m, scale = (jnp.where(active, v, 0) for v in (m, scale))
        of_rows = (
            _padded(v, row_tiles * ROWS, 0)
            for v in (m, omitted, scale, at_omitted, active.astype(jnp.int32))
        )
        held = plgpu.SMEM((2, *_SHAPE), x.dtype, transforms=transforms(x.dtype))
        (dx,) = call(
            jaxloss_slope,
            (x, *of_rows),
            [(x.shape, x.dtype)],
            grid=(row_tiles, parts),
            grid_names=("rows", "part"),
            scratch_types=[held],
        )
        return dx

    return per_row(_by_takes(compute, otherwise))
