"""State dicts of other projects <-> ours, every tensor accounted for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from ...errors import CheckpointError
from . import changes, layouts
from .changes import Change, Conventions, State
from .rules import Rules, facts_of


class Layout(NamedTuple):
    """mark: a pattern of names that it alone has. table: empty where the names are ours. part: what of our names it
    covers. bgr: the order of channels that its models read; None where that is a matter of their configuration."""

    mark: str
    table: layouts.Table
    changes: tuple[Change, ...] = ()
    part: str = ""
    bgr: bool | None = None

    def steps(self) -> tuple[Change, ...]:
        return self.changes if self.bgr is None else (*self.changes, changes.reads_channels(self.bgr))


BODY = "backbone.body."
DEFAULT = Conventions()

LAYOUTS: dict[str, Layout] = {
    "maskrcnn_benchmark": Layout(r"^(backbone\.body\.stem|roi_heads\.box\.predictor)\.", []),
    "torchvision": Layout(
        r"^backbone\.body\.(conv1|0\.0)\.", layouts.TORCHVISION, (changes.RETINANET_CODER_1,), bgr=False
    ),
    "detectron2": Layout(
        r"^backbone\.(bottom_up\.)?stem\.conv1\.",
        layouts.DETECTRON2,
        (changes.BACKGROUND_LAST, changes.SIZE_OUTSIDE, changes.RETINANET_CODER_1, changes.ONE_RES5),
    ),
    "mmdet": Layout(
        r"^backbone\.(conv1|stem\.0)\.",
        layouts.MMDET,
        (changes.BACKGROUND_LAST, changes.RETINANET_CODER_1, changes.ONE_RES5),
    ),
    "detectron": Layout(
        r"^conv1_w$",
        layouts.DETECTRON,
        (changes.FOLDED_NORMS, changes.RETINANET_SIZE_OUTSIDE, changes.RETINANET_CODER_1, changes.ONE_RES5),
        bgr=True,
    ),
    "paddledetection": Layout(r"^(backbone\.)?res2\.res2a\.", layouts.PADDLEDETECTION, part=BODY, bgr=False),
    "backbone": Layout(r"^conv1\.(0\.)?weight$", layouts.BACKBONE, part=BODY, bgr=False),
}

# What peers save that is no weight of the model, and what of it follows from the configuration here.
DERIVED = re.compile(
    r"(^|\.)(num_batches_tracked|positives_average|pixel_mean|pixel_std|anchor_generator\.cell_anchors\.\d+)$"
    r"|^kps_score_[wb]$"  # Detectron's bilinear kernel
)
CLASSIFIER = re.compile(  # the ImageNet classifier of a backbone's file, HRNet's too
    r"^(fc|stem\.fc|fc1000|pred)(\.|_)|^(incre_modules|downsamp_modules|final_layer|classifier)\."
)
MMDET_1 = re.compile(r"^(bbox_head|mask_head)\.(\d+\.)?(fc_cls|shared_\w+|convs|conv_logits)\.")
OPTIMIZER = re.compile(r"_momentum$|^(lr|weight_order)$|^__preserve__/")
DROPPED = {"derived from the configuration": DERIVED, "ImageNet classifier": CLASSIFIER, "optimizer": OPTIMIZER}


@dataclass
class Conversion:
    """state: the result. layout: the other project's. renamed: how many tensors have another name. dropped: why ->
    names."""

    state: State
    layout: str
    renamed: int
    dropped: dict[str, list[str]] = field(default_factory=dict)


def recognise(state: State, source: str) -> str:
    """The layout whose names these are.

    Raises:
        CheckpointError: no known layout has such names.
    """
    for name, layout in LAYOUTS.items():
        if any(re.search(layout.mark, key) for key in state):
            return name
    first = ", ".join(list(state)[:3])
    raise CheckpointError(f"{source}: no known format has tensors named {first}, ...; known: {', '.join(LAYOUTS)}")


def to_ours(state: State, source: str, conventions: Conventions = DEFAULT, layout: str | None = None) -> Conversion:
    """A state dict of another project under our names, as our tensors.

    source: names it in errors. layout: of LAYOUTS; None: whichever has such names.

    Raises:
        CheckpointError: no known format has such names, or the format has no such name.
    """
    state = _without_prefix(state, "module.")  # torch's DistributedDataParallel
    name = layout or recognise(state, source)
    if LAYOUTS[name].part and all(key.startswith("backbone.") for key in state):
        state = _without_prefix(state, "backbone.")
    kept, dropped = _sort_out(state)
    if name == "mmdet" and (old := next(filter(MMDET_1.search, kept), None)):
        raise CheckpointError(
            f"{source} is of MMDetection 1 (its {old} has no roi_head before it), whose classes come in another order: "
            "convert it with MMDetection 2's tools/model_converters/upgrade_model_version.py first"
        )
    facts = facts_of(kept)
    result = kept
    if LAYOUTS[name].table:
        rules = Rules(LAYOUTS[name].table, facts)
        result = changes.contract(_rename(kept, rules.to_ours, f"{source}, which is {name}'s: no place here"))
    renamed = len(result.keys() - state.keys())
    for change in LAYOUTS[name].steps():
        change.read(result, conventions, facts)
    return Conversion(result, name, renamed, dropped)


def from_ours(state: State, source: str, layout: str, conventions: Conventions = DEFAULT) -> Conversion:
    """Our state dict as the other project's.

    Raises:
        CheckpointError: the project has no name for a tensor, or could not hold both of two.
    """
    kept, dropped = _sort_out(state)
    part = LAYOUTS[layout].part
    if rest := [name for name in kept if not name.startswith(part)]:
        dropped["not of the backbone"] = rest
    kept = {name: tensor for name, tensor in kept.items() if name.startswith(part)}
    facts = facts_of(kept)
    for change in reversed(LAYOUTS[layout].steps()):
        change.write(kept, conventions, facts)
    result = kept
    if LAYOUTS[layout].table:
        rules = Rules(LAYOUTS[layout].table, facts)
        # Names that reading would not give back (a ReLU after FPN's layers makes some) are as good as none.
        lasting = changes.contract(kept).keys()
        result = _rename(
            kept,
            lambda name: rules.to_theirs(changes.spell_out(name)) if name in lasting else None,
            f"{source}: no name in {layout}",
        )
    return Conversion(result, layout, len(result.keys() - state.keys()), dropped)


def convert(state: State, source: str, conventions: Conventions = DEFAULT) -> tuple[State, str]:
    """As to_ours: the state dict and the name of its layout."""
    conversion = to_ours(state, source, conventions)
    return conversion.state, conversion.layout


def without_derived(state: State) -> State:
    """A model's state without what no weights file has to hold."""
    return {name: tensor for name, tensor in state.items() if not DERIVED.search(name)}


def _without_prefix(state: State, prefix: str) -> State:
    whole = bool(state) and all(name.startswith(prefix) for name in state)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()} if whole else dict(state)


def _sort_out(state: State) -> tuple[State, dict[str, list[str]]]:
    dropped = {why: [name for name in state if pattern.search(name)] for why, pattern in DROPPED.items()}
    gone = {name for names in dropped.values() for name in names}
    kept = {name: tensor for name, tensor in state.items() if name not in gone}
    return kept, {why: names for why, names in dropped.items() if names}


def _rename(state: State, rename: Callable[[str], str | None], problem: str) -> State:
    names = {name: rename(name) for name in state}
    if unknown := [name for name, new in names.items() if new is None]:
        more = ", ..." if len(unknown) > 5 else ""
        raise CheckpointError(f"{problem} for {len(unknown)} tensors: {', '.join(unknown[:5])}{more}")
    taken = Counter(names.values())
    if twins := [name for name, new in names.items() if taken[new] > 1]:
        raise CheckpointError(f"{problem} for both {twins[0]} and {twins[1]}")
    return {new: state[name] for name, new in names.items()}
