"""The row parts of ``hidden @ kernel`` on a TPU, whose logits never leave the core's own memory.

XLA writes a block's logits to the chip's memory and reads them back, which takes longer than the
product itself where D is a few thousand. Here a tile of them is reduced where it was computed.

Letters: N tokens, D features, V columns of the kernel, C classes; n and v of a tile.
"""

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxloss import _mesh

# Bytes of a core's own that the tiles may take: chips up to v4 have 16 MiB, later ones 64 and more.
_MEMORY = 48 * 2**20


def tiles(tokens: int, features: int) -> tuple[int, int] | None:
    """(n, v), None where no tiles fit.

    The kernel is read once for each n tokens: 1024 are what keeps a v6e's product busy.
    """
    for n, v in ((1024, 512), (512, 512), (256, 512), (256, 256), (128, 256)):
        n = min(n, -(-tokens // 16) * 16)
        # Operands are held twice, one tile being fetched; of logits, their exponential and masks.
        if 2 * 2 * (n + v) * features + 4 * 4 * n * v <= _MEMORY:
            return n, v
    return None


def exp(x: Array) -> Array:
    """exp(x) of x <= 0, to a unit in the last place: Mosaic has the TPU's coarse one alone.

    2^k exp(r), |r| <= ln(2) / 2, with ln(2) in two parts, so that k times the first is exact, and
    exp(r) a polynomial: Cephes' expf (S. L. Moshier, 1992).
    """
    least = -87.3  # 2^-126; below it there are only subnormal numbers, which a TPU flushes to 0
    y = jnp.maximum(x, least)
    k = jnp.floor(y * 1.44269504088896341 + 0.5)
    r = (y - k * 0.693359375) + k * 2.12194440e-4
    p = jnp.full_like(r, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + c
    p = p * (r * r) + r + 1
    power = lax.bitcast_convert_type((k.astype(jnp.int32) + 127) << 23, jnp.float32)
    return jnp.where(x < least, 0, p * power)


def _tile(count, label, hidden, kernel, *rest, vocab_axis: int, columns: int):
    *bias, m, s, x_kept = rest
    j, v = pl.program_id(1), kernel.shape[vocab_axis]

    @pl.when(j == 0)
    def _():
        m[...] = jnp.full_like(m, -jnp.inf)
        s[...] = jnp.zeros_like(s)
        x_kept[...] = jnp.full_like(x_kept, jnp.nan)

    @pl.when(pl.program_id(0) * hidden.shape[0] < count[0])
    def _():
        arrays = label, hidden, kernel, bias, m, s, x_kept
        _merge(*arrays, j * v, vocab_axis=vocab_axis, columns=columns)


def _merge(label, hidden, kernel, bias, m, s, x_kept, first, *, vocab_axis: int, columns: int):
    """Into the part of n rows goes that of the v columns from ``first`` on, as in _rows.merge."""
    v = kernel.shape[vocab_axis]
    contract = (((1,), (1 - vocab_axis,)), ((), ()))
    x = lax.dot_general(hidden[...], kernel[...], contract, preferred_element_type=jnp.float32)
    for b in bias:
        x += b[...].astype(jnp.float32)
    column = first + lax.broadcasted_iota(jnp.int32, x.shape, 1)
    if columns % v:  # the last tile hangs over the edge, and holds there whatever it finds
        x = jnp.where(column < columns, x, -jnp.inf)
    at_label, before = column == label[...], m[...]
    m[...] = jnp.maximum(before, jnp.max(x, axis=1, keepdims=True))
    high = jnp.where(m[...] == -jnp.inf, 0, m[...])  # _passes.finite
    others = jnp.sum(jnp.where(at_label, 0, exp(x - high)), axis=1, keepdims=True)
    s[...] = s[...] * exp(before - high) + others
    own = jnp.sum(jnp.where(at_label, x, 0), axis=1, keepdims=True)
    here = (label[...] >= first) & (label[...] < first + v)
    x_kept[...] = jnp.where(here, own, x_kept[...])


def row_part(
    hidden: Array,
    kernel: Array,
    bias: Any,
    kept: Array,
    vocab_axis: int,
    columns: int,
    count: Any = None,
):
    """``(m, s, x_kept)`` of ``_rows.RowPart``, [N] each, for labels ``kept[N]`` among C columns.

    ``count``: tiles of tokens past it are left out; those tokens are anything.
    """
    tokens, features = hidden.shape
    n, v = cast(tuple[int, int], tiles(tokens, features))
    rows, last = pl.cdiv(tokens, n), pl.cdiv(columns, v) - 1
    of_rows = pl.BlockSpec((n, 1), lambda i, j, count: (i, 0))

    def of_columns(i, j, count):
        # For a tile that is left out the one read last stays: nothing is read.
        return jnp.where(i * n < count[0], j, last)

    count = jnp.full((1,), tokens, jnp.int32) if count is None else count.reshape(1)
    # No label at all, and not the column past the last: the last tile may have one.
    args = [count, jnp.where(kept < columns, kept, -1)[:, None], hidden, kernel]
    specs = [
        of_rows,
        pl.BlockSpec((n, features), lambda i, j, count: (i, 0)),
        pl.BlockSpec((features, v), lambda *at: (0, of_columns(*at)))
        if vocab_axis == 1
        else pl.BlockSpec((v, features), lambda *at: (of_columns(*at), 0)),
    ]
    if bias is not None:
        args.append(bias[None])
        specs.append(pl.BlockSpec((1, v), lambda *at: (0, of_columns(*at))))
    args = _mesh.together(*args)
    kind = jax.typeof(args[0]).manual_axis_type
    out = jax.ShapeDtypeStruct((tokens, 1), jnp.float32, manual_axis_type=kind)
    call = pl.pallas_call(
        partial(_tile, vocab_axis=vocab_axis, columns=columns),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows, last + 1),
            in_specs=specs,
            out_specs=[of_rows] * 3,
        ),
        out_shape=[out] * 3,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_MEMORY + 8 * 2**20
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * features * columns,
            bytes_accessed=hidden.nbytes + rows * kernel.nbytes,
            transcendentals=tokens * columns,
        ),
        name="jaxloss_linear_row_part",
    )
    return tuple(x[:, 0] for x in call(*args))
