"""Intel GPUs, by torch.xpu."""

from __future__ import annotations

import torch

from ..errors import DeviceError
from .base import Device


def create(index: int | None) -> Device:
    if not count():
        raise DeviceError(
            "device xpu: torch sees no Intel GPU; install the XPU build of torch and Intel's GPU driver, and look at "
            "ZE_AFFINITY_MASK, or use --device cpu"
        )
    return Device(
        torch.device("xpu", index or 0),
        dist_backend="xccl",
        pinned_memory=True,
        channels_last=True,
        mirrors_images=True,
        fused_optimizer=True,
    )


def count() -> int:
    """GPUs that torch sees; 0 in a build without XPU."""
    return torch.xpu.device_count()
