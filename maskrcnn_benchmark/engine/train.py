"""The training run: build everything, then one loop."""

from __future__ import annotations

import gc
import inspect
import json
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from .. import ops
from ..benchmark import environment
from ..config import dump, parse_config, sha256
from ..data.catalog import check_same_categories, check_same_keypoints
from ..data.coco import CocoDataset
from ..data.loader import TrainLoader, train_loader
from ..device import Device
from ..errors import CheckpointError, ConfigError, Terminated
from ..evaluation.coco import format_table
from ..models.build import build_model
from ..models.weights import load_weights
from ..report import mllog, run_page
from ..report.console import TrainingMeter, training_progress
from ..structures import ImageBatch, Targets
from . import checkpoint, determinism, distributed, graphs, nonfinite, scoring, watch
from .datasets import open_dataset, test_datasets
from .inference import combine, evaluate_model, run_model
from .metrics import LossWindow, MetricsWriter, Pace, stragglers
from .optim import Schedule, make_optimizer, make_schedule, set_learning_rate

logger = logging.getLogger(__name__)

Batch = tuple[ImageBatch, Targets]
BEST = "model_best.pth"
# Task -> the numbers written with the metrics; the first of the last task decides which checkpoint is the best
METRICS = {
    "box_proposal": ("AR@1000", "AR@100"),
    "bbox": ("AP", "AP50", "AP75"),
    "segm": ("AP", "AP50", "AP75"),
    "keypoints": ("AP", "AP50", "AP75"),
}
# The same of TEST.METRICS' further ones, which decide nothing
FURTHER = {"voc07": ("AP50",), "voc": ("AP50",), "cityscapes": ("AP", "AP50")}


@dataclass
class Run:
    """All that a training run consists of. `model` is the bare model, `parallel` what the step calls."""

    cfg: CfgNode
    device: Device
    output: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    guard: nonfinite.Guard
    schedule: Schedule
    loader: TrainLoader
    batches: Iterator[Batch]
    steps_per_epoch: int
    dataset: CocoDataset
    test: dict[str, CocoDataset]
    meter: TrainingMeter
    metrics: MetricsWriter
    start: int = 0
    done: int = 0
    best: float = -1.0
    without_gain: int = 0
    scores: dict[str, Any] = field(default_factory=dict)
    scored_at: int | None = None
    scorer: scoring.Background = field(default_factory=scoring.Background)
    pending: Pending | None = None
    loss: float | None = None
    parallel: nn.Module = field(init=False)
    losses: LossWindow = field(init=False)
    pace: Pace = field(init=False)
    termination: watch.Termination = field(default_factory=watch.Termination)
    performance: dict[str, Any] = field(default_factory=dict)
    mllog: mllog.MLLog = field(default_factory=mllog.MLLog)
    captured: graphs.StepGraphs | None = None

    def __post_init__(self) -> None:
        self.losses = LossWindow(self.guard.policy, self.guard.allowed)
        if graphs.asked_for(self.cfg, self.device):
            self.parallel = self.model
            both = partial(gradients, self), partial(update_parameters, self)
            self.captured = graphs.StepGraphs(self.device, self.model, self.optimizer, *both)
        else:
            self.parallel = parallelize(self.model, self.device, self.cfg.DISTRIBUTED.BUCKET_MB)
        self.pace = Pace(self.device, marked=self.captured is None)


@dataclass
class Pending:
    """An evaluation that is being scored while training goes on: of step `done`, begun at `started`. content: the
    checkpoint of that step, in case it is the best."""

    done: int
    started: float
    scores: Future
    content: dict[str, Any] | None


