"""Sweeps over chunks of tokens of ``hidden @ kernel``: the losses, and the losses' gradients.

A chunk's logits ``[n, V]`` live for one step of the loop. Chunks add to a float32 d_kernel; where
one is all tokens, d_kernel is formed as it is returned.

A loss may compare with the logits of a second product, a teacher's ``hidden @ kernel``, chunked
likewise: one product more, and one for each of its operands that is differentiated.

Letters: N tokens, n of them in a chunk, D features, V columns of the kernel, C classes.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._linear import kernels
from jaxloss._linear.budget import FROZEN_KERNEL_MIB, value_chunk
from jaxloss._linear.packing import (
    Packing,
    first_row,
    gather_rows,
    gather_rows_or_first,
    moves_bits,
    over_chunks,
    scatter_rows,
)
from jaxloss._linear.product import Product, Sweep, complete_over, padded
from jaxloss._xla import mesh
from jaxloss._xla.blocks import blank_rows, in_blocks
from jaxloss._xla.dtypes import accumulator_dtype, gradient_dtype

# loss_fn(logits[n, C], per_token, shared) -> (losses to differentiate, others), tuples of [n].
# ``per_token`` are arrays [n, ...], ``shared`` arrays that no token owns. Where there is a teacher,
# its logits are the first of ``per_token``.
LossFn = Callable[[Array, tuple, tuple], tuple[tuple, tuple]]


class Form(NamedTuple):
    """How chunks are computed."""

    # (operands) -> operands of which more is known of each token, before the sweep. The kernel is
    # whole.
    prepared: Callable
    read: Callable  # (product) -> what the loss function takes of it
    gradients: Callable  # as ``chunk_gradients``
    finished: Callable  # (active, operands, others, sums of gradients) -> (others, gradients)


class Operands(NamedTuple):
    """The operands, None where there is none; or something for each of them."""

    student: Product  # of N tokens
    per_token: tuple  # [N, ...] each
    shared: tuple  # what no token owns
    teacher: Product | None = None


def _of_tokens(operands: Operands) -> Operands:
    """Which have a row a token; to the gradient of any other each chunk adds a part."""

    def of(product):
        kernel = product and jax.tree.map(lambda _: False, product.kernel)
        return product and replace(product, hidden=True, kernel=kernel, bias=False)

    tokens, shared = len(operands.per_token), len(operands.shared)
    student, teacher = of(operands.student), of(operands.teacher)
    return Operands(student, (True,) * tokens, (False,) * shared, teacher)


def map_operands(function: Callable, first: Operands, *rest: Operands) -> Operands:
    """``function`` of each operand that is there in ``first``, None for the others."""

    def one(x, *others):
        return None if x is None else function(x, *others)

    return jax.tree.map(one, first, *rest, is_leaf=lambda x: x is None)


def _first_rows(operands: Operands, packing: Packing) -> tuple:
    """``packing.first_row`` of the student's hidden, of each of ``per_token``, of a teacher's
    hidden."""
    student, teacher = operands.student, operands.teacher
    arrays = student.hidden, operands.per_token, None if teacher is None else teacher.hidden
    return jax.tree.map(lambda x: first_row(x, packing), arrays, is_leaf=lambda x: x is None)


def at_tokens(product: Product, at: Array, packing: Packing, first: Any) -> Product:
    """The product of the tokens ``at`` alone."""
    return replace(product, hidden=gather_rows_or_first(product.hidden, at, packing, first))


def of_tokens_at(operands: Operands, at: Array, packing: Packing, first: tuple) -> tuple:
    pairs = zip(operands.per_token, first, strict=True)
    return tuple(gather_rows_or_first(x, at, packing, row) for x, row in pairs)


def _teacher_logits(operands: Operands, at: Array, packing: Packing, first: Any) -> tuple:
    """Those of the tokens, where there is a teacher."""
    if operands.teacher is None:
        return ()
    return (at_tokens(operands.teacher, at, packing, first).logits(),)


def columns_of(operands: Operands) -> int:
    """Logits a token has here, the teacher's too."""
    return sum(p.columns for p in (operands.student, operands.teacher) if p is not None)


def _whole(operands: Operands) -> Operands:
    """With kernels in the products' dtype, gathered over the tokens' devices."""
    teacher = operands.teacher and operands.teacher.whole()
    return operands._replace(student=operands.student.whole(), teacher=teacher)


