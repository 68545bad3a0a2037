"""The data set doctor: defects planted in real files, found by id; and training does what it says training will do."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import pty
import re
import shutil
import struct
import sys
import termios
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.data import catalog, doctor
from maskrcnn_benchmark.data.coco import PROBLEMS, CocoDataset
from maskrcnn_benchmark.data.doctor import objects, splits
from maskrcnn_benchmark.data.doctor.balance import best_overlaps
from maskrcnn_benchmark.data.doctor.images import examine
from maskrcnn_benchmark.data.doctor.repair import write_repaired
from maskrcnn_benchmark.data.loader import train_loader
from maskrcnn_benchmark.data.transforms import Compose
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.errors import DataError, UserError
from maskrcnn_benchmark.evaluation.coco import evaluate
from maskrcnn_benchmark.models.anchors import cell_anchors, grid_anchors
from maskrcnn_benchmark.ops.boxes import iou
from maskrcnn_benchmark.ops.matching import match
from maskrcnn_benchmark.report import data_page

ROOT = Path(__file__).resolve().parents[1]
HEIGHT, WIDTH = 60, 80
SQUARE = [10, 10, 40, 10, 40, 30, 10, 30]  # bbox 10, 10, 30, 20


def quiet(items, total, label):
    return iter(items)


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH), orientation: int = 0) -> None:
    """A smooth picture that no other seed resembles, and no turn of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 255, (7, 7, 3), np.uint8)
    image = Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(path, exif=exif, quality=92)


def annotation(number, image_id: int = 1, **changes) -> dict:
    """A sound one; a change to None removes the key."""
    sound = {"id": number, "image_id": image_id, "category_id": 7, "bbox": [10, 10, 30, 20], "area": 600, "iscrowd": 0}
    sound |= {"segmentation": [SQUARE]} | changes
    return {key: value for key, value in sound.items() if value is not None}


class Folder:
    """A data set on disk, made entry by entry."""

    def __init__(self, root: Path, categories=((1, "cat"), (7, "dog"))) -> None:
        self.root = root
        self.content: dict = {"info": {"year": 2026}, "images": [], "annotations": []}
        self.content["categories"] = [{"id": i, "name": name} for i, name in categories]
        for i, _ in categories:  # so that no class is without objects
            self.add_image(900 + i, annotation(90000 + i, 900 + i, category_id=i))

    def add_image(self, image_id: int, *annotations: dict, file: str = "", write=photo, **changes) -> None:
        name = file or f"{image_id}.jpg"
        entry = {"id": image_id, "file_name": name, "height": HEIGHT, "width": WIDTH} | changes
        self.content["images"].append({key: value for key, value in entry.items() if value is not None})
        self.content["annotations"] += annotations
        if write:
            write(self.root / "pictures" / name, seed=image_id)

    def save(self) -> str:
        self.root.mkdir(exist_ok=True)
        (self.root / "a.json").write_text(json.dumps(self.content), encoding="utf-8")
        return f"coco://{self.root}/a.json?images=pictures"

    def survey(self, **options) -> doctor.Survey:
        return doctor.survey(self.save(), "", **{"masks": True, "workers": 0, "progress": quiet} | options)

    def findings(self, **options) -> dict[str, doctor.Finding]:
        found = doctor.examine([self.survey(**options)], setting())
        assert len({finding.check for finding in found}) == len(found)
        return {finding.check: finding for finding in found}

    def train(self, masks: bool = True) -> CocoDataset:
        """What training opens."""
        self.save()
        return CocoDataset(self.root / "a.json", self.root / "pictures", training=True, masks=masks)

    def repaired(self) -> Folder:
        write_repaired(self.survey(), self.root / "b.json")
        copy = Folder(self.root, ())
        copy.content = json.loads((self.root / "b.json").read_text())
        return copy


def setting(*overrides: str, configured: bool = False) -> doctor.Setting:
    # The pictures are not enlarged: their objects are of the default anchors' size
    keys = ["MODEL.MASK_ON", "True", "INPUT.MIN_SIZE_TRAIN", "(60,)", "DATALOADER.NUM_WORKERS", "0"]
    return doctor.Setting(get_config(None, [*keys, *overrides]), configured)


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "data")


def ids(finding: doctor.Finding) -> list[tuple]:
    return [(offender.image_id, offender.annotation_id) for offender in finding.offenders]


# Notes that small but sound data sets get too
USUAL = {"category_ids", "class_rare"}


def test_sound_data_have_notes_alone(folder):
    found = folder.findings()
    assert set(found) == USUAL
    assert doctor.exit_code(list(found.values())) == 0


# ------------------------------------------------------------------------------------------------ annotations

BROKEN_RLE = {"size": [HEIGHT, WIDTH], "counts": "0" + "o0" * 4000}
OTHER_RLE = {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]}


