"""Every format against cases worked by hand; what the configuration and the tool make of them."""

from __future__ import annotations

import base64
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.data import catalog, cityscapes, formats, shapes, voc
from maskrcnn_benchmark.data.content import polygon_area, split_instances
from maskrcnn_benchmark.data.split import split_images, write_split
from maskrcnn_benchmark.errors import ConfigError, DataError, UserError
from maskrcnn_benchmark.evaluation.coco import evaluate

ROOT = Path(__file__).resolve().parents[1]


def picture(path: Path, size: tuple[int, int] = (40, 60)) -> None:
    """A noise image of (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (*size, 3), np.uint8)).save(path)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def config(root: Path, *overrides: str):
    return get_config(None, ["DATA.PATH", str(root), "MODEL.MASK_ON", "True", *overrides])


def build(name: str, root: Path, training: bool = True):
    return catalog.build_dataset((name,), config(root), training)


def decoded(annotation: dict) -> np.ndarray:
    return coco_mask.decode(annotation["segmentation"])


# ---------------------------------------------------------------------------------------------- instance maps


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_split_instances_is_what_pycocotools_encodes(height, width, seed):
    instance_map = np.random.default_rng(seed).integers(0, 5, (height, width)).astype(np.int32)
    masks = split_instances(instance_map, (0, 3))
    assert set(masks) == set(np.unique(instance_map)) - {0, 3}
    for value, mask in masks.items():
        expected = coco_mask.encode(np.asfortranarray(instance_map == value))
        assert mask.rle == {"size": [height, width], "counts": expected["counts"].decode()}
        assert mask.area == (instance_map == value).sum() and type(mask.area) is int
        assert mask.bbox == coco_mask.toBbox(expected).tolist()


@pytest.mark.parametrize("value", [0, 7])
def test_split_instances_of_one_colour(value):
    masks = split_instances(np.full((3, 4), value, np.uint8))
    assert [mask.bbox for mask in masks.values()] == ([[0, 0, 4, 3]] if value else [])


# ---------------------------------------------------------------------------------------------- shapes


@settings(max_examples=60, deadline=None)
@given(st.floats(1, 500), st.floats(1, 500), st.floats(-7, 7))
def test_ellipse_keeps_to_its_curve_and_area(rx, ry, angle):
    points = shapes.ellipse(30, 40, rx, ry, angle) - (30, 40)
    turned = points @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose((turned / (rx, ry)) ** 2 @ (1, 1), 1, rtol=1e-9)
    middles = (turned + np.roll(turned, -1, axis=0)) / 2 / (rx, ry)
    assert ((1 - np.linalg.norm(middles, axis=1)) * max(rx, ry)).max() < 0.1001
    assert polygon_area(points) == pytest.approx(np.pi * rx * ry, rel=0.03)


def test_ellipse_turns_from_x_towards_y():
    points = shapes.ellipse(0, 0, 10, 1, np.pi / 4)
    np.testing.assert_allclose(points[0], [7.0710678, 7.0710678])


def test_polygon_area():
    assert polygon_area(shapes.rectangle(1, 2, 3, 4)) == 12
    assert polygon_area(np.array([[0, 0], [0, 10], [4, 0]])) == 20


# ---------------------------------------------------------------------------------------------- VIA

# What seed documents of the field show: version 1, one polygon, no attribute
POLYGON = {"name": "polygon", "all_points_x": [10, 30, 30, 10, 10], "all_points_y": [5, 5, 15, 15, 5]}


def via_entry(filename: str, regions: object) -> dict:
    return {
        "base64_img_data": "",
        "file_attributes": {},
        "filename": filename,
        "fileref": "",
        "size": 1,
        "regions": regions,
    }


def region(shape: dict, **attributes: object) -> dict:
    return {"region_attributes": attributes, "shape_attributes": shape}


def test_via_1_without_attributes(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / "train" / name)
    entries = {"a.jpg1": via_entry("a.jpg", {"0": region(POLYGON)}), "b.jpg1": via_entry("b.jpg", {})}
    write(tmp_path / "train" / "via_region_data.json", entries)
    dataset = build("via://train/via_region_data.json?category=balloon", tmp_path)
    assert dataset.category_names == ["balloon"] and dataset.counts.tolist() == [1, 0]
    sample = dataset.load(0)
    assert sample.size == (40, 60) and sample.labels.tolist() == [1]
    assert sample.boxes.tolist() == [[10, 5, 30, 15]]
    assert dataset.annotations(0)[0]["area"] == 200
    assert sample.polygons.rasterize(40, 60)[0, 5:15, 10:30].all()
    assert build("via://train/via_region_data.json", tmp_path).category_names == ["object"]


def test_via_2_project_with_every_shape(tmp_path, caplog):
    picture(tmp_path / "images" / "图.png")
    drawn = [
        (POLYGON, {"kind": "cat"}),
        ({"name": "rect", "x": 1, "y": 2, "width": 10, "height": 20}, {"kind": "dog"}),
        ({"name": "circle", "cx": 20, "cy": 20, "r": 10}, {"kind": "cat"}),
        ({"name": "ellipse", "cx": 30, "cy": 20, "rx": 10, "ry": 5, "theta": np.pi / 2}, {"kind": "cat"}),
        (POLYGON | {"name": "polyline"}, {"kind": {"dog": True, "cat": False}}),
        ({"name": "point", "cx": 3, "cy": 4}, {"kind": "cat"}),
        (POLYGON | {"all_points_x": [1, 2], "all_points_y": [3, 4]}, {"kind": "cat"}),
        (POLYGON, {"kind": ""}),
    ]
    project = {
        "_via_settings": {},
        "_via_attributes": {"region": {"kind": {"type": "radio", "options": {"zebra": "", "dog": "", "cat": ""}}}},
        "_via_img_metadata": {"图.png5": via_entry("图.png", [region(s, **a) for s, a in drawn])},
    }
    write(tmp_path / "annotations" / "project.json", project)
    dataset = build("via://annotations/project.json?images=../images", tmp_path)
    assert dataset.category_names == ["zebra", "dog", "cat"], "the project's options, in their order"
    assert dataset.load(0).labels.tolist() == [3, 2, 3, 3, 2]
    boxes = dataset.load(0).boxes
    np.testing.assert_allclose(boxes[1], [1, 2, 11, 22])
    np.testing.assert_allclose(boxes[2], [10, 10, 30, 30], atol=0.1)
    np.testing.assert_allclose(boxes[3], [25, 10, 35, 30], atol=0.1)  # turned by a right angle
    assert "2 left out: a region of fewer than three points" in caplog.text
    assert "1 left out: a region without 'kind'" in caplog.text and "region 7 of 图.png" in caplog.text


def test_via_asks_which_attribute(tmp_path):
    picture(tmp_path / "a.jpg")
    file = write(tmp_path / "v.json", {"a": via_entry("a.jpg", [region(POLYGON, colour="red", kind="cat")])})
    with pytest.raises(DataError, match=r"colour, kind.*attribute="):
        formats.read(f"via://{file}")
    assert formats.read(f"via://{file}?attribute=kind").content["categories"] == [{"id": 1, "name": "cat"}]
    assert formats.read(f"via://{file}?attribute=kind&classes=dog,cat").content["annotations"][0]["category_id"] == 2
    with pytest.raises(DataError, match=r"a\.jpg.*'cat'.*dog"):
        formats.read(f"via://{file}?attribute=kind&classes=dog")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "not a VIA file"),
        ({}, "not a VIA file"),
        ({"a": {"x": 1}}, "not a VIA file"),
        ({"a": via_entry("a.jpg", [region({"name": "star"})])}, "region 0 of a.jpg is damaged.*star"),
        ({"a": via_entry("a.jpg", [{"region_attributes": {}}])}, "region 0 of a.jpg is damaged.*shape_attributes"),
        ({"a": via_entry("a.jpg", [region({"name": "rect", "x": "?"})])}, "region 0 of a.jpg is damaged"),
        ({"a": via_entry("lost.jpg", [region(POLYGON)])}, "lost.jpg cannot be read: No such file"),
    ],
)
def test_via_damaged(tmp_path, content, message):
    picture(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=message):
        formats.read(f"via://{write(tmp_path / 'v.json', content)}")


def test_via_takes_an_image_as_browsers_show_it(tmp_path):
    """EXIF orientation 6: stored 40 x 60, shown 60 x 40."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    write(tmp_path / "v.json", {"a": via_entry("a.jpg", [region(POLYGON)])})
    assert build("via://v.json", tmp_path).load(0).image.shape == (60, 40, 3)


