"""Configuration -> model: the only reader of cfg in models/, in the shape of the thing built."""

from __future__ import annotations

import logging
from functools import partial

from torch import nn
from yacs.config import CfgNode

from ..config.conv_body import parse
from ..config.legacy import describe_conventions
from ..device import Device
from ..errors import ConfigError
from .anchors import AnchorGenerator, octave_sizes
from .aug_fpn import AugFPN, AuxiliaryHead, SoftRoIPool
from .box_head import BoxHead, BoxPredictor, Conv5FeatureExtractor, ConvFCFeatureExtractor, MLPFeatureExtractor
from .cascade import CascadeBoxHead, CascadeMaskHead
from .fpn import FPN, HRFPN, LastLevelMaxPool, LastLevelP6P7
from .hrnet import HRNet
from .keypoint_head import KeypointHead, KeypointPredictor
from .layers import DeformConv2d, FrozenBatchNorm2d, Norm, SyncBatchNorm2d, group_norm
from .mask_head import ConvFeatureExtractor, MaskHead, MaskPredictor
from .rcnn import RCNN, Normalize
from .resnet import ResNet, conv3x3
from .retinanet import RetinaNet, RetinaNetHead
from .roi_pool import RoIPool
from .rpn import RPN, RPNHead

logger = logging.getLogger(__name__)


def build_model(cfg: CfgNode, device: Device) -> RCNN | RetinaNet:
    """The detector that `cfg` describes, with fresh weights, on the device."""
    logger.info(describe_conventions(cfg))
    build = build_retinanet if cfg.MODEL.RETINANET_ON else build_rcnn
    return build(cfg, device).to(device.torch_device)


def build_rcnn(cfg: CfgNode, device: Device) -> RCNN:
    model, (backbone, channels) = cfg.MODEL, build_backbone(cfg)
    box_head = None if model.RPN_ONLY else build_box_head(cfg, channels, device.compacts)
    return RCNN(
        normalize=build_normalize(cfg),
        backbone=backbone,
        rpn=build_rpn(cfg, channels),
        box_head=box_head,
        mask_head=build_mask_head(cfg, channels, box_head, device.compacts) if model.MASK_ON else None,
        keypoint_head=build_keypoint_head(cfg, channels, device.compacts) if model.KEYPOINT_ON else None,
        auxiliary_head=build_auxiliary_head(cfg, channels, device.compacts),
        channels_last=device.channels_last,
    )


def build_retinanet(cfg: CfgNode, device: Device) -> RetinaNet:
    (backbone, channels), keys, rpn = build_backbone(cfg), cfg.MODEL.RETINANET, cfg.MODEL.RPN
    sizes = octave_sizes(keys.ANCHOR_SIZES, keys.OCTAVE, keys.SCALES_PER_OCTAVE, keys.WHOLE_ANCHOR_SIZES)
    anchors = AnchorGenerator(
        sizes, keys.ASPECT_RATIOS, keys.ANCHOR_STRIDES, rpn.ANCHOR_ROUNDING, rpn.ANCHOR_GRID, rpn.ANCHOR_OFFSET
    )
    classes = keys.NUM_CLASSES if keys.BACKGROUND_CHANNEL else keys.NUM_CLASSES - 1
    layers = (channels, anchors.per_position, classes, keys.NUM_CONVS, keys.PRIOR_PROB, head_norm(cfg, keys))
    return RetinaNet(
        normalize=build_normalize(cfg),
        backbone=backbone,
        head=RetinaNetHead(*layers),
        anchors=anchors,
        background_channel=keys.BACKGROUND_CHANNEL,
        coder_weights=tuple(keys.BOX_CODER_WEIGHTS),
        foreground_iou=keys.FG_IOU_THRESHOLD,
        background_iou=keys.BG_IOU_THRESHOLD,
        straddle=keys.STRADDLE_THRESH,
        alpha=keys.LOSS_ALPHA,
        gamma=keys.LOSS_GAMMA,
        loss_normalizer=keys.LOSS_NORMALIZER,
        box_loss_divisor=keys.BBOX_REG_WEIGHT,
        box_loss=keys.BBOX_LOSS,
        smooth_l1_beta=keys.BBOX_REG_BETA,
        pre_nms=keys.PRE_NMS_TOP_N,
        score_threshold=keys.INFERENCE_TH,
        nms_threshold=keys.NMS_TH,
        clip_before_nms=keys.CLIP_BEFORE_NMS,
        drop_empty=keys.DROP_EMPTY,
        detections_per_image=cfg.TEST.DETECTIONS_PER_IMG,
        plus_one=cfg.MODEL.LEGACY_PLUS_ONE,
        channels_last=device.channels_last,
    )


