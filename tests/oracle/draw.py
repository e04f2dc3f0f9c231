"""Values that hurt, drawn: rows of every kind, labels of every kind, weights of every size."""

import jax.numpy as jnp
import numpy as np

from oracle.budget import INF
from oracle.truth import Asked, ask

# Rows

KINDS = [
    "plain", "flat", "peaked", "saturated", "tied", "offset", "huge", "subnormal", "zero",
    "impossible", "nothing", "inf", "nan",
]  # fmt: skip
FINITE = KINDS[:9]


def row_of(rng, kind, c, dtype):
    x, info = rng.normal(size=c), jnp.finfo(dtype)
    if kind == "flat":
        x *= 1e-4
    elif kind in ("peaked", "impossible"):
        x *= 8
    elif kind == "saturated":
        x[rng.integers(c)] += rng.choice([10, 17, 30, 60, 100])
    elif kind == "tied":
        x = rng.integers(0, 2, c).astype(float)
    elif kind == "offset":
        x += rng.choice([-1e4, 300, 1e4])
    elif kind == "huge":
        # So that sums over tokens are floats.
        x = np.clip(x, -3, 3) * (float(info.max) / (16 if dtype == "float16" else 1024))
    elif kind == "subnormal":
        x *= float(info.tiny) / 16
    elif kind == "zero":
        x = np.copysign(0.0, x)
    if kind == "impossible":
        x[rng.random(c) < rng.choice([0.3, 0.9])] = -INF
        x[rng.integers(c)] = 1.0
    elif kind == "nothing":
        x[:] = -INF
    elif kind in ("inf", "nan"):
        x[rng.integers(c)] = INF if kind == "inf" else np.nan
    return x


def rows_of(rng, kinds, n, c, dtype):
    x = np.array([row_of(rng, kind, c, dtype) for kind in rng.choice(kinds, n)]).reshape(n, c)
    return x.astype(jnp.dtype(dtype))


def hurting_logits(rng, shape, dtype=np.float32):
    """Flat rows beside peaked ones, of either sign, some at a large common offset."""
    x = rng.normal(size=shape)
    batch = (*shape[:-1], 1)
    x *= rng.choice([0.1, 1.0, 8.0], size=batch)
    x += rng.choice([0.0, 0.0, -40.0, 30.0], size=batch)
    return x.astype(dtype)


def product_of_bfloat16(n, d, v, vocab_axis=1, *, scale):
    """(hidden, kernel, labels, bias), the logits' standard deviation being ``scale sqrt(d)``."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(n, d)), jnp.bfloat16)
    kernel = rng.normal(size=(d, v) if vocab_axis == 1 else (v, d)) * scale
    labels = jnp.asarray(rng.integers(0, v, n), jnp.int32)
    bias = jnp.asarray(4 * rng.normal(size=v), jnp.bfloat16)
    return hidden, jnp.asarray(kernel, jnp.bfloat16), labels, bias


# Labels and weights


def weights_of(rng, n, zeros=0.2):
    s = 10.0 ** rng.uniform(-3, 1, n)
    return np.where(rng.random(n) < zeros, 0, s).astype(np.float32)


def asked_of(config, rng, mask) -> Asked:
    """What tokens ask for, by a configuration of the fuzzer; ``mask[N, C]``: the classes that
    exist."""
    n, c = mask.shape
    given = {name: config[name] for name in ("ignore_index", "label_smoothing", "z_loss")}
    if config["weight"]:
        given["weight"] = weights_of(rng, c, 0.1)
    if config["sample_weight"]:
        weight = weights_of(rng, n)
        if config["sample_weight"] == "bool":
            weight = weight > 0
        elif config["sample_weight"] == "none count":
            weight = np.zeros_like(weight)
        given["sample_weight"] = weight
    if config["where"] == "tokens":
        given["tokens"] = rng.random(n) < 0.7
    return ask(labels_of(config, rng, mask), config["labels"], mask, **given)


def labels_of(config, rng, mask):
    """A tuple: class indices, or probabilities, or the two arrays of top-k labels."""
    (n, c), ignore = mask.shape, config["ignore_index"]
    if config["labels"] == "index":
        some = [rng.choice(np.flatnonzero(row)) if row.any() else 0 for row in mask]
        y = np.where(rng.random(n) < 0.9, some, rng.integers(0, c, n)).astype(np.int64)
        info = np.iinfo(config["label_dtype"])
        odd = rng.choice([-100, -1, c, info.max, info.min], n)
        y = np.where(rng.random(n) < 0.2, odd, y)
        y = np.clip(y, info.min, info.max)
        if ignore is not None and info.min <= ignore <= info.max:
            y = np.where(rng.random(n) < 0.2, ignore, y)
        return (y.astype(config["label_dtype"]),)
    if config["labels"] == "probabilities":
        q = rng.dirichlet(np.full(c, 0.3), n) * mask
        q[rng.random((n, c)) < 0.2] = 0
        hot = rng.random(n) < 0.3
        q[hot] = np.eye(c)[rng.integers(0, c, n)][hot] * mask[hot]
        q = (q * rng.choice([1, 1, 3], (n, 1))).astype(np.float32)
        return (q.astype(np.float64) if config["dtype"] == "float64" else q,)
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
    return index.astype(np.int32), q.astype(np.float32)
