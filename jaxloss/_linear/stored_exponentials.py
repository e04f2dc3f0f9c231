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
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._linear import kernels, pallas_rows, token_chunks
from jaxloss._linear.packing import Packing, gather_rows
from jaxloss._linear.product import Product, Sweep, on, padded
from jaxloss._linear.token_chunks import Operands
from jaxloss._numerics import label_offset
from jaxloss._numerics.logits import Logits, Scaling
from jaxloss._numerics.parts import RowPart
from jaxloss._numerics.passes import row_max
from jaxloss._numerics.rows import finalize, gradient_coefficients
from jaxloss._tokens.classes import anywhere
from jaxloss._types import Axes
from jaxloss._xla import mesh
from jaxloss._xla.dtypes import downcast, upcast
from jaxloss._xla.elementary import finite
from jaxloss._xla.indexing import gather_class, is_at, scatter_classes

_OUTPUTS = "nll", "logsumexp"  # of RowLosses


class RowLoss(NamedTuple):
    """A loss of what rows give. Its functions take the tokens' arrays and those that no token owns,
    as a ``LossFn`` does, and the number of columns."""

    targets: Callable  # (per_token, shared, columns) -> Targets, of labels
    losses: Callable  # (RowLosses, per_token, shared, columns) -> [n]
    scaling: Scaling | None
    fused: bool  # the exponentials by the kernel for this backend, where it has a form of the call


class OfLabel(NamedTuple):
    """What is known of each token before its logits are."""

    column: Array  # int32, C: none here
    logit: Array  # wide, NaN: there is no such class
    weights: Array  # [n, D], the label's column of the kernel; 0: none here
    exists: Array | None = None  # bool; None: every class does


def of_labels(product: Product, column: Array, axes: Axes) -> OfLabel:
    weights = kernels.columns_at(product.kernel, column, product.vocab_axis)
    own = upcast(product.hidden.astype(product.narrow))
    logit = jnp.sum(own * upcast(weights), axis=-1)
    here = column < product.num_classes
    if product.bias is not None:
        bias = product.bias.astype(logit.dtype)
        logit += bias[jnp.minimum(column, product.num_classes - 1)]
    logit, found = jnp.where(here, logit, 0), here.astype(logit.dtype)
    if axes:
        logit, found = mesh.sums((logit, found), axes)
    return OfLabel(column, jnp.where(found > 0, logit, jnp.nan), weights)


class _State(NamedTuple):
    """Of a chunk's exponentials."""

    values: Any  # [n, C], narrow; None: their sums are enough
    s: Array
    offset: Array
    fits: Array  # bool[n]


def _exponentials(
    product: Product,
    of_label: OfLabel,
    exist: Array | None,
    scaling: Scaling | None,
    axes: Axes,
    held: bool,
    fused: bool,
) -> tuple[Any, RowPart]:
    """``(E[n, C], or None if not held; the rows' part)``. One product, and one more where a row's
    sum is too large."""
    label = of_label.column
    own = Logits(of_label.logit, of_label.exists, scaling).wide()

    fused = fused and held and exist is None and scaling is None

    def logits():
        return None if fused else Logits(product.logits(), exist, scaling)

    def above(logits, offset):
        if fused:
            values, s = pallas_rows.exponentials(product, label, offset)
        else:
            e = label_offset.exponentials(logits, offset, label)
            s = jnp.sum(e, axis=-1)
            e = e if scaling is None else e * logits.slope()
            values = downcast(e, product.narrow) if held else None
        return values, lax.psum(s, axes) if axes else s

    def again(state):
        x = logits()
        m = pallas_rows.largest(product, label) if fused else row_max(x)
        m = finite(mesh.largest(m, axes))
        offset = jnp.where(state.fits, own, m)
        return _State(*above(x, offset), offset, state.fits | True)

    values, s = above(logits(), own)
    state = _State(values, s, own, label_offset.fits(own, s))
    # A loop, and not a condition: under vmap both sides of one would be computed always.
    state = lax.while_loop(lambda state: ~jnp.all(state.fits), again, state)
    return state.values, RowPart(state.offset, state.s, own, label, scaling=scaling)


def _with_labels(row_loss: RowLoss, axes: Axes, operands: Operands) -> Operands:
    """With :class:`OfLabel` as the last of what the tokens own. The kernel is whole."""
    product, *others = operands.student, operands.per_token, operands.shared
    targets = row_loss.targets(*others, product.num_classes)
    column, logit, weights, _ = of_labels(product, cast(Array, targets.label), axes)
    return operands._replace(per_token=(*operands.per_token, column, logit, weights))


def _existing(
    row_loss: RowLoss,
    of_label: OfLabel,
    per_token: Any,
    shared: tuple,
    product: Product,
    axes: Axes,
) -> tuple[Array | None, OfLabel]:
    """``(which classes exist, None: all; of_label with whether its class does)``, of a chunk: of
    all tokens they might be as many as the logits."""
    size, label = product.num_classes, of_label.column
    exist = row_loss.targets(per_token, shared, size).existing(2)
    if exist is None:
        return None, of_label
    here = jnp.broadcast_to(exist, (label.size, size))
    missing = (label < size) & ~gather_class(here, label)
    return exist, of_label._replace(exists=~anywhere(missing, axes))


