"""NVIDIA GPUs (and AMD's, through torch's ROCm builds)."""

from __future__ import annotations

import logging
import subprocess
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import DeviceError
from .base import Device

logger = logging.getLogger(__name__)

# What csrc/cuda registers
KERNELS = frozenset(
    {
        "box_encode",
        "box_decode",
        "box_decode_backward",
        "deform_conv2d",
        "deform_conv2d_backward",
        "distance_nms",
        "epilogue_",
        "match",
        "nms",
        "paste_masks_rle",
        "polygon_targets",
        "proposals",
        "roi_align",
        "roi_align_backward",
        "sigmoid_focal_loss",
        "sigmoid_focal_loss_backward",
        "soft_nms",
    }
)
CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "driver_version")
# The second is its name in drivers before 535
THROTTLING = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")


@dataclass(frozen=True)
class CudaDevice(Device):
    def time_convolutions(self, wanted: bool) -> None:
        torch.backends.cudnn.benchmark = wanted

    def pin(self, memory: torch.Tensor) -> bool:
        """False, with a warning, where the driver refuses (a limit on locked memory)."""
        status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if int(status):
            logger.warning(
                "%d MB of batches cannot be pinned (%s): they are copied once more", memory.nbytes >> 20, status
            )
        return not int(status)

    def unpin(self, memory: torch.Tensor) -> None:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def clocks(self) -> dict[str, Any]:
        """What nvidia-smi says, by its own names; nothing where it cannot be run."""
        return nvidia_smi(f"GPU-{torch.cuda.get_device_properties(self.torch_device).uuid}")


def nvidia_smi(gpu: str) -> dict[str, str]:
    """gpu: its UUID."""
    for reasons in THROTTLING:
        names = (*CLOCKS, reasons)
        question = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
        try:
            answer = subprocess.run(question, capture_output=True, text=True, timeout=30, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        return dict(zip(names, (value.strip() for value in answer.split(","))))
    return {}


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
    return with_habits(torch.device("cuda", index or 0))


def with_habits(torch_device: torch.device) -> CudaDevice:
    """A GPU's habits; `torch_device` can be another where nothing runs (benchmark/traffic.py)."""
    return CudaDevice(
        torch_device,
        dist_backend="nccl",
        pinned_memory=True,
        channels_last=True,
        mirrors_images=True,
        fused_optimizer=True,
        graph_type="CUDAGraph",
        bias_apart=True,
    )


def count() -> int:
    """GPUs that torch sees."""
    return torch.cuda.device_count()
