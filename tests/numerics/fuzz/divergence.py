"""kl_divergence and linear_kl_divergence."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from oracle.budget import INF, LD, assert_allowed, precision, rounded
from oracle.divergence import exact as exact_divergence
from oracle.divergence import known
from oracle.draw import rows_of, weights_of
from oracle.truth import widened

import jaxloss
from numerics.fuzz import heads
from numerics.fuzz.logits import check_dtype, exists_of, frozen_of, jitted, random_ct
from numerics.fuzz.product import product_of


@lru_cache(maxsize=64)
def program_of_divergence(frozen):
    config = dict(frozen)
    options = {k: config[k] for k in ("divergence", "beta", "temperature", "reduction")}

    def step(operands, frozen, arrays, ct):
        def total(operands):
            if frozen is None:
                loss = jaxloss.kl_divergence(*operands, **options, **arrays)
            else:
                of_sides = zip(sides_of(config), operands, frozen, strict=True)
                student, teacher = (
                    (hidden, heads.kernel_of(side, trained, rest))
                    for side, (hidden, trained), rest in of_sides
                )
                axes, other = map(heads.options_of_kernel, sides_of(config))
                loss = jaxloss.linear_kl_divergence(
                    *student, *teacher, num_classes=config["c"], chunk_size=config["chunk_size"],
                    teacher_vocab_axis=other["vocab_axis"], **axes, **options, **arrays,
                )  # fmt: skip
            return jnp.sum(loss * ct) if config["reduction"] == "none" else loss, loss

        (_, loss), grads = jax.value_and_grad(total, has_aux=True)(operands)
        return loss, grads

    return jitted(config)(step)


def sides_of(config):
    """Of the student and of the teacher."""
    axis = config["teacher_vocab_axis"]
    return config, {**config, "head": config["teacher"], "vocab_axis": axis}


def fuzz_divergence(linear, config, rng, kinds):
    n, c, dtype = 4, config["c"], config["dtype"]
    at = heads.precisions(config)[0] if linear else precision(dtype)
    mask, frozen, place = exists_of(config, rng, n, c), None, lambda v: v
    if linear:
        config = {**config, "exact": True, "bias": False}
        place = partial(heads.per_head, config)
        drawn = [
            product_of(side, rng, kinds, n, c + pad, config["d"])
            for side, pad in zip(sides_of(config), (1, 0), strict=True)
        ]
        operands = [(heads.hidden_of(config, hidden), head.trained) for hidden, head, *_ in drawn]
        frozen = [head.frozen for _, head, *_ in drawn]
        x, t = (logits.value[:, :c] for *_, logits in drawn)
    else:
        x, t = (rows_of(rng, kinds, n, c, dtype) for _ in range(2))
        near = rng.random(n) < 0.4
        away = widened(t) + rng.normal(size=(n, c)) * 10.0 ** rng.integers(-6, 1, (n, 1))
        x = np.where(near[:, None], away.astype(x.dtype), x)
        x = np.where((rng.random(n) < 0.1)[:, None], t, x)
        operands = (x, t)
        x, t = widened(x), widened(t)
    arrays, s, counts = {}, np.ones(n, LD), np.ones(n, bool)
    if config["where"] == "classes":
        arrays["where"] = mask
    elif config["where"] == "tokens":
        arrays["where"] = rng.random(n) < 0.7
        counts &= arrays["where"]
    if config["sample_weight"]:
        v = weights_of(rng, n)
        v = v > 0 if config["sample_weight"] == "bool" else v
        arrays["sample_weight"], s = v, v.astype(LD)
        counts &= v != 0
    ct = random_ct(rng, n, config)
    with check_dtype(config):
        loss, grads = program_of_divergence(frozen_of(config))(
            operands, frozen, {k: place(v) for k, v in arrays.items()}, place(ct)
        )
    x, t = (np.where(mask, v, -INF) for v in (x, t))
    bad = np.zeros(n, bool)
    for v in (x, t):
        bad |= np.any(np.isnan(v) | (v == INF), axis=-1) | np.all(v == -INF, axis=-1)
    options = {k: config[k] for k in ("divergence", "beta", "temperature")}
    safe = ~bad & counts
    found = exact_divergence(
        *(np.where(safe[:, None], v, 0).astype(np.float64) for v in (x, t)), **options
    )
    temperature = config["temperature"]
    with np.errstate(invalid="ignore"):
        spread = np.max([np.ptp(np.where(v > -INF, v, np.max(np.where(v < INF, v, -INF), -1,
                         keepdims=True)), axis=-1) for v in (x, t)], axis=0)  # fmt: skip
    spread = np.where(safe, spread, 0) / temperature
    # XLA:CPU's log1p of float64 is off by 118 eps between -0.41 and -0.35, in jax 0.10.
    of_log1p = 128 if at.eps < 1e-10 else 0
    relative = at.eps * (np.minimum(spread, at.reach) + 16 + c / 2 + of_log1p)
    losses = np.where(bad & counts, np.nan, np.where(counts, s * found.loss, 0))
    allowed = np.where(safe, s * (relative * abs(found.loss) + 2 * c * at.tiny + 1e-110), 0)
    nothing = False
    with np.errstate(invalid="ignore"):
        if config["reduction"] == "none":
            expected, factor = losses, ct.astype(LD) * s
        else:
            few = (n / 2 + 4) * at.eps
            expected, factor = losses.sum(), s
            allowed = np.nansum(allowed) + few * np.abs(expected)
            if config["reduction"] == "mean":
                share = np.sum(np.where(counts, s, 0))
                nothing = share == 0
                share = np.nan if nothing else share
                expected, allowed, factor = expected / share, allowed / share, s / share
                allowed = allowed + few * np.abs(expected)
        allowed = np.where(np.isfinite(allowed), allowed, 0)
    assert_allowed(np.reshape(loss, np.shape(expected)), expected, allowed, at, "loss")
    finite = np.isfinite(np.where(counts, found.loss, 0)) & ~bad
    shares = (None, None)
    if config["divergence"] == "jensen_shannon":
        shares = config["beta"], 1 - config["beta"]
    for i, g in enumerate(grads):
        want = np.where(finite[:, None], found.slopes[i], 0)
        of_a = (4 + of_log1p) * at.eps * known(found.apart, shares[i])[:, None]
        of_a = of_a * found.room[i]
        room = relative[:, None] * np.abs(want) + of_a / temperature
        room = room + 2 * c * at.tiny * (1 + np.where(np.isfinite(found.apart), found.apart, 0))[
            :, None
        ] / temperature  # fmt: skip
        scale = np.where(counts & (not nothing), factor, 0)[:, None]
        want, room = scale * want, np.abs(scale) * room + 4 * at.eps * np.abs(scale * want)
        room = rounded(room + 1e-110, want, at)  # 120 digits are the truth's
        if not linear:
            got = np.asarray(np.asarray(g, np.float64))
            assert_allowed(got[finite], want[finite], room[finite], at, f"slope {i}")
            continue
        side, of_logits = sides_of(config)[i], heads.Near(want, room)
        heads.check_gradients(side, *drawn[i][:2], finite, counts, g, of_logits)


def fuzz_kl_divergence(config, rng, kinds):
    fuzz_divergence(False, config, rng, kinds)


def fuzz_linear_kl_divergence(config, rng, kinds):
    fuzz_divergence(True, config, rng, kinds)


SIDES = {
    **heads.HEADS,
    "teacher": heads.HEADS["head"],
    "vocab_axis": [1, 0],
    "teacher_vocab_axis": [1, 0],
}
