"""Value and both gradients of the loss of ``hidden @ kernel``: time, memory, products of each."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from benchmarks.harness import measure, report
from benchmarks.methods.libraries import Peer
from benchmarks.parts import linear

SWEEP = tuple((512, 256, v) for v in (2048, 8192, 32768, 131072))
SHAPES = tuple(sorted((*SWEEP, *linear.SHAPES), key=math.prod))
DTYPES = ("float32", "bfloat16")
FLOOR = "products"
LIMIT = 4.0  # seconds a call; what takes longer is left out


# How many products of N x D x V a call is written with (XLA may make one of two that are equal).
# XLA says nothing of loops, so JAX's programs are evaluated here one operation at a time, loops as
# often as their conditions say.


def _inner(params: dict[str, Any]) -> Any:
    """The program that a call (of jit, custom_vjp, remat) consists of, if it is one."""
    for name in ("jaxpr", "call_jaxpr", "fwd_jaxpr", "call"):
        if name in params:
            return params[name]
    return None


def _dot_flops(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    across = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    return 2 * across * math.prod(eqn.outvars[0].aval.shape)


def _evaluate(program: Any, args: Sequence[Any]) -> tuple[list[Any], int]:
    """(results, flops of its matrix products)"""
    # Open or closed, which are one class in newer JAX.
    jaxpr, consts, flops = getattr(program, "jaxpr", program), getattr(program, "consts", ()), 0
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        params, name = eqn.params, eqn.primitive.name
        if name == "while":
            n = params["cond_nconsts"]
            cond, body = values[:n], values[n : n + params["body_nconsts"]]
            out = values[n + len(body) :]
            while bool(_evaluate(params["cond_jaxpr"], [*cond, *out])[0][0]):
                out, more = _evaluate(params["body_jaxpr"], [*body, *out])
                flops += more
        elif name == "scan":
            body = params["jaxpr"]
            inner = getattr(body, "jaxpr", body)
            # What is stacked has an axis more outside. (How JAX says which changed in 0.11.)
            ranks = zip(eqn.outvars, inner.outvars, strict=True)
            carried = sum(o.aval.ndim == i.aval.ndim for o, i in ranks)
            ranks = zip(eqn.invars, inner.invars, strict=True)
            k = sum(o.aval.ndim == i.aval.ndim for o, i in ranks)
            n, carry, stacked = k - carried, values[k - carried : k], []
            steps = range(params["length"])
            for i in reversed(steps) if params["reverse"] else steps:
                step = [*values[:n], *carry, *(x[i] for x in values[k:])]
                results, more = _evaluate(body, step)
                carry, flops = results[:carried], flops + more
                stacked.append(results[carried:])
            stacked = stacked[::-1] if params["reverse"] else stacked
            out = [*carry, *(jnp.stack(x) for x in zip(*stacked, strict=True))]
        elif name == "cond":
            out, more = _evaluate(params["branches"][int(values[0])], values[1:])
            flops += more
        elif (inner := _inner(params)) is not None:
            out, more = _evaluate(inner, values)
            flops += more
        else:
            flops += _dot_flops(eqn) if name == "dot_general" else 0
            out = eqn.primitive.bind(*values, **params)
            out = out if eqn.primitive.multiple_results else [out]
        env.update(zip(eqn.outvars, out, strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars], flops


def jax_products(function: Callable, args: Sequence[Any], shape: tuple[int, int, int]) -> float:
    program = jax.make_jaxpr(function)(*args)
    return _evaluate(program, jax.tree.leaves(args))[1] / (2 * math.prod(shape))


# Each method as a call without arguments, its results, and what it costs beside time.


class _Jax:
    def __init__(self, function: Callable, args: Sequence[Any], flip: bool):
        self._function, self._args, self._flip = function, args, flip
        self._program = measure.Program(function, *args)

    def __call__(self, *_: Any) -> Any:
        return self._program(*self._args)

    def results(self) -> tuple:
        loss, (d_hidden, d_kernel) = self()
        return loss, d_hidden, d_kernel.T if self._flip else d_kernel

    def temp_mib(self) -> float:
        return self._program.temp_mib

    def products(self, shape: tuple[int, int, int]) -> float | None:
        return jax_products(self._function, self._args, shape)


# Of torch's operations: the shapes of what is multiplied, beside what it is added to. Its own
# counter knows nothing of addmm_.
_OPERANDS: dict[str, Callable] = {
    "aten::mm": lambda a, b, *_: (a, b),
    "aten::addmm": lambda c, a, b, *_: (a, b),
    "aten::addmm_": lambda c, a, b, *_: (a, b),
}


class _Torch:
    def __init__(self, loss: Callable, hidden, kernel, labels):
        torch = import_module("torch")

        def tensor(x):
            # By way of float32, for torch knows no bfloat16 of numpy's.
            x = torch.tensor(np.asarray(x, np.float32)).to(getattr(torch, str(x.dtype)))
            return x.requires_grad_()

        self._operands = tensor(hidden), tensor(kernel)
        self._labels = torch.tensor(np.asarray(labels), dtype=torch.long)
        self._loss, self._torch = loss, torch

    def __call__(self, *_: Any) -> Any:
        loss = self._loss(*self._operands, self._labels)
        return loss.detach(), self._torch.autograd.grad(loss, self._operands)

    def results(self) -> tuple:
        loss, (d_hidden, d_kernel) = self()
        return tuple(x.to(self._torch.float32).numpy() for x in (loss, d_hidden, d_kernel.T))

    def _events(self) -> list[Any]:
        profiler = self._torch.profiler
        with profiler.profile(
            activities=[profiler.ProfilerActivity.CPU], profile_memory=True, record_shapes=True
        ) as profile:
            self._results = self()  # held, or its end would be among the events
        return profile.profiler.kineto_results.events()

    def temp_mib(self) -> float:
        """The most that was held at once beside the results, by the profiler's record."""
        memory = [(e.start_ns(), i, e.nbytes()) for i, e in enumerate(self._events())
                  if e.name() == "[memory]"]  # fmt: skip
        held = np.cumsum([size for _, _, size in sorted(memory)])
        own = sum(x.nbytes for x in (self._results[0], *self._results[1]))
        return (float(held.max()) - own) / measure.MIB

    def products(self, shape: tuple[int, int, int]) -> float | None:
        """None where they are within operations that the profiler does not look into."""
        events = self._events()
        operands = [_OPERANDS[e.name()](*e.shapes()) for e in events if e.name() in _OPERANDS]
        flops = sum(2 * m * k * n for (m, k), (_, n) in operands)
        return flops / (2 * math.prod(shape)) or None


