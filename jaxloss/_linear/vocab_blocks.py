"""The row losses of ``hidden @ kernel``, a block of the vocabulary at a time.

Parts of disjoint classes merge, so the log-sum-exp takes one product, block by block. The gradient
computes each block's logits again and takes two more: four in all. Neither the logits nor a float32
d_kernel is held: a block of d_kernel is final when it is written, in the kernel's own dtype.

Letters: N tokens, D features, V columns of the kernel, C classes, B columns of a block.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._linear import kernels, packing, pallas_rows
from jaxloss._linear.blocks import over_blocks
from jaxloss._linear.product import Product, Sweep, in_rows
from jaxloss._numerics import parts, ranking
from jaxloss._numerics.logits import Logits, Scaling
from jaxloss._numerics.rows import (
    RowLosses,
    RowState,
    finalize,
    gradient_coefficients,
    row_gradient,
    row_tangents,
    soft_gradient,
    sparse_gradient,
)
from jaxloss._pallas import dispatch
from jaxloss._tokens import targets
from jaxloss._xla import indexing, mesh
from jaxloss._xla.derivatives import (
    differentiable,
    jvp_of_moving,
    scale_rows,
    unbroadcast,
    with_derivative_of,
)


class Operands(NamedTuple):
    """What is differentiated, None where there is none; or something for each of them."""

    product: Product  # of N tokens
    probabilities: Any = None  # [N, C]
    weight: Any = None  # [C]
    uniform: Any = None  # [1, 1] or [N, 1], of every class
    extra: Any = None  # [N, k]


class Constants(NamedTuple):
    """What is not differentiated."""

    label: Any  # [N], C: no such class; None: probabilities
    mask: Any = None  # [R, C], the classes that exist, one row for all tokens or
    mask_row: Any = None  # [N], each token's row of the mask
    index: Any = None  # [N, k], of extra
    valid: Any = None  # [N], valid tokens, which the kernel alone skips; None: it computes all
    some: Any = None  # [R], the mask's rows that have a class; in the others all classes are taken
    asked: Any = None  # [N], the tokens whose probabilities are read: of the others 0; None: all


class Options(NamedTuple):
    """What is static."""

    sweep: Sweep  # of B columns a step
    label_smoothing: float
    scaling: Scaling | None
    outputs: tuple[str, ...]  # of RowLosses
    dtype: Any  # of the accumulators
    fused: bool  # the log-sum-exp by the kernel for this backend


def _sealed(sweep):
    """``sweep``, a function of arrays alone, in one piece to the policies of ``jax.checkpoint``.

    Its products are those of a scan, which ``dots_saveable`` would save: all logits. A policy does
    not look into a function that has a derivative of its own.
    """
    return with_derivative_of(sweep, sweep)


def _cut(x: Any, start, size: int, axis: int = -1) -> Any:
    return None if x is None else lax.dynamic_slice_in_dim(x, start, size, axis)


def _block(
    options: Options, operands: Operands, constants: Constants, start, size: int
) -> parts.Rows:
    omitted = constants.label
    if omitted is not None:
        omitted = indexing.local_index(omitted, start, size)
    mask = _cut(constants.mask, start, size)
    if mask is not None and constants.some is not None:
        mask |= ~constants.some[:, None]
    if mask is not None and constants.mask_row is not None:
        mask = mask[constants.mask_row]
    x = operands.product.block(start, size).logits()
    some = (_cut(operands.probabilities, start, size), _cut(operands.weight, start, size))
    sparse = None
    if operands.extra is not None:
        sparse = (indexing.local_index(constants.index, start, size), operands.extra)
    soft = _soft(options, mask, constants.asked, size, *some, operands.uniform)
    logits = Logits(x, mask, options.scaling, pallas_bytes=4)
    return parts.Rows(logits, omitted, soft, sparse)


def _soft(options: Options, mask, asked, size: int, probabilities, weight, uniform) -> Any:
    wide = options.dtype
    if asked is not None:
        probabilities = jnp.where(asked[:, None], probabilities, 0)
    soft = targets.soft_targets(
        probabilities, uniform, mask, weight, options.label_smoothing, size, wide
    )
    return indexing.of_rank(soft, 2)


def _swept(options: Options, operands: Operands, constants: Constants):
    """(RowPart, the highest logits, the labels' logits): one product, block by block."""
    labelled = constants.label is not None

    def step(start, size):
        b = _block(options, operands, constants, start, size)
        part = parts.row_part(b, options.outputs)
        best = of_label = None
        if "prediction" in options.outputs:
            best = ranking.argmax(b.logits, start)
            if labelled:
                of_label = indexing.gather_class(_uncapped(b), b.omitted)
                of_label = jnp.where(b.omitted < size, of_label, 0)
        return replace(part, omitted=part.omitted + start), best, of_label

    def combine(state, new):
        (part, best, of_label), (new_part, new_best, new_of_label) = state, new
        if best is not None:
            better = new_best[0] > best[0]
            best = jax.tree.map(partial(jnp.where, better), new_best, best)
        if of_label is not None:
            of_label += new_of_label
        return parts.merge(part, new_part), best, of_label

    size, chunk = operands.product.num_classes, options.sweep.chunk
    part, best, of_label = over_blocks(size, chunk, step, combine)
    return replace(part, omitted=constants.label) if labelled else part, best, of_label


def _whole(options: Options, product: Product) -> Product:
    """Blocks are narrowed one by one, except for a Pallas kernel, which reads the array itself."""
    return product.whole(cast=options.fused or bool(product.gathered))


def _fused(options: Options, operands: Operands, constants: Constants) -> parts.RowPart:
    """The RowPart alone, of labels, by the kernel."""

    def swept(product, label, _):
        part, *_ = _swept(options, Operands(product), Constants(label))
        return part.m, part.s, part.x_omitted

    part = with_derivative_of(swept, pallas_rows.row_part)
    m, s, x_omitted = part(operands.product, constants.label, constants.valid)
    return parts.RowPart(m, s, x_omitted, constants.label)


def _forward(options: Options, operands: Operands, constants: Constants):
    """(RowLosses, RowState). One product, and one for the rank."""
    operands = operands._replace(product=_whole(options, operands.product))
    classes, axes = operands.product.num_classes, options.sweep.vocab_axes
    best = of_label = None
    if options.fused:
        part = _fused(options, operands, constants)
    else:
        part, best, of_label = _sealed(partial(_swept, options))(operands, constants)
    part = parts.merge_shards(part, axes, classes)
    losses, state = finalize(part, options.outputs)
    if best is not None:
        first = mesh.first(classes, axes)
        losses = losses._replace(prediction=ranking.class_of(best[0], best[1] + first, axes))
    if of_label is not None:
        rank = _sealed(partial(_rank, options))(operands, constants, of_label)
        losses = losses._replace(rank=rank)
    return losses, state


def _uncapped(b: parts.Rows) -> Array:
    logits = b.logits.uncapped()
    return replace(logits, values=lax.stop_gradient(logits.values)).wide()


def _rank(options: Options, operands: Operands, constants: Constants, of_label: Array) -> Array:
    """The labels' ranks, from a sweep of its own: which logits are larger is known only once all
    blocks have been searched for the label. Where nobody reads it, XLA leaves the sweep out."""
    axes, classes = options.sweep.vocab_axes, operands.product.num_classes
    first = mesh.first(classes, axes)
    label, of_label, found = ranking.label_over_mesh(
        constants.label, of_label, classes, first, axes
    )

    def step(start, size):
        b = _block(options, operands, constants, start, size)
        return ranking.count_ahead(_uncapped(b), of_label, label - first - start)

    before = over_blocks(classes, options.sweep.chunk, step, jnp.add)
    return jnp.where(found, lax.psum(before, axes) if axes else before, -1)


def _at_block(state: RowState, start, size: int) -> RowState:
    return state._replace(omitted=indexing.local_index(state.omitted, start, size))


def _gradients(
    options: Options,
    active: Operands,
    operands: Operands,
    constants: Constants,
    state: RowState,
    ct: RowLosses,
) -> Operands:
    """The gradients of ``sum(ct * losses)`` for the ``active`` operands. Three products."""
    whole = operands._replace(product=_whole(options, operands.product))
    sweep = partial(_swept_gradients, options, active)
    if constants.valid is None:
        total = sweep(whole, constants, state, ct)
    else:
        total = _of_valid(sweep, whole, constants, state, ct)
    total = total._replace(product=total.product.scattered())

    def settled(g, x):
        return None if g is None else mesh.sum_except(g, mesh.varies_over(x)).astype(x.dtype)

    return jax.tree.map(settled, total, operands, is_leaf=lambda x: x is None)


def _of_valid(sweep, operands: Operands, constants: Constants, state, ct) -> Operands:
    """The sweep over the fewest tokens that hold the valid ones: a quarter, a half or all."""
    valid, tokens = constants.valid, constants.valid.size
    order, positions = packing.valid_first(valid), packing.positions(valid)

    def with_hidden(operands, hidden):
        return operands._replace(product=replace(operands.product, hidden=hidden))

    def of(size, operands, constants, state, ct):
        if size == tokens:
            return sweep(operands, constants, state, ct)
        own = operands.product.hidden, constants.label, state, ct
        first = partial(packing.in_order, order=order[:size])
        hidden, label, *rows = jax.tree.map(first, own)
        total = sweep(with_hidden(operands, hidden), constants._replace(label=label), *rows)
        return with_hidden(total, packing.gather_rows(total.product.hidden, positions))

    # Nothing in a sweep communicates: each device of a mesh has a size of its own.
    number = jnp.sum(valid, dtype=jnp.int32)
    return packing.of_fewest(number, tokens, of, operands, constants, state, ct)


def _swept_gradients(
    options: Options,
    active: Operands,
    operands: Operands,
    constants: Constants,
    state: RowState,
    ct: RowLosses,
) -> Operands:
    """This device's part, float32 where it is a sum over blocks."""

    def step(start, size):
        given = operands, constants, _at_block(state, start, size), ct
        return start, _block_gradients(options, active, *given, start, size)

    def combine(total, new):
        start, new = new

        def put(x, g):
            if x is None:
                return None
            return lax.dynamic_update_slice_in_dim(x, g.astype(x.dtype), start, -1)

        own, of_block = total.product, new.product
        product = replace(
            own,
            hidden=parts.add(own.hidden, of_block.hidden),
            kernel=kernels.with_block(own.kernel, of_block.kernel, start, own.vocab_axis),
            bias=put(own.bias, of_block.bias),
        )
        return Operands(
            product,
            put(total.probabilities, new.probabilities),
            put(total.weight, new.weight),
            parts.add(total.uniform, new.uniform),
            parts.add(total.extra, new.extra),
        )

    def begin(first):
        _, new = first
        # Of these there is a sum over blocks; of the others each block has its own.
        kernel = kernels.for_blocks(new.product.kernel)
        product = replace(new.product, hidden=None, kernel=kernel)
        own = new._replace(product=product, uniform=None, extra=None)

        def blank(g, x):
            if g is None:
                return None
            # A kernel that was narrowed for its products has a gradient of another dtype.
            return jnp.zeros_like(x, dtype=x.dtype if operands.product.dtype is None else g.dtype)

        return combine(jax.tree.map(blank, own, operands, is_leaf=lambda x: x is None), first)

    size, chunk = operands.product.num_classes, options.sweep.chunk
    return over_blocks(size, chunk, step, combine, begin)


def _block_gradients(
    options: Options,
    active: Operands,
    operands: Operands,
    constants: Constants,
    state: RowState,
    ct: RowLosses,
    start,
    size: int,
) -> Operands:
    """Of the block's own columns of what has them; ``state`` is the block's."""
    b = _block(options, operands, constants, start, size)
    product = operands.product.block(start, size)
    if options.fused and dispatch.product_gradient() and not active.product.bias:
        dx = pallas_rows.slope(product, gradient_coefficients(state, ct))
    else:
        dx = row_gradient(b, state, ct)
    of_product = product.gradients(dx, active.product)
    d_kernel = of_product.kernel
    if d_kernel is not None and kernels.is_array(product.kernel):
        own = product.kernel.dtype if product.dtype is None else product.wide
        d_kernel = in_rows(d_kernel, own)
    all_classes = operands.product.num_classes
    of_product = replace(of_product, kernel=d_kernel, num_classes=all_classes)
    d_probabilities = d_weight = d_uniform = d_extra = None
    if ct.soft is not None and active.extra:
        slope = sparse_gradient(b, state)
        d_extra = scale_rows(ct.soft, slope)
    dense = active.probabilities or active.weight or active.uniform
    if ct.soft is not None and b.soft is not None and dense:
        slope = soft_gradient(b, state)
        slope = scale_rows(ct.soft, slope)
        soft_b, pullback = jax.vjp(
            partial(_soft, options, b.logits.exist, constants.asked, size),
            _cut(operands.probabilities, start, size),
            _cut(operands.weight, start, size),
            operands.uniform,
        )
        d_probabilities, d_weight, d_uniform = pullback(unbroadcast(slope, soft_b))
    return Operands(of_product, d_probabilities, d_weight, d_uniform, d_extra)


def _tangents(options: Options, residuals, tangents) -> RowLosses:
    operands, constants, state = residuals

    def step(start, size):
        def of_operands(*args):
            full = Operands(*args)
            full = full._replace(product=_whole(options, full.product))
            b = _block(options, full, constants, start, size)
            return (b.logits.values, b.soft, b.sparse and b.sparse[1]), (b.logits.exist, b.sparse)

        out, moved, (exist, sparse) = jvp_of_moving(of_operands, operands, tangents, has_aux=True)
        x, soft, _ = out
        logits = Logits(x, exist, options.scaling, pallas_bytes=4)
        rows = parts.Rows(logits, soft=soft, sparse=sparse)
        here = _at_block(state, start, size)
        dx, d_soft, d_extra = moved
        return row_tangents(rows, here, options.outputs, dx, d_soft, d_extra)

    combine = partial(jax.tree.map, jnp.add)
    axes = options.sweep.vocab_axes
    total = over_blocks(operands.product.num_classes, options.sweep.chunk, step, combine)
    return mesh.sums(total, axes) if axes else total


def row_losses_by_block(options: Options, operands: Operands, constants: Constants) -> RowLosses:
    """``RowLosses``, [N] each, as ``rows.row_losses`` of the logits and ``ranking`` have them."""

    def value(operands, constants):
        return _forward(options, operands, constants)[0]

    def forward(_, operands, constants):
        out, state = _forward(options, operands, constants)
        return out, (operands, constants, state)

    def backward(active, saved, ct):
        operands, constants, state = saved
        return _gradients(options, active[0], operands, constants, state, ct), None

    def tangent(saved, tangents):
        return _tangents(options, saved, tangents[0])

    return differentiable(value, forward, backward, tangent, asks=True)(operands, constants)
