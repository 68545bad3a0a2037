"""How near an operator comes to what the machine allows: the least that its call must move and compute, over the rates
of a plain copy and of a matrix product (the roofline of Williams, Waterman and Patterson 2009).

Bytes: what is needed of the inputs, read once, and the outputs, written once. FLOP: additions, multiplications,
divisions, comparisons, exponentials and logarithms of floating-point numbers, one each; of convolutions the products of
a direct one, 2 a multiply-add.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..device import Device
from . import flops
from .timing import nanoseconds

COPIED = 2**28
# Of a pair of boxes in matching: corners of the intersection 4, its sides 4 with their clamps, its area 1, union 2,
# quotient 1, the anchor's and the ground truth's best 2.
FLOP_OF_MATCH = 14
# Of a box: sides 4, centres 8, quotients and weights of the shifts 6, quotients, logarithms and weights of the sides 6
FLOP_OF_ENCODE = 24
# Of a box: the anchor's sides and centre 6, weights 4, clamps 2, new centre 4, new sides 4, corners 6
FLOP_OF_DECODE = 26
# Of a proposal: as above without weights, clipping 8, sides and their comparison 4
FLOP_OF_PROPOSAL = 34
# Of a pixel of a pasted mask: four weighted neighbours 7, the threshold 1
FLOP_OF_PIXEL = 8
# Of a logit: sigmoid 3, logarithm of the likelihood 3, square of the rest 2, products 2, sum 1
FLOP_OF_FOCAL = 11
# Of a logit: as above without the sum, and its gradient: products 4, sum 1
FLOP_OF_FOCAL_GRADIENT = 15


@dataclass(frozen=True)
class Least:
    """What a call cannot do without. flop: None where it depends on what is found on the way: sorting, suppression,
    polygons."""

    bytes: int
    flop: int | None = None


@dataclass(frozen=True)
class Roof:
    """Of a device: 10^9 bytes a second of a copy, what is read and what is written together; 10^9 FLOP a second of a
    matrix product, by dtype."""

    gb_per_second: float
    gflop_per_second: dict[str, float]


def measure_roof(device: Device, dtypes: Iterable[torch.dtype], repeats: int = 5) -> Roof:
    """The fastest of some copies of 256 MB, which no cache holds, and of some products."""
    source, copy = torch.zeros(2, COPIED, dtype=torch.uint8, device=device.torch_device)
    copy.copy_(source)
    fastest = min(nanoseconds(lambda: copy.copy_(source), device.synchronize) for _ in range(repeats))
    products = {_name(dtype): 1000 * flops.measured_peak(device, dtype)[0] for dtype in dtypes}
    return Roof(2 * COPIED / fastest, products)


def judge(least: Least, milliseconds: float, dtype: torch.dtype, roof: Roof | None) -> dict[str, Any]:
    """For the JSON file: `least`, the rates that a call of so many milliseconds has with it, and with a roof the least
    time, what it is bound by (memory or arithmetic), and the share of the time that this is. The share can be above 1:
    of tensors that a cache holds, of convolutions with fewer products than a direct one."""
    rate = {"bytes": least.bytes, "flop": least.flop, "gb_per_second": least.bytes / milliseconds / 1e6}
    rate["gflop_per_second"] = None if least.flop is None else least.flop / milliseconds / 1e6
    if roof is None:
        return rate
    floor, bound = least_time(least, _name(dtype), roof)
    return rate | {"floor_ms": floor, "bound_by": bound, "share": floor / milliseconds}


def least_time(least: Least, dtype: str, roof: Roof) -> tuple[float, str]:
    """Milliseconds at the roof's rates, and what they are bound by: memory or arithmetic."""
    moving = least.bytes / roof.gb_per_second / 1e6
    computing = least.flop / roof.gflop_per_second[dtype] / 1e6 if least.flop else 0.0
    return max(moving, computing), "memory" if moving >= computing else "arithmetic"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- what operators need


def size_of(*values: Any) -> int:
    """Bytes of all tensors, in lists and tuples too; of COCO's RLEs, their strings."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, dict):
            total += len(value["counts"])
        elif isinstance(value, (list, tuple)):
            total += size_of(*value)
    return total


def pixels_under(
    boxes: Tensor, planes: Tensor, shapes: list[tuple[int, int]], scales: list[float], size: int, samples: int
) -> int:
    """How many pixels RoIAlign reads, those that several boxes read once.

    boxes: [R, 4] in the image. planes: [R], the map of each. shapes, scales: height and width of each map, and its
    pixels an image's. size: bins a side. samples: of a bin a side, or 0: as many as the bin has pixels, rounded up.
    """
    read = [np.zeros(shape, dtype=bool) for shape in shapes]
    for box, plane in zip(boxes.double().cpu().numpy(), planes.tolist()):
        axes = []
        for low, high, length in zip(box[1::-1], box[:1:-1], shapes[plane]):
            start, extent = low * scales[plane], max((high - low) * scales[plane], 1.0)
            count = size * (samples or int(np.ceil(extent / size)))
            position = (start + (np.arange(count) + 0.5) * extent / count).clip(0, length - 1)
            axes.append(np.unique(np.concatenate([np.floor(position), np.ceil(position)])).astype(int))
        read[plane][np.ix_(*axes)] = True
    return int(sum(plane.sum() for plane in read))


def convolution_flop(output: Tensor, weight: Tensor) -> int:
    """Of a direct convolution; its backward pass takes as much for the input's gradient, and for the weight's."""
    return 2 * output.numel() * weight[0].numel()
