"""All that a data set says, read without stopping at what would stop training: what the checks look at."""

from __future__ import annotations

import math
import os
from array import array
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ...errors import DataError
from .. import catalog
from ..coco import IMAGE_KEYS, Packer, entries, entry_problem, missing_files, places_of, size_problem
from ..content import Source
from ..sample import Polygons
from .images import ImageFacts, Progress, scan

# Least box overlap (IoU) of an annotation's box with its own polygons; COCO's own are all above .8
LEAST_OWN_IOU = 0.5
# Height and width of an image where neither its entry nor its file says any: everything fits
UNKNOWN_SIDE = 1 << 30


@dataclass
class Entries:
    """The lists of images, categories and annotations, as far as they can be used at all.

    images: those with an id and a file name, the first of each id; image_places: where they stand in their list.
    malformed: (list, place, id or None, message) of entries that stop training. repeated: (list, place, id, same) of
    ids given before; same: also of the same name.
    annotation_places: where each of the packer's rows stands in its list; without_crowd: rows that do not say iscrowd;
    unusable_boxes: bbox by row, of those that the packer has no box of.
    """

    packer: Packer
    images: list[dict[str, Any]] = field(default_factory=list)
    image_places: list[int] = field(default_factory=list)
    categories: dict[int, str] = field(default_factory=dict)
    malformed: list[tuple[str, int, Any, str]] = field(default_factory=list)
    repeated: list[tuple[str, int, int, bool]] = field(default_factory=list)
    annotation_places: array = field(default_factory=lambda: array("q"))
    without_crowd: array = field(default_factory=lambda: array("q"))
    unusable_boxes: dict[int, Any] = field(default_factory=dict)
    annotations: int = 0

    def add_annotation(self, place: int, entry: dict) -> None:
        rows = len(self.packer.ids)
        self.annotations += 1
        try:
            self.packer.add(entry)
        except DataError as error:
            self.malformed.append(("annotations", place, entry.get("id"), _without_file(error, self.packer.file)))
        if len(self.packer.ids) > rows:
            self.annotation_places.append(place)
            if "iscrowd" not in entry:
                self.without_crowd.append(rows)
            if math.isnan(self.packer.bounds[-1]):
                self.unusable_boxes[rows] = entry.get("bbox")

    def add_named(self, key: str, place: int, entry: dict) -> None:
        """An image or a category."""
        if problem := entry_problem(key, place, entry):
            self.malformed.append((key, place, entry.get("id"), problem))
            return
        name = entry["file_name" if key == "images" else "name"]
        known = self._names[key]
        if entry["id"] in known:
            self.repeated.append((key, place, entry["id"], known[entry["id"]] == name))
            return
        known[entry["id"]] = name
        if key == "images":
            self.images.append({key: entry.get(key) for key in IMAGE_KEYS})
            self.image_places.append(place)

    def __post_init__(self) -> None:
        self._names: dict[str, dict[int, str]] = {"images": {}, "categories": self.categories}


@dataclass
class Survey:
    """A data set to be checked. N images, A annotations (rows of the packer).

    name: as DATASETS.TRAIN takes it; annotation_file: for messages.
    stated: [N, 2] int64 (height, width) as the entries say, 0 where they say none; sizes: the same, the file's own
    where the stated one cannot be, UNKNOWN_SIDE where nothing is known.
    missing: [N] bool, no such file. facts: of each image's file; None where files were not read.
    image_of, label_of: [A] int64 places in images and category_ids, -1 where the id leads nowhere.
    boxes: [A, 4] float64 xyxy, not clipped.
    usable: [A] bool, what training keeps; problems: kind (a key of coco.PROBLEMS) -> rows.
    """

    name: str
    source: Source
    entries: Entries
    masks: bool
    stated: np.ndarray
    sizes: np.ndarray
    missing: np.ndarray
    facts: list[ImageFacts] | None
    image_of: np.ndarray
    label_of: np.ndarray
    boxes: np.ndarray
    usable: np.ndarray
    problems: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        packer = self.entries.packer
        self.annotation_file = str(self.source.file)
        self.category_ids = sorted(self.entries.categories)
        self.category_names = [self.entries.categories[i] for i in self.category_ids]
        self.ids = np.array(packer.ids, np.int64)
        self.crowds = np.array(packer.crowds, bool)
        self.areas = np.array(packer.areas, np.float64)
        self.objects = np.flatnonzero(self.usable & ~self.crowds)  # rows that training learns from
        self.clipped = self.boxes.clip(0, self.sizes[self.image_of][:, [1, 0, 1, 0]]) if len(self.sizes) else self.boxes

    @cached_property
    def polygons(self) -> Polygons:
        """Of each row."""
        packer = self.entries.packer
        ends = (np.array(ends, np.int64) for ends in (packer.polygon_ends, packer.instance_ends))
        return Polygons(np.asarray(packer.points).reshape(-1, 2), *ends)

    def path(self, index: int) -> str:
        return os.path.join(self.source.image_dir, self.entries.images[index]["file_name"])

    def class_of(self, row: int) -> str:
        """The name of an annotation's class, or the id that has none."""
        label = int(self.label_of[row])
        return self.category_names[label] if label >= 0 else f"category id {self.entries.packer.categories[row]}"

    def counts(self) -> np.ndarray:
        """[N] objects of each image."""
        return np.bincount(self.image_of[self.objects], minlength=len(self.entries.images))

    def classes(self) -> np.ndarray:
        """[C] objects of each category, in the order of category_ids."""
        return np.bincount(self.label_of[self.objects], minlength=len(self.category_ids))


