r"""Chunks of tokens whose exponentials, and not the logits' gradient, are multiplied.

With ``E_j = exp(z_j - z_y)``, 0 at the label ``y``, ``S`` their sum, ``f = w / (1 + S)`` for a
token's weight ``w``, and ``c = -f S``::

    loss     = log1p(S)
    d_hidden = f (E W) + c W_y
    d_kernel = E^T (f h), and c h at the column y

``E`` is written once, narrow, as the product gives it: there is no pass for a maximum, none for a
gradient of the logits, and the label's term is never rounded to the products' dtype. ``f`` and
``c`` are ``rows.gradient_coefficients``, because other losses of ``S`` and ``z_y`` have factors of
their own. Rows whose ``S`` is too large have their maximum for an offset (``label_offset``).

Letters: N tokens, n of them in a chunk, D features, V columns of the kernel, C classes.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array

from jaxloss._linear import token_chunks
from jaxloss._linear.exponentials import (
    Exponentials,
    OfLabel,
    above_few,
    above_label,
    of_labels,
)
from jaxloss._linear.packing import Packing, gather_rows, of_fewest, pack, scatter_rows
from jaxloss._linear.product import Product, Sweep, on, padded
from jaxloss._linear.token_chunks import Operands
from jaxloss._numerics.logits import Logits, Scaling
from jaxloss._numerics.rows import finalize, gradient_coefficients
from jaxloss._tokens.classes import anywhere
from jaxloss._types import Axes
from jaxloss._xla import mesh
from jaxloss._xla.dtypes import downcast, upcast
from jaxloss._xla.indexing import gather_class, is_at, scatter_classes

_OUTPUTS = "nll", "logsumexp"  # of RowLosses


class RowLoss(NamedTuple):
    """A loss of what rows give. Its functions take the tokens' arrays and those that no token owns,
    as a ``LossFn`` does, and the number of columns."""

    targets: Callable  # (per_token, shared, columns) -> Targets, of labels
    losses: Callable  # (RowLosses, per_token, shared, columns) -> [n]
    scaling: Scaling | None
    fused: bool  # the exponentials by the kernel for this backend, where it has a form of the call


def _with_labels(row_loss: RowLoss, axes: Axes, operands: Operands) -> Operands:
    """With ``OfLabel`` as the last of what the tokens own. The kernel is whole."""
    product, *others = operands.student, operands.per_token, operands.shared
    column = cast(Array, row_loss.targets(*others, product.num_classes).label)
    of_label = OfLabel(column) if _by_few(row_loss) else of_labels(product, column, axes)
    return operands._replace(per_token=(*operands.per_token, *of_label))


def _by_few(row_loss: RowLoss) -> bool:
    return row_loss.fused and on("tpu")


def _of_chunk(
    row_loss: RowLoss,
    axes: Axes,
    product: Product,
    per_token: tuple,
    shared: tuple,
    weight: Array | None,
) -> tuple[tuple, OfLabel, Array | None, Exponentials]:
    """``(what the loss takes of per_token, of_label, whether the labels' classes exist,
    exponentials)``."""
    *own, column, logit, weights = per_token
    of_label, size = OfLabel(column, logit, weights), product.num_classes
    if _by_few(row_loss):
        return tuple(own), of_label, None, above_few(product, column, axes, weight)
    exist, label_exists = row_loss.targets(own, shared, size).existing(2), None
    if exist is not None:  # not of all tokens at once: it may have the logits' size
        here = jnp.broadcast_to(exist, (column.size, size))
        missing = (column < size) & ~gather_class(here, column)
        label_exists = ~anywhere(missing, axes)
    given = exist, label_exists, row_loss.scaling, axes, weight
    made = above_label(product, of_label, *given, fused=row_loss.fused and weight is not None)
    return tuple(own), of_label, label_exists, made


def losses(row_loss: RowLoss, sweep: Sweep, operands: Operands, packing: Packing):
    """What ``token_chunks.losses`` returns, by the same sums as :func:`gradients`."""

    def loss_fn(product, per_token, shared):
        given = row_loss, sweep.vocab_axes, product, per_token, shared
        own, _, _, made = _of_chunk(*given, weight=None)
        rows, _ = finalize(made.part, _OUTPUTS)
        return (row_loss.losses(rows, own, shared, product.num_classes),), ()

    prepared = partial(_with_labels, row_loss, sweep.vocab_axes)
    form = token_chunks.LOGITS._replace(prepared=prepared, read=lambda product: product)
    return token_chunks.losses(loss_fn, sweep, True, operands, packing, form)


def gradients(
    row_loss: RowLoss,
    sweep: Sweep,
    active: Operands,
    operands: Operands,
    packing: Packing,
    cts: tuple,
):
    """What ``token_chunks.gradients`` returns. Three products."""
    tokens = packing.valid.size  # jax.export may leave it open
    at_once = on("gpu") and isinstance(tokens, int) and sweep.chunk >= tokens
    # The label's term takes the label's place in E, and is not added to d_kernel, where there is no
    # wide sum of d_kernel; and on a TPU, which would add to columns one after another.
    in_place = at_once or on("tpu")
    form = token_chunks.LOGITS._replace(
        prepared=partial(_with_labels, row_loss, sweep.vocab_axes),
        gradients=partial(_chunk_gradients, in_place),
        finished=_without_others if in_place else _with_label_terms,
    )
    compute = partial(token_chunks.gradients, row_loss, form=form)
    if at_once:
        return _at_once(compute, sweep, active, operands, packing, cts)
    return compute(sweep, active, True, operands, packing, cts)


def _at_once(compute, sweep, active, operands, packing, cts):
    """One step takes all tokens that count, so that no accumulator is needed."""
    tokens = packing.valid.size

    def of(size, operands, packing, cts):
        own = sweep._replace(chunk=size, quarters=False)
        if size == tokens:
            return compute(own, active, True, operands, packing, cts)
        at = packing.order[:size]

        def some(x):
            return gather_rows(x, at)

        def of_all(x):
            return None if x is None else scatter_rows(at, mesh.blank(x, (tokens, *x.shape[1:])), x)

        hidden = some(operands.student.hidden)
        few = operands._replace(
            student=replace(operands.student, hidden=hidden),
            per_token=tuple(map(some, operands.per_token)),
        )
        packed = pack(at < tokens, size)
        *each, total = compute(own, active, True, few, packed, tuple(map(some, cts)))
        student = replace(total.student, hidden=of_all(total.student.hidden))
        total = total._replace(student=student, per_token=tuple(map(of_all, total.per_token)))
        return *(tuple(map(of_all, x)) for x in each), total

    return of_fewest(packing.size, tokens, of, operands, packing, cts)


def _chunk_gradients(
    in_place: bool,
    row_loss: RowLoss,
    sweep: Sweep,
    active: Operands,
    complete: tuple[bool, ...],
    operands: Operands,
    packing: Packing,
    first: tuple,
    cts: tuple,
    at: Array,
):
    """What ``token_chunks.chunk_gradients`` returns; the others are the label's factor, [n]."""
    of_student, of_tokens, _ = first
    product = token_chunks.at_tokens(operands.student, at, packing, of_student)
    per_token = token_chunks.of_tokens_at(operands, at, packing, of_tokens)
    shared, real = operands.shared, packing.holds(at)
    given = row_loss, sweep.vocab_axes, product, per_token, shared
    (ct,) = cts
    ct = mesh.varying(gather_rows(ct, at), mesh.varies_over(product.hidden))
    tokens, of_label, label_exists, (e, scale, part) = _of_chunk(*given, weight=ct)
    rows, state = finalize(part, _OUTPUTS)

    def of_active(rows, some_tokens, some_shared):
        given = token_chunks.completed(some_tokens, tokens)
        given = given, token_chunks.completed(some_shared, shared)
        return row_loss.losses(rows, *given, product.num_classes)

    some = token_chunks.those(active.per_token, tokens), token_chunks.those(active.shared, shared)
    loss, pullback = jax.vjp(of_active, rows, *some)
    ct = mesh.varying(ct.astype(loss.dtype), mesh.varies_over(loss))
    of_rows, d_tokens, d_shared = pullback(ct)
    _, _, factor, at_label, _ = gradient_coefficients(state, of_rows)
    factor = factor if scale is None else factor * scale
    if row_loss.scaling is not None:
        at_label *= Logits(of_label.logit, label_exists, row_loss.scaling).slope()
    # A token that is not there has no gradient, and no class that does not exist.
    there = real if label_exists is None else real & label_exists
    factor, at_label = jnp.where(real, factor, 0), jnp.where(there, at_label, 0)
    rest = at_label
    if in_place:
        # Rounded as the others are; d_hidden gets what that leaves.
        held = jnp.where(factor == 0, 0, at_label / factor)
        held = downcast(jnp.where(jnp.isfinite(held), held, 0), e.dtype)
        e = _with_label(e, of_label.column, held)
        rest = at_label - factor * upcast(held)
    of_product = product.gradients_of_scaled(
        padded(e, product), factor, active.student, complete=at.dtype == bool and complete[0]
    )
    d_hidden, d_bias = of_product.hidden, of_product.bias
    if d_hidden is not None and of_label.weights is not None:
        d_hidden = d_hidden + rest[:, None] * upcast(of_label.weights)
    if d_bias is not None:
        d_bias = d_bias.at[_column(product, of_label.column)].add(rest, mode="drop")
    of_product = replace(of_product, hidden=d_hidden, bias=d_bias)
    here = jnp.any(real)
    d_shared = tuple(None if d is None else jnp.where(here, d, 0) for d in d_shared)
    return (loss,), (rest,), Operands(of_product, tuple(d_tokens), d_shared)


