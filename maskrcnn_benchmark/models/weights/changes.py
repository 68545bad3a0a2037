"""What moving weights between projects needs besides names: changes of the tensors, each in both directions.

Every function changes a state dict under our names in place. `read` makes the peer's tensors ours, `write` ours the
peer's. What a peer has not (the background's rows of boxes and masks, which are never used) is zero after reading.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..rcnn import swap_red_and_blue
from .rules import Facts

State = dict[str, Tensor]


@dataclass(frozen=True)
class Conventions:
    """What our model's weights mean where that is not in their shapes.

    ratios: aspect ratios of the anchors; 3 in every published model.
    retinanet_coder: RetinaNet's weights of dx, dy, dw, dh; 1 in every peer but maskrcnn-benchmark.
    norm_eps: what frozen batch norms add to the variance; needed to fold them for Detectron.
    bgr: whether the model reads BGR; None leaves the stem's channels as they are.
    """

    ratios: int = 3
    retinanet_coder: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    norm_eps: float = 1e-5
    bgr: bool | None = None


Step = Callable[[State, Conventions, Facts], None]


class Change(NamedTuple):
    read: Step
    write: Step


_CLASS_ROWS = re.compile(r"\.predictor\.(?:\d+\.)?(cls_score|bbox_pred|mask_fcn_logits)\.")
_BOX, _MASK = "roi_heads.box.feature_extractor.head.", "roi_heads.mask.feature_extractor.head."
STEM = "backbone.body.stem.conv1.weight"  # the convolution that reads the image


def _background_first(state: State, conventions: Conventions, facts: Facts) -> None:
    for name, rows in state.items():
        part = _CLASS_ROWS.search(name)
        if part and part[1] == "cls_score":
            state[name] = torch.cat((rows[-1:], rows[:-1]))
        elif part:
            state[name] = torch.cat((torch.zeros_like(rows[: 4 if part[1] == "bbox_pred" else 1]), rows))


def _background_last(state: State, conventions: Conventions, facts: Facts) -> None:
    for name, rows in state.items():
        part = _CLASS_ROWS.search(name)
        if part and part[1] == "cls_score":
            state[name] = torch.cat((rows[1:], rows[:1]))
        elif part:
            state[name] = rows[4 if part[1] == "bbox_pred" else 1 :].clone()


def _swap_anchors(state: State, ratios: int, ratio_outside: bool) -> None:
    """From (outer, inner) to (inner, outer) in the rows of the layers that have some for each anchor."""
    anchors = len(state.get("rpn.head.bbox_pred.bias", ())) // 4
    outer = ratios if ratio_outside else max(anchors // ratios, 1)
    for name in [name for name in state if re.search(r"^rpn\.head\.(cls_logits|bbox_pred)\.", name)]:
        state[name] = state[name].unflatten(0, (outer, anchors // outer, -1)).transpose(0, 1).flatten(0, 2)


def _ratio_outside(state: State, conventions: Conventions, facts: Facts) -> None:
    """The peer has the anchors of a cell by size and within it by ratio; here it is the other way round."""
    _swap_anchors(state, conventions.ratios, ratio_outside=False)


def _size_outside(state: State, conventions: Conventions, facts: Facts) -> None:
    _swap_anchors(state, conventions.ratios, ratio_outside=True)


def _retinanet_only(step: Step) -> Step:
    return lambda state, conventions, facts: step(state, conventions, facts) if facts["retinanet"] else None


def _share_res5(state: State, conventions: Conventions, facts: Facts) -> None:
    """The C4 heads share one res5, which has two names here, as in maskrcnn-benchmark."""
    if any(name.startswith("roi_heads.mask.predictor.") for name in state):
        state |= {_MASK + name[len(_BOX) :]: tensor for name, tensor in state.items() if name.startswith(_BOX)}


def _merge_res5(state: State, conventions: Conventions, facts: Facts) -> None:
    for name in [name for name in state if name.startswith(_MASK)]:
        twin = _BOX + name[len(_MASK) :]
        if not torch.equal(state[name], state[twin]):
            raise CheckpointError(f"{name} and {twin} differ, but the other project has one tensor for both")
        del state[name]


def _norms(state: State) -> list[str]:
    return [name[:-6] for name in state if re.search(r"\.(bn\d|downsample\.1)\.weight$", name)]


def _unfold_norms(state: State, conventions: Conventions, facts: Facts) -> None:
    """Detectron's files hold batch norms already folded to scale and shift."""
    for norm in [] if facts["group_norm"] else _norms(state):
        scale = state[norm + "weight"]
        state.setdefault(norm + "running_mean", torch.zeros_like(scale))
        state.setdefault(norm + "running_var", torch.ones_like(scale))


