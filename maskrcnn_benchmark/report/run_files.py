"""What a run's directory says about the run, whole or in part: what is missing or damaged is named, not an error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..config import flatten
from ..errors import UserError

# File of a run -> what a report lacks without it
LACKING = {
    "config.yaml": "the configuration",
    "metrics.jsonl": "the curves of losses, speed and memory",
    "evaluations.jsonl": "accuracy over time",
    "result.json": "the final figures: the run has not ended, or was broken off",
}
Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Picture:
    """path: of the file, ground truth on the left, detections on the right; name: its path in predictions/. counts:
    objects, detections and right ones in the image, None where nobody counted."""

    path: Path
    name: str
    counts: tuple[int, int, int] | None

    @property
    def quality(self) -> float:
        """F1: the harmonic mean of precision and recall, 0..1; 1 where there is nothing and nothing was found."""
        objects, detections, right = self.counts or (0, 0, 0)
        return 2 * right / (objects + detections) if objects + detections else 1.0


@dataclass
class RunFiles:
    """metrics, evaluations: column -> [N] float64, a row a line, NaN where a line has no number. details: data set ->
    what `evaluation.score` says for reports, the first set of DATASETS.TEST first. pictures: the worst first. missing:
    what could not be read, in sentences."""

    path: Path
    name: str
    metrics: Columns = field(default_factory=dict)
    evaluations: Columns = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def iterations(self) -> int:
        """Steps that are done, as far as metrics.jsonl says."""
        return int(self.metrics["iter"][-1]) if self.metrics else 0

    def keys(self) -> dict[str, Any]:
        """The configuration with keys such as SOLVER.BASE_LR; empty where it cannot be read."""
        try:
            return dict(flatten(yaml.safe_load(self.config) or {}))
        except (yaml.YAMLError, AttributeError):
            return {}


def read_runs(paths: Sequence[Path]) -> list[RunFiles]:
    """Raises UserError where a path is no run's directory."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [_read_run(path, name) for path, name in zip(paths, names)]


def file_stem(name: str) -> str:
    """What a data set's files in inference/ and predictions/ are called after."""
    return re.sub(r"[^0-9A-Za-z_.-]+", "_", name)


def _read_run(path: Path, name: str) -> RunFiles:
    if not any((path / file).is_file() for file in LACKING):
        raise UserError(f"{path} is no run's directory: it holds none of {', '.join(LACKING)}")
    run = RunFiles(path, name)
    run.config = _text(run, "config.yaml") or ""
    run.metrics = _columns(run, "metrics.jsonl")
    run.evaluations = _columns(run, "evaluations.jsonl")
    run.result = _object(run, "result.json")
    reached = run.result.get("iteration")
    if run.metrics and reached not in (None, run.iterations):
        run.missing.append(
            f"result.json is of iteration {reached}, but metrics.jsonl ends at {run.iterations}: it belongs to another "
            "run, or this one has gone on since; its figures are left out"
        )
        run.result = {}
    run.environment = run.result.get("environment") or {}
    if (path / "environment.json").is_file() and (reached is not None or not run.environment):
        # Of the run's start: the source tree may have changed before it wrote result.json
        run.environment = _object(run, "environment.json") or run.environment
    if not run.environment:
        run.missing.append("environment.json is not there: device, versions and commit")
    if run.evaluations or run.result.get("bbox") or run.result.get("box_proposal"):
        _read_details(run)
        run.pictures = sorted(_pictures(run), key=lambda picture: picture.quality)
        if not run.pictures:
            run.missing.append("predictions/ holds no picture")
    return run


def _text(run: RunFiles, name: str) -> str | None:
    """The file's content; None, said among what is missing, where there is none."""
    try:
        return (run.path / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        run.missing.append(f"{name} is not there: {LACKING.get(name, '')}")
    except (OSError, UnicodeDecodeError) as error:
        run.missing.append(f"{name} cannot be read: {error}")
    return None


def _object(run: RunFiles, name: str) -> dict[str, Any]:
    text = _text(run, name)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        run.missing.append(f"{name} is damaged: {error}")
        return {}
    if not isinstance(content, dict):
        run.missing.append(f"{name} is damaged: it is no JSON object")
        return {}
    return content


def _columns(run: RunFiles, name: str) -> Columns:
    """Of a file with a JSON object a line. Damaged lines, as a killed run's last one, are left out and counted."""
    text = _text(run, name) or ""
    every = [_numbers(line) for line in text.splitlines()]
    lines = [line for line in every if line]
    if len(lines) < len(every):
        first = every.index(None) + 1
        run.missing.append(f"{name}: {len(every) - len(lines)} damaged lines are left out, the first is line {first}")
    keys = dict.fromkeys(key for line in lines for key in line)
    return {key: np.array([line.get(key) for line in lines], dtype=np.float64) for key in keys}


def _numbers(line: str) -> dict[str, float | None] | None:
    """The object on the line; None where it is not one of numbers and nulls with an `iter`."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("iter"), (int, float)):
        return None
    return content if all(value is None or isinstance(value, (int, float)) for value in content.values()) else None


def _read_details(run: RunFiles) -> None:
    """Only of the data sets that the configuration evaluates: others are a former run's."""
    sets = [file_stem(name) for name in run.keys().get("DATASETS.TEST") or ()]
    found = {path.name.removesuffix("_details.json") for path in (run.path / "inference").glob("*_details.json")}
    for name in sets or sorted(found):
        if name in found:
            run.details[name] = _object(run, f"inference/{name}_details.json")
        else:
            run.missing.append(f"inference/{name}_details.json is not there: curves and classes of {name}")


def _pictures(run: RunFiles) -> Iterable[Picture]:
    """Those whose images were counted where any were: others are a former run's."""
    directory = run.path / "predictions"
    counts = {name: {str(row[0]): tuple(row[1:]) for row in of.get("images", ())} for name, of in run.details.items()}
    first = next(iter(counts.values()), {})
    for path in sorted(directory.rglob("*.png")):
        here = counts.get(path.parent.name, first) if path.parent != directory else first
        yield Picture(path, path.relative_to(directory).as_posix(), here.get(path.stem))
