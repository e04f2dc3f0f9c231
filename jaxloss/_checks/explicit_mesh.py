"""Arrays on an explicit mesh: their types say what is split over what.

JAX refuses an operation of arrays that are split in different ways, and a rule for gradients whose
cotangent is split otherwise than its primal. So the arguments of a call are first split alike.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from jaxloss._checks import messages
from jaxloss._types import Axes, LossOptions, Scalars, TokenArrays, TopKLabels
from jaxloss._xla import nested
from jaxloss._xla.device import jit
from jaxloss._xla.mesh import manual_axes


class Layout(NamedTuple):
    """Which mesh axes split what."""

    mesh: Any
    tokens: tuple  # of hidden's leading axes, each None, a name or names
    kernel: tuple  # of kernel's axes
    vocab_axis: int
    vocab_axes: Axes
    gathered: tuple[tuple[int, Axes], ...]
    columns: int  # of the kernel on each device, once gathered

    @property
    def token_axes(self) -> Axes:
        return tuple(name for entry in self.tokens for name in _names(entry))

    def devices(self, axes: Axes) -> int:
        return _devices(self.mesh, axes)


def _devices(mesh: Any, axes: Axes) -> int:
    return math.prod(mesh.shape[name] for name in axes)


def _names(entry: Any) -> Axes:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _spec(x: Array) -> tuple:
    spec = tuple(jax.typeof(x).sharding.spec)
    return (*spec, *(None,) * (x.ndim - len(spec)))


def is_split(xs: Any) -> bool:
    """Whether any array of a tree is split over the devices of an explicit mesh."""
    return any(entry is not None for x in jax.tree.leaves(xs) for entry in _spec(x))


def _resharded(x: Any, mesh: Any, entries: Iterable) -> Any:
    """The arrays of a tree, split as the entries say. A gradient is split as its array was."""

    def one(x):
        # An axis of one entry is broadcast: there is nothing to split.
        spec = tuple(e if n != 1 else None for e, n in zip(entries, x.shape, strict=True))
        return x if spec == _spec(x) else jax.reshard(x, jax.NamedSharding(mesh, P(*spec)))

    entries = tuple(entries)
    return jax.tree.map(one, x)


def aligned(*arrays: tuple[Any, tuple], flat: tuple[int, ...] = ()) -> list:
    """The arrays of a call, split alike over an explicit mesh; as they are where none is split.

    Each comes with the common axis that each of its axes is, None for one that is not to be split.
    The first array that is split along common axes says how all of them are. Of the axes ``flat``,
    which will be made one, the first takes what splits any: the others' parts would not be in one
    piece. Where it does not divide among so many devices, none of them stays split.
    """
    if not is_split([x for x, _ in arrays]):
        return [x for x, _ in arrays]
    entries, sizes, mesh = {}, {}, None
    for xs, axes in arrays:
        for x in jax.tree.leaves(xs):
            found = dict(zip(axes, _spec(x), strict=True))
            found = {axis: e for axis, e in found.items() if None not in (axis, e)}
            entries = entries or found
            sizes |= {a: n for a, n in zip(axes, x.shape, strict=True) if sizes.get(a, 1) == 1}
            if mesh is None and is_split(x):
                mesh = jax.typeof(x).sharding.mesh
    if len(flat) > 1:
        names = tuple(name for axis in flat for name in _names(entries.pop(axis, None)))
        first, *_ = flat
        if names and sizes[first] % _devices(mesh, names) == 0:
            entries[first] = names
    return [_resharded(x, mesh, (entries.get(a) for a in axes)) for x, axes in arrays]


def as_split(x: Array, like: Array) -> Array:
    """``x``, split as ``like``, of its shape."""
    return _resharded(x, jax.typeof(x).sharding.mesh, _spec(like)) if is_split((x, like)) else x


def aligned_tokens(
    logits: Array, axes: tuple[int, ...], arrays: TokenArrays
) -> tuple[Array, TokenArrays]:
    """``(logits, arrays)``, split alike."""
    labels, weight, sample_weight, class_mask, token_mask = arrays
    every = tuple(range(logits.ndim))
    rows = tuple(i for i in every if i not in axes)
    of_labels = rows
    if isinstance(labels, TopKLabels):
        of_labels = (*rows, None)
    elif labels.ndim == logits.ndim:
        of_labels = every
    logits, *some = aligned(
        (logits, every),
        (labels, of_labels),
        (weight, (None,)),
        (sample_weight, rows),
        (class_mask, every),
        (token_mask, rows),
        flat=axes,
    )
    return logits, TokenArrays(*some)


def of_types(
    call: str, hidden: Array, kernel: Array, vocab_axis: int, bias: Any, arrays: TokenArrays
) -> Layout | None:
    """What the types of the arrays say; None: none of them is sharded."""
    every = hidden, kernel, bias, arrays
    if not is_split(every):
        return None
    *tokens, features = _spec(hidden)
    of_kernel = _spec(kernel)
    way_out = "Reshard it: jax.reshard(x, spec)."
    if features is not None:
        rule = "hidden must not be sharded in its last axis on an explicit mesh"
        messages.fail(call, rule, f"{jax.typeof(hidden)}", way_out)
    split = next(x for x in jax.tree.leaves(every) if is_split(x))
    mesh = jax.typeof(split).sharding.mesh
    if not any(tokens):
        tokens = _other_split(mesh, hidden, of_kernel, vocab_axis, arrays)
    own = {name for entry in tokens for name in _names(entry)}
    vocab: Axes = ()
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
            messages.fail(call, rule, got, way_out)
        vocab = first or vocab
        if last:
            gathered.append((axis, last))
    columns = kernel.shape[vocab_axis] // _devices(mesh, vocab)
    return Layout(mesh, tuple(tokens), of_kernel, vocab_axis, vocab, tuple(gathered), columns)


def _other_split(
    mesh: Any, hidden: Array, of_kernel: tuple, vocab_axis: int, arrays: TokenArrays
) -> list:
    """How to split the tokens of a ``hidden`` that is the same on all devices: as other arrays of
    theirs are, or over what splits the kernel's features, but not over what splits its columns."""
    labels, _, sample_weight, class_mask, token_mask = arrays
    rank, columns = hidden.ndim - 1, _names(of_kernel[vocab_axis])
    for x in jax.tree.leaves((labels, sample_weight, token_mask, class_mask)):
        found = [None if {*_names(e)} & {*columns} else e for e in _spec(x)[:rank]]
        if any(found):
            return found
    features = of_kernel[1 - vocab_axis]
    divides = rank and hidden.shape[0] % _devices(mesh, _names(features)) == 0
    return [features if divides and i == 0 else None for i in range(rank)]


