"""The device layer: every device's capabilities, plug-ins, and a package that knows no device by name."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from maskrcnn_benchmark.device import cuda, device_count, get_device, linux
from maskrcnn_benchmark.errors import DeviceError

TWO_STEPS = ["--skip-test", "SOLVER.MAX_ITER", "2", "SAVE_CHECKPOINTS", "False", "OUTPUT_DIR"]
LOW, HALF = torch.bfloat16, torch.float16

# What each device is, by torch's documentation (torch.amp, torch.distributed, torch.mps, torch.xpu): backend, autocast
# dtypes, gradient scaler, pinned memory, channels last, compacts, fused optimizer.
CAPABILITIES = {
    "cpu": ("gloo", {LOW}, False, False, True, True, True),
    "cuda": ("nccl", {LOW, HALF}, True, True, True, False, True),
    "mps": ("gloo", {LOW, HALF}, True, False, False, False, True),
    "xpu": ("xccl", {LOW, HALF}, True, True, True, False, True),
}


@pytest.fixture
def hardware(monkeypatch):
    """torch as it is where every kind of device is there, two of each but for Apple's."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for module, count in ((torch.cuda, 2), (torch.mps, 1), (torch.xpu, 2)):
        monkeypatch.setattr(module, "device_count", lambda count=count: count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    return monkeypatch


@pytest.mark.parametrize("kind", CAPABILITIES)
def test_capabilities(hardware, kind):
    device = get_device(kind)
    assert CAPABILITIES[kind] == (
        *(device.dist_backend, set(device.autocast_dtypes), device.grad_scaler, device.pinned_memory),
        *(device.channels_last, device.compacts, device.fused_optimizer),
    )
    assert device.torch_device == (torch.device("cpu") if kind == "cpu" else torch.device(kind, 0))
    assert not device.optimizers and device.gradient_views
    assert device.graph_type == {"cuda": "CUDAGraph"}.get(kind, "")


@pytest.mark.parametrize("kind", CAPABILITIES)
def test_capabilities_are_those_that_torch_states(hardware, kind):
    device = get_device(kind)
    assert device.dist_backend == dist.Backend.default_device_backend_map[kind]
    assert torch.amp.is_autocast_available(kind)
    assert torch.get_autocast_dtype(kind) in device.autocast_dtypes
    assert device.fused_optimizer == (kind in _get_fused_kernels_supported_devices())


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_torch_has_the_names_that_a_device_asks_for(hardware, kind):
    device = get_device(kind)
    assert device.module is getattr(torch, kind)
    assert {"synchronize", "Event"} <= set(dir(device.module))
    assert {"record", "synchronize", "elapsed_time"} <= set(dir(device.module.Event))
    assert not device.pinned_memory or {"Stream", "stream", "current_stream"} <= set(dir(device.module))
    tells = {"max_memory_allocated", "reset_peak_memory_stats", "get_device_name"}
    assert (tells & set(dir(device.module))) == (set() if kind == "mps" else tells)


@pytest.fixture
def machine(tmp_path):
    """Writes files below a root that stands for a machine's."""

    def write(name: str, text: str) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return tmp_path

    return write


def test_what_linux_tells_of_the_processor(machine):
    for core, kilohertz in enumerate((2_000_000, 3_000_000)):
        machine(f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", f"{kilohertz}\n")
        machine(f"sys/devices/system/cpu/cpu{core}/thermal_throttle/core_throttle_count", "4\n")
    machine("proc/cpuinfo", "cpu MHz\t\t: 1000.0\n")
    machine("proc/stat", "cpu  1 2 3 4 5 6 7 50 0 0\ncpu0 1 2 3 4 5 6 7 25 0 0\n")
    root = machine("proc/pressure/cpu", "some avg10=0 avg60=0 avg300=0 total=7000\nfull avg10=0 total=9\n")
    assert linux.mhz(root) == 2500 and linux.heat_throttles(root) == 8
    assert linux.stolen_ms(root) == 50_000 / os.sysconf("SC_CLK_TCK") and linux.contended_ms(root) == 7


def test_a_virtual_machine_tells_its_clock_elsewhere_and_other_systems_nothing(machine, tmp_path):
    tellers = (linux.mhz, linux.heat_throttles, linux.quota_throttled_ms, linux.stolen_ms, linux.contended_ms)
    assert [tell(tmp_path) for tell in tellers] == [None] * 5
    assert linux.mhz(machine("proc/cpuinfo", "cpu MHz\t\t: 1000.0\ncpu MHz\t\t: 3000.0\n")) == 2000


@pytest.mark.parametrize(
    ("groups", "file", "line"),
    [
        ("0::/user/me\n", "sys/fs/cgroup/user/me/cpu.stat", "throttled_usec 3000"),
        ("0::/seen/from/outside\n", "sys/fs/cgroup/cpu.stat", "throttled_usec 3000"),  # in a container
        ("3:cpu,cpuacct:/me\n0::/\n", "sys/fs/cgroup/cpu/me/cpu.stat", "throttled_time 3000000"),
    ],
)
def test_time_without_processor_for_the_quota(machine, groups, file, line):
    machine("proc/self/cgroup", groups)
    assert linux.quota_throttled_ms(machine(file, f"nr_throttled 5\n{line}\n")) == 3


def test_clocks_of_a_gpu_with_old_and_new_drivers(tmp_path, monkeypatch):
    """nvidia-smi answers what it is asked, and refuses names that it does not know."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for unknown, reasons in (("none", cuda.THROTTLING[0]), ("clocks_event", cuda.THROTTLING[1])):
        program.write_text(
            f'#!/bin/sh\ncase "$*" in *{unknown}*) exit 2;; esac\n'
            'case "$*" in *--id=GPU-12*) echo "1980 MHz, 2619 MHz, 30, 70.5 W, 580.1, 0x0";; esac\n'
        )
        program.chmod(0o755)
        told = cuda.nvidia_smi("GPU-12")
        assert told["clocks.sm"] == "1980 MHz" and told["driver_version"] == "580.1" and told[reasons] == "0x0"
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cuda.nvidia_smi("GPU-12") == {}


KEPT = """
import os, re, resource
from pathlib import Path
import torch
from maskrcnn_benchmark.device import get_device

MB = 1 << 20

def block(size):
    return torch.full((size * MB,), 1, dtype=torch.uint8)

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(re.search(r"VmRSS:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

get_device("cpu").activate()
early = block(100)
print("new", faults(160))
print("again", faults(160), "smaller", faults(130))
pair = block(100), block(60)
del pair
print("both", faults(100), faults(60))
before = resident()
larger = block(400)
print("grew by", resident() - before)
child = os.fork()
if child == 0:
    os._exit(0 if torch.empty(400 * MB, dtype=torch.uint8).numel() else 1)
print("child", os.waitpid(child, 0)[1])
images = torch.rand(1, 3, 1024, 1600)
maps = torch.conv2d(images, torch.rand(32, 3, 7, 7), stride=2)  # oneDNN frees by another door
print("maps", maps.nbytes // MB)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(
    not hasattr(torch.ops.maskrcnn_benchmark, "keep_large_blocks"), reason="the compiled kernels are not built"
)
def test_large_blocks_stay_and_do_not_add_up():
    """Pages of a block are made once; 64 MB and more of 4 kB pages are 10,000 faults where they are not."""
    run = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert run.returncode == 0, run.stderr
    told = dict(re.findall(r"(again|smaller|grew by|child|maps) (\d+)", run.stdout))
    assert max(int(told["again"]), int(told["smaller"])) < 100, run.stdout
    assert sum(map(int, re.search(r"both (\d+) (\d+)", run.stdout).groups())) < 100, run.stdout
    assert int(told["grew by"]) <= 300, "kept blocks were not given up for a new one"
    assert told["child"] == "0" and int(told["maps"]) > 32


def test_a_device_asks_its_module(hardware):
    asked = []
    for name, answer in {
        "synchronize": None,
        "max_memory_allocated": 3 * 2**20,
        "reset_peak_memory_stats": None,
        "get_device_name": "Intel Arc",
        "Event": "event",
    }.items():
        hardware.setattr(torch.xpu, name, lambda *a, n=name, v=answer, **k: (asked.append((n, a, k)), v)[1])
    hardware.setattr(torch.accelerator, "set_device_index", lambda index: asked.append(("index", (index,), {})))
    device = get_device("xpu:1")
    device.activate()
    device.synchronize()
    device.reset_peak_memory()
    assert (device.max_memory_mb(), device.name, device.event()) == (3.0, "Intel Arc", "event")
    assert asked == [
        *(("index", (1,), {}), ("synchronize", (), {}), ("reset_peak_memory_stats", (), {})),
        *(("max_memory_allocated", (), {}), ("get_device_name", (torch.device("xpu", 1),), {})),
        ("Event", (), {"enable_timing": True}),
    ]


@pytest.mark.parametrize("wanted", [True, False])
def test_cudnn_times_its_algorithms_where_it_is_told_to(hardware, wanted):
    hardware.setattr(torch.backends.cudnn, "benchmark", not wanted)
    get_device("cuda").time_convolutions(wanted)
    assert torch.backends.cudnn.benchmark == wanted


def test_a_device_that_tells_no_memory_reports_none(hardware):
    device = get_device("mps")
    device.reset_peak_memory()
    assert device.max_memory_mb() == 0 and device.name == "mps"


@pytest.mark.parametrize(("kind", "dtype"), [("cpu", HALF), ("mps", torch.float64), ("xpu", torch.float64)])
def test_autocast_refuses_what_a_device_does_not_take(hardware, monkeypatch, kind, dtype):
    # torch 2.8 asks which macOS this is before it takes bfloat16, and cannot tell where there is none
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: True)
    device = get_device(kind)
    with device.autocast(LOW):
        assert torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == LOW
    with device.autocast(torch.float32):
        assert not torch.is_autocast_enabled(kind)
    with pytest.raises(DeviceError, match=f"DTYPE float(16|64) is not for device {kind}; it takes bfloat16"):
        device.autocast(dtype)


@pytest.mark.parametrize(("kind", "count"), [("cpu", None), ("cuda", 2), ("mps", 1), ("xpu", 2)])
def test_numbers_of_devices(hardware, kind, count):
    assert device_count(kind) == count
    if count:
        with pytest.raises(DeviceError, match=f"device {kind}:2 was asked for, but there are {count}"):
            get_device(f"{kind}:2")


def test_a_rank_takes_its_own_device(hardware):
    hardware.setenv("LOCAL_RANK", "1")
    assert get_device("xpu").torch_device == torch.device("xpu", 1)
    assert get_device("xpu:0").torch_device == torch.device("xpu", 0)
    assert get_device("cpu").torch_device == torch.device("cpu")
    with pytest.raises(DeviceError, match="mps:1 was asked for, but there are 1: start at most 1 processes"):
        get_device("mps")


def test_auto_takes_torchs_accelerator_and_lands_on_the_cpu_only_without_one(hardware):
    for accelerator, kind in ((torch.device("xpu"), "xpu"), (torch.device("mps"), "mps"), (None, "cpu")):
        hardware.setattr(torch.accelerator, "current_accelerator", lambda check_available=False, a=accelerator: a)
        assert get_device("auto").type == kind


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mps", "torch sees no Apple GPU"),
        ("xpu", "torch sees no Intel GPU; install the XPU build"),
        ("npu", "torch_npu cannot be imported"),
        ("tpu", "unknown or missing device 'tpu'"),
        ("cuda:x", "the part after the colon must be a number"),
        ("qpu", "known are auto, cpu, cuda, mps, npu, xpu"),
    ],
)
def test_a_device_that_is_not_there_is_an_error(name, message):
    if name in ("mps", "xpu") and device_count(name):
        pytest.skip(f"{name} is here")
    with pytest.raises(DeviceError, match=message):
        get_device(name)


def test_time_between_two_events():
    device = get_device("cpu")
    start, end = device.event(), device.event()
    start.record()
    time.sleep(0.02)
    end.record()
    end.synchronize()
    assert 20 <= start.elapsed_time(end) < 20_000


def test_peak_memory_counts_from_the_reset():
    device = get_device("cpu")
    with mmap.mmap(-1, 300_000_000) as big:  # a tensor's memory stays, where a test before has trained in this process
        for page in range(0, len(big), mmap.PAGESIZE):
            big[page] = 1
        before = device.max_memory_mb()
    assert before > 286
    device.reset_peak_memory()
    if sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK):
        assert device.max_memory_mb() < before - 200


