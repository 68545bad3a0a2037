"""Compute a step again in which training met NaN or infinite numbers, and say where the first one arises."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this file, installed or not

import torch

from maskrcnn_benchmark import command
from maskrcnn_benchmark.config import parse_config
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.engine import distributed, nonfinite
from maskrcnn_benchmark.models.build import build_model


def main() -> int:
    parser = command.Parser(
        description=__doc__,
        epilog="Exit status 1 where something is not finite, 0 where all is: then it was the device.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="OUTPUT_DIR/nonfinite_step_N.pt")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, npu, ...: as for training")
    args = parser.parse_args()
    content = nonfinite.read_dump(args.file)
    cfg = parse_config(content["config"], f"the configuration in {args.file}")
    device = get_device(args.device)
    model = build_model(cfg, device).train()
    model.load_state_dict(content["model"])
    batches = [tuple(part.to(device.torch_device) for part in batch) for batch in content["batches"]]
    distributed.seed_step(cfg.SEED, content["iteration"], content["rank"])
    found = nonfinite.examine(model, device, getattr(torch, cfg.DTYPE), batches)
    print(f"step {content['iteration'] + 1} of rank {content['rank']}, images {content['image_ids']}: ", end="")
    print(f"not finite: {found}" if found else "all is finite")
    return 1 if found else 0


if __name__ == "__main__":
    command.run(main)
