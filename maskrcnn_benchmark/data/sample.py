"""Sample: one image with its objects, on its way from a data set to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from pycocotools import mask as coco_mask


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

    @classmethod
    def pack(cls, instances: Sequence[Sequence[np.ndarray]]) -> Polygons:
        """Of each instance its polygons [p, 2]."""
        polygons = [polygon for instance in instances for polygon in instance]
        return cls(
            np.concatenate([np.zeros((0, 2), np.float32), *polygons]).astype(np.float32),
            offsets_of(np.array([len(polygon) for polygon in polygons], np.int64)),
            offsets_of(np.array([len(instance) for instance in instances], np.int64)),
        )

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

    def bounds(self) -> np.ndarray:
        """[G, 4] float32 xyxy around each instance's points; (inf, inf, -inf, -inf) around none."""
        starts = self.polygon_offsets[self.instance_offsets]
        bounds = np.tile(np.array([np.inf, np.inf, -np.inf, -np.inf], np.float32), (len(self), 1))
        filled = np.flatnonzero(np.diff(starts))
        if len(filled):  # reduceat would give an empty instance the next one's point
            bounds[filled, :2] = np.minimum.reduceat(self.points, starts[filled])
            bounds[filled, 2:] = np.maximum.reduceat(self.points, starts[filled])
        return bounds

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
    keypoints: [G, K, 3] float32 (x, y, visibility), 0, 0, 0 where there is none; None without keypoints.
    keypoint_mirror: [K] the keypoint that each becomes in a mirror (left eye, right eye); None: all stay what they are.
    to_mirror: the pixels of `image` are still to be mirrored left to right, which all else already is.
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
    keypoints: np.ndarray | None = None
    keypoint_mirror: Sequence[int] | None = None
    to_mirror: bool = False

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[:2]

    def select(self, keep: np.ndarray) -> Sample:
        """The objects where `keep` [G] bool is True."""
        return replace(
            self,
            boxes=self.boxes[keep],
            labels=self.labels[keep],
            polygons=self.polygons.select(keep) if self.polygons is not None else None,
            bitmaps=self.bitmaps[keep] if self.bitmaps is not None else None,
            keypoints=self.keypoints[keep] if self.keypoints is not None else None,
        )

    def drawn(self) -> np.ndarray | None:
        """The masks as bitmaps [G, H, W], whatever form they have; None without masks."""
        return self.polygons.rasterize(*self.size) if self.polygons is not None else self.bitmaps

    def join(self, other: Sample) -> Sample:
        """This image with the objects of both; `other` has the same size."""
        changes = {}
        if self.polygons is not None and other.polygons is not None:
            parts = (self.polygons, other.polygons)
            changes["polygons"] = Polygons.pack([p.of(instance) for p in parts for instance in range(len(p))])
        elif self.drawn() is not None:
            changes |= {"polygons": None, "bitmaps": np.concatenate([self.drawn(), other.drawn()])}
        if self.keypoints is not None:
            changes["keypoints"] = np.concatenate([self.keypoints, other.keypoints])
        boxes, labels = np.concatenate([self.boxes, other.boxes]), np.concatenate([self.labels, other.labels])
        return replace(self, boxes=boxes, labels=labels, **changes)
