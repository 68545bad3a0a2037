"""A double of a device's graphs, on the CPU: operators are recorded, and replayed on the very tensors they were given.

As on an accelerator, nothing of Python runs again in a replay, a number that the host passed stays what it was, and
what was written lies where it lay; so a step that relies on the host computes something else when it is replayed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.device.cpu import CpuDevice


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, list[Tensor]]] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, tensors_in(result)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for operator, args, kwargs, results in self.calls:
            for old, new in zip(results, tensors_in(operator(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():  # else a view, or written in place
                    old.copy_(new)


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class RecordedGraphs:
    """captures: recorders in their order. replays: which of them ran, in turn. eager: steps beside them."""

    def __init__(self) -> None:
        self.captures: list[Recorder] = []
        self.replays: list[int] = []
        self.eager = 0

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        self.eager += 1
        yield

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Here recording does the work, so the first replay has nothing left to do."""
        number, recorder = len(self.captures), Recorder()
        with recorder:
            result = work()
        self.captures.append(recorder)

        def replay() -> None:
            if number in self.replays:
                recorder.replay()
            self.replays.append(number)

        return replay, result


@dataclasses.dataclass(frozen=True)
class GraphDevice(CpuDevice):
    made: RecordedGraphs = dataclasses.field(default_factory=RecordedGraphs)

    def graphs(self) -> RecordedGraphs:
        return self.made


def graph_device(**changes) -> GraphDevice:
    """The CPU in fixed-shape mode, with graphs."""
    cpu = get_device("cpu")
    known = {field.name: getattr(cpu, field.name) for field in dataclasses.fields(cpu)}
    return GraphDevice(**{**known, "compacts": False, "graph_type": "RecordedGraph", **changes})
