"""Precision-recall curves and confusion matrices as SVG pictures that stand alone or inside a page."""

from __future__ import annotations

from html import escape
from typing import Any

_COLORS = {"mean": "#0072b2", "AP50": "#009e73", "AP75": "#d55e00"}
_SIDE = 320
# Classes that a picture of a confusion matrix shows; more would be unreadable
_MOST_CLASSES = 30


def curves_svg(title: str, curves: dict[str, list[float]]) -> str:
    """Precision over recall. curves: name -> precision at equally spaced recall from 0 to 1."""
    parts = [_text(_SIDE / 2 + 40, 16, title, anchor="middle")]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = 40 + tick * _SIDE, 30 + (1 - tick) * _SIDE
        parts.append(f'<path d="M40 {y:.1f}H{40 + _SIDE}M{x:.1f} 30V{30 + _SIDE}" stroke="#ddd"/>')
        parts += [_text(34, y + 4, f"{tick:g}", anchor="end"), _text(x, 46 + _SIDE, f"{tick:g}", anchor="middle")]
    for row, (name, values) in enumerate(curves.items()):
        points = " ".join(
            f"{40 + i / (len(values) - 1) * _SIDE:.1f},{30 + (1 - value) * _SIDE:.1f}" for i, value in enumerate(values)
        )
        color = _COLORS.get(name, "#444")
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(_text(52, 50 + 16 * row, f"{name} {sum(values) / len(values):.3f}", color=color))
    parts.append(_text(40 + _SIDE / 2, 62 + _SIDE, "recall (precision upwards)", anchor="middle"))
    return _svg(_SIDE + 60, _SIDE + 72, parts)


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
            parts.append(f'<rect {place} fill="#0072b2" fill-opacity="{share:.3f}" stroke="#ddd">{tip}</rect>')
            if matrix[i][j]:
                middle, color = left + (x + 0.5) * cell, "#fff" if share > 0.5 else "#222"
                parts.append(_text(middle, left + y * cell + 16, str(matrix[i][j]), "middle", color, size=9))
    side = left + len(shown) * cell + 12
    return _svg(side, side, parts)


def accuracy_page(title: str, details: dict[str, Any]) -> str:
    """A self-contained HTML page of `evaluation.score`'s details: curves, a table of the classes, the confusion."""
    parts = [f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title>", f"<h1>{escape(title)}</h1>"]
    for task, content in details.items():
        if task == "confusion":
            parts += ["<h2>Confusion (score and IoU of .5 at least)</h2>", confusion_svg(**content)]
            continue
        parts += [f"<h2>{task}</h2>", curves_svg(task, content["curves"]), _class_table(content["classes"])]
    style = (
        "<style>body{font-family:sans-serif}td{padding:0 .8em;text-align:right}td:first-child{text-align:left}</style>"
    )
    return "\n".join([*parts, style])


def _class_table(classes: dict[str, Any] | list) -> str:
    keys = ("objects", "AP", "AP50", "AP75", "AR")
    head = "".join(f"<th>{key}" for key in ("class", *keys))
    rows = []
    for name, numbers in classes.items():
        cells = ("n/a" if (v := numbers[key]) is None else f"{v:.3f}" if key != "objects" else str(v) for key in keys)
        rows.append(f"<tr><td>{escape(name)}" + "".join(f"<td>{cell}" for cell in cells))
    return f"<table><tr>{head}{''.join(rows)}</table>"


def _text(
    x: float, y: float, text: str, anchor: str = "start", color: str = "#222", size: int = 12, transform: str = ""
) -> str:
    turn = f' transform="{transform}"' if transform else ""
    style = f'text-anchor="{anchor}" fill="{color}" font-size="{size}"{turn}'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _svg(width: float, height: float, parts: list[str]) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">{"".join(parts)}</svg>'
