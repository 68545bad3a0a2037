"""Signs of life: where each rank is, told to the others by a thread that runs on when the rank itself is stuck.

A rank that waits in a collective can neither look around nor be interrupted. So each tells torchrun's store every
second where it is; who waits too long can then name the rank that the others wait for.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NoReturn

import torch.distributed as dist

from ..errors import Terminated

logger = logging.getLogger(__name__)

# Seconds between signs of life; without one for so long a rank is frozen, or its machine is gone
BEAT, SILENT = 1.0, 10.0
# A rank that SIGTERM has not ended by then is stuck; torchrun would kill it after 30 seconds
GRACE = 20.0
# A step in the order in which a rank goes through it
PHASES = ("starting", "reading data", "computing", "exchanging losses", "evaluating", "writing a checkpoint")


@dataclass
class Place:
    """Where this rank is: finished steps, one of PHASES, and since when (time.time)."""

    iteration: int = 0
    phase: str = PHASES[0]
    since: float = field(default_factory=time.time)


_here = Place()


def at(phase: str, iteration: int | None = None) -> None:
    """This rank has come to `phase` of the step after `iteration` finished ones (None: of the same)."""
    _here.iteration = _here.iteration if iteration is None else iteration
    _here.phase, _here.since = phase, time.time()


class Termination:
    """SIGTERM as an exception, raised only where the state of the run is whole: between two steps.

    Only the main rank raises it: it alone writes, and what it has after a step is what every rank has. Others that left
    in the middle of its step would spoil that; they go when it has gone.
    """

    def __init__(self) -> None:
        self.asked = False
        self._main = self._whole = False

    def __enter__(self) -> Termination:
        self._main = not dist.is_initialized() or dist.get_rank() == 0
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, kind, *_) -> None:
        if threading.current_thread() is threading.main_thread():
            # torchrun sends another one when the first rank has gone, perhaps while the main rank still saves
            signal.signal(signal.SIGTERM, signal.SIG_IGN if kind is Terminated else self._former)

    def _handle(self, *_) -> None:
        self.asked = True
        _asked.set()
        if self._whole:
            self._whole = False  # a second signal must not interrupt the first one's work
            raise Terminated("SIGTERM")

    def between_steps(self) -> _Whole:
        """While this is active, SIGTERM raises Terminated at once; one that came before raises it now."""
        return _Whole(self)


@dataclass
class _Whole:
    termination: Termination

    def __enter__(self) -> None:
        self.termination._whole = self.termination._main
        if self.termination.asked and self.termination._whole:
            self.termination._whole = False
            raise Terminated("SIGTERM")

    def __exit__(self, *_) -> None:
        self.termination._whole = False


_asked = threading.Event()


class Watch:
    """The thread of one rank among several. timeout: seconds without progress after which the run ends. group: their
    common name.

    It ends this process, with a line that says why, where the main thread cannot: when no rank has moved for `timeout`,
    when the main rank has left after SIGTERM, or when SIGTERM itself does not come through.
    """

    def __init__(self, timeout: float, group: str) -> None:
        self.timeout = timeout
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, is_master=False, wait_for_workers=False)  # the group's own may be blocked
        self._store = dist.PrefixStore(f"{group}/watch", store)
        self._ended = threading.Event()
        self._signals, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._former = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        at("starting", 0)
        self._thread.start()
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is Terminated:
            with suppress(RuntimeError):  # the store may be gone already
                self._store.set("left", b"1")
                time.sleep(2 * BEAT)  # so that the others end by this, and not by a lost connection
        self._ended.set()
        signal.set_wakeup_fd(self._former)
        os.write(self._wake, b"\0")
        self._thread.join()
        os.close(self._wake)
        os.close(self._signals)

    def _run(self) -> None:
        signalled = None
        while not self._ended.is_set():
            try:
                self._beat()
            except RuntimeError:  # the store is gone, and with it torchrun or the main rank, which ends this one
                return
            if select.select([self._signals], [], [], BEAT)[0] and bytes([signal.SIGTERM]) in os.read(
                self._signals, 4096
            ):
                signalled = signalled or time.monotonic()
            if signalled and time.monotonic() - signalled > GRACE and _here.phase != "writing a checkpoint":
                self._end(143, f"{GRACE:.0f} seconds after SIGTERM this rank was still {_here.phase}")

    def _beat(self) -> None:
        here = [_here.iteration, _here.phase, _here.since, time.time(), socket.gethostname(), os.getpid()]
        self._store.set(str(self.rank), json.dumps(here))
        if self.rank and _asked.is_set():
            self._store.set("asked", b"1")
        if self.rank == 0 and not _asked.is_set() and self._store.check(["asked"]):
            os.kill(os.getpid(), signal.SIGTERM)  # what another rank was told
        if self.rank and self._store.check(["left"]):
            self._end(143, "SIGTERM: the main rank has saved the run")
        if time.time() - _here.since > self.timeout:
            self._end(1, f"no progress for {self.timeout:g} seconds: the ranks wait for {self._culprits()}")

    def _culprits(self) -> str:
        """The ranks that are silent; if none is, those that are furthest behind."""
        places = {}
        for rank in range(self.ranks):
            if self._store.check([str(rank)]):
                places[rank] = json.loads(self._store.get(str(rank)))
        missing = [f"rank {rank}, which never came" for rank in range(self.ranks) if rank not in places]
        silent = [rank for rank, place in places.items() if time.time() - place[3] > SILENT]
        order = {rank: (place[0], PHASES.index(place[1])) for rank, place in places.items()}
        behind = silent or [rank for rank in places if order[rank] == min(order.values())]
        return "; ".join(missing or [self._describe(rank, places[rank], rank in silent) for rank in behind])

    @staticmethod
    def _describe(rank: int, place: list, silent: bool) -> str:
        iteration, phase, since, alive, host, pid = place
        now = time.time()
        gone = f", and has given no sign of life for {now - alive:.0f} s" if silent else ""
        where = f"{phase} after iteration {iteration}, for {now - since:.0f} s"
        return f"rank {rank} (process {pid} on {host}), which is {where}{gone}"

    def _end(self, status: int, message: str) -> NoReturn:
        logger.error(message)
        sys.stderr.write(f"error on rank {self.rank}: {message}\n")
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)  # the main thread is inside a collective, where no exception reaches it
