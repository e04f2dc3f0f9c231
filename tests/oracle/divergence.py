"""The truth of two softmaxes: the textbook's sums in 120 digits, of which they lose up to 70."""

from typing import NamedTuple

import mpmath
import numpy as np


class Exact(NamedTuple):
    loss: np.ndarray  # [N]
    slopes: tuple  # with respect to the student's and the teacher's logits, [N, C]
    room: tuple  # w (1 - w), with w the probability that scales each of the slopes
    apart: np.ndarray  # the largest finite |log p - log q|


def exact_row(x, t, divergence, beta=0.5, temperature=1.0):
    def softmax(row):
        e = [mpmath.exp(mpmath.mpf(float(v)) / mpmath.mpf(temperature)) for v in row]
        return [v / sum(e) for v in e]

    def log_ratio(u, v):
        return mpmath.log(u / v) if u and v else mpmath.inf * bool(u)

    def logs(us, vs):
        return [log_ratio(u, v) for u, v in zip(us, vs, strict=True)]

    def mean(us, values):
        return sum((u * v for u, v in zip(us, values, strict=True) if u), mpmath.mpf(0))

    def centred(us, values):
        # u (v - mean), whose 120 digits are gone where one u is nearly 1: its own v is left out.
        pairs = list(enumerate(zip(us, values, strict=True)))
        return [
            u * sum((w * (v - z) for j, (w, z) in pairs if w and j != i), mpmath.mpf(0)) if u else 0
            for i, (u, v) in pairs
        ]

    q, p, b = softmax(x), softmax(t), mpmath.mpf(beta)
    less = [min(pair) for pair in zip(p, q, strict=True)]
    mixed = [b * u + (1 - b) * v for u, v in zip(p, q, strict=True)]
    if divergence == "forward":
        loss, room = mean(p, logs(p, q)), (less, p)
        slopes = [v - u for u, v in zip(p, q, strict=True)], centred(p, logs(p, q))
    elif divergence == "reverse":
        loss, room = mean(q, logs(q, p)), (q, less)
        slopes = centred(q, logs(q, p)), [u - v for u, v in zip(p, q, strict=True)]
    else:
        loss, room = b * mean(p, logs(p, mixed)) + (1 - b) * mean(q, logs(q, mixed)), (q, p)
        slopes = (
            [(1 - b) * v for v in centred(q, logs(q, mixed))],
            [b * v for v in centred(p, logs(p, mixed))],
        )
    apart = max((abs(a) for a in logs(p, q) if abs(a) < mpmath.inf), default=0)
    return [
        float(loss),
        *([float(v / mpmath.mpf(temperature)) for v in part] for part in slopes),
        *([float(w * (1 - w)) for w in part] for part in room),
        float(apart),
    ]


def exact(x, t, **options):
    with mpmath.workdps(120):
        rows = [exact_row(*row, **options) for row in zip(x, t, strict=True)]
    loss, dx, dt, of_x, of_t, apart = map(np.array, zip(*rows, strict=True))
    return Exact(loss, (dx, dt), (of_x, of_t), apart)


def known(apart, share):
    """The size of what is rounded in a slope: ``a``, or log(q / m) with ``share`` of p in m."""
    if share is None:
        return apart
    grown = np.logaddexp(np.log1p(-share), np.log(share) + apart)  # the largest log(m / q)
    return apart * np.exp(np.log(share) + apart - grown) + grown - np.log1p(-share)
