"""Feature pyramid network (Lin et al. 2017, section 3), named as in maskrcnn-benchmark."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Norm, conv


class FPN(nn.Module):
    """Maps of strides 4, 8, 16, 32 -> as many of `out_channels`, and P6: P5 subsampled by 2 for the RPN."""

    def __init__(self, in_channels: list[int], out_channels: int, norm: Norm | None = None, relu: bool = False) -> None:
        super().__init__()
        self.levels = len(in_channels)
        for level, channels in enumerate(in_channels, start=1):
            self.add_module(f"fpn_inner{level}", conv(channels, out_channels, 1, norm, relu))
            self.add_module(f"fpn_layer{level}", conv(out_channels, out_channels, 3, norm, relu))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return self.top_down(self.laterals(features))

    def laterals(self, features: list[Tensor]) -> list[Tensor]:
        """M2..M5: the maps with `out_channels` each."""
        return [getattr(self, f"fpn_inner{level}")(feature) for level, feature in enumerate(features, start=1)]

    def top_down(self, laterals: list[Tensor]) -> list[Tensor]:
        top = laterals[-1]
        outputs = [getattr(self, f"fpn_layer{self.levels}")(top)]
        for level in range(self.levels - 1, 0, -1):
            lateral = laterals[level - 1]
            top = lateral + F.interpolate(top, size=lateral.shape[-2:], mode="nearest")
            outputs.insert(0, getattr(self, f"fpn_layer{level}")(top))
        outputs.append(F.max_pool2d(outputs[-1], kernel_size=1, stride=2))
        return outputs
