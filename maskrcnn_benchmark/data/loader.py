"""Batches: samples padded into structures, read by worker processes, moved to the device one batch ahead."""

from __future__ import annotations

import math
import random
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from yacs.config import CfgNode

from ..device import Device
from ..errors import ConfigError, DataError, UserError
from ..structures import BitmapBatch, ImageBatch, PolygonBatch, Targets
from .coco import CocoDataset
from .samplers import InferenceSampler, TrainSampler
from .slots import Slots
from .transfer import IN_FLIGHT, transfer
from .transforms import Compose, Sample, build_transforms, offsets_of

# Epoch, place of the batch's first sample in the epoch over all ranks, image indices
Job = tuple[int, int, list[int]]
# Images, targets, and the shape [B, H, W, 3] of the pixels where they lie in the batch's slot instead
Read = tuple[ImageBatch, Targets, tuple[int, ...] | None]
# What workers pass batches through on Linux
SHARED_MEMORY = Path("/dev/shm")
# Batches that each worker prepares ahead
PREFETCH = 2
# How long a worker lives on after SIGTERM
LAST_SECONDS = 20


def collate(
    samples: Sequence[Sample],
    size_divisibility: int,
    fixed_shapes: Sequence[tuple[int, int]],
    bucketed: bool = False,
    new_pixels: Callable[[tuple[int, ...]], Tensor] | None = None,
) -> tuple[ImageBatch, Targets]:
    """Samples as one padded batch.

    size_divisibility: height and width are padded to a multiple of it; 0 or 1: to the largest image.
    fixed_shapes: (height, width) pairs; when there are any, the smallest that holds every image is taken instead.
    bucketed: G and the lengths of packed polygons are rounded up to powers of two, at least 8, so that shapes repeat
        from batch to batch. The padding changes no result.
    new_pixels: gives memory for [B, H, W, 3] uint8 of any value; None: fresh memory.
    Pixels are uint8 in channels-last memory. G is the greatest number of objects, at least 1. Masks are polygons, or
    bitmaps for the whole batch when a sample has bitmaps.
    Raises DataError when no fixed shape holds the images.
    """
    height, width = _padded_size(samples, size_divisibility, fixed_shapes)
    shape = (len(samples), height, width, 3)
    # numpy's fresh memory comes in huge pages, with a fifth of the cost of torch's
    pixels = torch.from_numpy(np.empty(shape, np.uint8)) if new_pixels is None else new_pixels(shape)
    most = max(1, *(len(sample.boxes) for sample in samples))
    most = _bucket(most) if bucketed else most
    boxes = np.zeros((len(samples), most, 4), np.float32)
    labels = np.zeros((len(samples), most), np.int64)
    valid = np.zeros((len(samples), most), bool)
    for row, sample in enumerate(samples):
        (h, w), count = sample.size, len(sample.boxes)
        canvas = pixels[row].numpy()
        canvas[:h, :w], canvas[h:], canvas[:h, w:] = sample.image, 0, 0
        boxes[row, :count], labels[row, :count], valid[row, :count] = sample.boxes, sample.labels, True
    images = ImageBatch(
        pixels.permute(0, 3, 1, 2),
        torch.tensor([sample.size for sample in samples]),
        [sample.original_size for sample in samples],
        [sample.image_id for sample in samples],
        torch.tensor([sample.to_mirror for sample in samples]) if any(sample.to_mirror for sample in samples) else None,
    )
    masks = _collate_masks(samples, most, height, width)
    if bucketed and isinstance(masks, PolygonBatch):
        masks = _pad_polygons(masks)
    boxes, labels, valid = torch.from_numpy(boxes), torch.from_numpy(labels), torch.from_numpy(valid)
    return images, Targets(boxes, labels, valid, masks, _collate_keypoints(samples, most))


