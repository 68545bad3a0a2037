"""COCO instances JSON: checked once, packed into a few flat tensors."""

from __future__ import annotations

import json
import logging
import math
import os
from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from ..errors import DataError
from ..ops.rle import sound_rle
from .images import read_image
from .transforms import Polygons, Sample

logger = logging.getLogger(__name__)

# What may be wrong with single annotations while the rest can still be used
PROBLEMS = {
    "duplicate_id": "share their id with another annotation",
    "missing_bbox": "have no bbox: it is computed from the segmentation",
    "not_finite": "have NaN or infinite coordinates and are dropped",
    "zero_area": "have a box without area and are dropped",
    "outside": "lie outside their image and are dropped",
    "clipped": "reach more than a pixel beyond their image: the box is clipped",
    "bad_polygon": "have a polygon of fewer than 3 points or of an odd number of coordinates: the polygon is dropped",
    "bad_rle": "have an RLE that is damaged or not of their image's size, and are dropped",
    "no_mask": "have no usable mask and are dropped",
}
_STANDARD_KEYS = {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"}


@dataclass
class PackedObjects:
    """All objects of a data set in flat tensors, by image, an image's crowds last.

    Tensors, because torch hands them to worker processes as shared memory, whether forked or spawned. `x_offsets`
    [A + 1] say where annotation a's part of x lies; polygon_offsets [Q + 1] index points.
    boxes [A, 4] float32 xyxy; areas [A] float64, NaN where the file has none; rle and extras are bytes: a compressed
    COCO RLE, and the annotation's further keys as JSON.
    """

    ids: Tensor
    labels: Tensor
    boxes: Tensor
    areas: Tensor
    crowds: Tensor
    points: Tensor
    polygon_offsets: Tensor
    instance_offsets: Tensor
    rle: Tensor
    rle_offsets: Tensor
    extras: Tensor
    extras_offsets: Tensor

    def polygons(self, first: int, last: int) -> Polygons:
        """Of annotations first..last-1."""
        instance_offsets = self.instance_offsets[first : last + 1].numpy()
        polygon_offsets = self.polygon_offsets[instance_offsets[0] : instance_offsets[-1] + 1].numpy()
        points = self.points[polygon_offsets[0] : polygon_offsets[-1]].numpy()
        return Polygons(points, polygon_offsets - polygon_offsets[0], instance_offsets - instance_offsets[0])

    def rle_of(self, annotation: int) -> bytes:
        return self.rle[self.rle_offsets[annotation] : self.rle_offsets[annotation + 1]].numpy().tobytes()

    def extras_of(self, annotation: int) -> dict[str, Any]:
        text = self.extras[self.extras_offsets[annotation] : self.extras_offsets[annotation + 1]].numpy().tobytes()
        return json.loads(text) if text else {}


class CocoDataset:
    """Images and objects of a COCO instances file.

    Args:
        annotation_file: instances JSON; image_dir: directory that its file names are relative to.
        training: `load` gives objects too, and a file without any usable one is an error.
        masks: keep the segmentations; then an object without a usable one is dropped.

    Attributes:
        category_ids, category_names: label l (1..C, by rising category id) is `category_ids[l - 1]`.
        num_classes: C + 1, with the background.
        image_ids, file_names: by image index; sizes: [N, 2] int64 (height, width) as the file states them.
        counts: [N] int64, usable objects (no crowds) of each image.
        warnings: kind of problem (a key of PROBLEMS) -> annotation ids; each kind is logged once.

    Raises:
        DataError: not a COCO file, references that lead nowhere, images that are not on disk.
    """

    def __init__(self, annotation_file: str | Path, image_dir: str | Path, training: bool, masks: bool = True) -> None:
        self.annotation_file, self.image_dir = str(annotation_file), str(image_dir)
        self.training, self.masks = training, masks
        content = read_coco(self.annotation_file)
        categories = _read_categories(content["categories"], self.annotation_file)
        self.category_ids = sorted(categories)
        self.category_names = [categories[i] for i in self.category_ids]
        self.num_classes = len(categories) + 1
        self._read_images(content["images"])
        check_files(self.image_dir, self.file_names, self.annotation_file)
        self._read_annotations(content["annotations"])
        self._log_warnings()
        if training and not self.counts.any():
            raise DataError(
                f"{self.annotation_file}: none of its {len(content['annotations'])} annotations can be trained on"
            )

    def __len__(self) -> int:
        return len(self.image_ids)

    def load(self, index: int) -> Sample:
        """The image at `index` in 0..N-1, with its objects (without crowds) when training.

        Masks are polygons, or bitmaps for all objects of an image when one of them has an RLE.
        Raises DataError: the image is missing, damaged, or not of the size that the file states.
        """
        size = (int(self.sizes[index, 0]), int(self.sizes[index, 1]))
        image_id = self.image_ids[index]
        image = read_image(os.path.join(self.image_dir, self.file_names[index]), size, image_id)
        sample = Sample(image, image_id, index, size)
        if not self.training:
            return sample
        objects = self._objects
        first = int(self._offsets[index])
        last = first + int(self.counts[index])
        sample.boxes = objects.boxes[first:last].numpy()
        sample.labels = objects.labels[first:last].numpy()
        if self.masks:
            sample.polygons = objects.polygons(first, last)
            if objects.rle_offsets[last] > objects.rle_offsets[first]:
                sample.bitmaps = self._bitmaps(sample.polygons, first, size)
                sample.polygons = None
        return sample

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """The annotations of image `index` in COCO's form, crowds and further keys included; what was dropped is not
        there, boxes are clipped. "area" is missing where the file has none, "segmentation" without `masks`."""
        objects, (height, width) = self._objects, self.sizes[index].tolist()
        result = []
        for a in range(self._offsets[index], self._offsets[index + 1]):
            x1, y1, x2, y2 = objects.boxes[a].tolist()
            annotation = {
                "id": int(objects.ids[a]),
                "image_id": self.image_ids[index],
                "category_id": self.category_ids[int(objects.labels[a]) - 1],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "iscrowd": int(objects.crowds[a]),
            }
            if not math.isnan(objects.areas[a]):
                annotation["area"] = float(objects.areas[a])
            if self.masks:
                rle = objects.rle_of(a)
                polygons = [points.ravel().tolist() for points in objects.polygons(a, a + 1).of(0)]
                annotation["segmentation"] = {"size": [height, width], "counts": rle.decode()} if rle else polygons
            result.append(annotation | objects.extras_of(a))
        return result

    def _bitmaps(self, polygons: Polygons, first: int, size: tuple[int, int]) -> np.ndarray:
        bitmaps = polygons.rasterize(*size)
        for number, bitmap in enumerate(bitmaps):
            if rle := self._objects.rle_of(first + number):
                bitmap[:] = coco_mask.decode({"size": list(size), "counts": rle})
        return bitmaps

    def _read_images(self, images: list[dict]) -> None:
        where = self.annotation_file
        if not images:
            raise DataError(f"{where}: the data set is empty: its list of images has no entry")
        for number, image in enumerate(images):
            size = (image.get("height"), image.get("width"))
            if type(image.get("id")) is not int or type(image.get("file_name")) is not str:
                raise DataError(f"{where}: images[{number}] needs an id (a whole number) and a file_name (a text)")
            if not all(type(side) is int and side > 0 for side in size):
                raise DataError(f"{where}: image id {image['id']}: height and width must be whole numbers, not {size}")
        self.image_ids = [image["id"] for image in images]
        self.file_names = [image["file_name"] for image in images]
        self.sizes = np.array([(image["height"], image["width"]) for image in images], np.int64)
        if duplicate := _first_duplicate(self.image_ids):
            raise DataError(f"{where}: image id {duplicate[0]} is given twice")

    def _read_annotations(self, annotations: list[dict]) -> None:
        """Packs the usable annotations, and notes what is wrong with the others."""
        index_of = {image_id: index for index, image_id in enumerate(self.image_ids)}
        label_of = {category_id: label for label, category_id in enumerate(self.category_ids, start=1)}
        for number, a in enumerate(annotations):
            self._check_references(number, a, index_of, label_of)
        self.warnings: dict[str, list[int]] = defaultdict(list)
        seen: set[int] = set()
        packer = _Packer(self.annotation_file, self.masks, self.warnings)
        kept = np.zeros((2, len(self)), np.int64)
        for a in sorted(annotations, key=lambda a: (index_of[a["image_id"]], bool(a.get("iscrowd", 0)))):
            if a["id"] in seen:
                self.warnings["duplicate_id"].append(a["id"])
            seen.add(a["id"])
            index = index_of[a["image_id"]]
            kept[int(bool(a.get("iscrowd", 0))), index] += packer.add(a, label_of[a["category_id"]], self.sizes[index])
        self.warnings = dict(self.warnings)
        self.counts = kept[0]
        self._offsets = np.concatenate([[0], np.cumsum(kept.sum(axis=0))])
        self._objects = packer.finish()

    def _check_references(self, number: int, annotation: dict, index_of: dict, label_of: dict) -> None:
        where = self.annotation_file
        for key in ("id", "image_id", "category_id"):
            value = annotation.get(key)
            if type(value) is not int or abs(value) >= 2**63:
                raise DataError(f"{where}: annotations[{number}] needs {key}, a whole number of 64 bits, not {value!r}")
        if annotation["image_id"] not in index_of:
            raise DataError(
                f"{where}: annotation id {annotation['id']} belongs to image id {annotation['image_id']},"
                " which is not in its list of images"
            )
        if annotation["category_id"] not in label_of:
            raise DataError(
                f"{where}: annotation id {annotation['id']} has category id {annotation['category_id']}, which is not"
                f" in its list of categories ({_short_list(label_of)})"
            )

    def _log_warnings(self) -> None:
        for kind, ids in self.warnings.items():
            first = ", ".join(map(str, ids[:3])) + (", ..." if len(ids) > 3 else "")
            logger.warning("%s: %d annotations %s (ids %s)", self.annotation_file, len(ids), PROBLEMS[kind], first)


@dataclass
class _Packer:
    """Appends annotations to flat arrays; what cannot be used is noted in `warnings` instead."""

    file: str
    masks: bool
    warnings: dict[str, list[int]]
    ids: array = field(default_factory=lambda: array("q"))
    labels: array = field(default_factory=lambda: array("q"))
    boxes: array = field(default_factory=lambda: array("f"))
    areas: array = field(default_factory=lambda: array("d"))
    crowds: array = field(default_factory=lambda: array("B"))
    points: array = field(default_factory=lambda: array("f"))
    polygon_offsets: array = field(default_factory=lambda: array("q", [0]))
    instance_offsets: array = field(default_factory=lambda: array("q", [0]))
    rle: array = field(default_factory=lambda: array("B"))
    rle_offsets: array = field(default_factory=lambda: array("q", [0]))
    extras: array = field(default_factory=lambda: array("B"))
    extras_offsets: array = field(default_factory=lambda: array("q", [0]))

    def add(self, annotation: dict, label: int, size: np.ndarray) -> bool:
        """Whether the annotation was usable. size: (height, width) of its image."""
        height, width = size.tolist()
        try:
            polygons, rle = self._segmentation(annotation, height, width)
            box = self._box(annotation, polygons, rle, height, width)
            area = math.nan if annotation.get("area") is None else float(annotation["area"])
        except _Unusable as problem:
            self.warnings[str(problem)].append(annotation["id"])
            return False
        except (TypeError, ValueError, KeyError) as error:
            raise DataError(
                f"{self.file}: annotation id {annotation['id']}: bbox must be [x, y, width, height], and segmentation"
                f" polygons [[x, y, x, y, ...], ...] or an RLE {{size, counts}}, and area a number:"
                f" {type(error).__name__} {error}"
            ) from error
        self.ids.append(annotation["id"])
        self.labels.append(label)
        self.boxes.extend(box)
        self.areas.append(area)
        self.crowds.append(bool(annotation.get("iscrowd", 0)))
        for polygon in polygons if self.masks else ():
            self.points.extend(polygon)
            self.polygon_offsets.append(len(self.points) // 2)
        self.instance_offsets.append(len(self.polygon_offsets) - 1)
        self.rle.frombytes(rle if self.masks else b"")
        self.rle_offsets.append(len(self.rle))
        if extras := {key: value for key, value in annotation.items() if key not in _STANDARD_KEYS}:
            self.extras.frombytes(json.dumps(extras).encode())
        self.extras_offsets.append(len(self.extras))
        return True

    def finish(self) -> PackedObjects:
        tensors = {}
        for name in PackedObjects.__dataclass_fields__:
            values = getattr(self, name)
            tensors[name] = torch.from_numpy(np.array(values, dtype=values.typecode))
        tensors["boxes"] = tensors["boxes"].view(-1, 4)
        tensors["points"] = tensors["points"].view(-1, 2)
        return PackedObjects(**tensors)

    def _segmentation(self, annotation: dict, height: int, width: int) -> tuple[list[list[float]], bytes]:
        """Usable polygons, or a compressed RLE; one of them at least when masks are wanted."""
        segmentation = annotation.get("segmentation") or []
        if not self.masks and annotation.get("bbox") is not None:
            return [], b""
        if isinstance(segmentation, dict):
            return [], _compress(segmentation, height, width)
        if isinstance(segmentation[0] if segmentation else None, (int, float)):
            segmentation = [segmentation]  # one polygon without the outer list, which pycocotools takes too
        if not all(math.isfinite(sum(polygon)) for polygon in segmentation):
            raise _Unusable("not_finite")
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]
        if len(polygons) < len(segmentation):
            self.warnings["bad_polygon"].append(annotation["id"])
        if self.masks and not polygons:
            raise _Unusable("no_mask")
        return polygons, b""

    def _box(self, annotation: dict, polygons: list[list[float]], rle: bytes, height: int, width: int) -> list[float]:
        """xyxy, clipped to the image."""
        bbox = annotation.get("bbox")
        if bbox is None:
            self.warnings["missing_bbox"].append(annotation["id"])
            bbox = _bounds(polygons, rle, height, width)
        x, y, w, h = bbox
        if not math.isfinite(x + y + w + h):
            raise _Unusable("not_finite")
        if w <= 0 or h <= 0:
            raise _Unusable("zero_area")
        box = [max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)]
        if box[0] >= box[2] or box[1] >= box[3]:
            raise _Unusable("outside")
        if min(x, y, width - x - w, height - y - h) < -1:
            self.warnings["clipped"].append(annotation["id"])
        return box


