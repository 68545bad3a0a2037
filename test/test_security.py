"""Names and paths that try to be code: for the shell, for a page, for the terminal."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
from html.parser import HTMLParser

import fuzz
import pytest
from benchmark_results import processes, result
from conftest import ROOT

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.engine import predict
from maskrcnn_benchmark.errors import visible
from maskrcnn_benchmark.models.build import build_model
from maskrcnn_benchmark.report import benchmark_page
from maskrcnn_benchmark.report.console import Formatter

SCRIPTS = sorted((ROOT / "test").glob("*.sh"))
# A name of a directory that runs `touch` wherever a shell reads it a second time
EVIL = "a b'\";touch RAN;$(touch RAN)`touch RAN`&|*?\n#数据é"
NAME = "<script>alert(1)</script>\"'&\x1b[31mred"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    files = [*map(str, SCRIPTS), str(ROOT / ".ci" / "run")]
    found = subprocess.run(["shellcheck", *files], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("ranks", [1, 2])
def test_launchers_pass_paths_on_as_they_are(run, shapes, tiny_config, tmp_path, ranks):
    data, output = tmp_path / f"{EVIL}data", tmp_path / f"{EVIL}output"
    shutil.copytree(shapes, data)
    config = tmp_path / f"{EVIL}.yaml"
    shutil.copyfile(tiny_config, config)
    options = [f"--data_path={data}", f"--output={output}", f"--config={config}", f"--nproc={ranks}", "--device=cpu"]
    ended = run("test/train_full_1p.sh", *options, "SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (output / "model_final.pth").is_file()
    assert not list(tmp_path.rglob("RAN")) and not (ROOT / "RAN").exists()
    assert {path.name for path in tmp_path.iterdir()} == {data.name, output.name, config.name}


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        assert not any(name.startswith(("on", "alert")) for name, _ in attributes)

    def handle_data(self, data):
        self.words += data


@pytest.fixture
def named(tmp_path):
    """A COCO file whose class and picture have the evil name, with something for the doctor to find."""
    content = json.loads(json.dumps(fuzz.COCO))
    file_name = NAME.replace("/", "") + ".png"
    content["categories"][0]["name"] = content["categories"][1]["name"] = NAME
    for image in content["images"]:
        image["file_name"] = file_name
    content["annotations"][0]["bbox"] = [4, 3, 0, 6]
    (tmp_path / file_name).write_bytes(fuzz.PICTURE_FILE)
    (tmp_path / "a.json").write_text(json.dumps(content))
    return tmp_path / "a.json"


@pytest.mark.parametrize("command", ["show", "check"])
def test_pages_and_terminal_show_names_as_text(run, named, command):
    page = named.parent / "page.html"
    arguments = [f"coco://{named}", page] if command == "show" else [f"coco://{named}", "--html", page]
    ended = run("tools/dataset.py", command, *arguments)
    assert ended.returncode == (command == "check"), ended.stderr
    found = Tags(page.read_text(encoding="utf-8"))
    assert "script" not in found.tags and "<script>alert(1)" in found.words
    assert "\x1b" not in ended.stdout + ended.stderr
    assert command == "show" or "\\x1b[31mred" in ended.stdout


def test_the_benchmark_page_shows_names_as_text():
    new = result({NAME: processes(1.0, 2.0)})
    new["environment"] |= {"device_name": NAME, "commit": NAME}
    for case in new["cases"]:
        for value in case["metrics"].values():
            value |= {"unit": NAME, "better": NAME}
    found = Tags(benchmark_page.html(new))
    assert "script" not in found.tags and "<script>alert(1)" in found.words
    markdown = benchmark_page.markdown(new)
    assert "<script>" not in markdown.replace("\\<", "") and "\x1b" not in markdown


def test_error_messages_do_not_steer_the_terminal(run, named):
    content = json.loads(named.read_text())
    content["images"][0]["file_name"] = "\x1b[2Jgone.png"
    named.write_text(json.dumps(content))
    ended = run("tools/dataset.py", "show", f"coco://{named}", named.parent / "page.html")
    assert ended.returncode == 2 and "\\x1b[2Jgone.png" in ended.stderr and "\x1b" not in ended.stderr


def test_damaged_pictures_do_not_steer_the_terminal(run, tiny_config, tmp_path):
    checkpoint = tmp_path / "model.pth"
    cfg, device, names = get_config(tiny_config), get_device("cpu"), dict(enumerate("abcde", 1))
    predict.save_predictor(predict.Predictor(cfg, device, build_model(cfg, device), list(names), names, []), checkpoint)
    for name in ("\x1b[2Jdamaged.png", "sound.png"):
        (tmp_path / name).write_bytes(fuzz.PICTURE_FILE if name == "sound.png" else b"no picture")
    arguments = ("--weights", checkpoint, "--json", tmp_path / "r.json", "--device", "cpu")
    ended = run("tools/predict.py", tmp_path, *arguments)
    assert ended.returncode == 1 and "1 images" in ended.stdout, ended.stderr
    assert "\\x1b[2Jdamaged.png" in ended.stderr and "\x1b[2J" not in ended.stderr


def test_benchmark_tables_do_not_steer_the_terminal(run, tmp_path):
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path in paths:
        path.write_text(json.dumps(result({NAME: processes(1.0, 2.0)})))
    ended = run("tools/benchmark.py", "compare", *paths)
    assert "\\x1b[31mred" in ended.stdout and "\x1b" not in ended.stdout + ended.stderr, ended.stderr


def test_log_lines_do_not_steer_the_terminal():
    record = logging.LogRecord("x", logging.INFO, "", 0, "class %s\tand\nmore", ("\x1b[31m\x07\x9b",), None)
    assert Formatter("%(message)s").format(record) == "class \\x1b[31m\\x07\\x9b\tand\nmore"
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", visible("".join(map(chr, range(256)))))
