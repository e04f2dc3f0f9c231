"""Which schedule takes a product's loss, in chunks of how much, and whether a kernel runs in it."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxloss._checks import arguments, messages
from jaxloss._linear import budget
from jaxloss._linear.kernels import is_array
from jaxloss._linear.product import Product
from jaxloss._pallas import dispatch
from jaxloss._tokens import targets
from jaxloss._tokens.classes import is_indices, is_probabilities
from jaxloss._types import IMPLEMENTATIONS, LossOptions, Scalars, TokenArrays, TopKLabels

FEW = 16  # tokens a chunk, too few for products that read the whole kernel


class ProblemSize(NamedTuple):
    """What one device has of the product."""

    tokens: Any  # jax.export may leave it open
    features: int
    vocab: int  # columns of the kernel
    columns: int  # those of them that may be classes
    padded: bool  # which of these are no classes is not static: it depends on the device


class Plan(NamedTuple):
    by_tokens: bool
    chunk: int  # tokens, or classes
    fused: bool
    stored: bool


def choose(
    call: str,
    implementation: Any,
    chunk_size: Any,
    size: ProblemSize,
    product: Product,
    arrays: TokenArrays,
    options: LossOptions,
    scalars: Scalars,
    *,
    whole: bool,
) -> Plan:
    """Checked. ``whole``: no partitioner may split arrays."""
    bucket = getattr(arrays.labels, "rest", None) == "bucket"
    divided = scalars.divided or arrays.temperature is not None
    asked, dtype = (arrays, options, scalars), product.narrow
    chip = dispatch.product_kernel()
    by_rule = implementation is None and chunk_size is None
    stored = implementation == "stored_exponentials"
    by_rule |= stored
    wanted = chip if by_rule else implementation if implementation in dispatch.KERNELS else None
    several = product.heads is not None
    beyond = {"a kernel that is no array": not is_array(product.kernel) or several}
    beyond |= _beyond(*asked)
    beyond["label_smoothing"] &= not stored  # a sum over all classes, which no exponentials give
    refused = dispatch.product_refusals(wanted, dtype, beyond) if wanted else []
    # By its name it is taken where arrays may be split too: JAX then says that it cannot be.
    named = implementation in dispatch.KERNELS
    fused = wanted and not refused and not size.padded and (named or whole)
    sizes = size.tokens, size.features, size.vocab, size.columns
    fused = bool(wanted and fused and dispatch.fits_product(wanted, *sizes))
    tokens = budget.size_to_plan_for(size.tokens)
    rows = _rows(dtype, *asked, stored)
    name = implementation
    if name is None and fused and wanted == "mosaic_tpu":
        name = wanted
    elif name is None:
        few = budget.default_chunk(tokens, size.columns, rows=rows) < min(FEW, tokens)
        chunks_alone = bucket or divided or several
        name = "vocab_blocks" if few and not chunks_alone else "token_chunks"
    messages.word(call, "implementation", name, IMPLEMENTATIONS)
    if bucket and name == "vocab_blocks":
        rule = "labels with rest='bucket' need implementation='token_chunks'"
        messages.fail(call, rule, repr(name))
    if several and name not in ("token_chunks", "stored_exponentials"):
        rule = "a kernel of several heads needs implementation='token_chunks'"
        rule += "" if options.with_stats else " or 'stored_exponentials'"
        messages.fail(call, rule, repr(name))
    if divided and name == "vocab_blocks":
        rule = "a temperature that is an array needs implementation='token_chunks'"
        messages.fail(call, rule, repr(name), "Give a Python number, or leave implementation out.")
    if name in dispatch.KERNELS and refused:
        where = "a TPU" if name == "mosaic_tpu" else "a Hopper GPU"
        rule = f"implementation={name!r} takes class indices and bfloat16 operands on {where}"
        messages.fail(call, rule, ", ".join(refused), "Leave implementation out.")
    if stored:
        _check_stored(call, product, *asked)
    by_tokens = stored or name == "token_chunks"
    if by_tokens:
        most = tokens
        default = budget.default_chunk(tokens, size.columns, size.features, rows)
        if stored and fused:
            default = budget.default_stored_chunk(tokens, size.columns, size.features)
    else:
        most, default = size.columns, budget.default_block(tokens, size.columns)
    return Plan(by_tokens, arguments.chunk_size(call, chunk_size, default, most), fused, stored)


def _check_stored(
    call: str, product: Product, arrays: TokenArrays, options: LossOptions, scalars: Scalars
) -> None:
    smoothed = not targets.is_zero(scalars.label_smoothing)
    beyond = {
        "labels that are no class indices": not is_indices(arrays.labels),
        "label_smoothing with where over classes": smoothed and arrays.class_mask is not None,
        "label_smoothing with a soft cap": smoothed and scalars.softcap is not None,
        "a temperature that is an array": scalars.divided or arrays.temperature is not None,
        "statistics of each token's loss": options.with_stats and options.reduction == "none",
        "operands of float16": product.narrow == jnp.float16,
        "another number": _has_others(scalars),
    }
    refused = [what for what, here in beyond.items() if here]
    if refused:
        rule = "implementation='stored_exponentials' takes class indices"
        messages.fail(call, rule, ", ".join(refused), "Leave implementation out.")


def _rows(
    dtype: Any, arrays: TokenArrays, options: LossOptions, scalars: Scalars, stored: bool
) -> float:
    """What a token of a chunk holds."""
    return budget.rows_held(
        dtype,
        none=options.reduction == "none",
        probabilities=is_probabilities(arrays.labels),
        top=isinstance(arrays.labels, TopKLabels),
        weight=arrays.weight is not None,
        smoothing=not stored and not targets.is_zero(scalars.label_smoothing),
        mask=arrays.class_mask is not None,
        statistics=options.with_stats,
        scaling=scalars.rescaled or arrays.temperature is not None,
        stored=stored,
    )


def _beyond(arrays: TokenArrays, options: LossOptions, scalars: Scalars) -> dict[str, bool]:
    """What no kernel of a product has a form of, and whether the call asks for that."""
    # A kernel's parts are enough for z_loss.
    return {
        "labels that are no class indices": not is_indices(arrays.labels),
        "where over classes": arrays.class_mask is not None,
        "label_smoothing": not targets.is_zero(scalars.label_smoothing),
        "a soft cap or a temperature": scalars.rescaled or arrays.temperature is not None,
        "statistics": options.with_stats,
        "another number": _has_others(scalars),
    }


def _has_others(scalars: Scalars) -> bool:
    """Whether a number is asked for that no rule here names, so that it is refused too."""
    named = "label_smoothing", "z_loss", "softcap", "temperature"
    return not scalars._replace(**{name: getattr(Scalars(), name) for name in named}).plain