def _method(peer: Peer, hidden, kernel, labels) -> _Jax | _Torch:
    if peer.torch:
        loss = peer.linear or (lambda h, k, y: peer.logits(h @ k.T, y))  # pyright: ignore
        return _Torch(loss, hidden, kernel.T, labels)
    loss = peer.linear or (lambda h, k, y: peer.logits(h @ k, y))  # pyright: ignore
    args = (hidden, kernel.T if peer.vocab_first else kernel, labels)
    return _Jax(jax.value_and_grad(loss, argnums=(0, 1)), args, peer.vocab_first)


def _truth(hidden, kernel, labels) -> tuple:
    """The mean and both gradients in float64, a few rows at a time."""
    h, k, y = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64), np.asarray(labels)
    loss, d_hidden, d_kernel = 0.0, np.empty_like(h), np.zeros_like(k)
    for i in range(0, len(h), 64):
        rows = slice(i, i + 64)
        x = h[rows] @ k
        at = np.arange(len(x)), y[rows]
        loss += np.sum(np.max(x, axis=1) - x[at])
        x = np.exp(x - np.max(x, axis=1, keepdims=True))
        total = np.sum(x, axis=1, keepdims=True)
        loss += np.sum(np.log(total))
        x /= total
        x[at] -= 1
        d_hidden[rows] = x @ k.T
        d_kernel += h[rows].T @ x
    return np.array(loss / len(h)), d_hidden / len(h), d_kernel / len(h)


def _measure(
    peers: dict[str, Peer], shape: tuple[int, int, int], dtype: str, seconds: float,
    slow: dict[str, str], count: bool, tick: Callable[[float], None],
) -> dict[str, Any]:  # fmt: skip
    n, d, v = shape
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (n, d)).astype(dtype)
    kernel = (jax.random.normal(keys[1], (d, v)) * d**-0.5).astype(dtype)
    labels = jax.random.randint(keys[2], (n,), 0, v)
    truth, left_out = _truth(hidden, kernel, labels), dict(slow)
    eps = float(jnp.finfo(dtype).eps) * (d if dtype == "float32" else 1)
    functions: dict[str, Any] = {
        FLOOR: _Jax(measure.bare_products, (hidden, kernel, labels), False)
    }
    memory, products = {}, {}
    for name in [name for name in peers if name not in slow]:
        try:
            method = _method(peers[name], hidden, kernel, labels)
            begin = time.perf_counter()
            results = jax.block_until_ready(method.results())
            took = time.perf_counter() - begin
            measure.check_agree({"float64": truth, name: results}, eps, f"{dtype} {shape}")
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if took > LIMIT:
            slow[name] = left_out[name] = f"{took:.0f} s a call at {n} x {d} x {v}, {dtype}"
            continue
        memory[name] = method.temp_mib()
        if count:
            products[name] = method.products(shape)
        functions[name] = method
    times = measure.interleaved(functions, (), seconds, tick)
    return {
        "dtype": dtype,
        "shape": list(shape),
        "rounds": len(times[FLOOR]),
        "median_ms": {name: statistics.median(t) * 1e3 for name, t in times.items()},
        "of_products": {name: measure.median_ratio(times, name, FLOOR) for name in memory},
        "temp_mib": memory,
        "products": products,
        "left_out": left_out,
    }


