"""Each function of logits beside its plain formula.

The plain formula is what one writes with jax.numpy and jax.nn, in the logits' own dtype. Value, and
value with gradient, compiled; the processor time of pairs of neighbours, and the temporary memory
that XLA plans for each.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxloss
from benchmarks.harness import measure, report

SHAPES = ((512, 32000), (16384, 1000))
DTYPES = ("float32", "bfloat16")
PASSES = ("value", "value and gradient")
GOAL = 1.1  # of the plain formula's processor time
EPS, Z, T, BETA, GAMMA = 0.1, 1e-4, 2.0, 0.5, 2.0


def _at(x, labels):
    return jnp.take_along_axis(x, labels[:, None], axis=-1)[:, 0]


def _nll(log_probs, labels):
    return -jnp.mean(_at(log_probs, labels))


def _two_steps(x, labels):
    return _nll(jax.nn.log_softmax(x), labels)


def _cross_entropy(x, labels):
    return jnp.mean(jax.nn.logsumexp(x, axis=-1) - _at(x, labels))


def _of_probabilities(x, q):
    return -jnp.mean(jnp.sum(q * jax.nn.log_softmax(x), axis=-1))


def _smoothed(x, labels):
    log_p = jax.nn.log_softmax(x)
    return -jnp.mean((1 - EPS) * _at(log_p, labels) + EPS * jnp.mean(log_p, axis=-1))


def _with_z_loss(x, labels):
    lse = jax.nn.logsumexp(x, axis=-1)
    return jnp.mean(lse - _at(x, labels) + Z * lse**2)


def _token_stats(x, labels):
    log_p = jax.nn.log_softmax(x)
    p, own = jnp.exp(log_p), _at(x, labels)[:, None]
    first = jnp.arange(x.shape[-1]) < labels[:, None]
    return jaxloss.TokenStats(
        log_prob=_at(log_p, labels),
        logsumexp=jax.nn.logsumexp(x, axis=-1),
        entropy=-jnp.sum(p * log_p, axis=-1),
        prediction=jnp.argmax(x, axis=-1),
        confidence=jax.lax.stop_gradient(jnp.max(p, axis=-1)),
        rank=jnp.sum((x > own) | ((x == own) & first), axis=-1),
        sum_sq_probs=jnp.sum(p * p, axis=-1),
        z_loss=jnp.zeros(len(x), x.dtype),
    )


def _kl(p, log_p, log_q):
    return jnp.sum(p * (log_p - log_q), axis=-1)


def _log_softmaxes(x, t):
    return jax.nn.log_softmax(x / T), jax.nn.log_softmax(t / T)


def _forward(x, t):
    log_q, log_p = _log_softmaxes(x, t)
    return jnp.mean(_kl(jnp.exp(log_p), log_p, log_q))


def _reverse(x, t):
    log_q, log_p = _log_softmaxes(x, t)
    return jnp.mean(_kl(jnp.exp(log_q), log_q, log_p))


def _jensen_shannon(x, t):
    log_q, log_p = _log_softmaxes(x, t)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    log_m = jnp.log(BETA * p + (1 - BETA) * q)
    return jnp.mean(BETA * _kl(p, log_p, log_m) + (1 - BETA) * _kl(q, log_q, log_m))


def _sigmoid(x, y):
    y = y.astype(x.dtype)
    return jnp.mean(y * jax.nn.softplus(-x) + (1 - y) * jax.nn.softplus(x))


def _sigmoid_focal(x, y):
    y, p = y.astype(x.dtype), jax.nn.sigmoid(x)
    losses = y * jax.nn.softplus(-x) + (1 - y) * jax.nn.softplus(x)
    return jnp.mean(losses * (1 - (p * y + (1 - p) * (1 - y))) ** GAMMA)


def _focal(x, labels):
    log_p = _at(jax.nn.log_softmax(x), labels)
    return -jnp.mean((1 - jnp.exp(log_p)) ** GAMMA * log_p)


class Case(NamedTuple):
    name: str
    ours: Callable
    plain: Callable
    beside: str  # the operand beside the logits
    of_logits: bool = False  # it takes the logits alone


_ce = jaxloss.cross_entropy
CASES = (
    Case("log_softmax", jaxloss.log_softmax, jax.nn.log_softmax, "weights", True),
    Case("nll_loss", jaxloss.nll_loss, _nll, "labels"),
    Case(
        "nll_loss(log_softmax)",
        lambda x, y: jaxloss.nll_loss(jaxloss.log_softmax(x), y),
        _two_steps,
        "labels",
    ),
    Case("cross_entropy", _ce, _cross_entropy, "labels"),
    Case("of probabilities", _ce, _of_probabilities, "probabilities"),
    Case("label_smoothing", partial(_ce, label_smoothing=EPS), _smoothed, "labels"),
    Case("z_loss", partial(_ce, z_loss=Z), _with_z_loss, "labels"),
    Case("token_stats", jaxloss.token_stats, _token_stats, "labels"),
    *(
        Case(
            f"kl_divergence, {name}",
            partial(jaxloss.kl_divergence, divergence=name, temperature=T),
            plain,
            "teacher",
        )
        for name, plain in (
            ("forward", _forward),
            ("reverse", _reverse),
            ("jensen_shannon", _jensen_shannon),
        )
    ),
    Case("sigmoid_cross_entropy", jaxloss.sigmoid_cross_entropy, _sigmoid, "decisions"),
    Case("sigmoid_focal_loss", jaxloss.sigmoid_focal_loss, _sigmoid_focal, "decisions"),
    Case("focal_loss", jaxloss.focal_loss, _focal, "labels"),
)


def _operands(beside: str, shape: tuple[int, int], dtype: str) -> tuple:
    keys = jax.random.split(jax.random.key(0))
    logits = jax.random.normal(keys[0], shape, dtype)
    kinds: dict[str, Callable] = {
        "labels": lambda: jax.random.randint(keys[1], shape[:1], 0, shape[1]),
        "decisions": lambda: jax.random.randint(keys[1], shape, 0, 2),
        "teacher": lambda: jax.random.normal(keys[1], shape, dtype),
        "probabilities": lambda: jax.nn.softmax(jax.random.normal(keys[1], shape)).astype(dtype),
        "weights": lambda: jax.random.uniform(keys[1], shape, dtype),
    }
    return logits, kinds[beside]()


def _with_gradient(function: Callable) -> Callable:
    """(value, gradient in the logits). Of log-probabilities a weighted sum, of statistics two."""

    def scalar(x, *others):
        out = function(x, *others)
        if isinstance(out, jaxloss.TokenStats):
            return jnp.mean(out.log_prob + EPS * out.entropy), out
        if out.shape == x.shape:
            return jnp.sum(others[0] * out), None
        return out, None

    return jax.value_and_grad(scalar, has_aux=True)


def _measured(case: Case, shape, dtype: str, which: str, seconds: float) -> dict[str, Any]:
    args = _operands(case.beside, shape, dtype)
    pair = {"jaxloss": case.ours, "plain": case.plain}
    if case.of_logits:
        pair = {name: lambda x, _, f=f: f(x) for name, f in pair.items()}
    if which != "value":
        pair = {name: _with_gradient(f) for name, f in pair.items()}
    programs = {name: measure.Program(f, *args) for name, f in pair.items()}
    results = {name: f(*args) for name, f in programs.items()}
    what = f"{case.name}, {dtype} {shape}, {which}"
    # The plain formulas add up thousands of numbers one after the other.
    measure.check_agree(results, 16 * float(jnp.finfo(dtype).eps), what)
    times = measure.interleaved(programs, args, seconds, clock=time.process_time)
    return {
        "function": case.name,
        "dtype": dtype,
        "shape": list(shape),
        "pass": which,
        "rounds": len(times["plain"]),
        "median_ms": measure.medians_ms(times),
        "ratio": measure.median_ratio(times, "jaxloss", "plain"),
        "temp_mib": {name: f.temp_mib for name, f in programs.items()},
    }


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--seconds", type=float, default=4.0, help="time for each pair (default: %(default)s)")
    add("--only", nargs="+", help="functions whose names contain one of these")
    add("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)


def prepare(args: argparse.Namespace) -> None:
    measure.keep_pages()


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    chosen = [c for c in CASES if not args.only or any(part in c.name for part in args.only)]
    jobs = list(product(args.dtypes, SHAPES, chosen, PASSES))
    rows = []
    for (dtype, shape, case, which), each in report.shares(tick, jobs):
        each(0, f"{case.name}, {dtype} {report.by(shape)}, {which}")
        rows.append(_measured(case, shape, dtype, which, args.seconds))
        jax.clear_caches()
    return {"seconds_a_pair": args.seconds, "rows": rows}


def tables(data: dict[str, Any]) -> list[report.Table]:
    header = ["", "value", "MiB", "plain\nMiB", "with\ngradient", "MiB", "plain\nMiB"]
    each = {}
    for row in data["rows"]:
        kind = row["dtype"], tuple(row["shape"])
        each.setdefault(kind, {}).setdefault(row["function"], {})[row["pass"]] = row
    out = []
    for (dtype, shape), functions in each.items():
        rows = []
        for name, passes in functions.items():
            cells = [name]
            for which in PASSES:
                row = passes[which]
                above = " *" if row["ratio"] > GOAL else ""
                cells.append(f"{row['ratio']:.2f}{above}")
                cells += [f"{row['temp_mib'][who]:.0f}" for who in ("jaxloss", "plain")]
            rows.append(cells)
        title = f"{dtype}, {report.by(shape)}: processor time / the plain formula's, and"
        title += f" temporary MiB (*: above {GOAL})"
        out.append(report.Table(title, header, rows))
    return out
