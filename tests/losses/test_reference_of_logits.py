"""``token_stats(reference=)``: what ``linear_token_stats`` says of products, of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracle.budget import EPS

import jaxloss
from jaxloss import ReferenceStats, TokenStats, TopKLabels

RNG = np.random.default_rng(3)
N, D, C = 6, 4, 11
LABELS = jnp.array([0, 3, -100, 6, 1, 9])
COUNTS = np.asarray(LABELS) >= 0
HIDDEN, OTHER = (jnp.asarray(RNG.normal(size=(N, D)), jnp.float32) for _ in range(2))
KERNEL, ITS_KERNEL = (jnp.asarray(RNG.normal(size=(D, C)), jnp.float32) for _ in range(2))
WEIGHTS = jnp.asarray(RNG.normal(size=(7, N)), jnp.float32)
TEMPERATURES = jnp.asarray(RNG.uniform(0.5, 2, N), jnp.float32)
STORED = TopKLabels(
    jnp.asarray(np.argsort(RNG.random((N, C - 1)), axis=-1)[:, :3], jnp.int32),
    jnp.asarray(RNG.dirichlet(np.ones(4), N)[:, :3], jnp.float32),
    rest="bucket",
)
DROPS = TopKLabels(STORED.indices, STORED.probabilities)
OPTIONS = {
    "plain": {},
    "many": {
        "logit_softcap": 3.0,
        "temperature": 0.7,
        "kl_temperature": TEMPERATURES,
        "where": jnp.arange(C)[None] != 5,
        "num_classes": C - 1,
        "beta": 0.2,
    },
    "a temperature a token": {"temperature": TEMPERATURES, "logit_softcap": 2.0},
    "two temperatures": {"temperature": 0.5, "kl_temperature": jnp.float32(2.0)},
}
MOVING = ("log_prob", "logsumexp", "entropy", "sum_sq_probs")
APART = ("forward_kl", "reverse_kl", "jensen_shannon")


def nan_where_none_counts(x):
    return jnp.where(COUNTS[:, None], x, jnp.nan)


def of_logits(hidden, stored, **options):
    x = nan_where_none_counts(hidden @ KERNEL)
    reference = STORED if stored else nan_where_none_counts(OTHER @ ITS_KERNEL)
    return jaxloss.token_stats(x, LABELS, reference=reference, **options)


def of_products(hidden, stored, **options):
    if "where" in options:  # a product's mask has no column of padding
        options |= {"where": options["where"][:, : options["num_classes"]]}
    reference = STORED if stored else (OTHER, ITS_KERNEL)
    given = hidden, KERNEL, LABELS
    return jaxloss.linear_token_stats(*given, reference=reference, chunk_size=2, **options)


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_as_of_products(name, stored):
    options = OPTIONS[name]

    @jax.jit
    def both(hidden):
        def run(f):
            def total(hidden):
                stats, reference = f(hidden, stored, **options)
                moving = [getattr(stats, n) for n in MOVING]
                moving += [getattr(reference, n) for n in APART]
                summed = sum(jnp.sum(w * v) for w, v in zip(WEIGHTS, moving, strict=True))
                return summed, (stats, reference)

            slope, out = jax.grad(total, has_aux=True)(hidden)
            second = jax.jvp(jax.grad(lambda h: total(h)[0]), (hidden,), (OTHER,))[1]
            return out, slope, second

        return run(of_logits), run(of_products)

    (got, *slopes), (expected, *wanted) = both(HIDDEN)
    assert isinstance(got[0], TokenStats)
    assert isinstance(got[1], ReferenceStats)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=256 * EPS, atol=4 * EPS)
    for a, b in zip(slopes, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=64 * EPS * float(jnp.max(jnp.abs(b))))
        np.testing.assert_array_equal(np.asarray(a)[~COUNTS], 0)


def test_against_formulas_in_float64():
    with jax.enable_x64(True):
        x, t = (jnp.asarray(RNG.normal(size=(N, C)) * 3) for _ in range(2))
        stats, reference = jaxloss.token_stats(x, LABELS, reference=t, kl_temperature=2.0, beta=0.3)
        log_p, log_q = (jax.nn.log_softmax(v / 2) for v in (t, x))
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        m = jnp.log(0.3 * p + 0.7 * q)
        expected = {
            "log_prob": jax.nn.log_softmax(t)[jnp.arange(N), LABELS % C],
            "entropy": -jnp.sum(p * log_p, -1),
            "forward_kl": jnp.sum(p * (log_p - log_q), -1),
            "reverse_kl": jnp.sum(q * (log_q - log_p), -1),
            "jensen_shannon": jnp.sum(0.3 * p * (log_p - m) + 0.7 * q * (log_q - m), -1),
        }
        for name, value in expected.items():
            wanted = np.where(COUNTS, value, 0)
            np.testing.assert_allclose(getattr(reference, name), wanted, rtol=1e-12, err_msg=name)
        squares = np.where(COUNTS, jnp.sum(jax.nn.softmax(x) ** 2, -1), 0)
        np.testing.assert_allclose(stats.sum_sq_probs, squares, rtol=1e-12)


def test_no_gradient_reaches_the_reference():
    def total(t, q):
        stored = TopKLabels(STORED.indices, q, rest="bucket")
        out = [jaxloss.token_stats(HIDDEN @ KERNEL, LABELS, reference=r)[1] for r in (t, stored)]
        found = (getattr(r, name) for r in out for name in (*APART, "entropy"))
        return sum(jnp.sum(v) for v in found) + jnp.sum(out[0].log_prob)

    slopes = jax.grad(total, (0, 1))(OTHER @ ITS_KERNEL, STORED.probabilities)
    for slope in slopes:
        np.testing.assert_array_equal(slope, 0)


def test_another_axis_and_dtype():
    x, t = HIDDEN @ KERNEL, (OTHER @ ITS_KERNEL).astype(jnp.bfloat16)
    expected = jaxloss.token_stats(x, LABELS, reference=t)
    across = jaxloss.token_stats(x.T, LABELS, axis=0, reference=t.T)
    folded = jaxloss.token_stats(x[..., None], LABELS, axis=(1, 2), reference=t[..., None])
    for got in (across, folded):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=32 * EPS), got, expected)


@pytest.mark.parametrize("stored", [False, True])
def test_split_vocabulary(stored):
    mesh = jax.make_mesh((4,), ("classes",), axis_types=(jax.sharding.AxisType.Auto,))
    x, t = (jnp.pad(v, ((0, 0), (0, 1))) for v in (HIDDEN @ KERNEL, OTHER @ ITS_KERNEL))

    def total(x, t, q, vocab_axis_name=None):
        reference = TopKLabels(STORED.indices, q, rest="bucket") if stored else t
        options = {"num_classes": C, "kl_temperature": 2.0, "vocab_axis_name": vocab_axis_name}
        stats, found = jaxloss.token_stats(x, LABELS, reference=reference, **options)
        moving = [getattr(stats, n) for n in MOVING] + [getattr(found, n) for n in APART]
        return sum(jnp.sum(w * v) for w, v in zip(WEIGHTS, moving, strict=True))

    def split(x, t, q):
        return jax.value_and_grad(total)(x, t, q, "classes")

    specs = P(None, "classes"), P(None, "classes"), P()
    run = jax.shard_map(split, mesh=mesh, in_specs=specs, out_specs=(P(), P(None, "classes")))
    got = jax.jit(run)(x, t, STORED.probabilities)
    expected = jax.jit(jax.value_and_grad(total))(x, t, STORED.probabilities)
    np.testing.assert_allclose(got[0], expected[0], rtol=64 * EPS)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-4, atol=16 * EPS)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"reference": np.ones((N, C + 1), np.float32)}, ValueError, r"reference must have the sh"),
        ({"reference": np.ones((N, C), int)}, TypeError, r"reference must have .* floating dtype"),
        ({"reference": (HIDDEN, KERNEL)}, TypeError, r"reference must be .*linear_token_stats"),
        ({"reference": DROPS}, ValueError, "rest='bucket'"),
        ({"kl_temperature": 2.0}, ValueError, "kl_temperature is for a reference"),
        ({"reference": np.ones((N, C), np.float32), "beta": 1.0}, ValueError, r"beta must be in"),
        (
            {"reference": np.ones((N, C), np.float32), "kl_temperature": np.ones(2, np.float32)},
            ValueError,
            "kl_temperature must have no axes, or the shape of the losses",
        ),
    ],
)  # fmt: skip
def test_errors(options, kind, text):
    with pytest.raises(kind, match=rf"^token_stats: .*{text}"):
        jaxloss.token_stats(HIDDEN @ KERNEL, LABELS, **options)
