"""What an optimised program says of its own cost, a loop's body counted as often as it runs."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod, sqrt
from pathlib import Path
from typing import Any, NamedTuple


class Instruction(NamedTuple):
    name: str
    dims: tuple[int, ...]  # of its first result
    opcode: str
    operands: list[str]
    attributes: str
    result: str  # its type, or a tuple's


@dataclass
class Cost:
    """Of one run of a program, or of one step of a loop."""

    flops: float = 0.0  # of matrix products alone
    cycles: float = 0.0  # the compiler's own estimate; XLA:TPU alone writes it into its programs
    kernels: int = 0  # calls of hand-written kernels, which it knows nothing of
    kernel_cycles: float = 0.0  # at most: all instructions of a kernel in each of its steps
    loops: list[dict[str, Any]] = field(default_factory=list)  # each with the cost of a step

    def add(self, other: "Cost", times: int = 1) -> None:
        self.flops += times * other.flops
        self.cycles += times * other.cycles
        self.kernels += times * other.kernels
        self.kernel_cycles += times * other.kernel_cycles
        self.loops += other.loops


def computations(text: str) -> dict[str, list[Instruction]]:
    out: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            body = out["ENTRY" if head[1] else head[2]] = []
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)", line):
            name, kind, opcode, rest = found.groups()
            dims = re.search(r"\[([\d,]*)\]", kind)
            sizes = tuple(int(n) for n in dims[1].split(",") if n) if dims else ()
            operands = re.findall(r"%([\w.\-]+)", rest.split(")", 1)[0])
            body.append(Instruction(name, sizes, opcode, operands, rest, kind))
    return out


def _called(attributes: str, *names: str) -> list[str]:
    found = re.findall(rf"\b(?:{'|'.join(names)})=\{{?((?:%[\w.\-]+(?:, )?)+)", attributes)
    return [name.strip(" %") for group in found for name in group.split(",") if name.strip()]


def _listed(i: Instruction, name: str) -> list[str]:
    found = re.search(rf"\b{name}=\{{([\d,]+)\}}", i.attributes)
    return found[1].split(",") if found else []


def _steps(loop: Instruction, condition: list[Instruction]) -> int | None:
    """As the program says, or by ``i < constant``, with ``i`` from 0 on, as XLA leaves a scan; None
    where it is computed."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):  # XLA:GPU
        return int(known[1])
    constants = {i.name: i.attributes for i in condition if i.opcode == "constant"}
    for instruction in condition:
        bounds = [constants[name] for name in instruction.operands if name in constants]
        if instruction.opcode in ("compare", "fusion") and bounds:
            return int(bounds[0].split(")")[0])
    return None


class Scheduled(NamedTuple):
    """Of operations by name: a core issues a bundle of instructions a cycle."""

    bundles: Mapping[str, int]
    steps: Mapping[str, int]  # of a kernel's loop


NOTHING = Scheduled({}, {})


def cost(text: str, steps: Iterable[int] = (), scheduled: Scheduled = NOTHING) -> Cost:
    """``steps``: of those loops, in the program's order, whose number is computed when it runs."""
    bodies, open_loops = computations(text), iter(steps)
    out = _cost(bodies, "ENTRY", open_loops, _with_all_kernels(bodies, scheduled))
    if left := list(open_loops):
        raise ValueError(f"The program has no more loops of an open number of steps; left: {left}.")
    return out


def _with_all_kernels(bodies: Mapping[str, list[Instruction]], scheduled: Scheduled) -> Scheduled:
    """Of calls of one kernel on the same shapes the compiler schedules one."""
    bundles, steps, kernels = {}, {}, {}
    for i in (i for body in bodies.values() for i in body if i.opcode == "custom-call"):
        kernels.setdefault((re.sub(r"\.\d+$", "", i.name), i.dims), []).append(i.name)
    for names in kernels.values():
        known = next((name for name in names if name in scheduled.bundles), None)
        if known is not None:
            bundles |= dict.fromkeys(names, scheduled.bundles[known])
            steps |= dict.fromkeys(names, scheduled.steps.get(known, 1))
    return Scheduled(bundles | {**scheduled.bundles}, steps | {**scheduled.steps})


def _cycles(i: Instruction, scheduled: Scheduled) -> int:
    """The compiler's estimate, which knows the memory, or if that is more what it scheduled."""
    estimate = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
    tiles = re.search(r'"iteration_bounds":\[([^\]]*)\]', i.attributes)
    if not estimate or not tiles:
        return int(estimate[1]) if estimate else 0
    times = prod(int(n) for n in re.findall(r"\d+", tiles[1]))
    return max(int(estimate[1]), times * scheduled.bundles.get(i.name, 0))


