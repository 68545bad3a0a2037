"""Weights of other projects: names and tensors both ways, files, the catalogue, and the command."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import pickle
import re
import resource
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from test_data_download import server  # noqa: F401
from test_fixtures import PEERS, build
from test_models import C4, SMALL, TINY, model_of
from test_retinanet import RETINANET
from torch import Tensor

from maskrcnn_benchmark.engine import checkpoint, nonfinite
from maskrcnn_benchmark.errors import CheckpointError, DataError
from maskrcnn_benchmark.models import weights
from maskrcnn_benchmark.models.layers import FrozenBatchNorm2d
from maskrcnn_benchmark.models.weights import Conventions, catalog, from_ours, load_weights, to_ours
from maskrcnn_benchmark.models.weights.rules import Rules, facts_of

SCALES = "(0.25, 0.125, 0.0625, 0.03125)"
FROZEN = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.USE_GN", "False"]
NARROW = [
    "MODEL.RESNETS.STEM_OUT_CHANNELS",
    "8",
    "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "16",
    "MODEL.RESNETS.WIDTH_PER_GROUP",
    "4",
]


def body(name: str) -> list[str]:
    return [*TINY, *FROZEN, *NARROW, "MODEL.BACKBONE.CONV_BODY", name]


DC5 = [  # detectron2's dilated C5
    *(*FROZEN, *NARROW, "MODEL.BACKBONE.CONV_BODY", "R-50-C5", "MODEL.RESNETS.RES5_DILATION", "2"),
    *("MODEL.RESNETS.BACKBONE_OUT_CHANNELS", "128", "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR", "FPN2MLPFeatureExtractor"),
    *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "7", "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM", "32"),
    *("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR", "MaskRCNNFPNFeatureExtractor"),
    *("MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "False", "MODEL.ROI_MASK_HEAD.RESOLUTION", "28"),
    *("MODEL.ROI_MASK_HEAD.CONV_LAYERS", "(16, 16)", "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "4"),
]
CASCADE = [*TINY, *FROZEN, "MODEL.CASCADE_ON", "True", "MODEL.CLS_AGNOSTIC_BBOX_REG", "True"]
# name -> yaml, overrides
ARCHITECTURES = {
    "r18": (SMALL, [*TINY, *FROZEN]),
    "r50": (SMALL, body("R-50-FPN")),
    "r101": (SMALL, body("R-101-FPN")),
    "c4": (None, C4),
    "gn": (
        SMALL,
        [
            *(*TINY, "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR", "FPNXconv1fcFeatureExtractor"),
            *("MODEL.ROI_BOX_HEAD.CONV_HEAD_DIM", "32", "MODEL.ROI_BOX_HEAD.NUM_STACKED_CONVS", "2"),
            *("MODEL.ROI_BOX_HEAD.USE_GN", "True", "MODEL.ROI_MASK_HEAD.USE_GN", "True"),
        ],
    ),
    "retinanet": (None, [*RETINANET, *FROZEN]),
    "keypoint": (
        SMALL,
        [
            *(*TINY, *FROZEN, "MODEL.MASK_ON", "False", "MODEL.KEYPOINT_ON", "True"),
            *("MODEL.ROI_BOX_HEAD.NUM_CLASSES", "2", "MODEL.ROI_KEYPOINT_HEAD.CONV_LAYERS", "(16, 16)"),
            *("MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "False"),
            *(
                "MODEL.ROI_KEYPOINT_HEAD.RESOLUTION",
                "56",
                "MODEL.ROI_KEYPOINT_HEAD.POOLER_SCALES",
                SCALES,
            ),
        ],
    ),
    "dcn": (SMALL, [*body("R-50-FPN"), "MODEL.RESNETS.STAGE_WITH_DCN", "(False, False, True, True)"]),
    "vd": (SMALL, body("R-50vd-FPN")),
    "vd_dcn": (
        SMALL,
        [
            *(*body("R-50vd-FPN"), "MODEL.RESNETS.STAGE_WITH_DCN", "(False, True, False, True)"),
            *("MODEL.RESNETS.WITH_MODULATED_DCN", "True"),
        ],
    ),
    "hrnet": (SMALL, [*TINY, *FROZEN, "MODEL.BACKBONE.CONV_BODY", "HRNet-W18-FPN"]),
    "rpn": (SMALL, [*TINY, *FROZEN, "MODEL.RPN_ONLY", "True", "MODEL.MASK_ON", "False"]),
    "cascade": (SMALL, [*CASCADE, "MODEL.ROI_MASK_HEAD.PER_STAGE", "False"]),
    "cascade_masks": (SMALL, [*CASCADE, "MODEL.ROI_MASK_HEAD.PER_STAGE", "True"]),
    "aug_fpn": (SMALL, [*TINY, *FROZEN, "MODEL.AUG_FPN.RESIDUAL_AUGMENTATION", "True"]),
}
ARCHITECTURES["v2"] = (  # torchvision's
    SMALL,
    [
        *(*body("R-50-FPN"), "MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN", "MODEL.RPN.NUM_CONVS", "2"),
        *("MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR", "FPNXconv1fcFeatureExtractor", "MODEL.ROI_BOX_HEAD.NORM", "BN"),
        *("MODEL.ROI_BOX_HEAD.CONV_HEAD_DIM", "32", "MODEL.ROI_BOX_HEAD.NUM_STACKED_CONVS", "3"),
        *("MODEL.ROI_MASK_HEAD.NORM", "BN"),
    ],
)
ARCHITECTURES["retinanet_v2"] = (None, [*RETINANET, *FROZEN, "MODEL.RETINANET.NORM", "GN"])
ARCHITECTURES["dc5"] = (None, DC5)
PLAIN = {"r18", "r50", "r101", "rpn", "retinanet"}
# What each project has; the rest it must refuse, naming a tensor. Of two, only the backbone's names are known.
KNOWN = {
    "maskrcnn_benchmark": set(ARCHITECTURES),
    "torchvision": PLAIN | {"keypoint", "v2", "retinanet_v2", "gn", "dc5"},
    "detectron2": PLAIN | {"keypoint", "c4", "gn", "dcn", "cascade", "v2", "retinanet_v2", "dc5"},
    "mmdet": PLAIN | {"retinanet_v2", "dc5", "c4", "gn", "dcn", "vd", "vd_dcn", "hrnet", "cascade_masks"},
    "detectron": PLAIN | {"keypoint", "c4", "gn", "dc5"},
    "backbone": PLAIN
    | {"v2", "retinanet_v2", "dc5"}
    | {"keypoint", "c4", "gn", "vd", "hrnet", "cascade", "cascade_masks", "aug_fpn"},
    "paddledetection": PLAIN
    | {"v2", "retinanet_v2", "dc5"}
    | {"keypoint", "c4", "dcn", "vd", "vd_dcn", "gn", "cascade", "cascade_masks", "aug_fpn"},
}
SUFFIX = {"detectron": ".pkl", "paddledetection": ".pdparams"}
CONVENTIONS = Conventions(bgr=True, norm_eps=0.0)


def random_state(architecture: str) -> dict[str, Tensor]:
    """The architecture's names and shapes, and numbers that no rule leaves as they are by chance."""
    model = model_of(*ARCHITECTURES[architecture])
    generator = torch.Generator().manual_seed(1)
    named = weights.without_derived(model.state_dict())
    state = {name: torch.rand(tensor.shape, generator=generator) + 0.1 for name, tensor in named.items()}
    if architecture == "c4":  # one module under two names
        for name in state:
            state[name] = state[name.replace("roi_heads.mask.feature_extractor", "roi_heads.box.feature_extractor")]
    return state


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    return {name: random_state(name) for name in ARCHITECTURES}


