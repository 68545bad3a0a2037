"""Writes docs/config.md: every key of defaults.py with its default and its comment.

python -m maskrcnn_benchmark.config.reference > docs/config.md
"""

from __future__ import annotations

import ast
from itertools import takewhile
from pathlib import Path

from . import defaults

HEAD = """# Configuration

<!-- written by python -m maskrcnn_benchmark.config.reference: edit maskrcnn_benchmark/config/defaults.py -->

Any key can stand in a yaml file or on the command line, as `KEY VALUE`. `_BASE_` in a file names others to be read
before it; on the command line `_BASE_ FILE` does. Names and defaults are maskrcnn-benchmark's; (+) marks keys that it
does not have. Keys and values are checked before anything starts; `OUTPUT_DIR/config.yaml` is what they came to.
"""
TABLE = "\n| key | default | meaning |\n|---|---|---|\n"


def render() -> str:
    """The page. A key without a comment of its own is told by its name, or by the comment of the key above it."""
    lines = Path(defaults.__file__).read_text(encoding="utf-8").splitlines()
    text = HEAD + TABLE
    for node in ast.parse("\n".join(lines)).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
            continue
        key, comment = ast.unparse(node.targets[0]).removeprefix("_C."), _comment(lines, node.lineno - 1)
        if ast.unparse(node.value) == "CN()":
            text += f"\n## {key}\n" + (f"\n{comment}.\n" if comment else "") + TABLE
        else:
            text += f"| `{key}` | `{ast.unparse(node.value)}` | {comment} |\n"
    return text


def _comment(lines: list[str], row: int) -> str:
    """What the comment lines just above `row` say; a ruler between sections is none."""
    above = takewhile(lambda line: line.startswith("# ") and "-----" not in line, reversed(lines[:row]))
    return " ".join(line.removeprefix("# ") for line in reversed(list(above))).replace("|", "\\|")


if __name__ == "__main__":
    print(render(), end="")
