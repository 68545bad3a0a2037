"""`benchmark.py train` and `infer`: build the sides, compare what they compute, time them, and write it all down."""

from __future__ import annotations

import functools
import gc
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, supported_activities
from yacs.config import CfgNode

from ..config import flat, sha256
from ..data.catalog import build_dataset, check_num_classes, num_classes
from ..data.coco import content_of
from ..data.loader import test_loader, train_loader
from ..device import Device, get_device
from ..engine import distributed
from ..engine.graphs import WARM_UP
from ..errors import UserError
from ..evaluation.coco import evaluate
from ..evaluation.results import concatenate
from . import environment, flops, peers, sides
from .results import metric
from .sides import Batches, Side
from .steps import Samples, first_steps, measure, over_ranks, step_metrics, whole
from .timing import ratio_of_medians
from .workload import OBJECTS, Workload, draw_sample, ground_truth, inference_workload, repeat, training_workload

PROFILED_STEPS = 2
# (height and width of the padded images, RoIs in the mask head) -> FLOP of a step of this rank
FlopCounter = Callable[[tuple[int, int], int], float]


@dataclass(frozen=True)
class Request:
    """What is asked for.

    kind: train or infer. dtypes: each is a side of its own, and a peer's in both memory formats, too. data: synthetic
    or real. size: (height, width) of synthetic images. positives: positive RoIs an image. against: a peer or None.
    peak_tflops: of one device, or None to measure it. memory: also start a process a side for its peak memory, where
    there are several.
    """

    kind: str
    cfg: CfgNode
    device: str
    dtypes: tuple[str, ...]
    data: str
    size: tuple[int, int]
    positives: int
    steps: int
    warmup: int
    phase_steps: int
    against: str | None = None
    peak_tflops: float | None = None
    memory: bool = True
    profile: Path | None = None

    @property
    def training(self) -> bool:
        return self.kind == "train"

    @property
    def repeats(self) -> bool:
        """Whether images have few shapes."""
        return self.data == "synthetic" or bool(self.cfg.INPUT.FIXED_SHAPES)

    @property
    def batch(self) -> int:
        """Images a step over all ranks."""
        return (self.cfg.SOLVER if self.training else self.cfg.TEST).IMS_PER_BATCH


@dataclass(frozen=True)
class SideName:
    system: str
    dtype: str
    channels_last: bool = False

    def __str__(self) -> str:
        return f"{self.system} {self.dtype}" + (" channels-last" if self.channels_last else "")


def side_names(request: Request) -> list[SideName]:
    """Ours first. Ours runs in the memory format that suits the device."""
    names = [SideName("ours", dtype) for dtype in request.dtypes]
    if request.against:
        names += [SideName(request.against, dtype, last) for dtype in request.dtypes for last in (False, True)]
    return names


def run(request: Request, device: Device) -> dict[str, Any] | None:
    """The case of each side, how the peer's results agree with ours, and ratios; on the main rank, None on the others.
    Without agreement nothing is timed: there are no cases."""
    check(request)
    device.time_convolutions(request.repeats)
    peaks = {dtype: peak(request, device, dtype) for dtype in request.dtypes}
    workload = make_workload(request, device)
    names = side_names(request)
    built = {str(name): make_side(request, name, device, workload) for name in names}
    phases = {name: side.phases for name, side in built.items()}
    device.reset_peak_memory()
    first = first_steps(phases, device)
    agreement = peers.agree(built, request.training) if request.against else {}
    if not all(entry["agrees"] for entry in agreement.values()):
        return {"cases": [], "agreement": agreement, "ratios": []}
    clocks = [device.clocks()]
    samples = measure(phases, device, request.warmup, request.steps, request.phase_steps, first)
    clocks.append(device.clocks())
    if len(names) == 1:
        memory = {str(names[0]): device.max_memory_mb()}
    else:
        memory = {str(name): memory_alone(request, name) for name in names if request.memory}
    count, cases = flop_counter(request), []
    for name in names:
        side = built[str(name)]
        scoring = [exposed_evaluation(request, side) for _ in range(request.phase_steps) if side.truth]
        parts = distributed.gather(part_of(request, side, samples[str(name)], count, memory.get(str(name)), clocks))
        if parts is not None:
            cases.append(case(request, name, side, parts, peaks[name.dtype], scoring))
    if request.profile:
        for name in names:
            write_profile(request.profile, case_name(request, name), built[str(name)], device)
    if not distributed.is_main():
        return None
    return {"cases": cases, "agreement": agreement, "ratios": ratios(names, samples)}


