"""torchvision's Mask R-CNN with equal work: our weights, images, targets, sampling and proposals.

Its RPN works in full, and then hands on the proposals that ours hands on. Images are not resized: they have their size
already, as ours do. Its masks are bitmaps, drawn before the clock starts; ours are polygons.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from ..device import Device
from ..errors import CheckpointError, UserError
from ..models.weights import DERIVED, check_match, convert
from ..ops import boxes
from .sides import Side, training_phases
from .steps import DATA
from .workload import Workload

# How far a loss of the peer's may be from ours, relative; and the share of detections that both must have in common.
LOSS_TOLERANCE = {torch.float32: 0.005, torch.bfloat16: 0.02, torch.float16: 0.02}
# torchvision's bfloat16 boxes have 8 binary digits: at 800 x 1333 half of its detections are no longer those that it
# makes in float32.
SAME_DETECTIONS = {torch.float32: 0.97, torch.bfloat16: 0.4, torch.float16: 0.7}
# Ours of less precision keeps those of its float32: .97 at that size.
SAME_AS_FLOAT32 = 0.9
CONFIG = "configs/e2e_mask_rcnn_R_50_FPN_1x_torchvision.yaml"


def import_torchvision() -> ModuleType:
    """torchvision with its detection models, or a line that says how to get it."""
    try:
        return importlib.import_module("torchvision")
    except ImportError as error:
        reason = f"not here ({error})"
    except (OSError, RuntimeError) as error:  # its build for another torch
        reason = f"it does not load with torch {torch.__version__} ({str(error).splitlines()[0]})"
    raise UserError(
        f"--against torchvision: {reason}; make an environment that has it: python -m venv peer && peer/bin/pip install"
        " torch torchvision -r requirements.txt, build the kernels with peer/bin/python setup.py build_ext --inplace,"
        " and run this with peer/bin/python"
    )


def build(cfg: CfgNode, device: Device, weights: dict[str, Tensor], channels_last: bool) -> nn.Module:
    """torchvision's model for `cfg`, with our weights."""
    import_torchvision()
    detection = importlib.import_module("torchvision.models.detection")
    backbones = importlib.import_module("torchvision.models.detection.backbone_utils")
    body, rpn, heads = cfg.MODEL.BACKBONE, cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS
    if not (rpn.USE_FPN and cfg.MODEL.MASK_ON and not cfg.INPUT.TO_BGR255):
        raise UserError(f"--against torchvision: its model is a Mask R-CNN with FPN over RGB in 0..1, as {CONFIG}")
    backbone = backbones.resnet_fpn_backbone(
        backbone_name=f"resnet{body.CONV_BODY.split('-')[1]}",
        weights=None,
        trainable_layers=5 - body.FREEZE_CONV_BODY_AT,
    )
    model = detection.MaskRCNN(
        backbone,
        cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES,
        image_mean=list(cfg.INPUT.PIXEL_MEAN),
        image_std=list(cfg.INPUT.PIXEL_STD),
        rpn_pre_nms_top_n_train=rpn.PRE_NMS_TOP_N_TRAIN,
        rpn_pre_nms_top_n_test=rpn.PRE_NMS_TOP_N_TEST,
        rpn_post_nms_top_n_train=rpn.FPN_POST_NMS_TOP_N_TRAIN,
        rpn_post_nms_top_n_test=rpn.FPN_POST_NMS_TOP_N_TEST,
        rpn_nms_thresh=rpn.NMS_THRESH,
        rpn_batch_size_per_image=rpn.BATCH_SIZE_PER_IMAGE,
        rpn_positive_fraction=rpn.POSITIVE_FRACTION,
        box_score_thresh=heads.SCORE_THRESH,
        box_nms_thresh=heads.NMS,
        box_detections_per_img=heads.DETECTIONS_PER_IMG,
        box_batch_size_per_image=heads.BATCH_SIZE_PER_IMAGE,
        box_positive_fraction=heads.POSITIVE_FRACTION,
    )
    model.transform.resize = lambda image, target: (image, target)
    copy_weights(weights, model)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    return model.to(device.torch_device)


@torch.no_grad()
def copy_weights(weights: dict[str, Tensor], model: nn.Module) -> None:
    """Ours into torchvision's model, by the names that loading its files uses."""
    theirs, _ = convert(model.state_dict(), "torchvision's model")
    wanted = {name: tensor for name, tensor in weights.items() if not DERIVED.search(name)}
    try:
        check_match(wanted, theirs, "our model")
    except CheckpointError as error:
        raise UserError(f"--against torchvision: it builds no such model: {error}; take {CONFIG}") from error
    for name, tensor in theirs.items():  # these share their memory with the model
        tensor.copy_(wanted[name])


