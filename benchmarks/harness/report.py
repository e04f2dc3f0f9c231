"""Tables for a terminal and for a page, results as JSON, figures as PNG."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import rich.table
from matplotlib import pyplot
from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

RESULTS = Path("benchmarks/results")  # committed; from the checkout's top
COLORS = {"jaxloss": "#0072b2", "optax": "#d55e00", "two-step": "#009e73", "floor": "#7f7f7f"}

EXPLAINED = {"two-step": "two-step (log_softmax, then the label's entry)"}  # in legends


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]  # a newline may be in a name: the columns stay narrow in a terminal
    rows: list[list[str]]
    totals: int = 0  # so many rows at the end stand apart
    words: bool = False  # its cells are read from the left
    found: str = ""  # what it says, in one line


def by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def to_rich(table: Table) -> rich.table.Table:
    # Narrow padding: the widest table fits into 80 columns.
    padding, edges = (0, 1, 0, 0), {"box": box.SIMPLE_HEAD, "show_edge": False}
    out = rich.table.Table(title=table.title, title_justify="left", padding=padding, **edges)
    for name in table.header:
        out.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(table.rows, 1):
        out.add_row(*row, end_section=bool(table.totals) and i == len(table.rows) - table.totals)
    return out


def to_markdown(table: Table) -> str:
    header = [name.replace("-\n", "").replace("\n", " ") for name in table.header]
    lines = [header, ["---" if table.words else "---:"] * len(header), *table.rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def in_turn(console: Console, names: Iterable[str]) -> Iterator[tuple[str, Callable[..., None]]]:
    """Each name, with its ``tick(share, note)``: a bar shows the share that is done.

    The note says what is under way. It stands beside the bar, or where no terminal shows a bar, on
    a line of its own, after the name.
    """
    columns = (TextColumn("{task.description:>10}"), BarColumn(), TimeElapsedColumn())
    columns += (TextColumn("{task.fields[note]}"),)
    # No refresh thread: it would take turns with what is being timed.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        bars = {name: progress.add_task(name, total=1, start=False, note="waits") for name in names}
        for name, bar in bars.items():
            progress.start_task(bar)

            def tick(share: float, *note: str, name=name, bar=bar) -> None:
                shown = {"note": note[0]} if note else {}
                progress.update(bar, completed=share, refresh=console.is_terminal, **shown)
                if note and not console.is_terminal:
                    print(f"{name}:", *note, flush=True)

            tick(0, "starts")
            yield name, tick
            progress.update(bar, completed=1, note="done")


def shares(tick: Callable[..., None], cases: Sequence) -> Iterator[tuple[Any, Callable]]:
    """Each case, with a ``tick`` of its own; all cases take the same share of the bar."""
    for i, case in enumerate(cases):
        yield case, lambda share, *note, i=i: tick((i + share) / len(cases), *note)
    tick(1)


def span(values: Iterable[float], form: str) -> str:
    """From the least to the most."""
    low, *_, high = sorted([*values] * 2)
    low, high = f"{low:{form}}", f"{high:{form}}"
    return low if low == high else f"{low} to {high}"


def save(folder: Path, name: str, data: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def load(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def axes(columns: int = 1) -> list[Axes]:
    _, grid = pyplot.subplots(1, columns, figsize=(6.4 * columns, 4.4), squeeze=False)
    for ax in grid[0]:
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return list(grid[0])


def legend_below(ax: Axes, columns: int) -> None:
    where = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": columns}
    ax.get_figure().legend(*ax.get_legend_handles_labels(), **where)  # pyright: ignore


def mark_zero(ax: Axes) -> None:
    """Says, in a picture of relative errors, what an error of 1 is."""
    ax.set_ylim(top=10)
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
    ax.annotate("error 1: 0 is returned", (1, 1), (0, 6), fontsize=9, **where)


def save_figure(ax: Axes, path: Path) -> None:
    figure = ax.get_figure()
    assert figure is not None
    # Without the version that matplotlib writes, the same numbers give the same file.
    figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})  # pyright: ignore
    pyplot.close(figure)  # pyright: ignore
