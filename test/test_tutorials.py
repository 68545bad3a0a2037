"""The scripts of docs/tutorials, run as they stand in an empty directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
from conftest import ROOT


def run_tutorial(name: str, directory: Path) -> str:
    """What the script prints, run in an empty directory as a user would."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, str(ROOT / "docs" / "tutorials" / name)]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_tutorial_train_mask_rcnn(tmp_path):
    printed = run_tutorial("train_mask_rcnn.py", tmp_path)
    values = losses(tmp_path / "output" / "mask_rcnn")
    assert values[-1] < values[0] / 2
    scores = json.loads((tmp_path / "output" / "mask_rcnn" / "result.json").read_text())
    assert scores["bbox"]["AP"] > 0 and scores["segm"]["AP"] > 0
    assert "eval_metrics: OrderedDict([('bbox_mmap', 0." in printed and "'category'" in printed
    assert cv2.imread(str(tmp_path / "output" / "mask_rcnn" / "visualize_000000000001.jpg.png")).shape == (128, 128, 3)


def test_tutorial_fine_tune_pedestrians(tmp_path):
    printed = run_tutorial("fine_tune_pedestrians.py", tmp_path)
    log = (tmp_path / "output" / "pedestrians" / "log.txt").read_text()
    assert "dropped roi_heads.box.predictor.cls_score.weight" in log and "loaded" in log
    values = losses(tmp_path / "output" / "pedestrians")
    assert values[-1] < values[0] * 0.85
    scores = json.loads((tmp_path / "output" / "pedestrians" / "result.json").read_text())
    assert scores["bbox"]["AP"] > 0 and scores["segm"]["AP"] > 0
    assert "own backbone: {'loss_objectness'" in printed and printed.rstrip().endswith("That's it!")


def test_tutorial_balloons(tmp_path):
    printed = run_tutorial("balloons.py", tmp_path)
    values = losses(tmp_path / "output" / "balloon")
    assert values[-1] < values[0] * 0.75
    assert "metrics: OrderedDict([('bbox_mmap', 0." in printed
    assert len(list((tmp_path / "output" / "balloon" / "drawn").iterdir())) == 6
