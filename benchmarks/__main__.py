"""``python -m benchmarks``: every part as tables, pictures and JSON."""

import argparse
from pathlib import Path

from rich.console import Console

from benchmarks.harness import report
from benchmarks.harness.environment import describe, environment
from benchmarks.harness.measure import keep_pages
from benchmarks.parts import digits, linear, precision, speed

PARTS = ("digits", "precision", "speed", "linear")


def _shape(text: str) -> tuple[int, int]:
    try:
        rows, classes = (int(n) for n in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"N,C is expected, as in 4096,32000; got {text}") from None
    if rows < 1 or classes < 1:
        raise argparse.ArgumentTypeError(f"N and C must be positive; got {text}")
    return rows, classes


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Trains a digits classifier with jaxloss and with optax, measures the errors of"
        " both against exact values, and times both, also on hidden @ kernel.",
    )
    parser.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="N,C",
        help="time N rows of C classes instead of the usual shapes; may be repeated",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        action="append",
        help="time this dtype instead of float32 and bfloat16; may be repeated",
    )
    parser.add_argument(
        "--only",
        choices=PARTS,
        action="append",
        help="run this part alone; may be repeated (--shape and --dtype mean --only speed)",
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="time for each shape and dtype (default: 5)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder of the results (default: {report.RESULTS}; own/ there with --shape, --dtype)",
    )
    args = parser.parse_args()
    own = bool(args.shape or args.dtype)
    only = args.only or (["speed"] if own else PARTS)
    args.only = [part for part in PARTS if part in only]
    args.out = args.out or (report.RESULTS / "own" if own else report.RESULTS)
    args.shape = args.shape or speed.SHAPES
    args.dtype = args.dtype or speed.DTYPES
    return args


def main() -> None:
    args = _arguments()
    keep_pages()
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    env = environment()
    console.print(describe(env), soft_wrap=True, highlight=False)

    jobs = {
        "digits": (digits, digits.run),
        "precision": (precision, precision.run),
        "linear": (linear, lambda tick: linear.run(2 * args.seconds, tick)),
        "speed": (speed, lambda tick: speed.run(args.shape, args.dtype, args.seconds, tick)),
    }
    results = {}
    for name, tick in report.in_turn(console, args.only):
        module, run = jobs[name]
        results[name] = {"environment": env, **run(tick)}
        report.save(args.out, name, results[name])
        module.plot(results[name], args.out / f"{name}.png")

    for name, data in results.items():
        for table in jobs[name][0].tables(data):
            console.print("", report.to_rich(table), sep="\n")
    console.print(
        "\nTables as JSON and pictures as PNG:", args.out, soft_wrap=True, highlight=False
    )


if __name__ == "__main__":
    main()
