"""SOLVER.EARLY_STOP_PATIENCE and SOLVER.SAVE_EPOCHS: runs that end at a plateau, and what is kept on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.engine import scoring
from maskrcnn_benchmark.engine.train import Run, run_training
from maskrcnn_benchmark.errors import CheckpointError, ConfigError


@pytest.fixture
def train(tiny_config, tmp_path):
    """A run in this process. At a rate of 0 the model stays what it is, and so does its score: a plateau."""

    def call(*overrides: str, resume: bool | Path = False) -> Run:
        keys = ["OUTPUT_DIR", str(tmp_path), "SOLVER.BASE_LR", "0.0", "LOGGING.PREDICTION_IMAGES", "0", *overrides]
        return run_training(get_config(tiny_config, keys), get_device("cpu"), resume=resume)

    return call


def iteration(path: Path) -> int:
    return torch.load(path, weights_only=True)["iteration"]


def test_a_plateau_stops(train, tmp_path):
    """The first evaluation is the best so far; two more without gain, and the run of 6 steps ends at the third."""
    run = train("SOLVER.EVAL_PERIOD", "1", "SOLVER.EARLY_STOP_PATIENCE", "2")
    assert (run.scored_at, run.without_gain) == (3, 2)
    assert (iteration(tmp_path / "model_final.pth"), iteration(tmp_path / "model_best.pth")) == (3, 1)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_without_patience_nothing_stops(train, tmp_path):
    run = train("SOLVER.EVAL_PERIOD", "1", "SOLVER.MAX_ITER", "4")
    assert (run.scored_at, run.without_gain) == (4, 3) and iteration(tmp_path / "model_final.pth") == 4


def test_a_gain_starts_the_count_anew(train, monkeypatch):
    """Scores .1 .2 .2 .3 .3 .3: the third and the two last bring nothing."""
    from maskrcnn_benchmark.engine import train as module

    given, real = iter((0.1, 0.2, 0.2, 0.3, 0.3, 0.3)), module.evaluate_model

    def judged(*arguments):
        scores = real(*arguments)
        scores["segm"]["AP"] = next(given)
        return scores

    monkeypatch.setattr(module, "evaluate_model", judged)
    run = train("SOLVER.EVAL_PERIOD", "1", "SOLVER.EARLY_STOP_PATIENCE", "2", "SOLVER.MAX_ITER", "9")
    assert (run.scored_at, run.without_gain, run.best) == (6, 2, 0.3)


def test_a_resumed_run_counts_on(train, tmp_path):
    """Stopped after two evaluations, of which the second brought nothing: one more, and it ends."""
    patience = ("SOLVER.EVAL_PERIOD", "1", "SOLVER.EARLY_STOP_PATIENCE", "2")
    assert train(*patience, "SOLVER.MAX_ITER", "2").without_gain == 1
    run = train(*patience, resume=True)
    assert (run.start, run.scored_at, run.without_gain) == (2, 3, 2)


def test_checkpoints_and_evaluations_by_epochs(train, tmp_path):
    """12 images, 4 a step: epochs end at steps 3, 6, ... 15; every second one is kept, and the last by its own name."""
    run = train("SOLVER.MAX_EPOCHS", "5", "SOLVER.STEPS", "()", "SOLVER.SAVE_EPOCHS", "2", "SOLVER.EVAL_PERIOD", "1")
    assert sorted(path.name for path in tmp_path.glob("model_0*.pth")) == ["model_0000006.pth", "model_0000012.pth"]
    assert (run.scored_at, run.without_gain) == (15, 2)  # scored at 6, 12 and 15


def test_a_run_continues_from_a_given_checkpoint(train, tmp_path):
    train("SOLVER.MAX_ITER", "4")
    run = train("SOLVER.MAX_ITER", "4", "OUTPUT_DIR", str(tmp_path / "b"), resume=tmp_path / "model_0000002.pth")
    assert run.start == 2 and iteration(tmp_path / "b" / "model_final.pth") == 4
    with pytest.raises(CheckpointError, match="does not exist"):
        train(resume=tmp_path / "none.pth")


def test_patience_needs_evaluations_and_waits_for_each(tiny_config):
    with pytest.raises(ConfigError, match=r"EARLY_STOP_PATIENCE is 2, .* set DATASETS\.TEST"):
        get_config(tiny_config, ["SOLVER.EARLY_STOP_PATIENCE", "2"])
    keys = ["SOLVER.SAVE_EPOCHS", "1", "TEST.OVERLAP", "always"]
    device = get_device("cpu")
    assert scoring.overlaps(get_config(tiny_config, keys), device)
    assert not scoring.overlaps(get_config(tiny_config, [*keys, "SOLVER.EARLY_STOP_PATIENCE", "2"]), device)
