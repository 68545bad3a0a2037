"""Steps with NaN or infinite numbers: kept from the weights on the device, found at the log line, and replayed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from ..config import dump
from ..data.loader import train_loader
from ..device import Device
from ..errors import CheckpointError, ConfigError, NonFiniteLossError
from ..models.weights import load_plain
from ..structures import Batch, BitmapBatch, ImageBatch, PolygonBatch, Targets
from . import distributed
from .checkpoint import write_atomically

if TYPE_CHECKING:
    from .train import Run

logger = logging.getLogger(__name__)

KEYS = {"config", "iteration", "rank", "model", "batches", "image_ids"}


class Guard:
    """Keeps steps whose gradient is not finite from the weights. It decides on the device, and nothing waits for it;
    the gradient is the mean over ranks, so all decide alike.

    policy: "stop": neither the first such step nor any later one changes the weights, so that at the next log line they
    are those that the step had. "skip": such steps alone. "scale": float16's scaler skips them. "none": the optimizer
    cannot skip on the device; the run stops at the next log line all the same.
    left_out: 0-dim float on the device, 1 where the last step was left out for its gradient.
    """

    def __init__(self, cfg: CfgNode, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, device: Device):
        fused = bool(optimizer.defaults.get("fused"))
        self.allowed = cfg.SOLVER.SKIP_NONFINITE_STEPS
        self.policy = "scale" if scaler.is_enabled() else ("skip" if self.allowed else "stop") if fused else "none"
        if self.allowed and self.policy == "none":
            raise ConfigError(
                f"SOLVER.SKIP_NONFINITE_STEPS is {self.allowed}, but {type(optimizer).__name__} cannot leave out a step"
                " on the device; set it to 0, or use SGD or AdamW where torch's is fused"
            )
        self.left_out = torch.zeros((), device=device.torch_device)
        self._held = torch.zeros_like(self.left_out)

    def judge(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        """Before the optimizer's step; norm: 0-dim, of its gradient. Its own tensors stay where they lie, so that a
        captured step finds them."""
        self.left_out.copy_(~norm.isfinite())
        torch.maximum(self._held, self.left_out, out=self._held)
        if self.policy in ("skip", "stop"):  # the fused optimizers read what the scaler gives them by this name
            optimizer.found_inf = self.left_out if self.policy == "skip" else self._held


@dataclass
class BadStep(Exception):
    """A step that must end the run. iteration: finished steps, with it. losses: this rank's."""

    iteration: int
    image_ids: list[int]
    losses: dict[str, float]


@dataclass
class Findings:
    """What is not finite in a step. first_module: the first whose output is not; "normalize" is the input."""

    losses: dict[str, float] = field(default_factory=dict)
    first_module: str | None = None
    gradients: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.losses or self.first_module or self.gradients)

    def __str__(self) -> str:
        parts = [f"{name} = {value:g}" for name, value in self.losses.items()]
        if self.first_module:
            parts.append(f"first in the output of {self.first_module}")
        if self.gradients and not self.losses:
            more = f" and {len(self.gradients) - 3} more" if len(self.gradients) > 3 else ""
            parts.append(f"gradient of {', '.join(self.gradients[:3])}{more}")
        return ", ".join(parts)


