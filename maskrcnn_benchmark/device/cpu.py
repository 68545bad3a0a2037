"""The CPU: nothing is queued, so nothing waits, and padded rows are dropped instead of computed."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch

from .base import Device


@dataclass(frozen=True)
class CpuDevice(Device):
    @property
    def name(self) -> str:
        return torch.backends.cpu.get_cpu_capability()

    def activate(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def max_memory_mb(self) -> float:
        """The process's peak resident memory: the CPU's allocator keeps no count."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


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
