"""Data sets written in Python: the class of torchvision's tutorial, unchanged, from the names of the configuration to a
trained and evaluated model."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.data import catalog
from maskrcnn_benchmark.data.items import ItemDataset, from_python
from maskrcnn_benchmark.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]

# As the tutorial has it, with shorter names
TUTORIAL = """
import os
import numpy as np
import torch
from PIL import Image

class PennFudanDataset(object):
    def __init__(self, root, transforms):
        self.root = root
        self.transforms = transforms
        self.imgs = list(sorted(os.listdir(os.path.join(root, "PNGImages"))))
        self.masks = list(sorted(os.listdir(os.path.join(root, "PedMasks"))))

    def __getitem__(self, idx):
        img = Image.open(os.path.join(self.root, "PNGImages", self.imgs[idx])).convert("RGB")
        mask = np.array(Image.open(os.path.join(self.root, "PedMasks", self.masks[idx])))
        obj_ids = np.unique(mask)[1:]
        masks = mask == obj_ids[:, None, None]
        boxes = []
        for i in range(len(obj_ids)):
            pos = np.where(masks[i])
            boxes.append([np.min(pos[1]), np.min(pos[0]), np.max(pos[1]), np.max(pos[0])])
        boxes = torch.as_tensor(boxes, dtype=torch.float32)
        target = {
            "boxes": boxes,
            "labels": torch.ones((len(obj_ids),), dtype=torch.int64),
            "masks": torch.as_tensor(masks, dtype=torch.uint8),
            "image_id": torch.tensor([idx]),
            "area": (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 2] - boxes[:, 0]),
            "iscrowd": torch.zeros((len(obj_ids),), dtype=torch.int64),
        }
        if self.transforms is not None:
            img, target = self.transforms(img, target)
        return img, target

    def __len__(self):
        return len(self.imgs)
"""


@pytest.fixture
def penn_fudan(tmp_path) -> Path:
    """Six pictures of one or two bright rectangles each."""
    root = tmp_path / "PennFudanPed"
    rng = np.random.default_rng(0)
    for directory in ("PNGImages", "PedMasks"):
        (root / directory).mkdir(parents=True)
    for number in range(6):
        pixels, mask = rng.integers(0, 90, (96, 64, 3), np.uint8), np.zeros((96, 64), np.uint8)
        for value in range(1, 2 + number % 2):
            x, y = 5 + 30 * (value - 1), 10 + 5 * number
            pixels[y : y + 40, x : x + 20], mask[y : y + 40, x : x + 20] = 220, value
        Image.fromarray(pixels).save(root / "PNGImages" / f"P{number}.png")
        Image.fromarray(mask).save(root / "PedMasks" / f"P{number}_mask.png")
    (tmp_path / "my_data.py").write_text(TUTORIAL, encoding="utf-8")
    return tmp_path


def test_the_tutorials_class_trains_unchanged(penn_fudan, tiny_config):
    names = "('my_data:PennFudanDataset[:4]',)", "('my_data:PennFudanDataset[4:]',)"
    command = [
        sys.executable,
        str(ROOT / "tools" / "train_net.py"),
        "--config-file",
        str(tiny_config),
        "--device",
        "cpu",
    ]
    command += ["DATA.PATH", "PennFudanPed", "DATASETS.TRAIN", names[0], "DATASETS.TEST", names[1]]
    command += ["MODEL.ROI_BOX_HEAD.NUM_CLASSES", "2", "OUTPUT_DIR", "out", "SOLVER.MAX_ITER", "3"]
    command += ["SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "1"]
    done = subprocess.run(command, cwd=penn_fudan, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = (penn_fudan / "out" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line).get("loss_mask", 1) > 0 for line in lines)
    result = json.loads((penn_fudan / "out" / "result.json").read_text())
    assert 0 <= result["bbox"]["AP"] <= 1 and 0 <= result["segm"]["AP"] <= 1
    assert len(list((penn_fudan / "out" / "predictions").glob("*.png"))) == 2


def test_same_objects_as_the_format(penn_fudan, monkeypatch):
    """The tutorial's boxes end on the last pixel, ours behind it; all else is the same."""
    monkeypatch.chdir(penn_fudan)
    monkeypatch.setattr(sys, "path", list(sys.path))
    cfg = get_config(
        None, ["DATA.PATH", "PennFudanPed", "MODEL.MASK_ON", "True", "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "2"]
    )
    written = catalog.build_dataset(("my_data:PennFudanDataset",), cfg, True)
    read = catalog.build_dataset(("penn_fudan://.",), cfg, True)
    assert written.counts.tolist() == read.counts.tolist() == [1, 2, 1, 2, 1, 2]
    np.testing.assert_array_equal(written.sizes, read.sizes)
    for index in range(6):
        ours, theirs = read.load(index), written.load(index)
        np.testing.assert_array_equal(ours.image, theirs.image)
        np.testing.assert_array_equal(ours.bitmaps, theirs.bitmaps)
        np.testing.assert_array_equal(ours.boxes, theirs.boxes + np.array([0, 0, 1, 1]))
        ours, theirs = read.annotations(index), written.annotations(index)
        assert [a["segmentation"] for a in ours] == [a["segmentation"] for a in theirs]
    truth = written.ground_truth()
    assert truth["categories"] == [{"id": 1, "name": "1"}] and len(truth["images"]) == 6
    assert len({a["id"] for a in truth["annotations"]}) == len(truth["annotations"]) == 9
    assert truth["annotations"][0]["area"] == 19 * 39, "the area is the target's"
    sys.modules.pop("my_data")


class Items:
    """Two images: one object and a crowd; none."""

    classes = ("__background__", "cat", "dog")

    def __init__(self, **target) -> None:
        self.target, self.reads = target, 0

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index):
        self.reads += 1
        image = torch.linspace(0, 1, 3 * 20 * 30).reshape(3, 20, 30)
        masks = torch.zeros(2, 20, 30, dtype=torch.bool)
        masks[0, 5:15, 10:20] = True
        masks[1, :5] = True
        boxes = torch.tensor([[10.0, 5, 20, 15], [0, 0, 30, 5]])
        target = {"boxes": boxes, "labels": torch.tensor([2, 1]), "masks": masks, "iscrowd": torch.tensor([0, 1])}
        if index:
            target = {key: value[:0] for key, value in target.items()}
        return image, target | self.target


