"""``python -m benchmarks.large``: 2^34 logits, 64 GiB in float32, within 1.5 GiB of memory.

Value and both gradients of ``linear_cross_entropy``; 64 tokens are checked in float64.
"""

import argparse
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jaxloss
from benchmarks.harness import report
from benchmarks.harness.environment import describe, environment

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


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.large", description=__doc__).parse_args()
    console = Console()
    env = environment()
    console.print(describe(env), soft_wrap=True, highlight=False)
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
    with console.status(f"{TOKENS} tokens of {CLASSES} classes: a minute or some"):
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
    data = {
        "environment": env,
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
    report.save(report.RESULTS, "large", data)
    console.print(
        f"{TOKENS} tokens of {CLASSES} classes: {seconds:.0f} s, {resident:.2f} GiB resident; "
        f"largest relative error of {CHECKED} losses {loss_error:.1e}, "
        f"of their d_hidden {slope_error:.1e}.",
        soft_wrap=True,
        highlight=False,
    )
    # Written so that a NaN fails.
    if not (finite and resident <= LIMIT_GIB and loss_error <= 1e-5 and slope_error <= 1e-5):
        raise SystemExit("That is not within the limits: finite, 1.5 GiB, errors of 1e-5.")


if __name__ == "__main__":
    main()
