"""Losses of ``hidden @ kernel`` whose logits are never held: a sweep over chunks of tokens.

Tokens that count are packed into the first chunks (an index, no copy of ``hidden``), and the loop
runs over those chunks alone. A chunk's logits ``[n, V]`` live for one step of it. Chunks add to a
float32 d_kernel; where one is all tokens, they stay in their places, and d_kernel is formed as it
is returned.

A weighted sum of the losses takes its gradients along in the forward pass: three products (logits,
d_hidden, d_kernel), scaled later by the cotangent. Losses a token wait for their cotangents, and
the backward pass computes the logits again: four.

A loss may compare with the logits of a second product, a teacher's ``hidden @ kernel``, chunked
likewise: one product more, and one for each of its operands that is differentiated.

Letters: N tokens, n of them in a chunk, D features, V columns of the kernel, C classes.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss import _mesh
from jaxloss._casts import accumulator_dtype
from jaxloss._forward_mode import with_forward_mode

# loss_fn(logits[n, C], per_token, shared) -> (losses to differentiate, others), tuples of [n].
# ``per_token`` are arrays [n, ...], ``shared`` arrays that no token owns. Where there is a teacher,
# its logits are the first of ``per_token``.
LossFn = Callable[[Array, tuple, tuple], tuple[tuple, tuple]]


class Geometry(NamedTuple):
    """What is static about ``hidden @ kernel``."""

    vocab_axis: int  # of the kernel, 0 or 1
    num_classes: int  # C <= V
    chunk: int  # n
    precision: Any
    teacher_axis: int = 1  # the vocabulary's, of a teacher's kernel
    # On a mesh, inside of shard_map, whose types say what the gradients are sums over:
    vocab_axes: _mesh.Axes = ()  # the columns are split over; the loops' steps then communicate
    token_axes: _mesh.Axes = ()  # the tokens are split over, and a sum is over all of them
    gathered: tuple[
        tuple[int, _mesh.Axes], ...
    ] = ()  # axes of the kernel that are split over tokens'


class Packing(NamedTuple):
    """Which token stands at which place of the sweep."""

    order: Array  # [chunks * n] int32, those that count first; N: no token
    size: Array  # how many count
    counts: Array  # [N] bool, which


def size_to_plan_for(num_tokens: Any) -> int:
    """The tokens' number, or where jax.export leaves it open, the largest."""
    return num_tokens if isinstance(num_tokens, int) else 2**31 - 1


