"""What the data set doctor found as a page: findings with pictures of the offenders, classes, sizes and proportions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from html import escape

import cv2
import numpy as np

from ..data.doctor import HURTS, NOTE, STOPS, Finding, Setting, Survey, exit_code
from ..data.doctor.balance import object_sides
from ..data.doctor.finding import Offender
from ..data.images import read_image
from ..errors import DataError
from .charts import bars
from .contact_sheet import inline, shrink
from .data_report import about, name_of, title, verdict
from .page import document
from .visualize import draw

# Of each finding; longest side in pixels
PICTURES, SIDE = 6, 480
# Objects drawn on a picture of a whole image
MOST_DRAWN = 60
_MARKS = {STOPS: ("bad", "stops training"), HURTS: ("unsure", "hurts training"), NOTE: ("soft", "note")}
_OFFENDER, _OTHER = (230, 60, 40), (86, 180, 233)
# How far, in shares of the longest side, a picture is continued in gray to show what lies outside the image
_BEYOND = 0.25
_BINS_AN_OCTAVE, _HEIGHT = 4, 130
_STYLE = """
figcaption{overflow-wrap:anywhere}section{padding-bottom:8px}section h3{margin:.25rem 0}summary{color:var(--ink)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 12px;margin:.4rem 0}dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}ul{margin:.3rem 0;padding-left:1.2rem;overflow-wrap:anywhere}
svg.histogram{width:100%;margin:8px 0 0}.histogram rect{fill:var(--new);opacity:.75}
.anchor{stroke:var(--unsure);stroke-width:1.5;stroke-dasharray:3 3}
"""


def page(surveys: Sequence[Survey], findings: Sequence[Finding], setting: Setting) -> str:
    """HTML that needs no other file. Reads the images of the offenders."""
    mark = "bad" if exit_code(findings) else "good"
    parts = [f'<h1><span class="{mark}">{escape(verdict(findings))}</span></h1>']
    parts += [f'<p class="soft">{escape(about(survey))}</p>' for survey in surveys]
    by_name = {survey.name: survey for survey in surveys}
    several = len(surveys) > 1
    parts += [_finding(finding, by_name, several) for finding in findings]
    parts += [_statistics(survey, setting) for survey in surveys]
    return document(f"Data: {surveys[0].name}", "\n".join(parts), _STYLE)


def _finding(finding: Finding, surveys: dict[str, Survey], several: bool) -> str:
    """A section; notes are folded."""
    mark, word = _MARKS[finding.severity]
    facts = {"data": finding.dataset if several else "", "training": finding.training, "advice": finding.advice}
    rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items() if value)
    body = f"<dl>{rows}</dl>" + _offenders(finding, surveys)
    head = f'{escape(title(finding))} <span class="{mark}">{word}</span>'
    if finding.severity == NOTE:
        return f"<section><details><summary>{head}</summary>{body}</details></section>"
    return f"<section><h3>{head}</h3>{body}</section>"


def _offenders(finding: Finding, surveys: dict[str, Survey]) -> str:
    """Pictures of the first ones that can be drawn, the others by name."""
    figures, listed = [], []
    for offender in finding.offenders:
        name, picture = escape(name_of(offender)), None
        if offender.index is not None and len(figures) < PICTURES:
            with suppress(DataError):  # an image that cannot be read, which another finding says
                picture = picture_of(offender, surveys[offender.dataset])
        if picture is None:
            listed.append(f"<li>{name}</li>")
        else:
            figures.append(f'<figure><img alt="" src="{inline(picture)}"><figcaption>{name}</figcaption></figure>')
    left = finding.count - len(finding.offenders)
    return (
        (f'<div class="pictures">{"".join(figures)}</div>' if figures else "")
        + (f"<ul>{''.join(listed)}</ul>" if listed else "")
        + (f'<p class="soft">and {left:,} more</p>' if finding.offenders and left else "")
    )


# ---- pictures


def picture_of(offender: Offender, survey: Survey) -> np.ndarray:
    """[H, W, 3] uint8: the offending object on its image, which goes on in gray where the object lies outside; of an
    offending image all that is annotated on it. Raises DataError where the image cannot be read."""
    path, size = survey.path(offender.index), tuple(survey.sizes[offender.index].tolist())
    try:
        image = read_image(path, size)
    except DataError:  # of another size, or it is damaged: then this raises again
        image = read_image(path)
    if offender.row is None:
        rows = np.flatnonzero(survey.usable & (survey.image_of == offender.index))[:MOST_DRAWN]
        return _drawn(image, survey, rows, survey.boxes[rows], _OTHER)
    boxes = np.array([offender.box]) if offender.box else np.zeros((0, 4))
    return _drawn(image, survey, np.array([offender.row])[: len(boxes)], boxes, _OFFENDER)


def _drawn(image: np.ndarray, survey: Survey, rows: np.ndarray, boxes: np.ndarray, color) -> np.ndarray:
    height, width = image.shape[:2]
    edges = np.array([0, 0, width, height], float)
    most = _BEYOND * max(height, width)
    outer = np.concatenate([np.minimum(boxes, edges)[:, :2], np.maximum(boxes, edges)[:, 2:]], axis=1)
    outer = np.concatenate([outer, edges[None]])
    beyond = np.concatenate([-outer.min(axis=0)[:2], (outer.max(axis=0) - edges)[2:]]).clip(0, most)
    left, top, right, bottom = np.ceil(beyond + 4 * (beyond > 0)).astype(int).tolist()
    canvas = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(128, 128, 128))
    scale = min(1.0, SIDE / max(canvas.shape[:2]))  # drawn after shrinking, or the lines become too thin to see
    canvas = shrink(canvas, SIDE)
    limits = (canvas.shape[1], canvas.shape[0]) * 2
    placed = ((boxes + np.array([left, top, left, top])) * scale).clip(0, limits)
    masks = [_mask(survey, row, canvas.shape[:2], (left, top), scale) for row in rows.tolist()]
    names = [survey.class_of(row) for row in rows.tolist()]
    picture = draw(canvas, placed, names, masks=masks, colors=[color] * len(rows))
    for x1, y1, x2, y2 in placed.tolist():
        if min(x2 - x1, y2 - y1) < 6:  # too small to be seen
            cv2.circle(picture, (round((x1 + x2) / 2), round((y1 + y2) / 2)), 14, color, 2, cv2.LINE_AA)
    return picture


def _mask(survey: Survey, row: int, size: tuple[int, int], shift: tuple[int, int], scale: float) -> np.ndarray | None:
    """The object's polygons as [H, W] of 0 and 1; None where it has none."""
    polygons = survey.polygons.of(row)
    if not polygons:
        return None
    mask = np.zeros(size, np.uint8)
    for points in polygons:
        cv2.fillPoly(mask, [np.rint(((points + shift) * scale).clip(-1e4, 1e4)).astype(np.int32)], 1)
    return mask


