"""What a run writes about itself while it trains: metrics.jsonl, evaluations.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ..errors import NonFiniteLossError
from . import distributed


class LossWindow:
    """Losses of the steps since the last log line, left on the device: adding never waits, reading does."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._steps: list[tuple[int, Tensor, list[int]]] = []

    def add(self, iteration: int, losses: dict[str, Tensor], image_ids: list[int]) -> None:
        self.names = list(losses)
        self._steps.append((iteration, torch.stack([loss.detach().float() for loss in losses.values()]), image_ids))

    def read(self) -> dict[str, float]:
        """The means over the steps and ranks since the last reading, and their sum `loss`. Waits for the device.

        Raises:
            NonFiniteLossError: on every rank, when a step of any rank had a NaN or infinite loss.
        """
        values = torch.stack([losses for _, losses, _ in self._steps])
        problem = distributed.first_message(self._non_finite(values.cpu()))
        if problem is not None:
            raise NonFiniteLossError(problem)
        means = distributed.mean(values.mean(0)).tolist()
        self._steps.clear()
        return {"loss": sum(means), **dict(zip(self.names, means))}

    def _non_finite(self, values: Tensor) -> str | None:
        bad = ~values.isfinite()
        if not bad.any():
            return None
        first = int(bad.any(1).nonzero()[0])
        iteration, _, image_ids = self._steps[first]
        names = ", ".join(f"{n} = {v:g}" for n, v, b in zip(self.names, values[first].tolist(), bad[first]) if b)
        return (
            f"iteration {iteration}: {names} on rank {distributed.rank()}, images {image_ids}; look at these images' "
            "annotations, or lower SOLVER.BASE_LR or set SOLVER.CLIP_GRADIENTS_NORM"
        )


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
