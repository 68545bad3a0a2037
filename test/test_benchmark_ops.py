"""tools/benchmark.py ops: the timing by hand-made clocks and calls, the cases at a small size, the tool's words."""

import gc
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from maskrcnn_benchmark import command
from maskrcnn_benchmark.benchmark import cases, roofline, timing
from maskrcnn_benchmark.benchmark.timing import Plan
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.ops import roi_align

SMALL = cases.Setup(torch.device("cpu"), scale=0.005)
NAN = float("nan")


@pytest.fixture
def call(benchmark_tool, monkeypatch, capsys):
    """Runs the tool in this process: exit status, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
        threads = torch.get_num_threads()
        with pytest.raises(SystemExit) as stop:
            command.run(benchmark_tool.main)
        torch.set_num_threads(threads)
        return stop.value.code, *capsys.readouterr()

    return run


def simple_case(ours, peer, **changes) -> cases.Case:
    """A case on one tensor of ones, with functions in place of kernels."""
    return replace(
        cases.Case(
            name="simple",
            op="nms",
            inputs=lambda setup: torch.ones(4, device=setup.device),
            ours=lambda x: lambda: ours(x),
            torchvision=lambda x: lambda: peer(x),
            composite=lambda x: lambda: peer(x),
            least=lambda x, result: roofline.Least(roofline.size_of(x, result), 1000),
            agreement=cases.FLOAT32,
        ),
        **changes,
    )


# ---- timing


def test_percentiles_by_hand():
    # Four samples lie at 0, 33.3, 66.7 and 100 per cent: 90 is 0.7 of the way from the third to the last.
    assert timing.percentile([40, 10, 30, 20], 50) == 25
    assert timing.percentile([40, 10, 30, 20], 90) == pytest.approx(37)
    assert timing.percentile([40, 10, 30, 20], 99) == pytest.approx(39.7)
    assert timing.percentile([7], 99) == 7
    # a slow tail shows in p99, which is no mean of anything
    assert timing.percentile([1] * 99 + [1000], 99) == pytest.approx(10.99)
    assert timing.milliseconds([1_000_000, 3_000_000]) == {
        "p50": 2,
        "p90": pytest.approx(2.8),
        "p99": pytest.approx(2.98),
    }


def test_functions_take_turns_and_warm_up_is_left_out():
    events = []
    functions = {"ours": lambda: events.append("ours"), "peer": lambda: events.append("peer")}
    samples = timing.interleave(functions, lambda: events.append("wait"), Plan(warmup=2, repeats=3))
    assert [event for event in events if event != "wait"] == ["ours", "peer"] * 5
    assert events[:6] == ["wait", "ours", "wait", "wait", "peer", "wait"]  # waits before and after each call
    assert {name: len(values) for name, values in samples.items()} == {"ours": 3, "peer": 3}
    assert all(isinstance(value, int) and value >= 0 for values in samples.values() for value in values)


def test_a_sample_holds_the_wait_for_the_device(monkeypatch):
    clock = [0]
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: clock[0])

    def spend(nanoseconds):
        clock[0] += nanoseconds

    # The first wait is for work of others and comes before the clock is read.
    assert timing.nanoseconds(lambda: spend(5), lambda: spend(100)) == 105


def test_a_plan_spends_its_budget_between_its_bounds():
    plan = Plan(budget_seconds=2, least=3, most=5)
    assert plan.wants_more(2, 99)  # too few to stop
    assert plan.wants_more(4, 1.9)
    assert not plan.wants_more(3, 2)
    assert not plan.wants_more(5, 0)
    fixed = Plan(repeats=4)
    assert fixed.wants_more(3, 1e9) and not fixed.wants_more(4, 0)


def test_the_garbage_collector_rests_and_comes_back():
    assert gc.isenabled()
    seen = []
    timing.interleave({"ours": lambda: seen.append(gc.isenabled())}, lambda: None, Plan(warmup=1, repeats=1))
    assert seen == [False, False] and gc.isenabled()
    with pytest.raises(ZeroDivisionError), timing.quiet_garbage_collector():
        _ = 1 / 0
    assert gc.isenabled()


def test_ratio_of_medians_and_its_interval():
    assert timing.ratio_of_medians([30] * 5, [10] * 5) == (3, 3, 3)
    ratio, low, high = timing.ratio_of_medians([20, 40, 60], [10, 10, 10])
    assert (ratio, low, high) == (4, 2, 6)  # three rounds tell little: any of them may be the median
    # Rounds stay together: a machine that slows both alike leaves the ratio alone.
    assert timing.ratio_of_medians([10, 20, 400], [5, 10, 200]) == (2, 2, 2)
    random = np.random.default_rng(3)
    few, many = (random.normal(100, 10, size=(2, count)) for count in (10, 1000))
    width = [high - low for _, low, high in (timing.ratio_of_medians(*few), timing.ratio_of_medians(*many))]
    assert 0 < width[1] < width[0]
    _, low, high = timing.ratio_of_medians(*many)
    assert low < 1 < high


def test_extra_memory_is_unknown_on_a_cpu():
    assert timing.extra_memory_mb(lambda: torch.zeros(1000), get_device("cpu")) is None


def test_extra_memory_is_the_peak_on_top_of_what_was_there():
    """A device of 100 MB in use whose calls take another 30 for a while."""
    peak = [500]
    module = SimpleNamespace(
        reset_peak_memory_stats=lambda: peak.__setitem__(0, 100), memory_allocated=lambda: 100 * 2**20
    )
    device = SimpleNamespace(module=module, synchronize=lambda: None, max_memory_mb=lambda: peak[0])
    assert timing.extra_memory_mb(lambda: peak.__setitem__(0, 130), device) == 30


# ---- agreement


def test_close_is_element_by_element():
    agreement = cases.close(relative=0.1, absolute=1)
    assert agreement.error(torch.tensor([100.0, 0]), torch.tensor([90.0, 0])) == 1  # 10 apart, 1 + 9 allowed
    assert agreement.error(torch.tensor([1000.0, 3]), torch.tensor([1000.0, 1])) > 1  # small values count as well
    assert agreement.error(torch.tensor([NAN]), torch.tensor([1.0])) == math.inf
    assert agreement.error(torch.tensor([1.0]), torch.tensor([NAN])) == math.inf
    assert agreement.error(torch.ones(2), torch.ones(3)) == math.inf
    assert agreement.error([torch.ones(2), torch.zeros(2)], [torch.ones(2), torch.full((2,), 5.0)]) > 1
    assert agreement.error(torch.ones(0), torch.ones(0)) == 0


def test_equal_means_every_element():
    assert cases.EQUAL.error(torch.tensor([1.0, 0]), torch.tensor([True, False])) == 0
    assert cases.EQUAL.error(torch.tensor([3, 1]), torch.tensor([1, 3])) == math.inf
    assert cases.EQUAL.error(torch.tensor([3, 1]), torch.tensor([3])) == math.inf


# ---- cases


def test_names_say_which_case_it_is():
    everything = cases.ops_cases()
    assert len({(case.name, case.dtype) for case in everything}) == len(everything)
    assert {"roi_align", "roi_align_backward", "nms", "match", "box_encode", "box_decode"} < {c.op for c in everything}


def test_random_boxes_lie_in_the_image():
    boxes = cases.random_boxes(np.random.default_rng(0), 1000, 100, 200, 4, 300)
    assert boxes.dtype == np.float32 and (boxes >= 0).all() and (boxes <= [200.001, 100.001] * 2).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    scores = cases.distinct_scores(np.random.default_rng(0), 80_000)
    assert len(np.unique(scores)) == 80_000 and scores.min() > 0 and scores.max() < 1


def test_every_case_agrees_with_its_composite(run, tmp_path):
    """At a small size; those without a compiled kernel compare the composite with itself."""
    out = tmp_path / "ops.json"
    done = run("tools/benchmark.py", "ops", "--device", "cpu", "--against", "composite", "--scale", SMALL.scale,
               "--repeats", 2, "--warmup", 0, "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    rows = report["cases"]
    assert [(row["name"], row["dtype"]) for row in rows] == [
        (case.name, str(case.dtype).removeprefix("torch.")) for case in cases.ops_cases()
    ]
    assert all(row["agreement"]["agrees"] and row["peer_name"] == "composite" for row in rows)
    assert len(done.stdout.splitlines()) == len(rows) + 1


@pytest.mark.parametrize("case", cases.ops_cases(), ids=lambda case: f"{case.name} {case.dtype}")
def test_every_case_agrees_with_torchvision(case):
    if case.way.startswith("torchvision"):
        pytest.importorskip("torchvision", exc_type=ImportError)
    problem = case.inputs(replace(SMALL, dtype=case.dtype))
    assert case.agreement.error(case.ours(problem)(), case.torchvision(problem)()) <= 1


# ---- the roofline


def test_a_roofline_by_hand():
    """2 MB at 10 GB/s take .2 ms, 100 MFLOP at 1,000 GFLOP/s .1, at 250 GFLOP/s .4."""
    least = roofline.Least(2_000_000, 100_000_000)
    roof = roofline.Roof(10.0, {"float32": 1000.0, "bfloat16": 250.0})
    found = roofline.judge(least, 1.0, torch.float32, roof)
    assert (found["gb_per_second"], found["gflop_per_second"]) == (2.0, 100.0)
    assert (found["floor_ms"], found["bound_by"], found["share"]) == (0.2, "memory", 0.2)
    found = roofline.judge(least, 0.8, torch.bfloat16, roof)
    assert (found["floor_ms"], found["bound_by"], found["share"]) == (0.4, "arithmetic", 0.5)
    found = roofline.judge(roofline.Least(2_000_000), 1.0, torch.float32, roof)
    assert found["flop"] is found["gflop_per_second"] is None and found["bound_by"] == "memory"
    assert "share" not in roofline.judge(least, 1.0, torch.float32, None)


def test_the_roof_is_the_fastest_copy_and_product(monkeypatch):
    """A million bytes, read and written, in a million ns: 2 GB/s."""
    monkeypatch.setattr(roofline, "COPIED", 1_000_000)
    monkeypatch.setattr(roofline, "nanoseconds", lambda *_: 1_000_000)
    monkeypatch.setattr(roofline.flops, "measured_peak", lambda device, dtype: (0.5, "by hand"))
    roof = roofline.measure_roof(get_device("cpu"), [torch.float32])
    assert roof == roofline.Roof(2.0, {"float32": 500.0})


def test_pixels_under_a_box_by_hand():
    """Samples at 2.5, 3.5, 4.5 and 5.5 a side read pixels 2 to 6."""
    box = torch.tensor([[2.0, 2.0, 6.0, 6.0]])
    count = lambda boxes, planes: roofline.pixels_under(  # noqa: E731
        boxes, torch.tensor(planes), [(8, 8), (8, 8)], [1.0, 1.0], 2, 2
    )
    assert count(box, [0]) == 25
    assert count(box.repeat(2, 1), [0, 0]) == 25 and count(box.repeat(2, 1), [0, 1]) == 50


@pytest.mark.parametrize("samples", [0, 2])
def test_pixels_under_boxes_are_those_with_a_gradient(samples):
    random = np.random.default_rng(0)
    boxes = torch.from_numpy(cases.random_boxes(random, 12, 48, 64, 4, 60))
    image, feature = torch.arange(12) % 2, torch.zeros(2, 1, 24, 32, requires_grad=True)
    level = torch.zeros_like(image)
    roi_align.roi_align([feature], boxes, image, level, [0.5], 3, samples, False).sum().backward()
    assert roofline.pixels_under(boxes, image, [(24, 32)] * 2, [0.5] * 2, 3, samples) == (feature.grad != 0).sum()


def of_case(name, dtype=torch.float32):
    (case,) = [case for case in cases.ops_cases() if case.name == name and case.dtype == dtype]
    setup = replace(SMALL, dtype=dtype)
    problem = case.inputs(setup)
    return problem, case.least(problem, case.ours(problem)())


def test_what_a_convolution_must_do_by_hand():
    """Maps of 2 x 256 x 8 x 12 in bfloat16; weights of 256 x 256 x 3 x 3 and biases in float32, gradients too."""
    values, weights = 2 * 256 * 8 * 12, 256 * 256 * 9
    problem, forward = of_case("3x3 convolution forward, P3, 256 channels", torch.bfloat16)
    assert problem.input.numel() == values
    assert forward == roofline.Least(2 * 2 * values + 4 * (weights + 256), 2 * values * 256 * 9)
    _, backward = of_case("3x3 convolution backward, P3, 256 channels", torch.bfloat16)
    assert backward == roofline.Least(3 * 2 * values + 4 * (2 * weights + 256), 4 * values * 256 * 9)
    problem, end = of_case("1x1 convolution, shortcut and ReLU, C2, 64 to 256 channels", torch.bfloat16)
    values = problem.addend.numel()
    assert end == roofline.Least(2 * (values // 4 + 256 * 64 + 2 * values) + 4 * 256, 2 * values * 64)


def test_what_matching_and_coding_must_do_by_hand():
    """1,250 anchors: 4 float32 each, an int64 index and an int8 label; 20 ground truths."""
    problem, matched = of_case("IoU 20 x 250k + match, low quality allowed")
    labels = len(problem.anchors) * cases.match(cases.matching.match, problem)[1].element_size()
    assert matched == roofline.Least(20 * 16 + 1250 * (16 + 8) + labels, 14 * 20 * 1250)
    _, encoded = of_case("encode 250k boxes")
    assert encoded == roofline.Least(3 * 16 * 1250, 24 * 1250)


def test_what_pooling_must_do_by_hand():
    """5 boxes of 7 x 7 x 256 values; the backward pass writes all of the pyramid, 64 x 96 and its halves."""
    problem, forward = of_case("RoIAlign forward 7x7, 2 images, 1,024 boxes, channels-last")
    values, rois = 5 * 49 * 256, 5 * (16 + 8 + 8)
    assert len(problem.rois[0]) == 5 and forward.flop == 32 * values
    assert 0 < forward.bytes - 4 * values - rois < roofline.size_of(problem.features)
    _, backward = of_case("RoIAlign backward 7x7, 2 images, 1,024 boxes, channels-last")
    assert backward == roofline.Least(4 * values + rois + roofline.size_of(problem.features), 32 * values)


# ---- the tool


def test_what_the_file_holds(call, benchmark_tool, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_tool, "ops_cases", lambda images: [simple_case(torch.exp, torch.exp)])
    out = tmp_path / "ops.json"
    code, stdout, stderr = call("ops", "--device", "cpu", "--against", "composite", "--repeats", 3, "--threads", 1,
                                "--out", out)  # fmt: skip
    assert (code, stderr) == (0, "")
    report = json.loads(out.read_text())
    assert report["benchmark"] == "ops" and report["against"] == "composite" and report["threads"] == 1
    assert report["command"].endswith(f"--threads 1 --out {out}")
    assert report["environment"]["device"] == "cpu" and report["environment"]["torch"] == torch.__version__
    assert report["commit"] == report["environment"]["commit"]
    assert report["plan"]["warmup"] == 2 and report["plan"]["repeats"] == 3 and "linear" in report["method"]
    (row,) = report["cases"]
    assert row["agreement"] == {"tolerance": cases.FLOAT32.tolerance, "error": 0, "agrees": True}
    for side in ("ours", "peer"):
        assert len(row[side]["samples_ns"]) == 3 and all(type(value) is int for value in row[side]["samples_ns"])
        assert row[side]["ms"]["p50"] == pytest.approx(sorted(row[side]["samples_ns"])[1] / 1e6)
        assert row[side]["extra_memory_mb"] is None
    assert row["ratio"] == pytest.approx(row["peer"]["ms"]["p50"] / row["ours"]["ms"]["p50"])
    assert row["ratio_interval"][0] <= row["ratio"] <= row["ratio_interval"][1]
    assert f"{row['ratio']:.2f}" in stdout.splitlines()[1]
    assert row["roofline"]["bytes"] == 32 and row["roofline"]["flop"] == 1000 and report["roof"] is None


def test_a_wrong_kernel_does_not_win(call, benchmark_tool, monkeypatch, tmp_path):
    right, wrong = simple_case(torch.exp, torch.exp), simple_case(torch.sin, torch.exp, name="wrong one")
    monkeypatch.setattr(benchmark_tool, "ops_cases", lambda images: [wrong, right])
    out = tmp_path / "ops.json"
    code, stdout, stderr = call("ops", "--device", "cpu", "--against", "composite", "--repeats", 1, "--out", out)
    assert code == 1
    assert "wrong one" in stderr and len(stderr.splitlines()) == 1
    assert "DISAGREES" in stdout.splitlines()[1] and "DISAGREES" not in stdout.splitlines()[2]
    first, second = json.loads(out.read_text())["cases"]
    assert not first["agreement"]["agrees"] and "ours" not in first and first["ratio"] is None
    assert second["agreement"]["agrees"] and second["ratio"] > 0


def test_verdicts_hold_targets_against_ratios(call, benchmark_tool, monkeypatch, tmp_path):
    """Of torchvision's peer on a CPU at full size, and nowhere else."""
    slow = simple_case(torch.exp, lambda x: [x.exp() for _ in range(2000)][-1])
    both = [replace(slow, name="easy", target=2.0), replace(slow, name="hard", target=1e9)]
    monkeypatch.setattr(benchmark_tool, "ops_cases", lambda images: both)
    monkeypatch.setattr(benchmark_tool.peers, "import_torchvision", lambda: SimpleNamespace(__version__="1.2"))
    out = tmp_path / "ops.json"
    arguments = ("ops", "--device", "cpu", "--repeats", 3, "--out", out, "--against")
    assert call(*arguments, "torchvision")[0] == 0  # a missed target is no error
    report = json.loads(out.read_text())
    assert [row["verdict"] for row in report["cases"]] == ["met", "missed"]
    assert report["peers"] == {"torchvision": "1.2"}
    for more in (["composite"], ["torchvision", "--scale", 0.5]):
        assert call(*arguments, *more)[0] == 0
        assert [row["verdict"] for row in json.loads(out.read_text())["cases"]] == [None, None]


