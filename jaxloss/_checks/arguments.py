"""What the losses' arguments must be: labels, weights, masks, numbers."""

import itertools
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxloss._checks import messages
from jaxloss._types import REDUCTIONS, RESTS, Axes, LossOptions, Scalars, TokenArrays, TopKLabels
from jaxloss._xla import mesh
from jaxloss._xla.dtypes import accumulator_dtype

# Functions whose messages do not offer it.
WITHOUT_SAMPLE_WEIGHT = (
    "linear_log_probs_at",
    "linear_sample",
    "linear_token_stats",
    "linear_top_k",
    "log_probs_at",
    "log_softmax",
    "next_token_labels",
    "token_stats",
)
WITHOUT_AXIS = ("linear_cross_entropy", "linear_stats_loss", "linear_token_stats")


def top_k_labels(
    function: str,
    name: str,
    batch: tuple[int, ...],
    y: TopKLabels,
    logits: Any = None,
    *,
    of: str = "labels",
) -> TopKLabels:
    """``name``: what has the batch shape. ``of``: the argument's own name."""
    indices = messages.array(function, f"{of}.indices", y.indices, of_classes=True)
    probabilities = messages.array(function, f"{of}.probabilities", y.probabilities, narrow=False)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        rule = f"{of}.indices must be class indices (an integer dtype)"
        way_out = ""
        if jnp.issubdtype(probabilities.dtype, jnp.integer):
            way_out = "jax.lax.top_k returns (values, indices), TopKLabels takes indices first."
        messages.fail(function, rule, messages.describe(indices), way_out, TypeError)
    probabilities = messages.floating(function, f"{of}.probabilities", probabilities)
    if indices.shape[:-1] != batch or indices.ndim != len(batch) + 1:
        rule = f"{of}.indices must be [..., k] with the batch shape of {name}, {batch}"
        way_out = _other_axis(function, logits, indices.shape[:-1])
        messages.fail(function, rule, messages.describe(indices), way_out)
    rule = f"the shape of {of}.indices"
    messages.shape(function, f"{of}.probabilities", probabilities, indices.shape, rule)
    messages.word(function, f"{of}.rest", y.rest, RESTS)
    return TopKLabels(indices, probabilities, y.rest)


def _labels(function: str, name: str, logits: Array, axes: tuple[int, ...], y: Any) -> Any:
    """Class indices (integers, logits without the class axes) or probabilities (like logits)."""
    if isinstance(y, TopKLabels):
        return top_k_labels(function, name, messages.batch_shape(logits, axes), y, logits)
    given, batch = y, messages.batch_shape(logits, axes)
    y = indices_or_probabilities(function, given, logits.shape, batch)
    axis = axes[0] if len(axes) == 1 else axes
    if jnp.issubdtype(y.dtype, jnp.integer):
        rule = f"the shape of {name} without axis {axis}"
        way_out = ""
        if y.shape == logits.shape:
            way_out = one_hot_way_out(given)
        elif len(axes) == 1 and y.shape == (*batch[: axes[0]], 1, *batch[axes[0] :]):
            way_out = f"Drop the size-1 class axis: labels.squeeze({axis})."
        of_logits = f"{name}: {messages.describe(logits)}."
        other = _other_axis(function, logits, y.shape)
        way_out = way_out or " ".join(filter(None, (of_logits, other)))
        messages.shape(function, "labels", y, batch, rule, way_out)
    else:
        rule = f"the shape of {name} when they are probabilities (floating)"
        way_out = ""
        if y.shape == batch:
            way_out = "Class indices are integers: labels.astype(jnp.int32)."
        messages.shape(function, "labels", y, logits.shape, rule, way_out)
    return y


def _other_axis(function: str, logits: Any, shape: tuple[int, ...]) -> str:
    """The one class axis, or tuple of axes, that labels of this batch shape fit."""
    if logits is None or function in WITHOUT_AXIS or not 0 < len(shape) < logits.ndim:
        return ""
    choices = itertools.combinations(range(logits.ndim), logits.ndim - len(shape))
    found = [axes for axes in choices if messages.batch_shape(logits, axes) == shape]
    if len(found) != 1:
        return ""
    (axes,) = found
    return f"The labels fit axis={axes[0] if len(axes) == 1 else axes}."


def one_hot_way_out(given: Any) -> str:
    return f"One-hot labels are probabilities: {messages.cast('labels', given, 'float32')}."


