"""Run a model over a data set, sharded over ranks, and score the results."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn
from yacs.config import CfgNode

from ..data.coco import CocoDataset
from ..data.loader import test_loader
from ..device import Device
from ..errors import DataError
from ..evaluation.results import Results, concatenate, detections_to_results
from ..report.console import progress
from ..report.run_files import file_stem
from ..report.visualize import PALETTE, draw, draw_results, side_by_side
from . import distributed, scoring, watch
from .checkpoint import write_atomically
from .views import detect, results_options, view_configs

logger = logging.getLogger(__name__)

# So many of an image's proposals are drawn: all would hide it
PROPOSALS = 20


@torch.no_grad()
def infer(cfg: CfgNode, device: Device, model: nn.Module, dataset: CocoDataset) -> Results | None:
    """Results of every image of the data set, each image once, on the main rank; None on the others.

    Detections become COCO results, and masks RLE, batch by batch: memory does not grow with the masks.
    """
    was_training = model.training
    model.eval()
    configs, mirrored = zip(*view_configs(cfg))
    ranks = distributed.rank(), distributed.world_size()
    loaders = [test_loader(view, dataset, device, *ranks) for view in configs]
    options = results_options(cfg)
    results, seen = [], []
    for loaded in progress(zip(*loaders), len(loaders[0]), "inference"):
        watch.at("evaluating")
        views = [images for images, _ in loaded]
        with device.autocast(getattr(torch, cfg.DTYPE)):
            detections = detect(model, views, mirrored)
        results.append(detections_to_results(detections.to("cpu"), views[0], dataset.category_ids, **options))
        seen += views[0].image_ids
    model.train(was_training)
    shards = distributed.gather((results, seen))
    if shards is None:
        return None
    every = sorted(image for _, shard in shards for image in shard)
    if every != sorted(dataset.image_ids):
        raise DataError(f"{dataset.annotation_file}: {len(every)} images evaluated, but it has {len(dataset)}")
    return concatenate([part for parts, _ in shards for part in parts])


def evaluate_model(
    cfg: CfgNode, device: Device, model: nn.Module, datasets: dict[str, CocoDataset], output: Path
) -> dict[str, Any]:
    """Scores of the model, the same on every rank: for the first data set `{"bbox": {...}, "segm": {...}, "images": n,
    "eval_seconds": s}`, those of further ones under "datasets" by name."""
    started = time.perf_counter()
    requests = run_model(cfg, device, model, datasets, output)
    scores = distributed.broadcast(combine(datasets, scoring.run(requests)) if requests else None)
    return scores | {"eval_seconds": time.perf_counter() - started}


def run_model(
    cfg: CfgNode, device: Device, model: nn.Module, datasets: dict[str, CocoDataset], output: Path
) -> list[scoring.Request] | None:
    """What is left to score after the model has seen every image, on the main rank; None on the others. Results will be
    kept as OUTPUT/inference/NAME.json, their curves, class tables and confusion as NAME_details.{json,html}; a few
    images with truth and predictions are written as OUTPUT/predictions/*.png."""
    requests = []
    for name, dataset in datasets.items():
        results = infer(cfg, device, model, dataset)
        if results is None:
            continue
        path = output / "inference" / f"{file_stem(name)}.json"
        pictures = output / "predictions" / (path.stem if len(datasets) > 1 else "")
        tasks = tasks_of(cfg)
        draw_pictures(dataset, results, pictures, cfg.LOGGING.PREDICTION_IMAGES, "box_proposal" in tasks)
        judged_by = (tasks, tuple(cfg.TEST.METRICS), cfg.TEST.EVALUATOR, path, tuple(cfg.TEST.KEYPOINT_SIGMAS))
        requests.append(scoring.Request(name, dataset.ground_truth(), dataset.image_ids, results, *judged_by))
    return requests or None


def tasks_of(cfg: CfgNode) -> tuple[str, ...]:
    """What the model's results are judged by."""
    if cfg.MODEL.RPN_ONLY and not cfg.MODEL.RETINANET_ON:
        return ("box_proposal",)
    switches = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    return tuple(task for task, on in switches.items() if on)


def combine(names: Iterable[str], scores: list[dict[str, Any]]) -> dict[str, Any]:
    """The first data set's scores, with those of further ones under "datasets" by name."""
    first, *others = scores
    further = dict(zip(list(names)[1:], others))
    return first | ({"datasets": further} if further else {})


def draw_pictures(dataset: CocoDataset, results: Results, directory: Path, count: int, proposals: bool) -> None:
    """`count` images from all over the data set, each with its annotations on the left and the detections on the right;
    always the same ones, so that runs can be compared. proposals: the results are the RPN's."""
    directory.mkdir(parents=True, exist_ok=True)
    names = dict(zip(dataset.category_ids, dataset.category_names))
    limbs = dataset.skeleton.limbs if dataset.skeleton else None
    for index in np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)).tolist():
        image, image_id = dataset.load(index).image, dataset.image_ids[index]
        found = results.select(np.flatnonzero(results.image_ids == image_id))
        truth = [annotation for annotation in dataset.annotations(index) if not annotation["iscrowd"]]
        left = draw_results(image, truth, names, limbs=limbs)
        if proposals:
            picture = side_by_side(left, draw_proposals(image, found), ("ground truth", f"{PROPOSALS} best proposals"))
        else:
            right = draw_results(image, found.to_list(), names, limbs=limbs)
            picture = side_by_side(left, right, ("ground truth", "predictions"))
        _, png = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        write_atomically(directory / f"{image_id}.png", lambda file, png=png: file.write(png.tobytes()))


def draw_proposals(image: np.ndarray, found: Results) -> np.ndarray:
    """A copy of the image with its best proposals as boxes without words, for they have no class."""
    best = np.argsort(-found.scores, kind="stable")[:PROPOSALS]
    corners = np.concatenate([found.boxes[best, :2], found.boxes[best, :2] + found.boxes[best, 2:]], axis=1)
    colors = [PALETTE[n % len(PALETTE)] for n in range(len(best))]
    return draw(image, corners, [""] * len(best), colors=colors)
