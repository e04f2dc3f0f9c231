"""How many tokens, or columns, a step takes by default: every memory budget."""

import math
from typing import Any

import jax

from jaxloss._linear.packing import step_sizes
from jaxloss._xla.blocks import rows_of_a_block


def size_to_plan_for(num_tokens: Any) -> int:
    """The tokens' number, or where jax.export leaves it open, the largest."""
    return num_tokens if isinstance(num_tokens, int) else 2**31 - 1


def _fit(mebibytes: int, num_columns: int) -> int:
    """The power of two of tokens whose float32 logits take as much."""
    return 2 ** int(math.log2(max(1, mebibytes * 2**20 // (4 * max(1, num_columns)))))


# Float32 rows of logits that a token of the plain loss holds: its logits, and their gradient. A
# chunk of the same size may hold a fifth more.
PLAIN_ROWS, MOST_ROWS = 2.0, 2.4
OF_DIVERGENCE = {"forward": 5.0, "reverse": 5.0, "jensen_shannon": 10.0}


def rows_held(
    dtype: Any,
    *,
    none: bool = False,
    probabilities: bool = False,
    top: bool = False,
    weight: bool = False,
    smoothing: bool = False,
    mask: bool = False,
    statistics: bool = False,
    scaling: bool = False,
    divergence: str | None = None,
    own: float | None = None,
    stored: bool = False,
    in_blocks: bool = False,
) -> float:
    """Float32 rows of logits that a token of a chunk holds with these options, value and gradients.

    Counted in what XLA:CPU compiles, which writes out more than XLA's other compilers.

    ``none``: the reduction. ``stored``: exponentials. ``mask``: of classes. ``own``: a loss of the
    caller's own, whose arrays of a token take as many rows. ``in_blocks``: of rows, in which the
    logits' gradient is written over them; beside them stand those of a reference.
    """
    rows = PLAIN_ROWS
    if in_blocks:
        none = True
    elif divergence is not None:
        rows = OF_DIVERGENCE[divergence] + 0.25 * mask
    elif own is not None:
        rows = 4 + 2 * own  # of each array the chunk's part and its gradient
    else:
        soft = probabilities or (weight and smoothing)
        rows += 3 * probabilities + 1.5 * top + 2 * (weight and (smoothing or probabilities))
        rows += 0.25 * mask
        others = soft or top or statistics
        rows += mask * (soft or top or smoothing) + mask * statistics + scaling * others
        rows += mask * probabilities * statistics
        # A loop holds the rows whose sum is too large; scaled logits have slopes beside them.
        rows += stored * (0.25 + 2 * scaling)
    narrow = dtype.itemsize < 4 and jax.default_backend() == "cpu"
    if narrow and (none or rows > PLAIN_ROWS):
        rows += 0.75  # the gradient in the products' dtype, and as a CPU multiplies it
    return rows


def default_chunk(
    num_tokens: int, num_columns: int, num_features: int = 0, rows: float = PLAIN_ROWS
) -> int:
    """Tokens a chunk: a power of two, or all.

    ``num_features``: of a kernel whose gradient a single chunk forms without an accumulator.
    ``rows``: see :func:`rows_held`.
    """
    if jax.default_backend() == "cpu":
        # Measured: past 512 tokens the products gain little, past 1024 nothing.
        chunk = min(_fit(256, num_columns), 1024, max(512, _fit(64, num_columns)))
        chunk = _shrunk(chunk, rows)
    else:
        # Each chunk adds to the float32 d_kernel, 8 bytes of traffic beside 6 n operations: by the
        # chips' peak rates as long as the products of 220 tokens on an H200, 320 on a TPU v5e, 750
        # on a v6e. Up to here the logits stand where the gradients will be written.
        on_tpu = jax.default_backend() == "tpu"
        chunk = min(_fit(1024, num_columns), 1024 if on_tpu else 4096)
        chunk = max(_shrunk(chunk, rows), min(chunk, 512 if on_tpu else 256))
        # All at once hold 6 bytes a logit, in float32 and in bfloat16; chunks of n as many, and 4
        # for each entry of d_kernel: V (6 n + 4 D) in all. Of more rows a token, as much more.
        if not on_tpu and num_tokens <= chunk + int(2 * PLAIN_ROWS * num_features / (3 * rows)):
            chunk = num_tokens
    return max(1, min(chunk, num_tokens))


def block_of_rows(num_columns: int, in_step: bool) -> int | None:
    """Tokens of a chunk whose logits a loss reads at a time: a power of two; None: all of them.

    ``in_step``: the devices of a mesh communicate for each of these reads.
    """
    return None if in_step else rows_of_a_block(num_columns)


def default_stored_chunk(num_tokens: int, num_columns: int, num_features: int) -> int:
    """Tokens a chunk whose exponentials a kernel stores in 2 bytes each: a power of two, or all."""
    if jax.default_backend() == "tpu":
        return max(1, min(_fit(1024, num_columns), 2048, num_tokens))
    chunk = min(_fit(2048, num_columns), 8192)
    # All at once take 2 V N bytes; chunks of n as many, and 4 D V of the accumulator.
    return num_tokens if num_tokens <= chunk + 2 * num_features else max(1, chunk)


def _shrunk(chunk: int, rows: float) -> int:
    """The power of two of tokens that hold no more than a plain chunk."""
    if rows <= MOST_ROWS:
        return chunk
    return 2 ** int(math.log2(max(1, chunk * MOST_ROWS / rows)))


# Of float32 logits, nearly all that a sweep holds: one without gradients, one without the kernel's.
VALUE_MIB, FROZEN_KERNEL_MIB = 256, 1024


def widened_columns(num_features: int, num_columns: int) -> int:
    """Columns of a kernel of few bits that are widened at a time: a power of two, or all."""
    mebibytes = 8 if jax.default_backend() == "cpu" else 32
    return max(1, min(num_columns, max(128, _fit(mebibytes, num_features))))


def value_chunk(chunk: int, num_columns: int, mebibytes: int = VALUE_MIB, groups: int = 1) -> int:
    """Tokens of a sweep without an accumulator: halves of a chunk, until their logits fit."""
    while chunk % (2 * groups) == 0 and chunk > _fit(mebibytes, num_columns):
        chunk //= 2
    return chunk


def all_sizes(chunk: int, block: int | None, num_columns: int, groups: int = 1) -> list[int]:
    """How many tokens' logits a loss reads at a time, in every sweep: of all gradients, of those
    without the kernel's, of the value alone."""
    limits = VALUE_MIB, FROZEN_KERNEL_MIB
    chunks = chunk, *(value_chunk(chunk, num_columns, limit, groups) for limit in limits)
    steps = {n for c in chunks for n in step_sizes(c, groups)}
    return sorted({n if block is None else min(n, block) for n in steps})


def default_block(num_tokens: int, num_classes: int) -> int:
    """Columns a block: the power of two whose float32 logits fit the backend's budget."""
    backend = jax.default_backend()
    budget = {"cpu": 8, "tpu": 32}.get(backend, 64) * 2**20
    # Each block adds to the float32 d_hidden, 8 bytes of traffic beside 6 B operations: by a TPU
    # v6e's peak rates as long as the products of 770 columns.
    least = 1024 if backend == "tpu" else 128
    block = 2 ** int(math.log2(max(least, budget // (4 * max(1, num_tokens)))))
    return max(1, min(block, num_classes))


def default_chunk_of_pairs(num_pairs: Any, num_columns: Any) -> int:
    """Pairs a chunk of similarities: a power of two, or all. Two rows of them are held."""
    if not isinstance(num_columns, int):  # jax.export leaves it open: a large batch's
        num_columns = 2**15
    if jax.default_backend() != "cpu":
        return default_chunk(num_pairs, num_columns)
    # Beside them the gradients of x and y are held, which have as many rows as these have columns.
    return max(1, min(_fit(64, num_columns), 1024, num_pairs))
