"""Which implementation serves an operator, and what happens when the compiled kernels are missing or broken."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from maskrcnn_benchmark import ops
from maskrcnn_benchmark.errors import DeviceError
from maskrcnn_benchmark.ops import library

OPERATORS = [
    *("nms", "match", "box_encode", "box_decode", "box_decode_backward", "roi_align", "roi_align_backward"),
    *("polygon_targets", "paste_masks_rle", "soft_nms", "distance_nms", "deform_conv2d", "deform_conv2d_backward"),
    *("sigmoid_focal_loss", "sigmoid_focal_loss_backward", "proposals", "compress_rle", "rle_areas"),
    "epilogue_",
]
# With a kernel for CPUs that have AVX-512 with bfloat16
AVX512 = ["conv3x3", "conv3x3_input_gradient", "conv3x3_weight_gradient"]
# And without AMX
WITHOUT_AMX = ["pointwise", "pointwise_input_gradient", "pointwise_weight_gradient"]
FLAGS = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
HAS_AVX512 = "avx512_bf16" in FLAGS
LACKS_AMX = HAS_AVX512 and "amx_bf16" not in FLAGS
NMS = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from maskrcnn_benchmark import ops
print(ops.kernel_in_use("nms", "cpu"))
for _ in range(2):
    print(ops.nms.nms_indices(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5).tolist())
"""
EXTENSION = next((ROOT / "maskrcnn_benchmark").glob("_C*.so"), None)
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="the compiled kernels are not built")


def run_nms(mode: str, directory=ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", NMS]
    environment = {"MASKRCNN_KERNELS": mode, "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture
def without_extension(tmp_path):
    """A copy of the package that has no compiled kernels."""
    target = tmp_path / "maskrcnn_benchmark"
    target.mkdir()
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "maskrcnn_benchmark" / name, target)
    shutil.copytree(ROOT / "maskrcnn_benchmark" / "ops", target / "ops")
    return tmp_path


@needs_extension
@pytest.mark.skipif(library._MODE == "composite", reason="MASKRCNN_KERNELS=composite")
@pytest.mark.parametrize("op", OPERATORS)
def test_every_operator_has_a_cpu_kernel(op):
    assert ops.kernel_in_use(op, "cpu") == "native"


@needs_extension
@pytest.mark.skipif(library._MODE == "composite", reason="MASKRCNN_KERNELS=composite")
@pytest.mark.parametrize("op", [*AVX512, *WITHOUT_AMX])
def test_convolution_has_a_kernel_where_the_processor_can_run_it(op):
    served = HAS_AVX512 if op in AVX512 else LACKS_AMX
    assert ops.kernel_in_use(op, "cpu") == ("native" if served else "composite")


@pytest.mark.parametrize("op", [*OPERATORS, *AVX512, *WITHOUT_AMX])
def test_every_operator_has_a_composite_for_the_other_devices(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"maskrcnn_benchmark::{op}", "CompositeExplicitAutograd")
    assert ops.kernel_in_use(op, "mps") == "composite"


def test_an_unknown_operator_is_an_error():
    with pytest.raises(DeviceError, match="no operator maskrcnn_benchmark::bogus"):
        ops.kernel_in_use("bogus", "cpu")


def test_composite_mode_never_loads_the_kernels():
    result = run_nms("composite")
    assert result.stdout.split() == ["composite", "[0]", "[0]"], result.stderr
    assert result.stderr.count("nms on cpu: composite kernel") == 1


@needs_extension
def test_native_mode_uses_the_kernels():
    assert run_nms("native").stdout.split() == ["native", "[0]", "[0]"]


def test_without_an_extension_auto_takes_composites_and_native_is_an_error(without_extension):
    result = run_nms("auto", without_extension)
    assert result.stdout.split() == ["composite", "[0]", "[0]"], result.stderr
    assert "Warning" not in result.stderr
    result = run_nms("native", without_extension)
    assert result.returncode != 0
    assert "DeviceError: MASKRCNN_KERNELS=native, but nms has no compiled kernel for cpu" in result.stderr


@needs_extension
def test_a_broken_extension_is_a_warning_or_in_native_mode_an_error(without_extension):
    # As if built for another torch: the names of its functions are not those of this one.
    foreign = EXTENSION.read_bytes().replace(b"_ZN3c10", b"_ZN9c10")
    (without_extension / "maskrcnn_benchmark" / EXTENSION.name).write_bytes(foreign)
    result = run_nms("auto", without_extension)
    assert result.stdout.split() == ["composite", "[0]", "[0]"], result.stderr
    assert result.stderr.count("RuntimeWarning: the compiled kernels maskrcnn_benchmark._C do not load") == 1
    assert "pip install --no-build-isolation -e ." in result.stderr
    result = run_nms("native", without_extension)
    assert result.returncode != 0
    assert "DeviceError: the compiled kernels" in result.stderr


@needs_extension
def test_kernels_of_other_sources_are_a_warning_or_in_native_mode_an_error(without_extension):
    """As after an update without a build: an operator has another schema. None of them stays registered."""
    package = without_extension / "maskrcnn_benchmark"
    shutil.copy(EXTENSION, package)
    source = package / "ops" / "soft_nms.py"
    source.write_text(source.read_text().replace("soft_nms(Tensor boxes,", "soft_nms(Tensor further, Tensor boxes,", 1))
    result = run_nms("auto", without_extension)
    assert result.stdout.split() == ["composite", "[0]", "[0]"], result.stderr
    message = "doesn't match the expected function schema. operator: maskrcnn_benchmark::soft_nms"
    assert result.stderr.count(message) == 1 and "rebuild them: pip install" in result.stderr
    result = run_nms("native", without_extension)
    assert result.returncode == 1 and message in result.stderr.splitlines()[-1]


def test_an_unknown_mode_is_an_error():
    assert "ConfigError: MASKRCNN_KERNELS='fast' is not known" in run_nms("fast").stderr


@pytest.fixture
def build(tmp_path):
    """`build(KEY=value)`: setup.py on a copy of the sources, where there is no compiler, with this environment."""
    (tmp_path / "maskrcnn_benchmark").mkdir()
    shutil.copy(ROOT / "maskrcnn_benchmark" / "__init__.py", tmp_path / "maskrcnn_benchmark")
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")

    def call(**environment: str) -> subprocess.CompletedProcess:
        environment = {"CXX": "/no/compiler", "CC": "/no/compiler", "PATH": "/no", **environment}
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)

    return call


