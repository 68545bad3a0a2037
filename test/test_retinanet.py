"""RetinaNet: anchors, losses by each peer's rule, detections, fixed shapes, names."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from test_fixed_shapes import COMPOSITES, HostWaits
from test_models import make_batch, model_of, step
from torch import Tensor

from maskrcnn_benchmark.engine.views import detect
from maskrcnn_benchmark.errors import CheckpointError
from maskrcnn_benchmark.evaluation.results import detections_to_results
from maskrcnn_benchmark.models.anchors import cell_anchors, octave_sizes
from maskrcnn_benchmark.models.fpn import LastLevelP6P7
from maskrcnn_benchmark.models.retinanet import clip_detections
from maskrcnn_benchmark.models.weights import convert, load_weights
from maskrcnn_benchmark.ops import box_coder, focal_loss, matching
from maskrcnn_benchmark.structures import Detections, ImageBatch

RETINANET = [
    *("MODEL.RETINANET_ON", "True", "MODEL.BACKBONE.CONV_BODY", "R-18-FPN-RETINANET", "MODEL.RESNETS.NORM", "GN"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "16", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.RESNETS.BACKBONE_OUT_CHANNELS", "32", "DATALOADER.SIZE_DIVISIBILITY", "32"),
    *("MODEL.RETINANET.NUM_CLASSES", "4", "MODEL.RETINANET.NUM_CONVS", "2"),
    *("MODEL.RETINANET.ANCHOR_SIZES", "(16, 32, 64, 128, 256)"),
]
NORMALIZERS = ("batch", "image", "positives", "moving_average")


def retinanet(*overrides: str, **device_changes):
    return model_of(None, [*RETINANET, *overrides], **device_changes)


def test_anchor_sizes_by_hand():
    (sizes,) = octave_sizes((32,), 2.0, 3, whole=False)
    assert sizes == pytest.approx((32, 40.3175, 50.7968), abs=1e-4)
    assert octave_sizes((32, 64), 2.0, 3, whole=True) == ((32, 40, 50), (64, 80, 101))
    cells = cell_anchors(sizes, (0.5, 1.0, 2.0))  # ratio outside, size inside
    assert (cells[:, 2] - cells[:, 0])[:3].tolist() == pytest.approx([s * math.sqrt(2) for s in sizes], rel=1e-5)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("background", [False, True])
def test_losses_are_the_peers_rules(normalizer, background):
    """From the model's own predictions, image by image, by each peer's formula."""
    keys = {"LOSS_NORMALIZER": normalizer, "BACKGROUND_CHANNEL": str(background), "BBOX_REG_BETA": "0.2"}
    model = retinanet(*(part for key, value in keys.items() for part in (f"MODEL.RETINANET.{key}", value)))
    images, targets = make_batch((2, 0, 1))
    losses = model(images, targets)
    features, padded = model.features(images)
    logits, deltas, anchors = (torch.cat(x, -2) for x in model.predict(features, padded))
    assert logits.shape[-1] == (4 if background else 3)
    index, label = matching.match(targets.boxes, targets.valid, anchors, 0.5, 0.4, True)
    by_class, by_box, positives = [], [], (label == 1).sum(1)
    assert positives.tolist()[1] == 0 and positives[0] > positives[2] > 0
    for i in range(3):
        wanted = torch.zeros_like(logits[i])
        rows = label[i] == 1
        classes = targets.labels[i][index[i][rows]]
        wanted[rows, classes if background else classes - 1] = 1
        p = logits[i].sigmoid()
        focal = torch.where(
            wanted == 1, -0.25 * (1 - p) ** 2 * F.logsigmoid(logits[i]), -0.75 * p**2 * F.logsigmoid(-logits[i])
        )
        by_class.append(focal[label[i] >= 0].sum())
        truth = box_coder.encode(targets.boxes[i][index[i][rows]], anchors[rows], (10.0, 10.0, 5.0, 5.0))
        by_box.append(F.smooth_l1_loss(deltas[i][rows], truth, beta=0.2, reduction="sum"))
    total = float(positives.sum())
    expected = {
        "batch": (sum(by_class) / (total + 3), sum(by_box) / (4 * total)),
        "image": tuple(
            sum(loss / max(1, int(n)) for loss, n in zip(part, positives)) / 3 / divisor
            for part, divisor in ((by_class, 1), (by_box, 4))
        ),
        "positives": (sum(by_class) / (total + 1), sum(by_box) / (total + 1) / 4),  # one image of three has none
        "moving_average": tuple(
            sum(part) / (0.9 * 100 + 0.1 * total) / divisor for part, divisor in ((by_class, 1), (by_box, 4))
        ),
    }[normalizer]
    assert losses["loss_retina_cls"].item() == pytest.approx(expected[0].item(), rel=1e-4)
    assert losses["loss_retina_reg"].item() == pytest.approx(expected[1].item(), rel=1e-4)


def test_the_moving_average_moves_in_training_alone_and_is_kept(tmp_path):
    model = retinanet("MODEL.RETINANET.LOSS_NORMALIZER", "moving_average")
    batch = make_batch((0, 0))
    with torch.no_grad():
        model(*batch)
        model(*batch)
        assert model.positives_average.item() == pytest.approx(100 * 0.81 + 0.1 * 0.9 + 0.1)  # at least 1 positive
        model.eval()
        model(*batch)
    assert model.positives_average.item() == pytest.approx(81.19)
    assert "positives_average" in model.state_dict()
    peer = {name: tensor for name, tensor in model.state_dict().items() if name != "positives_average"}
    torch.save(peer, tmp_path / "peer.pth")
    load_weights(model, str(tmp_path / "peer.pth"))  # no peer has it


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_images_without_objects_give_finite_losses_and_every_gradient(normalizer):
    losses, gradients = step(retinanet("MODEL.RETINANET.LOSS_NORMALIZER", normalizer), make_batch((0, 0)))
    assert losses["loss_retina_reg"] == 0 and 0 < losses["loss_retina_cls"] < math.inf
    assert all(g is not None and g.isfinite().all() for g in gradients.values())


def test_straddling_anchors_are_left_out_where_asked():
    batch = make_batch((1, 1))
    kept, left_out = (
        step(retinanet("MODEL.RETINANET.STRADDLE_THRESH", threshold), batch)[0] for threshold in ("-1", "0")
    )
    assert 0 < left_out["loss_retina_cls"] < kept["loss_retina_cls"]


def test_prior_probability_before_training():
    model = retinanet("MODEL.RETINANET.PRIOR_PROB", "0.03")
    assert model.rpn["head"].cls_logits.bias.sigmoid().tolist() == pytest.approx([0.03] * 27)


def test_detections_lie_in_their_images_and_say_their_class():
    model = retinanet("MODEL.RETINANET.INFERENCE_TH", "0.0").eval()
    images, _ = make_batch()
    torch.nn.init.constant_(model.rpn["head"].cls_logits.bias.data.view(9, 3)[:, 1], 3.0)  # channel 1 is class 2
    with torch.no_grad():
        found = model(images)
    assert found.boxes.shape == (3, 100, 4) and found.valid.all()
    assert (found.labels == 2).all() and (found.scores.diff() <= 0).all()
    limit = images.sizes.flip(1).repeat(1, 2)[:, None]
    assert ((found.boxes >= 0) & (found.boxes <= limit)).all()


def test_channel_of_the_background():
    """Channel c is label c then, and what is found as background is no result."""
    model = retinanet("MODEL.RETINANET.INFERENCE_TH", "0.0", "MODEL.RETINANET.BACKGROUND_CHANNEL", "True").eval()
    torch.nn.init.constant_(model.rpn["head"].cls_logits.bias.data.view(9, 4)[:, ::3], 3.0)
    images, _ = make_batch()
    with torch.no_grad():
        found = model(images)
    assert set(found.labels.flatten().tolist()) == {0, 3}
    results = detections_to_results(found, images, [10, 20, 30])
    assert 0 < len(results) == (found.labels == 3).sum() and (results.category_ids == 30).all()


def test_clipping_after_nms():
    """Two boxes that overlap by .5 only once they are cut to the image; and one beside it."""
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 30], [-9, 0, -1, 5]]])
    found = clip_detections(
        Detections(boxes, torch.ones(1, 3), torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool)),
        torch.tensor([[12, 20]]),
    )
    assert found.boxes[0, :2].tolist() == [[0, 0, 10, 10], [0, 0, 10, 12]]
    assert found.valid.tolist() == [[True, True, False]]
    late = retinanet("MODEL.RETINANET.CLIP_BEFORE_NMS", "False", "MODEL.RETINANET.INFERENCE_TH", "0.0").eval()
    images, _ = make_batch()
    with torch.no_grad():
        features, padded = late.features(images)
        box, *_ = late.candidates(features, padded, images.sizes)
        found = late(images)
    limit = images.sizes.flip(1).repeat(1, 2)[:, None]
    assert ((box < 0) | (box > limit)).any()
    assert ((found.boxes >= 0) & (found.boxes <= limit)).all() and found.valid.sum() > 100


def test_boxes_without_area_are_dropped_where_asked():
    """Every box moved far to the left is nothing but an edge."""
    images, _ = make_batch()
    for drop, left in (("False", True), ("True", False)):
        model = retinanet("MODEL.RETINANET.INFERENCE_TH", "0.0", "MODEL.RETINANET.DROP_EMPTY", drop).eval()
        torch.nn.init.constant_(model.rpn["head"].bbox_pred.bias.data.view(9, 4)[:, 0], -1e4)
        with torch.no_grad():
            assert bool(model(images).valid.any()) == left


def test_views_are_put_together():
    model = retinanet("MODEL.RETINANET.INFERENCE_TH", "0.0").eval()
    images, _ = make_batch()
    with torch.no_grad():
        plain, augmented = model(images), detect(model, [images], [True])
    assert augmented.valid.all() and not torch.equal(plain.boxes, augmented.boxes)
    assert (augmented.scores[:, 0] >= plain.scores[:, 0] - 1e-6).all()


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_a_step_never_waits_for_the_device(normalizer, monkeypatch):
    for name in ("sigmoid_focal_loss", "sigmoid_focal_loss_backward"):
        monkeypatch.setitem(COMPOSITES, name, getattr(focal_loss, f"{name}_composite"))
    model, batch = retinanet("MODEL.RETINANET.LOSS_NORMALIZER", normalizer, compacts=False), make_batch()
    model(*batch)
    with HostWaits(composites=True) as waits:
        sum(model(*batch).values()).backward()
    assert not waits.found and {"sigmoid_focal_loss_backward", "match"} <= waits.served.keys()


def test_a_step_compiles_as_one_graph():
    """That of the normalizer which changes a buffer."""
    overrides = ("MODEL.RETINANET.LOSS_NORMALIZER", "moving_average", "MODEL.RETINANET.NUM_CONVS", "1")
    batch = make_batch()
    eager = step(retinanet(*overrides, compacts=False), batch)
    torch._dynamo.reset()
    compiled = torch.compile(retinanet(*overrides, compacts=False), fullgraph=True, backend="aot_eager", dynamic=False)
    losses, gradients = step(compiled, batch)
    assert losses == pytest.approx(eager[0], rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, eager[1][name.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-5)


def d2_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of our head's and pyramid's names detectron2's."""
    renamed = {"backbone.bottom_up.stem.conv1.weight": torch.zeros(8, 3, 7, 7)}
    for name, tensor in state.items():
        for ours, theirs in {
            "rpn.head.cls_tower": "head.cls_subnet",
            "rpn.head.bbox_tower": "head.bbox_subnet",
            "rpn.head.cls_logits": "head.cls_score",
            "rpn.head.bbox_pred": "head.bbox_pred",
            "backbone.fpn.top_blocks": "backbone.top_block",
        }.items():
            name = name.replace(ours, theirs)
        for level in (2, 3, 4):
            name = name.replace(f"backbone.fpn.fpn_inner{level}", f"backbone.fpn_lateral{level + 1}")
            name = name.replace(f"backbone.fpn.fpn_layer{level}", f"backbone.fpn_output{level + 1}")
        renamed[name] = tensor
    return renamed


