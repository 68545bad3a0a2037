"""What Linux tells of the processor: its clock, and what kept this process from it. None where a file is not there."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path("/")


def mhz(root: Path = ROOT) -> float | None:
    """The cores' mean clock now, from cpufreq, or in a virtual machine, which has none, from cpuinfo."""
    rates = [kilohertz / 1000 for kilohertz in _of_each_core(root, "cpufreq/scaling_cur_freq")] or [
        float(rate) for rate in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    ]
    return sum(rates) / len(rates) if rates else None


def heat_throttles(root: Path = ROOT) -> int | None:
    """How often cores were throttled for heat, since the start of the machine."""
    counts = _of_each_core(root, "thermal_throttle/core_throttle_count")
    return sum(counts) if counts else None


def quota_throttled_ms(root: Path = ROOT) -> float | None:
    """How long this process's control group had used up its share of processor time."""
    for number, controllers, path in re.findall(r"^(\d+):(.*?):/(.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE):
        if number == "0":
            mount, field, in_ms = root / "sys/fs/cgroup", "throttled_usec", 1e3
        elif "cpu" in controllers.split(","):
            mount, field, in_ms = root / "sys/fs/cgroup/cpu", "throttled_time", 1e6
        else:
            continue
        for directory in (mount / path, mount):  # in a container the mount itself is the process's group
            if found := re.search(rf"^{field} (\d+)$", _text(directory / "cpu.stat"), re.MULTILINE):
                return int(found[1]) / in_ms
    return None


def stolen_ms(root: Path = ROOT) -> float | None:
    """How long the host of this virtual machine ran something else, summed over its processors."""
    fields = re.findall(r"^cpu .*", _text(root / "proc/stat"), re.MULTILINE)
    return 1000 * int(fields[0].split()[8]) / os.sysconf("SC_CLK_TCK") if fields else None


def contended_ms(root: Path = ROOT) -> float | None:
    """How long some process of the machine was ready to run, and had no processor."""
    found = re.search(r"^some .*total=(\d+)$", _text(root / "proc/pressure/cpu"), re.MULTILINE)
    return int(found[1]) / 1000 if found else None


def _of_each_core(root: Path, name: str) -> list[int]:
    files = root.glob(f"sys/devices/system/cpu/cpu[0-9]*/{name}")
    return [int(text) for file in files if (text := _text(file))]


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
