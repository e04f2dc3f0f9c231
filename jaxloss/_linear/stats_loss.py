"""The statistics of a model's tokens and of a reference's beside them, a chunk at a time."""

import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from jaxloss._checks import arguments, axis_names, messages
from jaxloss._checks import reference as of_divergences
from jaxloss._linear import budget, layout, token_chunks, token_rules
from jaxloss._linear.named_reference import reference_stats
from jaxloss._linear.operands import product_of
from jaxloss._linear.product import Product, Sweep
from jaxloss._tokens.classes import local_classes
from jaxloss._tokens.losses import CONSTANT, MOVING, RANKS, in_two, of_two
from jaxloss._tokens.reduction import TokenWeights
from jaxloss._tokens.reference import beside, stats_of_logits
from jaxloss._tokens.shapes import flat_labels, rows_of_mask
from jaxloss._tokens.targets import make_targets, tokens_with_classes
from jaxloss._types import (
    LossOptions,
    Reference,
    ReferenceStats,
    Scalars,
    TokenArrays,
    TokenStats,
    TopKLabels,
)
from jaxloss._xla.device import jit
from jaxloss._xla.mesh import size as axis_size


class Prepared(NamedTuple):
    """The arguments of a call, checked."""

    products: tuple[Product, ...]  # the model's, and a reference's
    arrays: TokenArrays
    named: tuple[Array, ...]  # a reference's stored classes and probabilities
    kl_temperature: Array | None  # one entry a token
    own: tuple[Array, ...]  # what a loss of the caller's reads of each token
    numbers: tuple[Scalars, Scalars]  # see :func:`operands_of`
    options: LossOptions
    sweep: Sweep
    layout: layout.Layout | None

    @property
    def lead(self) -> tuple[int, ...]:
        return self.products[0].lead

    @property
    def wide(self) -> Any:
        return self.products[0].wide

    @property
    def static(self) -> dict[str, Any]:
        """Those of :func:`by_token_chunks`."""
        return {"sweep": self.sweep, "options": self.options}

    @property
    def of_device(self) -> tuple[Any, Any, Any, Any]:
        own = self.named, self.own, self.kl_temperature
        return self.products, self.arrays, own, self.numbers

    @property
    def compares(self) -> bool:
        """Whether there is a reference."""
        return len(self.products) > 1 or bool(self.named)


def prepared(
    call: str,
    product: Product,
    labels: Any,
    per_token: tuple,
    reference: Any,
    *,
    dtype: Any,
    kl_temperature: Any,
    beta: Any,
    num_classes: Any,
    temperature: Any,
    logit_softcap: Any,
    vocab_axis_name: Any,
    token_axis_name: Any,
    kernel_spec: Any,
    over: Any,
    chunk_size: Any,
    **of_tokens: Any,
) -> Prepared:
    """The arguments of the public function ``call``, as they were given except for the product.

    ``of_tokens`` are what ``token_loss`` of the checks takes.
    """
    hidden, wide = product.hidden, product.wide
    lead = product.lead
    names = axis_names.checked(
        call,
        hidden.ndim,
        token_axis_name=token_axis_name,
        vocab_axis_name=vocab_axis_name,
        kernel_spec=kernel_spec,
        over=over,
    )
    vocab_axes, token_axes = names.vocab_axes, names.token_axes
    named: tuple[Any, ...] = ()
    if isinstance(reference, TopKLabels):
        named, reference = _named(call, reference, lead), None
    other, its_cap = _reference(call, reference, product, dtype, logit_softcap)
    products = [product] if other is None else [product, other]
    few, most_columns = (f(p.columns for p in products) for f in (min, max))
    if num_classes is None and few != most_columns:
        rule = "the kernel and the reference's must have as many columns"
        got = " and ".join(str(p.columns) for p in products)
        way_out = "If one of them is padded, say how many are classes: num_classes=..."
        messages.fail(call, rule, got, way_out)
    # On all devices: which columns are padding is not static where they are split.
    every = few * axis_size(vocab_axes)
    classes = messages.integer(call, "num_classes", num_classes, 0, every, default=every)
    local = few if vocab_axes else classes
    arrays, options = arguments.token_loss(
        call,
        "hidden @ kernel",
        jax.ShapeDtypeStruct((*lead, local), product.narrow),
        labels,
        axis=-1,
        num_classes=classes,
        vocab_axes=vocab_axes,
        token_axes=token_axes,
        return_stats=True,
        temperature=temperature,
        **of_tokens,
    )
    scalars = arguments.scalars(call, wide, logit_softcap=logit_softcap, temperature=temperature)
    arguments.check_bucket(call, arrays, scalars)
    compares = other is not None or bool(named)
    of_token, of_reference = of_divergences.numbers(
        call,
        scalars,
        its_cap,
        arrays.temperature,
        kl_temperature,
        beta,
        lead,
        wide,
        compares=compares,
    )
    own = arguments.per_token(call, per_token, lead)
    rows_of_tokens = {"hidden": hidden, **arguments.of_tokens(arrays)}
    rows_of_tokens |= {f"per_token[{i}]": x for i, x in enumerate(own)}
    split = {"vocab_axes": vocab_axes, "token_axes": token_axes}
    for name, p in zip(("kernel", "the reference's kernel"), products, strict=False):
        axis_names.check_split(call, name, p.kernel, rows_of_tokens, **split)
    rows_of_tokens |= {"reference.indices": named[0]} if named else {}
    rows_of_tokens["kl_temperature"] = of_token
    found = layout.of_call(call, names, products, (arrays, named, of_token, own))
    tokens = product.tokens
    if found is not None:
        tokens //= found.devices(found.token_axes)
        vocab_axes = (*vocab_axes, *found.vocab_axes)
        token_axes = (*token_axes, *found.token_axes)
        local = found.columns(products[0]) if found.vocab_axes else local
        most_columns = max(found.columns(p) for p in products)
    if vocab_axes and len({p.columns for p in products}) > 1:
        rule = "the kernel and the reference's must have as many columns where devices share them"
        got = " and ".join(str(p.columns) for p in products)
        messages.fail(call, rule, got, "Pad one of them, and say num_classes=...")
    token_axes = token_axes if options.reduction != "none" else ()
    options = options._replace(vocab_axes=vocab_axes, token_axes=token_axes)
    block = budget.block_of_rows(most_columns, bool(vocab_axes))
    rows = budget.rows_held(
        product.narrow,
        in_blocks=block is not None,
        none=options.reduction == "none",
        statistics=True,
        mask=arrays.class_mask is not None,
        scaling=scalars.rescaled or arrays.temperature is not None,
    )
    if other is not None and block is None:
        rows += budget.OF_DIVERGENCE["forward"]
    most = budget.size_to_plan_for(tokens)
    default = budget.default_chunk(most, most_columns, rows=rows)
    chunk = arguments.chunk_size(call, chunk_size, default, most)
    return Prepared(
        tuple(replace(p, num_classes=local) for p in products),
        arrays,
        named,
        of_token,
        own,
        (scalars, of_reference),
        options,
        Sweep(chunk, vocab_axes, token_axes, block=block),
        found,
    )


