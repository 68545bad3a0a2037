"""Single operations against upstream maskrcnn-benchmark's numbers, and what its numbers do not cover by hand.

Its boxes name the first and the last pixel; here they end where the last pixel ends, so that `from_inclusive` and
`to_inclusive` stand wherever its boxes meet ours.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_fixtures import POLYGONS, bitmaps_of, pack
from torch import Tensor

from maskrcnn_benchmark.data.geometry import mirror, resize
from maskrcnn_benchmark.data.sample import Sample
from maskrcnn_benchmark.models.anchors import AnchorGenerator
from maskrcnn_benchmark.models.layers import FrozenBatchNorm2d
from maskrcnn_benchmark.models.rpn import inside
from maskrcnn_benchmark.ops import box_coder, masks, matching, nms, roi_align
from maskrcnn_benchmark.ops import boxes as box_ops
from maskrcnn_benchmark.ops.boxes import from_inclusive, to_inclusive
from maskrcnn_benchmark.ops.focal_loss import sigmoid_focal_loss
from maskrcnn_benchmark.ops.rle import decode_rle

CONVENTION = ROOT / "configs" / "conventions" / "maskrcnn_benchmark.yaml"


class Numbers:
    """Upstream's arrays as tensors, `numbers("group/name")`."""

    def __init__(self, file) -> None:
        self.arrays = np.load(file)

    def __call__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])


@pytest.fixture(scope="module")
def numbers(shared) -> Numbers:
    return Numbers(shared / "fixtures" / "maskrcnn_benchmark_ops.npz")