@pytest.mark.parametrize("required", ["0", "1"])
def test_a_build_without_a_compiler_warns_or_where_kernels_are_required_stops(build, required):
    result = build(MASKRCNN_REQUIRE_EXT=required)
    assert (result.returncode == 0) == (required == "0"), result.stderr
    lines = [line for line in result.stderr.splitlines() if "compiled kernels" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: " if required == "1" else "warning: ")


@pytest.mark.parametrize("forced", ["0", "1"])
def test_a_toolkit_of_another_cuda_is_told_and_where_cuda_is_forced_stops_the_build(build, tmp_path, forced):
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 1.0, V1.0.0'\n")
    nvcc.chmod(0o755)
    result = build(FORCE_CUDA=forced, CUDA_HOME=str(tmp_path / "toolkit"))
    assert (result.returncode == 0) == (forced == "0"), result.stderr
    lines = [line for line in result.stderr.splitlines() if "torch is " in line]
    if torch.version.cuda is None:
        wanted = [
            "error: maskrcnn_benchmark: FORCE_CUDA=1, but torch is a build without CUDA; install a CUDA build of torch"
        ]
        assert lines == (wanted if forced == "1" else [])
    else:
        (line,) = lines
        told = "FORCE_CUDA=1, but" if forced == "1" else "no CUDA kernels:"
        start = f"{'error' if forced == '1' else 'warning'}: maskrcnn_benchmark: {told} "
        assert line.startswith(f"{start}torch is built for CUDA {torch.version.cuda}, and the toolkit at ")
        assert "/toolkit is 1.0; set CUDA_HOME" in line
