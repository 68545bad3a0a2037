"""Augmentation: boxes, polygons, bitmaps and keypoints stay true to the pixels, whatever is done to them."""

from __future__ import annotations

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from maskrcnn_benchmark.config import dump as dump_config
from maskrcnn_benchmark.config import get_config, parse_config
from maskrcnn_benchmark.data import color, geometry, loader
from maskrcnn_benchmark.data.catalog import build_dataset
from maskrcnn_benchmark.data.transforms import (
    TRANSFORMS,
    Compose,
    Normalize,
    Padding,
    Polygons,
    Sample,
    build_transforms,
)
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.errors import ConfigError

SEED_POLICIES = [
    [{"type": "Rotate", "level": 5, "img_fill_val": (124, 116, 104), "prob": 0.5, "scale": 1}],
    [
        {"type": "Rotate", "level": 7, "img_fill_val": (124, 116, 104)},
        {"type": "Translate", "level": 5, "prob": 0.5, "img_fill_val": (124, 116, 104)},
    ],
]
GEOMETRIC = {
    "resize": {"type": "ResizeByShort", "short_size": [37, 90], "max_size": 140},
    "stretch": {"type": "Resize", "img_scale": (97, 61), "keep_ratio": False},
    "horizontal": {"type": "RandomHorizontalFlip", "prob": 1},
    "vertical": {"type": "RandomVerticalFlip", "prob": 1},
    "expand": {"type": "RandomExpand", "ratio": 2, "prob": 1, "fill_value": 0},
    "crop": {"type": "RandomCrop", "allow_no_crop": False, "thresholds": [0.1, 0.3]},
    "jitter": {"type": "LargeScaleJitter", "size": [70, 60], "min_scale": 0.7, "max_scale": 1.6},
    "rotate": {"type": "Rotate", "level": 10, "prob": 1, "img_fill_val": 0},
    "turn": {"type": "Rotate", "level": 10, "prob": 1, "max_rotate_angle": 90, "scale": 0.8, "img_fill_val": 0},
    "translate": {"type": "Translate", "level": 10, "prob": 1, "max_translate_offset": 25, "img_fill_val": 0},
    "down": {
        "type": "Translate",
        "level": 10,
        "prob": 1,
        "max_translate_offset": 25,
        "direction": "vertical",
        "img_fill_val": 0,
    },
    "shear": {"type": "Shear", "level": 10, "prob": 1, "img_fill_val": 0},
    "shear down": {"type": "Shear", "level": 10, "prob": 1, "direction": "vertical", "img_fill_val": 0},
}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def ellipse(center: tuple[float, float], axes: tuple[float, float], points: int = 40) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([center[0] + axes[0] * np.cos(angles), center[1] + axes[1] * np.sin(angles)], 1).astype(np.float32)


def picture(shapes: list[tuple], size: tuple[int, int] = (80, 100), bitmaps: bool = False) -> Sample:
    """Ellipses, each painted in a channel of its own, with the centre as first keypoint and the rightmost point as
    second, which is its own mirror's leftmost: they change places in a mirror."""
    polygons = Polygons.pack([[ellipse(center, axes)] for center, axes in shapes])
    masks = polygons.rasterize(*size)
    image = np.zeros((*size, 3), np.uint8)
    for channel, mask in enumerate(masks):
        image[..., channel] = 255 * mask
    keypoints = np.array(
        [[[x, y, 2], [x + a, y, 2], [x - a, y, 2], [0, 0, 0]] for (x, y), (a, _) in shapes], np.float32
    )
    return Sample(
        image,
        image_id=1,
        image_index=0,
        original_size=size,
        boxes=polygons.bounds(),
        labels=np.arange(1, len(shapes) + 1),
        polygons=None if bitmaps else polygons,
        bitmaps=masks if bitmaps else None,
        keypoints=keypoints,
        keypoint_mirror=(0, 2, 1, 3),
    )


