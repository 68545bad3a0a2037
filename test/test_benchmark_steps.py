"""tools/benchmark.py train, infer, data and eval: phases, constant work, ranks, and what the result file holds."""

import itertools
import json
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_keypoint_head import KEYPOINTS
from test_models import SMALL, TINY
from test_retinanet import RETINANET

from maskrcnn_benchmark.benchmark import environment, flops, loading, results, runs, scoring, sides, steps, workload
from maskrcnn_benchmark.benchmark.steps import Samples
from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.data.coco import CocoDataset
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.errors import UserError
from maskrcnn_benchmark.models.rcnn import RCNN
from maskrcnn_benchmark.ops import boxes

SIZE, POSITIVES = (96, 96), 4
SLEEP = 0.4
COUNTERS = ("quota_throttled_ms", "stolen_ms", "contended_ms")
SIDES = ("--device", "cpu", "--size", "96x96", "--steps", 2, "--warmup", 1, "--phase-steps", 2)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other make times of models this small depend on what else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cfg(tiny_config):
    return get_config(tiny_config, ["SOLVER.IMS_PER_BATCH", "2", "TEST.IMS_PER_BATCH", "2"])


def request_of(cfg, kind, **changes):
    request = runs.Request(
        kind=kind,
        cfg=cfg,
        device="cpu",
        dtypes=("float32",),
        data="synthetic",
        size=SIZE,
        positives=POSITIVES,
        steps=2,
        warmup=1,
        phase_steps=2,
        peak_tflops=1.0,
    )
    return runs.replace(request, **changes)


def measured(cfg, kind, **changes):
    (case,) = runs.run(request_of(cfg, kind, **changes), get_device("cpu"))["cases"]
    return case


# ---- the passes


class Clock:
    """A device whose queue takes no time, and everything that was asked of it."""

    def __init__(self):
        self.log = []

    def synchronize(self):
        self.log.append("wait")

    def event(self):
        return SimpleNamespace(
            record=lambda: self.log.append("mark"), synchronize=lambda: None, elapsed_time=lambda end: 5.0
        )


def logging_side(device, *phases):
    return {phase: lambda value, phase=phase: device.log.append(phase) or f"{value} {phase}" for phase in phases}


def test_one_side_is_never_waited_for_between_its_steps():
    device = Clock()
    samples = {"a": Samples()}
    steps.end_to_end({"a": logging_side(device, "data", "forward")}, device, 3, samples)
    assert device.log == [*["mark", "data", "forward", "mark"] * 3, "wait"]
    assert samples["a"].step == [5.0] * 3 and len(samples["a"].wait) == 3


def test_several_sides_take_turns_with_a_wait_between():
    device = Clock()
    both = {"a": logging_side(device, "a"), "b": logging_side(device, "b")}
    steps.end_to_end(both, device, 2, {name: Samples() for name in both})
    assert device.log == [*["mark", "a", "mark", "wait", "mark", "b", "mark", "wait"] * 2, "wait"]


def test_each_phase_is_waited_for_in_its_own_pass_and_given_what_the_one_before_returned():
    device, seen = Clock(), []
    phases = logging_side(device, "one", "two") | {"three": seen.append}
    assert list(steps.by_phase(phases, device)) == ["one", "two", "three"]
    assert device.log == ["wait", "one", "wait", "two", "wait", "wait"]
    assert seen == ["None one two"]


def test_warm_up_is_left_out():
    device, calls = Clock(), []
    got = steps.measure({"a": {"data": calls.append}}, device, warmup=3, steps=4, phase_steps=2)["a"]
    assert len(calls) == 3 + 4 + 2
    assert len(got.step) == len(got.wait) == 4 and len(got.phases["data"]) == 2


def test_the_slowest_rank_decides():
    one = Samples(first=1, step=[10, 40], wait=[1, 2], phases={"data": [3]})
    two = Samples(first=7, step=[20, 30], wait=[5, 0], phases={"data": [2]})
    assert steps.over_ranks([one, two]) == Samples(first=7, step=[20, 40], wait=[5, 2], phases={"data": [3]})


def test_figures_by_hand():
    """Two ranks, 8 images a step: 100, 300 and 100 ms."""
    got = steps.step_metrics(Samples(2000, [100, 300, 100], [10, 30, 10], {"data": [1, 3]}), images=8, devices=2)
    assert got["step_ms"]["p50"] == 100 and got["step_ms"]["p90"] == pytest.approx(260)
    assert got["images_per_second"]["samples"] == pytest.approx([80, 80 / 3, 80])
    assert got["images_per_second_per_device"]["p50"] == pytest.approx(40)
    assert got["images_per_second_overall"]["samples"] == [48]  # 24 images in half a second
    assert got["data_wait_share"]["samples"] == [0.1] and got["data_ms"]["p50"] == 2
    assert got["compile_seconds"]["samples"] == [2] and not got["compile_seconds"]["gate"]


