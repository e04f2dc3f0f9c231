"""TopKLabels: equal to the dense targets that they stand for, which nothing ever holds."""

from dataclasses import FrozenInstanceError

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms import FORMS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle.budget import EPS, assert_within, margins
from oracle.draw import hurting_logits
from oracle.programs import equations, jit_quickly, products
from oracle.truth import reference

import jaxloss
from jaxloss import TopKLabels

N, C, K = 7, 11, 3
RESTS = ["drop", "uniform", "bucket"]


def case(dtype=jnp.float32, seed=0):
    """Logits that hurt, k distinct classes a token with less than all of the probability; one token
    with an empty slot, one of empty slots alone."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(hurting_logits(rng, (N, C)), dtype)
    index = np.argsort(rng.random((N, C)), axis=-1)[:, :K]
    q = rng.dirichlet(np.ones(K + 1), N)[:, :K]
    index[1, 2] = index[4] = -100
    return x, jnp.asarray(index, jnp.int32), jnp.asarray(q, jnp.float32)


def dense(index, q, rest, exists=None):
    """The same targets as an array [N, C], in longdouble."""
    index, q = np.asarray(index), np.asarray(q, np.longdouble)
    out, named = np.zeros((N, C), np.longdouble), np.zeros((N, C), bool)
    for n in range(N):
        for i, p in zip(index[n], q[n], strict=True):
            if i != -100:
                out[n, i], named[n, i] = p, True
    left = np.maximum(1 - out.sum(-1), 0)
    others = ~named if exists is None else ~named & exists
    if rest == "uniform":
        out += others * (left / np.maximum(others.sum(-1), 1))[:, None]
    return out, others, left


def truth(x, index, q, rest, **options):
    """(losses, d losses / dx) without reduction, from dense targets or k + 1 classes."""
    target, others, left = dense(index, q, rest)
    counts = np.any(np.asarray(index) != -100, axis=-1)
    if rest != "bucket":
        losses = reference(x, target, reduction="none", **options).loss
        return np.where(counts, losses, 0)
    x = np.asarray(x, np.longdouble)
    out = np.zeros(N, np.longdouble)
    for n in np.flatnonzero(counts):
        for i in np.flatnonzero(target[n]):
            out[n] += target[n, i] * np.log1p(np.sum(np.exp(np.delete(x[n], i) - x[n, i])))
        apart = x[n][~others[n]][:, None] - x[n][others[n]]  # of a named class from each other one
        out[n] += left[n] * np.log1p(np.sum(1 / np.sum(np.exp(-apart), axis=-1)))
    z = options.get("z_loss", 0) * reference(x, target, reduction="none").logsumexp ** 2
    return out + np.where(counts, z, 0)


OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 0.01},
    "weighed": {"weight": jnp.linspace(0.1, 2, C), "logit_softcap": 5.0},
}


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_loss_of_dense_targets(rest, name, dtype):
    options = OPTIONS[name]
    if rest == "bucket":
        options = {} if name == "plain" else {"z_loss": 0.01}
    x, index, q = case(dtype)
    got = jaxloss.cross_entropy(x, TopKLabels(index, q, rest), reduction="none", **options)
    assert got.dtype == jnp.float32
    margin = margins(x)
    # What is left over is known to a rounding of 1, and multiplies up to the whole margin.
    assert_within(got, truth(x, index, q, rest, **options), (margin + 16) * 2 * EPS, 1 + margin)


@pytest.mark.parametrize("rest", RESTS)
def test_the_statistics_of_dense_targets(rest):
    x, index, q = case()
    got = jaxloss.token_stats(x, TopKLabels(index, q, rest))
    expected = reference(x, dense(index, q, rest)[0], reduction="none")
    counts = np.any(np.asarray(index) != -100, axis=-1)
    budget = (margins(x) + 16) * 2 * EPS
    size = np.abs(np.asarray(x)).max(-1)
    for name, floor in (("logsumexp", size), ("entropy", 0.0)):
        truth_of = np.where(counts, getattr(expected, name), 0)
        assert_within(getattr(got, name), truth_of, budget, floor)
    highest = np.argmax(np.asarray(x), axis=-1)
    np.testing.assert_array_equal(got.prediction, np.where(counts, highest, -1))
    p = np.exp(np.max(np.asarray(x, np.longdouble), axis=-1) - expected.logsumexp)
    assert_within(got.confidence, np.where(counts, p, 0), budget)


def losses_of(rest, form, index):
    return lambda x, q, **o: form(x, TopKLabels(index, q, rest), chunk_size=4, **o)


@pytest.mark.parametrize(
    ("rest", "name"),
    [
        ("drop", "logits"),
        ("uniform", "logits"),
        ("bucket", "logits"),
        ("uniform", "token_chunks"),
        ("bucket", "token_chunks"),
        ("drop", "vocab_blocks"),
        ("uniform", "vocab_blocks"),
    ],
)
def test_gradients_of_dense_targets(rest, name):
    """In float64, to rounding: of the logits and of the probabilities, in both modes."""
    with jax.enable_x64(True):
        x, index, q = (jnp.asarray(a) for a in case())
        x, q = x.astype(jnp.float64) / 4, q.astype(jnp.float64)
        weight = jnp.linspace(0.1, 2, C, dtype=jnp.float64)
        options = {} if rest == "bucket" else {"label_smoothing": 0.1, "weight": weight}
        taken = index != -100
        safe = jnp.where(taken, index, 0)

        def plain(x, q):
            one_hot = jnp.where(taken[..., None], jax.nn.one_hot(safe, C, dtype=x.dtype), 0)
            target = jnp.einsum("nk,nkc->nc", q, one_hot)
            named = jnp.sum(one_hot, axis=1) > 0
            left = 1 - jnp.sum(jnp.where(taken, q, 0), axis=-1)
            log_p = jax.nn.log_softmax(x)
            extra = 0.0
            if rest == "uniform":
                others = jnp.sum(~named, axis=-1, dtype=x.dtype)
                target += jnp.where(named, 0, (left / others)[:, None])
            if rest == "bucket":
                extra = -left * jax.nn.logsumexp(jnp.where(named, -jnp.inf, log_p), axis=-1)
            if options:
                target = (0.9 * target + 0.1 / C) * weight[None]
            losses = extra - jnp.sum(target * log_p, axis=-1)
            return jnp.sum(jnp.sin(jnp.where(jnp.any(taken, axis=-1), losses, 0)))

        ours_of = losses_of(rest, FORMS[name], index)

        def ours(x, q):
            return jnp.sum(jnp.sin(ours_of(x, q, reduction="none", **options)))

        def modes(f):
            both = (0, 1)
            direction = (jnp.cos(x), jnp.sin(q))
            return (
                jax.value_and_grad(f, both)(x, q),
                jax.jvp(f, (x, q), direction),
                jax.jvp(jax.grad(f, both), (x, q), direction)[1],
            )

        got, expected = jit_quickly(lambda: (modes(ours), modes(plain)))()
        for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(g, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rest", RESTS)
def test_a_confident_student_keeps_its_loss(rest):
    """All of the probability on one class, which the student finds too: 1e-13, and not 0."""
    x = jnp.array([[30.0, 0.0, 0.0, 0.0]])
    labels = TopKLabels(jnp.array([[0]]), jnp.ones((1, 1)), rest)
    loss, gradient = jax.value_and_grad(lambda x: jaxloss.cross_entropy(x, labels))(x)
    expected = np.log1p(3 * np.exp(np.longdouble(-30)))
    assert_within(loss, expected, 64 * EPS)
    p = np.exp(np.longdouble(-30)) / (1 + 3 * np.exp(np.longdouble(-30)))
    assert_within(gradient, [[-3 * p, p, p, p]], 64 * EPS)


@pytest.mark.nan_is_meant
def test_the_contract(form):
    x, index, q = case()
    good = losses_of("drop", form, index)
    assert good(x, q, reduction="none")[4] == 0
    bad = index.at[2, 0].set(C).at[5, 1].set(-1).at[6].set(index[6, 0])
    loss = losses_of("drop", form, bad)

    def total(x):
        losses = loss(x.at[4].set(jnp.nan), q, reduction="none")
        return jnp.sum(losses), losses

    gradient, losses = jax.jit(jax.grad(total, has_aux=True))(x)
    wrong = np.isin(np.arange(N), (2, 5, 6))  # past the end, before the start, a class named twice
    np.testing.assert_array_equal(np.isnan(losses), wrong)
    np.testing.assert_array_equal(np.isnan(gradient).any(-1), wrong)
    assert losses[4] == 0
    assert np.all(np.asarray(gradient[4]) == 0)
    np.testing.assert_allclose(
        losses[~wrong], good(x, q, reduction="none")[~wrong], rtol=1e-6, atol=1e-30
    )


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("columns", [0, 3])
def test_a_class_that_does_not_exist(classes, columns):
    """Of one class alone, and where columns of padding follow."""
    x = jnp.arange(2.0 * (classes + columns)).reshape(2, -1)
    for wrong in (classes, classes + 1, -1):
        labels = TopKLabels(jnp.array([[0], [wrong]]), jnp.full((2, 1), 0.5))
        losses = jaxloss.cross_entropy(x, labels, num_classes=classes, reduction="none")
        np.testing.assert_array_equal(np.isnan(losses), [False, True])


@pytest.mark.nan_is_meant
def test_what_is_named_twice_and_slots_that_are_empty():
    """Of two slots in one token, and the one of several."""
    x = jnp.array([[1.0, 2.0, 0.5]])

    def loss(*index):
        labels = TopKLabels(jnp.array([index]), jnp.full((1, len(index)), 0.25))
        return jaxloss.cross_entropy(x, labels)

    assert np.isnan(loss(1, 1))
    assert np.isnan(loss(0, 1, 1))
    assert np.isnan(loss(3, -100))  # one past the end
    np.testing.assert_allclose(loss(1, -100, -100), loss(1), rtol=1e-6)


@pytest.mark.parametrize("rest", ["uniform", "bucket"])
@pytest.mark.parametrize("named", [2, 3])
def test_few_other_classes(rest, named):
    """One: it has all of the rest. None: what is left of the sum is a rounding, of no class."""
    x = jnp.array([[1.0, 2.0, 0.5]])
    q = jnp.array([[0.3, 0.3, 0.4 - 1e-6]])
    labels = TopKLabels(jnp.arange(named)[None], q[:, :named], rest)
    np.testing.assert_allclose(jaxloss.cross_entropy(x, labels), jaxloss.cross_entropy(x, q), 1e-5)


def test_smoothing_gives_a_masked_class_nothing_that_is_named_for_nothing():
    x, mask = jnp.array([[0.5, 2.0, -1.0]]), jnp.array([True, False, True])
    named = jaxloss.TopKLabels(jnp.array([[0, 1]]), jnp.array([[1.0, 0.0]]))
    options = {"where": mask, "label_smoothing": 0.1}
    got = jaxloss.cross_entropy(x, named, **options)
    np.testing.assert_allclose(got, jaxloss.cross_entropy(x, jnp.array([0]), **options), rtol=1e-6)


def test_the_mean_is_over_the_tokens_that_count():
    x, index, q = case()
    labels, s = TopKLabels(index, q), jnp.linspace(0.5, 2, N, dtype=jnp.float32)
    losses = jaxloss.cross_entropy(x, labels, reduction="none")
    counts = np.arange(N) != 4
    expected = np.sum(np.asarray(losses * s, np.float64)) / np.sum(np.asarray(s)[counts])
    np.testing.assert_allclose(
        jaxloss.cross_entropy(x, labels, sample_weight=s), expected, rtol=1e-6
    )


@pytest.mark.parametrize("rest", ["uniform", "bucket"])
def test_where(rest):
    """What is left over goes to the classes that exist."""
    x, index, q = case()
    exists = np.ones((1, C), bool)
    free = [c for c in range(C) if c not in np.asarray(index)[0]][:2]
    exists[0, free] = False
    x, labels = x[:1], TopKLabels(index[:1], q[:1], rest)
    keep = exists[0]
    moved = jnp.asarray(np.cumsum(keep) - 1)[index[:1]]
    expected = jaxloss.cross_entropy(x[:, keep], TopKLabels(moved, q[:1], rest))
    got = jaxloss.cross_entropy(x, labels, where=jnp.asarray(exists))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("rest", ["drop", "uniform"])
def test_tokens_that_do_not_count_leave_the_weights_gradient_alone(rest, schedule):
    """What fills a chunk up has no classes of its own: two slots of class 0 would be NaN."""
    x, index, q = case()
    labels, weight = TopKLabels(index, q, rest), jnp.linspace(0.1, 2, C, dtype=jnp.float32)
    kernel = jnp.eye(C, dtype=x.dtype)

    def linear(w):
        return jaxloss.linear_cross_entropy(
            x, kernel, labels, weight=w, chunk_size=3, implementation=schedule, precision="highest"
        )

    def plain(w):
        return jaxloss.cross_entropy(x, labels, weight=w)

    got, expected = (jit_quickly(jax.value_and_grad(f))(weight) for f in (linear, plain))
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-5 * np.max(np.abs(e)))


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("rest", ["drop", "uniform"])
@pytest.mark.parametrize("by", ["where", "sample_weight", "both"])
def test_tokens_that_do_not_count_may_name_anything(by, rest, form):
    """Padding names class 0 twice: NaN in its own row, if that counted."""
    index = jnp.array([[0, 1], [0, 0], [0, 9], [1, 2]])
    q = jnp.array([[0.5, 0.3], [0.0, 0.0], [0.5, 0.5], [jnp.nan, 0.1]])
    labels = TopKLabels(index, q, rest)
    each = {by: jnp.array([True, False, False, False])}
    if by == "both":
        each = {
            "where": jnp.array([True, True, False, False]),
            "sample_weight": jnp.array([1.0, 0.0, 2.0, 0.0]),
        }
    x, weight = jnp.zeros((4, 3)), jnp.array([1.0, 2.0, 4.0])
    others = 0.2 if rest == "uniform" else 0.0
    expected = np.log(3.0) * np.array([0.5, 0.3, others])

    def loss(weight):
        return form.of_product(x, jnp.zeros((3, 3)), labels, weight=weight, **each)

    value, got = jit_quickly(jax.value_and_grad(loss))(weight)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(value, expected @ weight, rtol=1e-6)


def test_total_weight():
    _, index, q = case()
    labels, sample_weight = TopKLabels(index, q, "uniform"), jnp.arange(N, dtype=jnp.float32)
    assert jaxloss.total_weight(labels) == N - 1  # one token has empty slots alone
    assert jaxloss.total_weight(labels, sample_weight=sample_weight) == sum(range(N)) - 4
    assert jaxloss.total_weight(labels, ignore_index=None) == N
    with pytest.raises(
        ValueError, match=r"total_weight: labels\.probabilities must have the shape"
    ):
        jaxloss.total_weight(TopKLabels(index, q[:, :2]))
    with pytest.raises(ValueError, match="total_weight: sample_weight must have"):
        jaxloss.total_weight(labels, sample_weight=jnp.ones((N, K)))


def test_nothing_dense_is_held(schedule):
    """The largest array of the program is a chunk's or a block's."""
    n, d, v, k = 64, 4, 96, 3
    rng = np.random.default_rng(0)
    index = jnp.asarray(np.argsort(rng.random((n, v)), axis=-1)[:, :k], jnp.int32)
    h, kernel, q = (jnp.asarray(rng.random(s), jnp.float32) for s in ((n, d), (d, v), (n, k)))

    def loss(h, kernel, q):
        return jaxloss.linear_cross_entropy(
            h, kernel, TopKLabels(index, q, "uniform"), implementation=schedule, chunk_size=7
        )

    step = jax.value_and_grad(loss, (0, 1, 2))
    chunk = 7 * (v if schedule == "token_chunks" else n)
    sizes = [o.aval.size for e in equations(step, h, kernel, q) for o in e.outvars]
    assert max(sizes) <= max(chunk * k, d * v)
    # A body for the first chunk or block and one for the others; token chunks take three products.
    assert products(step, h, kernel, q) == (3 * 2 if schedule == "token_chunks" else 4 + 4)


@pytest.mark.parametrize("rest", RESTS)
def test_memory(rest):
    """Of cross_entropy: no target of the logits' size, but for the bucket's mask of a byte."""
    n, v, k = 1024, 8000, 8
    f32, i32 = jnp.float32, jnp.int32
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((n, v), f32), ((n, k), i32), ((n, k), f32))]

    def loss(x, index, q):
        return jaxloss.cross_entropy(x, TopKLabels(index, q, rest))

    _, pullback = jax.eval_shape(lambda *a: jax.vjp(loss, *a), *shapes)
    held = [r for r in jax.tree.leaves(pullback) if r.size >= n * v]
    of_bucket = [jnp.dtype(bool), jnp.dtype(f32)]
    assert sorted((r.dtype for r in held), key=str) == (
        of_bucket if rest == "bucket" else [jnp.dtype(f32)]
    )


@pytest.mark.jax_leaks("jit(grad(shard_map))")
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_mesh(rest, masked):
    """Classes and tokens split over devices, inside of shard_map and by the operands' types."""
    x, index, q = case()
    x, index, q = (jnp.concatenate([a, a[:1]]) for a in (x, index, q))  # 8 tokens
    x = jnp.pad(x / 4, ((0, 0), (0, 1)), constant_values=9.0)  # 12 columns: padding that would hurt
    exists = jnp.ones((8, 12), bool)
    if masked:  # one that is named, of no probability then, and some that are not
        exists = exists.at[:, 4].set(False).at[jnp.arange(8), index[:, 1]].set(False)
        q = q.at[:, 1].set(0)
        q = jnp.where(index == 4, 0, q)

    def whole(x, q):
        labels = TopKLabels(index, q, rest)
        return jaxloss.cross_entropy(x[:, :C], labels, where=exists[:, :C])

    expected = jax.value_and_grad(whole, (0, 1))(x, q)
    mesh = jax.make_mesh((2, 4), ("t", "v"), axis_types=(AxisType.Auto,) * 2)

    def local(x, index, q, exists):
        return jaxloss.cross_entropy(
            x, TopKLabels(index, q, rest), num_classes=C, where=exists if masked else None,
            vocab_axis_name="v", token_axis_name="t",
        )  # fmt: skip

    specs = P("t", "v"), P("t"), P("t"), P("t", "v")
    split = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    got = jax.jit(jax.value_and_grad(lambda x, q: split(x, index, q, exists), (0, 1)))(x, q)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rest", RESTS)
