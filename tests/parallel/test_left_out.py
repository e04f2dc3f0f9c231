"""``shard_map`` over some axes, the tokens or the classes split over others that nobody names.

XLA's partitioner decides there what each device computes: its own tokens, or it is said.
"""

import inspect
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxloss
from parallel.test_partly_manual import (
    BOTH,
    CLASSES,
    FEATURES,
    ROWS,
    arrays,
    check,
    gradients,
    mesh_of,
    only_manual,
)

pytestmark = pytest.mark.jax_leaks("jit(grad(shard_map))")
CHUNK = 4  # of the tokens that the devices along "data" share


def with_chunks(function):
    return partial(function, chunk_size=CHUNK)


def top_k(y):
    index = jnp.stack([jnp.maximum(y, 0), (y + 3) % CLASSES], axis=-1)
    return jaxloss.TopKLabels(index, jnp.full_like(index, 0.4, jnp.float32), rest="uniform")


def own_loss(h, k, y, s, **options):
    loss = lambda x, y: (jaxloss.cross_entropy(x, y, reduction="none") / 20) ** 2  # noqa: E731
    options = {"sample_weight": jnp.where(y < 0, 0, s), "chunk_size": CHUNK} | options
    return jaxloss.linear_loss(loss, h, k, y, **options)


def stats_loss(h, k, y, **options):
    loss = lambda stats, reference: (reference.reverse_kl - stats.log_prob) / 20  # noqa: E731
    reference = jnp.sin(h), k + 0.1
    options = {"reference": reference, "chunk_size": CHUNK} | options
    return jaxloss.linear_stats_loss(loss, h, k, y, **options)


def divergence(h, k, y, **options):
    given = h, k, jnp.sin(h), k + 0.1
    return jaxloss.linear_kl_divergence(*given, sample_weight=y >= 0, chunk_size=CHUNK, **options)


# With the name of their tokens' manual axis a mean over all; or numbers of each token.
MEANS = {
    "token_chunks": lambda h, k, y, **names: with_chunks(jaxloss.linear_cross_entropy)(
        h, k, y, implementation="token_chunks", **names
    ),
    "vocab_blocks": lambda h, k, y, **names: with_chunks(jaxloss.linear_cross_entropy)(
        h, k, y, implementation="vocab_blocks", **names
    ),
    "top k": lambda h, k, y, **names: with_chunks(jaxloss.linear_cross_entropy)(
        h, k, top_k(y), **names
    ),
    "own_loss": own_loss,
    "stats_loss": stats_loss,
    "divergence": divergence,
}
EACH = {
    "none": lambda h, k, y, **names: with_chunks(jaxloss.linear_cross_entropy)(
        h, k, y, reduction="none", return_stats=True, **names
    ),
    "token_stats": lambda h, k, y, **names: with_chunks(jaxloss.linear_token_stats)(
        h, k, y, **names
    ),
    "log_probs_at": lambda h, k, y, **names: with_chunks(jaxloss.linear_log_probs_at)(
        h, k, jnp.maximum(y, 0)[:, None], return_rest=True, **names
    ),
    "top_k": lambda h, k, **names: with_chunks(jaxloss.linear_top_k)(h, k, 3, **names),
}
# What splits the tokens, and the kernel; the names of manual axes that are written.
SPLITS = {
    "tokens over both": (P(BOTH), P(), {"token_axis_name": "stage"}),
    "manual tokens": (P("stage"), P(None, "data"), {"token_axis_name": "stage"}),
    "manual classes": (P("data"), P(None, "stage"), {"vocab_axis_name": "stage"}),
    "neither": (P("data"), P(), {}),
}
CASES = [
    (name, split)
    for name in (MEANS | EACH)
    for split in SPLITS
    if (name, split) != ("own_loss", "manual classes")  # it sees whole rows
]


def names_for(name, split):
    names = SPLITS[split][2]
    return {} if name in EACH and "token_axis_name" in names else names


def specs_of(function, split):
    of_tokens, of_kernel, _ = SPLITS[split]
    letters = [n for n in inspect.signature(function).parameters if n in arrays()]
    return {n: of_kernel if n == "k" else of_tokens for n in letters}


@pytest.mark.filterwarnings("ignore:linear_top_k:UserWarning")  # its logits are gathered
@pytest.mark.parametrize(("name", "split"), CASES)
def test_numbers_of_one_device(name, split):
    function = (MEANS | EACH)[name]
    specs = specs_of(function, split)
    out = only_manual(specs["h"]) if name in EACH else P()
    check(partial(function, **names_for(name, split)), function, "automatic", specs, out)


def in_shard_map(function, mesh, specs, out):
    ins = {name: only_manual(spec) for name, spec in specs.items()}
    mapped = lambda given: function(**given)  # noqa: E731
    return jax.shard_map(mapped, mesh=mesh, axis_names={"stage"}, in_specs=(ins,), out_specs=out)


@pytest.mark.parametrize("split", ["tokens over both", "manual classes"])
@pytest.mark.parametrize("name", [name for name in MEANS if name != "vocab_blocks"])
def test_each_device_computes_its_own_tokens(name, split):
    if (name, split) not in CASES:
        return
    function, mesh = MEANS[name], mesh_of("automatic")
    specs = specs_of(function, split)
    mapped = in_shard_map(partial(function, **names_for(name, split)), mesh, specs, P())
    with jax.set_mesh(mesh):
        given = {n: jax.device_put(arrays()[n], NamedSharding(mesh, p)) for n, p in specs.items()}
        text = jax.jit(gradients(mapped)).lower(given).compile().as_text()
    columns = CLASSES // (2 if split == "manual classes" else 1)
    rows = [int(n) for n in re.findall(rf"= f32\[(\d+),{columns}\]\S* dot\(", text)]
    assert {n for n in rows if n != FEATURES} <= {CHUNK // 4}
    gathered = re.findall(r"= f32\[(?:\d+,)*(\d+)\]\S* all-gather\(", text)
    assert not {int(n) for n in gathered} & {FEATURES, columns}


def test_a_warning_where_devices_would_share_tokens():
    function, mesh = MEANS["token_chunks"], mesh_of("automatic")
    specs = specs_of(function, "tokens over both")

    def call(chunk_size):
        def loss(h, k, y):
            options = {"token_axis_name": "stage", "chunk_size": chunk_size}
            return jaxloss.linear_cross_entropy(h, k, y, **options)

        with jax.set_mesh(mesh):
            return in_shard_map(loss, mesh, specs, P())({n: arrays()[n] for n in specs})

    with pytest.warns(UserWarning, match=f"{ROWS // 2} tokens in chunks of 2 do not divide among"):
        call(2)
    call(4)


def test_pairs_that_are_split_over_such_axes_are_said():
    mesh = mesh_of("automatic")

    def loss(h, t):
        return jaxloss.contrastive_loss(h, t[:, :FEATURES], token_axis_name="stage", chunk_size=2)

    mapped = in_shard_map(loss, mesh, {"h": P("stage"), "t": P("stage")}, P())
    given = {n: arrays()[n] for n in ("h", "t")}
    with jax.set_mesh(mesh), pytest.warns(UserWarning, match="split over the 4 devices of this"):
        got = mapped(given)
    expected = jaxloss.contrastive_loss(given["h"], given["t"][:, :FEATURES])
    np.testing.assert_allclose(got, expected, rtol=1e-5)