@pytest.mark.parametrize(
    ("check", "changes"),
    [
        ("zero_area", {"bbox": [10, 10, 0, 20]}),
        ("zero_area", {"bbox": [10, 10, 30, -2]}),
        ("not_finite", {"bbox": [float("nan"), 10, 30, 20]}),
        ("not_finite", {"segmentation": [[10, 10, float("inf"), 10, 40, 30]]}),
        ("outside", {"bbox": [90, 10, 30, 20]}),
        ("bad_rle", {"segmentation": BROKEN_RLE}),
        ("bad_rle", {"segmentation": OTHER_RLE}),
        ("no_mask", {"segmentation": []}),
        ("no_mask", {"segmentation": None}),
    ],
)
def test_an_object_that_training_drops(folder, check, changes):
    """Named by its ids; the image is then trained on as background; the repaired copy is without it."""
    folder.add_image(5, annotation(31, 5, **changes), annotation(32, 5))
    folder.add_image(6, annotation(33, 6, **changes))
    found = folder.findings()
    assert set(found) == {*USUAL, check, "image_empty"}
    assert found[check].severity == doctor.HURTS and found[check].count == 2
    assert ids(found[check]) == [(5, 31), (6, 33)] and found[check].offenders[0].file == "5.jpg"
    assert "drops the object, and learns that what is there is background" in found[check].training
    dataset = folder.train()
    assert [dataset.counts[dataset.image_ids.index(i)] for i in (5, 6)] == [1, 0]
    assert len(dataset.load(dataset.image_ids.index(6)).boxes) == 0
    assert dataset.warnings == {check: [31, 33]}
    assert set(folder.repaired().findings()) == {*USUAL, "image_empty"}


def test_every_problem_that_training_warns_of_is_a_finding():
    assert set(objects.KINDS) == set(PROBLEMS)


def test_polygons_of_four_numbers(folder):
    folder.add_image(5, annotation(31, 5, segmentation=[[10, 10, 40, 30], SQUARE]))
    folder.add_image(6, annotation(32, 6, segmentation=[[10, 10, 40, 30]]))
    found = folder.findings()
    assert ids(found["bad_polygon"]) == [(5, 31), (6, 32)] and ids(found["no_mask"]) == [(6, 32)]
    assert found["bad_polygon"].training == "leaves that polygon out, and the object where it has no other one"
    dataset = folder.train()
    (polygon,) = dataset.load(dataset.image_ids.index(5)).polygons.of(0)
    assert polygon.ravel().tolist() == SQUARE
    assert dataset.counts[dataset.image_ids.index(6)] == 0
    copy = folder.repaired()
    assert [a["segmentation"] for a in copy.content["annotations"] if a["id"] == 31] == [[SQUARE]]
    assert not {"bad_polygon", "no_mask"} & set(copy.findings())
    assert "no_mask" not in folder.findings(masks=False)


def test_boxes_beyond_the_image_are_clipped(folder):
    folder.add_image(5, annotation(31, 5, bbox=[-5, 10, 45, 20]))
    found = folder.findings()["clipped"]
    assert (found.severity, ids(found)) == (doctor.NOTE, [(5, 31)])
    assert found.training == "clips the box to the image"
    dataset = folder.train()
    assert dataset.load(dataset.image_ids.index(5)).boxes.tolist() == [[0, 10, 40, 30]]
    copy = folder.repaired()
    assert [a["bbox"] for a in copy.content["annotations"] if a["id"] == 31] == [[0, 10, 40, 20]]
    assert set(copy.findings()) == USUAL


