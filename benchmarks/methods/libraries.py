"""Cross-entropies of other libraries, each behind one call.

A peer has a loss of logits, a loss of ``hidden @ kernel`` of its own, or both. Its options carry
jaxloss's names; what the signature of its adapter lacks, the library has not. An option that its
users write in a line around the call (a mask, soft-capping) is none of the library's.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxloss
from benchmarks.harness.environment import environment, installed

PACKAGES = ("jaxloss", "jax", "optax", "torch", "tokamax", "jax-cce")
ROWS = 128  # rows a chunk where torch is told how many; by itself it takes a few
ALIKE = f"torch {ROWS} rows"  # answers as "torch chunks" does: another setting for the costs


@dataclass(frozen=True)
class Peer:
    """``logits(x, labels, **options)``, ``linear(hidden, kernel, labels, **options)``: the mean."""

    logits: Callable | None = None
    linear: Callable | None = None
    vocab_first: bool = False  # the kernel of ``linear`` is [V, D]
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
                    sample_weight=None, classes=None, logit_softcap=None,
                    implementation):  # fmt: skip
    return jaxloss.linear_cross_entropy(
        hidden, kernel, labels, ignore_index=ignore_index, label_smoothing=label_smoothing,
        weight=_array(weight, kernel), sample_weight=_array(sample_weight, kernel),
        num_classes=classes, logit_softcap=logit_softcap, implementation=implementation,
    )  # fmt: skip


def _optax(x, labels, *, label_smoothing=0.0, sample_weight=None, classes=None):
    if label_smoothing:
        one_hot = optax.smooth_labels(jax.nn.one_hot(labels, x.shape[1]), label_smoothing)
        return _weighed(optax.softmax_cross_entropy(x, one_hot), sample_weight)
    # [1, C]: of one axis it would be a mask of the tokens.
    where = None if classes is None else jnp.arange(x.shape[1])[None] < classes
    losses = optax.softmax_cross_entropy_with_integer_labels(x, labels, where=where)
    return _weighed(losses, sample_weight)


def _two_step(x, labels, *, sample_weight=None, classes=None):
    where = None if classes is None else jnp.arange(x.shape[1]) < classes
    log_probs = jax.nn.log_softmax(x, where=where)
    losses = -jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
    return _weighed(losses, sample_weight)


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

    return Peer(logits=loss, torch=True)


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

    def loss(hidden, kernel, labels):
        return loss_of(hidden, kernel, labels)

    return Peer(linear=loss, vocab_first=True)


def jaxloss_schedule(name: str | None) -> Callable[[], Peer]:
    linear = partial(_jaxloss_linear, implementation=name)
    logits = _jaxloss if name in (None, "token_chunks") else None
    return lambda: Peer(logits, linear)


LOADERS: dict[str, Callable[[], Peer]] = {
    "jaxloss": jaxloss_schedule("token_chunks"),
    "blocks": jaxloss_schedule("vocab_blocks"),
    "optax": lambda: Peer(_optax),
    "two-step": lambda: Peer(_two_step),
    "torch": _load_torch,
    "torch chunks": _load_torch_chunks,
    ALIKE: partial(_load_torch_chunks, ROWS),
    "tokamax xla": partial(_load_tokamax, "xla"),
    "tokamax chunked_xla": partial(_load_tokamax, "chunked_xla"),
    "tokamax mosaic_tpu": partial(_load_tokamax, "mosaic_tpu"),
    "jax-cce": _load_jax_cce,
}


def load() -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that are here and run here, and why the others do not."""
    peers, absent = {}, {}
    for name, loader in LOADERS.items():
        try:
            peer = loader()
            answer(peer, np.zeros((2, 3)), np.array([0, 2]), {}, "float32")
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            peers[name] = peer
    return peers, absent


def versions() -> dict[str, str | None]:
    return {name: installed(name) for name in PACKAGES}


# Logits as a product that changes no bit of them: one row as 1 x row; several as rows x identity,
# where inf or NaN stays in its row (their gradient is then that of ``hidden``).


def _product(peer: Peer, x, ones: Callable, eye: Callable):
    flip = (lambda k: k.T) if peer.vocab_first else lambda k: k
    return (ones(1), flip(x)) if len(x) == 1 else (x, flip(eye(x.shape[1])))


@cache
def _compiled(peer: Peer, of_linear: bool, options: tuple) -> Callable:
    def loss(x, labels):
        if not of_linear:
            return peer.logits(x, labels, **dict(options))  # pyright: ignore
        ones, eye = partial(jnp.ones, dtype=x.dtype), partial(jnp.eye, dtype=x.dtype)
        operands = _product(peer, x, lambda n: ones((n, n)), eye)
        return peer.linear(*operands, labels, **dict(options))  # pyright: ignore

    # Run once on a few numbers: a third of the time of compiling goes.
    quick = {"xla_backend_optimization_level": 0}
    return jax.jit(jax.value_and_grad(loss), compiler_options=quick)


def _torch_answer(peer: Peer, of_linear: bool, x, labels, options: dict[str, Any], dtype: str):
    torch = import_module("torch")
    x = torch.tensor(x, dtype=getattr(torch, dtype), requires_grad=True)
    labels = torch.tensor(labels, dtype=torch.long)
    if of_linear:
        ones = partial(torch.ones, dtype=x.dtype)
        operands = _product(peer, x, lambda n: ones((n, n)), partial(torch.eye, dtype=x.dtype))
        loss = peer.linear(*operands, labels, **options)  # pyright: ignore
    else:
        loss = peer.logits(x, labels, **options)  # pyright: ignore
    loss.backward()
    returned = str(loss.dtype).removeprefix("torch.")
    return float(loss.detach()), x.grad.to(torch.float64).numpy(), returned


def answer(
    peer: Peer, x: np.ndarray, labels: np.ndarray, options: dict[str, Any], dtype: str,
    of_linear: bool | None = None,
) -> tuple[float, np.ndarray, str]:  # fmt: skip
    """The mean loss of logits ``x``, its gradient by ``x``, and the dtype that it came in."""
    of_linear = peer.logits is None if of_linear is None else of_linear
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says so where it takes its other path
        if peer.torch:
            return _torch_answer(peer, of_linear, x, labels, options, dtype)
        compiled = _compiled(peer, of_linear, tuple(options.items()))
        loss, gradient = compiled(jnp.asarray(x, dtype), jnp.asarray(labels, jnp.int32))
        return float(loss), np.asarray(gradient, np.float64), str(loss.dtype)
