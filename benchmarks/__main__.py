"""Measures jaxloss, and writes tables as JSON and pictures as PNG.

Without a part, this trains a digits classifier with jaxloss and with optax, measures the errors of
both against exact values, times both, also on hidden @ kernel, and compares their memory.
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks.harness import report
from benchmarks.harness.environment import describe, environment
from benchmarks.parts import PARTS, load

PROGRAM = "python -m benchmarks"
WIDTH = 140  # columns of the widest table


def _arguments(part: str, words: list[str]) -> argparse.Namespace:
    """The options of a part, and where its results go."""
    module = load(part)
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} {part}", description=module.__doc__)
    if hasattr(module, "options"):
        module.options(parser)
    where = f"folder of the results (default: {report.RESULTS}; own/ there with other options)"
    parser.add_argument("--out", type=Path, help=where)
    args = parser.parse_args(words)
    other = {k: v for k, v in vars(args).items() if v != parser.get_default(k)}
    other = {k: v for k, v in other.items() if k not in ("out", "seconds")}
    usual = [name for name, options in PARTS[part].items() if options == other]
    args.name = usual[0] if usual else next(iter(PARTS[part]))
    args.out = args.out or (report.RESULTS if usual else report.RESULTS / "own")
    return args


def _jobs(words: list[str]) -> dict[str, argparse.Namespace]:
    """The parts to run, and the arguments of each."""
    if words and words[0] in PARTS:
        return {words[0]: _arguments(words[0], words[1:])}
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    alone = f"this part alone, with the options that `{PROGRAM} PART --help` lists: "
    parser.add_argument(
        "part", nargs="?", choices=PARTS, metavar="PART", help=alone + ", ".join(PARTS)
    )
    each = "time for each shape and dtype (default: 5), twice that for hidden @ kernel"
    parser.add_argument("--seconds", type=float, default=5.0, help=each)
    parser.add_argument(
        "--out", default=str(report.RESULTS), help="folder of the results (default: %(default)s)"
    )
    args = parser.parse_args(words)
    if args.part:
        parser.error(f"the part comes first: {PROGRAM} {args.part} ...")
    out = ["--out", args.out]
    main = {
        "digits": out,
        "precision": out,
        "speed": ["--seconds", str(args.seconds), *out],
        "linear": ["--seconds", str(2 * args.seconds), *out],
        "memory": out,
    }
    return {part: _arguments(part, given) for part, given in main.items()}


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def _announce(console: Console, jobs: dict[str, argparse.Namespace], modules: dict) -> None:
    """What is about to run, on what, and how long that takes."""
    lines = [describe(environment())]
    for part, module in modules.items():
        lines.append(f"{part:>10}  {module.__doc__.splitlines()[0]}")
    known = [m.about_seconds(jobs[p]) for p, m in modules.items() if hasattr(m, "about_seconds")]
    if len(known) == len(modules):
        lines.append(f"About {_minutes(sum(known))} on an idle machine.")
    half = (os.cpu_count() or 1) / 2
    if hasattr(os, "getloadavg") and (busy := os.getloadavg()[0]) > half:
        lines.append(f"This machine is busy (load {busy:.1f}): the times will be rough.")
    console.print(*lines, sep="\n", soft_wrap=True, highlight=False)


def _conclude(
    console: Console,
    jobs: dict[str, argparse.Namespace],
    found: dict[str, list[str]],
    seconds: float,
) -> None:
    """The findings once more, below all tables, and the files to look at."""
    say = partial(console.print, sep="\n", soft_wrap=True, highlight=False)
    if any(found.values()):
        say("\nFound:", *(f"- {line}" for lines in found.values() for line in lines))
    paths = [args.out / f"{args.name}.{kind}" for args in jobs.values() for kind in ("png", "json")]
    say("\nPictures and numbers:", *(f"- {path}" for path in paths if path.exists()))
    say(f"\nThis took {_minutes(seconds)}.")


def main() -> None:
    begin = time.perf_counter()
    jobs = _jobs(sys.argv[1:])
    modules = {part: load(part) for part in jobs}
    for part, module in modules.items():
        if hasattr(module, "prepare"):
            module.prepare(jobs[part])
    console, results = Console(), {}
    _announce(console, jobs, modules)
    for part, tick in report.in_turn(console, jobs):
        module, args = modules[part], jobs[part]
        env = environment(*getattr(module, "PACKAGES", ()))
        results[part] = {"environment": env, **module.run(args, tick)}
        report.save(args.out, args.name, results[part])
        if hasattr(module, "plot"):
            module.plot(results[part], args.out / f"{args.name}.png")

    wide, found = Console(width=max(console.width, WIDTH)), {}
    for part, data in results.items():
        tables = modules[part].tables(data)
        for table in tables:
            wide.print("", report.to_rich(table), table.found, sep="\n", highlight=False)
        found[part] = [table.found for table in tables if table.found]
    _conclude(console, jobs, found, time.perf_counter() - begin)
    for part, data in results.items():
        if hasattr(modules[part], "missed") and (why := modules[part].missed(data)):
            sys.exit(why)


if __name__ == "__main__":
    main()
