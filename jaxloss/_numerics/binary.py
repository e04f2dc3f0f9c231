"""What a binary decision is made of: sigmoids, their logarithms, and the focal loss's half of one.

Each has its derivatives in closed form, so that no factor of a second derivative is infinite where
another one is 0.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxloss._xla.derivatives import with_slopes
from jaxloss._xla.elementary import exp, exp_of_nonpositive, log, log1p


@jax.custom_jvp
def sigmoids(x: Array) -> tuple[Array, Array]:
    """``sigmoid(-x)`` and ``sigmoid(x)``."""
    e = exp_of_nonpositive(-jnp.abs(x))
    large = 1 / (1 + e)
    small = e * large
    return jnp.where(x > 0, small, large), jnp.where(x > 0, large, small)


@sigmoids.defjvp
def _sigmoids_jvp(primals, tangents):
    down, up = sigmoids(*primals)
    slope = down * up * tangents[0]
    return (down, up), (-slope, slope)


@jax.custom_jvp
def softplus(x: Array) -> tuple[Array, Array]:
    """``softplus(-x)`` and ``softplus(x)``.

    Their own rule: JAX's second derivative of ``max(x, 0) + log1p(exp(-|x|))`` is 0 at 0.
    """
    above = log1p(exp_of_nonpositive(-jnp.abs(x)))
    return jnp.maximum(-x, 0) + above, jnp.maximum(x, 0) + above


@softplus.defjvp
def _softplus_jvp(primals, tangents):
    down, up = sigmoids(*primals)
    return softplus(*primals), (-down * tangents[0], up * tangents[0])


class _Terms(NamedTuple):
    """With ``S`` the sigmoid and ``u = y S(-x) + z S(x)``; x, y and z each move alone."""

    log_u: Array
    no: Array  # S(-x)
    yes: Array  # S(x)
    n: Array  # -log S(x)
    n_no: Array  # -log S(-x)
    of_y: Array  # y S(-x) / u: of_x is -of_y of_z
    of_z: Array  # z S(x) / u, the rest
    slope: Array  # of log u by x
    ratio: Array  # n / S(-x), at least 1: of_x is ratio S(x) - 1


def _terms(x: Array, y: Array, z: Array) -> _Terms:
    no, yes = sigmoids(x)
    n, n_no = softplus(x)
    u, tiny = y * no + z * yes, jnp.finfo(x.dtype).tiny
    # A negative u (of a "probability" past 1) has no logarithm, and stays NaN.
    underflows = (u >= 0) & (u < tiny)
    divisor = jnp.where(underflows, 1, u)
    # Finite: a gamma of 0 multiplies it.
    least = float(jnp.finfo(x.dtype).min)
    log_u = jnp.where(underflows, jnp.maximum(-jnp.abs(x), least), log(divisor))
    # Where u underflows, one of its terms is 0 by its label, and the other is all of u.
    of_y = jnp.where(underflows, jnp.where(y == 0, 0, 1), y * no / divisor)
    of_z = jnp.where(underflows, jnp.where(y == 0, 1, 0), z * yes / divisor)
    bounded = _bounded(n)
    ratio = jnp.where(no < tiny, 1, bounded / jnp.where(no < tiny, 1, no))
    return _Terms(log_u, no, yes, n, n_no, of_y, of_z, of_z * no - of_y * yes, ratio)


def _bounded(n: Array) -> Array:
    """``n`` for a product with what is 0 where n is large: the slope of a wrong entry's u."""
    return jnp.minimum(n, 1e4)


def _focal_half(x: Array, y: Array, z: Array, gamma: Any) -> Array:
    """``u^gamma y n``, with ``u = y S(-x) + z S(x)`` and ``n = -log S(x)``: the focal loss of what
    is a yes with probability y, and a no with z, but for the part that it has as a no.

    Since ``d n = -S(-x)``, and ``d log u`` is ``of_z S(-x) - of_y S(x)`` by x, the derivatives are
    these. In none of them is anything divided by u, whose powers are taken of its logarithm. By
    gamma, a scalar, each is ``log u`` times itself, and the derivative of its other factors.
    """
    t = _terms(x, y, z)
    return exp(gamma * t.log_u) * (y * jnp.where((y == 0) & jnp.isinf(t.n), 0, t.n))


def _by_x(x, y, z, gamma):
    t = _terms(x, y, z)
    return exp(gamma * t.log_u) * (gamma * t.slope * (y * _bounded(t.n)) - y * t.no)


