"""Names in foreign checkpoints <-> names here, which are maskrcnn-benchmark's, and reading such files safely.

Classes: background first here and in torchvision; last in detectron2, whose box and mask rows have none for it.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .anchors import AnchorGenerator

logger = logging.getLogger(__name__)

State = dict[str, Tensor]
Rules = list[tuple[str, str | Callable[[re.Match], str]]]

# Buffers that peers save and that follow from the configuration here.
DERIVED = re.compile(
    r"(^|\.)(num_batches_tracked|positives_average|pixel_mean|pixel_std|anchor_generator\.cell_anchors\.\d+)$"
)
# Layers that have a part for each class or keypoint of the data. An RPN's cls_logits have one for each anchor, as has
# its bbox_pred, so that other anchors are refused nevertheless.
CLASS_LAYERS = re.compile(
    r"^(roi_heads\..*\.(cls_score|bbox_pred|mask_fcn_logits|kps_score_lowres)|rpn\.head\.cls_logits)\.(weight|bias)$"
)
STEM = "backbone.body.stem.conv1.weight"  # the convolution that reads the image
CLASSIFIER = re.compile(r"^(fc|stem\.fc|fc1000|pred)(\.|_)")  # the ImageNet classifier of a backbone's file

TORCHVISION: Rules = [
    (r"^(backbone\.body\.)(conv1|bn1)\.", r"\1stem.\2."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)(\.0)?\.", lambda m: f"backbone.fpn.fpn_inner{int(m[1]) + 1}."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)(\.0)?\.", lambda m: f"backbone.fpn.fpn_layer{int(m[1]) + 1}."),
    (r"^rpn\.head\.conv\.0\.0\.", "rpn.head.conv."),
    (r"^roi_heads\.box_head\.", "roi_heads.box.feature_extractor."),
    (r"^roi_heads\.box_predictor\.", "roi_heads.box.predictor."),
    (r"^roi_heads\.mask_head\.(\d)\.0\.", lambda m: f"roi_heads.mask.feature_extractor.mask_fcn{int(m[1]) + 1}."),
    (r"^roi_heads\.mask_head\.", "roi_heads.mask.feature_extractor."),  # before torchvision 0.14
    (r"^roi_heads\.mask_predictor\.", "roi_heads.mask.predictor."),
    (
        r"^roi_heads\.keypoint_head\.(\d+)\.",
        lambda m: f"roi_heads.keypoint.feature_extractor.conv_fcn{int(m[1]) // 2 + 1}.",
    ),
    (r"^roi_heads\.keypoint_predictor\.", "roi_heads.keypoint.predictor."),
    (r"^backbone\.fpn\.extra_blocks\.", "backbone.fpn.top_blocks."),
    (r"^head\.classification_head\.cls_logits\.", "rpn.head.cls_logits."),
    (r"^head\.regression_head\.bbox_reg\.", "rpn.head.bbox_pred."),
    (r"^head\.(classification|regression)_head\.conv\.(\d)\.0\.", lambda m: f"head.{m[1]}_head.conv.{2 * int(m[2])}."),
    (r"^head\.classification_head\.conv\.", "rpn.head.cls_tower."),  # before torchvision 0.13 from here on
    (r"^head\.regression_head\.conv\.", "rpn.head.bbox_tower."),
]
TORCHVISION_BACKBONE: Rules = [
    (r"^(conv1|bn1)\.", r"backbone.body.stem.\1."),
    (r"^(layer\d)\.", r"backbone.body.\1."),
]
DETECTRON2: Rules = [
    (r"^backbone\.(bottom_up\.)?(stem|res\d)\.", r"backbone.body.\2."),
    (r"^roi_heads\.res5\.", "roi_heads.box.feature_extractor.head.layer4."),
    (r"\.res(\d)\.", lambda m: f".layer{int(m[1]) - 1}."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
    (r"^backbone\.fpn_lateral(\d)\.", lambda m: f"backbone.fpn.fpn_inner{int(m[1]) - 1}."),
    (r"^backbone\.fpn_output(\d)\.", lambda m: f"backbone.fpn.fpn_layer{int(m[1]) - 1}."),
    (r"^proposal_generator\.rpn_head\.", "rpn.head."),
    (r"^rpn\.head\.objectness_logits\.", "rpn.head.cls_logits."),
    (r"^rpn\.head\.anchor_deltas\.", "rpn.head.bbox_pred."),
    (r"^roi_heads\.box_head\.fc(\d)\.", lambda m: f"roi_heads.box.feature_extractor.fc{int(m[1]) + 5}."),
    (r"^roi_heads\.box_predictor\.", "roi_heads.box.predictor."),
    (r"^roi_heads\.mask_head\.deconv\.", "roi_heads.mask.predictor.conv5_mask."),
    (r"^roi_heads\.mask_head\.predictor\.", "roi_heads.mask.predictor.mask_fcn_logits."),
    (r"^roi_heads\.mask_head\.", "roi_heads.mask.feature_extractor."),
    (r"^roi_heads\.keypoint_head\.score_lowres\.", "roi_heads.keypoint.predictor.kps_score_lowres."),
    (r"^roi_heads\.keypoint_head\.", "roi_heads.keypoint.feature_extractor."),
    (r"^backbone\.top_block\.", "backbone.fpn.top_blocks."),
    (r"^head\.(cls|bbox)_subnet\.", r"rpn.head.\1_tower."),
    (r"^head\.cls_score\.", "rpn.head.cls_logits."),
    (r"^head\.bbox_pred\.", "rpn.head.bbox_pred."),
]
# Detectron's ImageNet backbones (MSRA's and FAIR's R-50.pkl): res2_0_branch2a_w, res2_0_branch2a_bn_s, ...
DETECTRON_BACKBONE: Rules = [
    (r"^(?:res_)?conv1_", "backbone.body.stem.conv1_"),
    (r"^res(\d)_(\d+)_", lambda m: f"backbone.body.layer{int(m[1]) - 1}.{m[2]}."),
    (r"branch2([abc])_", lambda m: f"conv{'abc'.index(m[1]) + 1}_"),
    (r"branch1_bn_", "downsample.1_"),
    (r"branch1_", "downsample.0_"),
    (r"conv(\d)_bn_", r"bn\1_"),
    (r"_(w|s)$", ".weight"),
    (r"_b$", ".bias"),
]


def _background_first(state: State) -> None:
    """detectron2's class rows in our order; box and mask rows get one of zeros for the background, which is unused."""
    for name, tensor in state.items():
        if ".predictor.cls_score." in name:
            state[name] = torch.cat((tensor[-1:], tensor[:-1]))
        elif ".predictor.bbox_pred." in name:
            state[name] = torch.cat((torch.zeros_like(tensor[:4]), tensor))
        elif ".predictor.mask_fcn_logits." in name:
            state[name] = torch.cat((torch.zeros_like(tensor[:1]), tensor))


