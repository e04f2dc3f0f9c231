"""Measures jaxloss, and writes tables as JSON and pictures as PNG.

Without a part, this trains a digits classifier with jaxloss and with optax, measures the errors of
both against exact values, and times both, also on hidden @ kernel.
"""

import argparse
import sys
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
    }
    return {part: _arguments(part, given) for part, given in main.items()}


def main() -> None:
    jobs = _jobs(sys.argv[1:])
    modules = {part: load(part) for part in jobs}
    for part, module in modules.items():
        if hasattr(module, "prepare"):
            module.prepare(jobs[part])
    console, results = Console(), {}
    console.print(describe(environment()), soft_wrap=True, highlight=False)
    for part, tick in report.in_turn(console, jobs):
        module, args = modules[part], jobs[part]
        env = environment(*getattr(module, "PACKAGES", ()))
        results[part] = {"environment": env, **module.run(args, tick)}
        report.save(args.out, args.name, results[part])
        if hasattr(module, "plot"):
            module.plot(results[part], args.out / f"{args.name}.png")

    wide = Console(width=max(console.width, WIDTH))
    for part, data in results.items():
        for table in modules[part].tables(data):
            wide.print("", report.to_rich(table), sep="\n")
    out = {str(args.out): None for args in jobs.values()}
    console.print("\nTables as JSON, pictures as PNG:", *out, soft_wrap=True, highlight=False)
    for part, data in results.items():
        if hasattr(modules[part], "missed") and (why := modules[part].missed(data)):
            sys.exit(why)


if __name__ == "__main__":
    main()
