"""``TokenStats.sum_sq_probs`` and ``z_loss``: values, every derivative, and no cost unread."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms import FORMS
from numerics.fuzz.derivatives import every_derivative
from oracle.budget import EPS, LD
from oracle.draw import rows_of

import jaxloss
from jaxloss._numerics import parts

KINDS = ["plain", "flat", "peaked", "saturated", "tied", "offset", "zero"]
N, C = 24, 12
RNG = np.random.default_rng(5)
X = rows_of(RNG, KINDS, N, C, "float32")
X[:4] = X[:4] * 0 + np.array([0.0] + [-20.0] * (C - 1), np.float32)  # confident, label below
LABELS = RNG.integers(0, C, N).astype(np.int32)
LABELS[:4] = [0, 1, 2, 3]
LABELS[7] = -100
COUNTS = LABELS != -100
AUTO = (jax.sharding.AxisType.Auto,)


def split_over_four(x, labels, **options):
    mesh = jax.make_mesh((4,), ("vocab",), axis_types=AUTO)
    specs = jax.sharding.PartitionSpec(None, "vocab"), jax.sharding.PartitionSpec()
    f = partial(jaxloss.token_stats, vocab_axis_name="vocab", **options)
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=specs[1])(x, labels)


HOW = {name: form.token_stats for name, form in FORMS.items()} | {"split": split_over_four}


def exact(x):
    """(sum p^2, its slopes 2 p_j (p_j - sum p^2)) from differences, which cancel nowhere."""
    x = np.asarray(x, LD)
    apart = x[:, None, :] - x[:, :, None]
    p = 1 / np.sum(np.exp(apart), axis=-1)  # [n, j]
    # p_j - sum_i p_i^2 = sum_i p_i (p_j - p_i) = sum_i p_i p_j (1 - exp(x_i - x_j))
    lead = np.sum(p[:, None, :] * p[:, :, None] * -np.expm1(apart), axis=-1)
    return np.sum(p**2, axis=-1), 2 * p * lead


@pytest.mark.parametrize("how", HOW)
def test_values_and_slopes(how):
    """Of a confident row the slopes have all their digits, the label below the maximum or at it."""

    def total(x):
        found = HOW[how](x, jnp.asarray(LABELS)).sum_sq_probs
        return jnp.sum(found), found

    slopes, values = jax.grad(total, has_aux=True)(jnp.asarray(X))
    wanted, wanted_slopes = exact(X)
    wanted, wanted_slopes = wanted * COUNTS, wanted_slopes * COUNTS[:, None]
    spread = np.ptp(X, axis=-1)
    allowed = (2 * spread + 32) * EPS
    assert np.all(np.abs(values - wanted.astype(float)) <= allowed * wanted.astype(float))
    # 2 p_j p_max (gap - (1 - e_j)): each of the two to a few roundings, of 1 where an e is near it.
    p = np.exp(np.asarray(X, LD) - np.logaddexp.reduce(np.asarray(X, LD), axis=-1, keepdims=True))
    e = np.exp(np.asarray(X, LD) - np.max(X, axis=-1, keepdims=True).astype(LD))
    gap = np.sum(p * (1 - e), axis=-1, keepdims=True)
    near = np.any((e > 0.5) & (e < 1), axis=-1, keepdims=True)
    roundings = allowed[:, None] * (gap + (1 - e)) + 4 * EPS * near
    error = np.abs(np.asarray(slopes, LD) - wanted_slopes)
    allowed = 2 * p * p.max(-1, keepdims=True) * roundings + np.finfo(np.float32).tiny
    assert np.all(error <= allowed), np.max(error / allowed)
    np.testing.assert_array_equal(np.asarray(slopes)[~COUNTS], 0)


@pytest.mark.parametrize("name", FORMS)
def test_every_derivative(name):
    labels = jnp.asarray(LABELS[:6])
    with jax.enable_x64(True):
        x = jnp.asarray(RNG.normal(size=(6, C)) * 2)
        ct, v = (jnp.asarray(RNG.normal(size=s)) for s in (6, (6, C)))

        def ours(x):
            stats = FORMS[name].token_stats(x, labels)
            return jnp.sum(ct * jnp.sin(stats.sum_sq_probs)) + jnp.sum(stats.entropy)

        def formula(x):
            log_p = jax.nn.log_softmax(x)
            squares = jnp.sum(jnp.exp(2 * log_p), axis=-1)
            return jnp.sum(ct * jnp.sin(squares)) - jnp.sum(jnp.exp(log_p) * log_p)

        got, expected = (
            jax.jit(lambda x, f=f: every_derivative(f, x, v))(x) for f in (ours, formula)
        )
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        error = np.max(np.abs(a - b)) / np.max(np.abs(b))
        assert error < 1e-10, (jax.tree_util.keystr(path), error)


def test_labels_of_every_kind_have_it():
    x = jnp.asarray(X[8:])
    index = jnp.asarray(LABELS[8:])
    expected = jaxloss.token_stats(x, index).sum_sq_probs
    top = np.argsort(RNG.random(x.shape), axis=-1)[:, :3].astype(np.int32)
    q = np.full(top.shape, 0.25, np.float32)
    for labels in (
        jax.nn.one_hot(index, C),
        *(jaxloss.TopKLabels(top, q, rest=rest) for rest in ("drop", "uniform", "bucket")),
    ):
        got = jaxloss.token_stats(x, labels).sum_sq_probs
        np.testing.assert_allclose(got, expected, rtol=64 * EPS)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_penalty_is_reported_apart(reduction):
    """It is what the loss has more, without the class's weight; 0 where it is not asked for."""
    h, k = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((6, 4), (4, C)))
    y = jnp.asarray(LABELS[4:10])
    options = {"reduction": reduction, "return_stats": True}
    for call, given in (
        (jaxloss.cross_entropy, (h @ k, y)),
        (partial(jaxloss.linear_cross_entropy, chunk_size=2), (h, k, y)),
        (partial(jaxloss.linear_cross_entropy, implementation="vocab_blocks"), (h, k, y)),
    ):
        z = jnp.float32(0.01)
        more, stats = call(*given, z_loss=z, **options)
        less, without = call(*given, **options)
        np.testing.assert_array_equal(without.z_loss, 0)
        np.testing.assert_allclose(stats.z_loss, 0.01 * stats.logsumexp**2, rtol=4 * EPS)
        penalty = (
            more - less if reduction == "none" else (more - less) * float(np.sum(COUNTS[4:10]))
        )
        reported = stats.z_loss if reduction == "none" else jnp.sum(stats.z_loss)
        np.testing.assert_allclose(penalty, reported, rtol=1e-5, atol=32 * EPS)
    if reduction == "none":
        slope = jax.grad(lambda z: jnp.sum(call(*given, z_loss=z, **options)[1].z_loss))(z)
        np.testing.assert_allclose(slope, jnp.sum(stats.logsumexp**2), rtol=16 * EPS)