# ---- sleeps appear in the right field


def sleepy(function):
    """Sleeps in every second call, so that steps with and without it take turns, whatever the machine does besides."""
    calls = itertools.count()

    def sometimes_slow(*arguments, **options):
        time.sleep(SLEEP * (next(calls) % 2))
        return function(*arguments, **options)

    return sometimes_slow


def assert_slept_in(metrics, *fields):
    """The medians of every other sample differ by the sleep, to 10%, in these fields, and in no other."""
    apart = {
        name: abs(np.median(metric["samples"][::2]) - np.median(metric["samples"][1::2]))
        for name, metric in metrics.items()
        if metric["unit"] == "ms"
    }
    assert apart == {name: pytest.approx(1000 * SLEEP * (name in fields), abs=100 * SLEEP) for name in apart}
    assert set(fields) <= set(apart)


@pytest.mark.parametrize(
    ("kind", "data", "phase", "where", "what"),
    [
        ("train", "real", "data", CocoDataset, "load"),
        ("train", "synthetic", "forward", RCNN, "forward"),
        ("train", "synthetic", "optimizer", sides, "update"),
        ("infer", "real", "data", CocoDataset, "load"),
        ("infer", "synthetic", "forward", RCNN, "forward"),
        ("infer", "synthetic", "post_processing", sides, "detections_to_results"),
    ],
)
def test_a_sleep_appears_in_its_field_alone(tiny_config, monkeypatch, kind, data, phase, where, what):
    cfg = get_config(tiny_config, ["SOLVER.IMS_PER_BATCH", "1", "TEST.IMS_PER_BATCH", "1"])
    monkeypatch.setattr(where, what, sleepy(getattr(where, what)))
    metrics = measured(cfg, kind, data=data, steps=10, phase_steps=6)["metrics"]
    assert_slept_in(metrics, f"{phase}_ms", "step_ms")
    slept, waited = 5 * SLEEP, metrics["data_wait_share"]["samples"][0] * sum(metrics["step_ms"]["samples"]) / 1000
    assert waited == pytest.approx(slept if phase == "data" else 0, abs=0.1 * slept)


def test_a_sleep_in_evaluation_is_exposed(cfg, monkeypatch):
    monkeypatch.setattr(runs, "evaluate", sleepy(runs.evaluate))
    metrics = measured(cfg, "infer", phase_steps=6)["metrics"]
    awake, slow = (np.median(metrics["exposed_evaluation_seconds"]["samples"][first::2]) for first in (0, 1))
    assert awake < SLEEP and slow - awake == pytest.approx(SLEEP, rel=0.1)
    assert_slept_in(metrics)


# ---- constant work


@pytest.fixture(scope="module")
def undisturbed(cfg):
    return {kind: measured(cfg, kind) for kind in ("train", "infer")}


def test_every_candidate_is_sampled_and_as_many_are_positive_as_asked_for(cfg):
    made = workload.training_workload(cfg, get_device("cpu"), 2, SIZE, POSITIVES)
    sampled = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
    candidates = torch.cat([made.proposals.boxes, made.targets.boxes], 1)
    assert candidates.shape[1] == sampled and made.targets.valid.all() and made.proposals.valid.all()
    best = boxes.iou(candidates, made.targets.boxes).amax(2)
    assert (best >= cfg.MODEL.ROI_HEADS.FG_IOU_THRESHOLD).sum(1).tolist() == [POSITIVES, POSITIVES]
    height, width = SIZE
    assert (candidates >= 0).all() and (candidates <= torch.tensor([width, height] * 2)).all()
    again = workload.training_workload(cfg, get_device("cpu"), 1, SIZE, POSITIVES, first=1)
    assert torch.equal(again.images.pixels[0], made.images.pixels[1])  # a rank's share is the same images
    assert torch.equal(again.proposals.boxes[0], made.proposals.boxes[1])


def test_work_is_the_same_in_every_step(cfg):
    case = measured(cfg, "train", steps=4)
    sampled = 2 * cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
    assert set(case["metrics"]["sampled_rois"]["samples"]) == {sampled}
    assert set(case["metrics"]["mask_head_rois"]["samples"]) == {2 * POSITIVES}
    assert case["work"]["mask_head_rois"] == 2 * POSITIVES and case["work"]["constant"]
    assert len(case["losses"]) == 1 + 4 + 2  # warm-up, end to end, by phase


