"""Learning rate, optimizer groups, checkpoints, weight import, loss window: the engine's parts on their own."""

from __future__ import annotations

import gc
import json
import math
import pickle
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.engine import checkpoint, train
from maskrcnn_benchmark.engine.metrics import PHASES, LossWindow, MetricsWriter, Pace
from maskrcnn_benchmark.engine.nonfinite import BadStep
from maskrcnn_benchmark.engine.optim import make_optimizer, make_schedule, set_learning_rate
from maskrcnn_benchmark.engine.train import out_of_the_collectors_sight
from maskrcnn_benchmark.errors import CheckpointError, ConfigError
from maskrcnn_benchmark.models import weights
from maskrcnn_benchmark.models.build import build_model

SMALL = ROOT / "configs" / "e2e_mask_rcnn_R_18_FPN_small.yaml"
SCHEDULE = ["SOLVER.BASE_LR", "0.08", "SOLVER.MAX_ITER", "100", "SOLVER.STEPS", "(60, 80)"]


# --------------------------------------------------------------------------------------------- schedule


def test_warm_up_then_steps():
    schedule = make_schedule(get_config(overrides=[*SCHEDULE, "SOLVER.WARMUP_ITERS", "10"]), 50)
    assert schedule.lr(0) == pytest.approx(0.08 / 3)
    assert schedule.lr(5) == pytest.approx(0.08 * (1 / 6 + 1 / 2))
    assert [schedule.lr(i) for i in (10, 59)] == [0.08, 0.08]
    assert [schedule.lr(i) for i in (60, 79, 80, 99)] == pytest.approx([0.008, 0.008, 0.0008, 0.0008])


def test_other_warm_ups():
    constant = make_schedule(get_config(overrides=[*SCHEDULE, "SOLVER.WARMUP_METHOD", "constant"]), 50)
    assert constant.lr(3) == pytest.approx(0.08 / 3)
    mlperf = ["SOLVER.WARMUP_METHOD", "mlperf_linear", "SOLVER.WARMUP_FACTOR", "0.001", "SOLVER.WARMUP_ITERS", "20"]
    schedule = make_schedule(get_config(overrides=[*SCHEDULE, *mlperf]), 50)
    assert [schedule.lr(i) for i in (0, 10, 20)] == pytest.approx([0.06, 0.07, 0.08])


def test_cosine_falls_to_zero():
    schedule = make_schedule(
        get_config(overrides=[*SCHEDULE, "SOLVER.LR_SCHEDULER", "cosine", "SOLVER.WARMUP_ITERS", "0"]), 50
    )
    assert [schedule.lr(i) for i in (0, 50, 100)] == pytest.approx([0.08, 0.04, 0.0])


def test_scaled_from_the_reference_batch(caplog):
    """2 images a step instead of 16: an eighth of the rate, eight times the steps, and the log says so."""
    changes = ["SOLVER.REFERENCE_IMS_PER_BATCH", "16", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "10"]
    with caplog.at_level("INFO"):
        schedule = make_schedule(get_config(overrides=[*SCHEDULE, *changes]), 50)
    assert schedule.base_lr == pytest.approx(0.01)
    assert (schedule.total, schedule.steps, schedule.warmup_iterations) == (800, (480, 640), 80)
    assert "learning rate 0.01" in caplog.text and "scaled" in caplog.text


def test_mlperf_warm_up_scales_with_the_batch():
    """An eighth of the rate over eight times the steps: a 64th of the rate a step."""
    changes = ["SOLVER.WARMUP_METHOD", "mlperf_linear", "SOLVER.WARMUP_FACTOR", "0.004", "SOLVER.WARMUP_ITERS", "20"]
    changes += ["SOLVER.REFERENCE_IMS_PER_BATCH", "16", "SOLVER.IMS_PER_BATCH", "2"]
    schedule = make_schedule(get_config(overrides=[*SCHEDULE, *changes]), 50)
    assert [schedule.lr(i) for i in (0, 80, 160)] == pytest.approx([0.0, 0.005, 0.01])


def test_epochs_replace_iterations():
    changes = ["SOLVER.MAX_EPOCHS", "4", "SOLVER.STEPS", "(2, 3)"]
    schedule = make_schedule(get_config(overrides=[*SCHEDULE, *changes]), 50)
    assert (schedule.total, schedule.steps) == (200, (100, 150))