def train(run: Run) -> int:
    """The loop; returns the number of steps done. `iteration` counts optimizer steps from 0, logs and files count
    finished ones."""
    cfg, total, done = run.cfg, run.schedule.total, run.start
    run.parallel.train()
    if run.scored_at != done > 0 and _due(cfg, run.steps_per_epoch, done, total).evaluate:
        evaluate(run, done, scoring.overlaps(cfg, run.device))  # the former run was ended before its scores were there
    for iteration in training_progress(range(run.start, total), run.meter):
        watch.at("reading data", iteration)
        run.mllog.begin_step(iteration)
        set_learning_rate(run.optimizer, run.schedule.lr(iteration))
        distributed.seed_step(cfg.SEED, iteration)
        waited = time.perf_counter()
        with run.termination.between_steps():
            batches = [next(run.batches) for _ in range(cfg.SOLVER.ACCUMULATE_STEPS)]
        watch.at("computing")
        started = time.perf_counter()
        with determinism.all_at_once(cfg.DETERMINISTIC and iteration == run.start, run.device):
            losses = train_step(run, batches)
        done = run.done = iteration + 1
        run.losses.add(done, losses, [i for images, _ in batches for i in images.image_ids], run.guard.left_out)
        due = _due(cfg, run.steps_per_epoch, done, total)
        if due.log:
            values = read_losses(run)  # waits for the device: the only place where a step does
        run.meter.add(time.perf_counter() - waited, started - waited)
        run.pace.add(time.perf_counter() - waited, started - waited)
        if due.log:
            with run.pace.aside("log"):
                log(run, done, values)
            collect(run, wait=False)
        run.mllog.end_step(done, run.meter)
        if due.evaluate and run.test:
            evaluate(run, done, scoring.overlaps(cfg, run.device))
        if due.checkpoint:
            save(run, done, numbered(done))
        if reached_target(run):
            logger.info("MLPERF.MIN_BBOX_MAP and MIN_SEGM_MAP are reached at iteration %d: training stops", done)
            break
        if due.evaluate and run.without_gain >= cfg.SOLVER.EARLY_STOP_PATIENCE > 0:
            logger.info(
                "%d evaluations without gain over %.4f (SOLVER.EARLY_STOP_PATIENCE): training stops at iteration %d",
                *(run.without_gain, run.best, done),
            )
            break
    collect(run, wait=True)
    return done


def train_step(run: Run, batches: list[Batch]) -> dict[str, Tensor]:
    """Forward, backward and update over the micro-batches of one step, as a graph of the device where
    SOLVER.GRAPH_CAPTURE asks for it. Returns the losses, means over the micro-batches, on the device; nothing here
    waits for it."""
    if run.captured is not None:
        return run.captured(batches)
    losses = gradients(run, batches)
    update_parameters(run)
    return losses


def gradients(run: Run, batches: list[Batch]) -> dict[str, Tensor]:
    """Of the mean over the micro-batches, scaled; returns its losses."""
    sums: dict[str, Tensor] = {}
    for number, (images, targets) in enumerate(batches):
        with _no_gradient_exchange(run.parallel, number + 1 < len(batches)):
            with run.device.autocast(_dtype(run.cfg)), run.pace.phase("forward"):
                losses = run.parallel(images, targets)
            with run.pace.phase("backward"):
                run.scaler.scale(sum(losses.values()) / len(batches)).backward()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.detach() / len(batches)
    return sums


def update_parameters(run: Run) -> None:
    with run.pace.phase("optimizer"):
        update(run.cfg, run.model, run.optimizer, run.scaler, run.guard)


