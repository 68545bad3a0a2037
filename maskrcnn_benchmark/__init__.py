"""Mask R-CNN and its relatives for CPU, CUDA, NPU and other accelerators."""

import os

# OpenCV reads it when it is loaded: a file of 3 MB may promise 2**30 pixels, its own limit, and take 3 GB.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 28))

__version__ = "0.1.0"
