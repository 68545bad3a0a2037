"""Measure, and compare with peers side by side in one process.

  python tools/benchmark.py ops --against torchvision --out ops.json

times every operator at the sizes of an 800 x 1344 training pair, ours and torchvision's in turns.

  python tools/benchmark.py train --against torchvision --dtype float32 --dtype bfloat16 --size 320 --batch 2
  python tools/benchmark.py infer --against torchvision --size 800x1333               whole models, at equal work
  torchrun --nproc-per-node 8 tools/benchmark.py train --batch 16 --config-file configs/e2e_mask_rcnn_R_50_FPN_1x.yaml
  python tools/benchmark.py train --data real --config-file configs/quickstart.yaml DATA.PATH my_data
  python tools/benchmark.py data --config-file configs/quickstart.yaml DATA.PATH my_data      the loader alone
  python tools/benchmark.py data --data synthetic --size 480x640                              the same on drawn images
  python tools/benchmark.py data --against detectron2 --config-file configs/quickstart.yaml DATA.PATH my_data
  python tools/benchmark.py eval                                                              COCO evaluation alone
  python tools/benchmark.py scaling --train train.json                  what 8, 64 and 256 such devices would give
  python tools/benchmark.py floor --kernels cuda --tflops 790 --bandwidth 4300        the least time of a GPU's step

  python tools/benchmark.py run configs/benchmark/cpu_quick.yaml --out base.json      a suite, in fresh processes
  python tools/benchmark.py gate configs/benchmark/cpu_quick.yaml base.json           is this build slower?
  python tools/benchmark.py gate configs/benchmark/cpu_quick.yaml --base-ref main     the same, interleaved with it
  python tools/benchmark.py compare base.json new.json --report comparison.html

compare and gate exit with 0 where all is fine, 1 at a regression, 2 where the results are not comparable.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this file, installed or not

import torch

from maskrcnn_benchmark import command, ops
from maskrcnn_benchmark.benchmark import (
    accuracy,
    data_peers,
    environment,
    flops,
    history,
    loading,
    peers,
    results,
    roofline,
    runs,
    scaling,
    scoring,
    steps,
    suites,
    timing,
    traffic,
)
from maskrcnn_benchmark.benchmark.cases import Case, Setup, ops_cases
from maskrcnn_benchmark.benchmark.compare import Comparison, Limits, compare
from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.device import ABSENT, Device, get_device
from maskrcnn_benchmark.engine import distributed
from maskrcnn_benchmark.errors import UserError, visible
from maskrcnn_benchmark.report import benchmark_page

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A step is one batch, whatever the configuration accumulates.
ONE_BATCH = ("SOLVER.ACCUMULATE_STEPS", "1")
COLUMNS = ("case", "dtype", "kernel", "ours ms", "peer ms", "times faster", "95% interval", "target", "verdict")
WIDTHS = (58, 8, 9, 9, 9, 12, 13, 6, 9)
ROOFLINE = ("MB", "GFLOP", "GB/s", "GFLOP/s", "floor ms", "bound by", "reached")
ROOFLINE_WIDTHS = (7, 7, 6, 7, 8, 10, 7)


def main() -> int:
    args = parse()
    return args.function(args)


def parse() -> argparse.Namespace:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    add_ops(subparsers)
    for add in (
        add_train,
        add_infer,
        add_data,
        add_eval,
        add_scaling,
        add_floor,
        add_run,
        add_compare,
        add_gate,
        add_report,
        add_history,
        add_accuracy,
    ):
        add(subparsers)
    return parser.parse_args()


def add_ops(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "ops",
        help="time the operators",
        description="Times the operators. With --against, ours and the peer's results are compared first: where they"
        " disagree the case is not timed, and the exit status is 1. A missed target does not change it."
        f" How it measures: {timing.METHOD}.",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, npu, mps, xpu or a plug-in")
    parser.add_argument("--against", choices=("torchvision", "composite"), help="the peer; without it ours alone")
    parser.add_argument("--dtype", choices=DTYPES, help="only the cases of this dtype")
    parser.add_argument("--only", type=pattern, metavar="REGEX", help="only the cases whose name it is found in")
    parser.add_argument(
        "--images", type=positive, default=2, metavar="N", help="images a batch of RoIAlign and NMS (default 2)"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="torch's threads; default as torch chooses")
    parser.add_argument(
        "--roofline", action="store_true", help="measure a copy and matrix products, too, and say what share of the"
        " time each operator's least bytes and FLOP would take at their rates",
    )  # fmt: skip
    parser.add_argument("--repeats", type=positive, metavar="N", help="samples a case; default by --budget")
    parser.add_argument(
        "--budget",
        type=float,
        default=4.0,
        metavar="S",
        help="seconds a case, for both sides together (default 4; at least 7 samples a side)",
    )
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="calls left out before (default 2)")
    parser.add_argument(
        "--scale",
        type=fraction,
        default=1.0,
        metavar="F",
        help="shrink the problems to this fraction, for a try: no target is judged then (default 1)",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write raw samples, statistics, environment as JSON")
    parser.set_defaults(function=run_ops)


def add_train(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "train",
        help="time training steps",
        description="Times whole training steps, and their phases in a pass of its own. Synthetic data hold the work"
        " constant: the same images, targets and proposals in every step, all of them sampled, and as many positive"
        f" RoIs as --positives says. How it measures: {steps.METHOD}.",
    )
    add_step_arguments(parser, batch=2)
    parser.add_argument(
        "--positives", type=positive, default=32, metavar="N", help="positive RoIs a synthetic image (default 32)"
    )
    parser.set_defaults(function=run_step, kind="train")


def add_infer(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "infer",
        help="time inference",
        description="Times inference from a batch to COCO results, and its phases in a pass of its own. Without"
        " MODEL.WEIGHT fresh weights are widened until every image has more detections than are kept; with synthetic"
        " data the heads get fixed proposals. What was found is then scored, --phase-steps times. How it measures:"
        f" {steps.METHOD}.",
    )
    add_step_arguments(parser, batch=1)
    parser.set_defaults(function=run_step, kind="infer", positives=0)


def add_data(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "data",
        help="time the data loader",
        description="Times the training loader of the configuration's data sets alone, with its worker processes; and"
        " its stages one by one in this process: read, transform, collate, copy to the device. --against times what"
        " one worker does, from files to samples, and the same steps of a peer's loader, in turns in this process.",
    )
    parser.add_argument(
        "--config-file", metavar="YAML", help=f"names the data sets and transforms (default {peers.CONFIG})"
    )
    parser.add_argument(
        "--data", choices=("synthetic", "real"), default="real", help="real: the configuration's data sets (default);"
        " synthetic: drawn shapes, as large in every run",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=image_size, default="480x640", metavar="HxW", help="of synthetic images (default 480x640)"
    )
    parser.add_argument("--images", type=positive, default=64, metavar="N", help="synthetic ones (default 64)")
    parser.add_argument(
        "--against",
        choices=data_peers.PEERS,
        action="append",
        help="a peer whose loader is timed beside one worker of ours; several times for several",
    )
    parser.add_argument("--device", help="where the batches go; replaces MODEL.DEVICE")
    parser.add_argument("--batch", type=positive, default=16, metavar="N", help="images over all ranks (default 16)")
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="measured batches (default 20)")
    parser.add_argument("--warmup", type=positive, default=2, metavar="N", help="batches left out before (default 2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write raw samples, statistics, environment as JSON")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="configuration keys")
    parser.set_defaults(function=run_data)


def add_eval(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="time COCO evaluation",
        description="Times COCO evaluation of synthetic detections with each engine: boxes and masks apart from results"
        " in memory, and both together from a model's detections, masks pasted and encoded; no files. Where the engines"
        " do not give the same numbers the exit status is 2.",
    )
    parser.add_argument("--engine", choices=scoring.ENGINES, action="append", help="default: both, in turns")
    parser.add_argument("--images", type=positive, default=500, metavar="N", help="default 500")
    parser.add_argument("--detections", type=positive, default=100, metavar="N", help="of an image (default 100)")
    parser.add_argument("--steps", type=positive, default=3, metavar="N", help="evaluations (default 3)")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="evaluations left out before (default 1)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write raw samples, statistics, environment as JSON")
    parser.set_defaults(function=run_eval)


def add_step_arguments(parser: argparse.ArgumentParser, batch: int) -> None:
    parser.add_argument("--config-file", metavar="YAML", help=f"the model (default {peers.CONFIG})")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1, npu, mps, xpu or a plug-in; replaces MODEL.DEVICE")
    parser.add_argument(
        "--dtype",
        choices=(*DTYPES, "float16"),
        action="append",
        help="autocast's; several times for several sides (default: the configuration's)",
    )
    parser.add_argument(
        "--data",
        choices=("synthetic", "real"),
        default="synthetic",
        help="real: the configuration's data sets; the work is not constant then (default synthetic)",
    )
    parser.add_argument(
        "--size", type=image_size, default="800x1333", metavar="HxW", help="of synthetic images, or the short side of"
        " 3:4 ones (default 800x1333)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=positive, action="append", metavar="N", help="images a step over all ranks; several times for"
        f" several cases (default {batch})",
    )  # fmt: skip
    parser.add_argument("--steps", type=positive, default=10, metavar="N", help="measured steps (default 10)")
    parser.add_argument("--warmup", type=positive, default=2, metavar="N", help="steps left out before (default 2)")
    parser.add_argument(
        "--phase-steps", type=positive, default=3, metavar="N", help="steps of the pass by phase (default 3)"
    )
    parser.add_argument("--against", choices=("torchvision",), help="the peer; without it ours alone")
    parser.add_argument("--no-memory", action="store_true", help="several sides: skip the processes that tell memory")
    parser.add_argument("--peak-tflops", type=float, metavar="T", help="a device's peak, for MFU (default: measured)")
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="write traces and tables of the costliest operators"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="torch's threads; default as torch chooses")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write raw samples, statistics, environment as JSON")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="configuration keys")
    parser.set_defaults(default_batch=batch)


def image_size(text: str) -> tuple[int, int]:
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2 or min(sides) < 32:
        raise argparse.ArgumentTypeError(f"{text} must be HxW or a short side, at least 32")
    return (sides[0], sides[1]) if len(sides) == 2 else (sides[0], round(sides[0] * 4 / 3))


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def fraction(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} must lie above 0 and be at most 1")
    return float(text)


def pattern(text: str) -> re.Pattern:
    try:
        return re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from None


def run_ops(args: argparse.Namespace) -> int:
    cases = chosen(ops_cases(args.images), args.dtype, args.only)
    versions = {"torchvision": peers.import_torchvision().__version__} if args.against == "torchvision" else {}
    if args.out:
        require_directory("--out", args.out)
    device = get_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    plan = timing.Plan(warmup=args.warmup, repeats=args.repeats, budget_seconds=args.budget)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with distributed.process_group(device):
        roof = roofline.measure_roof(device, {case.dtype for case in cases}) if args.roofline else None
        rows = measure_ops(cases, args, device, plan, roof)
        if not distributed.is_main():
            return 0
        if roof:
            products = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in sorted(roof.gflop_per_second.items()))
            print(f"measured: a copy {roof.gb_per_second:.1f} GB/s, matrix products {products} GFLOP/s")
        if args.out:
            results.write(args.out, report(args, device, plan, started, versions, rows, roof))
    disagreeing = [row["name"] for row in rows if row["agreement"] and not row["agreement"]["agrees"]]
    for name in disagreeing:
        sys.stderr.write(f"error: {name}: our result and {args.against}'s disagree; not timed\n")
    return 1 if disagreeing else 0


def measure_ops(
    cases: list[Case], args: argparse.Namespace, device: Device, plan: timing.Plan, roof: roofline.Roof | None
) -> list[dict[str, Any]]:
    """A row of each case; the main rank prints it at once."""
    rows = []
    columns = COLUMNS + (ROOFLINE if roof else ())
    heads = [columns, ["---"] * len(columns)] if args.markdown else [columns]
    if distributed.is_main():
        for head in heads:
            print_row(head, args.markdown)
    for case in cases:
        rows.append(measure(case, device, args.against, plan, args.scale, roof))
        if distributed.is_main():
            print_row(cells(rows[-1]), args.markdown)
    return rows


def run_step(args: argparse.Namespace) -> int:
    if args.out:
        require_directory("--out", args.out)
    versions = {"torchvision": peers.import_torchvision().__version__} if args.against else {}
    requests = [step_request(args, batch) for batch in args.batch or [args.default_batch]]
    device = get_device(requests[0].device)
    if args.threads:
        torch.set_num_threads(args.threads)
    with distributed.process_group(device):
        result = started_result(device, distributed.world_size())
        cases, comparisons = result["cases"], []
        for request in requests:
            measured = runs.run(request, device)
            if measured is None:  # not the main rank
                continue
            cases += measured["cases"]
            comparisons.append({"batch": request.batch, **{k: measured[k] for k in ("agreement", "ratios")}})
            print("\n".join(runs.summary(measured)), flush=True)
        main_rank = distributed.is_main()
    if args.out and main_rank:
        extra = {"method": steps.METHOD, "against": args.against, "peers": versions, "comparisons": comparisons}
        results.write(args.out, result | extra)
    apart = [(name, e) for c in comparisons for name, e in c["agreement"].items() if not e["agrees"]]
    for name, entry in apart:
        sys.stderr.write(f"error: {name}: its results and ours disagree, so nothing is timed: {entry}\n")
    return 1 if apart else 0


def run_data(args: argparse.Namespace) -> int:
    if args.out:
        require_directory("--out", args.out)
    overrides = ["SOLVER.IMS_PER_BATCH", str(args.batch), *args.overrides, *ONE_BATCH]
    cfg = get_config(args.config_file or suites.ROOT / peers.CONFIG, overrides)
    device = get_device(args.device or cfg.MODEL.DEVICE)
    if args.against:
        result = started_result(device, 1)
        case = loading.run_against(cfg, args.against, args.batch, args.steps, args.warmup)
        print("\n".join(loading.summary_against(case)), flush=True)
        if args.out:
            results.write(args.out, result | {"cases": [case]})
        return 0
    with distributed.process_group(device):
        result = started_result(device, distributed.world_size())
        if args.data == "synthetic":
            case = loading.run_synthetic(cfg, device, args.steps, args.warmup, args.images, args.size)
        else:
            case = loading.run(cfg, device, args.steps, args.warmup)
    if case is not None:
        print("\n".join(loading.summary(case)), flush=True)
        if args.out:
            results.write(args.out, result | {"cases": [case]})
    return 0


def run_eval(args: argparse.Namespace) -> int:
    if args.out:
        require_directory("--out", args.out)
    device = get_device("cpu")
    engines = tuple(dict.fromkeys(args.engine or scoring.ENGINES))
    with distributed.process_group(device):
        if distributed.is_main():  # as in a training run, where the other ranks wait for it
            result = started_result(device, distributed.world_size())
            result["cases"] = scoring.run(args.images, args.detections, engines, args.steps, args.warmup)
            for case in result["cases"]:
                print("\n".join(scoring.summary(case)), flush=True)
            if args.out:
                results.write(args.out, result)
    return 0


def add_scaling(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "scaling",
        help="predict training on many devices from one device's step",
        description="A cost model, no measurement (docs/scaling.md): the gradients' all-reduce, bucket by bucket, how"
        " much of it the backward pass hides, and the efficiency and images/s that are left; each device keeps its"
        " batch. The links' defaults are assumptions, which are printed.",
    )
    step = parser.add_mutually_exclusive_group(required=True)
    step.add_argument("--train", type=Path, metavar="FILE", help="one device's step, by benchmark.py train --out")
    step.add_argument("--step-ms", type=above_zero, metavar="MS", help="one device's step, of --config-file")
    parser.add_argument("--dtype", choices=DTYPES, help="which case of the files, where there are several")
    parser.add_argument("--config-file", metavar="YAML", help=f"with --step-ms (default {peers.CONFIG})")
    parser.add_argument("--batch", type=positive, default=2, metavar="N", help="with --step-ms: images a device")
    parser.add_argument(
        "--size", type=image_size, default="800x1344", metavar="HxW", help="with --step-ms (default 800x1344)"
    )
    parser.add_argument("--positives", type=positive, default=32, metavar="N", help="with --step-ms: RoIs an image")
    parser.add_argument(
        "--devices", type=positive, action="append", metavar="N", help="several times for several (8, 64, 256)"
    )
    cluster = scaling.Cluster()
    parser.add_argument("--devices-per-node", type=positive, default=cluster.per_node, metavar="N")
    for place, link in (("node", cluster.node), ("network", cluster.network)):
        rate, delay = link.gb_per_second, link.microseconds
        where = f"between devices in the same {place}" if place == "node" else "between nodes"
        parser.add_argument(
            f"--{place}-bandwidth", type=above_zero, default=rate, metavar="GB/S", help=f"{where} ({rate:g})"
        )
        parser.add_argument(f"--{place}-latency", type=above_zero, default=delay, metavar="US", help=f"({delay:g})")
    launch = cluster.launch_microseconds
    parser.add_argument("--launch", type=above_zero, default=launch, metavar="US", help=f"of an exchange ({launch:g})")
    parser.add_argument("--data", type=Path, metavar="FILE", help="one device's loader, by benchmark.py data --out")
    parser.add_argument("--infer", type=Path, metavar="FILE", help="one device's inference, by infer --out")
    parser.add_argument("--eval", type=Path, metavar="FILE", help="scoring, by eval --out; goes with --infer")
    parser.add_argument("--epoch-images", type=positive, default=scaling.TRAIN_IMAGES, metavar="N")
    parser.add_argument("--test-images", type=positive, default=scaling.TEST_IMAGES, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write what is printed as JSON")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="configuration keys")
    parser.set_defaults(function=run_scaling)


def above_zero(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return float(text)


def run_scaling(args: argparse.Namespace) -> int:
    if args.out:
        require_directory("--out", args.out)
    if args.eval and not args.infer:
        raise UserError("--eval goes with --infer")
    cluster = scaling.Cluster(
        args.devices_per_node,
        scaling.Link(args.node_bandwidth, args.node_latency),
        scaling.Link(args.network_bandwidth, args.network_latency),
        args.launch,
    )
    if args.train:
        cfg, size, positives, step = scaling.read_step(args.train, args.dtype, args.overrides)
    else:
        cfg, size, positives = (
            get_config(args.config_file or suites.ROOT / peers.CONFIG, args.overrides),
            args.size,
            args.positives,
        )
        step = scaling.given_step(cfg, size, positives, args.step_ms, args.batch)
    loader = scaling.read_loader(args.data) if args.data else None
    # Between the graphs of a captured step all gradients are exchanged at once
    bucket_mb = math.inf if cfg.SOLVER.GRAPH_CAPTURE else cfg.DISTRIBUTED.BUCKET_MB
    filled = scaling.buckets(flops.gradients(cfg, size, positives), bucket_mb)
    predictions = [scaling.predict(step, filled, cluster, n, loader) for n in args.devices or (8, 64, 256)]
    epochs = []
    if args.infer:
        evaluation = scaling.read_evaluation(args.infer, args.dtype, args.eval, args.test_images)
        epochs = [scaling.epoch(one, evaluation, args.epoch_images, args.test_images) for one in predictions]
    about = scaling.describe(step, filled, cluster, predictions, loader, epochs)
    print("\n".join(scaling.summary(about)))
    if args.out:
        results.write(args.out, {"format": results.FORMAT, "command": sys.argv, **about})
    return 0


def add_floor(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "floor",
        help="count what a step must move and compute, and the least time for it",
        description="Counts every operator of a training or inference step, the bytes that it must move and its FLOP,"
        " on tensors without values: nothing runs on a device. Then reckons how long each would take, at the rates of"
        " a copy and of a matrix product, if it reached the one that it is bound by: the sum is the least time of a"
        " step with these operators; that of convolutions and products alone, the least of any step of this model. The"
        " rules of counting are in maskrcnn_benchmark/benchmark/traffic.py.",
    )
    parser.add_argument("--kind", choices=("train", "infer"), default="train", help="default train")
    parser.add_argument("--config-file", metavar="YAML", help=f"the model (default {peers.CONFIG})")
    parser.add_argument(
        "--device",
        help="whose operators are counted, and whose rates are measured; replaces MODEL.DEVICE",
    )
    parser.add_argument(
        "--kernels",
        choices=ABSENT,
        default="",
        help="count the operators of a build for such a device instead, which need not be here",
    )
    parser.add_argument("--dtype", choices=(*DTYPES, "float16"), help="autocast's (default: the configuration's)")
    parser.add_argument(
        "--size", type=image_size, default="800x1344", metavar="HxW", help="of the images, or the short side of 3:4"
        " ones; padded as the loader pads them (default 800x1344)",
    )  # fmt: skip
    parser.add_argument("--batch", type=positive, default=2, metavar="N", help="images a step (default 2)")
    parser.add_argument(
        "--positives", type=positive, default=128, metavar="N", help="training: RoIs an image in the mask head; where"
        " shapes are fixed all that the configuration samples, positive or not (default 128)",
    )  # fmt: skip
    parser.add_argument(
        "--tflops", type=above_zero, metavar="T", help="10^12 FLOP a second of a product (default: measured)"
    )
    parser.add_argument(
        "--bandwidth", type=above_zero, metavar="GB/S", help="of a copy, read and written together (default: measured)"
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every kernel, and what called it, as JSON")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="configuration keys")
    parser.set_defaults(function=run_floor)


def run_floor(args: argparse.Namespace) -> int:
    if args.out:
        require_directory("--out", args.out)
    cfg = get_config(args.config_file or suites.ROOT / peers.CONFIG, args.overrides)
    device = get_device(args.device or cfg.MODEL.DEVICE)
    dtype, multiple = getattr(torch, args.dtype or cfg.DTYPE), max(1, cfg.DATALOADER.SIZE_DIVISIBILITY)
    height, width = (-(-side // multiple) * multiple for side in args.size)
    step = traffic.Step(args.kind, (height, width), args.batch, dtype, args.positives, args.kernels)
    counted = traffic.count(cfg, device, step)
    about = traffic.reckon(counted, step, given_roof(args.tflops, args.bandwidth, device, dtype))
    for table in traffic.tables(about):
        print_table(table, args.markdown)
    print("\n".join(traffic.summary(about)))
    if args.out:
        results.write(args.out, {"format": results.FORMAT, "benchmark": "floor", "command": sys.argv, **about})
    return 0


def given_roof(tflops: float | None, bandwidth: float | None, device: Device, dtype: torch.dtype) -> roofline.Roof:
    """What is not given is measured. tflops: of products of any dtype."""
    dtypes = {dtype, torch.float32}
    if tflops and bandwidth:
        return roofline.Roof(bandwidth, {str(one).removeprefix("torch."): 1000 * tflops for one in dtypes})
    measured = roofline.measure_roof(device, dtypes)
    products = {name: 1000 * tflops if tflops else rate for name, rate in measured.gflop_per_second.items()}
    return roofline.Roof(bandwidth or measured.gb_per_second, products)


def print_table(rows: list[tuple[str, ...]], markdown: bool) -> None:
    """The first row is the head; the first column is text, the others stand to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for number, row in enumerate(rows):
        if markdown:
            print(f"| {' | '.join(row)} |" + ("" if number else "\n" + "|---" * len(row) + "|"))
        else:
            first, *others = (
                text.ljust(width) if not place else text.rjust(width)
                for place, (text, width) in enumerate(zip(row, widths))
            )
            print("  ".join((first, *others)))
    print()


