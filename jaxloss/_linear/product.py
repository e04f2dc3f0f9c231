"""The product ``hidden @ kernel + bias`` of some tokens, and its gradients.

The only file that slices, gathers or splits a kernel.

Letters: n tokens, D features, V columns of the kernel, C classes.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint

from jaxloss._types import Axes
from jaxloss._xla import mesh
from jaxloss._xla.dtypes import accumulator_dtype, gradient_dtype

_ROWS = Layout(major_to_minor=(0, 1))


class Sweep(NamedTuple):
    """What is static about the loop over a product's parts."""

    chunk: int  # tokens of a step, or columns
    # On a mesh, inside of shard_map, whose types say what the gradients are sums over:
    vocab_axes: Axes = ()  # the columns are split over; the loops' steps then communicate
    token_axes: Axes = ()  # the tokens are split over, and a sum is over all of them


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("hidden", "kernel", "bias"),
    meta_fields=("vocab_axis", "num_classes", "precision", "gathered"),
)
@dataclass(frozen=True)
class Product:
    """The operands of ``hidden @ kernel + bias``, or something for each of them."""

    hidden: Any  # [n, D]
    kernel: Any  # [D, V], or [V, D] for vocab_axis 0
    bias: Any  # [V]; None: there is none
    vocab_axis: int  # of the kernel, 0 or 1
    num_classes: int  # C <= V
    precision: Any = None
    # Axes of the kernel that are split over mesh axes of the tokens.
    gathered: tuple[tuple[int, Axes], ...] = ()

    @property
    def columns(self) -> int:
        return self.kernel.shape[self.vocab_axis]

    def logits(self) -> Array:
        """``[n, C]``, in the accumulator's dtype."""
        x = self._dot(self.hidden, self.kernel, 1, 1 - self.vocab_axis)
        if self.bias is not None:
            x = x + self.bias.astype(x.dtype)[None]
        return x[:, : self.num_classes]

    def _dot(self, x: Array, y: Array, axis_x: int, axis_y: int, out: Any = None) -> Array:
        contract = (((axis_x,), (axis_y,)), ((), ()))
        out = out or accumulator_dtype(x.dtype)
        return lax.dot_general(x, y, contract, self.precision, preferred_element_type=out)

    def block(self, start: Any, size: int) -> "Product":
        """The product of the columns from ``start`` on."""
        return replace(
            self,
            kernel=lax.dynamic_slice_in_dim(self.kernel, start, size, self.vocab_axis),
            bias=None if self.bias is None else lax.dynamic_slice_in_dim(self.bias, start, size),
            num_classes=size,
        )

    def whole(self) -> "Product":
        """With a kernel that is gathered over the tokens' devices."""
        kernel = self.kernel
        for axis, names in self.gathered:
            kernel = lax.all_gather(kernel, names, axis=axis, tiled=True)
        return replace(self, kernel=kernel)

    def scattered(self) -> "Product":
        """The transpose of :meth:`whole`, of a product's gradients."""
        g = self.kernel
        if g is None:
            return self
        for axis, names in self.gathered[::-1]:
            g = lax.psum_scatter(g, names, scatter_dimension=axis, tiled=True)
        return replace(self, kernel=g)

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
        dx = dx.astype(self.hidden.dtype)
        if held and active.hidden and active.kernel and jax.default_backend() == "tpu":
            dx = lax.optimization_barrier(dx)
        # On a GPU alone the product is asked for narrow sums (it adds in float32 all the same):
        # there XLA would narrow them in a pass of its own, elsewhere it needs no asking.
        narrow = complete and jax.default_backend() == "gpu"
        out = gradient_dtype(self.kernel.dtype) if narrow else None
        return replace(
            self,
            hidden=self._dot(dx, self.kernel, 1, self.vocab_axis) if active.hidden else None,
            kernel=self._of_kernel(dx, out) if active.kernel else None,
            bias=d_bias,
        )

    def _of_kernel(self, dx: Array, out: Any) -> Array:
        first, second = (self.hidden, dx) if self.vocab_axis == 1 else (dx, self.hidden)
        return self._dot(first, second, 0, 0, out)


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
    return not product.gathered and not axes - own
