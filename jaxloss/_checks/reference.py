"""What a reference beside a model must be."""

from typing import Any

from jax import Array

from jaxloss._checks import arguments, messages
from jaxloss._types import Scalars, TopKLabels


def stored(function: str, name: str, batch: tuple[int, ...], given: TopKLabels) -> TopKLabels:
    """Classes that are stored of it; ``name``: what has the batch shape."""
    if given.rest != "bucket":
        rule = "a reference of TopKLabels must have rest='bucket'"
        way_out = "Its divergences are of the classes that it names, and of all others together."
        messages.fail(function, rule, repr(given.rest), way_out)
    return arguments.top_k_labels(function, name, batch, given, of="reference")


def numbers(
    function: str,
    scalars: Scalars,
    cap: float | None,
    own: Array | None,
    kl_temperature: Any,
    beta: Any,
    batch: tuple[int, ...],
    dtype: Any,
    *,
    compares: bool,
) -> tuple[Array | None, Scalars]:
    """``(a kl_temperature a token, the others)``: of the divergences and the reference's entropy.

    ``scalars`` are the model's, and ``own`` its temperature a token; ``cap`` is the reference's.
    ``compares``: whether there is a reference.
    """
    beta = arguments.check_beta(function, beta, dtype)
    if kl_temperature is None:
        return own, Scalars(softcap=cap, temperature=scalars.temperature, beta=beta)
    name = "kl_temperature"
    if not compares:
        messages.fail(function, f"{name} is for a reference", "none", "Leave it out.")
    own = arguments.token_temperature(function, kl_temperature, batch, dtype, name)
    one = None if own is not None else kl_temperature
    one = messages.scalar(function, name, one, *arguments.DIVISORS, 1.0, dtype, of_tokens=True)
    return own, Scalars(softcap=cap, temperature=one, beta=beta)
