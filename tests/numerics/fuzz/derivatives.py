"""First and second derivatives in all that is differentiated, in every mode, against plain jnp.

In float64, where both are good to many digits: what differs is a rule, not its rounding.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from oracle import plain
from oracle.draw import rows_of, weights_of

import jaxloss
from numerics.fuzz import heads
from numerics.fuzz.logits import SOFTMAX, frozen_of, jitted, labels_of, options_of, sanitized
from numerics.fuzz.product import LINEAR, SCHEDULES
from numerics.fuzz.sums import DIVERGENCE, FOCAL, SIGMOID, STATS

N, D = 6, 3
KINDS = ["plain", "flat", "peaked", "saturated", "tied", "zero"]


def every_derivative(f, operands, v):
    """Of ``f(operands)``, a number; directions ``v`` shaped as the operands."""

    def along(x):
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, slope(x), v)))

    def tangent(x):
        return jax.jvp(f, (x,), (v,))[1]

    slope = jax.grad(f)
    return {
        "value": f(operands),
        "reverse": slope(operands),
        "forward": tangent(operands),
        "forward over reverse": jax.jvp(slope, (operands,), (v,))[1],
        "reverse over reverse": jax.grad(along)(operands),
        "reverse over forward": jax.grad(tangent)(operands),
        "forward over forward": jax.jvp(tangent, (operands,), (v,))[1],
    }


@lru_cache(maxsize=64)
def program_of_derivatives(frozen):
    config = dict(frozen)

    def both(operands, data, v):
        # A cotangent too is an operand: what a user multiplies the losses by may be 0.
        ours, truth = (
            lambda x, f=f: f(config, x, {**data, "ct": x["ct"]}) for f in PAIRS[config["of"]]
        )
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            exact = every_derivative(truth, operands, v)
        return every_derivative(ours, operands, v), exact

    return jitted(config)(both)


# The library


def ours_total(config, loss, data):
    return jnp.sum(data["ct"] * loss) if config["reduction"] == "none" else loss


def weights_and_masks(config, operands, data):
    given = {k: operands[k] for k in ("weight", "sample_weight", "pos_weight") if k in operands}
    return given | {k: data[k] for k in ("where", "sample_weight") if k in data}


def library_labels(config, operands, data):
    given = [data["labels"]] if "labels" in data else []
    return labels_of(config, given + ([operands["labels"]] if "labels" in operands else []))


def product(config, operands, data):
    bias = {"bias": operands["bias"]} if config["bias"] else {}
    axis = {"vocab_axis": config["vocab_axis"], "chunk_size": config["chunk_size"]}
    kernel = heads.kernel_of(config, operands["kernel"], data["frozen"])
    return (operands["hidden"], kernel), bias | axis


def of_logits(config, operands, data, **options):
    """The function of these logits, materialised or a product, and labels."""
    args, of_product = (operands.get("logits"),), {}
    if config["linear"]:
        args, of_product = product(config, operands, data)
        of_product |= {"num_classes": config["c"], "implementation": config["implementation"]}
    return getattr(jaxloss, config["of"])(
        *args, library_labels(config, operands, data), **of_product, **options,
        **weights_and_masks(config, operands, data),
    )  # fmt: skip


def library_softmax_loss(config, operands, data):
    out = of_logits(config, operands, data, **options_of(config), return_stats=config["stats"])
    if not config["stats"]:
        return ours_total(config, out, data)
    return ours_total(config, out[0], data) + plain.of_statistics(out[1][:3], data)


def library_linear_loss(config, operands, data):
    (hidden, kernel), of_product = product(config, operands, data)
    given = weights_and_masks(config, operands, data)
    options = {**options_of(config), "reduction": "none"}
    where = [given["where"]] if "where" in given else []

    def each(x, y, *where):
        masks = {"where": where[0]} if where else {}
        masks |= {k: given[k] for k in ("weight",) if k in given}
        return jaxloss.cross_entropy(x[:, : config["c"]], y, **options, **masks)

    loss = jaxloss.linear_loss(
        each, hidden, kernel, library_labels(config, operands, data), *where, **of_product,
        reduction=config["reduction"], sample_weight=given.get("sample_weight"),
    )  # fmt: skip
    return ours_total(config, loss, data)


def library_statistics(config, operands, data):
    options = {k: config[k] for k in ("ignore_index", "temperature", "logit_softcap")}
    return plain.of_statistics(of_logits(config, operands, data, **options)[:3], data)


def library_log_softmax(config, operands, data):
    options = {"temperature": config["temperature"], "where": data.get("where")}
    out = jaxloss.log_softmax(operands["logits"], **options)
    return jnp.sum(jnp.where(data["exists"], out, 0) * data["ct"])


def library_loss(config, operands, data):
    """The functions that take logits, labels and few options."""
    names = {
        "nll_loss": (), "focal_loss": ("gamma", "temperature"),
        "sigmoid_cross_entropy": ("label_smoothing",),
        "sigmoid_focal_loss": ("label_smoothing", "gamma", "alpha"),
    }[config["of"]]  # fmt: skip
    options = {k: config[k] for k in ("ignore_index", "reduction", *names)}
    return ours_total(config, of_logits(config, operands, data, **options), data)


def library_divergence(config, operands, data):
    options = {k: config[k] for k in ("divergence", "beta", "temperature", "reduction")}
    options |= weights_and_masks(config, operands, data)
    if not config["linear"]:
        sides = operands["logits"], operands["teacher_logits"]
        return ours_total(config, jaxloss.kl_divergence(*sides, **options), data)
    args, of_product = product(config, operands, data)
    teacher = heads.kernel_of(config, operands["teacher_kernel"], data["teacher_frozen"])
    biases = {"teacher_bias": operands["teacher_bias"]} if config["bias"] else {}
    loss = jaxloss.linear_kl_divergence(
        *args, operands["teacher_hidden"], teacher, num_classes=config["c"], **of_product,
        **biases, **options,
    )  # fmt: skip
    return ours_total(config, loss, data)


PAIRS = {
    "cross_entropy": (library_softmax_loss, plain.softmax_loss),
    "linear_cross_entropy": (library_softmax_loss, plain.softmax_loss),
    "linear_loss": (library_linear_loss, plain.softmax_loss),
    "log_softmax": (library_log_softmax, plain.log_softmax),
    "nll_loss": (library_loss, plain.softmax_loss),
    "token_stats": (library_statistics, plain.curved_statistics),
    "linear_token_stats": (library_statistics, plain.curved_statistics),
    "focal_loss": (library_loss, plain.softmax_loss),
    "sigmoid_cross_entropy": (library_loss, plain.sigmoid_loss),
    "sigmoid_focal_loss": (library_loss, plain.sigmoid_loss),
    "kl_divergence": (library_divergence, plain.divergence),
    "linear_kl_divergence": (library_divergence, plain.divergence),
}


# Cases


def nothing(config):
    """What stands where a token does not count: second derivatives may want finite numbers."""
    return 1e30 if config["holds"] == "numbers" else np.nan


def draw_logits(config, rng, exists, counts):
    """(what is differentiated, the arrays of a kernel that are not)."""
    c, dtype = config["c"], "float64"
    if not config["linear"]:
        x = rows_of(rng, KINDS, N, c, dtype)
        x = np.where(exists, x, rng.choice([np.nan, np.inf, -np.inf, 1e300], (N, c)))
        return {"logits": np.where(counts[:, None], x, nothing(config))}, {}
    columns = c + config["padding"]
    # Other kernels are larger: the plain formula's own exponentials would end.
    most = 8 if config["head"] == "array" else 2
    hidden = np.clip(rows_of(rng, KINDS[:3], N, D, dtype), -most, most)
    hidden = np.where(counts[:, None], hidden, np.nan)
    drawn = {**config, "dtype": dtype, "exact": False, "heads": None, "products": None}
    head = heads.draw_head(drawn, rng, D, columns)
    bias = {"bias": rng.normal(size=columns)} if config["bias"] else {}
    return {"hidden": hidden, "kernel": head.trained, **bias}, {"frozen": head.frozen}


def draw_labels(config, rng, exists, counts):
    """(data, operands): probabilities are differentiated."""
    c, kind = config["c"], config["labels"]
    if kind == "index":
        y = np.array([rng.choice(np.flatnonzero(row)) for row in exists])
        if config["ignore_index"] is not None:
            y = np.where(counts, y, config["ignore_index"])
        return {"labels": y.astype(np.int32)}, {}
    if kind == "probabilities":
        q = rng.dirichlet(np.full(c, 0.5), N) * exists * (rng.random((N, c)) < 0.8)
        return {}, {"labels": np.where(counts[:, None], q, nothing(config) * exists)}
    k = min(3, c)
    index = np.argsort(rng.random((N, c)), axis=-1)[:, :k]
    q = rng.dirichlet(np.ones(k + 1), N)[:, :k] * np.take_along_axis(exists, index, -1)
    if config["ignore_index"] is not None:
        empty = rng.random((N, k)) < 0.3
        empty[:, 0] = ~counts & (rng.random(N) < 0.5)
        empty[empty[:, 0]] = True
        index = np.where(empty, config["ignore_index"], index)
    return {"labels": index.astype(np.int32)}, {"labels": q}


def draw_weights(config, rng, shape, counts):
    operands, data = {}, {}
    if config["weight"]:
        operands["weight"] = weights_of(rng, config["c"], 0.1).astype(float)
    if config.get("pos_weight"):
        many = shape if config["pos_weight"] == "entry" else shape[-1:]
        operands["pos_weight"] = rng.uniform(0.1, 4, many)
    if config["sample_weight"] == "bool":
        data["sample_weight"] = counts
    elif config["sample_weight"]:
        operands["sample_weight"] = np.where(counts, rng.uniform(0.1, 4, shape), 0)
    return operands, data


def counted(config, rng, shape):
    """Not all, where something says which."""
    says = config["sample_weight"] or config["where"] in (True, "tokens")
    says = says or (config["labels"] == "index" and config["ignore_index"] is not None)
    counts = (rng.random(shape) < 0.7) | (not says)
    counts.flat[rng.integers(counts.size)] = True
    return counts


def draw_softmax(config, rng, exists, counts):
    operands, data = draw_logits(config, rng, exists, counts)
    if "divergence" in config:
        of_teacher = draw_logits(config, rng, exists, counts)
        operands, data = (
            own | {f"teacher_{k}": v for k, v in other.items()}
            for own, other in zip((operands, data), of_teacher, strict=True)
        )
        return operands, data
    if config["of"] == "log_softmax":
        return operands, data
    of_labels, more = draw_labels(config, rng, exists, counts)
    return operands | more, data | of_labels


def draw_binary(config, rng, _, counts):
    shape = counts.shape
    x = np.clip(rows_of(rng, KINDS, *shape, "float64"), -40, 40)
    operands, data = {"logits": np.where(counts, x, np.nan)}, {}
    y = rng.integers(0, 2, shape)
    if config["labels"] == "probabilities":
        operands["labels"] = np.where(counts, rng.random(shape), np.nan)
    elif config["ignore_index"] is not None:
        data["labels"] = np.where(counts, y, config["ignore_index"])
    else:
        data["labels"] = y
    return operands, data


def draw(config, rng):
    """(what is differentiated, the other arrays)."""
    shape = (N, config["c"])
    binary = config["of"].startswith("sigmoid")
    exists, counts = np.ones(shape, bool), counted(config, rng, shape if binary else N)
    if config["where"] == "classes":
        exists = rng.random(shape) < 0.7
        exists[:, rng.integers(config["c"])] = True
    operands, data = (draw_binary if binary else draw_softmax)(config, rng, exists, counts)
    weights, masks = draw_weights(config, rng, counts.shape, counts)
    if config["where"]:
        masks["where"] = exists if config["where"] == "classes" else counts
    by_class = shape if config["of"] == "log_softmax" else counts.shape
    ct = rng.normal(size=by_class) * (rng.random(by_class) < 0.8)
    return operands | weights | {"ct": ct}, data | masks | {"exists": exists, "counts": counts}


def fuzz_derivatives(of, config, seed):
    try:
        check_derivatives(of, config, np.random.default_rng(seed))
    except Exception as error:
        error.add_note(f"check: fuzz_derivatives({of!r}, {config}, {seed})")
        raise


def check_derivatives(of, config, rng):
    config = {**PLAIN, **config, "of": of, "linear": of.startswith("linear")}
    config = sanitized(config)
    config["stats"] &= config["reduction"] == "none"
    operands, data = draw(config, rng)
    v = jax.tree.map(lambda x: rng.normal(size=x.shape), operands)
    with jax.enable_x64(True):
        ours, truth = program_of_derivatives(frozen_of(config))(operands, data, v)
    if np.isnan(truth["value"]) and config["reduction"] == "mean":  # over nothing
        assert np.isnan(ours["value"])
        return
    wants_numbers = of in ("cross_entropy", "token_stats", "focal_loss") or (
        config["labels"] == "probabilities" and config.get("implementation") == "vocab_blocks"
    )
    wrong = []
    for (path, got), expected in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(truth), strict=True
    ):
        assert np.all(np.isfinite(expected))
        if wants_numbers and config["holds"] == "NaN" and "over" in path[0].key:
            continue
        error = np.max(np.abs(got - expected)) / (1 + np.max(np.abs(expected)))
        if not error < 1e-9:
            wrong.append(f"{jax.tree_util.keystr(path)}: {error:.1e}")
    assert not wrong, f"errors, of the largest number of each: {', '.join(wrong)}"


NAMES = (
    "labels", "weight", "sample_weight", "where", "ignore_index", "label_smoothing", "z_loss",
    "logit_softcap", "reduction", "way",
)  # fmt: skip
PLAIN = {
    **dict.fromkeys(NAMES), "labels": "index", "weight": False, "label_smoothing": 0.0,
    "z_loss": 0.0, "reduction": "none", "stats": False, "layout": "last", "bias": False,
    "way": "quick", "temperature": 1.0, "holds": "numbers", "head": "array", "vocab_axis": 1,
}  # fmt: skip
ROWS = {"c": [2, 5, 9], **{k: SOFTMAX[k] for k in NAMES}}
ROWS |= {"sample_weight": [None, "bool", "float"], "ignore_index": [-100, None]}
FEW = {k: v for k, v in ROWS.items() if k not in ("label_smoothing", "z_loss", "logit_softcap")}
PRODUCT = {
    k: LINEAR[k] for k in ("padding", "bias", "vocab_axis", "chunk_size", "implementation", "head")
}  # fmt: skip
OF_STATISTICS = {
    k: ROWS[k] for k in ("c", "labels", "where", "ignore_index", "logit_softcap", "way")
} | {"temperature": STATS["temperature"]}
BINARY = {
    **{k: v for k, v in SIGMOID.items() if k not in ("dtype", "smoothing")},
    "labels": ["index", "probabilities"], "label_smoothing": SIGMOID["smoothing"],
}  # fmt: skip
APART = {k: v for k, v in DIVERGENCE.items() if k != "dtype"}
HOLDS = {"holds": ["numbers", "NaN"]}
SPACES = {
    "cross_entropy": {**ROWS, "stats": [False, True]},
    "linear_cross_entropy": {**ROWS, **PRODUCT, "stats": [False, True],
                             "implementation": SCHEDULES["implementation"]},
    "linear_loss": {**ROWS, **PRODUCT, "labels": ["index"], "ignore_index": [None],
                    "where": [None, "classes"]},
    "log_softmax": {k: ROWS[k] for k in ("c", "way")}
    | {"where": [None, "classes"], "temperature": STATS["temperature"]},
    "nll_loss": {**FEW, "labels": ["index", "probabilities"], "where": [None, "tokens"]},
    "token_stats": OF_STATISTICS,
    "linear_token_stats": {**OF_STATISTICS, **PRODUCT},
    "focal_loss": {**FEW, "labels": ["index"], "gamma": FOCAL["gamma"],
                   "temperature": STATS["temperature"]},
    "sigmoid_cross_entropy": BINARY,
    "sigmoid_focal_loss": {**BINARY, **FOCAL},
    "kl_divergence": APART,
    "linear_kl_divergence": {**APART, **PRODUCT},
}  # fmt: skip
SPACES = {name: space | HOLDS for name, space in SPACES.items()}
