"""The product ``hidden @ kernel + bias`` of some tokens, and its gradients.

Letters: n tokens, D features, V columns of the kernel, C classes.
"""

from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint

from jaxloss._linear import kernels
from jaxloss._types import Axes
from jaxloss._xla import mesh
from jaxloss._xla.dtypes import accumulator_dtype, downcast, gradient_dtype, upcast

_ROWS = Layout(major_to_minor=(0, 1))


class Sweep(NamedTuple):
    """What is static about the loop over a product's parts."""

    chunk: int  # tokens of a step, or columns
    # On a mesh, inside of shard_map, whose types say what the gradients are sums over:
    vocab_axes: Axes = ()  # the columns are split over; the loops' steps then communicate
    token_axes: Axes = ()  # the tokens are split over, and a sum is over all of them
    quarters: bool = True  # what is left of the last chunk of tokens goes in quarters of one
    block: int | None = None  # tokens of a chunk whose logits a loss reads at a time; None: all


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("hidden", "kernel", "bias"),
    meta_fields=("vocab_axis", "num_classes", "precision", "gathered", "dtype", "heads"),
)
@dataclass(frozen=True)
class Product:
    """The operands of ``hidden @ kernel + bias``, or something for each of them."""

    hidden: Any  # [n, D]; of several heads [n, heads or 1, D], and the others by head
    kernel: Any  # [D, V], or [V, D] for vocab_axis 0: any kind of ``kernels``
    bias: Any  # [V]; None: there is none
    vocab_axis: int  # of a head's kernel, 0 or 1
    num_classes: int  # C <= V
    precision: Any = None
    # Axes of the kernel that are split over mesh axes of the tokens.
    gathered: tuple[tuple[int, Axes], ...] = ()
    dtype: Any = None  # of the products, to which they cast the operands; None: the operands'
    heads: int | None = None  # None: one, without an axis of its own

    @property
    def columns(self) -> int:
        return kernels.base_of(self.kernel).shape[-2:][self.vocab_axis]

    @property
    def lead(self) -> tuple[int, ...]:
        """The shape of the losses: that of ``hidden`` without features, each head a token."""
        shape = self.hidden.shape[:-1]
        return shape if self.heads is None else (*shape[:-1], self.heads)

    @property
    def tokens(self) -> Any:
        """Their number, of one head."""
        return prod(self.lead if self.heads is None else self.lead[:-1])

    def flat(self) -> "Product":
        """With one axis of tokens."""
        *lead, features = self.hidden.shape
        own = () if self.heads is None else (lead.pop(),)
        return replace(self, hidden=self.hidden.reshape(prod(lead), *own, features))

    @property
    def narrow(self) -> Any:
        """The dtype of the products."""
        return self.dtype or self.hidden.dtype

    @property
    def wide(self) -> Any:
        """The dtype of the logits."""
        return accumulator_dtype(self.narrow)

    @property
    def wide_hidden(self) -> Array:
        """``hidden`` as the products read it, widened."""
        return upcast(self.hidden.astype(self.narrow))

    def logits(self) -> Array:
        """``[n, C]``, in the accumulator's dtype."""
        x = kernels.times(self.hidden.astype(self.narrow), self.kernel, self.vocab_axis, self._dot)
        if self.bias is not None:
            x = x + self.bias.astype(x.dtype)[None]
        return x[:, : self.num_classes]

    def _dot(self, x: Array, y: Array, axis_x: int, axis_y: int, out: Any = None) -> Array:
        contract = (((axis_x,), (axis_y,)), ((), ()))
        out = out or accumulator_dtype(x.dtype)
        return lax.dot_general(x, y, contract, self.precision, preferred_element_type=out)

    def columns_at(self, index: Array) -> Array:
        """The kernel's columns at ``index[n]`` as rows, [n, D]; 0 past the last."""
        return kernels.columns_at(self.kernel, index, self.vocab_axis, self.narrow, self._dot)

    def weighted_columns(self, weight: Array) -> Array:
        """``sum_c weight[c] K[:, c]``, [D] and wide; ``weight[V]``."""
        return kernels.weighted_columns(self.kernel, weight, self.vocab_axis, self.narrow)

    def block(self, start: Any, size: int) -> "Product":
        """The product of the columns from ``start`` on."""
        return replace(
            self,
            kernel=kernels.block(self.kernel, start, size, self.vocab_axis),
            bias=None if self.bias is None else lax.dynamic_slice_in_dim(self.bias, start, size),
            num_classes=size,
        )

    def whole(self, cast: bool = True) -> "Product":
        """With a kernel that is gathered over the tokens' devices; ``cast``: an array gets the
        products' dtype before it is sent."""
        kernel = self.kernel
        if kernels.is_array(kernel):
            kernel = kernel.astype(self.narrow) if cast else kernel
            kernel = mesh.unsplit(kernel, 1 - self.vocab_axis)
        return replace(self, kernel=kernels.gathered(kernel, self.gathered, self.vocab_axis))

    def scattered(self) -> "Product":
        """The transpose of :meth:`whole`, of a product's gradients."""
        g = self.kernel
        if g is None or not kernels.is_array(g):  # of the others nothing gathered has a gradient
            return self
        for axis, names in self.gathered[::-1]:
            g = lax.psum_scatter(g, names, scatter_dimension=axis, tiled=True)
        return replace(self, kernel=g)

    def writes_narrow(self, complete: bool) -> bool:
        """Whether the product that makes the kernel's gradient is asked for narrow sums.

        On a GPU alone (it adds in float32 all the same): there XLA would narrow them in a pass of
        its own, elsewhere it needs no asking. ``complete``: see :meth:`gradients`.
        """
        return complete and kernels.is_array(self.kernel) and self.dtype is None and on("gpu")

    def gradients_of_scaled(
        self, e: Array, factor: Array, active: "Product", *, complete: bool
    ) -> "Product":
        """:meth:`gradients` of ``factor[:, None] * e``, where ``e[n, V]`` has the products' dtype:
        the rows' factor multiplies what is not of the logits' size."""
        d_hidden = d_bias = None
        if active.bias:
            d_bias = jnp.sum(upcast(e) * factor[:, None], axis=0)
        if active.hidden:
            # A kernel of few bits scales the columns before they are narrowed.
            given = e if kernels.is_array(self.kernel) else upcast(e)
            axis, dot = self.vocab_axis, self._dot
            d_hidden = kernels.times_transposed(given, self.kernel, axis, self.narrow, dot)
            d_hidden = factor[:, None] * d_hidden
        own = downcast(self.wide_hidden * factor[:, None], self.narrow)
        if on("tpu"):
            # XLA:TPU would multiply within the product, whose tiles then are smaller: on a v5e it
            # takes half as long again, by the compiler's model (libtpu 0.0.42).
            own = lax.optimization_barrier(own)
        out = gradient_dtype(self.kernel.dtype) if self.writes_narrow(complete) else None
        given = e, self.kernel, active.kernel, self.vocab_axis
        d_kernel = kernels.gradient(own, *given, self._dot, out)
        return replace(self, hidden=d_hidden, kernel=d_kernel, bias=d_bias)

    def gradients(
        self, dx: Array, active: "Product", *, complete: bool = False, held: bool = False
    ) -> "Product":
        """Those of the ``active`` operands, from the logits' ``dx[n, C]``.

        ``complete``: no other device and no other step adds to the kernel's, so that it may be
        written in its own dtype at once. ``held``: XLA:TPU would compute ``dx`` twice otherwise, as
        part of either product.
        """
        d_bias = jnp.sum(dx, axis=0) if active.bias else None
        # Formed in float32, narrowed once: the products take the operands' dtype.
        of_array = kernels.is_array(self.kernel)
        wide, dx = dx, dx.astype(self.narrow)
        if held and active.hidden and of_array and active.kernel and on("tpu"):
            dx = lax.optimization_barrier(dx)
        out = gradient_dtype(self.kernel.dtype) if self.writes_narrow(complete) else None
        axis, dot = self.vocab_axis, self._dot
        d_hidden = None
        if active.hidden:
            # A kernel of few bits scales the columns before they are narrowed.
            given = dx if of_array else wide
            d_hidden = kernels.times_transposed(given, self.kernel, axis, self.narrow, dot)
        own = self.hidden.astype(self.narrow)
        d_kernel = kernels.gradient(own, dx, self.kernel, active.kernel, axis, dot, out)
        return replace(self, hidden=d_hidden, kernel=d_kernel, bias=d_bias)


def on(backend: str) -> bool:
    return jax.default_backend() == backend


def padded(dx: Array, product: Product) -> Array:
    """``dx[n, C]`` with zeros for the kernel's columns that are no classes."""
    return jnp.pad(dx, ((0, 0), (0, product.columns - dx.shape[1])))


def in_rows(d_kernel: Array, dtype: Any) -> Array:
    """A block's gradient, for a loop that writes all of it.

    XLA:TPU may hold all of d_kernel transposed in the loop otherwise, and copy it after. There
    alone: a program with a layout in it is exported only where that is allowed.
    """
    if jax.default_backend() != "tpu":
        return d_kernel
    return with_layout_constraint(d_kernel.astype(dtype), _ROWS)


def complete_over(product: Product, axes: frozenset, sweep: Sweep) -> bool:
    """Whether no other device has a part of the kernel's gradient, ``axes`` being those of the mesh
    that the logits' gradient varies over."""
    own = mesh.varies_over(product.kernel) | {*sweep.vocab_axes}
    return kernels.is_array(product.kernel) and not product.gathered and not axes - own
