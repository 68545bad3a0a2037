"""What tools/parity.py compares: operators, layers and losses with small inputs, the same on every machine.

Inputs are drawn on the CPU from fixed seeds, and away from the places where rounding alone would change a discrete
result: masks are steep around the threshold, ties are exact in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.anchors import AnchorGenerator
from ..models.box_head import BoxHead, BoxPredictor, Conv5FeatureExtractor, MLPFeatureExtractor, SampledRoIs
from ..models.fpn import FPN
from ..models.layers import FrozenBatchNorm2d, SyncBatchNorm2d, conv_norm, group_norm
from ..models.losses import of_class
from ..models.mask_head import ConvFeatureExtractor, MaskHead, MaskPredictor
from ..models.rcnn import Normalize
from ..models.resnet import BasicBlock, Bottleneck, Stem
from ..models.roi_pool import RoIPool
from ..models.rpn import RPN, RPNHead
from ..ops import box_coder, epilogue, masks, matching, nms, proposals, roi_align
from ..structures import ImageBatch, PolygonBatch, Proposals, Targets

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
# Height and width of the image that the operators' boxes lie in, and of one with more work
SMALL, MEDIUM = (192, 256), (384, 512)
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


@dataclass(frozen=True)
class Case:
    """One comparison. `function(*floats, *fixed)`, with `module` as first argument where there is one, gives a tensor,
    a sequence or a dict of them; integer and boolean results must be equal.

    floats: what gradients are taken of. Operators get them in the tested dtype, layers and losses in float32 under
        autocast. Without any, the case is one of float32 alone: the reference gets the same numbers in float32.
    coordinates: floats are pixels, which are float32 in every dtype.
    differentiable: there are gradients to compare.
    depth: roundings to the tested dtype, one after the other, between an input and a result.
    condition: what multiplies float32's rounding errors: the square root of the terms of a sum, or the size of a
        coordinate over the distance in which the result changes.
    drawn: results are masks of 0 and 1, which must be equal.
    gates: ReLUs in a row; their gradient jumps where rounding crosses zero. A 3x3 max-pooling counts as three: more
        pairs may tie.
    full_precision: computed in float32 whatever the tested dtype is.
    suspects: well-known faults, by name, as functions; what a wrong result is compared with.
    """

    group: str
    name: str
    function: Callable[..., Any]
    floats: tuple[Tensor, ...] = ()
    fixed: tuple[Any, ...] = ()
    module: nn.Module | None = None
    coordinates: bool = False
    differentiable: bool = True
    depth: float = 1.0
    condition: float = 1.0
    gates: int = 0
    drawn: bool = False
    full_precision: bool = False
    suspects: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def runs_in(self, dtype: torch.dtype) -> bool:
        if not self.floats:
            return dtype == torch.float32
        return not self.coordinates or dtype in (torch.float32, torch.float64)

    def given(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """An input as both sides start from it."""
        return tensor.to(dtype) if self.group == "ops" else tensor

    def leaf_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the inputs, and so of the gradients, on the tested side."""
        return dtype if self.group == "ops" else torch.float32

    def rounding(self, dtype: torch.dtype, quantity: str) -> torch.dtype:
        """The dtype whose rounding limits the accuracy of "values" or "gradient"."""
        if not self.full_precision or dtype == torch.float64:
            return dtype
        return torch.float32 if quantity == "values" else self.leaf_dtype(dtype)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_boxes(generator: torch.Generator, shape: tuple[int, ...], image: tuple[int, int], least: float) -> Tensor:
    """[*shape, 4] float32 boxes whose corners lie in the image, sides from `least` to the image's, small ones often."""
    limit = torch.tensor([image[1], image[0]], dtype=torch.float32)
    side = least + (limit - least) * torch.rand((*shape, 2), generator=generator) ** 2
    corner = (limit - side) * torch.rand((*shape, 2), generator=generator)
    return torch.cat([corner, corner + side], dim=-1)


def pyramid(generator: torch.Generator, channels: int, image: tuple[int, int], batch: int = 2) -> tuple[Tensor, ...]:
    sizes = [(round(image[0] * scale), round(image[1] * scale)) for scale in SCALES]
    return tuple(torch.randn((batch, channels, *size), generator=generator) for size in sizes)


