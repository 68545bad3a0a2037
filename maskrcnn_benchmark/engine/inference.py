"""Run a model over a data set, sharded over ranks, and score the results."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import nn
from yacs.config import CfgNode

from ..data.catalog import build_dataset, check_num_classes
from ..data.coco import CocoDataset
from ..data.loader import test_loader
from ..device import Device
from ..errors import DataError
from ..evaluation.coco import detections_to_coco, evaluate
from ..report.console import progress
from ..report.visualize import draw_results, side_by_side
from . import distributed
from .checkpoint import write_atomically

logger = logging.getLogger(__name__)


@torch.no_grad()
def infer(cfg: CfgNode, device: Device, model: nn.Module, dataset: CocoDataset) -> list[dict[str, Any]] | None:
    """COCO results of every image of the data set, each image once, on the main rank; None on the others.

    Detections become COCO results, and masks RLE, batch by batch: memory does not grow with the masks.
    """
    was_training = model.training
    model.eval()
    loader = test_loader(cfg, dataset, device, distributed.rank(), distributed.world_size())
    threshold = cfg.MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS_THRESHOLD
    results, seen = [], []
    for images, _ in progress(loader, len(loader), "inference"):
        with device.autocast(getattr(torch, cfg.DTYPE)):
            detections = model(images)
        results += detections_to_coco(detections.to("cpu"), images, dataset.category_ids, threshold)
        seen += images.image_ids
    model.train(was_training)
    shards = distributed.gather((results, seen))
    if shards is None:
        return None
    every = sorted(image for _, shard in shards for image in shard)
    if every != sorted(dataset.image_ids):
        raise DataError(f"{dataset.annotation_file}: {len(every)} images evaluated, but it has {len(dataset)}")
    return [result for shard, _ in shards for result in shard]


def test_datasets(cfg: CfgNode) -> dict[str, CocoDataset]:
    """The data sets of DATASETS.TEST by name, checked against the model's number of classes."""
    datasets = {name: build_dataset((name,), cfg, training=False) for name in cfg.DATASETS.TEST}
    for dataset in datasets.values():
        check_num_classes(cfg, dataset)
    return datasets


def evaluate_model(
    cfg: CfgNode, device: Device, model: nn.Module, datasets: dict[str, CocoDataset], output: Path
) -> dict[str, Any]:
    """Scores of the model, the same on every rank: for the first data set `{"bbox": {...}, "segm": {...}, "images": n,
    "eval_seconds": s}`, those of further ones under "datasets" by name. Results are kept as OUTPUT/inference/NAME.json,
    and a few images with truth and predictions as OUTPUT/predictions/*.png."""
    tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
    scores: dict[str, Any] = {}
    for name, dataset in datasets.items():
        started = time.perf_counter()
        results = infer(cfg, device, model, dataset)
        score = None
        if results is not None:
            path = output / "inference" / f"{re.sub(r'[^0-9A-Za-z_.-]+', '_', name)}.json"
            path.parent.mkdir(exist_ok=True)
            text = json.dumps(results)
            write_atomically(path, lambda file, text=text: file.write(text.encode()))
            pictures = output / "predictions" / (path.stem if len(datasets) > 1 else "")
            draw_pictures(dataset, results, pictures, cfg.LOGGING.PREDICTION_IMAGES)
            score = evaluate(dataset.ground_truth(), results, tasks, cfg.TEST.EVALUATOR, dataset.image_ids)
        score = distributed.broadcast(score)
        score |= {"images": len(dataset), "eval_seconds": time.perf_counter() - started}
        if scores:
            scores.setdefault("datasets", {})[name] = score
        else:
            scores = score
    return scores


def draw_pictures(dataset: CocoDataset, results: list[dict[str, Any]], directory: Path, count: int) -> None:
    """The data set's first `count` images, each with its annotations on the left and the detections on the right."""
    directory.mkdir(parents=True, exist_ok=True)
    names = dict(zip(dataset.category_ids, dataset.category_names))
    for index in range(min(count, len(dataset))):
        image, image_id = dataset.load(index).image, dataset.image_ids[index]
        found = [result for result in results if result["image_id"] == image_id]
        truth = [annotation for annotation in dataset.annotations(index) if not annotation["iscrowd"]]
        pictures = [draw_results(image, objects, names) for objects in (truth, found)]
        picture = side_by_side(*pictures, ("ground truth", "predictions"))
        _, png = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        write_atomically(directory / f"{image_id}.png", lambda file, png=png: file.write(png.tobytes()))