def build_normalize(cfg: CfgNode) -> Normalize:
    return Normalize(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD, cfg.INPUT.TO_BGR255)


def build_norm(cfg: CfgNode, name: str) -> Norm:
    group = cfg.MODEL.GROUP_NORM
    return {
        "FrozenBN": partial(FrozenBatchNorm2d, eps=cfg.MODEL.RESNETS.FROZEN_BN_EPS),
        "BN": nn.BatchNorm2d,
        "SyncBN": SyncBatchNorm2d,
        "GN": group_norm(group.NUM_GROUPS, group.DIM_PER_GP, group.EPSILON),
    }[name]


def head_norm(cfg: CfgNode, part: CfgNode) -> Norm | None:
    """After the convolutions of `part` of cfg.MODEL; None for no norm."""
    name = "GN" if part.get("USE_GN") else part.NORM
    return build_norm(cfg, name) if name else None


def stage_options(cfg: CfgNode) -> dict:
    resnets = cfg.MODEL.RESNETS
    return {
        "res2_channels": resnets.RES2_OUT_CHANNELS,
        "groups": resnets.NUM_GROUPS,
        "width_per_group": resnets.WIDTH_PER_GROUP,
        "stride_in_1x1": resnets.STRIDE_IN_1X1,
        "pooled_shortcut": parse(cfg.MODEL.BACKBONE.CONV_BODY).vd,
    }


def build_body(cfg: CfgNode) -> nn.Module:
    """A module whose maps have strides 4, 8, 16, 32 (FPN), 8, 16, 32 (RetinaNet), 16 (C4) or 32 (C5), and
    `out_channels`."""
    resnets, form = cfg.MODEL.RESNETS, parse(cfg.MODEL.BACKBONE.CONV_BODY)
    options = {
        "in_channels": len(cfg.INPUT.PIXEL_MEAN),
        # ImageNet's standard deviation, as the model sees it
        "input_std": (57.4 if cfg.INPUT.TO_BGR255 else 0.225) / min(cfg.INPUT.PIXEL_STD),
        "freeze_at": cfg.MODEL.BACKBONE.FREEZE_CONV_BODY_AT,
    }
    if form.width:
        return HRNet(form.width, build_norm(cfg, resnets.NORM), **options)
    deformable = partial(DeformConv2d, offset_groups=resnets.DEFORMABLE_GROUPS, modulated=resnets.WITH_MODULATED_DCN)
    return ResNet(
        form.depth,
        build_norm(cfg, resnets.NORM),
        stem_channels=resnets.STEM_OUT_CHANNELS,
        deep_stem=form.vd,
        out_stages={"C4": (2,), "C5": (3,), "FPN": (0, 1, 2, 3), "FPN-RETINANET": (1, 2, 3)}[form.neck],
        res5_dilation=resnets.RES5_DILATION,
        convolutions=[deformable if chosen else conv3x3 for chosen in resnets.STAGE_WITH_DCN],
        **options,
        **stage_options(cfg),
    )


