"""Log-probabilities of named classes, the most likely ones, samples, and losses of statistics.

Products are with the identity, made of what a head is made of, and exact, of finite rows.
"""

from functools import lru_cache, partial

import jax
import numpy as np
from oracle.budget import INF, assert_allowed, precision, rounded
from oracle.draw import FINITE, rows_of
from oracle.truth import softmax_rows, widened

import jaxloss
from numerics.fuzz import heads
from numerics.fuzz.logits import check_dtype, frozen_of, jitted

N = 6
NAMED = {
    "c": [1, 2, 5, 12, 40],
    "k": [1, 3],
    "dtype": ["float32", "bfloat16", "float16", "float64"],
    "where": [None, "classes"],
    "chunk_size": [None, 1, 4],
    "way": ["jit", "quick"],
}
NAMED_LINEAR = {**NAMED, **heads.HEADS, "vocab_axis": [1, 0]}


@lru_cache(maxsize=64)
def program_of_log_probs(frozen):
    config = dict(frozen)
    name, chunk = config["name"], config["chunk_size"]

    def of(x, head, mask, indices):
        options = {} if mask is None else {"where": mask}
        if name == "log_probs_at":
            return jaxloss.log_probs_at(x, indices, return_rest=True, **options)
        eye = heads.kernel_of(config, *head)
        options |= {"chunk_size": chunk, **heads.options_of_kernel(config)}
        if name == "linear_log_probs_at":
            return jaxloss.linear_log_probs_at(x, eye, indices, return_rest=True, **options)
        if name == "linear_top_k":
            return jaxloss.linear_top_k(x, eye, min(config["k"], config["c"]), **options)
        if name == "linear_sample":
            return jaxloss.linear_sample(jax.random.key(3), x, eye, num_samples=2, **options)
        loss = lambda stats: (-stats.log_prob, (stats.logsumexp, stats.entropy))  # noqa: E731
        options |= {"has_aux": True, "reduction": "none"}
        return jaxloss.linear_stats_loss(loss, x, eye, indices[..., 0], **options)

    def step(x, head, mask, indices, ct):
        if name in ("linear_top_k", "linear_sample"):
            return of(x, head, mask, indices), None
        out, pullback, *_ = jax.vjp(lambda x: of(x, head, mask, indices)[0], x)
        return of(x, head, mask, indices), pullback(ct[..., 0] if out.ndim < ct.ndim else ct)[0]

    return jitted(config)(step)


def drawn(name, config, rng, kinds):
    """(config's program's answer, rows, indices, cotangents, precision)."""
    c, at = config["c"], precision(config["dtype"])
    linear, head, place = name != "log_probs_at", None, lambda x: x
    if linear:
        kinds = [kind for kind in kinds if kind in FINITE] or ["plain"]
        at, place = heads.precisions(config)[0], partial(heads.per_head, config)
        made = heads.identity_head(config, c)
        head = made.trained, made.frozen

    def draw(n):
        return rows_of(rng, kinds, n, c, config["dtype"])

    x = heads.rows_of_hidden(config, draw, N) if linear else draw(N)
    mask = np.ones((N, c), bool)
    if config["where"]:
        mask = rng.random((N, c)) < 0.7
        mask[np.arange(N), rng.integers(0, c, N)] = True
    indices = rng.integers(0, c, (N, config["k"])).astype(np.int32)
    if name == "linear_stats_loss":
        indices[:, 0] = [rng.choice(np.flatnonzero(row)) for row in mask]
    else:
        indices[rng.random(indices.shape) < 0.2] = -100
        indices[rng.random(indices.shape) < 0.05] = c
    wide = np.float64 if config["dtype"] == "float64" else np.float32
    ct = rng.normal(size=indices.shape).astype(wide)
    given = mask if config["where"] else None
    program = program_of_log_probs(frozen_of({**config, "name": name}))
    hidden = heads.hidden_of(config, x) if linear else x
    with check_dtype(config):
        out, dx = program(hidden, head, *jax.tree.map(place, (given, indices, ct)))
    if linear and config["heads"]:
        out = jax.tree.map(lambda v: np.reshape(v, (N, *v.shape[2:])), out)
    read = heads.cast(config, x) if linear else widened(x)
    return (out, dx), softmax_rows(read, mask, at), mask, indices, ct, at


def check_slopes(name, config, dx, want, room, sure, at):
    """Of the logits, which are those of hidden."""
    if name != "log_probs_at":
        room = rounded(room, want, heads.precisions(config)[1])
    if name != "log_probs_at" and config["heads"] == "shared":
        want, room = (x.reshape(-1, 2, x.shape[-1]) for x in (want, room))
        room = room.sum(1) + 2 * at.eps * np.abs(want).sum(1)
        want, sure = want.sum(1), sure.reshape(-1, 2).all(1)
        room = rounded(room, want, heads.precisions(config)[1])
    dx = widened(dx).reshape(want.shape)
    assert_allowed(dx[sure], want[sure], room[sure], at, "d_hidden")


