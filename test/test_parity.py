"""tools/parity.py: that sound kernels pass, and that faults are found and named."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ROOT
from torch import nn

from maskrcnn_benchmark.benchmark import parity, parity_step
from maskrcnn_benchmark.benchmark.parity_cases import Case
from maskrcnn_benchmark.benchmark.parity_compare import (
    Operators,
    Side,
    by_name,
    difference,
    full_float32,
    judge,
    judge_equality,
    tolerance,
)
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.errors import ConfigError, DeviceError
from maskrcnn_benchmark.models import resnet
from maskrcnn_benchmark.ops import library, matching, roi_align

CPU = get_device("cpu")
FLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64
LABEL = ("ops", "a case", "float32")

pytestmark = pytest.mark.skipif(library._MODE == "native", reason="parity needs the composites")

# Kernels that registering on a free dispatch key makes the CPU's own, each with one well-known fault; then the tool.
FAULTS = """
import runpy, sys, torch
import torch.nn.functional as F
from maskrcnn_benchmark.ops import box_coder, matching, nms, roi_align

kernels = torch.library.Library("maskrcnn_benchmark", "IMPL")
one = torch.tensor([0.0, 0, 1, 1])

def flipped(*x):
    return roi_align.roi_align_composite(*x[:-1], not x[-1])

def truncating(boxes, scores, groups, valid, threshold, most):
    index, keep = nms.nms_composite(boxes, scores, groups, valid, threshold, most)
    return index, keep & (torch.arange(most) < 500)

def plus_one(boxes, anchors, weights):
    return box_coder.encode_composite(boxes + one, anchors + one, weights)

def sloppy(*x):
    return 1.01 * box_coder.decode_backward_composite(*x)

def raising(*x):
    raise RuntimeError("error 507018: the kernel is not in this CANN release\\nsecond line")

for name, fault in (("roi_align", flipped), ("nms", truncating), ("box_encode", plus_one),
                    ("box_decode_backward", sloppy), ("polygon_targets", raising)):
    kernels.impl(name, fault, "CPU")

