"""How a product's operands are split over a mesh, and the ``shard_map`` that takes them so.

On an explicit mesh the types of the arrays say what is split over what. On any mesh a caller may
name the axes. Automatic axes that nobody names stay with XLA's partitioner: where they are known to
split sequences, the tokens are put in the devices' order for it.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxloss._checks import axis_names, messages
from jaxloss._checks.explicit_mesh import devices_along, is_split, names_of, resharded, spec_of
from jaxloss._linear import kernels
from jaxloss._linear.kernels import base_of
from jaxloss._linear.product import Product
from jaxloss._types import Axes, LossOptions, Scalars, TokenArrays
from jaxloss._xla import mesh, nested
from jaxloss._xla.device import jit

# What trainers call the axes of a mesh that split sequences, and those that split a batch of them.
SEQUENCES = {"context", "cp", "seq", "sequence", "sp"}
BATCHES = {"batch", "data", "dp", "fsdp", "replica"}


class Layout(NamedTuple):
    """Which mesh axes split what. ``kernels`` and ``gathered`` have an entry a product."""

    mesh: Any
    axes: Axes  # of the shard_map
    whole: bool  # whether these are all axes of the mesh
    tokens: tuple  # of hidden's leading axes, each None, a name or names
    vocab_axes: Axes
    kernels: tuple[tuple, ...]  # of each kernel's axes
    gathered: tuple[tuple[tuple[int, Axes], ...], ...]  # what splits the tokens and a kernel
    # Into how many parts a partitioner has split each of hidden's leading axes. Where there are
    # any, the partitioner splits the rest too, without a shard_map.
    parts: tuple[int, ...] = ()

    @property
    def token_axes(self) -> Axes:
        return () if self.parts else tuple(n for entry in self.tokens for n in names_of(entry))

    def devices(self, axes: Axes) -> int:
        return devices_along(self.mesh, axes)

    def columns(self, product: Product) -> int:
        """On each device, once the kernel is gathered."""
        return product.columns // self.devices(self.vocab_axes)


def of_call(
    call: str,
    names: axis_names.AxisNames,
    products: Sequence[Product],
    arrays: Any,
    whole_rows: bool = False,
) -> Layout | None:
    """What the types of the arrays and the names say; None: nothing is split, or a partitioner
    decides.

    ``arrays``: what else has a row a token. ``whole_rows``: no device may have some columns alone.
    """
    typed = [x for x in jax.tree.leaves((products, arrays)) if is_split(x)]
    if not typed and not names.asked:
        parts = _parts(products, arrays)
        return _of_partitioner(products, parts) if any(n > 1 for n in parts) else None
    over = jax.typeof(typed[0]).sharding.mesh if typed else names.mesh
    tokens = _tokens(call, names, over, products, arrays)
    if tokens and tokens[-1] and any(p.heads is not None for p in products):
        rule = "the heads' axis of hidden must not be split"
        got = f"hidden {messages.describe(products[0].hidden)} split as {P(*tokens, None)}"
        messages.fail(call, rule, got, "Reshard it, or name what splits the tokens alone.")
    own = {name for entry in tokens for name in names_of(entry)}
    vocab_axis = products[0].vocab_axis  # kernel_spec speaks of the first kernel

    def of_kernels(vocab_axes):
        each = [_kernel(call, names, p, vocab_axis, vocab_axes, own) for p in products]
        pairs = zip(products, each, strict=True)
        return each, [_columns_and_gathered(call, *pair, own) for pair in pairs]

    kernels, found = of_kernels(names.of_vocab)
    vocab_axes = next((vocab for vocab, _ in found if vocab), ())
    if any(vocab == () for vocab, _ in found):
        # A kernel that is the same on all devices is split as the other one.
        kernels, found = of_kernels(vocab_axes)
    if any(vocab != vocab_axes for vocab, _ in found):
        got = ", ".join(f"{jax.typeof(base_of(p.kernel))}" for p in products)
        messages.fail(call, "the columns of both kernels must be split alike", got)
    if names.of_vocab and names.of_vocab != vocab_axes:
        rule = "kernel_spec must split the columns over vocab_axis_name"
        messages.fail(call, rule, f"{vocab_axes} and {names.of_vocab}")
    if vocab_axes and whole_rows:
        rule = "the kernel's columns must not be split, except over axes that split the tokens"
        way_out = "loss_fn sees whole rows: gather the kernel, or split it over the tokens' axes."
        messages.fail(call, rule, f"columns that are split over {vocab_axes}", way_out)
    for of, product, entries in zip(("", "teacher_"), products, kernels, strict=False):
        _check_divides(call, f"{of}hidden", product.hidden, (*tokens, None), over)
        _check_divides(
            call, f"{of}kernel", base_of(product.kernel), _of_all(product, entries), over
        )
    named = {*own, *(n for entries in kernels for e in entries for n in names_of(e))}
    axes, whole = _axes_of_shard_map(over, named)
    gathered = tuple(gathered for _, gathered in found)
    return Layout(over, axes, whole, tuple(tokens), vocab_axes, tuple(kernels), gathered)


def of_pairs(
    call: str, names: axis_names.AxisNames, x: Array, y: Sequence[Array], beside: Sequence[Any]
) -> Layout | None:
    """As :func:`of_call`, of pairs: the rows of all arrays are split alike, and nothing else."""
    arrays = (x, *y, *(v for v in beside if v is not None))
    typed = [v for v in arrays if is_split(v)]
    if not typed and not names.asked:
        return None
    over = jax.typeof(typed[0]).sharding.mesh if typed else names.mesh
    entry = None if names.of_tokens is None else names.of_tokens[0]
    if names.of_tokens is None:
        for name, v in (("x", x), *(("y", v) for v in y)):
            if _spread(v)[1] is not None:
                rule = f"{name} must not be sharded in its last axis on an explicit mesh"
                way_out = "Reshard it: jax.reshard(x, spec). Or name what splits the pairs: "
                way_out += "token_axis_name=... gathers the features."
                messages.fail(call, rule, f"{jax.typeof(v)}", way_out)
        entry = next((e for v in arrays if (e := spec_of(v)[0]) is not None), None)
    for name, v in (("x", x), *(("y", v) for v in y)):
        _check_divides(call, name, v, (entry, None), over)
    axes, whole = _axes_of_shard_map(over, {*names_of(entry)})
    return Layout(over, axes, whole, (entry,), (), (), ())


def _devices_of_chunks(over: Any, rows: Any, chunk: int) -> int:
    """The devices along the automatic axes of a mesh, where ``rows`` take several chunks; otherwise
    1."""
    if over is None or not isinstance(rows, int) or chunk >= rows:
        return 1
    return devices_along(over, _axes_of(over, AxisType.Auto))


def warn_of_pairs(call: str, x: Array, pairs: Any, chunk: int) -> None:
    """Warns where XLA's partitioner would let each device compute the similarities of all."""
    devices = _devices_of_chunks(mesh.of_arrays(x), pairs, chunk)
    if devices > 1:
        text = f"{call}: of pairs that are split over the {devices} devices of this mesh, each "
        text += "device computes all similarities. Name the axes: token_axis_name=..."
        warnings.warn(text, stacklevel=2)


