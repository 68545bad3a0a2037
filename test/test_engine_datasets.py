"""Data sets of several ranks: one reads the files, all have the same, and all meet the same error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from maskrcnn_benchmark.data.catalog import CATALOG, add, is_sendable
from maskrcnn_benchmark.data.coco import CocoDataset

SCRIPT = """
import os, sys
from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.data import coco
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.engine import distributed
from maskrcnn_benchmark.engine.datasets import open_dataset
from maskrcnn_benchmark.errors import DataError

root, other, classes = sys.argv[1:]
with distributed.process_group(get_device("cpu")):
    path = root if distributed.is_main() else other  # where a rank other than the first would look for files
    cfg = get_config(None, ["DATA.PATH", path, "MODEL.ROI_BOX_HEAD.NUM_CLASSES", classes, "MODEL.MASK_ON", "True"])
    try:
        dataset = open_dataset(("coco_2017_train[2:]",), cfg, training=True)
        sample = dataset.load(1)
        line = f"{len(dataset)} {sample.image.sum()} {sample.boxes.sum():.3f} {len(sample.polygons.points)}"
    except Exception as error:
        line = f"{type(error).__name__} {error}"
    print("".join([line, chr(10)]), end="", flush=True)
"""


@pytest.fixture
def on_two_ranks(run, tmp_path):
    def call(*arguments: object) -> list[str]:
        (tmp_path / "ranks.py").write_text(SCRIPT)
        done = run(str(tmp_path / "ranks.py"), *arguments, ranks=2, env={"PYTHONPATH": str(Path(__file__).parents[1])})
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()

    return call


def test_the_main_rank_reads_for_all(on_two_ranks, shapes, tmp_path):
    """The second rank is told of a directory that is not there, and has the objects and images all the same."""
    first, second = on_two_ranks(shapes, tmp_path / "nowhere", 6)
    dataset = CocoDataset(shapes / "annotations" / "instances_train2017.json", shapes / "train2017", training=True)
    sample = dataset.load(3)
    assert first == second == f"10 {sample.image.sum()} {sample.boxes.sum():.3f} {len(sample.polygons.points)}"


@pytest.mark.parametrize(("classes", "words"), [(6, "DataError"), (9, "ConfigError")])
def test_an_error_of_the_main_rank_is_everyones(on_two_ranks, shapes, tmp_path, classes, words):
    """No rank waits for a data set that will not come; here the second could have read the files."""
    root = tmp_path / "nowhere" if words == "DataError" else shapes
    first, second = on_two_ranks(root, shapes, classes)
    assert first == second and first.startswith(words)


def test_only_what_comes_from_files_is_sent(monkeypatch):
    monkeypatch.setattr(sys.modules["maskrcnn_benchmark.data.catalog"], "CATALOG", dict(CATALOG))
    add("mine", "images", "a.json", type("Mine", (CocoDataset,), {}))
    add("plain", "images", "a.json")
    names = ["coco_2017_train[:5]", "voc://VOC2012?split=train", "plain", "mine[:3]", "my_data:Faces[5:]"]
    assert [is_sendable(name) for name in names] == [True, True, True, False, False]
