"""gpu_check.sh: no GPU, stages that fail, and the JSON; its stages need a GPU themselves."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu_check import RECIPE, Stage

from maskrcnn_benchmark.__main__ import load
from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.errors import UserError

HERE = {"device": "NVIDIA H200", "commit": "c0ffee"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the check would run")
def test_without_a_gpu_it_stops(run):
    result = run("test/gpu_check.sh")
    assert result.returncode == 2
    assert result.stderr.startswith("error: device cuda: torch") and "Traceback" not in result.stderr


def python(name: str, code: str, limit: int = 60, *results: str) -> Stage:
    return Stage(name, (sys.executable, "-c", code), limit, results)


def test_every_stage_runs_and_a_failure_is_in_the_json(tmp_path, capsys):
    write = f"from pathlib import Path; Path('{tmp_path}', '%s').write_text('%s')"
    todo = [
        python("environment", write % ("environment.json", '{"torch": "2"}'), 60, gpu_check.FACTS),
        python("good", "print('fine'); " + write % ("a.jsonl", r'{"loss": 1}\n{"loss": 1}\n'), 60, "a.jsonl"),
        python("bad", "print('what went wrong'); raise SystemExit(3)"),
        python("silent", "pass", 60, "never.json"),
        python("half", write % ("half.json", "{"), 60, "half.json"),
        python("long", "import time; print('begun', flush=True); time.sleep(600)", 2),
        Stage("absent", ("no-such-program",), 5),
        python("last", "pass"),
    ]
    out = tmp_path / "out.json"
    assert gpu_check.check(todo, tmp_path, out, HERE) == 1
    told = json.loads(out.read_text())
    status = {stage["name"]: stage["status"] for stage in told["stages"]}
    assert status == dict(zip(status, (0, 0, 3, 1, 1, None, 127, 0)))
    by_name = {stage["name"]: stage for stage in told["stages"]}
    assert told["environment"] == {"torch": "2"} and by_name["good"]["results"] == {"a.jsonl": [{"loss": 1}] * 2}
    assert by_name["good"]["tail"] == [] and by_name["bad"]["tail"] == ["what went wrong"]
    assert "no never.json" in by_name["silent"]["tail"][0] and "no half.json" in by_name["half"]["tail"][0]
    assert by_name["long"]["tail"] == ["begun"] and by_name["long"]["seconds"] < 60
    assert {row["met"] for row in told["targets"]} == {None}
    assert "stopped after 2 s" in capsys.readouterr().out
    assert told["device"] == "NVIDIA H200" and told["commit"] == "c0ffee"
    # The first two again: the others stay, and their failures are not this part's
    assert gpu_check.check(todo[:2], tmp_path, out, HERE) == 0
    again = {stage["name"]: stage for stage in json.loads(out.read_text())["stages"]}
    assert again.keys() == by_name.keys() and again["bad"] == by_name["bad"] and again["good"] != by_name["good"]


def test_parts_meet_in_one_file_and_their_targets_are_of_both(tmp_path):
    code = "import pathlib, sys; path = pathlib.Path(sys.argv[1]); path.parent.mkdir(); path.write_text(sys.argv[2])"
    out = tmp_path / "out.json"
    for name, loss in (("eager", 2.0), ("graph", 2.02)):
        scratch, file = tmp_path / name, f"curve_{name}/metrics.jsonl"
        scratch.mkdir()
        write = (sys.executable, "-c", code, scratch / file, json.dumps({"loss": loss}))
        assert gpu_check.check([Stage(f"curve {name}", write, 60, (file,))], scratch, out, HERE) == 0
    told = json.loads(out.read_text())
    assert [stage["name"] for stage in told["stages"]] == ["curve eager", "curve graph"]
    measured = {row["name"]: row["measured"] for row in told["targets"]}
    assert measured["loss curves, graph and eager"] == pytest.approx(0.01)
    assert measured["loss curves, eager and CPU"] is None


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("device", "NVIDIA A100", "is of device NVIDIA H200, here NVIDIA A100"),
        ("commit", "decaf", "is of commit c0ffee, here decaf"),
    ],
)
def test_parts_of_another_device_or_commit_do_not_mix(tmp_path, key, value, words):
    out, there = tmp_path / "out.json", {**HERE, key: value}
    assert gpu_check.check([python("a", "pass"), python("b", "pass")], tmp_path, out, HERE) == 0
    before = out.read_text()
    with pytest.raises(UserError, match=words):
        gpu_check.check([python("a", "pass")], tmp_path, out, there)
    assert out.read_text() == before
    assert gpu_check.check([python("a", "pass"), python("b", "pass")], tmp_path, out, there) == 0  # nothing stays
    assert json.loads(out.read_text())[key] == value


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}'])
def test_a_file_of_something_else_stays(tmp_path, text):
    (out := tmp_path / "out.json").write_text(text)
    with pytest.raises(UserError, match="is not of"):
        gpu_check.check([python("a", "pass")], tmp_path, out, HERE)
    assert out.read_text() == text


def test_chosen_stages_bring_what_draws_their_images(tmp_path):
    every = gpu_check.stages(tmp_path)

    def names(*asked: str) -> list[str]:
        return [stage.name for stage in gpu_check.chosen(every, asked)]

    assert names("tests", "build") == ["build", "tests"]
    assert names("curve cpu", "train real") == ["shapes drawn", "train real", "small drawn", "curve cpu"]
    for stage in every:  # whoever reads another stage's images says so
        drawn = {s.name for s in every for part in stage.command if s.name == f"{Path(str(part)).name} drawn"}
        assert drawn - {stage.name} <= {stage.needs}, stage.name


def test_an_unknown_stage_is_told_with_the_known(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--stages", "build", "training"])
    with pytest.raises(UserError, match="there is no training; there are build, environment, tests, parity") as told:
        gpu_check.main()
    assert told.value.exit_code == 2


def parts_of_the_usage() -> list[list[str]]:
    text = (gpu_check.ROOT / "test" / "gpu_check.sh").read_text()
    return [shlex.split(names) for names in re.findall(r"^# +--stages ([a-z\"].*[a-z\"])$", text, re.MULTILINE)]


def test_the_parts_that_the_usage_names_are_everything_in_ten_minutes_each(tmp_path):
    every = gpu_check.stages(tmp_path)
    parts = [gpu_check.chosen(every, names) for names in parts_of_the_usage()]
    assert sorted(s.name for part in parts for s in part) == sorted(stage.name for stage in every)
    assert max(sum(stage.limit for stage in part) for part in parts) < 600


def case(system: str, rate: float, memory: float = 1.0, **work) -> dict:
    metrics = {"images_per_second": rate, "max_memory_mb": memory, "data_wait_share": 0.04}
    name = f"train {system}" if rate != 50 else f"train {system} channels-last"
    return {"name": name, "system": system, "work": work, "metrics": {k: {"p50": v} for k, v in metrics.items()}}


def test_targets_by_hand():
    def curve(*losses: float) -> list[dict]:
        return [{"loss": loss} for loss in losses for _ in range(10)]

    results = {
        "train.json": {"cases": [case("ours", 100, 70), case("torchvision", 40, 100), case("torchvision", 50, 90)]},
        "train_graph.json": {"cases": [case("ours", 200, 80), case("torchvision", 41, 100)]},
        "train_real.json": {"cases": [case("ours", 150)]},
        "infer.json": {
            "cases": [
                *(case("ours", 30, batch=1), case("torchvision", 10, batch=1)),
                *(case("ours", 15, batch=8), case("torchvision", 10, batch=8)),
            ]
        },
        "curve_eager/metrics.jsonl": curve(2, 1.00),
        "curve_graph/metrics.jsonl": curve(2, 1.01),
        "curve_cpu/metrics.jsonl": curve(2, 1.25),
    }
    rows = {row["name"]: row for row in gpu_check.targets([{"results": results}])}
    measured = [round(row["measured"], 3) for row in rows.values()]
    assert measured == [round(200 / 41, 3), 200, 200, 0.04, 3.0, 1.5, round(70 / 90, 3), 0.01, 0.2]
    assert [row["met"] for row in rows.values()] == [True, True, False, True, True, False, True, True, False]


def test_the_stages_fit_in_their_time_and_name_files_that_exist(tmp_path):
    stages = gpu_check.stages(tmp_path)
    assert sum(stage.limit for stage in stages) <= 1500
    for stage in stages:
        for part in map(str, stage.command):
            assert not part.endswith((".py", ".yaml")) or (gpu_check.ROOT / part).is_file(), part
    assert {"build", "tests", "parity", "ops", "train", "train graph", "train real", "infer"} < {s.name for s in stages}


TOOLS = [stage for stage in gpu_check.stages(Path("scratch")) if any("tools/" in str(w) for w in stage.command)]


@pytest.mark.parametrize("stage", TOOLS, ids=lambda stage: stage.name)
def test_the_tools_take_the_stages_arguments(stage, monkeypatch):
    script, *arguments = map(str, stage.command[1:])
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    asked = load(f"of_{stage.name}", gpu_check.ROOT / script).parse()
    cfg = get_config(gpu_check.ROOT / (getattr(asked, "config_file", None) or RECIPE), getattr(asked, "overrides", []))
    assert bool(cfg.SOLVER.GRAPH_CAPTURE) is (stage.name in ("train graph", "train real", "curve graph"))
