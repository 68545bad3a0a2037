"""What a key chooses in the heads: losses, which negatives are sampled, suppression, and heads for other classes."""

from __future__ import annotations

import logging
import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fixed_shapes import HostWaits
from test_keypoint_head import KEYPOINTS
from test_models import SMALL, TINY, make_batch, model_of, step

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.errors import CheckpointError, ConfigError
from maskrcnn_benchmark.models.losses import box_loss, objectness_loss
from maskrcnn_benchmark.models.sampling import overlap_groups, sample
from maskrcnn_benchmark.models.weights import load_weights
from maskrcnn_benchmark.structures import Proposals, Targets

HEADS, BOX, RPN = "MODEL.ROI_HEADS.", "MODEL.ROI_BOX_HEAD.", "MODEL.RPN."


def test_box_losses_by_hand():
    """The anchor itself, 10 x 10, where 10 x 20 was due: IoU .5, all of the enclosing box covered; centres 5 apart on a
    diagonal of sqrt(500); angles of 45 degrees and atan(1/2)."""
    zero, anchor, wanted = torch.zeros(1, 4), torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 10, 20]])
    v = 4 / math.pi**2 * (math.pi / 4 - math.atan(0.5)) ** 2
    expected = {
        "SmoothL1Loss": (5 - 0.5) + (5 * math.log(2) - 0.5),  # dy = 10 * 5 / 10, dh = 5 log 2
        "GIoULoss": 0.5,
        "DIoULoss": 0.5 + 25 / 500,
        "CIoULoss": 0.5 + 25 / 500 + v * v / (0.5 + v),
    }
    for kind, loss in expected.items():
        assert box_loss(kind, zero, anchor, wanted, (10, 10, 5, 5)).item() == pytest.approx(loss, rel=1e-5), kind


def test_the_key_chooses_the_box_loss_and_its_weight():
    """Of the same predictions; against naive overlaps of the boxes that they make."""
    losses = {}
    for kind, weight in (("SmoothL1Loss", "1.0"), ("GIoULoss", "1.0"), ("DIoULoss", "1.0"), ("CIoULoss", "10.0")):
        model = model_of(SMALL, [*TINY, BOX + "BBOX_LOSS", kind, BOX + "BBOX_LOSS_WEIGHT", weight], compacts=False)
        head, (images, targets) = model.roi_heads["box"], make_batch()
        torch.manual_seed(1)
        features, padded = model.features(images)
        proposals, _ = model.rpn(features, padded, images.sizes)
        chosen = head.sample(proposals, targets)
        *_, deltas, losses[kind] = head.learn(features, chosen, head.reg_weights)
    overlap = {"GIoULoss": reference.box_giou, "DIoULoss": reference.box_diou, "CIoULoss": reference.box_ciou}
    rows = zip(chosen.boxes.flatten(0, 1), chosen.wanted.flatten(0, 1), chosen.labels.flatten(), deltas.view(-1, 4, 4))
    made = []
    for box, wanted, label, delta in rows:
        if label:
            made.append((reference.decode(delta[label].tolist(), box.tolist(), (10, 10, 5, 5), 4.0), wanted.tolist()))
    assert made
    for kind, function in overlap.items():
        weight = 10 if kind == "CIoULoss" else 1
        expected = weight * sum(1 - function(*pair) for pair in made) / chosen.valid.sum().item()
        assert losses[kind]["loss_box_reg"].item() == pytest.approx(expected, rel=1e-4), kind
        assert losses[kind]["loss_classifier"].item() == losses["SmoothL1Loss"]["loss_classifier"].item()


@pytest.mark.parametrize("kind", ["GIoULoss", "DIoULoss", "CIoULoss"])
@pytest.mark.parametrize("counts", [(2, 0, 1), (0, 0)])
def test_box_losses_stay_finite_and_in_the_graph(kind, counts):
    losses, gradients = step(model_of(SMALL, [*TINY, BOX + "BBOX_LOSS", kind], compacts=False), make_batch(counts))
    assert all(map(math.isfinite, losses.values())) and (losses["loss_box_reg"] > 0) == any(counts)
    assert all(g is not None and g.isfinite().all() for g in gradients.values())


def test_focal_objectness_is_the_naive_one_over_the_positives():
    logits = torch.tensor([[2.0, -1.0, 0.5, 9.0], [0.0, -3.0, 1.0, 1.0]])
    positive = torch.tensor([[True, False, False, False], [True, False, False, False]])
    valid = torch.tensor([[True, True, True, False], [True, True, False, False]])
    rows = [(x, int(p)) for x, p, v in zip(logits.flatten().tolist(), positive.flatten(), valid.flatten()) if v]
    naive = reference.sigmoid_focal_loss([[x] for x, _ in rows], [label for _, label in rows], 1.5, 0.3)
    ours = objectness_loss(logits, positive, valid, normalizer=100, focal=(0.3, 1.5))
    assert ours.item() == pytest.approx(sum(naive) / 2, rel=1e-5)
    none = objectness_loss(logits, positive & False, valid, 100, (0.3, 1.5))
    assert none.item() == pytest.approx(sum(reference.sigmoid_focal_loss([[x] for x, _ in rows], [0] * 5, 1.5, 0.3)))


