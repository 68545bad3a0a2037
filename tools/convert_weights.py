"""Weights of other projects to ours, ours to others', and published weights into the cache.

  python tools/convert_weights.py resnet.pth ours.pth --to ours
  python tools/convert_weights.py model_final.pth detectron2.pth --to detectron2 --config-file config.yaml
  python tools/convert_weights.py --list
  python tools/convert_weights.py --download torchvision/maskrcnn_resnet50_fpn_coco

SRC is a file, or catalog://NAME once it was downloaded. Every tensor finds its place, or the command stops and names
those that do not; what is left out (optimizer, ImageNet classifier) is listed. DST is written whole or not at all.
docs/weights.md says what each project reads and which yaml its weights need.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this file, installed or not

from yacs.config import CfgNode

from maskrcnn_benchmark import command
from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.engine.checkpoint import write_atomically
from maskrcnn_benchmark.errors import CheckpointError, visible
from maskrcnn_benchmark.models import weights
from maskrcnn_benchmark.models.build import build_model

OURS = "maskrcnn_benchmark"


def parse() -> argparse.Namespace:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    layouts = ["ours", *weights.LAYOUTS]
    parser.add_argument("source", nargs="?", metavar="SRC", help="a weights file, or catalog://NAME")
    parser.add_argument("target", nargs="?", metavar="DST", type=Path, help="the file to write")
    parser.add_argument("--from", dest="layout", default="auto", choices=["auto", *layouts], help="whose SRC is (auto)")
    parser.add_argument("--to", default="ours", choices=layouts, help="whose DST shall be (ours)")
    parser.add_argument(
        "--config-file",
        metavar="YAML",
        help="our model's: checks every name and shape, and says what no shape tells: RetinaNet's box coder, the order"
        " of channels, the number of aspect ratios",
    )
    parser.add_argument("--allow-pickle", action="store_true", help="read .pkl and .pdparams: arrays alone, no code")
    parser.add_argument("--list", action="store_true", help="print the catalogue of published weights")
    parser.add_argument("--download", metavar="NAME", help="fetch weights of the catalogue into the cache, and verify")
    parser.add_argument("--sha256", metavar="HASH", help="with --download: the file's digest, 64 hexadecimal digits")
    parser.add_argument("--unverified", action="store_true", help="with --download: accept a file of unknown digest")
    parser.add_argument("--mirror", default="", metavar="URL", help="with --download: an address that has the file too")
    args = parser.parse_args()
    if not (args.list or args.download) and not (args.source and args.target):
        parser.error("give SRC and DST, or --download NAME, or --list")
    if args.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", args.sha256):
        parser.error(f"--sha256 {args.sha256} must have 64 hexadecimal digits")
    return args


def main() -> None:
    args = parse()
    level = logging.INFO if args.download else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    if args.list:
        print_catalogue()
    elif args.download:
        file = weights.fetch(args.download, args.sha256, args.unverified, args.mirror)
        print(f"catalog://{args.download} is {file}")
    else:
        convert(args)


def print_catalogue() -> None:
    for name, published in weights.CATALOG.items():
        digest = f"SHA-256 {published.sha256}..." if published.sha256 else "no digest published"
        print(f"catalog://{name}\n    {published.address}\n    {digest}; {published.licence}")


def convert(args: argparse.Namespace) -> None:
    target = OURS if args.to == "ours" else args.to
    layout = {"auto": None, "ours": OURS}.get(args.layout, args.layout)
    weights.check_suffix(args.target, target)
    cfg = get_config(args.config_file) if args.config_file else None
    model = build_model(cfg, get_device("cpu")) if cfg else None
    conventions = replace(weights.conventions_of(model), bgr=model.normalize.bgr) if model else weights.Conventions()
    state = weights.read(weights.resolve(args.source), args.allow_pickle)
    read = weights.to_ours(state, args.source, conventions, layout)
    if any(name.startswith("rpn.head.cls_tower.") for name in read.state) and target != read.layout and not cfg:
        raise CheckpointError(
            f"{args.source} is a RetinaNet, and projects differ in what its box deltas mean: give --config-file, whose"
            " MODEL.RETINANET.BOX_CODER_WEIGHTS say what they mean here"
        )
    if model and not all(name.startswith("backbone.body.") for name in read.state):
        weights.check_match(read.state, weights.without_derived(model.state_dict()), args.source)
    written = weights.from_ours(read.state, args.source, target, conventions)
    content = weights.content_of(written.state, target, args.target.suffix)
    write_atomically(args.target, lambda file: weights.write(file, content, args.target.suffix))
    describe(state, read, written, args.target)
    if cfg:
        describe_input(cfg, read.layout, target)


def describe(state: dict, read: weights.Conversion, written: weights.Conversion, target: Path) -> None:
    print(f"{read.layout}, {len(state)} tensors: {read.renamed} renamed to ours")
    for part in (read, written):
        for why, names in part.dropped.items():
            shown = visible(", ".join(names[:3])) + (", ..." if len(names) > 3 else "")
            print(f"dropped {len(names)} ({why}): {shown}")
    if written.layout != OURS:
        print(f"{written.renamed} renamed to {written.layout}'s")
    print(f"wrote {len(written.state)} tensors to {target}")


def describe_input(cfg: CfgNode, source: str, target: str) -> None:
    """Where the order of channels changes, mean and standard deviation change places with it."""
    ours = cfg.INPUT.TO_BGR255
    orders = {name: weights.LAYOUTS[name].bgr for name in (source, target)}
    if all(order in (None, ours) for order in orders.values()):
        return
    mean, std = ([float(value) for value in values] for values in (cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD))
    if orders[source] not in (None, ours):
        print("the stem's channels were reversed for INPUT.TO_BGR255", ours, "- PIXEL_MEAN and PIXEL_STD must be those")
        print(f"that {source}'s weights were trained with, in this order and range; the yaml has {mean} and {std}")
    if orders[target] not in (None, ours):
        factor = 1 / 255 if ours else 255
        mean, std = ([round(value * factor, 6) for value in reversed(values)] for values in (mean, std))
        print(f"the stem's channels were reversed for {target}: there, give it the mean {mean} and deviation {std}")


if __name__ == "__main__":
    command.run(main)
