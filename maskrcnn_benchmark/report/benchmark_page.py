"""Benchmark results and verdicts for people: lines for the terminal, Markdown, and a self-contained HTML page.

The page loads no script, font or picture, so it opens from disk and from a CI's artefacts, wide or narrow, in light and
in dark. Distributions and history are inline SVG whose coordinates are per cent of the width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..benchmark import results
from ..benchmark.compare import (
    FASTER,
    MISSING,
    NOT_COMPARABLE,
    REGRESSION,
    SETUP_METRICS,
    UNCLEAR,
    Comparison,
    Finding,
)
from ..benchmark.history import Series, step_words
from ..benchmark.timing import percentile
from ..engine.checkpoint import write_atomically
from ..errors import UserError, visible
from .charts import Line, Scale, fences, line_chart, quantity, x_axis
from .page import FACTS, document, environments, table

FORMATS = (".md", ".html", ".json")
HEADER = ("case", "metric", "base", "new", "change", "p", "verdict")
RESULT_HEADER = ("case", "metric", "p50", "p90", "p99", "samples")
# More samples than this are drawn thinned out; all of them count.
DOTS = 300
LEGEND = "A dot is a sample, a tick above the dots the median of a process. Verdicts compare the medians of processes."
MARKS = {REGRESSION: "bad", MISSING: "bad", NOT_COMPARABLE: "unsure", UNCLEAR: "unsure", FASTER: "good"}


def check_path(path: Path) -> None:
    """Raises UserError, before anything long begins, where no report can be written to `path`."""
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: a report is .md, .html or .json")
    if not path.resolve().parent.is_dir():
        raise UserError(f"{path}: there is no directory {path.parent}")


def write(
    path: Path,
    new: dict[str, Any],
    base: dict[str, Any] | None = None,
    comparison: Comparison | None = None,
    past: Sequence[Series] = (),
) -> None:
    """The report on a result, and on its comparison with a base; the suffix of `path` says in which form."""
    if path.suffix == ".html":
        content = html(new, base, comparison, past)
    elif path.suffix == ".md":
        content = markdown(new, comparison)
    else:
        content = json.dumps(comparison.as_json() if comparison else new, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(content.encode()))


# ---- words


def _cells(finding: Finding) -> list[str]:
    change = "-" if finding.change is None else f"{finding.change:+.1%}"
    p = "-" if finding.p is None else f"{finding.p:.2g}"
    sides = [quantity(value, finding.unit) for value in (finding.base, finding.new)]
    verdict = f"{finding.verdict}: {finding.note}" if finding.note else finding.verdict
    return [finding.case, finding.metric or "-", *sides, change, p, verdict]


def _result_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    for case in result["cases"]:
        for name, value in case["metrics"].items():
            quantiles = [quantity(percentile(value["samples"], q), value["unit"]) for q in (50, 90, 99)]
            count = len(results.processes(value))
            samples = f"{len(value['samples'])} in {count} process{'es' if count > 1 else ''}"
            yield [results.label(results.key(case)), name, *quantiles, samples]


def verdict_line(comparison: Comparison) -> str:
    """The verdict in a sentence, with what to do."""
    if comparison.verdict == REGRESSION:
        found = sum(finding.verdict in (REGRESSION, MISSING) for finding in comparison.findings)
        return f"REGRESSION: {found} of {len(comparison.findings)} metrics are worse or missing"
    if comparison.verdict == NOT_COMPARABLE:
        return "NOT COMPARABLE: measure both sides alike"
    if comparison.unclear:
        return (
            f"FINE: none of {len(comparison.findings)} metrics is surely worse; more processes would tell of the rest"
        )
    return f"FINE: none of {len(comparison.findings)} metrics is worse"


def rule(comparison: Comparison) -> str:
    limits = comparison.limits
    return (
        f"worse by more than {limits.threshold:.1%} in the median and Mann-Whitney"
        f" p < {limits.significance:g}; memory {limits.memory:.1%}; change is in time per work, + is worse"
    )


def text(comparison: Comparison) -> str:
    """The findings as a table for the terminal, the remarks, and the verdict last."""
    rows = [list(HEADER), *(_cells(finding) for finding in comparison.findings)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER) - 1)]
    lines = [
        "  ".join(
            [
                *(
                    cell.ljust(width) if n < 2 else cell.rjust(width)
                    for n, (cell, width) in enumerate(zip(row, widths))
                ),
                row[-1],
            ]
        )
        for row in rows
    ]
    return "\n".join([*lines, *comparison.remarks, f"rule: {rule(comparison)}", verdict_line(comparison)])


def markdown(new: dict[str, Any], comparison: Comparison | None = None) -> str:
    lines = ["# Benchmark", ""]
    if comparison:
        lines += [f"**{_plain(verdict_line(comparison))}**", ""]
        lines += _table(HEADER, [_cells(finding) for finding in comparison.findings])
        lines += ["", f"Rule: {rule(comparison)}.", *(f"- {_plain(remark)}" for remark in comparison.remarks), ""]
    lines += _table(RESULT_HEADER, list(_result_rows(new)))
    lines += ["", *(f"- {name}: {_plain(str(new['environment'].get(name)))}" for name in FACTS), ""]
    return "\n".join(lines)


def _plain(value: str) -> str:
    """Text that Markdown leaves as it is, and that a terminal shows."""
    return "".join(f"\\{letter}" if letter in "\\|`*_<>[]" else letter for letter in visible(value))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [list(header), ["---"] * len(header), *([_plain(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


# ---- the page


def html(
    new: dict[str, Any],
    base: dict[str, Any] | None = None,
    comparison: Comparison | None = None,
    past: Sequence[Series] = (),
) -> str:
    title = verdict_line(comparison) if comparison else "Benchmark"
    sections = [f"<h1>{_headline(comparison)}</h1>", _subtitle(new)]
    if comparison:
        sections += [f'<p class="soft">Rule: {escape(rule(comparison))}.</p>']
        sections += [f"<p>{escape(remark)}</p>" for remark in comparison.remarks]
        sections += ["<h2>Verdicts</h2>", table(HEADER, [_marked(finding) for finding in comparison.findings], 2)]
    sections += ["<h2>Cases</h2>", f'<p class="soft">{LEGEND}</p>', *_cases(new, base)]
    sides = {side: result["environment"] for side, result in (("base", base), ("new", new)) if result}
    if past:
        sections += ["<h2>History</h2>", *(_course(series) for series in past)]
    sections += ["<h2>Where it was measured</h2>", environments(sides)]
    return document(title, "\n".join(sections))


def _headline(comparison: Comparison | None) -> str:
    if comparison is None:
        return "Benchmark"
    mark = MARKS.get(UNCLEAR if comparison.unclear else comparison.verdict, "good")
    return f'<span class="{mark}">{escape(verdict_line(comparison))}</span>'


def _subtitle(new: dict[str, Any]) -> str:
    about = new["environment"]
    facts = (new.get("started"), about.get("device_name"), f"commit {str(about.get('commit'))[:12]}")
    return f'<p class="soft">{escape(" · ".join(str(fact) for fact in facts if fact))}</p>'


def _marked(finding: Finding) -> list[str]:
    """The cells as HTML, the verdict in its colour."""
    *cells, verdict = (escape(cell) for cell in _cells(finding))
    mark = MARKS.get(finding.verdict)
    return [*cells, f'<span class="{mark}">{verdict}</span>' if mark else verdict]


def _cases(new: dict[str, Any], base: dict[str, Any] | None) -> Iterator[str]:
    before = results.by_key(base) if base else {}
    for key, case in results.by_key(new).items():
        old = before.get(key, {"metrics": {}})
        figures = [
            _distribution(name, value, old["metrics"].get(name))
            for name, value in case["metrics"].items()
            if value["gate"] or name in SETUP_METRICS
        ]
        rows = [[escape(cell) for cell in row[1:]] for row in _result_rows({"cases": [case]})]
        work = ", ".join(f"{name} {value}" for name, value in case["work"].items())
        yield (
            f"<section><h3>{escape(results.label(key))}</h3>{''.join(figures)}<details><summary>All figures</summary>"
            f'{table(RESULT_HEADER[1:], rows, 1)}<p class="soft">{escape(work)}</p></details></section>'
        )


# ---- drawings


def _distribution(name: str, new: dict[str, Any], base: dict[str, Any] | None) -> str:
    """A metric's samples as dots, the medians of its processes as ticks above them, base over new. The axis ends at
    Tukey's far fence, lest a straggler flatten the rest; what lies beyond is drawn at its end."""
    sides = [(side, value) for side, value in (("base", base), ("new", new)) if value]
    samples = [sample for _, value in sides for sample in value["samples"]]
    medians = [median for _, value in sides for median in results.process_medians(value)]
    low, high = fences(samples)
    scale = Scale(min([low, *medians]), max([high, *medians]))
    beyond = sum(not scale.low <= sample <= scale.high for sample in samples)
    bottom = 36 * len(sides) + 6
    parts = list(x_axis(scale, bottom, new["unit"]))
    for row, (side, value) in enumerate(sides):
        parts += _strip(side, value, scale, 36 * row)
    better = f"{new['better']} is better"
    said = ", ".join(
        ("of " + side + " " if base else "") + quantity(percentile(results.process_medians(value), 50), value["unit"])
        for side, value in sides
    )
    caption = f"<b>{escape(name)}</b> ({escape(better)}): median {escape(said)}"
    caption += f"; {beyond} of {len(samples)} samples lie beyond the axis, at its ends" if beyond else ""
    picture = f'<svg height="{bottom + 22}" role="img" aria-label="{escape(f"{name}: {said}", quote=True)}">'
    return f"<figure><figcaption>{caption}</figcaption>{picture}{''.join(parts)}</svg></figure>"