def _fold_norms(state: State, conventions: Conventions, facts: Facts) -> None:
    """Statistics of 0 and 1, as reading made them, leave scale and shift as they are."""
    for norm in [] if facts["group_norm"] else _norms(state):
        mean, variance = state.pop(norm + "running_mean"), state.pop(norm + "running_var")
        if mean.any() or (variance != 1).any():
            scale = state[norm + "weight"] * (variance + conventions.norm_eps).rsqrt()
            state[norm + "weight"], state[norm + "bias"] = scale, state[norm + "bias"] - mean * scale


def _scale_deltas(state: State, factor: Callable[[Tensor], Tensor], conventions: Conventions) -> None:
    weights = torch.tensor(conventions.retinanet_coder)
    for name in [name for name in state if name.startswith("rpn.head.bbox_pred.")]:
        rows = state[name].unflatten(0, (-1, 4))
        scale = weights.to(rows).view(1, 4, *[1] * (rows.dim() - 2))
        state[name] = factor(rows, scale).flatten(0, 1)


def _scale_by_coder(state: State, conventions: Conventions, facts: Facts) -> None:
    """The peer's box coder has weights of 1: its deltas are smaller by ours."""
    _scale_deltas(state, torch.mul, conventions)


def _unscale_by_coder(state: State, conventions: Conventions, facts: Facts) -> None:
    _scale_deltas(state, torch.div, conventions)


def reads_channels(bgr: bool) -> Change:
    """The peer's images are BGR, or RGB. The same either way."""

    def swap(state: State, conventions: Conventions, facts: Facts) -> None:
        if conventions.bgr not in (None, bgr) and STEM in state:
            state[STEM] = swap_red_and_blue(state[STEM])

    return Change(swap, swap)


BACKGROUND_LAST = Change(_background_first, _background_last)
SIZE_OUTSIDE = Change(_ratio_outside, _size_outside)
RETINANET_SIZE_OUTSIDE = Change(_retinanet_only(_ratio_outside), _retinanet_only(_size_outside))
ONE_RES5 = Change(_share_res5, _merge_res5)
FOLDED_NORMS = Change(_unfold_norms, _fold_norms)
RETINANET_CODER_1 = Change(_retinanet_only(_scale_by_coder), _retinanet_only(_unscale_by_coder))

# Modules that are a Sequential here where a norm follows, and a single layer otherwise
_MAYBE_NORMED = re.compile(r"(\.(?:fpn_inner\d+|fpn_layer\d+|reduction|mask_fcn\d+|fc\d))\.(weight|bias)$")


def spell_out(name: str) -> str:
    """Our name as the tables have it: NAME.0 for a layer that a norm may follow, NAME for a deformable convolution."""
    return re.sub(r"(\.conv\d)\.conv\.weight$", r"\1.weight", _MAYBE_NORMED.sub(r"\1.0.\2", name))


def contract(state: State) -> State:
    """The opposite for a whole model, whose other names tell which layers have a norm or offsets."""
    return {_contracted(name, state): tensor for name, tensor in state.items()}


def _contracted(name: str, state: State) -> str:
    module, _, leaf = name.rpartition(".")
    if f"{module}.offset.weight" in state and leaf == "weight":
        return f"{module}.conv.weight"
    single = _MAYBE_NORMED.search(f"{module[:-2]}.{leaf}") if module.endswith(".0") else None
    return f"{module[:-2]}.{leaf}" if single and f"{module[:-2]}.1.weight" not in state else name
