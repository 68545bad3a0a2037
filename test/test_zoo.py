"""Upstream's recipes: their values, the names and shapes of their weights; each architecture trains and detects."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_models import make_batch, step
from upstream_configs import FBNET, FILES, SPLITS, text_of
from upstream_state import state_of

from maskrcnn_benchmark.benchmark import zoo
from maskrcnn_benchmark.config import flat, get_config
from maskrcnn_benchmark.device import Device, get_device
from maskrcnn_benchmark.errors import CheckpointError, ConfigError
from maskrcnn_benchmark.models.build import build_model
from maskrcnn_benchmark.models.weights import load_weights

CONFIGS = ROOT / "configs"


@pytest.mark.parametrize("name", FILES)
def test_upstreams_yaml_and_ours_say_the_same(name, tmp_path):
    (tmp_path / "upstream.yaml").write_text(text_of(name))
    theirs = flat(get_config(tmp_path / "upstream.yaml"))
    for key in ("DATASETS.TRAIN", "DATASETS.TEST"):
        theirs[key] = list(SPLITS.get(tuple(theirs[key]), theirs[key]))
    convention = str(CONFIGS / "conventions" / "maskrcnn_benchmark.yaml")
    assert flat(get_config(CONFIGS / f"{name}.yaml", ["_BASE_", convention])) == theirs


def test_the_table_holds_what_upstream_has():
    """14 + 10 + 4 + 4 + 8 + 3 + 8 + 6 + 1 recipes in nine directories, by upstream's listing."""
    assert len(FILES) == 58 and len(FBNET) == 7
    values = flat(get_config(CONFIGS / "retinanet" / "retinanet_X_101_32x8d_FPN_1x.yaml"))
    assert values["SOLVER.BASE_LR"] == 0.0025 and values["MODEL.RESNETS.NUM_GROUPS"] == 32


