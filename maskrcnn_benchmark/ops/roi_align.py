"""RoIAlign over a feature pyramid (Mask R-CNN, section 3; FPN, section 4.2), one operator for all levels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .boxes import area
from .library import LIBRARY, register_composite

LIBRARY.define(
    "roi_align(Tensor[] features, Tensor boxes, Tensor image_index, Tensor level_index, float[] scales,"
    " int output_size, int sampling_ratio, bool aligned) -> Tensor"
)
LIBRARY.define(
    "roi_align_backward(Tensor grad, Tensor boxes, Tensor image_index, Tensor level_index, float[] scales,"
    " int sampling_ratio, bool aligned, SymInt batch, SymInt[] heights, SymInt[] widths, bool channels_last)"
    " -> Tensor[]"
)


def roi_align(
    features: list[Tensor],
    boxes: Tensor,
    image_index: Tensor,
    level_index: Tensor,
    scales: list[float],
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Pool each box to output_size x output_size bins: the mean of bilinear samples in each bin.

    features: one [B, C, H, W] map a level, of one dtype: floating point, or uint8, which gives float32.
    boxes: [R, 4] xyxy in image pixels. image_index: [R] int64 in 0..B-1. level_index: [R] int64 in 0..len(features)-1.
        A row whose image or level does not exist gives zeros and no gradient.
    scales: feature pixels per image pixel, one a level. sampling_ratio: samples a bin and axis; 0 means
        ceil(box side / output_size) for each box and axis (at most the map's side + 2), for which the composite, not
        the kernels, waits for the device.
    aligned: True shifts by half a pixel, so that pixel centres lie at .5 (detectron2); False does not, and takes box
        sides as at least 1 feature pixel (maskrcnn-benchmark, torchvision).

    Samples more than one pixel outside the map count as 0, those within that pixel are moved to its edge.
    Returns [R, C, S, S], channels-last if the features are. Half-precision features are summed in float32.
    Differentiable in the features.
    """
    _check(features, boxes, image_index, level_index, scales)
    if output_size < 1 or sampling_ratio < 0:
        raise ValueError(f"roi_align: output_size {output_size} must be >= 1, sampling_ratio {sampling_ratio} >= 0")
    boxes = boxes.to(_compute_dtype(features[0].dtype))
    return torch.ops.maskrcnn_benchmark.roi_align(
        features, boxes, image_index, level_index, scales, output_size, sampling_ratio, aligned
    )


def assign_levels(
    boxes: Tensor,
    min_level: int,
    max_level: int,
    canonical_size: float = 224.0,
    canonical_level: int = 4,
    epsilon: float = 1e-8,
) -> Tensor:
    """Pyramid level of boxes [..., 4], counted from min_level, as int64 [...] (FPN, equation 1).

    A box of canonical_size x canonical_size pixels belongs to canonical_level, half the side to the level below.
    epsilon: added to side / canonical_size against rounding: 1e-8 in detectron2, 1e-6 in maskrcnn-benchmark.
    """
    level = canonical_level + (area(boxes).sqrt() / canonical_size + epsilon).log2()
    return level.floor().nan_to_num(min_level).clamp(min_level, max_level).to(torch.int64) - min_level