def check_named(name, config, rng, kinds):
    ((found, rest), dx), rows, mask, indices, ct, at = drawn(name, config, rng, kinds)
    c, ct = config["c"], widened(ct)
    taken, wrong = indices != -100, indices >= c
    some, inside = taken.any(-1), taken & ~wrong
    index = np.where(inside, indices, 0)
    nll = np.take_along_axis(rows.nll, index, -1)
    nan = (rows.bad[:, None] & taken) | wrong
    expected = np.where(nan, np.nan, np.where(taken, -nll, -INF))
    expected = np.where(some[:, None], expected, 0)
    known = np.isfinite(expected) & some[:, None]
    some_nll = np.where(known, nll, 0)
    room = np.where(known, rounded(rows.condition[:, None] * some_nll, some_nll, at), 0)
    assert_allowed(found, expected, room, at, name)

    named = np.zeros((len(index), c), bool)
    np.logical_or.at(named, (np.arange(len(index))[:, None], index), inside)
    with np.errstate(all="ignore"):
        parts = [np.sum(np.where(v, rows.p, 0), -1) for v in (named, ~named & mask)]
        expected = np.log(parts[1]) - np.log(parts[0] + parts[1])
        # Of next to nothing that is named: log1p of it.
        expected = np.where(parts[0] < 0.5, np.log1p(-parts[0] / np.sum(parts, 0)), expected)
        apart = np.abs(np.log(parts[0]) - np.log(parts[1]))
    row_is_nan = (rows.bad | wrong.any(-1)) & some
    expected = np.where(row_is_nan, np.nan, np.where(some, expected, 0))
    # Sums that end below the smallest float are 0.
    reached = some & ~row_is_nan & np.isfinite(expected) & (apart < at.reach / 2)
    room = 4 * rows.condition * (np.abs(expected) + np.minimum(1, np.where(reached, apart, 0)))
    if not np.any(reached):
        reached[:] = False
    assert_allowed(
        np.asarray(rest)[reached], expected[reached], room[reached] + at.tiny, at, "rest"
    )
    np.testing.assert_array_equal(np.isnan(rest), row_is_nan)

    # An index that is ignored, or out of range, asks for nothing.
    g = np.zeros((len(index), c), rows.nll.dtype)
    np.add.at(g, (np.arange(len(index))[:, None], index), np.where(inside, ct, 0))
    g = np.where(mask, g, 0)
    size = np.zeros_like(g)
    np.add.at(size, (np.arange(len(index))[:, None], index), np.where(inside, np.abs(ct), 0))
    sure = ~rows.bad & ~wrong.any(-1) & np.isfinite(np.where(inside, nll, 0)).all(-1)
    ct_sum = np.sum(np.where(inside, ct, 0), -1, keepdims=True)
    ct_size = np.sum(np.where(inside, np.abs(ct), 0), -1, keepdims=True)
    want = np.where(mask, g * rows.rest - rows.p * (ct_sum - g), 0)
    room = 4 * rows.condition[:, None] * (size * rows.rest + rows.p * (ct_size - size + at.tiny))
    room = rounded(room + at.tiny * ct_size, want, at)
    check_slopes(name, config, dx, want, room, sure, at)


def fuzz_log_probs_at(config, rng, kinds):
    check_named("log_probs_at", config, rng, kinds)


def fuzz_linear_log_probs_at(config, rng, kinds):
    check_named("linear_log_probs_at", config, rng, kinds)


def fuzz_linear_top_k(config, rng, kinds):
    ((index, found), _), rows, _, _, _, at = drawn("linear_top_k", config, rng, kinds)
    order = np.argsort(rows.nll, axis=-1, kind="stable")[:, : index.shape[-1]]
    nll = np.take_along_axis(rows.nll, order, -1)
    exists = np.isfinite(nll)
    some_nll = np.where(exists, nll, 0)
    room = np.where(exists, rounded(rows.condition[:, None] * some_nll, some_nll, at), 0)
    assert_allowed(found, np.where(exists, -nll, -INF), room, at, "log_probs")
    # Two that are nearer than the rounding may stand in either order.
    given = np.take_along_axis(rows.nll, np.maximum(index, 0), -1)
    np.testing.assert_array_equal(np.asarray(index) == -100, ~exists)
    with np.errstate(invalid="ignore"):
        assert np.all((np.abs(given - nll) <= 2 * room) | ~exists)
    of_rows = [row[row >= 0] for row in np.asarray(index)]
    assert all(len(np.unique(row)) == len(row) for row in of_rows)


def fuzz_linear_sample(config, rng, kinds):
    ((index, found), _), rows, mask, _, _, at = drawn("linear_sample", config, rng, kinds)
    assert np.take_along_axis(mask, np.asarray(index), -1).all()
    nll = np.take_along_axis(rows.nll, np.asarray(index), -1)
    assert_allowed(found, -nll, rounded(rows.condition[:, None] * nll, nll, at), at, "log_probs")


def fuzz_linear_stats_loss(config, rng, kinds):
    given = drawn("linear_stats_loss", config, rng, kinds)
    ((loss, (lse, entropy)), dx), rows, mask, indices, ct, at = given
    index = indices[:, :1]
    nll = np.take_along_axis(rows.nll, index, -1)[:, 0]
    sure = np.isfinite(nll)
    room = rounded(rows.condition * nll, nll, at)
    assert_allowed(np.asarray(loss)[sure], nll[sure], room[sure], at, "loss")
    assert_allowed(lse, rows.lse, rounded(rows.lse_error, rows.lse, at), at, "logsumexp")
    g = np.zeros(mask.shape, rows.nll.dtype)
    np.put_along_axis(g, index, -ct[:, :1], -1)
    total, size = -ct[:, :1], np.abs(ct[:, :1])
    want = np.where(mask, g * rows.rest - rows.p * (total - g), 0)
    room = np.abs(g) * rows.rest + rows.p * (size - np.abs(g))
    room = rounded(4 * rows.condition[:, None] * room + at.tiny * size, want, at)
    check_slopes("linear_stats_loss", config, dx, want, room, sure, at)
    assert np.all(np.isfinite(entropy))
