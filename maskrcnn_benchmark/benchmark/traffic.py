"""`benchmark.py floor`: what every operator of a step must move and compute, and the least time for it at given rates.

No measurement and no device: the step (forward, backward, update; or inference up to the detections) runs on tensors
that have shapes and no values, and each operator that reaches the dispatcher is counted. What is counted of one:

- Its inputs, read once: of an expanded dimension one value, of a strided convolution what its kernel touches, of a
  gather and of `proposals` as much as comes out. Of RoIAlign, whose boxes have no values here, at most the maps once,
  and at most four pixels a sample.
- Its outputs, written once. An argument that it changes is written too, and read before: not by fills and copies. Of a
  scatter in place only what it scatters; torch's gradients of gather and of indexing, which run out of place where
  operators are watched, count as in place.
- Views, empty tensors and questions (device, dtype) move nothing.
- FLOP of convolutions and matrix products alone, 2 a multiply-add, as in flops.py; of our kernels as of direct ones.
- Each gradient of a convolution is a kernel of its own and reads the gradient of the output. On CUDA so are the bias,
  added in a pass over the output, and its gradient: cuDNN's convolutions as torch calls them take no bias
  (ATen/native/Convolution.cpp, `output.add_(reshape_bias(...))` and `grad_output.sum(...)`).
- A fused optimizer reads gradients, parameters and state, and writes the latter two; gradients only to unscale them.
- The norms of all gradients count as one operator, as on devices that take lists of tensors.

So it is a lower bound of the traffic, the launches and the time: a kernel may read twice, an operator launch several
kernels, one of ours without a kernel of its own is many. Nothing is said of caches, which may keep a small result. Not
counted: the copy of the batch to the device, gradients' exchange between ranks, encoding results on the host.

Padded rows are never dropped: on a device that drops them (the CPU) it is the step whose every row is real. Another
device's step, by `kernels`, is counted on tensors of the CPU: autocast's lists are the CPU's then, which differ for
norms other than the frozen one.
"""

from __future__ import annotations

import math
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper
from yacs.config import CfgNode

from ..device import ABSENT, Device
from ..ops.library import assume_kernels
from . import flops, sides
from .roofline import Least, Roof, convolution_flop, least_time
from .steps import DATA, Phases
from .workload import check_positives

FLOP = {op: shape_wrapper(formula) for op, formula in flops.FORMULAS.items()} | flop_registry

EMPTIES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# They write without reading what was there, or what gives the shape
FILLS = {"fill_", "zero_", "full_like", "ones_like", "rand_like", "zeros_like", "new_full", "new_ones", "new_zeros"}
# Arguments of which as many bytes are read as come out
GATHERED = {
    "gather": ("self",),
    "index": ("self",),
    "index_select": ("self",),
    "proposals": ("deltas", "anchors"),
    "take": ("self",),
}
SCATTERS = {"index_add_", "index_copy_", "index_put", "index_put_", "scatter_", "scatter_add", "scatter_add_"}
COPIES = {"_to_copy", "cat", "clone", "copy_", "repeat", "stack"} | FILLS

PRODUCTS = "convolutions and products"
GROUPS = (
    PRODUCTS,
    "passes over maps",
    "RoIAlign",
    "casts, copies, fills",
    "folding norms into weights",
    "losses, matching, the rest",
    "update",
)
UPDATE = "optimizer"
# Share of the sum below which an operator has no row of its own on the screen
SMALL = 0.002
NORM = "linalg_vector_norm"

PACKAGE = f"{Path(__file__).parents[1]}/"
FRAME = re.compile(rf'File "({re.escape(PACKAGE)}[^"]*)", line (\d+)')


@dataclass(frozen=True)
class Kernel:
    """One pass of the device. shapes: of the tensors read and written, the largest first. where: the lines of this
    package that called it, of a gradient those that called what it is the gradient of, innermost first."""

    phase: str
    operator: str
    group: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    where: str
    least: Least


