"""Large annotation files: read one annotation at a time, and held once for all workers."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.data import coco, json_stream, loader
from maskrcnn_benchmark.data.coco import CocoDataset
from maskrcnn_benchmark.data.json_stream import read_elements
from maskrcnn_benchmark.data.slots import Slots
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------------------------------------------- streaming

# Integers of 64 bits: of longer ones orjson makes floats
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(
    content=st.dictionaries(st.text(max_size=5), VALUES | st.lists(VALUES, max_size=6), max_size=5),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
    plain=st.booleans(),
)
def test_elements_are_what_json_reads(tmp_path_factory, content, chunk, indent, plain):
    """Whatever the file holds, and wherever a piece of it ends."""
    file = tmp_path_factory.mktemp("json") / "a.json"
    file.write_text(json.dumps(content, indent=indent, ensure_ascii=plain), encoding="utf-8")
    read: dict = {}
    before, json_stream.CHUNK = json_stream.CHUNK, chunk
    try:
        for key, place, element in read_elements(file):
            if place is None:
                read[key] = element
            else:
                read.setdefault(key, []).append(element)
                assert place == len(read[key]) - 1
    finally:
        json_stream.CHUNK = before
    assert read == content


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"a"', '{"a": [1, 2}', '{"a": [1,]}', '{"a": 1,}', '{"a": [1 2]}', '{"a": 1} x', "{1: 2}", '{"a": [}'],
)
@pytest.mark.parametrize("chunk", [1, 1000])
def test_broken_json_is_refused(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json is not valid JSON") as caught:
        list(read_elements(tmp_path / "a.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("order", [("categories", "annotations", "images"), ("annotations", "images", "categories")])
def test_lists_in_any_order(coco_mini, tmp_path, order):
    file = coco_mini / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    (tmp_path / "a.json").write_text(json.dumps({key: content[key] for key in order}))
    one, other = (CocoDataset(path, coco_mini / "val2017", training=True) for path in (file, tmp_path / "a.json"))
    for name, tensor in vars(one._objects).items():
        assert tensor.equal(getattr(other._objects, name)) or name == "areas"
    assert [one.annotations(i) for i in range(5)] == [other.annotations(i) for i in range(5)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(), max_size=5), max_size=30), st.randoms(), st.integers(1, 7))
def test_take_ragged(groups, random, at_once):
    order = [random.randrange(len(groups)) for _ in groups]
    values = np.array([value % 1000 for group in groups for value in group], np.int64)
    ends = np.cumsum([0, *map(len, groups)])
    before, coco.GROUPS_AT_ONCE = coco.GROUPS_AT_ONCE, at_once
    try:
        taken, offsets = coco.take_ragged(values, ends, np.array(order, np.int64))
    finally:
        coco.GROUPS_AT_ONCE = before
    expected = [[value % 1000 for value in groups[place]] for place in order]
    assert [taken[a:b].tolist() for a, b in pairwise(offsets)] == expected


# ------------------------------------------------------------------------------------------------------- memory

LOAD = """
import resource, sys
from maskrcnn_benchmark.data import coco
coco.check_files = lambda *_: None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dataset = coco.CocoDataset(sys.argv[1], "/", training=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(dataset), int(dataset.counts.sum()))
"""


def big_file(path: Path, images: int, annotations_each: int) -> int:
    """Annotations of 20 corners each; returns the file's size in bytes."""
    polygon = [round(10 + i % 7 + i / 3, 2) for i in range(40)]
    with path.open("w") as file:
        file.write('{"images": ')
        json.dump([{"id": i, "file_name": f"{i}.jpg", "height": 100, "width": 100} for i in range(images)], file)
        file.write(', "annotations": [')
        for number in range(images * annotations_each):
            entry = {"id": number + 1, "image_id": number % images, "category_id": 3, "iscrowd": 0, "area": 50.5}
            entry |= {"bbox": [10, 10, 20, 20], "segmentation": [polygon]}
            file.write((", " if number else "") + json.dumps(entry))
        file.write('], "categories": [{"id": 3, "name": "a"}]}')
    return path.stat().st_size


def test_loading_takes_less_memory_than_the_file_has_bytes(tmp_path):
    """118,287 images of COCO, 495 MB, took 3.2 GB as Python objects; read one by one it stays below the file."""
    size = big_file(tmp_path / "a.json", 2000, 40)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "a.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    grown, images, objects = map(int, done.stdout.split())
    assert (images, objects) == (2000, 80_000)
    assert grown * 1024 < size, f"{grown >> 10} MB for a file of {size >> 20} MB"