def test_the_keys_choose_the_objectness_loss():
    focal = (RPN + "CLS_LOSS", "SigmoidFocalLoss")
    settings_ = {"entropy": (), "focal": focal, "sharper": (*focal, RPN + "FOCAL_LOSS_GAMMA", "4.0")}
    settings_["balanced"] = (*focal, RPN + "FOCAL_LOSS_ALPHA", "0.75")
    losses = {name: step(model_of(SMALL, [*TINY, *keys]), make_batch())[0] for name, keys in settings_.items()}
    assert len({values["loss_objectness"] for values in losses.values()}) == 4
    assert len({values["loss_rpn_box_reg"] for values in losses.values()}) == 1
    assert losses["sharper"]["loss_objectness"] < losses["focal"]["loss_objectness"]


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from([1, 0, 0, 0, -1]), st.integers(0, 2)), min_size=6, max_size=40),
    size=st.integers(1, 30),
    fraction=st.sampled_from([0.0, 0.25, 0.5]),
)
def test_equal_shares_of_negatives(rows, size, fraction):
    """As many of each group as there is room for or are there, and the rest from any."""
    labels, groups = (torch.tensor([column]) for column in zip(*rows))
    chosen = sample(labels, size, fraction, groups)
    taken = [chosen.index[0, i].item() for i in range(chosen.index.shape[1]) if chosen.valid[0, i]]
    assert len(set(taken)) == len(taken) and all(rows[i][0] >= 0 for i in taken)
    positives = sum(rows[i][0] == 1 for i in taken)
    assert positives == min(int(size * fraction), sum(label == 1 for label, _ in rows)) == chosen.positive.sum()
    assert all(rows[i][0] == 1 for i in taken[:positives])
    room = min(size, len(rows)) - positives
    there = [sum(row == (0, group) for row in rows) for group in range(3)]
    assert len(taken) - positives == min(room, sum(there))
    for group in range(3):
        assert sum(rows[i] == (0, group) for i in taken) >= min(room // 3, there[group])


def test_shares_are_of_the_room_that_positives_leave():
    """Six of twelve are positive: two negatives of each group, whatever the keys."""
    labels = torch.tensor([[1] * 6 + [0] * 30])
    groups = torch.tensor([[0] * 6 + [0, 1, 2] * 10])
    for seed in range(20):
        torch.manual_seed(seed)
        chosen = sample(labels, 12, 0.5, groups)
        assert groups[0, chosen.index[0, 6:]].bincount().tolist() == [2, 2, 2]


def test_overlaps_fall_into_thirds_by_hand():
    """IoU .1, .2, .45 below a limit of .5, and .9 beyond it."""
    truth = torch.tensor([[[0.0, 0, 10, 10]]]).expand(1, 5, 4)
    boxes = torch.tensor([[[0.0, 0, 10, 1], [0, 0, 10, 2], [0, 0, 10, 4.5], [0, 0, 10, 9], [50, 50, 60, 60]]])
    assert overlap_groups(boxes, truth, 0.5).tolist() == [[0, 1, 2, 2, 0]]


def test_libra_samples_hard_negatives():
    """200 proposals far away and six at IoU .4: chance takes few of those, equal shares all."""
    far = torch.tensor([60.0, 60, 70, 70]).expand(1, 200, 4)
    hard = torch.tensor([10.0, 10, 20, 14]).expand(1, 6, 4)
    boxes = torch.cat((far, hard), 1)
    proposals = Proposals(boxes, torch.ones(1, 206), torch.ones(1, 206, dtype=torch.bool))
    targets = Targets(torch.tensor([[[10.0, 10, 20, 20]]]), torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.bool))
    hard_ones = {}
    for name in ("BBoxAssigner", "LibraBBoxAssigner"):
        keys = [HEADS + "BBOX_ASSIGNER", name, HEADS + "BATCH_SIZE_PER_IMAGE", "32"]
        head = model_of(SMALL, [*TINY, *keys], compacts=False).roi_heads["box"]
        torch.manual_seed(0)
        with HostWaits() as waits:
            chosen = head.sample(proposals, targets)
        assert not waits.found
        assert chosen.boxes.shape == (1, 32, 4) and chosen.valid.all() and chosen.positive.sum() == 1
        hard_ones[name] = (chosen.boxes[0, :, 3] == 14).sum().item()
    assert hard_ones["LibraBBoxAssigner"] == 6 > 3 > hard_ones["BBoxAssigner"]