def check(request: Request) -> None:
    ranks = distributed.world_size()
    if request.batch % ranks:
        raise UserError(f"a batch of {request.batch} images cannot be divided among {ranks} ranks")
    if request.warmup <= eager_steps(request):
        raise UserError(f"--warmup {request.warmup}: with SOLVER.GRAPH_CAPTURE the first {WARM_UP} steps are eager")
    model = request.cfg.MODEL
    if (model.RETINANET_ON or model.RPN_ONLY) and (request.training or request.against):
        raise UserError(
            "RoIs are counted in training and with --against: MODEL.RETINANET_ON and MODEL.RPN_ONLY have none;"
            " set both to False"
        )
    if model.KEYPOINT_ON and request.training and request.data == "synthetic":
        raise UserError("synthetic data has no keypoints: measure the training of MODEL.KEYPOINT_ON with --data real")
    if request.against and (ranks > 1 or request.data == "real"):
        raise UserError("--against works with synthetic data, in one process without ranks")


def eager_steps(request: Request) -> int:
    """Those before the captured ones."""
    return WARM_UP if request.training and request.cfg.SOLVER.GRAPH_CAPTURE else 0


# ---- sides


def make_workload(request: Request, device: Device) -> Workload | None:
    """This rank's share of the images; None for real data."""
    if request.data == "real":
        return None
    share = request.batch // distributed.world_size()
    first = distributed.rank() * share
    if request.training:
        return training_workload(request.cfg, device, share, request.size, request.positives, first)
    return inference_workload(request.cfg, device, share, request.size, first)


def make_side(request: Request, name: SideName, device: Device, workload: Workload | None) -> Side:
    cfg, dtype, training = request.cfg, getattr(torch, name.dtype), request.training
    if name.system == "ours":
        batches, truth = real_data(request, device) if workload is None else synthetic_data(request, workload)
        proposals = workload.proposals if workload else None
        if training:
            return sides.training_side(cfg, device, dtype, batches, proposals)
        return sides.inference_side(cfg, device, dtype, batches, truth, proposals)
    cfg = cfg.clone()  # a peer runs as it does by itself
    cfg.defrost()
    cfg.SOLVER.GRAPH_CAPTURE = False
    weights = sides.fresh_model(cfg, device, None if training else workload.images).state_dict()
    build = peers.training_side if training else peers.inference_side
    return build(cfg, device, dtype, workload, weights, name.channels_last)


def synthetic_data(request: Request, workload: Workload) -> tuple[Batches, dict[str, Any] | None]:
    """The batch without end; and for inference the ground truth of all ranks' images."""
    if request.training:
        return repeat(workload), None
    classes = num_classes(request.cfg)[1] - 1
    samples = [draw_sample(number, request.size, OBJECTS, classes) for number in range(request.batch)]
    return repeat(workload), ground_truth(request.cfg, samples)


def real_data(request: Request, device: Device) -> tuple[Batches, dict[str, Any] | None]:
    """Batches without end from the configuration's data sets; of a test set the full ones, and its ground truth."""
    cfg, ranks = request.cfg, (distributed.rank(), distributed.world_size())
    dataset = build_dataset(cfg.DATASETS.TRAIN if request.training else cfg.DATASETS.TEST, cfg, request.training)
    check_num_classes(cfg, dataset)
    if request.training:
        return iter(train_loader(cfg, dataset, device, *ranks, 0)), None
    share = request.batch // ranks[1]
    if len(dataset) // ranks[1] < share:
        raise UserError(f"{len(dataset)} images do not fill a batch of {request.batch}")
    loader = test_loader(cfg, dataset, device, *ranks)
    endless: Iterator[Any] = itertools.chain.from_iterable(itertools.repeat(loader))
    return (batch for batch in endless if len(batch[0]) == share), content_of(dataset)


def peak(request: Request, device: Device, dtype: str) -> dict[str, Any]:
    """Of all devices together."""
    given = request.peak_tflops
    tflops, source = (given, "given") if given else flops.measured_peak(device, getattr(torch, dtype))
    return {"tflops": tflops * distributed.world_size(), "source": source}


