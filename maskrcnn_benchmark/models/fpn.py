"""Feature pyramids (Lin et al. 2017, section 3; for HRNet: Wang et al. 2020), named as in maskrcnn-benchmark."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Norm, conv


def add_enlarged(x: Tensor, top: Tensor) -> Tensor:
    """x [B, C, H, W] plus `top` [B, C, h, w] at x's size, by the nearest pixel."""
    # A compiler fuses the two by itself, and where it exports, sides have no numbers to compare.
    if not torch.compiler.is_compiling() and tuple(x.shape[2:]) == (2 * top.shape[2], 2 * top.shape[3]):
        return _AddDoubled.apply(x, top)
    return x + F.interpolate(top, size=x.shape[-2:], mode="nearest")


class _AddDoubled(torch.autograd.Function):
    """Each pixel of `top` added to four of x in one pass: the enlarged map, as large as x, is neither written nor read.
    Autograd by itself would sum the gradient over the broadcast dimensions, on a CPU 80 times as slowly."""

    @staticmethod
    def forward(ctx, x: Tensor, top: Tensor) -> Tensor:
        ctx.shape = top.shape
        batch, channels, height, width = top.shape
        quarters = x.reshape(batch, channels, height, 2, width, 2)
        return (quarters + top[:, :, :, None, :, None]).reshape(x.shape)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ops.aten.upsample_nearest2d_backward(gradient, gradient.shape[-2:], ctx.shape)


class LastLevelMaxPool(nn.Module):
    """P6 for the RPN: P5 subsampled by 2."""

    def forward(self, c5: Tensor, p5: Tensor) -> list[Tensor]:
        return [F.max_pool2d(p5, kernel_size=1, stride=2)]


class LastLevelP6P7(nn.Module):
    """P6 and P7 for RetinaNet, strides 64 and 128, by 3x3 convolutions of stride 2 (Lin et al. 2017, focal loss,
    section 4). P6 is made of C5 where `use_c5`, which has `in_channels`, else of P5. relu: between the two."""

    def __init__(self, in_channels: int, out_channels: int, use_c5: bool = True, relu: bool = True) -> None:
        super().__init__()
        self.use_c5, self.relu = use_c5, relu
        self.p6 = nn.Conv2d(in_channels if use_c5 else out_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        for layer in (self.p6, self.p7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def forward(self, c5: Tensor, p5: Tensor) -> list[Tensor]:
        p6 = self.p6(c5 if self.use_c5 else p5)
        return [p6, self.p7(F.relu(p6) if self.relu else p6)]


class FPN(nn.Module):
    """The body's maps, each of half the side of the one before -> as many of `out_channels`, and those of `top_blocks`.

    first_level: the number in the first map's parameter names: 1 for C2; 2 for C3 (RetinaNet has no P2).
    top_blocks: (C5, P5) -> further maps.
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
        self.inner, self.layer = [], []
        for level, channels in enumerate(in_channels, start=first_level):
            self.inner.append(f"fpn_inner{level}")
            self.layer.append(f"fpn_layer{level}")
            self.add_module(self.inner[-1], conv(channels, out_channels, 1, norm, relu))
            self.add_module(self.layer[-1], conv(out_channels, out_channels, 3, norm, relu))
        self.top_blocks = top_blocks or LastLevelMaxPool()

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return self.top_down(self.laterals(features), features[-1])

    def laterals(self, features: list[Tensor]) -> list[Tensor]:
        """M2..M5: the maps, of `out_channels` each."""
        return [getattr(self, inner)(feature) for inner, feature in zip(self.inner, features)]

    def top_down(self, laterals: list[Tensor], c5: Tensor) -> list[Tensor]:
        """P2..P5 and what `top_blocks` adds."""
        top, outputs = None, []
        for lateral, layer in zip(reversed(laterals), reversed(self.layer)):
            if top is not None:
                lateral = add_enlarged(lateral, top)
            top = lateral
            outputs.insert(0, getattr(self, layer)(top))
        return outputs + self.top_blocks(c5, outputs[-1])


class HRFPN(nn.Module):
    """HRNet's pyramid (Wang et al. 2020, section 4.3, HRNetV2p): all maps at the finest resolution, bilinearly, side by
    side; a 1x1 convolution (`reduction`); mean pooling to strides 4 .. 64, and a 3x3 convolution for each level."""

    def __init__(
        self, in_channels: list[int], out_channels: int, norm: Norm | None = None, relu: bool = False, levels: int = 5
    ) -> None:
        super().__init__()
        self.reduction = conv(sum(in_channels), out_channels, 1, norm, relu)
        self.layer = [f"fpn_layer{level}" for level in range(1, levels + 1)]
        for name in self.layer:
            self.add_module(name, conv(out_channels, out_channels, 3, norm, relu))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        size = features[0].shape[-2:]
        coarse = [F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in features[1:]]
        finest = self.reduction(torch.cat([features[0], *coarse], dim=1))
        maps = [finest if i == 0 else F.avg_pool2d(finest, 2**i) for i in range(len(self.layer))]
        return [getattr(self, name)(x) for name, x in zip(self.layer, maps)]