def select(*overrides: str, second: tuple[float, ...] = (2.5, 0, 12.5, 10)):
    """Left sides and scores of what is kept of three boxes of one class. The second overlaps the first by IoU .6, the
    third touches none."""
    head = model_of(SMALL, [*TINY, *overrides]).roi_heads["box"]
    boxes = torch.tensor([[[0.0, 0, 10, 10], second, [50, 50, 60, 60]]])
    scores, group = torch.tensor([[0.9, 0.8, 0.06]]), torch.zeros(1, 3, dtype=torch.long)
    detections = head.select(boxes, scores, group, scores > 0.05)
    return detections.boxes[detections.valid][:, 0].tolist(), detections.scores[detections.valid].tolist()


def test_the_key_chooses_the_suppression():
    assert select() == ([0, 50], pytest.approx([0.9, 0.06]))
    # the centres are 2.5 apart on a diagonal of sqrt(12.5^2 + 10^2): DIoU = CIoU = .6 - 6.25 / 256.25 = .5756
    assert select(HEADS + "NMS_TYPE", "MultiClassCiouNMS") == select()
    assert select(HEADS + "NMS", "0.59") == select()
    places, scores = select(HEADS + "NMS_TYPE", "MultiClassCiouNMS", HEADS + "NMS", "0.59")
    assert places == [0, 2.5, 50] and scores == pytest.approx([0.9, 0.8, 0.06])
    # IoU .7, DIoU .7 - 2.25 / 200 = .6888, CIoU .6883: the aspect ratios count
    low = {"second": (0, 0, 10, 7)}
    assert select(HEADS + "NMS_TYPE", "MultiClassCiouNMS", HEADS + "NMS", "0.6885", **low)[0] == [0, 0, 50]
    assert select(HEADS + "NMS_TYPE", "MultiClassCiouNMS", HEADS + "NMS", "0.688", **low)[0] == [0, 50]
    for sigma in (0.5, 0.2):
        places, scores = select(HEADS + "NMS_TYPE", "MultiClassSoftNMS", HEADS + "SOFT_NMS_SIGMA", str(sigma))
        assert places == [0, 2.5, 50]
        assert scores == pytest.approx([0.9, 0.8 * math.exp(-(0.6**2) / sigma), 0.06])
    # whose score falls below the threshold drops out
    assert select(HEADS + "NMS_TYPE", "MultiClassSoftNMS", HEADS + "SOFT_NMS_SIGMA", "0.1")[0] == [0, 50]


@pytest.mark.parametrize("name", ["MultiClassSoftNMS", "MultiClassCiouNMS"])
def test_a_whole_model_suppresses_by_it(name):
    keys = [HEADS + "SCORE_THRESH", "0.0", HEADS + "NMS", "0.3"]
    images, _ = make_batch()
    with torch.no_grad():
        plain, other = (
            model_of(SMALL, [*TINY, *keys, HEADS + "NMS_TYPE", n]).eval()(images) for n in ("MultiClassNMS", name)
        )
    assert not torch.equal(plain.boxes, other.boxes)
    assert (other.scores.diff(dim=1)[other.valid[:, 1:]] <= 0).all() and other.valid.all(1).any()


def test_numbers_kept_before_and_after_suppression():
    """PaddleX's test_pre_nms_top_n, test_post_nms_top_n, keep_top_k and score_threshold."""
    images, _ = make_batch()

    def proposed(*overrides: str):
        model = model_of(SMALL, [*TINY, HEADS + "SCORE_THRESH", "0.0", *overrides]).eval()
        with torch.no_grad():
            features, padded = model.features(images)
            return model.rpn(features, padded, images.sizes)[0].valid.sum(1).max().item(), model(images)

    many, detections = proposed()
    assert many > 40 and detections.boxes.shape[1] == 100
    assert proposed(RPN + "PRE_NMS_TOP_N_TEST", "3")[0] <= 5 * 3
    assert proposed(RPN + "FPN_POST_NMS_TOP_N_TEST", "7")[0] == 7
    few = proposed(HEADS + "DETECTIONS_PER_IMG", "9")[1]
    assert few.boxes.shape[1] == 9 and torch.equal(few.scores, detections.scores[:, :9])
    threshold = detections.scores[0, 20].item()
    sure = proposed(HEADS + "SCORE_THRESH", repr(threshold))[1]
    assert sure.valid[0].sum() < 100 and sure.scores[sure.valid].min() > threshold


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (RPN + "CLS_LOSS", "FocalLoss", "SigmoidCrossEntropy, SigmoidFocalLoss"),
        (RPN + "FOCAL_LOSS_ALPHA", "2.0", "must be 0..1"),
        (BOX + "BBOX_LOSS", "IoULoss", "CIoULoss"),
        (HEADS + "NMS_TYPE", "SoftNMS", "MultiClassSoftNMS"),
        (HEADS + "SOFT_NMS_SIGMA", "0.0", "must be above 0"),
        (HEADS + "BBOX_ASSIGNER", "Libra", "LibraBBoxAssigner"),
    ],
)
def test_a_wrong_choice_is_an_error_that_names_the_right_ones(key, value, message):
    with pytest.raises(ConfigError, match=message):
        get_config(SMALL, [key, value])


