"""The main job says what it does, what it found and where that lies."""

import io

import pytest
from rich.console import Console

from benchmarks import __main__ as job
from benchmarks.harness import report
from benchmarks.parts import load

PARTS = ("digits", "precision", "speed", "linear", "memory")


@pytest.mark.parametrize("part", PARTS)
def test_every_table_has_a_finding(part):
    tables = load(part).tables(report.load(report.RESULTS, part))
    assert all(table.found.endswith(".") for table in tables)


def test_a_finding_is_what_the_numbers_say():
    precision = report.load(report.RESULTS, "precision")
    for row in precision["rows"]:
        row["loss_error"] |= {"jaxloss": 0.25, "optax": float(row["margin"] >= 30)}
    of_float32, _ = load("precision").tables(precision)
    assert "off by 2e-01" in of_float32.found
    assert "by all of itself from a margin of 30 on" in of_float32.found
    speed = report.load(report.RESULTS, "speed")
    speed["geometric_mean"]["float32"]["ratio"] = 7.0
    assert "takes 7.00 of optax's time" in load("speed").tables(speed)[0].found


def test_from_the_announcement_to_the_files(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "precision", "--out", str(tmp_path)])
    job.main()
    out = capsys.readouterr().out
    order = (
        "precision  Relative error",
        "About 10 s",
        "precision: float32, margins",
        "largest relative error",
        "Found:\n- float32",
        f"- {tmp_path / 'precision.png'}",
        f"- {tmp_path / 'precision.json'}",
        "This took",
    )
    places = [out.index(text) for text in order]
    assert places == sorted(places)


def test_bars_say_what_waits():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    for _, tick in report.in_turn(console, ["one", "two"]):
        tick(0.5, "half of it")
    assert "waits" in out.getvalue()
    assert "half of it" in out.getvalue()


def test_a_span_of_equal_numbers_is_one():
    assert report.span([1.0, 1.001], ".2f") == "1.00"
    assert report.span([3.0, 1.0, 2.0], ".0f") == "1 to 3"