SHAPES = st.lists(
    st.tuples(
        st.tuples(st.floats(20, 80), st.floats(20, 60)),
        st.tuples(st.floats(10, 19), st.floats(10, 19)),
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("bitmaps", [False, True])
@pytest.mark.parametrize("name", GEOMETRIC)
@settings(max_examples=30, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 10_000))
def test_objects_stay_on_their_pixels(name, bitmaps, shapes, seed):
    """What the image shows of each ellipse is its mask; the box is around it; keypoints are where they were on it."""
    result = Compose([GEOMETRIC[name]])(picture(shapes, bitmaps=bitmaps), rng(seed))
    height, width = result.size
    masks = result.drawn()
    assert len(result.boxes) == len(result.labels) == len(masks) == len(result.keypoints)
    for box, label, mask, points in zip(result.boxes, result.labels, masks, result.keypoints):
        seen = result.image[..., label - 1] > 127
        common, either = (mask.astype(bool) & seen).sum(), (mask.astype(bool) | seen).sum()
        border = cv2.morphologyEx(seen.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)).sum()
        assert either - common <= border + 4, "the mask is not on the object"
        assert (box[:2] >= 0).all() and (box[2:] <= (width, height)).all() and (box[2:] > box[:2]).all()
        rows, columns = np.nonzero(seen)
        if len(rows) > 20:
            around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(box, around, atol=2.1)
        assert (points[3] == 0).all(), "a keypoint that was not there appeared"
        for x, y, visible in points[points[:, 2] > 0]:
            assert 0 <= x <= width and 0 <= y <= height and visible == 2
        if (points[:3, 2] > 0).all():  # centre between the two ends
            np.testing.assert_allclose(points[0, :2], points[1:3, :2].mean(axis=0), atol=1e-2)
    lost = set(range(1, len(shapes) + 1)) - set(result.labels.tolist())
    for label in lost:
        assert (result.image[..., label - 1] > 127).sum() <= 4, "an object that can be seen was dropped"


def test_mirrored_keypoints_change_places():
    sample = picture([((30, 40), (12, 10))])
    flipped = Compose([GEOMETRIC["horizontal"]])(sample, rng())
    # The point on the right was the second; in the mirror it is on the left, and the third one's name is the second's.
    np.testing.assert_allclose(flipped.keypoints[0, :, 0], [70, 82, 58, 0])
    turned = Compose([{"type": "Rotate", "level": 10, "prob": 1, "max_rotate_angle": 180}])(sample, rng())
    np.testing.assert_allclose(turned.keypoints[0, :3], [[70, 40, 2], [58, 40, 2], [82, 40, 2]], atol=1e-3)


def test_a_quarter_turn_moves_whole_pixels():
    """Pixel centres lie at .5: half a pixel off, a turned image would be blurred."""
    sample = picture([((30, 40), (12, 10))], (80, 80))
    sample.image = rng().integers(0, 256, (80, 80, 3), np.uint8)
    quarter = {"type": "Rotate", "level": 10, "prob": 1, "max_rotate_angle": 90, "random_negative_prob": 0}
    result = Compose([quarter])(sample, rng())
    np.testing.assert_array_equal(result.image, np.rot90(sample.image, -1))
    np.testing.assert_allclose(result.boxes, [[30, 18, 50, 42]], atol=1e-3)


def test_cut_at_the_border_by_hand():
    """A triangle whose right half lies outside: new corners where its sides cross the border."""
    sample = picture([((30, 40), (10, 10))])
    sample.polygons = Polygons.pack([[np.array([[0, 0], [20, 10], [0, 20]], np.float32)]])
    sample.boxes = np.array([[0, 0, 20, 20]], np.float32)
    cropped = geometry.crop(sample, 0, 0, 10, 80)
    np.testing.assert_allclose(cropped.polygons.of(0)[0], [[0, 0], [10, 5], [10, 15], [0, 20]])
    assert cropped.boxes.tolist() == [[0, 0, 10, 20]] and cropped.size == (80, 10)
    corner = geometry.crop(sample, 10, 0, 10, 80)
    np.testing.assert_allclose(corner.boxes, [[0, 5, 10, 15]])
    assert len(geometry.crop(sample, 21, 0, 10, 80).boxes) == 0
    assert (corner.keypoints[:, :, 2] == 0).all() or (corner.keypoints[..., 0] <= 10).all()


