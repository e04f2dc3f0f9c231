"""linear_cross_entropy by its two schedules: from checked arguments to the loss."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxloss._linear import (
    pallas_rows,
    stored_exponentials,
    token_chunks,
    token_rules,
    vocab_blocks,
)
from jaxloss._linear.packing import gather_rows, scatter_rows
from jaxloss._numerics.logits import Logits, scaling_of
from jaxloss._tokens.classes import existing, local_classes, local_weight
from jaxloss._tokens.losses import (
    MOVING,
    RANKS,
    in_two,
    of_two,
    rows_of_logits,
    temperature_of,
    token_losses,
)
from jaxloss._tokens.reduction import normalised_weights, reduce_losses
from jaxloss._tokens.shapes import flat_labels, rows_of_mask
from jaxloss._tokens.targets import (
    is_zero,
    make_targets,
    rows_with_classes,
    tokens_with_classes,
)
from jaxloss._types import TokenArrays, TokenStats
from jaxloss._xla import indexing, mesh
from jaxloss._xla.device import jit


@jit
def by_token_chunks(product, arrays, scalars, *, sweep, options, fused, stored=False):
    classes_of = partial(local_classes, options.num_classes, vocab_axes=sweep.vocab_axes)
    classes = classes_of(product.num_classes)
    lead, dtype = product.lead, product.wide
    # A chunk has none of the tokens that are left no class: its mask may be as it is.
    token_mask = tokens_with_classes(arrays.class_mask, arrays.token_mask, lead, classes)
    of_all = arrays._replace(class_mask=None, token_mask=token_mask)
    targets = make_targets(of_all, classes, dtype, options.ignore_index)
    mask_rows, mask_index = rows_of_mask(arrays.class_mask, lead)
    scalar, with_stats = options.reduction != "none", options.with_stats
    # A loop's rule outlives this trace: what it reads of ``scalars`` comes with its operands.
    numbers, of_scalars = jax.tree.flatten(scalars)

    def of_chunk(per_token, shared, columns):
        """``token_losses``' arguments past the first."""
        *labels, index, temperature = per_token
        weight, mask, *numbers = shared
        scalars = of_scalars.unflatten(numbers)
        mask = mask if index is None else mask[index]
        arrays = TokenArrays(
            tree.unflatten(labels), weight, class_mask=mask, temperature=temperature
        )
        smoothing = scalars.label_smoothing
        # Counted anew: traced values must not leak into the loop that this runs in.
        classes = classes_of(columns)
        targets = make_targets(arrays, classes, dtype, options.ignore_index, smoothing)
        return targets, arrays, options, scalars, dtype

    def loss_fn(x, per_token, shared):
        given = of_chunk(per_token, shared, x.shape[-1])
        _, arrays, _, scalars, _ = given
        scaling = scaling_of(scalars.softcap, scalars.temperature)
        logits = Logits(x, scaling=scaling, pallas_bytes=4)
        rows_of = rows_of_logits(logits, temperature_of(arrays, scalars))
        losses, stats = token_losses(rows_of, *given)
        if stats is None:
            return (losses,), ()
        moving, constant = in_two(stats)
        return ((losses,), (*moving, *constant)) if scalar else ((losses, *moving), constant)

    def value(operands, packing):
        # Where nothing is differentiated: all chunks' tokens at once, their logits held nowhere.
        per_token = tuple(gather_rows(x, packing.order) for x in operands.per_token)

        def rows_of(targets, outputs):
            some = operands.student
            some = replace(some, hidden=gather_rows(some.hidden, packing.order))
            of_rows = targets.label, packing.size, outputs, sweep.vocab_axes
            return pallas_rows.row_losses(some, *of_rows)

        losses, _ = token_losses(
            rows_of, *of_chunk(per_token, operands.shared, product.num_classes)
        )
        blank = mesh.varying(jnp.zeros(tokens, dtype), mesh.varies_over(losses))
        return (scatter_rows(packing.order, blank, losses),), ()

    def loss_of_rows(rows, of_all, per_token, shared, columns):
        targets, arrays, own, *others = of_chunk(per_token, shared, columns)
        if of_all is not None:
            weight, *_ = shared
            mass = options.num_classes if weight is None else jnp.sum(weight.astype(dtype))
            soft = targets.uniform * (mass * rows.logsumexp - of_all)
            rows = rows._replace(soft=soft)
        own = own._replace(with_stats=False)
        losses, _ = token_losses(lambda *_: rows, targets, arrays, own, *others)
        return losses

    def of_classes(shared, columns):
        weight, *_ = shared
        classes = classes_of(columns)
        weight = local_weight(weight, classes)
        weight = jnp.ones(columns, dtype) if weight is None else weight.astype(dtype)
        real = existing(None, classes, 1)
        return weight if real is None else jnp.where(real, weight, 0)

    def statistics(x, per_token, shared):
        _, stats = loss_fn(x, per_token, shared)
        return stats

    def targets_of(per_token, shared, columns):
        targets, *_ = of_chunk(per_token, shared, columns)
        return targets

    tokens, (labels, tree) = math.prod(lead), flat_labels(arrays.labels, lead)
    temperature = None if arrays.temperature is None else arrays.temperature.reshape(tokens)
    operands = token_chunks.Operands(
        product.flat(),
        (*labels, mask_index, temperature),
        (arrays.weight, mask_rows, *numbers),
    )
    weights = normalised_weights(targets.weights, options, dtype)
    by = token_rules.By(value if fused else None)
    if stored:
        scaling = scaling_of(scalars.softcap, scalars.temperature)
        smoothed = not is_zero(scalars.label_smoothing)
        row_loss = stored_exponentials.RowLoss(
            targets_of,
            loss_of_rows,
            scaling,
            fused,
            of_classes if smoothed else None,
            statistics if with_stats else None,
        )
        forms = stored_exponentials.losses, stored_exponentials.gradients
        alone, beside = (partial(form, row_loss, sweep) for form in forms)
        by = token_rules.By(value if fused and not smoothed else alone, beside)
    given = sweep, operands, targets.valid, weights, scalar
    loss, stats = token_rules.reduced(loss_fn, *given, by)
    if not with_stats:
        return loss
    stats = tuple(v.reshape(lead) for v in stats)
    stats = of_two(stats[: len(MOVING)], stats[len(MOVING) :])
    none = {name: jnp.where(targets.valid, getattr(stats, name), -1) for name in RANKS}
    return loss, stats._replace(**none)


