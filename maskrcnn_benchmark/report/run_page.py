"""report.html: a run, or several side by side, on one page that needs no other file, made from runs' directories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..data.images import read_image
from ..engine.checkpoint import write_atomically
from ..errors import DataError
from . import accuracy
from .charts import Line, bars, fences, line_chart, quantity
from .contact_sheet import inline, shrink
from .page import document, environments, table
from .run_files import Columns, Picture, RunFiles, read_runs

FILE = "report.html"
# Longest side of a picture in pixels; together they take no more than so many characters
_SIDE, _ALL_PICTURES = 900, 2_000_000
# task -> its name, and the score that stands for it
_TASKS = {"box_proposal": ("Proposals", "AR@1000"), "bbox": ("Box", "AP"), "segm": ("Mask", "AP")}
_TASKS |= {"keypoints": ("Keypoint", "AP"), "voc07": ("VOC 2007 box", "AP50"), "voc": ("VOC box", "AP50")}
_TASKS |= {"cityscapes": ("Cityscapes mask", "AP")}
_STYLE = (
    accuracy.STYLE
    + """
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(50% - 5px,11.5rem),1fr));gap:10px;margin:12px 0}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px 12px}
.facts b{display:block;font-size:1.05rem;font-variant-numeric:tabular-nums}
.facts span{color:var(--soft);font-size:.87rem}
.pictures.pairs{grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr))}
.pictures.pairs img{width:100%}
.pictures summary{list-style:none;cursor:zoom-in}.pictures summary::-webkit-details-marker{display:none}
.pictures details[open]{grid-column:1/-1;overflow-x:auto}.pictures details[open] img{max-width:none;width:auto}
pre{overflow-x:auto;font-size:.85rem}ul{padding-left:1.2rem;overflow-wrap:anywhere}h1{overflow-wrap:anywhere}
"""
)


def write(directories: Sequence[Path], path: Path) -> None:
    """The page of these runs' directories as `path`, whole or not at all. Raises UserError."""
    content = page(read_runs(directories))
    write_atomically(path, lambda file: file.write(content.encode()))


def page(runs: Sequence[RunFiles]) -> str:
    """HTML of one run, or of several that are compared."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    parts = [f"<h1>{escape(title)}</h1>", *_subtitles(runs), _summary(runs), _missing(runs)]
    for heading, make in _SECTIONS.items():
        if body := make(runs):
            parts.append(f"<h2>{heading}</h2>{body}")
    return document(title, "\n".join(parts), _STYLE)


def _subtitles(runs: Sequence[RunFiles]) -> list[str]:
    lines = []
    for color, run in enumerate(runs):
        about = run.environment
        devices = f"{about.get('world_size', 1)} x {about.get('device_name')} ({about.get('device')})" if about else ""
        commit = f"commit {str(about.get('commit'))[:12]}{', changed since' if about.get('dirty') else ''}"
        key = f'<span class="key {_color(color)}">{escape(run.name)}</span> ' if len(runs) > 1 else ""
        facts = (devices, commit if about else "", _when(run.path), str(run.path))
        lines.append(f'<p class="soft">{key}{escape(" · ".join(fact for fact in facts if fact))}</p>')
    return lines


def _when(directory: Path) -> str:
    """From the first to the last time that log.txt tells."""
    try:
        with open(directory / "log.txt", encoding="utf-8", errors="replace") as file:
            stamps = [line[:19] for line in file if line[:2] == "20" and line[4:5] == "-" and line[13:14] == ":"]
    except OSError:
        return ""
    return f"{stamps[0]} to {stamps[-1]}" if stamps else ""


# ---- figures


@dataclass(frozen=True)
class Fact:
    """value: None where it is not known. show: value -> words with the unit. relative: whether per cent tell how it
    differs from another's, and not the difference itself."""

    name: str
    value: float | None
    show: Callable[[float], str]
    relative: bool = True


