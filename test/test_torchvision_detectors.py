"""torchvision's own RetinaNet, Keypoint R-CNN and `_v2` models against ours, with the same random weights: features,
heads, detections and losses; and the detectors with weights that went from ours to torchvision's. Where torchvision is
not installed these are skipped; test_fixtures.py has numbers computed before."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from conftest import ROOT
from test_fixtures import close, convention
from torch import Tensor

from maskrcnn_benchmark.config import get_config, merge
from maskrcnn_benchmark.config.checks import check
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.models.anchors import AnchorGenerator
from maskrcnn_benchmark.models.box_head import BoxHead, BoxPredictor, MLPFeatureExtractor
from maskrcnn_benchmark.models.build import build_model
from maskrcnn_benchmark.models.fpn import FPN
from maskrcnn_benchmark.models.rcnn import RCNN, Normalize
from maskrcnn_benchmark.models.roi_pool import RoIPool
from maskrcnn_benchmark.models.rpn import RPN, RPNHead
from maskrcnn_benchmark.models.weights import from_ours, load_weights
from maskrcnn_benchmark.ops import boxes as box_ops
from maskrcnn_benchmark.ops.heatmaps import find_peaks
from maskrcnn_benchmark.structures import BitmapBatch, ImageBatch, Targets

detection = pytest.importorskip("torchvision.models.detection", reason="torchvision is not installed")
from torchvision.models._utils import IntermediateLayerGetter  # noqa: E402

SIZE = (128, 192)
FEW = 60  # proposals
RETINANET = {"MODEL": {"MASK_ON": False, "RETINANET_ON": True, "BACKBONE": {"CONV_BODY": "R-50-FPN-RETINANET"}}}
OPTIONS = {"min_size": SIZE[0], "max_size": SIZE[1]}
EVERY = {"BATCH_SIZE_PER_IMAGE": 1_000_000}  # every candidate is used and nothing is random
SCALES = "(0.25, 0.125, 0.0625, 0.03125)"
KEYPOINT = {
    "MODEL": {
        "MASK_ON": False,
        "KEYPOINT_ON": True,
        "RPN": EVERY,
        "ROI_HEADS": EVERY,
        "ROI_BOX_HEAD": {"NUM_CLASSES": 2},
        "ROI_KEYPOINT_HEAD": {"SHARE_BOX_FEATURE_EXTRACTOR": False, "RESOLUTION": 56, "POOLER_SCALES": SCALES},
    }
}


class Pair:
    """torchvision's model and ours with its weights, and what both look at."""

    def __init__(self, theirs: torch.nn.Module, keys: dict, folder, recipe: str = "", ours: RCNN | None = None) -> None:
        """recipe: of configs/, with torchvision's arithmetic in it; else Mask R-CNN's, and that is added. ours: the
        model itself."""
        self.theirs = theirs.eval()
        torch.save(theirs.state_dict(), folder / "theirs.pth")
        cfg = get_config(ROOT / "configs" / f"{recipe or 'e2e_mask_rcnn_R_50_FPN_1x'}.yaml").clone()
        cfg.defrost()
        merge(cfg, {} if recipe else convention("torchvision"), "torchvision")
        merge(cfg, keys, "test")
        check(cfg)
        self.ours = (ours or build_model(cfg, get_device("cpu"))).eval()
        assert load_weights(self.ours, str(folder / "theirs.pth")) == "torchvision"
        self.pixels = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
        sizes = torch.tensor([SIZE, SIZE])
        self.images = ImageBatch(self.pixels * 255, sizes, [SIZE, SIZE], [1, 2])
        with torch.no_grad():
            self.features, self.padded = self.ours.features(self.images)
            normalized, _ = self.theirs.transform(list(self.pixels))
            self.their_features = list(self.theirs.backbone(normalized.tensors).values())

    def losses(
        self, keypoints: Tensor | None = None, statistics: bool = False, masks: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Theirs and ours, of two images, the second with one object. statistics: batch norms use the batch's own."""
        boxes = torch.tensor([[[20.0, 30, 120, 150], [90, 40, 250, 190]], [[60, 10, 100, 60], [0, 0, 0, 0]]])
        labels, valid = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[True, True], [True, False]])
        if keypoints is None:
            labels = torch.tensor([[3, 90], [17, 0]])
        wanted = [{"boxes": boxes[i][valid[i]], "labels": labels[i][valid[i]]} for i in range(2)]
        for i, target in enumerate(wanted):
            target |= {} if keypoints is None else {"keypoints": keypoints[i][valid[i]]}
            target |= {} if masks is None else {"masks": masks[i][valid[i]]}
        self.theirs.train()
        self.ours.train()
        if not statistics:
            for part in (self.theirs, self.ours):  # its batch norms are not frozen, having no trained weights
                for norm in part.modules():
                    norm.train(not isinstance(norm, torch.nn.BatchNorm2d) and norm.training)
        with torch.no_grad():
            both = (
                self.theirs(list(self.pixels), wanted),
                self.ours(
                    self.images,
                    Targets(
                        boxes, labels, valid, keypoints=keypoints, masks=None if masks is None else BitmapBatch(masks)
                    ),
                ),
            )
        self.theirs.eval()
        self.ours.eval()
        return both

    def detections(self, least: int) -> None:
        """The same boxes, scores and labels, `least` of them or more."""
        with torch.no_grad():
            ours, theirs = self.ours(self.images), self.theirs(list(self.pixels))
        for i, found in enumerate(theirs):
            keep = ours.valid[i]
            assert keep.sum() == len(found["boxes"]) >= least
            pairs = (ours.boxes[i][keep][:, None] - found["boxes"]).abs().amax(-1) < 0.1  # pixels: some have no area
            pairs &= (ours.scores[i][keep][:, None] - found["scores"]).abs() < 1e-3
            pairs &= ours.labels[i][keep][:, None] == found["labels"]
            assert pairs.any(0).all() and pairs.any(1).all()