def losses(row_loss: RowLoss, sweep: Sweep, operands: Operands, packing: Packing):
    """What ``token_chunks.losses`` returns, by the same sums as :func:`gradients`."""

    def loss_fn(product, per_token, shared):
        own, of_label = per_token[:-3], OfLabel(*per_token[-3:])
        exist, of_label = _existing(row_loss, of_label, own, shared, product, sweep.vocab_axes)
        given = product, of_label, exist, row_loss.scaling, sweep.vocab_axes
        _, part = _exponentials(*given, held=False, fused=False)
        rows, _ = finalize(part, _OUTPUTS)
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
    form = token_chunks.LOGITS._replace(
        prepared=partial(_with_labels, row_loss, sweep.vocab_axes),
        gradients=partial(_chunk_gradients, row_loss, sweep.vocab_axes),
        finished=_with_label_terms,
    )
    return token_chunks.gradients(None, sweep, active, True, operands, packing, cts, form)


def _chunk_gradients(
    row_loss: RowLoss,
    axes: Axes,
    _: None,
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
    *tokens, column, logit, weights = token_chunks.of_tokens_at(operands, at, packing, of_tokens)
    shared = operands.shared
    given = OfLabel(column, logit, weights), tokens, shared, product, axes
    exist, of_label = _existing(row_loss, *given)
    scaling, real = row_loss.scaling, packing.holds(at)
    given = product, of_label, exist, scaling, axes
    e, part = _exponentials(*given, held=True, fused=row_loss.fused)
    rows, state = finalize(part, _OUTPUTS)

    def of_active(rows, some_tokens, some_shared):
        given = token_chunks.completed(some_tokens, tokens)
        given = given, token_chunks.completed(some_shared, shared)
        return row_loss.losses(rows, *given, product.num_classes)

    some = token_chunks.those(active.per_token, tokens), token_chunks.those(active.shared, shared)
    loss, pullback = jax.vjp(of_active, rows, *some)
    (ct,) = cts
    ct = mesh.varying(gather_rows(ct, at).astype(loss.dtype), mesh.varies_over(loss))
    of_rows, d_tokens, d_shared = pullback(ct)
    _, _, factor, at_label, _ = gradient_coefficients(state, of_rows)
    # A token that is not there has no gradient, and no class that does not exist.
    factor, at_label = (jnp.where(real, x, 0) for x in (factor, at_label))
    own = Logits(of_label.logit, of_label.exists, scaling)
    at_label = at_label if scaling is None else at_label * own.slope()
    at_label = at_label if own.exist is None else jnp.where(own.exist, at_label, 0)
    complete = at.dtype == bool and complete[0]
    rest = at_label
    if _in_place(product, complete):
        # Rounded as the others are; d_hidden gets what that leaves.
        held = jnp.where(factor == 0, 0, at_label / factor)
        held = downcast(jnp.where(jnp.isfinite(held), held, 0), e.dtype)
        e = _with_label(e, column, held)
        rest = at_label - factor * upcast(held)
    of_product = product.gradients_of_scaled(
        padded(e, product), factor, active.student, complete=complete
    )
    d_hidden, d_bias = of_product.hidden, of_product.bias
    if d_hidden is not None:
        d_hidden = d_hidden + rest[:, None] * upcast(weights)
    if d_bias is not None:
        d_bias = d_bias.at[_column(product, column)].add(rest, mode="drop")
    of_product = replace(of_product, hidden=d_hidden, bias=d_bias)
    here = jnp.any(real)
    d_shared = tuple(None if d is None else jnp.where(here, d, 0) for d in d_shared)
    return (loss,), (rest,), Operands(of_product, tuple(d_tokens), d_shared)


def _in_place(product: Product, complete: bool) -> bool:
    """Whether the label's term takes the label's place in E, and not that of a sum in d_kernel.

    XLA:TPU adds to columns one after another; and where d_kernel is written narrow, there is no
    wide sum.
    """
    return on("tpu") or product.writes_narrow(complete)


def _with_label(e: Array, column: Array, held: Array) -> Array:
    if on("tpu"):  # as part of the products that read it
        return jnp.where(is_at(e, column), held[:, None], e)
    return scatter_classes(e, column[:, None], held[:, None])


def _column(product: Product, column: Array) -> Array:
    """Past all columns where no class is here: padding is past the last class."""
    return jnp.where(column < product.num_classes, column, product.columns)


def _with_label_terms(active: Operands, operands: Operands, others: tuple, total: Operands):
    """``((), total)``: the label's terms join the kernel's gradient once, for all chunks."""
    (rest,) = others
    product, own = operands.student, total.student
    if not active.student.kernel or on("tpu") or own.kernel.dtype != product.wide:
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
