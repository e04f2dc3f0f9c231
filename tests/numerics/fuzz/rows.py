"""log_softmax, nll_loss and the statistics."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from oracle.budget import INF, LD, assert_allowed, precision, rounded
from oracle.draw import FINITE, asked_of, rows_of
from oracle.truth import Truth, softmax_rows, statistics_of, widened

import jaxloss
from numerics.fuzz import heads
from numerics.fuzz.logits import (
    AXES,
    check_dtype,
    check_softmax_loss,
    exists_of,
    frozen_of,
    jitted,
    labels_of,
    placed,
    random_ct,
    sanitized,
    unplaced,
)
from numerics.fuzz.product import product_of


def fuzz_log_softmax(config, rng, kinds):
    n, c = (1 if config["layout"] == "one" else 6), config["c"]
    at = precision(config["dtype"])
    x, mask = rows_of(rng, kinds, n, c, config["dtype"]), exists_of(config, rng, n, c)
    ct = rng.normal(size=(n, c)) * rng.choice([0, 1e-3, 1, 30], (n, 1))
    ct = ct.astype(x.dtype)
    given_mask = placed(config, mask, True) if config["where"] == "classes" else None
    with check_dtype(config):
        out, dx = program_of_log_softmax(frozen_of(config))(
            placed(config, x, True), given_mask, placed(config, ct, True)
        )
    rows = softmax_rows(widened(x), mask, at)
    bad, cond = rows.bad[:, None], rows.condition[:, None]
    with np.errstate(all="ignore"):
        expected = np.where(bad & mask, np.nan, -rows.nll)
        room = np.where(np.isfinite(rows.nll), rounded(cond * rows.nll, rows.nll, at), 0)
    # Narrow numbers end before wide ones.
    expected = np.where(np.abs(expected) > LD(float(jnp.finfo(x.dtype).max)), -INF, expected)
    got = unplaced(config, np.asarray(np.asarray(out, np.float64)), c)
    assert_allowed(got, expected, room, at, "log_softmax")
    g = np.where(mask, widened(ct), 0)  # nothing is asked of a class that does not exist
    total = np.sum(g, axis=-1, keepdims=True)
    size = np.sum(np.abs(g), axis=-1, keepdims=True)
    asked = np.any(g != 0, axis=-1)
    want = np.where(mask, g * rows.rest - rows.p * (total - g), 0)
    room = 4 * cond * np.where(mask, np.abs(g) * rows.rest + rows.p * (size - np.abs(g)), 0)
    dx = unplaced(config, np.asarray(np.asarray(dx, np.float64)), c)
    np.testing.assert_array_equal(np.isnan(dx).any(-1), rows.bad & asked)
    keep = ~rows.bad
    room = rounded(room + at.tiny * size, want, at)
    assert_allowed(dx[keep], want[keep], room[keep], at, "d_logits")


@lru_cache(maxsize=64)
def program_of_log_softmax(frozen):
    config = dict(frozen)

    def step(x, mask, ct):
        out, pullback = jax.vjp(
            lambda x: jaxloss.log_softmax(x, AXES[config["layout"]], where=mask), x
        )
        return out, pullback(ct)[0]

    return jitted(config)(step)


@lru_cache(maxsize=64)
def program_of_nll_loss(frozen):
    config = dict(frozen)

    def step(x, labels, arrays, ct):
        def total(x, *probabilities):
            loss = jaxloss.nll_loss(
                x, *(probabilities or labels), axis=AXES[config["layout"]],
                ignore_index=config["ignore_index"], reduction=config["reduction"], **arrays,
            )  # fmt: skip
            return jnp.sum(loss * ct) if config["reduction"] == "none" else loss, loss

        args = labels if config["labels"] == "probabilities" else ()
        (_, loss), grads = jax.value_and_grad(total, tuple(range(1 + len(args))), has_aux=True)(
            x, *args
        )
        return loss, grads

    return jitted(config)(step)


def fuzz_nll_loss(config, rng, kinds):
    """Of log-probabilities that may be any numbers but, where they are asked for, infinite."""
    n, c = (1 if config["layout"] == "one" else 6), config["c"]
    at = precision(config["dtype"])
    kinds = [k if k in FINITE and k != "huge" else "peaked" for k in kinds]
    config = sanitized({**config, "where": config["where"] and "tokens", "label_smoothing": 0.0})
    config |= {"z_loss": 0.0, "logit_softcap": None}
    x, mask = rows_of(rng, kinds, n, c, config["dtype"]), np.ones((n, c), bool)
    asked = asked_of(config, rng, mask)
    ct = random_ct(rng, n, config)
    terms = asked.t * -widened(x)
    bad, zero = asked.wrong, np.zeros((n, c))
    losses = np.where(bad, np.nan, np.where(asked.counts, terms.sum(-1), 0))
    allowed = np.where(asked.counts, (c + 4) * at.eps * np.abs(terms).sum(-1), 0)
    slopes = np.where(asked.counts[:, None], -asked.t, 0)
    few = 4 * at.eps * np.abs(slopes)
    of_labels = np.where(asked.counts[:, None], -widened(x), 0)
    truth = Truth(losses, allowed, slopes, few, of_labels, zero.any(-1), bad)
    arrays = {k: placed(config, v, False) if k != "weight" else v for k, v in asked.arrays.items()}
    labels = tuple(placed(config, y, config["labels"] != "index") for y in asked.labels)
    with check_dtype(config):
        loss, grads = program_of_nll_loss(frozen_of(config))(
            placed(config, x, True), labels, arrays, placed(config, ct, False)
        )
    check_softmax_loss(config, asked, truth, ct, at, loss, grads, c)


@lru_cache(maxsize=64)
def program_of_stats(frozen):
    config = dict(frozen)
    options = {k: config[k] for k in ("ignore_index", "temperature", "logit_softcap")}

    def step(operands, frozen, labels, arrays, cts):
        def stats(args):
            if config["linear"]:
                hidden, trained = args
                return jaxloss.linear_token_stats(
                    hidden, heads.kernel_of(config, trained, frozen), labels_of(config, labels),
                    num_classes=config["c"], chunk_size=config["chunk_size"],
                    implementation=config["implementation"], **heads.options_of_kernel(config),
                    **options, **arrays,
                )  # fmt: skip
            return jaxloss.token_stats(
                args, labels_of(config, labels), axis=AXES[config["layout"]], **options, **arrays
            )

        def total(args, by):
            out = stats(args)
            return sum(jnp.sum(v * c) for v, c in zip(out[:3], by, strict=True)), out

        one = (True, False, False), (False, True, False), (False, False, True)
        grads = []
        for some in one:
            by = [c if s else jnp.zeros_like(c) for s, c in zip(some, cts, strict=True)]
            (_, out), g = jax.value_and_grad(total, has_aux=True)(operands, by)
            grads.append(g)
        return out, grads

    return jitted(config)(step)


def expected_rank(x, y):
    order = np.lexsort((np.arange(x.size), -x))
    return int(np.flatnonzero(order == y)[0])


def fuzz_stats(linear, config, rng, kinds):
    config = {**config, "linear": linear, "weight": False, "sample_weight": None}
    config |= {"label_smoothing": 0.0, "z_loss": 0.0, "reduction": "none"}
    n, c = (1 if config.get("layout") == "one" else 6), config["c"]
    at = heads.precisions(config)[0] if linear else precision(config["dtype"])
    if config["logit_softcap"]:  # caps at the cap, where all classes may tie
        kinds = [k if k not in ("inf", "nothing") else "impossible" for k in kinds]
    if config["temperature"] != 1:
        kinds = [k if k != "huge" else "peaked" for k in kinds]  # a rounding of 1e29
    if config["dtype"] != "float16":  # processors flush them, and then they tie
        kinds = [k if k != "subnormal" else "flat" for k in kinds]
    blocks, place, frozen = 1, partial(placed, config), None
    if linear:
        config |= {"exact": True, "bias": False, "padding": 1, "layout": "last"}
        hidden, head, _, (x, _) = product_of(config, rng, kinds, n, c + 1, config["d"])
        x, blocks = x[:, :c], 2 * -(-c // (config["chunk_size"] or c))
        operands, frozen = (heads.hidden_of(config, hidden), head.trained), head.frozen
        place = lambda v, _: heads.per_head(config, v)  # noqa: E731
    else:
        xs = rows_of(rng, kinds, n, c, config["dtype"])
        x, operands = widened(xs), placed(config, xs, True)
    mask = exists_of(config, rng, n, c)
    asked = asked_of(config, rng, mask)
    arrays = dict(asked.arrays)
    if config["where"] == "classes":
        arrays["where"] = mask
    arrays = {k: place(v, v.ndim > 1) for k, v in arrays.items()}
    cts = [random_ct(rng, n, config) for _ in range(3)]
    labels = tuple(place(y, config["labels"] == "probabilities") for y in asked.labels)
    if config["layout"] == "middle" and config["labels"] not in ("index", "probabilities"):
        labels = tuple(y.reshape(2, -1, y.shape[-1]) for y in asked.labels)
    with check_dtype(config):
        out, grads = program_of_stats(frozen_of(config))(
            operands, frozen, labels, arrays, [place(c, False) for c in cts]
        )
    rows, values, rooms, slopes, slope_rooms = statistics_of(
        x, mask, asked, at, config["logit_softcap"], config["temperature"], blocks
    )
    counts, bad = asked.counts, rows.bad & asked.counts
    got = {name: np.asarray(v).reshape(-1) for name, v in out._asdict().items()}
    empty = np.all(np.where(mask, x, -INF) == -INF, axis=-1)
    for i, name in enumerate(("log_prob", "logsumexp", "entropy")):
        nan = bad | (asked.wrong if i == 0 or config["labels"] == "index" else False)
        expected = np.where(nan, np.nan, np.where(counts, values[i], 0))
        if i == 1:  # of nothing it is -inf
            expected = np.where(nan & np.isneginf(got[name]) & empty, -INF, expected)
        if i and config["labels"] not in ("index", "probabilities"):
            got[name] = np.where(asked.wrong, expected, got[name])
        assert_allowed(got[name], expected, np.where(counts, rooms[i], 0), at, name)
    seen = np.where(mask, x, -INF)
    best = np.argmax(np.where(np.isnan(seen), 0, seen), axis=-1)
    hidden_nan = np.any(mask & (np.isnan(x) | (x == INF)), axis=-1)
    predicted = counts & ~hidden_nan & ~empty
    np.testing.assert_array_equal(got["prediction"], np.where(predicted, best, -1), "prediction")
    top = rows.p.max(axis=-1)
    sure = counts & ~bad & ~asked.wrong
    room = rows.condition * top + 4 * at.eps * top
    assert_allowed(got["confidence"][sure], top[sure], room[sure], at, "confidence")
    np.testing.assert_array_equal(got["confidence"][~counts], 0)
    if config["labels"] == "index":
        rank = [
            expected_rank(row, y) if ok else -1
            for row, y, ok in zip(
                seen, np.ravel(asked.labels[0]), predicted & ~asked.wrong, strict=True
            )
        ]
        np.testing.assert_array_equal(got["rank"], rank, "rank")
    for i, g in enumerate(grads):
        factor = np.where(counts, cts[i].astype(LD), 0)[:, None]
        keep = ~(bad | asked.wrong)
        want, room = factor * slopes[i], factor * slope_rooms[i] + 4 * at.eps * np.abs(slopes[i])
        want, room = (np.where(counts[:, None], v, 0) for v in (want, room))
        # A probability that is 0 for lack of floats may have weighed as much as its logarithm.
        floor = at.tiny * (at.reach if i == 2 else 1) / config["temperature"]
        room = rounded(room + floor * (1 + np.abs(factor)), want, at)
        if not linear:
            g = unplaced(config, np.asarray(np.asarray(g, np.float64)), c)
            assert_allowed(g[keep], want[keep], room[keep], at, f"slope {i}")
            continue
        of_logits = heads.Near(want, room)
        heads.check_gradients(config, hidden, head, keep, counts, g, of_logits)


def fuzz_token_stats(config, rng, kinds):
    fuzz_stats(False, config, rng, kinds)


def fuzz_linear_token_stats(config, rng, kinds):
    fuzz_stats(True, config, rng, kinds)
