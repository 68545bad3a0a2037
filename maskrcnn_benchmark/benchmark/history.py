"""The results of one machine over time, a JSON line each, and the commits at which a metric stepped."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import flat, get_config
from ..engine.checkpoint import write_atomically
from ..errors import UserError
from . import results
from .compare import SAME_MACHINE, differing, worsening
from .statistics import mann_whitney
from .timing import percentile

# A step is told from this size on, at this certainty over all places where it could have been.
STEP_SIZE, STEP_SIGNIFICANCE = 0.03, 0.002
NEAREST = 10
# Runs that a line of the terminal shows
DRAWN = 80
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Point:
    """One run: when, which commit, and the median of its processes' medians."""

    started: str
    commit: str
    value: float


@dataclass(frozen=True)
class Step:
    """Where a series stepped: the last run before and the first after, the medians of the runs around (up to the
    neighbouring steps), how much worse, as a share, and the p of the difference."""

    index: int
    before: Point
    after: Point
    old: float
    new: float
    change: float
    p: float


@dataclass(frozen=True)
class Series:
    """One gated metric of one case, the same work throughout, oldest first."""

    case: str
    metric: str
    unit: str
    lower_is_better: bool
    points: list[Point] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


def append(path: Path, result: dict[str, Any]) -> None:
    """Adds a result as a line of the machine's file, which is created when missing.

    Raises:
        UserError: the file belongs to another machine, or is damaged.
    """
    lines = read(path) if path.exists() else []
    apart = differing(lines[-1]["environment"], result["environment"], SAME_MACHINE) if lines else ""
    if apart:
        raise UserError(f"{path} is the history of another machine ({apart}): give this one a file of its own")
    about = result["environment"]
    facts = (*SAME_MACHINE, "commit", "dirty", "torch")
    line = {
        "started": result.get("started"),
        "environment": {name: about.get(name) for name in facts},
        "cases": [_condensed(case) for case in result["cases"]],
    }
    text = "".join(json.dumps(one) + "\n" for one in [*lines, line])
    write_atomically(path, lambda file: file.write(text.encode()))


def _condensed(case: dict[str, Any]) -> dict[str, Any]:
    """A case with the medians of its processes in place of the samples, and of its work a fingerprint: of the
    configuration what is not the default, so that a commit that adds a key does not begin another series."""
    config, defaults = case.get("config"), flat(get_config())
    chosen = {key: value for key, value in (config or {}).items() if value != defaults.get(key)}
    chosen = case.get("config_sha256") if config is None else chosen
    work = json.dumps([chosen, case["work"], case.get("warmup")], sort_keys=True)
    metrics = {
        name: {"unit": value["unit"], "better": value["better"], "medians": results.process_medians(value)}
        for name, value in case["metrics"].items()
        if value["gate"]
    }
    digest = hashlib.sha256(work.encode()).hexdigest()[:16]
    return {"kind": case["kind"], "name": case["name"], "dtype": case["dtype"], "work": digest, "metrics": metrics}


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a history, oldest first."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read history {path}: {error.strerror}") from error
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            content = json.loads(line)
            lines.append({name: content[name] for name in ("started", "environment", "cases")})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a line of a benchmark history; take it out") from error
    return lines


def series(lines: list[dict[str, Any]]) -> list[Series]:
    """Every metric's course, with its steps. Where a case's work changed, another series begins."""
    found: dict[tuple, Series] = {}
    for line in lines:
        commit = str(line["environment"].get("commit"))[:12] + ("+" if line["environment"].get("dirty") else "")
        for case in line["cases"]:
            for name, value in case["metrics"].items():
                place = (results.key(case), case["work"], name)
                empty = Series(results.label(results.key(case)), name, value["unit"], value["better"] == "lower")
                one = found.setdefault(place, empty)
                one.points.append(Point(str(line["started"]), commit, percentile(value["medians"], 50)))
    for one in found.values():
        one.steps.extend(steps(one))
    return list(found.values())


