"""Keypoint R-CNN by the tools: trained, scored from a checkpoint and from its results file, and predictions drawn."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_keypoint_head import KEYPOINTS

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.data.catalog import build_dataset, check_num_classes
from maskrcnn_benchmark.data.images import read_image
from maskrcnn_benchmark.errors import ConfigError

SIGMAS = ["TEST.KEYPOINT_SIGMAS", "(0.1, 0.1, 0.1, 0.1, 0.1)"]


@pytest.fixture(scope="module")
def trained(run, tiny_config, tmp_path_factory):
    output = tmp_path_factory.mktemp("keypoints")
    overrides = [*KEYPOINTS, *SIGMAS, "OUTPUT_DIR", str(output), "SOLVER.MAX_ITER", "3"]
    overrides += ["MODEL.ROI_HEADS.SCORE_THRESH", "0.0"]  # after three steps nothing is certain
    done = run("tools/train_net.py", "--config-file", tiny_config, *overrides)
    assert done.returncode == 0, done.stderr
    return output, overrides


def test_train_net_learns_and_scores_keypoints(trained):
    output, _ = trained
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss_kp"] > 0 for line in lines if "loss" in line)
    scores = json.loads((output / "result.json").read_text())
    assert 0 <= scores["keypoints"]["AP"] <= 1 and "AP" in scores["bbox"] and scores["segm"] is None
    results = json.loads((output / "inference" / "coco_2017_val.json").read_text())
    assert results and all(len(result["keypoints"]) == 15 for result in results)
    assert "keypoints" in json.loads((output / "inference" / "coco_2017_val_details.json").read_text())


def test_test_net_scores_the_checkpoint_and_its_results_alike(run, trained, tiny_config, tmp_path):
    output, overrides = trained
    wanted = json.loads((output / "result.json").read_text())["keypoints"]
    sources = [("--ckpt", output / "model_final.pth"), ("--predictions", output / "inference" / "coco_2017_val.json")]
    for number, source in enumerate(sources):
        here = ["OUTPUT_DIR", str(tmp_path / str(number))]
        done = run("tools/test_net.py", "--config-file", tiny_config, *source, *overrides, *here)
        assert done.returncode == 0, done.stderr
        scores = json.loads((tmp_path / str(number) / "result.json").read_text())
        assert scores["keypoints"]["AP"] == pytest.approx(wanted["AP"], abs=1e-6)


def test_predict_draws_skeletons(run, trained, shapes, tmp_path):
    output, _ = trained
    picture = sorted((shapes / "val2017").iterdir())[0]
    arguments = ["--weights", output / "model_final.pth", "--output", tmp_path, "--json", tmp_path / "results.json"]
    done = run("tools/predict.py", picture, *arguments, "--threshold", "0")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results and all(len(result["keypoints"]) == 15 for result in results)
    drawn = read_image(tmp_path / f"{picture.name}.png")
    assert drawn.shape == read_image(picture).shape and not np.array_equal(drawn, read_image(picture))


def test_another_number_of_keypoints_is_refused(tiny_config):
    cfg = get_config(tiny_config, [*KEYPOINTS, "MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES", "17"])
    with pytest.raises(ConfigError, match=r"MODEL\.ROI_KEYPOINT_HEAD\.NUM_CLASSES is 17.* 5 keypoints"):
        check_num_classes(cfg, build_dataset(("coco_2017_val",), cfg, training=False))
