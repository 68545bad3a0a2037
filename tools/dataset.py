"""Data sets: fetch, look at, convert, split, and make a synthetic one.

  python tools/dataset.py download balloon data --unverified
  python tools/dataset.py show     via://data/balloon/train/via_region_data.json balloon.html
  python tools/dataset.py convert  penn_fudan://data/PennFudanPed pedestrians.json
  python tools/dataset.py split    penn_fudan://data/PennFudanPed data/pedestrians --val 0.2
  python tools/dataset.py generate data/shapes --train 1000 --val 200 --size 192 192

DATASET is what DATASETS.TRAIN takes: a name of the catalogue (coco_2017_train, with --data-path), or FORMAT://PATH with
options: coco://FILE.json?images=DIR  via://FILE.json?attribute=NAME&category=NAME  labelme://DIR  penn_fudan://DIR
masks://DIR?images=DIR&masks=DIR&category=NAME  voc://DIR?split=train  cityscapes://DIR?split=train.  NAME[10:20] is a part.
generate and split write a COCO directory (annotations/instances_{train,val}2017.json, train2017/, val2017/) for DATA.PATH
or --data_path. docs/data.md says more.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this file, installed or not

import cv2

from maskrcnn_benchmark import command
from maskrcnn_benchmark.data import catalog, download, synthetic
from maskrcnn_benchmark.data.split import write_content, write_split
from maskrcnn_benchmark.errors import ConfigError, DataError
from maskrcnn_benchmark.report import contact_sheet


def main() -> None:
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
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
    add_convert(subparsers)
    add_split(subparsers)
    add_show(subparsers)
    add_download(subparsers)
    return parser.parse_args()


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="a name of the catalogue, or FORMAT://PATH?option=value")
    parser.add_argument("--data-path", default="", metavar="DIR", help="what relative paths start from, as DATA.PATH")


def add_convert(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="write the annotations of any format as COCO's JSON",
        description="Writes COCO's JSON and prints the name by which DATASETS.TRAIN takes it. Images stay where they"
        " are. Masks from PNGs become RLEs, pixel by pixel the same; circles and ellipses polygons.",
    )
    add_source(parser)
    parser.add_argument("output", metavar="OUTPUT.json")
    parser.set_defaults(function=convert)


def add_split(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "split",
        help="write a COCO directory with a training and a validation part",
        description="Shares out the images of a data set of any format, rare classes evenly, and writes a COCO"
        " directory. The same seed gives the same parts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_source(parser)
    parser.add_argument("output", metavar="OUTPUT", help="a new or empty directory")
    parser.add_argument("--val", type=float, default=0.2, metavar="SHARE", help="of the images for validation, 0..1")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--link", action="store_true", help="hard-link the images instead of copying them")
    parser.set_defaults(function=split)


def add_show(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "show",
        help="draw the annotations on the images",
        description="Writes a contact sheet (OUTPUT.png) or a page to browse that needs no other file (OUTPUT.html)."
        " DATASET may also be module:Class, a data set written in Python.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_source(parser)
    parser.add_argument("output", metavar="OUTPUT", help="a .png or .html file")
    parser.add_argument("--count", type=int, default=24, metavar="N", help="at most so many images")
    parser.add_argument("--columns", type=int, default=4, metavar="N", help="of the contact sheet")
    parser.add_argument("--category", metavar="NAME", help="only images that show this class")
    parser.add_argument("--image", type=int, action="append", metavar="ID", help="only this image; may be repeated")
    parser.set_defaults(function=show)


def add_download(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "download",
        help="fetch a public data set",
        description="Fetches, verifies and unpacks. The same command goes on where an interrupted one stopped.",
    )
    parser.add_argument("name", choices=download.DATASETS, metavar="NAME", help=", ".join(download.DATASETS))
    parser.add_argument("output", metavar="DIR", help="where to unpack; the archives lie in DIR/.downloads meanwhile")
    parser.add_argument(
        "--sha256", action="append", default=[], metavar="ARCHIVE=HASH", help="of an archive; may be repeated"
    )
    parser.add_argument("--unverified", action="store_true", help="take archives whose SHA-256 is not known")
    parser.add_argument("--mirror", default="", metavar="URL", help="an address under which the archives lie by name")
    parser.add_argument("--keep-archives", action="store_true", help="do not delete the archives afterwards")
    parser.set_defaults(function=fetch)


def generate(args: argparse.Namespace) -> None:
    synthetic.generate(args.output, args.train, args.val, tuple(args.size), args.seed)
    print(f"wrote {args.train} training and {args.val} validation images to {args.output}")


def convert(args: argparse.Namespace) -> None:
    source = catalog.read_source(args.dataset, args.data_path)
    write_content(source.content, args.output)
    images = os.path.relpath(source.image_dir, Path(args.output).parent)
    images = re.sub(r"[%&+;]", lambda found: f"%{ord(found[0]):02X}", images)
    print(f"wrote {len(source.content['images'])} images and {len(source.content['annotations'])} objects")
    print(f"DATASETS.TRAIN takes it as coco://{args.output}?images={images}")


def split(args: argparse.Namespace) -> None:
    if not 0 < args.val < 1:
        raise ConfigError(f"--val {args.val} must be between 0 and 1")
    source = catalog.read_source(args.dataset, args.data_path)
    train, val = write_split(source, args.output, args.val, args.seed, args.link)
    print(f"wrote {train} training and {val} validation images to {args.output}")


def show(args: argparse.Namespace) -> None:
    suffix = Path(args.output).suffix
    if suffix not in (".png", ".html") or min(args.count, args.columns) < 1:
        raise ConfigError("OUTPUT must end in .png or .html, and --count and --columns be 1 or more")
    dataset = catalog.open_datasets([args.dataset], args.data_path)
    side = contact_sheet.PAGE_SIDE if suffix == ".html" else contact_sheet.CELL
    shown = contact_sheet.pictures(dataset, chosen(dataset, args), side)
    if suffix == ".html":
        Path(args.output).write_text(contact_sheet.page(args.dataset, shown, dataset), encoding="utf-8")
    else:
        _, data = cv2.imencode(".png", cv2.cvtColor(contact_sheet.sheet(shown, args.columns), cv2.COLOR_RGB2BGR))
        Path(args.output).write_bytes(data.tobytes())
    print(f"wrote {args.output}")


def chosen(dataset: catalog.AnyDataset, args: argparse.Namespace) -> list[int]:
    """Indices of the images to show."""
    if unknown := set(args.image or ()) - set(dataset.image_ids):
        raise DataError(f"{args.dataset} has no image id {min(unknown)}")
    if args.category and args.category not in dataset.category_names:
        raise DataError(f"{args.dataset} has no class {args.category!r}; it has {', '.join(dataset.category_names)}")
    indices = [i for i, image_id in enumerate(dataset.image_ids) if not args.image or image_id in args.image]
    if args.category:
        wanted = dataset.category_ids[dataset.category_names.index(args.category)]
        indices = [i for i in indices if any(a["category_id"] == wanted for a in dataset.annotations(i))]
    if not indices:
        raise DataError(f"{args.dataset} has no image with what was asked for")
    return indices[: args.count]


def fetch(args: argparse.Namespace) -> None:
    hashes = dict(text.rpartition("=")[::2] for text in args.sha256)
    if bad := [name for name, value in hashes.items() if not re.fullmatch(r"[0-9a-fA-F]{64}", value) or not name]:
        raise ConfigError(f"--sha256 {bad[0]}={hashes[bad[0]]} must be ARCHIVE=HASH with 64 hexadecimal digits")
    download.download(args.name, args.output, hashes, args.unverified, args.mirror, args.keep_archives)
    print(f"{args.name} is in {args.output}")


if __name__ == "__main__":
    command.run(main)
