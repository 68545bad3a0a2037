"""Cityscapes' instance-level average precision of masks (Cordts et al. 2016; cityscapesScripts,
evalInstanceLevelSemanticLabeling.py).

It differs from COCO's: of two detections of one object the better is right, whichever class-mate comes first; the curve
is integrated without interpolation; groups (`iscrowd`) and objects below 100 pixels only absorb detections.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from .results import Results

IOUS = np.arange(0.5, 1.0, 0.05)
_LEAST_PIXELS = 100


@dataclass
class _Tally:
    """Judged so far of one class at one IoU: scores of what was right and wrong, and the objects that were missed."""

    right: list[float] = field(default_factory=list)
    wrong: list[float] = field(default_factory=list)
    missed: int = 0


def average_precision(
    annotations: list[dict[str, Any]],
    results: Results,
    categories: dict[int, str],
    sizes: dict[int, tuple[int, int]],
) -> dict[str, Any]:
    """AP (IoU .5:.05:.95) and AP50 over the classes that have objects, and AP of each class, as fractions or None.

    annotations: COCO's, segmentations clean (polygons or compressed RLE). results: with masks.
    sizes: (height, width) by image id.
    """
    truth: dict[tuple[int, int], list[dict]] = defaultdict(list)
    for annotation in annotations:
        truth[annotation["category_id"], annotation["image_id"]].append(annotation)
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index in np.flatnonzero(results.areas > 0).tolist():
        found[int(results.category_ids[index]), int(results.image_ids[index])].append(index)
    rles = results.rles()
    tallies = {category: [_Tally() for _ in IOUS] for category in categories}
    for category, image in truth.keys() | found.keys():
        rows = found[category, image]
        masks, scores = [rles[row] for row in rows], results.scores[rows]
        objects = [(_rle(a["segmentation"], *sizes[image]), bool(a.get("iscrowd"))) for a in truth[category, image]]
        _judge(objects, masks, results.areas[rows], scores, tallies[category])
    aps = np.array([[_summary(tally) for tally in tallies[category]] for category in categories]).reshape(-1, len(IOUS))
    return {
        "AP": _mean(aps),
        "AP50": _mean(aps[:, 0]),
        "per_class": {name: _mean(ap) for name, ap in zip(categories.values(), aps)},
    }


def _judge(
    objects: list[tuple[dict, bool]], masks: list[dict], areas: np.ndarray, scores: np.ndarray, tallies: list[_Tally]
) -> None:
    """Adds one class of one image to the tallies of all IoUs. objects: RLE, and whether it is a group."""
    sizes = np.array([coco_mask.area(rle) for rle, _ in objects], np.float64)
    overlap = np.zeros((len(masks), len(objects)))
    if masks and objects:
        overlap = coco_mask.iou(masks, [rle for rle, _ in objects], [0] * len(objects))
    both = overlap * (areas[:, None] + sizes) / (1 + overlap)
    wanted = np.array([not group for _, group in objects], bool) & (sizes >= _LEAST_PIXELS)
    absorbed = both[:, ~wanted].sum(axis=1) / np.maximum(areas, 1)
    for iou, tally in zip(IOUS, tallies):
        near, visited = overlap > iou, np.zeros(len(masks), bool)
        for column in np.flatnonzero(wanted):
            rows = np.flatnonzero(near[:, column] & ~visited)
            visited[rows] = True
            ordered = np.sort(scores[rows])[::-1].tolist()
            tally.right += ordered[:1]
            tally.wrong += ordered[1:]
            tally.missed += not ordered
        stray = ~near.any(axis=1) & (absorbed <= iou)
        tally.wrong += scores[stray].tolist()


def _rle(segmentation: list | dict, height: int, width: int) -> dict[str, Any]:
    if isinstance(segmentation, dict):
        return segmentation
    return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))


def _summary(tally: _Tally) -> float:
    """NaN without objects; else the area under precision over recall, each step as wide as half of its neighbours'."""
    if not tally.right and not tally.missed:
        return np.nan
    if not tally.right and not tally.wrong:
        return 0.0
    scores = np.array(tally.right + tally.wrong)
    right = np.arange(len(scores)) < len(tally.right)
    order = np.argsort(scores, kind="stable")
    _, first = np.unique(scores[order], return_index=True)
    above = right.sum() - np.concatenate([[0], np.cumsum(right[order])])[first]
    precision = np.append(above / (len(scores) - first), 1.0)
    recall = np.append(above / (len(tally.right) + tally.missed), 0.0)
    steps = np.convolve(np.concatenate([recall[:1], recall, [0.0]]), [-0.5, 0, 0.5], "valid")
    return float(precision @ steps)


def _mean(values: np.ndarray) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmean(values))
