"""Faults: killed processes, full and damaged disks, numbers that are not finite, ranks that are slow or stuck."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_train import TRAIN, assert_ok, assert_user_error, read_metrics, weights_of

from maskrcnn_benchmark.engine import nonfinite

THOROUGH = pytest.mark.skipif(not os.environ.get("MASKRCNN_TEST_THOROUGH"), reason="MASKRCNN_TEST_THOROUGH is not set")

# ------------------------------------------------------------------------------------------------------ numbers

# Runs train_net.py with a fault in the model: on images with these ids a loss (or its gradient) is spoilt.
SPOIL = """
import runpy, sys
import torch
from maskrcnn_benchmark.models.rcnn import RCNN
import maskrcnn_benchmark.engine.train as train

kind, wanted, once = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "once"
forward, struck = RCNN.forward, []

def spoilt(self, images, targets=None):
    losses = forward(self, images, targets)
    if self.training and wanted in images.image_ids and not (once and struck):
        struck.append(1)
        if kind == "loss":
            losses["loss_mask"] = losses["loss_mask"] * float("nan")
        else:
            losses["loss_mask"].register_hook(lambda gradient: gradient * float("inf"))
    return losses

RCNN.forward = spoilt
del sys.argv[1:4]
sys.argv[0] = "tools/train_net.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def spoilt(tiny_config, tmp_path):
    """train_net.py with a loss or gradient spoilt wherever an image is in the batch."""

    def call(kind: str, image: int, *overrides: object, ranks: int = 1, often: str = "always"):
        (tmp_path / "spoil.py").write_text(SPOIL)
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "maskrcnn_benchmark.engine.launch", "--standalone", "--nproc-per-node", str(ranks)]
        command += [tmp_path / "spoil.py", kind, image, often, "--config-file", tiny_config, "--device", "cpu"]
        command += ["--skip-test", "OUTPUT_DIR", tmp_path / "out", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        options = {"capture_output": True, "text": True, "timeout": 300, "env": environment, "cwd": ROOT}
        return subprocess.run([str(part) for part in command], **options)

    return call


def order_of(tiny_config, ranks: int) -> list[list[list[int]]]:
    """Image ids of the first epoch's steps, by rank, from the loader itself."""
    from maskrcnn_benchmark.config import get_config
    from maskrcnn_benchmark.data.loader import train_loader
    from maskrcnn_benchmark.device import get_device
    from maskrcnn_benchmark.engine.datasets import open_dataset

    cfg, device = get_config(tiny_config), get_device("cpu")
    dataset = open_dataset(cfg.DATASETS.TRAIN, cfg, training=True)
    loaders = [train_loader(cfg, dataset, device, rank, ranks, 0) for rank in range(ranks)]
    return [[job[2] for job, _ in zip(loader._jobs(), range(3))] for loader in loaders], dataset.image_ids


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_spoilt_step_stops_all_ranks_and_can_be_replayed(spoilt, run, tiny_config, tmp_path, kind):
    """On rank 1 in the second step of four between two log lines: the weights in the dump are those before it."""
    order, ids = order_of(tiny_config, 2)
    image = ids[order[1][1][0]]
    assert image not in [ids[i] for rank in order for i in rank[0]]
    keys = ("LOGGING.PERIOD", 4, "SOLVER.CHECKPOINT_PERIOD", 1000, "SOLVER.LR_SCHEDULER", "multistep")
    result = spoilt(kind, image, *keys, ranks=2)
    assert result.returncode == 1, result.stderr[-2000:]
    wanted = "loss_mask = nan" if kind == "loss" else "gradient of "
    for rank in ("error: ", "error on rank 1: "):
        line = next(line for line in result.stderr.splitlines() if line.startswith(rank + "iteration"))
        assert "iteration 2: " in line and wanted in line and "on rank 1, images [" in line and str(image) in line
    dump = nonfinite.read_dump(tmp_path / "out" / "nonfinite_step_2.pt")
    assert dump["rank"] == 1 and dump["image_ids"] == [ids[i] for i in order[1][1]] and dump["iteration"] == 1
    replay = run("tools/replay_step.py", tmp_path / "out" / "nonfinite_step_2.pt", "--device", "cpu")
    assert replay.returncode == 0 and "all is finite" in replay.stdout, "the fault was the test's, not the model's"
    arguments = ("--config-file", tiny_config, "--device", "cpu", "--skip-test", *keys, "SOLVER.MAX_ITER", "1")
    assert_ok(run(TRAIN, *arguments, "OUTPUT_DIR", tmp_path / "one", ranks=2))
    for name, tensor in weights_of(tmp_path / "one" / "model_final.pth").items():
        assert torch.equal(tensor, dump["model"][name]), name


def test_infinite_input_is_named_and_replayed(run, tiny_config, tmp_path):
    arguments = ("--config-file", tiny_config, "--device", "cpu", "OUTPUT_DIR", tmp_path)
    result = run(TRAIN, *arguments, "INPUT.PIXEL_STD", "[1e-44, 1e-44, 1e-44]")
    assert_user_error(result, "iteration 1: ", "normalize", "nonfinite_step_1.pt", status=1)
    replay = run("tools/replay_step.py", tmp_path / "nonfinite_step_1.pt", "--device", "cpu")
    assert replay.returncode == 1 and "first in the output of normalize" in replay.stdout
    (tmp_path / "other.pt").write_bytes(b"something else")
    assert_user_error(run("tools/replay_step.py", tmp_path / "other.pt"), "other.pt")


def test_steps_are_left_out_alike_on_all_ranks(spoilt, tiny_config, tmp_path):
    """One bad step of six may be left out: the run ends well, the log names the images, the losses stay finite."""
    order, ids = order_of(tiny_config, 2)
    image = ids[order[1][0][0]]  # in the first step: a momentum made then must not be garbage
    keys = ("SOLVER.SKIP_NONFINITE_STEPS", 1, "SOLVER.OPTIMIZER", "SGD", "LOGGING.PERIOD", 3)
    result = spoilt("loss", image, *keys, ranks=2, often="once")
    assert_ok(result)
    assert "iteration 1 is left out" in result.stdout
    lines = read_metrics(tmp_path / "out")
    assert {line["skipped_steps"] for line in lines} == {1} and all(line["loss"] < 100 for line in lines)
    weights = weights_of(tmp_path / "out" / "model_final.pth")
    assert all(tensor.isfinite().all() and tensor.abs().max() < 100 for tensor in weights.values())


def test_a_passing_fault_is_called_so(spoilt, tiny_config, tmp_path):
    order, ids = order_of(tiny_config, 1)
    result = spoilt("loss", ids[order[0][1][0]], often="once")
    assert_user_error(result, "iteration 2: loss_mask = nan", "passing fault", status=1)
