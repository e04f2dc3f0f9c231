"""2^34 logits, 64 GiB in float32, within 1.5 GiB of memory.

Value and both gradients of ``linear_cross_entropy``; 64 tokens are checked in float64.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxloss
from benchmarks.harness import report

TOKENS, CLASSES, FEATURES, CHECKED = 2**16, 2**18, 16, 64
LIMIT_GIB = 1.5


def _exact(hidden, kernel, labels):
    """Losses and d_hidden of the checked tokens, in float64."""
    logits = hidden @ kernel
    logits -= logits.max(axis=-1, keepdims=True)
    exp = np.exp(logits)
    total = exp.sum(axis=-1, keepdims=True)
    rows = np.arange(len(labels))
    losses = np.log(total[:, 0]) - logits[rows, labels]
    p = exp / total
    p[rows, labels] -= 1
    return losses, p @ kernel.T


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    tick(0, "a minute or some")
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(TOKENS, FEATURES)).astype(np.float32)
    kernel = rng.normal(size=(FEATURES, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, TOKENS).astype(np.int32)

    def loss(hidden, kernel):
        total, stats = jaxloss.linear_cross_entropy(
            hidden, kernel, labels, reduction="sum", precision="highest", return_stats=True
        )
        return total, stats.log_prob

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    begin = time.perf_counter()
    out = jax.block_until_ready(step(jnp.asarray(hidden), jnp.asarray(kernel)))
    seconds = time.perf_counter() - begin
    # Linux counts in KiB.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    (_, log_prob), (d_hidden, d_kernel) = out
    finite = all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(out))
    some = rng.choice(TOKENS, CHECKED, replace=False)
    exact = (x.astype(np.float64) for x in (hidden[some], kernel))
    losses, slopes = _exact(*exact, labels[some])
    loss_error = float(np.max(np.abs(-np.asarray(log_prob)[some] - losses) / losses))
    apart = np.abs(np.asarray(d_hidden)[some] - slopes)
    slope_error = float(np.max(apart) / np.max(np.abs(slopes)))
    # The rows of softmax - onehot sum to nothing, and so do those of d_kernel.
    sums = np.asarray(d_kernel, np.float64).sum(axis=1)
    sum_error = float(np.max(np.abs(sums)) / np.abs(np.asarray(d_kernel)).sum(axis=1).min())
    return {
        "tokens": TOKENS,
        "classes": CLASSES,
        "features": FEATURES,
        "seconds": seconds,
        "resident_gib": resident,
        "finite": finite,
        "checked": CHECKED,
        "loss_error": loss_error,
        "d_hidden_error": slope_error,
        "d_kernel_sum": sum_error,
    }


def tables(data: dict[str, Any]) -> list[report.Table]:
    title = f"Value and both gradients; largest relative errors, of {data['checked']} tokens"
    header = ["tokens x features\nx classes", "s", "resident\nGiB", "loss", "d_hidden"]
    shape = report.by((data["tokens"], data["features"], data["classes"]))
    cells = [shape, f"{data['seconds']:.0f}", f"{data['resident_gib']:.2f}"]
    cells += [f"{data[kind]:.1e}" for kind in ("loss_error", "d_hidden_error")]
    return [report.Table(title, header, [cells])]


def missed(data: dict[str, Any]) -> str | None:
    errors = data["loss_error"], data["d_hidden_error"]
    # Written so that a NaN fails.
    within = data["resident_gib"] <= LIMIT_GIB and all(error <= 1e-5 for error in errors)
    if data["finite"] and within:
        return None
    return f"That is not within the limits: finite, {LIMIT_GIB} GiB, errors of 1e-5."
