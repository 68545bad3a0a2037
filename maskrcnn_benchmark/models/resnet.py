"""ResNet, ResNeXt and ResNet-vd bodies (He et al. 2016; Xie et al. 2017; He et al. 2019, Bag of Tricks), named as in
maskrcnn-benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import FrozenBatchNorm2d, Norm, conv_norm, init_he

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


Conv3x3 = Callable[[int, int, int, int, int], nn.Module]


def conv3x3(in_channels: int, out_channels: int, stride: int, dilation: int, groups: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, groups, bias=False)


class Stem(nn.Module):
    """7x7 convolution and 3x3 max pooling: stride 4. Deep: three 3x3 convolutions, the first two of half the channels,
    instead of the 7x7 (ResNet-vd; Bag of Tricks, section 4.2)."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, input_std: float, deep: bool = False) -> None:
        super().__init__()
        kernel, half = (3, [out_channels // 2] * 2) if deep else (7, [])
        self.layers = []
        for number, (narrow, wide) in enumerate(pairwise([in_channels, *half, out_channels]), start=1):
            stride = 2 if number == 1 else 1
            layer = nn.Conv2d(narrow, wide, kernel, stride=stride, padding=kernel // 2, bias=False)
            init_he(layer.weight)
            self.add_module(f"conv{number}", layer)
            self.add_module(f"bn{number}", norm(wide))
            self.layers.append(number)
        if isinstance(self.bn1, FrozenBatchNorm2d):
            self.bn1.running_var.fill_(input_std**2)

    def forward(self, x: Tensor) -> Tensor:
        for number in self.layers:
            x = conv_norm(x, getattr(self, f"conv{number}"), getattr(self, f"bn{number}"), relu=True)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


def damp_branch(last_norm: nn.Module) -> None:
    """Lets a block start close to its shortcut. A frozen norm normalises nothing, so without this (and the stem's
    variance) activations double from block to block, and R-50 from scratch is NaN at the third step."""
    if isinstance(last_norm, FrozenBatchNorm2d):
        last_norm.weight.fill_(0.25)


class Shortcut(nn.Sequential):
    """1x1 convolution and norm, `0` and `1`. pooled: the stride is a mean over 2x2 pixels before the convolution, which
    else looks at a quarter of them (ResNet-vd; Bag of Tricks, section 4.2)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm, pooled: bool = False) -> None:
        self.pool = stride if pooled else 1
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 1, stride=stride // self.pool, bias=False), norm(out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool > 1:
            x = F.avg_pool2d(x, self.pool, self.pool, ceil_mode=True)
        return conv_norm(x, *self)


def shortcut(in_channels: int, out_channels: int, stride: int, norm: Norm, pooled: bool = False) -> Shortcut | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return Shortcut(in_channels, out_channels, stride, norm, pooled)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (ResNet-18 and -34)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        dilation: int,
        norm: Norm,
        convolution: Conv3x3 = conv3x3,
        pooled_shortcut: bool = False,
    ) -> None:
        super().__init__()
        self.downsample = shortcut(in_channels, out_channels, stride, norm, pooled_shortcut)
        self.conv1 = conv3x3(in_channels, out_channels, stride, dilation, 1)
        self.bn1 = norm(out_channels)
        self.conv2 = convolution(out_channels, out_channels, 1, dilation, 1)
        self.bn2 = norm(out_channels)
        damp_branch(self.bn2)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = conv_norm(x, self.conv1, self.bn1, relu=True)
        return conv_norm(out, self.conv2, self.bn2, relu=True, addend=identity)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 (ResNet-50 and deeper).

    stride_in_1x1: the stride is in the first 1x1 (MSRA's and Caffe2's weights) or in the 3x3 (torchvision's).
    convolution: makes the 3x3.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        stride: int,
        dilation: int,
        groups: int,
        stride_in_1x1: bool,
        norm: Norm,
        convolution: Conv3x3 = conv3x3,
        pooled_shortcut: bool = False,
    ) -> None:
        super().__init__()
        first, middle = (stride, 1) if stride_in_1x1 else (1, stride)
        self.downsample = shortcut(in_channels, out_channels, stride, norm, pooled_shortcut)
        self.conv1 = nn.Conv2d(in_channels, width, 1, first, bias=False)
        self.bn1 = norm(width)
        self.conv2 = convolution(width, width, middle, dilation, groups)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        damp_branch(self.bn3)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = conv_norm(x, self.conv1, self.bn1, relu=True)
        out = conv_norm(out, self.conv2, self.bn2, relu=True)
        return conv_norm(out, self.conv3, self.bn3, relu=True, addend=identity)


def make_stage(
    depth: int,
    stage: int,
    in_channels: int,
    norm: Norm,
    res2_channels: int = 256,
    groups: int = 1,
    width_per_group: int = 64,
    stride_in_1x1: bool = True,
    dilation: int = 1,
    convolution: Conv3x3 = conv3x3,
    pooled_shortcut: bool = False,
) -> tuple[nn.Sequential, int]:
    """The blocks of one stage (0 for res2 .. 3 for res5) and the channels that leave it.

    convolution: makes the 3x3 of each block, of a basic block the second. A dilated stage keeps its resolution. Basic
    blocks have a quarter of `res2_channels`, 64 for 256.
    """
    basic = depth < 50
    out_channels = (res2_channels // 4 if basic else res2_channels) * 2**stage
    width = groups * width_per_group * 2**stage
    blocks = []
    for index in range(BLOCKS[depth][stage]):
        stride = 2 if index == 0 and stage > 0 and dilation == 1 else 1
        last = (norm, convolution, pooled_shortcut)
        if basic:
            blocks.append(BasicBlock(in_channels, out_channels, stride, dilation, *last))
        else:
            blocks.append(Bottleneck(in_channels, width, out_channels, stride, dilation, groups, stride_in_1x1, *last))
        in_channels = out_channels
    layers = nn.Sequential(*blocks)
    for name, module in layers.named_modules():
        if isinstance(module, nn.Conv2d) and not name.endswith(".offset"):  # a deformable convolution's starts at zero
            init_he(module.weight)
    return layers, out_channels


class FreezableBody(nn.Module):
    """A module the first parts of which may take no part in training."""

    def freeze(self, names: Sequence[str]) -> None:
        self.frozen = [getattr(self, name) for name in names]
        for module in self.frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> FreezableBody:
        super().train(mode)
        for module in self.frozen:
            module.eval()  # a frozen stage's batch norms keep their statistics
        return self


class ResNet(FreezableBody):
    """Stem and the first `stages` stages: `stem`, `layer1` (res2) .. `layer4` (res5).

    freeze_at: how many of stem, layer1, ... take no part in training, norms included.
    input_std: standard deviation of the input that fresh weights are made for.
    out_stages: which stages' outputs are returned (0 for res2); their channels are in `out_channels`.
    deep_stem, stage_options' pooled_shortcut: ResNet-vd.
    convolutions: what makes the 3x3s of res2 .. res5.
    """

    def __init__(
        self,
        depth: int,
        norm: Norm,
        in_channels: int = 3,
        input_std: float = 1.0,
        stem_channels: int = 64,
        deep_stem: bool = False,
        out_stages: tuple[int, ...] = (0, 1, 2, 3),
        freeze_at: int = 2,
        res5_dilation: int = 1,
        convolutions: Sequence[Conv3x3] = (conv3x3,) * 4,
        **stage_options,
    ) -> None:
        super().__init__()
        self.stem = Stem(in_channels, stem_channels, norm, input_std, deep_stem)
        self.stages: list[str] = []
        self.out_stages = out_stages
        self.out_channels: list[int] = []
        channels = stem_channels
        for stage in range(max(out_stages) + 1):
            dilation = res5_dilation if stage == 3 else 1
            options = {"dilation": dilation, "convolution": convolutions[stage], **stage_options}
            layer, channels = make_stage(depth, stage, channels, norm, **options)
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], layer)
            if stage in out_stages:
                self.out_channels.append(channels)
        self.freeze(["stem", *self.stages][:freeze_at])

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> the maps of `out_stages`, strides 4, 8, 16, 32 for stages 0..3."""
        x = self.stem(x)
        outputs = []
        for stage, name in enumerate(self.stages):
            x = getattr(self, name)(x)
            if stage in self.out_stages:
                outputs.append(x)
        return outputs
