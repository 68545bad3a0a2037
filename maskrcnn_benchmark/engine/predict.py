"""Predictions for images and videos, from a checkpoint alone: it carries the configuration and the class names."""

from __future__ import annotations

import glob
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn
from yacs.config import CfgNode

from ..config import dump, parse_config
from ..data.catalog import num_classes
from ..data.images import read_image
from ..data.loader import collate
from ..data.transforms import Sample, build_transforms
from ..device import Device
from ..errors import CheckpointError, DataError
from ..evaluation.results import detections_to_results
from ..models.build import build_model
from . import checkpoint, determinism
from .views import detect, results_options, view_configs

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
VIDEO_SUFFIXES = {".avi", ".mp4", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}


@dataclass
class Predictor:
    """A trained model and what its numbers mean. category_names: category id -> name; limbs: pairs of keypoints that a
    drawing joins."""

    cfg: CfgNode
    device: Device
    model: nn.Module
    category_ids: list[int]
    category_names: dict[int, str]
    limbs: list[list[int]]


@dataclass
class Prediction:
    """One image file, or one frame (from 0) of a video: image [H, W, 3] uint8 RGB upright, and its COCO results; or the
    error that made it unreadable."""

    path: Path
    frame: int | None = None
    image: np.ndarray | None = None
    results: list[dict[str, Any]] | None = None
    error: str | None = None


def load_predictor(weights: Path, device: Device) -> Predictor:
    """From a checkpoint that train_net.py wrote.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint of this project.
    """
    content = checkpoint.read(weights)
    cfg = parse_config(content["config"], f"the configuration in {weights}")
    if cfg.DTYPE != "float32" and getattr(torch, cfg.DTYPE) not in device.autocast_dtypes:
        logger.warning(
            "%s was trained in %s, which %s does not have: predicting in float32", weights, cfg.DTYPE, device.type
        )
        cfg.defrost()
        cfg.DTYPE = "float32"
        cfg.freeze()
    determinism.settle_convolutions(cfg, device)
    model = build_model(cfg, device)
    checkpoint.load_model(model, content, weights)
    ids, names = _categories(cfg, content, weights)
    limbs = content.get("keypoint_limbs", [])  # checkpoints of before there were keypoints have none
    return Predictor(cfg, device, model.eval(), ids, dict(zip(ids, names)), limbs)


def _categories(cfg: CfgNode, content: dict[str, Any], weights: Path) -> tuple[list[int], list[str]]:
    """Ids and names of what the model detects."""
    if cfg.MODEL.RPN_ONLY and not cfg.MODEL.RETINANET_ON:
        return [1], ["proposal"]
    ids, names = content["category_ids"], content["category_names"]
    key, classes = num_classes(cfg)
    if not len(ids) == len(names) == classes - 1:
        raise CheckpointError(
            f"{weights} names {len(names)} categories by {len(ids)} ids, but {key} is {classes} with the background:"
            " it is not as it was written; take another checkpoint of the run"
        )
    return ids, names


def save_predictor(predictor: Predictor, path: Path) -> None:
    """A checkpoint that `load_predictor` and MODEL.WEIGHT take; no run continues from it, as it has no optimizer."""
    content = {
        "model": predictor.model.state_dict(),
        "optimizer": {},
        "scaler": {},
        "iteration": 0,
        "best": -1.0,
        "world_size": 1,
        "config": dump(predictor.cfg),
        "category_ids": predictor.category_ids,
        "category_names": [predictor.category_names[i] for i in predictor.category_ids],
        "keypoint_limbs": predictor.limbs,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomically(path, lambda file: torch.save(content, file))


def find_inputs(inputs: Sequence[str]) -> list[Path]:
    """Files as they are; of a directory and of a pattern such as `photos/**/*.jpg` the images and videos, by name.

    Raises:
        DataError: an input that does not exist, a directory or a pattern without images.
    """
    found: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_file():
            found.append(path)
            continue
        # A directory first: its name may hold brackets
        files = path.iterdir() if path.is_dir() else map(Path, glob.iglob(name, recursive=True))
        media = sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES)
        if not media:
            what = "holds" if path.is_dir() else "does not exist; as a pattern it matches"
            known = ", ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
            raise DataError(f"input {path} {what} no images or videos ({known})")
        found += media
    return found


def count_inputs(paths: Sequence[Path]) -> int:
    """Images and frames, as far as the files say."""
    return sum(_frame_count(path) if path.suffix.lower() in VIDEO_SUFFIXES else 1 for path in paths)


def predict(predictor: Predictor, paths: Sequence[Path], batch: int) -> Iterator[Prediction]:
    """Images and frames in order, `batch` of them through the model at a time. What cannot be read comes back with its
    error; the others go on."""
    inputs = (prediction for path in paths for prediction in _read(path))
    while group := list(itertools.islice(inputs, batch)):
        readable = [prediction for prediction in group if prediction.image is not None]
        if readable:
            for prediction, results in zip(readable, detect_images(predictor, [p.image for p in readable])):
                prediction.results = results
        yield from group


def _read(path: Path) -> Iterator[Prediction]:
    if path.suffix.lower() in VIDEO_SUFFIXES:
        yield from _read_video(path)
        return
    try:
        yield Prediction(path, image=read_image(path))
    except DataError as error:
        yield Prediction(path, error=str(error))


def _read_video(path: Path) -> Iterator[Prediction]:
    """One frame after the other; at the end an error where frames are missing."""
    video, frame = cv2.VideoCapture(str(path)), 0
    try:
        while (read := video.read())[0]:
            yield Prediction(path, frame, cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
            frame += 1
        said = _frame_count(path)
    finally:
        video.release()
    if frame == 0:
        yield Prediction(path, error=f"video {path} is damaged, or of a kind that OpenCV does not read")
    elif frame + 1 < said:  # containers that count one frame too many are no news
        yield Prediction(path, error=f"video {path} is damaged: it ends after {frame} of {said} frames")


def _frame_count(path: Path) -> int:
    """What the container says; 0 where it does not."""
    video = cv2.VideoCapture(str(path))
    try:
        return max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT)))
    finally:
        video.release()


@torch.no_grad()
def detect_images(predictor: Predictor, pictures: list[np.ndarray]) -> list[list[dict[str, Any]]]:
    """The COCO results of each of these pictures [H, W, 3] uint8 RGB, all through the model at a time; image_id is the
    place in the list."""
    cfg, device = predictor.cfg, predictor.device
    samples = [
        Sample(image, image_id=i, image_index=i, original_size=image.shape[:2]) for i, image in enumerate(pictures)
    ]
    configs, mirrored = zip(*view_configs(cfg))
    views = []
    for view in configs:
        transform, rng = build_transforms(view, training=False), np.random.default_rng(0)
        resized = [transform(sample, rng) for sample in samples]
        images, _ = collate(resized, cfg.DATALOADER.SIZE_DIVISIBILITY, cfg.INPUT.FIXED_SHAPES)
        views.append(images.to(device.torch_device))
    with device.autocast(getattr(torch, cfg.DTYPE)):
        detections = detect(predictor.model, views, mirrored)
    options = results_options(cfg)
    results = detections_to_results(detections.to("cpu"), views[0], predictor.category_ids, **options).to_list()
    return [[result for result in results if result["image_id"] == i] for i in range(len(pictures))]
