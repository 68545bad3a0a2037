"""How each project names the tensors of these models: one table a project, read in both directions (rules.py).

Ours are maskrcnn-benchmark's names. The first row that fits a name is taken; later rows for the same names of ours are
older spellings, which are read but not written. A convolution that a norm may follow is `NAME.0` here with the norm as
`NAME.1`, and a deformable one has `NAME.offset` beside `NAME`, in every table (changes.py restores the model's names).

Sources: torchvision 0.28; detectron2 0.6; Detectron and its reading in maskrcnn-benchmark and detectron2
(c2_model_loading.py); MMDetection 3 with mmcv's ConvModule; PaddleDetection 2 (ppdet/modeling/backbones); timm.
"""

from __future__ import annotations

from .rules import Row

Table = list[Row]


def _torchvision_blocks(ours: str, theirs: str) -> Table:
    return [
        (f"{ours}.conv{{n}}.weight", f"{theirs}.conv{{n}}.weight"),
        (f"{ours}.bn{{n}}.*", f"{theirs}.bn{{n}}.*"),
        (f"{ours}.downsample.{{n}}.*", f"{theirs}.downsample.{{n}}.*"),
    ]


_TOWER, _TOWER_HEAD = "{part:cls_tower|bbox_tower}", "{part:classification_head|regression_head}"

TORCHVISION: Table = [
    ("backbone.body.stem.{part:conv|bn}1.*", "backbone.body.{part:conv|bn}1.*"),
    *_torchvision_blocks("backbone.body.layer{s}.{b}", "backbone.body.layer{s}.{b}"),
    ("backbone.body.{n}.*", "backbone.body.{n}.*"),  # a MobileNet's features
    ("backbone.fpn.fpn_inner{level}.*", "backbone.fpn.inner_blocks.{level-first}.*"),
    ("backbone.fpn.fpn_layer{level}.*", "backbone.fpn.layer_blocks.{level-first}.*"),
    ("backbone.fpn.top_blocks.*", "backbone.fpn.extra_blocks.*"),
    ("rpn.head.conv.{n}.*", "rpn.head.conv.{n}.0.*", "deep_rpn"),
    ("rpn.head.conv.*", "rpn.head.conv.0.0.*"),
    ("rpn.head.conv.*", "rpn.head.conv.*"),  # before torchvision 0.13
    ("rpn.head.{part:cls_logits|bbox_pred}.*", "rpn.head.{part:cls_logits|bbox_pred}.*", "not retinanet"),
    ("rpn.head.cls_logits.*", "head.classification_head.cls_logits.*", "retinanet"),
    ("rpn.head.bbox_pred.*", "head.regression_head.bbox_reg.*", "retinanet"),
    (f"rpn.head.{_TOWER}.{{tower_step*n+1}}.*", f"head.{_TOWER_HEAD}.conv.{{n}}.1.*", "normed_towers"),
    (f"rpn.head.{_TOWER}.{{tower_step*n}}.*", f"head.{_TOWER_HEAD}.conv.{{n}}.0.*"),
    (f"rpn.head.{_TOWER}.{{n}}.*", f"head.{_TOWER_HEAD}.conv.{{n}}.*"),  # before 0.13
    ("roi_heads.box.feature_extractor.fc6.0.*", "roi_heads.box_head.{box_fc}.*", "box_convs"),
    ("roi_heads.box.feature_extractor.fc{n}.0.*", "roi_heads.box_head.fc{n}.*", "not box_convs"),
    ("roi_heads.box.feature_extractor.xconvs.{step*n+1}.*", "roi_heads.box_head.{n}.1.*", "normed_box_convs"),
    ("roi_heads.box.feature_extractor.xconvs.{step*n}.*", "roi_heads.box_head.{n}.0.*"),
    ("roi_heads.box.predictor.*", "roi_heads.box_predictor.*"),
    ("roi_heads.mask.feature_extractor.mask_fcn{n}.*", "roi_heads.mask_head.{n-1}.*"),
    ("roi_heads.mask.feature_extractor.mask_fcn{n}.0.*", "roi_heads.mask_head.mask_fcn{n}.*"),  # before 0.14
    ("roi_heads.mask.predictor.*", "roi_heads.mask_predictor.*"),
    ("roi_heads.keypoint.feature_extractor.conv_fcn{n}.*", "roi_heads.keypoint_head.{2*n-2}.*"),
    ("roi_heads.keypoint.predictor.*", "roi_heads.keypoint_predictor.*"),
]

