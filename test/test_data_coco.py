"""COCO files and images: what is read, what is refused, what is dropped and counted."""

from __future__ import annotations

import io
import json
import logging
import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.data import catalog
from maskrcnn_benchmark.data.coco import CocoDataset
from maskrcnn_benchmark.data.images import read_image
from maskrcnn_benchmark.errors import ConfigError, DataError

SQUARE = [2, 3, 12, 3, 12, 8, 2, 8]


def annotation(number: int = 1, **changes) -> dict:
    """A sound annotation of a 20 x 30 image; a change to None removes the key."""
    sound = {"id": number, "image_id": 1, "category_id": 7, "bbox": [2, 3, 10, 5], "area": 50, "iscrowd": 0}
    sound |= {"segmentation": [SQUARE]} | changes
    return {key: value for key, value in sound.items() if value is not None}


def content(*annotations: dict, **changes) -> dict:
    images = [{"id": 1, "file_name": "one.png", "height": 20, "width": 30}]
    categories = [{"id": 90, "name": "ninety"}, {"id": 0, "name": "zero"}, {"id": 7, "name": "seven"}]
    return {"images": images, "annotations": list(annotations), "categories": categories} | changes


@pytest.fixture
def open_coco(tmp_path):
    """Writes a COCO file beside one image of 20 x 30 and opens it."""

    def call(data, training: bool = True, masks: bool = True) -> CocoDataset:
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (30, 20), (10, 20, 30)).save(tmp_path / "images" / "one.png")
        (tmp_path / "a.json").write_text(data if isinstance(data, str) else json.dumps(data))
        return CocoDataset(tmp_path / "a.json", tmp_path / "images", training, masks)

    return call


