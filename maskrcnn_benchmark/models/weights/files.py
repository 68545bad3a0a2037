"""Weights files, read without trust: no code in a file is run. Written in the form that each project reads."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from .changes import State

PICKLES = (".pkl", ".pdparams")
# Under these keys the projects keep their tensors.
WRAPPERS = ("model", "state_dict", "blobs")
# Paddle's list of its own names for the tensors
NO_WEIGHTS = {"StructuredToParameterName@@"}


def read(path: Path, allow_pickle: bool = False) -> State:
    """The tensors of a .pth file, or of a .pkl or .pdparams file where that is allowed.

    Raises:
        CheckpointError: a file that is missing, damaged or refused, or holds anything but arrays.
    """
    if not path.is_file():
        raise CheckpointError(f"weights file {path} does not exist")
    try:
        if path.suffix in PICKLES:
            content = _read_pickle(path, allow_pickle)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load and pickle raise whatever a damaged file makes them stumble over
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"cannot read weights from {path}: {reason} ({type(error).__name__})") from error
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds no state dict")
    content = {key: value for key, value in content.items() if key not in NO_WEIGHTS}
    if strange := [str(key) for key, value in content.items() if not _is_array(value)]:
        raise CheckpointError(f"{path}: {', '.join(strange[:5])} ({len(strange)} in all) are no tensors")
    return {key: value if isinstance(value, Tensor) else torch.as_tensor(value) for key, value in content.items()}


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "__array_interface__")


class _ArrayUnpickler(pickle.Unpickler):
    """Knows NumPy arrays and nothing else, so that no code in a file can run."""

    ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy.core.multiarray", "scalar"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "scalar"),
            ("_codecs", "encode"),
            ("collections", "OrderedDict"),
        }
    )

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise CheckpointError(f"the pickle asks for {module}.{name}; only arrays are read from pickle files")
        return super().find_class(module, name)


def _read_pickle(path: Path, allowed: bool) -> object:
    if not allowed:
        raise CheckpointError(
            f"{path} is a pickle file; set MODEL.ALLOW_PICKLE True (tools/convert_weights.py: --allow-pickle) to read"
            " the arrays in it (no code is run)"
        )
    with open(path, "rb") as file:
        try:
            return _ArrayUnpickler(file, encoding="latin1").load()
        except CheckpointError as error:
            raise CheckpointError(f"{path} is refused: {error}") from error


# What each project's loader takes; the others take any name, as torch.load does.
SUFFIXES = {"detectron": (".pkl",), "paddledetection": (".pdparams",), "detectron2": (".pth", ".pkl")}


def check_suffix(path: Path, layout: str) -> None:
    """Raises CheckpointError unless the layout's project reads files of this name."""
    allowed = SUFFIXES.get(layout, (".pth", ".pt"))
    if path.suffix not in allowed:
        raise CheckpointError(f"{path}: a file for {layout} must end in {' or '.join(allowed)}")


def content_of(state: State, layout: str, suffix: str) -> Any:
    """What the project's own loader expects in a file of this suffix, tensors or, in a pickle, arrays."""
    if suffix in PICKLES:
        # A copy: an array that shares a larger tensor's memory would be written with all of it
        state = {name: tensor.detach().cpu().clone().numpy() for name, tensor in state.items()}
    else:
        state = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
    if layout == "detectron2":  # which takes a .pkl without an author for Detectron's
        return {"model": state, "__author__": "maskrcnn_benchmark"} if suffix in PICKLES else {"model": state}
    if layout == "mmdet":
        return {"meta": {}, "state_dict": state}
    if layout == "detectron":
        return {"blobs": state}
    return {"model": state} if layout == "maskrcnn_benchmark" else state


def write(file: IO[bytes], content: Any, suffix: str) -> None:
    if suffix in PICKLES:
        pickle.dump(content, file, protocol=2)  # Python 2 wrote the projects' own files
    else:
        torch.save(content, file)