class Count(TorchDispatchMode):
    """Counts the kernels that run within it, while it has a phase.

    weights: shapes of the model's parameters. bias_apart: as on CUDA, see above.
    """

    def __init__(self, weights: Iterable[tuple[int, ...]] = (), bias_apart: bool = False, phase: str = "") -> None:
        super().__init__()
        self.weights, self.bias_apart, self.phase = set(weights), bias_apart, phase
        self.kernels: Counter[Kernel] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        if self.phase:
            for name, least, tensors in passes(op, args, kwargs or {}, made, self.bias_apart):
                shapes = sorted({tuple(tensor.shape) for tensor in tensors}, key=math.prod, reverse=True)
                dtype = str(max(tensors, key=Tensor.numel).dtype).removeprefix("torch.")
                group = self._group(name, least, shapes[0])
                self.kernels[Kernel(self.phase, name, group, dtype, tuple(shapes), _where(), least)] += 1
        return made

    def _group(self, name: str, least: Least, largest: tuple[int, ...]) -> str:
        products, maps, pooling, copies, weights, rest, update = GROUPS
        if self.phase == UPDATE:
            return update
        if least.flop:
            return products
        if name.startswith("roi_align"):
            return pooling
        if name in COPIES:
            return copies
        if largest in self.weights:
            return weights
        return maps if len(largest) >= 4 else rest

    def join_norms(self) -> None:
        """The norms of the gradients, an operator each on tensors without values, become the one that a device runs."""
        norms = [kernel for kernel in self.kernels if (kernel.phase, kernel.operator) == (UPDATE, NORM)]
        size = sum(kernel.least.bytes * self.kernels.pop(kernel) for kernel in norms)
        if norms:
            self.kernels[replace(norms[0], operator=f"_foreach_{NORM}", shapes=(), least=Least(size))] = 1


def _where() -> str:
    node = torch._C._current_autograd_node()
    if node is None:
        lines = ((frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None))
    else:
        lines = reversed(FRAME.findall("".join(node.metadata.get("traceback_", []))))
    ours = [f"{file.removeprefix(PACKAGE)}:{line}" for file, line in lines if file.startswith(PACKAGE)]
    return " < ".join([place for place in ours if not place.startswith("benchmark/")][:3])


# ---- what an operator needs


def passes(
    op: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any], made: Any, bias_apart: bool = False
) -> Iterator[tuple[str, Least, list[Tensor]]]:
    """The kernels of one call, which gave `made`: name, what it needs, its tensors."""
    name = op._schema.name.split("::")[1]
    given = dict(zip((argument.name for argument in op._schema.arguments), args)) | kwargs
    if name == "convolution":
        yield from _convolution(given, made, bias_apart)
    elif name == "convolution_backward":
        yield from _gradients_of_convolution(given, *made, bias_apart)
    elif moved := _moved(op, name, given, made):
        formula = FLOP.get(op.overloadpacket)
        flop = formula(*args, **kwargs, out_val=made) if formula else None
        yield name, Least(moved, flop), [*_tensors(list(given.values())), *_tensors(made)]


def _convolution(given: dict[str, Any], made: Tensor, bias_apart: bool) -> Iterator[tuple[str, Least, list[Tensor]]]:
    input, weight, bias = given["input"], given["weight"], given["bias"]
    read, flop = _bytes_read(given)
    with_bias = 0 if bias is None or bias_apart else _bytes(bias)
    least = Least(read + _bytes(weight) + with_bias + _bytes(made), flop(made))
    yield "convolution", least, [input, weight, made]
    if bias is not None and bias_apart:
        yield "convolution: bias", Least(2 * _bytes(made) + _bytes(bias)), [made]


def _gradients_of_convolution(
    given: dict[str, Any],
    for_input: Tensor | None,
    for_weight: Tensor | None,
    for_bias: Tensor | None,
    bias_apart: bool,
) -> Iterator[tuple[str, Least, list[Tensor]]]:
    grad, input, weight = given["grad_output"], given["input"], given["weight"]
    read, flop = _bytes_read(given)
    if for_input is not None:
        least = Least(_bytes(grad) + _bytes(weight) + _bytes(for_input), flop(grad))
        yield "convolution_backward: input", least, [grad, weight, for_input]
    with_bias = 0 if for_bias is None else _bytes(for_bias)
    apart = bias_apart or for_weight is None
    if for_weight is not None:
        size = _bytes(grad) + read + _bytes(for_weight) + (0 if apart else with_bias)
        yield "convolution_backward: weight", Least(size, flop(grad)), [grad, input, for_weight]
    if for_bias is not None and apart:
        yield "convolution_backward: bias", Least(_bytes(grad) + with_bias), [grad, for_bias]


