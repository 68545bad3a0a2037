"""Data sets written in Python as torchvision's tutorial writes them: `dataset[i]` is an image and a dict."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import Subset

from ..errors import ConfigError, DataError
from .coco import content_of
from .keypoints import PERSON, Skeleton, named
from .transforms import Sample

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_python_name(name: str) -> bool:
    """Whether it reads `module:Class`."""
    return _NAME.fullmatch(name) is not None


def from_python(name: str, root: str) -> Any:
    """What `module:Class`, `module:function` or `module:object` stands for. A class or function is called: its
    parameter without default gets `root`, and `transforms` None, as images are transformed later. Modules are looked
    for in the current directory too.

    Raises ConfigError: no such module or name, or further parameters without default.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"data set {name}: {error}; it is looked for in {os.getcwd()} and sys.path") from error
    if not callable(found):
        return found
    needed = [
        parameter.name
        for parameter in inspect.signature(found).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    given = {"transform": None, "transforms": None, "target_transform": None}
    unknown = [parameter for parameter in needed if parameter not in given]
    if len(unknown) > 1:
        raise ConfigError(
            f"data set {name} needs {', '.join(unknown)}, but only one of them can be DATA.PATH: write a function"
            " without parameters that makes the data set, and name that"
        )
    return found(**{parameter: given.get(parameter, root) for parameter in needed})


class ItemDataset:
    """Images and objects of a data set such as torchvision's tutorial has; attributes as CocoDataset's.

    `items[i]` is (image, target). Image: PIL, or [3, H, W] tensor, uint8 or float in 0..1, not normalized. Target:
    boxes [N, 4] xyxy pixels, labels [N] from 1, and where they are wanted masks [N, H, W] and keypoints [N, K, 3];
    optional iscrowd, area. A crowd takes no part in training, nor does a box without area. Categories have the labels
    as ids, and the names of `items.classes` where there are such (with or without a first one for the background).

    Keypoints are named by a list `items.keypoint_names`, without which they are COCO's 17 of a person: the names say
    which are left and right. `get_height_and_width(i)` spares reading each image once at the start. An image's id is
    its index.

    Args:
        name: for messages. num_classes: classes and the background, where `items` has no `classes`; None: as many as
            labels occur.

    Raises:
        DataError: an item that is not of this form.
    """

    def __init__(
        self,
        items: Any,
        name: str,
        training: bool,
        masks: bool,
        num_classes: int | None = None,
        keypoints: bool = False,
    ) -> None:
        self.items, self.annotation_file, self.training, self.masks = items, name, training, masks
        self.skeleton = _skeleton(items, name) if keypoints else None
        count = len(items)
        if not count:
            raise DataError(f"{name} is empty")
        self.image_ids = list(range(count))
        self.file_names = [f"item {index}" for index in self.image_ids]
        self.category_names = _class_names(items)
        measure = _size_method(items)
        # Without counts every image is taken for one with objects: EMPTY_IMAGE_RATIO then drops none.
        self.counts = np.ones(count, np.int64)
        if measure and (self.category_names or num_classes):
            self.sizes = np.array([measure(index) for index in range(count)], np.int64).reshape(count, 2)
        else:
            logger.info("%s: each of its %d items is read once, for sizes and labels", name, count)
            num_classes = self._survey(num_classes)
        self.category_names = self.category_names or [str(label) for label in range(1, num_classes)]
        self.category_ids = list(range(1, len(self.category_names) + 1))
        self.num_classes = len(self.category_names) + 1

    def __len__(self) -> int:
        return len(self.items)

    def load(self, index: int) -> Sample:
        """The image at `index` in 0..N-1, with its objects (without crowds) when training. Raises DataError."""
        image, target = self._item(index)
        size = image.shape[:2]
        if not self.training:
            if size != tuple(self.sizes[index]):
                raise DataError(f"{self.annotation_file}: item {index} changes its size from reading to reading")
            return Sample(image, index, index, size)
        boxes, labels = self._objects(index, target)
        keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & ~_flags(target, len(boxes))
        sample = Sample(image, index, index, size, boxes[keep], labels[keep])
        if self.masks:
            sample.bitmaps = self._masks(index, target, (len(boxes), *size))[keep]
        if self.skeleton:
            sample.keypoints = self._keypoints(index, target, len(boxes))[keep]
            sample.keypoint_mirror = self.skeleton.mirror
        return sample

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """The objects of image `index` in COCO's form; without `masks` they have no segmentation."""
        image, target = self._item(index)
        boxes, labels = self._objects(index, target)
        entries = []
        for number, ((x1, y1, x2, y2), label) in enumerate(zip(boxes.tolist(), labels.tolist())):
            bbox = [x1, y1, x2 - x1, y2 - y1]
            entries.append({"id": 0, "image_id": index, "category_id": label, "bbox": bbox, "area": bbox[2] * bbox[3]})
            entries[-1]["id"] = index * 100_000 + number + 1
        for entry, crowd in zip(entries, _flags(target, len(boxes)).tolist()):
            entry["iscrowd"] = int(crowd)
        for key in ("area", "keypoints"):
            for entry, value in zip(entries, _array(target[key]).tolist() if key in target else ()):
                entry[key] = value if key == "area" else [number for point in value for number in point]
        if self.masks:
            masks = self._masks(index, target, (len(boxes), *image.shape[:2]))
            for entry, rle in zip(entries, coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0)))):
                entry["segmentation"] = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
        return entries

    def ground_truth(self) -> dict[str, Any]:
        """What to evaluate against. Reads every item."""
        return content_of(self)

    def _survey(self, num_classes: int | None) -> int:
        """Sizes and counts of all items; returns the number of classes, of the labels that occur if need be."""
        sizes, highest = [], 0
        for index in range(len(self)):
            image, target = self._item(index)
            labels = _array(target.get("labels", ()))
            sizes.append(image.shape[:2])
            self.counts[index] = np.count_nonzero(~_flags(target, len(labels)))
            highest = max(highest, int(labels.max(initial=0)))
        self.sizes = np.array(sizes, np.int64)
        return num_classes or highest + 1

    def _item(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Image [H, W, 3] uint8 and target of an item."""
        item = self.items[index]
        if not isinstance(item, Sequence) or len(item) < 2 or not isinstance(item[1], dict):
            raise DataError(
                f"{self.annotation_file}: item {index} must be (image, target), a target a dict with boxes and labels"
            )
        return _pixels(item[0], f"{self.annotation_file}: item {index}"), item[1]

    def _objects(self, index: int, target: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """boxes [N, 4] float32 and labels [N] int64, checked."""
        where = f"{self.annotation_file}: item {index}"
        if missing := [key for key in ("boxes", "labels") if key not in target]:
            raise DataError(f"{where}: its target has no {missing[0]}")
        labels = _array(target["labels"]).astype(np.int64).reshape(-1)
        boxes = _array(target["boxes"]).astype(np.float32).reshape(-1, 4)
        if len(boxes) != len(labels):
            raise DataError(f"{where} has {len(boxes)} boxes, but {len(labels)} labels")
        if not np.isfinite(boxes).all():
            raise DataError(f"{where} has boxes with NaN or infinite coordinates")
        if len(labels) and not 1 <= labels.min() <= labels.max() < self.num_classes:
            raise DataError(
                f"{where} has labels {labels.min()}..{labels.max()}, but must have 1..{self.num_classes - 1} (0 is the"
                " background): set NUM_CLASSES of MODEL.ROI_BOX_HEAD (RetinaNet: MODEL.RETINANET) to their number and"
                " one, or give the data set a list `classes` of their names"
            )
        return boxes, labels

    def _masks(self, index: int, target: dict[str, Any], shape: tuple[int, int, int]) -> np.ndarray:
        if "masks" not in target:
            raise DataError(f"{self.annotation_file}: item {index}: its target has no masks, but MODEL.MASK_ON is True")
        masks = (_array(target["masks"]) > 0).astype(np.uint8)
        if masks.shape != shape and masks.size:
            raise DataError(f"{self.annotation_file}: item {index} has masks {masks.shape}, but must have {shape}")
        return masks.reshape(shape)

    def _keypoints(self, index: int, target: dict[str, Any], count: int) -> np.ndarray:
        where = f"{self.annotation_file}: item {index}"
        if "keypoints" not in target:
            raise DataError(f"{where}: its target has no keypoints, but MODEL.KEYPOINT_ON is True")
        points, shape = _array(target["keypoints"]).astype(np.float32), (count, len(self.skeleton), 3)
        if points.shape != shape and (points.size or count):
            raise DataError(
                f"{where} has keypoints {points.shape}, but must have {shape}: give the data set a list"
                " `keypoint_names` of what they are"
            )
        if not np.isfinite(points).all():
            raise DataError(f"{where} has keypoints with NaN or infinite coordinates")
        return points.reshape(shape) * (points.reshape(shape)[..., 2:] > 0)


def _skeleton(items: Any, name: str) -> Skeleton:
    names = getattr(_inner(items), "keypoint_names", None)
    return named(names, name) if names else PERSON


def _class_names(items: Any) -> list[str]:
    """`items.classes` without the background; empty where there is none."""
    names = [str(name) for name in getattr(_inner(items), "classes", None) or ()]
    return names[1:] if names and "background" in names[0].lower() else names


def _size_method(items: Any):
    """index -> (height, width) without reading the image, or None."""
    method = getattr(_inner(items), "get_height_and_width", None)
    if method and isinstance(items, Subset):
        return lambda index: method(items.indices[index])
    return method


def _inner(items: Any) -> Any:
    return items.dataset if isinstance(items, Subset) else items


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _flags(target: dict[str, Any], count: int) -> np.ndarray:
    """iscrowd [N] bool."""
    return _array(target.get("iscrowd", np.zeros(count))).astype(bool).reshape(-1)


def _pixels(image: Any, where: str) -> np.ndarray:
    """[H, W, 3] uint8 RGB of a PIL image or a tensor [3, H, W]."""
    if isinstance(image, Image.Image):
        return np.array(image.convert("RGB"))
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] not in (1, 3):
        kind = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise DataError(f"{where}: its image must be a PIL image or a [3, H, W] tensor, not {kind}")
    if image.is_floating_point():
        if image.min() < 0 or image.max() > 1:
            raise DataError(
                f"{where}: its image has values {image.min():.3g}..{image.max():.3g}, but must have 0..1: leave"
                " normalizing to INPUT.PIXEL_MEAN and PIXEL_STD"
            )
        image = (image * 255).round().to(torch.uint8)
    return np.ascontiguousarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
