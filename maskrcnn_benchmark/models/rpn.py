"""Region proposal network (Ren et al. 2015, section 3; over a pyramid: Lin et al. 2017, section 4.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import boxes, matching, nms
from ..ops.proposals import WEIGHTS, decode_and_clip
from ..structures import Proposals, Targets
from .anchors import AnchorGenerator
from .layers import Conv2d, normal_layer, with_relu
from .losses import box_loss, objectness_loss
from .sampling import sample


class RPNHead(nn.Module):
    """A 3x3 convolution (or several, `convolutions`) and two 1x1s, the same on every level."""

    def __init__(
        self, in_channels: int, anchors_per_position: int, conv_channels: int = 0, convolutions: int = 1
    ) -> None:
        super().__init__()
        channels = conv_channels or in_channels
        layers = [
            normal_layer(Conv2d(channels if number else in_channels, channels, 3, padding=1), 0.01)
            for number in range(convolutions)
        ]
        self.conv = layers[0] if convolutions == 1 else nn.ModuleList(layers)  # one is named as in maskrcnn-benchmark
        self.cls_logits = normal_layer(nn.Conv2d(channels, anchors_per_position, 1), 0.01)
        self.bbox_pred = normal_layer(nn.Conv2d(channels, anchors_per_position * 4, 1), 0.01)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps [B, C, H, W] -> objectness logits [B, A, H, W] and box deltas [B, 4 * A, H, W], a level each."""
        for layer in self.conv if isinstance(self.conv, nn.ModuleList) else [self.conv]:
            features = [with_relu(layer, feature) for feature in features]
        layers = (self.cls_logits, self.bbox_pred)
        dtype = features[0].dtype  # autocast would cast what is joined once a level
        weight, bias = (torch.cat(pair).to(dtype) for pair in zip(*((layer.weight, layer.bias) for layer in layers)))
        # One convolution for both: a map is read once, and its gradient needs no sum of two. Of a multiple of 8
        # channels, as matrix units take them: on a CPU 16 took a sixth to a quarter less time forward than 15.
        channels = [layer.out_channels for layer in layers]
        channels.append(-sum(channels) % 8)
        weight, bias = F.pad(weight, (0,) * 7 + (channels[-1],)), F.pad(bias, (0, channels[-1]))
        logits, deltas, _ = zip(*(F.conv2d(x, weight, bias).split(channels, dim=1) for x in features))
        return list(logits), list(deltas)