# ---------------------------------------------------------------------------------------------- mask images


def test_penn_fudan(tmp_path):
    root = tmp_path / "PennFudanPed"
    instance_map = np.zeros((40, 60), np.uint8)
    instance_map[5:15, 10:20], instance_map[10:20, 30:50], instance_map[12:14, 35:40] = 1, 2, 0
    for name in ("FudanPed00001", "PennPed00002"):
        picture(root / "PNGImages" / f"{name}.png")
    save(root / "PedMasks" / "FudanPed00001_mask.png", instance_map)
    save(root / "PedMasks" / "PennPed00002_mask.png", np.zeros((40, 60), np.uint8))
    dataset = build("penn_fudan://PennFudanPed", tmp_path)
    assert dataset.category_names == ["pedestrian"] and dataset.counts.tolist() == [2, 0]
    sample = dataset.load(0)
    assert sample.boxes.tolist() == [[10, 5, 20, 15], [30, 10, 50, 20]]
    np.testing.assert_array_equal(sample.bitmaps, [instance_map == 1, instance_map == 2])  # with its hole
    assert [a["area"] for a in dataset.annotations(0)] == [100, 190]
    found = [a | {"score": 0.9} for index in range(2) for a in dataset.annotations(index)]
    scores = evaluate(dataset.ground_truth(), found, image_ids=dataset.image_ids)
    assert scores["bbox"]["AP"] == scores["segm"]["AP"] == 1, "the directory itself is what to evaluate against"
    for part in ("[1:]", "[-1:]"):
        assert build(f"penn_fudan://PennFudanPed{part}", tmp_path, training=False).image_ids == [2]


