"""The operators at the sizes of an 800 x 1344 training pair, ours and the peers', for `tools/benchmark.py ops`.

A peer is torchvision's function for the job, called the way its own models do; where torchvision has none, the way of
the project that has one, named in the result; and our composite, plain tensor code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from .. import ops
from ..ops import box_coder, masks, matching, nms, rle, roi_align
from .roofline import (
    FLOP_OF_DECODE,
    FLOP_OF_ENCODE,
    FLOP_OF_FOCAL,
    FLOP_OF_FOCAL_GRADIENT,
    FLOP_OF_MATCH,
    FLOP_OF_PIXEL,
    FLOP_OF_PROPOSAL,
    Least,
    convolution_flop,
    pixels_under,
    size_of,
)

Run = Callable[[], Any]
# Given a case's inputs, does what the timing leaves out (conversions, a forward pass) and returns what is timed.
Prepare = Callable[[Any], Run]
# Given our result and the peer's: an error, fine up to 1, that is in units of the tolerance.
Error = Callable[[Any, Any], float]

# What soft-NMS, DIoU-NMS and proposals are held against: torchvision has no function for either of them.
VECTORIZED = "vectorized torch: our composite"
# Scores below this end a box in soft-NMS.
SOFT_LEAST = 1e-4
CODER_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
STRIDES = (4, 8, 16, 32)
SCALES = [1 / stride for stride in STRIDES]


@dataclass(frozen=True)
class Setup:
    """Where and how large. scale 1 is the full problem; less shrinks counts, and sides by its root, for a try."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    scale: float = 1.0

    def count(self, full: int) -> int:
        return max(2, round(full * self.scale))

    def side(self, full: int) -> int:
        """A multiple of 32, the coarsest level's stride, unless full size."""
        return full if self.scale == 1 else max(2, round(full * math.sqrt(self.scale) / 32)) * 32

    def generator(self) -> np.random.Generator:
        """The same numbers on every device."""
        return np.random.default_rng(0)

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


@dataclass(frozen=True)
class Agreement:
    """How far two results may differ, in words and as a function."""

    tolerance: str
    error: Error


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    name: operator, direction, size. op: whose kernel serves it. inputs: builds the problem.
    ours, torchvision, composite: our way, theirs, and our composite's; `way` names whose way "theirs" is.
    least: given the inputs and our result, what a call must move and compute.
    agreement: how equal ours and theirs must be before either is timed; `composite_agreement`, where that is another.
    target: how many times faster than theirs ours should be on a CPU, accelerator_target: on any other device; None
        where nothing is asked.
    """

    name: str
    op: str
    inputs: Callable[[Setup], Any]
    ours: Prepare
    torchvision: Prepare
    composite: Prepare
    least: Callable[[Any, Any], Least]
    agreement: Agreement
    composite_agreement: Agreement | None = None
    way: str = "torchvision"
    target: float | None = None
    accelerator_target: float | None = None
    dtype: torch.dtype = torch.float32

    def peer(self, against: str) -> tuple[str, Prepare, Agreement]:
        """Name, way and agreement of the peer called `against`: "torchvision" or "composite"."""
        if against == "composite":
            return "composite", self.composite, self.composite_agreement or self.agreement
        return self.way, self.torchvision, self.agreement


# ---- agreement


def close(relative: float, absolute: float) -> Agreement:
    """Element by element: |ours - peer| <= absolute + relative |peer|. A value that is not a number differs."""

    def error(ours: Any, peer: Any) -> float:
        pairs = [(a.float(), b.float()) for a, b in zip(_tensors(ours), _tensors(peer), strict=True)]
        if any(a.shape != b.shape for a, b in pairs):
            return math.inf
        worst = [
            ((a - b).abs() / (absolute + relative * b.abs())).max().nan_to_num(math.inf) for a, b in pairs if a.numel()
        ]
        return max((value.item() for value in worst), default=0.0)

    return Agreement(f"|difference| <= {absolute:g} + {relative:g} |value|", error)


def near(share: float) -> Agreement:
    """Tensor by tensor: |ours - peer| <= share of the peer's largest magnitude. For sums whose terms cancel."""

    def error(ours: Any, peer: Any) -> float:
        pairs = [(a.float(), b.float()) for a, b in zip(_tensors(ours), _tensors(peer), strict=True)]
        if any(a.shape != b.shape for a, b in pairs):
            return math.inf
        worst = [(a - b).abs().max().nan_to_num(math.inf) / (share * b.abs().max()) for a, b in pairs if a.numel()]
        return max((value.item() for value in worst), default=0.0)

    return Agreement(f"|difference| <= {share:g} of the largest value", error)


