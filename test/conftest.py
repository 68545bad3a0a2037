"""What the tests share: where the reference material lies, and models with the peers' weights."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(autouse=True)
def logging_restored():
    """setup_logging changes the process: a test after it in the same process counted its INFO lines as warnings."""
    loggers = [logging.getLogger(name) for name in ("maskrcnn_benchmark", "py.warnings")]
    before = [(logger.handlers[:], logger.level) for logger in loggers]
    yield
    logging.captureWarnings(False)
    for logger, (handlers, level) in zip(loggers, before):
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:] = handlers
        logger.setLevel(level)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference material beside the checkout; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"the reference material {SHARED} is not here")
    return SHARED


@pytest.fixture(scope="session")
def coco_mini(shared: Path) -> Path:
    """159 real COCO images in COCO's own layout."""
    return shared / "data" / "coco_mini"


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A small generated data set: 12 training and 5 validation images of 96 x 96."""
    from maskrcnn_benchmark.data.synthetic import generate

    directory = tmp_path_factory.mktemp("data") / "shapes"
    generate(directory, train_images=12, val_images=5, size=(96, 96), seed=3)
    return directory


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory, shapes) -> Path:
    """A model small enough to train in a test, on the generated data set."""
    return write_tiny_config(tmp_path_factory.mktemp("config") / "tiny.yaml", shapes)


def write_tiny_config(path: Path, shapes: Path) -> Path:
    path.write_text(
        f"""
_BASE_: {ROOT / "configs" / "quickstart.yaml"}
DATA: {{PATH: {shapes}}}
MODEL:
  RESNETS: {{STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 32, BACKBONE_OUT_CHANNELS: 16}}
  RPN: {{BATCH_SIZE_PER_IMAGE: 32}}
  ROI_HEADS: {{BATCH_SIZE_PER_IMAGE: 16}}
  ROI_BOX_HEAD: {{MLP_HEAD_DIM: 32}}
  ROI_MASK_HEAD:
    CONV_LAYERS: (16,)
INPUT:
  MIN_SIZE_TRAIN: (96,)
  MAX_SIZE_TRAIN: 96
  MIN_SIZE_TEST: 96
  MAX_SIZE_TEST: 96
SOLVER: {{IMS_PER_BATCH: 4, MAX_ITER: 6, CHECKPOINT_PERIOD: 2, CHECKPOINTS_KEPT: 0, WARMUP_ITERS: 0}}
TEST: {{IMS_PER_BATCH: 4}}
LOGGING: {{PERIOD: 1, WARMUP_STEPS: 1, TENSORBOARD: False}}
"""
    )
    return path


@pytest.fixture(scope="session")
def run():
    """Runs a command of the checkout as a user would: `run("tools/train_net.py", ...)`, Python or shell by suffix."""

    def call(script: str, *arguments: str | Path, ranks: int = 1, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / script)] if script.endswith(".py") else ["bash", str(ROOT / script)]
        if ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command = [sys.executable, *launcher, *command[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **options.pop("env", {})}
        options = {"capture_output": True, "text": True, "timeout": 300, "env": environment} | options
        return subprocess.run([*command, *map(str, arguments)], **options)

    return call


@pytest.fixture(scope="session")
def benchmark_tool():
    """tools/benchmark.py as a module, for calls in this process."""
    spec = importlib.util.spec_from_file_location("benchmark_tool", ROOT / "tools" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
