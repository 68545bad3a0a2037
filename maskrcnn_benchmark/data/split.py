"""A data set in parts: each class in each part, as far as there are images enough."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .content import Source, part_of
from .directory import new_directory


def split_images(content: dict[str, Any], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """The images of COCO content in two parts, the second of about `share` of them.

    Images are grouped by the rarest class that they show, groups and the images of a group come in random order, and
    the second part is drawn evenly from that sequence: so classes are shared out as the images are. The same seed
    gives the same parts.
    Raises DataError when a part would be empty.
    """
    images = content["images"]
    shown: dict[int, set[int]] = {image["id"]: set() for image in images}
    for annotation in content["annotations"]:
        shown[annotation["image_id"]].add(annotation["category_id"])
    frequency = Counter(category for categories in shown.values() for category in categories)
    rng = np.random.default_rng(seed)
    place_of_group = dict(zip([None, *sorted(frequency)], rng.permutation(len(frequency) + 1).tolist()))
    group = [place_of_group[min(shown[image["id"]], key=lambda c: (frequency[c], c), default=None)] for image in images]
    order = sorted(rng.permutation(len(images)).tolist(), key=lambda i: group[i])
    taken = np.floor(np.arange(1, len(images) + 1) * share + 0.5) > np.floor(np.arange(len(images)) * share + 0.5)
    second = {order[place] for place in np.flatnonzero(taken)}
    parts = [image for i, image in enumerate(images) if i not in second], [images[i] for i in sorted(second)]
    if not all(parts):
        raise DataError(f"{len(images)} images with a share of {share}: a part would be empty")
    return parts


def write_split(source: Source, output: str | Path, share: float, seed: int, link: bool = False) -> tuple[int, int]:
    """Writes a COCO directory as COCO 2017's: annotations/instances_{train,val}2017.json, train2017/, val2017/.

    Images are copied, or with `link` hard-linked, which takes no space but needs the same file system. Returns how
    many images train and val have. The directory appears whole or not at all.
    Raises DataError: the directory is not empty, a part would be empty, files cannot be written.
    """
    output = Path(output)
    parts = split_images(source.content, share, seed)
    with new_directory(output) as unfinished:
        for name, images in zip(("train2017", "val2017"), parts):
            _write_part(unfinished, name, source, images, link)
    return len(parts[0]), len(parts[1])


def _write_part(root: Path, name: str, source: Source, images: list[dict], link: bool) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    write_content(part_of(source.content, images), root / "annotations" / f"instances_{name}.json")
    for image in images:
        file, target = source.image_dir / image["file_name"], root / name / image["file_name"]
        if ".." in target.parts or Path(image["file_name"]).is_absolute():
            raise DataError(f"{source.file}: image {image['file_name']} lies outside {source.image_dir}")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, target) if link else shutil.copyfile(file, target)


def write_content(content: dict[str, Any], file: str | Path) -> None:
    """COCO content as a file; it is there whole or not at all."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_text(json.dumps(content), encoding="utf-8")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
