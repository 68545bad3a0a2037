"""The benchmark against torchvision: equal weights, work and results; and what it says where there is none."""

import importlib
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT

from maskrcnn_benchmark.benchmark import peers, results, runs, sides, steps, workload
from maskrcnn_benchmark.benchmark.sides import Side
from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.errors import UserError
from maskrcnn_benchmark.evaluation.results import Results

SIZE, POSITIVES = (96, 128), 10
# R-18 and few RoIs: the same parts in less time
SMALL = (
    *("MODEL.BACKBONE.CONV_BODY", "R-18-FPN", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "64"),
    *("MODEL.RPN.FPN_POST_NMS_TOP_N_TEST", "200"),
)
ARGUMENTS = ("--device", "cpu", "--size", "96x128", "--steps", 2, "--warmup", 1, "--phase-steps", 1, *SMALL)


@pytest.fixture(scope="module")
def torchvision():
    return pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))


def config(*overrides):
    return get_config(ROOT / peers.CONFIG, [*SMALL, "SOLVER.IMS_PER_BATCH", "2", "TEST.IMS_PER_BATCH", "1", *overrides])


def built_sides(kind, cfg=None):
    """Ours and torchvision's, float32, in both of its memory formats."""
    device = get_device("cpu")
    request = runs.Request(
        kind, cfg or config(), "cpu", ("float32",), "synthetic", SIZE, POSITIVES, 1, 1, 1, "torchvision"
    )
    made = runs.make_workload(request, device)
    return {str(name): runs.make_side(request, name, device, made) for name in runs.side_names(request)}


def started(built):
    """After the first step of each side, which is what is compared."""
    steps.first_steps({name: side.phases for name, side in built.items()}, get_device("cpu"))
    return built


