"""Every Python block of the README runs, in a namespace of its own."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.nan_is_meant  # two show what is NaN, and what does not count
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block(block):
    import jax

    # The README's reader has JAX's defaults.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.enable_x64(False),
    ):
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_tables_are_those_of_the_results():
    from benchmarks import tables
    from benchmarks.harness import report

    found = []
    for path in tables.READMES:
        text = path.read_text()
        assert tables.filled(text, report.RESULTS) == text
        marks = tables.MARKS.findall(text)
        assert text.count(" begin -->") == text.count(" end -->") == len(marks)
        found += marks
    named = [name for name, number in found if not number]
    # The README says in words what these two measure.
    assert sorted([*named, "digits", "large"]) == sorted(tables.PART_OF)


def test_there_are_blocks():
    assert len(BLOCKS) >= 5
