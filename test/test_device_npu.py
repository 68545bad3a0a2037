"""The NPU device: a test double of torch_npu in processes of its own, its absence, and CANN's environment.

PrivateUse1 can be renamed once a process and is then an accelerator that `auto` finds, so nothing here imports the
double into the process of the other tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from torch.utils import cpp_extension

DOUBLE = ROOT / "test" / "npu_double"


@pytest.fixture(scope="module")
def npu(tmp_path_factory) -> dict[str, str]:
    """The environment of a process that finds the double as torch_npu."""
    if not cpp_extension.is_ninja_available() or shutil.which(cpp_extension.get_cxx_compiler()) is None:
        pytest.skip("building the test double needs a C++ compiler and ninja")
    if importlib.util.find_spec("torch_npu"):
        pytest.skip("the real torch_npu is installed here")
    path = os.pathsep.join([str(DOUBLE), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {
        "PYTHONPATH": path,
        "TORCH_EXTENSIONS_DIR": str(tmp_path_factory.mktemp("npu_double")),
        "MASKRCNN_KERNELS": "auto",
    }


@pytest.fixture(scope="module")
def trained(run, npu, tiny_config, tmp_path_factory) -> dict[str, Path]:
    """Output directories of the same short run on the CPU and on the double."""
    outputs = {}
    for device, environment in (("cpu", {}), ("npu", npu)):
        outputs[device] = output = tmp_path_factory.mktemp(f"trained_{device}")
        result = run(
            "tools/train_net.py",
            *("--config-file", tiny_config, "--device", device, "OUTPUT_DIR", output, "SOLVER.MAX_ITER", "3"),
            env={**environment, "NPU_DOUBLE_CALLS": str(output / "calls.json")},
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return outputs


def losses(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key.startswith("loss")} for line in lines]


def test_operators_on_the_double(npu):
    """Golden values of the documentation, then every registered operator against the CPU: npu_double/checks.py."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(DOUBLE / "checks.py")]
    environment = {**os.environ, **npu, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_a_run_trains_as_on_the_cpu(trained):
    """The first losses come from the same weights and images. Later ones drift: rounding in a decoded box may decide
    otherwise which of two overlapping proposals stays."""
    cpu, npu = losses(trained["cpu"]), losses(trained["npu"])
    assert len(cpu) == len(npu) == 3
    assert npu[0] == pytest.approx(cpu[0], rel=2e-3)
    assert npu[0] != npu[1]
    assert npu[2]["loss"] == pytest.approx(cpu[2]["loss"], rel=0.1)
    assert npu[2]["loss"] < npu[0]["loss"]


def test_a_run_is_served_by_torch_npu(trained):
    calls = json.loads((trained["npu"] / "calls.json").read_text())
    assert set(calls) == {
        *("npu_roi_align", "npu_roi_alignbk", "npu_nms_v4", "npu_iou"),
        *("npu_bounding_box_encode", "npu_bounding_box_decode", "NpuFusedAdamW", "jit_compile"),
    }
    assert calls["NpuFusedAdamW"] == 3
    assert calls["jit_compile"] == [False]


def test_a_run_evaluates(trained):
    result = json.loads((trained["npu"] / "result.json").read_text())
    assert result["images"] == 5
    assert 0 <= result["bbox"]["AP"] <= 1 and 0 <= result["segm"]["AP"] <= 1
    assert result["environment"]["device_name"] == "test double"


def test_evaluation_of_a_checkpoint_is_that_of_the_cpu(run, npu, trained, tiny_config, tmp_path):
    scores = {}
    for device, environment in (("cpu", {}), ("npu", npu)):
        result = run(
            "tools/test_net.py",
            *("--config-file", tiny_config, "--ckpt", trained["npu"] / "model_final.pth", "--device", device),
            *("OUTPUT_DIR", tmp_path / device, "MODEL.ROI_HEADS.SCORE_THRESH", "0.0"),
            env=environment,
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        scores[device] = json.loads((tmp_path / device / "result.json").read_text())
    assert scores["npu"]["bbox"]["AR100"] == pytest.approx(scores["cpu"]["bbox"]["AR100"], abs=0.02)


def test_composites_serve_where_they_are_asked_for(run, npu, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from maskrcnn_benchmark import ops\n"
        "from maskrcnn_benchmark.device import get_device\n"
        "get_device('npu')\n"
        "print(ops.kernel_in_use('nms', 'npu'))\n"
    )
    result = run(str(script), env={**npu, "MASKRCNN_KERNELS": "composite"})
    assert (result.returncode, result.stdout.strip()) == (0, "composite"), result.stderr[-2000:]


@pytest.mark.skipif(not (ROOT / "tools" / "parity.py").exists(), reason="there is no tools/parity.py")
def test_parity(run, npu):
    result = run("tools/parity.py", "--device", "npu", env=npu)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is installed here")
def test_without_torch_npu_it_says_what_is_missing(run, tiny_config, tmp_path):
    result = run("tools/train_net.py", "--config-file", tiny_config, "--device", "npu", "OUTPUT_DIR", tmp_path / "out")
    assert result.returncode == 2
    line = result.stderr.strip().splitlines()[-1]
    assert "torch_npu" in line and "CANN" in line and "Traceback" not in result.stderr


# ---------------------------------------------------------------------------------------------- env_npu.sh

SHOWN = ("TASK_QUEUE_ENABLE", "HCCL_CONNECT_TIMEOUT", "HCCL_WHITELIST_DISABLE", "ASCEND_GLOBAL_LOG_LEVEL", "CANN_IS")


@pytest.fixture
def machine(tmp_path) -> Path:
    """A root directory without anything of Ascend's, with a python that cannot import torch_npu."""
    executable(tmp_path / "bin" / "python", "echo Traceback >&2; echo 'ImportError: libhccl.so: not found' >&2; exit 1")
    return tmp_path


def executable(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def install_cann(directory: Path) -> None:
    """CANN's own script reads variables that are not set and says where it lies."""
    directory.mkdir(parents=True)
    (directory / "set_env.sh").write_text(f'export CANN_IS="{directory.name}$NOT_SET_ANYWHERE"\n')


def source_env(machine: Path, **environment: str) -> tuple[dict[str, str], str]:
    """What env_npu.sh leaves in the environment of a strict shell, and what it says."""
    show = "; ".join(f'echo "{name}=${{{name}-}}"' for name in SHOWN)
    result = subprocess.run(
        [
            "bash",
            "-euo",
            "pipefail",
            "-c",
            f'source "{ROOT}/test/env_npu.sh"; {show}; echo "flags=$-"; compgen -v _npu || true',
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": f"{machine}/bin:/usr/bin:/bin", "NPU_ROOT": str(machine), **environment},
    )
    assert result.returncode == 0, result.stderr
    values = dict(line.split("=", 1) for line in result.stdout.splitlines())
    assert "u" in values.pop("flags")
    return values, result.stderr


def test_env_says_what_is_missing(machine):
    values, said = source_env(machine, HCCL_CONNECT_TIMEOUT="60")
    assert values == dict(zip(SHOWN, ("2", "60", "1", "3", "")))
    lines = said.splitlines()
    assert len(lines) == 3
    assert "set_env.sh" in lines[0] and "install the CANN toolkit" in lines[0]
    assert "npu-smi" in lines[1] and "driver" in lines[1]
    assert "ImportError: libhccl.so: not found" in lines[2] and "Traceback" not in lines[2]


@pytest.mark.parametrize(
    ("place", "note"),
    [
        ("usr/local/Ascend/ascend-toolkit", None),
        ("usr/local/Ascend/nnae", None),
        ("opt/cann/ascend-toolkit", "Install_Path={root}/opt/cann"),
        ("opt/cann/latest", "Toolkit_InstallPath={root}/opt/cann/latest"),
    ],
)
def test_env_finds_cann(machine, place, note):
    install_cann(machine / place)
    if note:
        install_cann(machine / "usr" / "local" / "Ascend" / "nnae")  # the noted one comes first
        (machine / "etc" / "Ascend").mkdir(parents=True)
        (machine / "etc" / "Ascend" / "ascend_cann_install.info").write_text(
            f"version=8.0\n{note.format(root=machine)}\nuser=root\n"
        )
    executable(machine / "bin" / "npu-smi", "exit 0")
    executable(machine / "bin" / "python", "exit 0")
    values, said = source_env(machine)
    assert values["CANN_IS"] == Path(place).name
    assert "warning" not in said and place in said


def test_env_keeps_the_cann_that_is_active(machine):
    install_cann(machine / "home" / "mine")
    install_cann(machine / "usr" / "local" / "Ascend" / "ascend-toolkit")
    values, _ = source_env(machine, ASCEND_HOME_PATH=str(machine / "home" / "mine" / "latest"))
    assert values["CANN_IS"] == "mine"
