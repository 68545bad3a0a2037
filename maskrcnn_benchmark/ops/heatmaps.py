"""Heat maps -> the points at which they peak, at the resolution of the image (Mask R-CNN, section 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import LIBRARY

# Pixels of enlarged maps at a time: 64 MB. A single box may be larger.
_PIXELS = 1 << 24
# The bend of the cubic kernel, as OpenCV and torch have it.
_BEND = -0.75

LIBRARY.define("find_peaks(Tensor maps, Tensor boxes) -> (Tensor points, Tensor peak)")


def find_peaks(maps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Where each map is highest once it is enlarged bicubically to its box.

    maps: [R, K, S, S] float32, over the boxes. boxes: [R, 4] xyxy pixels; a side counts as at least 1.
    A box of w x h is divided into ceil(w) x ceil(h) cells; the centre of the highest is the point, the first one row by
    row where several are equal.

    Returns points [R, K, 2] (x, y) in pixels of the image and peak [R, K], the enlarged map's value there. No gradient
    flows. Waits for the device, once, to learn the sizes.
    """
    if maps.dim() != 4 or maps.shape[2] != maps.shape[3] or boxes.shape != (len(maps), 4):
        raise ValueError(
            f"find_peaks: expected maps [R, K, S, S] and boxes [R, 4], got {list(maps.shape)} and {list(boxes.shape)}"
        )
    return torch.ops.maskrcnn_benchmark.find_peaks(maps.detach(), boxes.detach())


def _find_peaks(maps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    cells = sides.ceil().long()
    points, peak = maps.new_zeros((*maps.shape[:2], 2)), maps.new_zeros(maps.shape[:2])
    for rows, width, height in _groups(cells.tolist(), maps.shape[1]):
        index = torch.tensor(rows, device=maps.device)
        x, y, value = _peaks_of(maps[index], cells[index], width, height)
        scale = (sides / cells)[index]
        points[index] = (torch.stack((x, y), -1) + 0.5) * scale[:, None] + boxes[index, None, :2]
        peak[index] = value
    return points, peak


def _groups(cells: list[list[int]], keypoints: int) -> list[tuple[list[int], int, int]]:
    """Rows of like size, which are enlarged together, and the width and height that hold each of them."""
    groups: list[tuple[list[int], int, int]] = []
    for row in sorted(range(len(cells)), key=lambda row: cells[row]):
        rows, width, height = groups[-1] if groups else ([], 0, 0)
        wide, high = max(width, cells[row][0]), max(height, cells[row][1])
        # Not together with boxes of half its area: most of their pixels would be padding.
        padded = wide * high * (len(rows) + 1)
        useful = sum(cells[i][0] * cells[i][1] for i in [*rows, row])
        if groups and padded * keypoints <= _PIXELS and padded <= 2 * useful:
            groups[-1] = ([*rows, row], wide, high)
        else:
            groups.append(([row], *cells[row]))
    return groups


def _peaks_of(maps: Tensor, cells: Tensor, width: int, height: int) -> tuple[Tensor, Tensor, Tensor]:
    """Column, row and value of the highest cell of maps [R, K, S, S] enlarged to cells [R, 2] (wide, high), which are
    at most width and height: [R, K] each."""
    size = maps.shape[-1]
    across, down = (_cubic_weights(cells[:, axis], side, size) for axis, side in ((0, width), (1, height)))
    fine = down[:, None] @ (maps @ across[:, None].mT)
    column, row = torch.arange(width, device=maps.device), torch.arange(height, device=maps.device)
    beyond = (column >= cells[:, :1])[:, None] | (row >= cells[:, 1:])[:, :, None]
    value, index = fine.masked_fill_(beyond[:, None], -torch.inf).flatten(2).max(-1)
    return index % width, index // width, value


def _cubic_weights(lengths: Tensor, most: int, size: int) -> Tensor:
    """[R, most, size]: row i of r holds what each of `size` samples adds to sample i of `lengths[r]` (Keys 1981), with
    the border's samples repeated beyond it. Rows from lengths[r] on are meaningless."""
    place = (torch.arange(most, device=lengths.device) + 0.5) * (size / lengths[:, None]) - 0.5
    first = place.floor()
    weights = place.new_zeros((len(lengths), most, size))
    for tap in (-1, 0, 1, 2):
        far = (place - first - tap).abs()
        near = ((_BEND + 2) * far - (_BEND + 3)) * far * far + 1
        tail = ((far - 5) * far + 8) * far * _BEND - 4 * _BEND
        source = (first + tap).long().clamp(0, size - 1)
        weights.scatter_add_(2, source[..., None], torch.where(far <= 1, near, tail)[..., None])
    return weights


# For all devices, whatever MASKRCNN_KERNELS says: there is no kernel to insist on. It is an operator so that exported
# graphs can hold it: which boxes are enlarged together depends on their sizes.
LIBRARY.impl("find_peaks", _find_peaks, "CompositeExplicitAutograd")


@torch.library.register_fake("maskrcnn_benchmark::find_peaks", lib=LIBRARY)
def _(maps, boxes):
    return maps.new_empty((*maps.shape[:2], 2)), maps.new_empty(maps.shape[:2])
