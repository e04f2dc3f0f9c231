"""Log-probabilities of named classes, the most likely classes, and samples."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracle.programs import equations, jit_quickly

import jaxloss

N, D, V, C, K = 24, 8, 32, 27, 5


def operands():
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.normal(size=(4, 6, D)), jnp.float32)
    k = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    indices = rng.permuted(np.tile(np.arange(C), (4, 6, 1)), axis=-1)[..., :K]
    indices[1, 2] = indices[0, 3, 2:] = -100
    return h, k, jnp.asarray(indices, jnp.int32)


def exact(x, indices, exists=None):
    """(log-probabilities, that of the rest) in longdouble."""
    x = np.asarray(x, np.longdouble)
    if exists is not None:
        x = np.where(exists, x, -np.inf)
    taken = indices >= 0
    named = np.zeros(x.shape, bool)
    np.put_along_axis(named, np.where(taken, indices, np.maximum(indices[..., :1], 0)), True, -1)
    of = lambda v: np.where(np.isinf(v), -np.inf, v)  # noqa: E731

    def log_sum(keep):
        v = np.where(keep, x, -np.inf)
        m = v.max(-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return of(m) + np.log(np.sum(np.exp(v - np.where(np.isinf(m), 0, m)[..., None]), -1))

    def log_p(keep):  # log(a / (a + b)), whichever is the larger
        a, b = log_sum(keep), log_sum(~keep)
        return -np.log1p(np.exp(b - a))

    classes = np.arange(x.shape[-1])
    each = [log_p(classes == np.maximum(indices[..., [i]], 0)) for i in range(indices.shape[-1])]
    some = taken.any(-1)
    found = np.where(taken, np.stack(each, -1), -np.inf)
    return np.where(some[..., None], found, 0), np.where(some, log_p(~named), 0)


@pytest.mark.parametrize("margin", [0.0, 10.0, 40.0, 80.0])
def test_values_at_every_confidence(margin):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(8, C))
    x[:, 3] += margin
    x = np.float32(x)
    indices = np.tile(np.array([3, 7, 11]), (8, 1))
    got, rest = jaxloss.log_probs_at(x, indices, return_rest=True)
    expected, expected_rest = exact(x, indices)
    np.testing.assert_allclose(got, np.float64(expected), rtol=2e-6)
    np.testing.assert_allclose(rest, np.float64(expected_rest), rtol=4e-6)
    # The gradient of the leading class's: 1 - p, and -p of the others.
    slope = jax.grad(lambda x: jnp.sum(jaxloss.log_probs_at(x, indices)[:, 0]))(x)
    wide = np.asarray(x, np.longdouble)
    e = np.exp(wide - wide[:, [3]])
    others = e.sum(-1) - 1 if margin < 20 else np.delete(e, 3, axis=-1).sum(-1)
    expected = -e / (1 + others[:, None])
    expected[:, 3] = others / (1 + others)
    np.testing.assert_allclose(slope, np.float64(expected), rtol=4e-6, atol=1e-38)


def test_a_rest_that_is_nearly_all_or_nothing():
    x = np.float32(np.linspace(0, 60, 9))[None]
    for indices in ([[0]], [[8]], [[8, 7, 6]], [list(range(9))], [[0, 0]]):
        indices = np.array(indices)
        _, rest = jaxloss.log_probs_at(x, indices, return_rest=True)
        np.testing.assert_allclose(rest, np.float64(exact(x, indices)[1]), rtol=2e-6)


@pytest.mark.nan_is_meant
def test_indices_that_are_no_classes():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, C)), jnp.float32)
    x = x.at[2].set(jnp.nan)
    indices = jnp.array([[0, -100], [1, C], [-100, -100], [3, -1]])
    got, rest = jaxloss.log_probs_at(x, indices, return_rest=True)
    assert got[0, 1] == -jnp.inf
    assert np.isfinite(got[0, 0])
    np.testing.assert_array_equal(np.isnan(got), [[0, 0], [0, 1], [0, 0], [0, 1]])
    np.testing.assert_array_equal(np.isnan(rest), [0, 1, 0, 1])
    np.testing.assert_array_equal(got[2], 0)  # it names no class
    ct = jnp.array([[1.0, jnp.nan]] + 3 * [[0.0, 0.0]])  # never read at an ignored index
    (slope,) = jax.vjp(lambda x: jaxloss.log_probs_at(x, indices)[:1], x)[1](ct[:1])
    assert np.all(np.isfinite(slope))


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"logit_softcap": 2.0}, {"where": 1}]
)
def test_options_and_the_linear_form(options):
    h, k, indices = operands()
    options = dict(options)
    exists = None
    if "where" in options:
        exists = np.random.default_rng(3).random((4, 6, C)) < 0.7
        np.put_along_axis(exists, np.maximum(np.asarray(indices), 0), True, axis=-1)
        options["where"] = exists
    x = (h @ k)[..., :C]
    plain = partial(jaxloss.log_probs_at, return_rest=True, **options)
    fused = partial(
        jaxloss.linear_log_probs_at, return_rest=True, num_classes=C, chunk_size=5, **options
    )
    z = np.float64(x)
    z = 2 * np.tanh(z / 2) if "logit_softcap" in options else z / options.get("temperature", 1)
    expected = exact(z, np.asarray(indices), exists)
    for got in (plain(x, indices), jit_quickly(lambda: fused(h, k, indices))()):
        for g, e in zip(got, expected, strict=True):
            np.testing.assert_allclose(g, np.float64(e), rtol=2e-5, atol=2e-6)

    def total(found):
        return sum(jnp.sum(jnp.where(jnp.isfinite(v), jnp.sin(v), 0)) for v in found)

    slopes = jax.grad(lambda h, k: total(fused(h, k, indices)), (0, 1))(h, k)
    expected = jax.grad(lambda h, k: total(plain((h @ k)[..., :C], indices)), (0, 1))(h, k)
    for g, e in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-4, atol=2e-5)


def test_temperatures_of_tokens_and_every_mode():
    h, k, indices = operands()
    temperature = jnp.exp(0.3 * h[..., 0])

    def total(function, h, temperature):
        found, rest = function(h, temperature)
        some = jnp.where(indices >= 0, found, 0) / 8
        return jnp.sum(some * jnp.cos(some)) + jnp.sum(rest) / 8

    def fused(h, temperature):
        options = {"temperature": temperature, "chunk_size": 5, "return_rest": True}
        return jaxloss.linear_log_probs_at(h, k, indices, **options)

    def plain(h, temperature):
        z = (h @ k) / temperature[..., None]
        log_p = jax.nn.log_softmax(z, axis=-1)
        found = jnp.take_along_axis(log_p, jnp.maximum(indices, 0), axis=-1)
        named = jnp.sum(jax.nn.one_hot(indices, V), axis=-2)
        rest = jax.nn.logsumexp(jnp.where(named > 0, -jnp.inf, log_p), axis=-1)
        some = jnp.any(indices >= 0, axis=-1)
        return jnp.where(some[..., None], found, 0), jnp.where(some, rest, 0)

    args = h, temperature
    along = tuple(map(jnp.cos, args))

    def modes(function):
        scalar = partial(total, function)
        gradient = jax.grad(scalar, (0, 1))
        second = jax.grad(lambda *a: sum(jnp.sum(g**2) for g in gradient(*a)), (0, 1))
        return gradient(*args), jax.jvp(scalar, args, along)[1], second(*args)

    got, expected = (jit_quickly(partial(modes, f))() for f in (fused, plain))
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=0, atol=1e-4 * float(np.max(np.abs(e))))


def test_a_temperature_a_token_of_logits():
    h, k, indices = operands()
    x, temperature = h @ k, jnp.exp(0.3 * h[..., 0])
    got = jaxloss.log_probs_at(x, indices, temperature=temperature)
    expected = jaxloss.log_probs_at(x / temperature[..., None], indices)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    # What a row that does not count has is not read.
    wrong = jnp.where(jnp.any(indices >= 0, axis=-1), temperature, 0)
    np.testing.assert_array_equal(jaxloss.log_probs_at(x, indices, temperature=wrong), got)


def test_an_axis_that_is_not_the_last():
    h, k, indices = operands()
    x = h @ k
    got = jaxloss.log_probs_at(jnp.moveaxis(x, -1, 1), indices, axis=1)
    np.testing.assert_array_equal(got, jaxloss.log_probs_at(x, indices))


@pytest.mark.parametrize("chunk", [1, 5, N])
@pytest.mark.parametrize("devices", [1, 8])
def test_the_most_likely(chunk, devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    h, k, _ = operands()
    k = k.at[:, 9].set(k[:, 4]).at[:, C:].set(100.0)  # two that tie; padding above all
    function = partial(jaxloss.linear_top_k, k=K, num_classes=C, chunk_size=chunk, temperature=0.5)
    index, found = jit_quickly(lambda: function(h, k))()
    expected = jax.lax.top_k(jaxloss.log_softmax((h @ k)[..., :C] / 0.5), K)
    np.testing.assert_array_equal(index, expected[1])
    np.testing.assert_allclose(found, expected[0], rtol=1e-5, atol=1e-6)
    assert index.dtype == jnp.int32
    assert found.dtype == jnp.float32


def test_equal_log_probs_of_unequal_logits():
    """As lax.top_k has the logits: differences with the largest may round their order away."""
    kernel = jnp.array([[1e-9, 2e-9, 5.0, 3e-9]], jnp.float32)
    index, _ = jaxloss.linear_top_k(jnp.ones((1, 1)), kernel, 4)
    np.testing.assert_array_equal(index, [[2, 3, 1, 0]])


def test_fewer_classes_than_are_asked_for():
    h, k, _ = operands()
    exists = jnp.arange(V) % 16 == 3
    index, found = jaxloss.linear_top_k(h, k, 4, where=exists, chunk_size=5)
    np.testing.assert_array_equal(np.sort(index, axis=-1), np.tile([-100, -100, 3, 19], (4, 6, 1)))
    np.testing.assert_array_equal(found == -jnp.inf, index == -100)
    labels = jaxloss.TopKLabels(index, jnp.exp(found))
    assert np.isfinite(jaxloss.linear_cross_entropy(h, k, labels))
    none = jnp.arange(24).reshape(4, 6, 1) != 5
    index, found = jaxloss.linear_top_k(h, k, 2, where=none, chunk_size=5)
    np.testing.assert_array_equal((index == -100).all(-1), ~np.asarray(none)[..., 0])
    sample, _ = jaxloss.linear_sample(jax.random.key(0), h, k, where=none, chunk_size=5)
    np.testing.assert_array_equal(sample == -100, ~np.asarray(none)[..., 0])


def test_no_array_of_all_logits():
    h, k, indices = operands()
    h, k = jnp.tile(h, (4, 4, 1)), jnp.tile(k, (1, 40))
    calls = {
        "top_k": lambda: jaxloss.linear_top_k(h, k, 3, chunk_size=8),
        "sample": lambda: jaxloss.linear_sample(jax.random.key(0), h, k, chunk_size=8),
        "at": lambda: jaxloss.linear_log_probs_at(h, k, jnp.tile(indices, (4, 4, 1)), chunk_size=8),
    }
    for name, call in calls.items():
        sizes = [v.aval.size for e in equations(call) for v in e.outvars if hasattr(v, "aval")]
        assert max(sizes) <= 8 * 3 * k.shape[1], name


def chi_squared(counts, p):
    """In units of its standard deviation, from its mean."""
    expected = counts.sum() * p
    freedom = len(p) - 1
    return (np.sum((counts - expected) ** 2 / expected) - freedom) / np.sqrt(2 * freedom)


def test_the_distribution_of_samples():
    h, k, _ = operands()
    count = 20000
    key = jax.random.key(7)
    index, found = jit_quickly(
        lambda: jaxloss.linear_sample(key, h[0, :2], k, num_samples=count, temperature=1.3)
    )()
    log_p = jaxloss.log_softmax(h[0, :2] @ k / 1.3)
    np.testing.assert_allclose(found, jnp.take_along_axis(log_p, index, axis=-1), atol=2e-6)
    for row in range(2):
        p = np.float64(np.exp(log_p[row]))
        often = p > 1e-3  # the others together
        counts = np.bincount(index[row], minlength=V)
        counts = np.append(counts[often], counts[~often].sum())
        # At 1e-6 a normal variable is past 4.75; that of 30 degrees a little further.
        assert abs(chi_squared(counts, np.append(p[often], p[~often].sum()))) < 5.5


def test_classes_that_are_rare():
    """4095 of them, e^-14 as likely as the one before them."""
    x = jnp.where(jnp.arange(2**12) == 0, 14.0, 0.0)[None]
    index, _ = jaxloss.linear_sample(
        jax.random.key(0), jnp.ones((64, 1)), x, num_samples=256, chunk_size=64
    )
    together = 4095 * np.exp(-14.0)
    expected = 64 * 256 * together / (1 + together)
    assert abs(int(np.sum(index > 0)) - expected) < 5 * np.sqrt(expected)


MESHES = [
    {"token_axis_name": "d"},
    {"vocab_axis_name": "t"},
    {"token_axis_name": "d", "vocab_axis_name": "t"},
    {"token_axis_name": P(None, "d"), "kernel_spec": P("d")},
]


@pytest.mark.parametrize("names", MESHES)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_meshes(kind, names):
    h, k, indices = operands()
    k = k.at[:, 30].set(k[:, 4])  # two on different devices that tie
    key = jax.random.key(3)

    def everything(**names):
        options = {"chunk_size": 3, "num_classes": 31, **names}

        def scalar(h, k):
            found, rest = jaxloss.linear_log_probs_at(h, k, indices, return_rest=True, **options)
            return jnp.sum(jnp.where(indices >= 0, found, 0)) + jnp.sum(rest)

        return (
            jaxloss.linear_top_k(h, k, K, **options),
            jaxloss.linear_sample(key, h, k, num_samples=2, **options),
            jax.value_and_grad(scalar, (0, 1))(h, k),
        )

    expected = jit_quickly(everything)()
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        got = jit_quickly(partial(everything, **names))()
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if g.dtype == jnp.int32:
            np.testing.assert_array_equal(g, e)
        else:
            np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, N])
def test_samples_are_the_same_in_every_chunk_size(chunk):
    h, k, _ = operands()
    sample = partial(jaxloss.linear_sample, jax.random.key(5), h, num_samples=3)
    index, _ = sample(k, chunk_size=chunk)
    np.testing.assert_array_equal(index, sample(k)[0])
    wider = jnp.pad(k, ((0, 0), (0, 7)))
    np.testing.assert_array_equal(index, sample(wider, num_classes=V)[0])
    np.testing.assert_array_equal(index[..., 0], sample(k, num_samples=None)[0])


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda h, k, i: jaxloss.log_probs_at(h, i[..., 0]), ValueError, r"indices must be \[...,"),
        (lambda h, k, i: jaxloss.log_probs_at(h, h), TypeError, "indices must be class indices"),
        (lambda h, k, i: jaxloss.log_probs_at(h, i, axis=(0, 1)), ValueError, "must be one axis"),
        (lambda h, k, i: jaxloss.log_probs_at(h, i, temperature=0), ValueError, "temperature"),
        (lambda h, k, i: jaxloss.linear_top_k(h, k, 0), ValueError, "k must be in"),
        (lambda h, k, i: jaxloss.linear_top_k(h, k, V + 1), ValueError, "k must be in"),
        (lambda h, k, i: jaxloss.linear_top_k(h, k, None), TypeError, "k must be an int; got None"),
        (lambda h, k, i: jaxloss.linear_top_k(h, k, 9, num_classes=8), ValueError, "at most num_"),
        (lambda h, k, i: jaxloss.linear_sample(3, h, k), TypeError, "key must be one key"),
        (
            lambda h, k, i: jaxloss.linear_sample(jax.random.split(jax.random.key(0), 2), h, k),
            ValueError, "key must be one key",
        ),
        (
            lambda h, k, i: jaxloss.linear_sample(jax.random.key(0, impl="rbg"), h, k),
            TypeError, "key must be of threefry",
        ),
        (
            lambda h, k, i: jaxloss.linear_sample(jax.random.key(0), h, k, num_samples=0),
            ValueError, "num_samples must be at least 1",
        ),
        (
            lambda h, k, i: jaxloss.linear_log_probs_at(h, k, i[:1]),
            ValueError, "batch shape of hidden",
        ),
    ],
)  # fmt: skip
def test_errors(call, kind, text):
    with pytest.raises(kind, match=text):
        call(*operands())


def test_keys_of_the_older_kind():
    h, k, _ = operands()
    new, old = (make(3) for make in (jax.random.key, jax.random.PRNGKey))
    a, b = (jaxloss.linear_sample(key, h, k)[0] for key in (new, old))
    np.testing.assert_array_equal(a, b)
