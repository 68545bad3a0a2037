"""How much arithmetic a step is, counted for the actual configuration and image size; and what a device can do at most.

The model runs on the meta device, where tensors have shapes and no values, under torch's operator counter: convolutions
and matrix products, forward and backward, 2 FLOP a multiply-add. Frozen layers have no gradients there either. What is
no matrix product (RoIAlign, NMS, losses, the update) counts nothing: it is well under a hundredth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from yacs.config import CfgNode

from ..device import Device
from ..models.build import build_model
from ..models.rcnn import RCNN
from ..structures import ImageBatch, PolygonBatch, Targets
from .timing import nanoseconds

# Sides of the matrices whose product measures the peak: the larger ones where the smaller take no time worth the name
MATRIX_SIDES = (2048, 8192)
SHORT_SECONDS = 0.02


def _deformable_flop(input_shape, offset_shape, mask_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """As of any convolution: the interpolation is no product of matrices."""
    batch, channels, height, width = out_shape
    return 2 * batch * channels * height * width * math.prod(weight_shape[1:])


def _direct_flop(input_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """Of conv3x3 and pointwise: a direct convolution's, whatever the kernel saves."""
    return 2 * math.prod(out_shape) * math.prod(weight_shape[1:])


def _input_gradient_flop(grad_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * math.prod(grad_shape) * math.prod(weight_shape[1:])


def _weight_gradient_flop(grad_shape, input_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(grad_shape) * math.prod(out_shape[0][1:])


FORMULAS = {
    torch.ops.maskrcnn_benchmark.deform_conv2d: _deformable_flop,
    torch.ops.maskrcnn_benchmark.conv3x3: _direct_flop,
    torch.ops.maskrcnn_benchmark.conv3x3_input_gradient: _input_gradient_flop,
    torch.ops.maskrcnn_benchmark.conv3x3_weight_gradient: _weight_gradient_flop,
    torch.ops.maskrcnn_benchmark.pointwise: _direct_flop,
    torch.ops.maskrcnn_benchmark.pointwise_input_gradient: _input_gradient_flop,
    torch.ops.maskrcnn_benchmark.pointwise_weight_gradient: _weight_gradient_flop,
}


@dataclass(frozen=True)
class Flops:
    """FLOP of an image's share of a batch: a part that is always the same, and one for each positive RoI (training) or
    detection (inference) in the mask or keypoint head."""

    fixed: float
    each: float

    def of(self, images: int, in_mask_head: float) -> float:
        """FLOP of a step; in_mask_head: RoIs of all images together."""
        return images * self.fixed + in_mask_head * self.each


def training_flops(cfg: CfgNode, size: tuple[int, int], backward: bool = True) -> Flops:
    """Forward, or forward and backward, of padded images of `size` (height, width)."""

    def count(model: RCNN, positives: int) -> int:
        hold_positives(model, positives)
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            loss = sum(model.train()(*_meta_batch(cfg, size)).values())
            if backward:
                loss.backward()
        return counter.get_total_flops()

    return _linear(cfg, count)


@dataclass(frozen=True)
class Gradient:
    """A parameter's: how many values, and the share of the backward pass's FLOP that is done when it is there."""

    name: str
    values: int
    ready: float


def gradients(cfg: CfgNode, size: tuple[int, int], positives: int) -> list[Gradient]:
    """In the order in which the backward pass of an image of `size` (height, width), with so many positive RoIs in the
    mask head, makes them."""
    model = build_model(cfg, Device(torch.device("meta"))).train()
    hold_positives(model, positives)
    made: list[tuple[str, int, int]] = []
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        loss = sum(model(*_meta_batch(cfg, size)).values())
        forward = counter.get_total_flops()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                note = lambda p, name=name: made.append((name, p.numel(), counter.get_total_flops() - forward))  # noqa: E731
                parameter.register_post_accumulate_grad_hook(note)
        loss.backward()
        backward = counter.get_total_flops() - forward
    return [Gradient(name, values, flop / backward) for name, values, flop in made]


def hold_positives(model: RCNN, positives: int) -> None:
    for head in getattr(model, "heads_after_box", []):  # RetinaNet has none
        for stage in getattr(head, "stages", [head]):  # of a cascade each is taken to have as many positives
            stage.positives_per_image = positives


@torch.no_grad()
def inference_flops(cfg: CfgNode, size: tuple[int, int]) -> Flops:
    def count(model: RCNN, detections: int) -> int:
        heads = getattr(model, "roi_heads", {})  # RetinaNet has none, and an RPN alone has no box head
        if "box" in heads:
            heads["box"].detections_per_image = detections
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            model.eval()(_meta_batch(cfg, size)[0])
        return counter.get_total_flops()

    return _linear(cfg, count)


def _linear(cfg: CfgNode, count: Callable[[RCNN, int], int]) -> Flops:
    """From the counts at one and at two RoIs in the mask head."""
    model = build_model(cfg, Device(torch.device("meta")))
    one, two = (count(model, rois) for rois in (1, 2))
    return Flops(fixed=2 * one - two, each=two - one)


def _meta_batch(cfg: CfgNode, size: tuple[int, int]) -> tuple[ImageBatch, Targets]:
    return empty_batch(cfg, torch.device("meta"), 1, size)


def empty_batch(
    cfg: CfgNode, device: torch.device, count: int, size: tuple[int, int], objects: int = 8
) -> tuple[ImageBatch, Targets]:
    """`count` images of `size` (height, width) in the loader's layout, each with `objects` of zeros: for shapes."""
    with device:
        images = ImageBatch(
            torch.zeros(count, *size, 3, dtype=torch.uint8).permute(0, 3, 1, 2),
            torch.zeros(count, 2, dtype=torch.int64),
            [size] * count,
            list(range(count)),
        )
        polygons = count * objects
        masks = PolygonBatch(
            torch.zeros(4 * polygons, 2),
            torch.zeros(polygons + 1, dtype=torch.int64),
            torch.zeros(polygons + 1, dtype=torch.int64),
        )
        labels = torch.zeros(count, objects, dtype=torch.int64)
        points = torch.zeros(count, objects, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES, 3)
        return images, Targets(torch.zeros(count, objects, 4), labels, labels.bool(), masks, points)


def measured_peak(device: Device, dtype: torch.dtype, repeats: int = 5) -> tuple[float, str]:
    """TFLOP/s of the fastest of a few large matrix products, and words that say so. It is what a program can reach, and
    so less than what a data sheet says."""
    for side in MATRIX_SIDES:
        a, b = torch.randn(2, side, side, device=device.torch_device).to(dtype)
        a @ b
        seconds = min(nanoseconds(lambda a=a, b=b: a @ b, device.synchronize) for _ in range(repeats)) / 1e9
        if seconds > SHORT_SECONDS:
            break
    name = str(dtype).removeprefix("torch.")
    return (
        2 * side**3 / seconds / 1e12,
        f"measured: the fastest of {repeats} products of {side} x {side} {name} matrices",
    )
