"""`benchmark.py data`: the loader alone, with its workers; and its stages one by one in this process."""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from yacs.config import CfgNode

from ..config import flat, sha256
from ..data.catalog import build_dataset
from ..data.loader import collate, train_loader
from ..data.synthetic import generate
from ..data.transforms import build_transforms
from ..device import Device
from ..engine import distributed
from .results import metric
from .steps import DATA, Phases, measure, over_ranks, step_metrics


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
