"""Train a model, evaluate it, and report accuracy and speed."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this file, installed or not

from maskrcnn_benchmark import command
from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.engine import distributed
from maskrcnn_benchmark.engine.train import Run, prepare_output, run_training
from maskrcnn_benchmark.errors import ResultError
from maskrcnn_benchmark.evaluation.expected import check_expected
from maskrcnn_benchmark.report.console import case_log, final_lines, result_table, setup_logging


def parse() -> argparse.Namespace:
    parser = command.Parser(
        description=__doc__,
        epilog="One process: python tools/train_net.py --config-file configs/quickstart.yaml DATA.PATH my_data. "
        "Many: torchrun --nproc-per-node N tools/train_net.py ... (test/train_full_8p.sh does it).",
    )
    parser.add_argument("--config-file", required=True, metavar="YAML", help="what to train, such as configs/*.yaml")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1, npu, mps, xpu or a plug-in; replaces MODEL.DEVICE")
    parser.add_argument("--resume", action="store_true", help="continue from OUTPUT_DIR's last checkpoint")
    parser.add_argument("--deterministic", action="store_true", help="the same as DETERMINISTIC True")
    parser.add_argument("--skip-test", action="store_true", help="do not evaluate at the end")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY VALUE", help="configuration keys, such as SOLVER.BASE_LR 0.01"
    )
    return parser.parse_intermixed_args()


def main() -> int:
    args = parse()
    started = time.time()
    cfg = get_config(args.config_file, args.overrides + ["DETERMINISTIC", "True"] * args.deterministic)
    device = get_device(args.device or cfg.MODEL.DEVICE)
    with distributed.process_group(device, cfg.DISTRIBUTED.TIMEOUT):
        output = prepare_output(cfg)
        setup_logging(output, distributed.rank(), cfg.LOGGING.RANK_LOGS)
        run = run_training(cfg, device, args.resume or distributed.restarted(), args.skip_test)
        missed = None
        if run.scores and not args.skip_test:
            try:
                check_expected(run.scores, cfg.TEST.EXPECTED_RESULTS, cfg.TEST.EXPECTED_RESULTS_SIGMA_TOL)
            except ResultError as error:
                missed = error  # after the report: its lines are there even when they disappoint
        if distributed.is_main():
            report(run, time.time() - started, accuracy=bool(run.scores))
    if missed:
        raise missed
    return 0


def report(run: Run, seconds: float, accuracy: bool) -> None:
    """The table of results and the last lines, and CaseName.log where a network name is set."""
    performance = run.performance
    print(result_table(f"{distributed.world_size()}p-{run.device.name}", performance, run.scores))
    print(final_lines(performance, run.scores, seconds), flush=True)
    if run.cfg.LOGGING.NETWORK and run.loss is not None:  # a finished run that is resumed keeps its record
        main_task = run.scores.get("bbox") or {}
        case_log(
            run.output,
            network=run.cfg.LOGGING.NETWORK,
            rank_size=distributed.world_size(),
            batch_size=run.cfg.SOLVER.IMS_PER_BATCH,
            device_type=run.device.type,
            accuracy=accuracy,
            fps=performance["images_per_second"],
            training_time=performance["step_ms"]["p50"],
            train_accuracy=main_task.get("AP"),
            loss=run.loss,
            e2e_time=seconds,
        )


if __name__ == "__main__":
    command.run(main)