# An ImageNet backbone of torchvision or timm (resnet50; resnet50d is ResNet-50vd), or of HRNet's authors
BACKBONE: Table = [
    ("backbone.body.stem.conv{n}.*", "conv1.{3*n-3}.*", "deep"),
    ("backbone.body.stem.bn3.*", "bn1.*", "deep"),
    ("backbone.body.stem.bn{n}.*", "conv1.{3*n-2}.*", "deep"),
    ("backbone.body.stem.{part:conv|bn}{n}.*", "{part:conv|bn}{n}.*", "not deep"),
    ("backbone.body.layer{s}.{b}.downsample.{n}.*", "layer{s}.{b}.downsample.{n+1}.*", "deep"),
    *_torchvision_blocks("backbone.body.layer{s}.{b}", "layer{s}.{b}"),
    ("backbone.body.{part:transition|stage}{n}.*", "{part:transition|stage}{n}.*"),
]


def _detectron2_blocks(ours: str, theirs: str, *conditions: str) -> Table:
    return [
        (f"{ours}.bn{{n}}.*", f"{theirs}.conv{{n}}.norm.*", *conditions),
        (f"{ours}.conv{{n}}.offset.*", f"{theirs}.conv{{n}}_offset.*", *conditions),
        (f"{ours}.conv{{n}}.*", f"{theirs}.conv{{n}}.*", *conditions),
        (f"{ours}.downsample.1.*", f"{theirs}.shortcut.norm.*", *conditions),
        (f"{ours}.downsample.0.*", f"{theirs}.shortcut.*", *conditions),
    ]


DETECTRON2: Table = [
    ("backbone.body.stem.bn1.*", "backbone.bottom_up.stem.conv1.norm.*", "pyramid"),
    ("backbone.body.stem.conv1.*", "backbone.bottom_up.stem.conv1.*", "pyramid"),
    ("backbone.body.stem.bn1.*", "backbone.stem.conv1.norm.*"),
    ("backbone.body.stem.conv1.*", "backbone.stem.conv1.*"),
    *_detectron2_blocks("backbone.body.layer{s}.{b}", "backbone.bottom_up.res{s+1}.{b}", "pyramid"),
    *_detectron2_blocks("backbone.body.layer{s}.{b}", "backbone.res{s+1}.{b}"),
    *_detectron2_blocks("roi_heads.box.feature_extractor.head.layer4.{b}", "roi_heads.res5.{b}"),
    ("backbone.fpn.fpn_inner{level}.1.*", "backbone.fpn_lateral{level+1}.norm.*"),
    ("backbone.fpn.fpn_inner{level}.0.*", "backbone.fpn_lateral{level+1}.*"),
    ("backbone.fpn.fpn_layer{level}.1.*", "backbone.fpn_output{level+1}.norm.*"),
    ("backbone.fpn.fpn_layer{level}.0.*", "backbone.fpn_output{level+1}.*"),
    ("backbone.fpn.top_blocks.*", "backbone.top_block.*"),
    ("rpn.head.conv.{n}.*", "proposal_generator.rpn_head.conv.conv{n}.*", "deep_rpn"),
    ("rpn.head.conv.*", "proposal_generator.rpn_head.conv.*"),
    ("rpn.head.cls_logits.*", "proposal_generator.rpn_head.objectness_logits.*", "not retinanet"),
    ("rpn.head.bbox_pred.*", "proposal_generator.rpn_head.anchor_deltas.*", "not retinanet"),
    ("rpn.head.{part:cls|bbox}_tower.*", "head.{part:cls|bbox}_subnet.*"),
    ("rpn.head.cls_logits.*", "head.cls_score.*", "retinanet"),
    ("rpn.head.bbox_pred.*", "head.bbox_pred.*", "retinanet"),
    ("roi_heads.box.feature_extractor.fc{n}.0.*", "roi_heads.box_head.fc{n-5}.*"),
    ("roi_heads.box.feature_extractor.{k}.fc{n}.0.*", "roi_heads.box_head.{k}.fc{n-5}.*"),  # cascade
    ("roi_heads.box.feature_extractor.xconvs.{step*n+1}.*", "roi_heads.box_head.conv{n+1}.norm.*", "normed_box_convs"),
    ("roi_heads.box.feature_extractor.xconvs.{step*n}.*", "roi_heads.box_head.conv{n+1}.*"),
    ("roi_heads.box.predictor.*", "roi_heads.box_predictor.*"),
    ("roi_heads.mask.feature_extractor.mask_fcn{n}.1.*", "roi_heads.mask_head.mask_fcn{n}.norm.*"),
    ("roi_heads.mask.feature_extractor.mask_fcn{n}.0.*", "roi_heads.mask_head.mask_fcn{n}.*"),
    ("roi_heads.mask.predictor.conv5_mask.*", "roi_heads.mask_head.deconv.*"),
    ("roi_heads.mask.predictor.mask_fcn_logits.*", "roi_heads.mask_head.predictor.*"),
    ("roi_heads.keypoint.feature_extractor.conv_fcn*", "roi_heads.keypoint_head.conv_fcn*"),
    ("roi_heads.keypoint.predictor.kps_*", "roi_heads.keypoint_head.*"),
]