def facts(run: RunFiles) -> list[Fact]:
    """The figures that a run is judged by."""
    performance = run.result.get("performance") or {}
    trained = bool((performance.get("step_ms") or {}).get("p50"))
    speed = performance if trained else {}
    wait = speed.get("data_wait_share")
    memory = performance.get("max_memory_mb") or _last(run.metrics, "max_memory_mb")
    shown = [
        Fact(f"{_TASKS[task][0]} {_TASKS[task][1]}", value, _score, relative=False)
        for task, value in _scores(run).items()
    ]
    shown += [
        Fact("Training speed", speed.get("images_per_second") or _training_speed(run.metrics), _in("images/s")),
        Fact("Evaluation speed", None if trained else performance.get("images_per_second"), _in("images/s")),
        Fact("Step, median", (speed.get("step_ms") or {}).get("p50"), _in("ms")),
        Fact("Step, 99th percentile", (speed.get("step_ms") or {}).get("p99"), _in("ms")),
        Fact("Waiting for data", None if wait is None else 100 * wait, lambda value: f"{value:.1f} % of time"),
        Fact("Peak memory", memory, _in("MB")),
        Fact("Iterations", run.iterations or None, lambda value: f"{value:,.0f}"),
        Fact("Training time", float(_seconds(run.metrics).sum()) or None, _duration),
        Fact("Last evaluation", performance.get("eval_seconds") or _last(run.evaluations, "eval_seconds"), _duration),
    ]
    return shown


def _scores(run: RunFiles) -> dict[str, float | None]:
    """Task -> AP, or the proposals' recall: of result.json, else of the last evaluation."""
    tasks = {task: (run.result.get(task) or {}).get(name) for task, (_, name) in _TASKS.items() if run.result.get(task)}
    return tasks or {
        task: _last(run.evaluations, f"{task}/{name}")
        for task, (_, name) in _TASKS.items()
        if f"{task}/{name}" in run.evaluations
    }


def _seconds(metrics: Columns) -> np.ndarray:
    """[N] that the steps behind each line took, evaluations left out."""
    if "time" not in metrics:
        return np.zeros(0)
    return np.nan_to_num(metrics["time"]) * np.diff(metrics["iter"], prepend=0.0)


def _training_speed(metrics: Columns) -> float | None:
    """Images a second over all lines, but the first, which has the warm-up."""
    seconds = _seconds(metrics)[1:]
    if not seconds.sum() or "images_per_second" not in metrics:
        return None
    return float((np.nan_to_num(metrics["images_per_second"][1:]) * seconds).sum() / seconds.sum())


def _last(columns: Columns, name: str) -> float | None:
    known = columns[name][np.isfinite(columns[name])] if name in columns else np.zeros(0)
    return float(known[-1]) if len(known) else None


def _score(value: float | None) -> str:
    return "n/a" if value is None or np.isnan(value) else f"{value:.4f}"


def _in(unit: str) -> Callable[[float], str]:
    return lambda value: quantity(value, unit)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes} min {left} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def _summary(runs: Sequence[RunFiles]) -> str:
    if len(runs) == 1:
        known = [fact for fact in facts(runs[0]) if fact.value is not None]
        tiles = [f"<div><span>{fact.name}</span><b>{fact.show(fact.value)}</b></div>" for fact in known]
        return f'<div class="facts">{"".join(tiles)}</div>'
    by_name = [{fact.name: fact for fact in facts(run)} for run in runs]
    rows = []
    names = dict.fromkeys(name for side in by_name for name in side)
    for name in sorted(names, key=lambda name: any(side[name].relative for side in by_name if name in side)):
        sides = [side.get(name) for side in by_name]
        if any(fact and fact.value is not None for fact in sides):
            first = sides[0].value if sides[0] else None
            rows.append([name, *(_cell(fact, first if n else None) for n, fact in enumerate(sides))])
    note = '<p class="soft">In brackets: change from the first run. A run each: small differences may be chance.</p>'
    return f"<section>{table(['', *(run.name for run in runs)], rows, 1, last=0)}{note}</section>"


