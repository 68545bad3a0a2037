"""What tests look at pages with: a parser that checks them, and a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

VOID = {"meta", "circle", "line", "img"}


class Page(HTMLParser):
    """Checks that elements nest, and collects the tags, the attributes and the words."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def browse(text: str, width: int, directory: Path) -> tuple[int, int, list[str]]:
    """The width that a page with all details open wants and the one it has, in a frame of a real browser, whose windows
    are 500 wide at least; and what the browser's console says. The script that tells it is in this copy only."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium here")
    script = """<script>
        const hidden = [...document.querySelectorAll(".wide")].map(table => table.scrollWidth - table.clientWidth)
        parent.postMessage(document.documentElement.scrollWidth + Math.max(0, ...hidden) + " " + innerWidth, "*")
        </script></body>"""
    opened = text.replace("<details>", "<details open>").replace("</body>", script)
    (directory / "a.html").write_text(opened)
    (directory / "frame.html").write_text(
        "<!doctype html><script>onmessage=message=>document.title=message.data</script>"
        f"<iframe src=a.html style='border:0;width:{width}px'></iframe>"
    )
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    options = ["--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={directory / 'profile'}"]
    options += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"]
    page = (directory / "frame.html").as_uri()
    done = subprocess.run([browser, *options, page], capture_output=True, text=True, timeout=120)
    wanted, shown = map(int, re.search(r"<title>(\d+) (\d+)</title>", done.stdout).groups())
    return wanted, shown, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
