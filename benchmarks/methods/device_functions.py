"""What a device makes of every function of logits, and of losses of a product's statistics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxloss
from benchmarks.harness import measure
from benchmarks.methods import calls, linear_case
from benchmarks.methods.linear_case import PASSES


class OfLogits(NamedTuple):
    """How many arrays of the size of logits must be read or written, forward and with the gradient
    of the logits."""

    loss: Callable  # (logits, labels, another model's logits, its softmax) -> a scalar
    forward: int
    both: int


def _statistics(x, y, *_):
    stats = jaxloss.token_stats(x, y)
    return jnp.mean(stats.log_prob + 0.01 * stats.entropy)


# Class indices are read beside: 1 of C. The gradient reads what the forward pass read, and is
# written; log_softmax writes its result, which its backward pass reads.
OF_LOGITS = {
    "log_softmax, nll_loss": OfLogits(
        lambda x, y, *_: jaxloss.nll_loss(jaxloss.log_softmax(x), y), 2, 4
    ),
    "cross_entropy": OfLogits(lambda x, y, *_: jaxloss.cross_entropy(x, y), 1, 3),
    "cross_entropy of probabilities": OfLogits(
        lambda x, y, t, q: jaxloss.cross_entropy(x, q), 2, 5
    ),
    "kl_divergence": OfLogits(lambda x, y, t, q: jaxloss.kl_divergence(x, t), 2, 5),
    "token_stats": OfLogits(_statistics, 1, 3),
    "focal_loss": OfLogits(lambda x, y, *_: jaxloss.focal_loss(x, y), 1, 3),
    "sigmoid_cross_entropy": OfLogits(lambda x, y, t, q: jaxloss.sigmoid_cross_entropy(x, q), 2, 5),
}


class OfProduct(NamedTuple):
    loss: Callable  # (hidden, kernel, labels, another model's hidden and kernel) -> a scalar
    products: tuple[int, int]  # forward, and with the gradients of hidden and kernel


def _policy(stats):
    return -jnp.exp(stats.log_prob - jax.lax.stop_gradient(stats.log_prob)) - 0.01 * stats.entropy


def _of_statistics(h, k, y, *_):
    stats = jaxloss.linear_token_stats(h, k, y)
    return jnp.mean(stats.log_prob + 0.01 * stats.entropy)


OF_PRODUCTS = {
    "linear_token_stats": OfProduct(_of_statistics, (1, 4)),
    "linear_stats_loss": OfProduct(
        lambda h, k, y, *_: jaxloss.linear_stats_loss(_policy, h, k, y), (1, 3)
    ),
    "linear_kl_divergence": OfProduct(
        lambda h, k, _, g, m: jaxloss.linear_kl_divergence(h, k, g, m), (2, 4)
    ),
}


def _timed(makers: dict[str, Callable[[], calls.Call]], seconds: float) -> tuple[dict, dict]:
    """(milliseconds, why there are none), one call after the other: each has the device's memory
    for itself."""
    ms, refused = {}, {}
    for name, make in makers.items():
        try:
            ms[name] = calls.median_ms({name: make()}, seconds)[name]
        except Exception as error:
            refused[name] = measure.refusal(error)
    return ms, refused


def of_logits(shape: tuple[int, int], copy_gb_s: float, seconds: float) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(3), 3)
    x, t = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2])
    args = x, jax.random.randint(keys[2], shape[:1], 0, shape[1]), t, jax.nn.softmax(t)
    rows = {}
    for name, given in OF_LOGITS.items():
        ms, refused = _timed(
            {
                "forward": lambda f=given.loss: calls.Jax(f, args),
                "both": lambda f=given.loss: calls.Jax(jax.value_and_grad(f), args),
            },
            seconds,
        )
        least = {what: getattr(given, what) * x.nbytes / copy_gb_s / 1e6 for what in PASSES}
        of_copy = {what: least[what] / t for what, t in ms.items()}
        rows[name] = {"ms": ms, "of_copy": of_copy, "refused": refused}
    return {"shape": list(shape), "functions": rows}


def of_products(shape: tuple[int, int, int], seconds: float) -> dict[str, Any]:
    """Beside one bare product, forward; with gradients beside the three that they need, a third of
    which is one."""
    arrays, (g, m, _) = linear_case.operands(shape), linear_case.operands(shape, seed=1)
    given = *arrays, g, m
    rows = {}
    bare = {what: linear_case.products_call(arrays, what) for what in PASSES}
    products = {what: calls.median_ms({what: call}, seconds)[what] for what, call in bare.items()}
    one = {"forward": products["forward"], "both": products["both"] / 3}
    for name, of in OF_PRODUCTS.items():
        ms, refused = _timed(
            {
                "forward": lambda f=of.loss: calls.Jax(f, given),
                "both": lambda f=of.loss: calls.Jax(jax.value_and_grad(f, (0, 1)), given),
            },
            seconds,
        )
        count = dict(zip(PASSES, of.products, strict=True))
        of_bare = {what: t / (count[what] * one[what]) for what, t in ms.items()}
        rows[name] = {"ms": ms, "products": count, "of_products": of_bare, "refused": refused}
    return {"shape": list(shape), "products_ms": products, "functions": rows}
