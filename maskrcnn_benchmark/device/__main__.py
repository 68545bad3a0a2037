"""`python -m maskrcnn_benchmark.device [NAME]` prints the device's type and how many there are ("any" for a CPU)."""

from __future__ import annotations

import sys

from .. import command
from . import device_count, get_device


def main() -> int:
    device = get_device(sys.argv[1] if len(sys.argv) > 1 else "auto")
    count = device_count(device.type)
    print(device.type, "any" if count is None else count)
    return 0


command.run(main)
