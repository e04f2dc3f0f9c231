"""What is promised of memory and of the compiled program."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle.programs import jit_quickly, moved_sizes, temporary_mib

import jaxloss

DTYPES = [jnp.float32, jnp.bfloat16]
SHAPES = [(4096, 4096), (1024, 32000)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_residuals_are_the_logits_and_numbers_of_a_row(dtype, reduction):
    x, y = jnp.zeros((8, 100), dtype), jnp.zeros(8, jnp.int32)
    _, pullback = jax.vjp(lambda x: jaxloss.cross_entropy(x, y, reduction=reduction), x)
    large = [r for r in jax.tree.leaves(pullback) if r.size > 8]
    assert [(r.shape, r.dtype) for r in large] == [(x.shape, dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_residuals_of_log_softmax(dtype):
    x = jnp.zeros((8, 100), dtype)
    _, pullback = jax.vjp(jaxloss.log_softmax, x)
    large = [r for r in jax.tree.leaves(pullback) if r.size > 8]
    assert [(r.shape, r.dtype) for r in large] == [(x.shape, dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_residuals_of_probabilities(dtype):
    x = jnp.zeros((8, 100), dtype)
    _, pullback = jax.vjp(jaxloss.cross_entropy, x, x)
    large = [r for r in jax.tree.leaves(pullback) if r.size > 8]
    assert [(r.shape, r.dtype) for r in large] == [(x.shape, dtype)] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_temporary_memory(shape, dtype):
    args = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    for f in (jaxloss.cross_entropy, jax.value_and_grad(jaxloss.cross_entropy)):
        memory = jax.jit(f).lower(*args).compile().memory_analysis()
        assert memory.temp_size_in_bytes <= 32 * shape[0] + 2 * 2**20


def test_temporary_memory_on_one_device():
    """Where conversions are merged that several devices keep apart, and the broadcasts of numbers
    that several passes share are written out."""
    program = """
import jax, jax.numpy as jnp, jaxloss
from functools import partial
losses = [partial(jaxloss.cross_entropy, **options) for options in (
    {}, {"label_smoothing": 0.1}, {"logit_softcap": 30.0, "label_smoothing": 0.1, "z_loss": 0.1},
)]
losses.append(lambda x, y: -jaxloss.token_stats(x, y, temperature=0.7).log_prob.mean())
stats = [partial(jaxloss.token_stats, **options) for options in (
    {}, {"temperature": 0.7}, {"logit_softcap": 30.0},
)]
for dtype in (jnp.float32, jnp.bfloat16):
    args = jax.ShapeDtypeStruct((1024, 8000), dtype), jax.ShapeDtypeStruct((1024,), jnp.int32)
    for f in (*losses, *map(jax.value_and_grad, losses), *stats):
        held = jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes
        assert held <= 2**17, (dtype, f, held)  # float32 logits would be 31 MiB
x = jax.ShapeDtypeStruct((1024, 8000), jnp.float32)
y = jax.ShapeDtypeStruct((1024,), jnp.int32)
steps = lambda x, y: jaxloss.nll_loss(jaxloss.log_softmax(x), y)
for f, args, logits in (  # as many as the plain formula holds, or fewer, and columns' maxima
    (jaxloss.log_softmax, (x,), 0),
    (jax.value_and_grad(lambda x, w: jnp.sum(w * jaxloss.log_softmax(x))), (x, x), 1),
    (steps, (x, y), 1),
    (jax.value_and_grad(steps), (x, y), 2),
):
    held = jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert held <= 4 * 1024 * 8000 * (logits + 1 / 8), (f, held)