def test_logits_of_an_explicit_mesh(rest):
    """Their classes are split, where JAX refuses to gather and to scatter."""
    x, index, q = case()
    x, index, q = (jnp.concatenate([a, a[:1]]) for a in (x, index, q))
    x = jnp.pad(x / 4, ((0, 0), (0, 1)), constant_values=9.0)
    mesh = jax.make_mesh((2, 4), ("t", "v"), axis_types=(AxisType.Explicit,) * 2)

    def step(x, index, q):
        def loss(x, q):
            return jaxloss.cross_entropy(x, TopKLabels(index, q, rest), num_classes=C)

        return jax.value_and_grad(loss, (0, 1))(x, q)

    expected = jax.jit(step)(x, index, q)
    with jax.set_mesh(mesh):
        put = [
            jax.device_put(a, NamedSharding(mesh, s))
            for a, s in zip((x, index, q), (P("t", "v"), P("t"), P("t")), strict=True)
        ]
        got = jax.jit(step)(*put)
    assert got[1][0].sharding.spec == P("t", "v")
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6)


@pytest.mark.jax_leaks("jit(grad(shard_map))")
def test_on_an_explicit_mesh(schedule):
    x, index, q = case()
    x, index, q = (jnp.concatenate([a, a[:1]]) for a in (x, index, q))
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(C, 12)), jnp.float32)
    mesh = jax.make_mesh((2, 4), ("t", "v"), axis_types=(AxisType.Explicit,) * 2)

    def step(h, kernel, index, q):
        return jax.value_and_grad(
            lambda h, kernel, q: jaxloss.linear_cross_entropy(
                h, kernel, TopKLabels(index, q, "uniform"), implementation=schedule
            ),
            (0, 1, 2),
        )(h, kernel, q)

    expected = jax.jit(step)(x, kernel, index, q)
    specs = P("t"), P(None, "v"), P("t"), P("t")
    with jax.set_mesh(mesh):
        put = [
            jax.device_put(a, NamedSharding(mesh, s))
            for a, s in zip((x, kernel, index, q), specs, strict=True)
        ]
        got = jax.jit(step)(*put)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6)


