"""ResNet and ResNeXt bodies (He et al. 2016; Xie et al. 2017), named as in maskrcnn-benchmark."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import FrozenBatchNorm2d, Norm, conv_norm, init_he

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class Stem(nn.Module):
    """7x7 convolution and 3x3 max pooling: stride 4."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, input_std: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(out_channels)
        init_he(self.conv1.weight)
        if isinstance(self.bn1, FrozenBatchNorm2d):
            self.bn1.running_var.fill_(input_std**2)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(conv_norm(x, self.conv1, self.bn1, relu=True), kernel_size=3, stride=2, padding=1)


def damp_branch(last_norm: nn.Module) -> None:
    """Lets a block start close to its shortcut. A frozen norm normalises nothing, so without this (and the stem's
    variance) activations double from block to block, and R-50 from scratch is NaN at the third step."""
    if isinstance(last_norm, FrozenBatchNorm2d):
        last_norm.weight.fill_(0.25)


def shortcut(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), norm(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (ResNet-18 and -34)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dilation: int, norm: Norm) -> None:
        super().__init__()
        self.downsample = shortcut(in_channels, out_channels, stride, norm)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, bias=False)
        self.bn1 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, dilation, dilation, bias=False)
        self.bn2 = norm(out_channels)
        damp_branch(self.bn2)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else conv_norm(x, *self.downsample)
        out = conv_norm(x, self.conv1, self.bn1, relu=True)
        return F.relu_(conv_norm(out, self.conv2, self.bn2) + identity)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 (ResNet-50 and deeper).

    stride_in_1x1: the stride is in the first 1x1 (MSRA's and Caffe2's weights) or in the 3x3 (torchvision's).
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
    ) -> None:
        super().__init__()
        first, middle = (stride, 1) if stride_in_1x1 else (1, stride)
        self.downsample = shortcut(in_channels, out_channels, stride, norm)
        self.conv1 = nn.Conv2d(in_channels, width, 1, first, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, middle, dilation, dilation, groups, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        damp_branch(self.bn3)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else conv_norm(x, *self.downsample)
        out = conv_norm(x, self.conv1, self.bn1, relu=True)
        out = conv_norm(out, self.conv2, self.bn2, relu=True)
        return F.relu_(conv_norm(out, self.conv3, self.bn3) + identity)


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
) -> tuple[nn.Sequential, int]:
    """The blocks of one stage (0 for res2 .. 3 for res5) and the channels that leave it.

    A dilated stage keeps its resolution. Basic blocks have a quarter of `res2_channels`, 64 for 256.
    """
    basic = depth < 50
    out_channels = (res2_channels // 4 if basic else res2_channels) * 2**stage
    width = groups * width_per_group * 2**stage
    blocks = []
    for index in range(BLOCKS[depth][stage]):
        stride = 2 if index == 0 and stage > 0 and dilation == 1 else 1
        if basic:
            blocks.append(BasicBlock(in_channels, out_channels, stride, dilation, norm))
        else:
            blocks.append(Bottleneck(in_channels, width, out_channels, stride, dilation, groups, stride_in_1x1, norm))
        in_channels = out_channels
    layers = nn.Sequential(*blocks)
    for module in layers.modules():
        if isinstance(module, nn.Conv2d):
            init_he(module.weight)
    return layers, out_channels


class ResNet(nn.Module):
    """Stem and the first `stages` stages: `stem`, `layer1` (res2) .. `layer4` (res5).

    freeze_at: how many of stem, layer1, ... take no part in training, norms included.
    input_std: standard deviation of the input that fresh weights are made for.
    out_stages: which stages' outputs are returned (0 for res2); their channels are in `out_channels`.
    """

    def __init__(
        self,
        depth: int,
        norm: Norm,
        in_channels: int = 3,
        input_std: float = 1.0,
        stem_channels: int = 64,
        out_stages: tuple[int, ...] = (0, 1, 2, 3),
        freeze_at: int = 2,
        res5_dilation: int = 1,
        **stage_options,
    ) -> None:
        super().__init__()
        self.stem = Stem(in_channels, stem_channels, norm, input_std)
        self.stages: list[str] = []
        self.out_stages = out_stages
        self.out_channels: list[int] = []
        channels = stem_channels
        for stage in range(max(out_stages) + 1):
            dilation = res5_dilation if stage == 3 else 1
            layer, channels = make_stage(depth, stage, channels, norm, dilation=dilation, **stage_options)
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], layer)
            if stage in out_stages:
                self.out_channels.append(channels)
        self.frozen = [getattr(self, name) for name in ["stem", *self.stages][:freeze_at]]
        for module in self.frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> ResNet:
        super().train(mode)
        for module in self.frozen:
            module.eval()  # a frozen stage's batch norms keep their statistics
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> the maps of `out_stages`, strides 4, 8, 16, 32 for stages 0..3."""
        x = self.stem(x)
        outputs = []
        for stage, name in enumerate(self.stages):
            x = getattr(self, name)(x)
            if stage in self.out_stages:
                outputs.append(x)
        return outputs