class _Unusable(Exception):
    """An annotation to drop; the message is the kind of problem."""


def _bounds(polygons: list[list[float]], rle: bytes, height: int, width: int) -> list[float]:
    """[x, y, width, height] around a segmentation."""
    if rle:
        return coco_mask.toBbox({"size": [height, width], "counts": rle}).tolist()
    if not polygons:
        raise _Unusable("no_mask")
    xs, ys = [x for p in polygons for x in p[::2]], [y for p in polygons for y in p[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _compress(rle: dict, height: int, width: int) -> bytes:
    sound = sound_rle(rle, height, width)
    if sound is None:
        raise _Unusable("bad_rle")
    return sound[0]["counts"].encode()


def read_coco(path: str) -> dict[str, Any]:
    """The JSON of a COCO file, with lists of objects under images, annotations and categories."""
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"annotation file {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"annotation file {path} is not valid JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{path} is not a COCO instances file: it needs a list of objects named {key!r}")
    return content


def check_files(image_dir: str, file_names: list[str], annotation_file: str) -> None:
    """Raises DataError when files are missing. Lists each directory once: faster than asking for every file."""
    listed: dict[str, set[str]] = {}
    missing = []
    for file_name in file_names:
        directory, name = os.path.split(file_name)
        if directory not in listed:
            try:
                listed[directory] = set(os.listdir(os.path.join(image_dir, directory)))
            except OSError:
                listed[directory] = set()
        if name not in listed[directory]:
            missing.append(file_name)
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(file_names)} images of {annotation_file} are not in {image_dir},"
            f" the first is {missing[0]}"
        )


def _read_categories(categories: list[dict], file: str) -> dict[int, str]:
    """Category id -> name."""
    for number, category in enumerate(categories):
        if type(category.get("id")) is not int or type(category.get("name")) is not str:
            raise DataError(f"{file}: categories[{number}] needs an id (a whole number) and a name (a text)")
    if not categories:
        raise DataError(f"{file}: its list of categories is empty")
    if duplicate := _first_duplicate([category["id"] for category in categories]):
        raise DataError(f"{file}: category id {duplicate[0]} is given twice")
    return {category["id"]: category["name"] for category in categories}


def _first_duplicate(ids: list[int]) -> list[int]:
    """The first id that was there before, if any."""
    seen: set[int] = set()
    for value in ids:
        if value in seen:
            return [value]
        seen.add(value)
    return []


def _short_list(ids: Any) -> str:
    ids = [str(i) for i in ids]
    return ", ".join(ids if len(ids) <= 10 else [*ids[:9], "...", ids[-1]])
