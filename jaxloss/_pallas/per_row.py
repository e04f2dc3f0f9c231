"""A kernel of rows, of arrays with any leading axes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxloss._xla import mesh


def per_row(compute: Callable) -> Callable:
    """``compute(*arrays)``, which all have a row axis first, of arrays with any axes in its place;
    a batch of calls is one call of more rows."""

    @jax.custom_batching.custom_vmap
    def rows(*args):
        return compute(*args)

    @rows.def_vmap
    def _(size, batched, *args):
        args = (
            x if b else jnp.broadcast_to(x[None], (size, *x.shape))
            for x, b in zip(args, batched, strict=True)
        )
        out = rows(*(x.reshape(-1, *x.shape[2:]) for x in args))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    def leading(x, *rest):
        lead = x.shape[:-1]
        flat = (x.reshape(-1, x.shape[-1]), *(v.reshape(-1) for v in rest))
        out = rows(*mesh.varying_alike(*flat))
        return jax.tree.map(lambda v: v.reshape(*lead, *v.shape[1:]), out)

    return leading