def steps(of: Series) -> list[Step]:
    """The steps of a series, oldest first: its best split, then those of either side. Runs are the samples, one value
    each: what a machine's mood moves from run to run must not pass for a step."""
    values = [point.value for point in of.points]
    bounds = [0, *_splits(values, 0), len(values)]
    found = []
    for low, middle, high in zip(bounds, bounds[1:], bounds[2:]):
        old, new = percentile(values[low:middle], 50), percentile(values[middle:high], 50)
        p = _p(values[low:middle], values[middle:high])
        change = worsening(old, new, of.lower_is_better)
        found.append(Step(middle, of.points[middle - 1], of.points[middle], old, new, change, p))
    return found


def _splits(values: list[float], offset: int) -> list[int]:
    """Where the values step: the split with the smallest p, and those within either part. A split is tested with all
    runs before and after it and with the nearest ten, for another step behind them must not hide it. p counts for as
    many tests as there are (Bonferroni), so it takes some 18 runs to find a step in the middle."""
    windows = [(at, width) for at in range(1, len(values)) for width in (NEAREST, len(values))]
    if not windows:
        return []
    p, at = min((_p(values[max(0, at - width) : at], values[at : at + width]), at) for at, width in windows)
    at = _place(values, at)
    old, new = percentile(values[max(0, at - NEAREST) : at], 50), percentile(values[at : at + NEAREST], 50)
    if p * len(windows) >= STEP_SIGNIFICANCE or abs(worsening(old, new, True)) <= STEP_SIZE:
        return []
    return [*_splits(values[:at], offset), offset + at, *_splits(values[at:], offset + at)]


def _place(values: list[float], at: int) -> int:
    """The split near `at` whose parts lie closest to their medians. Ranks say that there is a step, but not exactly
    where: the first run after it may be the one that is nearest to the runs before, and would pass for one of them."""
    low, high = max(0, at - NEAREST), min(len(values), at + NEAREST)

    def spread(split: int) -> float:
        parts = values[low:split], values[split:high]
        return sum(abs(value - percentile(part, 50)) for part in parts for value in part)

    return min(range(max(1, at - NEAREST // 2), min(len(values), at + NEAREST // 2 + 1)), key=spread)


def _p(before: list[float], after: list[float]) -> float:
    return min(mann_whitney(after, before), mann_whitney(before, after))


def sparkline(values: list[float]) -> str:
    """The values as blocks of eight heights, lowest to highest; a constant lies in the middle."""
    low, high = min(values), max(values)
    if low == high:
        return BLOCKS[3] * len(values)
    return "".join(BLOCKS[round((value - low) / (high - low) * (len(BLOCKS) - 1))] for value in values)


def describe(of: Series) -> list[str]:
    """A series as lines for the terminal: what it is, its latest runs as blocks, and under the first run after a step
    an arrow with its size and commit. Earlier steps have a line without an arrow."""
    values, first = [point.value for point in of.points], max(0, len(of.points) - DRAWN)
    shown = values[first:]
    runs = f"{len(values)} runs" + (f", the last {DRAWN} drawn" if first else "")
    days = f"{of.points[first].started[:10]} to {of.points[-1].started[:10]}"
    lines = [
        f"{of.case} · {of.metric}: {values[-1]:.4g} {of.unit} now, {min(shown):.4g} to {max(shown):.4g};"
        f" {runs}, {days}" + ("" if of.steps else ", no step"),
        f"  {sparkline(shown)}",
    ]
    for step in of.steps:
        arrow = " " * (step.index - first) + "^" if step.index >= first else "earlier:"
        lines.append(
            f"  {arrow} {step_words(step)} at commit {step.after.commit} ({step.after.started[:10]}), after"
            f" {step.before.commit}: {step.old:.4g} -> {step.new:.4g} {of.unit}, p {step.p:.2g}"
        )
    return lines


def step_words(step: Step) -> str:
    return f"{abs(step.change):.1%} {'worse' if step.change > 0 else 'better'}"
