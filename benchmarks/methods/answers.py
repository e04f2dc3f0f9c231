"""What each library answers where answers differ, beside the truth; and its error by confidence."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import report
from benchmarks.methods.libraries import Peer

TOLERANCE = 1e-3  # of the truth, or the eps of the dtype that came back where that is more
C = 128  # more than 100: a label of -100, counted from the end, is a class
REAL = 100  # classes, where the others are padding
MARGINS = tuple(range(0, 61, 5))
ROWS = 8  # a margin, for the picture
INVALID = "an error"  # as the truth: NaN or an exception is right, a number is not
NO_TRUTH = "-"  # a choice of each library's


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


def _softmax(x: np.ndarray) -> np.ndarray:
    if np.any(np.isposinf(x)):  # the limit
        return np.isposinf(x) / np.sum(np.isposinf(x), dtype=np.longdouble)
    e = np.exp(x - np.max(x))
    return e / np.sum(e)


def truth(
    x, labels, *, ignore_index=-100, label_smoothing=0.0, weight=None, sample_weight=None,
    classes=None, logit_softcap=None,
) -> tuple[float, np.ndarray]:  # fmt: skip
    """The mean loss and its gradient by PyTorch's definitions, in longdouble.

    Every term is ``log1p`` of the other classes' sum, so nothing cancels, and at infinite logits it
    is the limit.
    """
    x = np.array(x, np.longdouble)
    n, c = x.shape
    slope = np.ones_like(x)
    if logit_softcap is not None:
        x = logit_softcap * np.tanh(x / logit_softcap)
        slope = 1 - (x / logit_softcap) ** 2
    if classes is not None:
        x[:, classes:], slope[:, classes:] = -np.inf, 0
    weight = np.ones(c) if weight is None else np.asarray(weight)
    each = np.ones(n) if sample_weight is None else np.asarray(sample_weight)
    each = np.where(labels == ignore_index, 0, each)
    loss, gradient, total = np.longdouble(0), np.zeros_like(x), np.longdouble(0)
    with np.errstate(all="ignore"):
        for row in np.flatnonzero(each):
            q = label_smoothing / c * weight
            q[labels[row]] += (1 - label_smoothing) * weight[labels[row]]
            p = _softmax(x[row])
            for k in np.flatnonzero(q):
                others = np.delete(x[row], k)
                loss += each[row] * q[k] * np.log1p(np.sum(np.exp(others - x[row, k])))
                by_logit = p.copy()
                by_logit[k] = -np.sum(np.delete(p, k))
                gradient[row] += each[row] * q[k] * by_logit
            total += each[row] * weight[labels[row]]
        scaled = np.where(each[:, None] == 0, 0, gradient * slope / total)
        return float(loss / total), scaled.astype(np.float64)


def _rows(seed: int, scale: float = 2.0, shape: tuple[int, int] = (2, C)) -> np.ndarray:
    # Rounded to bfloat16: every dtype here holds the same logits.
    rows = scale * np.random.default_rng(seed).standard_normal(shape)
    return np.asarray(jnp.asarray(rows, jnp.bfloat16), np.float64)


def _confident(margin: float, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """One row, whose class 0 leads the largest of the others by ``margin``."""
    x = _rows(seed, shape=(1, C))
    x[0, 0] = np.max(x[0, 1:]) + margin
    return np.asarray(jnp.asarray(x, dtype), np.float64)


def _with(x: np.ndarray, at: Any, value: Any) -> np.ndarray:
    x = x.copy()
    x[at] = value
    return x


LOSS, DTYPE = "loss", "dtype"
Pick = str | tuple[int, int | None]  # an entry of the gradient; None: the row's largest


@dataclass(frozen=True)
class Question:
    text: str
    x: np.ndarray
    labels: tuple[int, ...]
    picks: Mapping[str, Pick]  # what is shown of the answer
    options: Mapping[str, Any] = field(default_factory=dict)
    wants: str | None = None  # INVALID or NO_TRUTH instead of the truth
    dtype: str = "float32"


_WEIGHT = tuple(1.0 + i % 3 for i in range(C))
_ROW = {"loss": LOSS, "gradient at the label": (0, 0)}
_FIRST = {"mean loss": LOSS, "largest gradient of its row": (0, None)}


@cache
def questions() -> list[Question]:
    one = _rows(1, shape=(1, C))
    two = _rows(2)
    offset = np.round(_confident(12.0) * 8) / 8 + 1e4  # eighths: float32 holds them at 1e4
    broken = _with(two, (0, slice(2, 4)), (np.nan, np.inf))
    small = _rows(3, 0.01, (1, C))
    padded = _with(small, (0, slice(REAL, None)), 0.0)
    odd = _rows(4, 0.01, (1, 5000))  # a multiple of no block
    half = _confident(5.0, "bfloat16")
    low = -np.inf
    return [
        Question("label -100, one of two", two, (-100, 1),
                 {**_FIRST, f"gradient at class {C} - 100": (0, C - 100)}),
        Question("label 7, ignore_index=7", two, (7, 1), _FIRST, {"ignore_index": 7}),
        Question("label -100, ignore_index=7", two, (-100, 1), _FIRST, {"ignore_index": 7},
                 INVALID),
        Question("label C", one, (C,), {"loss": LOSS}, wants=INVALID),
        Question("label -1", one, (-1,), {"loss": LOSS}, wants=INVALID),
        Question("all labels -100", two, (-100, -100), {"mean loss": LOSS}),
        Question("all labels -100", two, (-100, -100), {"largest gradient": (0, None)},
                 wants=NO_TRUTH),
        Question("-inf at another class", _with(one, (0, 5), low), (0,),
                 {"loss": LOSS, "gradient there": (0, 5), "gradient at the label": (0, 0)}),
        Question("-inf at the label", _with(one, (0, 0), low), (0,), _ROW),
        Question("-inf everywhere", np.full((1, C), low), (0,), {"loss": LOSS}),
        Question("+inf at another class", _with(one, (0, 5), np.inf), (0,), _ROW),
        # inf / inf by the definition, 0 as a limit.
        Question("+inf at the label", _with(one, (0, 0), np.inf), (0,), {"loss": LOSS},
                 wants=NO_TRUTH),
        Question("NaN in the other row", _with(two, (0, 3), np.nan), (0, 1),
                 {"gradient at this label": (1, 1)}),
        Question("NaN, inf in an ignored row", broken, (-100, 1), _FIRST),
        Question("NaN, inf at sample weight 0", broken, (0, 1), _FIRST,
                 {"sample_weight": (0.0, 1.0)}),
        Question("margin 12, all logits + 1e4", offset, (0,), _ROW),
        Question("margin 20", _confident(20.0), (0,), _ROW),
        Question("margin 40", _confident(40.0), (0,), _ROW),
        Question("label_smoothing=0.1", two, (0, 1), _ROW, {"label_smoothing": 0.1}),
        Question("weights of the classes", two, (0, 1), {"mean loss": LOSS}, {"weight": _WEIGHT}),
        Question(f"{C - REAL} padded classes", padded, (0,),
                 {"loss": LOSS, "gradient there": (0, C - 1)}, {"classes": REAL}),
        Question("padded classes, soft-capped", padded, (0,), {"loss": LOSS},
                 {"classes": REAL, "logit_softcap": 2.0}),
        Question(f"{odd.shape[1]} small logits", odd, (0,), _ROW),
        Question("bfloat16, margin 5", half, (0,), {"dtype of the loss": DTYPE}, wants=NO_TRUTH,
                 dtype="bfloat16"),
        Question("bfloat16, margin 5", half, (0,), _ROW, dtype="bfloat16"),
    ]  # fmt: skip


def _pick(what: Pick, loss: float, gradient: np.ndarray, dtype: str) -> float | str:
    if what == LOSS:
        return loss
    if what == DTYPE:
        return dtype
    row, column = what
    entries = gradient[row]
    # argmax of what holds NaN is a NaN's index.
    return float(entries[np.argmax(np.abs(entries)) if column is None else column])


def _is_wrong(got: float | str, want: float | str, dtype: str) -> bool:
    if want == NO_TRUTH or isinstance(got, str):
        return False
    if want == INVALID:
        return not np.isnan(got)
    assert not isinstance(want, str)
    if not np.isfinite(want):
        return not (got == want or (np.isnan(got) and np.isnan(want)))
    relative = max(TOLERANCE, float(jnp.finfo(dtype).eps))
    return not abs(got - want) <= relative * abs(want)


def _text(got: float | str) -> str:
    return got if isinstance(got, str) else f"{got + 0.0:.4g}"  # no -0


def _cells(question: Question, peer: Peer, of_linear: bool, wanted: dict) -> list[dict[str, Any]]:
    """One a pick: what came, and whether it is wrong."""
    if set(question.options) - peer.options():
        return [{"text": "-", "wrong": False} for _ in wanted]
    labels = np.array(question.labels)
    try:
        result = answer(peer, question.x, labels, dict(question.options), question.dtype, of_linear)
    except Exception as error:
        return [{"text": type(error).__name__, "wrong": False} for _ in wanted]
    cells = []
    for name, want in wanted.items():
        what = question.picks[name]
        got, dtype = _pick(what, *result), result[2] if what == LOSS else question.dtype
        cells.append({"text": _text(got), "wrong": _is_wrong(got, want, dtype)})
    return cells


def _truths(question: Question) -> dict[str, float | str]:
    if question.wants:
        return dict.fromkeys(question.picks, question.wants)
    exact = truth(question.x, np.array(question.labels), **question.options)
    return {name: _pick(what, *exact, question.dtype) for name, what in question.picks.items()}


def run(peers: dict[str, Peer], tick: Callable[..., None] = lambda share: None) -> list[dict]:
    """A row a question and pick; its cells are by kind ("logits", "linear") and peer."""
    rows = []
    for question, each in report.shares(tick, questions()):
        wanted = _truths(question)
        new: list[dict[str, Any]] = [
            {"question": question.text, "of": name, "truth": _text(want)}
            for name, want in wanted.items()
        ]
        for name, peer in peers.items():
            for kind in ("logits", "linear"):
                if getattr(peer, kind) is not None:
                    cells = _cells(question, peer, kind == "linear", wanted)
                    for row, cell in zip(new, cells, strict=True):
                        row.setdefault(kind, {})[name] = cell
        rows += new
        each(1)
    return rows


def errors(peers: dict[str, Peer], tick: Callable[..., None]) -> list[dict[str, Any]]:
    """The largest relative error of a few rows, by margin: of the loss and at the label."""
    out = []
    for margin, each in report.shares(tick, MARGINS):
        row: dict[str, Any] = {"margin": margin, "loss": {}, "gradient": {}}
        for seed in range(ROWS):
            x, label = _confident(margin, seed=seed), np.array([0])
            loss, gradient = truth(x, label)
            for name, peer in peers.items():
                got = answer(peer, x, label, {}, "float32")
                off = {"loss": got[0] / loss - 1, "gradient": got[1][0, 0] / gradient[0, 0] - 1}
                for kind, error in off.items():
                    row[kind][name] = max(row[kind].get(name, 0.0), abs(float(error)))
        out.append(row)
        each(1)
    return out
