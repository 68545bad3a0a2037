"""`benchmark.py eval`: COCO evaluation of synthetic detections, with each engine, after they agreed on every number."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from ..device import get_device
from ..errors import UserError
from ..evaluation.coco import evaluate
from ..evaluation.results import concatenate, detections_to_results
from ..structures import Detections, ImageBatch
from .cases import random_boxes
from .results import metric
from .timing import quiet_garbage_collector

ENGINES = ("hotcoco", "pycocotools")
# From results in COCO's format; and both tasks from detections as the model gives them, masks pasted and encoded too
TASKS = ("bbox", "segm", "detections")
SIZE = (480, 640)
# As COCO's validation set: categories, objects of an image
CATEGORIES, OBJECTS = 80, 7
CORNERS = 12
# Images a step, side of a predicted mask
BATCH, SIDE = 8, 28
SAME = 1e-6


def synthetic(images: int, detections: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth and results in COCO's form: `OBJECTS` an image, found more or less exactly, and stray detections."""
    random = np.random.default_rng(0)
    truth: dict[str, Any] = {
        "images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, CATEGORIES + 1)],
        "annotations": [],
    }
    results: list[dict[str, Any]] = []
    for image in truth["images"]:
        boxes = random_boxes(random, OBJECTS, *SIZE, 12, 300)
        labels = random.integers(1, CATEGORIES + 1, OBJECTS)
        for box, label in zip(boxes, labels):
            number = len(truth["annotations"]) + 1
            one = _object(image["id"], int(label), box)
            truth["annotations"].append(
                one | {"id": number, "iscrowd": 0, "area": float(coco_mask.area(one["segmentation"]))}
            )
        which = random.integers(OBJECTS, size=detections)
        near = boxes[which] + random.normal(0, 4, (detections, 4))
        found = np.where(random.random((detections, 1)) < 0.3, near, random_boxes(random, detections, *SIZE, 12, 300))
        corner = np.clip(found[:, :2], 0, [SIZE[1] - 2, SIZE[0] - 2])
        found = np.concatenate([corner, np.clip(found[:, 2:], corner + 1, [SIZE[1], SIZE[0]])], 1)
        for box, label, score in zip(found, labels[which], random.random(detections)):
            results.append(_object(image["id"], int(label), box) | {"score": float(score)})
    return truth, results


def _object(image_id: int, label: int, box: np.ndarray) -> dict[str, Any]:
    """The ellipse in the box, as an RLE."""
    x1, y1, x2, y2 = box.astype(np.float64)
    angle = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    x, y = (x1 + x2) / 2 + np.cos(angle) * (x2 - x1) / 2, (y1 + y2) / 2 + np.sin(angle) * (y2 - y1) / 2
    rle = coco_mask.frPyObjects([np.stack([x, y], 1).ravel().tolist()], *SIZE)[0]
    return {
        "image_id": image_id,
        "category_id": label,
        "bbox": [float(side) for side in (x1, y1, x2 - x1, y2 - y1)],
        "segmentation": rle | {"counts": rle["counts"].decode()},
    }


def detected(results: list[dict[str, Any]], detections: int) -> list[tuple[Detections, ImageBatch]]:
    """The results as a model gives them, batch by batch; every mask is a blob that fills its box. All batches share one
    tensor of masks: half a million would take 1.6 GB."""
    y = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
    blob = torch.from_numpy(1 / (1 + np.exp(12 * (y[:, None] ** 2 + y**2) - 11))).float()
    masks = blob.expand(BATCH, detections, SIDE, SIDE).contiguous()
    batches, a_batch = [], BATCH * detections
    for start in range(0, len(results), a_batch):
        part = results[start : start + a_batch]
        ids = [result["image_id"] for result in part[::detections]]
        boxes = torch.tensor([result["bbox"] for result in part]).view(len(ids), detections, 4)
        found = Detections(
            boxes=torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], 2),
            scores=torch.tensor([result["score"] for result in part]).view(len(ids), detections),
            labels=torch.tensor([result["category_id"] for result in part]).view(len(ids), detections),
            valid=torch.ones(len(ids), detections, dtype=torch.bool),
            masks=masks[: len(ids)],
        )
        sizes = [SIZE] * len(ids)
        batches.append((found, ImageBatch(torch.empty(len(ids), 3, 0, 0), torch.tensor(sizes), sizes, ids)))
    return batches


