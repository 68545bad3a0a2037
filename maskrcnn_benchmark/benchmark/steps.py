"""Timing steps that consist of phases, on any device.

Two passes, since waiting for the device between phases would slow down what the first one measures:

- end to end: steps follow one another as in a real run; marks in the device's own queue tell each step's time;
- by phase: the device is waited for before and after each phase.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..device import Device
from .results import metric
from .timing import quiet_garbage_collector, slowest

# The phases of a step in order; each is given what the one before it returned, the first one None.
Phases = Mapping[str, Callable[[Any], Any]]
# The phase whose time is the wait for data
DATA = "data"
METHOD = (
    "end to end: marks in the device's queue around each step, no wait between the steps of one side; with several"
    " sides they take turns, the device synchronized between them. By phase: a pass of its own, the device synchronized"
    " before and after each phase. The garbage collector is off; warm-up steps are left out; percentiles interpolate"
    " linearly between samples"
)


@dataclass
class Samples:
    """Milliseconds of one side, a value a measured step.

    step, wait: of the pass end to end: the whole step, and the part the host waited for data. phases: of the other
    pass. first: of the very first step, which compiles, tunes and allocates; with it the step counts as warm-up.
    """

    first: float = 0.0
    step: list[float] = field(default_factory=list)
    wait: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)


def first_steps(sides: Mapping[str, Phases], device: Device) -> dict[str, float]:
    """Milliseconds of the very first step of every side."""
    return {name: sum(by_phase(phases, device).values()) for name, phases in sides.items()}


def measure(
    sides: Mapping[str, Phases],
    device: Device,
    warmup: int,
    steps: int,
    phase_steps: int,
    first: Mapping[str, float] | None = None,
) -> dict[str, Samples]:
    """Both passes over every side. `warmup` steps a side come first and are left out, at least one: the first step.

    first: what first_steps gave, where it has been called already.
    """
    with quiet_garbage_collector():
        first = first or first_steps(sides, device)
        samples = {name: Samples(first[name], phases={phase: [] for phase in sides[name]}) for name in sides}
        for _ in range(warmup - 1):
            for phases in sides.values():
                whole(phases)
        device.synchronize()
        end_to_end(sides, device, steps, samples)
        for _ in range(phase_steps):
            for name, phases in sides.items():
                for phase, milliseconds in by_phase(phases, device).items():
                    samples[name].phases[phase].append(milliseconds)
    return samples


def end_to_end(sides: Mapping[str, Phases], device: Device, steps: int, samples: dict[str, Samples]) -> None:
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in sides}
    for _ in range(steps):
        for name, phases in sides.items():
            start, end = device.event(), device.event()
            start.record()
            samples[name].wait.append(whole(phases))
            end.record()
            marks[name].append((start, end))
            if len(sides) > 1:
                device.synchronize()
    device.synchronize()
    for name, pairs in marks.items():
        for start, end in pairs:
            end.synchronize()
            samples[name].step.append(start.elapsed_time(end))


def whole(phases: Phases) -> float:
    """One step without a wait; returns the milliseconds that the host spent in the data phase."""
    value, wait = None, 0.0
    for phase, function in phases.items():
        started = time.perf_counter_ns()
        value = function(value)
        if phase == DATA:
            wait = (time.perf_counter_ns() - started) / 1e6
    return wait


def by_phase(phases: Phases, device: Device) -> dict[str, float]:
    """One step; milliseconds of each phase."""
    value, milliseconds = None, {}
    device.synchronize()
    for phase, function in phases.items():
        started = time.perf_counter_ns()
        value = function(value)
        device.synchronize()
        milliseconds[phase] = (time.perf_counter_ns() - started) / 1e6
    return milliseconds


def over_ranks(parts: Sequence[Samples]) -> Samples:
    """The slowest rank of each step and phase."""
    return Samples(
        first=max(part.first for part in parts),
        step=slowest(part.step for part in parts),
        wait=slowest(part.wait for part in parts),
        phases={phase: slowest(part.phases[phase] for part in parts) for phase in parts[0].phases},
    )


def step_metrics(samples: Samples, images: int, devices: int) -> dict[str, Any]:
    """The metrics that every kind of step has. images: of a step over all ranks; devices: ranks."""
    rates = [1000 * images / milliseconds for milliseconds in samples.step]
    overall = 1000 * images * len(samples.step) / sum(samples.step)
    phases = {f"{phase}_ms": values for phase, values in samples.phases.items() if values}
    return {
        "step_ms": metric(samples.step, "ms"),
        "images_per_second": metric(rates, "images/s", "higher"),
        "images_per_second_per_device": metric([rate / devices for rate in rates], "images/s", "higher", gate=False),
        # over the whole pass: a rare long wait shows here, and not in the median
        "images_per_second_overall": metric([overall], "images/s", "higher", gate=False),
        "data_wait_share": metric([sum(samples.wait) / sum(samples.step)], "share", gate=False),
        **{name: metric(values, "ms", gate=False) for name, values in phases.items()},
        "compile_seconds": metric([samples.first / 1000], "s", gate=False),
    }
