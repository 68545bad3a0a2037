"""What a run writes about itself while it trains: metrics.jsonl, evaluations.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import logging
import math
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ..device import Device
from ..device.base import Event
from . import distributed
from .nonfinite import BadStep

logger = logging.getLogger(__name__)


class LossWindow:
    """Losses of the steps since the last log line, left on the device: adding never waits, reading does.

    policy, allowed: Guard's. skipped: steps that were left out so far; skipped_now: in the last window.
    """

    def __init__(self, policy: str = "stop", allowed: int = 0) -> None:
        self.policy, self.allowed, self.skipped, self.skipped_now = policy, allowed, 0, 0
        self.names: list[str] = []
        self._steps: list[tuple[int, Tensor, list[int]]] = []

    def add(self, iteration: int, losses: dict[str, Tensor], image_ids: list[int], left_out: Tensor) -> None:
        """left_out: 0-dim, Guard's of this step."""
        self.names = list(losses)
        row = torch.stack([*(loss.detach().float() for loss in losses.values()), left_out])
        self._steps.append((iteration, row, image_ids))

    def read(self) -> dict[str, float]:
        """The means over the steps and ranks since the last reading, and their sum `loss`. Waits for the device.

        Raises:
            BadStep: on every rank, for the first step that must not be: with a NaN or infinite loss or gradient of any
                rank, unless the policy leaves it out.
        """
        rows = torch.stack([row for _, row, _ in self._steps])
        host = rows.cpu()
        left_out = host[:, -1] > 0  # the same on all ranks
        lost = torch.tensor(distributed.all_values(self._lost(host).tolist())).any(0)
        tolerated = {"skip": left_out, "scale": left_out & ~lost}.get(self.policy, torch.zeros_like(lost))
        if self.policy == "skip":
            tolerated = tolerated & (self.skipped + left_out.cumsum(0) <= self.allowed)
        fatal = (left_out | lost) & ~tolerated
        if fatal.any():
            raise self._bad(host, int(fatal.nonzero()[0]))
        self.skipped_now = int(tolerated.sum())
        self.skipped += self.skipped_now
        for number in (tolerated & (self.policy == "skip")).nonzero().flatten().tolist():
            iteration, _, image_ids = self._steps[number]
            logger.warning("iteration %d is left out: its gradient is not finite; images %s", iteration, image_ids)
        if (tolerated & lost).any():
            rows = rows[(~(tolerated & lost)).nonzero().flatten().tolist()]
        means = distributed.mean(rows[:, :-1].mean(0)).tolist()
        self._steps.clear()
        return {"loss": sum(means), **dict(zip(self.names, means))}

    def problem(self) -> str | None:
        """What is wrong with this rank's steps since the last reading, if anything. Waits for the device."""
        for iteration, row, _ in self._steps:
            left_out = bool(row[-1]) and self.policy in ("stop", "none")
            if left_out or (self.policy != "skip" and self._lost(row[None].cpu()).any()):
                return f"not saved: the losses or gradients of iteration {iteration} are not finite"
        return None

    @staticmethod
    def _lost(rows: Tensor) -> Tensor:
        return ~rows[:, :-1].isfinite().all(1)

    def _bad(self, rows: Tensor, number: int) -> BadStep:
        iteration, _, image_ids = self._steps[number]
        return BadStep(iteration, image_ids, dict(zip(self.names, rows[number].tolist())))


# What a step does on the device, in this order
PHASES = ("forward", "backward", "optimizer")


