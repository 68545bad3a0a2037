"""AugFPN: each of its parts changes what it claims to, against naive sums, and costs nothing where it should not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from test_fixed_shapes import HostWaits
from test_models import SMALL, TINY, make_batch, model_of, step
from torch.utils.flop_counter import FlopCounterMode

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.errors import ConfigError
from maskrcnn_benchmark.models.aug_fpn import AdaptiveSpatialFusion, AugFPN, ResidualAugmentation, SoftRoIPool
from maskrcnn_benchmark.models.fpn import FPN
from maskrcnn_benchmark.models.roi_pool import RoIPool
from maskrcnn_benchmark.ops.boxes import to_inclusive

KEY = "MODEL.AUG_FPN."
RESIDUAL, CONSISTENT, SOFT = (
    (KEY + name, "True") for name in ("RESIDUAL_AUGMENTATION", "CONSISTENT_SUPERVISION", "SOFT_ROI_SELECTION")
)
PARTS = {
    "residual": (RESIDUAL, "backbone.fpn.augment."),
    "consistent": (CONSISTENT, "roi_heads.auxiliary."),
    "soft": (SOFT, ".pool.fuse."),
}


@pytest.mark.parametrize("part", PARTS)
def test_each_switch_adds_its_own_parameters_and_a_gradient_to_each(part):
    switch, mark = PARTS[part]
    plain, model = model_of(SMALL, TINY), model_of(SMALL, [*TINY, *switch])
    added = model.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() < model.state_dict().keys() and all(mark in name for name in added)
    losses, gradients = step(model, make_batch())
    assert all(gradients[name].any() for name in added)
    auxiliary = {name for name in losses if name.endswith("_auxiliary")}
    expected = {"loss_classifier_auxiliary", "loss_box_reg_auxiliary"} if part == "consistent" else set()
    assert auxiliary == expected


ALL = [*TINY, *RESIDUAL, *CONSISTENT, *SOFT, "MODEL.CASCADE_ON", "True", "MODEL.ROI_MASK_HEAD.PER_STAGE", "True"]


def test_padding_dropped_or_kept_gives_the_same_losses_and_gradients():
    results = [step(model_of(SMALL, ALL, compacts=compacts), make_batch()) for compacts in (True, False)]
    (losses, gradients), (padded, expected) = results
    assert losses == pytest.approx(padded, rel=1e-4)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name


@pytest.mark.parametrize("compacts", [True, False])
def test_images_without_objects_give_finite_losses_and_every_gradient(compacts):
    losses, gradients = step(model_of(SMALL, ALL, compacts=compacts), make_batch((0, 0)))
    assert all(math.isfinite(loss) for loss in losses.values()) and losses["loss_box_reg_auxiliary"] == 0
    assert all(g is not None and g.isfinite().all() for g in gradients.values())


def test_a_step_never_waits_for_the_device():
    model, batch = model_of(SMALL, ALL, compacts=False), make_batch()
    model(*batch)  # anchors are made once
    with HostWaits() as waits:
        sum(model(*batch).values()).backward()
    assert not waits.found


def test_the_training_forward_compiles_as_one_graph():
    model = model_of(SMALL, ALL, compacts=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    assert step(compiled, make_batch())[0] == pytest.approx(step(model, make_batch())[0], rel=1e-5)


def test_spatial_fusion_by_hand():
    """Two maps of one channel: their sum through a ReLU decides the weights, a pixel each."""
    fusion = AdaptiveSpatialFusion(1, 2)
    with torch.no_grad():
        fusion.reduce.weight.fill_(1)
        fusion.weigh.weight.zero_()
        fusion.weigh.weight[:, 0, 1, 1] = torch.tensor([1.0, -2.0])
        a, b = torch.tensor([[[[1.0, -5.0]]]]), torch.tensor([[[[2.0, 1.0]]]])
        fused = fusion([a, b]).flatten().tolist()

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    # sums 3 and -4, the latter 0 behind the ReLU
    assert fused == pytest.approx([sigmoid(3) * 1 + sigmoid(-6) * 2, 0.5 * -5 + 0.5 * 1])


def test_context_is_pooled_by_ratio_whatever_the_shape():
    """10 x 20 at .1 and .2 of its sides: 1 x 2 and 2 x 4 means, brought back and added with equal weights."""
    augment = ResidualAugmentation(1, 1, (0.1, 0.2))
    x = torch.randn(1, 1, 10, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for reduce in augment.context:
            reduce.weight.fill_(1)
        augment.fuse.weigh.weight.zero_()  # weights of .5
        context = augment(x)[0, 0]
    expected = torch.zeros(10, 20)
    for rows, columns in ((1, 2), (2, 4)):
        means = x[0, 0].reshape(rows, 10 // rows, columns, 20 // columns).mean((1, 3))
        for i in range(10):
            for j in range(20):
                y, z = i * (rows - 1) / 9, j * (columns - 1) / 19
                top, left = min(int(y), max(rows - 2, 0)), min(int(z), columns - 2)
                below, up, right = min(top + 1, rows - 1), y - top, z - left
                expected[i, j] += 0.5 * (
                    (1 - up) * ((1 - right) * means[top, left] + right * means[top, left + 1])
                    + up * ((1 - right) * means[below, left] + right * means[below, left + 1])
                )
    torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-5)


def test_residual_augmentation_adds_to_the_top_alone():
    """All levels change, since the top flows down; without the context the pyramid is FPN's."""
    features = [torch.randn(1, 4, 32 // 2**i, 64 // 2**i) for i in range(4)]
    aug = AugFPN([4] * 4, 8, ratios=(0.1, 0.2, 0.3))
    plain = FPN([4] * 4, 8)
    plain.load_state_dict({name: x for name, x in aug.state_dict().items() if not name.startswith("augment")})
    with torch.no_grad():
        ours, theirs, context = aug(features), plain(features), aug.augment(features[-1])
        assert all((a != b).any() for a, b in zip(ours, theirs))
        laterals = plain.laterals(features)
        expected = plain.top_down([*laterals[:3], laterals[3] + context], features[-1])
        for a, b in zip(ours, expected):
            torch.testing.assert_close(a, b)
        aug.augment.fuse.weigh.bias.fill_(-1000)
        for a, b in zip(aug(features), theirs):
            torch.testing.assert_close(a, b)


def test_consistent_supervision_is_the_mean_over_the_laterals():
    """Every RoI on every lateral map, whatever its size, by one head: level by level, row by row."""
    model = model_of(SMALL, [*TINY, *CONSISTENT, KEY + "SUPERVISION_WEIGHT", "0.4"], compacts=False)
    head, (images, targets) = model.roi_heads["auxiliary"], make_batch()
    features, padded = model.features(images)
    assert len(features) == 9
    proposals, _ = model.rpn(features, padded, images.sizes)
    chosen = model.roi_heads["box"].sample(proposals, targets)
    _, rows = chosen.flatten(False)
    total = 0.0
    for level, lateral in enumerate(features[5:]):
        pool = RoIPool((1 / 2 ** (level + 2),), 7, 2, True)
        logits, _ = head.predictor(head.feature_extractor(pool([lateral], rows.boxes, rows.image)))
        entropy = F.cross_entropy(logits, rows.labels, reduction="none")
        total += entropy[chosen.valid.flatten()].mean().item()
    losses = head.losses(features, chosen, targets)
    assert losses["loss_classifier_auxiliary"].item() == pytest.approx(0.4 * total / 4, rel=1e-5)


def test_consistent_supervision_reaches_the_laterals_and_not_what_follows():
    model = model_of(SMALL, [*TINY, *CONSISTENT])
    losses = model(*make_batch())
    sum(loss for name, loss in losses.items() if name.endswith("_auxiliary")).backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {f"backbone.fpn.fpn_inner{level}.0.weight" for level in (1, 2, 3, 4)} < touched
    assert not [n for n in touched if "fpn_layer" in n or n.startswith(("rpn", "roi_heads.box", "roi_heads.mask"))]


def test_consistent_supervision_costs_nothing_at_test():
    results, flops = [], []
    for switch in ((), CONSISTENT):
        model = model_of(SMALL, [*TINY, *switch, "MODEL.ROI_HEADS.SCORE_THRESH", "0.0"])
        plain = model_of(SMALL, TINY).state_dict()
        model.load_state_dict(plain, strict=False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            results.append(model.eval()(make_batch()[0]))
        flops.append(counter.get_total_flops())
        assert len(model.features(make_batch()[0])[0]) == 5
    assert flops[0] == flops[1] > 0
    assert torch.equal(results[0].boxes, results[1].boxes) and torch.equal(results[0].masks, results[1].masks)


@pytest.mark.parametrize("plus_one", [False, True])
def test_soft_selection_weighs_every_level(plus_one):
    """With weights of 1 for one level and 0 for the others it is RoIAlign from that level, whatever the box's size."""
    scales = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
    features = [torch.randn(2, 3, 32 // 2**i, 32 // 2**i, requires_grad=True) for i in range(4)]
    boxes, image = torch.tensor([[4.0, 4, 20, 28], [0, 0, 128, 128]]), torch.tensor([0, 1])
    pool = SoftRoIPool(RoIPool(scales, 7, 2, True, plus_one), 3)
    pool(features, boxes, image).sum().backward()
    pooled = to_inclusive(boxes) if plus_one else boxes
    for feature in features:
        assert feature.grad.flatten(1).any(1).all(), "a box takes nothing from this level"
    for level in range(4):
        with torch.no_grad():
            pool.fuse.weigh.weight.zero_()
            pool.fuse.weigh.bias.copy_(torch.where(torch.arange(4) == level, 1000.0, -1000.0))
            alone = RoIPool((scales[level],), 7, 2, True)([features[level]], pooled, image)
            torch.testing.assert_close(pool(features, boxes, image), alone)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (SOFT, "SOFT_ROI_SELECTION is True, but R-50-C4 has no such pyramid"),
        ([*RESIDUAL, "MODEL.BACKBONE.CONV_BODY", "HRNet-W18-FPN"], "but HRNet-W18-FPN has no such pyramid"),
        ([*CONSISTENT, "MODEL.RPN_ONLY", "True"], "CONSISTENT_SUPERVISION is True, but there is no box head"),
    ],
)
def test_parts_that_do_not_fit_are_errors(overrides, message):
    with pytest.raises(ConfigError, match=message):
        get_config(None if overrides is SOFT else SMALL, [*overrides, "MODEL.MASK_ON", "False"])
