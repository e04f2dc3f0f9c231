"""The passes over rows: which form of one is taken, and its limits. What they compute is tested
where it is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss import _passes
from jaxloss._passes import Scaling


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def program(f, size):
    x, m = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, size), (3,)))
    kept = jax.ShapeDtypeStruct((3,), jnp.int32)
    # A function of its own: JAX keeps a trace, of other circumstances.
    return str(jax.make_jaxpr(lambda *args: f(*args))(x, m, kept))


def test_one_device(one_device, monkeypatch):
    assert _passes._on_one_device()
    for count in (0, 2, 8):
        monkeypatch.setattr(jax, "device_count", lambda count=count: count)
        assert not _passes._on_one_device()


@pytest.mark.parametrize(
    ("size", "block"),
    [
        (1, 1),
        (16384, 16384),  # short rows are whole
        (16385, 3277),  # 5 x 29 x 113
        (16411, 16411),  # a prime
        (32768, 4096),
        (256 * 4099, 256),
        (255 * 4099, 255 * 4099),
        (17 * 241 * 4099, 17 * 241 * 4099),  # 4097 is too long
    ],
)
def test_block_sizes(size, block):
    assert _passes._block_size(size) == block


@pytest.mark.parametrize(("size", "exact"), [(2**24, True), (2**24 + 1, False), (1, True)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_exact_integers(size, exact, dtype):
    assert _passes._index_is_exact(jax.ShapeDtypeStruct((2**25, size), dtype)) == exact


def test_the_other_exponentials_are_overwritten_on_long_rows_of_one_device(one_device):
    assert "scatter" not in program(_passes.other_exponentials, 255)
    assert "scatter" in program(_passes.other_exponentials, 256)


def test_the_sum_goes_in_blocks_on_long_rows_of_one_device(one_device):
    assert "platform_index" not in program(_passes.sum_exponentials, 16384)
    assert "platform_index" in program(_passes.sum_exponentials, 32768)
    assert "platform_index" not in program(_passes.sum_exponentials, 16411)


def test_sharded_rows_are_neither_indexed_nor_reshaped():
    for f in (_passes.other_exponentials, _passes.sum_exponentials):
        text = program(f, 32768)
        assert "scatter" not in text
        assert "4096" not in text


def near_max(x, m, _):
    return _passes.near_max(x, m, None, None)


@pytest.mark.parametrize(
    ("f", "compared"),
    [(_passes._sum_of_others, " eq "), (near_max, "argmax"), (_passes.ahead, " gt ")],
    ids=["sum", "near_max", "ahead"],
)
def test_rows_are_compared_only_past_the_exact_integers(f, compared):
    """XLA:CPU writes the comparison out."""
    assert compared not in program(f, 2**24)
    assert compared in program(f, 2**24 + 1)


def test_what_is_read_is_gathered_and_what_is_narrow_is_written_as_bits():
    index = jnp.zeros((3, 2), jnp.int32)
    x = jnp.zeros((3, 5), jnp.bfloat16)
    for f in (lambda x: _passes.entry(x, index[:, 0]), lambda x: _passes.entries(x, index)):
        assert "gather" in str(jax.make_jaxpr(f)(x))

    def put(x):
        return _passes.put_at(x, index, jnp.ones((3, 2), x.dtype))

    assert "u16[3,5] = scatter" in str(jax.make_jaxpr(put)(x))
    assert "f32[3,5] = scatter" in str(jax.make_jaxpr(put)(x.astype(jnp.float32)))


def test_scaling():
    assert _passes.scaling_of(None) is None
    assert _passes.scaling_of(None, 1) is None
    assert _passes.scaling_of(None, 2) == Scaling(None, 2)
    assert _passes.scaling_of(3.0) == Scaling(3.0, 1.0)
    x = jnp.array([[1.0, -4.0]])
    mask = jnp.array([[True, False]])
    np.testing.assert_array_equal(_passes.widen(x, mask, Scaling(None, 2)), [[0.5, -jnp.inf]])
    np.testing.assert_array_equal(_passes.widen(x, None, Scaling(4.0, 1)), 4 * jnp.tanh(x / 4))


def test_the_first_of_the_largest():
    """Not one that a rounding of a huge logit brings near, and at 0 as anywhere."""
    rows = [[0.0, 1.0, 1.0], [-1.0, 0.0, -1.0], [-3e38, -3e38, 1e-38], [7.0, 7.0, 8.0]]
    x = jnp.pad(jnp.array(rows), ((0, 0), (97, 0)), constant_values=-jnp.inf)
    found = _passes.near_max(x, jnp.max(x, axis=-1), None, None)
    np.testing.assert_array_equal(found, jnp.argmax(x, axis=-1))
    mask = jnp.arange(100) < 99
    m = _passes.row_max(x, mask, None)
    found = _passes.near_max(x, m, mask[None], None)
    np.testing.assert_array_equal(found, jnp.argmax(jnp.where(mask, x, -jnp.inf), axis=-1))


@pytest.mark.nan_is_meant
def test_no_prediction():
    x = jnp.array([[1.0, jnp.nan], [1.0, jnp.inf], [0.0, 1.0]])
    np.testing.assert_array_equal(_passes.prediction(x, None, 0, ()), [-1, -1, 1])
    np.testing.assert_array_equal(_passes.prediction(x, None, 5, ()), [-1, -1, 6])
