"""The CUDA kernels: they compile for every architecture, and agree with the CPU's kernels, emulated on the CPU and on a
CUDA device where there is one.

MASKRCNN_TEST_THOROUGH=1 compiles every source for all architectures, host code included, and runs the emulated kernels
under AddressSanitizer, too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from kernel_cases import CASES, Case

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
EMULATOR = ROOT / "test" / "cuda_emulator"
ARCHITECTURES = ["75", "80", "90", "100"]
ORDERS = ["forward", "reverse", "random"]
THOROUGH = os.environ.get("MASKRCNN_TEST_THOROUGH") == "1"
CXX = shutil.which("g++")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
TORCH = Path(torch.__file__).parent
INCLUDE = [
    *(f"-I{TORCH / 'include'}", f"-I{TORCH / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"),
    f"-I{sysconfig.get_paths()['include']}",
]
# Tests that expect of a kernel what only the CPU's can do: it looks at offsets, where a device would have to wait.
NOT_FOR_DEVICES = "not offsets_beyond_the_points_are_an_error"

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no CUDA toolkit: nvcc is not found")
needs_emulator = pytest.mark.skipif(
    CXX is None or sys.platform != "linux", reason="the emulator of CUDA needs g++ on Linux"
)


def execute(command: list, **environment: str) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "timeout": 1200, "cwd": ROOT}
    return subprocess.run(list(map(str, command)), env={**os.environ, **environment}, **options)


def checked(command: list, **environment: str) -> subprocess.CompletedProcess:
    result = execute(command, **environment)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout[-4000:]}\n{result.stderr[-8000:]}"
    return result


def assert_agree(ours: list, expected: list, case: Case) -> None:
    """Whole numbers and truth values must be equal; floats differ by the order of sums and the last digit of exp."""
    assert len(ours) == len(expected)
    half = any(t.dtype in (torch.float16, torch.bfloat16) for t in expected)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if half else {"rtol": 1e-4, "atol": 1e-4}
    for a, b in zip(ours, expected):
        exact = not b.is_floating_point()
        torch.testing.assert_close(a.to(b), b, equal_nan=True, **({"rtol": 0, "atol": 0} if exact else tolerance))


def name_of(case: Case) -> str:
    return f"{case.operator}{'-deterministic' if case.deterministic else ''}"


# The sources compile.


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[Path, Future]:
    """The compilations, running on all cores. By default one architecture each, in turn, without the host's code."""
    directory = tmp_path_factory.mktemp("nvcc")
    header = directory / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"  # which only CUDA builds of torch bring
    if not (TORCH / "include" / header.relative_to(directory)).exists():
        header.parent.mkdir(parents=True)
        header.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")

    def command(number: int, source: Path) -> list:
        if THOROUGH:
            target = ["-c", *(f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES)]
        else:
            target = ["-cubin", f"-arch=sm_{ARCHITECTURES[number % len(ARCHITECTURES)]}"]
        flags = ["-O3", "-std=c++20", "-fmad=false", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC"]
        return [NVCC, *flags, *target, f"-I{directory}", *INCLUDE, source, "-o", directory / f"{source.stem}.o"]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {source: pool.submit(execute, command(i, source)) for i, source in enumerate(SOURCES)}


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles(compiled, source):
    result = compiled[source].result()
    assert result.returncode == 0, result.stderr[-8000:]
    assert f"{source.name}(" not in result.stderr, f"warnings: {result.stderr[-8000:]}"


def test_sources_launch_through_the_checked_launcher_only():
    for source in SOURCES:
        text = source.read_text()
        assert "<<<" not in text, source
        assert "Guard guard(" in text, f"{source} does not choose its tensors' device"


# The same sources as C++, run by the emulator.


@pytest.fixture(scope="module")
def build_emulated(tmp_path_factory):
    """Builds the CUDA sources into a library of kernels for the CPU; returns its path."""
    directory = tmp_path_factory.mktemp("emulated")
    flags = ["-std=c++20", "-O1", "-g1", "-fPIC", "-ffp-contract=off", f"-I{EMULATOR}", *INCLUDE]

    def build(name: str, *options: str) -> Path:
        sources = [*SOURCES, EMULATOR / "probe.cu"]
        target = directory / name
        target.mkdir()
        header = ["-x", "c++-header", EMULATOR / "emulator.h", "-o", target / "emulator.h.gch"]
        checked([CXX, *flags, *options, *header])
        compiler = [CXX, f"-I{target}", *flags, *options, "-include", "emulator.h", "-x", "c++", "-c"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [[*compiler, source, "-o", target / f"{source.stem}.o"] for source in sources]
            list(pool.map(checked, jobs))
        (target / "emulator.h.gch").unlink()
        libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        objects = [target / f"{source.stem}.o" for source in sources]
        checked([CXX, "-shared", *options, *objects, "-o", target / "kernels.so", *libraries])
        return target / "kernels.so"

    return build


@pytest.fixture(scope="module")
def emulated(build_emulated) -> Path:
    return build_emulated("kernels")


def run_cases(library: Path, **environment: str) -> dict[int, list[torch.Tensor]]:
    """The results of CASES, by number, from a process whose CPU kernels are the emulated ones."""
    path = library.with_name("results.npz")
    environment |= {"MASKRCNN_KERNELS": "composite", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    checked([sys.executable, ROOT / "test" / "kernel_cases.py", library, path], **environment)
    results: dict[int, list[torch.Tensor]] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            results.setdefault(int(key.split("/")[0]), []).append(torch.from_numpy(arrays[key]))
    return results


@pytest.fixture(scope="module")
def emulated_results(emulated) -> dict[str, dict[int, list[torch.Tensor]]]:
    return {order: run_cases(emulated, CUDA_EMULATOR_ORDER=order) for order in ORDERS}


@needs_emulator
@pytest.mark.parametrize("number", range(len(CASES)), ids=[name_of(case) for case in CASES])
def test_emulated_kernels_agree_with_the_cpu(emulated_results, number):
    case = CASES[number]
    if not case.exists():
        pytest.skip(f"there is no operator {case.operator}")
    expected = case.run()
    for order in ORDERS:
        assert_agree(emulated_results[order][number], expected, case)


@needs_emulator
def test_only_atomic_sums_depend_on_the_order_of_threads(emulated_results):
    for number, case in enumerate(CASES):
        atomic = case.operator in ("roi_align_backward", "deform_conv2d_backward") and not case.deterministic
        if case.exists() and not atomic:
            for order in ORDERS[1:]:
                for a, b in zip(emulated_results[order][number], emulated_results[ORDERS[0]][number]):
                    assert np.array_equal(a.numpy(), b.numpy(), equal_nan=a.is_floating_point()), name_of(case)


@needs_emulator
def test_the_operators_own_tests_pass_with_the_emulated_kernels(emulated):
    run = "import sys, torch, pytest; torch.ops.load_library(sys.argv[1]); sys.exit(pytest.main(sys.argv[2:]))"
    without_cuda = {"test_ops_library", "test_ops_convolution", "test_ops_rle"}  # no kernels for devices in these
    tests = [path for path in sorted((ROOT / "test").glob("test_ops_*.py")) if path.stem not in without_cuda]
    command = [sys.executable, "-c", run, emulated, "-q", "-p", "no:cacheprovider", "-k", NOT_FOR_DEVICES, *tests]
    environment = {"MASKRCNN_KERNELS": "composite", "CUDA_EMULATOR_ORDER": "reverse", "OMP_NUM_THREADS": "1"}
    result = checked(command, **environment)
    assert " passed" in result.stdout


@pytest.fixture(scope="module")
def probe(emulated):
    """Runs a kernel of probe.cu on 0..127 in an order of threads; returns the finished process."""
    run = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]);"
        "print(torch.ops.cuda_emulator.probe(torch.arange(128), sys.argv[2]).tolist())"
    )
    return lambda kernel, order="forward": execute(
        [sys.executable, "-c", run, emulated, kernel], CUDA_EMULATOR_ORDER=order
    )


