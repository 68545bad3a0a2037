"""How often the gate is right on this machine: real gates of a build slowed by a fifth, and of one that was not.

  python test/gate_reliability.py                  10 and 10 gates in turns with the base (--base-ref): 20 minutes
  python test/gate_reliability.py --saved          against results that were saved before the first try
  python test/gate_reliability.py --tries 3 --threshold 5%

Both builds are worktrees of HEAD with this checkout's compiled kernels; in one of them the wrapper of the matching
kernel sleeps for a fifth of the time that the kernel took. Prints a row a gate: which build, the exit status, the
matching metric's change and p, the metrics that regressed, seconds. Exit status 0 where every slowed build was caught
(gate exits 1) and nine of ten others passed (0), else 1. pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WRAPPER = Path("maskrcnn_benchmark/ops/matching.py")
SLOWED = """

import time as _time

_at_full_speed = match


def match(*arguments, **options):
    started = _time.perf_counter()
    result = _at_full_speed(*arguments, **options)
    _time.sleep(0.2 * (_time.perf_counter() - started))
    return result
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=10, metavar="N", help="gates of each build (default 10)")
    parser.add_argument("--suite", default="configs/benchmark/smoke.yaml", metavar="YAML", help="must time matching")
    parser.add_argument("--threshold", metavar="S", help="default: the suite's")
    parser.add_argument("--saved", action="store_true", help="judge against saved results, not in turns with the base")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gate-reliability-") as directory:
        place = Path(directory)
        try:
            builds = {name: make_build(place / name) for name in ("same", "slowed")}
            with (builds["slowed"] / WRAPPER).open("a") as file:
                file.write(SLOWED)
            return 0 if judge(args, builds, place) else 1
        finally:
            for name in ("base/source", "same", "slowed"):
                subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", place / name], capture_output=True)


def make_build(root: Path) -> Path:
    """A worktree of HEAD with this checkout's kernels."""
    subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", root, "HEAD"], check=True)
    for kernels in (ROOT / "maskrcnn_benchmark").glob("_C*.so"):
        shutil.copy(kernels, root / "maskrcnn_benchmark")  # newer than the sources, as the gate demands
    return root


def judge(args: argparse.Namespace, builds: dict[str, Path], place: Path) -> bool:
    """Runs the gates, one build after the other, and prints the table. Whether the gate was right often enough."""
    base = ["--base-ref", "HEAD", "--base-dir", str(place / "base")]
    if args.saved:
        base = [str(place / "base.json")]
        subprocess.run([*tool("run", args.suite), "--out", *base], cwd=builds["same"], check=True, capture_output=True)
    options = [*base, *(["--threshold", args.threshold] if args.threshold else [])]
    codes: dict[str, list[int]] = {"same": [], "slowed": []}
    print("| build | exit | matching | p | regressed | seconds |\n|---|---|---|---|---|---|", flush=True)
    for _ in range(args.tries):
        for name, root in builds.items():
            report, started = place / "report.json", time.perf_counter()
            command = [*tool("gate", args.suite), *options, "--report", str(report)]
            done = subprocess.run(command, cwd=root, capture_output=True, text=True)
            codes[name].append(done.returncode)
            if done.returncode not in (0, 1):
                sys.stderr.write(done.stderr)
                continue
            seconds = time.perf_counter() - started
            print(row(name, done.returncode, json.loads(report.read_text()), seconds), flush=True)
    caught, passed = codes["slowed"].count(1), codes["same"].count(0)
    print(f"\nslowed by a fifth: {caught} of {args.tries} caught; the same build: {passed} of {args.tries} passed")
    return caught == args.tries and passed >= 0.9 * args.tries


def tool(*arguments: str) -> list[str]:
    return [sys.executable, "tools/benchmark.py", *arguments]


def row(build: str, code: int, report: dict[str, Any], seconds: float) -> str:
    findings = report["findings"]
    matching = next(finding for finding in findings if "match" in finding["case"])
    regressed = [f"{one['case']} {one['change']:+.1%}" for one in findings if one["verdict"] == "regression"]
    cells = (build, code, f"{matching['change']:+.1%}", f"{matching['p']:.1g}", "; ".join(regressed) or "-")
    return f"| {' | '.join(map(str, cells))} | {seconds:.0f} |"


if __name__ == "__main__":
    sys.exit(main())
