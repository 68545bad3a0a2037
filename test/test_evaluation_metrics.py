"""Keypoints against pycocotools; Pascal VOC's, Cityscapes' and the report's numbers against cases worked by hand."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from test_evaluation import dataset, perfect

from maskrcnn_benchmark.errors import ConfigError, DataError
from maskrcnn_benchmark.evaluation.coco import evaluate, format_table, segmentation_to_rle
from maskrcnn_benchmark.evaluation.score import score
from maskrcnn_benchmark.report.accuracy import accuracy_page, confusion_svg

both_evaluators = pytest.mark.parametrize("evaluator", ["hotcoco", "pycocotools"])
POSE = ["AP", "AP50", "AP75", "APm", "APl", "AR20", "ARm", "ARl"]


def people(seed: int, count: int = 17) -> tuple[dict, list[dict]]:
    """Poses in 12 images, one a crowd and some without a visible point, and a mediocre detector's answers."""
    rng = np.random.default_rng(seed)
    truth = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "person"}]}
    results = []
    for image in range(12):
        truth["images"].append({"id": image, "height": 480, "width": 640})
        for number in range(rng.integers(0, 6)):
            x, y, w, h = *rng.uniform(0, 300, 2), *rng.uniform(30, 180, 2)
            points = np.column_stack([rng.uniform([x, y], [x + w, y + h], (count, 2)), rng.integers(0, 3, count)])
            points[:, 2] *= rng.random() > 0.1
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]),
                    "image_id": image,
                    "category_id": 1,
                    "bbox": [x, y, w, h],
                    "area": w * h * 0.6,
                    "iscrowd": int(number == 4),
                    "keypoints": points.ravel().tolist(),
                    "num_keypoints": int((points[:, 2] > 0).sum()),
                }
            )
            for _ in range(rng.integers(0, 3)):
                moved = points + rng.normal(0, rng.choice([1, 6]), points.shape) * [1, 1, 0]
                score_ = round(float(rng.random()), 2)
                results.append(
                    {"image_id": image, "category_id": 1, "keypoints": moved.ravel().tolist(), "score": score_}
                )
    return truth, results


def pycocotools_poses(truth: dict, results: list[dict], sigmas: list[float] | None = None) -> np.ndarray:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = copy.deepcopy(truth)
    for annotation in truth["annotations"]:
        annotation["id"] += 1  # 0 is taken for no match
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "keypoints")
        if sigmas:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[[0, 1, 2, 3, 4, 5, 8, 9]]


@both_evaluators
class TestKeypoints:
    @pytest.mark.parametrize("seed", range(3))
    def test_all_numbers_equal_pycocotools(self, evaluator, seed):
        scores = evaluate(*people(seed), ("keypoints",), evaluator)["keypoints"]
        theirs = pycocotools_poses(*people(seed))
        assert 0.02 < theirs[0] < 0.98
        np.testing.assert_allclose([scores[name] for name in POSE], theirs, rtol=0, atol=1e-6)
        assert "APs" not in scores and "keypoints" in format_table({"keypoints": scores})

    def test_other_keypoints_need_their_sigmas(self, evaluator):
        truth, results = people(0, count=5)
        with pytest.raises(ConfigError, match="17 OKS sigmas for 5 keypoints"):
            evaluate(truth, results, ("keypoints",), evaluator)
        sigmas = [0.05, 0.1, 0.15, 0.2, 0.25]
        scores = evaluate(truth, results, ("keypoints",), evaluator, keypoint_sigmas=sigmas)["keypoints"]
        theirs = pycocotools_poses(truth, results, sigmas)
        np.testing.assert_allclose([scores[name] for name in POSE], theirs, rtol=0, atol=1e-6)

    def test_no_results_and_bad_ones(self, evaluator):
        truth, results = people(0)
        assert evaluate(truth, [], ("keypoints",), evaluator)["keypoints"]["AP"] == 0
        results[1]["keypoints"] = [1, 2]
        with pytest.raises(DataError, match=r"results\[1\] .*keypoints must be"):
            evaluate(truth, results, ("keypoints",), evaluator)


