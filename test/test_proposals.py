"""Region proposals alone: their average recall by hand and against COCO's evaluation, and a whole run."""

from __future__ import annotations

import json
from copy import deepcopy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskrcnn_benchmark.engine.inference import draw_proposals
from maskrcnn_benchmark.evaluation.coco import format_table
from maskrcnn_benchmark.evaluation.proposals import average_recall
from maskrcnn_benchmark.evaluation.results import Results
from maskrcnn_benchmark.evaluation.score import score

NAMES = [f"AR{size}@{limit}" for limit in (100, 1000) for size in ("", "s", "m", "l")]


def truth_of(*boxes, image: int = 1) -> list[dict]:
    return [{"image_id": image, "bbox": list(b), "area": float(b[2] * b[3]), "iscrowd": 0} for b in boxes]


def proposals_of(*boxes, image: int = 1) -> Results:
    """By falling score."""
    count = len(boxes)
    scores = np.linspace(1, 0.1, count) if count else np.zeros(0)
    array = np.array(boxes, np.float64).reshape(-1, 4)
    return Results(np.full(count, image), np.ones(count, np.int64), scores, array)


def test_recall_by_hand():
    """A 100 x 100 object overlapped by .74, so found at 5 of 10 thresholds (.5 to .7), one missed, and one of 20 x 20
    found exactly: (.5 + 0 + 1) / 3; large objects .5 / 2, the small one 1, medium ones none."""
    truth = truth_of((0, 0, 100, 100), (300, 300, 100, 100), (500, 0, 20, 20))
    found = average_recall(truth, proposals_of((0, 0, 100, 74), (500, 0, 20, 20)))
    assert list(found) == NAMES
    assert found["AR@100"] == found["AR@1000"] == pytest.approx(0.5)
    assert (found["ARl@100"], found["ARs@100"], found["ARm@100"]) == (pytest.approx(0.25), 1.0, None)


def test_each_proposal_finds_one_object():
    """Two objects at the same place, one proposal there and one elsewhere: half of them. The best pair is taken first,
    not the first object."""
    found = average_recall(truth_of((0, 0, 50, 50), (0, 0, 50, 50)), proposals_of((0, 0, 50, 50), (200, 0, 50, 50)))
    assert found["AR@100"] == 0.5
    truth = truth_of((0, 0, 100, 60), (0, 0, 100, 100))
    assert average_recall(truth, proposals_of((0, 0, 100, 100), (0, 0, 100, 62)))["AR@100"] == pytest.approx(
        0.95 + 0.05
    )


def test_only_the_best_count():
    """The 101st proposal finds its object among 1000, not among 100."""
    noise = [(400 + i, 400, 10, 10) for i in range(100)]
    found = average_recall(truth_of((0, 0, 50, 50)), proposals_of(*noise, (0, 0, 50, 50)))
    assert found["AR@100"] == 0 and found["AR@1000"] == 1


def test_crowds_other_images_and_nothing():
    crowd = [{**truth_of((0, 0, 50, 50))[0], "iscrowd": 1}]
    assert set(average_recall(crowd, proposals_of((0, 0, 50, 50))).values()) == {None}
    assert average_recall(truth_of((0, 0, 50, 50)), proposals_of((0, 0, 50, 50), image=2))["AR@100"] == 0
    assert average_recall(truth_of((0, 0, 50, 50)), proposals_of())["AR@1000"] == 0


@given(seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_well_separated_objects_have_cocos_recall(seed):
    """Where no proposal overlaps two objects the two rules for pairs agree: COCO's AR100 of one class is ours."""
    rng = np.random.default_rng(seed)
    places = rng.permutation(16)[: rng.integers(1, 9)]
    boxes = [(150.0 * (p % 4), 150.0 * (p // 4), *rng.integers(10, 140, 2).astype(float)) for p in places]
    guesses = [np.array(b) * [1, 1, *rng.uniform(0.6, 1, 2)] for b in boxes for _ in range(2)]
    truth = {
        "images": [{"id": 1, "height": 600, "width": 600}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{**a, "id": i, "category_id": 1} for i, a in enumerate(truth_of(*boxes))],
    }
    results = proposals_of(*guesses)
    ours, _ = score(truth, results, ("box_proposal",))
    theirs, _ = score(truth, deepcopy(results), ("bbox",))
    assert ours["box_proposal"]["AR@100"] == pytest.approx(theirs["bbox"]["AR100"])


def test_table_of_recall():
    table = format_table({"box_proposal": {"AR@100": 0.25, "ARs@100": None}})
    assert table.splitlines() == ["box_proposal  AR@100    0.2500", "box_proposal  ARs@100   n/a"]


def test_pictures_show_the_best_proposals_without_words():
    found = proposals_of(*[(10, 40, 30, 20)] * 20, (60, 60, 30, 30))
    marks = draw_proposals(np.zeros((100, 100, 3), np.uint8), found).any(axis=2)
    rows, columns = np.nonzero(marks)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (39, 60, 9, 40)  # lines are 2 wide
    assert not marks[43:57, 13:37].any()


def test_a_run_of_the_rpn_alone(run, tiny_config, tmp_path):
    """Trains, evaluates, keeps the best by AR@1000, and its file of proposals is scored again as it was."""
    alone = ["MODEL.RPN_ONLY", "True", "MODEL.MASK_ON", "False", "MODEL.RPN.FPN_POST_NMS_TOP_N_TEST", "100"]
    train = run("tools/train_net.py", "--config-file", tiny_config, *alone, "OUTPUT_DIR", tmp_path)
    assert train.returncode == 0, train.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["box_proposal"]) == NAMES and 0 <= result["box_proposal"]["AR@1000"] <= 1
    assert result["bbox"] is None and "box_proposal  AR@1000" in train.stderr + train.stdout
    assert (tmp_path / "model_best.pth").is_file()

    (file,) = (path for path in (tmp_path / "inference").glob("*.json") if "details" not in path.name)
    arguments = ("--config-file", tiny_config, "--predictions", file, *alone, "OUTPUT_DIR", tmp_path / "again")
    test = run("tools/test_net.py", *arguments)
    assert test.returncode == 0, test.stderr
    assert json.loads((tmp_path / "again" / "result.json").read_text())["box_proposal"] == result["box_proposal"]


@pytest.mark.parametrize(
    "pair", [("MODEL.MASK_ON", "True"), ("TEST.METRICS", "('coco', 'voc')"), ("MLPERF.MIN_BBOX_MAP", "0.3")]
)
def test_what_proposals_do_not_have(pair):
    from maskrcnn_benchmark.config import get_config
    from maskrcnn_benchmark.errors import ConfigError

    with pytest.raises(ConfigError, match="RPN_ONLY"):
        get_config(overrides=["MODEL.RPN_ONLY", "True", *pair])