def test_an_image_detects_as_many_as_are_kept(cfg, undisturbed):
    case = undisturbed["infer"]
    assert set(case["metrics"]["mask_head_rois"]["samples"]) == {2 * cfg.MODEL.ROI_HEADS.DETECTIONS_PER_IMG}


def test_too_many_positives_are_refused(cfg):
    with pytest.raises(UserError, match="1 to 4"):  # a quarter of 16
        workload.training_workload(cfg, get_device("cpu"), 1, SIZE, 5)


# ---- the result


def test_a_case_holds_every_field(undisturbed):
    """Of a peak of 1 TFLOP/s the share is FLOP over time."""
    case = undisturbed["train"]
    metrics = case["metrics"]
    assert {"step_ms", "images_per_second", "images_per_second_per_device", "data_wait_share"} <= set(metrics)
    assert {"data_ms", "forward_ms", "backward_ms", "optimizer_ms"} <= set(metrics)
    assert {"init_seconds", "compile_seconds", "max_memory_mb", "mfu"} <= set(metrics)
    assert {name for name, metric in metrics.items() if metric["gate"]} == {
        "step_ms",
        "images_per_second",
        "max_memory_mb",
    }
    times = metrics["step_ms"]["samples"]
    assert metrics["step_ms"]["p90"] == pytest.approx(np.percentile(times, 90))
    assert case["peak"] == {"tflops": 1.0, "source": "given"}
    speed = np.array(metrics["flop"]["samples"]) / (np.array(times) / 1000) / 1e12
    assert metrics["mfu"]["samples"] == pytest.approx(speed.tolist())
    assert case["work"]["trainable_parameters"] > 0 and case["warmup"] == 1
    ((before, after),) = case["clocks"]  # of one rank
    assert set(before) == set(after) == {"mhz", "heat_throttles", *COUNTERS}
    assert len(metrics["mask_head_rois"]["samples"]) == len(times)
    assert "exposed_evaluation_seconds" in undisturbed["infer"]["metrics"]


