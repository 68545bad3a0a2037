"""configs/cascade_mask_rcnn_R_50_AugFPN_balloon.yaml from outlines drawn in VIA to pictures, by the tools."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from pycocotools import mask as coco_mask

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.device.base import Device
from maskrcnn_benchmark.models.build import build_model

CONFIG = ROOT / "configs" / "cascade_mask_rcnn_R_50_AugFPN_balloon.yaml"


def draw_balloons(directory: Path, images: int, seed: int) -> None:
    """Red ellipses before grey noise, and via_region_data.json in VIA 1's form, without attributes, as the balloons
    have it."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    entries = {}
    for number in range(images):
        picture, regions = rng.integers(60, 140, (320, 320, 3), np.uint8), {}
        for centre in rng.permutation([(90, 90), (230, 90), (90, 230), (230, 230)])[: rng.integers(1, 4)]:
            radii = rng.uniform(35, 60, 2)
            x, y = np.round(centre + np.stack((np.cos(angles), np.sin(angles)), 1) * radii).astype(int).T
            cv2.fillPoly(picture, [np.stack((x, y), 1).astype(np.int32)], (30, 40, 220))  # blue, green, red
            shape = {"name": "polygon", "all_points_x": x.tolist(), "all_points_y": y.tolist()}
            regions[str(len(regions))] = {"region_attributes": {}, "shape_attributes": shape}
        name = f"{seed}_{number}.png"
        cv2.imwrite(str(directory / name), picture)
        size = (directory / name).stat().st_size
        entry = {"base64_img_data": "", "file_attributes": {}, "filename": name, "fileref": "", "size": size}
        entries[f"{name}{size}"] = entry | {"regions": regions}
    (directory / "via_region_data.json").write_text(json.dumps(entries), encoding="utf-8")


@pytest.fixture(scope="module")
def balloons(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    draw_balloons(root / "balloon" / "train", 16, seed=1)
    draw_balloons(root / "balloon" / "val", 5, seed=2)
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory, balloons) -> Path:
    """The same model and pipeline, narrow and small, from scratch: with group norm and a rate that suits it."""
    transforms = json.loads(json.dumps(get_config(CONFIG).INPUT.TRANSFORMS))
    (resize,) = (spec for spec in transforms if spec["type"] == "Resize")
    resize["img_scale"] = [[128, 96], [128, 128]]
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(
        f"""
_BASE_: {CONFIG}
DATA: {{PATH: {balloons}}}
DATALOADER: {{NUM_WORKERS: 0}}
MODEL:
  BACKBONE: {{CONV_BODY: R-18-FPN, FREEZE_CONV_BODY_AT: 0}}
  RESNETS: {{NORM: GN, STEM_OUT_CHANNELS: 16, RES2_OUT_CHANNELS: 64, BACKBONE_OUT_CHANNELS: 32}}
  FPN: {{USE_GN: True}}
  GROUP_NORM: {{NUM_GROUPS: 8}}
  RPN:
    ANCHOR_SIZES: (8, 16, 32, 64, 128)
    PRE_NMS_TOP_N_TRAIN: 200
    PRE_NMS_TOP_N_TEST: 200
    FPN_POST_NMS_TOP_N_TRAIN: 100
    FPN_POST_NMS_TOP_N_TEST: 50
    BATCH_SIZE_PER_IMAGE: 64
  ROI_HEADS: {{BATCH_SIZE_PER_IMAGE: 32}}
  ROI_BOX_HEAD: {{MLP_HEAD_DIM: 64, POOLER_SAMPLING_RATIO: 2}}
  ROI_MASK_HEAD:
    CONV_LAYERS: (32,)
    POOLER_SAMPLING_RATIO: 2
INPUT: {{MIN_SIZE_TEST: 112, MAX_SIZE_TEST: 128, TRANSFORMS: {json.dumps(transforms)}}}
SOLVER:
  OPTIMIZER: AdamW
  BASE_LR: 0.002
  LR_SCHEDULER: cosine
  CLIP_GRADIENTS_NORM: 5.0
  IMS_PER_BATCH: 4
  WARMUP_ITERS: 5
  MAX_EPOCHS: 10
TEST: {{IMS_PER_BATCH: 4}}
LOGGING: {{PERIOD: 5, WARMUP_STEPS: 1, TENSORBOARD: False}}
"""
    )
    return path