@jit
def by_vocab_blocks(product, arrays, scalars, *, sweep, options, fused):
    hidden, axes = product.hidden, sweep.vocab_axes
    classes = local_classes(options.num_classes, product.num_classes, axes, sweep.chunk)
    lead, dtype = hidden.shape[:-1], product.wide
    tokens = math.prod(lead)
    token_mask = tokens_with_classes(arrays.class_mask, arrays.token_mask, lead, classes)
    mask, mask_row = rows_of_mask(arrays.class_mask, lead)
    some = None if mask is None else rows_with_classes(mask, classes)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (mask.shape[0], classes.size))
    labels, tree = flat_labels(arrays.labels, lead)
    sample_weight, token_mask = (
        None if x is None else x.reshape(tokens) for x in (arrays.sample_weight, token_mask)
    )
    rows = hidden.reshape(tokens, hidden.shape[-1])
    exists = existing(mask, classes, 2)
    masked = sample_weight is not None or token_mask is not None
    all_valid = options.ignore_index is None and not masked
    scaling = scaling_of(scalars.softcap, scalars.temperature)

    def rows_of(targets, outputs):
        # Gradients of what no token owns are summed over the devices after the loop, not in it.
        varies = mesh.varies_over((product, labels))
        weight = local_weight(targets.weight, classes)
        weight, label = mesh.varying((weight, targets.label), varies)
        valid = targets.valid if fused and not all_valid else None
        probabilities, smoothing = targets.probabilities, targets.label_smoothing
        weighed = probabilities is not None and weight is not None
        asked = targets.valid if masked and weighed else None
        if isinstance(smoothing, Array):  # a block's own factor must be static
            if probabilities is not None:
                probabilities = probabilities.astype(dtype) * (1 - smoothing)
            smoothing = 0.0
        return vocab_blocks.row_losses_by_block(
            vocab_blocks.Options(sweep, smoothing, scaling, outputs, dtype, fused),
            vocab_blocks.Operands(
                # 0 * NaN is NaN: a token that does not count must not reach d_kernel.
                replace(product, hidden=jnp.where(targets.valid[:, None], rows, 0)),
                probabilities,
                weight,
                mesh.varying(indexing.of_rank(targets.uniform, 2), {*varies, *axes}),
                targets.extra,
            ),
            vocab_blocks.Constants(label, exists, mask_row, targets.column, valid, some, asked),
        )

    of_rows = TokenArrays(
        tree.unflatten(labels),
        arrays.weight,
        sample_weight,
        mask if mask is None or mask_row is None else mask[mask_row],
        token_mask,
    )
    targets = make_targets(of_rows, classes, dtype, options.ignore_index, scalars.label_smoothing)
    losses, stats = token_losses(rows_of, targets, of_rows, options, scalars, dtype)
    loss = reduce_losses(losses, targets.weights, options)
    loss = loss.reshape(lead) if options.reduction == "none" else loss
    if stats is None:
        return loss
    stats = TokenStats(*(v.reshape(lead) for v in stats))
    return loss, stats if options.reduction == "none" else lax.stop_gradient(stats)