def test_missing_keys(folder):
    """Training takes what the doctor says, evaluation too; the copy says it, and scores are the same."""
    rle = {"size": [HEIGHT, WIDTH], "counts": [600, 1200, HEIGHT * WIDTH - 1800]}
    folder.add_image(5, annotation(31, 5, iscrowd=None), annotation(32, 5, area=None, bbox=[40, 30, 24, 20]))
    folder.content["annotations"][-1]["segmentation"] = [[40, 30, 64, 30, 64, 50, 40, 50]]
    folder.add_image(6, annotation(33, 6, bbox=None), annotation(34, 6, bbox=None, area=None, segmentation=rle))
    found = folder.findings()
    assert ids(found["iscrowd_missing"]) == [(5, 31)]
    assert ids(found["area_missing"]) == [(5, 32), (6, 34)]
    assert ids(found["missing_bbox"]) == [(6, 33), (6, 34)]
    assert all(found[check].severity == doctor.NOTE for check in ("iscrowd_missing", "area_missing", "missing_bbox"))
    dataset = folder.train()
    assert [dataset.counts[dataset.image_ids.index(i)] for i in (5, 6)] == [2, 2]
    assert dataset.load(dataset.image_ids.index(6)).boxes.tolist() == [[10, 10, 40, 30], [10, 0, 30, 60]]
    copy = folder.repaired()
    by_id = {a["id"]: a for a in copy.content["annotations"]}
    assert (by_id[31]["iscrowd"], by_id[32]["area"], by_id[34]["area"]) == (0, 480, 1200)
    assert (by_id[33]["bbox"], by_id[34]["bbox"]) == ([10, 10, 30, 20], [10, 0, 20, 60])
    assert set(copy.findings()) == USUAL
    results = [{key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in by_id.values()]
    assert evaluate(folder.content, results, ("bbox",)) == evaluate(copy.content, results, ("bbox",))


def test_annotation_id_zero_and_given_twice(folder):
    folder.add_image(5, annotation(0, 5), annotation(44, 5, bbox=[41, 31, 20, 20]))
    folder.content["annotations"][-1]["segmentation"] = [[41, 31, 61, 31, 61, 51, 41, 51]]
    folder.add_image(6, annotation(44, 6))
    found = folder.findings()
    assert ids(found["annotation_id_zero"]) == [(5, 0)] and ids(found["duplicate_id"]) == [(6, 44)]
    assert "evaluation numbers anew" in found["annotation_id_zero"].training
    truth = folder.content["annotations"]
    results = [{key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in truth]
    assert evaluate(folder.content, results, ("bbox",))["bbox"]["AP"] == pytest.approx(1.0)
    assert folder.train().counts.sum() == 5
    copy = folder.repaired()
    assert [a["id"] for a in copy.content["annotations"]] == [90001, 90007, 90008, 44, 90009]
    assert set(copy.findings()) == USUAL


def test_crowds_are_left_out(folder):
    folder.add_image(5, annotation(31, 5, iscrowd=1), annotation(32, 5, category_id=1))
    found = folder.findings()["crowd"]
    assert (found.severity, ids(found)) == (doctor.NOTE, [(5, 31)]) and "leaves them out" in found.training
    dataset = folder.train()
    assert dataset.load(dataset.image_ids.index(5)).labels.tolist() == [1]
    detections = [{"image_id": 5, "category_id": c, "bbox": [10, 10, 30, 20], "score": 0.9} for c in (7, 1)]
    scores = evaluate(folder.content, detections, ("bbox",), image_ids=[5])["bbox"]["per_class"]
    assert scores["cat"] == pytest.approx(1.0) and scores["dog"] is None, "on a crowd: neither right nor wrong"


def test_the_same_object_twice(folder):
    folder.add_image(5, annotation(31, 5), annotation(32, 5), annotation(33, 5, category_id=1))
    found = folder.findings()["object_repeated"]
    assert (found.severity, ids(found)) == (doctor.HURTS, [(5, 32)])
    dataset = folder.train()
    assert dataset.counts[dataset.image_ids.index(5)] == 3, "training learns from each of them"
    perfect = [{"image_id": 5, "category_id": c, "bbox": [10, 10, 30, 20], "score": 0.9} for c in (7, 1)]
    recall = evaluate(folder.content, perfect, ("bbox",), image_ids=[5])["bbox"]["AR100"]
    assert recall == pytest.approx(0.75), "and one of the two dogs is missed in the evaluation"
    assert set(folder.repaired().findings()) == USUAL


def test_a_box_that_is_two_corners(folder):
    folder.add_image(5, annotation(31, 5, bbox=[40, 30, 64, 50], segmentation=[[40, 30, 64, 30, 64, 50, 40, 50]]))
    found = folder.findings()
    assert ids(found["box_beside_mask"]) == [(5, 31)] and found["box_beside_mask"].severity == doctor.HURTS
    dataset = folder.train()
    sample = dataset.load(dataset.image_ids.index(5))
    assert sample.boxes.tolist() == [[40, 30, 80, 60]] and sample.polygons.bounds().tolist() == [[40, 30, 64, 50]]
    copy = folder.repaired()
    assert [a["bbox"] for a in copy.content["annotations"] if a["id"] == 31] == [[40, 30, 24, 20]]
    assert set(copy.findings()) == USUAL


@pytest.mark.parametrize(
    ("check", "change", "offender"),
    [
        ("malformed", lambda f: f.add_image(5, annotation("x", 5)), (None, "x")),
        ("malformed", lambda f: f.add_image(5, annotation(31, 5, bbox=[1, 2, 3])), (None, 31)),
        ("malformed", lambda f: f.add_image(5, annotation(31, 5, area="big")), (None, 31)),
        ("malformed", lambda f: f.content["images"].append({"id": 5}), (5, None)),
        ("malformed", lambda f: f.content["categories"].append({"id": 5}), (None, None)),
        ("image_unknown", lambda f: f.content["annotations"].append(annotation(31, 77)), (77, 31)),
        ("category_unknown", lambda f: f.add_image(5, annotation(31, 5, category_id=3)), (5, 31)),
        ("image_missing", lambda f: f.add_image(5, annotation(31, 5), write=None), (5, None)),
        ("size_unstated", lambda f: f.add_image(5, annotation(31, 5), height=None), (5, None)),
        ("size_unstated", lambda f: f.add_image(5, annotation(31, 5), width="80"), (5, None)),
        ("image_id_repeated", lambda f: f.content["images"].append(dict(f.content["images"][0])), (901, None)),
    ],
)
def test_what_stops_training_at_the_start(folder, check, change, offender):
    """The doctor goes on where training stops, and names what stops it."""
    change(folder)
    folder.add_image(8, annotation(88, 8, bbox=[10, 10, 0, 20]))
    found = folder.findings()
    assert found[check].severity == doctor.STOPS and ids(found[check]) == [offender]
    assert ids(found["zero_area"]) == [(8, 88)], "what comes after is found, too"
    assert "stops when it reads the file" in found[check].training
    with pytest.raises(DataError):
        folder.train()
    copy = folder.repaired()
    assert {f.check for f in copy.findings().values() if f.severity != doctor.NOTE} == set()
    assert copy.train().counts.sum() >= 2 and copy.content["info"] == {"year": 2026}


VALUES = [None, "x", "", -1, 0, 1, 901, 3.5, 1e40, float("nan"), True, 10**30, [], {}, [1, 2], [[1, 2]], ["a"] * 4]
VALUES += [[0, 0, 0, 0], [1e300] * 4, [[1e300] * 6], {"size": [60, 80], "counts": "x"}, {"size": 3, "counts": 4}]
KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox", "segmentation", "area", "iscrowd"),
}
CHANGES = st.sampled_from([(name, key) for name, keys in KEYS.items() for key in keys])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CHANGES, st.integers(0, 3), st.sampled_from(VALUES)), min_size=1, max_size=4))
@example([(("annotations", "image_id"), 1, 901)])  # the repaired box is that of another object
def test_whatever_the_values_the_doctor_knows_whether_training_stops(tmp_path, changes):
    """Any values anywhere: what stops is found if and only if training stops, and a repaired copy does not stop it."""
    folder = Folder(tmp_path / "data")
    folder.content["annotations"] += [annotation(1, 901, bbox=[40, 30, 20, 20]), annotation(2, 907, iscrowd=1)]
    for (name, key), place, value in changes:
        entries = folder.content[name]
        entries[place % len(entries)][key] = value
    found = folder.findings(pixels=False)
    stops = [check for check, finding in found.items() if finding.severity == doctor.STOPS]
    try:
        dataset = folder.train()
    except DataError as error:
        assert stops, error
    else:
        assert not stops
        kinds = {kind: sorted(rows) for kind, rows in dataset.warnings.items()}
        survey = folder.survey(pixels=False)
        assert kinds == {kind: sorted(survey.ids[rows].tolist()) for kind, rows in survey.problems.items()}
    data_page.page([folder.survey(pixels=False)], list(found.values()), setting())
    try:
        copy = folder.repaired()
    except DataError as error:
        assert re.search("would have no|two different", str(error))
        return
    left = {check for check, finding in copy.findings().items() if finding.severity != doctor.NOTE}
    assert left <= {"no_objects", "category_name_repeated", "anchors"}
    if not left:
        copy.train()