def test_masks_in_colours(tmp_path, caplog):
    pixels = np.zeros((10, 12, 3), np.uint8)
    pixels[1:3, 1:3], pixels[5:9, 2:4], pixels[0, 0] = (255, 0, 0), (0, 255, 0), (255, 255, 255)
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / "rgb" / name, (10, 12))
    save(tmp_path / "ids" / "a.png", pixels)
    white = 255 * 65536 + 255 * 256 + 255
    source = formats.read(f"masks://{tmp_path}?images=rgb&masks=ids&category=cell&ignore={white}")
    assert [a["bbox"] for a in source.content["annotations"]] == [[2, 5, 2, 4], [1, 1, 2, 2]]
    assert source.content["categories"] == [{"id": 1, "name": "cell"}]
    assert [image["file_name"] for image in source.content["images"]] == ["a.jpg"]
    assert "1 left out: a picture has no mask" in caplog.text and "b.jpg" in caplog.text


@pytest.mark.parametrize("mode", ["palette", "16 bit"])
def test_masks_of_other_kinds(tmp_path, mode):
    instance_map = np.zeros((10, 12), np.uint16)
    instance_map[2:5, 3:9] = 300 if mode == "16 bit" else 9
    picture(tmp_path / "images" / "a.jpg", (10, 12))
    image = Image.fromarray(instance_map if mode == "16 bit" else instance_map.astype(np.uint8))
    if mode == "palette":
        image.putpalette([0, 0, 0] * 9 + [0, 0, 0] + [1, 2, 3])  # colour 9 is black, too: the index counts
        assert image.mode == "P"
    (tmp_path / "masks").mkdir()
    image.save(tmp_path / "masks" / "a.png")
    (annotation,) = formats.read(f"masks://{tmp_path}").content["annotations"]
    np.testing.assert_array_equal(decoded(annotation), instance_map > 0)


