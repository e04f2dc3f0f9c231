"""Losses of ``hidden @ kernel``, a chunk of logits at a time, differentiable: the rules.

A weighted sum of the losses takes its gradients along in the forward pass: three products (logits,
d_hidden, d_kernel), scaled later by the cotangent. Losses a token wait for their cotangents, and
the backward pass computes the logits again: four.

Letters: N tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._linear import heads, token_chunks
from jaxloss._linear.packing import Packing, groups_of, pack
from jaxloss._linear.product import Sweep
from jaxloss._linear.token_chunks import LossFn, Operands, map_operands
from jaxloss._types import Axes
from jaxloss._xla import mesh
from jaxloss._xla.derivatives import differentiable, jvp_of_moving
from jaxloss._xla.dtypes import gradient_dtype


class By(NamedTuple):
    """What computes in place of the sweeps over chunks of logits, whose derivatives it has."""

    # (operands, packing) -> (losses, others), where nothing is differentiated
    value: Callable | None = None
    # (active, operands, packing, cts) -> (losses, others, gradients), of one loss
    gradients: Callable | None = None


LOGITS = By()


def _by_loops(compute: Callable, value: Callable | None = None) -> Callable:
    """``compute(dynamic, *args)`` with the dynamic loop's speed, or by ``value(*args)``, and the
    static one's derivative, beside which the static one computes the value too."""
    function = jax.custom_jvp(value or partial(compute, True))
    function.defjvp(partial(jvp_of_moving, partial(compute, False)), symbolic_zeros=True)
    return function


def _settled(grads: Operands, operands: Operands, keep=frozenset()) -> Operands:
    def settled(g, x):
        return mesh.sum_except(g, mesh.varies_over(x) | keep).astype(gradient_dtype(x.dtype))

    return map_operands(settled, grads, operands)


def losses_by_token(
    loss_fn: LossFn, sweep: Sweep, operands: Operands, packing: Packing, by: By
) -> tuple[tuple, tuple]:
    """``(losses, others)``, tuples of [N]. The backward pass computes the logits again."""
    function = _by_loops(partial(token_chunks.losses, loss_fn, sweep), by.value)

    def forward(_, operands, packing):
        return function(operands, packing), (operands, packing)

    def backward(active, saved, ct):
        operands, packing = saved
        by_logits = partial(token_chunks.gradients, loss_fn, sweep, active[0])
        gradients = _by_loops(by_logits, by.gradients and partial(by.gradients, active[0]))
        *_, grads = gradients(operands, packing, ct[0])
        settled = _settled(grads, operands)
        return map_operands(lambda g, x: g.astype(x.dtype), settled, operands), None

    def tangent(saved, tangents):
        static = partial(token_chunks.losses, loss_fn, sweep, False)
        return jvp_of_moving(static, saved, tangents)[1]

    rule = differentiable(function, forward, backward, tangent, asks=True, whole=False)
    return rule(operands, packing)


def _scale_of(weight: Array, operands: Operands, axes: Axes) -> Array | None:
    """What the weights are divided by in the products, which narrow them to the operands' dtype.

    One number for all the devices along ``axes``, whose gradients are summed before it is undone.
    """
    products = [p for p in (operands.student, operands.teacher) if p is not None]
    if not any(p.narrow == jnp.float16 for p in products):
        return None
    # To at most 64: probabilities of 1e-9 are not lost, nor slopes of a thousand.
    largest = mesh.largest(jnp.max(jnp.abs(weight), initial=0), axes)
    return jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1) / 64


