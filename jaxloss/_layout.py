"""Products on an explicit mesh: the operands' types say what is split over what."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from jaxloss import _check, _mesh
from jaxloss._jit import jit
from jaxloss._labels import TopKLabels


class Layout(NamedTuple):
    """Which mesh axes split what."""

    mesh: Any
    tokens: tuple  # of hidden's leading axes, each None, a name or names
    kernel: tuple  # of kernel's axes
    vocab_axis: int
    vocab_axes: _mesh.Axes
    gathered: tuple[tuple[int, _mesh.Axes], ...]
    columns: int  # of the kernel on each device, once gathered

    @property
    def token_axes(self) -> _mesh.Axes:
        return tuple(name for entry in self.tokens for name in _names(entry))

    def devices(self, axes: _mesh.Axes) -> int:
        return _devices(self.mesh, axes)


def _devices(mesh: Any, axes: _mesh.Axes) -> int:
    return math.prod(mesh.shape[name] for name in axes)


def _names(entry: Any) -> _mesh.Axes:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _spec(x: Array) -> tuple:
    spec = tuple(jax.typeof(x).sharding.spec)
    return (*spec, *(None,) * (x.ndim - len(spec)))


def of_types(call: str, hidden: Array, kernel: Array, vocab_axis: int) -> Layout | None:
    """What the types of the operands say; None: they are not sharded."""
    *tokens, features = _spec(hidden)
    of_kernel = _spec(kernel)
    if not any((*tokens, features, *of_kernel)):
        return None
    way_out = "Reshard it: jax.reshard(x, spec)."
    if features is not None:
        rule = "hidden must not be sharded in its last axis on an explicit mesh"
        _check.fail(call, rule, f"{jax.typeof(hidden)}", way_out)
    mesh = next(m for x in (hidden, kernel) if not (m := jax.typeof(x).sharding.mesh).empty)
    own = {name for entry in tokens for name in _names(entry)}
    vocab: _mesh.Axes = ()
    gathered = []
    for axis, entry in enumerate(of_kernel):
        names = _names(entry)
        last = tuple(n for n in names if n in own)
        first = tuple(n for n in names if n not in own)
        if (first and axis != vocab_axis) or names != (*first, *last):
            rule = (
                "the kernel's features may be sharded over axes that split the tokens, its columns "
                "over others and then over those"
            )
            got = f"hidden {jax.typeof(hidden)}, kernel {jax.typeof(kernel)}"
            _check.fail(call, rule, got, way_out)
        vocab = first or vocab
        if last:
            gathered.append((axis, last))
    columns = kernel.shape[vocab_axis] // _devices(mesh, vocab)
    return Layout(mesh, tuple(tokens), of_kernel, vocab_axis, vocab, tuple(gathered), columns)


def refuse(call: str, hidden: Array, kernel: Array, vocab_axis: int, of: str = "") -> None:
    """Sharded operands of an explicit mesh; ``of`` goes before each of their names."""
    if of_types(call, hidden, kernel, vocab_axis) is not None:
        got = f"{of}hidden {jax.typeof(hidden)}, {of}kernel {jax.typeof(kernel)}"
        way_out = "Call it inside of shard_map: jax.shard_map(loss, in_specs=..., out_specs=...)."
        _check.fail(call, "operands of an explicit mesh must not be sharded", got, way_out)


# Under jit, so that what is called eagerly is compiled once.
@jit
def over_mesh(
    arrays: tuple,
    *,
    schedule: Callable,
    layout: Layout,
    static: tuple[tuple[str, Any], ...],
) -> Any:
    """``schedule(*arrays, **static)`` inside ``shard_map``, arrays split as the layout says."""
    hidden, kernel, bias, labels, weight, sample_weight, class_mask, token_mask, scalars = arrays
    tokens, vocab = layout.tokens, layout.vocab_axes or None

    def padded(x):  # the kernel's columns divide among the devices, the classes need not
        width = kernel.shape[layout.vocab_axis] - x.shape[-1]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width)])

    probabilities = not isinstance(labels, TopKLabels) and labels.ndim == hidden.ndim
    if probabilities:
        labels = padded(labels)
    if class_mask is not None and class_mask.shape[-1] > 1:
        class_mask = padded(class_mask)
    arrays = (hidden, kernel, bias, labels, weight, sample_weight, class_mask, token_mask, scalars)
    of_mask = P()
    if class_mask is not None:
        split = zip((*tokens, vocab), class_mask.shape, strict=True)
        of_mask = P(*(None if n == 1 else entry for entry, n in split))
    rows = P(*tokens)
    specs = (
        P(*tokens, None),
        P(*layout.kernel),
        P(vocab),
        P(*tokens, vocab) if probabilities else rows,
        P(),
        rows,
        of_mask,
        rows,
        P(),
    )
    arrays = tuple(
        jax.tree.map(lambda a, s=spec: jax.reshard(a, jax.NamedSharding(layout.mesh, s)), x)
        for x, spec in zip(arrays, specs, strict=True)
    )
    named = dict(static)
    out = rows if named["reduction"] == "none" else P()
    return jax.shard_map(
        partial(schedule, **named),
        mesh=layout.mesh,
        in_specs=specs,
        out_specs=(out, rows) if named["options"].with_stats else out,
    )(*arrays)