def test_masks_errors(tmp_path):
    with pytest.raises(DataError, match="images is not a directory"):
        formats.read(f"masks://{tmp_path}")
    picture(tmp_path / "images" / "a.jpg")
    save(tmp_path / "masks" / "b_mask.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match=r"b_mask\.png belongs to no picture.*b\.\*"):
        formats.read(f"masks://{tmp_path}")
    os.rename(tmp_path / "masks" / "b_mask.png", tmp_path / "masks" / "a.png")
    with pytest.raises(DataError, match=r"is 40 x 60 .* says 4 x 4"):
        save(tmp_path / "masks" / "a.png", np.ones((4, 4), np.uint8))
        build(f"masks://{tmp_path}", tmp_path).load(0)
    save(tmp_path / "masks" / "a.png", np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8))
    with pytest.raises(DataError, match="colours: it is no map"):
        formats.read(f"masks://{tmp_path}")
    (tmp_path / "masks" / "a.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match=r"mask .*a\.png cannot be read"):
        formats.read(f"masks://{tmp_path}")


# ---------------------------------------------------------------------------------------------- Pascal VOC


def voc_xml(name: str, objects: list[tuple], size: tuple[int, int] = (40, 60)) -> str:
    parts = "".join(
        f"<object><name>{c}</name><difficult>{d}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for c, x1, y1, x2, y2, d in objects
    )
    return (
        f"<annotation><filename>{name}.jpg</filename><size><width>{size[1]}</width><height>{size[0]}</height>"
        f"<depth>3</depth></size>{parts}</annotation>"
    )


@pytest.fixture
def voc_root(tmp_path) -> Path:
    root = tmp_path / "VOC2012"
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation").mkdir()
    objects = {
        "2007_1": [("person", 11, 6, 20, 15, 0), ("horse", 11, 6, 21, 16, 1), ("dog", 31, 21, 60, 40, 0)],
        "2007_2": [("cat", 1, 1, 60, 40, 0)],
    }
    for name, listed in objects.items():
        picture(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations" / f"{name}.xml").write_text(voc_xml(name, listed), encoding="utf-8")
    (root / "ImageSets" / "Main" / "train.txt").write_text("2007_1\n2007_2  1\n")
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("2007_1\n")
    palette = np.zeros((40, 60), np.uint8)
    palette[5:15, 10:20] = 255
    palette[6:14, 11:19] = 1  # with a border of void around
    palette[15, 10:13] = 2  # the horse: next to nothing of its box
    palette[20:40, 30:60] = 3
    save(root / "SegmentationObject" / "2007_1.png", palette)
    return tmp_path


def test_voc_boxes_count_from_one(voc_root):
    cfg = config(voc_root, "MODEL.MASK_ON", "False")
    dataset = catalog.build_dataset(("voc://VOC2012?split=train&imageset=Main",), cfg, True)
    assert dataset.category_names == ["cat", "dog", "horse", "person"]
    assert dataset.load(1).boxes.tolist() == [[0, 0, 60, 40]]
    assert [a["bbox"] for a in dataset.annotations(0)] == [[10, 5, 10, 10], [10, 5, 11, 11], [30, 20, 30, 20]]
    assert [a["difficult"] for a in dataset.annotations(0)] == [0, 1, 0]


def test_upstreams_names_of_voc(voc_root):
    """Images of the detection task; a part by place; a name near it when mistyped."""
    cfg = config(voc_root, "MODEL.MASK_ON", "False")
    assert len(catalog.build_dataset(("voc_2012_train",), cfg, True)) == 2
    assert catalog.build_dataset(("voc_2012_train[1:]",), cfg, True).file_names == ["2007_2.jpg"]
    with pytest.raises(ConfigError, match=r"did you mean voc_2012_train\?"):
        catalog.build_dataset(("voc_2012_trian",), cfg, True)


def test_voc_instances(voc_root, caplog):
    dataset = build("voc://VOC2012?split=train", voc_root)
    assert dataset.image_ids == [1] and dataset.category_names == ["cat", "dog", "horse", "person"], "of all splits"
    sample = dataset.load(0)
    assert sample.labels.tolist() == [4, 2]
    assert sample.boxes.tolist() == [[10, 5, 20, 15], [30, 20, 60, 40]]
    assert sample.bitmaps[0].sum() == 64 and sample.bitmaps[1].sum() == 600
    assert dataset.warnings == {"no_mask": [2]} and "object 2 of" in caplog.text
    assert build("voc://VOC2012?classes=person,horse,dog,cat&split=train", voc_root).load(0).labels.tolist() == [1, 3]


def test_voc_pairs_masks_and_boxes():
    near = [[10, 10, 20, 20], [10, 10, 21, 20], [50, 50, 10, 10]]
    assert voc.match([1, 2, 3], near, near) == {0: 0, 1: 1, 2: 2}
    # Value 1 overlaps object 1 a little less than object 2: the number decides, as both are far above one half.
    assert voc.match([1, 2], [near[1], near[0]], near) == {0: 0, 1: 1}
    assert voc.match([7, 9], [near[2], near[0]], near) == {2: 0, 0: 1}, "other numbers: by overlap"
    assert voc.match([1], [[80, 80, 5, 5]], near) == {} == voc.match([], [], near) == voc.match([1], near[:1], [])


def test_via_points_in_lists_of_lists(tmp_path):
    nested = [[1, 2, 3], [4, 5, 6]]
    shape = {"name": "polygon", "all_points_x": nested, "all_points_y": nested}
    region = {"shape_attributes": shape, "region_attributes": {"name": "a"}}
    (tmp_path / "via.json").write_text(json.dumps({"a": {"filename": "a.png", "size": 1, "regions": [region]}}))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="all_points_x and all_points_y must be lists of numbers"):
        formats.read(f"via://{tmp_path / 'via.json'}")


def test_voc_errors(voc_root):
    root = voc_root / "VOC2012"
    with pytest.raises(DataError, match=r"Segmentation/val\.txt and .*Main/val\.txt do not exist"):
        formats.read(f"voc://{root}?split=val")
    for name in ("gone", "/"):  # the directory is named even where the name would lead out of it
        (root / "ImageSets" / "Main" / "val.txt").write_text(name + "\n")
        with pytest.raises(DataError, match=rf"Annotations has no {name}\.xml, which split 'val' names"):
            formats.read(f"voc://{root}?split=val")
    (root / "Annotations" / "2007_2.xml").write_text("<annotation><object><name>cat</name></object></annotation>")
    with pytest.raises(DataError, match=r"2007_2\.xml: an object is damaged"):
        formats.read(f"voc://{root}")
    (root / "Annotations" / "2007_2.xml").write_text("<annotation>")
    with pytest.raises(DataError, match=r"2007_2\.xml is not valid XML"):
        formats.read(f"voc://{root}")


# ---------------------------------------------------------------------------------------------- Cityscapes


def cityscapes_objects() -> dict:
    def box(label: str, x1: int, y1: int, x2: int, y2: int, **more: int) -> dict:
        return {"label": label, "polygon": [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]} | more

    objects = [
        box("road", 0, 0, 59, 39),
        box("car", 5, 5, 24, 19),
        box("car", 40, 5, 49, 14),
        box("person", 20, 10, 29, 29),  # before the first car
        box("license plate", 6, 12, 9, 14),  # not drawn
        box("pole", 44, 0, 45, 39),  # cuts the second car in two
        box("bicyclegroup", 2, 30, 12, 38),
        box("truck", 0, 0, 59, 39, deleted=1),
    ]
    return {"imgHeight": 40, "imgWidth": 60, "objects": objects}


@pytest.fixture
def cityscapes_root(tmp_path) -> Path:
    picture(tmp_path / "leftImg8bit" / "train" / "ulm" / "ulm_000000_000019_leftImg8bit.png")
    stem = tmp_path / "gtFine" / "train" / "ulm" / "ulm_000000_000019_gtFine"
    write(Path(f"{stem}_polygons.json"), cityscapes_objects())
    return tmp_path


def test_cityscapes_polygons(cityscapes_root):
    dataset = build("cityscapes://.?split=train", cityscapes_root)
    assert dataset.category_ids == [24, 25, 26, 27, 28, 31, 32, 33]
    by_class = {(a["category_id"], a["bbox"][0]): a for a in dataset.annotations(0)}
    assert set(by_class) == {(24, 20), (26, 5), (26, 40), (33, 2)}
    assert by_class[26, 5]["area"] == 20 * 15 - 5 * 10, "less what the person hides"
    assert by_class[26, 40]["area"] == 10 * 10 - 2 * 10 and by_class[26, 40]["bbox"] == [40, 5, 10, 10]
    assert by_class[33, 2]["iscrowd"] == 1 and by_class[24, 20]["area"] == 200
    assert dataset.counts.tolist() == [3] and dataset.load(0).labels.tolist() == [1, 3, 3]


def test_upstreams_names_of_cityscapes(cityscapes_root):
    named = build("cityscapes_poly_instance_train", cityscapes_root)
    assert named.annotations(0) == build("cityscapes://.?split=train", cityscapes_root).annotations(0)


def test_cityscapes_instance_ids_are_the_same(cityscapes_root):
    polygons = formats.read(f"cityscapes://{cityscapes_root}?labels=polygons")
    instance_map = cityscapes.draw(cityscapes_objects(), cityscapes_root, (40, 60))
    assert set(np.unique(instance_map)) == {0, 24000, 26000, 26001, 33}
    instance_map[instance_map == 0] = 7  # road, in the real files
    stem = cityscapes_root / "gtFine" / "train" / "ulm" / "ulm_000000_000019_gtFine"
    with pytest.raises(DataError, match=r"instanceIds\.png does not exist"):
        formats.read(f"cityscapes://{cityscapes_root}?labels=instanceIds")
    save(Path(f"{stem}_instanceIds.png"), instance_map.astype(np.uint16))
    write(Path(f"{stem}_polygons.json"), {"objects": "damaged"})
    assert formats.read(f"cityscapes://{cityscapes_root}").content == polygons.content
    with pytest.raises(DataError, match="not a Cityscapes polygons file"):
        formats.read(f"cityscapes://{cityscapes_root}?labels=polygons")


# ---------------------------------------------------------------------------------------------- labelme


def labelme_shape(label: str, kind: str | None, points: list, **more: object) -> dict:
    return {"label": label, "shape_type": kind, "points": points, "flags": {}, "group_id": None} | more


def test_labelme(tmp_path, caplog):
    pixels = np.zeros((3, 4), np.uint8)
    pixels[1, 1:3] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    triangle = [[10, 10], [20, 10], [10, 20]]
    listed = [
        labelme_shape("cat", "polygon", triangle),
        labelme_shape("dog", "rectangle", [[30, 20], [10, 5]]),
        labelme_shape("dog", "circle", [[30, 20], [30, 25]]),
        labelme_shape("cat", "polygon", triangle, group_id=1),
        labelme_shape("cat", None, [[40, 10], [50, 10], [40, 20]], group_id=1),  # older files have no type
        labelme_shape("dog", "mask", [[5, 6], [8, 8]], mask=base64.b64encode(file.getvalue()).decode()),
        labelme_shape("dog", "linestrip", triangle),
    ]
    content = {
        "version": "5.4.1",
        "shapes": listed,
        "imagePath": "..\\images\\a.jpg",
        "imageHeight": 40,
        "imageWidth": 60,
    }
    picture(tmp_path / "images" / "a.jpg")
    write(tmp_path / "labels" / "a.json", content)
    picture(tmp_path / "labels" / "b.jpg", (20, 30))
    write(tmp_path / "labels" / "b.json", {"shapes": [], "imagePath": "C:\\old\\b.jpg"})
    dataset = build("labelme://labels", tmp_path)
    assert dataset.category_names == ["cat", "dog"] and dataset.sizes.tolist() == [[40, 60], [20, 30]]
    found = [(a["category_id"], [round(v, 3) for v in a["bbox"]], round(a["area"])) for a in dataset.annotations(0)]
    assert found == [
        (2, [6, 7, 2, 1], 2),
        (1, [10, 10, 10, 10], 50),
        (2, [10, 5, 20, 15], 300),
        (2, [25, 15, 10, 10], 77),
        (1, [10, 10, 40, 10], 100),
    ]
    assert [len(a["segmentation"]) for a in dataset.annotations(0)[1:]] == [1, 1, 1, 2]
    assert dataset.load(0).bitmaps.shape == (5, 40, 60) and dataset.load(1).size == (20, 30)
    assert "1 left out: a point, a line" in caplog.text and "shape 6" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "not a labelme file"),
        ({"shapes": [], "imagePath": "lost.jpg"}, "lost.jpg' is neither there nor beside it"),
        ({"shapes": [labelme_shape("a", "blob", [[1, 2], [3, 4]])], "imagePath": "a.jpg"}, "damaged.*blob"),
        ({"shapes": [{"label": "a"}], "imagePath": "a.jpg"}, "damaged.*points"),
    ],
)
def test_labelme_damaged(tmp_path, content, message):
    picture(tmp_path / "a.jpg")
    write(tmp_path / "a.json", content)
    with pytest.raises(DataError, match=message):
        formats.read(f"labelme://{tmp_path}")


