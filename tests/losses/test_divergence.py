"""kl_divergence and linear_kl_divergence: exact however close the two are, in every mode."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numerics.test_differentiation import TRANSFORMS, check
from oracle.budget import EPS, margins
from oracle.divergence import exact, known
from oracle.programs import equations, jit_quickly, moved_sizes, products, temporary_mib

import jaxloss

DIVERGENCES = ["forward", "reverse", "jensen_shannon"]


def hurting_pairs(dtype, c=7, each=2):
    """Rows at every distance, of every confidence and offset: (student, teacher)."""
    rng = np.random.default_rng(1)
    x, t = [], []
    for distance in (1e-7, 1e-6, 1e-4, 1e-2, 1, 5, 20):
        for scale in (0.1, 1, 10, 30):
            for offset in (0.0, -40.0, 300.0):
                teacher = (rng.normal(size=(each, c)) * scale).astype(dtype)
                away = rng.normal(size=(each, c)) * distance * max(1, distance * scale / 10)
                t.append(teacher)
                x.append((teacher + away + offset).astype(dtype))
    x, t = np.concatenate(x), np.concatenate(t)
    x[0], t[0] = [40, 0, 0, 0, 0, 0, 0], [0, 0, 0, 40, 0, 0, 0]  # confident of different classes
    return x, t


CONFIGS = {
    "forward": {"divergence": "forward"},
    "forward, warm": {"divergence": "forward", "temperature": 1.7},
    "reverse": {"divergence": "reverse"},
    "jensen_shannon": {"divergence": "jensen_shannon", "beta": 0.5},
    "one-sided": {"divergence": "jensen_shannon", "beta": 1e-4, "temperature": 0.6},
}


# The budget. A probability is conditioned by its margin: its exponent is known to one rounding; 16
# covers the arithmetic. The differences of logits are exact, a = log(p / q) is known to a few
# roundings of the row's largest, and a slope moves by that times w (1 - w), which is the softmax's
# own derivative. Below the smallest normal float, 0 may stand.


@pytest.mark.parametrize(
    ("config", "dtype"), [*((name, np.float32) for name in CONFIGS), ("one-sided", np.float64)]
)
def test_every_distance(config, dtype):
    options = CONFIGS[config]
    x, t = hurting_pairs(dtype)
    rows = partial(jaxloss.kl_divergence, reduction="none", **options)

    @jax.jit
    def step(x, t):
        return rows(x, t), *jax.grad(lambda x, t: rows(x, t).sum(), (0, 1))(x, t)

    with jax.enable_x64(dtype == np.float64):
        got = step(x, t)
    assert {v.dtype for v in got} == {np.dtype(dtype)}
    loss, *slopes = (np.asarray(v, np.float64) for v in got)
    truth, eps, tiny = exact(x, t, **options), np.finfo(dtype).eps, np.finfo(np.float32).tiny
    relative = eps * (np.maximum(margins(x), margins(t)) / options.get("temperature", 1) + 16)
    error = np.abs(loss - truth.loss) / (relative * truth.loss + 14 * tiny)
    assert np.all(loss >= 0)
    assert np.max(error) <= 1, (np.max(error), np.argmax(error))
    shares = (None, None)
    if options["divergence"] == "jensen_shannon":
        shares = options["beta"], 1 - options["beta"]
    for got, expected, room, share in zip(slopes, truth.slopes, truth.room, shares, strict=True):
        rounded = 4 * eps * known(truth.apart, share)[:, None] * room
        allowed = relative[:, None] * np.abs(expected) + rounded / options.get("temperature", 1)
        error = np.abs(got - expected) / (allowed + 14 * tiny * (1 + truth.apart[:, None]))
        assert np.max(error) <= 1, (np.max(error), np.argmax(np.max(error, axis=1)))


def test_the_textbook_is_noise_where_the_two_are_close():
    """In float32, at a distance of 1e-4: sum p (log p - log q), here and in optax."""
    rng = np.random.default_rng(0)
    t = rng.normal(size=(24, 20)).astype(np.float32)
    x = (t + 1e-4 * rng.normal(size=t.shape)).astype(np.float32)
    truth = exact(x, t, divergence="forward").loss
    log_p, log_q = jax.nn.log_softmax(t), jax.nn.log_softmax(x)
    others = {
        "textbook": jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1),
        "optax": optax.losses.kl_divergence(log_q, jnp.exp(log_p)),
        "optax with logs": optax.losses.kl_divergence_with_log_targets(log_q, log_p),
    }
    errors = {name: np.max(np.abs(np.asarray(v) / truth - 1)) for name, v in others.items()}
    assert min(errors.values()) > 1, errors
    assert all(np.min(v) < 0 for v in others.values())
    ours = np.asarray(jaxloss.kl_divergence(x, t, reduction="none"))
    assert np.max(np.abs(ours / truth - 1)) <= EPS * (np.max(margins(t)) + 16)


# A student at its teacher


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_distributions_are_at_zero(divergence, dtype):
    rng = np.random.default_rng(0)
    t = jnp.asarray(np.round(rng.normal(size=(40, 33)) * 8 * 64) / 64, dtype)
    offset = jnp.asarray(rng.integers(-4, 4, (40, 1)) * 4, dtype)  # exact, once t is rounded to 1/4
    pairs = [(t, t), (jnp.round(t * 4) / 4 + offset, jnp.round(t * 4) / 4)]
    loss = jax.jit(
        jax.value_and_grad(
            partial(jaxloss.kl_divergence, divergence=divergence, temperature=0.7, reduction="sum"),
            (0, 1),
        )
    )
    for x, teacher in pairs:
        value, slopes = loss(x, teacher)
        assert value == 0
        assert all(np.all(np.asarray(g) == 0) for g in slopes)


@pytest.mark.parametrize(
    ("divergence", "share"), [("forward", 1.0), ("reverse", 1.0), ("jensen_shannon", 0.21)]
)
def test_hessian_at_the_teacher_is_the_fisher_information(divergence, share):
    """Where a derivative of |log(p / q)| would be 0."""
    x = jnp.array([[0.3, -1.0, 2.0, 0.0]])
    loss = partial(jaxloss.kl_divergence, divergence=divergence, beta=0.3)
    p = jax.nn.softmax(x[0])
    fisher = share * (jnp.diag(p) - jnp.outer(p, p))
    got = jax.jit(jax.hessian(loss))(x, x)[0, :, 0, :]
    np.testing.assert_allclose(got, fisher, rtol=1e-5, atol=1e-7)


# Classes that cannot be

LOW = -np.inf


@pytest.mark.nan_is_meant
@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([0, 0, LOW], [0, 0, LOW], [0, 0, 0]),
        ([0, 0, LOW], [0, 0, 0], [np.inf, np.log(1.5), None]),
        ([0, 0, 0], [0, 0, LOW], [np.log(1.5), np.inf, None]),
        ([0, 0, LOW], [0, 0, -200], [np.inf, 0, 0]),  # p is no float32: inf all the same
        ([0, LOW, LOW], [LOW, 0, LOW], [np.inf, np.inf, np.log(2)]),
        ([LOW, LOW, LOW], [0, 0, 0], [np.nan] * 3),
        ([0, 0, 0], [LOW, LOW, LOW], [np.nan] * 3),
        ([0, np.inf, 0], [0, 0, 0], [np.nan] * 3),
    ],
)
def test_impossible_classes(student, teacher, expected):
    x, t = (jnp.array([row, [1.0, 2.0, 4.0]], jnp.float32) for row in (student, teacher))
    for divergence, value in zip(DIVERGENCES, expected, strict=True):
        f = partial(jaxloss.kl_divergence, divergence=divergence, reduction="none")
        loss = f(x, t)
        if value is None:
            p, q = jax.nn.softmax(t[0]), jax.nn.softmax(x[0])
            m = (p + q) / 2
            value = sum(float(jnp.sum(jax.scipy.special.xlogy(v, v / m))) / 2 for v in (p, q))
        np.testing.assert_allclose(loss, [value, 0], rtol=4 * EPS)
        gradients = jax.grad(lambda x, t, f=f: f(x, t).sum(), (0, 1))(x, t)
        # A row is never another's affair, nor where nothing is asked of it.
        others = jax.grad(lambda x, t, f=f: f(x, t)[1], (0, 1))(x, t)
        assert all(np.all(np.asarray(g) == 0) for g in (gradients[0][1], gradients[1][1], *others))
        if np.isfinite(value):
            assert all(np.all(np.isfinite(g)) for g in gradients)
    if np.isfinite(np.max(student)) and np.isfinite(np.max(teacher)):
        x_slope = jax.grad(lambda x: jaxloss.kl_divergence(x, t, reduction="sum"))(x)
        np.testing.assert_allclose(x_slope, jax.nn.softmax(x) - jax.nn.softmax(t), atol=2 * EPS)


def random_pair(shape=(4, 6), seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("beta", [1e-4, 0.1, 0.9])
def test_a_least_probability_beside_none_has_a_mixture(beta):
    """beta times the teacher's e^-85.3 is less than the smallest float, and the student has 0."""
    x, t = jnp.array([[0.0, -jnp.inf, 1.0]]), jnp.array([[0.0, -84.0, 1.0]])
    loss = partial(jaxloss.kl_divergence, divergence="jensen_shannon", beta=beta)
    for pair in ((x, t), (t, x)):
        found = jax.value_and_grad(loss, (0, 1))(*pair)
        for number in jax.tree.leaves(found):  # the truth is less than 1e-36
            np.testing.assert_allclose(number, 0, atol=1e-35)


