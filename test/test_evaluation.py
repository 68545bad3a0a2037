"""COCO evaluation against pycocotools used directly, the known traps with known answers, and expected results."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import sys

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from maskrcnn_benchmark.errors import ConfigError, DataError, ResultError
from maskrcnn_benchmark.evaluation import coco as coco_module
from maskrcnn_benchmark.evaluation.coco import (
    evaluate,
    format_table,
    load_results,
    segmentation_to_rle,
)
from maskrcnn_benchmark.evaluation.expected import check_expected
from maskrcnn_benchmark.evaluation.results import detections_to_results
from maskrcnn_benchmark.structures import Detections, ImageBatch


def detections_to_coco(*arguments, **keywords) -> list[dict]:
    return detections_to_results(*arguments, **keywords).to_list()


NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
both_evaluators = pytest.mark.parametrize("evaluator", ["hotcoco", "pycocotools"])


def encode(bitmap: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(bitmap.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def jittered(ground_truth: dict, seed: int) -> list[dict]:
    """Results as a mediocre detector would give: missing, doubled, misplaced and misnamed objects, and tied scores."""
    rng = np.random.default_rng(seed)
    images = {image["id"]: image for image in ground_truth["images"]}
    categories = [category["id"] for category in ground_truth["categories"]]
    results = []
    for annotation in ground_truth["annotations"]:
        image = images[annotation["image_id"]]
        mask = coco_mask.decode(segmentation_to_rle(annotation["segmentation"], image["height"], image["width"]))
        for _ in range(rng.choice(3, p=[0.15, 0.7, 0.15])):
            x, y, w, h = annotation["bbox"]
            moved = np.array([x, y, w, h]) + rng.normal(0, 0.06, 4) * [w, h, w, h]
            shift = np.rint(rng.normal(0, 0.04, 2) * [h, w]).astype(int)
            drawn = cv2.dilate(np.roll(mask, shift, (0, 1)), np.ones((3, 3))) if rng.random() < 0.5 else mask
            wrong = rng.random() < 0.1
            results.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": int(rng.choice(categories)) if wrong else annotation["category_id"],
                    "bbox": [*moved[:2], *moved[2:].clip(min=1)],
                    "score": round(float(rng.random()), 2),
                    "segmentation": encode(drawn),
                }
            )
    return results


def pycocotools_numbers(ground_truth: dict, results: list[dict], task: str) -> np.ndarray:
    """pycocotools as its own example uses it; for segm without bbox, as COCO's result format has it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results = copy.deepcopy(results)
    if task == "segm":
        for result in results:
            del result["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(ground_truth)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.fixture(scope="module")
def real(coco_mini) -> tuple[dict, list[dict]]:
    """COCO's own annotations, crowds included, and results made from them."""
    ground_truth = json.loads((coco_mini / "annotations" / "instances_val2017.json").read_bytes())
    assert any(annotation["iscrowd"] for annotation in ground_truth["annotations"])
    return ground_truth, jittered(ground_truth, seed=0)


def dataset(boxes: list[list[float]], **keys) -> dict:
    """One image of 400 x 600 (height x width) with one class, `boxes` xywh in it; their masks are the same boxes."""
    annotations = [
        {
            "id": i + 1,
            "image_id": 7,
            "category_id": 3,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
            "segmentation": [polygon(box)],
        }
        | keys
        for i, box in enumerate(boxes)
    ]
    images = [{"id": 7, "height": 400, "width": 600, "file_name": "7.jpg"}]
    return {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "thing"}]}


def polygon(box: list[float]) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def perfect(ground_truth: dict) -> list[dict]:
    """Results that are the ground truth: AP 1 by definition."""
    return [
        {
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "bbox": annotation["bbox"],
            "score": 1.0 - 0.001 * index,
            "segmentation": segmentation_to_rle(annotation["segmentation"], 400, 600),
        }
        for index, annotation in enumerate(ground_truth["annotations"])
    ]


GRID = [[20 + 100 * column, 10 + 90 * row, 60, 50] for row in range(4) for column in range(5)]


