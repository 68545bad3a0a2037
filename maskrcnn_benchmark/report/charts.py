"""Charts as inline SVG that fits any width, light or dark: curves with bands, bars, and the scales they are drawn to.

Places along the width are per cent, or lie in a nested picture that is stretched: a page needs no script to lay them
out. Colours and line widths are in `page.STYLE`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

# Points of a curve on a page; more are gathered, see `Line.thinned`
POINTS = 400
# Up to so many points are dots that say their values; of more, so many columns do
_DOTS, _COLUMNS = 40, 60
# Bars that are shown without a click
_MOST_BARS = 30
# Width that curves are drawn in before they are stretched to the page's
_WIDTH = 1000


def number(value: float | None) -> str:
    """Four significant digits, without an exponent where people read none."""
    if value is None:
        return "-"
    if value == 0 or not 1e-4 <= abs(value) < 1e7:
        return f"{value:.4g}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def quantity(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{number(value)} {unit}".rstrip()


class Scale:
    """Values to per cent of the drawing. room: at both ends, as a share of the range."""

    def __init__(self, low: float, high: float, room: float = 0.04) -> None:
        margin = (high - low) * room if high > low else abs(high) * 0.02 or 1.0
        self.low, self.high, self._only = low - margin, high + margin, None if high > low else low

    def percent(self, value: float) -> float:
        """Clamped to the drawing."""
        return round(100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 2)

    def ticks(self) -> list[float]:
        """Two to six round values within; the value itself where there is no other."""
        if self._only is not None:
            return [self._only]
        rough = (self.high - self.low) / 5
        size = 10 ** math.floor(math.log10(rough))
        step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= rough)
        first = math.ceil(self.low / step)
        return [tick * step for tick in range(first, math.floor(self.high / step) + 1)]


def fences(samples: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Tukey's far fences, three times the middle half below and above it, but no further than the samples go."""
    first, third = np.percentile(samples, (25, 75)).tolist()
    reach = 3 * (third - first)
    return max(first - reach, float(np.min(samples))), min(third + reach, float(np.max(samples)))


def x_axis(scale: Scale, bottom: int, unit: str) -> Iterator[str]:
    """Ticks with their values, but for those that would stick out, and the unit once, for telephones are narrow."""
    yield f'<text x="-72" y="{bottom + 17}">{escape(unit)}</text>'
    yield f'<line class="axis" x1="0" x2="100%" y1="{bottom}" y2="{bottom}"/>'
    for tick in scale.ticks():
        x = scale.percent(tick)
        yield f'<line class="axis" x1="{x}%" x2="{x}%" y1="0" y2="{bottom + 4}"/>'
        if 4 <= x <= 96:
            label = f"{tick / 1000:g}k" if abs(tick) >= 10_000 else f"{tick:.6g}"
            yield f'<text x="{x}%" y="{bottom + 17}" text-anchor="middle">{label}</text>'


@dataclass(frozen=True)
class Line:
    """A curve: name in the legend; x, y: [N] float64, finite; color: 0 to 5 of the page's. low, high: [N], a band.
    words: of each point, in place of its values. told: [N], the values that points tell, where they are not y."""

    name: str
    x: np.ndarray
    y: np.ndarray
    color: int = 0
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    words: Sequence[str] = ()
    told: np.ndarray | None = None

    @classmethod
    def thinned(cls, name: str, x: np.ndarray, y: np.ndarray, color: int = 0) -> Line:
        """Through the values that are finite. Of more than POINTS neighbours are gathered: their means, and their
        least and greatest as the band, so that no spike is lost."""
        finite = np.isfinite(y)
        x, y = x[finite], y[finite]
        if len(y) <= POINTS:
            return cls(name, x, y, color)
        edges = np.linspace(0, len(y), POINTS, endpoint=False).astype(int)
        counts = np.diff([*edges, len(y)])
        x, mean = (np.add.reduceat(values, edges) / counts for values in (x, y))
        return cls(name, x, mean, color, np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges))

    @property
    def values(self) -> np.ndarray:
        """[N] what points tell under the pointer."""
        return self.y if self.told is None else self.told

    def reach(self) -> np.ndarray:
        """All ordinates that are drawn."""
        return np.concatenate([part for part in (self.y, self.low, self.high) if part is not None])


