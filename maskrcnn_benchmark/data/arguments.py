"""Arguments of transforms, checked when they are built, before a single image is read."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from ..errors import ConfigError


def number(what: str, value: Any, low: float, high: float = float("inf")) -> Any:
    """`value`, a number in low..high. Raises ConfigError."""
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= value <= high:
        bounds = f"in {low}..{high}" if high < float("inf") else f"of {low} or more"
        raise ConfigError(f"{what} must be a number {bounds}, not {value!r}")
    return value


def span(what: str, value: Any, low: float, high: float = float("inf")) -> tuple:
    """(least, most), both in low..high. Raises ConfigError."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2 or not value[0] <= value[1]:
        raise ConfigError(f"{what} must be two numbers, the least and the most, not {value!r}")
    return number(what, value[0], low, high), number(what, value[1], low, high)


def choice(what: str, value: Any, known: Sequence[str]) -> str:
    """`value`, one of the known. Raises ConfigError."""
    if value not in known:
        raise ConfigError(f"{what} must be one of {', '.join(known)}, not {value!r}")
    return value


def color(what: str, value: Any) -> tuple[float, ...]:
    """An RGB color of 0..255: three numbers, or one for a gray. Raises ConfigError."""
    values = value if isinstance(value, Sequence) else (value,) * 3
    if isinstance(value, str) or len(values) != 3:
        raise ConfigError(f"{what} must be a number or three of 0..255 (red, green, blue), not {value!r}")
    return tuple(number(what, part, 0, 255) for part in values)
