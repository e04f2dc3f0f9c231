"""Cross-entropies of other libraries, each behind one call.

A peer has a loss of logits, a loss of ``hidden @ kernel`` of its own, or both. Its options carry
jaxloss's names; what the signature of its adapter lacks, the library has not. An option that its
users write in a line around the call (a mask, soft-capping) is none of the library's.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxloss
from benchmarks.harness.environment import environment

ROWS = 128  # rows a chunk where torch is told how many; by itself it takes a few
ALIKE = f"torch {ROWS} rows"  # answers as "torch chunks" does: another setting for the costs


@dataclass(frozen=True)
class Peer:
    """``logits(x, labels, **options)``, ``linear(hidden, kernel, labels, **options)``: the mean."""

    logits: Callable | None = None
    linear: Callable | None = None
    vocab_first: bool = False  # its kernel is [V, D]
    torch: bool = False

    def options(self) -> set[str]:
        signature = inspect.signature(self.logits or self.linear)  # pyright: ignore
        return {p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}


# What follows is what users of each library write.


def _weighed(losses, sample_weight):
    if sample_weight is None:
        return losses.mean()
    weight = jnp.asarray(sample_weight, losses.dtype)
    return (losses * weight).sum() / weight.sum()


def _array(option, x):
    return None if option is None else jnp.asarray(option, x.dtype)


def _jaxloss(x, labels, *, ignore_index=-100, label_smoothing=0.0, weight=None,
             sample_weight=None, classes=None, logit_softcap=None):  # fmt: skip
    return jaxloss.cross_entropy(
        x, labels, ignore_index=ignore_index, label_smoothing=label_smoothing,
        weight=_array(weight, x), sample_weight=_array(sample_weight, x),
        where=None if classes is None else jnp.arange(x.shape[1]) < classes,
        logit_softcap=logit_softcap,
    )  # fmt: skip


def _jaxloss_linear(hidden, kernel, labels, *, ignore_index=-100, label_smoothing=0.0, weight=None,
                    sample_weight=None, classes=None, logit_softcap=None, chunk_size=None,
                    implementation):  # fmt: skip
    return jaxloss.linear_cross_entropy(
        hidden, kernel, labels, ignore_index=ignore_index, label_smoothing=label_smoothing,
        weight=_array(weight, kernel), sample_weight=_array(sample_weight, kernel),
        num_classes=classes, logit_softcap=logit_softcap, chunk_size=chunk_size,
        implementation=implementation,
    )  # fmt: skip


def _optax(x, labels, *, label_smoothing=0.0, sample_weight=None, classes=None):
    if label_smoothing:
        one_hot = optax.smooth_labels(jax.nn.one_hot(labels, x.shape[1]), label_smoothing)
        return _weighed(optax.softmax_cross_entropy(x, one_hot), sample_weight)
    # [1, C]: of one axis it would be a mask of the tokens.
    where = None if classes is None else jnp.arange(x.shape[1])[None] < classes
    losses = optax.softmax_cross_entropy_with_integer_labels(x, labels, where=where)
    return _weighed(losses, sample_weight)


def two_step(x, labels, where=None):
    """The losses of the rows by what users of JAX alone write."""
    log_probs = jax.nn.log_softmax(x, where=where)
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]


def _two_step(x, labels, *, sample_weight=None, classes=None):
    where = None if classes is None else jnp.arange(x.shape[1]) < classes
    return _weighed(two_step(x, labels, where), sample_weight)


def _load_torch() -> Peer:
    torch = import_module("torch")
    torch.set_num_threads(environment()["cores"])

    def loss(x, labels, *, ignore_index=-100, label_smoothing=0.0, weight=None, sample_weight=None):
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        if weight is not None:
            options["weight"] = torch.tensor(weight, dtype=x.dtype)
        cross_entropy = partial(torch.nn.functional.cross_entropy, x, labels, **options)
        if sample_weight is None:
            return cross_entropy()
        m = torch.tensor(sample_weight, dtype=x.dtype)
        return (cross_entropy(reduction="none") * m).sum() / m.sum()

    return Peer(logits=loss, vocab_first=True, torch=True)


def _load_torch_chunks(rows: int | None = None) -> Peer:
    torch = import_module("torch")
    loss_of = torch.nn.functional.linear_cross_entropy
    given = {} if rows is None else {"batch_chunk_size": rows, "chunking_method": None}
    chunks = torch.nn.LinearCrossEntropyOptions(**given)

    def loss(hidden, kernel, labels, *, ignore_index=-100, label_smoothing=0.0, weight=None):
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        if weight is not None:
            options["weight"] = torch.tensor(weight, dtype=kernel.dtype)
        return loss_of(hidden, kernel, labels, options=chunks, **options)

    return Peer(linear=loss, vocab_first=True, torch=True)


def _load_tokamax(implementation: str) -> Peer:
    loss_of = import_module("tokamax").linear_softmax_cross_entropy_loss
    # It reads flags at its first call, by itself from this program's command line.
    import_module("absl.flags").FLAGS(["peers"])

    def loss(hidden, kernel, labels):
        return loss_of(hidden, labels, kernel, reduction="mean", implementation=implementation)

    return Peer(linear=loss)


def _load_jax_cce() -> Peer:
    loss_of = import_module("jax_cce").linear_cross_entropy

    def loss(hidden, kernel, labels):  # a peer's options are those of its signature
        return loss_of(hidden, kernel, labels)

    return Peer(linear=loss, vocab_first=True)


def _jaxloss_schedule(name: str | None) -> Callable[[], Peer]:
    linear = partial(_jaxloss_linear, implementation=name)
    logits = _jaxloss if name is None else None
    return lambda: Peer(logits, linear)


def _load_liger() -> Peer:
    functional = import_module("liger_kernel.transformers.functional")
    return Peer(linear=functional.liger_fused_linear_cross_entropy, vocab_first=True, torch=True)


def _load_cut() -> Peer:
    loss = import_module("cut_cross_entropy").linear_cross_entropy
    return Peer(linear=loss, vocab_first=True, torch=True)


LOADERS: dict[str, Callable[[], Peer]] = {
    "jaxloss": _jaxloss_schedule(None),
    "chunks": _jaxloss_schedule("token_chunks"),
    "blocks": _jaxloss_schedule("vocab_blocks"),
    "stored": _jaxloss_schedule("stored_exponentials"),
    "kernel": _jaxloss_schedule("mosaic_tpu"),
    "mosaic_gpu": _jaxloss_schedule("mosaic_gpu"),
    "optax": lambda: Peer(_optax),
    "two-step": lambda: Peer(_two_step),
    "torch": _load_torch,
    "torch chunks": _load_torch_chunks,
    ALIKE: partial(_load_torch_chunks, ROWS),
    "tokamax xla": partial(_load_tokamax, "xla"),
    "tokamax chunked_xla": partial(_load_tokamax, "chunked_xla"),
    "tokamax mosaic_tpu": partial(_load_tokamax, "mosaic_tpu"),
    "jax-cce": _load_jax_cce,
    "Liger": _load_liger,
    "cut-cross-entropy": _load_cut,
}


def load(
    names: Iterable[str], try_out: Callable[[Peer], Any] = lambda peer: None
) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that are here and pass ``try_out``, and why the others do not."""
    peers, absent = {}, {}
    for name in names:
        try:
            peer = LOADERS[name]()
            try_out(peer)
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            peers[name] = peer
    return peers, absent


def linear_loss(peer: Peer, logits_dtype: Any = None) -> Callable:
    """``loss(hidden, kernel, labels)``: the peer's own, or its loss of logits, which are all held.

    The logits have the dtype of the operands, or ``logits_dtype``.
    """

    def of_logits(hidden, kernel, labels):
        kernel = kernel.T if peer.vocab_first else kernel
        if logits_dtype is None:
            return peer.logits(hidden @ kernel, labels)  # pyright: ignore
        logits = jnp.matmul(hidden, kernel, preferred_element_type=logits_dtype)
        return peer.logits(logits, labels)  # pyright: ignore

    return peer.linear or of_logits
