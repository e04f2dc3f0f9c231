"""Logits as passes read them: widened, capped, masked, and their differences in nats."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._types import with_static_numbers
from jaxloss._xla.dtypes import accumulator_dtype, upcast
from jaxloss._xla.elementary import exp_of_nonpositive, tanh
from jaxloss._xla.fusion import opaque
from jaxloss._xla.indexing import gather_class, gather_classes


@with_static_numbers
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


def over_temperature(below: Array, temperature: Array) -> Array:
    """``below[..., C]``, differences with the row's maximum, over a scalar or a number a row.

    A class at -inf stays there and has no derivative by the temperature: it would be 0 * inf.
    """
    nowhere = below == -jnp.inf
    of_classes = temperature[..., None] if temperature.ndim else temperature
    return jnp.where(nowhere, -jnp.inf, jnp.where(nowhere, 0, below) / of_classes)


def in_nats(x: Array, scaling: Scaling | None) -> Array:
    """``x``, logits that were read or their differences, in nats."""
    return x if scaling is None else x * scaling.unit


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "exist", "scaling"),
    meta_fields=("pallas_bytes",),
)
@dataclass(frozen=True)
class Logits:
    """Some classes of some rows, as they were given, and how they are read.

    Read, they are in the accumulator's dtype and in units of ``scaling.unit``: the difference of
    two is taken before the unit multiplies it, and is exact whatever offset the logits share. Of
    scaled logits it would be of two roundings, of which compilers leave one out where the product
    is part of the same pass: the maximum is then not the largest, and exponentials overflow.
    """

    values: Any  # [..., C]
    exist: Any = None  # bool, broadcastable to the values; None: all of them
    scaling: Scaling | None = None
    pallas_bytes: int = 2  # see ``dispatch.row_sums``

    @property
    def size(self) -> int:
        return self.values.shape[-1]

    @property
    def cap(self) -> float | None:
        return None if self.scaling is None else self.scaling.softcap

    @property
    def plain(self) -> bool:
        """Whether they are read as they are."""
        return self.exist is None and self.scaling is None

    def capped(self, x: Array) -> Array:
        return x if self.cap is None else tanh(x * (1 / self.cap))  # as read does, to the bit

    def wide(self) -> Array:
        """As they are compared: widened, capped, then masked.

        The cap comes first: a class that is masked has -inf, and tanh(-inf) is -1.
        """
        x = upcast(self.values)
        if self.cap is not None and self.exist is not None:
            # 0 times the slope of a NaN is NaN, in second derivatives.
            x = jnp.where(self.exist, x, 0)
        x = self.capped(x)
        return x if self.exist is None else jnp.where(self.exist, x, -jnp.inf)

    def uncapped(self) -> "Logits":
        """In the same order, in which a search finds the same place: a cap moves no maximum."""
        return Logits(self.values, self.exist)

    def capped_max(self, m: Array) -> Array:
        """The maximum from that of the uncapped logits."""
        if self.cap is None:
            return m
        m = self.capped(m)
        # A cap lifts -inf, but not of classes that are all masked.
        exist = self.exist
        return m if exist is None else jnp.where(jnp.any(exist, axis=-1), m, -jnp.inf)

    def as_read(self) -> "Logits":
        """:meth:`wide` as logits: nothing is left to do but to multiply by the unit."""
        left = None if self.scaling is None else self.scaling._replace(softcap=None)
        return Logits(self.wide(), scaling=left)

    def for_passes(self) -> "Logits":
        """What several passes read. As given where nothing is masked, because XLA:CPU would write
        out what the passes share."""
        return self if self.exist is None else self.as_read()

    def read(self, m: Array) -> Array:
        """The values in the accumulator's dtype and capped, for one pass over what
        :meth:`for_passes` gave; ``m`` is the row's maximum."""
        x = self.values.astype(accumulator_dtype(self.values.dtype))
        if self.cap is None:
            return x
        _, steep = opaque(m, 1 / self.cap)
        return tanh(x * steep)

    def nats(self, x: Array) -> Array:
        """``x``, logits that were read or their differences, in nats."""
        return in_nats(x, self.scaling)

    def difference(self, x: Array, m: Array) -> Array:
        """x_j - m in nats; ``x`` is what :meth:`read` gave, ``m`` the row's maximum."""
        if self.scaling is None:
            return x - m[..., None]
        m, unit = opaque(m, self.scaling.unit)
        return (x - m[..., None]) * unit

    def exp(self, x: Array, m: Array) -> Array:
        """exp(x_j - m); ``x`` is what :meth:`read` gave, ``m`` the row's maximum."""
        return exp_of_nonpositive(self.difference(x, m))

    def slope(self) -> Any:
        """The derivative of the scaled logits by the values."""
        if self.scaling is None:
            return 1.0
        cap, unit = self.scaling
        if cap is None:
            return unit
        x = self.values if self.exist is None else jnp.where(self.exist, self.values, 0)
        # sech^2, not 1 - tanh^2: the latter is 0 past |x| = 9 cap where the slope is still 6e-8.
        e = exp_of_nonpositive(-2 * jnp.abs(upcast(x) / cap))
        return 4 * e / (1 + e) ** 2 * (unit / cap)

    def at(self, index: Array) -> "Logits":
        """The classes at ``index[..., k]``, the last one where it is past the end."""
        return self._gathered(gather_classes, index)

    def at_class(self, index: Array) -> "Logits":
        """The one class at ``index[...]``: values [...]."""
        return self._gathered(gather_class, index)

    def _gathered(self, gather: Any, index: Array) -> "Logits":
        x, exist = self.values, self.exist
        # XLA:CPU gathers bfloat16 by widening the operand: without the barrier that conversion is
        # merged with a pass's and held as a float32 copy of the logits.
        if x.dtype != accumulator_dtype(x.dtype):
            x = lax.optimization_barrier(x)
        if exist is not None:
            exist = gather(jnp.broadcast_to(exist, x.shape), index)
        return Logits(gather(x, index), exist, self.scaling)
