"""What a run says: pictures, log lines, speed figures, last lines."""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import json
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import warnings

import cv2
import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFont
from pycocotools import mask as coco_mask

from maskrcnn_benchmark.errors import DataError
from maskrcnn_benchmark.report import console, visualize
from maskrcnn_benchmark.report.console import (
    TrainingMeter,
    case_log,
    final_lines,
    progress,
    result_table,
    setup_logging,
)
from maskrcnn_benchmark.report.visualize import draw, draw_results, side_by_side

GREY = np.full((120, 160, 3), 100, np.uint8)


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """[H, W] bool: where two pictures differ."""
    return (before != after).any(axis=2)


class TestDraw:
    def test_nothing_to_draw(self):
        picture = draw(GREY, np.zeros((0, 4)), [])
        assert picture is not GREY and (picture == GREY).all()
        assert (draw_results(GREY, [], {1: "a"}) == GREY).all()

    def test_the_input_stays_and_the_box_is_where_it_should_be(self):
        before = GREY.copy()
        picture = draw(GREY, np.array([[40, 60, 100, 110]]), ["x"], [0.9])
        assert (before == GREY).all()
        assert picture.shape == GREY.shape and picture.dtype == np.uint8
        marks = changed(GREY, picture)
        assert (
            marks[60:110, 40].all() and marks[60:110, 99].all() and marks[60, 40:100].all() and marks[109, 40:100].all()
        )
        assert not marks[65:105, 45:95].any()  # the inside
        assert not marks[112:].any() and not marks[:, 104:].any() and not marks[:40].any()  # the outside; a label above

    @pytest.mark.parametrize("as_rle", [False, True])
    def test_a_mask_tints_its_own_pixels(self, as_rle):
        mask = np.zeros((120, 160), bool)
        mask[60:110, 40:100] = True
        mask[75:95, 60:80] = False
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        picture = draw(GREY, np.array([[40, 60, 100, 110]]), ["x"], [0.9], [rle if as_rle else mask], [(200, 0, 0)])
        assert (picture[70, 50] == [140, 60, 60]).all()  # .6 x 100 + .4 x colour
        assert (picture[85, 70] == 100).all()  # the hole
        assert (picture[75, 59] != [140, 60, 60]).any()  # the hole's contour

    def test_the_highest_score_is_on_top(self):
        boxes = np.array([[40, 60, 100, 110], [40, 60, 100, 110]])
        colors = [(255, 0, 0), (0, 0, 255)]
        first = draw(GREY, boxes, ["x", "y"], [0.9, 0.5], colors=colors)
        second = draw(GREY, boxes, ["x", "y"], [0.5, 0.9], colors=colors)
        assert (first[100, 40] == [255, 0, 0]).all() and (second[100, 40] == [0, 0, 255]).all()

    def test_without_scores_the_smallest_is_on_top(self):
        boxes = np.array([[40, 60, 60, 80], [40, 60, 150, 119]])
        picture = draw(GREY, boxes, ["x", "y"], colors=[(255, 0, 0), (0, 0, 255)])
        assert (picture[78, 40] == [255, 0, 0]).all() and (picture[100, 40] == [0, 0, 255]).all()

    def test_a_class_keeps_its_colour(self):
        one = draw(GREY, np.array([[40, 60, 100, 110]]), ["cat"])
        other = draw(GREY, np.array([[10, 30, 30, 50], [40, 60, 100, 110]]), ["dog", "cat"])
        assert (one[100, 40] == other[100, 40]).all()
        assert len(set(visualize.PALETTE)) == 21
        few = draw_results(GREY, [result(1)], {1: "a", 2: "b"})[100, 40]
        more = draw_results(GREY, [result(2)], {1: "a", 2: "b"})[100, 40]
        assert (few != more).any()

    @given(
        st.lists(
            st.tuples(
                st.integers(-30, 200), st.integers(-30, 150), st.integers(0, 200), st.integers(0, 150), st.text()
            ),
            max_size=6,
        ),
        st.integers(1, 80),
        st.integers(1, 80),
    )
    @settings(max_examples=60, deadline=None)
    def test_anything_can_be_drawn(self, objects, height, width):
        image = np.zeros((height, width, 3), np.uint8)
        boxes = np.array([[x, y, x + w, y + h] for x, y, w, h, _ in objects]).reshape(-1, 4)
        assert draw(image, boxes, [text for *_, text in objects]).shape == image.shape

    @given(st.integers(-50, 200), st.integers(-50, 200), st.integers(1, 90), st.integers(1, 30))
    def test_labels_stay_inside(self, x, y, width, height):
        place = visualize._free_place(np.array([x, y, x + 10, y + 10]), (width, height), (100, 50), [])
        assert 0 <= place[0] < place[2] <= 100 and 0 <= place[1] < place[3] <= 50
        assert place[2] - place[0] == width and place[3] - place[1] == height

    def test_labels_avoid_one_another(self):
        taken = []
        for _ in range(4):
            taken.append(visualize._free_place(np.array([50, 50, 120, 120]), (30, 10), (200, 200), taken))
        assert all(visualize._overlap(a, b) == 0 for i, a in enumerate(taken) for b in taken[:i])

    def test_unequal_lengths(self):
        with pytest.raises(ValueError, match="equally many"):
            draw(GREY, np.zeros((2, 4)), ["one"])
        with pytest.raises(ValueError, match="does not fit"):
            draw(GREY, np.array([[0, 0, 9, 9]]), ["a"], masks=[np.zeros((3, 3), bool)])


