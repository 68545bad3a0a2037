"""The documents: examples run, keys and messages exist, links lead somewhere, and the one command starts."""

from __future__ import annotations

import ast
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from maskrcnn_benchmark.__main__ import commands, load
from maskrcnn_benchmark.config import flat, get_config
from maskrcnn_benchmark.config.defaults import get_defaults
from maskrcnn_benchmark.places import find_recipe

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


KEY = re.compile(r"`([A-Z][A-Z0-9]*(?:[._][A-Z0-9_]+)*)(?: [^`]*)?`")


# What the tools' parsers, links, keys and files are looked for in
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "README.zh-CN.md"])


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def of_ours(page: Path) -> str:
    """The page's text, of its tables the last column alone: others' names may stand in the first ones."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return "\n".join(line.rpartition(" | ")[2] if line.startswith("|") else line for line in lines)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "weights.md"], ids=name_of)
def test_every_key_exists(page):
    """With or without MODEL. before it. weights.md names detectron2's too."""
    known = {key: key for key in flat(get_defaults())}
    known |= {key.removeprefix("MODEL."): key for key in known}
    sections = {key.rpartition(".")[0] for key in known}
    keys = [key for key in KEY.findall(of_ours(page)) if "." in key]
    assert not [key for key in keys if key not in known and key not in sections]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_named_file_and_test_exists(page):
    text = of_ours(page)
    files = re.findall(r"(?<![\w/.-])((?:tools|configs|test|csrc|maskrcnn_benchmark)/[\w./-]+\.\w+)", text)
    examples = ("NAME.yaml", "test/output/")
    assert not [f for f in files if not (ROOT / f).exists() and not any(example in f for example in examples)]
    ours = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "test").glob("test_*.py"))
    tests = re.findall(r"`(?:test_\w+\.py::)?(test_\w+)(?:`|\.\.\.`|\*`)", page.read_text(encoding="utf-8"))
    parameters = ("test_pre_nms_top_n", "test_post_nms_top_n")
    assert not [test for test in tests if f"def {test}" not in ours and test not in parameters]


def test_keys_of_maskrcnn_benchmark_are_understood(tmp_path):
    """Those of its table are translated as the table says, or refused as it says."""
    from maskrcnn_benchmark.config.legacy import NORMS, RENAMED, WITHOUT_EFFECT, translate
    from maskrcnn_benchmark.errors import ConfigError

    text = (DOCS / "migrating.md").read_text(encoding="utf-8").split("## detectron2")[0]
    rows = dict(re.findall(r"^\| `([A-Z_.]+)`.* \| (.*) \|$", text, re.MULTILINE))
    assert f"`{RENAMED['MODEL.BACKBONE.OUT_CHANNELS']}`" == rows["MODEL.BACKBONE.OUT_CHANNELS"]
    assert translate({"MODEL.RESNETS.TRANS_FUNC": "BottleneckWithGN"}, "") == {"MODEL.RESNETS.NORM": "GN"}
    assert set(re.findall(r"FrozenBN|BN|GN", rows["MODEL.RESNETS.TRANS_FUNC"])) <= set(NORMS.values())
    assert "PATHS_CATALOG" in WITHOUT_EFFECT and "a warning" in rows["PATHS_CATALOG"]
    assert translate({"MODEL.RPN.RPN_HEAD": rows["MODEL.RPN.RPN_HEAD"].split("`")[1]}, "") == {}
    with pytest.raises(ConfigError, match="left out"):
        translate({"MODEL.FBNET.ARCH": "default"}, "")
    with pytest.raises(ConfigError, match="POSTPROCESS_MASKS is True"):
        get_config(overrides=["MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS", "True"])


def templates() -> list[str]:
    """Every text of the package, the tools and setup.py, with a NUL for what an f-string fills in."""
    found = []
    packaged = (ROOT / "maskrcnn_benchmark").rglob("*.py")
    for path in [ROOT / "setup.py", *(ROOT / "tools").glob("*.py"), *packaged]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value.rstrip("\n"))
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(parts).rstrip("\n"))
    return found


def says(template: str, message: str) -> bool:
    """Whether the message is the template filled in; up to its `...`, where it ends in that."""
    cuts = [len(template)]
    if message.endswith("..."):
        message = message.removesuffix("...").rstrip()
        cuts = [match.end() for match in re.finditer(re.escape(message[-4:]), template)] + cuts
    for cut in cuts:
        parts = template[:cut].split("\0")
        told = sum(map(len, parts)) >= 15 and all(part in message for part in parts)
        if told and re.fullmatch(".*".join(map(re.escape, parts)), message):
            return True
    return False


def test_what_says_tells_apart():
    assert says("\0: image id \0 is given twice", "a.json: image id 7 is given twice")
    assert says("\0 holds the state of \0, but it is \0: keep it", "x holds the state of SGD, but it is ...")
    assert not says("\0: image id \0 is given twice", "a.json: image id 7 is given")
    assert not says("\0: \0", "anything: at all that is long")


def test_every_message_of_troubleshooting_is_one_of_ours():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `(.+?)` \| ", text, re.MULTILINE)
    assert len(messages) > 40
    ours = templates()
    assert not [message for message in messages if not any(says(template, message) for template in ours)]


