"""Anchor boxes (Ren et al. 2015, section 3.1.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def cell_anchors(
    sizes: tuple[float, ...],
    aspect_ratios: tuple[float, ...],
    rounding: str = "none",
    stride: float = 1.0,
    offset: float = 0.0,
) -> Tensor:
    """[R * S, 4] float32 anchors of the first cell, ratio outer, size inner; ratio = height / width, area = size^2.

    rounding: "none" (detectron2's exact floats), "corners" (whole pixels, torchvision) or "stride" (the sides of the
        anchor of size `stride` are whole pixels, the others multiples of it: maskrcnn-benchmark).
    offset: where in the cell the centres lie, in strides: 0 its corner, .5 its middle (maskrcnn-benchmark).
    """
    anchors, centre = [], offset * stride
    for ratio in aspect_ratios:
        for size in sizes:
            w, h = size * ratio**-0.5, size * ratio**0.5
            if rounding == "stride":
                whole = round(math.sqrt(stride * stride / ratio))
                w, h = (side * (size / stride) for side in (whole, round(whole * ratio)))
            anchors.append((centre - w / 2, centre - h / 2, centre + w / 2, centre + h / 2))
    anchors = torch.tensor(anchors, dtype=torch.float32)
    return anchors.round() if rounding == "corners" else anchors


def octave_sizes(sizes: tuple[float, ...], octave: float, steps: int, whole: bool) -> tuple[tuple[float, ...], ...]:
    """RetinaNet's anchor sizes of each level: `steps` from one size on, each `octave ** (1 / steps)` times the one
    before. whole: cut to whole pixels (torchvision)."""
    fine = (tuple(size * octave ** (step / steps) for step in range(steps)) for size in sizes)
    return tuple(tuple(map(int, level)) if whole else level for level in fine)


def grid_anchors(cell: Tensor, height: int, width: int, stride: tuple[float, float]) -> Tensor:
    """[height * width * A, 4]: the cell's anchors at every position of a map, row by row, anchor innermost."""
    y = torch.arange(height, device=cell.device, dtype=torch.float32) * stride[0]
    x = torch.arange(width, device=cell.device, dtype=torch.float32) * stride[1]
    y, x = torch.meshgrid(y, x, indexing="ij")
    shift = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
    return (shift + cell).reshape(-1, 4)


class AnchorGenerator(nn.Module):
    """Anchors of every level of a pyramid, kept for the shapes seen first: a run has few. What is kept stays, for a
    captured graph reads it where it lies. A compiled graph makes its own: what is kept would change from call to call,
    and each change would compile it anew.

    sizes: for each level a tuple of anchor sides in pixels.
    strides: pixels from one position to the next, a level.
    rounding, offset: of `cell_anchors`.
    grid: "grid" takes the strides as given; "image" the padded image's side // the map's side (torchvision).
    """

    CACHED_SHAPES = 16

    def __init__(
        self,
        sizes: tuple[tuple[float, ...], ...],
        aspect_ratios: tuple[float, ...],
        strides: tuple[int, ...],
        rounding: str = "none",
        grid: str = "grid",
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        for level, (side, stride) in enumerate(zip(sizes, strides)):
            cell = cell_anchors(side, aspect_ratios, rounding, stride, offset)
            self.register_buffer(f"cell{level}", cell, persistent=False)  # on the device already when a step needs it
        self.strides = strides
        self.grid = grid
        self.per_position, self.ratios = len(aspect_ratios) * len(sizes[0]), len(aspect_ratios)
        self._cache: dict[tuple, list[Tensor]] = {}

    def forward(
        self, shapes: list[tuple[int, int]], image_shape: tuple[int, int], device: torch.device
    ) -> list[Tensor]:
        """For maps of `shapes` (height, width): one [H * W * A, 4] float32 tensor a level."""
        if torch.compiler.is_compiling():
            return self._make(shapes, image_shape, device)
        key = (tuple(shapes), image_shape, device)
        if key in self._cache:
            return self._cache[key]
        anchors = self._make(shapes, image_shape, device)
        if len(self._cache) < self.CACHED_SHAPES:
            self._cache[key] = anchors
        return anchors

    def _make(self, shapes: list[tuple[int, int]], image_shape: tuple[int, int], device: torch.device) -> list[Tensor]:
        return [
            grid_anchors(cell.to(device), h, w, self._stride(stride, (h, w), image_shape))
            for cell, (h, w), stride in zip(self.buffers(), shapes, self.strides)
        ]

    def _stride(self, stride: int, shape: tuple[int, int], image_shape: tuple[int, int]) -> tuple[int, int]:
        if self.grid == "grid":
            return stride, stride
        return image_shape[0] // shape[0], image_shape[1] // shape[1]
