"""Resizing and flipping: image, boxes and masks stay together."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.data.coco import CocoDataset
from maskrcnn_benchmark.data.transforms import (
    Compose,
    Polygons,
    RandomHorizontalFlip,
    ResizeShortSide,
    Sample,
    build_transforms,
    offsets_of,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def polygons_of(instances: list[list[list[tuple[float, float]]]]) -> Polygons:
    """Nested lists -> packed."""
    flat = [polygon for instance in instances for polygon in instance]
    points = np.array([point for polygon in flat for point in polygon], np.float32).reshape(-1, 2)
    owned = np.array([len(instance) for instance in instances], np.int64)
    return Polygons(points, offsets_of(np.array([len(p) for p in flat], np.int64)), offsets_of(owned))


def sample_of(height: int, width: int, polygons: Polygons | None = None, boxes=()) -> Sample:
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return Sample(
        image=rng().integers(0, 256, (height, width, 3), np.uint8),
        image_id=1,
        image_index=0,
        original_size=(height, width),
        boxes=boxes,
        labels=np.arange(1, len(boxes) + 1),
        polygons=polygons,
    )


def bounds(polygons: Polygons) -> np.ndarray:
    all_points = [np.concatenate(polygons.of(i)) for i in range(len(polygons))]
    return np.array([[*p.min(axis=0), *p.max(axis=0)] for p in all_points], np.float32).reshape(-1, 4)


@st.composite
def samples(draw) -> Sample:
    """An image with objects of one to three polygons inside it; each box bounds its object's polygons."""
    height, width = draw(st.integers(2, 90)), draw(st.integers(2, 90))
    point = st.tuples(st.floats(0, width, width=32), st.floats(0, height, width=32))
    polygon = st.lists(point, min_size=3, max_size=6)
    instances = draw(st.lists(st.lists(polygon, min_size=1, max_size=3), max_size=4))
    packed = polygons_of(instances)
    return sample_of(height, width, packed, bounds(packed))


@settings(max_examples=80, deadline=None)
@given(samples(), st.integers(8, 120), st.integers(8, 150), st.booleans(), st.integers(0, 100))
def test_boxes_stay_the_bounds_of_their_polygons(sample, short, longest, flip, seed):
    flipping = RandomHorizontalFlip(1.0 if flip else 0.0)
    result = Compose([ResizeShortSide((short,), longest), flipping])(sample, rng(seed))
    height, width = result.size
    expected = bounds(result.polygons)
    np.testing.assert_allclose(result.boxes, expected, atol=1e-3)
    assert len(result.boxes) == len(result.labels) == len(result.polygons)
    assert (result.boxes >= 0).all() and (result.boxes <= [width, height, width, height]).all()
    assert (result.boxes[:, 2:] > result.boxes[:, :2]).all()
    dropped = (sample.boxes[:, 2:] - sample.boxes[:, :2]).min(axis=1, initial=np.inf) < 1e-3
    assert set(sample.labels[~dropped]) <= set(result.labels)
    assert result.original_size == sample.size
    assert min(height, width) <= max(short, 1) and max(height, width) <= max(longest, 1)


@pytest.mark.parametrize(
    ("size", "short", "longest", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),  # 640 * 800 / 480 = 1066.67
        ((640, 427), 800, 1333, (1199, 800)),  # 640 * 800 / 427 = 1199.06
        ((300, 1000), 800, 1333, (400, 1333)),  # the long side decides: 300 * 1.333 = 399.9
        ((1600, 2000), 800, 1333, (800, 1000)),
        ((1, 3000), 800, 1333, (1, 1333)),
        ((800, 1000), 800, 1333, (800, 1000)),
    ],
)
def test_new_size(size, short, longest, expected):
    assert ResizeShortSide((short,), longest).new_size(size, short) == expected


def test_points_follow_the_ratio_of_each_axis():
    """10 x 15 to a short side of 25: 25 x 38, so x is stretched by 38 / 15, not by 2.5."""
    polygons = polygons_of([[[(0, 0), (15, 0), (15, 10)]], [[(3, 2), (6, 2), (6, 4)]]])
    result = Compose([ResizeShortSide((25,), 100)])(sample_of(10, 15, polygons, bounds(polygons)), rng())
    assert result.size == (25, 38)
    np.testing.assert_allclose(result.boxes, [[0, 0, 38, 25], [7.6, 5, 15.2, 10]], atol=1e-5)
    np.testing.assert_allclose(result.polygons.of(1)[0], [[7.6, 5], [15.2, 5], [15.2, 10]], atol=1e-5)


def test_image_of_the_right_size_is_left_alone():
    sample = sample_of(40, 60)
    np.testing.assert_array_equal(Compose([ResizeShortSide((40,), 100)])(sample, rng()).image, sample.image)


def test_shrinking_averages_and_enlarging_interpolates():
    """Every fourth column is white: a quarter of the size is a quarter gray; without antialiasing it would be black."""
    sample = sample_of(64, 64)
    sample.image[:] = 0
    sample.image[:, ::4] = 255
    shrunk = ResizeShortSide((16,), 100)(sample, rng()).image
    assert ((shrunk >= 63) & (shrunk <= 65)).all()
    step = np.repeat(np.array([0, 0, 255, 255], np.uint8), 3).reshape(1, 4, 3).repeat(4, axis=0)
    sample.image = np.ascontiguousarray(step)
    enlarged = ResizeShortSide((16,), 100)(sample, rng()).image[0, :, 0]
    assert len(set(enlarged.tolist())) > 2 and (np.diff(enlarged.astype(int)) >= 0).all()


def test_flip_by_hand():
    polygons = polygons_of([[[(1, 2), (5, 2), (5, 9)]]])
    sample = sample_of(10, 20, polygons, [[1, 2, 5, 9]])
    sample.bitmaps = rng().integers(0, 2, (1, 10, 20), np.uint8)
    before = sample.boxes.copy(), sample.polygons.points.copy(), sample.image.copy()
    flipped = RandomHorizontalFlip(1.0)(sample, rng())
    assert flipped.boxes.tolist() == [[15, 2, 19, 9]]
    assert flipped.polygons.of(0)[0].tolist() == [[19, 2], [15, 2], [15, 9]]
    np.testing.assert_array_equal(flipped.image, sample.image[:, ::-1])
    np.testing.assert_array_equal(flipped.bitmaps, sample.bitmaps[:, :, ::-1])
    for now, then in zip((sample.boxes, sample.polygons.points, sample.image), before):
        np.testing.assert_array_equal(now, then)  # the data set's own arrays are never written to
    again = RandomHorizontalFlip(1.0)(flipped, rng())
    assert again.boxes.tolist() == sample.boxes.tolist()


def test_flip_probability():
    sample = sample_of(4, 6)
    flipped = [
        not np.array_equal(RandomHorizontalFlip(0.3)(sample, rng(seed)).image, sample.image) for seed in range(400)
    ]
    assert 0.2 < np.mean(flipped) < 0.4


def test_short_side_sampling():
    choice = ResizeShortSide((20, 30, 40), 1000)
    drawn = {min(choice(sample_of(10, 12), rng(seed)).size) for seed in range(60)}
    assert drawn == {20, 30, 40}
    between = ResizeShortSide((20, 24), 1000, sampling="range")
    drawn = {min(between(sample_of(10, 12), rng(seed)).size) for seed in range(100)}
    assert drawn == {20, 21, 22, 23, 24}


def test_degenerate_instances_are_dropped_with_their_masks():
    shape = [[(1, 1), (9, 1), (9, 9)], [(2, 2), (3, 2), (3, 3)]]
    polygons = polygons_of([shape, [shape[0]], [shape[1]]])
    sample = sample_of(10, 20, polygons, [[1, 1, 9, 9], [25, 1, 30, 9], [2, 2, 3, 3]])
    result = Compose([])(sample, rng())
    assert result.labels.tolist() == [1, 3] and len(result.polygons) == 2
    assert [len(result.polygons.of(i)) for i in range(2)] == [2, 1]
    assert result.polygons.of(1)[0].tolist() == [[2, 2], [3, 2], [3, 3]]
    sample.polygons, sample.bitmaps = None, np.arange(3, dtype=np.uint8)[:, None, None].repeat(10, 1).repeat(20, 2)
    assert Compose([])(sample, rng()).bitmaps[:, 0, 0].tolist() == [0, 2]


@pytest.mark.parametrize("short", [35, 100])
def test_bitmaps_and_polygons_tell_the_same_after_resizing(short):
    angles = np.linspace(0, 2 * np.pi, 30, endpoint=False)
    circle = [(40 + 25 * np.cos(a), 30 + 25 * np.sin(a)) for a in angles]
    polygons = polygons_of([[circle], [[(3, 3), (30, 4), (6, 40)]]])
    by_polygon = sample_of(70, 90, polygons, bounds(polygons))
    by_bitmap = sample_of(70, 90, None, bounds(polygons))
    by_bitmap.bitmaps = polygons.rasterize(70, 90)
    transform = Compose([ResizeShortSide((short,), 1000), RandomHorizontalFlip(1.0)])
    by_polygon, by_bitmap = transform(by_polygon, rng()), transform(by_bitmap, rng())
    drawn = by_polygon.polygons.rasterize(*by_polygon.size)
    assert set(np.unique(by_bitmap.bitmaps)) == {0, 1} and by_bitmap.bitmaps.shape == drawn.shape
    overlap = (drawn & by_bitmap.bitmaps).sum(axis=(1, 2)) / (drawn | by_bitmap.bitmaps).sum(axis=(1, 2))
    assert (overlap > 0.9).all(), overlap


def test_pixels_and_boxes_move_together():
    """A bright rectangle is where its box says, whatever the size and the side."""
    for seed in range(8):
        sample = sample_of(60, 100, None, [[20, 10, 50, 40]])
        sample.image[:] = 0
        cv2.rectangle(sample.image, (20, 10), (49, 39), (255, 255, 255), -1)
        result = Compose([ResizeShortSide((37, 120), 300), RandomHorizontalFlip(0.5)])(sample, rng(seed))
        rows, columns = np.nonzero(result.image[..., 0] > 127)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(found, result.boxes[0], atol=1.01)


@pytest.mark.parametrize("training", [True, False])
def test_all_real_images(coco_mini, training):
    """Short side 800, longest 1333, everything inside, nothing lost."""
    dataset = CocoDataset(coco_mini / "annotations/instances_train2017.json", coco_mini / "train2017", training)
    transforms = build_transforms(get_config(), training)
    for index in range(len(dataset)):
        result = transforms(dataset.load(index), rng(index))
        height, width = result.size
        assert min(height, width) == 800 or max(height, width) == 1333
        assert len(result.boxes) == (dataset.counts[index] if training else 0)
        if training:
            assert (result.boxes >= 0).all() and (result.boxes <= [width, height, width, height]).all()
            # COCO's boxes and polygons agree within a pixel or so of the original.
            scale = height / result.original_size[0]
            np.testing.assert_allclose(bounds(result.polygons), result.boxes, atol=2 * scale)


def test_transforms_from_the_configuration():
    values = ["INPUT.MIN_SIZE_TRAIN", "(300, 400)", "INPUT.MAX_SIZE_TRAIN", "500", "INPUT.MIN_SIZE_TEST", "200"]
    values += ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.HORIZONTAL_FLIP_PROB_TRAIN", "0.25"]
    cfg = get_config(None, [*values, "INPUT.MAX_SIZE_TEST", "250"])
    flip, resize = build_transforms(cfg, training=True).transforms
    assert (resize.sizes, resize.max_size, resize.sampling, flip.prob) == ((300, 400), 500, "range", 0.25)
    (resize,) = build_transforms(cfg, training=False).transforms
    assert (resize.sizes, resize.max_size) == ((200,), 250)
