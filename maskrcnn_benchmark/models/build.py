"""Configuration -> model: the only reader of cfg in models/, in the shape of the thing built."""

from __future__ import annotations

import logging
from functools import partial

from torch import nn
from yacs.config import CfgNode

from ..config.legacy import describe_conventions
from ..device import Device
from ..errors import ConfigError
from .anchors import AnchorGenerator
from .box_head import BoxHead, BoxPredictor, Conv5FeatureExtractor, MLPFeatureExtractor
from .fpn import FPN
from .layers import FrozenBatchNorm2d, Norm, SyncBatchNorm2d, group_norm
from .mask_head import ConvFeatureExtractor, MaskHead, MaskPredictor
from .rcnn import RCNN, Normalize
from .resnet import ResNet
from .roi_pool import RoIPool
from .rpn import RPN, RPNHead

logger = logging.getLogger(__name__)


def build_model(cfg: CfgNode, device: Device) -> RCNN:
    """The detector that `cfg` describes, with fresh weights, on the device."""
    logger.info(describe_conventions(cfg))
    backbone, channels = build_backbone(cfg)
    box_head = build_box_head(cfg, channels, device.compacts)
    model = RCNN(
        normalize=Normalize(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD, cfg.INPUT.TO_BGR255),
        backbone=backbone,
        rpn=build_rpn(cfg, channels),
        box_head=box_head,
        mask_head=build_mask_head(cfg, channels, box_head, device.compacts) if cfg.MODEL.MASK_ON else None,
        channels_last=device.channels_last,
    )
    return model.to(device.torch_device)


def build_norm(cfg: CfgNode, name: str) -> Norm:
    group = cfg.MODEL.GROUP_NORM
    return {
        "FrozenBN": partial(FrozenBatchNorm2d, eps=cfg.MODEL.RESNETS.FROZEN_BN_EPS),
        "BN": nn.BatchNorm2d,
        "SyncBN": SyncBatchNorm2d,
        "GN": group_norm(group.NUM_GROUPS, group.DIM_PER_GP, group.EPSILON),
    }[name]


def stage_options(cfg: CfgNode) -> dict:
    resnets = cfg.MODEL.RESNETS
    return {
        "res2_channels": resnets.RES2_OUT_CHANNELS,
        "groups": resnets.NUM_GROUPS,
        "width_per_group": resnets.WIDTH_PER_GROUP,
        "stride_in_1x1": resnets.STRIDE_IN_1X1,
    }


def resnet_depth(cfg: CfgNode) -> int:
    return int(cfg.MODEL.BACKBONE.CONV_BODY.split("-")[1])


def build_backbone(cfg: CfgNode) -> tuple[nn.Sequential, int]:
    """The backbone and the channels of its maps: `body` alone (C4) or `body` and `fpn`."""
    resnets, fpn = cfg.MODEL.RESNETS, cfg.MODEL.RPN.USE_FPN
    backbone = nn.Sequential()
    backbone.body = ResNet(
        resnet_depth(cfg),
        build_norm(cfg, resnets.NORM),
        in_channels=len(cfg.INPUT.PIXEL_MEAN),
        input_std=(57.4 if cfg.INPUT.TO_BGR255 else 0.225)
        / min(cfg.INPUT.PIXEL_STD),  # ImageNet's, as the model sees it
        stem_channels=resnets.STEM_OUT_CHANNELS,
        out_stages=(0, 1, 2, 3) if fpn else (2,),
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_CONV_BODY_AT,
        res5_dilation=resnets.RES5_DILATION,
        **stage_options(cfg),
    )
    channels = resnets.BACKBONE_OUT_CHANNELS
    if fpn:
        norm = build_norm(cfg, "GN") if cfg.MODEL.FPN.USE_GN else None
        backbone.fpn = FPN(backbone.body.out_channels, channels, norm, cfg.MODEL.FPN.USE_RELU)
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
        head=RPNHead(channels, anchors.per_position, rpn.CONV_DIM),
        anchors=anchors,
        pre_nms=(rpn.PRE_NMS_TOP_N_TRAIN, rpn.PRE_NMS_TOP_N_TEST),
        post_nms=(rpn[f"{post}_TRAIN"], rpn[f"{post}_TEST"]),
        post_nms_per_batch=rpn.USE_FPN and rpn.FPN_POST_NMS_PER_BATCH,
        nms_threshold=rpn.NMS_THRESH,
        min_size=rpn.MIN_SIZE,
        foreground_iou=rpn.FG_IOU_THRESHOLD,
        background_iou=rpn.BG_IOU_THRESHOLD,
        batch_size=rpn.BATCH_SIZE_PER_IMAGE,
        positive_fraction=rpn.POSITIVE_FRACTION,
        straddle=rpn.STRADDLE_THRESH,
        smooth_l1_beta=rpn.SMOOTH_L1_BETA,
        loss_normalizer=rpn.LOSS_NORMALIZER,
        rank_by=rpn.RANK_BY,
        plus_one=cfg.MODEL.LEGACY_PLUS_ONE,
    )