# ---------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_agrees_with_pycocotools(coco_mini, split, capsys):
    """Every image, box, label and mask of real COCO, against the reference reader."""
    file = coco_mini / "annotations" / f"instances_{split}.json"
    reference = COCO(str(file))
    dataset = CocoDataset(file, coco_mini / split, training=True)
    assert len(dataset) == {"train2017": 80, "val2017": 79}[split]
    assert dataset.image_ids == list(reference.imgs)
    assert dataset.category_ids == sorted(reference.cats)
    assert dataset.category_names == [reference.cats[i]["name"] for i in dataset.category_ids]
    assert dataset.num_classes == 81
    assert dataset.warnings == {}
    for index, image_id in enumerate(dataset.image_ids):
        expected = reference.loadAnns(reference.getAnnIds(imgIds=[image_id], iscrowd=False))
        sample = dataset.load(index)
        info = reference.imgs[image_id]
        assert sample.size == sample.original_size == (info["height"], info["width"])
        boxes = np.array([a["bbox"] for a in expected], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(sample.boxes, boxes, atol=1e-3)
        assert [dataset.category_ids[label - 1] for label in sample.labels] == [a["category_id"] for a in expected]
        for a in expected:  # points are float32 here
            a["segmentation"] = [np.float32(polygon).tolist() for polygon in a["segmentation"]]
        masks = np.array([reference.annToMask(a) for a in expected]).reshape(-1, *sample.size)
        np.testing.assert_array_equal(sample.polygons.rasterize(*sample.size), masks)
        every = {a["id"]: a for a in dataset.annotations(index)}
        theirs = {a["id"]: a for a in reference.loadAnns(reference.getAnnIds(imgIds=[image_id]))}
        assert {i: (a["iscrowd"], a["category_id"]) for i, a in every.items()} == {
            i: (a["iscrowd"], a["category_id"]) for i, a in theirs.items()
        }
        for i, a in every.items():
            np.testing.assert_allclose(a["bbox"], theirs[i]["bbox"], atol=1e-3)
            assert a["area"] == theirs[i]["area"]
            if a["iscrowd"]:
                assert (reference.annToMask(a) == reference.annToMask(theirs[i])).all()


def test_images_without_objects_are_kept(coco_mini):
    """The keypoint file names persons only: 44 of its images have none. Its further keys come back."""
    file = coco_mini / "annotations" / "person_keypoints_train2017.json"
    dataset = CocoDataset(file, coco_mini / "train2017", training=True)
    assert (len(dataset), (dataset.counts == 0).sum()) == (80, 44)
    empty = dataset.load(int(np.flatnonzero(dataset.counts == 0)[0]))
    assert empty.boxes.shape == (0, 4) and empty.labels.shape == (0,) and len(empty.polygons) == 0
    source = {a["id"]: a for a in json.loads(file.read_text())["annotations"]}
    kept = [a for index in range(len(dataset)) for a in dataset.annotations(index)]
    assert len(kept) == 172
    assert all(a["keypoints"] == source[a["id"]]["keypoints"] for a in kept)


def test_pickles_without_the_json(coco_mini):
    """A worker gets packed arrays, not the annotations' dicts."""
    file = coco_mini / "annotations" / "instances_train2017.json"
    dataset = CocoDataset(file, coco_mini / "train2017", training=True)
    pickled = pickle.dumps(dataset)
    packed = sum(value.numel() * value.element_size() for value in vars(dataset._objects).values())
    assert len(pickled) < packed + 11_000
    again = pickle.loads(pickled)
    assert again.annotations(3) == dataset.annotations(3)


# ------------------------------------------------------------------------------------------ annotations


def test_category_ids_with_gaps_and_zero(open_coco):
    anns = [annotation(i, category_id=c) for i, c in enumerate((90, 0, 7, 0), start=1)]
    dataset = open_coco(content(*anns))
    assert dataset.category_ids == [0, 7, 90] and dataset.category_names == ["zero", "seven", "ninety"]
    assert dataset.num_classes == 4
    assert dataset.load(0).labels.tolist() == [3, 1, 2, 1]
    assert [a["category_id"] for a in dataset.annotations(0)] == [90, 0, 7, 0]


def test_a_class_without_objects_is_a_warning(open_coco, caplog):
    """A crowd is none to train on. In a file to test on it says nothing."""
    data = content(annotation(1), annotation(2, category_id=90, iscrowd=1))
    open_coco(data)
    assert [r.getMessage().split(": ", 1)[1] for r in caplog.records] == [
        "no object to train on of 2 categories: zero, ninety"
    ]
    caplog.clear()
    open_coco(data, training=False)
    assert not caplog.records


def test_annotations_gives_back_what_the_file_says(open_coco):
    sound = annotation(4, occ=1, truncate=0, direct="left")
    without_area = annotation(5, area=None, iscrowd=None)
    assert open_coco(content(sound, without_area)).annotations(0) == [sound, without_area | {"iscrowd": 0}]
    without_mask = open_coco(content(sound), masks=False).annotations(0)
    assert without_mask == [{k: v for k, v in sound.items() if k != "segmentation"}]


def test_crowds_are_not_trained_on(open_coco):
    crowd = annotation(1, iscrowd=1, segmentation={"size": [20, 30], "counts": [100, 200, 300]})
    dataset = open_coco(content(crowd, annotation(2, category_id=0)))
    assert dataset.counts.tolist() == [1] and dataset.load(0).labels.tolist() == [1]
    assert dataset.load(0).bitmaps is None
    assert [a["id"] for a in dataset.annotations(0)] == [2, 1]


def test_without_training_there_are_no_targets(open_coco):
    dataset = open_coco(content(annotation()), training=False)
    assert len(dataset.load(0).boxes) == 0 and dataset.load(0).polygons is None
    assert len(dataset.annotations(0)) == 1
    assert len(open_coco(content(), training=False)) == 1


def test_rle_uncompressed_compressed_and_polygon_are_the_same_mask(open_coco):
    bitmap = np.zeros((20, 30), np.uint8)
    bitmap[3:8, 2:12] = 1
    counts = [int(n) for n in np.diff(np.flatnonzero(np.diff(np.r_[2, bitmap.T.ravel(), 2])), prepend=0)][1:]
    assert sum(counts) == 600
    compressed = coco_mask.encode(np.asfortranarray(bitmap))["counts"].decode()
    rles = [annotation(i, segmentation={"size": [20, 30], "counts": c}) for i, c in ((1, counts), (2, compressed))]
    sample = open_coco(content(*rles, annotation(3), annotation(4, segmentation=SQUARE))).load(0)
    assert sample.polygons is None and sample.bitmaps.dtype == np.uint8
    for drawn in sample.bitmaps:
        np.testing.assert_array_equal(drawn, bitmap)


@pytest.mark.parametrize(
    "rle",
    [
        {"size": [20, 30], "counts": "0" + "o0" * 400},  # longer than the image
        {"size": [20, 30], "counts": "\x01\xe9"},  # no characters of an RLE: pycocotools reads on for ever
        {"size": [20, 30], "counts": "`"},  # the last character says that another follows
        {"size": [20, 30], "counts": [600, -1]},
        {"counts": [600]},
    ],
)
def test_a_damaged_rle_is_dropped_and_counted(open_coco, rle):
    dataset = open_coco(content(annotation(30), annotation(31, segmentation=rle)))
    assert dataset.warnings == {"bad_rle": [31]}
    assert len(dataset.load(0).boxes) == 1


@pytest.mark.parametrize(
    ("segmentation", "box"),
    [([SQUARE, [20, 1, 25, 1, 25, 19]], [2, 1, 25, 19]), ({"size": [20, 30], "counts": [45, 5, 550]}, [2, 5, 3, 10])],
)
def test_missing_bbox_comes_from_the_segmentation(open_coco, segmentation, box):
    dataset = open_coco(content(annotation(bbox=None, segmentation=segmentation)))
    assert dataset.load(0).boxes.tolist() == [box]
    assert dataset.warnings == {"missing_bbox": [1]}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("zero_area", {"bbox": [2, 3, 0, 5]}),
        ("zero_area", {"bbox": [2, 3, 4, -1]}),
        ("not_finite", {"bbox": [2, float("nan"), 4, 4]}),
        ("not_finite", {"bbox": [2, 3, float("inf"), 4]}),
        ("not_finite", {"segmentation": [[2, 3, float("nan"), 3, 12, 8]]}),
        ("outside", {"bbox": [40, 3, 5, 5]}),
        ("no_mask", {"segmentation": []}),
        ("no_mask", {"segmentation": None}),
        ("bad_rle", {"segmentation": {"size": [30, 20], "counts": [600]}}),
        ("bad_rle", {"segmentation": {"size": [20, 30], "counts": [599]}}),
        ("bad_rle", {"segmentation": {"size": [20, 30], "counts": [700, -100]}}),
    ],
)
def test_unusable_annotation_is_dropped_and_counted(open_coco, caplog, kind, changes):
    anns = [annotation(i, **changes) for i in (11, 12, 13, 14)]
    with caplog.at_level(logging.WARNING):
        dataset = open_coco(content(annotation(1), *anns))
    assert dataset.counts.tolist() == [1] and len(dataset.load(0).boxes) == 1
    assert dataset.warnings == {kind: [11, 12, 13, 14]}
    (record,) = [record for record in caplog.records if "annotations" in record.getMessage()]
    assert "4 annotations" in record.getMessage() and "11, 12, 13, ..." in record.getMessage()