def randomize(model: torch.nn.Module, spread: dict[str, float]) -> None:
    """Statistics that keep activations in bounds, and heads (by pattern of their names) of some spread, so that scores
    differ."""
    torch.manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
            module.running_mean.normal_(std=0.1)
            torch.nn.init.uniform_(module.weight, 0.2 if name.endswith("bn3") else 0.8, 0.4 if "bn3" in name else 1.2)
        for pattern, std in spread.items():
            if re.search(pattern, name) and hasattr(module, "weight"):
                torch.nn.init.normal_(module.weight, std=std)
                torch.nn.init.normal_(module.bias, std=0.1)


@pytest.fixture(scope="module")
def retinanet(tmp_path_factory) -> Pair:
    theirs = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, **OPTIONS, num_classes=91)
    randomize(theirs, {r"head\.conv\.\d\.0": 0.03, "cls_logits": 0.03, "bbox_reg": 0.01})
    torch.nn.init.constant_(theirs.head.classification_head.cls_logits.bias, -4.0)
    return Pair(theirs, RETINANET, tmp_path_factory.mktemp("retinanet"))


def use_every_candidate(theirs: torch.nn.Module) -> None:
    for sampler in (theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image = 1_000_000


@pytest.fixture(scope="module")
def retinanet_v2(tmp_path_factory) -> Pair:
    theirs = detection.retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, **OPTIONS, num_classes=91)
    randomize(theirs, {"cls_logits": 0.03, "bbox_reg": 0.002})
    torch.nn.init.constant_(theirs.head.classification_head.cls_logits.bias, -4.0)
    return Pair(theirs, {}, tmp_path_factory.mktemp("retinanet_v2"), "retinanet/retinanet_R-50-FPN_v2_torchvision")


@pytest.fixture(scope="module")
def mask_rcnn_v2(tmp_path_factory) -> Pair:
    few = {"rpn_post_nms_top_n_train": FEW, "rpn_post_nms_top_n_test": FEW}
    theirs = detection.maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, **OPTIONS, **few)
    randomize(theirs, {"rpn.head.cls_logits": 0.05, "rpn.head.bbox_pred": 0.02, "cls_score": 0.3, "fcn_logits": 0.1})
    use_every_candidate(theirs)
    top = {"FPN_POST_NMS_TOP_N_TRAIN": FEW, "FPN_POST_NMS_TOP_N_TEST": FEW}
    # The norms of frozen stages keep their statistics here; torchvision's use the batch's.
    keys = {"MODEL": {"RPN": {**EVERY, **top}, "ROI_HEADS": EVERY, "BACKBONE": {"FREEZE_CONV_BODY_AT": 0}}}
    return Pair(theirs, keys, tmp_path_factory.mktemp("mask_v2"), "e2e_mask_rcnn_R_50_FPN_v2_torchvision")


@pytest.fixture(scope="module")
def keypoint_rcnn(tmp_path_factory) -> Pair:
    theirs = detection.keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None, **OPTIONS, num_classes=2)
    randomize(theirs, {"rpn.head.cls_logits": 0.05, "rpn.head.bbox_pred": 0.02, "cls_score": 0.1, "lowres": 0.2})
    use_every_candidate(theirs)
    return Pair(theirs, KEYPOINT, tmp_path_factory.mktemp("keypoint"))


