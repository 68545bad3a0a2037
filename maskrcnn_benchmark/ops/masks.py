"""Masks: training targets from polygons and bitmaps, predictions to COCO run-length encoding (`rle.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import LIBRARY, register_composite
from .rle import compress_rle
from .roi_align import roi_align

# Elements of a temporary in the composites: 2 million doubles are 16 MB.
_BUDGET = 1 << 21
# pycocotools draws a polygon on a grid five times finer than the pixels.
_FINE = 5
# Fine coordinates beyond this are taken as this: far outside any mask, far inside 32 bits.
_FAR = float(1 << 30)

LIBRARY.define(
    "polygon_targets(Tensor points, Tensor polygon_offsets, Tensor instance_offsets, Tensor instance, Tensor boxes,"
    " int size) -> Tensor"
)
LIBRARY.define(
    "paste_masks_rle(Tensor masks, Tensor boxes, int height, int width, float threshold)"
    " -> (Tensor counts, Tensor offsets)"
)


def polygon_targets(
    points: Tensor, polygon_offsets: Tensor, instance_offsets: Tensor, instance: Tensor, boxes: Tensor, size: int
) -> Tensor:
    """Masks of instances, cropped to boxes and drawn at size x size, bit-equal to pycocotools.

    points [P, 2] (x, y) pixels, polygon_offsets [Q + 1], instance_offsets [I + 1]: see `structures.PolygonBatch`.
    instance: [R] int64 in 0..I-1, whose mask to draw; boxes: [R, 4] xyxy pixels, where to look.
    Returns [R, size, size] float32 of 0 and 1. An instance is the union of its polygons; without any it is empty.
    A box side counts as at least 0.1 pixel (detectron2's `rasterize_polygons_within_box`).
    """
    if points.dim() != 2 or points.shape[1] != 2:
        raise ValueError(f"polygon_targets: points must be [P, 2], got {list(points.shape)}")
    if boxes.shape != (*instance.shape, 4) or instance.dim() != 1:
        raise ValueError(
            f"polygon_targets: instance must be [R] and boxes [R, 4], "
            f"got {list(instance.shape)} and {list(boxes.shape)}"
        )
    if (
        polygon_offsets.dim() != 1
        or instance_offsets.dim() != 1
        or 0 in (*polygon_offsets.shape, *instance_offsets.shape)
    ):
        raise ValueError("polygon_targets: polygon_offsets must be [Q + 1] and instance_offsets [I + 1]")
    if size < 1:
        raise ValueError(f"polygon_targets: size must be at least 1, got {size}")
    return torch.ops.maskrcnn_benchmark.polygon_targets(
        points.float(), polygon_offsets, instance_offsets, instance, boxes.float(), size
    )


def bitmap_targets(bitmaps: Tensor, instance: Tensor, boxes: Tensor, size: int, soft: bool) -> Tensor:
    """Masks of instances given as bitmaps, cropped to boxes and resampled to size x size by RoIAlign.

    bitmaps: [I, H, W] uint8 of 0 and 1; instance: [R] int64 in 0..I-1; boxes: [R, 4] xyxy pixels of the bitmaps.
    soft False: aligned RoIAlign, then >= .5 (detectron2); True: unaligned, the values as they are (torchvision).
    Returns [R, size, size] float32 in 0..1.
    """
    level = torch.zeros_like(instance)
    values = roi_align([bitmaps.unsqueeze(1)], boxes, instance, level, [1.0], size, 0, aligned=not soft).squeeze(1)
    return values if soft else (values >= 0.5).to(values.dtype)


def inclusive_crop(boxes: Tensor) -> Tensor:
    """The part of a polygon mask that maskrcnn-benchmark crops for boxes [..., 4] xyxy, given as everywhere without the
    "+1": from the position of the first pixel to that of the last one, though a pixel wide at least."""
    first, last = boxes[..., :2], boxes[..., 2:] - 1
    return torch.cat([first, torch.maximum(last, first + 1)], dim=-1)


def bitmap_targets_whole_pixels(bitmaps: Tensor, instance: Tensor, boxes: Tensor, size: int, soft: bool) -> Tensor:
    """`bitmap_targets` by maskrcnn-benchmark's arithmetic (its BinaryMaskList): the positions of a box's first and last
    pixel are rounded, the bitmap is cropped from the first up to, but without, the last, and the crop is resized by
    bilinear interpolation that does not look beyond it. soft False: 1 where all that a value is made of is 1."""
    height, width = bitmaps.shape[1:]
    limit = torch.stack([torch.full_like(instance, width), torch.full_like(instance, height)], -1).to(boxes.dtype)
    first = torch.minimum(boxes[:, :2].round().clamp(min=0), limit - 1)
    last = torch.maximum(torch.minimum((boxes[:, 2:] - 1).round().clamp(min=0), limit), first + 1)
    side = (last - first)[..., None]
    # Position and sum are rounded as torch's interpolate rounds them (a fused multiply-add, products first): the shares
    # of four ones may add up to less than 1, which is truncated to 0.
    cell = torch.arange(size, dtype=torch.float64, device=boxes.device) + 0.5
    position = ((side / size).double() * cell - 0.5).to(boxes.dtype).clamp(min=0)  # [R, 2, size], in pixels of the crop
    low = torch.minimum(position.floor(), side - 1)
    above = position - low
    pixel = torch.stack([low, torch.minimum(low + 1, side - 1)]) + first[..., None]
    x, y = pixel.to(torch.int64).unbind(2)  # [2, R, size]: below and above
    share_x, share_y = torch.stack([1 - above, above]).unbind(2)
    flat, row = bitmaps.flatten(), (instance[:, None] * height + y) * width
    values = boxes.new_zeros((len(boxes), size, size))
    for i in range(2):
        for j in range(2):
            taps = flat[row[i][:, :, None] + x[j][:, None]]
            values += share_y[i][:, :, None] * share_x[j][:, None] * taps
    return values if soft else (values >= 1).to(values.dtype)


def whole_pixel_boxes(boxes: Tensor, size: int) -> Tensor:
    """Where `paste_masks_rle` must put masks of `size` cells to paste them as maskrcnn-benchmark does (its Masker):

    boxes [D, 4], `x1, y1, x2, y2` as positions of the first and the last pixel, are enlarged by a cell on each side,
    their corners truncated to whole pixels, and the mask with a border of zeros resized to what lies from the first
    pixel to the last. Returns the box within that border.
    """
    scale = (size + 2) / size
    half, centre = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * scale, (boxes[:, 2:] + boxes[:, :2]) * 0.5
    first, last = (centre - half).trunc(), (centre + half).trunc()
    side = (last - first + 1).clamp(min=1)
    cell = side / (size + 2)
    return torch.cat([first + cell, first + side - cell], dim=-1)


def paste_masks_rle(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5) -> list[dict]:
    """Masks predicted in boxes, put into an image of height x width pixels, as COCO RLEs.

    masks: [D, M, M] probabilities in 0..1; boxes: [D, 4] xyxy in pixels of that image.
    The centre (x + .5, y + .5) of each pixel is looked up in the box by bilinear interpolation, zeros beyond the mask;
    values >= threshold (above 0, at most 1) belong to it. A box without area gives an empty mask.
    Returns D dicts {"size": [height, width], "counts": str}, compressed. Waits for the device.
    """
    if masks.dim() != 3 or masks.shape[1] != masks.shape[2] or boxes.shape != (masks.shape[0], 4):
        raise ValueError(
            f"paste_masks_rle: masks must be [D, M, M] and boxes [D, 4], "
            f"got {list(masks.shape)} and {list(boxes.shape)}"
        )
    if not 0 < threshold <= 1:
        raise ValueError(f"paste_masks_rle: threshold must lie above 0 and be at most 1, got {threshold}")
    if height < 0 or width < 0:
        raise ValueError(f"paste_masks_rle: height and width must not be negative, got {height} x {width}")
    counts, offsets = torch.ops.maskrcnn_benchmark.paste_masks_rle(
        masks.float(), boxes.float(), height, width, threshold
    )
    return [{"size": [height, width], "counts": text} for text in compress_rle(counts.cpu(), offsets.cpu())]


def polygon_targets_composite(
    points: Tensor, polygon_offsets: Tensor, instance_offsets: Tensor, instance: Tensor, boxes: Tensor, size: int
) -> Tensor:
    count, polygons = points.shape[0], polygon_offsets.shape[0] - 1
    targets = boxes.new_zeros((boxes.shape[0], size, size))
    if count == 0 or polygons == 0:
        return targets
    # An edge starts at each point and ends at the next one of its polygon, after the last one at the first.
    point = torch.arange(count, device=points.device)
    polygon = torch.searchsorted(polygon_offsets, point, right=True) - 1
    used = (polygon >= 0) & (polygon < polygons)
    polygon = polygon.clamp(0, polygons - 1)
    following = torch.where(point + 1 < polygon_offsets[polygon + 1], point + 1, polygon_offsets[polygon])
    owner = torch.searchsorted(instance_offsets, torch.arange(polygons, device=points.device), right=True) - 1

    # Every box draws every polygon, its own are picked at the end: wasteful, but shapes stay fixed and nothing waits.
    step = max(1, _BUDGET // (max(count, polygons * size) * size))
    for first in range(0, boxes.shape[0], step):
        chunk = slice(first, first + step)
        fine = _fine_points(points, boxes[chunk], size)
        column_rows, crosses = _edge_crossings(fine, fine[:, following], size)
        slot = polygon[:, None] * (size * size + 1) + torch.arange(size, device=points.device) * size + column_rows
        toggles = torch.zeros((fine.shape[0], polygons * (size * size + 1)), dtype=torch.int32, device=points.device)
        toggles.scatter_add_(1, slot.flatten(1), (crosses & used[:, None]).flatten(1).to(torch.int32))
        inside = toggles.view(-1, polygons, size * size + 1)[..., :-1].cumsum(dim=2, dtype=torch.int32) % 2 == 1
        drawn = (inside & (owner == instance[chunk, None])[..., None]).any(dim=1)
        targets[chunk] = drawn.view(-1, size, size).transpose(1, 2).to(targets.dtype)
    return targets


def _fine_points(points: Tensor, boxes: Tensor, size: int) -> Tensor:
    """[R, P, 2] float64 whole numbers: points on each box's fine grid, `(int)(5 x + .5)` in C."""
    corners = boxes.double()
    side = (corners[:, 2:] - corners[:, :2]).clamp(min=0.1)
    # Tensor by tensor: torch takes number / tensor as number * (1 / tensor), which rounds twice.
    scale = torch.full_like(side, size) / side
    local = (points.double() - corners[:, None, :2]) * scale[:, None]
    return (_FINE * local + 0.5).nan_to_num(0.0).clamp(-_FAR, _FAR).trunc()


def _edge_crossings(start: Tensor, end: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where edges cross the middle of pixel columns: row [R, P, size] int64 in 0..size and crosses [R, P, size] bool.

    start, end: [R, P, 2] float64 whole numbers on the fine grid. pycocotools walks an edge in steps of one along its
    longer axis and rounds the other coordinate; where the walk passes from fine column 5c + 2 to 5c + 3, or back, the
    mask's value toggles in column c from row ceil((v + .5) / 5 - .5) on, v the smaller fine row of the two steps. An
    edge does so at most once a column, so the two steps can be computed instead of walked to.
    """
    flat = (end - start).abs()[..., :1] >= (end - start).abs()[..., 1:]
    # The walk always ascends along its longer axis: swap the ends of edges that descend.
    descends = torch.where(flat, start[..., :1] > end[..., :1], start[..., 1:] > end[..., 1:])
    low, high = torch.where(descends, end, start), torch.where(descends, start, end)
    (x0, y0), (x1, y1) = low.unsqueeze(-2).unbind(-1), high.unsqueeze(-2).unbind(-1)
    middle = _FINE * torch.arange(size, dtype=start.dtype, device=start.device) + 2
    crosses = (torch.minimum(x0, x1) <= middle) & (middle < torch.maximum(x0, x1))

    slope = (y1 - y0) / (x1 - x0)
    before = (y0 + slope * (middle - x0) + 0.5).trunc()
    after = (y0 + slope * (middle + 1 - x0) + 0.5).trunc()
    flat_row = torch.minimum(before, after)

    # Steep: the first step on the far side of the middle. A guess, then the walk's own arithmetic, since its rounding
    # decides when the exact crossing falls on a step.
    slope = (x1 - x0) / (y1 - y0)
    guess = ((middle + 0.5 - x0) / slope).ceil()

    def passed(t: Tensor) -> Tensor:
        right = x0 + slope * t + 0.5 >= middle + 1
        return torch.where(x1 > x0, right, ~right)

    step = guess - 1 + (~passed(guess - 1)).to(guess.dtype) + (~passed(guess)).to(guess.dtype)
    steep_row = y0 + step - 1

    row = torch.where(flat, flat_row, steep_row)
    row = (((row + 0.5) / _FINE - 0.5).clamp(0, size)).ceil()
    return torch.where(crosses, row, 0.0).to(torch.int64), crosses


def paste_masks_rle_composite(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """A bounded number of masks at a time, as bitmaps in column-major order."""
    step = max(1, _BUDGET // max(1, height * width))
    counts, runs = [boxes.new_empty(0, dtype=torch.int64)], [boxes.new_zeros(1, dtype=torch.int64)]
    for first in range(0, boxes.shape[0], step):
        values = _paste(masks[first : first + step], boxes[first : first + step], height, width)
        inside = (values >= threshold).flatten(1)
        # A run ends where the value changes (seen from a 0 before the first pixel), and the last one at the end.
        edge = torch.nn.functional.pad(inside, (1, 0)) != torch.nn.functional.pad(inside, (0, 1))
        edge[:, -1] = True
        mask, end = edge.nonzero().unbind(1)
        start = torch.where(mask == mask.roll(1), end.roll(1), 0)
        start[:1] = 0
        counts.append(end - start)
        runs.append(edge.sum(dim=1))
    return torch.cat(counts), torch.cat(runs).cumsum(dim=0)


def _paste(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """[D, width, height] float32: masks [D, M, M] sampled at the pixel centres of the image, 0 beyond their box."""
    x, above_x = _mask_positions(boxes[:, 0], boxes[:, 2], width, masks.shape[1])
    y, above_y = _mask_positions(boxes[:, 1], boxes[:, 3], height, masks.shape[1])
    padded = torch.nn.functional.pad(masks.transpose(1, 2), (1, 2, 1, 2))
    columns = x[:, :, None].expand(-1, -1, padded.shape[2])
    above_x = above_x[:, :, None]
    profile = (1 - above_x) * padded.gather(1, columns) + above_x * padded.gather(1, columns + 1)
    rows = y[:, None, :].expand(-1, width, -1)
    above_y = above_y[:, None, :]
    return (1 - above_y) * profile.gather(2, rows) + above_y * profile.gather(2, rows + 1)


def _mask_positions(start: Tensor, end: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Where the pixel centres 0.5, 1.5, ... lie in a mask of `size` cells: index and fraction, both [D, count].

    The index counts from the zero that pads the mask in front; two zeros pad it behind, and what lies outside reads
    those. The order of operations is that of detectron2's paste and torch's grid_sample, so that values next to the
    threshold fall on the same side.
    """
    centre = torch.arange(count, dtype=start.dtype, device=start.device) + 0.5
    start, side = start[:, None], (end - start)[:, None]
    normalized = (centre - start) / side * 2 - 1
    position = ((normalized + 1) * size - 1) / 2
    inside = (side > 0) & (position > -1) & (position < size)
    position = torch.where(inside, position, size)
    low = position.floor()
    return low.to(torch.int64) + 1, position - low


register_composite("polygon_targets", polygon_targets_composite)
register_composite("paste_masks_rle", paste_masks_rle_composite)


@torch.library.register_fake("maskrcnn_benchmark::polygon_targets", lib=LIBRARY)
def _(points, polygon_offsets, instance_offsets, instance, boxes, size):
    return boxes.new_empty((boxes.shape[0], size, size))


@torch.library.register_fake("maskrcnn_benchmark::paste_masks_rle", lib=LIBRARY)
def _(masks, boxes, height, width, threshold):
    runs = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(runs, dtype=torch.int64), boxes.new_empty(boxes.shape[0] + 1, dtype=torch.int64)