def build_pool(head: CfgNode, plus_one: bool) -> RoIPool:
    sampling_ratio, aligned = head.POOLER_SAMPLING_RATIO, head.POOLER_ALIGNED
    return RoIPool(head.POOLER_SCALES, head.POOLER_RESOLUTION, sampling_ratio, aligned, plus_one)


def build_box_head(cfg: CfgNode, channels: int, compact: bool) -> BoxHead:
    heads, box = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    if heads.USE_FPN:
        norm = build_norm(cfg, "GN") if box.USE_GN else None
        extractor = MLPFeatureExtractor(channels, box.POOLER_RESOLUTION, box.MLP_HEAD_DIM, norm)
    else:
        resnets = cfg.MODEL.RESNETS
        options = stage_options(cfg) | {"dilation": resnets.RES5_DILATION}
        extractor = Conv5FeatureExtractor(resnet_depth(cfg), channels, build_norm(cfg, resnets.NORM), **options)
    return BoxHead(
        pool=build_pool(box, cfg.MODEL.LEGACY_PLUS_ONE),
        feature_extractor=extractor,
        predictor=BoxPredictor(extractor.out_channels, box.NUM_CLASSES, cfg.MODEL.CLS_AGNOSTIC_BBOX_REG),
        reg_weights=tuple(heads.BBOX_REG_WEIGHTS),
        foreground_iou=heads.FG_IOU_THRESHOLD,
        background_iou=heads.BG_IOU_THRESHOLD,
        batch_size=heads.BATCH_SIZE_PER_IMAGE,
        positive_fraction=heads.POSITIVE_FRACTION,
        smooth_l1_beta=box.SMOOTH_L1_BETA,
        score_threshold=heads.SCORE_THRESH,
        nms_threshold=heads.NMS,
        detections_per_image=heads.DETECTIONS_PER_IMG,
        plus_one=cfg.MODEL.LEGACY_PLUS_ONE,
        compact=compact,
    )


def build_mask_head(cfg: CfgNode, channels: int, box_head: BoxHead, compact: bool) -> MaskHead:
    heads, mask = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_MASK_HEAD
    if mask.SHARE_BOX_FEATURE_EXTRACTOR:
        extractor = box_head.feature_extractor
    else:
        norm = build_norm(cfg, "GN") if mask.USE_GN else None
        extractor = ConvFeatureExtractor(channels, tuple(mask.CONV_LAYERS), norm)
    return MaskHead(
        pool=build_pool(mask, cfg.MODEL.LEGACY_PLUS_ONE),
        feature_extractor=extractor,
        predictor=MaskPredictor(extractor.out_channels, mask.CONV_LAYERS[-1], cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES),
        share_features=mask.SHARE_BOX_FEATURE_EXTRACTOR,
        soft_bitmap_targets=mask.SOFT_BITMAP_TARGETS,
        positives_per_image=int(heads.BATCH_SIZE_PER_IMAGE * heads.POSITIVE_FRACTION),
        plus_one=cfg.MODEL.LEGACY_PLUS_ONE,
        compact=compact,
    )