class RPN(nn.Module):
    """Proposals, and the losses when there are targets.

    pre_nms, post_nms: (training, test) numbers of proposals: a level before NMS, an image after.
    score_threshold: proposals of a lower probability are dropped (torchvision's MobileNets).
    post_nms_per_batch: in training the best post_nms of the whole batch, as Detectron did.
    straddle: anchors further outside the image than this are left out of the loss; negative: none.
    loss_normalizer: "sampled" (number of sampled anchors) or "batch" (batch_size x images, detectron2).
    focal: (alpha, gamma) of a focal loss of objectness in place of cross entropy.
    rank_by: what the best anchors are chosen by: "logit", or "probability", in which float32 makes large logits equal.
    plus_one: maskrcnn-benchmark's arithmetic: a proposal keeps one pixel of the image, and `straddle` counts from an
        anchor's last pixel.
    """

    def __init__(
        self,
        head: RPNHead,
        anchors: AnchorGenerator,
        pre_nms: tuple[int, int],
        post_nms: tuple[int, int],
        post_nms_per_batch: bool = False,
        nms_threshold: float = 0.7,
        min_size: float = 0.0,
        score_threshold: float = 0.0,
        foreground_iou: float = 0.7,
        background_iou: float = 0.3,
        batch_size: int = 256,
        positive_fraction: float = 0.5,
        straddle: float = -1,
        smooth_l1_beta: float = 1 / 9,
        loss_normalizer: str = "sampled",
        focal: tuple[float, float] | None = None,
        rank_by: str = "logit",
        plus_one: bool = False,
    ) -> None:
        super().__init__()
        self.head = head
        self.anchors = anchors
        self.pre_nms, self.post_nms, self.post_nms_per_batch = pre_nms, post_nms, post_nms_per_batch
        self.nms_threshold, self.min_size, self.score_threshold = nms_threshold, min_size, score_threshold
        self.foreground_iou, self.background_iou = foreground_iou, background_iou
        self.batch_size, self.positive_fraction = batch_size, positive_fraction
        self.straddle = straddle
        self.smooth_l1_beta, self.loss_normalizer, self.focal = smooth_l1_beta, loss_normalizer, focal
        self.rank_by, self.plus_one = rank_by, plus_one

    def forward(
        self, features: list[Tensor], image_shape: tuple[int, int], sizes: Tensor, targets: Targets | None = None
    ) -> tuple[Proposals, dict[str, Tensor]]:
        """
        Args:
            features: [B, C, H, W] a level; those beyond the anchors' levels are for other heads.
            image_shape: (height, width) of the padded batch.
            sizes: [B, 2] (height, width) of each image.
            targets: ground truth; without it there are no losses.
        """
        features = features[: len(self.anchors.strides)]
        logits, deltas = self.head(features)
        anchors = self.anchors([f.shape[-2:] for f in features], image_shape, features[0].device)
        logits = [x.float().permute(0, 2, 3, 1).flatten(1) for x in logits]
        deltas = torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in deltas], 1).float()
        deltas = deltas.unflatten(2, (-1, 4)).flatten(1, 2)
        anchors = torch.cat(anchors)
        proposals = self.propose(logits, deltas, anchors, sizes)
        if targets is None:
            return proposals, {}
        return proposals, self.losses(torch.cat(logits, 1), deltas, anchors, sizes, targets)

    @torch.no_grad()
    def propose(self, logits: list[Tensor], deltas: Tensor, anchors: Tensor, sizes: Tensor) -> Proposals:
        """The best anchors of each level, decoded, clipped, NMS within a level, then the best of all levels.

        logits [B, A] a level, deltas [B, A, 4] and anchors [A, 4] of all levels, one after the other.
        """
        pre_nms, post_nms = (x[0 if self.training else 1] for x in (self.pre_nms, self.post_nms))
        scores, chosen, levels, first = [], [], [], 0
        by_logit = self.rank_by == "logit"
        for level, logit in enumerate(logits):
            score, index = (logit if by_logit else logit.sigmoid()).topk(min(pre_nms, logit.shape[1]), dim=1)
            scores.append(score)
            chosen.append(index + first)
            levels.append(torch.full_like(index, level))
            first += logit.shape[1]
        score, index, level = torch.cat(scores, 1), torch.cat(chosen, 1), torch.cat(levels, 1)
        least_side = 1.0 if self.plus_one else 0.0
        box, valid = decode_and_clip(deltas, anchors, index, sizes, min_size=self.min_size, least_side=least_side)
        valid = valid & score.isfinite()
        if self.score_threshold > 0:
            valid = valid & ((score.sigmoid() if by_logit else score) >= self.score_threshold)
        index, keep = nms.nms(box, score, level, valid, self.nms_threshold, post_nms)
        box = box.gather(1, index[..., None].expand(-1, -1, 4))
        score = score.gather(1, index)
        if self.training and self.post_nms_per_batch:
            keep = keep & best_of_batch(score, keep, post_nms)
        return Proposals(boxes=box, scores=score.sigmoid() if by_logit else score, valid=keep)

    def losses(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, sizes: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        """logits [B, A], deltas [B, A, 4], anchors [A, 4] -> the objectness and the box loss."""
        with torch.no_grad():
            matched, label = matching.match(
                targets.boxes, targets.valid, anchors, self.foreground_iou, self.background_iou, True
            )
            if self.straddle >= 0:
                corners = boxes.to_inclusive(anchors) if self.plus_one else anchors
                label = torch.where(inside(corners, sizes, self.straddle), label, -1)
            chosen = sample(label, self.batch_size, self.positive_fraction)
            truth = targets.boxes.gather(1, matched.gather(1, chosen.index)[..., None].expand(-1, -1, 4))
            box = anchors[chosen.index]
            truth = torch.where(chosen.positive[..., None], truth, box)
            count = chosen.valid.sum().clamp(min=1)
            normalizer = self.batch_size * len(logits) if self.loss_normalizer == "batch" else count
        logit = logits.gather(1, chosen.index)
        delta = deltas.gather(1, chosen.index[..., None].expand(-1, -1, 4))
        regression = box_loss("SmoothL1Loss", delta, box, truth, WEIGHTS, self.smooth_l1_beta)
        return {
            "loss_objectness": objectness_loss(logit, chosen.positive, chosen.valid, normalizer, self.focal),
            "loss_rpn_box_reg": (regression * chosen.positive).sum() / normalizer,
        }


def best_of_batch(scores: Tensor, valid: Tensor, count: int) -> Tensor:
    """[B, K] bool: which proposals are among the best `count` of all images together."""
    flat = torch.where(valid, scores, -torch.inf).flatten()
    best = flat.topk(min(count, flat.numel())).indices
    return torch.zeros_like(flat, dtype=torch.bool).index_fill(0, best, True).view_as(valid)


def inside(anchors: Tensor, sizes: Tensor, straddle: float) -> Tensor:
    """[B, A] bool: anchors [A, 4] that reach at most `straddle` pixels beyond the images of `sizes` [B, 2]."""
    height, width = sizes[:, :1], sizes[:, 1:]
    left_top = (anchors[:, :2] >= -straddle).all(-1)
    return left_top & (anchors[:, 2] < width + straddle) & (anchors[:, 3] < height + straddle)