@pytest.fixture
def no_fonts(tmp_path, monkeypatch):
    """A system without fonts, whose font directory is tmp_path."""
    monkeypatch.setattr(visualize, "_FONT_DIRECTORIES", (str(tmp_path), str(tmp_path / "missing")))
    caches = (visualize._font_file, visualize._font, visualize._warn_of_missing_font)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


class TestFonts:
    def test_a_system_without_fonts(self, no_fonts, caplog):
        picture = draw(GREY, np.array([[40, 60, 100, 110]] * 2), ["café", "汽车"], [0.9, 0.8])
        assert changed(GREY, picture).any()
        draw(GREY, np.array([[40, 60, 100, 110]]), ["汽车"])
        assert len(caplog.records) == 1 and "Noto Sans CJK" in caplog.text

    def test_the_best_font_is_taken(self, no_fonts, caplog):
        for name in ("DejaVuSans.ttf", "NotoSansCJK-Bold.ttc", "NotoSansCJK-Regular.ttc", "NotoSansCJK.txt"):
            (no_fonts / name).touch()
        assert visualize._font_file().name == "NotoSansCJK-Regular.ttc"
        visualize._warn_of_missing_font()
        assert not caplog.records

    def test_long_names_are_cut(self):
        font = ImageFont.load_default(12)
        short = visualize._shorten("a name that never ends", font, 60)
        assert short.endswith("…") and short.startswith("a na") and font.getlength(short) <= 60
        assert visualize._shorten("ok", font, 60) == "ok"


def result(category: int, **keys) -> dict:
    return {"category_id": category, "bbox": [40, 60, 60, 50], "score": 0.9} | keys


class TestDrawResults:
    def test_threshold_and_boxes(self):
        weak, strong = result(1, score=0.49), result(1, score=0.5, bbox=[5, 80, 20, 30])
        marks = changed(GREY, draw_results(GREY, [weak, strong], {1: "a"}, threshold=0.5))
        assert marks[100, 5] and marks[100, 24] and not marks[100, 40]
        assert changed(GREY, draw_results(GREY, [weak], {1: "a"}, threshold=0.4))[100, 40]

    def test_annotations_with_polygons_have_no_score(self):
        annotation = {"category_id": 1, "bbox": [40, 60, 60, 50], "segmentation": [[40, 60, 100, 60, 100, 110]]}
        picture = draw_results(GREY, [annotation], {1: "a"})
        assert changed(GREY, picture)[70, 80] and not changed(GREY, picture)[100, 60]

    def test_unknown_category(self):
        with pytest.raises(DataError, match="category id 9"):
            draw_results(GREY, [result(9)], {1: "a"})

    def test_real_annotations(self, coco_mini):
        truth = json.loads((coco_mini / "annotations" / "instances_val2017.json").read_bytes())
        crowd = next(a for a in truth["annotations"] if a["iscrowd"])
        image = next(i for i in truth["images"] if i["id"] == crowd["image_id"])
        pixels = cv2.cvtColor(cv2.imread(str(coco_mini / "val2017" / image["file_name"])), cv2.COLOR_BGR2RGB)
        annotations = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        names = {c["id"]: c["name"] for c in truth["categories"]}
        picture = draw_results(pixels, annotations, names)
        mask = coco_mask.decode(coco_mask.frPyObjects(crowd["segmentation"], image["height"], image["width"]))
        assert changed(pixels, picture)[mask.astype(bool)].mean() > 0.9


