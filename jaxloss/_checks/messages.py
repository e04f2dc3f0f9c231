"""Trace-time checks of shapes, dtypes and options, and the one form of their messages.

``function: rule; got facts. Way out.`` Values are never read: that is ``check_labels``.
"""

import math
import operator
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, dtypes


def message(function: str, rule: str, got: str, way_out: str = "") -> str:
    return f"{function}: {rule}; got {got}.{' ' + way_out if way_out else ''}"


def fail(
    function: str, rule: str, got: str, way_out: str = "", kind: type[Exception] = ValueError
) -> NoReturn:
    raise kind(message(function, rule, got, way_out))


def describe(x: Any) -> str:
    return f"{x.dtype}{tuple(x.shape)}"


def array(
    function: str,
    name: str,
    x: Any,
    *,
    of_classes: bool = False,
    of_keys: bool = False,
    narrow: bool = True,
) -> Array:
    """``of_classes``: an index past what JAX holds may become another one out of range.

    ``of_keys``: random keys are allowed too. ``narrow``: so are floats of fewer than 16 bits.
    """
    rule = f"{name} must be an array"
    if x is None:
        fail(function, rule, "None", kind=TypeError)
    if not narrow:
        _refuse_narrow(function, name, x)  # JAX may have no such dtype
    if not isinstance(x, Array) and isinstance(x, jax.Ref):
        fail(function, rule, f"{jax.typeof(x)}", f"Read it: {name}[...].", TypeError)
    if isinstance(x, np.ndarray | np.generic) and jnp.issubdtype(x.dtype, jnp.integer) and x.size:
        x = _integers_for_jax(function, name, x, of_classes)
    try:
        out = jnp.asarray(x)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError):  # of a transfer guard, say
            raise
        # A tensor of PyTorch raises RuntimeError.
        way_out = f"Detach it: {name}.detach()." if getattr(x, "requires_grad", False) else ""
        got = f"{type(x).__name__} ({str(error).partition(chr(10))[0]})"
        fail(function, rule, got, way_out, TypeError)
    numbers = jnp.issubdtype(out.dtype, jnp.number) or out.dtype == jnp.bool_
    if not numbers and not (of_keys and jnp.issubdtype(out.dtype, dtypes.prng_key)):
        fail(function, f"{rule} of numbers", describe(out), kind=TypeError)
    if not narrow:
        _refuse_narrow(function, name, out)
    return out


def _integers_for_jax(function: str, name: str, x: Any, of_classes: bool) -> Any:
    """What JAX holds of NumPy's integers."""
    given, narrow = jnp.iinfo(x.dtype), jnp.iinfo(dtypes.canonicalize_dtype(x.dtype))
    if given.bits == 1:  # JAX fails to read them
        return x.astype(np.int8)
    wider = given.bits > narrow.bits  # no other is read
    if not wider or (x.min() >= narrow.min and x.max() <= narrow.max):
        return x
    if of_classes:
        return np.clip(x, narrow.min, narrow.max)
    got = f"{describe(x)} from {x.min()} to {x.max()}"  # 2^32 + 3 would wrap to 3
    way_out = "Give smaller numbers, or set jax_enable_x64."
    fail(function, f"{name} must fit into {narrow.dtype}", got, way_out)


def cast(name: str, given: Any, dtype: str) -> str:
    """How to convert it, as Python."""
    convert = f"{name}.astype(" if hasattr(given, "astype") else f"jnp.asarray({name}, "
    return f"{convert}jnp.{dtype})"


def _refuse_narrow(function: str, name: str, given: Any) -> None:
    """Floats of fewer than 16 bits. Gradients have their inputs' dtypes: divided by the number of
    tokens, they would all be 0 (float8_e4m3fn has nothing between 0 and 2^-9), and the losses of
    what has no 0 (float8_e8m0fnu) are NaN."""
    dtype = getattr(given, "dtype", None)
    if isinstance(dtype, np.dtype) and dtype.itemsize < 2 and _has_finfo(dtype):
        rule = f"{name} must have a floating dtype of at least 16 bits"
        way_out = f"Convert it: {cast(name, given, 'bfloat16')}."
        fail(function, rule, describe(given), way_out, TypeError)


def _has_finfo(dtype: np.dtype) -> bool:
    """Whether ``dtype`` is floating. ``jnp.issubdtype`` denies that of a dtype that ml_dtypes has
    and this JAX does not know."""
    try:
        jnp.finfo(dtype)
    except (ValueError, TypeError):
        return False
    return True


def floating(function: str, name: str, given: Any, way_out: str = "", order: str = "") -> Array:
    """``order``: which argument stands where, for what looks like another one."""
    x = array(function, name, given, narrow=False)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        if not way_out and jnp.issubdtype(x.dtype, jnp.integer):
            first = f"The order is {order}. " if order else ""
            way_out = f"{first}Convert it: {cast(name, given, 'float32')}."
        fail(function, f"{name} must have a real floating dtype", describe(x), way_out, TypeError)
    return x


def floating_dtype(function: str, name: str, given: Any) -> np.dtype:
    rule = f"{name} must be a floating dtype of at least 16 bits"
    try:
        dtype = jnp.dtype(given)
    except TypeError:
        fail(function, rule, repr(given), kind=TypeError)
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        fail(function, rule, str(dtype), kind=TypeError)
    if dtypes.canonicalize_dtype(dtype) != dtype:
        fail(function, f"{name} must be a dtype that JAX has", str(dtype), "Set jax_enable_x64.")
    return dtype