class TestAgainstPycocotools:
    @both_evaluators
    @pytest.mark.parametrize("task", ["bbox", "segm"])
    def test_all_twelve_numbers(self, real, evaluator, task):
        scores = evaluate(*real, tasks=(task,), evaluator=evaluator)[task]
        ours = [-1 if scores[name] is None else scores[name] for name in NAMES]
        theirs = pycocotools_numbers(*real, task)
        assert 0.1 < theirs[0] < 0.9  # else the comparison would show nothing
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)

    @both_evaluators
    def test_no_input_is_changed(self, real, evaluator):
        before = copy.deepcopy(real)
        evaluate(*real, evaluator=evaluator)
        assert before == real

    def test_per_class_and_chosen_images_agree(self, real):
        ids = [image["id"] for image in real[0]["images"]][::2]
        fast, slow = (evaluate(*real, evaluator=e, image_ids=ids) for e in ("hotcoco", "pycocotools"))
        subset = {**real[0], "images": [i for i in real[0]["images"] if i["id"] in ids]}
        subset["annotations"] = [a for a in real[0]["annotations"] if a["image_id"] in ids]
        theirs = pycocotools_numbers(subset, [r for r in real[1] if r["image_id"] in ids], "segm")
        assert fast["segm"]["AP"] == pytest.approx(theirs[0], abs=1e-6)
        for task in ("bbox", "segm"):
            assert len(fast[task]["per_class"]) == 80
            assert fast[task]["per_class"] == pytest.approx(slow[task]["per_class"], abs=1e-6)
        judged = [ap for ap in fast["bbox"]["per_class"].values() if ap is not None]
        assert np.mean(judged) == pytest.approx(fast["bbox"]["AP"])

    @pytest.mark.parametrize("limit", [5, 150])
    def test_other_limits_agree(self, real, limit):
        fast, slow = (evaluate(*real, evaluator=e, max_detections=limit) for e in ("hotcoco", "pycocotools"))
        assert f"AR{limit}" in fast["bbox"] and "AR100" not in fast["bbox"]
        for task in ("bbox", "segm"):
            fast[task].pop("per_class"), slow[task].pop("per_class")
            assert fast[task] == pytest.approx(slow[task], abs=1e-6)

    def test_file_and_content_give_the_same(self, real, coco_mini):
        path = coco_mini / "annotations" / "instances_val2017.json"
        assert evaluate(path, real[1], ("bbox",)) == evaluate(real[0], real[1], ("bbox",))