def run(
    peers: dict[str, Peer], seconds: float, tick: Callable[[float], None],
    shapes: Sequence[tuple[int, int, int]] = SHAPES, dtypes: Sequence[str] = DTYPES,
) -> dict[str, Any]:  # fmt: skip
    cases = [(dtype, shape) for dtype in dtypes for shape in shapes]
    # By dtype: a method that was too slow is not tried on the shapes after it, which are larger.
    slow: dict[str, dict[str, str]] = {dtype: {} for dtype in dtypes}
    rows = []
    for i, (dtype, shape) in enumerate(cases):
        each = lambda share, i=i: tick((i + share) / len(cases))  # noqa: E731
        # The programs of both dtypes are the same: their products are counted once.
        count = dtype == dtypes[0]
        rows.append(_measure(peers, shape, dtype, seconds, slow[dtype], count, each))
    return {"seconds_a_case": seconds, "limit": LIMIT, "rows": rows}


def tables(data: dict[str, Any]) -> list[report.Table]:
    """Methods down, shapes across: there are more methods, with longer names."""
    kinds = {
        "of_products": ("time / three bare products", ".2f"),
        "temp_mib": ("temporary MiB", ".0f"),
        "products": ("matrix products of tokens x features x classes, as written", ".2g"),
    }
    out: list[report.Table] = []
    dtypes = list(dict.fromkeys(row["dtype"] for row in data["rows"]))
    for dtype in dtypes:
        rows = [row for row in data["rows"] if row["dtype"] == dtype]
        names = list(dict.fromkeys(n for row in rows for n in [*row["temp_mib"], *row["left_out"]]))
        header = ["", *("{} x\n{} x\n{}".format(*row["shape"]) for row in rows)]
        for kind, (title, form) in kinds.items():
            if kind == "products" and dtype != dtypes[0]:
                continue  # not counted
            lines = [
                [n, *("-" if (x := row[kind].get(n)) is None else format(x, form) for row in rows)]
                for n in names
            ]
            if kind == "of_products":
                lines.append(["products, ms", *(f"{row['median_ms'][FLOOR]:.0f}" for row in rows)])
            totals = int(kind == "of_products")
            out.append(report.Table(f"{dtype}: {title}", header, lines, totals))
    reasons = {
        (dtype, name, why): None
        for dtype in dtypes
        for row in data["rows"]
        for name, why in row["left_out"].items()
        if row["dtype"] == dtype
    }
    if reasons:
        title = f"Left out of the times (slower than {data['limit']:g} s a call, or wrong)"
        out.append(report.Table(title, ["dtype", "method", "why"], [list(r) for r in reasons]))
    return out


def plot(data: dict[str, Any], path: Path, look: dict[str, dict]) -> None:
    times, memory = report.axes(2)
    sweep = [list(shape) for shape in SWEEP]
    rows = [r for r in data["rows"] if r["dtype"] == "float32" and r["shape"] in sweep]
    for ax, kind in ((times, "median_ms"), (memory, "temp_mib")):
        for name, style in look.items():
            found = [(row["shape"][2], row[kind].get(name)) for row in rows]
            found = [(v, y) for v, y in found if y is not None and y > 0]
            if found:
                ax.plot(*zip(*found, strict=True), label=name, **style)
        ax.set(xscale="log", yscale="log", xlabel="classes")
        vocabularies = [row["shape"][2] for row in rows]
        ax.set_xticks(vocabularies, [f"{v:,}" for v in vocabularies])
        ax.minorticks_off()
    n, d, _ = SWEEP[0]
    times.set(ylabel="ms", title=f"Value and both gradients, {n} tokens x {d}, float32")
    memory.set(ylabel="MiB", title="Temporary memory")
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": 5}
    times.get_figure().legend(*times.get_legend_handles_labels(), **below)  # pyright: ignore
    report.save_figure(times, path)
