"""Whole runs as real processes: train, evaluate, resume, ranks, launchers, and what bad input leads to."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.evaluation.coco import segmentation_to_rle

METRICS = {
    "iter",
    "epoch",
    "loss",
    "loss_classifier",
    "loss_box_reg",
    "loss_mask",
    "loss_objectness",
    "loss_rpn_box_reg",
}
METRICS |= {"lr", "time", "data_time", "images_per_second", "max_memory_mb"}
METRICS |= {f"{part}_time" for part in ("forward", "backward", "optimizer", "log", "checkpoint")}
TRAIN = "tools/train_net.py"


def read_metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses_of(output: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k.startswith(("loss", "iter", "lr"))} for line in read_metrics(output)]


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def assert_ok(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def assert_user_error(result: subprocess.CompletedProcess, *words: str, status: int = 2) -> None:
    """One line on stderr that says what is wrong, no traceback, the right exit status."""
    assert result.returncode == status, result.stdout[-2000:] + result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert "error" in line
    for word in words:
        assert word in line, line


@pytest.fixture(scope="module")
def trained(run, tiny_config, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    output = tmp_path_factory.mktemp("trained")
    result = run(
        TRAIN, "--config-file", tiny_config, "--device", "cpu", "OUTPUT_DIR", output, "LOGGING.TENSORBOARD", "True"
    )
    assert_ok(result)
    return output, result


# ---------------------------------------------------------------------------------------------- one run


def test_a_run_writes_its_directory(trained):
    output, _ = trained
    names = {path.name for path in output.iterdir()}
    assert names >= {"config.yaml", "log.txt", "metrics.jsonl", "model_final.pth", "model_best.pth", "result.json"}
    assert names >= {"last_checkpoint", "model_0000002.pth", "model_0000004.pth"}
    assert any(name.startswith("events.out.tfevents.") for name in names)
    assert not [name for name in names if name.endswith(".tmp")]
    assert get_config(output / "config.yaml").SOLVER.MAX_ITER == 6
    lines = read_metrics(output)
    assert [line["iter"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(set(line) == METRICS for line in lines)


def test_result_json(trained):
    result = json.loads((trained[0] / "result.json").read_text())
    for task in ("bbox", "segm"):
        assert set(result[task]) >= {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1"}
        assert result[task]["AP"] is None or 0 <= result[task]["AP"] <= 1
    performance = result["performance"]
    assert performance["images_per_second"] > 0
    assert performance["images_per_second_per_device"] == pytest.approx(performance["images_per_second"])
    assert set(performance["step_ms"]) >= {"p50", "p90", "p99"} and performance["step_ms"]["p50"] > 0
    assert 0 <= performance["data_wait_share"] <= 1
    assert performance["warmup_steps"] == 1
    assert performance["max_memory_mb"] > 0 and performance["eval_seconds"] > 0
    assert result["environment"]["kernels"]["roi_align"] in ("native", "composite")
    assert re.fullmatch("[0-9a-f]{64}", result["config_sha256"])


def test_what_a_person_and_the_launchers_read(trained):
    output = trained[1].stdout
    line = next(line for line in output.splitlines() if "iter: 6 " in line)
    for word in ("eta: ", "loss: ", "loss_mask: ", "time: ", "data: ", "lr: ", "max mem: ", "average_train_fps: "):
        assert word in line
    final = output[output.index("------------------ Final result") :].splitlines()
    names = ["Final Performance images/sec", "Final Train Accuracy", "Final Box mAP", "Final Segm mAP"]
    names += ["E2E Training Duration sec"]
    assert [line.split(" : ")[0] for line in final[1:6]] == names
    float(final[1].split(" : ")[1])


def test_a_checkpoint_carries_names_and_configuration(trained):
    content = torch.load(trained[0] / "model_final.pth", weights_only=True)
    assert len(content["category_names"]) == len(content["category_ids"]) == 5
    assert "CONV_BODY: R-18-FPN" in content["config"]


def assert_same_detections(ours: Path, theirs: Path) -> None:
    """Entry by entry: the scores of a model this small are all 0, and would agree whatever it detects."""
    both = [json.loads((path / "inference" / "coco_2017_val.json").read_text()) for path in (ours, theirs)]
    one, two = (sorted(entries, key=lambda r: (r["image_id"], -r["score"], r["bbox"])) for entries in both)
    assert len(one) == len(two) > 20
    for a, b in zip(one, two):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert a["score"] == pytest.approx(b["score"], abs=1e-5) and a["bbox"] == pytest.approx(b["bbox"], abs=1e-2)


def test_evaluation_of_a_checkpoint_repeats_the_run(run, trained, tiny_config, tmp_path):
    arguments = ("--config-file", tiny_config, "--device", "cpu", "OUTPUT_DIR", tmp_path)
    result = run("tools/test_net.py", "--ckpt", trained[0] / "model_final.pth", *arguments)
    assert_ok(result)
    assert_same_detections(tmp_path, trained[0])
    assert "Final Box mAP : 0.0" in result.stdout


def test_saved_predictions_are_scored(run, shapes, tiny_config, tmp_path):
    """The ground truth itself, as results: everything right is 1."""
    truth = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())
    keys = ("image_id", "category_id", "bbox")
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    results = [
        {
            **{key: a[key] for key in keys},
            "score": 0.9,
            "segmentation": segmentation_to_rle(a["segmentation"], *sizes[a["image_id"]]),
        }
        for a in truth["annotations"]
    ]
    (tmp_path / "perfect.json").write_text(json.dumps(results))
    (tmp_path / "masks.json").write_text(json.dumps([{k: v for k, v in r.items() if k != "bbox"} for r in results]))
    arguments = ("--config-file", tiny_config, "--device", "cpu", "OUTPUT_DIR", tmp_path)
    assert_ok(run("tools/test_net.py", "--predictions", tmp_path / "perfect.json", *arguments))
    scores = json.loads((tmp_path / "result.json").read_text())
    assert scores["bbox"]["AP"] == scores["segm"]["AP"] == pytest.approx(1.0)
    assert_ok(run("tools/test_net.py", "--predictions", tmp_path / "masks.json", *arguments))
    scores = json.loads((tmp_path / "result.json").read_text())
    assert scores["segm"]["AP"] == pytest.approx(1.0) and scores["bbox"] is None


def test_missed_expectations_fail_the_run(run, trained, tiny_config, tmp_path):
    expected = '[["bbox", "AP", [0.9, 0.001]]]'
    arguments = ("--config-file", tiny_config, "--device", "cpu", "OUTPUT_DIR", tmp_path)
    result = run(
        "tools/test_net.py", "--ckpt", trained[0] / "model_final.pth", *arguments, "TEST.EXPECTED_RESULTS", expected
    )
    assert_user_error(result, "bbox", "AP", "0.9", status=1)


def test_predictions_with_pictures_and_json(run, trained, shapes, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8not a picture")
    arguments = ("--weights", trained[0] / "model_final.pth", "--output", tmp_path / "out", "--batch", "2")
    arguments += ("--json", tmp_path / "results.json", "--threshold", "0.0", "--device", "cpu")
    result = run("tools/predict.py", shapes / "val2017", tmp_path / "broken.jpg", *arguments)
    assert result.returncode == 1 and "broken.jpg" in result.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 5
    results = json.loads((tmp_path / "results.json").read_text())
    assert {r["image_id"] for r in results} <= set(range(5))
    assert all({"bbox", "score", "segmentation", "category_name", "file_name"} <= set(r) for r in results)


@pytest.mark.parametrize("overrides", [(), ("MODEL.CLS_AGNOSTIC_BBOX_REG", "True", "SOLVER.MAX_EPOCHS", "1")])
def test_faster_rcnn(run, tiny_config, shapes, tmp_path, overrides):
    """Without the mask head: no mask loss, no segm scores; with an epoch budget: 12 images in batches of 4."""
    arguments = ("--config-file", tiny_config, "--device", "cpu", "MODEL.MASK_ON", "False", *overrides)
    assert_ok(run(TRAIN, *arguments, "OUTPUT_DIR", tmp_path / "out"))
    lines = read_metrics(tmp_path / "out")
    assert len(lines) == (3 if overrides else 6) and set(lines[0]) == METRICS - {"loss_mask"}
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["segm"] is None and result["bbox"]["AP"] is not None
    weights = ("--weights", tmp_path / "out" / "model_final.pth", "--threshold", "0.0", "--device", "cpu")
    assert_ok(run("tools/predict.py", shapes / "val2017", *weights, "--output", tmp_path / "drawn"))
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 5


# ------------------------------------------------------------------------------- resume and accumulation


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_continues_bit_for_bit(run, tiny_config, tmp_path, ranks):
    """Stopped by kill -9 in mid-epoch: weights, optimizer state and losses equal the uninterrupted run's."""
    common = ("--config-file", tiny_config, "--device", "cpu", "--skip-test", "SOLVER.MAX_ITER", "24")
    assert_ok(run(TRAIN, *common, "OUTPUT_DIR", tmp_path / "whole", ranks=ranks))
    killed = start(common, tmp_path / "killed", ranks)
    # last_checkpoint names a file once the file is whole: 4 is sure to be named when 6 is there.
    wait_for(lambda: (tmp_path / "killed" / "model_0000006.pth").exists(), killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "model_final.pth").exists()
    result = run(TRAIN, *common, "--resume", "OUTPUT_DIR", tmp_path / "killed", ranks=ranks)
    assert_ok(result)
    assert 4 <= int(re.search(r"at iteration (\d+)", result.stdout)[1]) < 24
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "killed")
    whole, resumed = (torch.load(tmp_path / d / "model_final.pth", weights_only=True) for d in ("whole", "killed"))
    assert_equal(whole["model"], resumed["model"])
    assert_equal(whole["optimizer"]["state"], resumed["optimizer"]["state"])


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert_equal(a[key], b[key]) if isinstance(a[key], dict) else torch.testing.assert_close(
            a[key], b[key], rtol=0, atol=0
        )