@pytest.fixture(params=["retinanet", "retinanet_v2"])
def either(request) -> Pair:
    return request.getfixturevalue(request.param)


def test_retinanet_features_and_head(either):
    retinanet = either
    assert len(retinanet.features) == len(retinanet.their_features) == 5
    for ours, theirs in zip(retinanet.features, retinanet.their_features):
        close(ours, theirs)
    with torch.no_grad():
        logits, deltas, anchors = retinanet.ours.predict(retinanet.features, retinanet.padded)
        theirs = retinanet.theirs.head(retinanet.their_features)
    close(torch.cat(logits, 1), theirs["cls_logits"])
    close(torch.cat(deltas, 1), theirs["bbox_regression"])
    images, _ = retinanet.theirs.transform(list(retinanet.pixels))
    assert torch.equal(torch.cat(anchors), retinanet.theirs.anchor_generator(images, retinanet.their_features)[0])


def test_retinanet_detections(either):
    either.detections(least=100)


def test_retinanet_losses(either):
    theirs, ours = either.losses()
    assert float(ours["loss_retina_cls"]) == pytest.approx(float(theirs["classification"]), rel=1e-3)
    assert float(ours["loss_retina_reg"]) == pytest.approx(float(theirs["bbox_regression"]), rel=1e-3)


def test_keypoint_rcnn_features_and_heads(keypoint_rcnn):
    for ours, theirs in zip(keypoint_rcnn.features, keypoint_rcnn.their_features):
        close(ours, theirs)
    boxes = torch.tensor([[20.0, 30, 120, 150], [3.3, 4.4, 33.7, 21.2], [10, 0, 250, 190], [50, 60, 50.4, 61]])
    roi_heads = keypoint_rcnn.theirs.roi_heads
    named = dict(zip(["0", "1", "2", "3", "pool"], keypoint_rcnn.their_features))
    with torch.no_grad():
        pooled = roi_heads.keypoint_roi_pool(named, [boxes[:0], boxes], [SIZE, SIZE])
        theirs = roi_heads.keypoint_predictor(roi_heads.keypoint_head(pooled))
        head = keypoint_rcnn.ours.roi_heads["keypoint"]
        ours = head(keypoint_rcnn.features, boxes, torch.ones(4, dtype=torch.long))
    close(ours, theirs)
    points, peak = find_peaks(theirs, boxes)
    expected, logits = detection.roi_heads.keypointrcnn_inference(theirs, [boxes])
    torch.testing.assert_close(points, expected[0][..., :2], atol=1e-3, rtol=0)
    torch.testing.assert_close(peak, logits[0], atol=1e-3, rtol=1e-3)


def test_keypoint_rcnn_detections(keypoint_rcnn):
    keypoint_rcnn.detections(least=10)
    with torch.no_grad():
        ours, theirs = keypoint_rcnn.ours(keypoint_rcnn.images), keypoint_rcnn.theirs(list(keypoint_rcnn.pixels))
    for i, found in enumerate(theirs):
        for box, points in zip(found["boxes"], found["keypoints"]):
            same = box_ops.iou(ours.boxes[i], box[None])[:, 0] > 0.999
            distance = (ours.keypoints[i, same & ours.valid[i], :, :2] - points[:, :2]).abs().amax((1, 2))
            assert distance.min() < 0.05


def test_keypoint_rcnn_losses(keypoint_rcnn):
    points = torch.rand(2, 2, 17, 3, generator=torch.Generator().manual_seed(2)) * torch.tensor([200.0, 180, 3])
    points[..., 2] = points[..., 2].floor()
    theirs, ours = keypoint_rcnn.losses(points)
    renamed = {"loss_kp": "loss_keypoint"}
    assert len(ours) == len(theirs) == 5
    for name, loss in ours.items():
        assert float(loss) == pytest.approx(float(theirs[renamed.get(name, name)]), rel=1e-3), name


def test_mask_rcnn_v2(mask_rcnn_v2):
    """Features, the RPN's maps, detections and their masks."""
    for ours, theirs in zip(mask_rcnn_v2.features, mask_rcnn_v2.their_features):
        close(ours, theirs)
    with torch.no_grad():
        ours, theirs = (
            mask_rcnn_v2.ours.rpn.head(mask_rcnn_v2.features),
            mask_rcnn_v2.theirs.rpn.head(mask_rcnn_v2.their_features),
        )
    for our_maps, their_maps in zip(ours, theirs):
        for one, other in zip(our_maps, their_maps):
            close(one, other)
    mask_rcnn_v2.detections(least=10)
    masks(mask_rcnn_v2, mask_rcnn_v2.theirs)


