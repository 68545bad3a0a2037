"""The operator library `torch.ops.maskrcnn_benchmark`: who serves an op on a device, compiled kernel or composite.

Schemas and composites are declared in Python, so the package works without a compiler. The compiled extension
`maskrcnn_benchmark._C` adds kernels for the devices it was built for; the dispatcher prefers them.

The environment variable `MASKRCNN_KERNELS` chooses: `auto` (default) takes a compiled kernel where there is one;
`composite` never loads the extension; `native` makes an op without a compiled kernel for its device an error.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch

from maskrcnn_benchmark.errors import ConfigError, DeviceError

NAMESPACE = "maskrcnn_benchmark"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

_EXTENSION = f"{NAMESPACE}._C"
_REBUILD = "pip install --no-build-isolation -e ."
_logger = logging.getLogger(__name__)


def _kernel_mode() -> str:
    mode = os.environ.get("MASKRCNN_KERNELS", "auto")
    if mode not in ("auto", "native", "composite"):
        raise ConfigError(f"MASKRCNN_KERNELS={mode!r} is not known; use auto, native or composite")
    return mode


_MODE = _kernel_mode()
_assumed: Collection[str] | None = None


def load_extension() -> None:
    """Load the compiled kernels, if there are any and `MASKRCNN_KERNELS` does not forbid it.

    A missing extension is fine: composites serve. One that is there but cannot be loaded (built for another torch, or
    from other sources) is a warning in mode `auto` and a DeviceError in mode `native`.
    """
    if _MODE == "composite":
        return
    try:
        importlib.import_module(_EXTENSION)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == _EXTENSION:
            return
        reason = " ".join(str(error).split())
        message = (
            f"the compiled kernels {_EXTENSION} do not load with torch {torch.__version__} ({reason}); "
            f"rebuild them: {_REBUILD}"
        )
        if _MODE == "native":
            raise DeviceError(message) from error
        warnings.warn(f"{message}. Slower composites are in use until then.", RuntimeWarning, stacklevel=2)


def register_composite(op: str, composite: Callable) -> None:
    """Let `composite` serve `op` on every device that has no kernel of its own."""

    @functools.wraps(composite)
    def serve(*args):
        tensor = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
        if _MODE == "native":
            raise DeviceError(
                f"MASKRCNN_KERNELS=native, but {op} has no compiled kernel for {tensor.device.type}; build it with "
                f"`{_REBUILD}`, or set MASKRCNN_KERNELS=auto"
            )
        kernel_in_use(op, tensor.device.type)
        return composite(*args)

    LIBRARY.impl(op, serve, "CompositeExplicitAutograd")


@contextmanager
def assume_kernels(ops: Collection[str]) -> Iterator[None]:
    """Within it `ops`, and no others, count as compiled, on every device: so that on tensors without values the package
    takes the path of a device that is not here. Nothing computes any faster, or at all."""
    global _assumed
    before, _assumed = _assumed, ops
    try:
        yield
    finally:
        _assumed = before


def kernel_in_use(op: str, device_type: str) -> str:
    """Which implementation serves `torch.ops.maskrcnn_benchmark.<op>` on a device type: "native" or "composite".

    The answer is logged, once for each op and device type. Raises DeviceError for an op that does not exist.
    """
    if _assumed is not None:
        return "native" if op in _assumed else "composite"
    return _registered(op, device_type)


@functools.cache
def _registered(op: str, device_type: str) -> str:
    if not hasattr(getattr(torch.ops, NAMESPACE), op):
        raise DeviceError(f"there is no operator {NAMESPACE}::{op}")
    key = torch._C._dispatch_key_for_device(device_type)
    # What is registered for meta tensors tells shapes.
    native = device_type != "meta" and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key)
    kernel = "native" if native else "composite"
    _logger.info("%s on %s: %s kernel", op, device_type, kernel)
    return kernel
