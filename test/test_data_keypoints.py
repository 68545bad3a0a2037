"""Keypoints from the file to the batch: read, mirrored with their sides exchanged, padded, and absent unless wanted."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.data import loader
from maskrcnn_benchmark.data.catalog import build_dataset, check_same_keypoints
from maskrcnn_benchmark.data.coco import CocoDataset
from maskrcnn_benchmark.data.items import ItemDataset
from maskrcnn_benchmark.data.keypoints import PERSON, named, of_categories
from maskrcnn_benchmark.data.mixing import paste
from maskrcnn_benchmark.data.sample import Polygons, Sample
from maskrcnn_benchmark.data.transforms import Compose
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.errors import DataError

CPU = get_device("cpu")
FACE = ["nose", "left_eye", "right_eye"]
CATEGORY = {"id": 1, "name": "face", "keypoints": FACE, "skeleton": [[1, 2], [1, 3]]}


def annotation(number: int = 1, **changes) -> dict:
    sound = {"id": number, "image_id": 1, "category_id": 1, "bbox": [2, 3, 10, 8], "area": 80, "iscrowd": 0}
    return sound | {"segmentation": [[2, 3, 12, 3, 12, 11, 2, 11]], "keypoints": [7, 6, 2, 5, 4, 1, 0, 0, 0]} | changes


@pytest.fixture
def open_coco(tmp_path):
    """One image of 20 x 30 with these annotations and categories."""

    def call(*annotations: dict, categories=(CATEGORY,), keypoints: bool = True, masks: bool = True) -> CocoDataset:
        Image.new("RGB", (30, 20), (10, 20, 30)).save(tmp_path / "one.png")
        images = [{"id": 1, "file_name": "one.png", "height": 20, "width": 30}]
        content = {"images": images, "annotations": list(annotations), "categories": list(categories)}
        (tmp_path / "a.json").write_text(json.dumps(content))
        return CocoDataset(tmp_path / "a.json", tmp_path, True, masks, keypoints=keypoints)

    return call


def config(path, workers: int = 0, *overrides: str):
    """Configuration of small images with keypoints and masks, half of them mirrored."""
    values = ["DATA.PATH", path, "MODEL.MASK_ON", True, "DATALOADER.NUM_WORKERS", workers, "SOLVER.IMS_PER_BATCH", 4]
    values += ["DATALOADER.SIZE_DIVISIBILITY", 32, "INPUT.MIN_SIZE_TRAIN", "(64,)"]
    cfg = get_config(None, [*map(str, values), *overrides]).clone()
    cfg.defrost()
    cfg.MODEL.KEYPOINT_ON = True
    return cfg


# ------------------------------------------------------------------------------------------------- names


def test_sides_change_places_by_name():
    assert named(FACE, "here").mirror == (0, 2, 1)
    assert named(["EyeLeft", "EyeRight", "RIGHT", "LEFT"], "here").mirror == (1, 0, 3, 2)
    # COCO's seventeen, in the pairs that its own paper lists
    assert PERSON.mirror == (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)


def test_a_side_without_the_other_is_told(caplog):
    assert named(["tip", "left_fin"], "fish").mirror == (0, 1)
    assert "fish: keypoint left_fin has no other side" in caplog.text


def test_coco_names_a_person_as_we_do(coco_mini):
    file = json.loads((coco_mini / "annotations" / "person_keypoints_val2017.json").read_text())
    skeleton = of_categories(file["categories"], "file")
    assert skeleton.names == PERSON.names and len(skeleton.limbs) == 19
    assert skeleton.limbs[0] == (15, 13), "COCO counts them from 1: ankle and knee are 16 and 14 there"


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": 1, "name": "cat"}], "none of its categories has `keypoints`"),
        ([CATEGORY, CATEGORY | {"id": 2, "name": "mask", "keypoints": FACE[::-1]}], "face and mask have different"),
        ([CATEGORY | {"keypoints": ["eye", "eye"]}], "different names"),
        ([CATEGORY | {"skeleton": [[0, 1]]}], r"skeleton has \[0, 1\]"),
    ],
)
def test_bad_categories(open_coco, categories, message):
    with pytest.raises(DataError, match=message):
        open_coco(annotation(), categories=categories)


# -------------------------------------------------------------------------------------------------- files


def test_keypoints_of_a_coco_file(open_coco):
    """Objects without any have zeros, and so have points that are not labelled, whatever their x and y."""
    other = annotation(3, category_id=2, keypoints=None)
    dataset = open_coco(
        annotation(),
        annotation(2, keypoints=[9, 9, 0, 5, 4, 1, 3, 3, 2]),
        other,
        categories=[CATEGORY, {"id": 2, "name": "x"}],
    )
    sample = dataset.load(0)
    expected = [[[7, 6, 2], [5, 4, 1], [0, 0, 0]], [[0, 0, 0], [5, 4, 1], [3, 3, 2]], [[0, 0, 0]] * 3]
    assert sample.keypoints.dtype == np.float32 and sample.keypoints.tolist() == expected
    assert sample.keypoint_mirror == (0, 2, 1) and dataset.skeleton.limbs == ((0, 1), (0, 2))
    assert [a.get("keypoints") for a in dataset.annotations(0)] == [
        [7, 6, 2, 5, 4, 1, 0, 0, 0],
        [9, 9, 0, 5, 4, 1, 3, 3, 2],
        None,
    ]


def test_real_keypoints_are_what_the_file_says(coco_mini):
    file = coco_mini / "annotations" / "person_keypoints_train2017.json"
    dataset = CocoDataset(file, coco_mini / "train2017", training=True, masks=False, keypoints=True)
    source = {a["id"]: a["keypoints"] for a in json.loads(file.read_text())["annotations"]}
    seen = 0
    for index in range(len(dataset)):
        objects = [a for a in dataset.annotations(index) if not a["iscrowd"]]
        expected = np.array([source[a["id"]] for a in objects], np.float32).reshape(len(objects), 17, 3)
        np.testing.assert_array_equal(dataset.load(index).keypoints, expected)
        seen += len(objects)
    assert seen > 150


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([1, 2, 2], "annotation id 1 has 3 numbers as keypoints; its categories name 3"),
        (["a"] * 9, "annotation id 1: .* keypoints"),
    ],
)
def test_bad_keypoints_are_refused(open_coco, points, message):
    with pytest.raises(DataError, match=message):
        open_coco(annotation(keypoints=points))


def test_keypoints_without_end_drop_the_object(open_coco):
    dataset = open_coco(annotation(), annotation(2, keypoints=[float("nan"), 1, 2] * 3))
    assert dataset.warnings == {"not_finite": [2]} and dataset.load(0).keypoints.shape == (1, 3, 3)


def test_unless_wanted_they_are_not_kept(open_coco):
    dataset = open_coco(annotation(), keypoints=False)
    assert dataset.skeleton is None and dataset._objects.keypoints.numel() == 0
    sample = dataset.load(0)
    assert sample.keypoints is None and loader.collate([sample], 0, ())[1].keypoints is None


def test_parts_must_have_the_same_keypoints(open_coco):
    one, other = open_coco(annotation()), open_coco(annotation(), categories=[CATEGORY | {"keypoints": FACE[::-1]}])
    with pytest.raises(DataError, match="differ in their keypoints: nose, left_eye, right_eye there, right_eye"):
        check_same_keypoints(one, other)


class Faces:
    """As torchvision's references write a data set with keypoints: a face, and an image without."""

    keypoint_names = FACE
    classes = ("face",)

    def __init__(self, **target) -> None:
        self.target = target

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index):
        points = torch.tensor([[[7.0, 6, 2], [5, 4, 1], [9, 9, 0]], [[1.0, 1, 2]] * 3])
        target = {"boxes": torch.tensor([[2.0, 3, 12, 11], [0, 0, 5, 5]]), "labels": torch.ones(2), "keypoints": points}
        target |= {"iscrowd": torch.tensor([0, 1])}
        return torch.zeros(3, 20, 30), {k: v[: 2 - 2 * index] for k, v in target.items()} | self.target


