"""Detections in a data set's own terms, as arrays: half a million of them as dicts would be millions of objects, which
cost ten times the memory and keep the garbage collector busy."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from ..ops.masks import paste_masks_rle, whole_pixel_boxes
from ..ops.rle import rle_areas
from ..structures import Detections, ImageBatch


@dataclass
class Results:
    """N detections, in pixels of the original images.

    image_ids, category_ids: [N] int64, the data set's. scores: [N] float64. boxes: [N, 4] float64 x, y, width, height.
    masks: N compressed RLEs, `counts` alone; sizes: [N, 2] int64 (height, width) of their images; areas: [N] float64,
    pixels of each mask. keypoints: [N, K, 3] float64 x, y and score; in files of truth the visibility. None
    for what there is not.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray | None = None
    masks: list[str] | None = None
    sizes: np.ndarray | None = None
    areas: np.ndarray | None = None
    keypoints: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def select(self, index: np.ndarray) -> Results:
        """The detections `index` [M] int64."""
        chosen = {}
        for field in fields(self):
            value = getattr(self, field.name)
            chosen[field.name] = [value[i] for i in index.tolist()] if isinstance(value, list) else value
            if isinstance(value, np.ndarray):
                chosen[field.name] = value[index]
        return Results(**chosen)

    def rles(self) -> list[dict[str, Any]]:
        """The masks as COCO RLEs. Those of one image follow each other, and share their list of height and width."""
        rles, before, size = [], (-1, -1), []
        for counts, here in zip(self.masks, zip(*self.sizes.T.tolist())):
            if here != before:
                before, size = here, list(here)
            rles.append({"size": size, "counts": counts})
        return rles

    def to_list(self) -> list[dict[str, Any]]:
        """In COCO's results format."""
        columns: dict[str, Any] = {"image_id": self.image_ids.tolist(), "category_id": self.category_ids.tolist()}
        if self.boxes is not None:
            columns["bbox"] = self.boxes.tolist()
        columns["score"] = self.scores.tolist()
        if self.masks is not None:
            columns["segmentation"] = self.rles()
        if self.keypoints is not None:
            columns["keypoints"] = self.keypoints.reshape(len(self), 3 * self.keypoints.shape[1]).tolist()
        return [dict(zip(columns, row)) for row in zip(*columns.values())]


def concatenate(parts: Sequence[Results]) -> Results:
    """All detections of the parts, at least one, which have the same fields."""
    joined: dict[str, Any] = {}
    for field in fields(Results):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], np.ndarray):
            joined[field.name] = np.concatenate(values)
        else:
            joined[field.name] = None if values[0] is None else [mask for masks in values for mask in masks]
    return Results(**joined)


def detections_to_results(
    detections: Detections,
    images: ImageBatch,
    category_ids: list[int],
    threshold: float = 0.5,
    plus_one: bool = False,
    paste_whole_pixels: bool = False,
) -> Results:
    """A model's detections in pixels of the original images. Waits for the device.

    category_ids: of label l the data set's id is `category_ids[l - 1]`. threshold: pixels whose probability is not
    below it belong to the mask. Boxes are scaled along each axis by itself, and clipped to the image; keypoints are
    scaled likewise. Masks become RLEs image by image, so that no batch of full-size masks is ever held. Detections of
    the background, which a RetinaNet with a channel for it can make, are left out.

    plus_one: the positions of a box's first and last pixel are scaled, as maskrcnn-benchmark does, without a clip.
    paste_whole_pixels: masks are pasted by `whole_pixel_boxes`; a probability equal to the threshold is then outside.
    """
    valid = (detections.valid & (detections.labels > 0)).cpu().numpy()
    row = np.nonzero(valid)[0]
    original = np.array(images.original_sizes, np.int64).reshape(-1, 2)
    scale = (original / images.sizes.cpu().numpy())[row][:, [1, 0, 1, 0]]
    last_pixel = np.array([0.0, 0, 1, 1]) if plus_one else np.zeros(4)
    corners = (detections.boxes.cpu().numpy()[valid].astype(np.float64) - last_pixel) * scale
    if not plus_one:
        corners = np.clip(corners, 0, original[row][:, [1, 0, 1, 0]])
    whole = corners + last_pixel
    results = Results(
        image_ids=np.array(images.image_ids, np.int64)[row],
        category_ids=np.array(category_ids, np.int64)[detections.labels.cpu().numpy()[valid] - 1],
        scores=detections.scores.cpu().numpy()[valid].astype(np.float64),
        boxes=np.concatenate([whole[:, :2], whole[:, 2:] - whole[:, :2]], axis=1),
    )
    if detections.keypoints is not None:
        points = detections.keypoints.cpu().numpy()[valid].astype(np.float64)
        points[..., :2] *= scale[:, None, :2]
        results.keypoints = points
    if detections.masks is not None:
        boxes, ends = torch.from_numpy(whole.astype(np.float32)), np.cumsum(valid.sum(axis=1)).tolist()
        if paste_whole_pixels:
            boxes = whole_pixel_boxes(torch.from_numpy(corners.astype(np.float32)), detections.masks.shape[-1])
            threshold = min(1.0, float(np.nextafter(np.float32(threshold), np.float32(2))))

        def paste(i: int, start: int, end: int) -> list[str]:
            # On a CPU, valid detections come first: a view, not a copy. Elsewhere the mask head's padding is dropped.
            masks = detections.masks[i]
            masks = masks[: end - start] if valid[i, : end - start].all() else masks[detections.valid[i]]
            rles = paste_masks_rle(masks, boxes[start:end].to(masks.device), *images.original_sizes[i], threshold)
            return [rle["counts"] for rle in rles]

        # A thread an image: within one, the cores would wait for each other twice a millisecond.
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            pasted = list(threads.map(paste, range(len(ends)), [0, *ends], ends))
        results.sizes, results.masks = original[row], [mask for masks in pasted for mask in masks]
        results.areas = rle_areas(results.masks, results.sizes.prod(axis=1)).astype(np.float64)
    return results
