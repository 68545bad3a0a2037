"""COCO instances JSON: checked once, packed into a few flat tensors."""

from __future__ import annotations

import json
import logging
import math
import os
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from ..errors import DataError
from ..ops.rle import sound_rle
from .content import Source
from .images import read_image
from .json_stream import read_elements
from .keypoints import Skeleton, of_categories
from .sample import Polygons, Sample, offsets_of

logger = logging.getLogger(__name__)

# What may be wrong with single annotations while the rest can still be used
PROBLEMS = {
    "duplicate_id": "share their id with another annotation",
    "missing_bbox": "have no bbox: it is computed from the segmentation",
    "not_finite": "have coordinates that are NaN, infinite or millions of pixels away, and are dropped",
    "zero_area": "have a box without area and are dropped",
    "outside": "lie outside their image and are dropped",
    "clipped": "reach more than a pixel beyond their image: the box is clipped",
    "bad_polygon": "have a polygon of fewer than 3 points, of an odd number of coordinates, far away or of an endless"
    " outline: the polygon is dropped",
    "bad_rle": "have an RLE that is damaged or not of their image's size, and are dropped",
    "no_mask": "have no usable mask and are dropped",
}
LISTS = ("images", "annotations", "categories")
GROUPS_AT_ONCE = 1 << 16
# Pixels from 0 that a coordinate may lie: float32 tells apart no more, and pycocotools counts five to a pixel in 32
# bits. Also the longest outline of a polygon: drawing takes 40 bytes a pixel of it, and 10,000 points that jump to and
# fro over a large image would take many GB.
FARTHEST = 1 << 24
IMAGE_KEYS = ("id", "file_name", "height", "width")
_STANDARD_KEYS = {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"}


@dataclass
class PackedObjects:
    """All objects of a data set in flat tensors, by image, an image's crowds last.

    Tensors, because torch hands them to worker processes as shared memory, whether forked or spawned. `x_offsets`
    [A + 1] say where annotation a's part of x lies; polygon_offsets [Q + 1] index points.
    boxes [A, 4] float32 xyxy; areas [A] float64, NaN where the file has none; keypoints [A, K, 3] float32, K 0 where
    they are not wanted; rle and extras are bytes: a compressed COCO RLE, and the annotation's further keys as JSON.
    """

    ids: Tensor
    labels: Tensor
    boxes: Tensor
    areas: Tensor
    crowds: Tensor
    keypoints: Tensor
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
        content: what a file of another format was read into; `annotation_file` is then for messages alone.
        keypoints: keep the keypoints; then a category that has some is needed.

    Attributes:
        category_ids, category_names: label l (1..C, by rising category id) is `category_ids[l - 1]`.
        num_classes: C + 1, with the background.
        skeleton: the keypoints, where they are wanted, or None.
        image_ids, file_names: by image index; sizes: [N, 2] int64 (height, width) as the file states them.
        counts: [N] int64, usable objects (no crowds) of each image.
        warnings: kind of problem (a key of PROBLEMS) -> annotation ids; each kind is logged once.

    Raises:
        DataError: not a COCO file, references that lead nowhere, images that are not on disk.
    """

    def __init__(
        self,
        annotation_file: str | Path,
        image_dir: str | Path,
        training: bool,
        masks: bool = True,
        content: dict[str, Any] | None = None,
        keypoints: bool = False,
    ) -> None:
        self.annotation_file, self.image_dir = str(annotation_file), str(image_dir)
        self.training, self.masks = training, masks
        self._in_coco_file = content is None
        images, categories = [], []
        packer = Packer(self.annotation_file, masks, keypoints)
        take = {
            "images": lambda image: images.append({key: image.get(key) for key in IMAGE_KEYS}),
            "categories": categories.append,
            "annotations": packer.add,
        }
        for key, _, entry in entries(content, self.annotation_file):
            take[key](entry)
        names = _read_categories(categories, self.annotation_file)
        self.category_ids = sorted(names)
        self.category_names = [names[i] for i in self.category_ids]
        self.num_classes = len(names) + 1
        self.skeleton = of_categories(categories, self.annotation_file) if keypoints else None
        self._read_images(images)
        check_files(self.image_dir, self.file_names, self.annotation_file)
        self._objects, image_of = packer.finish(self.image_ids, self.sizes, self.category_ids, self.skeleton)
        self._offsets = np.searchsorted(image_of, np.arange(len(self) + 1))
        self.counts = np.bincount(image_of[~self._objects.crowds.numpy().astype(bool)], minlength=len(self))
        self.warnings = {kind: [packer.ids[row] for row in rows] for kind, rows in packer.problems.items()}
        self._log_warnings()
        if training and not self.counts.any():
            raise DataError(f"{self.annotation_file}: none of its {packer.seen} annotations can be trained on")

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
        if self.skeleton:
            sample.keypoints, sample.keypoint_mirror = objects.keypoints[first:last].numpy(), self.skeleton.mirror
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

    def ground_truth(self) -> str | dict[str, Any]:
        """What to evaluate against: the COCO file, or of another format its content."""
        return self.annotation_file if self._in_coco_file else content_of(self)

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
            if problem := entry_problem("images", number, image) or size_problem(image):
                raise DataError(f"{where}: {problem}")
        self.image_ids = [image["id"] for image in images]
        self.file_names = [image["file_name"] for image in images]
        self.sizes = np.array([(image["height"], image["width"]) for image in images], np.int64)
        if duplicate := _first_duplicate(self.image_ids):
            raise DataError(f"{where}: image id {duplicate[0]} is given twice")

    def _log_warnings(self) -> None:
        for kind, ids in self.warnings.items():
            first = ", ".join(map(str, ids[:3])) + (", ..." if len(ids) > 3 else "")
            logger.warning("%s: %d annotations %s (ids %s)", self.annotation_file, len(ids), PROBLEMS[kind], first)
        used = set(self._objects.labels[self._objects.crowds == 0].unique().tolist())
        unused = [name for label, name in enumerate(self.category_names, start=1) if label not in used]
        if self.training and unused:
            names = _short_list(unused)
            logger.warning("%s: no object to train on of %d categories: %s", self.annotation_file, len(unused), names)


class Packer:
    """Appends annotations to flat arrays, a row each; what cannot be used is noted in `problems`, and dropped by
    `finish`. It knows nothing of images and categories until then: a COCO file lists its categories last.

    columns: one number or more a row. ragged: values and, a row or polygon each, where they end.
    problems: kind (a key of PROBLEMS) -> rows.
    """

    def __init__(self, file: str, masks: bool, keypoints: bool) -> None:
        self.file, self.masks, self.wants_keypoints = file, masks, keypoints
        self.problems: dict[str, list[int]] = defaultdict(list)
        self.seen = 0
        whole, real, byte = "q", "d", "B"
        self.ids, self.images, self.categories = array(whole), array(whole), array(whole)
        self.bounds, self.areas, self.crowds = array(real), array(real), array(byte)
        self.points, self.polygon_ends, self.instance_ends = array("f"), array(whole, [0]), array(whole, [0])
        self.rle, self.rle_ends, self.rle_sizes = array(byte), array(whole, [0]), array(whole)
        self.keypoints, self.keypoint_ends = array("f"), array(whole, [0])
        self.extras, self.extras_ends = array(byte), array(whole, [0])

    def add(self, annotation: dict) -> None:
        """Raises DataError: ids that are none, which make no row; values of wrong types, whose row is unusable."""
        self.seen += 1
        for key in ("id", "image_id", "category_id"):
            value = annotation.get(key)
            if type(value) is not int or abs(value) >= 2**63:
                raise DataError(
                    f"{self.file}: annotations[{self.seen - 1}] needs {key}, a whole number of 64 bits, not {value!r}"
                )
        try:
            polygons, rle = self._segmentation(annotation)
            x, y, w, h = self._bbox(annotation, polygons, rle)
            area = math.nan if annotation.get("area") is None else float(annotation["area"])
            self._take_keypoints(annotation)
        except _Unusable as problem:
            self._note(str(problem))
            self._append_unusable(annotation)
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            self._append_unusable(annotation)
            raise DataError(
                f"{self.file}: annotation id {annotation['id']}: bbox must be [x, y, width, height], and segmentation"
                f" polygons [[x, y, x, y, ...], ...] or an RLE {{size, counts}}, area a number, and keypoints"
                f" [x, y, v, x, y, v, ...]:"
                f" {type(error).__name__} {error}"
            ) from error
        else:
            self.bounds.extend((x, y, x + w, y + h))
            self._append(annotation, polygons if self.masks else [], rle if self.masks else None, area)

    def _note(self, kind: str) -> None:
        """A problem of the row that comes next."""
        self.problems[kind].append(len(self.ids))

    def _append_unusable(self, annotation: dict) -> None:
        self.bounds.extend((math.nan,) * 4)  # dropped by finish, which checks whose it is
        self._append(annotation, [], None, math.nan)

    def _append(self, annotation: dict, polygons: list[list[float]], rle: dict | None, area: float) -> None:
        self.ids.append(annotation["id"])
        self.images.append(annotation["image_id"])
        self.categories.append(annotation["category_id"])
        self.areas.append(area)
        self.crowds.append(bool(annotation.get("iscrowd", 0)))
        for polygon in polygons:
            self.points.extend(polygon)
            self.polygon_ends.append(len(self.points) // 2)
        self.instance_ends.append(len(self.polygon_ends) - 1)
        self.keypoint_ends.append(len(self.keypoints))
        self.rle.frombytes(rle["counts"].encode() if rle else b"")
        self.rle_ends.append(len(self.rle))
        self.rle_sizes.extend(rle["size"] if rle else (0, 0))
        if extras := {key: value for key, value in annotation.items() if key not in _STANDARD_KEYS}:
            self.extras.frombytes(json.dumps(extras).encode())
        self.extras_ends.append(len(self.extras))

    def _segmentation(self, annotation: dict) -> tuple[list[list[float]], dict | None]:
        """Usable polygons, or a compressed RLE; one of them at least when masks are wanted."""
        segmentation = annotation.get("segmentation") or []
        if not self.masks and annotation.get("bbox") is not None:
            return [], None
        if isinstance(segmentation, dict):
            return [], _compress(segmentation)
        if isinstance(segmentation[0] if segmentation else None, (int, float)):
            segmentation = [segmentation]  # one polygon without the outer list, which pycocotools takes too
        if not all(math.isfinite(sum(polygon)) for polygon in segmentation):
            raise _Unusable("not_finite")
        polygons = [polygon for polygon in segmentation if drawable(polygon)]
        if len(polygons) < len(segmentation):
            self._note("bad_polygon")
        if self.masks and not polygons:
            raise _Unusable("no_mask")
        return polygons, None

    def _bbox(self, annotation: dict, polygons: list[list[float]], rle: dict | None) -> list[float]:
        """x, y, width, height, as the annotation says or around its segmentation."""
        bbox = annotation.get("bbox")
        if bbox is None:
            self._note("missing_bbox")
            bbox = _bounds(polygons, rle)
        x, y, w, h = bbox
        if not math.isfinite(x + y + w + h):
            raise _Unusable("not_finite")
        if w <= 0 or h <= 0:
            raise _Unusable("zero_area")
        return bbox

    def _take_keypoints(self, annotation: dict) -> None:
        if not self.wants_keypoints:
            return
        points = annotation.get("keypoints") or []
        if not _within_reach(points):
            raise _Unusable("not_finite")
        self.keypoints.extend(points)

    def finish(
        self, image_ids: list[int], sizes: np.ndarray, category_ids: list[int], skeleton: Skeleton | None
    ) -> tuple[PackedObjects, np.ndarray]:
        """The usable annotations by image, an image's crowds last, and the image index of each.

        Raises DataError: an image or category that is not there, another number of keypoints than the skeleton's.
        """
        ids, crowds, boxes = np.array(self.ids, np.int64), np.array(self.crowds, np.uint8), self.boxes()
        image_of = self._lookup(self.images, np.array(image_ids, np.int64), "image")
        labels = 1 + self._lookup(self.categories, np.array(category_ids, np.int64), "category")
        keep = self.usable(sizes[image_of])
        order = np.flatnonzero(keep)
        order = order[np.lexsort((crowds[order], image_of[order]))]
        limits = sizes[image_of[order]][:, [1, 0, 1, 0]]
        points, polygon_offsets, instance_offsets = self._polygons(order)
        rle, rle_offsets = take_ragged(self.rle, self.rle_ends, order)
        extras, extras_offsets = take_ragged(self.extras, self.extras_ends, order)
        columns = {
            "ids": ids[order],
            "labels": labels[order],
            "boxes": boxes[order].clip(0, limits).astype(np.float32),
            "areas": np.array(self.areas, np.float64)[order],
            "crowds": crowds[order],
            "keypoints": self._dense_keypoints(order, len(skeleton or ())),
            "points": points.reshape(-1, 2),
            "polygon_offsets": polygon_offsets,
            "instance_offsets": instance_offsets,
            "rle": rle,
            "rle_offsets": rle_offsets,
            "extras": extras,
            "extras_offsets": extras_offsets,
        }
        tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in columns.items()}
        return PackedObjects(**tensors), image_of[order]

    def _lookup(self, wanted: array, known: np.ndarray, kind: str) -> np.ndarray:
        """Where in `known` each of the wanted ids is."""
        wanted = np.array(wanted, np.int64)
        places = places_of(wanted, known)
        missing = np.flatnonzero(places < 0)
        if len(missing):
            verb, where = ("belongs to", "images") if kind == "image" else ("has", "categories")
            raise DataError(
                f"{self.file}: annotation id {self.ids[missing[0]]} {verb} {kind} id {wanted[missing[0]]}, which is not"
                f" in its list of {where} ({_short_list(sorted(known.tolist()))})"
            )
        return places

    def boxes(self) -> np.ndarray:
        """[A, 4] float64 xyxy as the file has them, NaN of unusable annotations."""
        return np.array(self.bounds, np.float64).reshape(-1, 4)

    def usable(self, sizes: np.ndarray) -> np.ndarray:
        """Which rows stay, [A] bool; notes what is wrong with the others, and whose box is clipped. To be called once.

        sizes: [A, 2] (height, width) of each row's image.
        """
        ids, boxes = np.array(self.ids, np.int64), self.boxes()
        sane = ~np.isnan(boxes[:, 0])
        rle_sizes = np.array(self.rle_sizes, np.int64).reshape(-1, 2)
        other_size = sane & rle_sizes.any(axis=1) & (rle_sizes != sizes).any(axis=1)
        limits = sizes[:, [1, 0]]
        clipped = np.concatenate([boxes[:, :2].clip(0), np.minimum(boxes[:, 2:], limits)], axis=1)
        outside = sane & ~other_size & (clipped[:, :2] >= clipped[:, 2:]).any(axis=1)
        keep = sane & ~other_size & ~outside
        beyond = keep & (np.concatenate([boxes[:, :2], limits - boxes[:, 2:]], axis=1) < -1).any(axis=1)
        order = np.argsort(ids, kind="stable")
        repeated = np.zeros(len(ids), bool)
        repeated[order[1:][np.diff(ids[order]) == 0]] = True
        for kind, found in (
            ("duplicate_id", repeated),
            ("bad_rle", other_size),
            ("outside", outside),
            ("clipped", beyond),
        ):
            if found.any():
                self.problems[kind] += np.flatnonzero(found).tolist()
        return keep

    def _dense_keypoints(self, order: np.ndarray, count: int) -> np.ndarray:
        """[A, count, 3] of these annotations, zeros where there is none."""
        dense = np.zeros((len(order), count, 3), np.float32)
        if not count:
            return dense
        values, offsets = take_ragged(self.keypoints, self.keypoint_ends, order)
        owned = np.diff(offsets)
        wrong = np.flatnonzero((owned > 0) & (owned != 3 * count))
        if len(wrong):
            raise DataError(
                f"{self.file}: annotation id {self.ids[order[wrong[0]]]} has {owned[wrong[0]]} numbers as keypoints;"
                f" its categories name {count} keypoints, which take {3 * count}"
            )
        dense[owned > 0] = values.reshape(-1, count, 3)
        return dense * (dense[..., 2:] > 0)

    def _polygons(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """points, polygon_offsets and instance_offsets of these annotations."""
        ends = np.array(self.polygon_ends, np.int64)
        polygons, instance_offsets = take_ragged(np.arange(len(ends) - 1), self.instance_ends, order)
        points, polygon_offsets = take_ragged(np.asarray(self.points).view(np.complex64), ends, polygons)
        return points.view(np.float32), polygon_offsets, instance_offsets


def places_of(wanted: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Where in `known` each of the wanted numbers is; -1 where it is not."""
    if not len(known):
        return np.full(len(wanted), -1)
    order = np.argsort(known)
    places = order[np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)]
    return np.where(known[places] == wanted, places, -1)


