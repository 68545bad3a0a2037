"""get_device: a name -> Device. Built-in ones first, then the entry point group `maskrcnn_benchmark.devices`."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import entry_points

import torch

from ..errors import DeviceError
from . import cpu, cuda, mps, npu, xpu
from .base import Device

__all__ = ["ABSENT", "Device", "device_count", "get_device"]

ENTRY_POINTS = "maskrcnn_benchmark.devices"
# type -> (create(index | None) -> Device, count() -> how many there are, or None for no limit)
BUILT_IN: dict[str, tuple[Callable[[int | None], Device], Callable[[], int | None]]] = {
    "cpu": (cpu.create, cpu.count),
    "cuda": (cuda.create, cuda.count),
    "mps": (mps.create, mps.count),
    "npu": (npu.create, npu.count),
    "xpu": (xpu.create, xpu.count),
}

# Devices whose steps can be counted where there is none: type -> (their habits on another torch device, their kernels)
ABSENT: dict[str, tuple[Callable[[torch.device], Device], frozenset[str]]] = {"cuda": (cuda.with_habits, cuda.KERNELS)}


def get_device(name: str = "auto") -> Device:
    """The device called `name`: auto, cpu, cuda, cuda:1, npu, mps, xpu, or a plug-in's.

    Without an index, a process that torchrun started takes the device of its LOCAL_RANK. A plug-in's entry point is a
    function `create(index: int | None) -> Device`.

    Raises:
        DeviceError: the device is not there. Only "auto" may land on the CPU.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = accelerator.type if accelerator is not None else "cpu"
    kind, _, index_text = name.partition(":")
    if index_text and not index_text.isdigit():
        raise DeviceError(f"device {name!r}: the part after the colon must be a number, as in cuda:1")
    index = int(index_text) if index_text else None
    limit = device_count(kind)
    if index is None and limit is not None and "LOCAL_RANK" in os.environ:
        index = int(os.environ["LOCAL_RANK"])
    if limit and index is not None and index >= limit:
        raise DeviceError(
            f"device {kind}:{index} was asked for, but there are {limit}: start at most {limit} processes here"
        )
    if kind in BUILT_IN:
        return BUILT_IN[kind][0](index)
    plugins = entry_points(group=ENTRY_POINTS)
    if kind in plugins.names:
        return plugins[kind].load()(index)
    return _torch_device(kind, index)


def device_count(kind: str) -> int | None:
    """How many devices of a type there are here; None where the number has no limit (the CPU) or is unknown."""
    if kind in BUILT_IN:
        return BUILT_IN[kind][1]()
    accelerator = torch.accelerator.current_accelerator()
    return torch.accelerator.device_count() if accelerator is not None and accelerator.type == kind else None


def _torch_device(kind: str, index: int | None) -> Device:
    """Another device type that torch itself knows (hpu, mtia, ...), by its device module."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type != kind:
        known = ", ".join(["auto", *BUILT_IN, *sorted(entry_points(group=ENTRY_POINTS).names)])
        there = accelerator.type if accelerator is not None else "none"
        raise DeviceError(f"unknown or missing device {kind!r}; known are {known}; torch's accelerator here: {there}")
    return Device(torch.device(kind, index) if index is not None else torch.device(kind))
