"""The operands of ``hidden @ kernel + bias``, checked."""

from typing import Any

from jaxloss._checks import arguments, operands
from jaxloss._linear import kernels
from jaxloss._linear.product import Product


def product_of(
    call: str,
    hidden: Any,
    kernel: Any,
    bias: Any,
    vocab_axis: Any,
    *,
    dtype: Any,
    precision: Any,
    of: str = "",
) -> Product:
    """The product of all columns, of operands as the public function ``call`` was given them;
    ``of`` goes before their names."""
    hidden, kernel, bias, axis, narrow = operands.product_operands(
        call, hidden, kernel, bias, vocab_axis, dtype, of
    )
    precision = arguments.precision(call, precision)
    *heads, rows, columns = kernels.base_of(kernel).shape
    columns, own = (rows, columns)[axis], {"dtype": narrow, "heads": heads[0] if heads else None}
    return Product(hidden, kernel, bias, axis, columns, precision, **own)