def update(
    cfg: CfgNode,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    guard: nonfinite.Guard,
) -> None:
    """The parameters, from gradients that the scaler has scaled; leaves no gradients."""
    if cfg.SOLVER.CLIP_GRADIENTS_NORM > 0:
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.SOLVER.CLIP_GRADIENTS_NORM)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    guard.judge(optimizer, norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()  # no set_to_none: Ascend's fused optimizers refuse it


def _no_gradient_exchange(model: nn.Module, more_to_come: bool):
    """Only the last micro-batch of a step averages gradients over ranks."""
    if more_to_come and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return torch.enable_grad()


@dataclass(frozen=True)
class Due:
    log: bool
    evaluate: bool
    checkpoint: bool


def _due(cfg: CfgNode, steps_per_epoch: int, done: int, total: int) -> Due:
    """What follows step `done`. A checkpoint is preceded by a reading of the losses: none is written after a NaN."""
    solver, last = cfg.SOLVER, done == total
    periods = solver.CHECKPOINT_PERIOD, solver.EVAL_PERIOD
    if solver.SAVE_EPOCHS:
        periods = (solver.SAVE_EPOCHS * steps_per_epoch,) * 2
    evaluate_ = bool(periods[1] and done % periods[1] == 0)
    evaluate_ = not last and (evaluate_ or (cfg.PER_EPOCH_EVAL and done % steps_per_epoch == 0))
    checkpoint_ = cfg.SAVE_CHECKPOINTS and not last and done % periods[0] == 0
    return Due(done % cfg.LOGGING.PERIOD == 0 or last or evaluate_ or checkpoint_, evaluate_, checkpoint_)


def read_losses(run: Run) -> dict[str, float]:
    """The mean losses since the last reading. Raises NonFiniteLossError on every rank, and leaves the step's dump."""
    watch.at("exchanging losses")
    try:
        return run.losses.read()
    except nonfinite.BadStep as bad:
        nonfinite.report(run, bad)


def log(run: Run, done: int, losses: dict[str, float]) -> None:
    """One line for people, one for metrics.jsonl."""
    run.loss = losses["loss"]
    lr, memory = run.schedule.lr(done - 1), run.device.max_memory_mb()
    logger.info(run.meter.console_line(done, losses, lr, memory))
    spent = run.pace.read()
    for slow in stragglers(spent, run.cfg.LOGGING.STRAGGLER_SHARE):
        if distributed.is_main():
            logger.warning(slow)
    recent = run.meter.recent()
    skipped = {} if run.guard.policy == "stop" else {"skipped_steps": run.losses.skipped}
    if run.losses.skipped_now and run.scaler.is_enabled():
        logger.info("float16: %d steps overflowed and were left out", run.losses.skipped_now)
    run.metrics.write(
        {
            "iter": done,
            "epoch": round(done / run.steps_per_epoch, 4),
            **{name: value if math.isfinite(value) else None for name, value in losses.items()},
            **skipped,
            "lr": lr,
            **recent,
            **{f"{name}_time": seconds for name, seconds in spent.items() if name not in ("step", "data")},
            "max_memory_mb": round(memory, 1),
        }
    )


def evaluate(run: Run, done: int, overlapped: bool = False) -> None:
    """Scores the model on DATASETS.TEST, and keeps the best weights as model_best.pth. overlapped: returns when the
    model has seen all images; `collect` does the rest."""
    collect(run, wait=True)
    distributed.share_buffers(run.model)
    run.mllog.eval_start(done)
    if not overlapped:
        with run.termination.between_steps():
            scores = evaluate_model(run.cfg, run.device, run.model, run.test, run.output)
        record(run, done, scores, checkpoint_content(run, done) if saves(run) else None)
        return
    started = time.perf_counter()
    with run.termination.between_steps():
        requests = run_model(run.cfg, run.device, run.model, run.test, run.output)
    if requests:
        content = _copy_to_host(checkpoint_content(run, done)) if saves(run) else None
        run.pending = Pending(done, started, run.scorer.submit(requests), content)


def collect(run: Run, wait: bool) -> None:
    """Records the evaluation that is being scored, if it is finished or is to be waited for."""
    pending = run.pending
    if pending is None or not (wait or pending.scores.done()):
        return
    run.pending = None
    scores = combine(run.test, pending.scores.result())
    record(run, pending.done, scores | {"eval_seconds": time.perf_counter() - pending.started}, pending.content)


def record(run: Run, done: int, scores: dict[str, Any], content: dict[str, Any] | None) -> None:
    """The scores of step `done`: log, metrics, and model_best.pth from its checkpoint when they are the best so far."""
    run.scores = scores
    run.mllog.eval_stop(done, run.scores)
    run.scored_at = done
    logger.info("accuracy at iteration %d\n%s", done, format_table(run.scores))
    written = {task: names for task, names in (METRICS | FURTHER).items() if task in run.scores}
    named = {f"{task}/{name}": run.scores[task][name] for task, names in written.items() for name in names}
    run.metrics.evaluated({"iter": done, "eval_seconds": round(scores["eval_seconds"], 3), **named})
    task = _tasks(run)[-1]
    score = run.scores[task][METRICS[task][0]]
    run.without_gain += 1
    if score is not None and score > run.best:
        run.best, run.without_gain = score, 0
        if content is not None:
            with run.pace.aside("checkpoint"):
                logger.info("wrote %s", checkpoint.save(run.output, BEST, content | {"best": score}, last=False))
    with run.pace.aside("log"):
        write_report(run.output)


def reached_target(run: Run) -> bool:
    """MLPERF's targets, when they are set, against the last evaluation."""
    target = {"bbox": run.cfg.MLPERF.MIN_BBOX_MAP, "segm": run.cfg.MLPERF.MIN_SEGM_MAP}
    tasks = [task for task in _tasks(run) if task in target]
    return bool(tasks) and all(0 < target[task] <= (run.scores[task]["AP"] or 0.0) for task in tasks)


def _tasks(run: Run) -> tuple[str, ...]:
    return tuple(task for task in METRICS if task in run.scores)


def _dtype(cfg: CfgNode) -> torch.dtype:
    return getattr(torch, cfg.DTYPE)


def numbered(done: int) -> str:
    return f"model_{done:07d}.pth"


def save(run: Run, done: int, name: str, last: bool = True) -> None:
    """A checkpoint: weights, optimizer, scaler and where the run stands; also names and preprocessing, so that
    predict.py needs nothing else."""
    if not saves(run):
        return
    watch.at("writing a checkpoint")
    with run.pace.aside("checkpoint"):
        path = checkpoint.save(run.output, name, checkpoint_content(run, done), last)
        logger.info("wrote %s", path)
        if run.cfg.SOLVER.CHECKPOINTS_KEPT:
            checkpoint.keep(run.output, run.cfg.SOLVER.CHECKPOINTS_KEPT)


def save_and_leave(run: Run) -> NoReturn:
    """After SIGTERM, between two steps: the state of the last one, on the main rank.

    Raises:
        Terminated: always, with what was saved.
    """
    problem = run.losses.problem()
    if problem is None and saves(run):
        save(run, run.done, numbered(run.done))
    kept = f"saved as {run.output / numbered(run.done)}; --resume continues from there"
    if not run.cfg.SAVE_CHECKPOINTS:
        kept = "not saved, for SAVE_CHECKPOINTS is False"
    raise Terminated(f"SIGTERM: the run has ended after iteration {run.done}, {problem or kept}")


def saves(run: Run) -> bool:
    """Whether this rank writes checkpoints."""
    return distributed.is_main() and run.cfg.SAVE_CHECKPOINTS


def checkpoint_content(run: Run, done: int) -> dict[str, Any]:
    """Tensors are the model's own, not copies."""
    return {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "iteration": done,
        "best": run.best,
        "without_gain": run.without_gain,
        "scored_at": run.scored_at,
        "config": dump(run.cfg),
        "category_ids": run.dataset.category_ids,
        "category_names": run.dataset.category_names,
        "keypoint_limbs": [list(limb) for limb in run.dataset.skeleton.limbs] if run.dataset.skeleton else [],
        "world_size": distributed.world_size(),
    }


def _copy_to_host(value: Any) -> Any:
    """The same nest of dicts and lists with copies of its tensors in the host's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy_to_host(entry) for key, entry in value.items()}
    return [_copy_to_host(entry) for entry in value] if isinstance(value, list) else value


def build_run(cfg: CfgNode, device: Device, output: Path, resume: bool | Path) -> Run:
    """Everything of a run, fresh or at the state of a checkpoint: the one given, or its last."""
    rank, world_size = distributed.rank(), distributed.world_size()
    if not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty: name a data set of data/catalog.py, such as coco_2017_train")
    if cfg.DETERMINISTIC:
        determinism.require()
    determinism.settle_convolutions(cfg, device)
    torch.manual_seed(cfg.SEED)
    dataset = open_dataset(cfg.DATASETS.TRAIN, cfg, training=True)
    test = test_datasets(cfg)
    for test_set in test.values():
        check_same_categories(dataset, test_set)
        check_same_keypoints(dataset, test_set)
    model = build_model(cfg, device)
    optimizer = make_optimizer(cfg, model, device)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.DTYPE == "float16" and device.grad_scaler)
    content = None
    if resume and (found := find_state(output, resume)):
        content = found[1]
        load_state(cfg, *found, model, optimizer, scaler)
    if content is None and cfg.MODEL.WEIGHT:
        load_weights(model, cfg.MODEL.WEIGHT, cfg.MODEL.ALLOW_PICKLE, cfg.MODEL.REPLACE_HEADS)
    start, best = (content["iteration"], content["best"]) if content else (0, -1.0)
    if content and (output / BEST).is_file():
        # Scored after the checkpoint was written, when evaluation overlaps with training
        best = max(best, best_score(output))
    loader = train_loader(cfg, dataset, device, rank, world_size, start * cfg.SOLVER.ACCUMULATE_STEPS)
    steps_per_epoch = max(1, loader.iterations_per_epoch // cfg.SOLVER.ACCUMULATE_STEPS)
    schedule = make_schedule(cfg, steps_per_epoch)
    return Run(
        cfg=cfg,
        device=device,
        output=output,
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        guard=nonfinite.Guard(cfg, optimizer, scaler, device),
        schedule=schedule,
        loader=loader,
        batches=iter(loader),
        steps_per_epoch=steps_per_epoch,
        dataset=dataset,
        test=test,
        meter=TrainingMeter(schedule.total, start, cfg.SOLVER.IMS_PER_BATCH, cfg.LOGGING.WARMUP_STEPS),
        metrics=MetricsWriter(output, cfg.LOGGING.TENSORBOARD, start),
        start=start,
        done=start,
        best=best,
        # Checkpoints of before there was SOLVER.EARLY_STOP_PATIENCE do not count
        without_gain=content.get("without_gain", 0) if content else 0,
        scored_at=content.get("scored_at") if content else None,
    )


def best_score(output: Path) -> float:
    """Of model_best.pth; a damaged one is replaced by the next evaluation."""
    try:
        return checkpoint.read(output / BEST)["best"]
    except CheckpointError as error:
        logger.warning("%s; the next evaluation writes it anew", error)
        (output / BEST).unlink()
        return -1.0


def parallelize(model: nn.Module, device: Device, bucket_mb: int) -> nn.Module:
    """DistributedDataParallel when there are ranks, which averages `bucket_mb` MB of gradients at a time. Buffers are
    exchanged only where a batch norm or RetinaNet's moving average changes them."""
    if distributed.world_size() == 1:
        return model
    running = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    running |= any(name == "positives_average" for name, _ in model.named_buffers())
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    exchange = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # renamed in 2.13
    ids = [device.torch_device] if device.torch_device.index is not None else None
    views = device.gradient_views
    # oneDNN's gradients of 1x1 convolutions have other strides for the same memory: they are copied, as without views
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(
        model, device_ids=ids, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=views, **{exchange: running}
    )


def find_state(output: Path, resume: bool | Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from and what it holds: the one given, or the run's last; None, with a line in the log,
    when there is none yet. Raises CheckpointError: it cannot be read, holds a model alone, or differs among ranks."""
    found = (resume, checkpoint.read(resume)) if isinstance(resume, Path) else checkpoint.read_last(output)
    places = distributed.all_values(None if found is None else (found[0].name, found[1]["iteration"]))
    if len(set(places)) > 1:
        raise CheckpointError(f"the ranks find other checkpoints in {output}: {places}; it must be one for all nodes")
    if found is None:
        logger.info("--resume: %s holds no %s, so the run starts from the beginning", output, checkpoint.LAST)
    elif not found[1]["optimizer"]:
        raise CheckpointError(
            f"{found[0]} holds a model without its optimizer: start anew with the file as MODEL.WEIGHT"
        )
    return found


def load_state(
    cfg: CfgNode, path: Path, content: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, scaler
) -> None:
    """Loads what `path` holds into model, optimizer and scaler. Raises CheckpointError."""
    checkpoint.load_model(model, content, path)
    before = parse_config(content["config"], f"the configuration in {path}")
    if before.SOLVER.OPTIMIZER != cfg.SOLVER.OPTIMIZER:
        raise CheckpointError(
            f"{path} holds the state of {before.SOLVER.OPTIMIZER}, but SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER}: "
            "keep it, or start anew with the file as MODEL.WEIGHT"
        )
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(content["optimizer"])
    for group, option in zip(optimizer.param_groups, options):
        group.update(option)  # weight decay and momentum are the configuration's, not the former run's
    if content["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(content["scaler"])
    for key in ("IMS_PER_BATCH", "ACCUMULATE_STEPS"):
        if before.SOLVER[key] != cfg.SOLVER[key]:
            logger.warning(
                "SOLVER.%s was %s, now %s: the order of images changes", key, before.SOLVER[key], cfg.SOLVER[key]
            )
    if content["world_size"] != distributed.world_size():
        logger.warning(
            "%s was written by %d ranks, now there are %d: the run continues, but not bit for bit",
            *(path, content["world_size"], distributed.world_size()),
        )
    logger.info("continuing from %s at iteration %d", path, content["iteration"])


def run_training(cfg: CfgNode, device: Device, resume: bool | Path = False, skip_test: bool = False) -> Run:
    """A whole run: train, evaluate, write result.json. Returns the run; its `scores` are empty without a test.

    resume: continue from OUTPUT_DIR's last checkpoint, or from this one.
    """
    begun = mllog.now_ms()
    output = prepare_output(cfg)
    for op in environment.KERNELS:
        ops.kernel_in_use(op, device.type)  # says so in the log
    run = build_run(cfg, device, output, resume)
    # Only now, when the run is sure to begin: a mistyped key must not cost a former run its record.
    if distributed.is_main():
        checkpoint.remove_half_written(output)
        if not resume:
            checkpoint.forget(output)
    write_config(cfg, output)
    write_json(output / "environment.json", environment.describe(device, distributed.world_size()))
    determinism.record_order(cfg, output, run.loader, run.dataset.image_ids, run.schedule.total)
    start_mllog(run, resume, begun)
    success = False
    try:
        with run.termination, out_of_the_collectors_sight():
            done = train(run)
            save(run, done, "model_final.pth")
            if run.test and not skip_test and not (run.scores and run.scored_at == done):
                evaluate(run, done)
                save(run, done, "model_final.pth")  # again, with the best score: a longer run must not forget it
        success = reached_target(run) or not (cfg.MLPERF.MIN_BBOX_MAP or cfg.MLPERF.MIN_SEGM_MAP)
    except Terminated:
        save_and_leave(run)
    finally:
        run.mllog.run_stop(success)
        run.scorer.close()
        run.metrics.close()
        run.parallel = run.model  # lets go of the ranks' group, which must be gone before the process ends
    run.performance = measured(run, trained=done > run.start)
    write_result(cfg, device, output, run.scores, run.performance, done)
    write_report(output)
    return run


@contextmanager
def out_of_the_collectors_sight() -> Iterator[None]:
    """What a run is made of is no garbage until it ends. To look through its 300,000 objects again takes the garbage
    collector 145 ms, three steps of a fast device."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def start_mllog(run: Run, resume: bool, begun: int) -> None:
    """With LOGGING.MLLOG, MLPerf's lines up to run_start, on the main rank."""
    cfg = run.cfg
    if not (cfg.LOGGING.MLLOG and distributed.is_main()):
        return
    run.mllog = mllog.MLLog(run.output / mllog.FILE, resume)
    mllog.log_submission(run.mllog, cfg, f"{distributed.world_size()} x {run.device.name}", begun)
    mllog.log_settings(run.mllog, cfg, run.schedule, len(run.dataset), sum(map(len, run.test.values())))
    run.mllog.run_start(run.start, run.schedule.total, run.steps_per_epoch)


def measured(run: Run, trained: bool) -> dict[str, Any]:
    """result.json's performance. A finished run that is resumed trains nothing, and keeps the figures it had."""
    result = run.output / "result.json"
    if not trained and result.is_file():
        return json.loads(result.read_text())["performance"]
    return run.meter.performance() | {
        "max_memory_mb": round(run.device.max_memory_mb(), 1),
        "eval_seconds": run.scores.get("eval_seconds"),
    }


def prepare_output(cfg: CfgNode) -> Path:
    """Creates OUTPUT_DIR, and finds out before anything long begins whether files can be written there."""
    output = Path(cfg.OUTPUT_DIR)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write to OUTPUT_DIR {output}: {error.strerror}") from error
    return output


def write_config(cfg: CfgNode, output: Path) -> None:
    """The resolved configuration as config.yaml, on the main rank."""
    if distributed.is_main():
        checkpoint.write_atomically(output / "config.yaml", lambda file: file.write(dump(cfg).encode()))


def write_result(
    cfg: CfgNode, device: Device, output: Path, scores: dict, performance: dict, iteration: int | None = None
) -> None:
    """result.json, on the main rank. iteration: finished steps of a training run."""
    result = {
        "iteration": iteration,
        "bbox": None,
        "segm": None,
        **{key: value for key, value in scores.items() if key != "eval_seconds"},
        "performance": performance,
        "environment": environment.describe(device, distributed.world_size()),
        "config_sha256": sha256(cfg),
    }
    write_json(output / "result.json", result)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """On the main rank."""
    if distributed.is_main():
        checkpoint.write_atomically(path, lambda file: file.write(json.dumps(content, indent=2).encode()))


def write_report(output: Path) -> None:
    """report.html from the files in `output`, on the main rank."""
    if not distributed.is_main():
        return
    try:
        run_page.write([output], output / run_page.FILE)
        logger.info("wrote %s", output / run_page.FILE)
    except Exception:  # days of training must not end for a page that can be made again
        logger.exception("no %s; python -m maskrcnn_benchmark.report %s makes it", run_page.FILE, output)