# ------------------------------------------------------------------------------------------------ operators


def op_cases() -> Iterator[Case]:
    yield from roi_align_cases()
    yield from nms_cases()
    yield from match_cases()
    yield from box_coder_cases()
    yield from mask_cases()
    namespace = torch.ops.maskrcnn_benchmark
    for name, cases in OPTIONAL.items():
        if hasattr(namespace, name):
            yield from cases(getattr(namespace, name))


def roi_align_cases() -> Iterator[Case]:
    for aligned in (True, False):
        for size, sampling in ((7, 2), (14, 0)):
            yield roi_align_case(SMALL, 16, 48, size, sampling, aligned)
    yield roi_align_case(SMALL, 16, 48, 7, 2, True, torch.channels_last)
    yield roi_align_case(MEDIUM, 64, 200, 7, 2, True, torch.channels_last)


def roi_align_case(
    image: tuple[int, int],
    channels: int,
    count: int,
    size: int,
    sampling: int,
    aligned: bool,
    layout: torch.memory_format = torch.contiguous_format,
) -> Case:
    """Boxes on all levels; among them one of a third of a pixel, one all outside, one larger than the image, one that
    names a level that does not exist."""
    generator = random(count)
    boxes = random_boxes(generator, (count,), image, 4.0)
    height, width = image
    boxes[:3] = torch.tensor([[30.1, 40.2, 30.4, 40.5], [2.0 * width] * 4, [-9.3, -7.1, width + 21.7, height + 13.2]])
    level = roi_align.assign_levels(boxes, 2, 5, canonical_size=height / 2)
    level[3] = len(SCALES)
    image_index = torch.arange(count) % 2

    def pool(aligned: bool, *inputs: Any) -> Tensor:
        levels = len(SCALES)
        return roi_align.roi_align(list(inputs[:levels]), *inputs[levels:], SCALES, size, sampling, aligned)

    flag = "aligned" if aligned else "not aligned"
    where = "channels last" if layout == torch.channels_last else "contiguous"
    return Case(
        "ops",
        f"roi_align {flag}, {size}x{size}, sampling {sampling}, {count} boxes, {where}",
        partial(pool, aligned),
        floats=tuple(f.contiguous(memory_format=layout) for f in pyramid(generator, channels, image)),
        fixed=(boxes, image_index, level),
        condition=width * SCALES[0],
        suspects={f"aligned={not aligned} (the flag is flipped)": partial(pool, not aligned)},
    )


def nms_cases() -> Iterator[Case]:
    def case(name: str, boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, threshold: float, most: int):
        return Case("ops", f"nms {name}", lambda *x: nms.nms(*x, threshold, most), fixed=(boxes, scores, groups, valid))

    generator = random(1)
    for name, shape, groups, valid, most in (
        ("one group, 300 boxes", (1, 300), 1, 1.0, 300),
        ("4 images, 5 groups, padding", (4, 300), 5, 0.8, 100),
        ("3,000 spread boxes, most of them kept", (1, 3000), 40, 1.0, 3000),
    ):
        boxes, scores = random_boxes(generator, shape, MEDIUM, 8.0), torch.rand(shape, generator=generator)
        boxes[0, 5], scores[0, 6] = torch.nan, torch.nan
        group = torch.randint(groups, shape, generator=generator)
        yield case(name, boxes, scores, group, torch.rand(shape, generator=generator) < valid, 0.5, most)
    # Whole pixels and IoUs of exactly 1/2: not above the threshold, so both stay. Equal scores keep their order.
    start = torch.arange(60.0) * 30
    pair = torch.stack([start, start * 0, start + 20, start * 0 + 10], dim=-1)
    boxes = torch.cat([pair, pair * torch.tensor([1.0, 1, 1, 2]), pair])[None]
    ties = torch.ones(boxes.shape[:2])
    yield case("ties of score, IoUs at the threshold", boxes, ties, ties.long(), ties.bool(), 0.5, 180)