def through_a_file(state: dict[str, Tensor], layout: str, folder: Path, suffix: str) -> dict[str, Tensor]:
    path = folder / f"file{suffix}"
    with open(path, "wb") as file:
        weights.write(file, weights.content_of(state, layout, suffix), suffix)
    return weights.read(path, allow_pickle=True)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("layout", KNOWN)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip(tmp_path, states, architecture, layout):
    """Read, written and read again: the same bits. What is read first is our model but for what the peer has not."""
    state = states[architecture]
    if architecture not in KNOWN[layout]:
        with pytest.raises(CheckpointError, match=rf"no name in {layout} for \d+ tensors: (backbone|rpn|roi_heads)\."):
            from_ours(state, "a model", layout, CONVENTIONS)
        return
    suffix = SUFFIX.get(layout, ".pth")
    written = through_a_file(from_ours(state, "a model", layout, CONVENTIONS).state, layout, tmp_path, suffix)
    once = to_ours(written, "a file", CONVENTIONS)
    assert once.layout == layout and not once.dropped
    again = from_ours(once.state, "ours", layout, CONVENTIONS)
    assert same(again.state, written)
    assert same(to_ours(again.state, "again", CONVENTIONS).state, once.state)
    for name in state:
        if weights.LAYOUTS[layout].part and not name.startswith("backbone.body."):
            assert name not in once.state
        elif layout == "detectron" and re.search(r"(bn\d|downsample\.1)\.", name) and architecture != "gn":
            assert once.state[name].shape == state[name].shape  # folded: test_detectrons_norms_are_folded
        elif layout in ("detectron2", "mmdet") and re.search(r"^roi_.*\.(bbox_pred|mask_fcn_logits)\.", name):
            rows = 4 if "bbox_pred" in name else 1
            assert torch.equal(once.state[name][rows:], state[name][rows:]) and not once.state[name][:rows].any()
        else:
            assert torch.equal(once.state[name], state[name]), name