def _bytes_read(given: dict[str, Any]) -> tuple[int, Callable[[Tensor], int]]:
    """Of a convolution: bytes of the input that the kernel touches; FLOP, given the output or its gradient."""
    input, weight = given["input"], given["weight"]
    if given["transposed"]:
        return _bytes(input), lambda _: convolution_flop(input, weight)
    touched = math.prod(min(1.0, side / stride) for side, stride in zip(weight.shape[2:], given["stride"]))
    return int(_bytes(input) * touched), lambda output: convolution_flop(output, weight)


def _moved(op: torch._ops.OpOverload, name: str, given: dict[str, Any], made: Any) -> int:
    """Bytes."""
    changed = {a.name for a in op._schema.arguments if a.is_write and a.name in given}
    memory = {_memory(tensor) for tensor in _tensors(list(given.values()))}
    fresh = sum(_bytes(tensor) for tensor in _tensors(made) if _memory(tensor) not in memory)
    if name in EMPTIES or not (changed or fresh):
        return 0
    if name in SCATTERS:
        return _scattered(name, **given)
    if name.startswith("_fused_") and given.get("grad_scale") is None:
        changed.discard("grads")
    written = fresh + sum(_bytes(tensor) for argument in changed for tensor in _tensors(given[argument]))
    if name in FILLS:
        return written
    most = dict.fromkeys(GATHERED.get(name, ()), fresh)
    if name == "roi_align" and given["sampling_ratio"] > 0:
        most = {"features": 4 * given["sampling_ratio"] ** 2 * fresh}
    unread = changed if name == "copy_" else {"out"}
    read = {id(t): _bytes(t) for a, value in given.items() if a not in {*unread, *most} for t in _tensors(value)}
    return (
        written
        + sum(read.values())
        + sum(min(limit, sum(map(_bytes, _tensors(given[a])))) for a, limit in most.items())
    )


def _scattered(name: str, self: Tensor, accumulate: bool = False, **given: Any) -> int:
    others = _tensors(list(given.values()))
    touched = min(self.numel(), max(tensor.numel() for tensor in others)) * self.element_size()
    return sum(map(_bytes, others)) + touched * (2 if accumulate or "add" in name else 1)


def _tensors(value: Any) -> list[Tensor]:
    """Of lists in lists too."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _bytes(tensor: Tensor) -> int:
    """Expanded dimensions once."""
    sides = (side for side, stride in zip(tensor.shape, tensor.stride()) if stride or not side)
    return math.prod(sides) * tensor.element_size()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# ---- a step


@dataclass(frozen=True)
class Step:
    """kind: train or infer. size: height and width of the padded images. positives: RoIs an image in the mask head, in
    training. kernels: a device's name in ABSENT, whose step is counted; empty: that of the given device."""

    kind: str
    size: tuple[int, int]
    batch: int
    dtype: torch.dtype
    positives: int
    kernels: str = ""


def count(cfg: CfgNode, device: Device, step: Step) -> Counter[Kernel]:
    """The kernels of one step, and how often each runs; the second one, for the first makes what later ones keep.

    Raises UserError: no image of the configuration has so many positive RoIs.
    """
    if step.kind == "train":
        check_positives(cfg, step.positives)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.GRAPH_CAPTURE = False  # a captured step runs the same kernels
    assumed = nullcontext()
    if step.kernels:
        with_habits, kernels = ABSENT[step.kernels]
        device, assumed = with_habits(torch.device("cpu")), assume_kernels(kernels)
    device = replace(device, compacts=False)
    model = sides.fresh_model(cfg, replace(device, torch_device=torch.device("meta")))
    flops.hold_positives(model, step.positives)
    counted = Count({tuple(parameter.shape) for parameter in model.parameters()}, device.bias_apart)
    watched = torch.autograd.set_detect_anomaly(True, check_nan=False)  # keeps the lines for _where
    with FakeTensorMode(allow_non_fake_inputs=True), assumed, watched:
        _without_values(model, device.torch_device)
        phases = _phases(cfg, device, step, model)
        for number in range(2):
            value = None
            for name, phase in phases.items():
                counted.phase = name if number else ""
                with counted:
                    value = phase(value)
    counted.join_norms()
    return counted.kernels