def match_cases() -> Iterator[Case]:
    generator = random(2)
    gt = random_boxes(generator, (3, 12), SMALL, 12.0).round()
    gt[0, 1] = gt[0, 0]  # a tie: the lower index has it
    valid = torch.ones(3, 12, dtype=torch.bool)
    valid[1, 7:], valid[2] = False, False
    grid = AnchorGenerator(((32,), (64,)), (0.5, 1.0, 2.0), (8, 16), rounding="corners")
    anchors = torch.cat(grid([(24, 32), (12, 16)], SMALL, torch.device("cpu")))
    proposals = random_boxes(generator, (3, 500), SMALL, 4.0)
    for name, boxes, high, low, low_quality in (
        ("anchors, low quality, ties, padding", anchors, 0.7, 0.3, True),
        ("proposals of each image", proposals, 0.5, 0.5, False),
    ):
        yield Case("ops", f"match {name}", partial(_match, high, low, low_quality), fixed=(gt, valid, boxes))


def _match(high: float, low: float, low_quality: bool, *boxes: Tensor) -> tuple[Tensor, Tensor]:
    return matching.match(*boxes, high, low, low_quality)


def box_coder_cases() -> Iterator[Case]:
    generator = random(3)
    boxes, anchors = (random_boxes(generator, (600,), MEDIUM, 16.0) for _ in range(2))
    legacy = torch.tensor([0.0, 0, 1, 1])

    def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
        return box_coder.encode(boxes, anchors, WEIGHTS)

    def encode_legacy(boxes: Tensor, anchors: Tensor) -> Tensor:
        return encode(boxes + legacy, anchors + legacy)

    plus_one = 'boxes with the legacy "+1"'
    yield Case(
        *("ops", "box_encode", encode),
        floats=(boxes, anchors),
        coordinates=True,
        differentiable=False,
        condition=max(MEDIUM) / 16,
        suspects={plus_one: encode_legacy},
    )

    def decode(deltas: Tensor, anchors: Tensor) -> Tensor:
        return box_coder.decode(deltas, anchors.to(torch.promote_types(deltas.dtype, torch.float32)), WEIGHTS)

    def decode_legacy(deltas: Tensor, anchors: Tensor) -> Tensor:
        return decode(deltas, anchors + legacy) - legacy

    deltas = torch.randn((600, 4), generator=generator) * 2
    deltas[:20, 2:] = 40.0  # beyond the clip: no gradient
    yield Case(
        *("ops", "box_decode", decode),
        floats=(deltas,),
        fixed=(anchors,),
        full_precision=True,
        condition=8,
        suspects={plus_one: decode_legacy},
    )
    index = torch.randint(-20, 620, (2, 300), generator=generator)  # some name no anchor
    yield Case(
        *("ops", "proposals 300 of 600 anchors", lambda *x: proposals.decode_and_clip(*x, min_size=8.0)),
        floats=(torch.randn((2, 600, 4), generator=generator),),
        fixed=(anchors, index, torch.tensor([MEDIUM, SMALL])),
        differentiable=False,
        full_precision=True,
        condition=8,
    )


def mask_cases() -> Iterator[Case]:
    generator = random(4)
    packed = star_polygons(generator, 24, SMALL)
    boxes = random_boxes(generator, (40,), SMALL, 8.0)
    instance = torch.randint(24, (40,), generator=generator)
    for size in (14, 28):
        yield Case(
            *("ops", f"polygon_targets 40 boxes, {size}x{size}", partial(_polygon_targets, size)),
            fixed=(packed.points, packed.polygon_offsets, packed.instance_offsets, instance, boxes),
            drawn=True,
        )
    bitmaps = (torch.rand((24, *SMALL), generator=generator) < 0.5).to(torch.uint8)
    yield Case(
        *("ops", "bitmap_targets (roi_align of uint8)", lambda *x: masks.bitmap_targets(*x, 28, soft=True)),
        fixed=(bitmaps, instance, boxes),
        condition=SMALL[1],
    )
    boxes[:3] = torch.tensor([[-30.3, -20.7, 60.1, 80.9], [200.2, 150.4, 310.8, 230.6], [50.0, 50, 50, 90]])
    yield Case(
        *("ops", "paste_masks_rle 40 masks 28x28", partial(_paste_masks_rle, SMALL)),
        fixed=(steep_masks(generator, 40, 28), boxes),
    )


