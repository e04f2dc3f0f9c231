"""What a loss of statistics sees of a chunk: the model's, and a reference's beside them."""

import math
from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._linear import token_chunks
from jaxloss._linear.product import Product
from jaxloss._numerics.divergence import row_divergences
from jaxloss._numerics.logits import Logits, scaling_of
from jaxloss._tokens.classes import existing, local_classes
from jaxloss._tokens.losses import rows_of_logits, temperature_of, token_losses
from jaxloss._tokens.reduction import TokenWeights
from jaxloss._tokens.shapes import flat_labels, rows_of_mask
from jaxloss._tokens.targets import make_targets, tokens_with_classes
from jaxloss._types import (
    DIVERGENCES,
    LossOptions,
    ReferenceStats,
    Scalars,
    TokenArrays,
    TokenStats,
)
from jaxloss._xla.dtypes import accumulator_dtype


def operands_of(
    product: Product,
    reference: Product | None,
    arrays: TokenArrays,
    own_arrays: tuple,
    numbers: tuple[Scalars, Scalars],
    options: LossOptions,
    beta: float,
) -> tuple[token_chunks.Operands, Any, TokenWeights]:
    """``(operands, args_of, weights)`` of the tokens of one device.

    ``args_of(logits, per_token, shared)`` are the arguments of a loss for a chunk. ``numbers`` are
    those of the model; and the reference's soft cap with the temperature of its entropy and of the
    divergences.
    """
    classes_of = partial(local_classes, options.num_classes, vocab_axes=options.vocab_axes)
    lead, dtype = product.hidden.shape[:-1], accumulator_dtype(product.hidden.dtype)
    tokens, classes = math.prod(lead), classes_of(product.num_classes)
    # A chunk has none of the tokens that are left no class: its mask may be as it is.
    token_mask = tokens_with_classes(arrays.class_mask, arrays.token_mask, lead, classes)
    of_all = arrays._replace(class_mask=None, token_mask=token_mask)
    weights = make_targets(of_all, classes, dtype, options.ignore_index).weights
    mask_rows, mask_index = rows_of_mask(arrays.class_mask, lead)
    labels, tree = flat_labels(arrays.labels, lead)
    temperature = None if arrays.temperature is None else arrays.temperature.reshape(tokens)
    count = len(labels)
    # A loop's rule outlives this trace: what it reads of the scalars comes with its operands.
    given, of_numbers = jax.tree.flatten(numbers)

    def flat(product: Product) -> Product:
        hidden = product.hidden
        return replace(product, hidden=hidden.reshape(tokens, hidden.shape[-1]))

    def stats(x, arrays, scalars):
        targets = make_targets(arrays, classes_of(x.shape[-1]), dtype, options.ignore_index)
        scaling = scaling_of(scalars.softcap, scalars.temperature)
        logits = Logits(x, scaling=scaling, pallas_bytes=4)
        rows_of = rows_of_logits(logits, temperature_of(arrays, scalars))
        return cast(TokenStats, token_losses(rows_of, targets, arrays, options, scalars, dtype)[1])

    def args_of(x, per_token, shared):
        t = None
        if reference is not None:
            t, *per_token = per_token
            t = lax.stop_gradient(t)
        labels, (index, temperature, *own) = per_token[:count], per_token[count:]
        mask, *given = shared
        mask = mask if index is None else mask[index]
        scalars, of_reference = of_numbers.unflatten(given)
        labels = tree.unflatten(labels)
        arrays = TokenArrays(labels, class_mask=mask, temperature=temperature)
        of_model = stats(x, arrays, scalars)
        if t is None:
            return of_model, *own
        its_own = scalars._replace(softcap=of_reference.softcap)
        log_prob = stats(t, arrays, its_own).log_prob
        entropy = stats(t, arrays._replace(temperature=None), of_reference).entropy
        # Counted anew: traced values must not leak into the loop that this runs in.
        here = classes_of(x.shape[-1])
        pair = _capped(x, scalars.softcap), _capped(t, of_reference.softcap)
        compared = (
            row_divergences(
                *pair,
                existing(mask, here, 2),
                divergence=divergence,
                beta=beta,
                temperature=of_reference.temperature,
                axes=here.axes,
            )
            for divergence in DIVERGENCES
        )
        without = lax.stop_gradient((log_prob, entropy))
        return of_model, ReferenceStats(*without, *compared), *own

    operands = token_chunks.Operands(
        flat(product),
        (*labels, mask_index, temperature, *own_arrays),
        (mask_rows, *given),
        None if reference is None else flat(reference),
    )
    return operands, args_of, weights


def _capped(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * jnp.tanh(x / cap)


def types_of(n: int, dtype: Any, with_reference: bool) -> tuple:
    """Those of the statistics of n tokens."""

    def some():
        number, whole = jnp.zeros((n,), dtype), jnp.zeros((n,), jnp.int32)
        integers = ("prediction", "rank")
        stats = TokenStats(*(whole if f in integers else number for f in TokenStats._fields))
        reference = ReferenceStats(*(number for _ in ReferenceStats._fields))
        return (stats, reference) if with_reference else (stats,)

    return jax.eval_shape(some)
