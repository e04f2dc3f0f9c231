"""What tokens ask for, drawn, and what the losses and slopes are then."""

from typing import Any, NamedTuple

import numpy as np

from numerics.fuzz.truth import INF, LD, Precision, softmax_rows, weights_of, widened


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


def asked_of(config, rng, mask, at: Precision) -> Asked:
    n, c = mask.shape
    kind, eps = config["labels"], LD(config["label_smoothing"])
    ignore = config["ignore_index"]
    arrays, w, s, counts = {}, np.ones(c, LD), np.ones(n, LD), np.ones(n, bool)
    if config["weight"]:
        arrays["weight"] = weights_of(rng, c, 0.1)
        w = widened(arrays["weight"])
    if config["sample_weight"]:
        weight = weights_of(rng, n)
        if config["sample_weight"] == "bool":
            weight = weight > 0
        elif config["sample_weight"] == "none count":
            weight = np.zeros_like(weight)
        arrays["sample_weight"], s = weight, weight.astype(LD)
        counts &= weight != 0
    if config["where"] == "tokens":
        arrays["where"] = rng.random(n) < 0.7
        counts &= arrays["where"]
    wrong, rest, named = np.zeros(n, bool), None, None
    exist = np.maximum(mask.sum(-1, keepdims=True), 1)
    uniform = mask * (eps / exist)
    t = np.zeros((n, c), LD)
    rows, label_weight = np.arange(n), np.ones(n, LD)
    if kind == "index":
        some = [rng.choice(np.flatnonzero(row)) if row.any() else 0 for row in mask]
        y = np.where(rng.random(n) < 0.9, some, rng.integers(0, c, n)).astype(np.int64)
        info = np.iinfo(config["label_dtype"])
        odd = rng.choice([-100, -1, c, info.max, info.min], n)
        y = np.where(rng.random(n) < 0.2, odd, y)
        y = np.clip(y, info.min, info.max)
        if ignore is not None and info.min <= ignore <= info.max:
            y = np.where(rng.random(n) < 0.2, ignore, y)
            counts &= y != ignore
        labels = (y.astype(config["label_dtype"]),)
        wrong = (y < 0) | (y >= c)
        at_label = np.where(wrong, 0, y)
        t[rows, at_label] = 1 - eps
        label_weight = np.where(
            wrong, 1, w[at_label]
        )  # the loss is NaN; so is not the other rows' scale
    elif kind == "probabilities":
        q = rng.dirichlet(np.full(c, 0.3), n) * mask
        q[rng.random((n, c)) < 0.2] = 0
        hot = rng.random(n) < 0.3
        q[hot] = np.eye(c)[rng.integers(0, c, n)][hot] * mask[hot]
        q = (q * rng.choice([1, 1, 3], (n, 1))).astype(np.float32)
        if config["dtype"] == "float64":
            q = q.astype(np.float64)
        labels, t = (q,), (1 - eps) * widened(q)
    else:
        k = min(3, c)
        index = np.argsort(rng.random((n, c)), axis=-1)[:, :k]
        # Sixty-fourths: what is left of 1 is exact, which would else be known to a rounding of 1.
        q = rng.integers(0, 64 // k + 1, (n, k)) / 64
        q[rng.random(n) < 0.2, 0] = 1
        index[rng.random((n, k)) < 0.2] = -100 if ignore is None else ignore
        index[rng.random((n, k)) < 0.03] = rng.choice([c, -1])
        if k > 1:
            twice = rng.random(n) < 0.05
            index[twice, 1] = index[twice, 0]
        labels = (index.astype(np.int32), q.astype(np.float32))
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
    z = config["z_loss"] * label_weight
    share = s * label_weight
    return Asked(
        labels, asks * w, z, rest, named, counts, wrong & counts,
        np.any((asks > 0) & (w == 0), axis=-1) if kind == "index" else np.zeros(n, bool),
        share, s, arrays,
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


def truth_of(x, mask, asked: Asked, config, at: Precision, off=0.0, blocks=1) -> Truth:
    """``off[N, C]``: how well the logits are known."""
    rows = softmax_rows(x, mask, at, config["logit_softcap"], blocks=blocks)
    t, p, rest, z = asked.t, rows.p, rows.rest, asked.z
    cond, eps = rows.condition, at.eps
    with np.errstate(all="ignore"):
        nll = np.where(t == 0, 0, rows.nll)
        losses = np.sum(t * nll, axis=-1)
        allowed = cond * np.abs(losses)
        mass = t.sum(-1, keepdims=True)
        down, up = p * (mass - t), t * rest
        slopes, size = down - up, down + up
        of_label = config["labels"] == "index" and not config["label_smoothing"]
        allowed = allowed + t.sum(-1) * rows.scaled * (rows.scaled + 4 * eps if of_label else 1)
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
        steep = 0 if config["logit_softcap"] is None else 2 * off / config["logit_softcap"]
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
