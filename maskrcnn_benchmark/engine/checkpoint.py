"""A run's state on disk: tensors and plain metadata, read with weights_only, written whole or not at all."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..models.weights import check_match, load_plain

logger = logging.getLogger(__name__)

LAST = "last_checkpoint"
# The names of this run's checkpoints, oldest first: a damaged last one has a successor, and a former run's are not it
HISTORY = "checkpoints.txt"
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
    except (OSError, RuntimeError) as error:
        # On a full disk torch.save's writer fails once more while it ends, and that hides the first failure
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise CheckpointError(f"cannot write {path}: {cause.strerror or cause}") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_half_written(directory: Path) -> None:
    """What write_atomically leaves where it is killed in its midst."""
    for path in directory.rglob(".*.tmp"):
        if re.search(r"\.\d+\.tmp$", path.name):
            logger.warning("removed %s, half written when the run before was killed", path)
            path.unlink(missing_ok=True)


def save(directory: Path, name: str, content: dict[str, Any], last: bool = True) -> Path:
    """Writes `directory/name` and, with `last`, makes it the one that --resume takes."""
    path = directory / name
    write_atomically(path, lambda file: torch.save(content, file))
    if last:
        write_history(directory, [other for other in history(directory) if other != name] + [name])
        write_atomically(directory / LAST, lambda file: file.write(name.encode()))
    return path


def history(directory: Path) -> list[str]:
    """The names of this run's checkpoints, oldest first."""
    path = directory / HISTORY
    return path.read_text().split("\n") if path.is_file() else []


def write_history(directory: Path, names: list[str]) -> None:
    write_atomically(directory / HISTORY, lambda file: file.write("\n".join(names).encode()))


def keep(directory: Path, count: int) -> None:
    """Deletes this run's numbered checkpoints but the newest `count`; final and best stay."""
    names = history(directory)
    old = [name for name in names if re.fullmatch(r"model_\d{7}\.pth", name)][:-count]
    for name in old:
        (directory / name).unlink(missing_ok=True)
    if old:
        write_history(directory, [name for name in names if name not in old])


def forget(directory: Path) -> None:
    """A fresh run in a used directory: --resume must not take the former run's checkpoint for this one's."""
    if (directory / LAST).is_file():
        logger.warning(
            "%s holds a run already; its checkpoints stay until files of the same names replace them", directory
        )
    for name in (LAST, HISTORY):
        (directory / name).unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, on the CPU.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint of this project.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        content = load_plain(path, check_sums=True)
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


def read_last(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest of this run's checkpoints that can be read, and its content; None in a fresh directory.

    Raises:
        CheckpointError: there are some, and none can be read.
    """
    newest = last(directory)
    if newest is None:
        return None
    former = [directory / name for name in reversed(history(directory)) if name != newest.name]
    problems: list[CheckpointError] = []
    for path in (newest, *former):
        try:
            content = read(path)
        except CheckpointError as error:
            problems.append(error)
            continue
        for problem in problems:
            logger.warning("%s; --resume falls back to %s", problem, path.name)
        return path, content
    others = f", nor any of the {len(former)} before it" if former else ", and there is none before it"
    raise CheckpointError(f"{problems[0]}{others}; start anew without --resume")


def load_model(model: nn.Module, content: dict[str, Any], path: Path) -> None:
    """The checkpoint's weights, name for name and shape for shape."""
    state = content["model"]
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path}: its model is no set of tensors by name")
    check_match(state, model.state_dict(), str(path))
    model.load_state_dict(state)
