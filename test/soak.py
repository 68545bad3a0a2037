"""A long run of a tiny model, and what it holds meanwhile: memory, open files, shared memory and threads stay flat.

  python test/soak.py                        2 ranks, 3,000 iterations, an evaluation every 250, a checkpoint every 100
  python test/soak.py --iterations 600

Samples all processes of the run once a second. Prints, for each quarter of the iterations after the first tenth, the
median of each figure over its samples. Exit status 0 where the last quarter is at most 5% (memory), 0 files, 0 shared
segments and 0 threads above the second, else 1. pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import write_tiny_config
from fault_injection import Case, processes, progress, said_by, start

from maskrcnn_benchmark.data.synthetic import generate

FIGURES = ("PSS MB", "files", "threads", "shm segments", "shm MB")
GROWTH = {"PSS MB": 1.05, "shm MB": 1.05}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=3000, metavar="N", help="default 3000")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="default 2")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="loader workers a rank (default 1)")
    parser.add_argument("--keep", type=Path, metavar="FILE.json", help="write the samples here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        place = Path(directory)
        generate(place / "shapes", train_images=12, val_images=5, size=(96, 96), seed=3)
        config = write_tiny_config(place / "tiny.yaml", place / "shapes")
        periods = ("SOLVER.EVAL_PERIOD", "250", "SOLVER.CHECKPOINT_PERIOD", "100", "SOLVER.CHECKPOINTS_KEPT", "2")
        overrides = ("SOLVER.MAX_ITER", str(args.iterations), "LOGGING.PERIOD", "10", *periods)
        case = Case("soak", args.ranks, (*overrides, "DATALOADER.NUM_WORKERS", str(args.workers)))
        samples, status = watch(case, config, place / "run")
        print("\n".join(said_by(place / "run").read_text().splitlines()[-3:]))
    if args.keep:
        args.keep.write_text(json.dumps(samples))
    return status or judge(samples, args.iterations)


def watch(case: Case, config: Path, output: Path) -> tuple[list[dict[str, float]], int]:
    """A sample a second until the run ends, and its exit status."""
    process = start(case, config, output)
    samples = []
    try:
        while process.poll() is None:
            found = list(processes(output))
            samples.append({"iteration": progress(output), "processes": len(found), **figures(found)})
            time.sleep(1)
    finally:
        for pid in processes(output):
            os.kill(pid, signal.SIGKILL)
    return samples, process.wait()


def figures(pids: list[int]) -> dict[str, float]:
    """Sums over processes; memory as the proportional set size, in which a shared page counts once."""
    sums = dict.fromkeys(FIGURES, 0.0)
    for pid in pids:
        with contextlib.suppress(OSError, StopIteration):  # ended meanwhile
            directory = Path(f"/proc/{pid}")
            rollup = (directory / "smaps_rollup").read_text().splitlines()
            sums["PSS MB"] += int(next(line for line in rollup if line.startswith("Pss:")).split()[1]) / 1024
            sums["files"] += len(list((directory / "fd").iterdir()))
            sums["threads"] += len(list((directory / "task").iterdir()))
            maps = (directory / "maps").read_text().splitlines()
            shared = [line.split()[0] for line in maps if "/dev/shm/" in line]
            sums["shm segments"] += len(shared)
            sums["shm MB"] += sum(int(b, 16) - int(a, 16) for a, b in (each.split("-") for each in shared)) / 2**20
    return sums


def judge(samples: list[dict[str, float]], iterations: int) -> int:
    """Prints a row a quarter; 1 where the last is above the second. Samples with fewer processes than most, such as
    those of the start, are left out."""
    usual = statistics.mode(sample["processes"] for sample in samples)
    samples = [s for s in samples if s["processes"] == usual and s["iteration"] >= iterations / 10]
    edges = [iterations * n / 4 for n in range(5)]
    print(f"{'iterations':16}{'samples':>9}" + "".join(f"{name:>14}" for name in FIGURES))
    rows = []
    for first, last in itertools.pairwise(edges):
        part = [s for s in samples if first <= s["iteration"] < last]
        rows.append({name: statistics.median([s[name] for s in part] or [0.0]) for name in FIGURES})
        numbers = "".join(f"{rows[-1][name]:>14.1f}" for name in FIGURES)
        print(f"{f'{first:.0f} to {last:.0f}':16}{len(part):>9}{numbers}")
    grown = [name for name in FIGURES if rows[3][name] > rows[1][name] * GROWTH.get(name, 1.0)]
    print(f"grown from the second to the last quarter: {', '.join(grown) or 'nothing'}")
    return 1 if grown else 0


if __name__ == "__main__":
    raise SystemExit(main())
