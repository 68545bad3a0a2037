"""Faults: killed processes, full and damaged disks, numbers that are not finite, ranks that are slow or stuck."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fault_injection as faults
import numpy as np
import pytest
import torch
from conftest import ROOT, write_tiny_config
from test_train import TRAIN, assert_ok, assert_user_error, read_metrics, weights_of

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.data.loader import _seeded, train_loader
from maskrcnn_benchmark.data.synthetic import generate
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.engine import checkpoint, determinism, distributed, nonfinite
from maskrcnn_benchmark.engine.datasets import open_dataset
from maskrcnn_benchmark.engine.optim import make_optimizer
from maskrcnn_benchmark.engine.train import prepare_output, update
from maskrcnn_benchmark.errors import CheckpointError, ConfigError, DeviceError

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


def order_of(tiny_config, ranks: int, steps: int = 3) -> tuple[list[list[list[int]]], list[int]]:
    """Image indices of the first steps by rank, from the loader itself (an epoch has three), and the images' ids."""
    cfg, device = get_config(tiny_config), get_device("cpu")
    dataset = open_dataset(cfg.DATASETS.TRAIN, cfg, training=True)
    loaders = [train_loader(cfg, dataset, device, rank, ranks, 0) for rank in range(ranks)]
    return [[job[2] for job, _ in zip(loader._jobs(), range(steps))] for loader in loaders], dataset.image_ids


@pytest.fixture
def replay(monkeypatch, capsys):
    """tools/replay_step.py in this process: its exit status and what it prints."""

    def call(path: Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["replay_step.py", str(path), "--device", "cpu"])
        status = runpy.run_path(str(ROOT / "tools" / "replay_step.py"))["main"]()
        return status, capsys.readouterr().out

    return call


def assert_both_ranks_say(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode == 1, result.stderr[-2000:]
    for rank in ("error: ", "error on rank 1: "):
        line = next(line for line in result.stderr.splitlines() if line.startswith(rank + "iteration"))
        assert all(word in line for word in words), line


def test_a_spoilt_step_stops_all_ranks_and_can_be_replayed(spoilt, replay, tiny_config, tmp_path):
    """A gradient on rank 1 in the second step of four between two log lines: the dump has the weights before it."""
    order, ids = order_of(tiny_config, 2)
    image = ids[order[1][1][0]]
    assert image not in [ids[i] for rank in order for i in rank[0]]
    keys = ("LOGGING.PERIOD", 4, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.LR_SCHEDULER", "multistep")
    result = spoilt("gradient", image, *keys, ranks=2)
    assert_both_ranks_say(result, "iteration 2: ", "gradient of ", "on rank 1, images [", str(image))
    path = tmp_path / "out" / "nonfinite_step_2.pt"
    dump = nonfinite.read_dump(path)
    assert dump["rank"] == 1 and dump["image_ids"] == [ids[i] for i in order[1][1]] and dump["iteration"] == 1
    assert replay(path) == (0, f"step 2 of rank 1, images {dump['image_ids']}: all is finite\n"), "it was the test's"
    for name, tensor in weights_of(tmp_path / "out" / "model_0000001.pth").items():
        assert torch.equal(tensor, dump["model"][name]), name


def test_a_step_is_left_out_alike_on_all_ranks_and_the_next_ends_the_run(spoilt, tiny_config, tmp_path):
    """Rank 1's loss in the first step: a momentum made then must not be garbage. The image comes again in the second
    epoch, and only one step may be left out."""
    order, ids = order_of(tiny_config, 2, steps=6)
    index = order[1][0][0]
    step, rank = next((step, rank) for step in (3, 4, 5) for rank in (0, 1) if index in order[rank][step])
    keys = ("SOLVER.SKIP_NONFINITE_STEPS", 1, "SOLVER.OPTIMIZER", "SGD", "LOGGING.PERIOD", 1)
    result = spoilt("loss", ids[index], *keys, ranks=2)
    assert "iteration 1 is left out" in result.stdout
    words = (f"iteration {step + 1}: loss_mask = nan", f"on rank {rank}, images [", str(ids[index]))
    assert_both_ranks_say(result, *words)
    lines = read_metrics(tmp_path / "out")
    assert {line["skipped_steps"] for line in lines} == {1} and all(line["loss"] < 100 for line in lines[1:])
    dump = nonfinite.read_dump(tmp_path / "out" / f"nonfinite_step_{step + 1}.pt")
    assert dump["iteration"] == lines[-1]["iter"] == step
    assert all(tensor.isfinite().all() and tensor.abs().max() < 100 for tensor in dump["model"].values())


def test_infinite_input_is_named_and_replayed(run, replay, tiny_config, tmp_path):
    arguments = ("--config-file", tiny_config, "--device", "cpu", "OUTPUT_DIR", tmp_path)
    result = run(TRAIN, *arguments, "INPUT.PIXEL_STD", "[1e-44, 1e-44, 1e-44]")
    assert_user_error(result, "iteration 1: ", "normalize", "nonfinite_step_1.pt", status=1)
    status, said = replay(tmp_path / "nonfinite_step_1.pt")
    assert status == 1 and "first in the output of normalize" in said
    (tmp_path / "other.pt").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=r"cannot read .*other\.pt"):
        replay(tmp_path / "other.pt")


@THOROUGH
def test_a_passing_fault_is_called_so(spoilt, tiny_config, tmp_path):
    order, ids = order_of(tiny_config, 1)
    result = spoilt("loss", ids[order[0][1][0]], often="once")
    assert_user_error(result, "iteration 2: loss_mask = nan", "passing fault", status=1)


def test_a_scaler_skips_what_overflows_and_the_guard_counts_it():
    """float16's way on a CPU: an infinite gradient in the first step leaves weights and momentum as they were."""
    cfg, device, model = get_config(), get_device("cpu"), torch.nn.Linear(2, 2)
    optimizer, scaler = make_optimizer(cfg, model, device), torch.amp.GradScaler("cpu", init_scale=4.0)
    guard = nonfinite.Guard(cfg, optimizer, scaler, device)
    before = [parameter.clone() for parameter in model.parameters()]
    for factor, left_out in ((float("inf"), 1), (1.0, 0)):
        scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
        update(cfg, model, optimizer, scaler, guard)
        assert guard.policy == "scale" and guard.left_out == left_out
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) == bool(left_out)
    assert scaler.get_scale() == 2.0
    assert all(optimizer.state[p]["momentum_buffer"].abs().max() < 2 for p in model.parameters())