# Names from the projects' own files and sources: (architecture, layout, ours, theirs)
NAMES = """
v2 torchvision backbone.fpn.fpn_inner1.1.running_var backbone.fpn.inner_blocks.0.1.running_var
v2 torchvision rpn.head.conv.1.weight rpn.head.conv.1.0.weight
v2 torchvision roi_heads.box.feature_extractor.xconvs.6.weight roi_heads.box_head.2.0.weight
v2 torchvision roi_heads.box.feature_extractor.xconvs.7.bias roi_heads.box_head.2.1.bias
v2 torchvision roi_heads.box.feature_extractor.fc6.weight roi_heads.box_head.4.weight
v2 torchvision roi_heads.mask.feature_extractor.mask_fcn1.1.weight roi_heads.mask_head.0.1.weight
retinanet_v2 torchvision rpn.head.cls_tower.3.weight head.classification_head.conv.1.0.weight
retinanet_v2 torchvision rpn.head.bbox_tower.4.bias head.regression_head.conv.1.1.bias
v2 detectron2 rpn.head.conv.1.bias proposal_generator.rpn_head.conv.conv1.bias
retinanet_v2 detectron2 rpn.head.cls_tower.4.weight head.cls_subnet.4.weight
dc5 detectron2 backbone.body.layer4.0.conv1.weight backbone.res5.0.conv1.weight
dc5 detectron2 roi_heads.box.feature_extractor.fc6.weight roi_heads.box_head.fc1.weight
dc5 detectron backbone.body.layer4.0.conv1.weight res5_0_branch2a_w
retinanet_v2 mmdet rpn.head.bbox_tower.4.bias bbox_head.reg_convs.1.gn.bias
r50 torchvision backbone.body.stem.bn1.running_mean backbone.body.bn1.running_mean
r50 torchvision backbone.fpn.fpn_inner1.weight backbone.fpn.inner_blocks.0.0.weight
r50 torchvision backbone.fpn.fpn_layer4.bias backbone.fpn.layer_blocks.3.0.bias
r50 torchvision rpn.head.conv.weight rpn.head.conv.0.0.weight
r50 torchvision roi_heads.box.feature_extractor.fc7.bias roi_heads.box_head.fc7.bias
r50 torchvision roi_heads.mask.feature_extractor.mask_fcn1.bias roi_heads.mask_head.0.0.bias
r50 torchvision roi_heads.mask.predictor.conv5_mask.weight roi_heads.mask_predictor.conv5_mask.weight
keypoint torchvision roi_heads.keypoint.feature_extractor.conv_fcn2.weight roi_heads.keypoint_head.2.weight
retinanet torchvision backbone.fpn.fpn_inner2.weight backbone.fpn.inner_blocks.0.0.weight
retinanet torchvision backbone.fpn.top_blocks.p6.weight backbone.fpn.extra_blocks.p6.weight
retinanet torchvision rpn.head.cls_tower.2.weight head.classification_head.conv.1.0.weight
retinanet torchvision rpn.head.bbox_pred.bias head.regression_head.bbox_reg.bias
r50 detectron2 backbone.body.stem.bn1.weight backbone.bottom_up.stem.conv1.norm.weight
r50 detectron2 backbone.body.layer1.0.downsample.1.bias backbone.bottom_up.res2.0.shortcut.norm.bias
r50 detectron2 backbone.body.layer4.2.conv3.weight backbone.bottom_up.res5.2.conv3.weight
r50 detectron2 backbone.fpn.fpn_inner4.weight backbone.fpn_lateral5.weight
r50 detectron2 rpn.head.bbox_pred.weight proposal_generator.rpn_head.anchor_deltas.weight
r50 detectron2 roi_heads.box.feature_extractor.fc6.weight roi_heads.box_head.fc1.weight
r50 detectron2 roi_heads.mask.predictor.conv5_mask.weight roi_heads.mask_head.deconv.weight
r50 detectron2 roi_heads.mask.predictor.mask_fcn_logits.bias roi_heads.mask_head.predictor.bias
c4 detectron2 backbone.body.layer3.5.conv2.weight backbone.res4.5.conv2.weight
c4 detectron2 roi_heads.box.feature_extractor.head.layer4.0.conv1.weight roi_heads.res5.0.conv1.weight
gn detectron2 backbone.fpn.fpn_layer1.1.weight backbone.fpn_output2.norm.weight
gn detectron2 roi_heads.box.feature_extractor.xconvs.3.weight roi_heads.box_head.conv2.weight
gn detectron2 roi_heads.box.feature_extractor.xconvs.4.bias roi_heads.box_head.conv2.norm.bias
gn detectron2 roi_heads.mask.feature_extractor.mask_fcn1.1.weight roi_heads.mask_head.mask_fcn1.norm.weight
dcn detectron2 backbone.body.layer3.0.conv2.offset.bias backbone.bottom_up.res4.0.conv2_offset.bias
dcn detectron2 backbone.body.layer3.0.conv2.conv.weight backbone.bottom_up.res4.0.conv2.weight
retinanet detectron2 backbone.fpn.fpn_layer2.bias backbone.fpn_output3.bias
retinanet detectron2 rpn.head.cls_tower.2.weight head.cls_subnet.2.weight
retinanet detectron2 rpn.head.cls_logits.bias head.cls_score.bias
keypoint detectron2 roi_heads.keypoint.feature_extractor.conv_fcn1.weight roi_heads.keypoint_head.conv_fcn1.weight
keypoint detectron2 roi_heads.keypoint.predictor.kps_score_lowres.weight roi_heads.keypoint_head.score_lowres.weight
cascade detectron2 roi_heads.box.feature_extractor.2.fc7.weight roi_heads.box_head.2.fc2.weight
cascade detectron2 roi_heads.box.predictor.1.bbox_pred.weight roi_heads.box_predictor.1.bbox_pred.weight
r50 mmdet backbone.body.stem.conv1.weight backbone.conv1.weight
r50 mmdet backbone.body.layer2.0.downsample.1.running_var backbone.layer2.0.downsample.1.running_var
r50 mmdet backbone.fpn.fpn_inner1.weight neck.lateral_convs.0.conv.weight
r50 mmdet backbone.fpn.fpn_layer4.bias neck.fpn_convs.3.conv.bias
r50 mmdet rpn.head.conv.bias rpn_head.rpn_conv.bias
r50 mmdet rpn.head.cls_logits.bias rpn_head.rpn_cls.bias
r50 mmdet rpn.head.bbox_pred.weight rpn_head.rpn_reg.weight
r50 mmdet roi_heads.box.feature_extractor.fc6.weight roi_head.bbox_head.shared_fcs.0.weight
r50 mmdet roi_heads.box.predictor.cls_score.bias roi_head.bbox_head.fc_cls.bias
r50 mmdet roi_heads.box.predictor.bbox_pred.weight roi_head.bbox_head.fc_reg.weight
r50 mmdet roi_heads.mask.feature_extractor.mask_fcn1.weight roi_head.mask_head.convs.0.conv.weight
r50 mmdet roi_heads.mask.predictor.conv5_mask.bias roi_head.mask_head.upsample.bias
r50 mmdet roi_heads.mask.predictor.mask_fcn_logits.weight roi_head.mask_head.conv_logits.weight
gn mmdet backbone.body.layer1.0.bn2.weight backbone.layer1.0.gn2.weight
gn mmdet backbone.fpn.fpn_inner1.1.bias neck.lateral_convs.0.gn.bias
gn mmdet roi_heads.box.feature_extractor.xconvs.4.weight roi_head.bbox_head.shared_convs.1.gn.weight
c4 mmdet roi_heads.box.feature_extractor.head.layer4.1.bn3.bias roi_head.shared_head.layer4.1.bn3.bias
vd mmdet backbone.body.stem.bn2.bias backbone.stem.4.bias
vd mmdet backbone.body.layer3.0.downsample.0.weight backbone.layer3.0.downsample.1.weight
vd_dcn mmdet backbone.body.layer2.1.conv2.offset.weight backbone.layer2.1.conv2.conv_offset.weight
retinanet mmdet backbone.fpn.fpn_layer2.weight neck.fpn_convs.0.conv.weight
retinanet mmdet backbone.fpn.top_blocks.p7.weight neck.fpn_convs.4.conv.weight
retinanet mmdet rpn.head.bbox_tower.2.bias bbox_head.reg_convs.1.conv.bias
retinanet mmdet rpn.head.cls_logits.weight bbox_head.retina_cls.weight
hrnet mmdet backbone.body.stage3.0.fuse_layers.2.0.1.0.weight backbone.stage3.0.fuse_layers.2.0.1.0.weight
hrnet mmdet backbone.fpn.reduction.weight neck.reduction_conv.conv.weight
hrnet mmdet backbone.fpn.fpn_layer5.weight neck.fpn_convs.4.conv.weight
cascade_masks mmdet roi_heads.box.predictor.2.cls_score.weight roi_head.bbox_head.2.fc_cls.weight
cascade_masks mmdet roi_heads.mask.stages.1.predictor.mask_fcn_logits.bias roi_head.mask_head.1.conv_logits.bias
r50 detectron backbone.body.stem.bn1.bias res_conv1_bn_b
r50 detectron backbone.body.layer2.3.bn3.weight res3_3_branch2c_bn_s
r50 detectron backbone.fpn.fpn_inner4.weight fpn_inner_res5_2_sum_w
r50 detectron backbone.fpn.fpn_inner3.bias fpn_inner_res4_5_sum_lateral_b
r101 detectron backbone.fpn.fpn_layer3.weight fpn_res4_22_sum_w
r50 detectron rpn.head.cls_logits.weight rpn_cls_logits_fpn2_w
r50 detectron roi_heads.box.predictor.bbox_pred.bias bbox_pred_b
r50 detectron roi_heads.mask.feature_extractor.mask_fcn1.weight _[mask]_fcn1_w
c4 detectron rpn.head.conv.weight conv_rpn_w
c4 detectron roi_heads.box.feature_extractor.head.layer4.0.downsample.0.weight res5_0_branch1_w
gn detectron backbone.body.stem.bn1.weight conv1_gn_s
gn detectron backbone.body.layer1.0.bn1.bias res2_0_branch2a_gn_b
gn detectron roi_heads.box.feature_extractor.xconvs.4.weight head_conv2_gn_s
retinanet detectron rpn.head.cls_tower.2.bias retnet_cls_conv_n1_fpn3_b
retinanet detectron backbone.fpn.top_blocks.p7.weight fpn_7_w
keypoint detectron roi_heads.keypoint.predictor.kps_score_lowres.weight kps_score_lowres_w
r50 backbone backbone.body.layer1.0.downsample.0.weight layer1.0.downsample.0.weight
vd backbone backbone.body.stem.conv3.weight conv1.6.weight
vd backbone backbone.body.stem.bn2.running_var conv1.4.running_var
vd backbone backbone.body.stem.bn3.weight bn1.weight
vd backbone backbone.body.layer1.0.downsample.1.bias layer1.0.downsample.2.bias
hrnet backbone backbone.body.stem.conv2.weight conv2.weight
r50 paddledetection backbone.body.stem.bn1.running_var conv1.conv1.norm._variance
r50 paddledetection backbone.body.layer2.0.downsample.0.weight res3.res3a.short.conv.weight
vd paddledetection backbone.body.stem.conv2.weight conv1.conv1_2.conv.weight
vd paddledetection backbone.body.layer1.0.downsample.1.running_mean res2.res2a.short.norm._mean
vd paddledetection backbone.body.layer2.0.downsample.0.weight res3.res3a.short.conv.conv.weight
vd_dcn paddledetection backbone.body.layer2.0.conv2.offset.bias res3.res3a.branch2b.conv_offset.bias
vd_dcn paddledetection backbone.body.layer2.0.conv2.conv.weight res3.res3a.branch2b.conv.weight
r101 paddledetection backbone.body.layer3.0.bn3.bias res4.res4a.branch2c.norm.bias
r101 paddledetection backbone.body.layer3.22.conv1.weight res4.res4b22.branch2a.conv.weight
r101 paddledetection backbone.body.layer2.3.conv1.weight res3.res3d.branch2a.conv.weight
"""


