"""A weights file into a model."""

from __future__ import annotations

import logging
import re

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ..anchors import AnchorGenerator
from ..layers import FrozenBatchNorm2d
from ..rcnn import Detector
from ..retinanet import RetinaNet
from .catalog import resolve
from .changes import STEM, Conventions, State
from .convert import BODY, LAYOUTS, to_ours, without_derived
from .files import read

logger = logging.getLogger(__name__)

# Layers that have a part for each class or keypoint of the data. An RPN's cls_logits have one for each anchor, as has
# its bbox_pred, so that other anchors are refused nevertheless.
CLASS_LAYERS = re.compile(
    r"^(roi_heads\..*\.(cls_score|bbox_pred|mask_fcn_logits|kps_score_lowres)|rpn\.head\.cls_logits)\.(weight|bias)$"
)


def load_weights(model: nn.Module, path: str, allow_pickle: bool = False, replace_heads: bool = False) -> str:
    """Loads the file into the model and returns the name of its layout, one of LAYOUTS.

    A whole model's file must match name for name and shape for shape. A backbone's file must fill the whole body; the
    rest keeps its fresh weights. replace_heads: so do layers of another number of classes, whose names are logged.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to another model.
    """
    conversion = to_ours(read(resolve(path), allow_pickle), path, conventions_of(model))
    state, wanted = conversion.state, without_derived(model.state_dict())
    _warn_of_channels(model, conversion.layout, path)
    body_alone = all(key.startswith(BODY) for key in state)
    if body_alone:
        wanted = {key: tensor for key, tensor in wanted.items() if key.startswith(BODY)}
    if STEM in state and STEM in wanted:
        state[STEM] = inflate(state[STEM], wanted[STEM].shape[1])
    res5 = f"{BODY}layer4."
    if body_alone and not any(key.startswith(res5) for key in wanted):
        state = _move_res5_to_head(state, model, wanted, res5)
    if replace_heads:
        _drop_other_classes(state, wanted, path)
    check_match(state, wanted, path)
    model.load_state_dict(state, strict=False)
    logger.info("loaded %d tensors from %s (%s)", len(state), path, conversion.layout)
    return conversion.layout


def conventions_of(model: nn.Module) -> Conventions:
    """What loading into the model needs to know of it. The stem's channels stay as they are in the file."""
    ratios = next((part.ratios for part in model.modules() if isinstance(part, AnchorGenerator)), 3)
    eps = next((part.eps for part in model.modules() if isinstance(part, FrozenBatchNorm2d | nn.BatchNorm2d)), 1e-5)
    coder = {"retinanet_coder": model.coder_weights} if isinstance(model, RetinaNet) else {}
    return Conventions(ratios=ratios, norm_eps=eps, **coder)


def _warn_of_channels(model: nn.Module, layout: str, path: str) -> None:
    theirs = LAYOUTS[layout].bgr
    if isinstance(model, Detector) and theirs not in (None, model.normalize.bgr):
        logger.warning(
            "%s: %s's weights read %s, but INPUT.TO_BGR255 is %s: set it, PIXEL_MEAN and PIXEL_STD for these weights",
            *(path, layout, "BGR in 0..255" if theirs else "RGB in 0..1", model.normalize.bgr),
        )


def inflate(weight: Tensor, channels: int) -> Tensor:
    """A first convolution's weights [O, 3, k, k] for images of another number of channels: [O, channels, k, k].

    What the first three channels had they keep, further ones get their mean (where there are fewer than three, all do),
    and all is scaled by 3 / channels: an image whose channels are equal gets the response it had.
    """
    if weight.dim() != 4 or weight.shape[1] != 3 or channels == 3:  # another shape is refused by name when it is loaded
        return weight
    mean = weight.mean(1, keepdim=True)
    kept = weight if channels > 3 else weight[:, :0]
    return torch.cat([kept, *[mean] * (channels - kept.shape[1])], 1) * (3 / channels)


def _move_res5_to_head(state: State, model: nn.Module, wanted: State, res5: str) -> State:
    """With C4 the body ends at res4, and res5 starts the heads."""
    result = {key: tensor for key, tensor in state.items() if not key.startswith(res5)}
    for key, tensor in model.state_dict().items():
        if ".feature_extractor.head.layer4." in key:
            wanted[key] = tensor
            source = res5 + key.split(".layer4.")[1]
            if source in state:
                result[key] = state[source]
    return result


def _drop_other_classes(state: State, wanted: State, source: str) -> None:
    """Takes from both the layers a class whose shapes differ."""
    for key in [key for key in state if key in wanted and CLASS_LAYERS.search(key)]:
        if state[key].shape != wanted[key].shape:
            there, here = tuple(state.pop(key).shape), tuple(wanted.pop(key).shape)
            logger.warning("%s: dropped %s, which is %s there and %s here; it starts fresh", source, key, there, here)


def check_match(state: State, wanted: State, source: str) -> None:
    """Raises CheckpointError unless both have the same names and shapes."""
    missing, unknown = [k for k in wanted if k not in state], [k for k in state if k not in wanted]
    shapes = [k for k in state if k in wanted and state[k].shape != wanted[k].shape]
    if shapes:
        k = shapes[0]
        raise CheckpointError(
            f"{source} belongs to another model: {k} is {tuple(state[k].shape)} there and {tuple(wanted[k].shape)} "
            f"here ({len(shapes)} tensors differ); compare NUM_CLASSES, CONV_BODY and the head sizes"
        )
    if missing or unknown:
        parts = [
            f"{len(names)} {what}, e.g. {names[0]}"
            for names, what in ((missing, "missing"), (unknown, "unknown"))
            if names
        ]
        raise CheckpointError(f"{source} belongs to another model: tensors {'; '.join(parts)}")
