"""A stand-in for torch_npu where there is no NPU: a device in CPU memory, the documented functions in plain arithmetic.

`import torch_npu` builds the device (some ten seconds, once), renames PrivateUse1 to `npu` and adds `torch.npu`, as the
real package does. `calls` keeps what the package passed to the kernels; where NPU_DOUBLE_CALLS names a file, their
counts are written there when the process ends.
"""

import atexit
import collections
import contextlib
import json
import os
import time
import types
from pathlib import Path

import torch
from torch.utils import cpp_extension

from . import kernels, optim

__all__ = ["calls", "kernels", "optim"]

_SOURCE = Path(__file__).parents[1] / "backend.cpp"
cpp_extension.load("npu_double", [str(_SOURCE)], extra_cflags=["-O0"], is_python_module=False)

npu = types.ModuleType("torch.npu")
npu.compile_modes = []
npu.is_available = lambda: True
npu.device_count = lambda: 1
npu.current_device = lambda: 0
npu.set_device = lambda device: None
npu.synchronize = lambda device=None: None
npu.empty_cache = lambda: None
npu.get_device_name = lambda device=None: "test double"
npu.max_memory_allocated = lambda device=None: torch.ops.npu_double.peak_bytes()
npu.set_compile_mode = lambda jit_compile: npu.compile_modes.append(jit_compile)
npu.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
npu.is_bf16_supported = lambda: True
npu.manual_seed = npu.manual_seed_all = lambda seed: None  # its random numbers are the CPU's
npu._is_in_bad_fork = lambda: False


class Event:
    """Nothing is queued here: what is recorded is done."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.moment = 0.0

    def record(self) -> None:
        self.moment = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.moment - self.moment)


class Stream:
    """Work is done when it is queued, so none waits for another."""

    def wait_stream(self, other: "Stream") -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass


npu.Event, npu.Stream = Event, Stream
npu.current_stream = Stream
npu.stream = contextlib.nullcontext

torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend()

calls: list[tuple[str, dict]] = []
kernels.register(calls)


@atexit.register
def _write_counts() -> None:
    if path := os.environ.get("NPU_DOUBLE_CALLS"):
        counts = collections.Counter(name for name, _ in calls) + collections.Counter(optim.steps)
        Path(path).write_text(json.dumps({**counts, "jit_compile": npu.compile_modes}))
