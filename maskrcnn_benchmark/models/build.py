"""Configuration -> model: the only reader of cfg in models/, in the shape of the thing built."""

from __future__ import annotations

from functools import partial

from torch import nn
from yacs.config import CfgNode

from ..device import Device
from ..errors import ConfigError
from .anchors import AnchorGenerator
from .aug_fpn import AugFPN, AuxiliaryHead, SoftRoIPool
from .box_head import BoxHead, BoxPredictor, Conv5FeatureExtractor, MLPFeatureExtractor
from .cascade import CascadeBoxHead, CascadeMaskHead
from .fpn import FPN
from .layers import FrozenBatchNorm2d, Norm, SyncBatchNorm2d, group_norm
from .mask_head import ConvFeatureExtractor, MaskHead, MaskPredictor
from .rcnn import RCNN, Normalize
from .resnet import ResNet
from .roi_pool import RoIPool
from .rpn import RPN, RPNHead


def build_model(cfg: CfgNode, device: Device) -> RCNN:
    """The detector that `cfg` describes, with fresh weights, on the device."""
    backbone, channels = build_backbone(cfg)
    box_head = build_box_head(cfg, channels, device.compacts)
    model = RCNN(
        normalize=Normalize(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD, cfg.INPUT.TO_BGR255),
        backbone=backbone,
        rpn=build_rpn(cfg, channels),
        box_head=box_head,
        mask_head=build_mask_head(cfg, channels, box_head, device.compacts) if cfg.MODEL.MASK_ON else None,
        auxiliary_head=build_auxiliary_head(cfg, channels, device.compacts),
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
        backbone.fpn = build_fpn(cfg, backbone.body.out_channels, channels, norm)
    elif channels != backbone.body.out_channels[0]:
        raise ConfigError(
            f"MODEL.RESNETS.BACKBONE_OUT_CHANNELS is {channels}, but {cfg.MODEL.BACKBONE.CONV_BODY} gives out "
            f"{backbone.body.out_channels[0]}"
        )
    return backbone, channels


def build_fpn(cfg: CfgNode, in_channels: list[int], channels: int, norm: Norm | None) -> FPN:
    aug, relu = cfg.MODEL.AUG_FPN, cfg.MODEL.FPN.USE_RELU
    if not (aug.RESIDUAL_AUGMENTATION or aug.CONSISTENT_SUPERVISION):
        return FPN(in_channels, channels, norm, relu)
    ratios = tuple(aug.RATIOS) if aug.RESIDUAL_AUGMENTATION else ()
    return AugFPN(in_channels, channels, norm, relu, ratios, give_laterals=aug.CONSISTENT_SUPERVISION)


def build_rpn(cfg: CfgNode, channels: int) -> RPN:
    rpn = cfg.MODEL.RPN
    sizes = tuple((size,) for size in rpn.ANCHOR_SIZES) if rpn.USE_FPN else (tuple(rpn.ANCHOR_SIZES),)
    anchors = AnchorGenerator(sizes, rpn.ASPECT_RATIOS, rpn.ANCHOR_STRIDE, rpn.ANCHOR_ROUNDING, rpn.ANCHOR_GRID)
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
        focal=(rpn.FOCAL_LOSS_ALPHA, rpn.FOCAL_LOSS_GAMMA) if rpn.CLS_LOSS == "SigmoidFocalLoss" else None,
    )


def build_pool(cfg: CfgNode, head: CfgNode, channels: int) -> RoIPool | SoftRoIPool:
    pool = plain_pool(head)
    return SoftRoIPool(pool, channels) if cfg.MODEL.AUG_FPN.SOFT_ROI_SELECTION else pool


def plain_pool(head: CfgNode) -> RoIPool:
    return RoIPool(head.POOLER_SCALES, head.POOLER_RESOLUTION, head.POOLER_SAMPLING_RATIO, head.POOLER_ALIGNED)


def build_box_layers(cfg: CfgNode, channels: int) -> tuple[nn.Module, BoxPredictor]:
    """A feature extractor and the predictor behind it."""
    box = cfg.MODEL.ROI_BOX_HEAD
    if cfg.MODEL.ROI_HEADS.USE_FPN:
        norm = build_norm(cfg, "GN") if box.USE_GN else None
        extractor = MLPFeatureExtractor(channels, box.POOLER_RESOLUTION, box.MLP_HEAD_DIM, norm)
    else:
        resnets = cfg.MODEL.RESNETS
        options = stage_options(cfg) | {"dilation": resnets.RES5_DILATION}
        extractor = Conv5FeatureExtractor(resnet_depth(cfg), channels, build_norm(cfg, resnets.NORM), **options)
    return extractor, BoxPredictor(extractor.out_channels, box.NUM_CLASSES, cfg.MODEL.CLS_AGNOSTIC_BBOX_REG)


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
    return AuxiliaryHead(plain_pool(box), *layers, tuple(weights), aug.SUPERVISION_WEIGHT, compact, **criterion)


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
        norm = build_norm(cfg, "GN") if mask.USE_GN else None
        extractor = ConvFeatureExtractor(channels, tuple(mask.CONV_LAYERS), norm)
    return MaskHead(
        pool=build_pool(cfg, mask, channels),
        feature_extractor=extractor,
        predictor=MaskPredictor(extractor.out_channels, mask.CONV_LAYERS[-1], cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES),
        share_features=mask.SHARE_BOX_FEATURE_EXTRACTOR,
        soft_bitmap_targets=mask.SOFT_BITMAP_TARGETS,
        positives_per_image=int(heads.BATCH_SIZE_PER_IMAGE * heads.POSITIVE_FRACTION),
        compact=compact,
    )
