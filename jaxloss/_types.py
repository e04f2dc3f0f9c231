"""What users hold and name: labels, statistics, and the words that options take."""

from __future__ import annotations

import json
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax import Array, export
from jax.typing import ArrayLike

Axes = tuple[str, ...]
PyTree = Any  # of arrays, as a user's own function returns it
AxisName = str | Axes  # of a mesh, as a user names one or several
Reduction = Literal["none", "mean", "sum"]
Divergence = Literal["forward", "reverse", "jensen_shannon"]
Implementation = Literal[
    "token_chunks", "vocab_blocks", "stored_exponentials", "mosaic_tpu", "mosaic_gpu"
]
Rest = Literal["drop", "uniform", "bucket"]
REDUCTIONS, DIVERGENCES = get_args(Reduction), get_args(Divergence)
IMPLEMENTATIONS, RESTS = get_args(Implementation), get_args(Rest)


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
        A negative one makes its row NaN, because a log-probability stands there: store
        ``jnp.exp(log_probs)``.
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


def _storable(cls: type) -> None:
    """A program that takes them can be stored, and run where jaxloss is imported."""
    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jaxloss.{cls.__name__}",
        serialize_auxdata=lambda meta_fields: json.dumps(meta_fields).encode(),
        deserialize_auxdata=lambda data: tuple(json.loads(data)),
    )


_storable(TopKLabels)


class TokenStats(NamedTuple):
    """What one token's logits say, from the pass that computed the loss; each shaped as the losses.

    A token that does not count (its label is ignored, masked or weighed by 0) has 0 in each of the
    floats and -1 in the integers; a label out of range has NaN in the floats. The floats are
    float32 (float64 for float64 logits); those that have a derivative have it in every mode.

    Attributes:
      log_prob: ``log p_y``, the label's log-probability (for probabilities ``q`` as labels, its
        expectation ``sum_j q_j log p_j``), without weights, smoothing or z-loss.
      logsumexp: ``log sum_j exp(x_j)``.
      entropy: ``-sum_j p_j log p_j``, in nats.
      prediction: the first class at the maximum; -1 where the logits hold NaN or +inf, or nothing
        but -inf. int32.
      confidence: the prediction's probability, without a derivative.
      rank: the label's place in the order of predictions, by falling logit and then by index: 0
        where it is the prediction, so that ``rank < k`` says whether it is among the first k. -1
        where there is no prediction, or no one label. int32.
      sum_sq_probs: ``sum_j p_j^2``, the probability that two samples are one class: 1 where the
        model is sure, 1 / C where it knows nothing. It takes a pass over the logits, which a
        compiled program that does not read it leaves out.
      z_loss: ``z * logsumexp**2``, what ``z_loss`` adds to the token's loss, without weights; 0
        where it is not asked for.
    """

    log_prob: Array
    logsumexp: Array
    entropy: Array
    prediction: Array
    confidence: Array
    rank: Array
    sum_sq_probs: Array
    z_loss: Array


# A program that returns them can be stored, and run where jaxloss is imported.
export.register_namedtuple_serialization(TokenStats, serialized_name="jaxloss.TokenStats")


