"""What may happen to an image's geometry: each function moves boxes, masks and keypoints with the pixels.

Everything is an affine map of points, x' = A x + b, in pixels whose first one covers 0..1. What reaches beyond the
image afterwards is cut off by `cut_to_image`.

plus_one: maskrcnn-benchmark's arithmetic instead: points are positions of pixels, the first at 0, and of a box the
first and the last pixel move.
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
from PIL import Image

from .sample import Polygons, Sample

GRAY = (128, 128, 128)


def resize(sample: Sample, height: int, width: int, by: str = "opencv", plus_one: bool = False) -> Sample:
    """Pixels: bilinear when enlarging, area average when shrinking (antialiased), or, by "pillow", its bilinear filter;
    bitmaps bilinear, cut at .5, with plus_one at 1."""
    if (height, width) == sample.size:
        return sample
    if by == "pillow":
        image = np.array(Image.fromarray(sample.image).resize((width, height), Image.Resampling.BILINEAR))
    else:
        shrinks = height < sample.size[0] or width < sample.size[1]
        image = cv2.resize(sample.image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    matrix = np.diag([width / sample.size[1], height / sample.size[0]])
    bitmaps = sample.bitmaps
    if bitmaps is not None:
        least = 255 if plus_one else 128
        resized = [cv2.resize(bitmap * 255, (width, height)) >= least for bitmap in bitmaps]
        bitmaps = np.array(resized, np.uint8).reshape(len(bitmaps), height, width)
    return _move(sample, matrix, (0, 0), image, bitmaps, plus_one)


def mirror(sample: Sample, horizontally: bool, plus_one: bool = False, pixels: bool = True) -> Sample:
    """Left becomes right (x becomes width - x, with plus_one width - 1 - x), or top becomes bottom.

    pixels: False notes in the sample that its pixels are still to be mirrored (horizontally alone).
    """
    height, width = sample.size
    if horizontally:
        image, matrix, shift = sample.image, np.diag([-1, 1]), (width - plus_one, 0)
        if pixels:
            image = cv2.flip(image, 1)
        else:
            sample = replace(sample, to_mirror=not sample.to_mirror)
    else:
        image, matrix, shift = cv2.flip(sample.image, 0), np.diag([1, -1]), (0, height - plus_one)
    bitmaps = sample.bitmaps
    if bitmaps is not None:
        bitmaps = np.ascontiguousarray(np.flip(bitmaps, 2 if horizontally else 1))
    return _move(sample, matrix, shift, image, bitmaps, plus_one)


def crop(sample: Sample, left: int, top: int, width: int, height: int) -> Sample:
    """The part of the image that starts at (left, top), at most as far as the image goes."""
    rows, columns = slice(top, top + height), slice(left, left + width)
    image = np.ascontiguousarray(sample.image[rows, columns])
    bitmaps = None if sample.bitmaps is None else sample.bitmaps[:, rows, columns]
    return cut_to_image(_move(sample, np.eye(2), (-left, -top), image, bitmaps))


def place(sample: Sample, left: int, top: int, width: int, height: int, fill: tuple[int, ...]) -> Sample:
    """The image on a canvas of width x height that holds it, its first pixel at (left, top)."""
    sample = cut_to_image(sample)  # what lay outside must not appear on the canvas
    h, w = sample.size
    image = np.empty((height, width, 3), np.uint8)
    image[:] = fill
    image[top : top + h, left : left + w] = sample.image
    bitmaps = sample.bitmaps
    if bitmaps is not None:
        bitmaps = np.pad(bitmaps, ((0, 0), (top, height - top - h), (left, width - left - w)))
    return _move(sample, np.eye(2), (left, top), image, bitmaps)


def warp(sample: Sample, matrix: np.ndarray, shift: np.ndarray, fill: tuple[int, ...]) -> Sample:
    """x' = matrix [2, 2] x + shift [2], the image's size kept; a box becomes the one around its mask, or around its
    turned corners where there is no mask."""
    sample = cut_to_image(sample)  # what lay outside must not be moved into the image
    height, width = sample.size
    # OpenCV's pixel centres are whole numbers, ours lie at .5.
    pixels = np.column_stack([matrix, matrix @ (0.5, 0.5) + shift - 0.5])
    image = cv2.warpAffine(sample.image, pixels, (width, height), borderValue=fill)
    bitmaps = sample.bitmaps
    if bitmaps is not None:
        warped = [cv2.warpAffine(bitmap * 255, pixels, (width, height)) >= 128 for bitmap in bitmaps]
        bitmaps = np.array(warped, np.uint8).reshape(bitmaps.shape)
    moved = _move(sample, matrix, shift, image, bitmaps)
    return cut_to_image(replace(moved, boxes=_intersect(moved.boxes, mask_bounds(moved))))


def _move(
    sample: Sample,
    matrix: np.ndarray,
    shift: tuple[float, float],
    image: np.ndarray,
    bitmaps: np.ndarray | None,
    plus_one: bool = False,
) -> Sample:
    """Boxes, polygons and keypoints through x' = matrix x + shift, beside the image and bitmaps that went already."""
    matrix, shift = np.asarray(matrix, np.float32), np.asarray(shift, np.float32)
    last_pixel = np.array([0, 0, 1, 1] if plus_one else [0, 0, 0, 0], np.float32)
    corners = (sample.boxes - last_pixel)[:, [[0, 1], [2, 1], [2, 3], [0, 3]]] @ matrix.T + shift
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1) + last_pixel
    polygons, keypoints = sample.polygons, sample.keypoints
    if polygons is not None:
        polygons = replace(polygons, points=polygons.points @ matrix.T + shift)
    if keypoints is not None:
        moved = keypoints[..., :2] @ matrix.T + shift
        keypoints = np.concatenate([moved, keypoints[..., 2:]], axis=2) * (keypoints[..., 2:] > 0)
        if np.linalg.det(matrix) < 0 and sample.keypoint_mirror is not None:
            keypoints = keypoints[:, list(sample.keypoint_mirror)]
    return replace(sample, image=image, boxes=boxes, polygons=polygons, bitmaps=bitmaps, keypoints=keypoints)


