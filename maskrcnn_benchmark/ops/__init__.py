"""The operators of the package, each declared once and implemented per device.

Every operator works on every device through its composite (plain tensor code); the compiled extension, where it was
built, serves faster kernels for the devices it knows. See `library` for the choice between them.
"""

from . import (
    box_coder,
    boxes,
    convolution,
    deform_conv,
    distance_nms,
    epilogue,
    focal_loss,
    masks,
    matching,
    nms,
    proposals,
    rle,
    roi_align,
    soft_nms,
)
from .library import kernel_in_use, load_extension

load_extension()

__all__ = [
    "box_coder",
    "boxes",
    "convolution",
    "deform_conv",
    "distance_nms",
    "epilogue",
    "focal_loss",
    "kernel_in_use",
    "masks",
    "matching",
    "nms",
    "proposals",
    "rle",
    "roi_align",
    "soft_nms",
]
