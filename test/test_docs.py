"""The documents: examples run, keys and messages exist, links lead somewhere, and the one command starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str, heading: str = "") -> list[str]:
    """The page's code in a language, or that under a heading of the second level."""
    text = page.read_text(encoding="utf-8")
    if heading:
        text = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [code for kind, code in BLOCK.findall(text) if kind == language]


@pytest.fixture
def shell(tmp_path):
    """Runs bash code in an empty directory in which python, pip and maskrcnn-benchmark are this checkout's; what pip
    installs goes to a directory of the test's."""
    programs, site, work = (tmp_path / name for name in ("bin", "site", "work"))
    for directory in (programs, site, work):
        directory.mkdir()
    for name, module in {"python": "", "pip": "-m pip", "maskrcnn-benchmark": "-m maskrcnn_benchmark"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (programs / name).chmod(0o755)
    settings = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, site, work))),
        "PIP_TARGET": str(site),
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }

    def call(code: str) -> subprocess.CompletedProcess:
        command = ["bash", "-euo", "pipefail", "-c", code]
        environment = {**os.environ, **settings}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=work)

    call.directory = work
    return call


@pytest.mark.parametrize("heading", ["A device", "An operator", "A part of the model", "A data set"])
def test_the_examples_of_extending_run(shell, heading):
    """Blocks that begin with `# NAME` are files; then the shell's blocks run beside them."""
    page = DOCS / "extending.md"
    for code in blocks(page, "python", heading) + blocks(page, "toml", heading):
        name = re.match(r"# (\S+)\n", code)[1]
        (shell.directory / name).write_text(code)
    commands = blocks(page, "bash", heading)
    assert commands
    for command in commands:
        done = shell(command)
        assert done.returncode == 0, done.stdout + done.stderr
