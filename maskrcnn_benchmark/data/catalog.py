"""Data set names -> data sets: names of the catalogue, FORMAT://PATH (formats.py), module:Class (items.py)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from yacs.config import CfgNode

from ..errors import ConfigError, DataError
from . import formats
from .coco import CocoDataset, content_of, read_coco
from .content import Source, part_of
from .items import ItemDataset, from_python, is_python_name
from .transforms import Sample

# Name -> (class, image directory, annotation file), relative to DATA.PATH or absolute
CATALOG: dict[str, tuple[type, str, str]] = {
    "coco_2014_train": (CocoDataset, "train2014", "annotations/instances_train2014.json"),
    "coco_2014_val": (CocoDataset, "val2014", "annotations/instances_val2014.json"),
    "coco_2014_minival": (CocoDataset, "val2014", "annotations/instances_minival2014.json"),
    "coco_2014_valminusminival": (CocoDataset, "val2014", "annotations/instances_valminusminival2014.json"),
    "coco_2017_train": (CocoDataset, "train2017", "annotations/instances_train2017.json"),
    "coco_2017_val": (CocoDataset, "val2017", "annotations/instances_val2017.json"),
    "keypoints_coco_2014_train": (CocoDataset, "train2014", "annotations/person_keypoints_train2014.json"),
    "keypoints_coco_2014_val": (CocoDataset, "val2014", "annotations/person_keypoints_val2014.json"),
    "keypoints_coco_2014_minival": (CocoDataset, "val2014", "annotations/person_keypoints_minival2014.json"),
    "keypoints_coco_2014_valminusminival": (
        CocoDataset,
        "val2014",
        "annotations/person_keypoints_valminusminival2014.json",
    ),
    "keypoints_coco_2017_train": (CocoDataset, "train2017", "annotations/person_keypoints_train2017.json"),
    "keypoints_coco_2017_val": (CocoDataset, "val2017", "annotations/person_keypoints_val2017.json"),
    # Upstream's COCO-style copies of other data sets
    **{
        f"voc_{year}_{split}_cocostyle": (CocoDataset, "JPEGImages", f"Annotations/pascal_{split}{year}.json")
        for year, splits in ((2007, ("train", "val", "test")), (2012, ("train", "val")))
        for split in splits
    },
    **{
        f"cityscapes_fine_instanceonly_seg_{split}_cocostyle": (
            CocoDataset,
            "images",
            f"annotations/instancesonly_filtered_gtFine_{split}.json",
        )
        for split in ("train", "val", "test")
    },
}

# Name -> address: VOCdevkit and Cityscapes as they are published, under upstream's names. Upstream counts caravan and
# trailer among Cityscapes' classes, whose benchmark and cityscapes.py do not.
ADDRESSES: dict[str, str] = {
    **{
        f"voc_{year}_{split}": f"voc://VOC{year}?split={split}&imageset=Main"
        for year, splits in ((2007, ("train", "val", "trainval", "test")), (2012, ("train", "val")))
        for split in splits
    },
    **{
        f"cityscapes_{kind}_instance_{split}": f"cityscapes://.?split={split}&labels={labels}"
        for kind, labels in (("poly", "polygons"), ("mask", "instanceIds"))
        for split in ("train", "val")
    },
}


def add(name: str, image_dir: str | Path, annotation_file: str | Path, dataset_class: type = CocoDataset) -> None:
    """Names a data set of your own for DATASETS.TRAIN and DATASETS.TEST. Paths are relative to DATA.PATH or absolute.

    Raises ConfigError when the name stands for other paths already.
    """
    entry = (dataset_class, str(image_dir), str(annotation_file))
    if CATALOG.setdefault(name, entry) != entry:
        raise ConfigError(f"data set name {name!r} is taken already, for {CATALOG[name][2]}: choose another")


def build_dataset(names: Sequence[str], cfg: CfgNode, training: bool) -> AnyDataset:
    """The data sets of these names as one. `name[:10]`, `name[10:20]` or `name[-5:]` takes a part of one, by place in
    its file.

    Raises ConfigError (unknown name), DataError (files).
    """
    if len(cfg.INPUT.PIXEL_MEAN) != 3:
        raise ConfigError(
            f"INPUT.PIXEL_MEAN has {len(cfg.INPUT.PIXEL_MEAN)} numbers, so the model reads as many channels; data sets"
            " give RGB images, so others reach it through its Python interface alone (docs/models.md)"
        )
    if not names:
        raise ConfigError("no data set is named: fill DATASETS.TRAIN and DATASETS.TEST with names of data/catalog.py")
    model, (_, count) = cfg.MODEL, num_classes(cfg)
    return open_datasets(names, cfg.DATA.PATH, training, model.MASK_ON, count, model.KEYPOINT_ON)


def open_datasets(
    names: Sequence[str],
    root: str = "",
    training: bool = False,
    masks: bool = True,
    num_classes: int | None = None,
    keypoints: bool = False,
) -> AnyDataset:
    """`build_dataset` without a configuration. root: what DATA.PATH is there; num_classes: of Python data sets that do
    not name their classes."""
    datasets, parts = [], []
    for name in names:
        name, part = _split_name(name)
        datasets.append(_open(name, root, training, masks, num_classes, keypoints))
        parts.append(range(len(datasets[-1]))[part])
        if not parts[-1]:
            raise DataError(f"no image of {name} is in the part asked for: it has {len(datasets[-1])}")
        check_same_categories(datasets[0], datasets[-1])
        check_same_keypoints(datasets[0], datasets[-1])
    if len(datasets) == 1 and len(parts[0]) == len(datasets[0]):
        return datasets[0]
    return JoinedDataset(datasets, parts)


def is_sendable(name: str) -> bool:
    """Whether the data set comes from files alone, and so can be read by one process for others. Python code, and a
    class of your own in the catalogue, may hold what cannot be sent."""
    name, _ = _split_name(name)
    return not is_python_name(name) and CATALOG.get(name, (CocoDataset,))[0] is CocoDataset


def read_source(name: str, root: str = "") -> Source:
    """What the files of a data set, or of the part that `name[10:20]` asks for, say; its content is there.

    Raises ConfigError, DataError.
    """
    source = find_source(name, root)
    return source if source.content is not None else replace(source, content=read_coco(str(source.file)))


def find_source(name: str, root: str = "") -> Source:
    """As `read_source`, but a whole COCO file is not read yet: `content` is None then.

    Raises ConfigError, DataError.
    """
    name, part = _split_name(name)
    if is_python_name(name):
        raise ConfigError(f"{name} is Python code: it has no annotation files to work on")
    source = formats.read(name, root) if formats.is_address(name) else Source(*_locate(name, root)[1:], None)
    if part == slice(None):
        return source
    content = source.content if source.content is not None else read_coco(str(source.file))
    return replace(source, content=part_of(content, content["images"][part]))


def num_classes(cfg: CfgNode) -> tuple[str, int]:
    """The key that says how many classes the model predicts, the background included, and what it says."""
    head = "RETINANET" if cfg.MODEL.RETINANET_ON else "ROI_BOX_HEAD"
    return f"MODEL.{head}.NUM_CLASSES", cfg.MODEL[head].NUM_CLASSES


def check_num_classes(cfg: CfgNode, dataset: AnyDataset) -> None:
    """Raises ConfigError when the model does not predict as many classes, or keypoints, as the data set has."""
    points = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES
    if cfg.MODEL.KEYPOINT_ON and points != len(dataset.skeleton):
        raise ConfigError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES is {points}, but objects of {dataset.annotation_file} have"
            f" {len(dataset.skeleton)} keypoints: set it to that"
        )
    if cfg.MODEL.RPN_ONLY and not cfg.MODEL.RETINANET_ON:
        return  # proposals have no class
    key, configured = num_classes(cfg)
    if configured != dataset.num_classes:
        raise ConfigError(
            f"{key} is {configured}, but {dataset.annotation_file} has"
            f" {len(dataset.category_ids)} categories and the background: set it to {dataset.num_classes}"
        )


def check_same_categories(first: AnyDataset, second: AnyDataset) -> None:
    """Raises DataError when labels would mean different categories in two data sets."""
    ours = dict(zip(first.category_ids, first.category_names))
    theirs = dict(zip(second.category_ids, second.category_names))
    differing = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    if differing:
        i = differing[0]
        raise DataError(
            f"{first.annotation_file} and {second.annotation_file} differ in {len(differing)} categories; the first is"
            f" id {i}: {ours.get(i, 'missing')!r} there, {theirs.get(i, 'missing')!r} here; where a file just lacks a"
            " class, formats that find their classes take all by ?classes=NAME,NAME,..."
        )


def check_same_keypoints(first: AnyDataset, second: AnyDataset) -> None:
    """Raises DataError when keypoints would mean different places in two data sets."""
    ours, theirs = (dataset.skeleton.names if dataset.skeleton else () for dataset in (first, second))
    if ours != theirs:
        raise DataError(
            f"{first.annotation_file} and {second.annotation_file} differ in their keypoints:"
            f" {', '.join(ours)} there, {', '.join(theirs)} here"
        )


class JoinedDataset:
    """Parts of data sets of the same categories one after the other; attributes as CocoDataset's."""

    def __init__(self, datasets: Sequence[CocoDataset | ItemDataset], parts: Sequence[range]) -> None:
        self.datasets = list(datasets)
        self._places = [(number, index) for number, part in enumerate(parts) for index in part]
        first = self.datasets[0]
        self.category_ids, self.category_names = first.category_ids, first.category_names
        self.num_classes, self.skeleton = first.num_classes, first.skeleton
        self.image_ids = [self.datasets[number].image_ids[index] for number, index in self._places]
        self.file_names = [self.datasets[number].file_names[index] for number, index in self._places]
        self.sizes = np.concatenate([d.sizes[list(part)] for d, part in zip(self.datasets, parts)])
        self.counts = np.concatenate([d.counts[list(part)] for d, part in zip(self.datasets, parts)])
        self.annotation_file = " + ".join(d.annotation_file for d in self.datasets)

    def __len__(self) -> int:
        return len(self._places)

    def load(self, index: int) -> Sample:
        number, within = self._places[index]
        return replace(self.datasets[number].load(within), image_index=index)

    def annotations(self, index: int) -> list[dict[str, Any]]:
        number, within = self._places[index]
        return self.datasets[number].annotations(within)

    def ground_truth(self) -> str | dict[str, Any]:
        """What to evaluate against; of a part of a COCO file the whole one."""
        first = self.datasets[0]
        return first.ground_truth() if len(self.datasets) == 1 and isinstance(first, CocoDataset) else content_of(self)


