"""The row parts of ``hidden @ kernel`` on a Hopper GPU, and its exponentials.

The logits never leave the registers.

XLA writes the logits to memory in float32 and reads them back: a fifth of the product's time. Here
two groups of threads hold a tile of them each, reduce it, and write three numbers a row; a third
one fetches the operands of what comes next.

Letters: N tokens, D features, V columns of the kernel, C classes; n and v of a tile.
"""

from collections.abc import Callable
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
_SHAPE = _TOKENS, _CLASSES
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
    tokens = hidden.shape[0]
    tiles = pl.cdiv(columns, _CLASSES)
    label, of_tile = _labels(label, tokens, columns, tiles)
    count = jnp.full((1,), tokens, jnp.int32) if count is None else count.reshape(1)

    def jaxloss_linear_row_part(hidden, kernel, labels, has_label, count, *rest):
        *bias, m_out, s_out, x_out = rest

        def reduced(x, out, group, i, j):
            part, here = _place(i, group)
            x = _with_bias(x[...], bias, j)
            if columns % _CLASSES:  # padding may hold anything
                x = jnp.where(_column() < columns - j * _CLASSES, x, -jnp.inf)
            m = jnp.max(x, axis=1)

            def all_of():
                s = jnp.sum(exp(x - across(finite(m), _SHAPE)), axis=1)
                none = plgpu.layout_cast(jnp.zeros((_TOKENS,), jnp.float32), COLUMN)
                return s, none

            def but_label():
                at_label = _at_label(labels, here, j)
                # Before the others: after them registers are spilled.
                own = jnp.sum(jnp.where(at_label, x, 0.0), axis=1)
                others = jnp.where(at_label, 0.0, exp(x - across(finite(m), _SHAPE)))
                return jnp.sum(others, axis=1), own

            s, own = lax.cond(has_label[part, j] > 0, but_label, all_of)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile's
            out[group, 0], out[group, 1], out[group, 2] = m, s, own
            plgpu.commit_smem()
            for k, to in enumerate((m_out, s_out, x_out)):
                plgpu.copy_smem_to_gmem(out.at[group, k], to.at[j, here])

        held = plgpu.SMEM((2, 3, _TOKENS), jnp.float32)
        _over_tiles(hidden, kernel, vocab_axis, tiles, held, reduced, count)

    out = [((tiles, label.size), jnp.float32)] * 3
    args = label, of_tile, count
    m, s, own = _call(jaxloss_linear_row_part, hidden, kernel, args, bias, tiles, out)
    m, s, own = (x[:, :tokens] for x in (m, s, own))
    own = jnp.where(label[:tokens] < 0, jnp.nan, jnp.sum(own, axis=0))
    return *merged(m, s), own