@pytest.mark.parametrize("divergence", ["forward", "jensen_shannon"])
def test_masked_classes_are_as_if_cut_away(divergence):
    x, t = random_pair()
    mask = jnp.array([[True, False, True, True, True, False]])
    few = jnp.flatnonzero(mask[0])
    f = partial(jaxloss.kl_divergence, divergence=divergence)
    got = jax.value_and_grad(partial(f, where=mask), (0, 1))(x.at[:, 1].set(jnp.nan), t)
    expected = jax.value_and_grad(f, (0, 1))(x[:, few], t[:, few])
    np.testing.assert_allclose(got[0], expected[0], rtol=4 * EPS)
    for g, e in zip(got[1], expected[1], strict=True):
        np.testing.assert_allclose(g[:, few], e, rtol=1e-6, atol=1e-8)
        assert np.all(np.asarray(g)[:, ~np.asarray(mask[0])] == 0)


# Tokens


@pytest.mark.nan_is_meant
@pytest.mark.parametrize(
    ("divergence", "by"),
    [("reverse", "sample_weight"), ("jensen_shannon", "where")],
)
def test_tokens_that_do_not_count_may_hold_anything(divergence, by):
    x, t = random_pair()
    counts = jnp.array([True, False, True, False])
    bad_x, bad_t = x.at[1].set(jnp.nan).at[3, 0].set(jnp.inf), t.at[3].set(-jnp.inf)
    f = partial(jaxloss.kl_divergence, divergence=divergence)

    def curvature(f, x, t):  # a gradient of a gradient: NaN likes to come back there
        def slope(x, t):
            value, slopes = jax.value_and_grad(f, (0, 1))(x, t)
            return sum(jnp.sum(jnp.sin(g)) for g in slopes), (value, slopes)

        second, first = jax.jit(jax.grad(slope, (0, 1), has_aux=True))(x, t)
        return *first, second

    got = curvature(partial(f, **{by: counts}), bad_x, bad_t)
    expected = curvature(f, x[::2], t[::2])
    np.testing.assert_allclose(got[0], expected[0], rtol=4 * EPS)
    for g, e in zip(jax.tree.leaves(got[1:]), jax.tree.leaves(expected[1:]), strict=True):
        np.testing.assert_allclose(g[::2], e, rtol=2e-5, atol=1e-7)
        assert np.all(np.asarray(g[1::2]) == 0)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions_and_weights(reduction):
    x, t = random_pair((3, 6, 2))
    s = jnp.array([[0.5, 0.0], [2.0, 1.0], [0.0, 3.0]], jnp.float32)

    def plain(x, t, s):
        log_p, log_q = (jax.nn.log_softmax(v / 2, axis=1) for v in (t, x))
        losses = s * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1)
        return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / s.sum()}[reduction]

    def ours(x, t, s):
        options = {"axis": 1, "temperature": 2.0, "reduction": reduction}
        return jaxloss.kl_divergence(x, t, sample_weight=s, **options)

    def both(f):
        return jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(f(*args))), (0, 1, 2))(x, t, s)

    for g, e in zip(jax.tree.leaves(both(ours)), jax.tree.leaves(both(plain)), strict=True):
        # The weight of a token that does not count has no gradient here.
        e = jnp.where(s == 0, 0, e) if e.shape == s.shape and reduction == "none" else e
        if g.shape == s.shape and reduction != "none":
            g, e = g[s != 0], e[s != 0]
        np.testing.assert_allclose(g, e, rtol=2e-5, atol=1e-6)