def start(arguments: tuple, output: Path, ranks: int) -> subprocess.Popen:
    """A run in a process group of its own, to be killed."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(ROOT / TRAIN), *map(str, arguments), "OUTPUT_DIR", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    for _ in range(int(seconds * 200)):
        if condition():
            return
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    raise AssertionError("nothing happened")


def test_accumulated_batches_equal_one_big_batch(run, tiny_config, tmp_path):
    """All images in one batch, in two halves, and in halves on two ranks: the same losses, gradients and so weights of
    the RPN, when every anchor is used and none is drawn. (The heads' proposals are each batch's own.)"""
    everything = ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000", "MODEL.RPN.LOSS_NORMALIZER", "batch")
    common = (
        "--config-file",
        tiny_config,
        "--device",
        "cpu",
        "--skip-test",
        "SOLVER.OPTIMIZER",
        "SGD",
        "SOLVER.MAX_ITER",
        "1",
    )
    common += ("SOLVER.IMS_PER_BATCH", "12", "INPUT.HORIZONTAL_FLIP_PROB_TRAIN", "0.0", "SOLVER.BASE_LR", "100.0")
    common += (*everything, "SOLVER.CLIP_GRADIENTS_NORM", "0.0", "SOLVER.WEIGHT_DECAY", "0.0")
    lines, weights = [], []
    for steps, ranks in ((1, 1), (2, 1), (1, 2), (2, 2)):
        output = tmp_path / f"{steps}x{ranks}"
        assert_ok(run(TRAIN, *common, "SOLVER.ACCUMULATE_STEPS", str(steps), "OUTPUT_DIR", output, ranks=ranks))
        lines.append(losses_of(output)[0])
        weights.append(weights_of(output / "model_final.pth")["rpn.head.cls_logits.weight"])
    for line, weight in zip(lines[1:], weights[1:]):
        assert line["loss_objectness"] == pytest.approx(lines[0]["loss_objectness"], rel=1e-4)
        assert line["loss_rpn_box_reg"] == pytest.approx(lines[0]["loss_rpn_box_reg"], rel=1e-4)
        # The update is some .1 at this learning rate, the initial weights .01
        torch.testing.assert_close(weight, weights[0], atol=1e-3 * weights[0].abs().max().item(), rtol=1e-3)


def test_bfloat16_follows_float32(run, tiny_config, tmp_path):
    """Within 2% over 20 steps."""
    common = ("--config-file", tiny_config, "--skip-test", "SOLVER.MAX_ITER", "20", "SAVE_CHECKPOINTS", "False")
    for dtype in ("float32", "bfloat16"):
        assert_ok(run(TRAIN, *common, "DTYPE", dtype, "OUTPUT_DIR", tmp_path / dtype))
    one, two = (sum(line["loss"] for line in losses_of(tmp_path / dtype)) for dtype in ("float32", "bfloat16"))
    assert two == pytest.approx(one, rel=0.02) and two != one
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize(("segm_target", "reached"), [(0.0002, True), (0.99, False)])
def test_a_run_stops_at_its_target(run, tiny_config, tmp_path, segm_target, reached):
    """Both targets are needed. On its training images this model has an AP of some .004 after 15 steps."""
    arguments = ("SOLVER.BASE_LR", 0.005, "SOLVER.MAX_ITER", 60, "SOLVER.EVAL_PERIOD", 15, "LOGGING.PERIOD", 15)
    targets = ("MLPERF.MIN_BBOX_MAP", 0.0002, "MLPERF.MIN_SEGM_MAP", segm_target)
    more = ("DATASETS.TEST", '("coco_2017_train",)', "SAVE_CHECKPOINTS", "False", "OUTPUT_DIR", tmp_path)
    result = run(TRAIN, "--config-file", tiny_config, "--device", "cpu", *arguments, *targets, *more)
    assert_ok(result)
    last, scores = read_metrics(tmp_path)[-1]["iter"], json.loads((tmp_path / "result.json").read_text())
    assert last in (15, 30, 45) if reached else last == 60
    assert ("are reached at iteration" in result.stdout) == reached
    assert scores["bbox"]["AP"] >= 0.0002 and (scores["segm"]["AP"] >= segm_target) == reached


# ------------------------------------------------------------------------------------------------ ranks


def test_two_ranks_evaluate_like_one(run, trained, tiny_config, tmp_path):
    """Five images on two ranks: none twice, none missing."""
    arguments = ("--config-file", tiny_config, "--device", "cpu", "OUTPUT_DIR", tmp_path)
    assert_ok(run("tools/test_net.py", "--ckpt", trained[0] / "model_final.pth", *arguments, ranks=2))
    assert_same_detections(tmp_path, trained[0])


def test_launcher_trains_on_two_ranks(run, shapes, tiny_config, tmp_path):
    """From another directory, with a path that shells stumble over, and nothing left in the data."""
    before = sorted(shapes.rglob("*"))
    output = tmp_path / "with space; and 中文"
    result = run(
        *("test/train_full_8p.sh", f"--data_path={shapes}", f"--config={tiny_config}", "--device=cpu", "--nproc=2"),
        *(f"--output={output}", "--batch_size=2", "SOLVER.MAX_ITER", "3"),
        cwd=tmp_path,
    )
    assert_ok(result)
    assert "Final Performance images/sec : " in result.stdout
    case = (output / "MaskRCNN_bs2_2p_acc.log").read_text()
    keys = (
        "Network RankSize BatchSize DeviceType CaseName ActualFPS TrainingTime TrainAccuracy ActualLoss E2ETrainingTime"
    )
    assert [line.split(" = ")[0] for line in case.splitlines()] == keys.split()
    assert all(line.split(" = ")[1] for line in case.splitlines())
    assert (output / "train_0.log").stat().st_size > 0 and (output / "train_1.log").exists()
    assert sorted(shapes.rglob("*")) == before


@pytest.mark.parametrize(("script", "ranks"), [("train_performance_1p.sh", 1), ("train_performance_8p.sh", 2)])
def test_launcher_measures_speed(run, shapes, tiny_config, tmp_path, script, ranks):
    """To the end, with the warm-up left out, and without evaluation or checkpoints."""
    result = run(
        *(f"test/{script}", f"--data_path={shapes}", f"--config={tiny_config}", "--device=cpu", f"--nproc={ranks}"),
        *(f"--output={tmp_path}", f"--batch_size={2 * ranks}", "SOLVER.MAX_ITER", 5, "LOGGING.WARMUP_STEPS", 2),
    )
    assert_ok(result)
    final = dict(line.split(" : ") for line in result.stdout.splitlines() if " : " in line)
    case = (tmp_path / f"MaskRCNN_bs{2 * ranks}_{ranks}p_perf.log").read_text()
    case = dict(line.split(" = ") for line in case.splitlines())
    performance = json.loads((tmp_path / "result.json").read_text())["performance"]
    per_device = performance["images_per_second_per_device"]
    assert performance["images_per_second"] == pytest.approx(ranks * per_device) and performance["warmup_steps"] == 2
    assert final["Final Performance images/sec"] == case["ActualFPS"] == f"{performance['images_per_second']:.2f}"
    assert case["RankSize"] == str(ranks) and case["BatchSize"] == str(2 * ranks) and case["DeviceType"] == "cpu"
    assert float(case["TrainingTime"]) == pytest.approx(performance["step_ms"]["p50"], abs=0.01)
    assert final["Final Segm mAP"] == case["TrainAccuracy"] == "n/a" and performance["eval_seconds"] is None
    assert read_metrics(tmp_path)[-1]["iter"] == 5 and not list(tmp_path.glob("*.pth"))


def test_launcher_ends_with_the_status_of_its_ranks(run, shapes, tiny_config, tmp_path):
    arguments = (
        f"--data_path={shapes}",
        f"--config={tiny_config}",
        "--device=cpu",
        "--nproc=2",
        f"--output={tmp_path}",
    )
    result = run("test/train_full_8p.sh", *arguments, "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "81")
    assert_user_error(result, "rank", "status 2")
    assert "NUM_CLASSES is 81" in result.stderr
    assert "NUM_CLASSES is 81" in (tmp_path / "train_1.log").read_text()


def test_killed_rank_ends_the_launcher(shapes, tiny_config, tmp_path):
    command = ["bash", str(ROOT / "test" / "train_full_8p.sh"), f"--data_path={shapes}", f"--config={tiny_config}"]
    command += ["--device=cpu", "--nproc=2", f"--output={tmp_path}", "SOLVER.MAX_ITER", "100000"]
    environment = {**os.environ, "PYTHON": sys.executable}
    launcher = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: (tmp_path / "model_0000002.pth").exists(), launcher)
        ranks = children(launcher.pid)
        assert len(ranks) >= 2
        os.kill(ranks[-1], signal.SIGKILL)
        assert launcher.wait(timeout=30) == 128 + signal.SIGKILL
        time.sleep(0.5)
        assert not [pid for pid in ranks if running(pid)]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listing]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# -------------------------------------------------------------------------------------------- bad input


def test_launcher_refuses_what_cannot_be(run, shapes, tmp_path):
    data = f"--data_path={shapes}"
    assert_user_error(run("test/train_full_8p.sh", data, "--device=cpu"), "8 processes", "--nproc")
    assert_user_error(run("test/train_full_1p.sh"), "--data_path")
    assert_user_error(run("test/train_full_1p.sh", "--data_path=/nowhere"), "/nowhere")
    assert_user_error(run("test/train_full_1p.sh", data, "--colour=red"), "--colour")
    assert_user_error(run("test/train_full_1p.sh", data, "--nproc=two"), "two")
    assert_user_error(run("test/train_full_1p.sh", data, "--device=tpu"), "tpu")
    npu = run("test/train_full_1p.sh", data, "--device=npu")
    assert npu.returncode == 2
    assert "env_npu.sh: " in npu.stderr, "the launcher prepares CANN's environment"
    assert "torch_npu" in npu.stderr.splitlines()[-1]


@pytest.fixture
def train_error(run, tiny_config, tmp_path):
    def call(*overrides, status: int = 2, words: tuple[str, ...] = ()):
        arguments = ("--config-file", tiny_config, "--device", "cpu", "OUTPUT_DIR", tmp_path / "out", *overrides)
        result = run(TRAIN, *arguments)
        assert_user_error(result, *words, status=status)
        return result

    return call


def test_wrong_arguments(run, tiny_config):
    assert_user_error(run(TRAIN), "--config-file")
    assert_user_error(run(TRAIN, "--config-file", "nothing.yaml"), "nothing.yaml")
    assert_user_error(run(TRAIN, "--config-file", tiny_config, "--device", "tpu"), "tpu")
    assert_user_error(run(TRAIN, "--config-file", tiny_config, "SOLVER.BASE_LRR", "1"), "SOLVER.BASE_LR?")
    assert_user_error(run("tools/predict.py", "nothing.jpg", "--weights", "x.pth", "--json", "y"), "nothing.jpg")


def test_wrong_data(train_error, tmp_path):
    train_error("DATA.PATH", tmp_path / "nowhere", words=("nowhere",))
    train_error("DATASETS.TRAIN", "('coco_2071_train',)", words=("coco_2071_train", "coco_2017_train"))
    train_error("MODEL.ROI_BOX_HEAD.NUM_CLASSES", "81", words=("NUM_CLASSES", "81", "6"))
    (tmp_path / "file").write_text("")
    train_error("OUTPUT_DIR", tmp_path / "file" / "out", words=("OUTPUT_DIR",))


def test_a_run_that_cannot_begin_leaves_the_former_one_alone(run, tiny_config, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    arguments = ("--config-file", tiny_config, "--device", "cpu", "OUTPUT_DIR", tmp_path / "out")
    assert_user_error(run(TRAIN, *arguments, "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "81"), "NUM_CLASSES")
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert {name for name in before if before[name] != after.get(name)} == {"log.txt"}


def test_wrong_weights(train_error, trained, tmp_path):
    train_error("MODEL.WEIGHT", tmp_path / "nothing.pth", words=("nothing.pth",))
    checkpoint = trained[0] / "model_final.pth"
    train_error("MODEL.WEIGHT", checkpoint, "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM", "16", words=("another model",))
    train_error(
        "MODEL.WEIGHT", "catalog://ImageNetPretrained/MSRA/R-50", words=("download", "R-50.pkl", "from scratch")
    )


def spoil(shapes: Path, directory: Path, change) -> Path:
    """A copy of the data set with `change(content)` applied to its training annotations; returns its directory."""
    shutil.copytree(shapes, directory)
    file = directory / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content = change(content) or content
    file.write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: {"some": "thing"}, ("not a COCO", "images")),
        (lambda c: c["annotations"][3].update(category_id=77), ("category id 77",)),
        (lambda c: c["annotations"][3].update(image_id=7777), ("image id 7777",)),
        (lambda c: c.update(images=[], annotations=[]), ("empty",)),
        (lambda c: c.update(annotations=[]), ("none of its 0 annotations",)),
        (lambda c: c["images"][2].update(file_name="gone.jpg"), ("gone.jpg",)),
        (lambda c: c["categories"][0].update(name="changed"), ("differ", "changed")),
    ],
    ids=[
        "not COCO",
        "unknown category",
        "unknown image",
        "empty",
        "no annotations",
        "missing file",
        "other categories",
    ],
)
def test_spoilt_annotations_stop_the_run(train_error, shapes, tmp_path, change, words):
    train_error("DATA.PATH", spoil(shapes, tmp_path / "data", change), words=words)
    assert not (tmp_path / "out" / "model_final.pth").exists()


def test_training_goes_on_without_unusable_annotations(run, tiny_config, shapes, tmp_path):
    """A zero-area box and a NaN coordinate are dropped, counted and named; training stays finite."""

    def change(content: dict) -> None:
        first, second = content["annotations"][:2]
        first["bbox"][2] = 0
        second["segmentation"][0][0] = math.nan

    data = spoil(shapes, tmp_path / "data", change)
    arguments = ("--config-file", tiny_config, "--device", "cpu", "--skip-test", "DATA.PATH", data)
    result = run(TRAIN, *arguments, "OUTPUT_DIR", tmp_path / "out")
    assert_ok(result)
    assert "1 annotations have a box without area and are dropped (ids 1)" in result.stdout
    assert (
        "1 annotations have coordinates that are NaN, infinite or millions of pixels away, and are dropped (ids 2)"
        in result.stdout
    )
    assert all(math.isfinite(line["loss"]) for line in read_metrics(tmp_path / "out"))


def test_resuming_a_finished_run_keeps_its_figures(run, tiny_config, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "out")
    arguments = ("--config-file", tiny_config, "--device", "cpu", "--resume", "OUTPUT_DIR", tmp_path / "out")
    assert_ok(run(TRAIN, *arguments))
    before, after = (json.loads((path / "result.json").read_text()) for path in (trained[0], tmp_path / "out"))
    assert before["performance"] == after["performance"]
    assert weights_of(tmp_path / "out" / "model_final.pth").keys() == weights_of(trained[0] / "model_final.pth").keys()


def test_resume_from_another_model_is_an_error(run, tiny_config, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "out")
    arguments = ("--config-file", tiny_config, "--device", "cpu", "--resume", "OUTPUT_DIR", tmp_path / "out")
    before = (tmp_path / "out" / "config.yaml").read_text()
    assert_user_error(run(TRAIN, *arguments, "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM", "16"), "another model")
    assert_user_error(run(TRAIN, *arguments, "SOLVER.OPTIMIZER", "SGD"), "AdamW", "SGD")
    assert (tmp_path / "out" / "config.yaml").read_text() == before
    (tmp_path / "out" / "last_checkpoint").write_text("model_gone.pth")
    (tmp_path / "out" / "checkpoints.txt").unlink()
    assert_user_error(run(TRAIN, *arguments), "model_gone.pth", "none before it")


def test_truncated_image_is_named(run, tiny_config, shapes, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    picture = next(iter(sorted((data / "train2017").glob("*.jpg"))))
    picture.write_bytes(picture.read_bytes()[:500])
    for workers in ("0", "2"):
        overrides = ("DATA.PATH", data, "OUTPUT_DIR", tmp_path / "out", "DATALOADER.NUM_WORKERS", workers)
        result = run(TRAIN, "--config-file", tiny_config, "--device", "cpu", *overrides)
        assert_user_error(result, picture.name)


def test_nan_loss_stops_the_run_and_names_the_images(run, tiny_config, tmp_path):
    result = run(
        *(TRAIN, "--config-file", tiny_config, "--device", "cpu", "OUTPUT_DIR", tmp_path, "SOLVER.BASE_LR", "1e30"),
        *("SOLVER.OPTIMIZER", "SGD", "SOLVER.CLIP_GRADIENTS_NORM", "0.0", "SAVE_CHECKPOINTS", "False"),
    )
    assert_user_error(result, "iteration", "images", "loss_", status=1)
    assert not (tmp_path / "model_final.pth").exists()


def test_nothing_of_torchvision_or_the_network_is_needed(run, tiny_config, tmp_path):
    """With torchvision blocked, and every connection other than to this machine refused."""
    blocker = tmp_path / "sitecustomize.py"
    blocker.write_text(
        "import socket, sys\nsys.modules['torchvision'] = None\n"
        "def refuse(self, address):\n    raise OSError('no network in tests')\n"
        "socket.socket.connect = refuse\n"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = run(
        *(
            TRAIN,
            "--config-file",
            tiny_config,
            "--device",
            "cpu",
            "OUTPUT_DIR",
            tmp_path / "out",
            "SOLVER.MAX_ITER",
            "1",
        ),
        env={"PYTHONPATH": paths},
    )
    assert_ok(result)
