"""What the data set doctor found, for the terminal and for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data.doctor import HURTS, STOPS, Finding, Survey, exit_code
from ..data.doctor.finding import Offender
from ..errors import visible

# Offenders that the terminal shows of each finding
_SHOWN = 3


def text(surveys: Sequence[Survey], findings: Sequence[Finding]) -> str:
    """What was looked at, the findings with their first offenders, the verdict last."""
    lines = [about(survey) for survey in surveys]
    for finding in findings:
        lines += ["", f"{finding.severity.upper():<5}  {title(finding)}"]
        if len(surveys) > 1:
            lines.append(f"       in {finding.dataset}")
        lines.append(f"       training: {finding.training}")
        if finding.advice:
            lines.append(f"       advice: {finding.advice}")
        lines += [f"       - {name_of(offender)}" for offender in finding.offenders[:_SHOWN]]
        if finding.offenders and finding.count > _SHOWN:
            lines.append(f"       - and {finding.count - _SHOWN} more")
    return visible("\n".join([*lines, "", verdict(findings)]))


def about(survey: Survey) -> str:
    entries = survey.entries
    read = "not read" if survey.facts is None else "read"
    return (
        f"{survey.name}: {len(entries.images)} images ({read}), {entries.annotations} annotations,"
        f" {len(survey.objects)} objects to train on, {len(survey.category_ids)} classes"
    )


def title(finding: Finding) -> str:
    """What was found, and how often where there may be several."""
    return f"{finding.what}: {finding.count:,}" if finding.offenders or finding.count > 1 else finding.what


def name_of(offender: Offender) -> str:
    """An offender in words: file and ids, and what is wrong."""
    ids = [("image id", offender.image_id), ("annotation id", offender.annotation_id)]
    named = ", ".join(
        [f"{kind} {value}" for kind, value in ids if value is not None] + [offender.file] * bool(offender.file)
    )
    return ": ".join(filter(None, (named, offender.detail)))


def verdict(findings: Sequence[Finding]) -> str:
    if not findings:
        return "FINE: nothing found"
    stops, hurts = (sum(finding.severity == severity for finding in findings) for severity in (STOPS, HURTS))
    notes = len(findings) - stops - hurts
    if not exit_code(findings):
        return f"FINE: nothing stops or hurts training; {notes} notes"
    repaired = sum(finding.fixable for finding in findings)
    return f"NOT FINE: {stops} findings stop training, {hurts} hurt it, {notes} notes; --fix repairs {repaired} of them"


def as_json(surveys: Sequence[Survey], findings: Sequence[Finding]) -> dict[str, Any]:
    """What --json writes."""
    return {
        "fine": not exit_code(findings),
        "datasets": [
            {
                "name": survey.name,
                "images": len(survey.entries.images),
                "annotations": survey.entries.annotations,
                "objects": len(survey.objects),
                "classes": dict(zip(survey.category_names, survey.classes().tolist())),
            }
            for survey in surveys
        ],
        "findings": [finding.as_json() for finding in findings],
    }
