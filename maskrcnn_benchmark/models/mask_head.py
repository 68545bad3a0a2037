"""Mask branch (He et al. 2017, section 3): a small map of the object within each box."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import masks
from ..ops.convolution import conv2d
from ..structures import BitmapBatch, Detections, PolygonBatch, Targets, flatten_valid
from .box_head import SampledRoIs, image_index_of, unflatten
from .layers import Norm, conv, init_he, with_relu
from .roi_pool import RoIPool


class ConvFeatureExtractor(nn.Module):
    """3x3 convolutions over the pooled map, of parameters named `mask_fcn1` (or another `name`) and on."""

    def __init__(
        self,
        in_channels: int,
        channels: tuple[int, ...],
        norm: Norm | None = None,
        dilation: int = 1,
        name: str = "mask_fcn",
    ) -> None:
        super().__init__()
        self.blocks = [f"{name}{number}" for number in range(1, len(channels) + 1)]
        for block, out_channels in zip(self.blocks, channels):
            self.add_module(block, conv(in_channels, out_channels, 3, norm, init=init_he, dilation=dilation))
            in_channels = out_channels
        self.out_channels = in_channels

    def forward(self, x: Tensor) -> Tensor:
        for name in self.blocks:
            x = with_relu(getattr(self, name), x)
        return x


class MaskPredictor(nn.Module):
    """Doubles the resolution and predicts the map of one class a RoI: [R, C, S, S] -> [R, 2S, 2S] logits.

    The windows of a transposed convolution of kernel 2 and stride 2 do not overlap, so it is a 1x1 convolution to four
    times the channels. The last 1x1 convolution is evaluated for the wanted class alone, not for all 81: together half
    the time of the two layers as they stand, and 1/81 of the logits.
    """

    def __init__(self, in_channels: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.conv5_mask = nn.ConvTranspose2d(in_channels, hidden, 2, stride=2)
        self.mask_fcn_logits = nn.Conv2d(hidden, classes, 1)
        for layer in (self.conv5_mask, self.mask_fcn_logits):
            init_he(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """label [R] int64: the class of each RoI; where there are fewer maps than classes, the last serves the rest."""
        last, upsample = self.mask_fcn_logits, self.conv5_mask
        quarters = upsample.weight.permute(2, 3, 1, 0).flatten(0, 2)[..., None, None]
        x = conv2d(x, quarters, upsample.bias.repeat(4), relu=True)
        label = label.clamp(max=last.out_channels - 1)
        weight, bias = (parameter.flatten(1)[label].to(x.dtype) for parameter in (last.weight, last.bias[:, None]))
        pixels = x.permute(0, 2, 3, 1).reshape(len(x), 4 * x.shape[2] * x.shape[3], last.in_channels)
        logits = torch.baddbmm(bias[:, None], pixels, weight[..., None])
        height, width = x.shape[2:]  # each pixel's quarters lie upper left, upper right, lower left, lower right
        return logits.view(-1, height, width, 2, 2).transpose(2, 3).reshape(-1, 2 * height, 2 * width)


class MaskHead(nn.Module):
    """Masks of the positive proposals (losses) or of the detections.

    feature_extractor: the box head's own when `share_features` (C4): then the losses read the features that the box
    head made.
    soft_bitmap_targets: targets from bitmaps keep their fractions (torchvision).
    plus_one: targets are cropped by maskrcnn-benchmark's arithmetic.
    """

    def __init__(
        self,
        pool: RoIPool,
        feature_extractor: nn.Module,
        predictor: MaskPredictor,
        share_features: bool = False,
        soft_bitmap_targets: bool = False,
        positives_per_image: int = 128,
        plus_one: bool = False,
        compact: bool = False,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.feature_extractor = feature_extractor
        self.predictor = predictor
        self.share_features = share_features
        self.soft_bitmap_targets = soft_bitmap_targets
        self.positives_per_image = positives_per_image
        self.plus_one = plus_one
        self.compact = compact

    def forward(self, features: list[Tensor], boxes: Tensor, image_index: Tensor, label: Tensor) -> Tensor:
        """boxes [R, 4] -> logits [R, M, M] of each box's class."""
        return self.predictor(self.feature_extractor(self.pool(features, boxes, image_index)), label)

    def losses(self, features: list[Tensor], chosen: SampledRoIs, targets: Targets) -> dict[str, Tensor]:
        """Binary cross entropy of the map of each positive's class, mean over pixels and positives."""
        sampled = chosen.positive.shape[1]
        first = slice(0, min(self.positives_per_image, sampled))  # positives come first
        positive = chosen.positive[:, first]
        image = image_index_of(positive)
        row = image * sampled + torch.arange(positive.shape[1], device=positive.device)
        instance = image * targets.valid.shape[1] + chosen.matched[:, first]
        fields = (chosen.boxes[:, first], image, chosen.labels[:, first], instance, row)
        _, weight, (box, image, label, instance, row) = flatten_valid(positive, fields, self.compact)
        if self.share_features:
            # rows rise, and in a compacted batch some are missing: find each positive among them
            logits = self.predictor(chosen.features[torch.searchsorted(chosen.rows, row)], label)
        else:
            logits = self(features, box, image, label)
        logits = logits.float()
        with torch.no_grad():
            wanted = self.targets(targets.masks, instance, box, logits.shape[-1])
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=(1, 2))
        return {"loss_mask": (loss * weight).sum() / weight.sum().clamp(min=1)}

    def targets(self, truth: PolygonBatch | BitmapBatch, instance: Tensor, boxes: Tensor, size: int) -> Tensor:
        """[R, size, size] float32: the masks of `instance` [R] within `boxes` [R, 4]."""
        if isinstance(truth, PolygonBatch):
            packed = (truth.points, truth.polygon_offsets, truth.instance_offsets)
            crop = masks.inclusive_crop(boxes) if self.plus_one else boxes
            return masks.polygon_targets(*packed, instance, crop, size)
        draw = masks.bitmap_targets_whole_pixels if self.plus_one else masks.bitmap_targets
        return draw(truth.bitmaps.flatten(0, 1), instance, boxes, size, self.soft_bitmap_targets)

    def detect(self, features: list[Tensor], detections: Detections) -> Detections:
        """`detections` with masks [B, D, M, M], probabilities of each one's class."""
        fields = (detections.boxes, image_index_of(detections.valid), detections.labels)
        rows, _, (box, image, label) = flatten_valid(detections.valid, fields, self.compact)
        probability = self(features, box, image, label).float().sigmoid()
        detections.masks = unflatten(rows, probability, detections.valid.shape)
        return detections
