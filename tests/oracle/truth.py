"""The truth of the softmax losses in 80 bits, and how far from it a result may be.

Nothing is shared with the package: every term is ``-log p_c = log1p(sum_{j != c} exp(x_j - x_c))``,
which does not cancel. ``reference`` is ``cross_entropy`` with all of its options, for the tests;
the fuzzer asks for ``truth_of`` and ``statistics_of``, which derive slopes and budgets too.
"""

from typing import Any, NamedTuple

import numpy as np

from oracle.budget import INF, LD, Precision, precision


def wide(x):
    return np.asarray(x, np.float64)


def widened(x):
    x = np.asarray(x)
    return x if x.dtype == LD else np.asarray(np.asarray(x, np.float64), LD)


# The softmax of rows, in 80 bits


class Rows(NamedTuple):
    bad: Any  # [N]: no distribution
    nll: Any  # [N, C] -log p; inf: impossible
    p: Any
    rest: Any  # 1 - p
    slope: Any  # of what the softmax is taken of, by the logits
    slope_error: Any  # relative
    lse: Any  # [N]
    entropy: Any
    condition: Any  # [N] relative error of a probability
    lse_error: Any  # [N] absolute
    # [N] Capped logits are rounded, otherwise in each pass, so that the maximum is known to this:
    # absolute, in all that does not compare the label with it first.
    scaled: Any


def softmax_rows(x, mask, at: Precision, cap=None, temperature=1.0, blocks=1) -> Rows:
    """``x[N, C]`` in longdouble; ``mask``: the classes that exist."""
    c = x.shape[1]
    with np.errstate(all="ignore"):
        y, slope = x, np.ones_like(x)
        if cap is not None:
            y, slope = LD(cap) * np.tanh(x / LD(cap)), 1 / np.cosh(x / LD(cap)) ** 2
        y, slope = y / LD(temperature), slope / LD(temperature)
        # sech^2 = 4 e / (1 + e)^2 is known as its e = exp(-2 |x / cap|).
        steep = 0 if cap is None else np.minimum(2 * np.abs(x) / cap, at.reach)
        # What is masked may hold anything.
        slope, steep = np.where(mask, slope, 0), np.where(mask, steep, 0)
        bad = np.any(mask & (np.isnan(y) | (y == INF)), axis=-1) | ~np.any(mask & (y > -INF), -1)
        possible = mask & (y > -INF) & ~bad[:, None]
        y = np.where(possible, y, 0)
        apart = y[:, None, :] - y[:, :, None]  # [n, c, j]: y_j - y_c
        others = possible[:, None, :] & ~np.eye(c, dtype=bool)
        above = np.maximum(np.max(np.where(others, apart, -INF), axis=-1, initial=-INF), 0)
        s = np.sum(np.exp(apart - above[..., None]), axis=-1, where=others)
        nll = np.where(above > 0, above + np.log(np.exp(-above) + s), np.log1p(s))
        nll = np.where(possible, nll, INF)
        p, rest = np.exp(-nll), -np.expm1(-nll)
    best = np.argmax(np.where(possible, y, -INF), axis=-1)[:, None]
    m = np.take_along_axis(y, best, -1)[:, 0]
    r = np.where(bad, 0, np.take_along_axis(nll, best, -1)[:, 0])
    high, low = np.max(np.where(possible, y, -INF), -1), np.min(np.where(possible, y, INF), -1)
    spread = np.where(bad, 0, high - np.where(bad, 0, low))
    size = np.maximum(np.abs(np.where(bad, 0, high)), np.abs(np.where(bad, 0, low)))
    # tanh rounds what is then subtracted, 6 half roundings a side; a temperature divides after.
    scaled = 3 * size if cap is not None else 0
    terms = c / 4 + blocks
    condition = (np.minimum(spread, at.reach) + scaled + 16 + terms) * 2 * at.eps
    lse_error = (4 * np.abs(m) + 6 * scaled) * at.eps + r * condition + 4 * at.eps * r
    entropy = np.sum(np.where(p > 0, p * np.where(possible, nll, 0), 0), axis=-1)
    return Rows(
        bad, nll, p, rest, slope, (steep + 16) * at.eps, m + r, entropy, condition, lse_error,
        np.broadcast_to(4 * at.eps * scaled, m.shape),
    )  # fmt: skip


# What tokens ask for