@both_evaluators
class TestTraps:
    def test_perfect_results(self, evaluator):
        truth = dataset(GRID)
        scores = evaluate(truth, perfect(truth), evaluator=evaluator)
        for task in ("bbox", "segm"):
            assert scores[task]["AP"] == scores[task]["AP50"] == scores[task]["AR100"] == pytest.approx(1.0)
            assert scores[task]["AR1"] == 1 / 20 and scores[task]["AR10"] == 10 / 20
            assert (
                scores[task]["APm"] == pytest.approx(1.0)
                and scores[task]["APs"] is None
                and scores[task]["APl"] is None
            )
            assert scores[task]["per_class"] == {"thing": pytest.approx(1.0)}

    def test_one_of_two_found(self, evaluator):
        """Precision 1 up to recall .5: 51 of the 101 recall thresholds."""
        truth = dataset(GRID[:2])
        scores = evaluate(truth, perfect(truth)[:1], evaluator=evaluator)
        assert scores["bbox"]["AP"] == pytest.approx(51 / 101)
        assert scores["segm"]["AR100"] == 0.5

    def test_annotation_id_0_and_repeated_ids(self, evaluator):
        truth = dataset(GRID)
        for annotation, new in zip(truth["annotations"], [0, 0, *range(18)]):
            annotation["id"] = new
        assert evaluate(truth, perfect(truth), evaluator=evaluator)["bbox"]["AP"] == pytest.approx(1.0)

    @pytest.mark.parametrize("missing", [["iscrowd"], ["area"], ["bbox"], ["iscrowd", "area", "bbox", "id"]])
    def test_missing_keys(self, evaluator, missing):
        truth = dataset(GRID)
        results = perfect(truth)
        for annotation in truth["annotations"]:
            for key in missing:
                del annotation[key]
        scores = evaluate(truth, results, evaluator=evaluator)
        assert scores["bbox"]["AP"] == scores["segm"]["AP"] == scores["segm"]["APm"] == pytest.approx(1.0)

    def test_boxes_alone_need_neither_masks_nor_image_sizes(self, evaluator):
        truth = dataset([[0, 0, 20, 20], [50, 50, 200, 200]])
        results = perfect(truth)
        truth["images"] = [{"id": 7}]
        for annotation in truth["annotations"]:
            del annotation["area"], annotation["segmentation"]
        scores = evaluate(truth, results, ("bbox",), evaluator)["bbox"]
        assert scores["APs"] == scores["APl"] == pytest.approx(1.0)
        assert scores["APm"] is None

    def test_no_results(self, evaluator):
        for scores in evaluate(dataset(GRID), [], evaluator=evaluator).values():
            assert scores["AP"] == scores["AR100"] == scores["APm"] == 0.0
            assert scores["APs"] is None

    def test_no_ground_truth(self, evaluator):
        results = perfect(dataset(GRID))
        for scores in evaluate(dataset([]), results, evaluator=evaluator).values():
            assert all(scores[name] is None for name in NAMES)
            assert scores["per_class"] == {"thing": None}

    def test_more_objects_than_detections_count(self, evaluator, caplog):
        boxes = [[10 + 25 * column, 5 + 35 * row, 15, 20] for row in range(10) for column in range(15)]
        truth = dataset(boxes)
        results = perfect(truth)
        with caplog.at_level(logging.WARNING):
            scores = evaluate(truth, results, evaluator=evaluator)
        assert "more than 100 objects" in caplog.text
        assert scores["bbox"]["AR100"] == pytest.approx(100 / 150)
        assert scores["bbox"]["AP"] == pytest.approx(67 / 101)  # recall thresholds 0, .01, ... .66
        scores = evaluate(truth, results, evaluator=evaluator, max_detections=150)
        assert scores["bbox"]["AP"] == scores["segm"]["AP"] == scores["segm"]["AR150"] == pytest.approx(1.0)
        assert scores["bbox"]["APs"] == pytest.approx(1.0)

    @pytest.mark.parametrize(("thickness", "area", "size"), [(2, 784, "APs"), (10, 3600, "APm")])
    def test_a_box_does_not_decide_the_size_of_a_mask(self, evaluator, thickness, area, size):
        """A ring in a box of 100 x 100, which is large: found or not, it counts by its mask's area."""
        ring = np.zeros((400, 600), np.uint8)
        ring[50:150, 60:160] = 1
        ring[50 + thickness : 150 - thickness, 60 + thickness : 160 - thickness] = 0
        truth = dataset([[60, 50, 100, 100]], area=area, segmentation=encode(ring))
        assert ring.sum() == area
        miss = {"image_id": 7, "category_id": 3, "bbox": [300, 200, 100, 100], "score": 0.99}
        miss["segmentation"] = encode(np.roll(ring, (150, 240), (0, 1)))
        scores = evaluate(truth, [miss, perfect(truth)[0] | {"score": 0.9}], ("segm",), evaluator)["segm"]
        assert scores.pop(size) == pytest.approx(0.5)  # the miss is as large, and comes first
        assert [scores[name] for name in ("APs", "APm", "APl") if name in scores] == [None, None]

    def test_crowd_absorbs(self, evaluator):
        """Results inside a crowd are neither right nor wrong; the crowd itself need not be found."""
        truth = dataset([GRID[0], [200, 100, 300, 250]])
        truth["annotations"][1] |= {"iscrowd": 1, "segmentation": uncompressed(GRID_CROWD)}
        inside = {"image_id": 7, "category_id": 3, "bbox": [250, 150, 50, 50], "score": 0.999}
        inside["segmentation"] = segmentation_to_rle([polygon(inside["bbox"])], 400, 600)
        scores = evaluate(truth, [inside, perfect(truth)[0]], evaluator=evaluator)
        assert scores["bbox"]["AP"] == scores["segm"]["AP"] == pytest.approx(1.0)

    def test_list_uncompressed_and_compressed_masks_are_equal(self, evaluator):
        truth = dataset(GRID)
        results = perfect(truth)
        for index, annotation in enumerate(truth["annotations"]):
            rle = segmentation_to_rle(annotation["segmentation"], 400, 600)
            flat = uncompressed(coco_mask.decode(rle))
            annotation["segmentation"] = (annotation["segmentation"][0], rle, flat)[index % 3]
            results[index]["segmentation"] = (flat, [polygon(GRID[index])], {**rle, "counts": rle["counts"].encode()})[
                index % 3
            ]
            del annotation["area"], annotation["bbox"]
        scores = evaluate(truth, results, evaluator=evaluator)
        assert scores["bbox"]["AP"] == scores["segm"]["AP"] == pytest.approx(1.0)

    def test_bad_polygons_are_dropped_with_their_id(self, evaluator, caplog):
        truth = dataset(GRID[:3])
        results = perfect(truth)
        truth["annotations"][0]["segmentation"].append([5.0, 5.0, 9.0, 9.0])
        truth["annotations"][1] |= {"id": 4711, "segmentation": [[1.0, 2.0, 3.0, 4.0]]}
        with caplog.at_level(logging.WARNING):
            scores = evaluate(truth, [results[0], results[2]], evaluator=evaluator)
        assert scores["segm"]["AP"] == pytest.approx(1.0)  # 4711 has no mask to find
        assert scores["bbox"]["AR100"] == pytest.approx(2 / 3)  # but it has a box
        segm = [r.getMessage() for r in caplog.records if r.getMessage().startswith("segm")]
        assert any("4711" in m and "no usable" in m for m in segm)
        assert any("fewer than 3 points" in m and m.endswith("ids 1") for m in segm)

    def test_classes_of_one_name_stay_apart(self, evaluator):
        truth = dataset(GRID)
        truth["categories"] += [{"id": 5, "name": "thing"}]
        scores = evaluate(truth, perfect(truth), evaluator=evaluator)
        assert scores["bbox"]["per_class"] == {"thing (3)": pytest.approx(1.0), "thing (5)": None}

    @pytest.mark.parametrize("ids", [[0, 7, 90], [2**40, 3, 8]])
    def test_category_and_image_ids_with_gaps(self, evaluator, ids):
        truth = dataset(GRID)
        truth["categories"] = [{"id": i, "name": str(i)} for i in ids]
        truth["images"] = [{"id": i, "height": 400, "width": 600} for i in ids]
        for index, annotation in enumerate(truth["annotations"]):
            annotation |= {"category_id": ids[index % 3], "image_id": ids[index % 2]}
        scores = evaluate(truth, perfect(truth), evaluator=evaluator)
        assert scores["bbox"]["per_class"] == pytest.approx({str(i): 1.0 for i in ids})


