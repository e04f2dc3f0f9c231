"""``python -m benchmarks.tables``: copies the tables of the committed results into the READMEs.

They stand between ``<!-- gpu: begin -->`` and ``<!-- gpu: end -->``; with ``gpu 3`` the third does.
No number there is typed by hand. With ``--check`` nothing is written, and a README that differs
from the results is an error.
"""

import argparse
import re
import sys
from pathlib import Path

from benchmarks.harness import report
from benchmarks.harness.environment import describe
from benchmarks.parts import PARTS, load

GUIDES = Path("benchmarks/guides")
READMES = (
    Path("README.md"),
    Path("benchmarks/README.md"),
    GUIDES / "meshes.md",
    GUIDES / "contrastive.md",
)
MARKS = re.compile(r"<!-- (\w+)((?: \d+)?): begin -->.*?<!-- \1\2: end -->", re.DOTALL)
PART_OF = {name: part for part, results in PARTS.items() for name in results}


def filled(text: str, folder: Path) -> str:
    """``text`` with what stands between the two marks of each table replaced."""

    def block(found: re.Match) -> str:
        name, number = found.groups()
        data = report.load(folder, name)
        tables = load(PART_OF[name]).tables(data)
        if number:
            tables = [tables[int(number) - 1]]
        parts = [f"{t.title}:\n\n{report.to_markdown(t)}" for t in tables]
        source = f"From `{folder.as_posix()}/{name}.json`: {describe(data['environment'])}."
        begin, end = (f"<!-- {name}{number}: {edge} -->" for edge in ("begin", "end"))
        return "\n\n".join([begin, *parts, source, end])

    return MARKS.sub(block, text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, report a difference")
    check = parser.parse_args().check
    for path in READMES:
        text = path.read_text()
        new = filled(text, report.RESULTS)
        if check and new != text:
            sys.exit(f"{path} differs from {report.RESULTS}: run `python -m benchmarks.tables`.")
        if not check:
            path.write_text(new)


if __name__ == "__main__":
    main()