def exponentials(
    hidden: Array,
    kernel: Array,
    bias: Any,
    label: Array,
    offset: Array,
    highest: float,
    vocab_axis: int,
    columns: int,
) -> tuple[Array, Array]:
    """``exp(min(x_j - offset, highest))`` of C columns ``[N, V]``, 0 at the label and past
    them, in the dtype of ``hidden``; and their sums."""
    tokens, vocab = hidden.shape[0], kernel.shape[vocab_axis]
    tiles = pl.cdiv(vocab, _CLASSES)
    label, _ = _labels(label, tokens, columns, tiles)
    offset = jnp.pad(offset, (0, label.size - tokens))

    def jaxloss_linear_exponentials(hidden, kernel, labels, offsets, *rest):
        *bias, e_out, s_out = rest

        def stored(x, out, group, i, j):
            e_core, s_core = out
            _, here = _place(i, group)
            x = _with_bias(x[...], bias, j)
            offset = load(offsets.at[here], COLUMN, optimized=False)
            e = exp(jnp.minimum(x - across(offset, _SHAPE), highest))
            if columns < tiles * _CLASSES:  # padding may hold anything
                e = jnp.where(_column() < columns - j * _CLASSES, e, 0.0)
            e = jnp.where(_at_label(labels, here, j), 0.0, e)
            s = jnp.sum(e, axis=1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile's
            e_core[group], s_core[group] = e.astype(e_core.dtype), s
            plgpu.commit_smem()
            classes = pl.ds(j * _CLASSES, _CLASSES)
            plgpu.copy_smem_to_gmem(e_core.at[group], e_out.at[here, classes])
            plgpu.copy_smem_to_gmem(s_core.at[group], s_out.at[j, here])

        held = (
            plgpu.SMEM((2, *_SHAPE), hidden.dtype, transforms=transforms(hidden.dtype)),
            plgpu.SMEM((2, _TOKENS), jnp.float32),
        )
        _over_tiles(hidden, kernel, vocab_axis, tiles, held, stored)

    out = [((tokens, vocab), hidden.dtype), ((tiles, label.size), jnp.float32)]
    args = label, offset
    e, s = _call(jaxloss_linear_exponentials, hidden, kernel, args, bias, tiles, out)
    return e, jnp.sum(s[:, :tokens], axis=0)


def _labels(label: Array, tokens: int, columns: int, tiles: int) -> tuple[Array, Array]:
    """``(labels of whole tiles of tokens, which tiles have one)``; -1: no label at all."""
    padded = pl.cdiv(tokens, 2 * _TOKENS) * 2 * _TOKENS
    # Not the column past the last: the last tile may have one.
    label = jnp.where(label < columns, label, -1)
    label = jnp.pad(label, (0, padded - tokens), constant_values=-1)
    # Of a group's tokens and a tile's classes: most of the tiles have no label to leave out.
    of_tile = lax.broadcasted_iota(jnp.int32, (padded // _TOKENS, _TOKENS, tiles), 2)
    has_label = jnp.any((label // _CLASSES).reshape(-1, _TOKENS, 1) == of_tile, axis=1)
    return label, has_label.astype(jnp.int32)


def _call(body: Callable, hidden, kernel, args: tuple, bias: Any, tiles: int, out: list) -> Any:
    hidden = jnp.pad(hidden, ((0, -hidden.shape[0] % 8), (0, 0)))
    if bias is not None:
        past = tiles * _CLASSES - bias.shape[0]
        bias = jnp.pad(bias, (0, past)) if past > 0 else bias[: tiles * _CLASSES]
        args = *args, bias.astype(jnp.float32)
    return call(
        body,
        mesh.varying_alike(hidden, kernel, *args),
        out,
        grid=(_CORES,),
        grid_names=("core",),
        num_threads=3,
        thread_name="group",
    )


# Within a kernel: where a tile's rows are, its bias, its columns, and which are labels.


def _place(i: Any, group: Any) -> tuple[Any, Any]:
    part = i * 2 + group
    return part, pl.ds(part * _TOKENS, _TOKENS)


def _with_bias(x: Array, bias: Any, j: Any) -> Array:
    for b in bias:
        b = load(b.at[pl.ds(j * _CLASSES, _CLASSES)], TILE.reduce(0), optimized=False)
        x += lax.broadcast_in_dim(b, _SHAPE, [1])
    return x


def _column() -> Array:
    return plgpu.broadcasted_iota(jnp.int32, _SHAPE, 1, layout=TILE)


def _at_label(labels: Any, here: Any, j: Any) -> Array:
    label = load(labels.at[here], COLUMN, optimized=False)
    return _column() == across(label - j * _CLASSES, _SHAPE)


def _over_tiles(
    hidden: Any,
    kernel: Any,
    vocab_axis: int,
    tiles: int,
    out: Any,
    epilogue: Callable,
    count: Any = None,
) -> None:
    """``epilogue(x, out, group, i, j)`` of each tile's logits, by the two groups of threads.

    ``out``: what they hold of a core's memory. ``count``: tiles of tokens past it are left out.
    """
    features, n, v = hidden.shape[1], 2 * _TOKENS, _CLASSES
    rows = pl.cdiv(hidden.shape[0], n)
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

        def step(_, hidden, kernel, total):
            if vocab_axis == 0:
                kernel = kernel.transpose((1, 0))
            plgpu.wgmma(total, hidden.at[pl.ds(group * _TOKENS, _TOKENS)], kernel)
            plgpu.wgmma_wait(0)
            return total

        def reduced(run):
            @partial(pl.run_scoped, total=accumulator(_SHAPE, jnp.float32))
            def _(total):
                run(total)
                epilogue(total, out, group, i, j)

        classes = pl.ds(j * v, v)
        operands = (
            hidden.at[pl.ds(i * n, n), :],
            kernel.at[:, classes] if vocab_axis == 1 else kernel.at[classes],
        )
        pipeline(step, reduced)(*operands, allocations=held)

    nothing = lambda *_: None  # noqa: E731
    held = pipeline(nothing, nothing).get_allocations(hidden, kernel)

    @partial(pl.run_scoped, held=held, out=out, collective_axes="group")
    def _(held, out):
        @plgpu.nd_loop((rows * tiles,), collective_axes="core")
        def _(loop):
            # Neighbours in time share operands, which are then found in the second cache.
            i, j = plgpu.planar_snake(loop.index[0], (rows, tiles), 0, 8)
            if count is None:
                tile(held, out, i, j)
            else:
                pl.when(i * n < count[0])(lambda: tile(held, out, i, j))

    plgpu.wait_smem_to_gmem(0)
