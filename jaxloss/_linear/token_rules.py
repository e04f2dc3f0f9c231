"""Losses of ``hidden @ kernel``, a chunk of logits at a time, differentiable: the rules.

A weighted sum of the losses takes its gradients along in the forward pass: three products (logits,
d_hidden, d_kernel), scaled later by the cotangent. Losses a token wait for their cotangents, and
the backward pass computes the logits again: four.

Letters: N tokens.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._linear import token_chunks as _token_chunks
from jaxloss._linear.packing import Packing, pack
from jaxloss._linear.product import Geometry
from jaxloss._linear.token_chunks import LossFn, Operands, map_operands
from jaxloss._types import Axes
from jaxloss._xla import mesh
from jaxloss._xla.derivatives import jvp_of_moving, with_forward_mode
from jaxloss._xla.dtypes import held_dtype


def _differentiable(compute, value=None):
    """``compute(dynamic, *args)`` with the dynamic loop's speed, or by ``value(*args)``, and the
    static one's derivative."""
    function = jax.custom_jvp(value or partial(compute, True))
    function.defjvp(partial(jvp_of_moving, partial(compute, False)), symbolic_zeros=True)
    return function


def _settled(grads: Operands, operands: Operands, keep=frozenset()) -> Operands:
    def settled(g, x):
        return mesh.sum_except(g, mesh.varies_over(x) | keep).astype(held_dtype(x.dtype))

    return map_operands(settled, grads, operands)


def _flat(operands: Operands) -> tuple[list, Any]:
    """Those that are None too."""
    return jax.tree.flatten(operands, is_leaf=lambda x: x is None)


def losses_by_token(
    loss_fn: LossFn, geometry: Geometry, operands: Operands, packing: Packing, value: Any = None
) -> tuple[tuple, tuple]:
    """``(losses, others)``, tuples of [N]. The backward pass computes the logits again.

    ``value(operands, packing)`` computes them where nothing is differentiated; None: chunk by chunk
    too.
    """
    leaves, tree = _flat(operands)
    count, nested = len(leaves), tree.unflatten
    compute = _differentiable(partial(_token_chunks.losses, loss_fn, geometry), value)

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
        gradients = _differentiable(partial(_token_chunks.gradients, loss_fn, geometry, active))
        given = nested(values[:count])
        *_, grads = gradients(given, Packing(*values[count:]), ct[0])
        grads = map_operands(lambda g, x: g.astype(x.dtype), _settled(grads, given), given)
        return (*_flat(grads)[0], None, None)

    def tangent(residuals, tangents):
        values, _ = residuals

        def static(*args):
            given = nested(args[:count]), Packing(*args[count:])
            return _token_chunks.losses(loss_fn, geometry, False, *given)

        return jvp_of_moving(static, values, tangents)[1]

    rule = jax.custom_vjp(function)
    rule.defvjp(forward, backward, symbolic_zeros=True)
    return with_forward_mode(rule, tangent, whole=False)(*leaves, *packing)


def _scale_of(weight: Array, operands: Operands, axes: Axes) -> Array | None:
    """What the weights are divided by in the products, which narrow them to the operands' dtype.

    One number for all the devices along ``axes``, whose gradients are summed before it is undone.
    """
    if not any(x.dtype == jnp.float16 for x in (operands.hidden, *operands.teacher[:1])):
        return None
    # To at most 64: probabilities of 1e-9 are not lost, nor slopes of a thousand.
    largest = mesh.largest(jnp.max(jnp.abs(weight), initial=0), axes)
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
    leaves, tree = _flat(operands)
    count, nested = len(leaves), tree.unflatten
    compute = _differentiable(partial(_token_chunks.losses, loss_fn, geometry), value)

    wide = weight.dtype
    differentiated = weight, *leaves
    homes = [mesh.varies_over(x) for x in differentiated]
    dtypes = [None if x is None else x.dtype for x in differentiated]
    summed = {*geometry.vocab_axes, *geometry.token_axes}
    varies = mesh.varies_over((differentiated, packing)) - summed

    def total(weight, losses):
        here = jnp.sum(jnp.where(weight == 0, 0, weight * losses))
        here = lax.psum(here, geometry.token_axes) if geometry.token_axes else here
        return mesh.varying(here, varies)

    def function(weight, *args):
        (losses,), others = compute(nested(args[:count]), Packing(*args[count:]))
        return total(weight, losses), others

    def forward(weight, *args):
        values: list[Any] = [None if a is None else a.value for a in args]
        flags = [a is not None and a.perturbed for a in args[:count]]
        gradients = _differentiable(
            partial(_token_chunks.gradients, loss_fn, geometry, nested(flags))
        )
        given = nested(values[:count])
        scale = _scale_of(weight.value, given, geometry.token_axes)
        cts = weight.value if scale is None else weight.value / scale
        (losses,), others, grads = gradients(given, Packing(*values[count:]), (cts,))
        if scale is not None:
            grads = map_operands(lambda g, _: g * scale.astype(g.dtype), grads, given)
        # Summed over devices now where they all have the same cotangent to scale by.
        grads = _settled(grads, given, varies)
        d_weight = losses if weight.perturbed else None
        return (total(weight.value, losses), others), (d_weight, *_flat(grads)[0])

    def backward(residuals, ct):
        def scaled(g, home, dtype):
            if g is None or ct[0] is None:  # None: of the others alone, which have no derivative
                return None
            return mesh.sum_except(ct[0] * g.astype(ct[0].dtype), home).astype(dtype)

        return (*map(scaled, residuals, homes, dtypes), None, None)

    def tangent(residuals, tangents):
        out = jnp.zeros((), wide)
        for g, t in zip(residuals, tangents, strict=False):
            if g is not None and t is not None:
                moved = jnp.sum(g.astype(wide) * t.astype(wide))
                out += mesh.sum_except(moved, varies)
        return mesh.varying(out, varies)

    rule = jax.custom_vjp(function)
    rule.defvjp(forward, backward, symbolic_zeros=True)
    return with_forward_mode(rule, tangent, whole=False)(weight, *leaves, *packing)


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
    each, offset = weights
    # Devices that communicate within a loop must take as many steps.
    packing = pack(counts.reshape(-1), geometry.chunk, in_step=bool(geometry.vocab_axes))
    if scalar:
        given = geometry, each.reshape(-1), operands, packing
        total, others = weighted_sum(loss_fn, *given, value)
        # Added, not selected: a select's gradient scales d_kernel by 1, in a pass of its own.
        return total + offset.astype(total.dtype), others
    (losses, *rest), others = losses_by_token(loss_fn, geometry, operands, packing, value)
    return jnp.where(counts, each * losses.reshape(counts.shape), 0), (*rest, *others)