def test_what_lay_outside_stays_outside():
    """A polygon that reaches beyond the image must not appear on a larger canvas, nor be moved into the image."""
    sample = picture([((30, 40), (10, 10))])
    sample.polygons = Polygons.pack([[np.array([[-30, 30], [30, 30], [30, 50], [-30, 50]], np.float32)]])
    sample.boxes = np.array([[0, 30, 30, 50]], np.float32)
    placed = geometry.place(sample, 40, 0, 140, 80, (0, 0, 0))
    assert placed.polygons.bounds().tolist() == [[40, 30, 70, 50]]
    moved = geometry.warp(sample, np.eye(2), np.array([20, 0]), (0, 0, 0))
    assert moved.polygons.bounds().tolist() == [[20, 30, 50, 50]] and moved.boxes.tolist() == [[20, 30, 50, 50]]


def test_levels_by_hand():
    """Level 5 of 30 degrees is 15, of 250 pixels 125, of .3 is .15; the color factor is .1 + .9 = 1."""
    compose = Compose([{"type": name, "level": 5} for name in ("Rotate", "Translate", "Shear")])
    assert [transform.amount for transform in compose.transforms] == [15, 125, 0.15]
    matrix, shift = compose.transforms[0].map(90, (80, 100))
    np.testing.assert_allclose(matrix @ (100, 40) + shift, (50, 90), atol=1e-9)  # right of the centre goes below it
    assert compose.transforms[2].map(0.15, (80, 100))[0].tolist() == [[1, 0.15], [0, 1]]
    sample = picture([((30, 40), (10, 10))])
    sample.image = rng().integers(0, 256, sample.image.shape, np.uint8)
    for name in ("ColorTransform", "BrightnessTransform", "ContrastTransform"):
        same = Compose([{"type": name, "level": 5, "prob": 1}])(sample, rng()).image
        np.testing.assert_array_equal(same, sample.image)
    dark = Compose([{"type": "BrightnessTransform", "level": 0, "prob": 1}])(sample, rng()).image
    np.testing.assert_array_equal(dark, np.rint(0.1 * sample.image.astype(np.float32)).astype(np.uint8))


def test_policies_of_the_cityscapes_recipe():
    """Written as mmdetection's AugFPN recipe has them, both policies are drawn, each operation as often as it says."""
    augment = Compose([{"type": "AutoAugment", "policies": SEED_POLICIES}])
    sample = picture([((50, 40), (15, 12))], bitmaps=False)
    sample.image[:] = (10, 20, 30)
    changed = 0
    fills = set()
    for seed in range(200):
        result = augment(sample, rng(seed))
        changed += not np.array_equal(result.image, sample.image)
        fills |= {tuple(pixel) for pixel in result.image[[0, 0, -1, -1], [0, -1, 0, -1]].tolist()}
    # Policy 1: 1/2; policy 2: 1 - 1/4; together 62.5 %
    assert 100 < changed < 150 and (124, 116, 104) in fills


def test_colors_by_hand():
    image = np.array([[[200, 100, 50], [0, 0, 0]]], np.uint8)
    gray = 0.299 * 200 + 0.587 * 100 + 0.114 * 50  # 124.2 -> 124
    assert color.brightness(image, 0.5).tolist() == [[[100, 50, 25], [0, 0, 0]]]
    assert color.brightness(image, 2).tolist() == [[[255, 200, 100], [0, 0, 0]]]
    assert color.saturation(image, 0)[0, 0].tolist() == [round(gray)] * 3
    assert color.contrast(image, 0).tolist() == [[[62] * 3] * 2]
    assert color.hue(np.array([[[255, 0, 0]]], np.uint8), 120)[0, 0].argmax() == 1
    assert np.abs(color.hue(image, 360).astype(int) - image).max() <= 4


