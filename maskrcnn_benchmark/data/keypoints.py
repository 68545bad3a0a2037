"""What the keypoints of a data set are, and which of them change places in a mirror."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError

logger = logging.getLogger(__name__)

_SIDE = re.compile("left|right", re.IGNORECASE)


@dataclass(frozen=True)
class Skeleton:
    """names: of the K keypoints, in the order in which objects have them. limbs: pairs of places 0..K-1 that a drawing
    joins."""

    names: tuple[str, ...]
    limbs: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def mirror(self) -> tuple[int, ...]:
        """[K] the place of the keypoint that each one becomes in a mirror: left_eye and right_eye change places by
        their names, a nose stays what it is."""
        place = {name: number for number, name in enumerate(self.names)}
        return tuple(place.get(_other_side(name), number) for number, name in enumerate(self.names))


# The 17 of a person, as COCO numbers them
PERSON = Skeleton(
    (
        *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder"),
        *("left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip"),
        *("left_knee", "right_knee", "left_ankle", "right_ankle"),
    )
)


def of_categories(categories: Sequence[dict[str, Any]], file: str) -> Skeleton:
    """What the `keypoints` and `skeleton` of COCO's categories say; objects of categories without them have none.

    Raises DataError: no category has any, or two have different ones, or they are no names, or limbs lead nowhere.
    """
    having = [category for category in categories if category.get("keypoints")]
    if not having:
        raise DataError(
            f"{file}: none of its categories has `keypoints`, a list of their names: set MODEL.KEYPOINT_ON False, or"
            " train on a file such as COCO's person_keypoints_train2017.json"
        )
    for category in having:
        if category["keypoints"] != having[0]["keypoints"]:
            raise DataError(
                f"{file}: the categories {having[0]['name']} and {category['name']} have different keypoints; all that"
                " have any must have the same"
            )
    where = f"{file}: category {having[0]['name']}"
    skeleton = named(having[0]["keypoints"], where)
    limbs = having[0].get("skeleton") or []
    if not isinstance(limbs, list):
        raise DataError(f"{where}: skeleton must be a list, not {limbs!r}")
    for limb in limbs:
        if not isinstance(limb, list) or len(limb) != 2 or not all(end in range(1, len(skeleton) + 1) for end in limb):
            raise DataError(f"{where}: skeleton has {limb!r}, but must have pairs of keypoints 1..{len(skeleton)}")
    return Skeleton(skeleton.names, tuple((start - 1, end - 1) for start, end in limbs))


def named(names: Any, where: str) -> Skeleton:
    """Keypoints of these names. Warns of a left without a right. Raises DataError: no list of different texts."""
    texts = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if not texts or len(set(names)) < len(names):
        raise DataError(f"{where}: keypoints must be a list of different names, not {names!r}")
    if alone := [name for name in names if _SIDE.search(name) and _other_side(name) not in names]:
        logger.warning("%s: keypoint %s has no other side: a mirror leaves it what it is", where, ", ".join(alone))
    return Skeleton(tuple(names))


def _other_side(name: str) -> str:
    """left_eye -> right_eye, R_Left -> R_Right; a name without a side stays."""
    return _SIDE.sub(lambda found: _like(found[0], "right" if found[0].lower() == "left" else "left"), name)


def _like(model: str, word: str) -> str:
    """`word` in the letter case of `model`."""
    return word.upper() if model.isupper() else word.capitalize() if model[0].isupper() else word
