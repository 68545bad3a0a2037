"""Write a detector's inference into a file that needs no model code: an ONNX graph, or a program of torch.export."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this file, installed or not

import torch
from torch import nn
from yacs.config import CfgNode

from maskrcnn_benchmark import command
from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.engine import export
from maskrcnn_benchmark.engine.predict import load_predictor
from maskrcnn_benchmark.errors import DataError
from maskrcnn_benchmark.models.build import build_model
from maskrcnn_benchmark.models.weights import load_weights

TOLERANCE = 1e-3
DTYPES = {"uint8": torch.uint8, "float32": torch.float32}


def parse() -> argparse.Namespace:
    parser = command.Parser(description=__doc__, epilog="Inputs and outputs: docs/export.md.")
    parser.add_argument("--weights", required=True, metavar="FILE", help="a checkpoint that train_net.py wrote")
    parser.add_argument("--config-file", metavar="YAML", help="the model; with it, weights may be those of others")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="what to write")
    parser.add_argument("--format", choices=("onnx", "pt2"), help="without it, what FILE ends in says")
    parser.add_argument(
        "--shape", nargs=3, type=int, metavar=("B", "H", "W"), help="images of this shape alone; else of any"
    )
    parser.add_argument("--pixels", choices=sorted(DTYPES), default="uint8", help="type of the pixels (uint8)")
    parser.add_argument(
        "--check", action="store_true", help=f"run the file beside the model; exit 1 if they differ by {TOLERANCE}"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="configuration keys, with --config-file")
    args = parser.parse_intermixed_args()
    args.format = args.format or args.output.suffix[1:]
    if args.output.suffix != f".{args.format}" or args.format not in ("onnx", "pt2"):
        parser.error(f"--output {args.output} must end in .onnx or .pt2, as --format says")
    if args.shape and min(args.shape) < 1:
        parser.error(f"--shape {' '.join(map(str, args.shape))}: all must be at least 1")
    if args.overrides and not args.config_file:
        parser.error(f"{args.overrides[0]}: keys need --config-file; a checkpoint brings its configuration along")
    return args


def main() -> int:
    args = parse()
    if not args.output.parent.is_dir():
        raise DataError(f"--output {args.output}: there is no directory {args.output.parent}")
    if args.format == "onnx":
        export.require_onnx()  # before the work, not after it
    model, cfg, names = load(args)
    dtype = DTYPES[args.pixels]
    program = export.trace(model, cfg, tuple(args.shape) if args.shape else None, dtype)
    export.save(program, args.output, {"config": cfg.dump(), "categories": json.dumps(names, ensure_ascii=False)})
    print(f"wrote {args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    return check(args, model, dtype) if args.check else 0


def load(args: argparse.Namespace) -> tuple[nn.Module, CfgNode, list[dict[str, Any]]]:
    """The model, its configuration, and its categories in the order of labels, where they are known."""
    device = get_device("cpu")
    if not args.config_file:
        predictor = load_predictor(Path(args.weights), device)
        names = predictor.category_names
        categories = [{"id": i, "name": names[i]} for i in predictor.category_ids]
        return predictor.model, predictor.cfg, categories
    cfg = get_config(args.config_file, args.overrides)
    model = build_model(cfg, device)
    load_weights(model, args.weights, cfg.MODEL.ALLOW_PICKLE)
    return model, cfg, []


def check(args: argparse.Namespace, model: nn.Module, dtype: torch.dtype) -> int:
    """Whether the file answers as the model does, for noise of several shapes."""
    run, reference, generator, good = export.load(args.output), export.Inference(model), torch.Generator(), True
    for batch, height, width in [args.shape] if args.shape else export.CHECKED_SHAPES:
        channels = model.normalize.mean.shape[1]
        pixels = torch.randint(0, 256, (batch, channels, height, width), generator=generator).to(dtype)
        sizes = torch.tensor([[height, width]] * batch)
        with torch.no_grad():
            expected = reference(pixels, sizes)
        worst = export.differences(expected, run(pixels, sizes))
        good &= max(worst.values()) <= TOLERANCE
        text = "  ".join(f"{name} {value:.1e}" for name, value in worst.items())
        print(f"{batch} x {height} x {width}: {int(expected['valid'].sum())} detections, differences: {text}")
    if not good:
        print(f"error: {args.output} differs from the model by more than {TOLERANCE}", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    command.run(main)
