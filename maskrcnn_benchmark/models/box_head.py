"""Second stage: classify and refine proposals (Girshick 2015; with FPN: Lin et al. 2017, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..ops import box_coder, boxes, matching, nms
from ..ops.distance_nms import distance_nms
from ..ops.soft_nms import soft_nms
from ..structures import Detections, Proposals, Targets, flatten_valid
from .layers import Linear, Norm, conv, normal_layer, with_relu
from .losses import RoIRows, roi_losses
from .resnet import make_stage
from .roi_pool import RoIPool
from .sampling import Sample, overlap_groups, sample


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
    rows, and rows [R] int64, which of the B * S they are. refined: of a cascade, the same for each further stage.
    """

    boxes: Tensor
    valid: Tensor
    positive: Tensor
    labels: Tensor
    matched: Tensor
    wanted: Tensor
    features: Tensor | None = None
    rows: Tensor | None = None
    refined: tuple[SampledRoIs, ...] = ()

    def flatten(self, compact: bool) -> tuple[Tensor, RoIRows]:
        """`rows` [R] and what lies there, as structures.flatten_valid gives it."""
        fields = (self.boxes, image_index_of(self.valid), self.labels, self.positive, self.wanted)
        rows, weight, flat = flatten_valid(self.valid, fields, compact)
        return rows, RoIRows(*flat, weight=weight, count=self.valid.sum().clamp(min=1))


class BoxHead(nn.Module):
    """Pool, extract, predict; then losses or detections.

    reg_weights: the box coder's weights of dx, dy, dw, dh.
    box_loss, box_loss_weight: losses.box_loss's kind, and what it is multiplied by.
    balance_negatives: as many negatives of each third of the overlaps below background_iou (Libra R-CNN).
    nms_type: MultiClassNMS, MultiClassSoftNMS (with soft_nms_sigma, without nms_threshold) or MultiClassCiouNMS.
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
        box_loss: str = "SmoothL1Loss",
        box_loss_weight: float = 1.0,
        balance_negatives: bool = False,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        nms_type: str = "MultiClassNMS",
        soft_nms_sigma: float = 0.5,
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
        self.smooth_l1_beta, self.box_loss, self.box_loss_weight = smooth_l1_beta, box_loss, box_loss_weight
        self.balance_negatives = balance_negatives
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.nms_type, self.soft_nms_sigma = nms_type, soft_nms_sigma
        self.detections_per_image = detections_per_image
        self.least_side = 1.0 if plus_one else 0.0  # of a box cut to its image
        self.compact = compact

    def forward(self, features: list[Tensor], boxes: Tensor, image_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """boxes [R, 4] -> features of the extractor, logits [R, classes], deltas [R, 4 * classes]."""
        x = self.feature_extractor(self.pool(features, boxes, image_index))
        return (x, *self.predictor(x))

    def losses(
        self, features: list[Tensor], proposals: Proposals, targets: Targets, sizes: Tensor
    ) -> tuple[SampledRoIs, dict[str, Tensor]]:
        """The sampled proposals, for the heads that follow, and the classification and box losses.

        sizes: [B, 2] (height, width) of each image, which a cascade needs.
        """
        chosen = self.sample(proposals, targets)
        *_, losses = self.learn(features, chosen, self.reg_weights)
        return chosen, losses

    def learn(
        self, features: list[Tensor], chosen: SampledRoIs, reg_weights: tuple[float, ...], *part: int
    ) -> tuple[RoIRows, Tensor, Tensor, dict[str, Tensor]]:
        """The rows of `chosen`, whose features it keeps, their logits and deltas, and the losses.

        part: what further `forward` takes, the stage of a cascade.
        """
        chosen.rows, rows = chosen.flatten(self.compact)
        chosen.features, logits, deltas = self(features, rows.boxes, rows.image, *part)
        kind = (self.box_loss, self.smooth_l1_beta, self.box_loss_weight)
        return rows, logits, deltas, roi_losses(logits, deltas, rows, reg_weights, *kind)

    @torch.no_grad()
    def sample(self, proposals: Proposals, targets: Targets) -> SampledRoIs:
        """Proposals and the ground truth itself, matched and sampled."""
        candidates = torch.cat((proposals.boxes, targets.boxes), 1)
        valid = torch.cat((proposals.valid, targets.valid), 1)
        matched, label = matching.match(
            targets.boxes, targets.valid, candidates, self.foreground_iou, self.background_iou, False
        )
        label = torch.where(valid, label, -1)
        groups = None
        if self.balance_negatives:
            groups = overlap_groups(candidates, take(targets.boxes, matched), self.background_iou)
        chosen = sample(label, self.batch_size, self.positive_fraction, groups)
        return sampled_rois(candidates, targets, matched, chosen)

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
        return self.pairs(rows, box, logits.float().softmax(-1), deltas, proposals.valid.shape, sizes)

    def pairs(
        self, rows: Tensor, box: Tensor, probability: Tensor, deltas: Tensor, shape: torch.Size, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`candidates` from rows [R] of B x K = shape: box [R, 4], probability [R, classes], deltas [R, ...]."""
        score = probability[:, 1:]
        delta = deltas.float().unflatten(1, (-1, 4))[:, 1:]
        decoded = box_coder.decode(delta, box[:, None], self.reg_weights).expand(-1, score.shape[1], -1)
        group = torch.arange(score.shape[1], device=score.device).repeat(shape[1]).expand(shape[0], -1)
        score = unflatten(rows, score, shape).flatten(1)
        decoded = boxes.clip(unflatten(rows, decoded, shape).flatten(1, 2), sizes, self.least_side)
        return decoded, score, group, (score > self.score_threshold) & decoded.isfinite().all(-1)

    def select(self, boxes: Tensor, score: Tensor, group: Tensor, candidate: Tensor) -> Detections:
        """The best of the candidates after NMS within each group."""
        rows, limit = (boxes, score, group, candidate), self.detections_per_image
        if self.nms_type == "MultiClassSoftNMS":
            least = self.score_threshold
            index, keep, score = soft_nms(*rows, True, self.nms_threshold, self.soft_nms_sigma, least, limit)
        else:
            if self.nms_type == "MultiClassCiouNMS":
                index, keep = distance_nms(*rows, self.nms_threshold, True, limit)
            else:
                index, keep = nms.nms(*rows, self.nms_threshold, limit)
            score = score.gather(1, index)
        return Detections(boxes=take(boxes, index), scores=score, labels=group.gather(1, index) + 1, valid=keep)


def sampled_rois(candidates: Tensor, targets: Targets, matched: Tensor, chosen: Sample) -> SampledRoIs:
    """The chosen of candidates [B, A, 4], with the ground truth that is `matched` [B, A] to each."""
    matched = matched.gather(1, chosen.index)
    return SampledRoIs(
        boxes=take(candidates, chosen.index),
        valid=chosen.valid,
        positive=chosen.positive,
        labels=torch.where(chosen.positive, targets.labels.gather(1, matched), 0),
        matched=matched,
        wanted=take(targets.boxes, matched),
    )


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, S] of [B, K, 4]."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))


def image_index_of(valid: Tensor) -> Tensor:
    """[B, K] int64: for each row the image it belongs to."""
    return torch.arange(len(valid), device=valid.device)[:, None].expand(valid.shape)


def unflatten(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of flatten_valid: [R, ...] back to [B, K, ...], zero where a row was dropped."""
    whole = values.new_zeros((shape[0] * shape[1], *values.shape[1:]))
    return whole.index_copy(0, rows, values).unflatten(0, shape)
