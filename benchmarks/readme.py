"""``python -m benchmarks.readme``: copies the tables of the committed results into README.md.

No number there is typed by hand. With ``--check`` nothing is written, and a README that differs
from the results is an error.
"""

import argparse
import re
import sys
from pathlib import Path

from benchmarks import (
    compiled,
    gpu,
    linear,
    overhead,
    peers,
    precision,
    report,
    scaling,
    speed,
    train_lm,
)
from benchmarks.environment import describe

RESULTS, README = Path("benchmarks/results"), Path("README.md")
MODULES = {
    "train_lm": train_lm,
    "train_lm_ignore": train_lm,
    "linear": linear,
    "precision": precision,
    "scaling": scaling,
    "speed": speed,
    "overhead": overhead,
    "compiled": compiled,
    "gpu": gpu,
    "peers": peers,
}


def filled(text: str, folder: Path) -> str:
    """``text`` with what stands between the two marks of each table replaced."""
    for name, module in MODULES.items():
        data = report.load(folder, name)
        source = f"From `{folder.as_posix()}/{name}.json`: {describe(data['environment'])}."
        parts = [f"{t.title}:\n\n{report.to_markdown(t)}" for t in module.tables(data)]
        block = "\n\n".join([*parts, source])
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text, found = pattern.subn(lambda _, b=block: f"{begin}\n\n{b}\n\n{end}", text)  # noqa: B023
        if found != 1:
            raise ValueError(f"{README} must have one pair of marks {begin} {end}; got {found}.")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, report a difference")
    check = parser.parse_args().check
    text = README.read_text()
    new = filled(text, RESULTS)
    if check and new != text:
        sys.exit(f"{README} differs from {RESULTS}: run `python -m benchmarks.readme`.")
    if not check:
        README.write_text(new)


if __name__ == "__main__":
    main()