@pytest.mark.nan_is_meant
def test_axes_and_dtypes():
    x, t = random_pair((2, 3, 4))
    whole = jaxloss.kl_divergence(x.reshape(2, 12), t.reshape(2, 12), reduction="none")
    both = jaxloss.kl_divergence(x, t, axis=(1, 2), reduction="none")
    np.testing.assert_allclose(both, whole, rtol=2 * EPS)
    narrow = t.astype(jnp.bfloat16)
    loss, slopes = jax.value_and_grad(jaxloss.kl_divergence, (0, 1))(x, narrow)
    assert [loss.dtype, *(g.dtype for g in slopes)] == [jnp.float32, jnp.float32, jnp.bfloat16]
    as_wide = jaxloss.kl_divergence(x, narrow.astype(jnp.float32))
    np.testing.assert_allclose(loss, as_wide, rtol=4 * EPS)
    assert np.isnan(jaxloss.kl_divergence(x[:0], t[:0]))
    assert np.all(np.isnan(jaxloss.kl_divergence(x[..., :0], t[..., :0], reduction="none")))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_residuals_are_both_logits_and_numbers_of_a_row(divergence, dtype):
    x = jnp.zeros((8, 100), dtype)
    options = {"divergence": divergence, "sample_weight": jnp.ones(8)}
    _, pullback = jax.vjp(lambda *xs: jaxloss.kl_divergence(*xs, **options), x, x)
    large = [r for r in jax.tree.leaves(pullback) if r.size > 8]
    assert [(r.shape, r.dtype) for r in large] == [(x.shape, dtype)] * 2