def test_without_a_peer_ours_is_timed_alone(call, benchmark_tool, monkeypatch):
    monkeypatch.setattr(benchmark_tool, "ops_cases", lambda images: [simple_case(torch.exp, torch.sin)])
    monkeypatch.setattr(benchmark_tool.roofline, "measure_roof", lambda *_: roofline.Roof(1e-9, {"float32": 5.0}))
    code, stdout, stderr = call("ops", "--device", "cpu", "--repeats", 1, "--markdown", "--roofline")
    assert (code, stderr) == (0, "")
    *table, roof = stdout.splitlines()
    header, rule, row = (line.strip("| ").split(" | ") for line in table)
    assert roof.endswith("a copy 0.0 GB/s, matrix products float32 5 GFLOP/s")
    assert row[header.index("bound by")] == "memory" and row[header.index("floor ms")] == "32000.000"  # 32 bytes
    assert header[0] == "case" and set(rule) == {"---"} and len(header) == len(rule) == len(row)
    assert row[0] == "simple" and float(row[header.index("ours ms")]) > 0 and row[header.index("peer ms")] == "-"


def test_torchvision_that_is_not_there(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # makes its import an ImportError
    code, stdout, stderr = call("ops", "--device", "cpu", "--against", "torchvision")
    assert (code, stdout) == (2, "")
    assert len(stderr.splitlines()) == 1 and "pip install torch torchvision" in stderr


def test_torchvision_that_does_not_load(call, tmp_path, monkeypatch):
    """As its build for another torch."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    code, stdout, stderr = call("ops", "--device", "cpu", "--against", "torchvision")
    assert (code, stdout) == (2, "")
    assert len(stderr.splitlines()) == 1 and "nms does not exist" in stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "no such case"], "no case has such a name"),
        (["--only", "("], "not a regular expression"),
        (["--out", "/no/such/directory/ops.json"], "there is no directory"),
        (["--repeats", "0"], "must be at least 1"),
        (["--scale", "2"], "at most 1"),
        (["--device", "gpu9"], "gpu9"),
        (["--against", "mmcv"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_one_line(call, arguments, words):
    code, stdout, stderr = call("ops", *arguments)
    assert (code, stdout) == (2, "")
    assert len(stderr.splitlines()) == 1 and words in stderr