def started_result(device: Device, ranks: int) -> dict[str, Any]:
    """A result file's head, with no cases yet."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    about = environment.describe(device, ranks)
    return {"format": results.FORMAT, "command": sys.argv, "started": started, "environment": about, "cases": []}


def step_request(args: argparse.Namespace, batch: int) -> runs.Request:
    key = "SOLVER.IMS_PER_BATCH" if args.kind == "train" else "TEST.IMS_PER_BATCH"
    cfg = get_config(args.config_file or suites.ROOT / peers.CONFIG, [key, str(batch), *args.overrides, *ONE_BATCH])
    return runs.Request(
        kind=args.kind,
        cfg=cfg,
        device=args.device or cfg.MODEL.DEVICE,
        dtypes=tuple(dict.fromkeys(args.dtype or [cfg.DTYPE])),
        data=args.data,
        size=args.size,
        positives=args.positives,
        steps=args.steps,
        warmup=args.warmup,
        phase_steps=args.phase_steps,
        against=args.against,
        peak_tflops=args.peak_tflops,
        memory=not args.no_memory,
        profile=args.profile,
    )


def chosen(cases: list[Case], dtype: str | None, only: re.Pattern | None) -> list[Case]:
    cases = [case for case in cases if dtype is None or case.dtype == DTYPES[dtype]]
    matching = [case for case in cases if only is None or only.search(case.name)]
    if not matching:
        names = "; ".join(dict.fromkeys(case.name for case in cases))
        raise UserError(f"--only {only.pattern if only else ''!r}: no case has such a name; there are: {names}")
    return matching


def measure(
    case: Case,
    device: Device,
    against: str | None,
    plan: timing.Plan,
    scale: float,
    roof: roofline.Roof | None = None,
) -> dict[str, Any]:
    """One case as a row of the JSON file: compared first, then timed in turns."""
    problem = case.inputs(Setup(device.torch_device, case.dtype, scale))
    functions = {"ours": case.ours(problem)}
    row: dict[str, Any] = {
        "name": case.name,
        "op": case.op,
        "dtype": str(case.dtype).removeprefix("torch."),
        "kernel": ops.kernel_in_use(case.op, device.type),
        "agreement": None,
        "ratio": None,
        "ratio_interval": None,
        "target": None,
        "verdict": None,
    }
    clocks = [device.clocks()]
    if against:
        name, prepare, agreement = case.peer(against)
        functions["peer"] = prepare(problem)
        error = agreement.error(functions["ours"](), functions["peer"]())
        row["peer_name"] = name
        agrees = distributed.first_message(None if error <= 1 else case.name) is None  # on every rank
        row["agreement"] = {"tolerance": agreement.tolerance, "error": error, "agrees": agrees}
        if not agrees:
            return row | {"verdict": "DISAGREES"}
    parts = distributed.gather((timing.interleave(functions, device.synchronize, plan), [*clocks, device.clocks()]))
    if parts is None:
        return row
    samples = {side: timing.slowest(part[0][side] for part in parts) for side in functions}
    row["clocks"] = [part[1] for part in parts]
    for side, function in functions.items():
        memory = timing.extra_memory_mb(function, device)
        row[side] = {"ms": timing.milliseconds(samples[side]), "extra_memory_mb": memory, "samples_ns": samples[side]}
    least = case.least(problem, functions["ours"]())
    row["roofline"] = roofline.judge(least, row["ours"]["ms"]["p50"], case.dtype, roof)
    if against:
        row["ratio"], *row["ratio_interval"] = timing.ratio_of_medians(samples["peer"], samples["ours"])
    target = case.target if device.type == "cpu" else case.accelerator_target
    if against == "torchvision" and target and scale == 1:  # targets are of the full problem
        row["target"] = target
        row["verdict"] = "met" if row["ratio"] >= target else "missed"
    return row


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the JSON file as a row of the table."""

    def text(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    low, high = row["ratio_interval"] or (None, None)
    return [
        row["name"],
        row["dtype"],
        row["kernel"],
        *(text(row[side]["ms"]["p50"] if side in row else None, ".3f") for side in ("ours", "peer")),
        text(row["ratio"], ".2f"),
        "-" if low is None else f"{low:.2f}-{high:.2f}",
        text(row["target"], "g"),
        row["verdict"] or "-",
        *(roofline_cells(row["roofline"]) if "share" in row.get("roofline", {}) else ()),
    ]


def roofline_cells(found: dict[str, Any]) -> list[str]:
    flop = found["flop"]
    return [
        f"{found['bytes'] / 1e6:.1f}",
        "-" if flop is None else f"{flop / 1e9:.3f}",
        f"{found['gb_per_second']:.1f}",
        "-" if flop is None else f"{found['gflop_per_second']:.1f}",
        f"{found['floor_ms']:.3f}",
        found["bound_by"],
        f"{found['share']:.0%}",
    ]


def print_row(values: list[str] | tuple[str, ...], markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(values) + " |", flush=True)
        return
    texts = zip(values, WIDTHS + ROOFLINE_WIDTHS)
    aligned = [text.ljust(width) if column < 3 else text.rjust(width) for column, (text, width) in enumerate(texts)]
    print("  ".join(aligned), flush=True)


def report(
    args: argparse.Namespace,
    device: Device,
    plan: timing.Plan,
    started: str,
    peers: dict[str, str],
    rows: list,
    roof: roofline.Roof | None,
) -> dict[str, Any]:
    about = environment.describe(device, distributed.world_size())
    return {
        "format": results.FORMAT,
        "benchmark": "ops",
        "command": shlex.join([sys.executable, *sys.argv]),
        "started": started,
        "commit": about["commit"],
        "threads": torch.get_num_threads(),
        "against": args.against,
        "peers": peers,
        "scale": args.scale,
        "method": timing.METHOD,
        "roof": asdict(roof) if roof else None,
        "plan": asdict(plan),
        "environment": about,
        "cases": [comparable(row, args) for row in rows],
    }


def comparable(row: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """A row with what compare reads: of ours alone."""
    metrics = {}
    if "ours" in row:
        metrics["call_ms"] = results.metric([nanoseconds / 1e6 for nanoseconds in row["ours"]["samples_ns"]], "ms")
        if row["ours"]["extra_memory_mb"] is not None:
            metrics["extra_memory_mb"] = results.metric([row["ours"]["extra_memory_mb"]], "MB")
    work = {"images": args.images, "scale": args.scale}
    return row | {"kind": "ops", "config_sha256": None, "warmup": args.warmup, "work": work, "metrics": metrics}


# ---- suites and verdicts


def add_run(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("run", help="run a suite of cases, each in fresh processes, into one file")
    add_suite(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="the merged result")
    parser.set_defaults(function=run_run)


def add_suite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", type=Path, metavar="SUITE.yaml", help="such as configs/benchmark/cpu_quick.yaml")
    parser.add_argument("--device", metavar="D", help="for every case that does not name one")
    parser.add_argument("--processes", type=positive, metavar="N", help="fresh processes a case; default the suite's")
    parser.add_argument("--history", type=Path, metavar="FILE.jsonl", help="add the result to this machine's history")


def run_run(args: argparse.Namespace) -> int:
    require_directory("--out", args.out)
    (outcome,) = measure_suite(args, suites.read(args.suite), [suites.this_build()])
    results.write(args.out, outcome.result)
    if args.history:
        history.append(args.history, outcome.result)
    print(f"wrote {args.out}")
    if outcome.failed:
        raise UserError(f"{args.out} lacks what failed: {'; '.join(outcome.failed)}")
    return 0


def measure_suite(args: argparse.Namespace, suite: suites.Suite, builds: list[suites.Build]) -> list[suites.Outcome]:
    """An outcome a build; the last build is this checkout's."""
    if args.history and args.history.exists():
        history.read(args.history)  # a damaged one is found before the long run, not after it
    suites.check_built()
    more = ["--device", args.device] if args.device else []
    return suites.run(suite, builds, args.processes or suite.processes, more, [sys.executable, *sys.argv])


def add_compare(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="judge a result against a base",
        description="A metric has regressed where its median is worse by more than the threshold and a one-sided"
        " Mann-Whitney test over processes gives p < .002. A missing metric or case is a regression."
        " Exit status: 0 fine, 1 regression, 2 not comparable (device, dtype, configuration or work differ).",
    )
    parser.add_argument("base", type=Path, metavar="BASE.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    add_verdict(parser)
    parser.set_defaults(function=run_compare)


def add_verdict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threshold", type=share, metavar="S", help="how much slower is too much (default 3%%)")
    parser.add_argument(
        "--memory-threshold", type=share, default=Limits.memory, metavar="S", help="of peak memory (default 2%%)"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write it as .md, .html or .json")


def share(text: str) -> float:
    try:
        return suites.share(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a share such as 3%") from None


def run_compare(args: argparse.Namespace) -> int:
    if args.report:
        benchmark_page.check_path(args.report)
    base, new = results.read(args.base), results.read(args.new)
    limits = Limits(threshold=args.threshold or Limits.threshold, memory=args.memory_threshold)
    return tell(args, base, new, compare(base, new, limits))


def tell(args: argparse.Namespace, base: dict[str, Any], new: dict[str, Any], comparison: Comparison) -> int:
    """Prints the verdict, writes the report, and returns the exit status."""
    print(visible(benchmark_page.text(comparison)))
    if args.report:
        benchmark_page.write(args.report, new, base, comparison)
        print(f"wrote {args.report}")
    return comparison.exit_code


def add_gate(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "gate",
        help="run a suite and judge it, for CI",
        description="Runs the suite on this checkout and judges it as compare does, against saved results or, better,"
        " against another revision, which is built beside it and measured in turns with it.",
    )
    add_suite(parser)
    parser.add_argument("base", type=Path, nargs="?", metavar="BASE.json", help="saved results of run")
    parser.add_argument("--base-ref", metavar="GITREF", help="the revision to build and measure as the base")
    parser.add_argument(
        "--base-dir", type=Path, metavar="DIR", help="keep its worktree and environment here for the next time"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the new result")
    parser.add_argument("--base-out", type=Path, metavar="FILE.json", help="with --base-ref, write the base's result")
    add_verdict(parser)
    parser.set_defaults(function=run_gate)


def run_gate(args: argparse.Namespace) -> int:
    if (args.base is None) == (args.base_ref is None):
        raise UserError("gate needs either BASE.json or --base-ref GITREF to compare with")
    if args.base_ref is None and (args.base_dir or args.base_out):
        raise UserError("--base-dir and --base-out go with --base-ref")
    for option, path in (("--out", args.out), ("--base-out", args.base_out)):
        if path:
            require_directory(option, path)
    if args.report:
        benchmark_page.check_path(args.report)
    suite = suites.read(args.suite)
    limits = Limits(threshold=args.threshold or suite.threshold or Limits.threshold, memory=args.memory_threshold)
    if args.base:
        base, new, comparison = measure_until_clear(args, suite, limits, results.read(args.base), None)
    else:
        with suites.other_revision(args.base_ref, args.base_dir) as build:
            base, new, comparison = measure_until_clear(args, suite, limits, None, build)
    if args.history:
        history.append(args.history, new)
    for path, result in ((args.out, new), (args.base_out, base)):
        if path:
            results.write(path, result)
    return tell(args, base, new, comparison)


def measure_until_clear(
    args: argparse.Namespace,
    suite: suites.Suite,
    limits: Limits,
    saved: dict[str, Any] | None,
    build: suites.Build | None,
) -> tuple[dict[str, Any], dict[str, Any], Comparison]:
    """Base, new and the verdict. The base is `saved`, or measured with `build`. While a metric is worse by more than
    its limit but not surely so, as many processes again are added, up to suites.ROUNDS times in all."""
    builds = [*([build] if build else []), suites.this_build()]
    rounds: list[list[dict[str, Any]]] = []
    for _ in range(suites.ROUNDS):
        outcomes = measure_suite(args, suite, builds)
        if any(outcome.failed for outcome in outcomes):
            rounds.clear()  # so that what failed is missing
        rounds.append([outcome.result for outcome in outcomes])
        merged = [results.merge(parts, parts[0]["command"]) for parts in zip(*rounds)]
        base, new = saved or merged[0], merged[-1]
        comparison = compare(base, new, limits)
        if not comparison.unclear:
            break
        sys.stderr.write("worse, but not surely so: measuring more processes\n")
    return base, new, comparison


def require_directory(option: str, path: Path) -> None:
    if not path.resolve().parent.is_dir():
        raise UserError(f"{option} {path}: there is no directory {path.parent}")


def add_report(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("report", help="write a result as Markdown, JSON or an HTML page")
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("--base", type=Path, metavar="BASE.json", help="compare with it")
    parser.add_argument("--history", type=Path, metavar="FILE.jsonl", help="draw this history (HTML)")
    parser.add_argument("--threshold", type=share, metavar="S", help="how much slower is too much (default 3%%)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="ends in .md, .html or .json")
    parser.set_defaults(function=run_report)


def run_report(args: argparse.Namespace) -> int:
    benchmark_page.check_path(args.out)
    new = results.read(args.result)
    base = results.read(args.base) if args.base else None
    limits = Limits(threshold=args.threshold or Limits.threshold)
    comparison = compare(base, new, limits) if base else None
    past = history.series(history.read(args.history)) if args.history else []
    benchmark_page.write(args.out, new, base, comparison, past)
    print(f"wrote {args.out}")
    return 0


def add_history(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "history",
        help="draw a machine's results over time, and name the commits where they stepped",
        description="A step is told where it is above 3%% and certain (Mann-Whitney p < .002 over runs, counted for all"
        " places where it could have been): some 18 runs in all, or 5 after 20 steady ones.",
    )
    parser.add_argument("history", type=Path, metavar="FILE.jsonl", help="what run and gate --history wrote")
    parser.add_argument("--add", type=Path, metavar="RESULT.json", help="first add this result to it")
    parser.add_argument("--only", type=pattern, metavar="REGEX", help="only the cases and metrics it is found in")
    parser.set_defaults(function=run_history)


def run_history(args: argparse.Namespace) -> int:
    if args.add:
        history.append(args.history, results.read(args.add))
    for series in history.series(history.read(args.history)):
        if args.only is None or args.only.search(f"{series.case} {series.metric}"):
            print(visible("\n".join(history.describe(series))))
    return 0


def add_accuracy(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "accuracy",
        help="gather the accuracy of runs with several seeds, for compare",
        description="compare judges such files by a one-sided t test over the seeds, p < .05.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="OUTPUT_DIR", help="finished runs, alike but for SEED")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.set_defaults(function=run_accuracy)


def run_accuracy(args: argparse.Namespace) -> int:
    require_directory("--out", args.out)
    results.write(args.out, accuracy.gather(args.runs, [sys.executable, *sys.argv]))
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    command.run(main)
