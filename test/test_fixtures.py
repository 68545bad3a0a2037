"""The model against the peers: features, RPN, heads, proposals, detections and losses that they computed themselves.

This is the proof that the model is right: the same formula weights, imported through models/weights, and the same
input must give torchvision's and detectron2's numbers under their conventions (configs/conventions/*.yaml).
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from pycocotools import mask as coco_mask
from torch import Tensor

from maskrcnn_benchmark.config import get_config, merge
from maskrcnn_benchmark.config.checks import check
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.evaluation.results import detections_to_results
from maskrcnn_benchmark.models.build import build_model
from maskrcnn_benchmark.models.rcnn import RCNN
from maskrcnn_benchmark.models.weights import convert
from maskrcnn_benchmark.ops import boxes as box_ops
from maskrcnn_benchmark.ops.rle import decode_rle
from maskrcnn_benchmark.structures import BitmapBatch, ImageBatch, PolygonBatch, Targets

POLYGONS = [
    [30, 40, 150, 60, 140, 200, 40, 180],
    [180, 60, 300, 60, 300, 120, 240, 118, 180, 110],
    [60, 180, 84, 180, 84, 206, 60, 206],
]
PEERS = {"torchvision": "torchvision_maskrcnn_resnet50_fpn", "detectron2": "detectron2_mask_rcnn_R_50_FPN"}


@dataclass
class Peer:
    name: str
    model: RCNN
    images: ImageBatch
    arrays: dict[str, np.ndarray]
    features: list[Tensor]

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])


@pytest.fixture(scope="module", params=list(PEERS))
def peer(request, shared) -> Peer:
    name = request.param
    folder = shared / "fixtures"
    arrays = dict(np.load(folder / f"{PEERS[name]}.npz"))
    model = build(name)
    model.load_state_dict(peer_state(folder, PEERS[name]))
    model.eval()
    if name == "torchvision":
        pixels = torch.from_numpy(arrays["image"]) * 255
    else:
        pixels = torch.from_numpy(arrays["image_bgr255"]).flip(0)
    height, width = pixels.shape[-2:]
    images = ImageBatch(pixels[None], torch.tensor([[height, width]]), [(height, width)], [1])
    with torch.no_grad():
        features = model.backbone(model.normalize(images).contiguous(memory_format=torch.channels_last))
    return Peer(name, model, images, arrays, features)


def build(name: str) -> RCNN:
    cfg = get_config(ROOT / "configs" / "e2e_mask_rcnn_R_50_FPN_1x.yaml")
    cfg = cfg.clone()
    cfg.defrost()
    merge(cfg, convention(name), name)
    huge = {"BATCH_SIZE_PER_IMAGE": 1_000_000}  # every candidate is used and nothing is random
    merge(cfg, {"MODEL": {"WEIGHT": "", "RPN": huge, "ROI_HEADS": huge}}, "test")
    check(cfg)
    return build_model(cfg, get_device("cpu"))


def convention(name: str) -> dict:
    import yaml

    return yaml.safe_load((ROOT / "configs" / "conventions" / f"{name}.yaml").read_text())


def peer_state(folder: Path, name: str) -> dict[str, Tensor]:
    """The peer's state dict by formula, under our names."""
    spec = importlib.util.spec_from_file_location("formula_weights", folder / "formula_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shapes = json.loads((folder / f"{name}.json").read_text())["state_dict"]
    state = {key: torch.from_numpy(module.formula(key, tuple(shape))) for key, shape in shapes.items()}
    return convert(state, name)[0]


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-3) -> None:
    """Within `tolerance` of the array's largest value."""
    error = (ours - theirs).abs().max().item() / theirs.abs().max().item()
    assert error < tolerance, f"relative error {error:.2e}"