def _differing(ours: Any, peer: Any) -> float:
    pairs = list(zip(_tensors(ours), _tensors(peer), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return math.inf
    return math.inf if any(not torch.equal(a, b.to(a.dtype)) for a, b in pairs) else 0.0


def _tensors(result: Any) -> Sequence[Tensor]:
    """On the CPU: a peer may work there whatever the device."""
    return [tensor.cpu() for tensor in ([result] if isinstance(result, Tensor) else result)]


def _differing_rles(ours: list[dict], peer: list[dict]) -> float:
    return 0.0 if ours == peer else math.inf


def _mean_mask_error(ours: list[dict], peer: list[dict]) -> float:
    overlaps = [coco_mask.iou([a], [b], [0])[0, 0] for a, b in zip(ours, peer, strict=True)]
    return (1 - float(np.mean(overlaps))) / 0.05


EQUAL = Agreement("equal", _differing)
SAME_RLES = Agreement("the same RLEs", _differing_rles)
# torchvision rounds boxes to whole pixels before it pastes.
SIMILAR_MASKS = Agreement("mean mask IoU >= .95", _mean_mask_error)
FLOAT32 = close(1e-4, 1e-4)
# A result in bfloat16 has 8 bits; ours and the peer's may round to different sides.
BFLOAT16 = close(2**-7, 1e-3)


# A box whose score falls to the least may end in one implementation and come out of the other.
SOFT_SCORES = close(1e-4, 2 * SOFT_LEAST)

# ---- inputs


def random_boxes(
    random: np.random.Generator, count: int, height: int, width: int, least: float, most: float
) -> np.ndarray:
    """[count, 4] float32 xyxy inside the image: sides log-uniform in least..most, aspect ratios in 1/2..2."""
    size = np.exp(random.uniform(math.log(least), math.log(most), count))
    aspect = np.exp(random.uniform(math.log(0.5), math.log(2), count) / 2)
    side = np.minimum(np.stack([size * aspect, size / aspect], axis=1), [width, height])
    corner = random.uniform(0, 1, (count, 2)) * ([width, height] - side)
    return np.concatenate([corner, corner + side], axis=1).astype(np.float32)


def distinct_scores(random: np.random.Generator, count: int) -> np.ndarray:
    """[count] float32 in 0..1, no two equal: implementations may order equal ones differently."""
    return ((random.permutation(count) + 1) / (count + 1)).astype(np.float32)


# ---- RoIAlign


@dataclass(frozen=True)
class Pooling:
    features: list[Tensor]
    rois: tuple[Tensor, Tensor, Tensor]  # boxes, image index, level index
    size: int


def pooling(setup: Setup, images: int, size: int, count: int, channels_last: bool) -> Pooling:
    """Images of 800 x 1344, four levels of 256 channels; each box on the level that FPN gives it."""
    random = setup.generator()
    height, width = setup.side(800), setup.side(1344)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shapes = [(images, 256, height // stride, width // stride) for stride in STRIDES]
    features = [setup.tensor(random.standard_normal(shape, dtype=np.float32)) for shape in shapes]
    features = [feature.to(setup.dtype).contiguous(memory_format=memory_format) for feature in features]
    boxes = setup.tensor(random_boxes(random, setup.count(count), height, width, 16, 600))
    image_index = torch.arange(len(boxes), device=setup.device) % images
    return Pooling(features, (boxes, image_index, roi_align.assign_levels(boxes, 2, 5)), size)


def pool(features: list[Tensor], p: Pooling) -> Tensor:
    return roi_align.roi_align(features, *p.rois, SCALES, p.size, 2, False)


def pool_torchvision(features: list[Tensor], p: Pooling) -> Tensor:
    """MultiScaleRoIAlign's way. Its kernels have no bfloat16 on a CPU: float32 in between, as under its autocast."""
    from torchvision.ops import roi_align as roi_align_of_level

    boxes, image_index, level_index = p.rois
    rois = torch.cat([image_index[:, None].to(boxes.dtype), boxes], dim=1)
    pooled = features[0].new_zeros((len(rois), features[0].shape[1], p.size, p.size))
    for level, (feature, scale) in enumerate(zip(features, SCALES)):
        rows = torch.where(level_index == level)[0]
        pooled[rows] = roi_align_of_level(feature.float(), rois[rows], p.size, scale, 2).to(pooled.dtype)
    return pooled


def contiguous(features: list[Tensor]) -> list[Tensor]:
    """torchvision's faster layout: its kernels copy channels-last features on every call."""
    return [feature.contiguous() for feature in features]


def fixed_gradient(output: Tensor) -> Tensor:
    """The same numbers for every output of a shape, in its own memory layout."""
    values = np.random.default_rng(1).standard_normal(output.shape, dtype=np.float32)
    return torch.empty_like(output).copy_(torch.from_numpy(values))


def gradient(forward: Callable[..., Tensor], leaves: list[Tensor], *arguments: Any) -> Run:
    """The backward pass alone, of `forward(leaves, *arguments)` with respect to the leaves."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = forward(leaves, *arguments)
    return partial(torch.autograd.grad, output, leaves, fixed_gradient(output), retain_graph=True)


def pooling_least(p: Pooling, pooled: Tensor) -> Least:
    """Of each value 4 samples of 4 neighbours, 2 FLOP each."""
    boxes, image_index, level_index = p.rois
    images, channels = p.features[0].shape[:2]
    shapes = [tuple(feature.shape[2:]) for feature in p.features for _ in range(images)]
    scales = [scale for scale in SCALES for _ in range(images)]
    read = channels * pixels_under(boxes, level_index * images + image_index, shapes, scales, p.size, 2)
    return Least(read * pooled.element_size() + size_of(p.rois, pooled), 32 * pooled.numel())


def pooling_gradient_least(p: Pooling, gradients: Sequence[Tensor]) -> Least:
    values = len(p.rois[0]) * p.features[0].shape[1] * p.size**2
    return Least(values * p.features[0].element_size() + size_of(p.rois, gradients), 32 * values)


def pool_backward_composite(p: Pooling) -> Run:
    grad = fixed_gradient(pool(p.features, p))
    heights, widths = [f.shape[2] for f in p.features], [f.shape[3] for f in p.features]
    geometry = (p.features[0].shape[0], heights, widths, True)
    return partial(roi_align.roi_align_backward_composite, grad, *p.rois, SCALES, 2, False, *geometry)


def roi_align_case(backward: bool, images: int, size: int, count: int, channels_last: bool, dtype: torch.dtype) -> Case:
    layout = "channels-last" if channels_last else "contiguous"
    fast = channels_last and dtype == torch.float32
    common = {
        "inputs": partial(pooling, images=images, size=size, count=count, channels_last=channels_last),
        "agreement": FLOAT32 if dtype == torch.float32 else BFLOAT16,
        "way": "torchvision, contiguous" + ("" if dtype == torch.float32 else ", through float32"),
        "accelerator_target": 1.5,
        "dtype": dtype,
    }
    if backward:
        return Case(
            name=f"RoIAlign backward {size}x{size}, {images} images, {count:,} boxes, {layout}",
            op="roi_align_backward",
            ours=lambda p: gradient(pool, p.features, p),
            torchvision=lambda p: gradient(pool_torchvision, contiguous(p.features), p),
            composite=pool_backward_composite,
            least=pooling_gradient_least,
            target=7.0 if fast else 3.0,
            **common,
        )
    return Case(
        name=f"RoIAlign forward {size}x{size}, {images} images, {count:,} boxes, {layout}",
        op="roi_align",
        ours=lambda p: partial(pool, p.features, p),
        torchvision=lambda p: partial(pool_torchvision, contiguous(p.features), p),
        composite=lambda p: partial(roi_align.roi_align_composite, p.features, *p.rois, SCALES, p.size, 2, False),
        least=pooling_least,
        target=(8.0 if size == 7 else 5.0) if fast else 3.0,
        **common,
    )


# ---- NMS


@dataclass(frozen=True)
class Suppression:
    boxes: Tensor
    scores: Tensor
    groups: Tensor
    iou_threshold: float

    def batched(self) -> tuple[Tensor, ...]:
        """boxes, scores, groups and valid of a batch of one image, as `ops.nms.nms` takes them."""
        valid = torch.ones_like(self.scores, dtype=torch.bool)
        return tuple(tensor.unsqueeze(0) for tensor in (self.boxes, self.scores, self.groups, valid))


def spread_boxes(setup: Setup, count: int) -> Suppression:
    """Boxes that hardly overlap, so that nearly every pair has to be compared."""
    random = setup.generator()
    count = setup.count(count)
    boxes = setup.tensor(random_boxes(random, count, 800, 1333, 12, 120))
    scores = setup.tensor(distinct_scores(random, count))
    return Suppression(boxes, scores, torch.zeros_like(scores, dtype=torch.int64), 0.7)


def class_boxes(setup: Setup, count: int = 1000, classes: int = 80, objects: int = 25) -> Suppression:
    """Detections before suppression: in every class the same proposals around some objects, each refined a little."""
    random = setup.generator()
    count = setup.count(count)
    around = random_boxes(random, objects, 800, 1333, 32, 400)[random.integers(objects, size=count)]
    sides = np.tile(around[:, 2:] - around[:, :2], 2)
    shifts = 0.1 * random.standard_normal((classes, count, 4), dtype=np.float32)
    boxes = setup.tensor((around + shifts * sides).reshape(-1, 4))
    scores = setup.tensor(distinct_scores(random, len(boxes)))
    groups = torch.arange(classes, device=setup.device).repeat_interleave(count)
    return Suppression(boxes, scores, groups, 0.5)


def suppression_least(p: Suppression, result: Any) -> Least:
    return Least(size_of(p.batched(), result))


def kept(suppress: Callable[..., tuple[Tensor, Tensor]], p: Suppression) -> Tensor:
    """Indices [K] that a batched NMS keeps, by falling score."""
    index, keep = suppress(*p.batched(), p.iou_threshold, len(p.boxes))
    return index[keep]


def nms_torchvision(p: Suppression) -> Run:
    from torchvision.ops import nms as torchvision_nms

    return partial(torchvision_nms, p.boxes, p.scores, p.iou_threshold)


def batched_nms_torchvision(p: Suppression) -> Run:
    from torchvision.ops import batched_nms

    return partial(batched_nms, p.boxes, p.scores, p.groups, p.iou_threshold)


def nms_case(name: str, inputs: Callable[[Setup], Suppression], torchvision: Prepare, target: float) -> Case:
    return Case(
        name=name,
        op="nms",
        inputs=inputs,
        ours=lambda p: partial(kept, nms.nms, p),
        torchvision=torchvision,
        composite=lambda p: partial(kept, nms.nms_composite, p),
        least=suppression_least,
        agreement=EQUAL,
        target=target,
        accelerator_target=2.0,
    )


def images_boxes(setup: Setup, images: int) -> Suppression:
    """6,000 spread boxes an image; the groups are the images."""
    flat = spread_boxes(setup, images * 6000)
    of_image = len(flat.boxes) // images
    rows = slice(images * of_image)
    image = torch.arange(images, device=setup.device).repeat_interleave(of_image)
    return Suppression(flat.boxes[rows], flat.scores[rows], image, flat.iou_threshold)


def kept_of_images(suppress: Callable[..., tuple[Tensor, Tensor]], p: Suppression, images: int) -> Run:
    """Both outputs of a batched NMS of images of equally many boxes."""
    rows = [tensor[0].unflatten(0, (images, -1)) for tensor in p.batched()]
    return partial(suppress, *rows, p.iou_threshold, rows[0].shape[1])


def _same_kept(ours: tuple[Tensor, Tensor], peer: Any) -> float:
    """torchvision's one list runs over all images by falling score."""
    if isinstance(peer, tuple):
        return _differing(ours, peer)
    index, keep = ours
    first = torch.arange(len(index), device=index.device)[:, None] * index.shape[1]
    return _differing((index + first)[keep].sort().values, peer.sort().values)


def images_nms_case(images: int) -> Case:
    return Case(
        name=f"NMS, {images} images x 6,000 spread boxes",
        op="nms",
        inputs=partial(images_boxes, images=images),
        ours=lambda p: kept_of_images(nms.nms, p, images),
        torchvision=batched_nms_torchvision,
        composite=lambda p: kept_of_images(nms.nms_composite, p, images),
        least=suppression_least,
        agreement=Agreement("the same boxes", _same_kept),
        accelerator_target=2.0,
    )


def one_class(setup: Setup) -> Suppression:
    """5,000 detections of one class around 100 objects."""
    return class_boxes(setup, count=5000, classes=1, objects=100)


def soften(function: Callable[..., tuple[Tensor, ...]], p: Suppression, gaussian: bool) -> Run:
    return partial(function, *p.batched(), gaussian, 0.3, 0.5, SOFT_LEAST, len(p.boxes))


def _differing_scores(ours: tuple[Tensor, ...], peer: tuple[Tensor, ...]) -> float:
    """Box by box: the order of boxes whose scores fall to nearly the same value is left open."""

    def of_boxes(result: tuple[Tensor, ...]) -> Tensor:
        index, keep, scores = result
        return torch.zeros_like(scores).scatter_add(1, index, torch.where(keep, scores, 0))

    return SOFT_SCORES.error(of_boxes(ours), of_boxes(peer))


def soft_nms_case(gaussian: bool) -> Case:
    return Case(
        name=f"soft-NMS, {'Gaussian' if gaussian else 'linear'}, 5,000 boxes",
        op="soft_nms",
        inputs=one_class,
        ours=lambda p: soften(ops.soft_nms.soft_nms, p, gaussian),
        torchvision=lambda p: soften(ops.soft_nms.soft_nms_composite, p, gaussian),
        composite=lambda p: soften(ops.soft_nms.soft_nms_composite, p, gaussian),
        least=suppression_least,
        agreement=Agreement(SOFT_SCORES.tolerance, _differing_scores),
        way=VECTORIZED,
        target=1.0,
    )


def distance(function: Callable[..., tuple[Tensor, Tensor]], p: Suppression, aspect: bool) -> Run:
    """Room for 1,000 of 5,000: the composite takes a step for each place, filled or not."""
    return partial(function, *p.batched(), p.iou_threshold, aspect, max(1, len(p.boxes) // 5))


def distance_nms_case(aspect: bool) -> Case:
    return Case(
        name=f"{'CIoU' if aspect else 'DIoU'}-NMS, 5,000 boxes",
        op="distance_nms",
        inputs=one_class,
        ours=lambda p: distance(ops.distance_nms.distance_nms, p, aspect),
        torchvision=lambda p: distance(ops.distance_nms.distance_nms_composite, p, aspect),
        composite=lambda p: distance(ops.distance_nms.distance_nms_composite, p, aspect),
        least=suppression_least,
        agreement=EQUAL,
        way=VECTORIZED,
        target=1.0,
    )


# ---- anchors


@dataclass(frozen=True)
class Matching:
    gt_boxes: Tensor
    anchors: Tensor


def matching_problem(setup: Setup) -> Matching:
    """20 ground truths and 250,000 anchors."""
    random = setup.generator()
    gt_boxes = setup.tensor(random_boxes(random, 20, 800, 1344, 24, 500))
    return Matching(gt_boxes, setup.tensor(random_boxes(random, setup.count(250_000), 800, 1344, 24, 700)))


def match(function: Callable[..., tuple[Tensor, Tensor]], p: Matching) -> tuple[Tensor, Tensor]:
    valid = torch.ones((1, len(p.gt_boxes)), dtype=torch.bool, device=p.gt_boxes.device)
    index, label = function(p.gt_boxes.unsqueeze(0), valid, p.anchors, 0.7, 0.3, True)
    return index[0], label[0]


def match_torchvision(p: Matching) -> Run:
    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import box_iou

    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    return lambda: matcher(box_iou(p.gt_boxes, p.anchors))


def _same_matches(ours: tuple[Tensor, Tensor], peer: Any) -> float:
    """torchvision's one tensor holds the ground truth of a positive, -1 for a negative, -2 for an ignored anchor."""
    index, label = ours
    return _differing(torch.where(label == 1, index, torch.where(label == 0, -1, -2)), peer)


@dataclass(frozen=True)
class Coding:
    boxes: Tensor
    anchors: Tensor
    deltas: Tensor


def coding_problem(setup: Setup) -> Coding:
    random = setup.generator()
    count = setup.count(250_000)
    anchors, boxes = (setup.tensor(random_boxes(random, count, 800, 1344, 24, 700)) for _ in range(2))
    return Coding(boxes, anchors, setup.tensor(0.5 * random.standard_normal((count, 4), dtype=np.float32)))


@dataclass(frozen=True)
class Proposing:
    deltas: Tensor
    anchors: Tensor
    index: Tensor
    sizes: Tensor


def proposing(setup: Setup) -> Proposing:
    """What an RPN's top-k leaves of all levels' anchors: 4,819 of 268,569, of 2 images."""
    random = setup.generator()
    count = setup.count(268_569)
    anchors = setup.tensor(random_boxes(random, count, 800, 1344, 24, 700))
    deltas = setup.tensor(0.5 * random.standard_normal((2, count, 4), dtype=np.float32))
    index = setup.tensor(random.integers(count, size=(2, setup.count(4_819))))
    return Proposing(deltas, anchors, index, setup.tensor(np.array([[800, 1333], [750, 1344]], dtype=np.float32)))


def propose(function: Callable[..., tuple[Tensor, Tensor]], p: Proposing) -> Run:
    return partial(function, p.deltas, p.anchors, p.index, p.sizes, math.log(1000 / 16), 0.0)


def proposing_least(p: Proposing, result: tuple[Tensor, Tensor]) -> Least:
    """Of the deltas and anchors, those that are chosen: 4 float32 each."""
    chosen = p.index.numel()
    return Least(2 * 16 * chosen + size_of(p.index, p.sizes, result), FLOP_OF_PROPOSAL * chosen)


def coder_torchvision(method: str) -> Prepare:
    def prepare(p: Coding) -> Run:
        from torchvision.models.detection._utils import BoxCoder

        coder = BoxCoder(CODER_WEIGHTS)
        return partial(getattr(coder, method), p.boxes if method == "encode_single" else p.deltas, p.anchors)

    return prepare


# ---- masks


@dataclass(frozen=True)
class Pasting:
    masks: Tensor
    boxes: Tensor
    height: int
    width: int


def pasting(setup: Setup) -> Pasting:
    """100 detections' masks, each a blob that fills most of its box, on an 800 x 1333 image."""
    random = setup.generator()
    count, height, width = setup.count(100), setup.side(800), setup.side(1333)
    y, x = np.mgrid[0:28, 0:28] / 13.5 - 1
    radius = random.uniform(0.7, 1.1, (count, 1, 1))
    waves = random.uniform(-0.3, 0.3, (count, 1, 1)) * np.sin(5 * x + random.uniform(0, 6, (count, 1, 1)))
    logits = 8 * (radius - np.sqrt(x**2 + y**2) + waves)
    probabilities = (1 / (1 + np.exp(-logits))).astype(np.float32)
    boxes = random_boxes(random, count, height, width, 32, 400)
    return Pasting(setup.tensor(probabilities), setup.tensor(boxes), height, width)


def pasting_least(p: Pasting, rles: list[dict]) -> Least:
    low, high = p.boxes.floor()[:, :2], p.boxes.ceil()[:, 2:]
    pixels = int((high - low).prod(1).sum())
    return Least(size_of(p.masks, p.boxes, rles), FLOP_OF_PIXEL * pixels)


def paste_torchvision(p: Pasting) -> list[dict]:
    """RoIHeads' paste, then the threshold and the encoding of its references' CocoEvaluator."""
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    pasted = paste_masks_in_image(p.masks.unsqueeze(1), p.boxes, (p.height, p.width))
    rles = []
    for bitmap in (pasted[:, 0] >= 0.5).cpu():
        rle = coco_mask.encode(np.asarray(bitmap.numpy(), dtype=np.uint8, order="F"))
        rles.append({"size": rle["size"], "counts": rle["counts"].decode("ascii")})
    return rles


def paste_composite(p: Pasting) -> list[dict]:
    counts, offsets = masks.paste_masks_rle_composite(p.masks, p.boxes, p.height, p.width, 0.5)
    strings = rle.compress_rle(counts.cpu(), offsets.cpu())
    return [{"size": [p.height, p.width], "counts": string} for string in strings]


@dataclass(frozen=True)
class Drawing:
    polygons: list[list[np.ndarray]]  # of each instance, [P, 2] float32 each
    packed: tuple[Tensor, Tensor, Tensor]  # the same: points, polygon offsets, instance offsets
    instance: Tensor
    boxes: Tensor


def drawing(setup: Setup, instances: int = 20) -> Drawing:
    """128 positives around 20 instances of one or two polygons of 12 to 60 points, as COCO's have."""
    random = setup.generator()
    count = setup.count(128)
    extents = random_boxes(random, instances, 800, 1344, 48, 500)
    polygons = [[star(random, extent) for _ in range(random.integers(1, 3))] for extent in extents]
    flat = [polygon for of_instance in polygons for polygon in of_instance]
    offsets = np.cumsum([0, *(len(polygon) for polygon in flat)])
    instance_offsets = np.cumsum([0, *(len(of_instance) for of_instance in polygons)])
    packed = tuple(setup.tensor(array) for array in (np.concatenate(flat), offsets, instance_offsets))
    instance, boxes = positives(setup, random, extents, count)
    return Drawing(polygons, packed, instance, boxes)


def star(random: np.random.Generator, extent: np.ndarray) -> np.ndarray:
    """[P, 2] float32: a jagged outline around the middle of an extent."""
    points = int(random.integers(12, 60))
    angle = np.sort(random.uniform(0, 2 * np.pi, points))
    radius = random.uniform(0.6, 1.0, points) / 2
    unit = np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None] + 0.5
    return (extent[:2] + unit * (extent[2:] - extent[:2])).astype(np.float32)


def positives(setup: Setup, random: np.random.Generator, extents: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
    """Which instance each of `count` boxes is of, and the boxes: the instances' own, moved a little."""
    instance = random.integers(len(extents), size=count)
    sides = np.tile(extents[:, 2:] - extents[:, :2], 2)
    shifts = random.uniform(-0.12, 0.12, (count, 4)).astype(np.float32)
    return setup.tensor(instance), setup.tensor(extents[instance] + shifts * sides[instance])


def draw_pycocotools(p: Drawing) -> Run:
    """detectron2's way: one box after the other, its polygons moved and scaled to it, rasterized and united."""
    boxes, instance = p.boxes.cpu().double().numpy(), p.instance.tolist()
    return lambda: torch.stack([_draw(p.polygons[i], box, 28) for i, box in zip(instance, boxes)])


def _draw(polygons: list[np.ndarray], box: np.ndarray, size: int) -> Tensor:
    scale = size / np.maximum(box[2:] - box[:2], 0.1)
    local = [((polygon - box[:2]) * scale).reshape(-1) for polygon in polygons]
    rle = coco_mask.merge(coco_mask.frPyObjects(local, size, size))
    return torch.from_numpy(coco_mask.decode(rle).astype(bool))


@dataclass(frozen=True)
class Cropping:
    bitmaps: Tensor
    instance: Tensor
    boxes: Tensor


def cropping(setup: Setup, instances: int = 20) -> Cropping:
    """128 positives around 20 instances given as bitmaps of 800 x 1344."""
    random = setup.generator()
    height, width = setup.side(800), setup.side(1344)
    extents = random_boxes(random, instances, height, width, 48, 500)
    y, x = np.mgrid[0:height, 0:width] + 0.5
    middle, half = (extents[:, :2] + extents[:, 2:]) / 2, (extents[:, 2:] - extents[:, :2]) / 2
    bitmaps = [((x - mx) / hx) ** 2 + ((y - my) / hy) ** 2 <= 1 for (mx, my), (hx, hy) in zip(middle, half)]
    bitmaps = setup.tensor(np.stack(bitmaps).astype(np.uint8))
    return Cropping(bitmaps, *positives(setup, random, extents, setup.count(128)))


def cropping_least(p: Cropping, targets: Tensor) -> Least:
    """As many samples of a bin as it has pixels, rounded up to whole ones a side; of each, 4 neighbours."""
    shape = tuple(p.bitmaps.shape[1:])
    read = pixels_under(p.boxes, p.instance, [shape] * len(p.bitmaps), [1.0] * len(p.bitmaps), 28, 0)
    sides = (p.boxes[:, 2:] - p.boxes[:, :2]).clamp(min=1)
    samples = 28 * 28 * int((sides / 28).ceil().prod(1).sum())
    return Least(read * p.bitmaps.element_size() + size_of(p.instance, p.boxes, targets), 8 * samples)


def crop_torchvision(p: Cropping) -> Run:
    from torchvision.models.detection.roi_heads import project_masks_on_boxes

    return partial(project_masks_on_boxes, p.bitmaps, p.boxes, p.instance, 28)


def crop_composite(p: Cropping) -> Tensor:
    level = torch.zeros_like(p.instance)
    features = [p.bitmaps.unsqueeze(1)]
    return roi_align.roi_align_composite(features, p.boxes, p.instance, level, [1.0], 28, 0, False).squeeze(1)


# ---- deformable convolution


@dataclass(frozen=True)
class Deforming:
    leaves: list[Tensor]  # input, offset, weight and, when modulated, mask


def deforming(setup: Setup, modulated: bool) -> Deforming:
    """A 3x3 convolution of 256 to 256 channels over stride 16 of an 800 x 1344 pair, channels-last."""
    random = setup.generator()
    height, width = setup.side(800) // 16, setup.side(1344) // 16
    shapes = [(2, 256, height, width), (2, 18, height, width), (256, 256, 3, 3), (2, 9, height, width)]
    leaves = [setup.tensor(random.standard_normal(shape, dtype=np.float32)) for shape in shapes]
    leaves[0] = leaves[0].contiguous(memory_format=torch.channels_last)
    leaves[2] /= 48  # the root of 256 x 3 x 3 summands: outputs of size 1
    leaves[3] = leaves[3].sigmoid()
    return Deforming(leaves if modulated else leaves[:3])


def deform(leaves: list[Tensor]) -> Tensor:
    x, offset, weight, *mask = leaves
    return ops.deform_conv.deform_conv2d(x, offset, mask[0] if mask else None, weight, padding=(1, 1))


def deform_torchvision(leaves: list[Tensor]) -> Tensor:
    from torchvision.ops import deform_conv2d

    x, offset, weight, *mask = leaves
    return deform_conv2d(x, offset, weight, padding=1, mask=mask[0] if mask else None)


def deform_composite(p: Deforming) -> Run:
    x, offset, weight, *mask = p.leaves
    geometry = ((1, 1), (1, 1), (1, 1), 1, 1)
    return partial(ops.deform_conv.deform_conv2d_composite, x, offset, mask[0] if mask else None, weight, *geometry)


def deform_backward_composite(p: Deforming) -> Run:
    x, offset, weight, *mask = p.leaves
    grad = fixed_gradient(deform(p.leaves))
    geometry = ((1, 1), (1, 1), (1, 1), 1, 1)

    def run() -> list[Tensor]:
        grad_x, grad_offset, grad_mask, grad_weight = ops.deform_conv.deform_conv2d_backward_composite(
            grad, x, offset, mask[0] if mask else None, weight, *geometry
        )
        return [grad_x, grad_offset, grad_weight, grad_mask][: len(p.leaves)]

    return run


def deforming_least(p: Deforming, output: Tensor) -> Least:
    return Least(size_of(p.leaves, output), convolution_flop(output, p.leaves[2]))


def deforming_gradient_least(p: Deforming, gradients: Sequence[Tensor]) -> Least:
    """The output's gradient is as large as the input's."""
    like_output = gradients[0]
    return Least(size_of(p.leaves, like_output, gradients), 2 * convolution_flop(like_output, p.leaves[2]))


def deform_case(modulated: bool, backward: bool) -> Case:
    name = f"deformable convolution v{2 if modulated else 1}"
    common = {
        "inputs": partial(deforming, modulated=modulated),
        "agreement": close(1e-3, 1e-2),
        "way": "torchvision, contiguous",
        "target": 1.5,
    }
    if backward:
        return Case(
            name=f"{name} backward, 2x256x50x84, 3x3",
            op="deform_conv2d_backward",
            ours=lambda p: gradient(deform, p.leaves),
            torchvision=lambda p: gradient(deform_torchvision, contiguous(p.leaves)),
            composite=deform_backward_composite,
            least=deforming_gradient_least,
            **common,
        )
    return Case(
        name=f"{name} forward, 2x256x50x84, 3x3",
        op="deform_conv2d",
        ours=lambda p: partial(deform, p.leaves),
        torchvision=lambda p: partial(deform_torchvision, contiguous(p.leaves)),
        composite=deform_composite,
        least=deforming_least,
        **common,
    )


# ---- focal loss


@dataclass(frozen=True)
class Classifying:
    logits: Tensor
    labels: Tensor


def classifying(setup: Setup) -> Classifying:
    """200,000 anchors, 80 classes, one anchor in a hundred an object."""
    random = setup.generator()
    count = setup.count(200_000)
    labels = np.where(random.uniform(size=count) < 0.01, random.integers(1, 81, size=count), 0)
    logits = 1.5 * random.standard_normal((count, 80), dtype=np.float32) - 4
    return Classifying(setup.tensor(logits), setup.tensor(labels))


def focal(leaves: list[Tensor], p: Classifying) -> Tensor:
    return ops.focal_loss.sigmoid_focal_loss(leaves[0], p.labels, 2.0, 0.25)


def focal_torchvision(leaves: list[Tensor], one_hot: Tensor) -> Tensor:
    from torchvision.ops import sigmoid_focal_loss

    return sigmoid_focal_loss(leaves[0], one_hot, alpha=0.25, gamma=2.0).sum(dim=1)


def one_hot(p: Classifying) -> Tensor:
    """[N, 80] float32, what torchvision's function takes; its making is not timed."""
    return torch.nn.functional.one_hot(p.labels, 81)[:, 1:].to(p.logits.dtype)


def focal_backward_composite(p: Classifying) -> Run:
    grad = fixed_gradient(p.logits[:, 0].contiguous())
    function = ops.focal_loss.sigmoid_focal_loss_backward_composite
    return lambda: [function(grad, p.logits, p.labels, 2.0, 0.25)]


def focal_cases() -> list[Case]:
    return [
        Case(
            name="sigmoid focal loss forward, 200k x 80",
            op="sigmoid_focal_loss",
            inputs=classifying,
            ours=lambda p: partial(focal, [p.logits], p),
            torchvision=lambda p: partial(focal_torchvision, [p.logits], one_hot(p)),
            composite=lambda p: partial(ops.focal_loss.sigmoid_focal_loss_composite, p.logits, p.labels, 2.0, 0.25),
            least=lambda p, loss: Least(size_of(p.logits, p.labels, loss), FLOP_OF_FOCAL * p.logits.numel()),
            agreement=close(1e-4, 1e-5),
            target=1.5,
        ),
        Case(
            name="sigmoid focal loss backward, 200k x 80",
            op="sigmoid_focal_loss_backward",
            inputs=classifying,
            ours=lambda p: gradient(focal, [p.logits], p),
            torchvision=lambda p: gradient(focal_torchvision, [p.logits], one_hot(p)),
            composite=focal_backward_composite,
            least=lambda p, gradients: Least(
                size_of(p.logits[:, 0], p.logits, p.labels, gradients), FLOP_OF_FOCAL_GRADIENT * p.logits.numel()
            ),
            agreement=close(1e-4, 1e-6),
            target=1.5,
        ),
    ]


# ---- convolution


@dataclass(frozen=True)
class Convolving:
    input: Tensor
    weight: Tensor
    bias: Tensor


def convolving(setup: Setup) -> Convolving:
    """P3 of an 800 x 1344 pair, 256 channels to 256, channels-last; weight and bias float32."""
    random = setup.generator()
    height, width = (max(8, round(side * math.sqrt(setup.scale))) for side in (100, 168))
    shape = (2, 256, height, width)
    draw = lambda *shape: torch.from_numpy(random.standard_normal(shape, dtype=np.float32))  # noqa: E731
    x = draw(*shape).to(setup.device, setup.dtype).contiguous(memory_format=torch.channels_last)
    weight = (draw(256, 256, 3, 3) / 48).to(setup.device).contiguous(memory_format=torch.channels_last)
    return Convolving(x, weight, draw(256).to(setup.device))


def convolve(leaves: list[Tensor], p: Convolving) -> Tensor:
    return ops.convolution.conv3x3(*leaves)


def convolve_by_torch(leaves: list[Tensor], p: Convolving) -> Tensor:
    """With casts of the weight and the bias, as autocast makes them."""
    x, weight, bias = leaves
    return torch.nn.functional.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=1)


def convolving_least(p: Convolving, output: Tensor) -> Least:
    return Least(size_of(p.input, p.weight, p.bias, output), convolution_flop(output, p.weight))


def convolving_gradient_least(p: Convolving, gradients: Sequence[Tensor]) -> Least:
    """The output's gradient is as large as the input."""
    return Least(size_of(p.input, p.input, p.weight, gradients), 2 * convolution_flop(p.input, p.weight))


def convolution_case(backward: bool, dtype: torch.dtype) -> Case:
    leaves = lambda p: [p.input, p.weight, p.bias]  # noqa: E731
    timed = gradient if backward else (lambda way, tensors, p: partial(way, tensors, p))
    ours, peer = (lambda p, way=way: timed(way, leaves(p), p) for way in (convolve, convolve_by_torch))
    return Case(
        name=f"3x3 convolution {'backward' if backward else 'forward'}, P3, 256 channels",
        op="conv3x3_weight_gradient" if backward else "conv3x3",
        inputs=convolving,
        ours=ours,
        torchvision=peer,
        composite=peer,
        least=convolving_gradient_least if backward else convolving_least,
        agreement=near(1e-5 if dtype == torch.float32 else 2e-2),
        way="torch",
        dtype=dtype,
    )


@dataclass(frozen=True)
class BlockEnd(Convolving):
    addend: Tensor


def block_end(setup: Setup) -> BlockEnd:
    """What ends a block of res2: C2 of an 800 x 1344 pair, 64 channels to 256, channels-last."""
    random = setup.generator()
    height, width = (max(8, round(side * math.sqrt(setup.scale))) for side in (200, 336))

    def draw(*shape: int) -> Tensor:
        values = torch.from_numpy(random.standard_normal(shape, dtype=np.float32)).to(setup.device)
        return values.to(setup.dtype).contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    shapes = ((2, 64, height, width), (256, 64, 1, 1), (256,), (2, 256, height, width))
    return BlockEnd(*(draw(*shape) for shape in shapes))


def end_block(p: BlockEnd) -> Tensor:
    return ops.convolution.conv2d(p.input, p.weight, p.bias, relu=True, addend=p.addend)


def end_block_by_torch(p: BlockEnd) -> Tensor:
    convolved = torch.nn.functional.conv2d(p.input, p.weight, p.bias.to(p.input.dtype))
    return torch.relu_(convolved + p.addend)


def block_end_case(dtype: torch.dtype) -> Case:
    return Case(
        name="1x1 convolution, shortcut and ReLU, C2, 64 to 256 channels",
        op="epilogue_",
        inputs=block_end,
        ours=lambda p: partial(end_block, p),
        torchvision=lambda p: partial(end_block_by_torch, p),
        composite=lambda p: partial(end_block_by_torch, p),
        least=lambda p, output: Least(
            size_of(p.input, p.weight, p.bias, p.addend, output), convolution_flop(output, p.weight)
        ),
        agreement=near(1e-5 if dtype == torch.float32 else 2e-2),
        way="torch",
        dtype=dtype,
    )


# ---- all


def ops_cases(images: int = 2) -> list[Case]:
    """Every case, in the order of the report; RoIAlign and one NMS of so many images."""
    pooled = [
        roi_align_case(backward, images, size, images * count, channels_last, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for channels_last in (True, False)
        for size, count in ((7, 512), (14, 128))
        for backward in (False, True)
    ]
    deformed = [deform_case(modulated, backward) for modulated in (False, True) for backward in (False, True)]
    cases = [*pooled, *suppression_cases(images), *anchor_cases(), *mask_cases(), *deformed, *focal_cases()]
    convolved = [
        convolution_case(backward, dtype) for dtype in (torch.float32, torch.bfloat16) for backward in (False, True)
    ]
    return [*cases, *convolved, *(block_end_case(dtype) for dtype in (torch.float32, torch.bfloat16))]


def suppression_cases(images: int) -> list[Case]:
    return [
        nms_case("NMS, 6,000 spread boxes", partial(spread_boxes, count=6_000), nms_torchvision, 15.0),
        nms_case("NMS, 20,000 spread boxes", partial(spread_boxes, count=20_000), nms_torchvision, 15.0),
        nms_case("batched NMS, 80 classes x 1,000 boxes", class_boxes, batched_nms_torchvision, 6.0),
        images_nms_case(images),
        *(soft_nms_case(gaussian) for gaussian in (False, True)),
        *(distance_nms_case(aspect) for aspect in (False, True)),
    ]


def anchor_cases() -> list[Case]:
    clip = math.log(1000 / 16)
    return [
        Case(
            name="IoU 20 x 250k + match, low quality allowed",
            op="match",
            inputs=matching_problem,
            ours=lambda p: partial(match, matching.match, p),
            torchvision=match_torchvision,
            composite=lambda p: partial(match, matching.match_composite, p),
            least=lambda p, found: Least(
                size_of(p.gt_boxes, p.anchors, found), FLOP_OF_MATCH * len(p.gt_boxes) * len(p.anchors)
            ),
            agreement=Agreement("the same matches", _same_matches),
            composite_agreement=EQUAL,
            target=8.0,
        ),
        Case(
            name="encode 250k boxes",
            op="box_encode",
            inputs=coding_problem,
            ours=lambda p: partial(box_coder.encode, p.boxes, p.anchors, CODER_WEIGHTS),
            torchvision=coder_torchvision("encode_single"),
            composite=lambda p: partial(box_coder.encode_composite, p.boxes, p.anchors, CODER_WEIGHTS),
            least=lambda p, deltas: Least(size_of(p.boxes, p.anchors, deltas), FLOP_OF_ENCODE * len(deltas)),
            agreement=FLOAT32,
        ),
        Case(
            name="decode 250k boxes",
            op="box_decode",
            inputs=coding_problem,
            ours=lambda p: partial(box_coder.decode, p.deltas, p.anchors, CODER_WEIGHTS),
            torchvision=coder_torchvision("decode_single"),
            composite=lambda p: partial(box_coder.decode_composite, p.deltas, p.anchors, CODER_WEIGHTS, clip),
            least=lambda p, boxes: Least(size_of(p.deltas, p.anchors, boxes), FLOP_OF_DECODE * len(boxes)),
            agreement=close(1e-4, 1e-2),  # pixels
        ),
        Case(
            name="proposals, 2 images x 4,819 of 268,569 anchors",
            op="proposals",
            inputs=proposing,
            ours=lambda p: propose(ops.proposals.decode_and_clip, p),
            torchvision=lambda p: propose(ops.proposals.proposals_composite, p),
            composite=lambda p: propose(ops.proposals.proposals_composite, p),
            least=proposing_least,
            agreement=close(1e-4, 1e-2),  # pixels
            way=VECTORIZED,
            target=1.0,
        ),
    ]


def mask_cases() -> list[Case]:
    return [
        Case(
            name="paste 100 masks 28x28 into 800x1333, to RLE",
            op="paste_masks_rle",
            inputs=pasting,
            ours=lambda p: partial(masks.paste_masks_rle, p.masks, p.boxes, p.height, p.width),
            torchvision=lambda p: partial(paste_torchvision, p),
            composite=lambda p: partial(paste_composite, p),
            least=pasting_least,
            agreement=SIMILAR_MASKS,
            composite_agreement=SAME_RLES,
            target=8.0,
        ),
        Case(
            name="polygon mask targets, 128 at 28x28",
            op="polygon_targets",
            inputs=drawing,
            ours=lambda p: partial(masks.polygon_targets, *p.packed, p.instance, p.boxes, 28),
            torchvision=draw_pycocotools,
            composite=lambda p: partial(masks.polygon_targets_composite, *p.packed, p.instance, p.boxes, 28),
            least=lambda p, targets: Least(size_of(p.packed, p.instance, p.boxes, targets)),
            agreement=EQUAL,
            way="detectron2's way, pycocotools",
            target=2.0,
        ),
        Case(
            name="bitmap mask targets, 128 at 28x28 from 20 of 800x1344",
            op="roi_align",
            inputs=cropping,
            ours=lambda p: partial(masks.bitmap_targets, p.bitmaps, p.instance, p.boxes, 28, True),
            torchvision=crop_torchvision,
            composite=lambda p: partial(crop_composite, p),
            least=cropping_least,
            agreement=FLOAT32,
        ),
    ]