def _reference(
    call: str, given: Any, product: Product, dtype: Any, cap: float | None
) -> tuple[Product | None, float | None]:
    """The reference's product, without a gradient, and its soft cap."""
    if given is None:
        return None, None
    if isinstance(given, tuple) and len(given) in (2, 3):
        bias = given[2] if len(given) == 3 else None
        own = {"bias": bias, "vocab_axis": product.vocab_axis - 2, "logit_softcap": cap}
        given = Reference(*given[:2], **own)
    elif not isinstance(given, Reference):
        rule = "reference must be (hidden, kernel), (hidden, kernel, bias), a jaxloss.Reference or "
        rule += "jaxloss.TopKLabels"
        messages.fail(call, rule, type(given).__name__, kind=TypeError)
    own = product_of(
        call,
        given.hidden,
        given.kernel,
        given.bias,
        given.vocab_axis,
        dtype=dtype,
        precision=product.precision,
        of="reference.",
    )
    lead = product.lead
    if own.lead != lead:
        rule = f"reference.hidden must have hidden's leading shape, {lead}"
        messages.fail(call, rule, messages.describe(own.hidden))
    cap, _ = arguments.scaling(call, given.logit_softcap, 1.0, own.narrow)
    return lax.stop_gradient(own), cap


def _named(call: str, given: TopKLabels, lead: tuple[int, ...]) -> tuple[Array, Array]:
    """What is stored of a reference."""
    labels = of_divergences.stored(call, "hidden @ kernel", lead, given)
    return lax.stop_gradient((cast(Array, labels.indices), cast(Array, labels.probabilities)))


def of_mesh(given: Prepared) -> tuple[tuple, tuple]:
    """``given.of_device`` for a ``shard_map`` over the layout, and the specs."""
    found = cast(layout.Layout, given.layout)
    arrays, of_arrays = layout.of_arrays(given.arrays, found, given.products)
    products, of_operands = layout.of_products(given.products, found)
    specs = of_operands, of_arrays, P(*found.tokens), P()
    return (products, arrays, *given.of_device[2:]), specs


