"""RetinaNet (Lin et al. 2017, Focal Loss for Dense Object Detection): one stage, every anchor classified."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..ops import box_coder, boxes, matching, nms
from ..ops.focal_loss import sigmoid_focal_loss
from ..structures import Detections, ImageBatch, Targets
from .anchors import AnchorGenerator
from .box_head import take
from .layers import Conv2d, Norm, conv, normal_layer
from .losses import box_loss
from .rcnn import Detector, Normalize
from .rpn import inside


class RetinaNetHead(nn.Module):
    """Two towers of 3x3 convolutions, for classes and for boxes, the same on every level (section 4).

    classes: channels an anchor. prior: the probability that an anchor is an object of a class, before training.
    norm: after each of a tower's `convolutions`.
    """

    def __init__(
        self,
        in_channels: int,
        anchors_per_position: int,
        classes: int,
        convolutions: int = 4,
        prior: float = 0.01,
        norm: Norm | None = None,
    ) -> None:
        super().__init__()
        self.cls_tower = self._tower(in_channels, convolutions, norm)
        self.bbox_tower = self._tower(in_channels, convolutions, norm)
        self.cls_logits = normal_layer(Conv2d(in_channels, anchors_per_position * classes, 3, padding=1), 0.01)
        self.bbox_pred = normal_layer(Conv2d(in_channels, anchors_per_position * 4, 3, padding=1), 0.01)
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - prior) / prior))

    @staticmethod
    def _tower(channels: int, convolutions: int, norm: Norm | None) -> nn.Sequential:
        tower, init = nn.Sequential(), partial(nn.init.normal_, std=0.01)
        for _ in range(convolutions):
            tower.extend(conv(channels, channels, 3, norm, True, init))
        return tower

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps [B, C, H, W] -> logits [B, A * classes, H, W] and box deltas [B, A * 4, H, W], a level each."""
        logits = [self.cls_logits(self.cls_tower(feature)) for feature in features]
        return logits, [self.bbox_pred(self.bbox_tower(feature)) for feature in features]


