"""`benchmark.py train` and `infer`: build the sides, compare what they compute, time them, and write it all down."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, supported_activities
from yacs.config import CfgNode

from ..config import flat, sha256
from ..data.catalog import build_dataset, check_num_classes
from ..data.loader import test_loader, train_loader
from ..device import Device, get_device
from ..engine import distributed
from ..errors import UserError
from . import flops, peers, sides
from .results import metric
from .sides import Batches, Side
from .steps import Samples, measure, over_ranks, step_metrics, whole
from .timing import ratio_of_medians
from .workload import Workload, inference_workload, repeat, training_workload

PROFILED_STEPS = 2


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
    ranks = distributed.world_size()
    if request.batch % ranks:
        raise UserError(f"a batch of {request.batch} images cannot be divided among {ranks} ranks")
    if request.against and (ranks > 1 or request.data == "real"):
        raise UserError("--against works with synthetic data, in one process without ranks")
    workload = make_workload(request, device) if request.data == "synthetic" else None
    names = side_names(request)
    built = {str(name): make_side(request, name, device, workload) for name in names}
    agreement = peers.agree(built, request.training) if request.against else {}
    if not all(entry["agrees"] for entry in agreement.values()):
        return {"cases": [], "agreement": agreement, "ratios": []}
    peaks = {dtype: peak(request, device, dtype) for dtype in request.dtypes}
    for side in built.values():
        side.forget()
    device.reset_peak_memory()
    clocks = [device.clocks()]
    phases = {name: side.phases for name, side in built.items()}
    samples = measure(phases, device, request.warmup, request.steps, request.phase_steps)
    clocks.append(device.clocks())
    if len(names) == 1:
        memory = {str(names[0]): device.max_memory_mb()}
    else:
        memory = {str(name): memory_alone(request, name) for name in names if request.memory}
    cases = []
    for name in names:
        side = built[str(name)]
        parts = distributed.gather((samples[str(name)], side.counts.read(), memory.get(str(name))))
        if parts is not None:
            cases.append(case(request, name, side, parts, peaks[name.dtype]) | {"clocks": clocks})
    if request.profile:
        for name, side in built.items():
            write_profile(request.profile, f"{request.kind} {name}", side, device)
    if not distributed.is_main():
        return None
    return {"cases": cases, "agreement": agreement, "ratios": ratios(names, samples)}


# ---- sides


def make_workload(request: Request, device: Device) -> Workload:
    """This rank's share of the images."""
    share = request.batch // distributed.world_size()
    first = distributed.rank() * share
    if request.training:
        return training_workload(request.cfg, device, share, request.size, request.positives, first)
    return inference_workload(request.cfg, device, share, request.size, first)


def make_side(request: Request, name: SideName, device: Device, workload: Workload | None) -> Side:
    cfg, dtype, training = request.cfg, getattr(torch, name.dtype), request.training
    if name.system == "ours":
        build = sides.training_side if training else sides.inference_side
        if workload is None:
            return build(cfg, device, dtype, real_batches(request, device))
        return build(cfg, device, dtype, repeat(workload), workload.proposals)
    weights = sides.fresh_model(cfg, device, None if training else workload.images).state_dict()
    build = peers.training_side if training else peers.inference_side
    return build(cfg, device, dtype, workload, weights, name.channels_last)


def real_batches(request: Request, device: Device) -> Batches:
    """Without end, from the configuration's data sets; of a test set the batches that are full."""
    cfg, ranks = request.cfg, (distributed.rank(), distributed.world_size())
    dataset = build_dataset(cfg.DATASETS.TRAIN if request.training else cfg.DATASETS.TEST, cfg, request.training)
    check_num_classes(cfg, dataset)
    if request.training:
        return iter(train_loader(cfg, dataset, device, *ranks, 0))
    share = request.batch // ranks[1]
    if len(dataset) // ranks[1] < share:
        raise UserError(f"{len(dataset)} images do not fill a batch of {request.batch}")
    loader = test_loader(cfg, dataset, device, *ranks)
    endless: Iterator[Any] = itertools.chain.from_iterable(itertools.repeat(loader))
    return (batch for batch in endless if len(batch[0]) == share)


def peak(request: Request, device: Device, dtype: str) -> dict[str, Any]:
    """Of all devices together."""
    given = request.peak_tflops
    tflops, source = (given, "given") if given else flops.measured_peak(device, getattr(torch, dtype))
    return {"tflops": tflops * distributed.world_size(), "source": source}