def operands_of(
    products: tuple[Product, ...],
    arrays: TokenArrays,
    own: tuple[tuple, tuple, Any],
    numbers: tuple[Scalars, Scalars],
    options: LossOptions,
) -> tuple[token_chunks.Operands, Any, TokenWeights]:
    """``(operands, args_of, weights)`` of the tokens of one device.

    ``args_of(logits, per_token, shared)`` are the arguments of a loss for a chunk. ``own``: what is
    stored of a reference, what the caller's loss reads, a kl_temperature a token. ``numbers`` are
    those of the model; and the reference's soft cap with the beta of the divergences and the
    temperature of its entropy and of the divergences.
    """
    product, *others = products
    reference = others[0] if others else None
    classes_of = partial(local_classes, options.num_classes, vocab_axes=options.vocab_axes)
    lead, dtype = product.lead, product.wide
    tokens, classes = math.prod(lead), classes_of(product.num_classes)
    # A chunk has none of the tokens that are left no class: its mask may be as it is.
    token_mask = tokens_with_classes(arrays.class_mask, arrays.token_mask, lead, classes)
    of_all = arrays._replace(class_mask=None, token_mask=token_mask)
    weights = make_targets(of_all, classes, dtype, options.ignore_index).weights
    mask_rows, mask_index = rows_of_mask(arrays.class_mask, lead)
    labels, tree = flat_labels(arrays.labels, lead)
    temperature = None if arrays.temperature is None else arrays.temperature.reshape(tokens)
    named, own_of_loss, kl = jax.tree.map(lambda x: x.reshape(tokens, *x.shape[len(lead) :]), own)
    count = len(labels)
    # A loop's rule outlives this trace: what it reads of the scalars comes with its operands.
    given, of_numbers = jax.tree.flatten(numbers)

    def args_of(x, per_token, shared):
        t = None
        if reference is not None:
            t, *per_token = per_token
        labels, (index, temperature, kl, *own) = per_token[:count], per_token[count:]
        mask, *given = shared
        mask = mask if index is None else mask[index]
        scalars, of_reference = of_numbers.unflatten(given)
        labels = tree.unflatten(labels)
        arrays = TokenArrays(labels, class_mask=mask, temperature=temperature)
        # Counted anew: traced values must not leak into the loop that this runs in.
        here = classes_of(x.shape[-1])
        of_model = stats_of_logits(x, arrays, scalars, here, options, dtype)
        stored, own = own[: len(named)], own[len(named) :]
        if stored:
            of_labels = TopKLabels(*stored, rest="bucket"), mask, kl
            of_both = of_reference._replace(softcap=scalars.softcap)
            found = reference_stats(x, *of_labels, of_both, here, options.ignore_index)
        elif t is None:
            return of_model, *own
        else:
            found = beside(x, t, arrays, kl, (scalars, of_reference), here, options, dtype)
        return of_model, found, *own

    operands = token_chunks.Operands(
        product.flat(),
        (*labels, mask_index, temperature, kl, *named, *own_of_loss),
        (mask_rows, *given),
        None if reference is None else reference.flat(),
    )
    return operands, args_of, weights


def types_of(n: int, dtype: Any, with_reference: bool) -> tuple:
    """Those of the statistics of n tokens."""

    def some():
        number, whole = jnp.zeros((n,), dtype), jnp.zeros((n,), jnp.int32)
        integers = ("prediction", "rank")
        stats = TokenStats(*(whole if f in integers else number for f in TokenStats._fields))
        reference = ReferenceStats(*(number for _ in ReferenceStats._fields))
        return (stats, reference) if with_reference else (stats,)

    return jax.eval_shape(some)


@jit
def by_token_chunks(products, arrays, own, numbers, *, sweep, options):
    """``(TokenStats, ReferenceStats)`` of all tokens, differentiable."""
    operands, args_of, weights = operands_of(products, arrays, own, numbers, options)
    lead, valid = weights.valid.shape, weights.valid

    def loss_fn(x, per_token, shared):
        stats, reference = args_of(x, per_token, shared)
        moving, constant = in_two(stats)
        return (*moving, *reference[2:]), (*constant, *reference[:2])

    found = token_rules.by_token(loss_fn, sweep, operands, valid)
    moving, others = (tuple(x.reshape(lead) for x in part) for part in found)
    first, few = len(MOVING), len(CONSTANT)
    stats = of_two(moving[:first], others[:few])
    none = {name: jnp.where(valid, getattr(stats, name), -1) for name in RANKS}
    return stats._replace(**none), ReferenceStats(*others[few:], *moving[first:])


@jit
def over_mesh(products, arrays, own, numbers, *, prepared):
    """:func:`by_token_chunks` inside of ``shard_map``. ``prepared``: without arrays."""
    names = "named", "own", "kl_temperature"
    of_tokens = {"arrays": arrays, **dict(zip(names, own, strict=True))}
    given = prepared._replace(products=products, numbers=numbers, **of_tokens)
    arrays_of_mesh, specs = of_mesh(given)

    schedule = partial(by_token_chunks, **given.static)
    rows = P(*given.layout.tokens)
    return layout.run(schedule, given.layout, arrays_of_mesh, specs, (rows, rows))


def token_stats(call: str, given: Prepared) -> tuple[TokenStats, ReferenceStats]:
    layout.warn_if_shared(call, given.products[0], given.sweep.chunk, given.layout)
    if given.layout is not None:
        of_tokens = {"arrays": TokenArrays(None), "named": (), "own": (), "kl_temperature": None}
        without = given._replace(products=(), numbers=(), **of_tokens)
        return over_mesh(*given.of_device, prepared=without)
    return by_token_chunks(*given.of_device, **given.static)