def test_training_on_two_ranks(run, tiny_config, tmp_path):
    out = tmp_path / "train.json"
    done = run("tools/benchmark.py", "train", "--config-file", tiny_config, *SIDES, "--batch", 4,
               "--positives", POSITIVES, "--out", out, ranks=2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = results.read(out)
    (case,) = result["cases"]
    assert result["environment"]["world_size"] == 2
    assert case["work"]["batch"] == 4 and case["work"]["mask_head_rois"] == 4 * POSITIVES  # over both ranks
    names = ("images_per_second", "images_per_second_per_device", "step_ms")
    total, each, times = (np.array(case["metrics"][name]["samples"]) for name in names)
    assert total == pytest.approx(2 * each) and total == pytest.approx(4000 / times)
    assert done.stdout.count("images/s") == 1  # the main rank speaks alone
    assert "UserWarning" not in done.stderr, done.stderr


def test_real_data_on_two_ranks(run, tiny_config, tmp_path):
    """Ten images in batches of four over both ranks; all that were found are scored together."""
    out = tmp_path / "infer.json"
    done = run("tools/benchmark.py", "infer", "--config-file", tiny_config, *SIDES, "--data", "real", "--batch", 4,
               "--out", out, "DATASETS.TEST", '("coco_2017_train[:10]",)', ranks=2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (case,) = results.read(out)["cases"]
    metrics = case["metrics"]
    assert len(case["clocks"]) == 2 and metrics["exposed_evaluation_seconds"]["p50"] > 0
    assert metrics["images_per_second"]["samples"] == pytest.approx(
        [4000 / milliseconds for milliseconds in metrics["step_ms"]["samples"]]
    )


def test_evaluation_and_operators_on_two_ranks(run, tmp_path):
    """The main rank scores alone; an operator runs on all, and the main rank speaks alone."""
    for kind, *arguments in (("eval", "--images", 3), ("ops", "--only", "^encode", "--repeats", 2, "--scale", 0.01)):
        out = tmp_path / f"{kind}.json"
        done = run("tools/benchmark.py", kind, *arguments, "--out", out, ranks=2)
        assert done.returncode == 0, done.stderr
        result = results.read(out)
        assert result["environment"]["world_size"] == 2
        assert len(done.stdout.splitlines()) == {"eval": len(result["cases"]), "ops": 2}[kind]
    assert len(result["cases"][0]["clocks"]) == 2 and len(result["cases"][0]["metrics"]["call_ms"]["samples"]) == 2


def test_accumulated_batches_are_not_counted_several_times(run, shapes, tiny_config, tmp_path):
    """A step is one batch: 4 images are 4 images, which FLOP, RoIs and time are of."""
    out = tmp_path / "train.json"
    done = run("tools/benchmark.py", "train", "--config-file", tiny_config, *SIDES, "--data", "real", "--batch", 4,
               "--out", out, "SOLVER.ACCUMULATE_STEPS", 2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (case,) = results.read(out)["cases"]
    assert set(case["metrics"]["sampled_rois"]["samples"]) == {4 * 16}


def test_memory_of_several_sides_is_of_the_data_asked_for(run, tiny_config, tmp_path):
    """Each side in a process of its own, of which two ranks have half a batch each. Images of --size, which real data
    have no use for, would take more than a gigabyte."""
    out = tmp_path / "infer.json"
    done = run("tools/benchmark.py", "infer", "--config-file", tiny_config, *SIDES, "--size", "4000", "--data", "real",
               "--dtype", "float32", "--dtype", "bfloat16", "--batch", 2, "--out", out, ranks=2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for case in results.read(out)["cases"]:
        assert 100 < case["metrics"]["max_memory_mb"]["p50"] < 700


def test_without_masks_nothing_is_in_the_mask_head(cfg):
    case = measured(with_keys(cfg, "MODEL.MASK_ON", False), "train")
    assert set(case["metrics"]["mask_head_rois"]["samples"]) == {0}


@pytest.mark.parametrize(("fixed", "padded"), [([], (96, 96)), ([(160, 192)], (160, 192))])
def test_flop_are_counted_at_the_size_that_is_run(cfg, fixed, padded):
    cfg = with_keys(cfg, "INPUT.FIXED_SHAPES", fixed)
    metrics = measured(cfg, "infer")["metrics"]
    amount = flops.inference_flops(cfg, padded).of(2, metrics["mask_head_rois"]["p50"])
    assert metrics["flop"]["samples"] == [amount] * 2


def with_keys(cfg, *keys):
    changed = cfg.clone()
    changed.merge_from_list(list(keys))
    return changed


def test_several_sides_and_batches_from_the_command_line(run, tiny_config, tmp_path):
    out, profile = tmp_path / "infer.json", tmp_path / "profile"
    done = run("tools/benchmark.py", "infer", "--config-file", tiny_config, *SIDES, "--dtype", "float32", "--dtype",
               "bfloat16", "--batch", 1, "--batch", 2, "--no-memory", "--profile", profile, "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    cases = results.read(out)["cases"]
    assert [(case["work"]["batch"], case["dtype"]) for case in cases] == list(
        itertools.product((1, 2), ("float32", "bfloat16"))
    )
    assert "post_processing" in done.stdout and "% of" in done.stdout
    traces = sorted(profile.glob("*.json"))
    assert len(traces) == 4 and json.loads(traces[0].read_text())["traceEvents"]
    table = profile.joinpath("infer_R-18-FPN_96x96_batch_2_float32_synthetic_rank_0.txt").read_text()
    assert len([line for line in table.splitlines() if re.search(r"\d%", line)]) == 10


def test_real_data_do_not_claim_constant_work(cfg, shapes):
    for kind in ("train", "infer"):
        case = measured(cfg, kind, data="real")
        assert case["work"]["data"] == "real" and not case["work"]["constant"]
        assert "mask_head_rois" not in case["work"] and case["metrics"]["mfu"]["p50"] > 0
        assert case["name"].endswith("real")
        lines = "\n".join(runs.summary({"cases": [case], "ratios": []}))
        assert "not constant" in lines


def test_the_loader_alone(cfg, shapes, monkeypatch):
    case = loading.run(cfg, get_device("cpu"), 2, 1)
    stages = ("read_ms", "transform_ms", "collate_ms", "copy_ms")
    assert set(stages) < set(case["metrics"]) and case["metrics"]["images_per_second"]["p50"] > 0
    assert case["work"]["images"] == 12
    assert "read" in "\n".join(loading.summary(case))
    assert case["metrics"]["data_wait_share"]["p50"] > 0.9  # there is nothing but the wait
    assert case["metrics"]["max_memory_mb"]["p50"] > 0 and len(case["clocks"][0]) == 2
    monkeypatch.setattr(loading, "collate", sleepy(loading.collate))
    assert_slept_in(loading.run(cfg, get_device("cpu"), 6, 1)["metrics"], "collate_ms")


def test_the_loader_on_drawn_images_is_the_same_work_each_time(cfg):
    first, second = (loading.run_synthetic(cfg, get_device("cpu"), 1, 1, 5, (64, 96)) for _ in range(2))
    assert first["work"] == {"data": "synthetic", "constant": True, "batch": 2, "images": 5, "image": [64, 96]}
    assert first["name"] == "data synthetic 64x96 batch 2 workers 0"
    for fact in ("work", "config_sha256", "config", "warmup"):
        assert first[fact] == second[fact]  # the temporary place is not part of it


def test_evaluation_with_both_engines():
    pytest.importorskip("hotcoco")
    cases = scoring.run(6, 20, scoring.ENGINES, repeats=2, warmup=0)
    assert [case["name"].split()[1:3] for case in cases] == [
        [task, engine] for task in scoring.TASKS for engine in scoring.ENGINES
    ]
    for case in cases:
        assert case["work"] == {"images": 6, "detections": 120, "objects": 42}
        assert 0 < case["scores"]["AP"] < 1 and len(case["metrics"]["eval_seconds"]["samples"]) == 2
        assert {"init_seconds", "compile_seconds", "max_memory_mb"} < set(case["metrics"]) and case["clocks"]


def test_engines_that_disagree_are_not_timed():
    scoring.check_same({"a": {"bbox": {"AP": 0.5, "APs": None}}, "b": {"bbox": {"AP": 0.5 + 1e-9, "APs": None}}})
    with pytest.raises(UserError, match=r"AP is 0\.5 with a, 0\.6 with b"):
        scoring.check_same({"a": {"bbox": {"AP": 0.5}}, "b": {"bbox": {"AP": 0.6}}})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--size", "8"], "at least 32"),
        (["train", "--size", "axb"], "--size"),
        (["train", "--config-file", "/no/such.yaml"], "/no/such.yaml"),
        (["train", "--positives", "900"], "1 to 128"),
        (["train", "--out", "/no/such/directory/x.json"], "there is no directory"),
        (["infer", "--dtype", "int8"], "invalid choice"),
        (["train", "SOLVER.BASE_LRR", "1"], "SOLVER.BASE_LR"),
        (["eval", "--engine", "mine"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_one_line(run, arguments, words):
    done = run("tools/benchmark.py", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr


def test_what_disturbed_a_measurement_is_told():
    before = {"mhz": 2000.0, "heat_throttles": None, "quota_throttled_ms": 5.0, "stolen_ms": 10.0, "contended_ms": 0.0}
    after = before | {"mhz": 1000.0, "stolen_ms": 30.0, "contended_ms": 0.4}
    assert environment.disturbances(before, after) == "stolen_ms 20"
    assert environment.disturbances({}, {}) == ""


def test_loader_beside_its_peers(run, coco_mini, tmp_path):
    keys = ("DATA.PATH", coco_mini, "DATASETS.TRAIN", "('coco_2017_train',)", "INPUT.MIN_SIZE_TRAIN", "(64,)")
    command = ("tools/benchmark.py", "data", "--against", "torchvision", "--against", "detectron2", "--batch", 4)
    config = ("--config-file", "configs/e2e_mask_rcnn_R_50_FPN_1x.yaml", "--steps", 2, "--warmup", 1)
    done = run(*command, *config, "--out", tmp_path / "a.json", *keys)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads((tmp_path / "a.json").read_text())["cases"]
    assert {name: len(value["samples"]) for name, value in case["metrics"].items()} == {
        f"{side}_images_per_second": 2 for side in ("ours", "torchvision", "detectron2")
    }
    assert set(case["ratios"]) == {"torchvision", "detectron2"} and "times as fast" in done.stdout
    done = run(*command, *config, *keys, "INPUT.HORIZONTAL_FLIP_PROB_TRAIN", "0.25")
    assert done.returncode == 2 and "HORIZONTAL_FLIP_PROB_TRAIN 0.5" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "words"),
    [(RETINANET, "RETINANET_ON"), ([*KEYPOINTS, "MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES", "5"], "--data real")],
)
def test_detectors_that_are_not_measured_are_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        runs.run(request_of(get_config(SMALL, [*overrides, "MODEL.MASK_ON", "False"]), "train"), get_device("cpu"))


@pytest.mark.parametrize("overrides", [RETINANET, ["MODEL.RPN_ONLY", "True"]])
def test_detectors_without_rois_are_measured_in_inference(overrides):
    """RetinaNet detects something, and the proposals of an RPN alone are the fixed ones."""
    case = measured(get_config(SMALL, [*TINY, *overrides, "MODEL.MASK_ON", "False"]), "infer", phase_steps=1)
    assert case["metrics"]["step_ms"]["p50"] > 0 and case["metrics"]["flop"]["p50"] > 0
    assert case["work"]["mask_head_rois"] == 0
