"""Gradients averaged over ranks between two graphs: what DistributedDataParallel does where steps are captured."""

from __future__ import annotations

from itertools import accumulate, chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..device import Device
from ..errors import ConfigError
from ..models.layers import SyncBatchNorm2d
from . import distributed

# Values: each gradient begins at 256 bytes, as from an allocator, for kernels that read several values at once
ALIGNED = 64


class GradientExchange:
    """The gradients of all ranks in one buffer, which graphs find where it was allocated: `collect` fills it, `add_up`
    makes it the sum over ranks, `hand_out` makes it the gradients.

    Ranks replay other graphs, or none, in the same step, so what they tell each other lies outside of graphs and is the
    same for all. Nothing here waits for the device. The weights and buffers become the main rank's.

    Raises:
        ConfigError: a norm of the model asks the other ranks in the forward pass.
    """

    def __init__(self, model: nn.Module, device: Device) -> None:
        _check_forward_is_alone(model)
        distributed.share(chain(model.parameters(), model.buffers()))
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._buffer, self._views = _laid_out(self._parameters)
        self._ranks, self._attaches = distributed.world_size(), device.gradient_views
        self._running = [buffer for name, buffer in model.named_buffers() if name == "positives_average"]

    def share_running(self) -> None:
        """Before a step, what the last one left on the main rank and this one reads. Batch norms read no running
        statistics in training."""
        distributed.share(self._running)

    def collect(self) -> None:
        """After the backward pass: this rank's part of the mean, 0 where a parameter has no gradient."""
        for parameter, view in zip(self._parameters, self._views):
            if parameter.grad is None:
                view.zero_()
        pairs = [(v, p.grad) for p, v in zip(self._parameters, self._views) if p.grad is not None]
        torch._foreach_copy_([view for view, _ in pairs], [gradient for _, gradient in pairs])
        self._buffer /= self._ranks
        if self._attaches:  # else a backward pass that runs eagerly would add to what a graph has left
            for parameter in self._parameters:
                parameter.grad = None

    def add_up(self) -> None:
        dist.all_reduce(self._buffer)

    def hand_out(self) -> None:
        """Before the update. Optimizers that lay gradients out for themselves get a copy, where theirs lie."""
        for parameter, view in zip(self._parameters, self._views):
            if self._attaches:
                parameter.grad = view
            elif parameter.grad is None:
                parameter.grad = view.clone()
            else:
                parameter.grad.copy_(view)


def _laid_out(parameters: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """Zeros, and a part of them for each parameter, with its size and strides: channels-last weights have their own."""
    sizes = [-(-parameter.numel() // ALIGNED) * ALIGNED for parameter in parameters]
    *starts, whole = accumulate(sizes, initial=0)
    buffer = parameters[0].new_zeros(whole)
    return buffer, [buffer.as_strided(p.size(), p.stride(), start) for p, start in zip(parameters, starts)]


def _check_forward_is_alone(model: nn.Module) -> None:
    ranks = distributed.world_size()
    for name, module in model.named_modules():
        if isinstance(module, SyncBatchNorm2d):
            raise ConfigError(
                f"SOLVER.GRAPH_CAPTURE is True with {ranks} ranks, but {name} (SyncBN) asks the others in the forward"
                " pass, which no graph does; set its NORM, such as MODEL.RESNETS.NORM, to FrozenBN, GN or BN, or"
                " SOLVER.GRAPH_CAPTURE to False"
            )
