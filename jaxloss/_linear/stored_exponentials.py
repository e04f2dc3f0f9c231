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

Label smoothing asks of all classes alike: its gradient is a product of a number a token and a
number a class. ``h . (W w)`` gives what it needs of a token's logits.

Letters: N tokens, n of them in a chunk, D features, V columns of the kernel, C classes.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._linear import kernels, token_chunks
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
from jaxloss._numerics.logits import Logits, Scaling, in_nats
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
    losses: Callable  # (RowLosses, of_all, per_token, shared, columns) -> [n]
    scaling: Scaling | None
    fused: bool  # the exponentials by the kernel for this backend, where it has a form of the call
    # (shared, columns) -> w[C], the weights of ``of_all``, the sum of each token's logits over all
    # classes; None: the loss does not ask for it.
    of_classes: Callable | None = None
    # (logits, per_token, shared) -> what else is asked for, [n] each; None: nothing is.
    statistics: Callable | None = None


class _OfClasses(NamedTuple):
    weight: Any = None  # w[V], 0 for what is no class
    direction: Any = None  # [D], sum_c w_c W_c


class _Known(NamedTuple):
    """What is known of the tokens before their logits are."""

    own: tuple  # what the loss takes of per_token
    of_label: OfLabel
    of_all: Array | None
    shared: tuple  # what the loss takes of shared
    of_classes: _OfClasses


def _prepared(row_loss: RowLoss, axes: Axes, operands: Operands) -> Operands:
    """With what :func:`_known` finds among them. The kernel is whole."""
    product, *others = operands.student, operands.per_token, operands.shared
    column = cast(Array, row_loss.targets(*others, product.num_classes).label)
    of_label = OfLabel(column) if _by_few(row_loss) else of_labels(product, column, axes)
    of_classes, of_all = _OfClasses(), None
    if row_loss.of_classes is not None:
        weight = row_loss.of_classes(operands.shared, product.num_classes)
        weight = padded(weight[None], product)[0]
        direction = product.weighted_columns(weight)
        of_classes = _OfClasses(weight, direction)
        of_all = jnp.sum(product.wide_hidden * direction[None], axis=-1)
        if product.bias is not None:
            bias = product.bias.astype(weight.dtype)
            of_all += jnp.sum(jnp.where(weight == 0, 0, bias * weight))  # 0 * -inf is NaN
        of_all = in_nats(lax.psum(of_all, axes) if axes else of_all, row_loss.scaling)
    return operands._replace(
        per_token=(*operands.per_token, *of_label, of_all),
        shared=(*operands.shared, *of_classes),
    )


def _known(per_token: tuple, shared: tuple) -> _Known:
    *own, column, logit, weights, of_all = per_token
    *own_shared, weight, direction = shared
    of_label, of_classes = OfLabel(column, logit, weights), _OfClasses(weight, direction)
    return _Known(tuple(own), of_label, of_all, tuple(own_shared), of_classes)


def _by_few(row_loss: RowLoss) -> bool:
    return row_loss.fused and on("tpu")


def _of_chunk(
    row_loss: RowLoss,
    axes: Axes,
    product: Product,
    known: _Known,
    weight: Array | None,
) -> tuple[Array | None, Exponentials]:
    """``(whether the labels' classes exist, exponentials)``."""
    of_label, size = known.of_label, product.num_classes
    column = of_label.column
    if _by_few(row_loss):
        return None, above_few(product, column, axes, weight)
    exist, label_exists = row_loss.targets(known.own, known.shared, size).existing(2), None
    if exist is not None:  # not of all tokens at once: it may have the logits' size
        here = jnp.broadcast_to(exist, (column.size, size))
        missing = (column < size) & ~gather_class(here, column)
        label_exists = ~anywhere(missing, axes)
    given = exist, label_exists, row_loss.scaling, axes, weight
    made = above_label(product, of_label, *given, fused=row_loss.fused and weight is not None)
    return label_exists, made


def _statistics(row_loss: RowLoss, product: Product, known: _Known) -> tuple:
    """Of the logits that the exponentials are made of: XLA computes them once."""
    if row_loss.statistics is None:
        return ()
    return row_loss.statistics(product.logits(), known.own, known.shared)