# Detectron's blobs: convolutions end in _w and _b, norms folded to scale and shift in _bn_s and _bn_b
_LEAF, _WB, _SB = "{leaf:weight|bias}", "{leaf:w|b}", "{leaf:s|b}"


def _detectron_norm(ours: str, theirs: str, *conditions: str) -> Table:
    return [
        (f"{ours}.{_LEAF}", f"{theirs}_gn_{_SB}", "group_norm", *conditions),
        (f"{ours}.{_LEAF}", f"{theirs}_bn_{_SB}", "not group_norm", *conditions),
        (f"{ours}.running_{{leaf:mean|var}}", f"{theirs}_bn_{{leaf:rm|riv}}", *conditions),  # FAIR's, not folded
    ]


def _detectron_blocks(ours: str, theirs: str, *conditions: str) -> Table:
    return [
        (f"{ours}.conv{{n}}.weight", f"{theirs}_branch2{{n@abc}}_w", *conditions),
        (f"{ours}.downsample.0.weight", f"{theirs}_branch1_w", *conditions),
        *_detectron_norm(f"{ours}.bn{{n}}", f"{theirs}_branch2{{n@abc}}", *conditions),
        *_detectron_norm(f"{ours}.downsample.1", f"{theirs}_branch1", *conditions),
    ]


def _detectron_pyramid(level: int) -> Table:
    """The blobs of a level are called after the last block of its stage."""
    stage, rows = f"res{level + 1}_{{last{level + 1}}}_sum", []
    inner = f"fpn_inner_{stage}" + ("" if level == 4 else "_lateral")
    for ours, theirs in ((f"fpn_inner{level}", inner), (f"fpn_layer{level}", f"fpn_{stage}")):
        rows.append((f"backbone.fpn.{ours}.0.{_LEAF}", f"{theirs}_{_WB}"))
        rows.append((f"backbone.fpn.{ours}.1.{_LEAF}", f"{theirs}_gn_{_SB}"))
    return rows


DETECTRON: Table = [
    ("backbone.body.stem.conv1.weight", "conv1_w"),
    (f"backbone.body.stem.bn1.{_LEAF}", f"res_conv1_bn_{_SB}", "not group_norm"),
    (f"backbone.body.stem.bn1.{_LEAF}", f"conv1_gn_{_SB}", "group_norm"),
    ("backbone.body.stem.bn1.running_{leaf:mean|var}", "res_conv1_bn_{leaf:rm|riv}"),
    (f"backbone.body.stem.bn1.{_LEAF}", f"conv1_bn_{_SB}"),
    *_detectron_blocks("roi_heads.box.feature_extractor.head.layer4.{b}", "res5_{b}", "c4"),
    *_detectron_blocks("backbone.body.layer{s}.{b}", "res{s+1}_{b}"),
    *(row for level in (1, 2, 3, 4) for row in _detectron_pyramid(level)),
    (f"backbone.fpn.top_blocks.p{{n}}.{_LEAF}", f"fpn_{{n}}_{_WB}"),
    (f"rpn.head.conv.{_LEAF}", f"conv_rpn_fpn2_{_WB}", "pyramid"),
    (f"rpn.head.conv.{_LEAF}", f"conv_rpn_{_WB}", "not pyramid"),
    (f"rpn.head.{{part:cls|bbox}}_tower.{{2*n}}.{_LEAF}", f"retnet_{{part:cls|bbox}}_conv_n{{n}}_fpn3_{_WB}"),
    (f"rpn.head.cls_logits.{_LEAF}", f"retnet_cls_pred_fpn3_{_WB}", "retinanet"),
    (f"rpn.head.bbox_pred.{_LEAF}", f"retnet_bbox_pred_fpn3_{_WB}", "retinanet"),
    (f"rpn.head.{{part:cls_logits|bbox_pred}}.{_LEAF}", f"rpn_{{part:cls_logits|bbox_pred}}_fpn2_{_WB}", "pyramid"),
    (f"rpn.head.{{part:cls_logits|bbox_pred}}.{_LEAF}", f"rpn_{{part:cls_logits|bbox_pred}}_{_WB}", "not pyramid"),
    (f"roi_heads.box.feature_extractor.fc{{n}}.0.{_LEAF}", f"fc{{n}}_{_WB}"),
    (f"roi_heads.box.feature_extractor.xconvs.{{step*n+1}}.{_LEAF}", f"head_conv{{n+1}}_gn_{_SB}", "normed_box_convs"),
    (f"roi_heads.box.feature_extractor.xconvs.{{step*n}}.{_LEAF}", f"head_conv{{n+1}}_{_WB}"),
    (f"roi_heads.box.predictor.{{part:cls_score|bbox_pred}}.{_LEAF}", f"{{part:cls_score|bbox_pred}}_{_WB}"),
    (f"roi_heads.mask.feature_extractor.mask_fcn{{n}}.0.{_LEAF}", f"_[mask]_fcn{{n}}_{_WB}"),
    (f"roi_heads.mask.feature_extractor.mask_fcn{{n}}.1.{_LEAF}", f"_[mask]_fcn{{n}}_gn_{_SB}"),
    (
        f"roi_heads.mask.predictor.{{part:conv5_mask|mask_fcn_logits}}.{_LEAF}",
        f"{{part:conv5_mask|mask_fcn_logits}}_{_WB}",
    ),
    (f"roi_heads.keypoint.feature_extractor.conv_fcn{{n}}.{_LEAF}", f"conv_fcn{{n}}_{_WB}"),
    (f"roi_heads.keypoint.predictor.kps_score_lowres.{_LEAF}", f"kps_score_lowres_{_WB}"),
]