GRID_CROWD = np.zeros((400, 600), np.uint8)
GRID_CROWD[100:350, 200:500] = 1


def uncompressed(bitmap: np.ndarray) -> dict:
    """COCO's crowd format: run lengths down the columns, zeros first."""
    flat = np.concatenate([[0], bitmap.ravel(order="F"), [2]])
    counts = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat)), [bitmap.size]]))
    counts = counts[: len(counts) - (counts[-1] == 0)]
    return {"size": list(bitmap.shape), "counts": counts.tolist()}


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_every_form_of_a_mask_becomes_the_same_rle(seed, height, width):
    bitmap = np.random.default_rng(seed).integers(0, 2, (height, width)).astype(np.uint8)
    rle = encode(bitmap)
    assert segmentation_to_rle(rle, height, width) == rle
    assert segmentation_to_rle(uncompressed(bitmap), height, width) == rle
    assert segmentation_to_rle({**rle, "counts": rle["counts"].encode()}, height, width) == rle
    assert segmentation_to_rle(rle, height + 1, width) is None


@pytest.mark.parametrize(
    "broken",
    [
        None,
        [],
        [[1, 2, 3, 4]],
        {},
        {"size": [4, 4]},
        {"size": [4, 4], "counts": [3, 4]},
        {"size": [4, 4], "counts": [-1, 17]},
    ]
    + [{"size": [4, 4], "counts": counts} for counts in ("0o", "\x01\xe9", "zz", "0`1", 5)],
)
def test_broken_segmentations(broken):
    assert segmentation_to_rle(broken, 4, 4) is None