class ReferenceStats(NamedTuple):
    """What a reference says of the same tokens, beside :class:`TokenStats`, and shaped as it.

    A token that does not count has 0. float32 (float64 for float64 operands).

    Attributes:
      log_prob: the label's log-probability under the reference, without a gradient.
      entropy: the reference's, without a gradient.
      forward_kl: KL(reference || model), as ``kl_divergence``'s ``"forward"``.
      reverse_kl: KL(model || reference), as its ``"reverse"``.
      jensen_shannon: as its ``"jensen_shannon"``.
    """

    log_prob: Array
    entropy: Array
    forward_kl: Array
    reverse_kl: Array
    jensen_shannon: Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("hidden", "kernel", "bias"),
    meta_fields=("vocab_axis", "logit_softcap"),
)
@dataclass(frozen=True)
class Reference:
    """A reference model's head, with a vocabulary axis and a soft cap of its own.

    Attributes:
      hidden: ``[..., D2]``, with the leading shape of the model's.
      kernel: ``[D2, V2]``, or ``[V2, D2]`` with ``vocab_axis=0``; it may be a
        :class:`LowRankKernel` or a :class:`QuantizedKernel`.
      bias: ``[V2]``, or None.
      vocab_axis: the axis of ``kernel`` that holds the columns.
      logit_softcap: ``cap * tanh(logits / cap)`` of the reference's logits; None: no cap.

    Raises (where it is used):
      TypeError, ValueError: as for the model's own operands.

    Example:

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
      >>> tied = jaxloss.Reference(normal(0, 6, 8), normal(1, 10, 8), vocab_axis=0)
      >>> kl = lambda stats, reference: reference.forward_kl
      >>> loss = jaxloss.linear_stats_loss(
      ...     kl, normal(2, 6, 4), normal(3, 4, 10), jnp.arange(6), reference=tied)
      >>> loss.shape
      ()
    """

    hidden: ArrayLike
    kernel: KernelLike
    _: KW_ONLY
    bias: ArrayLike | None = None
    vocab_axis: int = -1
    logit_softcap: float | None = None


_storable(Reference)
export.register_namedtuple_serialization(ReferenceStats, serialized_name="jaxloss.ReferenceStats")


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class LowRankKernel:
    r"""A frozen kernel with a trained update of low rank (LoRA), wherever a ``kernel`` is taken.

    .. math:: h W + s \, (h A) B

    No merged kernel and no gradient of its size is ever made: differentiate with respect to ``a``
    and ``b`` alone. ``jax.grad`` makes an array of zeros for an argument without a gradient, so
    leave the frozen kernel out of what it differentiates, as in the example.

    Attributes:
      kernel: ``[D, V]``, or ``[V, D]`` with ``vocab_axis=0``; an array or a
        :class:`QuantizedKernel` (QLoRA). Without a gradient.
      a: ``[D, r]``, whatever ``vocab_axis`` is.
      b: ``[r, V]``, likewise.
      scale: a Python number (``alpha / r``), or a scalar array, which is differentiable.

    Raises (where it is used):
      TypeError, ValueError: as for a kernel; or ``a`` and ``b`` do not fit it.

    Example:

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
      >>> hidden, kernel, labels = normal(0, 6, 4), normal(1, 4, 10), jnp.arange(6)
      >>> trained = {"a": normal(2, 4, 2), "b": jnp.zeros((2, 10))}
      >>> def loss_fn(trained, kernel):
      ...     head = jaxloss.LowRankKernel(kernel, trained["a"], trained["b"], scale=2.0)
      ...     return jaxloss.linear_cross_entropy(hidden, head, labels)
      >>> gradients = jax.grad(loss_fn)(trained, kernel)
      >>> gradients["b"].shape
      (2, 10)

    Source: E. J. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).
    """

    kernel: ArrayLike | QuantizedKernel
    a: ArrayLike
    b: ArrayLike
    scale: ArrayLike = 1.0
    _scale_is_leaf = False  # no field: whether ``scale`` was a leaf of the tree behind this head

    def tree_flatten_with_keys(self):
        # A number is static: no optimizer changes it. In a tree that was made from another's leaves
        # (sizes, the axes of vmap) a number may stand for an array, and stays a leaf.
        number = isinstance(self.scale, int | float) and not isinstance(self.scale, bool)
        static = number and not self._scale_is_leaf
        names = ("kernel", "a", "b") if static else ("kernel", "a", "b", "scale")
        children = tuple((jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in names)
        return children, (self.scale,) if static else ()

    @classmethod
    def tree_unflatten(cls, static, children):
        made = cls(*children, *static)
        object.__setattr__(made, "_scale_is_leaf", not static)
        return made


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scale"),
    meta_fields=(),
)
@dataclass(frozen=True)
class QuantizedKernel:
    r"""A frozen kernel of few bits, wherever a ``kernel`` is taken; it is widened block by block.

    .. math:: W_{dv} = s_v\, q_{dv}, \qquad \text{or of groups of D / G features} \quad
              W_{dv} = s_{g(d) v}\, q_{dv}

    Attributes:
      values: ``[D, V]``, or ``[V, D]`` with ``vocab_axis=0``: int8, int4, float8_e4m3fn or
        float8_e5m2. Without a gradient.
      scale: ``[V]`` or ``[1, V]``, a number a column, which multiplies the float32 logits: the
        product is of the exact ``values``. Or ``[G, V]``, a number for each column of each of G
        groups of neighbouring features, whatever ``vocab_axis`` is: then ``scale * values`` is
        rounded to the dtype of the product. Floating; without a gradient.

    Raises (where it is used):
      TypeError, ValueError: as for a kernel; or ``scale`` does not fit ``values``.

    Example:

      >>> import jax, jax.numpy as jnp
      >>> import jaxloss
      >>> normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
      >>> hidden, kernel, labels = normal(0, 6, 4), normal(1, 4, 10), jnp.arange(6)
      >>> scale = jnp.abs(kernel).max(axis=0, keepdims=True) / 127
      >>> head = jaxloss.QuantizedKernel(jnp.round(kernel / scale).astype(jnp.int8), scale)
      >>> loss = jaxloss.linear_cross_entropy(hidden, head, labels)
      >>> near = jaxloss.linear_cross_entropy(hidden, kernel, labels)
      >>> bool(jnp.allclose(loss, near, atol=0.05))
      True

    Source: T. Dettmers et al., "LLM.int8()" (2022), for a scale a column; T. Dettmers et al.,
    "QLoRA" (2023), for groups under a trained update.
    """

    values: ArrayLike
    scale: ArrayLike