def warn_if_shared(call: str, product: Product, chunk: int, found: Layout | None) -> None:
    """Warns where XLA's partitioner lets each device compute the tokens of others: because of the
    numbers of tokens, of a chunk and of a sequence."""
    if not _left_to_partitioner(found):
        return
    over, tokens = mesh.of_arrays(product), product.tokens
    devices = _devices_of_chunks(over, tokens, chunk)
    if devices == 1:
        return
    if math.gcd(tokens, chunk, devices) < devices:
        rule = f"{tokens} tokens in chunks of {chunk} do not divide among the {devices} devices"
        way_out = "that share them, which then compute each other's tokens. Name the axes that "
        way_out += "split the tokens: token_axis_name=..., or take multiples of the devices."
        warnings.warn(f"{call}: {rule} {way_out}", stacklevel=2)
    # What :func:`_parts` cannot split though it knows its axes, as of hidden[:, :-1].
    sequences, length = _sequences_of(over), _length(product)
    parts = devices_along(over, sequences)
    if isinstance(length, int) and length > parts and length % parts:
        rule = f"sequences of {length} tokens do not divide among the {parts} devices along "
        way_out = "which then compute each other's tokens. Pad them, or keep their last token: "
        way_out += "jaxloss.next_token_labels ignores it."
        warnings.warn(f"{call}: {rule}{sequences}, {way_out}", stacklevel=2)


