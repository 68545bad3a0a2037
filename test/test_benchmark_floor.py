"""What `benchmark.py floor` counts: single operators worked by hand, and a whole step's FLOP against flops.py."""

import json
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from maskrcnn_benchmark import ops
from maskrcnn_benchmark.benchmark import flops, traffic
from maskrcnn_benchmark.benchmark.roofline import Roof
from maskrcnn_benchmark.benchmark.traffic import Step
from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.device import cuda, get_device
from maskrcnn_benchmark.errors import UserError
from maskrcnn_benchmark.ops.library import assume_kernels
from maskrcnn_benchmark.ops.roi_align import roi_align

SIZE = (128, 128)
ROOF = Roof(7, {"float32": 2000})


def counted(function, bias_apart=False):
    """[(operator, bytes, FLOP)] of what the function calls, in no order."""
    with traffic.Count(bias_apart=bias_apart, phase="forward") as count:
        function()
    return sorted((k.operator, k.least.bytes // 4, k.least.flop) for k in count.kernels.elements())  # of float32 values


def test_a_convolution_with_bias_and_relu():
    """1 x 4 x 8 x 8 -> 6 channels: 256 values in, 6 x 4 x 9 weights, 384 values out of 36 products each."""
    x, weight, bias = torch.zeros(1, 4, 8, 8), torch.zeros(6, 4, 3, 3), torch.zeros(6)
    step = lambda: F.relu_(F.conv2d(x, weight, bias, padding=1))  # noqa: E731
    relu = ("relu_", 384 + 384, None)
    assert counted(step) == [("convolution", 256 + 216 + 6 + 384, 2 * 384 * 36), relu]
    bias_pass = ("convolution: bias", 384 + 6 + 384, None)
    assert counted(step, bias_apart=True) == [("convolution", 256 + 216 + 384, 2 * 384 * 36), bias_pass, relu]


def test_a_pointwise_convolution_of_stride_2_touches_a_quarter():
    x, weight = torch.zeros(1, 4, 8, 8), torch.zeros(6, 4, 1, 1)
    assert counted(lambda: F.conv2d(x, weight, stride=2)) == [("convolution", 256 // 4 + 24 + 96, 2 * 96 * 4)]


@pytest.mark.parametrize("bias_apart", [False, True])
def test_only_the_gradients_asked_for(bias_apart):
    """Each reads the gradient of the 384 outputs; the input's the 216 weights, the weights' the 256 inputs."""
    flop = 2 * 384 * 36
    for_input = ("convolution_backward: input", 384 + 216 + 256, flop)
    for_weight = ("convolution_backward: weight", 384 + 256 + 216, flop)
    with_bias = ("convolution_backward: weight", 384 + 256 + 216 + 6, flop)
    for_bias = ("convolution_backward: bias", 384 + 6, None)

    def backward(*wanted):
        x, weight, bias = (
            torch.zeros(shape, requires_grad=name in wanted)
            for name, shape in (("input", (1, 4, 8, 8)), ("weight", (6, 4, 3, 3)), ("bias", (6,)))
        )
        made = F.conv2d(x, weight, bias, padding=1)
        return counted(lambda: made.backward(torch.zeros_like(made)), bias_apart)

    assert for_input in backward("input") and len(backward("input")) == 2  # zeros_like is the other
    assert for_weight in backward("weight") and len(backward("weight")) == 2
    assert for_bias in backward("bias") and len(backward("bias")) == 2
    both = [for_bias, for_weight] if bias_apart else [with_bias]
    assert backward("weight", "bias")[:-1] == both


def test_transposed_convolution():
    """Each of 4 x 8 x 8 inputs meets 6 x 2 x 2 weights."""
    x, weight = torch.zeros(1, 4, 8, 8), torch.zeros(4, 6, 2, 2)
    out = 6 * 16 * 16
    assert counted(lambda: F.conv_transpose2d(x, weight, stride=2)) == [("convolution", 256 + 96 + out, 2 * 256 * 24)]


def test_what_is_expanded_is_read_once_and_what_is_given_twice_too():
    row, table = torch.zeros(1, 7), torch.zeros(5, 7)
    assert counted(lambda: row.expand(5, 7) + table) == [("add", 7 + 35 + 35, None)]
    assert counted(lambda: table * table) == [("mul", 35 + 35, None)]


def test_views_empty_tensors_and_questions_move_nothing():
    x = torch.zeros(4, 6)
    assert not counted(
        lambda: (x[1:].view(2, 9).t().detach(), x.flatten(), torch.empty_like(x), x.new_empty(3), x.device)
    )


@pytest.mark.parametrize(
    ("call", "values"),
    [
        (lambda x, y: x.add_(y), 3 * 24),
        (lambda x, y: x.copy_(y), 2 * 24),
        (lambda x, y: x.fill_(1), 24),
        (lambda x, y: torch.zeros_like(x), 24),
        (lambda x, y: torch.add(x, x, out=y), 2 * 24),
        (lambda x, y: torch._foreach_add_([x, y], 1), 4 * 24),
        (lambda x, y: x.clone(), 2 * 24),
        (lambda x, y: torch.cat([x, y]), 4 * 24),
    ],
)  # fmt: skip
def test_arguments_that_change(call, values):
    x, y = torch.zeros(4, 6), torch.zeros(4, 6)
    ((_, moved, _),) = counted(lambda: call(x, y))
    assert moved == values


def test_gathers_and_scatters_touch_what_they_take():
    """3 of 100 rows of 5 values; an index is 8 bytes, two float32 values."""
    x, rows = torch.zeros(100, 5), torch.tensor([1, 2, 3])
    picked = torch.zeros(3, 5)
    assert counted(lambda: x[rows]) == [("index", 15 + 15 + 6, None)]
    assert counted(lambda: x.gather(0, rows[:, None].expand(3, 5))) == [("gather", 15 + 15 + 6, None)]
    assert counted(lambda: x.index_add_(0, rows, picked)) == [("index_add_", 6 + 15 + 30, None)]
    assert counted(lambda: x.index_put_((rows,), picked)) == [("index_put_", 6 + 15 + 15, None)]
    assert counted(lambda: x.scatter(0, rows[:, None], picked[:, :1])) == [("scatter", 500 + 6 + 3 + 500, None)]


def test_a_fused_update_is_five_passes():
    weight = torch.zeros(10, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    weight.grad = torch.zeros(10)
    optimizer.step()
    assert counted(optimizer.step) == [("_fused_sgd_", 50, None)]


def test_roi_align_reads_the_maps_once_or_four_pixels_a_sample():
    boxes, zero = torch.tensor([[0.0, 0, 8, 8]]), torch.zeros(1, dtype=torch.int64)
    given = 4 + 2  # a box, and its index, which is given twice
    for side, read in ((3, 9), (64, 2 * 2 * 4 * 4)):
        features = [torch.zeros(1, 1, side, side)]
        pool = lambda features=features: roi_align(features, boxes, zero, zero, [1.0], 2, 2, False)  # noqa: E731
        assert counted(pool) == [("roi_align", read + given + 4, None)]


def test_our_kernels_count_as_direct_convolutions():
    x, weight, flop = torch.zeros(1, 32, 8, 8), torch.zeros(64, 32, 3, 3), 2 * 64 * 64 * 32 * 9
    kernels = torch.ops.maskrcnn_benchmark
    grad = torch.zeros(1, 64, 8, 8)
    for call in (
        lambda: kernels.conv3x3(x, weight, None, True),
        lambda: kernels.conv3x3_input_gradient(grad, weight),
        lambda: kernels.conv3x3_weight_gradient(grad, x),
    ):
        assert counted(call)[0][2] == flop
    thin = weight[:, :, 0, 0].contiguous()
    for call in (
        lambda: kernels.pointwise(x, thin, None, None, False),
        lambda: kernels.pointwise_input_gradient(grad, thin),
        lambda: kernels.pointwise_weight_gradient(grad, x),
    ):
        assert counted(call)[0][2] == flop // 9


@pytest.fixture(scope="module")
def cfg():
    return get_config(ROOT / "configs" / "e2e_mask_rcnn_R_18_FPN_small.yaml", ["SOLVER.GRAPH_CAPTURE", "True"])


@pytest.fixture(scope="module")
def cuda_step(cfg):
    return traffic.count(cfg, get_device("cpu"), Step("train", SIZE, 2, torch.bfloat16, 3, "cuda"))


def total(kernels: Counter, **which) -> tuple[int, int]:
    """Bytes and FLOP of the kernels with these attributes."""
    chosen = [(k, n) for k, n in kernels.items() if all(getattr(k, name) == value for name, value in which.items())]
    return sum(n * k.least.bytes for k, n in chosen), sum(n * (k.least.flop or 0) for k, n in chosen)


def test_a_whole_step_has_the_flop_that_are_counted_by_layers(cfg, cuda_step):
    assert total(cuda_step)[1] == flops.training_flops(cfg, SIZE).of(2, 6)
    found = traffic.count(cfg, get_device("cpu"), Step("infer", SIZE, 1, torch.bfloat16, 3))
    assert total(found)[1] == flops.inference_flops(cfg, SIZE).of(1, 100)
    assert {kernel.phase for kernel in found} == {"forward"}


def test_a_whole_step_of_another_device(cfg, cuda_step):
    """What a CUDA build calls: torch's convolutions with a bias pass, our kernels; all five passes of the update."""
    operators = {kernel.operator for kernel in cuda_step}
    assert {"convolution: bias", "convolution_backward: bias", "roi_align", "match", "nms", "gather"} <= operators
    assert not operators & {"conv3x3", "pointwise", "device"}
    model = traffic.sides.fresh_model(cfg, get_device("cpu"))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert total(cuda_step, operator="_fused_sgd_")[0] == pytest.approx(5 * 4 * trained, rel=1e-5)
    assert total(cuda_step, operator="_foreach_linalg_vector_norm")[0] == pytest.approx(4 * trained, rel=1e-3)
    wheres = {(k.phase, k.operator): k.where for k in cuda_step}
    assert re.match(r"ops/roi_align.py:\d+ < models/roi_pool.py:", wheres["forward", "roi_align"])
    assert wheres["backward", "upsample_nearest2d_backward"].startswith("models/fpn.py:")


def test_groups_cover_the_step(cuda_step):
    by_operator = {k.operator: k.group for k in cuda_step if k.phase != "optimizer"}
    for operator, group in {
        "convolution_backward: weight": "convolutions and products",
        "threshold_backward": "passes over maps",
        "convolution: bias": "passes over maps",
        "roi_align_backward": "RoIAlign",
        "_to_copy": "casts, copies, fills",
        "match": "losses, matching, the rest",
    }.items():
        assert by_operator[operator] == group
    assert {k.group for k in cuda_step if k.phase == "optimizer"} == {"update"}
    assert total(cuda_step, group="folding norms into weights")[0]


def test_the_time_is_that_of_the_slower_limit(cuda_step):
    """At 1 GB/s and 1 TFLOP/s: 1 MB is 1 ms, 1 GFLOP is 1 ms."""
    step = Step("train", SIZE, 2, torch.bfloat16, 3, "cuda")
    about = traffic.reckon(cuda_step, step, Roof(1, {"bfloat16": 1000, "float32": 1000}))
    for row in about["rows"]:
        assert row["floor_ms"] == pytest.approx(max(row["bytes"] / 1e6, row["flop"] / 1e9))
        assert row["bound_by"] == ("memory" if row["bytes"] / 1e6 >= row["flop"] / 1e9 else "arithmetic")
    groups = about["groups"].values()
    assert sum(group["floor_ms"] for group in groups) == pytest.approx(about["total"]["floor_ms"])
    assert sum(group["calls"] for group in groups) == cuda_step.total()


def test_the_kernels_that_a_cuda_build_has():
    """A constant, for a build without CUDA knows of none."""
    registered = set()
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        for block in re.findall(r"KERNELS\(CUDA, m\) \{(.*?)\n\}", source.read_text(), re.S):
            registered |= set(re.findall(r'm\.impl\("(\w+)"', block))
    assert registered == cuda.KERNELS


def test_assumed_kernels_hold_only_inside():
    before = ops.kernel_in_use("conv3x3", "cpu")
    with assume_kernels({"nms"}):
        assert ops.kernel_in_use("nms", "cpu") == "native"
        assert ops.kernel_in_use("conv3x3", "cpu") == "composite"
    assert ops.kernel_in_use("conv3x3", "cpu") == before


def test_the_command(run, tiny_config, tmp_path):
    out = tmp_path / "floor.json"
    done = run("tools/benchmark.py", "floor", "--kernels", "cuda", "--tflops", 2, "--bandwidth", 10, "--size", "97x96",
               "--batch", 3, "--positives", 4, "--config-file", tiny_config, "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["step"]["size"] == [128, 96]  # padded as by the loader
    assert found["step"]["kernels"] == "cuda"
    milliseconds = sum(row["floor_ms"] for row in found["rows"])
    assert found["total"]["floor_ms"] == pytest.approx(milliseconds)
    assert f"{milliseconds:.2f} ms a step at least, {3000 / milliseconds:.1f} images/s at most" in done.stdout
    assert {"phase", "operator", "group", "dtype", "shapes", "where", "calls", "bytes"} <= set(found["rows"][0])


def test_rates_that_are_not_given_are_measured(benchmark_tool, tiny_config, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        benchmark_tool.roofline, "measure_roof", lambda device, dtypes: asked.append((device.type, dtypes)) or ROOF
    )
    arguments = [
        "--kind",
        "infer",
        "--device",
        "cpu",
        "--size",
        "96x96",
        "--config-file",
        str(tiny_config),
        "--markdown",
    ]
    for given, words in (
        ([], "at 2 TFLOP/s and 7 GB/s"),
        (["--tflops", "3"], "at 3 TFLOP/s and 7 GB/s"),
        (["--bandwidth", "5"], "at 2 TFLOP/s and 5 GB/s"),
    ):
        monkeypatch.setattr("sys.argv", ["benchmark.py", "floor", *arguments, *given])
        assert benchmark_tool.main() == 0
        printed = capsys.readouterr().out
        assert words in printed and "|---|" in printed
    assert asked == [("cpu", {torch.float32})] * 3


def test_errors_are_one_line(run, benchmark_tool, monkeypatch, capsys):
    for arguments, words in (
        (["--size", "12"], "at least 32"),
        (["--size", "wide"], "invalid image_size value"),
        (["--bandwidth", "0"], "must be above 0"),
    ):
        monkeypatch.setattr("sys.argv", ["benchmark.py", "floor", *arguments])
        with pytest.raises(SystemExit, match="2"):
            benchmark_tool.main()
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    monkeypatch.setattr("sys.argv", ["benchmark.py", "floor", "--positives", "1000"])
    with pytest.raises(UserError, match="the configuration samples 1 to"):
        benchmark_tool.main()
    done = run("tools/benchmark.py", "floor", "--kernels", "bogus")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "invalid choice: 'bogus'" in line