def found(box: list[float], score_: float, **keys) -> dict:
    x, y, w, h = box
    rle = segmentation_to_rle([[x, y, x + w, y, x + w, y + h, x, y + h]], 400, 600)
    return {"image_id": 7, "category_id": 3, "bbox": box, "score": score_, "segmentation": rle} | keys


BOXES = [[0, 0, 100, 100], [200, 0, 100, 100], [400, 0, 100, 100], [0, 200, 100, 100]]


class TestVoc:
    def scores(self, truth: dict, results: list[dict]) -> list[float | None]:
        scores, _ = score(truth, results, ("bbox",), ("voc07", "voc"))
        assert scores["voc"]["per_class"]["thing"] == scores["voc"]["AP50"]
        return [scores[name]["AP50"] for name in ("voc07", "voc")]

    def test_right_wrong_right(self):
        """Four objects; right, wrong, right: precision 1 up to recall .25, then 2/3 up to recall .5."""
        results = [found(BOXES[0], 0.9), found([500, 300, 50, 50], 0.8), found(BOXES[1], 0.7)]
        eleven = (3 * 1 + 3 * 2 / 3) / 11  # recall 0, .1, .2; then .3, .4, .5
        assert self.scores(dataset(BOXES), results) == pytest.approx([eleven, 0.25 * 1 + 0.25 * 2 / 3])

    def test_the_second_detection_of_an_object_is_wrong(self):
        results = [found(BOXES[0], 0.9), found(BOXES[0], 0.8), found(BOXES[1], 0.7)]
        assert self.scores(dataset(BOXES[:2]), results)[1] == pytest.approx(0.5 + 0.5 * 2 / 3)

    def test_difficult_objects_do_not_count(self):
        truth = dataset(BOXES[:2])
        truth["annotations"][1]["difficult"] = 1
        assert self.scores(truth, [found(BOXES[1], 0.9), found(BOXES[0], 0.8)]) == pytest.approx([1, 1])

    def test_an_overlap_of_exactly_half_is_enough(self):
        """The devkit's own rule, ov >= minoverlap."""
        assert self.scores(dataset(BOXES[:1]), [found([0, 0, 100, 50], 0.9)]) == pytest.approx([1, 1])
        assert self.scores(dataset(BOXES[:1]), [found([0, 0, 100, 49], 0.9)]) == [0, 0]

    def test_nothing_to_find_and_nothing_found(self):
        assert self.scores(dataset([]), [found(BOXES[0], 0.9)]) == [None, None]
        assert self.scores(dataset(BOXES), []) == [0, 0]


class TestCityscapes:
    def scores(self, truth: dict, results: list[dict]) -> tuple[float | None, float | None]:
        scores = score(truth, results, ("bbox", "segm"), ("cityscapes",))[0]["cityscapes"]
        assert scores["per_class"]["thing"] == scores["AP"]
        return scores["AP"], scores["AP50"]

    def test_perfect(self):
        truth = dataset(BOXES)
        assert self.scores(truth, perfect(truth)) == pytest.approx((1, 1))

    def test_right_wrong_right(self):
        """The points of the curve from the lowest score on: precision 2/3, 1/2, 1, and 1 at recall 0; recall 1/2, 1/4,
        1/4, 0. Each is as wide as half of its neighbours' distance: (1/2 - 1/4) / 2, 1/8, 1/8, 1/8."""
        results = [found(BOXES[0], 0.9), found([500, 300, 50, 50], 0.8), found(BOXES[1], 0.7)]
        expected = (2 / 3 + 1 / 2 + 1 + 1) / 8
        assert self.scores(dataset(BOXES), results) == pytest.approx((expected, expected))

    def test_the_better_of_two_is_right(self):
        """Also when the worse one overlaps more. Below its score lies the wrong one, where the curve has no width."""
        results = [found(BOXES[0], 0.5), found([0, 0, 100, 96], 0.9)]
        assert self.scores(dataset(BOXES[:1]), results) == pytest.approx((1, 1))

    def test_groups_and_small_objects_absorb(self):
        truth = dataset([BOXES[0], [200, 0, 200, 200], [10, 300, 9, 9]])
        truth["annotations"][1]["iscrowd"] = 1
        inside = [found([220, 20, 40, 40], 0.99), found([10, 300, 9, 9], 0.98)]
        assert self.scores(truth, [*inside, found(BOXES[0], 0.9)]) == pytest.approx((1, 1))
        assert self.scores(truth, [found([500, 300, 40, 40], 0.99), found(BOXES[0], 0.9)])[1] < 1

    def test_nothing_to_find_and_nothing_found(self):
        assert self.scores(dataset([]), [found(BOXES[0], 0.9)]) == (None, None)
        assert self.scores(dataset(BOXES), []) == (0, 0)


