"""What the operands of ``hidden @ kernel + bias`` must be."""

from typing import Any

from jax import Array, lax

from jaxloss._checks import arguments, messages
from jaxloss._types import LowRankKernel, QuantizedKernel, is_low_rank, is_quantized
from jaxloss._xla.dtypes import accumulator_dtype


def product_operands(
    function: str, hidden: Any, kernel: Any, bias: Any, vocab_axis: Any, dtype: Any, of: str = ""
) -> tuple[Array, Any, Array | None, int, Any]:
    """Checked: hidden, kernel, bias, the vocab axis, and the dtype that the products cast them to
    (None: they have it). ``of`` goes before each of their names."""
    hidden = messages.floating(function, f"{of}hidden", hidden)
    kernel, base = _kernel(function, f"{of}kernel", kernel, f"{of}hidden, {of}kernel")
    if hidden.ndim == 0:
        messages.fail(function, f"{of}hidden must be [..., D]", messages.describe(hidden))
    if base.ndim not in (2, 3):
        rule = f"{of}kernel must be [D, V], [V, D] with {of}vocab_axis=0, or of K heads [K, D, V]"
        messages.fail(function, rule, messages.describe(base))
    name_of, heads = f"{of}vocab_axis", base.shape[:-2]
    axes = messages.class_axes(function, base, f"{of}kernel", vocab_axis, name_of=name_of)
    if len(axes) != 1:
        messages.fail(function, f"{name_of} must be one axis", f"{vocab_axis}")
    vocab_axis = axes[0] - len(heads)
    if vocab_axis < 0:
        messages.fail(function, f"{name_of} of several heads must be -1 or -2", f"{axes[0]}")
    if heads and (hidden.ndim < 2 or hidden.shape[-2] not in (1, *heads)):
        rule = f"{of}hidden must be [..., K, D] or [..., 1, D] for K = {heads[0]} heads"
        got = f"{of}hidden {messages.describe(hidden)}, {of}kernel {messages.describe(base)}"
        messages.fail(function, rule, got)
    size, columns = base.shape[-2:][1 - vocab_axis], base.shape[-2:][vocab_axis]
    if hidden.shape[-1] != size:
        other = 1 - vocab_axis - 2 * len(heads)
        way_out = f"For a kernel of this shape set {name_of}={other}."
        messages.fail(
            function,
            f"{of}kernel must have {of}hidden's last dimension, D = {hidden.shape[-1]}, at axis "
            f"{other}",
            f"{of}hidden {messages.describe(hidden)}, {of}kernel {messages.describe(base)}",
            way_out if hidden.shape[-1] == columns else "",
        )
    narrow = _dtype_of_products(function, dtype, hidden, kernel, of)
    wide = accumulator_dtype(narrow or hidden.dtype)
    kernel = _fitted(function, f"{of}kernel", kernel, (*heads, size, columns), wide)
    if bias is not None:
        bias = messages.floating(function, f"{of}bias", bias)
        rule = f"one entry a column of {of}kernel"
        messages.shape(function, f"{of}bias", bias, (*heads, columns), rule)
    return hidden, kernel, bias, vocab_axis, narrow


_FEW_BITS = ("int4", "int8", "float8_e4m3fn", "float8_e5m2")


def _kernel(function: str, name: str, given: Any, order: str) -> tuple[Any, Array]:
    """The kernel, of arrays, and the array whose shape it has. What is frozen has no gradient."""
    if is_low_rank(given):
        if is_low_rank(given.kernel):
            rule = f"{name}.kernel must be an array or a jaxloss.QuantizedKernel"
            messages.fail(function, rule, "a LowRankKernel", kind=TypeError)
        frozen, base = _kernel(function, f"{name}.kernel", given.kernel, order)
        a, b = (messages.floating(function, f"{name}.{n}", getattr(given, n)) for n in "ab")
        return LowRankKernel(lax.stop_gradient(frozen), a, b, given.scale), base
    if not is_quantized(given):
        kernel = messages.floating(function, name, given, order=order)
        return kernel, kernel
    values = messages.array(function, f"{name}.values", given.values)
    if values.dtype.name not in _FEW_BITS:
        rule = f"{name}.values must be one of {', '.join(_FEW_BITS)}"
        messages.fail(function, rule, messages.describe(values), kind=TypeError)
    scale = messages.floating(function, f"{name}.scale", given.scale)
    return lax.stop_gradient(QuantizedKernel(values, scale)), values


def _fitted(function: str, name: str, kernel: Any, size: tuple[int, ...], wide: Any) -> Any:
    """The kernel, whose parts fit its ``size``, ``[D, V]`` or ``[K, D, V]``: an update's scale is
    part of its ``a``, in the ``wide`` dtype of the sums, and a scale a column is ``[V]``, or
    ``[K, V]``."""
    *heads, features, columns = size
    of_heads = f"[{heads[0]}, " if heads else "["
    if is_low_rank(kernel):
        a, b = kernel.a, kernel.b
        rank = a.shape[-1:]
        if a.shape != (*heads, features, *rank) or b.shape != (*heads, *rank, columns):
            rule = f"{name}.a and {name}.b must be {of_heads}D, r] and {of_heads}r, V], "
            got = f"{messages.describe(a)} and {messages.describe(b)}"
            way_out = "They are so whatever vocab_axis is."
            messages.fail(function, f"{rule}D = {features}, V = {columns}", got, way_out)
        limits = arguments.FINITE
        scale = messages.scalar(function, f"{name}.scale", kernel.scale, *limits, 1.0, wide)
        a = a if isinstance(scale, float) and scale == 1 else a.astype(wide) * scale
        return LowRankKernel(_fitted(function, f"{name}.kernel", kernel.kernel, size, wide), a, b)
    if not is_quantized(kernel):
        return kernel
    scale, lead = kernel.scale, tuple(heads)
    in_groups = scale.ndim == len(size)
    groups = scale.shape[-2] if in_groups else 1
    wrong = scale.shape not in ((*lead, columns), (*lead, groups, columns)) or not groups
    if wrong or features % groups:
        rule = f"{name}.scale must be {of_heads}V], {of_heads}1, V] or {of_heads}G, V]"
        rule = f"{rule}, V = {columns}, G a divisor of D = {features}"
        transposed = in_groups and groups == columns
        way_out = "It has the columns last whatever vocab_axis is: scale.T." if transposed else ""
        messages.fail(function, rule, messages.describe(scale), way_out)
    scale = scale.reshape(*lead, columns) if groups == 1 else scale
    return QuantizedKernel(kernel.values, scale)


def _dtype_of_products(function: str, dtype: Any, hidden: Array, kernel: Any, of: str) -> Any:
    """What the operands are cast to; None: they all have the dtype already."""
    own = {f"{of}hidden": hidden}
    if is_low_rank(kernel):
        own |= {f"{of}kernel.a": kernel.a, f"{of}kernel.b": kernel.b}
        kernel = kernel.kernel
    if not is_quantized(kernel):
        own[f"{of}kernel"] = kernel
    if dtype is None:
        if len({x.dtype for x in own.values()}) > 1:
            rule = f"{' and '.join(own)} must have one dtype"
            got = " and ".join(str(x.dtype) for x in own.values())
            way_out = "Say what the products compute in: dtype=jnp.bfloat16."
            messages.fail(function, rule, got, way_out, TypeError)
        return None
    dtype = messages.floating_dtype(function, "dtype", dtype)
    return None if all(x.dtype == dtype for x in own.values()) else dtype
