"""What a run writes about itself while it trains: metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

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
        problem = distributed.first_message(self.problem())
        if problem is not None:
            raise NonFiniteLossError(problem)
        means = distributed.mean(values.mean(0)).tolist()
        self._steps.clear()
        return {"loss": sum(means), **dict(zip(self.names, means))}

    def problem(self) -> str | None:
        """What is wrong with this rank's losses since the last reading, if anything. Waits for the device."""
        if not self._steps:
            return None
        values = torch.stack([losses for _, losses, _ in self._steps]).cpu()
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
    """metrics.jsonl and events.out.tfevents.* of a run directory, on the main rank; elsewhere it writes nothing.

    A resumed run cuts the lines after `iteration`: the steps that are trained again.
    """

    def __init__(self, directory: Path, tensorboard: bool, iteration: int) -> None:
        self._file = self._events = None
        if not distributed.is_main():
            return
        path = directory / "metrics.jsonl"
        kept = (
            [line for line in path.read_text().splitlines() if _iteration(line) <= iteration] if path.exists() else []
        )
        path.write_text("".join(line + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed by close)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import, so only where it is used

            self._events = SummaryWriter(str(directory), purge_step=iteration + 1)

    def write(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl; every number in it but `iter` becomes a TensorBoard scalar."""
        if self._file is None:
            return
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self.scalars(line["iter"], {k: v for k, v in line.items() if k != "iter"})

    def scalars(self, iteration: int, values: dict[str, float | None]) -> None:
        if self._events is not None:
            for name, value in values.items():
                if value is not None and math.isfinite(value):
                    self._events.add_scalar(name, value, iteration)
            self._events.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def _iteration(line: str) -> float:
    try:
        return float(json.loads(line)["iter"])
    except (ValueError, KeyError, TypeError):  # the half line of a killed run
        return math.inf