@pytest.mark.parametrize("polygon", [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [1, 2], []])
def test_bad_polygon_is_dropped(open_coco, polygon):
    dataset = open_coco(content(annotation(5, segmentation=[polygon, SQUARE]), annotation(6, segmentation=[polygon])))
    assert dataset.warnings == {"bad_polygon": [5, 6], "no_mask": [6]}
    (kept,) = dataset.load(0).polygons.of(0)
    assert kept.ravel().tolist() == SQUARE


def test_without_masks_segmentations_do_not_matter(open_coco):
    dataset = open_coco(content(annotation(1, segmentation=[[1, 2]]), annotation(2, segmentation=None)), masks=False)
    assert dataset.counts.tolist() == [2] and dataset.warnings == {}
    assert dataset.load(0).polygons is None and dataset.load(0).bitmaps is None


def test_box_is_clipped(open_coco):
    dataset = open_coco(content(annotation(1, bbox=[-5, 3, 10, 30]), annotation(2, bbox=[20, 10, 10.5, 5])))
    assert dataset.load(0).boxes.tolist() == [[0, 3, 5, 20], [20, 10, 30, 15]]
    assert dataset.warnings == {"clipped": [1]}, "half a pixel is rounding, not worth a word"


def test_duplicate_annotation_id_is_a_warning(open_coco):
    dataset = open_coco(content(annotation(9), annotation(9)))
    assert dataset.counts.tolist() == [2] and dataset.warnings == {"duplicate_id": [9]}


