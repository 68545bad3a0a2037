"""Convolutions and linear layers: torch's, except where ours are faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .epilogue import epilogue_
from .library import LIBRARY, kernel_in_use, register_composite

LIBRARY.define("conv3x3(Tensor input, Tensor weight, Tensor? bias, bool relu) -> Tensor")
LIBRARY.define("conv3x3_input_gradient(Tensor grad, Tensor weight) -> Tensor")
LIBRARY.define("conv3x3_weight_gradient(Tensor grad, Tensor input) -> (Tensor, Tensor)")
LIBRARY.define("pointwise(Tensor input, Tensor weight, Tensor? bias, Tensor? addend, bool relu) -> Tensor")
LIBRARY.define("pointwise_input_gradient(Tensor grad, Tensor weight) -> Tensor")
LIBRARY.define("pointwise_weight_gradient(Tensor grad, Tensor input) -> (Tensor, Tensor)")


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    relu: bool = False,
    addend: Tensor | None = None,
) -> Tensor:
    """torch.nn.functional.conv2d, autocast included; then `+ addend`, a map like the output, and a ReLU if wanted. The
    result has the convolution's dtype.

    Where the input's device has kernels of ours: conv3x3 for 3x3 kernels of stride 1 and padding 1, pointwise for 1x1
    kernels in bfloat16, and epilogue_ for what follows other convolutions.
    """
    kernel = tuple(weight.shape[2:])
    if (kernel, stride, padding, dilation, groups) == ((3, 3), (1, 1), (1, 1), (1, 1), 1):
        if _has_kernel("conv3x3", input.device.type):
            result = conv3x3(_autocast(input), weight, bias, relu and addend is None)
            return result if addend is None else _finish(result, None, addend, relu)
    elif (kernel, padding, groups) == ((1, 1), (0, 0), 1) and _takes_pointwise(input):
        pixels = _autocast(input)[:, :, :: stride[0], :: stride[1]]
        return pointwise(pixels, weight, bias, None if addend is None else addend.to(pixels.dtype), relu)
    # CUDA's convolutions add a bias in a pass of its own, which a sum or ReLU takes along
    later = (relu or addend is not None) and _takes_epilogue(input)
    result = F.conv2d(input, weight, None if later else bias, stride, padding, dilation, groups)
    return _finish(result, bias if later else None, addend, relu)


def _finish(result: Tensor, bias: Tensor | None, addend: Tensor | None, relu: bool) -> Tensor:
    addend = None if addend is None else addend.to(result.dtype)
    if (relu or addend is not None) and _takes_epilogue(result):
        return epilogue_(result, bias, addend, relu)
    result = result if addend is None else result + addend
    return F.relu_(result) if relu else result


def _takes_epilogue(map: Tensor) -> bool:
    """Not while compiling or exporting: a compiler makes one pass of the parts."""
    return _has_kernel("epilogue_", map.device.type) and not torch.compiler.is_compiling()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """torch.nn.functional.linear of [R, C], autocast included, and a ReLU if wanted; pointwise where that serves the
    device's bfloat16."""
    if _takes_pointwise(input):
        return pointwise(_autocast(input), weight, bias, None, relu)
    result = F.linear(input, weight, bias)
    return F.relu_(result) if relu else result


def _autocast(input: Tensor) -> Tensor:
    device = input.device.type
    return input.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else input


def _takes_pointwise(input: Tensor) -> bool:
    device = input.device.type
    if not _has_kernel("pointwise", device):
        return False
    return torch.bfloat16 == (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype)


def _has_kernel(op: str, device_type: str) -> bool:
    return kernel_in_use(op, device_type) == "native"


# All that torch.compiler.assume_constant_result does, but for importing torch._dynamo: 1.7 s of every process's start.
# The tests that compile a step as one graph fail where it means nothing.
_has_kernel._dynamo_marked_constant = True