def losses(
    loss_fn: LossFn,
    sweep: Sweep,
    dynamic: bool,
    operands: Operands,
    packing: Packing,
    form: Form | None = None,
):
    """(losses, others), each [N], 0 where a token does not count. One product."""
    form = form or LOGITS
    operands = form.prepared(_whole(operands))
    operands = mesh.varying(operands, mesh.varies_over(packing.size))

    of_student, of_tokens, of_teacher = _first_rows(operands, packing)

    def part(at):
        x = form.read(at_tokens(operands.student, at, packing, of_student))
        y = _teacher_logits(operands, at, packing, of_teacher)
        own = of_tokens_at(operands, at, packing, of_tokens)

        def of_block(_, rows, __):
            x, tokens = rows
            return (), loss_fn(x, tokens, operands.shared), ()

        return in_blocks(of_block, sweep.block, (), (x, (*y, *own)))[1]

    def update(state, at, values):
        return jax.tree.map(partial(scatter_rows, at), state, values)

    part = jax.jit(part, inline=True)  # traced once, for all steps of the sweep
    chunk = value_chunk(sweep.chunk, columns_of(operands), groups=packing.groups)
    like = jax.eval_shape(part, packing.step_of_each_sweep(chunk, dynamic))
    blank = partial(blank_rows, operands.student.hidden.shape[0], like)
    return over_chunks(packing, chunk, part, update, blank, lambda state: state, dynamic)


def gradients(
    loss_fn: Any,
    sweep: Sweep,
    active: Operands,
    dynamic: bool,
    operands: Operands,
    packing: Packing,
    cts: tuple,
    form: Form | None = None,
):
    """(losses, others, gradients of sum(ct * losses)), the gradients of ``active`` operands alone.

    ``loss_fn`` is a ``LossFn``, or what the form's gradients take in its place.

    One product for the logits, one for d_hidden, one for d_kernel; as many for a teacher's. On a
    mesh, the gradients are this device's part.
    """
    student = operands.student
    # A gradient of what no token owns is summed over the devices after the loop, not in it.
    over = mesh.varies_over(student.hidden) | mesh.varies_over(packing.order)
    whole, form = _whole(operands), form or LOGITS
    given = form.prepared(mesh.varying(whole, over))
    cts = mesh.varying(cts, mesh.varies_over(packing.size))
    of_tokens = over | mesh.varies_over(operands.per_token)
    complete = tuple(
        p is not None and complete_over(p, of_tokens, sweep) for p in (whole.student, whole.teacher)
    )
    first = _first_rows(given, packing)
    part = partial(form.gradients, loss_fn, sweep, active, complete, given, packing, first, cts)
    part = jax.jit(part, inline=True)  # traced once, for all steps of the sweep
    chunk = sweep.chunk
    if active.student.kernel is not True:  # no gradient of a whole kernel is added up
        chunk = value_chunk(chunk, columns_of(given), FROZEN_KERNEL_MIB, packing.groups)
    step = packing.step_of_each_sweep(chunk, dynamic, sweep.quarters)
    *like, gradient = jax.eval_shape(part, step)
    rows = _of_tokens(operands)

    def dtype_of(g, x):
        # Parts of a sum over devices are not narrowed before it.
        summed = mesh.varies_over(g) - mesh.varies_over(x)
        return accumulator_dtype(x.dtype) if summed else gradient_dtype(x.dtype)

    def blank_of(g, x, of_tokens):
        if of_tokens:
            held = jax.ShapeDtypeStruct(x.shape, dtype_of(g, x))
            bits = dynamic and g.dtype == held.dtype and moves_bits(held)
            return mesh.blank(g, x.shape, jnp.uint16 if bits else held.dtype)
        return mesh.blank(g, dtype=accumulator_dtype(x.dtype))  # a sum, never narrower

    def blank():
        each = blank_rows(student.hidden.shape[0], like)
        return *each, map_operands(blank_of, gradient, operands, rows)

    def in_its_dtype(g, x):
        return g if g.dtype == jnp.uint16 else g.astype(dtype_of(g, x))

    def wide_if_gathered(final, total):  # it is summed when it is scattered
        return replace(final, kernel=total.kernel) if final and final.gathered else final

    def finish(state):
        of_losses, others, total = state
        others, total = form.finished(active, given, others, total)
        final = map_operands(in_its_dtype, total, operands)
        return (
            of_losses,
            others,
            final._replace(
                student=wide_if_gathered(final.student, total.student),
                teacher=wide_if_gathered(final.teacher, total.teacher),
            ),
        )

    losses, others, total = over_chunks(
        packing,
        chunk,
        part,
        partial(_with_chunk, rows),
        blank,
        finish,
        dynamic,
        sweep.quarters,
    )
    teacher = total.teacher and total.teacher.scattered()
    total = total._replace(student=total.student.scattered(), teacher=teacher)
    # Here, and not in a branch of the loop: what comes next reads the bits as floats in passing.
    total = map_operands(_floats, total, operands)
    return losses, others, total