def _ratio_outside(state: State, ratios: int) -> None:
    """detectron2 has the anchors of a cell by size and within it by ratio; here it is the other way round."""
    anchors = len(state.get("rpn.head.bbox_pred.bias", ())) // 4
    for name in [name for name in state if re.search(r"^rpn\.head\.(cls_logits|bbox_pred)\.", name)]:
        by_size = state[name].unflatten(0, (anchors // ratios, ratios, -1))
        state[name] = by_size.transpose(0, 1).flatten(0, 2)


def _pyramid_from_c3(state: State) -> None:
    """torchvision counts a pyramid's levels from its first one, which is C3 where there are P6 and P7."""
    if "backbone.fpn.top_blocks.p6.weight" in state:
        levels = {name: re.search(r"^backbone\.fpn\.fpn_(inner|layer)(\d)\.", name) for name in state}
        moved = {name: state.pop(name) for name, level in levels.items() if level}
        for name, tensor in moved.items():
            start, end = levels[name].span(2)
            state[f"{name[:start]}{int(levels[name][2]) + 1}{name[end:]}"] = tensor


def _shared_res5(state: State) -> None:
    """The C4 heads share one res5, which has two names here, as in maskrcnn-benchmark."""
    box, mask = "roi_heads.box.feature_extractor.head.", "roi_heads.mask.feature_extractor.head."
    if any(name.startswith("roi_heads.mask.predictor.") for name in state):
        state |= {mask + name[len(box) :]: tensor for name, tensor in state.items() if name.startswith(box)}


def _affine_norms(state: State) -> None:
    """Detectron's files hold batch norms already folded to scale and shift."""
    for name in [name for name in state if re.search(r"\.(bn\d|downsample\.1)\.weight$", name)]:
        prefix = name.removesuffix("weight")
        state[prefix + "running_mean"] = torch.zeros_like(state[name])
        state[prefix + "running_var"] = torch.ones_like(state[name])


# format -> (a name that only it has, rules, changes to the renamed tensors)
FORMATS: dict[str, tuple[str, Rules, list[Callable[[State], None]]]] = {
    "maskrcnn_benchmark": (r"^(module\.)?backbone\.body\.stem\.", [(r"^module\.", "")], []),
    "torchvision": (r"^backbone\.body\.conv1\.", TORCHVISION, [_pyramid_from_c3]),
    "detectron2": (r"^backbone\.(bottom_up\.)?stem\.conv1\.", DETECTRON2, [_background_first, _shared_res5]),
    "torchvision backbone": (r"^conv1\.weight$", TORCHVISION_BACKBONE, []),
    "detectron backbone": (r"^conv1_w$", DETECTRON_BACKBONE, [_affine_norms]),
}


def convert(state: State, source: str, ratios: int = 3) -> tuple[State, str]:
    """A foreign state dict under our names, and the name of its format.

    ratios: aspect ratios of the anchors, 3 in every published model.

    Raises:
        CheckpointError: no known format has such names.
    """
    name = next((name for name, (mark, *_) in FORMATS.items() if any(re.search(mark, key) for key in state)), None)
    if name is None:
        first = ", ".join(list(state)[:3])
        raise CheckpointError(f"{source}: no known format has tensors named {first}, ...; known: {', '.join(FORMATS)}")
    _, rules, changes = FORMATS[name]
    renamed = {}
    for key, tensor in state.items():
        if DERIVED.search(key) or CLASSIFIER.search(key) or not isinstance(tensor, Tensor):
            continue
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    for change in changes:
        change(renamed)
    if name == "detectron2":
        _ratio_outside(renamed, ratios)
    return renamed, name


def load_weights(model: nn.Module, path: str, allow_pickle: bool = False, replace_heads: bool = False) -> str:
    """Loads the file into the model and returns the name of its format.

    A whole model's file must match name for name and shape for shape. A backbone's file must fill the whole body; the
    rest keeps its fresh weights. replace_heads: so do layers of another number of classes, whose names are logged.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to another model.
    """
    ratios = next((part.ratios for part in model.modules() if isinstance(part, AnchorGenerator)), 3)
    state, name = convert(read(resolve(path), allow_pickle), path, ratios)
    wanted = model.state_dict()
    if name.endswith("backbone"):
        wanted = {key: tensor for key, tensor in wanted.items() if key.startswith("backbone.body.")}
    wanted = {key: tensor for key, tensor in wanted.items() if not DERIVED.search(key)}
    if STEM in state and STEM in wanted:
        state[STEM] = inflate(state[STEM], wanted[STEM].shape[1])
    res5 = "backbone.body.layer4."
    if name.endswith("backbone") and not any(key.startswith(res5) for key in wanted):
        state = _move_res5_to_head(state, model, wanted, res5)
    if replace_heads:
        _drop_other_classes(state, wanted, path)
    check_match(state, wanted, path)
    model.load_state_dict(state, strict=False)
    logger.info("loaded %d tensors from %s (%s)", len(state), path, name)
    return name


def inflate(weight: Tensor, channels: int) -> Tensor:
    """A first convolution's weights [O, 3, k, k] for images of another number of channels: [O, channels, k, k].

    What the first three channels had they keep, further ones get their mean (where there are fewer than three, all do),
    and all is scaled by 3 / channels: an image whose channels are equal gets the response it had.
    """
    if weight.shape[1] != 3 or channels == 3:
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


# catalog:// names -> file name, address. Never downloaded implicitly.
CATALOG = {
    "ImageNetPretrained/MSRA/R-50": "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/MSRA/R-50.pkl",
    "ImageNetPretrained/MSRA/R-101": "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/MSRA/R-101.pkl",
    "ImageNetPretrained/MSRA/R-50-GN": "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/47261647/R-50-GN.pkl",
    "ImageNetPretrained/MSRA/R-101-GN": "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/47592356/R-101-GN.pkl",
    "torchvision/resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "torchvision/resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "torchvision/resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
    "torchvision/fasterrcnn_resnet50_fpn": "https://download.pytorch.org/models/fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
    "torchvision/maskrcnn_resnet50_fpn": "https://download.pytorch.org/models/maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
}


def cache_dir() -> Path:
    """Where catalog:// names are looked up: $MASKRCNN_CACHE, or ~/.cache/maskrcnn_benchmark."""
    return Path(os.environ.get("MASKRCNN_CACHE") or Path.home() / ".cache" / "maskrcnn_benchmark")


def resolve(path: str) -> Path:
    """The file that MODEL.WEIGHT names."""
    if not path.startswith("catalog://"):
        return Path(path).expanduser()
    name = path.removeprefix("catalog://")
    if name not in CATALOG:
        raise CheckpointError(f"MODEL.WEIGHT {path} is not in the catalogue; it has {', '.join(CATALOG)}")
    address = CATALOG[name]
    file = cache_dir() / address.rsplit("/", 1)[1]
    if not file.is_file():
        pickle_ = " (and set MODEL.ALLOW_PICKLE True)" if file.suffix == ".pkl" else ""
        raise CheckpointError(
            f"MODEL.WEIGHT {path} is not on this machine, and nothing is downloaded implicitly: download {address} to "
            f'{file}{pickle_}, or train from scratch with MODEL.WEIGHT ""'
        )
    return file


def read(path: Path, allow_pickle: bool = False) -> State:
    """The tensors of a .pth file, or of a .pkl file where that is allowed. No code in the file is run."""
    if not path.is_file():
        raise CheckpointError(f"weights file {path} does not exist")
    try:
        if path.suffix == ".pkl":
            content = _read_pickle(path, allow_pickle)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load and pickle raise whatever a damaged file makes them stumble over
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"cannot read weights from {path}: {reason} ({type(error).__name__})") from error
    for key in ("model", "state_dict", "blobs"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds no state dict")
    return {k: v if isinstance(v, Tensor) else torch.as_tensor(v) for k, v in content.items() if _is_array(v)}


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "__array_interface__")


class _ArrayUnpickler(pickle.Unpickler):
    """Knows NumPy arrays and nothing else, so that no code in a file can run."""

    ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy.core.multiarray", "scalar"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "scalar"),
            ("_codecs", "encode"),
            ("collections", "OrderedDict"),
        }
    )

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise CheckpointError(f"the pickle asks for {module}.{name}; only arrays are read from .pkl files")
        return super().find_class(module, name)


def _read_pickle(path: Path, allowed: bool) -> object:
    if not allowed:
        raise CheckpointError(
            f"{path} is a pickle file; set MODEL.ALLOW_PICKLE True to read the arrays in it (no code is run)"
        )
    with open(path, "rb") as file:
        try:
            return _ArrayUnpickler(file, encoding="latin1").load()
        except CheckpointError as error:
            raise CheckpointError(f"{path} is refused: {error}") from error