def indices_or_probabilities(
    function: str, given: Any, logits: tuple[int, ...] = (), batch: tuple[int, ...] = ()
) -> Array:
    """``logits``, ``batch``: the shapes of what the labels are of, and without its class axes."""
    y = messages.array(function, "labels", given, of_classes=True, narrow=False)
    if not (jnp.issubdtype(y.dtype, jnp.integer) or jnp.issubdtype(y.dtype, jnp.floating)):
        rule = "labels must be class indices (an integer dtype) or class probabilities (floating)"
        way_out = ""
        if y.dtype == jnp.bool_ and y.ndim and y.shape == logits:
            way_out = one_hot_way_out(given)
        elif y.dtype == jnp.bool_ and y.shape == batch:
            way_out = f"Class indices are integers: {messages.cast('labels', given, 'int32')}."
        messages.fail(function, rule, messages.describe(y), way_out, TypeError)
    return y


def class_weight(function: str, weight: Any, num_classes: int) -> Array | None:
    if weight is None:
        return None
    weight = messages.floating(function, "weight", weight)
    messages.shape(function, "weight", weight, (num_classes,), "one entry a class")
    return weight


def check_sample_weight(function: str, given: Any, batch: tuple[int, ...]) -> Array | None:
    if given is None:
        return None
    weight = messages.array(function, "sample_weight", given, narrow=False)
    if jnp.issubdtype(weight.dtype, jnp.complexfloating):
        messages.fail(
            function,
            "sample_weight must be real or boolean",
            messages.describe(weight),
            kind=TypeError,
        )
    way_out = "" if weight.shape == batch else broadcast("sample_weight", given, weight, batch)
    messages.shape(function, "sample_weight", weight, batch, "the shape of the losses", way_out)
    return weight


def broadcast(name: str, given: Any, x: Array, shape: tuple[int, ...]) -> str:
    """How to bring it to the shape, where there is one way: nothing is broadcast by itself."""
    trailing, leading = fits(x, shape), x.shape == shape[: x.ndim]
    if trailing == leading:
        return ""
    if leading:
        name = name if hasattr(given, "ndim") else f"jnp.asarray({name})"
        name += f"[{', '.join([':'] * x.ndim + ['None'] * (len(shape) - x.ndim))}]"
    return f"Broadcast it: jnp.broadcast_to({name}, {shape})."


def boolean(function: str, given: Any) -> Array:
    mask = messages.array(function, "where", given)
    if mask.dtype != jnp.bool_:
        where = "where" if hasattr(given, "dtype") else "jnp.asarray(where)"
        way_out = f"Convert it: {where} != 0."
        if function not in WITHOUT_SAMPLE_WEIGHT:
            way_out += " For weights use sample_weight."
        messages.fail(
            function, "where must be boolean", messages.describe(mask), way_out, TypeError
        )
    return mask


def fits(mask: Array, shape: tuple[int, ...]) -> bool:
    """Whether it broadcasts to the shape."""
    pairs = zip(mask.shape[::-1], shape[::-1], strict=False)
    return mask.ndim <= len(shape) and all(m in (1, n) for m, n in pairs)


def masks(
    function: str, name: str, mask: Any, logits: Any, axes: tuple[int, ...]
) -> tuple[Array | None, Array | None]:
    """Returns (classes that exist, of logits' rank; tokens that count, shaped like the losses)."""
    if mask is None:
        return None, None
    mask = boolean(function, mask)
    fitting = fits(mask, logits.shape)
    tokens = mask.shape == messages.batch_shape(logits, axes)
    padded = mask.reshape((1,) * (logits.ndim - mask.ndim) + mask.shape) if fitting else mask
    if tokens and fitting and messages.num_classes(padded, axes) > 1:
        messages.fail(
            function,
            "where must be either classes that exist or tokens that count",
            f"{messages.describe(mask)}, which fits {name} {messages.describe(logits)} both ways",
            f"Give classes the rank of {name} (where[None, :]), tokens as sample_weight=where.",
        )
    if tokens:
        return None, mask
    if not fitting:
        messages.fail(
            function,
            f"where must broadcast to {name} (classes that exist) or have the shape of the losses,"
            f" {messages.batch_shape(logits, axes)} (tokens that count)",
            f"{messages.describe(mask)}, {name} {messages.describe(logits)}",
        )
    return padded, None


