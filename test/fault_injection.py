"""Kills runs at random moments, resumes them, and compares what they end with, bit for bit, with runs left alone.

  python test/fault_injection.py                     30 faults, some ten minutes on two cores
  python test/fault_injection.py --faults 8 --seed 7

Faults come in turns: kill -9 of a rank, of a loader worker, of the launcher, of the main rank inside a checkpoint's
write, and SIGTERM to the launcher. Each run (one and two ranks, accumulation, bfloat16, loader workers) takes several,
one after each resume. Prints a row a fault: where it struck, how the run ended and after how many seconds its last
process was gone, and what --resume continued from. Exit status 0 where nothing was lost, else 1. pytest does not
collect this file; test_faults.py uses its parts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from conftest import ROOT, write_tiny_config

from maskrcnn_benchmark.data.synthetic import generate
from maskrcnn_benchmark.engine import checkpoint

FAULTS = ("kill a rank", "kill a worker", "kill the launcher", "kill in a write", "SIGTERM")
GONE_WITHIN = 30.0


@dataclass(frozen=True)
class Case:
    name: str
    ranks: int
    overrides: tuple[str, ...]


WORKERS = ("DATALOADER.NUM_WORKERS", "1")
CASES = (
    Case("1 rank", 1, WORKERS),
    Case("2 ranks, accumulating", 2, (*WORKERS, "SOLVER.ACCUMULATE_STEPS", "2")),
    Case("1 rank, bfloat16, accumulating", 1, (*WORKERS, "SOLVER.ACCUMULATE_STEPS", "2", "DTYPE", "bfloat16")),
    Case("2 ranks, bfloat16", 2, (*WORKERS, "DTYPE", "bfloat16")),
)


def start(case: Case, config: Path, output: Path, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """A run in a session of its own; what it says goes to OUTPUT.txt beside the output."""
    command = [sys.executable]
    if case.ranks > 1 or launcher:
        module = ("-m", "maskrcnn_benchmark.engine.launch", "--standalone", "--nproc-per-node", str(case.ranks))
        command += [*module, *launcher]
    command += [str(ROOT / "tools/train_net.py"), "--config-file", str(config), "--device", "cpu", "--skip-test"]
    command += [*case.overrides, *more, "OUTPUT_DIR", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(said_by(output), "a") as said:
        return subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=said, stderr=said, stdin=subprocess.DEVNULL
        )


def said_by(output: Path) -> Path:
    return output.with_suffix(".txt")


def processes(output: Path) -> dict[int, int]:
    """All living processes of the run that writes to `output`, and their parents: its path is in their arguments."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            arguments = (directory / "cmdline").read_bytes().split(b"\0")
            state, parent = (directory / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            if os.fsencode(output) in arguments and state != "Z":
                found[int(directory.name)] = int(parent)
    return found


def ranks_of(launcher: int, case: Case, found: dict[int, int]) -> list[int]:
    return [launcher] if case.ranks == 1 else sorted(pid for pid, parent in found.items() if parent == launcher)


def progress(output: Path) -> int:
    """The last iteration in metrics.jsonl; 0 before the first."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["iter"]
    return 0


def looks(seconds: float, pause: float) -> Iterator[float]:
    """The seconds waited so far, again and again until they are `seconds`. A machine that sleeps, and a process that is
    stopped for a while, must not look like a run that hangs: more than a second between two looks counts as one."""
    waited, last = 0.0, time.monotonic()
    while waited < seconds:
        yield waited
        time.sleep(pause)
        now = time.monotonic()
        waited, last = waited + min(now - last, 1.0), now


def wait_until(condition, process: subprocess.Popen, seconds: float = 120, pause: float = 0.005) -> None:
    for _ in looks(seconds, pause):
        if condition():
            return
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with status {process.returncode} before the fault")
    raise RuntimeError(f"nothing happened in {seconds:g} seconds")


def inject(fault: str, case: Case, process: subprocess.Popen, output: Path, rng: random.Random) -> str:
    """Strikes once, now; returns where."""
    if fault == "kill in a write":
        half = ".model_*.tmp"
        wait_until(lambda: any(output.glob(half)), process, pause=0)
        os.kill(ranks_of(process.pid, case, processes(output))[0], signal.SIGKILL)
        return "inside" if any(output.glob(half)) else "just after"
    found = processes(output)
    ranks = ranks_of(process.pid, case, found)
    workers = [pid for pid, parent in found.items() if parent in ranks]
    if fault == "SIGTERM":
        os.kill(process.pid, signal.SIGTERM)
        return "launcher"
    if fault == "kill the launcher":
        os.kill(process.pid, signal.SIGKILL)
        return f"{len(found)} processes"
    victims = workers if fault == "kill a worker" else ranks
    victim = rng.choice(victims)
    os.kill(victim, signal.SIGKILL)
    return f"{victims.index(victim) + 1} of {len(victims)}"


def seconds_until_gone(process: subprocess.Popen, output: Path) -> float:
    """Raises RuntimeError where a process of the run is left after GONE_WITHIN."""
    for waited in looks(GONE_WITHIN, 0.02):
        if process.poll() is not None and not processes(output):
            return waited
    raise RuntimeError(f"processes {sorted(processes(output))} are left after {GONE_WITHIN:g} seconds")


def strike(fault: str, case: Case, config: Path, output: Path, rng: random.Random) -> dict[str, str]:
    """Starts or resumes the run, lets it train a while, strikes, waits until all is gone, looks at what is left."""
    before = progress(output)
    process = start(case, config, output, "--resume")
    try:
        wanted = rng.randint(2, 12)
        # A resumed run first cuts the lines of the steps that it trains again, so wait for its first line too
        resumed = said_by(output).stat().st_size
        wait_until(lambda: "iter: " in said_by(output).read_text()[resumed:], process)
        wait_until(lambda: progress(output) >= before + wanted, process)
        time.sleep(rng.uniform(0, 0.1))
        where = inject(fault, case, process, output, rng)
        at = progress(output)
        gone = seconds_until_gone(process, output)
    finally:
        for pid in processes(output):
            os.kill(pid, signal.SIGKILL)
    expected = {"SIGTERM": {143}, "kill a worker": {2}, "kill the launcher": {-9}}
    if process.returncode not in expected.get(fault, {137} if case.ranks > 1 else {-9}):
        raise RuntimeError(f"{fault}: status {process.returncode}")
    found = checkpoint.read_last(output)
    left = found[1]["iteration"] if found else 0
    if fault == "SIGTERM" and left < at:
        raise RuntimeError(f"SIGTERM at iteration {at} saved iteration {left}")
    return {"struck": f"{fault} ({where})", "iteration": str(at), "status": str(process.returncode),
            "gone after": f"{gone:.1f} s", "resumes from": str(left)}  # fmt: skip


def finish(case: Case, config: Path, output: Path) -> None:
    process = start(case, config, output, "--resume")
    if process.wait(timeout=600):
        raise RuntimeError(f"the last resume ended with status {process.returncode}: {said_by(output)}")


def difference(whole: Path, resumed: Path) -> str | None:
    """What differs between two finished runs: weights, optimizer or losses. None: nothing, bit for bit."""
    one, two = (checkpoint.read(path / "model_final.pth") for path in (whole, resumed))
    for name, tensor in one["model"].items():
        if not torch.equal(tensor, two["model"][name]):
            return f"weights {name}"
    for number, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            if not torch.equal(torch.as_tensor(value), torch.as_tensor(two["optimizer"]["state"][number][name])):
                return f"optimizer {name} of {number}"
    lines = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (whole, resumed)
    ]
    losses = [[(line["iter"], {k: v for k, v in line.items() if "loss" in k}) for line in each] for each in lines]
    return None if losses[0] == losses[1] else "losses in metrics.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30, metavar="N", help="moments to strike (default 30)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments and victims")
    args = parser.parse_args()
    rng, lost = random.Random(args.seed), 0
    shares = [args.faults // len(CASES) + (n < args.faults % len(CASES)) for n in range(len(CASES))]
    faults = [FAULTS[n % len(FAULTS)] for n in range(args.faults)]
    with tempfile.TemporaryDirectory(prefix="faults-") as directory:
        place = Path(directory)
        generate(place / "shapes", train_images=12, val_images=5, size=(96, 96), seed=3)
        config = write_tiny_config(place / "tiny.yaml", place / "shapes")
        print(f"{'run':32}{'fault':34}{'iteration':>10}{'status':>8}{'gone after':>12}{'resumes from':>14}", flush=True)
        for number, (case, share) in enumerate(zip(CASES, shares)):
            length = ("SOLVER.MAX_ITER", str(40 + 20 * share), "SOLVER.CHECKPOINT_PERIOD", "3")
            case = Case(case.name, case.ranks, (*case.overrides, *length, "SOLVER.CHECKPOINTS_KEPT", "2"))
            whole, struck = place / f"whole{number}", place / f"struck{number}"
            finish(case, config, whole)
            for _ in range(share):
                try:
                    row = strike(faults.pop(0), case, config, struck, rng)
                    print(f"{case.name:32}{row['struck']:34}{row['iteration']:>10}{row['status']:>8}"
                          f"{row['gone after']:>12}{row['resumes from']:>14}", flush=True)  # fmt: skip
                except RuntimeError as error:
                    lost += 1
                    print(f"{case.name:32}{error}", flush=True)
            finish(case, config, struck)
            found = difference(whole, struck)
            lost += found is not None
            print(f"{case.name:32}{share} faults, then to the end: {found or 'bit-identical'}", flush=True)
    print(f"{args.faults} faults, {lost} losses")
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