def _mmdet_blocks(ours: str, theirs: str) -> Table:
    return [
        (f"{ours}.bn{{n}}.*", f"{theirs}.gn{{n}}.*", "group_norm"),
        (f"{ours}.conv{{n}}.offset.*", f"{theirs}.conv{{n}}.conv_offset.*"),
        (f"{ours}.downsample.{{n}}.*", f"{theirs}.downsample.{{n+1}}.*", "deep"),
        (f"{ours}.*", f"{theirs}.*"),
    ]


def _mmdet_heads(stage: str, mask: str, condition: str) -> Table:
    """stage: `{k}.` in a cascade, which has a mask head for each stage too."""
    box, theirs, mask_there = "roi_heads.box.", f"roi_head.bbox_head.{stage}", f"roi_head.mask_head.{stage}"
    rows = [
        (f"{box}feature_extractor.{stage}fc{{n}}.0.*", f"{theirs}shared_fcs.{{n-6}}.*"),
        (f"{box}feature_extractor.{stage}xconvs.{{step*n+1}}.{_LEAF}", f"{theirs}shared_convs.{{n}}.gn.{_LEAF}"),
        (f"{box}feature_extractor.{stage}xconvs.{{step*n}}.*", f"{theirs}shared_convs.{{n}}.conv.*"),
        (f"{box}predictor.{stage}cls_score.*", f"{theirs}fc_cls.*"),
        (f"{box}predictor.{stage}bbox_pred.*", f"{theirs}fc_reg.*"),
        (f"{mask}feature_extractor.mask_fcn{{n}}.0.*", f"{mask_there}convs.{{n-1}}.conv.*"),
        (f"{mask}feature_extractor.mask_fcn{{n}}.1.{_LEAF}", f"{mask_there}convs.{{n-1}}.gn.{_LEAF}"),
        (f"{mask}predictor.conv5_mask.*", f"{mask_there}upsample.*"),
        (f"{mask}predictor.mask_fcn_logits.*", f"{mask_there}conv_logits.*"),
    ]
    return [(*row, condition) for row in rows]