@pytest.mark.parametrize(("name", "arch"), FBNET.items())
def test_fbnet_is_left_out_and_says_so(name, arch, tmp_path):
    text = f"MODEL: {{BACKBONE: {{CONV_BODY: FBNet}}, FBNET: {{ARCH: {arch}}}, RPN: {{RPN_HEAD: FBNet.rpn_head}}}}"
    (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"{name}.*FBNet is left out"):
        get_config(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize("key", ["MODEL.FBNET.WIDTH_DIVISOR", "MODEL.RPN.RPN_HEAD", "MODEL.ROI_BOX_HEAD.PREDICTOR"])
def test_every_key_of_fbnet_names_it(key):
    with pytest.raises(ConfigError, match="FBNet is left out"):
        get_config(overrides=[key, "FBNet.x"])


def test_old_spellings(tmp_path):
    """A single size, and the one RPN head there is, as upstream's older yamls write them."""
    (tmp_path / "old.yaml").write_text("{INPUT: {MIN_SIZE_TRAIN: 600}, MODEL: {RPN: {RPN_HEAD: SingleConvRPNHead}}}")
    assert get_config(tmp_path / "old.yaml").INPUT.MIN_SIZE_TRAIN == (600,)
    with pytest.raises(ConfigError, match="SingleConvRPNHead"):
        get_config(overrides=["MODEL.RPN.RPN_HEAD", "Other"])


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {}  # of each model built: recipes that infer alike are one


@pytest.mark.parametrize("name", FILES)
def test_upstreams_names_and_shapes(name):
    cfg = get_config(CONFIGS / f"{name}.yaml")
    key = zoo.model_of(cfg)
    if key not in SHAPES:
        with torch.device("meta"):
            model = build_model(cfg, Device(torch.device("meta")))
        SHAPES[key] = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert SHAPES[key] == state_of(cfg)


# One of each architecture, small: widths 1/8, and few classes
NARROW = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "16", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "4"),
    *("MODEL.GROUP_NORM.NUM_GROUPS", "4", "MODEL.BACKBONE.FREEZE_CONV_BODY_AT", "0"),
]
PYRAMID = [
    *("MODEL.RESNETS.BACKBONE_OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM", "32"),
    *("MODEL.ROI_MASK_HEAD.CONV_LAYERS", "(16,)", "MODEL.ROI_BOX_HEAD.CONV_HEAD_DIM", "16"),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_LAYERS", "(16,)", "MODEL.RETINANET.NUM_CLASSES", "4"),
]
C4 = [  # few RoIs: each takes res5
    *("MODEL.RESNETS.BACKBONE_OUT_CHANNELS", "256", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32"),
    *("MODEL.RPN.POST_NMS_TOP_N_TEST", "50"),
]
GROUPED = ["MODEL.RESNETS.NUM_GROUPS", "4", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"]
DEEP = ["MODEL.BACKBONE.CONV_BODY", "R-50-FPN"]  # are more of the same
ARCHITECTURES = {
    "e2e_mask_rcnn_R_50_C4_1x": C4,
    "e2e_faster_rcnn_X_101_32x8d_FPN_1x": PYRAMID + DEEP + GROUPED,
    "gn_baselines/scratch_e2e_mask_rcnn_R_50_FPN_3x_gn": PYRAMID,
    "gn_baselines/e2e_faster_rcnn_R_50_FPN_Xconv1fc_1x_gn": PYRAMID,
    "dcn/e2e_mask_rcnn_dconv_R_50_FPN_1x": PYRAMID,
    "dcn/e2e_faster_rcnn_mdconv_R_50_FPN_1x": [*PYRAMID, "MODEL.RESNETS.DEFORMABLE_GROUPS", "2"],
    "rpn_R_50_FPN_1x": PYRAMID,
    "rpn_R_50_C4_1x": C4,
    "retinanet/retinanet_R-50-FPN_1x": PYRAMID,
    "retinanet/retinanet_R-50-FPN_P5_1x": PYRAMID,
    "e2e_mask_rcnn_R_50vd_FPN_dcn_1x": PYRAMID,
    "e2e_mask_rcnn_HRNet_W18_FPN_1x": PYRAMID,
}


def small(name: str):
    torch.manual_seed(0)
    return build_model(get_config(CONFIGS / f"{name}.yaml", [*NARROW, *ARCHITECTURES[name]]), get_device("cpu"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_trains_and_detects(name):
    model = small(name)
    losses, gradients = step(model, make_batch())
    assert all(torch.tensor(list(losses.values())).isfinite())
    silent = [key for key, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()]
    assert not silent
    still, _ = step(model, make_batch((0, 0, 0)))
    assert all(torch.tensor(list(still.values())).isfinite())
    images, _ = make_batch()
    with torch.no_grad():
        detections = model.eval()(images)
    inside = (detections.boxes >= 0) & (detections.boxes <= images.sizes.flip(1).repeat(1, 2)[:, None])
    assert inside.all() and detections.scores.isfinite().all()


@pytest.mark.parametrize(
    "name",
    [
        "e2e_mask_rcnn_R_50_C4_1x",
        "e2e_faster_rcnn_X_101_32x8d_FPN_1x",
        "gn_baselines/e2e_faster_rcnn_R_50_FPN_Xconv1fc_1x_gn",
        "dcn/e2e_faster_rcnn_mdconv_R_50_FPN_1x",
        "retinanet/retinanet_R-50-FPN_P5_1x",
    ],
)
def test_published_weights_load_with_every_key_accounted_for(name, tmp_path):
    """A file as upstream writes it: `model`, and `module.` before each name."""
    cfg = get_config(CONFIGS / f"{name}.yaml", [*NARROW, *ARCHITECTURES[name]])
    state = {key: torch.rand(shape) for key, shape in state_of(cfg).items()}
    box, mask = (f"roi_heads.{head}.feature_extractor.head." for head in ("box", "mask"))
    for key in [key for key in state if key.startswith(mask)]:
        state[key] = state[box + key.removeprefix(mask)]  # one res5 under both names
    file = tmp_path / "model_final.pth"
    torch.save({"model": {f"module.{key}": tensor for key, tensor in state.items()}}, file)
    model = small(name)
    assert load_weights(model, str(file)) == "maskrcnn_benchmark"
    loaded = model.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)

    dropped = sorted(state)[len(state) // 2]
    torch.save({"model": {key: tensor for key, tensor in state.items() if key != dropped}}, file)
    with pytest.raises(CheckpointError):
        load_weights(model, str(file))


@functools.cache
def size_of(name: str) -> tuple[int, float]:
    return zoo.size_of(CONFIGS / f"{name}.yaml")


def test_readme_lists_every_model_as_it_is():
    """The names of all; and the numbers of one that is quick to count. Run tools/zoo.py when this fails."""
    text = (CONFIGS / "README.md").read_text()
    listed = [
        line for line in text.partition(zoo.BEGIN)[2].partition(zoo.END)[0].splitlines() if line.startswith("| [")
    ]
    assert [line[3 : line.index("]")] for line in listed] == zoo.recipes(CONFIGS)
    assert set(zoo.PUBLISHED) <= set(zoo.recipes(CONFIGS))
    for name in ("e2e_mask_rcnn_R_50_FPN_1x", "dcn/e2e_faster_rcnn_mdconv_R_50_FPN_1x", "rpn_R_50_C4_1x"):
        counted = zoo.row(name, size_of(name), None).partition("| not measured")[0]
        assert any(line.startswith(counted) for line in listed)


def test_times_in_the_table_are_of_this_model():
    """Those that a file of docs/measurements holds, in seconds and MB."""
    line = zoo.row("x", (44_000_000, 5e11), {"ms": 2031.4, "memory_mb": 1434, "commit": "0" * 40})
    assert line == "| [x](x.yaml) | 44.0 | 500 | 2.03 | 1434 |  |  |  |"
    groups = zoo.same_models(CONFIGS)
    assert ["e2e_mask_rcnn_R_50_FPN_1x", "e2e_mask_rcnn_R_50_FPN_1x_periodically_testing"] in [
        [name for name in names if name.startswith("e2e_mask_rcnn_R_50_FPN_1x")] for names in groups
    ]


def test_a_model_that_takes_too_long_is_given_up_and_the_rest_comes_later(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(zoo, "LIMIT", 0.01)
    assert zoo.measure(CONFIGS / "quickstart.yaml") is None
    assert "quickstart.yaml: given up after 0.01 seconds" in capfd.readouterr().err
    monkeypatch.setattr(zoo, "MEASURED", tmp_path / "measured.json")
    monkeypatch.setattr(zoo, "measure", lambda file: {"ms": 1.0, "memory_mb": 2, "commit": file.stem})
    monkeypatch.setattr(zoo, "same_models", lambda directory: [["a", "b"], ["c"]])
    for budget, done, more in ((-1, [], "run it again"), (60, ["a", "c"], ""), (-1, [], "")):
        monkeypatch.setattr(zoo, "BUDGET", budget)
        assert list(zoo.measure_all(tmp_path)) == done and more in capfd.readouterr().err
    assert json.loads(zoo.MEASURED.read_text())["c"] == {"ms": 1.0, "memory_mb": 2, "commit": "c"}


def test_parameters_are_counted_without_the_constants_of_norms():
    state = state_of(get_config(CONFIGS / "e2e_mask_rcnn_R_50_FPN_1x.yaml"))
    trained = {k: v for k, v in state.items() if not any(n in k for n in (".bn", "downsample.1"))}
    assert size_of("e2e_mask_rcnn_R_50_FPN_1x")[0] == sum(torch.Size(shape).numel() for shape in trained.values())


def test_the_tool_writes_the_table(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(f"before\n{zoo.BEGIN}\nold\n{zoo.END}\nafter\n")
    (tmp_path / "small.yaml").write_text(
        (CONFIGS / "quickstart.yaml").read_text().replace("_base_", f"{CONFIGS}/_base_")
    )
    zoo.write(Path(tmp_path))
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert lines[4].startswith("| [small](small.yaml) | 4.0 |")
