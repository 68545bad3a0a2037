"""Detect and segment objects in images and videos: pictures with boxes, masks, keypoints, names and scores, and
JSON."""

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
from maskrcnn_benchmark.engine.predict import Prediction, Predictor, count_inputs, find_inputs, load_predictor, predict
from maskrcnn_benchmark.errors import DataError, visible
from maskrcnn_benchmark.report.console import progress
from maskrcnn_benchmark.report.visualize import draw_results


def parse() -> argparse.Namespace:
    parser = command.Parser(description=__doc__)
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="image and video files, directories of them, or patterns in quotes such as 'photos/**/*.jpg'",
    )
    parser.add_argument("--weights", required=True, metavar="FILE", help="a checkpoint that train_net.py wrote")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write a picture of each image and frame here, as PNG"
    )
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
    paths = find_inputs(args.inputs)
    predictor = load_predictor(Path(args.weights), get_device(args.device))
    for directory in filter(None, (args.output, args.json and args.json.parent)):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot create {directory}: {error.strerror}") from error
    results, done, failed = [], 0, 0
    numbers = {path: number for number, path in enumerate(paths)}
    often = {name for name, count in Counter(path.name for path in paths).items() if count > 1}
    predictions = progress(predict(predictor, paths, args.batch), count_inputs(paths), "predict")
    for image_id, prediction in enumerate(predictions):
        if prediction.error:
            failed += 1
            print(f"error: {visible(prediction.error)}", file=sys.stderr)
            continue
        prediction.results = [result for result in prediction.results if result["score"] >= args.threshold]
        if args.output:
            name = picture_name(prediction, numbers[prediction.path], prediction.path.name in often)
            draw(prediction, predictor, args.output / name, args.threshold)
        results += [describe(prediction, result, image_id, predictor.category_names) for result in prediction.results]
        done += 1
    if args.json:
        text = json.dumps(results, ensure_ascii=False)
        write_atomically(args.json, lambda file: file.write(text.encode()))
    print(f"{done} images, {len(results)} objects" + (f", {failed} files unreadable" if failed else ""))
    return 1 if failed else 0


def picture_name(prediction: Prediction, number: int, ambiguous: bool) -> str:
    """The suffix stays in the name: a.jpg and a.png are two images. So are x/a.jpg and y/a.jpg: then `number` tells."""
    name = f"{number:04d}_{prediction.path.name}" if ambiguous else prediction.path.name
    return f"{name}.png" if prediction.frame is None else f"{name}_{prediction.frame:06d}.png"


def describe(prediction: Prediction, result: dict, image_id: int, names: dict[int, str]) -> dict:
    """A COCO result that tells its file, frame and class by name too."""
    frame = {} if prediction.frame is None else {"frame": prediction.frame}
    more = {"file_name": str(prediction.path), **frame, "category_name": names[result["category_id"]]}
    return {**result, "image_id": image_id, **more}


def draw(prediction: Prediction, predictor: Predictor, path: Path, threshold: float) -> None:
    picture = draw_results(
        prediction.image, prediction.results, predictor.category_names, threshold, limbs=predictor.limbs
    )
    _, png = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    write_atomically(path, lambda file: file.write(png.tobytes()))


if __name__ == "__main__":
    command.run(main)