def _strip(side: str, value: dict[str, Any], scale: Scale, top: int) -> Iterator[str]:
    drawn = value["samples"][:: math.ceil(len(value["samples"]) / DOTS)]
    for number_, sample in enumerate(drawn):
        y = top + 22 + 9 * ((number_ * 0.618) % 1)  # spread by the golden ratio, so that equal samples stay apart
        yield f'<circle class="sample dot-{side}" cx="{scale.percent(sample)}%" cy="{y:.1f}" r="2.2"/>'
    for process, median in enumerate(results.process_medians(value), start=1):
        x = scale.percent(median)
        yield (
            f'<line class="median median-{side}" x1="{x}%" x2="{x}%" y1="{top + 8}" y2="{top + 19}"><title>{side}, '
            f"process {process}: {escape(quantity(median, value['unit']))}</title></line>"
        )
    yield f'<text x="-72" y="{top + 22}">{side}</text>'


def _course(series: Series) -> str:
    """A series over its runs, with the days of the first and the last, and a dashed line at each step."""
    values = np.array([point.value for point in series.points])
    words = [f"{point.started} {point.commit}: {quantity(point.value, series.unit)}" for point in series.points]
    said = "; ".join(f"{step_words(step)} at commit {step.after.commit}" for step in series.steps) or "no step"
    chart = line_chart(
        f"{series.case} · {series.metric}",
        series.unit,
        [Line("", np.arange(len(values), dtype=np.float64), values, words=words)],
        "run",
        marks=[step.index - 0.5 for step in series.steps],
        ends=(series.points[0].started[:10], series.points[-1].started[:10]),
        said=f", {len(values)} runs: {said}",
        height=110,
    )
    return f"<section>{chart}</section>"