def line_chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    along: str,
    limits: tuple[float, float] | None = None,
    marks: Sequence[float] = (),
    ends: tuple[str, str] | None = None,
    said: str = "",
    height: int = 150,
) -> str:
    """A figure with a curve for each line that has points; empty where none has.

    unit: of y; along: what x counts. limits: least and greatest y of the axis; what lies beyond is drawn at its ends.
    marks: x of dashed vertical lines. ends: words under the ends of the axis, in place of its ticks. said: for the
    caption.
    """
    lines = [line for line in lines if len(line.y)]
    if not lines:
        return ""
    every = np.concatenate([line.reach() for line in lines])
    low, high = limits or (float(every.min()), float(every.max()))
    beyond = len({at for line in lines for at in line.x[(line.y < low) | (line.y > high)].tolist()})
    x = Scale(min(line.x[0] for line in lines), max(line.x[-1] for line in lines), room=0.0)
    y = Scale(low, high)
    parts = [*_y_axis(y, height), *(_ends(ends, height) if ends else x_axis(x, height, along))]
    curves = "".join(part for line in lines for part in _curve(line, x, y, height))
    parts.append(f'<svg height="{height}" viewBox="0 0 {_WIDTH} {height}" preserveAspectRatio="none">{curves}</svg>')
    for mark in marks:
        parts.append(f'<line class="step" x1="{x.percent(mark)}%" x2="{x.percent(mark)}%" y1="0" y2="{height}"/>')
    few = all(len(line.y) <= _DOTS or line.words for line in lines)
    parts += _dots(lines, x, y, height, unit, along) if few else _columns(lines, x, height, unit, along)
    keys = "".join(f' <span class="key c{line.color}">{escape(line.name)}</span>' for line in lines if line.name)
    said += f"; {beyond} point{'s lie' if beyond > 1 else ' lies'} beyond the axis, at its ends" if beyond else ""
    caption = f"<b>{escape(title)}</b>, {escape(unit)}{escape(said)}{keys}"
    label = escape(f"{title}, {unit}, over {along}{said}", quote=True)
    return (
        f'<figure><figcaption>{caption}</figcaption><svg height="{height + 24}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _y_axis(scale: Scale, height: int) -> Iterator[str]:
    for tick in scale.ticks():
        y = round(height - height * scale.percent(tick) / 100, 1)
        yield f'<line class="axis" x1="0" x2="100%" y1="{y}" y2="{y}"/>'
        yield f'<text x="-6" y="{y + 4}" text-anchor="end">{tick:.6g}</text>'


def _ends(words: tuple[str, str], height: int) -> Iterator[str]:
    for x, anchor, word in ((0, "start", words[0]), (100, "end", words[1])):
        yield f'<text x="{x}%" y="{height + 18}" text-anchor="{anchor}">{escape(word)}</text>'


def _curve(line: Line, x: Scale, y: Scale, height: int) -> Iterator[str]:
    def places(values: np.ndarray) -> list[str]:
        return [
            f"{_WIDTH * x.percent(a) / 100:.1f},{height - height * y.percent(b) / 100:.1f}"
            for a, b in zip(line.x.tolist(), values.tolist())
        ]

    if line.low is not None and line.high is not None:
        around = " ".join([*places(line.high), *reversed(places(line.low))])
        yield f'<polygon class="band c{line.color}" points="{around}"/>'
    yield f'<polyline class="course c{line.color}" points="{" ".join(places(line.y))}"/>'


def _dots(lines: Sequence[Line], x: Scale, y: Scale, height: int, unit: str, along: str) -> Iterator[str]:
    for line in lines:
        for i, (a, b) in enumerate(zip(line.x.tolist(), line.y.tolist())):
            said = quantity(float(line.values[i]), unit)
            words = escape(line.words[i] if line.words else f"{along} {a:g}: {line.name} {said}")
            place = f'cx="{x.percent(a)}%" cy="{height - height * y.percent(b) / 100:.1f}"'
            yield f'<circle class="dot c{line.color}" {place} r="3"><title>{words}</title></circle>'


def _columns(lines: Sequence[Line], x: Scale, height: int, unit: str, along: str) -> Iterator[str]:
    """Invisible, over the whole height: under the pointer they say the values there."""
    width = 100 / _COLUMNS
    for column in range(_COLUMNS):
        at = x.low + (x.high - x.low) * (column + 0.5) / _COLUMNS
        near = [(line, int(np.abs(line.x - at).argmin())) for line in lines]
        words = "; ".join(f"{line.name} {number(float(line.values[i]))}".strip() for line, i in near)
        said = escape(f"{along} {near[0][0].x[near[0][1]]:.0f}: {words} {unit}")
        place = f'x="{column * width:.2f}%" y="0" width="{width:.2f}%" height="{height}"'
        yield f'<rect class="column" {place}><title>{said}</title></rect>'


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """A bar for each row: its name, its length as a share of the longest possible, 0..1, and its value with the unit.
    Those after the first thirty are folded."""
    drawn = [
        f'<b>{escape(name)}</b><i style="width:{100 * share:.1f}%"></i><span>{escape(value)}</span>'
        for name, share, value in rows
    ]
    shown, rest = drawn[:_MOST_BARS], drawn[_MOST_BARS:]
    more = f'<details><summary>{len(rest)} more</summary><div class="bars">{"".join(rest)}</div></details>'
    return f'<div class="bars">{"".join(shown)}</div>' + (more if rest else "")
