"""linear_cross_entropy and linear_loss."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from oracle.budget import INF, assert_allowed, precision, rounded
from oracle.draw import asked_of, rows_of
from oracle.truth import reduced, truth_of, widened

import jaxloss
from numerics.fuzz.logits import (
    PLAIN,
    SOFTMAX,
    check_dtype,
    exists_of,
    frozen_of,
    jitted,
    labels_of,
    options_of,
    random_ct,
)


@lru_cache(maxsize=64)
def program_of_product(frozen):
    config = dict(frozen)
    name = config["of"]

    def step(operands, labels, arrays, ct):
        def total(*args):
            hidden, kernel, *rest = args
            bias = rest.pop(0) if config["bias"] else None
            y = labels_of(config, rest or labels)
            both = {"bias": bias, "vocab_axis": config["vocab_axis"]}
            both["chunk_size"] = config["chunk_size"]
            if name == "linear_loss":
                some = [arrays[k] for k in ("where",) if k in arrays]
                weight = {k: v for k, v in arrays.items() if k == "weight"}

                def rows(x, y, *where):
                    options = {**options_of(config), "reduction": "none"}
                    given = {"where": where[0]} if where else {}
                    x = x[:, : config["c"]]
                    return jaxloss.cross_entropy(x, y, **options, **given, **weight)

                loss = jaxloss.linear_loss(
                    rows, hidden, kernel, y, *some, **both, reduction=config["reduction"],
                    sample_weight=arrays.get("sample_weight"),
                )  # fmt: skip
            else:
                loss = jaxloss.linear_cross_entropy(
                    hidden, kernel, y, num_classes=config["c"], **both, **options_of(config),
                    implementation=config["implementation"], **arrays,
                )  # fmt: skip
            return jnp.sum(loss * ct) if config["reduction"] == "none" else loss, loss

        args = [v for v in operands if v is not None]
        args += labels if config["labels"] == "probabilities" and name != "linear_loss" else []
        by = tuple(range(len(args)))
        (_, loss), grads = jax.value_and_grad(total, by, has_aux=True)(*args)
        return loss, grads, total(*args)[1]

    return jitted(config)(step)


def product_of(config, rng, kinds, n, columns, d):
    """(hidden, kernel, bias or None: [N, D], [D, V], [V] in the dtype, logits, how well known)."""
    dtype, at = jnp.dtype(config["dtype"]), precision(config["dtype"])
    if config["exact"]:
        hidden = rng.integers(-3, 4, (n, d)).astype(float)
        kernel = rng.integers(-24, 25, (d, columns)) / 8
        kernel *= rng.choice([0, 1, 16])
        bias = rng.integers(-24, 25, columns) / 8
    else:
        hidden = rows_of(rng, [k for k in kinds if k in HIDDEN] or HIDDEN[:1], n, d, "float32")
        hidden = np.clip(hidden.astype(float), -64, 64)
        kernel, bias = rng.normal(size=(d, columns)), rng.normal(size=columns)
    hidden, kernel, bias = (v.astype(dtype) for v in (hidden, kernel, bias))
    h, k, b = map(widened, (hidden, kernel, bias))
    b = b if config["bias"] else 0 * b
    off = (d + 2) / 2 * at.eps * (np.abs(h) @ np.abs(k) + np.abs(b))
    if config["exact"]:
        off = 0 * off
    return hidden, kernel, bias if config["bias"] else None, h @ k + b, off


HIDDEN = ["plain", "flat", "peaked", "saturated", "tied", "subnormal", "zero"]


def fuzz_product(of, config, rng, kinds):
    config = {**config, "of": of}
    n, c, d = 6, config["c"], config["d"]
    at, columns = precision(config["dtype"]), c + config["padding"]
    hidden, kernel, bias, x, off = product_of(config, rng, kinds, n, columns, d)
    if config["poison"]:
        hidden[rng.integers(n)] = np.nan if config["logit_softcap"] else rng.choice([INF, np.nan])
    x, off, mask = x[:, :c], off[:, :c], exists_of(config, rng, n, c)
    with np.errstate(invalid="ignore"):
        x = np.where(np.isfinite(widened(hidden)).all(-1)[:, None], x, np.nan)
    off = np.where(np.isnan(x), 0, off)
    asked = asked_of(config, rng, mask)
    arrays = dict(asked.arrays)
    if config["where"] == "classes":
        arrays["where"] = mask
    blocks = -(-c // (config["chunk_size"] or c))
    truth = truth_of(x, mask, asked, at, config["logit_softcap"], off, 2 * blocks)
    ct = random_ct(rng, n, config)
    operands = (hidden, kernel.T.copy() if config["vocab_axis"] == 0 else kernel, bias)
    labels = list(asked.labels)
    with check_dtype(config):
        loss, grads, alone = program_of_product(frozen_of(config))(operands, labels, arrays, ct)
    expected, allowed, factor, nothing = reduced(truth, asked, config["reduction"], ct, at)
    if truth.skip.any():
        return
    for got in (loss, alone):
        assert_allowed(got, expected, allowed, at, "loss")
    # Each logit's slope is rounded to the operands' dtype, and then a term of a sum.
    g = np.where(nothing, 0, factor[:, None] * np.nan_to_num(truth.slopes))
    room = np.abs(factor)[:, None] * truth.slopes_allowed + 4 * at.eps * np.abs(g)
    most = 1 + np.max(asked.z * np.abs(truth.lse) if config["z_loss"] else 0)
    room = rounded(room + 2 * at.tiny * most * (1 + np.abs(factor[:, None])), g, at)
    room = np.where(asked.counts[:, None] & ~truth.bad[:, None] & (not nothing), room, 0)
    if config["dtype"] == "float16" and np.max(np.abs(g)) * 50 > 65504:
        return  # gradients that float16 does not hold
    padded = np.zeros((n, columns - c))
    g, room = (np.concatenate([v, padded], axis=1) for v in (g, room))
    h, k = widened(hidden), widened(kernel)
    bad, some_bad = truth.bad & (not nothing), truth.bad.any() and not nothing
    dh = widened(grads[0])
    want = g @ k.T
    allowed = room @ np.abs(k).T + columns * at.eps * np.abs(g) @ np.abs(k).T
    allowed = rounded(allowed, want, at)
    assert_allowed(dh[~bad], want[~bad], allowed[~bad], at, "d_hidden")
    assert np.isnan(dh[bad]).any(-1).all(), "a bad row's d_hidden"
    if some_bad:  # a sum over tokens that has NaN in it is NaN
        return
    if config["implementation"] == "stored_exponentials":
        # A row's factor multiplies its hidden, which is rounded once more.
        room = rounded(room, g, at)
    h = np.where(asked.counts[:, None], np.nan_to_num(h), 0)
    want, size = h.T @ g, np.abs(h).T @ np.abs(g)
    allowed = rounded(np.abs(h).T @ room + 2 * n * at.eps * size, want, at)
    dk = widened(grads[1])
    dk = dk.T if config["vocab_axis"] == 0 else dk
    assert_allowed(dk, want, allowed, at, "d_kernel")
    if config["bias"]:
        want = g.sum(0)
        allowed = room.sum(0) + 2 * n * at.eps * np.abs(g).sum(0)
        assert_allowed(widened(grads[2]), want, rounded(allowed, want, at), at, "d_bias")


def fuzz_linear_cross_entropy(config, rng, kinds):
    fuzz_product("linear_cross_entropy", config, rng, kinds)


def fuzz_linear_loss(config, rng, kinds):
    # Which tokens count is linear_loss's sample_weight; the loss of a row is what is left.
    config = {**config, "labels": "index", "ignore_index": None, "weight": False}
    config["where"] = "classes" if config["where"] == "classes" else None
    fuzz_product("linear_loss", config, rng, kinds)


LINEAR = {
    **{k: v for k, v in SOFTMAX.items() if k != "layout"},
    "c": [1, 2, 5, 13, 33],
    "d": [1, 4, 9],
    "padding": [0, 0, 3],
    "bias": [False, True],
    "vocab_axis": [0, 1],
    "exact": [False, True],
    "poison": [False, False, False, True],
    "chunk_size": [1, 2, 4, 5, None],
    "implementation": ["token_chunks", "vocab_blocks"],
}
SCHEDULES = {**LINEAR, "implementation": [*LINEAR["implementation"], "stored_exponentials"]}
PLAIN_LINEAR = {
    **{k: v for k, v in PLAIN.items() if k != "layout"},
    "d": 4, "padding": 3, "bias": True, "vocab_axis": 1, "exact": False, "poison": False,
    "chunk_size": 4, "implementation": "token_chunks",
}  # fmt: skip
