"""Labels that are more than one array."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import jax
from jax import export
from jax.typing import ArrayLike

Rest = Literal["drop", "uniform", "bucket"]
RESTS = get_args(Rest)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("indices", "probabilities"),
    meta_fields=("rest",),
)
@dataclass(frozen=True)
class TopKLabels:
    r"""A teacher's k most likely classes, as ``labels``: soft targets without a dense array.

    .. math:: l = \sum_{a=1}^k q_a \, (-\log p_{i_a}) + \text{what the rest asks for},
              \qquad R = \max(1 - \sum_a q_a,\, 0)

    Attributes:
      indices: class indices ``[..., k]``, an integer dtype, distinct within a token. A slot whose
        index is ``ignore_index`` is empty: tokens may have fewer than k classes, and a token of
        empty slots does not count. Any other index outside of ``[0, C)``, or a class named twice,
        makes its row NaN.
      probabilities: ``[..., k]``, floating: what the teacher gives these classes. Differentiable.
      rest: what becomes of ``R``, the probability of all other classes:

        * ``"drop"``: nothing. The q are taken as they are (divide by their sum for a distribution).
        * ``"uniform"``: it is spread evenly over the other classes that exist.
        * ``"bucket"``: the other classes are one class, of the student's too:
          ``R * -log(1 - sum_a p_{i_a})``. Without smoothing or class weights; of a product's
          logits by token chunks alone.

    Raises (where it is used):
      TypeError: ``indices`` are no integers, ``probabilities`` not floating.
      ValueError: their shapes differ or do not fit the logits, or ``rest`` is none of the words.

    Example:

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> logits = jax.random.normal(jax.random.key(0), (4, 9))
      >>> teacher = jax.nn.softmax(jax.random.normal(jax.random.key(1), (4, 9)))
      >>> probabilities, indices = jax.lax.top_k(teacher, 3)
      >>> labels = jaxloss.TopKLabels(indices, probabilities, rest="bucket")
      >>> jaxloss.cross_entropy(logits, labels).shape
      ()
      >>> every = jaxloss.TopKLabels(*jax.lax.top_k(teacher, 9)[::-1])
      >>> sparse, dense = (jaxloss.cross_entropy(logits, y) for y in (every, teacher))
      >>> bool(jnp.allclose(sparse, dense))
      True

    Source: distillation from stored top-k logits; what the rest does to it in Anshumann et al.,
    "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs" (2025).
    """

    indices: ArrayLike
    probabilities: ArrayLike
    rest: Rest = "drop"


# A program that takes them can be stored, and run where jaxloss is imported.
export.register_pytree_node_serialization(
    TopKLabels,
    serialized_name="jaxloss.TopKLabels",
    serialize_auxdata=lambda meta_fields: json.dumps(meta_fields).encode(),
    deserialize_auxdata=lambda data: tuple(json.loads(data)),
)