class Sized(Items):
    def get_height_and_width(self, index):
        return 20, 30 + index


def test_crowds_empty_images_and_names():
    dataset = ItemDataset(Items(), "items", training=True, masks=True)
    assert dataset.category_names == ["cat", "dog"] and dataset.num_classes == 3
    assert dataset.counts.tolist() == [1, 0] and dataset.sizes.tolist() == [[20, 30], [20, 30]]
    sample = dataset.load(0)
    assert sample.boxes.tolist() == [[10, 5, 20, 15]] and sample.labels.tolist() == [2]
    assert sample.image.dtype == np.uint8 and sample.image[0, 0, 0] == 0 and sample.image[-1, -1, -1] == 255
    assert sample.bitmaps.shape == (1, 20, 30) and sample.bitmaps.sum() == 100
    assert dataset.load(1).boxes.shape == (0, 4) and dataset.load(1).bitmaps.shape == (0, 20, 30)
    entries = dataset.annotations(0)
    assert [(a["category_id"], a["iscrowd"], a["area"]) for a in entries] == [(2, 0, 100), (1, 1, 150)]
    assert coco_mask.decode(entries[1]["segmentation"])[:5].all()
    assert dataset.annotations(1) == []


def test_sizes_without_reading():
    items = Sized()
    dataset = ItemDataset(items, "items", training=True, masks=False)
    assert items.reads == 0 and dataset.sizes.tolist() == [[20, 30], [20, 31]]
    half = torch.utils.data.Subset(items, [1])
    dataset = ItemDataset(half, "half", training=True, masks=False)
    assert items.reads == 0 and dataset.sizes.tolist() == [[20, 31]] and dataset.category_names == ["cat", "dog"]


def test_classes_from_the_configuration_or_the_labels():
    items = Items()
    items.classes = None
    assert ItemDataset(items, "items", False, False, num_classes=5).category_names == ["1", "2", "3", "4"]
    assert ItemDataset(items, "items", False, False).category_names == ["1", "2"]


def test_keypoints_are_kept():
    points = torch.tensor([[[11.0, 6, 2], [12, 7, 1]], [[1, 1, 0], [2, 2, 0]]])
    entries = ItemDataset(Items(keypoints=points), "items", False, True).annotations(0)
    assert entries[0]["keypoints"] == [11, 6, 2, 12, 7, 1]


def test_a_box_without_area_is_dropped():
    boxes = torch.tensor([[10.0, 5, 10, 15], [0, 0, 30, 5]])
    assert len(ItemDataset(Items(boxes=boxes), "items", True, True).load(0).boxes) == 0


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"labels": torch.tensor([2, 0])}, r"item 0 has labels 0\.\.2, but must have 1\.\.2"),
        ({"labels": torch.tensor([3, 1])}, r"labels 1\.\.3"),
        ({"labels": torch.tensor([1])}, "2 boxes, but 1 labels"),
        ({"boxes": torch.tensor([[0, 0, float("nan"), 1]] * 2)}, "NaN"),
        ({"masks": torch.zeros(2, 5, 5)}, r"masks \(2, 5, 5\), but must have \(2, 20, 30\)"),
    ],
)
def test_bad_targets(target, message):
    with pytest.raises(DataError, match=message):
        ItemDataset(Items(**target), "items", training=True, masks=True).load(0)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.zeros(3, 4, 4), "item 0 must be"),
        ((torch.full((3, 4, 4), 2.5), {}), r"2\.5, but must have 0\.\.1"),
        ((torch.zeros(4, 4), {}), "PIL image or a"),
        ((torch.zeros(3, 4, 4), {"labels": [1]}), "has no boxes"),
    ],
)
def test_bad_items(item, message):
    with pytest.raises(DataError, match=message):
        ItemDataset([item], "items", training=True, masks=False).load(0)


def test_masks_are_wanted_but_missing():
    item = (torch.zeros(3, 4, 4), {"boxes": [[0, 0, 1, 1]], "labels": [1]})
    with pytest.raises(DataError, match=r"no masks, but MODEL\.MASK_ON"):
        ItemDataset([item], "items", training=True, masks=True).load(0)


def test_what_a_name_stands_for(monkeypatch):
    module = types.ModuleType("some_data")
    module.without = lambda: "made"
    module.root = lambda folder, transform, target_transform=3: (folder, transform, target_transform)
    module.more = lambda root, split: None
    module.ready = [1]
    monkeypatch.setitem(sys.modules, "some_data", module)
    assert from_python("some_data:without", "DIR") == "made"
    assert from_python("some_data:root", "DIR") == ("DIR", None, 3)
    assert from_python("some_data:ready", "DIR") is module.ready
    with pytest.raises(ConfigError, match=r"needs root, split.*write a function"):
        from_python("some_data:more", "DIR")