def take_ragged(values: Any, ends: Any, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group g is values[ends[g]:ends[g + 1]]. The groups in this order, one after the other, and their offsets."""
    values, ends = np.asarray(values), np.asarray(ends)
    counts = np.diff(ends)[order]
    offsets = offsets_of(counts)
    taken = np.empty(offsets[-1], values.dtype)
    for first in range(0, len(order), GROUPS_AT_ONCE):  # the indices take more memory than what they point to
        part = slice(first, first + GROUPS_AT_ONCE)
        start, end = offsets[first], offsets[min(first + GROUPS_AT_ONCE, len(order))]
        shift = np.repeat(ends[order[part]] - offsets[:-1][part], counts[part])
        taken[start:end] = values[shift + np.arange(start, end)]
    return taken, offsets


class _Unusable(Exception):
    """An annotation to drop; the message is the kind of problem."""


def _within_reach(numbers: list[float]) -> bool:
    """Whether these are numbers, and coordinates of something near an image."""
    return math.isfinite(sum(numbers)) and (not numbers or -FARTHEST < min(numbers) <= max(numbers) < FARTHEST)


def drawable(polygon: list[float]) -> bool:
    """Whether these finite [x, y, x, y, ...] are a polygon near an image, whose outline is not too long to be drawn."""
    if len(polygon) < 6 or len(polygon) % 2:
        return False
    low, high = min(polygon), max(polygon)
    if not -FARTHEST < low <= high < FARTHEST:
        return False
    if len(polygon) * (high - low) < FARTHEST:  # as nearly every polygon
        return True
    steps = np.abs(np.diff(np.reshape(polygon, (-1, 2)), axis=0))
    return float(steps.max(axis=1).sum()) < FARTHEST


def _bounds(polygons: list[list[float]], rle: dict | None) -> list[float]:
    """[x, y, width, height] around a segmentation."""
    if rle:
        return coco_mask.toBbox(rle).tolist()
    if not polygons:
        raise _Unusable("no_mask")
    xs, ys = [x for p in polygons for x in p[::2]], [y for p in polygons for y in p[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _compress(rle: dict) -> dict:
    """With "counts" as compressed text. Its size is compared with the image's when that is known."""
    size = rle.get("size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise _Unusable("bad_rle")
    if size[0] * size[1] >= 2**32:  # pycocotools counts in 32 bits
        raise _Unusable("bad_rle")
    sound = sound_rle(rle, *size)
    if sound is None:
        raise _Unusable("bad_rle")
    return sound[0]


def content_of(dataset: Any) -> dict[str, Any]:
    """COCO's lists images, categories and annotations of any data set, as its `annotations` gives them."""
    sizes = zip(dataset.image_ids, dataset.sizes.tolist())
    return {
        "images": [{"id": image_id, "height": height, "width": width} for image_id, (height, width) in sizes],
        "categories": [{"id": i, "name": n} for i, n in zip(dataset.category_ids, dataset.category_names)],
        "annotations": [entry for index in range(len(dataset)) for entry in dataset.annotations(index)],
    }


def read(path: Path, images: str = "") -> Source:
    """A COCO instances file. images: directory of its images, relative to its own; by default DIR/NAME for
    DIR/annotations/instances_NAME.json where that exists, else the file's own."""
    beside = path.parent.parent / path.stem.removeprefix("instances_")
    if not images and path.parent.name == "annotations" and beside.is_dir():
        return Source(path, beside, None)
    return Source(path, path.parent / images, None)


def read_coco(path: str) -> dict[str, Any]:
    """The lists images, annotations and categories of a COCO file, as Python objects."""
    content: dict[str, Any] = {key: [] for key in LISTS}
    for key, _, entry in entries(None, path):
        content[key].append(entry)
    return content


def entries(content: dict[str, Any] | None, path: str) -> Iterator[tuple[str, int, dict]]:
    """(list, place, entry) of COCO's lists: in `content`, or else one after the other from the file.

    Raises DataError: not readable, or a list is missing or none, or has entries that are no objects.
    """
    elements = read_elements(path) if content is None else elements_of(content)
    seen = set()
    for key, place, entry in elements:
        if key not in LISTS:
            continue
        seen.add(key)
        if place is not None and isinstance(entry, dict):
            yield key, place, entry
        elif entry != []:
            seen.discard(key)
            break
    for key in LISTS:
        if key not in seen:
            raise DataError(f"{path} is not a COCO instances file: it needs a list of objects named {key!r}")


def elements_of(content: dict[str, Any]) -> Iterator[tuple[str, int | None, Any]]:
    """What json_stream.read_elements would give of a file with this content."""
    for key in LISTS:
        yield from ((key, place, entry) for place, entry in enumerate(content[key]))
        if not content[key]:
            yield key, None, []


def check_files(image_dir: str, file_names: list[str], annotation_file: str) -> None:
    """Raises DataError when files are missing."""
    if missing := missing_files(image_dir, file_names):
        raise DataError(
            f"{len(missing)} of the {len(file_names)} images of {annotation_file} are not in {image_dir},"
            f" the first is {missing[0]}"
        )


def missing_files(image_dir: str, file_names: list[str]) -> list[str]:
    """Which of the files are not there. Lists each directory once: faster than asking for every file."""
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
    return missing


def _read_categories(categories: list[dict], file: str) -> dict[int, str]:
    """Category id -> name."""
    for number, category in enumerate(categories):
        if problem := entry_problem("categories", number, category):
            raise DataError(f"{file}: {problem}")
    if not categories:
        raise DataError(f"{file}: its list of categories is empty")
    if duplicate := _first_duplicate([category["id"] for category in categories]):
        raise DataError(f"{file}: category id {duplicate[0]} is given twice")
    return {category["id"]: category["name"] for category in categories}


def entry_problem(key: str, number: int, entry: dict) -> str:
    """Why an entry of the list of images or categories cannot be used; empty where it can."""
    name = "file_name" if key == "images" else "name"
    if type(entry.get("id")) is int and abs(entry["id"]) < 2**63 and type(entry.get(name)) is str:
        return ""
    return f"{key}[{number}] needs an id (a whole number) and a {name} (a text)"


def size_problem(image: dict) -> str:
    """What is wrong with the size that an image's entry states; empty where it can be."""
    size = (image.get("height"), image.get("width"))
    if all(type(side) is int and 0 < side < 2**31 for side in size):
        return ""
    return f"image id {image['id']}: height and width must be whole numbers, not {size}"


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
