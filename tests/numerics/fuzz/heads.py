"""The kernels of a product, drawn: arrays, those of few bits, either with an update; several heads.

The truth is the product with the merged, dequantised kernel in 80 bits. What is allowed follows the
roundings: of the operands that are cast, of a block that is widened, and of what lies between the
two factors of an update, each in the dtype of the products.

Letters: N rows (the tokens of all heads), K heads, D features, V columns, r the update's rank.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from oracle.budget import LD, Precision, assert_allowed, precision, rounded
from oracle.truth import widened

import jaxloss

FACTOR = 2.0  # of an update
LOW = ("low rank", "qlora")
HEADS = {
    "head": ["array", "array", "low rank", "int8", "int4", "float8_e4m3fn", "float8_e5m2", "groups",
             "qlora"],
    "heads": [None, None, 2, "shared"],
    "products": [None, None, "bfloat16", "float32"],
}  # fmt: skip


class Head(NamedTuple):
    trained: dict  # arrays that have a gradient
    frozen: dict
    merged: Any  # [K, D, V]
    size: Any  # [K, D, V] the magnitudes of its terms, with the largest scale of all columns
    off: Any  # [K, D, V] how far what is multiplied is from it
    a: Any = None  # [K, D, r], times the update's factor
    b: Any = None  # [K, r, V]


class Near(NamedTuple):
    """Numbers, and how well they are known."""

    value: Any
    room: Any


def number_of_heads(config):
    return {None: 1, "shared": 2}.get(config["heads"], config["heads"])


def precisions(config):
    """(of the products, of the operands and their gradients)."""
    own = precision(config["dtype"])
    return precision(config["products"]) if config["products"] else own, own


def kernel_of(config, trained, frozen):
    """What a call takes."""
    kind = config["head"]
    if kind == "array":
        return trained["kernel"]
    base = frozen.get("kernel")
    if kind != "low rank":
        base = jaxloss.QuantizedKernel(frozen["values"], frozen["scale"])
    if kind not in LOW:
        return base
    factor = trained.get("factor", FACTOR)
    return jaxloss.LowRankKernel(base, trained["a"], trained["b"], scale=factor)


def options_of_kernel(config):
    """``vocab_axis`` and ``dtype``."""
    axis = config.get("vocab_axis", 1) - (2 if config["heads"] else 0)
    dtype = config["products"] and jnp.dtype(config["products"])
    return {"vocab_axis": axis, "dtype": dtype}


def per_head(config, x):
    """An array of all rows as the call takes it: its tokens, and their heads."""
    return x if x is None or not config["heads"] else x.reshape(-1, 2, *x.shape[1:])


def hidden_of(config, rows):
    """``hidden`` of the rows [N, D], of which one token's are one where the heads share it."""
    return rows[::2, None] if config["heads"] == "shared" else per_head(config, rows)


