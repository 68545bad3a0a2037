"""`benchmark.py data`: the loader alone, with its workers; and its stages one by one in this process."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from yacs.config import CfgNode

from ..config import flat, sha256
from ..data.catalog import build_dataset
from ..data.coco import CocoDataset
from ..data.loader import collate, train_loader
from ..data.synthetic import generate
from ..data.transforms import build_transforms
from ..device import Device
from ..engine import distributed
from ..errors import UserError
from .data_peers import PEERS
from .results import metric
from .steps import DATA, Phases, measure, over_ranks, step_metrics
from .timing import Plan, interleave, ratio_of_medians


def run(cfg: CfgNode, device: Device, steps: int, warmup: int) -> dict[str, Any] | None:
    """The case of SOLVER.IMS_PER_BATCH images of DATASETS.TRAIN a step; on the main rank, None on the others."""
    started = time.perf_counter()
    dataset = build_dataset(cfg.DATASETS.TRAIN, cfg, training=True)
    loader = train_loader(cfg, dataset, device, distributed.rank(), distributed.world_size(), 0)
    batches = iter(loader)
    init = time.perf_counter() - started
    share = cfg.SOLVER.IMS_PER_BATCH // distributed.world_size()
    device.reset_peak_memory()
    clocks = [device.clocks()]
    whole = measure({"": {DATA: lambda _: next(batches)}}, device, warmup, steps, 0)[""]
    clocks.append(device.clocks())
    memory = device.max_memory_mb()
    batches.close()  # its workers must not run beside the stages
    whole.phases = measure({"": stages(cfg, device, dataset, share)}, device, warmup, 1, steps)[""].phases
    parts = distributed.gather((whole, memory, clocks))
    if parts is None:
        return None
    metrics = step_metrics(over_ranks([part[0] for part in parts]), cfg.SOLVER.IMS_PER_BATCH, len(parts))
    metrics["max_memory_mb"] = metric([max(part[1] for part in parts)], "MB", gate=False)  # without its workers'
    metrics["init_seconds"] = metric([init], "s", gate=False)
    workers = cfg.DATALOADER.NUM_WORKERS
    return {
        "name": f"data {'+'.join(cfg.DATASETS.TRAIN)} batch {cfg.SOLVER.IMS_PER_BATCH} workers {workers}",
        "kind": "data",
        "dtype": "uint8",
        "config_sha256": sha256(cfg),
        "config": flat(cfg),
        "warmup": warmup,
        "work": {"data": "real", "constant": False, "batch": cfg.SOLVER.IMS_PER_BATCH, "images": len(dataset)},
        "metrics": metrics,
        "clocks": [part[2] for part in parts],
    }


def run_synthetic(
    cfg: CfgNode, device: Device, steps: int, warmup: int, images: int, size: tuple[int, int]
) -> dict[str, Any] | None:
    """The same with so many drawn images of `size` (height, width), in a temporary place, for DATASETS.TRAIN."""
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as directory:
        generate(Path(directory) / "shapes", images, 1, size, seed=0)
        drawn = cfg.clone()
        drawn.defrost()
        drawn.merge_from_list(["DATA.PATH", str(Path(directory) / "shapes"), "DATASETS.TRAIN", ("coco_2017_train",)])
        case = run(drawn, device, steps, warmup)
    if case is not None:
        batch, workers = cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS
        case |= {"name": f"data synthetic {size[0]}x{size[1]} batch {batch} workers {workers}"}
        case |= {"config_sha256": sha256(cfg), "config": flat(cfg)}  # without the temporary place
        case["work"] |= {"data": "synthetic", "constant": True, "image": list(size)}
    return case


def stages(cfg: CfgNode, device: Device, dataset, batch: int) -> Phases:
    """What the loader does to a batch, in one process: read and decode, transform, collate, copy to the device."""
    transforms = build_transforms(cfg, training=True)
    images = itertools.cycle(range(len(dataset)))
    rng = np.random.default_rng(cfg.SEED % 2**63)
    shapes = tuple(tuple(shape) for shape in cfg.INPUT.FIXED_SHAPES)
    divisibility, bucketed = cfg.DATALOADER.SIZE_DIVISIBILITY, not device.compacts
    return {
        "read": lambda _: [dataset.load(next(images)) for _ in range(batch)],
        "transform": lambda samples: [transforms(sample, rng) for sample in samples],
        "collate": lambda samples: collate(samples, divisibility, shapes, bucketed),
        "copy": lambda parts: [part.to(device.torch_device) for part in parts],
    }


def run_against(cfg: CfgNode, peers: Sequence[str], batch: int, steps: int, warmup: int) -> dict[str, Any]:
    """The case of training samples that one thread makes from files, ours and the peers' in turns: decoded, resized to
    INPUT.MIN_SIZE_TRAIN, flipped, with their masks. A round is `batch` images, the same for all sides.

    Raises UserError where the transforms are not those that the peers have, or there are several data sets.
    """
    dataset = build_dataset(cfg.DATASETS.TRAIN, cfg, training=True)
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    if cfg.INPUT.TRANSFORMS or len(sizes) != 1 or cfg.INPUT.HORIZONTAL_FLIP_PROB_TRAIN != 0.5 or not cfg.MODEL.MASK_ON:
        raise UserError(
            "--against: the peers resize to one short side, flip half of the images and read masks: set one"
            " INPUT.MIN_SIZE_TRAIN, HORIZONTAL_FLIP_PROB_TRAIN 0.5 and MODEL.MASK_ON True, and leave TRANSFORMS empty"
        )
    if not isinstance(dataset, CocoDataset):
        raise UserError("--against: the peers read one whole COCO data set: name one in DATASETS.TRAIN")
    transforms, rng = build_transforms(cfg, training=True), np.random.default_rng(cfg.SEED % 2**63)
    sides = {"ours": lambda index: transforms(dataset.load(index), rng)}
    sides |= {name: PEERS[name](dataset, sizes[0], cfg.INPUT.MAX_SIZE_TRAIN) for name in peers}
    cv2.setNumThreads(0)  # as in a worker
    torch.set_num_threads(1)
    rounds = {name: itertools.cycle(range(len(dataset))) for name in sides}
    functions = {
        name: lambda name=name, make=make: [make(index) for index in itertools.islice(rounds[name], batch)]
        for name, make in sides.items()
    }
    samples = interleave(functions, lambda: None, Plan(warmup=warmup, repeats=steps))
    metrics = {
        f"{name}_images_per_second": metric([batch / ns * 1e9 for ns in times], "images/s", "higher")
        for name, times in samples.items()
    }
    return {
        "name": f"one worker's samples {'+'.join(cfg.DATASETS.TRAIN)} short side {sizes[0]}",
        "kind": "data",
        "dtype": "uint8",
        "config_sha256": sha256(cfg),
        "warmup": warmup,
        "work": {"data": "real", "constant": False, "batch": batch, "images": len(dataset)},
        "metrics": metrics,
        "ratios": {name: ratio_of_medians(samples[name], samples["ours"]) for name in peers},
    }


def summary_against(case: dict[str, Any]) -> list[str]:
    lines = [f"{case['name']}, one thread, images/s:"]
    for name, content in case["metrics"].items():
        side = name.removesuffix("_images_per_second")
        line = f"  {side:12} {content['p50']:7.1f}"
        if side in case["ratios"]:
            ratio, low, high = case["ratios"][side]
            line += f"   ours {ratio:.1f} times as fast, 95% interval {low:.1f}..{high:.1f}"
        lines.append(line)
    return lines


def summary(case: dict[str, Any]) -> list[str]:
    value = {name: content["p50"] for name, content in case["metrics"].items()}
    parts = [f"{name.removesuffix('_ms')} {value[name]:.1f}" for name in value if name.endswith("_ms")]
    return [
        case["name"],
        f"  {value['images_per_second_overall']:.1f} images/s over the pass, median of the batches"
        f" {value['images_per_second']:.1f}; first batch after {value['compile_seconds']:.2f} s",
        f"  a batch, ms, whole with workers and by stage in one process ({torch.get_num_threads()} threads):"
        f" {'  '.join(parts)}",
    ]
