"""The verdict: the tests against published values, each rule by hand, and how often it finds and cries wolf."""

import copy
import json
import math

import numpy as np
import pytest
from benchmark_results import ENVIRONMENT, STEADY, processes, result

from maskrcnn_benchmark.benchmark import accuracy, compare, history, results
from maskrcnn_benchmark.benchmark.compare import Limits
from maskrcnn_benchmark.benchmark.statistics import mann_whitney, smallest_p, student_tail, welch
from maskrcnn_benchmark.config import flat, get_config
from maskrcnn_benchmark.errors import UserError


def judge(old, new, limits=None, **changes):
    """Verdict, exit code and the one finding of a metric's comparison."""
    judged = compare.compare(result({"step_ms": old}), result({"step_ms": new}, **changes), limits)
    return judged.verdict, judged.exit_code, judged.findings[0]


# ---- statistics


def test_mann_whitney_against_published_values():
    # scipy's documentation: ages at diagnosis of men and women, two-sided exact p .1111
    assert 2 * mann_whitney([19, 22, 16, 29, 24], [20, 11, 17, 12]) == pytest.approx(0.1111, abs=5e-5)
    # Hollander and Wolfe, permeability of membranes, as in R's wilcox.test: one-sided p .1272
    term = [0.80, 0.83, 1.89, 1.04, 1.45, 1.38, 1.91, 1.64, 0.73, 1.46]
    early = [1.15, 0.88, 0.90, 0.74, 1.21]
    assert mann_whitney(term, early) == pytest.approx(0.1272, abs=5e-5)


@pytest.mark.parametrize(("u", "p"), [(0, 0.001), (1, 0.002), (2, 0.004), (3, 0.008), (4, 0.013), (5, 0.021)])
def test_mann_whitney_against_the_table_for_six_and_six(u, p):
    """Mann and Whitney 1947, table for n = m = 6: the probability of a U not above this one."""
    above, below = [10, 20, 30, 40, 50, 60], [1, 2, 3, 4, 5, 6]
    above[0] = 6.5 - u  # below u of the lower sample
    assert mann_whitney(above, below) == pytest.approx(p, abs=5e-4)


def test_mann_whitney_with_ties_by_hand():
    # ranks 1, 2.5, 2.5, 4: of the six pairs the sums are 3.5 3.5 5 5 6.5 6.5; [2, 3] has 6.5
    assert mann_whitney([2, 3], [1, 2]) == pytest.approx(2 / 6)
    assert mann_whitney([5, 5, 5], [5, 5, 5]) == 1
    assert mann_whitney([5] * 30, [5] * 30) == 1


def test_the_normal_approximation_meets_the_exact_distribution(monkeypatch):
    random = np.random.default_rng(0)
    for ties in (False, True):
        a, b = random.normal(0.5, 1, 18), random.normal(0, 1, 20)
        if ties:
            a, b = a.round(), b.round()
        exact = mann_whitney(a, b)
        with monkeypatch.context() as patch:
            patch.setattr("maskrcnn_benchmark.benchmark.statistics.EXACT_UP_TO", 0)
            assert mann_whitney(a, b) == pytest.approx(exact, rel=0.05)


def test_the_smallest_p_is_that_of_complete_separation():
    assert smallest_p(6, 6) == pytest.approx(1 / 924) == mann_whitney(range(6, 12), range(6))
    assert smallest_p(6, 6) < Limits().significance < smallest_p(5, 5)


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [(1.812, 10, 0.05), (2.228, 10, 0.025), (2.920, 2, 0.05), (3.365, 5, 0.01), (6.314, 1, 0.05), (1.646, 1000, 0.05)],
)
def test_student_against_the_table(t, freedom, p):
    assert student_tail(t, freedom) == pytest.approx(p, rel=2e-3)
    assert student_tail(-t, freedom) == pytest.approx(1 - p, rel=1e-3)