def _floats(g: Array, x: Array) -> Array:
    return lax.bitcast_convert_type(g, x.dtype) if g.dtype == jnp.uint16 else g


def chunk_gradients(
    loss_fn: LossFn,
    sweep: Sweep,
    active: Operands,
    complete: tuple[bool, ...],
    operands: Operands,
    packing: Packing,
    first: tuple,
    cts: tuple,
    at: Array,
):
    """What :func:`gradients` returns, of the tokens ``at`` alone.

    ``complete``: whether no other device has a part of the gradient of the kernel, of a teacher's.
    """
    at_once = at.dtype == bool
    of_student, of_tokens, of_teacher = first
    student, teacher = at_tokens(operands.student, at, packing, of_student), operands.teacher
    shared, real = operands.shared, packing.holds(at)
    x = student.logits()
    # A teacher's logits go the way of what the tokens own, and then on to its operands.
    y = _teacher_logits(operands, at, packing, of_teacher)
    tokens = (*y, *of_tokens_at(operands, at, packing, of_tokens))
    teaches = any(jax.tree.leaves(active.teacher))
    active_tokens = (*(teaches for _ in y), *active.per_token)

    # A loss without a cotangent has no part in the pullback: zeros would cost what it costs.
    asked = tuple(c is not None for c in cts)
    over = (x, *y) if teaches else (x,)  # the gradients of these are written over them
    rest = tokens[len(over) - 1 :]

    def of_block(over, rows, counts):
        (x, *moving), (rest, ct) = over, rows
        if counts is not None:
            ct = tuple(None if c is None else jnp.where(counts, c, 0) for c in ct)
        tokens = (*moving, *rest)

        def of_active(x, some_tokens, some_shared):
            every = completed(some_tokens, tokens), completed(some_shared, shared)
            losses, others = loss_fn(x, *every)
            return those(asked, losses), (losses, others)

        some = those(active_tokens, tokens), those(active.shared, shared)
        _, pullback, (losses, others) = jax.vjp(of_active, x, *some, has_aux=True)
        ct = tuple(
            None if c is None else mesh.varying(c.astype(loss.dtype), mesh.varies_over(loss))
            for c, loss in zip(ct, losses, strict=True)
        )
        dx, d_tokens, d_shared = pullback(ct)
        dy, d_rest = d_tokens[: len(moving)], d_tokens[len(moving) :]
        return (dx, *dy), (losses, others, d_rest), d_shared

    ct = tuple(gather_rows(c, at) for c in cts)
    moved, of_rows, d_shared = in_blocks(of_block, sweep.block, over, (rest, ct))
    (dx, *dy), (losses, others, d_tokens) = moved, of_rows
    d_tokens = d_tokens[len(y) - len(dy) :]
    # Devices on a mesh take equally many steps. In a step in which this one has no valid token, its
    # shared gradients are of padding: they are set to 0.
    here = jnp.any(real)
    d_shared = tuple(None if d is None else jnp.where(here, d, 0) for d in d_shared)

    def of_product(product, dx, active, complete):
        # No token, no gradient: a loss that is not finite at hidden = 0 must not leak.
        dx = padded(jnp.where(real[:, None], dx, 0), product)
        return product.gradients(dx, active, complete=at_once and complete, held=True)

    d_teacher = None
    if teacher is not None:
        d_kernel = kernels.nothing(teacher.kernel)
        d_teacher = replace(teacher, hidden=None, kernel=d_kernel, bias=None)
    if teacher is not None and teaches:
        own = at_tokens(teacher, at, packing, of_teacher)
        d_teacher = of_product(own, dy[0], active.teacher, complete[1])
    d_student = of_product(student, dx, active.student, complete[0])
    return losses, others, Operands(d_student, d_tokens, d_shared, d_teacher)


LOGITS = Form(
    prepared=lambda operands: operands,
    read=Product.logits,
    gradients=chunk_gradients,
    finished=lambda active, operands, others, total: (others, total),
)


def those(flags: tuple, every: tuple) -> tuple:
    """None in place of those without a flag."""
    return tuple(x if flag else None for flag, x in zip(flags, every, strict=True))


def completed(some: tuple, every: tuple) -> tuple:
    return tuple(x if one is None else one for one, x in zip(some, every, strict=True))


def _with_chunk(rows: Operands, state: tuple, at: Array, values: tuple) -> tuple:
    """The state of a sweep over gradients and what the tokens ``at`` give; ``rows``: of_tokens."""

    def with_part(total, x, of_tokens):
        return scatter_rows(at, total, x) if of_tokens else total + x.astype(total.dtype)

    *each, total = state
    *new, part = values
    each = jax.tree.map(partial(scatter_rows, at), each, new)
    return *each, map_operands(with_part, total, part, rows)
