"""Samplers and loaders: every image, in an order that depends on nothing but seed, epoch and ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.data import loader
from maskrcnn_benchmark.data.catalog import build_dataset
from maskrcnn_benchmark.data.coco import CocoDataset
from maskrcnn_benchmark.data.samplers import InferenceSampler, TrainSampler
from maskrcnn_benchmark.data.transfer import transfer
from maskrcnn_benchmark.data.transforms import Compose, Polygons, Sample, offsets_of
from maskrcnn_benchmark.device import Device, get_device
from maskrcnn_benchmark.errors import ConfigError, DataError
from maskrcnn_benchmark.structures import BitmapBatch, ImageBatch, PolygonBatch

CPU = get_device("cpu")

# --------------------------------------------------------------------------------------------- samplers


def sizes_of(portrait: list[bool]) -> np.ndarray:
    return np.array([(20, 10) if tall else (10, 20) for tall in portrait])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=40),
    st.integers(1, 6),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 5),
)
def test_train_sampler(portrait, batch_size, world_size, grouping, epoch):
    sizes = sizes_of(portrait)
    ranks = [TrainSampler(sizes, batch_size, rank, world_size, 3, grouping) for rank in range(world_size)]
    batches = [sampler.epoch(epoch) for sampler in ranks]
    assert {len(of_rank) for of_rank in batches} == {ranks[0].batches_per_epoch}, "ranks of unequal length"
    every = [batch for of_rank in batches for batch in of_rank]
    assert all(len(batch) == batch_size for batch in every)
    seen = Counter(itertools.chain.from_iterable(every))
    assert set(seen) == set(range(len(sizes))), "an image is missing, or there is one too many"
    if grouping:
        assert all(len({portrait[index] for index in batch}) == 1 for batch in every)
    again = TrainSampler(sizes, batch_size, 0, world_size, 3, grouping)
    again.epoch(epoch + 1)
    assert again.epoch(epoch) == batches[0], "an epoch depends on what was drawn before"
    groups = len(set(portrait)) if grouping else 1
    assert sum(seen.values()) < len(sizes) + groups * batch_size + world_size * batch_size


def test_train_sampler_shuffles_by_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[list[int]]:
        return TrainSampler(sizes_of([False] * 50), 2, 0, 1, seed, True).epoch(epoch)

    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0) and order(0, 0) == order(0, 0)
    assert sorted(itertools.chain.from_iterable(order(0, 0))) == list(range(50)), "each image once when it divides"


def test_one_image_and_a_batch_of_four():
    assert TrainSampler(sizes_of([True]), 4, 1, 2, 0, True).epoch(0) == [[0, 0, 0, 0]]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 9))
def test_inference_sampler_gives_each_image_once(n, batch_size, world_size):
    shards = [InferenceSampler(n, batch_size, rank, world_size) for rank in range(world_size)]
    every = [index for shard in shards for batch in shard for index in batch]
    assert sorted(every) == list(range(n))
    assert all(1 <= len(batch) <= batch_size for shard in shards for batch in shard)
    assert all(len(list(shard)) == len(shard) for shard in shards)


def test_21_images_on_2_ranks():
    lengths = [sum(len(batch) for batch in InferenceSampler(21, 4, rank, 2)) for rank in range(2)]
    assert lengths == [11, 10]


# ---------------------------------------------------------------------------------------------- collate


def sample_of(height: int, width: int, count: int, masks: str = "polygons") -> Sample:
    """`count` objects, each a rectangle and a triangle of its own."""
    rng = np.random.default_rng(count)
    points = rng.uniform(0, min(height, width), (count * 7, 2)).astype(np.float32)
    polygons = Polygons(points, offsets_of(np.tile([4, 3], count)), offsets_of(np.full(count, 2)))
    image = rng.integers(1, 256, (height, width, 3), np.uint8)
    boxes = rng.uniform(0, 9, (count, 4)).astype(np.float32)
    sample = Sample(image, 100 + count, count, (5, 6), boxes, np.arange(1, count + 1), polygons)
    if masks == "bitmaps":
        sample.bitmaps, sample.polygons = polygons.rasterize(height, width), None
    return sample


def test_collate_pads():
    samples = [sample_of(20, 33, 2), sample_of(31, 17, 0), sample_of(9, 9, 3)]
    images, targets = loader.collate(samples, 32, ())
    assert images.pixels.shape == (3, 3, 32, 64) and images.pixels.dtype == torch.uint8
    assert images.pixels.is_contiguous(memory_format=torch.channels_last)
    assert images.sizes.tolist() == [[20, 33], [31, 17], [9, 9]] and images.sizes.dtype == torch.int64
    assert images.image_ids == [102, 100, 103] and images.original_sizes == [(5, 6)] * 3
    for row, sample in enumerate(samples):
        height, width = sample.size
        pixels = images.pixels[row].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(pixels[:height, :width], sample.image)
        assert pixels.sum() == sample.image.sum(), "the padding is not zero"
        assert targets.valid[row].tolist() == [i < len(sample.boxes) for i in range(3)]
        np.testing.assert_array_equal(targets.boxes[row, : len(sample.boxes)], sample.boxes)
        assert targets.labels[row].tolist() == [*sample.labels, *[0] * (3 - len(sample.labels))]
    masks = targets.masks
    assert isinstance(masks, PolygonBatch) and masks.instance_offsets.shape == (3 * 3 + 1,)
    assert masks.instance_offsets.tolist() == [0, 2, 4, 4, 4, 4, 4, 6, 8, 10]
    for row, instance in ((0, 0), (0, 1), (2, 0), (2, 2)):
        first, last = masks.instance_offsets[row * 3 + instance : row * 3 + instance + 2].tolist()
        for number, polygon in zip(range(first, last), samples[row].polygons.of(instance)):
            start, end = masks.polygon_offsets[number : number + 2].tolist()
            np.testing.assert_array_equal(masks.points[start:end], polygon)


def test_collate_without_divisibility_and_without_masks():
    sample = sample_of(20, 33, 2)
    sample.polygons = None
    images, targets = loader.collate([sample], 0, ())
    assert images.pixels.shape == (1, 3, 20, 33) and targets.masks is None


def test_collate_of_images_without_objects():
    _, targets = loader.collate([sample_of(8, 8, 0)] * 2, 32, ())
    assert targets.boxes.shape == (2, 1, 4) and not targets.valid.any()
    assert targets.masks.points.shape == (0, 2) and targets.masks.instance_offsets.tolist() == [0, 0, 0]
    _, targets = loader.collate([sample_of(8, 8, 0, "bitmaps")], 32, ())
    assert targets.masks.bitmaps.shape == (1, 1, 32, 32)


def test_collate_of_polygons_beside_bitmaps():
    polygons, bitmaps = sample_of(20, 33, 2), sample_of(31, 17, 1, "bitmaps")
    _, targets = loader.collate([polygons, bitmaps], 32, ())
    assert isinstance(targets.masks, BitmapBatch) and targets.masks.bitmaps.shape == (2, 2, 32, 64)
    drawn = polygons.polygons.rasterize(20, 33)
    np.testing.assert_array_equal(targets.masks.bitmaps[0, :, :20, :33], drawn)
    np.testing.assert_array_equal(targets.masks.bitmaps[1, :1, :31, :17], bitmaps.bitmaps)
    assert targets.masks.bitmaps.sum() == drawn.sum() + bitmaps.bitmaps.sum()


def test_fixed_shapes():
    shapes = ((64, 96), (96, 64), (128, 128))
    assert loader.collate([sample_of(60, 90, 1)], 32, shapes)[0].pixels.shape[2:] == (64, 96)
    assert loader.collate([sample_of(90, 60, 1)], 32, shapes)[0].pixels.shape[2:] == (96, 64)
    assert loader.collate([sample_of(60, 90, 1), sample_of(90, 60, 1)], 32, shapes)[0].pixels.shape[2:] == (128, 128)
    with pytest.raises(DataError, match=r"INPUT.FIXED_SHAPES .*200 x 60 .*101"):
        loader.collate([sample_of(200, 60, 1)], 32, shapes)


# ---------------------------------------------------------------------------------------------- loaders


def config(path, workers: int = 0, batch: int = 2, *overrides):
    """Small images, masks on, several short sides and flips, so that augmentation shows."""
    values = {
        "DATA.PATH": path,
        "MODEL.MASK_ON": True,
        "DATALOADER.NUM_WORKERS": workers,
        "DATALOADER.SIZE_DIVISIBILITY": 32,
        "SOLVER.IMS_PER_BATCH": batch,
        "INPUT.MIN_SIZE_TRAIN": (64, 96, 128),
        "INPUT.MIN_SIZE_TEST": 64,
    }
    return get_config(None, [*(str(x) for pair in values.items() for x in pair), *map(str, overrides)])


def first_batches(cfg, dataset, count: int, rank: int = 0, world_size: int = 1, start: int = 0) -> list:
    return list(itertools.islice(loader.train_loader(cfg, dataset, CPU, rank, world_size, start), count))


def assert_equal_batches(one: list, other: list) -> None:
    assert len(one) == len(other)
    for (images_a, targets_a), (images_b, targets_b) in zip(one, other):
        assert images_a.image_ids == images_b.image_ids and images_a.original_sizes == images_b.original_sizes
        for a, b in [
            (images_a.pixels, images_b.pixels),
            (images_a.sizes, images_b.sizes),
            (targets_a.boxes, targets_b.boxes),
            (targets_a.labels, targets_b.labels),
            (targets_a.valid, targets_b.valid),
            *zip(vars(targets_a.masks).values(), vars(targets_b.masks).values()),
        ]:
            assert torch.equal(a, b)


@pytest.fixture(scope="module")
def mini(coco_mini) -> CocoDataset:
    return build_dataset(("coco_2017_train",), config(coco_mini), training=True)


@pytest.fixture(scope="module")
def reference(coco_mini, mini) -> list:
    """The first batches without any worker, over the end of the first epoch."""
    return first_batches(config(coco_mini, batch=8), mini, 14)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_do_not_change_the_batches(coco_mini, mini, reference, workers):
    assert_equal_batches(first_batches(config(coco_mini, workers, batch=8), mini, 14), reference)


@pytest.fixture
def spawned():
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_spawned_workers(coco_mini, mini, reference, spawned):
    """Two of them, as macOS and Windows start them: the data set is pickled."""
    assert_equal_batches(first_batches(config(coco_mini, 2, batch=8), mini, 4), reference[:4])


MIRRORING = dataclasses.replace(CPU, mirrors_images=True)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_device_mirrors_what_workers_leave_to_it(coco_mini, mini, reference, workers, monkeypatch):
    left = []
    mirrored = ImageBatch.mirrored
    monkeypatch.setattr(ImageBatch, "mirrored", lambda self, where: left.append(where) or mirrored(self, where))
    batches = loader.train_loader(config(coco_mini, workers, batch=8), mini, MIRRORING, 0, 1, 0)
    batches = list(itertools.islice(batches, 14))
    assert 30 < int(sum(where.sum() for where in left)) < 82, "of 112 images half"
    for (images, _), (images_b, _) in zip(reference, batches):
        assert images_b.to_mirror is None
        # OpenCV's fixed-point interpolation is not quite the same from right to left
        assert (images.pixels.int() - images_b.pixels.int()).abs().max() <= 1
        images_b.pixels = images.pixels
    assert_equal_batches(reference, batches)


@pytest.mark.parametrize(
    ("after", "left"),
    [
        ([{"type": "ResizeByShort", "short_size": 64}, {"type": "Padding", "coarsest_stride": 32}], True),
        ([{"type": "RandomVerticalFlip", "prob": 1}, {"type": "ResizeByShort", "short_size": 64}], True),
        ([{"type": "RandomCrop"}], False),
        ([{"type": "RandomHorizontalFlip", "prob": 1}], True),
        ([lambda sample, rng: sample], False),
    ],
)
def test_pixels_are_left_to_mirror_where_nothing_looks_at_them(after, left):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 60, 3), np.uint8)
    sample = Sample(image, 1, 0, (40, 60), np.array([[1, 2, 30, 20]], np.float32), np.array([1]))
    compose = Compose([{"type": "RandomHorizontalFlip", "prob": 1}, *after])
    expected = compose(sample, np.random.default_rng(1))
    compose.leave_mirroring()
    found = compose(sample, np.random.default_rng(1))
    batch, _ = loader.collate([found], 32, ())
    twice = isinstance(after[0], dict) and after[0]["type"] == "RandomHorizontalFlip"
    assert (batch.to_mirror is not None) == (left and not twice)
    if batch.to_mirror is not None:
        batch = batch.mirrored(batch.to_mirror)
    reference, _ = loader.collate([expected], 32, ())
    assert (batch.pixels.int() - reference.pixels.int()).abs().max() <= 1
    np.testing.assert_array_equal(found.boxes, expected.boxes)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_iteration_can_be_the_first(coco_mini, mini, reference, workers):
    per_epoch = loader.train_loader(config(coco_mini, batch=8), mini, CPU, 0, 1, 0).iterations_per_epoch
    assert 10 <= per_epoch < 13, "the reference must reach the second epoch"
    for start in (3, per_epoch, per_epoch + 1):
        batches = first_batches(config(coco_mini, workers, batch=8), mini, 14 - start, start=start)
        assert_equal_batches(batches, reference[start:])


def test_augmentation_differs_between_epochs_images_and_seeds(coco_mini, mini):
    cfg = config(coco_mini, 0, 1)
    per_epoch = loader.train_loader(cfg, mini, CPU, 0, 1, 0).iterations_per_epoch
    two_epochs = first_batches(cfg, mini, 2 * per_epoch)
    shorts: dict[int, list[int]] = {}
    for images, _ in two_epochs:
        shorts.setdefault(images.image_ids[0], []).append(int(images.sizes.min()))
    assert {short for drawn in shorts.values() for short in drawn} == {64, 96, 128}
    assert any(first != second for first, second in shorts.values())
    other = first_batches(config(coco_mini, 0, 1, "SEED", -5), mini, 8)
    assert [i.image_ids for i, _ in other] != [i.image_ids for i, _ in two_epochs[:8]]


def test_ranks_share_the_epoch(coco_mini, mini):
    """Two ranks with half the batch each: together every image, and no two alike."""
    cfg = config(coco_mini, 0, 4)
    loaders = [loader.train_loader(cfg, mini, CPU, rank, 2, 0) for rank in range(2)]
    assert loaders[0].iterations_per_epoch == loaders[1].iterations_per_epoch
    jobs = [list(itertools.islice(one._jobs(), one.iterations_per_epoch)) for one in loaders]
    assert {index for job in jobs[0] + jobs[1] for index in job[2]} == set(range(80))
    places = [first + k for of_rank in jobs for _, first, indices in of_rank for k in range(len(indices))]
    assert sorted(places) == list(range(len(places))), "two samples of an epoch would be augmented alike"
    images, _ = first_batches(cfg, mini, 1, rank=1, world_size=2)[0]
    assert len(images) == 2


def test_micro_batches(coco_mini, mini):
    cfg = config(coco_mini, 0, 12, "SOLVER.ACCUMULATE_STEPS", 3)
    assert len(first_batches(cfg, mini, 1, world_size=2)[0][0]) == 2
    with pytest.raises(ConfigError, match=r"SOLVER.IMS_PER_BATCH 12 .* 5 ranks x SOLVER.ACCUMULATE_STEPS 3"):
        loader.train_loader(cfg, mini, CPU, 0, 5, 0)


def test_loading_draws_no_global_random_numbers(coco_mini, mini):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first_batches(config(coco_mini, 1), mini, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_inference_loader_gives_each_image_once(coco_mini, workers, world_size):
    cfg = config(coco_mini, workers, 2, "TEST.IMS_PER_BATCH", 13)
    dataset = build_dataset(("coco_2017_val",), cfg, training=False)
    ids, seen = [], []
    for rank in range(world_size):
        batches = loader.test_loader(cfg, dataset, CPU, rank, world_size)
        shard = list(batches)
        assert len(shard) == len(batches)
        assert all(len(images) == len(indices) <= 13 // world_size for images, indices in shard)
        ids += [image_id for images, _ in shard for image_id in images.image_ids]
        seen += [index for _, indices in shard for index in indices]
    assert sorted(seen) == list(range(79)) and ids == [dataset.image_ids[index] for index in seen]


def test_share_of_images_without_objects(coco_mini, tmp_path):
    (tmp_path / "annotations").mkdir()
    persons = coco_mini / "annotations" / "person_keypoints_train2017.json"
    (tmp_path / "annotations" / "instances_train2017.json").symlink_to(persons)
    (tmp_path / "train2017").symlink_to(coco_mini / "train2017")
    for ratio, expected in ((1.0, 80), (0.0, 36), (0.25, 47)):
        cfg = config(tmp_path, 0, 1, "DATALOADER.EMPTY_IMAGE_RATIO", ratio)
        dataset = build_dataset(("coco_2017_train",), cfg, training=True)
        batches = loader.train_loader(cfg, dataset, CPU, 0, 1, 0)
        assert batches.iterations_per_epoch == expected
        seen = {job[2][0] for job in itertools.islice(batches._jobs(), expected)}
        assert seen >= set(np.flatnonzero(dataset.counts).tolist()) and len(seen) == expected


# ------------------------------------------------------------------------------------------ what goes wrong


@pytest.fixture
def damaged(tmp_path, coco_mini) -> CocoDataset:
    """Three images, the last of them cut short."""
    for number in (1, 2, 3):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{number}.jpg")
    (tmp_path / "3.jpg").write_bytes((tmp_path / "3.jpg").read_bytes()[:-30])
    images = [{"id": n, "file_name": f"{n}.jpg", "height": 30, "width": 40} for n in (1, 2, 3)]
    ann = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "segmentation": [[1, 1, 9, 1, 9, 9]]}
    content = {"images": images, "annotations": [ann], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    return CocoDataset(tmp_path / "a.json", tmp_path, training=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_error_of_a_worker_is_the_same_one_line(damaged, workers):
    with pytest.raises(DataError, match=r"3\.jpg \(image id 3\)") as caught:
        first_batches(config("", workers, 1), damaged, 4)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert not multiprocessing.active_children(), "workers outlive the error for as long as somebody holds it"


def test_defects_of_ours_keep_their_traceback(damaged, monkeypatch):
    monkeypatch.setattr(CocoDataset, "load", lambda self, index: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        first_batches(config("", 0, 1), damaged, 1)


def test_killed_worker(coco_mini, mini):
    batches = iter(loader.train_loader(config(coco_mini, 1), mini, CPU, 0, 1, 0))
    next(batches)
    handler = signal.getsignal(signal.SIGCHLD)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()  # the main process goes on undisturbed: only asking for batches raises
    with pytest.raises(DataError, match=r"worker died.*NUM_WORKERS.*/dev/shm"):
        for _ in range(50):
            next(batches)
    assert signal.getsignal(signal.SIGCHLD) == handler == signal.SIG_DFL


def test_worker_killed_while_it_hands_a_batch_over(coco_mini, mini, monkeypatch):
    """Its connections are gone a moment before it is dead, and torch finds it alive."""
    monkeypatch.setattr(multiprocessing.reduction, "send_handle", lambda connection, *_: connection.close())
    with pytest.raises(DataError, match=r"worker died.*NUM_WORKERS.*/dev/shm"):
        first_batches(config(coco_mini, 1), mini, 1)


def test_full_shared_memory(coco_mini, mini, monkeypatch):
    """What torch raises when /dev/shm is full reaches the main process as one line, instead of a wait without end."""

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(DataError, match=r"shared memory.*--shm-size.*No space left"):
        first_batches(config(coco_mini, 1), mini, 1)


SMALL_SHM = """
import sys
from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.data import loader
from maskrcnn_benchmark.data.catalog import build_dataset
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.errors import DataError

