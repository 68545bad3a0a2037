"""HRNet (Wang et al. 2020, section 3): branches of strides 4, 8, 16 and 32 side by side, which exchange what they know.

Named as in the authors' code, HRNet-Image-Classification, but for `stem` before conv1 .. bn2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import FrozenBatchNorm2d, Norm, conv_norm, init_he
from .resnet import BasicBlock, Bottleneck, FreezableBody

# Modules in stage2, stage3, stage4 of every width
MODULES = (1, 4, 3)
BLOCKS = 4


class ConvNorm(nn.Sequential):
    """Convolution and norm, `0` and `1`, and where `relu` a ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, norm: Norm, relu: bool) -> None:
        layer = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        super().__init__(layer, norm(out_channels))
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(x, self[0], self[1], relu=self.relu)


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2."""

    def __init__(self, in_channels: int, channels: int, norm: Norm, input_std: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
        self.bn2 = norm(channels)
        if isinstance(self.bn1, FrozenBatchNorm2d):
            self.bn1.running_var.fill_(input_std**2)

    def forward(self, x: Tensor) -> Tensor:
        x = conv_norm(x, self.conv1, self.bn1, relu=True)
        return conv_norm(x, self.conv2, self.bn2, relu=True)


class HRModule(nn.Module):
    """Residual blocks on each branch, then an exchange: each output is the sum of all branches brought to its
    resolution, coarser ones by a 1x1 convolution and nearest pixels, finer ones by 3x3 convolutions of stride 2, which
    keep their channels until the last."""

    def __init__(self, channels: list[int], norm: Norm) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(BasicBlock(width, width, 1, 1, norm) for _ in range(BLOCKS))) for width in channels
        )
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(self._path(channels, source, target, norm) for source in range(len(channels)))
            for target in range(len(channels))
        )

    @staticmethod
    def _path(channels: list[int], source: int, target: int, norm: Norm) -> nn.Module:
        narrow, wide = channels[source], channels[target]
        if source == target:
            return nn.Identity()
        if source > target:
            return ConvNorm(narrow, wide, 1, 1, norm, False)
        keeping = [ConvNorm(narrow, narrow, 3, 2, norm, True) for _ in range(target - source - 1)]
        return nn.Sequential(*keeping, ConvNorm(narrow, wide, 3, 2, norm, False))

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        branches = [blocks(x) for blocks, x in zip(self.branches, branches)]
        outputs = []
        for target, paths in enumerate(self.fuse_layers):
            total = branches[target]
            for source, path in enumerate(paths):
                if source != target:
                    part = path(branches[source])
                    size = branches[target].shape[-2:]
                    total = total + (F.interpolate(part, size=size, mode="nearest") if source > target else part)
            outputs.append(F.relu(total))
        return outputs


class Transition(nn.ModuleList):
    """From one stage's branches to the next one's: a 3x3 convolution where the channels differ, and one of stride 2 for
    the new branch, which starts from the coarsest."""

    def __init__(self, before: list[int], after: list[int], norm: Norm) -> None:
        same = (
            nn.Identity() if old == new else ConvNorm(old, new, 3, 1, norm, True) for old, new in zip(before, after)
        )
        super().__init__([*same, nn.Sequential(ConvNorm(before[-1], after[-1], 3, 2, norm, True))])

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        return [path(branches[min(index, len(branches) - 1)]) for index, path in enumerate(self)]


class HRNet(FreezableBody):
    """`stem`, `layer1` (four bottlenecks), and `stage2` .. `stage4` with the `transition` before each.

    width: channels of the branch of stride 4; each further branch has twice as many. input_std and freeze_at: as
    ResNet's; the parts are stem, layer1, stage2, stage3, stage4.
    """

    def __init__(
        self, width: int, norm: Norm, in_channels: int = 3, input_std: float = 1.0, freeze_at: int = 0
    ) -> None:
        super().__init__()
        self.stem = Stem(in_channels, 64, norm, input_std)
        self.layer1 = nn.Sequential(
            *(Bottleneck(64 if i == 0 else 256, 64, 256, 1, 1, 1, False, norm) for i in range(BLOCKS))
        )
        before, parts = [256], ["stem", "layer1"]
        for stage, modules in enumerate(MODULES, start=2):
            after = [width * 2**branch for branch in range(stage)]
            self.add_module(f"transition{stage - 1}", Transition(before, after, norm))
            self.add_module(f"stage{stage}", nn.Sequential(*(HRModule(after, norm) for _ in range(modules))))
            parts.append(f"stage{stage}")
            before = after
        self.out_channels = before
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_he(module.weight)
        self.freeze(parts[:freeze_at])

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, C, H, W] -> maps of strides 4, 8, 16, 32."""
        branches = [self.layer1(self.stem(x))]
        for stage in (2, 3, 4):
            branches = getattr(self, f"stage{stage}")(getattr(self, f"transition{stage - 1}")(branches))
        return branches