def build_neck(cfg: CfgNode, in_channels: list[int]) -> nn.Module:
    """The pyramid on a body whose maps have `in_channels`."""
    channels, form = cfg.MODEL.RESNETS.BACKBONE_OUT_CHANNELS, parse(cfg.MODEL.BACKBONE.CONV_BODY)
    norm = head_norm(cfg, cfg.MODEL.FPN)
    if form.width:
        return HRFPN(in_channels, channels, norm, cfg.MODEL.FPN.USE_RELU)
    aug, retinanet = cfg.MODEL.AUG_FPN, form.neck == "FPN-RETINANET"
    top, keys = LastLevelMaxPool(), cfg.MODEL.RETINANET
    if retinanet:
        top = LastLevelP6P7(in_channels[-1], channels, keys.USE_C5, keys.P7_RELU)
    options = {"norm": norm, "relu": cfg.MODEL.FPN.USE_RELU, "first_level": 2 if retinanet else 1, "top_blocks": top}
    if not (aug.RESIDUAL_AUGMENTATION or aug.CONSISTENT_SUPERVISION):
        return FPN(in_channels, channels, **options)
    ratios = tuple(aug.RATIOS) if aug.RESIDUAL_AUGMENTATION else ()
    return AugFPN(in_channels, channels, ratios, give_laterals=aug.CONSISTENT_SUPERVISION, **options)


def build_backbone(cfg: CfgNode) -> tuple[nn.Sequential, int]:
    """The backbone and the channels of its maps: `body` alone (C4, C5) or `body` and `fpn`."""
    backbone, channels = nn.Sequential(), cfg.MODEL.RESNETS.BACKBONE_OUT_CHANNELS
    backbone.body = build_body(cfg)
    if parse(cfg.MODEL.BACKBONE.CONV_BODY).neck.startswith("FPN"):
        backbone.fpn = build_neck(cfg, backbone.body.out_channels)
    elif channels != backbone.body.out_channels[0]:
        raise ConfigError(
            f"MODEL.RESNETS.BACKBONE_OUT_CHANNELS is {channels}, but {cfg.MODEL.BACKBONE.CONV_BODY} gives out "
            f"{backbone.body.out_channels[0]}"
        )
    return backbone, channels


def build_rpn(cfg: CfgNode, channels: int) -> RPN:
    rpn = cfg.MODEL.RPN
    sizes = tuple((size,) for size in rpn.ANCHOR_SIZES) if rpn.USE_FPN else (tuple(rpn.ANCHOR_SIZES),)
    anchors = AnchorGenerator(
        sizes, rpn.ASPECT_RATIOS, rpn.ANCHOR_STRIDE, rpn.ANCHOR_ROUNDING, rpn.ANCHOR_GRID, rpn.ANCHOR_OFFSET
    )
    post = "FPN_POST_NMS_TOP_N" if rpn.USE_FPN else "POST_NMS_TOP_N"
    return RPN(
        head=RPNHead(channels, anchors.per_position, rpn.CONV_DIM, rpn.NUM_CONVS),
        anchors=anchors,
        pre_nms=(rpn.PRE_NMS_TOP_N_TRAIN, rpn.PRE_NMS_TOP_N_TEST),
        post_nms=(rpn[f"{post}_TRAIN"], rpn[f"{post}_TEST"]),
        post_nms_per_batch=rpn.USE_FPN and rpn.FPN_POST_NMS_PER_BATCH,
        nms_threshold=rpn.NMS_THRESH,
        min_size=rpn.MIN_SIZE,
        score_threshold=rpn.SCORE_THRESH,
        foreground_iou=rpn.FG_IOU_THRESHOLD,
        background_iou=rpn.BG_IOU_THRESHOLD,
        batch_size=rpn.BATCH_SIZE_PER_IMAGE,
        positive_fraction=rpn.POSITIVE_FRACTION,
        straddle=rpn.STRADDLE_THRESH,
        smooth_l1_beta=rpn.SMOOTH_L1_BETA,
        loss_normalizer=rpn.LOSS_NORMALIZER,
        focal=(rpn.FOCAL_LOSS_ALPHA, rpn.FOCAL_LOSS_GAMMA) if rpn.CLS_LOSS == "SigmoidFocalLoss" else None,
        rank_by=rpn.RANK_BY,
        plus_one=cfg.MODEL.LEGACY_PLUS_ONE,
    )


