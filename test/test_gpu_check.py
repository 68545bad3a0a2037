"""gpu_check.sh: no GPU, stages that fail, and the JSON; its stages need a GPU themselves."""

from __future__ import annotations

import json
import sys

import gpu_check
import pytest
import torch
from gpu_check import Stage

from maskrcnn_benchmark.config import get_config


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
    assert gpu_check.check(todo, tmp_path, out) == 1
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
    assert gpu_check.check(todo[:2], tmp_path, out) == 0


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


@pytest.mark.parametrize("name", ["train graph", "train real", "curve graph"])
def test_the_stages_overrides_are_a_configuration(tmp_path, name):
    command = next(list(map(str, s.command)) for s in gpu_check.stages(tmp_path) if s.name == name)
    first = next(
        i for i, part in enumerate(command) if part.isupper() or ("." in part and part.split(".")[0].isupper())
    )
    recipe = command[command.index("--config-file") + 1] if "--config-file" in command else gpu_check.RECIPE
    cfg = get_config(gpu_check.ROOT / recipe, command[first:])
    assert cfg.SOLVER.GRAPH_CAPTURE
