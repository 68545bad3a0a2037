"""AugFPN (Guo et al. 2020): three changes to a feature pyramid, each a switch of its own.

Residual feature augmentation (section 3.2): the top of the pyramid gets context of several scales.
Consistent supervision (section 3.1): in training, an auxiliary head classifies each RoI on every lateral map.
Soft RoI selection (section 3.3): an RoI's features come from all levels, by learned weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..structures import Targets
from .box_head import SampledRoIs
from .fpn import FPN
from .layers import conv, with_relu
from .losses import roi_losses
from .roi_pool import RoIPool


class AdaptiveSpatialFusion(nn.Module):
    """Maps [B, C, H, W] -> their sum, each weighed by a learned map of 0..1 that all of them decide (figure 4)."""

    def __init__(self, channels: int, inputs: int) -> None:
        super().__init__()
        self.reduce = conv(channels * inputs, channels, 1)
        self.weigh = conv(channels, inputs, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        weights = self.weigh(with_relu(self.reduce, torch.cat(tuple(maps), 1))).sigmoid()
        return sum(weight * x for weight, x in zip(weights.split(1, dim=1), maps))


class ResidualAugmentation(nn.Module):
    """C5 [B, Cin, H, W] -> M6 [B, C, H, W]: C5 averaged to `ratios` of its sides, reduced, brought back and fused."""

    def __init__(self, in_channels: int, channels: int, ratios: Sequence[float]) -> None:
        super().__init__()
        self.ratios = ratios
        self.context = nn.ModuleList(conv(in_channels, channels, 1) for _ in ratios)
        self.fuse = AdaptiveSpatialFusion(channels, len(ratios))

    def forward(self, x: Tensor) -> Tensor:
        size, maps = x.shape[-2:], []
        for ratio, reduce in zip(self.ratios, self.context):
            pooled = reduce(F.adaptive_avg_pool2d(x, [max(1, int(ratio * side)) for side in size]))
            maps.append(F.interpolate(pooled, size=size, mode="bilinear", align_corners=True))
        return self.fuse(maps)


class AugFPN(FPN):
    """ratios: of residual feature augmentation; none: without it.
    give_laterals: in training the maps M2..M5 follow P2..P6, for an AuxiliaryHead.
    options: FPN's.
    """

    def __init__(
        self,
        in_channels: list[int],
        out_channels: int,
        ratios: Sequence[float] = (),
        give_laterals: bool = False,
        **options,
    ) -> None:
        super().__init__(in_channels, out_channels, **options)
        self.augment = ResidualAugmentation(in_channels[-1], out_channels, ratios) if ratios else None
        self.give_laterals = give_laterals

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        laterals = self.laterals(features)
        top = laterals[-1] if self.augment is None else laterals[-1] + self.augment(features[-1])
        outputs = self.top_down([*laterals[:-1], top], features[-1])
        return outputs + laterals if self.training and self.give_laterals else outputs


def pool_all_levels(pool: RoIPool, features: list[Tensor], boxes: Tensor, image_index: Tensor) -> list[Tensor]:
    """[R, C, S, S] a level: each box [R, 4] from every level, whatever its size."""
    levels, rois = len(pool.scales), len(boxes)
    level = torch.arange(levels, device=boxes.device).repeat_interleave(rois)
    pooled = pool.from_levels(features, boxes.repeat(levels, 1), image_index.repeat(levels), level)
    return list(pooled.unflatten(0, (levels, rois)).unbind(0))


class SoftRoIPool(nn.Module):
    """In place of RoIPool: adaptive spatial fusion of a box's features from all levels."""

    def __init__(self, pool: RoIPool, channels: int) -> None:
        super().__init__()
        self.pool = pool
        self.fuse = AdaptiveSpatialFusion(channels, len(pool.scales))

    def forward(self, features: list[Tensor], boxes: Tensor, image_index: Tensor) -> Tensor:
        return self.fuse(pool_all_levels(self.pool, features, boxes, image_index))


class AuxiliaryHead(nn.Module):
    """Box head losses on every lateral map, by one extractor and predictor for all of them.

    pool: of the box head. loss_weight: the paper's lambda, of the mean over the maps. criterion: roi_losses' options.
    """

    def __init__(
        self,
        pool: RoIPool,
        feature_extractor: nn.Module,
        predictor: nn.Module,
        reg_weights: Sequence[float],
        loss_weight: float = 0.25,
        compact: bool = False,
        **criterion,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.feature_extractor, self.predictor = feature_extractor, predictor
        self.reg_weights, self.loss_weight = reg_weights, loss_weight
        self.compact, self.criterion = compact, criterion

    def losses(self, features: list[Tensor], chosen: SampledRoIs, targets: Targets) -> dict[str, Tensor]:
        """features: AugFPN's, which end with the laterals. chosen: of the box head's (first) stage."""
        _, rows = chosen.flatten(self.compact)
        laterals, parts = features[-len(self.pool.scales) :], []
        for pooled in pool_all_levels(self.pool, laterals, rows.boxes, rows.image):
            predicted = self.predictor(self.feature_extractor(pooled))
            parts.append(roi_losses(*predicted, rows, self.reg_weights, **self.criterion))
        share = self.loss_weight / len(parts)
        return {f"{name}_auxiliary": share * sum(part[name] for part in parts) for name in parts[0]}