def proportional_mb(pid: int) -> float:
    return int(re.search(r"^Pss:\s*(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc/PID/smaps_rollup")
def test_workers_share_the_annotations(tmp_path):
    """Over 4 workers and 3 epochs the memory of all processes together stays what it was after the first batches."""
    big_file(tmp_path / "a.json", 40, 4000)
    for number in range(40):
        cv2.imwrite(str(tmp_path / f"{number}.jpg"), np.zeros((100, 100, 3), np.uint8))
    dataset = CocoDataset(tmp_path / "a.json", tmp_path, training=True)
    held = sum(tensor.nbytes for tensor in vars(dataset._objects).values()) / 2**20
    assert held > 30
    keys = ["SOLVER.IMS_PER_BATCH", "4", "DATALOADER.NUM_WORKERS", "4", "INPUT.MIN_SIZE_TRAIN", "(64,)"]
    batches = iter(
        loader.train_loader(get_config(None, [*keys, "MODEL.MASK_ON", "True"]), dataset, get_device("cpu"), 0, 1, 0)
    )
    for _ in range(10):
        next(batches)
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    assert len(pids) == 5
    before = sum(map(proportional_mb, pids))
    for _ in range(20):
        next(batches)
    grown = sum(map(proportional_mb, pids)) - before
    batches.close()
    assert grown < held, f"{grown:.0f} MB more; one copy of the annotations is {held:.0f} MB, and four would be added"


# -------------------------------------------------------------------------------------------------------- slots


def test_a_slot_is_not_filled_while_its_batch_is_in_use(coco_mini):
    """A batch stays what it was for as long as somebody holds it, however far the workers are."""
    keys = ["DATA.PATH", str(coco_mini), "SOLVER.IMS_PER_BATCH", "4", "DATALOADER.NUM_WORKERS", "2"]
    cfg = get_config(None, [*keys, "INPUT.MIN_SIZE_TRAIN", "(64,)", "MODEL.MASK_ON", "True"])
    dataset = CocoDataset(coco_mini / "annotations/instances_train2017.json", coco_mini / "train2017", training=True)
    held, sums = [], []
    for images, _ in loader.train_loader(cfg, dataset, get_device("cpu"), 0, 1, 0):
        held.append(images)
        sums.append(int(images.pixels.long().sum()))
        if len(held) == 24:  # three times round the slots
            break
    assert [int(images.pixels.long().sum()) for images in held] == sums and len(set(sums)) > 12


def test_slots_hold_the_largest_batch(coco_mini):
    """All batches go through the slots: none is larger than was reckoned before."""
    dataset = CocoDataset(coco_mini / "annotations/instances_train2017.json", coco_mini / "train2017", training=True)
    for extra in ([], ["DATALOADER.ASPECT_RATIO_GROUPING", "False"], ["INPUT.FIXED_SHAPES", "((96, 128), (128, 96))"]):
        keys = ["SOLVER.IMS_PER_BATCH", "4", "INPUT.MIN_SIZE_TRAIN", "(64, 80)", "INPUT.MAX_SIZE_TRAIN", "128"]
        cfg = get_config(None, [*keys, "DATALOADER.SIZE_DIVISIBILITY", "32", *extra])
        batches = loader.train_loader(cfg, dataset, get_device("cpu"), 0, 1, 0)
        most = 0
        for _, (images, _) in zip(range(40), batches):
            most = max(most, images.pixels.nbytes)
        assert 0 < most <= batches.slot_bytes <= 2 * most


def test_slots_by_hand():
    slots = Slots.allocate(2, 12)
    slots.view(0, (2, 2, 3))[:] = 1
    slots.view(1, (1, 2, 3))[:] = 2
    assert slots.memory.tolist() == [[1] * 12, [2] * 6 + [int(x) for x in slots.memory[1, 6:]]]
    assert slots.memory.is_shared() and (slots.view(2, (4, 3)) == 1).all(), "batch 2 has the first slot again"
    other = slots.view(0, (13,))
    assert not slots.holds((13,)) and other.shape == (13,) and not other.is_shared()


def test_pinned_memory_is_released(monkeypatch):
    """Where the device pins the slots it gets them back; where it cannot, batches take the way of torch's loader."""
    device = get_device("cpu")
    log = []
    for pins, expected in ((True, ["pin", "unpin"]), (False, ["pin"])):
        log.clear()
        kind = type("Pinning", (type(device),), {
            "pin": lambda self, memory, pins=pins: log.append("pin") or pins,
            "unpin": lambda self, memory: log.append("unpin"),
        })  # fmt: skip
        with loader._slots(1, 8, kind(torch.device("cpu"), pinned_memory=True)) as slots:
            assert (slots is not None) == pins
        assert log == expected
