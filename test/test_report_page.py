"""report.html: a real run's own numbers, runs side by side, what is missing, and how a browser takes it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from pages import Page, browse

from maskrcnn_benchmark.errors import UserError
from maskrcnn_benchmark.report import run_page
from maskrcnn_benchmark.report.charts import POINTS, Line, Scale, bars, fences, line_chart, number
from maskrcnn_benchmark.report.run_files import Picture, read_runs


@pytest.fixture(scope="module")
def trained(run, tiny_config, tmp_path_factory) -> Path:
    """Six steps with two evaluations."""
    output = tmp_path_factory.mktemp("runs") / "first"
    options = ("SOLVER.EVAL_PERIOD", "3", "SAVE_CHECKPOINTS", "False", "OUTPUT_DIR", output)
    done = run("tools/train_net.py", "--config-file", tiny_config, "--device", "cpu", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.fixture
def again(trained, tmp_path) -> Path:
    """A copy to change."""
    return shutil.copytree(trained, tmp_path / "second")


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def page_of(*runs: Path) -> Page:
    return Page(run_page.page(read_runs(runs)))


def missing_in(run: Path) -> str:
    return " | ".join(read_runs([run])[0].missing)


def test_evaluations_are_written(trained):
    lines = lines_of(trained / "evaluations.jsonl")
    result = json.loads((trained / "result.json").read_text())
    assert [line["iter"] for line in lines] == [3, 6] and result["iteration"] == 6
    assert all(line["eval_seconds"] > 0 for line in lines)
    assert lines[-1]["bbox/AP"] == result["bbox"]["AP"] and lines[-1]["segm/AP75"] == result["segm"]["AP75"]


def test_the_page_of_a_run_holds_its_numbers(trained):
    text = (trained / "report.html").read_text()
    words, result = Page(text).words, json.loads((trained / "result.json").read_text())
    speed = result["performance"]["images_per_second"]
    tile = words[words.index("Training speed") + 1]
    assert float(tile.removesuffix(" images/s").replace(",", "")) == pytest.approx(speed, rel=1e-3)
    assert words[words.index("Box AP") + 1] == f"{result['bbox']['AP']:.4f}"
    metrics = lines_of(trained / "metrics.jsonl")
    said = [re.fullmatch(r"iteration (\d+):  (\S+) no unit", word) for word in words]
    drawn = [(int(match[1]), float(match[2])) for match in said if match]
    for column, points in (("loss", drawn[:6]), ("lr", drawn[6:])):
        assert dict(points) == pytest.approx({line["iter"]: line[column] for line in metrics}, rel=1e-3)
    for part in ("loss_mask", "loss_rpn_box_reg"):
        assert part.removeprefix("loss_") in words
    assert result["environment"]["device_name"] in text and "BASE_LR" in text
    assert not read_runs([trained])[0].missing and "What is missing" not in words


def test_a_steps_time_is_the_sum_of_its_parts(again):
    """Steps of 120 ms, 2 a line; in the second line the device worked while the host waited 60 ms for data, of which 40
    made the step longer. A former run's lines know nothing of phases."""
    former = {"iter": 2, "time": 0.12, "data_time": 0.03}
    known = {"forward_time": 0.02, "backward_time": 0.04, "optimizer_time": 0.01, "log_time": 0.05}
    lines = [former | known | {"checkpoint_time": 0.0}]
    lines += [lines[0] | {"iter": 4, "data_time": 0.06, "forward_time": 0.03, "checkpoint_time": 0.5}]
    (again / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (again / "evaluations.jsonl").write_text('{"iter": 4, "eval_seconds": 1.0}\n')
    words = page_of(again).words
    told = [word for word in words if word.startswith("iteration ") and word.endswith(" ms")]
    parts = {"forward": (20, 30), "backward": (40, 40), "optimizer": (10, 10), "waiting for data": (30, 40)}
    assert told == [
        f"iteration {at}: {name} {number(value)} ms"
        for name, values in {**parts, "all else": (20, 0)}.items()
        for at, value in zip((2, 4), values)
    ]
    start = words.index("Where the time went") + 1
    said = [(name, value) for name, value in zip(words[start:], words[start + 1 :]) if " s, " in value]
    assert said == [
        *[("forward", "0.10 s, 3.7%"), ("backward", "0.16 s, 6.0%"), ("optimizer", "0.04 s, 1.5%")],
        *[("waiting for data", "0.14 s, 5.2%"), ("all else", "0.04 s, 1.5%"), ("logs and reports", "0.20 s, 7.5%")],
        *[("checkpoints", "1.00 s, 37.3%"), ("evaluating", "1.00 s, 37.3%")],
    ]
    (again / "metrics.jsonl").write_text(json.dumps(former) + "\n")
    assert "iteration 2: computing 90.00 ms" in page_of(again).words


def test_the_page_needs_nothing_else(trained):
    text = (trained / "report.html").read_text()
    addresses = [v for _, attributes in Page(text).tags for k, v in attributes.items() if k in ("src", "href")]
    assert len(addresses) == 5 and all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    assert not re.search(r"https?:|url\(|@import|<script|<link", text)
    assert not list(trained.glob(".report*"))


def test_pictures_come_worst_first(again):
    path = again / "inference" / "coco_2017_val_details.json"
    details = json.loads(path.read_text())
    assert [len(row) for row in details["images"]] == [4] * 5
    right = (2, 0, 4, 1, 3)  # of four, in the order of the ids; the model of six steps finds nothing
    details["images"] = [[row[0], 4, 4, count] for row, count in zip(details["images"], right)]
    path.write_text(json.dumps(details))
    ids = [row[0] for row in details["images"]]
    (files,) = read_runs([again])
    assert [picture.name for picture in files.pictures] == [f"{ids[i]}.png" for i in (1, 3, 0, 4, 2)]
    said = [word for word in page_of(again).words if "objects right" in word]
    assert said[1] == f"{ids[3]}.png: 1 of 4 objects right, 3 false detections, F1 0.25"
    f1 = [Picture(Path(), "", counts).quality for counts in ((4, 2, 1), (0, 0, 0), (0, 3, 0), (2, 2, 2))]
    assert f1 == [pytest.approx(1 / 3), 1, 0, 1]  # precision 1/2 and recall 1/4: 2 / (2 + 4)


def test_runs_side_by_side(trained, again, tmp_path):
    result = json.loads((again / "result.json").read_text())
    result["performance"]["images_per_second"] *= 2
    (again / "result.json").write_text(json.dumps(result))
    config = (again / "config.yaml").read_text()
    (again / "config.yaml").write_text(config.replace("MAX_ITER: 6", "MAX_ITER: 66"))
    out = tmp_path / "both.html"
    done = subprocess.run(
        [sys.executable, "-m", "maskrcnn_benchmark.report", trained, again, "--out", out],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == f"{out}\n", done.stderr
    page = Page(out.read_text())
    words = " ".join(page.words)
    assert "2 runs compared" in words and "(+100.0%)" in words
    place = page.words.index("SOLVER.MAX_ITER")
    assert page.words[place + 1 : place + 3] == ["6", "66"] and "SOLVER.BASE_LR" not in page.words
    lines = [attributes["class"] for tag, attributes in page.tags if tag == "polyline"]
    assert lines.count("course c0") == lines.count("course c1") > 8


def test_the_environment_is_that_of_the_start(again):
    (again / "environment.json").write_text('{"commit": "0123456789abcdef", "device_name": "A lathe"}')
    assert "A lathe" in " ".join(page_of(again).words)
    result = json.loads((again / "result.json").read_text()) | {"iteration": None}
    (again / "result.json").write_text(json.dumps(result))  # as test_net.py writes it
    assert read_runs([again])[0].environment == result["environment"]


def test_a_run_is_named_where_it_is_not_one(trained, tmp_path):
    with pytest.raises(UserError, match="is no run's directory"):
        read_runs([trained, tmp_path])


def test_what_is_missing_is_named(again):
    assert missing_in(again) == ""
    (again / "result.json").unlink()
    assert "result.json is not there" in missing_in(again)
    assert read_runs([again])[0].environment["device"] == "cpu"
    (again / "environment.json").write_text("{")
    assert "environment.json is damaged" in missing_in(again)
    shutil.rmtree(again / "inference")
    assert "inference/coco_2017_val_details.json is not there" in missing_in(again)
    shutil.rmtree(again / "predictions")
    assert "predictions/ holds no picture" in missing_in(again)
    for name in ("metrics.jsonl", "evaluations.jsonl", "log.txt"):
        (again / name).unlink()
    page = page_of(again)
    assert "What is missing" in page.words and "curves of losses" in " ".join(page.words)


def test_damaged_lines_are_left_out(again):
    with open(again / "metrics.jsonl", "a") as file:
        file.write('{"iter": 7, "loss": "much"}\n[7]\n{"loss": 1}\n{"iter": 8, "lo')
    (files,) = read_runs([again])
    assert files.iterations == 6 and len(files.metrics["loss"]) == 6
    assert files.missing == ["metrics.jsonl: 4 damaged lines are left out, the first is line 7"]
    (again / "predictions" / files.pictures[0].name).write_bytes(b"no picture")
    assert files.pictures[0].path.name in " ".join(page_of(again).words)


def test_a_former_runs_result_is_left_out(again):
    with open(again / "metrics.jsonl", "a") as file:
        file.write('{"iter": 20, "loss": 1.5, "time": null}\n')
    (files,) = read_runs([again])
    assert files.result == {} and "is of iteration 6, but metrics.jsonl ends at 20" in files.missing[0]
    assert "n/a" not in page_of(again).words  # accuracy is then the last evaluation's


def test_an_evaluation_alone_has_a_page(run, again, tiny_config, tmp_path):
    results = again / "inference" / "coco_2017_val.json"
    options = ("--config-file", tiny_config, "--device", "cpu", "--predictions", results, "OUTPUT_DIR", tmp_path / "e")
    done = run("tools/test_net.py", *options)
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("| NAME") :].splitlines()
    assert re.fullmatch(r"\| NAME +\| FPS +\| Box mAP \| Segm mAP \|", table[0])
    assert re.fullmatch(r"\| 1p-.+ \| n/a \| 0\.\d{3}   \| 0\.\d{3}    \|", table[2])
    page = Page((tmp_path / "e" / "report.html").read_text())
    assert "Box AP" in page.words and "metrics.jsonl is not there" in " ".join(page.words)


def test_names_cannot_break_the_page(again):
    """Of the run, of classes, of a picture, in the configuration, of the device and of metrics."""
    name = "</pre></svg><script>alert('1')<|script>&\""
    renamed = again.rename(again.with_name(f"run {name.replace('/', '')}"))
    config = (renamed / "config.yaml").read_text()
    (renamed / "config.yaml").write_text(config + f"# config {name}\n")
    details, result = renamed / "inference" / "coco_2017_val_details.json", renamed / "result.json"
    found, about = json.loads(details.read_text()), json.loads(result.read_text())
    for task in ("bbox", "segm"):
        found[task]["classes"] = {f"class {name}": next(iter(found[task]["classes"].values()))}
    found["confusion"]["names"][0] = f"confused {name}"
    details.write_text(json.dumps(found))
    about["environment"] |= {"device_name": f"device {name}"}
    result.write_text(json.dumps(about))
    (renamed / "environment.json").write_text(json.dumps(about["environment"]))
    picture = next(renamed.rglob("predictions/**/*.png"))
    picture.rename(picture.with_name(f"picture {name.replace('/', '')}.png"))
    lines = lines_of(renamed / "metrics.jsonl")
    column = f"loss_{name}"
    (renamed / "metrics.jsonl").write_text("".join(json.dumps(line | {column: 1.0}) + "\n" for line in lines))
    for page in (page_of(renamed), page_of(renamed, renamed)):
        assert not {tag for tag, _ in page.tags} & {"script", "a"} and page.open == []
    words = " ".join(page_of(renamed).words)
    for part in ("run", "config", "class", "confused", "device", "picture"):
        assert f"{part} <" in words, f"nothing is shown of the {part}'s name"
    assert name in words


def test_a_report_that_fails_does_not_end_a_run(again, monkeypatch, caplog):
    from maskrcnn_benchmark.engine import train

    before = (again / "report.html").read_text()
    monkeypatch.setattr(run_page, "_SECTIONS", {"broken": lambda runs: 1 / 0})
    train.write_report(again)
    assert "python -m maskrcnn_benchmark.report" in caplog.text and (again / "report.html").read_text() == before


# ---------------------------------------------------------------------------------------------- charts


def test_thinned_curves_keep_spikes_and_ends():
    x = np.arange(1, 90_001, dtype=np.float64)
    y = np.ones_like(x)
    y[54_321], y[7] = 99, np.nan
    line = Line.thinned("", x, y)
    assert len(line.y) == POINTS and line.high.max() == 99 and line.low.min() == 1
    assert line.y.max() == pytest.approx(1 + 98 / 225, rel=0.01) and np.isfinite(line.y).all()
    assert x[0] < line.x[0] < 226 and 89_775 < line.x[-1] < x[-1]
    short = Line.thinned("", x[:5], y[:5])
    assert short.y.tolist() == [1] * 5 and short.low is None


def test_a_chart_places_its_points():
    x, y = np.array([10.0, 20.0, 30.0]), np.array([0.0, 1.0, 0.5])
    picture = line_chart("Speed", "m/s", [Line("a", x, y)], "iteration", limits=(0.0, 1.0), height=108)
    (points,) = re.findall(r'points="([^"]+)"', picture)
    # 4% of room above and below: 1 lies at 4/108 of the height, 0 at 104/108
    assert points == "0.0,104.0 500.0,4.0 1000.0,54.0"
    assert "Speed</b>, m/s" in picture and "iteration 20: a 1.000 m/s" in picture
    assert line_chart("Speed", "m/s", [Line("a", x[:0], y[:0])], "iteration") == ""


def test_points_beyond_the_axis_are_said():
    x, y = np.arange(5.0), np.array([1.0, 1.1, 1.2, 1.3, 900.0])
    low, high = fences(y)
    assert low == 1 and high == pytest.approx(1.9)  # 1.3 + 3 * (1.3 - 1.1)
    assert "1 point lies beyond" in line_chart("a", "ms", [Line("", x, y)], "run", (low, high))
    assert Scale(1.0, 1.0).percent(1.0) == 50 and Scale(12.0, 12.0).ticks() == [12.0]


def test_many_bars_are_folded():
    drawn = Page(bars([(f"<{n}>", n / 40, f"{n} ms") for n in range(40)]))
    assert "10 more" in drawn.words and "<39>" in drawn.words
    widths = [attributes["style"] for tag, attributes in drawn.tags if tag == "i"]
    assert widths[20] == "width:50.0%"


# ---------------------------------------------------------------------------------------------- a browser


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_scrolling_sideways(trained, again, tmp_path, width):
    for runs in ([trained], [trained, again]):
        wanted, shown, complaints = browse(run_page.page(read_runs(runs)), width, tmp_path)
        assert wanted <= shown == width and complaints == []
