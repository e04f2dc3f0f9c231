"""Losses of ``hidden @ kernel`` whose logits are never held: a sweep over chunks of tokens.

A chunk's logits ``[n, V]`` live for one step of the loop. Chunks add to a float32 d_kernel; where
one is all tokens, d_kernel is formed as it is returned.

A weighted sum of the losses takes its gradients along in the forward pass: three products (logits,
d_hidden, d_kernel), scaled later by the cotangent. Losses a token wait for their cotangents, and
the backward pass computes the logits again: four.

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

from jaxloss import _mesh
from jaxloss._casts import accumulator_dtype, held_dtype
from jaxloss._chunks import (
    FROZEN_KERNEL_MIB,
    Packing,
    filled,
    pack,
    put_back,
    sweep,
    taken,
    value_chunk,
)
from jaxloss._forward_mode import with_forward_mode
from jaxloss._products import (
    Geometry,
    gathered,
    of_teacher,
    product,
    product_gradients,
    scattered,
)

# loss_fn(logits[n, C], per_token, shared) -> (losses to differentiate, others), tuples of [n].
# ``per_token`` are arrays [n, ...], ``shared`` arrays that no token owns. Where there is a teacher,
# its logits are the first of ``per_token``.
LossFn = Callable[[Array, tuple, tuple], tuple[tuple, tuple]]


def _differentiable(compute):
    """``compute(dynamic, *args)`` with the dynamic loop's speed and the static one's derivative."""
    function = jax.custom_jvp(partial(compute, True))
    function.defjvp(lambda args, tangents: jax.jvp(partial(compute, False), args, tangents))
    return function


class Operands(NamedTuple):
    """The operands, None where there is none; or something for each of them."""

    hidden: Any  # [N, D]
    kernel: Any  # [D, V], or [V, D] for vocab_axis 0
    bias: Any  # [V]
    per_token: tuple  # [N, ...] each
    shared: tuple  # what no token owns
    teacher: tuple = ()  # (hidden, kernel, bias) of the second product


def _map(function, first: Operands, *rest: Operands) -> Operands:
    """``function`` of each operand that is there in ``first``, None for the others."""

    def one(x, *others):
        return None if x is None else function(x, *others)

    def many(*fields):
        return tuple(one(*xs) for xs in zip(*fields, strict=True))

    return Operands(
        one(first.hidden, *(r.hidden for r in rest)),
        one(first.kernel, *(r.kernel for r in rest)),
        one(first.bias, *(r.bias for r in rest)),
        many(first.per_token, *(r.per_token for r in rest)),
        many(first.shared, *(r.shared for r in rest)),
        many(first.teacher, *(r.teacher for r in rest)),
    )


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


def _losses(loss_fn: LossFn, geometry: Geometry, dynamic: bool, operands: Operands, packing):
    """(losses, others), each [N], 0 where a token does not count. One product."""
    hidden, kernel, bias, per_token, shared, _ = operands
    kernel = gathered(kernel, geometry)

    def part(at):
        x = product(filled(hidden, at, packing), kernel, bias, geometry)
        y = _teacher_logits(operands, at, geometry, packing)
        return loss_fn(x, (*y, *(filled(a, at, packing) for a in per_token)), shared)

    def update(state, at, values):
        return jax.tree.map(partial(put_back, at), state, values)

    chunk = value_chunk(geometry.chunk, _columns(kernel, operands, geometry))
    like = jax.eval_shape(part, packing.order[:chunk])
    blank = partial(_blank_rows, hidden.shape[0], like)
    return sweep(packing, chunk, part, update, blank, lambda state: state, dynamic)


def _blank_rows(size: int, like):
    return jax.tree.map(lambda x: _mesh.blank(x, (size, *x.shape[1:])), like)


def _gradients(
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
    hidden, kernel, bias, per_token, shared, teacher = operands
    kernel = gathered(kernel, geometry)
    size = hidden.shape[0]
    # A gradient of what no token owns is summed over the devices after the loop, not in it.
    shared = tuple(
        _mesh.spread(x, _mesh.varies_over(hidden) | _mesh.varies_over(packing.order))
        for x in shared
    )

    def part(at):
        whole = at.dtype == bool
        h, real = filled(hidden, at, packing), at if whole else at < size
        x = product(h, kernel, bias, geometry)
        # A teacher's logits go the way of what the tokens own, and then on to its operands.
        y = _teacher_logits(operands, at, geometry, packing)
        tokens = (*y, *(filled(a, at, packing) for a in per_token))
        active_tokens = (*(any(active.teacher) for _ in y), *active.per_token)

        def merged(some, flags, every):
            return tuple(s if a else e for s, a, e in zip(some, flags, every, strict=True))

        def chosen(flags, every):
            return tuple(e if a else None for a, e in zip(flags, every, strict=True))

        def of_active(x, some_tokens, some_shared):
            return loss_fn(
                x,
                merged(some_tokens, active_tokens, tokens),
                merged(some_shared, active.shared, shared),
            )

        some = (chosen(active_tokens, tokens), chosen(active.shared, shared))
        losses, pullback, others = jax.vjp(of_active, x, *some, has_aux=True)
        ct = tuple(
            jnp.zeros_like(loss)
            if c is None
            else _mesh.spread(taken(c, at).astype(loss.dtype), _mesh.varies_over(loss))
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
                dy[0], real, h_teacher, k_teacher, active.teacher, of_teacher(geometry), whole
            )
        of_product = product_gradients(dx, real, h, kernel, active[:3], geometry, whole)
        return losses, others, Operands(*of_product, d_tokens, d_shared, d_teacher)

    def update(state, at, values):
        def put(total, x):
            return None if total is None else put_back(at, total, x)

        def add(total, x):
            return None if total is None else total + x.astype(total.dtype)

        (losses, others, total), (*rows, new) = state, values
        losses, others = jax.tree.map(partial(put_back, at), (losses, others), tuple(rows))
        total = Operands(
            put(total.hidden, new.hidden),
            add(total.kernel, new.kernel),
            add(total.bias, new.bias),
            tuple(map(put, total.per_token, new.per_token)),
            tuple(map(add, total.shared, new.shared)),
            (
                *map(put, total.teacher[:1], new.teacher[:1]),
                *map(add, total.teacher[1:], new.teacher[1:]),
            ),
        )
        return losses, others, total

    chunk = geometry.chunk
    if not active.kernel:
        chunk = value_chunk(chunk, _columns(kernel, operands, geometry), FROZEN_KERNEL_MIB)
    *like, rows_like = jax.eval_shape(part, packing.order[:chunk])

    def narrow(g, x):
        # Parts of a sum over devices are not narrowed before it.
        summed = _mesh.varies_over(g) - _mesh.varies_over(x)
        return accumulator_dtype(x.dtype) if summed else held_dtype(x.dtype)

    def rows(g, x):
        return _mesh.blank(g, x.shape, narrow(g, x))

    def sums(g, x):  # over chunks, never narrower than float32
        return _mesh.blank(g, dtype=accumulator_dtype(x.dtype))

    def blank():
        some, total = _map(rows, rows_like, operands), _map(sums, rows_like, operands)
        total = total._replace(
            hidden=some.hidden,
            per_token=some.per_token,
            teacher=(*some.teacher[:1], *total.teacher[1:]),
        )
        return *_blank_rows(size, like), total

    def finish(state):
        *each, total = state
        final = _map(lambda g, x: g.astype(narrow(g, x)), total, operands)
        if geometry.gathered:  # it is summed when it is scattered
            final = final._replace(kernel=total.kernel)
        return *each, final

    losses, others, total = sweep(packing, chunk, part, update, blank, finish, dynamic)
    total = total._replace(kernel=scattered(total.kernel, geometry))
    return losses, others, total


def _settled(grads: Operands, operands: Operands, keep=frozenset()) -> Operands:
    def settled(g, x):
        return _mesh.settle(g, _mesh.varies_over(x) | keep).astype(held_dtype(x.dtype))

    return _map(settled, grads, operands)


def _flat(operands: Operands) -> tuple:
    return (*operands[:3], *operands.per_token, *operands.shared, *operands.teacher)


def _nesting(like: Operands):
    """The inverse of ``_flat``. It holds no array of ``like``'s: a derivative rule, which outlives
    the trace that it is made in, may refer to it."""
    i = len(like.per_token)
    j = i + len(like.shared)

    def nested(flat) -> Operands:
        hidden, kernel, bias, *rest = flat
        return Operands(hidden, kernel, bias, tuple(rest[:i]), tuple(rest[i:j]), tuple(rest[j:]))

    return nested


def losses_by_token(
    loss_fn: LossFn, geometry: Geometry, operands: Operands, packing: Packing, value: Any = None
) -> tuple[tuple, tuple]:
    """``(losses, others)``, tuples of [N]. The backward pass computes the logits again.

    ``value(operands, packing)`` computes them where nothing is differentiated; None: chunk by chunk
    too.
    """
    count, nested = len(_flat(operands)), _nesting(operands)
    compute = value or _differentiable(partial(_losses, loss_fn, geometry))

    def function(*args):
        return compute(nested(args[:count]), Packing(*args[count:]))

    def forward(*args):
        values = [None if a is None else a.value for a in args]
        # A flag must be static to choose the products: () and None have no leaves.
        flags = tuple(None if a is None or not a.perturbed else () for a in args)
        return function(*values), (values, flags)

    def backward(residuals, ct):
        values, flags = residuals
        active = nested([f is not None for f in flags[:count]])
        gradients = _differentiable(partial(_gradients, loss_fn, geometry, active))
        given = nested(values[:count])
        *_, grads = gradients(given, Packing(*values[count:]), ct[0])
        grads = _map(lambda g, x: g.astype(x.dtype), _settled(grads, given), given)
        return (*_flat(grads), None, None)

    def tangent(residuals, tangents):
        values, _ = residuals
        moving = [i for i, t in enumerate(tangents) if t is not None]

        def of_moving(*some):
            full = list(values)
            for i, x in zip(moving, some, strict=True):
                full[i] = x
            return _losses(loss_fn, geometry, False, nested(full[:count]), Packing(*full[count:]))

        primals = [values[i] for i in moving]
        return jax.jvp(of_moving, primals, [tangents[i] for i in moving])[1]

    rule = jax.custom_vjp(function)
    rule.defvjp(forward, backward, symbolic_zeros=True)
    return with_forward_mode(rule, tangent, whole=False)(*_flat(operands), *packing)


def _scale_of(weight: Array, operands: Operands, axes: _mesh.Axes) -> Array | None:
    """What the weights are divided by in the products, which narrow them to the operands' dtype.

    One number for all the devices along ``axes``, whose gradients are summed before it is undone.
    """
    if not any(x.dtype == jnp.float16 for x in (operands.hidden, *operands.teacher[:1])):
        return None
    # To at most 64: probabilities of 1e-9 are not lost, nor slopes of a thousand.
    largest = _mesh.largest(jnp.max(jnp.abs(weight), initial=0), axes)
    return jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1) / 64


def weighted_sum(
    loss_fn: LossFn,
    geometry: Geometry,
    weight: Array,
    operands: Operands,
    packing: Packing,
    value: Any = None,
) -> tuple[Array, tuple]:
    """``(sum(weight * loss), others)``: its gradients are taken along in the forward pass.

    ``loss_fn`` has one loss; ``weight[N]`` is 0 where a token does not count; ``value`` as above.
    """
    count, nested = len(_flat(operands)), _nesting(operands)
    compute = value or _differentiable(partial(_losses, loss_fn, geometry))

    wide = weight.dtype
    differentiated = weight, *_flat(operands)
    homes = [_mesh.varies_over(x) for x in differentiated]
    dtypes = [None if x is None else x.dtype for x in differentiated]
    summed = {*geometry.vocab_axes, *geometry.token_axes}
    varies = frozenset().union(*homes, *map(_mesh.varies_over, packing)) - summed

    def total(weight, losses):
        here = jnp.sum(jnp.where(weight == 0, 0, weight * losses))
        here = lax.psum(here, geometry.token_axes) if geometry.token_axes else here
        return _mesh.spread(here, varies)

    def function(weight, *args):
        (losses,), others = compute(nested(args[:count]), Packing(*args[count:]))
        return total(weight, losses), others

    def forward(weight, *args):
        values: list[Any] = [None if a is None else a.value for a in args]
        flags = [a is not None and a.perturbed for a in args[:count]]
        gradients = _differentiable(partial(_gradients, loss_fn, geometry, nested(flags)))
        given = nested(values[:count])
        scale = _scale_of(weight.value, given, geometry.token_axes)
        cts = weight.value if scale is None else weight.value / scale
        (losses,), others, grads = gradients(given, Packing(*values[count:]), (cts,))
        if scale is not None:
            grads = _map(lambda g, _: g * scale.astype(g.dtype), grads, given)
        # Summed over devices now where they all have the same cotangent to scale by.
        grads = _settled(grads, given, varies)
        d_weight = losses if weight.perturbed else None
        return (total(weight.value, losses), others), (d_weight, *_flat(grads))

    def backward(residuals, ct):
        def scaled(g, home, dtype):
            if g is None:
                return None
            return _mesh.settle(ct[0] * g.astype(ct[0].dtype), home).astype(dtype)

        return (*map(scaled, residuals, homes, dtypes), None, None)

    def tangent(residuals, tangents):
        out = jnp.zeros((), wide)
        for g, t in zip(residuals, tangents, strict=False):
            if g is not None and t is not None:
                moved = jnp.sum(g.astype(wide) * t.astype(wide))
                out += _mesh.settle(moved, varies)
        return _mesh.spread(out, varies)

    rule = jax.custom_vjp(function)
    rule.defvjp(forward, backward, symbolic_zeros=True)
    return with_forward_mode(rule, tangent, whole=False)(weight, *_flat(operands), *packing)


def reduced(
    loss_fn: LossFn,
    geometry: Geometry,
    operands: Operands,
    counts: Array,
    weights: tuple[Array, Array],
    scalar: bool,
    value: Any = None,
) -> tuple[Array, tuple]:
    """``(loss, the losses past the first and the others)``, of ``counts[...]``' shape or a scalar.

    ``weights`` are from ``_targets.token_weights``; ``value`` as above.
    """
    each, nothing = weights
    # Devices that communicate within a loop must take as many steps.
    packing = pack(counts.reshape(-1), geometry.chunk, in_step=bool(geometry.vocab_axes))
    if scalar:
        given = geometry, each.reshape(-1), operands, packing
        total, others = weighted_sum(loss_fn, *given, value)
        # Added: the gradients of a selected sum would be scaled by 1, in a pass over d_kernel.
        return total + jnp.where(nothing, jnp.nan, jnp.zeros_like(total)), others
    (losses, *rest), others = losses_by_token(loss_fn, geometry, operands, packing, value)
    return jnp.where(counts, each * losses.reshape(counts.shape), 0), (*rest, *others)
