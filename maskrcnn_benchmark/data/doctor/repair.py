"""A repaired copy of a data set's annotations, as a COCO file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from pycocotools import mask as coco_mask

from ...errors import DataError
from ...ops.rle import sound_rle
from ..coco import LISTS, drawable, elements_of
from ..json_stream import read_elements
from .survey import Survey, beside_mask, repeated_objects


def write_repaired(survey: Survey, output: str | Path) -> dict[str, int]:
    """Writes the annotations without what training cannot use, and with what it would have to make up; every other key
    stays. Returns how many entries of each list are in the copy. It is there whole or not at all.

    Images that cannot be read are left out with their objects, sizes become those of the files, annotations get the
    box, area, iscrowd and id that they lack.
    Raises DataError: nothing is left, an id stands for two things, or the file cannot be written.
    """
    output = Path(output)
    for key, _, entry_id, same in survey.entries.repeated:
        if not same:
            raise DataError(
                f"{survey.annotation_file}: {entry_id} is the id of two different {key}: no repair can tell whose"
                " annotations are whose"
            )
    plan = _Plan(survey)
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "w", encoding="utf-8") as file:
            counts = _write(file, plan.repaired())
        if empty := [key for key in LISTS[::2] if not counts[key]]:
            raise DataError(
                f"{survey.annotation_file}: a repaired copy would have no {empty[0]}; {output} is not written"
            )
        os.replace(part, output)
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    return counts


class _Plan:
    """What is done to each entry, by its place in its list."""

    def __init__(self, survey: Survey) -> None:
        entries = survey.entries
        self.survey = survey
        readable = ~survey.missing
        if survey.facts is None:
            readable &= survey.stated.all(axis=1)
        else:
            readable &= np.array([not facts.problem for facts in survey.facts], bool)
        self.image_at = {place: i for i, place in enumerate(entries.image_places) if readable[i]}
        self.bad_categories = {
            place for key, place, *_ in (*entries.malformed, *entries.repeated) if key == "categories"
        }
        kept = survey.usable & (readable[survey.image_of] if len(readable) else False)
        rows, around = beside_mask(survey)
        lost = (around[:, 2:] <= around[:, :2]).any(axis=1)
        kept[rows[lost]] = False  # what can be seen is in the box, and drawn elsewhere
        self.boxes = survey.clipped.copy()
        self.boxes[rows] = around
        kept[repeated_objects(survey, kept, self.boxes)] = False
        self.row_at = {entries.annotation_places[row]: row for row in np.flatnonzero(kept).tolist()}
        self.new_ids = _new_ids(survey.ids, kept)

    def repaired(self) -> Iterator[tuple[str, int | None, Any]]:
        """(key, place, value) as read_elements gives them, without what is dropped."""
        source = self.survey.source
        elements = read_elements(source.file) if source.content is None else elements_of(source.content)
        for key, place, value in elements:
            if place is None:
                yield key, place, value
            elif key == "images":
                if place in self.image_at:
                    yield key, place, self._image(value, self.image_at[place])
            elif key == "annotations":
                if place in self.row_at:
                    yield key, place, self._annotation(value, self.row_at[place])
            elif key != "categories" or place not in self.bad_categories:
                yield key, place, value

    def _image(self, image: dict, index: int) -> dict:
        height, width = self.survey.sizes[index].tolist()
        return image | {"height": height, "width": width}

    def _annotation(self, annotation: dict, row: int) -> dict:
        survey = self.survey
        height, width = survey.sizes[survey.image_of[row]].tolist()
        segmentation = _segmentation(annotation.get("segmentation") or [])
        box = annotation.get("bbox")
        if box is None or (self.boxes[row] != survey.boxes[row]).any():
            x1, y1, x2, y2 = self.boxes[row].tolist()
            box = [x1, y1, x2 - x1, y2 - y1]
        repaired = annotation | {"id": self.new_ids.get(row, annotation["id"]), "bbox": box}
        repaired["iscrowd"] = int(bool(annotation.get("iscrowd", 0)))
        if "segmentation" in annotation:
            repaired["segmentation"] = segmentation
        if math.isnan(survey.areas[row]):
            repaired["area"] = _area(segmentation, height, width) or box[2] * box[3]
        return repaired


def _new_ids(ids: np.ndarray, kept: np.ndarray) -> dict[int, int]:
    """Row -> another id, of rows with the id 0 or one that an earlier row has."""
    rows = np.flatnonzero(kept)
    _, first = np.unique(ids[rows], return_index=True)
    first = first[ids[rows[first]] != 0]
    replaced = np.delete(rows, first)
    free = int(ids.max(initial=0)) + 1
    return dict(zip(replaced.tolist(), range(free, free + len(replaced))))


def _segmentation(segmentation: Any) -> Any:
    """An RLE as it is; of polygons those that are some."""
    if isinstance(segmentation, dict):
        return segmentation
    if segmentation and isinstance(segmentation[0], (int, float)):
        segmentation = [segmentation]
    return [polygon for polygon in segmentation if drawable(polygon)]


def _area(segmentation: Any, height: int, width: int) -> float:
    """Pixels of a mask, as evaluation counts them; 0 where there is none."""
    if isinstance(segmentation, dict):
        sound = sound_rle(segmentation, height, width)
        return float(sound[1]) if sound else 0.0
    if not segmentation:
        return 0.0
    return float(coco_mask.area(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))))


def _write(file: TextIO, elements: Iterator[tuple[str, int | None, Any]]) -> dict[str, int]:
    """A JSON object of the elements, written one by one. Returns how many each list has."""
    counts: dict[str, int] = dict.fromkeys(LISTS, 0)
    named: list[str] = []
    end = "{"
    for key, place, value in elements:
        if named and key == named[-1]:
            file.write(", ")
        else:
            file.write(f"{end}{', ' if named else ''}{json.dumps(key)}: {'' if place is None else '['}")
            end = "" if place is None else "]"
            named.append(key)
        file.write(json.dumps(value))
        if place is not None and key in counts:
            counts[key] += 1
    file.write(end)
    for key in LISTS:
        if key not in named:  # nothing of it is left
            file.write(f", {json.dumps(key)}: []")
    file.write("}\n")
    return counts
