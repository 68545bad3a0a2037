"""Detect and segment objects in image files: pictures with boxes, masks, names and scores, and JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this file, installed or not

import cv2

from maskrcnn_benchmark import command
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.engine.checkpoint import write_atomically
from maskrcnn_benchmark.engine.predict import Prediction, find_images, load_predictor, predict
from maskrcnn_benchmark.errors import DataError
from maskrcnn_benchmark.report.console import progress
from maskrcnn_benchmark.report.visualize import draw_results


def parse() -> argparse.Namespace:
    parser = command.Parser(description=__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image files, or directories of them")
    parser.add_argument("--weights", required=True, metavar="FILE", help="a checkpoint that train_net.py wrote")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write a picture of each image here, as PNG")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images through the model at a time (1)")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score that is drawn and written (0.5)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write COCO results, with file and category names beside the ids"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, npu, mps, xpu or a plug-in")
    args = parser.parse_intermixed_args()
    if args.batch < 1:
        parser.error(f"--batch {args.batch} must be at least 1")
    if not (args.output or args.json):
        parser.error("give --output DIR for pictures or --json FILE for results, or both")
    return args


def main() -> int:
    args = parse()
    paths = find_images(args.inputs)
    predictor = load_predictor(Path(args.weights), get_device(args.device))
    for directory in filter(None, (args.output, args.json and args.json.parent)):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot create {directory}: {error.strerror}") from error
    results, failed = [], 0
    often = {name for name, count in Counter(path.name for path in paths).items() if count > 1}
    for number, prediction in enumerate(progress(predict(predictor, paths, args.batch), len(paths), "predict")):
        if prediction.error:
            failed += 1
            print(f"error: {prediction.error}", file=sys.stderr)
            continue
        prediction.results = [result for result in prediction.results if result["score"] >= args.threshold]
        if args.output:
            # The suffix stays in the name: a.jpg and a.png are two images. So are x/a.jpg and y/a.jpg.
            name = f"{number:04d}_{prediction.path.name}" if prediction.path.name in often else prediction.path.name
            draw(prediction, predictor.category_names, args.output / f"{name}.png", args.threshold)
        for result in prediction.results:
            names = {
                "file_name": str(prediction.path),
                "category_name": predictor.category_names[result["category_id"]],
            }
            results.append({**result, "image_id": number, **names})
    if args.json:
        text = json.dumps(results, ensure_ascii=False)
        write_atomically(args.json, lambda file: file.write(text.encode()))
    print(f"{len(paths) - failed} images, {len(results)} objects" + (f", {failed} files unreadable" if failed else ""))
    return 1 if failed else 0


def draw(prediction: Prediction, names: dict[int, str], path: Path, threshold: float) -> None:
    picture = draw_results(prediction.image, prediction.results, names, threshold)
    _, png = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    write_atomically(path, lambda file: file.write(png.tobytes()))


if __name__ == "__main__":
    command.run(main)
