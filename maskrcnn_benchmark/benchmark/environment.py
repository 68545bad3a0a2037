"""The machine, the versions and the code that a number was measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__, ops
from ..device import Device

KERNELS = (
    *("roi_align", "nms", "match", "box_encode", "box_decode", "polygon_targets", "paste_masks_rle"),
    *("soft_nms", "distance_nms", "deform_conv2d", "sigmoid_focal_loss", "proposals", "conv3x3", "pointwise"),
    "epilogue_",
)
PACKAGES = ("numpy", "opencv-python-headless", "opencv-python", "pycocotools", "hotcoco")


def describe(device: Device, world_size: int = 1) -> dict[str, Any]:
    """For result.json and benchmark results: all that a comparison has to know."""
    return {
        "maskrcnn_benchmark": __version__,
        **commit(),
        "torch": torch.__version__,
        **device.library_versions(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": device.type,
        "device_name": device.name,
        "world_size": world_size,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": {op: ops.kernel_in_use(op, device.type) for op in KERNELS},
    }


def disturbances(before: dict[str, Any], after: dict[str, Any]) -> str:
    """For people: which counters of Device.clocks rose between two readings; empty where none did."""
    rises = {
        name: after[name] - before[name]
        for name in ("heat_throttles", "quota_throttled_ms", "stolen_ms", "contended_ms")
        if before.get(name) is not None
    }
    return ", ".join(f"{name} {rise:.0f}" for name, rise in rises.items() if rise >= 1)


def commit() -> dict[str, Any]:
    """The git commit of the source tree and whether it has local changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": head, "dirty": bool(changes.strip())}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