def _polygon_targets(size: int, *inputs: Tensor) -> Tensor:
    return masks.polygon_targets(*inputs, size)


def _paste_masks_rle(image: tuple[int, int], mask: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.maskrcnn_benchmark.paste_masks_rle(mask, boxes, *image, 0.5)


def star_polygons(generator: torch.Generator, instances: int, image: tuple[int, int]) -> PolygonBatch:
    """Concave polygons, two an instance but none for each eighth."""
    counts = torch.full((instances,), 2)
    counts[::8] = 0
    corners = torch.randint(3, 12, (int(counts.sum()),), generator=generator)
    points = []
    for count in corners.tolist():
        angle = torch.arange(count) * (2 * math.pi / count)
        radius = (0.05 + 0.3 * torch.rand(count, generator=generator)) * min(image)
        centre = torch.rand(2, generator=generator) * torch.tensor([image[1], image[0]])
        points.append(centre + radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=-1))
    return PolygonBatch(torch.cat(points), offsets(corners), offsets(counts))


def offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def steep_masks(generator: torch.Generator, count: int, size: int) -> Tensor:
    """[count, size, size] discs whose edge falls from 1 to 0 within a cell: no pixel comes near the threshold."""
    centre = size * (0.3 + 0.4 * torch.rand((count, 2, 1, 1), generator=generator))
    radius = size * (0.1 + 0.3 * torch.rand((count, 1, 1), generator=generator))
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    distance = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2).sqrt()
    return ((radius - distance) * 10).sigmoid()


def soft_nms_cases(op: Callable) -> Iterator[Case]:
    for name, gaussian in (("linear", False), ("Gaussian", True)):
        yield Case("ops", f"soft_nms {name}", lambda *x, g=gaussian: op(*x, g, 0.3, 0.5, 1e-3, 80), fixed=_candidates())


def distance_nms_cases(op: Callable) -> Iterator[Case]:
    for name, aspect in (("DIoU", False), ("CIoU", True)):
        yield Case("ops", f"distance_nms {name}", lambda *x, a=aspect: op(*x, 0.5, a, 80), fixed=_candidates())


def _candidates() -> tuple[Tensor, ...]:
    """Boxes, scores, groups and valid of 2 images with 150 boxes."""
    generator, shape = random(5), (2, 150)
    return (
        random_boxes(generator, shape, SMALL, 20.0),
        torch.rand(shape, generator=generator),
        torch.randint(3, shape, generator=generator),
        torch.rand(shape, generator=generator) < 0.9,
    )


