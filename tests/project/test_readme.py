"""The README and the guides: what they show runs, what they link to is there."""

import re
from pathlib import Path

import jax
import pytest

import jaxloss
from benchmarks import tables, trainers

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "benchmarks" / "guides").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDES]
LINKING = [*PAGES, ROOT / "benchmarks" / "README.md", *sorted((ROOT / ".github").glob("*.md"))]


def blocks(language):
    """The blocks of a language that are written on the pages, by name; none that is copied."""
    fenced = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return {
        f"{page.stem} {i}": block
        for page in PAGES
        for i, block in enumerate(fenced.findall(tables.MARKS.sub("", page.read_text())))
    }


PYTHON, DIFFS = blocks("python"), blocks("diff")


def run(name, program):
    """The names that a program leaves behind, in a namespace of its own."""
    names = {"__name__": "readme"}
    # The reader has JAX's defaults.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.enable_x64(False),
    ):
        exec(compile(program, name, "exec"), names)
    return names


@pytest.mark.nan_is_meant  # some show what is NaN, and what does not count
@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
@pytest.mark.parametrize("name", PYTHON)
def test_block(name):
    run(name, PYTHON[name])


@pytest.mark.parametrize("name", DIFFS)
def test_a_difference_changes_no_number(name):
    lines = DIFFS[name].splitlines()
    before, after = (
        run(name, "\n".join(line[1:] for line in lines if line[:1] != other)) for other in "+-"
    )
    assert "jaxloss" not in before
    assert "jaxloss" in after
    old, new = (jax.tree.leaves((names["loss"], names["grads"])) for names in (before, after))
    for a, b in zip(old, new, strict=True):
        assert jax.numpy.allclose(a, b, rtol=1e-5, atol=1e-6)
        assert jax.numpy.any(a != 0)


def test_there_are_blocks():
    assert len(PYTHON) >= 20
    assert len(DIFFS) == 2


def test_the_readme_is_short_and_names_every_function():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    table = text[text.index("## The functions") : text.index("## Which labels count")]
    assert [name for name in jaxloss.__all__ if f"`{name}`" not in table] == []
    for command in ("python -m benchmarks\n", "pip install -e '.[test]' && pytest\n"):
        assert command in text


def test_tables_are_those_of_the_results():
    from benchmarks.harness import report

    found = []
    for path in tables.READMES:
        text = path.read_text()
        assert tables.filled(text, report.RESULTS) == text
        marks = tables.MARKS.findall(text)
        assert text.count(" begin -->") == text.count(" end -->") == len(marks)
        found += marks
    named = [name for name, number in found if not number]
    # Pages say in words what "digits" and "large" measure; "figures" are from several results.
    assert sorted([*named, "digits", "large"]) == sorted(
        [*tables.PART_OF, "figures", *trainers.NAMES]
    )


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.stem)
def test_links(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.exists(), link
        assert not anchor or anchor in anchors(to), link


def test_every_guide_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [guide.name for guide in GUIDES if f"benchmarks/guides/{guide.name})" not in text] == []