@pytest.mark.parametrize("line", NAMES.split("\n")[1:-1])
def test_names_of_the_projects(states, line):
    architecture, layout, ours, theirs = line.split()
    marked = {name: torch.zeros_like(tensor) for name, tensor in states[architecture].items()}
    marked[ours] = marked[ours] + 1
    if layout == "detectron":  # whose norms must not hold another one's statistics
        marked |= {name: tensor + 1 for name, tensor in marked.items() if name.endswith("running_var")}
    if architecture == "c4":
        marked |= {name.replace(".box.", ".mask."): marked[name] for name in [ours] if ".head." in name}
    written = from_ours(marked, "a model", layout, CONVENTIONS).state
    assert [name for name, tensor in written.items() if tensor.any()] == [theirs]


def test_background_rows():
    """Three classes and the background of detectron2, which comes last and has no box and no mask."""
    theirs = {
        "backbone.bottom_up.stem.conv1.weight": torch.zeros(1),
        "backbone.fpn_lateral2.bias": torch.zeros(1),
        "roi_heads.box_predictor.cls_score.bias": torch.tensor([1.0, 2, 3, 9]),
        "roi_heads.box_predictor.bbox_pred.bias": torch.arange(12.0) + 1,
        "roi_heads.mask_head.predictor.bias": torch.tensor([5.0, 6, 7]),
    }
    ours = to_ours(theirs, "a file").state
    assert ours["roi_heads.box.predictor.cls_score.bias"].tolist() == [9, 1, 2, 3]
    assert ours["roi_heads.box.predictor.bbox_pred.bias"].tolist() == [0, 0, 0, 0, *range(1, 13)]
    assert ours["roi_heads.mask.predictor.mask_fcn_logits.bias"].tolist() == [0, 5, 6, 7]
    assert same(from_ours(ours, "ours", "detectron2").state, theirs)


