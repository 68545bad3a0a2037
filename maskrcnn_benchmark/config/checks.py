"""Keys that must agree with each other, and values that must be one of a few. One line a rule."""

from __future__ import annotations

from yacs.config import CfgNode

from ..errors import ConfigError
from .conv_body import parse

NORMS = ("FrozenBN", "BN", "SyncBN", "GN")
BOX_LOSSES = ("SmoothL1Loss", "GIoULoss", "DIoULoss", "CIoULoss")
CHOICES = {
    "DTYPE": ("float32", "float16", "bfloat16"),
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN",),
    "MODEL.RESNETS.NORM": NORMS,
    **{f"MODEL.{part}.NORM": ("", *NORMS) for part in ("FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "RETINANET")},
    "MODEL.RPN.ANCHOR_ROUNDING": ("none", "corners", "stride"),
    "MODEL.RPN.ANCHOR_GRID": ("grid", "image"),
    "MODEL.RPN.LOSS_NORMALIZER": ("sampled", "batch"),
    "MODEL.RPN.CLS_LOSS": ("SigmoidCrossEntropy", "SigmoidFocalLoss"),
    "MODEL.ROI_HEADS.BBOX_ASSIGNER": ("BBoxAssigner", "LibraBBoxAssigner"),
    "MODEL.ROI_HEADS.NMS_TYPE": ("MultiClassNMS", "MultiClassSoftNMS", "MultiClassCiouNMS"),
    "MODEL.ROI_BOX_HEAD.BBOX_LOSS": BOX_LOSSES,
    "MODEL.RETINANET.BBOX_LOSS": BOX_LOSSES,
    "MODEL.ROI_BOX_CASCADE_HEAD.SCORE_AVERAGE": ("probabilities", "logits"),
    "MODEL.RPN.RANK_BY": ("logit", "probability"),
    "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR": (
        "ResNet50Conv5ROIFeatureExtractor",
        "FPN2MLPFeatureExtractor",
        "FPNXconv1fcFeatureExtractor",
    ),
    "MODEL.ROI_BOX_HEAD.PREDICTOR": ("FastRCNNPredictor", "FPNPredictor"),
    "MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR": ("ResNet50Conv5ROIFeatureExtractor", "MaskRCNNFPNFeatureExtractor"),
    "MODEL.ROI_MASK_HEAD.PREDICTOR": ("MaskRCNNC4Predictor",),
    "MODEL.ROI_KEYPOINT_HEAD.FEATURE_EXTRACTOR": ("KeypointRCNNFeatureExtractor",),
    "MODEL.ROI_KEYPOINT_HEAD.PREDICTOR": ("KeypointRCNNPredictor",),
    "MODEL.ROI_KEYPOINT_HEAD.POSITIVES": ("object", "proposal", "all"),
    "MODEL.RETINANET.LOSS_NORMALIZER": ("batch", "image", "positives", "moving_average"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RESIZE_ROUNDING": ("nearest", "down"),
    "INPUT.RESIZE_BY": ("opencv", "pillow"),
    "SOLVER.OPTIMIZER": ("SGD", "AdamW", "ApexFusedSGD"),
    "SOLVER.LR_SCHEDULER": ("multistep", "cosine"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant", "mlperf_linear"),
    "MLPERF.DIVISION": ("open", "closed"),
    "MLPERF.STATUS": ("onprem", "cloud", "preview", "research"),
    "TEST.EVALUATOR": ("hotcoco", "pycocotools"),
    "TEST.OVERLAP": ("auto", "always", "never"),
}

POSITIVE = (
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.ACCUMULATE_STEPS",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.IMS_PER_BATCH",
    "LOGGING.PERIOD",
    "DISTRIBUTED.TIMEOUT",
    "DISTRIBUTED.BUCKET_MB",
    "INPUT.MAX_SIZE_TRAIN",
    "INPUT.MIN_SIZE_TEST",
    "INPUT.MAX_SIZE_TEST",
    "TEST.BBOX_AUG.MAX_SIZE",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
    "MODEL.RPN.NUM_CONVS",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
    "MODEL.ROI_HEADS.DETECTIONS_PER_IMG",
    "MODEL.RETINANET.SCALES_PER_OCTAVE",
    "MODEL.RETINANET.PRE_NMS_TOP_N",
    "MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES",
    "TEST.DETECTIONS_PER_IMG",
    "MODEL.RESNETS.DEFORMABLE_GROUPS",
    "MODEL.ROI_BOX_HEAD.NUM_STACKED_CONVS",
    "MODEL.ROI_BOX_HEAD.DILATION",
    "MODEL.ROI_MASK_HEAD.DILATION",
)

NOT_NEGATIVE = (
    "DATALOADER.NUM_WORKERS",
    "DATALOADER.SIZE_DIVISIBILITY",
    "SOLVER.BASE_LR",
    "SOLVER.MAX_ITER",
    "SOLVER.MAX_EPOCHS",
    "SOLVER.REFERENCE_IMS_PER_BATCH",
    "SOLVER.MOMENTUM",
    "SOLVER.WEIGHT_DECAY",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.EVAL_PERIOD",
    "SOLVER.CHECKPOINTS_KEPT",
    "SOLVER.SAVE_EPOCHS",
    "SOLVER.EARLY_STOP_PATIENCE",
    "SOLVER.SKIP_NONFINITE_STEPS",
    "LOGGING.WARMUP_STEPS",
    "MODEL.RETINANET.NUM_CONVS",
    "MODEL.RETINANET.BBOX_REG_BETA",
    "MODEL.RETINANET.LOSS_GAMMA",
)

# Lists: the type of an element, the least length, and whether elements must be above 0.
NUMBER = (int, float)
LISTS = {
    "DATASETS.TRAIN": (str, 0, False),
    "DATASETS.TEST": (str, 0, False),
    "INPUT.MIN_SIZE_TRAIN": (int, 1, True),
    "INPUT.PIXEL_MEAN": (NUMBER, 1, False),
    "INPUT.PIXEL_STD": (NUMBER, 1, True),
    "INPUT.FIXED_SHAPES": ((tuple, list), 0, False),
    "INPUT.TRANSFORMS": (dict, 0, False),
    "MODEL.RPN.ANCHOR_SIZES": (NUMBER, 1, True),
    "MODEL.RPN.ANCHOR_STRIDE": (int, 1, True),
    "MODEL.RPN.ASPECT_RATIOS": (NUMBER, 1, True),
    "MODEL.ROI_HEADS.BBOX_REG_WEIGHTS": (NUMBER, 4, True),
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": (NUMBER, 1, True),
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": ((tuple, list), 1, False),
    "MODEL.ROI_BOX_CASCADE_HEAD.LOSS_WEIGHTS": (NUMBER, 1, False),
    "MODEL.AUG_FPN.RATIOS": (NUMBER, 1, True),
    "MODEL.ROI_BOX_HEAD.POOLER_SCALES": (NUMBER, 1, True),
    "MODEL.ROI_MASK_HEAD.POOLER_SCALES": (NUMBER, 1, True),
    "MODEL.ROI_MASK_HEAD.CONV_LAYERS": (int, 1, True),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SCALES": (NUMBER, 1, True),
    "MODEL.ROI_KEYPOINT_HEAD.CONV_LAYERS": (int, 1, True),
    "MODEL.RETINANET.ANCHOR_SIZES": (NUMBER, 5, True),
    "MODEL.RETINANET.ANCHOR_STRIDES": (int, 5, True),
    "MODEL.RETINANET.ASPECT_RATIOS": (NUMBER, 1, True),
    "MODEL.RETINANET.BOX_CODER_WEIGHTS": (NUMBER, 4, True),
    "MODEL.RESNETS.STAGE_WITH_DCN": (bool, 4, False),
    "SOLVER.STEPS": (int, 0, False),
    "TEST.BBOX_AUG.SCALES": (int, 0, True),
    "TEST.BBOX_AUG.KEYPOINT_MIRROR": (int, 0, False),
    "TEST.METRICS": (str, 0, False),
    "TEST.KEYPOINT_SIGMAS": (NUMBER, 0, True),
    "TEST.EXPECTED_RESULTS": ((tuple, list), 0, False),
}

NOT_BUILT = ("MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS",)


def get(cfg: CfgNode, key: str):
    """The value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def check(cfg: CfgNode) -> None:
    """Raises ConfigError at the first rule that does not hold."""
    for key, choices in CHOICES.items():
        if get(cfg, key) not in choices:
            raise ConfigError(f"{key} is {get(cfg, key)!r}; known are {', '.join(choices)}")
    for key in POSITIVE:
        if get(cfg, key) < 1:
            raise ConfigError(f"{key} is {get(cfg, key)}; it must be at least 1")
    for key in NOT_NEGATIVE:
        _require(get(cfg, key) >= 0, f"{key} is {get(cfg, key)}; it must not be negative")
    for key, (kind, length, positive) in LISTS.items():
        _check_list(key, get(cfg, key), kind, length, positive)
    for key in NOT_BUILT:
        _require(not get(cfg, key), f"{key} is True, which this version does not build; set it to False")
    _check_input(cfg)
    _check_model(cfg)
    _check_cascade(cfg)
    _check_options(cfg)
    _check_solver(cfg)
    _check_expected(cfg)
    _check_metrics(cfg)
    if cfg.MODEL.RPN_ONLY and not cfg.MODEL.RETINANET_ON:
        _check_rpn_only(cfg)


def _check_rpn_only(cfg: CfgNode) -> None:
    for key in ("MODEL.CASCADE_ON", "MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "TEST.BBOX_AUG.ENABLED"):
        _require(not get(cfg, key), f"{key} and MODEL.RPN_ONLY are both True; the RPN gives one view's boxes alone")
    _require(
        tuple(cfg.TEST.METRICS) == ("coco",),
        f"TEST.METRICS is {tuple(cfg.TEST.METRICS)}, but of proposals (MODEL.RPN_ONLY) only average recall is known",
    )
    for key in ("MLPERF.MIN_BBOX_MAP", "MLPERF.MIN_SEGM_MAP"):
        _require(not get(cfg, key), f"{key} is {get(cfg, key)}, but proposals (MODEL.RPN_ONLY) have no AP")


def _check_list(key: str, values: list | tuple, kind: type | tuple[type, ...], length: int, positive: bool) -> None:
    _require(len(values) >= length, f"{key} is {values}; it needs at least {length} elements")
    for value in values:
        right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        _require(right, f"{key} is {values}; its element {value!r} is a {type(value).__name__}")
        _require(not positive or value > 0, f"{key} is {values}; its elements must be above 0")


def _check_input(cfg: CfgNode) -> None:
    means, stds = len(cfg.INPUT.PIXEL_MEAN), len(cfg.INPUT.PIXEL_STD)
    _require(means == stds, f"INPUT.PIXEL_MEAN has {means} and PIXEL_STD {stds} numbers; both need one a channel")
    for shape in cfg.INPUT.FIXED_SHAPES:
        _check_list("INPUT.FIXED_SHAPES", shape, int, 2, True)


def _check_expected(cfg: CfgNode) -> None:
    """Known before training what can be judged after it."""
    for entry in cfg.TEST.EXPECTED_RESULTS:
        task, metric, *numbers = [*entry, None, None]
        numbers = [n for n in numbers if n is not None]
        numbers = numbers[0] if len(numbers) == 1 and isinstance(numbers[0], (tuple, list)) else numbers
        _require(
            task in ("bbox", "segm", "keypoints", "box_proposal") and isinstance(metric, str) and len(numbers) == 2,
            f'TEST.EXPECTED_RESULTS: {entry!r} must be ["bbox", "segm", "keypoints" or "box_proposal", metric, '
            "[mean, sigma]]",
        )
        switch = {"segm": "MODEL.MASK_ON", "keypoints": "MODEL.KEYPOINT_ON"}.get(task)
        _require(switch is None or get(cfg, switch), f"TEST.EXPECTED_RESULTS judges {task}, but {switch} is False")
    _require(
        not cfg.TEST.EXPECTED_RESULTS or len(cfg.DATASETS.TEST) > 0,
        "TEST.EXPECTED_RESULTS is set, but DATASETS.TEST is empty: nothing would be judged",
    )


def _check_metrics(cfg: CfgNode) -> None:
    """Known before training what can be computed after it."""
    known = ("coco", "voc07", "voc", "cityscapes")
    for name in cfg.TEST.METRICS:
        _require(name in known, f"TEST.METRICS: {name!r} is not known; known are {', '.join(known)}")
        _require(name != "cityscapes" or cfg.MODEL.MASK_ON, "TEST.METRICS: cityscapes judges masks; set MODEL.MASK_ON")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _check_model(cfg: CfgNode) -> None:
    model, rpn = cfg.MODEL, cfg.MODEL.RPN
    body = model.BACKBONE.CONV_BODY
    fpn = parse(body).neck.startswith("FPN")
    _require(0 <= model.BACKBONE.FREEZE_CONV_BODY_AT <= 5, "MODEL.BACKBONE.FREEZE_CONV_BODY_AT must be 0..5")
    _require(
        body.endswith("RETINANET") == model.RETINANET_ON,
        f"MODEL.RETINANET_ON is {model.RETINANET_ON}, but MODEL.BACKBONE.CONV_BODY is {body}: "
        "bodies that end in -FPN-RETINANET are RetinaNet's, and it needs one",
    )
    _require(
        not (parse(body).width and any(model.RESNETS.STAGE_WITH_DCN)),
        f"MODEL.RESNETS.STAGE_WITH_DCN is {tuple(model.RESNETS.STAGE_WITH_DCN)}, but {body} has no deformable stages",
    )
    if model.RETINANET_ON:
        _check_retinanet(cfg)
        return
    _require(fpn == rpn.USE_FPN, f"MODEL.RPN.USE_FPN is {rpn.USE_FPN}, but MODEL.BACKBONE.CONV_BODY is {body}")
    levels = 5 if fpn else 1
    _require(
        len(rpn.ANCHOR_STRIDE) == levels,
        f"MODEL.RPN.ANCHOR_STRIDE has {len(rpn.ANCHOR_STRIDE)} strides, but {body} has {levels} levels",
    )
    _require(
        not fpn or len(rpn.ANCHOR_SIZES) == levels,
        f"MODEL.RPN.ANCHOR_SIZES has {len(rpn.ANCHOR_SIZES)} sizes; with FPN it needs one for each of {levels} levels",
    )
    if fpn:
        _check_divisibility(cfg)
    _require(rpn.BG_IOU_THRESHOLD <= rpn.FG_IOU_THRESHOLD, "MODEL.RPN.BG_IOU_THRESHOLD is above FG_IOU_THRESHOLD")
    if not model.RPN_ONLY:
        _check_roi_heads(cfg)


def _check_roi_heads(cfg: CfgNode) -> None:
    model, body = cfg.MODEL, cfg.MODEL.BACKBONE.CONV_BODY
    neck, heads, strides = parse(body).neck, model.ROI_HEADS, model.RPN.ANCHOR_STRIDE
    fpn = neck == "FPN"
    _require(
        fpn == heads.USE_FPN, f"MODEL.ROI_HEADS.USE_FPN is {heads.USE_FPN}, but MODEL.BACKBONE.CONV_BODY is {body}"
    )
    scales = tuple(1 / stride for stride in (strides[:4] if fpn else strides))
    if model.KEYPOINT_ON:
        _check_keypoint_head(cfg, scales)
    for name in ("ROI_BOX_HEAD", "ROI_MASK_HEAD") if model.MASK_ON else ("ROI_BOX_HEAD",):
        head, key = model[name], f"MODEL.{name}"
        _require(
            tuple(head.POOLER_SCALES) == scales,
            f"{key}.POOLER_SCALES is {tuple(head.POOLER_SCALES)}, but the strides of {body} make it {scales}",
        )
        res5 = head.FEATURE_EXTRACTOR == "ResNet50Conv5ROIFeatureExtractor"
        _require(
            res5 == (neck == "C4"), f"{key}.FEATURE_EXTRACTOR is {head.FEATURE_EXTRACTOR}; it does not go with {body}"
        )
    if model.MASK_ON:
        _check_mask_head(cfg, neck != "C4")
    _require(
        heads.BG_IOU_THRESHOLD <= heads.FG_IOU_THRESHOLD, "MODEL.ROI_HEADS.BG_IOU_THRESHOLD is above FG_IOU_THRESHOLD"
    )


def _check_divisibility(cfg: CfgNode) -> None:
    _require(
        cfg.DATALOADER.SIZE_DIVISIBILITY % 32 == 0 and cfg.DATALOADER.SIZE_DIVISIBILITY > 0,
        f"DATALOADER.SIZE_DIVISIBILITY is {cfg.DATALOADER.SIZE_DIVISIBILITY}; FPN needs a multiple of 32",
    )


def _check_retinanet(cfg: CfgNode) -> None:
    keys = cfg.MODEL.RETINANET
    for key in ("MODEL.MASK_ON", "MODEL.KEYPOINT_ON"):
        _require(not get(cfg, key), f"{key} and MODEL.RETINANET_ON are both True; RetinaNet detects boxes alone")
    for key in ("ANCHOR_SIZES", "ANCHOR_STRIDES"):
        _require(len(keys[key]) == 5, f"MODEL.RETINANET.{key} has {len(keys[key])} numbers; the levels P3 to P7 need 5")
    _require(keys.NUM_CLASSES >= 2, f"MODEL.RETINANET.NUM_CLASSES is {keys.NUM_CLASSES}; with the background it is 2")
    _require(
        keys.BG_IOU_THRESHOLD <= keys.FG_IOU_THRESHOLD, "MODEL.RETINANET.BG_IOU_THRESHOLD is above FG_IOU_THRESHOLD"
    )
    _require(0 < keys.PRIOR_PROB < 1, f"MODEL.RETINANET.PRIOR_PROB is {keys.PRIOR_PROB}; it must be between 0 and 1")
    _require(keys.BBOX_REG_WEIGHT > 0, f"MODEL.RETINANET.BBOX_REG_WEIGHT is {keys.BBOX_REG_WEIGHT}; it divides")
    _check_divisibility(cfg)


def _check_keypoint_head(cfg: CfgNode, scales: tuple[float, ...]) -> None:
    head, key = cfg.MODEL.ROI_KEYPOINT_HEAD, "MODEL.ROI_KEYPOINT_HEAD"
    _require(
        not head.SHARE_BOX_FEATURE_EXTRACTOR,
        f"{key}.SHARE_BOX_FEATURE_EXTRACTOR is True; the keypoint head has features of its own: set it to False",
    )
    _require(
        tuple(head.POOLER_SCALES) == scales,
        f"{key}.POOLER_SCALES is {tuple(head.POOLER_SCALES)}, but the strides of {cfg.MODEL.BACKBONE.CONV_BODY} make "
        f"it {scales}",
    )
    _require(
        head.RESOLUTION == 4 * head.POOLER_RESOLUTION,
        f"{key}.RESOLUTION is {head.RESOLUTION}, but POOLER_RESOLUTION {head.POOLER_RESOLUTION} makes it "
        f"{4 * head.POOLER_RESOLUTION}",
    )
    _require(
        len(cfg.TEST.KEYPOINT_SIGMAS) in (0, head.NUM_CLASSES),
        f"TEST.KEYPOINT_SIGMAS has {len(cfg.TEST.KEYPOINT_SIGMAS)} numbers for {head.NUM_CLASSES} keypoints "
        f"({key}.NUM_CLASSES)",
    )
    mirror = tuple(cfg.TEST.BBOX_AUG.KEYPOINT_MIRROR)
    _require(
        not cfg.TEST.BBOX_AUG.ENABLED or sorted(mirror) == list(range(head.NUM_CLASSES)),
        f"TEST.BBOX_AUG.KEYPOINT_MIRROR is {mirror}; with {head.NUM_CLASSES} keypoints ({key}.NUM_CLASSES) it needs "
        f"each of 0 to {head.NUM_CLASSES - 1} once",
    )


def _check_mask_head(cfg: CfgNode, convolutions: bool) -> None:
    """convolutions: the head has its own; with C4 it reads the box head's features."""
    head = cfg.MODEL.ROI_MASK_HEAD
    _require(
        convolutions != head.SHARE_BOX_FEATURE_EXTRACTOR,
        f"MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR is {head.SHARE_BOX_FEATURE_EXTRACTOR}; it must be "
        f"{not convolutions} with {cfg.MODEL.BACKBONE.CONV_BODY}",
    )
    resolution = head.POOLER_RESOLUTION * 2 if convolutions else head.POOLER_RESOLUTION
    _require(
        resolution == head.RESOLUTION,
        f"MODEL.ROI_MASK_HEAD.RESOLUTION is {head.RESOLUTION}, but POOLER_RESOLUTION {head.POOLER_RESOLUTION} makes "
        f"it {resolution}",
    )


def _check_cascade(cfg: CfgNode) -> None:
    key, cascade = "MODEL.ROI_BOX_CASCADE_HEAD", cfg.MODEL.ROI_BOX_CASCADE_HEAD
    for weights in cascade.BBOX_REG_WEIGHTS:
        _check_list(f"{key}.BBOX_REG_WEIGHTS", weights, NUMBER, 4, True)
    for name in ("BBOX_REG_WEIGHTS", "LOSS_WEIGHTS"):
        _require(
            len(cascade[name]) == len(cascade.IOUS),
            f"{key}.{name} has {len(cascade[name])} stages, but IOUS has {len(cascade.IOUS)}",
        )
    _require(
        parse(cfg.MODEL.BACKBONE.CONV_BODY).neck == "FPN" or not cfg.MODEL.CASCADE_ON,
        f"MODEL.CASCADE_ON needs a body with FPN, not {cfg.MODEL.BACKBONE.CONV_BODY}",
    )
    _require(
        cfg.MODEL.CASCADE_ON or not cfg.MODEL.ROI_MASK_HEAD.PER_STAGE,
        "MODEL.ROI_MASK_HEAD.PER_STAGE is True, but MODEL.CASCADE_ON is False: there is one stage",
    )


def _check_options(cfg: CfgNode) -> None:
    """Values that would do nothing, or harm."""
    body, aug = parse(cfg.MODEL.BACKBONE.CONV_BODY), cfg.MODEL.AUG_FPN
    no_heads = cfg.MODEL.RPN_ONLY or cfg.MODEL.RETINANET_ON
    for name in ("RESIDUAL_AUGMENTATION", "CONSISTENT_SUPERVISION", "SOFT_ROI_SELECTION"):
        fits = body.neck == "FPN" and (not body.width or name == "SOFT_ROI_SELECTION")
        _require(
            fits or not aug[name],
            f"MODEL.AUG_FPN.{name} is True, but {cfg.MODEL.BACKBONE.CONV_BODY} has no such pyramid; R-50-FPN has",
        )
        _require(
            not (no_heads and aug[name] and name != "RESIDUAL_AUGMENTATION"),
            f"MODEL.AUG_FPN.{name} is True, but there is no box head with RPN_ONLY or RETINANET_ON",
        )
    alpha, gamma = cfg.MODEL.RPN.FOCAL_LOSS_ALPHA, cfg.MODEL.RPN.FOCAL_LOSS_GAMMA
    _require(0 <= alpha <= 1 and gamma >= 0, f"MODEL.RPN.FOCAL_LOSS_ALPHA {alpha} must be 0..1, GAMMA {gamma} >= 0")
    for name in ("FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        _require(
            not (cfg.MODEL[name].USE_GN and cfg.MODEL[name].NORM not in ("", "GN")),
            f"MODEL.{name}.USE_GN is True, but MODEL.{name}.NORM is {cfg.MODEL[name].NORM}: set one of them",
        )
    sigma = cfg.MODEL.ROI_HEADS.SOFT_NMS_SIGMA
    _require(sigma > 0, f"MODEL.ROI_HEADS.SOFT_NMS_SIGMA is {sigma}; it must be above 0")


def _check_solver(cfg: CfgNode) -> None:
    solver, size = cfg.SOLVER, cfg.INPUT.MIN_SIZE_TRAIN
    _require(list(solver.STEPS) == sorted(solver.STEPS), f"SOLVER.STEPS {tuple(solver.STEPS)} must rise")
    _require(
        not solver.MAX_EPOCHS or solver.LR_SCHEDULER == "cosine" or max(solver.STEPS, default=0) <= solver.MAX_EPOCHS,
        f"SOLVER.STEPS {tuple(solver.STEPS)} count epochs with MAX_EPOCHS, and lie beyond its {solver.MAX_EPOCHS}",
    )
    _require(
        solver.MAX_ITER > 0 or solver.MAX_EPOCHS > 0,
        "SOLVER.MAX_ITER and SOLVER.MAX_EPOCHS are both 0: nothing to train",
    )
    _require(
        solver.IMS_PER_BATCH % solver.ACCUMULATE_STEPS == 0,
        f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is not divisible by ACCUMULATE_STEPS {solver.ACCUMULATE_STEPS}",
    )
    _require(
        not (solver.GRAPH_CAPTURE and solver.OPTIMIZER == "ApexFusedSGD"),
        "SOLVER.GRAPH_CAPTURE is True, but ApexFusedSGD takes its learning rate from the host, and a graph would keep"
        " it; use SGD: torch's own is fused",
    )
    evaluated = (solver.EVAL_PERIOD or solver.SAVE_EPOCHS or cfg.PER_EPOCH_EVAL) and cfg.DATASETS.TEST
    _require(
        not solver.EARLY_STOP_PATIENCE or bool(evaluated),
        f"SOLVER.EARLY_STOP_PATIENCE is {solver.EARLY_STOP_PATIENCE}, but nothing is evaluated while training: set "
        "DATASETS.TEST, and SOLVER.EVAL_PERIOD, SOLVER.SAVE_EPOCHS or PER_EPOCH_EVAL",
    )
    _require(len(size) > 0 and min(size) > 0, f"INPUT.MIN_SIZE_TRAIN is {tuple(size)}; it needs at least one size")
    _require(
        cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "choice" or (len(size) == 2 and size[0] <= size[1]),
        f"INPUT.MIN_SIZE_TRAIN_SAMPLING is range, so MIN_SIZE_TRAIN must be (least, most), not {tuple(size)}",
    )
