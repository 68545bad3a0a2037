"""Device: all that the package may ask of an accelerator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

import torch

from ..errors import DeviceError
from .graphs import Graphs


class Event(Protocol):
    """A mark in a device's queue of work. Between two of them, both passed, the device knows the time."""

    def record(self) -> None: ...

    def synchronize(self) -> None:
        """Wait until the device has passed the mark."""

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this mark to `end`."""


@dataclass(frozen=True)
class Device:
    """A device and its habits. The defaults suit any accelerator that torch knows by a device module.

    torch_device: with an index where the type has several.
    dist_backend: torch.distributed's backend for tensors on it.
    autocast_dtypes: low-precision types that torch.autocast takes on it, besides float32.
    grad_scaler: float16 training needs, and has, a gradient scaler.
    pinned_memory: copies from pinned host memory run beside the computation.
    channels_last: convolutions are faster with the channels innermost.
    compacts: padded rows are dropped before the heads (see structures.flatten_valid): right where reading a size
        from the device costs nothing, wrong where it stalls a queue. Where it is False, a training step waits for
        nothing, and the loader pads the numbers of objects and polygon points to powers of two: shapes repeat.
    mirrors_images: it mirrors training images itself, so that data workers need not.
    fused_optimizer: torch.optim's `fused=True` works on it.
    graph_type: the class of its module that records work as a graph; empty where it has none. See `graphs`.
    bias_apart: torch adds a convolution's bias, and sums its gradient, in passes of their own (for counting them).
    gradient_views: its optimizers work on gradients that are views of the buffers which ranks exchange.
    optimizers: optimizers of the device's own, by SOLVER.OPTIMIZER's name; they replace torch's.
    """

    torch_device: torch.device
    dist_backend: str = "gloo"
    autocast_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    grad_scaler: bool = True
    pinned_memory: bool = False
    channels_last: bool = False
    compacts: bool = False
    mirrors_images: bool = False
    fused_optimizer: bool = False
    graph_type: str = ""
    bias_apart: bool = False
    gradient_views: bool = True
    optimizers: dict[str, Callable[..., torch.optim.Optimizer]] = field(default_factory=dict)

    @property
    def type(self) -> str:
        return self.torch_device.type

    @property
    def module(self) -> ModuleType:
        """torch's module for this device type, with the names of the accelerator interface."""
        return torch.get_device_module(self.torch_device)

    @property
    def name(self) -> str:
        """The hardware's own name."""
        describe = getattr(self.module, "get_device_name", None)
        return describe(self.torch_device) if describe else self.type

    def activate(self) -> None:
        """Make it this process's current device."""
        if self.torch_device.index is not None:
            torch.accelerator.set_device_index(self.torch_device.index)

    def time_convolutions(self, wanted: bool) -> None:
        """Whether the library of convolutions times its algorithms for every new shape and keeps the fastest: a gain
        where shapes repeat, a stall at each batch where they do not. Nothing where it has no such choice."""

    def synchronize(self) -> None:
        """Wait until all work queued on the device is done."""
        self.module.synchronize()

    def pin(self, memory: torch.Tensor) -> bool:
        """Pin host memory where it lies, until `unpin`. False where that cannot be, or not now."""
        return False

    def unpin(self, memory: torch.Tensor) -> None:
        """End what `pin` began; copies from the memory are done."""

    def max_memory_mb(self) -> float:
        """The most memory allocated on the device so far, in MB (2^20 bytes); 0 where the device does not tell."""
        peak = getattr(self.module, "max_memory_allocated", None)
        return peak() / 2**20 if peak else 0.0

    def reset_peak_memory(self) -> None:
        """Let max_memory_mb count from here; nothing where the device does not tell it."""
        reset = getattr(self.module, "reset_peak_memory_stats", None)
        if reset:
            reset()

    def library_versions(self) -> dict[str, Any]:
        """Of the libraries that torch was built with; None where it was built without."""
        return {"cuda": torch.version.cuda or torch.version.hip, "cudnn": torch.backends.cudnn.version()}

    def clocks(self) -> dict[str, Any]:
        """Clock rates now, and what throttles the device, as far as it can be read: for the record of a measurement."""
        return {}

    def event(self) -> Event:
        """A mark to put into the device's queue of work, for timing without a wait."""
        return self.module.Event(enable_timing=True)

    def graphs(self) -> Graphs:
        """For work that is recorded and replayed; SOLVER.GRAPH_CAPTURE's steps.

        Raises:
            DeviceError: the device records none.
        """
        if not self.graph_type:
            raise DeviceError(f"device {self.type} cannot record work as a graph; set SOLVER.GRAPH_CAPTURE to False")
        return Graphs(self.module, self.graph_type)

    def copy_stream(self) -> Any | None:
        """A stream for copies beside the computation, by the device module; None where there is no pinned memory, from
        which alone they run so."""
        return self.module.Stream() if self.pinned_memory else None

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager:
        """torch.autocast in `dtype`; nothing for float32."""
        if dtype == torch.float32:
            return nullcontext()
        if dtype not in self.autocast_dtypes:
            known = ", ".join(str(d).removeprefix("torch.") for d in self.autocast_dtypes)
            raise DeviceError(
                f"DTYPE {str(dtype).removeprefix('torch.')} is not for device {self.type}; it takes {known}"
            )
        return torch.autocast(self.type, dtype=dtype)
