"""Optimizer, learning rate schedule, and their scaling from the total batch."""

from __future__ import annotations

import importlib
import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from ..device import Device
from ..errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the iteration alone, so that there is no scheduler state to save.

    total, steps, warmup_iterations are in optimizer steps. method: see SOLVER.WARMUP_METHOD.
    """

    base_lr: float
    total: int
    steps: tuple[int, ...]
    gamma: float
    cosine: bool
    warmup_iterations: int
    warmup_factor: float
    warmup_method: str

    def lr(self, iteration: int) -> float:
        """The rate of step `iteration`, counted from 0."""
        if self.cosine:  # Loshchilov and Hutter 2017, without restarts
            rate = self.base_lr * (1 + math.cos(math.pi * iteration / self.total)) / 2
        else:
            rate = self.base_lr * self.gamma ** sum(iteration >= step for step in self.steps)
        if iteration >= self.warmup_iterations:
            return rate
        if self.warmup_method == "mlperf_linear":
            return max(rate - (self.warmup_iterations - iteration) * self.warmup_factor, 0.0)
        if self.warmup_method == "constant":
            return rate * self.warmup_factor
        alpha = iteration / self.warmup_iterations
        return rate * (self.warmup_factor * (1 - alpha) + alpha)


def make_schedule(cfg: CfgNode, steps_per_epoch: int) -> Schedule:
    """The schedule that SOLVER describes; scaled from SOLVER.REFERENCE_IMS_PER_BATCH where that is set."""
    solver = cfg.SOLVER
    base_lr, total, steps, warmup = solver.BASE_LR, solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS
    scale, warmup_factor = 1.0, solver.WARMUP_FACTOR
    if solver.REFERENCE_IMS_PER_BATCH:
        scale = solver.IMS_PER_BATCH / solver.REFERENCE_IMS_PER_BATCH
        base_lr, warmup = base_lr * scale, round(warmup / scale)
        if solver.WARMUP_METHOD == "mlperf_linear":  # the factor is a learning rate an iteration
            warmup_factor *= scale**2
    if solver.MAX_EPOCHS:
        total = solver.MAX_EPOCHS * steps_per_epoch
        steps = tuple(step * steps_per_epoch for step in steps)
    else:
        total, steps = max(1, round(total / scale)), tuple(round(step / scale) for step in steps)
    logger.info(
        "schedule: %d images a step, %d steps (%.2f epochs), learning rate %g, steps %s, warm-up %d%s",
        *(solver.IMS_PER_BATCH, total, total / steps_per_epoch, base_lr, tuple(steps), warmup),
        f" (scaled by {scale:g} from {solver.REFERENCE_IMS_PER_BATCH} images a step)" if scale != 1 else "",
    )
    return Schedule(
        base_lr=base_lr,
        total=total,
        steps=tuple(steps),
        gamma=solver.GAMMA,
        cosine=solver.LR_SCHEDULER == "cosine",
        warmup_iterations=warmup,
        warmup_factor=warmup_factor,
        warmup_method=solver.WARMUP_METHOD,
    )


def make_optimizer(cfg: CfgNode, model: nn.Module, device: Device) -> torch.optim.Optimizer:
    """SOLVER.OPTIMIZER over the trainable parameters: the device's own where it has one, fused where torch's can be.

    Biases have their own learning rate factor and weight decay, as upstream; so there are two groups. Where steps are
    captured as graphs, torch's own take the learning rate from a tensor on the device: a graph would keep a number.
    """
    solver = cfg.SOLVER
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    biases = [p for name, p in named if name.endswith("bias")]
    others = [p for name, p in named if not name.endswith("bias")]
    groups = [
        {"params": others, "lr_factor": 1.0, "weight_decay": solver.WEIGHT_DECAY},
        {"params": biases, "lr_factor": solver.BIAS_LR_FACTOR, "weight_decay": solver.WEIGHT_DECAY_BIAS},
    ]
    options = {} if solver.OPTIMIZER == "AdamW" else {"momentum": solver.MOMENTUM}
    if solver.OPTIMIZER in device.optimizers:
        return device.optimizers[solver.OPTIMIZER](groups, lr=solver.BASE_LR, **options)
    if solver.OPTIMIZER == "ApexFusedSGD":
        return _apex_fused_sgd()(groups, lr=solver.BASE_LR, **options)
    kind = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[solver.OPTIMIZER]
    if solver.GRAPH_CAPTURE and device.graph_type:
        for group in groups:
            group["lr"] = torch.tensor(solver.BASE_LR, device=device.torch_device)
        if solver.OPTIMIZER == "AdamW":
            options["capturable"] = True
    optimizer = kind(groups, lr=solver.BASE_LR, fused=device.fused_optimizer, **options)
    if solver.OPTIMIZER == "SGD" and device.fused_optimizer and solver.MOMENTUM:
        for parameter in others + biases:
            # torch 2.13 makes them in its first step of fresh memory, and leaves that in place when it skips the step,
            # as float16's scaler often does: the second step would start from garbage
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _apex_fused_sgd() -> type[torch.optim.Optimizer]:
    try:
        return importlib.import_module("apex.optimizers").FusedSGD
    except (ImportError, RuntimeError) as error:  # RuntimeError: apex without its CUDA extensions
        raise ConfigError(
            f"SOLVER.OPTIMIZER is ApexFusedSGD, but NVIDIA apex cannot be imported ({error}); install it, or use SGD: "
            "torch's own is fused on CUDA"
        ) from error


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        value = lr * group["lr_factor"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value
