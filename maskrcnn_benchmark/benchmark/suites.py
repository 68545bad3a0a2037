"""Suites of benchmark cases, each run in fresh processes, of this checkout or of another revision beside it.

A suite is a yaml file:

    description: what it is for, how long it takes
    processes: 8            fresh processes a case, and a side
    threshold: 3%           how much worse is too much, where the command line does not say
    cases:                  each the arguments of tools/benchmark.py; paths are relative to the checkout
      - ops --only "NMS, 6000" --repeats 7
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..places import ROOT, find_recipe
from . import results

KINDS = ("ops", "train", "infer", "data", "eval")
DEVICE_KINDS = ("ops", "train", "infer", "data")
STATISTICS = Path("/proc/stat")
# A process beside which others used more than this share of the machine's cores is measured again. How often they took
# a core from it, or how long it waited for one, says less: what runs on the other thread of a core, or empties the
# shared cache, made it half as fast without a wait.
BUSY = 0.1
ATTEMPTS = 3
# On a machine that is always busy this is in vain: a side is given half as many more attempts as it has processes.
SPARE = 0.5
# How often the gate measures a suite's processes anew, at most, to clear up what is worse but not surely so.
ROUNDS = 3
KEYS = {"description": str, "processes": int, "threshold": (str, float), "cases": list}


@dataclass(frozen=True)
class Suite:
    """cases: argument lists of tools/benchmark.py, the kind first. threshold: a share, or None for the default."""

    path: Path
    cases: list[list[str]]
    processes: int = 8
    threshold: float | None = None
    description: str = ""


@dataclass(frozen=True)
class Build:
    """A checkout that can be measured, and the Python that runs it."""

    name: str
    root: Path
    python: Path


@dataclass
class Runs:
    """What a build gave so far, by the case's number in the suite. None: it failed, and is not tried again. spare: how
    many more attempts it may have on a busy machine."""

    build: Build
    spare: int
    parts: dict[int, list[dict[str, Any]] | None] = field(default_factory=dict)


def share(text: str) -> float:
    """3% or 0.03 as 0.03. Raises ValueError."""
    value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if not 0 < value < 10:
        raise ValueError
    return value


def read(path: Path) -> Suite:
    """
    Raises:
        UserError: missing, no yaml, or not a suite; says where.
    """
    try:
        content = yaml.safe_load(find_recipe(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read suite {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid yaml: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content.get("cases"):
        raise UserError(f"{path} is not a suite: it needs a list of cases; see configs/benchmark/ops.yaml")
    for key, value in content.items():
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key}; a suite has {', '.join(KEYS)}")
        if not isinstance(value, KEYS[key]):
            raise UserError(f"{path}: {key} cannot be {value!r}")
    if content.get("processes", 1) < 1:
        raise UserError(f"{path}: processes must be at least 1")
    try:
        threshold = share(str(content["threshold"])) if "threshold" in content else None
    except ValueError:
        raise UserError(f"{path}: threshold {content['threshold']!r} is not a share such as 3%") from None
    cases = [_case(path, case) for case in content["cases"]]
    return Suite(path, cases, content.get("processes", 8), threshold, content.get("description", ""))


def _case(path: Path, text: Any) -> list[str]:
    try:
        arguments = shlex.split(text) if isinstance(text, str) else []
    except ValueError as error:
        raise UserError(f"{path}: case {text!r}: {error}") from error
    if not arguments or arguments[0] not in KINDS:
        raise UserError(f"{path}: case {text!r} does not begin with one of {', '.join(KINDS)}")
    return arguments


def this_build() -> Build:
    return Build("new", ROOT, Path(sys.executable))


@dataclass(frozen=True)
class Outcome:
    """result: of all cases that ran, merged. failed: the others, as in the suite."""

    result: dict[str, Any]
    failed: list[str]


def run(
    suite: Suite, builds: Sequence[Build], processes: int, more: Sequence[str], command: Sequence[str]
) -> list[Outcome]:
    """Every case `processes` times on each build, in turns: case by case one build after the other, then the next
    round, so that a slow spell of the machine falls on all alike. more: arguments put before a case's own where it
    works on a device, such as --device. Returns an outcome a build.

    Raises:
        UserError: a build that could run no case at all.
    """
    sides = [Runs(build, round(SPARE * processes * len(suite.cases))) for build in builds]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        for number in range(processes):
            for index, case in enumerate(suite.cases):
                for side in sides:
                    parts = side.parts.setdefault(index, [])
                    if parts is None:
                        continue
                    _say(f"{number + 1}/{processes} {side.build.name}: {shlex.join(case)}")
                    inserted = more if case[0] in DEVICE_KINDS else []
                    part = _measure(side, [case[0], *inserted, *case[1:]], Path(scratch) / "result.json")
                    side.parts[index] = None if part is None else [*parts, part]
    return [_outcome(suite, side, command) for side in sides]


def _outcome(suite: Suite, side: Runs, command: Sequence[str]) -> Outcome:
    parts = [part for some in side.parts.values() for part in some or []]
    if not parts:
        raise UserError(f"{suite.path}: no case ran on {side.build.name}; what they said is above")
    failed = [shlex.join(suite.cases[index]) for index, some in side.parts.items() if some is None]
    return Outcome(results.merge(parts, command), failed)


def _measure(side: Runs, arguments: list[str], out: Path) -> dict[str, Any] | None:
    """The result of one fresh process; None, and a line on stderr, where it fails. One on a busy machine is
    measured again, and the one that had it most for itself is kept: how fast it was plays no part, so no side gains."""
    build, best = side.build, None
    for attempt in range(ATTEMPTS):
        done, others = _process([build.python, "tools/benchmark.py", *arguments, "--out", out], build.root)
        if done.returncode:
            _say(f"error: {build.name}: {shlex.join(arguments)}: exit status {done.returncode}: {_last_line(done)}")
            return None
        if best is None or others < best["others_cpu_share"]:
            best = results.read(out) | {"others_cpu_share": others}
        if best["others_cpu_share"] <= BUSY or attempt == ATTEMPTS - 1 or not side.spare:
            break
        side.spare -= 1
        _say(f"  busy machine, measured again: others used {others:.0%} of its cores")
    return best


def _process(command: Sequence[str | Path], directory: Path) -> tuple[subprocess.CompletedProcess, float]:
    """Runs it, and says which share of the machine's cores others used meanwhile; 0 where the system does not tell (it
    is Linux that does)."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    started, busy, own = time.perf_counter(), _busy_seconds(), _children_seconds()
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    others = _busy_seconds() - busy - (_children_seconds() - own)
    return done, max(0.0, others) / ((time.perf_counter() - started) * (os.cpu_count() or 1))


