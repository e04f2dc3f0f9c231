"""Trace-time checks of shapes, dtypes and options, and the one form of their messages.

``function: rule; got facts. Way out.`` Values are never read: that is ``check_labels``.
"""

import math
import operator
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, dtypes

from jaxloss import _mesh
from jaxloss._labels import RESTS, TopKLabels

REDUCTIONS = ("none", "mean", "sum")


def message(function: str, rule: str, got: str, way_out: str = "") -> str:
    return f"{function}: {rule}; got {got}.{' ' + way_out if way_out else ''}"


def fail(
    function: str, rule: str, got: str, way_out: str = "", kind: type[Exception] = ValueError
) -> NoReturn:
    raise kind(message(function, rule, got, way_out))


def describe(x: Any) -> str:
    return f"{x.dtype}{tuple(x.shape)}"


def array(function: str, name: str, x: Any) -> Array:
    if x is None:
        fail(function, f"{name} must be an array", "None", kind=TypeError)
    if isinstance(x, np.ndarray | np.integer) and jnp.issubdtype(x.dtype, jnp.integer):
        narrow = np.iinfo(dtypes.canonicalize_dtype(x.dtype))
        if narrow.bits < np.iinfo(x.dtype).bits:  # 2^32 + 3 would wrap to 3
            x = np.clip(x, narrow.min, narrow.max)
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError, OverflowError) as error:
        fail(function, f"{name} must be an array", f"{type(x).__name__} ({error})", kind=TypeError)