def _padded_size(
    samples: Sequence[Sample], size_divisibility: int, fixed_shapes: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    height, width = (max(sides) for sides in zip(*(sample.size for sample in samples)))
    if fixed_shapes:
        fitting = [(h, w) for h, w in fixed_shapes if h >= height and w >= width]
        if not fitting:
            raise DataError(
                f"INPUT.FIXED_SHAPES {[tuple(shape) for shape in fixed_shapes]} has no (height, width) for a batch"
                f" of {height} x {width} (image ids {[sample.image_id for sample in samples]})"
            )
        return min(fitting, key=lambda shape: shape[0] * shape[1])
    multiple = max(1, size_divisibility)
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def _collate_masks(samples: Sequence[Sample], most: int, height: int, width: int) -> PolygonBatch | BitmapBatch | None:
    if all(sample.polygons is None and sample.bitmaps is None for sample in samples):
        return None
    if any(sample.bitmaps is not None for sample in samples):
        bitmaps = np.zeros((len(samples), most, height, width), np.uint8)
        for row, sample in enumerate(samples):
            h, w = sample.size
            bitmaps[row, : len(sample.boxes), :h, :w] = sample.drawn()
        return BitmapBatch(torch.from_numpy(bitmaps))
    polygons = [sample.polygons for sample in samples]
    owned = np.zeros((len(samples), most), np.int64)
    for row, p in enumerate(polygons):
        owned[row, : len(p)] = np.diff(p.instance_offsets)
    points_a_polygon = np.concatenate([np.diff(p.polygon_offsets) for p in polygons])
    return PolygonBatch(
        torch.from_numpy(np.concatenate([p.points for p in polygons])),
        torch.from_numpy(offsets_of(points_a_polygon)),
        torch.from_numpy(offsets_of(owned.ravel())),
    )


def _collate_keypoints(samples: Sequence[Sample], most: int) -> Tensor | None:
    if samples[0].keypoints is None:
        return None
    keypoints = np.zeros((len(samples), most, *samples[0].keypoints.shape[1:]), np.float32)
    for row, sample in enumerate(samples):
        keypoints[row, : len(sample.boxes)] = sample.keypoints
    return torch.from_numpy(keypoints)


def _bucket(count: int) -> int:
    """The next of 8, 16, 32, ..."""
    return max(8, 1 << (count - 1).bit_length())


def _pad_polygons(polygons: PolygonBatch) -> PolygonBatch:
    """The same polygons, and behind them points of no polygon and empty polygons of no instance."""
    points, offsets = polygons.points, polygons.polygon_offsets
    more_points, more_polygons = (_bucket(len(tensor)) - len(tensor) for tensor in (points, offsets))
    return PolygonBatch(
        torch.cat([points, points.new_zeros(more_points, 2)]),
        torch.cat([offsets, offsets[-1:].expand(more_polygons)]),
        polygons.instance_offsets,
    )


@dataclass
class BatchReader(Dataset):
    """What a worker does: a job -> a collated batch. Picklable, so that workers may be spawned."""

    dataset: CocoDataset
    transforms: Compose
    size_divisibility: int
    fixed_shapes: tuple[tuple[int, int], ...]
    seed: int
    bucketed: bool = False

    slots: Slots | None = None

    def __getitem__(self, numbered: tuple[int, Job]) -> Read | UserError:
        """An error is returned, not raised: torch would wrap it in a traceback of many lines."""
        number, (epoch, first, indices) = numbered
        try:
            samples = []
            for place, index in enumerate(indices, start=first):
                # Not the worker's generator: then the number of workers would change the images.
                rng = np.random.default_rng((self.seed % 2**63, epoch, place))
                with _seeded(self.seed % 2**63, epoch, place):
                    samples.append(self.transforms(self.dataset.load(index), rng, self._draw, epoch))
            images, targets, shape = self._collate(samples, number)
            if get_worker_info() is not None:
                images, targets = images.share_memory(), targets.share_memory()
            return images, targets, shape
        except UserError as error:
            return error
        except (RuntimeError, OSError) as error:
            # Told here: where shared memory is full, torch's queue would lose the batch and wait forever.
            if "shared memory" not in str(error):
                raise
            return _no_shared_memory(error)

    def _collate(self, samples: Sequence[Sample], number: int) -> Read:
        slots = self.slots
        new_pixels = None if slots is None else partial(slots.view, number)
        images, targets = collate(samples, self.size_divisibility, self.fixed_shapes, self.bucketed, new_pixels)
        shape = tuple(images.pixels.permute(0, 2, 3, 1).shape)
        if slots is None or not slots.holds(shape):
            return images, targets, None
        return replace(images, pixels=torch.empty(0)), targets, shape

    def _draw(self, rng: np.random.Generator) -> Sample:
        """Any image of the data set, for the transforms that mix two."""
        return self.dataset.load(int(rng.integers(len(self.dataset))))


@contextmanager
def _seeded(*seeds: int) -> Iterator[None]:
    """Global generators, for data sets and transforms of others that draw from them: seeded for each image, so that
    ranks and workers differ and a resumed run draws the same. torch's is put back: it is the training step's."""
    seed = int(np.random.SeedSequence((*seeds, 1)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


def _no_shared_memory(error: Exception) -> DataError:
    return DataError(f"a batch does not fit into shared memory: {_SHM_HINT} ({error})")


# What a rank meets that fetches a batch from a worker which has lost its connections and is dead a moment later: torch
# speaks of those only that it finds dead. What a worker itself met begins with "Caught".
_GONE = (ConnectionError, EOFError, FileNotFoundError)
_SHM_HINT = (
    "lower DATALOADER.NUM_WORKERS or the batch size, or enlarge /dev/shm (docker run --shm-size=8g, or --ipc=host)"
)


class TrainLoader:
    """Endless training batches from `start_iteration` on; see train_loader."""

    def __init__(
        self,
        reader: BatchReader,
        sampler: TrainSampler,
        images: np.ndarray,
        workers: int,
        device: Device,
        start: int,
        slot_bytes: int = 0,
    ) -> None:
        self.reader, self.sampler, self.images = reader, sampler, images
        self.workers, self.device, self.start, self.slot_bytes = workers, device, start, slot_bytes
        self.iterations_per_epoch = sampler.batches_per_epoch

    def __iter__(self) -> Iterator[tuple[ImageBatch, Targets]]:
        with _slots(self.workers, self.slot_bytes, self.device) as slots:
            batches = _read(replace(self.reader, slots=slots), self._jobs(), self.workers, self.device)
            yield from transfer(batches, self.device)

    def _jobs(self) -> Iterator[Job]:
        sampler = self.sampler
        epoch, skipped = divmod(self.start, sampler.batches_per_epoch)
        while True:
            for number, batch in enumerate(sampler.epoch(epoch)):
                first = (number * sampler.world_size + sampler.rank) * sampler.batch_size
                if number >= skipped:
                    yield epoch, first, self.images[batch].tolist()
            epoch, skipped = epoch + 1, 0


class InferenceLoader:
    """Each image of this rank's share once; see test_loader."""

    def __init__(self, reader: BatchReader, sampler: InferenceSampler, workers: int, device: Device) -> None:
        self.reader, self.sampler, self.workers, self.device = reader, sampler, workers, device

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[ImageBatch, list[int]]]:
        jobs = ((0, 0, indices) for indices in self.sampler)
        batches = transfer(_read(self.reader, jobs, self.workers, self.device), self.device)
        for (images, _), indices in zip(batches, self.sampler):
            yield images, indices


def train_loader(
    cfg: CfgNode, dataset: CocoDataset, device: Device, rank: int, world_size: int, start_iteration: int
) -> TrainLoader:
    """An iterable without end of (ImageBatch, Targets) on the device, from iteration `start_iteration` on.

    An iteration is one micro-batch: SOLVER.IMS_PER_BATCH / world_size / SOLVER.ACCUMULATE_STEPS images. What it holds
    depends on SEED, the iteration and the ranks alone, not on DATALOADER.NUM_WORKERS.
    Raises ConfigError when the batch cannot be divided; iterating raises DataError (damaged image, dead worker).
    """
    parts = world_size * cfg.SOLVER.ACCUMULATE_STEPS
    if cfg.SOLVER.IMS_PER_BATCH % parts:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is not divisible by {world_size} ranks x"
            f" SOLVER.ACCUMULATE_STEPS {cfg.SOLVER.ACCUMULATE_STEPS}"
        )
    images = _images_to_train(dataset.counts, cfg.DATALOADER.EMPTY_IMAGE_RATIO, cfg.SEED)
    sampler = TrainSampler(
        dataset.sizes[images],
        cfg.SOLVER.IMS_PER_BATCH // parts,
        rank,
        world_size,
        cfg.SEED,
        cfg.DATALOADER.ASPECT_RATIO_GROUPING,
    )
    reader = _reader(cfg, dataset, device, training=True)
    slot = _largest_batch(cfg, dataset.sizes[images]) * 3 * sampler.batch_size
    _check_shared_memory(
        (PREFETCH * cfg.DATALOADER.NUM_WORKERS + IN_FLIGHT) * slot if cfg.DATALOADER.NUM_WORKERS else 0
    )
    return TrainLoader(reader, sampler, images, cfg.DATALOADER.NUM_WORKERS, device, start_iteration, slot)


def test_loader(cfg: CfgNode, dataset: CocoDataset, device: Device, rank: int, world_size: int) -> InferenceLoader:
    """An iterable of (ImageBatch on the device, image indices): over all ranks each image once.

    A batch has TEST.IMS_PER_BATCH / world_size images, rounded down, at least 1.
    """
    sampler = InferenceSampler(len(dataset), max(1, cfg.TEST.IMS_PER_BATCH // world_size), rank, world_size)
    workers = min(cfg.DATALOADER.NUM_WORKERS, len(sampler))
    _check_shared_memory(workers * _largest_test_batch(cfg, dataset.sizes, sampler) if workers else 0)
    return InferenceLoader(_reader(cfg, dataset, device, training=False), sampler, workers, device)


test_loader.__test__ = False  # the name is the interface's; pytest would take it for a test


def _reader(cfg: CfgNode, dataset: CocoDataset, device: Device, training: bool) -> BatchReader:
    transforms = build_transforms(cfg, training)
    if device.mirrors_images:
        transforms.leave_mirroring()
    return BatchReader(
        dataset,
        transforms,
        math.lcm(max(1, cfg.DATALOADER.SIZE_DIVISIBILITY), transforms.size_divisibility),
        tuple(tuple(shape) for shape in cfg.INPUT.FIXED_SHAPES),
        cfg.SEED,
        bucketed=not device.compacts,
    )


def _largest_batch(cfg: CfgNode, sizes: np.ndarray) -> int:
    """Pixels of an image in the largest batch that images of these sizes [N, 2] make; 0 where transforms of the
    configuration's list leave it open."""
    if cfg.INPUT.FIXED_SHAPES:
        return max(height * width for height, width in cfg.INPUT.FIXED_SHAPES)
    if cfg.INPUT.TRANSFORMS:
        return 0
    short, longest = max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN
    padded = _padded(cfg, sizes, short, longest)
    portrait = sizes[:, 0] > sizes[:, 1]
    mixed = not cfg.DATALOADER.ASPECT_RATIO_GROUPING
    groups = [padded] if mixed else [padded[portrait], padded[~portrait]]
    return max(int(group.max(axis=0).prod()) for group in groups if len(group))


def _largest_test_batch(cfg: CfgNode, sizes: np.ndarray, batches: Iterable[list[int]]) -> int:
    """Bytes of the largest of these batches of image indices."""
    if cfg.INPUT.FIXED_SHAPES:
        pixels = max(height * width for height, width in cfg.INPUT.FIXED_SHAPES)
        return 3 * pixels * max((len(batch) for batch in batches), default=0)
    padded = _padded(cfg, sizes, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    return max((3 * len(batch) * int(padded[batch].max(axis=0).prod()) for batch in batches), default=0)


def _padded(cfg: CfgNode, sizes: np.ndarray, short: int, longest: int) -> np.ndarray:
    """[N, 2] height and width of images of these sizes when they are resized, each padded by itself."""
    scale = np.minimum(short / sizes.min(axis=1), longest / sizes.max(axis=1))
    resized = (sizes * scale[:, None] + 0.5).astype(np.int64).clip(1)
    multiple = max(1, cfg.DATALOADER.SIZE_DIVISIBILITY)
    return -(-resized // multiple) * multiple


def _check_shared_memory(needed: int) -> None:
    """Before the first worker starts: else a full /dev/shm is found out when a batch does not fit in, perhaps in the
    second hour. Raises DataError when there are fewer than `needed` bytes."""
    if not needed or not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise DataError(
            f"data workers need {needed / 2**20:.0f} MB of shared memory, but {SHARED_MEMORY} has {free / 2**20:.0f} MB"
            f" left: {_SHM_HINT}"
        )


def _images_to_train(counts: np.ndarray, empty_ratio: float, seed: int) -> np.ndarray:
    """Image indices: all with objects, and a share of those without, the same one on every rank."""
    empty = np.flatnonzero(counts == 0)
    kept = np.random.default_rng(seed % 2**63).permutation(empty)[: round(len(empty) * empty_ratio)]
    return np.sort(np.concatenate([np.flatnonzero(counts), kept]))


def _read(
    reader: BatchReader, jobs: Iterable[Job], workers: int, device: Device
) -> Iterator[tuple[ImageBatch, Targets]]:
    """Batches on the host, in the order of the jobs, pinned where the device wants it."""
    with warnings.catch_warnings():
        # That there are more workers than cores: the configuration says how many
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = _loader(reader, jobs, workers, device)
    try:
        with _keep_child_handler():
            batches = iter(loader)
        for number, batch in enumerate(batches):
            if isinstance(batch, UserError):
                raise batch
            images, targets, shape = batch
            if shape is not None:
                images = replace(images, pixels=reader.slots.view(number, tuple(shape)).permute(0, 3, 1, 2))
            yield images, targets
    except (RuntimeError, *_GONE) as error:
        noticed = str(error).startswith("DataLoader worker")
        if workers and (noticed or (isinstance(error, _GONE) and not str(error).startswith("Caught "))):
            raise DataError(f"a data worker died, perhaps out of memory; {_SHM_HINT}: {error}") from error
        raise
    finally:
        batches = None  # ends the workers now: a traceback may keep this frame for long


def _loader(reader: BatchReader, jobs: Iterable[Job], workers: int, device: Device) -> DataLoader:
    return DataLoader(
        reader,
        batch_size=None,
        sampler=enumerate(jobs),
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=_start_worker,
        pin_memory=device.pinned_memory,
        generator=torch.Generator(),  # or torch's global one is drawn from, and the run's random numbers shift
    )


def _as_it_is(batch):
    return batch


def _start_worker(number: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then ends the workers
    # torchrun sends SIGTERM to the workers too, but their rank still finishes a step with the main one, which saves
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LAST_SECONDS))


@contextmanager
def _keep_child_handler() -> Iterator[None]:
    """torch's handler for dead workers raises wherever the main thread happens to be, in the middle of a checkpoint
    too. Without it the reader notices, within 5 seconds."""
    handler = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)


@contextmanager
def _slots(workers: int, bytes_each: int, device: Device) -> Iterator[Slots | None]:
    """Memory for the batches that are on their way at once, pinned while it is used; None where nobody would share it,
    or the device wants pinned memory and cannot pin this."""
    if not workers or not bytes_each:
        yield None
        return
    try:
        slots = Slots.allocate(PREFETCH * workers + IN_FLIGHT, bytes_each)
    except (RuntimeError, OSError) as error:
        raise _no_shared_memory(error) from error
    pinned = device.pinned_memory and device.pin(slots.memory)
    try:
        yield slots if pinned or not device.pinned_memory else None
    finally:
        if pinned:
            device.synchronize()  # copies from it may be queued
            device.unpin(slots.memory)