def _cost(
    bodies: dict[str, list[Instruction]],
    name: str,
    open_loops: Iterator[int],
    scheduled: Scheduled,
) -> Cost:
    out, dims = Cost(), {i.name: i.dims for i in bodies[name]}
    for i in bodies[name]:
        out.cycles += _cycles(i, scheduled)
        if i.opcode in ("convolution", "dot"):
            # b times m x k by k x n: the product of the three arrays' sizes is b (b m k n)^2.
            batch = prod(dims[i.operands[0]][int(n)] for n in _listed(i, "lhs_batch_dims"))
            out.flops += 2 * sqrt(prod(prod(dims[x]) for x in (i.name, *i.operands[:2])) / batch)
        elif i.opcode == "custom-call" and '"tpu_custom_call"' in i.attributes:
            out.kernels += 1
            issued = scheduled.bundles.get(i.name, 0) * scheduled.steps.get(i.name, 1)
            out.kernel_cycles += issued
        elif i.opcode == "while":
            (condition,), (body,) = (_called(i.attributes, x) for x in ("condition", "body"))
            steps = _steps(i, bodies[condition])
            steps = next(open_loops) if steps is None else steps
            step = _cost(bodies, body, open_loops, scheduled)
            out.add(step, steps)
            out.loops.append({"steps": steps, "flops": step.flops, "cycles": step.cycles})
        elif i.opcode == "conditional":
            names = "branch_computations", "true_computation", "false_computation"
            called = _called(i.attributes, *names)
            branches = [_cost(bodies, b, open_loops, scheduled) for b in called]
            out.add(max(branches, key=lambda c: (c.cycles, c.flops)))
        else:
            for called in _called(i.attributes, "calls"):
                # A fusion's cycles are its own, and no instruction within it has any.
                out.add(_cost(bodies, called, open_loops, scheduled))
    return out


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
# Of the bytes of the result, what each of n devices sends by a ring.
_SENDS = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


def sent(text: str, steps: Iterable[int] = ()) -> dict[str, dict[str, float]]:
    """Bytes that a device sends, by kind of collective: outside of loops (``once``), and in all
    steps of loops (``in loops``). ``steps`` as in :func:`cost`."""
    bodies, open_loops = computations(text), iter(steps)
    out: dict[str, dict[str, float]] = {"once": {}, "in loops": {}}
    for kind, size, looped in _sent(bodies, "ENTRY", open_loops):
        part = out["in loops" if looped else "once"]
        part[kind] = part.get(kind, 0) + size
    if left := list(open_loops):
        raise ValueError(f"The program has no more loops of an open number of steps; left: {left}.")
    return out


def _sent(
    bodies: dict[str, list[Instruction]], name: str, open_loops: Iterator[int]
) -> list[tuple[str, float, bool]]:
    """(kind, bytes, whether in a loop)"""
    out = []
    for i in bodies[name]:
        kind = i.opcode.removesuffix("-start")
        if kind in _SENDS:
            out.append((kind, _SENDS[kind](_group(i)) * _result_bytes(i), False))
        elif i.opcode == "while":
            (condition,), (body,) = (_called(i.attributes, x) for x in ("condition", "body"))
            steps = _steps(i, bodies[condition])
            steps = next(open_loops) if steps is None else steps
            each = _sent(bodies, body, open_loops)
            out += [(kind, steps * size, True) for kind, size, _ in each]
        elif i.opcode == "conditional":
            names = "branch_computations", "true_computation", "false_computation"
            branches = [_sent(bodies, b, open_loops) for b in _called(i.attributes, *names)]
            out += max(branches, key=lambda found: sum(size for _, size, _ in found))
        else:
            for called in _called(i.attributes, "calls"):
                out += _sent(bodies, called, open_loops)
    return out


def _result_bytes(i: Instruction) -> int:
    arrays = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", i.result)
    sizes = [_BYTES[dtype] * prod(int(n) for n in dims.split(",") if n) for dtype, dims in arrays]
    # The result of a start is a pair of operand and result, with what it needs beside them.
    return max(sizes) if i.opcode.endswith("-start") and len(sizes) > 1 else sum(sizes)


def _group(i: Instruction) -> int:
    """Devices that take part together."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", i.attributes)
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", i.attributes)
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?: \{([^}]*)\})?", i.attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        names = re.findall(r"'(\w+)'", found[2]) if found[2] else sizes
        return prod(int(sizes[name]) for name in names)
    return listed[1].count(",") + 1 if listed else int(counted[1]) if counted else 2


# The instructions that the TPU compiler scheduled: its estimates leave them out. It takes an
# accurate exponential for one instruction and knows nothing of hand-written kernels. Its dumps have
# each operation as the bundles that a core issues, one a cycle, and do not know memory.

_LENGTH = "final_hlo-static-per-bundle-utilization"


def dump_to(folder: Path) -> None:
    """Read when libtpu starts."""
    options = {"to": folder, "llo_text": "true", "llo_pass_label_regex": "final_.*"}
    flags = (f"--xla_jf_dump_{name}={value}" for name, value in options.items())
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(flags)


def take(folder: Path) -> Scheduled:
    """Of the program that was dumped last, whose files go.

    The pipeline of the loop around a kernel starts and ends with a step more.
    """
    bundles, steps = {}, {}
    for path in folder.glob(f"*{_LENGTH}.txt"):
        name = re.sub(r"^\d+-(.*)-\d+-final_.*", r"\1", path.name)
        text = path.read_text()
        bundles[name] = text[text.index("UTILIZATION") :].count("\n") - 1
        program = next(folder.glob(f"*-{name}-*-final_bundles.txt"), None)
        tests = re.findall(r", (\d+) /\* loop exit test", program.read_text()) if program else []
        if tests:
            steps[name] = int(tests[-1]) - 2
    for path in folder.iterdir():
        path.unlink()
    return Scheduled(bundles, steps)
