"""The generated data set, and the tool that writes it."""

from __future__ import annotations

import json
import stat

import numpy as np
import pytest
from pycocotools.coco import COCO

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.data.catalog import build_dataset
from maskrcnn_benchmark.data.synthetic import CATEGORIES, generate
from maskrcnn_benchmark.errors import DataError


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    directory = tmp_path_factory.mktemp("synthetic") / "shapes"
    generate(directory, train_images=40, val_images=4, size=(96, 128), seed=5)
    return directory


def test_layout_is_cocos(generated):
    assert sorted(p.name for p in generated.iterdir()) == ["annotations", "train2017", "val2017"]
    cfg = get_config(None, ["DATA.PATH", str(generated), "MODEL.MASK_ON", "True"])
    for name, count in (("coco_2017_train", 40), ("coco_2017_val", 4)):
        dataset = build_dataset((name,), cfg, training=True)
        assert len(dataset) == count and dataset.warnings == {}
        assert dataset.category_ids == list(CATEGORIES) and dataset.category_names == list(CATEGORIES.values())
        assert all(dataset.load(index).size == (96, 128) for index in range(count))
    assert stat.S_IMODE(generated.stat().st_mode) & 0o055 == 0o055, "others cannot read it"


def test_annotations_are_consistent(generated, capsys):
    reference = COCO(str(generated / "annotations" / "instances_train2017.json"))
    labels = set()
    for image_id in reference.imgs:
        annotations = reference.loadAnns(reference.getAnnIds(imgIds=[image_id]))
        assert len(annotations) <= 6
        masks = [reference.annToMask(a) for a in annotations]
        for a, mask in zip(annotations, masks):
            points = np.concatenate(a["segmentation"]).reshape(-1, 2)
            low, high = points.min(axis=0), points.max(axis=0)
            np.testing.assert_allclose(a["bbox"], [*low, *(high - low)])
            assert (low >= 0).all() and (high <= (128, 96)).all()
            assert a["area"] == mask.sum() >= 25 and a["iscrowd"] == 0
            labels.add(a["category_id"])
        # What is hidden belongs to the one in front: only edge pixels are shared.
        shared = sum(mask.astype(int) for mask in masks) if masks else np.zeros(1, int)
        assert (shared > 1).sum() <= 0.03 * max(1, (shared > 0).sum()) + 4
    assert labels == set(CATEGORIES)
    areas = [a["area"] for a in reference.anns.values()]
    assert min(areas) < 150 and max(areas) > 1500, "sizes should range from small to large"


def test_masks_lie_on_the_shapes(generated):
    """Every shape differs from what surrounds its mask, inside from outside, by more than the noise."""
    cfg = get_config(None, ["DATA.PATH", str(generated), "MODEL.MASK_ON", "True"])
    dataset = build_dataset(("coco_2017_train",), cfg, training=True)
    contrasts = []
    for index in range(len(dataset)):
        sample = dataset.load(index)
        masks = sample.polygons.rasterize(*sample.size).astype(bool)
        background = sample.image[~masks.any(axis=0)].mean(axis=0)
        contrasts += [np.linalg.norm(sample.image[mask].mean(axis=0) - background) for mask in masks]
    assert np.min(contrasts) > 25 and np.median(contrasts) > 100


def test_same_seed_same_files(tmp_path, generated):
    generate(tmp_path / "again", 40, 4, (96, 128), seed=5)
    generate(tmp_path / "other", 3, 1, (96, 128), seed=6)
    files = sorted(p.relative_to(generated) for p in generated.rglob("*") if p.is_file())
    assert len(files) == 46
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    for file in files:
        assert (generated / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    one = "train2017/000000000001.jpg"
    assert (tmp_path / "other" / one).read_bytes() != (generated / one).read_bytes()
    assert (generated / one).read_bytes() != (generated / "val2017/000000000001.jpg").read_bytes()


def test_number_of_objects(tmp_path):
    generate(tmp_path / "a", 6, 1, (128, 128), seed=0, objects=(3, 3))
    content = json.loads((tmp_path / "a/annotations/instances_train2017.json").read_text())
    assert np.bincount([a["image_id"] for a in content["annotations"]])[1:].tolist() == [3] * 6


def test_never_overwrites_and_leaves_nothing_half_done(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="not an empty directory"):
        generate(tmp_path / "full", 1, 1, (64, 64), seed=0)
    with pytest.raises(DataError, match="not an empty directory"):
        generate(tmp_path / "full" / "mine.txt", 1, 1, (64, 64), seed=0)
    with pytest.raises(DataError, match="cannot write"):
        generate(tmp_path / "full" / "mine.txt" / "below", 1, 1, (64, 64), seed=0)
    (tmp_path / "empty").mkdir()
    generate(tmp_path / "empty", 1, 1, (64, 64), seed=0)
    assert (tmp_path / "empty" / "train2017").is_dir()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("maskrcnn_benchmark.data.synthetic.draw_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "new", 1, 1, (64, 64), seed=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]


@pytest.mark.parametrize(
    "changes",
    [
        {"train_images": 0},
        {"val_images": -1},
        {"size": (16, 64)},
        {"seed": -1},
        {"objects": (0, 2)},
        {"objects": (3, 2)},
    ],
)
def test_senseless_numbers(tmp_path, changes):
    with pytest.raises(DataError):
        generate(
            **{"output_dir": tmp_path / "a", "train_images": 1, "val_images": 1, "size": (64, 64), "seed": 0} | changes
        )
    assert not list(tmp_path.iterdir())


def test_tool(tmp_path, run):
    arguments = ("--train", 3, "--val", 2, "--size", 64, 96, "--seed", 1)
    result = run("tools/dataset.py", "generate", tmp_path / "a", *arguments)
    assert result.returncode == 0 and "3 training and 2 validation" in result.stdout, result.stderr
    assert len(list((tmp_path / "a" / "train2017").iterdir())) == 3
    assert "generate" in run("tools/dataset.py", "--help").stdout
    assert "--size" in run("tools/dataset.py", "generate", "--help").stdout
    for wrong in (
        ("generate", tmp_path / "a", *arguments),
        ("generate", tmp_path / "b", "--train", "many"),
        ("generate", tmp_path / "b", "--train", "-3"),
        ("generate",),
        ("polish", tmp_path / "b"),
        (),
    ):
        result = run("tools/dataset.py", *wrong)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and not result.stdout, result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