smooth_l1 = F.smooth_l1_loss
F.smooth_l1_loss = lambda x, *y, **z: smooth_l1(x, *y, **z) * (1 if x.dtype == torch.float64 else 1.01)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """The report on a device with five wrong kernels and a wrong loss, its process, and the table it printed."""
    directory = tmp_path_factory.mktemp("parity")
    (directory / "faults.py").write_text(FAULTS)
    tool = [str(ROOT / "tools" / "parity.py"), "--device", "cpu", "--dtype", "float32", "--only", "ops", "losses"]
    command = [sys.executable, str(directory / "faults.py"), *tool, "--json", str(directory / "new" / "parity.json")]
    environment = {
        "MASKRCNN_KERNELS": "composite",
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    return done, json.loads((directory / "new" / "parity.json").read_text())


def lines_of(report, text):
    return [line for line in report["results"] if text in line["case"]]


def test_faults_are_found_named_and_nothing_else(faulty):
    done, report = faulty
    assert done.returncode == 1, done.stderr
    wrong = {(line["case"].split(",")[0], line["quantity"]) for line in report["results"] if line["verdict"] != "ok"}
    assert wrong == {
        ("roi_align aligned", "values"),
        ("roi_align not aligned", "values"),
        ("bitmap_targets (roi_align of uint8)", "values"),
        ("nms 3", "equality"),
        ("box_encode", "values"),
        ("box_decode", "gradient"),
        ("polygon_targets 40 boxes", "values"),
        ("RPN objectness and box", "values"),
        ("RPN objectness and box", "gradient"),
        ("box head: classification and box", "values"),
        ("box head: classification and box", "gradient"),
        ("box head", "values"),
        ("box head", "gradient"),
        ("mask", "values"),
    }
    assert report["summary"] == {
        verdict: sum(line["verdict"] == verdict for line in report["results"]) for verdict in ("ok", "beyond", "error")
    }
    assert report["environment"]["torch"] == torch.__version__


def test_a_flipped_aligned_and_a_plus_one_are_called_by_name(faulty):
    done, report = faulty
    aligned = [line for line in lines_of(report, "roi_align aligned") if line["quantity"] == "values"]
    assert {line["note"] for line in aligned} == {"it is the result of aligned=False (the flag is flipped)"}
    assert lines_of(report, "box_encode")[0]["note"] == 'it is the result of boxes with the legacy "+1"'
    table = done.stdout.splitlines()
    assert any("roi_align aligned" in line and "beyond" in line and "flag is flipped" in line for line in table)


def test_a_truncating_nms_says_how_much_is_missing(faulty):
    (line,) = lines_of(faulty[1], "3,000 spread boxes")
    assert line["verdict"] == "beyond" and line["max_abs"] > 1000
    assert line["note"] == f"{line['max_abs']} of 6000 elements differ"


def test_a_case_that_raises_is_a_line_and_the_others_go_on(faulty):
    done, report = faulty
    line = lines_of(report, "polygon_targets")[0]
    assert (line["verdict"], line["max_abs"]) == ("error", None)
    assert line["note"] == "RuntimeError: error 507018: the kernel is not in this CANN release"
    assert lines_of(report, "paste_masks_rle")[0]["verdict"] == "ok"
    assert done.stderr == ""


def test_the_kernel_that_served_is_told(faulty):
    nms = [line for line in lines_of(faulty[1], "nms") if line["case"].startswith("nms")]  # not soft_nms
    assert {kernel for line in nms for kernel in line["kernels"].values()} == {"native"}
    assert lines_of(faulty[1], "box_decode")[0]["kernels"] == {
        "box_decode": "composite",
        "box_decode_backward": "native",
    }
    assert "served by composites: " in faulty[0].stdout.splitlines()[-1]


def test_sound_kernels_are_within_tolerance():
    results = parity.run(CPU, [FLOAT], groups=("ops", "losses"))
    assert {result.verdict for result in results} == {"ok"}, parity.format_table(results)
    names = " ".join(result.case for result in results)
    for part in ("roi_align", "nms", "match", "box_encode", "box_decode", "polygon_targets", "paste_masks_rle", "RPN"):
        assert part in names
    # The reference is another computation, not the same one twice.
    assert all(result.max_abs > 0 for result in results if result.case.startswith("roi_align"))


def test_layers_in_bfloat16_are_within_tolerance():
    results = parity.run(CPU, [HALF], groups=("layers",))
    assert {result.verdict for result in results} == {"ok"}, parity.format_table(results)
    assert max(result.relative for result in results) > 1e-3  # bfloat16 was in use


def test_native_kernels_agree_with_the_composites():
    results = parity.run(CPU, [FLOAT, HALF], against="composite", groups=("ops",), name="box_")
    assert {result.verdict for result in results} == {"ok"}
    assert {result.dtype for result in results} == {"float32", "bfloat16"}


def test_operators_in_float64():
    results = parity.run(CPU, [DOUBLE], groups=("ops",), name="sampling 2, 48 boxes")
    assert {result.verdict for result in results} == {"ok"}
    assert max(result.relative for result in results) < 1e-12


class HalvedSGD(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] /= 2
        super().step(closure)


def test_a_step_without_compaction_and_a_wrong_optimizer():
    device = replace(CPU, compacts=False, optimizers={"SGD": HalvedSGD})
    results = {result.case: result for result in parity.run(device, [FLOAT], groups=("step",))}
    assert results.pop("optimizer SGD, three steps").verdict == "beyond"
    results.pop("parameters after the step")
    assert {result.verdict for result in results.values()} == {"ok"}
    losses = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
    assert losses < results.keys()
    gradients = [name for name in results if name.startswith("gradient ")]
    assert "gradient backbone.body.layer4.2.conv3.weight" in gradients and len(gradients) == 80
    assert {"proposals in test mode", "detections in test mode"} < results.keys()


def test_a_wrong_layer_shows_in_the_gradients(monkeypatch):
    right = resnet.conv_norm

    def wrong(*inputs, **options):
        out = right(*inputs, **options)
        return out if out.dtype == DOUBLE else out * 1.01

    monkeypatch.setattr(resnet, "conv_norm", wrong)
    results = parity.run(CPU, [FLOAT], groups=("step",))
    wrong = {result.case for result in results if result.verdict == "beyond"}
    assert {"loss_objectness", "gradient backbone.body.layer3.0.conv1.weight", "proposals in test mode"} & wrong
    assert "gradient backbone.body.layer3.0.conv1.weight" in wrong
    assert "optimizer SGD, three steps" not in wrong
    shown = parity.format_table(results)
    assert all(name in shown for name in wrong)


def test_tolerance_by_hand():
    eps, half = 2.0**-23, 2.0**-7
    assert tolerance(FLOAT, depth=4, condition=10) == pytest.approx(4 * (2 * eps + 10 * eps))
    assert tolerance(HALF, depth=9, condition=100) == pytest.approx(4 * (3 * half + 100 * eps))
    assert tolerance(HALF, depth=1, condition=0, gates=2) == pytest.approx(4 * half + math.sqrt(half))
    assert tolerance(FLOAT, depth=1, condition=1, sides=2) == pytest.approx(16 * eps)
    assert tolerance(DOUBLE, depth=1, condition=1) == pytest.approx(8 * 2.0**-52)


def test_difference_by_hand():
    wanted = torch.tensor([3.0, -4.0, 0.0])
    found = difference("x", torch.tensor([3.0, -4.0, 0.5]), wanted)
    assert (found.max_abs, found.relative) == (0.5, 0.125)
    found = difference("x", torch.tensor([3.0, -4.0, 0.5]), wanted, mean_square=True)
    assert (found.max_abs, found.relative) == (0.5, pytest.approx(0.1))
    assert difference("x", wanted, wanted).relative == 0
    assert difference("x", torch.zeros(2), torch.zeros(2)).relative == 0
    assert difference("x", torch.ones(2), torch.zeros(2)).relative == math.inf


@pytest.mark.parametrize("got", [torch.ones(3), torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf])])
def test_another_shape_or_a_nan_is_beyond_every_tolerance(got):
    result = judge(LABEL, "values", {}, {"output": (got, torch.ones(2))}, limit=1e9)
    assert (result.verdict, result.max_abs) == ("beyond", None)
    assert result.note == "output: another shape, or finite on one side alone"


