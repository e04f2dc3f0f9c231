"""Relative error of the loss and of its gradient at the label, at rising confidence."""

import argparse
from collections.abc import Callable
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxloss
from benchmarks.harness import report
from benchmarks.methods.libraries import two_step

DTYPES = ("float32", "bfloat16")
MARGINS = tuple(range(0, 61, 5))
ROWS, CLASSES = 32, 100


METHODS = {
    "jaxloss": lambda x, y: jaxloss.cross_entropy(x, y, reduction="none"),
    "optax": optax.softmax_cross_entropy_with_integer_labels,
    "two-step": two_step,
}


def about_seconds(args: argparse.Namespace) -> float:
    return 10.0


def _case(margin: float, dtype: str):
    """The label leads the largest of the others by ``margin``, before rounding to ``dtype``."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((ROWS, CLASSES))
    labels = rng.integers(CLASSES, size=ROWS)
    rows = np.arange(ROWS)
    logits[rows, labels] = -np.inf
    logits[rows, labels] = logits.max(axis=-1) + margin
    return jnp.asarray(logits, dtype), jnp.asarray(labels, jnp.int32)


def _truth(logits, labels) -> tuple[np.ndarray, np.ndarray]:
    """The definitions as they stand, on the logits as rounded, to 60 decimal digits."""
    losses, slopes = [], []
    with localcontext() as context:
        context.prec = 60
        for row, label in zip(np.asarray(logits, np.float64), np.asarray(labels), strict=True):
            x = [Decimal(float(v)) for v in row]
            logsumexp = sum((v.exp() for v in x), Decimal(0)).ln()
            losses.append(float(logsumexp - x[label]))
            slopes.append(float((x[label] - logsumexp).exp() - 1))
    return np.array(losses), np.array(slopes)


def _worst(got, truth: np.ndarray) -> float:
    return float(np.max(np.abs(np.asarray(got, np.float64) - truth) / np.abs(truth)))


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    def both(method):
        @jax.jit
        def f(x, y):
            losses, pullback = jax.vjp(lambda x: method(x, y), x)
            (slopes,) = pullback(jnp.ones_like(losses))
            return losses, jnp.take_along_axis(slopes, y[:, None], axis=-1)[:, 0]

        return f

    functions = {name: both(method) for name, method in METHODS.items()}
    cases = [(dtype, margin) for dtype in DTYPES for margin in MARGINS]
    rows = []
    for (dtype, margin), each in report.shares(tick, cases):
        if margin == MARGINS[0]:
            each(0, f"{dtype}, margins of {margin} to {MARGINS[-1]}")
        logits, labels = _case(margin, dtype)
        losses, slopes = _truth(logits, labels)
        results = {name: f(logits, labels) for name, f in functions.items()}
        rows.append(
            {
                "dtype": dtype,
                "margin": margin,
                "median_loss": float(np.median(losses)),
                "loss_error": {name: _worst(r[0], losses) for name, r in results.items()},
                "gradient_error": {name: _worst(r[1], slopes) for name, r in results.items()},
            }
        )
        each(1)
    return {"rows_a_case": ROWS, "classes": CLASSES, "rows": rows}


def tables(data: dict[str, Any]) -> list[report.Table]:
    header = ["margin", "loss\nabout"]
    header += [f"loss\n{m}" for m in METHODS] + [f"gradient\n{m}" for m in METHODS]
    out = []
    for dtype in DTYPES:
        title = f"{dtype}: largest relative error, {data['rows_a_case']} rows of "
        title += f"{data['classes']} classes (1: returns 0)"
        lines = []
        for row in data["rows"]:
            if row["dtype"] == dtype:
                errors = [
                    row[kind][m] for kind in ("loss_error", "gradient_error") for m in METHODS
                ]
                cells = [f"{e:.1e}" for e in errors]
                lines.append([str(row["margin"]), f"{row['median_loss']:.0e}", *cells])
        out.append(report.Table(title, header, lines, found=_found(data, dtype)))
    return out


def _found(data: dict[str, Any], dtype: str) -> str:
    rows = [row for row in data["rows"] if row["dtype"] == dtype]
    worst = max(row["loss_error"]["jaxloss"] for row in rows)
    lost = [row["margin"] for row in rows if row["loss_error"]["optax"] >= 1]
    found = f"{dtype}: the loss of jaxloss is off by {worst:.0e} of itself at most"
    return (
        f"{found}; that of optax by all of itself from a margin of {min(lost)} on."
        if lost
        else f"{found}."
    )


def plot(data: dict[str, Any], path: Path) -> None:
    columns = report.axes(2)
    kinds = {"loss_error": "loss", "gradient_error": "gradient at the label"}
    # optax and two-step lie on each other in places: a wide line below, narrow ones above.
    widths = {"jaxloss": 1.6, "optax": 4, "two-step": 1.6}
    for ax, (kind, title) in zip(columns, kinds.items(), strict=True):
        for m, lw in widths.items():
            for dtype, style in zip(DTYPES, ("o-", "s--"), strict=True):
                rows = [row for row in data["rows"] if row["dtype"] == dtype]
                # On a log axis an error of exactly 0 would leave the picture.
                errors = [max(row[kind][m], 1e-9) for row in rows]
                look = {"color": report.COLORS[m], "lw": lw, "ms": 4, "zorder": 2 + 1 / lw}
                look["label"] = f"{report.EXPLAINED.get(m, m)}, {dtype}"
                ax.plot([row["margin"] for row in rows], errors, style, **look)
        ax.set(yscale="log", xlabel="margin of the label's logit over the others", title=title)
        ax.set_ylabel("largest relative error")
        report.mark_zero(ax)
    report.legend_below(columns[0], 3)
    report.save_figure(columns[0], path)