"""
    environment = {**os.environ, "XLA_FLAGS": ""}
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, env=environment)


# Of hidden @ kernel. The logits of all tokens take 512 MiB in float32, as XLA counts them.
N, D, V, K = 4096, 64, 32768, 8
LOGITS_MIB = 4 * N * V / 2**20
F32, I32 = jnp.float32, jnp.int32
MOST_HELD = 0.30  # of the logits of all tokens


def linear_operands(dtype, *rest):
    """Shapes of hidden, a kernel and the rest, each (shape, dtype; None: the operands')."""
    shapes = (((N, D), None), ((D, V), None), *rest)
    return [jax.ShapeDtypeStruct(shape, t or dtype) for shape, t in shapes]


ROWS, CLASSES, OF_TOKENS = ((N, V), None), ((V,), F32), ((N,), I32)
MASK_OF_ROWS = ((N, V), bool)
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 0.1, "logit_softcap": 30.0, "return_stats": True}


def of_labels(names=(), top=None, **options):
    """The loss of arrays by position; ``top``: the labels are an index and probabilities."""

    def loss(hidden, kernel, *rest):
        labels, *rest = rest
        if top is not None:
            q, *rest = rest
            labels = jaxloss.TopKLabels(labels, q, top)
        out = jaxloss.linear_cross_entropy(
            hidden, kernel, labels, **dict(zip(names, rest, strict=True)), **options
        )
        if not options.get("return_stats"):
            return jnp.sum(out), ()
        return jnp.sum(out[0]), out[1]

    return loss


def of_stats(hidden, kernel, labels):
    stats = jaxloss.linear_token_stats(hidden, kernel, labels, temperature=0.7, logit_softcap=30.0)
    return jnp.sum(stats.log_prob + stats.logsumexp + stats.entropy), stats.rank


def of_squares(hidden, kernel, labels):
    stats = jaxloss.linear_token_stats(hidden, kernel, labels, temperature=0.7, logit_softcap=30.0)
    return jnp.sum(stats.log_prob + stats.sum_sq_probs), stats.rank


def of_teacher(divergence, **options):
    def loss(*operands):
        *product, where = operands
        each = jaxloss.linear_kl_divergence(*product, where=where, divergence=divergence, **options)
        return jnp.sum(each), ()

    return loss


def of_own_loss(x, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(x), labels[:, None], axis=1)[:, 0]


def of_own_targets(x, targets):
    log_p, log_q = jax.nn.log_softmax(targets.astype(x.dtype)), jax.nn.log_softmax(x)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def own(loss_fn, **options):
    return lambda *args: (jnp.sum(jaxloss.linear_loss(loss_fn, *args, **options)), ())


def of_head(head, **options):
    """The loss of a head that is made of a kernel and two arrays."""

    def loss(hidden, kernel, labels, *arrays):
        out = jaxloss.linear_cross_entropy(hidden, head(kernel, *arrays), labels, **options)
        return jnp.sum(out), ()

    return loss


def of_eight_bits(kernel, scale, *update):
    return jaxloss.QuantizedKernel(kernel.astype(jnp.int8), scale)


