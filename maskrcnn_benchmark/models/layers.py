"""Layers that several parts share: norms, convolution followed by a norm, initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.convolution import conv2d, linear
from ..ops.deform_conv import deform_conv2d

Norm = Callable[[int], nn.Module]


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters are constants.

    Every tensor is a buffer, as in maskrcnn-benchmark and torchvision, so that weights load and none is trained.
    maskrcnn-benchmark adds no epsilon to the variance; detectron2 and torchvision add 1e-5.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self._made_of: list[tuple[Tensor, int]] = []
        self._made: list[Tensor] = []

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The affine map it is: `x * scale + shift`, each [C]. Kept until a buffer is replaced or written to: the 53
        norms of an R-50 are 265 operators a step. A buffer written to leaves the map where it lies, where a captured
        graph reads it."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or self.weight.is_inference():
            return self._make()
        buffers = (self.weight, self.bias, self.running_mean, self.running_var)
        if not self._made or any(old is not b or at != b._version for b, (old, at) in zip(buffers, self._made_of)):
            made = self._make()
            if self._made and (self._made[0].device, self._made[0].dtype) == (made[0].device, made[0].dtype):
                for kept, new in zip(self._made, made):
                    kept.copy_(new)
            else:
                self._made = list(made)
            self._made_of = [(buffer, buffer._version) for buffer in buffers]
        scale, shift = self._made
        return scale, shift

    def _make(self) -> tuple[Tensor, Tensor]:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift()
        return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)


class _SumOverRanks(torch.autograd.Function):
    """The sum of every rank's tensor, on every rank; so each rank's gradient is the sum of all gradients."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all ranks, on any device and backend: torch's own works on accelerators alone."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        values = x.float()
        count = values.new_full((1,), values.numel() / values.shape[1])
        total, count = _SumOverRanks.apply(torch.cat((values.sum((0, 2, 3)), count))).split((self.num_features, 1))
        mean = total / count
        # Around the mean, in a second sum: the mean square less the squared mean can fall below zero in float32.
        deviation = (values - mean[:, None, None]).square().sum((0, 2, 3))
        variance = _SumOverRanks.apply(deviation) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (values * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


def conv_norm(x: Tensor, conv: nn.Module, norm: nn.Module, relu: bool = False, addend: Tensor | None = None) -> Tensor:
    """`norm(conv(x))`, then `+ addend` and a ReLU if wanted. A frozen norm is folded into the convolution's weights:
    one pass over the output less, and one activation less to keep for the backward pass, which reaches the weights
    through the product."""
    if not isinstance(norm, FrozenBatchNorm2d) or isinstance(conv, DeformConv2d):
        result = norm(conv(x)) if addend is None else norm(conv(x)) + addend
        return F.relu_(result) if relu else result
    scale, shift = norm.scale_and_shift()
    weight = conv.weight * scale[:, None, None, None]
    return conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups, relu, addend)


class Conv2d(nn.Conv2d):
    """nn.Conv2d by the fastest kernel at hand. Zero padding only."""

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        return conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups, relu)


class Linear(nn.Linear):
    """nn.Linear by the fastest kernel at hand, of [R, C]."""

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        return linear(x, self.weight, self.bias, relu)


def with_relu(layer: nn.Module, x: Tensor) -> Tensor:
    """`relu(layer(x))`, in one pass over the output where the layer can."""
    # A tuple: torch 2.8 does not compile `Conv2d | Linear`
    return layer(x, relu=True) if isinstance(layer, (Conv2d, Linear)) else F.relu_(layer(x))


class DeformConv2d(nn.Module):
    """A 3x3 convolution whose taps move (Dai et al. 2017, section 2.1) and, where `modulated`, are weighted (Zhu et al.
    2019, section 3.2). The convolution `offset` predicts how far and how much: 2 or 3 planes a tap and offset group.

    It starts at zero, as in both papers: no tap moves, and each weighs .5 where modulated.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        offset_groups: int = 1,
        modulated: bool = False,
    ) -> None:
        super().__init__()
        self.offset_groups, self.modulated = offset_groups, modulated
        planes = offset_groups * 9 * (3 if modulated else 2)
        self.offset = nn.Conv2d(in_channels, planes, 3, stride, dilation, dilation)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, groups, bias=False)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        offset, mask, conv = self.offset(x), None, self.conv
        if self.modulated:
            offset, mask = offset.split([18 * self.offset_groups, 9 * self.offset_groups], dim=1)
            mask = mask.sigmoid()
        places = (conv.stride, conv.padding, conv.dilation, conv.groups, self.offset_groups)
        return deform_conv2d(x, offset, mask, conv.weight, None, *places)


def group_norm(groups: int, channels_per_group: int, eps: float) -> Norm:
    """A group norm factory (Wu and He 2018): a number of groups, or a number of channels each when that is positive."""

    def make(channels: int) -> nn.GroupNorm:
        count = channels // channels_per_group if channels_per_group > 0 else groups
        return nn.GroupNorm(math.gcd(count, channels), channels, eps)

    return make


def conv(
    in_channels: int,
    out_channels: int,
    kernel: int,
    norm: Norm | None = None,
    relu: bool = False,
    init: Callable[[Tensor], object] = lambda weight: nn.init.kaiming_uniform_(weight, a=1),
    dilation: int = 1,
) -> nn.Module:
    """A same-size convolution; with a norm or ReLU a Sequential, so that parameters are named `0.weight`, `1.weight`
    as in maskrcnn-benchmark. The default initialisation is Caffe2's XavierFill."""
    padding = kernel // 2 * dilation
    layer = Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=norm is None)
    init(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    parts = [layer, *([norm(out_channels)] if norm else []), *([nn.ReLU(inplace=True)] if relu else [])]
    return layer if len(parts) == 1 else nn.Sequential(*parts)


def init_he(weight: Tensor) -> None:
    """He et al. 2015, by output channels: Caffe2's MSRAFill."""
    nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


def normal_layer(layer: nn.Conv2d | nn.Linear, std: float) -> nn.Conv2d | nn.Linear:
    """`layer` with normal weights and zero bias, as the last layers of the heads start."""
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer
