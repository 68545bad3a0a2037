"""Mask targets and pasted masks against pycocotools, hand-worked cases, loops and their composites."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torch.library import opcheck

from maskrcnn_benchmark.ops import masks
from maskrcnn_benchmark.ops.masks import (
    bitmap_targets,
    paste_masks_rle,
    paste_masks_rle_composite,
    polygon_targets,
    polygon_targets_composite,
)
from maskrcnn_benchmark.ops.rle import decode_rle

OPS = torch.ops.maskrcnn_benchmark
NAN, INF = float("nan"), float("inf")


def pack(instances: list[list[np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    polygons = [polygon for instance in instances for polygon in instance]
    points = np.concatenate([*polygons, np.zeros((0, 2))]).astype(np.float32)
    polygon_offsets = np.cumsum([0] + [len(polygon) for polygon in polygons])
    instance_offsets = np.cumsum([0] + [len(instance) for instance in instances])
    return torch.from_numpy(points), torch.from_numpy(polygon_offsets), torch.from_numpy(instance_offsets)


def draw_with_pycocotools(polygons: list[np.ndarray], box, size: int) -> np.ndarray:
    box = np.asarray(box, dtype=np.float32).astype(np.float64)
    scale = size / np.maximum(box[2:] - box[:2], 0.1)
    local = [((polygon.astype(np.float32) - box[:2]) * scale).ravel().tolist() for polygon in polygons]
    if not local:
        return np.zeros((size, size))
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(local, size, size)))


def test_square_polygon_by_hand():
    square = np.array([[2.0, 1], [4, 1], [4, 3], [2, 3]])
    packed = pack([[square]])
    target = polygon_targets(*packed, torch.tensor([0]), torch.tensor([[0.0, 0, 4, 4]]), 4)
    assert target[0].tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]
    target = polygon_targets(*packed, torch.tensor([0]), torch.tensor([[2.0, 1, 4, 3]]), 2)
    assert target[0].tolist() == [[1, 1], [1, 1]]


def test_an_instance_is_the_union_of_its_polygons_and_may_have_none():
    left, both = np.array([[0.0, 0], [2, 0], [2, 4], [0, 4]]), np.array([[0.0, 0], [4, 0], [4, 2], [0, 2]])
    packed = pack([[], [left, both], []])
    box = torch.tensor([[0.0, 0, 4, 4]])
    targets = polygon_targets(*packed, torch.tensor([1, 0, 2]), box.repeat(3, 1), 4)
    assert targets[0].tolist() == [[1] * 4] * 2 + [[1, 1, 0, 0]] * 2
    assert targets[1:].sum() == 0


coordinates = st.one_of(
    st.floats(-30, 60, width=32), st.integers(-2, 30).map(float), st.integers(-20, 300).map(lambda tenth: tenth / 10)
)
polygons = st.lists(st.tuples(coordinates, coordinates), min_size=3, max_size=25).map(np.array)
boxes = st.tuples(
    st.floats(-5, 20, width=32),
    st.integers(-2, 20).map(float),
    st.sampled_from([0.0, -3.0, 0.05, 1.0, 14.0, 23.7, 200.0]),
    st.sampled_from([0.0, 0.25, 1.0, 28.0, 40.3]),
)


@settings(max_examples=150, deadline=None)
@given(
    instances=st.lists(st.lists(polygons, max_size=3), min_size=1, max_size=3),
    box=boxes,
    size=st.sampled_from([1, 5, 14, 28]),
)
def test_polygons_are_bit_equal_to_pycocotools(instances, box, size):
    packed = pack(instances)
    rows = torch.arange(len(instances))
    corners = torch.tensor([[box[0], box[1], box[0] + box[2], box[1] + box[3]]]).repeat(len(instances), 1)
    expected = np.stack([draw_with_pycocotools(polygon, corners[0], size) for polygon in instances])
    for function in (polygon_targets, polygon_targets_composite):
        np.testing.assert_array_equal(function(*packed, rows, corners, size), expected)


@pytest.mark.parametrize(("x", "run", "rise"), [(17, 14, 20), (10, 15, 26), (24, 17, 28), (3, -1, 2), (24, -3, 4)])
def test_crossings_that_fall_on_a_step_are_bit_equal_to_pycocotools(x, run, rise):
    """On these edges the exact crossing is a step of the walk, and rounding decides on which side it counts."""
    fine = np.array([[x, 0], [x + run, rise], [110, 70]])
    triangles = [[(fine + np.array([0, shift])) / 5] for shift in range(5)]
    corners = torch.tensor([[0.0, 0, 28, 28]]).repeat(5, 1)
    expected = np.stack([draw_with_pycocotools(triangle, corners[0], 28) for triangle in triangles])
    for function in (polygon_targets, polygon_targets_composite):
        np.testing.assert_array_equal(function(*pack(triangles), torch.arange(5), corners, 28), expected)


def test_many_vertices_and_chunks_are_bit_equal_to_pycocotools(monkeypatch):
    monkeypatch.setattr(masks, "_BUDGET", 20_000)
    generator = np.random.default_rng(0)
    instances = []
    for count in (700, 3, 40, 200):
        angle = np.sort(generator.random(count)) * 2 * np.pi
        radius = 40 + 30 * generator.random((count, 1))
        instances.append([radius * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 50])
    packed = pack(instances)
    rows = torch.from_numpy(generator.integers(0, 4, 24))
    corner = generator.random((24, 2)) * 60
    corners = torch.from_numpy(np.concatenate([corner, corner + generator.random((24, 2)) * 80], axis=1)).float()
    expected = np.stack([draw_with_pycocotools(instances[i], box, 28) for i, box in zip(rows, corners)])
    for function in (polygon_targets, polygon_targets_composite):
        np.testing.assert_array_equal(function(*packed, rows, corners, 28), expected)


@pytest.mark.parametrize("function", [polygon_targets, polygon_targets_composite])
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e30, -1e30])
def test_polygons_and_boxes_that_are_no_numbers_never_crash(function, bad):
    packed = pack([[np.array([[0.0, 0], [bad, 0], [4, bad], [0, 4]])]])
    corners = torch.tensor([[0.0, 0, 4, 4], [bad, 0, 4, 4], [0, 0, 4, bad]])
    targets = function(*packed, torch.zeros(3, dtype=torch.int64), corners, 7)
    assert set(targets.unique().tolist()) <= {0, 1}
    assert torch.equal(targets, polygon_targets(*packed, torch.zeros(3, dtype=torch.int64), corners, 7))


@pytest.mark.parametrize("function", [polygon_targets, polygon_targets_composite])
def test_no_polygons_no_boxes_and_rows_without_an_instance(function):
    empty, square = pack([]), pack([[np.array([[0.0, 0], [4, 0], [4, 4], [0, 4]])]])
    none = torch.zeros(0, dtype=torch.int64)
    assert function(*square, none, torch.zeros(0, 4), 3).shape == (0, 3, 3)
    box = torch.tensor([[0.0, 0, 4, 4]] * 2)
    assert function(*empty, torch.tensor([0, -1]), box, 3).sum() == 0
    assert function(*square, torch.tensor([5, -1]), box, 3).sum() == 0


def test_offsets_beyond_the_points_are_an_error():
    points, polygon_offsets, instance_offsets = pack([[np.zeros((3, 2))]])
    with pytest.raises((RuntimeError, IndexError), match=r"offsets|out of"):
        polygon_targets(points, polygon_offsets * 4, instance_offsets, torch.tensor([0]), torch.zeros(1, 4), 3)


def test_wrong_shapes_are_errors():
    packed, row, box = pack([]), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 4)
    with pytest.raises(ValueError, match="points must be"):
        polygon_targets(torch.zeros(3, 3), *packed[1:], row, box, 3)
    with pytest.raises(ValueError, match="instance must be"):
        polygon_targets(*packed, row, torch.zeros(2, 4), 3)
    with pytest.raises(ValueError, match="size must be"):
        polygon_targets(*packed, row, box, 0)
    with pytest.raises(ValueError, match="masks must be"):
        paste_masks_rle(torch.zeros(1, 3, 4), box, 5, 5)
    with pytest.raises(ValueError, match="threshold"):
        paste_masks_rle(torch.zeros(1, 3, 3), box, 5, 5, threshold=0.0)


def test_bitmap_targets_by_hand():
    bitmap = torch.zeros(2, 4, 4, dtype=torch.uint8)
    bitmap[1, 1:3, 2:] = 1
    box, second = torch.tensor([[0.0, 0, 4, 4], [2, 1, 4, 3]]), torch.tensor([1, 1])
    hard = bitmap_targets(bitmap, second, box, 4, soft=False)
    assert torch.equal(hard[0], bitmap[1].float())
    assert torch.equal(bitmap_targets(bitmap, second, box, 2, soft=False)[1], torch.ones(2, 2))
    # Unaligned: bins of one pixel, sampled at .5: the mean of four pixels.
    soft = bitmap_targets(bitmap, second, box, 4, soft=True)[0]
    assert soft[0].tolist() == [0, 0.25, 0.5, 0.5]
    assert soft.dtype == hard.dtype == torch.float32


@pytest.mark.parametrize("soft", [True, False])
def test_bitmap_targets_equal_the_loop(soft):
    generator = torch.Generator().manual_seed(0)
    bitmaps = torch.randint(0, 2, (2, 13, 17), generator=generator, dtype=torch.uint8)
    corners = torch.tensor([[1.0, 2, 9, 12], [0, 0, 17, 13], [-4, -4, 30, 30], [5.3, 6.1, 5.9, 6.2]])
    rows = torch.tensor([0, 1, 1, 0])
    features = [bitmaps[:, None].double().numpy()]
    expected = reference.roi_align(features, corners.tolist(), rows, [0] * 4, [1.0], 5, 0, not soft)[:, 0]
    expected = expected if soft else expected >= 0.5
    np.testing.assert_allclose(bitmap_targets(bitmaps, rows, corners, 5, soft), expected, atol=1e-5)


def test_paste_by_hand():
    mask = torch.tensor([[[1.0, 0], [1, 1]]])
    rle = paste_masks_rle(mask, torch.tensor([[2.0, 1, 4, 3]]), 5, 6)
    assert rle[0]["size"] == [5, 6]
    assert isinstance(rle[0]["counts"], str)
    expected = np.zeros((5, 6))
    expected[1:3, 2] = expected[2, 3] = 1
    np.testing.assert_array_equal(decode_rle(rle[0]), expected)


@pytest.mark.parametrize("function", [OPS.paste_masks_rle, paste_masks_rle_composite])
def test_values_equal_to_the_threshold_belong_to_the_mask(function):
    mask, box = torch.full((1, 2, 2), 0.5), torch.tensor([[0.0, 0, 2, 2]])
    assert function(mask, box, 2, 2, 0.5)[0].tolist() == [0, 4]
    assert function(mask, box, 2, 2, 0.51)[0].tolist() == [4]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1, 2, 7]),
    height=st.integers(1, 14),
    width=st.integers(1, 14),
    threshold=st.sampled_from([0.05, 0.5, 0.9]),
)
def test_paste_equals_the_loop_and_the_composite(seed, size, height, width, threshold):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(3, size, size, generator=generator)
    corner = torch.rand(3, 2, generator=generator) * 24 - 8
    corners = torch.cat([corner, corner + torch.rand(3, 2, generator=generator) * 20 - 2], dim=1)
    counts, offsets = OPS.paste_masks_rle(probabilities, corners, height, width, threshold)
    for ours, composite in zip(
        (counts, offsets), paste_masks_rle_composite(probabilities, corners, height, width, threshold)
    ):
        assert torch.equal(ours, composite)
    for i, rle in enumerate(paste_masks_rle(probabilities, corners, height, width, threshold)):
        pasted = reference.paste(probabilities[i].double().numpy(), corners[i].tolist(), height, width)
        clear = abs(pasted - threshold) > 1e-5
        np.testing.assert_array_equal(decode_rle(rle)[clear], (pasted >= threshold)[clear])


def test_paste_equals_the_composite_over_several_chunks(monkeypatch):
    monkeypatch.setattr(masks, "_BUDGET", 5_000)
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(9, 28, 28, generator=generator)
    corner = torch.rand(9, 2, generator=generator) * 40 - 10
    corners = torch.cat([corner, corner + torch.rand(9, 2, generator=generator) * 60], dim=1)
    arguments = (probabilities, corners, 40, 50, 0.5)
    for ours, composite in zip(OPS.paste_masks_rle(*arguments), paste_masks_rle_composite(*arguments)):
        assert torch.equal(ours, composite)


@pytest.mark.parametrize("function", [OPS.paste_masks_rle, paste_masks_rle_composite])
def test_boxes_without_area_or_outside_give_empty_masks(function):
    corners = torch.tensor(
        [
            [5.0, 5, 5, 9],
            [5, 5, 2, 9],
            [NAN, 0, 5, 5],
            [0, 0, 5, NAN],
            [90, 0, 99, 5],
            [-INF, 0, INF, 5],
            [1e30, 0, 3e30, 4],
        ]
    )
    counts, offsets = function(torch.ones(7, 4, 4), corners, 6, 8, 0.5)
    assert counts.tolist() == [48] * 7
    assert offsets.tolist() == list(range(8))


@pytest.mark.parametrize("function", [OPS.paste_masks_rle, paste_masks_rle_composite])
def test_no_masks_full_masks_and_no_pixels(function):
    counts, offsets = function(torch.zeros(0, 4, 4), torch.zeros(0, 4), 6, 8, 0.5)
    assert (counts.tolist(), offsets.tolist()) == ([], [0])
    full = torch.ones(1, 4, 4), torch.tensor([[-10.0, -10, 30, 30]])
    assert function(*full, 6, 8, 0.5)[0].tolist() == [0, 48]
    assert function(*full, 0, 8, 0.5)[0].tolist() == [0]
    assert paste_masks_rle(torch.zeros(0, 4, 4), torch.zeros(0, 4), 6, 8) == []


def test_opcheck():
    packed = pack([[np.array([[0.0, 0], [4, 0], [4, 4]])]])
    opcheck(OPS.polygon_targets, (*packed, torch.tensor([0]), torch.tensor([[0.0, 0, 4, 4]]), 3))
    opcheck(OPS.paste_masks_rle, (torch.rand(2, 4, 4), torch.tensor([[0.0, 0, 4, 4], [1, 1, 9, 9]]), 10, 12, 0.5))