def _cell(fact: Fact | None, first: float | None) -> str:
    if fact is None or fact.value is None:
        return "-"
    if first and fact.relative:
        return f"{fact.show(fact.value)} ({fact.value / first - 1:+.1%})"
    return fact.show(fact.value) + ("" if fact.relative or first is None else f" ({fact.value - first:+.4f})")


def _missing(runs: Sequence[RunFiles]) -> str:
    several = len(runs) > 1
    said = [f"{run.name}: {sentence}" if several else sentence for run in runs for sentence in run.missing]
    rows = "".join(f"<li>{escape(sentence)}</li>" for sentence in said)
    return f'<section><h3 class="unsure">What is missing</h3><ul>{rows}</ul></section>' if said else ""


# ---- curves


def _color(number: int) -> str:
    return f"c{number % 6}"


def _curves(
    runs: Sequence[RunFiles],
    title: str,
    unit: str,
    column: str,
    factor: float = 1.0,
    of: str = "metrics",
    fenced: bool = False,
) -> str:
    """A chart with a line for each run. fenced: the axis ends at the far fences, lest a first slow step flatten all."""
    lines = []
    for color, run in enumerate(runs):
        columns: Columns = getattr(run, of)
        if column in columns:
            name = run.name if len(runs) > 1 else ""
            lines.append(Line.thinned(name, columns["iter"], columns[column] * factor, color % 6))
    lines = [line for line in lines if len(line.y)]
    limits = fences(np.concatenate([line.y for line in lines])) if fenced and lines else None
    return line_chart(title, unit, lines, "iteration", limits)


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _grid(charts: Sequence[str]) -> str:
    drawn = "".join(charts)
    return f'<section class="charts">{drawn}</section>' if drawn else ""


def _accuracy(runs: Sequence[RunFiles]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.evaluations if "/" in name)
    charts = []
    for task, (title, main) in _TASKS.items():
        if len(runs) == 1 and task != "box_proposal":
            columns = {name: runs[0].evaluations[name] for name in names if name.startswith(f"{task}/")}
            at = runs[0].evaluations.get("iter")
            lines = [Line.thinned(name.partition("/")[2], at, y, n) for n, (name, y) in enumerate(columns.items())]
            charts.append(line_chart(f"{title} AP", "0 to 1", lines, "iteration"))
        else:
            charts.append(_curves(runs, f"{title} {main}", "0 to 1", f"{task}/{main}", of="evaluations"))
    return _grid(charts) + _evaluations(runs)


def _evaluations(runs: Sequence[RunFiles]) -> str:
    """Every evaluation in figures."""
    parts = []
    for run in runs:
        columns = run.evaluations
        if columns:
            rows = [
                [f"{value:.0f}" if name == "iter" else _score(value) for name, value in zip(columns, row)]
                for row in zip(*columns.values())
            ]
            names = [{"iter": "iteration", "eval_seconds": "seconds"}.get(name, name) for name in columns]
            parts.append(_folded(f"Evaluations of {run.name}", table(names, rows, 0, last=0)))
    return "".join(parts)


def _losses(runs: Sequence[RunFiles]) -> str:
    charts = [_curves(runs, "Loss, the sum", "no unit", "loss")]
    parts = dict.fromkeys(name for run in runs for name in run.metrics if name.startswith("loss_"))
    if len(runs) == 1:
        metrics = runs[0].metrics
        lines = [
            Line.thinned(name.removeprefix("loss_"), metrics["iter"], metrics[name], n % 6)
            for n, name in enumerate(parts)
        ]
        plain = [Line(line.name, line.x, line.y, line.color) for line in lines]  # bands would hide each other
        charts.append(line_chart("Its parts", "no unit", plain, "iteration"))
    else:
        charts += [_curves(runs, name, "no unit", name) for name in parts]
    charts.append(_curves(runs, "Learning rate", "no unit", "lr"))
    return _grid(charts)


