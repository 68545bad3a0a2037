"""A side of a benchmark: a model with its inputs, and its training or inference step as phases; ours here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from ..device import Device
from ..engine.graphs import StepGraphs
from ..engine.nonfinite import Guard
from ..engine.optim import make_optimizer, set_learning_rate
from ..engine.train import parallelize, update
from ..engine.views import results_options
from ..evaluation.results import Results, detections_to_results
from ..models.build import build_model
from ..models.rcnn import RCNN
from ..models.weights import load_weights
from ..structures import ImageBatch, Proposals
from .steps import DATA, Phases
from .workload import RoICounts, count_rois, hold_proposals, tame

# Images on the device, and in training their targets
Batches = Iterator[tuple[ImageBatch, Any]]

# So small that fresh weights stay near where they start: a loss that overflows would change the work.
LEARNING_RATE = 1e-3


@dataclass
class Side:
    """One side.

    losses, sizes: of each step, warm-up included: of training, by name, on the device; (height, width) of the padded
    images. found: what the last inference step gave; results: the same of ours by image ids, for all steps. truth: COCO
    ground truth to score them by.
    """

    name: str
    dtype: torch.dtype
    model: nn.Module
    phases: Phases = field(default_factory=dict)
    counts: RoICounts = field(default_factory=RoICounts)
    losses: list[dict[str, Tensor]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    found: Any = None
    results: dict[tuple[int, ...], Results] = field(default_factory=dict)
    truth: dict[str, Any] | None = None
    init_seconds: float = 0.0

    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def read_losses(self) -> list[dict[str, float]]:
        return [{name: float(value) for name, value in sorted(losses.items())} for losses in self.losses]


def fresh_model(cfg: CfgNode, device: Device, images: ImageBatch | None = None) -> RCNN:
    """The same weights on every call; with images, such that they detect something there."""
    torch.manual_seed(cfg.SEED)
    model = build_model(cfg, device)
    if images is not None:
        tame(model, images)
    return model


def training_side(
    cfg: CfgNode, device: Device, dtype: torch.dtype, batches: Batches, proposals: Proposals | None = None
) -> Side:
    """Ours, with these proposals and fresh weights; without, with those that the model makes and MODEL.WEIGHT."""
    started = time.perf_counter()
    model = fresh_model(cfg, device)
    side = Side("ours", dtype, model, counts=count_rois(model))
    if proposals is not None:
        hold_proposals(model, proposals)
    elif cfg.MODEL.WEIGHT:
        load_weights(model, cfg.MODEL.WEIGHT, cfg.MODEL.ALLOW_PICKLE)
    model.train()
    parallel = model if cfg.SOLVER.GRAPH_CAPTURE else parallelize(model, device, cfg.DISTRIBUTED.BUCKET_MB)

    def data(_: None) -> tuple[ImageBatch, Any]:
        batch = next(batches)
        side.sizes.append(tuple(batch[0].pixels.shape[-2:]))
        return batch

    def forward(batch: tuple[ImageBatch, Any]) -> dict[str, Tensor]:
        with device.autocast(dtype):
            return parallel(*batch)

    side.phases = {DATA: data, **training_phases(cfg, device, side, forward)}
    device.synchronize()
    side.init_seconds = time.perf_counter() - started
    return side


def training_phases(cfg: CfgNode, device: Device, side: Side, forward) -> Phases:
    """forward: a batch -> losses by name. What follows is the same for every model. With SOLVER.GRAPH_CAPTURE the step
    is one phase."""
    optimizer = make_optimizer(cfg, side.model, device)
    set_learning_rate(optimizer, LEARNING_RATE)
    scaler = torch.amp.GradScaler(device.type, enabled=side.dtype == torch.float16 and device.grad_scaler)

    guard = Guard(cfg, optimizer, scaler, device)

    def losses(batch: Any) -> Tensor:
        values = forward(batch)
        side.losses.append({name: value.detach() for name, value in values.items()})
        return sum(values.values())

    phases = {
        "forward": losses,
        "backward": lambda loss: scaler.scale(loss).backward(),
        "optimizer": lambda _: update(cfg, side.model, optimizer, scaler, guard),
    }
    return captured(device, optimizer, side, phases) if cfg.SOLVER.GRAPH_CAPTURE else phases


def captured(device: Device, optimizer: torch.optim.Optimizer, side: Side, phases: Phases) -> Phases:
    """The phases of a training step as one, which is captured; the losses and counts that it leaves come out with it.

    Raises:
        DeviceError: the device records no graphs.
        ConfigError: see GradientExchange.
    """
    counts = {"sampled": side.counts.sampled, "mask_head": side.counts.mask_head}

    def gradients(batches: list[Any]) -> dict[str, Tensor]:
        phases["backward"](phases["forward"](*batches))
        return side.losses.pop() | {name: values.pop() for name, values in counts.items()}

    step = StepGraphs(device, side.model, optimizer, gradients, lambda: phases["optimizer"](None))

    def whole(batch: Any) -> None:
        made = step([batch])
        for name, values in counts.items():
            values.append(made.pop(name))
        side.losses.append(made)

    return {"step": whole}


def inference_side(
    cfg: CfgNode,
    device: Device,
    dtype: torch.dtype,
    batches: Batches,
    truth: dict[str, Any],
    proposals: Proposals | None = None,
) -> Side:
    """Ours, from a batch on the device to COCO results, masks as RLE: with these proposals and tamed weights; without,
    with those that the model makes and MODEL.WEIGHT, or weights tamed on the first batch where that is empty."""
    started = time.perf_counter()
    trained = proposals is None and bool(cfg.MODEL.WEIGHT)
    model = fresh_model(cfg, device, None if trained else next(batches)[0])
    side = Side("ours", dtype, model, truth=truth)
    if proposals is not None:
        hold_proposals(model, proposals)
    elif trained:
        load_weights(model, cfg.MODEL.WEIGHT, cfg.MODEL.ALLOW_PICKLE)
    model.eval()
    category_ids = [category["id"] for category in truth["categories"]]
    options = results_options(cfg)

    @torch.no_grad()
    def forward(batch: tuple[ImageBatch, Any]) -> tuple:
        side.sizes.append(tuple(batch[0].pixels.shape[-2:]))
        with device.autocast(dtype):
            return model(batch[0]), batch[0]

    def post_processing(detected: tuple) -> None:
        detections, images = detected
        side.found = detections_to_results(detections.to("cpu"), images, category_ids, **options)
        side.results[tuple(images.image_ids)] = side.found
        side.counts.mask_head.append(len(side.found))

    side.phases = {DATA: lambda _: next(batches), "forward": forward, "post_processing": post_processing}
    device.synchronize()
    side.init_seconds = time.perf_counter() - started
    return side
