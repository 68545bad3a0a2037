"""Keypoint branch (He et al. 2017, section 5): a heat map of each keypoint within each box."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import boxes as box_ops
from ..ops.heatmaps import find_peaks
from ..structures import Detections, Targets, flatten_valid
from .box_head import SampledRoIs, image_index_of, unflatten
from .layers import init_he
from .roi_pool import RoIPool


class KeypointPredictor(nn.Module):
    """[R, C, S, S] -> logits [R, K, 4 S, 4 S]: a transposed convolution, then twice as large bilinearly."""

    def __init__(self, in_channels: int, keypoints: int) -> None:
        super().__init__()
        self.kps_score_lowres = nn.ConvTranspose2d(in_channels, keypoints, 4, stride=2, padding=1)
        init_he(self.kps_score_lowres.weight)
        nn.init.zeros_(self.kps_score_lowres.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.kps_score_lowres(x), scale_factor=2.0, mode="bilinear", align_corners=False)


class KeypointHead(nn.Module):
    """Keypoints of the positive proposals (losses) or of the detections.

    positives: which of them the loss looks at. "object": those whose object has a visible point in its own box
        (maskrcnn-benchmark); "proposal": those with one of its visible points in the proposal (detectron2); "all"
        (torchvision). The mean is over the visible points in the proposals, so "proposal" and "all" are the same loss.
    plus_one: maskrcnn-benchmark's arithmetic: heat maps reach from a box's first pixel to its last one.
    mirror: [K] the keypoint that each becomes in a mirrored image; needed for mirrored views alone.
    """

    def __init__(
        self,
        pool: RoIPool,
        feature_extractor: nn.Module,
        predictor: KeypointPredictor,
        positives: str = "object",
        positives_per_image: int = 128,
        plus_one: bool = False,
        compact: bool = False,
        mirror: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.pool = pool
        self.feature_extractor = feature_extractor
        self.predictor = predictor
        self.positives = positives
        self.positives_per_image = positives_per_image
        self.plus_one = plus_one
        self.compact = compact
        self.mirror = mirror

    def forward(self, features: list[Tensor], boxes: Tensor, image_index: Tensor) -> Tensor:
        """boxes [R, 4] -> logits [R, K, M, M]."""
        return self.predictor(self.feature_extractor(self.pool(features, boxes, image_index)))

    def _extent(self, boxes: Tensor) -> Tensor:
        """What the heat maps of the boxes cover."""
        return box_ops.to_inclusive(boxes) if self.plus_one else boxes

    def losses(self, features: list[Tensor], chosen: SampledRoIs, targets: Targets) -> dict[str, Tensor]:
        """Cross entropy over the cells of the heat map, mean over the visible keypoints that lie in their proposals."""
        first = slice(0, min(self.positives_per_image, chosen.positive.shape[1]))  # positives come first
        positive, box, owner = (rows[:, first] for rows in (chosen.positive, chosen.boxes, chosen.wanted))
        image = image_index_of(positive)
        points = targets.keypoints[image, chosen.matched[:, first]]
        if self.positives != "all":
            around = owner if self.positives == "object" else box
            positive = positive & visible_within(points, self._extent(around)).any(-1)
        _, weight, (box, image, points) = flatten_valid(positive, (box, image, points), self.compact)
        logits = self(features, box, image).float().flatten(2)
        cell, valid = heatmap_cells(points, self._extent(box), round(logits.shape[2] ** 0.5))
        valid = valid * weight[:, None]
        loss = F.cross_entropy(logits.flatten(0, 1), cell.flatten(), reduction="none").view_as(valid)
        return {"loss_kp": (loss * valid).sum() / valid.sum().clamp(min=1)}

    def detect(self, features: list[Tensor], detections: Detections) -> Detections:
        """`detections` with keypoints."""
        # The rows once: an exported graph does not know that two searches for them find as many.
        rows, box, image = self._rows(detections)
        return self._placed(detections, rows, box, self(features, box, image).float())

    def heat_maps(self, features: list[Tensor], detections: Detections) -> Tensor:
        """[R, K, M, M] float32 logits of the detections that flatten_valid keeps."""
        _, box, image = self._rows(detections)
        return self(features, box, image).float()

    def place(self, detections: Detections, logits: Tensor) -> Detections:
        """`detections` with the keypoints that their heat maps show."""
        rows, box, _ = self._rows(detections)
        return self._placed(detections, rows, box, logits)

    def _rows(self, detections: Detections) -> tuple[Tensor, Tensor, Tensor]:
        """Index, box and image of each detection that flatten_valid keeps."""
        fields = (detections.boxes, image_index_of(detections.valid))
        rows, _, (box, image) = flatten_valid(detections.valid, fields, self.compact)
        return rows, box, image

    def _placed(self, detections: Detections, rows: Tensor, box: Tensor, logits: Tensor) -> Detections:
        points, peak = find_peaks(logits, self._extent(box))
        # Not by logsumexp, which asks how many rows there are: a graph that is exported cannot know.
        score = (logits.flatten(2) - peak[..., None]).exp().sum(-1).reciprocal()
        keypoints = torch.cat((points, score[..., None]), -1)
        detections.keypoints = unflatten(rows, keypoints, detections.valid.shape)
        return detections


def visible_within(points: Tensor, boxes: Tensor) -> Tensor:
    """[..., K] bool: which of the points [..., K, 3] are visible and lie in their box [..., 4], its border included."""
    boxes = boxes.unsqueeze(-2)
    inside = (points[..., :2] >= boxes[..., :2]) & (points[..., :2] <= boxes[..., 2:])
    return inside.all(-1) & (points[..., 2] > 0)


def heatmap_cells(points: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The cell of each keypoint in a grid of `size` x `size` over its box.

    points [R, K, 3] (x, y, visibility), boxes [R, 4] -> index [R, K] int64, row by row, and valid [R, K] bool: visible
    and in the box. A point on the right or lower border belongs to the last cell; index is 0 where it is not valid.
    """
    boxes = boxes.unsqueeze(1)
    low, high = boxes[..., :2], boxes[..., 2:]
    cell = ((points[..., :2] - low) * (size / (high - low))).floor()
    cell = torch.where(points[..., :2] == high, size - 1, cell)
    valid = ((cell >= 0) & (cell < size)).all(-1) & (points[..., 2] > 0)
    x, y = torch.where(valid[..., None], cell, 0).long().unbind(-1)
    return y * size + x, valid