def _speed(runs: Sequence[RunFiles]) -> str:
    charts = [_curves(runs, "Throughput", "images/s over all devices", "images_per_second", fenced=True)]
    if len(runs) == 1:
        charts.append(_step_time(runs[0].metrics))
    else:
        charts.append(_curves(runs, "Step", "ms", "time", 1000, fenced=True))
        for column, name in {"data_time": "waiting for data", **_PHASES}.items():
            charts.append(_curves(runs, name.capitalize(), "ms a step", column, 1000, fenced=True))
    charts.append(_curves(runs, "Peak memory so far", "MB a device", "max_memory_mb"))
    return _grid(charts) + "".join(_where_time_went(run, len(runs) > 1) for run in runs)


# column of metrics.jsonl -> what it is called, from the bottom of a step to its top
_PHASES = {"forward_time": "forward", "backward_time": "backward", "optimizer_time": "optimizer"}
_BETWEEN = {"log_time": "logs and reports", "checkpoint_time": "checkpoints"}


def _breakdown(metrics: Columns) -> dict[str, np.ndarray]:
    """Part of a step -> [N] seconds, lines without a number as 0. Together they are the step: where the device works
    while the host waits for data, only what the wait adds to the device's phases counts."""
    if not {"time", "data_time"} <= metrics.keys():
        return {}
    parts = {name: np.nan_to_num(metrics[column]) for column, name in _PHASES.items() if column in metrics}
    left = np.maximum(0.0, np.nan_to_num(metrics["time"]) - sum(parts.values()))
    parts["waiting for data"] = np.minimum(left, np.nan_to_num(metrics["data_time"]))
    parts["all else" if len(parts) > 1 else "computing"] = left - parts["waiting for data"]
    return parts


def _step_time(metrics: Columns) -> str:
    """A step's parts as areas on each other."""
    areas, low = [], 0.0
    for color, (name, seconds) in enumerate(_breakdown(metrics).items()):
        part = Line.thinned(name, metrics["iter"], seconds * 1000, color)
        high = low + part.y
        areas.append(Line(name, part.x, high, color, np.broadcast_to(low, high.shape), high, told=part.y))
        low = high
    return line_chart("Step time", "ms", areas, "iteration", (0.0, fences(low)[1])) if areas and len(low) else ""


def _where_time_went(run: RunFiles, several: bool) -> str:
    """Seconds of the whole run: the parts of its steps, and what was between them."""
    steps = np.diff(run.metrics["iter"], prepend=0.0) if run.metrics else np.zeros(0)
    between = {name: np.nan_to_num(run.metrics[column]) for column, name in _BETWEEN.items() if column in run.metrics}
    parts = {name: float((seconds * steps).sum()) for name, seconds in (_breakdown(run.metrics) | between).items()}
    parts["evaluating"] = float(np.nansum(run.evaluations.get("eval_seconds", np.zeros(0))))
    total = sum(parts.values())
    if not total:
        return ""
    rows = [(name, value / total, f"{_duration(value)}, {value / total:.1%}") for name, value in parts.items()]
    name = f": {escape(run.name)}" if several else ""
    return f"<section><h3>Where the time went{name}</h3>{bars(rows)}</section>"


# ---- accuracy in detail, pictures


def _details(runs: Sequence[RunFiles]) -> str:
    if len(runs) == 1:
        sets = runs[0].details
        return "".join(
            (f"<h3>{escape(name)}</h3>" if len(sets) > 1 else "") + accuracy.sections(details)
            for name, details in sets.items()
        )
    names = dict.fromkeys(name for run in runs for name in run.details)
    return "".join(_compared(runs, name, task) for name in names for task in accuracy.TASKS)