def is_low_rank(kernel: Any) -> bool:
    return isinstance(kernel, LowRankKernel)


def is_quantized(kernel: Any) -> bool:
    return isinstance(kernel, QuantizedKernel)


KernelLike = ArrayLike | LowRankKernel | QuantizedKernel
_storable(LowRankKernel)
_storable(QuantizedKernel)


class TokenArrays(NamedTuple):
    """The arrays of a loss beside its logits, as the checks return them; None: not given. Or
    something for each of them."""

    labels: Any  # class indices, probabilities or TopKLabels
    weight: Any = None  # [C]
    sample_weight: Any = None  # shaped as the losses
    class_mask: Any = None  # of the logits' rank: the classes that exist
    token_mask: Any = None  # shaped as the losses: the tokens that count
    temperature: Any = None  # shaped as the losses, where each token has its own


class LossOptions(NamedTuple):
    """What is static about a loss, as the checks return it."""

    axes: tuple[int, ...]  # of the logits' classes
    num_classes: int
    ignore_index: int | None
    reduction: Reduction
    empty_mean: float | None
    with_stats: bool
    vocab_axes: Axes  # of the mesh, that the classes are split over
    token_axes: Axes  # likewise the tokens


_TRACED = "traced"  # stands for an array among the static numbers


def with_static_numbers(cls: Any) -> Any:
    """A NamedTuple as a pytree of its arrays, to which its Python numbers are static."""

    def flatten(x):
        arrays = tuple(v for v in x if isinstance(v, Array))
        return arrays, tuple(_TRACED if isinstance(v, Array) else v for v in x)

    def unflatten(static, arrays):
        rest = iter(arrays)
        return cls(*(next(rest) if v is _TRACED else v for v in static))

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)
    return cls


@with_static_numbers
class Scalars(NamedTuple):
    """Numbers of a loss that may be traced."""

    label_smoothing: Any = 0.0
    z_loss: Any = 0.0
    softcap: float | None = None
    temperature: Any = 1.0
    beta: Any = 0.5  # of Jensen-Shannon divergences
    gamma: Any = 0.0  # of focal losses

    @property
    def plain(self) -> bool:
        """Whether it is known that they change nothing."""
        return not jax.tree.leaves(self) and self == Scalars()

    @property
    def divided(self) -> bool:
        """Whether the temperature is an array."""
        return isinstance(self.temperature, Array)

    @property
    def rescaled(self) -> bool:
        """Whether the logits are capped or divided."""
        return self.softcap is not None or self.divided or self.temperature != 1