def floating(function: str, name: str, x: Any, way_out: str = "") -> Array:
    x = array(function, name, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        if not way_out and jnp.issubdtype(x.dtype, jnp.integer):
            way_out = f"Convert it: {name}.astype(jnp.float32)."
        fail(function, f"{name} must have a real floating dtype", describe(x), way_out, TypeError)
    return x


def shape(
    function: str, name: str, x: Array, expected: Sequence[int], rule: str, way_out: str = ""
) -> None:
    chex.assert_shape(
        x,
        tuple(expected),
        custom_message=message(
            function, f"{name} must have {rule}, {tuple(expected)}", describe(x), way_out
        ),
        exception_type=ValueError,
    )


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
    if isinstance(x, bool) or not isinstance(x, int | float):
        fail(
            function,
            f"{name} must be a Python number",
            type(x).__name__,
            "It is compiled into the program; under jit, close over it or mark it static.",
            TypeError,
        )
    chex.assert_scalar_in(
        x,
        low,
        high,
        custom_message=message(function, f"{name} must be in [{low:g}, {high:g}]", repr(x)),
        exception_type=ValueError,
    )
    return float(x)


def top_k_labels(function: str, name: str, batch: tuple[int, ...], y: TopKLabels) -> TopKLabels:
    indices = array(function, "labels.indices", y.indices)
    probabilities = array(function, "labels.probabilities", y.probabilities)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        rule = "labels.indices must be class indices (an integer dtype)"
        way_out = ""
        if jnp.issubdtype(probabilities.dtype, jnp.integer):
            way_out = "jax.lax.top_k returns (values, indices), TopKLabels takes indices first."
        fail(function, rule, describe(indices), way_out, TypeError)
    probabilities = floating(function, "labels.probabilities", probabilities)
    if indices.shape[:-1] != batch or indices.ndim != len(batch) + 1:
        rule = f"labels.indices must be [..., k] with the batch shape of {name}, {batch}"
        fail(function, rule, describe(indices))
    rule = "the shape of labels.indices"
    shape(function, "labels.probabilities", probabilities, indices.shape, rule)
    word(function, "labels.rest", y.rest, RESTS)
    return TopKLabels(indices, probabilities, y.rest)


def _labels(function: str, name: str, logits: Array, axes: tuple[int, ...], y: Any) -> Any:
    """Class indices (integers, logits without the class axes) or probabilities (like logits)."""
    if isinstance(y, TopKLabels):
        return top_k_labels(function, name, batch_shape(logits, axes), y)
    y = indices_or_probabilities(function, y)
    batch = batch_shape(logits, axes)
    axis = axes[0] if len(axes) == 1 else axes
    if jnp.issubdtype(y.dtype, jnp.integer):
        rule = f"the shape of {name} without axis {axis}"
        way_out = ""
        if y.shape == logits.shape:
            way_out = "One-hot labels are probabilities: labels.astype(jnp.float32)."
        elif len(axes) == 1 and y.shape == (*batch[: axes[0]], 1, *batch[axes[0] :]):
            way_out = f"Drop the size-1 class axis: labels.squeeze({axis})."
        shape(function, "labels", y, batch, rule, way_out or f"{name}: {describe(logits)}.")
    else:
        rule = f"the shape of {name} when they are probabilities (floating)"
        way_out = ""
        if y.shape == batch:
            way_out = "Class indices are integers: labels.astype(jnp.int32)."
        shape(function, "labels", y, logits.shape, rule, way_out)
    return y


def indices_or_probabilities(function: str, y: Any) -> Array:
    y = array(function, "labels", y)
    if not any(jnp.issubdtype(y.dtype, kind) for kind in (jnp.integer, jnp.floating)):
        rule = "labels must be class indices (an integer dtype) or class probabilities (floating)"
        fail(function, rule, describe(y), kind=TypeError)
    return y


def class_weight(function: str, weight: Any, num_classes: int) -> Array | None:
    if weight is None:
        return None
    weight = floating(function, "weight", weight)
    shape(function, "weight", weight, (num_classes,), "one entry a class")
    return weight


def check_sample_weight(function: str, weight: Any, batch: tuple[int, ...]) -> Array | None:
    if weight is None:
        return None
    weight = array(function, "sample_weight", weight)
    if jnp.issubdtype(weight.dtype, jnp.complexfloating):
        fail(function, "sample_weight must be real or boolean", describe(weight), kind=TypeError)
    shape(function, "sample_weight", weight, batch, "the shape of the losses")
    return weight


def boolean(function: str, mask: Any) -> Array:
    mask = array(function, "where", mask)
    if mask.dtype != jnp.bool_:
        way_out = "For weights use sample_weight."
        fail(function, "where must be boolean", describe(mask), way_out, TypeError)
    return mask


def fits(mask: Array, logits: Array) -> bool:
    pairs = zip(mask.shape[::-1], logits.shape[::-1], strict=False)
    return mask.ndim <= logits.ndim and all(m in (1, n) for m, n in pairs)


def masks(
    function: str, name: str, mask: Any, logits: Any, axes: tuple[int, ...]
) -> tuple[Array | None, Array | None]:
    """Returns (classes that exist, of logits' rank; tokens that count, shaped like the losses)."""
    if mask is None:
        return None, None
    mask = boolean(function, mask)
    fitting = fits(mask, logits)
    tokens = mask.shape == batch_shape(logits, axes)
    padded = mask.reshape((1,) * (logits.ndim - mask.ndim) + mask.shape) if fitting else mask
    if tokens and fitting and num_classes(padded, axes) > 1:
        fail(
            function,
            "where must be either classes that exist or tokens that count",
            f"{describe(mask)}, which fits {name} {describe(logits)} both ways",
            f"Give classes the rank of {name} (where[None, :]), tokens as sample_weight=where.",
        )
    if tokens:
        return None, mask
    if not fitting:
        fail(
            function,
            f"where must broadcast to {name} (classes that exist) or have the shape of the losses,"
            f" {batch_shape(logits, axes)} (tokens that count)",
            f"{describe(mask)}, {name} {describe(logits)}",
        )
    return padded, None


def class_mask(function: str, name: str, mask: Any, logits: Array) -> Array | None:
    """``where`` as classes that exist, of the logits' rank."""
    if mask is None:
        return None
    mask = boolean(function, mask)
    if not fits(mask, logits):
        fail(
            function,
            f"where must broadcast to {name}",
            f"{describe(mask)}, {name} {describe(logits)}",
        )
    return mask.reshape((1,) * (logits.ndim - mask.ndim) + mask.shape)


def batch_shape(logits: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for i, n in enumerate(logits.shape) if i not in axes)


def num_classes(logits: Array, axes: tuple[int, ...]) -> int:
    return math.prod(logits.shape[a] for a in axes)


def precision(function: str, x: Any) -> Any:
    if x is None:
        return None
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    try:
        hash(x)  # it is compiled into the program
        jax.eval_shape(partial(jnp.matmul, precision=x), one, one)
    except (TypeError, ValueError) as error:
        fail(function, "precision must be one of jax.lax.dot_general's", repr(x), str(error))
    return x


def word(function: str, name: str, x: Any, words: Sequence[str]) -> Any:
    if not isinstance(x, str) or x not in words:
        fail(function, f"{name} must be one of {', '.join(map(repr, words))}", repr(x))
    return x


def check_reduction(function: str, x: Any) -> None:
    word(function, "reduction", x, REDUCTIONS)


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


def chunk_size(function: str, x: Any, default: int, most: int) -> int:
    """At most as many as there are."""
    return min(integer(function, "chunk_size", x, 1, None, default=default), max(1, most))


def flag(function: str, name: str, x: Any) -> bool:
    if not isinstance(x, bool):
        fail(function, f"{name} must be True or False", repr(x), kind=TypeError)
    return x


def scaling(function: str, cap: Any, x: Any) -> tuple[float | None, float]:
    """The soft cap and the temperature."""
    cap = None if cap is None else _divisor(function, "logit_softcap", cap)
    x = temperature(function, x)
    if cap is not None:
        most = float(jnp.finfo(jnp.float32).max)
        number(function, "logit_softcap / temperature", cap / x, 0, most)
    return cap, x


def temperature(function: str, x: Any) -> float:
    return _divisor(function, "temperature", x)


def _divisor(function: str, name: str, x: Any) -> float:
    """What logits are divided by: past these, it is 0 or inf in float32."""
    info = jnp.finfo(jnp.float32)
    return number(function, name, x, float(info.tiny), float(info.max))


def bucket(function: str, labels: Any, weight: Any, label_smoothing: float) -> None:
    if getattr(labels, "rest", None) == "bucket" and (weight is not None or label_smoothing):
        rule = "labels with rest='bucket' take neither weight nor label_smoothing"
        got = f"weight {'None' if weight is None else 'given'}, label_smoothing {label_smoothing}"
        fail(function, rule, got, "One class stands for many: it has no weight of its own.")


def ignored(function: str, x: Any) -> int | None:
    return None if x is None else index(function, "ignore_index", x, "an int or None")


def mesh_axes(function: str, name: str, x: Any) -> _mesh.Axes:
    """Names of axes of the surrounding ``shard_map``."""
    names = () if x is None else (x,) if isinstance(x, str) else x
    if not isinstance(names, tuple | list) or not all(isinstance(n, str) for n in names):
        rule = f"{name} must be the name of a mesh axis, or a tuple of names"
        fail(function, rule, repr(x), kind=TypeError)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    for n in names:
        if n not in manual:
            fail(
                function,
                f"{name} must name axes of the surrounding shard_map",
                f"{n!r}, inside of {'shard_map over ' + str(manual) if manual else 'none'}",
            )
    if len(set(names)) != len(names):
        fail(function, f"{name} must name each axis once", repr(x))
    return tuple(names)


def split(
    function: str,
    name: str,
    split_array: Array,
    of_tokens: dict[str, Any],
    vocab_axes: _mesh.Axes,
    token_axes: _mesh.Axes,
) -> None:
    """The types must say what the names say: gradients are sums over what the types leave out."""
    way_out = "Split it in in_specs, and keep shard_map's check_vma=True."
    for axis in vocab_axes:
        if axis in token_axes:
            rule = "vocab_axis_name and token_axis_name must differ"
            fail(function, rule, f"{axis!r} in both")
        if axis not in _mesh.varies_over(split_array):
            rule = f"{name} must be split over vocab_axis_name"
            fail(function, rule, f"{name} the same on all devices along {axis!r}", way_out)
        for other, x in of_tokens.items():
            if axis in _mesh.varies_over(x):
                rule = f"{other} must be the same on all devices along vocab_axis_name"
                fail(function, rule, f"{other} that varies over {axis!r}")
    arrays = (split_array, *of_tokens.values())
    names = [other for other, x in of_tokens.items() if x is not None]
    given = frozenset().union(*map(_mesh.varies_over, arrays))
    for axis in token_axes:
        if axis not in given:
            fail(
                function,
                "the tokens must be split over token_axis_name",
                f"{', '.join((name, *names))} the same on all devices along {axis!r}",
                way_out,
            )


def product_operands(
    function: str, hidden: Any, kernel: Any, bias: Any, vocab_axis: Any, of: str = ""
) -> tuple[Array, Array, Array | None, int]:
    """Checked: hidden, kernel, bias and the vocab axis; ``of`` goes before each of their names."""
    hidden = floating(function, f"{of}hidden", hidden)
    kernel = floating(function, f"{of}kernel", kernel)
    if hidden.ndim == 0:
        fail(function, f"{of}hidden must be [..., D]", describe(hidden))
    if kernel.ndim != 2:
        rule = f"{of}kernel must be [D, V], or [V, D] with {of}vocab_axis=0"
        fail(function, rule, describe(kernel))
    name_of = f"{of}vocab_axis"
    axes = class_axes(function, kernel, f"{of}kernel", vocab_axis, name_of=name_of)
    if len(axes) != 1:
        fail(function, f"{name_of} must be one axis", f"{vocab_axis}")
    vocab_axis = axes[0]
    size, columns = kernel.shape[1 - vocab_axis], kernel.shape[vocab_axis]
    if hidden.shape[-1] != size:
        transposed = hidden.shape[-1] == columns
        fail(
            function,
            f"{of}kernel must have {of}hidden's last dimension, D = {hidden.shape[-1]}, at axis "
            f"{1 - vocab_axis}",
            f"{of}hidden {describe(hidden)}, {of}kernel {describe(kernel)}",
            f"For a kernel of this shape set {name_of}={1 - vocab_axis}." if transposed else "",
        )
    if hidden.dtype != kernel.dtype:
        fail(
            function,
            f"{of}hidden and {of}kernel must have one dtype",
            f"{hidden.dtype} and {kernel.dtype}",
            "Cast one of them: a silent cast could copy the whole kernel.",
            TypeError,
        )
    if bias is not None:
        bias = floating(function, f"{of}bias", bias)
        shape(function, f"{of}bias", bias, (columns,), f"one entry a column of {of}kernel")
    return hidden, kernel, bias, vocab_axis


class TokenArrays(NamedTuple):
    labels: Any
    weight: Array | None
    sample_weight: Array | None
    class_mask: Array | None
    token_mask: Array | None


class TokenArguments(NamedTuple):
    arrays: TokenArrays
    static: dict[str, Any]
    of_tokens: dict[str, Any]  # what has one entry a token, by name


def token_arguments(
    function: str,
    name: str,
    logits: Any,  # an Array, or what one would be: it is asked for its shape and dtype alone
    labels: Any,
    axis: Any,
    weight: Any,
    ignore_index: Any,
    sample_weight: Any,
    where: Any,
    reduction: Any,
    classes: Any = None,
    vocab_axes: _mesh.Axes = (),
) -> TokenArguments:
    """The arguments that the losses of logits share; ``name`` is what they call their logits.

    ``classes``: C, by default all columns of the logits, on all devices along ``vocab_axes``.
    """
    axes = class_axes(function, logits, name, axis)
    check_reduction(function, reduction)
    columns = num_classes(logits, axes) * _mesh.size(vocab_axes)
    classes = integer(function, "num_classes", classes, 0, columns, default=columns)
    labels = _labels(function, name, logits, axes, labels)
    weight = class_weight(function, weight, classes)
    sample_weight = check_sample_weight(function, sample_weight, batch_shape(logits, axes))
    class_mask, token_mask = masks(function, name, where, logits, axes)
    of_tokens = None
    if isinstance(labels, TopKLabels):
        of_tokens = labels.indices
    elif jnp.issubdtype(labels.dtype, jnp.integer):
        of_tokens = labels
    return TokenArguments(
        TokenArrays(labels, weight, sample_weight, class_mask, token_mask),
        {
            "axes": axes,
            "num_classes": classes,
            "ignore_index": ignored(function, ignore_index),
            "reduction": reduction,
        },
        {
            "labels": of_tokens,
            "sample_weight": sample_weight,
            "where": token_mask,
        },
    )