def conv3x3(input: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """Convolution of stride 1 and zero padding 1, and a ReLU if wanted.

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
    return torch.ops.maskrcnn_benchmark.conv3x3(input, weight, bias, relu)


def pointwise(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, addend: Tensor | None = None, relu: bool = False
) -> Tensor:
    """A linear map of the second dimension, then `+ addend` and a ReLU if wanted: a fully connected layer of [R, C], a
    1x1 convolution of [B, C, H, W].

    input: [R, C] or [B, C, H, W], floating point. weight: [K, C] or [K, C, 1, 1] and bias: [K], of any precision, as
    for conv3x3: a float32 weight is rounded on its way into the product, and its gradient is float32. addend: as the
    result.

    The kernel for CPUs with AVX-512 and its bfloat16 instructions, without AMX, serves bfloat16 and channels in
    multiples of 32; other problems are torch's.

    Returns [R, K] or [B, K, H, W], channels-last, of the input's dtype. Differentiable in all four, once.
    """
    if input.dim() not in (2, 4) or tuple(weight.shape[1:]) not in ((input.shape[1],), (input.shape[1], 1, 1)):
        raise ValueError(
            "pointwise: input must be [R, C] or [B, C, H, W] and weight [K, C] or [K, C, 1, 1], got "
            f"{list(input.shape)} {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"pointwise: bias must be [K] = [{len(weight)}], got {list(bias.shape)}")
    like = (input.shape[0], len(weight), *input.shape[2:])
    if addend is not None and (addend.shape, addend.dtype) != (like, input.dtype):
        raise ValueError(
            f"pointwise: addend must be {list(like)} {input.dtype}, got {list(addend.shape)} {addend.dtype}"
        )
    return torch.ops.maskrcnn_benchmark.pointwise(input, weight, bias, addend, relu)


def conv3x3_composite(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    bias = None if bias is None else bias.to(input.dtype)
    result = F.conv2d(input, weight.to(input.dtype), bias, padding=1)
    return _channels_last(F.relu(result) if relu else result)


def conv3x3_input_gradient_composite(grad: Tensor, weight: Tensor) -> Tensor:
    return _channels_last(F.conv_transpose2d(grad, weight.to(grad.dtype), padding=1))


def conv3x3_weight_gradient_composite(grad: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    shape = (grad.shape[1], input.shape[1], 3, 3)
    gradient = torch.nn.grad.conv2d_weight(input, shape, grad, padding=1)
    return _channels_last(gradient.to(_gradient_dtype(input))), _bias_gradient(grad)


def pointwise_composite(
    input: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None, relu: bool
) -> Tensor:
    bias, weight = None if bias is None else bias.to(input.dtype), weight.to(input.dtype)
    if input.dim() == 2:
        result = F.linear(input, weight.flatten(1), bias)
    else:
        result = F.conv2d(input, weight.reshape(*weight.shape[:2], 1, 1), bias)
    result = result if addend is None else result + addend
    result = F.relu(result) if relu else result
    return result if input.dim() == 2 else _channels_last(result)


def pointwise_input_gradient_composite(grad: Tensor, weight: Tensor) -> Tensor:
    weight = weight.to(grad.dtype)
    if grad.dim() == 2:
        return grad @ weight.flatten(1)
    return _channels_last(F.conv_transpose2d(grad, weight.reshape(*weight.shape[:2], 1, 1)))


def pointwise_weight_gradient_composite(grad: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    return torch.einsum("bk...,bc...->kc", grad, input).to(_gradient_dtype(input)), _bias_gradient(grad)


register_composite("conv3x3", conv3x3_composite)
register_composite("conv3x3_input_gradient", conv3x3_input_gradient_composite)
register_composite("conv3x3_weight_gradient", conv3x3_weight_gradient_composite)
register_composite("pointwise", pointwise_composite)
register_composite("pointwise_input_gradient", pointwise_input_gradient_composite)
register_composite("pointwise_weight_gradient", pointwise_weight_gradient_composite)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _bias_gradient(grad: Tensor) -> Tensor:
    return grad.sum([0, *range(2, grad.dim())], dtype=_gradient_dtype(grad))


def _gradient_dtype(input: Tensor) -> torch.dtype:
    """A weight's gradient is summed and returned in float32, unless all is float64."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _like(tensor: Tensor, channels: int) -> Tensor:
    """For fake kernels: a map like `tensor` with other channels, channels-last; or rows."""
    memory_format = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    shape = (tensor.shape[0], channels, *tensor.shape[2:])
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format)


@torch.library.register_fake("maskrcnn_benchmark::conv3x3", lib=LIBRARY)
@torch.library.register_fake("maskrcnn_benchmark::pointwise", lib=LIBRARY)
def _(input, weight, *finish):
    return _like(input, weight.shape[0])


@torch.library.register_fake("maskrcnn_benchmark::conv3x3_input_gradient", lib=LIBRARY)
@torch.library.register_fake("maskrcnn_benchmark::pointwise_input_gradient", lib=LIBRARY)
def _(grad, weight):
    return _like(grad, weight.shape[1])


@torch.library.register_fake("maskrcnn_benchmark::conv3x3_weight_gradient", lib=LIBRARY)
def _(grad, input):
    weight = torch.empty(
        (grad.shape[1], input.shape[1], 3, 3),
        dtype=_gradient_dtype(input),
        device=grad.device,
        memory_format=torch.channels_last,
    )
    return weight, weight.new_empty(grad.shape[1])


@torch.library.register_fake("maskrcnn_benchmark::pointwise_weight_gradient", lib=LIBRARY)
def _(grad, input):
    weight = grad.new_empty((grad.shape[1], input.shape[1]), dtype=_gradient_dtype(input))
    return weight, weight.new_empty(grad.shape[1])


def _setup_context(ctx, inputs, output) -> None:
    input, weight, bias, *_, relu = inputs
    ctx.save_for_backward(input, weight, *([output] if relu else []))
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(name: str):
    def backward(ctx, grad):
        ops = torch.ops.maskrcnn_benchmark
        input, weight, *positive = ctx.saved_tensors
        for output in positive:
            grad = torch.ops.aten.threshold_backward(grad, output, 0)
        wants_input, wants_weight, wants_bias, *wants_addend, _ = ctx.needs_input_grad
        for_input = for_weight = for_bias = None
        if wants_input:
            for_input = getattr(ops, f"{name}_input_gradient")(grad, weight)
        if wants_weight:
            for_weight, for_bias = getattr(ops, f"{name}_weight_gradient")(grad, input)
            for_weight = for_weight.to(weight.dtype).view_as(weight)
        if wants_bias:
            for_bias = (for_bias if wants_weight else _bias_gradient(grad)).to(ctx.bias_dtype)
        for_addend = [grad if wanted else None for wanted in wants_addend]  # conv3x3 has none
        return for_input, for_weight, for_bias if wants_bias else None, *for_addend, None

    return backward


for _name in ("conv3x3", "pointwise"):
    torch.library.register_autograd(
        f"maskrcnn_benchmark::{_name}", _gradients(_name), setup_context=_setup_context, lib=LIBRARY
    )
