"""The pages of the reference, as pdoc makes them."""

import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jaxloss

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pdoc") is None,
    reason="pdoc is not installed: pip install -e '.[docs]'",
)
FORMULA = re.compile(r"^ *\.\. math::(.*?)\n *\n", re.DOTALL | re.MULTILINE)


MATHJAX = "https://cdn.jsdelivr.net/npm/mathjax@3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    command = [sys.executable, "-m", "pdoc", "jaxloss", "--math", "-t", ".github/pdoc"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, "-o", str(folder)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def pages(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_every_public_name_has_an_anchor(pages):
    page = pages["jaxloss.html"]
    assert [name for name in jaxloss.__all__ if f'id="{name}"' not in page] == []


def test_no_link_is_broken(pages):
    page = pages["jaxloss.html"]
    page = re.sub("<script.*?</script>", "", page, flags=re.DOTALL)  # the search makes links
    links = {link for link in re.findall(r'href="([^"]*)"', page) if not link.startswith("https:")}
    assert "#linear_cross_entropy" in links
    for link in links:
        file, _, anchor = link.partition("#")
        assert (file or "jaxloss.html") in pages, link
        assert not anchor or f'id="{anchor}"' in pages[file or "jaxloss.html"], link


def test_formulas_reach_mathjax_as_they_are_written(pages):
    """Except for an escaped underscore, which Markdown unescapes: text wants it so, mathrm not."""
    page = pages["jaxloss.html"]
    assert "mathjax" in page.lower()
    for name in jaxloss.__all__:
        written = FORMULA.findall(getattr(jaxloss, name).__doc__ or "")
        start = page.index(f'<section id="{name}"')
        # The source that can be unfolded stands before the text.
        text = page[page.index('class="docstring"', start) : page.index("</section>", start)]
        shown = re.findall(r"\$\$(.*?)\$\$", html.unescape(text), re.DOTALL)
        assert len(shown) == len(written), name
        for a, b in zip(shown, written, strict=True):
            assert "".join(a.split()) == "".join(b.replace("\\_", "_").split()), name
            assert "\\_" not in re.sub(r"\\text\{[^}]*\}", "", b), name


def test_the_search_finds_every_name(pages):
    found = set(re.findall(r'"fullname": "jaxloss\.(\w+)"', pages["search.js"]))
    assert {*jaxloss.__all__} <= found


def test_signatures_are_as_they_are_written(pages):
    page = pages["jaxloss.html"]
    start = page.index('<section id="linear_cross_entropy"')
    signature = page[start : page.index("</span></span>", page.index("return-annotation", start))]
    text = html.unescape(re.sub("<[^>]*>", "", signature))
    assert "kernel: KernelLike," in text
    assert "reduction: Reduction = 'mean'," in text
    assert "numpy" not in text


@pytest.fixture(scope="module")
def seen(folder, pages, tmp_path_factory):
    """What a browser shows of them. MathJax is a copy here, because a test reaches no server."""
    for name in ("PySide6", "mathjax"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install -e '.[browser]'")
    opened = tmp_path_factory.mktemp("opened")
    copy = Path(importlib.util.find_spec("mathjax").submodule_search_locations[0])
    shutil.copytree(folder, opened, dirs_exist_ok=True)
    assert pages["jaxloss.html"].count(MATHJAX) == 1
    local = (copy / "static" / "mathjax").as_uri()
    (opened / "jaxloss.html").write_text(pages["jaxloss.html"].replace(MATHJAX, local))
    command = [sys.executable, str(Path(__file__).parent / "browser.py")]
    done = subprocess.run(
        [*command, str(opened / "jaxloss.html"), str(opened)], capture_output=True, text=True
    )
    if re.search(r"ImportError: lib\S+: cannot open shared object file", done.stderr):
        pytest.skip(done.stderr.splitlines()[-1])  # Qt's browser needs libraries of the system
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_browser_follows_the_links(seen):
    assert "#linear_cross_entropy" in seen["links"]
    assert seen["dead"] == []
    assert seen["hash"] == "#linear_cross_entropy"
    assert abs(seen["at"]) < 200  # its place in a window of 900


def test_a_browser_shows_the_formulas(seen):
    written = [FORMULA.findall(getattr(jaxloss, name).__doc__ or "") for name in jaxloss.__all__]
    assert seen["formulas"] == {"shown": sum(map(len, written)), "wrong": 0, "left": 0}


def test_a_browser_finds_the_function(seen):
    assert seen["search"][0].endswith("#linear_cross_entropy")
