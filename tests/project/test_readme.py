"""Every Python block of the README and of the guides runs, in a namespace of its own."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "benchmarks" / "guides").glob("*.md"))]
BLOCKS = {
    f"{page.stem} {i}": block
    for page in PAGES
    for i, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    )
}


@pytest.mark.nan_is_meant  # two show what is NaN, and what does not count
@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name):
    import jax

    # The README's reader has JAX's defaults.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.enable_x64(False),
    ):
        exec(compile(BLOCKS[name], name, "exec"), {"__name__": "readme"})


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