@pytest.mark.parametrize("name", ["ColorJitter", "RandomDistort"])
def test_colors_change_and_geometry_does_not(name):
    arguments = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1} if name == "ColorJitter" else {}
    sample = picture([((30, 40), (10, 10)), ((60, 40), (15, 9))])
    sample.image = rng().integers(0, 256, sample.image.shape, np.uint8)
    before = sample.image.copy()
    results = [Compose([{"type": name, **arguments}])(sample, rng(seed)) for seed in range(8)]
    assert sum(not np.array_equal(result.image, before) for result in results) >= 6
    np.testing.assert_array_equal(sample.image, before)
    assert all(result.boxes.tolist() == sample.boxes.tolist() for result in results)


def test_mixup():
    """60 x 100 black and 80 x 50 white: the canvas holds both, pixels are a share of each, objects are of both."""
    first, second = picture([((30, 30), (10, 10))], (60, 100)), picture([((20, 50), (9, 9))], (80, 50))
    first.image[:], second.image[:] = 0, 200
    result = Compose([{"type": "MixupImage"}])(first, rng(1), lambda _: second)
    share = result.image[0, 0, 0] / 200
    assert result.size == (80, 100) and 0.05 < share < 0.95 and (result.image[:, 60:] == 0).all()
    np.testing.assert_array_equal(result.boxes, np.concatenate([first.boxes, second.boxes]))
    assert len(result.polygons) == 2 and result.polygons.of(1)[0].tolist() == second.polygons.of(0)[0].tolist()
    with pytest.raises(ConfigError, match="MixupImage mixes images of a data set"):
        Compose([{"type": "MixupImage"}])(first, rng(1))


def test_mixup_ends_after_its_epochs(coco_mini):
    """PaddleX's mixup_epoch: the first epoch of two is mixed; -1, its default there, is none at all."""
    partner = picture([((60, 40), (15, 9))])
    for epochs, mixed in ((None, [2, 2, 2]), (2, [2, 2, 1]), (-1, [1, 1, 1]), (0, [1, 1, 1])):
        compose = Compose([{"type": "MixupImage", "mixup_epoch": epochs}])
        sample = picture([((30, 40), (10, 10))])
        found = [len(compose(sample, rng(), lambda _: partner, epoch).boxes) for epoch in range(3)]
        assert found == mixed, epochs
    chain = [{"type": "MixupImage", "mixup_epoch": 1}, {"type": "ResizeByShort", "short_size": 64}]
    values = ["DATA.PATH", coco_mini, "SOLVER.IMS_PER_BATCH", 1, "INPUT.TRANSFORMS", chain, "DATALOADER.NUM_WORKERS", 0]
    cfg = get_config(None, list(map(str, values)))
    dataset = build_dataset(("coco_2017_train[:8]",), cfg, training=True)
    batches = loader.train_loader(cfg, dataset, get_device("cpu"), 0, 1, 0)
    most = [int(targets.valid.sum()) for _, (_, targets) in zip(range(2 * batches.iterations_per_epoch), batches)]
    first, second = most[: batches.iterations_per_epoch], most[batches.iterations_per_epoch :]
    assert sum(second) == dataset.counts.sum() < sum(first)


def test_copy_paste_hides_what_is_below():
    below = picture([((30, 40), (15, 15)), ((70, 40), (10, 10)), ((32, 40), (3, 3))])
    over = picture([((40, 40), (15, 15))])
    over.image[over.image[..., 0] > 0] = (7, 7, 7)
    result = Compose([{"type": "CopyPaste", "prob": 1, "share": 1}])(below, rng(), lambda _: over)
    assert result.labels.tolist() == [1, 2, 1], "the small one is hidden entirely, the pasted one comes last"
    assert not (result.bitmaps[0] & result.bitmaps[2]).any()
    pasted = over.drawn()[0].astype(bool)
    assert (result.image[pasted] == 7).all()
    np.testing.assert_array_equal(result.image[~pasted], below.image[~pasted])
    np.testing.assert_array_equal(result.bitmaps[0], below.drawn()[0] & ~pasted)
    columns = np.flatnonzero(result.bitmaps[0].any(axis=0))
    assert result.boxes[0, [0, 2]].tolist() == [columns[0], columns[-1] + 1]
    assert result.boxes[1].tolist() == below.boxes[1].tolist(), "what is not hidden keeps its box"