# Every mode, in float64: what differs from plain jnp is a rule, and not its rounding.


def plain(x, t, divergence="forward", beta=0.5, temperature=1.0, reduction="mean"):
    log_q, log_p = (jax.nn.log_softmax(v / temperature) for v in (x, t))
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if divergence == "forward":
        losses = jnp.sum(p * (log_p - log_q), axis=-1)
    elif divergence == "reverse":
        losses = jnp.sum(q * (log_q - log_p), axis=-1)
    else:
        log_m = jnp.log(beta * p + (1 - beta) * q)
        losses = jnp.sum(beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m), axis=-1)
    return jnp.mean(losses) if reduction == "mean" else losses


MODES = [
    "jvp", "jvp of grad", "jvp of jvp", "grad of grad", "grad of jvp", "linearize", "checkpoint"
]  # fmt: skip


# What the linear form adds to the rule of a row is tested in test_linear.py, but for the teacher.
OF_THE_ENGINE = ["jvp of jvp", "grad of jvp", "checkpoint"]


def linear_case(loss):
    """Of hidden, kernel, teacher's hidden and kernel; both kernels have columns of padding."""

    def ours(h, k, g, m):
        options = {"num_classes": 5, "chunk_size": 3, "vocab_axis": 1, "teacher_vocab_axis": 0}
        return jaxloss.linear_kl_divergence(h, k, g, m, **options, **loss)

    return ours, lambda h, k, g, m: plain((h @ k)[:, :5], (g @ m.T)[:, :5], **loss)


NONE, WARM = {"reduction": "none"}, {"temperature": 1.7, "beta": 0.3}
CASES = {
    **{
        d: (
            partial(jaxloss.kl_divergence, divergence=d, **WARM),
            partial(plain, divergence=d, **WARM),
            [(4, 5)] * 2,
        )
        for d in DIVERGENCES
    },
    "linear": (*linear_case({"divergence": "jensen_shannon"}), [(4, 3), (3, 6), (4, 2), (7, 2)]),
    "linear none": (*linear_case(NONE), [(4, 3), (3, 6), (4, 2), (7, 2)]),
}


@pytest.mark.parametrize("case", CASES)
def test_modes(case):
    ours, expected, shapes = CASES[case]
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        args = tuple(jnp.asarray(rng.normal(size=s)) for s in shapes)
        modes = MODES if len(args) == 2 else [m for m in MODES if m not in OF_THE_ENGINE]

        def every(f):
            return {name: TRANSFORMS[name](f, args) for name in modes}

        check(jax.jit(partial(every, ours))(), jax.jit(partial(every, expected))())