def with_change(index: int, **changes) -> list[dict]:
    results = perfect(dataset(GRID))
    results[index] = {k: v for k, v in (results[index] | changes).items() if v is not ...}
    return results


@both_evaluators
@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"annotations": []}, "must be a list, not an object"),
        ([*with_change(0), "text"], r"results\[20\] must be an object, not a text"),
        (with_change(3, score=...), r"results\[3\] \(image id 7\) has no score"),
        (with_change(3, bbox=...), r"results\[3\] \(image id 7\) has no bbox"),
        (with_change(3, segmentation=...), r"results\[3\] \(image id 7\) has no segmentation"),
        (with_change(3, image_id=...), r"results\[3\] \(image id None\) has no image_id"),
        (with_change(3, bbox=[1, 2, 3]), r"results\[3\] .*bbox must be \[x, y, width, height\], not \[1, 2, 3\]"),
        ([r | {"bbox": [1, 2, 3]} for r in with_change(0)], r"results\[0\] .*bbox must be"),
        (with_change(3, score="high"), r"results\[3\] .*score must be a number, not 'high'"),
        (with_change(3, score=float("nan")), r"results\[3\] \(image id 7\).*NaN"),
        (with_change(3, bbox=[1, 2, float("inf"), 4]), r"results\[3\] \(image id 7\).*infinite"),
        (with_change(3, image_id=8), "images that are not in the ground truth: ids 8"),
        (with_change(3, image_id="7"), r"results\[3\] .*image_id must be a whole number, not '7'"),
        (with_change(3, image_id=[7]), "image_id"),
        (with_change(3, category_id=1), "categories that are not in the ground truth: ids 1"),
        (with_change(3, segmentation=encode(np.ones((600, 400)))), r"results\[3\] .*400 pixels high and 600 wide"),
        (with_change(3, segmentation={"size": [400, 600], "counts": "0oo"}), r"results\[3\] .*no RLE"),
        (with_change(3, segmentation=[1, "x"]), r"results\[3\] .*no RLE"),
        (with_change(3, segmentation={"size": 400, "counts": "0"}), r"results\[3\] .*no RLE"),
    ],
)
def test_bad_results_are_named(results, message, evaluator):
    with pytest.raises(DataError, match=message) as error:
        evaluate(dataset(GRID), results, evaluator=evaluator)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda truth: truth.pop("categories"), "categories"),
        (lambda truth: truth["annotations"][2].pop("category_id"), "category_id"),
        (lambda truth: truth["annotations"][2].update(category_id=9), r"annotations\[2\] .*category id 9"),
        (lambda truth: truth["annotations"][2].update(image_id=9), r"annotations\[2\] names image id 9"),
        (lambda truth: truth["images"][0].pop("height"), "image id 7 has no 'height'"),
        (lambda truth: truth["images"][0].update(id="x"), "whole numbers"),
        (lambda truth: truth["categories"].append({"id": "4", "name": "four"}), "whole numbers"),
        (lambda truth: truth["annotations"][2].update(bbox="none"), "annotation id 3"),
    ],
)
def test_bad_ground_truth_is_named(change, message):
    truth = dataset(GRID)
    results = perfect(truth)
    change(truth)
    with pytest.raises(DataError, match=message) as error:
        evaluate(truth, results)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    for reader in (lambda path: evaluate(path, []), load_results):
        with pytest.raises(DataError, match=r"missing\.json cannot be read"):
            reader(tmp_path / "missing.json")
        (tmp_path / "cut.json").write_text('[{"image_id": 1, ')
        with pytest.raises(DataError, match=r"cut\.json is not valid JSON"):
            reader(tmp_path / "cut.json")
    (tmp_path / "object.json").write_text('{"bbox": []}')
    with pytest.raises(DataError, match=r"object\.json must hold a list of results, not an object"):
        load_results(tmp_path / "object.json")
    (tmp_path / "numbers.json").write_text("[1]")
    with pytest.raises(DataError, match="entry 0 must be an object, not 1"):
        load_results(tmp_path / "numbers.json")
    (tmp_path / "good.json").write_text('[{"image_id": 1}]')
    assert load_results(str(tmp_path / "good.json")) == [{"image_id": 1}]