# -------------------------------------------------------------------------------------------------------- kills


@pytest.fixture
def strikes(tiny_config, tmp_path):
    """The faults of these kinds, one after each resume, then to the end: the same as a run left alone."""

    def call(case: faults.Case, *kinds: str, iterations: int) -> list[dict[str, str]]:
        length = ("SOLVER.MAX_ITER", str(iterations), "SOLVER.CHECKPOINT_PERIOD", "3")
        case = faults.Case(case.name, case.ranks, (*case.overrides, *length))
        rows = [faults.strike(kind, case, tiny_config, tmp_path / "struck", random.Random(1)) for kind in kinds]
        faults.finish(case, tiny_config, tmp_path / "struck")
        faults.finish(case, tiny_config, tmp_path / "whole")
        assert faults.difference(tmp_path / "whole", tmp_path / "struck") is None
        assert not list((tmp_path / "struck").glob(".*.tmp"))
        return rows

    return call


def test_ended_runs_end_like_one_left_alone(strikes):
    """Two ranks, accumulating, in bfloat16, with loader workers: SIGTERM, then kill -9 inside a checkpoint's write."""
    keys = (*faults.WORKERS, "SOLVER.ACCUMULATE_STEPS", "2", "DTYPE", "bfloat16")
    rows = strikes(faults.Case("", 2, keys), "SIGTERM", "kill in a write", iterations=30)
    assert [row["status"] for row in rows] == ["143", "137"]


@THOROUGH
@pytest.mark.parametrize("case", faults.CASES, ids=lambda case: case.name)
def test_every_fault_in_every_run(strikes, case):
    strikes(case, *faults.FAULTS, iterations=140)


