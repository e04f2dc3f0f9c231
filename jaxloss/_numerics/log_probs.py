"""Log-probabilities of some classes of a row: of named ones, the most likely, or a sample.

Of a row's logits ``z`` with a maximum at class ``m``: ``d_j = z_j - z_m``, and

    log p_j = d_j - log1p(sum_{c != m} exp(d_c))

which loses no digits, because neither term is positive; nor do JAX's own derivatives, since class m
stands in no difference with itself. All in plain operations: differentiable in every mode.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._numerics import passes
from jaxloss._numerics.logits import Logits, over_temperature
from jaxloss._types import Axes
from jaxloss._xla import mesh
from jaxloss._xla.elementary import finite
from jaxloss._xla.indexing import gather_classes, is_at, is_elsewhere


class Differences(NamedTuple):
    """``d_j`` of the classes here, and log1p of the sum of the others' exponentials."""

    d: Array  # [..., columns]; 0 at m, -inf for a class that does not exist
    rest: Array  # [...]


def _total(x: Array, axes: Axes) -> Array:
    total = jnp.sum(x, axis=-1)
    return lax.psum(total, axes) if axes else total


def differences(logits: Logits, temperature: Any, axes: Axes) -> Differences:
    """``temperature``: an array, a scalar or one a row; a number is in the logits' scaling."""
    x = logits.wide()
    x_max = mesh.largest(jnp.max(lax.stop_gradient(x), axis=-1), axes)
    at_max = is_at(x, passes.one_near_max(x, finite(x_max), axes))
    of_max = _total(jnp.where(at_max, x, 0), axes)
    d = logits.nats(x - of_max[..., None])
    if isinstance(temperature, Array):
        d = over_temperature(d, temperature)
    d = jnp.where(at_max, 0, d)
    others = _total(jnp.where(at_max, 0, jnp.exp(d)), axes)
    # A row of NaN or +inf, or of nothing but -inf, is no distribution.
    rest = jnp.where(jnp.isfinite(x_max), jnp.log1p(others), jnp.nan)
    return Differences(d, rest)


def log_probs_at(rows: Differences, column: Array, axes: Axes) -> Array:
    """Of the classes at ``column[..., k]``; the number of columns: the class is not here."""
    here = column < rows.d.shape[-1]
    d = jnp.where(here, gather_classes(rows.d, column), 0)
    d = lax.psum(d, axes) if axes else d
    return d - rows.rest[..., None]


def log_prob_of_others(rows: Differences, column: Array, axes: Axes) -> Array:
    """Of all classes but those at ``column[..., k]`` together, summed from them."""
    others = is_elsewhere(rows.d, column)

    def log_sum(taken):
        d = jnp.where(taken, rows.d, -jnp.inf)
        m = mesh.largest(jnp.max(lax.stop_gradient(d), axis=-1), axes)
        m = jnp.where(m == -jnp.inf, 0, m)  # of no class: log(0)
        total = _total(jnp.where(taken, jnp.exp(d - m[..., None]), 0), axes)
        some = total > 0
        return jnp.where(some, m + jnp.log(jnp.where(some, total, 1)), -jnp.inf)

    named, rest = log_sum(~others), log_sum(others)
    # log(rest / (named + rest)): exact where the named ones hold next to nothing too.
    both = (named > -jnp.inf) & (rest > -jnp.inf)
    apart = jnp.where(both, rest - named, 0)
    found = jnp.where(both, jax.nn.log_sigmoid(apart), jnp.where(rest > -jnp.inf, 0, -jnp.inf))
    return jnp.where(jnp.isnan(rows.rest), jnp.nan, found)


def top_k(logits: Logits, k: int, start: Any, axes: Axes) -> tuple[Array, Array]:
    """(classes, ``d``) ``[..., k]``, the most likely first, of equal ones the lower class. ``d`` as
    in :class:`Differences`, before a temperature that is an array; NaN: the row is no distribution.
    ``start``: the class of the first column."""
    x, column = passes.top_k(logits.wide(), min(k, logits.size))
    index = column.astype(jnp.int32) + start
    if axes:  # those of each device in the order of its classes: of equal ones the first stays so
        x, index = (_of_devices(v, axes) for v in (x, index))
        x, place = lax.top_k(x, k)
        index = jnp.take_along_axis(index, place, axis=-1)
    largest = x[..., :1]
    d = logits.nats(jnp.where(x == largest, 0, x - largest))
    return index, jnp.where(jnp.isfinite(largest), d, jnp.nan)


def _of_devices(x: Array, axes: Axes) -> Array:
    """``x[..., k]`` of all devices, one after the other."""
    each = jnp.swapaxes(mesh.gathered(x, axes), -1, -2)
    return each.reshape(*x.shape[:-1], -1)


def sample(rows: Differences, noise: Array, start: Any, axes: Axes) -> tuple[Array, Array]:
    """(class, log-probability) of the largest ``d + noise``: exact samples of Gumbel noise."""
    scores = rows.d + noise
    column = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    index = column + start
    here = jnp.take_along_axis(scores, column[..., None], axis=-1)[..., 0]
    d = jnp.take_along_axis(rows.d, column[..., None], axis=-1)[..., 0]
    if axes:
        here, d, index = (mesh.gathered(v, axes) for v in (here, d, index))
        device = jnp.argmax(here, axis=-1)[..., None]
        d, index = (jnp.take_along_axis(v, device, axis=-1)[..., 0] for v in (d, index))
    return index, d - rows.rest