def survey(name: str, root: str, masks: bool, workers: int, progress: Progress, pixels: bool = True) -> Survey:
    """Reads a data set: the annotations one by one, then each image file.

    name: of the catalogue or FORMAT://PATH; root: what DATA.PATH is. masks: segmentations matter. workers: processes
    that read images. pixels: read the image files; without, only whether they are there is looked at.
    Raises ConfigError, DataError: nothing there to check.
    """
    source = catalog.find_source(name, root)
    found = Entries(Packer(str(source.file), masks, keypoints=False))
    for key, place, entry in entries(source.content, str(source.file)):
        found.add_annotation(place, entry) if key == "annotations" else found.add_named(key, place, entry)
    paths = [os.path.join(source.image_dir, image["file_name"]) for image in found.images]
    absent = set(missing_files(str(source.image_dir), [image["file_name"] for image in found.images]))
    missing = np.array([image["file_name"] in absent for image in found.images], bool)
    facts = scan(paths, workers, progress, "images") if pixels else None
    stated = np.array([_stated(image) for image in found.images], np.int64).reshape(-1, 2)
    sizes = _trusted(stated, facts)
    packer = found.packer
    image_of = places_of(np.array(packer.images, np.int64), np.array([image["id"] for image in found.images]))
    label_of = places_of(np.array(packer.categories, np.int64), np.array(sorted(found.categories)))
    lost = (image_of < 0) | (label_of < 0)
    usable = packer.usable(sizes[image_of] if len(sizes) else np.ones((len(lost), 2), np.int64)) & ~lost
    problems = {kind: np.array(sorted(rows)) for kind, rows in packer.problems.items()}
    problems = {kind: rows[~lost[rows]] for kind, rows in problems.items()}
    columns = (stated, sizes, missing, facts, image_of, label_of, packer.boxes(), usable, problems)
    return Survey(name, source, found, masks, *columns)


def beside_mask(survey: Survey) -> tuple[np.ndarray, np.ndarray]:
    """Rows of usable objects whose box has little to do with their own polygons, and the box around those within the
    image, [n, 4] xyxy."""
    rows = survey.objects
    around = survey.polygons.bounds()[rows].astype(np.float64)
    drawn = np.isfinite(around).all(axis=1)  # the others are RLEs, or masks are not looked at
    rows, around, boxes = rows[drawn], around[drawn], survey.boxes[rows[drawn]]
    common = _area(np.concatenate([np.maximum(boxes, around)[:, :2], np.minimum(boxes, around)[:, 2:]], axis=1))
    beside = common < LEAST_OWN_IOU * (_area(boxes) + _area(around) - common)
    limits = survey.sizes[survey.image_of[rows[beside]]][:, [1, 0, 1, 0]]
    return rows[beside], around[beside].clip(0, limits)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1)


def repeated_objects(survey: Survey, usable: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Rows among the usable [A] bool that have image, category, crowd flag and box [A, 4] of an earlier one."""
    rows = np.flatnonzero(usable)
    keys = np.column_stack([survey.image_of, survey.label_of, survey.crowds, boxes])[rows]
    order = np.lexsort(keys.T)  # stable: the earlier of two comes first
    same = (np.diff(keys[order], axis=0) == 0).all(axis=1)
    return np.sort(rows[order[1:][same]])


def _stated(image: dict[str, Any]) -> tuple[int, int]:
    return (0, 0) if size_problem(image) else (image["height"], image["width"])


def _trusted(stated: np.ndarray, facts: list[ImageFacts] | None) -> np.ndarray:
    """[N, 2] the stated sizes, and the file's where it has another one, or none is stated."""
    sizes = np.where(stated > 0, stated, UNKNOWN_SIDE)
    for index, fact in enumerate(facts or ()):
        if not fact.problem and tuple(stated[index]) not in (fact.stored, fact.upright):
            sizes[index] = fact.upright
    return sizes


def _without_file(error: DataError, file: str) -> str:
    return str(error).removeprefix(f"{file}: ")