@pytest.mark.parametrize("layout", ["torchvision", "detectron2", "mmdet", "detectron"])
def test_retinanets_deltas_by_the_coders_weights(states, layout):
    """What decodes to the same box: ours is divided by 10, 10, 5, 5 there. The last digit may
    move when that is undone, but only once."""
    state = states["retinanet"] | {"rpn.head.bbox_pred.bias": torch.tensor([10.0, 20, 5, 15]).repeat(9)}
    name = {"torchvision": "head.regression_head.bbox_reg", "detectron2": "head.bbox_pred"}.get(layout)
    name = name or {"mmdet": "bbox_head.retina_reg", "detectron": "retnet_bbox_pred_fpn3"}[layout]
    conventions = Conventions(retinanet_coder=(10.0, 10.0, 5.0, 5.0))
    theirs = from_ours(state, "ours", layout, conventions).state
    bias = theirs[f"{name}_b" if layout == "detectron" else f"{name}.bias"]
    assert bias.view(9, 4).tolist() == [[1.0, 2.0, 1.0, 3.0]] * 9
    back = to_ours(theirs, "theirs", conventions).state
    for part in ("weight", "bias"):
        name = f"rpn.head.bbox_pred.{part}"
        torch.testing.assert_close(back[name], state[name], rtol=2e-7, atol=0)
    assert same(to_ours(from_ours(back, "ours", layout, conventions).state, "theirs", conventions).state, back)


def test_detectrons_norms_are_folded(states):
    """Scale and shift are those of the norm, with its epsilon."""
    norm = FrozenBatchNorm2d(8, eps=1e-3)
    prefix = "backbone.body.layer1.0.bn1."
    values = {leaf: torch.rand(8) + 0.1 for leaf in ("weight", "bias", "running_mean", "running_var")}
    state = states["r50"] | {prefix + leaf: value.clone() for leaf, value in values.items()}
    state = {name: value for name, value in state.items() if not name.startswith(prefix)} | {
        prefix + leaf: value for leaf, value in values.items()
    }
    norm.load_state_dict(values)
    theirs = from_ours(state, "ours", "detectron", Conventions(norm_eps=1e-3)).state
    scale, shift = norm.scale_and_shift()
    torch.testing.assert_close(theirs["res2_0_branch2a_bn_s"], scale)
    torch.testing.assert_close(theirs["res2_0_branch2a_bn_b"], shift)


def test_the_stems_channels_follow_the_input(states):
    stem = states["r50"]["backbone.body.stem.conv1.weight"]
    for layout, name, reversed_for in (
        ("torchvision", "backbone.body.conv1.weight", True),
        ("backbone", "conv1.weight", True),
        ("detectron", "conv1_w", False),
        ("detectron2", "backbone.bottom_up.stem.conv1.weight", None),
    ):
        for bgr in (True, False, None):
            theirs = from_ours(states["r50"], "ours", layout, Conventions(bgr=bgr)).state[name]
            flip = None not in (bgr, reversed_for) and bgr == reversed_for
            assert torch.equal(theirs, stem.flip(1) if flip else stem)