def test_crop_reaches_its_threshold():
    sample = picture([((50, 40), (18, 15))])
    crop = Compose([{"type": "RandomCrop", "thresholds": [0.5], "allow_no_crop": False, "num_attempts": 500}])
    sizes = set()
    for seed in range(20):
        result = crop(sample, rng(seed))
        sizes.add(result.size)
        (x1, y1, x2, y2), (height, width) = result.boxes[0], result.size
        common, whole = (x2 - x1) * (y2 - y1), 36 * 30
        assert common / (whole + height * width - common) > 0.4, "IoU of the object and the part"
        assert height >= 0.2 * 80 and width >= 0.2 * 100
    assert len(sizes) > 10
    assert Compose([{"type": "RandomCrop"}])(sample.select(np.array([False])), rng()).size == sample.size


# ------------------------------------------------------------------------------------------------ configuration


def test_list_in_yaml(tmp_path):
    """It replaces the default pipeline, survives a checkpoint's text, and unknown names and values are refused."""
    file = tmp_path / "a.yaml"
    chain = [
        {"type": "AutoAugment", "policies": SEED_POLICIES},
        {"type": "Resize", "img_scale": [[2048, 800], [2048, 1024]], "keep_ratio": True},
        {"type": "RandomFlip", "flip_ratio": 0.5},
        {"type": "Pad", "size_divisor": 32},
    ]
    file.write_text(yaml.safe_dump({"INPUT": {"TRANSFORMS": json.loads(json.dumps(chain))}}))
    cfg = get_config(file)
    cfg = parse_config(dump_config(cfg), "checkpoint")
    compose = build_transforms(cfg, training=True)
    assert [type(transform).__name__ for transform in compose.transforms] == [
        "AutoAugment",
        "Resize",
        "RandomFlip",
        "Pad",
    ]
    assert compose.size_divisibility == 32 and len(compose.transforms[0].policies[1]) == 2
    result = compose(picture([((50, 40), (18, 15))]), rng())
    assert 800 <= min(result.size) <= 1024
    assert len(build_transforms(cfg, training=False).transforms) == 1
    assert len(build_transforms(get_config(), training=True).transforms) == 2


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"type": "RandomHorizontalFlp"}, "RandomHorizontalFlp.*did you mean RandomHorizontalFlip"),
        ({"prob": 1}, "unknown transform None"),
        ({"type": "RandomHorizontalFlip", "p": 1}, "RandomHorizontalFlip.*'p'.*prob"),
        ({"type": "RandomHorizontalFlip", "prob": 2}, r"must be a number in 0\.\.1, not 2"),
        ({"type": "RandomHorizontalFlip", "prob": "half"}, "not 'half'"),
        ({"type": "Rotate", "level": 11}, r"Rotate level must be a number in 0\.\.10"),
        ({"type": "Translate", "level": 1, "direction": "up"}, "horizontal, vertical, not 'up'"),
        ({"type": "AutoAugment", "policies": [[{"type": "Rotat", "level": 1}]]}, "did you mean Rotate"),
        ({"type": "AutoAugment", "policies": []}, "policies"),
        ({"type": "RandomCrop", "scaling": [0.9, 0.1]}, "scaling must be two numbers"),
        ({"type": "RandomExpand", "fill_value": [1, 2]}, "fill_value"),
        ({"type": "ResizeByShort", "short_size": 0}, "size must be"),
        ({"type": "ColorJitter", "hue": 1}, "hue"),
    ],
)
def test_bad_transform_is_refused_in_one_line(spec, words):
    with pytest.raises(ConfigError, match=words) as caught:
        Compose([spec])
    assert "\n" not in str(caught.value)