def test_trained_evaluated_and_predicted(small, balloons, tmp_path, run):
    """It learns: losses of every head fall, and balloons that it has not seen are found."""
    output = tmp_path / "run"
    trained = run("tools/train_net.py", "--config-file", small, "--device", "cpu", "OUTPUT_DIR", output)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = (line for line in lines if "loss_mask_stage2" in line)
    names = [f"loss_{part}_stage{stage}" for stage in range(3) for part in ("classifier", "box_reg", "mask")]
    names += ["loss_objectness", "loss_rpn_box_reg", "loss_classifier_auxiliary", "loss_box_reg_auxiliary"]
    assert {name for name in last if name.startswith("loss_")} == set(names)
    assert last["loss"] < first["loss"] / 2
    for name in (f"loss_{part}_stage{stage}" for stage in range(3) for part in ("classifier", "mask")):
        assert last[name] < first[name] / 1.5, name
    scores = json.loads((output / "result.json").read_text())
    assert scores["bbox"]["AP50"] > 0.8 and scores["segm"]["AP"] > 0.4

    weights = output / "model_final.pth"
    tested = run("tools/test_net.py", "--config-file", output / "config.yaml", "--ckpt", weights, "--device", "cpu",
                 "OUTPUT_DIR", tmp_path / "scores")  # fmt: skip
    assert tested.returncode == 0, tested.stdout + tested.stderr
    again = json.loads((tmp_path / "scores" / "result.json").read_text())
    assert (again["bbox"], again["segm"]) == (scores["bbox"], scores["segm"])

    pictures = balloons / "balloon" / "val"
    options = (
        "--device",
        "cpu",
        "--threshold",
        "0.3",
        "--output",
        tmp_path / "drawn",
        "--json",
        tmp_path / "found.json",
    )
    predicted = run("tools/predict.py", pictures, "--weights", weights, *options)
    assert predicted.returncode == 0, predicted.stdout + predicted.stderr
    assert len(list((tmp_path / "drawn").iterdir())) == 5
    found = json.loads((tmp_path / "found.json").read_text())
    assert len({entry["file_name"] for entry in found}) == 5 <= len(found)
    assert all(
        entry["category_name"] == "balloon" and coco_mask.area(entry["segmentation"]) > 1000 for entry in found
    ), found


def test_the_whole_model_is_what_the_recipe_says():
    """R-50 of full size, without memory: three box heads and mask heads, AugFPN's parts, and the stages' numbers."""
    cfg = get_config(CONFIG)
    model = build_model(cfg, Device(torch.device("meta")))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for stage in range(3):
        assert shapes[f"roi_heads.box.feature_extractor.{stage}.fc6.weight"] == (1024, 256 * 49)
        assert shapes[f"roi_heads.box.predictor.{stage}.cls_score.weight"] == (2, 1024)
        assert shapes[f"roi_heads.box.predictor.{stage}.bbox_pred.weight"] == (8, 1024)  # class-agnostic
        assert shapes[f"roi_heads.mask.stages.{stage}.feature_extractor.mask_fcn4.weight"] == (256, 256, 3, 3)
        assert shapes[f"backbone.fpn.augment.context.{stage}.weight"] == (256, 2048, 1, 1)
    assert shapes["roi_heads.box.pool.fuse.weigh.weight"] == (4, 256, 3, 3)
    assert shapes["roi_heads.auxiliary.feature_extractor.fc6.weight"] == (1024, 256 * 49)
    head = model.roi_heads["box"]
    assert head.ious == (0.5, 0.6, 0.7) and head.loss_weights == (1.0, 0.5, 0.25)
    stds = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
    for weights, std in zip(head.stage_reg_weights, stds):
        assert [1 / weight for weight in weights] == pytest.approx(std, rel=1e-4)
