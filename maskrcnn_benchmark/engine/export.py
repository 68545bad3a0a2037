"""A detector's inference as a file: a program of torch.export (.pt2) or an ONNX graph (.onnx)."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree
from yacs.config import CfgNode

from ..errors import ConfigError, DependencyError
from ..structures import ImageBatch
from .checkpoint import write_atomically

# The coarsest map, of stride 64 (RetinaNet: 128), must have two rows and columns: torch.export takes 1 for a constant.
EXAMPLE_SHAPE = (2, 192, 256)
OPSET = 18
# [B, H, W] of the images that an exported file is checked with.
CHECKED_SHAPES = ((1, 192, 256), (2, 224, 160), (1, 203, 331))
INPUTS = ("pixels", "sizes")

Outputs = dict[str, Tensor]


class Inference(nn.Module):
    """A detector from tensors to tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(self, pixels: Tensor, sizes: Tensor) -> Outputs:
        """pixels: [B, C, H, W] uint8 or float32, RGB, 0..255; sizes: [B, 2] int64 (height, width) of each image in it.

        Returns the tensors of structures.Detections by name, those that the detector has.
        """
        found = self.model(ImageBatch(pixels, sizes, [], []))
        values = {field.name: getattr(found, field.name) for field in fields(found)}
        return {name: value for name, value in values.items() if value is not None}


def trace(
    model: nn.Module,
    cfg: CfgNode,
    shape: tuple[int, int, int] | None = None,
    dtype: torch.dtype = torch.uint8,
) -> ExportedProgram:
    """The inference of a detector on the CPU as a program of torch.export.

    shape: (batch, height, width) that the program serves alone; None: any batch, and sides of more than 64 pixels
        (RetinaNet: 128). dtype: of the pixels, uint8 or float32.

    Raises:
        ConfigError: the configuration asks for what a program cannot do.
    """
    if cfg.TEST.BBOX_AUG.ENABLED:
        raise ConfigError(
            "an exported model looks at one view of an image: set TEST.BBOX_AUG.ENABLED False, or use tools/predict.py"
        )
    batch, height, width = shape or EXAMPLE_SHAPE
    pixels = torch.zeros((batch, len(cfg.INPUT.PIXEL_MEAN), height, width), dtype=dtype)
    sizes = torch.tensor([[height, width]] * batch)
    any_batch = {0: Dim.DYNAMIC}
    dynamic = None if shape else (any_batch | {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, any_batch)
    with torch.no_grad(), _quiet():
        # strict: without it the length of a tensor, len(boxes), becomes a constant.
        return torch.export.export(Inference(model), (pixels, sizes), dynamic_shapes=dynamic, strict=True)


def save(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    """Writes the program to a .pt2 or .onnx file, whole or not at all; the metadata goes along."""
    if path.suffix == ".onnx":
        content = to_onnx(program, metadata)
        write_atomically(path, lambda file: file.write(content))
        return
    with _quiet():
        write_atomically(path, lambda file: torch.export.save(program, file, extra_files=metadata))


def to_onnx(program: ExportedProgram, metadata: dict[str, str]) -> bytes:
    """The content of an ONNX file.

    Raises:
        DependencyError: onnx or onnxscript is missing.
    """
    require_onnx()
    from ..ops.onnx_operators import DECOMPOSITIONS, TRANSLATIONS

    with torch.no_grad(), _quiet():
        program = program.run_decompositions(DECOMPOSITIONS)
        graph = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=list(_named(program, range(len(program.graph_signature.user_outputs)))),
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    graph.model.metadata_props.update(metadata)
    _name_axes(graph.model.graph)
    return graph.model_proto.SerializeToString()


def load(path: Path) -> Callable[[Tensor, Tensor], Outputs]:
    """What `save` wrote, as a function of pixels and sizes; .onnx files run in onnxruntime on the CPU.

    Raises:
        DependencyError: onnxruntime is missing.
    """
    if path.suffix == ".onnx":
        require_onnx("onnxruntime")
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def run(pixels: Tensor, sizes: Tensor) -> Outputs:
            outputs = session.run(names, dict(zip(INPUTS, (pixels.numpy(), sizes.numpy()))))
            return dict(zip(names, map(torch.from_numpy, outputs)))

        return run
    with _quiet():
        return torch.no_grad()(torch.export.load(path).module())


def require_onnx(*more: str) -> None:
    """Raises DependencyError where an optional package is missing: onnx, onnxscript and those named."""
    missing = [name for name in ("onnx", "onnxscript", *more) if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"ONNX files need packages that are not installed: {', '.join(missing)}; "
            "pip install onnx onnxscript onnxruntime"
        )


def differences(expected: Outputs, found: Outputs) -> dict[str, float]:
    """The largest difference of each output over the expected detections, each from the most similar detection of its
    image and label: those of equal score may change places. A detection without a partner is infinitely far away. Of a
    keypoint that moves by no more than a pixel its score counts: neighbouring pixels of a heat map may be equally high.
    """
    worst = dict.fromkeys(expected, 0.0)
    if not torch.equal(expected["valid"].sum(1), found["valid"].sum(1)):
        return worst | {"valid": float("inf")}
    for image, valid in enumerate(expected["valid"]):
        ours = {name: value[image][valid] for name, value in expected.items()}
        theirs = {name: value[image][found["valid"][image]] for name, value in found.items()}
        if not valid.any():
            continue
        apart = (ours["boxes"][:, None] - theirs["boxes"]).abs().amax(-1)
        apart = apart + (ours["scores"][:, None] - theirs["scores"]).abs()
        apart = apart.masked_fill(ours["labels"][:, None] != theirs["labels"], torch.inf)
        distance, partner = apart.min(1)
        if distance.isinf().any():
            return worst | {"labels": float("inf")}
        for name, value in ours.items():
            difference = (value.float() - theirs[name][partner].float()).abs().nan_to_num(torch.inf)
            if name == "keypoints":
                moved = difference[..., :2] * (difference[..., :2] > 1)
                difference = torch.cat([moved, difference[..., 2:]], -1)
            worst[name] = max(worst[name], difference.max().item())
    return worst


def _named(program: ExportedProgram, values: range) -> dict[str, int]:
    return _pytree.tree_unflatten(values, program.call_spec.out_spec)


def _name_axes(graph) -> None:
    """Axes that may have any length are called batch, height and width instead of s27, s37 and s46."""
    batch, _, height, width = map(str, graph.inputs[0].shape)
    names = {batch: "batch", height: "height", width: "width"}
    for value in (*graph.inputs, *graph.outputs):
        sides = [side if isinstance(side, int) else names.get(str(side), side) for side in value.shape]
        value.shape = type(value.shape)(sides)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings about itself, and about torchvision's operators, which are not in the program."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
