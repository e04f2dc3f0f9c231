"""Opens the page of the reference in Qt's browser, and prints what a reader would find, as JSON.

``python browser.py PAGE FOLDER``: pictures of the page, of a formula and of the search are put into
the folder. What takes longer than ``PATIENCE`` seconds to appear is taken to be missing.
"""

import json
import os
import sys
from pathlib import Path
from time import monotonic

os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--no-sandbox --disable-gpu"  # root has no sandbox

from PySide6.QtCore import QEventLoop, QTimer, QUrl
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

PATIENCE = 300
LINKS = """[...document.querySelectorAll("a[href]")].map(a => a.getAttribute("href"))"""
DEAD = """[...document.querySelectorAll("a[href^='#']")].map(a => a.hash.slice(1))
          .filter(id => id && !document.getElementById(decodeURIComponent(id)))"""
TYPESET = """(window.MathJax?.startup?.promise?.then(() => {window.typeset = true}),
              window.typeset)"""
FORMULAS = """({shown: document.querySelectorAll("mjx-container").length,
                wrong: document.querySelectorAll("mjx-merror").length,
                left: document.body.innerText.split("$$").length - 1})"""
SEARCH = """(() => {const box = document.querySelector("input[type=search]");
             box.value = "linear_cross_entropy"; box.focus();
             box.dispatchEvent(new Event("input", {bubbles: true}));})()"""
FOUND = """[...document.querySelectorAll(".search-result a, .search-result .name")]
           .map(a => a.getAttribute("href") ?? a.innerText)"""


class Browser:
    def __init__(self, folder: Path):
        self.app, self.view, self.folder = QApplication([]), QWebEngineView(), folder
        self.view.resize(1200, 900)
        self.view.show()

    def wait(self, begin) -> object:
        """What ``begin`` hands to its callback."""
        loop, found = QEventLoop(), []
        begin(lambda result: (found.append(result), loop.quit()))
        if not found:
            loop.exec()
        return found[0]

    def open(self, page: Path) -> None:
        def begin(done):
            self.view.loadFinished.connect(done)
            self.view.load(QUrl.fromLocalFile(str(page)))

        assert self.wait(begin), f"{page} does not load"

    def ask(self, script: str):
        text = self.wait(
            lambda done: self.view.page().runJavaScript(f"JSON.stringify({script})", done)
        )
        return json.loads(text) if text else None

    def pause(self, milliseconds: int) -> None:
        self.wait(lambda done: QTimer.singleShot(milliseconds, lambda: done(None)))

    def until(self, script: str):
        """The first answer that is something, or the last one."""
        end = monotonic() + PATIENCE
        while not (answer := self.ask(script)) and monotonic() < end:
            self.pause(100)
        return answer

    def close(self) -> None:
        """Qt aborts where Python frees the view after the application."""
        self.view.close()
        self.view.deleteLater()
        self.pause(100)

    def picture(self, name: str) -> None:
        self.pause(500)
        self.view.grab().save(str(self.folder / f"{name}.png"))


def main(page: Path, folder: Path) -> dict:
    browser = Browser(folder)
    browser.open(page)
    found = {"links": browser.ask(LINKS), "dead": browser.ask(DEAD)}
    browser.until(TYPESET)
    found["formulas"] = browser.ask(FORMULAS)
    browser.picture("page")
    browser.ask("""document.querySelector("nav a[href='#linear_cross_entropy']").click()""")
    found["hash"] = browser.until("location.hash")
    found["at"] = browser.ask(
        """document.getElementById("linear_cross_entropy").getBoundingClientRect().top"""
    )
    browser.picture("function")
    browser.ask(SEARCH)
    found["search"] = browser.until(f"(x => x.length ? x : null)({FOUND})")
    browser.picture("search")
    browser.close()
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())))
