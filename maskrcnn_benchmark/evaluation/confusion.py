"""Which class is taken for which, and how well each image is seen: detections matched with objects regardless of
class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from .results import Results


@dataclass
class Confusion:
    """matrix: [C + 1, C + 1] int64; rows are the objects' classes, columns the detections'. The last row counts
    detections of no object, the last column objects that were missed. images: id -> how many objects it has, how many
    were detected, and how many of these are right; images with neither are left out."""

    matrix: np.ndarray
    images: dict[int, tuple[int, int, int]] = field(default_factory=dict)


def confusion(
    annotations: list[dict[str, Any]],
    results: Results,
    categories: list[int],
    iou: float = 0.5,
    least_score: float = 0.5,
) -> Confusion:
    """Of all classes, in the order of `categories`, and of each image.

    annotations: COCO's, with bbox. Detections below least_score do not count. By falling score each takes the free
    object that it overlaps most, by `iou` at least; what is left over and lies in a crowd does not count.
    """
    place = {category: index for index, category in enumerate(categories)}
    nothing = len(categories)
    counted = Confusion(np.zeros((nothing + 1, nothing + 1), np.int64))
    matrix = counted.matrix
    objects: dict[int, list[dict]] = {}
    for annotation in annotations:
        objects.setdefault(annotation["image_id"], []).append(annotation)
    index = np.flatnonzero(results.scores >= least_score)
    index = index[np.lexsort((-results.scores[index], results.image_ids[index]))]
    images, starts = np.unique(results.image_ids[index], return_index=True)
    found = dict(zip(images.tolist(), np.split(index, starts[1:])))
    for image in objects.keys() | found.keys():
        here, rows = objects.get(image, []), found.get(image, index[:0])
        crowd = [bool(a["iscrowd"]) for a in here]
        overlaps = np.zeros((len(rows), 0))
        if here and len(rows):
            overlaps = coco_mask.iou(results.boxes[rows], np.array([a["bbox"] for a in here], np.float64), crowd)
        missed = {column for column, is_crowd in enumerate(crowd) if not is_crowd}
        looked_for, detections, right = len(missed), 0, 0
        for row, overlap in zip(rows, overlaps):
            best = max(missed, key=overlap.__getitem__, default=None)
            detected = place[int(results.category_ids[row])]
            if best is not None and overlap[best] >= iou:
                actual = place[here[best]["category_id"]]
                missed.remove(best)
            elif (overlap[crowd] >= iou).any():
                continue
            else:
                actual = nothing
            matrix[actual, detected] += 1
            detections += 1
            right += actual == detected
        for column in missed:
            matrix[place[here[column]["category_id"]], nothing] += 1
        counted.images[int(image)] = looked_for, detections, right
    return counted
