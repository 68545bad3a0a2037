"""The report: what it says, that nothing in it can break out of it, and how a browser lays it out."""

import json
import re

import pytest
from benchmark_results import STEADY, processes, result
from pages import Page, browse

from maskrcnn_benchmark.benchmark import history, results
from maskrcnn_benchmark.benchmark.compare import compare
from maskrcnn_benchmark.errors import UserError
from maskrcnn_benchmark.report import benchmark_page, charts


@pytest.fixture
def sides():
    old = result({"step_ms": processes(*STEADY), "loss": processes(*STEADY, gate=False)})
    new = result({"step_ms": processes(*(1.2 * v for v in STEADY)), "loss": processes(*STEADY, gate=False)})
    return old, new


@pytest.fixture
def past(tmp_path):
    for number in range(24):
        value = 100 + number % 3 + 20 * (number >= 12)
        one = result({"step_ms": processes(value)}, commit=f"{number:02d}" * 20)
        history.append(tmp_path / "history.jsonl", one)
    return history.series(history.read(tmp_path / "history.jsonl"))


def test_the_terminal_has_the_verdict_last(sides):
    lines = benchmark_page.text(compare(*sides)).splitlines()
    assert lines[0].split() == list(benchmark_page.HEADER)
    assert lines[1].startswith("train step float32") and "+20.0%" in lines[1] and lines[1].endswith("regression")
    assert lines[-1] == "REGRESSION: 1 of 1 metrics are worse or missing"


def test_numbers_as_people_read_them():
    assert [charts.number(value) for value in (None, 0, 0.59353, 5.884, 1234.56, 98765)] == [
        "-", "0", "0.5935", "5.884", "1,235", "98,765",
    ]  # fmt: skip


def test_markdown_is_a_table_whatever_names_hold(sides, tmp_path):
    for side in sides:
        side["cases"][0]["name"] = "pipe | star * <b>"
    text = benchmark_page.markdown(sides[1], compare(*sides))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    columns = {len(re.split(r"(?<!\\)\|", row)) - 2 for row in rows}
    assert columns == {len(benchmark_page.HEADER), len(benchmark_page.RESULT_HEADER)}
    assert r"pipe \| star \* \<b\>" in text and "**REGRESSION" in text


def test_json_is_the_comparison(sides, tmp_path):
    benchmark_page.write(tmp_path / "a.json", sides[1], sides[0], compare(*sides))
    report = json.loads((tmp_path / "a.json").read_text())
    assert (report["verdict"], report["exit_code"]) == ("regression", 1)
    assert report["findings"][0]["change"] == pytest.approx(0.2)


def test_the_page_needs_nothing_else(sides, past, tmp_path):
    benchmark_page.write(tmp_path / "a.html", sides[1], sides[0], compare(*sides), past)
    text = (tmp_path / "a.html").read_text()
    page = Page(text)
    assert not re.search(r"https?:|url\(|@import|<script|<link|<img", text)
    assert "prefers-color-scheme:dark" in text and ("meta", {"charset": "utf-8"}) in page.tags
    words = " ".join(page.words)
    for said in ("REGRESSION: 1 of 1", "train step float32", "100.2 ms", "120.3 ms", "A processor", "batch 2"):
        assert said in words
    assert "19.8% worse at commit 121212121212" in words


def test_every_sample_and_process_is_drawn(sides):
    page = Page(benchmark_page.html(sides[1], sides[0], compare(*sides)))
    drawn = [attributes["class"] for tag, attributes in page.tags if tag in ("circle", "line")]
    for side in ("base", "new"):
        assert drawn.count(f"sample dot-{side}") == 24 and drawn.count(f"median median-{side}") == 8
    places = [float(a["cx"].rstrip("%")) for tag, a in page.tags if tag == "circle"]
    assert all(0 <= place <= 100 for place in places)
    assert max(places[:24]) < min(places[24:]) + 25  # base lies left of new


def test_a_history_marks_its_step(past):
    page = Page(benchmark_page.html(result({"step_ms": processes(1)}), past=past))
    drawn = [attributes.get("class") for _, attributes in page.tags]
    (course,) = (attributes for _, attributes in page.tags if attributes.get("class") == "course c0")
    assert drawn.count("step") == 1 and len(course["points"].split()) == drawn.count("dot c0") == 24
    assert "121212121212: 120.0 ms" in " ".join(page.words)
    (step,) = (attributes for _, attributes in page.tags if attributes.get("class") == "step")
    assert float(step["x1"].rstrip("%")) == pytest.approx(50, abs=0.1)  # between the 12th and 13th of 24


def test_names_cannot_break_the_page(sides):
    for side in sides:
        side["cases"][0]["name"] = side["environment"]["device_name"] = '</title><script>alert("1")</script>&'
        side["cases"][0]["metrics"] = {"<i>": side["cases"][0]["metrics"]["step_ms"]}
    text = benchmark_page.html(sides[1], sides[0], compare(*sides))
    tags = {tag for tag, _ in Page(text).tags}
    assert "script" not in tags and "i" not in tags and text.count("</title>") > 0


def test_a_straggler_does_not_flatten_the_rest():
    metric = results.metric([10.0, 10.1, 10.2, 10.3, 10.4] * 4 + [900], "ms")
    page = Page(benchmark_page.html(result({"step_ms": metric})))
    places = [float(a["cx"].rstrip("%")) for tag, a in page.tags if tag == "circle"]
    assert max(places) == 100 and sorted(places)[-2] - min(places) > 20
    assert "1 of 21 samples lie beyond the axis" in " ".join(page.words)


@pytest.mark.parametrize("samples", [[5], [0, 0, 0], [1e-9, 2e-9], [-1, 1], [1e12]])
def test_any_numbers_can_be_drawn(samples):
    Page(benchmark_page.html(result({"step_ms": results.metric(samples, "ms")})))


def test_ticks_are_round_and_within():
    scale = charts.Scale(0.6, 1.1)
    assert [round(tick, 6) for tick in scale.ticks()] == [0.6, 0.8, 1.0] or len(scale.ticks()) >= 3
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks())
    assert scale.percent(-5) == 0 and scale.percent(99) == 100


def test_a_report_has_one_of_three_forms(tmp_path):
    with pytest.raises(UserError, match=r"\.md, \.html or \.json"):
        benchmark_page.check_path(tmp_path / "a.pdf")
    with pytest.raises(UserError, match="no directory"):
        benchmark_page.check_path(tmp_path / "none" / "a.md")


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_scrolling_sideways(sides, past, tmp_path, width):
    text = benchmark_page.html(sides[1], sides[0], compare(*sides), past)
    wanted, shown, complaints = browse(text, width, tmp_path)
    assert wanted <= shown == width and complaints == []