@pytest.fixture(scope="module")
def installed_plugin(tmp_path_factory) -> Path:
    """test/plugin, installed by pip into a directory of its own."""
    directory = tmp_path_factory.mktemp("plugin")
    shutil.copytree(ROOT / "test" / "plugin", directory / "source")  # the build leaves files beside it
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", directory / "site"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, directory / "source"], check=True, timeout=120)
    return directory / "site"


def test_a_plugin_that_is_installed_trains(run, tiny_config, installed_plugin, tmp_path):
    arguments = ["tools/train_net.py", "--config-file", tiny_config, "--device", "example", *TWO_STEPS, tmp_path]
    result = run(*arguments, env={"PYTHONPATH": str(installed_plugin)})
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iter"] for line in lines] == [1, 2]
    # torch.cpu gives the hardware no name: it is the plug-in's Device that ran, not ours for the CPU.
    assert json.loads((tmp_path / "result.json").read_text())["environment"]["device_name"] == "cpu"


def test_a_plugin_is_found_by_its_name_alone(installed_plugin):
    def ask(name: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "maskrcnn_benchmark.device", name]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{installed_plugin}"}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd="/")

    assert ask("example").stdout.split() == ["cpu", "any"]
    other = ask("other")
    assert other.returncode == 2
    assert other.stderr.startswith("error: unknown or missing device 'other'; known are auto, cpu, cuda, mps, npu, xpu")
    assert "example" in other.stderr and len(other.stderr.splitlines()) == 1