TOP = ((N, K), I32), ((N, K), F32)
UPDATE = ((D, 8), None), ((8, V), None)
TEACHER = (((N, D), None), ((D, V), None), MASK_OF_ROWS)
# Name: (loss, arrays past hidden and kernel, which of all are differentiated).
LINEAR_LOSSES = {
    "class indices": (of_labels(), [OF_TOKENS], (0, 1)),
    "class indices, none": (of_labels(reduction="none"), [OF_TOKENS], (0, 1)),
    "masked classes": (of_labels(["where"]), [OF_TOKENS, MASK_OF_ROWS], (0, 1)),
    "weight, smoothing": (
        of_labels(["weight"], label_smoothing=0.1), [OF_TOKENS, CLASSES], (0, 1, 3),
    ),
    "every option": (
        of_labels(["weight", "where", "bias"], reduction="none", **EVERYTHING),
        [OF_TOKENS, CLASSES, MASK_OF_ROWS, ((V,), None)],
        (0, 1, 3, 5),
    ),
    "vocab_blocks, every option": (
        of_labels(["weight", "where", "bias"], implementation="vocab_blocks", **EVERYTHING),
        [OF_TOKENS, CLASSES, MASK_OF_ROWS, ((V,), None)],
        (0, 1, 3, 5),
    ),
    "vocab_blocks, probabilities, every option": (
        of_labels(["weight", "where", "bias"], implementation="vocab_blocks", **EVERYTHING),
        [ROWS, CLASSES, MASK_OF_ROWS, ((V,), None)],
        (0, 1, 2, 3, 5),
    ),
    "vocab_blocks, top k, uniform, weight": (
        of_labels(
            ["weight", "where"], top="uniform", label_smoothing=0.1, implementation="vocab_blocks"
        ),
        [*TOP, CLASSES, MASK_OF_ROWS],
        (0, 1, 3, 4),
    ),
    "stored_exponentials": (
        of_labels(implementation="stored_exponentials"), [OF_TOKENS], (0, 1),
    ),
    "stored_exponentials, every option": (
        of_labels(
            ["weight", "where", "bias"], implementation="stored_exponentials",
            **EVERYTHING | {"label_smoothing": 0.0},
        ),
        [OF_TOKENS, CLASSES, MASK_OF_ROWS, ((V,), None)],
        (0, 1, 3, 5),
    ),
    "stored_exponentials, smoothing, none": (
        of_labels(
            ["weight"], label_smoothing=0.1, reduction="none", implementation="stored_exponentials"
        ),
        [OF_TOKENS, CLASSES],
        (0, 1, 3),
    ),
    "stored_exponentials, low rank": (
        of_head(jaxloss.LowRankKernel, implementation="stored_exponentials"),
        [OF_TOKENS, *UPDATE],
        (0, 3, 4),
    ),
    "probabilities": (of_labels(), [ROWS], (0, 1, 2)),
    "probabilities, every option": (
        of_labels(["weight", "where", "bias"], **EVERYTHING),
        [ROWS, CLASSES, MASK_OF_ROWS, ((V,), None)],
        (0, 1, 2, 3, 5),
    ),
    "top k, dropped": (of_labels(top="drop"), TOP, (0, 1, 3)),
    "top k, uniform, weight": (
        of_labels(["weight", "where"], top="uniform", label_smoothing=0.1),
        [*TOP, CLASSES, MASK_OF_ROWS],
        (0, 1, 3, 4),
    ),
    "top k, bucket, statistics": (
        of_labels(["where"], top="bucket", z_loss=0.1, logit_softcap=30.0, return_stats=True),
        [*TOP, MASK_OF_ROWS],
        (0, 1, 3),
    ),
    "statistics": (of_stats, [OF_TOKENS], (0, 1)),
    "forward": (of_teacher("forward"), TEACHER, (0, 1)),
    "reverse, teacher": (of_teacher("reverse", reduction="none"), TEACHER, (0, 1, 2, 3)),
    "jensen_shannon, teacher": (
        of_teacher("jensen_shannon", reduction="none", temperature=2.0), TEACHER, (0, 1, 2, 3),
    ),
    "low rank": (of_head(jaxloss.LowRankKernel), [OF_TOKENS, *UPDATE], (0, 3, 4)),
    "quantised, none": (of_head(of_eight_bits, reduction="none"), [OF_TOKENS, CLASSES], (0,)),
    "narrow products": (
        of_head(lambda kernel: kernel, dtype=jnp.bfloat16), [OF_TOKENS], (0, 1),
    ),
    "own loss": (own(of_own_loss), [OF_TOKENS], (0, 1)),
    "squares": (of_squares, [OF_TOKENS], (0, 1)),
    "own loss of rows": (own(of_own_targets, reduction="none"), [ROWS], (0, 1, 2)),
}  # fmt: skip


def most_held(name, dtype):
    """MiB. XLA:CPU holds the gradient of narrow rows once more, as bits, until it is scaled."""
    _, rest, argnums = LINEAR_LOSSES[name]
    scaled = "none" not in name and "vocab_blocks" not in name
    bits = dtype != F32 and rest[0] == ROWS and 2 in argnums and scaled
    return MOST_HELD * LOGITS_MIB + bits * 2 * N * V / 2**20