AnyDataset = CocoDataset | ItemDataset | JoinedDataset


def _split_name(name: str) -> tuple[str, slice]:
    """`coco_2017_train[:10]` -> ("coco_2017_train", slice(None, 10)), and of a name that stands for an address that."""
    found = re.fullmatch(r"(.+)\[(-?\d+)?:(-?\d+)?\]", name)
    if not found:
        return ADDRESSES.get(name, name), slice(None)
    bounds = (int(bound) if bound else None for bound in found.group(2, 3))
    return ADDRESSES.get(found[1], found[1]), slice(*bounds)


def _open(
    name: str, root: str, training: bool, masks: bool, num_classes: int | None, keypoints: bool
) -> CocoDataset | ItemDataset:
    if is_python_name(name):
        return ItemDataset(from_python(name, root), name, training, masks, num_classes, keypoints)
    if formats.is_address(name):
        source = formats.read(name, root)
        return CocoDataset(source.file, source.image_dir, training, masks, source.content, keypoints)
    dataset_class, annotation_file, image_dir = _locate(name, root)
    return dataset_class(annotation_file, image_dir, training=training, masks=masks, keypoints=keypoints)


def _locate(name: str, root: str) -> tuple[type, Path, Path]:
    """Class, annotation file and image directory of a name of the catalogue."""
    if name not in CATALOG:
        near = difflib.get_close_matches(name, [*CATALOG, *ADDRESSES], n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        known = ", ".join(sorted([*CATALOG, *ADDRESSES]))
        raise ConfigError(
            f"unknown data set {name!r}{hint} Known are {known}, and what is written FORMAT://PATH"
            f" ({', '.join(formats.FORMATS)}) or module:Class"
        )
    dataset_class, image_dir, annotation_file = CATALOG[name]
    layout = f"DIR/{annotation_file} and DIR/{image_dir}/"
    expected = f"data set {name} is expected as {layout}: set DATA.PATH or --data_path to DIR"
    paths = [Path(root).expanduser() / annotation_file, Path(root).expanduser() / image_dir]
    if not root and not all(Path(path).is_absolute() for path in (annotation_file, image_dir)):
        raise DataError(f"DATA.PATH is empty; {expected}")
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist; {expected}")
    return dataset_class, *paths