def build_pool(cfg: CfgNode, head: CfgNode, channels: int) -> RoIPool | SoftRoIPool:
    pool = plain_pool(cfg, head)
    return SoftRoIPool(pool, channels) if cfg.MODEL.AUG_FPN.SOFT_ROI_SELECTION else pool


def plain_pool(cfg: CfgNode, head: CfgNode) -> RoIPool:
    sampling_ratio, aligned = head.POOLER_SAMPLING_RATIO, head.POOLER_ALIGNED
    return RoIPool(head.POOLER_SCALES, head.POOLER_RESOLUTION, sampling_ratio, aligned, cfg.MODEL.LEGACY_PLUS_ONE)


def build_box_extractor(cfg: CfgNode, channels: int) -> nn.Module:
    box, resnets = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.RESNETS
    if box.FEATURE_EXTRACTOR == "ResNet50Conv5ROIFeatureExtractor":
        depth, options = parse(cfg.MODEL.BACKBONE.CONV_BODY).depth, stage_options(cfg)
        return Conv5FeatureExtractor(
            depth, channels, build_norm(cfg, resnets.NORM), dilation=resnets.RES5_DILATION, **options
        )
    norm = head_norm(cfg, box)
    if box.FEATURE_EXTRACTOR == "FPNXconv1fcFeatureExtractor":
        convolutions = (box.CONV_HEAD_DIM,) * box.NUM_STACKED_CONVS
        return ConvFCFeatureExtractor(
            channels, box.POOLER_RESOLUTION, convolutions, box.MLP_HEAD_DIM, norm, box.DILATION
        )
    return MLPFeatureExtractor(channels, box.POOLER_RESOLUTION, box.MLP_HEAD_DIM, norm)


def build_box_layers(cfg: CfgNode, channels: int) -> tuple[nn.Module, BoxPredictor]:
    """A feature extractor and the predictor behind it."""
    extractor, classes = build_box_extractor(cfg, channels), cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES
    return extractor, BoxPredictor(extractor.out_channels, classes, cfg.MODEL.CLS_AGNOSTIC_BBOX_REG)


def build_box_head(cfg: CfgNode, channels: int, compact: bool) -> BoxHead:
    heads, box, cascade = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_BOX_CASCADE_HEAD
    options = {
        "batch_size": heads.BATCH_SIZE_PER_IMAGE,
        "positive_fraction": heads.POSITIVE_FRACTION,
        "smooth_l1_beta": box.SMOOTH_L1_BETA,
        "box_loss": box.BBOX_LOSS,
        "box_loss_weight": box.BBOX_LOSS_WEIGHT,
        "balance_negatives": heads.BBOX_ASSIGNER == "LibraBBoxAssigner",
        "score_threshold": heads.SCORE_THRESH,
        "nms_threshold": heads.NMS,
        "nms_type": heads.NMS_TYPE,
        "soft_nms_sigma": heads.SOFT_NMS_SIGMA,
        "detections_per_image": heads.DETECTIONS_PER_IMG,
        "plus_one": cfg.MODEL.LEGACY_PLUS_ONE,
        "compact": compact,
    }
    pool = build_pool(cfg, box, channels)
    if cfg.MODEL.CASCADE_ON:
        extractors, predictors = zip(*(build_box_layers(cfg, channels) for _ in cascade.IOUS))
        stages = (cascade.IOUS, tuple(map(tuple, cascade.BBOX_REG_WEIGHTS)), cascade.LOSS_WEIGHTS)
        how = {"feature_gradient": cascade.FEATURE_GRADIENT, "average": cascade.SCORE_AVERAGE}
        return CascadeBoxHead(pool, extractors, predictors, *stages, **how, **options)
    options |= {"foreground_iou": heads.FG_IOU_THRESHOLD, "background_iou": heads.BG_IOU_THRESHOLD}
    return BoxHead(pool, *build_box_layers(cfg, channels), reg_weights=tuple(heads.BBOX_REG_WEIGHTS), **options)


