"""The operators in the standard operators of ONNX, for `torch.onnx.export`; needs onnxscript.

Where ONNX has the same arithmetic, an operator becomes a few of its nodes (TRANSLATIONS); the others are traced through
their composites (DECOMPOSITIONS), so that a convolution is a plain Conv.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from onnxscript import FLOAT, script
from onnxscript import opset18 as op
from onnxscript.ir import Value

from . import box_coder, convolution, deform_conv, proposals

_LEAST = torch.finfo(torch.float32).min
_NEVER = -math.inf  # the score of a row that must not come out


def _ints(*values: int) -> Value:
    return op.Constant(value_ints=values)


def nms(
    boxes: Value,
    scores: Value,
    groups: Value,
    valid: Value,
    iou_threshold: float,
    max_output: int,
) -> tuple[Value, Value]:
    """`nms.nms`. The M usable rows of all images are sorted into piles, one for each group of each image, and a pile is
    a batch entry of NonMaxSuppression, which compares boxes of one entry alone. Shifting the groups apart instead, as
    is often done, would round the boxes: by 0.008 pixels where 80 classes lie side by side."""
    usable = op.And(valid, op.Not(op.IsNaN(op.Add(scores, op.ReduceSum(boxes, _ints(2), keepdims=0)))))
    place = op.Transpose(op.NonZero(usable))  # [M, 2]: image and row
    group = op.GatherND(groups, place)
    groups_per_image = op.Add(op.ReduceMax(op.Concat(group, _ints(0), axis=0)), 1)
    pile = op.Add(op.Mul(op.Squeeze(op.Gather(place, _ints(0), axis=1), _ints(1)), groups_per_image), group)
    pile, order = op.TopK(pile, op.Shape(pile), largest=0)  # equal ones keep their order
    place = op.Gather(place, order)

    piles = op.Mul(op.Shape(boxes, start=0, end=1), groups_per_image)
    heights = op.ScatterElements(op.Expand(_ints(0), piles), pile, op.Expand(_ints(1), op.Shape(pile)), reduction="add")
    number = op.Range(0, op.Squeeze(op.Shape(pile)), 1)
    depth = op.Sub(number, op.Gather(op.CumSum(heights, 0, exclusive=1), pile))
    slot = op.Concat(op.Unsqueeze(pile, _ints(1)), op.Unsqueeze(depth, _ints(1)), axis=1)
    shape = op.Concat(piles, op.Max(op.ReduceMax(heights), _ints(1)), axis=0)
    piled_boxes = op.ScatterND(op.Expand(0.0, op.Concat(shape, _ints(4), axis=0)), slot, op.GatherND(boxes, place))
    piled_scores = op.ScatterND(op.Expand(_NEVER, shape), slot, op.GatherND(scores, place))
    piled_number = op.ScatterND(op.Expand(0, shape), slot, number)
    chosen = op.NonMaxSuppression(
        piled_boxes,
        op.Unsqueeze(piled_scores, _ints(1)),
        _ints(max_output),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[_LEAST]),
    )  # [K, 3]: pile, 0, depth
    kept = op.Gather(place, op.GatherND(piled_number, op.Gather(chosen, _ints(0, 2), axis=1)))

    kept_scores = op.ScatterND(op.Expand(_NEVER, op.Shape(scores)), kept, op.GatherND(scores, kept))
    padding = op.Expand(_NEVER, op.Concat(op.Shape(scores, start=0, end=1), _ints(max_output), axis=0))
    best, index = op.TopK(op.Concat(kept_scores, padding, axis=1), _ints(max_output))
    keep = op.Greater(best, _NEVER)
    return op.Where(keep, index, 0), keep


def roi_align(
    features: Sequence[Value],
    boxes: Value,
    image_index: Value,
    level_index: Value,
    scales: Sequence[float],
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Value:
    """`roi_align.roi_align`, of rows whose image and level exist: each level pools its own, which then return to their
    order."""
    pooled, rows = [], []
    for level, (feature, scale) in enumerate(zip(features, scales)):
        row = op.Squeeze(op.NonZero(op.Equal(level_index, level)), _ints(0))
        pooled.append(
            op.RoiAlign(
                feature,
                op.Gather(boxes, row),
                op.Gather(image_index, row),
                coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
                output_height=output_size,
                output_width=output_size,
                sampling_ratio=sampling_ratio,
                spatial_scale=scale,
            )
        )
        rows.append(row)
    if len(rows) == 1:  # C4
        return pooled[0]
    row = op.Concat(*rows, axis=0)
    _, back = op.TopK(row, op.Shape(row), largest=0)
    return op.Gather(op.Concat(*pooled, axis=0), back)


def find_peaks(maps: Value, boxes: Value) -> tuple[Value, Value]:
    """`heatmaps.find_peaks`."""
    found = _peaks(maps, boxes)
    return op.Slice(found, _ints(0), _ints(2), _ints(2)), op.Gather(found, 2, axis=2)


@script()
def _peaks(maps: FLOAT[...], boxes: FLOAT[...]) -> FLOAT[...]:
    """[R, K, 3]: points and values, box after box, as each map is enlarged to a size of its own."""
    sides = op.Max(op.Slice(boxes, [2], [4], [1]) - op.Slice(boxes, [0], [2], [1]), 1.0)
    cells = op.Cast(op.Ceil(sides), to=7)
    planes = op.Shape(maps, start=1, end=2)
    found = op.Expand(0.0, op.Concat([0], planes, [3], axis=0))
    for box in range(op.Squeeze(op.Shape(maps, start=0, end=1))):
        size = op.Gather(cells, box)  # wide, high
        wide = op.Gather(size, [0])
        shape = op.Concat([1], planes, op.Gather(size, [1]), wide, axis=0)
        fine = op.Resize(op.Gather(maps, op.Unsqueeze(box, [0])), None, None, shape, mode="cubic")
        fine = op.Reshape(fine, op.Concat(planes, [-1], axis=0))
        index = op.ArgMax(fine, axis=1, keepdims=1)
        cell = op.Cast(op.Concat(op.Mod(index, wide), op.Div(index, wide), axis=1), to=1)
        scale = op.Gather(sides, box) / op.Cast(size, to=1)
        point = (cell + 0.5) * scale + op.Slice(op.Gather(boxes, box), [0], [2])
        peak = op.ReduceMax(fine, [1], keepdims=1)
        found = op.Concat(found, op.Unsqueeze(op.Concat(point, peak, axis=1), [0]), axis=0)
    return found


_OPS = torch.ops.maskrcnn_benchmark

TRANSLATIONS = {_OPS.nms.default: nms, _OPS.roi_align.default: roi_align, _OPS.find_peaks.default: find_peaks}
DECOMPOSITIONS = {
    _OPS.box_decode.default: box_coder.decode_composite,
    _OPS.conv3x3.default: convolution.conv3x3_composite,
    _OPS.deform_conv2d.default: deform_conv.deform_conv2d_composite,
    _OPS.pointwise.default: convolution.pointwise_composite,
    _OPS.proposals.default: proposals.proposals_composite,
}
