"""Shapes that annotation tools know, as polygons [p, 2] (x, y) in pixels."""

from __future__ import annotations

import math

import numpy as np

# A polygon keeps this close to the curve that it stands for, in pixels.
_TOLERANCE = 0.1
# Pixels; a circle of this radius has 29,000 points, a larger one as many as memory holds.
_LARGEST = 1 << 24


def rectangle(x: float, y: float, width: float, height: float) -> np.ndarray:
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], float)


def ellipse(cx: float, cy: float, rx: float, ry: float, angle: float = 0.0) -> np.ndarray:
    """angle: in radians, from the x axis towards the y axis, that is clockwise on the screen."""
    largest = max(rx, ry, 1.0)
    if not largest < _LARGEST:
        raise ValueError(f"its radius {largest:g} is no number of pixels in a picture")
    count = max(16, math.ceil(math.pi / math.acos(1 - _TOLERANCE / largest)))
    turn = np.arange(count) * (2 * math.pi / count)
    x, y = rx * np.cos(turn), ry * np.sin(turn)
    cos, sin = math.cos(angle), math.sin(angle)
    return np.stack([cx + x * cos - y * sin, cy + x * sin + y * cos], axis=1)


def circle(cx: float, cy: float, radius: float) -> np.ndarray:
    return ellipse(cx, cy, radius, radius)
