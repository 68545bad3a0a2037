"""Pascal VOC: boxes in XML, instances in SegmentationObject."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ..errors import DataError
from .content import Builder, Source, listed, numbered, split_instances
from .masks import read_map

_VOID = 255  # the outlines in SegmentationObject
_FLAGS = ("difficult", "truncated", "occluded")


def read(path: Path, split: str = "", imageset: str = "", classes: str = "") -> Source:
    """A directory such as VOCdevkit/VOC2012, with Annotations/, JPEGImages/ and, for masks, SegmentationObject/.

    split: of ImageSets/IMAGESET/SPLIT.txt (train, val, trainval); empty: every file of Annotations.
    imageset: Segmentation or Main; by default Segmentation where it has the split, else Main.
    classes: names separated by commas; by default all that occur in Annotations, in any split, by alphabet: for VOC's
        own data these are its 20 in their order.

    Objects with a mask get it, others have a box alone. Keys difficult, truncated, occluded (0 or 1) are kept.
    Raises DataError: files missing or damaged.
    """
    annotations = {file.stem: file for file in listed(path / "Annotations", "*.xml")}
    names = _split_names(path, split, imageset) if split else list(annotations)
    parsed = {name: _parse(file) for name, file in annotations.items()}
    known = numbered(classes) or _all_classes(parsed)
    builder = Builder(path, path / "JPEGImages", known)
    for name in names:
        if name not in parsed:
            raise DataError(f"{path / 'Annotations'} has no {name}.xml, which split {split!r} names")
        _add(builder, path, name, parsed[name])
    return builder.finish()


def _split_names(path: Path, split: str, imageset: str) -> list[str]:
    """The image names of ImageSets/IMAGESET/SPLIT.txt."""
    files = [path / "ImageSets" / s / f"{split}.txt" for s in ([imageset] if imageset else ["Segmentation", "Main"])]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise DataError(f"{' and '.join(map(str, files))} {'do' if len(files) > 1 else 'does'} not exist")
    try:
        return [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not a UTF-8 text file") from error


def _parse(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(file.read_bytes())
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the last two: an unknown encoding
        raise DataError(f"{file} is not valid XML: {error}") from error


def _all_classes(parsed: dict[str, ElementTree.Element]) -> dict[str, int] | None:
    found = {o.findtext("name", "") for root in parsed.values() for o in root.iter("object")}
    return {name: number for number, name in enumerate(sorted(found), start=1)} or None


def _add(builder: Builder, path: Path, name: str, root: ElementTree.Element) -> None:
    """One image with its objects."""
    map_file = path / "SegmentationObject" / f"{name}.png"
    instance_map = read_map(map_file) if map_file.is_file() else None
    masks = list(split_instances(instance_map, (0, _VOID)).items()) if instance_map is not None else []
    file_name = root.findtext("filename") or f"{name}.jpg"
    size = instance_map.shape if instance_map is not None else _size(root, path, name)
    image_id = builder.add_image(file_name, size)
    objects = [_object(element, path, name) for element in root.iter("object")]
    pairs = match([value for value, _ in masks], [mask.bbox for _, mask in masks], [box for _, box, _ in objects])
    for number, (category, box, extras) in enumerate(objects):
        if number in pairs:
            builder.add_mask(image_id, category, masks[pairs[number]][1], **({"bbox": box} | extras))
        else:
            builder.add_box(image_id, category, box, **extras)
    for lost in {value for value, _ in masks} - {masks[m][0] for m in pairs.values()}:
        builder.skip("a mask is where its XML has no box", f"object {lost} of {map_file}")


def _size(root: ElementTree.Element, path: Path, name: str) -> tuple[int, int] | None:
    """What the XML says, unless it says nothing or 0, as some tools write."""
    try:
        size = (int(root.findtext("size/height") or 0), int(root.findtext("size/width") or 0))
    except ValueError as error:
        raise DataError(f"{path / 'Annotations' / name}.xml: its size is damaged: {error}") from error
    return size if all(size) else None


def _object(element: ElementTree.Element, path: Path, name: str) -> tuple[str, list[float], dict[str, Any]]:
    """Class, box [x, y, width, height] and flags. VOC's corners are the first and the last pixel, counted from 1."""
    try:
        category = element.findtext("name", "").strip()
        x1, y1, x2, y2 = (float(element.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax"))
        flags = {flag: int(element.findtext(flag)) for flag in _FLAGS if (element.findtext(flag) or "").strip()}
    except ValueError as error:
        raise DataError(f"{path / 'Annotations' / name}.xml: an object is damaged: {error}") from error
    return category, [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1], flags


def match(values: list[int], bounds: list[list[float]], boxes: list[list[float]]) -> dict[int, int]:
    """Which mask belongs to which object: object number -> place in the lists of masks.

    By IoU of at least .5, best first; but mask value n is object n of the XML where they overlap so far, as VOC says:
    a rider's and a horse's box may be nearly the same. Other tools number in other orders.
    """
    if not values or not boxes:
        return {}
    masks, objects = np.array(bounds, float)[:, None], np.array(boxes, float)
    inner = np.minimum(masks[..., :2] + masks[..., 2:], objects[:, :2] + objects[:, 2:])
    inner = np.clip(inner - np.maximum(masks[..., :2], objects[:, :2]), 0, None).prod(axis=2)
    iou = inner / (masks[..., 2:].prod(axis=2) + objects[:, 2:].prod(axis=1) - inner)
    rank = iou + (np.array(values)[:, None] == np.arange(len(boxes)) + 1)
    pairs: dict[int, int] = {}
    for place in np.argsort(-rank, axis=None, kind="stable"):
        mask, number = divmod(int(place), len(boxes))
        if iou[mask, number] >= 0.5 and number not in pairs and mask not in pairs.values():
            pairs[number] = mask
    return pairs
