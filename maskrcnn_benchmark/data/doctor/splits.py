"""Checks of two data sets against each other: one to train on, one to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...errors import DataError
from ..catalog import check_same_categories
from .finding import HURTS, NOTE, STOPS, Finding, Setting, of_images
from .images import ImageFacts
from .survey import Survey

# Two pictures are the same when their thumbnails correlate at least so much and differ by no more gray levels (of 255,
# in the mean) than this, and their proportions by no more than that. Of coco_mini's 6,320 pairs the most alike are at
# .80; its photos at half the size and JPEG quality 30 at .998 or more
LEAST_CORRELATION, MOST_DIFFERENCE, MOST_STRETCH = 0.985, 6.0, 1.03
# Thumbnails with less contrast (standard deviation in gray levels) show nothing to compare
LEAST_CONTRAST = 2.0
_AT_A_TIME = 256


def categories(first: Survey, second: Survey, setting: Setting) -> Iterator[Finding]:
    try:
        check_same_categories(first, second)
    except DataError as error:
        what = f"difference of categories: {error}"
        training = "stops when it opens them, whether both are trained on or one is evaluated"
        advice = "give both the same list of categories"
        yield Finding("categories_differ", _both(first, second), STOPS, 1, what, training, advice)


def classes_unseen(first: Survey, second: Survey, setting: Setting) -> Iterator[Finding]:
    if first.category_ids != second.category_ids:
        return
    unseen = np.flatnonzero((first.classes() == 0) & (second.classes() > 0))
    if len(unseen):
        names = ", ".join(first.category_names[c] for c in unseen[:5]) + (", ..." if len(unseen) > 5 else "")
        what = f"classes that only {second.name} has objects of ({names})"
        training = f"on {first.name} never sees them: their AP there will be 0, and lowers the mean"
        advice = "move some images, or take dataset.py split, which shares out rare classes"
        yield Finding("class_unseen", _both(first, second), NOTE, len(unseen), what, training, advice)


def same_images(first: Survey, second: Survey, setting: Setting) -> Iterator[Finding]:
    """Files of the same content, and pictures that look the same."""
    if first.facts is None or second.facts is None:
        return
    twins = {j: (i, "the same file content") for i, j in same_content(first.facts, second.facts)}
    for i, j in look_alike(first.facts, second.facts):
        twins.setdefault(j, (i, "nearly the same picture"))
    if twins:
        names = [image["file_name"] for image in first.entries.images]
        ids = [image["id"] for image in first.entries.images]

        def words(j: int) -> str:
            i, kind = twins[j]
            return f"{kind} as image id {ids[i]} ({names[i]}) of {first.name}"

        indices = sorted(twins)
        yield Finding(
            "duplicate_between_splits",
            _both(first, second),
            HURTS,
            len(twins),
            f"images of {second.name} that {first.name} has too",
            "learns by heart what it is evaluated on, if one is for that: the scores come out too high",
            "remove them from one of the two",
            False,
            of_images(second, indices, words),
        )


def same_content(first: list[ImageFacts], second: list[ImageFacts]) -> list[tuple[int, int]]:
    """(index in first, index in second) of files with the same content."""
    known = {facts.digest: i for i, facts in reversed(list(enumerate(first))) if facts.digest}
    return [(known[facts.digest], j) for j, facts in enumerate(second) if facts.digest in known]


def look_alike(first: list[ImageFacts], second: list[ImageFacts]) -> Iterator[tuple[int, int]]:
    """(index in first, index in second) of pictures that show the same, one pair at most for each of the second."""
    (one, pixels, shapes), (other, other_pixels, other_shapes) = _thumbnails(first), _thumbnails(second)
    unit, other_unit = _normalized(pixels), _normalized(other_pixels)
    for start in range(0, len(other), _AT_A_TIME if len(one) else 1):
        part = slice(start, start + _AT_A_TIME)
        if not len(one):
            return
        for row, column in zip(*np.nonzero(other_unit[part] @ unit.T >= LEAST_CORRELATION)):
            j = start + row
            stretch = shapes[column] / other_shapes[j]
            near = np.abs(pixels[column] - other_pixels[j]).mean() <= MOST_DIFFERENCE
            if near and 1 / MOST_STRETCH <= stretch <= MOST_STRETCH:
                yield int(one[column]), int(other[j])


def _thumbnails(facts: list[ImageFacts]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices [n] of the images to compare, their thumbnails [n, T] float32 and proportions [n]."""
    readable = [i for i, fact in enumerate(facts) if fact.thumbnail]
    content = b"".join(facts[i].thumbnail for i in readable)
    pixels = np.frombuffer(content, np.uint8).reshape(len(readable), -1 if readable else 1).astype(np.float32)
    shapes = np.array([facts[i].upright[0] / facts[i].upright[1] for i in readable])
    kept = pixels.std(axis=1) >= LEAST_CONTRAST
    return np.array(readable, np.int64)[kept], pixels[kept], shapes[kept]


def _normalized(pixels: np.ndarray) -> np.ndarray:
    """Rows of mean 0 and length 1: their products are correlations."""
    centred = pixels - pixels.mean(axis=1, keepdims=True)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)


def _both(first: Survey, second: Survey) -> str:
    return f"{first.name} and {second.name}"


CHECKS = (categories, classes_unseen, same_images)
