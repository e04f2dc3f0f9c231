"""Sums over the entries of a matrix of similarities, but for those of the pairs.

``z[i, j]`` is how alike row i of x and row j of y are, and a pair is a row of x and its row of y.
The pair's entry ``z_ii`` is kept out of every sum here. With ``L_i = log sum_{j != i} exp(z_ij)``
the cross-entropy of row i is ``softplus(L_i - z_ii)``: nothing was ever added to the pair's
exponential, so a loss of 1e-12 is 1e-12, and so is ``1 - p_ii = sigmoid(L_i - z_ii)``, which its
gradient is made of.

Entries that are left out are at -inf, where each sum has 0 and each slope is 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxloss._numerics.binary import sigmoids, softplus
from jaxloss._numerics.parts import RowPart, merge
from jaxloss._xla.elementary import exp, exp_of_nonpositive, finite, log


class Sums(NamedTuple):
    """A sum over the entries of each row, or of each column, in parts that are added up.

    ``axis`` is the one that is summed over.
    """

    nothing: Callable  # (zeros[n]) -> the sum of no entries
    of_entries: Callable  # (z, axis) -> their sum
    add: Callable  # of two sums
    result: Callable  # (sum) -> [n]
    slope: Callable  # (z, result, axis) -> the derivative of the result by each entry


def along(x: Array, axis: int) -> Array:
    """``x[n]``, a number for each sum over ``axis``, against the entries."""
    return jnp.expand_dims(x, axis)


def _part(m: Array, s: Array) -> RowPart:
    """No entry of these is left out of ``s``: the pair's is nowhere among them."""
    return RowPart(m, s, jnp.full_like(m, jnp.nan), jnp.zeros_like(m, jnp.int32))


def _no_part(zeros: Array) -> RowPart:
    return _part(jnp.full_like(zeros, -jnp.inf), zeros)


def _part_of(z: Array, axis: int) -> RowPart:
    m = jnp.max(z, axis=axis)
    return _part(m, jnp.sum(exp_of_nonpositive(z - along(finite(m), axis)), axis=axis))


def _log_sum(part: RowPart) -> Array:
    return jnp.where(part.m == -jnp.inf, -jnp.inf, part.m + log(part.s))


def _share(z: Array, log_sum: Array, axis: int) -> Array:
    return exp(z - along(finite(log_sum), axis))


def _softplus_sum(z: Array, axis: int) -> Array:
    return jnp.sum(softplus(z)[1], axis=axis)


def _same(x: Array) -> Array:
    return x


def _sigmoid(z: Array, _: Any, axis: int) -> Array:
    return sigmoids(z)[1]


LOG_SUM_EXP = Sums(_no_part, _part_of, merge, _log_sum, _share)
SUM_OF_SOFTPLUS = Sums(_same, _softplus_sum, jnp.add, _same, _sigmoid)