def test_heads_for_other_classes_start_fresh_and_are_named(tmp_path, caplog):
    """From 4 classes to 3: only the layers a class are dropped; everything else is the file's."""
    trained = model_of(SMALL, TINY)
    torch.save({"model": trained.state_dict()}, tmp_path / "trained.pth")
    model = model_of(SMALL, [*TINY, BOX + "NUM_CLASSES", "3"])
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="NUM_CLASSES"):
        load_weights(model, str(tmp_path / "trained.pth"))
    with caplog.at_level(logging.WARNING):
        load_weights(model, str(tmp_path / "trained.pth"), replace_heads=True)
    layers = ("box.predictor.cls_score", "box.predictor.bbox_pred", "mask.predictor.mask_fcn_logits")
    dropped = {f"roi_heads.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name in dropped else trained.state_dict()[name]), name
        assert (name in caplog.text) == (name in dropped)
    assert "(4, 64) there and (3, 64) here" in caplog.text


def test_class_layers_that_fit_are_kept(tmp_path):
    """One box regression for all classes is the same for three classes as for four."""
    agnostic = [*TINY, "MODEL.CLS_AGNOSTIC_BBOX_REG", "True"]
    trained, model = model_of(SMALL, agnostic), model_of(SMALL, [*agnostic, BOX + "NUM_CLASSES", "3"])
    layer = trained.roi_heads["box"].predictor.bbox_pred
    torch.nn.init.constant_(layer.bias, 7.0)
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    load_weights(model, str(tmp_path / "trained.pth"), replace_heads=True)
    assert torch.equal(model.roi_heads["box"].predictor.bbox_pred.bias, layer.bias)


def test_retinanets_class_layer_is_one_of_them(tmp_path):
    keys = [
        *("MODEL.RETINANET_ON", "True", "MODEL.MASK_ON", "False", "MODEL.BACKBONE.CONV_BODY", "R-18-FPN-RETINANET"),
        *("MODEL.RPN.USE_FPN", "True", "MODEL.ROI_HEADS.USE_FPN", "False", "MODEL.RETINANET.NUM_CLASSES"),
    ]
    trained, model = (model_of(SMALL, [*TINY, *keys, classes]) for classes in ("4", "3"))
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    load_weights(model, str(tmp_path / "trained.pth"), replace_heads=True)
    assert torch.equal(model.rpn.head.cls_tower[0].weight, trained.rpn.head.cls_tower[0].weight)
    assert len(model.rpn.head.cls_logits.bias) == 2 * len(trained.rpn.head.cls_logits.bias) // 3


def test_the_keypoints_layer_is_one_of_them(tmp_path):
    number = "MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES"
    trained, model = (model_of(SMALL, [*TINY, *KEYPOINTS, number, keypoints]) for keypoints in ("5", "17"))
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    load_weights(model, str(tmp_path / "trained.pth"), replace_heads=True)
    ours, theirs = model.roi_heads["keypoint"], trained.roi_heads["keypoint"]
    assert torch.equal(ours.feature_extractor.conv_fcn1.weight, theirs.feature_extractor.conv_fcn1.weight)
    assert (len(ours.predictor.kps_score_lowres.bias), len(theirs.predictor.kps_score_lowres.bias)) == (17, 5)


def test_other_anchors_are_not_other_classes(tmp_path):
    """RetinaNet's layer for classes has the name of an RPN's for anchors."""
    torch.save(model_of(SMALL, TINY).state_dict(), tmp_path / "trained.pth")
    model = model_of(SMALL, [*TINY, "MODEL.RPN.ASPECT_RATIOS", "(0.5, 1.0)"])
    with pytest.raises(CheckpointError, match=r"rpn\.head\.bbox_pred\.weight is"):
        load_weights(model, str(tmp_path / "trained.pth"), replace_heads=True)


def test_replacing_heads_hides_no_other_difference(tmp_path):
    torch.save(model_of(SMALL, TINY).state_dict(), tmp_path / "trained.pth")
    model = model_of(SMALL, [*TINY, BOX + "MLP_HEAD_DIM", "32", BOX + "NUM_CLASSES", "3"])
    with pytest.raises(CheckpointError, match=r"fc6\.weight is"):
        load_weights(model, str(tmp_path / "trained.pth"), replace_heads=True)
