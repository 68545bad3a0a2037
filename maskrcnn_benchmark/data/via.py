"""VGG Image Annotator, versions 1 and 2: a project, or its exported annotations (JSON)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .content import Builder, Source, numbered, read_json
from .shapes import circle, ellipse, rectangle

_FEW = "a region of fewer than three points, or a line or point, has no inside"


def read(path: Path, images: str = "", attribute: str = "", category: str = "", classes: str = "") -> Source:
    """A VIA file.

    images: directory of the images, relative to the file's, which is the default.
    attribute: the region attribute that names the class. By default the only one there is; in a file without
        attributes every region is of class `category` ("object" when that is not given either).
    category: the class of regions that have no value of the attribute; without it they are left out, with a warning.
    classes: all class names, separated by commas, where a part of the data may lack some.

    Raises DataError: not a VIA file, several attributes to choose from, an image that cannot be read.
    """
    content = read_json(path)
    entries = list(_entries(content, path))
    attribute = attribute or _only_attribute(entries, path)
    if not attribute:
        category = category or "object"
    builder = Builder(path, path.parent / images, numbered(classes) or _options(content, attribute, path))
    for entry in entries:
        image_id = builder.add_image(entry["filename"])
        for number, region in enumerate(_regions(entry, path)):
            where = f"region {number} of {entry['filename']}"
            try:
                outline = _outline(region["shape_attributes"])
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise DataError(f"{path}: {where} is damaged: {type(error).__name__} {error}") from error
            name = _class_of(region, attribute) or category
            if outline is None:
                builder.skip(_FEW, where)
            elif not name:
                builder.skip(f"a region without {attribute!r}; label it, or say what it is by ?category=", where)
            else:
                builder.add_polygons(image_id, name, [outline])
    return builder.finish()


def _entries(content: Any, path: Path) -> Iterator[dict[str, Any]]:
    """The entries of all images. A project of version 2 keeps them, and their order, under keys of its own."""
    entries = content.get("_via_img_metadata", content) if isinstance(content, dict) else None
    entries = list(entries.values()) if isinstance(entries, dict) else []
    if not entries or not all(isinstance(entry, dict) and isinstance(entry.get("filename"), str) for entry in entries):
        raise DataError(f"{path} is not a VIA file: it needs an object of images, each with filename and regions")
    for entry in entries:
        for number, region in enumerate(_regions(entry, path)):
            if not isinstance(region, dict) or not _is_region(region):
                raise DataError(
                    f"{path}: region {number} of {entry['filename']} is damaged: it needs an object shape_attributes,"
                    " and an object region_attributes where it has any"
                )
    yield from entries


def _is_region(region: dict[str, Any]) -> bool:
    attributes = region.get("region_attributes") or {}
    return isinstance(region.get("shape_attributes"), dict) and isinstance(attributes, dict)


def _regions(entry: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """Version 1 has an object of regions "0", "1", ...; version 2 a list."""
    regions = entry.get("regions") or []
    if not isinstance(regions, (dict, list)):
        raise DataError(f"{path}: regions of {entry['filename']} must be a list, not {type(regions).__name__}")
    return list(regions.values()) if isinstance(regions, dict) else regions


def _only_attribute(entries: list[dict[str, Any]], path: Path) -> str:
    """The one region attribute of the file, or "" when it has none."""
    regions = [region for entry in entries for region in _regions(entry, path)]
    names = sorted({name for region in regions for name in region.get("region_attributes") or {}})
    if len(names) > 1:
        raise DataError(
            f"{path}: regions have the attributes {', '.join(names)}; say which names the class: ?attribute={names[0]}"
        )
    return names[0] if names else ""


def _options(content: dict[str, Any], attribute: str, path: Path) -> dict[str, int] | None:
    """The values that a project of version 2 allows for the attribute (radio, dropdown), in their order."""
    options: Any = content
    for key in ("_via_attributes", "region", attribute, "options"):
        options = options.get(key) or {}
        if not isinstance(options, dict):
            raise DataError(f"{path}: {key!r} of its _via_attributes must be an object, not {options!r}")
    return {name: number for number, name in enumerate(options, start=1)} or None


def _class_of(region: dict[str, Any], attribute: str) -> str:
    """A text, or a check box: an object with one true value."""
    value = (region.get("region_attributes") or {}).get(attribute, "")
    if isinstance(value, dict):
        chosen = [name for name, checked in value.items() if checked]
        return chosen[0] if len(chosen) == 1 else ""
    return str(value).strip()


def _outline(shape: dict[str, Any]) -> np.ndarray | None:
    """A polygon [p, 2] in pixels; None where the shape has no inside. A polyline is taken as closed: people outline
    objects with it."""
    kind = shape["name"]
    if kind in ("polygon", "polyline"):
        points = np.array([shape["all_points_x"], shape["all_points_y"]], float).T
        if points.ndim != 2:
            raise ValueError("all_points_x and all_points_y must be lists of numbers")
        return points if len(points) >= 3 else None
    if kind == "rect":
        return rectangle(*(float(shape[key]) for key in ("x", "y", "width", "height")))
    if kind == "circle":
        return circle(*(float(shape[key]) for key in ("cx", "cy", "r")))
    if kind == "ellipse":
        return ellipse(*(float(shape[key]) for key in ("cx", "cy", "rx", "ry")), float(shape.get("theta", 0)))
    if kind in ("point", "line"):
        return None
    raise ValueError(f"its shape {kind!r} is none of VIA's")