def class_mask(function: str, name: str, mask: Any, logits: Array) -> Array | None:
    """``where`` as classes that exist, of the logits' rank."""
    if mask is None:
        return None
    mask = boolean(function, mask)
    if not fits(mask, logits.shape):
        messages.fail(
            function,
            f"where must broadcast to {name}",
            f"{messages.describe(mask)}, {name} {messages.describe(logits)}",
        )
    return mask.reshape((1,) * (logits.ndim - mask.ndim) + mask.shape)


def precision(function: str, x: Any) -> Any:
    if x is None:
        return None
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    try:
        hash(x)  # it is compiled into the program
        jax.eval_shape(partial(jnp.matmul, precision=x), one, one)
    except (TypeError, ValueError) as error:
        messages.fail(
            function, "precision must be one of jax.lax.dot_general's", repr(x), str(error)
        )
    return x


def check_reduction(function: str, x: Any) -> None:
    messages.word(function, "reduction", x, REDUCTIONS)


def chunk_size(function: str, x: Any, default: int, most: int) -> int:
    """At most as many as there are."""
    return min(messages.integer(function, "chunk_size", x, 1, None, default=default), max(1, most))


FINITE = -sys.float_info.max, sys.float_info.max
# What logits are divided by: past these, it or its reciprocal is 0 in float32.
DIVISORS = (float(jnp.finfo(jnp.float32).tiny), 1 / float(jnp.finfo(jnp.float32).tiny))


def scaling(function: str, cap: Any, x: Any, dtype) -> tuple[float | None, Any]:
    """The soft cap and the temperature, which may be a traced scalar of ``dtype``."""
    if cap is not None:
        if isinstance(cap, int | float) and cap == 0:
            rule = "logit_softcap must be positive, or None"
            messages.fail(function, rule, repr(cap), "No cap is logit_softcap=None.")
        cap = messages.number(function, "logit_softcap", cap, *DIVISORS)
    x = temperature(function, x, dtype)
    if cap is not None and not isinstance(x, Array):
        most = float(jnp.finfo(jnp.float32).max)
        messages.number(function, "logit_softcap / temperature", cap / x, 0, most)
    return cap, x


def temperature(function: str, x: Any, dtype) -> Any:
    """A number, or a scalar of ``dtype``; 1 where :func:`token_temperature` has one a token."""
    x = 1.0 if getattr(x, "ndim", 0) else x
    return messages.scalar(function, "temperature", x, *DIVISORS, 1.0, dtype, of_tokens=True)


def token_temperature(
    function: str, x: Any, batch: tuple[int, ...], dtype: Any, name: str = "temperature"
) -> Any:
    """The temperature where it has one entry a token, otherwise None. Out of range it is NaN."""
    if not getattr(x, "ndim", 0):
        return None
    x = messages.floating(function, name, x)
    way_out = "" if x.shape == batch else broadcast(name, x, x, batch)
    rule = "no axes, or the shape of the losses"
    messages.shape(function, name, x, batch, rule, way_out)
    return messages.in_range(x, *DIVISORS, dtype)


def check_beta(function: str, x: Any, dtype: Any) -> Any:
    x = messages.scalar(function, "beta", x, *FINITE, 0.5, dtype)
    if isinstance(x, Array):
        return jnp.where((x > 0) & (x < 1), x, jnp.nan)
    if not 0 < x < 1:
        way_out = "At its ends the divergences are 'forward' and 'reverse', times 0."
        messages.fail(function, "beta must be in (0, 1)", repr(x), way_out)
    return float(x)


def smoothing(function: str, x: Any, dtype) -> Any:
    return messages.scalar(function, "label_smoothing", x, 0, 1, 0.0, dtype)


def check_z_loss(function: str, x: Any, dtype) -> Any:
    return messages.scalar(function, "z_loss", x, 0, sys.float_info.max, 0.0, dtype)


def check_empty_mean(function: str, x: Any) -> float | None:
    return None if x is None else messages.number(function, "empty_mean", x)


def check_bucket(function: str, arrays: TokenArrays, scalars: Scalars) -> None:
    weight, label_smoothing = arrays.weight, scalars.label_smoothing
    plain = weight is None and not isinstance(label_smoothing, Array) and label_smoothing == 0
    if getattr(arrays.labels, "rest", None) == "bucket" and not plain:
        rule = "labels with rest='bucket' take neither weight nor label_smoothing"
        got = f"weight {'None' if weight is None else 'given'}, label_smoothing {label_smoothing}"
        messages.fail(
            function, rule, got, "One class stands for many: it has no weight of its own."
        )


