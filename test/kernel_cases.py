"""Calls of all operators with random inputs, the same in every process: what a device's kernels are compared by."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import maskrcnn_benchmark.ops  # noqa: F401  declares the operators

OPS = torch.ops.maskrcnn_benchmark


class Case(NamedTuple):
    """An operator's call. arguments: as in its schema, tensors on the CPU. One that ends in _ overwrites the first."""

    operator: str
    arguments: tuple
    deterministic: bool = False

    def exists(self) -> bool:
        return hasattr(OPS, self.operator)

    def on(self, device: str) -> Case:
        return self._replace(arguments=tree_map_only(Tensor, lambda tensor: tensor.to(device), self.arguments))

    def run(self) -> list[Tensor]:
        torch.use_deterministic_algorithms(self.deterministic)
        arguments = self.arguments
        if self.operator.endswith("_"):
            arguments = (arguments[0].clone(), *arguments[1:])
        try:
            result = getattr(OPS, self.operator)(*arguments)
        finally:
            torch.use_deterministic_algorithms(False)
        result = arguments[0] if result is None else result
        return [result] if isinstance(result, Tensor) else list(result)


def random_boxes(generator: torch.Generator, *shape: int, extent: float, side: float) -> Tensor:
    corner = torch.rand(*shape, 2, generator=generator) * extent
    return torch.cat([corner, corner + torch.rand(*shape, 2, generator=generator) * side], dim=-1)


def roi_align_cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for dtype, channels, ratio, bins, levels, aligned, count in [
        (torch.float32, 20, 2, 7, 4, True, 24),
        (torch.float32, 4, 2, 2, 1, True, 600),
        (torch.float64, 6, 0, 3, 1, False, 24),
        (torch.float16, 264, 2, 7, 2, True, 24),
        (torch.bfloat16, 9, 1, 14, 8, False, 24),
        (torch.uint8, 3, 0, 2, 3, True, 24),
    ]:
        sizes = [(max(1, 40 >> level), max(1, 50 >> level)) for level in range(levels)]
        features = [(100 * torch.rand(2, channels, *size, generator=generator)).to(dtype) for size in sizes]
        features = [feature.contiguous(memory_format=torch.channels_last) for feature in features]
        boxes = random_boxes(generator, count, extent=110, side=60).sub(10)
        boxes = boxes.to(torch.float64 if dtype == torch.float64 else torch.float32)
        boxes[0, 2] = boxes[1, 1] = torch.nan
        boxes[2] = boxes[2].flip(0)
        image = torch.randint(-1, 3, (count,), generator=generator)
        level = torch.randint(-1, levels + 1, (count,), generator=generator)
        rois = (boxes, image, level, [0.5**level for level in range(1, levels + 1)])
        yield Case("roi_align", (features, *rois, bins, ratio, aligned))
        if dtype.is_floating_point:
            grad = torch.randn(count, channels, bins, bins, generator=generator).to(dtype)
            arguments = (grad, *rois, ratio, aligned, 2, *map(list, zip(*sizes)), True)
            yield Case("roi_align_backward", arguments)
            yield Case("roi_align_backward", arguments, deterministic=True)


def nms_cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(1)
    # The larger ones take the CUDA kernel several slabs of sorted boxes.
    for batch, count, groups, most in [
        (3, 0, 1, 5),
        (1, 1, 1, 5),
        (2, 65, 2, 9),
        (1, 5200, 1, 5000),
        (2, 5200, 40, 300),
    ]:
        boxes = random_boxes(generator, batch, count, extent=300, side=60)
        scores = (torch.rand(batch, count, generator=generator) * 500).round() / 500  # many are equal
        group = torch.randint(0, groups, (batch, count), generator=generator)
        valid = torch.rand(batch, count, generator=generator) > 0.1
        boxes[:, 3::50, 1], scores[:, 4::50] = torch.nan, torch.nan
        yield Case("nms", (boxes, scores, group, valid, 0.5, most))
        if count < 1000:
            yield Case("nms", (boxes.double(), scores.double(), group, valid, 0.7, most))
            for flag in (False, True):
                yield Case("soft_nms", (boxes, scores, group, valid, flag, 0.3, 0.5, 0.05, most))
                yield Case("distance_nms", (boxes, scores, group, valid, 0.4, flag, most))


