"""The anchors that a head ranks highest -> boxes of the image (Faster R-CNN, section 3.1.2), in one operator."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import box_coder, boxes
from .library import LIBRARY, register_composite

# The box coder of an RPN has no weights in any of the peers.
WEIGHTS = (1.0, 1.0, 1.0, 1.0)

LIBRARY.define(
    "proposals(Tensor deltas, Tensor anchors, Tensor index, Tensor sizes, float clip, float min_size)"
    " -> (Tensor boxes, Tensor valid)"
)


def decode_and_clip(
    deltas: Tensor,
    anchors: Tensor,
    index: Tensor,
    sizes: Tensor,
    clip: float = math.log(1000 / 16),
    min_size: float = 0.0,
    least_side: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Decode the chosen anchors, cut the boxes to their images and mark those that can be used.

    deltas: [B, A, 4] for all anchors, as of `box_coder.decode` with weights 1; anchors: [A, 4] xyxy pixels.
    index: [B, K] int64, the chosen anchors of each image. sizes: [B, 2] (height, width) of each image in pixels.
    clip: dw and dh are cut off above here, before exp. min_size: pixels that both sides must exceed.
    least_side: as of `boxes.clip`; above 0 both sides must reach min_size, not exceed it (maskrcnn-benchmark).

    Returns boxes [B, K, 4] xyxy within the image and valid [B, K] bool: False where a coordinate is not finite or a
    side is too short, and, with a box of zeros, where the index names no anchor. Boxes are float64 if deltas or anchors
    are, otherwise float32. No gradient flows.
    """
    if deltas.dim() != 3 or deltas.shape[-1] != 4 or anchors.shape != deltas.shape[1:]:
        raise ValueError(
            f"decode_and_clip: expected deltas [B, A, 4] and anchors [A, 4], got {list(deltas.shape)} and "
            f"{list(anchors.shape)}"
        )
    batch = len(deltas)
    if index.dim() != 2 or len(index) != batch or index.dtype != torch.int64:
        raise ValueError(
            f"decode_and_clip: index must be [B, K] int64 with B = {batch}, got {list(index.shape)} {index.dtype}"
        )
    if sizes.shape != (batch, 2):
        raise ValueError(f"decode_and_clip: sizes must be [B, 2] = {[batch, 2]}, got {list(sizes.shape)}")
    dtype = torch.promote_types(torch.promote_types(deltas.dtype, anchors.dtype), torch.float32)
    box, valid = torch.ops.maskrcnn_benchmark.proposals(
        deltas.detach().to(dtype), anchors.to(dtype), index, sizes.to(dtype), clip, -1.0 if least_side else min_size
    )
    if least_side:
        box = boxes.clip(box, sizes, least_side)
        valid = valid & (box[..., 2:] - box[..., :2] >= min_size).all(-1)
    return box, valid


def proposals_composite(
    deltas: Tensor,
    anchors: Tensor,
    index: Tensor,
    sizes: Tensor,
    clip: float,
    min_size: float,
    decode: Callable[..., Tensor] = box_coder.decode_composite,
) -> tuple[Tensor, Tensor]:
    exists = (index >= 0) & (index < len(anchors))
    if len(anchors) == 0:
        return deltas.new_zeros((*index.shape, 4)), exists
    index = torch.where(exists, index, 0)
    delta = deltas.gather(1, index[..., None].expand(-1, -1, 4))
    box = boxes.clip(decode(delta, anchors[index], WEIGHTS, clip), sizes)
    box = torch.where(exists[..., None], box, 0)
    valid = exists & (box[..., 2:] - box[..., :2] > min_size).all(-1) & box.isfinite().all(-1)
    return box, valid


register_composite("proposals", proposals_composite)


@torch.library.register_fake("maskrcnn_benchmark::proposals", lib=LIBRARY)
def _(deltas, anchors, index, sizes, clip, min_size):
    return deltas.new_empty((*index.shape, 4)), index.new_empty(index.shape, dtype=torch.bool)
