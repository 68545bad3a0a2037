"""Checks of what there is much and little of: classes, images without objects, sizes and proportions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...models.anchors import cell_anchors
from .finding import HURTS, MOST_OFFENDERS, NOTE, Finding, Offender, Setting, of_images, of_rows
from .survey import Survey

# Classes of fewer objects are named. COCO's rarest class has 198
FEW_OBJECTS = 10
# Share of the objects that anchors may miss: of COCO 4 % have less than the background's overlap with any anchor
MISSED_BY_ANCHORS = 0.2
# Objects further than this from the longest anchors' proportions are named
LONGER_THAN_ANCHORS = 2.0


def unused_classes(survey: Survey, setting: Setting) -> Iterator[Finding]:
    counts = survey.classes()
    for name, found, what, training in (
        ("class_unused", np.flatnonzero(counts == 0), "classes without an object", "never sees them"),
        (
            "class_rare",
            np.flatnonzero((counts > 0) & (counts < FEW_OBJECTS)),
            f"classes of fewer than {FEW_OBJECTS} objects",
            "draws all images equally often, and so sees these seldom: they will hardly be learnt",
        ),
    ):
        if len(found):
            details = [f"{survey.category_names[c]} (id {survey.category_ids[c]}): {counts[c]} objects" for c in found]
            offenders = tuple(Offender(detail=detail) for detail in details[:MOST_OFFENDERS])
            advice = "remove the class, or annotate it"
            yield Finding(name, survey.name, NOTE, len(found), what, training, advice, False, offenders)


def images_without_objects(survey: Survey, setting: Setting) -> Iterator[Finding]:
    indices = np.flatnonzero(survey.counts() == 0)
    if len(indices):
        ratio = setting.cfg.DATALOADER.EMPTY_IMAGE_RATIO
        training = f"keeps {round(len(indices) * ratio)} of them as background (DATALOADER.EMPTY_IMAGE_RATIO {ratio:g})"
        what = "images without a usable object"
        offenders = of_images(survey, indices)
        yield Finding("image_empty", survey.name, NOTE, len(indices), what, training, offenders=offenders)


def crowded_images(survey: Survey, setting: Setting) -> Iterator[Finding]:
    counts, most = survey.counts(), setting.cfg.MODEL.ROI_HEADS.DETECTIONS_PER_IMG
    indices = np.flatnonzero(counts > most)
    if len(indices):
        what = f"images with more than {most} objects"
        training = f"learns from all; but no more than {most} are detected, nor count in COCO's evaluation of a class"
        advice = "raise MODEL.ROI_HEADS.DETECTIONS_PER_IMG, or cut the images into pieces"
        offenders = of_images(survey, indices, lambda i: f"{counts[i]} objects")
        yield Finding("image_crowded", survey.name, NOTE, len(indices), what, training, advice, False, offenders)


def small_for_anchors(survey: Survey, setting: Setting) -> Iterator[Finding]:
    sides, overlaps = object_sides(survey, setting), best_overlaps(survey, setting)
    least = setting.cfg.MODEL.RPN.BG_IOU_THRESHOLD
    missed = np.flatnonzero(overlaps < least)
    if not len(missed):
        return
    share = len(missed) / len(overlaps)
    small = np.count_nonzero(sides[missed].prod(axis=1) < min(setting.cfg.MODEL.RPN.ANCHOR_SIZES) ** 2)
    worst = survey.objects[missed[np.argsort(overlaps[missed], kind="stable")]]
    size_of = dict(zip(survey.objects[missed].tolist(), sides[missed].tolist()))
    words = f"({share:.0%}; {small} too small) that no anchor can overlap by {least:g}, the limit to background"
    yield Finding(
        "anchors",
        survey.name,
        HURTS if share > MISSED_BY_ANCHORS else NOTE,
        len(missed),
        f"objects {words}",
        "gives each its best anchor all the same, and calls all others there background: few of them will be proposed",
        "set MODEL.RPN.ANCHOR_SIZES, ASPECT_RATIOS or INPUT.MIN_SIZE_TRAIN to fit them; --html draws the sizes",
        False,
        of_rows(survey, worst, lambda row: "{:.1f} x {:.1f} pixels for the network".format(*size_of[row])),
    )


def long_objects(survey: Survey, setting: Setting) -> Iterator[Finding]:
    sides = object_sides(survey, setting)
    ratios = sides[:, 1] / sides[:, 0]
    low, high = (f(setting.cfg.MODEL.RPN.ASPECT_RATIOS) for f in (min, max))
    long = np.flatnonzero((ratios < low / LONGER_THAN_ANCHORS) | (ratios > high * LONGER_THAN_ANCHORS))
    if len(long):
        ratio_of = dict(zip(survey.objects[long].tolist(), ratios[long].tolist()))
        yield Finding(
            "aspect_ratio",
            survey.name,
            NOTE,
            len(long),
            f"objects more than {LONGER_THAN_ANCHORS:g} times as long as the anchors' proportions, {low:g} to {high:g}",
            "matches them with fewer anchors than others",
            "add their proportions to MODEL.RPN.ASPECT_RATIOS if there are many",
            False,
            of_rows(survey, survey.objects[long], lambda row: f"height / width {ratio_of[row]:.2f}"),
        )


def object_sides(survey: Survey, setting: Setting) -> np.ndarray:
    """[n, 2] float64 width and height of the objects, in pixels of the image that the network sees."""
    images = survey.image_of[survey.objects]
    boxes = survey.clipped[survey.objects]
    return (boxes[:, 2:] - boxes[:, :2]) * setting.scales(survey.sizes)[images, None]


def best_overlaps(survey: Survey, setting: Setting) -> np.ndarray:
    """[n] the greatest IoU that an anchor around the middle of each object can have."""
    rpn = setting.cfg.MODEL.RPN
    anchors = cell_anchors(tuple(rpn.ANCHOR_SIZES), tuple(rpn.ASPECT_RATIOS), rpn.ANCHOR_ROUNDING).double().numpy()
    sides = object_sides(survey, setting)
    best = np.zeros(len(sides))
    for width, height in anchors[:, 2:] - anchors[:, :2]:
        common = np.minimum(sides, (width, height)).prod(axis=1)
        best = np.maximum(best, common / (sides.prod(axis=1) + width * height - common))
    return best


CHECKS = (unused_classes, images_without_objects, crowded_images, small_for_anchors, long_objects)