def warn_of_blocks(call: str, product: Product, block: int, found: Layout | None) -> None:
    """Warns where XLA's partitioner lets each device compute the columns of others: a block is cut
    out of a kernel that is gathered before. Axes that split tokens, by their names, do not count:
    there each device computes all columns of its own tokens."""
    over = mesh.of_arrays(product)
    if over is None or block >= product.columns or not _left_to_partitioner(found):
        return
    names = tuple(n for n in over.axis_names if n in _axes_of(over, AxisType.Auto))
    others = _of_several((n for n in names if n not in SEQUENCES | BATCHES), over)
    if others:
        text = f"{call}: where axes of this mesh split the kernel's columns, as {others} may, each "
        text += "device computes blocks of all columns. Name the axes: vocab_axis_name=..., "
        text += "token_axis_name=..., or take implementation='token_chunks'."
        warnings.warn(text, stacklevel=2)


def warn_of_top_k(call: str, product: Product, chunk: int, found: Layout | None) -> None:
    """Warns where XLA's partitioner, which splits no top k, gathers the logits of each chunk."""
    if not _left_to_partitioner(found):
        return
    devices = _devices_of_chunks(mesh.of_arrays(product), product.tokens, chunk)
    if devices > 1:
        text = f"{call}: where the {devices} devices of this mesh split the tokens or the columns, "
        text += "the logits of each chunk are gathered. Name the axes: token_axis_name=..., "
        text += "vocab_axis_name=..."
        warnings.warn(text, stacklevel=2)


def _left_to_partitioner(found: Layout | None) -> bool:
    return found is None or bool(found.parts)


def _length(product: Product) -> Any:
    """Tokens of a sequence, the second axis of hidden; None: it has no such axis."""
    lead = _lead(product)
    return lead[1] if len(lead) > 1 else None


def _lead(product: Product) -> tuple:
    """The tokens' axes of hidden, without that of heads."""
    return product.lead[: len(product.lead) - (product.heads is not None)]


def _parts(products: Sequence[Product], arrays: Any) -> tuple[int, ...]:
    """Into how many parts automatic axes have split each of hidden's leading axes but the first, so
    far as the call can know. The sharding of an array that is not traced says so. Of a traced array
    the names of the mesh's axes say so alone, and of the second axis alone, the sequence."""
    product, hidden = products[0], products[0].hidden
    lead = _lead(product)[1:]
    if not lead:
        return ()
    if not isinstance(hidden, Tracer):
        over, spec = (getattr(hidden.sharding, name, None) for name in ("mesh", "spec"))
        return tuple(devices_along(over, names_of(e)) for e in tuple(spec or ())[1 : 1 + len(lead)])
    over = mesh.of_arrays((products, arrays))
    found = _sequences_of(over)
    devices = devices_along(over, found)
    divides = isinstance(lead[0], int) and lead[0] % devices == 0
    return (devices if divides else 1,)


def _sequences_of(over: Any) -> Axes:
    """The axes of a mesh that split sequences, by their names."""
    if over is None:
        return ()
    automatic = _axes_of(over, AxisType.Auto)
    return tuple(n for n in over.axis_names if n in automatic & SEQUENCES)