def deform_conv2d_cases(op: Callable) -> Iterator[Case]:
    generator = random(6)
    x, weight = (torch.randn(s, generator=generator) for s in ((2, 8, 20, 24), (6, 4, 3, 3)))
    offset = 2 * torch.randn((2, 2 * 2 * 9, 10, 12), generator=generator)
    mask = torch.rand((2, 2 * 9, 10, 12), generator=generator)
    settings = ([2, 2], [1, 1], [1, 1], 2, 2)
    terms = math.sqrt(weight[0].numel())

    def convolve(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
        # As ops/deform_conv.py calls it: where to read, and the factor on it, are at least float32.
        exact = torch.promote_types(x.dtype, torch.float32)
        return op(x, offset.to(exact), None if mask is None else mask.to(exact), weight, *settings)

    yield Case("ops", "deform_conv2d v1", convolve, floats=(x, offset, weight), depth=2, condition=24 + terms)
    yield Case("ops", "deform_conv2d v2", convolve, floats=(x, offset, weight, mask), depth=2, condition=24 + terms)


def sigmoid_focal_loss_cases(op: Callable) -> Iterator[Case]:
    logits = 3 * torch.randn((200, 9), generator=random(7))
    labels = torch.randint(-1, 10, (200,), generator=random(8))
    yield Case(
        *("ops", "sigmoid_focal_loss", lambda *x: op(*x, 2.0, 0.25)),
        floats=(logits,),
        fixed=(labels,),
        full_precision=True,
        condition=9,
    )


def conv3x3_cases(op: Callable) -> Iterator[Case]:
    generator = random(9)
    for name, shape in (("many tiles", (2, 32, 40, 44)), ("few tiles", (2, 32, 12, 9))):
        x = torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(64, 32, 3, 3, generator=generator) / 17, torch.randn(64, generator=generator)
        convolve = lambda *x: op(*x, False)  # noqa: E731
        floats, condition = (x, weight, bias), 4 * math.sqrt(9 * 32)
        yield Case("ops", f"conv3x3, {name}", convolve, floats=floats, depth=2, condition=condition)


def pointwise_cases(op: Callable) -> Iterator[Case]:
    generator = random(10)
    for name, shape in (("rows", (100, 64)), ("map", (2, 64, 12, 9))):
        x = torch.randn(shape, generator=generator)
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        weight, bias = torch.randn(96, 64, generator=generator) / 8, torch.randn(96, generator=generator)
        convolve = lambda *x: op(*x, None, True)  # noqa: E731
        yield Case("ops", f"pointwise, {name}", convolve, floats=(x, weight, bias), condition=math.sqrt(64), gates=1)


def epilogue_cases(op: Callable) -> Iterator[Case]:
    generator = random(11)
    finish = lambda x, *rest: epilogue.epilogue_(x.clone(), *rest, True)  # noqa: E731
    for layout in (torch.contiguous_format, torch.channels_last):
        x, addend = (torch.randn(2, 24, 9, 7, generator=generator).contiguous(memory_format=layout) for _ in range(2))
        floats = (x, torch.randn(24, generator=generator), addend)
        yield Case("ops", f"epilogue_, {str(layout).removeprefix('torch.')}", finish, floats=floats, gates=1)


OPTIONAL: dict[str, Callable[[Callable], Iterator[Case]]] = {
    "soft_nms": soft_nms_cases,
    "distance_nms": distance_nms_cases,
    "deform_conv2d": deform_conv2d_cases,
    "sigmoid_focal_loss": sigmoid_focal_loss_cases,
    "conv3x3": conv3x3_cases,
    "pointwise": pointwise_cases,
    "epilogue_": epilogue_cases,
}

# --------------------------------------------------------------------------------------------------- layers


def layer_cases() -> Iterator[Case]:
    torch.manual_seed(0)
    yield from norm_cases()
    yield from backbone_cases()
    yield from head_cases()
    images = ImageBatch(
        torch.randint(256, (2, 3, 64, 96), generator=random(8), dtype=torch.uint8),
        sizes=torch.tensor([[64, 96], [50, 70]]),
        original_sizes=[(64, 96), (50, 70)],
        image_ids=[1, 2],
    )
    normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), bgr255=False)
    yield Case("layers", "image normalization", nn.Module.__call__, fixed=(images,), module=normalize, condition=4)


def layer_case(name: str, module: nn.Module, *shapes: tuple[int, ...], function=nn.Module.__call__, **rule) -> Case:
    """`module` with its frozen norms moved off the identity; inputs of `shapes`, in a list where there are several."""
    generator = random(9)
    for part in module.modules():
        if isinstance(part, FrozenBatchNorm2d):
            part.running_mean.normal_(generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
            part.bias.normal_(generator=generator)
    inputs = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    if len(inputs) > 1:
        return Case("layers", name, lambda module, *x: function(module, list(x)), inputs, module=module.train(), **rule)
    return Case("layers", name, function, inputs, module=module.train(), **rule)


def norm_cases() -> Iterator[Case]:
    norms = {"BN": nn.BatchNorm2d, "SyncBN": SyncBatchNorm2d, "GN": group_norm(4, -1, 1e-5)}
    norms |= {"frozen BN, folded": FrozenBatchNorm2d, "frozen BN without epsilon, folded": _frozen_without_epsilon}
    for name, norm in norms.items():
        module = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1, bias=False), norm(24))
        sums = 16 * 9 if "frozen" in name else 2 * 20 * 28  # a norm's statistics are the longer sums
        yield layer_case(
            *(f"convolution + {name}", module, (2, 16, 20, 28)),
            function=lambda module, x: conv_norm(x, *module),
            depth=3,
            condition=math.sqrt(sums),
        )
    yield layer_case("frozen BN alone", FrozenBatchNorm2d(24), (2, 24, 20, 28), depth=3)