def inputs(workload: Workload, device: Device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """The workload in torchvision's form: images [3, H, W] in 0..1, and targets."""
    on = device.torch_device
    images, targets = [], []
    for sample in workload.samples:
        images.append((torch.from_numpy(sample.image).permute(2, 0, 1).float() / 255).contiguous().to(on))
        masks = torch.from_numpy(sample.polygons.rasterize(*sample.size))
        parts = {"boxes": torch.from_numpy(sample.boxes), "labels": torch.from_numpy(sample.labels), "masks": masks}
        targets.append({name: part.to(on) for name, part in parts.items()})
    return images, targets


def hold_proposals(model: nn.Module, workload: Workload) -> None:
    """As workload.hold_proposals."""
    propose = model.rpn.filter_proposals

    def propose_and_replace(*inputs):
        propose(*inputs)
        return list(workload.proposals.boxes), list(workload.proposals.scores)

    model.rpn.filter_proposals = propose_and_replace


def count_rois(side: Side) -> None:
    """As workload.count_rois."""
    heads = side.model.roi_heads
    select = heads.select_training_samples

    def select_and_count(*inputs):
        chosen = select(*inputs)
        labels = torch.cat(chosen[2])
        side.counts.sampled.append(len(labels))
        side.counts.mask_head.append((labels > 0).sum())
        return chosen

    heads.select_training_samples = select_and_count


def training_side(
    cfg: CfgNode,
    device: Device,
    dtype: torch.dtype,
    workload: Workload,
    weights: dict[str, Tensor],
    channels_last: bool,
) -> Side:
    started = time.perf_counter()
    model = build(cfg, device, weights, channels_last).train()
    side = Side("torchvision", dtype, model)
    images, targets = inputs(workload, device)
    hold_proposals(model, workload)
    count_rois(side)

    def forward(batch: tuple[list, list]) -> dict[str, Tensor]:
        side.sizes.append(tuple(workload.images.pixels.shape[-2:]))
        with device.autocast(dtype):
            return model(*batch)

    side.phases = {DATA: lambda _: (images, targets), **training_phases(cfg, device, side, forward)}
    device.synchronize()
    side.init_seconds = time.perf_counter() - started
    return side


def inference_side(
    cfg: CfgNode,
    device: Device,
    dtype: torch.dtype,
    workload: Workload,
    weights: dict[str, Tensor],
    channels_last: bool,
) -> Side:
    """Its post-processing pastes the masks into the image, and stops there: no threshold, no RLE."""
    started = time.perf_counter()
    model = build(cfg, device, weights, channels_last).eval()
    side = Side("torchvision", dtype, model)
    images, _ = inputs(workload, device)
    hold_proposals(model, workload)
    paste = model.transform.postprocess
    model.transform.postprocess = lambda *arguments: arguments

    @torch.no_grad()
    def forward(batch: list[Tensor]) -> tuple:
        side.sizes.append(tuple(workload.images.pixels.shape[-2:]))
        with device.autocast(dtype):
            return model(batch)

    @torch.no_grad()
    def post_processing(arguments: tuple) -> None:
        side.found = paste(*arguments)
        side.counts.mask_head.append(sum(len(image["scores"]) for image in side.found))

    side.phases = {DATA: lambda _: images, "forward": forward, "post_processing": post_processing}
    device.synchronize()
    side.init_seconds = time.perf_counter() - started
    return side


# ---- agreement


def agree(sides: Mapping[str, Side], training: bool) -> dict[str, dict[str, Any]]:
    """Each peer's results against ours in the same dtype, of the step that both have just made, their first: what is
    compared must do the same. In inference also ours of less precision against the peer's float32, where that runs."""
    ours = {side.dtype: side for side in sides.values() if side.name == "ours"}
    theirs = {name: side for name, side in sides.items() if side.name != "ours"}
    if training:
        return {name: compare_losses(ours[side.dtype], side) for name, side in theirs.items()}
    found = {
        name: compare_detections(ours[side.dtype], side, SAME_DETECTIONS[side.dtype]) for name, side in theirs.items()
    }
    exact = next((name for name, side in theirs.items() if side.dtype == torch.float32), None)
    for dtype, side in ours.items() if exact else ():
        if dtype != torch.float32:
            found[f"ours {dtype} beside {exact}"] = compare_detections(side, theirs[exact], SAME_AS_FLOAT32)
    return found


def compare_losses(ours: Side, peer: Side) -> dict[str, Any]:
    """Losses, and how many RoIs were sampled and how many of them are positive. The RPN samples its anchors at random;
    nothing else differs."""
    mine, theirs = ours.read_losses()[0], peer.read_losses()[0]
    apart = {name: abs(mine[name] - theirs[name]) / max(abs(mine[name]), 1e-6) for name in mine}
    tolerance = LOSS_TOLERANCE[ours.dtype]
    rois = {side.name: side.counts.read() for side in (ours, peer)}
    agrees = rois[ours.name] == rois[peer.name] and all(value <= tolerance for value in apart.values())
    found = {"relative_difference": apart, "ours": mine, "peer": theirs, "rois": rois}
    return {"agrees": agrees, "tolerance": tolerance, **found}


def compare_detections(ours: Side, peer: Side, least: float) -> dict[str, Any]:
    """How many, and the share of the peer's with one of ours of the same class that overlaps it by more than .9, which
    is to be `least`."""
    counts = {side.name: side.counts.mask_head[-1] for side in (ours, peer)}
    shares = []
    found = ours.found.to_list()
    for image_id, theirs in enumerate(peer.found):
        mine = [result for result in found if result["image_id"] == image_id]
        box = torch.tensor([result["bbox"] for result in mine]).reshape(-1, 4)
        box = torch.cat([box[:, :2], box[:, :2] + box[:, 2:]], 1)
        label = torch.tensor([result["category_id"] for result in mine])
        same = (boxes.iou(theirs["boxes"].float().cpu(), box) > 0.9) & (theirs["labels"].cpu()[:, None] == label)
        shares.append(same.any(1).float().mean().item())
    agrees = len(set(counts.values())) == 1 and min(shares) >= least
    return {"agrees": agrees, "detections": counts, "least_share_in_common": least, "share_in_common": shares}