def box_cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(2)
    weights = [10.0, 10.0, 5.0, 5.0]
    for dtype, gts, anchors in [
        (torch.float32, 0, 7),
        (torch.float32, 3, 0),
        (torch.float64, 5, 300),
        (torch.float32, 40, 5000),
    ]:
        gt_boxes = random_boxes(generator, 2, gts, extent=100, side=50).to(dtype)
        anchor_boxes = random_boxes(generator, 2, anchors, extent=100, side=50).to(dtype)
        valid = torch.rand(2, gts, generator=generator) > 0.2
        yield Case("match", (gt_boxes, valid, anchor_boxes, 0.7, 0.3, True))
        yield Case("match", (gt_boxes, valid, anchor_boxes[0], 0.5, 0.5, False))
        other = random_boxes(generator, 2, anchors, extent=100, side=50).to(dtype)
        yield Case("box_encode", (other, anchor_boxes, weights))
        deltas = 8 * torch.randn(2, anchors, 4, generator=generator, dtype=dtype)
        yield Case("box_decode", (deltas, anchor_boxes[:1].expand_as(deltas), weights, 4.0))
        grad = torch.randn(2, anchors, 4, generator=generator, dtype=dtype)
        yield Case("box_decode_backward", (grad, deltas, anchor_boxes, weights, 4.0))
        index = torch.randint(-3, anchors + 3, (2, 40), generator=generator)  # some name no anchor
        sizes = torch.tensor([[90, 60], [110, 120]], dtype=dtype)
        yield Case("proposals", (deltas, anchor_boxes[1], index, sizes, 4.0, 5.0))


def mask_cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(3)
    corners = torch.randint(0, 12, (30,), generator=generator)
    polygon_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), corners.cumsum(0)])
    points = torch.rand(int(corners.sum()), 2, generator=generator) * 120 - 10
    instance_offsets = torch.tensor([0, 1, 1, 4, 9, 20, 30])
    instance = torch.randint(-1, 8, (25,), generator=generator)
    boxes = random_boxes(generator, 25, extent=90, side=60)
    boxes[3, 2] = boxes[3, 0]
    for size in (1, 14, 28, 113):
        yield Case("polygon_targets", (points, polygon_offsets, instance_offsets, instance, boxes, size))
    for count, size in [(0, 28), (25, 28), (25, 5)]:
        masks = torch.rand(25, size, size, generator=generator)[:count]
        yield Case("paste_masks_rle", (masks, boxes[:count] - 15, 101, 90, 0.5))


