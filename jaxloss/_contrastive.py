"""Losses of pairs, each of which is told from all others: CLIP's and SigLIP's."""

from __future__ import annotations

from typing import Any

from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import ArrayLike

from jaxloss._checks import arguments, axis_names, messages
from jaxloss._linear import budget, contrastive, layout
from jaxloss._linear.contrastive import PairArrays, PairScalars
from jaxloss._linear.product import Sweep
from jaxloss._types import AxisName, LossOptions, Reduction
from jaxloss._xla import mesh as meshes
from jaxloss._xla.dtypes import accumulator_dtype


def _check_operands(call: str, x: Array, y: Array, symmetric: bool) -> None:
    for name, v, rows in (("x", x, "N"), ("y", y, "M")):
        if v.ndim != 2:
            messages.fail(call, f"{name} must be [{rows}, D]", messages.describe(v))
    got = f"x {messages.describe(x)}, y {messages.describe(y)}"
    if x.shape[1] != y.shape[1]:
        messages.fail(call, "x and y must have one number of features, D", got)
    if x.dtype != y.dtype:
        way_out = "Cast one of them: a silent cast would copy it."
        messages.fail(call, "x and y must have one dtype", got, way_out, TypeError)
    if symmetric and x.shape[0] != y.shape[0]:
        more = x.shape[0] < y.shape[0]
        way_out = "With symmetric=False further rows of y are negatives." if more else ""
        messages.fail(call, "x and y must have a row a pair each", got, way_out)
    if x.shape[0] > y.shape[0]:
        messages.fail(call, "y must have a row for each row of x", got)


def _where(call: str, where: Any, pairs: int, columns: int) -> Array | None:
    if where is None:
        return None
    mask = arguments.boolean(call, where)
    if mask.shape not in ((pairs,), (pairs, columns)):
        rule = f"where must be [N] (pairs that exist), {(pairs,)}, or [N, M] (entries that exist), "
        messages.fail(call, f"{rule}{(pairs, columns)}", messages.describe(mask))
    return mask


