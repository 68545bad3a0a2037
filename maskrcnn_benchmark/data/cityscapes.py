"""Cityscapes gtFine: instanceIds images, or polygons where those are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..errors import DataError
from .content import Builder, Source, listed, read_json, split_instances
from .images import image_size
from .masks import read_map

# The classes that have instances, with Cityscapes' own ids
CATEGORIES = {
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
# Its id is negative: Cityscapes' scripts do not draw it, so that the car behind stays whole.
_UNDRAWN = "license plate"
# A pixel of instance n of class c is c * 1000 + n; of a group whose members were not told apart c alone.
_PER_CLASS = 1000
_NONE = 0


def read(path: Path, split: str = "train", labels: str = "") -> Source:
    """A directory with leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/SPLIT/CITY/*_gtFine_*.

    labels: instanceIds or polygons; by default instanceIds where an image has them. Both give the same masks: the
    polygons are drawn in their order, as Cityscapes' scripts do. Groups are crowds.
    Raises DataError: files missing or damaged.
    """
    kinds = {"instanceIds": ".png", "polygons": ".json"}
    if labels and labels not in kinds:
        raise DataError(f"labels={labels} must be one of {', '.join(kinds)}")
    image_dir, truth_dir = path / "leftImg8bit" / split, path / "gtFine" / split
    builder = Builder(truth_dir, image_dir, CATEGORIES)
    for image in listed(image_dir, "*/*_leftImg8bit.png"):
        stem = truth_dir / image.parent.name / image.name.removesuffix("_leftImg8bit.png")
        files = [Path(f"{stem}_gtFine_{kind}{kinds[kind]}") for kind in ([labels] if labels else kinds)]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise DataError(f"{files[0]} does not exist, but its image does")
        instance_map = read_map(file) if file.suffix == ".png" else draw(read_json(file), file, image_size(image))
        image_id = builder.add_image(f"{image.parent.name}/{image.name}", instance_map.shape)
        names = {number: name for name, number in CATEGORIES.items()}
        for value, mask in split_instances(instance_map, (_NONE,)).items():
            crowd = value < _PER_CLASS
            if name := names.get(value if crowd else value // _PER_CLASS):
                builder.add_mask(image_id, name, mask, iscrowd=int(crowd))
    return builder.finish()


def draw(content: dict[str, Any], file: Path, size: tuple[int, int]) -> np.ndarray:
    """The instance map [H, W] of a polygons file; what is no instance is 0. A later polygon hides an earlier one, also
    when it is none of the classes with instances.

    size: (height, width) of the image, which the file must state too: a canvas of any size could not be held.
    """
    counts = dict.fromkeys(CATEGORIES, 0)
    try:
        stated = (content["imgHeight"], content["imgWidth"])
        if stated != size:
            raise DataError(f"{file} says that its image is {stated} (height, width), but it is {size}")
        canvas = Image.new("I", size[::-1], _NONE)
        pen = ImageDraw.Draw(canvas)
        for entry in content["objects"]:
            if entry.get("deleted") or entry["label"] == _UNDRAWN:
                continue
            name = entry["label"]
            value = _NONE
            if name in CATEGORIES:
                value = CATEGORIES[name] * _PER_CLASS + counts[name]
                counts[name] += 1
            elif name.removesuffix("group") in CATEGORIES:
                value = CATEGORIES[name.removesuffix("group")]
            pen.polygon([tuple(point) for point in entry["polygon"]], fill=value)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{file} is not a Cityscapes polygons file: {type(error).__name__} {error}") from error
    return np.array(canvas)
