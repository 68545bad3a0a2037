"""Checks of the annotations, one by one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .finding import HURTS, NOTE, Finding, Setting, of_rows
from .survey import LEAST_OWN_IOU, Survey, beside_mask, repeated_objects

_DROPPED = "drops the object, and learns that what is there is background"
_LEFT_OUT = "annotate it anew; a repaired copy leaves it out"
# Kind of problem (coco.PROBLEMS) -> severity, what, what training does, advice
KINDS = {
    "zero_area": (HURTS, "objects whose box has no area", _DROPPED, _LEFT_OUT),
    "not_finite": (HURTS, "objects with NaN or infinite coordinates", _DROPPED, _LEFT_OUT),
    "outside": (HURTS, "objects outside their image", _DROPPED, _LEFT_OUT),
    "bad_rle": (HURTS, "objects whose RLE is damaged, or of another size than the image", _DROPPED, _LEFT_OUT),
    "no_mask": (
        HURTS,
        "objects without a usable mask",
        _DROPPED,
        f"{_LEFT_OUT}. With MODEL.MASK_ON False (here --boxes) the box would do",
    ),
    "bad_polygon": (
        NOTE,
        "objects with a polygon of fewer than 3 points or of an odd number of coordinates",
        "leaves that polygon out, and the object where it has no other one",
        "a repaired copy is without such polygons",
    ),
    "clipped": (
        NOTE,
        "objects whose box reaches more than a pixel beyond the image",
        "clips the box to the image",
        "a repaired copy has the clipped box",
    ),
    "missing_bbox": (
        NOTE,
        "objects without a bbox",
        "takes the box around the segmentation",
        "a repaired copy has that box",
    ),
    "duplicate_id": (
        NOTE,
        "annotations with the id of another one",
        "learns from all of them, and evaluation numbers anew; pycocotools by itself loses one",
        "a repaired copy has ids of their own",
    ),
}


def problems(survey: Survey, setting: Setting) -> Iterator[Finding]:
    """What reading for training would warn of: the same code has found it."""
    for kind, (severity, what, training, advice) in KINDS.items():
        rows = survey.problems.get(kind, ())
        if len(rows):
            offenders = of_rows(survey, rows)
            yield Finding(kind, survey.name, severity, len(rows), what, training, advice, True, offenders)


def repeated(survey: Survey, setting: Setting) -> Iterator[Finding]:
    rows = repeated_objects(survey, survey.usable, survey.clipped)
    if len(rows):
        training = "learns from each of them; in an evaluation one detection can match but one, and the rest is missed"
        yield Finding(
            "object_repeated",
            survey.name,
            HURTS,
            len(rows),
            "objects with image, class and box of an earlier one",
            training,
            "a repaired copy keeps the first",
            True,
            of_rows(survey, rows),
        )


def box_beside_mask(survey: Survey, setting: Setting) -> Iterator[Finding]:
    rows, _ = beside_mask(survey)
    if len(rows):
        yield Finding(
            "box_beside_mask",
            survey.name,
            HURTS,
            len(rows),
            f"objects whose box overlaps less than {LEAST_OWN_IOU:.0%} (IoU) with their own polygons",
            "learns the box from bbox and the mask from the part of the polygons in it, though they disagree",
            "bbox is x, y, width, height, not two corners; a repaired copy has the box around the polygons",
            True,
            of_rows(survey, rows),
        )


def crowds(survey: Survey, setting: Setting) -> Iterator[Finding]:
    rows = np.flatnonzero(survey.crowds & survey.usable)
    if len(rows):
        training = "leaves them out; evaluation takes detections on them for neither right nor wrong"
        yield Finding("crowd", survey.name, NOTE, len(rows), "crowds", training, offenders=of_rows(survey, rows))


def crowd_unstated(survey: Survey, setting: Setting) -> Iterator[Finding]:
    rows = survey.entries.without_crowd
    if len(rows):
        training, advice = "takes it for 0, a single object, and so does evaluation", "a repaired copy says 0"
        offenders = of_rows(survey, rows)
        yield Finding(
            "iscrowd_missing",
            *(survey.name, NOTE, len(rows), "annotations without iscrowd", training, advice, True, offenders),
        )


def area_unstated(survey: Survey, setting: Setting) -> Iterator[Finding]:
    rows = np.flatnonzero(np.isnan(survey.areas) & survey.usable)
    if len(rows):
        training = "does not need it; evaluation takes that of the mask, or without masks of the box"
        advice = "a repaired copy has that area"
        offenders = of_rows(survey, rows)
        yield Finding(
            "area_missing",
            *(survey.name, NOTE, len(rows), "annotations without area", training, advice, True, offenders),
        )


CHECKS = (problems, repeated, box_beside_mask, crowds, crowd_unstated, area_unstated)