def pack(polygons: list[list[float]]) -> PolygonBatch:
    """Instances of one polygon each."""
    points = torch.tensor([v for polygon in polygons for v in polygon], dtype=torch.float32).reshape(-1, 2)
    ends = torch.tensor([0] + [len(polygon) // 2 for polygon in polygons]).cumsum(0)
    return PolygonBatch(points, ends, torch.arange(len(polygons) + 1))


def bitmaps_of(polygons: list[list[float]], height: int, width: int) -> Tensor:
    """[N, height, width] uint8: the same, drawn by pycocotools."""
    rles = [coco_mask.merge(coco_mask.frPyObjects([p], height, width)) for p in polygons]
    return torch.from_numpy(np.stack([coco_mask.decode(r) for r in rles]))


def subsample(x: Tensor) -> Tensor:
    return x[:, ::16, :: max(1, x.shape[2] // 8), :: max(1, x.shape[3] // 8)]


def test_features(peer):
    for level, feature in enumerate(peer.features):
        close(subsample(feature), peer.tensor(f"feature_{level}"))


def test_rpn_head(peer):
    with torch.no_grad():
        logits, deltas = peer.model.rpn.head(peer.features)
    for level, (logit, delta) in enumerate(zip(logits, deltas)):
        step = 4 if level < 2 else 1
        close(logit[:, :, ::step, ::step], peer.tensor(f"objectness_{level}"))
        close(delta[:, :, ::step, ::step], peer.tensor(f"deltas_{level}"))


def test_proposals(peer):
    with torch.no_grad():
        proposals, losses = peer.model.rpn(peer.features, peer.images.pixels.shape[-2:], peer.images.sizes)
    assert losses == {}
    ours = proposals.boxes[0][proposals.valid[0]]
    theirs = peer.tensor("proposals")
    assert len(ours) == len(theirs)
    pairs = box_ops.iou(ours, theirs) > 0.99
    if peer.name == "detectron2":  # torchvision's fixture has no scores of proposals
        scores = proposals.scores[0][proposals.valid[0]]
        pairs &= (scores[:, None] - peer.tensor("proposal_logits").sigmoid()).abs() < 1e-3
    assert pairs.any(0).all() and pairs.any(1).all()


def test_heads(peer):
    boxes = peer.tensor("boxes")
    image_index = torch.zeros(len(boxes), dtype=torch.long)
    box_head, mask_head = peer.model.roi_heads["box"], peer.model.roi_heads["mask"]
    with torch.no_grad():
        _, logits, deltas = box_head(peer.features, boxes, image_index)
        label = torch.full((len(boxes),), 3 if peer.name == "torchvision" else 4)
        masks = mask_head(peer.features, boxes, image_index, label)
    theirs, regression = peer.tensor("class_logits"), peer.tensor("box_regression")
    if peer.name == "detectron2":  # background last, and no box for it
        theirs = torch.cat((theirs[:, -1:], theirs[:, :-1]), 1)
        deltas = deltas[:, 4:]
    close(logits, theirs)
    close(deltas, regression)
    close(masks, peer.tensor("mask_logits_class3").reshape(-1, 28, 28))


def test_detections(peer):
    with torch.no_grad():
        detections = peer.model(peer.images)
    keep = detections.valid[0]
    boxes, scores, labels = detections.boxes[0][keep], detections.scores[0][keep], detections.labels[0][keep]
    their_boxes, their_scores, their_labels = (peer.tensor(f"det_{k}") for k in ("boxes", "scores", "labels"))
    if peer.name == "detectron2":
        their_labels = their_labels + 1
    assert len(boxes) == len(their_boxes)
    pairs = (box_ops.iou(boxes, their_boxes) > 0.99) & (labels[:, None] == their_labels)
    pairs &= (scores[:, None] - their_scores).abs() < 1e-3
    assert pairs.any(0).all() and pairs.any(1).all()


def test_detected_masks(peer):
    """The peer's first eight masks, pasted into the image, against ours of the same detections."""
    with torch.no_grad():
        detections = peer.model(peer.images)
    whole_pixels = peer.name == "torchvision"
    results = detections_to_results(
        detections, peer.images, list(range(1, 101)), paste_whole_pixels=whole_pixels
    ).to_list()
    ours = np.stack([decode_rle(result["segmentation"]) for result in results]).astype(bool)
    scores = torch.tensor([result["score"] for result in results])
    theirs = peer.arrays["det_masks"].reshape(-1, *ours.shape[1:]) > 0.5  # torchvision's are probabilities
    for mask, score in zip(theirs, peer.tensor("det_scores")):
        candidates = ours[(scores - score).abs() < 1e-3]
        iou = (candidates & mask).sum((1, 2)) / np.maximum((candidates | mask).sum((1, 2)), 1)
        assert iou.max() > 0.99


def test_losses(peer):
    targets = make_targets(peer)
    peer.model.train()
    with torch.no_grad():
        losses = peer.model(peer.images, targets)
    peer.model.eval()
    theirs = {key: float(peer.arrays[key]) for key in peer.arrays if key.startswith("loss/")}
    renamed = {
        "loss/loss_cls": "loss_classifier",
        "loss/loss_rpn_cls": "loss_objectness",
        "loss/loss_rpn_loc": "loss_rpn_box_reg",
    }
    assert len(theirs) == len(losses) == 5
    for key, value in theirs.items():
        name = renamed.get(key, key.removeprefix("loss/"))
        assert float(losses[name]) == pytest.approx(value, rel=1e-3), name


def make_targets(peer: Peer) -> Targets:
    height, width = peer.images.pixels.shape[-2:]
    labels = peer.tensor("gt_labels").long()
    if peer.name == "detectron2":
        labels = labels + 1
        masks = pack(POLYGONS)
    else:
        masks = BitmapBatch(bitmaps_of(POLYGONS, height, width)[None])
    return Targets(peer.tensor("gt_boxes")[None], labels[None], torch.ones(1, len(labels), dtype=torch.bool), masks)
