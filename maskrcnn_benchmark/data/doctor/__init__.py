"""The data set doctor: what is wrong with a data set, what training will do about it, and a repaired copy.

A check is a function of (Survey, Setting), or of two surveys and a Setting, that yields findings; it stands in the
CHECKS of its module.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from . import balance, entries, objects, pictures, splits
from .finding import HURTS, NOTE, SEVERITIES, STOPS, Finding, Setting
from .survey import Survey, survey

__all__ = ["HURTS", "NOTE", "SEVERITIES", "STOPS", "Finding", "Setting", "Survey", "examine", "exit_code", "survey"]

CHECKS = (*entries.CHECKS, *pictures.CHECKS, *objects.CHECKS, *balance.CHECKS)
PAIR_CHECKS = splits.CHECKS


def examine(surveys: Sequence[Survey], setting: Setting) -> list[Finding]:
    """The findings on each data set, and on each two of them; the worst first. With several, the first ones are taken
    for what is trained on."""
    findings = [finding for one in surveys for check in CHECKS for finding in check(one, setting)]
    findings += [
        finding for pair in combinations(surveys, 2) for check in PAIR_CHECKS for finding in check(*pair, setting)
    ]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def exit_code(findings: Sequence[Finding]) -> int:
    """0: nothing but notes; 1: something stops or hurts training."""
    return int(any(finding.severity != NOTE for finding in findings))
