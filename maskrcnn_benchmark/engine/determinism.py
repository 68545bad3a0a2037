"""What makes a run repeatable: only operators that repeat themselves, and a record of the order of images."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from yacs.config import CfgNode

from ..data.loader import TrainLoader
from ..device import Device
from ..errors import DeviceError
from . import distributed
from .checkpoint import write_atomically

ORDER = "data_order.json"
# Runs of a few images have many thousand epochs; those after these follow from the seed as these do
EPOCHS = 100
_WARNING = re.compile(r"(.+?) does not have a deterministic implementation")


def require() -> None:
    """From here on torch takes deterministic algorithms only."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS has none without it
    torch.use_deterministic_algorithms(True)


def settle_convolutions(cfg: CfgNode, device: Device) -> None:
    """Their algorithms are chosen by time where INPUT.FIXED_SHAPES make shapes repeat. Not with DETERMINISTIC: what is
    chosen may differ from run to run, and with it the last digits."""
    device.time_convolutions(bool(cfg.INPUT.FIXED_SHAPES) and not cfg.DETERMINISTIC)


@contextmanager
def all_at_once(active: bool, device: Device) -> Iterator[None]:
    """Around a run's first step: torch would stop at the first operator that has no deterministic algorithm.

    Raises:
        DeviceError: with the names of all of them.
    """
    if not active:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    torch.use_deterministic_algorithms(True)
    found = {match[1] for warning in caught if (match := _WARNING.match(str(warning.message)))}
    for warning in caught:
        if not _WARNING.match(str(warning.message)):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if found:
        raise DeviceError(
            f"DETERMINISTIC is True, but on {device.name} these operators have no deterministic algorithm: "
            f"{', '.join(sorted(found))}; set it to False, or use another device"
        )


def record_order(cfg: CfgNode, output: Path, loader: TrainLoader, image_ids: list[int], total: int) -> None:
    """OUTPUT_DIR/data_order.json, on the main rank: the seeds, and a digest of each epoch's images in their order (with
    DETERMINISTIC the image ids too), batch by batch; batch b goes to rank b modulo the ranks."""
    if not distributed.is_main():
        return
    ids, epochs = np.array(image_ids, np.int64), []
    for epoch in range(min(EPOCHS, -(-total * cfg.SOLVER.ACCUMULATE_STEPS // loader.iterations_per_epoch))):
        order = ids[loader.images[loader.sampler.order(epoch)]]
        record = {"epoch": epoch, "sha256": hashlib.sha256(order.tobytes()).hexdigest()}
        epochs.append(record | ({"image_ids": order.tolist()} if cfg.DETERMINISTIC else {}))
    content = {
        "seed": cfg.SEED,
        "seed_of_a_step": "(SEED * 1000003 + iteration) * 1009 + rank",
        "seed_of_an_image": "(SEED, epoch, place in the epoch), whichever worker reads it",
        "deterministic": cfg.DETERMINISTIC,
        "world_size": distributed.world_size(),
        "images_per_batch": loader.sampler.batch_size,
        "epochs": epochs,
    }
    write_atomically(output / ORDER, lambda file: file.write(json.dumps(content).encode()))
