"""linear_cross_entropy by its two schedules: from checked arguments to the loss."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._linear import packing as _packing
from jaxloss._linear import product_kernel, token_chunks, token_rules, vocab_blocks
from jaxloss._tokens import targets as _targets
from jaxloss._tokens.classes import classes_here, existing, weight_here
from jaxloss._tokens.losses import rows_of_logits, token_terms
from jaxloss._tokens.reduction import reduce_losses, token_weights
from jaxloss._tokens.shapes import flat_labels, rows_of_mask
from jaxloss._types import TokenStats
from jaxloss._xla import indexing, mesh
from jaxloss._xla.device import jit
from jaxloss._xla.dtypes import accumulator_dtype

INTEGERS = ("prediction", "rank")  # of TokenStats: -1 where a token does not count


@jit
def by_token_chunks(
    hidden, kernel, bias, labels, weight, sample_weight, class_mask, token_mask, scalars,
    *, geometry, num_classes, reduction, empty_mean, scaling, fused, options,
):  # fmt: skip
    classes = classes_here(num_classes, geometry.num_classes, geometry.vocab_axes)
    lead, wide = hidden.shape[:-1], accumulator_dtype(hidden.dtype)
    # A chunk has none of the tokens that are left no class: its mask may be as it is.
    token_mask = _targets.tokens_with_classes(class_mask, token_mask, lead, classes)
    targets = _targets.make_targets(
        labels,
        classes,
        wide,
        weight=weight,
        sample_weight=sample_weight,
        token_mask=token_mask,
        ignore_index=options.ignore_index,
    )
    mask_rows, mask_index = rows_of_mask(class_mask, lead)
    scalar, with_stats = reduction != "none", options.with_stats

    def loss_fn(x, per_token, shared):
        *labels, index = per_token
        weight, mask, *numbers = shared
        scalars = of_scalars.unflatten(numbers)
        mask = mask if index is None else mask[index]
        # Counted anew: traced values must not leak into the loop that this runs in.
        classes = classes_here(num_classes, x.shape[-1], geometry.vocab_axes)
        losses, stats, _ = token_terms(
            rows_of_logits(x, scaling, scalars.temperature, kernel_bytes=4), classes,
            tree.unflatten(labels), weight, mask, dtype=wide, options=options, scalars=scalars,
        )  # fmt: skip
        if stats is None:
            return (losses,), ()
        return ((losses,), tuple(stats)) if scalar else ((losses, *stats[:3]), stats[3:])

    def value(operands, packing):
        # Where nothing is differentiated: all chunks' tokens at once, their logits held nowhere.
        labels, _ = (_packing.taken(x, packing.order) for x in operands.per_token)

        def rows_of(targets, classes, _mask, _weight, _smoothing, want, _predict):
            hidden = _packing.taken(operands.hidden, packing.order)
            of_rows = operands._replace(hidden=hidden), targets.kept, packing.size
            return product_kernel.row_losses(geometry, *of_rows, want), None, None

        weight, _, *numbers = operands.shared
        losses, *_ = token_terms(
            rows_of, classes, labels, weight, None, dtype=wide, options=options,
            scalars=of_scalars.unflatten(numbers),
        )  # fmt: skip
        blank = mesh.varying(jnp.zeros(tokens, wide), mesh.varies_over(losses))
        return (_packing.put_back(packing.order, blank, losses),), ()

    tokens, (labels, tree) = math.prod(lead), flat_labels(labels, lead)
    numbers, of_scalars = jax.tree.flatten(scalars)
    operands = token_chunks.Operands(
        hidden.reshape(tokens, hidden.shape[-1]),
        kernel,
        bias,
        (*labels, mask_index),
        (weight, mask_rows, *numbers),
    )
    weights = token_weights(
        targets, sample_weight, reduction, wide, geometry.token_axes, empty_mean
    )
    given = geometry, operands, targets.counts, weights, scalar
    loss, stats = token_rules.reduced(loss_fn, *given, value if fused else None)
    if not with_stats:
        return loss
    stats = TokenStats(*(v.reshape(lead) for v in stats))
    none = {name: jnp.where(targets.counts, getattr(stats, name), -1) for name in INTEGERS}
    return loss, stats._replace(**none)


@jit
def by_vocab_blocks(
    hidden, kernel, bias, labels, weight, sample_weight, class_mask, token_mask, scalars,
    *, geometry, num_classes, reduction, empty_mean, scaling, fused, options,
):  # fmt: skip
    axes = geometry.vocab_axes
    size, block = geometry.num_classes, geometry.chunk
    classes = classes_here(num_classes, size, axes, block)
    lead, wide = hidden.shape[:-1], accumulator_dtype(hidden.dtype)
    tokens = math.prod(lead)
    token_mask = _targets.tokens_with_classes(class_mask, token_mask, lead, classes)
    mask, mask_row = rows_of_mask(class_mask, lead)
    some = None if mask is None else _targets.rows_with_classes(mask, classes)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (mask.shape[0], classes.size))
    labels, tree = flat_labels(labels, lead)
    labels = tree.unflatten(labels)
    sample_weight, token_mask = (
        None if x is None else x.reshape(tokens) for x in (sample_weight, token_mask)
    )
    rows = hidden.reshape(tokens, hidden.shape[-1])
    exists = existing(mask, classes, 2)
    masked = sample_weight is not None or token_mask is not None
    all_count = options.ignore_index is None and not masked

    def rows_of(targets, classes, _, weight, label_smoothing, want, predict):
        # Gradients of what no token owns are summed over the devices after the loop, not in it.
        varies = mesh.varies_over((rows, kernel, bias, labels))
        weight = weight_here(weight, classes)
        weight, kept = mesh.varying((weight, targets.kept), varies)
        counts = targets.counts if fused and not all_count else None
        probabilities = targets.probabilities
        weighed = probabilities is not None and weight is not None
        asked = targets.counts if masked and weighed else None
        if isinstance(label_smoothing, Array):  # a block's own factor must be static
            if probabilities is not None:
                probabilities = probabilities.astype(wide) * (1 - label_smoothing)
            label_smoothing = 0.0
        return vocab_blocks.row_losses_by_block(
            vocab_blocks.Options(geometry, label_smoothing, scaling, want, predict, wide, fused),
            vocab_blocks.Operands(
                # 0 * NaN is NaN: a token that does not count must not reach d_kernel.
                jnp.where(targets.counts[:, None], rows, 0),
                kernel,
                bias,
                probabilities,
                weight,
                mesh.varying(indexing.of_rank(targets.share, 2), {*varies, *axes}),
                targets.extra,
            ),
            vocab_blocks.Constants(kept, exists, mask_row, targets.column, counts, some, asked),
        )

    losses, stats, targets = token_terms(
        rows_of,
        classes,
        labels,
        weight,
        mask if mask is None or mask_row is None else mask[mask_row],
        sample_weight,
        token_mask,
        dtype=wide,
        options=options,
        scalars=scalars,
    )
    loss = reduce_losses(losses, targets, sample_weight, reduction, geometry.token_axes, empty_mean)
    loss = loss.reshape(lead) if reduction == "none" else loss
    if stats is None:
        return loss
    stats = TokenStats(*(v.reshape(lead) for v in stats))
    return loss, stats if reduction == "none" else lax.stop_gradient(stats)
