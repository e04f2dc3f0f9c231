"""Sweeps over chunks of tokens of ``hidden @ kernel``: the losses, and the losses' gradients.

A chunk's logits ``[n, V]`` live for one step of the loop. Chunks add to a float32 d_kernel; where
one is all tokens, d_kernel is formed as it is returned.

A loss may compare with the logits of a second product, a teacher's ``hidden @ kernel``, chunked
likewise: one product more, and one for each of its operands that is differentiated.

Letters: N tokens, n of them in a chunk, D features, V columns of the kernel, C classes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._linear.budget import FROZEN_KERNEL_MIB, value_chunk
from jaxloss._linear.packing import Packing, filled, moves_bits, put_back, sweep, taken
from jaxloss._linear.product import (
    Geometry,
    gathered,
    of_teacher,
    product,
    product_gradients,
    scattered,
)
from jaxloss._xla import mesh
from jaxloss._xla.dtypes import accumulator_dtype, held_dtype

# loss_fn(logits[n, C], per_token, shared) -> (losses to differentiate, others), tuples of [n].
# ``per_token`` are arrays [n, ...], ``shared`` arrays that no token owns. Where there is a teacher,
# its logits are the first of ``per_token``.
LossFn = Callable[[Array, tuple, tuple], tuple[tuple, tuple]]


class Operands(NamedTuple):
    """The operands, None where there is none; or something for each of them."""

    hidden: Any  # [N, D]
    kernel: Any  # [D, V], or [V, D] for vocab_axis 0
    bias: Any  # [V]
    per_token: tuple  # [N, ...] each
    shared: tuple  # what no token owns
    teacher: tuple = ()  # (hidden, kernel, bias) of the second product


def _of_tokens(operands: Operands) -> Operands:
    """Which have a row a token; to the gradient of any other each chunk adds a part."""
    tokens, shared = len(operands.per_token), len(operands.shared)
    teacher = (True, False, False)[: len(operands.teacher)]
    return Operands(True, False, False, (True,) * tokens, (False,) * shared, teacher)


def map_operands(function: Callable, first: Operands, *rest: Operands) -> Operands:
    """``function`` of each operand that is there in ``first``, None for the others."""

    def one(x, *others):
        return None if x is None else function(x, *others)

    return jax.tree.map(one, first, *rest, is_leaf=lambda x: x is None)


def _teacher_logits(operands: Operands, at: Array, geometry: Geometry, packing: Packing) -> tuple:
    """Those of the tokens, where there is a teacher."""
    if not operands.teacher:
        return ()
    hidden, kernel, bias = operands.teacher
    return (product(filled(hidden, at, packing), kernel, bias, of_teacher(geometry)),)


def _columns(kernel: Array, operands: Operands, geometry: Geometry) -> int:
    """Logits a token has here, the teacher's too."""
    columns = kernel.shape[geometry.vocab_axis]
    if operands.teacher:
        columns += operands.teacher[1].shape[geometry.teacher_axis]
    return columns


def losses(loss_fn: LossFn, geometry: Geometry, dynamic: bool, operands: Operands, packing):
    """(losses, others), each [N], 0 where a token does not count. One product."""
    operands = operands._replace(kernel=gathered(operands.kernel, geometry))
    operands = mesh.varying(operands, mesh.varies_over(packing.size))
    hidden, kernel, bias, per_token, shared, _ = operands

    def part(at):
        x = product(filled(hidden, at, packing), kernel, bias, geometry)
        y = _teacher_logits(operands, at, geometry, packing)
        return loss_fn(x, (*y, *(filled(a, at, packing) for a in per_token)), shared)

    def update(state, at, values):
        return jax.tree.map(partial(put_back, at), state, values)

    part = jax.jit(part, inline=True)  # traced once, for all steps of the sweep
    chunk = value_chunk(geometry.chunk, _columns(kernel, operands, geometry))
    like = jax.eval_shape(part, packing.order[:chunk])
    blank = partial(_blank_rows, hidden.shape[0], like)
    return sweep(packing, chunk, part, update, blank, lambda state: state, dynamic)


def _blank_rows(size: int, like):
    return jax.tree.map(lambda x: mesh.blank(x, (size, *x.shape[1:])), like)