def test_welch_against_students_sleep_data():
    """R's t.test(extra ~ group): t = -1.8608, df = 17.776, two-sided p .07939."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    assert 2 * welch(second, first) == pytest.approx(0.07939, abs=5e-6)
    assert welch([1, 1, 1], [1, 1, 1]) == 1 and welch([2, 2, 2], [1, 1, 1]) == 0


# ---- the rules


def test_a_rerun_is_fine():
    assert judge(processes(*STEADY), processes(*reversed(STEADY)))[:2] == ("fine", 0)


def test_slower_is_a_regression():
    verdict, code, finding = judge(processes(*STEADY), processes(*(1.2 * value for value in STEADY)))
    assert (verdict, code, finding.verdict) == ("regression", 1, "regression")
    assert finding.change == pytest.approx(0.2) and finding.p == pytest.approx(smallest_p(8, 8)) and not finding.note
    assert (finding.base, finding.new) == (100.25, pytest.approx(120.3))


def test_size_and_certainty_are_both_asked_for():
    certain_but_small = processes(*(value + 2.5 for value in [100] * 8))
    assert judge(processes(*[100] * 8), certain_but_small)[0] == "fine"
    assert judge(processes(*[100] * 8), certain_but_small, Limits(threshold=0.02))[0] == "regression"
    large_but_uncertain = processes(120, 121, 119, 122, 97, 98, 99, 150)
    _, _, finding = judge(processes(*STEADY), large_but_uncertain)
    assert finding.verdict == "unclear" and finding.change > 0.15 and finding.p > 0.002


def test_throughput_that_falls_is_worse_by_the_time_it_costs():
    old, new = (processes(*[value] * 6, unit="images/s", better="higher") for value in (12, 10))
    assert judge(old, new)[2].change == pytest.approx(0.2) and judge(old, new)[0] == "regression"
    assert judge(new, old)[2].verdict == "faster"


def test_faster_is_fine_and_asks_for_a_new_base():
    judged = compare.compare(result({"step_ms": processes(*[100] * 6)}), result({"step_ms": processes(*[80] * 6)}))
    assert (judged.exit_code, judged.findings[0].verdict) == (0, "faster")
    assert any("measure the base anew" in remark for remark in judged.remarks)


def test_what_is_missing_fails():
    base = result({"step_ms": processes(*STEADY), "forward_ms": processes(*STEADY, gate=False)})
    without = copy.deepcopy(base)
    del without["cases"][0]["metrics"]["forward_ms"]
    assert compare.compare(base, without).exit_code == 0  # it was not gated
    del without["cases"][0]["metrics"]["step_ms"]
    assert compare.compare(base, without).findings[0].verdict == "missing"
    assert compare.compare(base, without).exit_code == 1
    nothing = base | {"cases": []}
    assert compare.compare(base, nothing).exit_code == 1
    assert compare.compare(nothing, base).exit_code == 2  # nothing was compared: that is not fine
    more = base | {"cases": [*base["cases"], base["cases"][0] | {"name": "another"}]}
    assert compare.compare(base, more).exit_code == 0 and "another" in compare.compare(base, more).remarks[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "cuda"}, "device differs: was cpu, is cuda"),
        ({"device_name": "Another"}, "device_name differs"),
        ({"threads": 1}, "threads differs: was 2, is 1"),
        ({"world_size": 8}, "world_size differs"),
        ({"config_sha256": "0" * 64}, "config_sha256 differs"),
        ({"work": {"batch": 2, "rois": 511.0}}, "work differs: rois was 512.0, is 511.0"),
        ({"work": {"batch": 2}}, "work differs: rois was 512.0, is None"),
        ({"warmup": 9}, "warmup differs"),
    ],
)
def test_what_cannot_be_compared(changes, words):
    verdict, code, finding = judge(processes(*STEADY), processes(*(9 * v for v in STEADY)), **changes)
    assert (verdict, code) == ("not comparable", 2) and words in finding.note


def test_another_dtype_is_another_case():
    judged = compare.compare(result({"a": processes(1)}), result({"a": processes(1)}, dtype="bfloat16"))
    assert judged.exit_code == 1 and judged.findings[0].verdict == "missing"


def test_other_versions_and_local_changes_are_told():
    judged = compare.compare(
        result({"step_ms": processes(*STEADY)}), result({"step_ms": processes(*STEADY)}, torch="2.14.0", dirty=True)
    )
    assert judged.exit_code == 0
    assert "local changes" in judged.remarks[0] and "torch differs: was 2.13.0, is 2.14.0" in judged.remarks[1]


def test_unlike_disturbance_is_told():
    base, new = (result({"step_ms": processes(*STEADY)}) | {"others_cpu_share": share} for share in (0.02, 0.5))
    assert (
        "others used 2% of the machine's cores beside the base, 50% beside new" in compare.compare(base, new).remarks[0]
    )
    assert compare.compare(new, new).remarks == [] == compare.compare(base, base).remarks


def test_a_key_that_only_one_build_knows_is_part_of_what_is_compared():
    base, new = (result({"step_ms": processes(*STEADY)}) for _ in range(2))
    base["cases"][0]["config"] = {"A.B": [1, 2], "OLD": 0}
    new["cases"][0] |= {"config": {"A.B": [1, 2], "NEW": 0}, "config_sha256": "another"}
    assert compare.compare(base, new).exit_code == 0
    new["cases"][0]["config"]["A.B"] = [1, 3]
    judged = compare.compare(base, new)
    assert judged.exit_code == 2 and "A.B was [1, 2], is [1, 3]" in judged.findings[0].note


def test_a_certain_regression_outweighs_what_could_not_be_compared():
    base = result({"step_ms": processes(*STEADY)})
    base["cases"].append(base["cases"][0] | {"name": "other"})
    new = copy.deepcopy(base)
    new["cases"][1]["warmup"] = 9
    assert compare.compare(base, new).exit_code == 2
    new["cases"][0]["metrics"]["step_ms"] = processes(*(2 * value for value in STEADY))
    assert compare.compare(base, new).exit_code == 1


def test_the_test_is_over_processes_not_steps():
    """Steps of a process are alike: 100 of each of two processes prove nothing about builds, 6 processes a side do."""
    many = np.linspace(-0.1, 0.1, 100)
    olds, news = (
        results.metric([m + x for m in medians for x in many], "ms") | {"process_samples": [100] * 6}
        for medians in ([100, 110, 100, 110, 100, 110], [110, 100, 110, 110, 110, 110])
    )
    assert judge(olds, news)[2].p > 0.05
    _, _, single = judge(results.metric(olds["samples"], "ms"), results.metric(news["samples"], "ms"))
    assert single.p < 0.002 and "weaker than over processes" in single.note


def test_too_few_samples_cannot_pass():
    verdict, code, finding = judge(processes(100), processes(100))
    assert (verdict, code) == ("not comparable", 2) and "too few" in finding.note


def test_memory_is_gated_at_two_per_cent_even_by_one_sample():
    def peak(value):
        return {"max_memory_mb": results.metric([value], "MB")}

    assert compare.compare(result(peak(1000)), result(peak(1019))).exit_code == 0
    assert compare.compare(result(peak(1000)), result(peak(1021))).exit_code == 1
    many = [{"max_memory_mb": processes(*[value] * 6, unit="MB")} for value in (1000, 1025)]
    assert compare.compare(result(many[0]), result(many[1])).exit_code == 1
    assert compare.compare(result(many[0]), result(many[1]), Limits(memory=0.03)).exit_code == 0


@pytest.mark.parametrize(("old", "new", "code"), [(10, 14, 0), (10, 16, 1), (0.5, 1.4, 0)])
def test_set_up_time_is_judged_loosely_though_it_is_not_gated(old, new, code):
    sides = [
        {"step_ms": processes(*[9] * 6), "compile_seconds": processes(*[value] * 6, unit="s", gate=False)}
        for value in (old, new)
    ]
    assert compare.compare(*map(result, sides)).exit_code == code


def test_accuracy_is_judged_over_seeds():
    """The noise of COCO training runs: some .001 to .002 from seed to seed."""
    base = [0.377, 0.378, 0.376, 0.379, 0.377]

    def verdict(seeds):
        sides = [result({"bbox_ap": results.metric(values, "AP", "higher")}) for values in (base, seeds)]
        return compare.compare(*sides)

    assert verdict([0.376, 0.377, 0.378, 0.3775, 0.3765]).exit_code == 0
    assert verdict([0.372, 0.374, 0.373, 0.375, 0.372]).exit_code == 1
    assert verdict([0.3, 0.3]).exit_code == 2


# ---- how often it is right


def simulate(random, factor, count, threshold):
    """One comparison under noise as measured on two cores: processes differ by 2%, and in 5% of them the machine was
    busy and half as fast."""

    def side(scale):
        busy = np.where(random.random(count) < 0.05, 2.0, 1.0)
        return processes(*(scale * 100 * random.normal(1, 0.02, count) * busy))

    return judge(side(1), side(factor), Limits(threshold=threshold))[1]


def test_a_fifth_more_is_found_and_reruns_pass():
    random = np.random.default_rng(1)
    assert [simulate(random, 1.2, 12, 0.03) for _ in range(10)] == [1] * 10
    assert sum(simulate(random, 1.0, 12, 0.03) for _ in range(300)) <= 2  # p < .002 each


# ---- files


def test_a_file_is_read_back(tmp_path):
    written = result({"step_ms": processes(*STEADY)})
    results.write(tmp_path / "a.json", written)
    assert results.read(tmp_path / "a.json") == written
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def spoil(change):
    content = result({"step_ms": processes(*STEADY)})
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a JSON file"),
        ("[1]", "not a benchmark result"),
        ('{"bbox": null}', "not a benchmark result"),
        (spoil(lambda r: r.update(format=2)), "format is 2"),
        (spoil(lambda r: r.update(environment=None)), "no environment"),
        (spoil(lambda r: r["cases"].append(1)), "case number 2 is a int"),
        (spoil(lambda r: r["cases"][0].pop("work")), "case 'step' has no work"),
        (spoil(lambda r: r["cases"].append(r["cases"][0])), "is there 2 times"),
        (spoil(lambda r: r["cases"][0]["metrics"]["step_ms"].update(samples=[])), "at least one"),
        (spoil(lambda r: r["cases"][0]["metrics"]["step_ms"].update(samples=["1"])), "finite numbers"),
        (spoil(lambda r: r["cases"][0]["metrics"]["step_ms"].update(samples=[math.nan])), "NaN"),
        (spoil(lambda r: r["cases"][0]["metrics"]["step_ms"].update(better="more")), "better is 'more'"),
        (spoil(lambda r: r["cases"][0]["metrics"]["step_ms"].update(process_samples=[3])), "do not add up"),
    ],
)
def test_a_file_that_cannot_be_judged(tmp_path, text, words):
    path = tmp_path / "spoilt.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        results.read(path)
    assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        results.read(tmp_path / "none.json")


def test_processes_are_merged_in_order():
    parts = [result({"step_ms": results.metric(samples, "ms")}) for samples in ([1, 2, 9], [4], [6, 5])]
    parts[0]["cases"][0]["metrics"]["only_here"] = results.metric([1], "ms")
    for number, part in enumerate(parts):
        part["cases"][0] |= {"peak": {"tflops": 2.0}, "losses": [number], "clocks": [[number, number + 1]]}
    (case,) = results.merge(parts, ["benchmark.py"])["cases"]
    assert (case["peak"], case["losses"]) == ({"tflops": 2.0}, [0]), "of the first"
    assert case["clocks"] == [[0, 1], [1, 2], [2, 3]]
    assert case["metrics"].keys() == {"step_ms"}  # what a process lacks, a comparison must find missing
    merged = case["metrics"]["step_ms"]
    assert merged["samples"] == [1, 2, 9, 4, 6, 5] and results.processes(merged) == [[1, 2, 9], [4], [6, 5]]
    assert results.process_medians(merged) == [2, 4, 5.5] and merged["p50"] == 4.5


@pytest.mark.parametrize("change", [{"work": {"batch": 3}}, {"device_name": "Another"}, {"commit": "b" * 40}])
def test_processes_of_one_run_must_be_alike(change):
    metrics = {"step_ms": results.metric([1], "ms")}
    with pytest.raises(UserError, match=f"differ in {next(iter(change))}"):
        results.merge([result(metrics), result(metrics, **change)], [])


# ---- history


def runs(path, values, **changes):
    for number, value in enumerate(values):
        one = result({"step_ms": processes(value, value + 1, value - 1)}, commit=f"{number:040x}", **changes)
        history.append(path, one | {"started": f"day {number}"})


def test_a_step_names_its_commit(tmp_path):
    path = tmp_path / "history.jsonl"
    noise = np.random.default_rng(2).normal(0, 0.5, 24)
    runs(path, [(100 if number < 15 else 108) + noise[number] for number in range(24)])
    (series,) = history.series(history.read(path))
    (step,) = series.steps
    assert (step.index, step.after.commit, step.before.commit) == (15, f"{15:040x}"[:12], f"{14:040x}"[:12])
    assert step.change == pytest.approx(0.08, abs=0.01) and step.p < 1e-5
    lines = history.describe(series)
    assert "24 runs, day 0 to day 23" in lines[0] and len(lines) == 3
    assert lines[1].index("█") - 2 < 17 == lines[2].index("^")  # under the first run after the step
    assert f"worse at commit {15:040x}"[:28] in lines[2]


def test_the_first_run_after_a_step_may_be_the_nearest_to_those_before(tmp_path):
    """Ranks alone would take it for one of them: 11 and 15 runs apart are less likely by chance than 10 and 16."""
    path = tmp_path / "history.jsonl"
    runs(path, [100] * 10 + [80] + [79] * 15)
    (series,) = history.series(history.read(path))
    assert [step.index for step in series.steps] == [10]


def test_of_a_long_history_the_latest_runs_are_drawn(tmp_path):
    path = tmp_path / "history.jsonl"
    runs(path, [100 + number % 3 + 10 * (number >= 10) for number in range(100)])
    (series,) = history.series(history.read(path))
    lines = history.describe(series)
    assert "100 runs, the last 80 drawn, day 20 to day 99" in lines[0] and len(lines[1].strip()) == 80
    assert lines[2].startswith("  earlier: ") and "(day 10)" in lines[2]


def test_two_steps_up_and_down(tmp_path):
    path = tmp_path / "history.jsonl"
    noise = np.random.default_rng(3).normal(0, 0.5, 36)
    runs(path, [100 + 10 * (12 <= number < 24) + noise[number] for number in range(36)])
    (series,) = history.series(history.read(path))
    assert [step.index for step in series.steps] == [12, 24]
    assert series.steps[0].change > 0 > series.steps[1].change


def test_noise_and_small_steps_are_none(tmp_path):
    path = tmp_path / "history.jsonl"
    noise = np.random.default_rng(4).normal(0, 1, 40)
    runs(path, 100 + noise)
    runs(path, 102 + noise[:20])  # certain perhaps, but below 3%
    assert [one.steps for one in history.series(history.read(path))] == [[]]


def test_among_many_places_chance_finds_a_split_somewhere(tmp_path):
    """Of these twenty runs of one build, the best of all splits has p < .002; there are 38 tests to choose from."""
    path = tmp_path / "history.jsonl"
    runs(path, 100 * (1 + np.random.default_rng(0).normal(0, 0.04, 20)))
    (series,) = history.series(history.read(path))
    values = [point.value for point in series.points]
    assert min(mann_whitney(values[:8], values[8:18]), mann_whitney(values[8:18], values[:8])) < 0.002
    assert series.steps == []


def test_other_work_is_another_series(tmp_path):
    path = tmp_path / "history.jsonl"
    runs(path, [100] * 3)
    runs(path, [500] * 3, work={"batch": 8})
    assert [len(one.points) for one in history.series(history.read(path))] == [3, 3]


def test_a_key_that_is_new_and_at_its_default_is_no_other_work(tmp_path):
    path = tmp_path / "history.jsonl"
    config = flat(get_config(None, ["SEED", "5"]))
    before = {key: value for key, value in config.items() if key != "SOLVER.GAMMA"}
    for number, one in enumerate((before, config, config | {"SEED": 6}, config | {"SOLVER.GAMMA": 0.5})):
        measured = result({"step_ms": processes(100, 101, 99)}, config_sha256=str(number))
        measured["cases"][0]["config"] = one
        history.append(path, measured)
    assert [len(one.points) for one in history.series(history.read(path))] == [2, 1, 1]


def test_a_history_is_of_one_machine(tmp_path):
    path = tmp_path / "history.jsonl"
    runs(path, [100])
    with pytest.raises(UserError, match=r"another machine \(device_name differs"):
        runs(path, [100], device_name="Another")
    assert len(path.read_text().splitlines()) == 1
    path.write_text("{}\n")
    with pytest.raises(UserError, match="line 1"):
        history.read(path)


def test_sparkline():
    assert history.sparkline([1, 2, 3, 8]) == "▁▂▃█" and history.sparkline([5, 5]) == "▄▄"


# ---- accuracy


def finished(directory, seed, ap, rate=0.001):
    from maskrcnn_benchmark.config import dump, get_config

    directory.mkdir()
    cfg = get_config(None, ["SEED", str(seed), "SOLVER.BASE_LR", str(rate), "OUTPUT_DIR", str(directory)])
    (directory / "config.yaml").write_text(dump(cfg))
    scores = {"bbox": {"AP": ap}, "segm": None, "environment": ENVIRONMENT}
    (directory / "result.json").write_text(json.dumps(scores))
    return directory


def test_runs_that_differ_in_their_seed_are_one_case(tmp_path):
    runs = [finished(tmp_path / str(seed), seed, ap) for seed, ap in ((1, 0.3), (2, 0.31), (3, 0.29))]
    gathered = accuracy.gather(runs, [])
    results.check(gathered)
    (case,) = gathered["cases"]
    assert case["metrics"].keys() == {"bbox_ap"} and case["metrics"]["bbox_ap"]["samples"] == [0.3, 0.31, 0.29]
    assert compare.compare(gathered, gathered).exit_code == 0
    with pytest.raises(UserError, match="seeds are"):
        accuracy.gather([runs[0], runs[0]], [])
    with pytest.raises(UserError, match="more than SEED"):
        accuracy.gather([runs[0], finished(tmp_path / "other", 9, 0.3, rate=0.5)], [])
    with pytest.raises(UserError, match="not a finished run"):
        accuracy.gather([tmp_path], [])
