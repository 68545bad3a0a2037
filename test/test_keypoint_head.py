"""Keypoints: cells of the heat map, its peaks, the loss, results and pictures."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import SMALL, TINY, make_batch, model_of, step

from maskrcnn_benchmark.evaluation.results import detections_to_results
from maskrcnn_benchmark.models.keypoint_head import KeypointHead, heatmap_cells, visible_within
from maskrcnn_benchmark.ops.heatmaps import find_peaks
from maskrcnn_benchmark.report.visualize import draw_results
from maskrcnn_benchmark.structures import Detections, ImageBatch

KEYPOINTS = [
    *("MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "False"),
    *("MODEL.ROI_KEYPOINT_HEAD.RESOLUTION", "56", "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO", "2"),
    *("MODEL.ROI_KEYPOINT_HEAD.POOLER_SCALES", "(0.25, 0.125, 0.0625, 0.03125)"),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_LAYERS", "(16, 16)", "MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES", "5"),
    *("MODEL.MASK_ON", "False"),
]


def keypoint_batch(counts: tuple[int, ...] = (2, 0, 1)):
    """test_models' batch, each object with five points in it, the last one not labelled."""
    images, targets = make_batch(counts)
    place = torch.rand(*targets.valid.shape, 5, 2, generator=torch.Generator().manual_seed(3))
    low, high = targets.boxes[..., None, :2], targets.boxes[..., None, 2:]
    visibility = torch.tensor([2.0, 1, 2, 2, 0]) * targets.valid[..., None]
    targets.keypoints = torch.cat((low + place * (high - low), visibility[..., None]), -1)
    return images, targets


