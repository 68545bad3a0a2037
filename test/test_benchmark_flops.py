"""Counted FLOP: against the published counts of a whole model, a head worked by hand, and frozen layers."""

import pytest
import torch
from conftest import ROOT

from maskrcnn_benchmark.benchmark import flops
from maskrcnn_benchmark.benchmark.flops import Flops
from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.device import get_device

SIZE = (800, 1344)
GIGA = 1e9


def config(*overrides):
    return get_config(ROOT / "configs" / "e2e_mask_rcnn_R_50_FPN_1x.yaml", overrides)


@pytest.mark.parametrize(("backward", "fixed", "each"), [(False, 408, 1.06), (True, 1142, 3.18)])
def test_r50_fpn_has_the_known_counts(backward, fixed, each):
    """Of an 800 x 1344 image, 512 RoIs, stem and res2 frozen: counted layer by layer from the paper's figures. Our mask
    head makes the map of one class instead of all 81: 3% of an RoI's share less."""
    counted = flops.training_flops(config(), SIZE, backward)
    assert counted.fixed / GIGA == pytest.approx(fixed, rel=0.005)
    assert counted.each / GIGA == pytest.approx(0.97 * each, rel=0.005)
    assert counted.of(1, 96) / GIGA == pytest.approx(fixed + 96 * each, rel=0.01)


def test_the_mask_head_by_hand():
    convolutions = 4 * 14 * 14 * 9 * 256 * 256
    transposed, predictor = 14 * 14 * 4 * 256 * 256, 28 * 28 * 256
    assert flops.training_flops(config(), (128, 128), backward=False).each == 2 * (
        convolutions + transposed + predictor
    )


def test_each_stage_of_a_cascade_may_have_its_mask_head():
    stages = config("MODEL.CASCADE_ON", "True", "MODEL.ROI_MASK_HEAD.PER_STAGE", "True")
    one, three = (flops.training_flops(cfg, (128, 128), backward=False).each for cfg in (config(), stages))
    assert three == 3 * one > 0


def test_frozen_layers_cost_no_backward_pass():
    """The stem alone by hand: 7x7 over 3 channels, 64 out, at half the size. Unfrozen it needs the gradient of its
    weights, as much again as its forward pass, and none of its input, the image."""
    size = (128, 128)
    frozen, stem_frozen, free = (
        flops.training_flops(config("MODEL.BACKBONE.FREEZE_CONV_BODY_AT", str(at)), size).fixed for at in (2, 1, 0)
    )
    assert free - stem_frozen == pytest.approx(2 * 64 * 64 * 7 * 7 * 3 * 64 + first_convolutions_of_res2(), rel=1e-6)
    assert frozen < stem_frozen


def first_convolutions_of_res2() -> int:
    """conv1 and the shortcut, 64 to 64 and 64 to 256 channels over 32 x 32: with a trained stem below, they need the
    gradient of their input."""
    return 2 * 32 * 32 * (64 * 64 + 64 * 256)


def test_inference_counts_proposals_and_detections():
    size = (128, 128)
    few, many = (
        flops.inference_flops(config("MODEL.RPN.FPN_POST_NMS_TOP_N_TEST", str(count)), size) for count in (100, 200)
    )
    box_head = 256 * 7 * 7 * 1024 + 1024 * 1024 + 1024 * 81 * 5
    assert many.fixed - few.fixed == 2 * 100 * box_head
    assert many.each == few.each == flops.training_flops(config(), size, backward=False).each


def test_a_batch_adds_up():
    assert Flops(fixed=100, each=3).of(images=2, in_mask_head=10) == 230


def test_the_peak_that_is_measured(monkeypatch):
    """Two seconds for 2 x 2048^3 FLOP: long enough to be taken; 10 ms are not, and a larger product is measured."""
    device = get_device("cpu")
    monkeypatch.setattr(flops, "MATRIX_SIDES", (16, 32))
    for nanoseconds, side in ((2_000_000_000, 16), (10_000_000, 32)):
        monkeypatch.setattr(flops, "nanoseconds", lambda *_, n=nanoseconds: n)
        tflops, words = flops.measured_peak(device, torch.bfloat16)
        assert tflops == pytest.approx(2 * side**3 / (nanoseconds / 1e9) / 1e12)
        assert "measured" in words and f"{side} x {side} bfloat16" in words