def _fit(mebibytes: int, num_columns: int) -> int:
    """The power of two of tokens whose float32 logits take as much."""
    return 2 ** int(math.log2(max(1, mebibytes * 2**20 // (4 * max(1, num_columns)))))


def default_chunk(num_tokens: int, num_columns: int, num_features: int = 0) -> int:
    """Tokens a chunk: a power of two, or all.

    ``num_features``: of a kernel whose gradient a single chunk forms without an accumulator.
    """
    if jax.default_backend() == "cpu":
        # Measured: past 512 tokens the products gain little, past 1024 nothing.
        chunk = min(_fit(256, num_columns), 1024, max(512, _fit(64, num_columns)))
    else:
        # Each chunk adds to the float32 d_kernel, 8 bytes of traffic beside 6 n operations: by the
        # chips' peak rates as long as the products of 220 tokens on an H200, 320 on a TPU v5e, 750
        # on a v6e. Up to here the logits stand where the gradients will be written.
        on_tpu = jax.default_backend() == "tpu"
        chunk = min(_fit(1024, num_columns), 1024 if on_tpu else 4096)
        # All at once hold 6 bytes a logit, in float32 and in bfloat16; chunks of n as many, and 4
        # for each entry of d_kernel: V (6 n + 4 D) in all.
        if not on_tpu and num_tokens <= chunk + 2 * num_features // 3:
            chunk = num_tokens
    return max(1, min(chunk, num_tokens))


# Of float32 logits, nearly all that a sweep holds: one without gradients, one without the kernel's.
VALUE_MIB, FROZEN_KERNEL_MIB = 256, 1024


def value_chunk(chunk: int, num_columns: int, mebibytes: int = VALUE_MIB) -> int:
    """Tokens of a sweep without an accumulator: halves of a chunk, until their logits fit."""
    while chunk % 2 == 0 and chunk > _fit(mebibytes, num_columns):
        chunk //= 2
    return chunk


def pack(counts: Array, geometry: Geometry) -> Packing:
    tokens, chunk = counts.shape[0], geometry.chunk
    size = jnp.sum(counts, dtype=jnp.int32)
    if geometry.vocab_axes and _mesh.varies_over(size):
        # Devices that communicate within a loop must take as many steps: those of the longest.
        size = lax.pmax(size, tuple(sorted(_mesh.varies_over(size))))
    order = jnp.argsort(~counts, stable=True).astype(jnp.int32)
    # Where no token counts, none is named: its hidden may hold NaN, and NaN * 0 is NaN.
    order = jnp.where(jnp.arange(tokens, dtype=jnp.int32) < size, order, tokens)
    room = (-(-tokens // chunk) or 1) * chunk - tokens
    return Packing(jnp.pad(order, (0, room), constant_values=tokens), size, counts)


def _dot(x: Array, y: Array, axis_x: int, axis_y: int, geometry: Geometry, out: Any = None):
    contract = (((axis_x,), (axis_y,)), ((), ()))
    out = out or accumulator_dtype(x.dtype)
    return lax.dot_general(x, y, contract, geometry.precision, preferred_element_type=out)


def product(hidden: Array, kernel: Array, bias: Array | None, geometry: Geometry) -> Array:
    x = _dot(hidden, kernel, 1, 1 - geometry.vocab_axis, geometry)
    if bias is not None:
        x = x + bias.astype(x.dtype)[None]
    return x[:, : geometry.num_classes]


def of_teacher(geometry: Geometry) -> Geometry:
    """The geometry of its product."""
    return geometry._replace(vocab_axis=geometry.teacher_axis)


def gathered(kernel: Array, geometry: Geometry) -> Array:
    for axis, names in geometry.gathered:
        kernel = lax.all_gather(kernel, names, axis=axis, tiled=True)
    return kernel


def scattered(g: Any, geometry: Geometry) -> Any:
    """The transpose of :func:`gathered`."""
    for axis, names in geometry.gathered[::-1]:
        g = None if g is None else lax.psum_scatter(g, names, scatter_dimension=axis, tiled=True)
    return g


def d_hidden(dx: Array, kernel: Array, geometry: Geometry) -> Array:
    return _dot(dx, kernel, 1, geometry.vocab_axis, geometry)


def d_kernel(dx: Array, hidden: Array, geometry: Geometry, out: Any = None) -> Array:
    first, second = (hidden, dx) if geometry.vocab_axis == 1 else (dx, hidden)
    return _dot(first, second, 0, 0, geometry, out)


def product_gradients(
    dx: Array, real: Array, hidden: Array, kernel: Array, active, geometry, alone: bool = False
):
    """Those of the ``active`` of (hidden, kernel, bias), from the logits'; ``real[n]``: a token.

    ``alone``: there are no others to be added.
    """
    # No token, no gradient: a loss that is not finite at hidden = 0 must not leak.
    dx = jnp.where(real[:, None], dx, 0)
    dx = jnp.pad(dx, ((0, 0), (0, kernel.shape[geometry.vocab_axis] - dx.shape[1])))
    of_hidden, of_kernel, of_bias = active
    d_bias = jnp.sum(dx, axis=0) if of_bias else None
    # Formed in float32, narrowed once: the products take the operands' dtype.
    dx = dx.astype(hidden.dtype)
    alone &= not geometry.gathered and not _mesh.varies_over(dx) - _mesh.varies_over(kernel)
    # On a GPU alone the product is asked for narrow sums (it adds in float32 all the same): there
    # XLA would narrow them in a pass of its own, elsewhere it needs no asking.
    out = kernel.dtype if alone and jax.default_backend() == "gpu" else None
    return (
        d_hidden(dx, kernel, geometry) if of_hidden else None,
        d_kernel(dx, hidden, geometry, out) if of_kernel else None,
        d_bias,
    )


def _each(mask: Array, rows: Array) -> Array:
    return mask.reshape(-1, *(1,) * (rows.ndim - 1))


def taken(x: Any, at: Array) -> Any:
    """The tokens ``at``: an index[n], past the end for none; or which of all, as they stand."""
    if x is None:
        return None
    if at.dtype == bool:
        return jnp.where(_each(at, x), x, jnp.zeros((), x.dtype))
    if x.shape[0] == 0:
        return jnp.zeros((*at.shape, *x.shape[1:]), x.dtype)
    return jnp.take(x, at, axis=0, mode="fill", fill_value=0)


def put_back(at: Array, x: Array, rows: Array) -> Array:
    if x.shape[0] == 0:
        return x
    if at.dtype == bool:
        return jnp.where(_each(at, x), rows.astype(x.dtype), x)
    return x.at[at].set(rows.astype(x.dtype), mode="drop")


def step_sizes(chunk: int) -> tuple[int, ...]:
    """Tokens a step of a sweep takes: a chunk, or a quarter of one."""
    return (chunk, chunk // 4) if chunk % 4 == 0 else (chunk,)


def all_step_sizes(chunk: int, num_columns: int) -> list[int]:
    """Of every sweep: of all gradients, of those without the kernel's, of the value alone."""
    limits = VALUE_MIB, FROZEN_KERNEL_MIB
    chunks = chunk, *(value_chunk(chunk, num_columns, limit) for limit in limits)
    return sorted({n for c in chunks for n in step_sizes(c)})


def _sweep(packing: Packing, chunk: int, part, update, blank, finish, dynamic: bool):
    """``update(state, at, part(at))`` for each chunk's tokens ``at``, from ``blank()`` on; the last
    state finished.

    ``dynamic``: a loop over the chunks that hold a token that counts. Otherwise over all of them,
    which JAX can differentiate in reverse, each part computed again in its backward pass.
    """

    def step(state, at):
        compute = part if dynamic else jax.checkpoint(part)
        return update(state, at, compute(at))

    def from_place(state, start, size):
        return step(state, lax.dynamic_slice_in_dim(packing.order, start, size))

    chunks = packing.order.shape[0] // chunk
    if not dynamic:
        starts = jnp.arange(chunks, dtype=jnp.int32) * chunk
        sweep = lax.scan(lambda state, at: (from_place(state, at, chunk), None), blank(), starts)
        return finish(sweep[0])

    # What is left of the last chunk goes in quarters: a batch of one chunk gains by them too.
    quarter = step_sizes(chunk)[-1]
    whole = (packing.size + quarter - 1) // chunk

    def rest(state):
        if quarter == chunk:
            return state
        trips, start = (packing.size - whole * chunk + quarter - 1) // quarter, whole * chunk
        some = lambda i, state: from_place(state, start + i * quarter, quarter)  # noqa: E731
        return lax.fori_loop(0, trips, some, state)

    if chunk == packing.counts.shape[0]:
        # Inside of the branch XLA sees that nothing was there before and nothing comes after: sums
        # are written where they would be added to, and narrow. No token is moved.
        at_once = lambda: finish(step(blank(), packing.counts))  # noqa: E731
        return lax.cond(whole > 0, at_once, lambda: finish(rest(blank())))
    # The first chunk stands alone for the first of these.
    state = lax.cond(whole > 0, lambda: from_place(blank(), 0, chunk), blank)
    if chunks != 1:  # not '>': of an open number JAX knows no order
        more = lambda i, state: from_place(state, i * chunk, chunk)  # noqa: E731
        state = lax.fori_loop(1, whole, more, state)
    return finish(rest(state))


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


def _teacher_logits(operands: Operands, at: Array, geometry: Geometry) -> tuple:
    """Those of the tokens, where there is a teacher."""
    if not operands.teacher:
        return ()
    hidden, kernel, bias = operands.teacher
    return (product(taken(hidden, at), kernel, bias, of_teacher(geometry)),)


def _losses(loss_fn: LossFn, geometry: Geometry, dynamic: bool, operands: Operands, packing):
    """(losses, others), each [N], 0 where a token does not count. One product."""
    hidden, kernel, bias, per_token, shared, _ = operands
    kernel = gathered(kernel, geometry)

    def part(at):
        x = product(taken(hidden, at), kernel, bias, geometry)
        y = _teacher_logits(operands, at, geometry)
        return loss_fn(x, (*y, *(taken(a, at) for a in per_token)), shared)

    def update(state, at, values):
        return jax.tree.map(partial(put_back, at), state, values)

    products = [(kernel, geometry.vocab_axis)]
    if operands.teacher:
        products.append((operands.teacher[1], geometry.teacher_axis))
    chunk = value_chunk(geometry.chunk, sum(k.shape[axis] for k, axis in products))
    like = jax.eval_shape(part, packing.order[:chunk])
    blank = partial(_blank_rows, hidden.shape[0], like)
    return _sweep(packing, chunk, part, update, blank, lambda state: state, dynamic)


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
        h, real = taken(hidden, at), at if whole else at < size
        x = product(h, kernel, bias, geometry)
        # A teacher's logits go the way of what the tokens own, and then on to its operands.
        y = _teacher_logits(operands, at, geometry)
        tokens = (*y, *(taken(a, at) for a in per_token))
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
        dy, d_tokens = d_tokens[: len(y)], d_tokens[len(y) :]
        d_teacher = (None,) * len(teacher)
        if any(active.teacher):
            h_teacher, k_teacher = taken(teacher[0], at), teacher[1]
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
        chunk = value_chunk(chunk, kernel.shape[geometry.vocab_axis], FROZEN_KERNEL_MIB)
    *like, rows_like = jax.eval_shape(part, packing.order[:chunk])

    def narrow(g, x):
        # Parts of a sum over devices are not narrowed before it.
        summed = _mesh.varies_over(g) - _mesh.varies_over(x)
        return accumulator_dtype(x.dtype) if summed else x.dtype

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

    swept = _sweep(packing, chunk, part, update, blank, finish, dynamic)
    losses, others, total = swept
    total = total._replace(kernel=scattered(total.kernel, geometry))
    return losses, others, total


def _settled(grads: Operands, operands: Operands, keep=frozenset()) -> Operands:
    def settled(g, x):
        return _mesh.settle(g, _mesh.varies_over(x) | keep).astype(x.dtype)

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
        return (*_flat(_settled(grads, given)), None, None)

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
    return with_forward_mode(rule, tangent)(*_flat(operands), *packing)


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
    homes = [_mesh.varies_over(x) for x in (weight, *_flat(operands))]
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
        (losses,), others, grads = gradients(given, Packing(*values[count:]), (weight.value,))
        # Summed over devices now where they all have the same cotangent to scale by.
        grads = _settled(grads, given, varies)
        d_weight = losses if weight.perturbed else None
        return (total(weight.value, losses), others), (d_weight, *_flat(grads))

    def backward(residuals, ct):
        def scale(g, home):
            if g is None:
                return None
            return _mesh.settle(ct[0] * g.astype(ct[0].dtype), home).astype(g.dtype)

        return (*map(scale, residuals, homes), None, None)

    def tangent(residuals, tangents):
        out = jnp.zeros((), wide)
        for g, t in zip(residuals, tangents, strict=False):
            if g is not None and t is not None:
                moved = jnp.sum(g.astype(wide) * t.astype(wide))
                out += _mesh.settle(moved, varies)
        return _mesh.spread(out, varies)

    rule = jax.custom_vjp(function)
    rule.defvjp(forward, backward, symbolic_zeros=True)
    return with_forward_mode(rule, tangent)(weight, *_flat(operands), *packing)


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
    (each, nothing), packing = weights, pack(counts.reshape(-1), geometry)
    if scalar:
        given = geometry, each.reshape(-1), operands, packing
        total, others = weighted_sum(loss_fn, *given, value)
        # Added: the gradients of a selected sum would be scaled by 1, in a pass over d_kernel.
        return total + jnp.where(nothing, jnp.nan, jnp.zeros_like(total)), others
    (losses, *rest), others = losses_by_token(loss_fn, geometry, operands, packing, value)
    return jnp.where(counts, each * losses.reshape(counts.shape), 0), (*rest, *others)
