"""contrastive_loss and sigmoid_contrastive_loss."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from oracle.budget import assert_allowed, precision, rounded
from oracle.draw import weights_of
from oracle.pairs import clip_by_pair, one_way_by_row, siglip_by_row

import jaxloss
from numerics.fuzz.logits import check_dtype, frozen_of, jitted, random_ct

PAIRS = {
    "n": [7, 1, 2, 16],
    "d": [4, 1],
    "more": [0, 3],
    "dtype": ["float32", "bfloat16", "float16", "float64"],
    "scale": [1.0, 0.0, -3.0, 100.0],
    "bias": [0.0, -10.0],
    "chunk_size": [3, 1, None],
    "where": [None, "pairs", "entries"],
    "sample_weight": [None, "bool", "float"],
    "reduction": ["mean", "none", "sum"],
    "symmetric": [True, False],
    "way": ["jit", "quick"],
}


@lru_cache(maxsize=64)
def program_of_pairs(frozen):
    config = dict(frozen)
    options = {k: config[k] for k in ("chunk_size", "symmetric", "reduction")}

    def step(operands, arrays, ct):
        def total(x, y, scale, bias):
            numbers = {"logit_scale": scale}
            if config["sigmoid"]:
                numbers["logit_bias"] = bias
                loss = jaxloss.sigmoid_contrastive_loss(x, y, **numbers, **options, **arrays)
            else:
                loss = jaxloss.contrastive_loss(x, y, **numbers, **options, **arrays)
            return jnp.sum(loss * ct) if config["reduction"] == "none" else loss, loss

        by = (0, 1, 2, 3) if config["sigmoid"] else (0, 1, 2)
        (_, loss), grads = jax.value_and_grad(total, by, has_aux=True)(*operands)
        return loss, grads

    return jitted(config)(step)


def fuzz_pairs(sigmoid, config, rng, kinds):
    config = {**config, "sigmoid": sigmoid}
    symmetric, n = config["symmetric"], config["n"]
    m, d = n if symmetric else n + config["more"], config["d"]
    at, wide = precision(config["dtype"]), "float64" if config["dtype"] == "float64" else "float32"
    x, y = (rng.normal(size=(rows, d)).astype(jnp.dtype(config["dtype"])) for rows in (n, m))
    near = rng.random(n) < 0.5
    x[near] = y[:n][near]
    operands = (x, y, np.asarray(config["scale"], wide), np.asarray(config["bias"], wide))
    arrays, mask, s = {}, np.ones((n, m), bool), np.ones(n)
    if config["where"] == "pairs":
        there = arrays["where"] = rng.random(n) < 0.7
        mask = there[:, None] & np.r_[there, np.ones(m - n, bool)]
    elif config["where"] == "entries":
        mask = arrays["where"] = rng.random((n, m)) < 0.7
    if config["sample_weight"]:
        weight = weights_of(rng, n)
        weight = weight > 0 if config["sample_weight"] == "bool" else weight
        arrays["sample_weight"], s = weight, weight.astype(np.float64)
    ct = random_ct(rng, n, config)
    with check_dtype(config):
        loss, grads = program_of_pairs(frozen_of(config))(operands, arrays, ct)
    counts = np.diagonal(mask) & (s != 0)
    factor = np.where(counts, s, 0)
    if config["reduction"] == "mean":
        factor = factor / np.sum(factor) if np.sum(factor) else np.zeros(n)
    elif config["reduction"] == "none":
        factor = factor * ct
    with jax.enable_x64(True):
        given = tuple(jnp.asarray(v, jnp.float64) for v in operands)
        # No entry of the truth may be infinite. A pair's own is in the sums of that pair alone.
        safe = mask | np.eye(n, m, dtype=bool)
        formula = siglip_by_row if sigmoid else clip_by_pair if symmetric else one_way_by_row
        whole = partial(formula_of, formula, sigmoid, safe, counts)
        each = np.asarray(whole(*given))
        truth = jax.grad(lambda *args: jnp.sum(factor * whole(*args)), tuple(range(len(grads))))
        slopes = [np.asarray(g) for g in truth(*given)]
    # A similarity is known to (D + 4) / 2 roundings of the sum of its terms' sizes.
    sizes = [np.abs(np.asarray(v, np.float64)) for v in operands]
    known = (d + 4) / 2 * at.eps * (sizes[2] * np.max(sizes[0] @ sizes[1].T) + sizes[3])
    terms = m if sigmoid else 1
    allowed = terms * (2 * known + (16 + n + m) * at.eps) * (1 + np.abs(each))
    if config["reduction"] == "none":
        got, want, room = loss, np.where(counts, s * each, 0), s * allowed
    else:
        want, room = np.sum(factor * each), np.sum(np.abs(factor) * allowed)
        got = loss
        if config["reduction"] == "mean" and not counts.any():
            want, room = np.nan, 0
    assert_allowed(got, want, room, at, "loss")
    # Each slope by a similarity is a share of its row's and of its column's factor.
    half = at.half * 2 if at.half else 0
    share = 4 * (known + (16 + n + m) * at.eps + half)
    by_row = np.max(np.abs(factor), initial=0) * share
    of_x, of_y = (by_row * sizes[2] * np.sum(v, axis=0) for v in (sizes[1], sizes[0]))
    products = np.sum(sizes[0] @ sizes[1].T)
    rooms = (of_x[None], of_y[None], by_row * products, by_row * n * m)
    for i, (g, want) in enumerate(zip(grads, slopes, strict=True)):
        room = np.broadcast_to(rooms[i], want.shape)
        own = at if i < 2 else precision(wide)
        assert_allowed(np.asarray(g, np.float64), want, rounded(room, want, own), at, f"slope {i}")


def formula_of(formula, sigmoid, mask, counts, x, y, scale, bias):
    numbers = (scale, bias) if sigmoid else (scale,)
    each = formula(x, y, *numbers, where=mask)
    return jnp.where(counts, each, 0)


def fuzz_contrastive_loss(config, rng, kinds):
    fuzz_pairs(False, config, rng, kinds)


def fuzz_sigmoid_contrastive_loss(config, rng, kinds):
    fuzz_pairs(True, config, rng, kinds)
