"""Data sets: make a synthetic one.

  python tools/dataset.py generate data/shapes --train 1000 --val 200 --size 192 192

writes a COCO directory (annotations/instances_{train,val}2017.json, train2017/, val2017/) for DATA.PATH or --data_path.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this file, installed or not

from maskrcnn_benchmark import command
from maskrcnn_benchmark.data import synthetic


def main() -> None:
    args = parse()
    args.function(args)


def parse() -> argparse.Namespace:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    generator = subparsers.add_parser(
        "generate",
        help="write a synthetic data set of overlapping shapes",
        description="Writes a COCO directory of textured, overlapping shapes with polygon masks: circles, squares,"
        " triangles, stars and crosses. The same seed gives the same files. A small Mask R-CNN learns it in minutes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    generator.add_argument("output", metavar="OUTPUT", help="a new or empty directory")
    generator.add_argument("--train", type=int, default=1000, metavar="N", help="training images")
    generator.add_argument("--val", type=int, default=200, metavar="N", help="validation images")
    generator.add_argument("--size", type=int, nargs=2, default=(192, 192), metavar=("H", "W"), help="height and width")
    generator.add_argument("--seed", type=int, default=0, metavar="S", help="of everything random")
    generator.set_defaults(function=generate)
    return parser.parse_args()


def generate(args: argparse.Namespace) -> None:
    synthetic.generate(args.output, args.train, args.val, tuple(args.size), args.seed)
    print(f"wrote {args.train} training and {args.val} validation images to {args.output}")


if __name__ == "__main__":
    command.run(main)
