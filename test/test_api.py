"""The Python API: every parameter reaches its key, and a model is trained, evaluated, asked, saved and loaded."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT

import maskrcnn_benchmark as mb
from maskrcnn_benchmark import api, transforms
from maskrcnn_benchmark.config import flat, get_config
from maskrcnn_benchmark.config.checks import get
from maskrcnn_benchmark.errors import CheckpointError, ConfigError, DataError
from maskrcnn_benchmark.models.weights import resolve

TINY = {
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.FPN.USE_GN": True,
    "MODEL.GROUP_NORM.NUM_GROUPS": 8,
    "MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN": 50,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_LAYERS": (16,),
}


def tiny(kind=mb.MaskRCNN, **options):
    sizes = {"anchor_sizes": (8, 16, 32, 64, 96), "fpn_num_channels": 16, "rpn_batch_size_per_im": 32}
    proposals = {"test_pre_nms_top_n": 100, "test_post_nms_top_n": 50, "score_threshold": 0.0, "keep_top_k": 10}
    return kind(6, "ResNet18", **sizes, **proposals, device="cpu", overrides=TINY, **options)


# ------------------------------------------------------------------------------------------ parameters and keys


def test_imports_are_not_dearer_than_they_need_be():
    code = (
        "import sys, maskrcnn_benchmark as mb; assert 'torch' not in sys.modules and 'MaskRCNN' in dir(mb); "
        "from maskrcnn_benchmark import transforms; assert 'torch' in sys.modules; "
        "from maskrcnn_benchmark.engine import train; assert 'torch._dynamo' not in sys.modules; mb.Mask"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1 and "AttributeError" in result.stderr and "'Mask'" in result.stderr


# As in PaddleX's documentation of version 1, word for word
MODEL = """num_classes=81, backbone='ResNet50', with_fpn=True, aspect_ratios=[0.5, 1.0, 2.0],
anchor_sizes=[32, 64, 128, 256, 512], with_dcn=False, rpn_cls_loss='SigmoidCrossEntropy', rpn_focal_loss_alpha=0.25,
rpn_focal_loss_gamma=2, rcnn_bbox_loss='SmoothL1Loss', rcnn_nms='MultiClassNMS', keep_top_k=100, nms_threshold=0.5,
score_threshold=0.05, softnms_sigma=0.5, bbox_assigner='BBoxAssigner', fpn_num_channels=256, input_channel=3,
rpn_batch_size_per_im=256, rpn_fg_fraction=0.5, test_pre_nms_top_n=None, test_post_nms_top_n=1000"""
TRAIN = """num_epochs, train_dataset, train_batch_size=1, eval_dataset=None, save_interval_epochs=1,
log_interval_steps=20, save_dir='output', pretrain_weights='IMAGENET', optimizer=None, learning_rate=1.0/800,
warmup_steps=500, warmup_start_lr=1.0 / 2400, lr_decay_epochs=[8, 11], lr_decay_gamma=0.1, metric=None, use_vdl=False,
early_stop=False, early_stop_patience=5, resume_checkpoint=None"""
EVALUATE = "eval_dataset, batch_size=1, epoch_id=None, metric=None, return_details=False"


@pytest.mark.parametrize(
    "function, documented",
    [
        (api.MaskRCNN.__init__, MODEL),
        (api.MaskRCNN.train, TRAIN),
        (api.MaskRCNN.evaluate, EVALUATE),
        (api.MaskRCNN.predict, "img_file, transforms=None"),
        (api.MaskRCNN.batch_predict, "img_file_list, transforms=None"),
    ],
)
def test_signatures_are_paddlex_own(function, documented):
    exec(f"def wanted(self, {documented}): pass", scope := {})
    for ours, theirs in zip(*(inspect.signature(f).parameters.values() for f in (function, scope["wanted"]))):
        default = list(ours.default) if isinstance(ours.default, tuple) else ours.default
        assert (ours.name, default) == (theirs.name, theirs.default)
    assert len(inspect.signature(function).parameters) >= len(inspect.signature(scope["wanted"]).parameters)


def test_the_default_model_is_torchvisions_with_paddlex_numbers():
    """So the keys that api.py lists are those of configs/, in which nothing may change unnoticed."""
    ours = flat(mb.MaskRCNN(num_classes=91).cfg)
    recipe = flat(get_config(ROOT / "configs" / "e2e_mask_rcnn_R_50_FPN_1x_torchvision.yaml"))
    other = {key for key in ours if ours[key] != recipe[key]}
    other = {key for key in other if not key.startswith(("DATASETS.", "MODEL.RETINANET.", "MODEL.ROI_KEYPOINT_HEAD."))}
    assert other == {
        "MODEL.RPN.PRE_NMS_TOP_N_TEST",
        "TEST.DETECTIONS_PER_IMG",  # RetinaNet's
        *(f"SOLVER.{key}" for key in ("MAX_ITER", "STEPS", "BASE_LR", "BIAS_LR_FACTOR", "WEIGHT_DECAY_BIAS")),
    }
    assert flat(mb.FasterRCNN(91).cfg) == ours | {"MODEL.MASK_ON": False}


HEADS, RPN, BOX = "MODEL.ROI_HEADS.", "MODEL.RPN.", "MODEL.ROI_BOX_HEAD."


@pytest.mark.parametrize(
    "parameters, keys",
    [
        ({"num_classes": 3}, {f"{BOX}NUM_CLASSES": 3}),
        ({"backbone": "ResNet18"}, {"MODEL.BACKBONE.CONV_BODY": "R-18-FPN"}),
        ({"backbone": "ResNet50_vd_ssld"}, {"MODEL.BACKBONE.CONV_BODY": "R-50vd-FPN"}),
        ({"backbone": "ResNet101_vd"}, {"MODEL.BACKBONE.CONV_BODY": "R-101vd-FPN"}),
        ({"backbone": "ResNet101"}, {"MODEL.BACKBONE.CONV_BODY": "R-101-FPN"}),
        ({"backbone": "HRNet_W18"}, {"MODEL.BACKBONE.CONV_BODY": "HRNet-W18-FPN"}),
        (
            {"with_fpn": False},
            {
                "MODEL.BACKBONE.CONV_BODY": "R-50-C4",
                f"{RPN}USE_FPN": False,
                f"{RPN}PRE_NMS_TOP_N_TEST": 1000,
                "MODEL.RESNETS.BACKBONE_OUT_CHANNELS": 1024,
            },
        ),
        ({"with_fpn": False, "test_post_nms_top_n": 300}, {f"{RPN}POST_NMS_TOP_N_TEST": 300}),
        ({"with_fpn": False, "backbone": "ResNet18"}, {"MODEL.RESNETS.BACKBONE_OUT_CHANNELS": 256}),
        ({"aspect_ratios": [0.3, 1]}, {f"{RPN}ASPECT_RATIOS": (0.3, 1)}),
        ({"anchor_sizes": [8, 16, 32, 64, 128]}, {f"{RPN}ANCHOR_SIZES": (8, 16, 32, 64, 128)}),
        (
            {"with_dcn": True},
            {
                "MODEL.RESNETS.STAGE_WITH_DCN": (False, True, True, True),
                "MODEL.RESNETS.WITH_MODULATED_DCN": True,
            },
        ),
        (
            {"rpn_cls_loss": "SigmoidFocalLoss", "rpn_focal_loss_alpha": 0.4, "rpn_focal_loss_gamma": 1},
            {f"{RPN}CLS_LOSS": "SigmoidFocalLoss", f"{RPN}FOCAL_LOSS_ALPHA": 0.4, f"{RPN}FOCAL_LOSS_GAMMA": 1.0},
        ),
        ({"rcnn_bbox_loss": "CIoULoss"}, {f"{BOX}BBOX_LOSS": "CIoULoss", f"{BOX}BBOX_LOSS_WEIGHT": 10.0}),
        ({}, {f"{BOX}BBOX_LOSS": "SmoothL1Loss", f"{BOX}BBOX_LOSS_WEIGHT": 1.0, f"{RPN}PRE_NMS_TOP_N_TEST": 6000}),
        (
            {"rcnn_nms": "MultiClassSoftNMS", "softnms_sigma": 0.3, "keep_top_k": 300, "score_threshold": 0.01},
            {
                f"{HEADS}NMS_TYPE": "MultiClassSoftNMS",
                f"{HEADS}SOFT_NMS_SIGMA": 0.3,
                f"{HEADS}DETECTIONS_PER_IMG": 300,
                f"{HEADS}SCORE_THRESH": 0.01,
            },
        ),
        ({"nms_threshold": 0.6}, {f"{HEADS}NMS": 0.6}),
        ({"bbox_assigner": "LibraBBoxAssigner"}, {f"{HEADS}BBOX_ASSIGNER": "LibraBBoxAssigner"}),
        ({"fpn_num_channels": 64}, {"MODEL.RESNETS.BACKBONE_OUT_CHANNELS": 64}),
        ({"input_channel": 1}, {"INPUT.PIXEL_MEAN": [0.485], "INPUT.PIXEL_STD": [0.229]}),
        ({"input_channel": 4}, {"INPUT.PIXEL_MEAN": pytest.approx([0.485, 0.456, 0.406, 0.449])}),
        ({"rpn_batch_size_per_im": 64}, {f"{RPN}BATCH_SIZE_PER_IMAGE": 64}),
        ({"rpn_fg_fraction": 0.25}, {f"{RPN}POSITIVE_FRACTION": 0.25}),
        ({"test_pre_nms_top_n": 700}, {f"{RPN}PRE_NMS_TOP_N_TEST": 700}),
        ({"test_post_nms_top_n": 300}, {f"{RPN}FPN_POST_NMS_TOP_N_TEST": 300}),
        ({"device": "cpu"}, {"MODEL.DEVICE": "cpu"}),
        ({"num_classes": 3, "overrides": {f"{BOX}NUM_CLASSES": 4}}, {f"{BOX}NUM_CLASSES": 4}),
    ],
    ids=str,
)
def test_model_parameters_reach_their_keys(parameters, keys):
    cfg = mb.MaskRCNN(**parameters).cfg
    assert {key: get(cfg, key) for key in keys} == keys


class Configured(Exception):
    """Carries what run_training was called with."""


@pytest.fixture
def configured(monkeypatch, tmp_path):
    """The configuration and `resume` of a train call that does not train."""

    def stop(cfg, device, resume):
        raise Configured(cfg, resume)

    monkeypatch.setattr(api, "run_training", stop)

    def call(model=None, **parameters):
        data = {"train_dataset": mb.datasets.Dataset("coco_2017_train"), "save_dir": tmp_path}
        with pytest.raises(Configured) as caught:
            (model or mb.MaskRCNN(device="cpu")).train(**{"num_epochs": 12, **data, **parameters})
        return caught.value.args

    return call


@pytest.mark.parametrize(
    "parameters, keys",
    [
        ({"num_epochs": 20}, {"SOLVER.MAX_EPOCHS": 20, "SOLVER.STEPS": (8, 11)}),
        ({"num_epochs": 9}, {"SOLVER.MAX_EPOCHS": 9, "SOLVER.STEPS": (8,)}),
        ({"train_batch_size": 3}, {"SOLVER.IMS_PER_BATCH": 3}),
        ({"save_interval_epochs": 4}, {"SOLVER.SAVE_EPOCHS": 4}),
        ({"log_interval_steps": 7}, {"LOGGING.PERIOD": 7}),
        ({}, {"SOLVER.OPTIMIZER": "SGD", "SOLVER.BASE_LR": 0.00125, "SOLVER.WARMUP_ITERS": 500}),
        ({}, {"SOLVER.WARMUP_FACTOR": pytest.approx(1 / 3), "SOLVER.WARMUP_METHOD": "linear", "SOLVER.MOMENTUM": 0.9}),
        ({}, {"MODEL.WEIGHT": "catalog://torchvision/resnet50", "MODEL.RESNETS.NORM": "FrozenBN"}),
        ({"pretrain_weights": "COCO"}, {"MODEL.WEIGHT": "catalog://torchvision/maskrcnn_resnet50_fpn_coco"}),
        ({"pretrain_weights": "x.pth"}, {"MODEL.WEIGHT": "x.pth", "MODEL.REPLACE_HEADS": True}),
        (
            {"pretrain_weights": None},
            {"MODEL.WEIGHT": "", "MODEL.BACKBONE.FREEZE_CONV_BODY_AT": 0, "MODEL.RESNETS.NORM": "BN"},
        ),
        ({"optimizer": "AdamW"}, {"SOLVER.OPTIMIZER": "AdamW"}),
        ({"learning_rate": 0.01, "warmup_start_lr": 0.002}, {"SOLVER.WARMUP_FACTOR": pytest.approx(0.2)}),
        ({"warmup_steps": 10}, {"SOLVER.WARMUP_ITERS": 10}),
        ({"lr_decay_epochs": [2], "lr_decay_gamma": 0.5}, {"SOLVER.STEPS": (2,), "SOLVER.GAMMA": 0.5}),
        ({"use_vdl": True}, {"LOGGING.TENSORBOARD": True}),
        ({"early_stop_patience": 3}, {"SOLVER.EARLY_STOP_PATIENCE": 0, "LOGGING.TENSORBOARD": False}),
    ],
    ids=str,
)
def test_training_parameters_reach_their_keys(configured, parameters, keys):
    cfg, resume = configured(**parameters)
    assert {key: get(cfg, key) for key in keys} == keys and resume is False


def test_data_sets_reach_their_keys(configured, tmp_path):
    specs = transforms.Compose([transforms.Normalize(mean=[0.1, 0.2, 0.3]), transforms.ResizeByShort((64, 96), 128)])
    data = mb.datasets.Dataset("voc_2007_train", specs, data_dir="data", num_workers=2)
    resize = transforms.ResizeByShort(72, max_size=-1)
    test = mb.datasets.Dataset("voc_2007_val", [resize], data_dir="data", num_workers=0)
    cfg, resume = configured(
        train_dataset=data,
        eval_dataset=test,
        train_batch_size=5,
        metric="VOC",
        early_stop=True,
        early_stop_patience=3,
        resume_checkpoint=tmp_path / "model_0000003.pth",
    )
    assert resume == tmp_path / "model_0000003.pth"
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.DATA.PATH) == (("voc_2007_train",), ("voc_2007_val",), "data")
    assert (
        cfg.INPUT.PIXEL_MEAN == [0.1, 0.2, 0.3]
        and specs == cfg.INPUT.TRANSFORMS
        and cfg.DATALOADER.NUM_WORKERS in (1, 2, 4)
    )
    assert cfg.INPUT.MIN_SIZE_TEST == 72 and cfg.INPUT.MAX_SIZE_TEST > 10**6
    assert cfg.TEST.METRICS == ("coco", "voc07") and cfg.TEST.IMS_PER_BATCH == 5 and cfg.SOLVER.EARLY_STOP_PATIENCE == 3
    with pytest.raises(CheckpointError, match="holds no last_checkpoint"):
        mb.MaskRCNN(device="cpu").train(12, data, save_dir=tmp_path, resume_checkpoint=tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    other = mb.datasets.Dataset("voc_2007_val", [transforms.Normalize(), resize], data_dir="data")
    with pytest.raises(ConfigError, match="Normalize"):
        mb.MaskRCNN(device="cpu").train(12, data, eval_dataset=other, save_dir=tmp_path)
    assert configured(resume_checkpoint=tmp_path)[1] == tmp_path / "model_0000004.pth"


def test_names_of_data_sets():
    name = mb.datasets.CocoDetection("some & pictures", "a.json").name
    directory = str(Path.cwd()).replace(" ", "%20")
    assert name == f"coco://{Path('a.json').resolve()}?images={directory}/some%20%26%20pictures"
    voc = mb.datasets.VOCDetection("VOC2012", split="val", classes=["a b", "c"])
    assert voc.name == f"voc://{Path('VOC2012').resolve()}?split=val&classes=a+b%2Cc"
    assert api.test_data_keys(voc, 1, None)["TEST.METRICS"] == ("coco", "voc07")
    assert api.test_data_keys(voc, 1, "COCO")["TEST.METRICS"] == ("coco",)


def test_the_document_lists_every_parameter():
    text = (ROOT / "docs" / "api.md").read_text()
    for function in (api.MaskRCNN.__init__, api.MaskRCNN.train):
        for name in list(inspect.signature(function).parameters)[1:]:
            assert f"| `{name}`" in text or f", `{name}`" in text, name


def test_transforms_are_the_mappings_of_yaml():
    assert transforms.ResizeByShort(short_size=64) == {"type": "ResizeByShort", "short_size": 64}
    assert transforms.RandomHorizontalFlip(0.3) == {"type": "RandomHorizontalFlip", "prob": 0.3}
    assert "short_size" in inspect.signature(transforms.ResizeByShort).parameters
    with pytest.raises(TypeError, match="shrot"):
        transforms.ResizeByShort(shrot_size=64)
    with pytest.raises(ConfigError, match="probability"):
        transforms.RandomHorizontalFlip(2)


def test_names_of_weights_are_looked_up_in_the_cache(monkeypatch, tmp_path, configured):
    """A missing file says what to put where; one that is there is taken."""
    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path))
    address = configured(mb.MaskRCNN(backbone="ResNet18"))[0].MODEL.WEIGHT
    file = tmp_path / "resnet18.pth"
    with pytest.raises(CheckpointError, match=r"put https.*/resnet18-f37072fd\.pth to") as caught:
        resolve(address)
    assert str(file) in str(caught.value) and "ALLOW_PICKLE" not in str(caught.value)
    file.write_bytes(b"")
    assert resolve(address) == file
    for options, weights in (({"backbone": "ResNet50_vd"}, "IMAGENET"), ({"backbone": "ResNet101"}, "COCO")):
        with pytest.raises(ConfigError, match=f"no {weights} weights"):
            mb.MaskRCNN(**options).train(1, mb.datasets.Dataset("coco_2017_train"), pretrain_weights=weights)


def test_mistakes_are_named(shapes):
    data = mb.datasets.Dataset("coco_2017_train")
    model = mb.MaskRCNN(device="cpu")
    for call, error, words in (
        (lambda: mb.MaskRCNN(backbone=torch.nn.Identity()), ConfigError, "RCNN.backbone=...."),
        (lambda: mb.MaskRCNN(backbone="ResNet5"), ConfigError, "known are ResNet18"),
        (lambda: mb.MaskRCNN(rcnn_nms="nms"), ConfigError, "MultiClassSoftNMS"),
        (lambda: mb.MaskRCNN(backbone="HRNet_W18", with_fpn=False), ConfigError, "HRNet-W18-C4"),
        (lambda: model.predict("x.png"), ConfigError, "call train first"),
        (lambda: model.train(1, mb.datasets.Dataset("x", shuffle=False)), ConfigError, "shuffle"),
        (lambda: model.train(1, data, eval_dataset=data, metric="AP"), ConfigError, "COCO, VOC"),
        (lambda: model.train(1, data, early_stop=True), ConfigError, "EARLY_STOP_PATIENCE"),
        (lambda: model.train(1, data, eval_dataset=mb.datasets.Dataset("x", data_dir="y")), ConfigError, "data_dir"),
        (lambda: api.eval_keys([transforms.RandomHorizontalFlip()]), ConfigError, "RandomHorizontalFlip"),
        (lambda: api.eval_keys([transforms.ResizeByShort((64, 96))]), ConfigError, "one short_size"),
        (lambda: mb.visualize(np.zeros((4, 4)), []), DataError, "uint8"),
    ):
        with pytest.raises(error, match=words):
            call()


# ------------------------------------------------------------------------------------------------- a real model


def shape_data(shapes: Path, split: str, specs: list) -> api.Dataset:
    file = shapes / "annotations" / f"instances_{split}2017.json"
    return mb.datasets.CocoDetection(shapes / f"{split}2017", file, specs, num_workers=0)


@pytest.fixture(scope="module")
def data(shapes) -> tuple[api.Dataset, api.Dataset]:
    resize = transforms.ResizeByShort(96, 96)
    return shape_data(shapes, "train", [transforms.RandomHorizontalFlip(), resize]), shape_data(shapes, "val", [resize])


SOLVER = {"pretrain_weights": None, "optimizer": "AdamW", "learning_rate": 0.002, "train_batch_size": 4}
SOLVER |= {"warmup_steps": 2, "warmup_start_lr": 0.001, "log_interval_steps": 1}
SOLVER |= {"lr_decay_epochs": [2], "lr_decay_gamma": 0.5}


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> tuple[api.MaskRCNN, Path]:
    output = tmp_path_factory.mktemp("trained")
    model = tiny()
    model.train(3, data[0], eval_dataset=data[1], save_dir=output, use_vdl=True, **SOLVER)
    return model, output


def test_training_writes_a_runs_directory(trained, data):
    """12 images and 4 a step: an epoch is 3 steps, each followed by a checkpoint and an evaluation."""
    _, output = trained
    names = {path.name for path in output.iterdir()}
    assert {"config.yaml", "log.txt", "metrics.jsonl", "result.json", "model_final.pth", "model_best.pth"} <= names
    assert {name for name in names if name.startswith("model_0")} == {"model_0000003.pth", "model_0000006.pth"}
    assert any(name.startswith("events.out.tfevents.") for name in names)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["iter"] for line in lines] == list(range(1, 10))
    # From warmup_start_lr to learning_rate in 2 steps, and half of it after 2 epochs
    assert [line["lr"] for line in lines] == pytest.approx([0.001, 0.0015, *[0.002] * 4, *[0.001] * 3])
    assert (output / "log.txt").read_text().count("accuracy at iteration") == 3
    assert data[0].labels == ["background", "circle", "square", "triangle", "star", "cross"]


def test_resumed_training_ends_as_an_uninterrupted_one(trained, data, tmp_path):
    _, output = trained
    model = tiny()
    model.train(
        3, data[0], eval_dataset=data[1], save_dir=tmp_path, resume_checkpoint=output / "model_0000006.pth", **SOLVER
    )
    ends = [torch.load(path / "model_final.pth", weights_only=True)["model"] for path in (output, tmp_path)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert not list(tmp_path.glob("events.out.tfevents.*"))  # without use_vdl


def saved(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_training_starts_from_pretrain_weights(trained, data, tmp_path, monkeypatch):
    """A file of this project, and of torchvision under IMAGENET's and COCO's names in the cache: at a rate of next to
    nothing what is loaded is what is saved; what was not in the file is fresh."""
    known = saved(trained[1] / "model_final.pth")["model"]
    small = {"learning_rate": 1e-12, "warmup_start_lr": 1e-13, "train_batch_size": 12, "log_interval_steps": 1}
    tiny().train(1, data[0], save_dir=tmp_path / "file", pretrain_weights=trained[1] / "model_final.pth", **small)
    assert close(saved(tmp_path / "file" / "model_final.pth")["model"], known)
    assert "momentum_buffer" in saved(tmp_path / "file" / "model_final.pth")["optimizer"]["state"][0]  # SGD, by default
    assert "exp_avg" in saved(trained[1] / "model_final.pth")["optimizer"]["state"][0]

    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path))
    body = {name.removeprefix("backbone.body."): known[name] for name in known if name.startswith("backbone.body.")}
    torch.save({name.removeprefix("stem."): body[name] + 1 for name in body}, tmp_path / "resnet18.pth")
    tiny().train(1, data[0], save_dir=tmp_path / "imagenet", **small)
    found = saved(tmp_path / "imagenet" / "model_final.pth")["model"]
    assert close({name: found[f"backbone.body.{name}"] for name in body}, {name: body[name] + 1 for name in body})
    assert not close(found, known)


def close(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_early_stop_ends_at_a_plateau(data, tmp_path):
    """A model that does not move scores the same each epoch: the first is the best, and the second without gain the
    last."""
    still = SOLVER | {"learning_rate": 1e-12, "warmup_start_lr": 1e-12, "warmup_steps": 0, "train_batch_size": 12}
    tiny().train(9, data[0], eval_dataset=data[1], save_dir=tmp_path, early_stop=True, early_stop_patience=2, **still)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_evaluation_gives_the_runs_scores_and_details(trained, data):
    model, output = trained
    metrics, details = model.evaluate(data[1], batch_size=2, return_details=True)
    result = json.loads((output / "result.json").read_text())
    assert list(metrics) == ["bbox_mmap", "segm_mmap"]
    assert metrics["bbox_mmap"] == pytest.approx(result["bbox"]["AP"], abs=1e-6)
    assert metrics["segm_mmap"] == pytest.approx(result["segm"]["AP"], abs=1e-6)
    assert set(details) == {"bbox", "mask", "gt"} and len(details["bbox"]) == len(details["mask"]) > 0
    image, category, box, score = details["bbox"][0]
    assert image in range(1, 6) and category in (1, 2, 4, 7, 9) and len(box) == 4 and 0 <= score <= 1
    assert details["mask"][0][2].shape == (96, 96) and details["mask"][0][2].dtype == np.uint8
    assert {"bbox", "segmentation", "category_id"} <= details["gt"][0].keys()
    voc = model.evaluate(data[1], metric="VOC")
    assert list(voc) == ["bbox_map", "segm_map"] and 0 <= voc["bbox_map"] <= 1
    assert voc["segm_map"] == pytest.approx(result["segm"]["AP50"], abs=1e-6)


def test_predictions_have_the_documented_form(trained, shapes, tmp_path):
    model, _ = trained
    files = sorted((shapes / "val2017").iterdir())[:2]
    found = model.predict(files[0])
    assert 0 < len(found) <= 10 and [entry["score"] for entry in found] == sorted(e["score"] for e in found)[::-1]
    names = {1: "circle", 2: "square", 4: "triangle", 7: "star", 9: "cross"}
    for entry in found:
        assert set(entry) == {"bbox", "mask", "category", "category_id", "score"}
        x, y, width, height = entry["bbox"]
        assert 0 <= x <= x + width <= 96 and 0 <= y <= y + height <= 96
        assert entry["mask"].shape == (96, 96) and entry["mask"].dtype == np.uint8 and entry["mask"].max() <= 1
        assert names[entry["category_id"]] == entry["category"]
    array = cv2.imread(str(files[0]))  # blue, green, red
    assert same(model.predict(array), found) and not same(model.predict(array[..., ::-1]), found)
    assert model.batch_predict([]) == []
    for together, file in zip(model.batch_predict([files[0], str(files[1])]), files):
        assert same(together, model.predict(file), tolerance=1e-4)
    smaller = model.predict(files[0], transforms=[transforms.ResizeByShort(64, 64)])
    assert smaller and not same(smaller, found)
    with pytest.raises(ConfigError, match="Normalize"):
        model.predict(files[0], transforms=[transforms.Normalize(std=[0.1, 0.1, 0.1]), transforms.ResizeByShort(96)])

    picture = mb.visualize(array, found, threshold=0.0, save_dir=tmp_path)
    assert picture.shape == array.shape and (picture != array).any()
    assert (cv2.imread(str(tmp_path / "visualize_image.png")) == picture).all()
    assert (mb.visualize(files[0], found, threshold=1.1, save_dir=None) == array).all()
    assert len(list(tmp_path.iterdir())) == 1


def same(one: list[dict], other: list[dict], tolerance: float = 0.0) -> bool:
    return len(one) == len(other) and all(
        a["category_id"] == b["category_id"] and np.allclose(a["bbox"], b["bbox"], atol=max(tolerance * 100, 1e-9))
        for a, b in zip(one, other)
    )


def test_saved_models_come_back(trained, data, shapes, tmp_path):
    model, output = trained
    file = sorted((shapes / "val2017").iterdir())[0]
    model.save(tmp_path / "new" / "model.pth")
    for path in (tmp_path / "new" / "model.pth", output / "model_final.pth"):
        loaded = mb.MaskRCNN.load(path, device="cpu")
        assert same(loaded.predict(file), model.predict(file)) and loaded.cfg == model.cfg
    with pytest.raises(CheckpointError, match=r"MaskRCNN\.load"):
        mb.FasterRCNN.load(output / "model_final.pth")
    with pytest.raises(CheckpointError, match=r"MODEL\.WEIGHT"):
        resumed = {"resume_checkpoint": tmp_path / "new" / "model.pth"}
        tiny().train(3, data[0], save_dir=tmp_path / "run", **SOLVER, **resumed)


def test_fine_tuning_without_masks_says_how_many_classes_there_are(data, tmp_path):
    with pytest.raises(ConfigError, match="set it to 6"):
        mb.FasterRCNN(5, device="cpu").train(1, data[0], save_dir=tmp_path, pretrain_weights=None)
    model = tiny(mb.FasterRCNN)
    model.train(
        3, data[0], eval_dataset=data[1], save_interval_epochs=2, metric="VOC", save_dir=tmp_path / "run", **SOLVER
    )
    # Epochs of 3 steps, of which the 2nd and the last are evaluated
    scored = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["iter"] for line in scored] == [6, 9] and "voc07/AP50" in scored[0]
    assert [path.name for path in (tmp_path / "run").glob("model_0*")] == ["model_0000006.pth"]
    voc = json.loads((tmp_path / "run" / "result.json").read_text())["voc07"]
    assert model.evaluate(data[1], metric="VOC") == {"bbox_map": pytest.approx(voc["AP50"], abs=1e-6)}
    assert list(model.evaluate(data[1])) == ["bbox_mmap"]
    assert "mask" not in model.predict(np.zeros((96, 96, 3), np.uint8))[0]


RANKS = """
from pathlib import Path
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_api import SOLVER, shape_data, tiny
from maskrcnn_benchmark import transforms
data = [shape_data(Path({shapes!r}), split, [transforms.ResizeByShort(96, 96)]) for split in ("train", "val")]
model = tiny()
model.train(1, data[0], eval_dataset=data[1], save_dir={output!r}, **SOLVER)
metrics, details = model.evaluate(data[1], return_details=True)
scores = f"{{metrics['bbox_mmap']}} {{len(details['bbox'])}} {{len(details['gt'])}}"
Path({output!r}, "scores" + os.environ["RANK"]).write_text(scores)  # on stdout two ranks' lines may mingle
"""


def test_two_ranks_train_and_agree(run, shapes, tmp_path):
    """Under torchrun every rank makes the same calls, and gets the same answers."""
    script = tmp_path / "ranks.py"
    tests = str(ROOT / "test")
    script.write_text(RANKS.format(root=str(ROOT), tests=tests, shapes=str(shapes), output=str(tmp_path / "run")))
    done = run(str(script), ranks=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    one, other = ((tmp_path / "run" / f"scores{rank}").read_text() for rank in range(2))
    assert one == other and int(one.split()[1]) > 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
