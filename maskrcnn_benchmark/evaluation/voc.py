"""Pascal VOC's average precision of boxes (Everingham et al. 2010; the devkit's VOCevaldet.m).

The devkit counts pixels: a box from pixel 3 to pixel 5 is 3 wide. COCO's form says the same as x 2, width 3, so that
the overlaps are equal without the devkit's "+ 1".
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from .results import Results


def average_precision(
    annotations: list[dict[str, Any]],
    results: Results,
    categories: dict[int, str],
    eleven_points: bool,
    iou: float = 0.5,
) -> dict[str, Any]:
    """AP50 over the classes that have objects, and of each class (None for the others), as fractions.

    annotations: COCO's, with bbox; those with `difficult` or `iscrowd` need not be found, and finding them costs
    nothing. results: with boxes. eleven_points: VOC 2007's mean over recall 0, .1, ... 1 instead of the area under the
    curve (from 2010 on). A detection is right when it overlaps its best object by `iou` at least, and is the first to.
    """
    truth: dict[tuple[int, int], list[dict]] = defaultdict(list)
    for annotation in annotations:
        truth[annotation["category_id"], annotation["image_id"]].append(annotation)
    per_class = {}
    for category, name in categories.items():
        objects = {image: found for (owner, image), found in truth.items() if owner == category}
        wanted = sum(not _optional(a) for found in objects.values() for a in found)
        index = np.flatnonzero(results.category_ids == category)
        index = index[np.argsort(-results.scores[index], kind="stable")]
        right, wrong = _judge(objects, results.image_ids[index], results.boxes[index], iou)
        per_class[name] = _summary(right, wrong, wanted, eleven_points) if wanted else None
    judged = [ap for ap in per_class.values() if ap is not None]
    return {"AP50": float(np.mean(judged)) if judged else None, "per_class": per_class}


def _optional(annotation: dict[str, Any]) -> bool:
    return bool(annotation.get("difficult", 0) or annotation.get("iscrowd", 0))


def _judge(
    objects: dict[int, list[dict]], image_ids: np.ndarray, boxes: np.ndarray, iou: float
) -> tuple[np.ndarray, np.ndarray]:
    """Which detections of one class, by falling score, are right, and which are wrong; some are neither."""
    right, wrong = np.zeros(len(boxes), bool), np.zeros(len(boxes), bool)
    for image in np.unique(image_ids).tolist():
        rows, here = np.flatnonzero(image_ids == image), objects.get(image, [])
        if not here:
            wrong[rows] = True
            continue
        overlaps = coco_mask.iou(boxes[rows], np.array([a["bbox"] for a in here], np.float64), [0] * len(here))
        taken = set()
        for row, overlap, best in zip(rows, overlaps.max(axis=1), overlaps.argmax(axis=1)):
            if overlap < iou or best in taken:
                wrong[row] = True
            elif not _optional(here[best]):
                right[row] = True
                taken.add(best)
    return right, wrong


def _summary(right: np.ndarray, wrong: np.ndarray, wanted: int, eleven_points: bool) -> float:
    recall = np.cumsum(right) / wanted
    precision = np.cumsum(right) / np.maximum(np.cumsum(right) + np.cumsum(wrong), 1)
    if eleven_points:
        reached = [precision[recall >= point - 1e-9] for point in np.linspace(0, 1, 11)]
        return float(np.mean([values.max(initial=0.0) for values in reached]))
    recall, precision = np.concatenate([[0], recall]), np.concatenate([precision, [0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall) * precision[:-1]).sum())