def _with_label(e: Array, column: Array, held: Array) -> Array:
    if on("tpu"):  # as part of the products that read it
        return jnp.where(is_at(e, column), held[:, None], e)
    return scatter_classes(e, column[:, None], held[:, None])


def _column(product: Product, column: Array) -> Array:
    """Past all columns where no class is here: padding is past the last class."""
    return jnp.where(column < product.num_classes, column, product.columns)


def _without_others(active: Operands, operands: Operands, others: tuple, total: Operands):
    return (), total


def _with_label_terms(active: Operands, operands: Operands, others: tuple, total: Operands):
    """``((), total)``: the label's terms join the kernel's gradient once, for all chunks."""
    (rest,) = others
    product, own = operands.student, total.student
    if not active.student.kernel:
        return (), total
    *_, column, _, _ = operands.per_token
    column = _column(product, column)
    terms = rest[:, None] * upcast(product.hidden.astype(product.narrow))
    # What a row that does not count holds is not read: 0 * NaN is NaN.
    terms = jnp.where(rest[:, None] == 0, 0, terms)
    if product.vocab_axis == 0:
        d_kernel = own.kernel.at[column].add(terms, mode="drop")
    else:
        d_kernel = own.kernel.at[:, column].add(terms.T, mode="drop")
    return (), total._replace(student=replace(own, kernel=d_kernel))
