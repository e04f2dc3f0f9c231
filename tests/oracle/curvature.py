"""Second derivatives of a row's loss as differences in 130 digits of its definition.

Nothing is differentiated by hand here, and nothing cancels that 130 digits do not hold.
"""

import decimal
from decimal import Decimal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from oracle.budget import EPS
from oracle.programs import jit_quickly

STEP = Decimal(10) ** -30


def decimals(x):
    return [Decimal(float(v)) for v in np.ravel(x)]


def slopes_and_hessian(f, x):
    """Of ``f(list of Decimal)`` at ``x``: (a list, a symmetric list of lists)."""
    n = len(x)

    def at(*moves):
        moved = list(x)
        for i, sign in moves:
            moved[i] = moved[i] + sign * STEP
        return f(moved)

    with decimal.localcontext() as context:
        context.prec = 130
        slopes = [(at((i, 1)) - at((i, -1))) / (2 * STEP) for i in range(n)]
        hessian = [[Decimal(0)] * n for _ in range(n)]
        for i in range(n):
            for j in range(i + 1):
                corners = [((i, a), (j, b)) for a, b in ((1, 1), (-1, -1), (1, -1), (-1, 1))]
                values = [at(*corner) for corner in corners]
                cross = values[0] + values[1] - values[2] - values[3]
                hessian[i][j] = hessian[j][i] = cross / (4 * STEP * STEP)
    return slopes, hessian


def along(hessian, v, sizes=False):
    """``hessian @ v``, or of the sizes of both: what its terms are before they cancel."""
    with decimal.localcontext() as context:
        context.prec = 130
        rows = [[a * b for a, b in zip(row, v, strict=True)] for row in hessian]
        return np.array([float(sum(map(abs, row) if sizes else row)) for row in rows])


# Definitions, in Decimal.


def softmax(x):
    top = max(x)
    e = [(v - top).exp() for v in x]
    return [v / sum(e) for v in e]


def softplus(x):
    return (1 + x.exp()).ln()


def divergence(x, t, kind, beta, temperature):
    q, p = (softmax([a / Decimal(temperature) for a in v]) for v in (x, t))
    if kind == "forward":
        return sum(a * (a / b).ln() for a, b in zip(p, q, strict=True))
    if kind == "reverse":
        return sum(b * (b / a).ln() for a, b in zip(p, q, strict=True))
    beta = Decimal(beta)
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    of_teacher = sum(a * (a / c).ln() for a, c in zip(p, m, strict=True))
    return beta * of_teacher + (1 - beta) * sum(b * (b / c).ln() for b, c in zip(q, m, strict=True))


def focal(x, y, gamma):
    p = softmax(x)[y]
    return (Decimal(gamma) * (1 - p).ln()).exp() * -p.ln()


def sigmoid_focal(x, y, gamma, alpha=None):
    yes = 1 / (1 + (-x).exp())
    wrong = y * (1 - yes) + (1 - y) * yes
    balance = 1 if alpha is None else Decimal(alpha) * y + (1 - Decimal(alpha)) * (1 - y)
    loss = y * softplus(-x) + (1 - y) * softplus(x)
    return balance * (Decimal(gamma) * wrong.ln()).exp() * loss


# The three modes, of a function of rows that do not mix


def second_derivatives(f, x, v):
    """Of the sum of ``f``'s rows at the arrays ``x`` along ``v``: (jvp of grad, grad of grad, jvp
    of jvp a row), in NumPy."""
    return jax.tree.map(np.asarray, jit_quickly(partial(second_modes, f))(x, v))


def second_modes(f, x, v):
    slope = jax.grad(lambda *x: jnp.sum(f(*x)), tuple(range(len(x))))

    def scalarised(*x):
        return sum(jnp.sum(g * d) for g, d in zip(slope(*x), v, strict=True))

    def tangent(*x):
        return jax.jvp(f, x, v)[1]

    return (
        jax.jvp(slope, x, v)[1],
        jax.grad(scalarised, tuple(range(len(x))))(*x),
        jax.jvp(tangent, x, v)[1],
    )


def assert_curvature(got, hessian, v, margin, floor, sizes, slopes=None):
    """``got``: of one row, the three modes, in NumPy. Every term of a product of the Hessian and
    the tangent has the relative error of a probability, ``margin + 16`` roundings; what is allowed
    is of the largest sum of terms of the same operand (``sizes``: how many numbers each has).

    ``slopes``: where the loss is not near 0, the derivative of a slope is a difference of terms of
    the slope's size times the tangent's, in the plain formula too.
    """
    relative = (margin + 16) * 4 * EPS
    expected, terms = along(hessian, decimals(v)), along(hessian, decimals(v), sizes=True)
    v = np.ravel(np.asarray(v, np.float64))
    if slopes is not None:
        terms += np.abs(np.array(slopes, float)) * np.max(np.abs(v))
    cuts = np.cumsum(sizes)[:-1]
    for mode, one in zip(("jvp of grad", "grad of grad"), got, strict=False):
        flat = np.concatenate([np.ravel(np.asarray(a, np.float64)) for a in one])
        for place, (a, b, size) in enumerate(
            zip(*(np.split(w, cuts) for w in (flat, expected, terms)), strict=True)
        ):
            error, allowed = np.max(np.abs(a - b)), relative * np.max(size) + floor
            assert error <= allowed, (mode, place, a, b, f"error {error:.1e} of {allowed:.1e}")
    error = abs(float(got[2]) - np.dot(expected, v))
    allowed = relative * np.dot(terms, np.abs(v)) + floor * np.sum(np.abs(v))
    assert error <= allowed, ("jvp of jvp", float(got[2]), f"error {error:.1e} of {allowed:.1e}")


def surprises(x):
    """``-log softmax``."""
    return [-p.ln() for p in softmax(x)]


def capped(x, cap):
    if cap is None:
        return x
    e = [(2 * v / Decimal(cap)).exp() for v in x]
    return [Decimal(cap) * (v - 1) / (v + 1) for v in e]


def softmax_loss(x, target, smoothing=0.0, z_loss=0.0, cap=None, bucket=None, exists=None):
    """Cross-entropy of one row; ``bucket``: the classes that share what the target leaves."""
    exists = range(len(x)) if exists is None else exists
    z = capped(x, cap)
    z = [z[c] for c in exists]
    nll, t = surprises(z), [Decimal(float(target[c])) for c in exists]
    eps = Decimal(smoothing)
    share = eps / len(z)
    loss = sum(((1 - eps) * a + share) * b for a, b in zip(t, nll, strict=True))
    if bucket is not None:
        rest = sum((-nll[i]).exp() for i, c in enumerate(exists) if c in bucket)
        loss += (1 - sum(t)) * -rest.ln()
    top = max(z)
    lse = top + sum((v - top).exp() for v in z).ln()
    return loss + Decimal(z_loss) * lse * lse


def statistics(x, target, weights, temperature=1.0):
    """A weighted sum of the log-probability, the logsumexp and the entropy."""
    z = [v / Decimal(temperature) for v in x]
    nll, top = surprises(z), max(z)
    lse = top + sum((v - top).exp() for v in z).ln()
    log_prob = -sum(Decimal(float(a)) * b for a, b in zip(target, nll, strict=True))
    entropy = sum((-v).exp() * v for v in nll)
    a, b, c = (Decimal(float(w)) for w in weights)
    return a * log_prob + b * lse + c * entropy
