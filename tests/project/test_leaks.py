"""No trace leaks: what a derivative rule refers to outlives the trace that the rule was made in.

Here is each derivative rule once, through each transformation, whatever the settings.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxloss

pytestmark = pytest.mark.usefixtures("old_objects_are_left_alone")
RNG = np.random.default_rng(0)
N, D, C = 4, 3, 5
X, T = (jnp.asarray(RNG.normal(size=(N, C)), jnp.float32) for _ in range(2))
H = jnp.asarray(RNG.normal(size=(N, D)), jnp.float32)
K = jnp.asarray(RNG.normal(size=(D, C)), jnp.float32)
Y = jnp.array([1, 2, 3, -100], jnp.int32)
S, W = jnp.arange(1.0, N + 1), jnp.arange(1.0, C + 1)
TOP = jaxloss.TopKLabels(jnp.array([[0, 1]] * N), jnp.array([[0.5, 0.25]] * N))
ODD = {"chunk_size": 3}  # a loop, and no second one over quarters
LINEAR = partial(jaxloss.linear_cross_entropy, H, **ODD)


def own_loss(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]


# A scalar function, and where.
CASES = {
    "log_softmax": (lambda x: jnp.sum(jaxloss.log_softmax(x)), X),
    "cross_entropy": (lambda x: jaxloss.cross_entropy(x, Y, label_smoothing=0.1, z_loss=0.1), X),
    "probabilities": (lambda q: jaxloss.cross_entropy(X, q, logit_softcap=3.0), jax.nn.softmax(T)),
    "top k": (lambda x: jaxloss.cross_entropy(x, TOP), X),
    "sample_weight": (lambda s: LINEAR(K, Y, weight=W, sample_weight=s), S),
    "vocab_blocks": (lambda k: LINEAR(k, Y, implementation="vocab_blocks"), K),
    "stored": (lambda k: LINEAR(k, Y, implementation="stored_exponentials"), K),
    "reduction none": (lambda k: jnp.sum(LINEAR(k, Y, reduction="none")), K),
    "linear_loss": (lambda k: jaxloss.linear_loss(own_loss, H, k, jnp.abs(Y) % C, **ODD), K),
    "kl_divergence": (lambda x: jaxloss.kl_divergence(x, T), X),
    "linear_kl_divergence": (lambda k: jaxloss.linear_kl_divergence(H, k, H, K, **ODD), K),
    "sigmoid_cross_entropy": (lambda x: jaxloss.sigmoid_cross_entropy(x, jax.nn.sigmoid(T)), X),
    "focal_loss": (lambda x: jaxloss.focal_loss(x, Y), X),
    "sequence_weight": (lambda s: jnp.sum(jaxloss.sequence_weight(Y, sample_weight=s)), S),
}


def transformed(f, x):
    return jax.grad(f)(x), jax.jvp(f, (x,), (x,))


@pytest.mark.parametrize("case", CASES)
def test_no_tracer_leaks(case):
    f, x = CASES[case]
    with jax.checking_leaks():
        jax.make_jaxpr(jax.vmap(partial(transformed, f)))(x[None])


OLD = []  # than the trace: no garbage to be collected


def test_the_checker_sees_a_leak():
    with pytest.raises(Exception, match="Leaked"), jax.checking_leaks():
        jax.make_jaxpr(lambda x: OLD.append(x) or x)(X)
    OLD.clear()