class Asked(NamedTuple):
    labels: tuple  # arrays, as they are given
    t: Any  # [N, C] what each class's -log p is multiplied by
    z: Any  # [N] and lse^2
    rest: Any  # [N], of the one class of all those that are not named; None
    named: Any  # [N, C]
    counts: Any
    wrong: Any  # [N] NaN
    vague: Any  # [N] 0 * inf: no one's answer
    share: Any  # [N], of the mean's denominator
    s: Any  # [N]
    arrays: dict  # options that are arrays
    of_label: bool  # whether a token asks for the one class of its label


def ask(
    labels,
    kind,
    mask,
    *,
    weight=None,
    sample_weight=None,
    tokens=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
) -> Asked:
    """``labels``: a tuple of arrays, of the kind ``"index"``, ``"probabilities"`` or, of top-k
    labels, the name of what becomes of the rest. ``mask[N, C]``: the classes that exist."""
    n, c = mask.shape
    eps, ignore = LD(label_smoothing), ignore_index
    given = {"weight": weight, "sample_weight": sample_weight, "where": tokens}
    w, s, counts = np.ones(c, LD), np.ones(n, LD), np.ones(n, bool)
    if weight is not None:
        w = widened(weight)
    if sample_weight is not None:
        s = widened(sample_weight)
        counts &= s != 0
    if tokens is not None:
        counts &= tokens
    wrong, rest, named = np.zeros(n, bool), None, None
    exist = np.maximum(mask.sum(-1, keepdims=True), 1)
    uniform = mask * (eps / exist)
    t = np.zeros((n, c), LD)
    rows, label_weight = np.arange(n), np.ones(n, LD)
    if kind == "index":
        y = labels[0].astype(np.int64)
        if ignore is not None:
            counts &= y != ignore
        wrong = (y < 0) | (y >= c)
        at_label = np.where(wrong, 0, y)
        t[rows, at_label] = 1 - eps
        # The loss of a wrong label is NaN; so is not the other rows' scale.
        label_weight = np.where(wrong, 1, w[at_label])
    elif kind == "probabilities":
        t = (1 - eps) * widened(labels[0])
    else:
        index, q = labels
        named, taken = np.zeros((n, c), bool), np.zeros(n, bool)
        for i in range(n):
            for j, v in zip(index[i], q[i], strict=True):
                if ignore is not None and j == ignore:
                    continue
                taken[i] = True
                if not 0 <= j < c or named[i, j]:
                    wrong[i] = True
                else:
                    t[i, j], named[i, j] = v, True
        counts &= taken
        others = mask & ~named
        left = np.maximum(1 - t.sum(-1), 0)
        left = np.where(others.any(-1), left, 0)
        t = np.where(mask, t, 0)  # what is asked of a class that does not exist is left out
        if kind == "uniform":
            t = t + others * (left / np.maximum(others.sum(-1), 1))[:, None]
        elif kind == "bucket":
            rest = left
        t = (1 - eps) * t
    asks = t + uniform
    z = z_loss * label_weight
    share = s * label_weight
    return Asked(
        labels, asks * w, z, rest, named, counts, wrong & counts,
        np.any((asks > 0) & (w == 0), axis=-1) if kind == "index" else np.zeros(n, bool),
        share, s, {name: v for name, v in given.items() if v is not None},
        kind == "index" and not label_smoothing,
    )  # fmt: skip


class Truth(NamedTuple):
    losses: Any  # [N], 0 where a token does not count
    allowed: Any
    slopes: Any  # [N, C] of each token's loss, by its logits
    slopes_allowed: Any
    of_labels: Any  # [N, C], by the probabilities
    skip: Any  # [N]
    bad: Any  # [N]: NaN
    lse: Any = 0.0


