"""Checks of the image files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from .finding import HURTS, NOTE, STOPS, Finding, Setting, of_images
from .survey import Survey


def unreadable(survey: Survey, setting: Setting) -> Iterator[Finding]:
    indices = [i for i, facts in enumerate(survey.facts or ()) if facts.problem and not survey.missing[i]]
    if indices:
        yield Finding(
            "image_unreadable",
            survey.name,
            STOPS,
            len(indices),
            "image files that are damaged, truncated or no images",
            "stops at the first batch that holds one",
            "replace them; a repaired copy leaves these images out",
            True,
            of_images(survey, indices, lambda i: survey.facts[i].problem),
        )


def wrong_size(survey: Survey, setting: Setting) -> Iterator[Finding]:
    def differs(i: int) -> bool:
        facts = survey.facts[i]
        return not facts.problem and survey.stated[i].all() and _agrees(survey, i) == ""

    def words(i: int) -> str:
        (height, width), (h, w) = survey.stated[i], survey.facts[i].upright
        return f"stated {height} x {width}, the file has {h} x {w} (height x width)"

    indices = [i for i in range(len(survey.facts or ())) if differs(i)]
    if indices:
        yield Finding(
            "size_wrong",
            survey.name,
            STOPS,
            len(indices),
            "images of another size than is stated, upright or as stored",
            "stops at the first batch that holds one",
            "look whether file and annotations belong together; a repaired copy states the file's size",
            True,
            of_images(survey, indices, words),
        )


def exif(survey: Survey, setting: Setting) -> Iterator[Finding]:
    """Three findings: the stated size says that pixels count as stored, or turned, or it fits both."""
    found = defaultdict(list)
    for i, facts in enumerate(survey.facts or ()):
        if facts.orientation != 1:
            found[_agrees(survey, i)].append(i)
    words = {
        "stored": (NOTE, "as stored, as the stated size is that of the pixels as stored", ""),
        "upright": (NOTE, "turned upright, as the stated size is that of the upright image", ""),
        "both": (
            HURTS,
            "as stored, as the stated size fits both; if they were annotated upright, boxes and masks lie elsewhere",
            "look at the pictures; write the files anew without EXIF orientation where they lie elsewhere",
        ),
    }
    for fits, (severity, training, advice) in words.items():
        if found[fits]:
            offenders = of_images(survey, found[fits], lambda i: f"orientation {survey.facts[i].orientation}")
            what = "images with an EXIF orientation"
            training = f"takes their pixels {training}"
            yield Finding(
                f"exif_{fits}", survey.name, severity, len(found[fits]), what, training, advice, False, offenders
            )


def _agrees(survey: Survey, index: int) -> str:
    """Which form of the file has the stated size: stored, upright, both, or "" for none."""
    facts, stated = survey.facts[index], tuple(survey.stated[index])
    fits = [name for name in ("stored", "upright") if getattr(facts, name) == stated]
    return "both" if len(fits) == 2 else "".join(fits)


def other_characters(survey: Survey, setting: Setting) -> Iterator[Finding]:
    indices = [i for i, image in enumerate(survey.entries.images) if not image["file_name"].isascii()]
    if indices:
        what, training = "file names with characters beyond ASCII", "reads them like any other; some other tools do not"
        yield Finding(
            "file_name", survey.name, NOTE, len(indices), what, training, offenders=of_images(survey, indices)
        )


def same_file_twice(survey: Survey, setting: Setting) -> Iterator[Finding]:
    first: dict[bytes, int] = {}
    repeated: dict[int, int] = {}
    for i, facts in enumerate(survey.facts or ()):
        if facts.digest and first.setdefault(facts.digest, i) != i:
            repeated[i] = first[facts.digest]
    if repeated:
        images = survey.entries.images
        what, training = "images whose file has the content of another one", "sees them as often in an epoch"
        offenders = of_images(survey, repeated, lambda i: f"as image id {images[repeated[i]]['id']}")
        yield Finding(
            "image_repeated", survey.name, NOTE, len(repeated), what, training, "remove all but one", False, offenders
        )


def long_images(survey: Survey, setting: Setting) -> Iterator[Finding]:
    resize = setting.resize
    if resize is None or not len(survey.stated):
        return
    short = min(resize.sizes)
    sizes = survey.stated[survey.stated.all(axis=1)]
    indices = np.flatnonzero(survey.stated.all(axis=1))
    sides = short * sizes.max(axis=1, initial=1) / sizes.min(axis=1, initial=1 << 30).clip(1)
    # Half as large as it should be: 16:9 under 800 and 1333 is at 94 %, and nobody's concern
    indices = indices[sides > 2 * resize.max_size]
    if len(indices):
        yield Finding(
            "image_long",
            survey.name,
            NOTE,
            len(indices),
            "images so long that the limit of the long side halves their short side, or worse",
            f"shrinks them to a long side of {resize.max_size:g}, whatever their objects are left with",
            "cut them into pieces, or raise INPUT.MAX_SIZE_TRAIN",
            False,
            of_images(survey, indices, lambda i: f"{survey.stated[i][0]} x {survey.stated[i][1]} (height x width)"),
        )


CHECKS = (unreadable, wrong_size, exif, other_characters, same_file_twice, long_images)
