"""The truth that the tests compare with, and how far from it a result may be.

``reference`` is cross-entropy in numpy's longdouble, written from the formulas of the docstring and
sharing nothing with the package: every term is ``-log p_c = log1p(sum_{j != c} exp(x_j - x_c))``,
which neither cancels nor overflows in 80 bits, so no row maximum appears. ``plain`` is the same in
jnp, for JAX to differentiate in float64.
"""

import re
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxloss

EPS = float(np.finfo(np.float32).eps)


def jit_quickly(f):
    """``jax.jit``, whose LLVM does not optimise: for what is compiled once and run once on a few
    numbers, and judged by no more than its values. A third of the time goes."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def two_steps(x, y, **options):
    return jaxloss.nll_loss(jaxloss.log_softmax(x), y, **options)


def product_of_bfloat16(n, d, v, vocab_axis=1, *, scale):
    """(hidden, kernel, labels, bias), the logits' standard deviation being ``scale sqrt(d)``."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(n, d)), jnp.bfloat16)
    kernel = rng.normal(size=(d, v) if vocab_axis == 1 else (v, d)) * scale
    labels = jnp.asarray(rng.integers(0, v, n), jnp.int32)
    bias = jnp.asarray(4 * rng.normal(size=v), jnp.bfloat16)
    return hidden, jnp.asarray(kernel, jnp.bfloat16), labels, bias


def wide(x):
    return np.asarray(x, np.float64)


def temporary_mib(f, args):
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes / 2**20


def moved_sizes(text):
    """The sizes of what a compiled program's devices send each other, but for sums."""
    moved = r"= \S+?\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)(?:-start)?\("
    return [prod(int(n) for n in dims.split(",") if n) for dims in re.findall(moved, text)]


# The budget. A float32 loss is conditioned by its margin: its exponents |x_y - m| are known to
# one rounding each; 16 covers the arithmetic.


def relative_budget(margin):
    """Of the loss of a row whose label lies ``margin`` from the row's maximum (or runner-up)."""
    return (np.abs(margin) + 16) * EPS * 2


def assert_within(got, expected, relative, floor=0.0):
    """|got - expected| <= relative * (|expected| + floor), elementwise, nonfinite values equal.

    What float32 holds only as a subnormal number may be 0: processors flush them.
    """
    got, expected = np.asarray(got, np.longdouble), np.asarray(expected, np.longdouble)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[~finite], expected[~finite])
    error = np.where(finite, np.abs(got - np.where(finite, expected, 0)), 0)
    allowed = relative * (np.where(finite, np.abs(expected), 0) + floor)
    allowed = np.broadcast_to(allowed + np.finfo(np.float32).tiny, got.shape)
    worst = np.unravel_index(np.argmax(error - allowed), got.shape) if got.size else ()
    assert np.all(error <= allowed), (
        f"at {tuple(map(int, worst))}: got {got[worst]}, expected {expected[worst]}, "
        f"error {error[worst]:.3g}, allowed {allowed[worst]:.3g}"
    )


def margins(x):
    """The largest distance between two finite logits of a row, at least 1."""
    x = np.asarray(x, np.float64)
    high = np.max(np.where(np.isfinite(x), x, -np.inf), axis=-1)
    low = np.min(np.where(np.isfinite(x), x, np.inf), axis=-1)
    return np.maximum(high - low, 1)


class Reference(NamedTuple):
    loss: np.ndarray
    log_prob: np.ndarray
    logsumexp: np.ndarray
    entropy: np.ndarray
    prediction: np.ndarray


def classes_last(x, axis):
    """``x`` with its class axes moved to the end and flattened."""
    axes = [a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))]
    batch = [i for i in range(x.ndim) if i not in axes]
    return x.transpose(batch + axes).reshape(*(x.shape[i] for i in batch), -1)


def negative_log_probs(x, exists):
    """-log p_c of every class of ``x[N, C]``; inf where the class does not exist."""
    x = np.where(exists, x, 0)
    apart = x[:, None, :] - x[:, :, None]  # [n, c, j]: x_j - x_c
    others = exists[:, None, :] & ~np.eye(x.shape[1], dtype=bool)
    s = np.sum(np.exp(apart), axis=-1, where=others)
    return np.where(exists, np.log1p(s), np.inf)


def exact_gradient(x, y):
    """d(-log p_y) / dx of ``x[N, C]``: no entry is a difference of two numbers near 1."""
    rows = np.arange(len(y))
    x = np.asarray(x, np.longdouble)
    e = np.exp(x - x[rows, y][:, None])
    e[rows, y] = 0
    s = np.sum(e, axis=-1, keepdims=True)
    e[rows, y] = -s[:, 0]
    return e / (1 + s)


