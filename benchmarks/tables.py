"""``python -m benchmarks.tables``: copies the tables of the committed results into the READMEs.

They stand between ``<!-- gpu: begin -->`` and ``<!-- gpu: end -->``; with ``gpu 3`` the third does.
``figures`` are those of :mod:`benchmarks.figures`, from several results. A trainer's name stands
for the lines of its step that jaxloss replaces, from :mod:`benchmarks.trainers`.
No number there is typed by hand. With ``--check`` nothing is written, and a README that differs
from the results is an error.
"""

import argparse
import re
import sys
from pathlib import Path

from benchmarks import figures, trainers
from benchmarks.harness import report
from benchmarks.harness.environment import describe
from benchmarks.parts import PARTS, load

GUIDES = Path("benchmarks/guides")
READMES = (Path("README.md"), Path("benchmarks/README.md"), *sorted(GUIDES.glob("*.md")))
MARKS = re.compile(r"<!-- (\w+)((?: \d+)?): begin -->.*?<!-- \1\2: end -->", re.DOTALL)
PART_OF = {name: part for part, results in PARTS.items() for name in results}


def _source(folder: Path, name: str) -> str:
    env = report.load(folder, name)["environment"]
    return f"From `{folder.as_posix()}/{name}.json`: {describe(env)}."


def filled(text: str, folder: Path) -> str:
    """``text`` with what stands between the two marks of each table replaced."""

    def block(found: re.Match) -> str:
        name, number = found.groups()
        begin, end = (f"<!-- {name}{number}: {edge} -->" for edge in ("begin", "end"))
        if name in trainers.NAMES:
            return "\n".join([begin, "", "```diff", *trainers.difference(name), "```", "", end])
        if name == "figures":
            tables, sources = figures.tables(folder), figures.SOURCES
        else:
            tables, sources = load(PART_OF[name]).tables(report.load(folder, name)), (name,)
        if number:
            tables = [tables[int(number) - 1]]
        parts = [f"{t.title}:\n\n{report.to_markdown(t)}" for t in tables]
        measured = (_source(folder, source) for source in sources)
        return "\n\n".join([begin, *parts, "\n".join(measured), end])

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
