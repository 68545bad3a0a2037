"""Convolution: torch's, except where ours is faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import LIBRARY, kernel_in_use, register_composite

LIBRARY.define("conv3x3(Tensor input, Tensor weight, Tensor? bias) -> Tensor")
LIBRARY.define("conv3x3_backward(Tensor grad, Tensor input, Tensor weight, bool[3] mask) -> (Tensor, Tensor, Tensor)")


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
    if not (same and kernel_in_use("conv3x3", input.device.type) == "native"):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if torch.is_autocast_enabled(input.device.type):
        input = input.to(torch.get_autocast_dtype(input.device.type))
    return conv3x3(input, weight, bias)


def conv3x3(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution of stride 1 and zero padding 1.

    input: [B, C, H, W], floating point. weight: [K, C, 3, 3] and bias: [K], of any precision: the kernel reads them as
    they are, so that mixed precision needs no copy of a float32 weight, whose gradient is float32 without a detour.

    The kernel for CPUs with AVX-512 works by minimal filtering, F(2x2, 3x3) (Winograd 1980; Lavin and Gray 2016), with
    4/9 of the multiplications, where that is faster: channels in multiples of 32, maps of some size, no AMX. What it
    rounds differs from a direct convolution's: in float32 by some 1e-7 of the largest output; in bfloat16, where
    transformed tiles are rounded once more, the error is up to twice a direct convolution's.

    Returns [B, K, H, W] of the input's dtype. Differentiable in all three.
    """
    return torch.ops.maskrcnn_benchmark.conv3x3(input, weight, bias)


def conv3x3_composite(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(input.dtype)
    return F.conv2d(input, weight.to(input.dtype), bias, padding=1)


def conv3x3_backward_composite(grad: Tensor, input: Tensor, weight: Tensor, mask: list[bool]):
    x, w, b = torch.ops.aten.convolution_backward(
        grad, input, weight.to(input.dtype), [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
    )
    return x, w.to(weight.dtype), b.to(weight.dtype)


register_composite("conv3x3", conv3x3_composite)
register_composite("conv3x3_backward", conv3x3_backward_composite)


def _setup_context(ctx, inputs, output) -> None:
    input, weight, bias = inputs
    ctx.save_for_backward(input, weight)
    ctx.with_bias = bias is not None


def _backward(ctx, grad):
    input, weight = ctx.saved_tensors
    mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.with_bias and ctx.needs_input_grad[2]]
    grads = torch.ops.maskrcnn_benchmark.conv3x3_backward(grad, input, weight, mask)
    return tuple(g if wanted else None for g, wanted in zip(grads, mask))


torch.library.register_autograd("maskrcnn_benchmark::conv3x3", _backward, setup_context=_setup_context, lib=LIBRARY)