def test_an_image_evaluated_twice_is_an_error():
    """A padded sampler does that, and every repeated detection counts as wrong."""
    with pytest.raises(DataError, match="images 7 were evaluated more than once"):
        evaluate(dataset(GRID), [], image_ids=[7, 7])
    with pytest.raises(DataError, match="images 8 are not in the ground truth"):
        evaluate(dataset(GRID), [], image_ids=[7, 8])


def test_what_is_not_known_is_an_error():
    with pytest.raises(ConfigError, match="'fast'"):
        evaluate(dataset(GRID), [], evaluator="fast")
    with pytest.raises(ConfigError, match="panoptic"):
        evaluate(dataset(GRID), [], tasks=("panoptic",))
    with pytest.raises(ConfigError, match="max_detections"):
        evaluate(dataset(GRID), [], max_detections=0)


def test_without_hotcoco_pycocotools_serves_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    coco_module._get_engine.cache_clear()
    truth = dataset(GRID)
    with caplog.at_level(logging.WARNING):
        assert evaluate(truth, perfect(truth))["bbox"]["AP"] == pytest.approx(1.0)
        evaluate(truth, perfect(truth))
    coco_module._get_engine.cache_clear()
    assert len(caplog.records) == 1 and "hotcoco is not installed" in caplog.text and "pycocotools" in caplog.text


class TestDetectionsToCoco:
    def batch(self, masks: torch.Tensor | None = None) -> tuple[Detections, ImageBatch]:
        """Two images: 50 x 100 (height x width) shown at 100 x 250, and 30 x 20 at its own size."""
        images = ImageBatch(
            pixels=torch.zeros(2, 3, 128, 256, dtype=torch.uint8),
            sizes=torch.tensor([[100, 250], [30, 20]]),
            original_sizes=[(50, 100), (30, 20)],
            image_ids=[42, 9],
        )
        boxes = torch.tensor([[[25.0, 10, 75, 30], [-5, 50, 300, 120]], [[2, 3, 12, 13], [0, 0, 1, 1]]])
        scores, labels = torch.tensor([[0.9, 0.25], [0.5, 0.0]]), torch.tensor([[1, 3], [2, 1]])
        return Detections(boxes, scores, labels, torch.tensor([[True, True], [True, False]]), masks), images

    def test_boxes_in_original_pixels(self):
        """x is scaled by 100 / 250, y by 50 / 100; the second box is clipped; padding is not there."""
        results = detections_to_coco(*self.batch(), category_ids=[1, 18, 90])
        assert [r["bbox"] for r in results] == [[10, 5, 20, 10], [0, 25, 100, 25], [2, 3, 10, 10]]
        assert [(r["image_id"], r["category_id"]) for r in results] == [(42, 1), (42, 90), (9, 18)]
        assert [r["score"] for r in results] == pytest.approx([0.9, 0.25, 0.5])
        assert all("segmentation" not in r for r in results)
        json.dumps(results)

    def test_masks_fill_their_boxes(self):
        results = detections_to_coco(*self.batch(torch.full((2, 2, 28, 28), 0.8)), category_ids=[1, 18, 90])
        for result, (height, width) in zip(results, [(50, 100), (50, 100), (30, 20)]):
            bitmap = coco_mask.decode(result["segmentation"])
            assert bitmap.shape == (height, width)
            x, y, w, h = (round(v) for v in result["bbox"])
            assert bitmap[y : y + h, x : x + w].mean() > 0.9
            assert bitmap.sum() == bitmap[y : y + h, x : x + w].sum()
        json.dumps(results)

    def test_the_threshold_decides(self):
        batch = self.batch(torch.full((2, 2, 28, 28), 0.8))
        results = detections_to_coco(*batch, category_ids=[1, 18, 90], threshold=0.9)
        assert all(coco_mask.area(r["segmentation"]) == 0 for r in results)

    def test_no_detections(self):
        detections, images = self.batch()
        detections.valid = torch.zeros_like(detections.valid)
        assert detections_to_coco(detections, images, [1, 2, 3]) == []
        detections.masks = torch.zeros(2, 2, 28, 28)
        assert detections_to_coco(detections, images, [1, 2, 3]) == []