def _loss(
    call: str,
    x: Any,
    y: Any,
    scalars: tuple,
    *,
    symmetric: Any,
    where: Any,
    sample_weight: Any,
    reduction: Any,
    empty_mean: Any,
    token_axis_name: Any,
    over: Any,
    chunk_size: Any,
    precision: Any,
) -> Array:
    symmetric = messages.flag(call, "symmetric", symmetric)
    x, y = messages.floating(call, "x", x), messages.floating(call, "y", y)
    names = axis_names.checked(call, 2, token_axis_name=token_axis_name, over=over)
    axis_names.check_pairs_split(call, x, y, names.token_axes)
    _check_operands(call, x, y, symmetric)
    pairs, columns = x.shape[0], y.shape[0]
    where = _where(call, where, pairs, columns * meshes.size(names.token_axes))
    sample_weight = arguments.check_sample_weight(call, sample_weight, (pairs,))
    arguments.check_reduction(call, reduction)
    dtype = accumulator_dtype(x.dtype)
    scale, *bias = scalars
    finite = arguments.FINITE
    numbers = [messages.scalar(call, "logit_scale", scale, *finite, 1.0, dtype)]
    numbers += [messages.scalar(call, "logit_bias", b, *finite, 0.0, dtype) for b in bias]
    parts = (y,) if columns == pairs else (y[:pairs], y[pairs:])
    found = layout.of_pairs(call, names, x, parts, (where, sample_weight))
    axes, devices = names.token_axes, 1
    if found is not None:
        axes, devices = (*axes, *found.token_axes), found.devices(found.token_axes)
        if len(parts) > 1 and where is not None and where.ndim == 2:
            rule = "where must be [N] beside further rows of y that are split over a mesh"
            messages.fail(call, rule, messages.describe(where), "Inside of shard_map it may be.")
    most = budget.size_to_plan_for(pairs // devices)
    default = budget.default_chunk_of_pairs(most, columns // devices)
    chunk = arguments.chunk_size(call, chunk_size, default, most)
    empty_mean = arguments.check_empty_mean(call, empty_mean)
    options = {
        "symmetric": symmetric,
        "sweep": Sweep(chunk, token_axes=axes),
        "precision": arguments.precision(call, precision),
        "options": LossOptions((), 0, None, reduction, empty_mean, False, (), axes),
    }
    given = PairArrays(x, parts, where, sample_weight), PairScalars(*numbers)
    if found is None:
        layout.warn_of_pairs(call, x, pairs, chunk)
        return contrastive.of_device(*given, **options)
    return contrastive.over_mesh(*given, found=found, static=tuple(options.items()))


def contrastive_loss(
    x: ArrayLike,
    y: ArrayLike,
    *,
    logit_scale: ArrayLike | None = 1.0,
    symmetric: bool = True,
    where: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
    empty_mean: float | None = None,
    token_axis_name: AxisName | PartitionSpec | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    chunk_size: int | None = None,
    precision: lax.PrecisionLike = None,
) -> Array:
    r"""CLIP's loss: each row of ``x`` is to find its row of ``y`` among all rows, and the reverse.

    .. math:: z_{ij} = t\, x_i \cdot y_j, \qquad
              l_i = \frac{1}{2} \left( \log \sum_j e^{z_{ij}} - z_{ii} \right)
                  + \frac{1}{2} \left( \log \sum_j e^{z_{ji}} - z_{ii} \right), \qquad
              \mathrm{mean} = \sum_i s_i l_i \Big/ \sum_i s_i

    The matrix of all similarities is never held. The mean is the mean over the rows of both
    directions.

    Args:
      x: ``[N, D]``, one side of N pairs, a floating dtype. float16 and bfloat16 are multiplied as
        they are, and summed in float32. It is taken as it is: normalise it first.
      y: ``[N, D]``, the other side, with the dtype of ``x``: row i of both is a pair. With
        ``symmetric=False`` it may have further rows.
      logit_scale: ``t``, what the similarities are multiplied by: a number, or a scalar array,
        which may be traced and is differentiable. It is the factor itself: for a parameter that
        holds its logarithm, as CLIP's does, give ``jnp.exp(parameter)``. None is 1.
      symmetric: whether the loss is that of both directions. False: only rows of ``x`` search, so
        that ``l_i`` is the first of the two terms without its half, and rows of ``y`` past the N-th
        are negatives for every row of ``x``.
      where: boolean. ``[N]``: the pairs that exist. A pair that does not exist has loss 0, is no
        negative of any other, and its rows of ``x`` and ``y`` are not read: they may hold NaN.
        ``[N, M]``, M being the rows of ``y``: the entries ``z_ij`` that exist. Off the diagonal
        False takes a negative away (a false one: the same caption twice) from row i of ``x`` and
        from row j of ``y``; on the diagonal it says that the pair has no loss, and nothing of
        other entries. Nothing of its size is held beside it.
      sample_weight: ``[N]``, ``s``: a weight a pair, or a boolean mask. A pair of weight 0 has loss
        0, and its rows remain negatives of the others. Differentiable.
      reduction: ``"none"``: ``s_i l_i``, one a pair, both directions together. ``"sum"``, or
        ``"mean"``.
      empty_mean: what a mean over nothing is, a Python number; None: NaN. Its gradient is 0.
      token_axis_name: the mesh axis, or axes, that the pairs are split over. Inside of
        ``shard_map`` each device has its own rows of both ``x`` and ``y``, pair by pair, of which
        all are negatives of each other; further rows of ``y`` stand behind the device's own pairs,
        and the columns of ``where[N, M]`` are those of the devices in their order. Outside of it
        the arrays are split so. Without it, inside of ``shard_map``, the loss is that of the
        device's own pairs.
      mesh: where the axes are named, outside of ``shard_map``; None: that of ``jax.set_mesh``.
      chunk_size: rows of ``x`` at a time, on each device; None chooses by a memory budget. A chunk
        holds two float32 arrays ``[chunk_size, M]``, M being the device's rows of ``y``.
      precision: of the products, as ``jax.lax.dot_general`` has it.

    Returns:
      A scalar, or ``[N]`` for ``"none"``, in float32 (float64 for float64 operands). A loss of
      1e-12 is 1e-12, with its gradient.

    Raises:
      TypeError: an array has the wrong dtype, or ``x`` and ``y`` have two.
      ValueError: shapes or options do not fit, or ``x`` and ``y`` are not split over the axes that
        ``token_axis_name`` names.

    Differentiable in ``x``, ``y``, ``logit_scale`` and ``sample_weight``, in forward and reverse
    mode to any order. The value takes one product of N x M x D, its gradients three more. What is
    held beside the operands are their float32 gradients, a few numbers a row, and a chunk. Over a
    mesh the rows of ``y`` go round a ring of the devices, once for the value and once for the
    gradients, and a device never holds more than two devices' rows. On automatic axes that nobody
    names each device computes all similarities, with a warning where a mesh is set.

    Example:

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> normal = lambda seed: jax.random.normal(jax.random.key(seed), (6, 4))
      >>> unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
      >>> images, texts = unit(normal(0)), unit(normal(1))
      >>> loss = jaxloss.contrastive_loss(images, texts, logit_scale=10.0)
      >>> z, labels = 10.0 * images @ texts.T, jnp.arange(6)
      >>> plain = [jaxloss.cross_entropy(z, labels), jaxloss.cross_entropy(z.T, labels)]
      >>> bool(jnp.allclose(loss, sum(plain) / 2, rtol=1e-5))
      True
      >>> print(jaxloss.contrastive_loss(images, images, logit_scale=100.0).dtype)
      float32

    Source: A. Radford et al., "Learning Transferable Visual Models From Natural Language
    Supervision" (2021); ``open_clip.loss.ClipLoss``. The ring as in H. Liu et al., "Ring Attention"
    (2023).
    """
    return _loss(
        "contrastive_loss",
        x,
        y,
        (logit_scale,),
        symmetric=symmetric,
        where=where,
        sample_weight=sample_weight,
        reduction=reduction,
        empty_mean=empty_mean,
        token_axis_name=token_axis_name,
        over=mesh,
        chunk_size=chunk_size,
        precision=precision,
    )


def sigmoid_contrastive_loss(
    x: ArrayLike,
    y: ArrayLike,
    *,
    logit_scale: ArrayLike | None = 1.0,
    logit_bias: ArrayLike | None = 0.0,
    symmetric: bool = True,
    where: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
    empty_mean: float | None = None,
    token_axis_name: AxisName | PartitionSpec | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    chunk_size: int | None = None,
    precision: lax.PrecisionLike = None,
) -> Array:
    r"""SigLIP's loss: of each row of ``x`` and each row of ``y``, whether they are a pair.

    .. math:: z_{ij} = t\, x_i \cdot y_j + b, \qquad
              l_i = \mathrm{softplus}(-z_{ii}) + \sum_{j \ne i} \mathrm{softplus}(z_{ij}), \qquad
              \mathrm{mean} = \sum_i s_i l_i \Big/ \sum_i s_i

    with ``softplus(z) = -log sigmoid(-z)``: a sum over the rows of ``y``, and a mean over those of
    ``x``. The matrix of all similarities is never held.

    Args:
      x, y: as in :func:`contrastive_loss`.
      logit_scale: ``t``, a number or a scalar array, traced and differentiable, as in
        :func:`contrastive_loss`; SigLIP's own is ``jnp.exp(parameter)``, at first 10. None is 1.
      logit_bias: ``b``, likewise; SigLIP's own is at first -10. None is 0.
      symmetric: a decision has no direction, and the loss of N x N decisions is the same either
        way. False allows further rows of ``y``, which are negatives for every row of ``x``.
      where: boolean. ``[N]``: the pairs that exist; ``[N, M]``: the decisions that count, a pair's
        own being on the diagonal. As in :func:`contrastive_loss`: a pair whose own decision does
        not count has no loss.
      sample_weight: ``[N]``, ``s``: a weight a row of ``x``, or a boolean mask. A pair of weight 0
        has loss 0, and its row of ``y`` remains a negative of the others. Differentiable.
      reduction: ``"none"``: ``s_i l_i``, one a row of ``x``. ``"sum"``, or ``"mean"``.
      empty_mean, token_axis_name, mesh, chunk_size, precision: as in :func:`contrastive_loss`.

    Returns:
      A scalar, or ``[N]`` for ``"none"``, in float32 (float64 for float64 operands).

    Raises:
      TypeError, ValueError: as :func:`contrastive_loss`.

    Differentiable in ``x``, ``y``, ``logit_scale``, ``logit_bias`` and ``sample_weight``, in every
    mode to any order; products, memory and meshes as in :func:`contrastive_loss`.

    Example:

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> normal = lambda seed: jax.random.normal(jax.random.key(seed), (6, 4))
      >>> unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
      >>> images, texts = unit(normal(0)), unit(normal(1))
      >>> loss = jaxloss.sigmoid_contrastive_loss(
      ...     images, texts, logit_scale=10.0, logit_bias=-10.0)
      >>> z = 10.0 * images @ texts.T - 10.0
      >>> plain = jaxloss.sigmoid_cross_entropy(z, jnp.eye(6), reduction="sum") / 6
      >>> bool(jnp.allclose(loss, plain, rtol=1e-5))
      True

    Source: X. Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023); ``big_vision``'s
    ``trainers/proj/image_text/siglip.py``; ``open_clip.loss.SigLipLoss``.
    """
    return _loss(
        "sigmoid_contrastive_loss",
        x,
        y,
        (logit_scale, logit_bias),
        symmetric=symmetric,
        where=where,
        sample_weight=sample_weight,
        reduction=reduction,
        empty_mean=empty_mean,
        token_axis_name=token_axis_name,
        over=mesh,
        chunk_size=chunk_size,
        precision=precision,
    )