def test_training_sides_do_the_same_work(torchvision):
    built = started(built_sides("train"))
    assert list(built) == ["ours float32", "torchvision float32", "torchvision float32 channels-last"]
    agreement = peers.agree(built, training=True)
    assert all(entry["agrees"] for entry in agreement.values())
    # what does not depend on the RPN's random anchors is equal but for rounding
    apart = agreement["torchvision float32"]["relative_difference"]
    assert max(apart["loss_classifier"], apart["loss_box_reg"]) < 1e-4
    assert len({side.trainable_parameters() for side in built.values()}) == 1
    for side in built.values():
        assert side.counts.read() == {"sampled": [2 * 64], "mask_head": [2 * POSITIVES]}
    format_ = {name: side.model.backbone.body.layer3[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
               for name, side in built.items() if "torchvision" in name}  # fmt: skip
    assert format_ == {"torchvision float32": False, "torchvision float32 channels-last": True}


def test_inference_sides_find_the_same(torchvision):
    agreement = peers.agree(started(built_sides("infer")), training=False)
    for entry in agreement.values():
        assert entry["agrees"] and entry["detections"] == {"ours": 100, "torchvision": 100}
        assert min(entry["share_in_common"]) > 0.97


def test_its_rpn_still_works(torchvision, monkeypatch):
    """The proposals are replaced after they were made, not instead."""
    kind = importlib.import_module("torchvision.models.detection.rpn").RegionProposalNetwork
    calls, filtered = [], kind.filter_proposals
    monkeypatch.setattr(kind, "filter_proposals", lambda *inputs: calls.append(1) or filtered(*inputs))
    side = built_sides("train")["torchvision float32"]
    side.phases["forward"](side.phases["data"](None))
    assert calls == [1]


def test_other_weights_are_noticed_and_not_timed(torchvision, monkeypatch):
    monkeypatch.setattr(peers, "copy_weights", lambda weights, model: None)
    cfg = config()
    request = runs.Request("train", cfg, "cpu", ("float32",), "synthetic", SIZE, POSITIVES, 1, 1, 1, "torchvision")
    result = runs.run(request, get_device("cpu"))
    assert result["cases"] == [] and not all(entry["agrees"] for entry in result["agreement"].values())


def test_a_model_that_torchvision_does_not_build(torchvision):
    with pytest.raises(UserError, match=r"RGB in 0\.\.1"):
        built_sides("train", config("INPUT.TO_BGR255", "True"))
    with pytest.raises(UserError, match="no such model"):
        built_sides("train", config("MODEL.ROI_MASK_HEAD.CONV_LAYERS", "(256, 256)"))


def test_ratios_from_the_command_line(torchvision, run, tmp_path):
    out = tmp_path / "train.json"
    done = run("tools/benchmark.py", "train", "--against", "torchvision", "--batch", 1, "--positives", POSITIVES,
               *ARGUMENTS, "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = results.read(out)
    assert [case["system"] for case in result["cases"]] == ["ours", "torchvision", "torchvision"]
    assert len({case["name"] for case in result["cases"]}) == 3
    assert all(case["metrics"]["max_memory_mb"]["p50"] > 100 for case in result["cases"])
    (comparison,) = result["comparisons"]
    ours, theirs = (case["metrics"]["step_ms"]["p50"] for case in result["cases"][:2])
    ratio = comparison["ratios"][0]
    assert ratio["times_faster"] == pytest.approx(theirs / ours)
    assert ratio["interval"][0] <= ratio["times_faster"] <= ratio["interval"][1]
    assert "times as fast as torchvision float32" in done.stdout and result["peers"]["torchvision"]


# ---- without torchvision


def side_with(name, losses=None, found=None) -> Side:
    side = Side(name, torch.float32, torch.nn.Identity(), found=found)
    side.losses = [{key: torch.tensor(value) for key, value in losses.items()}] if losses else []
    side.counts.mask_head = [2]
    return side


def test_losses_are_compared_one_by_one():
    ours = side_with("ours", {"loss_mask": 1.0, "loss_box_reg": 0.5})
    near = side_with("torchvision", {"loss_mask": 1.001, "loss_box_reg": 0.5})
    far = side_with("torchvision", {"loss_mask": 0.9, "loss_box_reg": 0.6})  # the sum is the same
    assert peers.compare_losses(ours, near)["agrees"] and not peers.compare_losses(ours, far)["agrees"]
    near.counts.mask_head = [3]  # more positive RoIs, and so more work
    assert not peers.compare_losses(ours, near)["agrees"]


def test_detections_are_compared_by_box_and_class():
    boxes = np.array([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 10.0, 10.0]])  # x, y, width, height
    found = Results(image_ids=np.zeros(2, int), category_ids=np.array([1, 2]), scores=np.ones(2), boxes=boxes)
    box = torch.tensor([[20.0, 20, 30, 30], [0.0, 0, 10, 10.2]])
    ours = side_with("ours", found=found)
    for labels, share in (([2, 1], 1.0), ([2, 3], 0.5)):
        peer = side_with("torchvision", found=[{"boxes": box, "labels": torch.tensor(labels), "scores": torch.ones(2)}])
        got = peers.compare_detections(ours, peer, 0.97)
        assert got["share_in_common"] == [share] and got["agrees"] == (share == 1)
    peer.counts.mask_head = [1]
    assert not peers.compare_detections(ours, peer, 0.97)["agrees"]


def test_less_precision_must_keep_the_detections_of_float32():
    """torchvision's bfloat16 may lose half of them, ours may not."""
    peer_found = [{"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([1]), "scores": torch.ones(1)}]
    for label, agrees in ((1, True), (2, False)):
        sides_ = {}
        for dtype in (torch.float32, torch.bfloat16):
            kept = np.array([1 if dtype == torch.float32 else label])
            boxes = np.array([[0.0, 0.0, 10.0, 10.0]])
            found = Results(image_ids=np.zeros(1, int), category_ids=kept, scores=np.ones(1), boxes=boxes)
            sides_[f"ours {dtype}"] = replace(side_with("ours", found=found), dtype=dtype)
        sides_["torchvision float32"] = side_with("torchvision", found=peer_found)
        for side in sides_.values():
            side.counts.mask_head = [1]
        verdicts = peers.agree(sides_, training=False)
        assert verdicts["torchvision float32"]["agrees"]
        assert verdicts["ours torch.bfloat16 beside torchvision float32"]["agrees"] == agrees


def test_the_model_hands_on_the_fixed_proposals():
    cfg, device = config(), get_device("cpu")
    made = workload.training_workload(cfg, device, 1, SIZE, POSITIVES)
    model = sides.fresh_model(cfg, device).eval()
    workload.hold_proposals(model, made.proposals)
    with torch.no_grad():
        x = model.normalize(made.images)
        proposals, _ = model.rpn(model.backbone(x), x.shape[-2:], made.images.sizes)
    assert torch.equal(proposals.boxes, made.proposals.boxes) and proposals.valid.all()


@pytest.mark.parametrize("kind", ["train", "infer"])
def test_torchvision_that_is_not_there(kind, monkeypatch, run, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise ImportError('No module named torchvision')")
    done = run("tools/benchmark.py", kind, "--against", "torchvision", env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and "-m venv" in done.stderr


def test_torchvision_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(UserError, match=r"nms does not exist.*-m venv"):
        peers.import_torchvision()


def test_ranks_and_real_data_have_no_peer():
    request = runs.Request("train", config(), "cpu", ("float32",), "real", SIZE, 1, 1, 1, 1, "torchvision")
    with pytest.raises(UserError, match="synthetic data"):
        runs.run(request, get_device("cpu"))
