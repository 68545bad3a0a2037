"""MLPerf's log lines: those of a real run, and the verdict of MLCommons' checker where it is installed."""

import json
import re

import pytest

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.engine import train
from maskrcnn_benchmark.errors import ConfigError
from maskrcnn_benchmark.report.console import TrainingMeter
from maskrcnn_benchmark.report.mllog import MLLog

# The closed division's rules of Mask R-CNN ask for these forms of the settings, and for .377 and .339.
CLOSED = ["MLPERF.DIVISION", "closed", "SOLVER.BASE_LR", "0.02", "SOLVER.STEPS", "(4, 5)", "SOLVER.GAMMA", "0.1",
          "MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN", "1000"]  # fmt: skip
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
POOR, GOOD = ({"bbox": dict.fromkeys(METRICS, box), "segm": dict.fromkeys(METRICS, 0.341)} for box in (0.1, 0.38))


def lines(path):
    """The file as the checker reads it: a token and JSON a line."""
    found = []
    for line in path.read_text().splitlines():
        assert line.startswith(":::MLLOG ")
        found.append(json.loads(line.removeprefix(":::MLLOG ")))
        assert found[-1].keys() == {"namespace", "time_ms", "event_type", "key", "value", "metadata"}
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_config):
    """mllog.txt of a run of 6 steps, 3 an epoch, whose second evaluation scores GOOD and so ends it."""
    output = tmp_path_factory.mktemp("mllog")
    target = ["MLPERF.MIN_BBOX_MAP", "0.377", "MLPERF.MIN_SEGM_MAP", "0.339"]
    options = ["OUTPUT_DIR", str(output), "LOGGING.MLLOG", "True", "PER_EPOCH_EVAL", "True", "SOLVER.MAX_ITER", "9"]
    cfg = get_config(tiny_config, [*options, "SAVE_CHECKPOINTS", "False", *CLOSED, *target])
    scores = iter([POOR, GOOD])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate_model", lambda *_: next(scores) | {"eval_seconds": 1.0})
        train.run_training(cfg, get_device("cpu"))
    return output / "mllog.txt"


def test_a_run_in_order(trained):
    found = lines(trained)
    intervals = [(line["key"], line["metadata"].get("epoch_num")) for line in found if "INTERVAL" in line["event_type"]]
    assert intervals == [
        ("init_start", None), ("init_stop", None), ("run_start", None),
        ("epoch_start", 1), ("epoch_stop", 1), ("eval_start", 1), ("eval_stop", 1),
        ("epoch_start", 2), ("epoch_stop", 2), ("eval_start", 2), ("eval_stop", 2),
        ("run_stop", None),
    ]  # fmt: skip
    assert found[-1]["metadata"] == {"status": "success"}
    times = [line["time_ms"] for line in found]
    assert times == sorted(times) and all(isinstance(time, int) for time in times)


def test_what_a_run_says(trained):
    values = {line["key"]: line["value"] for line in lines(trained)}
    assert values["submission_benchmark"] == "maskrcnn" and values["submission_division"] == "closed"
    assert values["submission_platform"].startswith("1 x ")
    assert (values["global_batch_size"], values["gradient_accumulation_steps"], values["seed"]) == (4, 1, 0)
    assert (values["train_samples"], values["eval_samples"]) == (12, 5)
    assert (values["opt_base_learning_rate"], values["opt_learning_rate_decay_steps"]) == (0.02, [4, 5])
    assert values["opt_name"] == "adamw" and "opt_momentum" not in values
    assert values["eval_accuracy"] == {"BBOX": 0.38, "SEGM": 0.341}
    assert values["tracked_stats"]["throughput"] > 0


def check(path):
    """The words of MLCommons' checker, training rules 3.1.0; empty where it accepts the file."""
    checker = pytest.importorskip("mlperf_logging.compliance_checker.mlp_compliance")
    judge = checker.make_checker("training", "3.1.0", quiet=False, werror=True)
    checker.main(str(path), "training_3.1.0/common.yaml", judge)
    return [*judge.overwritable.values(), *judge.not_overwritable]


def test_mlcommons_checker_accepts_the_closed_rules(trained):
    assert check(trained) == []


def test_mlcommons_checker_accepts_the_open_rules(trained, tmp_path):
    copy = tmp_path / "open.txt"
    copy.write_text(trained.read_text().replace('"closed"', '"open"').replace("0.38", "0.2"))
    assert check(copy) == []


@pytest.mark.parametrize("key", ["eval_accuracy", "run_stop", "global_batch_size", "init_stop", "submission_platform"])
def test_mlcommons_checker_misses_what_is_missing(trained, tmp_path, key):
    copy = tmp_path / "gap.txt"
    copy.write_text("".join(line for line in trained.read_text().splitlines(True) if f'"key": "{key}"' not in line))
    assert check(copy) != []


def test_epochs_are_counted_from_one_and_end_with_the_run(tmp_path):
    log = MLLog(tmp_path / "mllog.txt")
    log.run_start(start=3, total=5, steps_per_epoch=2)
    meter = TrainingMeter(5, 3, 4, warmup_steps=0)
    meter.add(2.0, 0.0)
    for iteration in (3, 4):
        log.begin_step(iteration)
        log.end_step(iteration + 1, meter)
    said = [(line["key"], line["metadata"].get("epoch_num")) for line in lines(tmp_path / "mllog.txt")]
    assert said[2:] == [("epoch_start", 2), ("epoch_stop", 2), ("tracked_stats", 2),
                        ("epoch_start", 3), ("epoch_stop", 3), ("tracked_stats", 3)]  # fmt: skip
    assert lines(tmp_path / "mllog.txt")[-1]["value"] == {"throughput": 2.0}


def test_a_fresh_run_begins_a_fresh_file_and_a_resumed_one_continues(tmp_path):
    file = tmp_path / "mllog.txt"
    MLLog(file).write("one")
    MLLog(file, resume=True).write("two")
    assert [line["key"] for line in lines(file)] == ["one", "two"]
    MLLog(file).write("three")
    assert [line["key"] for line in lines(file)] == ["three"]


def test_a_run_that_misses_its_target_or_fails_is_aborted(tmp_path):
    log = MLLog(tmp_path / "mllog.txt")
    log.run_stop(success=False)
    assert lines(tmp_path / "mllog.txt")[0]["metadata"] == {"status": "aborted"}


def test_without_the_key_nothing_is_written(tmp_path):
    log = MLLog()
    log.run_start(0, 4, 2)
    log.begin_step(0)
    log.end_step(2, TrainingMeter(4, 0, 4, 0))
    log.eval_start(2)
    log.eval_stop(2, GOOD)
    log.run_stop(True)
    assert not any(tmp_path.iterdir())


def test_division_and_status_are_one_of_a_few():
    with pytest.raises(ConfigError, match=re.escape("MLPERF.DIVISION")):
        get_config(None, ["MLPERF.DIVISION", "half-open"])