def test_every_transform_builds_with_paddlex_defaults():
    needed = {"ResizeShortSide", "Resize", "Pad", "AutoAugment", "Rotate", "Translate", "Shear"}
    needed |= {"ColorTransform", "BrightnessTransform", "ContrastTransform"}
    for name in TRANSFORMS.keys() - needed:
        Compose([{"type": name}])


def test_normalize_and_padding_leave_it_to_the_model():
    """PaddleX's pipeline: the pixels stay 0..255, and what Normalize says must be what the model does."""
    chain = [{"type": "Normalize"}, {"type": "ResizeByShort"}, {"type": "Padding", "coarsest_stride": 32}]
    assert Compose(chain).size_divisibility == 32
    with pytest.raises(ConfigError, match=r"Normalize needs INPUT.PIXEL_MEAN \[0.485, 0.456, 0.406\]"):
        build_transforms(get_config(None, ["INPUT.TRANSFORMS", str(chain)]), training=True)
    rgb = ["INPUT.PIXEL_MEAN", "[0.485, 0.456, 0.406]", "INPUT.PIXEL_STD", "[0.229, 0.224, 0.225]"]
    rgb += ["INPUT.TO_BGR255", "False"]
    compose = build_transforms(get_config(None, ["INPUT.TRANSFORMS", str(chain), *rgb]), training=True)
    sample = picture([((50, 40), (18, 15))])
    assert compose(sample, rng()).image.dtype == np.uint8
    theirs = Normalize([123.675, 116.28, 103.53], [58.395, 57.12, 57.375], to_rgb=True)
    theirs.check(get_config(None, rgb))
    Normalize([102.9801, 115.9465, 122.7717], [1.0, 1.0, 1.0], to_rgb=False).check(get_config())
    assert Padding(4)(sample, rng()) is sample


def test_list_through_the_loader(coco_mini):
    """Two images mixed, pasted and distorted on real data; workers do not change what comes out."""
    chain = [
        {"type": "MixupImage", "prob": 0.5},
        {"type": "CopyPaste", "prob": 0.5, "transforms": [{"type": "LargeScaleJitter", "size": 400, "min_scale": 0.5}]},
        {"type": "RandomExpand", "ratio": 2},
        {"type": "RandomCrop"},
        {"type": "AutoAugment", "policies": SEED_POLICIES},
        {"type": "RandomDistort"},
        {"type": "ResizeByShort", "short_size": [96, 128], "max_size": 200},
        {"type": "Padding", "coarsest_stride": 64},
    ]
    values = ["DATA.PATH", str(coco_mini), "MODEL.MASK_ON", "True", "SOLVER.IMS_PER_BATCH", "8"]
    batches = []
    for workers in ("0", "2"):
        cfg = get_config(None, [*values, "INPUT.TRANSFORMS", str(chain), "DATALOADER.NUM_WORKERS", workers])
        dataset = build_dataset(("coco_2017_train",), cfg, training=True)
        batches.append(
            [batch for batch, _ in zip(loader.train_loader(cfg, dataset, get_device("cpu"), 0, 1, 0), "abc")]
        )
    for (images, targets), (again, targets_again) in zip(*batches):
        assert (images.pixels == again.pixels).all() and (targets.boxes == targets_again.boxes).all()
        assert all(side % 64 == 0 for side in images.pixels.shape[2:])
        boxes = targets.boxes[targets.valid]
        assert len(boxes) and (boxes[:, 2:] > boxes[:, :2]).all()


def test_join_keeps_both_forms_of_masks():
    polygons, bitmaps = picture([((30, 40), (10, 10))]), picture([((60, 40), (15, 9))], bitmaps=True)
    both = polygons.join(bitmaps)
    assert both.polygons is None and both.bitmaps.shape == (2, 80, 100) and both.keypoints.shape == (2, 4, 3)
    none = replace(polygons, polygons=None).join(replace(bitmaps, bitmaps=None))
    assert none.drawn() is None and len(none.boxes) == 2
