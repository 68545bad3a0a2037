"""What flows through the package: dataclasses of batched, padded tensors. The type names the stage.

Conventions, stated once:

- Boxes are `[..., 4]` float32 `x1, y1, x2, y2` in absolute pixels of the *resized* image, without the legacy "+1":
  a box that covers the first pixel alone is `0, 0, 1, 1`.
- Labels are int64, 1..C for objects; 0 is the background.
- Images are RGB, 0..255, `[B, 3, H, W]`, zero beyond each image's own size; the model normalises them.
- Sizes are `(height, width)`.
- `valid` marks what is real: rows beyond an image's own count are padding. G, K and D are fixed or bucketed,
  so that shapes repeat from step to step and a step can be captured as a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

B = TypeVar("B", bound="Batch")


class Batch:
    """Moves every tensor of a dataclass, nested ones too."""

    def _map(self: B, function) -> B:
        changes = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changes[field.name] = function(value)
            elif isinstance(value, Batch):
                changes[field.name] = value._map(function)
        return replace(self, **changes)

    def to(self: B, device: torch.device | str, non_blocking: bool = False) -> B:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def clone(self: B) -> B:
        return self._map(Tensor.clone)

    def tensors(self) -> list[Tensor]:
        """All of them, in the order of the fields."""
        found: list[Tensor] = []
        self._map(lambda tensor: found.append(tensor) or tensor)
        return found

    def pin_memory(self: B) -> B:
        return self._map(Tensor.pin_memory)

    def share_memory(self: B) -> B:
        return self._map(Tensor.share_memory_)


@dataclass
class ImageBatch(Batch):
    """Images padded to one shape.

    pixels: [B, 3, H, W] uint8 or float32, RGB, 0..255, zero outside the image.
    sizes: [B, 2] int64 (height, width) of each image inside the padding.
    original_sizes: (height, width) of each image file, for results in its own pixels.
    image_ids: the data set's ids, for results and error messages.
    to_mirror: [B] bool, the images whose pixels the device has still to mirror, on the way to it; else None.
    """

    pixels: Tensor
    sizes: Tensor
    original_sizes: list[tuple[int, int]]
    image_ids: list[int]
    to_mirror: Tensor | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    def mirrored(self, where: Tensor | None = None) -> ImageBatch:
        """Left and right exchanged within each image's own width, in all or `where` [B] bool is True; the padding stays
        on the right."""
        width = self.sizes[:, 1:]
        column = torch.arange(self.pixels.shape[-1], device=width.device)
        inside = column < width if where is None else (column < width) & where[:, None]
        source = torch.where(inside, width - 1 - column, column)
        index = source[:, None, None].expand(-1, *self.pixels.shape[1:3], -1)
        return replace(self, pixels=self.pixels.gather(3, index), to_mirror=None)


@dataclass
class PolygonBatch(Batch):
    """Polygon masks of B x G instances, packed: three levels of offsets instead of lists of lists of lists.

    points: [P, 2] float32 (x, y) in pixels of the resized image.
    polygon_offsets: [Q + 1] int64; polygon q is `points[polygon_offsets[q]:polygon_offsets[q + 1]]`.
    instance_offsets: [B * G + 1] int64; instance i owns polygons `instance_offsets[i]:instance_offsets[i + 1]`
        (none for padding). An instance is the union of its polygons.
    """

    points: Tensor
    polygon_offsets: Tensor
    instance_offsets: Tensor


@dataclass
class BitmapBatch(Batch):
    """Masks as bitmaps, for annotations that have no polygons (RLE).

    bitmaps: [B, G, H, W] uint8, 0 or 1, at the padded image's resolution.
    """

    bitmaps: Tensor


@dataclass
class Targets(Batch):
    """Ground truth of a batch: boxes [B, G, 4], labels [B, G], valid [B, G] bool, masks or None.

    keypoints: [B, G, K, 3] float32 (x, y in pixels of the resized image, visibility: 0 not labelled, 1 hidden,
    2 visible), zeros where there is none and on padding; None without MODEL.KEYPOINT_ON.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    masks: PolygonBatch | BitmapBatch | None = None
    keypoints: Tensor | None = None


@dataclass
class Proposals(Batch):
    """What the RPN proposes: boxes [B, K, 4], scores [B, K] in 0..1 by falling score, valid [B, K] bool."""

    boxes: Tensor
    scores: Tensor
    valid: Tensor

    def detections(self) -> Detections:
        """As objects of label 1."""
        labels = torch.ones_like(self.valid, dtype=torch.int64)
        return Detections(boxes=self.boxes, scores=self.scores, labels=labels, valid=self.valid)


@dataclass
class Detections(Batch):
    """What the heads detect, by falling score.

    boxes [B, D, 4], scores [B, D] in 0..1, labels [B, D], valid [B, D] bool, and masks [B, D, M, M] float
    probabilities inside each box, or None without a mask head.
    keypoints: [B, D, K, 3] float32 (x, y, score) or None without a keypoint head. score, 0..1 and a little more: the
    softmax probability of the heat map's cells at the highest point of the enlarged map (detectron2's definition).
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    valid: Tensor
    masks: Tensor | None = None
    keypoints: Tensor | None = None


def flatten_valid(valid: Tensor, tensors: Sequence[Tensor], compact: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Rows of a batch for a head: `[B, K, ...]` tensors become `[R, ...]`.

    The one place where padded rows are dropped. With `compact` (a CPU, where waiting costs nothing and padded
    work does) R is the number of valid rows; otherwise R is B * K, the shapes stay fixed and nothing waits for
    the device. The losses are the same: padded rows have weight zero.

    Returns `(index, weight, rows)`: index [R] int64 into the flattened B * K rows, weight [R] float32 of 0 or 1,
    and the gathered tensors.
    """
    flat = valid.flatten()
    if compact:
        index = flat.nonzero().squeeze(1)
        return index, torch.ones_like(index, dtype=torch.float32), [t.flatten(0, 1)[index] for t in tensors]
    index = torch.arange(flat.numel(), device=flat.device)
    return index, flat.to(torch.float32), [t.flatten(0, 1) for t in tensors]
