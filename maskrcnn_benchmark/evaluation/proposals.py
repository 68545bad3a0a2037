"""Average recall of box proposals, whatever their class (Hosang et al. 2016; Detectron's evaluate_box_proposals, which
maskrcnn-benchmark has too)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from .results import Results

LIMITS = (100, 1000)
# Suffix of a name -> range of an object's area in pixels, both ends included
AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
THRESHOLDS = np.linspace(0.5, 0.95, 10)


def average_recall(annotations: list[dict[str, Any]], results: Results) -> dict[str, float | None]:
    """AR@100, ARs@100, ... AR@1000, ...: recall at IoU .5, .55, ... .95, on average, of the best 100 or 1000 proposals
    of each image; None where there are no objects of the size.

    annotations: COCO's, with bbox and area; crowds need not be found. results: with boxes; classes do not matter.
    """
    truth: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in annotations:
        if not annotation["iscrowd"]:
            truth[annotation["image_id"]].append(annotation)
    overlaps = {name: [] for name in _names()}
    order = np.argsort(-results.scores, kind="stable")
    for image, objects in truth.items():
        rows = order[results.image_ids[order] == image]
        boxes, areas = np.array([a["bbox"] for a in objects], np.float64), np.array([a["area"] for a in objects])
        table = coco_mask.iou(results.boxes[rows], boxes, [0] * len(boxes)) if len(rows) else np.zeros((0, len(boxes)))
        for limit in LIMITS:
            for suffix, (low, high) in AREAS.items():
                chosen = table[:limit, (areas >= low) & (areas <= high)]
                overlaps[f"AR{suffix}@{limit}"].append(_found(chosen))
    return {name: _recall(np.concatenate(parts)) if parts else None for name, parts in overlaps.items()}


def _names() -> list[str]:
    return [f"AR{suffix}@{limit}" for limit in LIMITS for suffix in AREAS]


def _found(overlaps: np.ndarray) -> np.ndarray:
    """[G]: of [P, G] IoUs that of each object with its proposal, each proposal serving one: the best pair first."""
    overlaps, found = overlaps.copy(), np.zeros(overlaps.shape[1])
    for _ in range(min(overlaps.shape)):
        row, column = np.unravel_index(overlaps.argmax(), overlaps.shape)
        found[column] = overlaps[row, column]
        overlaps[row], overlaps[:, column] = -1, -1
    return found


def _recall(overlaps: np.ndarray) -> float | None:
    return float((overlaps[:, None] >= THRESHOLDS).mean()) if len(overlaps) else None
