"""The operators of the package, each declared once and implemented per device.

Every operator works on every device through its composite (plain tensor code); the compiled extension, where it was
built, serves faster kernels for the devices it knows. See `library` for the choice between them.
"""

from . import box_coder, boxes, masks, matching, nms, roi_align
from .library import kernel_in_use, load_extension

load_extension()

__all__ = ["box_coder", "boxes", "kernel_in_use", "masks", "matching", "nms", "roi_align"]
