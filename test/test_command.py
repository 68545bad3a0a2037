"""maskrcnn-benchmark, the tools as one command: from the checkout, and from a package that pip installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from maskrcnn_benchmark.__main__ import commands, main, summary
from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.errors import ConfigError, UserError
from maskrcnn_benchmark.places import find_recipe

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """What pip makes of the sources where there is no compiler: a directory with the package and bin/."""
    directory = tmp_path_factory.mktemp("installed")
    left_out = shutil.ignore_patterns(".*", "output", "build", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, directory / "source", ignore=left_out)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", directory / "site"]
    command = [sys.executable, "-m", "pip", "install", *options, directory / "source"]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "CXX": "/bin/false"})
    shutil.rmtree(directory / "source")
    return directory / "site"


@pytest.fixture
def call(installed, tmp_path):
    """Runs bash code with the installed command, far from any checkout."""

    def run(code: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PATH": f"{installed}/bin{os.pathsep}{os.environ['PATH']}"}
        environment |= {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
        command = ["bash", "-euc", code]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)

    return run


# Runs the command with each line's arguments, as many calls of it would, but imports torch once. A status of 1 is what
# the check of images as small as these ends with
ONE_PROCESS = """
import shlex, sys
from maskrcnn_benchmark.__main__ import main

for line in sys.stdin:
    sys.argv = shlex.split(line)
    try:
        main()
    except SystemExit as ended:
        assert not ended.code or (ended.code == 1 and " check " in line), (ended.code, line)
"""


def test_every_tool_is_a_subcommand():
    expected = {"train", "test", "predict", "dataset", "benchmark", "doctor", "parity"}
    assert expected <= commands().keys() and "zoo" not in commands()
    assert commands()["train"] == ROOT / "tools" / "train_net.py"


def test_the_quickstart_runs_from_an_installed_package(call, installed, tmp_path):
    """docs/quickstart.md's own commands, on fewer and smaller images and for two steps."""
    assert not list((installed / "maskrcnn_benchmark").glob("_C*"))
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    steps = re.findall(r"^```bash\n(maskrcnn-benchmark .*?)^```$", page, re.DOTALL | re.MULTILINE)
    changes = {
        "--train 800 --val 100 --size 192 192": "--train 8 --val 4 --size 64 64",
        "OUTPUT_DIR run": "OUTPUT_DIR run SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 LOGGING.TENSORBOARD False",
    }
    code = "".join(steps)
    for old, new in changes.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    code = re.sub(r"( dataset check .*)$", r"\1 --workers 0", code, flags=re.MULTILINE)
    (tmp_path / "one_process.py").write_text(ONE_PROCESS)
    done = call(f"{sys.executable} one_process.py <<'LINES'\n{code}LINES")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["environment"]["kernels"]["nms"] == "composite"
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 4
    assert json.loads((tmp_path / "scores" / "result.json").read_text())["bbox"] == result["bbox"]


def test_the_installed_command_says_what_it_can(call):
    told = call("maskrcnn-benchmark --help").stdout
    assert all(re.search(rf"^    {name}\b", told, re.MULTILINE) for name in commands())
    wrong = call("maskrcnn-benchmark trian")
    assert wrong.returncode == 2 and "choose from" in wrong.stderr and len(wrong.stderr.splitlines()) == 1


def test_a_command_must_be_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["maskrcnn-benchmark"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(commands()))
def test_each_subcommand_has_its_tools_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["maskrcnn-benchmark", name, "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        main()
    told = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and told.startswith(f"usage: maskrcnn-benchmark {name} ")
    assert summary(commands()[name]) in told


def test_a_recipe_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart.yaml", "configs/quickstart.yaml"):
        assert get_config(name).SOLVER.MAX_ITER == 1500
    (tmp_path / "quickstart.yaml").write_text("SOLVER: {MAX_ITER: 7}\n")
    assert get_config("quickstart.yaml").SOLVER.MAX_ITER == 7  # what is here comes first
    assert find_recipe("benchmark/smoke.yaml") == Path("benchmark/smoke.yaml")
    assert find_recipe("configs/benchmark/smoke.yaml") == ROOT / "configs/benchmark/smoke.yaml"
    with pytest.raises(ConfigError, match=r"cannot read config file .*nowhere\.yaml"):
        get_config("nowhere.yaml")


def test_errors_name_a_section_that_is_there():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    anchors = {re.sub(r"[^\w -]", "", line[3:]).lower().replace(" ", "-") for line in re.findall(r"^## .*", text, re.M)}
    kinds = [UserError, *UserError.__subclasses__()]
    assert len({kind.help for kind in kinds}) == len(anchors) > 5  # and every section is named by an error
    for kind in kinds:
        assert not kind.__subclasses__() or kind is UserError
        page, _, anchor = kind.help.partition("#")
        assert page == "docs/troubleshooting.md" and anchor in anchors, kind


def test_the_section_stands_behind_the_message(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sections = {"train --config-file nowhere.yaml": "configuration", "benchmark gate a.yaml": "benchmarks-and-reports"}
    for line, section in sections.items():
        monkeypatch.setattr(sys, "argv", ["maskrcnn-benchmark", *line.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.count("\n") == 1
        assert said.endswith(f" [docs/troubleshooting.md#{section}]\n")
