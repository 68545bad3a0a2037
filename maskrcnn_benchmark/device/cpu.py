"""The CPU: nothing is queued, so nothing waits, and padded rows are dropped instead of computed."""

from __future__ import annotations

import ctypes
import platform
import re
import resource
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..ops.library import NAMESPACE
from . import linux
from .base import Device

# malloc.h: from this size on a block is mapped on its own, csrc/cpu/large_blocks.cpp keeps those; bytes free at the
# heap's end before it shrinks, -1: never; bytes it grows by.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD = -3, -1, -2


class HostEvent:
    """The moment at which it was recorded: work on the CPU is done when the next line runs."""

    def record(self) -> None:
        self.moment = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostEvent) -> float:
        return 1000 * (end.moment - self.moment)


@dataclass(frozen=True)
class CpuDevice(Device):
    @property
    def name(self) -> str:
        """The processor's, and the vector instructions that torch uses on it: AMD EPYC, AVX512."""
        file = Path("/proc/cpuinfo")
        model = re.search(r"^model name\s*:\s*(.+)$", file.read_text(), re.MULTILINE) if file.exists() else None
        name = model[1] if model else platform.processor() or platform.machine()
        return f"{name}, {torch.backends.cpu.get_cpu_capability()}"

    def activate(self) -> None:
        """Lets this process keep what a step frees for the next one: glibc its heap, and the compiled kernels, where
        they are, blocks above 32 MB. Otherwise memory goes back to the system, and a training step of R50-FPN begins
        with 50,000 to 1,200,000 page faults: 5 to 10% of its time."""
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
        if mallopt is not None:  # musl has none
            mallopt(M_MMAP_THRESHOLD, 32 << 20)
            mallopt(M_TRIM_THRESHOLD, -1)
            mallopt(M_TOP_PAD, 64 << 20)
        keep_large_blocks = getattr(getattr(torch.ops, NAMESPACE), "keep_large_blocks", None)
        if keep_large_blocks is not None:
            keep_large_blocks()

    def synchronize(self) -> None:
        pass

    def max_memory_mb(self) -> float:
        """The process's peak resident memory: the CPU's allocator keeps no count."""
        status = Path("/proc/self/status")
        high_water = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
        if high_water:  # getrusage would count what the process that started this one held
            return int(high_water[1]) / 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10

    def reset_peak_memory(self) -> None:
        """Where Linux lets a process do it; elsewhere the peak stays the one since its start."""
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def clocks(self) -> dict[str, Any]:
        """From Linux: mhz now, and since the machine's start what took time away, see linux.py."""
        return {
            "mhz": linux.mhz(),
            "heat_throttles": linux.heat_throttles(),
            "quota_throttled_ms": linux.quota_throttled_ms(),
            "stolen_ms": linux.stolen_ms(),
            "contended_ms": linux.contended_ms(),
        }

    def event(self) -> HostEvent:
        return HostEvent()


def create(index: int | None) -> Device:
    # float16 is left out: oneDNN has no float16 convolution gradients, and torch's own are many times slower.
    return CpuDevice(
        torch.device("cpu"),
        autocast_dtypes=(torch.bfloat16,),
        grad_scaler=False,
        channels_last=True,
        compacts=True,
        fused_optimizer=True,
    )


def count() -> int | None:
    """As many ranks as one likes share a CPU."""
    return None
