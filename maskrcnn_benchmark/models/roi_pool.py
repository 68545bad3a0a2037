"""RoIAlign from a pyramid: each box from the level that suits its size (Lin et al. 2017, section 4.2, equation 1)."""

from __future__ import annotations

import math

from torch import Tensor

from ..ops import boxes as box_ops
from ..ops import roi_align


class RoIPool:
    """scales: 1 / stride of each level. plus_one: maskrcnn-benchmark's arithmetic, from a box's first pixel to its last
    one. The other arguments are roi_align's."""

    def __init__(
        self, scales: tuple[float, ...], output_size: int, sampling_ratio: int, aligned: bool, plus_one: bool = False
    ) -> None:
        self.scales = list(scales)
        self.plus_one = plus_one
        self.output_size, self.sampling_ratio, self.aligned = output_size, sampling_ratio, aligned
        self.min_level = round(-math.log2(scales[0]))
        self.max_level = round(-math.log2(scales[-1]))

    def __call__(self, features: list[Tensor], boxes: Tensor, image_index: Tensor) -> Tensor:
        """features [B, C, Hl, Wl] a level (further levels, such as P6, are not used), boxes [R, 4],
        image_index [R] -> [R, C, S, S]."""
        epsilon = 1e-6 if self.plus_one else 1e-8
        level = roi_align.assign_levels(boxes, self.min_level, self.max_level, epsilon=epsilon)
        return self.from_levels(features, boxes, image_index, level)

    def from_levels(self, features: list[Tensor], boxes: Tensor, image_index: Tensor, level: Tensor) -> Tensor:
        """The same, each box from its own of `level` [R]."""
        return roi_align.roi_align(
            features[: len(self.scales)],
            box_ops.to_inclusive(boxes) if self.plus_one else boxes,
            image_index,
            level,
            self.scales,
            self.output_size,
            self.sampling_ratio,
            self.aligned,
        )
