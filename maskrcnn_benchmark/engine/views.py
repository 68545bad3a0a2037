"""The views of an image that the model looks at when it is tested: one, or several with TEST.BBOX_AUG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from yacs.config import CfgNode

from ..models import augment
from ..structures import Detections, ImageBatch


def view_configs(cfg: CfgNode) -> list[tuple[CfgNode, bool]]:
    """For each size at which images are loaded, the configuration to load them with, and whether they are looked at
    mirrored too. The first is the plain one; the data workers are shared out among all."""
    aug = cfg.TEST.BBOX_AUG
    if not aug.ENABLED:
        return [(cfg, False)]
    sizes = [(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, aug.H_FLIP)]
    sizes += [(scale, aug.MAX_SIZE, aug.SCALE_H_FLIP) for scale in aug.SCALES]
    views = []
    for short, longest, mirrored in sizes:
        view = cfg.clone()
        view.defrost()
        view.INPUT.MIN_SIZE_TEST, view.INPUT.MAX_SIZE_TEST = short, longest
        if cfg.DATALOADER.NUM_WORKERS:
            view.DATALOADER.NUM_WORKERS = max(1, cfg.DATALOADER.NUM_WORKERS // len(sizes))
        view.freeze()
        views.append((view, mirrored))
    return views


def results_options(cfg: CfgNode) -> dict[str, Any]:
    """How `detections_to_results` makes boxes and masks of the original image."""
    mask = cfg.MODEL.ROI_MASK_HEAD
    return {
        "threshold": mask.POSTPROCESS_MASKS_THRESHOLD,
        "plus_one": cfg.MODEL.LEGACY_PLUS_ONE,
        "paste_whole_pixels": mask.PASTE_WHOLE_PIXELS,
    }


def detect(model: nn.Module, loaded: Sequence[ImageBatch], mirrored: Sequence[bool]) -> Detections:
    """Detections in pixels of the first batch. loaded: the same images at each of `view_configs`."""
    if len(loaded) == 1 and not mirrored[0]:
        return model(loaded[0])
    views = [(images, flip) for images, also in zip(loaded, mirrored) for flip in ((False, True) if also else (False,))]
    return augment.detect(model, views)
