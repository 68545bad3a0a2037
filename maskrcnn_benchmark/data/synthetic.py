"""A small data set of its own making: textured shapes that hide each other, in the layout of COCO 2017."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from ..errors import DataError
from .directory import new_directory

# COCO category id -> shape; ids with gaps, as real data sets have them
CATEGORIES = {1: "circle", 2: "square", 4: "triangle", 7: "star", 9: "cross"}
# The color that a shape tends to. With colors at random, ten minutes on two cores teach a small detector where the
# shapes are, but not which: AP .26, and .44 when classes do not count.
_TINTS = {
    "circle": (205, 60, 50),
    "square": (55, 95, 215),
    "triangle": (60, 175, 80),
    "star": (230, 190, 50),
    "cross": (165, 75, 190),
}
# Each shape's keypoints: its centre, and near its outermost points in the image. Lines join them to the centre
KEYPOINTS = ("centre", "left", "top", "right", "bottom")
# How far from the centre to the outermost point they lie: on the shape, not on its edge
_REACH = 0.85
MIN_SIDE = 32
_SHAPES = {"supercategory": "shape", "keypoints": KEYPOINTS, "skeleton": [[1, n] for n in range(2, 6)]}
# Shapes are drawn and outlined this many times finer than the pixels.
_FINE = 4
# Less of a shape than this in sight, or fewer pixels, and it is put elsewhere.
_MIN_VISIBLE, _MIN_AREA = 0.3, 40
# Radii of the shapes, over the image's short side
_RADII = (0.06, 0.3)
_TRIES = 10


class Shape(NamedTuple):
    """category_id, the polygons [p, 2] of what is visible, and keypoints [K, 3] (x, y, visibility)."""

    category_id: int
    polygons: list[np.ndarray]
    keypoints: np.ndarray


def generate(
    output_dir: str | Path,
    train_images: int,
    val_images: int,
    size: tuple[int, int],
    seed: int,
    objects: tuple[int, int] = (1, 6),
) -> None:
    """Writes a COCO directory: annotations/instances_{train,val}2017.json, train2017/*.jpg, val2017/*.jpg.

    Masks are polygons of what is visible; bbox bounds them, area counts their pixels as pycocotools draws them.
    Keypoints that another shape hides have visibility 1, those outside the image 0. The same
    arguments give the same annotations and pixels. The directory appears whole or not at all.

    Args:
        output_dir: a new or empty directory. size: (height, width) of the images.
        objects: least and most shapes of an image; in a crowded or tiny one some may find no place.

    Raises:
        DataError: the directory is not empty or cannot be written; numbers that make no sense.
    """
    output = Path(output_dir)
    if train_images < 1 or val_images < 1 or seed < 0:
        raise DataError(
            f"a data set needs images: train {train_images} and val {val_images} must be >= 1, seed {seed} >= 0"
        )
    if min(size) < MIN_SIDE or not 1 <= objects[0] <= objects[1]:
        raise DataError(f"size {tuple(size)} must be at least {MIN_SIDE} x {MIN_SIDE}, and objects {objects} 1 or more")
    with new_directory(output) as unfinished:
        for number, (split, count) in enumerate((("train2017", train_images), ("val2017", val_images))):
            _write_split(unfinished, split, count, size, (seed, number), objects)


def _write_split(
    root: Path, split: str, count: int, size: tuple[int, int], seed: tuple[int, int], objects: tuple[int, int]
) -> None:
    (root / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, count + 1):
        image, shapes = draw_image(np.random.default_rng((*seed, image_id)), size, objects)
        name = f"{image_id:012d}.jpg"
        _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
        (root / split / name).write_bytes(data.tobytes())
        images.append({"id": image_id, "file_name": name, "height": size[0], "width": size[1]})
        for shape in shapes:
            annotations.append(_annotation(len(annotations) + 1, image_id, shape, size))
    content = {
        "info": {"description": f"synthetic shapes, {split}, seed {seed[0]}"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} | _SHAPES for i, name in CATEGORIES.items()],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _annotation(number: int, image_id: int, shape: Shape, size: tuple[int, int]) -> dict[str, Any]:
    category_id, polygons, keypoints = shape
    flat = [polygon.ravel().tolist() for polygon in polygons]
    points = np.concatenate(polygons)
    low, high = points.min(axis=0), points.max(axis=0)
    rle = coco_mask.merge(coco_mask.frPyObjects(flat, *size))
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": flat,
        "area": int(coco_mask.area(rle)),
        "bbox": [*low.tolist(), *(high - low).tolist()],
        "iscrowd": 0,
        "keypoints": keypoints.ravel().tolist(),
        "num_keypoints": int((keypoints[:, 2] > 0).sum()),
    }


def draw_image(
    rng: np.random.Generator, size: tuple[int, int], objects: tuple[int, int]
) -> tuple[np.ndarray, list[Shape]]:
    """One picture [H, W, 3] uint8 RGB, and its shapes.

    Shapes are placed from the front to the back: each new one lies behind those before.
    """
    height, width = size
    image = _background(rng, size)
    colors = [np.array(cv2.mean(image)[:3])]
    taken = np.zeros((height * _FINE, width * _FINE), np.uint8)
    shapes: list[Shape] = []
    wanted = int(rng.integers(objects[0], objects[1], endpoint=True))
    for _ in range(wanted * _TRIES):
        category_id = int(rng.choice(list(CATEGORIES)))
        visible = np.zeros_like(taken)
        outline = _outline(rng, CATEGORIES[category_id], size)
        cv2.fillPoly(visible, [np.round(outline * _FINE - 0.5).astype(np.int32)], 255)
        visible &= ~taken
        least = max(_MIN_AREA, _MIN_VISIBLE * cv2.contourArea(outline.astype(np.float32))) * _FINE**2
        polygons = _polygons(visible) if cv2.countNonZero(visible) >= least else []
        if not polygons:
            continue
        taken |= visible
        colors.append(_color_unlike(rng, _TINTS[CATEGORIES[category_id]], colors))
        # Area averages blend the edges, as a camera would.
        alpha = cv2.resize(visible, (width, height), interpolation=cv2.INTER_AREA)[..., None]
        image += np.float32(1 / 255) * alpha * (_texture(rng, size, colors[-1]) - image)
        shapes.append(Shape(category_id, polygons, _keypoints(outline, visible)))
        if len(shapes) == wanted:
            break
    image += 4 * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 255).astype(np.uint8), shapes


def _outline(rng: np.random.Generator, name: str, size: tuple[int, int]) -> np.ndarray:
    """Corners [n, 2] (x, y) in pixels of a shape somewhere in the image, turned and slightly stretched."""
    if name == "circle":
        radii = np.ones(48)
    elif name == "star":
        radii = np.tile([1.0, 0.42], 5)
    else:
        radii = np.ones({"square": 4, "triangle": 3, "cross": 4}[name])
    # Half a step on, so that a square's sides lie along the axes and it is stretched to a rectangle, not a rhombus
    angles = (np.arange(len(radii)) + 0.5) * 2 * np.pi / len(radii)
    corners = radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if name == "cross":
        arm = np.array([[1.0, -0.32], [1.0, 0.32], [0.32, 0.32]])
        quarter = np.array([[0.0, -1.0], [1.0, 0.0]])
        corners = np.concatenate([arm @ np.linalg.matrix_power(quarter, n).T for n in range(4)])
    stretch = np.exp(rng.uniform(-0.15, 0.15))
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    radius = min(size) * np.exp(rng.uniform(*np.log(_RADII)))
    center = rng.uniform(0, 1, 2) * (size[1], size[0])
    return corners * (stretch, 1 / stretch) @ rotation.T * radius + center


def _keypoints(outline: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """[K, 3] (x, y, visibility) of a shape of corners [n, 2], of which `visible`, a fine bitmap, is in sight."""
    low, high = outline.argmin(axis=0), outline.argmax(axis=0)
    outermost = outline[[low[0], low[1], high[0], high[1]]]
    centre = outline.mean(axis=0)
    points = np.concatenate([centre[None], centre + _REACH * (outermost - centre)]).round(2)
    x, y = np.floor(points * _FINE).astype(int).T
    inside = (x >= 0) & (y >= 0) & (x < visible.shape[1]) & (y < visible.shape[0])
    seen = visible[np.where(inside, y, 0), np.where(inside, x, 0)] > 0
    return np.concatenate([points, 1.0 + seen[:, None]], axis=1) * inside[:, None]


def _polygons(visible: np.ndarray) -> list[np.ndarray]:
    """Outlines [p, 2] in pixels of the parts of a fine bitmap; none when one has a hole, which polygons cannot say."""
    contours, hierarchy = cv2.findContours(visible, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if (hierarchy[0, :, 3] >= 0).any():
        return []
    height, width = visible.shape
    polygons = []
    for contour in contours:
        corners = cv2.approxPolyDP(contour, 1.0, closed=True)[:, 0]
        if cv2.contourArea(corners) >= _FINE**2:  # a speck of less than a pixel is no part
            # The contour runs through the centres of the outermost fine pixels.
            polygons.append(np.clip((corners + 0.5) / _FINE, 0, (width / _FINE, height / _FINE)))
    return polygons


def _background(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Soft clouds of muted colors with a few faint strokes, [H, W, 3] float32."""
    height, width = size
    image = rng.uniform(50, 205, 3) + 28 * _clouds(rng, size, 4, 3) + 10 * _clouds(rng, size, 16, 3)
    image = image.astype(np.float32)
    mean = np.array(cv2.mean(image)[:3])
    for _ in range(rng.integers(0, 6)):
        start, end = (rng.uniform(0, 1, (2, 2)) * (width, height)).astype(int).tolist()
        color = mean + rng.normal(0, 30, 3)
        cv2.line(image, start, end, color.tolist(), int(rng.integers(1, 4)), cv2.LINE_AA)
    return image


def _texture(rng: np.random.Generator, size: tuple[int, int], color: np.ndarray) -> np.ndarray:
    """[H, W, 3]: clouds or stripes around a color."""
    height, width = size
    if rng.random() < 0.5:
        pattern = 14 * _clouds(rng, size, 8, 1)
    else:
        turn, period = rng.uniform(0, np.pi), rng.uniform(0.04, 0.12) * min(size)
        x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
        wave = np.float32(2 * np.pi / period)
        pattern = 16 * np.sin(x * (wave * np.float32(np.cos(turn))) + y * (wave * np.float32(np.sin(turn))))[..., None]
    return pattern + color.astype(np.float32)


def _clouds(rng: np.random.Generator, size: tuple[int, int], cells: int, channels: int) -> np.ndarray:
    """Smooth noise [H, W, channels]: random values on a grid of `cells` x `cells`, interpolated."""
    grid = rng.normal(0, 1, (cells, cells, channels)).astype(np.float32)
    return cv2.resize(grid, (size[1], size[0]), interpolation=cv2.INTER_CUBIC).reshape(*size, channels)


def _color_unlike(rng: np.random.Generator, tint: tuple[int, int, int], others: list[np.ndarray]) -> np.ndarray:
    """Of a few colors around a tint the one farthest from the others: visible, though not always by much."""
    candidates = np.clip(tint + rng.normal(0, 45, (6, 3)), 20, 235)
    distance = np.linalg.norm(candidates[:, None] - np.array(others), axis=2).min(axis=1)
    return candidates[distance.argmax()]