def test_side_by_side():
    small, large = np.full((50, 60, 3), 10, np.uint8), np.full((80, 90, 3), 20, np.uint8)
    picture = side_by_side(small, large, ("left", "a title that is far too long for its picture"))
    assert picture.dtype == np.uint8 and picture.shape[0] > 80 and picture.shape[1] > 150
    assert (
        (picture[-80:-30, :60] == 10).all() and (picture[-80:, -90:] == 20).all() and (picture[-30:, :60] == 255).all()
    )


# ------------------------------------------------------------------------------------------------------- console

NUMBER = r"(\d+\.\d+|n/a)"
LINE = re.compile(
    r"eta: (?P<eta>(\d+ days?, )?\d+:\d\d:\d\d) iter: (?P<iter>\d+)  "
    rf"loss: {NUMBER}  (?P<losses>(loss_\w+: {NUMBER}  )*)"
    rf"time: (?P<time>{NUMBER}) data: (?P<data>{NUMBER})  lr: (?P<lr>[\d.e-]+)  max mem: (?P<mem>\d+)  "
    rf"average_train_fps: (?P<fps>{NUMBER})"
)


def meter_with(steps, warmup: int, total: int = 100, start: int = 0) -> TrainingMeter:
    meter = TrainingMeter(total, start, 16, warmup)
    for step in steps:
        meter.add(step, step / 4)
    return meter


class TestTrainingMeter:
    @given(st.lists(st.floats(1e-3, 10), min_size=1, max_size=60), st.integers(0, 20))
    @settings(max_examples=50, deadline=None)
    def test_figures_against_numpy(self, steps, warmup):
        performance = meter_with(steps, warmup).performance()
        counted = np.array(steps[warmup:])
        assert performance["warmup_steps"] == warmup
        if not counted.size:
            assert performance["images_per_second"] is None and performance["data_wait_share"] is None
            assert performance["step_ms"] == {"p50": None, "p90": None, "p99": None}
            return
        p50, p90, p99 = np.percentile(counted * 1000, [50, 90, 99])
        assert performance["step_ms"] == pytest.approx({"p50": p50, "p90": p90, "p99": p99})
        assert performance["images_per_second"] == pytest.approx(16 * counted.size / counted.sum())
        assert performance["data_wait_share"] == pytest.approx(0.25)
        json.dumps(performance)

    def test_warm_up_is_left_out(self):
        performance = meter_with([100.0, 50.0, 2.0, 2.0, 2.0], warmup=2).performance()
        assert performance["images_per_second"] == 8.0 and performance["step_ms"]["p99"] == 2000.0

    def test_waits_appear_in_the_right_field(self):
        meter = TrainingMeter(10, 0, 16, 0)
        meter.add(1.0, 0.5)
        meter.add(3.0, 0.5)
        assert meter.performance()["data_wait_share"] == 0.25

    def test_a_device_is_one_of_the_ranks(self, monkeypatch):
        monkeypatch.setattr(console.distributed, "world_size", lambda: 8)
        performance = meter_with([2.0], warmup=0).performance()
        assert (performance["images_per_second"], performance["images_per_second_per_device"]) == (8.0, 1.0)

    def test_console_line(self):
        meter = meter_with([9.0] + [0.5] * 20, warmup=1, total=90_000, start=1000)
        losses = {"loss": 1.5, "loss_classifier": 0.5, "loss_rpn_box_reg": 0.25}
        line = meter.console_line(1021, losses, lr=0.0025, max_mem_mb=4321.6)
        match = LINE.fullmatch(line)
        assert match, line
        assert match["iter"] == "1021" and match["losses"] == "loss_classifier: 0.5000  loss_rpn_box_reg: 0.2500  "
        assert match["eta"] == "12:21:30"  # 90,000 - 1,021 steps of half a second
        assert float(match["lr"]) == 0.0025 and match["mem"] == "4322"
        assert float(match["fps"]) == 32.0
        assert float(match["time"]) == pytest.approx((9 + 20 * 0.5) / 21, abs=1e-4)

    def test_a_line_speaks_of_the_steps_since_the_last(self):
        meter = meter_with([1.0, 1.0], warmup=0)
        meter.console_line(2, {"loss": 1.0}, 0.1, 0)
        meter.add(4.0, 3.0)
        match = LINE.fullmatch(meter.console_line(3, {"loss": 1.0}, 0.1, 0))
        assert (match["time"], match["data"], match["fps"]) == ("4.0000", "3.0000", "8.00")
        assert meter.recent() == {"time": 4.0, "data_time": 3.0, "images_per_second": 4.0}

    def test_within_the_warm_up(self):
        match = LINE.fullmatch(meter_with([1.0], warmup=5).console_line(1, {"loss": 2.0}, 1e-6, 0))
        assert match["fps"] == "n/a" and match["eta"] == "0:01:39" and match["time"] == "1.0000"

    def test_before_the_first_step(self):
        meter = TrainingMeter(10, 0, 16, 0)
        assert meter.eta() == "n/a" and meter.recent()["time"] is None


