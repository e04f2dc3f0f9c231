"""cross_entropy."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from oracle.budget import LD, assert_allowed, precision, rounded
from oracle.draw import asked_of, rows_of
from oracle.programs import jit_quickly
from oracle.truth import reduced, truth_of, widened

import jaxloss

# Programs: one a configuration

FLAT = ("label_smoothing", "z_loss", "logit_softcap", "ignore_index", "reduction")


def jitted(config):
    return jit_quickly if config["way"] == "quick" else jax.jit


def options_of(config):
    return {name: config[name] for name in FLAT}


def labels_of(config, arrays):
    if config["labels"] in ("index", "probabilities"):
        return arrays[0]
    return jaxloss.TopKLabels(*arrays, config["labels"])


def placed(config, x, per_class):
    """A row-major ``x[N, C]`` in the layout's shape."""
    name = config["layout"]
    if name == "last":
        return x
    if name == "first":
        return x.T if per_class else x
    if name == "one":
        return x[0]
    if name == "middle":
        x = x.reshape(2, -1, *x.shape[1:])
        return x.transpose(0, 2, 1) if per_class else x
    x = x.reshape(x.shape[0], 2, -1) if per_class else x  # two class axes, the second one first
    return x.transpose(2, 0, 1) if per_class else x


AXES = {"last": -1, "first": 0, "one": 0, "middle": 1, "two": (2, 0)}


def unplaced(config, x, c):
    name = config["layout"]
    if name == "first":
        return x.T
    if name == "one":
        return x[None]
    if name == "middle":
        return x.transpose(0, 2, 1).reshape(-1, c)
    return x.transpose(1, 2, 0).reshape(-1, c) if name == "two" else x


def check_dtype(config):
    return jax.enable_x64(config["dtype"] == "float64")


@lru_cache(maxsize=64)
def program_of_logits(frozen):
    config = dict(frozen)

    def step(x, labels, arrays, ct):
        def total(x, *probabilities):
            y = labels_of(config, probabilities or labels)
            loss = jaxloss.cross_entropy(
                x, y, axis=AXES[config["layout"]], **options_of(config), **arrays
            )
            return jnp.sum(loss * ct) if config["reduction"] == "none" else loss, loss

        args = labels if config["labels"] == "probabilities" else ()
        by = tuple(range(1 + len(args)))
        (_, loss), grads = jax.value_and_grad(total, by, has_aux=True)(x, *args)
        return loss, grads

    return jitted(config)(step)


def random_ct(rng, n, config):
    return rng.uniform(0.5, 2, n).astype("float64" if config["dtype"] == "float64" else "float32")


def exists_of(config, rng, n, c):
    mask = np.ones((n, c), bool)
    if config["where"] == "classes":
        mask = rng.random((n, c)) < 0.7
        mask[:, rng.integers(c)] = True
    return mask


def fuzz_cross_entropy(config, rng, kinds):
    n, c = (1 if config["layout"] == "one" else 6), config["c"]
    at = precision(config["dtype"])
    if config["z_loss"]:
        kinds = [k if k != "huge" else "peaked" for k in kinds]  # its square is no float
    if config["labels"] == "bucket":
        kinds = [k if k != "huge" else "peaked" for k in kinds]  # the truth's own sum is 0 there
    if config["logit_softcap"]:
        kinds = [k if k != "inf" else "impossible" for k in kinds]  # caps at the cap
    x, mask = rows_of(rng, kinds, n, c, config["dtype"]), exists_of(config, rng, n, c)
    asked = asked_of(config, rng, mask)
    arrays = dict(asked.arrays)
    if config["where"] == "classes":
        arrays["where"] = mask
    truth = truth_of(widened(x), mask, asked, at, config["logit_softcap"])
    ct = random_ct(rng, n, config)
    given_arrays = {
        k: placed(config, v, per_class=v.ndim > 1) if k != "weight" else v
        for k, v in arrays.items()
    }
    labels = tuple(
        placed(config, y, per_class=config["labels"] == "probabilities") for y in asked.labels
    )
    if config["layout"] == "middle" and config["labels"] not in ("index", "probabilities"):
        labels = tuple(y.reshape(2, -1, y.shape[-1]) for y in asked.labels)
    with check_dtype(config):
        loss, grads = program_of_logits(frozen_of(config))(
            placed(config, x, True), labels, given_arrays, placed(config, ct, False)
        )
    check_softmax_loss(config, asked, truth, ct, at, loss, grads, c)


