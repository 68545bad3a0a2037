"""Upstream maskrcnn-benchmark's own arithmetic (configs/conventions/maskrcnn_benchmark.yaml) against its own numbers.

Its boxes name the first and the last pixel; here they end where the last pixel ends, so that `from_inclusive` and
`to_inclusive` stand wherever its boxes meet ours, and nowhere else.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED
from test_fixtures import POLYGONS, Peer, close, pack, peer_state, subsample
from torch import Tensor

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.evaluation.results import detections_to_results
from maskrcnn_benchmark.models.build import build_model
from maskrcnn_benchmark.ops.boxes import from_inclusive, to_inclusive
from maskrcnn_benchmark.ops.rle import decode_rle
from maskrcnn_benchmark.structures import ImageBatch, Targets

CONVENTION = ROOT / "configs" / "conventions" / "maskrcnn_benchmark.yaml"
WHOLE_MODELS = sorted(path.stem for path in (SHARED / "fixtures").glob("maskrcnn_benchmark_e2e_mask_*.json"))


@pytest.fixture(scope="module", params=WHOLE_MODELS or ["none"])
def upstream(request, shared) -> Peer:
    folder, name = shared / "fixtures", request.param
    if name == "none":
        pytest.skip(f"{folder} has no whole model of maskrcnn-benchmark")
    meta = json.loads((folder / f"{name}.json").read_text())["meta"]
    overrides = [str(part) for pair in meta["overrides"].items() for part in pair]
    cfg = get_config(ROOT / meta["config"], ["_BASE_", str(CONVENTION), "MODEL.WEIGHT", "", *overrides])
    model = build_model(cfg, get_device("cpu"))
    model.load_state_dict(peer_state(folder, name))
    arrays = dict(np.load(folder / f"{name}.npz"))
    pixels = torch.from_numpy(arrays["image_bgr255"]).flip(0)
    size = tuple(pixels.shape[-2:])
    images = ImageBatch(pixels[None], torch.tensor([size]), [size], [1])
    model.eval()
    with torch.no_grad():
        features = model.features(images)[0]
    return Peer(name, model, images, arrays, features)


def test_features_and_rpn_head(upstream):
    with torch.no_grad():
        logits, deltas = upstream.model.rpn.head(upstream.features)
    for level, feature in enumerate(upstream.features):
        step = 4 if level < 2 else 1
        close(subsample(feature), upstream.tensor(f"feature_{level}"))
        close(logits[level][:, :, ::step, ::step], upstream.tensor(f"objectness_{level}"))
        close(deltas[level][:, :, ::step, ::step], upstream.tensor(f"deltas_{level}"))


def match_rows(ours: Tensor, theirs: Tensor, tolerance: float = 0.01) -> Tensor:
    """For each row of `theirs` [N, C] the row of `ours` [N, C] within `tolerance` in every column: a permutation."""
    assert ours.shape == theirs.shape
    distance = (ours[:, None] - theirs).abs().amax(-1)
    nearest = distance.argmin(0)
    assert distance.amin(0).max() < tolerance
    assert len(nearest.unique()) == len(ours)
    return nearest


def test_proposals(upstream):
    with torch.no_grad():
        proposals, _ = upstream.model.rpn(upstream.features, upstream.images.pixels.shape[-2:], upstream.images.sizes)
    boxes, scores = (x[0][proposals.valid[0]] for x in (proposals.boxes, proposals.scores))
    theirs = upstream.tensor("proposals")
    order = match_rows(to_inclusive(boxes), theirs)
    torch.testing.assert_close(scores[order], upstream.tensor("proposal_scores"), atol=1e-5, rtol=0)


def test_heads(upstream):
    boxes = from_inclusive(upstream.tensor("boxes"))
    image_index, label = torch.zeros(len(boxes), dtype=torch.long), torch.full((len(boxes),), 3)
    box_head, mask_head = upstream.model.roi_heads["box"], upstream.model.roi_heads["mask"]
    with torch.no_grad():
        pooled = box_head.pool(upstream.features, boxes, image_index)
        _, logits, deltas = box_head(upstream.features, boxes, image_index)
        masks = mask_head(upstream.features, boxes, image_index, label)
    close(pooled[:, ::32], upstream.tensor("box_pooled"))
    close(logits, upstream.tensor("class_logits"))
    close(deltas, upstream.tensor("box_regression"))
    close(masks, upstream.tensor("mask_logits_class3").reshape(masks.shape))


def test_detections(upstream):
    with torch.no_grad():
        found = upstream.model(upstream.images)
    columns = [to_inclusive(found.boxes[0]), 1000 * found.labels[0][:, None], 100 * found.scores[0][:, None]]
    theirs = [upstream.tensor("det_boxes"), *(upstream.tensor(f"det_{k}")[:, None] for k in ("labels", "scores"))]
    theirs = torch.cat([theirs[0], 1000 * theirs[1], 100 * theirs[2]], 1)
    order = match_rows(torch.cat(columns, 1)[found.valid[0]], theirs)
    wanted = upstream.tensor("det_mask_probs")
    close(found.masks[0][order][: len(wanted)], wanted.reshape(-1, *found.masks.shape[-2:]))
    results = detections_to_results(found, upstream.images, list(range(1, 81)), 0.5, True, True)
    masks = np.stack([decode_rle(rle) for rle in results.rles()]).astype(bool)
    assert (masks[order[: len(wanted)]] == upstream.arrays["det_masks"]).all()


def test_losses(upstream):
    labels = upstream.tensor("gt_labels").long()[None]
    boxes = from_inclusive(upstream.tensor("gt_boxes"))[None]
    targets = Targets(boxes, labels, torch.ones_like(labels, dtype=torch.bool), pack(POLYGONS))
    upstream.model.train()
    with torch.no_grad():
        losses = upstream.model(upstream.images, targets)
    upstream.model.eval()
    theirs = {name: float(upstream.arrays[f"loss/{name}"]) for name in losses}
    assert {f"loss/{name}" for name in losses} == {key for key in upstream.arrays if key.startswith("loss/")}
    assert {name: float(loss) for name, loss in losses.items()} == pytest.approx(theirs, rel=1e-5)
