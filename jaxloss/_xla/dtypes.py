"""What is computed in, and how narrow logits get there and back."""

import jax
import jax.numpy as jnp
from jax import Array, lax


def accumulator_dtype(dtype) -> jnp.dtype:
    """float32, or float64 for float64: no sum is ever held in fewer bits."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def gradient_dtype(dtype) -> jnp.dtype:
    """Of a gradient that has yet to be scaled. float16 has no room for it: the sum over a batch
    overflows, and 1 / N of one token underflows before a loss scale could lift it."""
    return jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype


@jax.custom_jvp
def _upcast_bfloat16(x: Array) -> Array:
    """float32 of bfloat16, by a shift on CPU: XLA's conversion takes longer there than the exp."""

    def shifted(x):
        bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
        return lax.bitcast_convert_type(bits << 16, jnp.float32)

    return lax.platform_dependent(x, cpu=shifted, default=lambda x: x.astype(jnp.float32))


@_upcast_bfloat16.defjvp
def _upcast_bfloat16_jvp(primals, tangents):
    # A bitcast has no derivative, and as a tangent's conversion no transpose.
    return _upcast_bfloat16(*primals), tangents[0].astype(jnp.float32)


@jax.custom_jvp
def _downcast_bfloat16(x: Array) -> Array:
    """bfloat16 of float32, to nearest, ties to even: on a CPU in integers, which is faster."""

    def rounded(x):
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # The carry of a NaN's low bits would run into its sign.
        near = jnp.where(jnp.isnan(x), 0x7FC0, near)
        return lax.bitcast_convert_type(near.astype(jnp.uint16), jnp.bfloat16)

    return lax.platform_dependent(x, cpu=rounded, default=lambda x: x.astype(jnp.bfloat16))


@_downcast_bfloat16.defjvp
def _downcast_bfloat16_jvp(primals, tangents):
    return _downcast_bfloat16(*primals), tangents[0].astype(jnp.bfloat16)


def upcast(x: Array) -> Array:
    return _upcast_bfloat16(x) if x.dtype == jnp.bfloat16 else x.astype(accumulator_dtype(x.dtype))


def downcast(x: Array, dtype) -> Array:
    both = x.dtype == jnp.float32 and dtype == jnp.bfloat16
    return _downcast_bfloat16(x) if both else x.astype(dtype)