def check_softmax_loss(config, asked, truth, ct, at, loss, grads, c):
    expected, allowed, factor, nothing = reduced(truth, asked, config["reduction"], ct, at)
    scalar = config["reduction"] != "none"
    if scalar and truth.skip.any():
        return
    if scalar:
        assert_allowed(loss, expected, allowed, at, "loss")
    else:
        keep = ~truth.skip
        got = np.asarray(loss).reshape(-1)
        assert_allowed(got[keep], expected[keep], allowed[keep], at, "losses")
    g = unplaced(config, np.asarray(np.asarray(grads[0], np.float64)), c)
    factor = factor[:, None]
    want = np.where(asked.counts[:, None], truth.slopes, 0)
    # NaN somewhere in a bad row, and in no other.
    bad = truth.bad & (not nothing)
    has_nan = np.isnan(g).any(-1)
    keep = ~truth.skip
    np.testing.assert_array_equal(has_nan[keep], bad[keep], "rows of NaN")
    keep &= ~truth.bad
    want, room = factor * want, np.abs(factor) * truth.slopes_allowed
    most = 1 + np.max(asked.z * np.abs(truth.lse) if config["z_loss"] else 0)
    room = room + 4 * at.eps * np.abs(want) + 2 * at.tiny * most * np.abs(factor)
    room = rounded(room, want, at)
    want, room = (np.where(nothing, 0, v)[keep] for v in (want, room))
    assert_allowed(g[keep], want, room, at, "d_logits")
    if len(grads) > 1:
        w = widened(asked.arrays["weight"]) if "weight" in asked.arrays else np.ones(c, LD)
        of_q = (1 - LD(config["label_smoothing"])) * w * truth.of_labels
        dq = unplaced(config, np.asarray(grads[1], LD), c)
        want = np.where(nothing, 0, factor * of_q)
        # Each -log p is to its own few roundings: the rows' condition, that of the loss.
        room = (at.reach + 24 + c) * 8 * at.eps * np.abs(want)
        room = room + 2 * at.tiny * np.abs(factor) * np.max(w)
        seen = keep[:, None] & (truth.of_labels != 0)
        assert_allowed(dq[seen], want[seen], room[seen], at, "d_labels")


def frozen_of(config):
    return tuple(sorted(config.items()))


SOFTMAX = {
    "c": [1, 2, 5, 12, 33, 260],
    "dtype": ["float32", "bfloat16", "float16", "float64"],
    "labels": ["index", "probabilities", "drop", "uniform", "bucket"],
    "layout": ["last", "first", "middle", "two", "one"],
    "reduction": ["none", "sum", "mean"],
    "weight": [False, True],
    "sample_weight": [None, "bool", "float", "none count"],
    "where": [None, "tokens", "classes"],
    "label_smoothing": [0.0, 0.1, 1.0],
    "z_loss": [0.0, 0.0, 1e-3],
    "logit_softcap": [None, None, 5.0, 50.0],
    "ignore_index": [-100, None, 0],
    "label_dtype": ["int32", "int8", "uint8"],
    "way": ["jit", "quick"],
}


def sanitized(config):
    """No combination that is refused."""
    config = dict(config)
    if config.get("labels") == "bucket":
        config |= {"weight": False, "label_smoothing": 0.0}
        if "implementation" in config:
            config["implementation"] = "token_chunks"
    if config.get("implementation") == "stored_exponentials":
        config["labels"] = "index"
        config["stats"] = config.get("stats", False) and config["reduction"] != "none"
        if config["where"] == "classes" or config["logit_softcap"] is not None:
            config["label_smoothing"] = 0.0
        if config.get("dtype") == "float16":
            config["dtype"] = "bfloat16"
    if config.get("dtype") == "float64" and "products" in config:
        config["products"] = None  # no program is of float64 operands and narrow products
    if config.get("heads") and config.get("implementation") == "vocab_blocks":
        config["implementation"] = "token_chunks"
    if config.get("heads") and config["c"] == 2 and config.get("where") == "tokens":
        config["where"] = None  # of two tokens a mask [2, 2] fits the classes too, and is refused
    if config.get("layout") == "two" and config["c"] % 2:
        config["layout"] = "last"
    if config.get("layout") in ("first", "middle", "two") and config.get("where") == "tokens":
        config["where"] = None  # a mask that fits both ways is refused
    if config.get("labels", "index") != "index" and config.get("ignore_index") == 0:
        config["ignore_index"] = -100
    return config
