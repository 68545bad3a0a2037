"""Mask R-CNN and its relatives for CPU, CUDA, NPU and other accelerators."""

__version__ = "0.1.0"
