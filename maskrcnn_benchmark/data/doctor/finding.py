"""What a check finds, and in what it finds it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from yacs.config import CfgNode

from ..transforms import ResizeShortSide, build_transforms
from .survey import UNKNOWN_SIDE, Survey

# From worst to harmless: training stops; goes on, but learns or measures something wrong; is as good as before
STOPS, HURTS, NOTE = SEVERITIES = ("stops", "hurts", "note")
# Offenders that a finding names
MOST_OFFENDERS = 10


@dataclass(frozen=True)
class Offender:
    """One entry that a finding speaks of. Ids are None where there is none; detail: what is wrong with this one.

    For pictures: dataset, the name of its survey; index and row, of image and annotation there; box: xyxy pixels.
    """

    image_id: int | None = None
    annotation_id: int | None = None
    file: str = ""
    detail: str = ""
    dataset: str = ""
    index: int | None = None
    row: int | None = None
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Finding:
    """check: its name for scripts; dataset: whose; severity: of SEVERITIES; count: how many; what: the sentence that
    says of what; training: what training does about it; advice: what to do; fixable: whether a repaired copy is free of
    it; offenders: the first ones."""

    check: str
    dataset: str
    severity: str
    count: int
    what: str
    training: str
    advice: str = ""
    fixable: bool = False
    offenders: tuple[Offender, ...] = ()

    def as_json(self) -> dict[str, Any]:
        named = ("image_id", "annotation_id", "file", "detail")
        offenders = [{key: getattr(offender, key) for key in named} for offender in self.offenders]
        return {key: value for key, value in vars(self).items() if key != "offenders"} | {"offenders": offenders}


@dataclass(frozen=True)
class Setting:
    """What the data are checked for. configured: `cfg` is that of a run, not just the defaults."""

    cfg: CfgNode
    configured: bool = False

    @cached_property
    def resize(self) -> ResizeShortSide | None:
        """The training pipeline's; None where there is none of a short side."""
        transforms = build_transforms(self.cfg, training=True).transforms
        return next((transform for transform in transforms if isinstance(transform, ResizeShortSide)), None)

    def scales(self, sizes: np.ndarray) -> np.ndarray:
        """[N] by how much training enlarges images of `sizes` [N, 2], at the median of its short sides."""
        if self.resize is None:
            return np.ones(len(sizes))
        short = float(np.median(self.resize.sizes))
        scales = np.minimum(short / sizes.min(axis=1), self.resize.max_size / sizes.max(axis=1))
        return np.where(sizes.max(axis=1) == UNKNOWN_SIDE, 1.0, scales)


def of_rows(survey: Survey, rows: Iterable[int], detail=lambda row: "") -> tuple[Offender, ...]:
    """The first of these annotations. detail: row -> what is wrong with it."""
    return tuple(_of_row(survey, int(row), detail(row)) for row in islice(rows, MOST_OFFENDERS))


def _of_row(survey: Survey, row: int, detail: str) -> Offender:
    index = int(survey.image_of[row])
    box = _box_of(survey, row)
    ids = int(survey.entries.packer.images[row]), int(survey.ids[row])
    if index < 0:
        return Offender(*ids, "", detail)
    return Offender(*ids, survey.entries.images[index]["file_name"], detail, survey.name, index, row, box)


def _box_of(survey: Survey, row: int) -> tuple[float, float, float, float] | None:
    """xyxy, of an unusable one too; None where there is none to draw."""
    box = survey.boxes[row].tolist()
    if row in survey.entries.unusable_boxes:
        try:
            x, y, w, h = map(float, survey.entries.unusable_boxes[row])
        except (TypeError, ValueError):
            return None
        box = [min(x, x + w), min(y, y + h), max(x, x + w), max(y, y + h)]
    return tuple(box) if np.isfinite(box).all() else None


def of_images(survey: Survey, indices: Iterable[int], detail=lambda index: "") -> tuple[Offender, ...]:
    """The first of these images. detail: index -> what is wrong with it."""
    images = survey.entries.images
    return tuple(
        Offender(images[i]["id"], None, images[i]["file_name"], detail(i), survey.name, int(i))
        for i in islice(indices, MOST_OFFENDERS)
    )
