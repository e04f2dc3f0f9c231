"""Sequences that automatic axes split, of which nobody named any: tokens in the devices' order.

Every argument of a token goes where the token goes, and what is given back of it comes back.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle.programs import jit_quickly

import jaxloss
from parallel.test_mesh import assert_close
from parallel.test_names import scalar_of

B, L, D, V, C = 4, 8, 16, 96, 90  # the last columns are padding
KEPT = 60  # classes that no mask leaves out: those of the labels
CHUNK = 8  # of all devices: a token of each
SHAPES = (B, L), (B, 1, C), (1, L, C), (1, 1, C), (B, L, C)  # of masks


@cache
def arrays():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, KEPT, (B, L))
    labels[0, :3] = labels[2] = -100
    floats = {
        "h": rng.normal(size=(B, L, D)),
        "k": rng.normal(size=(D, V)),
        "b": rng.normal(size=V),
        "w": rng.random(C) + 0.1,
        "s": rng.random((B, L)),
        "t": rng.random((B, L)) + 0.5,
        "q": rng.dirichlet(np.ones(C), (B, L)),
        "hs": rng.normal(size=(B, L, 3, D)),
        "ks": rng.normal(size=(3, D, V)),
    }
    given = {name: jnp.asarray(x, jnp.float32) for name, x in floats.items()}
    given["y"] = jnp.asarray(labels, jnp.int32)
    given["ys"] = jnp.asarray(rng.integers(0, V, (B, L, 3)), jnp.int32)
    masks = {shape: rng.random(shape) < 0.8 for shape in SHAPES}
    for shape, mask in masks.items():
        mask[..., : KEPT if len(shape) == 3 else 0] = True
    return given | {str(shape): jnp.asarray(mask) for shape, mask in masks.items()}


def cross_entropy(h, k, y, **options):
    return jaxloss.linear_cross_entropy(h, k, y, **({"chunk_size": CHUNK} | options))


def with_every_option(h, k, y, b, w, s, t, **options):
    options |= {"label_smoothing": 0.1, "z_loss": 1e-3, "num_classes": C}
    return cross_entropy(h, k, y, bias=b, weight=w, sample_weight=s, temperature=t, **options)


def masked(shape, implementation):
    def of(h, k, y, mask):
        options = {"implementation": implementation, "chunk_size": CHUNK, "reduction": "none"}
        return cross_entropy(h, k, y, num_classes=C, where=mask, **options)

    return of, ("h", "k", "y", str(shape))


def top_k(h, k, y, rest="bucket"):
    index = jnp.stack([jnp.maximum(y, 0), (y + V + 3) % V], axis=-1)
    stored = jaxloss.TopKLabels(index, jnp.full(index.shape, 0.4, jnp.float32), rest)
    return cross_entropy(h, k, stored, reduction="none"), beside(h, k, y, stored)


def beside(h, k, y, stored):
    return jaxloss.linear_token_stats(h, k, y, reference=stored, chunk_size=CHUNK)[1][1:]


def own_loss(h, k, y):
    def loss(x, y):
        return jaxloss.cross_entropy(x, y, reduction="none"), {"first": x[:, :2]}

    options = {"sample_weight": y >= 0, "has_aux": True, "chunk_size": CHUNK}
    return jaxloss.linear_loss(loss, h, k, y, **options)


def stats_loss(h, k, y, s, t):
    def loss(stats, reference, s):
        return reference.reverse_kl - s * stats.log_prob, (stats.entropy,)

    options = {"has_aux": True, "reduction": "none", "chunk_size": CHUNK}
    options |= {"reference": (jnp.sin(h), k + 0.1), "temperature": t, "kl_temperature": t + 1}
    return jaxloss.linear_stats_loss(loss, h, k, y, s, **options)


def divergence(h, k, t, s):
    options = {"reduction": "none", "sample_weight": s, "temperature": t, "chunk_size": CHUNK}
    return jaxloss.linear_kl_divergence(h, k, jnp.cos(h), k * 1.1, **options)


def named(h, k, y, t):
    options = {"return_rest": True, "temperature": t, "chunk_size": CHUNK}
    return jaxloss.linear_log_probs_at(h, k, jnp.maximum(y, 0)[..., None], **options)


def likeliest(h, k):
    index, log_probs = jaxloss.linear_top_k(h, k, 3, chunk_size=CHUNK)
    return index, log_probs


def sampled(h, k):
    return jaxloss.linear_sample(jax.random.key(0), h, k, num_samples=2, chunk_size=CHUNK)


EVERY = tuple("hkybwst")
# A function of arrays, and their names.
CALLS = {
    "mean": (with_every_option, EVERY),
    "none": (partial(with_every_option, reduction="none", return_stats=True), EVERY),
    "probabilities": (
        lambda h, k, q, w: cross_entropy(h, k, q, weight=w, num_classes=C),
        ("h", "k", "q", "w"),
    ),
    "blocks of probabilities": (
        lambda h, k, q: cross_entropy(
            h, k, q, num_classes=C, reduction="none", implementation="vocab_blocks"
        ),
        ("h", "k", "q"),
    ),
    "heads": (partial(cross_entropy, reduction="none"), ("hs", "ks", "ys")),
    "a shared hidden of heads": (
        lambda h, ks, ys: cross_entropy(h[:, :, None], ks, ys),
        ("h", "ks", "ys"),
    ),
    "top k": (top_k, ("h", "k", "y")),
    "own loss": (own_loss, ("h", "k", "y")),
    "loss of statistics": (stats_loss, ("h", "k", "y", "s", "t")),
    "divergence": (divergence, ("h", "k", "t", "s")),
    "named classes": (named, ("h", "k", "y", "t")),
    "likeliest classes": (likeliest, ("h", "k")),
    "samples": (sampled, ("h", "k")),
    "low rank": (
        lambda h, k, y: cross_entropy(h, jaxloss.LowRankKernel(k, k[:, :4], k[:4], scale=0.1), y),
        ("h", "k", "y"),
    ),
}
CALLS |= {
    f"where {shape}, {schedule}": masked(shape, schedule)
    for shape in SHAPES
    for schedule in ("token_chunks", "vocab_blocks")
}


def moving(out):
    return [x for x in jax.tree.leaves(out) if x.dtype == jnp.float32]


def gradients(function, names):
    def of(*args):
        floats = {n: x for n, x in zip(names, args, strict=True) if x.dtype == jnp.float32}
        others = {n: x for n, x in zip(names, args, strict=True) if n not in floats}

        def scalar(floats):
            some = floats | others
            out = function(*(some[n] for n in names))
            return scalar_of(lambda: moving(out))(), out

        return jax.grad(scalar, has_aux=True)(floats)

    return of


@pytest.mark.filterwarnings("ignore:linear_top_k:UserWarning")  # its logits are gathered
@pytest.mark.parametrize("name", CALLS)
def test_numbers_of_one_device(name):
    """Of hidden the type says what its mesh is; of the others nothing, as of constants."""
    function, names = CALLS[name]
    step = gradients(function, names)
    given = [arrays()[n] for n in names]
    expected = jit_quickly(step)(*given)
    mesh = jax.make_mesh((2, 4), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    hidden = jax.device_put(given[0], NamedSharding(mesh, P("data", "context")))
    others = [np.asarray(x) for x in given[1:]]
    got = jit_quickly(lambda h: step(h, *map(jnp.asarray, others)))(hidden)
    assert_close(got, expected)