def test_detectron2s_anchors_come_in_our_order():
    """There the sizes are outside and the ratios inside: anchor 1 (first size, second ratio) is our anchor 3."""
    model = retinanet()
    state = {name: tensor for name, tensor in model.state_dict().items() if "body" not in name}
    state["rpn.head.bbox_pred.bias"] = torch.arange(36.0)
    state["rpn.head.cls_logits.bias"] = torch.arange(27.0)
    converted, source = convert(d2_names(state), "a file")
    assert source == "detectron2" and converted.keys() - state.keys() == {"backbone.body.stem.conv1.weight"}
    assert converted.keys() >= state.keys()
    assert converted["rpn.head.bbox_pred.bias"].view(9, 4)[:, 0].div(4).tolist() == [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert converted["rpn.head.cls_logits.bias"].view(9, 3)[:, 0].div(3).tolist() == [0, 3, 6, 1, 4, 7, 2, 5, 8]


def test_c4_of_detectron2_too():
    """15 anchors: five sizes of three ratios; of an RPN with one size a level nothing moves."""
    for anchors, expected in ((15, [0, 3, 6, 9, 12, 1, 4, 7, 10, 13, 2, 5, 8, 11, 14]), (3, [0, 1, 2])):
        state = {
            "backbone.stem.conv1.weight": torch.zeros(8, 3, 7, 7),
            "proposal_generator.rpn_head.objectness_logits.bias": torch.arange(float(anchors)),
            "proposal_generator.rpn_head.anchor_deltas.bias": torch.arange(4.0 * anchors),
        }
        converted, _ = convert(state, "a file")
        assert converted["rpn.head.cls_logits.bias"].tolist() == expected
        assert converted["rpn.head.bbox_pred.bias"].view(-1, 4)[:, 1].tolist() == [4 * e + 1 for e in expected]


def test_torchvisions_names_of_two_generations():
    """Before 0.13 the towers were plain sequences of convolutions and ReLUs."""
    model = retinanet()
    head = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("rpn.head.")}
    for form in ("conv.{half}.0", "conv.{number}"):
        theirs = {"backbone.body.conv1.weight": torch.zeros(1)}
        for name, tensor in head.items():
            *_, part, last = name.split(".")
            tower = "classification_head" if "cls" in name else "regression_head"
            if "tower" in name:
                part = form.format(half=int(part) // 2, number=part)
            theirs[f"head.{tower}.{part.replace('bbox_pred', 'bbox_reg')}.{last}"] = tensor
        converted, _ = convert(theirs, "a file")
        assert converted.keys() - {"backbone.body.stem.conv1.weight"} == head.keys()
        assert all(torch.equal(converted[name], head[name]) for name in head)


def test_weights_of_another_model_are_refused(tmp_path):
    model = retinanet()
    torch.save(retinanet("MODEL.RETINANET.NUM_CLASSES", "7").state_dict(), tmp_path / "seven.pth")
    with pytest.raises(CheckpointError, match="cls_logits"):
        load_weights(model, str(tmp_path / "seven.pth"))


def test_images_of_another_size_than_the_levels_divide():
    """P6 and P7 of 96 x 160 are 2 x 3 and 1 x 2."""
    model = retinanet().eval()
    images = ImageBatch(torch.zeros(1, 3, 96, 160, dtype=torch.uint8), torch.tensor([[96, 160]]), [(96, 160)], [1])
    with torch.no_grad():
        features, _ = model.features(images)
        model(images)
    assert [tuple(f.shape[-2:]) for f in features] == [(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]


def test_p7_with_and_without_a_relu_before_it():
    top, x = LastLevelP6P7(4, 4, relu=False), torch.randn(1, 4, 8, 8)
    p6, p7 = top(x, x)
    assert torch.equal(p7, top.p7(p6)) and (p6 < 0).any()
    top.relu = True
    assert torch.equal(top(x, x)[1], top.p7(p6.relu()))