def test_ids_that_stand_for_two_things_cannot_be_repaired(folder):
    folder.content["images"].append(folder.content["images"][0] | {"file_name": "907.jpg"})
    found = folder.findings()["image_id_ambiguous"]
    assert not found.fixable and ids(found) == [(901, None)]
    with pytest.raises(DataError, match="901 is the id of two different images"):
        folder.repaired()
    assert not list(folder.root.glob("*b.json*"))


def test_nothing_to_train_on(folder):
    folder.content["annotations"] = [annotation(1, 901, iscrowd=1)]
    found = folder.findings()["no_objects"]
    assert found.severity == doctor.STOPS
    with pytest.raises(DataError, match="none of its 1 annotations"):
        folder.train()
    for key in ("images", "categories"):
        empty = Folder(folder.root / key)
        empty.content[key] = []
        assert empty.findings()[f"no_{key}"].severity == doctor.STOPS


# ----------------------------------------------------------------------------------------------------- classes


def test_category_ids_with_gaps(tmp_path):
    folder = Folder(tmp_path / "data", ((90, "ninety"), (0, "zero"), (7, "seven")))
    found = folder.findings()["category_ids"]
    assert found.severity == doctor.NOTE and "(0, 7, 90)" in found.what
    assert found.training == "numbers them 1.. by rising id itself; results have the file's ids again"
    dataset = folder.train()
    labels = {dataset.image_ids[i]: dataset.load(i).labels.tolist() for i in range(3)}
    assert labels == {900: [1], 907: [2], 990: [3]}
    assert [dataset.annotations(i)[0]["category_id"] for i in range(3)] == [90, 0, 7]


def test_classes_without_objects_and_with_few(folder):
    folder.content["categories"] += [{"id": 8, "name": "unicorn"}, {"id": 9, "name": "dog"}]
    found = folder.findings()
    assert [offender.detail for offender in found["class_unused"].offenders] == [
        "unicorn (id 8): 0 objects",
        "dog (id 9): 0 objects",
    ]
    assert found["class_rare"].offenders[0].detail == "cat (id 1): 1 objects"
    assert found["category_name_repeated"].severity == doctor.HURTS and "(dog)" in found["category_name_repeated"].what
    assert folder.train().num_classes == 5


