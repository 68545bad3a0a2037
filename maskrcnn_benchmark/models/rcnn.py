"""The detector: Faster R-CNN; Mask R-CNN with a mask head, Keypoint R-CNN with a keypoint head, and without a box head
the region proposals alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..structures import Detections, ImageBatch, Targets
from .aug_fpn import AuxiliaryHead
from .box_head import BoxHead
from .cascade import CascadeMaskHead
from .keypoint_head import KeypointHead
from .mask_head import MaskHead
from .rpn import RPN


class Normalize(nn.Module):
    """uint8 or float RGB pixels in 0..255 -> what the weights were trained on.

    mean, std: in the order and range that `bgr255` says: BGR 0..255 (Caffe2's weights) or RGB 0..1. One a channel:
    three, or another number, of which the first three are RGB.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], bgr255: bool) -> None:
        super().__init__()
        range_ = 1.0 if bgr255 else 255.0
        self.bgr = bgr255 and len(mean) >= 3
        # In RGB 0..255; not part of the weights: the configuration carries them.
        mean, std = (torch.tensor(list(values)).view(1, -1, 1, 1) * range_ for values in (mean, std))
        self.register_buffer("mean", swap_red_and_blue(mean) if self.bgr else mean, persistent=False)
        self.register_buffer("std", swap_red_and_blue(std) if self.bgr else std, persistent=False)

    def forward(self, images: ImageBatch) -> Tensor:
        x = (images.pixels - self.mean) / self.std
        row = torch.arange(x.shape[2], device=x.device) < images.sizes[:, :1]
        column = torch.arange(x.shape[3], device=x.device) < images.sizes[:, 1:]
        x = x * (row[:, None, :, None] & column[:, None, None, :])  # padding is zero after normalising, in all peers
        return swap_red_and_blue(x) if self.bgr else x


def swap_red_and_blue(x: Tensor) -> Tensor:
    """[B, C, H, W] with the first three channels in reverse; further ones stay."""
    return torch.cat((x[:, :3].flip(1), x[:, 3:]), 1) if x.shape[1] > 3 else x.flip(1)


class Detector(nn.Module):
    """What detectors have in common: normalize -> backbone, in the memory format that the device prefers."""

    def __init__(self, normalize: Normalize, backbone: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.backbone = backbone

    def set_memory_format(self, channels_last: bool) -> None:
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.memory_format)

    def features(self, images: ImageBatch) -> tuple[list[Tensor], torch.Size]:
        """The backbone's maps, and the padded (height, width) they were made of."""
        # Bytes are laid out anew at a quarter of what the normalised values would move
        pixels = images.pixels.contiguous(memory_format=self.memory_format)
        x = self.normalize(replace(images, pixels=pixels)).contiguous(memory_format=self.memory_format)
        return self.backbone(x), x.shape[-2:]


class RCNN(Detector):
    """normalize -> backbone -> rpn -> box head -> mask head and keypoint head.

    backbone: [B, 3, H, W] -> list of maps. Any module will do.
    box_head: None for a region proposal network alone, whose proposals are the detections, all of label 1.
    auxiliary_head: adds losses in training, and nothing else.
    channels_last: the memory format the network runs in.
    """

    def __init__(
        self,
        normalize: Normalize,
        backbone: nn.Module,
        rpn: RPN,
        box_head: BoxHead | None,
        mask_head: MaskHead | CascadeMaskHead | None = None,
        keypoint_head: KeypointHead | None = None,
        auxiliary_head: AuxiliaryHead | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__(normalize, backbone)
        self.rpn = rpn
        self.roi_heads = nn.ModuleDict({} if box_head is None else {"box": box_head})
        if mask_head is not None:
            self.roi_heads["mask"] = mask_head
        if keypoint_head is not None:
            self.roi_heads["keypoint"] = keypoint_head
        if auxiliary_head is not None:
            self.roi_heads["auxiliary"] = auxiliary_head
        self.set_memory_format(channels_last)

    @property
    def mask_head(self) -> MaskHead | CascadeMaskHead | None:
        return dict(self.roi_heads.items()).get("mask")

    @property
    def plus_one(self) -> bool:
        """Whether boxes are by maskrcnn-benchmark's arithmetic."""
        return self.rpn.plus_one

    @property
    def heads_after_box(self) -> list[MaskHead | CascadeMaskHead | KeypointHead]:
        """Those that look at the proposals chosen by the box head, or at its detections."""
        return [head for name, head in self.roi_heads.items() if name not in ("box", "auxiliary")]

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        """With targets the losses by name, each a scalar; without them Detections in pixels of the resized images."""
        features, padded = self.features(images)
        proposals, losses = self.rpn(features, padded, images.sizes, targets)
        if not self.roi_heads:
            return proposals.detections() if targets is None else losses
        box_head = self.roi_heads["box"]
        if targets is None:
            detections = box_head.detect(features, proposals, images.sizes)
            for head in self.heads_after_box:
                detections = head.detect(features, detections)
            return detections
        chosen, box_losses = box_head.losses(features, proposals, targets, images.sizes)
        losses |= box_losses
        for head in self.heads_after_box:
            losses |= head.losses(features, chosen, targets)
        if self.training and "auxiliary" in self.roi_heads:
            losses |= self.roi_heads["auxiliary"].losses(features, chosen, targets)
        return losses

    def candidates(
        self, features: list[Tensor], padded: tuple[int, int], sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What may become a detection: boxes [B, N, 4], scores [B, N], group, and whether the score is high enough."""
        proposals, _ = self.rpn(features, padded, sizes)
        return self.roi_heads["box"].candidates(features, proposals, sizes)

    def select(self, boxes: Tensor, score: Tensor, group: Tensor, candidate: Tensor) -> Detections:
        """The best of the candidates after NMS within each group."""
        return self.roi_heads["box"].select(boxes, score, group, candidate)