def score(
    task: str, engine: str, truth: dict[str, Any], results: list[dict[str, Any]], batches: list
) -> dict[str, dict[str, Any]]:
    """What is timed: `evaluate`'s numbers of one of TASKS."""
    if task != "detections":
        return evaluate(truth, results, (task,), engine)
    categories = [category["id"] for category in truth["categories"]]
    parts = [detections_to_results(found, images, categories) for found, images in batches]
    return evaluate(truth, concatenate(parts), ("bbox", "segm"), engine)


def run(images: int, detections: int, engines: Sequence[str], repeats: int, warmup: int) -> list[dict[str, Any]]:
    """A case for each task and engine; the engines take turns.

    Raises:
        UserError: an engine is not there, or they disagree.
    """
    if "hotcoco" in engines:
        try:
            import hotcoco  # noqa: F401  (evaluate would let pycocotools serve in its place)
        except ImportError as error:
            raise UserError(f"--engine hotcoco: it is not here ({error}); pip install hotcoco") from None
    device, started = get_device("cpu"), time.perf_counter()
    truth, results = synthetic(images, detections)
    batches = detected(results, detections)
    init = time.perf_counter() - started
    samples: dict[tuple[str, str], list[float]] = {(task, engine): [] for task in TASKS for engine in engines}
    memory = dict.fromkeys(samples, 0.0)
    scores: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    clocks = [device.clocks()]
    with quiet_garbage_collector():
        for _ in range(warmup + repeats):
            for (task, engine), seconds in samples.items():
                device.reset_peak_memory()
                started = time.perf_counter()
                scores[task, engine] = score(task, engine, truth, results, batches)
                seconds.append(time.perf_counter() - started)
                memory[task, engine] = max(memory[task, engine], device.max_memory_mb())
    clocks.append(device.clocks())
    for task in TASKS:
        check_same({engine: scores[task, engine] for engine in engines})
    return [
        {
            "name": f"eval {task} {engine} {images} images {detections} detections",
            "kind": "eval",
            "dtype": "float64",
            "config_sha256": None,
            "warmup": warmup,
            "work": {"images": images, "detections": len(results), "objects": len(truth["annotations"])},
            "scores": {name: list(scores[task, engine].values())[-1][name] for name in ("AP", "AP50", "AR100")},
            "metrics": {
                "eval_seconds": metric(seconds[warmup:], "s"),
                "images_per_second": metric([images / s for s in seconds[warmup:]], "images/s", "higher", gate=False),
                "max_memory_mb": metric([memory[task, engine]], "MB", gate=False),
                "init_seconds": metric([init], "s", gate=False),
                "compile_seconds": metric(seconds[:1], "s", gate=False),
            },
            "clocks": [clocks],
        }
        for (task, engine), seconds in samples.items()
    ]


def check_same(scores: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Raises UserError where a number differs between engines. scores: engine -> task -> name -> number."""
    (first, wanted), *others = scores.items()
    for engine, found in others:
        for task, numbers in wanted.items():
            for name, value in numbers.items():
                other = found[task][name]
                if isinstance(value, float) and abs(value - other) > SAME:
                    raise UserError(f"{task} {name} is {value} with {first}, {other} with {engine}: not timed")


def summary(case: dict[str, Any]) -> list[str]:
    seconds, rate = (case["metrics"][name] for name in ("eval_seconds", "images_per_second"))
    return [
        f"{case['name']}: {seconds['p50']:.3f} s (p90 {seconds['p90']:.3f}), {rate['p50']:.0f} images/s,"
        f" peak memory {case['metrics']['max_memory_mb']['p50']:.0f} MB, AP {case['scores']['AP']:.4f}"
    ]