def gradients(
    loss_fn: LossFn,
    geometry: Geometry,
    active: Operands,
    dynamic: bool,
    operands: Operands,
    packing: Packing,
    cts: tuple,
):
    """(losses, others, gradients of sum(ct * losses)), the gradients of ``active`` operands alone.

    One product for the logits, one for d_hidden, one for d_kernel; as many for a teacher's. On a
    mesh, the gradients are this device's part.
    """
    kernel = gathered(operands.kernel, geometry)
    size = operands.hidden.shape[0]
    # A gradient of what no token owns is summed over the devices after the loop, not in it.
    over = mesh.varies_over(operands.hidden) | mesh.varies_over(packing.order)
    given = mesh.varying(operands._replace(kernel=kernel), over)
    cts = mesh.varying(cts, mesh.varies_over(packing.size))
    of_tokens = over | mesh.varies_over(operands.per_token)

    def complete(kernel):  # no other device has a part of its gradient
        return not of_tokens - mesh.varies_over(kernel) - {*geometry.vocab_axes}

    alone = not geometry.gathered and complete(kernel), *map(complete, operands.teacher[1:2])
    part = partial(_chunk_gradients, loss_fn, geometry, active, alone, given, packing, cts)
    part = jax.jit(part, inline=True)  # traced once, for all steps of the sweep
    chunk = geometry.chunk
    if not active.kernel:
        chunk = value_chunk(chunk, _columns(kernel, operands, geometry), FROZEN_KERNEL_MIB)
    *like, gradient = jax.eval_shape(part, packing.order[:chunk])
    rows = _of_tokens(operands)

    def narrow(g, x):
        # Parts of a sum over devices are not narrowed before it.
        summed = mesh.varies_over(g) - mesh.varies_over(x)
        return accumulator_dtype(x.dtype) if summed else held_dtype(x.dtype)

    def blank_of(g, x, of_tokens):
        if of_tokens:
            held = jax.ShapeDtypeStruct(x.shape, narrow(g, x))
            bits = dynamic and g.dtype == held.dtype and moves_bits(held)
            return mesh.blank(g, x.shape, jnp.uint16 if bits else held.dtype)
        return mesh.blank(g, dtype=accumulator_dtype(x.dtype))  # a sum, never narrower

    def blank():
        return *_blank_rows(size, like), map_operands(blank_of, gradient, operands, rows)

    def narrowed(g, x):
        return g if g.dtype == jnp.uint16 else g.astype(narrow(g, x))

    def finish(state):
        *each, total = state
        final = map_operands(narrowed, total, operands)
        if geometry.gathered:  # it is summed when it is scattered
            final = final._replace(kernel=total.kernel)
        return *each, final

    losses, others, total = sweep(
        packing, chunk, part, partial(_with_chunk, rows), blank, finish, dynamic
    )
    total = total._replace(kernel=scattered(total.kernel, geometry))
    # Here, and not in a branch of the loop: what comes next reads the bits as floats in passing.
    total = map_operands(_floats, total, operands)
    return losses, others, total


def _floats(g: Array, x: Array) -> Array:
    return lax.bitcast_convert_type(g, x.dtype) if g.dtype == jnp.uint16 else g


def _chunk_gradients(
    loss_fn: LossFn,
    geometry: Geometry,
    active: Operands,
    alone: tuple[bool, ...],
    operands: Operands,
    packing: Packing,
    cts: tuple,
    at: Array,
):
    """The same of the tokens ``at`` alone.

    ``alone``: no other device has a part of the gradient of the kernel, of a teacher's.
    """
    hidden, kernel, bias, per_token, shared, teacher = operands
    whole = at.dtype == bool
    alone = tuple(whole and one for one in alone)
    h, real = filled(hidden, at, packing), at if whole else at < hidden.shape[0]
    x = product(h, kernel, bias, geometry)
    # A teacher's logits go the way of what the tokens own, and then on to its operands.
    y = _teacher_logits(operands, at, geometry, packing)
    tokens = (*y, *(filled(a, at, packing) for a in per_token))
    active_tokens = (*(any(active.teacher) for _ in y), *active.per_token)

    def of_active(x, some_tokens, some_shared):
        return loss_fn(x, _completed(some_tokens, tokens), _completed(some_shared, shared))

    some = _those(active_tokens, tokens), _those(active.shared, shared)
    losses, pullback, others = jax.vjp(of_active, x, *some, has_aux=True)
    ct = tuple(
        jnp.zeros_like(loss)
        if c is None
        else mesh.varying(taken(c, at).astype(loss.dtype), mesh.varies_over(loss))
        for c, loss in zip(cts, losses, strict=True)
    )
    dx, d_tokens, d_shared = pullback(ct)
    # A step that only other devices have tokens for: there was no token to fill it with.
    here = jnp.any(real)
    d_shared = tuple(None if d is None else jnp.where(here, d, 0) for d in d_shared)
    dy, d_tokens = d_tokens[: len(y)], d_tokens[len(y) :]
    d_teacher = (None,) * len(teacher)
    if any(active.teacher):
        h_teacher, k_teacher = filled(teacher[0], at, packing), teacher[1]
        d_teacher = product_gradients(
            dy[0], real, h_teacher, k_teacher, active.teacher, of_teacher(geometry), alone[1]
        )
    of_product = product_gradients(dx, real, h, kernel, active[:3], geometry, alone[0])
    return losses, others, Operands(*of_product, d_tokens, d_shared, d_teacher)


def _those(flags: tuple, every: tuple) -> tuple:
    """None in place of those without a flag."""
    return tuple(x if flag else None for flag, x in zip(flags, every, strict=True))


def _completed(some: tuple, every: tuple) -> tuple:
    return tuple(x if one is None else one for one, x in zip(some, every, strict=True))


def _with_chunk(rows: Operands, state: tuple, at: Array, values: tuple) -> tuple:
    """The state of a sweep over gradients and what the tokens ``at`` give; ``rows``: of_tokens."""

    def with_part(total, x, of_tokens):
        return put_back(at, total, x) if of_tokens else total + x.astype(total.dtype)

    *each, total = state
    *new, part = values
    each = jax.tree.map(partial(put_back, at), each, new)
    return *each, map_operands(with_part, total, part, rows)
