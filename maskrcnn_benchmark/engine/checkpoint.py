"""A run's state on disk: tensors and plain metadata, read with weights_only, written whole or not at all."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..models.weights import check_match

logger = logging.getLogger(__name__)

LAST = "last_checkpoint"
KEYS = {"model", "optimizer", "scaler", "iteration", "best", "config", "category_ids", "category_names", "world_size"}


def write_atomically(path: Path, write) -> None:
    """`write(file)` into a temporary file beside `path`, then one rename: `path` is the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save(directory: Path, name: str, content: dict[str, Any], last: bool = True) -> Path:
    """Writes `directory/name` and, with `last`, makes it the one that --resume takes."""
    path = directory / name
    write_atomically(path, lambda file: torch.save(content, file))
    if last:
        write_atomically(directory / LAST, lambda file: file.write(name.encode()))
    return path


def forget(directory: Path) -> None:
    """A fresh run in a used directory: --resume must not take the former run's checkpoint for this one's."""
    marker = directory / LAST
    if marker.is_file():
        logger.warning(
            "%s holds a run already; its checkpoints stay until files of the same names replace them", directory
        )
        marker.unlink()


def read(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, on the CPU.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint of this project.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a damaged file makes it stumble over
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"cannot read checkpoint {path}: {reason} ({type(error).__name__})") from error
    if not isinstance(content, dict) or not content.keys() >= KEYS:
        raise CheckpointError(f"{path} is not a checkpoint of maskrcnn_benchmark; use it as MODEL.WEIGHT instead")
    return content


def last(directory: Path) -> Path | None:
    """The checkpoint that --resume continues from, or None in a fresh directory."""
    marker = directory / LAST
    return directory / marker.read_text().strip() if marker.is_file() else None


def load_model(model: nn.Module, content: dict[str, Any], path: Path) -> None:
    """The checkpoint's weights, name for name and shape for shape."""
    state = content["model"]
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path}: its model is no set of tensors by name")
    check_match(state, model.state_dict(), str(path))
    model.load_state_dict(state)
