"""Deformable convolution, without modulation (Dai et al. 2017) and with it (Zhu et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .library import LIBRARY, register_composite

LIBRARY.define(
    "deform_conv2d(Tensor input, Tensor offset, Tensor? mask, Tensor weight, int[2] stride, int[2] padding,"
    " int[2] dilation, int groups, int offset_groups) -> Tensor"
)
LIBRARY.define(
    "deform_conv2d_backward(Tensor grad, Tensor input, Tensor offset, Tensor? mask, Tensor weight, int[2] stride,"
    " int[2] padding, int[2] dilation, int groups, int offset_groups)"
    " -> (Tensor grad_input, Tensor grad_offset, Tensor grad_mask, Tensor grad_weight)"
)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    offset_groups: int = 1,
) -> Tensor:
    """A convolution each of whose taps reads the input at a place of its own, moved by an offset.

    input: [B, C, H, W] floating point. weight: [O, C / groups, kh, kw] of the same dtype. bias: [O] or None.
    offset: [B, 2 * offset_groups * kh * kw, OH, OW] in pixels, for each of offset_groups equal parts of the channels
        and each tap, row by row, (dy, dx). mask: [B, offset_groups * kh * kw, OH, OW], a factor on what each tap reads,
        or None for 1. stride, padding, dilation: (vertical, horizontal), OH and OW follow as for any convolution.

    Between pixels the input is interpolated bilinearly; outside it is 0. A tap whose offset is not a number reads 0.
    Returns [B, O, OH, OW] of the input's dtype, channels-last if the input is. Half-precision inputs are interpolated
    in float32. Differentiable in input, offset, mask, weight and bias.
    """
    _check(input, offset, mask, weight, stride, padding, dilation, groups, offset_groups)
    dtype = _compute_dtype(input.dtype)
    output = torch.ops.maskrcnn_benchmark.deform_conv2d(
        input,
        offset.to(dtype),
        None if mask is None else mask.to(dtype),
        weight,
        stride,
        padding,
        dilation,
        groups,
        offset_groups,
    )
    return output if bias is None else output + bias.to(output.dtype).view(-1, 1, 1)


def _check(input, offset, mask, weight, stride, padding, dilation, groups: int, offset_groups: int) -> None:
    if input.dim() != 4 or not input.is_floating_point():
        raise ValueError(
            f"deform_conv2d: input must be [B, C, H, W] floating point, got {list(input.shape)} {input.dtype}"
        )
    channels = input.shape[1]
    if weight.dim() != 4 or 0 in weight.shape or weight.dtype != input.dtype or channels != weight.shape[1] * groups:
        raise ValueError(
            f"deform_conv2d: weight must be [O, C / groups = {channels} / {groups}, kh, kw] {input.dtype}, nothing 0, "
            f"got {list(weight.shape)} {weight.dtype}"
        )
    if groups < 1 or weight.shape[0] % groups or offset_groups < 1 or channels % offset_groups:
        raise ValueError(
            f"deform_conv2d: groups {groups} must divide the {weight.shape[0]} output channels, and offset_groups "
            f"{offset_groups} the {channels} input channels"
        )
    if min(stride) < 1 or min(padding) < 0 or min(dilation) < 1:
        raise ValueError(
            f"deform_conv2d: stride {tuple(stride)} and dilation {tuple(dilation)} must be >= 1, "
            f"padding {tuple(padding)} >= 0"
        )
    size = [
        (side + 2 * p - d * (kernel - 1) - 1) // s + 1
        for side, kernel, s, p, d in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    ]
    taps = offset_groups * weight.shape[2] * weight.shape[3]
    for name, tensor, planes in (("offset", offset, 2 * taps), ("mask", mask, taps)):
        if tensor is not None and list(tensor.shape) != [input.shape[0], planes, *size]:
            raise ValueError(
                f"deform_conv2d: {name} must be {[input.shape[0], planes, *size]} for this input, weight, stride, "
                f"padding and dilation, got {list(tensor.shape)}"
            )


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Offsets, masks, interpolation and sums: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """Channels-last only where the tensor is that and nothing else: one of one channel or one pixel is both."""
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


class _Tap(NamedTuple):
    """Where one tap of the kernel reads, for P = B * OH * OW output pixels times G offset groups."""

    rows: list[Tensor]  # [P * G] each, into the table of pixels: upper left, upper right, lower left, lower right
    down: Tensor  # [P * G, 1] how far below the upper row, 0..1
    right: Tensor  # [P * G, 1] how far right of the left column, 0..1
    mask: Tensor | None  # [P * G, 1]

    def weights(self) -> list[Tensor]:
        up, left = 1 - self.down, 1 - self.right
        return [up * left, up * self.right, self.down * left, self.down * self.right]


def _pixel_table(input: Tensor, offset_groups: int) -> Tensor:
    """[(B * H * W + 1) * G, C / G]: a row for each pixel and offset group; the last G are 0, for places outside."""
    channels = input.shape[1]
    pixels = input.permute(0, 2, 3, 1).reshape(-1, channels).to(_compute_dtype(input.dtype))
    return functional.pad(pixels, (0, 0, 0, 1)).view(-1, channels // offset_groups)


def _taps(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    offset_groups: int,
) -> Iterator[_Tap]:
    """The kernel's taps, row by row."""
    batch, _, height, width = input.shape
    out_height, out_width = offset.shape[2:]
    taps = kernel[0] * kernel[1]
    # [taps, B, OH, OW, G, (dy, dx)]
    offset = offset.reshape(batch, offset_groups, taps, 2, out_height, out_width).permute(2, 0, 4, 5, 1, 3)
    if mask is not None:
        mask = mask.reshape(batch, offset_groups, taps, out_height, out_width).permute(2, 0, 3, 4, 1)
    ys = torch.arange(out_height, device=input.device).view(-1, 1, 1) * stride[0] - padding[0]
    xs = torch.arange(out_width, device=input.device).view(-1, 1) * stride[1] - padding[1]
    image = torch.arange(batch, device=input.device).view(-1, 1, 1, 1)
    group = torch.arange(offset_groups, device=input.device)
    for tap in range(taps):
        y = (ys + tap // kernel[1] * dilation[0]) + offset[tap, ..., 0]
        x = (xs + tap % kernel[1] * dilation[1]) + offset[tap, ..., 1]
        inside = (y >= -1) & (y < height) & (x >= -1) & (x < width)
        y, x = torch.where(inside, y, 0), torch.where(inside, x, 0)
        top, left = y.floor(), x.floor()
        rows = []
        for v in (top.to(torch.int64), top.to(torch.int64) + 1):
            for u in (left.to(torch.int64), left.to(torch.int64) + 1):
                exists = inside & (v >= 0) & (v < height) & (u >= 0) & (u < width)
                pixel = torch.where(exists, (image * height + v) * width + u, batch * height * width)
                rows.append((pixel * offset_groups + group).flatten())
        yield _Tap(
            rows,
            (y - top).reshape(-1, 1),
            (x - left).reshape(-1, 1),
            None if mask is None else mask[tap].reshape(-1, 1),
        )


def _tap_weight(weight: Tensor, tap: int, groups: int) -> Tensor:
    """[groups, C / groups, O / groups]: what one tap multiplies by."""
    outputs, channels = weight.shape[:2]
    values = weight.flatten(2)[:, :, tap].to(_compute_dtype(weight.dtype))
    return values.view(groups, outputs // groups, channels).transpose(1, 2)


def deform_conv2d_composite(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    offset_groups: int,
) -> Tensor:
    batch, outputs, (out_height, out_width) = input.shape[0], weight.shape[0], offset.shape[2:]
    pixels = batch * out_height * out_width
    table = _pixel_table(input, offset_groups)
    total = table.new_zeros((groups, pixels, outputs // groups))
    taps = _taps(input, offset, mask, weight.shape[2:], stride, padding, dilation, offset_groups)
    for i, tap in enumerate(taps):
        sampled = sum(share * table.index_select(0, rows) for share, rows in zip(tap.weights(), tap.rows))
        if tap.mask is not None:
            sampled = sampled * tap.mask
        columns = sampled.view(pixels, groups, weight.shape[1]).transpose(0, 1)
        total = total.baddbmm(columns, _tap_weight(weight, i, groups))
    output = total.transpose(0, 1).reshape(batch, out_height, out_width, outputs).permute(0, 3, 1, 2)
    return output.to(input.dtype).contiguous(memory_format=_memory_format(input))


def deform_conv2d_backward_composite(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    offset_groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels, height, width = input.shape
    out_height, out_width = offset.shape[2:]
    pixels = batch * out_height * out_width
    table = _pixel_table(input, offset_groups)
    grad_table = torch.zeros_like(table)
    grad_rows = grad.permute(0, 2, 3, 1).reshape(pixels, groups, weight.shape[0] // groups).transpose(0, 1)
    grad_rows = grad_rows.to(table.dtype)
    grad_offsets, grad_masks, grad_weights = [], [], []
    taps = _taps(input, offset, mask, weight.shape[2:], stride, padding, dilation, offset_groups)
    for i, tap in enumerate(taps):
        grad_columns = (grad_rows @ _tap_weight(weight, i, groups).transpose(1, 2)).transpose(0, 1)
        grad_columns = grad_columns.reshape(pixels * offset_groups, channels // offset_groups)
        corners = [table.index_select(0, rows) for rows in tap.rows]
        sampled = sum(share * corner for share, corner in zip(tap.weights(), corners))
        # How the loss changes with each corner, summed over channels: the rest is geometry.
        upper_left, upper_right, lower_left, lower_right = (
            (grad_columns * corner).sum(dim=1, keepdim=True) for corner in corners
        )
        down, right = tap.down, tap.right
        grad_y = (1 - right) * (lower_left - upper_left) + right * (lower_right - upper_right)
        grad_x = (1 - down) * (upper_right - upper_left) + down * (lower_right - lower_left)
        if mask is not None:
            grad_masks.append((grad_columns * sampled).sum(dim=1))
            grad_y, grad_x = grad_y * tap.mask, grad_x * tap.mask
            sampled, grad_columns = sampled * tap.mask, grad_columns * tap.mask
        grad_offsets.append(torch.cat([grad_y, grad_x], dim=1))
        for share, rows in zip(tap.weights(), tap.rows):
            grad_table.index_add_(0, rows, grad_columns * share)
        columns = sampled.view(pixels, groups, weight.shape[1]).transpose(0, 1)
        grad_weights.append(grad_rows.transpose(1, 2) @ columns)

    grad_input = grad_table.view(-1, channels)[:-1].view(batch, height, width, channels).permute(0, 3, 1, 2)
    planes = (len(grad_offsets), batch, out_height, out_width, offset_groups)
    grad_offset = torch.stack(grad_offsets).view(*planes, 2)
    grad_offset = grad_offset.permute(1, 4, 0, 5, 2, 3).reshape(offset.shape)
    grad_mask = offset.new_zeros(0)
    if mask is not None:
        grad_mask = torch.stack(grad_masks).view(planes).permute(1, 4, 0, 2, 3).reshape(mask.shape)
    grad_weight = torch.stack(grad_weights, dim=-1).reshape(weight.shape)
    return (
        grad_input.to(input.dtype).contiguous(memory_format=_memory_format(input)),
        grad_offset.contiguous(),
        grad_mask.contiguous(),
        grad_weight.to(weight.dtype).contiguous(memory_format=_memory_format(weight)),
    )


register_composite("deform_conv2d", deform_conv2d_composite)
register_composite("deform_conv2d_backward", deform_conv2d_backward_composite)


@torch.library.register_fake("maskrcnn_benchmark::deform_conv2d", lib=LIBRARY)
def _(input, offset, mask, weight, stride, padding, dilation, groups, offset_groups):
    shape = (input.shape[0], weight.shape[0], *offset.shape[2:])
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_memory_format(input))


@torch.library.register_fake("maskrcnn_benchmark::deform_conv2d_backward", lib=LIBRARY)
def _(grad, input, offset, mask, weight, stride, padding, dilation, groups, offset_groups):
    return (
        torch.empty_like(input, memory_format=_memory_format(input)),
        offset.new_empty(offset.shape),
        offset.new_empty((0,) if mask is None else mask.shape),
        torch.empty_like(weight, memory_format=_memory_format(weight)),
    )


def _setup_context(ctx, inputs, output) -> None:
    input, offset, mask, weight, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, ctx.offset_groups = inputs
    ctx.save_for_backward(input, offset, mask, weight)


def _backward(ctx, grad):
    input, offset, mask, weight = ctx.saved_tensors
    grad_input, grad_offset, grad_mask, grad_weight = torch.ops.maskrcnn_benchmark.deform_conv2d_backward(
        grad,
        input,
        offset,
        mask,
        weight,
        ctx.stride,
        ctx.padding,
        ctx.dilation,
        ctx.groups,
        ctx.offset_groups,
    )
    return grad_input, grad_offset, None if mask is None else grad_mask, grad_weight, *[None] * 5


torch.library.register_autograd(
    "maskrcnn_benchmark::deform_conv2d", _backward, setup_context=_setup_context, lib=LIBRARY
)
