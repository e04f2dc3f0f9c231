"""The row parts of ``hidden @ kernel`` on a TPU, and the logits' gradient: none leaves the core.

XLA writes a block's logits to the chip's memory and reads them back for their row parts, and has
programs of several times the product's instructions for their gradient. Here a tile of logits is
reduced, or made the gradient that is written, where it was computed.

Letters: N tokens, D features, V columns of the kernel, C classes; n and v of a tile.
"""

from collections.abc import Callable
from functools import partial, reduce
from itertools import compress
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxloss._xla import mesh
from jaxloss._xla.elementary import exp_is_long, finite, short_exp

# Bytes of a core's own that the tiles may take: chips up to v4 have 16 MiB, later ones 64 and more.
MEMORY = 48 * 2**20
LANES = 128  # of a register


def tiles(tokens: int, features: int) -> tuple[int, int] | None:
    """(n, v), None where no tiles fit.

    The kernel is read once for each n tokens: 1024 are what keeps a v6e's product busy.
    """
    for n, v in ((1024, 512), (512, 512), (256, 512), (256, 256), (128, 256)):
        n = min(n, -(-tokens // 16) * 16)
        # Operands are held twice, one tile being fetched; of logits, their exponential and masks.
        if 2 * 2 * (n + v) * features + 4 * 4 * n * v <= MEMORY:
            return n, v
    return None


def _operands(hidden, kernel, bias, vocab_axis: int, n: int, v: int, of_columns):
    """The specifications of what a tile's logits are made of, and the arrays."""
    features = hidden.shape[1]
    args = [hidden, kernel]
    specs = [
        pl.BlockSpec((n, features), lambda i, *_: (i, 0)),
        pl.BlockSpec((features, v), lambda *at: (0, of_columns(*at)))
        if vocab_axis == 1
        else pl.BlockSpec((v, features), lambda *at: (of_columns(*at), 0)),
    ]
    if bias is not None:
        args.append(bias[None])
        specs.append(pl.BlockSpec((1, v), lambda *at: (0, of_columns(*at))))
    return specs, args


def params(*semantics: Any) -> pltpu.CompilerParams:
    """Of each axis of the grid: ``"arbitrary"`` where its steps are one result."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=MEMORY + 8 * 2**20)


def _cost(hidden: Array, kernel: Array, columns: int, n: int) -> pl.CostEstimate:
    tokens, features = hidden.shape
    return pl.CostEstimate(
        flops=2 * tokens * features * columns,
        bytes_accessed=hidden.nbytes + pl.cdiv(tokens, n) * kernel.nbytes,
        transcendentals=tokens * columns,
    )


def exp(x: Array) -> Array:
    """The accurate one: Mosaic takes each chip's own instruction."""
    return short_exp(x) if exp_is_long() else jnp.exp(x)


def _logits(hidden, kernel, bias, vocab_axis: int) -> Array:
    contract = (((1,), (1 - vocab_axis,)), ((), ()))
    x = lax.dot_general(hidden[...], kernel[...], contract, preferred_element_type=jnp.float32)
    for b in bias:
        x += b[...].astype(jnp.float32)
    return x


def _tile(count, label, hidden, kernel, *rest, vocab_axis: int, columns: int):
    *bias, m_out, s_out, x_omitted_out, m, s, x_omitted = rest
    j, v = pl.program_id(1), kernel.shape[vocab_axis]

    @pl.when(j == 0)
    def _():
        m[...] = jnp.full_like(m, -jnp.inf)
        s[...] = jnp.zeros_like(s)
        x_omitted[...] = jnp.full_like(x_omitted, -jnp.inf)

    @pl.when(pl.program_id(0) * hidden.shape[0] < count[0])
    def _():
        arrays = label, hidden, kernel, bias, m, s, x_omitted
        _merge(*arrays, j * v, vocab_axis=vocab_axis, columns=columns)

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        high = jnp.max(m[...], axis=1, keepdims=True)
        m_out[...] = high
        s_out[...] = jnp.sum(s[...] * exp(m[...] - finite(high)), axis=1, keepdims=True)
        own = jnp.max(x_omitted[...], axis=1, keepdims=True)
        x_omitted_out[...] = jnp.where(label[...] < 0, jnp.nan, own)


def _merge(label, hidden, kernel, bias, m, s, x_omitted, first, *, vocab_axis: int, columns: int):
    """Into the parts of n rows go those of the v columns from ``first`` on, as in parts.merge.

    Each of a register's lanes has a part of its own, of every 128th column: across lanes a core
    takes longer than it does to compute.
    """
    v = kernel.shape[vocab_axis]
    x = _logits(hidden, kernel, bias, vocab_axis)
    column = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    if columns % v:  # the last tile hangs over the edge, and holds there whatever it finds
        x = jnp.where(column < columns - first, x, -jnp.inf)
    at_label = column == label[...] - first
    some = [slice(at, at + LANES) for at in range(0, v, LANES)]
    before = m[...]
    m[...] = reduce(jnp.maximum, (x[:, at] for at in some), before)
    high = finite(m[...])
    total, own = s[...] * exp(before - high), x_omitted[...]
    for at in some:
        total = jnp.where(at_label[:, at], total, total + exp(x[:, at] - high))
        own = jnp.where(at_label[:, at], x[:, at], own)
    s[...], x_omitted[...] = total, own


def in_32_bits(call: Callable) -> Callable:
    """A core's own integers have them, whatever ``jax_enable_x64`` says."""

    def traced(*args):
        with jax.enable_x64(False):
            return call(*args)

    return traced


def _one_after_the_other(call: Callable) -> Callable:
    """``call(count, *arrays)``, and a batch of counts in a loop.

    JAX would do so too, but with a state that varies over no axis of a mesh.
    """
    rows = jax.custom_batching.custom_vmap(call)

    @rows.def_vmap
    def _(size, batched, *args):
        if not batched[0]:
            out = jax.vmap(call, [0 if b else None for b in batched])(*args)
        else:

            def one(some):
                some = iter(some)
                return rows(*(next(some) if b else x for x, b in zip(args, batched, strict=True)))

            out = lax.map(one, list(compress(args, batched)))
        return out, jax.tree.map(lambda _: True, out)

    return rows


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

    ``count``: tiles of tokens past it are left out; those tokens are anything.
    """
    tokens, features = hidden.shape
    n, v = cast(tuple[int, int], tiles(tokens, features))
    last = pl.cdiv(columns, v) - 1

    def of_columns(i, j, count):
        # For a tile that is left out the one read last stays: nothing is read.
        return jnp.where(i * n < count[0], j, last)

    count = jnp.full((1,), tokens, jnp.int32) if count is None else count.reshape(1)
    # No label at all, and not the column past the last: the last tile may have one.
    of_rows = jnp.where(label < columns, label, -1)[:, None]
    specs, args = _operands(hidden, kernel, bias, vocab_axis, n, v, of_columns)
    args = mesh.varying_alike(count, of_rows, *args)
    kind = jax.typeof(args[0]).manual_axis_type
    out = jax.ShapeDtypeStruct((tokens, 1), jnp.float32, manual_axis_type=kind)
    a_row = pl.BlockSpec((n, 1), lambda i, *_: (i, 0))
    call = pl.pallas_call(
        partial(_tile, vocab_axis=vocab_axis, columns=columns),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(tokens, n), last + 1),
            in_specs=[a_row, *specs],
            out_specs=[a_row] * 3,
            scratch_shapes=[pltpu.VMEM((n, LANES), jnp.float32)] * 3,
        ),
        out_shape=[out] * 3,
        compiler_params=params("parallel", "arbitrary"),
        cost_estimate=_cost(hidden, kernel, columns, n),
        name="jaxloss_linear_row_part",
    )
    return tuple(x[:, 0] for x in _one_after_the_other(in_32_bits(call))(*args))


def _exponentials_tile(
    label, offset, hidden, kernel, *rest, highest: float, vocab_axis: int, columns: int
):
    *bias, e_out, s_out, x_label_out, s, x_label = rest
    j, v = pl.program_id(1), kernel.shape[vocab_axis]

    @pl.when(j == 0)
    def _():
        s[...] = jnp.zeros_like(s)
        x_label[...] = jnp.full_like(x_label, -jnp.inf)

    x = _logits(hidden, kernel, bias, vocab_axis)
    column = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    e = exp(jnp.minimum(x - offset[...], highest))
    if columns % v:  # padding may hold anything
        e = jnp.where(column < columns - j * v, e, 0)
    at_label = column == label[...] - j * v
    e = jnp.where(at_label, 0, e)
    e_out[...] = e.astype(e_out.dtype)
    own = x_label[...]
    some = [slice(at, at + LANES) for at in range(0, v, LANES)]
    for at in some:
        own = jnp.where(at_label[:, at], x[:, at], own)
    x_label[...] = own
    s[...] += reduce(jnp.add, (e[:, at] for at in some))

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        s_out[...] = jnp.sum(s[...], axis=1, keepdims=True)
        x_label_out[...] = jnp.max(x_label[...], axis=1, keepdims=True)


def exponentials(
    hidden: Array,
    kernel: Array,
    bias: Any,
    label: Array,
    offset: Array,
    highest: float,
    vocab_axis: int,
    columns: int,
) -> tuple[Array, Array, Array]:
    """``exp(min(x_j - offset, highest))`` of C columns ``[N, V]``, 0 at the label and past them, in
    the dtype of ``hidden``; their sums; the labels' logits, anything where there is no label."""
    tokens, features = hidden.shape
    n, v = cast(tuple[int, int], tiles(tokens, features))
    vocab = kernel.shape[vocab_axis]
    specs, args = _operands(hidden, kernel, bias, vocab_axis, n, v, lambda i, j: j)
    # No label at all, and not the column past the last.
    label = jnp.where(label < columns, label, -1)
    args = mesh.varying_alike(label[:, None], offset[:, None], *args)
    kind = jax.typeof(args[0]).manual_axis_type
    a_row = pl.BlockSpec((n, 1), lambda i, j: (i, 0))
    call = pl.pallas_call(
        partial(_exponentials_tile, highest=highest, vocab_axis=vocab_axis, columns=columns),
        grid=(pl.cdiv(tokens, n), pl.cdiv(vocab, v)),
        in_specs=[a_row, a_row, *specs],
        out_specs=[pl.BlockSpec((n, v), lambda i, j: (i, j)), a_row, a_row],
        scratch_shapes=[pltpu.VMEM((n, LANES), jnp.float32)] * 2,
        out_shape=[
            jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
            for shape, dtype in (
                ((tokens, vocab), hidden.dtype),
                *[((tokens, 1), jnp.float32)] * 2,
            )
        ],
        compiler_params=params("parallel", "arbitrary"),
        cost_estimate=_cost(hidden, kernel, vocab, n),
        name="jaxloss_linear_exponentials",
    )
    e, s, x_label = in_32_bits(call)(*args)
    return e, s[:, 0], x_label[:, 0]


def _slope_tile(m, label, scale, at_omitted, active, hidden, kernel, *rest, vocab_axis: int):
    *bias, out = rest
    x = _logits(hidden, kernel, bias, vocab_axis)
    column = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    first = pl.program_id(1) * x.shape[1]
    dx = jnp.where(active[...] != 0, exp(x - m[...]) * scale[...], 0)
    out[...] = jnp.where(column == label[...] - first, at_omitted[...], dx).astype(out.dtype)


def slope(hidden: Array, kernel: Array, bias: Any, rows: tuple, vocab_axis: int) -> Array:
    """``passes.slope_pass`` of the logits of all columns and ``rows``, [N] each: what it takes
    beside them. In the dtype of ``hidden``."""
    tokens, features = hidden.shape
    columns = kernel.shape[vocab_axis]
    n, v = cast(tuple[int, int], tiles(tokens, features))
    specs, args = _operands(hidden, kernel, bias, vocab_axis, n, v, lambda i, j: j)
    m, *others, active = rows
    of_rows = (x[:, None] for x in (m, *others, active.astype(m.dtype)))
    args = mesh.varying_alike(*of_rows, *args)
    kind = jax.typeof(args[0]).manual_axis_type
    call = pl.pallas_call(
        partial(_slope_tile, vocab_axis=vocab_axis),
        grid=(pl.cdiv(tokens, n), pl.cdiv(columns, v)),
        in_specs=[pl.BlockSpec((n, 1), lambda i, j: (i, 0))] * 5 + specs,
        out_specs=pl.BlockSpec((n, v), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((tokens, columns), hidden.dtype, manual_axis_type=kind),
        compiler_params=params("parallel", "parallel"),
        cost_estimate=_cost(hidden, kernel, columns, n),
        name="jaxloss_linear_slope",
    )
    return in_32_bits(call)(*args)