def test_a_penalty_that_is_not_asked_for_is_0_of_any_logits():
    stats = jaxloss.token_stats(jnp.full((1, 3), 1e30, jnp.float32), jnp.array([0]))
    assert stats.z_loss[0] == 0


H, K = np.ones((64, 16), np.float32), np.ones((16, 512), np.float32)
CHUNKS = {"chunk_size": 16}
BLOCKS = {"chunk_size": 128, "implementation": "vocab_blocks"}
READ = {
    "logits": lambda h, k, y: jaxloss.token_stats(h @ k, y),
    "chunks": lambda h, k, y: jaxloss.linear_token_stats(h, k, y, **CHUNKS),
    "blocks": lambda h, k, y: jaxloss.linear_token_stats(h, k, y, **BLOCKS),
    "beside a reference": lambda h, k, y: jaxloss.linear_token_stats(
        h, k, y, reference=(h, k), **CHUNKS
    )[0],
}


def of_a_loss(options):
    def total(h, k, y):
        loss, stats = jaxloss.linear_cross_entropy(h, k, y, return_stats=True, **options)
        return loss + jnp.sum(stats.log_prob)

    return total


def own_loss(h, k, y):
    return jaxloss.linear_stats_loss(lambda s: s.log_prob, h, k, y, **CHUNKS)


PROGRAMS = {n: lambda *given, f=f: jnp.sum(f(*given).log_prob) for n, f in READ.items()}
PROGRAMS |= {"a loss in chunks": of_a_loss(CHUNKS), "a loss in blocks": of_a_loss(BLOCKS)}
PROGRAMS["a loss of statistics"] = own_loss


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_costs_nothing_where_it_is_not_read(name, monkeypatch):
    """The compiled program is that of sums which take no pass."""
    y = np.zeros(64, np.int32)

    def cost(f):
        program = jax.jit(f).lower(H, K, y).compile()
        found = program.cost_analysis()
        names = "flops", "transcendentals"
        return [found[n] for n in names] + [program.memory_analysis().temp_size_in_bytes]

    def costs():
        jax.clear_caches()
        f = PROGRAMS[name]
        return cost(f), cost(jax.grad(f, (0, 1)))

    given = costs()
    if name in READ:
        read = lambda *given: jnp.sum(READ[name](*given).sum_sq_probs)  # noqa: E731
        both = lambda *given: read(*given) + PROGRAMS[name](*given)  # noqa: E731
        assert all(a > b for a, b in zip(cost(both)[:2], given[0][:2], strict=True))
    monkeypatch.setattr(parts, "_square_sums", lambda given, m: (m, m))
    assert costs() == given
    jax.clear_caches()


@pytest.mark.parametrize("kernel", ["mosaic_tpu", "mosaic_gpu"])
def test_no_kernel_takes_statistics(kernel):
    h, k, y = (jnp.asarray(v) for v in (H, K, np.zeros(64, np.int32)))
    with pytest.raises(ValueError, match=r"takes class indices .*statistics"):
        jaxloss.linear_token_stats(
            h.astype(jnp.bfloat16), k.astype(jnp.bfloat16), y, implementation=kernel
        )