def test_keypoints_of_a_python_data_set():
    dataset = ItemDataset(Faces(), "faces", training=True, masks=False, keypoints=True)
    sample = dataset.load(0)
    assert sample.keypoints.tolist() == [[[7, 6, 2], [5, 4, 1], [0, 0, 0]]] and sample.keypoint_mirror == (0, 2, 1)
    assert dataset.load(1).keypoints.shape == (0, 3, 3)
    assert ItemDataset(Faces(), "faces", training=True, masks=False).load(0).keypoints is None


@pytest.mark.parametrize(
    ("target", "names", "message"),
    [
        ({"keypoints": torch.zeros(2, 5, 3)}, FACE, r"keypoints \(2, 5, 3\), but must have \(2, 3, 3\)"),
        ({}, None, r"must have \(2, 17, 3\): give the data set a list `keypoint_names`"),
        ({"keypoints": torch.full((2, 3, 3), float("inf"))}, FACE, "NaN or infinite"),
    ],
)
def test_bad_keypoints_of_a_python_data_set(target, names, message):
    items = Faces(**target)
    items.keypoint_names = names
    with pytest.raises(DataError, match=message):
        ItemDataset(items, "faces", training=True, masks=False, keypoints=True).load(0)


def test_missing_keypoints_of_a_python_data_set():
    item = (torch.zeros(3, 4, 4), {"boxes": [[0, 0, 1, 1]], "labels": [1]})
    with pytest.raises(DataError, match=r"no keypoints, but MODEL\.KEYPOINT_ON"):
        ItemDataset([item], "items", training=True, masks=False, keypoints=True).load(0)