IGNORED = -100  # the default, which every call gives


def ignored(function: str, x: Any, labels: Any = None) -> int | None:
    """``labels``: probabilities and booleans have no label that is ignored."""
    x = None if x is None else messages.index(function, "ignore_index", x, "an int or None")
    given = x not in (None, IGNORED)
    if given and isinstance(labels, Array) and not jnp.issubdtype(labels.dtype, jnp.integer):
        other = "" if function in WITHOUT_SAMPLE_WEIGHT else "sample_weight or "
        way_out = f"Leave entries out by {other}where, shaped as the losses."
        got = f"ignore_index {x} beside labels {messages.describe(labels)}"
        messages.fail(function, "ignore_index is for labels of an integer dtype", got, way_out)
    return x


def per_token(function: str, given: tuple, lead: tuple[int, ...]) -> tuple[Array, ...]:
    """What a loss of the caller's reads of each token, checked."""
    arrays = []
    for i, x in enumerate(given):
        x = messages.array(function, f"per_token[{i}]", x, of_keys=True)
        if x.shape[: len(lead)] != lead:
            rule = f"per_token[{i}] must have hidden's leading shape, {lead}"
            messages.fail(function, rule, messages.describe(x))
        arrays.append(x)
    return tuple(arrays)


def token_loss(
    function: str,
    name: str,
    logits: Any,  # an Array, or what one would be: it is asked for its shape and dtype alone
    labels: Any,
    *,
    axis: Any,
    ignore_index: Any,
    where: Any,
    reduction: Any,
    weight: Any = None,
    sample_weight: Any = None,
    empty_mean: Any = None,
    num_classes: Any = None,
    vocab_axes: Axes = (),
    token_axes: Axes = (),
    return_stats: Any = False,
    temperature: Any = None,
) -> tuple[TokenArrays, LossOptions]:
    """The arguments that the losses of logits share; ``name`` is what they call their logits.

    ``num_classes``: by default all columns of the logits, on all devices along ``vocab_axes``.
    ``temperature``: one entry a token, if it has such.
    """
    axes = messages.class_axes(function, logits, name, axis)
    check_reduction(function, reduction)
    columns = messages.num_classes(logits, axes) * mesh.size(vocab_axes)
    classes = messages.integer(function, "num_classes", num_classes, 0, columns, default=columns)
    labels = _labels(function, name, logits, axes, labels)
    weight = class_weight(function, weight, classes)
    sample_weight = check_sample_weight(function, sample_weight, messages.batch_shape(logits, axes))
    class_mask, token_mask = masks(function, name, where, logits, axes)
    options = LossOptions(
        axes,
        classes,
        ignored(function, ignore_index, labels),
        reduction,
        check_empty_mean(function, empty_mean),
        messages.flag(function, "return_stats", return_stats),
        vocab_axes,
        token_axes,
    )
    temperature = token_temperature(
        function, temperature, messages.batch_shape(logits, axes), accumulator_dtype(logits.dtype)
    )
    arrays = TokenArrays(labels, weight, sample_weight, class_mask, token_mask, temperature)
    return arrays, options


def of_tokens(arrays: TokenArrays) -> dict[str, Any]:
    """What has an entry a token whatever the classes, by its argument's name."""
    labels = arrays.labels
    if isinstance(labels, TopKLabels):
        labels = labels.indices
    elif jnp.issubdtype(labels.dtype, jnp.floating):
        labels = None
    return {
        "labels": labels,
        "sample_weight": arrays.sample_weight,
        "where": arrays.token_mask,
        "temperature": arrays.temperature,
    }


def check_gamma(function: str, x: Any, dtype: Any) -> Any:
    return messages.scalar(function, "gamma", x, 0, sys.float_info.max, 2.0, dtype)


def scalars(
    function: str,
    dtype: Any,
    *,
    label_smoothing: Any = 0.0,
    z_loss: Any = 0.0,
    logit_softcap: Any = None,
    temperature: Any = 1.0,
) -> Scalars:
    """The numbers of a loss, checked. Arrays among them get the ``dtype``."""
    cap, temperature = scaling(function, logit_softcap, temperature, dtype)
    return Scalars(
        smoothing(function, label_smoothing, dtype),
        check_z_loss(function, z_loss, dtype),
        cap,
        temperature,
    )