def test_res5_under_two_names_must_be_one(states):
    state = dict(states["c4"])
    name = "roi_heads.mask.feature_extractor.head.layer4.0.conv1.weight"
    state[name] = state[name] + 1
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} and .* differ"):
        from_ours(state, "ours", "detectron2")


def test_a_relu_after_fpns_layers_is_no_ones_else(states):
    """It has no tensor, but puts the convolution into a sequence; exported, it would be lost without a word."""
    name = "backbone.fpn.fpn_inner1.0.weight"
    state = {name if n == "backbone.fpn.fpn_inner1.weight" else n: tensor for n, tensor in states["r50"].items()}
    for layout in ("torchvision", "detectron2", "mmdet"):
        with pytest.raises(CheckpointError, match=rf"no name in {layout} for 1 tensors: {re.escape(name)}"):
            from_ours(state, "ours", layout)


def test_two_tensors_for_one_place(states):
    theirs = from_ours(states["r50"], "ours", "torchvision").state
    theirs["rpn.head.conv.weight"] = theirs["rpn.head.conv.0.0.weight"]
    with pytest.raises(CheckpointError, match=r"for both rpn\.head\.conv\.0\.0\.weight and rpn\.head\.conv\.weight"):
        to_ours(theirs, "a file")


def test_what_peers_save_besides_weights_is_dropped_and_named(states):
    written = from_ours(states["r50"], "ours", "torchvision").state
    extra = {"module.backbone.body.bn1.num_batches_tracked": torch.tensor(1)}
    read = to_ours({f"module.{name}": tensor for name, tensor in written.items()} | extra, "ddp")
    assert same(read.state, states["r50"])
    assert read.dropped == {"derived from the configuration": ["backbone.body.bn1.num_batches_tracked"]}
    with pytest.raises(CheckpointError, match=r"no place here for 1 tensors: backbone\.body\.extra"):
        to_ours(written | {"backbone.body.extra": torch.zeros(1)}, "a file")
    detectron = from_ours(states["r50"], "ours", "detectron").state
    read = to_ours(detectron | {"fc6_w_momentum": torch.zeros(1), "kps_score_w": torch.zeros(1)}, "a file")
    assert read.dropped["optimizer"] == ["fc6_w_momentum"]


def test_older_names_of_torchvision(states):
    """Before 0.13 and 0.14."""
    state, older = states["r50"], {}
    for name, tensor in from_ours(states["r50"], "ours", "torchvision").state.items():
        name = re.sub(r"(_blocks\.\d)\.0\.", r"\1.", name).replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        name = re.sub(r"mask_head\.(\d)\.0\.", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}.", name)
        older[name] = tensor
    assert "backbone.fpn.inner_blocks.3.weight" in older and "roi_heads.mask_head.mask_fcn1.bias" in older
    assert same(to_ours(older, "a file").state, state)


@given(st.integers(0, 40), st.integers(1, 3), st.integers(0, 3))
def test_templates_are_read_as_they_are_written(number, factor, offset):
    rules = Rules([("ours.{n}.*", f"theirs.{{{factor}*n+{offset}}}.x.*")], facts_of([]))
    theirs = rules.to_theirs(f"ours.{number}.weight")
    assert theirs == f"theirs.{factor * number + offset}.x.weight"
    assert rules.to_ours(theirs) == f"ours.{number}.weight"
    assert rules.to_ours(f"theirs.{factor * number + offset}.y.weight") is None
    if factor > 1:
        assert rules.to_ours(f"theirs.{factor * number + offset + 1}.x.weight") is None


# ---------------------------------------------------------------------------------------------- fixtures


@pytest.mark.parametrize("peer", [*PEERS, "maskrcnn_benchmark"])
def test_export_has_exactly_the_peers_names_and_shapes(shared, peer):
    file = {**PEERS, "maskrcnn_benchmark": "maskrcnn_benchmark_e2e_mask_rcnn_R_50_FPN_1x"}[peer]
    theirs = json.loads((shared / "fixtures" / f"{file}.json").read_text())["state_dict"]
    state = build(peer).state_dict()
    written = from_ours(state, "ours", peer).state
    wanted = {name: tuple(shape) for name, shape in theirs.items() if not weights.DERIVED.search(name)}
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == wanted


# ------------------------------------------------------------------------------------------------- files


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pkl", ".pdparams"])
@pytest.mark.parametrize("nested", [True, False])
def test_no_file_runs_code(tmp_path, convert, suffix, nested):
    attack = {"model": {"w": Attack(tmp_path / "ran")}} if nested else Attack(tmp_path / "ran")
    path = tmp_path / f"attack{suffix}"
    if suffix in weights.files.PICKLES:
        path.write_bytes(pickle.dumps(attack))
    else:
        torch.save(attack, path)
    with pytest.raises(CheckpointError, match=r"refused|cannot read"):
        weights.read(path, allow_pickle=True)
    if suffix in weights.files.PICKLES:
        with pytest.raises(CheckpointError, match="is a pickle file"):
            weights.read(path)
    with pytest.raises(CheckpointError, match=r"refused|cannot read"):
        convert(path, tmp_path / "out.pth", "--allow-pickle")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out.pth").exists()


