"""Mask R-CNN and its relatives for CPU, CUDA, NPU and other accelerators."""

import os
from typing import Any

# Pillow's limit for OpenCV, too, which reads it when it is loaded: its own lets a file of 3 MB take 3 GB.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "178956970")

__version__ = "0.1.0"

# Names of api.py: loaded, and torch with them, when the first of them is asked for
_LAZY = ("FasterRCNN", "MaskRCNN", "datasets", "transforms", "visualize")
__all__ = [*_LAZY, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
