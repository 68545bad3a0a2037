"""Timing callables side by side: interleaved in one process, raw samples kept, statistics that say what they are."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..device import Device

# Of an interval, and how many resamples it is drawn from.
CONFIDENCE = 0.95
RESAMPLES = 2000
METHOD = (
    "monotonic wall clock around one call, device synchronized before and after; functions take turns; the garbage"
    " collector is off; warm-up rounds are left out; percentiles interpolate linearly between samples; the interval is"
    f" a {CONFIDENCE:.0%} bootstrap over rounds of the ratio of medians"
)


@dataclass(frozen=True)
class Plan:
    """How many rounds to measure; in a round each function runs once.

    warmup: rounds before the first sample, left out of every figure. repeats: measured rounds, or None for as many as
    `budget_seconds` allow, between `least` and `most`. `least` is at least 1.
    """

    warmup: int = 2
    repeats: int | None = None
    budget_seconds: float = 4.0
    least: int = 7
    most: int = 200

    def wants_more(self, rounds: int, seconds: float) -> bool:
        """Whether another round is due after `rounds` that took `seconds`."""
        if self.repeats is not None:
            return rounds < self.repeats
        return rounds < self.least or (rounds < self.most and seconds < self.budget_seconds)


def interleave(
    functions: Mapping[str, Callable[[], object]], synchronize: Callable[[], None], plan: Plan
) -> dict[str, list[int]]:
    """Nanoseconds of each call, by function name, in the order measured: first, second, first, second, ...

    Taking turns lets a slow spell of the machine fall on all functions alike. `synchronize` waits for the device's
    queued work; it is called before and after each call. What a call returns is freed after its sample.
    """
    samples: dict[str, list[int]] = {name: [] for name in functions}
    with quiet_garbage_collector():
        for _ in range(plan.warmup):
            for function in functions.values():
                nanoseconds(function, synchronize)
        rounds, started = 0, time.perf_counter()
        while plan.wants_more(rounds, time.perf_counter() - started):
            for name, function in functions.items():
                samples[name].append(nanoseconds(function, synchronize))
            rounds += 1
    return samples


def nanoseconds(function: Callable[[], object], synchronize: Callable[[], None]) -> int:
    """How long one call takes, work queued on the device included."""
    synchronize()
    start = time.perf_counter_ns()
    result = function()
    synchronize()
    elapsed = time.perf_counter_ns() - start
    del result
    return elapsed


@contextlib.contextmanager
def quiet_garbage_collector() -> Iterator[None]:
    """Collects once, then keeps the collector from running inside; restores what was."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def slowest(ranks: Iterable[Sequence[float]]) -> list[float]:
    """Of each sample the slowest rank's: the others wait for it."""
    return [max(values) for values in zip(*ranks)]


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile, 0..100, of the samples, linear between the two nearest (numpy's "linear", Hyndman-Fan 7)."""
    return float(np.percentile(np.asarray(samples, dtype=np.float64), q, method="linear"))


def milliseconds(samples_ns: Sequence[int]) -> dict[str, float]:
    """p50 (the median), p90 and p99 of the samples, in milliseconds."""
    return {f"p{q}": percentile(samples_ns, q) / 1e6 for q in (50, 90, 99)}


def ratio_of_medians(numerator: Sequence[int], denominator: Sequence[int]) -> tuple[float, float, float]:
    """median(numerator) / median(denominator) with the ends of its interval.

    The samples of a round belong together (the machine was the same for both), so the bootstrap draws rounds. Its
    random numbers are the same in every call.
    """
    both = np.stack([np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)])
    rounds = both.shape[1]
    drawn = np.random.default_rng(0).integers(rounds, size=(RESAMPLES, rounds))
    above, below = np.median(both[:, drawn], axis=2)
    tail = 50 * (1 - CONFIDENCE)
    above_all, below_all = np.median(both, axis=1)
    ratios = above / below
    return float(above_all / below_all), percentile(ratios, tail), percentile(ratios, 100 - tail)


def extra_memory_mb(function: Callable[[], object], device: Device) -> float | None:
    """The most memory that one call holds on top of what was there, in MB (2^20 bytes), its result included.

    None on a device whose allocator does not count, such as the CPU.
    """
    reset = getattr(device.module, "reset_peak_memory_stats", None)
    if reset is None:
        return None
    device.synchronize()
    reset()
    before = device.module.memory_allocated()
    function()
    device.synchronize()
    return device.max_memory_mb() - before / 2**20