class Pace:
    """Where a rank's time goes: to reading data, to the phases of a step on the device, to what lies between steps.

    marked: False where steps are captured as graphs, whose phases nothing can tell apart.
    """

    def __init__(self, device: Device, marked: bool = True) -> None:
        self._device, self._marked = device, marked
        self._steps: list[tuple[float, float]] = []
        self._marks: list[tuple[str, Event, Event]] = []
        self._asides: list[tuple[str, float]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around one of PHASES; marks in the device's queue, no waiting. None in a step that is captured as a graph."""
        if not self._marked:
            yield
            return
        begin, end = self._device.event(), self._device.event()
        begin.record()
        yield
        end.record()
        self._marks.append((name, begin, end))

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Around what the host does between steps: `log` or `checkpoint`."""
        begin = time.perf_counter()
        yield
        self._asides.append((name, time.perf_counter() - begin))

    def add(self, step_seconds: float, data_seconds: float) -> None:
        """One step: its whole time, and the part of it spent waiting for data."""
        self._steps.append((step_seconds, data_seconds))

    def read(self) -> dict[str, float]:
        """Seconds a step, means since the last reading: `step`, `data`, PHASES where they are marked, `log`,
        `checkpoint`. To be called where the device has been waited for."""
        sums = dict.fromkeys(("step", "data", *(PHASES if self._marked else ()), "log", "checkpoint"), 0.0)
        for step, data in self._steps:
            sums["step"] += step
            sums["data"] += data
        for name, begin, end in self._marks:
            sums[name] += begin.elapsed_time(end) / 1000
        for name, seconds in self._asides:
            sums[name] += seconds
        count = max(1, len(self._steps))
        for samples in (self._steps, self._marks, self._asides):
            samples.clear()
        return {name: seconds / count for name, seconds in sums.items()}


def stragglers(own: dict[str, float], share: float) -> list[str]:
    """The ranks for which the others waited more than `share` of their steps, on every rank. own: of Pace.read.

    Reading data and going forward are what a rank does by itself: in the rest it has the time of the slowest one.
    """
    ranks = distributed.all_values((socket.gethostname(), own["step"], own["data"], own.get("forward", 0.0)))
    slow = []
    for rank, (host, step, data, forward) in enumerate(ranks):
        others = [d + f for r, (_, _, d, f) in enumerate(ranks) if r != rank]
        if others and data + forward - statistics.median(others) > share * step:
            slow.append(
                f"rank {rank} on {host} is slow: in a step it gets its data in {data:.3f} s and goes forward in"
                f" {forward:.3f} s, the others do both in {statistics.median(others):.3f} s"
            )
    return slow


class MetricsWriter:
    """metrics.jsonl, evaluations.jsonl and events.out.tfevents.* of a run directory, on the main rank; elsewhere it
    writes nothing.

    A resumed run cuts the lines after `iteration`: the steps that are trained again.
    """

    def __init__(self, directory: Path, tensorboard: bool, iteration: int) -> None:
        self._metrics = self._evaluations = self._events = None
        if not distributed.is_main():
            return
        self._metrics = _continue(directory / "metrics.jsonl", iteration)
        self._evaluations = _continue(directory / "evaluations.jsonl", iteration)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import, so only where it is used

            self._events = SummaryWriter(str(directory), purge_step=iteration + 1)

    def write(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl; every number in it but `iter` becomes a TensorBoard scalar."""
        self._append(self._metrics, line)

    def evaluated(self, line: dict[str, Any]) -> None:
        """One line of evaluations.jsonl: `iter`, `eval_seconds`, and the scores as TASK/NAME; scalars likewise."""
        self._append(self._evaluations, line)

    def _append(self, file: TextIO | None, line: dict[str, Any]) -> None:
        if file is None:
            return
        file.write(json.dumps(line) + "\n")
        file.flush()
        if self._events is not None:
            for name, value in line.items():
                if name != "iter" and value is not None and math.isfinite(value):
                    self._events.add_scalar(name, value, line["iter"])
            self._events.flush()

    def close(self) -> None:
        for file in (self._metrics, self._evaluations, self._events):
            if file is not None:
                file.close()


def _continue(path: Path, iteration: int) -> TextIO:
    """The file, open at its end, without the lines after `iteration`."""
    kept = [line for line in path.read_text().splitlines() if _iteration(line) <= iteration] if path.exists() else []
    path.write_text("".join(line + "\n" for line in kept))
    return open(path, "a", encoding="utf-8")


def _iteration(line: str) -> float:
    try:
        return float(json.loads(line)["iter"])
    except (ValueError, KeyError, TypeError):  # the half line of a killed run
        return math.inf
