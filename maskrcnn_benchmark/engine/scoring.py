"""Scores results in this process, or in one of its own while training goes on: the same function on the same values."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from yacs.config import CfgNode

from ..device import Device
from ..evaluation.results import Results
from ..evaluation.score import score
from ..report.accuracy import accuracy_page
from . import distributed
from .checkpoint import write_atomically

# Results that are turned into text at a time
_A_PIECE = 10_000


@dataclass
class Request:
    """Results of one data set, and how to judge them. Picklable. path: of the results' JSON; files of the same name
    with _details.json and _details.html are written beside it."""

    name: str
    ground_truth: str | dict[str, Any]
    image_ids: list[int]
    results: Results
    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    evaluator: str
    path: Path
    keypoint_sigmas: tuple[float, ...] = ()


def run(requests: list[Request]) -> list[dict[str, Any]]:
    """The scores of each request; writes its files."""
    every = []
    for request in requests:
        started = time.perf_counter()
        write_results(request.results, request.path)
        arguments = (request.ground_truth, request.results, request.tasks, request.metrics, request.evaluator)
        scores, details = score(*arguments, request.image_ids, request.keypoint_sigmas)
        page = accuracy_page(f"{request.name}: accuracy", details)
        for suffix, text in ((".json", json.dumps(details)), (".html", page)):
            path = request.path.with_name(f"{request.path.stem}_details{suffix}")
            write_atomically(path, lambda file, text=text: file.write(text.encode()))
        every.append(scores | {"images": len(request.image_ids), "eval_seconds": time.perf_counter() - started})
    return every


def write_results(results: Results, path: Path) -> None:
    """COCO's results format, piece by piece: half a million dicts and their text would take 2 GB at once."""

    def write(file) -> None:
        for start in range(0, len(results), _A_PIECE):
            part = results.select(np.arange(start, min(start + _A_PIECE, len(results)))).to_list()
            file.write((("," if start else "[") + json.dumps(part)[1:-1]).encode())
        file.write(b"]" if len(results) else b"[]")

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


def overlaps(cfg: CfgNode, device: Device) -> bool:
    """Whether TEST.OVERLAP lets training go on while results are scored."""
    may_stop = cfg.MLPERF.MIN_BBOX_MAP or cfg.MLPERF.MIN_SEGM_MAP or cfg.SOLVER.EARLY_STOP_PATIENCE
    if cfg.TEST.OVERLAP == "never" or may_stop:
        return False
    if cfg.TEST.OVERLAP == "always":
        return True
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return device.type != "cpu" and cores > ranks_here * (1 + cfg.DATALOADER.NUM_WORKERS)


class Background:
    """One process that scores, started with the first request. Spawned: a fork would copy the device's threads and
    locks."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, requests: list[Request]) -> Future:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_give_way)
        return self._pool.submit(run, requests)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _give_way() -> None:
    """Training goes first where cores are scarce after all; and Ctrl-C is for it, which then ends this process."""
    distributed.die_with_parent()  # it holds both ends of its queue, and would wait for a killed run for ever
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(10)
