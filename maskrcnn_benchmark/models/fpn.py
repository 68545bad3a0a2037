"""Feature pyramid network (Lin et al. 2017, section 3), named as in maskrcnn-benchmark."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Norm, conv


class LastLevelMaxPool(nn.Module):
    """P6 for the RPN: P5 subsampled by 2."""

    def forward(self, c5: Tensor, p5: Tensor) -> list[Tensor]:
        return [F.max_pool2d(p5, kernel_size=1, stride=2)]


class LastLevelP6P7(nn.Module):
    """P6 and P7 for RetinaNet, by 3x3 convolutions of stride 2; P6 is made of C5 where `use_c5`, else of P5."""

    def __init__(self, in_channels: int, out_channels: int, use_c5: bool = True) -> None:
        super().__init__()
        self.use_c5 = use_c5
        self.p6 = nn.Conv2d(in_channels if use_c5 else out_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        for layer in (self.p6, self.p7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def forward(self, c5: Tensor, p5: Tensor) -> list[Tensor]:
        p6 = self.p6(c5 if self.use_c5 else p5)
        return [p6, self.p7(F.relu(p6))]


class FPN(nn.Module):
    """The body's maps -> as many of `out_channels`, and those of `top_blocks`.

    first_level: the number in the first map's parameter names: 1 for C2, 2 for C3 (RetinaNet has no P2).
    """

    def __init__(
        self,
        in_channels: list[int],
        out_channels: int,
        norm: Norm | None = None,
        relu: bool = False,
        first_level: int = 1,
        top_blocks: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.first, self.last = first_level, first_level + len(in_channels) - 1
        for level, channels in enumerate(in_channels, start=first_level):
            self.add_module(f"fpn_inner{level}", conv(channels, out_channels, 1, norm, relu))
            self.add_module(f"fpn_layer{level}", conv(out_channels, out_channels, 3, norm, relu))
        self.top_blocks = top_blocks or LastLevelMaxPool()

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        top = getattr(self, f"fpn_inner{self.last}")(features[-1])
        outputs = [getattr(self, f"fpn_layer{self.last}")(top)]
        for level in range(self.last - 1, self.first - 1, -1):
            lateral = getattr(self, f"fpn_inner{level}")(features[level - self.first])
            top = lateral + F.interpolate(top, size=lateral.shape[-2:], mode="nearest")
            outputs.insert(0, getattr(self, f"fpn_layer{level}")(top))
        return outputs + self.top_blocks(features[-1], outputs[-1])