IMAGE = {"id": 1, "file_name": "one.png", "height": 20, "width": 30}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('{"images": [', "not valid JSON"),
        ("[]", "'images'"),
        (json.dumps({"images": [], "categories": []}), "'annotations'"),
        (json.dumps(content(categories={"1": "a"})), "'categories'"),
        (json.dumps(content(images=["one.png"])), "'images'"),
        (json.dumps(content(images=[])), "empty"),
        (json.dumps(content(categories=[])), "categories is empty"),
        (json.dumps(content(images=[IMAGE, IMAGE])), "image id 1 is given twice"),
        (json.dumps(content(images=[IMAGE | {"id": "a"}])), r"images\[0\]"),
        (json.dumps(content(images=[IMAGE | {"height": 0}])), "image id 1.*height"),
        (json.dumps(content(categories=[{"id": 7, "name": "a"}] * 2)), "category id 7 is given twice"),
        (json.dumps(content(categories=[{"id": 7}])), r"categories\[0\]"),
        (json.dumps(content(annotation(8, category_id=3))), "annotation id 8.*category id 3"),
        (json.dumps(content(annotation(8, image_id=3))), "annotation id 8.*image id 3"),
        (json.dumps(content(annotation(None))), r"annotations\[0\] needs id"),
        (json.dumps(content(annotation(2**70))), r"annotations\[0\] needs id"),
        (json.dumps(content(annotation(8, bbox=[1, 2, 3]))), "annotation id 8.*bbox"),
        (json.dumps(content(annotation(8, bbox=["1", "2", "3", "4"]))), "annotation id 8.*bbox"),
        (json.dumps(content(annotation(8, segmentation="abc"))), "annotation id 8.*segmentation"),
        (json.dumps(content(annotation(8, area="large"))), "annotation id 8.*area"),
        (json.dumps(content()), "none of its 0 annotations"),
        (json.dumps(content(annotation(8, iscrowd=1))), "none of its 1 annotations"),
        (json.dumps(content(images=[IMAGE, IMAGE | {"id": 2, "file_name": "b/two.png"}])), "1 of the 2 .* b/two.png"),
    ],
)
def test_bad_file_is_refused_in_one_line(open_coco, data, words):
    with pytest.raises(DataError, match=words) as caught:
        open_coco(data)
    assert "\n" not in str(caught.value) and "a.json" in str(caught.value)