def repacked(source: Path, path: Path, **options) -> Path:
    """The zip file with its records written again."""
    with zipfile.ZipFile(source) as read, zipfile.ZipFile(path, "w", **options) as written:
        for record in read.infolist():
            written.writestr(record.filename, read.read(record))
    return path


def with_records_in_each_other(path: Path, count: int) -> None:
    """The directory at the file's end lists its last record's bytes under more names."""
    with zipfile.ZipFile(path, "a") as archive:
        last = max(archive.infolist(), key=lambda record: record.file_size)
        for number in range(count):
            again = copy.copy(last)
            again.filename = again.orig_filename = f"{last.filename}{number}"
            archive.filelist.append(again)
        archive._didModify = True


def test_a_file_cannot_take_more_memory_than_it_has_bytes(tmp_path):
    """torch.load unpacks compressed records: 117 KB are 120 MB of zeros, and each record may be listed again."""
    torch.save({"model": {"w": torch.zeros(1_000_000)}}, tmp_path / "sound.pth")
    packed = repacked(tmp_path / "sound.pth", tmp_path / "packed.pth", compression=zipfile.ZIP_DEFLATED)
    assert packed.stat().st_size < 20_000
    again = repacked(tmp_path / "sound.pth", tmp_path / "again.pth")
    assert weights.read(again)["w"].shape == (1_000_000,)
    with_records_in_each_other(again, 20)
    for path in (packed, again):
        for read in (weights.read, checkpoint.read, nonfinite.read_dump):
            with pytest.raises(CheckpointError, match=rf"{path.name}: it unpacks to [\d,]+ bytes, but has"):
                read(path)
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "repeated.pth")
    with pytest.raises(CheckpointError, match=r"repeated\.pth: its tensors would take 4,000,000,000,000 bytes"):
        weights.read(tmp_path / "repeated.pth")


def pickled_array(flags: int) -> bytes:
    """Four numbers in protocol 2, as numpy writes them, but for the flags of their type."""

    class Type:
        def __reduce__(self):
            return np.dtype, ("f4", False, True), (3, "<", None, None, None, -1, -1, flags)

    class Array:
        def __reduce__(self):
            function = np.ones(1).__reduce__()[0]
            return function, (np.ndarray, (0,), b"b"), (1, (4,), Type(), False, np.ones(4, np.float32).tobytes())

    return pickle.dumps({"w": Array()}, protocol=2)


def test_made_up_types_in_a_pickle_are_harmless(tmp_path):
    """Flags 63 say that the numbers are addresses of Python objects."""
    path = tmp_path / "a.pkl"
    for flags in (0, 63):
        path.write_bytes(pickled_array(flags))
        assert torch.equal(weights.read(path, allow_pickle=True)["w"], torch.ones(4))
    for kind in (">f8", ">i2", "<f4"):
        numbers = np.arange(6).reshape(2, 3).astype(kind)
        path.write_bytes(pickle.dumps({"w": np.asfortranarray(numbers), "x": numbers[1, 2]}, protocol=2))
        found = weights.read(path, allow_pickle=True)
        assert found["w"].tolist() == numbers.tolist() and found["x"] == 5
    path.write_bytes(pickle.dumps({"w": np.array([None, {}])}, protocol=2))
    with pytest.raises(CheckpointError, match=r"a\.pkl is refused: .*an array of O"):
        weights.read(path, allow_pickle=True)


def test_a_pickle_cannot_ask_for_memory(tmp_path):
    """Seven bytes that want None remembered as number 60 million."""
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x02Nr\x00\x93\x93\x03.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="no state dict"):
        weights.read(path, allow_pickle=True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_tensors_without_numbers_are_refused(tmp_path):
    for tensor in (torch.zeros(2, 2).to_sparse(), torch.zeros(2, 2, device="meta")):
        torch.save({"w": tensor}, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match=r"w \(1 in all\) are no tensors"):
            weights.read(tmp_path / "a.pth")


def test_what_is_no_tensor_is_an_error(tmp_path):
    torch.save({"model": {"backbone.body.stem.conv1.weight": torch.zeros(1), "epoch": 3}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"epoch \(1 in all\) are no tensors"):
        weights.read(tmp_path / "a.pth")


def test_forms_of_the_files(tmp_path, states):
    """What detectron2's, MMDetection's and Detectron's loaders look for."""
    state = {"w": torch.arange(3.0)}
    content = weights.content_of(state, "detectron2", ".pkl")
    assert content["__author__"] and isinstance(content["model"]["w"], np.ndarray)
    assert weights.content_of(state, "mmdet", ".pth").keys() == {"meta", "state_dict"}
    assert weights.content_of(state, "detectron", ".pkl").keys() == {"blobs"}
    assert weights.content_of(state, "torchvision", ".pth").keys() == state.keys()


# ----------------------------------------------------------------------------------------------- command


@pytest.fixture
def convert(monkeypatch):
    """The command in this process, which takes seconds less to start."""
    spec = importlib.util.spec_from_file_location("convert_weights", ROOT / "tools" / "convert_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, arguments)])
        module.main()

    return call


@pytest.fixture
def yaml(tmp_path) -> Path:
    """The r50 architecture as a yaml, whose model reads BGR."""
    keys: dict = {}
    for key, value in zip(*(ARCHITECTURES["r50"][1][i::2] for i in (0, 1))):
        node = keys
        *path, last = key.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    path = tmp_path / "r50.yaml"
    path.write_text(json.dumps({"_BASE_": str(SMALL), **keys}))
    return path


def test_the_command_there_and_back(tmp_path, run, convert, states, yaml, capsys):
    torch.save({"model": states["r50"]}, tmp_path / "ours.pth")
    arguments = (tmp_path / "ours.pth", tmp_path / "tv.pth", "--to", "torchvision", "--config-file", yaml)
    out = run("tools/convert_weights.py", *arguments)
    assert out.returncode == 0, out.stderr
    assert re.search(r"for torchvision: there, give it the mean \[0\.4814\d+, 0\.454\d+, 0\.403\d+\]", out.stdout)
    theirs = torch.load(tmp_path / "tv.pth")
    assert torch.equal(theirs["backbone.body.conv1.weight"], states["r50"]["backbone.body.stem.conv1.weight"].flip(1))
    convert(tmp_path / "tv.pth", tmp_path / "back.pth", "--config-file", yaml)
    assert f"torchvision, {len(theirs)} tensors" in capsys.readouterr().out
    assert same(torch.load(tmp_path / "back.pth")["model"], states["r50"])


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("retinanet", ["--to", "detectron2"], "give --config-file"),
        ("aug_fpn", ["--to", "mmdet"], "no name in mmdet for"),
        ("r18", ["--config-file", "YAML"], "belongs to another model"),
        ("r18", ["--to", "detectron"], r"must end in \.pkl"),
        ("r18", ["--from", "mmdet"], "no place here"),
    ],
)
def test_the_command_writes_all_or_nothing(tmp_path, convert, states, yaml, source, arguments, message):
    torch.save({"model": states[source]}, tmp_path / "in.pth")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "in.pth", tmp_path / "out.pth", *(yaml if a == "YAML" else a for a in arguments))
    assert sorted(tmp_path.iterdir()) == before


