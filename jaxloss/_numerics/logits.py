"""Logits as passes read them: widened, capped, masked, and their differences in nats."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxloss._xla.dtypes import accumulator_dtype, widened
from jaxloss._xla.fusion import behind_barrier
from jaxloss._xla.math import exp_of_nonpositive, tanh


class Scaling(NamedTuple):
    """What logits become first: ``unit * tanh(x / softcap)``, or ``unit * x``."""

    softcap: float | None
    unit: float


def scaling_of(softcap: float | None, temperature: Any = 1.0) -> Scaling | None:
    """Of ``softcap * tanh(x / softcap) / temperature``. A temperature that is an array divides the
    logits themselves, and is left out here."""
    temperature = 1.0 if isinstance(temperature, Array) else temperature
    if softcap is None and temperature == 1:
        return None
    return Scaling(softcap, (softcap or 1) / temperature)


def cap_of(scaling: Scaling | None) -> float | None:
    return None if scaling is None else scaling.softcap


def widen(x: Array, class_mask: Array | None, scaling: Scaling | None) -> Array:
    """The logits as they are compared: in the accumulator's dtype, in units of ``scaling.unit``,
    then masked.

    The cap comes first: a class that is masked has -inf, and tanh(-inf) is -1.
    """
    x = widened(x)
    if cap_of(scaling) is not None and class_mask is not None:
        x = jnp.where(class_mask, x, 0)  # 0 times the slope of a NaN is NaN, in second derivatives
    x = capped(x, scaling)
    return x if class_mask is None else jnp.where(class_mask, x, -jnp.inf)


def capped(x: Array, scaling: Scaling | None) -> Array:
    cap = cap_of(scaling)
    return x if cap is None else tanh(x * (1 / cap))  # by the same number as read does, to the bit


def capped_max(m: Array, class_mask: Array | None, scaling: Scaling | None) -> Array:
    """The maximum of capped logits from that of the logits."""
    if cap_of(scaling) is None:
        return m
    m = capped(m, scaling)  # which moves no maximum
    # A cap lifts -inf, but not of classes that are all masked.
    return m if class_mask is None else jnp.where(jnp.any(class_mask, axis=-1), m, -jnp.inf)


def for_passes(
    logits: Array, class_mask: Array | None, scaling: Scaling | None
) -> tuple[Array, Scaling | None]:
    """(what several passes read; what is left to do with it, by ``read``).

    The logits themselves where nothing is masked: XLA:CPU would write out what passes share.
    """
    if class_mask is None:
        return logits, scaling
    left = None if scaling is None else scaling._replace(softcap=None)
    return widen(logits, class_mask, scaling), left


def read(x: Array, m: Array, scaling: Scaling | None) -> Array:
    """In the accumulator's dtype and capped; ``m`` is the row's maximum."""
    x, cap = x.astype(accumulator_dtype(x.dtype)), cap_of(scaling)
    if cap is None:
        return x
    _, steep = behind_barrier(m, 1 / cap)
    return tanh(x * steep)


def scaled(x: Array, scaling: Scaling | None) -> Array:
    """Logits that ``widen`` gave, or their differences, in nats.

    The difference first: exact, whatever offset the logits share. Of scaled logits it would be of
    two roundings, of which compilers leave one out where the product is part of the same pass: the
    maximum is then not the largest, and exponentials overflow.
    """
    return x if scaling is None else x * scaling.unit


def scaling_slope(x: Array, scaling: Scaling) -> Any:
    """The derivative of scaled logits by the logits."""
    if scaling.softcap is None:
        return scaling.unit
    # sech^2, not 1 - tanh^2: the latter is 0 past |x| = 9 cap where the slope is still 6e-8.
    e = exp_of_nonpositive(-2 * jnp.abs(widened(x) / scaling.softcap))
    return 4 * e / (1 + e) ** 2 * (scaling.unit / scaling.softcap)


def above(x: Array, m: Array, scaling: Scaling | None) -> Array:
    """x_j - m in nats."""
    if scaling is None:
        return x - m[..., None]
    m, unit = behind_barrier(m, scaling.unit)
    return (x - m[..., None]) * unit


def exponentials(x: Array, m: Array, scaling: Scaling | None) -> Array:
    """exp(x_j - m) in nats."""
    return exp_of_nonpositive(above(x, m, scaling))