def losses(row_loss: RowLoss, sweep: Sweep, operands: Operands, packing: Packing):
    """What ``token_chunks.losses`` returns, by the same sums as :func:`gradients`."""

    def loss_fn(product, per_token, shared):
        known = _known(per_token, shared)
        _, made = _of_chunk(row_loss, sweep.vocab_axes, product, known, weight=None)
        rows, _ = finalize(made.part, _OUTPUTS)
        given = known.of_all, known.own, known.shared, product.num_classes
        return (row_loss.losses(rows, *given),), _statistics(row_loss, product, known)

    prepared = partial(_prepared, row_loss, sweep.vocab_axes)
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
    # wide sum of d_kernel; on a TPU, which would add to columns one after another; and where no
    # array has a column for it.
    in_place = at_once or on("tpu") or not kernels.is_array(operands.student.kernel)
    form = token_chunks.LOGITS._replace(
        prepared=partial(_prepared, row_loss, sweep.vocab_axes),
        gradients=partial(_chunk_gradients, in_place),
        finished=partial(_finished, in_place, row_loss),
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
    """What ``token_chunks.chunk_gradients`` returns; the others, [n] each, are the label's factor,
    that of all classes (None: they are not asked for) and statistics."""
    of_student, of_tokens, _ = first
    product = token_chunks.at_tokens(operands.student, at, packing, of_student)
    per_token = token_chunks.of_tokens_at(operands, at, packing, of_tokens)
    known, real = _known(per_token, operands.shared), packing.holds(at)
    of_label, of_all, tokens, shared = known.of_label, known.of_all, known.own, known.shared
    (ct,) = cts
    ct = mesh.varying(gather_rows(ct, at), mesh.varies_over(product.hidden))
    given = row_loss, sweep.vocab_axes, product, known
    label_exists, (e, scale, part) = _of_chunk(*given, weight=ct)
    rows, state = finalize(part, _OUTPUTS)

    def of_active(rows, of_all, some_tokens, some_shared):
        given = token_chunks.completed(some_tokens, tokens)
        given = given, token_chunks.completed(some_shared, shared)
        return row_loss.losses(rows, of_all, *given, product.num_classes)

    some = token_chunks.those(active.per_token, tokens), token_chunks.those(active.shared, shared)
    loss, pullback = jax.vjp(of_active, rows, of_all, *some)
    ct = mesh.varying(ct.astype(loss.dtype), mesh.varies_over(loss))
    of_rows, d_of_all, d_tokens, d_shared = pullback(ct)
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
    if d_of_all is not None:
        d_of_all = in_nats(jnp.where(real, d_of_all, 0), row_loss.scaling)
        if d_hidden is not None:
            d_hidden = d_hidden + d_of_all[:, None] * known.of_classes.direction[None]
    of_product = replace(of_product, hidden=d_hidden, bias=d_bias)
    here = jnp.any(real)
    d_shared = tuple(None if d is None else jnp.where(here, d, 0) for d in d_shared)
    others = rest, d_of_all, *_statistics(row_loss, product, known)
    return (loss,), others, Operands(of_product, tuple(d_tokens), d_shared)


def _with_label(e: Array, column: Array, held: Array) -> Array:
    if on("tpu"):  # as part of the products that read it
        return jnp.where(is_at(e, column), held[:, None], e)
    return scatter_classes(e, column[:, None], held[:, None])


def _column(product: Product, column: Array) -> Array:
    """Past all columns where no class is here: padding is past the last class."""
    return jnp.where(column < product.num_classes, column, product.columns)


def _finished(
    in_place: bool,
    row_loss: RowLoss,
    active: Operands,
    operands: Operands,
    others: tuple,
    total: Operands,
):
    """``(statistics, total)``: what is added to the gradients once, for all chunks."""
    of_label, of_all, *statistics = others
    if not in_place:
        total = _with_label_terms(active, operands, of_label, total)
    if of_all is not None:
        total = _with_terms_of_all(row_loss, active, operands, of_all, total)
    return tuple(statistics), total


def _with_label_terms(active: Operands, operands: Operands, rest: Array, total: Operands):
    product, own = operands.student, total.student
    if not active.student.kernel:
        return total
    column = _column(product, _known(operands.per_token, operands.shared).of_label.column)
    terms = _times_hidden(rest, product)
    if product.vocab_axis == 0:
        d_kernel = own.kernel.at[column].add(terms, mode="drop")
    else:
        d_kernel = own.kernel.at[:, column].add(terms.T, mode="drop")
    return total._replace(student=replace(own, kernel=d_kernel))


def _with_terms_of_all(
    row_loss: RowLoss, active: Operands, operands: Operands, factor: Array, total: Operands
):
    """``total`` and the gradients of the tokens' sums over all classes, times ``factor[N]``."""

    def add(x, new):
        return x if new is None else x + new.astype(x.dtype)

    def added(to, terms):
        return jax.tree.map(add, to, terms, is_leaf=lambda x: x is None)

    product, known = operands.student, _known(operands.per_token, operands.shared)
    weight, _ = known.of_classes
    # The gradient of all tokens' sums is that of one row, in wide products, whose logits' is w.
    one = jnp.sum(_times_hidden(factor, product), axis=0, keepdims=True)
    one = replace(product, hidden=one, bias=None, dtype=one.dtype)
    asked = replace(active.student, hidden=False, bias=False)
    d_kernel = one.gradients(weight[None], asked).kernel
    number, own = jnp.sum(factor), total.student
    d_bias = weight * number if active.student.bias else None
    student = replace(own, kernel=added(own.kernel, d_kernel), bias=added(own.bias, d_bias))
    total = total._replace(student=student)
    if not any(active.shared):
        return total
    d_weight = one.logits()[0]
    if product.bias is not None:
        d_weight += product.bias[: product.num_classes].astype(weight.dtype) * number

    def of_active(some):
        shared = token_chunks.completed(some, known.shared)
        return cast(Callable, row_loss.of_classes)(shared, product.num_classes)

    _, pullback = jax.vjp(of_active, token_chunks.those(active.shared, known.shared))
    (d_shared,) = pullback(d_weight)
    return total._replace(shared=added(total.shared, d_shared))


def _times_hidden(factor: Array, product: Product) -> Array:
    """``factor[n] * hidden[n, D]``, and 0 for a row that does not count: it may hold NaN."""
    of_row = factor[:, None]
    return jnp.where(of_row == 0, 0, of_row * product.wide_hidden)