@pytest.mark.parametrize("case", ["jensen_shannon", "linear"])
def test_vmap_and_scan(case):
    loss, _, shapes = CASES[case]
    rng = np.random.default_rng(0)
    axes = [0 if i != 1 else None for i in range(len(shapes))]
    args = [
        jnp.asarray(rng.normal(size=s if a is None else (3, *s)), jnp.float32)
        for s, a in zip(shapes, axes, strict=True)
    ]
    step = jax.value_and_grad(loss, tuple(range(len(args))))

    def one(_, i):
        return _, step(*(a if ax is None else a[i] for a, ax in zip(args, axes, strict=True)))

    batched = jax.jit(jax.vmap(step, in_axes=axes))(*args)
    _, scanned = jax.lax.scan(one, None, jnp.arange(3))
    for got, expected in zip(jax.tree.leaves(batched), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


# From hidden @ kernel


def linear_problem(n=7, d=4, v=11, d2=5, v2=11, dtype=jnp.float32, teacher_dtype=None, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(n, d), (d, v), (n, d2), (d2, v2)]
    dtypes = [dtype] * 2 + [teacher_dtype or dtype] * 2
    return [jnp.asarray(rng.normal(size=s), t) for s, t in zip(shapes, dtypes, strict=True)]


@pytest.mark.parametrize("seed", range(4))
def test_every_option_equals_the_materialised_loss(seed, block):
    rng = np.random.default_rng(seed)
    lead = [(), (3, 5), (7,), (3, 5)][seed]
    c, pads = 9, rng.integers(0, 3, 2)
    given = dict(
        zip(
            ("hidden", "kernel", "teacher_hidden", "teacher_kernel"),
            linear_problem(int(np.prod(lead)), 4, c + pads[0], 3, c + pads[1], seed=seed),
            strict=True,
        )
    )
    for name in ("hidden", "teacher_hidden"):
        given[name] = given[name].reshape(*lead, -1)
    draw = rng.random
    if draw() < 0.5:
        given["bias"] = jnp.asarray(rng.normal(size=c + pads[0]), jnp.float32)
    if draw() < 0.5:
        given["teacher_bias"] = jnp.asarray(rng.normal(size=c + pads[1]), jnp.float32)
    if draw() < 0.6:
        given["sample_weight"] = jnp.asarray(draw(lead) * (draw(lead) < 0.7), jnp.float32)
    constants = {
        "divergence": DIVERGENCES[seed % 3],
        "beta": 0.3,
        "temperature": [1.0, 0.6][seed % 2],
        "reduction": ["none", "sum", "mean"][rng.integers(3)],
    }
    if seed % 3 != 1:
        mask = draw((*lead, c) if seed != 3 else (1,) * len(lead) + (c,)) < 0.8
        mask[..., 0] = True
        constants["where"] = jnp.asarray(mask)
    first, second = (int(a) for a in rng.integers(0, 2, 2))
    call = {"vocab_axis": first, "teacher_vocab_axis": second, "chunk_size": [None, 2, 4][seed % 3]}
    call["num_classes"] = c

    def fused(given):
        given = dict(given)
        for name, axis in (("kernel", first), ("teacher_kernel", second)):
            given[name] = given[name] if axis else given[name].T
        return jaxloss.linear_kl_divergence(**given, **constants, **call)

    def materialised(given):
        logits = []
        for of in ("", "teacher_"):
            x = jnp.dot(given[f"{of}hidden"], given[f"{of}kernel"], precision="highest")
            bias = given.get(f"{of}bias", jnp.zeros(x.shape[-1:], x.dtype))
            x = x + jnp.broadcast_to(bias, x.shape)
            logits.append(x[..., :c])
        weight = given.get("sample_weight")
        return jaxloss.kl_divergence(*logits, sample_weight=weight, **constants)

    def step(f):
        def total(given):
            out = f(given)
            number = jnp.arange(1, 1 + out.size, dtype=out.dtype).reshape(out.shape)
            return jnp.sum(jnp.sin(out * number)), out

        return jax.jit(jax.value_and_grad(total, has_aux=True))(given)

    pairs = zip(jax.tree.leaves(step(fused)), jax.tree.leaves(step(materialised)), strict=True)
    for got, expected in pairs:
        scale = np.max(np.abs(np.nan_to_num(expected)), initial=1)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * scale)


def test_counts_of_products():
    args, bodies = linear_problem(), 2  # the first chunk's, and that of the loop over the others

    def counts(reduction, *by):
        def f(*args):
            loss = jaxloss.linear_kl_divergence(*args, chunk_size=3, reduction=reduction)
            return jnp.sum(loss)

        found = [products(f, *args), *(products(jax.grad(f, i), *args) for i in by)]
        return [n / bodies for n in found]

    # Undifferentiated 2; beside them one for each operand, whichever side's it is.
    by = [(0, 1), (0,), (1,), (2,), (3,), (0, 1, 2, 3)]
    assert counts("mean", *by) == [2, 4, 3, 3, 3, 3, 6]
    assert counts("none", (0, 1), (2,), (0, 1, 2, 3)) == [2, 6, 5, 8]
    _, pullback = jax.vjp(partial(jaxloss.linear_kl_divergence, chunk_size=3), *args)
    assert products(pullback, jnp.float32(1)) == 0