def test_number_of_classes_of_the_configuration(folder):
    survey = folder.survey()
    checks = {f.check: f for f in doctor.examine([survey], setting(configured=True))}
    assert checks["num_classes"].severity == doctor.STOPS and "set it to 3" in checks["num_classes"].advice
    with pytest.raises(UserError, match="set it to 3"):
        catalog.check_num_classes(setting().cfg, folder.train())
    fitting = setting("MODEL.ROI_BOX_HEAD.NUM_CLASSES", "3", configured=True)
    assert "num_classes" not in {f.check for f in doctor.examine([survey], fitting)}


@pytest.mark.parametrize(("ratio", "kept"), [("1.0", 4), ("0.5", 2), ("0.0", 0)])
def test_images_without_objects(folder, ratio, kept):
    for image_id in range(10, 14):
        folder.add_image(image_id)
    checks = setting("DATALOADER.EMPTY_IMAGE_RATIO", ratio)
    (found,) = (f for f in doctor.examine([folder.survey()], checks) if f.check == "image_empty")
    assert found.severity == doctor.NOTE and ids(found) == [(i, None) for i in range(10, 14)]
    assert f"keeps {kept} of them" in found.training
    loader = train_loader(checks.cfg.clone(), folder.train(), get_device("cpu"), 0, 1, 0)
    assert len(loader.images) == 2 + kept


def test_objects_that_no_anchor_fits(folder):
    """By hand: a square of 4 has at most 16 / 1024 of an anchor of 32; enlarged eightfold it fits."""
    for image_id in (10, 11):
        small = annotation(image_id, image_id, bbox=[10, 10, 4, 4], segmentation=[[10, 10, 14, 10, 14, 14, 10, 14]])
        folder.add_image(image_id, small)
    (found,) = (f for f in doctor.examine([folder.survey()], setting()) if f.check == "anchors")
    assert (found.severity, ids(found)) == (doctor.HURTS, [(10, 10), (11, 11)])
    assert "(50%; 2 too small)" in found.what and found.offenders[0].detail == "4.0 x 4.0 pixels for the network"
    large = setting("INPUT.MIN_SIZE_TRAIN", "(480,)")
    assert "anchors" not in {f.check for f in doctor.examine([folder.survey()], large)}
    listed = setting("INPUT.TRANSFORMS", "[{'type': 'ResizeByShort', 'short_size': 480}]")
    assert "anchors" not in {f.check for f in doctor.examine([folder.survey()], listed)}


@settings(max_examples=40, deadline=None)
@given(width=st.floats(2, 300), height=st.floats(2, 300))
def test_what_is_said_of_objects_that_no_anchor_fits(width, height):
    """Of all anchors over a map, matched as training does: none is above the overlap that is reckoned, and below the
    background's limit one shape of anchors alone becomes positive, by being the best."""
    cfg = setting().cfg.MODEL.RPN
    folder = SimpleNamespace(objects=np.zeros(1, int), image_of=np.zeros(1, int), sizes=np.array([[60, 80]]))
    folder.clipped = np.array([[0, 0, width, height]])
    (most,) = best_overlaps(folder, setting())
    anchors = grid_anchors(cell_anchors(cfg.ANCHOR_SIZES, cfg.ASPECT_RATIOS), 40, 40, (16, 16))
    x, y = 320 - width / 2, 320 - height / 2
    box = torch.tensor([[[x, y, x + width, y + height]]], dtype=torch.float32)
    overlaps = iou(box[0], anchors)[0]
    assert overlaps.max() <= most + 1e-4
    assert overlaps.max() == pytest.approx(most, rel=1e-3), "one of them is around its middle"
    limits = (cfg.FG_IOU_THRESHOLD, cfg.BG_IOU_THRESHOLD, True)
    label = match(box, torch.ones(1, 1, dtype=torch.bool), anchors, *limits)[1][0]
    if most < cfg.BG_IOU_THRESHOLD:
        assert (label == 1).equal(overlaps == overlaps.max()) and (label == -1).sum() == 0


def test_more_objects_than_are_detected(folder):
    row = [
        annotation(100 + i, 5, bbox=[i / 2, 10, 30, 20], segmentation=[[i / 2, 10, 40, 10, 40, 30]]) for i in range(9)
    ]
    folder.add_image(5, *row)
    checks = setting("MODEL.ROI_HEADS.DETECTIONS_PER_IMG", "8")
    (found,) = (f for f in doctor.examine([folder.survey()], checks) if f.check == "image_crowded")
    assert (found.severity, ids(found), found.offenders[0].detail) == (doctor.NOTE, [(5, None)], "9 objects")
    assert "image_crowded" not in folder.findings()


