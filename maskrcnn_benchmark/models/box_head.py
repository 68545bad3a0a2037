"""Second stage: classify and refine proposals (Girshick 2015; with FPN: Lin et al. 2017, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import box_coder, boxes, matching, nms
from ..structures import Detections, Proposals, Targets, flatten_valid
from .layers import Linear, Norm, conv, normal_layer, with_relu
from .resnet import make_stage
from .roi_pool import RoIPool
from .sampling import sample


def linear(in_features: int, out_features: int, norm: Norm | None = None) -> nn.Module:
    """A fully connected layer; with a norm a Sequential, named as in `layers.conv`."""
    layer = Linear(in_features, out_features, bias=norm is None)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    if norm is not None:
        return nn.Sequential(layer, norm(out_features))
    nn.init.zeros_(layer.bias)
    return layer


class MLPFeatureExtractor(nn.Module):
    """Two fully connected layers over the pooled map: [R, C, S, S] -> [R, hidden]."""

    def __init__(self, in_channels: int, resolution: int, hidden: int = 1024, norm: Norm | None = None) -> None:
        super().__init__()
        self.fc6 = linear(in_channels * resolution**2, hidden, norm)
        self.fc7 = linear(hidden, hidden, norm)
        self.out_channels = hidden

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous().flatten(1)  # fc6's weights count channel, y, x, in all three peers
        return with_relu(self.fc7, with_relu(self.fc6, x))


class ConvFCFeatureExtractor(nn.Module):
    """3x3 convolutions (`xconvs`, as many as `channels`) and one fully connected layer (`fc6`) over the pooled map:
    [R, C, S, S] -> [R, hidden] (Wu and He 2018, section 4.2: 4conv1fc)."""

    def __init__(
        self,
        in_channels: int,
        resolution: int,
        channels: tuple[int, ...],
        hidden: int = 1024,
        norm: Norm | None = None,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.xconvs = nn.Sequential()
        for out_channels in channels:
            layer = conv(in_channels, out_channels, 3, norm, True, partial(nn.init.normal_, std=0.01), dilation)
            self.xconvs.extend(layer)
            in_channels = out_channels
        self.fc6 = linear(in_channels * resolution**2, hidden, None)
        self.out_channels = hidden

    def forward(self, x: Tensor) -> Tensor:
        return with_relu(self.fc6, self.xconvs(x).contiguous().flatten(1))


class Conv5FeatureExtractor(nn.Module):
    """res5 over the pooled map: [R, 1024, 14, 14] -> [R, 2048, 7, 7] (Mask R-CNN's C4 head)."""

    def __init__(self, depth: int, in_channels: int, norm: Norm, **stage_options) -> None:
        super().__init__()
        self.head = nn.Module()
        self.head.layer4, self.out_channels = make_stage(depth, 3, in_channels, norm, **stage_options)

    def forward(self, x: Tensor) -> Tensor:
        return self.head.layer4(x)


class BoxPredictor(nn.Module):
    """Class logits [R, classes] and box deltas [R, 4 * classes], background first; class-agnostic: [R, 4 * 2], the
    second in use. A map [R, C, S, S] is averaged first (C4)."""

    def __init__(self, in_channels: int, classes: int, class_agnostic: bool = False) -> None:
        super().__init__()
        self.cls_score = normal_layer(nn.Linear(in_channels, classes), 0.01)
        self.bbox_pred = normal_layer(nn.Linear(in_channels, 4 * (2 if class_agnostic else classes)), 0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() == 4:
            x = x.mean(dim=(2, 3))
        return self.cls_score(x), self.bbox_pred(x)


@dataclass
class SampledRoIs:
    """Proposals chosen for the losses, positives first.

    boxes [B, S, 4]; valid, positive [B, S] bool; labels [B, S] int64, 0 for negatives; matched [B, S] int64, the
    ground truth of each; wanted [B, S, 4], the ground truth's box. features: the extractor's output for the valid
    rows, and rows [R] int64, which of the B * S they are.
    """

    boxes: Tensor
    valid: Tensor
    positive: Tensor
    labels: Tensor
    matched: Tensor
    wanted: Tensor
    features: Tensor | None = None
    rows: Tensor | None = None


class BoxHead(nn.Module):
    """Pool, extract, predict; then losses or detections.

    reg_weights: the box coder's weights of dx, dy, dw, dh.
    plus_one: maskrcnn-benchmark's arithmetic: a box keeps one pixel of the image.
    compact: drop padded rows (structures.flatten_valid).
    """

    def __init__(
        self,
        pool: RoIPool,
        feature_extractor: nn.Module,
        predictor: BoxPredictor,
        reg_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0),
        foreground_iou: float = 0.5,
        background_iou: float = 0.5,
        batch_size: int = 512,
        positive_fraction: float = 0.25,
        smooth_l1_beta: float = 1.0,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections_per_image: int = 100,
        plus_one: bool = False,
        compact: bool = False,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.feature_extractor = feature_extractor
        self.predictor = predictor
        self.reg_weights = reg_weights
        self.foreground_iou, self.background_iou = foreground_iou, background_iou
        self.batch_size, self.positive_fraction = batch_size, positive_fraction
        self.smooth_l1_beta = smooth_l1_beta
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.detections_per_image = detections_per_image
        self.plus_one = plus_one
        self.compact = compact

    def forward(self, features: list[Tensor], boxes: Tensor, image_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """boxes [R, 4] -> features of the extractor, logits [R, classes], deltas [R, 4 * classes]."""
        x = self.feature_extractor(self.pool(features, boxes, image_index))
        return (x, *self.predictor(x))

    def losses(
        self, features: list[Tensor], proposals: Proposals, targets: Targets
    ) -> tuple[SampledRoIs, dict[str, Tensor]]:
        """The sampled proposals, for the heads that follow, and the classification and box losses."""
        chosen = self.sample(proposals, targets)
        image = image_index_of(chosen.valid)
        fields = (chosen.boxes, image, chosen.labels, chosen.positive, chosen.wanted)
        chosen.rows, weight, (box, image, label, positive, wanted) = flatten_valid(chosen.valid, fields, self.compact)
        chosen.features, logits, deltas = self(features, box, image)
        with torch.no_grad():
            wanted = torch.where(positive[:, None], box_coder.encode(wanted, box, self.reg_weights), 0.0)
            count = chosen.valid.sum().clamp(min=1)
        classification = F.cross_entropy(logits.float(), label, reduction="none")
        delta = of_class(deltas.float().unflatten(1, (-1, 4)), label)
        regression = F.smooth_l1_loss(delta, wanted, reduction="none", beta=self.smooth_l1_beta).sum(-1)
        return chosen, {
            "loss_classifier": (classification * weight).sum() / count,
            "loss_box_reg": (regression * positive).sum() / count,
        }

    @torch.no_grad()
    def sample(self, proposals: Proposals, targets: Targets) -> SampledRoIs:
        """Proposals and the ground truth itself, matched and sampled."""
        candidates = torch.cat((proposals.boxes, targets.boxes), 1)
        valid = torch.cat((proposals.valid, targets.valid), 1)
        matched, label = matching.match(
            targets.boxes, targets.valid, candidates, self.foreground_iou, self.background_iou, False
        )
        chosen = sample(torch.where(valid, label, -1), self.batch_size, self.positive_fraction)
        matched = matched.gather(1, chosen.index)
        return SampledRoIs(
            boxes=take(candidates, chosen.index),
            valid=chosen.valid,
            positive=chosen.positive,
            labels=torch.where(chosen.positive, targets.labels.gather(1, matched), 0),
            matched=matched,
            wanted=take(targets.boxes, matched),
        )

    def detect(self, features: list[Tensor], proposals: Proposals, sizes: Tensor) -> Detections:
        """Each (proposal, class) pair above the score threshold, NMS within a class, the best of all."""
        return self.select(*self.candidates(features, proposals, sizes))

    def candidates(
        self, features: list[Tensor], proposals: Proposals, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Each of B x K x C (proposal, class) pairs: boxes [B, K * C, 4] clipped to the image, scores, group
        (label - 1), and whether the score is above the threshold."""
        fields = (proposals.boxes, image_index_of(proposals.valid))
        rows, _, (box, image) = flatten_valid(proposals.valid, fields, self.compact)
        _, logits, deltas = self(features, box, image)
        score = logits.float().softmax(-1)[:, 1:]
        delta = deltas.float().unflatten(1, (-1, 4))[:, 1:]
        decoded = box_coder.decode(delta, box[:, None], self.reg_weights).expand(-1, score.shape[1], -1)
        shape = proposals.valid.shape
        score = unflatten(rows, score, shape).flatten(1)
        decoded = unflatten(rows, decoded, shape).flatten(1, 2)
        decoded = boxes.clip(decoded, sizes, least_side=1.0 if self.plus_one else 0.0)
        group = torch.arange(logits.shape[1] - 1, device=score.device).repeat(shape[1]).expand(shape[0], -1)
        return decoded, score, group, (score > self.score_threshold) & decoded.isfinite().all(-1)

    def select(self, boxes: Tensor, score: Tensor, group: Tensor, candidate: Tensor) -> Detections:
        """The best of the candidates after NMS within each group."""
        index, keep = nms.nms(boxes, score, group, candidate, self.nms_threshold, self.detections_per_image)
        return Detections(
            boxes=take(boxes, index), scores=score.gather(1, index), labels=group.gather(1, index) + 1, valid=keep
        )


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, S] of [B, K, 4]."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))


def image_index_of(valid: Tensor) -> Tensor:
    """[B, K] int64: for each row the image it belongs to."""
    return torch.arange(len(valid), device=valid.device)[:, None].expand(valid.shape)


def of_class(rows: Tensor, label: Tensor) -> Tensor:
    """Of [R, classes, ...] the part of each row's class; class-agnostic parts ([R, 2, ...]) serve all labels."""
    return rows[torch.arange(len(rows), device=rows.device), label.clamp(max=rows.shape[1] - 1)]


def unflatten(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of flatten_valid: [R, ...] back to [B, K, ...], zero where a row was dropped."""
    whole = values.new_zeros((shape[0] * shape[1], *values.shape[1:]))
    return whole.index_copy(0, rows, values).unflatten(0, shape)