def weighted_sum(
    loss_fn: LossFn,
    sweep: Sweep,
    weight: Array,
    operands: Operands,
    packing: Packing,
    by: By,
) -> tuple[Array, tuple]:
    """``(sum(weight * loss), others)``: its gradients are taken along in the forward pass.

    ``loss_fn`` has one loss; ``weight[N]`` is 0 where a token does not count.
    """
    compute = _by_loops(partial(token_chunks.losses, loss_fn, sweep), by.value)
    wide = weight.dtype
    differentiated = weight, operands
    # The rule outlives this trace: of the arrays it knows types alone.
    homes = jax.tree.map(lambda x: (mesh.varies_over(x), x.dtype), differentiated)
    summed = {*sweep.vocab_axes, *sweep.token_axes}
    varies = mesh.varies_over((differentiated, packing)) - summed

    def total(weight, losses):
        here = jnp.sum(jnp.where(weight == 0, 0, weight * losses))
        here = lax.psum(here, sweep.token_axes) if sweep.token_axes else here
        return mesh.varying(here, varies)

    def function(weight, operands, packing):
        (losses,), others = compute(operands, packing)
        return total(weight, losses), others

    def forward(active, weight, operands, packing):
        of_weight, of_operands, _ = active
        by_logits = partial(token_chunks.gradients, loss_fn, sweep, of_operands)
        gradients = _by_loops(by_logits, by.gradients and partial(by.gradients, of_operands))
        scale = _scale_of(weight, operands, sweep.token_axes)
        cts = weight if scale is None else weight / scale
        (losses,), others, grads = gradients(operands, packing, (cts,))
        if scale is not None:
            grads = map_operands(lambda g, _: g * scale.astype(g.dtype), grads, operands)
        # Summed over devices now where they all have the same cotangent to scale by.
        grads = _settled(grads, operands, varies)
        return (total(weight, losses), others), (losses if of_weight else None, grads)

    def backward(_, saved, ct):
        def scaled(g, home):
            if g is None or ct[0] is None:  # None: of the others alone, which have no derivative
                return None
            axes, dtype = home
            return mesh.sum_except(ct[0] * g.astype(ct[0].dtype), axes).astype(dtype)

        return *jax.tree.map(scaled, saved, homes, is_leaf=lambda x: x is None), None

    def tangent(saved, tangents):
        out = jnp.zeros((), wide)
        pairs = (jax.tree.leaves(x, is_leaf=lambda x: x is None) for x in (saved, tangents[:2]))
        for g, t in zip(*pairs, strict=True):
            if g is not None and t is not None:
                moved = jnp.sum(g.astype(wide) * t.astype(wide))
                out += mesh.sum_except(moved, varies)
        return mesh.varying(out, varies)

    rule = differentiable(function, forward, backward, tangent, asks=True, whole=False)
    return rule(weight, operands, packing)


def reduced(
    loss_fn: LossFn,
    sweep: Sweep,
    operands: Operands,
    valid: Array,
    weights: tuple[Array, Array],
    scalar: bool,
    by: By = LOGITS,
    in_groups: bool = True,
) -> tuple[Array, tuple]:
    """``(loss, the losses past the first and the others)``, of ``valid[...]``' shape or a scalar.

    ``weights`` are from ``reduction.normalised_weights``. ``in_groups``: whether the tokens may be
    packed in groups.
    """
    each, offset = weights
    if scalar:

        def of_head(operands, each, valid):
            packing = _packed(operands, valid, sweep, in_groups)
            return weighted_sum(loss_fn, sweep, each, operands, packing, by)

        given = operands, each.reshape(-1), valid.reshape(-1)
        if heads.count(operands) is None:
            total, others = of_head(*given)
        else:
            total, others = heads.of_each(of_head, *given)
            total, others = jnp.sum(total), jax.tree.map(heads.by_token, others)
        # Added, not selected: a select's gradient scales d_kernel by 1, in a pass of its own.
        return total + offset.astype(total.dtype), others
    (losses, *rest), others = by_token(loss_fn, sweep, operands, valid, by, in_groups)
    return jnp.where(valid, each * losses.reshape(valid.shape), 0), (*rest, *others)


def by_token(
    loss_fn: LossFn,
    sweep: Sweep,
    operands: Operands,
    valid: Array,
    by: By = LOGITS,
    in_groups: bool = True,
) -> tuple[tuple, tuple]:
    """:func:`losses_by_token` of the ``valid`` tokens."""

    def of_head(operands, valid):
        packing = _packed(operands, valid, sweep, in_groups)
        return losses_by_token(loss_fn, sweep, operands, packing, by)

    given = operands, valid.reshape(-1)
    if heads.count(operands) is None:
        return of_head(*given)
    return jax.tree.map(heads.by_token, heads.of_each(of_head, *given))


def _packed(operands: Operands, valid: Array, sweep: Sweep, in_groups: bool) -> Packing:
    groups = groups_of(operands.student.hidden, sweep.chunk) if in_groups else 1
    # Devices that communicate within a loop must take as many steps.
    return pack(valid, sweep.chunk, groups, in_step=bool(sweep.vocab_axes))
