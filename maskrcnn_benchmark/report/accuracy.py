"""The accuracy of one data set's results as HTML: precision-recall curves, classes, which is taken for which."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from .charts import Line, bars, line_chart
from .page import document, table

# Classes that a picture of a confusion matrix shows; more would be unreadable
_MOST_CLASSES = 30
TASKS = {"bbox": "Boxes", "segm": "Masks", "keypoints": "Keypoints"}
_CONFUSION = (
    '<p class="soft">Rows: what the object is; columns: what it was taken for, at a score and an IoU of .5 at least. '
    "Numbers count objects; the stronger the colour, the greater their share of the row.</p>"
)
STYLE = """
svg.confusion{width:auto;margin:0;overflow:visible}.confusion text{fill:var(--ink)}.confusion .count{font-size:9px}
.confusion .strong{fill:var(--page)}.share{fill:var(--new);stroke:var(--line)}
"""


def accuracy_page(title: str, details: dict[str, Any]) -> str:
    """A self-contained HTML page of `evaluation.score`'s details."""
    return document(title, f"<h1>{escape(title)}</h1>{sections(details)}", STYLE)


def sections(details: dict[str, Any]) -> str:
    """For each task curves and a table of the classes; the confusion."""
    parts = []
    for task, name in TASKS.items():
        if task in details:
            curves, classes = details[task]["curves"], details[task]["classes"]
            parts.append(
                f"<section><h3>{name}</h3>{curves_chart(curves)}{class_bars(classes)}"
                f"<details><summary>All figures of the classes</summary>{_class_table(classes)}</details></section>"
            )
    if "confusion" in details:
        picture = confusion_svg(**details["confusion"])
        parts.append(f'<section><h3>What is taken for what</h3>{_CONFUSION}<div class="wide">{picture}</div></section>')
    return "".join(parts)


def curves_chart(curves: dict[str, list[float]]) -> str:
    """Precision over recall. curves: name -> precision at equally spaced recall from 0 to 1."""
    lines = [
        Line(f"{name}, area {np.mean(values):.3f}", np.linspace(0, 1, len(values)), np.array(values), color)
        for color, (name, values) in enumerate(curves.items())
    ]
    return line_chart("Precision", "share of detections that are right", lines, "recall", limits=(0.0, 1.0), height=220)


def class_bars(classes: dict[str, Any]) -> str:
    """AP of each class, the worst first; classes without an object are left out."""
    judged = sorted((numbers["AP"], name) for name, numbers in classes.items() if numbers["AP"] is not None)
    if not judged:
        return '<p class="soft">No class has an object to judge by.</p>'
    rows = [(name, ap, f"AP {ap:.3f}") for ap, name in judged]
    return f'<p class="soft">AP of each class, 0 to 1, the worst first</p>{bars(rows)}'


def confusion_svg(names: list[str], matrix: list[list[int]]) -> str:
    """Rows: what the object is; columns: what it was taken for, as shares of the row. Of many classes the most frequent
    ones are shown."""
    often = sorted(range(len(names)), key=lambda i: -sum(matrix[i]))[:_MOST_CLASSES]
    shown = [*sorted(often), len(names)]
    rows = [*names, "no object"]
    columns = [*names, "missed"]
    cell, left = 24, 12 + 7 * max(len(rows[i]) for i in shown)
    parts = []
    for y, i in enumerate(shown):
        total = sum(matrix[i])
        parts.append(_text(left - 6, left + y * cell + 16, rows[i], anchor="end"))
        x_label = left + y * cell + 16
        parts.append(_text(x_label, left - 6, columns[i], transform=f"rotate(-90 {x_label} {left - 6})"))
        for x, j in enumerate(shown):
            share = matrix[i][j] / total if total else 0.0
            place = f'x="{left + x * cell}" y="{left + y * cell}" width="{cell}" height="{cell}"'
            tip = f"<title>{escape(rows[i])} taken for {escape(columns[j])}: {matrix[i][j]} of {total}</title>"
            parts.append(f'<rect {place} class="share" fill-opacity="{share:.3f}">{tip}</rect>')
            if matrix[i][j]:
                middle, kind = left + (x + 0.5) * cell, "count strong" if share > 0.5 else "count"
                parts.append(_text(middle, left + y * cell + 16, str(matrix[i][j]), "middle", kind=kind))
    side = left + len(shown) * cell + 12
    return f'<svg class="confusion" width="{side}" height="{side}">{"".join(parts)}</svg>'


def _class_table(classes: dict[str, Any]) -> str:
    keys = ("objects", "AP", "AP50", "AP75", "AR")
    rows = [
        [
            escape(name),
            *("n/a" if (v := numbers[key]) is None else f"{v:.3f}" if key != "objects" else str(v) for key in keys),
        ]
        for name, numbers in classes.items()
    ]
    return table(["class", *keys], rows, 1, last=0)


def _text(x: float, y: float, text: str, anchor: str = "start", transform: str = "", kind: str = "") -> str:
    turn = f' transform="{transform}"' if transform else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}"{turn}>{escape(text)}</text>'