def test_mmdetection_1_is_refused_by_name(states):
    """Its heads lie beside each other, and background comes first in them."""
    theirs = from_ours(states["r50"], "ours", "mmdet").state
    old = {name.removeprefix("roi_head."): tensor for name, tensor in theirs.items()}
    with pytest.raises(CheckpointError, match=r"old\.pth is of MMDetection 1 \(its bbox_head\..*upgrade_model_version"):
        to_ours(old, "old.pth")


def test_the_commands_error_is_one_line(tmp_path, run):
    (tmp_path / "in.pth").write_bytes(b"nonsense")
    result = run("tools/convert_weights.py", tmp_path / "in.pth", tmp_path / "out.pth")
    assert result.returncode == 2 and re.fullmatch(r"error: cannot read weights from .*in\.pth.*\n", result.stderr)


# --------------------------------------------------------------------------------------------- catalogue


def test_the_catalogue():
    assert len({catalog.cached(name) for name in weights.CATALOG}) == len(weights.CATALOG)
    for name, published in weights.CATALOG.items():
        assert published.address.startswith("https://") and published.licence
        if published.sha256:  # what the file's own name ends in
            assert re.fullmatch("[0-9a-f]{8}", published.sha256), name
            assert published.address.endswith(f"-{published.sha256}.pth")
    published = weights.CATALOG["Caffe2Detectron/COCO/37697547/e2e_keypoint_rcnn_R-50-FPN_1x"]
    assert published.address.endswith(
        "37697547/12_2017_baselines/e2e_keypoint_rcnn_R-50-FPN_1x.yaml.08_42_54.kdzV35ao/output/train/"
        "keypoints_coco_2014_train%3Akeypoints_coco_2014_valminusminival/generalized_rcnn/model_final.pkl"
    )


def test_download_on_request_alone(tmp_path, monkeypatch, server, convert, capsys):  # noqa: F811
    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path / "cache"))
    name, content = "torchvision/resnet18", b"not the published file"
    server.files["resnet18-f37072fd.pth"] = content
    with pytest.raises(CheckpointError, match=r"convert_weights\.py --download torchvision/resnet18"):
        weights.resolve(f"catalog://{name}")
    assert not server.requests
    with pytest.raises(DataError, match="must have f37072fd"):
        weights.fetch(name, mirror=server.address)
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(CheckpointError, match="nobody has published"):
        weights.fetch("ImageNetPretrained/MSRA/R-50", mirror=server.address)
    with pytest.raises(CheckpointError, match="not in the catalogue"):
        weights.fetch("ImageNetPretrained/MSRA/R-51")
    digest = hashlib.sha256(content).hexdigest()
    arguments = ("--download", name, "--mirror", server.address, "--sha256", digest)
    convert(*arguments)
    file = tmp_path / "cache" / "resnet18.pth"
    assert capsys.readouterr().out == f"catalog://{name} is {file}\n" and file.read_bytes() == content
    assert weights.resolve(f"catalog://{name}") == file
    before = len(server.requests)
    assert weights.fetch(name) == file and len(server.requests) == before  # what is there stays


def test_loading_warns_of_channels(tmp_path, states, caplog):
    model = model_of(*ARCHITECTURES["r50"])
    torch.save(from_ours(states["r50"], "ours", "torchvision").state, tmp_path / "tv.pth")
    assert load_weights(model, str(tmp_path / "tv.pth")) == "torchvision"
    assert "read RGB in 0..1, but INPUT.TO_BGR255 is True" in caplog.text
    assert same(model.state_dict(), states["r50"])
