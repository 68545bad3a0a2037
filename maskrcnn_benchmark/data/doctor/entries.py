"""Checks of the lists themselves: entries that are none, ids that lead nowhere, classes that do not fit the model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .finding import HURTS, MOST_OFFENDERS, NOTE, STOPS, Finding, Offender, Setting, of_images, of_rows
from .survey import Survey

_STOPS_AT_START = "stops when it reads the file, before the first step"


def empty_lists(survey: Survey, setting: Setting) -> Iterator[Finding]:
    for key, count in (("images", len(survey.entries.images)), ("categories", len(survey.category_ids))):
        if not count:
            what = f"list of {key} without a usable entry"
            yield Finding(f"no_{key}", survey.name, STOPS, 1, what, _STOPS_AT_START, f"fill its list of {key}")


def malformed_entries(survey: Survey, setting: Setting) -> Iterator[Finding]:
    entries = survey.entries.malformed
    if not entries:
        return
    images, annotations = {"images"}, {"annotations"}
    offenders = [
        Offender(
            entry_id if key in images else None,
            entry_id if key in annotations else None,
            detail=message,
        )
        for key, _, entry_id, message in entries[:MOST_OFFENDERS]
    ]
    what = "entries that are not of COCO's form"
    advice = "correct them; a repaired copy leaves them out"
    yield Finding("malformed", survey.name, STOPS, len(entries), what, _STOPS_AT_START, advice, True, tuple(offenders))


def repeated_ids(survey: Survey, setting: Setting) -> Iterator[Finding]:
    for key, kind in (("images", "image"), ("categories", "category")):
        found = [(entry_id, same) for name, _, entry_id, same in survey.entries.repeated if name == key]
        for same, what in ((True, "the same entry again"), (False, "another entry")):
            ids = [entry_id for entry_id, alike in found if alike == same]
            offenders = tuple(
                Offender(i if kind == "image" else None, detail=f"{kind} id {i}") for i in ids[:MOST_OFFENDERS]
            )
            advice = "a repaired copy keeps the first" if same else f"give each {kind} an id of its own"
            if ids:
                name = f"{kind}_id_repeated" if same else f"{kind}_id_ambiguous"
                words = f"{kind} ids given twice, for {what}"
                yield Finding(name, survey.name, STOPS, len(ids), words, _STOPS_AT_START, advice, same, offenders)


def lost_references(survey: Survey, setting: Setting) -> Iterator[Finding]:
    packer = survey.entries.packer
    for kind, where, wanted in (
        ("image", survey.image_of, packer.images),
        ("category", survey.label_of, packer.categories),
    ):
        rows = np.flatnonzero(where < 0)
        if len(rows):
            yield Finding(
                f"{kind}_unknown",
                survey.name,
                STOPS,
                len(rows),
                f"annotations of {kind} ids that are not listed",
                _STOPS_AT_START,
                "list the missing ones; a repaired copy leaves these annotations out",
                True,
                of_rows(survey, rows, lambda row, wanted=wanted, kind=kind: f"{kind} id {wanted[row]}"),
            )


def image_files_missing(survey: Survey, setting: Setting) -> Iterator[Finding]:
    indices = np.flatnonzero(survey.missing)
    if len(indices):
        advice = f"put them into {survey.source.image_dir}; a repaired copy leaves these images out"
        offenders = of_images(survey, indices)
        what = "image files that are not there"
        yield Finding("image_missing", survey.name, STOPS, len(indices), what, _STOPS_AT_START, advice, True, offenders)


def sizes_unstated(survey: Survey, setting: Setting) -> Iterator[Finding]:
    indices = np.flatnonzero(~survey.stated.all(axis=1))
    if len(indices):
        what = "images without a height and width in whole numbers"
        advice = "a repaired copy has the file's size"
        yield Finding(
            "size_unstated",
            survey.name,
            STOPS,
            len(indices),
            what,
            _STOPS_AT_START,
            advice,
            survey.facts is not None,
            of_images(survey, indices),
        )


def nothing_to_train_on(survey: Survey, setting: Setting) -> Iterator[Finding]:
    if not len(survey.objects):
        what = f"data set without a usable object, of {survey.entries.annotations} annotations"
        advice = "see the findings on its annotations"
        yield Finding("no_objects", survey.name, STOPS, 1, what, "stops; a data set for evaluation may be so", advice)


def number_of_classes(survey: Survey, setting: Setting) -> Iterator[Finding]:
    configured, needed = setting.cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES, len(survey.category_ids) + 1
    if setting.configured and configured != needed:
        what = f"number of classes that does not fit: MODEL.ROI_BOX_HEAD.NUM_CLASSES is {configured}"
        advice = f"set it to {needed}, the categories and the background"
        yield Finding("num_classes", survey.name, STOPS, 1, what, _STOPS_AT_START, advice)


def category_ids(survey: Survey, setting: Setting) -> Iterator[Finding]:
    ids = survey.category_ids
    if ids and ids != list(range(1, len(ids) + 1)):
        what = f"categories whose ids are not 1..{len(ids)} ({', '.join(map(str, ids[:5]))}{', ...' * (len(ids) > 5)})"
        training = "numbers them 1.. by rising id itself; results have the file's ids again"
        yield Finding("category_ids", survey.name, NOTE, len(ids), what, training)


def category_names(survey: Survey, setting: Setting) -> Iterator[Finding]:
    names = survey.category_names
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        what = f"names that several categories have ({', '.join(repeated[:5])})"
        training = "takes them for different classes, and so asks the model to tell apart what has one name"
        advice = "join them, or name them apart"
        yield Finding("category_name_repeated", survey.name, HURTS, len(repeated), what, training, advice)


def annotation_ids(survey: Survey, setting: Setting) -> Iterator[Finding]:
    rows = np.flatnonzero(survey.ids == 0)
    if len(rows):
        what = "annotations with the id 0"
        training = "does not look at ids, and evaluation numbers anew; pycocotools by itself loses matches with id 0"
        advice = "a repaired copy has another id"
        yield Finding(
            "annotation_id_zero", survey.name, NOTE, len(rows), what, training, advice, True, of_rows(survey, rows)
        )


CHECKS = (
    empty_lists,
    malformed_entries,
    repeated_ids,
    lost_references,
    image_files_missing,
    sizes_unstated,
    nothing_to_train_on,
    number_of_classes,
    category_ids,
    category_names,
    annotation_ids,
)