def memory_alone(request: Request, name: SideName) -> float:
    """Peak memory in MB of a fresh process that runs this side's share of the batch alone, without other ranks."""
    spawn = multiprocessing.get_context("spawn")
    cfg = request.cfg.clone()
    cfg.defrost()
    (cfg.SOLVER if request.training else cfg.TEST).IMS_PER_BATCH = request.batch // distributed.world_size()
    alone = replace(request, cfg=cfg, warmup=1 + eager_steps(request), steps=2, phase_steps=0)
    with ProcessPoolExecutor(1, mp_context=spawn) as executor:
        return executor.submit(_peak_memory, alone, name, torch.get_num_threads()).result()


def _peak_memory(request: Request, name: SideName, threads: int) -> float:
    torch.set_num_threads(threads)
    device = get_device(request.device)
    device.activate()
    device.time_convolutions(request.repeats)
    side = make_side(request, name, device, make_workload(request, device))
    gc.collect()
    device.reset_peak_memory()
    measure({"": side.phases}, device, request.warmup, request.steps, request.phase_steps)
    return device.max_memory_mb()


# ---- results


@dataclass(frozen=True)
class Part:
    """What a rank measured of a side: rois by kind and flop of each step of the pass end to end, clocks around it."""

    samples: Samples
    rois: dict[str, list[int]]
    flop: list[float]
    memory: float | None
    clocks: list[dict[str, Any]]


def part_of(
    request: Request,
    side: Side,
    samples: Samples,
    count: FlopCounter,
    memory: float | None,
    clocks: list[dict[str, Any]],
) -> Part:
    """
    Raises:
        UserError: the number of RoIs varies although the work is to be constant.
    """
    end_to_end = slice(request.warmup, request.warmup + request.steps)
    rois = {kind: counts[end_to_end] for kind, counts in side.counts.read().items()}
    if request.data == "synthetic" and len(set(rois["mask_head"])) > 1:
        raise UserError(
            f"{side.name}: the work is not constant: RoIs in the mask head step by step {rois['mask_head']}"
        )
    if not request.cfg.MODEL.MASK_ON:
        rois["mask_head"] = [0] * len(rois["mask_head"])
    flop = [count(size, in_mask_head) for size, in_mask_head in zip(side.sizes[end_to_end], rois["mask_head"])]
    return Part(samples, rois, flop, memory, clocks)


def flop_counter(request: Request) -> FlopCounter:
    count = flops.training_flops if request.training else flops.inference_flops
    of_size = functools.cache(functools.partial(count, request.cfg))
    share = request.batch // distributed.world_size()
    return lambda size, in_mask_head: of_size(size).of(share, in_mask_head)


def exposed_evaluation(request: Request, side: Side) -> float:
    """Seconds from the last step's end until everything that the side found is scored: nothing else happens meanwhile.
    On the main rank, which does it."""
    started = time.perf_counter()
    shards = distributed.gather(side.results)
    if shards is not None:
        results = {images: found for shard in shards for images, found in shard.items()}
        looked_at = [image for images in results for image in images]
        tasks = ("bbox", "segm") if request.cfg.MODEL.MASK_ON else ("bbox",)
        everything = concatenate(list(results.values()))
        evaluate(side.truth, everything, tasks, request.cfg.TEST.EVALUATOR, looked_at)
    return time.perf_counter() - started


def case(
    request: Request, name: SideName, side: Side, parts: list[Part], peak: dict[str, Any], scoring: list[float]
) -> dict[str, Any]:
    samples = over_ranks([part.samples for part in parts])
    rois = {kind: [sum(steps) for steps in zip(*(part.rois[kind] for part in parts))] for kind in parts[0].rois}
    flop = [sum(steps) for steps in zip(*(part.flop for part in parts))]
    memory = [part.memory for part in parts if part.memory is not None]
    speed = [amount / (ms / 1000) / (peak["tflops"] * 1e12) for amount, ms in zip(flop, samples.step)]
    metrics = step_metrics(samples, request.batch, len(parts))
    metrics["mfu"] = metric(speed, "share", "higher", gate=False)
    metrics["flop"] = metric(flop, "FLOP", gate=False)
    for kind, values in rois.items():
        if values:
            metrics[f"{kind}_rois"] = metric(values, "RoIs", "higher", gate=False)
    if memory:
        metrics["max_memory_mb"] = metric([max(memory)], "MB")
    if scoring:
        metrics["exposed_evaluation_seconds"] = metric(scoring, "s", gate=False)
    metrics["init_seconds"] = metric([side.init_seconds], "s", gate=False)
    work: dict[str, Any] = {
        "data": request.data,
        "constant": request.data == "synthetic",
        "batch": request.batch,
        "trainable_parameters": side.trainable_parameters(),
    }
    if request.data == "synthetic":
        work |= {"image": list(request.size), "proposals": "fixed", "mask_head_rois": rois["mask_head"][0]}
    return {
        "name": case_name(request, name),
        "kind": request.kind,
        "system": name.system,
        "dtype": name.dtype,
        "config_sha256": sha256(request.cfg),
        "config": flat(request.cfg),
        "warmup": request.warmup,
        "work": work,
        "metrics": metrics,
        "peak": peak,
        "losses": side.read_losses(),
        "clocks": [part.clocks for part in parts],
    }


