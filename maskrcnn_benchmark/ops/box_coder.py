"""Boxes <-> regression targets relative to anchors (Faster R-CNN, section 3.1.2, equation 2).

    dx = wx (x - xa) / wa    dw = ww log(w / wa)

with x, w the centre and side of a box and xa, wa those of its anchor; the same for y, h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .library import LIBRARY, register_composite

# A side below this, in pixels, counts as this long: padding (all zeros) must stay finite, since a loss multiplies it by
# weight 0 and 0 * inf is NaN.
_MIN_SIDE = 1e-6

LIBRARY.define("box_encode(Tensor boxes, Tensor anchors, float[] weights) -> Tensor")
LIBRARY.define("box_decode(Tensor deltas, Tensor anchors, float[] weights, float clip) -> Tensor")
LIBRARY.define("box_decode_backward(Tensor grad, Tensor deltas, Tensor anchors, float[] weights, float clip) -> Tensor")


def encode(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """Regression targets of boxes relative to anchors.

    boxes, anchors: [..., 4] xyxy pixels, broadcast against each other; weights: (wx, wy, ww, wh).
    Returns deltas [..., 4] (dx, dy, dw, dh). Sides count as at least 1e-6 pixels, so the result is finite.
    """
    _check_last_dimension("encode", boxes, anchors)
    dtype = torch.promote_types(boxes.dtype, anchors.dtype)
    boxes, anchors = torch.broadcast_tensors(boxes.to(dtype), anchors.to(dtype))
    return torch.ops.maskrcnn_benchmark.box_encode(boxes, anchors, weights)


def decode(deltas: Tensor, anchors: Tensor, weights: Sequence[float], clip: float = math.log(1000 / 16)) -> Tensor:
    """Boxes that deltas make of anchors, the inverse of `encode`; differentiable in the deltas.

    deltas: [..., 4]; anchors: [..., 4] xyxy pixels, broadcast against each other; weights: (wx, wy, ww, wh).
    clip: dw and dh (after division by their weights) are cut off above here, before exp.
    Returns boxes [..., 4] xyxy in the anchors' dtype, so that half-precision deltas keep exact pixels.
    """
    _check_last_dimension("decode", deltas, anchors)
    deltas, anchors = torch.broadcast_tensors(deltas.to(anchors.dtype), anchors)
    return torch.ops.maskrcnn_benchmark.box_decode(deltas, anchors, weights, clip)


def _check_last_dimension(function: str, first: Tensor, anchors: Tensor) -> None:
    if first.shape[-1:] != (4,) or anchors.shape[-1:] != (4,):
        raise ValueError(
            f"{function}: expected two [..., 4] tensors, got {list(first.shape)} and {list(anchors.shape)}"
        )


def _centre_and_side(boxes: Tensor) -> tuple[Tensor, Tensor]:
    side = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * side, side


def encode_composite(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    wx, wy, ww, wh = weights
    centre, side = _centre_and_side(boxes)
    anchor_centre, anchor_side = _centre_and_side(anchors)
    side, anchor_side = side.clamp(min=_MIN_SIDE), anchor_side.clamp(min=_MIN_SIDE)
    dx, dy = ((centre - anchor_centre) / anchor_side).unbind(-1)
    dw, dh = (side / anchor_side).log().unbind(-1)
    return torch.stack([wx * dx, wy * dy, ww * dw, wh * dh], dim=-1)


def decode_composite(deltas: Tensor, anchors: Tensor, weights: Sequence[float], clip: float) -> Tensor:
    wx, wy, ww, wh = weights
    anchor_centre, anchor_side = _centre_and_side(anchors)
    shift = torch.stack([deltas[..., 0] / wx, deltas[..., 1] / wy], dim=-1)
    growth = torch.stack([deltas[..., 2] / ww, deltas[..., 3] / wh], dim=-1).clamp(max=clip)
    centre = shift * anchor_side + anchor_centre
    half = 0.5 * (growth.exp() * anchor_side)
    return torch.cat([centre - half, centre + half], dim=-1)


def decode_backward_composite(
    grad: Tensor, deltas: Tensor, anchors: Tensor, weights: Sequence[float], clip: float
) -> Tensor:
    wx, wy, ww, wh = weights
    side = anchors[..., 2:] - anchors[..., :2]
    centre = (grad[..., :2] + grad[..., 2:]) * side
    growth = torch.stack([deltas[..., 2] / ww, deltas[..., 3] / wh], dim=-1)
    half = 0.5 * (grad[..., 2:] - grad[..., :2]) * side * growth.clamp(max=clip).exp() * (growth <= clip)
    return torch.stack([centre[..., 0] / wx, centre[..., 1] / wy, half[..., 0] / ww, half[..., 1] / wh], dim=-1)


register_composite("box_encode", encode_composite)
register_composite("box_decode", decode_composite)
register_composite("box_decode_backward", decode_backward_composite)


@torch.library.register_fake("maskrcnn_benchmark::box_encode", lib=LIBRARY)
def _(boxes, anchors, weights):
    return boxes.new_empty(boxes.shape)


@torch.library.register_fake("maskrcnn_benchmark::box_decode", lib=LIBRARY)
def _(deltas, anchors, weights, clip):
    return deltas.new_empty(deltas.shape)


@torch.library.register_fake("maskrcnn_benchmark::box_decode_backward", lib=LIBRARY)
def _(grad, deltas, anchors, weights, clip):
    return deltas.new_empty(deltas.shape)


def _setup_context(ctx, inputs, output) -> None:
    deltas, anchors, ctx.weights, ctx.clip = inputs
    ctx.save_for_backward(deltas, anchors)


def _backward(ctx, grad):
    deltas, anchors = ctx.saved_tensors
    grad = torch.ops.maskrcnn_benchmark.box_decode_backward(grad, deltas, anchors, ctx.weights, ctx.clip)
    return grad, None, None, None


torch.library.register_autograd("maskrcnn_benchmark::box_decode", _backward, setup_context=_setup_context, lib=LIBRARY)