@pytest.mark.parametrize(
    ("dtypes", "reduction"),
    [((jnp.bfloat16, jnp.bfloat16), "mean"), ((jnp.float32, jnp.bfloat16), "none")],
)
def test_products_take_the_operands_dtype_and_nothing_else_is_narrow(dtypes, reduction):
    args = linear_problem(dtype=dtypes[0], teacher_dtype=dtypes[1])
    biases = [jnp.zeros(11, dtype) for dtype in dtypes]

    @partial(jax.value_and_grad, argnums=tuple(range(6)))
    def step(*operands):
        *args, bias, teacher_bias = operands
        return jnp.sum(
            jaxloss.linear_kl_divergence(
                *args, bias=bias, teacher_bias=teacher_bias, chunk_size=3, reduction=reduction
            )
        )

    def dtypes_of(eqn):
        return *(str(v.aval.dtype) for v in eqn.invars), str(eqn.outvars[0].aval.dtype)

    program = list(equations(step, *args, *biases))
    of_products = {dtypes_of(e) for e in program if e.primitive.name == "dot_general"}
    assert of_products == {(str(jnp.dtype(d)), str(jnp.dtype(d)), "float32") for d in dtypes}
    arithmetic = ("add", "sub", "mul", "div", "exp", "log1p", "reduce_sum", "add_any")
    for eqn in program:
        assert eqn.primitive.name not in arithmetic or "bfloat16" not in dtypes_of(eqn), eqn
    # A sum over chunks is narrowed once, after the last: no loop has a kernel's gradient to narrow.
    loops = [e for e in program if e.primitive.name in ("while", "scan")]
    bodies = [v.jaxpr for e in loops for v in e.params.values() if hasattr(v, "jaxpr")]
    inside = [e for body in bodies for e in body.eqns if "bfloat16" in dtypes_of(e)[-1:]]
    assert loops
    assert not [e for e in inside if e.outvars[0].aval.shape in {(4, 11), (5, 11), (11,)}]
    value, grads = jax.eval_shape(step, *args, *biases)
    assert value.dtype == jnp.float32
    assert [g.dtype for g in grads] == [a.dtype for a in (*args, *biases)]


@pytest.mark.nan_is_meant
def test_tokens_that_do_not_count_cost_nothing():
    h, k, g, m = linear_problem()
    options = {"sample_weight": jnp.zeros(7), "reduction": "sum", "chunk_size": 2}
    # Kernels of NaN are not even read.
    assert jaxloss.linear_kl_divergence(h, k * jnp.nan, g, m * jnp.nan, **options) == 0
    weight = jnp.array([1.0, 0, 2, 0, 3, 4, 5])
    rows, gone = jnp.array([0, 2, 4, 5, 6]), jnp.array([1, 3])
    bad_h, bad_g = h.at[1].set(jnp.nan), g.at[1].set(jnp.inf).at[3].set(jnp.nan)

    def f(h, k, g, m, weight):
        return jaxloss.linear_kl_divergence(h, k, g, m, sample_weight=weight, chunk_size=3)

    step = jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))
    loss, slopes = step(bad_h, k, bad_g, m, weight)
    expected, grads = step(h[rows], k, g[rows], m, weight[rows])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for i in (0, 2):
        np.testing.assert_allclose(slopes[i][rows], grads[i], rtol=1e-5, atol=1e-7)
        assert np.all(np.asarray(slopes[i][gone]) == 0)
    for i in (1, 3):
        np.testing.assert_allclose(slopes[i], grads[i], rtol=1e-5, atol=1e-7)


def test_the_teacher_itself_is_at_zero(block):
    h, k, *_ = linear_problem()
    f = partial(jaxloss.linear_kl_divergence, divergence="jensen_shannon", chunk_size=3)
    loss, slopes = jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))(h, k, h, k)
    assert loss == 0
    assert all(np.all(np.asarray(g) == 0) for g in slopes)


def test_temporary_memory():
    """Neither side's logits: 128 MiB each here, a chunk's are 8, of which a step makes some."""
    n, d, v = 2048, 64, 16384
    shapes = [(n, d), (d, v), (n, d), (d, v)]
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]

    temporary = partial(temporary_mib, args=args)
    loss = partial(jaxloss.linear_kl_divergence, chunk_size=128)
    assert temporary(loss) <= 8 * 5
    assert temporary(jax.value_and_grad(loss, (0, 1, 2, 3))) <= 8 * 6 + 2 * d * v * 4 / 2**20


# On a mesh


def test_tokens_split_over_devices(block):
    mesh = jax.make_mesh((4,), ("t",), axis_types=(AxisType.Auto,))
    args = linear_problem(16)
    weight = jnp.asarray(np.random.default_rng(0).random(16) * (np.arange(16) % 3 > 0), jnp.float32)
    rows, whole = P("t"), P()

    def local(*args, **mesh_options):
        *args, weight = args
        options = {"sample_weight": weight, "chunk_size": 3}
        return jaxloss.linear_kl_divergence(*args, **options, **mesh_options)

    split = jax.shard_map(
        partial(local, token_axis_name="t"),
        mesh=mesh,
        in_specs=(rows, whole, rows, whole, rows),
        out_specs=P(),
    )
    ours = jax.jit(jax.value_and_grad(split, range(4)))(*args, weight)
    expected = jax.jit(jax.value_and_grad(local, range(4)))(*args, weight)
    for g, e in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=2e-5, atol=1e-6)