def _without_values(model: nn.Module, device: torch.device) -> None:
    """From the meta device to `device`, without memory for the values; Module.to does not make such tensors."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            there = nn.Parameter(_like(parameter, device), requires_grad=parameter.requires_grad)
            setattr(module, name, there)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, _like(buffer, device))


def _like(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _phases(cfg: CfgNode, device: Device, step: Step, model: nn.Module) -> Phases:
    images, targets = flops.empty_batch(cfg, device.torch_device, step.batch, step.size)

    def forward(batch: tuple) -> Any:
        with device.autocast(step.dtype):
            return model(*batch)

    if step.kind == "infer":
        model.eval()
        return {DATA: lambda _: (images,), "forward": torch.no_grad()(forward)}
    model.train()
    mirrored = torch.zeros(step.batch, dtype=torch.bool, device=device.torch_device)
    return {
        DATA: lambda _: (images.mirrored(mirrored) if device.mirrors_images else images, targets),
        **sides.training_phases(cfg, device, sides.Side("ours", step.dtype, model), forward),
    }


# ---- against a roof


def reckon(counted: Counter[Kernel], step: Step, roof: Roof) -> dict[str, Any]:
    """For the JSON file: a row a kernel, the costliest first; totals by operator and by group; the step's."""
    rows = []
    for kernel, calls in counted.items():
        milliseconds, bound = least_time(kernel.least, kernel.dtype, roof)
        about = asdict(kernel) | {"calls": calls, "bytes": calls * kernel.least.bytes}
        about |= {"flop": calls * (kernel.least.flop or 0), "floor_ms": calls * milliseconds, "bound_by": bound}
        del about["least"]
        rows.append(about)
    rows.sort(key=lambda row: row["floor_ms"], reverse=True)
    groups = {name: _total(row for row in rows if row["group"] == name) for name in GROUPS}
    names = dict.fromkeys(row["operator"] for row in rows)
    operators = {name: _total(row for row in rows if row["operator"] == name) for name in names}
    return {
        "step": asdict(step) | {"dtype": str(step.dtype).removeprefix("torch.")},
        "roof": asdict(roof),
        "total": _total(rows),
        "groups": groups,
        "operators": dict(sorted(operators.items(), key=lambda item: item[1]["floor_ms"], reverse=True)),
        "rows": rows,
    }


def _total(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    rows = list(rows)
    total = {name: sum(row[name] for row in rows) for name in ("calls", "bytes", "flop", "floor_ms")}
    moving = sum(row["floor_ms"] for row in rows if row["bound_by"] == "memory")
    return total | {"bound_by": "memory" if 2 * moving >= total["floor_ms"] else "arithmetic"}


HEADS = ("", "calls", "MB", "GFLOP", "floor ms", "bound by", "share")


def tables(about: dict[str, Any]) -> list[list[tuple[str, ...]]]:
    """By operator and by group, with the sum; operators below SMALL of the sum are one row."""
    whole = about["total"]
    large = {name: t for name, t in about["operators"].items() if t["floor_ms"] >= SMALL * whole["floor_ms"]}
    small = [t for name, t in about["operators"].items() if name not in large]
    named = large | ({f"{len(small)} others": _total(small)} if small else {})
    return [
        [(first, *HEADS[1:]), *(_cells(name, total, whole) for name, total in totals.items() if total["calls"])]
        for first, totals in (("operator", named | {"in all": whole}), ("group", about["groups"] | {"in all": whole}))
    ]


def _cells(name: str, total: dict[str, Any], whole: dict[str, Any]) -> tuple[str, ...]:
    return (
        name,
        str(total["calls"]),
        f"{total['bytes'] / 1e6:,.1f}",
        f"{total['flop'] / 1e9:,.1f}",
        f"{total['floor_ms']:.3f}",
        "-" if total is whole else total["bound_by"],
        f"{total['floor_ms'] / whole['floor_ms']:.1%}",
    )


def summary(about: dict[str, Any]) -> list[str]:
    """Lines for people, after the tables."""
    step, whole, products = about["step"], about["total"], about["groups"][PRODUCTS]
    rate = about["roof"]["gflop_per_second"][step["dtype"]] / 1000
    lines = [
        f"{step['kind']}, {step['batch']} x {step['size'][0]}x{step['size'][1]}, {step['dtype']}"
        + (f", {step['positives']} positive RoIs an image" if step["kind"] == "train" else "")
        + f", at {rate:g} TFLOP/s and {about['roof']['gb_per_second']:g} GB/s",
        f"{whole['calls']} operators, a lower bound of the launches",
    ]
    for name, total in (("all of them", whole), (PRODUCTS + " alone", products)):
        images = 1000 * step["batch"] / total["floor_ms"]
        lines.append(f"{name}: {total['floor_ms']:.2f} ms a step at least, {images:.1f} images/s at most")
    return lines
