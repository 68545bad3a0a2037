"""`benchmark.py eval`: COCO evaluation of synthetic detections, with each engine, after they agreed on every number."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from ..device import get_device
from ..errors import UserError
from ..evaluation.coco import evaluate
from .cases import random_boxes
from .results import metric
from .timing import quiet_garbage_collector

ENGINES = ("hotcoco", "pycocotools")
TASKS = ("bbox", "segm")
SIZE = (480, 640)
# As COCO's validation set: categories, objects of an image
CATEGORIES, OBJECTS = 80, 7
CORNERS = 12
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
    init = time.perf_counter() - started
    samples: dict[tuple[str, str], list[float]] = {(task, engine): [] for task in TASKS for engine in engines}
    memory = dict.fromkeys(samples, 0.0)
    scores: dict[tuple[str, str], dict[str, Any]] = {}
    clocks = [device.clocks()]
    with quiet_garbage_collector():
        for _ in range(warmup + repeats):
            for (task, engine), seconds in samples.items():
                device.reset_peak_memory()
                started = time.perf_counter()
                scores[task, engine] = evaluate(truth, results, (task,), engine)[task]
                seconds.append(time.perf_counter() - started)
                memory[task, engine] = max(memory[task, engine], device.max_memory_mb())
    clocks.append(device.clocks())
    for task in TASKS:
        check_same(task, {engine: scores[task, engine] for engine in engines})
    return [
        {
            "name": f"eval {task} {engine} {images} images {detections} detections",
            "kind": "eval",
            "dtype": "float64",
            "config_sha256": None,
            "warmup": warmup,
            "work": {"images": images, "detections": len(results), "objects": len(truth["annotations"])},
            "scores": {name: scores[task, engine][name] for name in ("AP", "AP50", "AR100")},
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


def check_same(task: str, scores: dict[str, dict[str, Any]]) -> None:
    """Raises UserError where a number differs between engines."""
    (first, wanted), *others = scores.items()
    for engine, score in others:
        for name, value in wanted.items():
            if isinstance(value, float) and abs(value - score[name]) > SAME:
                raise UserError(f"{task} {name} is {value} with {first}, {score[name]} with {engine}: not timed")


def summary(case: dict[str, Any]) -> list[str]:
    seconds, rate = (case["metrics"][name] for name in ("eval_seconds", "images_per_second"))
    return [
        f"{case['name']}: {seconds['p50']:.3f} s (p90 {seconds['p90']:.3f}), {rate['p50']:.0f} images/s,"
        f" peak memory {case['metrics']['max_memory_mb']['p50']:.0f} MB, AP {case['scores']['AP']:.4f}"
    ]
