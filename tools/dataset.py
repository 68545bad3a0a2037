"""Data sets: check, fetch, look at, convert, split, and make a synthetic one.

  python tools/dataset.py check    coco://my.json?images=pictures --html my.html --fix my_repaired.json
  python tools/dataset.py download balloon data --unverified
  python tools/dataset.py show     via://data/balloon/train/via_region_data.json balloon.html
  python tools/dataset.py convert  penn_fudan://data/PennFudanPed pedestrians.json
  python tools/dataset.py split    penn_fudan://data/PennFudanPed data/pedestrians --val 0.2
  python tools/dataset.py generate data/shapes --train 1000 --val 200 --size 192 192

DATASET is what DATASETS.TRAIN takes: a name of the catalogue (coco_2017_train, with --data-path), or FORMAT://PATH:

  coco://FILE.json?images=DIR                      via://FILE.json?attribute=NAME&category=NAME
  labelme://DIR                                    masks://DIR?images=DIR&masks=DIR&category=NAME
  voc://DIR?split=train                            penn_fudan://DIR
  cityscapes://DIR?split=train                     and of each NAME[10:20] for a part

generate and split write a COCO directory (annotations/instances_{train,val}2017.json, train2017/, val2017/) for
DATA.PATH or --data_path. docs/data.md says more.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this file, installed or not

import cv2

from maskrcnn_benchmark import command
from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.data import catalog, doctor, download, synthetic
from maskrcnn_benchmark.data.doctor.repair import write_repaired
from maskrcnn_benchmark.data.split import write_content, write_split
from maskrcnn_benchmark.engine.checkpoint import write_atomically
from maskrcnn_benchmark.errors import ConfigError, DataError
from maskrcnn_benchmark.report import contact_sheet, data_page, data_report
from maskrcnn_benchmark.report.console import Formatter, progress


def main() -> int | None:
    args = parse()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    return args.function(args)


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
    add_check(subparsers)
    add_convert(subparsers)
    add_split(subparsers)
    add_show(subparsers)
    add_download(subparsers)
    return parser.parse_args()


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="a name of the catalogue, or FORMAT://PATH?option=value")
    parser.add_argument("--data-path", default="", metavar="DIR", help="what relative paths start from, as DATA.PATH")


def add_check(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "check",
        help="find what would stop or hurt training, and write a repaired copy",
        description="Looks at every annotation and image before training does: what is wrong, how often, where first,"
        " and what training will do about it. Of several data sets also whether they fit each other and share images."
        " Exit status: 0 nothing but notes, 1 something stops or hurts training, 2 wrong usage or nothing to read.",
    )
    parser.add_argument("datasets", nargs="*", metavar="DATASET", help="as below; none: those of --config-file")
    parser.add_argument("--data-path", default="", metavar="DIR", help="what relative paths start from, as DATA.PATH")
    parser.add_argument("--config-file", metavar="YAML", help="of the run: its anchors, sizes, classes; else defaults")
    parser.add_argument("--boxes", action="store_true", help="boxes alone: objects without a mask are fine, then")
    parser.add_argument("--no-images", action="store_true", help="do not read the image files, annotations alone")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument(
        "--workers",
        type=int,
        default=cores,
        metavar="N",
        help=f"processes that read images; default one a core, {cores}",
    )
    parser.add_argument("--fix", metavar="OUT.json", help="write a repaired copy of the annotations, COCO's JSON")
    parser.add_argument("--html", metavar="PAGE.html", help="write a page with pictures of the offenders")
    parser.add_argument("--json", metavar="FILE", help="write the findings")
    parser.set_defaults(function=check)


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
    )
    add_source(parser)
    parser.add_argument("output", metavar="OUTPUT", help="a new or empty directory")
    parser.add_argument(
        "--val", type=float, default=0.2, metavar="SHARE", help="of the images for validation, 0..1; default 0.2"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the choice; default 0")
    parser.add_argument("--link", action="store_true", help="hard-link the images instead of copying them")
    parser.set_defaults(function=split)


def add_show(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "show",
        help="draw the annotations on the images",
        description="Writes a contact sheet (OUTPUT.png) or a page to browse that needs no other file (OUTPUT.html)."
        " DATASET may also be module:Class, a data set written in Python.",
    )
    add_source(parser)
    parser.add_argument("output", metavar="OUTPUT", help="a .png or .html file")
    parser.add_argument("--count", type=int, default=24, metavar="N", help="at most so many images; default 24")
    parser.add_argument("--columns", type=int, default=4, metavar="N", help="of the contact sheet; default 4")
    parser.add_argument("--category", metavar="NAME", help="only images that show this class")
    parser.add_argument("--image", type=int, action="append", metavar="ID", help="only this image; may be repeated")
    parser.add_argument("--boxes", action="store_true", help="boxes alone; objects without a mask are shown then, too")
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


def check(args: argparse.Namespace) -> int:
    cfg = get_config(args.config_file, [] if args.config_file else ["MODEL.MASK_ON", "True"])
    names = list(dict.fromkeys(args.datasets or [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]))
    if not names or (args.fix and len(names) > 1):
        raise ConfigError("check needs a DATASET, or a --config-file that names some; --fix takes one DATASET alone")
    if args.workers < 0:
        raise ConfigError(f"--workers {args.workers} must be 0 or more")
    for path in filter(None, (args.fix, args.html, args.json)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    masks, root = cfg.MODEL.MASK_ON and not args.boxes, args.data_path or cfg.DATA.PATH
    surveys = [doctor.survey(name, root, masks, args.workers, progress, not args.no_images) for name in names]
    setting = doctor.Setting(cfg, args.config_file is not None)
    findings = doctor.examine(surveys, setting)
    print(data_report.text(surveys, findings))
    if args.json:
        write_whole(args.json, json.dumps(data_report.as_json(surveys, findings), indent=1, ensure_ascii=False) + "\n")
    if args.html:
        write_whole(args.html, data_page.page(surveys, findings, setting))
        print(f"wrote {args.html}")
    if args.fix:
        counts = write_repaired(surveys[0], args.fix)
        print(f"wrote {counts['images']} images and {counts['annotations']} annotations to {args.fix}")
        print(f"DATASETS.TRAIN takes it as {coco_address(args.fix, surveys[0].source.image_dir)}")
    return doctor.exit_code(findings)


def write_whole(path: str, text: str) -> None:
    write_atomically(Path(path), lambda file: file.write(text.encode()))


def coco_address(file: str, image_dir: Path) -> str:
    """The name by which DATASETS.TRAIN takes a COCO file whose images lie in another directory."""
    images = os.path.relpath(image_dir, Path(file).parent)
    return f"coco://{file}?images=" + re.sub(r"[%&+;]", lambda found: f"%{ord(found[0]):02X}", images)


def convert(args: argparse.Namespace) -> None:
    source = catalog.read_source(args.dataset, args.data_path)
    write_content(source.content, args.output)
    print(f"wrote {len(source.content['images'])} images and {len(source.content['annotations'])} objects")
    print(f"DATASETS.TRAIN takes it as {coco_address(args.output, source.image_dir)}")


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
    dataset = catalog.open_datasets([args.dataset], args.data_path, masks=not args.boxes)
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