# ---------------------------------------------------------------------------------------- transforms, batches


@pytest.mark.parametrize("name", ["RandomHorizontalFlip", "RandomVerticalFlip"])
def test_a_mirror_by_hand(open_coco, name):
    """20 x 30 mirrored: x becomes 30 - x or y 20 - y, as boxes' corners do, and the eyes change places."""
    sample = Compose([{"type": name, "prob": 1.0}])(open_coco(annotation()).load(0), np.random.default_rng(0))
    if name == "RandomHorizontalFlip":
        assert sample.boxes.tolist() == [[18, 3, 28, 11]]
        assert sample.keypoints.tolist() == [[[23, 6, 2], [0, 0, 0], [25, 4, 1]]]
    else:
        assert sample.boxes.tolist() == [[2, 9, 12, 17]]
        assert sample.keypoints.tolist() == [[[7, 14, 2], [0, 0, 0], [5, 16, 1]]]


def test_what_is_pasted_over_a_keypoint_hides_it():
    def square(left: float, points: list) -> Sample:
        polygon = np.array([[left, 2], [left + 6, 2], [left + 6, 8], [left, 8]], np.float32)
        polygons = Polygons.pack([[polygon]])
        image, labels = np.full((10, 20, 3), int(left), np.uint8), np.ones(1, np.int64)
        keypoints = np.array([points], np.float32)
        return Sample(image, 1, 0, (10, 20), polygons.bounds(), labels, polygons, keypoints=keypoints)

    below = square(2, [[3, 4, 2], [7, 4, 2], [7, 5, 1], [0, 0, 0]])
    pasted = paste(below, square(6, [[7, 4, 2], [19, 9, 2], [0, 0, 0], [8, 8, 1]]))
    assert pasted.keypoints[0].tolist() == [[3, 4, 2], [7, 4, 1], [7, 5, 1], [0, 0, 0]]
    assert pasted.keypoints[1].tolist() == [[7, 4, 2], [19, 9, 2], [0, 0, 0], [8, 8, 1]]