# ---------------------------------------------------------------------------------------------- names


def test_coco_by_address_keeps_attributes(tmp_path):
    picture(tmp_path / "JPEGImages" / "a.jpg")
    extras = {"occ": 0.5, "truncate": 0.0, "direct": 2}
    annotation = {"id": 5, "image_id": 3, "category_id": 7, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}
    annotation |= {"segmentation": [[1, 2, 4, 2, 4, 6]]} | extras
    image = {"id": 3, "file_name": "a.jpg", "height": 40, "width": 60}
    content = {"images": [image], "annotations": [annotation], "categories": [{"id": 7, "name": "bear"}]}
    file = write(tmp_path / "train.json", content)
    dataset = build("coco://train.json?images=JPEGImages", tmp_path)
    assert {key: dataset.annotations(0)[0][key] for key in extras} == extras
    assert dataset.ground_truth() == str(file)
    assert catalog.read_source(f"coco://{file}?images=JPEGImages").content == content


def test_coco_finds_its_image_directory(shapes):
    dataset = build("coco://annotations/instances_val2017.json", shapes)
    assert Path(dataset.image_dir) == shapes / "val2017" and len(dataset) == 5
    part = build("coco://annotations/instances_val2017.json[1:3]", shapes)
    assert part.image_ids == dataset.image_ids[1:3] and part.ground_truth() == dataset.annotation_file
    content = catalog.read_source("coco://annotations/instances_val2017.json[1:3]", str(shapes)).content
    assert [image["id"] for image in content["images"]] == part.image_ids
    assert {a["image_id"] for a in content["annotations"]} == set(part.image_ids)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("viaa://a.json", ConfigError, "unknown format 'viaa'.*did you mean via?"),
        ("via://a.json?colour=red", ConfigError, "no option 'colour'.*attribute"),
        ("via://a.json?colour", ConfigError, "option=value"),
        ("penn_fudan://x?images=y", ConfigError, "it has none"),
        ("via://lost.json", DataError, "lost.json does not exist"),
        ("via://", DataError, "does not exist"),
        ("coco_2017_trian", ConfigError, r"did you mean coco_2017_train\?.*FORMAT://PATH"),
        ("no_such_module:Class", ConfigError, "no_such_module.*looked for"),
        ("json:NoSuchClass", ConfigError, "NoSuchClass"),
    ],
)
def test_wrong_names(tmp_path, name, error, message):
    with pytest.raises(error, match=message):
        build(name, tmp_path)