def test_integers_must_be_equal():
    three, other = torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3])
    result = judge_equality(LABEL, {}, {"index": (other, three), "offsets": (three[:2], three)})
    assert (result.verdict, result.max_abs, result.tolerance) == ("beyond", 4, 0)
    assert result.note == "4 of 6 elements differ"
    assert judge_equality(LABEL, {}, {"index": (three, three.clone())}).verdict == "ok"


def test_the_reference_is_the_composite_in_float64():
    inputs = ([torch.randn(1, 2, 8, 8)], torch.tensor([[1.0, 2, 20, 30]]), *torch.zeros(2, 1, dtype=torch.int64))
    doubled = [inputs[0][0].double()]
    with Operators(Side(CPU, DOUBLE, composite=True)) as operators:
        pooled = roi_align.roi_align(doubled, *inputs[1:], [0.25], 3, 2, True)
        assert pooled.float().dtype == DOUBLE
        keys = torch.rand(5)
    wanted = roi_align.roi_align_composite(doubled, inputs[1].double(), *inputs[2:], [0.25], 3, 2, True)
    assert torch.equal(pooled, wanted) and operators.kernels() == {"roi_align": "composite"}
    with Operators(Side(CPU, FLOAT)) as operators:
        assert torch.equal(torch.rand(5), keys)  # every side draws the same
        assert pooled.float().dtype == FLOAT
    assert operators.kernels() == {}


def test_the_reference_matches_in_float32():
    third = torch.tensor(1 / 3, dtype=DOUBLE)
    gt = torch.tensor([[[0.0, 0, 3, 3]]], dtype=DOUBLE)
    anchors = torch.tensor([[0, 0, third, 3], [0, 0, third.float(), 3]], dtype=DOUBLE)  # a tie in float32 alone
    arguments = (gt, torch.ones(1, 1, dtype=torch.bool), anchors, 0.7, 0.3, True)
    assert matching.match(*arguments)[1].sum() == 1
    with Operators(Side(CPU, DOUBLE, composite=True)):
        assert matching.match(*arguments)[1].tolist() == [[1, 1]]


def test_a_gradient_that_one_side_lacks_is_beyond():
    def detached(x):
        return x if x.dtype == DOUBLE else x.detach()

    case = Case("ops", "a case", lambda x: {"a": 2 * detached(x), "b": x}, floats=(torch.ones(3),))
    results = parity.compare_case(case, FLOAT, CPU, "cpu")
    assert [(r.quantity, r.verdict) for r in results] == [("values", "ok"), ("gradient", "beyond")]