def test_long_objects_and_images(folder):
    thin = [5, 30, 75, 30, 75, 36, 5, 36]
    folder.add_image(10, annotation(10, 10, bbox=[5, 30, 70, 6], segmentation=[thin]))
    wide = {"height": 10, "width": 300, "write": lambda path, seed: photo(path, seed, (10, 300))}
    folder.add_image(11, **wide)
    found = folder.findings()
    assert ids(found["aspect_ratio"]) == [(10, 10)] and found["aspect_ratio"].offenders[0].detail.endswith("0.09")
    assert "image_long" not in found, "300 pixels are below INPUT.MAX_SIZE_TRAIN"
    checks = setting("INPUT.MAX_SIZE_TRAIN", "200")
    (found,) = (f for f in doctor.examine([folder.survey()], checks) if f.check == "image_long")
    assert ids(found) == [(11, None)]
    sample = folder.train().load(3)
    resized = Compose([checks.resize])(sample, np.random.default_rng(0))
    assert max(resized.size) == 200, "as the finding says"


# ------------------------------------------------------------------------------------------------------ images


def test_images_that_cannot_be_read(folder):
    """A truncated JPEG, and a text: training stops at a batch that holds one, the copy is without them."""
    folder.add_image(5, annotation(31, 5))
    folder.add_image(6, annotation(32, 6))
    truncated = folder.root / "pictures" / "5.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-200])
    (folder.root / "pictures" / "6.jpg").write_text("no image")
    found = folder.findings()["image_unreadable"]
    assert (found.severity, ids(found)) == (doctor.STOPS, [(5, None), (6, None)])
    assert found.training == "stops at the first batch that holds one"
    cfg = setting("SOLVER.IMS_PER_BATCH", "1", "INPUT.MIN_SIZE_TRAIN", "(32,)").cfg
    with pytest.raises(DataError, match=r"[56]\.jpg"):
        for _ in zip(range(4), train_loader(cfg, folder.train(), get_device("cpu"), 0, 1, 0)):
            pass
    copy = folder.repaired()
    assert [image["id"] for image in copy.content["images"]] == [901, 907]
    assert set(copy.findings()) == USUAL
    assert "image_unreadable" not in folder.findings(pixels=False)


def test_a_stated_size_that_is_not_the_file_s(folder):
    rle = {"size": [HEIGHT, 100], "counts": [HEIGHT * 100]}
    folder.add_image(5, annotation(31, 5), annotation(32, 5, segmentation=rle), width=100)
    found = folder.findings()["size_wrong"]
    assert (found.severity, ids(found)) == (doctor.STOPS, [(5, None)])
    assert found.offenders[0].detail == "stated 60 x 100, the file has 60 x 80 (height x width)"
    dataset = folder.train()
    with pytest.raises(DataError, match=r"is 60 x 80 .* 60 x 100"):
        dataset.load(2)
    copy = folder.repaired()
    assert copy.content["images"][2]["width"] == 80 and [a["id"] for a in copy.content["annotations"]][2:] == [31]
    assert set(copy.findings()) == USUAL
    copy.train().load(2)


