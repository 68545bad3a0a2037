"""Losses of the RPN and of the box heads; the names are PaddleX's.

Smooth L1 of deltas: Girshick 2015, section 2.3. 1 - IoU of boxes: Rezatofighi et al. 2019 (GIoU), Zheng et al. 2020,
sections 3.2 and 3.3 (DIoU, CIoU). Focal loss: Lin et al. 2017, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import box_coder, boxes
from ..ops.focal_loss import sigmoid_focal_loss

OVERLAPS = {"GIoULoss": boxes.paired_giou, "DIoULoss": boxes.paired_diou, "CIoULoss": boxes.paired_ciou}


@dataclass
class RoIRows:
    """What a box head's losses read, an RoI a row.

    boxes [R, 4], wanted [R, 4] the ground truth's; image, labels [R] int64; positive [R] bool; weight [R] float32, 0 on
    padding; count [], the RoIs that are not padding, at least 1.
    """

    boxes: Tensor
    image: Tensor
    labels: Tensor
    positive: Tensor
    wanted: Tensor
    weight: Tensor
    count: Tensor


def objectness_loss(
    logits: Tensor, positive: Tensor, valid: Tensor, normalizer: Tensor | int, focal: tuple[float, float] | None = None
) -> Tensor:
    """Of sampled anchors, logits [B, S], a scalar: binary cross entropy over `normalizer`; with focal, (alpha, gamma),
    the focal loss over the number of positives, at least 1, as in the paper."""
    if focal is None:
        entropy = F.binary_cross_entropy_with_logits(logits, positive.float(), reduction="none")
        return (entropy * valid).sum() / normalizer
    alpha, gamma = focal
    label = torch.where(valid, positive.long(), -1)
    loss = sigmoid_focal_loss(logits.flatten()[:, None], label.flatten(), gamma, alpha)
    return loss.sum() / positive.sum().clamp(min=1)


def box_loss(
    kind: str, delta: Tensor, anchors: Tensor, wanted: Tensor, weights: Sequence[float], beta: float = 1.0
) -> Tensor:
    """[R]: the loss of deltas [R, 4] from anchors [R, 4], where boxes `wanted` [R, 4] were due.

    kind: SmoothL1Loss of the deltas, bent at beta, or 1 - overlap of the boxes: GIoULoss, DIoULoss, CIoULoss. weights:
    the box coder's.
    """
    if kind in OVERLAPS:
        return 1 - OVERLAPS[kind](box_coder.decode(delta, anchors, weights), wanted)
    with torch.no_grad():
        target = box_coder.encode(wanted, anchors, weights)
    return F.smooth_l1_loss(delta, target, reduction="none", beta=beta).sum(-1)


def roi_losses(
    logits: Tensor,
    deltas: Tensor,
    rows: RoIRows,
    reg_weights: Sequence[float],
    kind: str = "SmoothL1Loss",
    beta: float = 1.0,
    box_weight: float = 1.0,
) -> dict[str, Tensor]:
    """Cross entropy of logits [R, classes], and `box_weight` x the loss of the positives' own deltas, of
    [R, 4 * classes]: both over all sampled RoIs (Girshick 2015, equation 1)."""
    classification = F.cross_entropy(logits.float(), rows.labels, reduction="none")
    delta = of_class(deltas.float().unflatten(1, (-1, 4)), rows.labels)
    wanted = torch.where(rows.positive[:, None], rows.wanted, rows.boxes)
    regression = box_loss(kind, delta, rows.boxes, wanted, reg_weights, beta)
    return {
        "loss_classifier": (classification * rows.weight).sum() / rows.count,
        "loss_box_reg": box_weight * (regression * rows.positive).sum() / rows.count,
    }


def of_class(rows: Tensor, label: Tensor) -> Tensor:
    """Of [R, classes, ...] the part of each row's class; class-agnostic parts ([R, 2, ...]) serve all labels."""
    return rows[torch.arange(len(rows), device=rows.device), label.clamp(max=rows.shape[1] - 1)]