@needs_emulator
@pytest.mark.parametrize("order", ORDERS)
def test_the_emulator_runs_barriers_and_warp_collectives(probe, order):
    reversed_blocks = [*range(63, -1, -1), *range(127, 63, -1)]
    assert probe("reverse", order).stdout == f"{reversed_blocks}\n"
    # Each even lane has the sum of the even numbers of its warp.
    sums = [sum(range(first, first + 32, 2)) for first in range(0, 128, 32)]
    assert probe("warp sum", order).stdout == f"{[s * (1 - lane % 2) for s in sums for lane in range(32)]}\n"


@needs_emulator
def test_the_emulator_finds_a_missing_barrier_and_one_that_is_not_reached(probe):
    right = probe("reverse").stdout
    assert any(probe("no barrier", order).stdout != right for order in ORDERS)
    assert "threads wait at a barrier that others of them do not reach" in probe("stuck").stderr


@needs_emulator
@pytest.mark.skipif(not THOROUGH, reason="MASKRCNN_TEST_THOROUGH=1 runs it")
def test_kernels_stay_within_their_memory(build_emulated):
    library = build_emulated("sanitized", "-fsanitize=address")
    preload = checked([CXX, "-print-file-name=libasan.so"]).stdout.strip()
    environment = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    run_cases(library, **environment)
    run = "import sys, torch; torch.ops.load_library(sys.argv[1]); torch.ops.cuda_emulator.probe(torch.arange(128), '')"
    overrun = execute([sys.executable, "-c", run, library], **environment)
    assert "AddressSanitizer: heap-buffer-overflow" in overrun.stderr


# A CUDA device.


@pytest.fixture(scope="module")
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("maskrcnn_benchmark::nms", "CUDA"):
        pytest.skip("the extension is built without CUDA")
    return "cuda"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_cuda_agrees_with_the_cpu(cuda, case):
    if not case.exists():
        pytest.skip(f"there is no operator {case.operator}")
    results = case.on(cuda).run()
    assert all(result.is_cuda for result in results)
    assert_agree([result.cpu() for result in results], case.run(), case)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_cuda_never_waits_for_the_device_and_uses_the_current_stream(cuda, case):
    if not case.exists() or case.operator == "paste_masks_rle":
        pytest.skip("the number of runs decides the size of the result" if case.exists() else "there is no operator")
    case = case.on(cuda)
    expected = case.run()  # the first call may set up what later ones reuse
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            results = case.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert_agree(results, expected, case)


def test_cuda_deterministic_backward_repeats_itself(cuda):
    for case in CASES:
        if case.deterministic:
            case = case.on(cuda)
            for a, b in zip(case.run(), case.run()):
                assert torch.equal(a, b)