def refuse(call: str, **arrays: Any) -> None:
    """Arrays that are split over the devices of an explicit mesh, by name."""
    found = [f"{name} {jax.typeof(x)}" for name, x in arrays.items() if is_split(x)]
    if found:
        way_out = "Call it inside of shard_map: jax.shard_map(loss, in_specs=..., out_specs=...)."
        if manual := manual_axes():
            way_out = f"Name these axes too in the shard_map around it, which is over {manual}."
        rule = "operands of an explicit mesh must not be sharded"
        messages.fail(call, rule, ", ".join(found), way_out)


def _placed(xs: Any, mesh: Any, specs: Any) -> Any:
    """The arrays of a tree, split as a prefix of that tree says."""

    def of_prefix(spec, some):
        return jax.tree.map(lambda x: jax.reshard(x, jax.NamedSharding(mesh, spec)), some)

    return jax.tree.map(of_prefix, specs, xs, is_leaf=lambda x: isinstance(x, P))


# Under jit, so that what is called eagerly is compiled once.
@jit
def over_mesh(
    product: Any,
    arrays: TokenArrays,
    scalars: Scalars,
    *,
    schedule: Callable,
    layout: Layout,
    sweep: Any,
    options: LossOptions,
    fused: bool,
) -> Any:
    """``schedule`` of these inside ``shard_map``, arrays split as the layout says."""
    labels, class_mask = arrays.labels, arrays.class_mask
    tokens, vocab = layout.tokens, layout.vocab_axes or None
    columns = product.kernel.shape[layout.vocab_axis]

    def padded(x):  # the kernel's columns divide among the devices, the classes need not
        width = columns - x.shape[-1]
        if width:
            x = _resharded(x, layout.mesh, (*_spec(x)[:-1], None))
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width)])

    probabilities = not isinstance(labels, TopKLabels) and labels.ndim == product.hidden.ndim
    if probabilities:
        labels = padded(labels)
    if class_mask is not None and class_mask.shape[-1] > 1:
        class_mask = padded(class_mask)
    arrays = arrays._replace(labels=labels, class_mask=class_mask)
    of_mask = P()
    if class_mask is not None:
        split = zip((*tokens, vocab), class_mask.shape, strict=True)
        of_mask = P(*(None if n == 1 else entry for entry, n in split))
    rows = P(*tokens)
    of_labels = P(*tokens, vocab) if probabilities else rows
    specs = (
        replace(product, hidden=P(*tokens, None), kernel=P(*layout.kernel), bias=P(vocab)),
        TokenArrays(of_labels, P(), rows, of_mask, rows),
        P(),
    )
    given = product, arrays, scalars
    given = tuple(_placed(x, layout.mesh, spec) for x, spec in zip(given, specs, strict=True))
    out = rows if options.reduction == "none" else P()
    out = (out, rows) if options.with_stats else out
    schedule = partial(schedule, sweep=sweep, options=options, fused=fused)
    if not manual_axes():
        return jax.shard_map(schedule, mesh=layout.mesh, in_specs=specs, out_specs=out)(*given)
    # The axes that the surrounding shard_map leaves out.
    return nested.shard_map(schedule, specs, out)(*given)
