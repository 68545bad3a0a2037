"""Batches on their way to the device: copied one ahead, beside the computation, from memory that is filled again."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace

from ..device import Device
from ..device.base import Event
from ..structures import ImageBatch, Targets

Batch = tuple[ImageBatch, Targets]
# Batches that may be on their way to the device at once
IN_FLIGHT = 3


def transfer(batches: Iterable[Batch], device: Device) -> Iterator[Batch]:
    """The same batches on the device, always copied: the memory they come from is filled again.

    When one is handed out the copy of the next one is under way, where the device can on a stream of its own. That
    waits for the computation queued before it, which may still read the memory that it writes: batch n + 2 is copied
    beside step n + 1. No more than IN_FLIGHT copies are queued, so that a slot's copy is done before a worker gets it
    for a new batch.
    """
    module, stream = device.module, device.copy_stream()
    copies: deque[Event] = deque()
    ready: tuple[Batch, Event] | None = None
    for batch in itertools.chain(batches, [None]):
        following = None
        if batch is not None:
            if stream is not None:
                stream.wait_stream(module.current_stream())
            with module.stream(stream) if stream is not None else nullcontext():
                following = _copy(batch, device), device.event()
                following[1].record()
            copies.append(following[1])
            if len(copies) == IN_FLIGHT:
                copies.popleft().synchronize()
        if ready is not None:
            if stream is not None:
                module.current_stream().wait_event(ready[1])  # what the caller queues from now on comes after the copy
            yield ready[0]
        ready = following


def _copy(batch: Batch, device: Device) -> Batch:
    images, targets = batch
    pixels = images.pixels.to(device.torch_device, non_blocking=True, copy=True)
    moved = replace(images, pixels=pixels[:0]).to(device.torch_device, non_blocking=True)
    moved = replace(moved, pixels=pixels)
    if moved.to_mirror is not None:
        moved = moved.mirrored(moved.to_mirror)
    return moved, targets.to(device.torch_device, non_blocking=True)
