"""The detector: Faster R-CNN, and Mask R-CNN with a mask head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..structures import Detections, ImageBatch, Targets
from .aug_fpn import AuxiliaryHead
from .box_head import BoxHead
from .cascade import CascadeMaskHead
from .mask_head import MaskHead
from .rpn import RPN


class Normalize(nn.Module):
    """uint8 or float RGB pixels in 0..255 -> what the weights were trained on.

    mean, std: in the order and range that `bgr255` says: BGR 0..255 (Caffe2's weights) or RGB 0..1.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], bgr255: bool) -> None:
        super().__init__()
        range_ = 1.0 if bgr255 else 255.0
        order = slice(None, None, -1) if bgr255 else slice(None)
        self.bgr = bgr255
        # In RGB 0..255; not part of the weights: the configuration carries them.
        self.register_buffer("mean", torch.tensor(list(mean)[order]).view(1, -1, 1, 1) * range_, persistent=False)
        self.register_buffer("std", torch.tensor(list(std)[order]).view(1, -1, 1, 1) * range_, persistent=False)

    def forward(self, images: ImageBatch) -> Tensor:
        x = (images.pixels - self.mean) / self.std
        row = torch.arange(x.shape[2], device=x.device) < images.sizes[:, :1]
        column = torch.arange(x.shape[3], device=x.device) < images.sizes[:, 1:]
        x = x * (row[:, None, :, None] & column[:, None, None, :])  # padding is zero after normalising, in all peers
        return x.flip(1) if self.bgr else x


class RCNN(nn.Module):
    """normalize -> backbone -> rpn -> box head -> mask head.

    backbone: [B, 3, H, W] -> list of maps. Any module will do.
    auxiliary_head: adds losses in training, and nothing else.
    channels_last: the memory format the network runs in.
    """

    def __init__(
        self,
        normalize: Normalize,
        backbone: nn.Module,
        rpn: RPN,
        box_head: BoxHead,
        mask_head: MaskHead | CascadeMaskHead | None = None,
        auxiliary_head: AuxiliaryHead | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.backbone = backbone
        self.rpn = rpn
        self.roi_heads = nn.ModuleDict({"box": box_head})
        if mask_head is not None:
            self.roi_heads["mask"] = mask_head
        if auxiliary_head is not None:
            self.roi_heads["auxiliary"] = auxiliary_head
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.memory_format)

    @property
    def mask_head(self) -> MaskHead | CascadeMaskHead | None:
        return dict(self.roi_heads.items()).get("mask")

    def features(self, images: ImageBatch) -> tuple[list[Tensor], torch.Size]:
        """The backbone's maps, and the padded (height, width) they were made of."""
        x = self.normalize(images).contiguous(memory_format=self.memory_format)
        return self.backbone(x), x.shape[-2:]

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        """With targets the losses by name, each a scalar; without them Detections in pixels of the resized images."""
        features, padded = self.features(images)
        proposals, losses = self.rpn(features, padded, images.sizes, targets)
        box_head, mask_head = self.roi_heads["box"], self.mask_head
        if targets is None:
            detections = box_head.detect(features, proposals, images.sizes)
            return mask_head.detect(features, detections) if mask_head is not None else detections
        chosen, box_losses = box_head.losses(features, proposals, targets, images.sizes)
        losses |= box_losses
        if mask_head is not None:
            losses |= mask_head.losses(features, chosen, targets)
        if self.training and "auxiliary" in self.roi_heads:
            losses |= self.roi_heads["auxiliary"].losses(features, chosen, targets)
        return losses