MMDET: Table = [
    ("backbone.body.stem.conv{n}.*", "backbone.stem.{3*n-3}.*", "deep"),
    ("backbone.body.stem.bn{n}.*", "backbone.stem.{3*n-2}.*", "deep"),
    ("backbone.body.stem.bn{n}.*", "backbone.gn{n}.*", "group_norm"),
    ("backbone.body.stem.{part:conv|bn}{n}.*", "backbone.{part:conv|bn}{n}.*"),
    *_mmdet_blocks("backbone.body.layer{s}.{b}", "backbone.layer{s}.{b}"),
    *_mmdet_blocks("roi_heads.box.feature_extractor.head.layer4.{b}", "roi_head.shared_head.layer4.{b}"),
    ("backbone.body.{part:transition|stage}{n}.*", "backbone.{part:transition|stage}{n}.*"),
    ("backbone.fpn.top_blocks.p6.*", "neck.fpn_convs.3.conv.*", "retinanet"),
    ("backbone.fpn.top_blocks.p7.*", "neck.fpn_convs.4.conv.*", "retinanet"),
    ("backbone.fpn.reduction.0.*", "neck.reduction_conv.conv.*"),
    ("backbone.fpn.fpn_inner{level}.0.*", "neck.lateral_convs.{level-first}.conv.*"),
    (f"backbone.fpn.fpn_inner{{level}}.1.{_LEAF}", f"neck.lateral_convs.{{level-first}}.gn.{_LEAF}"),
    ("backbone.fpn.fpn_layer{level}.0.*", "neck.fpn_convs.{level-first}.conv.*"),
    (f"backbone.fpn.fpn_layer{{level}}.1.{_LEAF}", f"neck.fpn_convs.{{level-first}}.gn.{_LEAF}"),
    ("rpn.head.conv.{n}.*", "rpn_head.rpn_conv.{n}.conv.*", "deep_rpn"),
    ("rpn.head.conv.*", "rpn_head.rpn_conv.*"),
    ("rpn.head.cls_logits.*", "rpn_head.rpn_cls.*", "not retinanet"),
    ("rpn.head.bbox_pred.*", "rpn_head.rpn_reg.*", "not retinanet"),
    (
        f"rpn.head.{{part:cls|bbox}}_tower.{{tower_step*n+1}}.{_LEAF}",
        f"bbox_head.{{part:cls|reg}}_convs.{{n}}.gn.{_LEAF}",
        "normed_towers",
    ),
    ("rpn.head.{part:cls|bbox}_tower.{tower_step*n}.*", "bbox_head.{part:cls|reg}_convs.{n}.conv.*"),
    ("rpn.head.cls_logits.*", "bbox_head.retina_cls.*", "retinanet"),
    ("rpn.head.bbox_pred.*", "bbox_head.retina_reg.*", "retinanet"),
    *_mmdet_heads("", "roi_heads.mask.", "not cascade"),
    *_mmdet_heads("{k}.", "roi_heads.mask.stages.{k}.", "cascade"),
]

_STATISTICS = "{leaf:weight|bias|running_mean|running_var}", "{leaf:weight|bias|_mean|_variance}"


def _paddle_pair(conv: str, norm: str, theirs: str, *conditions: str) -> Table:
    return [
        (f"{conv}.weight", f"{theirs}.conv.weight", *conditions),
        (f"{norm}.{_STATISTICS[0]}", f"{theirs}.norm.{_STATISTICS[1]}", *conditions),
    ]


def _paddle_blocks(ours: str, theirs: str, *conditions: str) -> Table:
    down = f"{ours}.downsample"
    return [
        *_paddle_pair(f"{ours}.conv{{n}}", f"{ours}.bn{{n}}", f"{theirs}.branch2{{n@abc}}", *conditions),
        (f"{ours}.conv{{n}}.offset.*", f"{theirs}.branch2{{n@abc}}.conv_offset.*", *conditions),
        *_paddle_pair(f"{down}.0", f"{down}.1", f"{theirs}.short", "not deep", *conditions),
        *_paddle_pair(f"{down}.0", f"{down}.1", f"{theirs}.short.conv", "deep", *conditions),
    ]


_ANY_BLOCK = "{b+1@abcdefghij}"
# PaddleDetection's backbones, which PaddleX takes. The shortcut of res2 has no pooling before it, with vd neither.
PADDLEDETECTION: Table = [
    *_paddle_pair("backbone.body.stem.conv{n}", "backbone.body.stem.bn{n}", "conv1.conv1_{n}", "deep"),
    *_paddle_pair("backbone.body.stem.conv1", "backbone.body.stem.bn1", "conv1.conv1", "not deep"),
    *_paddle_pair("backbone.body.layer1.0.downsample.0", "backbone.body.layer1.0.downsample.1", "res2.res2a.short"),
    *_paddle_blocks("backbone.body.layer3.0", "res4.res4a", "long_res4"),
    *_paddle_blocks("backbone.body.layer3.{b}", "res4.res4b{b}", "long_res4"),
    *_paddle_blocks("backbone.body.layer{s}.{b}", f"res{{s+1}}.res{{s+1}}{_ANY_BLOCK}"),
]