def reference(
    logits,
    labels,
    *,
    axis=-1,
    weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    logit_softcap=None,
    sample_weight=None,
    classes=None,
    tokens=None,
    reduction="mean",
):
    """Every option of cross_entropy; ``classes`` and ``tokens`` are the two meanings of where."""
    labels = np.asarray(labels)
    x = classes_last(np.asarray(logits, np.longdouble), axis)
    batch, c = x.shape[:-1], x.shape[-1]
    x = x.reshape(-1, c)
    n = len(x)
    exists = np.ones((n, c), bool)
    if classes is not None:
        full = np.broadcast_to(np.asarray(classes), np.shape(logits))
        exists = classes_last(full, axis).reshape(n, c)
    if logit_softcap is not None:
        x = logit_softcap * np.tanh(x / logit_softcap)
    w = np.ones(c, np.longdouble) if weight is None else np.asarray(weight, np.longdouble)
    s = np.ones(n, np.longdouble)
    if sample_weight is not None:
        s = np.asarray(sample_weight).reshape(n).astype(np.longdouble)
    counts = s != 0
    if tokens is not None:
        counts &= np.asarray(tokens).reshape(n)

    nll = negative_log_probs(x, exists)
    best = np.argmax(np.where(exists, x, -np.inf), axis=-1)
    rows = np.arange(n)
    lse = np.where(exists, x, 0)[rows, best] + nll[rows, best]
    p = np.exp(-nll)
    entropy = np.sum(p * np.where(exists, nll, 0), axis=-1)
    uniform = exists * label_smoothing / np.sum(exists, axis=-1, keepdims=True)

    if np.issubdtype(labels.dtype, np.integer):
        y = labels.reshape(n)
        if ignore_index is not None:
            counts &= y != ignore_index
        y = np.where(counts, y, best)
        target = np.zeros((n, c), np.longdouble)
        target[rows, y] = 1 - label_smoothing
        label_weight = w[y]
        log_prob = -nll[rows, y]
        z_weight = label_weight
    else:
        q = classes_last(labels.astype(np.longdouble), axis).reshape(n, c)
        target = (1 - label_smoothing) * q
        label_weight, z_weight = np.ones(n, np.longdouble), 1
        log_prob = -np.sum(q * np.where(q == 0, 0, nll), axis=-1)
    target = (target + uniform) * w
    losses = np.sum(target * np.where(target == 0, 0, nll), axis=-1) + z_weight * z_loss * lse**2
    losses = s * np.where(counts, losses, 0)
    if reduction == "none":
        loss = losses.reshape(batch)
    elif reduction == "sum":
        loss = np.sum(losses)
    else:
        with np.errstate(invalid="ignore"):
            loss = np.sum(losses) / np.sum(np.where(counts, s * label_weight, 0))
    stats = (np.where(counts, v, 0).reshape(batch) for v in (log_prob, lse, entropy))
    return Reference(loss, *stats, np.where(counts, best, -1).reshape(batch))


def differences(f, x, relative=False):
    """The gradient of a longdouble function by central differences: 9 digits or more.

    ``relative``: the step follows each entry, for weights of very different sizes.
    """
    x = np.array(x, np.longdouble)
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        h = np.longdouble(2.0**-17) * (np.abs(x[i]) if relative and x[i] else 1)
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        out[i] = (f(up) - f(down)) / (2 * h)
    return out


def plain(
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
    """What one would write in jnp, over the last axis."""
    c = logits.shape[-1]
    x = logits if logit_softcap is None else logit_softcap * jnp.tanh(logits / logit_softcap)
    lse = jax.nn.logsumexp(x, axis=-1)
    nll = jnp.expand_dims(lse, -1) - x
    w = jnp.ones(c, x.dtype) if weight is None else weight
    label_weight = jnp.ones(x.shape[:-1], x.dtype)
    counts = jnp.ones(x.shape[:-1], bool)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        if ignore_index is not None:
            counts = labels != ignore_index
        q = jax.nn.one_hot(jnp.where(counts, labels, 0), c, dtype=x.dtype)
        label_weight = jnp.einsum("...c,c->...", q, w)
    else:
        q = labels
    target = (1 - label_smoothing) * q + label_smoothing / c
    losses = jnp.einsum("...c,...c,c->...", target, nll, w) + label_weight * z_loss * lse**2
    s = jnp.ones(x.shape[:-1], x.dtype) if sample_weight is None else sample_weight
    losses = jnp.where(counts, s * losses, 0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return jnp.sum(losses)
    return jnp.sum(losses) / jnp.sum(jnp.where(counts, s * label_weight, 0))


def hurting_logits(rng, shape, dtype=np.float32):
    """Flat rows beside peaked ones, of either sign, some at a large common offset."""
    x = rng.normal(size=shape)
    batch = (*shape[:-1], 1)
    x *= rng.choice([0.1, 1.0, 8.0], size=batch)
    x += rng.choice([0.0, 0.0, -40.0, 30.0], size=batch)
    return x.astype(dtype)


def equations(f, *args):
    """Every equation in the program of ``f``, loop bodies once."""

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn
            for value in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)

    return walk(jax.make_jaxpr(f)(*args).jaxpr)


def products(f, *args):
    return sum(eqn.primitive.name == "dot_general" for eqn in equations(f, *args))