def shape(
    function: str, name: str, x: Array, expected: Sequence[int], rule: str, way_out: str = ""
) -> None:
    # By hand, as every check here: chex.disable_asserts(), which programs call for speed, would
    # switch an assertion of chex off, and arrays that do not fit would broadcast.
    if x.shape != tuple(expected):
        fail(function, f"{name} must have {rule}, {tuple(expected)}", describe(x), way_out)


def is_index(x: Any) -> bool:
    """Whether it is one integer. Every numpy array has ``__index__``, and most raise."""
    if isinstance(x, bool):
        return False
    try:
        operator.index(x)
    except TypeError:  # a traced value's error is one
        return False
    return True


def index(function: str, name: str, x: Any, kind: str = "an int") -> int:
    if not is_index(x):
        got = describe(x) if hasattr(x, "dtype") else repr(x)
        fail(function, f"{name} must be {kind}", got, kind=TypeError)
    return operator.index(x)


def class_axes(
    function: str, logits: Array, name: str, axis: int | Sequence[int], name_of: str = "axis"
) -> tuple:
    """``axis`` as a tuple of distinct axes counted from the front."""
    axes: tuple[Any, ...] = tuple(axis) if isinstance(axis, tuple | list) else (axis,)
    for a in axes:
        if not is_index(a):
            rule = f"{name_of} must be an int or a tuple of ints"
            fail(function, rule, repr(axis), kind=TypeError)
    axes = tuple(map(operator.index, axes))
    rank = logits.ndim
    if rank == 0:
        fail(function, f"{name} must have a class axis", f"a scalar, {describe(logits)}")
    if not axes:
        fail(function, f"{name_of} must name at least one axis", "()")
    for a in axes:
        if not -rank <= a < rank:
            fail(
                function,
                f"{name_of} must be in [{-rank}, {rank - 1}] for {name} of rank {rank}",
                f"{name_of} {axis}, {name} {describe(logits)}",
            )
    axes = tuple(a % rank for a in axes)
    if len(set(axes)) != len(axes):
        fail(function, f"{name_of} must name each axis once", f"{axis}")
    return axes


def number(
    function: str,
    name: str,
    x: Any,
    low: float = -sys.float_info.max,
    high: float = sys.float_info.max,
) -> float:
    """A Python number: these options are compiled into the program."""
    x = _of_host(x)
    if isinstance(x, bool) or not isinstance(x, int | float):
        fail(
            function,
            f"{name} must be a Python number",
            type(x).__name__,
            "It is compiled into the program; under jit, close over it or mark it static.",
            TypeError,
        )
    if not low <= x <= high:  # nor is NaN
        fail(function, f"{name} must be in [{low:g}, {high:g}]", repr(x))
    return float(x)


def _of_host(x: Any) -> Any:
    """NumPy's numbers, np.float32(0.1) among them, as Python's."""
    of_numpy = isinstance(x, np.generic | np.ndarray) and x.ndim == 0 and is_real(x)
    return x.item() if of_numpy else x


def is_real(x: Any) -> bool:
    return any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer))


def scalar(
    function: str,
    name: str,
    x: Any,
    low: float,
    high: float,
    off: float,
    dtype: Any,
    *,
    of_tokens: bool = False,
) -> Any:
    """A number that may be traced: a float, or a scalar array of ``dtype``.

    None is ``off``. An array's value is not known here. Out of range it is NaN, which makes NaN of
    the losses. ``of_tokens``: the caller takes an array of one entry a token too.
    """
    if x is None:
        return off
    x, rule = _of_host(x), f"{name} must be a number, or a real scalar array"
    if isinstance(x, int | float) and not isinstance(x, bool):
        return number(function, name, x, low, high)
    if not isinstance(x, Array) or x.ndim or not is_real(x):
        got = describe(x) if hasattr(x, "dtype") else type(x).__name__
        wrong_shape = hasattr(x, "dtype") and is_real(x)
        listed = of_tokens and isinstance(x, list | tuple)
        way_out = f"One a token is an array: jnp.asarray({name})." if listed else ""
        fail(function, rule, got, way_out, kind=ValueError if wrong_shape else TypeError)
    return in_range(x, low, high, dtype)


def in_range(x: Array, low: float, high: float, dtype) -> Array:
    """``x`` in ``dtype``, with NaN in place of a value out of range: a traced one is not known."""
    largest = float(jnp.finfo(dtype).max)
    x, low, high = x.astype(dtype), max(low, -largest), min(high, largest)
    return jnp.where((x >= low) & (x <= high), x, jnp.nan)


def batch_shape(logits: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for i, n in enumerate(logits.shape) if i not in axes)


def num_classes(logits: Array, axes: tuple[int, ...]) -> int:
    return math.prod(logits.shape[a] for a in axes)


def word(function: str, name: str, x: Any, words: Sequence[str]) -> Any:
    if not isinstance(x, str) or x not in words:
        fail(function, f"{name} must be one of {', '.join(map(repr, words))}", repr(x))
    return x


def integer(function: str, name: str, x: Any, low: int, high: int | None, *, default: int) -> int:
    if x is None:
        return default
    if not is_index(x):
        fail(function, f"{name} must be an int or None", type(x).__name__, kind=TypeError)
    return bounded(function, name, operator.index(x), low, high)


def bounded(function: str, name: str, x: int, low: int, high: int | None = None) -> int:
    if x < low or (high is not None and x > high):
        bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
        fail(function, f"{name} must be {bounds}", repr(x))
    return x


def flag(function: str, name: str, x: Any) -> bool:
    if not isinstance(x, bool):
        fail(function, f"{name} must be True or False", repr(x), kind=TypeError)
    return x