def rows_of_hidden(config, draw, n):
    """``draw(n)`` makes n rows."""
    return np.repeat(draw(n // 2), 2, axis=0) if config["heads"] == "shared" else draw(n)


# Drawn


def draw_head(config, rng, d, columns) -> Head:
    k, kind, dtype = number_of_heads(config), config["head"], jnp.dtype(config["dtype"])
    at, _ = precisions(config)
    exact = config["exact"]

    def floats(*shape, most=2):
        x = rng.integers(-most, most + 1, shape) if exact else rng.normal(size=shape)
        return x.astype(dtype)

    if kind in ("array", "low rank"):
        kernel = floats(k, d, columns, most=24) / dtype.type(8 if exact else 1)
        kernel = kernel * dtype.type(rng.choice([0, 1, 16] if exact else [1]))
        arrays = {"kernel": kernel}
        merged = cast(config, kernel)
        size, off = np.abs(merged), 0 * merged
    else:
        many = {1: 1, 4: 2, 9: 3}.get(d, 1) if kind in ("groups", "qlora") else 1
        values = rng.integers(-7, 8, (k, d, columns))
        scale = 2.0 ** rng.integers(-3, 2, (k, many, columns))
        scale = scale if exact else rng.uniform(0.05, 0.3, scale.shape)
        scale = scale.astype(accumulator(config))
        arrays = {"values": values.astype(few_bits(kind)), "scale": scale}
        each = np.repeat(widened(scale), d // many, axis=1)
        merged = values * each
        size = np.abs(values) * np.max(each)
        off = np.abs(merged) * (at.eps + (at.half if many > 1 else 0)) * (not exact)
    if kind not in LOW:
        return placed_head(config, arrays, Head({}, {}, merged, size, off))
    r = 2
    a, b = floats(k, d, r), floats(k, r, columns)
    arrays |= {"a": a, "b": b}
    if kind == "qlora":
        arrays["factor"] = accumulator(config).type(FACTOR)
    a, b = FACTOR * widened(a), cast(config, b)
    terms = np.abs(a) @ np.abs(b)
    # The factor times a is rounded, the product with it is, and both are sums.
    off = off + (2 * at.half + (d + r + 4) * at.eps) * terms * (not exact)
    return placed_head(config, arrays, Head({}, {}, merged + a @ b, size + terms, off, a, b))


def identity_head(config, c) -> Head:
    """The identity, made of whatever the kind is made of."""
    k, kind, dtype = number_of_heads(config), config["head"], jnp.dtype(config["dtype"])
    eye, some = np.eye(c), np.arange(c) < (2 if kind in LOW else 0)
    base = np.broadcast_to(np.where(some, 0, eye), (k, c, c))
    many = (2 if c % 2 == 0 else c) if kind in ("groups", "qlora") else 1
    if kind in ("array", "low rank"):
        arrays = {"kernel": base.astype(dtype)}
    else:
        scale = np.ones((k, many, c), np.float32)
        arrays = {"values": base.astype(few_bits(kind)), "scale": scale}
    if kind in LOW:
        a, b = eye[:, some], eye[some] / FACTOR
        a, b = (np.broadcast_to(x, (k, *x.shape)).astype(dtype) for x in (a, b))
        factor = {"factor": accumulator(config).type(FACTOR)} if kind == "qlora" else {}
        arrays |= {"a": a, "b": b} | factor
    whole = np.broadcast_to(eye, (k, c, c)).astype(LD)
    return placed_head(config, arrays, Head({}, {}, whole, whole, 0 * whole))


def accumulator(config):
    return np.dtype("float64" if config["dtype"] == "float64" else "float32")


def few_bits(kind):
    return jnp.dtype({"groups": "int8", "qlora": "int4"}.get(kind, kind))


def cast(config, x):
    """As the products take it."""
    return widened(x.astype(jnp.dtype(config["products"] or x.dtype)))


def placed_head(config, arrays, head) -> Head:
    """The arrays in the shapes of a call."""
    if config.get("vocab_axis", 1) == 0:
        arrays |= {n: arrays[n].swapaxes(1, 2) for n in ("kernel", "values") if n in arrays}
    if config["head"] == "int8":
        arrays["scale"] = arrays["scale"][:, 0]
    if not config["heads"]:
        arrays = {n: x if n == "factor" else x[0] for n, x in arrays.items()}
    names = ("kernel",) if config["head"] == "array" else ("a", "b", "factor")
    trained = {n: arrays[n] for n in names if n in arrays}
    return head._replace(
        trained=trained, frozen={n: x for n, x in arrays.items() if n not in trained}
    )


# Products, and their gradients: of rows whose heads follow each other


def by_head(x, k):
    return np.stack([x[i::k] for i in range(k)])


def by_row(x):
    return np.moveaxis(x, 0, 1).reshape(-1, x.shape[-1])


def times(h, kernel):
    """``h[N, D]``, each row times the kernel of its head: ``[N, V]``."""
    return by_row(by_head(h, len(kernel)) @ kernel)


def logits_of(config, head: Head, h, bias) -> Near:
    """``bias[K, V]``."""
    at, _ = precisions(config)
    d = h.shape[1]
    bias = np.tile(bias, (len(h) // len(bias), 1))
    size = (d + 2) / 2 * at.eps * (times(np.abs(h), head.size) + np.abs(bias))
    off = size + times(np.abs(h), head.off)
    return Near(times(h, head.merged) + bias, off * (not config["exact"]))


def product(x: Near, y: Near, at: Precision) -> Near:
    """Of matrices, accumulated in the wide dtype."""
    value, size = x.value @ y.value, np.abs(x.value) @ np.abs(y.value)
    room = x.room @ (np.abs(y.value) + y.room) + np.abs(x.value) @ y.room
    return Near(value, room + 2 * x.value.shape[-1] * at.eps * size)


def narrowed(x: Near, at: Precision) -> Near:
    return Near(x.value, rounded(x.room, x.value, at))


def turned(x: Near) -> Near:
    return Near(*(v.swapaxes(-1, -2) for v in x))


def hidden_gradient(config, head: Head, g, room) -> Near:
    """Of each row, from the logits' ``g[N, V]``; of the rows of a token together, where they
    share one."""
    at, own = precisions(config)
    k, columns = len(head.merged), g.shape[1]
    want = times(g, head.merged.swapaxes(1, 2))
    size, off = (x.swapaxes(1, 2) for x in (head.size, head.off))
    allowed = times(room, size) + times(np.abs(g), columns * at.eps * size + off)
    if head.a is not None:
        _, of_a = update_gradient(config, head, by_head(g, k), by_head(room, k))
        allowed = allowed + by_row(product(of_a, turned(factor_a(config, head)), at).room)
    allowed = rounded(allowed, want, own)
    if config["heads"] == "shared":
        want, allowed = (x.reshape(-1, k, x.shape[-1]) for x in (want, allowed))
        allowed = allowed.sum(1) + k * at.eps * np.abs(want).sum(1)
        want = want.sum(1)
        allowed = rounded(allowed, want, own)
    return Near(want, allowed)


def factor_a(config, head) -> Near:
    """``a`` with its factor, as the products take it."""
    at, _ = precisions(config)
    return narrowed(Near(head.a, at.eps * np.abs(head.a)), at)


def update_gradient(config, head, g, room):
    """(the logits' gradient ``[K, n, V]`` again, and times b's transpose, ``[K, n, r]``)."""
    at, _ = precisions(config)
    of_logits = Near(g, room)
    return of_logits, narrowed(product(of_logits, turned(Near(head.b, 0 * head.b)), at), at)


def check_kernel_gradient(config, head: Head, h, g, room, found):
    """``found``: of the trained arrays, from ``h[N, D]`` and the logits' ``g[N, V]``."""
    at, own = precisions(config)
    k = len(head.merged)
    h, g, room = (by_head(x, k) for x in (h, g, room))
    hidden = turned(Near(h, 0 * h))
    if config["head"] == "array":
        expected = {"kernel": product(hidden, Near(g, room), at)}
        if config.get("vocab_axis", 1) == 0:
            expected = {"kernel": turned(expected["kernel"])}
    elif head.a is not None:
        of_logits, inner = update_gradient(config, head, g, room)
        of_a = product(hidden, inner, at)
        h_a = narrowed(product(Near(h, 0 * h), factor_a(config, head), at), at)
        expected = {"a": Near(*(FACTOR * x for x in of_a))}
        expected["b"] = product(turned(h_a), of_logits, at)
        if "factor" in head.trained:
            a = head.a / FACTOR
            of_factor = (
                np.sum(a * of_a.value),
                np.sum(np.abs(a) * (of_a.room + 2 * a.size * at.eps * np.abs(of_a.value))),
            )
            expected["factor"] = Near(*of_factor)
    else:
        expected = {}
    assert set(found) == set(expected)
    for name, (want, allowed) in expected.items():
        wide = precision(jnp.dtype(found[name].dtype).name)
        if name != "factor":
            want, allowed = (x if config["heads"] else x[0] for x in (want, allowed))
        allowed = rounded(allowed, want, wide)
        assert_allowed(widened(found[name]), want, allowed, own, f"d_{name}")


def check_gradients(config, hidden, head: Head, finite, counts, found, of_logits: Near):
    """``found``: of ``hidden`` and of what is trained of its kernel, from the logits' gradient."""
    (at, _), c = precisions(config), config["c"]
    more = (0, 0), (0, head.merged.shape[-1] - c)
    want, room = (np.pad(np.where(finite[:, None], v, 0), more) for v in of_logits)
    if (finite | ~counts).all():  # else a sum over tokens has NaN in it
        h = np.where(counts[:, None], cast(config, hidden), 0)
        check_kernel_gradient(config, head, h, want, room, found[1])
    want, room = hidden_gradient(config, head, want, room)
    dh = widened(found[0]).reshape(-1, config["d"])
    if config["heads"] == "shared":
        finite = finite.reshape(len(dh), -1).all(1)
    assert_allowed(dh[finite], want[finite], room[finite], at, "d_hidden")