def drop_small(sample: Sample, side: float) -> Sample:
    """Without the objects whose box is not wider and higher than `side` pixels."""
    keep = (sample.boxes[:, 2:] - sample.boxes[:, :2] > side).all(axis=1)
    return sample if keep.all() else sample.select(keep)


def clip_to_image(sample: Sample) -> Sample:
    """Boxes clipped to the image; objects whose box has no area then are dropped. Polygons may reach beyond the image:
    what lies there is never drawn."""
    height, width = sample.size
    boxes = np.clip(sample.boxes, 0, np.array([width, height, width, height], np.float32))
    return drop_small(replace(sample, boxes=boxes), 0)


def cut_to_image(sample: Sample) -> Sample:
    """Everything beyond the image is cut off: polygons get new corners at its border, an object's box becomes the one
    around what is left of its mask, keypoints outside are gone, and so are objects of which nothing is left."""
    height, width = sample.size
    border = np.array([0, 0, width, height], np.float32)
    reaches_out = ((sample.boxes - border) * (-1, -1, 1, 1) > 0).any(axis=1)
    if sample.polygons is not None:
        bounds = sample.polygons.bounds()
        reaches_out |= np.isfinite(bounds[:, 0]) & ((bounds - border) * (-1, -1, 1, 1) > 0).any(axis=1)
        sample = replace(sample, polygons=_cut_polygons(sample.polygons, reaches_out, width, height))
    if sample.keypoints is not None:
        x, y = sample.keypoints[..., :1], sample.keypoints[..., 1:2]
        inside = (x >= 0) & (y >= 0) & (x <= width) & (y <= height)
        sample = replace(sample, keypoints=sample.keypoints * inside)
    cut = _intersect(sample.boxes[reaches_out], mask_bounds(sample)[reaches_out])
    boxes = sample.boxes.copy()
    boxes[reaches_out] = cut
    return clip_to_image(replace(sample, boxes=boxes))


def mask_bounds(sample: Sample) -> np.ndarray:
    """[G, 4] float32 xyxy around each object's mask, without end where there are no masks; a mask without a pixel or
    a point has bounds that lie the wrong way round."""
    if sample.polygons is not None:
        return sample.polygons.bounds()
    if sample.bitmaps is None:
        return np.tile(np.array([-np.inf, -np.inf, np.inf, np.inf], np.float32), (len(sample.boxes), 1))
    bounds = []
    for axis in (1, 2):  # over rows: which columns are used, and the other way round
        used = sample.bitmaps.any(axis=axis)
        length, some = used.shape[1], used.any(axis=1)
        first = np.where(some, used.argmax(axis=1), length)
        last = np.where(some, length - used[:, ::-1].argmax(axis=1), 0)
        bounds.append((first, last))
    (x1, x2), (y1, y2) = bounds
    return np.stack([x1, y1, x2, y2], axis=1).astype(np.float32)


def _intersect(boxes: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    return np.concatenate([np.maximum(boxes[:, :2], bounds[:, :2]), np.minimum(boxes[:, 2:], bounds[:, 2:])], axis=1)


def _cut_polygons(polygons: Polygons, reaches_out: np.ndarray, width: int, height: int) -> Polygons:
    """The same instances; polygons of those that reach out end at the image's border."""
    if not reaches_out.any():
        return polygons
    instances = [polygons.of(instance) for instance in range(len(polygons))]
    for number in np.flatnonzero(reaches_out):
        cut = [_cut_polygon(points, width, height) for points in instances[number]]
        instances[number] = [points for points in cut if len(points) >= 3]
    return Polygons.pack(instances)


def _cut_polygon(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """[p, 2] -> [q, 2]: Sutherland and Hodgman's clipping at the four sides, one after the other."""
    for axis, bound, sign in ((0, 0, 1), (1, 0, 1), (0, width, -1), (1, height, -1)):
        following = np.roll(points, -1, axis=0)
        depth, next_depth = (sign * (p[:, axis] - bound) for p in (points, following))
        inside, crosses = depth >= 0, (depth >= 0) != (next_depth >= 0)
        share = depth / np.where(crosses, depth - next_depth, 1)
        crossing = points + share[:, None] * (following - points)
        crossing[:, axis] = bound
        # Of each edge its first point where that is inside, then the point where it crosses the side.
        points = np.stack([points, crossing], axis=1)[np.stack([inside, crosses], axis=1)]
    return points