def test_torchrun_restarts_resume_by_themselves_and_sigterm_to_one_rank_saves(tiny_config, tmp_path):
    """Rank 1 is killed: torchrun starts all ranks anew, and they resume. Then rank 1 alone gets SIGTERM: the main rank
    hears of it and saves. One rank goes on from there, and says that it is not two."""
    output = tmp_path / "out"
    keys = ("SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "3", "SOLVER.CHECKPOINTS_KEPT", "2")
    case = faults.Case("", 2, keys)
    process = faults.start(case, tiny_config, output, launcher=("--max-restarts", "1", "--monitor-interval", "0.1"))
    try:
        faults.wait_until(lambda: faults.progress(output) >= 7, process)
        os.kill(faults.ranks_of(process.pid, case, faults.processes(output))[1], signal.SIGKILL)
        faults.wait_until(lambda: "continuing from" in faults.said_by(output).read_text(), process)
        again = int(faults.said_by(output).read_text().rpartition("at iteration ")[2].split()[0])
        faults.wait_until(lambda: faults.progress(output) >= again + 4, process)
        os.kill(faults.ranks_of(process.pid, case, faults.processes(output))[1], signal.SIGTERM)
        faults.seconds_until_gone(process, output)
    finally:
        for pid in faults.processes(output):
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == 143 and again >= 6
    assert "SIGTERM: the run has ended after iteration" in faults.said_by(output).read_text()
    saved = checkpoint.read_last(output)[1]["iteration"]
    assert saved > again and len(list(output.glob("model_0*.pth"))) == 2
    faults.finish(faults.Case("", 1, ("SOLVER.MAX_ITER", str(saved + 2))), tiny_config, output)
    assert "was written by 2 ranks, now there are 1" in faults.said_by(output).read_text()
    assert read_metrics(output)[-1]["iter"] == saved + 2


# -------------------------------------------------------------------------------------------------------- ranks


def join(rank: int, port: int, late: float) -> None:
    """One of two ranks, started so many seconds late."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ.update(address | {"RANK": str(rank), "WORLD_SIZE": "2"})
    time.sleep(late)
    with distributed.process_group(get_device("cpu")):
        assert distributed.all_values(rank) == [0, 1]


def test_ranks_started_anew_do_not_look_for_the_former_ones():
    """torchrun's store outlives them: a rank that comes first must not read where the former one listened."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    fork = multiprocessing.get_context("fork")
    for late in (0, 1):
        ranks = [fork.Process(target=join, args=(rank, store.port, late * (1 - rank))) for rank in (0, 1)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [0, 0]


@pytest.fixture
def uneven(tmp_path, tiny_config) -> Path:
    """21 images, of which those of rank 1's first two steps have no objects at all."""
    data = tmp_path / "data"
    generate(data, train_images=21, val_images=1, size=(96, 96), seed=3)
    config = write_tiny_config(tmp_path / "uneven.yaml", data)
    order, ids = order_of(config, 2)
    empty = {ids[i] for batch in order[1][:2] for i in batch}
    path = data / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in empty]
    path.write_text(json.dumps(content))
    again, _ = order_of(config, 2)
    assert again == order and len(empty) == 4
    return config


def test_uneven_ranks_and_empty_batches(run, uneven, tmp_path):
    """21 images in batches of 4 over two ranks, one of which has no object in two of its steps; then all are evaluated,
    and each that has objects is counted once."""
    arguments = ("--config-file", uneven, "--device", "cpu", "OUTPUT_DIR", tmp_path / "out")
    assert_ok(run(TRAIN, *arguments, "DATASETS.TEST", "('coco_2017_train',)", ranks=2))
    lines = read_metrics(tmp_path / "out")
    losses = [[value for name, value in line.items() if name.startswith("loss")] for line in lines]
    assert len(losses) == 6 and all(np.isfinite(values).all() and len(values) == 6 for values in losses)
    details = json.loads((tmp_path / "out" / "inference" / "coco_2017_train_details.json").read_text())
    truth = json.loads((uneven.parent / "data" / "annotations" / "instances_train2017.json").read_text())
    assert len(truth["images"]) == 21
    assert [row[0] for row in details["images"]] == sorted({entry["image_id"] for entry in truth["annotations"]})


# Runs train_net.py with slow reads on rank 1, which after so many hang
SLOW = """
import os, runpy, sys, time
from maskrcnn_benchmark.data.coco import CocoDataset

load, left = CocoDataset.load, [int(sys.argv[1])]

def slow(self, index):
    if os.environ.get("RANK") == "1":
        left[0] -= 1
        time.sleep(0.2 if left[0] > 0 else 1000)
    return load(self, index)

CocoDataset.load = slow
del sys.argv[1]
sys.argv[0] = "tools/train_net.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_slow_rank_and_a_stuck_one_are_named(tiny_config, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, "-m", "maskrcnn_benchmark.engine.launch", "--standalone", "--nproc-per-node", "2"]
    command += [tmp_path / "slow.py", 12, "--config-file", tiny_config, "--device", "cpu", "--skip-test"]
    command += ["LOGGING.PERIOD", 2, "DISTRIBUTED.TIMEOUT", 5, "SOLVER.MAX_ITER", 1000, "OUTPUT_DIR", tmp_path / "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = {"capture_output": True, "text": True, "timeout": 120, "env": environment, "cwd": ROOT}
    result = subprocess.run([str(part) for part in command], **options)
    assert result.returncode == 1, result.stderr[-2000:]
    assert "WARNING: rank 1 on" in result.stdout and "is slow" in result.stdout
    assert "rank 0 on" not in result.stdout
    line = next(line for line in result.stderr.splitlines() if "no progress for 5 seconds" in line)
    assert "the ranks wait for rank 1 (process" in line and "reading data after iteration" in line
    assert "rank 0" not in line.partition("wait for")[2]


@THOROUGH
def test_a_frozen_rank_is_named(tiny_config, tmp_path):
    output, case = tmp_path / "out", faults.Case("", 2, ("SOLVER.MAX_ITER", "100000", "DISTRIBUTED.TIMEOUT", "15"))
    process = faults.start(case, tiny_config, output, launcher=("--shutdown-timeout", "2"))
    try:
        faults.wait_until(lambda: faults.progress(output) >= 3, process)
        os.kill(faults.ranks_of(process.pid, case, faults.processes(output))[1], signal.SIGSTOP)
        assert process.wait(timeout=60) == 1
        assert faults.seconds_until_gone(process, output) < faults.GONE_WITHIN
    finally:
        for pid in faults.processes(output):
            os.kill(pid, signal.SIGKILL)
    said = faults.said_by(output).read_text()
    assert "the ranks wait for rank 1 (process" in said and "has given no sign of life for" in said


# --------------------------------------------------------------------------------------------------------- disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no mount here: {error}")
    if mounted.returncode:
        pytest.skip(f"may not mount a file system: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_and_a_read_only_disk(run, tiny_config, small_disk):
    """A checkpoint has some 2 MB: the third ends the run, the second is whole, and nothing half written lies about."""
    output = small_disk / "out"
    arguments = ("--config-file", tiny_config, "--device", "cpu", "--skip-test", "OUTPUT_DIR", output)
    (small_disk / "other").write_bytes(b"x" * 1_000_000)
    result = run(TRAIN, *arguments, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", 50)
    assert_user_error(result, "cannot write", "model_00", "No space left on device")
    found = checkpoint.read_last(output)
    assert found is not None and not list(output.glob(".*.tmp"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ConfigError, match=r"cannot write to OUTPUT_DIR .*Read-only"):
        prepare_output(get_config(tiny_config, ["OUTPUT_DIR", str(output)]))


def test_data_that_vanishes_ends_the_run(shapes, tiny_config, tmp_path):
    data, output = tmp_path / "data", tmp_path / "out"
    shutil.copytree(shapes, data)
    case = faults.Case("", 1, ("DATA.PATH", str(data), "SOLVER.MAX_ITER", "100000"))
    process = faults.start(case, tiny_config, output)
    faults.wait_until(lambda: faults.progress(output) >= 3, process)
    data.rename(tmp_path / "elsewhere")
    assert process.wait(timeout=30) == 2
    last = faults.said_by(output).read_text().splitlines()[-1]
    assert last.startswith("error: ") and str(data / "train2017") in last
    assert checkpoint.read_last(output)[1]["iteration"] >= 2


def content_of(iteration: int) -> dict:
    return dict.fromkeys(checkpoint.KEYS, 0) | {"iteration": iteration, "model": {"w": torch.full((3000,), 1.0)}}


@pytest.fixture
def written(tmp_path) -> Path:
    """A former run's checkpoint, which must never be taken, and three of this run's."""
    checkpoint.save(tmp_path, "model_0000008.pth", content_of(8))
    checkpoint.forget(tmp_path)
    for iteration in (2, 4, 6):
        checkpoint.save(tmp_path, f"model_{iteration:07d}.pth", content_of(iteration))
    return tmp_path


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.75, 0.999])
def test_resume_falls_back_from_a_truncated_checkpoint(written, caplog, share):
    last = written / "model_0000006.pth"
    os.truncate(last, int(share * last.stat().st_size))
    path, content = checkpoint.read_last(written)
    assert path.name == "model_0000004.pth" and content["iteration"] == 4
    assert "cannot read checkpoint" in caplog.text and "falls back to model_0000004.pth" in caplog.text


def test_resume_falls_back_from_a_wrong_checksum_and_a_lost_file(written, caplog):
    """One bit of a weight: torch.load itself reads it without a word."""
    last, before = written / "model_0000006.pth", written / "model_0000004.pth"
    content = bytearray(last.read_bytes())
    content[content.index(torch.ones(8).numpy().tobytes()) + 3] ^= 1
    last.write_bytes(content)
    assert torch.load(last, weights_only=True)["iteration"] == 6
    before.unlink()
    assert checkpoint.read_last(written)[1]["iteration"] == 2
    assert "wrong checksum" in caplog.text and "model_0000004.pth does not exist" in caplog.text
    (written / "model_0000002.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"wrong checksum.*any of the 2 before it.*without --resume"):
        checkpoint.read_last(written)


def test_checkpoints_kept(written):
    checkpoint.save(written, "model_final.pth", content_of(7))
    checkpoint.keep(written, 2)
    names = sorted(path.name for path in written.glob("*.pth"))
    assert names == ["model_0000004.pth", "model_0000006.pth", "model_0000008.pth", "model_final.pth"]
    assert checkpoint.history(written) == ["model_0000004.pth", "model_0000006.pth", "model_final.pth"]
    (written / ".model_0000010.pth.77.tmp").write_bytes(b"half")
    (written / ".mine.tmp").write_bytes(b"not ours")
    checkpoint.remove_half_written(written)
    assert not (written / ".model_0000010.pth.77.tmp").exists() and (written / ".mine.tmp").exists()


# -------------------------------------------------------------------------------------------------- determinism


def test_deterministic_runs_are_equal_and_record_the_order(run, tiny_config, tmp_path):
    order, ids = order_of(tiny_config, 1)
    runs = [tmp_path / "one", tmp_path / "two"]
    for output in runs:
        arguments = ("--config-file", tiny_config, "--device", "cpu", "--skip-test", "--deterministic")
        assert_ok(run(TRAIN, *arguments, "OUTPUT_DIR", output, env={"OMP_NUM_THREADS": "2"}))
    assert faults.difference(*runs) is None
    records = [json.loads((output / "data_order.json").read_text()) for output in runs]
    assert records[0] == records[1] and records[0]["deterministic"] and len(records[0]["epochs"]) == 2
    assert records[0]["epochs"][0]["image_ids"] == [[ids[i] for i in batch] for batch in order[0]]


def test_operators_that_cannot_be_deterministic_are_all_named():
    device = get_device("cpu")
    with pytest.raises(DeviceError, match=r"put_.*set it to False"), determinism.all_at_once(True, device):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)


def test_data_sets_that_draw_from_global_generators_repeat_themselves():
    """Whatever was drawn before, each image has its own numbers, and the training step's generator is left alone."""

    def drawn(*seeds: int) -> tuple:
        with _seeded(*seeds):
            return random.random(), np.random.rand(), torch.rand(1).item()

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert drawn(0, 1, 2) == drawn(0, 1, 2)
    assert len({number for place in range(4) for number in drawn(0, 1, place)}) == 12
    assert torch.equal(torch.rand(1), expected)
