"""Huawei Ascend NPUs through the torch_npu plug-in: the only file that imports it."""

from __future__ import annotations

import functools
import importlib.util

import torch

from ..errors import DeviceError
from .base import Device


def create(index: int | None) -> Device:
    try:
        import torch_npu
    except ImportError as error:
        raise DeviceError(
            f"device npu: torch_npu cannot be imported ({error}); install the torch_npu wheel that matches torch "
            f"{torch.__version__} and the CANN runtime, and source CANN's set_env.sh (test/env_npu.sh does)"
        ) from error
    if not count():
        raise DeviceError("device npu: torch_npu sees no NPU; look at npu-smi info and ASCEND_RT_VISIBLE_DEVICES")
    # Kernels compiled anew for every shape make a first batch take half an hour; CANN's prebuilt ones do not.
    torch.npu.set_compile_mode(jit_compile=False)
    _register_kernels()
    return Device(
        torch.device("npu", index or 0),
        dist_backend="hccl",
        pinned_memory=True,
        graph_type="NPUGraph",
        gradient_views=False,  # the fused optimizers lay gradients out for themselves
        optimizers={"SGD": torch_npu.optim.NpuFusedSGD, "AdamW": torch_npu.optim.NpuFusedAdamW},
    )


@functools.cache
def _register_kernels() -> None:
    """Once a process, and only where torch_npu is: another plug-in's device has the same dispatch key."""
    from . import npu_kernels

    npu_kernels.register()


def count() -> int:
    """NPUs that torch_npu sees; 0 without it."""
    if importlib.util.find_spec("torch_npu") is None:
        return 0
    import torch_npu  # noqa: F401  (it adds torch.npu)

    return torch.npu.device_count()
