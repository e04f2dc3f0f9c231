"""Focal losses and binary decisions."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from oracle.budget import LD, assert_allowed, precision, rounded
from oracle.draw import asked_of, rows_of, weights_of
from oracle.truth import softmax_rows, truth_of, widened

import jaxloss
from numerics.fuzz.logits import (
    AXES,
    check_dtype,
    check_softmax_loss,
    exists_of,
    frozen_of,
    jitted,
    placed,
    random_ct,
)


@lru_cache(maxsize=64)
def program_of_focal(frozen):
    config = dict(frozen)

    def step(x, labels, arrays, ct):
        def total(x):
            loss = jaxloss.focal_loss(
                x, labels[0], axis=AXES[config["layout"]], gamma=config["gamma"],
                ignore_index=config["ignore_index"], reduction=config["reduction"], **arrays,
            )  # fmt: skip
            return jnp.sum(loss * ct) if config["reduction"] == "none" else loss, loss

        (_, loss), g = jax.value_and_grad(total, has_aux=True)(x)
        return loss, (g,)

    return jitted(config)(step)


def fuzz_focal_loss(config, rng, kinds):
    config = {**config, "labels": "index", "label_smoothing": 0.0, "z_loss": 0.0}
    config |= {"logit_softcap": None}
    n, c = (1 if config["layout"] == "one" else 6), config["c"]
    at, gamma = precision(config["dtype"]), LD(config["gamma"])
    x, mask = rows_of(rng, kinds, n, c, config["dtype"]), exists_of(config, rng, n, c)
    asked = asked_of(config, rng, mask)
    arrays = {k: placed(config, v, False) if k != "weight" else v for k, v in asked.arrays.items()}
    if config["where"] == "classes":
        arrays["where"] = placed(config, mask, True)
    y = np.where(asked.wrong | ~asked.counts, 0, asked.labels[0].astype(np.int64))
    weight = widened(asked.arrays["weight"]) if config["weight"] else np.ones(c, LD)
    plain = asked._replace(t=np.eye(c, dtype=LD)[y], vague=asked.vague)
    one = truth_of(widened(x), mask, plain, at)
    w, nll = weight[y], one.losses
    with np.errstate(all="ignore"):
        u, p = -np.expm1(-nll), np.exp(-nll)
        power = np.where(u > 0, u**gamma, LD(config["gamma"] == 0))
        ratio = np.where(u > 0, np.where(np.isinf(nll), 0, nll) / u, 1)
        scale = w * (power + gamma * power * p * ratio)
        cond = softmax_rows(widened(x), mask, at).condition
        losses = w * power * nll
        allowed = ((1 + gamma) * cond + 8 * at.eps) * np.abs(losses)
        slopes = scale[:, None] * one.slopes
        more = 2 * (gamma + 1) * cond[:, None] + 8 * at.eps
        room = np.abs(scale[:, None]) * one.slopes_allowed + more * np.abs(slopes)
    counts = asked.counts
    losses, allowed = (np.where(counts, v, 0) for v in (losses, allowed))
    slopes, room = (np.where(counts[:, None], v, 0) for v in (slopes, room))
    truth = one._replace(losses=losses, allowed=allowed, slopes=slopes, slopes_allowed=room)
    ct = random_ct(rng, n, config)
    with check_dtype(config):
        loss, grads = program_of_focal(frozen_of(config))(
            placed(config, x, True), (placed(config, asked.labels[0], False),), arrays,
            placed(config, ct, False),
        )  # fmt: skip
    check_softmax_loss(config, asked, truth, ct, at, loss, grads, c)


@lru_cache(maxsize=64)
def program_of_sigmoid(frozen):
    config = dict(frozen)
    options = {"ignore_index": config["ignore_index"], "label_smoothing": config["smoothing"]}
    loss_fn = jaxloss.sigmoid_cross_entropy
    if config["focal"]:
        loss_fn = jaxloss.sigmoid_focal_loss
        options |= {"gamma": config["gamma"], "alpha": config["alpha"]}

    def step(x, y, arrays, ct):
        def total(x):
            loss = loss_fn(x, y, reduction=config["reduction"], **options, **arrays)
            return jnp.sum(loss * ct) if config["reduction"] == "none" else loss, loss

        (_, loss), g = jax.value_and_grad(total, has_aux=True)(x)
        return loss, g

    return jitted(config)(step)


def fuzz_sigmoid(focal, config, rng, kinds):
    config = {**config, "focal": focal}
    gamma, alpha = (config["gamma"], config["alpha"]) if focal else (0.0, None)
    n, c, dtype = 5, config["c"], config["dtype"]
    at, smooth = precision(dtype), LD(config["smoothing"])
    x = rows_of(rng, kinds, n, c, dtype)
    exact, counts, wrong = widened(x), np.ones((n, c), bool), np.zeros((n, c), bool)
    if config["labels"] == "index":
        y = rng.integers(0, 2, (n, c))
        y = np.where(rng.random((n, c)) < 0.1, rng.choice([2, -1, 100], (n, c)), y)
        if config["ignore_index"] is not None:
            y = np.where(rng.random((n, c)) < 0.2, config["ignore_index"], y)
            counts &= y != config["ignore_index"]
        y = y.astype(np.int8)
        wrong, q = (y != 0) & (y != 1), np.where(y == 1, 1, 0).astype(LD)
    elif config["labels"] == "bool":
        y = rng.random((n, c)) < 0.5
        q = y.astype(LD)
    else:
        y = rng.random((n, c)) * (rng.random((n, c)) < 0.8)
        y = np.where(rng.random((n, c)) < 0.2, 1, y).astype(np.float32)
        q = widened(y)
    arrays, w, pos, s = {}, LD(1), LD(1), np.ones((n, c), LD)
    if config["weight"]:
        arrays["weight"] = weights_of(rng, c, 0.1)
        w = widened(arrays["weight"])
    if config["pos_weight"]:
        shape = c if config["pos_weight"] == "class" else (n, c)
        arrays["pos_weight"] = weights_of(rng, int(np.prod(shape)), 0.1).reshape(shape)
        pos = widened(arrays["pos_weight"])
    if config["sample_weight"]:
        v = weights_of(rng, n * c).reshape(n, c)
        v = v > 0 if config["sample_weight"] == "bool" else v
        arrays["sample_weight"], s = v, v.astype(LD)
        counts &= v != 0
    if config["where"]:
        arrays["where"] = rng.random((n, c)) < 0.7
        counts &= arrays["where"]
    ct = rng.uniform(0.5, 2, (n, c)).astype("float64" if dtype == "float64" else "float32")
    with check_dtype(config):
        loss, dx = program_of_sigmoid(frozen_of(config))(x, y, arrays, ct)
    bad = (wrong | np.isnan(exact)) & counts
    with np.errstate(all="ignore"):
        a = np.abs(exact)
        large = 1 / (1 + np.exp(-a))
        small = np.exp(-a) * large
        yes, no = np.where(exact > 0, large, small), np.where(exact > 0, small, large)
        above = np.log1p(np.exp(-a))
        down, up = np.maximum(-exact, 0) + above, np.maximum(exact, 0) + above
        q1, q0 = (v * (1 - smooth) + smooth / 2 for v in (q, 1 - q))
        u = q0 * yes + q1 * no
        power = np.where(u > 0, u ** LD(gamma), LD(gamma == 0))
        balance = w if alpha is None else w * (alpha * q1 + (1 - LD(alpha)) * q0)

        def times(weight, v):
            return np.where(weight == 0, 0, weight * v)

        bce = times(pos * q1, down) + times(q0, up)
        losses = times(balance, power * bce)
        # A loss that falls as exp(-(1 + gamma) |x|) down to 0; past that, it grows as |x|.
        cond = (np.minimum((1 + gamma) * a, at.reach) + 16) * at.eps
        over = np.where(np.isinf(bce), 0, np.where(u > 0, bce / np.where(u > 0, u, 1), 0))
        slope = balance * power * (q0 * yes - pos * q1 * no)
        moved = balance * gamma * power * over * (q0 - q1) * yes * no
        size = balance * power * (q0 * yes + pos * q1 * no)
        size = size + balance * gamma * power * over * (q0 + q1) * yes * no
        slope = slope + moved
        losses = np.where(counts, s * losses, 0)
        # Where the loss is 0 for lack of floats, weights still multiply the rest of it.
        scale = np.maximum(np.max(balance), 1) * np.maximum(np.max(pos), 1) * (1 + gamma)
    cond = np.where(np.isnan(cond), 0, cond)
    floor = at.tiny * scale * np.maximum(np.abs(s), 1)
    counted = np.where(counts, s, 0)
    losses = np.where(bad, np.nan, losses)
    allowed = np.where(
        counts & ~bad, np.where(np.isinf(losses), 0, cond * np.abs(losses)) + floor, 0
    )
    nothing = False
    if config["reduction"] == "none":
        expected, factor = losses, ct.astype(LD) * counted
    else:
        few = (n * c / 2 + 4) * at.eps
        with np.errstate(invalid="ignore"):
            expected = losses.sum()
            allowed = np.sum(allowed) + few * np.sum(np.abs(losses))
        factor = counted
        if config["reduction"] == "mean":
            share = counted.sum()
            nothing = share == 0
            share = LD(np.nan) if nothing else share
            expected, allowed, factor = expected / share, allowed / share, counted / share
            allowed = allowed + few * np.abs(expected)
    assert_allowed(loss, expected, allowed, at, "loss")
    keep = ~bad
    # Infinite logits: 0 where they are right; where they are wrong and more, inf - inf.
    vague = np.isinf(exact) & (u > 0) & (u < 1)
    keep &= ~vague
    seen = counts & keep & (not nothing)
    slope, size = np.where(seen, slope, 0), np.where(seen, size, 0)
    want = np.where(seen, factor * slope, 0)
    room = np.abs(factor) * (cond * size + 4 * at.eps * size + floor)
    room = rounded(np.where(seen, room, 0), want, at)
    got = np.asarray(np.asarray(dx, np.float64))
    assert_allowed(got[keep], want[keep], room[keep], at, "d_logits")
    assert np.all(np.isnan(got[bad])) or nothing


def fuzz_sigmoid_cross_entropy(config, rng, kinds):
    fuzz_sigmoid(False, config, rng, kinds)


def fuzz_sigmoid_focal_loss(config, rng, kinds):
    fuzz_sigmoid(True, config, rng, kinds)