# -------------------------------------------------------------------------------------------- optimizer


def test_biases_have_their_own_rate_and_decay():
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(get_config(), model, get_device("cpu"))
    set_learning_rate(optimizer, 0.1)
    others, biases = optimizer.param_groups
    assert others["params"] == [model.weight] and biases["params"] == [model.bias]
    assert (others["lr"], biases["lr"]) == (0.1, 0.2)
    assert (others["weight_decay"], biases["weight_decay"]) == (0.0005, 0)


def test_optimizers_by_name():
    model, device = nn.Linear(2, 2), get_device("cpu")
    assert isinstance(
        make_optimizer(get_config(overrides=["SOLVER.OPTIMIZER", "AdamW"]), model, device), torch.optim.AdamW
    )
    assert make_optimizer(get_config(), model, device).defaults["fused"] is True
    with pytest.raises(ConfigError, match="apex"):
        make_optimizer(get_config(overrides=["SOLVER.OPTIMIZER", "ApexFusedSGD"]), model, device)


# ------------------------------------------------------------------------------------------ loss window


def losses(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


FINE, BAD = torch.tensor(0.0), torch.tensor(1.0)


def test_window_means_and_clears():
    window = LossWindow()
    window.add(1, losses(a=1.0, b=3.0), [7], FINE)
    window.add(2, losses(a=2.0, b=5.0), [8], FINE)
    assert window.read() == {"loss": 5.5, "a": 1.5, "b": 4.0}
    window.add(3, losses(a=0.5, b=0.5), [9], FINE)
    assert window.read()["loss"] == 1.0


def test_a_step_that_is_not_finite_is_found():
    window = LossWindow()
    window.add(41, losses(loss_mask=1.0, loss_box_reg=1.0), [5, 6], FINE)
    assert window.problem() is None
    window.add(42, losses(loss_mask=math.nan, loss_box_reg=1.0), [7, 8], FINE)
    window.add(43, losses(loss_mask=math.nan, loss_box_reg=math.inf), [9], BAD)
    assert "iteration 42" in window.problem()
    with pytest.raises(BadStep) as caught:
        window.read()
    bad = caught.value
    assert (bad.iteration, bad.image_ids, bad.losses["loss_box_reg"]) == (42, [7, 8], 1.0)
    assert math.isnan(bad.losses["loss_mask"])


def test_steps_left_out_are_counted_and_not_in_the_mean():
    """Two may be left out; the third ends the run. A NaN loss with a finite gradient always does."""
    window = LossWindow("skip", allowed=2)
    for iteration, (value, left_out) in enumerate([(1.0, FINE), (math.nan, BAD), (3.0, FINE)]):
        window.add(iteration, losses(a=value), [iteration], left_out)
    assert window.read() == {"loss": 2.0, "a": 2.0} and window.skipped == 1
    window.add(3, losses(a=5.0), [3], BAD)
    assert window.read()["a"] == 5.0 and (window.skipped, window.skipped_now) == (2, 1)
    window.add(4, losses(a=5.0), [4], BAD)
    with pytest.raises(BadStep):
        window.read()
    window = LossWindow("skip", allowed=2)
    window.add(0, losses(a=math.nan), [0], FINE)
    with pytest.raises(BadStep):
        window.read()


def test_a_scaled_overflow_is_no_error_but_a_nan_loss_is():
    window = LossWindow("scale")
    for iteration in range(3):
        window.add(iteration, losses(a=1.0), [], BAD if iteration else FINE)
    assert window.read()["a"] == 1.0 and window.skipped == 2
    window.add(3, losses(a=math.inf), [], BAD)
    with pytest.raises(BadStep):
        window.read()


# ------------------------------------------------------------------------------------------------ pace


def test_the_parts_of_a_step_are_measured_apart(tiny_config, tmp_path, monkeypatch):
    """On a clock that moves only where the test lets a part sleep, and so for exactly as long."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def sleeping(part: str, call=lambda *_: None):
        def late(*arguments, **options):
            clock[0] += slept[part]
            return call(*arguments, **options)

        return late

    slept = {"data": 1.0, "forward": 2.0, "backward": 4.0, "optimizer": 8.0, "log": 16.0, "checkpoint": 32.0}
    changes = ["LOGGING.PERIOD", 2, "SOLVER.MAX_ITER", 4, "DATALOADER.NUM_WORKERS", 0]
    run = train.build_run(get_config(tiny_config, changes), get_device("cpu"), tmp_path, resume=False)
    run.batches = map(sleeping("data", lambda batch: batch), run.batches)
    run.model.register_forward_pre_hook(sleeping("forward"))
    next(p for p in run.model.parameters() if p.requires_grad).register_hook(sleeping("backward"))
    monkeypatch.setattr(run.optimizer, "step", sleeping("optimizer", run.optimizer.step))
    monkeypatch.setattr(run.metrics, "write", sleeping("log", run.metrics.write))
    monkeypatch.setattr(checkpoint, "save", sleeping("checkpoint", checkpoint.save))
    train.train(run)
    run.metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iter"] for line in lines] == [2, 4]
    for line in lines:
        assert {name: line[f"{name}_time"] for name in ("data", *PHASES)} == {n: slept[n] for n in ("data", *PHASES)}
        assert line["time"] == 1 + 2 + 4 + 8
    assert PHASES[0] not in Pace(get_device("cpu"), marked=False).read()  # of captured steps nobody knows
    # What followed the line before, a step's share of it
    assert [(line["log_time"], line["checkpoint_time"]) for line in lines] == [(0, 0), (8, 16)]


def test_metrics_of_steps_trained_again_are_cut(tmp_path):
    first = MetricsWriter(tmp_path, tensorboard=False, iteration=0)
    for done in (1, 2, 3):
        first.write({"iter": done, "loss": 1.0})
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iter": 4, "lo')  # killed in the middle of a line
    second = MetricsWriter(tmp_path, tensorboard=False, iteration=2)
    second.write({"iter": 3, "loss": 2.0})
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["iter"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 2.0)]


# ------------------------------------------------------------------------------------------ checkpoints


def test_a_failed_write_leaves_the_old_file(tmp_path):
    checkpoint.save(tmp_path, "model_0000001.pth", dict.fromkeys(checkpoint.KEYS, 1))

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.write_atomically(tmp_path / "model_0000001.pth", fail)
    assert checkpoint.read(tmp_path / "model_0000001.pth")["model"] == 1
    names = ["checkpoints.txt", "last_checkpoint", "model_0000001.pth"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_fresh_run_forgets_the_former_ones_checkpoint(tmp_path):
    checkpoint.save(tmp_path, "model_0000001.pth", {})
    checkpoint.save(tmp_path, "model_best.pth", {}, last=False)
    assert checkpoint.last(tmp_path).name == "model_0000001.pth"
    checkpoint.forget(tmp_path)
    assert checkpoint.last(tmp_path) is None and (tmp_path / "model_0000001.pth").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_checkpoint_is_an_error(tmp_path, share):
    path = checkpoint.save(tmp_path, "model_final.pth", {"model": {"w": torch.zeros(1000)}, "config": ""})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"cannot read .*model_final\.pth"):
        checkpoint.read(path)


# ---------------------------------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def small_model() -> nn.Module:
    return build_model(get_config(SMALL), get_device("cpu"))


def test_whole_models_must_match(tmp_path, small_model):
    state = small_model.state_dict()
    torch.save({"model": state}, tmp_path / "same.pth")
    assert weights.load_weights(small_model, str(tmp_path / "same.pth")) == "maskrcnn_benchmark"
    changed = dict(state)
    changed["roi_heads.box.predictor.cls_score.weight"] = torch.zeros(5, 512)
    torch.save(changed, tmp_path / "classes.pth")
    with pytest.raises(
        CheckpointError, match=r"another model: .*cls_score\.weight is \(5, 512\) there and \(81, 512\)"
    ):
        weights.load_weights(small_model, str(tmp_path / "classes.pth"))
    del changed["roi_heads.box.predictor.cls_score.weight"]
    torch.save(changed, tmp_path / "missing.pth")
    with pytest.raises(CheckpointError, match="1 missing"):
        weights.load_weights(small_model, str(tmp_path / "missing.pth"))
    torch.save({"x": torch.zeros(1)}, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match="no known format"):
        weights.load_weights(small_model, str(tmp_path / "foreign.pth"))
    with pytest.raises(CheckpointError, match="does not exist"):
        weights.load_weights(small_model, str(tmp_path / "nothing.pth"))


def test_code_in_a_weights_file_is_not_run(tmp_path, small_model):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Attack()}, tmp_path / "attack.pth")
    (tmp_path / "attack.pkl").write_bytes(pickle.dumps({"model": Attack()}))
    with pytest.raises(CheckpointError):
        weights.load_weights(small_model, str(tmp_path / "attack.pth"))
    with pytest.raises(CheckpointError, match="ALLOW_PICKLE"):
        weights.load_weights(small_model, str(tmp_path / "attack.pkl"))
    with pytest.raises(CheckpointError, match="only arrays"):
        weights.load_weights(small_model, str(tmp_path / "attack.pkl"), allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def detectron_backbone(body: nn.Module) -> dict[str, np.ndarray]:
    """The names of Detectron's R-50.pkl, for a body with frozen norms."""
    blobs = {"fc1000_w": np.zeros((1000, 8), np.float32), "fc1000_b": np.zeros(1000, np.float32)}
    for name, tensor in body.state_dict().items():
        parts = name.split(".")
        if parts[-1].startswith("running"):
            continue
        norm = "bn" in parts[-2] or parts[-2] == "1"
        leaf = {"weight": "bn_s" if norm else "w", "bias": "bn_b"}[parts[-1]]
        if parts[0] == "stem":
            key = f"conv1_{leaf}" if not norm else f"res_conv1_{leaf}"
        elif parts[2] == "downsample":
            key = f"res{int(parts[0][-1]) + 1}_{parts[1]}_branch1_{leaf}"
        else:
            key = f"res{int(parts[0][-1]) + 1}_{parts[1]}_branch2{'abc'[int(parts[2][-1]) - 1]}_{leaf}"
        blobs[key] = tensor.numpy() + 1
    return blobs


@pytest.mark.parametrize("body", ["FPN", "C4"])
def test_detectron_backbone_from_the_cache(tmp_path, monkeypatch, body):
    """catalog:// never downloads: it says what to fetch and where to put it, and takes it from there."""
    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path))
    name = f"e2e_mask_rcnn_R_50_{body}_1x.yaml"
    cfg = get_config(ROOT / "configs" / name)
    model = build_model(cfg, get_device("cpu"))
    with pytest.raises(CheckpointError, match=rf"https://.*R-50\.pkl to {tmp_path}.*from scratch"):
        weights.load_weights(model, cfg.MODEL.WEIGHT)
    source = build_model(get_config(ROOT / "configs" / "e2e_mask_rcnn_R_50_FPN_1x.yaml"), get_device("cpu"))
    blobs = detectron_backbone(source.backbone.body)
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    with pytest.raises(CheckpointError, match="ALLOW_PICKLE"):
        weights.load_weights(model, cfg.MODEL.WEIGHT)
    assert weights.load_weights(model, cfg.MODEL.WEIGHT, allow_pickle=True) == "detectron"
    loaded = model.state_dict()
    np.testing.assert_array_equal(loaded["backbone.body.stem.conv1.weight"], blobs["conv1_w"])
    np.testing.assert_array_equal(loaded["backbone.body.layer2.1.bn3.bias"], blobs["res3_1_branch2c_bn_b"])
    res5 = "backbone.body." if body == "FPN" else "roi_heads.box.feature_extractor.head."
    np.testing.assert_array_equal(loaded[res5 + "layer4.0.downsample.0.weight"], blobs["res5_0_branch1_w"])


def test_torchvision_backbone(tmp_path):
    cfg = get_config(ROOT / "configs" / "e2e_mask_rcnn_R_50_FPN_1x.yaml", ["MODEL.RESNETS.STRIDE_IN_1X1", "False"])
    model = build_model(cfg, get_device("cpu"))
    body = {k: v + 1 for k, v in model.backbone.body.state_dict().items()}
    state = {name.removeprefix("stem."): tensor for name, tensor in body.items()}
    state |= {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    state["bn1.num_batches_tracked"] = torch.tensor(5)
    torch.save(state, tmp_path / "resnet50.pth")
    assert weights.load_weights(model, str(tmp_path / "resnet50.pth")) == "backbone"
    torch.testing.assert_close(model.backbone.body.state_dict(), body)


def test_a_run_is_out_of_the_garbage_collectors_sight():
    before = gc.get_freeze_count()
    with pytest.raises(ZeroDivisionError), out_of_the_collectors_sight():
        assert gc.get_freeze_count() > before + 10_000
        assert gc.isenabled()
        raise ZeroDivisionError
    assert gc.get_freeze_count() == 0
