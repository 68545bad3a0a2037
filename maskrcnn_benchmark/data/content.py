"""What every format is read into: the content of a COCO file, and the directory of its images."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from ..ops.rle import compress_rle
from .images import image_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A data set as its files say it. file: the annotation file or directory; image_dir: what file names are relative
    to; content: COCO's lists images, annotations and categories, or None where `file` is a COCO file, not read yet."""

    file: Path
    image_dir: Path
    content: dict[str, Any] | None


def part_of(content: dict[str, Any], images: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content with these of its images alone, and their annotations."""
    ids = {image.get("id") for image in images}
    annotations = [a for a in content["annotations"] if a.get("image_id") in ids]
    return content | {"images": list(images), "annotations": annotations}


class Builder:
    """Collects images and objects, and makes a Source of them. Ids count from 1, in the order of adding.

    Args:
        file, image_dir: as in Source.
        categories: name -> id; another name is an error then. None: the names that occur, by alphabet, from 1.
    """

    def __init__(self, file: Path, image_dir: Path, categories: Mapping[str, int] | None = None) -> None:
        self.file, self.image_dir, self.categories = file, image_dir, categories
        self._images: list[dict[str, Any]] = []
        self._objects: list[tuple[str, dict[str, Any]]] = []
        self._skipped: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add_image(self, file_name: str, size: tuple[int, int] | None = None) -> int:
        """Returns the image's id. size: (height, width); None: the file says it. Raises DataError."""
        height, width = size or image_size(self.image_dir / file_name)
        self._images.append({"id": len(self._images) + 1, "file_name": file_name, "height": height, "width": width})
        return len(self._images)

    def add_polygons(self, image_id: int, category: str, polygons: Sequence[np.ndarray], **extras: Any) -> None:
        """One object of polygons [p, 2] in pixels, as far as they lie in the image. Its area is the sum of theirs."""
        image = self._images[image_id - 1]
        points = np.clip(np.concatenate(polygons), 0, (image["width"], image["height"]))
        low, high = points.min(axis=0), points.max(axis=0)
        shape = {
            "segmentation": [np.asarray(polygon, float).ravel().tolist() for polygon in polygons],
            "bbox": [*low.tolist(), *(high - low).tolist()],
            "area": float(sum(polygon_area(polygon) for polygon in polygons)),
        }
        self._add(image_id, category, shape | extras)

    def add_mask(self, image_id: int, category: str, mask: Mask, **extras: Any) -> None:
        shape = {"segmentation": mask.rle, "bbox": mask.bbox, "area": mask.area}
        self._add(image_id, category, shape | extras)

    def add_box(self, image_id: int, category: str, bbox: Sequence[float], **extras: Any) -> None:
        """An object without a mask. bbox: x, y, width, height in pixels."""
        self._add(image_id, category, {"bbox": list(bbox), "area": bbox[2] * bbox[3]} | extras)

    def skip(self, reason: str, where: str) -> None:
        """Notes that something is left out; `finish` logs how many, and where the first was."""
        self._skipped[reason] += 1
        self._first.setdefault(reason, where)

    def finish(self) -> Source:
        """Raises DataError: no image or no category."""
        for reason, count in self._skipped.items():
            logger.warning("%s: %d left out: %s (the first: %s)", self.file, count, reason, self._first[reason])
        if not self._images:
            raise DataError(f"{self.file} has no images")
        ids = self.categories or {name: i for i, name in enumerate(sorted({n for n, _ in self._objects}), start=1)}
        if not ids:
            raise DataError(f"{self.file} has {len(self._images)} images, but no object with a class")
        annotations = [
            {"id": number} | entry | {"category_id": ids[name]}
            for number, (name, entry) in enumerate(self._objects, start=1)
        ]
        categories = [{"id": i, "name": name} for name, i in ids.items()]
        content = {"images": self._images, "annotations": annotations, "categories": categories}
        return Source(self.file, self.image_dir, content)

    def _add(self, image_id: int, category: str, entry: dict[str, Any]) -> None:
        if self.categories and category not in self.categories:
            raise DataError(
                f"{self.file}: image {self._images[image_id - 1]['file_name']} has an object of class {category!r},"
                f" which is not among {', '.join(self.categories)}"
            )
        self._objects.append((category, {"image_id": image_id, "iscrowd": 0} | entry))


def numbered(classes: str) -> dict[str, int] | None:
    """The option classes=cat,dog as category ids from 1; None when it is empty."""
    return {name.strip(): number for number, name in enumerate(classes.split(","), start=1)} if classes else None


def polygon_area(points: np.ndarray) -> float:
    """Of a polygon [p, 2] that does not cross itself, in square pixels."""
    x, y = np.asarray(points, float).T
    return abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


@dataclass(frozen=True)
class Mask:
    """One object of an instance map. rle: compressed COCO RLE; bbox: x, y, width, height of whole pixels; area in
    pixels."""

    rle: dict[str, Any]
    bbox: list[float]
    area: int


def split_instances(instance_map: np.ndarray, ignored: Iterable[int] = (0,)) -> dict[int, Mask]:
    """The objects of a map [H, W] of integers: value -> its pixels, without the ignored values.

    One pass over the pixels for all objects: 30 of them at 1024 x 2048 cost as much as one.
    """
    height, width = instance_map.shape
    flat = instance_map.T.ravel()  # RLE counts down the columns
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.append(starts[1:], flat.size)
    values = flat[starts]
    kept = ~np.isin(values, np.array(list(ignored), values.dtype))
    starts, ends, values = starts[kept], ends[kept], values[kept]
    order = np.argsort(values, kind="stable")
    found, first = np.unique(values[order], return_index=True)
    masks, counts = {}, []
    for runs in np.split(order, first[1:]) if len(found) else []:
        start, end = starts[runs], ends[runs]
        lengths = np.diff(np.concatenate([[0], np.stack([start, end], axis=1).ravel(), [flat.size]]))
        counts.append(lengths if lengths[-1] else lengths[:-1])
    offsets = np.cumsum([0, *map(len, counts)])
    lengths = np.concatenate(counts) if counts else np.zeros(0)
    strings = compress_rle(*(torch.from_numpy(part.astype(np.int64)) for part in (lengths, offsets)))
    for value, runs, string in zip(found.tolist(), np.split(order, first[1:]), strings):
        start, end = starts[runs], ends[runs]
        rle = {"size": [height, width], "counts": string}
        masks[value] = Mask(rle, _bounds(start, end, height), int((end - start).sum()))
    return masks


def _bounds(start: np.ndarray, end: np.ndarray, height: int) -> list[float]:
    """x, y, width, height around the runs start..end-1 of pixels counted down the columns."""
    last = end - 1
    whole = start // height != last // height  # a run over the end of a column touches both edges of the image
    top = 0 if whole.any() else int((start % height).min())
    bottom = height - 1 if whole.any() else int((last % height).max())
    left, right = int(start.min()) // height, int(last.max()) // height
    return [float(left), float(top), float(right - left + 1), float(bottom - top + 1)]


def read_json(path: Path) -> Any:
    """Raises DataError: unreadable, or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"annotation file {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"annotation file {path} is not valid JSON: {error}") from error


def listed(directory: Path, pattern: str) -> list[Path]:
    """The files of this pattern, sorted. Raises DataError: no directory, or none there."""
    if not directory.is_dir():
        raise DataError(f"{directory} is not a directory")
    files = sorted(path for path in directory.glob(pattern) if path.is_file())
    if not files:
        raise DataError(f"{directory} has no file {pattern}")
    return files