X, Y, Q = np.zeros((4, 9), np.float32), np.zeros((4, 2), np.int32), np.zeros((4, 2), np.float32)


@pytest.mark.parametrize(
    ("labels", "options", "kind", "text"),
    [
        ((Q, Y), {}, TypeError, r"labels.indices must be .*takes indices first"),
        ((Q, Q), {}, TypeError, r"labels.indices must be class indices \(an integer dtype\); got "),
        ((Q, None), {}, TypeError, "labels.probabilities must be an array; got None"),
        ((Y, Y), {}, TypeError, "labels.probabilities must have a real floating dtype"),
        ((Y[:3], Q), {}, ValueError, r"labels.indices must be \[..., k\] with .* \(4,\)"),
        ((Y[:, 0], Q), {}, ValueError, r"labels.indices must be \[..., k\]"),
        ((Y, Q[:, :1]), {}, ValueError, r"labels.probabilities must have the shape of labels.ind"),
        ((Y, Q, "keep"), {}, ValueError, "labels.rest must be one of 'drop', 'uniform', 'bucket'"),
        (
            (Y, Q, "bucket"),
            {"label_smoothing": 0.1},
            ValueError,
            "take neither weight nor label_smoothing",
        ),
        ((Y, Q, "bucket"), {"weight": X[0]}, ValueError, "take neither weight nor label_smoothing"),
    ],
)
def test_errors(labels, options, kind, text):
    with pytest.raises(kind, match=text):
        jaxloss.cross_entropy(X, TopKLabels(*labels), **options)
    with pytest.raises(kind, match=text):
        jaxloss.linear_cross_entropy(
            X, np.zeros((9, 9), np.float32), TopKLabels(*labels), **options
        )


def test_labels_do_not_change():
    with pytest.raises(FrozenInstanceError):
        TopKLabels(Y, Q).rest = "bucket"


def test_a_bucket_wants_whole_rows():
    with pytest.raises(ValueError, match="rest='bucket' need implementation='token_chunks'"):
        jaxloss.linear_cross_entropy(
            X, np.eye(9, dtype=np.float32), TopKLabels(Y, Q, "bucket"),
            implementation="vocab_blocks",
        )  # fmt: skip