def truth_of(x, mask, asked: Asked, at: Precision, cap=None, off=0.0, blocks=1) -> Truth:
    """``x[N, C]`` in longdouble; ``off[N, C]``: how well the logits are known."""
    rows = softmax_rows(x, mask, at, cap, blocks=blocks)
    t, p, rest, z = asked.t, rows.p, rows.rest, asked.z
    cond, eps = rows.condition, at.eps
    with np.errstate(all="ignore"):
        nll = np.where(t == 0, 0, rows.nll)
        losses = np.sum(t * nll, axis=-1)
        allowed = cond * np.abs(losses)
        mass = t.sum(-1, keepdims=True)
        down, up = p * (mass - t), t * rest
        slopes, size = down - up, down + up
        once = rows.scaled + 4 * eps if asked.of_label else 1
        allowed = allowed + t.sum(-1) * rows.scaled * once
        if asked.rest is not None:
            # One more class, whose logit is the log-sum-exp of those that are not named.
            others = mask & ~asked.named & (rows.nll < INF)
            p_others = np.sum(p, axis=-1, where=others)
            none = p_others == 0
            p_named = np.sum(p, axis=-1, where=asked.named & mask)
            nll_rest = np.where(p_others > 0.5, -np.log1p(-np.minimum(p_named, 0.6)),
                                -np.log(p_others))  # fmt: skip
            left = asked.rest
            losses = losses + np.where(left == 0, 0, left * nll_rest)
            allowed = cond * np.abs(losses)
            among = np.where(others & ~none[:, None], p / np.where(none, 1, p_others)[:, None], 0)
            down = down + p * left[:, None] * asked.named
            down = np.where(others, among * (p_others * t.sum(-1))[:, None], down)
            up = np.where(others, among * (left * p_named)[:, None], up)
            slopes, size = down - up, down + up
        lse, of_lse = rows.lse[:, None], rows.lse_error[:, None]
        losses = losses + z * rows.lse**2
        allowed = allowed + z * (
            rows.lse_error * (2 * np.abs(rows.lse) + rows.lse_error) + 4 * eps * rows.lse**2
        )
        of_z = 2 * z[:, None] * p
        slopes = slopes + of_z * lse
        slopes_allowed = 4 * cond[:, None] * (size + of_z * np.abs(lse)) + of_z * of_lse
        # A product's logits.
        allowed = allowed + 1.5 * np.sum(np.abs(slopes) * rows.slope * off, axis=-1)
        if asked.rest is not None:
            allowed = allowed + 1.5 * np.max(off + 0 * p, axis=-1) * np.sum(size, axis=-1)
        most = np.max(off * rows.slope, axis=-1, keepdims=True, initial=0)
        slopes_allowed = slopes_allowed + 2 * most * (size + of_z * (np.abs(lse) + 1))
        steep = 0 if cap is None else 2 * off / cap
        slopes_allowed = rows.slope * (slopes_allowed + np.abs(slopes) * (rows.slope_error + steep))
        slopes = np.where(mask, slopes * rows.slope, 0)
        slopes_allowed = np.where(mask, slopes_allowed, 0)
        of_labels = np.where(np.isinf(rows.nll), 0, rows.nll)
    bad = (rows.bad | asked.wrong) & asked.counts
    counts = asked.counts[:, None]
    skip = asked.vague & asked.counts & np.any(np.isinf(rows.nll), -1)
    losses = np.where(bad, np.nan, np.where(asked.counts, losses, 0))
    slopes = np.where(bad[:, None], np.nan, np.where(counts, slopes, 0))
    return Truth(
        losses, np.where(asked.counts, allowed, 0), slopes, np.where(counts, slopes_allowed, 0),
        np.where(counts, of_labels, 0), skip, bad, np.where(rows.bad, 0, rows.lse),
    )  # fmt: skip


def reduced(truth: Truth, asked: Asked, reduction, ct, at: Precision):
    """(loss, allowed, each token's factor, whether the mean is over nothing)."""
    n = len(ct)
    losses, allowed, s = asked.s * truth.losses, asked.s * truth.allowed, asked.s
    losses = np.where(asked.counts, losses, 0)
    more = 2 * at.eps * np.abs(losses)
    if reduction == "none":
        return losses, allowed + more, ct.astype(LD) * s, False
    few = (n / 2 + 4) * at.eps
    total = np.sum(losses)
    allowed = np.sum(allowed) + few * np.sum(np.abs(losses))
    if reduction == "sum":
        return total, allowed, s, False
    share = np.sum(np.where(asked.counts, asked.share, 0))
    if share == 0:
        return LD(np.nan), LD(0), 0 * s, True
    return total / share, allowed / share + few * abs(total / share), s / share, False


def statistics_of(x, mask, asked: Asked, at: Precision, cap=None, temperature=1.0, blocks=1):
    """(rows, the values of log_prob, logsumexp and entropy, what is allowed of them, their slopes,
    what is allowed of those): of what tokens ask for without weights or smoothing."""
    rows = softmax_rows(x, mask, at, cap, temperature, blocks)
    with np.errstate(all="ignore"):
        nll = np.where(asked.t == 0, 0, rows.nll)
        log_prob = -np.sum(asked.t * nll, axis=-1)
        mass = asked.t.sum(-1, keepdims=True)
        down, up = rows.p * (mass - asked.t), asked.t * rows.rest
        of_p = np.where(rows.p > 0, rows.p * np.where(rows.p > 0, rows.nll, 0), 0)
        entropy = rows.entropy[:, None]
    lse_slope, cond = rows.p, rows.condition
    slopes = [up - down, lse_slope, of_p - rows.p * entropy]
    sizes = [up + down, lse_slope, of_p + rows.p * entropy]
    values = [log_prob, rows.lse, rows.entropy]
    once = rows.scaled + 4 * at.eps if asked.of_label else 1
    rooms = [
        cond * np.abs(log_prob) + asked.t.sum(-1) * rows.scaled * once,
        rows.lse_error,
        cond * rows.entropy + at.tiny * at.reach + rows.scaled,
    ]
    absolute = [0, 0, rows.p * rows.scaled[:, None]]
    slopes = [np.where(mask, s * rows.slope, 0) for s in slopes]
    slope_rooms = [
        np.where(mask, rows.slope * ((4 * cond[:, None] + rows.slope_error) * s + e), 0)
        for s, e in zip(sizes, absolute, strict=True)
    ]
    return rows, values, rooms, slopes, slope_rooms