def case_name(request: Request, name: SideName) -> str:
    size = "{}x{} ".format(*request.size) if request.data == "synthetic" else ""
    peer = "" if name.system == "ours" else f"{name.system} " + ("channels-last " if name.channels_last else "")
    graph = "graph " if name.system == "ours" and request.training and request.cfg.SOLVER.GRAPH_CAPTURE else ""
    body = request.cfg.MODEL.BACKBONE.CONV_BODY
    return f"{request.kind} {peer}{graph}{body} {size}batch {request.batch} {name.dtype} {request.data}"


def ratios(names: list[SideName], samples: Mapping[str, Samples]) -> list[dict[str, Any]]:
    """How many times faster each of ours is than each of the peer's, with the ends of its interval."""
    rows = []
    for ours in (name for name in names if name.system == "ours"):
        for peer in (name for name in names if name.system != "ours"):
            ratio, low, high = ratio_of_medians(samples[str(peer)].step, samples[str(ours)].step)
            rows.append({"ours": str(ours), "peer": str(peer), "times_faster": ratio, "interval": [low, high]})
    return rows


def write_profile(directory: Path, title: str, side: Side, device: Device) -> None:
    """A trace for Perfetto or chrome://tracing, and a table of the ten operators that cost the most themselves."""
    directory.mkdir(parents=True, exist_ok=True)
    device.synchronize()
    with profile(activities=supported_activities()) as profiler:
        for _ in range(PROFILED_STEPS):
            whole(side.phases)
        device.synchronize()
    stem = f"{title} rank {distributed.rank()}".replace(" ", "_")
    profiler.export_chrome_trace(str(directory / f"{stem}.json"))
    order = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=60)
    (directory / f"{stem}.txt").write_text(table + "\n", encoding="utf-8")
    if distributed.is_main():
        print(f"{title}: the costliest operators of {PROFILED_STEPS} steps\n{table}", flush=True)


def summary(result: dict[str, Any]) -> list[str]:
    """Lines for people."""
    lines = []
    for entry in result["cases"]:
        metrics = entry["metrics"]
        value = {name: content["p50"] for name, content in metrics.items()}
        step, work = metrics["step_ms"], entry["work"]
        phases = [name for name in metrics if name.endswith("_ms") and name != "step_ms"]
        parts = [f"{name.removesuffix('_ms')} {value[name]:.1f}" for name in phases]
        mfu = f"{value['mfu']:.1%} of {entry['peak']['tflops']:.2f} TFLOP/s ({entry['peak']['source']})"
        disturbed = environment.disturbances(*entry["clocks"][0])
        lines += [
            entry["name"] + ("" if work["constant"] else ": the work is not constant, it follows the images"),
            f"  step {step['p50']:.1f} ms, p90 {step['p90']:.1f}, p99 {step['p99']:.1f}; {len(step['samples'])} steps,"
            f" {entry['warmup']} before them left out",
            f"  {value['images_per_second']:.3f} images/s, {value['images_per_second_per_device']:.3f} a device;"
            f" {value['data_wait_share']:.1%} of the time waiting for data, {mfu}",
            f"  by phase, ms: {'  '.join(parts)}",
            f"  peak memory {value.get('max_memory_mb', float('nan')):.0f} MB; init {value['init_seconds']:.1f} s,"
            f" first step {value['compile_seconds']:.1f} s; {work['trainable_parameters']} trainable parameters;"
            f" RoIs in the mask head: {value['mask_head_rois']:g}",
        ]
        if "exposed_evaluation_seconds" in value:
            lines.append(f"  then {value['exposed_evaluation_seconds']:.3f} s of evaluation, which nothing overlaps")
        if disturbed:
            lines.append(f"  meanwhile the machine was disturbed: {disturbed}")
    for row in result["ratios"]:
        low, high = row["interval"]
        lines.append(
            f"{row['ours']} is {row['times_faster']:.2f} times as fast as {row['peer']} (95%: {low:.2f}-{high:.2f})"
        )
    return lines
