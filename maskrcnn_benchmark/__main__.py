"""The tools as one command: `maskrcnn-benchmark train ...` runs tools/train_net.py, and so for each file of tools/.

`python -m maskrcnn_benchmark train ...` is the same, and what torchrun takes: `torchrun -m maskrcnn_benchmark train`.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from . import __version__, command
from .places import ROOT

OF_CHECKOUT = ("zoo",)  # writes into configs/


def commands() -> dict[str, Path]:
    """Subcommand -> file: train_net.py is train, test_net.py test, convert_weights.py convert-weights."""
    files = {path.stem: path for path in sorted((ROOT / "tools").glob("*.py")) if path.stem not in OF_CHECKOUT}
    return {stem.removesuffix("_net").replace("_", "-"): path for stem, path in files.items()}


def summary(path: Path) -> str:
    """The first paragraph of a tool's docstring, read without importing it: torch takes seconds."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{__package__}.tool_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = command.Parser(prog="maskrcnn-benchmark", description="Train, test and measure Mask R-CNN on any device.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", dest="name")
    tools = commands()
    for name, path in tools.items():
        subparsers.add_parser(name, help=summary(path).replace("%", "%%"))
    name = parser.parse_args(sys.argv[1:2]).name  # the rest is the tool's own
    sys.argv = [f"{parser.prog} {name}", *sys.argv[2:]]
    command.run(load(name, tools[name]).main)


if __name__ == "__main__":
    main()
