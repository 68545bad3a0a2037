"""NVIDIA GPUs (and AMD's, through torch's ROCm builds)."""

from __future__ import annotations

import torch

from ..errors import DeviceError
from .base import Device


def create(index: int | None) -> Device:
    if torch.version.cuda is None and torch.version.hip is None:
        raise DeviceError(
            f"device cuda: torch {torch.__version__} is a build without CUDA; install a CUDA build of torch, "
            "or use --device cpu"
        )
    if not count():
        raise DeviceError(
            "device cuda: torch sees no GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu"
        )
    return Device(
        torch.device("cuda", index or 0),
        dist_backend="nccl",
        pinned_memory=True,
        channels_last=True,
        fused_optimizer=True,
    )


def count() -> int:
    """GPUs that torch sees."""
    return torch.cuda.device_count()