@pytest.mark.parametrize("name", ["jensen_shannon", "squares of a loss", "reference"])
def test_losses_in_blocks_hold_no_more(name, monkeypatch):
    """On one CPU device what a loss writes out is of a few rows, and chunks are as large as those
    of a plain loss."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)

    def of_stats(hidden, kernel, labels, *reference):
        def loss(stats, *reference):
            squares = stats.entropy + stats.sum_sq_probs
            return squares + reference[0].reverse_kl if reference else squares

        reference = {"reference": reference} if reference else {}
        given = hidden, kernel, labels
        return jaxloss.linear_stats_loss(loss, *given, logit_softcap=30.0, **reference)

    divergence, its_own = partial(jaxloss.linear_kl_divergence, divergence=name), TEACHER[:2]
    loss, rest = {
        "jensen_shannon": (divergence, its_own),
        "squares of a loss": (of_stats, [OF_TOKENS]),
        "reference": (of_stats, [OF_TOKENS, *its_own]),
    }[name]
    step = jax.value_and_grad(loss, (0, 1))
    assert temporary_mib(step, linear_operands(F32, *rest)) <= MOST_HELD * LOGITS_MIB


BF16 = jnp.bfloat16
WIDENED_BY_JAX_0_10 = {
    ("vocab_blocks, every option", BF16),  # 160 MiB of 154
    ("probabilities, every option", BF16),  # 872 MiB of 410
    ("low rank", BF16),  # 163 MiB of 154
}


# The dtypes take turns.
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, DTYPES[i % 2]) for i, name in enumerate(LINEAR_LOSSES)]
)
def test_no_linear_loss_holds_a_third_of_the_logits(name, dtype):
    """A chunk is as large as what its tokens hold allows, value and all gradients."""
    if jax.__version_info__ < (0, 11) and (name, dtype) in WIDENED_BY_JAX_0_10:
        pytest.skip("The XLA of JAX 0.10 writes these out in float32, beside several devices.")
    loss, rest, argnums = LINEAR_LOSSES[name]
    step = jax.jit(
        jax.value_and_grad(loss, argnums, has_aux=True),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    memory = step.lower(*linear_operands(dtype, *rest)).compile().memory_analysis()
    assert memory.temp_size_in_bytes / 2**20 <= most_held(name, dtype)


@pytest.mark.soak
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LINEAR_LOSSES)
def test_no_linear_loss_as_a_user_compiles_it(name, dtype):
    loss, rest, argnums = LINEAR_LOSSES[name]
    step = jax.value_and_grad(loss, argnums, has_aux=True)
    assert temporary_mib(step, linear_operands(dtype, *rest)) <= most_held(name, dtype)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_long_narrow_rows_move_as_they_are(reduction):
    """Those of bfloat16 go as bits through the chunks, and have their derivatives."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, kernel = jax.random.normal(keys[0], (7, 4)), jax.random.normal(keys[1], (4, 4096))
    q = jax.nn.softmax(jax.random.normal(keys[2], (7, 4096))).astype(jnp.bfloat16)
    hidden, kernel = (x.astype(jnp.bfloat16) for x in (hidden, kernel))
    weight = jnp.array([1.0, 0.0, 2.0, 1.0, 0.5, 0.0, 3.0])

    def ours(*args):
        options = {"sample_weight": weight, "reduction": reduction, "chunk_size": 4}
        return jnp.sum(jaxloss.linear_cross_entropy(*args, **options))

    def expected(hidden, kernel, q):
        x = hidden.astype(F32) @ kernel.astype(F32)
        options = {"sample_weight": weight, "reduction": reduction}
        return jnp.sum(jaxloss.cross_entropy(x, q, **options))

    def along(f):
        return jit_quickly(lambda *args: jax.jvp(jax.grad(f, (0, 1, 2)), args, args))

    for got, truth in zip(*map(jax.tree.leaves, (
        along(ours)(hidden, kernel, q), along(expected)(hidden, kernel, q)
    )), strict=True):  # fmt: skip
        got, truth = got.astype(F32), truth.astype(F32)
        assert jnp.linalg.norm(got - truth) <= 0.02 * jnp.linalg.norm(truth)