def _busy_seconds() -> float:
    """CPU seconds that all cores together have worked, what the hypervisor took from them included."""
    if not STATISTICS.exists():
        return 0.0
    user, nice, system, _idle, _wait, interrupts, soft_interrupts, stolen = map(
        int, STATISTICS.read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")


def _children_seconds() -> float:
    """CPU seconds of the finished processes that this one started, and of theirs."""
    times = os.times()
    return times.children_user + times.children_system


def _last_line(done: subprocess.CompletedProcess) -> str:
    return (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()[-1]


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


# ---- another revision


@contextmanager
def other_revision(ref: str, directory: Path | None) -> Iterator[Build]:
    """The revision `ref` of this repository in a worktree and a Python environment of its own, its kernels built.

    directory: where they are kept for the next time; None for a temporary place. The environment sees the packages of
    the one that runs, so that both sides have the same torch; what the revision's requirements.txt wants otherwise is
    installed into it.

    Raises:
        UserError: not a git checkout, no such revision, or a build that failed.
    """
    commit = _git("rev-parse", "--verify", f"{ref}^{{commit}}")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a cancelled CI job cleans up as Ctrl-C does
    place = (directory or Path(tempfile.mkdtemp(prefix="benchmark-base-"))).resolve()
    source, environment = place / "source", place / "environment"
    try:
        place.mkdir(parents=True, exist_ok=True)
        if (source / ".git").exists():
            _command(["git", "-C", source, "checkout", "--quiet", "--detach", "--force", commit], ROOT)
        else:
            _git("worktree", "add", "--force", "--quiet", "--detach", str(source), commit)
        python = _environment(environment)
        if (source / "requirements.txt").read_bytes() != (ROOT / "requirements.txt").read_bytes():
            pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "-r", "requirements.txt"]
            _command(pip, source)
        _say(f"building {ref} ({commit[:12]}) in {source}")
        _command([python, "setup.py", "--quiet", "build_ext", "--inplace"], source)
        yield Build(f"base {commit[:12]}", source, python)
    finally:
        if directory is None:
            shutil.rmtree(place, ignore_errors=True)
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", source], capture_output=True)
        signal.signal(signal.SIGTERM, before)


def _environment(directory: Path) -> Path:
    """A virtual environment that finds the packages of this Python's environment after its own. A .pth file of one
    environment is not read in the other, so an editable install of this checkout does not reach it."""
    python = directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(directory, with_pip=False, symlinks=os.name != "nt")
        # Asked of the environment itself: sysconfig's scheme "venv" is Python 3.11's
        packages = Path(_command([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], directory))
        shared = dict.fromkeys(path for path in sys.path if Path(path).name in ("site-packages", "dist-packages"))
        (packages / "shared.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")
    return python


def check_built() -> None:
    """Raises UserError where sources of the kernels are newer than the kernels: the old ones would be measured."""
    built = [path.stat().st_mtime for path in (ROOT / "maskrcnn_benchmark").glob("_C*.so")]
    changed = [path for path in (ROOT / "csrc").rglob("*.*") if built and path.stat().st_mtime > max(built)]
    if changed:
        raise UserError(
            f"{changed[0].relative_to(ROOT)} is newer than the compiled kernels: python setup.py build_ext --inplace"
        )


def _git(*arguments: str) -> str:
    return _command(["git", "-C", ROOT, *arguments], ROOT)


def _command(command: Sequence[str | Path], directory: Path) -> str:
    """Its stdout; a failure is a UserError with its last line."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {error.strerror}") from error
    if done.returncode:
        raise UserError(f"{shlex.join(map(str, command))} failed: {_last_line(done)}")
    return done.stdout.strip()