def _by_y(x, y, z, gamma):
    t = _terms(x, y, z)
    power = exp(gamma * t.log_u)
    return power * jnp.where(power == 0, 0, t.n) * (1 + gamma * t.of_y)


def _by_z(x, y, z, gamma):
    t = _terms(x, y, z)
    return gamma * exp(gamma * t.log_u) * t.yes * (t.of_y * t.ratio)


def _by_gamma(x, y, z, gamma):
    return _times(_log_u(x, y, z), focal_half(x, y, z, gamma))


def _times(log_u: Array, x: Array) -> Array:
    """``log_u x``; 0 where u is 1, because its logarithm falls faster than x grows."""
    return jnp.where(log_u == 0, 0, log_u * x)


def _log_u(x: Array, y: Array, z: Array) -> Array:
    """``log u``, exact where u is rounded to 1 too: its complement is ``y S(x) + z S(-x)``."""
    log_u = _terms(x, y, z).log_u
    no, yes = sigmoids(x)
    complement = y * yes + z * no
    near_1 = jnp.abs(complement) < 0.5
    return jnp.where(near_1, log1p(-jnp.where(near_1, complement, 0)), log_u)


def _by_x_and_gamma(x, y, z, gamma):
    t = _terms(x, y, z)
    rest = exp(gamma * t.log_u) * t.slope * (y * _bounded(t.n))
    return _times(_log_u(x, y, z), _by_x(x, y, z, gamma)) + rest


def _by_y_and_gamma(x, y, z, gamma):
    t = _terms(x, y, z)
    power = exp(gamma * t.log_u)
    rest = power * jnp.where(power == 0, 0, t.n) * t.of_y
    return _times(_log_u(x, y, z), _by_y(x, y, z, gamma)) + rest


def _by_z_and_gamma(x, y, z, gamma):
    t = _terms(x, y, z)
    rest = exp(gamma * t.log_u) * t.yes * (t.of_y * t.ratio)
    return _times(_log_u(x, y, z), _by_z(x, y, z, gamma)) + rest


def _by_gamma_twice(x, y, z, gamma):
    return _times(_log_u(x, y, z), _by_gamma(x, y, z, gamma))


def _by_xx(x, y, z, gamma):
    t = _terms(x, y, z)
    of_slope = t.of_y * t.of_z - t.no * t.yes
    of_ratio = t.ratio * t.yes - 1
    rest = ((gamma + 1) * t.slope - t.of_z) * (gamma * t.slope * t.ratio - 1)
    rest += gamma * (of_slope * t.ratio + t.slope * of_ratio)
    return exp((gamma + 1) * t.log_u) * t.of_y * rest


def _by_xy(x, y, z, gamma):
    t = _terms(x, y, z)
    n = _bounded(t.n)
    rest = (1 + gamma * t.of_y) * (gamma * t.slope * n - t.no) - gamma * t.of_y * t.of_z * n
    return exp(gamma * t.log_u) * rest


def _by_xz(x, y, z, gamma):
    t = _terms(x, y, z)
    rest = (gamma * t.slope + t.no - t.of_z) * t.ratio + (t.ratio * t.yes - 1)
    return gamma * exp(gamma * t.log_u) * t.yes * t.of_y * rest


def _by_yy(x, y, z, gamma):
    t = _terms(x, y, z)
    power = exp((gamma - 1) * t.log_u - t.n_no)
    n = jnp.where(jnp.isinf(t.n), 0, t.n)
    return gamma * power * n * (1 + gamma * t.of_y + t.of_z)


def _by_yz(x, y, z, gamma):
    t = _terms(x, y, z)
    power = exp((gamma - 1) * t.log_u - t.n_no - t.n)
    return gamma * power * t.ratio * (t.of_z + gamma * t.of_y)


def _by_zz(x, y, z, gamma):
    t = _terms(x, y, z)
    return gamma * (gamma - 1) * exp((gamma - 1) * t.log_u - 2 * t.n) * (t.of_y * t.ratio)


focal_half = with_slopes(
    _focal_half,
    with_slopes(_by_x, _by_xx, _by_xy, _by_xz, _by_x_and_gamma),
    with_slopes(_by_y, _by_xy, _by_yy, _by_yz, _by_y_and_gamma),
    with_slopes(_by_z, _by_xz, _by_yz, _by_zz, _by_z_and_gamma),
    with_slopes(_by_gamma, _by_x_and_gamma, _by_y_and_gamma, _by_z_and_gamma, _by_gamma_twice),
)
