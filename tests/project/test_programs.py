"""That the digests of programs.py tell programs apart, and take equal ones for equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import compiled, dataflow_digest

ROWS = jax.ShapeDtypeStruct((40, 50), jnp.float32)


def digest(function):
    return compiled(function, ROWS, ROWS)[0]


def loop(step):
    return lambda a, b: jax.lax.fori_loop(0, 9, lambda _, x: step(x, b), a)


TABLE = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
OTHER = TABLE.copy()
OTHER[20, 30] = 0  # one entry of many


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda a, b: (a - b) * b, lambda a, b: (b - a) * b),
        (lambda a, b: jnp.sum(jnp.exp(a) * b, 0), lambda a, b: jnp.sum(jnp.exp(a) * b, 1)),
        (loop(lambda x, b: jnp.sin(x - b)), loop(lambda x, b: jnp.sin(b - x))),
        (lambda a, b: a @ b.T @ TABLE, lambda a, b: a @ b.T @ OTHER),
        (lambda a, b: (a, b + 1), lambda a, b: (b + 1, a)),
    ],
    ids=["order", "axis", "loop", "constant", "results"],
)
def test_other_programs_have_other_digests(one, other):
    assert digest(one) != digest(other)


def test_names_and_order_do_not_count():
    def one(a, b):
        first, second = jnp.sin(a), jnp.cos(b)
        return jnp.sum(first @ second.T), first

    @jax.named_scope("other")
    def other(left, right):
        later = jnp.cos(right)
        earlier = jnp.sin(left)
        return jnp.sum(earlier @ later.T), earlier

    assert digest(one) == digest(other)


def test_an_instruction_that_is_not_understood_is_an_error():
    with pytest.raises((AssertionError, ValueError)):
        dataflow_digest("ENTRY %main () -> f32[] {\n  ROOT %x = f32[] what\n}\n")