def _frozen_without_epsilon(channels: int) -> FrozenBatchNorm2d:
    return FrozenBatchNorm2d(channels, eps=0.0)


def backbone_cases() -> Iterator[Case]:
    frozen, map_ = FrozenBatchNorm2d, (2, 32, 16, 24)
    terms = math.sqrt(32 * 9)
    yield layer_case("ResNet stem", Stem(3, 16, frozen, 1.0), (2, 3, 64, 96), depth=3, condition=terms, gates=4)
    yield layer_case("basic block", BasicBlock(32, 32, 1, 1, frozen), map_, depth=6, condition=terms, gates=2)
    for name, stride, groups, in_1x1 in (
        ("", 1, 1, True),
        (", stride 2 in 1x1", 2, 1, True),
        (", 4 groups", 2, 4, False),
    ):
        block = Bottleneck(32, 16, 64, stride, 1, groups, in_1x1, frozen)
        yield layer_case(f"bottleneck{name}", block, map_, depth=9, condition=terms, gates=3)
    shapes = [(2, 16 * 2**level, 32 >> level, 48 >> level) for level in range(4)]
    channels = [shape[1] for shape in shapes]
    terms = math.sqrt(32 * 9 * 4)
    yield layer_case("FPN", FPN(channels, 32), *shapes, depth=9, condition=terms)
    fpn = FPN(channels, 32, group_norm(4, -1, 1e-5), relu=True)
    yield layer_case("FPN with GN and ReLU", fpn, *shapes, depth=18, condition=terms, gates=2)


def head_cases() -> Iterator[Case]:
    maps = [(2, 32, 32, 48), (2, 32, 16, 24)]
    head = RPNHead(32, 3)
    terms = math.sqrt(32 * 9)
    # Gradients of weights are sums over every position of every level.
    yield layer_case("RPN head", head, *maps, function=_rpn_head, depth=2, condition=2 * terms, gates=1)
    extractor = MLPFeatureExtractor(16, 7, 64)
    module = nn.Sequential(extractor, BoxPredictor(64, 9))
    terms = math.sqrt(16 * 49)
    yield layer_case("box head (2 FC)", module, (40, 16, 7, 7), depth=3, condition=2 * terms, gates=2)
    module = nn.Sequential(Conv5FeatureExtractor(50, 32, FrozenBatchNorm2d, res2_channels=8, width_per_group=4))
    module.append(BoxPredictor(64, 9))
    yield layer_case("box head of C4 (res5)", module, (12, 32, 14, 14), depth=30, condition=2 * terms, gates=9)
    module = nn.Sequential(ConvFeatureExtractor(16, (16, 16)), MaskPredictor(16, 16, 9))
    terms = math.sqrt(16 * 9)
    label = torch.arange(20) % 9
    yield layer_case(
        *("mask head", module, (20, 16, 14, 14)),
        function=lambda parts, x: parts[1](parts[0](x), label.to(x.device)),
        depth=4,
        condition=4 * terms,
        gates=3,
    )
    yield pool_case()


def _rpn_head(head: RPNHead, features: list[Tensor]) -> list[Tensor]:
    logits, deltas = head(features)
    return [*logits, *deltas]


def pool_case() -> Case:
    """RoIPool chooses the level by itself: image sizes at which FPN's equation 1 uses three of the four."""
    generator = random(10)
    pool = RoIPool(tuple(SCALES), 7, 2, True)
    boxes = random_boxes(generator, (60,), MEDIUM, 8.0)
    return Case(
        *("layers", "RoI pooling, levels by box size", lambda *x: pool(list(x[:4]), *x[4:])),
        floats=pyramid(generator, 8, MEDIUM),
        fixed=(boxes, torch.arange(60) % 2),
        full_precision=True,
        condition=MEDIUM[1] * SCALES[0],
    )