def layer_cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(4)
    for dtype, groups, offset_groups, stride, masked in [
        (torch.float32, 1, 1, 1, True),
        (torch.float64, 2, 2, 2, False),
        (torch.float32, 2, 4, 1, False),
    ]:
        side = 9 if stride == 1 else 5
        features = torch.randn(2, 8, 9, 9, generator=generator, dtype=dtype)
        offset = 2 * torch.randn(2, offset_groups * 18, side, side, generator=generator, dtype=dtype)
        mask = torch.rand(2, offset_groups * 9, side, side, generator=generator, dtype=dtype) if masked else None
        weight = torch.randn(6, 8 // groups, 3, 3, generator=generator, dtype=dtype)
        layer = (features, offset, mask, weight, [stride, stride], [1, 1], [1, 1], groups, offset_groups)
        yield Case("deform_conv2d", layer)
        grad = torch.randn(2, 6, side, side, generator=generator, dtype=dtype)
        yield Case("deform_conv2d_backward", (grad, *layer))
    # Vectors of whole rows and not; one that begins where no vector does; more than the threads of a grid take at once
    for dtype, shape, last in [
        (torch.bfloat16, (2, 24, 5, 7), True),
        (torch.float16, (2, 20, 5, 7), True),
        (torch.float32, (1, 12, 60, 70), True),
        (torch.float64, (2, 3, 4, 6), False),
        (torch.bfloat16, (2, 3, 5, 7), False),
        (torch.float32, (40, 9), False),
        (torch.float32, (0, 9), False),
    ]:
        x, addend = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        bias = torch.randn(shape[1], generator=generator)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        yield Case("epilogue_", (x, bias, addend, True))
        yield Case("epilogue_", (x, None, addend, False))
        yield Case("epilogue_", (x, bias, None, True))
    for rows, classes in [(0, 3), (1, 1), (700, 80)]:
        logits, labels = 4 * torch.randn(rows, classes, generator=generator), torch.arange(rows) % (classes + 2) - 1
        yield Case("sigmoid_focal_loss", (logits, labels, 2.0, 0.25))
        grad = torch.randn(rows, generator=generator)
        yield Case("sigmoid_focal_loss_backward", (grad, logits, labels, 2.0, 0.25))


def whole_boxes(generator: torch.Generator, *shape: int) -> Tensor:
    """Small whole numbers, so that equal overlaps, and empty and inverted boxes, are frequent."""
    corner = torch.randint(0, 8, (*shape, 2), generator=generator)
    return torch.cat([corner, corner + torch.randint(-1, 8, (*shape, 2), generator=generator)], dim=-1).float()


def edge_cases() -> Iterator[Case]:
    """Ties, what is no number, views that are not contiguous, and more than one block holds."""
    generator = torch.Generator().manual_seed(5)
    for count in (9, 300):
        boxes, anchors = whole_boxes(generator, 2, count), whole_boxes(generator, 2, 700)
        anchors[:, ::9, 2], boxes[0, ::5, 3] = torch.nan, torch.inf
        yield Case("match", (boxes, torch.rand(2, count, generator=generator) > 0.2, anchors, 0.5, 0.25, True))
    for flag in (False, True):
        boxes = whole_boxes(generator, 1, 1100).double()
        scores = torch.randint(0, 9, (1, 1100), generator=generator).double() / 9
        boxes[:, ::50, 2], scores[0, 3], scores[0, 5] = torch.inf, torch.inf, -torch.inf
        groups, valid = torch.arange(1100)[None] % 2, torch.rand(1, 1100, generator=generator) > 0.1
        yield Case("soft_nms", (boxes, scores, groups, valid, flag, 0.3, 0.5, 0.05, 4))
        yield Case("distance_nms", (boxes, scores, groups, valid, -0.2, flag, 4))

    weights = [10.0, 10.0, 5.0, 5.0]
    boxes = random_boxes(generator, 3, 5, extent=100, side=50)
    other = random_boxes(generator, 3, 1, extent=100, side=50).expand(3, 5, 4)
    unaligned = torch.rand(61, generator=generator)[1:].view(3, 5, 4)
    for first, second in [(boxes, other), (unaligned, boxes), (boxes.flip(-1)[..., ::2].repeat(1, 1, 2), boxes)]:
        yield Case("box_encode", (first, second, weights))
        yield Case("box_decode", (first / 100, second, weights, 0.1))

    deltas = torch.randn(4, 5, 3, generator=generator).permute(2, 1, 0)
    deltas[0, 1, 0], deltas[0, 2, 2], deltas[1, 3, 1], deltas[2, 4, 3] = torch.nan, torch.inf, -torch.inf, -torch.inf
    odd = torch.tensor([[torch.inf, 60], [torch.nan, 60], [-1, 0]])
    index = torch.tensor([[0, 1, 2, 3, 4, 5, -1, 1 << 62]] * 3)
    for least in (-torch.inf, 0.0):
        yield Case("proposals", (deltas, boxes[0], index, odd, 4.0, least))
    yield Case("proposals", (deltas[:0], boxes[0], index[:0], odd[:0], 4.0, 0.0))
    yield Case("proposals", (deltas, boxes[0], index[:, :0], odd, 4.0, 0.0))

    triangles = torch.rand(12, 2, generator=generator) * 300 - 40
    offsets, owners = torch.tensor([0, 3, 6, 6, 12]), torch.tensor([0, 2, 4])
    corners = torch.tensor([[0.0, 0, 250, 250], [0, 0, torch.inf, 9], [torch.nan, 0, 9, 9], [-1e30, 0, 1e30, 9]])
    for size in (33, 200):  # more than a word, more than a block's columns
        yield Case("polygon_targets", (triangles, offsets, owners, torch.tensor([0, 1, 1, 0]), corners, size))
    masks = torch.rand(7, 14, 14, generator=generator)
    masks[0, 5, 5] = torch.nan
    corners = torch.cat([corners, torch.tensor([[3.0, 3, 3, 9], [-50, -50, 99, 99], [7, 7, 7.2, 7.3]])])
    for height, width, threshold in [(50, 41, 0.5), (33, 60, 1.0), (50, 41, 0.01), (0, 5, 0.5), (5, 0, 0.5)]:
        yield Case("paste_masks_rle", (masks, corners, height, width, threshold))

    for dtype, side in [(torch.float16, 6), (torch.bfloat16, 6), (torch.float32, 6), (torch.float32, 0)]:
        features = (
            torch.randn(2, 16, side, 6, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
        )
        offset = 2 * torch.randn(2, 36, side + 2, 8, generator=generator)
        offset.view(-1)[::17], offset.view(-1)[3::7], offset.view(-1)[5::19] = torch.nan, -1, 1e20
        weight = (0.1 * torch.randn(5, 16, 3, 3, generator=generator)).to(dtype)
        yield Case("deform_conv2d", (features, offset, None, weight, [1, 1], [2, 2], [1, 1], 1, 2))

    for dtype, gamma in [(torch.float16, 2.0), (torch.bfloat16, 0.0), (torch.float64, 1.5)]:
        logits, labels = (9 * torch.randn(70, 33, generator=generator)).to(dtype), torch.arange(70) - 1
        grad = torch.randn(70, generator=generator).to(torch.promote_types(dtype, torch.float32))
        yield Case("sigmoid_focal_loss", (logits, labels, gamma, 0.3))
        yield Case("sigmoid_focal_loss_backward", (grad, logits, labels, gamma, 0.3))


CASES = [*roi_align_cases(), *nms_cases(), *box_cases(), *mask_cases(), *layer_cases(), *edge_cases()]


def save_results(path: str) -> None:
    """All results on the CPU in one .npz file, as `<number of the case>/<number of the result>`."""
    arrays = {}
    for number, case in enumerate(CASES):
        for place, result in enumerate(case.run() if case.exists() else []):
            half = result.dtype in (torch.float16, torch.bfloat16)
            arrays[f"{number}/{place}"] = (result.float() if half else result).numpy()
    np.savez(path, **arrays)


if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    save_results(sys.argv[2])
