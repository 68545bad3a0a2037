"""Convolution: torch's, except where ours is faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import LIBRARY, kernel_in_use, register_composite

LIBRARY.define("conv3x3(Tensor input, Tensor weight, Tensor? bias) -> Tensor")
LIBRARY.define("conv3x3_input_gradient(Tensor grad, Tensor weight) -> Tensor")
LIBRARY.define("conv3x3_weight_gradient(Tensor grad, Tensor input) -> Tensor")


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """torch.nn.functional.conv2d, autocast included; where the input's device has a conv3x3 kernel, that kernel for 3x3
    kernels of stride 1 and padding 1."""
    same = (tuple(weight.shape[2:]), stride, padding, dilation, groups) == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    if not (same and _has_kernel(input.device.type)):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if torch.is_autocast_enabled(input.device.type):
        input = input.to(torch.get_autocast_dtype(input.device.type))
    return conv3x3(input, weight, bias)


@torch.compiler.assume_constant_result
def _has_kernel(device_type: str) -> bool:
    return kernel_in_use("conv3x3", device_type) == "native"


def conv3x3(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution of stride 1 and zero padding 1.

    input: [B, C, H, W], floating point. weight: [K, C, 3, 3] and bias: [K], of any precision: the kernel reads them as
    they are, so that mixed precision needs no copy of a float32 weight, whose gradient is float32 without a detour.

    The kernel for CPUs with AVX-512 works by minimal filtering, F(2x2, 3x3) (Winograd 1980; Lavin and Gray 2016), with
    4/9 of the multiplications, where that is faster: channels in multiples of 32, maps of some size, no AMX. What it
    rounds differs from a direct convolution's: in float32 by some 1e-7 of the largest output; in bfloat16, where
    transformed tiles are rounded once more, the error is up to twice a direct convolution's.

    A value that is not finite spoils the 4x4 outputs around it, where a direct convolution spoils 3x3.

    Returns [B, K, H, W] of the input's dtype, channels-last. Differentiable in all three, once.
    """
    if input.dim() != 4 or tuple(weight.shape[1:]) != (input.shape[1], 3, 3):
        raise ValueError(
            f"conv3x3: input must be [B, C, H, W] and weight [K, C, 3, 3], got {list(input.shape)} {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"conv3x3: bias must be [K] = [{len(weight)}], got {list(bias.shape)}")
    return torch.ops.maskrcnn_benchmark.conv3x3(input, weight, bias)


def conv3x3_composite(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(input.dtype)
    return _channels_last(F.conv2d(input, weight.to(input.dtype), bias, padding=1))


def conv3x3_input_gradient_composite(grad: Tensor, weight: Tensor) -> Tensor:
    return _channels_last(F.conv_transpose2d(grad, weight.to(grad.dtype), padding=1))


def conv3x3_weight_gradient_composite(grad: Tensor, input: Tensor) -> Tensor:
    shape = (grad.shape[1], input.shape[1], 3, 3)
    gradient = torch.nn.grad.conv2d_weight(input, shape, grad, padding=1)
    return _channels_last(gradient.to(_gradient_dtype(input)))


register_composite("conv3x3", conv3x3_composite)
register_composite("conv3x3_input_gradient", conv3x3_input_gradient_composite)
register_composite("conv3x3_weight_gradient", conv3x3_weight_gradient_composite)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _gradient_dtype(input: Tensor) -> torch.dtype:
    """A weight's gradient is summed and returned in float32, unless all is float64."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


@torch.library.register_fake("maskrcnn_benchmark::conv3x3", lib=LIBRARY)
def _(input, weight, bias):
    return _empty(input, (input.shape[0], weight.shape[0], *input.shape[2:]), input.dtype)


@torch.library.register_fake("maskrcnn_benchmark::conv3x3_input_gradient", lib=LIBRARY)
def _(grad, weight):
    return _empty(grad, (grad.shape[0], weight.shape[1], *grad.shape[2:]), grad.dtype)


@torch.library.register_fake("maskrcnn_benchmark::conv3x3_weight_gradient", lib=LIBRARY)
def _(grad, input):
    return _empty(grad, (grad.shape[1], input.shape[1], 3, 3), _gradient_dtype(input))


def _setup_context(ctx, inputs, output) -> None:
    input, weight, bias = inputs
    ctx.save_for_backward(input, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    ops = torch.ops.maskrcnn_benchmark
    input, weight = ctx.saved_tensors
    wants_input, wants_weight, wants_bias = ctx.needs_input_grad
    return (
        ops.conv3x3_input_gradient(grad, weight) if wants_input else None,
        ops.conv3x3_weight_gradient(grad, input).to(weight.dtype) if wants_weight else None,
        grad.sum((0, 2, 3), dtype=_gradient_dtype(grad)).to(ctx.bias_dtype) if wants_bias else None,
    )


torch.library.register_autograd("maskrcnn_benchmark::conv3x3", _backward, setup_context=_setup_context, lib=LIBRARY)
