"""Configuration: inheritance, overrides, checks, and upstream's names."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from maskrcnn_benchmark.config import dump, flat, get_config, legacy, merge, parse_config, sha256
from maskrcnn_benchmark.config.defaults import get_defaults
from maskrcnn_benchmark.errors import ConfigError

CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml"))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_survives_a_round_trip(path):
    cfg = get_config(path)
    again = parse_config(dump(cfg), "checkpoint")
    assert dump(again) == dump(cfg)
    assert sha256(again) == sha256(cfg)


def test_hash_tells_configurations_apart_but_not_places():
    cfg = get_config()
    assert sha256(get_config(overrides=["OUTPUT_DIR", "elsewhere"])) == sha256(cfg)
    assert sha256(get_config(overrides=["SEED", "1"])) != sha256(cfg)


def test_base_then_file_then_overrides(tmp_path):
    write(tmp_path / "a.yaml", "SOLVER:\n  BASE_LR: 0.1\n  MAX_ITER: 10\n  STEPS: (5,)\nSEED: 3")
    write(tmp_path / "b.yaml", "SOLVER: {BASE_LR: 0.2}")
    file = write(tmp_path / "c.yaml", "_BASE_: [a.yaml, b.yaml]\nSOLVER: {MAX_ITER: 20}")
    cfg = get_config(file, ["SOLVER.MOMENTUM", "0.5"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (0.2, 20, (5,))
    assert (cfg.SOLVER.MOMENTUM, cfg.SEED) == (0.5, 3)


def test_configurations_are_frozen_and_independent():
    cfg = get_config()
    with pytest.raises(AttributeError):
        cfg.SEED = 1
    assert get_config(overrides=["SEED", "7"]).SEED == 7 and get_config().SEED == 0


RETINANET = [
    *("MODEL.RETINANET_ON", "True", "MODEL.BACKBONE.CONV_BODY", "R-50-FPN-RETINANET"),
    *("DATALOADER.SIZE_DIVISIBILITY", "32"),
]
KEYPOINTS = [
    *("MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "False"),
    *("MODEL.ROI_KEYPOINT_HEAD.RESOLUTION", "56"),
]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["SOLVER.BASE_LRR", "1"], ["SOLVER.BASE_LRR", "SOLVER.BASE_LR?"]),
        (["SOLVER.STEPS", "5"], ["SOLVER.STEPS", "tuple"]),
        (["SOLVER.STEPS", "(9, 5)"], ["SOLVER.STEPS", "rise"]),
        (["SOLVER", "5"], ["SOLVER", "section"]),
        (["SEED"], ["SEED", "pairs"]),
        (["DTYPE", "float8"], ["DTYPE", "bfloat16"]),
        (["MODEL.BACKBONE.CONV_BODY", "R-50-FPN"], ["USE_FPN"]),
        (["MODEL.BACKBONE.CONV_BODY", "VGG"], ["CONV_BODY", "R-50"]),
        (["MODEL.KEYPOINT_ON", "True"], ["SHARE_BOX_FEATURE_EXTRACTOR", "False"]),
        ([*KEYPOINTS, "MODEL.ROI_KEYPOINT_HEAD.RESOLUTION", "28"], ["RESOLUTION", "56"]),
        ([*KEYPOINTS, "TEST.KEYPOINT_SIGMAS", "(0.1,)"], ["KEYPOINT_SIGMAS", "17"]),
        (
            [*KEYPOINTS, "TEST.BBOX_AUG.ENABLED", "True", "TEST.BBOX_AUG.KEYPOINT_MIRROR", "(0, 2, 2)"],
            ["KEYPOINT_MIRROR", "once"],
        ),
        (["MODEL.RPN_ONLY", "True", "MODEL.MASK_ON", "True"], ["RPN_ONLY", "MASK_ON"]),
        (["MODEL.RETINANET_ON", "True"], ["CONV_BODY", "FPN-RETINANET"]),
        (["MODEL.BACKBONE.CONV_BODY", "R-50-FPN-RETINANET"], ["RETINANET_ON"]),
        ([*RETINANET, "MODEL.MASK_ON", "True"], ["MASK_ON", "boxes"]),
        ([*RETINANET, "MODEL.RETINANET.ANCHOR_SIZES", "(8, 16, 32, 64)"], ["ANCHOR_SIZES", "5"]),
        ([*RETINANET, "MODEL.RETINANET.PRIOR_PROB", "1.0"], ["PRIOR_PROB"]),
        ([*RETINANET, "DATALOADER.SIZE_DIVISIBILITY", "0"], ["SIZE_DIVISIBILITY"]),
        (["SOLVER.IMS_PER_BATCH", "0"], ["IMS_PER_BATCH"]),
        (["SOLVER.ACCUMULATE_STEPS", "3"], ["divisible"]),
        (["SOLVER.STEPS", "(1, 'a')"], ["SOLVER.STEPS", "'a'", "str"]),
        (["SOLVER.MAX_EPOCHS", "-1"], ["MAX_EPOCHS", "negative"]),
        (["SOLVER.MAX_EPOCHS", "3"], ["STEPS", "epochs"]),
        (["INPUT.PIXEL_STD", "[0, 0, 0]"], ["PIXEL_STD", "above 0"]),
        (["INPUT.PIXEL_MEAN", "[0]"], ["PIXEL_MEAN", "one a channel"]),
        (["INPUT.FIXED_SHAPES", "(96, 96)"], ["FIXED_SHAPES", "96"]),
        (["MODEL.RPN.ASPECT_RATIOS", "()"], ["ASPECT_RATIOS", "at least 1"]),
        (["MODEL.ROI_HEADS.BBOX_REG_WEIGHTS", "(1., 1.)"], ["BBOX_REG_WEIGHTS"]),
        (["DATASETS.TRAIN", "(1,)"], ["DATASETS.TRAIN", "int"]),
        (["TEST.EXPECTED_RESULTS", "['x']"], ["EXPECTED_RESULTS", "str"]),
        (["TEST.EXPECTED_RESULTS", '[["mask", "AP", [0.3, 0.01]]]'], ["EXPECTED_RESULTS", "bbox"]),
        (["TEST.EXPECTED_RESULTS", '[["bbox", "AP", [0.3, 0.01]]]'], ["DATASETS.TEST", "empty"]),
    ],
)
def test_errors_name_the_key_and_the_way_out(overrides, words):
    with pytest.raises(ConfigError) as error:
        get_config(overrides=overrides)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("MODEL.ROI_BOX_HEAD.POOLER_SCALES", "(0.25, 0.125)", "POOLER_SCALES"),
        ("MODEL.RPN.ANCHOR_STRIDE", "(4, 8)", "ANCHOR_STRIDE"),
        ("MODEL.RPN.ANCHOR_SIZES", "(32, 64)", "ANCHOR_SIZES"),
        ("MODEL.ROI_MASK_HEAD.RESOLUTION", "14", "RESOLUTION"),
        ("DATALOADER.SIZE_DIVISIBILITY", "16", "SIZE_DIVISIBILITY"),
        ("MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "True", "SHARE_BOX_FEATURE_EXTRACTOR"),
        ("MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR", "ResNet50Conv5ROIFeatureExtractor", "FEATURE_EXTRACTOR"),
    ],
)
def test_keys_of_a_pyramid_must_agree(key, value, word):
    with pytest.raises(ConfigError, match=word):
        get_config(ROOT / "configs" / "e2e_mask_rcnn_R_50_FPN_1x.yaml", [key, value])


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        get_config(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="not valid yaml"):
        get_config(write(tmp_path / "bad.yaml", "a: [1"))
    with pytest.raises(ConfigError, match="mapping"):
        get_config(write(tmp_path / "list.yaml", "- 1"))
    with pytest.raises(ConfigError, match=r"missing\.yaml.*child\.yaml"):
        get_config(write(tmp_path / "child.yaml", "_BASE_: missing.yaml"))
    with pytest.raises(ConfigError, match="_BASE_ must be"):
        get_config(write(tmp_path / "five.yaml", "_BASE_: 5"))
    write(tmp_path / "one.yaml", "_BASE_: two.yaml")
    with pytest.raises(ConfigError, match="circle"):
        get_config(write(tmp_path / "two.yaml", "_BASE_: one.yaml"))
    for name in ("/dev/zero", "/dev/stdin", "."):
        with pytest.raises(ConfigError, match=r"device\.yaml: _BASE_ names .*, which is no file"):
            get_config(write(tmp_path / "device.yaml", f"_BASE_: {name}"))
    with pytest.raises(ConfigError, match=r"/dev/zero has more than 1,000,000 characters"):
        get_config("/dev/zero")
    with pytest.raises(ConfigError, match=r"cannot read config file .*: File name too long"):
        get_config(None, ["_BASE_", "x" * 5000])
    with pytest.raises(ConfigError, match=r"cannot read config file .*child\.yaml\): File name too long"):
        get_config(write(tmp_path / "child.yaml", f"_BASE_: {'x' * 5000}"))


@pytest.mark.parametrize("bases", [["{}.yaml"], ["{}.yaml", "{}.yaml"]], ids=["a chain", "twice a step"])
def test_files_that_name_each_other(tmp_path, bases):
    """A chain of 101 files, and 2^40 readings of 41: 100 are read, whatever names them."""
    last = 100 if len(bases) == 1 else 40
    for number in range(last):
        names = ", ".join(base.format(number + 1) for base in bases)
        write(tmp_path / f"{number}.yaml", f"_BASE_: [{names}]")
    write(tmp_path / f"{last}.yaml", "SOLVER: {MAX_ITER: 20}")
    with pytest.raises(ConfigError, match=r"0\.yaml: _BASE_ leads to more than 100 files"):
        get_config(tmp_path / "0.yaml")
    assert get_config(tmp_path / f"{last - 4}.yaml").SOLVER.MAX_ITER == 20


UPSTREAM_YAML = "MODEL: {META_ARCHITECTURE: GeneralizedRCNN, MASK_ON: True, BACKBONE: {CONV_BODY: R-50-C4}}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (UPSTREAM_YAML, True),
        (f"_BASE_: []\n{UPSTREAM_YAML}", False),
        (UPSTREAM_YAML.replace("MASK_ON", "LEGACY_PLUS_ONE: False, MASK_ON"), False),
        ("MODEL: {MASK_ON: True}", False),
        ("_BASE_: upstream.yaml", True),
        ("_BASE_: [upstream.yaml, torchvision.yaml]", False),
    ],
)
def test_upstreams_conventions_come_with_its_yaml(text, expected, tmp_path):
    """With a file that names META_ARCHITECTURE, has no _BASE_ and no convention of its own; what follows it wins."""
    write(tmp_path / "upstream.yaml", UPSTREAM_YAML)
    write(tmp_path / "torchvision.yaml", "MODEL: {LEGACY_PLUS_ONE: False}")
    cfg = get_config(write(tmp_path / "file.yaml", text))
    assert expected == cfg.MODEL.LEGACY_PLUS_ONE
    rounding = "stride" if expected or "torchvision" in text else "none"
    assert rounding == cfg.MODEL.RPN.ANCHOR_ROUNDING
    assert not get_config(tmp_path / "upstream.yaml", ["MODEL.LEGACY_PLUS_ONE", "False"]).MODEL.LEGACY_PLUS_ONE


def test_upstreams_conventions_are_those_of_their_file():
    file = yaml.safe_load((ROOT / "configs" / "conventions" / "maskrcnn_benchmark.yaml").read_text())
    cfg, expected = get_defaults(), get_defaults()
    merge(cfg, file, "file")
    merge(expected, legacy.UPSTREAM, "table")
    assert flat(cfg) == flat(expected) and legacy.UPSTREAM.keys() <= set(legacy.CONVENTIONS)


def test_upstream_names(tmp_path):
    """Old names and the MLPerf forks' keys, in upstream's own spelling (tuples as text)."""
    file = write(
        tmp_path / "upstream.yaml",
        """
