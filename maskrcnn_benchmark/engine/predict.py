"""Predictions for image files, from a checkpoint alone: it carries the configuration and the class names."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from yacs.config import CfgNode

from ..config import parse_config
from ..data.images import read_image
from ..data.loader import collate
from ..data.transforms import Sample, build_transforms
from ..device import Device
from ..errors import DataError
from ..evaluation.coco import detections_to_coco
from ..models.build import build_model
from . import checkpoint

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


@dataclass
class Predictor:
    """A trained model and what its numbers mean. category_names: category id -> name."""

    cfg: CfgNode
    device: Device
    model: nn.Module
    category_ids: list[int]
    category_names: dict[int, str]


@dataclass
class Prediction:
    """One file: image [H, W, 3] uint8 RGB upright, and its COCO results; or the error that made it unreadable."""

    path: Path
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
    model = build_model(cfg, device)
    checkpoint.load_model(model, content, weights)
    names = dict(zip(content["category_ids"], content["category_names"]))
    return Predictor(cfg, device, model.eval(), content["category_ids"], names)


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Files as they are, and the image files right in each directory, by name.

    Raises:
        DataError: an input that does not exist, or a directory without images.
    """
    found: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not images:
                raise DataError(f"directory {path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
            found += images
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"input {path} does not exist")
    return found


def predict(predictor: Predictor, paths: Sequence[Path], batch: int) -> Iterator[Prediction]:
    """The files in order, `batch` of them through the model at a time. A file that cannot be read comes back with its
    error; the others go on."""
    for start in range(0, len(paths), batch):
        group = [_read(path) for path in paths[start : start + batch]]
        readable = [prediction for prediction in group if prediction.image is not None]
        if readable:
            for prediction, results in zip(readable, _detect(predictor, [p.image for p in readable])):
                prediction.results = results
        yield from group


def _read(path: Path) -> Prediction:
    try:
        return Prediction(path, image=read_image(path))
    except DataError as error:
        return Prediction(path, error=str(error))


@torch.no_grad()
def _detect(predictor: Predictor, pictures: list[np.ndarray]) -> list[list[dict[str, Any]]]:
    cfg, device = predictor.cfg, predictor.device
    transform = build_transforms(cfg, training=False)
    samples = [
        transform(Sample(image, image_id=i, image_index=i, original_size=image.shape[:2]), np.random.default_rng(0))
        for i, image in enumerate(pictures)
    ]
    images, _ = collate(samples, cfg.DATALOADER.SIZE_DIVISIBILITY, cfg.INPUT.FIXED_SHAPES)
    images = images.to(device.torch_device)
    with device.autocast(getattr(torch, cfg.DTYPE)):
        detections = predictor.model(images)
    threshold = cfg.MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS_THRESHOLD
    results = detections_to_coco(detections.to("cpu"), images, predictor.category_ids, threshold)
    return [[result for result in results if result["image_id"] == i] for i in range(len(pictures))]
