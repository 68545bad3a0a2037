"""Names that upstream maskrcnn-benchmark yamls and their MLPerf and Ascend forks use -> our keys."""

from __future__ import annotations

import logging
from typing import Any

from yacs.config import CfgNode

from ..errors import ConfigError
from .checks import get
from .defaults import get_defaults

logger = logging.getLogger(__name__)

RENAMED = {
    "MODEL.BACKBONE.OUT_CHANNELS": "MODEL.RESNETS.BACKBONE_OUT_CHANNELS",
    "SAVE_CHECKPOINT": "SAVE_CHECKPOINTS",
    "SOLVER.TEST_PERIOD": "SOLVER.EVAL_PERIOD",
    "INPUT.FLIP_PROB_TRAIN": "INPUT.HORIZONTAL_FLIP_PROB_TRAIN",
}

NORMS = {"FixedBatchNorm": "FrozenBN", "BatchNorm": "BN", "SyncBatchNorm": "SyncBN", "GN": "GN"}

# Upstream's keys whose work is done elsewhere here.
WITHOUT_EFFECT = {
    "PATHS_CATALOG": "data sets are named in data/catalog.py and found under DATA.PATH",
    "MODEL.ROI_MASK_HEAD.MLP_HEAD_DIM": "the mask head is convolutional",
    "MODEL.ROI_KEYPOINT_HEAD.MLP_HEAD_DIM": "the keypoint head is convolutional",
    "AMP_VERBOSE": "mixed precision is torch.autocast, which has nothing to tell",
}

# Keys in which projects differ without saying so: weights trained by one need its values (configs/conventions/*.yaml).
CONVENTIONS = (
    "MODEL.LEGACY_PLUS_ONE",
    "MODEL.RESNETS.FROZEN_BN_EPS",
    *(f"MODEL.RPN.{key}" for key in ("ANCHOR_ROUNDING", "ANCHOR_OFFSET", "ANCHOR_GRID", "RANK_BY")),
    *(f"MODEL.RPN.{key}" for key in ("SMOOTH_L1_BETA", "LOSS_NORMALIZER")),
    *("MODEL.ROI_BOX_HEAD.POOLER_ALIGNED", "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA"),
    *(f"MODEL.ROI_MASK_HEAD.{key}" for key in ("POOLER_ALIGNED", "SOFT_BITMAP_TARGETS", "PASTE_WHOLE_PIXELS")),
    *("MODEL.ROI_KEYPOINT_HEAD.POOLER_ALIGNED", "MODEL.ROI_KEYPOINT_HEAD.POSITIVES"),
    *(f"MODEL.RETINANET.{key}" for key in ("BACKGROUND_CHANNEL", "WHOLE_ANCHOR_SIZES", "BOX_CODER_WEIGHTS")),
    *(f"MODEL.RETINANET.{key}" for key in ("LOSS_NORMALIZER", "CLIP_BEFORE_NMS")),
    *("INPUT.RESIZE_ROUNDING", "INPUT.RESIZE_BY", "DATALOADER.EMPTY_IMAGE_RATIO"),
)


# Upstream's values of them, which its published weights need: what configs/conventions/maskrcnn_benchmark.yaml holds.
UPSTREAM = {
    "MODEL.LEGACY_PLUS_ONE": True,
    "MODEL.RESNETS.FROZEN_BN_EPS": 0.0,
    "MODEL.RPN.ANCHOR_ROUNDING": "stride",
    "MODEL.RPN.ANCHOR_OFFSET": 0.5,
    "MODEL.RPN.ANCHOR_GRID": "grid",
    "MODEL.RPN.RANK_BY": "probability",
    "MODEL.RPN.SMOOTH_L1_BETA": 1 / 9,
    "MODEL.RPN.LOSS_NORMALIZER": "sampled",
    "MODEL.ROI_BOX_HEAD.POOLER_ALIGNED": False,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 1.0,
    "MODEL.ROI_MASK_HEAD.POOLER_ALIGNED": False,
    "MODEL.ROI_MASK_HEAD.SOFT_BITMAP_TARGETS": False,
    "MODEL.ROI_MASK_HEAD.PASTE_WHOLE_PIXELS": True,
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_ALIGNED": False,
    "MODEL.ROI_KEYPOINT_HEAD.POSITIVES": "object",
    "MODEL.RETINANET.BACKGROUND_CHANNEL": False,
    "MODEL.RETINANET.WHOLE_ANCHOR_SIZES": False,
    "MODEL.RETINANET.BOX_CODER_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
    "MODEL.RETINANET.LOSS_NORMALIZER": "batch",
    "MODEL.RETINANET.CLIP_BEFORE_NMS": True,
    "INPUT.RESIZE_ROUNDING": "down",
    "INPUT.RESIZE_BY": "pillow",
    "DATALOADER.EMPTY_IMAGE_RATIO": 0.0,
}


def is_upstreams(values: dict[str, Any]) -> bool:
    """Whether a file of flat `values`, without `_BASE_`, is upstream's: each of its yamls names
    MODEL.META_ARCHITECTURE, which ours need not, and none a convention."""
    return "MODEL.META_ARCHITECTURE" in values and not values.keys() & set(CONVENTIONS)


def describe_conventions(cfg: CfgNode) -> str:
    """For the log: which of the keys of CONVENTIONS are not at their defaults."""
    defaults = get_defaults()
    unlike = [f"{key} {get(cfg, key)}" for key in CONVENTIONS if get(cfg, key) != get(defaults, key)]
    if not unlike:
        return "conventions: the defaults; weights that another project trained need its own (docs/conventions.md)"
    return f"conventions unlike the defaults: {', '.join(unlike)} (docs/conventions.md)"


# Upstream's keys that name one of several parts, of which there is one here.
ONE_VALUE = {"MODEL.RPN.RPN_HEAD": "SingleConvRPNHead"}

FBNET = "FBNet is left out here; upstream maskrcnn-benchmark has it"


def translate(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Flat `{dotted key: value}` with upstream's names replaced by ours; what we have no name for passes through."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key.startswith("MODEL.FBNET.") or str(value).startswith("FBNet"):
            raise ConfigError(f"{source}: {key} is {value!r}: {FBNET}")
        if key in ONE_VALUE and value != ONE_VALUE[key]:
            raise ConfigError(f"{source}: {key} is {value!r}; known is {ONE_VALUE[key]}")
        if key in ONE_VALUE:
            continue
        if key in WITHOUT_EFFECT:
            logger.warning("%s: %s has no effect: %s", source, key, WITHOUT_EFFECT[key])
        elif key in ("MODEL.RESNETS.TRANS_FUNC", "MODEL.RESNETS.STEM_FUNC"):
            result["MODEL.RESNETS.NORM"] = _norm(key, value, source)
        elif key == "INPUT.MIN_SIZE_TRAIN" and isinstance(value, int):
            result[key] = (value,)  # before it could be several
        else:
            result[RENAMED.get(key, key)] = value
    return result


def _norm(key: str, value: str, source: str) -> str:
    name = str(value).split("With")[-1]
    if name not in NORMS:
        known = ", ".join(f"...With{n}" for n in NORMS)
        raise ConfigError(f"{source}: {key} is {value!r}; known are {known}")
    return NORMS[name]
