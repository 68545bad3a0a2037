"""Test-time augmentation: one detector looks at several views of each image, and its answers become one.

As Detectron's and upstream's: the boxes of all views go through NMS together, then every view predicts the masks or the
keypoints' heat maps of the boxes that are left, and their mean counts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..ops.boxes import rescale
from ..structures import Detections, ImageBatch
from .keypoint_head import KeypointHead
from .rcnn import RCNN
from .retinanet import RetinaNet


def detect(model: RCNN | RetinaNet, views: list[tuple[ImageBatch, bool]]) -> Detections:
    """Detections in pixels of the first view's resized images.

    views: the same images at several sizes, and whether each is to be mirrored.
    """
    base = views[0][0]
    seen = []
    parts: list[tuple[Tensor, ...]] = []
    for images, flipped in views:
        scale = (base.sizes / images.sizes).flip(1).repeat(1, 2)[:, None].to(torch.float32)
        shown = images.mirrored() if flipped else images
        features, padded = model.features(shown)
        boxes, *rest = model.candidates(features, padded, images.sizes)
        boxes = _mirror_boxes(boxes, images.sizes) if flipped else boxes
        parts.append((rescale(boxes, scale, model.plus_one), *rest))
        seen.append((features, images.sizes, scale, flipped))
    joined = [torch.cat(tensors, 1) for tensors in zip(*parts)]
    detections = model.select(*joined)
    for head in model.heads_after_box if isinstance(model, RCNN) else ():
        keypoints, total = isinstance(head, KeypointHead), 0.0
        for features, sizes, scale, flipped in seen:
            boxes = rescale(detections.boxes, 1 / scale, model.plus_one)
            there = replace(detections, boxes=_mirror_boxes(boxes, sizes) if flipped else boxes)
            maps = head.heat_maps(features, there) if keypoints else head.detect(features, there).masks
            if flipped:
                maps = (maps[:, list(head.mirror)] if keypoints else maps).flip(-1)
            total = total + maps
        mean = total / len(views)
        detections = head.place(detections, mean) if keypoints else replace(detections, masks=mean)
    return detections


def _mirror_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    width = sizes[:, 1].to(boxes.dtype)[:, None]
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([width - x2, y1, width - x1, y2], -1)
