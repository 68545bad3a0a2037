"""What follows a convolution, in one pass over its output: its bias, another map, a ReLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import LIBRARY, register_composite

LIBRARY.define("epilogue_(Tensor(a!) input, Tensor? bias, Tensor? addend, bool relu) -> ()")


def epilogue_(input: Tensor, bias: Tensor | None = None, addend: Tensor | None = None, relu: bool = False) -> Tensor:
    """`input + bias + addend`, and a ReLU if wanted, in place; computed in float32 (of float64 in float64) and rounded
    once.

    Apart they read and write whole maps two or three times.

    input: [B, C, H, W], contiguous or channels-last, or [R, C], contiguous; floating point. It is overwritten, so
    whatever made it must not need it for its gradient, as convolutions do not. bias: [C], of any precision. addend: as
    input, of its dtype.

    Returns input. Differentiable in all three, once.
    """
    if input.dim() not in (2, 4):
        raise ValueError(f"epilogue_: input must be [B, C, H, W] or [R, C], got {list(input.shape)}")
    if not (input.is_contiguous() or (input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last))):
        raise ValueError(f"epilogue_: input must be contiguous or channels-last, got strides {list(input.stride())}")
    if bias is not None and bias.shape != input.shape[1:2]:
        raise ValueError(f"epilogue_: bias must be [C] = [{input.shape[1]}], got {list(bias.shape)}")
    if addend is not None and (addend.shape, addend.dtype) != (input.shape, input.dtype):
        raise ValueError(
            f"epilogue_: addend must be as input, {list(input.shape)} {input.dtype}, "
            f"got {list(addend.shape)} {addend.dtype}"
        )
    return _Epilogue.apply(input, bias, addend, relu)


class _Epilogue(torch.autograd.Function):
    """Not by register_autograd, which takes no operators that write to their arguments."""

    @staticmethod
    def forward(ctx, input: Tensor, bias: Tensor | None, addend: Tensor | None, relu: bool) -> Tensor:
        ctx.mark_dirty(input)
        torch.ops.maskrcnn_benchmark.epilogue_(input, bias, addend, relu)
        ctx.save_for_backward(*([input] if relu else []))
        ctx.bias_dtype = None if bias is None else bias.dtype
        return input

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        _, wants_bias, wants_addend, _ = ctx.needs_input_grad
        for output in ctx.saved_tensors:
            grad = torch.ops.aten.threshold_backward(grad, output, 0)
        for_bias = grad.sum([0, *range(2, grad.dim())], dtype=ctx.bias_dtype) if wants_bias else None
        return grad, for_bias, grad if wants_addend else None, None


def epilogue_composite(input: Tensor, bias: Tensor | None, addend: Tensor | None, relu: bool) -> None:
    result = input if input.dtype == torch.float64 else input.float()
    if bias is not None:
        result = result + bias.to(result.dtype).view(-1, *[1] * (input.dim() - 2))
    if addend is not None:
        result = result + addend
    input.copy_(F.relu(result) if relu else result)


register_composite("epilogue_", epilogue_composite)


@torch.library.register_fake("maskrcnn_benchmark::epilogue_", lib=LIBRARY)
def _(input, bias, addend, relu):
    pass