# --------------------------------------------------------------------------------------------------- losses


class _Given(nn.Module):
    """Stands where a head would predict: the first `classes` columns are the logits, the others the deltas."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, : self.classes], x[:, self.classes :]


def _first_map(features: list[Tensor], boxes: Tensor, image_index: Tensor) -> Tensor:
    return features[0]


def loss_cases() -> Iterator[Case]:
    """Losses of given predictions: nothing in front of them rounds. They are float32 in every dtype."""
    targets, proposals = truth()
    sizes = torch.tensor([SMALL, (150, 200)])
    rule = {"full_precision": True, "condition": 16.0}
    generator = random(11)
    grid = AnchorGenerator(((32,), (64,)), (0.5, 1.0, 2.0), (8, 16))
    shapes = [(24, 32), (12, 16)]
    anchors = torch.cat(grid(shapes, SMALL, torch.device("cpu")))
    logits, deltas = (torch.randn((2, len(anchors), *n), generator=generator) for n in ((), (4,)))
    for normalizer, straddle in (("sampled", 0), ("batch", -1)):
        rpn = RPN(RPNHead(4, 3), grid, (1, 1), (1, 1), straddle=straddle, loss_normalizer=normalizer)
        yield Case(
            *("losses", f"RPN objectness and box, mean over {normalizer}", lambda *x, rpn=rpn: rpn.losses(*x)),
            floats=(logits, deltas),
            fixed=(anchors, sizes, targets),
            **rule,
        )
    for name, classes, boxes in (("box head", 9, 9), ("box head, class-agnostic boxes", 9, 2)):
        head = BoxHead(_first_map, nn.Identity(), _Given(classes), batch_size=64)
        rows = torch.randn((2 * 64, classes + 4 * boxes), generator=generator)
        yield Case(
            *("losses", f"{name}: classification and box", lambda x, *y, head=head: head.losses([x], *y)[1]),
            floats=(rows,),
            fixed=(proposals, targets, sizes),
            **rule,
        )
    yield mask_loss_case(targets, generator, rule)


def mask_loss_case(targets: Targets, generator: torch.Generator, rule: dict) -> Case:
    head = MaskHead(_first_map, nn.Identity(), of_class, positives_per_image=20)
    index = torch.randint(6, (2, 20), generator=generator)
    chosen = SampledRoIs(
        boxes=targets.boxes.gather(1, index[..., None].expand(-1, -1, 4)),
        valid=torch.ones(2, 20, dtype=torch.bool),
        positive=torch.arange(20).expand(2, -1) < torch.tensor([[20], [13]]),
        labels=targets.labels.gather(1, index),
        matched=index,
        wanted=targets.boxes.gather(1, index[..., None].expand(-1, -1, 4)),
    )
    fields = [getattr(chosen, name) for name in ("boxes", "valid", "positive", "labels", "matched", "wanted")]
    return Case(
        *("losses", "mask", lambda x, targets, *f: head.losses([x], SampledRoIs(*f), targets)),
        floats=(torch.randn((40, 9, 28, 28), generator=generator),),
        fixed=(targets, *fields),
        **rule,
    )


def truth() -> tuple[Targets, Proposals]:
    """2 images with 6 places for objects, the last two of the second empty, and 200 proposals each, some close."""
    generator = random(12)
    boxes = random_boxes(generator, (2, 6), SMALL, 24.0)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 4:] = False
    targets = Targets(
        boxes=boxes * valid[..., None],
        labels=torch.randint(1, 9, (2, 6), generator=generator) * valid,
        valid=valid,
        masks=star_polygons(generator, 12, SMALL),
    )
    near = boxes[:, torch.arange(60) % 4] + 3 * torch.randn((2, 60, 4), generator=generator)
    candidates = torch.cat([near, random_boxes(generator, (2, 140), SMALL, 8.0)], dim=1)
    scores = torch.rand((2, 200), generator=generator).sort(dim=1, descending=True).values
    return targets, Proposals(candidates, scores, torch.ones(2, 200, dtype=torch.bool))