def test_a_part_lacks_a_class(tmp_path):
    """Train and val of a format that finds its classes: the message says how to name them all."""
    picture(tmp_path / "a.jpg")
    for split, kinds in (("train", ("cat", "dog")), ("val", ("dog",))):
        write(tmp_path / f"{split}.json", {"a": via_entry("a.jpg", [region(POLYGON, kind=kind) for kind in kinds])})
    names = ("via://train.json", "via://val.json")
    with pytest.raises(DataError, match=r"differ.*\?classes="):
        catalog.build_dataset(names, config(tmp_path), True)
    joined = catalog.build_dataset([f"{name}?classes=cat,dog" for name in names], config(tmp_path), True)
    assert joined.category_names == ["cat", "dog"] and len(joined) == 2
    truth = joined.ground_truth()
    assert len(truth["annotations"]) == 3


# ---------------------------------------------------------------------------------------------- splitting


def test_split_shares_out_classes():
    """100 images of class 1, of which 10 show class 2, too, and 5 show nothing."""
    images = [{"id": i} for i in range(100)]
    annotations = [{"image_id": i, "category_id": 1} for i in range(95)]
    annotations += [{"image_id": i, "category_id": 2} for i in range(40, 50)]
    for seed in range(5):
        train, val = split_images({"images": images, "annotations": annotations}, 0.2, seed)
        ids = [image["id"] for image in val]
        assert len(ids) == 20 and sorted(ids + [i["id"] for i in train]) == list(range(100))
        assert sum(40 <= i < 50 for i in ids) == 2 and sum(i >= 95 for i in ids) == 1
    assert split_images({"images": images, "annotations": annotations}, 0.2, 4)[1] == val, "same seed, same parts"


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 9))
def test_split_is_exact_or_refused(count, share, seed):
    content = {"images": [{"id": i} for i in range(count)], "annotations": []}
    wanted = int(np.floor(count * share + 0.5))
    if wanted in (0, count):
        with pytest.raises(DataError, match="would be empty"):
            split_images(content, share, seed)
    else:
        assert len(split_images(content, share, seed)[1]) == wanted


