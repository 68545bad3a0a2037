"""A page about a run, or about several side by side, from their directories alone."""

from __future__ import annotations

from pathlib import Path

from .. import command
from ..errors import UserError
from . import run_page


def main() -> int:
    parser = command.Parser(
        prog="python -m maskrcnn_benchmark.report",
        description=__doc__,
        epilog="Training writes the page of its own run; this makes it again, or compares runs: "
        "python -m maskrcnn_benchmark.report output/before output/after --out comparison.html",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory (OUTPUT_DIR)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="RUN/report.html; of several runs comparison.html, here"
    )
    args = parser.parse_args()
    out = args.out or (args.runs[0] / run_page.FILE if len(args.runs) == 1 else Path("comparison.html"))
    if not out.resolve().parent.is_dir():
        raise UserError(f"--out: there is no directory {out.parent}")
    run_page.write(args.runs, out)
    print(out)
    return 0


if __name__ == "__main__":
    command.run(main)
