"""linear_cross_entropy and linear_loss."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from oracle.budget import INF, assert_allowed, rounded
from oracle.draw import asked_of, rows_of
from oracle.truth import reduced, truth_of, widened

import jaxloss
from numerics.fuzz import heads
from numerics.fuzz.logits import (
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

    def step(operands, frozen, labels, arrays, ct):
        def total(operands, probabilities):
            hidden, trained, bias = operands
            kernel = heads.kernel_of(config, trained, frozen)
            y = labels_of(config, probabilities or labels)
            both = {"bias": bias, "chunk_size": config["chunk_size"]}
            both |= heads.options_of_kernel(config)
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

        differentiated = config["labels"] == "probabilities" and name != "linear_loss"
        args = operands, labels if differentiated else []
        (_, loss), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(*args)
        return loss, grads[0], total(*args)[1]

    return jitted(config)(step)


def product_of(config, rng, kinds, n, columns, d):
    """(hidden of each row [N, D] in the dtype, head, bias or None: [K, V], their logits, in 80 bits
    of the operands as they are multiplied)."""
    dtype = jnp.dtype(config["dtype"])

    def draw(n):
        if config["exact"]:
            return rng.integers(-3, 4, (n, d)).astype(dtype)
        some = [k for k in kinds if k in HIDDEN] or HIDDEN[:1]
        rows = rows_of(rng, some, n, d, "float32")
        return np.clip(rows.astype(float), -64, 64).astype(dtype)

    hidden = heads.rows_of_hidden(config, draw, n)
    head = heads.draw_head(config, rng, d, columns)
    shape = heads.number_of_heads(config), columns
    bias = rng.integers(-24, 25, shape) / 8 if config["exact"] else rng.normal(size=shape)
    bias = bias.astype(dtype)
    h, b = heads.cast(config, hidden), widened(bias) * config["bias"]
    logits = heads.logits_of(config, head, h, b)
    return hidden, head, bias if config["bias"] else None, logits


HIDDEN = ["plain", "flat", "peaked", "saturated", "tied", "subnormal", "zero"]


def fuzz_product(of, config, rng, kinds):
    config = {**config, "of": of}
    n, c, d = 6, config["c"], config["d"]
    (at, own), columns = heads.precisions(config), c + config["padding"]
    hidden, head, bias, (x, off) = product_of(config, rng, kinds, n, columns, d)
    k = len(head.merged)
    if config["poison"]:
        first = rng.integers(n)
        first, many = (first - first % k, k) if config["heads"] == "shared" else (first, 1)
        hidden[first : first + many] = (
            np.nan if config["logit_softcap"] else rng.choice([INF, np.nan])
        )
    x, off, mask = x[:, :c], off[:, :c], exists_of(config, rng, n, c)
    with np.errstate(invalid="ignore"):
        x = np.where(np.isfinite(widened(hidden)).all(-1)[:, None], x, np.nan)
    off = np.where(np.isnan(x), 0, off)
    asked = asked_of(config, rng, mask)
    arrays = {name: v if name == "weight" else heads.per_head(config, v)
              for name, v in asked.arrays.items()}  # fmt: skip
    if config["where"] == "classes":
        arrays["where"] = heads.per_head(config, mask)
    blocks = -(-c // (config["chunk_size"] or c))
    truth = truth_of(x, mask, asked, at, config["logit_softcap"], off, 2 * blocks)
    ct = random_ct(rng, n, config)
    of_heads = bias if bias is None or config["heads"] else bias[0]
    operands = heads.hidden_of(config, hidden), head.trained, of_heads
    labels = [heads.per_head(config, y) for y in asked.labels]
    with check_dtype(config):
        loss, grads, alone = program_of_product(frozen_of(config))(
            operands, head.frozen, labels, arrays, heads.per_head(config, ct)
        )
    expected, allowed, factor, nothing = reduced(truth, asked, config["reduction"], ct, at)
    if truth.skip.any():
        return
    for got in (loss, alone):
        assert_allowed(np.reshape(got, np.shape(expected)), expected, allowed, at, "loss")
    # Each logit's slope is rounded to the products' dtype, and then a term of a sum.
    g = np.where(nothing, 0, factor[:, None] * np.nan_to_num(truth.slopes))
    room = np.abs(factor)[:, None] * truth.slopes_allowed + 4 * at.eps * np.abs(g)
    most = 1 + np.max(asked.z * np.abs(truth.lse) if config["z_loss"] else 0)
    room = rounded(room + 2 * at.tiny * most * (1 + np.abs(factor[:, None])), g, at)
    room = np.where(asked.counts[:, None] & ~truth.bad[:, None] & (not nothing), room, 0)
    if "float16" in (config["dtype"], config["products"]) and np.max(np.abs(g)) * 50 > 65504:
        return  # gradients that float16 does not hold
    padded = np.zeros((n, columns - c))
    g, room = (np.concatenate([v, padded], axis=1) for v in (g, room))
    bad, some_bad = truth.bad & (not nothing), truth.bad.any() and not nothing
    dh = widened(grads[0]).reshape(-1, d)
    want, allowed = heads.hidden_gradient(config, head, g, room)
    if config["heads"] == "shared":
        bad = bad.reshape(-1, k).any(1)
    assert_allowed(dh[~bad], want[~bad], allowed[~bad], at, "d_hidden")
    assert np.isnan(dh[bad]).any(-1).all(), "a bad row's d_hidden"
    if some_bad:  # a sum over tokens that has NaN in it is NaN
        return
    if config["implementation"] == "stored_exponentials":
        # A row's factor multiplies its hidden, which is rounded once more.
        room = rounded(room, g, at)
    h = heads.cast(config, hidden)
    h = np.where(asked.counts[:, None], np.nan_to_num(h), 0)
    heads.check_kernel_gradient(config, head, h, g, room, grads[1])
    if config["bias"]:
        each, size, room = (heads.by_head(v, k).sum(1) for v in (g, np.abs(g), room))
        allowed = rounded(room + 2 * n * at.eps * size, each, own)
        each, allowed = (v if config["heads"] else v[0] for v in (each, allowed))
        assert_allowed(widened(grads[2]), each, allowed, at, "d_bias")


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
    **heads.HEADS,
}
SCHEDULES = {**LINEAR, "implementation": [*LINEAR["implementation"], "stored_exponentials"]}