@pytest.mark.parametrize("stated", ["stored", "upright"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(folder, orientation, stated):
    """What the doctor says of the pixels is what training gets."""
    turned = orientation >= 5
    size = (WIDTH, HEIGHT) if turned and stated == "upright" else (HEIGHT, WIDTH)
    folder.add_image(
        5,
        annotation(31, 5),
        height=size[0],
        width=size[1],
        write=lambda path, seed: photo(path, seed, orientation=orientation),
    )
    found = {check: f for check, f in folder.findings().items() if check.startswith("exif")}
    expected = set() if orientation == 1 else {f"exif_{stated}"} if turned else {"exif_both"}
    assert set(found) == expected
    dataset = folder.train()
    got = dataset.load(2).image
    raw = Image.open(folder.root / "pictures" / "5.jpg")
    as_stored = np.abs(got.astype(int) - np.asarray(raw)).max() < 8 if got.shape[:2] == raw.size[::-1] else False
    for finding in found.values():
        assert ids(finding) == [(5, None)] and finding.offenders[0].detail == f"orientation {orientation}"
        assert ("takes their pixels as stored" in finding.training) == as_stored
        assert (finding.severity == doctor.HURTS) == (not turned)


def test_file_names_of_any_script(folder):
    folder.add_image(5, annotation(31, 5), file="数据/图.jpg")
    found = folder.findings()
    assert found["file_name"].offenders[0].file == "数据/图.jpg" and set(found) == {*USUAL, "file_name"}
    assert folder.train().load(2).size == (HEIGHT, WIDTH), "read like any other"


def test_one_file_under_two_ids(folder):
    folder.add_image(5, annotation(31, 5), file="901.jpg", write=None)
    found = folder.findings()["image_repeated"]
    assert (found.severity, ids(found)) == (doctor.NOTE, [(5, None)])
    assert found.offenders[0].detail == "as image id 901"


def test_processes_read_what_one_process_reads(folder):
    for image_id in range(10, 30):
        folder.add_image(image_id)
    assert folder.survey(workers=2).facts == folder.survey().facts


# ---------------------------------------------------------------------------------------------------- two splits


def examined(*folders: Folder) -> dict[str, doctor.Finding]:
    found = doctor.examine([folder.survey() for folder in folders], setting())
    return {finding.check: finding for finding in found}


@pytest.fixture
def splits_of_two(tmp_path) -> tuple[Folder, Folder]:
    """Different pictures under the same names."""
    one, other = Folder(tmp_path / "train"), Folder(tmp_path / "val")
    for image_id in (901, 907):
        photo(other.root / "pictures" / f"{image_id}.jpg", seed=image_id + 50)
    return one, other


def test_the_same_image_in_both_splits(splits_of_two):
    one, other = splits_of_two
    assert "duplicate_between_splits" not in examined(one, other), "same names, other pictures"
    one.add_image(5, annotation(31, 5))
    other.add_image(50, annotation(31, 50), write=None)
    shutil.copy(one.root / "pictures" / "5.jpg", other.root / "pictures" / "50.jpg")
    one.add_image(6, annotation(32, 6))
    other.add_image(60, annotation(32, 60), write=None, height=HEIGHT // 2, width=WIDTH // 2)
    with Image.open(one.root / "pictures" / "6.jpg") as image:
        image.resize((WIDTH // 2, HEIGHT // 2)).save(other.root / "pictures" / "60.jpg", quality=40)
    found = examined(one, other)["duplicate_between_splits"]
    assert (found.severity, ids(found)) == (doctor.HURTS, [(50, None), (60, None)])
    assert [re.sub(r" of coco.*", "", offender.detail) for offender in found.offenders] == [
        "the same file content as image id 5 (5.jpg)",
        "nearly the same picture as image id 6 (6.jpg)",
    ]


def test_photos_are_not_alike_and_their_small_copies_are(coco_mini, tmp_path):
    files = sorted(coco_mini.glob("*2017/*.jpg"))
    assert len(files) == 159
    facts = [examine(str(file)) for file in files]
    assert list(splits.look_alike(facts[:80], facts[80:])) == []
    small = []
    for file in files[:12]:
        with Image.open(file) as image:
            image.resize((image.width // 2, image.height // 2)).save(tmp_path / "small.jpg", quality=30)
        small.append(examine(str(tmp_path / "small.jpg")))
    assert list(splits.look_alike(facts, small)) == [(i, i) for i in range(12)]


def test_categories_that_differ(splits_of_two):
    one, other = splits_of_two
    other.content["categories"][1]["name"] = "wolf"
    found = examined(one, other)["categories_differ"]
    assert found.severity == doctor.STOPS and "id 7: 'dog' there, 'wolf' here" in found.what
    with pytest.raises(DataError, match="'dog' there, 'wolf' here"):
        catalog.open_datasets([one.save(), other.save()], training=True)


def test_classes_that_training_never_sees(splits_of_two):
    one, other = splits_of_two
    one.content["annotations"] = [a for a in one.content["annotations"] if a["category_id"] == 7]
    found = examined(one, other)["class_unseen"]
    assert found.severity == doctor.NOTE and "(cat)" in found.what


# ------------------------------------------------------------------------------------------------------ the tool


def sick(folder: Folder) -> Folder:
    """One of everything that can be repaired."""
    folder.add_image(5, annotation(31, 5, bbox=[10, 10, 0, 20]), annotation(0, 5), annotation(33, 5))
    folder.add_image(6, annotation(34, 6, segmentation=BROKEN_RLE), annotation(35, 6, bbox=[70, 10, 30, 20]))
    folder.add_image(7, annotation(36, 7), width=90)
    folder.add_image(8, annotation(37, 8, bbox=[float("nan"), 0, 1, 1]), write=None)
    folder.add_image(9, annotation(38, 9, bbox=[90, 70, 10, 10]), annotation(39, 9, area=None, iscrowd=None))
    folder.add_image(10, annotation(40, 10), file="数据/图.jpg")
    folder.content["annotations"] += [annotation(41, 12345), annotation(42, 5, category_id=3), annotation("a", 5)]
    truncated = folder.root / "pictures" / "907.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-300])
    return folder


@pytest.fixture
def check(monkeypatch, capsys):
    """The tool in this process: its exit status and what it prints."""
    spec = importlib.util.spec_from_file_location("dataset_tool", ROOT / "tools" / "dataset.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def call(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["dataset.py", "check", *map(str, arguments)])
        capsys.readouterr()
        return tool.main(), capsys.readouterr().out

    return call


class Page(HTMLParser):
    """What the page fetches, and whether its elements are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_tool_end_to_end(folder, run, check, tmp_path):
    name = sick(folder).save()
    paths = {key: tmp_path / "out" / f"a.{key}" for key in ("json", "html")}
    fixed = tmp_path / "out" / "fixed.json"
    arguments = ("--json", paths["json"], "--html", paths["html"], "--fix", fixed, "--workers", "2")
    done = run("tools/dataset.py", "check", name, *arguments)
    assert done.returncode == 1, done.stderr
    assert done.stderr == "", "no progress where nobody watches"
    report = json.loads(paths["json"].read_text(encoding="utf-8"))
    assert not report["fine"] and report["datasets"][0]["images"] == 8
    found = {finding["check"]: finding for finding in report["findings"]}
    assert [found["zero_area"]["offenders"][0][key] for key in ("image_id", "annotation_id")] == [5, 31]
    severities = [finding["severity"] for finding in report["findings"]]
    assert severities == sorted(severities, key=("stops", "hurts", "note").index)
    for words in (
        "image id 5, annotation id 31, 5.jpg",
        "STOPS  image files that are damaged, truncated or no images: 1\n",
        "training: drops the object",
    ):
        assert words in done.stdout
    page = paths["html"].read_text(encoding="utf-8")
    parsed = Page(page)
    assert parsed.open == [] and parsed.addresses and all(a.startswith("data:image/") for a in parsed.addresses)
    assert "数据/图.jpg" in page and "prefers-color-scheme:dark" in page and "width=device-width" in page

    address = re.search(r"DATASETS.TRAIN takes it as (\S+)", done.stdout)[1]
    assert check(address)[0] == 0
    dataset = catalog.open_datasets([address], training=True)
    for index in range(len(dataset)):
        dataset.load(index)
    assert not dataset.warnings and not list(fixed.parent.glob(".*"))


@pytest.mark.parametrize("data", ["coco_mini", "shapes"])
def test_clean_data(data, check, request):
    root = request.getfixturevalue(data)
    code, printed = check("coco_2017_train", "coco_2017_val", "--data-path", root)
    assert code == 0 and printed.splitlines()[-1].startswith("FINE"), printed


def test_the_data_sets_of_a_configuration(check, tiny_config, tmp_path):
    code, printed = check("--config-file", tiny_config)
    assert code == 0 and printed.startswith("coco_2017_train: 12 images"), printed
    other = tmp_path / "other.yaml"
    other.write_text(f"_BASE_: {tiny_config}\nMODEL: {{ROI_BOX_HEAD: {{NUM_CLASSES: 81}}}}\n")
    code, printed = check("--config-file", other)
    assert code == 1 and "set it to 6" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "check needs a DATASET"),
        (("coco://a.json", "coco://b.json", "--fix", "c.json"), "--fix takes one DATASET"),
        (("coco://nowhere.json",), "does not exist"),
        (("my:Data",), "Python code"),
        (("coco://nowhere.json", "--workers", "-1"), "--workers"),
    ],
)
def test_wrong_usage(check, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as caught:  # one line, and exit status 2
        check(*arguments)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2 and not list(tmp_path.iterdir())


def test_other_formats(check, tmp_path):
    """A labelme directory with a truncated picture: found, and repaired as COCO."""
    for number in (1, 2):
        photo(tmp_path / "photos" / f"{number}.jpg", seed=number)
        shape = {"label": "cat", "points": [[10, 10], [40, 10], [40, 30]], "shape_type": "polygon"}
        content = {"imagePath": f"{number}.jpg", "imageHeight": HEIGHT, "imageWidth": WIDTH, "shapes": [shape]}
        (tmp_path / "photos" / f"{number}.json").write_text(json.dumps(content))
    broken = tmp_path / "photos" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:-100])
    name, fixed = f"labelme://{tmp_path}/photos", tmp_path / "fixed.json"
    code, printed = check(name, "--fix", fixed)
    assert code == 1 and "image id 2, 2.jpg" in printed
    assert len(json.loads(fixed.read_text())["images"]) == 1
    assert check(f"{name}[0:1]")[0] == 0, "the part without it"


def test_a_copy_is_written_whole_or_not_at_all(folder, monkeypatch):
    target = folder.root / "b.json"
    folder.save()
    target.write_text("before")
    survey = folder.survey()
    monkeypatch.setattr(doctor.repair, "_segmentation", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_repaired(survey, target)
    assert target.read_text() == "before" and not list(folder.root.glob(".*"))


def test_progress_on_a_terminal(folder, run):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    done = run("tools/dataset.py", "check", folder.save(), stderr=slave, stdout=-1, capture_output=False)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # Linux's end of a terminal
        while piece := os.read(master, 4096):
            shown += piece
    os.close(master)
    assert done.returncode == 0
    assert re.search(rb"images: 100%.*2/2 \[\d+:\d+<\d+:\d+, +[\d.]+it/s\]", shown)


# ---------------------------------------------------------------------------------------------------- pictures


def test_pictures_show_what_lies_outside(folder):
    folder.add_image(5, annotation(31, 5, bbox=[85, 10, 10, 20]), annotation(32, 5, bbox=[10, 10, 0, 20]))
    survey = folder.survey()
    found = {f.check: f for f in doctor.examine([survey], setting())}
    outside = data_page.picture_of(found["outside"].offenders[0], survey)
    assert outside.shape[0] == HEIGHT and WIDTH + 10 < outside.shape[1] <= WIDTH * 1.25 + 5
    zero = data_page.picture_of(found["zero_area"].offenders[0], survey)
    plain = np.asarray(Image.open(folder.root / "pictures" / "5.jpg"))
    assert zero.shape == plain.shape and (np.abs(zero.astype(int) - plain).max(axis=2) > 30).sum() > 40, "a circle"