def test_mask_rcnn_v2_losses(mask_rcnn_v2):
    """With batch norms frozen by eval(), and with the batch's own statistics in every norm."""
    bitmaps = torch.zeros(2, 2, *SIZE, dtype=torch.uint8)
    bitmaps[0, 0, 30:150, 20:110] = bitmaps[0, 1, 60:120, 90:180] = bitmaps[1, 0, 12:60, 60:100] = 1
    for statistics in (False, True):
        theirs, ours = mask_rcnn_v2.losses(statistics=statistics, masks=bitmaps)
        assert len(ours) == len(theirs) == 5
        for name, loss in ours.items():
            assert float(loss) == pytest.approx(float(theirs[name]), rel=1e-3), (name, statistics)


class Maps(IntermediateLayerGetter):
    def forward(self, x: Tensor) -> list[Tensor]:
        return list(super().forward(x).values())


def test_a_mobilenet_as_backbone(tmp_path):
    """torchvision's fasterrcnn_mobilenet_v3_large_fpn, put together of our parts and its body, with its weights."""
    theirs = detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None, **OPTIONS, num_classes=91)
    randomize(theirs, {"rpn.head.cls_logits": 0.05, "rpn.head.bbox_pred": 0.02, "cls_score": 3.0})
    body = copy.deepcopy(theirs.backbone.body)
    backbone = torch.nn.Sequential()
    backbone.body = Maps(body, dict(body.return_layers))
    backbone.fpn = FPN([160, 960], 256)
    anchors = AnchorGenerator(
        ((32, 64, 128, 256, 512),) * 3, (0.5, 1.0, 2.0), (32, 32, 64), rounding="corners", grid="image"
    )
    head, counts = RPNHead(256, anchors.per_position), {"pre_nms": (2000, 1000), "post_nms": (2000, 1000)}
    extractor, predictor = MLPFeatureExtractor(256, resolution=7), BoxPredictor(1024, classes=91)
    ours = RCNN(
        normalize=Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), bgr255=False),
        backbone=backbone,
        rpn=RPN(head, anchors, **counts, min_size=0.001, score_threshold=0.05),
        box_head=BoxHead(RoIPool((1 / 32, 1 / 32), 7, 2, aligned=False), extractor, predictor, compact=True),
    )
    pair = Pair(theirs, {}, tmp_path, ours=ours)
    for ours_map, their_map in zip(pair.features, pair.their_features):
        close(ours_map, their_map)
    pair.detections(least=10)


@pytest.mark.parametrize("name", ["fasterrcnn", "maskrcnn", "keypoint_rcnn", "retinanet"])
def test_our_weights_in_torchvisions_models(request, tmp_path, name):
    """Every tensor finds its place in a fresh model, and that finds what ours finds."""
    options = {"weights": None, "weights_backbone": None, **OPTIONS}
    if name in ("keypoint_rcnn", "retinanet"):
        pair = request.getfixturevalue(name)
        make = {"keypoint_rcnn": detection.keypointrcnn_resnet50_fpn, "retinanet": detection.retinanet_resnet50_fpn}
        make, classes = make[name], 2 if name == "keypoint_rcnn" else 91
    else:
        make, classes = getattr(detection, f"{name}_resnet50_fpn"), 91
        theirs = make(num_classes=classes, **options)
        randomize(theirs, {"rpn.head.cls_logits": 0.05, "rpn.head.bbox_pred": 0.02, "cls_score": 0.3})
        pair = Pair(theirs, {"MODEL": {"MASK_ON": name == "maskrcnn"}}, tmp_path)
    torch.manual_seed(7)
    fresh = make(num_classes=classes, **options)
    fresh.load_state_dict(from_ours(pair.ours.state_dict(), "ours", "torchvision").state, strict=True)
    before = pair.theirs
    pair.theirs = fresh.eval()
    pair.detections(least=10)
    if name == "maskrcnn":
        masks(pair, fresh)
    pair.theirs = before


def masks(pair: Pair, fresh: torch.nn.Module) -> None:
    """The mask head's logits of two boxes of the second image."""
    boxes, label = torch.tensor([[20.0, 30, 120, 150], [3.3, 4.4, 33.7, 21.2]]), torch.tensor([3, 90])
    named = dict(zip(["0", "1", "2", "3", "pool"], pair.their_features))
    with torch.no_grad():
        pooled = fresh.roi_heads.mask_roi_pool(named, [boxes[:0], boxes], [SIZE, SIZE])
        theirs = fresh.roi_heads.mask_predictor(fresh.roi_heads.mask_head(pooled))[torch.arange(2), label]
        close(pair.ours.roi_heads["mask"](pair.features, boxes, torch.ones(2, dtype=torch.long), label), theirs)
