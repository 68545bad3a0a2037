"""Single operations against upstream maskrcnn-benchmark's numbers, and what its numbers do not cover by hand.

Its boxes name the first and the last pixel; here they end where the last pixel ends, so that `from_inclusive` and
`to_inclusive` stand wherever its boxes meet ours.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_fixed_shapes import HostWaits
from test_fixtures import POLYGONS, bitmaps_of, pack
from torch import Tensor
from yacs.config import CfgNode

from maskrcnn_benchmark.config import flat, get_config
from maskrcnn_benchmark.config.legacy import CONVENTIONS, describe_conventions
from maskrcnn_benchmark.data.geometry import mirror, resize
from maskrcnn_benchmark.data.sample import Polygons, Sample
from maskrcnn_benchmark.data.transforms import build_transforms
from maskrcnn_benchmark.errors import ConfigError
from maskrcnn_benchmark.evaluation.results import detections_to_results
from maskrcnn_benchmark.models.anchors import AnchorGenerator, cell_anchors
from maskrcnn_benchmark.models.build import build_pool, build_rpn
from maskrcnn_benchmark.models.layers import FrozenBatchNorm2d
from maskrcnn_benchmark.models.rpn import inside
from maskrcnn_benchmark.ops import box_coder, masks, matching, nms, roi_align
from maskrcnn_benchmark.ops import boxes as box_ops
from maskrcnn_benchmark.ops.boxes import from_inclusive, to_inclusive
from maskrcnn_benchmark.ops.focal_loss import sigmoid_focal_loss
from maskrcnn_benchmark.ops.proposals import decode_and_clip
from maskrcnn_benchmark.ops.rle import decode_rle
from maskrcnn_benchmark.structures import Detections, ImageBatch

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


# -------------------------------------------------------------------------------------------- worked by hand


def legacy(*overrides: str) -> CfgNode:
    return get_config(None, ["_BASE_", str(CONVENTION), *overrides])


def test_a_proposal_beyond_the_border_keeps_a_pixel():
    """Upstream clips first and last pixels to 0..199: what lies right of the image is its last column."""
    anchors, index = torch.tensor([[10.0, 10, 20, 20], [10, 10, 20, 20]]), torch.tensor([[0, 1]])
    deltas = torch.tensor([[[30.0, 0, 0, 0], [-30.0, 0, 0, 0]]])
    sizes = torch.tensor([[100, 200]])
    _, valid = decode_and_clip(deltas, anchors, index, sizes)
    assert valid.tolist() == [[False, False]]
    for least, kept in ((0.0, True), (1.0, True), (1.5, False)):  # MIN_SIZE itself is large enough
        box, valid = decode_and_clip(deltas, anchors, index, sizes, min_size=least, least_side=1.0)
        assert box.tolist() == [[[199, 10, 200, 20], [0, 10, 1, 20]]]
        assert valid.tolist() == [[kept, kept]]


@pytest.mark.parametrize(("rank_by", "level"), [("logit", 1), ("probability", 0)])
def test_ranking_by_probability_makes_large_logits_equal(rank_by, level):
    """sigmoid(20) and sigmoid(30) are both 1 in float32, and of equals the first level's comes first."""
    cfg = get_config(ROOT / "configs" / "e2e_faster_rcnn_R_50_FPN_1x.yaml", ["MODEL.RPN.RANK_BY", rank_by])
    rpn = build_rpn(cfg, 8).eval()
    rpn.post_nms = (1, 1)
    anchors = torch.tensor([[0.0, 0, 8, 8], [20, 20, 28, 28]])
    logits, deltas = [torch.tensor([[20.0]]), torch.tensor([[30.0]])], torch.zeros(1, 2, 4)
    proposals = rpn.propose(logits, deltas, anchors, torch.tensor([[64, 64]]))
    assert proposals.boxes[0].tolist() == anchors[level : level + 1].tolist()
    assert proposals.scores.tolist() == [[1.0]]


def test_cells_of_c4_by_hand():
    """128 is 8 strides of 16. Ratio 1/2: 16 * 16 * 2 = 512, w round(22.6) = 23, h round(11.5) = 12 (to even)."""
    cells = to_inclusive(cell_anchors((128,), (0.5, 1.0), "stride", stride=16, offset=0.5))
    assert cells.tolist() == [[-84, -40, 99, 55], [-56, -56, 71, 71]]


def test_c4_pools_from_the_first_pixel_to_the_last():
    """On the map f(x, y) = x of stride 16, pixels 32..96 are 2..6, with a mean of 4; shifted or a pixel longer it is
    not."""
    ramp = torch.arange(20.0).expand(1, 1, 20, 20)
    cfg = legacy()
    pool = build_pool(cfg, cfg.MODEL.ROI_BOX_HEAD, channels=1)
    pooled = pool([ramp], torch.tensor([[32.0, 32, 97, 97]]), torch.zeros(1, dtype=torch.long))
    assert pooled.shape == (1, 1, 14, 14)
    assert pooled.mean().item() == pytest.approx(4.0, abs=1e-5)
    assert pooled[0, 0, 0, 0].item() == pytest.approx(2 + 4 / 28, abs=1e-5)