def test_boxes_are_compared_as_sets():
    def found(*boxes):
        boxes = torch.tensor([boxes], dtype=FLOAT)
        return parity_step.Proposals(boxes, torch.ones(boxes.shape[:2]), boxes.sum(-1) > 0)

    a, b, padding = (0.0, 0, 5, 5), (1.0, 2, 9, 9), (0.0, 0, 0, 0)
    judged = partial(parity_step.judge_boxes, "proposals", FLOAT, {})
    assert judged(found(a, b), found(b, a)).verdict == "ok"
    assert judged(found(a, b), found(a, padding)).note == "1 of 3 boxes have no counterpart"
    assert judged(found(padding, padding), found(a, b)).max_abs == 2
    assert judged(found(padding), found(padding)).verdict == "ok"


def test_the_table_hides_gradients_that_are_well():
    def line(name, relative, verdict="ok"):
        kernels = {"nms": "native", "match": "composite"}
        return parity.Result("step", name, "float32", "gradient", kernels, 1.0, relative, 0.5, verdict)

    results = [line(f"gradient {n}", n / 100) for n in range(10)] + [line("gradient bad", 0.9, "beyond")]
    table = parity.format_table(results).splitlines()
    assert [text.split()[2] for text in table[1:-1]] == ["7", "8", "9", "bad"]
    assert table[-1] == "... and 7 gradients of the step within tolerance"
    assert "composite+native" in table[1]


def test_full_float32_is_for_the_time_being():
    before = (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())
    torch.set_float32_matmul_precision("high")
    try:
        with full_float32():
            assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (False, "highest")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before[1])
    assert torch.backends.cudnn.allow_tf32 == before[0]


def test_by_name():
    one, two = torch.ones(1), torch.ones(2)
    assert by_name(one) == {"output": one}
    assert list(by_name((one, two))) == ["output 0", "output 1"]
    assert list(by_name({"a": one})) == ["output a"]


def test_a_dtype_that_the_device_does_not_take_is_an_error():
    with pytest.raises(DeviceError, match="dtype float16 is not for device cpu; it takes float32, bfloat16"):
        parity.run(CPU, [torch.float16], groups=("ops",))


def test_native_mode_leaves_no_reference(monkeypatch):
    monkeypatch.setattr(library, "_MODE", "native")
    with pytest.raises(ConfigError, match="MASKRCNN_KERNELS=native"):
        parity.run(CPU, [FLOAT], groups=("ops",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "unknown or missing device 'abacus'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--device", "cpu", "--only", "ops", "--case", "bogus"], "no case of ops in float32 bfloat16 has 'bogus'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(run, arguments, message):
    done = run("tools/parity.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_tool_passes_a_sound_device(run, tmp_path):
    file = tmp_path / "parity.json"
    done = run("tools/parity.py", "--device", "cpu", "--only", "ops", "--case", "match", "--json", file)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # nobody watches: no progress
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["group", "ops", "ops", "cpu"]
    report = json.loads(file.read_text())
    assert report["summary"] == {"ok": 2, "beyond": 0, "error": 0}
    assert report["against"] == "cpu" and report["environment"]["device"] == "cpu"


def test_a_model_of_ones_own(tmp_path, tiny_config):
    from maskrcnn_benchmark.config import get_config

    results = parity.run(CPU, [FLOAT], groups=("step",), config=get_config(tiny_config))
    assert {result.verdict for result in results} == {"ok"}, parity.format_table(results)
    assert any(result.case == "optimizer AdamW, three steps" for result in results)


def test_modules_keep_their_state():
    """A case's module serves every dtype and both sides."""
    module = nn.BatchNorm2d(3)
    case = Case("layers", "BN", nn.Module.__call__, (torch.randn(2, 3, 4, 4),), module=module, condition=8)
    for dtype in (FLOAT, HALF):
        assert all(r.verdict == "ok" for r in parity.compare_case(case, dtype, CPU, "cpu"))
    assert module.num_batches_tracked == 0 and module.weight.dtype == FLOAT and module.weight.grad is None
