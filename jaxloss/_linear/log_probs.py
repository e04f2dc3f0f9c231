"""Log-probabilities of ``hidden @ kernel``, a chunk of tokens at a time: named, likeliest, sampled.

Letters: n tokens of a chunk, C classes.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._linear import token_chunks, token_rules
from jaxloss._numerics import log_probs
from jaxloss._numerics.logits import Logits, over_temperature, scaling_of
from jaxloss._numerics.parts import Rows
from jaxloss._numerics.rows import row_losses
from jaxloss._tokens.classes import (
    Classes,
    anywhere,
    class_indices,
    column_of,
    existing,
    local_classes,
)
from jaxloss._tokens.losses import divided_rows, temperature_of
from jaxloss._tokens.shapes import rows_of_mask
from jaxloss._types import Scalars, TokenArrays
from jaxloss._xla.device import jit


def named(
    rows: log_probs.Differences,
    indices: Array,
    classes: Classes,
    ignore_index: int | None,
    return_rest: bool,
) -> tuple[Array, ...]:
    """The log-probabilities of ``indices[..., k]``, and of all other classes together."""
    index, taken = class_indices(indices, classes.total, ignore_index)
    wrong = index >= classes.total
    column = column_of(jnp.where(taken & ~wrong, index, classes.total), classes)
    found = log_probs.log_probs_at(rows, column, classes.axes)
    found = jnp.where(wrong, jnp.nan, jnp.where(taken, found, -jnp.inf))
    some = jnp.any(taken, axis=-1)
    found = (jnp.where(some[..., None], found, 0),)
    if return_rest:
        rest = log_probs.log_prob_of_others(rows, column, classes.axes)
        rest = jnp.where(jnp.any(wrong, axis=-1), jnp.nan, rest)
        found = (*found, jnp.where(some, rest, 0))
    return found


def likeliest(logits: Logits, temperature: Any, classes: Classes, k: int) -> tuple[Array, Array]:
    """The k most likely classes; -100 in place of one that does not exist."""
    index, d = log_probs.top_k(logits, k, classes.start, classes.axes)
    if isinstance(temperature, Array):
        d = over_temperature(d, temperature)
        logits, _ = divided_rows(logits, temperature, classes.axes)
    rest = row_losses(Rows(logits), ("lse_above_max",), classes.axes).lse_above_max
    found = d - rest[..., None]
    return jnp.where(found == -jnp.inf, -100, index), found


def sampled(
    rows: log_probs.Differences, place: Array, key: Array, classes: Classes, count: int
) -> tuple[Array, Array]:
    """``count`` samples of each row, ``[..., count]``; ``place[...]`` is its token's number."""
    keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(place)

    def once(i):
        own = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)
        of_all = (classes.total,)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, of_all, rows.d.dtype, mode="high"))(own)
        if classes.axes or classes.size != classes.total:
            # Of each class the same whatever the columns here: those past C have probability 0.
            noise = jnp.pad(noise, ((0, 0), (0, classes.size)))
            noise = lax.dynamic_slice_in_dim(noise, classes.start, classes.size, axis=1)
        return log_probs.sample(rows, noise, classes.start, classes.axes)

    found = lax.map(once, jnp.arange(count, dtype=jnp.int32))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), found)


def logits_of(x: Array, arrays: TokenArrays, scalars: Scalars, classes: Classes) -> Logits:
    """Rows of logits, of which ``arrays`` say the classes that exist."""
    scaling = scaling_of(scalars.softcap, scalars.temperature)
    return Logits(x, existing(arrays.class_mask, classes, x.ndim), scaling)


def rows_of(x: Array, arrays: TokenArrays, scalars: Scalars, classes: Classes) -> Any:
    """The differences of :func:`logits_of`."""
    logits = logits_of(x, arrays, scalars, classes)
    return log_probs.differences(logits, temperature_of(arrays, scalars), classes.axes)


@jit
def by_token_chunks(product, arrays, scalars, own, *, sweep, options, kind, impl):
    """``kind``: ``("named", ignore_index, return_rest)``, ``("likeliest", k)`` or
    ``("sampled", count)``. ``own``: the indices; nothing; the tokens' numbers and the key's data,
    of the ``impl``."""
    lead, tokens = product.lead, math.prod(product.lead)
    mask_rows, mask_index = rows_of_mask(arrays.class_mask, lead)
    numbers, of_scalars = jax.tree.flatten(scalars)
    of_tokens, shared = own
    of_tokens = [x.reshape(tokens, *x.shape[len(lead) :]) for x in of_tokens]
    temperature = None if arrays.temperature is None else arrays.temperature.reshape(tokens)
    name, *rest = kind

    def loss_fn(x, per_token, given):
        index, temperature, *own = per_token
        mask, *numbers = given
        numbers, shared = numbers[: of_scalars.num_leaves], numbers[of_scalars.num_leaves :]
        mask = mask if index is None else mask[index]
        # Counted anew: traced values must not leak into the loop that this runs in.
        classes = local_classes(options.num_classes, x.shape[-1], sweep.vocab_axes)
        here = TokenArrays(None, class_mask=mask, temperature=temperature)
        given = x, here, of_scalars.unflatten(numbers), classes
        if name == "likeliest":
            logits, own_temperature = logits_of(*given), temperature_of(here, given[2])
            return (), lax.stop_gradient(likeliest(logits, own_temperature, classes, *rest))
        rows = rows_of(*given)
        if name == "named":
            (indices,), (ignore_index, return_rest) = own, rest
            return named(rows, indices, classes, ignore_index, return_rest), ()
        (place,), key = own, jax.random.wrap_key_data(shared[0], impl=impl)
        return (), lax.stop_gradient(sampled(rows, place, key, classes, *rest))

    valid = jnp.ones(lead, bool)
    if name == "named":
        valid = jnp.any(class_indices(own[0][0], options.num_classes, rest[0])[1], axis=-1)
    if arrays.class_mask is not None:
        some = jnp.any(arrays.class_mask, axis=-1)
        valid &= jnp.broadcast_to(anywhere(some, sweep.vocab_axes), lead)
    operands = token_chunks.Operands(
        product.flat(),
        (mask_index, temperature, *of_tokens),
        (mask_rows, *numbers, *shared),
    )
    losses, others = token_rules.by_token(loss_fn, sweep, operands, valid)
    found = tuple(x.reshape(*lead, *x.shape[1:]) for x in (*losses, *others))
    if name != "named":  # of a token without classes
        index, of_it = found
        some = valid.reshape(*lead, 1)
        found = jnp.where(some, index, -100), jnp.where(some, of_it, -jnp.inf)
    return found