@pytest.mark.parametrize(("name", "weights"), [("w1111", (1.0,) * 4), ("w10_10_5_5", (10.0, 10.0, 5.0, 5.0))])
def test_coder(numbers, name, weights):
    truth, anchors = (from_inclusive(numbers(f"coder/{k}")) for k in ("reference", "proposals"))
    torch.testing.assert_close(box_coder.encode(truth, anchors, weights), numbers(f"coder/encode_{name}"))
    decoded = box_coder.decode(numbers("coder/codes").unflatten(1, (2, 4)), anchors[:, None], weights)
    expected = numbers(f"coder/decode_{name}").unflatten(1, (2, 4))
    torch.testing.assert_close(to_inclusive(decoded), expected, atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_nms(numbers, threshold):
    kept = nms.nms_indices(from_inclusive(numbers("nms/boxes")), numbers("nms/scores"), threshold)
    assert kept.sort().values.tolist() == numbers(f"nms/keep_{threshold}").tolist()


def test_nms_keeps_what_overlaps_by_exactly_the_threshold(numbers):
    """As upstream's CUDA kernel and all peers; its CPU kernel, whose numbers these are, drops such a box."""
    boxes, scores = from_inclusive(numbers("nms/edge_boxes")), numbers("nms/edge_scores")
    assert box_ops.iou(boxes[:1], boxes[1:2]).item() == 0.5
    assert nms.nms_indices(boxes, scores, 0.5).tolist() == [0, 1, 2, 4, 5]
    assert nms.nms_indices(boxes, scores, 0.4999).tolist() == numbers("nms/edge_keep_0.5").tolist()


def test_iou_and_area(numbers):
    first, second = (from_inclusive(numbers(f"iou/boxes{i}")) for i in (1, 2))
    torch.testing.assert_close(box_ops.area(first), numbers("iou/area1"))
    torch.testing.assert_close(box_ops.iou(first, second), numbers("iou/iou"), atol=1e-6, rtol=1e-5)


def test_clip_and_xywh(numbers):
    boxes = from_inclusive(numbers("boxlist/clip_in"))
    clipped = box_ops.clip(boxes[None], torch.tensor([[256, 320]]), least_side=1.0)[0]
    assert to_inclusive(clipped).tolist() == numbers("boxlist/clip_320x256").tolist()
    assert box_ops.to_xywh(boxes).tolist() == numbers("boxlist/xywh").tolist()


def test_boxes_move_with_resized_and_mirrored_images(numbers):
    boxes = from_inclusive(numbers("boxlist/clip_in")).numpy()
    sample = Sample(np.zeros((256, 320, 3), np.uint8), 1, 0, (256, 320), boxes, np.ones(len(boxes), np.int64))
    resized = resize(sample, 300, 500, plus_one=True).boxes
    expected = from_inclusive(numbers("boxlist/resize_to_500x300"))
    np.testing.assert_allclose(resized, expected, rtol=1e-6)
    factors = torch.tensor([500 / 320, 300 / 256]).repeat(2)
    torch.testing.assert_close(box_ops.rescale(torch.from_numpy(boxes), factors, plus_one=True), expected)
    mirrored = mirror(sample, horizontally=True, plus_one=True).boxes
    np.testing.assert_allclose(mirrored, from_inclusive(numbers("boxlist/hflip_320x256")), rtol=1e-6)


@pytest.mark.parametrize(("name", "size", "ratio"), [("7x7_s0.125_r2", 7, 2), ("14x14_s0.125_r0", 14, 0)])
@pytest.mark.parametrize("function", [roi_align.roi_align, roi_align.roi_align_composite])
def test_roi_align(numbers, name, size, ratio, function):
    image, boxes = numbers("roialign/rois").split((1, 4), 1)
    image = image[:, 0].long()
    features = [numbers("roialign/features")]
    pooled = function(features, boxes, image, torch.zeros_like(image), [0.125], size, ratio, False)
    torch.testing.assert_close(pooled, numbers(f"roialign/{name}"), atol=1e-5, rtol=1e-5)


def test_levels(numbers):
    levels = roi_align.assign_levels(from_inclusive(numbers("levels/boxes")), 2, 5, epsilon=1e-6)
    assert levels.tolist() == numbers("levels/level_minus_2").tolist()


RATIOS = (0.5, 1.0, 2.0)
OCTAVES = tuple(2 ** (k / 3) for k in range(3))
ANCHORS = {
    "fpn": ([(size,) for size in (32, 64, 128, 256, 512)], (4, 8, 16, 32, 64), 0),
    "c4": ([(32, 64, 128, 256, 512)], (16,), 0),
    "retinanet": ([tuple(4 * s * o for o in OCTAVES) for s in (8, 16, 32, 64, 128)], (8, 16, 32, 64, 128), -1),
}


@pytest.mark.parametrize("name", ANCHORS)
def test_anchors(numbers, name):
    sizes, strides, straddle = ANCHORS[name]
    generator = AnchorGenerator(tuple(sizes), RATIOS, strides, "stride", offset=0.5)
    for level, cell in enumerate(generator.buffers()):
        torch.testing.assert_close(to_inclusive(cell), numbers(f"anchors/{name}_cell_{level}"), atol=1e-5, rtol=0)
    for height, width in ((96, 128), (250, 333)):
        shapes = [(-(-height // stride), -(-width // stride)) for stride in strides]
        anchors = to_inclusive(torch.cat(generator(shapes, (height, width), torch.device("cpu"))))
        (key,) = (k for k in numbers.arrays if k.startswith(f"anchors/{name}_{height}x{width}_every"))
        every = int(key.rsplit("every", 1)[1])
        torch.testing.assert_close(anchors[::every], numbers(key), atol=1e-4, rtol=0)
        if straddle >= 0:
            found = inside(anchors, torch.tensor([[height, width]]), straddle)[0]
            assert found.tolist() == numbers(f"anchors/{name}_{height}x{width}_inside").tolist()


@pytest.mark.parametrize(
    ("name", "high", "low", "low_quality"),
    [("0.7_0.3_low_quality", 0.7, 0.3, True), ("0.5_0.5", 0.5, 0.5, False), ("0.5_0.4_low_quality", 0.5, 0.4, True)],
)
def test_matcher(numbers, name, high, low, low_quality):
    overlaps = numbers("matcher/iou")
    gt, anchors = torch.zeros(1, len(overlaps), 4), torch.zeros(overlaps.shape[1], 4)
    valid = torch.ones(1, len(overlaps), dtype=torch.bool)
    index, label = matching.match_composite(gt, valid, anchors, high, low, low_quality, iou=lambda *_: overlaps[None])
    theirs = numbers(f"matcher/{name}")
    assert label[0].tolist() == torch.where(theirs >= 0, 1, torch.where(theirs == -1, 0, -1)).tolist()
    assert index[0][theirs >= 0].tolist() == theirs[theirs >= 0].tolist()


@pytest.mark.parametrize(("name", "beta"), [("1", 1.0), ("1_9", 1 / 9), ("0.11", 0.11)])
def test_smooth_l1(numbers, name, beta):
    values = (numbers("smooth_l1/input"), numbers("smooth_l1/target"))
    loss = torch.nn.functional.smooth_l1_loss(*values, beta=beta, reduction="sum")
    torch.testing.assert_close(loss, numbers(f"smooth_l1/sum_beta_{name}"))


def test_focal_loss(numbers):
    loss = sigmoid_focal_loss(numbers("focal/logits"), numbers("focal/labels"), gamma=2.0, alpha=0.25).sum()
    torch.testing.assert_close(loss, numbers("focal/sum_gamma2_alpha0.25"))


def test_frozen_batch_norm(numbers):
    layer = FrozenBatchNorm2d(4, eps=0.0)
    names = ("weight", "bias", "running_mean", "running_var")
    layer.load_state_dict(dict(zip(names, numbers("frozen_bn/weight_bias_mean_var"))))
    torch.testing.assert_close(layer(numbers("frozen_bn/x")), numbers("frozen_bn/y"))


@pytest.mark.parametrize("size", [14, 28])
def test_mask_targets_from_polygons(numbers, size):
    boxes, instance = numbers("mask_targets/boxes"), numbers("mask_targets/polygon_of_box")
    packed = pack(POLYGONS)
    crop = masks.inclusive_crop(from_inclusive(boxes))
    packed = (packed.points, packed.polygon_offsets, packed.instance_offsets)
    drawn = masks.polygon_targets(*packed, instance, crop, size)
    assert torch.equal(drawn.to(torch.uint8), numbers(f"mask_targets/{size}"))


def test_mask_targets_from_bitmaps(numbers):
    boxes, instance = numbers("mask_targets/boxes"), numbers("mask_targets/polygon_of_box")
    bitmaps = bitmaps_of(POLYGONS, 256, 320)
    drawn = masks.bitmap_targets_whole_pixels(bitmaps, instance, from_inclusive(boxes), 28, soft=False)
    assert torch.equal(drawn.to(torch.uint8), numbers("mask_targets/28_from_bitmaps"))


def test_paste(numbers):
    probabilities, boxes = numbers("paste/probs"), numbers("paste/boxes")
    placed = masks.whole_pixel_boxes(boxes, 28)
    rles = masks.paste_masks_rle(probabilities, placed, 256, 320, float(np.nextafter(np.float32(0.5), np.float32(1))))
    pasted = np.stack([decode_rle(rle) for rle in rles]).astype(bool)
    theirs = numbers("paste/masks_256x320").numpy()
    assert (pasted != theirs).sum() == 0