def test_metrics_must_be_known_and_have_results():
    with pytest.raises(ConfigError, match="'mAP'; known are coco"):
        score(dataset(BOXES), [], ("bbox",), ("mAP",))
    with pytest.raises(ConfigError, match="cityscapes judges segm"):
        score(dataset(BOXES), [], ("bbox",), ("cityscapes",))


class TestDetails:
    @pytest.fixture
    def details(self) -> dict:
        truth = dataset([*BOXES, [200, 200, 150, 150]])
        truth["categories"].append({"id": 5, "name": "<other>"})
        truth["annotations"][1]["category_id"] = 5
        truth["annotations"][4]["iscrowd"] = 1
        results = [
            found(BOXES[0], 0.9),  # right
            found(BOXES[1], 0.9),  # "other" taken for "thing"
            found(BOXES[2], 0.4),  # below the least score: missed
            found([500, 300, 50, 50], 0.8, category_id=5),  # no object
            found([210, 210, 50, 50], 0.8),  # in a crowd: does not count
        ]
        return score(truth, results, ("bbox", "segm"))[1]

    def test_confusion(self, details):
        """Rows: thing, other, no object; columns: thing, other, missed."""
        assert details["confusion"] == {"names": ["thing", "<other>"], "matrix": [[1, 0, 2], [1, 0, 0], [0, 1, 0]]}

    def test_images(self, details):
        """By image id: objects, detections, right ones."""
        assert details["images"] == [[7, 4, 3, 1]]

    def test_classes_and_curves(self, details):
        thing = details["bbox"]["classes"]["thing"]
        assert thing["objects"] == 3 and thing["AR"] == pytest.approx(2 / 3) and thing["AP"] == thing["AP75"]
        assert details["segm"]["classes"]["<other>"] == {"AP": 0, "AP50": 0, "AP75": 0, "AR": 0, "objects": 1}
        assert [len(curve) for curve in details["bbox"]["curves"].values()] == [101] * 3
        assert np.mean(details["bbox"]["curves"]["AP50"]) == pytest.approx((thing["AP50"] + 0) / 2, abs=1e-3)

    def test_pictures_are_sound(self, details):
        page = accuracy_page("data & <set>", json.loads(json.dumps(details)))
        assert "<set>" not in page and "<other>" not in page
        drawn = [f"<figure>{rest.split('</figure>')[0]}</figure>" for rest in page.split("<figure>")[1:]]
        drawn.append(confusion_svg(**details["confusion"]))
        assert len(drawn) == 3 and drawn[-1] in page
        for picture in drawn:
            ElementTree.fromstring(picture)
        many = [[0] * 91 for _ in range(91)]
        many[70][70] = 5
        assert "class 70 taken for class 70: 5 of 5" in confusion_svg([f"class {i}" for i in range(90)], many)


def test_masks_of_results_are_measured():
    """An RLE's area decides small and large, whatever form it came in."""
    truth = dataset([[10, 10, 31, 31]])
    counts = coco_mask.decode(perfect(truth)[0]["segmentation"])
    assert counts.sum() == 961
    assert evaluate(truth, perfect(truth), ("segm",))["segm"]["APs"] == pytest.approx(1.0)