def memory_alone(request: Request, name: SideName) -> float:
    """Peak memory in MB of a fresh process that runs this side alone."""
    spawn = multiprocessing.get_context("spawn")
    alone = replace(request, warmup=1, steps=2, phase_steps=0)
    with ProcessPoolExecutor(1, mp_context=spawn) as executor:
        return executor.submit(_peak_memory, alone, name, torch.get_num_threads()).result()


def _peak_memory(request: Request, name: SideName, threads: int) -> float:
    torch.set_num_threads(threads)
    device = get_device(request.device)
    device.activate()
    side = make_side(request, name, device, make_workload(request, device))
    gc.collect()
    device.reset_peak_memory()
    measure({"": side.phases}, device, request.warmup, request.steps, request.phase_steps)
    return device.max_memory_mb()


# ---- results


def case(request: Request, name: SideName, side: Side, parts: list[tuple], peak: dict[str, Any]) -> dict[str, Any]:
    """parts: of each rank the samples, the RoI counts by kind and step, and the peak memory."""
    samples = over_ranks([part[0] for part in parts])
    counts = {kind: [sum(c) for c in zip(*(part[1][kind] for part in parts))] for kind in parts[0][1]}
    memory = [part[2] for part in parts if part[2] is not None]
    metrics = step_metrics(samples, request.batch, len(parts))
    for kind, values in counts.items():
        if values:
            metrics[f"{kind}_rois"] = metric(values, "RoIs", "higher", gate=False)
    if memory:
        metrics["max_memory_mb"] = metric([max(memory)], "MB")
    metrics["init_seconds"] = metric([side.init_seconds], "s", gate=False)
    work: dict[str, Any] = {
        "data": request.data,
        "constant": request.data == "synthetic",
        "batch": request.batch,
        "trainable_parameters": side.trainable_parameters(),
    }
    extra: dict[str, Any] = {"losses": side.read_losses()}
    if request.data == "synthetic":
        in_mask_head = counts["mask_head"][0]
        work |= {"image": list(request.size), "proposals": "fixed", "mask_head_rois": in_mask_head}
        amount = step_flops(request, in_mask_head)
        speed = [amount / (milliseconds / 1000) / (peak["tflops"] * 1e12) for milliseconds in samples.step]
        metrics["mfu"] = metric(speed, "share", "higher", gate=False)
        extra |= {"flop_per_step": amount, "peak": peak}
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
        **extra,
    }


def case_name(request: Request, name: SideName) -> str:
    size = "{}x{} ".format(*request.size) if request.data == "synthetic" else ""
    peer = "" if name.system == "ours" else f"{name.system} " + ("channels-last " if name.channels_last else "")
    body = request.cfg.MODEL.BACKBONE.CONV_BODY
    return f"{request.kind} {peer}{body} {size}batch {request.batch} {name.dtype} {request.data}"


def step_flops(request: Request, in_mask_head: int) -> float:
    """FLOP of a step over all ranks, at the padded size."""
    multiple = max(1, request.cfg.DATALOADER.SIZE_DIVISIBILITY)
    size = tuple(-(-side // multiple) * multiple for side in request.size)
    count = flops.training_flops if request.training else flops.inference_flops
    return count(request.cfg, size).of(request.batch, in_mask_head)


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
        mfu = ""
        if "mfu" in value:
            mfu = f", {value['mfu']:.1%} of {entry['peak']['tflops']:.2f} TFLOP/s ({entry['peak']['source']})"
        lines += [
            entry["name"] + ("" if work["constant"] else ": the work is not constant, it follows the images"),
            f"  step {step['p50']:.1f} ms, p90 {step['p90']:.1f}, p99 {step['p99']:.1f}; {len(step['samples'])} steps,"
            f" {entry['warmup']} before them left out",
            f"  {value['images_per_second']:.3f} images/s, {value['images_per_second_per_device']:.3f} a device;"
            f" {value['data_wait_share']:.1%} of the time waiting for data{mfu}",
            f"  by phase, ms: {'  '.join(parts)}",
            f"  peak memory {value.get('max_memory_mb', float('nan')):.0f} MB; init {value['init_seconds']:.1f} s,"
            f" first step {value['compile_seconds']:.1f} s; {work['trainable_parameters']} trainable parameters;"
            f" RoIs in the mask head: {value['mask_head_rois']:g}",
        ]
    for row in result["ratios"]:
        low, high = row["interval"]
        lines.append(
            f"{row['ours']} is {row['times_faster']:.2f} times as fast as {row['peer']} (95%: {low:.2f}-{high:.2f})"
        )
    return lines