# ---------------------------------------------------------------------------------------------- the tool


def tool(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "dataset.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_convert_then_read_again(voc_root):
    done = tool("convert", "voc://VOC2012?split=train", "out/voc.json", cwd=voc_root)
    assert done.returncode == 0 and "coco://out/voc.json?images=../VOC2012/JPEGImages" in done.stdout, done.stderr
    again = build("coco://out/voc.json?images=../VOC2012/JPEGImages", voc_root)
    direct = build("voc://VOC2012?split=train", voc_root)
    assert again.annotations(0) == direct.annotations(0) and again.category_names == direct.category_names
    np.testing.assert_array_equal(again.load(0).bitmaps, direct.load(0).bitmaps)


def test_split_writes_a_coco_directory(coco_mini, tmp_path):
    name = f"coco://{coco_mini}/annotations/instances_train2017.json[:10]"
    done = tool("split", name, "one", "--val", "0.3", "--seed", "1", cwd=tmp_path)
    assert done.returncode == 0 and "7 training and 3 validation" in done.stdout, done.stderr
    train, val = (build(f"coco_2017_{part}", tmp_path / "one", training=False) for part in ("train", "val"))
    whole = build(name, tmp_path, training=False)
    assert sorted(train.image_ids + val.image_ids) == sorted(whole.image_ids)
    assert train.category_ids == whole.category_ids
    for dataset in (train, val):
        for index, image_id in enumerate(dataset.image_ids):
            assert dataset.annotations(index) == whole.annotations(whole.image_ids.index(image_id))
            np.testing.assert_array_equal(dataset.load(index).image, whole.load(whole.image_ids.index(image_id)).image)
    source = catalog.read_source(name)
    vals = [[image["id"] for image in split_images(source.content, 0.3, seed)[1]] for seed in (1, 1, 4)]
    assert vals[0] == vals[1] == val.image_ids != vals[2]
    assert write_split(source, tmp_path / "linked", 0.3, 2, link=True) == (7, 3)
    linked = next((tmp_path / "linked" / "val2017").iterdir())
    assert linked.stat().st_nlink > 1
    with pytest.raises(DataError, match="not an empty directory"):
        write_split(source, tmp_path / "one", 0.3, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write to"):
        write_split(source, tmp_path / "file" / "below", 0.3, 1)


def test_show(shapes, tmp_path):
    done = tool("show", "coco_2017_val", "sheet.png", "--data-path", str(shapes), "--columns", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * 328, 3 * 328, 3)
    assert (sheet[328:, 2 * 328 :] == 255).all() and (sheet[:, :328] != 255).any(), "five images, the sixth cell empty"
    done = tool("show", "coco_2017_val[2:4]", "<b>.html", "--data-path", str(shapes), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "<b>.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 2 and "http" not in page and "<script" not in page
    assert "000000000003.jpg" in page and "triangle" in page


def run_here(monkeypatch, directory: Path, *arguments: str) -> None:
    """The tool in this process: a new one takes three seconds to import torch."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "argv", ["dataset.py", *arguments])
    importlib.import_module("dataset").main()


def test_show_objects_without_masks(voc_root, monkeypatch):
    run_here(monkeypatch, voc_root, "show", "voc://VOC2012[1:]", "masks.html")
    run_here(monkeypatch, voc_root, "show", "voc://VOC2012[1:]", "boxes.html", "--boxes", "--category", "cat")
    masks, boxes = ((voc_root / f"{name}.html").read_text(encoding="utf-8") for name in ("masks", "boxes"))
    assert "2007_2.jpg (id 2): no objects" in masks and "2007_2.jpg (id 2): cat 1" in boxes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "coco_2017_val", "a.gif"), r"must end in \.png or \.html"),
        (("show", "coco_2017_val", "a.png", "--category", "unicorn"), "no class 'unicorn'; it has circle"),
        (("show", "coco_2017_val", "a.png", "--image", "99"), "no image id 99"),
        (("convert", "json:loads", "a.json"), "Python code"),
        (("split", "coco_2017_val", "out", "--val", "1"), "between 0 and 1"),
    ],
)
def test_wrong_commands(shapes, tmp_path, monkeypatch, arguments, message):
    with pytest.raises(UserError, match=message):
        run_here(monkeypatch, tmp_path, *arguments, "--data-path", str(shapes))


def test_an_error_is_one_line(tmp_path):
    done = tool("convert", "via://lost.json", "a.json", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: lost.json does not exist")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "a.json").exists()