@pytest.mark.jax_leaks("jit(grad(shard_map))")
def test_one_teacher_for_the_students_of_all_devices():
    mesh = jax.make_mesh((4,), ("t",), axis_types=(AxisType.Auto,))
    (x, _), (t, _) = random_pair((8, 5)), random_pair((2, 5), seed=1)

    def local(x, t):
        return jax.lax.psum(jaxloss.kl_divergence(x, t, reduction="sum"), "t")

    split = jax.shard_map(local, mesh=mesh, in_specs=(P("t"), P()), out_specs=P())
    got = jax.jit(jax.value_and_grad(split, (0, 1)))(x, t)
    expected = jax.value_and_grad(lambda x, t: 8 * plain(x, jnp.tile(t, (4, 1))), (0, 1))(x, t)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("a"), P(None, "a")])
def test_sharded_logits_are_not_gathered(spec, kind):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(kind,))
    x = jax.ShapeDtypeStruct((64, 4096), jnp.float32, sharding=NamedSharding(mesh, spec))
    step = jax.jit(jax.value_and_grad(jaxloss.kl_divergence, (0, 1)))
    text = step.lower(x, x).compile().as_text()
    assert all(size <= 64 * 8 for size in moved_sizes(text))


# What a wrong call is told

X = np.zeros((4, 3), np.float32)
H, K, G, L = (np.zeros(s, np.float32) for s in ((4, 2), (2, 3), (4, 5), (5, 3)))


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"logits": X.astype(int)}, TypeError, "logits must have a real floating dtype"),
        ({"teacher_logits": None}, TypeError, "teacher_logits must be an array; got None"),
        (
            {"teacher_logits": X[:1]},
            ValueError,
            r"teacher_logits must have the shape of logits, \(4, 3\); got float32\(1, 3\)",
        ),
        ({"axis": 2}, ValueError, r"axis must be in \[-2, 1\] for logits"),
        (
            {"divergence": "js"},
            ValueError,
            "divergence must be one of 'forward', 'reverse', 'jensen_shannon'; got 'js'",
        ),
        ({"beta": 1.0}, ValueError, r"beta must be in \(0, 1\); got 1\.0.*'reverse'"),
        ({"beta": 0}, ValueError, r"beta must be in \(0, 1\); got 0"),
        ({"beta": float("nan")}, ValueError, "beta must be"),
        ({"beta": "0.5"}, TypeError, "beta must be a number, or a real scalar array; got str"),
        ({"temperature": 0.0}, ValueError, "temperature must be in .*; got 0.0"),
        ({"sample_weight": X[0]}, ValueError, r"sample_weight must .*, \(4,\); got float32\(3,\)"),
        ({"where": X}, TypeError, "where must be boolean"),
        ({"where": np.ones(2, bool)}, ValueError, "where must broadcast to logits"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be one of 'none', 'mean', 'sum'"),
    ],
)
def test_errors(given, kind, text):
    right = {"logits": X, "teacher_logits": X}
    with pytest.raises(kind, match=f"kl_divergence: {text}"):
        jaxloss.kl_divergence(**{**right, **given})


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"kernel": K.T}, ValueError, "kernel must have hidden's last dimension.*vocab_axis=0"),
        (
            {"teacher_kernel": L.T},
            ValueError,
            "teacher_kernel must have teacher_hidden's last dim.*set teacher_vocab_axis=0",
        ),
        ({"teacher_kernel": L[0]}, ValueError, r"teacher_kernel must be \[D, V\].*teacher_vocab"),
        ({"teacher_kernel": L.astype(np.float16)}, TypeError, "teacher_hidden and teacher_kernel"),
        ({"teacher_hidden": G[:3]}, ValueError, r"teacher_hidden must .* leading shape, \(4,\)"),
        (
            {"teacher_kernel": L[:, :2]},
            ValueError,
            r"both kernels must have as many columns; got .*\(2, 3\).*\(5, 2\).*num_classes",
        ),
        ({"num_classes": 4}, ValueError, r"num_classes must be in \[0, 3\]; got 4"),
        ({"teacher_bias": X[0, :2]}, ValueError, "teacher_bias must have one entry a column of te"),
        ({"teacher_vocab_axis": 2}, ValueError, "teacher_vocab_axis must be in"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1; got 0"),
        ({"beta": 2}, ValueError, r"beta must be in \(0, 1\)"),
        ({"where": np.ones((4, 2), bool)}, ValueError, "where must broadcast to hidden @ kernel"),
        ({"token_axis_name": "t"}, ValueError, "token_axis_name must name axes of the surrounding"),
    ],
)
def test_errors_of_the_linear_form(given, kind, text):
    right = {"hidden": H, "kernel": K, "teacher_hidden": G, "teacher_kernel": L}
    with pytest.raises(kind, match=f"linear_kl_divergence: {text}"):
        jaxloss.linear_kl_divergence(**{**right, **given})


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_a_temperature_a_token(divergence, linear):
    """Value, gradients and second derivatives beside the formula's in float64."""
    rng = np.random.default_rng(0)
    shape = (2, 5, 7)
    x, t = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    each = jnp.asarray(rng.uniform(0.5, 3, shape[:-1]), jnp.float32)
    counts = jnp.asarray(rng.random(shape[:-1]) < 0.7)
    given = x, t, jnp.where(counts, each, jnp.nan)
    options = {"divergence": divergence, "beta": 0.3}

    def ours(x, t, temperature):
        own = {"temperature": temperature, "sample_weight": counts, "reduction": "sum"}
        if linear:
            eye = jnp.eye(7)
            return jaxloss.linear_kl_divergence(x, eye, t, eye, chunk_size=3, **own, **options)
        first = (jnp.moveaxis(v, -1, 0) for v in (x, t))
        return jaxloss.kl_divergence(*first, axis=0, **own, **options)

    def formula(x, t, temperature):
        of_rows = partial(plain, temperature=1.0, reduction="none", **options)
        losses = of_rows(*(v / temperature[..., None] for v in (x, t)))
        return jnp.sum(jnp.where(counts, losses, 0))

    def along(f, *given):
        gradient = jax.grad(f, (0, 1, 2))
        moved = jnp.ones(shape) * given[0], given[1] * 0, jnp.ones(shape[:-1]) * 0.1
        moved = tuple(m.astype(g.dtype) for m, g in zip(moved, given, strict=True))
        return jax.jvp(gradient, given, moved), f(*given)

    found = jit_quickly(partial(along, ours))(*given)
    with jax.enable_x64():
        exact = [v.astype(jnp.float64) for v in (x, t, each)]
        expected = along(formula, *exact)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            b = np.asarray(b)
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=4e-6 * np.abs(b).max())


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_a_traced_temperature(divergence, linear):
    """A schedule's, or a learnt one: the same values, with a derivative, and second ones."""
    rng = np.random.default_rng(0)
    x, t = (jnp.asarray(rng.normal(size=(5, 6)), jnp.float32) for _ in range(2))
    t = t.at[1].set(x[1] + 1e-4 * t[1]).at[2, 0].set(-jnp.inf)
    x = x.at[2, 0].set(-jnp.inf)
    if linear:
        x, t = (jnp.where(v == -jnp.inf, -1e30, v) for v in (x, t))

    def loss(x, t, temperature):
        options = {"divergence": divergence, "temperature": temperature, "beta": 0.3}
        if linear:
            eye = jnp.eye(6)
            out = jaxloss.linear_kl_divergence(x, eye, t, eye, chunk_size=2, **options)
        else:
            out = jaxloss.kl_divergence(x, t, reduction="none", **options)
        return jnp.sum(out)

    moved = jnp.where(x > -1e30, 1.0, 0.0)

    @jit_quickly
    def run(x, t, temperature):
        def by_x(temperature):
            return jnp.vdot(jax.grad(loss)(x, t, temperature), moved * jnp.arange(6.0)[None])

        traced = jax.value_and_grad(loss, (0, 1, 2))(x, t, temperature)
        second = jax.value_and_grad(by_x)(temperature)
        static = jax.value_and_grad(loss, (0, 1))(x, t, 1.5)
        around = [(loss(x, t, e), by_x(e)) for e in (1.49, 1.51)]
        return traced, second, static, around

    (value, (dx, dt, d_temperature)), second, static, around = run(x, t, jnp.float32(1.5))
    np.testing.assert_allclose(value, static[0], rtol=1e-6)
    for got, expected in zip((dx, dt), static[1], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)
    (low, low_by_x), (high, high_by_x) = around
    np.testing.assert_allclose(d_temperature, (high - low) / 0.02, rtol=1e-2)
    np.testing.assert_allclose(second[1], (high_by_x - low_by_x) / 0.02, rtol=2e-2)