def _of_partitioner(products: Sequence[Product], parts: tuple[int, ...]) -> Layout:
    rank, none = products[0].hidden.ndim - 1, tuple(() for _ in products)
    parts = (1, *parts, *(1 for _ in range(rank - 1 - len(parts))))
    kernels = tuple((None, None) for _ in products)
    return Layout(None, (), False, (P.UNCONSTRAINED,) * rank, (), kernels, none, parts)


def _tokens(
    call: str, names: axis_names.AxisNames, over: Any, products: Sequence[Product], arrays: Any
) -> list:
    hidden = products[0].hidden
    if names.of_tokens is not None:
        return list(names.of_tokens)
    for product in products:
        *tokens, _ = spec_of(product.hidden)
        if _spread(product.hidden)[-1] is not None:
            rule = "hidden must not be sharded in its last axis on an explicit mesh"
            way_out = "Reshard it: jax.reshard(x, spec). Or name what splits the tokens: "
            way_out += "token_axis_name=... gathers the features."
            messages.fail(call, rule, f"{jax.typeof(product.hidden)}", way_out)
        if any(tokens):
            return tokens
    # A hidden that is the same on all devices is split as other arrays of the tokens are, or over
    # what splits the kernel's features, but not over what splits its columns.
    first = products[0]
    of_kernel, rank = _spec_of_kernel(call, first), hidden.ndim - 1
    columns = {*names_of(of_kernel[first.vocab_axis]), *names.of_vocab}
    split = rank - any(p.heads is not None for p in products)  # heads are never split
    for x in jax.tree.leaves(arrays):
        found = [None if {*names_of(e)} & columns else e for e in spec_of(x)[:split]]
        found += [None] * (rank - split)
        if any(found):
            return found
    features = of_kernel[1 - first.vocab_axis]
    divides = split and hidden.shape[0] % devices_along(over, names_of(features)) == 0
    return [features if divides and i == 0 else None for i in range(rank)]


def _spread(x: Array) -> tuple:
    """``spec_of``, without axes of one device: they split nothing, whatever they are named for."""
    over = jax.typeof(x).sharding.mesh
    return tuple(_of_several(names_of(e), over) or None for e in spec_of(x))


def _of_several(names: Iterable[str], over: Any) -> Axes:
    """Those of the axes that have several devices."""
    return tuple(n for n in names if over.shape[n] > 1)


def _spec_of_kernel(call: str, product: Product) -> tuple:
    """What splits the two axes of a head's kernel."""
    *heads, rows, columns = _spread(base_of(product.kernel))
    if any(heads):
        rule = "the heads of a kernel must not be split"
        messages.fail(call, rule, f"{jax.typeof(base_of(product.kernel))}", "Reshard it.")
    return rows, columns


def _kernel(
    call: str,
    names: axis_names.AxisNames,
    product: Product,
    vocab_axis: int,
    vocab_axes: Axes,
    own: set,
) -> tuple:
    """What splits the axes of a kernel. ``vocab_axis``: of the one that kernel_spec speaks of;
    ``vocab_axes``: what is to split the columns, if anything."""
    if names.of_kernel is not None:
        asked = {*names.of_vocab}
        some = tuple(
            tuple(n for n in names_of(e) if n in asked or _of_several((n,), names.mesh)) or None
            for e in names.of_kernel
        )
        return some if product.vocab_axis == vocab_axis else some[::-1]
    entries = list(_spec_of_kernel(call, product))
    if vocab_axes:
        before = names_of(entries[product.vocab_axis])
        kept = (n for n in before if n in own and n not in vocab_axes)
        entries[product.vocab_axis] = (*vocab_axes, *kept)
    return tuple(entries)


def _of_all(product: Product, entries: tuple) -> tuple:
    """Of the axes of all heads, what splits those of one."""
    return entries if product.heads is None else (None, *entries)


