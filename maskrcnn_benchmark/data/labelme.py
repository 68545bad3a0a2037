"""labelme: one JSON file an image."""

from __future__ import annotations

import base64
import io
import os
from collections import defaultdict
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from ..errors import DataError
from .content import Builder, Mask, Source, listed, numbered, read_json, split_instances
from .images import image_size
from .masks import read_map
from .shapes import circle, rectangle

_FEW = "a point, a line, or a polygon of fewer than three points has no inside"
_OPEN = {"line", "linestrip", "point", "points"}


def read(path: Path, classes: str = "") -> Source:
    """A directory of labelme files, its subdirectories included. Shapes of one label and group are one object.

    classes: all class names, separated by commas, where a part of the data may lack some.
    Raises DataError: no or damaged files, images that are not there.
    """
    builder = Builder(path, path, numbered(classes))
    for file in listed(path, "**/*.json"):
        content = read_json(file)
        if not isinstance(content, dict) or "shapes" not in content:
            raise DataError(f"{file} is not a labelme file: it has no shapes")
        file_name = _image_of(content, file, path)
        stated = (content.get("imageHeight"), content.get("imageWidth"))
        try:
            # A mask is drawn on a canvas of the image's size, which must be that of a file and not a mere number.
            drawn = any(shape.get("shape_type") == "mask" for shape in content["shapes"])
            size = stated if all(stated) and not drawn else image_size(path / file_name)
            image_id = builder.add_image(file_name, size)
            _add_shapes(builder, image_id, content["shapes"], size, file)
        except (DataError, KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
            raise DataError(f"{file}: a shape is damaged: {type(error).__name__} {error}") from error
    return builder.finish()


def _image_of(content: dict[str, Any], file: Path, root: Path) -> str:
    """The image's file name relative to the root: where imagePath says, or beside its JSON file, as after a move."""
    stated = PureWindowsPath(str(content.get("imagePath", "")))  # takes / and \\
    for place in (file.parent / stated.as_posix(), file.parent / stated.name):
        if os.path.isfile(place):  # of a name too long, too: Path.is_file raises
            return os.path.relpath(place, root)
    raise DataError(f"{file}: its image {stated.as_posix()!r} is neither there nor beside it")


def _add_shapes(builder: Builder, image_id: int, shapes: list[dict], size: tuple[int, int], file: Path) -> None:
    groups: dict[Any, list[np.ndarray]] = defaultdict(list)
    for number, shape in enumerate(shapes):
        kind = shape.get("shape_type") or "polygon"
        points = np.array(shape["points"], float).reshape(-1, 2)
        if kind == "mask":
            builder.add_mask(image_id, str(shape["label"]), _mask(shape["mask"], points, size))
        elif kind in _OPEN or len(points) < (3 if kind == "polygon" else 2):
            builder.skip(_FEW, f"shape {number} of {file}")
        else:
            group = shape.get("group_id")
            groups[str(shape["label"]), number if group is None else f"group {group}"].append(_outline(kind, points))
    for (label, _), polygons in groups.items():
        builder.add_polygons(image_id, label, polygons)


def _outline(kind: str, points: np.ndarray) -> np.ndarray:
    if kind == "circle":
        return circle(*points[0], float(np.linalg.norm(points[1] - points[0])))
    if kind == "rectangle" and len(points) == 2:
        low, high = points.min(axis=0), points.max(axis=0)
        return rectangle(*low, *(high - low))
    if kind in ("polygon", "rectangle", "rotation", "oriented_rectangle"):
        return points
    raise ValueError(f"its type {kind!r} is none of labelme's")


def _mask(encoded: str, points: np.ndarray, size: tuple[int, int]) -> Mask:
    """A PNG of the box between the first and the last point, both included."""
    pixels = read_map(io.BytesIO(base64.b64decode(encoded))).astype(bool)
    x, y = np.round(points[0]).astype(int)
    whole = np.zeros(size, np.uint8)
    part = whole[y : y + pixels.shape[0], x : x + pixels.shape[1]]
    part[:] = pixels[: part.shape[0], : part.shape[1]]
    masks = split_instances(whole)
    if not masks:
        raise ValueError("its mask is empty")
    return masks[1]