@pytest.fixture
def numbers(shared):
    with np.load(shared / "fixtures" / "maskrcnn_benchmark_ops.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if name.startswith("keypoints/")}


def test_cells_are_upstreams(numbers):
    cell, valid = heatmap_cells(numbers["keypoints/gt"], numbers["keypoints/gt_rois"], 56)
    assert torch.equal(valid.long(), numbers["keypoints/target_valid_56"])
    assert 0 < valid.sum() < valid.numel()
    assert torch.equal(cell * valid, numbers["keypoints/target_index_56"] * valid)


def test_peaks_are_upstreams(numbers):
    points, peak = find_peaks(numbers["keypoints/heatmaps_every_4"], numbers["keypoints/rois"])
    torch.testing.assert_close(points, numbers["keypoints/decoded_every_4"][..., :2], atol=1e-3, rtol=0)
    torch.testing.assert_close(peak, numbers["keypoints/logits_every_4"], atol=1e-4, rtol=1e-4)


def test_cells_by_hand():
    """A box of 10 x 20 in cells of 4 x 4: 2.5 wide and 5 high."""
    boxes = torch.tensor([[100.0, 50, 110, 70]])
    points = torch.tensor(
        [[[100.0, 50, 2], [102.4, 54.9, 1], [102.5, 55, 2], [110, 70, 2], [110.1, 60, 2], [105, 60, 0]]]
    )
    cell, valid = heatmap_cells(points, boxes, 4)
    assert valid.tolist() == [[True, True, True, True, False, False]]
    assert cell.tolist() == [[0, 0, 5, 15, 0, 0]]


def test_a_box_without_area_holds_no_cell():
    """Padding: nothing of it may be beyond the map, where the loss would look for it."""
    cell, valid = heatmap_cells(torch.tensor([[[5.0, 5, 2], [0, 0, 0]]]), torch.tensor([[0.0, 0, 0, 0]]), 56)
    assert cell.tolist() == [[0, 0]] and not valid.any()


def peaks_by_opencv(maps: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One map after the other."""
    points, peaks = np.zeros((*maps.shape[:2], 2)), np.zeros(maps.shape[:2])
    for r, (x1, y1, x2, y2) in enumerate(boxes):
        w, h = max(x2 - x1, 1), max(y2 - y1, 1)
        for k, heat in enumerate(maps[r]):
            large = cv2.resize(heat, (math.ceil(w), math.ceil(h)), interpolation=cv2.INTER_CUBIC)
            row, column = np.unravel_index(large.argmax(), large.shape)
            points[r, k] = x1 + (column + 0.5) * w / math.ceil(w), y1 + (row + 0.5) * h / math.ceil(h)
            peaks[r, k] = large[row, column]
    return points, peaks


@settings(max_examples=25, deadline=None)
@given(
    sides=st.lists(st.tuples(st.floats(0.2, 90), st.floats(0.2, 90)), min_size=1, max_size=6), seed=st.integers(0, 99)
)
def test_peaks_of_boxes_of_all_sizes(sides, seed):
    """The value found is the highest of the enlarged map; smooth maps have no two that are nearly equal."""
    generator = np.random.default_rng(seed)
    coarse = generator.normal(size=(len(sides), 3, 6, 6)).astype(np.float32)
    maps = np.stack([[cv2.resize(m, (14, 14), interpolation=cv2.INTER_LINEAR) for m in maps] for maps in coarse])
    corner = generator.uniform(0, 200, (len(sides), 2))
    boxes = np.concatenate([corner, corner + sides], 1).astype(np.float32)
    points, peak = find_peaks(torch.from_numpy(maps), torch.from_numpy(boxes))
    expected, highest = peaks_by_opencv(maps, boxes)
    np.testing.assert_allclose(peak, highest, atol=1e-4)
    near = np.abs(points.numpy() - expected).max(-1) < 1e-2
    assert near.mean() > 0.9


def test_large_boxes_are_enlarged_in_parts(monkeypatch):
    """However little memory there is to enlarge maps in, the points are the same."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(20, 4, 8, 8, generator=generator)
    boxes = torch.rand(20, 4, generator=generator) * 40
    boxes[:, 2:] += boxes[:, :2] + 20
    at_once = find_peaks(maps, boxes)
    monkeypatch.setattr("maskrcnn_benchmark.ops.heatmaps._PIXELS", 1)
    for one, other in zip(at_once, find_peaks(maps, boxes)):
        torch.testing.assert_close(one, other)


def test_no_boxes_have_no_peaks():
    points, peak = find_peaks(torch.zeros(0, 17, 56, 56), torch.zeros(0, 4))
    assert points.shape == (0, 17, 2) and peak.shape == (0, 17)


def test_which_points_lie_in_a_box():
    points = torch.tensor([[[5.0, 5, 2], [10, 10, 1], [10.1, 5, 2], [5, 5, 0]]])
    assert visible_within(points, torch.tensor([[0.0, 0, 10, 10]])).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("positives", ["object", "proposal", "all"])
def test_loss_by_hand(positives):
    """Two positives of one object with one labelled point that lies outside its own box: in the first proposal it
    falls into cell 0, in the second nowhere. Upstream does not look at such an object at all."""
    head = KeypointHead(lambda *_: None, None, None, positives=positives)
    head.forward = lambda features, boxes, image: torch.arange(len(boxes) * 4.0).view(-1, 1, 2, 2)
    boxes = torch.tensor([[[0.0, 0, 10, 10], [50, 50, 60, 60]]])
    owner = torch.tensor([[[40.0, 40, 60, 60]] * 2])
    chosen = type("Chosen", (), {})()
    chosen.positive = torch.tensor([[True, True]])
    chosen.boxes, chosen.wanted, chosen.matched = boxes, owner, torch.zeros(1, 2, dtype=torch.long)
    targets = type("Targets", (), {"keypoints": torch.tensor([[[[2.0, 2, 2]]]])})()
    loss = head.losses([], chosen, targets)["loss_kp"]
    # logits 0, 1, 2, 3, of which the first is wanted
    expected = 0.0 if positives == "object" else math.log(sum(map(math.exp, range(4))))
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("positives", ["object", "all"])
def test_padding_dropped_or_kept_gives_the_same_loss_and_gradients(positives):
    results = []
    for compacts in (True, False):
        overrides = [*TINY, *KEYPOINTS, "MODEL.ROI_KEYPOINT_HEAD.POSITIVES", positives]
        model = model_of(SMALL, overrides, compacts=compacts)
        results.append(step(model, keypoint_batch()))
    (dropped, gradients), (kept, others) = results
    assert dropped == pytest.approx(kept, rel=1e-5) and dropped["loss_kp"] > 1
    for name, gradient in gradients.items():
        assert (gradient - others[name]).abs().max() <= 1e-5 * gradient.abs().max(), name
    assert gradients["roi_heads.keypoint.predictor.kps_score_lowres.weight"].any()


@pytest.mark.parametrize("compacts", [True, False])
def test_without_objects_or_points_the_loss_is_zero_and_every_gradient_there(compacts):
    model = model_of(SMALL, [*TINY, *KEYPOINTS], compacts=compacts)
    unlabelled = keypoint_batch((2, 1))
    unlabelled[1].keypoints.zero_()
    for batch in (keypoint_batch((0, 0)), unlabelled):
        losses, gradients = step(model, batch)
        assert losses["loss_kp"] == 0 and all(math.isfinite(value) for value in losses.values())
        assert all(g is not None and g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize("compacts", [True, False])
def test_detected_keypoints_lie_in_their_boxes(compacts):
    model = model_of(SMALL, [*TINY, *KEYPOINTS, "MODEL.ROI_HEADS.SCORE_THRESH", "0.0"], compacts=compacts).eval()
    with torch.no_grad():
        detections = model(keypoint_batch()[0])
    assert detections.keypoints.shape == (3, 100, 5, 3)
    points, boxes = detections.keypoints[detections.valid], detections.boxes[detections.valid][:, None]
    side = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1)
    assert ((points[..., :2] >= boxes[..., :2]) & (points[..., :2] <= boxes[..., :2] + side)).all()
    assert (points[..., 2] > 1 / 56**2).all()
    if compacts:
        assert not detections.keypoints[~detections.valid].any()


def test_a_certain_heat_map_scores_one():
    """The score is the softmax over the cells: all of it on one cell."""
    head = KeypointHead(lambda *_: None, None, None)
    maps = torch.full((1, 2, 4, 4), -100.0)
    maps[0, 0, 1, 2] = 100.0
    maps[0, 1] = 0.0
    head.forward = lambda *_: maps
    one = torch.ones(1, 1)
    found = head.detect([], Detections(torch.tensor([[[0.0, 0, 4, 4]]]), one, one.long(), one.bool()))
    torch.testing.assert_close(found.keypoints[0, 0, 0], torch.tensor([2.5, 1.5, 1.0]))
    assert found.keypoints[0, 0, 1, 2].item() == pytest.approx(1 / 16)


def test_results_are_in_pixels_of_the_original_image():
    one = torch.ones(1, 2)
    points = torch.tensor([[[[10.0, 20, 0.5]], [[0, 0, 0]]]])
    boxes = torch.tensor([[[0.0, 0, 20, 40], [0, 0, 0, 0]]])
    found = Detections(boxes, one, one.long(), torch.tensor([[True, False]]), keypoints=points)
    images = ImageBatch(torch.zeros(1, 3, 50, 100), torch.tensor([[50, 100]]), [(100, 300)], [7])
    results = detections_to_results(found, images, [3]).to_list()
    assert len(results) == 1 and results[0]["keypoints"] == [30.0, 40.0, 0.5]


def test_skeletons_are_drawn():
    image = np.full((60, 80, 3), 255, np.uint8)
    result = {"category_id": 1, "bbox": [2, 20, 70, 30], "score": 0.9}
    points = [10.5, 30.5, 0.9, 60.5, 30.5, 0.8, 30.5, 45.5, 0.01]
    plain = draw_results(image, [result | {"keypoints": points}], {1: "a"})
    assert np.array_equal(plain, draw_results(image, [result], {1: "a"}))
    drawn = draw_results(image, [result | {"keypoints": points}], {1: "a"}, limbs=[(0, 1), (1, 2)])
    changed = (drawn != plain).any(-1)
    assert changed[30, 10] and changed[30, 60] and changed[30, 35], "two points and the line between them"
    assert not changed[45, 30] and not changed[38, 45], "a point that was not found has no limbs"
