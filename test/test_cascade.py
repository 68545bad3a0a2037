"""Cascade R-CNN: stages against naive ones, box by box, and what flows from stage to stage."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from reference import box_iou, decode, encode
from test_fixed_shapes import HostWaits
from test_keypoint_head import KEYPOINTS, keypoint_batch
from test_models import SMALL, TINY, make_batch, model_of, step

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.errors import ConfigError
from maskrcnn_benchmark.models.box_head import SampledRoIs
from maskrcnn_benchmark.models.cascade import refine, rematch
from maskrcnn_benchmark.structures import Proposals, Targets

CASCADE = [*TINY, "MODEL.CASCADE_ON", "True", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "64"]
KEY = "MODEL.ROI_BOX_CASCADE_HEAD."
AGNOSTIC = pytest.mark.parametrize("agnostic", ["True", "False"], ids=["agnostic", "class-wise"])


def cascade_of(*overrides: str, **device_changes):
    model = model_of(SMALL, [*CASCADE, *overrides], **device_changes)
    with torch.no_grad():  # fresh deltas are near 0: stages would move nothing
        for predictor in model.roi_heads["box"].predictor:
            predictor.bbox_pred.weight.normal_(std=0.5)
            predictor.cls_score.weight.normal_(std=0.5)
    return model


def made_proposals(targets: Targets, count: int = 40) -> Proposals:
    """Around the objects of make_batch, near and far."""
    generator = torch.Generator().manual_seed(5)
    corner = torch.rand(len(targets.valid), count, 2, generator=generator) * 40
    boxes = torch.cat((corner, corner + 8 + 30 * torch.rand(corner.shape, generator=generator)), -1)
    near = targets.boxes.repeat(1, count // 2 // targets.boxes.shape[1], 1)
    boxes[:, : near.shape[1]] = near + 6 * torch.rand(near.shape, generator=generator)
    valid = torch.arange(count).expand(boxes.shape[:2]) < count - 3
    return Proposals(boxes, torch.rand(boxes.shape[:2], generator=generator), valid)


def moved(box: list[float], delta: list[float], weights: tuple[float, ...], size: tuple[int, int]) -> list[float]:
    """One box by one stage, cut to the image."""
    limits = (size[1], size[0], size[1], size[0])
    return [min(max(v, 0), most) for v, most in zip(decode(delta, box, weights, math.log(1000 / 16)), limits)]


@AGNOSTIC
@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("compacts", [True, False])
@torch.no_grad()
def test_detections_are_those_of_stages_one_by_one(agnostic, average, compacts):
    """Boxes of the last stage, scores of all: each RoI alone through naive stages."""
    options = ("MODEL.CLS_AGNOSTIC_BBOX_REG", agnostic, KEY + "SCORE_AVERAGE", average)
    model = cascade_of(*options, compacts=compacts).eval()
    head, (images, targets) = model.roi_heads["box"], make_batch()
    features, _ = model.features(images)
    proposals = made_proposals(targets)
    boxes, scores, group, _ = head.candidates(features, proposals, images.sizes)
    classes = 3
    for image, k in ((0, 0), (0, 21), (1, 7), (2, 36)):
        box, seen = proposals.boxes[image, k].tolist(), []
        size = tuple(images.sizes[image].tolist())
        for stage, weights in enumerate(((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))):
            _, logits, deltas = head(features, torch.tensor([box]), torch.tensor([image]), stage)
            seen.append(logits[0] if average == "logits" else logits[0].softmax(0))
            deltas = deltas[0].view(-1, 4)
            likely = 1 + logits[0, 1:].argmax().item()
            last = [moved(box, deltas[min(c, len(deltas) - 1)].tolist(), weights, size) for c in range(classes + 1)]
            box = last[likely]
        mean = sum(seen) / 3
        mean = (mean.softmax(0) if average == "logits" else mean)[1:]
        rows = slice(k * classes, (k + 1) * classes)
        torch.testing.assert_close(scores[image, rows], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(boxes[image, rows], torch.tensor(last[1:]), rtol=1e-4, atol=2e-3)
        assert group[image, rows].tolist() == [0, 1, 2]


@AGNOSTIC
def test_losses_are_those_of_stages_one_by_one(agnostic):
    """Each stage matches the boxes that the one before made, against its own IoU; losses row by row."""
    model = cascade_of("MODEL.CLS_AGNOSTIC_BBOX_REG", agnostic, KEY + "IOUS", "(0.4,0.5,0.6)", compacts=False)
    head, (images, targets) = model.roi_heads["box"], make_batch()
    features, _ = model.features(images)
    first, losses = head.losses(features, made_proposals(targets), targets, images.sizes)
    assert len(first.refined) == 2
    stages, coders = (first, *first.refined), ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))
    for stage, (rois, coder, threshold, weight) in enumerate(zip(stages, coders, (0.4, 0.5, 0.6), (1, 0.5, 0.25))):
        classification = regression = count = positives = 0
        for image in range(3):
            truth = [b.tolist() for b, valid in zip(targets.boxes[image], targets.valid[image]) if valid]
            assert rois.positive[image].int().diff().max() <= 0, "positives must come first"
            for box, valid in zip(rois.boxes[image].tolist(), rois.valid[image]):
                if not valid:
                    continue
                overlaps = [box_iou(box, t) for t in truth]
                best = max(range(len(truth)), key=overlaps.__getitem__) if truth else 0
                label = int(targets.labels[image, best]) if truth and overlaps[best] >= threshold else 0
                _, logits, deltas = head(features, torch.tensor([box]), torch.tensor([image]), stage)
                classification += F.cross_entropy(logits, torch.tensor([label])).item()
                count += 1
                if label:
                    positives += 1
                    delta = deltas[0].view(-1, 4)[min(label, deltas.shape[1] // 4 - 1)]
                    regression += naive_smooth_l1(delta.tolist(), box, truth[best], coder)
        assert positives > 0
        assert losses[f"loss_classifier_stage{stage}"].item() == pytest.approx(
            weight * classification / count, rel=1e-4
        )
        assert losses[f"loss_box_reg_stage{stage}"].item() == pytest.approx(weight * regression / count, rel=1e-3)


def naive_smooth_l1(delta: list[float], box: list[float], truth: list[float], coder: tuple[float, ...]) -> float:
    wanted = encode(truth, box, coder)
    distances = [abs(d - t) for d, t in zip(delta, wanted)]
    return sum(0.5 * d * d if d < 1 else d - 0.5 for d in distances)


def test_refined_rois_are_the_boxes_that_the_stage_before_made():
    model = cascade_of(compacts=True)
    head, (images, targets) = model.roi_heads["box"], make_batch()
    features, _ = model.features(images)
    first, _ = head.losses(features, made_proposals(targets), targets, images.sizes)
    _, rows = first.flatten(True)
    _, logits, deltas = head(features, rows.boxes, rows.image, 0)
    boxes = refine(rows.boxes, logits, deltas, (10, 10, 5, 5), images.sizes[rows.image], rows.labels)
    for image in range(3):
        made = boxes[rows.image == image]
        inside = made[(made[:, 2:] > made[:, :2]).all(1)]
        kept = first.refined[0].boxes[image][first.refined[0].valid[image]]
        assert len(kept) == len(inside) < 64
        torch.testing.assert_close(kept.sort(0).values, inside.sort(0).values)


def test_rematch_by_hand():
    """IoU .5 with the second object is enough at .5, not at .6; the empty box drops out; positives come first."""
    targets = Targets(
        boxes=torch.tensor([[[0.0, 0, 10, 10], [20, 0, 30, 10]]]), labels=torch.tensor([[3, 2]]),
        valid=torch.tensor([[True, True]]),
    )  # fmt: skip
    boxes = torch.tensor([[[50.0, 50, 60, 60], [20, 0, 30, 5], [7, 7, 7, 9], [0, 0, 10, 10], [0, 0, 0, 0]]])
    zeros = torch.zeros(1, 5, dtype=torch.long)
    rois = SampledRoIs(boxes, torch.tensor([[True] * 4 + [False]]), zeros > 0, zeros, zeros, boxes)
    loose, strict = (rematch(rois, boxes, targets, threshold) for threshold in (0.5, 0.6))
    assert loose.boxes[0, :3].tolist() == [[20, 0, 30, 5], [0, 0, 10, 10], [50, 50, 60, 60]]
    assert loose.positive.tolist() == [[True, True, False, False, False]]
    assert loose.labels.tolist() == [[2, 3, 0, 0, 0]] and loose.valid.tolist() == [[True, True, True, False, False]]
    assert loose.wanted[0, :2].tolist() == [[20, 0, 30, 10], [0, 0, 10, 10]]
    assert strict.labels.tolist() == [[3, 0, 0, 0, 0]]


def test_refined_boxes_by_hand():
    """A 10 x 20 box: half its width to the right, twice its height, and cut where its own image of 30 x 12 ends. Labels
    choose the deltas; where one is 0, the likelier class does."""
    box = torch.tensor([[0.0, 0, 10, 20]]).expand(3, 4)
    logits = torch.tensor([[9.0, 0, 1], [9, 1, 0], [9, 0, 1]])
    deltas = torch.zeros(3, 12)
    deltas[:, 8:] = torch.tensor([5.0, 0, 0, 5 * math.log(2)])  # class 2, in the coder's units
    sizes = torch.tensor([[30, 12], [30, 12], [100, 100]])
    stay, cut, whole = [0, 0, 10, 20], [5, 0, 12, 30], [5, 0, 15, 30]
    moved = refine(box, logits, deltas, (10, 10, 5, 5), sizes, torch.tensor([1, 2, 0]))
    torch.testing.assert_close(moved, torch.tensor([stay, cut, whole], dtype=torch.float32))
    moved = refine(box, logits, deltas, (10, 10, 5, 5), sizes)
    torch.testing.assert_close(moved, torch.tensor([cut, stay, whole], dtype=torch.float32))


@pytest.mark.parametrize("legacy", [True, False])
def test_a_box_moved_out_of_its_image_keeps_a_pixel_by_upstreams_arithmetic(legacy):
    """100 widths and heights to the right and down; without that arithmetic it has no inside and drops out."""
    model = cascade_of("MODEL.LEGACY_PLUS_ONE", str(legacy))
    head, (images, targets) = model.roi_heads["box"], make_batch()
    with torch.no_grad():
        head.predictor[0].bbox_pred.weight.zero_()
        head.predictor[0].bbox_pred.bias.copy_(torch.tensor([1000.0, 1000, 0, 0]).repeat(4))
    features, _ = model.features(images)
    proposals = Proposals(targets.boxes, torch.ones(3, 2), targets.valid)
    first, _ = head.losses(features, proposals, targets, images.sizes)
    second = first.refined[0]
    assert torch.equal(second.valid.sum(1), first.valid.sum(1) * legacy)
    corner = images.sizes.flip(1).float()[:, None]
    expected = torch.cat((corner - 1, corner), -1).expand_as(second.boxes)
    assert torch.equal(second.boxes[second.valid], expected[second.valid])


def test_keypoints_and_an_auxiliary_head_follow_a_cascade():
    model = cascade_of(
        *KEYPOINTS, "MODEL.AUG_FPN.CONSISTENT_SUPERVISION", "True", "MODEL.ROI_HEADS.SCORE_THRESH", "0.0"
    )
    losses, gradients = step(model, keypoint_batch())
    assert losses["loss_kp"] > 0 and losses["loss_classifier_auxiliary"] > 0
    assert gradients["roi_heads.keypoint.predictor.kps_score_lowres.weight"].any()
    with torch.no_grad():
        detections = model.eval()(keypoint_batch()[0])
    assert detections.keypoints.shape == (3, 100, 5, 3) and detections.keypoints[detections.valid].any()


def test_one_stage_is_the_plain_head():
    single = [KEY + "IOUS", "(0.5,)", KEY + "BBOX_REG_WEIGHTS", "((10,10,5,5),)", KEY + "LOSS_WEIGHTS", "(1.0,)"]
    cascade = model_of(SMALL, [*CASCADE, *single])
    plain = model_of(SMALL, [*CASCADE, "MODEL.CASCADE_ON", "False"])
    state = {name.replace("extractor.0.", "extractor.").replace("predictor.0.", "predictor."): tensor
             for name, tensor in cascade.state_dict().items()}  # fmt: skip
    plain.load_state_dict(state)
    ours, theirs = step(cascade, make_batch())[0], step(plain, make_batch())[0]
    assert {name.removesuffix("_stage0"): loss for name, loss in ours.items()} == pytest.approx(theirs, rel=1e-6)


def test_boxes_carry_no_gradient_and_the_pyramid_gets_its_share():
    gradients = {}
    for share in ("1.0", "0.25"):
        model = cascade_of(KEY + "FEATURE_GRADIENT", share)
        torch.manual_seed(1)
        losses = model(*make_batch())
        sum(loss for name, loss in losses.items() if name.endswith("stage1")).backward()
        head = model.roi_heads["box"]
        assert not any(p.grad is not None and p.grad.any() for p in head.predictor[0].parameters())
        gradients[share] = (head.feature_extractor[1].fc6.weight.grad, model.backbone.fpn.fpn_inner2[0].weight.grad)
    (fc, fpn), (fc_quarter, fpn_quarter) = gradients.values()
    assert fc.any() and fpn.any()
    torch.testing.assert_close(fc_quarter, fc)
    torch.testing.assert_close(fpn_quarter, 0.25 * fpn)


PER_STAGE = ("MODEL.ROI_MASK_HEAD.PER_STAGE", "True")


def test_padding_dropped_or_kept_gives_the_same_losses_and_gradients():
    results = []
    for compacts in (True, False):
        loose = (KEY + "IOUS", "(0.3, 0.2, 0.1)")  # fresh stages move boxes away from the objects
        model = cascade_of(*PER_STAGE, *loose, "MODEL.RPN.NMS_THRESH", "0.3", compacts=compacts)
        results.append(step(model, make_batch()))
    (losses, gradients), (padded, expected) = results
    assert losses == pytest.approx(padded, rel=1e-4)
    assert {f"loss_mask_stage{stage}" for stage in range(3)} < losses.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 1e-4 * gradient.abs().max(), name
    still = [name for name, g in gradients.items() if name.startswith("roi_heads") and not g.any()]
    assert not still


def test_masks_are_the_mean_of_the_stages_heads():
    model = cascade_of(*PER_STAGE, "MODEL.ROI_HEADS.SCORE_THRESH", "0.0").eval()
    images, _ = make_batch()
    head = model.mask_head
    with torch.no_grad():
        features, _ = model.features(images)
        detections = model(images)
        masks = detections.masks
        bare = [dataclasses.replace(detections, masks=None) for _ in head.stages]
        apart = [stage.detect(features, one).masks for stage, one in zip(head.stages, bare)]
    assert not torch.equal(apart[0], apart[1])
    torch.testing.assert_close(masks, (apart[0] + apart[1] + apart[2]) / 3)


def test_each_stages_mask_head_learns_the_stages_own_rois():
    model = cascade_of(*PER_STAGE)
    seen = []
    for stage in model.mask_head.stages:
        losses = stage.losses
        stage.losses = lambda features, chosen, targets, losses=losses: (
            seen.append(chosen) or losses(features, chosen, targets)
        )
    taken = []
    learn = model.roi_heads["box"].losses
    model.roi_heads["box"].losses = lambda *inputs: taken.append(learn(*inputs)) or taken[0]
    model(*make_batch())
    first = taken[0][0]
    assert [id(rois) for rois in seen] == [id(rois) for rois in (first, *first.refined)]


@pytest.mark.parametrize("compacts", [True, False])
def test_images_without_objects_give_finite_losses_and_every_gradient(compacts):
    losses, gradients = step(cascade_of(*PER_STAGE, compacts=compacts), make_batch((0, 0)))
    assert all(math.isfinite(loss) for loss in losses.values())
    assert losses["loss_box_reg_stage2"] == losses["loss_mask_stage2"] == 0
    assert all(g is not None and g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize("composites", [False, True], ids=["native", "composite"])
def test_a_step_never_waits_for_the_device(composites):
    small = ("MODEL.RPN.PRE_NMS_TOP_N_TRAIN", "50", "MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN", "50")
    model = cascade_of(*PER_STAGE, *small, KEY + "FEATURE_GRADIENT", "0.3", compacts=False)
    batch = make_batch()
    model(*batch)  # anchors are made once
    with HostWaits(composites) as waits:
        sum(model(*batch).values()).backward()
    assert not waits.found


def test_the_training_forward_compiles_as_one_graph():
    model = cascade_of(*PER_STAGE, KEY + "FEATURE_GRADIENT", "0.5", compacts=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    assert step(compiled, make_batch())[0] == pytest.approx(step(model, make_batch())[0], rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([KEY + "IOUS", "(0.5, 0.6)"], "BBOX_REG_WEIGHTS has 3 stages, but IOUS has 2"),
        ([KEY + "LOSS_WEIGHTS", "(1.0,)"], "LOSS_WEIGHTS has 1 stages"),
        ([KEY + "BBOX_REG_WEIGHTS", "((10,10,5),(1,1,1,1),(1,1,1,1))"], "at least 4"),
        ([KEY + "SCORE_AVERAGE", "mean"], "probabilities, logits"),
        (["MODEL.RPN_ONLY", "True"], "CASCADE_ON and MODEL.RPN_ONLY are both True"),
        (["MODEL.ROI_MASK_HEAD.PER_STAGE", "True", "MODEL.CASCADE_ON", "False"], "CASCADE_ON is False"),
    ],
)
def test_stages_that_do_not_fit_are_errors(overrides, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        get_config(SMALL, [*CASCADE, *overrides])


def test_a_cascade_needs_a_pyramid():
    with pytest.raises(ConfigError, match="CASCADE_ON needs a body with FPN, not R-50-C4"):
        get_config(overrides=["MODEL.CASCADE_ON", "True"])
