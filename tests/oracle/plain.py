"""Every loss as one would write it in jnp, for JAX to differentiate in float64.

Of a configuration, the operands that are differentiated and the other arrays (``data``): a number.
``cross_entropy`` is the same for tests, with the library's own arguments.
"""

import jax
import jax.numpy as jnp
import numpy as np


def surprises(x, exists):
    """``-log softmax(x)[N, C]`` that cancels nowhere; 0 where a class does not exist."""
    x = jnp.where(exists, x, 0)
    apart = x[:, None, :] - x[:, :, None]  # [n, c, j]: x_j - x_c
    others = exists[:, None, :] & exists[:, :, None] & ~np.eye(x.shape[1], dtype=bool)
    terms = jnp.where(others, jnp.exp(jnp.where(others, apart, 0)), 0)
    return jnp.where(exists, jnp.log1p(jnp.sum(terms, axis=-1)), 0)


def merged(config, trained, frozen, factor=2.0):
    """The kernel ``[D, V]`` of the arrays that it is made of: those of the fuzzer's heads."""
    arrays = {**frozen, **trained}
    base = arrays.get("kernel", arrays.get("values")).astype(float)
    base = base.T if config["vocab_axis"] == 0 else base
    if "scale" in arrays:
        scale = arrays["scale"].reshape(-1, base.shape[1])
        base = base * jnp.repeat(scale, len(base) // len(scale), axis=0)
    if "a" in arrays:
        base = base + arrays.get("factor", factor) * arrays["a"] @ arrays["b"]
    return base


def rows_of_logits(config, operands, data):
    """``[N, C]``, capped and divided, 0 where a token does not count or a class does not exist."""
    if config["linear"]:
        hidden = jnp.where(data["counts"][:, None], operands["hidden"], 0)
        kernel = merged(config, operands["kernel"], data["frozen"])
        x = hidden @ kernel + (operands["bias"] if config["bias"] else 0)
        x = x[:, : config["c"]]
    else:
        x = operands["logits"]
    x = jnp.where(data["exists"] & data["counts"][:, None], x, 0)
    cap, temperature = config["logit_softcap"], config["temperature"]
    return (x if cap is None else cap * jnp.tanh(x / cap)) / temperature


def asked(config, operands, data):
    """What each class is asked for ``[N, C]``, and the one class of all that are not named."""
    exists, c, kind = data["exists"], config["c"], config["labels"]
    if kind == "index":
        return jax.nn.one_hot(data["labels"], c, dtype=float), None
    if kind == "probabilities":
        return jnp.where(data["counts"][:, None], operands["labels"], 0), None
    hot = jax.nn.one_hot(data["labels"], c, dtype=float)
    t = jnp.einsum("nk,nkc->nc", operands["labels"], hot)
    others = exists & (hot.sum(1) == 0)
    left = jnp.where(others.any(-1), 1 - jnp.einsum("nk,nk->n", operands["labels"], hot.sum(2)), 0)
    if kind == "uniform":
        t += others * (left / jnp.maximum(others.sum(-1), 1))[:, None]
    return t, (others, left) if kind == "bucket" else None


def statistics(config, operands, data):
    x, exists = rows_of_logits(config, operands, data), data["exists"]
    nll = surprises(x, exists)
    t, bucket = asked(config, operands, data)
    lse = jax.nn.logsumexp(x, axis=-1, where=exists)
    entropy = jnp.sum(jnp.where(exists, jnp.exp(-nll) * nll, 0), axis=-1)
    return -jnp.sum(t * nll, axis=-1) - of_bucket(nll, bucket), lse, entropy


def of_bucket(nll, bucket):
    if bucket is None:
        return 0.0
    others, left = bucket
    p = jnp.sum(jnp.where(others, jnp.exp(-nll), 0), axis=-1)
    return left * -jnp.log(jnp.where(others.any(-1), p, 1))


def of_statistics(stats, data):
    """A function of them that is curved in each."""
    log_prob, lse, entropy = (jnp.where(data["counts"], v, 0) for v in stats)
    return jnp.sum(data["ct"] * (jnp.sin(log_prob) + entropy**2 + entropy * lse))


def curved_statistics(config, operands, data):
    return of_statistics(statistics(config, operands, data), data)


def softmax_losses(config, operands, data):
    """(losses of all tokens, what each adds to the mean's denominator)."""
    x, exists, c = rows_of_logits(config, operands, data), data["exists"], config["c"]
    nll = surprises(x, exists)
    t, bucket = asked(config, operands, data)
    w = operands["weight"] if config["weight"] else jnp.ones(c)
    label_weight = jnp.einsum("nc,c->n", t, w) if config["labels"] == "index" else jnp.ones(len(t))
    label_weight = jnp.where(data["counts"], label_weight, 1)
    eps = config["label_smoothing"]
    uniform = exists / exists.sum(-1, keepdims=True)
    losses = jnp.einsum("nc,c,nc->n", (1 - eps) * t + eps * uniform, w, nll)
    losses += of_bucket(nll, bucket)
    if config["of"] == "focal_loss":
        one = jnp.sum(t * nll, axis=-1)
        wrong = -jnp.expm1(-jnp.where(one > 0, one, 1))
        losses = jnp.where(one > 0, wrong ** config["gamma"], config["gamma"] == 0) * losses
    if config["of"] == "nll_loss":
        losses = -jnp.einsum("nc,c,nc->n", t, w, x)
    losses += label_weight * config["z_loss"] * jax.nn.logsumexp(x, axis=-1, where=exists) ** 2
    return losses, 1.0 if config["of"] == "linear_loss" else label_weight


def softmax_loss(config, operands, data):
    losses, share = softmax_losses(config, operands, data)
    total = total_of(config, losses, operands, data, share)
    if config["stats"]:
        total += of_statistics(statistics(config, operands, data), data)
    return total


def total_of(config, losses, operands, data, share=1.0):
    out = reduced(config, losses, operands, data, share)
    return jnp.sum(data["ct"] * out) if config["reduction"] == "none" else out


def reduced(config, losses, operands, data, share=1.0):
    s = operands["sample_weight"] if config["sample_weight"] == "float" else 1.0
    losses = jnp.where(data["counts"], s * losses, 0)
    if config["reduction"] == "none":
        return losses
    share = jnp.sum(jnp.where(data["counts"], s * share, 0)) if config["reduction"] == "mean" else 1
    return jnp.sum(losses) / share


def log_softmax(config, operands, data):
    return -jnp.sum(surprises(rows_of_logits(config, operands, data), data["exists"]) * data["ct"])


def sigmoid_loss(config, operands, data):
    x = jnp.where(data["counts"], operands["logits"], 0)
    y = operands["labels"] if config["labels"] == "probabilities" else data["labels"]
    y = jnp.where(data["counts"], y, 0) * 1.0
    y = (1 - config["label_smoothing"]) * y + config["label_smoothing"] / 2
    a, b = (operands.get("pos_weight", 1.0) * y), 1 - y
    losses = a * jax.nn.softplus(-x) + b * jax.nn.softplus(x)
    if config["of"] == "sigmoid_focal_loss":
        wrong = y * jax.nn.sigmoid(-x) + (1 - y) * jax.nn.sigmoid(x)
        alpha = config["alpha"]
        losses *= wrong ** config["gamma"]
        losses *= 1.0 if alpha is None else alpha * y + (1 - alpha) * (1 - y)
    losses *= operands["weight"] if config["weight"] else 1.0
    return total_of(config, losses, operands, data)


def divergence(config, operands, data):
    exists, sides = data["exists"], []
    for side in ("", "teacher_"):
        of_side = {k.removeprefix(side): v for k, v in operands.items() if k.startswith(side)}
        of_data = {**data, "frozen": data.get(f"{side}frozen")}
        nll = surprises(rows_of_logits(config, of_side, of_data), exists)
        sides.append((jnp.where(exists, jnp.exp(-nll), 0), -nll))
    (q, log_q), (p, log_p) = sides
    if config["divergence"] == "forward":
        losses = jnp.sum(p * (log_p - log_q), axis=-1)
    elif config["divergence"] == "reverse":
        losses = jnp.sum(q * (log_q - log_p), axis=-1)
    else:
        beta = config["beta"]
        log_m = jnp.log(jnp.where(exists, beta * p + (1 - beta) * q, 1))
        terms = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
        losses = jnp.sum(terms, axis=-1)
    return total_of(config, losses, operands, data)


def cross_entropy(
    logits,
    labels,
    *,
    weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    logit_softcap=None,
    sample_weight=None,
    reduction="mean",
):
    """Over the last axis."""
    *batch, c = logits.shape
    operands, counts = {"logits": logits.reshape(-1, c)}, jnp.ones(batch, bool)
    index = jnp.issubdtype(labels.dtype, jnp.integer)
    if index and ignore_index is not None:
        counts = labels != ignore_index
    data = {"counts": counts.reshape(-1), "exists": jnp.ones(operands["logits"].shape, bool)}
    (data if index else operands)["labels"] = labels.reshape(-1) if index else labels.reshape(-1, c)
    if weight is not None:
        operands["weight"] = weight
    if sample_weight is not None:
        operands["sample_weight"] = sample_weight.reshape(-1)
    config = {
        "of": "cross_entropy", "linear": False, "c": c, "temperature": 1.0, "stats": False,
        "labels": "index" if index else "probabilities", "label_smoothing": label_smoothing,
        "z_loss": z_loss, "logit_softcap": logit_softcap, "reduction": reduction,
        "weight": weight is not None, "sample_weight": sample_weight is not None and "float",
    }  # fmt: skip
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        losses, share = softmax_losses(config, operands, data)
        out = reduced(config, losses, operands, data, share)
    return out.reshape(batch) if reduction == "none" else out
