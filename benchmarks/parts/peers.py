"""``python -m benchmarks.peers``: jaxloss beside other libraries' cross-entropies.

What each answers where answers differ, beside the truth; its error as the model grows confident;
what value and both gradients of ``hidden @ kernel`` cost. A library that is not here, or does not
run here, is listed with the reason that it gave.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import report
from benchmarks.harness.environment import describe, environment
from benchmarks.harness.measure import keep_pages
from benchmarks.methods import answers as peer_semantics
from benchmarks.methods import libraries as peer_methods
from benchmarks.parts import peer_cost

COLORS = {
    **report.COLORS,
    "products": report.COLORS["floor"],
    "blocks": "#56b4e9",
    "torch": "#cc79a7",
    "torch chunks": "#882255",
    peer_methods.ALIKE: "#aa4499",
    "tokamax xla": "#e69f00",
    "jax-cce": "#000000",
}
# Some lie on each other: wide lines below, narrow and dashed ones above.
WIDTHS = {"products": 6, "optax": 5, "torch": 4, "jaxloss": 3.5, "two-step": 2.5, "jax-cce": 2.5}
DASHED = ("two-step", "tokamax xla", "blocks", "torch chunks", peer_methods.ALIKE, "jax-cce")
WIDTH = 140  # columns of the widest table


def _look() -> dict[str, dict[str, Any]]:
    out = {}
    for name, color in COLORS.items():
        if name == "products" or name in peer_methods.LOADERS:
            lw = WIDTHS.get(name, 1.6)
            line = "--" if name in DASHED else "-"
            out[name] = {"color": color, "lw": lw, "ls": line, "marker": "o", "ms": 4}
            out[name]["zorder"] = 2 + 1 / lw
    return out


def tables(data: dict[str, Any]) -> list[report.Table]:
    found = [[name, version or "-"] for name, version in data["versions"].items()]
    absent = [[name, why] for name, why in data["absent"].items()]
    return [
        report.Table("Versions", ["package", "version"], found),
        report.Table("Not compared", ["peer", "why"], absent),
        *peer_semantics.tables(data["semantics"]),
        *peer_cost.tables(data["cost"]),
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="time for each shape and dtype (default: 10)"
    )
    parser.add_argument(
        "--classes", type=int, default=2**31, help="time no shape of more classes than this"
    )
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the results")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    keep_pages()
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    env = environment()
    console.print(describe(env), soft_wrap=True, highlight=False)
    peers, absent = peer_methods.load()
    answering = {name: peer for name, peer in peers.items() if name != peer_methods.ALIKE}
    shapes = [shape for shape in peer_cost.SHAPES if shape[2] <= args.classes]
    parts = {
        "semantics": lambda tick: peer_semantics.run(answering, tick),
        "errors": lambda tick: peer_semantics.errors(answering, tick),
        "cost": lambda tick: peer_cost.run(peers, args.seconds, tick, shapes),
    }
    data = {"environment": env, "versions": peer_methods.versions(), "absent": absent}
    for name, tick in report.in_turn(console, parts):
        data[name] = parts[name](tick)
    report.save(args.out, "peers", data)
    peer_cost.plot(data["cost"], args.out / "peers_cost.png", _look())
    peer_semantics.plot(data["errors"], args.out / "peers_error.png", _look())
    wide = Console(width=max(console.width, WIDTH))
    for table in tables(data):
        wide.print("", report.to_rich(table), sep="\n")
    console.print("\nJSON and pictures as PNG:", args.out, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