def tool_calls(page: Path) -> list[list[str]]:
    """Subcommand and arguments of every call of a tool in the page's shell code and in its tables."""
    text = page.read_text(encoding="utf-8")
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:python tools/|maskrcnn-benchmark |torchrun )[^`]+)`", text)
    calls = []
    for line in lines:
        words = shlex.split(line, comments=True)
        for place, word in enumerate(words):
            if match := re.fullmatch(r"tools/(\w+)\.py", word):
                calls.append([match[1].removesuffix("_net").replace("_", "-"), *words[place + 1 :]])
            elif word == "maskrcnn-benchmark" or words[place - 1 : place + 1] == ["-m", "maskrcnn_benchmark"]:
                calls.append(words[place + 1 :])
    return [call for call in calls if len(call) > 1 and not {"...", "COMMAND", "KEY"} & set(call)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_is_understood(page, monkeypatch):
    """By the parser of the tool, and as far as there are files and keys in it, those exist."""
    for name, *arguments in tool_calls(page):
        path = commands().get(name)
        assert path or (ROOT / "tools" / f"{name}.py").is_file(), f"{page.name}: there is no {name}"
        tool = load(name, path) if path else None
        if not hasattr(tool, "parse"):
            continue
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        try:
            parsed = vars(tool.parse())
        except SystemExit as ended:
            assert ended.code == 0, f"{page.name}: {name} {arguments}"  # --help
            continue
        file = parsed.get("config_file")
        if file and Path(file).parts[0] == "configs":
            assert find_recipe(file).is_file(), f"{page.name}: there is no {file}"
        get_config(overrides=[word for pair in keys_of(parsed) for word in pair])


def keys_of(parsed: dict) -> list[tuple[str, str]]:
    """The KEY VALUE pairs, without `_BASE_`, whose file may be an example's."""
    words = parsed.get("overrides") or []
    assert len(words) % 2 == 0, words
    return [pair for pair in zip(words[::2], words[1::2]) if pair[0] not in ("_BASE_", "DATA.PATH")]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file) if file else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor and path.exists():
            headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
            known = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in known, f"{page.name}: {target}"


def test_the_index_names_every_page():
    text = (DOCS / "README.md").read_text(encoding="utf-8")
    pages = [*DOCS.rglob("*.md"), *DOCS.rglob("*.py")]
    assert not [page for page in pages if f"({page.relative_to(DOCS)})" not in text and page != DOCS / "README.md"]


# ------------------------------------------------------------------------------------------------- in Chinese

TUTORIALS = sorted((DOCS / "tutorials").glob("*.py"))
TRANSLATED = {"README.md": "README.zh-CN.md", "docs/install.md": "docs/zh-CN/install.md"}


def code_of(source: str) -> str:
    """The source without comments and docstrings, which are translated."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.unparse(tree)


@pytest.mark.parametrize("script", TUTORIALS, ids=lambda script: script.stem)
def test_chinese_tutorials_have_the_code_of_the_scripts(script):
    """Which test_tutorials.py runs; the pages' blocks one after another are the script."""
    page = script.parent / "zh-CN" / f"{script.stem}.md"
    told = code_of("\n".join(blocks(page, "python")))
    assert told == code_of(script.read_text(encoding="utf-8"))
    assert blocks(page, "bash") == [f"python {script.relative_to(ROOT)}\n"]


def without_comments(code: str) -> list[str]:
    return [re.split(r"\s+#", line)[0].rstrip() for line in code.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("english", TRANSLATED)
def test_chinese_pages_have_the_code_and_links_of_the_english_ones(english):
    pages = ROOT / english, ROOT / TRANSLATED[english]
    ours, theirs = ([(kind, without_comments(code)) for kind, code in BLOCK.findall(p.read_text())] for p in pages)
    assert ours == theirs
    assert linked(pages[0]) - linked(pages[1]) == set()


def linked(page: Path) -> set[Path]:
    """The files that the page links to; for those that are there in Chinese too, the Chinese ones."""
    targets = re.findall(r"\]\(([^)\s#]+)[)#]", page.read_text(encoding="utf-8"))
    files = {(page.parent / target).resolve() for target in targets if not target.startswith("http")}
    chinese = {file: file.parent / "zh-CN" / f"{file.stem}.md" for file in files}
    return {chinese[file] if chinese[file].exists() else file for file in files if not file.name.startswith("README")}


def test_the_chinese_troubleshooting_has_every_message():
    pages = (DOCS / "troubleshooting.md", DOCS / "zh-CN" / "troubleshooting.md")
    ours, theirs = (re.findall(r"^\| (`.+?`|[\d +n]+) \| ", page.read_text(), re.MULTILINE) for page in pages)
    assert ours == theirs


def test_the_torch_of_the_installation_is_the_tested_one():
    (tested,) = re.findall(r"^torch==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    for page in (DOCS / "install.md", DOCS / "zh-CN" / "install.md"):
        assert re.findall(r"torch==(\S+)", page.read_text(encoding="utf-8")) == [tested]


def test_the_configuration_reference_is_up_to_date():
    from maskrcnn_benchmark.config.reference import render

    wanted = (DOCS / "config.md").read_text(encoding="utf-8")
    assert wanted == render(), "python -m maskrcnn_benchmark.config.reference > docs/config.md"


def test_the_workflow_for_ci_is_valid(monkeypatch):
    (job,) = yaml.safe_load(blocks(DOCS / "benchmarking.md", "yaml")[0])["jobs"].values()
    (gate,) = [step["run"] for step in job["steps"] if "tools/benchmark.py" in step.get("run", "")]
    monkeypatch.setattr(sys, "argv", shlex.split(gate)[1:])
    monkeypatch.setattr(sys, "path", list(sys.path))
    asked = load("benchmark", ROOT / "tools" / "benchmark.py").parse()
    assert (ROOT / asked.suite).is_file() and asked.base_ref == "origin/${{ github.base_ref }}"
    (upload,) = [step["with"]["path"] for step in job["steps"] if "upload" in step.get("uses", "")]
    assert upload.split() == [str(asked.report), str(asked.out)]