class TestLastLines:
    RESULTS = (("bbox", 0.3771), ("segm", 0.3424))

    def test_block(self):
        text = final_lines({"images_per_second": 43.1189}, {k: {"AP": v} for k, v in self.RESULTS}, 27310.4)
        assert text.splitlines() == [
            "------------------ Final result ------------------",
            "Final Performance images/sec : 43.12",
            "Final Train Accuracy : 0.377",
            "Final Box mAP : 0.377",
            "Final Segm mAP : 0.342",
            "E2E Training Duration sec : 27310",
        ]

    def test_not_evaluated(self):
        lines = final_lines({"images_per_second": None}, {}, 5).splitlines()
        assert all(re.fullmatch(r"Final [\w /]+ : n/a", line) for line in lines[1:5])

    @pytest.mark.parametrize(
        ("box", "segm", "shown"), [(None, 0.2, "0.200"), (0.0, 0.2, "0.000"), (0.3, None, "0.300")]
    )
    def test_the_box_comes_first(self, box, segm, shown):
        text = final_lines({}, {"bbox": {"AP": box}, "segm": {"AP": segm}}, 5)
        assert f"Final Train Accuracy : {shown}\n" in text

    def test_table(self):
        text = result_table("8p-NPU-910", {"images_per_second": 43.1189}, {k: {"AP": v} for k, v in self.RESULTS})
        assert text.splitlines() == [
            "| NAME       | FPS   | Box mAP | Segm mAP |",
            "| ---------- | ----- | ------- | -------- |",
            "| 8p-NPU-910 | 43.12 | 0.377   | 0.342    |",
        ]
        assert result_table("1p", {}, {}).splitlines()[-1] == "| 1p   | n/a | n/a     | n/a      |"

    def test_case_log(self, tmp_path):
        values = {"fps": 43.119, "training_time": 371.2, "train_accuracy": 0.3771, "loss": 0.51, "e2e_time": 27310.4}
        file = case_log(tmp_path, "MaskRCNN", 8, 16, "npu", True, **values)
        assert file == tmp_path / "MaskRCNN_bs16_8p_acc.log"
        assert dict(line.split(" = ") for line in file.read_text().splitlines()) == {
            "Network": "MaskRCNN",
            "RankSize": "8",
            "BatchSize": "16",
            "DeviceType": "npu",
            "CaseName": "MaskRCNN_bs16_8p_acc",
            "ActualFPS": "43.12",
            "TrainingTime": "371.20",
            "TrainAccuracy": "0.3771",
            "ActualLoss": "0.5100",
            "E2ETrainingTime": "27310",
        }
        values = dict.fromkeys(values) | {"e2e_time": 1.0}
        file = case_log(tmp_path, "MaskRCNN", 1, 2, "cpu", False, **values)
        assert file.name == "MaskRCNN_bs2_1p_perf.log" and file.read_text().count(" = n/a\n") == 4


