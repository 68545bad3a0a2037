"""Write the table of configs/README.md anew: after a yaml was added, or a model changed."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this file, installed or not

from maskrcnn_benchmark import command
from maskrcnn_benchmark.benchmark import zoo


def main() -> int:
    parser = command.Parser(description=__doc__)
    parser.add_argument(
        "--measure", action="store_true", help="first measure the models that were not, on this machine"
    )
    configs = Path(__file__).resolve().parents[1] / "configs"
    if parser.parse_args().measure:
        for name in zoo.measure_all(configs):
            print(name, flush=True)
    zoo.write(configs)
    return 0


if __name__ == "__main__":
    command.run(main)
