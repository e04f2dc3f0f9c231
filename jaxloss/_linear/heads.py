"""A product of several heads, each with a kernel of its own: one after another, in a loop.

Letters: N tokens of a head, K heads, D features.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._linear.product import Product
from jaxloss._linear.token_chunks import Operands


def count(operands: Operands) -> int | None:
    """Of the heads; None: neither the student nor a teacher has several."""
    found = (p.heads for p in (operands.student, operands.teacher) if p is not None)
    return next((n for n in found if n is not None), None)


def of_each(function: Callable, operands: Operands, *arrays: Array) -> Any:
    """``function(operands, *arrays)`` of each head's tokens, stacked along the first axis.

    ``operands`` and ``arrays`` have N K tokens, a token's heads next to each other.
    """
    heads = cast(int, count(operands))
    products = operands.student, operands.teacher
    own, shared = zip(*(_parted(p, heads) for p in products), strict=True)
    per_token, arrays = jax.tree.map(lambda x: _by_head(x, heads), (operands.per_token, arrays))

    def step(_, of_head):
        own, per_token, arrays = of_head
        student, teacher = (_joined(*both) for both in zip(own, shared, strict=True))
        given = operands._replace(student=student, teacher=teacher, per_token=per_token)
        return None, function(given, *arrays)

    return lax.scan(step, None, (own, per_token, arrays))[1]


def by_token(stacked: Array) -> Array:
    """``[K, N, ...]`` in the tokens' order, ``[N K, ...]``."""
    return jnp.moveaxis(stacked, 0, 1).reshape(-1, *stacked.shape[2:])


def _by_head(x: Array, heads: int) -> Array:
    return jnp.moveaxis(x.reshape(-1, heads, *x.shape[1:]), 1, 0)


def _parted(product: Product | None, heads: int) -> tuple[Any, Any]:
    """What each head has of its own, and what they share."""
    if product is None:
        return None, None
    if product.heads is None:
        return (_by_head(product.hidden, heads), None, None), replace(product, hidden=None)
    hidden, of_all = product.hidden, None  # [N, K or 1, D]
    if hidden.shape[1] == 1 != heads:
        hidden, of_all = None, hidden[:, 0]
    else:
        hidden = jnp.moveaxis(hidden, 1, 0)
    own = hidden, product.kernel, product.bias
    return own, replace(product, hidden=of_all, kernel=None, bias=None, heads=None)


def _joined(own: Any, shared: Any) -> Product | None:
    if shared is None:
        return None
    given = zip(own, (shared.hidden, shared.kernel, shared.bias), strict=True)
    hidden, kernel, bias = (of_all if x is None else x for x, of_all in given)
    return replace(shared, hidden=hidden, kernel=kernel, bias=bias)