WITHOUT_CUDA = """
import os, runpy, sys, types
import torch

class Forbidden(types.ModuleType):
    def __getattribute__(self, name):
        caller = sys._getframe(1).f_code.co_filename
        if not (caller.startswith((os.path.dirname(torch.__file__), "<frozen")) or name.startswith("__")):
            raise AssertionError(f"torch.cuda.{name} is used by {caller}")
        return super().__getattribute__(name)

torch.cuda.__class__ = Forbidden
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_without_cuda(*command) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", WITHOUT_CUDA, *map(str, command)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=environment)


def test_training_on_the_cpu_never_touches_cuda(tiny_config, tmp_path):
    command = [ROOT / "tools" / "train_net.py", "--config-file", tiny_config, "--device", "cpu", *TWO_STEPS, tmp_path]
    result = run_without_cuda(*command)
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_use_of_cuda_would_be_seen(tmp_path):
    (tmp_path / "use.py").write_text("import torch\ntorch.cuda.is_available()\n")
    result = run_without_cuda(tmp_path / "use.py")
    assert result.returncode == 1 and "AssertionError: torch.cuda.is_available is used by" in result.stderr


DEVICE_NAMES = re.compile(
    r"\.(cuda|npu|xpu|mps)\(|\bis_(cuda|npu|xpu|mps)\b|\btorch[._](cuda|npu|xpu|mps)\b"
    r"|[\"'](nccl|hccl|xccl|cuda|npu|xpu|mps)[\"']"
)


def test_devices_are_named_in_the_device_layer_alone():
    sources = [*(ROOT / "maskrcnn_benchmark").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    named = {
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources
        if path.parent != ROOT / "maskrcnn_benchmark" / "device"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if DEVICE_NAMES.search(line)
    }
    assert len(sources) > 40 and not named
    for use in ("x.cuda()", "x.is_cuda", "torch.npu.Event", 'backend = "hccl"', "if device.type == 'cuda':"):
        assert DEVICE_NAMES.search(use), use


def test_kernels_asked_for_and_missing_stop_the_run(tiny_config, tmp_path):
    """A copy of the package without its compiled extension."""
    for name in ("maskrcnn_benchmark", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    arguments = ["--config-file", tiny_config, "--device", "cpu", *TWO_STEPS, tmp_path / "output"]
    command = [sys.executable, tmp_path / "tools" / "train_net.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASKRCNN_KERNELS": "native"}
    result = subprocess.run(map(str, command), capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert re.match(r"error: MASKRCNN_KERNELS=native, but \w+ has no compiled kernel", result.stderr.splitlines()[-1])


def test_a_device_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_device("cpu").compacts = False