def attempt(make):
    try:
        next(iter(make()))
        print("fine")
    except DataError as error:
        print(error)

if __name__ == "__main__":
    for workers in "2", "0":
        keys = ["DATA.PATH", sys.argv[1], "SOLVER.IMS_PER_BATCH", "8", "DATALOADER.NUM_WORKERS", workers]
        cfg = get_config(None, [*keys, "MODEL.MASK_ON", "True"])
        dataset = build_dataset(("coco_2017_train",), cfg, training=True)
        attempt(lambda: loader.train_loader(cfg, dataset, get_device("cpu"), 0, 1, 0))
        attempt(lambda: loader.test_loader(cfg, dataset, get_device("cpu"), 0, 1))
"""


def test_small_shared_memory_is_found_before_training(coco_mini, tmp_path):
    """As docker gives it, but smaller: 8 MB, where one batch of 8 images at short side 800 takes 25 MB."""
    (tmp_path / "small.py").write_text(SMALL_SHM)
    mount = 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$@"'
    own = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*own, mount, "sh", "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a small /dev/shm")
    command = [*own, mount, "sh", sys.executable, str(tmp_path / "small.py"), str(coco_mini)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    training, testing, *alone = done.stdout.splitlines()
    for line in (training, testing):
        assert re.search(r"workers need \d+ MB of shared memory, but /dev/shm has 8 MB left: .*--shm-size", line)
    assert alone == ["fine", "fine"], "without workers nothing is shared"


def test_bytes_of_test_batches_by_hand():
    """At short side 50 a 100 x 200 image is 50 x 100, padded to 32: 64 x 128; a 200 x 100 one 128 x 64."""
    cfg = config("", 0, 2, "INPUT.MIN_SIZE_TEST", 50, "INPUT.MAX_SIZE_TEST", 100)
    sizes = np.array([[100, 200], [200, 100], [200, 100]])
    assert loader._largest_test_batch(cfg, sizes, [[0], [1]]) == 64 * 128 * 3
    assert loader._largest_test_batch(cfg, sizes, [[0, 1], [2]]) == 2 * 128 * 128 * 3
    fixed = config("", 0, 2, "INPUT.FIXED_SHAPES", "((64, 32), (32, 64))")
    assert loader._largest_test_batch(fixed, sizes, [[0, 1], [2]]) == 2 * 64 * 32 * 3


def test_no_process_is_left_behind(coco_mini, mini):
    batches = iter(loader.train_loader(config(coco_mini, 2), mini, CPU, 0, 1, 0))
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    batches.close()
    for worker in workers:
        worker.join(10)
    assert not multiprocessing.active_children()


# ---------------------------------------------------------------------------------------------- to the device


class Queues:
    """A device module with streams: what is queued where, in the order in which it is queued. Marks are numbered."""

    def __init__(self) -> None:
        self.told, self.place, self.marks = [], "compute", itertools.count()

    def Stream(self) -> QueueStream:
        return QueueStream("copies", self)

    def current_stream(self) -> QueueStream:
        return QueueStream(self.place, self)

    @contextlib.contextmanager
    def stream(self, stream: QueueStream):
        self.place = stream.name
        yield
        self.place = "compute"


@dataclasses.dataclass
class QueueStream:
    name: str
    queues: Queues

    def wait_stream(self, other: QueueStream) -> None:
        self.queues.told.append(f"{self.name} waits for {other.name}")

    def wait_event(self, mark: QueueMark) -> None:
        self.queues.told.append(f"{self.name} waits for copy {mark.number}")


class QueueMark:
    def __init__(self, queues: Queues) -> None:
        self.queues, self.number = queues, next(queues.marks)

    def record(self) -> None:
        self.queues.told.append(f"copy {self.number} on {self.queues.place}")

    def synchronize(self) -> None:
        self.queues.told.append(f"host waits for copy {self.number}")


@dataclasses.dataclass(frozen=True)
class QueueDevice(Device):
    queues: Queues = dataclasses.field(default_factory=Queues)

    @property
    def module(self) -> Queues:
        return self.queues

    def event(self) -> QueueMark:
        return QueueMark(self.queues)


@pytest.mark.parametrize("pinned", [True, False])
def test_the_next_batch_is_copied_beside_the_computation(pinned):
    """A batch is waited for when it is handed out, so that the step before does not wait for its copy; its memory is
    that of an older one, so its copy waits for the steps queued before it."""
    device = QueueDevice(CPU.torch_device, pinned_memory=pinned)
    batches = [loader.collate([sample_of(20, 30, 1)], 32, ()) for _ in range(4)]
    told = device.queues.told
    for step, (images, _) in enumerate(transfer(iter(batches), device)):
        assert torch.equal(images.pixels, batches[step][0].pixels)
        assert images.pixels.data_ptr() != batches[step][0].pixels.data_ptr(), "workers fill that memory again"
        told.append(f"step {step}")
    place = "copies" if pinned else "compute"
    expected = [
        *("copies waits for compute", f"copy 0 on {place}", "copies waits for compute", f"copy 1 on {place}"),
        *("compute waits for copy 0", "step 0"),
        *("copies waits for compute", f"copy 2 on {place}", "host waits for copy 0"),
        *("compute waits for copy 1", "step 1"),
        *("copies waits for compute", f"copy 3 on {place}", "host waits for copy 1"),
        *("compute waits for copy 2", "step 2", "compute waits for copy 3", "step 3"),
    ]
    waits = ("copies waits", "compute waits")
    assert told == [line for line in expected if pinned or not line.startswith(waits)]


def test_an_epoch_of_mixed_images_has_two_shapes(coco_mini, mini):
    """INPUT.FIXED_SHAPES in the proportions of 800 x 1344, at an eighth of the size: portrait and landscape images come
    in batches of their own, so that each fits in one of the two."""
    shapes = ((96, 168), (168, 96))
    sizes = ("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MAX_SIZE_TRAIN", "160")
    cfg = config(coco_mini, 0, 4, "INPUT.FIXED_SHAPES", str(shapes), *sizes, "DATALOADER.SIZE_DIVISIBILITY", "8")
    batches = loader.train_loader(cfg, mini, CPU, 0, 1, 0)
    seen = [tuple(images.pixels.shape[2:]) for images, _ in itertools.islice(batches, batches.iterations_per_epoch)]
    assert set(seen) == set(shapes)
