"""Functions of boxes: `[..., 4]` tensors of `x1, y1, x2, y2` in pixels, without the legacy "+1".

Detectron and maskrcnn-benchmark name a box by the first and the last pixel inside, so that its width is x2 - x1 + 1.
Such an inclusive box is `x1, y1, x2 + 1, y2 + 1` here: then areas, overlaps, coder and suppression are the same, and
only what takes a corner for the position of a pixel (resizing, RoIAlign, cropping and pasting masks) must know.
"""

from __future__ import annotations

import math

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


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU, [..., N, M] in -1..1, of every pair from a [..., N, 4] and b [..., M, 4].

    The IoU less the share of the enclosing box that is in neither box (Rezatofighi et al. 2019). A quotient without a
    positive denominator counts as 0, here and in `diou` and `ciou`, so that gradients stay finite for empty boxes.
    """
    intersection, union = intersection_and_union(a, b)
    width, height = _enclosing_sides(a, b)
    enclosing = width * height
    return _quotient(intersection, union) - _quotient(enclosing - union, enclosing)


def diou(a: Tensor, b: Tensor) -> Tensor:
    """Distance IoU, [..., N, M] in -1..1, of every pair from a [..., N, 4] and b [..., M, 4].

    The IoU less the squared distance of the centres over the squared diagonal of the enclosing box (Zheng et al. 2020,
    section 3.2).
    """
    return _quotient(*intersection_and_union(a, b)) - _relative_distance(a, b)


def ciou(a: Tensor, b: Tensor) -> Tensor:
    """Complete IoU, [..., N, M] in -2..1, of every pair from a [..., N, 4] and b [..., M, 4].

    The DIoU less alpha v, where v in 0..1 measures how the boxes' aspect ratios differ and alpha = v / (1 - IoU + v)
    (Zheng et al. 2020, section 3.3). As in the published code, alpha is a constant to the gradient.
    """
    overlap = _quotient(*intersection_and_union(a, b))
    difference = (_aspect_angle(a).unsqueeze(-1) - _aspect_angle(b).unsqueeze(-2)) * (2 / math.pi)
    v = difference * difference
    alpha = _quotient(v, 1 - overlap + v).detach()
    return overlap - _relative_distance(a, b) - alpha * v


def paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """`giou` [...] of each box of a [..., 4] with its own partner in b [..., 4]."""
    return giou(a.unsqueeze(-2), b.unsqueeze(-2))[..., 0, 0]


def paired_diou(a: Tensor, b: Tensor) -> Tensor:
    """`diou` [...] of each box of a [..., 4] with its own partner in b [..., 4]."""
    return diou(a.unsqueeze(-2), b.unsqueeze(-2))[..., 0, 0]


def paired_ciou(a: Tensor, b: Tensor) -> Tensor:
    """`ciou` [...] of each box of a [..., 4] with its own partner in b [..., 4]."""
    return ciou(a.unsqueeze(-2), b.unsqueeze(-2))[..., 0, 0]


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """a / b, or 0 where b is not above 0; the denominator is replaced there lest the gradient be 0 * infinity."""
    positive = b > 0
    return torch.where(positive, a, 0) / torch.where(positive, b, 1)


def _enclosing_sides(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Width and height, [..., N, M] each, of the smallest box around every pair."""
    a, b = a.unsqueeze(-2), b.unsqueeze(-3)
    width = torch.maximum(a[..., 2], b[..., 2]) - torch.minimum(a[..., 0], b[..., 0])
    height = torch.maximum(a[..., 3], b[..., 3]) - torch.minimum(a[..., 1], b[..., 1])
    return width, height


def _relative_distance(a: Tensor, b: Tensor) -> Tensor:
    """[..., N, M]: the squared distance of every pair's centres over the squared diagonal of the box around both."""
    width, height = _enclosing_sides(a, b)
    a_centre, b_centre = (a[..., :2] + a[..., 2:]) / 2, (b[..., :2] + b[..., 2:]) / 2
    x = a_centre[..., 0].unsqueeze(-1) - b_centre[..., 0].unsqueeze(-2)
    y = a_centre[..., 1].unsqueeze(-1) - b_centre[..., 1].unsqueeze(-2)
    return _quotient(x * x + y * y, width * width + height * height)


def _aspect_angle(boxes: Tensor) -> Tensor:
    """[...]: the arc tangent of width / height in 0..pi / 2, 0 for a box that is a point."""
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    width, height = sides[..., 0], sides[..., 1]
    # At (0, 0) the angle is 0 whatever the height, but its gradient is not a number.
    return torch.atan2(width, torch.where(width + height > 0, height, 1))


def clip(boxes: Tensor, sizes: Tensor, least_side: float = 0.0) -> Tensor:
    """Boxes [B, K, 4] cut to their images: sizes [B, 2] are (height, width) in pixels.

    least_side: what is left of each side at least, next to the border that a box lies beyond; maskrcnn-benchmark, which
    clips first and last pixels to 0..width - 1, leaves 1.
    """
    limit = sizes.flip(-1).unsqueeze(1).to(boxes.dtype)
    first = torch.minimum(boxes[..., :2].clamp(min=0), limit - least_side)
    return torch.cat([first, torch.minimum(boxes[..., 2:].clamp(min=least_side), limit)], dim=-1)


def to_inclusive(boxes: Tensor) -> Tensor:
    """Boxes [..., 4] by the positions of their first and last pixels: x1, y1, x2 - 1, y2 - 1."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] - 1], dim=-1)


def from_inclusive(boxes: Tensor) -> Tensor:
    """Boxes [..., 4] given by the positions of their first and last pixels: the inverse of `to_inclusive`."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] + 1], dim=-1)


def rescale(boxes: Tensor, factors: Tensor, plus_one: bool = False) -> Tensor:
    """Boxes [..., 4] of an image that is resized by `factors` [..., 4]; plus_one: the positions of their first and last
    pixels are scaled, as maskrcnn-benchmark does, and the last one stays a pixel wide."""
    return from_inclusive(to_inclusive(boxes) * factors) if plus_one else boxes * factors


def to_xywh(boxes: Tensor) -> Tensor:
    """Boxes [..., 4] as left, top, width, height, the form of COCO files."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], dim=-1)


def from_xywh(boxes: Tensor) -> Tensor:
    """Boxes [..., 4] given as left, top, width, height, as `x1, y1, x2, y2`."""
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=-1)