class TestLogging:
    def test_rank_0(self, tmp_path, capsys):
        logger = setup_logging(tmp_path, 0, rank_logs=False)
        logger.info("hello")
        logging.getLogger("maskrcnn_benchmark.engine.train").warning("careful")
        out, err = capsys.readouterr()
        stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
        assert re.fullmatch(rf"{stamp} INFO: hello\n{stamp} WARNING: careful\n", out) and not err
        assert (tmp_path / "log.txt").read_text() == out
        assert [file.name for file in tmp_path.iterdir()] == ["log.txt"]

    def test_other_ranks_only_warn(self, tmp_path, capsys):
        logger = setup_logging(tmp_path, 3, rank_logs=False)
        logger.info("hello")
        logger.warning("careful")
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and "careful" in err
        assert not list(tmp_path.iterdir())

    def test_rank_logs_hold_everything(self, tmp_path, capsys):
        logger = setup_logging(tmp_path, 3, rank_logs=True)
        logger.info("hello")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("beware", stacklevel=1)
        text = (tmp_path / "train_3.log").read_text()
        assert "INFO: hello" in text and "beware" in text
        assert "hello" not in capsys.readouterr().err

    def test_again_replaces_and_appends(self, tmp_path, capsys):
        for number in range(2):
            setup_logging(tmp_path, 0, rank_logs=True).info("line %d", number)
        assert capsys.readouterr().out.count("line 1") == 1
        for name in ("log.txt", "train_0.log"):
            assert [line[-6:] for line in (tmp_path / name).read_text().splitlines()] == ["line 0", "line 1"]

    def test_only_a_terminal_has_colours(self, monkeypatch, tmp_path):
        terminal = io.StringIO()
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.delenv("NO_COLOR", raising=False)
        logger = setup_logging(tmp_path, 0, rank_logs=False)
        logger.info("hello")
        logger.warning("careful")
        monkeypatch.setenv("NO_COLOR", "1")
        logger.warning("plain")
        lines = terminal.getvalue().splitlines()
        assert lines[0].startswith("20") and lines[0].endswith("hello")
        assert lines[1].startswith("\x1b[33m20") and lines[1].endswith("careful\x1b[0m")
        assert lines[2].startswith("20") and "\x1b" not in (tmp_path / "log.txt").read_text()

    def test_without_a_directory(self, capsys):
        setup_logging(None, 0, rank_logs=True).info("hello")
        assert "hello" in capsys.readouterr().out


def on_a_terminal(command: list[str], columns: int) -> tuple[int, str]:
    """Exit status and all that a process writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # EIO: the process has closed its end
        while part := os.read(ours, 65536):
            written += part
    os.close(ours)
    return process.wait(), written.decode()


def test_training_on_a_terminal_has_a_bar_under_its_lines(tiny_config, tmp_path):
    arguments = ["--config-file", str(tiny_config), "--device", "cpu", "OUTPUT_DIR", str(tmp_path)]
    tool = [sys.executable, str(ROOT / "tools" / "train_net.py"), *arguments]
    status, written = on_a_terminal([*tool, "SAVE_CHECKPOINTS", "False", "LOGGING.PERIOD", "2"], 200)
    assert status == 0, written[-3000:]
    bar = next(part for part in re.split("[\r\n]", written) if part.startswith("training 6/6"))
    assert re.search(r"100%, \d+\.\d images/s, eta 0:00:0\d, data wait \d+%, loss \d\.\d{3}, .*mask \d\.\d{3}", bar)
    lines = [line for line in re.split("[\r\n]+", written) if " INFO: eta: " in line]
    assert len(lines) == 3 and all(LINE.fullmatch(line.partition("INFO: ")[2]) for line in lines)
    assert "6/6" not in (tmp_path / "log.txt").read_text()


def test_the_bar_says_what_the_line_does():
    meter = meter_with([0.5] * 4, warmup=0, total=100)
    meter.console_line(4, {"loss": 1.5, "loss_mask": 0.25}, 0.1, 0)
    assert meter.brief == "32.0 images/s, eta 0:00:48, data wait 25%, loss 1.500, mask 0.250"


class TestProgress:
    def test_a_line_every_half_minute(self, monkeypatch, caplog):
        """On a clock that gains 10 s with every item: after items 3, 6, 9, ..."""
        clock = itertools.count(step=10.0)
        monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
        with caplog.at_level(logging.INFO, logger="maskrcnn_benchmark"):
            assert list(progress(iter(range(7)), 7, "inference")) == list(range(7))
        lines = [record.getMessage() for record in caplog.records]
        assert lines == [
            "inference: 3 of 7, 0.10 a second, eta 0:00:40",
            "inference: 6 of 7, 0.10 a second, eta 0:00:10",
        ]

    def test_nothing_for_what_is_done_at_once(self, caplog):
        with caplog.at_level(logging.INFO, logger="maskrcnn_benchmark"):
            assert list(progress(iter(range(100)), 100, "inference")) == list(range(100))
        assert not caplog.records

    def test_a_bar_on_the_main_rank_of_a_terminal(self, monkeypatch, caplog):
        terminal = io.StringIO()
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stderr", terminal)
        with caplog.at_level(logging.INFO, logger="maskrcnn_benchmark"):
            assert list(progress([1, 2, 3], 3, "inference")) == [1, 2, 3]
        assert "inference: 100%" in terminal.getvalue() and not caplog.records
        monkeypatch.setattr(console.distributed, "is_main", lambda: False)
        written = terminal.getvalue()
        assert list(progress([1, 2, 3], 3, "inference")) == [1, 2, 3] and terminal.getvalue() == written