def examine(
    model: nn.Module, device: Device, dtype: torch.dtype, batches: list[tuple[ImageBatch, Targets]]
) -> Findings:
    """One forward and backward pass over a step's batches, looking at every module's output. Leaves no gradients."""
    found = Findings()

    def look(name: str, output: Any) -> None:
        if found.first_module is None and not all(tensor.isfinite().all() for tensor in _tensors(output)):
            found.first_module = name

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hook = module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
                hooks.callback(hook.remove)
        for images, targets in batches:
            with device.autocast(dtype):
                losses = model(images, targets)
            found.losses |= {name: loss.item() for name, loss in losses.items() if not loss.isfinite()}
            sum(losses.values()).backward()
    parameters = model.named_parameters()
    found.gradients = [name for name, p in parameters if p.grad is not None and not p.grad.isfinite().all()]
    model.zero_grad()
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating tensors in a nest of lists and dicts; structures are left out: their padding may be infinite."""
    if isinstance(value, Tensor):
        yield from (value,) if value.is_floating_point() else ()
    elif isinstance(value, (list, tuple, dict)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _tensors(entry)


def report(run: Run, bad: BadStep) -> NoReturn:
    """Every rank computes its part of the step again; the lowest in which something is not finite writes the dump.

    Raises:
        NonFiniteLossError: on every rank, with what was found on all.
    """
    iteration, rank = bad.iteration - 1, distributed.rank()
    batches = _read_again(run, iteration)
    weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in run.model.state_dict().items()}
    run.optimizer.zero_grad()
    distributed.seed_step(run.cfg.SEED, iteration)
    found = examine(run.model, run.device, getattr(torch, run.cfg.DTYPE), batches)
    seen = Findings({name: value for name, value in bad.losses.items() if not torch.tensor(value).isfinite()})
    everywhere = distributed.all_values((found or seen, bool(found), bad.image_ids))
    again = any(repeated for _, repeated, _ in everywhere)
    guilty = [(r, what, ids) for r, (what, repeated, ids) in enumerate(everywhere) if (repeated if again else what)]
    guilty = guilty or [(r, "the gradient", ids) for r, (_, _, ids) in enumerate(everywhere)]
    path = run.output / f"nonfinite_step_{bad.iteration}.pt"
    if rank == guilty[0][0]:
        content = {"model": weights, "batches": [[_plain(part) for part in batch] for batch in batches]}
        _write(
            path, content | {"iteration": iteration, "rank": rank, "image_ids": bad.image_ids, "config": dump(run.cfg)}
        )
    what = "; ".join(f"{what} on rank {r}, images {ids}" for r, what, ids in guilty)
    passing = "" if again else "; computed again, all is finite: a passing fault of the device?"
    raise NonFiniteLossError(
        f"iteration {bad.iteration}: {what}{passing}; python tools/replay_step.py {path} computes the step again; look"
        " at these images' annotations, or lower SOLVER.BASE_LR or set SOLVER.CLIP_GRADIENTS_NORM"
    )


def _read_again(run: Run, iteration: int) -> list[tuple[ImageBatch, Targets]]:
    """This rank's batches of a step: what they hold depends on the configuration and the step alone."""
    cfg = run.cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    parts = cfg.SOLVER.ACCUMULATE_STEPS
    ranks = distributed.rank(), distributed.world_size()
    batches = iter(train_loader(cfg, run.dataset, run.device, *ranks, iteration * parts))
    return [next(batches) for _ in range(parts)]


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        write_atomically(path, lambda file: torch.save(content, file))
    except CheckpointError as error:
        logger.error(str(error))  # the run ends for the step, not for this


def _plain(value: Any) -> Any:
    """A structure as a dict that torch.load reads with weights_only."""
    if not isinstance(value, Batch):
        return value
    return {"type": type(value).__name__, **{f.name: _plain(getattr(value, f.name)) for f in fields(value)}}


def _structure(value: Any) -> Any:
    """What _plain was given."""
    if not isinstance(value, dict):
        return value
    kinds = {kind.__name__: kind for kind in (ImageBatch, Targets, PolygonBatch, BitmapBatch)}
    return kinds[value["type"]](**{name: _structure(entry) for name, entry in value.items() if name != "type"})


def read_dump(path: Path) -> dict[str, Any]:
    """The file that `report` writes; "batches" are structures again.

    Raises:
        CheckpointError: missing, damaged, or another kind of file.
    """
    try:
        content = load_plain(path)
        if not isinstance(content, dict) or not content.keys() >= KEYS:
            raise ValueError("it is not a step that training wrote")
        batches = [tuple(_structure(part) for part in batch) for batch in content["batches"]]
    except Exception as error:  # torch.load raises whatever a damaged file makes it stumble over
        raise CheckpointError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    return content | {"batches": batches}
