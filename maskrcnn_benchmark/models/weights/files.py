"""Weights files, read without trust: no code in a file is run. Written in the form that each project reads."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError
from .changes import State

PICKLES = (".pkl", ".pdparams")
# Under these keys the projects keep their tensors.
WRAPPERS = ("model", "state_dict", "blobs")
# Paddle's list of its own names for the tensors
NO_WEIGHTS = {"StructuredToParameterName@@"}
# A tensor may state a shape of which its file holds one number, to be repeated. Tensors under several names are few.
MOST_EXPANSION = 10


def read(path: Path, allow_pickle: bool = False) -> State:
    """The tensors of a .pth file, or of a .pkl or .pdparams file where that is allowed.

    Raises:
        CheckpointError: a file that is missing, damaged or refused, or holds anything but arrays.
    """
    if not path.is_file():
        raise CheckpointError(f"weights file {path} does not exist")
    try:
        content = _read_pickle(path, allow_pickle) if path.suffix in PICKLES else load_plain(path)
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
    state = {
        key: torch.as_tensor(value.array if isinstance(value, _Array) else value) for key, value in content.items()
    }
    stated, size = sum(tensor.numel() * tensor.element_size() for tensor in state.values()), path.stat().st_size
    if stated > MOST_EXPANSION * size:
        raise CheckpointError(f"{path}: its tensors would take {stated:,} bytes, more than it can hold in {size:,}")
    return state


def load_plain(path: Path, check_sums: bool = False) -> Any:
    """What torch.save wrote, on the CPU: tensors, plain values and their containers; no code is run.

    Whatever torch.load raises for a damaged file comes out, and zipfile.BadZipFile: records that are compressed or lie
    in each other, which would take more memory than the file has bytes; with check_sums, a tensor whose checksum is
    wrong: torch writes one for each, but does not look at it.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\3\4"
    if zipped or check_sums:
        with zipfile.ZipFile(path) as archive:
            stated, size = sum(record.file_size for record in archive.infolist()), path.stat().st_size
            if stated > size:
                raise zipfile.BadZipFile(
                    f"it unpacks to {stated:,} bytes, but has {size:,}, and torch.save does not pack"
                )
            if check_sums and (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
    return torch.load(path, map_location="cpu", weights_only=True)


def _is_array(value: object) -> bool:
    """One that can be copied into a parameter: sparse, quantized and memoryless tensors cannot."""
    if isinstance(value, Tensor):
        return value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
    return isinstance(value, _Array)


class _DType:
    """A NumPy type of numbers in a pickle file."""

    def __init__(self, name: str, align: bool = False, copy: bool = False) -> None:
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in "biufc":
            raise CheckpointError(f"the pickle holds an array of {name}; only arrays of numbers are read")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """A NumPy array in a pickle file. NumPy's own unpickling believes what the file says of a type's size and flags:
    with made-up ones it takes numbers for addresses, and frees what lies there."""

    def __init__(self) -> None:
        self.array = np.empty(0, np.float32)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, content = state
        content = content.encode("latin1") if isinstance(content, str) else content
        array = np.frombuffer(content, dtype.dtype).reshape(shape, order="F" if fortran else "C")
        self.array = array.astype(dtype.dtype.newbyteorder("="))


def _reconstruct(kind: type, shape: tuple, typecode: str) -> _Array:
    return _Array()


def _scalar(dtype: _DType, content: bytes | str) -> _Array:
    number = _Array()
    number.__setstate__((1, (), dtype, False, content))
    return number


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise CheckpointError(f"the pickle asks for the encoding {encoding}; only latin1 is read")
    return text.encode("latin1")


# The unpickler in C takes 8 bytes for every number below the one under which a file wants a value remembered: 32 GB for
# a file of seven bytes.
class _ArrayUnpickler(pickle._Unpickler):
    """Knows NumPy arrays and nothing else, so that no code in a file can run."""

    KNOWN: ClassVar = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _DType,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "scalar"): _scalar,
        ("_codecs", "encode"): _encode,
        ("collections", "OrderedDict"): OrderedDict,
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.KNOWN:
            raise CheckpointError(f"the pickle asks for {module}.{name}; only arrays are read from pickle files")
        return self.KNOWN[module, name]


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
