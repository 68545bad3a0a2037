"""Names and shapes of maskrcnn-benchmark's state dicts, written down from its public naming: what its published weights
hold. Nothing here is made by the models under test."""

from __future__ import annotations

from collections.abc import Iterator

from yacs.config import CfgNode

Named = Iterator[tuple[str, tuple[int, ...]]]
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def weight_and_bias(name: str, *shape: int) -> Named:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def norm(name: str, channels: int, group: bool) -> Named:
    """Group norm has two parameters; a frozen batch norm four buffers."""
    for field in ("weight", "bias") if group else ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{field}", (channels,)


def maybe_normed(name: str, group: bool, *shape: int) -> Named:
    """With group norm `0` without a bias and `1`; else the layer itself."""
    if group:
        yield f"{name}.0.weight", shape
        yield from norm(f"{name}.1", shape[0], True)
    else:
        yield from weight_and_bias(name, *shape)


def stage(cfg: CfgNode, prefix: str, number: int, deformable: bool) -> Named:
    keys = cfg.MODEL.RESNETS
    depth, group = int(cfg.MODEL.BACKBONE.CONV_BODY.split("-")[1]), keys.NORM == "GN"
    wide, narrow = (
        keys.RES2_OUT_CHANNELS * 2 ** (number - 1),
        keys.NUM_GROUPS * keys.WIDTH_PER_GROUP * 2 ** (number - 1),
    )
    for block in range(BLOCKS[depth][number - 1]):
        here = f"{prefix}layer{number}.{block}."
        before = wide if block else (keys.STEM_OUT_CHANNELS if number == 1 else wide // 2)
        if not block:
            yield f"{here}downsample.0.weight", (wide, before, 1, 1)
            yield from norm(f"{here}downsample.1", wide, group)
        yield f"{here}conv1.weight", (narrow, before, 1, 1)
        yield from norm(f"{here}bn1", narrow, group)
        second = (narrow, narrow // keys.NUM_GROUPS, 3, 3)
        if deformable:
            planes = keys.DEFORMABLE_GROUPS * (27 if keys.WITH_MODULATED_DCN else 18)
            yield from weight_and_bias(f"{here}conv2.offset", planes, narrow, 3, 3)
            yield f"{here}conv2.conv.weight", second
        else:
            yield f"{here}conv2.weight", second
        yield from norm(f"{here}bn2", narrow, group)
        yield f"{here}conv3.weight", (wide, narrow, 1, 1)
        yield from norm(f"{here}bn3", wide, group)


def backbone(cfg: CfgNode) -> Named:
    keys, body = cfg.MODEL.RESNETS, cfg.MODEL.BACKBONE.CONV_BODY
    yield "backbone.body.stem.conv1.weight", (keys.STEM_OUT_CHANNELS, 3, 7, 7)
    yield from norm("backbone.body.stem.bn1", keys.STEM_OUT_CHANNELS, keys.NORM == "GN")
    for number in (1, 2, 3) if body.endswith("C4") else (1, 2, 3, 4):
        yield from stage(cfg, "backbone.body.", number, keys.STAGE_WITH_DCN[number - 1])
    if body.endswith("C4"):
        return
    channels, retinanet = keys.BACKBONE_OUT_CHANNELS, body.endswith("RETINANET")
    for level in (2, 3, 4) if retinanet else (1, 2, 3, 4):
        wide = keys.RES2_OUT_CHANNELS * 2 ** (level - 1)
        yield from maybe_normed(f"backbone.fpn.fpn_inner{level}", cfg.MODEL.FPN.USE_GN, channels, wide, 1, 1)
        yield from maybe_normed(f"backbone.fpn.fpn_layer{level}", cfg.MODEL.FPN.USE_GN, channels, channels, 3, 3)
    if retinanet:
        source = 8 * keys.RES2_OUT_CHANNELS if cfg.MODEL.RETINANET.USE_C5 else channels
        yield from weight_and_bias("backbone.fpn.top_blocks.p6", channels, source, 3, 3)
        yield from weight_and_bias("backbone.fpn.top_blocks.p7", channels, channels, 3, 3)


def rpn(cfg: CfgNode) -> Named:
    keys, channels = cfg.MODEL.RPN, cfg.MODEL.RESNETS.BACKBONE_OUT_CHANNELS
    anchors = len(keys.ASPECT_RATIOS) * (1 if keys.USE_FPN else len(keys.ANCHOR_SIZES))
    yield from weight_and_bias("rpn.head.conv", channels, channels, 3, 3)
    yield from weight_and_bias("rpn.head.cls_logits", anchors, channels, 1, 1)
    yield from weight_and_bias("rpn.head.bbox_pred", 4 * anchors, channels, 1, 1)


def retinanet(cfg: CfgNode) -> Named:
    channels, classes = cfg.MODEL.RESNETS.BACKBONE_OUT_CHANNELS, cfg.MODEL.RETINANET.NUM_CLASSES - 1
    for tower, last, planes in (("cls_tower", "cls_logits", 9 * classes), ("bbox_tower", "bbox_pred", 36)):
        for layer in (0, 2, 4, 6):
            yield from weight_and_bias(f"rpn.head.{tower}.{layer}", channels, channels, 3, 3)
        yield from weight_and_bias(f"rpn.head.{last}", planes, channels, 3, 3)


def box_head(cfg: CfgNode) -> Named:
    keys, channels, here = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.RESNETS.BACKBONE_OUT_CHANNELS, "roi_heads.box."
    hidden, cells = keys.MLP_HEAD_DIM, keys.POOLER_RESOLUTION**2
    if keys.FEATURE_EXTRACTOR == "ResNet50Conv5ROIFeatureExtractor":
        hidden = 8 * cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
        yield from stage(cfg, f"{here}feature_extractor.head.", 4, False)
    elif keys.FEATURE_EXTRACTOR == "FPNXconv1fcFeatureExtractor":
        for number in range(keys.NUM_STACKED_CONVS):
            first, norm_after = 3 * number, f"{here}feature_extractor.xconvs.{3 * number + 1}"
            before = keys.CONV_HEAD_DIM if number else channels
            yield f"{here}feature_extractor.xconvs.{first}.weight", (keys.CONV_HEAD_DIM, before, 3, 3)
            yield from norm(norm_after, keys.CONV_HEAD_DIM, True)
        yield from weight_and_bias(f"{here}feature_extractor.fc6", hidden, keys.CONV_HEAD_DIM * cells)
    else:
        yield from maybe_normed(f"{here}feature_extractor.fc6", keys.USE_GN, hidden, channels * cells)
        yield from maybe_normed(f"{here}feature_extractor.fc7", keys.USE_GN, hidden, hidden)
    yield from weight_and_bias(f"{here}predictor.cls_score", keys.NUM_CLASSES, hidden)
    yield from weight_and_bias(f"{here}predictor.bbox_pred", 4 * keys.NUM_CLASSES, hidden)


def mask_head(cfg: CfgNode) -> Named:
    keys, before, here = cfg.MODEL.ROI_MASK_HEAD, cfg.MODEL.RESNETS.BACKBONE_OUT_CHANNELS, "roi_heads.mask."
    if keys.SHARE_BOX_FEATURE_EXTRACTOR:
        yield from stage(cfg, f"{here}feature_extractor.head.", 4, False)
        before = 8 * cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
    else:
        for number, channels in enumerate(keys.CONV_LAYERS, start=1):
            yield from maybe_normed(f"{here}feature_extractor.mask_fcn{number}", keys.USE_GN, channels, before, 3, 3)
            before = channels
    hidden = keys.CONV_LAYERS[-1]
    yield f"{here}predictor.conv5_mask.weight", (before, hidden, 2, 2)
    yield f"{here}predictor.conv5_mask.bias", (hidden,)
    yield from weight_and_bias(f"{here}predictor.mask_fcn_logits", cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES, hidden, 1, 1)


def keypoint_head(cfg: CfgNode) -> Named:
    keys, before, here = cfg.MODEL.ROI_KEYPOINT_HEAD, cfg.MODEL.RESNETS.BACKBONE_OUT_CHANNELS, "roi_heads.keypoint."
    for number, channels in enumerate(keys.CONV_LAYERS, start=1):
        yield from weight_and_bias(f"{here}feature_extractor.conv_fcn{number}", channels, before, 3, 3)
        before = channels
    yield f"{here}predictor.kps_score_lowres.weight", (before, keys.NUM_CLASSES, 4, 4)
    yield f"{here}predictor.kps_score_lowres.bias", (keys.NUM_CLASSES,)


def state_of(cfg: CfgNode) -> dict[str, tuple[int, ...]]:
    """Of upstream's model for this configuration, without what follows from it (anchors)."""
    model = cfg.MODEL
    parts = [backbone(cfg), retinanet(cfg) if model.RETINANET_ON else rpn(cfg)]
    if not model.RPN_ONLY:
        parts.append(box_head(cfg))
    parts += [mask_head(cfg)] if model.MASK_ON else []
    parts += [keypoint_head(cfg)] if model.KEYPOINT_ON else []
    return {name: tuple(shape) for part in parts for name, shape in part}