def test_collate_pads_keypoints():
    def sample(count: int) -> Sample:
        points = np.random.default_rng(count).uniform(0, 9, (count, 5, 3)).astype(np.float32)
        boxes, labels = np.ones((count, 4), np.float32), np.ones(count, np.int64)
        return Sample(np.zeros((8, 8, 3), np.uint8), count, 0, (8, 8), boxes, labels, keypoints=points)

    samples = [sample(2), sample(0), sample(3)]
    _, targets = loader.collate(samples, 0, (), bucketed=True)
    assert targets.keypoints.shape == (3, 8, 5, 3) and targets.keypoints.dtype == torch.float32
    for row, one in enumerate(samples):
        np.testing.assert_array_equal(targets.keypoints[row, : len(one.boxes)], one.keypoints)
        assert not targets.keypoints[row, len(one.boxes) :].any()
    assert loader.collate([sample(0)], 0, ())[1].keypoints.shape == (1, 1, 5, 3)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_through_workers_forked_and_spawned(coco_mini):
    """Real people, resized and mirrored: the same batches from every kind of worker, and each keypoint is where the
    file has it, through the same map as the box."""
    dataset = build_dataset(("keypoints_coco_2017_train",), config(coco_mini), training=True)

    def batches(workers: int) -> list:
        return list(itertools.islice(loader.train_loader(config(coco_mini, workers), dataset, CPU, 0, 1, 0), 8))

    alone = batches(0)
    before = multiprocessing.get_start_method()
    others = [batches(2)]
    try:
        multiprocessing.set_start_method("spawn", force=True)
        others.append(batches(1))
    finally:
        multiprocessing.set_start_method(before, force=True)
    for one, other in zip(alone * 2, itertools.chain(*others)):
        assert one[0].image_ids == other[0].image_ids and torch.equal(one[1].keypoints, other[1].keypoints)
    mirrored = checked = 0
    for images, targets in alone:
        for row, image_id in enumerate(images.image_ids):
            sample = dataset.load(dataset.image_ids.index(image_id))
            count = int(targets.valid[row].sum())
            assert count == len(sample.boxes)
            boxes, points = targets.boxes[row, :count].numpy(), targets.keypoints[row, :count].numpy()
            (height, width), (h, w) = images.sizes[row].tolist(), sample.size
            expected = sample.keypoints * (width / w, height / h, 1)
            flipped = expected[:, list(PERSON.mirror)] * (-1, 1, 1) + (width, 0, 0)
            flipped *= flipped[..., 2:] > 0
            is_mirror = count and not np.allclose(boxes, sample.boxes * np.tile([width / w, height / h], 2), atol=1e-2)
            np.testing.assert_allclose(points, flipped if is_mirror else expected, atol=1e-2)
            mirrored, checked = mirrored + bool(is_mirror), checked + bool(count)
    assert 0 < mirrored < checked


def test_a_python_data_set_through_the_loader(monkeypatch):
    module = types.ModuleType("face_data")
    module.Faces = Faces
    monkeypatch.setitem(sys.modules, "face_data", module)
    cfg = config("", 0, "MODEL.MASK_ON", "False", "INPUT.HORIZONTAL_FLIP_PROB_TRAIN", "1.0")
    dataset = build_dataset(("face_data:Faces",), cfg, training=True)
    for images, targets in itertools.islice(loader.train_loader(cfg, dataset, CPU, 0, 1, 0), 1):
        assert sorted(images.image_ids) == [0, 0, 1, 1]
        row = images.image_ids.index(0)
        scale = 64 / 20
        expected = np.array([[30 - 7, 6, 2], [0, 0, 0], [30 - 5, 4, 1]]) * (scale, scale, 1)
        np.testing.assert_allclose(targets.keypoints[row, 0], expected, rtol=1e-5)
        assert not targets.keypoints[images.image_ids.index(1)].any()