def build_auxiliary_head(cfg: CfgNode, channels: int, compact: bool) -> AuxiliaryHead | None:
    """Learns what the (first) box head learns, on the laterals."""
    aug, heads, box, cascade = (
        cfg.MODEL[name] for name in ("AUG_FPN", "ROI_HEADS", "ROI_BOX_HEAD", "ROI_BOX_CASCADE_HEAD")
    )
    if not aug.CONSISTENT_SUPERVISION:
        return None
    weights = cascade.BBOX_REG_WEIGHTS[0] if cfg.MODEL.CASCADE_ON else heads.BBOX_REG_WEIGHTS
    criterion = {"kind": box.BBOX_LOSS, "beta": box.SMOOTH_L1_BETA, "box_weight": box.BBOX_LOSS_WEIGHT}
    layers = build_box_layers(cfg, channels)
    return AuxiliaryHead(plain_pool(cfg, box), *layers, tuple(weights), aug.SUPERVISION_WEIGHT, compact, **criterion)


def build_mask_head(cfg: CfgNode, channels: int, box_head: BoxHead, compact: bool) -> MaskHead | CascadeMaskHead:
    cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD
    if cfg.MODEL.ROI_MASK_HEAD.PER_STAGE:
        stages = [build_one_mask_head(cfg, channels, box_head, compact) for _ in cascade.IOUS]
        return CascadeMaskHead(stages, cascade.LOSS_WEIGHTS)
    return build_one_mask_head(cfg, channels, box_head, compact)


def build_one_mask_head(cfg: CfgNode, channels: int, box_head: BoxHead, compact: bool) -> MaskHead:
    heads, mask = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_MASK_HEAD
    if mask.SHARE_BOX_FEATURE_EXTRACTOR:
        extractor = box_head.feature_extractor
    else:
        extractor = ConvFeatureExtractor(channels, tuple(mask.CONV_LAYERS), head_norm(cfg, mask), mask.DILATION)
    return MaskHead(
        pool=build_pool(cfg, mask, channels),
        feature_extractor=extractor,
        predictor=MaskPredictor(extractor.out_channels, mask.CONV_LAYERS[-1], cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES),
        share_features=mask.SHARE_BOX_FEATURE_EXTRACTOR,
        soft_bitmap_targets=mask.SOFT_BITMAP_TARGETS,
        positives_per_image=int(heads.BATCH_SIZE_PER_IMAGE * heads.POSITIVE_FRACTION),
        plus_one=cfg.MODEL.LEGACY_PLUS_ONE,
        compact=compact,
    )


def build_keypoint_head(cfg: CfgNode, channels: int, compact: bool) -> KeypointHead:
    heads, keypoint = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_KEYPOINT_HEAD
    extractor = ConvFeatureExtractor(channels, tuple(keypoint.CONV_LAYERS), name="conv_fcn")
    return KeypointHead(
        pool=build_pool(cfg, keypoint, channels),
        feature_extractor=extractor,
        predictor=KeypointPredictor(extractor.out_channels, keypoint.NUM_CLASSES),
        mirror=tuple(cfg.TEST.BBOX_AUG.KEYPOINT_MIRROR),
        positives=keypoint.POSITIVES,
        positives_per_image=int(heads.BATCH_SIZE_PER_IMAGE * heads.POSITIVE_FRACTION),
        plus_one=cfg.MODEL.LEGACY_PLUS_ONE,
        compact=compact,
    )