def test_missing_annotation_file(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json"):
        CocoDataset(tmp_path / "nowhere.json", tmp_path, training=True)


# ----------------------------------------------------------------------------------------------- images


def picture(height: int = 24, width: int = 40) -> np.ndarray:
    """Smooth, and without symmetry: every turn and mirror of it differs."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x * y) * 255 // (height * width)], axis=2).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, suffix):
    """The annotation file's size decides; PIL's own transposition is the reference."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(picture()).save(path, exif=exif, quality=100, subsampling=0)
    stored, upright = picture(), np.asarray(ImageOps.exif_transpose(Image.open(path)))

    def assert_same(image, expected):
        assert image.shape == expected.shape and image.flags.c_contiguous
        assert np.abs(image.astype(int) - expected).max() <= 6

    assert_same(read_image(path, size=(24, 40)), stored)
    assert_same(read_image(path), upright)
    if orientation >= 5:
        assert_same(read_image(path, size=(40, 24)), upright)
    else:
        with pytest.raises(DataError, match=r"id 5.*24 x 40.*40 x 24"):
            read_image(path, size=(40, 24), image_id=5)


def test_size_that_differs_either_way_is_an_error(open_coco):
    images = [IMAGE | {"height": 21}]
    with pytest.raises(DataError, match=r"one.png \(image id 1\) is 20 x 30 .* 21 x 30"):
        open_coco(content(annotation(), images=images)).load(0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_no_orientation(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0garbage", quality=100)
    assert read_image(tmp_path / "a.jpg").shape == (24, 40, 3)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp"])
@pytest.mark.parametrize("kept", [0, 0.3, 0.6, 0.98])
def test_truncated_image_names_file_and_id(tmp_path, suffix, kept):
    whole = cv2.imencode(suffix, picture(240, 320))[1].tobytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole)
    read_image(path)
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(DataError, match=rf"cut\{suffix} \(image id 77\)") as caught:
        read_image(path, image_id=77)
    assert "\n" not in str(caught.value)


def test_jpeg_with_bytes_after_its_end_is_whole(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, "JPEG")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue() + b"\0\0\n")
    assert read_image(tmp_path / "a.jpg").shape == (24, 40, 3)


@pytest.mark.parametrize("data", [b"GIF89a is no image", b"<html>not found</html>"])
def test_what_is_no_image(tmp_path, data):
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.jpg"):
        read_image(tmp_path / "a.jpg")


def test_missing_and_unreadable_file(tmp_path):
    for path in (tmp_path / "none.jpg", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_image(path)


@pytest.mark.parametrize("mode", ["gray", "gray16", "rgba", "rgb16", "palette"])
def test_other_pixel_formats_become_8_bit_rgb(tmp_path, mode):
    rgb, path = picture(), tmp_path / "a.png"
    gray = rgb[..., 0]
    if mode == "palette":
        Image.fromarray(rgb).quantize(256).save(path)
    else:
        stored = {
            "gray": gray,
            "gray16": gray.astype(np.uint16) * 257,
            "rgba": np.dstack([rgb[..., ::-1], gray]),
            "rgb16": rgb[..., ::-1].astype(np.uint16) * 257,
        }[mode]
        assert cv2.imwrite(str(path), stored)
    image = read_image(path)
    expected = np.repeat(gray[..., None], 3, axis=2) if mode.startswith("gray") else rgb
    assert image.dtype == np.uint8 and image.shape == rgb.shape
    assert np.abs(image.astype(int) - expected).max() <= (24 if mode == "palette" else 1)


def test_names_beyond_ascii(tmp_path):
    directory = tmp_path / "数据"
    directory.mkdir()
    Image.fromarray(picture()).save(directory / "图.jpg", quality=100)
    data = content(annotation(), images=[{"id": 1, "file_name": "图.jpg", "height": 24, "width": 40}])
    (directory / "标注.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    assert CocoDataset(directory / "标注.json", directory, training=True).load(0).size == (24, 40)


# ---------------------------------------------------------------------------------------------- catalogue


def config(path: Path | str = "", *overrides: str):
    return get_config(None, ["DATA.PATH", str(path), *overrides])


def test_catalogue_finds_coco(coco_mini):
    cfg = config(coco_mini)
    dataset = catalog.build_dataset(("coco_2017_train",), cfg, training=True)
    assert len(dataset) == 80 and not dataset.masks
    catalog.check_num_classes(cfg, dataset)
    with pytest.raises(ConfigError, match=r"MODEL.ROI_BOX_HEAD.NUM_CLASSES is 2, .* 80 categories .* set it to 81"):
        catalog.check_num_classes(config(coco_mini, "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "2"), dataset)


def test_several_data_sets_become_one(coco_mini):
    cfg = config(coco_mini)
    both = catalog.build_dataset(("coco_2017_train", "coco_2017_val"), cfg, training=True)
    val = catalog.build_dataset(("coco_2017_val",), cfg, training=True)
    assert len(both) == 159 == len(both.image_ids) == len(both.sizes) == len(both.counts)
    sample, alone = both.load(80 + 5), val.load(5)
    assert (sample.image_index, sample.image_id) == (85, val.image_ids[5]) == (85, both.image_ids[85])
    np.testing.assert_array_equal(sample.boxes, alone.boxes)
    assert both.annotations(85) == val.annotations(5)
    assert both.load(79).image_id == both.image_ids[79] and both.load(0).image_index == 0


def test_categories_must_agree(tmp_path, open_coco, monkeypatch):
    monkeypatch.setattr(catalog, "CATALOG", dict(catalog.CATALOG))
    open_coco(content(annotation()))
    other = [{"id": 0, "name": "zero"}, {"id": 7, "name": "acht"}, {"id": 90, "name": "ninety"}]
    (tmp_path / "b.json").write_text(json.dumps(content(annotation(), categories=other)))
    catalog.add("mine_a", tmp_path / "images", tmp_path / "a.json")
    catalog.add("mine_b", tmp_path / "images", tmp_path / "b.json")
    catalog.add("mine_b", tmp_path / "images", tmp_path / "b.json")
    assert len(catalog.build_dataset(("mine_a", "mine_a"), config(), training=True)) == 2
    with pytest.raises(DataError, match=r"a\.json .*b\.json differ in 1 categories.* id 7: 'seven' .* 'acht'"):
        catalog.build_dataset(("mine_a", "mine_b"), config(), training=True)
    with pytest.raises(ConfigError, match=r"mine_a.* taken"):
        catalog.add("mine_a", tmp_path / "images", tmp_path / "b.json")


def test_unknown_name_and_missing_directory(tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean coco_2017_train\?.*coco_2014_minival"):
        catalog.build_dataset(("coco_2017_trian",), config(tmp_path), training=True)
    with pytest.raises(ConfigError, match="no data set"):
        catalog.build_dataset((), config(tmp_path), training=True)
    layout = r"DIR/annotations/instances_train2017.json and DIR/train2017/.*DATA.PATH or --data_path"
    with pytest.raises(DataError, match=rf"DATA.PATH is empty.*{layout}"):
        catalog.build_dataset(("coco_2017_train",), config(), training=True)
    with pytest.raises(DataError, match=rf"instances_train2017.json does not exist.*{layout}"):
        catalog.build_dataset(("coco_2017_train",), config(tmp_path), training=True)


def test_missing_images_are_found_before_training(tmp_path, coco_mini):
    shutil.copytree(coco_mini / "annotations", tmp_path / "annotations")
    (tmp_path / "train2017").mkdir()
    with pytest.raises(DataError, match=r"80 of the 80 images .* first is 000000493652.jpg"):
        catalog.build_dataset(("coco_2017_train",), config(tmp_path), training=True)