POLICIES = {
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots without batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "all but a name": jax.checkpoint_policies.save_anything_except_these_names("x"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_of_checkpoint_saves_the_logits(policy, schedule):
    """The products of vocabulary blocks are those of a scan, which policies look into."""

    def loss(hidden, kernel, labels):
        options = {"implementation": schedule, "chunk_size": 1024, "return_stats": True}
        out, stats = jaxloss.linear_cross_entropy(hidden, kernel, labels, **options)
        return out, stats.rank

    hidden, kernel, labels = linear_operands(F32, OF_TOKENS)

    def pullback(hidden, kernel):
        f = jax.checkpoint(lambda *a: loss(jnp.sin(a[0]), a[1], labels)[0], policy=POLICIES[policy])
        return jax.vjp(f, hidden, kernel)[1]

    labels = jnp.zeros(N, I32)
    leaves = jax.tree.leaves(jax.eval_shape(pullback, hidden, kernel))
    saved = sum(x.size * x.dtype.itemsize for x in leaves)
    # hidden, its sine, the kernel, and for token chunks the gradients, which are final.
    assert saved <= 32 * 2**20


def test_vocabulary_blocks_are_lean_under_a_policy_too():
    loss = of_labels(implementation="vocab_blocks")
    f = jax.checkpoint(lambda *a: loss(*a)[0], policy=jax.checkpoint_policies.dots_saveable)
    step = jax.value_and_grad(f, (0, 1))
    assert temporary_mib(step, linear_operands(F32, OF_TOKENS)) <= 24


@pytest.mark.parametrize(("options", "mib"), [({}, 130), ({"implementation": "vocab_blocks"}, 24)])
def test_the_logits_of_few_tokens_are_held_by_default(options, mib):
    """128 MiB of them, as docstring and README say, and what they say of the lean form."""
    shapes = ((512, 256), F32), ((256, V), F32), ((512,), I32)
    args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    step = jax.value_and_grad(of_labels(**options), (0, 1), has_aux=True)
    assert temporary_mib(step, args) <= mib


def test_a_scan_differentiated_from_outside_keeps_no_gradient_of_the_kernel_if_asked():
    """A scalar loss keeps one a step: 512 MiB in all."""
    steps, n, d, v = 64, 16, 256, 8192

    def mean(hidden, kernel, labels):
        return jaxloss.linear_cross_entropy(hidden, kernel, labels)

    def by_hand(*args):
        return jnp.mean(jaxloss.linear_cross_entropy(*args, reduction="none"))

    blocks = partial(jaxloss.linear_cross_entropy, implementation="vocab_blocks")
    shapes = ((steps, n, d), F32), ((d, v), F32), ((steps, n), I32)
    args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    for loss, mib in ((by_hand, 20), (jax.checkpoint(mean), 20), (blocks, 12)):

        def over_steps(hidden, kernel, labels, loss=loss):
            each = lambda total, x: (total + loss(x[0], kernel, x[1]), None)  # noqa: E731
            return jax.lax.scan(each, jnp.zeros(()), (hidden, labels))[0]

        assert temporary_mib(jax.grad(over_steps, (0, 1)), args) <= mib


SPECS = [P("a"), P(None, "b"), P("a", "b"), P(None, ("a", "b"))]


# The dtypes take turns: each meets every kind of axes and every spec.
@pytest.mark.parametrize(
    ("spec", "dtype", "kind"),
    [
        (spec, DTYPES[(i + j) % 2], kind)
        for i, spec in enumerate(SPECS)
        for j, kind in enumerate([AxisType.Auto, AxisType.Explicit])
    ],
)
def test_sharded_logits_are_not_gathered(spec, dtype, kind):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)
    x = jax.ShapeDtypeStruct((64, 4096), dtype, sharding=NamedSharding(mesh, spec))
    y = jax.ShapeDtypeStruct((64,), jnp.int32, sharding=NamedSharding(mesh, P(*spec[:1])))
    step = jax.jit(jax.value_and_grad(jaxloss.cross_entropy))
    text = step.lower(x, y).compile().as_text()
    assert all(size <= 64 * 8 for size in moved_sizes(text))