class RetinaNet(Detector):
    """normalize -> backbone with P3 to P7 -> head.

    background_channel: channel 0 of the head stands for the background and is never wanted, as torchvision has it; a
        detection may then have label 0, which stands for no class. Otherwise channel c is class c + 1.
    coder_weights: the box coder's weights of dx, dy, dw, dh.
    straddle: anchors further outside the image than this are left out of the losses; negative: none.
    loss_normalizer: what the sums over anchors are divided by. "batch": the class loss by positives + images, the box
        loss by positives (maskrcnn-benchmark). "image": each image's by its positives, then the mean over images
        (torchvision). "positives": both by all images' positives, each image's counted as one at least (MMDetection).
        "moving_average": both by the positives' moving average over steps (detectron2).
    box_loss_divisor: divides the box loss once more.
    box_loss: losses.box_loss's kind. smooth_l1_beta: where it bends; 0 is L1.
    pre_nms: the best pairs of anchor and class that each level hands on to NMS.
    plus_one: maskrcnn-benchmark's arithmetic: a box keeps one pixel of the image, and `straddle` counts from an
        anchor's last pixel.
    clip_before_nms: boxes are cut to the image before NMS, or after it, when those without area go (detectron2).
    drop_empty: those without area are no candidates for NMS (MMDetection).
    """

    AVERAGE_START, AVERAGE_MOMENTUM = 100.0, 0.9  # detectron2's

    def __init__(
        self,
        normalize: Normalize,
        backbone: nn.Module,
        head: RetinaNetHead,
        anchors: AnchorGenerator,
        background_channel: bool = False,
        coder_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0),
        foreground_iou: float = 0.5,
        background_iou: float = 0.4,
        straddle: float = -1,
        alpha: float = 0.25,
        gamma: float = 2.0,
        loss_normalizer: str = "batch",
        box_loss_divisor: float = 4.0,
        box_loss: str = "SmoothL1Loss",
        smooth_l1_beta: float = 0.11,
        pre_nms: int = 1000,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.4,
        clip_before_nms: bool = True,
        drop_empty: bool = False,
        detections_per_image: int = 100,
        plus_one: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__(normalize, backbone)
        self.rpn = nn.ModuleDict({"head": head})  # where maskrcnn-benchmark has it
        self.anchors = anchors
        self.classes = head.cls_logits.out_channels // anchors.per_position
        self.background_channel = background_channel
        self.coder_weights = coder_weights
        self.foreground_iou, self.background_iou, self.straddle = foreground_iou, background_iou, straddle
        self.alpha, self.gamma = alpha, gamma
        self.loss_normalizer, self.box_loss_divisor = loss_normalizer, box_loss_divisor
        self.box_loss, self.smooth_l1_beta = box_loss, smooth_l1_beta
        self.pre_nms, self.score_threshold, self.nms_threshold = pre_nms, score_threshold, nms_threshold
        self.clip_before_nms, self.drop_empty = clip_before_nms, drop_empty
        self.detections_per_image = detections_per_image
        self.plus_one = plus_one
        if loss_normalizer == "moving_average":
            self.register_buffer("positives_average", torch.tensor(self.AVERAGE_START))
        self.set_memory_format(channels_last)

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        """With targets the losses by name, each a scalar; without them Detections in pixels of the resized images."""
        features, padded = self.features(images)
        if targets is not None:
            return self.losses(features, padded, images.sizes, targets)
        detections = self.select(*self.candidates(features, padded, images.sizes))
        return detections if self.clip_before_nms else clip_detections(detections, images.sizes)

    def predict(
        self, features: list[Tensor], padded: tuple[int, int]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Logits [B, N, classes], deltas [B, N, 4] and anchors [N, 4] of each level."""
        logits, deltas = self.rpn["head"](features)
        anchors = self.anchors([f.shape[-2:] for f in features], padded, features[0].device)
        logits = [x.permute(0, 2, 3, 1).reshape(len(x), -1, self.classes) for x in logits]
        return logits, [x.permute(0, 2, 3, 1).reshape(len(x), -1, 4).float() for x in deltas], anchors

    def losses(
        self, features: list[Tensor], padded: tuple[int, int], sizes: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        logits, deltas, levels = self.predict(features, padded)
        anchors = torch.cat(levels)
        with torch.no_grad():
            matched, label = matching.match(
                targets.boxes, targets.valid, anchors, self.foreground_iou, self.background_iou, True
            )
            if self.straddle >= 0:
                corners = boxes.to_inclusive(anchors) if self.plus_one else anchors
                label = torch.where(inside(corners, sizes, self.straddle), label, -1)
            positive = label == 1
            classes = targets.labels.gather(1, matched) + int(self.background_channel)
            classes = torch.where(positive, classes, label.long())
            wanted = torch.where(positive[..., None], take(targets.boxes, matched), anchors)
        # Level by level: all levels' logits in one tensor would be a copy of hundreds of megabytes.
        parts = zip(logits, classes.split([len(level) for level in levels], 1))
        classification = sum(self._focal(logit, wanted_class) for logit, wanted_class in parts)
        coder, beta = self.coder_weights, self.smooth_l1_beta
        regression = box_loss(self.box_loss, torch.cat(deltas, 1), anchors, wanted, coder, beta)
        regression = (regression * positive).sum(1) / self.box_loss_divisor
        by_class, by_box = self._normalizers(positive.sum(1))
        return {
            "loss_retina_cls": (classification / by_class).sum(),
            "loss_retina_reg": (regression / by_box).sum(),
        }

    def _focal(self, logits: Tensor, classes: Tensor) -> Tensor:
        """logits [B, N, classes], classes [B, N] -> the sum of each image, [B]."""
        loss = sigmoid_focal_loss(logits.flatten(0, 1), classes.flatten(), self.gamma, self.alpha)
        return loss.view_as(classes).sum(1)

    @torch.no_grad()
    def _normalizers(self, positives: Tensor) -> tuple[Tensor, Tensor]:
        """positives [B] -> what each image's class loss and box loss are divided by before they are added up."""
        images = len(positives)
        if self.loss_normalizer == "image":
            each = positives.clamp(min=1) * images
            return each, each
        if self.loss_normalizer == "positives":
            total = positives.clamp(min=1).sum()
            return total, total
        total = positives.sum()
        if self.loss_normalizer == "batch":
            # At least 1 after the divisor, which the box loss has got already.
            return total + images, total.clamp(min=1 / self.box_loss_divisor)
        average = torch.lerp(total.clamp(min=1).float(), self.positives_average, self.AVERAGE_MOMENTUM)
        if self.training:
            self.positives_average.copy_(average)
        return average, average

    def candidates(
        self, features: list[Tensor], padded: tuple[int, int], sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best pairs of anchor and class of each level: boxes [B, K, 4], scores [B, K], group (the channel), and
        whether the score is above the threshold."""
        found, parts = [], zip(*self.predict(features, padded))
        for logit, delta, anchor in parts:
            logit, index = logit.flatten(1).topk(min(self.pre_nms, logit[0].numel()))
            position = index // self.classes
            box = box_coder.decode(take(delta, position), anchor[position], self.coder_weights)
            found.append((box, logit.float().sigmoid(), index % self.classes))
        box, score, group = (torch.cat(tensors, 1) for tensors in zip(*found))
        if self.clip_before_nms:
            box = boxes.clip(box, sizes, least_side=1.0 if self.plus_one else 0.0)
        candidate = (score > self.score_threshold) & box.isfinite().all(-1)
        if self.drop_empty:
            candidate &= (box[..., 2:] > box[..., :2]).all(-1)
        return box, score, group, candidate

    def select(self, boxes: Tensor, score: Tensor, group: Tensor, candidate: Tensor) -> Detections:
        """The best of the candidates after NMS within each group."""
        index, keep = nms.nms(boxes, score, group, candidate, self.nms_threshold, self.detections_per_image)
        label = group.gather(1, index) + int(not self.background_channel)
        return Detections(boxes=take(boxes, index), scores=score.gather(1, index), labels=label, valid=keep)


def clip_detections(detections: Detections, sizes: Tensor) -> Detections:
    """Detections cut to their images; those of which nothing is left are not valid."""
    box = boxes.clip(detections.boxes, sizes)
    return replace(detections, boxes=box, valid=detections.valid & (box[..., 2:] > box[..., :2]).all(-1))