def _compared(runs: Sequence[RunFiles], name: str, task: str) -> str:
    """Precision-recall curves and classes of one data set and task, the runs' side by side."""
    sides = {run.name: run.details.get(name, {}).get(task) for run in runs}
    if not any(sides.values()):
        return ""
    curves = {side: content["curves"]["mean"] for side, content in sides.items() if content}
    classes = dict.fromkeys(one for content in sides.values() if content for one in content["classes"])
    rows = []
    for one in classes:
        values = [((content or {}).get("classes", {}).get(one) or {}).get("AP") for content in sides.values()]
        if any(value is not None for value in values):
            rows.append([escape(one), *map(_score, values)])
    title = escape(f"{accuracy.TASKS[task]}, {name}")
    listed = table(["AP of", *sides], rows, 1, last=0)
    folded = _folded("AP of each class, 0 to 1", listed)
    return f"<section><h3>{title}</h3>{accuracy.curves_chart(curves)}{folded}</section>"


def _pictures(runs: Sequence[RunFiles]) -> str:
    """The worst first; of several runs the same image's pictures follow each other."""
    by_name: dict[str, list[tuple[RunFiles, Picture]]] = {}
    for run in runs:
        for picture in run.pictures:
            by_name.setdefault(picture.name, []).append((run, picture))
    order = sorted(by_name.values(), key=lambda shown: min(picture.quality for _, picture in shown))
    figures, size, left = [], 0, len(order)
    for shown in order:
        drawn = [_figure(picture, run.name if len(runs) > 1 else "") for run, picture in shown]
        size += sum(map(len, drawn))
        if size > _ALL_PICTURES:
            break
        figures += drawn
        left -= 1
    if not order:
        return ""
    more = f" {left} more images are in predictions/." if left else ""
    judged = any(picture.counts for shown in order for _, picture in shown)
    said = "what was found on the right"
    if judged:
        said = "detections of score .5 or more on the right; the worst by F1 at an IoU of .5 first"
    return (
        f'<p class="soft">Ground truth on the left, {said}. A click enlarges.{more}</p>'
        f'<div class="pictures pairs">{"".join(figures)}</div>'
    )


def _figure(picture: Picture, of: str) -> str:
    said = f"{of}: {picture.name}" if of else picture.name
    if picture.counts:
        objects, detections, right = picture.counts
        said += f": {right} of {objects} objects right, {detections - right} false detections, F1 {picture.quality:.2f}"
    try:
        shown = f'<img alt="{escape(said, quote=True)}" src="{inline(shrink(read_image(picture.path), _SIDE))}">'
    except DataError as error:
        shown = f'<p class="bad">{escape(str(error))}</p>'
    caption = f"<figcaption>{escape(said)}</figcaption>"
    return f"<details><summary><figure>{shown}{caption}</figure></summary></details>"


# ---- configuration, environment


def _configuration(runs: Sequence[RunFiles]) -> str:
    parts = []
    if len(runs) > 1:
        sides = [run.keys() for run in runs]
        names = sorted({name for side in sides for name in side})
        rows = [
            [f"<code>{escape(name)}</code>", *(f"<code>{escape(str(side.get(name)))}</code>" for side in sides)]
            for name in names
            if len({str(side.get(name)) for side in sides}) > 1 and name != "OUTPUT_DIR"
        ]
        same = '<p class="soft">The configurations are the same.</p>'
        parts.append(table(["", *(run.name for run in runs)], rows, len(runs) + 1) if rows else same)
    for run in runs:
        if run.config:
            parts.append(_folded(f"config.yaml of {run.name}", f"<pre>{escape(run.config)}</pre>"))
    return "".join(parts)


def _environment(runs: Sequence[RunFiles]) -> str:
    sides: dict[str, dict[str, Any]] = {run.name: run.environment for run in runs if run.environment}
    return environments(sides) if sides else ""


_SECTIONS: dict[str, Callable[[Sequence[RunFiles]], str]] = {
    "Accuracy over time": _accuracy,
    "Losses and learning rate": _losses,
    "Speed and memory": _speed,
    "Accuracy of the last evaluation": _details,
    "Predictions": _pictures,
    "Configuration": _configuration,
    "Environment": _environment,
}
