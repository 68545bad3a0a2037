"""Sample: one image with its objects; and what turns it into a training or test input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from yacs.config import CfgNode


@dataclass
class Polygons:
    """Polygon masks of G instances, packed as in `structures.PolygonBatch`.

    points [P, 2] float32 (x, y) pixels, polygon_offsets [Q + 1] int64 into points, instance_offsets [G + 1] int64 into
    polygons.
    """

    points: np.ndarray
    polygon_offsets: np.ndarray
    instance_offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.instance_offsets) - 1

    def of(self, instance: int) -> list[np.ndarray]:
        """The polygons [p, 2] of one instance."""
        offsets = self.polygon_offsets[self.instance_offsets[instance] : self.instance_offsets[instance + 1] + 1]
        return [self.points[start:end] for start, end in pairwise(offsets)]

    def select(self, keep: np.ndarray) -> Polygons:
        """The instances where `keep` [G] bool is True."""
        polygon_kept = np.repeat(keep, np.diff(self.instance_offsets))
        point_kept = np.repeat(polygon_kept, np.diff(self.polygon_offsets))
        return Polygons(
            self.points[point_kept],
            offsets_of(np.diff(self.polygon_offsets)[polygon_kept]),
            offsets_of(np.diff(self.instance_offsets)[keep]),
        )

    def rasterize(self, height: int, width: int) -> np.ndarray:
        """Bitmaps [G, height, width] uint8 of 0 and 1, drawn by pycocotools."""
        bitmaps = np.zeros((len(self), height, width), np.uint8)
        for instance, bitmap in enumerate(bitmaps):
            polygons = [points.ravel().astype(np.float64) for points in self.of(instance)]
            if polygons:
                bitmap[:] = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))
        return bitmaps


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """counts [N] -> where each of the N groups starts, and where the last one ends: [N + 1] int64."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


@dataclass
class Sample:
    """One image and its objects.

    image: [H, W, 3] uint8 RGB. boxes: [G, 4] float32 xyxy pixels of `image`. labels: [G] int64, 1..C.
    polygons or bitmaps [G, H, W] uint8 of 0 and 1: the masks; both None without masks.
    image_id: the data set's id; image_index: 0..N-1 in the data set; original_size: (height, width) before transforms.
    """

    image: np.ndarray
    image_id: int
    image_index: int
    original_size: tuple[int, int]
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    polygons: Polygons | None = None
    bitmaps: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[:2]


Transform = Callable[[Sample, np.random.Generator], Sample]


class Compose:
    """Transforms in turn; then boxes are clipped to the image, and objects with nothing left are dropped."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = tuple(transforms)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        for transform in self.transforms:
            sample = transform(sample, rng)
        return clip_to_image(sample)


class ResizeShortSide:
    """Resizes to a short side of `size`, less where the long side would exceed `max_size`.

    scale = min(size / short, max_size / long) and a new side is int(side * scale + .5), as in detectron2. Boxes and
    points follow the ratio of the whole-numbered sides, per axis. Pixels: bilinear when enlarging, area average
    when shrinking (antialiased); bitmaps bilinear, cut at .5.

    Args:
        sizes: short sides in pixels. sampling "choice": one of them is drawn; "range": any whole number from the first
            to the second.
        max_size: longest side allowed, in pixels.
    """

    def __init__(self, sizes: Sequence[int], max_size: int, sampling: str = "choice") -> None:
        self.sizes = tuple(sizes)
        self.max_size = max_size
        self.sampling = sampling

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        (height, width), (new_height, new_width) = sample.size, self.new_size(sample.size, self._draw(rng))
        if (height, width) == (new_height, new_width):
            return sample
        shrinks = new_height < height or new_width < width
        size = (new_width, new_height)
        image = cv2.resize(sample.image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        ratio = np.array([new_width / width, new_height / height], np.float32)
        polygons, bitmaps = sample.polygons, sample.bitmaps
        if polygons is not None:
            polygons = replace(polygons, points=polygons.points * ratio)
        if bitmaps is not None:
            resized = [cv2.resize(bitmap * 255, size, interpolation=cv2.INTER_LINEAR) >= 128 for bitmap in bitmaps]
            bitmaps = np.array(resized, np.uint8).reshape(len(bitmaps), new_height, new_width)
        return replace(sample, image=image, boxes=sample.boxes * np.tile(ratio, 2), polygons=polygons, bitmaps=bitmaps)

    def new_size(self, size: tuple[int, int], short: int) -> tuple[int, int]:
        """The (height, width) that an image of `size` gets for a short side of `short`."""
        scale = min(short / min(size), self.max_size / max(size))
        return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))

    def _draw(self, rng: np.random.Generator) -> int:
        if self.sampling == "range":
            return int(rng.integers(self.sizes[0], self.sizes[1], endpoint=True))
        return self.sizes[rng.integers(len(self.sizes))]


class RandomHorizontalFlip:
    """Mirrors left and right with probability `prob`: x becomes width - x."""

    def __init__(self, prob: float) -> None:
        self.prob = prob

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if rng.random() >= self.prob:
            return sample
        width = sample.size[1]
        boxes = sample.boxes.copy()
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        polygons, bitmaps = sample.polygons, sample.bitmaps
        if polygons is not None:
            points = polygons.points.copy()
            points[:, 0] = width - points[:, 0]
            polygons = replace(polygons, points=points)
        if bitmaps is not None:
            bitmaps = np.ascontiguousarray(bitmaps[:, :, ::-1])
        return replace(sample, image=cv2.flip(sample.image, 1), boxes=boxes, polygons=polygons, bitmaps=bitmaps)


def clip_to_image(sample: Sample) -> Sample:
    """Boxes clipped to the image; objects whose box has no area then are dropped. Polygons may reach beyond the image:
    what lies there is never drawn."""
    height, width = sample.size
    boxes = np.clip(sample.boxes, 0, np.array([width, height, width, height], np.float32))
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    if keep.all():
        return replace(sample, boxes=boxes)
    return replace(
        sample,
        boxes=boxes[keep],
        labels=sample.labels[keep],
        polygons=sample.polygons.select(keep) if sample.polygons is not None else None,
        bitmaps=sample.bitmaps[keep] if sample.bitmaps is not None else None,
    )


def build_transforms(cfg: CfgNode, training: bool) -> Compose:
    """What INPUT asks for."""
    if not training:
        return Compose([ResizeShortSide((cfg.INPUT.MIN_SIZE_TEST,), cfg.INPUT.MAX_SIZE_TEST)])
    resize = ResizeShortSide(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING)
    return Compose([resize, RandomHorizontalFlip(cfg.INPUT.HORIZONTAL_FLIP_PROB_TRAIN)])
