"""TEST.EXPECTED_RESULTS: an accuracy claim that a machine checks and that can fail."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError, ResultError

logger = logging.getLogger(__name__)


def check_expected(results: dict[str, Any], expected: Sequence[Sequence[Any]], sigma_tolerance: float) -> None:
    """Compares results with what was expected, and logs each that passes.

    results: what `evaluation.coco.evaluate` returns. expected: entries [task, metric, [mean, sigma]] as upstream
    maskrcnn-benchmark has them, or [task, metric, mean, sigma], such as ["bbox", "AP", [0.377, 0.003]], in fractions.

    Raises:
        ResultError: some are further than sigma_tolerance x sigma from the mean, or n/a; the message names them all.
        ConfigError: an entry of another form, or one whose task or metric was not measured.
    """
    misses = []
    for entry in expected:
        task, metric, mean, sigma = _read(entry)
        measured = results.get(task)
        if not isinstance(measured, dict) or metric not in measured or metric == "per_class":
            known = [f"{t} {m}" for t, numbers in results.items() if isinstance(numbers, dict) for m in numbers]
            known = ", ".join(name for name in known if not name.endswith("per_class")) or "nothing"
            raise ConfigError(f"TEST.EXPECTED_RESULTS: {task} {metric} was not measured; measured: {known}")
        value, tolerance = measured[metric], sigma_tolerance * sigma
        shown = "n/a" if value is None else f"{value:.4f}"
        if value is None or abs(value - mean) > tolerance:
            misses.append(f"{task} {metric} is {shown}, expected {mean:.4f} +- {tolerance:.4f}")
        else:
            logger.info("%s %s %s is as expected, %.4f +- %.4f", task, metric, shown, mean, tolerance)
    if misses:
        raise ResultError(f"results differ from TEST.EXPECTED_RESULTS: {'; '.join(misses)}")


def _read(entry: Sequence[Any]) -> tuple[str, str, float, float]:
    try:
        task, metric, *numbers = entry
        mean, sigma = numbers[0] if len(numbers) == 1 else numbers
        return task, metric, float(mean), float(sigma)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"TEST.EXPECTED_RESULTS: {entry!r} must be [task, metric, [mean, sigma]], such as "
            '["bbox", "AP", [0.377, 0.003]]'
        ) from error
