"""Ranks: one process a device, started by torchrun. Everything works alike on one rank without it."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..device import Device
from ..errors import UserError
from .watch import Watch

T = TypeVar("T")

# Seconds that ranks wait for each other where nothing watches over them, and that a collective waits longer than the
# watch does, which knows the name of the rank that did not come
WAIT, LATER = 3600, 60


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


@contextmanager
def process_group(device: Device, timeout: float | None = None) -> Iterator[None]:
    """Joins the other ranks that torchrun started; leaves them at the end. Alone, it does nothing.

    timeout: seconds without progress, as watch.at tells it, after which the run ends with the name of the rank that the
    others wait for. None: nothing watches.
    """
    device.activate()
    if "RANK" not in os.environ:
        yield
        return
    die_with_parent()
    store, rank, ranks = _meeting_place()
    name = _common_name(store, rank, ranks)
    wait = timedelta(seconds=timeout + LATER if timeout else WAIT)
    own = dist.PrefixStore(name, store)
    dist.init_process_group(device.dist_backend, timeout=wait, store=own, rank=rank, world_size=ranks)
    try:
        with Watch(timeout, name) if timeout else nullcontext():
            yield
            dist.barrier()  # a rank that leaves while another still works takes its connections with it
    finally:
        gc.collect()  # DistributedDataParallel and the group hold each other, and its threads outlive it otherwise
        dist.destroy_process_group()


@functools.cache
def _meeting_place() -> tuple[dist.Store, int, int]:
    """The store that torchrun's variables name, this process's rank, and the number of ranks."""
    return next(dist.rendezvous("env://", timeout=timedelta(seconds=WAIT)))


def _common_name(store: dist.Store, rank: int, ranks: int) -> str:
    """A name for the group that these ranks are about to form, which no other group has had.

    torchrun's store outlives the ranks that it starts anew, and under a name of before a rank would read where a former
    one listened, and be refused. TORCHELASTIC_RESTART_COUNT is no name: it differs between nodes.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"hello/{rank}", own)
        name = store.get(f"welcome/{own}").decode()
        store.set(f"{name}/here/{rank}", b"")
        return name
    missing, end = set(range(1, ranks)), time.monotonic() + WAIT
    while missing:
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):  # perhaps a former rank's, so again and again until it is here
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", own)
            if store.check([f"{own}/here/{other}"]):
                missing.remove(other)
        if time.monotonic() > end:
            raise RuntimeError(f"Timed out waiting {WAIT} seconds for ranks {sorted(missing)}")
        time.sleep(0.01)
    return own


def die_with_parent() -> None:
    """Ranks have sessions of their own, so a killed torchrun would leave them training; Linux can end them with it."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of sys/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def restarted() -> bool:
    """Whether torchrun has started these ranks anew (--max-restarts): then the run resumes without being asked to. It
    counts on the node where a rank failed, and not on those that start anew with it."""
    return any(all_values(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0))


def gather(value: Any) -> list[Any] | None:
    """Every rank's (picklable) value, by rank, on the main rank; None on the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values


def broadcast(value: Any) -> Any:
    """The main rank's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def from_main(make: Callable[[], T]) -> T:
    """What `make` gives on the main rank, on every rank; or the UserError that it raised there, so that none waits."""
    if not dist.is_initialized():
        return make()
    outcome: T | UserError | None = None
    if is_main():
        try:
            outcome = make()
        except UserError as error:
            outcome = error
    outcome = broadcast(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def mean(tensor: Tensor) -> Tensor:
    """The mean over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def share(tensors: Iterable[Tensor]) -> None:
    """Gives every rank the main rank's values."""
    for tensor in tensors:
        values = tensor.detach().contiguous()  # NCCL takes no strides of other kinds
        dist.broadcast(values, 0)
        tensor.detach().copy_(values)


def share_buffers(model: nn.Module) -> None:
    """Gives every rank the main rank's running statistics, so that all evaluate the model that is saved."""
    if dist.is_initialized() and any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        share(model.buffers())


def all_values(value: T) -> list[T]:
    """Every rank's (picklable) value, by rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def first_message(message: str | None) -> str | None:
    """The message of the lowest rank that has one, on every rank: how ranks decide together to stop."""
    return next((m for m in all_values(message) if m is not None), None)


def seed_step(seed: int, iteration: int, of_rank: int | None = None) -> None:
    """Seeds this rank's (or `of_rank`'s) generators for one step, from (seed, iteration, rank) alone: a resumed run
    draws what the uninterrupted one would have drawn, and there is no generator state to save."""
    mixed = (seed * 1_000_003 + iteration) * 1_009 + (rank() if of_rank is None else of_rank)
    torch.manual_seed(mixed % 2**63)