# ---- classes, sizes, proportions


def _statistics(survey: Survey, setting: Setting) -> str:
    sides = object_sides(survey, setting)
    rpn = setting.cfg.MODEL.RPN
    pixels = np.sqrt(sides.prod(axis=1))
    sizes = survey.sizes[survey.stated.all(axis=1)]
    charts = [
        _histogram(pixels, rpn.ANCHOR_SIZES, "Sizes of objects: root of their area, pixels for the network"),
        _histogram(sides[:, 1] / sides[:, 0], rpn.ASPECT_RATIOS, "Proportions of objects: height / width"),
        _histogram(sizes[:, 0] / sizes[:, 1], (), "Proportions of images: height / width"),
    ]
    return (
        f"<h2>{escape(survey.name)}</h2><section>{_classes(survey)}</section>"
        f'<section class="charts">{"".join(charts)}</section>'
    )


def _classes(survey: Survey) -> str:
    """Bars by falling number of objects."""
    counts = survey.classes()
    most = max(1, int(counts.max(initial=0)))
    order = np.argsort(-counts, kind="stable").tolist()
    rows = [(survey.category_names[c], counts[c] / most, f"{counts[c]:,}") for c in order]
    return f"<h3>Objects of each class</h3>{bars(rows)}"


def _histogram(values: np.ndarray, anchors: Sequence[float], title: str) -> str:
    """Of positive values, on a logarithmic axis; anchors as dashed lines."""
    if not len(values):
        return ""
    shown = np.log2([*values, *anchors])
    low, high = int(np.floor(shown.min())), int(np.ceil(shown.max() + 1e-9))
    counts, _ = np.histogram(np.log2(values), (high - low) * _BINS_AN_OCTAVE, (low, high))
    parts = list(_bars(counts))
    for octave in range(low, high + 1, -(-(high - low) // 6)):
        x = 100 * (octave - low) / (high - low)
        anchor = "start" if x < 4 else "end" if x > 96 else "middle"
        parts.append(f'<text x="{x:.2f}%" y="{_HEIGHT + 18}" text-anchor="{anchor}">{_power(octave)}</text>')
    for value in anchors:
        x = f"{100 * (np.log2(value) - low) / (high - low):.2f}%"
        parts.append(
            f'<line class="anchor" x1="{x}" x2="{x}" y1="0" y2="{_HEIGHT}"><title>anchor {value:g}</title></line>'
        )
    parts.append(f'<line class="axis" x1="0" x2="100%" y1="{_HEIGHT}" y2="{_HEIGHT}"/>')
    said = f"{title}; median {np.median(values):.3g}" + ("; dashed: anchors" if len(anchors) else "")
    label = escape(said, quote=True)
    return (
        f"<figure><figcaption>{escape(said)}</figcaption>"
        f'<svg class="histogram" height="{_HEIGHT + 24}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
        "</figure>"
    )


def _bars(counts: np.ndarray) -> Iterator[str]:
    width = 100 / len(counts)
    for number, count in enumerate(counts.tolist()):
        if count:
            height = max(1.0, (_HEIGHT - 4) * count / counts.max())
            yield (
                f'<rect x="{number * width + width * 0.06:.2f}%" y="{_HEIGHT - height:.1f}" width="{width * 0.88:.2f}%"'
                f' height="{height:.1f}"><title>{count:,}</title></rect>'
            )


def _power(octave: int) -> str:
    return f"{2**octave}" if octave >= 0 else f"1/{2**-octave}"