def _columns_and_gathered(call: str, product: Product, entries: tuple, own: set) -> tuple:
    """(what splits the columns for good, what is gathered of each axis)."""
    vocab: Axes = ()
    gathered = []
    for axis, entry in enumerate(entries):
        names = names_of(entry)
        last = tuple(n for n in names if n in own)
        first = tuple(n for n in names if n not in own)
        if (first and axis != product.vocab_axis) or names != (*first, *last):
            rule = (
                "the kernel's features may be sharded over axes that split the tokens, its columns "
                "over others and then over those"
            )
            got = f"kernel {messages.describe(base_of(product.kernel))} split as {P(*entries)}, "
            got += f"tokens over {tuple(sorted(own))}"
            messages.fail(call, rule, got, "Reshard it: jax.reshard(x, spec).")
        vocab = first or vocab
        if last:
            gathered.append((axis, last))
    return vocab, tuple(gathered)


def _check_divides(call: str, name: str, x: Array, entries: tuple, over: Any) -> None:
    for axis, entry in enumerate(entries):
        size, names = x.shape[axis], names_of(entry)
        parts = devices_along(over, names)
        if isinstance(size, int) and size % parts:
            rule = f"axis {axis} of {name} must divide among the {parts} devices along {names}"
            messages.fail(call, rule, messages.describe(x), "Pad it, or split it over fewer.")


def _axes_of(over: Any, kind: AxisType) -> set[str]:
    return {n for n, k in zip(over.axis_names, over.axis_types, strict=True) if k == kind}


def _axes_of_shard_map(over: Any, named: set) -> tuple[Axes, bool]:
    """(the axes, whether they are all that are left)."""
    left = [n for n in over.axis_names if n not in mesh.manual_axes()]
    axes = [n for n in left if n in named | _axes_of(over, AxisType.Explicit)]
    # Along the axis of one device there is nothing to leave to a partitioner.
    if devices_along(over, left) == devices_along(over, axes):
        axes = left
    return tuple(axes), axes == left


def run(function: Callable, layout: Layout, given: tuple, specs: tuple, out: Any) -> Any:
    """``function(*given)`` inside of ``shard_map``, arrays split as ``specs`` say, a prefix of the
    tree of ``given``."""
    if layout.parts:
        return _in_parts(function, layout.parts, given, specs, out)
    if AxisType.Explicit in layout.mesh.axis_types:
        given = tuple(_placed(x, layout.mesh, s) for x, s in zip(given, specs, strict=True))
    if mesh.manual_axes():  # those that the surrounding shard_map leaves out
        return nested.shard_map(function, layout.axes, specs, out)(*given)
    options = {"mesh": layout.mesh, "axis_names": {*layout.axes}}
    return jax.shard_map(function, in_specs=specs, out_specs=out, **options)(*given)


