"""Cascade R-CNN (Cai and Vasconcelos 2018, section 4): box heads in a row, each trained on the boxes of the one before,
against a higher IoU.

As in detectron2, proposals are sampled once, for the first stage; the later stages match the same RoIs anew, with their
refined boxes. Boxes pass no gradient from stage to stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import box_coder, boxes, matching
from ..structures import Detections, Proposals, Targets, flatten_valid
from .box_head import BoxHead, SampledRoIs, image_index_of, sampled_rois, unflatten
from .losses import of_class
from .mask_head import MaskHead
from .roi_pool import RoIPool
from .sampling import Sample


class CascadeBoxHead(BoxHead):
    """A feature extractor, a predictor, an IoU, the box coder's weights and the losses' weight for each stage.

    feature_gradient: the pyramid gets this share of the stages' gradient (detectron2: 1 / stages).
    average: scores are the mean of the stages' "probabilities" (the paper's section 4.1, detectron2) or the softmax of
        their mean "logits" (MMDetection).
    options: BoxHead's, all stages'.
    """

    def __init__(
        self,
        pool: RoIPool,
        feature_extractors: Sequence[nn.Module],
        predictors: Sequence[nn.Module],
        ious: Sequence[float],
        reg_weights: Sequence[tuple[float, float, float, float]],
        loss_weights: Sequence[float],
        feature_gradient: float = 1.0,
        average: str = "probabilities",
        **options,
    ) -> None:
        first = {"foreground_iou": ious[0], "background_iou": ious[0]}
        extractors, predictors = nn.ModuleList(feature_extractors), nn.ModuleList(predictors)
        super().__init__(pool, extractors, predictors, reg_weights=reg_weights[-1], **first, **options)
        self.ious, self.stage_reg_weights, self.loss_weights = ious, reg_weights, loss_weights
        self.feature_gradient, self.average = feature_gradient, average

    def forward(
        self, features: list[Tensor], boxes: Tensor, image_index: Tensor, stage: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self.feature_extractor[stage](self.pool(features, boxes, image_index))
        return (x, *self.predictor[stage](x))

    def losses(
        self, features: list[Tensor], proposals: Proposals, targets: Targets, sizes: Tensor
    ) -> tuple[SampledRoIs, dict[str, Tensor]]:
        """The first stage's RoIs, with the later stages' as `refined`, and each stage's weighted losses."""
        if self.feature_gradient != 1:
            features = [ScaledGradient.apply(feature, self.feature_gradient) for feature in features]
        stages, losses = [self.sample(proposals, targets)], {}
        for stage, weight in enumerate(self.loss_weights):
            chosen, coder = stages[-1], self.stage_reg_weights[stage]
            rows, logits, deltas, ours = self.learn(features, chosen, coder, stage)
            losses |= {f"{name}_stage{stage}": weight * loss for name, loss in ours.items()}
            if stage + 1 < len(self.ious):
                box = refine(rows.boxes, logits, deltas, coder, sizes[rows.image], rows.labels, self.least_side)
                box = unflatten(chosen.rows, box, chosen.valid.shape)
                stages.append(rematch(chosen, box, targets, self.ious[stage + 1]))
        stages[0].refined = tuple(stages[1:])
        return stages[0], losses

    def candidates(
        self, features: list[Tensor], proposals: Proposals, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        fields = (proposals.boxes, image_index_of(proposals.valid))
        rows, _, (box, image) = flatten_valid(proposals.valid, fields, self.compact)
        seen, last = [], len(self.ious) - 1
        for stage, coder in enumerate(self.stage_reg_weights):
            _, logits, deltas = self(features, box, image, stage)
            seen.append(logits.float() if self.average == "logits" else logits.float().softmax(-1))
            box = refine(box, logits, deltas, coder, sizes[image], None, self.least_side) if stage < last else box
        score = torch.stack(seen).mean(0)
        score = score.softmax(-1) if self.average == "logits" else score
        return self.pairs(rows, box, score, deltas, proposals.valid.shape, sizes)


class CascadeMaskHead(nn.Module):
    """A mask head for each stage, trained on the stage's RoIs; masks are their mean (MMDetection)."""

    def __init__(self, stages: Sequence[MaskHead], loss_weights: Sequence[float]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.loss_weights = loss_weights

    def losses(self, features: list[Tensor], chosen: SampledRoIs, targets: Targets) -> dict[str, Tensor]:
        rois = (chosen, *chosen.refined)
        return {
            f"{name}_stage{number}": weight * loss
            for number, (stage, weight) in enumerate(zip(self.stages, self.loss_weights))
            for name, loss in stage.losses(features, rois[number], targets).items()
        }

    def detect(self, features: list[Tensor], detections: Detections) -> Detections:
        """`detections` with masks [B, D, M, M], probabilities of each one's class."""
        detections.masks = torch.stack([stage.detect(features, detections).masks for stage in self.stages]).mean(0)
        return detections


class ScaledGradient(torch.autograd.Function):
    """The tensor itself, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


@torch.no_grad()
def refine(
    box: Tensor,
    logits: Tensor,
    deltas: Tensor,
    reg_weights: Sequence[float],
    sizes: Tensor,
    labels: Tensor | None = None,
    least_side: float = 0.0,
) -> Tensor:
    """[R, 4]: where a stage moves box [R, 4], cut to its image of sizes [R, 2].

    Deltas are those of labels [R], and of the most probable class where a label is 0 or there are none.
    least_side: boxes.clip's.
    """
    likely = logits[:, 1:].argmax(1) + 1
    label = likely if labels is None else torch.where(labels > 0, labels, likely)
    moved = box_coder.decode(of_class(deltas.float().unflatten(1, (-1, 4)), label), box, reg_weights)
    return boxes.clip(moved[:, None], sizes, least_side)[:, 0]


@torch.no_grad()
def rematch(chosen: SampledRoIs, box: Tensor, targets: Targets, iou: float) -> SampledRoIs:
    """The RoIs with boxes [B, S, 4] of the next stage, positive from `iou` on, positives first. A box without an
    inside drops out."""
    valid = chosen.valid & (box[..., 2:] > box[..., :2]).all(-1)
    matched, label = matching.match(targets.boxes, targets.valid, box, iou, iou, False)
    positive = valid & (label == 1)
    order = positive.int().argsort(dim=1, descending=True, stable=True)
    resorted = Sample(index=order, positive=positive.gather(1, order), valid=valid.gather(1, order))
    return sampled_rois(box, targets, matched, resorted)