# cross_entropy of arrays in any layout


class Reference(NamedTuple):
    loss: np.ndarray
    log_prob: np.ndarray
    logsumexp: np.ndarray
    entropy: np.ndarray
    prediction: np.ndarray


def classes_last(x, axis):
    """``x`` with its class axes moved to the end and flattened."""
    axes = [a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))]
    batch = [i for i in range(x.ndim) if i not in axes]
    return x.transpose(batch + axes).reshape(*(x.shape[i] for i in batch), -1)


def reference(
    logits,
    labels,
    *,
    axis=-1,
    weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    logit_softcap=None,
    sample_weight=None,
    classes=None,
    tokens=None,
    reduction="mean",
):
    """Every option of cross_entropy; ``classes`` and ``tokens`` are the two meanings of where."""
    labels, x = np.asarray(labels), classes_last(widened(logits), axis)
    batch, c = x.shape[:-1], x.shape[-1]
    exists = np.ones(x.shape, bool)
    if classes is not None:
        exists = classes_last(np.broadcast_to(np.asarray(classes), np.shape(logits)), axis)
    x, exists = x.reshape(-1, c), exists.reshape(-1, c)
    kind = "index" if np.issubdtype(labels.dtype, np.integer) else "probabilities"
    rows = labels.reshape(-1)
    if kind == "probabilities":
        rows = classes_last(labels, axis).reshape(-1, c)
    each = {"sample_weight": sample_weight, "tokens": tokens}
    each = {name: None if v is None else np.asarray(v).reshape(-1) for name, v in each.items()}
    asks = ask(
        (rows,), kind, exists, weight=weight, ignore_index=ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss, **each,
    )  # fmt: skip
    at = precision("float32")
    truth = truth_of(x, exists, asks, at, logit_softcap)
    loss = reduced(truth, asks, reduction, np.ones(len(x)), at)[0]
    alone = ask((rows,), kind, exists, ignore_index=ignore_index, **each)
    _, values, *_ = statistics_of(x, exists, alone, at, logit_softcap)
    capped = x if logit_softcap is None else logit_softcap * np.tanh(x / logit_softcap)
    best = np.argmax(np.where(exists, capped, -INF), axis=-1)
    stats = (np.where(asks.counts, v, 0).reshape(batch) for v in values)
    loss = loss.reshape(batch) if reduction == "none" else loss
    return Reference(loss, *stats, np.where(asks.counts, best, -1).reshape(batch))


def differences(f, x, relative=False):
    """The gradient of a longdouble function by central differences: 9 digits or more.

    ``relative``: the step follows each entry, for weights of very different sizes.
    """
    x = np.array(x, np.longdouble)
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        h = np.longdouble(2.0**-17) * (np.abs(x[i]) if relative and x[i] else 1)
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        out[i] = (f(up) - f(down)) / (2 * h)
    return out


# Rows of many classes, whose label alone is asked for: in memory of the logits' size.


def _beside_the_label(x, y):
    """exp(x_j - x_y), 0 at the label."""
    rows, x = np.arange(len(y)), np.asarray(x, LD)
    e = np.exp(x - x[rows, y][:, None])
    e[rows, y] = 0
    return e


def exact_losses(x, y):
    """-log p_y of ``x[N, C]``."""
    return np.log1p(np.sum(_beside_the_label(x, y), axis=-1))


def exact_gradient(x, y):
    """d(-log p_y) / dx of ``x[N, C]``: no entry is a difference of two numbers near 1."""
    e = _beside_the_label(x, y)
    s = np.sum(e, axis=-1, keepdims=True)
    e[np.arange(len(y)), y] = -s[:, 0]
    return e / (1 + s)
