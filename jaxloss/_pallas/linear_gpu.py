"""The row parts of ``hidden @ kernel`` on a Hopper GPU, whose logits never leave the registers.

XLA writes the logits to memory in float32 and reads them back: a fifth of the product's time. Here
two groups of threads hold a tile of them each, reduce it, and write three numbers a row; a third
one fetches the operands of what comes next.

Letters: N tokens, D features, V columns of the kernel, C classes; n and v of a tile.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxloss._pallas.rows_gpu import (
    COLUMN,
    TILE,
    across,
    call,
    exp,
    load,
    merged,
    transforms,
)
from jaxloss._xla import mesh
from jaxloss._xla.elementary import finite

_CORES = 132  # of an H100 and an H200
# Of a group's tile, and how many features' are fetched ahead. Of the tiles that fit, measured on an
# H200 the fastest: the two groups take tokens of their own and share the classes.
_TOKENS, _CLASSES, _FEATURES, _STEPS = 64, 256, 64, 3
LEAST = 2**33  # multiplications that make up for starting a kernel


def takes(tokens: int, features: int, vocab: int) -> bool:
    """Whether the operands can be copied by tiles, and are enough of them to start a kernel."""
    return (
        features % _FEATURES == 0
        and features >= _STEPS * _FEATURES
        and vocab % 64 == 0
        and tokens * features * vocab >= LEAST
    )


def row_part(
    hidden: Array,
    kernel: Array,
    bias: Any,
    label: Array,
    vocab_axis: int,
    columns: int,
    count: Any = None,
):
    """``(m, s, x_omitted)`` of ``parts.RowPart``, [N] each, of labels ``[N]`` among C columns.

    ``count``: the tokens past it may be left out, and are anything.
    """
    tokens, features = hidden.shape
    n, v, shape = 2 * _TOKENS, _CLASSES, (_TOKENS, _CLASSES)
    rows, tiles = pl.cdiv(tokens, n), pl.cdiv(columns, v)
    padded = rows * n
    # No label at all, and not the column past the last: the last tile may have one.
    label = jnp.where(label < columns, label, -1)
    label = jnp.pad(label, (0, padded - tokens), constant_values=-1)
    hidden = jnp.pad(hidden, ((0, -tokens % 8), (0, 0)))
    count = jnp.full((1,), tokens, jnp.int32) if count is None else count.reshape(1)
    offset = None
    if bias is not None:
        offset = jnp.pad(bias[:columns].astype(jnp.float32), (0, tiles * v - columns))
    # Of a group's tokens and a tile's classes: most of the tiles have no label to leave out.
    of_tile = lax.broadcasted_iota(jnp.int32, (padded // _TOKENS, _TOKENS, tiles), 2)
    has_label = jnp.any((label // v).reshape(-1, _TOKENS, 1) == of_tile, axis=1).astype(jnp.int32)
    offset = () if offset is None else (offset,)
    args = mesh.varying_alike(hidden, kernel, label, has_label, count, *offset)

    def jaxloss_linear_row_part(hidden, kernel, labels, has_label, count, *rest):
        *offset, m_out, s_out, x_out = rest
        t, accumulator = transforms(hidden.dtype), plgpu.ACC  # pyright: ignore
        of_kernel = plgpu.BlockSpec((_FEATURES, v), lambda k: (k, 0), transforms=t)
        if vocab_axis == 0:
            of_kernel = plgpu.BlockSpec((v, _FEATURES), lambda k: (0, k), transforms=t)

        def pipeline(step, context):
            return plgpu.emit_pipeline_warp_specialized(
                step,
                grid=(features // _FEATURES,),
                memory_registers=40,
                in_specs=[
                    plgpu.BlockSpec((n, _FEATURES), lambda k: (0, k), transforms=t),
                    of_kernel,
                ],
                wg_axis="group",
                num_compute_wgs=2,
                max_concurrent_steps=_STEPS,
                compute_context=context,
            )

        def tile(held, out, i, j):
            group = lax.axis_index("group")
            part = i * 2 + group
            here = pl.ds(part * _TOKENS, _TOKENS)

            def column():
                return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TILE)

            def step(_, hidden, kernel, total):
                if vocab_axis == 0:
                    kernel = kernel.transpose((1, 0))
                plgpu.wgmma(total, hidden.at[pl.ds(group * _TOKENS, _TOKENS)], kernel)
                plgpu.wgmma_wait(0)
                return total

            def reduced(run):
                @partial(pl.run_scoped, total=accumulator(shape, jnp.float32))
                def _(total):
                    run(total)
                    x = total[...]
                    for o in offset:
                        o = load(o.at[pl.ds(j * v, v)], TILE.reduce(0), optimized=False)
                        x += lax.broadcast_in_dim(o, shape, [1])
                    if columns % v:  # padding may hold anything
                        x = jnp.where(column() < columns - j * v, x, -jnp.inf)
                    m = jnp.max(x, axis=1)

                    def all_of():
                        s = jnp.sum(exp(x - across(finite(m), shape)), axis=1)
                        none = plgpu.layout_cast(jnp.zeros((_TOKENS,), jnp.float32), COLUMN)
                        return s, none

                    def but_label():
                        label = load(labels.at[here], COLUMN, optimized=False)
                        at_label = column() == across(label - j * v, shape)
                        # Before the others: after them registers are spilled.
                        own = jnp.sum(jnp.where(at_label, x, 0.0), axis=1)
                        others = jnp.where(at_label, 0.0, exp(x - across(finite(m), shape)))
                        return jnp.sum(others, axis=1), own

                    s, own = lax.cond(has_label[part, j] > 0, but_label, all_of)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile's
                    out[group, 0], out[group, 1], out[group, 2] = m, s, own
                    plgpu.commit_smem()
                    for k, to in enumerate((m_out, s_out, x_out)):
                        plgpu.copy_smem_to_gmem(out.at[group, k], to.at[j, here])

            classes = pl.ds(j * v, v)
            operands = (
                hidden.at[pl.ds(i * n, n), :],
                kernel.at[:, classes] if vocab_axis == 1 else kernel.at[classes],
            )
            pipeline(step, reduced)(*operands, allocations=held)

        nothing = lambda *_: None  # noqa: E731
        held = pipeline(nothing, nothing).get_allocations(hidden, kernel)
        out = plgpu.SMEM((2, 3, _TOKENS), jnp.float32)

        @partial(pl.run_scoped, held=held, out=out, collective_axes="group")
        def _(held, out):
            @plgpu.nd_loop((rows * tiles,), collective_axes="core")
            def _(loop):
                # Neighbours in time share operands, which are then found in the second cache.
                i, j = plgpu.planar_snake(loop.index[0], (rows, tiles), 0, 8)
                pl.when(i * n < count[0])(lambda: tile(held, out, i, j))

        plgpu.wait_smem_to_gmem(0)

    m, s, own = call(
        jaxloss_linear_row_part,
        args,
        [((tiles, padded), jnp.float32)] * 3,
        grid=(_CORES,),
        grid_names=("core",),
        num_threads=3,
        thread_name="group",
    )
    m, s, own = (x[:, :tokens] for x in (m, s, own))
    own = jnp.where(label[:tokens] < 0, jnp.nan, jnp.sum(own, axis=0))
    return *merged(m, s), own