@pytest.mark.parametrize(
    ("size", "nearest", "down"),
    [
        ((480, 640), (800, 1067), (800, 1066)),
        ((640, 480), (1067, 800), (1066, 800)),
        ((375, 1242), (402, 1333), (402, 1331)),  # round(1333 * 375 / 1242) = 402, int(402 * 1242 / 375) = 1331
        ((300, 1000), (400, 1333), (400, 1333)),
        ((500, 500), (800, 800), (800, 800)),
    ],
)
def test_sizes_of_resized_images(size, nearest, down):
    for cfg, expected in ((get_config(), nearest), (legacy(), down)):
        (transform,) = build_transforms(cfg, training=False).transforms
        assert transform.new_size(size, 800) == expected


def test_resized_by_pillow():
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    sample = Sample(image, 1, 0, (60, 80))
    cfg = legacy("INPUT.MIN_SIZE_TEST", "30")
    expected = np.asarray(Image.fromarray(image).resize((40, 30), Image.Resampling.BILINEAR))
    assert np.array_equal(build_transforms(cfg, training=False)(sample, np.random.default_rng(0)).image, expected)


def test_training_images_by_hand():
    """An image of 10 x 20, enlarged twice, then mirrored: pixels 2..5 become 4..10, then 39 - 10 = 29..35. A box of one
    pixel is dropped, as upstream does."""
    boxes = np.array([[2, 2, 6, 8], [3, 3, 4, 9]], np.float32)
    polygons = Polygons.pack([[boxes[0].reshape(2, 2)[[0, 0, 1]]], [np.zeros((3, 2), np.float32)]])
    keypoints = np.array([[[5, 3, 2]], [[1, 1, 2]]], np.float32)
    image = np.zeros((10, 20, 3), np.uint8)
    sample = Sample(image, 1, 0, (10, 20), boxes, np.array([1, 2]), polygons, keypoints=keypoints)
    cfg = legacy("INPUT.MIN_SIZE_TRAIN", "(20,)", "INPUT.HORIZONTAL_FLIP_PROB_TRAIN", "1.0")
    result = build_transforms(cfg, training=True)(sample, np.random.default_rng(0))
    assert result.labels.tolist() == [1]
    assert result.boxes.tolist() == [[29, 4, 36, 15]]
    assert result.polygons.of(0)[0].tolist() == [[35, 4], [35, 4], [27, 16]]
    assert result.keypoints.tolist() == [[[29, 6, 2]]]


def test_results_by_hand():
    """Pixels 10..30 and 20..40 of an image shown at half its size are 20..60 and 40..80 of the file, 41 a side."""
    valid = torch.ones(1, 1, dtype=torch.bool)
    found = Detections(torch.tensor([[[10.0, 20, 31, 41]]]), torch.ones(1, 1), valid.long(), valid)
    images = ImageBatch(torch.zeros(1, 3, 100, 50), torch.tensor([[100, 50]]), [(200, 100)], [7])
    assert detections_to_results(found, images, [3], plus_one=True).boxes.tolist() == [[20, 40, 41, 41]]
    assert detections_to_results(found, images, [3]).boxes.tolist() == [[20, 40, 42, 42]]


def test_bitmap_targets_never_wait_and_stay_in_the_image():
    """Boxes that reach beyond the bitmap and rows of padding (zeros) read what is there."""
    bitmaps = torch.ones(2, 9, 7, dtype=torch.uint8)
    boxes = torch.tensor([[-3.0, -3, 30, 30], [0, 0, 0, 0], [6.6, 8.6, 8, 10]])
    instance = torch.tensor([0, 1, 1])
    with HostWaits() as waits:
        drawn = masks.bitmap_targets_whole_pixels(bitmaps, instance, boxes, 7, soft=False)
    assert not waits.found
    assert drawn.shape == (3, 7, 7) and drawn[0].all()


def test_the_convention_is_explicit(tmp_path):
    """An upstream yaml by itself gets the defaults; the convention is one more file, and the log says which it is."""
    yaml = tmp_path / "upstream.yaml"
    yaml.write_text('MODEL: {WEIGHT: "catalog://ImageNetPretrained/MSRA/R-50", BACKBONE: {CONV_BODY: R-50-C4}}')
    assert not get_config(yaml).MODEL.LEGACY_PLUS_ONE
    assert describe_conventions(get_config(yaml)).startswith("conventions: the defaults")
    cfg = get_config(yaml, ["_BASE_", str(CONVENTION), "MODEL.RPN.RANK_BY", "logit"])
    assert cfg.MODEL.LEGACY_PLUS_ONE and cfg.MODEL.RPN.RANK_BY == "logit", "what follows _BASE_ does not win"
    text = describe_conventions(cfg)
    assert "MODEL.LEGACY_PLUS_ONE True" in text and "RANK_BY" not in text
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        get_config(yaml, ["_BASE_", "nowhere.yaml"])


def test_upstreams_convention_leaves_its_yamls_alone():
    """All its keys are ours, marked (+), which no yaml of upstream sets: so the order of _BASE_ does not matter."""
    text = (ROOT / "maskrcnn_benchmark" / "config" / "defaults.py").read_text()
    ours = {key for comment, key in re.findall(r"((?:^#.*\n)+)_C\.(\S+) = ", text, re.MULTILINE) if "(+)" in comment}
    before, after = flat(get_config()), flat(legacy())
    changed = {key for key in before if before[key] != after[key]}
    assert "MODEL.LEGACY_PLUS_ONE" in changed and changed <= ours
    assert changed <= {*CONVENTIONS}, "the log would not say it"
