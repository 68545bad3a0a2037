"""The documents: examples run, keys and messages exist, links lead somewhere, and the one command starts."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from maskrcnn_benchmark.config import get_config

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str, heading: str = "") -> list[str]:
    """The page's code in a language, or that under a heading of the second level."""
    text = page.read_text(encoding="utf-8")
    if heading:
        text = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [code for kind, code in BLOCK.findall(text) if kind == language]


@pytest.fixture
def shell(tmp_path):
    """Runs bash code in an empty directory in which python, pip and maskrcnn-benchmark are this checkout's; what pip
    installs goes to a directory of the test's."""
    programs, site, work = (tmp_path / name for name in ("bin", "site", "work"))
    for directory in (programs, site, work):
        directory.mkdir()
    for name, module in {"python": "", "pip": "-m pip", "maskrcnn-benchmark": "-m maskrcnn_benchmark"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (programs / name).chmod(0o755)
    settings = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, site, work))),
        "PIP_TARGET": str(site),
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }

    def call(code: str) -> subprocess.CompletedProcess:
        command = ["bash", "-euo", "pipefail", "-c", code]
        environment = {**os.environ, **settings}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=work)

    call.directory = work
    return call


@pytest.mark.parametrize("heading", ["A device", "An operator", "A part of the model", "A data set"])
def test_the_examples_of_extending_run(shell, heading):
    """Blocks that begin with `# NAME` are files; then the shell's blocks run beside them."""
    page = DOCS / "extending.md"
    for code in blocks(page, "python", heading) + blocks(page, "toml", heading):
        name = re.match(r"# (\S+)\n", code)[1]
        (shell.directory / name).write_text(code)
    commands = blocks(page, "bash", heading)
    assert commands
    for command in commands:
        done = shell(command)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_torchrun_line_trains_on_two_nodes(shell, shapes, free_port):
    """The page's very line, but for: 2 nodes of 1 rank on this machine, a small model and its data, 2 steps."""
    code = blocks(DOCS / "multinode.md", "bash", "torchrun")[0].strip()
    changes = {
        "torchrun": "python -m torch.distributed.run",
        "--nproc-per-node 8": "--nproc-per-node 1",
        "29500": str(free_port),
        " tools/": f" {ROOT}/tools/",
        "configs/e2e_mask_rcnn_R_50_FPN_1x.yaml": "configs/quickstart.yaml --skip-test",
        "/data/coco": str(shapes),
        "/shared/run": "run",
        "IMS_PER_BATCH 16": "IMS_PER_BATCH 2",
        "IMS_PER_BATCH 32": "IMS_PER_BATCH 2 SOLVER.MAX_ITER 2 LOGGING.TENSORBOARD False MODEL.DEVICE cpu",
    }
    for old, new in changes.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    done = shell(f"export HEAD_NODE=127.0.0.1; NODE_RANK=1; {code} & NODE_RANK=0; {code}; wait $!")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 images a step, 2 steps" in (shell.directory / "run" / "log.txt").read_text()
    assert (shell.directory / "run" / "model_final.pth").exists()


SLURM = {
    "scontrol": '[ "$*" = "show hostnames node[1-2]" ] && printf "node1\nnode2\n"',
    "srun": 'shift; export SLURM_NODEID=1 SLURM_NNODES=2; exec "$@"',
}


@pytest.mark.parametrize("kind", ["Slurm", "Kubernetes"])
def test_the_job_files_start_torchrun_on_every_node(shell, kind):
    """What the second node's torchrun gets, where Slurm's programs and the operator's variables are doubles."""
    for name, code in {**SLURM, "torchrun": 'printf "%s\n" "$@"'}.items():
        (shell.directory / name).write_text(f"#!/bin/bash\n{code}\n")
        (shell.directory / name).chmod(0o755)
    variables = "export PATH=$PWD:$PATH SLURM_JOB_NODELIST='node[1-2]'"
    if kind == "Slurm":
        code = blocks(DOCS / "multinode.md", "bash", kind)[0]
        tool = ["tools/train_net.py"]
    else:
        job = yaml.safe_load(blocks(DOCS / "multinode.md", "yaml", kind)[0])["spec"]["pytorchReplicaSpecs"]
        assert job["Master"] == job["Worker"]
        pod = job["Worker"]["template"]["spec"]
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        code = shlex.join([*container["command"], *container["args"]])
        tool = ["-m", "maskrcnn_benchmark", "train"]
        variables += " WORLD_SIZE=2 RANK=1 MASTER_ADDR=node1 MASTER_PORT=29500"
    arguments = shell(f"{variables}\n{code}").stdout.split()
    start = arguments.index(tool[0])
    wanted = "--nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr node1 --master-port 29500"
    assert arguments[:start] == wanted.split() and arguments[start : start + len(tool)] == tool
    option, file, resume, *overrides = arguments[start + len(tool) :]
    assert (option, resume) == ("--config-file", "--resume")
    assert get_config(file, overrides).SOLVER.IMS_PER_BATCH == 32


@pytest.fixture
def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
