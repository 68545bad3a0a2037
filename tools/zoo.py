"""Write the table of configs/README.md anew: after a yaml was added, or a model changed."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this file, installed or not

from maskrcnn_benchmark import command
from maskrcnn_benchmark.benchmark import zoo


def main() -> int:
    command.Parser(description=__doc__).parse_args()
    zoo.write(Path(__file__).resolve().parents[1] / "configs")
    return 0


if __name__ == "__main__":
    command.run(main)