MODEL:
  META_ARCHITECTURE: "GeneralizedRCNN"
  BACKBONE: {CONV_BODY: "R-50-FPN", OUT_CHANNELS: 256}
  RESNETS: {TRANS_FUNC: "BottleneckWithGN", STEM_FUNC: "StemWithGN"}
  RPN:
    USE_FPN: True
    ANCHOR_STRIDE: (4, 8, 16, 32, 64)
  ROI_HEADS: {USE_FPN: True}
  ROI_BOX_HEAD:
    POOLER_SCALES: (0.25, 0.125, 0.0625, 0.03125)
    FEATURE_EXTRACTOR: "FPN2MLPFeatureExtractor"
    PREDICTOR: "FPNPredictor"
DATALOADER: {SIZE_DIVISIBILITY: 32}
SOLVER: {BASE_LR: 2e-2}
SAVE_CHECKPOINTS: False
PER_EPOCH_EVAL: True
MLPERF: {MIN_BBOX_MAP: 0.377, MIN_SEGM_MAP: 0.339}
DTYPE: "float16"
""",
    )
    cfg = get_config(file)
    assert cfg.MODEL.RESNETS.BACKBONE_OUT_CHANNELS == 256
    assert cfg.MODEL.RESNETS.NORM == "GN"
    assert cfg.SOLVER.BASE_LR == 0.02
    assert cfg.MLPERF.MIN_BBOX_MAP == 0.377
    with pytest.raises(ConfigError, match="TRANS_FUNC"):
        get_config(overrides=["MODEL.RESNETS.TRANS_FUNC", "BottleneckWithMagic"])
