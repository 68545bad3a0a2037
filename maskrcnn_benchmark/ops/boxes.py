"""Functions of boxes: `[..., 4]` tensors of `x1, y1, x2, y2` in pixels, without the legacy "+1"."""

from __future__ import annotations

import torch
from torch import Tensor


def area(boxes: Tensor) -> Tensor:
    """Area [...] of boxes [..., 4] in square pixels; 0 for a box with a negative side."""
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union, [..., N, M] each, of every pair from a [..., N, 4] and b [..., M, 4]."""
    a, b = a.unsqueeze(-2), b.unsqueeze(-3)
    # One coordinate at a time: the [..., N, M] planes stay contiguous, a [..., N, M, 2] tensor would not.
    width = (torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])).clamp(min=0)
    height = (torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])).clamp(min=0)
    intersection = width * height
    return intersection, area(a) + area(b) - intersection


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union, [..., N, M] in 0..1, of every pair from a [..., N, 4] and b [..., M, 4].

    0 where the union is empty or not a number, so that padding never matches anything.
    """
    intersection, union = intersection_and_union(a, b)
    return torch.where(union > 0, intersection / union, 0)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [B, K, 4] cut to their images: sizes [B, 2] are (height, width) in pixels."""
    limit = sizes.flip(-1).repeat(1, 2).unsqueeze(1).to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limit)


def to_xywh(boxes: Tensor) -> Tensor:
    """Boxes [..., 4] as left, top, width, height, the form of COCO files."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], dim=-1)


def from_xywh(boxes: Tensor) -> Tensor:
    """Boxes [..., 4] given as left, top, width, height, as `x1, y1, x2, y2`."""
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=-1)