def _in_parts(
    function: Callable, parts: tuple[int, ...], given: tuple, specs: tuple, out: Any
) -> Any:
    """``function(*given)``, of tokens in the order of the devices that share their sequences: the
    parts are an axis, before all others. So each group of neighbours is one device's
    (:mod:`packing`), and a partitioner has nothing to send.

    A transpose serves where a ``shard_map`` would be refused: under ``with mesh:`` arrays may be on
    one device, and ``vmap(spmd_axis_name=...)`` may split a batch over an axis of the mesh.
    """
    split = [axis for axis, n in enumerate(parts) if n > 1]

    def parts_first(x):
        for done, axis in enumerate(split[::-1]):
            at, n = done + axis, x.shape[done + axis]
            own = 1 if n == 1 else parts[axis]  # an axis of one entry is broadcast
            x = jnp.moveaxis(x.reshape(*x.shape[:at], own, n // own, *x.shape[at + 1 :]), at, 0)
        return x

    def parts_back(x):
        for left, axis in zip(range(len(split))[::-1], split, strict=True):
            x, at = jnp.moveaxis(x, 0, left + axis), left + axis
            x = x.reshape(*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :])
        return x

    def each(move, specs, xs):
        def of_prefix(spec, some):
            return jax.tree.map(move, some) if P.UNCONSTRAINED in spec else some

        return jax.tree.map(of_prefix, specs, xs, is_leaf=lambda x: isinstance(x, P))

    return each(parts_back, out, function(*each(parts_first, specs, given)))


def _placed(xs: Any, over: Any, specs: Any) -> Any:
    """The arrays of a tree, split as a prefix of that tree says, so far as types can say it."""
    typed = _axes_of(over, AxisType.Explicit)

    def explicit(entry):
        return tuple(n for n in names_of(entry) if n in typed) or None

    def of_prefix(spec, some):
        spec = P(*map(explicit, spec))
        return jax.tree.map(lambda x: jax.reshard(x, jax.NamedSharding(over, spec)), some)

    return jax.tree.map(of_prefix, specs, xs, is_leaf=lambda x: isinstance(x, P))


def of_products(products: Iterable[Product], layout: Layout) -> tuple[tuple, tuple]:
    """The products, each with what is gathered of its kernel, and their specs."""
    tokens, vocab = layout.tokens, layout.vocab_axes or None
    each = tuple(
        replace(p, gathered=gathered) for p, gathered in zip(products, layout.gathered, strict=True)
    )
    specs = tuple(
        replace(
            p,
            hidden=P(*tokens, None),
            kernel=kernels.specs(p.kernel, _of_all(p, entries), p.vocab_axis, layout.vocab_axes),
            bias=P(*_of_all(p, (vocab,))),
        )
        for p, entries in zip(each, layout.kernels, strict=True)
    )
    return each, specs


def of_arrays(
    arrays: TokenArrays, layout: Layout, products: Sequence[Product]
) -> tuple[TokenArrays, TokenArrays]:
    """The arrays, with what is of classes padded to the columns, and their specs."""
    labels, class_mask = arrays.labels, arrays.class_mask
    tokens, vocab = layout.tokens, layout.vocab_axes or None
    columns = products[0].columns

    def padded(x):  # the kernel's columns divide among the devices, the classes need not
        width = columns - x.shape[-1]
        if width and is_split(x):
            x = resharded(x, layout.mesh, (*spec_of(x)[:-1], None))
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width)])

    probabilities = isinstance(labels, Array) and labels.ndim == products[0].hidden.ndim
    if probabilities:
        labels = padded(labels)
    if class_mask is not None and class_mask.shape[-1] > 1:
        class_mask = padded(class_mask)
    of_mask = P()
    if class_mask is not None:
        split = zip((*tokens, vocab), class_mask.shape, strict=True)
        of_mask = P(*(None if n == 1 else entry for entry, n in split))
    rows = P(*tokens)
    of_labels = P(*tokens, vocab) if probabilities else rows
    specs = TokenArrays(of_labels, P(), rows, of_mask, rows, rows)
    return arrays._replace(labels=labels, class_mask=class_mask), specs


# Under jit, so that what is called eagerly is compiled once.
@jit
def over_mesh(
    products: tuple[Product, ...],
    arrays: TokenArrays,
    scalars: Scalars,
    *,
    schedule: Callable,
    layout: Layout,
    options: LossOptions,
    static: tuple,
) -> Any:
    """``schedule(*products, arrays, scalars)`` inside ``shard_map``, arrays split as the layout
    says; ``static``: pairs of its other arguments."""
    arrays, of_tokens = of_arrays(arrays, layout, products)
    products, of_operands = of_products(products, layout)
    rows = P(*layout.tokens)
    out = rows if options.reduction == "none" else P()
    out = (out, rows) if options.with_stats else out
    schedule = partial(schedule, options=options, **dict(static))
    specs = (*of_operands, of_tokens, P())
    return run(schedule, layout, (*products, arrays, scalars), specs, out)
