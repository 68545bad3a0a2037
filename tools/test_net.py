"""Evaluate a checkpoint, or score a saved COCO results file."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this file, installed or not

from yacs.config import CfgNode

from maskrcnn_benchmark import command
from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.device import Device, get_device
from maskrcnn_benchmark.engine import checkpoint, determinism, distributed
from maskrcnn_benchmark.engine.datasets import test_datasets
from maskrcnn_benchmark.engine.inference import evaluate_model, tasks_of
from maskrcnn_benchmark.engine.train import prepare_output, write_config, write_report, write_result
from maskrcnn_benchmark.errors import ConfigError
from maskrcnn_benchmark.evaluation.coco import format_table, load_results
from maskrcnn_benchmark.evaluation.expected import check_expected
from maskrcnn_benchmark.evaluation.score import score
from maskrcnn_benchmark.models.build import build_model
from maskrcnn_benchmark.models.weights import load_weights
from maskrcnn_benchmark.report.console import TrainingMeter, final_lines, result_table, setup_logging


def parse() -> argparse.Namespace:
    parser = command.Parser(description=__doc__, epilog="Writes OUTPUT_DIR/result.json: scores, speed and environment.")
    parser.add_argument("--config-file", required=True, metavar="YAML", help="the model and DATASETS.TEST")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--ckpt", metavar="FILE", help="weights; without it OUTPUT_DIR's last checkpoint, then MODEL.WEIGHT"
    )
    source.add_argument("--predictions", metavar="JSON", help="a COCO results file to score instead of running a model")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1, npu, mps, xpu or a plug-in; replaces MODEL.DEVICE")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="configuration keys, such as DATA.PATH coco")
    return parser.parse_intermixed_args()


def main() -> int:
    args = parse()
    started = time.time()
    cfg = get_config(args.config_file, args.overrides)
    device = get_device(args.device or cfg.MODEL.DEVICE)
    with distributed.process_group(device, cfg.DISTRIBUTED.TIMEOUT):
        output = prepare_output(cfg)
        setup_logging(output, distributed.rank(), cfg.LOGGING.RANK_LOGS)
        if not cfg.DATASETS.TEST:
            raise ConfigError("DATASETS.TEST is empty: name a data set of data/catalog.py, such as coco_2017_val")
        scores = score_file(cfg, args.predictions) if args.predictions else score_model(cfg, device, output, args.ckpt)
        performance = measured(scores, device)
        write_result(cfg, device, output, scores, performance)
        if not (output / "metrics.jsonl").exists():  # a training's directory has the training's configuration
            write_config(cfg, output)
        write_report(output)
        if distributed.is_main():
            print(format_table(scores))
            print(result_table(f"{distributed.world_size()}p-{device.name}", performance, scores))
            print(final_lines(performance, scores, time.time() - started), flush=True)
    check_expected(scores, cfg.TEST.EXPECTED_RESULTS, cfg.TEST.EXPECTED_RESULTS_SIGMA_TOL)
    return 0


def score_model(cfg: CfgNode, device: Device, output: Path, ckpt: str | None) -> dict[str, Any]:
    datasets = test_datasets(cfg)
    weights = ckpt or checkpoint.last(output) or cfg.MODEL.WEIGHT
    if not weights:
        raise ConfigError(f"nothing to evaluate: give --ckpt or MODEL.WEIGHT ({output} holds no {checkpoint.LAST})")
    determinism.settle_convolutions(cfg, device)
    model = build_model(cfg, device)
    load_weights(model, str(weights), cfg.MODEL.ALLOW_PICKLE)
    return evaluate_model(cfg, device, model, datasets, output)


def measured(scores: dict[str, Any], device: Device) -> dict[str, Any]:
    """result.json's performance: whole evaluations a second, data, model and scoring together; null for a file."""
    seconds = scores.get("eval_seconds")
    rate = scores["images"] / seconds if seconds else None
    return TrainingMeter(0, 0, 0, 0).performance() | {
        "images_per_second": rate,
        "images_per_second_per_device": rate / distributed.world_size() if rate else None,
        "eval_seconds": seconds,
        "max_memory_mb": round(device.max_memory_mb(), 1),
    }


def score_file(cfg: CfgNode, predictions: str) -> dict[str, Any]:
    results = load_results(predictions)
    dataset = next(iter(test_datasets(cfg).values()))
    keys = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
    tasks = [task for task, key in keys.items() if any(isinstance(r, dict) and key in r for r in results)]
    if not tasks or tasks_of(cfg) == ("box_proposal",):
        tasks = tasks_of(cfg)
    judged_by = (tasks, cfg.TEST.METRICS, cfg.TEST.EVALUATOR, dataset.image_ids, cfg.TEST.KEYPOINT_SIGMAS)
    return score(dataset.ground_truth(), results, *judged_by)[0]


if __name__ == "__main__":
    command.run(main)