def _check(features: list[Tensor], boxes: Tensor, image_index: Tensor, level_index: Tensor, scales) -> None:
    if not features or len(features) != len(scales):
        raise ValueError(f"roi_align: one scale a feature map, got {len(features)} maps and {len(scales)} scales")
    first = features[0]
    for feature in features:
        if feature.dim() != 4 or feature.shape[:2] != first.shape[:2] or 0 in feature.shape[2:]:
            raise ValueError(f"roi_align: features must be [B, C, H, W] with equal B and C, got {list(feature.shape)}")
        if feature.dtype != first.dtype:
            raise ValueError(f"roi_align: features must have one dtype, got {first.dtype} and {feature.dtype}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"roi_align: boxes must be [R, 4], got {list(boxes.shape)}")
    if image_index.shape != boxes.shape[:1] or level_index.shape != boxes.shape[:1]:
        raise ValueError(
            f"roi_align: image_index and level_index must be [R] = [{boxes.shape[0]}], "
            f"got {list(image_index.shape)} and {list(level_index.shape)}"
        )


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Coordinates, weights and sums: float64 for float64 features, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _output_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.float32


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _is_channels_last(features: Sequence[Tensor]) -> bool:
    """A map of one channel or one pixel is both; what all levels are, and are not otherwise, decides."""
    last = all(feature.is_contiguous(memory_format=torch.channels_last) for feature in features)
    return last and not all(feature.is_contiguous() for feature in features)


def _of_level(values: Sequence[float], level_index: Tensor, dtype: torch.dtype) -> Tensor:
    """[R]: the value of each row's level. By selection: an index into a list would copy it to the device and wait."""
    result = torch.zeros_like(level_index, dtype=dtype)
    for level, value in enumerate(values):
        result = torch.where(level_index == level, value, result)
    return result


def _axis_taps(start: Tensor, side: Tensor, size: Tensor, bins: int, sampling_ratio: int) -> tuple[Tensor, Tensor]:
    """The pixels that one axis of a box reads: index and weight, both [T, R, bins], for T taps a bin.

    start, side [R]: the box on this axis in feature pixels; size [R]: the map's. A sample is a weighted sum of the
    pixels below and above it, so a bin has two taps a sample; the weights hold the mean over the samples too. The
    index is -1 where a sample lies outside, or is one too many.
    """
    bin_side = (side / bins)[:, None]
    size = size[:, None]
    if sampling_ratio > 0:
        samples = torch.full_like(bin_side, sampling_ratio)
        most = sampling_ratio
    else:
        samples = torch.minimum(bin_side.ceil().nan_to_num(0).clamp(min=0), size + 2)
        # Waits for the device: the number of taps, and with it the loop, depends on the largest box.
        most = int(samples.max()) if samples.numel() else 0
    sample = torch.arange(most, dtype=start.dtype, device=start.device)[:, None, None]
    cell = torch.arange(bins, dtype=start.dtype, device=start.device)
    position = start[:, None] + cell * bin_side + (sample + 0.5) * bin_side / samples
    inside = (position >= -1) & (position <= size) & (sample < samples)
    position = torch.where(inside, position, 0).clamp(min=0).minimum(size - 1)
    low = position.floor()
    above = position - low
    share = inside / samples.clamp(min=1)
    index = torch.cat([torch.where(inside, low, -1), torch.where(inside, torch.minimum(low + 1, size - 1), -1)])
    return index.to(torch.int64), torch.cat([(1 - above) * share, above * share])


def _taps(
    boxes: Tensor,
    image_index: Tensor,
    level_index: Tensor,
    scales: Sequence[float],
    bins: int,
    sampling_ratio: int,
    aligned: bool,
    batch: int,
    heights: Sequence[int],
    widths: Sequence[int],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tap by tap: which row of the flattened pyramid each bin reads and with which weight, both [R * bins * bins].

    The flattened pyramid has a row of C channels for each pixel: level after level, image, y, x. One more row at its
    end stands for all that is not there: a weight of 0 on any other would make NaN of a NaN in it.
    """
    exists = (image_index >= 0) & (image_index < batch) & (level_index >= 0) & (level_index < len(scales))
    first_rows = [0]
    for height, width in zip(heights, widths):
        first_rows.append(first_rows[-1] + batch * height * width)
    height = _of_level(heights, level_index, torch.int64)
    width = _of_level(widths, level_index, torch.int64)
    first_row = _of_level(first_rows[:-1], level_index, torch.int64) + image_index * height * width

    corners = boxes * _of_level(scales, level_index, boxes.dtype)[:, None] - (0.5 if aligned else 0.0)
    start, side = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        side = side.clamp(min=1)
    ys, y_weights = _axis_taps(start[:, 1], side[:, 1], height.to(boxes.dtype), bins, sampling_ratio)
    xs, x_weights = _axis_taps(start[:, 0], side[:, 0], width.to(boxes.dtype), bins, sampling_ratio)
    ys = torch.where(exists[:, None], ys, -1)
    for y, y_weight in zip(ys, y_weights):
        for x, x_weight in zip(xs, x_weights):
            row = first_row[:, None, None] + y[:, :, None] * width[:, None, None] + x[:, None, :]
            row = torch.where((y >= 0)[:, :, None] & (x >= 0)[:, None, :], row, first_rows[-1])
            weight = y_weight[:, :, None] * x_weight[:, None, :]
            yield row.flatten(), weight.flatten()


def roi_align_composite(
    features: Sequence[Tensor],
    boxes: Tensor,
    image_index: Tensor,
    level_index: Tensor,
    scales: Sequence[float],
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    batch, channels = features[0].shape[:2]
    heights, widths = [f.shape[2] for f in features], [f.shape[3] for f in features]
    nothing = features[0].new_zeros((1, channels))
    pyramid = torch.cat([*(f.permute(0, 2, 3, 1).flatten(0, 2) for f in features), nothing])
    count = boxes.shape[0]
    total = boxes.new_zeros((count * output_size**2, channels))
    for row, weight in _taps(
        boxes, image_index, level_index, scales, output_size, sampling_ratio, aligned, batch, heights, widths
    ):
        total.addcmul_(pyramid.index_select(0, row).to(total.dtype), weight[:, None])
    bins = total.to(_output_dtype(pyramid.dtype)).view(count, output_size, output_size, channels)
    return bins.permute(0, 3, 1, 2).contiguous(memory_format=_memory_format(_is_channels_last(features)))


def roi_align_backward_composite(
    grad: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    level_index: Tensor,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    batch: int,
    heights: Sequence[int],
    widths: Sequence[int],
    channels_last: bool,
) -> list[Tensor]:
    channels, bins = grad.shape[1], grad.shape[2]
    rows = [batch * height * width for height, width in zip(heights, widths)]
    pyramid = boxes.new_zeros((sum(rows) + 1, channels))
    grad_rows = grad.permute(0, 2, 3, 1).flatten(0, 2).to(boxes.dtype)
    for row, weight in _taps(
        boxes, image_index, level_index, scales, bins, sampling_ratio, aligned, batch, heights, widths
    ):
        pyramid.index_add_(0, row, grad_rows * weight[:, None])
    memory_format = _memory_format(channels_last)
    return [
        # clone: the levels must not share storage, autograd may accumulate into them.
        level.view(batch, height, width, channels).permute(0, 3, 1, 2).to(grad.dtype).clone(memory_format=memory_format)
        for level, height, width in zip(pyramid[:-1].split(rows), heights, widths)
    ]


register_composite("roi_align", roi_align_composite)
register_composite("roi_align_backward", roi_align_backward_composite)


@torch.library.register_fake("maskrcnn_benchmark::roi_align", lib=LIBRARY)
def _(features, boxes, image_index, level_index, scales, output_size, sampling_ratio, aligned):
    return torch.empty(
        (boxes.shape[0], features[0].shape[1], output_size, output_size),
        dtype=_output_dtype(features[0].dtype),
        device=features[0].device,
        memory_format=_memory_format(_is_channels_last(features)),
    )


@torch.library.register_fake("maskrcnn_benchmark::roi_align_backward", lib=LIBRARY)
def _(
    grad, boxes, image_index, level_index, scales, sampling_ratio, aligned, batch, heights, widths, channels_last
):  # fmt: skip
    return [
        torch.empty(
            (batch, grad.shape[1], height, width),
            dtype=grad.dtype,
            device=grad.device,
            memory_format=_memory_format(channels_last),
        )
        for height, width in zip(heights, widths)
    ]


def _setup_context(ctx, inputs, output) -> None:
    features, boxes, image_index, level_index, ctx.scales, _, ctx.sampling_ratio, ctx.aligned = inputs
    ctx.save_for_backward(boxes, image_index, level_index)
    ctx.batch = features[0].shape[0]
    ctx.heights = [feature.shape[2] for feature in features]
    ctx.widths = [feature.shape[3] for feature in features]
    ctx.channels_last = _is_channels_last(features)


def _backward(ctx, grad):
    boxes, image_index, level_index = ctx.saved_tensors
    grads = torch.ops.maskrcnn_benchmark.roi_align_backward(
        grad,
        boxes,
        image_index,
        level_index,
        ctx.scales,
        ctx.sampling_ratio,
        ctx.aligned,
        ctx.batch,
        ctx.heights,
        ctx.widths,
        ctx.channels_last,
    )
    return grads, None, None, None, None, None, None, None


torch.library.register_autograd("maskrcnn_benchmark::roi_align", _backward, setup_context=_setup_context, lib=LIBRARY)