def test_table_is_aligned_and_says_not_applicable():
    scores = {"eval_seconds": 1.0, "bbox": dict.fromkeys(NAMES, 0.37712), "segm": dict.fromkeys(NAMES, 0.3)}
    scores["bbox"]["APs"] = None
    header, box, segm = format_table(scores).splitlines()
    assert header.split() == ["task", "AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert box.split() == ["bbox", "0.3771", "0.3771", "0.3771", "n/a", "0.3771", "0.3771"]
    assert len(header) == len(box) == len(segm)


SCORES = {"bbox": {"AP": 0.377, "APs": None, "per_class": {"a": 1.0}}, "segm": {"AP": 0.342}, "eval_seconds": 3.0}


class TestExpected:
    def test_within_the_tolerance(self, caplog):
        with caplog.at_level(logging.INFO, logger="maskrcnn_benchmark"):
            check_expected(SCORES, [["bbox", "AP", [0.375, 0.001]], ("segm", "AP", 0.341, 0.001)], 4)
        assert len(caplog.records) == 2 and "bbox AP 0.3770" in caplog.text

    def test_nothing_expected(self):
        check_expected({}, [], 4)

    def test_every_miss_is_named(self):
        expected = [["bbox", "AP", [0.385, 0.001]], ["segm", "AP", [0.342, 0.0]], ["bbox", "APs", [0.2, 0.1]]]
        with pytest.raises(ResultError) as error:
            check_expected(SCORES, expected, 4)
        message = str(error.value)
        assert "bbox AP is 0.3770, expected 0.3850 +- 0.0040" in message
        assert "bbox APs is n/a" in message and "segm" not in message and "\n" not in message
        assert error.value.exit_code == 1

    def test_tolerance_counts_sigmas(self):
        check_expected(SCORES, [["bbox", "AP", [0.379, 0.001]]], 3)
        with pytest.raises(ResultError):
            check_expected(SCORES, [["bbox", "AP", [0.379, 0.001]]], 1)

    @pytest.mark.parametrize(
        "entry",
        [
            ["box", "AP", [0.3, 0.1]],
            ["bbox", "mAP", [0.3, 0.1]],
            ["bbox", "per_class", [0.3, 0.1]],
            ["eval_seconds", "AP", [0.3, 0.1]],
            ["bbox", "AP", ["x", 0.1]],
            ["bbox", "AP", 0.3],
            ["bbox", "AP"],
            "bbox",
        ],
    )
    def test_what_does_not_exist_is_an_error(self, entry):
        with pytest.raises(ConfigError, match=r"TEST\.EXPECTED_RESULTS") as error:
            check_expected(SCORES, [entry], 4)
        assert "\n" not in str(error.value)

    def test_a_task_that_was_not_evaluated(self):
        with pytest.raises(ConfigError, match="segm"):
            check_expected({"bbox": {"AP": 0.3}}, [["segm", "AP", [0.3, 0.1]]], 4)
